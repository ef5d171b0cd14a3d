"""The manifest: the frozen work list of a scoring job, one row per image in a fixed order, cut into shards.

Owns: the columns of the manifest, the number of images per shard, and the file. Does not own: where the rows come from
(`sources/listing.py`, `selection`), or which shards are done (`generations`).

The file has one Parquet row group per shard, so that a worker reads only its own shard. It is written once per
generation, which scores exactly these rows; the input is not listed again.
"""

import itertools
import threading

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnist_dist.sources.image_table import COLUMNS, with_columns
from mnist_dist.sources.reading import TINY_BYTES
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import is_remote, path_of

SHARD = pa.field("shard", pa.int32(), nullable=False)

MIN_SHARD, MAX_SHARD, MAX_SHARDS = 256, 4_096, 10_000  # images per shard, shards per manifest
MIN_TINY_SHARD = 1_024  # of images of at most `TINY_BYTES`: a smaller one takes less time than its task and its file
TARGET_SHARDS = 64  # of a small job: enough to spread over workers, and little is lost with one
SHARD_BYTES = 256 * 2**20  # of encoded images, which a killed worker has to read and decode again


def carried_schema(table: pa.Table) -> pa.Schema:
    """The carried columns of a table of images, which are copied into the output."""
    return pa.schema([field for field in table.schema if field.name not in COLUMNS.names])


class Manifest:
    """A manifest file, read shard by shard; safe for several threads. Leaving the context closes the file."""

    def __init__(self, uri: str, *, store: Store = ANYWHERE) -> None:
        self._bytes = store.open_binary(uri)
        self._file = pq.ParquetFile(self._bytes)
        self._lock = threading.Lock()

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._bytes.close()

    @property
    def shards(self) -> int:
        return int(self._file.num_row_groups)

    @property
    def rows(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def carried(self) -> pa.Schema:
        """The schema of the carried columns."""
        own = {*COLUMNS.names, SHARD.name}
        return pa.schema([field for field in self._file.schema_arrow if field.name not in own])

    def shard_rows(self, shard: int) -> int:
        """The number of images in a shard."""
        return int(self._file.metadata.row_group(shard).num_rows)

    def read(self, shard: int) -> pa.Table:
        """The rows of a shard. A column that the file is too old to have is empty."""
        with self._lock:
            rows = self._file.read_row_group(shard)
        return with_columns(rows, COLUMNS)


def write_manifest(uri: str, table: pa.Table, *, shard_size: int, store: Store = ANYWHERE) -> None:
    """Writes the manifest, cut into shards of nearly equal size.

    Args:
        uri: URI of the file.
        table: `COLUMNS`, then the carried columns.
        shard_size: maximum number of images per shard. A compressed archive can only be read from its start, and is one
            shard of any size.
        store: the store to write to.
    """
    bounds = shard_bounds(table, shard_size=shard_size)
    with store.new_object(uri) as file, pq.ParquetWriter(file, table.schema.append(SHARD)) as writer:
        for shard, (start, end) in enumerate(itertools.pairwise(bounds)):
            rows = table.slice(start, end - start)
            writer.write_table(
                rows.append_column(SHARD, pa.repeat(pa.scalar(shard, SHARD.type), len(rows))), row_group_size=len(rows)
            )
    if not is_remote(uri) and table["address"].null_count < len(table):
        path_of(uri).chmod(0o600)  # The addresses may hold passwords and signatures. The file is deleted with the job.


def shard_bounds(table: pa.Table, *, shard_size: int) -> list[int]:
    """The first row of each shard, then the number of rows; see `write_manifest`."""
    bounds = [0]
    edges = _stream_edges(table)
    for start, end in itertools.pairwise(edges):
        is_stream = table["packing"][start].as_py() == "stream"
        shards = 1 if is_stream else -(-(end - start) // shard_size)
        bounds += [start + (end - start) * (k + 1) // shards for k in range(shards)]
    return bounds


def choose_shard_size(rows: int, *, total_bytes: int, most: int = MAX_SHARD) -> int:
    """Images per shard: 256 to 4,096, by the number of images and their bytes; more only to stay at 10,000 shards. Tiny
    images, which are read and decoded in no time, are at least 1,024.

    Args:
        rows: number of rows of the manifest.
        total_bytes: size of the encoded images, as far as it is known.
        most: a lower maximum, for shards whose decoded pixels travel between processes.
    """
    by_bytes = SHARD_BYTES * rows // max(total_bytes, 1)
    least = MIN_TINY_SHARD if 0 < total_bytes <= TINY_BYTES * rows else MIN_SHARD
    wanted = max(least, min(rows // TARGET_SHARDS, by_bytes, MAX_SHARD))
    return max(min(wanted, most), -(-rows // MAX_SHARDS))


def _stream_edges(table: pa.Table) -> list[int]:
    """The rows where a compressed archive begins or ends, with 0 and the number of rows."""
    rows = len(table)
    if rows == 0:
        return [0]
    is_stream = pc.fill_null(pc.equal(table["packing"], "stream"), False)
    if not pc.any(is_stream).as_py():
        return [0, rows]
    mask: npt.NDArray[np.bool_] = is_stream.to_numpy()
    owner = np.full(rows, "", dtype=object)
    owner[mask] = table["archive"].filter(is_stream).to_numpy()  # filtered first: one string array holds at most 2 GiB
    changes = np.flatnonzero(owner[1:] != owner[:-1]) + 1
    return [0, *changes.tolist(), rows]
