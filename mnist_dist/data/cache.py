"""Rows that are computed once and shared by all jobs: a folder of shards, named by a hash and memory-mapped to read.

Owns: the folder of a key, its shards (processes write them independently), the mark that completes it, the copy that
each node keeps of a cache on S3, and reading rows across shards. Does not own: what a row is (`data/records.py`,
`training/features.py`), or which process computes which shard (`on_ray/data`).

Layout of `<storage>/_<what>/<key>/`, where the key is a hash of everything that the rows depend on:

```
shard-NNNNNN.arrow   Arrow IPC, uncompressed so that it can be memory-mapped. Each shard is put in one step: if it
                     exists, it is complete, and writing it again does no harm.
<what>.json          The mark. It is written last: the cache is finished.
```
"""

# n = rows of a shard

import contextlib
import fcntl
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist import documents
from mnist_dist.data import markers
from mnist_dist.errors import ConfigError, DataError, ServiceError
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import is_remote, join

MAX_SHARDS = 4_096
"""Every reading process maps every shard, and Linux allows a process 65,530 memory maps by default."""
_ROW_SUFFIXES = (".arrow", ".parquet")  # Shards, and an index of the rows that may lie beside them.
_LARGE_ROW_BYTES = 16_384
"""Rows of at least this size are copied one by one, because grouping them by shard would copy each one twice."""


class ShardRows:
    """Reads rows across shards: `rows[numbers]` has the shape `[*numbers.shape, ...]` (see `feed.Rows`).

    Args:
        shards: `[n, ...]` each, in order; n is the same for all but the last.
    """

    def __init__(self, shards: Sequence[npt.NDArray[Any]]) -> None:
        self._shards = shards

    @property
    def shape(self) -> tuple[int, ...]:
        """`[all rows, ...]`."""
        return sum(map(len, self._shards)), *self._shards[0].shape[1:]

    def __getitem__(self, numbers: npt.NDArray[np.integer[Any]] | int, /) -> npt.NDArray[Any]:
        first = self._shards[0]
        if len(self._shards) == 1:
            return np.asarray(first[numbers])
        shard_of, places = np.divmod(np.reshape(numbers, -1), len(first))
        shard_of = shard_of.astype(np.uint16)  # NumPy sorts 16-bit integers in linear time.
        rows = np.empty((len(places), *first.shape[1:]), first.dtype)
        if first[0].nbytes >= _LARGE_ROW_BYTES:
            for row, (shard, place) in enumerate(zip(shard_of.tolist(), places.tolist(), strict=True)):
                rows[row] = self._shards[shard][place]
            return rows.reshape(*np.shape(numbers), *first.shape[1:])
        shards, counts = np.unique(shard_of, return_counts=True)
        order = np.argsort(shard_of, kind="stable")
        for shard, group in zip(shards, np.split(order, np.cumsum(counts)[:-1]), strict=False):
            rows[group] = self._shards[shard][places[group]]
        return rows.reshape(*np.shape(numbers), *first.shape[1:])


@dataclass(frozen=True)
class CacheMark:
    """The content of the file that completes a cache."""

    key: str
    description: Any
    """Describes the rows, for people."""
    made: str = ""
    """Random id of this build. A rebuild of the same key may hold other rows, if an image could not be read before."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where the rows of a key lie. Plain data that any process can use."""

    what: str
    """What the rows are, in the plural; the folder and the mark are named after it."""
    storage: str
    """Absolute folder or bucket prefix of the job."""
    key: str
    """Hex sha256 of everything that the rows depend on."""
    rows: int
    min_shard_rows: int
    """Rows per shard; raised where it would make more than `MAX_SHARDS` shards."""
    store: Store = field(default=ANYWHERE, compare=False, repr=False)

    @property
    def root(self) -> str:
        """URI of the folder of this key."""
        return join(self.storage, f"_{self.what}", self.key[:16])

    @property
    def shard_rows(self) -> int:
        """Rows per shard; the last shard holds the remainder."""
        return max(self.min_shard_rows, -(-self.rows // MAX_SHARDS))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> slice:
        """Range of row numbers that a shard holds."""
        return slice(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def is_finished(self) -> bool:
        """Whether the cache is complete and can be opened."""
        return self.store.exists(self._mark)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not stored yet; empty if the cache is finished."""
        names = {entry.uri.rpartition("/")[2] for entry in self.store.list_entries(self.root)}
        if f"{self.what}.json" in names:
            return []
        return [shard for shard in range(self.shards) if _shard_name(shard) not in names]

    def put(self, shard: int, table: pa.Table) -> None:
        """Stores a shard in one step.

        Raises:
            PermissionError, ServiceError, StorageError: see `store.base`.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        self.store.write_bytes(join(self.root, _shard_name(shard)), sink.getvalue().to_pybytes())

    def check_complete(self) -> None:
        """Raises ServiceError if shards are missing; running the same command makes them."""
        missing = self.missing()
        if missing:
            raise ServiceError(f"{self.root}: {len(missing)} of {self.shards} shards are missing: {missing[:5]}")

    def finish(self, description: Any) -> None:
        """Marks the cache as finished; does nothing if it is finished already.

        Args:
            description: describes the rows, for people; a dataclass.

        Raises:
            ServiceError: shards are missing; running the same command makes them.
        """
        if not self.is_finished():
            self.check_complete()
            documents.write(self.store, self._mark, CacheMark(self.key, description, made=uuid.uuid4().hex))
            for entry in self.store.list_entries(self.root):  # Markers that failed and killed runs left.
                if entry.uri.endswith(markers.SUFFIXES):
                    self.store.delete(entry.uri)

    def discard(self) -> None:
        """Deletes the cache, mark first. A job that has it open keeps the rows that it has mapped or copied."""
        self.store.delete(self._mark)
        self.store.delete_tree(self.root)

    def on_node(self, local_dir: Path) -> "Cache":
        """Returns the finished cache where this node can map it: this cache, or a local copy of one on S3.

        The first process on the node makes the copy; the others wait for it.

        Args:
            local_dir: a folder on the node.

        Raises:
            DataError: the cache is unfinished, damaged, or has another key.
            ConfigError: the node's disk has too little free space; the message gives both sizes.
            PermissionError, ServiceError, StorageError: see `store.base`.
        """
        if not is_remote(self.storage):
            self._checked_mark()
            return self
        local = replace(self, storage=str(local_dir))
        Path(local.root).mkdir(parents=True, exist_ok=True)
        with _node_lock(Path(local.root) / "lock"):
            mark = self._checked_mark()
            if not local.is_finished() or self.store.read_bytes(local._mark) != mark:
                self._download(Path(local.root), mark)
        return local

    def read(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """Reads columns of a shard, memory-mapped if it is local.

        Raises:
            DataError: the shard is damaged.
            FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
        """
        uri = join(self.root, _shard_name(shard))
        data = self.store.read_bytes(uri) if is_remote(uri) else None
        try:
            with pa.memory_map(uri) if data is None else pa.BufferReader(data) as file:
                table = pa.ipc.open_file(file).read_all().select(columns)
        except (OSError, pa.ArrowInvalid, KeyError) as err:
            raise DataError(f"{self.root}: shard {shard} is damaged: {err}; delete the folder") from err
        expected = len(range(self.rows)[self.rows_of(shard)])
        if len(table) != expected:
            raise DataError(
                f"{self.root}: shard {shard} needs {expected} rows. Received: {len(table)}; delete the folder"
            )
        return table

    def values(self, column: str) -> list[npt.NDArray[Any]]:
        """The arrays `[n, width]` that `column_of` stored, one per shard; raises as `read` does."""
        lists = [self.read(shard, [column])[0].chunk(0) for shard in range(self.shards)]
        return [rows.values.to_numpy(zero_copy_only=True).reshape(len(rows), -1) for rows in lists]

    @property
    def _mark(self) -> str:
        return join(self.root, f"{self.what}.json")

    def _checked_mark(self) -> bytes:
        try:
            mark = self.store.read_bytes(self._mark)
            key = documents.decode(mark, CacheMark, uri=self._mark).key
        except FileNotFoundError as err:
            raise DataError(f"there are no finished {self.what}. Received: {self.root!r}") from err
        except DataError as err:
            raise DataError(f"{err}; delete the folder") from err
        if key != self.key:
            raise DataError(f"{self.root}: expected {self.what} of {self.key}. Received: {key}; delete the folder")
        return mark

    def _download(self, folder: Path, mark: bytes) -> None:
        Path(folder / f"{self.what}.json").unlink(missing_ok=True)  # An older copy.
        for leftover in folder.glob(".*.tmp"):  # A killed process left these; we hold the lock, so none is in use.
            leftover.unlink(missing_ok=True)
        entries = [entry for entry in self.store.list_entries(self.root) if entry.uri.endswith(_ROW_SUFFIXES)]
        check_free_space(folder, sum(entry.size_bytes for entry in entries), f"the {self.what}")
        for entry in entries:
            self.store.write_bytes(str(folder / entry.uri.rpartition("/")[2]), self.store.read_bytes(entry.uri))
        if self._checked_mark() != mark:
            raise ServiceError(f"{self.root}: it was made again while it was copied; run the same command to resume")
        self.store.write_bytes(str(folder / f"{self.what}.json"), mark)


def column_of(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """Turns an array `[n, ...]` into a column of flat rows."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), int(np.prod(values.shape[1:])))


def check_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises ConfigError, with both sizes, if the disk of `folder` lacks room for what the folder does not hold yet."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    held_bytes = 0
    for file in folder.glob("*"):
        if file.name.endswith(_ROW_SUFFIXES):
            with contextlib.suppress(FileNotFoundError):  # Another job may be deleting the folder.
                held_bytes += file.stat().st_size
    missing_bytes = needed_bytes - held_bytes
    free_bytes = shutil.disk_usage(existing).free
    if missing_bytes > free_bytes:
        raise ConfigError(
            f"{folder}: {what} need {missing_bytes / 1e9:.3g} GB of disk. Received: {free_bytes / 1e9:.3g} GB free"
        )


@contextlib.contextmanager
def _node_lock(path: Path) -> Iterator[None]:
    """Admits one process of this node at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # Closing the file releases the lock, even if the process is killed.
        yield


def _shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.arrow"
