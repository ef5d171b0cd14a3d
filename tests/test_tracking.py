"""tracking: each epoch reaches a tracker once, whatever stops, fails or hangs (real trackers: test_trackers.py)."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import Recorder, an_epoch

from mnist_dist.config import FitConfig, RunConfig, TrackerName, TrainJob
from mnist_dist.errors import ConfigError, Interrupted, LockLost
from mnist_dist.inventory import RunFacts
from mnist_dist.models.history import Epoch, history_csv
from mnist_dist.on_ray.training.train import check_ready
from mnist_dist.session import Session, locked_session
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join
from mnist_dist.training import tracking
from mnist_dist.training.runs import Run
from mnist_dist.training.trackers import End, TrackedRun, check_trackers
from mnist_dist.training.tracking import Tracking, tracked_job

JOB = TrainJob(run=RunConfig(tracker_project="digits"))
FOUR = [an_epoch(number, loss=1 / number) for number in (1, 2, 3, 4)]


class Notebook:
    """A tracker that keeps what it is told."""

    def __init__(self, *, known: int = 0, at: int | None = None, then: Callable[[], Any] = lambda: None) -> None:
        self.runs: list[TrackedRun] = []
        self.epochs: list[int] = []
        self.ends: list[End] = []
        self._known, self._at, self._then = known, at, then

    def begin(self, run: TrackedRun) -> int:
        self.runs.append(run)
        return self._known

    def epoch(self, epoch: Epoch) -> None:
        if epoch.epoch == self._at:
            self._then()
        self.epochs.append(epoch.epoch)

    def end(self, end: End) -> None:
        self.ends.append(end)


def write_history(run: Run, count: int) -> None:
    ANYWHERE.write_bytes(join(run.uri, "history.csv"), history_csv(FOUR[:count]))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run"))


@pytest.fixture
def console() -> Recorder:
    return Recorder()


@pytest.fixture
def session(run: Run, console: Recorder) -> Iterator[Session]:
    with locked_session(console, lock_uri=run.lock_uri, what=run.uri) as session:
        yield session


def track(run: Run, session: Session, notebook: Notebook, *, job: TrainJob = JOB, epochs: int) -> None:
    """A training that ends after so many epochs."""
    with tracking_of(run, session, mlflow=notebook, job=job) as tracked:
        write_history(run, epochs)
        tracked.finish({"test_accuracy": 0.75, "earlier_s": 2.5, "images_per_s": None}, bundle="b")


def track_until(error: Exception, run: Run, session: Session, notebook: Notebook) -> None:
    """A training that ends after one epoch by an error."""
    with tracking_of(run, session, mlflow=notebook):
        write_history(run, 1)
        raise error


def tracking_of(run: Run, session: Session, *, job: TrainJob = JOB, **notebooks: Notebook) -> Tracking:
    names: list[TrackerName] = [name for name in ("mlflow", "wandb") if name in notebooks]
    table = {name: lambda notebook=notebooks[name]: notebook for name in names}
    return Tracking(tracked_job(job, run, recipe="r", name="n"), names, session, table=table)


def test_a_tracker_gets_the_run_each_epoch_and_the_end(run: Run, session: Session) -> None:
    notebook = Notebook()
    track(run, session, notebook, epochs=3)

    (begun,) = notebook.runs
    assert (begun.project, begun.name, begun.uri) == ("digits", "n", run.uri)
    assert begun.settings["recipe"] == "r"
    assert begun.settings["fit"]["batch_size"] == JOB.fit.batch_size
    assert "run" not in begun.settings
    assert notebook.epochs == [1, 2, 3]
    assert notebook.ends == [End(status="finished", metrics={"test_accuracy": 0.75}, bundle="b")]


def test_epochs_are_logged_while_the_training_runs(run: Run, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_LOOKS", 0.01)
    seen = threading.Event()
    with tracking_of(run, session, mlflow=Notebook(at=2, then=seen.set)):
        write_history(run, 2)
        assert seen.wait(60)


def test_a_resumed_run_is_the_same_one_and_gets_only_what_is_missing(run: Run, session: Session) -> None:
    first, again = Notebook(), Notebook()
    track(run, session, first, epochs=2)
    track(run, session, again, epochs=4)

    assert first.runs == again.runs
    assert (first.epochs, again.epochs) == ([1, 2], [3, 4])


def test_what_the_tracker_knows_counts_where_the_record_was_not_written(run: Run, session: Session) -> None:
    notebook = Notebook(known=3)
    track(run, session, notebook, epochs=4)
    assert notebook.epochs == [4]


def test_another_run_in_the_same_folder_is_another_one(run: Run, session: Session) -> None:
    first, other = Notebook(), Notebook()
    track(run, session, first, epochs=2)
    track(run, session, other, job=replace(JOB, fit=FitConfig(seed=5)), epochs=2)
    assert first.runs[0].id != other.runs[0].id
    assert other.epochs == [1, 2]


def test_the_history_of_a_run_that_saved_nothing_is_not_that_of_the_next(run: Run) -> None:
    facts = RunFacts(recipe="r", settings={}, features=None)
    run.begin(facts, fence=1)
    write_history(run, 1)
    run.begin(replace(facts, recipe="other"), fence=2)
    assert run.history() == []


@pytest.mark.parametrize(
    ("error", "status"), [(Interrupted(15, "stopped"), "stopped"), (ValueError("a loss"), "failed")]
)
def test_a_run_that_does_not_finish_ends_there_too(run: Run, session: Session, error: Exception, status: str) -> None:
    notebook = Notebook()
    with pytest.raises(type(error), match=str(error)):
        track_until(error, run, session, notebook)
    assert notebook.epochs == [1]
    assert notebook.ends == [End(status=status)]  # type: ignore[arg-type]


def test_a_tracker_that_raises_costs_a_warning_and_no_other_tracker(
    run: Run, session: Session, console: Recorder
) -> None:
    def fail() -> None:
        raise ConnectionError("no route\nand more")

    broken, sound = Notebook(at=2, then=fail), Notebook()
    with tracking_of(run, session, mlflow=broken, wandb=sound) as tracked:
        write_history(run, 3)
        tracked.finish({}, bundle=None)

    (warning,) = console.lines
    assert warning == (
        "mlflow failed, so this run is logged there no more (ConnectionError: no route); the training is unharmed"
    )
    assert (broken.epochs, broken.ends) == ([1], [])
    assert (sound.epochs, sound.ends) == ([1, 2, 3], [End(status="finished")])

    mended = Notebook()
    track(run, session, mended, epochs=4)
    assert mended.epochs == [2, 3, 4]


def test_a_tracker_that_hangs_is_left_alone(
    run: Run, session: Session, console: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.0)
    let_go = threading.Event()
    with ExitStack() as cleanup:
        cleanup.callback(let_go.set)
        track(run, session, Notebook(at=1, then=let_go.wait), epochs=1)
        assert console.lines == ["mlflow does not answer: what it has of this run may be incomplete"]


def test_a_driver_that_lost_its_lock_logs_nothing_more(run: Run, session: Session, console: Recorder) -> None:
    notebook = Notebook()
    ANYWHERE.write_bytes(join(run.lock_uri, "000002"), b'{"id": "x", "host": "h", "pid": 1, "time": 1}')
    with pytest.raises(LockLost, match="taken over"):
        track_until(LockLost("taken over"), run, session, notebook)
    assert (notebook.epochs, notebook.ends, console.lines) == ([], [], [])


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    check_trackers(["mlflow"])
    with pytest.raises(ConfigError, match=r"not installed: pip install 'mnist_dist\[wandb\]'. Received: 'wandb'"):
        check_trackers(["mlflow", "wandb"])


def test_a_job_with_a_tracker_that_is_not_installed_ends_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'mnist_dist\[wandb\]'") as caught:
        check_ready([], run=RunConfig(tracker=("wandb",)), console=Recorder())
    assert caught.value.exit_code == 2


def test_tracking_changes_nothing_that_decides_the_result() -> None:
    tracked = replace(JOB, run=RunConfig(tracker=("mlflow", "wandb"), tracker_project="x"))
    assert tracked.settings_hash() == JOB.settings_hash()


def test_neither_library_is_loaded_before_a_run_asks_for_it() -> None:
    code = "import sys, mnist_dist.training.tracking; print({'mlflow', 'wandb'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"


@pytest.mark.parametrize(
    ("fields", "words"), [({"tracker": ("wandb", "wandb")}, "repeat"), ({"tracker_project": ""}, "must be a name")]
)
def test_wrong_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig(**fields)
