"""The search as a whole: the command, what survives a kill, what failed trials cost, features against the backbone."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from harness import Command, Recorder, private_ray, run_command
from pages import Parts
from PIL import Image

from mnist_dist import load_bundle
from mnist_dist.config import DataConfig, KerasBackend
from mnist_dist.errors import Interrupted, ResourceError, ResumeConflict, StorageError, WorkersFailed
from mnist_dist.models.history import Epoch
from mnist_dist.on_ray.search.search import _positions, search
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchRunConfig, SearchSpace
from mnist_dist.training.host import Measured, Position
from mnist_dist.training.trackers import TRACKERS, End, TrackedRun
from mnist_dist.tuning.leaderboard import SCHEMA
from mnist_dist.tuning.trials import Trial, TrialRecords

TRIALS = 5
SETTINGS = f"--limit 900 --trials {TRIALS} --trial-epochs 2 --finalists 2 --finalist-epochs 2 --name run"


def command(storage: Path, *flags: str) -> tuple[str, ...]:
    """`python -m jobs.search search-digits` with tiny epochs; after `python -m`."""
    return ("jobs.search", "search-digits", "--storage", str(storage), *SETTINGS.split(), *flags)


@dataclass(frozen=True)
class Finished:
    """A search that was run as a command."""

    storage: Path
    code: int
    result: dict[str, Any]
    stderr: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    storage = tmp_path_factory.mktemp("finished")
    return Finished(storage, *run_command(*command(storage)))


@pytest.mark.slow
def test_the_command_answers_with_the_contracts_keys(finished: Finished) -> None:
    assert finished.code == 0, finished.stderr
    result = finished.result
    assert {"job", "run_dir", "bundle", "trials", "best", "leaderboard", "report", "seconds"} <= result.keys()
    assert (result["job"], result["trials"], result["failed"]) == ("search", TRIALS, 0)
    assert result["run_dir"] == str(finished.storage / "run")
    assert 0 <= result["best"]["val_accuracy"] <= 1
    assert result["best"]["ms_per_image"] > 0
    assert f"winner: trial {result['best']['trial']}" in finished.stderr


@pytest.mark.slow
def test_the_leaderboard_has_a_row_for_each_trial(finished: Finished) -> None:
    table = pq.read_table(finished.result["leaderboard"])
    rows = table.to_pylist()
    assert table.schema == SCHEMA
    assert sorted(row["trial"] for row in rows) == list(range(TRIALS))
    assert {row["backbone"] for row in rows} == {"mlp", "cnn"}
    assert [row["trial"] for row in rows if row["winner"]] == [finished.result["best"]["trial"]]
    assert sum(row["finalist_val_accuracy"] is not None for row in rows) == 2
    assert any(row["pareto"] for row in rows)
    assert all(row["parameters"] > 1_000 and row["ms_per_image"] > 0 for row in rows)
    with Image.open(finished.storage / "run" / "pareto.png") as figure:
        assert figure.format == "PNG"


@pytest.mark.slow
def test_the_page_of_the_search_shows_all_trials_and_leads_to_the_winners(finished: Finished) -> None:
    folder, best = finished.storage / "run", finished.result["best"]
    page = Parts((folder / "report.html").read_text())
    assert finished.result["report"] == str(folder / "report.html")
    assert page.titles == ["run"]
    assert f"{best['config']['backbone']} won: {100 * best['test_accuracy']:.2f} % of the" in page.text
    assert {"pareto", "progress", "finalists", "leaderboard"} <= page.ids
    assert sorted(map(int, page.column("leaderboard", "trial"))) == list(range(TRIALS))
    assert page.links["report"] == f"finalists/{best['trial']:06d}/bundle/report.html"
    winner = Parts((folder / page.links["report"]).read_text())
    assert winner.titles == [f"run, trial {best['trial']}"]
    assert (folder / page.links["epochs"]).exists()
    table = pq.read_table(finished.result["leaderboard"])
    assert all(0 < row["ended_s"] < 3600 for row in table.to_pylist())


@pytest.mark.slow
def test_the_winners_bundle_loads_and_its_metrics_are_those_of_the_best(finished: Finished) -> None:
    best = finished.result["best"]
    bundle = load_bundle(finished.result["bundle"])
    assert bundle.info.backbone == best["config"]["backbone"]
    assert bundle.info.test["accuracy"] == best["test_accuracy"]
    assert bundle.info.test["loss"] == best["test_loss"]
    assert bundle.info.validation["accuracy"] == best["val_accuracy"]
    assert bundle.info.config["fit"]["batch_size"] == best["config"]["batch_size"]


@pytest.mark.slow
def test_a_finished_search_returns_at_once(finished: Finished) -> None:
    nowhere = {"RAY_ADDRESS": "127.0.0.1:1"}  # whoever asks for a Ray fails
    code, result, err = run_command(*command(finished.storage), **nowhere)
    assert (code, result) == (0, finished.result)
    assert "is finished" in err


def records(storage: Path) -> dict[int, Trial]:
    return TrialRecords(str(storage / "run" / "trials")).read()


def finished_records(storage: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of each record of a trial that does not run, by the file's name."""
    found = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in storage.glob("run/trials/*.json")}
    return {name: record for name, record in found.items() if json.loads(record[0])["status"] != "running"}


@pytest.mark.chaos  # test_end_to_end kills a driver, too
@pytest.mark.parametrize("at", ["trials", "finalists"])
def test_a_killed_driver_is_continued_by_the_same_command(tmp_path: Path, at: str) -> None:
    def is_time() -> bool:
        if at == "trials":
            return len(finished_records(tmp_path)) >= 2
        return any(tmp_path.glob("run/finalists/*/lock/*"))

    with Command(*command(tmp_path)) as job:
        assert job.until(is_time), job.stderr()
        job.kill()
    assert job.process.returncode == -signal.SIGKILL
    before = finished_records(tmp_path)
    assert (len(before) < TRIALS) == (at == "trials")
    code, result, err = run_command(*command(tmp_path))
    assert code == 0, err
    assert "Resuming" in err
    after = finished_records(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == result["trials"] == pq.read_table(result["leaderboard"]).num_rows == TRIALS
    assert (tmp_path / "run" / "bundle" / "bundle.json").exists()


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """One Ray for the searches of this process."""
    with private_ray(num_cpus=2):
        yield


def small_search(storage: Path, *, run: dict[str, Any] | None = None, **search_fields: Any) -> SearchJob:
    """A grid of three learning rates of `mlp` on the digits: 1e-3, 3e13 and 1e30; only the first of them learns."""
    settings: dict[str, Any] = {"algorithm": "grid", "trial_epochs": 2, "finalists": 1, "finalist_epochs": 2}
    return SearchJob(
        data=DataConfig(limit=700),
        space=SearchSpace(
            backbones=(BackboneSpace(backbone="mlp", trained=("all",)),),
            hidden_units=(0,),
            dropout=(0.0,),
            optimizer=("sgd",),
            learning_rate=(1e-3, 1e30),
            label_smoothing=(0.0,),
            batch_size=(50,),
        ),
        search=SearchConfig(**{**settings, **search_fields}),
        run=SearchRunConfig(**{"storage": str(storage), "name": "run", **(run or {})}),
    )


def with_rates(job: SearchJob, low: float, high: float) -> SearchJob:
    return replace(job, space=replace(job.space, learning_rate=(low, high)))


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=pytest.mark.chaos)])
def test_trials_that_diverge_are_recorded_with_their_error_and_the_search_goes_on(
    tmp_path: Path, backend: KerasBackend
) -> None:
    console = Recorder()
    result = search(small_search(tmp_path, run={"backend": backend}), recipe="test", console=console)
    assert (result["trials"], result["failed"], result["best"]["trial"]) == (3, 2, 0)
    found = records(tmp_path)
    assert [trial.status for trial in found.values()] == ["done", "failed", "failed"]
    assert found[0].error is None
    assert all("phase 'train', epoch 1" in (found[number].error or "") for number in (1, 2))
    assert any("trial(s) failed: " in line for line in console.lines)
    rows = pq.read_table(result["leaderboard"]).to_pylist()
    assert [row["trial"] for row in rows] == [0, 1, 2]
    assert [row["error"] for row in rows] == [found[number].error for number in range(3)]


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_a_search_whose_trials_all_fail_counts_their_distinct_errors_and_runs_none_of_them_again(
    tmp_path: Path,
) -> None:
    job = with_rates(small_search(tmp_path, algorithm="random", trials=3), 1e30, 1e30)
    with pytest.raises(WorkersFailed, match=r"^None of the 3 trials succeeded: 3 x .*epoch 1") as caught:
        search(job, recipe="test", console=Recorder())
    assert caught.value.exit_code == 1
    page = Parts((tmp_path / "run" / "report.html").read_text())
    assert "No trial succeeded; the table says why." in page.text
    before = finished_records(tmp_path)
    with pytest.raises(WorkersFailed, match=r"^None of the 3 trials succeeded: 3 x "):
        search(job, recipe="test", console=Recorder())
    assert finished_records(tmp_path) == before
    assert len(before) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_a_budget_that_ends_before_the_first_trial_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        WorkersFailed, match=r"The time \(--hours 1e-09\) ran out before a trial had a result"
    ) as caught:
        search(small_search(tmp_path, hours=1e-9), recipe="test", console=Recorder())
    assert caught.value.exit_code == 1
    assert records(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_a_trial_that_fits_nowhere_is_refused_with_what_the_cluster_has(tmp_path: Path) -> None:
    job = small_search(tmp_path, run={"cpus_per_trial": 3.0})
    with pytest.raises(ResourceError, match=r"fits on no node; .*1 node\(s\), 2 CPUs, 0 GPUs.*cpus_per_trial=3"):
        search(job, recipe="test", console=Recorder())
    with pytest.raises(ResourceError, match=r"fits on no node; .*gpus_per_trial=0\.5"):
        search(small_search(tmp_path, run={"gpus_per_trial": 0.5}), recipe="test", console=Recorder())


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_a_signal_ends_the_search_and_the_same_job_goes_on_unlike_another_one(tmp_path: Path) -> None:
    job = with_rates(small_search(tmp_path, run={"concurrent_trials": 1}), 1e-3, 1e-2)

    def stop_after_the_first_trial() -> None:
        while not finished_records(tmp_path):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    console = Recorder("trials:", threading.Thread(target=stop_after_the_first_trial, daemon=True).start)
    with pytest.raises(Interrupted, match="run the same command to resume") as caught:
        search(job, recipe="test", console=console)
    assert caught.value.exit_code == 128 + signal.SIGINT
    page = Parts((tmp_path / "run" / "report.html").read_text())
    assert f"Stopped after {len(finished_records(tmp_path))} of 3 trials; the same command resumes." in page.text
    before = finished_records(tmp_path)
    with pytest.raises(ResumeConflict, match=r"search\.seed: 9 now, 0 in the run"):
        search(replace(job, search=replace(job.search, seed=9)), recipe="test", console=Recorder())
    result = search(job, recipe="test", console=Recorder())
    after = finished_records(tmp_path)
    assert {name: after[name] for name in before} == before
    assert (result["trials"], result["failed"], len(after)) == (3, 0, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_a_storage_that_goes_away_in_the_middle_ends_the_search_which_then_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "trials"
    with pytest.raises((WorkersFailed, StorageError), match="trials"):
        search(
            small_search(tmp_path),
            recipe="test",
            console=Recorder("trials:", lambda: folder.write_text("in the way")),
        )
    folder.unlink()
    result = search(small_search(tmp_path), recipe="test", console=Recorder())
    assert (result["trials"], result["failed"]) == (3, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        search(small_search(tmp_path / "file"), recipe="test", console=Recorder())


class Told:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.name, self.epochs, self.ends = "", list[int](), list[End]()

    def begin(self, run: TrackedRun) -> int:
        self.name = run.name
        return 0

    def epoch(self, epoch: Epoch) -> None:
        self.epochs.append(epoch.epoch)

    def end(self, end: End) -> None:
        self.ends.append(end)


@pytest.mark.chaos
@pytest.mark.usefixtures("two_cpus")
def test_each_finalist_is_tracked_and_the_winner_again_with_its_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[Told]()

    def new() -> Told:
        told.append(Told())
        return told[-1]

    monkeypatch.setitem(TRACKERS, "mlflow", new)
    monkeypatch.setattr("mnist_dist.on_ray.training.train.check_trackers", lambda names: None)
    run = {"tracker": ("mlflow",), "workers": 1, "cpus_per_worker": 1}
    job = small_search(tmp_path, run=run, algorithm="random", trials=2, finalists=2)
    result = search(with_rates(job, 1e-3, 1e-2), recipe="test", console=Recorder())

    *finalists, winner = told
    best = result["best"]
    assert {each.name for each in finalists} == {"run-finalist-0", "run-finalist-1"}
    assert [each.epochs for each in told] == [[1, 2], [1, 2], []]
    assert all(set(end.metrics) >= {"validation_accuracy"} for each in finalists for end in each.ends)
    assert not any("test_accuracy" in end.metrics for each in finalists for end in each.ends)
    assert winner.name == f"run-finalist-{best['trial']}"
    (end,) = winner.ends
    assert (end.status, end.metrics["test_accuracy"]) == ("finished", best["test_accuracy"])
    assert (end.bundle or "").endswith(f"finalists/{best['trial']:06d}/bundle")


@dataclass(frozen=True)
class Pair:
    """The same search with the features computed once, and with the backbone in each step."""

    with_features: Path
    without: Path


@pytest.fixture(scope="module")
def pair(two_cpus: None, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two trials one after the other of heads on a frozen MobileNet of random weights."""
    storages = [tmp_path_factory.mktemp(name) for name in ("with-features", "without")]
    for storage, cached in zip(storages, (True, False), strict=True):
        job = small_search(
            storage,
            run={"feature_cache": cached, "concurrent_trials": 1},
            algorithm="random",
            scheduler="none",
            trials=2,
        )
        space = replace(
            job.space,
            backbones=(BackboneSpace(backbone="mobilenet", alpha=(0.25,), image_size_px=(32,)),),
            optimizer=("adam",),
            learning_rate=(1e-3, 1e-2),
        )
        search(replace(job, data=DataConfig(limit=400), space=space), recipe="test", console=Recorder())
    return Pair(*storages)


@pytest.mark.slow
def test_trials_on_features_come_to_the_same_as_with_the_backbone_in_each_step(pair: Pair) -> None:
    assert any(pair.with_features.glob("_features/*"))
    assert not any(pair.without.glob("_features/*"))
    with_features, without = records(pair.with_features), records(pair.without)
    assert with_features.keys() == without.keys() == {0, 1}
    for number, trial in with_features.items():
        other = without[number]
        assert trial.params == other.params
        assert trial.val_accuracy == pytest.approx(other.val_accuracy, abs=0.03)  # one of 36 images
        assert trial.val_loss == pytest.approx(other.val_loss, rel=5e-3)


@pytest.mark.slow
def test_the_leaderboard_counts_the_whole_network_once_with_and_without_features(pair: Pair) -> None:
    parameters = []
    for storage in (pair.with_features, pair.without):
        (row, _) = pq.read_table(storage / "run" / "leaderboard.parquet").to_pylist()
        model = load_bundle(str(storage / "run" / "bundle")).model
        assert row["parameters"] == model.count_params()
        parameters.append(row["parameters"])
    assert parameters[0] == parameters[1]


@dataclass(frozen=True)
class FakeBoard:
    """A board's actor that always shows the same."""

    position: Position | Measured | None

    @property
    def take(self) -> Any:
        return self

    def remote(self) -> Any:
        return self.position, [], 0.0


def test_finalists_are_shown_in_training_and_while_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    position = Position(phase="head", epoch=2, epochs=9, step=1, steps=4, loss=1, accuracy=0.5, images_per_s=0)
    boards = (position, Measured(split="test", done=1_200, images=3_000), None)
    running = {
        number: (Trial(number=number, params={}, status="running"), FakeBoard(shown))
        for number, shown in enumerate(boards)
    }
    assert _positions(running)[1:] == [["0", "head", "2/9", "0.5000"], ["1", "measuring", "1,200/3,000 test", ""]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--backbones", "cnnn"), "did you mean cnn"),
        (("--weights", "mlp"), "weights must be given as backbone=PATH"),
        (("--weights", "cnn=imagenet"), "weights for cnn must be none"),
        (("--learning-rate", "0.01", "0.001"), "--learning-rate must be a lowest and a highest value"),
        (("--trials", "0"), "--trials must be at least 1"),
    ],
)
def test_wrong_usage_is_told_before_any_work(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    code, _, err = run_command("jobs.search", "search-digits", "--storage", str(tmp_path), *flags)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
