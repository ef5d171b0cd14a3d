"""budget: large images wait for each other, in order, and what exceeds it all is refused."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from corpus import manifest_rows
from mutations import png_chunk as chunk
from PIL import Image
from test_png import bmp_32, png
from tiffs import Tiff, tiff

from mnist_dist.config import DecodeConfig
from mnist_dist.data.decoding import Collector, DecodePool, Threads
from mnist_dist.errors import ImageError
from mnist_dist.images import budget as budgets
from mnist_dist.images.budget import SMALL_BYTES, MemoryBudget, default_budget_bytes
from mnist_dist.images.decoder import Decoded, decode_image
from mnist_dist.images.spec import ImageSpec
from mnist_dist.sources.reading import TINY_BYTES

TOTAL = 10 * SMALL_BYTES
SPEC = ImageSpec(height_px=8, width_px=8, channels=3)


def test_more_than_the_whole_budget_is_refused() -> None:
    budget = MemoryBudget(TOTAL)
    with budget.reserve(TOTAL):
        pass
    with pytest.raises(
        ImageError, match=r"^too_large: decoding takes 41 MiB of memory, more than the 40 MiB of --decode"
    ):
        budget.reserve(TOTAL + 2**20)


def started(
    budget: MemoryBudget, memory_bytes: int, entered: list[int], *, then: Callable[[], object]
) -> threading.Thread:
    """A thread that reserves, notes it, and holds what it has until `then` returns."""

    def run() -> None:
        with budget.reserve(memory_bytes):
            entered.append(memory_bytes)
            then()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def await_queue(budget: MemoryBudget, length: int) -> None:
    while len(budget._queue) != length:
        threading.Event().wait(0.001)


def test_large_images_wait_in_order_and_small_ones_do_not() -> None:
    budget, entered, go = MemoryBudget(TOTAL), list[int](), threading.Event()
    with budget.reserve(TOTAL - SMALL_BYTES):
        first = started(budget, 2 * SMALL_BYTES, entered, then=go.wait)
        await_queue(budget, 1)
        second = started(budget, SMALL_BYTES, entered, then=go.wait)  # would fit, but came later
        await_queue(budget, 2)
        with budget.reserve(SMALL_BYTES - 1):
            assert not entered
    await_queue(budget, 0)
    go.set()
    first.join()
    second.join()
    assert sorted(entered) == [SMALL_BYTES, 2 * SMALL_BYTES]  # Once both fit, either may note it first.
    with budget.reserve(TOTAL):
        pass


def test_memory_is_free_again_after_an_error() -> None:
    budget = MemoryBudget(TOTAL)
    for _ in range(3):
        with pytest.raises(ImageError, match="broken"), budget.reserve(TOTAL):
            raise ImageError("unreadable", "broken")


@pytest.mark.parametrize(
    ("memory_gib", "threads", "expected_mib"), [(64, 2, 1536), (8, 4, 1536), (4, 4, 1024), (4, 1, 256)]
)
def test_the_default_is_a_share_of_the_machine(
    memory_gib: int, threads: int, expected_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "memory_bytes", lambda: memory_gib * 2**30)
    monkeypatch.setattr(budgets, "usable_cpus", lambda: 4)
    assert default_budget_bytes(threads) == expected_mib * 2**20


def large_png(folder: Path, name: str = "large.png", side: int = 1600) -> str:
    path = folder / name
    Image.new("RGBA", (side, side), (9, 8, 7, 255)).save(path)
    return str(path)


def tiny_bomb(folder: Path) -> str:
    """A file of less than 4 KiB that takes more than 16 MiB."""
    path = folder / "bomb.png"
    Image.new("1", (3000, 3000)).save(path)
    assert path.stat().st_size <= TINY_BYTES
    return str(path)


def test_waiting_for_memory_is_not_decoding(tmp_path: Path) -> None:
    config = DecodeConfig(decode_memory=64 * 2**20, image_timeout_s=1e-6)
    collector = Collector(1)
    with DecodePool(SPEC, config=config, threads=Threads(decoding=1, reading=0)) as pool:
        with pool._memory.reserve(64 * 2**20):
            pool.begin(manifest_rows([large_png(tmp_path)]), collector, isolated=False)
            await_queue(pool._memory, 1)
            pool.check_times()  # does not raise
        assert collector._done.wait(60)
    assert isinstance(collector.images[0], Decoded)


def test_a_tiny_file_that_waits_for_memory_holds_up_no_other(tmp_path: Path) -> None:
    config = DecodeConfig(decode_memory=64 * 2**20)
    bomb, others = Collector(1), Collector(40)
    with DecodePool(SPEC, config=config, threads=Threads(decoding=2, reading=0)) as pool:
        with pool._memory.reserve(64 * 2**20):
            pool.begin(manifest_rows([tiny_bomb(tmp_path)]), bomb, isolated=False)
            await_queue(pool._memory, 1)
            pool.begin(
                manifest_rows([large_png(tmp_path, f"{n}.png", side=9) for n in range(40)]), others, isolated=False
            )
            others.wait(pool)
        bomb.wait(pool)
    assert {type(image) for image in [*bomb.images, *others.images]} == {Decoded}


def test_a_child_shares_the_budget(tmp_path: Path) -> None:
    config = DecodeConfig(decode_memory=64 * 2**20)
    collector = Collector(1)
    with DecodePool(SPEC, config=config, threads=Threads(decoding=1, reading=0)) as pool:
        with pool._memory.reserve(64 * 2**20):
            pool.begin(manifest_rows([large_png(tmp_path)]), collector, isolated=True)
            await_queue(pool._memory, 1)
        collector.wait(pool)
        assert pool._memory._free_bytes == 64 * 2**20
    assert isinstance(collector.images[0], Decoded)


@pytest.mark.parametrize("isolated", [False, True])
def test_an_image_beyond_the_budget_is_too_large(tmp_path: Path, isolated: bool) -> None:
    config = DecodeConfig(decode_memory=16 * 2**20)
    collector = Collector(2)
    with DecodePool(SPEC, config=config, threads=Threads(decoding=1, reading=0)) as pool:
        rows = manifest_rows([large_png(tmp_path), large_png(tmp_path, "small.png", side=100)])
        pool.begin(rows, collector, isolated=isolated)
        collector.wait(pool)
    refused, small = collector.images
    assert isinstance(refused, ImageError)
    assert refused.status == "too_large"
    assert "--decode-memory" in refused.message
    assert isinstance(small, Decoded)


# --- what images take ------------------------------------------------------------------------------------------------

PROBE = """
import json, resource, sys
from mnist_dist.images.budget import MemoryBudget
from mnist_dist.images.decoder import decode_image, unlimited
from mnist_dist.images.spec import ImageSpec

spec, stated = ImageSpec(**json.loads(sys.argv.pop(1))), []

def reserve(memory_bytes):
    stated.append(memory_bytes)
    return unlimited(memory_bytes)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large = (open(path, "rb").read() for path in sys.argv[1:])
decode_image(small, spec)  # loads what is needed once
before = peak()
decode_image(large, spec, reserve=reserve)
print(json.dumps([stated[0], peak() - before]))
"""


def made(kind: str, height: int, width: int) -> bytes:
    """An image whose content is neither flat nor slow to encode."""
    rows, columns = np.mgrid[:height, :width]
    red = ((rows // 16) * 7 + (columns // 16) * 11).astype(np.uint8)
    rgba = Image.merge("RGBA", [Image.fromarray(band) for band in (red, 255 - red, red // 2, red | 128)])
    name, mode, options = KINDS[kind]
    if kind in RAW:
        return RAW[kind](np.asarray(rgba))
    image = Image.fromarray(red.astype(np.uint16) * 257) if mode == "I;16" else rgba.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6
FAST = {"compress_level": 1}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PNG, transparent": ("PNG", "RGBA", FAST),
    "PNG, grey and transparent": ("PNG", "LA", FAST),
    "PNG, palette": ("PNG", "P", {**FAST, "transparency": 3}),
    "PNG, a transparent colour": ("PNG", "RGB", {**FAST, "transparency": (1, 2, 3)}),
    "PNG, grey": ("PNG", "L", FAST),
    "PNG, 1 bit": ("PNG", "1", FAST),
    "PNG, 16 bits": ("PNG", "I;16", FAST),
    "PNG, turned": ("PNG", "RGB", {**FAST, "exif": TURNED}),
    "JPEG": ("JPEG", "RGB", {}),
    "JPEG, turned": ("JPEG", "RGB", {"exif": TURNED}),
    "JPEG, progressive": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    "JPEG, CMYK": ("JPEG", "CMYK", {"progressive": True}),
    "GIF": ("GIF", "P", {}),
    "WebP": ("WEBP", "RGB", {"method": 0}),
    "WebP, lossless": ("WEBP", "RGBA", {"lossless": True, "method": 0, "quality": 0}),
    "AVIF": ("AVIF", "RGBA", {"speed": 10}),
    "JPEG 2000": ("JPEG2000", "RGB", {}),
    "BMP": ("BMP", "RGB", {}),
    "TIFF": ("TIFF", "RGB", {}),
    "TIFF, LZW": ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
    "PPM": ("PPM", "RGB", {}),
    "PNG, a transparent colour of 16 bits": ("", "", {}),
    "BMP, alpha 0": ("", "", {}),
    "TIFF, a tile of 4 times the image": ("", "", {}),
}


def deep_png(rgba: npt.NDArray[np.uint8]) -> bytes:
    samples = rgba[..., :3].astype(np.uint16) * 257
    return png(samples, 16, 2, chunk(b"tRNS", bytes(6)))


def transparent_bmp(rgba: npt.NDArray[np.uint8]) -> bytes:
    return bmp_32(rgba[..., :3], 0)


def tiled_tiff(rgba: npt.NDArray[np.uint8]) -> bytes:
    height, width = rgba.shape[:2]
    how = Tiff(bits=8, photometric=2, compression=8, tile_px=(-(-2 * width // 16) * 16, -(-2 * height // 16) * 16))
    return tiff(rgba[..., :3], how)


RAW: dict[str, Callable[[npt.NDArray[np.uint8]], bytes]] = {
    "PNG, a transparent colour of 16 bits": deep_png,
    "BMP, alpha 0": transparent_bmp,
    "TIFF, a tile of 4 times the image": tiled_tiff,
}


SQUARE = {"height_px": 64, "width_px": 64, "channels": 3}
EDGE = {"height_px": 224, "width_px": 224, "channels": 3, "resize": "shortest-edge", "resize_px": 256}
EXACT = {
    "pillow": {**EDGE, "resampling": "pillow", "interpolation": "lanczos", "quality": "exact"},
    "keras": {**EDGE, "resampling": "keras", "interpolation": "bicubic", "quality": "exact"},
    "enlarged": {**EDGE, "resampling": "pillow", "resize_px": 3000, "quality": "exact"},
    "fast": {**EDGE, "resampling": "pillow"},
}


@pytest.mark.slow  # A process for each kind.
@pytest.mark.parametrize(
    ("kind", "spec"),
    [*((kind, SQUARE) for kind in KINDS)]
    + [(kind, spec) for kind in ("JPEG", "JPEG, turned", "PNG, grey", "PNG, transparent") for spec in EXACT.values()],
)
def test_an_image_takes_no_more_memory_than_it_reserves(kind: str, spec: dict[str, Any], tmp_path: Path) -> None:
    paths = []
    for name, (height, width) in {"small": (64, 64), "large": (3000, 4000)}.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(made(kind, height, width))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(spec), *paths],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    stated, taken = json.loads(done.stdout)
    assert taken <= stated + 8 * 2**20  # what the allocator keeps


EIGHT = """
import json, resource, sys
from mnist_dist.config import DecodeConfig
from mnist_dist.data.decoding import Collector, DecodePool, Threads
from mnist_dist.images.budget import MAX_DEFAULT_BYTES
from mnist_dist.images.spec import ImageSpec
from corpus import manifest_rows

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

spec = ImageSpec(height_px=64, width_px=64, channels=3)
config = DecodeConfig(decode_memory=MAX_DEFAULT_BYTES, image_timeout_s=600)
small, *large = sys.argv[1:]
with DecodePool(spec, config=config, threads=Threads(decoding=8, reading=8)) as pool:
    first = Collector(1)
    pool.begin(manifest_rows([small]), first, isolated=False)
    first.wait(pool)
    before = peak()
    all = Collector(len(large))
    pool.begin(manifest_rows(large), all, isolated=False)
    all.wait(pool)
print(json.dumps([[type(image).__name__ for image in all.images], peak() - before]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_images_of_100_megapixels_stay_below_two_gibibytes(tmp_path: Path) -> None:
    mask = Image.new("RGBA", (10_000, 10_000), (200, 100, 50, 128))
    mask.save(tmp_path / "0.png", compress_level=1)
    paths = [tmp_path / "0.png"]
    for number in range(1, 8):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].hardlink_to(paths[0])
    small = large_png(tmp_path, "small.png", side=32)
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, small, *paths],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])},
    )
    kinds, taken = json.loads(done.stdout)
    assert kinds == ["Decoded"] * 8
    assert taken < 2 * 2**30


def test_the_stated_memory_is_asked_for_before_decoding() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (1000, 1000)).save(buffer, "PNG")

    def refuse(memory_bytes: int) -> Any:
        assert memory_bytes >= 1000 * 1000 * 4
        raise ImageError("too_large", "no")

    with pytest.raises(ImageError, match=r"^too_large: no$"):
        decode_image(buffer.getvalue(), SPEC, reserve=refuse)
