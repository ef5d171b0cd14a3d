"""Training on images that have any number of classes: on Ray, on both backends, to a bundle that is scored."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Recorder, largest_difference, private_ray, run_command, train_workers
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from mnist_dist import load_bundle
from mnist_dist.config import (
    DataConfig,
    FitConfig,
    KerasBackend,
    ModelConfig,
    OptimizerConfig,
    PhasesConfig,
    RunConfig,
    TrainJob,
)
from mnist_dist.data.records import open_records
from mnist_dist.models.bundle import CALIBRATION_FILE, REPORT_FILE
from mnist_dist.models.history import HISTORY_FILE, read_history
from mnist_dist.on_ray.data.prepare import list_data
from mnist_dist.on_ray.training.train import train
from mnist_dist.training.checkpoints import read_checkpoint
from mnist_dist.training.runs import Run

pytestmark = pytest.mark.slow

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNT, EPOCHS = 900, 4


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with private_ray(num_cpus=4):
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No, one or two digits beside each other, with the set of their names, and the same as a text and as columns."""
    digits, random = load_digits(), np.random.default_rng(0)
    pictures = (digits.images * 15.9).astype(np.uint8)
    encoded, sets = [], []
    for _ in range(COUNT):
        chosen = random.integers(0, len(pictures), random.integers(0, 3))
        canvas = random.integers(0, 3, (8, 16), dtype=np.uint8)  # Otherwise all empty images would be one.
        for place, number in enumerate(chosen):
            canvas[:, 8 * place : 8 * place + 8] = np.maximum(canvas[:, 8 * place : 8 * place + 8], pictures[number])
        buffer = io.BytesIO()
        Image.fromarray(canvas).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
        sets.append(sorted({NAMES[digits.target[number]] for number in chosen}))
    columns = {name: pa.array([name in names for names in sets]) for name in NAMES}
    path = tmp_path_factory.mktemp("images") / "digits.parquet"
    texts = [";".join(names) for names in sets]
    lists = pa.array(sets, pa.list_(pa.string()))
    pq.write_table(pa.table({"image": encoded, "label": lists, "text": texts, **columns}), path)
    return path


def job_of(images: Path, storage: Path, *, name: str, workers: int = 1, **fields: Any) -> TrainJob:
    job = TrainJob(
        data=DataConfig(data=(str(images),), multi_label=True),
        model=ModelConfig(backbone="mlp", dropout=0.0),  # Without pooling, whose maxima the last bit may decide.
        phases=PhasesConfig(epochs=(EPOCHS,), learning_rate=(0.1,)),
        optimizer=OptimizerConfig(optimizer="sgd", momentum=0.9, class_weights="balanced"),
        fit=FitConfig(batch_size=48, precision="float32", seed=2, best_metric="val_accuracy"),
        run=RunConfig(storage=str(storage), name=name, workers=workers, cpus_per_worker=1),
    )
    return replace(job, **fields)


def final_weights(storage: Path, name: str) -> list[npt.NDArray[Any]]:
    return read_checkpoint(Path(Run(str(storage / name)).newest_checkpoint() or "")).weights


@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=pytest.mark.chaos)])
def test_1_and_3_workers_agree_and_the_metrics_are_those_of_scikit_learn(
    images: Path, tmp_path: Path, backend: KerasBackend
) -> None:
    results = {}
    for workers in (1, 3):
        job = job_of(images, tmp_path, name=f"w{workers}", workers=workers)
        job = replace(job, run=replace(job.run, backend=backend))
        results[workers] = train(job, recipe="test", console=Recorder())
    assert largest_difference(final_weights(tmp_path, "w3"), final_weights(tmp_path, "w1")) <= 1e-5
    for name in ("test_mean_average_precision", "test_accuracy", "test_loss"):
        assert results[3][name] == pytest.approx(results[1][name], rel=1e-4)
    bundle = load_bundle(results[3]["bundle"])
    assert bundle.info.multi_label
    assert bundle.info.class_names == tuple(sorted(NAMES))
    check_against_scikit_learn(job, results[3])
    assert results[3]["test_mean_average_precision"] > 0.3  # By chance: 0.15.
    history = read_history((tmp_path / "w3" / HISTORY_FILE).read_bytes(), uri="history")
    best = max(history, key=lambda epoch: epoch.score)
    assert results[3]["best_epoch"] == best.epoch
    assert results[3]["validation_mean_average_precision"] == pytest.approx(best.val_mean_average_precision, rel=1e-4)


def check_against_scikit_learn(job: TrainJob, result: dict[str, Any]) -> None:
    """Compares the test's metrics with those of the bundle's own model on all images that it names."""
    listed = list_data(job.data, job.model, root=job.run.storage, console=Recorder())
    records = open_records(listed.plan, local_dir=Path(job.run.storage))
    table = pq.read_table(Path(result["bundle"]) / CALIBRATION_FILE)
    assert table.column_names == ["uri", "pixels"]  # Validation, then test; a set is no class.
    rows = [records.index["uri"].to_pylist().index(uri) for uri in table["uri"].to_pylist()]
    rows = rows[-result["test_images"] :]
    assert records.members is not None
    truth = records.members[records.index["label"].to_numpy()[rows]]
    scores = np.asarray(load_bundle(result["bundle"]).model(records.pixels[np.array(rows)]))
    used = truth.any(axis=0)
    expected = average_precision_score(truth[:, used], scores[:, used])
    assert result["test_mean_average_precision"] == pytest.approx(expected, rel=1e-4)
    assert result["test_accuracy"] == pytest.approx(np.mean(((scores >= 0.5) == truth).all(axis=1)))


def test_a_killed_run_resumes_to_the_undisturbed_one_and_its_bundle_is_scored_and_evaluated(
    images: Path, tmp_path: Path
) -> None:
    whole = job_of(images, tmp_path, name="whole", workers=2)
    killed = job_of(images, tmp_path, name="killed", workers=2)

    console = Recorder("epoch 2", lambda: train_workers()[0].kill())
    result = train(killed, recipe="test", console=console)
    undisturbed = train(whole, recipe="test", console=Recorder())
    assert largest_difference(final_weights(tmp_path, "killed"), final_weights(tmp_path, "whole")) <= 1e-5
    assert result["test_mean_average_precision"] == pytest.approx(undisturbed["test_mean_average_precision"], rel=1e-4)
    assert "mAP" in (Path(result["bundle"]) / REPORT_FILE).read_text()

    table, evaluation = str(tmp_path / "table"), str(tmp_path / "evaluation")
    scored = ("jobs.score", "--bundle", result["bundle"], "--input", str(images), "--carry", "label")
    assert run_command(*scored, "--output", table)[0] == 0
    code, found, _ = run_command("jobs.evaluate", "--predictions", table, "--output", evaluation)
    assert (code, found["images"]) == (0, COUNT)
    assert found["mean_average_precision"] > 0.3


@pytest.mark.parametrize(
    "form",
    [
        pytest.param({"label_column": "text", "label_separator": ";"}, id="text", marks=pytest.mark.chaos),
        pytest.param({"class_columns": tuple(sorted(NAMES))}, id="columns"),
    ],
)
def test_the_forms_of_labels_give_the_same_run(images: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    job = job_of(images, tmp_path, name="lists", phases=PhasesConfig(epochs=(1,)))
    other = replace(job, data=replace(job.data, **form), run=replace(job.run, name="other"))
    for each in (job, other):
        train(each, recipe="test", console=Recorder())
    assert largest_difference(final_weights(tmp_path, "other"), final_weights(tmp_path, "lists")) == 0
