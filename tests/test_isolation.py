"""isolation: whatever an image does to its decoder, it costs that image and nothing else."""

import contextlib
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import heics
import numpy as np
import psutil
import pytest
from corpus import DANGERS, danger, encoded, every_format, rgb_pixels
from PIL import Image

from mnist_dist.errors import ImageError, WorkersFailed
from mnist_dist.images.decoder import Decoded, decode_image
from mnist_dist.images.isolation import IsolatedDecoder
from mnist_dist.images.spec import ImageSpec

SPEC = ImageSpec(height_px=5, width_px=7, channels=3)
GOOD = encoded(Image.fromarray(rgb_pixels()), "JPEG")
LARGE = encoded(Image.new("RGB", (1300, 900)), "PNG")  # takes more memory than an eater of all leaves
NOISE = encoded(Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 30, 3), np.uint8)), "PNG")
MAX_PIXELS = 1_200_000
END_S = 120

PARENT = """
import sys
from mnist_dist.images.spec import ImageSpec
from mnist_dist.images.isolation import IsolatedDecoder

spec = ImageSpec(height_px=5, width_px=7, channels=3)
decoder = IsolatedDecoder(spec, max_pixels=10_000, timeout_s=1)
for path in sys.argv[1:]:
    decoder.decode(open(path, "rb").read())
    print("decoded", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def dangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images of `danger` are dangerous to the processes that are started from here on."""
    (tmp_path / "sitecustomize.py").write_text(DANGERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def isolated(*, spec: ImageSpec = SPEC, timeout_s: float = 30) -> Iterator[IsolatedDecoder]:
    decoder = IsolatedDecoder(spec, max_pixels=MAX_PIXELS, timeout_s=timeout_s)
    try:
        yield decoder
    finally:
        decoder.close()


def same(ours: Decoded, theirs: Decoded) -> bool:
    sizes = [(image.width_px, image.height_px, image.pixels.shape) for image in (ours, theirs)]
    return sizes[0] == sizes[1] and bool((ours.pixels == theirs.pixels).all())


def children() -> list[psutil.Process]:
    """The processes that decode; other tests of the session may have a server running."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "mnist_dist.images.isolation" in process.cmdline():
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], *, max_s: float = END_S) -> bool:
    deadline = time.monotonic() + max_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_decode_image(channels: int) -> None:
    spec = ImageSpec(height_px=5, width_px=7, channels=channels, resize="crop")
    with isolated(spec=spec) as decoder:
        differ = [
            name for name, data in every_format().items() if not same(decoder.decode(data), decode_image(data, spec))
        ]
    assert not differ


def test_what_is_wrong_with_an_image_comes_through() -> None:
    bad = {
        "empty": b"",
        "unsupported": b"hello, world",
        "truncated": GOOD[:-90],
        "unreadable": NOISE[:900] + bytes(40) + NOISE[940:],
        "too_large": encoded(Image.new("1", (1300, 1000)), "PNG"),
    }
    with isolated() as decoder:
        for status, data in bad.items():
            with pytest.raises(ImageError, match=f"^{status}: ") as caught:
                decoder.decode(data)
            with pytest.raises(ImageError, match=f"^{status}: ") as expected:
                decode_image(data, SPEC, max_pixels=MAX_PIXELS)
            assert str(caught.value) == str(expected.value)
        assert len(children()) == 1


@pytest.mark.parametrize(
    ("name", "error"),
    [
        pytest.param("killed", r"^failed: the decoder crashed \(SIGKILL\)$", marks=pytest.mark.slow),
        ("segfault", r"^failed: the decoder crashed \(SIGSEGV\)$"),
        pytest.param("abort", r"^failed: the decoder crashed \(SIGABRT\)$", marks=pytest.mark.slow),
        pytest.param("exit", r"^failed: the decoder crashed \(exit status 7\)$", marks=pytest.mark.slow),
        pytest.param("hang", r"^failed: decoding took longer than 1\.5 s$", marks=pytest.mark.slow),
        ("eat", r"^too_large: it does not fit in memory$"),
    ],
)
def test_a_dangerous_image_costs_only_itself(dangers: Path, name: str, error: str) -> None:
    with isolated(timeout_s=1.5) as decoder:
        with pytest.raises(ImageError, match=error):
            decoder.decode(danger(name))
        assert same(decoder.decode(LARGE), decode_image(LARGE, SPEC))
        assert len(children()) == 1
    assert not children()


def test_children_that_crash_leave_no_open_files(dangers: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with isolated() as decoder:
        for _ in range(2):
            with pytest.raises(ImageError, match="SIGSEGV"):
                decoder.decode(danger("segfault"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_that_is_killed_between_images_costs_none() -> None:
    with isolated() as decoder:
        decoder.decode(GOOD)
        (child,) = children()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # its end is still to be noticed
        assert same(decoder.decode(GOOD), decode_image(GOOD, SPEC))


def test_a_child_that_does_not_start_is_no_fault_of_the_image(dangers: Path) -> None:
    (dangers / "sitecustomize.py").write_text("import os\nos._exit(3)\n")
    with isolated() as decoder, pytest.raises(WorkersFailed, match=r"did not start \(exit status 3\)"):
        decoder.decode(GOOD)
    assert not children()


def test_threads_take_turns() -> None:
    results: dict[int, Decoded] = {}

    def decode(level: int) -> None:
        results[level] = decoder.decode(encoded(Image.new("L", (9, 8), level), "PNG"))

    with isolated() as decoder:
        threads = [threading.Thread(target=decode, args=(level,)) for level in range(0, 250, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == len(threads)
    assert all(np.all(image.pixels == level) for level, image in results.items())


def test_what_was_never_used_is_closed() -> None:
    with isolated() as decoder:
        decoder.close()
    assert not children()


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # until its new parent looks after it
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def parent(*paths: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PARENT, *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_no_child_is_left_by_a_parent_that_dies(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(GOOD)
    with parent(tmp_path / "good.jpg") as process:
        assert first_line(process) == "decoded\n"
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        assert wait_until(lambda: has_ended(child))


@pytest.mark.slow
def test_no_child_is_left_by_a_parent_that_dies_while_it_hangs(dangers: Path) -> None:
    (dangers / "hang.jpg").write_bytes(danger("hang"))
    with parent(dangers / "hang.jpg") as process:
        assert wait_until((dangers / "hangs").exists)
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        assert wait_until(lambda: has_ended(child))


IN_A_GIBIBYTE = """
import resource, sys
from mnist_dist.images.decoder import probe_image

resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
probe_image(sys.stdin.buffer.read())
"""


@pytest.mark.parametrize(("disposal", "junk"), [(2, b""), (3, b""), (2, b"\xff\0")])
def test_a_gif_gets_no_canvas_before_its_size_is_checked(disposal: int, junk: bytes) -> None:
    colours, control = bytes(range(6)), b"!\xfe\4gif!\0" + junk + b"!\xf9\4" + bytes([disposal << 2 | 1, 0, 0, 1, 0])
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2\x44\1\0;"
    data = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + colours + control + frame
    ended = subprocess.run([sys.executable, "-c", IN_A_GIBIBYTE], input=data, stderr=subprocess.PIPE)
    assert b"65535 x 65535 px are more than 100,000,000 pixels" in ended.stderr


def test_a_heic_with_an_item_of_a_type_that_is_no_text_crashes_nothing() -> None:
    damaged = heics.ROTATED.replace(b"\0\0Exif\0", b"\0\0\xffxif\0")
    assert damaged != heics.ROTATED
    with isolated() as decoder, pytest.raises(ImageError, match="unreadable: HEIF: the type of an item is no text"):
        decoder.decode(damaged)
