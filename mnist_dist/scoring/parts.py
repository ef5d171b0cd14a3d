"""Builds the files of the next table, next to the current one.

Owns: the files of the table and its manifest in the `out` folder of a driver: which old files are kept, which are
rewritten without the replaced rows, and which are new. Does not own: publishing them (`commit`).
"""

import contextlib
import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnist_dist.errors import ConfigError, DataError, MnistDistError
from mnist_dist.scoring.generations import MANIFEST, Committed, Example, Generation, Output
from mnist_dist.scoring.predictions import (
    STATUSES,
    Mark,
    fits,
    read_row_groups,
    table_schema,
    widened,
)
from mnist_dist.sources.image_table import COLUMNS, OTHER_FILE
from mnist_dist.sources.threads import map_in_threads
from mnist_dist.store.base import Store
from mnist_dist.store.uris import join

PART_BYTES = 128 * 2**20  # few files for 10 million rows, yet enough to read them in parallel
ROW_GROUP_BYTES = 32 * 2**20  # in memory; narrow rows then come in groups about as large as readers expect
EXAMPLES = 3  # rows per status that the summary shows
_READ_THREADS = 8  # on object stores a request mostly waits
LISTED = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        ("error", pa.string()),
        (OTHER_FILE, pa.bool_()),
    ]
)
"""The columns of the table's manifest; size and etag come from reading, else from the listing."""

_SOURCE = pa.schema([COLUMNS.field(name) for name in ("uri", "size_bytes", "etag", OTHER_FILE)])


class _Rows(NamedTuple):
    """Rows of the table, and the same rows in the form of the table's manifest."""

    rows: pa.Table
    listed: pa.Table


@dataclass
class NewTable:
    """The next table: its files, and counts of its rows."""

    listing: pq.ParquetWriter
    files: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    rows: int = 0
    examples: dict[str, list[Example]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def note(self, name: str, listed: pa.Table) -> None:
        """Adds a file to the table, with its rows as they stand in the manifest."""
        self.files.append(name)
        self.rows += len(listed)
        self.listing.write_table(listed, row_group_size=max(len(listed), 1))
        for item in pc.value_counts(listed["status"]).to_pylist():
            self._counts[item["values"]] += item["counts"]
            if item["values"] != "ok":
                self._note_examples(item["values"], listed)

    def counts(self) -> dict[str, int]:
        """Number of rows by status."""
        return {status: self._counts[status] for status in STATUSES}

    def _note_examples(self, status: str, listed: pa.Table) -> None:
        examples = self.examples.setdefault(status, [])
        if len(examples) < EXAMPLES:
            rows = listed.select(["uri", "error"]).filter(pc.equal(listed["status"], status))
            examples += [Example(**row) for row in rows.slice(0, EXAMPLES - len(examples)).to_pylist()]


@dataclass(frozen=True)
class Building:
    """Writes the files of the next table into the `out` folder of one driver."""

    output: Output
    generation: Generation
    fence: int = field(kw_only=True)
    schema: pa.Schema = field(kw_only=True)
    """The columns of the shards."""
    written: pa.Schema = field(kw_only=True)
    """The columns of the files: the same names, in types that the table's format has."""
    part_bytes: int = field(kw_only=True)
    part_rows: int = field(kw_only=True)

    def build(self, *, shards: int, keep_old: bool, progress: Callable[[int, int], None]) -> NewTable:
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            file = stack.enter_context(self._new_file(MANIFEST))
            table = NewTable(stack.enter_context(pq.ParquetWriter(file, LISTED, compression="zstd")))
            manifest = stack.enter_context(_parquet(self.output.store, self.generation.manifest_uri, scratch / "new"))
            committed = self.output.committed()
            if committed and keep_old:
                listed = self.output.version_uri(committed.mark.number, MANIFEST)
                old = stack.enter_context(_parquet(self.output.store, listed, scratch / "old"))
                self._keep(committed, table, old=old, replaced=self._replaced(manifest))
            with contextlib.closing(self._new_rows(manifest, shards, progress)) as rows:
                self._write(table, "", rows)
            if not table.files:
                # An empty table needs one file for its columns.
                self._write_part(table, self._name("", 0), _Groups(iter(())))
        return table

    def _replaced(self, manifest: pq.ParquetFile) -> pa.ChunkedArray:
        """The URIs whose old rows do not stay: they are scored again, or their images are gone."""
        uris = manifest.read(["uri"])["uri"]
        if not self.generation.plan.dropped:
            return uris
        with self.output.store.open_binary(self.generation.dropped_uri) as file:
            return pa.chunked_array([*uris.chunks, *pq.read_table(file)["uri"].chunks], pa.string())

    def _keep(self, committed: Committed, table: NewTable, *, old: pq.ParquetFile, replaced: pa.ChunkedArray) -> None:
        """Keeps the old files; rewrites those that hold images in `replaced` without their rows. If the old table
        lacks a default column, all files are rewritten with nulls in it."""
        schema = table_schema(self.output.uri, store=self.output.store)
        if not fits(schema, self.written):
            raise ConfigError(
                f"the columns must be the same as before (--mode fresh makes a new table). Received: "
                f"{', '.join(self.schema.names)}"
            )
        if old.num_row_groups != len(committed.mark.files):
            raise DataError(f"{self.output.uri}: the manifest is not that of the table; --mode fresh makes a new one")
        there = {uri.rpartition("/")[2] for uri in self.output.names(committed.mark.folder)}
        if gone := [name for name in committed.mark.files if name not in there]:
            raise DataError(
                f"{self.output.uri}: files of the table are gone; --mode fresh makes a new one. Received: {gone[0]!r}"
            )
        touched = []
        for index, name in enumerate(committed.mark.files):
            listed = _group_of(old, index)
            if not schema.equals(self.written) or pc.any(pc.is_in(listed["uri"], value_set=replaced)).as_py():
                touched.append(index)
            else:
                table.note(name, listed)
        left = itertools.chain.from_iterable(
            self._left_rows(committed.mark, committed.mark.files[index], _group_of(old, index), replaced)
            for index in touched
        )
        self._write(table, "kept-", left)

    def _left_rows(self, mark: Mark, name: str, listed: pa.Table, replaced: pa.ChunkedArray) -> Iterator[_Rows]:
        for rows in read_row_groups(self.output.part_uri(mark, name), store=self.output.store):
            group, listed = listed.slice(0, len(rows)), listed.slice(len(rows))
            if not rows["uri"].equals(group["uri"]):
                raise DataError(f"{self.output.uri}: {name} and the manifest differ; --mode fresh makes a new table")
            kept = pc.invert(pc.is_in(rows["uri"], value_set=replaced))
            yield _Rows(widened(rows, self.written).filter(kept), group.filter(kept))

    def _new_rows(
        self, manifest: pq.ParquetFile, shards: int, progress: Callable[[int, int], None]
    ) -> Generator[_Rows, None, None]:
        if manifest.num_row_groups != shards:
            raise MnistDistError(f"{self.generation.manifest_uri} has {manifest.num_row_groups} shards, not {shards}")
        uris = [self.generation.shard_uri(shard) for shard in range(shards)]
        read = functools.partial(_read_shard, self.output.store)
        for shard, data in enumerate(map_in_threads(read, uris, threads=_READ_THREADS, ahead=_READ_THREADS)):
            listed = widened(manifest.read_row_group(shard, columns=_SOURCE.names), _SOURCE)
            rows = _rows_of_shard(uris[shard], data, schema=self.schema, expected=listed["uri"])
            yield _Rows(_converted(rows, self.written), _listed(rows, listed))
            progress(shard + 1, shards)

    def _write(self, table: NewTable, kind: str, pieces: Iterator[_Rows]) -> None:
        """Writes the pieces into as many files as needed: `part-000017-00000.parquet`, ..."""
        groups = _Groups(_grouped(pieces, min_bytes=min(ROW_GROUP_BYTES, self.part_bytes)))
        for number in itertools.count():
            first = next(groups, None)
            if first is None:
                return
            groups.put_back(first)
            self._write_part(table, self._name(kind, number), groups)

    def _name(self, kind: str, number: int) -> str:
        return f"part-{self.fence:06d}-{kind}{number:05d}.parquet"

    def _write_part(self, table: NewTable, name: str, groups: "_Groups") -> None:
        """Writes one file; what does not fit any more stays in `groups`."""
        listed, room = [LISTED.empty_table()], self.part_rows
        with self._new_file(name) as file, self._writer(file) as writer:
            for group in groups:
                group = groups.cut(group, room)
                writer.write_table(group.rows, row_group_size=len(group.rows))
                listed.append(group.listed)
                room -= len(group.rows)
                if file.tell() >= self.part_bytes or room == 0:
                    break
        table.added.append(name)
        table.note(name, pa.concat_tables(listed))

    def _writer(self, file: BinaryIO) -> pq.ParquetWriter:
        """With statistics and a page index, so that readers skip row groups and pages that a filter rules out."""
        return pq.ParquetWriter(file, self.written, compression="zstd", write_statistics=True, write_page_index=True)

    def _new_file(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A new file, which appears when the block ends without an error."""
        return self.output.store.new_object(join(self.generation.out_uri(self.fence), name))


class _Groups:
    """Groups of rows in their order, some of which do not fit into a file as a whole."""

    def __init__(self, groups: Iterator[_Rows]) -> None:
        self._groups, self._waiting = groups, list[_Rows]()

    def __iter__(self) -> "_Groups":
        return self

    def __next__(self) -> _Rows:
        return self._waiting.pop() if self._waiting else next(self._groups)

    def put_back(self, group: _Rows) -> None:
        """Makes a group the next one again."""
        self._waiting.append(group)

    def cut(self, group: _Rows, rows: int) -> _Rows:
        """The first rows of a group, at most so many; the others are put back."""
        if len(group.rows) <= rows:
            return group
        self.put_back(_Rows(group.rows.slice(rows), group.listed.slice(rows)))
        return _Rows(group.rows.slice(0, rows), group.listed.slice(0, rows))


def _rows_of_shard(uri: str, data: bytes, *, schema: pa.Schema, expected: pa.ChunkedArray) -> pa.Table:
    try:
        rows = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as err:
        raise MnistDistError(f"{uri} is not readable; delete it and run the same command again: {err}") from err
    if not rows.schema.equals(schema) or not rows["uri"].equals(expected):
        raise MnistDistError(
            f"the shard must hold the rows of its manifest in their order; delete {uri} and run the command again. "
            f"Received: {len(rows)} rows of {', '.join(rows.schema.names)}, expected {len(expected)} of "
            f"{', '.join(schema.names)}"
        )
    return rows


def _converted(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows in other types of the same columns; times may lose what their unit cannot hold."""
    if rows.schema.equals(schema):
        return rows.replace_schema_metadata(schema.metadata)
    casts = [pc.CastOptions(target_type=field.type, allow_time_truncate=True) for field in schema]
    columns = [pc.cast(column, options=cast) for column, cast in zip(rows.columns, casts, strict=True)]
    return pa.table(columns, schema=schema)


def _group_of(old: pq.ParquetFile, index: int) -> pa.Table:
    """The rows of a file of the old table, as its manifest lists them; that of an older version lacks a column."""
    return widened(old.read_row_group(index), LISTED)


def _listed(rows: pa.Table, source: pa.Table) -> pa.Table:
    def known(name: str) -> pa.ChunkedArray:
        return pc.coalesce(rows[name], source[name]) if name in rows.column_names else source[name]

    error = rows["error"] if "error" in rows.column_names else pa.nulls(len(rows), pa.string())
    columns = [rows["uri"], known("size_bytes"), known("etag"), rows["status"], error, source[OTHER_FILE]]
    return pa.table(columns, schema=LISTED)


def _grouped(pieces: Iterator[_Rows], *, min_bytes: int) -> Iterator[_Rows]:
    """Joins small pieces and cuts large ones to about the size of a row group; none is empty."""
    held, size_bytes = list[_Rows](), 0
    for piece in itertools.chain.from_iterable(map(_cut, pieces)):
        held.append(piece)
        size_bytes += piece.rows.nbytes
        if size_bytes >= min_bytes:
            yield _joined(held)
            held, size_bytes = [], 0
    if held:
        yield _joined(held)


def _cut(piece: _Rows) -> Iterator[_Rows]:
    count = len(piece.rows)
    length = -(-count // max(1, piece.rows.nbytes // ROW_GROUP_BYTES))
    for start in range(0, count, max(1, length)):
        yield _Rows(piece.rows.slice(start, length), piece.listed.slice(start, length))


def _joined(held: Sequence[_Rows]) -> _Rows:
    return _Rows(pa.concat_tables([item.rows for item in held]), pa.concat_tables([item.listed for item in held]))


def _read_shard(store: Store, uri: str) -> bytes:
    try:
        return store.read_bytes(uri)
    except FileNotFoundError as err:
        raise MnistDistError(f"a shard that is to be published does not exist. Received: {uri!r}") from err


@contextlib.contextmanager
def _parquet(store: Store, uri: str, scratch: Path) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file for random access, through a local copy if it is remote."""
    try:
        file = pq.ParquetFile(store.local_path(uri, scratch))
    except (pa.ArrowInvalid, FileNotFoundError) as err:
        raise DataError(f"{uri} cannot be read: {err}") from err
    with file:
        yield file
