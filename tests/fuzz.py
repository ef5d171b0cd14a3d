"""Fuzzes the image decoders or the archive readers with mutated real files: `python tests/fuzz.py --what decoders`.

Owns: what must hold for any bytes, and child processes that check it. Does not own: the files (`specimens`) and
how they are changed (`mutations`).

Every input goes through two children, which differ in what malloc leaves in new memory and in whether it checks the
canaries behind each block when that is freed; both must give the same answer. An input is drawn from the seed and its
number alone. What is found is written into a folder: the input, and a line in `findings.txt`. docs/testing.md has the
commands. This is no test: pytest does not collect it.
"""

import argparse
import collections
import contextlib
import faulthandler
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mutations

from mnist_dist.errors import DataError, ImageError, MnistDistError, ServiceError, StorageError
from mnist_dist.images.decoder import decode_image, probe_image
from mnist_dist.images.spec import ImageSpec

STATUSES = frozenset({"missing", "denied", "empty", "truncated", "unreadable", "unsupported", "too_large", "failed"})
MAX_PIXELS, MAX_NATIVE_PIXELS = 2_000_000, 500_000
MAX_MEMBER_BYTES = 2**20
MAX_GROWTH_BYTES = 600 * 2**20  # Of a child over one archive; the xz reader alone may take 256 MiB.
SLACK_BYTES = 48 * 2**20  # Beyond what a decoder said that it needs: libraries, tables, the image's own bytes.
MAX_ADDRESS_BYTES = 12 * 2**30
MAX_CPU_S = 5.0
MAX_HANG_CPU_S = {"canaries": 60.0, "valgrind": 600.0}  # The child ends itself.
MAX_SILENCE_S = 1800.0
BATCH = {"canaries": 1000, "valgrind": 100}
MAX_KEPT = 3  # Inputs kept of each kind of finding.
SAME_KIND = {
    **{".jpg": "jpeg", ".jpeg": "jpeg", ".tif": "tiff", ".tiff": "tiff", ".heic": "heic", ".heif": "heic"},
    **{".pgm": "pnm", ".pbm": "pnm", ".ppm": "pnm", ".pnm": "pnm", ".jxl": "jxl", ".jp2": "jp2", ".avif": "avif"},
    **{".png": "png", ".gif": "gif", ".bmp": "bmp", ".dib": "dib", ".webp": "webp"},
}
SPECS = (
    ImageSpec(height_px=28, width_px=28, channels=1),
    ImageSpec(height_px=24, width_px=32, channels=3, resize="crop"),
    ImageSpec(height_px=7, width_px=5, channels=3),
    ImageSpec(height_px=224, width_px=224, channels=3),
)
CHILDREN = {
    "canaries": (
        {"LD_PRELOAD": "libc_malloc_debug.so.0", "GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.perturb=90"},
        {"MALLOC_PERTURB_": "165"},
    ),
    "valgrind": ({},),
}
"""Environments of the children. What mmap returns is always zero, so even large blocks come from the heap."""
COMMON = {"PYTHONMALLOC": "malloc", "MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_ARENA_MAX": "1"}
VALGRIND = (
    *("valgrind", "--quiet", "--undef-value-errors=no", "--leak-check=no", "--error-exitcode=99"),
    *("--exit-on-first-error=yes", "--track-fds=no", "--max-stackframe=8000000"),
)


@dataclass(frozen=True)
class Plan:
    """What is fuzzed."""

    what: str
    seed: int
    checker: str
    files: dict[str, bytes] = field(repr=False)

    def input_at(self, number: int) -> tuple[str, bytes]:
        """The name of the file that was mutated, and the bytes."""
        draw = random.Random(f"{self.seed}:{number}")
        kind = draw.choice(sorted(set(map(kind_of, self.files))))
        same = [name for name in self.files if kind_of(name) == kind]
        name, other = draw.choice(same), draw.choice(same if draw.random() < 0.8 else list(self.files))
        return name, mutations.mutated(self.files[name], self.files[other], draw)


def kind_of(name: str) -> str:
    return name.split()[0]


# --- what must hold, in a child --------------------------------------------------------------------------------------


def check_decoders(name: str, data: bytes, number: int, folder: Path) -> str:
    """Raises AssertionError, or whatever a decoder raises that it should not; else tells what came out."""
    probed = _told(lambda: probe_image(data, max_pixels=MAX_PIXELS))
    spec = _spec(number, probed)
    try:
        decoded = decode_image(data, spec, max_pixels=MAX_PIXELS, reserve=_reserve)
    except ImageError as err:
        return f"{_status(err)} / {probed}"
    pixels = decoded.pixels
    assert pixels.shape == spec.shape, f"pixels of shape {pixels.shape}"
    assert pixels.dtype == "uint8", f"pixels of {pixels.dtype}"
    assert pixels.flags.c_contiguous, "pixels are not contiguous"
    size = (decoded.width_px, decoded.height_px)
    assert isinstance(probed, tuple), f"decoded, but probing says {probed}"
    assert probed[:2] == size, f"probing says {probed[:2]}, decoding {size}"
    assert probed[2] in (1, 3), f"{probed[2]} channels"
    return f"ok {size} {probed[2]} {_digest(pixels.tobytes())}"


def _spec(number: int, probed: Any) -> ImageSpec:
    """Sizes in turn, among them that of the image itself, for which nothing is copied in the end."""
    if number % 3 == 0 and isinstance(probed, tuple) and 0 < probed[0] * probed[1] <= MAX_NATIVE_PIXELS:
        return ImageSpec(height_px=probed[1], width_px=probed[0], channels=probed[2])
    return SPECS[number % len(SPECS)]


def check_archives(name: str, data: bytes, number: int, folder: Path) -> str:
    """As `check_decoders`, for archives, Parquet files and arrays."""
    from corpus import tar_of

    suffix = kind_of(name)
    if suffix in (".npz", ".idx", ".idx.gz"):
        return _read_arrays(suffix, data, folder)
    path = folder / f"a{suffix}"
    path.write_bytes(data)
    (folder / "good.tar").write_bytes(tar_of({"good.png": b"not damaged"}))
    try:
        direct = "" if suffix == ".parquet" else _read_archive(str(path))
        listed = _listed(str(path), "label") if number % 2 else _listed(str(folder), None)
    finally:
        path.unlink()
    assert number % 2 or listed.startswith("ok"), f"one bad file fails its folder: {listed}"
    return f"{listed} | {direct}"


CHECKS: dict[str, Callable[[str, bytes, int, Path], str]] = {"decoders": check_decoders, "archives": check_archives}


_reserved = [0]
"""What the decoders of the last input said that they need, bytes."""


def _reserve(memory_bytes: int) -> contextlib.AbstractContextManager[None]:
    _reserved.append(memory_bytes)
    return contextlib.nullcontext()


def _told(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ImageError as err:
        return _status(err)


def _status(err: ImageError) -> str:
    assert err.status in STATUSES, f"status {err.status!r}"
    assert err.message, "an error without a message"
    assert "\n" not in err.message, "a message of two lines"
    err.message.encode()
    return f"{err.status}: {err.message}"


def _read_archive(uri: str) -> str:
    from mnist_dist.sources.archives import index_archive, read_members

    index = index_archive(uri)
    images = list(read_members(uri, index.members, max_bytes=MAX_MEMBER_BYTES))
    assert len(images) == len(index.members), "members without an answer"
    told = [_status(index.problem) if index.problem else "ok"]
    for member, image in zip(index.members, images, strict=True):
        member.name.encode()
        for value in (member.size_bytes, member.stored_bytes, member.offset):
            assert 0 <= value < 2**63, f"{value} does not fit into a column"
        assert isinstance(image, ImageError) or len(image) == member.size_bytes, f"{member.name}: another size"
        told.append(f"{member.name} {_status(image) if isinstance(image, ImageError) else _digest(image)}")
    return f"{told[0]} {_digest('|'.join(told[1:]).encode())}"


def _listed(path: str, label_column: str | None) -> str:
    """Reads what a job would."""
    from mnist_dist.score_config import InputConfig
    from mnist_dist.sources.listing import list_inputs
    from mnist_dist.sources.reading import read_in_order

    try:
        listing = list_inputs(InputConfig(input=(path,)), label_column=label_column)
    except DataError as err:
        return f"DataError: {err}"
    told = list[str]()
    rows = listing.table.select(["uri", "status", "error"]).to_pylist()
    images = read_in_order(listing.table, max_bytes=MAX_MEMBER_BYTES)
    for row, image in zip(rows, images, strict=True):
        assert isinstance(image, bytes | ImageError), f"{type(image)} instead of bytes"
        told.append(f"{row} {_status(image) if isinstance(image, ImageError) else _digest(image)}")
    assert label_column or any("good.png'" in line and _digest(b"not damaged") in line for line in told), (
        "a row is lost"
    )
    return f"ok {len(told)} {_digest('|'.join(told).encode())}"


def _read_arrays(suffix: str, data: bytes, folder: Path) -> str:
    from mnist_dist.sources import arrays

    source, end = str(folder / "mnist.npz"), suffix[4:]
    if suffix == ".npz":
        Path(source).write_bytes(data)
    else:
        source = str(folder)
        labels = b"\0\0\x08\x01\0\0\0\6\0\1\2\3\4\5"
        for stem in ("train", "t10k"):
            (folder / f"{stem}-images-idx3-ubyte{end}").write_bytes(data)
            (folder / f"{stem}-labels-idx1-ubyte{end}").write_bytes(gzip.compress(labels, mtime=0) if end else labels)
    try:
        found = arrays.read_arrays("mnist", source)
    except DataError as err:
        return f"DataError: {err}"
    finally:
        for path in folder.iterdir():
            path.unlink()
    return f"ok {found.pixels.shape} {_digest(found.pixels.tobytes())}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def serve(plan: Plan, start: int, stop: int, folder: Path) -> None:
    """Checks the inputs from `start` to `stop`, and writes a line before and after each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Whatever a library prints goes elsewhere.
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if plan.checker == "canaries":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    check = CHECKS[plan.what]
    for number in range(start, stop):
        name, data = plan.input_at(number)
        answers.write(f"{number}\n")
        _reserved[:] = [0]
        signal.setitimer(signal.ITIMER_PROF, MAX_HANG_CPU_S[plan.checker])
        before_bytes, began_s = _reset_peak(), time.process_time()
        answer = _answer(check, name, data, number, folder)
        grown_bytes, cpu_s = _peak() - before_bytes, time.process_time() - began_s
        if plan.checker == "canaries" and "found" not in answer:
            if grown_bytes > _max_growth_bytes(plan.what):
                answer["found"] = f"memory: {grown_bytes >> 20:,} MiB; reserved {max(_reserved) >> 20:,}"
            elif cpu_s > MAX_CPU_S:
                answer["found"] = f"slow: {cpu_s:.0f} s"
        answers.write(json.dumps({**answer, "name": name, "files": len(os.listdir("/proc/self/fd"))}) + "\n")


def _answer(
    check: Callable[[str, bytes, int, Path], str], name: str, data: bytes, number: int, folder: Path
) -> dict[str, Any]:
    try:
        return {"told": check(name, data, number, folder)}
    except (ServiceError, StorageError) as err:
        return {"found": f"{type(err).__name__}: {err}"}
    except BaseException as err:
        frames = traceback.extract_tb(err.__traceback__)
        ours = [frame for frame in frames if "mnist_dist" in frame.filename] or frames
        kind = "told nothing" if isinstance(err, MnistDistError) else "raised"
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return {"found": f"{kind} {type(err).__name__} at {place}: {' '.join(str(err).split())[:300]}"}


def _max_growth_bytes(what: str) -> int:
    return MAX_GROWTH_BYTES if what == "archives" else max(_reserved) + SLACK_BYTES


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# --- the parent ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of an input in one child."""

    number: int
    name: str = ""
    told: str = ""
    found: str = ""
    files: int = 0


def run_child(plan: Plan, pickled: Path, numbers: range, environment: dict[str, str]) -> Iterator[Outcome]:
    """Yields an outcome for each input; after one that killed or stopped its child, another child takes the rest."""
    while numbers:
        for outcome in _one_child(plan, pickled, numbers, environment):
            yield outcome
            numbers = range(outcome.number + 1, numbers.stop)


def _one_child(plan: Plan, pickled: Path, numbers: range, environment: dict[str, str]) -> Iterator[Outcome]:
    command = [sys.executable, __file__, "--child", str(pickled), str(numbers.start), str(numbers.stop)]
    prefix = VALGRIND if plan.checker == "valgrind" else ()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [*prefix, *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **COMMON, **environment},
            bufsize=0,
        )
        number, is_open = numbers.start, True
        try:
            for line in _lines(child, MAX_SILENCE_S):
                is_open = line.isdigit()
                if is_open:
                    number = int(line)
                else:
                    yield Outcome(number, **json.loads(line))
            at = number if is_open else number + 1  # What an earlier input broke can also show between two of them.
            if at < numbers.stop:
                yield Outcome(at, plan.input_at(at)[0], found=f"{_ended(child)}: {_last_words(errors)}")
        finally:
            child.kill()
            child.wait()


def _ended(child: subprocess.Popen[bytes]) -> str:
    try:
        code = child.wait(30)
    except subprocess.TimeoutExpired:
        return "sleeps"
    if code == -signal.SIGPROF:
        return "hangs"
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def _lines(child: subprocess.Popen[bytes], max_silence_s: float) -> Iterator[str]:
    assert child.stdout is not None
    rest = b""
    while select.select([child.stdout], [], [], max_silence_s)[0]:
        read = os.read(child.stdout.fileno(), 1 << 16)
        if not read:
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from (line.decode() for line in lines)


def _last_words(errors: Any) -> str:
    """The call that crashed, as `faulthandler`, glibc or valgrind tells it."""
    errors.seek(max(0, errors.seek(0, io.SEEK_END) - 20_000))
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "File " in line or "nvalid" in line or " by 0x" in line or " at 0x" in line]
    fatal = [line for line in lines if "Fatal" in line or "corrupt" in line or "free()" in line or "Error" in line]
    return " < ".join([*fatal[-2:], *telling[:6]])[:700]


class Findings:
    """Writes what is found, a few inputs of each kind.

    Args:
        folder: where to.
        plan: what is fuzzed.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._plan = folder, plan
        self.counts = collections.Counter[str]()

    def add(self, number: int, name: str, found: str) -> None:
        """Adds one."""
        kind = f"{kind_of(name)} {found.partition(': ')[0]}"
        self.counts[kind] += 1
        if self.counts[kind] > MAX_KEPT:
            return
        file = f"{self._plan.what}-{self._plan.seed}-{number}{'' if name.startswith('.') else '.'}{kind_of(name)}"
        (self._folder / file).write_bytes(self._plan.input_at(number)[1])
        with (self._folder / "findings.txt").open("a") as lines:
            lines.write(f"{file}\t{name}\t{found}\n")


def fuzz(plan: Plan, *, seconds: float, first: int, findings: Findings) -> collections.Counter[tuple[str, str]]:
    """Checks inputs for some time; returns how many came to which answer by kind."""
    counts = collections.Counter[tuple[str, str]]()
    stop_s, start = time.monotonic() + seconds, first
    with tempfile.TemporaryDirectory() as folder:
        pickled = Path(folder) / "plan"
        pickled.write_bytes(pickle.dumps(plan))
        while time.monotonic() < stop_s:
            numbers = range(start, start + BATCH[plan.checker])
            runs = [run_child(plan, pickled, numbers, environment) for environment in CHILDREN[plan.checker]]
            _compare([list(run) for run in runs], counts, findings)
            start = numbers.stop
            print(
                f"{time.strftime('%H:%M:%S')} {start - first:,} inputs, {findings.counts.total()} findings", flush=True
            )
    return counts


def _compare(
    runs: Sequence[Sequence[Outcome]], counts: collections.Counter[tuple[str, str]], findings: Findings
) -> None:
    for same in zip(*runs, strict=True):
        found = next((outcome.found for outcome in same if outcome.found), "")
        if not found and len({outcome.told for outcome in same}) > 1:
            found = f"differs: {' and '.join(outcome.told for outcome in same)}"
        if found:
            findings.add(same[0].number, same[0].name, found)
        word = same[0].told.partition(" ")[0].rstrip(":") or "found"
        counts[kind_of(same[0].name), "found" if found else word] += 1
    for run in runs:
        if run[-1].files > run[0].files + 20:
            findings.add(run[-1].number, run[-1].name, f"leaks files: {run[-1].files} are open")


def _corpus(what: str, folder: str | None) -> dict[str, bytes]:
    """Our own files, and those of a folder, whose suffixes are their kinds."""
    import specimens  # Not in the children: it takes a second.

    files = specimens.images() if what == "decoders" else specimens.archives()
    for path in sorted(Path(folder).rglob("*")) if folder else []:
        if path.is_file() and 0 < path.stat().st_size < 200_000:
            suffix = "".join(path.suffixes[-2:] if ".tar" in path.suffixes else path.suffixes[-1:]).lower() or ".none"
            files[f"{SAME_KIND.get(suffix, suffix)} {path.name}"] = path.read_bytes()
    return files


def _report(counts: collections.Counter[tuple[str, str]], findings: Findings, seconds: float) -> None:
    total = counts.total()
    print(f"\n{total:,} inputs in {seconds:,.0f} s, {total / seconds:.0f} a second")
    for kind in sorted({kind for kind, _ in counts}):
        words = {word: number for (other, word), number in counts.most_common() if other == kind}
        print(f"{kind:12} {sum(words.values()):>8,}  {', '.join(f'{word} {n:,}' for word, n in words.items())}")
    for kind, number in findings.counts.most_common():
        print(f"FOUND {number:,} x {kind}")


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=sorted(CHECKS), required=True)
    parser.add_argument("--seconds", type=float, default=60, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument(
        "--kinds", nargs="*", help="only files whose kind, the first word of their name, is one of these"
    )
    parser.add_argument("--corpus", help="a folder of further files to mutate")
    parser.add_argument("--checker", choices=sorted(CHILDREN), default="canaries")
    parser.add_argument("--findings", default="build/fuzz", help="the folder for what is found")
    options = parser.parse_args()
    files = _corpus(options.what, options.corpus)
    files = {name: data for name, data in files.items() if not options.kinds or kind_of(name) in options.kinds}
    plan = Plan(options.what, options.seed, options.checker, files)
    findings, began_s = Findings(Path(options.findings), plan), time.monotonic()
    counts = fuzz(plan, seconds=options.seconds, first=options.first, findings=findings)
    _report(counts, findings, time.monotonic() - began_s)
    return 1 if findings.counts else 0


def _child(pickled: str, start: str, stop: str) -> None:
    plan = pickle.loads(Path(pickled).read_bytes())
    folder = Path(pickled).parent / "inputs"  # One name, since messages contain it.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with contextlib.suppress(BrokenPipeError):
        serve(plan, int(start), int(stop), folder)


if __name__ == "__main__":
    sys.modules["fuzz"] = sys.modules["__main__"]  # What is pickled is found under one name.
    Plan.__module__ = "fuzz"
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
    else:
        sys.exit(_main())
