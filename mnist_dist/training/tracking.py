"""The driver's side of trackers: a thread for each follows a run's `history.csv` and logs what is new there.

Owns: which epochs a tracker has been told (`tracked-mlflow.json` in the run's folder, beside the id under which it
knows the run), when a run begins and ends there, and that a tracker that fails or hangs costs the training nothing but
a warning. Does not own: the trackers (`trackers.py`).

Whatever dies, the history holds each epoch once and in order, so a resumed run logs those that are missing. A driver
that is killed between an epoch and the record of it leaves the tracker to say what it was told; W&B cannot say it
offline, and then gets that epoch twice, with the same step.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mnist_dist.config import TrackerName, TrainJob
from mnist_dist.errors import Interrupted, LockLost, first_line
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread
from mnist_dist.training.runs import TRACKED_PREFIX, Run
from mnist_dist.training.trackers import TRACKERS, End, TrackedRun, Tracker

SECONDS_BETWEEN_LOOKS = 2.0  # An object store is asked this often, and an epoch appears this late.
PATIENCE_S, HURRIED_S = 60.0, 5.0  # for a tracker at the end of a run; after a signal
FINAL_METRICS = ("test_", "validation_", "best_epoch", "images_per_s")
"""What the metrics of a finished run that are logged begin with."""


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """`tracked-<tracker>.json`."""

    id: str
    """The run's id at the tracker."""
    settings: str
    """Hash of the settings: a run with others that takes over the folder is another one."""
    epochs: int = 0
    """Number of the last epoch that was logged."""


@dataclass(frozen=True, kw_only=True)
class TrackedJob:
    """A run as it is described to its trackers."""

    run: Run
    project: str
    name: str
    settings: Mapping[str, Any]
    hash: str
    """Of the settings."""


def tracked_job(job: TrainJob, run: Run, *, recipe: str, name: str) -> TrackedJob:
    """Describes a training run to its trackers.

    Args:
        job: what is trained.
        run: its folder.
        recipe: the recipe's name.
        name: what to call the run.
    """
    settings = {"recipe": recipe, **job.settings()}
    project, settings_hash = job.run.tracker_project, f"{recipe}-{job.settings_hash()}"
    return TrackedJob(run=run, project=project, name=name, settings=settings, hash=settings_hash)


class Tracking:
    """Logs a run while the block runs.

    Args:
        job: the run.
        names: the trackers to log it to; usually none.
        session: of the driver, which holds the lock; warns of a tracker that fails.
        table: makes a tracker of each name.
    """

    def __init__(
        self,
        job: TrackedJob,
        names: Iterable[TrackerName],
        session: Session,
        *,
        table: Mapping[TrackerName, Callable[[], Tracker]] = TRACKERS,
    ) -> None:
        self._session = session
        self._followers = [_Follower(name, table[name](), job=job, session=session) for name in names]
        self._is_closed, self._closed_at = False, 0.0

    def __enter__(self) -> "Tracking":
        for follower in self._followers:
            follower.thread.start()
        return self

    def finish(self, metrics: Mapping[str, Any], *, bundle: str | None) -> None:
        """Logs how the run finished. A block that is left without this call did not finish it.

        Args:
            metrics: of the finished run, of which the figures of the model are logged.
            bundle: URI of its bundle; None: it has none yet.
        """
        final = {name: float(value) for name, value in metrics.items() if value is not None and _is_final(name)}
        self._close(End(status="finished", metrics=final, bundle=bundle))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._is_closed:
            was_asked = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt)
            self._close(End(status="stopped" if was_asked else "failed"))
        for follower in self._followers:
            while not follower.thread.ended(0.1):
                if time.monotonic() - self._closed_at > self._patience_s:
                    self._session.console.line(
                        f"{follower.name} does not answer: what it has of this run may be incomplete"
                    )
                    break

    def _close(self, end: End) -> None:
        self._is_closed, self._closed_at = True, time.monotonic()
        for follower in self._followers:
            follower.close(end)

    @property
    def _patience_s(self) -> float:
        return PATIENCE_S if self._session.stop.signal_number is None else HURRIED_S


class _Follower:
    """The thread of one tracker."""

    def __init__(self, name: TrackerName, tracker: Tracker, *, job: TrackedJob, session: Session) -> None:
        self.name = name
        self.thread = SideThread(self._run, name=f"tracker-{name}")
        self._tracker, self._job, self._session = tracker, job, session
        self._file = f"{TRACKED_PREFIX}{name}.json"
        self._over = threading.Event()
        self._end = End(status="failed")

    def close(self, end: End) -> None:
        """Lets the thread log what is left, and end."""
        self._end = end
        self._over.set()

    def _run(self) -> None:
        try:
            self._follow()
        except LockLost:  # The run continues under another driver, which logs it.
            return
        except Exception as error:  # The one border: a tracker must not end a training.
            self._session.console.line(
                f"{self.name} failed, so this run is logged there no more ({type(error).__name__}: "
                f"{first_line(error)}); the training is unharmed"
            )

    def _follow(self) -> None:
        record = self._record()
        known = self._tracker.begin(
            TrackedRun(
                id=record.id,
                project=self._job.project,
                name=self._job.name,
                uri=self._job.run.uri,
                settings=self._job.settings,
            )
        )
        record = replace(record, epochs=max(record.epochs, known))
        is_over = False
        while not is_over:
            is_over = self._over.wait(SECONDS_BETWEEN_LOOKS)
            record = self._log_new(record)
        self._session.fence.check()
        self._tracker.end(self._end)

    def _log_new(self, record: Tracked) -> Tracked:
        """Logs the epochs that the tracker has not, and records each."""
        for epoch in self._job.run.history()[record.epochs :]:
            self._session.fence.check()
            self._tracker.epoch(epoch)
            record = replace(record, epochs=epoch.epoch)
            self._job.run.write(self._file, record)
        return record

    def _record(self) -> Tracked:
        """What the tracker was told before, or a new id."""
        stored = self._job.run.read(self._file, Tracked)
        if stored is not None and stored.settings == self._job.hash:
            return stored
        record = Tracked(id=uuid.uuid4().hex[:16], settings=self._job.hash)
        self._job.run.write(self._file, record)
        return record


def _is_final(name: str) -> bool:
    return name.startswith(FINAL_METRICS)
