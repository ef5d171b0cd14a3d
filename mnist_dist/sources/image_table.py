"""The rows of a listing as an Arrow table: collected in batches, sorted, without duplicates.

Owns: converting rows to Arrow, their order, duplicates and samples. Does not own: which rows there are (`listing`).

Contract: no row stays a Python object for longer than its batch, and no array grows with the table. Hence ten million
rows fit into memory, and a column may hold more than the 2 GiB of a single Arrow string array. A table that is already
sorted or without duplicates is returned as it is, not copied.
"""

import collections
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.errors import DataError

# N = rows of a table

OTHER_FILE = "other_file"
"""The column that is true for a file that only `all_files` took: its name is not that of an image, and no one named it.
Also the status of its row if it cannot be scored."""
COLUMNS = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),  # path, s3://bucket/key, or archive.tar!member
        ("size_bytes", pa.int64()),  # null: unknown until it is read
        ("etag", pa.string()),  # null: unknown until it is read; for a member: that of its archive
        # only for images in a container: where the bytes lie (`archives`, `parquet`, `arrays`)
        ("archive", pa.string()),  # the container; of arrays the folder of their files, or empty
        ("packing", pa.string()),
        ("offset", pa.int64()),  # in bytes; the number of a row
        ("stored_bytes", pa.int64()),  # in an archive; of a Parquet file the first row of the row group
        ("crc32", pa.int64()),
        # only for images known to be unusable before they are read
        ("status", pa.string()),
        ("error", pa.string()),
        # only where the URI or archive is a URL with secrets, which is shown without them: what is really read
        ("address", pa.string()),
        # true only for a file that does not claim to be an image (`choice`)
        (OTHER_FILE, pa.bool_()),
    ]
)
"""The columns of the manifest; the columns carried from a list follow, then `shard`."""
BATCH_ROWS = 50_000
_NO_SUFFIX = ""
_SUFFIX = r"(?P<suffix>\.[^./!?]*?)(?:#row=[0-9]+|\?.*)?$"  # without the number of a row, or the query of a URL
_WIDE = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}


class ImageRow(NamedTuple):
    """One row of the manifest, in the order of `COLUMNS`; see `waits`."""

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    archive: str | None = None
    packing: str | None = None
    offset: int | None = None
    stored_bytes: int | None = None
    crc32: int | None = None
    status: str | None = None
    error: str | None = None
    address: str | None = None
    other_file: bool | None = None

    @property
    def waits(self) -> bool:
        """Whether its archive must still be opened, for this member or, if it names the archive, for all members."""
        return self.archive is not None and self.packing is None and self.status is None


class WaitingRows(NamedTuple):
    """Adjacent rows that wait for the same archive."""

    archive: str
    start: int
    stop: int


def table_of(rows: Iterable[ImageRow]) -> pa.Table:
    """The rows as a table of `COLUMNS`."""
    return pa.Table.from_batches([batch_of(batch) for batch in in_batches(rows, BATCH_ROWS)], COLUMNS)


def batch_of(rows: Sequence[ImageRow]) -> pa.RecordBatch:
    """At most `BATCH_ROWS` rows. A name that is not valid Unicode is escaped, and its row is `unsupported`."""
    try:
        return _batch_of(rows)
    except UnicodeEncodeError:
        return _batch_of([_valid(row) for row in rows])


def in_batches(rows: Iterable[ImageRow], size: int) -> Iterator[list[ImageRow]]:
    """The rows in lists of `size`; the last one may be shorter."""
    left = iter(rows)
    while batch := list(itertools.islice(left, size)):
        yield batch


def sorted_by_uri(table: pa.Table) -> pa.Table:
    """The rows sorted by URI (code points), the images of an archive by that of the archive; rows of the same URI keep
    their order."""
    if _is_sorted(table["uri"]) and table["archive"].null_count == len(table):
        return table
    order = pc.sort_indices(
        pa.table({"place": pc.coalesce(table["archive"], table["uri"]), "uri": table["uri"]}),
        sort_keys=[("place", "ascending"), ("uri", "ascending")],
    )
    return pa.table([taken(table[name], order) for name in table.column_names], schema=table.schema)


def taken(column: pa.ChunkedArray, rows: pa.Array) -> pa.ChunkedArray:
    """The values of `rows`, in the order of `rows`."""
    # 64-bit offsets, because one array of all strings may exceed 2 GiB
    whole = column.cast(_WIDE.get(column.type, column.type)).combine_chunks()
    slices = (rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS))
    return pa.chunked_array([whole.take(part).cast(column.type) for part in slices], column.type)


def first_of_each(table: pa.Table) -> pa.Table:
    """The first row of each URI."""
    high, low = _digests(table["uri"])
    order = np.lexsort((low, high))  # a stable sort keeps the first row of a URI first
    high, low = high[order], low[order]
    is_duplicate = np.zeros(len(table), np.bool_)
    is_duplicate[order[1:]] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return table.filter(pa.array(~is_duplicate)) if is_duplicate.any() else table


def with_columns(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of an older file, with the columns of a schema that they lack, which are null."""
    for field in schema:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows


def with_others(table: pa.Table, others: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The rows, of which those do not claim to be images that `others` says (`bool [N]`, null for false)."""
    column = pc.if_else(pc.fill_null(others, False), True, pa.scalar(None, pa.bool_()))
    return table.set_column(COLUMNS.get_field_index(OTHER_FILE), COLUMNS.field(OTHER_FILE), column)


def with_claims(table: pa.Table) -> pa.Table:
    """The rows, where a file that one input names claims to be an image in the rows of all inputs."""
    if table[OTHER_FILE].null_count == len(table):
        return table
    claimed = table["uri"].filter(pc.is_null(table[OTHER_FILE]))
    return with_others(table, pc.and_(table[OTHER_FILE], pc.invert(pc.is_in(table["uri"], value_set=claimed))))


def told_apart(table: pa.Table) -> pa.Table:
    """The rows, where two URLs that are read at different addresses and shown alike differ by a `#` and a hash."""
    if table["address"].null_count == len(table):
        return table
    uris, addresses = table["uri"].to_pylist(), table["address"].to_pylist()
    seen: dict[str, str] = {}
    for row, (uri, address) in enumerate(zip(uris, addresses, strict=True)):
        if address is not None and seen.setdefault(uri, address) != address:
            uris[row] = f"{uri}#{hashlib.sha256(address.encode()).hexdigest()[:8]}"
    return table.set_column(0, COLUMNS.field("uri"), pa.chunked_array([uris], pa.string()))


def sample_of(table: pa.Table, rows: int) -> pa.Table:
    """The `rows` rows with the smallest sha256 of their URI, in the order of the table."""
    if rows >= len(table):
        return table
    high, low = _digests(table["uri"])
    chosen = np.zeros(len(table), np.bool_)
    chosen[np.lexsort((low, high))[:rows]] = True
    return table.filter(pa.array(chosen))


def count_suffixes(table: pa.Table) -> Mapping[str, int]:
    """Number of rows by lower-case file suffix (`.jpg`; empty: none), the most frequent first."""
    counts: collections.Counter[str] = collections.Counter()
    for chunk in table["uri"].chunks:
        suffixes = pc.struct_field(pc.extract_regex(chunk, _SUFFIX), "suffix")
        for item in pc.value_counts(pc.utf8_lower(pc.fill_null(suffixes, _NO_SUFFIX))).to_pylist():
            counts[item["values"]] += item["counts"]
    return dict(counts.most_common())


def joined(tables: Sequence[pa.Table], carried: Sequence[str]) -> pa.Table:
    """The tables concatenated: `COLUMNS`, then the carried columns, which are null where a table lacks them.

    Raises:
        DataError: a carried column has incompatible types.
    """
    table = concatenated(tables)
    for name in carried:
        if name not in table.column_names:  # no list with this column has rows
            table = table.append_column(name, pa.nulls(len(table)))
    return table.select([*COLUMNS.names, *carried])


def concatenated(tables: Sequence[pa.Table]) -> pa.Table:
    """The tables one after the other; columns that one lacks are null there.

    Raises:
        DataError: a column has incompatible types.
    """
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as err:
        names = dict.fromkeys(name for table in tables for name in table.column_names[len(COLUMNS) :])
        kinds = {
            name: sorted({str(table[name].type) for table in tables if name in table.column_names}) for name in names
        }
        shown = "; ".join(f"{name}: {' and '.join(types)}" for name, types in kinds.items() if len(types) > 1)
        raise DataError(f"a carried column must have the same type in all lists and files. Received: {shown}") from err


def compact(table: pa.Table) -> pa.Table:
    """The table in batches of `BATCH_ROWS`, if it consists of many small ones."""
    batches = -(-len(table) // BATCH_ROWS)
    if table["uri"].num_chunks <= 2 * batches:
        return table
    starts = range(0, max(len(table), 1), BATCH_ROWS)
    return pa.concat_tables([table.slice(start, BATCH_ROWS).combine_chunks() for start in starts])


def waiting_runs(table: pa.Table) -> Iterator[WaitingRows]:
    """The runs of adjacent rows that wait for an archive, in order."""
    unknown = pc.and_(pc.is_null(table["packing"]), pc.is_null(table["status"]))
    waiting = pc.and_(pc.is_valid(table["archive"]), unknown)
    places = np.flatnonzero(waiting.to_numpy()).tolist()
    archives = (uri for chunk in table["archive"].filter(waiting).chunks for uri in chunk.to_pylist())
    # within a run of adjacent rows, row number minus count is constant
    numbered = enumerate(zip(places, archives, strict=True))
    for (archive, _), run in itertools.groupby(numbered, key=lambda item: (item[1][1], item[1][0] - item[0])):
        rows = [place for _, (place, _) in run]
        yield WaitingRows(archive, rows[0], rows[-1] + 1)


def _batch_of(rows: Sequence[ImageRow]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    arrays = [_array(field, values) for field, values in zip(COLUMNS, columns, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=COLUMNS)


def _array(field: pa.Field, values: Sequence[object]) -> pa.Array:
    if len(values) <= BATCH_ROWS and values.count(None) == len(values):
        return _nulls(field.type)[: len(values)]
    array = pa.array(values, field.type)
    half = len(array) // 2
    # A built array over-allocates, since it grows by doubling; a concatenated one has the exact size.
    return pa.concat_arrays([array[:half], array[half:]])


@functools.cache
def _nulls(kind: pa.DataType) -> pa.Array:
    return pa.nulls(BATCH_ROWS, kind)  # shared by all batches: most columns of most tables are empty


def _valid(row: ImageRow) -> ImageRow:
    valid = ImageRow._make(_escaped(value) if isinstance(value, str) else value for value in row)
    if valid == row:
        return row
    return valid._replace(archive=None, packing=None, status="unsupported", error="the file name is not valid Unicode")


def _escaped(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_sorted(uris: pa.ChunkedArray) -> bool:
    chunks = [chunk for chunk in uris.chunks if len(chunk)]
    inside = (pc.all(pc.less_equal(chunk[:-1], chunk[1:])).as_py() is not False for chunk in chunks)
    return all(inside) and all(left[-1].as_py() <= right[0].as_py() for left, right in itertools.pairwise(chunks))


def _digests(uris: pa.ChunkedArray) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The first and second eight bytes of the sha256 of each URI, `uint64 [N]`, assumed to be free of collisions."""
    halves = [
        np.frombuffer(b"".join([hashlib.sha256(uri).digest()[:16] for uri in chunk.to_pylist()]), ">u8")
        for chunk in (chunk.cast(pa.binary()) for chunk in uris.chunks)
    ]
    both = np.concatenate([np.empty(0, np.uint64), *halves]).astype(np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]
