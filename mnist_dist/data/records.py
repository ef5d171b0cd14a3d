"""Images decoded once: a content-keyed cache of uint8 pixels, memory-mapped wherever it is read.

Owns: the plan, the blocks that tasks write independently of each other, and the finished array with its index. Does
not own: who runs `decode_block` where (`on_ray` maps it over `missing_blocks`), or the splits.

Below `<storage>/_records/<key>/`, the key a hash of everything that the pixels depend on:

```
block-NNNNNN.npz    pixels, status, error, digest of one block of records, one atomic put each; that it exists means
                    it is done, writing it twice is harmless
pixels.npy          uint8 [N, H, W, C]; on local storage only, in place of the blocks
index.parquet       uri, label, split, status, error, digest; a row per record, in the order of the pixels
records.json        written last: the records are finished
```

An image that cannot be decoded is a row with a status and zero pixels, never an exception.
"""

# N = records, n = records of a block, H = height px, W = width px, C = channels

import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnist_dist.data.images import ImageSpec, Pixels, decode_image, match_channels, resize_pixels
from mnist_dist.data.sources import Source, map_in_threads, read_encoded
from mnist_dist.errors import ConfigError, DataError, ImageError, ServiceError
from mnist_dist.storage import (
    absolute,
    atomic_file,
    delete,
    exists,
    is_remote,
    join,
    list_entries,
    read_bytes,
    write_bytes,
)

_log = logging.getLogger(__name__)
_FORMAT_VERSION = 2
_BLOCK_BYTES = 32 * 2**20
_MIN_BLOCK, _MAX_BLOCK = 64, 65_536
_DECODE_THREADS = 2
_DECODE_AHEAD = 4
_PIXELS, _INDEX, _DONE = "pixels.npy", "index.parquet", "records.json"
_OK = "ok"


@dataclass(frozen=True)
class RecordPlan:
    """What is decoded to what, and where it goes: plain data for any process."""

    key: str
    """sha256 of everything that the finished records depend on, hex."""
    root: str
    """URI of the folder."""
    spec: ImageSpec
    max_pixels: int
    count: int
    """N."""
    block_size: int
    """Records of each block; the last one has what is left."""
    class_names: tuple[str, ...]
    image_column: str | None
    in_memory: bool
    """An array source: there is nothing to decode, `finish` writes everything."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.count // self.block_size)

    @property
    def pixel_bytes(self) -> int:
        """Size of all decoded pixels."""
        return self.count * self.spec.image_bytes

    def block_rows(self, block: int) -> slice:
        """The records of a block."""
        return slice(block * self.block_size, min((block + 1) * self.block_size, self.count))


@dataclass(frozen=True)
class Records:
    """The finished records, as one process sees them."""

    pixels: Pixels
    """`uint8 [N, H, W, C]`, 0-255, memory-mapped; zeros where a record is not readable."""
    index: pa.Table
    """A row per record: uri, label, split, status (`ok`, or why not), error, digest (hex)."""
    class_names: tuple[str, ...]
    spec: ImageSpec


@dataclass(frozen=True)
class _Block:
    """One block as it is stored."""

    pixels: Pixels
    status: list[str]
    error: list[str]
    """Empty where the status is `ok`."""
    digest: list[str]


def plan_records(source: Source, spec: ImageSpec, *, storage: str, max_pixels: int) -> RecordPlan:
    """Plans the decoding of a source, and checks that the result fits the storage.

    Args:
        source: what is to be decoded.
        spec: what each image becomes.
        storage: folder or `s3://` prefix of the job.
        max_pixels: images of more pixels than this are not decoded.

    Raises:
        ConfigError: the disk of a local storage has too little free space; with both sizes.
    """
    key = _key(source, spec, max_pixels)
    plan = RecordPlan(
        key=key,
        root=join(absolute(storage), "_records", key[:16]),
        spec=spec,
        max_pixels=max_pixels,
        count=len(source.table),
        block_size=min(max(_BLOCK_BYTES // spec.image_bytes, _MIN_BLOCK), _MAX_BLOCK),
        class_names=source.class_names,
        image_column=source.image_column,
        in_memory=source.pixels is not None,
    )
    if not is_remote(plan.root) and not finished(plan):
        check_free_space(Path(plan.root), plan.pixel_bytes * (1 if plan.in_memory else 2), "the decoded images")
    return plan


def finished(plan: RecordPlan) -> bool:
    """Whether the records can be opened."""
    return exists(join(plan.root, _DONE))


def missing_blocks(plan: RecordPlan) -> list[int]:
    """The blocks that `decode_block` has still to write; none where the records are finished."""
    if plan.in_memory or finished(plan):
        return []
    there = {entry.uri.rpartition("/")[2] for entry in list_entries(plan.root)}
    return [block for block in range(plan.blocks) if _block_name(block) not in there]


def decode_block(plan: RecordPlan, block: int, uris: Sequence[str]) -> None:
    """Reads, decodes and stores the records of one block.

    Args:
        plan: of the records.
        block: 0 to `plan.blocks` - 1.
        uris: of the block's records, in order.

    Raises:
        ServiceError, StorageError, PermissionError: the storage, not an image, failed.
    """
    decode = functools.partial(_decode_record, plan.spec, plan.max_pixels)
    encoded = read_encoded(uris, plan.image_column)
    results = map_in_threads(decode, encoded, threads=_DECODE_THREADS, ahead=_DECODE_AHEAD)
    pixels = np.zeros((len(uris), *_shape(plan.spec)), np.uint8)
    status, error = [_OK] * len(uris), [""] * len(uris)
    for row, result in enumerate(results):
        if isinstance(result, ImageError):
            status[row], error[row] = result.status, result.message
        else:
            pixels[row] = result
    _write_block(plan, block, _Block(pixels, status, error, _digests(pixels)))


def finish(plan: RecordPlan, source: Source) -> None:
    """Turns the blocks into records that `open_records` opens; nothing to do where that has happened.

    Args:
        plan: of the records, no blocks missing.
        source: the plan's source.

    Raises:
        ServiceError: blocks are missing; the same command makes them.
        PermissionError, StorageError: see `storage`.
    """
    if not finished(plan):
        missing = missing_blocks(plan)
        if missing:
            raise ServiceError(f"{plan.root}: {len(missing)} of {plan.blocks} blocks are missing: {missing[:5]}")
        _log.info("storing %d decoded images (%s) in %s", plan.count, _gigabytes(plan.pixel_bytes), plan.root)
        _write_finished(plan, source)
    if not is_remote(plan.root):
        for block in range(plan.blocks):
            delete(join(plan.root, _block_name(block)))


def open_records(root: str, *, local_dir: Path) -> Records:
    """Opens finished records.

    Records on S3 are downloaded once per node: the first process to come assembles them, the others wait.

    Args:
        root: `RecordPlan.root`.
        local_dir: a folder of the node; used where `root` is remote.

    Raises:
        DataError: there are no finished records, or they are damaged.
        ConfigError: the node's disk has too little free space for them; with both sizes.
        PermissionError, ServiceError, StorageError: see `storage`.
    """
    folder = _local_copy(root, local_dir) if is_remote(root) else Path(absolute(root))
    description = _read_description(str(folder))
    spec = ImageSpec(**description["spec"])
    pixels = np.load(folder / _PIXELS, mmap_mode="r")
    index = pq.read_table(folder / _INDEX)
    expected = (description["count"], *_shape(spec))
    if pixels.shape != expected or pixels.dtype != np.uint8 or len(index) != len(pixels):
        raise DataError(
            f"{root}: the pixels are uint8 {list(expected)}. Received: {pixels.dtype} {list(pixels.shape)},"
            f" {len(index)} rows in the index; delete the folder to decode again"
        )
    return Records(pixels, index, tuple(description["class_names"]), spec)


def read_index(root: str) -> pa.Table:
    """The index of finished records alone (`Records.index`): what a driver needs, without their pixels.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `storage`.
    """
    return pq.read_table(pa.BufferReader(read_bytes(join(root, _INDEX))))


def fingerprint(index: pa.Table, class_names: Sequence[str]) -> str:
    """sha256 of the class names and of the readable records' digests and labels, in order; hex."""
    readable = index.filter(pc.equal(index["status"], _OK))
    sha = hashlib.sha256(json.dumps(list(class_names)).encode())
    sha.update("".join(readable["digest"].to_pylist()).encode())
    sha.update(readable["label"].to_numpy().astype("<i4").tobytes())
    return sha.hexdigest()


def bad_records(index: pa.Table) -> list[tuple[str, str, str]]:
    """URI, status and error of each record that is not readable."""
    bad = index.filter(pc.not_equal(index["status"], _OK))
    columns = (bad[name].to_pylist() for name in ("uri", "status", "error"))
    return list(zip(*columns, strict=True))


# --- blocks ----------------------------------------------------------------------------------------------------------


def _decode_record(spec: ImageSpec, max_pixels: int, data: bytes | ImageError) -> Pixels | ImageError:
    if isinstance(data, ImageError):
        return data
    try:
        return decode_image(data, spec, max_pixels=max_pixels).pixels
    except ImageError as err:
        return err


def _block_name(block: int) -> str:
    return f"block-{block:06d}.npz"


def _write_block(plan: RecordPlan, block: int, content: _Block) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        pixels=content.pixels,
        status=np.array(content.status, np.str_),
        error=np.array(content.error, np.str_),
        digest=np.array(content.digest, np.str_),
    )
    write_bytes(join(plan.root, _block_name(block)), buffer.getvalue())


def _read_block(root: str, block: int) -> _Block:
    uri = join(root, _block_name(block))
    with np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False) as file:
        return _Block(file["pixels"], *(file[name].tolist() for name in ("status", "error", "digest")))


def _array_block(plan: RecordPlan, pixels: Pixels) -> _Block:
    """A block of an array source: resized, nothing to decode."""
    native = match_channels(pixels, plan.spec.channels)
    if native.shape[1:] != _shape(plan.spec):
        native = np.stack([resize_pixels(image, plan.spec) for image in native])
    return _Block(native, [_OK] * len(native), [""] * len(native), _digests(native))


def _digests(pixels: Pixels) -> list[str]:
    shape = repr(pixels.shape[1:]).encode()
    return [hashlib.sha256(shape + image.tobytes()).hexdigest() for image in pixels]


# --- finished records ------------------------------------------------------------------------------------------------


def _write_finished(plan: RecordPlan, source: Source) -> None:
    """Pixels, then the index, then the mark that says they are complete."""
    blocks = _blocks(plan, source)
    if is_remote(plan.root):
        described = list(_written_blocks(plan, blocks))
    else:
        with _new_pixels(Path(plan.root) / _PIXELS, plan.count, plan.spec) as pixels:
            described = list(_copied_blocks(plan, blocks, pixels))
    buffer = io.BytesIO()
    pq.write_table(_index(source, described), buffer)
    write_bytes(join(plan.root, _INDEX), buffer.getvalue())
    description = {
        "version": _FORMAT_VERSION,
        "key": plan.key,
        "count": plan.count,
        "block_size": plan.block_size,
        "spec": asdict(plan.spec),
        "class_names": plan.class_names,
    }
    write_bytes(join(plan.root, _DONE), json.dumps(description, indent=1).encode())


def _blocks(plan: RecordPlan, source: Source) -> Iterator[_Block]:
    for block in range(plan.blocks):
        if source.pixels is not None:
            yield _array_block(plan, source.pixels[plan.block_rows(block)])
        else:
            yield _read_block(plan.root, block)


def _written_blocks(plan: RecordPlan, blocks: Iterator[_Block]) -> Iterator[_Block]:
    for block, content in enumerate(blocks):
        if plan.in_memory:
            _write_block(plan, block, content)
        yield _without_pixels(content)


def _copied_blocks(plan: RecordPlan, blocks: Iterator[_Block], pixels: Pixels) -> Iterator[_Block]:
    for block, content in enumerate(blocks):
        pixels[plan.block_rows(block)] = content.pixels
        yield _without_pixels(content)


def _without_pixels(content: _Block) -> _Block:
    return replace(content, pixels=content.pixels[:0].copy())


def _index(source: Source, described: Sequence[_Block]) -> pa.Table:
    status, error, digest = (
        list(itertools.chain.from_iterable(getattr(block, name) for block in described))
        for name in ("status", "error", "digest")
    )
    index = source.table.select(["uri", "label", "split"])
    index = index.append_column("status", pa.array(status, pa.string()))
    index = index.append_column("error", pa.array([message or None for message in error], pa.string()))
    return index.append_column("digest", pa.array(digest, pa.string()))


@contextlib.contextmanager
def _new_pixels(path: Path, count: int, spec: ImageSpec) -> Iterator[Pixels]:
    """An array `uint8 [N, H, W, C]` to fill, which becomes the file `path` when the block ends without an error."""
    with atomic_file(path) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *_shape(spec))}
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        file.truncate(offset + count * spec.image_bytes)
        file.flush()
        if hasattr(os, "posix_fallocate"):  # not on macOS
            # reserved, not only promised: on a full disk this raises, where a write to the map would kill the process
            os.posix_fallocate(file.fileno(), 0, offset + count * spec.image_bytes)
        pixels = np.memmap(file, np.uint8, "r+", offset, (count, *_shape(spec)))
        yield pixels
        pixels.flush()


def _read_description(root: str) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads(read_bytes(join(root, _DONE)))
    except FileNotFoundError as err:
        raise DataError(f"no finished records. Received: {root!r}") from err
    if description.get("version") != _FORMAT_VERSION:
        raise DataError(f"{root}: records of version {_FORMAT_VERSION}. Received: {description.get('version')}")
    return description


def _local_copy(root: str, local_dir: Path) -> Path:
    """Records of S3 in a folder of this node."""
    folder = local_dir / root.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with node_lock(folder / "lock"):
        if not (folder / _DONE).exists():
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed: nobody else holds the lock
                leftover.unlink(missing_ok=True)
            _download(root, folder)
    return folder


def _download(root: str, folder: Path) -> None:
    description = _read_description(root)
    spec, count, block_size = ImageSpec(**description["spec"]), description["count"], description["block_size"]
    check_free_space(folder, count * spec.image_bytes, "the decoded images")
    _log.info("downloading %d decoded images (%s)", count, _gigabytes(count * spec.image_bytes))
    with _new_pixels(folder / _PIXELS, count, spec) as pixels:
        for block, start in enumerate(range(0, count, block_size)):
            pixels[start : start + block_size] = _read_block(root, block).pixels
    for name in (_INDEX, _DONE):
        write_bytes(str(folder / name), read_bytes(join(root, name)))


@contextlib.contextmanager
def node_lock(path: Path) -> Iterator[None]:
    """Lets one process of this node in at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed, also by a killed process
        yield


# --- keys and sizes --------------------------------------------------------------------------------------------------


def _key(source: Source, spec: ImageSpec, max_pixels: int) -> str:
    sha = hashlib.sha256()
    head = [_FORMAT_VERSION, asdict(spec), max_pixels, source.class_names, source.image_column]
    sha.update(json.dumps(head, sort_keys=True).encode())
    for name in source.table.column_names:
        values = source.table[name].to_pylist()
        sha.update("\0".join(map(str, values)).encode())
        sha.update(b"\n")
    if source.pixels is not None:
        sha.update(np.ascontiguousarray(source.pixels).data)
    return sha.hexdigest()


def _shape(spec: ImageSpec) -> tuple[int, int, int]:
    return spec.height_px, spec.width_px, spec.channels


def check_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises ConfigError, with both sizes, where the folder's disk has too little room beside what the folder holds."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    held = [file for file in folder.glob("*") if not file.name.endswith(".tmp")] if folder.exists() else []
    held_bytes = sum(file.stat().st_size for file in held)
    free_bytes = shutil.disk_usage(there).free
    if needed_bytes - held_bytes > free_bytes:
        raise ConfigError(
            f"{folder}: {what} need {_gigabytes(needed_bytes - held_bytes)} of disk."
            f" Received: {_gigabytes(free_bytes)} free"
        )


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB"
