"""Jobs whose data, bundles and results all lie in the buckets of cloud providers."""

import contextlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from harness import CLASSES, Recorder, private_ray, write_spread_bundle
from PIL import Image

from mnist_dist import load_bundle, read_predictions
from mnist_dist.config import DataConfig, FitConfig, ModelConfig, PhasesConfig, RunConfig, TrainJob
from mnist_dist.on_ray.scoring.score import score
from mnist_dist.on_ray.search.search import search
from mnist_dist.on_ray.training.train import train
from mnist_dist.score_config import InputConfig, ScoreJob, ScoreRunConfig, TableConfig, TableFormat
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchRunConfig, SearchSpace
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry

pytestmark = pytest.mark.slow  # all of it is on Ray; test_cloud_stores runs without


@pytest.fixture(scope="module", autouse=True)
def _ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """One Ray for the module, whose workers inherit the way to the servers."""
    for server in ("s3_bucket", "gcs_bucket", "azure_container"):
        with contextlib.suppress(pytest.skip.Exception):
            request.getfixturevalue(server)
    with private_ray(num_cpus=4):
        yield


@pytest.fixture(params=["gcs", pytest.param("azure", marks=pytest.mark.chaos)])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture(params=["gcs", *(pytest.param(name, marks=pytest.mark.chaos) for name in ("s3", "azure"))])
def storage(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def noise(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    noise(number).save(buffer, "png")
    return buffer.getvalue()


def put_tar(uri: str, numbers: range) -> None:
    with ANYWHERE.new_object(uri) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number in numbers:
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(png(number))
            tar.addfile(info, io.BytesIO(png(number)))


def account_keys() -> list[str]:
    """The keys of Azure that the environment holds; the server of gs:// asks for none."""
    return re.findall(r"AccountKey=([^;]+)", os.environ.get("AZURE_STORAGE_CONNECTION_STRING", ""))


def content(entry: Entry) -> str:
    """The object as text, Parquet decoded."""
    data = ANYWHERE.read_bytes(entry.uri)
    if not entry.uri.endswith(".parquet"):
        return data.decode(errors="replace")
    table = pq.read_table(io.BytesIO(data))
    return f"{table.schema.metadata} {table.to_pylist()}"


@pytest.mark.parametrize("table_format", ["parquet", "delta"])
def test_scoring_from_a_bucket_into_a_table_there(place: str, tmp_path: Path, table_format: TableFormat) -> None:
    if table_format == "delta" and place.startswith("gs"):
        pytest.skip("Delta tables on gs:// are refused; runs with the other stores")
    folder = write_spread_bundle(tmp_path / "bundle", images=[noise(number) for number in range(100)], seed=1)
    ANYWHERE.upload_folder(folder, f"{place}/bundle", last="bundle.json")
    put_tar(f"{place}/in/small.tar", range(20))
    ANYWHERE.write_bytes(f"{place}/in/a b#%+.png", png(20))
    ANYWHERE.write_bytes(f"{place}/in/folder/", b"")
    ANYWHERE.write_bytes(f"{place}/list.txt", f"{place}/in/missing.png\n".encode())
    console = Recorder()
    job = ScoreJob(
        bundle=f"{place}/bundle",
        output=f"{place}/table",
        inputs=InputConfig(input=(f"{place}/in", f"{place}/list.txt")),
        run=ScoreRunConfig(max_bad_fraction=1.0),
        shard_size=5,
        table=TableConfig(table_format=table_format),
    )
    result = score(job, console=console)
    assert (result["images"], result["statuses"]["ok"], result["statuses"]["missing"]) == (22, 21, 1)
    rows = {row["uri"]: row for row in read_predictions(f"{place}/table").to_pylist()}
    opened = load_bundle(f"{place}/bundle")
    for number in range(21):
        row = rows[f"{place}/in/small.tar!{number}.png" if number < 20 else f"{place}/in/a b#%+.png"]
        assert row["predicted_class"] == opened.predict(np.asarray(noise(number))).predicted_class
        assert row["etag"] == ANYWHERE.entry_of(row["uri"].partition("!")[0]).etag
    assert rows[f"{place}/in/missing.png"]["status"] == "missing"
    put_tar(f"{place}/in/more.tar", range(30, 33))
    again = score(replace(job, mode="incremental"), console=console)
    assert again["images"] == 25
    written = [*console.lines, repr((result, again)), *map(content, ANYWHERE.list_entries(f"{place}/table"))]
    assert account_keys() or not place.startswith("az")
    assert not any(key in text for key in account_keys() for text in written)
    if table_format == "delta":
        uri, options = ANYWHERE.object_store_access(f"{place}/table/delta")
        assert DeltaTable(uri, storage_options=options).to_pyarrow_table().num_rows == 25
    assert {row["predicted_class"] for row in rows.values()} <= {*CLASSES, None}


def digits(storage: str, name: str) -> TrainJob:
    return TrainJob(
        data=DataConfig(limit=1_600),
        model=ModelConfig(backbone="cnn", dropout=0.0),
        phases=PhasesConfig(epochs=(4,), learning_rate=(0.01,)),
        fit=FitConfig(batch_size=50, precision="float32"),
        run=RunConfig(storage=f"{storage}/runs", name=name, workers=2, cpus_per_worker=1),
    )


def test_training_in_a_bucket_goes_on_after_a_worker_was_killed(storage: str) -> None:
    def kill() -> None:
        children = psutil.Process().children(recursive=True)
        min((child for child in children if "RayTrainWorker" in " ".join(child.cmdline())), key=lambda p: p.pid).kill()

    result = train(digits(storage, "killed"), recipe="test", console=Recorder("epoch 2", kill))
    assert result["epochs"] == 4
    assert load_bundle(f"{storage}/runs/killed/bundle").info.class_names == tuple("0123456789")
    undisturbed = train(digits(storage, "run"), recipe="test", console=Recorder())
    assert result["test_loss"] == pytest.approx(undisturbed["test_loss"], rel=1e-4)
    assert train(digits(storage, "run"), recipe="test", console=Recorder())["bundle"] == f"{storage}/runs/run/bundle"


def test_a_search_keeps_its_trials_in_a_bucket(place: str) -> None:
    job = SearchJob(
        data=DataConfig(limit=700),
        space=SearchSpace(
            backbones=(BackboneSpace(backbone="mlp", trained=("all",)),),
            hidden_units=(0,),
            dropout=(0.0,),
            optimizer=("sgd",),
            learning_rate=(1e-3, 1e-2),
            label_smoothing=(0.0,),
            batch_size=(50,),
        ),
        search=SearchConfig(algorithm="random", trials=2, trial_epochs=2, finalists=1, finalist_epochs=2),
        run=SearchRunConfig(storage=f"{place}/runs", name="search"),
    )
    result = search(job, recipe="test", console=Recorder())
    assert result["trials"] == 2
    assert ANYWHERE.exists(f"{place}/runs/search/bundle/bundle.json")
    assert not ANYWHERE.exists(f"{place}/runs/search/tune")
