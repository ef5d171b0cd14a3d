"""The scoring job on Ray: the contract's table, going on, and what is refused before anything is written."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Never

import boto3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from corpus import manifest_rows
from deltalake import DeltaTable
from harness import CLASSES, Command, Recorder, private_ray, run_command, write_spread_bundle
from onnx_models import small_bundle
from PIL import Image
from scored import one_hot, plan_of, scored_rows, write_scored

from mnist_dist import load_bundle
from mnist_dist.config import DecodeConfig, FeatureType
from mnist_dist.console import Stop
from mnist_dist.engines.choice import EngineChoice
from mnist_dist.engines.views import views_of
from mnist_dist.errors import (
    BundleError,
    ConfigError,
    DataError,
    Locked,
    ResourceError,
    ResumeConflict,
    ServiceError,
    StorageError,
    TooManyBadImages,
)
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.evaluation.evaluate import evaluate
from mnist_dist.images.decoder import decode_image
from mnist_dist.keywords import fields_of
from mnist_dist.models.bundle import Bundle
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.cluster import Resources
from mnist_dist.on_ray.scoring.score import Scoring, score
from mnist_dist.score_config import EngineConfig, InputConfig, ScoreJob, ScoreRunConfig, TableConfig, TableFormat
from mnist_dist.scoring.generations import Output
from mnist_dist.scoring.manifest import write_manifest
from mnist_dist.scoring.predictions import CONTRACT, read_predictions
from mnist_dist.scoring.selection import select_images
from mnist_dist.scoring.thresholds import thresholds_csv, with_thresholds
from mnist_dist.session import Session
from mnist_dist.store import lock
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.lock import Lock

NOISE = re.compile(r"oneDNN|cuda|absl|I0000|WARNING|INFO|pid=|Usage stats|Warning", re.IGNORECASE)


class Proxy(ThreadingHTTPServer):
    """Stands before an S3 server, and answers in its place when it is told to.

    Attributes:
        answer: gives status and error code instead of the server's answer, or None; asked at each request.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = endpoint.removeprefix("http://")
        self.answer: Callable[[], tuple[int, str] | None] = lambda: None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        assert isinstance(self.server, Proxy)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        instead = self.server.answer()
        if instead is not None:
            status, code = instead
            self._reply(status, {}, f"<Error><Code>{code}</Code><Message>by the test</Message></Error>".encode())
            return
        with contextlib.closing(HTTPConnection(self.server.behind)) as behind:
            behind.request(self.command, self.path, body, dict(self.headers.items()))
            reply = behind.getresponse()
            self._reply(reply.status, dict(reply.headers.items()), reply.read())

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 (the names that http.server calls)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def s3_of_workers(s3_server: str) -> Iterator[Proxy]:
    """The S3 server as the workers see it, which can fail."""
    with Proxy(s3_server) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()


@pytest.fixture(scope="module", autouse=True)
def _ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """One Ray for the module; where there is an S3 server, its workers inherit the way to it."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:
            with contextlib.suppress(pytest.skip.Exception):
                port = request.getfixturevalue("s3_of_workers").server_address[1]
                environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            stack.enter_context(private_ray(num_cpus=4))
        yield


def make_bundle(path: Path, *, seed: int) -> Path:
    images = [noise(number, width=14, height=12) for number in range(100)]
    return write_spread_bundle(path, images=images, seed=seed)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", seed=1)


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("other_bundle") / "bundle", seed=2)


def noise(seed: int, *, width: int = 20, height: int = 16) -> Image.Image:
    """A few squares of random colours, which no resizing averages out."""
    squares = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST)


def encoded(seed: int, kind: str = "png") -> bytes:
    data = io.BytesIO()
    noise(seed).save(data, kind)
    return data.getvalue()


BROKEN = {"empty.png": "empty", "cut.jpg": "truncated", "text.jpg": "unsupported", "gone.png": "missing"}


def write_images(folder: Path, *, good: int = 12) -> Path:
    """Good images of several sizes, and the broken ones."""
    (folder / "deep").mkdir(parents=True)
    for number in range(good):
        image = noise(number, width=20 + number, height=16 + 2 * number)
        image.save(folder / ("deep" if number % 3 else "") / f"{number:02d}.{('png', 'jpg')[number % 2]}")
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    noise(good, width=31, height=17).save(folder / "turned.jpg", exif=turned)
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes(encoded(98, "jpeg")[:-200])
    (folder / "text.jpg").write_text("no image at all, whatever its name says")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos") / "photos")


def job_of(
    bundle: Path | str, output: Path | str, *inputs: Path | str, run: dict[str, Any] | None = None, **fields: Any
) -> ScoreJob:
    """A job with shards of 5 images that allows any number of bad ones, unless it is told otherwise."""
    names = ("carry", "all_files", "include", "exclude", "limit", "sample")
    of_input = {name: fields.pop(name) for name in names if name in fields}
    return ScoreJob(
        bundle=str(bundle),
        output=str(output),
        inputs=InputConfig(input=tuple(map(str, inputs)), **of_input),
        run=ScoreRunConfig(**{"max_bad_fraction": 1.0, **(run or {})}),
        **{"shard_size": 5, **fields},
    )


def rows_of(output: Path | str) -> dict[str, dict[str, Any]]:
    """The rows by uri; there are no two of one."""
    rows = read_predictions(str(output)).to_pylist()
    by_uri = {row["uri"]: row for row in rows}
    assert len(by_uri) == len(rows)
    return by_uri


def without_time(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows but for what may differ: the time, and the last digits of numbers."""
    return {
        uri: {name: rounded(value) for name, value in row.items() if name != "scored_at"} for uri, row in rows.items()
    }


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def assert_predicted(row: dict[str, Any], image: Any, bundle: Bundle) -> None:
    """The row says what the bundle says of the single image."""
    expected = bundle.predict(image)
    assert row["status"] == "ok"
    assert row["error"] is None
    assert row["predicted_class"] == expected.predicted_class == CLASSES[row["predicted_index"]]
    assert row["predicted_index"] == expected.predicted_index
    assert row["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
    assert row["probabilities"] == pytest.approx(expected.probabilities.tolist(), abs=1e-5)


def names_in(folder: Path) -> list[str]:
    """The files of an output, without those of its lock, which each job changes."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("_work/lock/"))


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A finished job."""

    job: ScoreJob
    result: dict[str, Any]
    lines: list[str]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, bundle: Path, photos: Path) -> Scored:
    job, console = job_of(bundle, tmp_path_factory.mktemp("scored") / "table", photos), Recorder()
    return Scored(job, score(job, console=console), console.lines)


@pytest.fixture
def table(scored: Scored, tmp_path: Path) -> ScoreJob:
    """The finished job, with a copy of its table that a test may spoil."""
    shutil.copytree(scored.job.output, tmp_path / "table")
    return replace(scored.job, output=str(tmp_path / "table"))


def test_the_table_has_the_columns_of_the_contract_and_one_row_for_each_image(scored: Scored, photos: Path) -> None:
    assert read_predictions(scored.job.output).schema.equals(CONTRACT)
    rows = rows_of(scored.job.output)
    assert set(rows) == {str(path) for path in photos.rglob("*.*")}
    assert len(rows) == scored.result["images"] == 17
    assert {row["model_id"] for row in rows.values()} == {load_bundle(scored.job.bundle).info.model_id}
    assert all(datetime.now(UTC) - row["scored_at"] < timedelta(hours=1) for row in rows.values())


def test_the_predictions_are_those_of_single_images(scored: Scored, photos: Path) -> None:
    bundle, rows = load_bundle(scored.job.bundle), rows_of(scored.job.output)
    good = [path for path in photos.rglob("*.*") if path.name not in BROKEN]
    for path in good:
        assert_predicted(rows[str(path)], path, bundle)
    assert len({rows[str(path)]["predicted_class"] for path in good}) > 1


def test_an_onnx_bundle_is_scored_with_embeddings(tmp_path: Path, photos: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle", batch_size=4)
    job = job_of(bundle.path, tmp_path / "table", photos, table=TableConfig(embeddings=True))
    assert score(job, console=Recorder())["ok"] == 13
    rows = rows_of(job.output)
    for path in (path for path in photos.rglob("*.*") if path.name not in BROKEN):
        row, expected = rows[str(path)], bundle.predict(path)
        assert (row["status"], row["predicted_class"]) == ("ok", expected.predicted_class)
        assert row["probabilities"] == pytest.approx(expected.probabilities.tolist(), abs=1e-5)
        assert len(row["embedding"]) == bundle.num_features
    assert len({row["predicted_class"] for row in rows.values()}) > 2
    made = json.loads(newest_summary(job).read_text())
    assert (made["engine"], made["described"]["class_names"]) == ("onnx", list(bundle.info.class_names))
    assert {"onnxruntime", "pyarrow"} <= made["described"]["versions"].keys()
    assert score(job, console=Recorder())["skipped"] == 17  # the same command
    with pytest.raises(ResumeConflict, match="engine: 'openvino' now, 'onnx' in the run"):
        score(replace(job, engine=EngineConfig(engine="openvino")), console=Recorder())


def test_a_backbone_without_classes_is_not_scored(tmp_path: Path, photos: Path) -> None:
    backbone = small_bundle(tmp_path / "bundle", names=())
    with pytest.raises(ConfigError, match=r"features and no classes; train a head on it: mnist-dist train") as error:
        score(job_of(backbone.path, tmp_path / "table", photos), console=Recorder())
    assert error.value.exit_code == 2
    assert not (tmp_path / "table").exists()


def test_size_etag_width_and_height_are_of_the_original(scored: Scored, photos: Path) -> None:
    rows = rows_of(scored.job.output)
    for path in photos.rglob("*.*"):
        row = rows[str(path)]
        if path.name in BROKEN:
            assert (row["width"], row["height"]) == (None, None)
        else:
            with Image.open(path) as image:
                size = image.size[::-1] if path.name == "turned.jpg" else image.size
            assert (row["width"], row["height"]) == size
        if path.exists():
            assert row["size_bytes"] == path.stat().st_size
            assert row["etag"] == f"{path.stat().st_mtime_ns}-{path.stat().st_size}"
        else:
            assert (row["size_bytes"], row["etag"]) == (None, None)


@pytest.mark.parametrize(("name", "status"), BROKEN.items())
def test_a_broken_image_is_a_row_that_says_why(scored: Scored, photos: Path, name: str, status: str) -> None:
    row = rows_of(scored.job.output)[str(photos / name)]
    assert row["status"] == status
    assert row["error"]
    assert "\n" not in row["error"]
    empty = ("predicted_index", "predicted_class", "confidence", "probabilities")
    assert {row[name] for name in empty} == {None}
    assert any(name in line and line.startswith(f"  {status}: ") for line in scored.lines)


def test_the_result_and_the_summary_count_the_rows(scored: Scored) -> None:
    result = scored.result
    assert {name: result[name] for name in ("images", "ok", "errors", "skipped")} == {
        "images": 17,
        "ok": 13,
        "errors": 4,  # also the text that calls itself .jpg
        "skipped": 0,
    }
    assert result["output"] == scored.job.output
    assert result["images_per_s"] > 0
    summary = json.loads((Path(scored.job.output) / "_summary.json").read_text())
    assert summary["statuses"] == result["statuses"]
    assert sum(result["statuses"].values()) == 17
    assert summary["settings"]["inputs"]["input"] == list(scored.job.inputs.input)
    assert {"keras", "tensorflow", "pyarrow"} <= summary["described"]["versions"].keys()


def test_any_reader_of_parquet_finds_the_table(scored: Scored) -> None:
    assert names_in(Path(scored.job.output)) == [
        "_SUCCESS",
        "_summary.json",
        "_tables/000001/manifest.parquet",
        "_tables/000001/mark.json",
        "_tables/000001/summary.json",
        "table/part-000001-00000.parquet",
    ]
    assert pq.read_table(f"{scored.job.output}/table").num_rows == 17
    assert ray.data.read_parquet(f"{scored.job.output}/table").count() == 17
    assert json.loads((Path(scored.job.output) / "_SUCCESS").read_text())["rows"] == 17
    listed = pq.read_table(f"{scored.job.output}/_tables/000001/manifest.parquet")
    assert listed.column_names == ["uri", "size_bytes", "etag", "status", "error", "other_file"]
    assert len(listed) == 17


@pytest.mark.slow
def test_top_k_embeddings_columns_and_carried_columns(tmp_path: Path, bundle: Path, photos: Path) -> None:
    paths = [photos / "00.png", photos / "empty.png", photos / "deep" / "01.jpg"]
    manifest = pa.table({"label": ["x", "y", "z"], "uri": [str(path) for path in paths], "fold": [3, 1, 2]})
    pq.write_table(manifest, tmp_path / "list.parquet")
    wanted = TableConfig(columns=("confidence,width", "label"), top_k=3, wide=True, embeddings=True)
    job = job_of(bundle, tmp_path / "table", tmp_path / "list.parquet", carry=("label", "fold"), table=wanted)
    score(replace(job, max_rows_per_file=2), console=Recorder())
    assert [len(pq.read_table(path)) for path in sorted((tmp_path / "table/table").iterdir())] == [2, 1]
    wide = [f"probability_{name}" for name in CLASSES]
    assert read_predictions(tmp_path / "table").column_names == [
        *("uri", "status", "confidence", "width"),
        *wide,
        *("top_k_classes", "top_k_confidences", "embedding", "label", "fold"),
    ]
    rows = rows_of(tmp_path / "table")
    assert [(rows[str(path)]["label"], rows[str(path)]["fold"]) for path in paths] == [("x", 3), ("y", 1), ("z", 2)]
    row, expected = rows[str(paths[0])], load_bundle(bundle).predict(paths[0])
    order = np.argsort(-expected.probabilities)[:3]
    assert row["top_k_classes"] == [CLASSES[index] for index in order]
    assert row["top_k_confidences"] == pytest.approx(expected.probabilities[order].tolist(), abs=1e-5)
    assert row["confidence"] == row["top_k_confidences"][0]
    assert [row[name] for name in wide] == pytest.approx(expected.probabilities.tolist(), abs=1e-5)
    assert len(row["embedding"]) == len(rows[str(paths[2])]["embedding"]) > 1
    assert rows[str(paths[1])]["embedding"] is rows[str(paths[1])]["top_k_classes"] is None
    assert {rows[str(paths[1])][name] for name in wide} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("embedding_type", [pytest.param("float32", marks=pytest.mark.chaos), "float16"])
def test_an_increment_joins_a_table_that_held_no_embedding_yet(
    tmp_path: Path, bundle: Path, photos: Path, embedding_type: FeatureType
) -> None:
    """The first run has no usable image: the number of features then comes from the bundle."""
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(photos / "empty.png", images)
    table = TableConfig(columns=("uri",), wide=True, embeddings=True, embedding_type=embedding_type)
    job = job_of(bundle, tmp_path / "table", images, table=table)
    job = replace(job, run=replace(job.run, max_bad_fraction=1.0))
    with pytest.raises(TooManyBadImages, match=r"none of 1 rows is ok \(1 empty\), such as .*empty\.png \(empty\); "):
        score(job, console=Recorder())
    schema = read_predictions(job.output).schema
    assert schema.field("embedding").type == pa.list_(
        pa.type_for_alias(embedding_type), load_bundle(bundle).num_features
    )
    shutil.copy(photos / "00.png", images)
    assert score(replace(job, mode="incremental"), console=Recorder())["ok"] == 1
    rows = read_predictions(job.output)
    assert rows.schema.equals(schema)
    assert sorted(vector is None for vector in rows["embedding"].to_pylist()) == [False, True]
    other = replace(table, embedding_type="float16" if embedding_type == "float32" else "float32")
    with pytest.raises(ResumeConflict, match=r"table.embedding_type: 'float\d\d' now, 'float\d\d' in the run"):
        score(replace(job, mode="incremental", table=other), console=Recorder())


@pytest.mark.parametrize("embedding_type", ["float32", "float16"])
def test_ray_data_reads_embeddings(tmp_path: Path, embedding_type: FeatureType) -> None:
    table = TableConfig(columns=("uri",), wide=True, embeddings=True, embedding_type=embedding_type)
    embeddings: npt.NDArray[np.float32] = np.array([[0.5, -2, 3], [0, 0, 0]], np.float32)
    rows = scored_rows(["a", "b"], one_hot([1, 0], 2), "xy", status=["ok", "empty"], table=table, embeddings=embeddings)
    output = write_scored(tmp_path, rows)
    read = ray.data.read_parquet(f"{output}/table").take_all()
    assert [row["embedding"] for row in read] == [[0.5, -2, 3], None]
    assert [row["probability_y"] for row in read] == [pytest.approx(0.8), None]


def write_archives(folder: Path) -> dict[str, dict[str, bytes]]:
    """A tar, a compressed tar and a zip, each with two good images and a broken one."""
    folder.mkdir()
    content = {
        archive: {f"in/{first}.png": encoded(first), f"{first + 1}.jpg": encoded(first + 1, "jpeg"), "bad.png": b"no"}
        for archive, first in (("a.tar", 40), ("b.tgz", 50), ("c.zip", 60))
    }
    for archive, members in content.items():
        if archive.endswith(".zip"):
            with zipfile.ZipFile(folder / archive, "w", zipfile.ZIP_DEFLATED) as out:
                for name, data in members.items():
                    out.writestr(name, data)
            continue
        with tarfile.open(folder / archive, "w:gz" if archive.endswith("gz") else "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return content


@pytest.mark.slow
def test_s3_archives_and_files_in_any_mixture_into_a_table_on_s3(
    tmp_path: Path, bundle: Path, s3: str, s3_server: str
) -> None:
    content = write_archives(tmp_path / "archives")
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=s3_server)
    for number in range(3):
        client.put_object(Bucket=bucket, Key=f"{prefix}/in/{number}.png", Body=encoded(number))
    client.put_object(Bucket=bucket, Key=f"{prefix}/in/empty.png", Body=b"")
    client.upload_file(str(tmp_path / "archives" / "c.zip"), bucket, f"{prefix}/in/c.zip")
    (tmp_path / "list.txt").write_text(f"{s3}/in/0.png\n{s3}/absent.png\n{tmp_path}/archives/a.tar!in/40.png\n")
    ANYWHERE.upload_folder(bundle, f"{s3}/bundle", last="bundle.json")
    inputs = (f"{s3}/in", f"{tmp_path}/archives/*.t*", tmp_path / "list.txt")
    job = replace(job_of(bundle, f"{s3}/table", *inputs), bundle=f"{s3}/bundle")

    result = score(job, console=Recorder())

    rows, opened = rows_of(f"{s3}/table"), load_bundle(bundle)
    assert result["images"] == len(rows) == 4 + 3 + 6 + 1
    for number in range(3):
        assert_predicted(rows[f"{s3}/in/{number}.png"], np.asarray(noise(number)), opened)
    assert rows[f"{s3}/in/empty.png"]["status"] == "empty"
    assert rows[f"{s3}/absent.png"]["status"] == "missing"
    for archive, members in content.items():
        place = f"{s3}/in/{archive}" if archive == "c.zip" else f"{tmp_path}/archives/{archive}"
        for name, data in members.items():
            row = rows[f"{place}!{name}"]
            assert row["size_bytes"] == len(data)
            assert row["etag"] == ANYWHERE.entry_of(place).etag
            if data == b"no":
                assert row["status"] == "unsupported"
            else:
                (tmp_path / "member").write_bytes(data)
                assert_predicted(row, tmp_path / "member", opened)
    assert ANYWHERE.exists(f"{s3}/table/_SUCCESS")
    assert all("/_work/lock/" in entry.uri for entry in ANYWHERE.list_entries(f"{s3}/table/_work"))
    again = score(job, console=Recorder())
    assert (again["images"], again["skipped"]) == (14, 14)


@pytest.mark.slow
def test_images_decoded_in_tasks_give_the_same_rows(tmp_path: Path, scored: Scored) -> None:
    job = replace(scored.job, output=str(tmp_path / "table"), shard_size=4)
    console = Recorder()
    result = score(replace(job, run=replace(job.run, decode="tasks")), console=console)
    assert any("decoded in CPU tasks" in line and "in 5 shards" in line for line in console.lines)
    assert without_time(rows_of(tmp_path / "table")) == without_time(rows_of(scored.job.output))
    assert result["statuses"] == scored.result["statuses"]


# --- less than everything --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_limit_takes_the_first_images(tmp_path: Path, bundle: Path, photos: Path, scored: Scored) -> None:
    assert score(job_of(bundle, tmp_path / "table", photos, limit=3), console=Recorder())["images"] == 3
    uris = read_predictions(scored.job.output, columns=["uri"])["uri"].to_pylist()
    assert read_predictions(tmp_path / "table", columns=["uri"])["uri"].to_pylist() == uris[:3]


@pytest.mark.slow
def test_a_sample_is_some_of_the_images(tmp_path: Path, bundle: Path, photos: Path, scored: Scored) -> None:
    assert score(job_of(bundle, tmp_path / "table", photos, sample=4), console=Recorder())["images"] == 4
    everything = without_time(rows_of(scored.job.output))
    sample = without_time(rows_of(tmp_path / "table"))
    assert sample == {uri: everything[uri] for uri in sample}


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path, bundle: Path, photos: Path) -> None:
    console = Recorder()
    job = job_of(bundle, tmp_path / "table", photos, sample=5, run={"dry_run": True})
    result = score(job, console=console)
    assert result["images"] == 5
    assert {"output", "ok", "errors", "skipped", "images_per_s", "seconds"} < set(result)
    assert any(line.startswith("found 5 images") for line in console.lines)
    assert not list(tmp_path.iterdir())


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_finished_table_is_returned_at_once(table: ScoreJob, scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_dist.on_ray.scoring.score.connected", None)  # Ray does not start
    before = names_in(Path(table.output))
    result = score(table, console=Recorder())
    assert (result["images"], result["skipped"], result["images_per_s"]) == (17, 17, None)
    assert result["statuses"] == scored.result["statuses"]
    assert names_in(Path(table.output)) == before


def test_a_table_made_by_keras_keeps_its_backend(table: ScoreJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    for mode in ("continue", "incremental"):
        with pytest.raises(ResumeConflict, match="KERAS_BACKEND: 'jax' now, 'tensorflow' in the run"):
            score(replace(table, mode=mode), console=Recorder())
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    assert score(table, console=Recorder())["skipped"] == 17


def test_a_table_is_judged_anew_without_scoring(table: ScoreJob) -> None:
    strict = replace(table, run=replace(table.run, max_bad_fraction=0.0))
    with pytest.raises(
        TooManyBadImages,
        match=r"4 of 17 rows are bad \(13 ok, 1 missing, .*\), such as /.*photos/\S+ \(\w+: .*\); --max-bad-fraction "
        r"allows 0\.00%; .*--retry-failed.*marked _FAILED",
    ) as caught:
        score(strict, console=Recorder())
    assert caught.value.result["errors"] == 4
    assert "_SUCCESS" not in names_in(Path(table.output))
    assert len(rows_of(table.output)) == 17
    for again in (table, replace(table, mode="incremental")):
        with pytest.raises(TooManyBadImages, match=r"allows 0\.00%"):
            score(strict, console=Recorder())
        assert score(again, console=Recorder())["skipped"] == 17
        assert "_SUCCESS" in names_in(Path(table.output))
        assert "_FAILED" not in names_in(Path(table.output))


def test_as_many_bad_images_as_are_allowed_are_not_too_many(table: ScoreJob) -> None:
    assert score(replace(table, run=replace(table.run, max_bad_fraction=4 / 17)), console=Recorder())["errors"] == 4


def test_a_table_without_a_row_that_is_ok_is_failed_however_many_may_be_bad(table: ScoreJob) -> None:
    path = newest_summary(table)
    summary = json.loads(path.read_text())
    for statuses, example in (({"other_file": 16, "missing": 1}, "missing"), ({"other_file": 17}, "other_file")):
        summary["statuses"] = statuses
        summary["examples"] = {name: [{"uri": f"/{name}.x", "error": "it is so"}] for name in reversed(statuses)}
        path.write_text(json.dumps(summary))
        with pytest.raises(
            TooManyBadImages,
            match=rf"^none of 17 rows is ok \(.*16 other_file.*\), such as /{example}\.x \({example}: it is so\); .*"
            if len(statuses) > 1
            else rf"^none of 17 rows is ok \(17 other_file\), such as /{example}\.x .*none claims to be an image",
        ):
            score(table, console=Recorder())
        path = newest_summary(table)
    assert "_SUCCESS" not in names_in(Path(table.output))
    assert "_FAILED" in names_in(Path(table.output))


def test_other_settings_are_refused_with_the_difference(table: ScoreJob, other_bundle: Path, photos: Path) -> None:
    before = without_time(rows_of(table.output))
    with pytest.raises(ResumeConflict, match=r"model_id: '\w+' now, '\w+' in the run"):
        score(replace(table, bundle=str(other_bundle)), console=Recorder())
    with pytest.raises(ResumeConflict, match=r"table.top_k: 2 now, 0 in the run"):
        score(replace(table, table=TableConfig(top_k=2), mode="incremental"), console=Recorder())
    with pytest.raises(ResumeConflict, match=r"tta.views: \['flip'\] now, \[\] in the run"):
        score(replace(table, engine=EngineConfig(tta=("flip",))), console=Recorder())
    narrower = replace(table, inputs=InputConfig(input=(str(photos / "deep"),)))
    with pytest.raises(ResumeConflict, match=r"inputs.input: \['.*deep'\] now"):
        score(narrower, console=Recorder())
    assert without_time(rows_of(table.output)) == before


def test_rows_are_the_means_of_the_views(table: ScoreJob, bundle: Path, photos: Path, tmp_path: Path) -> None:
    job = replace(table, output=str(tmp_path / "views"), engine=EngineConfig(engine="keras", tta=("flip", "shift")))
    console = Recorder()
    score(job, console=console)
    assert "test-time augmentation: 10 views of each image, 10 times the work" in console.lines

    rows, opened = rows_of(job.output), load_bundle(str(bundle))
    for path in (path for path in photos.rglob("*.*") if path.name not in BROKEN):
        pixels = decode_image(path.read_bytes(), opened.info.spec).pixels[None]
        expected = np.mean([opened.model(view(pixels)) for view in views_of(("flip", "shift"))], axis=(0, 1))
        np.testing.assert_allclose(rows[str(path)]["probabilities"], expected, atol=1e-5)


@pytest.fixture(scope="module")
def multi_label_bundle(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """The bundle, as if each class had a probability of its own."""
    path = tmp_path_factory.mktemp("multi_label") / "bundle"
    shutil.copytree(bundle, path)
    info = json.loads((path / "bundle.json").read_text())
    (path / "bundle.json").write_text(json.dumps({**info, "multi_label": True}))
    return path


def test_a_multi_label_table_holds_the_classes_that_reach_their_thresholds(
    tmp_path: Path, multi_label_bundle: Path, photos: Path
) -> None:
    thresholds = dict(zip(CLASSES, (0.001, 0.6, 0.002, 0.004, 0.5), strict=True))
    file = tmp_path / "thresholds.json"
    file.write_text(json.dumps(thresholds))
    table = TableConfig(threshold=str(file))
    job = job_of(multi_label_bundle, tmp_path / "table", photos / "deep", photos / "empty.png", table=table)
    score(job, console=Recorder())
    rows = rows_of(job.output).values()
    assert read_predictions(job.output).column_names == [*CONTRACT.names, "predicted_classes", "confidences"]
    reached = 0
    for row in rows:
        if row["status"] != "ok":
            assert row["predicted_classes"] is row["confidences"] is None
            continue
        by_class = dict(zip(CLASSES, row["probabilities"], strict=True))
        expected = [name for name in CLASSES if by_class[name] >= np.float32(thresholds[name])]
        assert row["predicted_classes"] == sorted(expected, key=lambda name: -by_class[name])
        assert row["confidences"] == [by_class[name] for name in row["predicted_classes"]]
        reached += len(expected)
    assert reached > 0
    described = pq.read_schema(next(Path(job.output, "table").iterdir())).metadata[b"mnist_dist"]
    assert json.loads(described)["multi_label"] is True
    assert json.loads(described)["thresholds"] == thresholds
    assert json.loads((Path(job.output) / "_summary.json").read_text())["settings"]["table"]["thresholds"] == thresholds


def test_lists_of_labels_are_carried_and_their_best_thresholds_are_scored_with(
    tmp_path: Path, multi_label_bundle: Path, photos: Path
) -> None:
    paths = [photos / "00.png", photos / "empty.png", photos / "deep" / "01.jpg"]
    bundle = load_bundle(multi_label_bundle)
    known: list[list[int]] = [
        bundle.predict(path).probabilities.argsort()[-2:].tolist() for path in (paths[0], paths[2])
    ]
    labels = [[CLASSES[code] for code in codes] for codes in (known[0], [], known[1])]
    listed = pa.table({"uri": list(map(str, paths)), "label": pa.array(labels, pa.list_(pa.string()))})
    pq.write_table(listed, tmp_path / "list.parquet")
    job = job_of(multi_label_bundle, tmp_path / "first", tmp_path / "list.parquet", carry=("label",))
    score(job, console=Recorder())
    found = evaluate(EvaluateJob(predictions=job.output), console=Recorder())
    again = replace(job, output=str(tmp_path / "again"), table=TableConfig(threshold=found["thresholds"]))
    score(again, console=Recorder())
    better = evaluate(EvaluateJob(predictions=again.output), console=Recorder())
    assert (better["images"], found["mean_average_precision"]) == (3, better["mean_average_precision"])
    assert found["macro_f1"] < better["macro_f1"]
    assert [rows_of(again.output)[str(path)]["label"] for path in paths] == labels


def test_a_file_of_thresholds_that_changes_is_another_job(
    tmp_path: Path, multi_label_bundle: Path, photos: Path
) -> None:
    file = tmp_path / "thresholds.csv"
    file.write_bytes(thresholds_csv(dict.fromkeys(CLASSES, 0.25)))
    job = job_of(multi_label_bundle, tmp_path / "table", photos / "deep", table=TableConfig(threshold=str(file)))
    images = score(job, console=Recorder())["images"]
    same = replace(job, table=TableConfig(threshold=0.25))
    assert score(same, console=Recorder())["skipped"] == images
    file.write_bytes(thresholds_csv(dict.fromkeys(CLASSES, 0.25) | {"bee": 0.75}))
    for mode in ("continue", "incremental"):
        with pytest.raises(
            ResumeConflict, match=r"other settings .*:\n  table\.thresholds\.bee: 0\.75 now, 0\.25 in the"
        ):
            score(replace(job, mode=mode), console=Recorder())


def test_a_threshold_of_an_unfinished_job_is_frozen_with_it(
    tmp_path: Path, multi_label_bundle: Path, photos: Path
) -> None:
    job = job_of(multi_label_bundle, tmp_path / "table", photos / "deep", table=TableConfig(threshold=0.25))
    output, info = Output(job.output), load_bundle(multi_label_bundle).info
    plan = replace(plan_of(info.model_id), settings=with_thresholds(job, info).settings(), keep_old=False)
    found = select_images(job, output, before=None).table
    output.new_generation(plan, fence=1).begin(lambda uri: write_manifest(uri, found, shard_size=5))
    with pytest.raises(ResumeConflict, match=r"table\.thresholds\.ant: 0\.5 now, 0\.25 in the run"):
        score(replace(job, table=TableConfig()), console=Recorder())
    assert score(job, console=Recorder())["images"] == len(found)


def test_a_threshold_needs_a_multi_label_bundle(tmp_path: Path, bundle: Path, photos: Path) -> None:
    job = job_of(bundle, tmp_path / "table", photos, table=TableConfig(threshold=0.3))
    for run in (ScoreRunConfig(), ScoreRunConfig(dry_run=True)):
        with pytest.raises(ConfigError, match=r"threshold needs a multi-label model; .*Received: threshold=0\.3"):
            score(replace(job, run=run), console=Recorder())
    assert not (tmp_path / "table").exists()


def imported_bundle(path: Path, bundle: Path, **known: Any) -> Path:
    """A copy of a bundle whose images are fitted exactly, as those of an imported model."""
    shutil.copytree(bundle, path)
    info = json.loads((path / "bundle.json").read_text())
    fitting = {"resize": "shortest-edge", "resize_px": 15, "resampling": "pillow", "quality": "exact"}
    imported = {"source": "m.onnx", "kind": "onnx", "scale": [1.0], "offset": [0.0], "bgr": False, "activation": "none"}
    info |= {"spec": {**info["spec"], **fitting}, "imported": {**imported, **known}}
    (path / "bundle.json").write_text(json.dumps(info))
    return path


def test_images_are_fitted_as_the_bundle_says_and_decoded_as_the_job_says(tmp_path: Path, bundle: Path) -> None:
    imported = imported_bundle(tmp_path / "bundle", bundle, fast_agreement=0.9931, fast_images=500)
    (tmp_path / "images").mkdir()
    photo = noise(1, width=200, height=150)
    photo.save(tmp_path / "images" / "a.jpg", quality=95)
    job, shown = job_of(imported, tmp_path / "table", tmp_path / "images"), Recorder()
    score(job, console=shown)
    (row,) = rows_of(job.output).values()
    decoded = Image.open(tmp_path / "images" / "a.jpg").resize((20, 15), Image.Resampling.BILINEAR)
    fitted = np.asarray(decoded.crop((3, 2, 17, 14)))
    expected = np.asarray(load_bundle(str(bundle)).model(fitted[None]))[0]
    assert row["probabilities"] == pytest.approx(expected, abs=1e-4)
    assert not any("fast decoding" in line for line in shown.lines)
    metadata = read_predictions(job.output).schema.metadata[b"mnist_dist"]
    assert json.loads(metadata)["spec"]["quality"] == "exact"

    fast = replace(job, decoding=DecodeConfig(decode_quality="fast"))
    for asked in (fast, replace(fast, retry_failed=True)):
        with pytest.raises(ResumeConflict, match=r"spec.quality: 'fast' now, 'exact' in the run"):
            score(asked, console=Recorder())
    score(replace(fast, output=str(tmp_path / "fast")), console=shown)
    assert "fast decoding: same top class for 99.31% of 500 images" in shown.lines
    (other,) = rows_of(tmp_path / "fast").values()
    assert other["probabilities"] != row["probabilities"]


def newest_summary(table: ScoreJob) -> Path:
    """The summary of the table, of which `_summary.json` is a copy."""
    (path,) = (Path(table.output) / "_tables").glob("*/summary.json")
    return path


def test_a_setting_that_an_older_version_did_not_know_has_its_default(table: ScoreJob) -> None:
    path = newest_summary(table)
    summary = json.loads(path.read_text())
    del summary["settings"]["table"]["top_k"]
    path.write_text(json.dumps(summary))
    assert score(table, console=Recorder())["skipped"] == 17
    with pytest.raises(ResumeConflict, match=r"table.top_k: 2 now, 0 in the run"):
        score(replace(table, table=TableConfig(top_k=2)), console=Recorder())


def test_what_only_may_be_spent_may_differ(table: ScoreJob) -> None:
    run = replace(table.run, actors=2, cpus_per_actor=1.0, batch_size=3, decode="tasks", max_failures=0, verbose=True)
    other = replace(table, run=run, shard_size=2, max_rows_per_file=3)
    assert score(other, console=Recorder())["skipped"] == 17


@pytest.mark.parametrize("content", [None, "{}"])
def test_without_its_summary_a_table_is_read_but_not_resumed(table: ScoreJob, content: str | None) -> None:
    path = newest_summary(table)
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"summary.json, .* is gone or damaged; --mode fresh .*Received: '.*table'"):
        score(table, console=Recorder())
    assert len(rows_of(table.output)) == 17


@pytest.mark.slow
@pytest.mark.parametrize("table_format", [pytest.param("parquet", marks=pytest.mark.chaos), "delta"])
def test_incremental_scores_what_is_new_or_changed_and_keeps_the_rest(
    tmp_path: Path, bundle: Path, table_format: TableFormat
) -> None:
    images, columns = write_images(tmp_path / "images", good=6), TableConfig(table_format=table_format)
    job = replace(job_of(bundle, tmp_path / "table", images, table=columns), mode="incremental")
    score(job, console=Recorder())
    before = rows_of(tmp_path / "table")

    noise(70).save(images / "new.png")
    noise(71).save(images / "00.png")  # another image under the old name
    (images / "deep" / "01.jpg").unlink()
    (images / "nowhere").write_bytes(encoded(72))  # where a link to nowhere led
    result = score(job, console=Recorder())

    after, opened = rows_of(tmp_path / "table"), load_bundle(bundle)
    changed = {str(images / name) for name in ("new.png", "00.png", "gone.png")}
    assert result["skipped"] == len(after) - len(changed) == 9
    assert set(after) == {*before, str(images / "new.png")}
    for uri in changed:
        assert_predicted(after[uri], uri, opened)
    assert {uri: row for uri, row in after.items() if uri not in changed} == {
        uri: row for uri, row in before.items() if uri not in changed
    }
    console = Recorder()
    assert score(job, console=console)["generation"] == 2
    assert any("there is nothing to score" in line for line in console.lines)
    if table_format == "delta":
        found = DeltaTable(str(tmp_path / "table" / "delta"))
        assert {row["uri"]: row for row in found.to_pyarrow_table().to_pylist()} == after
        assert found.version() == 1
        with pytest.raises(ConfigError, match="holds a table of another format; choose another --output"):
            score(replace(job, mode="fresh", table=TableConfig()), console=Recorder())
        fresh = replace(job, mode="fresh", run=replace(job.run, vacuum_older_than=1))
        assert score(fresh, console=Recorder())["skipped"] == 0
        assert DeltaTable(str(tmp_path / "table" / "delta")).version() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table_format", "and_new"),
    [
        ("parquet", False),
        ("delta", True),
        pytest.param("parquet", True, marks=pytest.mark.chaos),
        pytest.param("delta", False, marks=pytest.mark.chaos),
    ],
)
def test_rows_of_images_that_are_gone_are_dropped_if_that_is_asked_for(
    tmp_path: Path, bundle: Path, table_format: TableFormat, and_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, columns = write_images(tmp_path / "images", good=6), TableConfig(table_format=table_format)
    (images / "unnamed").write_bytes(encoded(73))
    noise(74).save(tmp_path / "elsewhere.png")
    everything = (str(images), str(images / "unnamed"), str(tmp_path / "elsewhere.png"))
    job = job_of(bundle, tmp_path / "table", images, table=columns)
    score(replace(job, inputs=replace(job.inputs, input=everything)), console=Recorder())
    before = rows_of(tmp_path / "table")
    (images / "deep" / "01.jpg").unlink()
    (images / "00.png").unlink()
    (tmp_path / "elsewhere.png").unlink()  # not in what is listed
    if and_new:
        noise(75).save(images / "new.png")
    job = replace(job, mode="incremental")
    assert score(job, console=Recorder())["images"] == len(before) + and_new
    dropping = replace(job, drop_missing=True)
    with monkeypatch.context() as patched:
        patched.setattr("mnist_dist.on_ray.scoring.score.commit", raise_outage)
        with pytest.raises(ServiceError):
            score(dropping, console=Recorder())
    with pytest.raises(ResumeConflict, match=r"the unfinished run drops 2 rows .*--drop-missing finishes it"):
        score(job, console=Recorder())
    console = Recorder()
    score(dropping, console=console)
    after = rows_of(tmp_path / "table")
    assert set(before) - set(after) == {str(images / "deep" / "01.jpg"), str(images / "00.png")}
    assert set(after) - set(before) == ({str(images / "new.png")} if and_new else set())
    if table_format == "delta":
        found = DeltaTable(str(tmp_path / "table" / "delta")).to_pyarrow_table().to_pylist()
        assert {row["uri"]: row for row in found} == after
    with pytest.raises(ConfigError, match="drop_missing needs mode incremental"):
        replace(job, mode="fresh", drop_missing=True)


@pytest.mark.slow
def test_the_row_of_a_damaged_archive_goes_when_it_was_mended(tmp_path: Path, bundle: Path) -> None:
    archive = tmp_path / "images" / "a.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as file:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.png")
            data = encoded(number)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    whole = archive.read_bytes()
    archive.write_bytes(whole[:1_100])  # within the second member
    job = job_of(bundle, tmp_path / "table", archive.parent)
    job = replace(job, run=replace(job.run, max_bad_fraction=1.0))
    score(job, console=Recorder())
    assert rows_of(tmp_path / "table")[str(archive)]["status"] == "truncated"
    archive.write_bytes(whole)
    score(replace(job, mode="incremental", drop_missing=True), console=Recorder())
    rows = rows_of(tmp_path / "table")
    assert {uri.rpartition("!")[2]: row["status"] for uri, row in rows.items()} == dict.fromkeys(
        ("0.png", "1.png", "2.png"), "ok"
    )


@pytest.mark.slow
@pytest.mark.parametrize("table_format", [pytest.param("parquet", marks=pytest.mark.chaos), "delta"])
def test_an_increment_that_was_stopped_is_finished_before_the_next_one(
    tmp_path: Path, bundle: Path, table_format: TableFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, columns = write_images(tmp_path / "images", good=6), TableConfig(table_format=table_format)
    job = replace(job_of(bundle, tmp_path / "table", images, table=columns), mode="incremental")
    score(job, console=Recorder())
    noise(70).save(images / "new.png")
    with monkeypatch.context() as patched:
        patched.setattr("mnist_dist.on_ray.scoring.score.commit", raise_outage)
        with pytest.raises(ServiceError):
            score(job, console=Recorder())
    noise(71).save(images / "00.png")  # its row is in the table
    noise(72).save(images / "newer.png")
    result = score(job, console=Recorder())
    rows = rows_of(tmp_path / "table")
    assert result["images"] == len(rows) == 13
    opened = load_bundle(bundle)
    for name in ("new.png", "00.png", "newer.png"):
        assert_predicted(rows[str(images / name)], images / name, opened)
    if table_format == "delta":
        found = DeltaTable(str(tmp_path / "table" / "delta")).to_pyarrow_table().to_pylist()
        assert {row["uri"]: row for row in found} == rows


def raise_outage(*_: object, **__: object) -> Never:
    raise ServiceError("the storage does not answer")


@pytest.mark.slow
def test_other_inputs_are_added_in_mode_incremental(table: ScoreJob, tmp_path: Path) -> None:
    before = rows_of(table.output)
    noise(80).save(tmp_path / "one.png")
    more = replace(table, mode="incremental", inputs=InputConfig(input=(str(tmp_path / "one.png"),)))
    assert score(more, console=Recorder())["images"] == 18
    after = rows_of(table.output)
    assert after.pop(str(tmp_path / "one.png"))["status"] == "ok"
    assert after == before


@pytest.mark.slow
def test_a_table_of_a_time_before_a_column_is_added_to(table: ScoreJob, tmp_path: Path) -> None:
    part = Path(table.output) / "table" / "part-000001-00000.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["etag"]), part)
    before = rows_of(table.output)
    noise(81).save(tmp_path / "one.png")
    inputs = InputConfig(input=(*table.inputs.input, str(tmp_path / "one.png")))
    assert score(replace(table, mode="incremental", inputs=inputs), console=Recorder())["skipped"] == 17
    after = rows_of(table.output)
    assert after.pop(str(tmp_path / "one.png"))["etag"]
    assert after == {uri: {**row, "etag": None} for uri, row in before.items()}


@pytest.mark.slow
def test_fresh_scores_everything_while_the_old_table_is_read(table: ScoreJob, other_bundle: Path) -> None:
    before, during = without_time(rows_of(table.output)), {}
    fresh = replace(table, mode="fresh", bundle=str(other_bundle))
    result = score(fresh, console=Recorder("scoring", lambda: during.update(rows_of(table.output))))
    assert without_time(during) == before
    after, opened = rows_of(table.output), load_bundle(other_bundle)
    assert set(after) == set(before)
    assert {row["model_id"] for row in after.values()} == {result["model_id"]} == {opened.info.model_id}
    for uri, row in after.items():
        if row["status"] == "ok":
            assert_predicted(row, uri, opened)
    assert (result["skipped"], result["generation"]) == (0, 2)
    assert [name for name in names_in(Path(table.output)) if "part" in name] == ["table/part-000002-00000.parquet"]


@pytest.mark.slow
def test_retry_failed_scores_what_a_lower_limit_refused(tmp_path: Path, bundle: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, side in enumerate((28, 28, 1600)):
        Image.new("RGB", (side, side), (number * 40, 0, 0)).save(folder / f"{number}.png")
    limits = DecodeConfig(max_pixels=1_000, decode_memory=2**24)
    job = job_of(bundle, tmp_path / "table", folder, run={"max_bad_fraction": 0.1}, decoding=limits)
    with pytest.raises(TooManyBadImages, match=r"raise the limits that they name, and --retry-failed scores"):
        score(job, console=Recorder())
    for decoding, ok in ((DecodeConfig(decode_memory=2**24), 2), (DecodeConfig(), 3)):
        retry = replace(job, retry_failed=True, decoding=decoding, run=replace(job.run, max_bad_fraction=1.0))
        assert score(retry, console=Recorder())["ok"] == ok


@pytest.mark.slow
def test_retry_failed_scores_what_was_repaired_and_clears_the_mark(tmp_path: Path, bundle: Path) -> None:
    images = write_images(tmp_path / "images", good=6)
    job = job_of(bundle, tmp_path / "table", images, run={"max_bad_fraction": 0.1})
    with pytest.raises(TooManyBadImages, match="4 of 11 rows"):
        score(job, console=Recorder())
    assert (tmp_path / "table" / "_FAILED").exists()
    before = rows_of(tmp_path / "table")

    (images / "cut.jpg").write_bytes(encoded(90, "jpeg"))
    (images / "nowhere").write_bytes(encoded(91))
    (images / "text.jpg").write_bytes(encoded(92, "jpeg"))
    result = score(replace(job, retry_failed=True), console=Recorder())

    assert (result["ok"], result["errors"], result["skipped"]) == (10, 1, 7)
    assert not (tmp_path / "table" / "_FAILED").exists()
    after, opened = rows_of(tmp_path / "table"), load_bundle(bundle)
    for name in ("cut.jpg", "gone.png", "text.jpg"):
        assert_predicted(after.pop(str(images / name)), images / name, opened)
    assert after.pop(str(images / "empty.png"))["status"] == "empty"
    assert after == {uri: row for uri, row in before.items() if uri in after}


PRETENDERS = {
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
    "page.jpg": b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
    "film.jpg": b"RIFF\x24\x10\x00\x00AVI LIST\xc0\x00\x00\x00hdrlavih" + bytes(200),
    "letter.bmp": b"BM 2030-01-02\nDear Sir or Madam, this is a text of some length, and no image at all.\n",
}
"""Files that claim to be images by their names alone."""


@pytest.mark.slow
def test_files_that_only_claim_to_be_images_fail_the_job_until_they_are_images(tmp_path: Path, bundle: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, (name, data) in itertools.product(range(6), PRETENDERS.items()):
        (images / f"{number}-{name}").write_bytes(data)
    job = job_of(bundle, tmp_path / "table", images)
    for again in (job, replace(job, retry_failed=True), replace(job, mode="incremental")):
        with pytest.raises(TooManyBadImages, match=r"none of 24 rows is ok .*, such as .*images/0-") as raised:
            score(again, console=Recorder())
        assert {name: raised.value.result[name] for name in ("images", "ok", "errors")} == {
            "images": 24,
            "ok": 0,
            "errors": 24,
        }
        assert (tmp_path / "table" / "_FAILED").exists()
        assert not (tmp_path / "table" / "_SUCCESS").exists()
    noise(93).save(images / "0-film.jpg")
    result = score(replace(job, retry_failed=True), console=Recorder())
    assert (result["ok"], result["errors"], result["skipped"]) == (1, 23, 0)


@pytest.mark.slow
def test_files_of_other_names_are_rows_that_do_not_count(tmp_path: Path, bundle: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, data in PRETENDERS.items():
        (images / name).with_suffix(".dat").write_bytes(data)
        (images / f"{name}.old").write_bytes(data)
    (images / "empty.txt").touch()
    (images / "image-by-its-bytes").write_bytes(encoded(94))
    (images / "listed.dat").write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text(str(images / "listed.dat"))
    with zipfile.ZipFile(images / "a.zip", "w") as archive:
        archive.writestr("notes.txt", b"BM notes")
        archive.writestr("claims.png", b"BM notes")
    (images / "b.tar").write_bytes(b"no tar at all")
    job = job_of(bundle, tmp_path / "table", images, tmp_path / "list.txt", all_files=True)
    result = score(job, console=Recorder())
    statuses = {uri.removeprefix(f"{images}/"): row["status"] for uri, row in rows_of(tmp_path / "table").items()}
    bad = {"a.zip!claims.png", "b.tar", "listed.dat"}
    assert {name for name, status in statuses.items() if status not in ("ok", "other_file")} == bad
    assert {name for name, status in statuses.items() if status == "ok"} == {"image-by-its-bytes"}
    assert (result["images"], result["ok"], result["errors"]) == (14, 1, 3)
    again = score(replace(job, retry_failed=True), console=Recorder())
    assert (again["skipped"], again["statuses"]) == (11, result["statuses"])


@pytest.mark.slow
def test_an_archive_that_is_whole_again_is_scored_by_retry(tmp_path: Path, bundle: Path) -> None:
    content = write_archives(tmp_path / "images")["a.tar"]
    archive = tmp_path / "images" / "a.tar"
    whole = archive.read_bytes()
    archive.write_bytes(b"not copied yet")
    job = job_of(bundle, tmp_path / "table", archive)
    with pytest.raises(TooManyBadImages, match=r"none of 1 rows is ok .*a\.tar"):
        score(job, console=Recorder())
    archive.write_bytes(whole)
    shard, again = tmp_path / "table" / "_work" / "g000002" / "shard-000000.parquet", replace(job, retry_failed=True)
    with pytest.raises(IsADirectoryError):
        score(again, console=Recorder("scoring", lambda: shard.mkdir()))
    shard.rmdir()
    result = score(again, console=Recorder())
    assert (result["images"], result["ok"], result["errors"]) == (3, 2, 1)
    assert rows_of(tmp_path / "table").keys() == {f"{archive}!{name}" for name in content}


def test_no_engine_is_chosen_before_the_number_of_images_is_known(
    tmp_path: Path, bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, may_end = [], threading.Event()

    class Asked(Exception):
        pass

    def slow(*arguments: Any, **keywords: Any) -> Any:
        may_end.wait()
        return select_images(*arguments, **keywords)

    def asked(*_: Any, images: int, **__: Any) -> Never:
        chosen.append(images)
        raise Asked("the engine is chosen")

    class Waiting(Recorder):
        def progress(self, title: str, *arguments: Any, **keywords: Any) -> Any:
            if title == "listing":  # the job waits for it
                assert not chosen
                may_end.set()
            return super().progress(title, *arguments, **keywords)

    monkeypatch.setattr("mnist_dist.on_ray.scoring.score.LIST_BEFORE_RAY_S", 0.0)
    monkeypatch.setattr("mnist_dist.on_ray.scoring.score.select_images", slow)
    monkeypatch.setattr("mnist_dist.on_ray.scoring.score.job_engine", asked)
    with pytest.raises(Asked, match="the engine"):
        score(job_of(bundle, tmp_path / "table", photos), console=Waiting())
    assert chosen == [17]


@pytest.mark.slow
def test_a_commit_that_was_begun_is_finished_by_whoever_comes_but_is_theirs_only(
    tmp_path: Path, bundle: Path, other_bundle: Path, photos: Path
) -> None:
    job = job_of(bundle, tmp_path / "table", photos)
    in_the_way = tmp_path / "table" / "table" / "part-000001-00000.parquet"
    in_the_way.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        score(job, console=Recorder())
    in_the_way.rmdir()
    with pytest.raises(DataError, match="is not finished: a scoring job is still running, or was stopped"):
        read_predictions(tmp_path / "table")

    with pytest.raises(ResumeConflict, match="model_id"):
        score(replace(job, bundle=str(other_bundle)), console=Recorder())

    result = score(job, console=Recorder())
    assert (result["images"], result["skipped"]) == (17, 17)
    assert {row["model_id"] for row in rows_of(tmp_path / "table").values()} == {load_bundle(bundle).info.model_id}


@pytest.mark.slow
def test_fresh_does_not_go_on_with_an_increment(table: ScoreJob, tmp_path: Path) -> None:
    noise(85).save(tmp_path / "one.png")
    inputs = InputConfig(input=(*table.inputs.input, str(tmp_path / "one.png")))
    shard = Path(table.output) / "_work" / "g000002" / "shard-000000.parquet"
    increment = replace(table, mode="incremental", inputs=inputs)
    with pytest.raises(IsADirectoryError):
        score(increment, console=Recorder("scoring", lambda: shard.mkdir()))
    assert score(replace(increment, mode="fresh"), console=Recorder())["skipped"] == 0


@pytest.mark.slow
def test_a_full_disk_commits_nothing_and_the_same_command_goes_on(
    tmp_path: Path, scored: Scored, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(scored.job, output=str(small_disk / "table"))
    generation = small_disk / "table" / "_work" / "g000001"
    with pytest.raises(ServiceError, match="No space left on device"):
        score(job, console=Recorder("scoring", lambda: fill(small_disk / "filler")))
    assert all(pq.read_metadata(shard).num_rows for shard in generation.glob("shard-*.parquet"))
    assert not list(generation.glob(".*"))
    with pytest.raises(DataError, match="is not finished"):
        read_predictions(small_disk / "table")
    (small_disk / "filler").unlink()
    monkeypatch.setattr(lock, "SILENCE_S", 2.0)  # the lock could not be given back on a full disk
    assert score(job, console=Recorder())["images"] == 17
    assert without_time(rows_of(small_disk / "table")) == without_time(rows_of(scored.job.output))


def put_images(prefix: str, endpoint: str, *, count: int) -> None:
    bucket, _, key = prefix.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=endpoint)
    for number in range(count):
        client.put_object(Bucket=bucket, Key=f"{key}/{number:02d}.png", Body=encoded(number))


@pytest.mark.slow
def test_a_token_that_expires_is_no_row_and_the_same_command_goes_on(
    tmp_path: Path, bundle: Path, s3: str, s3_server: str, s3_of_workers: Proxy
) -> None:
    put_images(f"{s3}/images", s3_server, count=30)
    job = job_of(bundle, tmp_path / "table", f"{s3}/images")
    asked = itertools.count()
    s3_of_workers.answer = lambda: (400, "ExpiredToken") if next(asked) >= 12 else None
    try:
        with pytest.raises(ServiceError, match=r"credentials are not accepted: .*ExpiredToken"):
            score(job, console=Recorder())
    finally:
        s3_of_workers.answer = lambda: None
    done = [pq.read_table(shard) for shard in (tmp_path / "table" / "_work" / "g000001").glob("shard-*.parquet")]
    assert {status for rows in done for status in rows["status"].to_pylist()} <= {"ok"}
    result = score(job, console=Recorder())
    assert (result["ok"], result["skipped"]) == (30, sum(map(len, done)))
    assert {row["status"] for row in rows_of(tmp_path / "table").values()} == {"ok"}


@pytest.mark.slow
def test_a_service_that_stumbles_is_asked_again(bundle: Path, s3: str, s3_server: str, s3_of_workers: Proxy) -> None:
    put_images(f"{s3}/images", s3_server, count=20)
    asked = itertools.count(1)
    s3_of_workers.answer = lambda: (503, "SlowDown") if next(asked) % 4 == 0 else None
    try:
        result = score(job_of(bundle, f"{s3}/table", f"{s3}/images"), console=Recorder())
    finally:
        s3_of_workers.answer = lambda: None
    assert next(asked) > 25
    assert result["ok"] == 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk; runs as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_two_jobs_on_one_output_are_refused(table: ScoreJob) -> None:
    output = Output(table.output)
    with (
        Lock(output.lock_uri, what="it"),
        pytest.raises(Locked, match=rf"working on {table.output}: process {os.getpid()}"),
    ):
        score(table, console=Recorder())
    assert score(table, console=Recorder())["images"] == 17


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"output": "{photos}/table"}, ConfigError, r"outside of the input .*--output .*photos-predictions\. Rec"),
        ({"output": "{photos}"}, ConfigError, r"outside of the input"),
        ({"output": "{photos}/00.png"}, ConfigError, r"outside of the input"),
        ({"output": "{tmp}/file/table"}, StorageError, r"cannot be written: .*Received: '.*file/table'"),
        ({"output": "{tmp}/file"}, StorageError, "cannot be written"),
        ({"output": "ftp://bucket/table"}, StorageError, r"s3://bucket/prefix.*Received: 'ftp://bucket/table'"),
        ({"input": "ftp://bucket/images"}, StorageError, r"Received: 'ftp://bucket/images'"),
        ({"input": "{tmp}/absent"}, DataError, r"no such file, folder or prefix.*Received: '.*absent'"),
        ({"input": "{tmp}/empty"}, DataError, r"empty"),
        ({"input": "{tmp}/names.csv"}, DataError, r"names.csv: there is no column 'uri'; use --uri-column name\. Rec"),
        ({"carry": ("fold",)}, DataError, r"carry must name columns of the lists .*Received: carry=fold"),
        ({"bundle": "{tmp}/absent"}, BundleError, r"the bundle's folder does not exist; .* Received: '.*absent'"),
        ({"bundle": "{tmp}/damaged"}, BundleError, r"not the file that the bundle was written with: expected sha256"),
        pytest.param(  # a manifest may carry such a column: refused when it is listed, and Ray is there
            {"table": TableConfig(columns=("score",))},
            ConfigError,
            r"columns must be among uri, status, .*Received: score",
            marks=pytest.mark.slow,
        ),
        ({"run": {"gpus_per_actor": 1.0}}, ResourceError, r"1 node\(s\), 4 CPUs, 0 GPUs. Received: gpus_per_actor=1"),
        ({"run": {"actors": 5, "cpus_per_actor": 1.0}}, ResourceError, r"1 node\(s\), 4 CPUs, 0 GPUs"),
        (
            {"run": {"decode": "tasks", "cpus_per_actor": 4.0}},
            ResourceError,
            r"needs a whole CPU besides .* 4 CPUs.*decode='tasks'",
        ),
    ],
)
def test_wrong_usage_is_told_before_anything_is_written(
    tmp_path: Path, bundle: Path, photos: Path, fields: dict[str, Any], error: type[ConfigError], message: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.csv").write_text("name,label\nx,y\n")
    shutil.copytree(bundle, tmp_path / "damaged")
    with (tmp_path / "damaged" / "model.keras").open("r+b") as file:
        file.write(b"\0")
    before = names_in(tmp_path)
    named = {"bundle": str(bundle), "output": str(tmp_path / "table"), "input": str(photos)}
    named |= {name: value.format(tmp=tmp_path, photos=photos) for name, value in fields.items() if name in named}
    others = {name: value for name, value in fields.items() if name not in named}
    job = job_of(named["bundle"], named["output"], named["input"], **others)
    with pytest.raises(error, match=message):
        score(job, console=Recorder())
    assert names_in(tmp_path) == before
    assert not (photos / "table").exists()


@pytest.mark.parametrize("place", ["bundle", "input"])  # that of an output SeaweedFS makes, unlike S3 itself
def test_a_bucket_that_is_not_there_is_refused(tmp_path: Path, bundle: Path, photos: Path, s3: str, place: str) -> None:
    places = {"bundle": str(bundle), "input": str(photos), place: "s3://no-such-bucket/there"}
    with pytest.raises(ConfigError, match=r"no such bucket.*Received: 's3://no-such-bucket/there"):
        score(job_of(places["bundle"], tmp_path / "table", places["input"]), console=Recorder())
    assert names_in(tmp_path) == []


# --- the command -----------------------------------------------------------------------------------------------------


def run(*flags: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    return run_command("jobs.score", *flags, **environment)


@pytest.mark.slow
def test_the_command_ends_with_one_line_of_json_and_the_exit_code(
    tmp_path: Path, bundle: Path, photos: Path, scored: Scored
) -> None:
    flags = ["--bundle", str(bundle), "--input", str(photos), "--output", str(tmp_path / "table")]
    code, result, err = run(*flags, "--max-bad-fraction", "0.5")
    assert code == 0, err
    assert {"job", "output", "images", "ok", "errors", "skipped", "images_per_s", "seconds"} <= set(result)
    assert (result["job"], result["images"], result["errors"], result["skipped"]) == ("score", 17, 4, 0)
    assert "pandas.read_parquet(" in err
    assert not NOISE.search(err), NOISE.findall(err)
    assert without_time(rows_of(tmp_path / "table")) == without_time(rows_of(scored.job.output))

    nowhere = {"RAY_ADDRESS": "127.0.0.1:1"}  # whoever asks for a Ray fails
    code, again, err = run(*flags, "--max-bad-fraction", "0.5", **nowhere)
    assert code == 0, err
    assert again == {
        **result,
        "skipped": 17,
        "images_per_s": None,
        "steady_images_per_s": None,
        "seconds": again["seconds"],
    }

    code, failed, err = run(*flags, **nowhere)
    assert code == 1
    assert (failed["job"], failed["images"], failed["errors"]) == ("score", 17, 4)
    assert failed["error_type"] == "TooManyBadImages"
    assert f"error: {failed['error']}" in err

    code, refused, err = run(*flags, "--top-k", "2", **nowhere)
    assert code == 2
    assert refused["job"] == "score"
    assert "table.top_k: 2 now, 0 in the run" in refused["error"]


def test_flags_that_are_missing_are_wrong_usage() -> None:
    code, _, err = run("--output", "x")
    assert code == 2
    assert "--bundle" in err


def test_help_names_every_flag_with_its_default() -> None:
    with Command("jobs.score", "--help") as job:
        assert job.ended()[0] == 0
        shown = job.stdout()
    fields = [name for part in (InputConfig, TableConfig, ScoreRunConfig) for name in fields_of(part)]
    for name in [
        *fields,
        "bundle",
        "output",
        "mode",
        "retry_failed",
        "shard_size",
        "max_rows_per_file",
        "max_pixels",
        "image_timeout_s",
    ]:
        assert f"--{name.replace('_', '-')}" in shown
    assert shown.count("(required)") == 3


def test_shards_that_an_earlier_driver_s_workers_still_put_are_left_alone(tmp_path: Path) -> None:
    generation = Output(str(tmp_path)).new_generation(plan_of(), fence=1)
    generation.begin(lambda uri: write_manifest(uri, manifest_rows(["a.png", "b.png", "c.png"]), shard_size=2))
    for shard in (0, 1):
        ANYWHERE.write_bytes(generation.shard_uri(shard), b"rows")
    scoring = object.__new__(Scoring)
    console = Recorder()
    actors = Actors(count=1, cpus=1, gpus=0, decode_in_tasks=False)
    with Stop(console) as stop:
        scoring.session = Session(console=console, stop=stop)
        scoring._score(generation, EngineChoice(), actors, Resources(by_node=((1, 0),)))
    assert console.lines == []
