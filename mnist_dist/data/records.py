"""Images decoded once: a cache (`data/cache.py`) of uint8 pixels with one row per record of a source.

Owns: the key (everything that the pixels depend on), and what a shard and the index hold. Does not own: where
`decode_shard` runs (`on_ray` maps it over the missing shards), or the splits.

A shard has the columns pixels, status, error and digest, and thumbnail where images are large enough for one. Beside
the shards lie `index.parquet`: uri, label, split, status, error and digest of all records, in row order, and
`thumbnails.parquet`, which only the check for near-duplicates reads. An image that cannot be decoded becomes a row with
a status and zero pixels, never an exception.
"""

# N = records, n = records of a shard, H = height px, W = width px, C = channels

import functools
import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnist_dist.config import DecodeConfig
from mnist_dist.data.cache import Cache, ShardRows, check_free_space, column_of
from mnist_dist.data.decoding import Collector, DecodePool, Threads
from mnist_dist.data.near_duplicates import MIN_SIDE_PX, thumbnails_of
from mnist_dist.errors import DataError, ImageError
from mnist_dist.images.pixels import Pixels, match_channels, resize_pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.sources.label_sets import LabelSets, members
from mnist_dist.sources.source import Source
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import absolute, is_remote, join

_log = logging.getLogger(__name__)
_FORMAT_VERSION = 5
_SHARD_BYTES = 32 * 2**20
_MIN_ROWS, _MAX_ROWS = 64, 65_536
_DECODE_THREADS = 2  # of a task, which has one core: reading waits for storage
_INDEX, _THUMBNAILS = "index.parquet", "thumbnails.parquet"
_OK = "ok"
_KEY_COLUMNS, _KEY_ROWS = ("uri", "label", "split", "size_bytes", "etag"), 100_000
_DESCRIBED = ("status", "error", "digest")
_THUMBNAIL = "thumbnail"


@dataclass(frozen=True, kw_only=True)
class RecordPlan:
    """What to decode, into what and where. Plain data that any process can use."""

    cache: Cache
    spec: ImageSpec
    limits: DecodeConfig
    class_names: tuple[str, ...]
    label_sets: LabelSets = ()
    """The classes of each label, where images have any number of them; empty: a label is a class."""


@dataclass(frozen=True)
class Records:
    """Finished records, opened by one process."""

    pixels: ShardRows
    """`uint8 [N, H, W, C]`, 0-255, memory-mapped; an unreadable record is all zeros."""
    index: pa.Table
    """One row per record: uri, label, split, status (`ok`, or what went wrong), error, digest (hex)."""
    class_names: tuple[str, ...]
    spec: ImageSpec
    label_sets: LabelSets = ()

    @functools.cached_property
    def members(self) -> npt.NDArray[np.bool_] | None:
        """`bool [L, K]`, whether a class is in the set of a label; None: each image has one class."""
        return members(self.label_sets, len(self.class_names)) if self.label_sets else None


def plan_records(source: Source, spec: ImageSpec, *, storage: str, limits: DecodeConfig) -> RecordPlan:
    """Plans the decoding of a source and checks that local storage has room for the result.

    Args:
        source: what to decode.
        spec: what each image becomes.
        storage: folder or bucket prefix of the job.
        limits: larger images, and those that take longer to decode, are unreadable.

    Raises:
        ConfigError: local storage has too little free space; the message gives both sizes.
    """
    cache = Cache(
        what="records",
        storage=absolute(storage),
        key=_key(source, spec, limits),
        rows=len(source.table),
        min_shard_rows=min(max(_SHARD_BYTES // spec.image_bytes, _MIN_ROWS), _MAX_ROWS),
    )
    if not is_remote(cache.root) and not cache.is_finished():
        check_free_space(Path(cache.root), cache.rows * spec.image_bytes, "the decoded images")
    return RecordPlan(
        cache=cache,
        spec=spec,
        limits=limits,
        class_names=source.class_names,
        label_sets=source.label_sets,
    )


def decode_shard(
    plan: RecordPlan, shard: int, rows: pa.Table, *, isolated: bool = False, store: Store = ANYWHERE
) -> None:
    """Reads, decodes and stores the records of one shard.

    Args:
        plan: the plan of the records.
        shard: 0 to `plan.cache.shards` - 1.
        rows: the shard's rows of the source's table.
        isolated: decode one image at a time in a child process, because an image seems to kill processes.
        store: the store to read the images from.

    Raises:
        DecoderStuck: an image takes longer than the limit.
        ServiceError, StorageError, PermissionError: the storage failed, not an image.
    """
    collector = Collector(len(rows))
    threads = Threads(decoding=_DECODE_THREADS)
    with DecodePool(plan.spec, config=plan.limits, threads=threads, store=store) as pool:
        pool.begin(rows, collector, isolated=isolated)
        collector.wait(pool)
    pixels = np.zeros((len(rows), *plan.spec.shape), np.uint8)
    errors: dict[int, ImageError] = {}
    for row, image in enumerate(collector.images):
        if isinstance(image, ImageError):
            errors[row] = image
        else:
            pixels[row] = image.pixels
    _put(plan, shard, pixels, errors)


def finish(plan: RecordPlan, source: Source) -> None:
    """Completes the records so that `open_records` can open them; does nothing if they are finished already.

    Args:
        plan: the plan of the records. All shards must exist, except for an array source, whose shards are made here.
        source: the source that was planned.

    Raises:
        ServiceError: shards are missing; running the same command makes them.
        PermissionError, StorageError: see `store.base`.
    """
    cache = plan.cache
    if cache.is_finished():
        return
    if source.pixels is not None:
        for shard in cache.missing():
            _put(plan, shard, _fitted(source.pixels[cache.rows_of(shard)], plan.spec), {})
    cache.check_complete()
    _log.info("%d decoded images are in %s", cache.rows, cache.root)
    index = source.table.select(["uri", "label", "split"])
    has_thumbnails = min(plan.spec.height_px, plan.spec.width_px) >= MIN_SIDE_PX
    wanted = (*_DESCRIBED, _THUMBNAIL) if has_thumbnails else _DESCRIBED
    tables = (cache.read(shard, wanted) for shard in range(cache.shards))
    described = pa.concat_tables(table.take(np.arange(len(table))) for table in tables)  # Copies drop the pixels.
    for name in _DESCRIBED:
        index = index.append_column(name, described[name])
    if has_thumbnails:
        _write(cache, _THUMBNAILS, described.select([_THUMBNAIL]))
    _write(cache, _INDEX, index)
    cache.finish(plan.spec)


def open_records(plan: RecordPlan, *, local_dir: Path) -> Records:
    """Opens finished records. Records on S3 are downloaded once per node.

    Args:
        plan: the plan of the records.
        local_dir: a folder on the node, used if the storage is remote.

    Raises:
        DataError: the records are unfinished or damaged.
        ConfigError: the node's disk has too little free space; the message gives both sizes.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    cache = plan.cache.on_node(local_dir)
    pixels = [flat.reshape(-1, *plan.spec.shape) for flat in cache.values("pixels")]
    return Records(ShardRows(pixels), read_index(cache), plan.class_names, plan.spec, plan.label_sets)


def read_index(cache: Cache) -> pa.Table:
    """Reads only the index of finished records (`Records.index`), which is all that a driver needs.

    Raises:
        DataError: the index does not fit the records.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    index = pq.read_table(pa.BufferReader(cache.store.read_bytes(join(cache.root, _INDEX))))
    if len(index) != cache.rows:
        raise DataError(f"{cache.root}: {_INDEX} needs {cache.rows} rows. Received: {len(index)}; delete the folder")
    return index


def read_thumbnails(plan: RecordPlan) -> npt.NDArray[np.uint8] | None:
    """The thumbnails of finished records (`near_duplicates.thumbnails_of`), `uint8 [N, 256]`; None: there are none.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    if min(plan.spec.height_px, plan.spec.width_px) < MIN_SIDE_PX:
        return None
    data = plan.cache.store.read_bytes(join(plan.cache.root, _THUMBNAILS))
    table = pq.read_table(pa.BufferReader(data))
    return np.frombuffer(b"".join(table[_THUMBNAIL].to_pylist()), np.uint8).reshape(len(table), -1)


def fingerprint(index: pa.Table, class_names: Sequence[str], label_sets: LabelSets = ()) -> str:
    """Hex sha256 of the classes and of the digests and labels of the readable records, in the order of both."""
    readable = index.filter(pc.equal(index["status"], _OK)).sort_by([("digest", "ascending"), ("label", "ascending")])
    sha = hashlib.sha256(json.dumps([*class_names, *label_sets]).encode())
    sha.update("".join(readable["digest"].to_pylist()).encode())
    sha.update(readable["label"].to_numpy().astype("<i4").tobytes())
    return sha.hexdigest()


def bad_records(index: pa.Table) -> list[tuple[str, str, str]]:
    """URI, status and error of each unreadable record."""
    bad = index.filter(pc.not_equal(index["status"], _OK))
    columns = (bad[name].to_pylist() for name in ("uri", "status", "error"))
    return list(zip(*columns, strict=True))


def _fitted(pixels: Pixels, spec: ImageSpec) -> Pixels:
    """Images of an array source at the size and channels of `spec`; there is nothing to decode."""
    fitted = match_channels(pixels, spec.channels)
    is_same = spec.resize_px is None and fitted.shape[1:] == spec.shape
    return fitted if is_same else np.stack([resize_pixels(image, spec) for image in fitted])


def _write(cache: Cache, name: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    cache.store.write_bytes(join(cache.root, name), buffer.getvalue())


def _put(plan: RecordPlan, shard: int, pixels: Pixels, errors: dict[int, ImageError]) -> None:
    failed = [errors.get(row) for row in range(len(pixels))]
    shape = repr(plan.spec.shape).encode()
    columns = {
        "pixels": column_of(pixels),
        "status": pa.array([error.status if error else _OK for error in failed], pa.string()),
        "error": pa.array([error.message if error else None for error in failed], pa.string()),
        "digest": pa.array([hashlib.sha256(shape + image.tobytes()).hexdigest() for image in pixels], pa.string()),
    }
    thumbnails = thumbnails_of(pixels)
    if thumbnails.shape[1]:
        columns[_THUMBNAIL] = pa.array([each.tobytes() for each in thumbnails], pa.binary(thumbnails.shape[1]))
    plan.cache.put(shard, pa.table(columns))


def _key(source: Source, spec: ImageSpec, limits: DecodeConfig) -> str:
    sha = hashlib.sha256()
    head = [_FORMAT_VERSION, asdict(spec), asdict(limits), source.class_names, source.label_sets]
    sha.update(json.dumps(head, sort_keys=True).encode())
    for name in _KEY_COLUMNS:
        for batch in source.table.select([name]).to_batches(max_chunksize=_KEY_ROWS):
            sha.update("".join(f"{value}\0" for value in batch.column(0).to_pylist()).encode())
        sha.update(b"\n")
    if source.pixels is not None:
        sha.update(np.ascontiguousarray(source.pixels).data)
    return sha.hexdigest()
