"""trials: their records, their order, their errors; and what comes next, also after a driver was killed."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness import Recorder, an_epoch

from mnist_dist.console import Stop
from mnist_dist.errors import MnistDistError, ServiceError, WeightsError, WorkersFailed
from mnist_dist.on_ray.search.trial import Report
from mnist_dist.on_ray.search.tuning import DIED, OVER, Trials, _compute_wanted, _is_worth_computing, _Log
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchSpace
from mnist_dist.session import Session
from mnist_dist.tuning.trials import Status, Trial, TrialRecords, distinct_errors, usable

NEVER = math.inf
AT_ONCE = -math.inf
JOB = SearchJob(
    space=SearchSpace(
        backbones=(BackboneSpace(backbone="mlp", trained=("all",)), BackboneSpace(backbone="cnn", trained=("all",)))
    ),
    search=SearchConfig(trials=14, seed=5),
)


def made(number: int, accuracy: float | None = 0.5, loss: float | None = 1.0, status: Status = "done") -> Trial:
    return Trial(number=number, params={}, status=status, val_accuracy=accuracy, val_loss=loss)


def report(
    accuracy: float, *, finished: bool = True, error: str | None = None, epochs: int = 3, outage: bool = False
) -> Report:
    return Report(
        accuracy=accuracy,
        loss=1 - accuracy,
        epochs=epochs,
        parameters=1_234,
        seconds=0.123456,
        finished=finished,
        history=tuple(an_epoch(number) for number in range(1, epochs + 1)),
        error=error,
        outage=outage,
    )


def accuracy_of(number: int) -> float:
    return (number * 37 % 101 + 1) / 103


def opened(folder: Path, *, job: SearchJob = JOB, ends_at: float = NEVER, fence: int = 17) -> Trials:
    return Trials(job, TrialRecords(str(folder), fence=fence), ends_at=ends_at)


def run_one(trials: Trials) -> Trial:
    """Begins the next trial and ends it as done."""
    trial = trials.next()
    assert trial is not None
    trials.end(trial.number, report(accuracy_of(trial.number)))
    return trials.known[trial.number]


def test_a_trial_records_when_it_ended_in_time_worked(tmp_path: Path) -> None:
    clock = iter((10.0, 25.04))
    trials = Trials(JOB, TrialRecords(str(tmp_path), fence=17), ends_at=NEVER, worked_s=lambda: next(clock))
    first, second = trials.next(), trials.next()
    assert first is not None
    assert second is not None
    assert [trial.ended_s for trial in TrialRecords(str(tmp_path)).read().values()] == [None, None]
    trials.end(second.number, report(0.5))
    trials.end(first.number, None)
    assert [trial.ended_s for trial in TrialRecords(str(tmp_path)).read().values()] == [25.0, 10.0]


def numbers(trials: Iterable[Trial]) -> list[int]:
    return [trial.number for trial in trials]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    records = TrialRecords(str(tmp_path / "trials"), fence=17)
    trial = Trial(
        number=12,
        params={"backbone": "mlp", "mlp.pooling": None, "learning_rate": 0.1 + 0.2, "batch_size": 64},
        status="stopped",
        val_accuracy=0.75,
        val_loss=0.3,
        epochs=2,
        parameters=321,
        seconds=1.25,
        error=None,
        history=(an_epoch(1, loss=1.5), an_epoch(2, loss=1.25)),
    )
    records.write(replace(trial, status="running"))
    records.write(trial)
    assert records.read() == {12: trial}
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["000012-000017.json"]


def test_records_are_read_in_the_order_of_their_numbers_and_nothing_else_is(tmp_path: Path) -> None:
    records = TrialRecords(str(tmp_path / "finalists"))
    assert records.read() == {}
    for number in (1_000, 2, 10):
        records.write(made(number))
        (tmp_path / "finalists" / f"{number:06d}").mkdir()  # a finalist's run lies beside its record
        (tmp_path / "finalists" / f"{number:06d}" / "000003-000001.json").write_text("{}")
    for name in ("notes.json", "000003.json", "000003-000017.json.tmp", ".000003-000017.json.0a1b.tmp"):
        (tmp_path / "finalists" / name).write_text("{}")
    assert list(records.read()) == [2, 10, 1_000]


@pytest.mark.parametrize("order", [(3, 17, 1_000_000), (1_000_000, 17, 3)])
def test_of_each_trial_the_record_of_the_latest_driver_counts(tmp_path: Path, order: tuple[int, ...]) -> None:
    for fence in order:
        TrialRecords(str(tmp_path), fence=fence).write(made(2, fence / 1e7))
    TrialRecords(str(tmp_path), fence=3).write(made(1, 0.25))
    found = TrialRecords(str(tmp_path), fence=17).read()
    assert [(number, trial.val_accuracy) for number, trial in found.items()] == [(1, 0.25), (2, 0.1)]


def test_records_of_a_search_before_this_one_do_not_count(tmp_path: Path) -> None:
    for number, fence in ((0, 4), (1, 4), (1, 5), (2, 6)):
        TrialRecords(str(tmp_path), fence=fence).write(made(number, fence / 10))
    found = TrialRecords(str(tmp_path), fence=6, since=5).read()
    assert [(number, trial.val_accuracy) for number, trial in found.items()] == [(1, 0.5), (2, 0.6)]
    assert TrialRecords(str(tmp_path), fence=7, since=7).read() == {}


def test_the_best_is_the_max_accurate_then_of_min_loss_then_the_first() -> None:
    trials = [made(4, 0.8, None), made(3, 0.8, 0.6), made(2, 0.8, 0.6), made(1, 0.9, 0.9), made(0, 0.8, 0.7)]
    assert numbers(sorted(trials, key=lambda trial: trial.rank)) == [1, 2, 3, 0, 4]


def test_what_failed_or_still_runs_is_of_no_use_and_last() -> None:
    trials = [made(0, None, None, "failed"), made(1, 0.1), made(2, 0.2, status="stopped"), made(3, 0.9, 0.1, "running")]
    assert numbers(usable(trials)) == [2, 1]
    assert numbers(sorted(trials[:3], key=lambda trial: trial.rank)) == [2, 1, 0]
    assert usable([]) == []


def test_errors_are_counted_the_max_frequent_first() -> None:
    errors = ["no number", None, "out of memory", "no number"]
    trials = [replace(made(n, None, None, "failed"), error=error) for n, error in enumerate(errors)]
    trials.append(replace(made(9), error="of a trial that came to something"))
    assert distinct_errors(trials) == [("no number", 2), ("no message", 1), ("out of memory", 1)]
    assert distinct_errors([]) == []


def test_trials_are_proposed_in_order_until_there_are_enough(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    begun = [trials.next() for _ in range(3)]
    assert [trial and (trial.number, trial.status) for trial in begun] == [(n, "running") for n in range(3)]
    assert trials.running == {0, 1, 2}
    assert TrialRecords(str(tmp_path)).read() == trials.known
    for number in (2, 0, 1):
        trials.end(number, report(accuracy_of(number)))
    rest = [run_one(trials).number for _ in range(11)]
    assert rest == list(range(3, 14))
    assert trials.next() is None
    assert (trials.count, trials.done_here, trials.running) == (14, 14, set())


def test_a_trial_that_ends_is_recorded_with_what_it_found(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    for _ in range(4):
        trials.next()
    trials.end(0, report(0.75))
    trials.end(1, report(0.5, finished=False, epochs=1))
    trials.end(2, report(0.0, error="the loss is no number"))
    trials.note(3, report(0.25, finished=False))
    trials.end(3, None)
    found = TrialRecords(str(tmp_path)).read()
    assert found == trials.known
    assert [trial.status for trial in found.values()] == ["done", "stopped", "failed", "failed"]
    assert [trial.val_accuracy for trial in found.values()] == [0.75, 0.5, None, None]
    assert [trial.val_loss for trial in found.values()] == [0.25, 0.5, None, None]
    assert [trial.error for trial in found.values()] == [None, None, "the loss is no number", DIED]
    assert (found[0].epochs, found[0].parameters, found[0].seconds) == (3, 1_234, 0.123)
    assert found[0].history == (an_epoch(1), an_epoch(2), an_epoch(3))


def test_an_epoch_is_known_but_not_recorded(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    trials.next()
    before = (tmp_path / "000000-000017.json").read_bytes()
    trials.note(0, report(0.5, finished=False, epochs=1))
    assert (trials.known[0].val_accuracy, trials.known[0].status) == (0.5, "running")
    assert (tmp_path / "000000-000017.json").read_bytes() == before


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    trials = opened(tmp_path, ends_at=AT_ONCE)
    assert trials.over
    assert trials.next() is None
    trials.end_all()
    assert trials.known == {}
    assert not list(tmp_path.iterdir())


def test_nothing_is_begun_after_a_wish_to_stop(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    run_one(trials)
    trials.stopped = True
    assert trials.over
    assert trials.next() is None


def test_the_end_of_the_time_stops_what_has_an_epoch_and_fails_what_has_none(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    for _ in range(3):
        trials.next()
    trials.end(0, report(0.75))
    trials.note(2, report(0.5, finished=False, epochs=1))
    trials.end_all()
    found = TrialRecords(str(tmp_path)).read()
    assert [trial.status for trial in found.values()] == ["done", "failed", "stopped"]
    assert [trial.error for trial in found.values()] == [None, OVER, None]
    assert found[2].val_accuracy == 0.5
    assert trials.running == set()


def test_a_new_driver_runs_what_was_unfinished_again_and_nothing_that_was_finished(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    for _ in range(6):
        trials.next()
    for number in (0, 2, 3):
        trials.end(number, report(accuracy_of(number)))
    trials.end(5, report(0.0, error="the loss is no number"))
    finished = {path.name: path.read_bytes() for path in tmp_path.iterdir() if b'"running"' not in path.read_bytes()}
    proposed = {number: trial.params for number, trial in trials.known.items()}

    again = opened(tmp_path)
    assert again.running == set()
    begun = [again.next() for _ in range(3)]
    assert [trial and trial.number for trial in begun] == [1, 4, 6]
    assert [trial.params for trial in begun[:2] if trial] == [proposed[1], proposed[4]]
    assert {name: (tmp_path / name).read_bytes() for name in finished} == finished
    assert finished.keys() == {"000000-000017.json", "000002-000017.json", "000003-000017.json", "000005-000017.json"}


def test_a_driver_that_comes_late_changes_nothing_for_the_next_one(tmp_path: Path) -> None:
    late = opened(tmp_path, fence=3)
    for _ in range(2):
        late.next()
    trials = opened(tmp_path, fence=4)
    assert [trial and trial.number for trial in (trials.next(), trials.next())] == [0, 1]
    trials.end(0, report(0.75))
    late.end(0, report(0.25))
    late.end(1, report(0.0, error="the loss is no number"))
    assert TrialRecords(str(tmp_path)).read() == trials.known
    again = opened(tmp_path, fence=5)
    assert (again.next(), again.known[0].val_accuracy) == (trials.known[1], 0.75)


@pytest.mark.parametrize("killed_after", [0, 5, 12])
@pytest.mark.parametrize("algorithm", ["tpe", "random", "grid"])
def test_a_killed_search_proposes_what_an_undisturbed_one_proposes(
    tmp_path: Path, algorithm: Any, killed_after: int
) -> None:
    job = replace(JOB, search=replace(JOB.search, algorithm=algorithm))
    undisturbed = opened(tmp_path / "undisturbed", job=job)
    while len(undisturbed.known) < 14:
        run_one(undisturbed)
    killed = opened(tmp_path / "killed", job=job)
    for _ in range(killed_after):
        run_one(killed)
    killed.next()  # under way when the driver dies
    again = opened(tmp_path / "killed", job=job)
    while len(again.known) < 14:
        run_one(again)
    assert again.known == undisturbed.known
    assert again.next() is None


def test_a_finished_set_of_trials_begins_nothing(tmp_path: Path) -> None:
    job = replace(JOB, search=replace(JOB.search, trials=2))
    trials = opened(tmp_path, job=job)
    run_one(trials)
    run_one(trials)
    again = opened(tmp_path, job=job)
    assert again.next() is None
    assert numbers(again.known.values()) == [0, 1]


def test_a_grid_smaller_than_the_trials_ends_by_itself(tmp_path: Path) -> None:
    space = SearchSpace(
        backbones=(BackboneSpace(backbone="mlp", trained=("all",)),),
        hidden_units=(0, 9),
        dropout=(0.0,),
        optimizer=("sgd",),
        learning_rate=(1e-3, 1e-3),
        label_smoothing=(0.0,),
        batch_size=(16,),
    )
    trials = opened(tmp_path, job=SearchJob(space=space, search=SearchConfig(algorithm="grid", trials=30)))
    assert trials.count == 2
    assert [run_one(trials).params["hidden_units"] for _ in range(2)] == [0, 9]
    assert trials.next() is None


def test_an_outage_is_no_result_of_a_trial(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    trials.next()
    trials.end(0, report(0.0, error="the token has expired", outage=True))
    assert trials.stopped
    assert isinstance(trials.error, ServiceError)
    assert "the token has expired" in str(trials.error)
    assert TrialRecords(str(tmp_path)).read()[0].status == "running"
    assert opened(tmp_path).next() == trials.known[0]


def test_a_record_that_cannot_be_written_ends_the_search_and_is_run_again(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    for _ in range(2):
        trials.next()
    (tmp_path / "000001-000017.json").unlink()
    (tmp_path / "000001-000017.json").mkdir()
    (tmp_path / "000001-000017.json" / "in the way").touch()
    with pytest.raises(Exception, match=r"000001-000017\.json"):
        trials.end(1, report(0.5))
    assert trials.stopped
    assert trials.error is not None
    assert 1 in trials.running


def test_with_nothing_usable_the_end_of_the_time_leaves_trials_for_the_next_command(tmp_path: Path) -> None:
    trials = opened(tmp_path)
    trials.next()
    trials.end_all()
    assert TrialRecords(str(tmp_path)).read()[0].status == "running"


def test_trials_of_a_killed_driver_that_never_ran_again_are_not_left_running(tmp_path: Path) -> None:
    first = opened(tmp_path)
    for _ in range(3):
        first.next()
    first.end(0, report(0.75))
    again = opened(tmp_path)
    again.end_all()
    assert [trial.status for trial in TrialRecords(str(tmp_path)).read().values()] == ["done", "failed", "failed"]


# --- trials that wait for features ---

FROZEN = SearchJob(
    space=SearchSpace(
        backbones=(
            BackboneSpace(backbone="mlp", trained=("all",)),
            BackboneSpace(backbone="mobilenet", alpha=(0.25,)),
            BackboneSpace(backbone="cnn", trained=("all",)),
            BackboneSpace(backbone="vgg16", image_size_px=(32,)),
        )
    ),
    search=SearchConfig(trials=12, seed=5),
)


def waiting(folder: Path, *, concurrent: int, computed: Sequence[str] = (), fence: int = 17) -> Trials:
    """Trials of which those of `mobilenet` and `vgg16` need features of that name."""
    return Trials(
        FROZEN,
        TrialRecords(str(folder), fence=fence),
        ends_at=NEVER,
        concurrent=concurrent,
        features_of=lambda params: params["backbone"] if params["backbone"] in ("mobilenet", "vgg16") else None,
        computed=computed,
    )


def begun(trials: Trials) -> list[int]:
    """The numbers of all trials that can begin now."""
    return [trial.number for trial in iter(trials.next, None)]


def test_trials_without_features_begin_at_once_and_those_that_need_them_wait(tmp_path: Path) -> None:
    trials = waiting(tmp_path, concurrent=4)
    assert begun(trials) == [0, 2]
    assert trials.waiting == {1: "mobilenet", 3: "vgg16"}
    assert trials.running == {0, 2}
    assert [trial.status for trial in TrialRecords(str(tmp_path)).read().values()] == ["running"] * 4


def test_places_that_become_free_are_left_to_the_features(tmp_path: Path) -> None:
    trials = waiting(tmp_path, concurrent=2)
    first = trials.next()
    assert first is not None
    assert begun(trials) == []
    assert (trials.waiting, trials.wanted) == ({1: "mobilenet"}, "mobilenet")
    trials.end(0, report(0.5))
    assert begun(trials) == []
    assert len(trials.known) == 2


def test_a_trial_begins_when_its_features_are_computed(tmp_path: Path) -> None:
    trials = waiting(tmp_path, concurrent=4)
    begun(trials)
    trials.features_computed("vgg16")
    assert begun(trials) == [3]
    assert (trials.waiting, trials.wanted) == ({1: "mobilenet"}, "mobilenet")
    trials.features_computed("mobilenet")
    assert begun(trials)[0] == 1
    assert (trials.waiting, trials.wanted) == ({}, None)


def test_computed_features_are_waited_for_by_nobody(tmp_path: Path) -> None:
    trials = waiting(tmp_path, concurrent=4, computed=("vgg16", "mobilenet"))
    assert begun(trials) == list(range(12))


def test_features_that_cannot_be_computed_fail_their_trials_alone(tmp_path: Path) -> None:
    trials = waiting(tmp_path, concurrent=1, computed=("mobilenet",))
    for _ in range(3):
        run_one(trials)
    assert begun(trials) == []
    trials.features_failed("vgg16", "not finite")
    begun(trials)
    found = TrialRecords(str(tmp_path)).read()
    assert len(found) == 12
    of_vgg16 = [trial for trial in found.values() if trial.params["backbone"] == "vgg16"]
    assert [(trial.status, trial.error) for trial in of_vgg16] == [("failed", "features of vgg16: not finite")] * len(
        of_vgg16
    )
    assert sum(trial.status == "failed" for trial in found.values()) == len(of_vgg16) >= 1


@pytest.mark.parametrize(("error", "tries"), [(WorkersFailed("died"), 2), (WeightsError("no weights"), 1)])
def test_features_whose_processes_die_beside_trials_are_computed_again_alone(
    error: MnistDistError, tries: int, tmp_path: Path
) -> None:
    trials, tried = waiting(tmp_path, concurrent=4, computed=("vgg16",)), list[bool]()

    def compute(name: str, session: Session, beside: bool) -> None:
        tried.append(beside)
        if beside:
            raise error

    work: Any = SimpleNamespace(compute=compute)
    session = Session(console=Recorder(), stop=Stop(Recorder()))
    begun(trials)
    assert _is_worth_computing(trials)
    _compute_wanted(work, trials, session, beside=True)
    assert not _is_worth_computing(trials)
    _compute_wanted(work, trials, session, beside=False)
    assert tried == [True, False][:tries]
    begun(trials)
    assert (trials.known[1].status == "failed") == (tries == 1)


def test_a_trial_that_waited_when_its_driver_died_is_run_by_the_next_one(tmp_path: Path) -> None:
    killed = waiting(tmp_path, concurrent=4)
    begun(killed)
    proposed = {number: trial.params for number, trial in killed.known.items()}
    again = waiting(tmp_path, concurrent=4, computed=("vgg16", "mobilenet"), fence=18)
    first = [again.next() for _ in range(4)]
    assert {trial.number: trial.params for trial in first if trial} == proposed


@pytest.mark.parametrize("killed_after", [0, 1, 4])
def test_a_search_that_is_killed_while_it_computes_features_proposes_what_an_undisturbed_one_proposes(
    tmp_path: Path, killed_after: int
) -> None:
    undisturbed = waiting(tmp_path / "undisturbed", concurrent=1, computed=("vgg16", "mobilenet"))
    while len(undisturbed.known) < 12:
        run_one(undisturbed)
    killed = waiting(tmp_path / "killed", concurrent=1)
    for _ in range(killed_after):
        run_or_compute(killed)
    killed.next()
    again = waiting(tmp_path / "killed", concurrent=1)
    while sum(trial.status == "done" for trial in again.known.values()) < 12:
        run_or_compute(again)
    assert again.known == undisturbed.known


def run_or_compute(trials: Trials) -> None:
    """Runs the next trial, or computes the features that it waits for."""
    trial = trials.next()
    if trial is not None:
        trials.end(trial.number, report(accuracy_of(trial.number)))
    elif trials.wanted is not None:
        trials.features_computed(trials.wanted)


# --- the budget ---


def test_trials_end_when_the_finalists_need_the_time_that_is_left(tmp_path: Path) -> None:
    needed_s = 0.0
    trials = Trials(
        JOB,
        TrialRecords(str(tmp_path), fence=17),
        ends_at=time.monotonic() + 3_600,
        reserve_s=lambda known: needed_s * sum(trial.status == "done" for trial in known.values()),
    )
    run_one(trials)
    assert not trials.over
    needed_s = 3_700.0
    assert trials.over
    assert trials.next() is None


def test_a_log_has_a_line_for_each_trial_that_ends_and_none_for_those_of_an_earlier_driver() -> None:
    console, params = Recorder(), {"backbone": "cnn"}
    known = {0: Trial(number=0, params=params, status="done", val_accuracy=0.5), 1: Trial(number=1, params=params)}
    log = _Log(console, cast(Trials, SimpleNamespace(known=known)))
    log.show_new()
    assert console.lines == []
    known[1] = Trial(number=1, params=params, status="stopped", val_accuracy=0.75, epochs=3)
    known[2] = Trial(number=2, params=params, status="failed")
    for _ in range(2):
        log.show_new()
    assert console.lines == [
        "trial 1 stopped after 3 epoch(s), validation accuracy 0.7500: cnn",
        "trial 2 failed after 0 epoch(s): cnn",
    ]
