"""warm start: what an earlier search found is known to the sampler of a new one, however that search fares later."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from harness import Recorder

from mnist_dist.errors import ConfigError
from mnist_dist.on_ray.search.dry_run import dry_run
from mnist_dist.on_ray.search.plan import plan_search
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchRunConfig, SearchSpace
from mnist_dist.tuning.space import Proposer, fit_batches
from mnist_dist.tuning.trials import Trial, TrialRecords
from mnist_dist.tuning.warm_start import read_warm_start

SPACE = SearchSpace(
    backbones=(BackboneSpace(backbone="mlp", trained=("all",)), BackboneSpace(backbone="cnn", trained=("all",)))
)


def searched(storage: Path, *, like: str | None = None, **space: Any) -> SearchJob:
    return SearchJob(
        space=replace(SPACE, **space),
        search=SearchConfig(trials=6, seed=2, like=like),
        run=SearchRunConfig(storage=str(storage)),
    )


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A search `first`: trials 0 to 5, of which 3 failed and 5 runs, and one of a search before it."""
    job = searched(tmp_path)
    proposer = Proposer(job)
    records = TrialRecords(str(tmp_path / "first" / "trials"), fence=7)
    for number in range(6):
        params = proposer.propose(number)
        status: Any = {3: "failed", 5: "running"}.get(number, "done")
        accuracy = None if status == "failed" else 0.5 + number / 100
        records.write(Trial(number=number, params=params, status=status, val_accuracy=accuracy))
        proposer.tell(number, accuracy)
    TrialRecords(str(tmp_path / "first" / "trials"), fence=5).write(
        Trial(number=9, params=params, status="done", val_accuracy=0.9)
    )
    (tmp_path / "first" / "run-000006.json").write_text("{}")
    return tmp_path


def test_the_finished_trials_of_an_earlier_search_are_known_in_their_order(storage: Path) -> None:
    known = read_warm_start(searched(storage, like="first"))
    assert [result.val_accuracy for result in known.results] == [0.5, 0.51, 0.52, 0.54]
    assert (known.search, known.outside) == (str(storage / "first"), 0)
    assert str(known) == f"known from {storage / 'first'}: 4 trials"


def test_a_path_names_an_earlier_search_of_another_storage(storage: Path, tmp_path: Path) -> None:
    job = searched(tmp_path / "elsewhere", like=f"{storage}/first")
    assert len(read_warm_start(job).results) == 4


def test_trials_outside_of_the_new_space_are_left_out_and_counted(storage: Path) -> None:
    every = read_warm_start(searched(storage, like="first"))
    known = read_warm_start(searched(storage, like="first", backbones=SPACE.backbones[:1]))
    assert {result.params["backbone"] for result in known.results} == {"mlp"}
    assert len(known.results) + known.outside == len(every.results)
    assert known.outside > 0
    assert f"{known.outside} more lie outside of this space" in str(known)


def test_trials_with_batches_above_the_images_are_left_out_before_the_sampler_learns(storage: Path) -> None:
    job = searched(storage, like="first")
    known = read_warm_start(job)
    first, *rest = known.results
    large = replace(first, params={**first.params, "batch_size": 256})
    fitting, _ = fit_batches(job, images=200)
    left = replace(known, results=(large, *rest)).within(fitting)
    assert (left.results, left.outside) == (tuple(rest), 1)
    Proposer(fitting, earlier=left.results).propose(0)
    with pytest.raises(ConfigError, match=r"^none of the 4 finished trials .*drop --like\. Received: like='first'$"):
        left.within(replace(job, space=replace(job.space, batch_size=(17,))))


@pytest.mark.parametrize("rehearse", [plan_search, dry_run])
def test_a_plan_and_a_dry_run_refuse_an_earlier_search_that_is_none(storage: Path, rehearse: Any) -> None:
    with pytest.raises(ConfigError, match=r"^--like needs the folder of a search .*second has none"):
        rehearse(searched(storage, like="second"), recipe="test", console=Recorder())


def test_nothing_of_the_sampler_is_logged(storage: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    read_warm_start(searched(storage, like="first"))
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING


@pytest.mark.parametrize(
    ("like", "space", "message"),
    [
        ("second", {}, r"^--like needs the folder of a search with finished trials; .*second has none"),
        (
            "first",
            {"hidden_units": (77,)},
            r"^none of the 4 finished trials of .*first lies in the space .*like='first'$",
        ),
    ],
)
def test_an_earlier_search_that_teaches_nothing_is_refused(
    storage: Path, like: str, space: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_warm_start(searched(storage, like=like, **space))


def test_only_a_sampler_that_learns_takes_an_earlier_search() -> None:
    with pytest.raises(ConfigError, match=r"^like needs --algorithm tpe\. Received: like='first', algorithm='random'$"):
        SearchConfig(like="first", algorithm="random")
