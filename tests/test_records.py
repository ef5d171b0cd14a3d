"""records: decoded once, whoever asks, wherever they are stored."""

import hashlib
import io
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnist_dist.config import DataConfig, DecodeConfig
from mnist_dist.data.records import (
    RecordPlan,
    Records,
    bad_records,
    decode_shard,
    fingerprint,
    finish,
    open_records,
    plan_records,
)
from mnist_dist.data.records import _fitted as fitted_array
from mnist_dist.errors import ConfigError, DataError, ServiceError
from mnist_dist.images.pixels import Pixels, resize_pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.sources.source import Source, image_spec, open_source
from mnist_dist.store.anywhere import ANYWHERE

SPEC = ImageSpec(height_px=5, width_px=7, channels=3)
LIMITS = DecodeConfig(max_pixels=1000)
COUNT = 150  # of images: two shards of 64 and one of 22, with the smallest shards


def picture(value: int) -> Pixels:
    return np.random.default_rng(value).integers(0, 256, (5, 7, 3), np.uint8)


def png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for value in range(COUNT):
        path = folder / f"class-{value % 2}" / f"{value:03d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(picture(value)))
    (folder / "class-0" / "004.png").write_bytes(b"")
    (folder / "class-1" / "007.png").write_bytes(png(picture(7))[:60])
    return folder


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path / "runs")


class Planned(NamedTuple):
    plan: RecordPlan
    source: Source

    def decode(self, *shards: int) -> None:
        """Decodes some shards, or all that are missing."""
        for shard in shards or self.plan.cache.missing():
            rows = self.plan.cache.rows_of(shard)
            decode_shard(self.plan, shard, self.source.table.slice(rows.start, rows.stop - rows.start))


def planned(images: Path, root: str, spec: ImageSpec = SPEC) -> Planned:
    source = open_source(DataConfig(data=(str(images),)))
    plan = plan_records(source, spec, storage=root, limits=LIMITS)
    return Planned(replace(plan, cache=replace(plan.cache, min_shard_rows=64)), source)


def decoded(images: Path, root: str, local_dir: Path) -> Records:
    work = planned(images, root)
    work.decode()
    finish(*work)
    return open_records(work.plan, local_dir=local_dir)


def names(uri: str) -> list[str]:
    return [entry.uri.removeprefix(f"{uri}/") for entry in ANYWHERE.list_entries(uri)]


def test_images_are_decoded_in_shards_and_opened_by_row(images: Path, root: str, tmp_path: Path) -> None:
    work = planned(images, root)
    cache = work.plan.cache
    assert not cache.is_finished()
    assert cache.missing() == [0, 1, 2]
    work.decode(1)
    assert cache.missing() == [0, 2]
    work.decode()
    finish(*work)
    assert cache.is_finished()
    assert cache.missing() == []
    assert names(cache.root) == ["index.parquet", "records.json", *(f"shard-00000{shard}.arrow" for shard in range(3))]

    records = open_records(work.plan, local_dir=tmp_path / "node")
    assert records.pixels.shape == (COUNT, 5, 7, 3)
    assert records.index.column_names == ["uri", "label", "split", "status", "error", "digest"]
    assert records.index["uri"].to_pylist() == work.source.table["uri"].to_pylist()
    assert (records.class_names, records.spec) == (("class-0", "class-1"), SPEC)
    for row in (0, 1, 63, 64, 149):
        value = int(records.index["uri"][row].as_py()[-7:-4])
        np.testing.assert_array_equal(records.pixels[row], picture(value))


def test_unreadable_images_are_rows_with_a_reason(images: Path, root: str, tmp_path: Path) -> None:
    records = decoded(images, root, tmp_path / "node")
    bad = bad_records(records.index)
    assert [(uri[-15:], status) for uri, status, _ in bad] == [
        ("class-0/004.png", "empty"),
        ("class-1/007.png", "truncated"),
    ]
    assert all(error for _, _, error in bad)
    row = records.index["uri"].to_pylist().index(bad[0][0])
    assert records.pixels[row].max() == 0
    assert records.index["error"].null_count == COUNT - 2


def test_a_finish_that_was_killed_starts_again(images: Path, tmp_path: Path) -> None:
    work = planned(images, str(tmp_path))
    work.decode()
    (Path(work.plan.cache.root) / "index.parquet").write_bytes(b"half")
    with pytest.raises(DataError, match="no finished records"):
        open_records(work.plan, local_dir=tmp_path)
    finish(*work)
    assert len(open_records(work.plan, local_dir=tmp_path).index) == COUNT


def test_missing_shards_cannot_be_finished(images: Path, root: str) -> None:
    work = planned(images, root)
    work.decode(0)
    with pytest.raises(ServiceError, match=r"2 of 3 shards are missing: \[1, 2\]"):
        finish(*work)
    assert names(work.plan.cache.root) == ["shard-000000.arrow"]


def test_decoding_twice_is_harmless(images: Path, tmp_path: Path) -> None:
    work = planned(images, str(tmp_path))
    work.decode(2)
    shard = Path(work.plan.cache.root) / "shard-000002.arrow"
    before = shard.read_bytes()
    work.decode(2)
    assert shard.read_bytes() == before


def test_a_digest_is_of_shape_and_pixels(images: Path, tmp_path: Path) -> None:
    records = decoded(images, str(tmp_path), tmp_path)
    expected = hashlib.sha256(b"(5, 7, 3)" + records.pixels[9].tobytes()).hexdigest()
    assert records.index["digest"][9].as_py() == expected


def test_arrays_need_no_decoding(root: str, tmp_path: Path) -> None:
    config = DataConfig(limit=70)
    source = open_source(config)
    for size_px, channels in ((32, 1), (6, 3)):
        spec = image_spec(source, backbone_size_px=size_px, scratch_size=False, config=config)
        plan = plan_records(source, replace(spec, channels=channels), storage=root, limits=LIMITS)
        finish(plan, source)
        records = open_records(plan, local_dir=tmp_path / "node")
        assert source.pixels is not None
        assert records.pixels.shape == ((70, 8, 8, 1) if size_px == 32 else (70, 6, 6, 3))
        if size_px == 32:
            np.testing.assert_array_equal(records.pixels[np.arange(70)], source.pixels)
        assert bad_records(records.index) == []


def test_arrays_of_the_right_size_are_fitted_all_the_same() -> None:
    digits = open_source(DataConfig())
    assert digits.pixels is not None
    height, width = digits.pixels.shape[1:3]
    spec = ImageSpec(height_px=height, width_px=width, channels=1, resize="shortest-edge", resize_px=2 * height)
    expected = np.stack([resize_pixels(image, spec) for image in digits.pixels[:9]])
    assert (fitted_array(digits.pixels[:9], spec) == expected).all()
    assert (expected != digits.pixels[:9]).any()
    assert fitted_array(digits.pixels, replace(spec, resize_px=None)) is digits.pixels


def test_the_key_depends_on_all_that_the_pixels_depend_on(images: Path, tmp_path: Path) -> None:
    source = open_source(DataConfig(data=(str(images),)))

    def key(source: Source = source, spec: ImageSpec = SPEC, limits: DecodeConfig = LIMITS) -> str:
        return plan_records(source, spec, storage=str(tmp_path), limits=limits).cache.key

    place = source.table.schema.get_field_index("etag")
    changed = source.table.set_column(place, "etag", [["new", *source.table["etag"].to_pylist()[1:]]])
    keys = [key(), key(spec=replace(SPEC, resize="crop")), key(spec=replace(SPEC, width_px=8))]
    keys += [key(limits=replace(LIMITS, max_pixels=999)), key(limits=replace(LIMITS, image_timeout_s=2.0))]
    keys += [key(replace(source, table=changed)), key(replace(source, table=source.table.slice(1)))]
    digits = open_source(DataConfig())
    assert digits.pixels is not None
    keys += [key(digits), key(replace(digits, pixels=digits.pixels + np.uint8(1)))]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_plan_is_plain_and_crosses_processes(images: Path, tmp_path: Path) -> None:
    plan = planned(images, str(tmp_path)).plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan.cache.root == f"{tmp_path}/_records/{plan.cache.key[:16]}"


@pytest.mark.parametrize(("size_px", "expected"), [(8, 65_536), (28, 14_266), (224, 222), (1000, 64)])
def test_a_shard_is_about_32_mib(images: Path, tmp_path: Path, size_px: int, expected: int) -> None:
    source = open_source(DataConfig(data=(str(images),)))
    spec = ImageSpec(height_px=size_px, width_px=size_px, channels=3)
    assert plan_records(source, spec, storage=str(tmp_path), limits=LIMITS).cache.shard_rows == expected


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def shrink(free_bytes: int) -> None:
        usage = shutil.disk_usage("/")._replace(free=free_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return shrink


def test_pixels_that_do_not_fit_the_disk_are_refused(
    images: Path, tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    needed_bytes = COUNT * 5 * 7 * 3
    small_disk(needed_bytes)
    planned(images, str(tmp_path))
    small_disk(needed_bytes - 1)
    with pytest.raises(ConfigError, match=r"need 1\.57e-05 GB of disk\. Received: 1\.57e-05 GB free"):
        planned(images, str(tmp_path))


def test_pixels_that_do_not_fit_the_node_are_refused(
    images: Path, s3: str, tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    decoded(images, s3, tmp_path / "one")
    small_disk(100)
    with pytest.raises(ConfigError, match=r"the records need [\d.e-]+ GB of disk\. Received: 1e-07 GB free"):
        decoded(images, s3, tmp_path / "two")


def sum_of(plan: RecordPlan, local_dir: Path) -> int:
    return int(open_records(plan, local_dir=local_dir).pixels[np.arange(COUNT)].sum())


def open_and_sum(plan: RecordPlan, local_dir: Path, sums: Any) -> None:
    sums.put(sum_of(plan, local_dir))


@pytest.mark.slow
def test_processes_of_a_node_download_once(images: Path, s3: str, tmp_path: Path) -> None:
    work = planned(images, s3)
    work.decode()
    finish(*work)
    context = multiprocessing.get_context("spawn")
    sums = context.Queue()
    arguments = (work.plan, tmp_path / "node", sums)
    processes = [context.Process(target=open_and_sum, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    results = {sums.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    shard = tmp_path / "node" / "_records" / work.plan.cache.key[:16] / "shard-000000.arrow"
    modified_ns = shard.stat().st_mtime_ns
    assert results == {sum_of(work.plan, tmp_path / "node")}
    assert shard.stat().st_mtime_ns == modified_ns
    assert not list(shard.parent.glob("*.tmp"))


def test_the_fingerprint_is_of_readable_content_and_labels(images: Path, tmp_path: Path) -> None:
    records = decoded(images, str(tmp_path), tmp_path)
    bad_row = records.index["status"].to_pylist().index("empty")
    without_bad = replace(records, index=records.index.filter(np.arange(COUNT) != bad_row))
    expected = fingerprint(records.index, records.class_names)
    assert fingerprint(without_bad.index, without_bad.class_names) == expected
    assert fingerprint(records.index.slice(1), records.class_names) != expected
    assert fingerprint(records.index, ("a", "b")) != expected
    labels = 1 - records.index["label"].to_numpy()
    swapped = replace(records, index=records.index.set_column(1, "label", [labels]))
    assert fingerprint(swapped.index, swapped.class_names) != expected


def test_an_index_of_other_records_is_refused(images: Path, tmp_path: Path) -> None:
    work = planned(images, str(tmp_path))
    work.decode()
    finish(*work)
    index = Path(work.plan.cache.root) / "index.parquet"
    pq.write_table(pq.read_table(index).slice(1), index)
    with pytest.raises(DataError, match=r"index\.parquet needs 150 rows\. Received: 149; delete the folder"):
        open_records(work.plan, local_dir=tmp_path)
