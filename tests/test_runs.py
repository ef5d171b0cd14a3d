"""runs: the folder of a training run, local and on S3."""

from dataclasses import replace
from pathlib import Path

import pytest

from mnist_dist.errors import ResumeConflict
from mnist_dist.inventory import RunFacts
from mnist_dist.on_ray.search.search import TRIAL_RECORD
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join
from mnist_dist.training.runs import Run, attempt_name

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
    ANYWHERE.write_bytes(join(run.uri, "attempt-000001/checkpoint-000000007/state.json"), b"{}")


def test_a_run_begins_once_and_then_goes_on(run: Run) -> None:
    assert run.begin(FACTS, fence=1) is True
    assert names(run) == ["run-000001.json"]
    save_something(run)
    assert run.begin(FACTS, fence=1) is False


def test_a_run_that_has_saved_nothing_binds_nobody(run: Run) -> None:
    run.begin(replace(FACTS, recipe="refused"), fence=1)
    assert run.begin(FACTS, fence=1) is True
    save_something(run)
    run.compare(FACTS)
    with pytest.raises(ResumeConflict, match="'refused' now, 'quickstart' in the run"):
        run.compare(replace(FACTS, recipe="refused"))


def test_a_run_of_other_settings_is_refused_with_each_difference(run: Run) -> None:
    run.begin(FACTS, fence=1)
    save_something(run)
    other = replace(FACTS, recipe="mnist-cnn", settings={"fit": {"seed": 2, "batch_size": 64}})
    with pytest.raises(ResumeConflict, match=r"holds another run") as caught:
        run.begin(other, fence=1)
    assert str(caught.value).splitlines() == [
        f"{run.uri} holds another run. Choose another --name or use the same settings:",
        "  recipe: 'mnist-cnn' now, 'quickstart' in the run",
        "  settings.fit.seed: 2 now, 1 in the run",
    ]
    assert run.begin(FACTS, fence=1) is False


def test_images_are_compared_once_they_are_known(run: Run) -> None:
    run.begin(FACTS, fence=1)
    save_something(run)
    assert run.begin(replace(FACTS, records=None), fence=1) is False
    with pytest.raises(
        ResumeConflict, match=r"\n  data: images were added, removed or changed .* since the run began$"
    ):
        run.begin(replace(FACTS, records="xyz"), fence=1)


def test_a_run_has_a_result_once_it_is_finished(run: Run) -> None:
    assert run.result() is None
    run.begin(FACTS, fence=1)
    assert run.result() is None
    run.finish({"test_accuracy": 0.5, "bundle": run.bundle})
    assert run.result() == {"test_accuracy": 0.5, "bundle": f"{run.uri}/bundle"}


def test_the_first_result_stays(run: Run) -> None:
    run.finish({"test_accuracy": 0.5})
    run.finish({"test_accuracy": 0.25})
    assert run.result() == {"test_accuracy": 0.5}


def test_facts_are_replaced_until_something_is_saved_and_the_latest_count(run: Run) -> None:
    for fence in (3, 5, 1_000_000):
        assert run.begin(replace(FACTS, recipe=f"of {fence}"), fence=fence) is True
        assert names(run) == [f"run-{fence:06d}.json"]
        assert run.begun_by_number() == run.max_number() == fence
    assert run.begin(replace(FACTS, recipe="of 4"), fence=4) is True  # late: nobody has saved anything
    assert names(run) == ["run-000004.json", "run-1000000.json"]
    put(run, "attempt-1000000/checkpoint-000000007/state.json")
    run.compare(replace(FACTS, recipe="of 1000000"))
    with pytest.raises(ResumeConflict, match="'of 4' now, 'of 1000000' in the run"):
        run.compare(replace(FACTS, recipe="of 4"))


def test_a_run_that_resumes_keeps_the_facts_and_checkpoints_of_its_first_driver(run: Run) -> None:
    run.begin(FACTS, fence=3)
    put(run, "attempt-000003/checkpoint-000000007/state.json", "attempt-000005/checkpoint-000000009/state.json")
    assert run.begin(FACTS, fence=8) is False
    assert "run-000003.json" in names(run)
    assert run.begun_by_number() == 3
    assert run.newest_checkpoint() == f"{run.uri}/attempt-000005/checkpoint-000000009"


def test_what_a_late_driver_of_another_run_saved_does_not_count(run: Run) -> None:
    run.begin(replace(FACTS, recipe="another"), fence=3)
    run.begin(FACTS, fence=5)
    put(run, "attempt-000003/checkpoint-000000099/state.json")
    assert run.newest_checkpoint() is None
    assert run.begin(FACTS, fence=6) is True
    put(run, "attempt-000006/checkpoint-000000007/state.json")
    assert run.newest_checkpoint() == f"{run.uri}/attempt-000006/checkpoint-000000007"
    with pytest.raises(ResumeConflict, match="'another' now, 'quickstart' in the run"):
        run.begin(replace(FACTS, recipe="another"), fence=7)
    run.clear_attempts(fence=7)
    assert names(run) == ["attempt-000006/checkpoint-000000007/state.json", "run-000006.json"]


def test_a_search_is_begun_by_a_trial_that_is_its_own(root: str) -> None:
    run = Run(join(root, "search"), begun_by=TRIAL_RECORD)
    run.begin(replace(FACTS, recipe="another"), fence=3)
    run.begin(FACTS, fence=5)
    put(run, "trials/000000-000003.json", "trials/speeds.json", "finalists/000000-000009.json")
    assert run.begin(FACTS, fence=6) is True
    put(run, "trials/000000-000006.json")
    assert run.begin(FACTS, fence=7) is False


def test_the_highest_number_is_that_of_facts_or_of_an_attempt(run: Run) -> None:
    assert run.max_number() == 0
    run.begin(FACTS, fence=3)
    assert run.max_number() == 3
    put(run, "attempt-000005/test/x", "lock/000044", "history.csv", "bundle/000045", "run-000046.json.tmp")
    assert run.max_number() == 5
    assert attempt_name(run.max_number()) == "attempt-000005"


@pytest.mark.parametrize("name", ["trials/000012-000009.json", "finalists/000012-000009.json"])
def test_the_highest_number_of_a_search_may_be_that_of_a_record(root: str, name: str) -> None:
    run = Run(join(root, "search"), begun_by=TRIAL_RECORD)
    run.begin(FACTS, fence=3)
    put(run, name, "trials/000099-000003.json")
    assert run.max_number() == 9


def test_without_a_complete_checkpoint_there_is_none(run: Run) -> None:
    assert run.newest_checkpoint() is None
    put(run, "run-000001.json", "attempt-000001/checkpoint-000000007/weights.npz", "attempt-000001/state.json")
    assert run.newest_checkpoint() is None


def test_the_furthest_complete_checkpoint_is_the_newest(run: Run) -> None:
    put(run, "attempt-000001/checkpoint-000000010/state.json", "attempt-000001/checkpoint-000000030/state.json")
    put(run, "attempt-000002/checkpoint-000000020/state.json", "attempt-000002/checkpoint-000000099/weights.npz")
    put(run, "elsewhere/checkpoint-000000500/state.json", "attempt-000001/checkpoint-000000600/state.json.tmp")
    assert run.newest_checkpoint() == f"{run.uri}/attempt-000001/checkpoint-000000030"


def test_of_two_checkpoints_of_one_step_the_later_attempt_counts(run: Run) -> None:
    put(run, *(f"attempt-{attempt:06d}/checkpoint-000000030/state.json" for attempt in (2, 10, 3)))
    assert run.newest_checkpoint() == f"{run.uri}/attempt-000010/checkpoint-000000030"


def test_steps_are_compared_as_numbers(run: Run) -> None:
    put(run, *(f"attempt-000001/checkpoint-{steps:09d}/state.json" for steps in (999_999_999, 1_000_000_001)))
    assert run.newest_checkpoint() == f"{run.uri}/attempt-000001/checkpoint-1000000001"


def test_clearing_leaves_the_attempt_with_the_newest_checkpoint_and_everything_else(run: Run) -> None:
    put(run, "run-000001.json", "bundle/bundle.json", "attempt-000001/checkpoint-000000008/state.json")
    put(
        run,
        "attempt-000002/checkpoint-000000009/state.json",
        "attempt-000002/x",
        "attempt-000012/checkpoint-000000010/x",
    )
    run.clear_attempts(fence=12)
    kept = [
        "attempt-000002/checkpoint-000000009/state.json",
        "attempt-000002/x",
        "bundle/bundle.json",
        "run-000001.json",
    ]
    assert names(run) == kept
    run.clear_attempts(fence=12)
    assert names(run) == kept


def test_clearing_leaves_the_attempts_of_later_drivers(run: Run) -> None:
    put(run, "run-000003.json", *(f"attempt-{fence:06d}/x" for fence in (2, 3, 4, 5, 1_000_000)))
    put(run, "attempt-000004/checkpoint-000000009/state.json", "attempt-000003/checkpoint-000000008/state.json")
    run.clear_attempts(fence=4)
    left = ["attempt-000004/checkpoint-000000009/state.json", "attempt-000004/x", "attempt-000005/x"]
    assert names(run) == [*left, "attempt-1000000/x", "run-000003.json"]


def test_a_driver_that_clears_late_leaves_the_checkpoint_that_the_next_one_resumes_from(run: Run) -> None:
    put(run, "run-000001.json", "attempt-000002/checkpoint-000000009/state.json", "attempt-000001/x")
    put(run, "attempt-000003/checkpoint-000000005/x")
    run.clear_attempts(fence=2)
    assert run.newest_checkpoint() == f"{run.uri}/attempt-000002/checkpoint-000000009"
    assert "attempt-000003/checkpoint-000000005/x" in names(run)


def test_clearing_without_a_complete_checkpoint_leaves_no_attempt(run: Run) -> None:
    put(run, "run-000001.json", "attempt-000001/checkpoint-000000008/weights.npz")
    run.clear_attempts(fence=12)
    assert names(run) == ["run-000001.json"]


@pytest.mark.parametrize("name", ["attempt-000007", "checkpoint-3", "a+b(c)"])
def test_a_run_may_have_any_name(root: str, name: str) -> None:
    run = Run(join(root, name))
    put(
        run,
        "run-000001.json",
        "attempt-000001/checkpoint-000000003/state.json",
        "attempt-000002/checkpoint-000000004/weights.npz",
    )
    assert run.newest_checkpoint() == f"{run.uri}/attempt-000001/checkpoint-000000003"
    run.clear_attempts(fence=12)
    assert names(run) == ["attempt-000001/checkpoint-000000003/state.json", "run-000001.json"]


def test_runs_beside_each_other_do_not_see_each_other(root: str, run: Run) -> None:
    put(Run(join(root, "first-too")), "attempt-000005/checkpoint-000000009/state.json", "result.json")
    assert run.newest_checkpoint() is None
    assert run.result() is None
