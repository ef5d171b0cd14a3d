"""Rows computed once and shared by every job: a content-keyed folder of shards, memory-mapped wherever it is read.

Owns: the folder of a key, the shards that processes write independently of each other, the mark that says they are
complete, the copy on each node of what lies on S3, and reading rows across shards. Does not own: what a row is
(`data/records.py`, `training/features.py`), or who computes which shard where (`on_ray/data`).

Below `<storage>/_<what>/<key>/`, the key a hash of everything that the rows depend on:

```
shard-NNNNNN.arrow   Arrow IPC, uncompressed, to be memory-mapped; one atomic put each; that it exists means it is
                     done, writing it twice is harmless
<what>.json          the mark, written last: the cache is finished
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
"""Each is a memory map of every process that reads; Linux gives a process 65,530."""
_ROWS = (".arrow", ".parquet")  # an index of the rows may lie beside them
_LARGE_ROW_BYTES = 16_384
"""From here on a row costs more to copy twice than to be fetched by a call of its own."""


class ShardRows:
    """Rows across shards: `rows[numbers]` is `[*numbers.shape, ...]` (see `feed.Rows`).

    Args:
        shards: `[n, ...]` each, in order; all but the last one have the same n.
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
        of_shard, places = np.divmod(np.reshape(numbers, -1), len(first))
        of_shard = of_shard.astype(np.uint16)  # of so few bits, which NumPy sorts in linear time
        found = np.empty((len(places), *first.shape[1:]), first.dtype)
        if first[0].nbytes >= _LARGE_ROW_BYTES:
            for row, (shard, place) in enumerate(zip(of_shard.tolist(), places.tolist(), strict=True)):
                found[row] = self._shards[shard][place]
            return found.reshape(*np.shape(numbers), *first.shape[1:])
        shards, counts = np.unique(of_shard, return_counts=True)
        order = np.argsort(of_shard, kind="stable")
        for shard, some in zip(shards, np.split(order, np.cumsum(counts)[:-1]), strict=False):
            found[some] = self._shards[shard][places[some]]
        return found.reshape(*np.shape(numbers), *first.shape[1:])


@dataclass(frozen=True)
class CacheMark:
    """What completes a cache."""

    key: str
    description: Any
    """Of the rows, for people."""
    made: str = ""
    """A random name of this making: the same key made again may hold other rows, where an image could not be read."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where the rows of a key lie: plain data for any process."""

    what: str
    """What the rows are, in the plural: names the folder and the mark."""
    storage: str
    """Folder or `s3://` prefix of the job, absolute."""
    key: str
    """sha256 of everything that the rows depend on, hex."""
    rows: int
    min_shard_rows: int
    """Rows of each shard, unless these would be more than `MAX_SHARDS`."""
    store: Store = field(default=ANYWHERE, compare=False, repr=False)

    @property
    def root(self) -> str:
        """URI of the folder."""
        return join(self.storage, f"_{self.what}", self.key[:16])

    @property
    def shard_rows(self) -> int:
        """Rows of each shard; the last one has what is left."""
        return max(self.min_shard_rows, -(-self.rows // MAX_SHARDS))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> slice:
        """The rows of a shard."""
        return slice(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def is_finished(self) -> bool:
        """Whether the cache can be opened."""
        return self.store.exists(self._mark)

    def missing(self) -> list[int]:
        """The shards that are still to be put; none where the cache is finished."""
        there = {entry.uri.rpartition("/")[2] for entry in self.store.list_entries(self.root)}
        if f"{self.what}.json" in there:
            return []
        return [shard for shard in range(self.shards) if _shard_name(shard) not in there]

    def put(self, shard: int, table: pa.Table) -> None:
        """Stores a shard, whole or not at all.

        Raises:
            PermissionError, ServiceError, StorageError: see `store.base`.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        self.store.write_bytes(join(self.root, _shard_name(shard)), sink.getvalue().to_pybytes())

    def check_complete(self) -> None:
        """Raises ServiceError where shards are missing; the same command makes them."""
        missing = self.missing()
        if missing:
            raise ServiceError(f"{self.root}: {len(missing)} of {self.shards} shards are missing: {missing[:5]}")

    def finish(self, description: Any) -> None:
        """Marks the cache as finished; nothing to do where that has happened.

        Args:
            description: of the rows, for people: a dataclass.

        Raises:
            ServiceError: shards are missing; the same command makes them.
        """
        if not self.is_finished():
            self.check_complete()
            documents.write(self.store, self._mark, CacheMark(self.key, description, made=uuid.uuid4().hex))
            for entry in self.store.list_entries(self.root):  # what failed and killed runs left
                if entry.uri.endswith(markers.SUFFIXES):
                    self.store.delete(entry.uri)

    def discard(self) -> None:
        """Deletes the cache, its mark first; a job that has opened it keeps what it has mapped or copied."""
        self.store.delete(self._mark)
        self.store.delete_tree(self.root)

    def on_node(self, local_dir: Path) -> "Cache":
        """The finished cache where this node can map it: itself, or a copy of what lies on S3.

        The first process of the node to come makes the copy, the others wait.

        Args:
            local_dir: a folder of the node.

        Raises:
            DataError: the cache is not finished, damaged, or of another key.
            ConfigError: the node's disk has too little free space for it; with both sizes.
            PermissionError, ServiceError, StorageError: see `store.base`.
        """
        here = self
        if is_remote(self.storage):
            here = replace(self, storage=str(local_dir))
            Path(here.root).mkdir(parents=True, exist_ok=True)
            with _node_lock(Path(here.root) / "lock"):
                mark = self._checked_mark()
                if not here.is_finished() or self.store.read_bytes(here._mark) != mark:
                    self._download(Path(here.root), mark)
                here._checked_mark()
            return here
        here._checked_mark()
        return here

    def read(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """Columns of a shard; memory-mapped where it is local.

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
            raise DataError(f"{self.root}: damaged: {err}; delete the folder to make it again") from err
        expected = len(range(self.rows)[self.rows_of(shard)])
        if len(table) != expected:
            raise DataError(
                f"{self.root}: shard {shard} has {expected} rows. Received: {len(table)}; delete the folder"
            )
        return table

    def values(self, column: str) -> list[npt.NDArray[Any]]:
        """The arrays, `[n, width]`, that `column_of` made a column of; see `read`."""
        lists = [self.read(shard, [column])[0].chunk(0) for shard in range(self.shards)]
        return [one.values.to_numpy(zero_copy_only=True).reshape(len(one), -1) for one in lists]

    @property
    def _mark(self) -> str:
        return join(self.root, f"{self.what}.json")

    def _checked_mark(self) -> bytes:
        try:
            mark = self.store.read_bytes(self._mark)
            found = documents.decode(mark, CacheMark, uri=self._mark).key
        except FileNotFoundError as err:
            raise DataError(f"no finished {self.what}. Received: {self.root!r}") from err
        except DataError as err:
            raise DataError(f"{err}; delete the folder") from err
        if found != self.key:
            raise DataError(f"{self.root}: {self.what} of {self.key}. Received: {found}; delete the folder")
        return mark

    def _download(self, folder: Path, mark: bytes) -> None:
        Path(folder / f"{self.what}.json").unlink(missing_ok=True)  # the copy of a cache that was made before
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed: nobody else holds the lock
            leftover.unlink(missing_ok=True)
        entries = [entry for entry in self.store.list_entries(self.root) if entry.uri.endswith(_ROWS)]
        check_free_space(folder, sum(entry.size_bytes for entry in entries), f"the {self.what}")
        for entry in entries:
            self.store.write_bytes(str(folder / entry.uri.rpartition("/")[2]), self.store.read_bytes(entry.uri))
        if self._checked_mark() != mark:
            raise ServiceError(f"{self.root}: it was made again while it was copied; run the same command to resume")
        self.store.write_bytes(str(folder / f"{self.what}.json"), mark)


def column_of(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """An array `[n, ...]` as a column of flat rows."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), int(np.prod(values.shape[1:])))


def check_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises ConfigError, with both sizes, where the folder's disk has too little room beside what the folder holds."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    held_bytes = 0
    for file in folder.glob("*"):
        if file.name.endswith(_ROWS):
            with contextlib.suppress(FileNotFoundError):  # another job clears the folder away
                held_bytes += file.stat().st_size
    missing_bytes = needed_bytes - held_bytes
    free_bytes = shutil.disk_usage(there).free
    if missing_bytes > free_bytes:
        raise ConfigError(
            f"{folder}: {what} need {missing_bytes / 1e9:.3g} GB of disk. Received: {free_bytes / 1e9:.3g} GB free"
        )


@contextlib.contextmanager
def _node_lock(path: Path) -> Iterator[None]:
    """Lets one process of this node in at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed, also by a killed process
        yield


def _shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.arrow"
