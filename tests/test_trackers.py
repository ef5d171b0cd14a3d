"""trackers: MLflow in a local database and Weights & Biases offline hold each epoch of a run once (no network)."""

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Command, an_epoch, run_command

from mnist_dist.config import TrainJob
from mnist_dist.models.history import Epoch
from mnist_dist.training.trackers import TRACKERS, End, MlflowTracker, TrackedRun, WandbTracker, flat

RUN = TrackedRun(
    id="0a1b2c", project="digits", name="first", uri="/runs/first", settings={"recipe": "r", "fit": {"batch_size": 50}}
)
END = End(status="finished", metrics={"test_accuracy": 0.875}, bundle="/runs/first/bundle")
HEADER_BYTES, BLOCK_BYTES = 7, 32_768
FULL, LAST = 1, 4
EPOCHS = 8

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, of SQLAlchemy


@pytest.fixture
def mlflow_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    pytest.importorskip("mlflow", reason="needs MLflow (pip install -e '.[dev]')")
    pytest.importorskip("sqlalchemy", reason="needs SQLAlchemy for MLflow's local database")
    values = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


@pytest.fixture
def wandb_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    wandb = pytest.importorskip("wandb", reason="needs Weights & Biases (pip install -e '.[dev]')")
    values = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # It reads its environment once.
    yield values
    wandb.teardown()


def mlflow_run(uri: str) -> tuple[Any, Callable[[str], list[tuple[int, float]]]]:
    """The only run of the experiment `digits`, and what gives the steps and values of one of its metrics."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])

    def history(name: str) -> list[tuple[int, float]]:
        return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))

    return run, history


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records in all offline runs below a folder, in order: protobufs in LevelDB's log format, behind a header."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, position, content = file.read_bytes(), HEADER_BYTES, b""
        while position + HEADER_BYTES <= len(data):
            left = BLOCK_BYTES - position % BLOCK_BYTES
            if left < HEADER_BYTES:
                position += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            content += data[position + HEADER_BYTES : position + HEADER_BYTES + length]
            position += HEADER_BYTES + length
            if kind in (FULL, LAST):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(content)
                content = b""
                yield record


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [record.history.item for record in wandb_records(folder) if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]


def an_epoch_of(number: int) -> Epoch:
    return an_epoch(number, val_loss=1 / number)


def test_mlflow_holds_settings_epochs_and_the_end(mlflow_environment: dict[str, str]) -> None:
    tracker = MlflowTracker()
    assert tracker.begin(RUN) == 0
    tracker.epoch(an_epoch_of(1))
    tracker.epoch(an_epoch_of(2))
    tracker.end(END)

    run, history = mlflow_run(mlflow_environment["MLFLOW_TRACKING_URI"])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {"recipe": "r", "fit.batch_size": "50"}
    assert history("val_loss") == [(1, 1.0), (2, 0.5)]
    assert history("learning_rate") == [(1, 0.01), (2, 0.01)]
    assert run.data.metrics["test_accuracy"] == 0.875
    assert run.data.tags["mnist_dist.bundle"] == "/runs/first/bundle"


def test_a_resumed_run_is_the_same_run_of_mlflow(mlflow_environment: dict[str, str]) -> None:
    first, again = MlflowTracker(), MlflowTracker()
    first.begin(RUN)
    first.epoch(an_epoch_of(1))
    first.end(End(status="stopped"))
    assert mlflow_run(mlflow_environment["MLFLOW_TRACKING_URI"])[0].info.status == "KILLED"

    assert again.begin(RUN) == 1
    again.epoch(an_epoch_of(2))
    again.end(END)
    again.end(END)

    run, history = mlflow_run(mlflow_environment["MLFLOW_TRACKING_URI"])
    assert run.info.status == "FINISHED"
    assert history("epoch") == [(1, 1.0), (2, 2.0)]
    assert history("test_accuracy") == [(0, 0.875)]


def test_all_settings_of_a_job_fit_into_mlflow(mlflow_environment: dict[str, str]) -> None:
    settings = {f"part{part}": TrainJob().settings() for part in range(3)}
    MlflowTracker().begin(TrackedRun(id="9", project="digits", name="n", uri="u", settings=settings))
    run, _ = mlflow_run(mlflow_environment["MLFLOW_TRACKING_URI"])
    assert run.data.params == {name: str(value) for name, value in flat(settings)}
    assert len(run.data.params) > 100


def test_wandb_offline_holds_settings_epochs_and_the_end(wandb_environment: dict[str, str], tmp_path: Path) -> None:
    first, again = WandbTracker(), WandbTracker()
    assert first.begin(RUN) == 0
    first.epoch(an_epoch_of(1))
    first.end(End(status="stopped"))
    again.begin(RUN)
    again.epoch(an_epoch_of(2))
    again.end(END)

    rows = wandb_rows(tmp_path)
    assert [(row["epoch"], row["val_loss"], row["_step"], row["phase"]) for row in rows] == [
        (1, 1.0, 1, "train"),
        (2, 0.5, 2, "train"),
    ]
    runs = [record.run for record in wandb_records(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {("0a1b2c", "digits", "first")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert (config["recipe"], config["fit"]) == ("r", {"batch_size": 50})
    codes = [record.exit.exit_code for record in wandb_records(tmp_path) if record.WhichOneof("record_type") == "exit"]
    assert codes == [1, 0]


def test_each_tracker_is_named_after_its_package_and_its_extra() -> None:
    extras = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name in TRACKERS:
        assert re.search(rf"^{name} = \[$|^{name} = \[\"", extras, re.MULTILINE), name


@pytest.mark.slow
def test_a_killed_driver_is_tracked_to_the_end_by_the_same_command(
    tmp_path: Path, mlflow_environment: dict[str, str], wandb_environment: dict[str, str]
) -> None:
    settings = f"--epochs {EPOCHS} --workers 1 --precision float32 --name run --tracker mlflow wandb"
    command = ("jobs.train", "quickstart", "--storage", str(tmp_path / "runs"), *settings.split())
    command += ("--tracker-project", "digits")
    environment = {**mlflow_environment, **wandb_environment}
    with Command(*command, **environment) as job:
        assert job.until(lambda: [*tmp_path.glob("runs/run/attempt-*/checkpoint-*/state.json")]), job.stderr()
        job.kill()
    code, result, said = run_command(*command, **environment)
    assert (code, result["epochs"]) == (0, EPOCHS), said
    assert " failed, so" not in said

    run, history = mlflow_run(mlflow_environment["MLFLOW_TRACKING_URI"])
    assert [step for step, _ in history("val_loss")] == [*range(1, EPOCHS + 1)]
    assert (run.info.status, run.data.metrics["test_accuracy"]) == ("FINISHED", result["test_accuracy"])
    assert [row["_step"] for row in wandb_rows(tmp_path)] == [*range(1, EPOCHS + 1)]
