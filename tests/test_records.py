"""records: decoded once, whoever asks, wherever they are stored."""

import hashlib
import io
import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from mnist_dist import storage
from mnist_dist.config import DataConfig
from mnist_dist.data.images import ImageSpec, Pixels
from mnist_dist.data.records import (
    RecordPlan,
    Records,
    bad_records,
    decode_block,
    fingerprint,
    finish,
    finished,
    missing_blocks,
    open_records,
    plan_records,
)
from mnist_dist.data.sources import Source, image_spec, open_source
from mnist_dist.errors import ConfigError, DataError, ServiceError

SPEC = ImageSpec(height_px=5, width_px=7, channels=3)
COUNT = 150  # of images: two blocks of 64 and one of 22, with the smallest block size


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

    def uris(self, block: int) -> list[str]:
        return list(self.source.table["uri"].to_pylist()[self.plan.block_rows(block)])

    def decode(self) -> None:
        for block in missing_blocks(self.plan):
            decode_block(self.plan, block, self.uris(block))


def planned(images: Path, root: str, spec: ImageSpec = SPEC) -> Planned:
    source = open_source(DataConfig(data=str(images)))
    plan = plan_records(source, spec, storage=root, max_pixels=1000)
    return Planned(replace(plan, block_size=64), source)


def decoded(images: Path, root: str, local_dir: Path) -> Records:
    plan = planned(images, root)
    plan.decode()
    finish(*plan)
    return open_records(plan.plan.root, local_dir=local_dir)


def names(uri: str) -> list[str]:
    return [entry.uri.removeprefix(f"{uri}/") for entry in storage.list_entries(uri)]


def test_images_are_decoded_in_blocks_and_opened_as_one_array(images: Path, root: str, tmp_path: Path) -> None:
    work = planned(images, root)
    assert not finished(work.plan)
    assert missing_blocks(work.plan) == [0, 1, 2]
    decode_block(work.plan, 1, work.uris(1))
    assert missing_blocks(work.plan) == [0, 2]
    work.decode()
    finish(*work)
    assert finished(work.plan)
    assert missing_blocks(work.plan) == []

    records = open_records(work.plan.root, local_dir=tmp_path / "node")
    assert isinstance(records.pixels, np.memmap)
    assert records.pixels.shape == (COUNT, 5, 7, 3)
    assert not records.pixels.flags.writeable
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


def test_local_blocks_go_and_remote_ones_stay(images: Path, root: str, tmp_path: Path) -> None:
    work = planned(images, root)
    work.decode()
    finish(*work)
    finish(*work)
    blocks = [f"block-{block:06d}.npz" for block in range(3)]
    expected = [*blocks, "index.parquet"] if storage.is_remote(root) else ["index.parquet", "pixels.npy"]
    assert names(work.plan.root) == [*expected, "records.json"]


def test_a_finish_that_was_killed_starts_again(images: Path, tmp_path: Path) -> None:
    work = planned(images, str(tmp_path))
    work.decode()
    (Path(work.plan.root) / "pixels.npy").write_bytes(b"half")
    with pytest.raises(DataError, match="no finished records"):
        open_records(work.plan.root, local_dir=tmp_path)
    finish(*work)
    assert len(open_records(work.plan.root, local_dir=tmp_path).pixels) == COUNT


def test_missing_blocks_cannot_be_finished(images: Path, root: str) -> None:
    work = planned(images, root)
    decode_block(work.plan, 0, work.uris(0))
    with pytest.raises(ServiceError, match=r"2 of 3 blocks are missing: \[1, 2\]"):
        finish(*work)


def test_decoding_twice_is_harmless(images: Path, tmp_path: Path) -> None:
    work = planned(images, str(tmp_path))
    decode_block(work.plan, 2, work.uris(2))
    block = Path(work.plan.root) / "block-000002.npz"
    before = block.read_bytes()
    decode_block(work.plan, 2, work.uris(2))
    with np.load(io.BytesIO(before)) as first, np.load(block) as second:
        assert all((first[name] == second[name]).all() for name in first.files)


def test_a_digest_is_of_shape_and_pixels(images: Path, tmp_path: Path) -> None:
    records = decoded(images, str(tmp_path), tmp_path)
    expected = hashlib.sha256(b"(5, 7, 3)" + records.pixels[9].tobytes()).hexdigest()
    assert records.index["digest"][9].as_py() == expected


def test_arrays_need_no_blocks(root: str, tmp_path: Path) -> None:
    config = DataConfig(limit=70)
    source = open_source(config)
    for size_px, channels in ((32, 1), (6, 3)):
        spec = image_spec(source, backbone_size_px=size_px, scratch_size=False, config=config)
        plan = plan_records(source, replace(spec, channels=channels), storage=root, max_pixels=1000)
        assert missing_blocks(plan) == []
        finish(plan, source)
        records = open_records(plan.root, local_dir=tmp_path / "node")
        assert source.pixels is not None
        assert records.pixels.shape == ((70, 8, 8, 1) if size_px == 32 else (70, 6, 6, 3))
        if size_px == 32:
            np.testing.assert_array_equal(records.pixels, source.pixels)
        assert bad_records(records.index) == []


def test_the_key_depends_on_all_that_the_pixels_depend_on(images: Path, tmp_path: Path) -> None:
    source = open_source(DataConfig(data=str(images)))

    def key(source: Source = source, spec: ImageSpec = SPEC, max_pixels: int = 1000) -> str:
        return plan_records(source, spec, storage=str(tmp_path), max_pixels=max_pixels).key

    changed = source.table.set_column(4, "etag", [["new", *source.table["etag"].to_pylist()[1:]]])
    keys = [key(), key(spec=replace(SPEC, resize="crop")), key(spec=replace(SPEC, width_px=8)), key(max_pixels=999)]
    keys += [key(replace(source, table=changed)), key(replace(source, table=source.table.slice(1)))]
    digits = open_source(DataConfig())
    assert digits.pixels is not None
    keys += [key(digits), key(replace(digits, pixels=digits.pixels + np.uint8(1)))]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_plan_is_plain_and_crosses_processes(images: Path, tmp_path: Path) -> None:
    plan = planned(images, str(tmp_path)).plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan.root == f"{tmp_path}/_records/{plan.key[:16]}"


@pytest.mark.parametrize(("size_px", "expected"), [(8, 65_536), (28, 14_266), (224, 222), (1000, 64)])
def test_a_block_is_about_32_mib(images: Path, tmp_path: Path, size_px: int, expected: int) -> None:
    source = open_source(DataConfig(data=str(images)))
    spec = ImageSpec(height_px=size_px, width_px=size_px, channels=3)
    assert plan_records(source, spec, storage=str(tmp_path), max_pixels=1).block_size == expected


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def shrink(free_bytes: int) -> None:
        usage = shutil.disk_usage("/")._replace(free=free_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return shrink


def test_pixels_that_do_not_fit_the_disk_are_refused(
    images: Path, tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    needed_bytes = 2 * COUNT * 5 * 7 * 3
    small_disk(needed_bytes)
    planned(images, str(tmp_path))
    small_disk(needed_bytes - 1)
    with pytest.raises(ConfigError, match=r"need 3\.15e-05 GB of disk\. Received: 3\.15e-05 GB free"):
        planned(images, str(tmp_path))


def test_pixels_that_do_not_fit_the_node_are_refused(
    images: Path, s3: str, tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    decoded(images, s3, tmp_path / "one")
    small_disk(100)
    with pytest.raises(ConfigError, match=r"need 1\.57e-05 GB of disk\. Received: 1e-07 GB free"):
        decoded(images, s3, tmp_path / "two")


def open_and_sum(root: str, local_dir: Path, sums: Any) -> None:
    sums.put(int(open_records(root, local_dir=local_dir).pixels.sum()))


@pytest.mark.slow
def test_processes_of_a_node_download_once(images: Path, s3: str, tmp_path: Path) -> None:
    work = planned(images, s3)
    work.decode()
    finish(*work)
    context = multiprocessing.get_context("spawn")
    sums = context.Queue()
    arguments = (work.plan.root, tmp_path / "node", sums)
    processes = [context.Process(target=open_and_sum, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    results = {sums.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    pixels = tmp_path / "node" / work.plan.key[:16] / "pixels.npy"
    modified_ns = pixels.stat().st_mtime_ns
    assert results == {int(open_records(work.plan.root, local_dir=tmp_path / "node").pixels.sum())}
    assert pixels.stat().st_mtime_ns == modified_ns
    assert not list(pixels.parent.glob("*.tmp"))


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


def test_records_of_another_version_or_shape_are_refused(images: Path, tmp_path: Path) -> None:
    work = planned(images, str(tmp_path))
    work.decode()
    finish(*work)
    mark = Path(work.plan.root) / "records.json"
    description = json.loads(mark.read_text())
    mark.write_text(json.dumps(description | {"count": COUNT + 1}))
    with pytest.raises(DataError, match=r"pixels are uint8 \[151, 5, 7, 3\]\. Received: uint8 \[150, 5, 7, 3\]"):
        open_records(work.plan.root, local_dir=tmp_path)
    mark.write_text(json.dumps(description | {"version": 0}))
    with pytest.raises(DataError, match=r"records of version 2\. Received: 0"):
        open_records(work.plan.root, local_dir=tmp_path)
