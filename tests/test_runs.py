"""runs: the folder of a training run, local and on S3."""

from dataclasses import replace
from pathlib import Path

import pytest

from mnist_dist.errors import ResumeConflict
from mnist_dist.inventory import RunFacts
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join
from mnist_dist.training.runs import Run

SETTINGS = {"fit": {"seed": 1, "batch_size": 64}}
FACTS = RunFacts(recipe="quickstart", settings=SETTINGS, features=None, records="abc")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


@pytest.fixture
def run(root: str) -> Run:
    return Run(join(root, "first"))


def put(run: Run, *names: str) -> None:
    for name in names:
        ANYWHERE.write_bytes(join(run.uri, name), b"{}")


def names(run: Run) -> list[str]:
    return [entry.uri.removeprefix(f"{run.uri}/") for entry in ANYWHERE.list_entries(run.uri)]


def save_something(run: Run) -> None:
    ANYWHERE.write_bytes(join(run.uri, "attempt-0001/checkpoint-000000007/state.json"), b"{}")


def test_a_run_begins_once_and_then_goes_on(run: Run) -> None:
    assert run.begin(FACTS) is True
    assert names(run) == ["run.json"]
    save_something(run)
    assert run.begin(FACTS) is False


def test_a_run_that_has_saved_nothing_binds_nobody(run: Run) -> None:
    run.begin(replace(FACTS, recipe="refused"))
    assert run.begin(FACTS) is True
    save_something(run)
    run.compare(FACTS)
    with pytest.raises(ResumeConflict, match="'refused' now, 'quickstart' in the run"):
        run.compare(replace(FACTS, recipe="refused"))


def test_a_run_of_other_settings_is_refused_with_each_difference(run: Run) -> None:
    run.begin(FACTS)
    save_something(run)
    other = replace(FACTS, recipe="mnist-cnn", settings={"fit": {"seed": 2, "batch_size": 64}})
    with pytest.raises(ResumeConflict, match=r"holds another run") as caught:
        run.begin(other)
    assert str(caught.value).splitlines() == [
        f"{run.uri} holds another run. Choose another --name or use the same settings:",
        "  recipe: 'mnist-cnn' now, 'quickstart' in the run",
        "  settings.fit.seed: 2 now, 1 in the run",
    ]
    assert run.begin(FACTS) is False


def test_images_are_compared_once_they_are_known(run: Run) -> None:
    run.begin(FACTS)
    save_something(run)
    assert run.begin(replace(FACTS, records=None)) is False
    with pytest.raises(
        ResumeConflict, match=r"\n  data: images were added, removed or changed .* since the run began$"
    ):
        run.begin(replace(FACTS, records="xyz"))


def test_a_run_has_a_result_once_it_is_finished(run: Run) -> None:
    assert run.result() is None
    run.begin(FACTS)
    assert run.result() is None
    run.finish({"test_accuracy": 0.5, "bundle": run.bundle})
    assert run.result() == {"test_accuracy": 0.5, "bundle": f"{run.uri}/bundle"}


def test_without_a_complete_checkpoint_there_is_none(run: Run) -> None:
    assert run.newest_checkpoint() is None
    put(run, "run.json", "attempt-0001/checkpoint-000000007/weights.npz", "attempt-0001/state.json")
    assert run.newest_checkpoint() is None


def test_the_furthest_complete_checkpoint_is_the_newest(run: Run) -> None:
    put(run, "attempt-0001/checkpoint-000000010/state.json", "attempt-0001/checkpoint-000000030/state.json")
    put(run, "attempt-0002/checkpoint-000000020/state.json", "attempt-0002/checkpoint-000000099/weights.npz")
    put(run, "elsewhere/checkpoint-000000500/state.json", "attempt-0001/checkpoint-000000600/state.json.tmp")
    assert run.newest_checkpoint() == f"{run.uri}/attempt-0001/checkpoint-000000030"


def test_of_two_checkpoints_of_one_step_the_later_attempt_counts(run: Run) -> None:
    put(run, *(f"attempt-{attempt:04d}/checkpoint-000000030/state.json" for attempt in (2, 10, 3)))
    assert run.newest_checkpoint() == f"{run.uri}/attempt-0010/checkpoint-000000030"


def test_steps_are_compared_as_numbers(run: Run) -> None:
    put(run, *(f"attempt-0001/checkpoint-{steps:09d}/state.json" for steps in (999_999_999, 1_000_000_001)))
    assert run.newest_checkpoint() == f"{run.uri}/attempt-0001/checkpoint-1000000001"


def test_the_next_attempt_is_one_that_is_not_there(run: Run) -> None:
    assert run.next_attempt() == "attempt-0001"
    put(run, "attempt-0009/checkpoint-000000001/weights.npz", "attempt-0010/note", "attempt-0002/note")
    assert run.next_attempt() == "attempt-0011"


def test_clearing_leaves_the_attempt_with_the_newest_checkpoint_and_everything_else(run: Run) -> None:
    put(run, "run.json", "bundle/bundle.json", "attempt-0001/checkpoint-000000008/state.json")
    put(run, "attempt-0002/checkpoint-000000009/state.json", "attempt-0002/x", "attempt-0012/checkpoint-000000010/x")
    run.clear_attempts()
    kept = ["attempt-0002/checkpoint-000000009/state.json", "attempt-0002/x", "bundle/bundle.json", "run.json"]
    assert names(run) == kept
    run.clear_attempts()
    assert names(run) == kept


def test_clearing_without_a_complete_checkpoint_leaves_no_attempt(run: Run) -> None:
    put(run, "run.json", "attempt-0001/checkpoint-000000008/weights.npz")
    run.clear_attempts()
    assert names(run) == ["run.json"]


@pytest.mark.parametrize("name", ["attempt-0007", "checkpoint-3", "a+b(c)"])
def test_a_run_may_have_any_name(root: str, name: str) -> None:
    run = Run(join(root, name))
    put(
        run, "run.json", "attempt-0001/checkpoint-000000003/state.json", "attempt-0002/checkpoint-000000004/weights.npz"
    )
    assert run.next_attempt() == "attempt-0003"
    assert run.newest_checkpoint() == f"{run.uri}/attempt-0001/checkpoint-000000003"
    run.clear_attempts()
    assert names(run) == ["attempt-0001/checkpoint-000000003/state.json", "run.json"]


def test_runs_beside_each_other_do_not_see_each_other(root: str, run: Run) -> None:
    put(Run(join(root, "first-too")), "attempt-0005/checkpoint-000000009/state.json", "result.json")
    assert run.next_attempt() == "attempt-0001"
    assert run.newest_checkpoint() is None
    assert run.result() is None
