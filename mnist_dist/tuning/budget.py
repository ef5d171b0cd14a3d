"""The time that a search may take (`--hours`): what its drivers have spent, and what its finalists will need.

```
<storage>/<name>/spent-000017.json  seconds that the driver with this lock's number has worked on the search
```

A driver renews its own file every `SECONDS_BETWEEN_WRITES`, so a kill loses at most that much, and counts nothing while
no driver runs. The first number that counts is that of `run-000017.json`.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mnist_dist import documents
from mnist_dist.errors import ServiceError
from mnist_dist.search_config import SearchJob
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.lock import Fence
from mnist_dist.store.uris import join
from mnist_dist.tuning.space import train_job
from mnist_dist.tuning.trials import Trial, usable

log = logging.getLogger(__name__)

SECONDS_BETWEEN_WRITES = 20.0
FINALISTS_SHARE = 0.25
"""The largest share of `--hours` for finalists, unless a single one needs more: a second one that is much like the
first gains less than the trials for which there is no time then."""
FINALIST_START_S = 15.0
"""From the start of a finalist to its first step, and from its last step to its result; 2 cores of an AMD EPYC."""
_NAME = re.compile(r"spent-(\d{6,})\.json")


@dataclass(frozen=True)
class Spent:
    """`spent-000017.json`."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class SpentTime:
    """The time that drivers have spent on a search.

    Args:
        uri: URI of the search's folder.
        fence: the lock of this driver.
        store: the store that holds the folder.
    """

    uri: str
    fence: Fence
    store: Store = ANYWHERE

    def earlier_s(self, *, since: int) -> float:
        """Seconds that earlier drivers spent.

        Args:
            since: number of the lock under which the search was begun; older files belong to another search.
        """
        names = {name: int(match[1]) for name in self._names() if (match := _NAME.fullmatch(name))}
        counted = [name for name, number in names.items() if since <= number < self.fence.number]
        return sum(documents.read(self.store, join(self.uri, name), Spent).seconds for name in counted)

    def write(self, seconds: float) -> None:
        """Records what this driver has spent so far, unless another one has taken over."""
        if self.fence.is_held():
            documents.write(self.store, join(self.uri, f"spent-{self.fence.number:06d}.json"), Spent(seconds))

    def _names(self) -> list[str]:
        try:
            return list(self.store.list_level(self.uri).files)
        except FileNotFoundError:
            return []

    @contextmanager
    def counting(self, *, began: float, every_s: float = SECONDS_BETWEEN_WRITES) -> Iterator[None]:
        """Records the time within the block, by a thread.

        Args:
            began: when this driver began (`time.monotonic`).
            every_s: seconds between two records.
        """
        is_over = threading.Event()

        def count() -> None:
            while not is_over.wait(every_s):
                self._try_to_write(time.monotonic() - began)

        thread = threading.Thread(target=count, daemon=True, name="spent-time")
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            self._try_to_write(time.monotonic() - began)

    def _try_to_write(self, seconds: float) -> None:
        try:
            self.write(seconds)
        except (OSError, ServiceError) as error:  # The budget is not worth an error; the next write may succeed.
            log.warning("could not record the time spent on %s: %s", self.uri, error)


def finalists_s(
    trials: Iterable[Trial], job: SearchJob, *, at_once: int, fine_tune_epoch_s: Callable[[Trial], float]
) -> float:
    """Forecasts how long the finalists will take if the trials end now, s; 0 while no trial has a result. Arguments as
    for `choose_finalists`."""
    best = choose_finalists(trials, job, at_once=at_once, fine_tune_epoch_s=fine_tune_epoch_s)
    return _together_s(best, job, at_once=at_once, fine_tune_epoch_s=fine_tune_epoch_s)


def choose_finalists(
    trials: Iterable[Trial], job: SearchJob, *, at_once: int, fine_tune_epoch_s: Callable[[Trial], float]
) -> list[Trial]:
    """The trials to train fully, best first: as many as the search asks for; with `--hours` only as many as are
    forecast to fit into `FINALISTS_SHARE` of the time, but at least one.

    Args:
        trials: all trials.
        job: the search.
        at_once: how many finalists run at the same time.
        fine_tune_epoch_s: duration of a fine-tuning epoch of a trial's network, s.
    """
    best, hours = usable(trials)[: job.search.finalists], job.search.hours
    room_s = float("inf") if hours is None else FINALISTS_SHARE * hours * 3600
    while len(best) > 1 and _together_s(best, job, at_once=at_once, fine_tune_epoch_s=fine_tune_epoch_s) > room_s:
        best.pop()
    return best


def _together_s(
    best: Sequence[Trial], job: SearchJob, *, at_once: int, fine_tune_epoch_s: Callable[[Trial], float]
) -> float:
    each = [_finalist_s(trial, job, fine_tune_epoch_s=fine_tune_epoch_s(trial)) for trial in best]
    return max(max(each), sum(each) / at_once) if each else 0.0


def _finalist_s(trial: Trial, job: SearchJob, *, fine_tune_epoch_s: float) -> float:
    first, *rest = train_job(trial.params, job, stage="finalist").phases.in_order()
    epoch_s = trial.seconds / max(trial.epochs, 1)
    return FINALIST_START_S + first.epochs * epoch_s + sum(phase.epochs for phase in rest) * fine_tune_epoch_s
