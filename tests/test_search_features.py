"""A search decides late: features when a trial needs them, the budget over all drivers, what another search found."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import Recorder, private_ray

from mnist_dist.config import DataConfig
from mnist_dist.errors import Interrupted, WorkersFailed
from mnist_dist.on_ray.search.search import search
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchRunConfig, SearchSpace
from mnist_dist.tuning.trials import Trial, TrialRecords

pytestmark = pytest.mark.slow
MLP = BackboneSpace(backbone="mlp", trained=("all",))
MOBILENET = BackboneSpace(backbone="mobilenet", alpha=(0.25,), image_size_px=(32,))


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    """One Ray for the searches of this process."""
    with private_ray(num_cpus=2):
        yield


def small_search(
    storage: Path, *backbones: BackboneSpace, run: dict[str, Any] | None = None, **fields: Any
) -> SearchJob:
    settings: dict[str, Any] = {"trial_epochs": 2, "finalists": 1, "finalist_epochs": 2}
    return SearchJob(
        data=DataConfig(limit=600),
        space=SearchSpace(
            backbones=backbones,
            hidden_units=(0,),
            dropout=(0.0,),
            optimizer=("adam",),
            learning_rate=(1e-3, 1e-2),
            label_smoothing=(0.0,),
            batch_size=(50,),
        ),
        search=SearchConfig(**{**settings, **fields}),
        run=SearchRunConfig(**{"storage": str(storage), "name": "run", **(run or {})}),
    )


def records(storage: Path, name: str = "run") -> dict[int, Trial]:
    return TrialRecords(str(storage / name / "trials")).read()


def interrupted(job: SearchJob, *, when: Callable[[], Any]) -> None:
    """Runs a search that gets a signal as soon as something is so."""

    def stop() -> None:
        while not when():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    console = Recorder("trials:", threading.Thread(target=stop, daemon=True).start)
    with pytest.raises(Interrupted, match="run the same command to resume"):
        search(job, recipe="test", console=console)


def has_a_finished_trial(storage: Path) -> bool:
    return any(b'"done"' in path.read_bytes() for path in storage.glob("run/trials/*.json"))


def test_features_are_computed_when_a_trial_first_needs_them_though_trials_hold_all_cpus(tmp_path: Path) -> None:
    job = small_search(tmp_path, MLP, MOBILENET, trials=4)
    before: list[Path] = []
    console = Recorder("trials:", lambda: before.extend(tmp_path.glob("_features/*")))
    result = search(job, recipe="test", console=console)
    assert (before, result["trials"], result["failed"]) == ([], 4, 0)
    assert [trial.params["backbone"] for trial in records(tmp_path).values()][:2] == ["mlp", "mobilenet"]
    assert len(list(tmp_path.glob("_features/*"))) == 1


def test_features_that_no_trial_needs_are_not_computed(tmp_path: Path) -> None:
    console = Recorder()
    assert search(small_search(tmp_path, MLP, MOBILENET, trials=1), recipe="test", console=console)["trials"] == 1
    assert not list(tmp_path.glob("_features/*"))
    assert any("fewer trials than backbones: mobilenet will not be tried" in line for line in console.lines)


def test_a_backbone_whose_features_cannot_be_computed_fails_its_trials_alone(tmp_path: Path) -> None:
    (tmp_path / "broken.weights.h5").write_bytes(b"no weights")
    broken = replace(MOBILENET, weights=str(tmp_path / "broken.weights.h5"))
    result = search(small_search(tmp_path, broken, MLP, trials=2), recipe="test", console=Recorder())
    assert (result["trials"], result["failed"], result["best"]["trial"]) == (2, 1, 1)
    assert (records(tmp_path)[0].error or "").startswith("features of mobilenet x0.25 32 px")


def test_a_signal_during_features_ends_the_search_and_the_same_job_goes_on(tmp_path: Path) -> None:
    job = small_search(tmp_path, MOBILENET, MLP, trials=3)
    interrupted(job, when=lambda: list(tmp_path.glob("_features/*")))
    proposed = {number: trial.params for number, trial in records(tmp_path).items()}
    result = search(job, recipe="test", console=Recorder())
    assert (result["trials"], result["failed"]) == (3, 0)
    assert {number: trial.params for number, trial in records(tmp_path).items() if number in proposed} == proposed


def test_the_hours_count_over_resumes(tmp_path: Path) -> None:
    job = small_search(tmp_path, MLP, trials=30, hours=1.0, run={"concurrent_trials": 1})
    interrupted(job, when=lambda: has_a_finished_trial(tmp_path))
    (spent,) = tmp_path.glob("run/spent-*.json")
    assert 0 < json.loads(spent.read_bytes())["seconds"] < 3600
    spent.write_text(json.dumps({"seconds": 3600.0}))
    console = Recorder()
    result = search(job, recipe="test", console=console)
    assert result["trials"] == len(records(tmp_path)) < 30
    assert any(line == "time: 0.0 s of 60.0 min left, finalists included" for line in console.lines)


def test_hours_that_end_before_any_trial_has_a_result_say_so_though_one_was_begun(tmp_path: Path) -> None:
    job = small_search(tmp_path, MOBILENET, trials=3, hours=1.0)
    interrupted(job, when=lambda: records(tmp_path))
    (spent,) = tmp_path.glob("run/spent-*.json")
    spent.write_text(json.dumps({"seconds": 3600.0}))
    with pytest.raises(WorkersFailed, match=r"^The time \(--hours 1\) ran out before a trial had a result"):
        search(job, recipe="test", console=Recorder())


def test_a_resumed_search_knows_what_an_earlier_one_found_though_that_is_deleted(tmp_path: Path) -> None:
    search(small_search(tmp_path, MLP, trials=2, run={"name": "first"}), recipe="test", console=Recorder())
    job = small_search(tmp_path, MLP, trials=3, seed=3, like="first", run={"concurrent_trials": 1})
    interrupted(job, when=lambda: has_a_finished_trial(tmp_path))
    shutil.rmtree(tmp_path / "first")
    console = Recorder()
    assert search(job, recipe="test", console=console)["trials"] == 3
    assert any(line == f"known from {tmp_path / 'first'}: 2 trials" for line in console.lines)


@pytest.mark.chaos
def test_what_an_earlier_search_found_with_batches_that_do_not_fit_is_left_out(tmp_path: Path) -> None:
    def with_batches(name: str, *, limit: int, sizes: tuple[int, ...], **fields: Any) -> SearchJob:
        job = small_search(tmp_path, MLP, run={"name": name, "concurrent_trials": 1}, **fields)
        return replace(job, data=DataConfig(limit=limit), space=replace(job.space, batch_size=sizes))

    search(with_batches("first", limit=600, sizes=(30, 40, 300), trials=8), recipe="test", console=Recorder())
    tried = [trial.params["batch_size"] for trial in records(tmp_path, "first").values()]
    assert 0 < tried.count(300) < 8
    console = Recorder()
    job = with_batches("second", limit=200, sizes=(30, 40, 300), trials=1, like="first")
    assert search(job, recipe="test", console=console)["trials"] == 1
    known = f"known from {tmp_path / 'first'}: {8 - tried.count(300)} trials; {tried.count(300)} more lie outside"
    assert any(line.startswith(known) for line in console.lines)
