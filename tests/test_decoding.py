"""decoding: every row of a shard comes once, in threads that survive its images and its storage."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from corpus import DANGERS, H, W, colour_png, danger, encoded, flat_png, manifest_rows, slow_pgm, tar_of
from PIL import Image

from mnist_dist.config import DecodeConfig
from mnist_dist.data.decoding import SETTLED_IMAGES, Collector, DecodePool, Taken, Threads, Times
from mnist_dist.errors import ImageError, StorageError
from mnist_dist.images.decoder import Decoded, decode_image
from mnist_dist.images.spec import ImageSpec
from mnist_dist.score_config import InputConfig
from mnist_dist.sources.listing import list_inputs
from mnist_dist.sources.reading import TINY_AT_ONCE, TINY_BYTES
from mnist_dist.store.base import Entry
from mnist_dist.store.local import LocalStore

SPEC = ImageSpec(height_px=5, width_px=7, channels=3)
NOISE = encoded(Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 30, 3), np.uint8)), "PNG")
LIMITS = DecodeConfig(max_pixels=60_000, max_bytes=40_000)
MAX_GROWTH_MIB = 100  # the larger bomb has 572
CODE = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

BOMB = """
import re, sys
from pathlib import Path
from corpus import manifest_rows
from mnist_dist.config import DecodeConfig
from mnist_dist.images.spec import ImageSpec
from mnist_dist.data.decoding import Collector, DecodePool, Threads

def peak_kib():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

def decode(path):
    found = Collector(1)
    pool.begin(manifest_rows([path]), found, isolated=False)
    found.wait(pool)
    return found.images[0]

spec = ImageSpec(height_px=5, width_px=7, channels=3)
with DecodePool(spec, config=DecodeConfig(), threads=Threads(decoding=2, reading=1)) as pool:
    decode(sys.argv[1])
    before = peak_kib()
    problems = [decode(path) for path in sys.argv[2:]]
    print((peak_kib() - before) // 1024, *problems, sep="\\n")
"""

HANGS = """
import os, sys
from corpus import manifest_rows
from mnist_dist.config import DecodeConfig
from mnist_dist.images.spec import ImageSpec
from mnist_dist.errors import DecoderStuck
from mnist_dist.data.decoding import Collector, DecodePool, Threads

spec, config = ImageSpec(height_px=5, width_px=7, channels=3), DecodeConfig(image_timeout_s=0.2)
found = Collector(2)
try:
    with DecodePool(spec, config=config, threads=Threads(decoding=2, reading=1)) as pool:
        pool.begin(manifest_rows(sys.argv[1:]), found, isolated=False)
        found.wait(pool)
except DecoderStuck as error:
    print(error, flush=True)
    os._exit(0)
"""


def collected(
    rows: pa.Table, *, config: DecodeConfig = LIMITS, threads: Threads | None = None, isolated: bool = False
) -> Collector:
    found = Collector(len(rows))
    with DecodePool(SPEC, config=config, threads=threads or Threads(decoding=2, reading=3)) as pool:
        pool.begin(rows, found, isolated=isolated)
        found.wait(pool)
    return found


def words(found: Collector) -> list[str]:
    return [image.status if isinstance(image, ImageError) else "ok" for image in found.images]


@pytest.fixture
def mixed(tmp_path: Path) -> pa.Table:
    """Of files and archives, good and bad."""
    (tmp_path / "a.png").write_bytes(colour_png(10, 20, 30))
    (tmp_path / "b.txt").write_bytes(b"hello, world")
    (tmp_path / "c.png").write_bytes(encoded(Image.new("1", (300, 201)), "PNG"))
    (tmp_path / "d.png").write_bytes(NOISE[:-90])
    (tmp_path / "e.tar.gz").write_bytes(tar_of({"1.png": colour_png(70, 80, 90), "2.png": b""}, "w:gz"))
    (tmp_path / "f.tar").write_bytes(tar_of({"1.png": bytes(40_001), "2.png": colour_png(91, 92, 93)}))
    files = list_inputs(InputConfig(input=(str(tmp_path),), all_files=True)).table
    archives = list_inputs(InputConfig(input=(f"{tmp_path}/e.tar.gz", f"{tmp_path}/f.tar"))).table
    assert len(files) == 8
    return pa.concat_tables([files, archives, manifest_rows(["/nowhere.png"])])


WORDS = ["ok", "unsupported", "too_large", "truncated", "ok", "empty", "too_large", "ok"]


@pytest.mark.parametrize("threads", [Threads(decoding=1, reading=0), Threads(decoding=3, reading=4)])
@pytest.mark.parametrize("isolated", [False, True])
def test_every_row_comes_in_its_place(mixed: pa.Table, threads: Threads, isolated: bool) -> None:
    found = collected(mixed, threads=threads, isolated=isolated)
    assert words(found) == [*WORDS, *WORDS[4:], "missing"]
    pixels = [image.pixels[0, 0].tolist() for image in found.images if isinstance(image, Decoded)]
    assert pixels == [[10, 20, 30], [70, 80, 90], [91, 92, 93], [70, 80, 90], [91, 92, 93]]
    assert found.size_bytes[1:4:2] == [12, len(NOISE) - 90]
    assert found.size_bytes[-1] is None
    assert found.etags[:8] == mixed["etag"].to_pylist()[:8]


def test_an_error_holds_no_memory(mixed: pa.Table) -> None:
    errors = [image for image in collected(mixed).images if isinstance(image, ImageError)]
    assert len(errors) == 8
    assert all(error.__traceback__ is None and error.__cause__ is None for error in errors)


def test_shards_share_the_threads(tmp_path: Path) -> None:
    for level in range(60):
        (tmp_path / f"{level:02d}.png").write_bytes(colour_png(level, 0, 0))
    rows = list_inputs(InputConfig(input=(str(tmp_path),))).table
    shards = [rows.slice(start, 17) for start in range(0, 60, 17)]
    found = [Collector(len(shard)) for shard in shards]
    with DecodePool(SPEC, config=LIMITS, threads=Threads(decoding=2, reading=1)) as pool:
        for shard, sink in zip(shards, found, strict=True):
            pool.begin(shard, sink, isolated=False)
        for sink in reversed(found):
            sink.wait(pool)
    images = [image for sink in found for image in sink.images]
    assert [image.pixels[0, 0, 0] for image in images if isinstance(image, Decoded)] == list(range(60))


def test_what_storage_raises_is_raised() -> None:
    rows = manifest_rows(["/nowhere.png", "ftp://bucket/x.png", "/nowhere.png"])
    with pytest.raises(StorageError, match=r"Received: 'ftp://bucket/x\.png'"):
        collected(rows)


def bytes_read() -> int:
    """By this process, from anywhere."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_after_an_error_of_the_storage_no_more_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(bytes(LIMITS.max_bytes))
    failing = manifest_rows(["ftp://bucket/x.png", *[str(tmp_path / "x.png")] * 90])
    bad, good = Collector(len(failing)), Collector(1)
    before = bytes_read()
    with DecodePool(SPEC, config=LIMITS, threads=Threads(decoding=1, reading=0)) as pool:
        pool.begin(failing, bad, isolated=False)
        pool.begin(manifest_rows(["/nowhere.png"]), good, isolated=False)
        with pytest.raises(StorageError, match="Received: 'ftp:"):
            bad.wait(pool)
        good.wait(pool)
    assert words(good) == ["missing"]
    assert bytes_read() - before < 10 * LIMITS.max_bytes


def test_times_are_those_of_reading_and_of_decoding(tmp_path: Path) -> None:
    (tmp_path / "slow.pgm").write_bytes(slow_pgm(400))
    rows = manifest_rows([str(tmp_path / "slow.pgm")] * 3)
    found = Collector(len(rows))
    began = time.perf_counter()
    with DecodePool(SPEC, config=DecodeConfig(), threads=Threads(decoding=1, reading=1)) as pool:
        pool.begin(rows, found, isolated=False)
        found.wait(pool)
        wall_s = time.perf_counter() - began
    assert words(found) == ["ok"] * 3
    assert 0 < pool.times.decode_s < wall_s  # one at a time, though two threads do it
    assert 0 < pool.times.read_s < 2 * wall_s
    assert pool.times.model_s == 0


# --- tiny images ------------------------------------------------------------------------------------------------------


def tiny_files(folder: Path, count: int) -> pa.Table:
    for number in range(count):
        (folder / f"{number:03d}.png").write_bytes(colour_png(number, 0, 0))
    return list_inputs(InputConfig(input=(str(folder),))).table


class Sizes(Collector):
    """Also notes how many images came at once."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.sizes: list[int] = []

    def take(self, images: Sequence[Taken]) -> None:
        self.sizes.append(len(images))
        super().take(images)


@pytest.mark.parametrize(("side_px", "sizes"), [(7, [TINY_AT_ONCE, 8]), (200, [8] * 5), (2_000, [1] * 40)])
def test_tiny_images_come_in_batches_of_bounded_size(tmp_path: Path, side_px: int, sizes: list[int]) -> None:
    spec = ImageSpec(height_px=side_px, width_px=side_px, channels=3)
    found = Sizes(TINY_AT_ONCE + 8)
    with DecodePool(spec, config=LIMITS, threads=Threads(decoding=1, reading=0)) as pool:
        pool.begin(tiny_files(tmp_path, TINY_AT_ONCE + 8), found, isolated=False)
        found.wait(pool)
    assert found.sizes == sizes
    assert [image.pixels[0, 0, 0] for image in found.images if isinstance(image, Decoded)] == list(range(40))


def test_an_image_that_is_not_tiny_ends_a_batch(tmp_path: Path) -> None:
    large = encoded(Image.effect_noise((99, 99), 50), "PNG")
    assert len(large) > TINY_BYTES
    images = {"1.png": b"", "2.png": colour_png(1, 2, 3), "3.png": large, "4.png": large, "5.png": colour_png(4, 5, 6)}
    (tmp_path / "x.tar").write_bytes(tar_of(images))
    found = Sizes(len(images))
    with DecodePool(SPEC, config=LIMITS, threads=Threads(decoding=1, reading=0)) as pool:
        pool.begin(list_inputs(InputConfig(input=(f"{tmp_path}/x.tar",))).table, found, isolated=False)
        found.wait(pool)
    assert found.sizes == [3, 1, 1]
    assert words(found) == ["empty", "ok", "ok", "ok", "ok"]


class Meeting(LocalStore):
    """Each read waits for another one to begin."""

    def __init__(self, timeout_s: float) -> None:
        self.barrier = threading.Barrier(2, timeout=timeout_s)

    def read_object(self, uri: str, *, max_bytes: int) -> tuple[Entry, bytes | None]:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.barrier.wait()
        return super().read_object(uri, max_bytes=max_bytes)


@pytest.mark.parametrize(("is_slow", "timeout_s"), [(False, 0.05), (True, 60)])
def test_threads_take_turns_in_reading_tiny_files_unless_storage_is_slow(
    tmp_path: Path, is_slow: bool, timeout_s: float
) -> None:
    store, found = Meeting(timeout_s), Collector(2 * TINY_AT_ONCE)
    with DecodePool(SPEC, config=LIMITS, threads=Threads(decoding=3, reading=0), store=store) as pool:
        pool._images = SETTLED_IMAGES
        pool.times = Times(read_s=1e9) if is_slow else Times(decode_s=1e9)
        pool.begin(tiny_files(tmp_path, 2 * TINY_AT_ONCE), found, isolated=False)
        found.wait(pool)
    assert store.barrier.broken != is_slow
    assert words(found) == ["ok"] * 2 * TINY_AT_ONCE


@pytest.fixture
def dangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """A shard whose second image crashes the processes that are started from here on."""
    (tmp_path / "sitecustomize.py").write_text(DANGERS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *CODE]))
    for name in ("good", "segfault", "hang"):
        (tmp_path / f"{name}.jpg").write_bytes(danger(name))
    return manifest_rows([f"{tmp_path}/{name}.jpg" for name in ("good", "segfault", "good")])


def test_a_decoder_that_crashes_in_a_child_costs_one_image(dangers: pa.Table) -> None:
    found = collected(dangers, isolated=True)
    assert words(found) == ["ok", "failed", "ok"]
    assert str(found.images[1]) == "failed: the decoder crashed (SIGSEGV)"


def test_a_decoder_that_hangs_is_noticed_and_not_waited_for(dangers: pa.Table, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGS, dangers["uri"][0].as_py(), str(tmp_path / "hang.jpg")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "decoding an image takes longer than 0.2 s\n"), ran.stderr


def test_a_flat_png_is_what_it_says() -> None:
    for bits, channels in ((1, 1), (8, 1), (8, 3)):
        decoded = decode_image(flat_png(300, 200, bits=bits, channels=channels), SPEC)
        assert (decoded.width_px, decoded.height_px) == (300, 200)
        assert not decoded.pixels.any()


def test_a_bomb_of_pixels_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.png").write_bytes(colour_png(1, 2, 3))
    paths = [str(tmp_path / "good.png")]
    for bits, channels in ((1, 1), (8, 3)):
        paths.append(str(tmp_path / f"{bits}_bits.png"))
        Path(paths[-1]).write_bytes(flat_png(20_000, 10_000, bits=bits, channels=channels))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(CODE))
    ran = subprocess.run([sys.executable, "-c", BOMB, *paths], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    growth_mib, *problems = ran.stdout.splitlines()
    assert problems == ["too_large: 20000 x 10000 px are more than 100,000,000 pixels"] * 2
    assert int(growth_mib) < MAX_GROWTH_MIB


def test_an_image_of_all_limits_is_decoded(tmp_path: Path) -> None:
    data = encoded(Image.new("1", (300, 200)), "PNG")
    (tmp_path / "x.png").write_bytes(data)
    config = DecodeConfig(max_pixels=300 * 200, max_bytes=len(data))
    assert words(collected(manifest_rows([str(tmp_path / "x.png")]), config=config)) == ["ok"]


def test_the_size_is_that_of_the_original(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(colour_png(1, 2, 3))
    (image,) = collected(manifest_rows([str(tmp_path / "x.png")])).images
    assert isinstance(image, Decoded)
    assert (image.width_px, image.height_px, image.pixels.shape) == (W, H, (5, 7, 3))
    assert np.all(image.pixels == [1, 2, 3])
