"""One source for every job: the same images train and score the same, whatever form they have and wherever they are."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from forms import FORMS, Labelled
from harness import Recorder, private_ray

from mnist_dist.config import (
    DataConfig,
    DecodeConfig,
    FitConfig,
    ModelConfig,
    OptimizerConfig,
    PhasesConfig,
    RunConfig,
    TrainJob,
)
from mnist_dist.data.records import RecordPlan, decode_shard, fingerprint, finish, plan_records, read_index
from mnist_dist.data.splits import Splits, assign_splits
from mnist_dist.images.spec import ImageSpec
from mnist_dist.score_config import InputConfig, ScoreJob
from mnist_dist.scoring.predictions import read_predictions
from mnist_dist.sources.source import Source, image_spec, open_source
from mnist_dist.training.checkpoints import read_checkpoint
from mnist_dist.training.runs import Run

COUNT = 240


def digits() -> list[Labelled]:
    source = open_source(DataConfig(limit=COUNT))
    assert source.pixels is not None
    labels = source.table["label"].to_pylist()
    return [Labelled(source.pixels[row, ..., 0], labels[row], row) for row in range(COUNT)]


def decoded(source: Source, storage: Path) -> tuple[RecordPlan, pa.Table]:
    """The index of the decoded images, without Ray."""
    spec = image_spec(source, backbone_size_px=28, scratch_size=True, config=DataConfig())
    assert spec == ImageSpec(height_px=8, width_px=8, channels=1)
    plan = plan_records(source, spec, storage=str(storage), limits=DecodeConfig(max_pixels=1_000))
    for shard in () if source.pixels is not None else plan.cache.missing():
        rows = plan.cache.rows_of(shard)
        decode_shard(plan, shard, source.table.slice(rows.start, rows.stop - rows.start))
    finish(plan, source)
    return plan, read_index(plan.cache)


def split(index: pa.Table, class_names: tuple[str, ...]) -> Splits:
    return assign_splits(
        labels=index["label"].to_numpy().astype(np.int32),
        given=index["split"].to_pylist(),
        digests=np.array(index["digest"].to_pylist()).astype(np.bytes_),
        readable=np.array([status == "ok" for status in index["status"].to_pylist()]),
        uris=index["uri"].to_pylist(),
        class_names=class_names,
        config=DataConfig(),
    )


def in_order(source: Source, storage: Path) -> dict[str, Any]:
    """What a training sees: the digests and labels of each split in their order, and the classes."""
    plan, index = decoded(source, storage)
    splits = split(index, source.class_names)
    rows = {"train": splits.train, "val": splits.val, "test": splits.test}
    of_split = {name: index.select(["digest", "label"]).take(pa.array(some)).to_pylist() for name, some in rows.items()}
    return {**of_split, "classes": source.class_names, "fingerprint": fingerprint(index, plan.class_names)}


@pytest.fixture(scope="module")
def of_arrays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_order(open_source(DataConfig(limit=COUNT)), tmp_path_factory.mktemp("arrays"))


@pytest.fixture(params=["local", "s3", "gcs", "azure"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "images") if request.param == "local" else str(request.getfixturevalue(request.param))


@pytest.mark.parametrize("form", FORMS)
def test_the_same_images_train_in_the_same_order_in_every_form(
    root: str, tmp_path: Path, form: str, of_arrays: dict[str, Any]
) -> None:
    source = open_source(DataConfig(data=FORMS[form](root, digits())))
    assert len(source.table) == COUNT
    assert in_order(source, tmp_path / "runs") == of_arrays


# --- whole jobs


def forms(*slow: str) -> pytest.MarkDecorator:
    """Each form, of which those are `slow` and the others `chaos`."""
    marked = [form if form in slow else pytest.param(form, marks=pytest.mark.chaos) for form in FORMS]
    return pytest.mark.parametrize("form", marked)


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with private_ray(num_cpus=2):
        yield


def train_job(storage: Path, data: DataConfig, name: str) -> TrainJob:
    return TrainJob(
        data=data,
        model=ModelConfig(backbone="cnn", dropout=0.0),
        phases=PhasesConfig(epochs=(1,), learning_rate=(0.01,)),
        optimizer=OptimizerConfig(optimizer="sgd", momentum=0.9),
        fit=FitConfig(batch_size=50, precision="float32"),
        run=RunConfig(storage=str(storage), name=name, workers=1, cpus_per_worker=1),
    )


def weights_of(storage: Path, name: str) -> list[np.ndarray[Any, Any]]:
    checkpoint = Run(str(storage / name)).newest_checkpoint()
    assert checkpoint is not None
    return read_checkpoint(Path(checkpoint)).weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, _ray: None) -> Path:
    from mnist_dist.on_ray.training.train import train

    storage = tmp_path_factory.mktemp("trained")
    train(train_job(storage, DataConfig(limit=COUNT), "arrays"), recipe="test", console=Recorder())
    return storage


@pytest.mark.slow
@forms("tar.zst", "hugging-face")
def test_every_form_trains_to_the_same_weights(trained: Path, tmp_path: Path, form: str) -> None:
    from mnist_dist.on_ray.training.train import train

    data = DataConfig(data=FORMS[form](str(tmp_path / "images"), digits()))
    train(train_job(tmp_path, data, "run"), recipe="test", console=Recorder())
    for ours, theirs in zip(weights_of(tmp_path, "run"), weights_of(trained, "arrays"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def rows_of(bundle: str, output: Path, inputs: InputConfig) -> list[dict[str, Any]]:
    """The rows of a table but for what depends on where the images are."""
    from mnist_dist.on_ray.scoring.score import score

    job = ScoreJob(bundle=bundle, output=str(output), inputs=inputs)
    job = replace(job, engine=replace(job.engine, engine="keras"))
    score(job, console=Recorder())
    console = Recorder()
    score(replace(job, mode="incremental"), console=console)
    assert any("there is nothing to score" in line for line in console.lines)
    table = read_predictions(str(output)).drop_columns(["uri", "etag", "scored_at", "size_bytes"])
    return sorted(table.to_pylist(), key=lambda row: (row["predicted_index"], row["probabilities"]))


@pytest.fixture(scope="module")
def scored(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scored")
    return rows_of(
        str(trained / "arrays" / "bundle"),
        folder / "table",
        InputConfig(input=FORMS["folder"](str(folder / "images"), digits())),
    )


@pytest.mark.slow
@forms("tar.zst", "webdataset-json", "hugging-face", "csv", "mixture")
def test_every_form_gives_the_same_rows(trained: Path, scored: list[dict[str, Any]], tmp_path: Path, form: str) -> None:
    inputs = InputConfig(input=FORMS[form](str(tmp_path / "images"), digits()))
    assert rows_of(str(trained / "arrays" / "bundle"), tmp_path / "table", inputs) == scored


@pytest.mark.slow
def test_named_arrays_are_scored_row_by_row(trained: Path, tmp_path: Path) -> None:
    bundle = str(trained / "arrays" / "bundle")
    rows = rows_of(bundle, tmp_path / "table", InputConfig(input=("digits",)))
    assert len(rows) == 1797
    assert {row["status"] for row in rows} == {"ok"}
