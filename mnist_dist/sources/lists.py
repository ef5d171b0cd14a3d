"""Reads the user's lists of URIs, a batch of lines at a time.

Owns: the formats (Parquet and CSV with a column `uri`, text with one URI per line), and rejecting invalid lists. Does
not own: what a URI means (`sources/listing.py`).
"""

import contextlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from mnist_dist.errors import DataError
from mnist_dist.sources.image_table import BATCH_ROWS
from mnist_dist.store.anywhere import ANYWHERE

URI_COLUMN = "uri"
_PARQUET_SUFFIX = ".parquet"
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_TEXT_SUFFIXES = (".txt", ".lst")
LIST_SUFFIXES = (_PARQUET_SUFFIX, *_SEPARATORS, *_TEXT_SUFFIXES)
"""Lower-case file suffixes of lists."""


@dataclass(frozen=True)
class Lines:
    """At most `BATCH_ROWS` lines of a list, unchanged."""

    uris: Sequence[str]
    carried: Mapping[str, pa.Array] = field(default_factory=dict)
    """Carried column -> one value per line."""


def is_list(uri: str) -> bool:
    """Whether the suffix is that of a list."""
    return uri.lower().endswith(LIST_SUFFIXES)


def column_names(uri: str) -> tuple[str, ...]:
    """The columns of a list other than `uri`; a text file has none.

    Raises:
        DataError: the file does not have the format of its suffix, or has no column `uri`.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    if uri.lower().endswith(_TEXT_SUFFIXES):
        return ()
    with _readable(uri), ANYWHERE.open_binary(uri) as stream:
        if uri.lower().endswith(_PARQUET_SUFFIX):
            schema = pq.read_schema(stream)
        else:
            with pc_csv.open_csv(stream, parse_options=_parse_options(uri)) as reader:
                schema = reader.schema
    names = [name for name in schema.names if name != URI_COLUMN]
    if len(names) != len(schema.names) - 1:
        raise DataError(
            f"{uri}: a list must have one column {URI_COLUMN!r}. Received: columns {', '.join(schema.names) or 'none'}"
        )
    return tuple(names)


def read_list(uri: str, *, carried: Sequence[str]) -> Iterator[Lines]:
    """The lines of a list, in order; of a text file, without blank lines and lines that begin with #.

    Args:
        uri: URI of the list.
        carried: existing columns to read as well.

    Raises:
        DataError: the file does not have the format of its suffix, or a row has no URI.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    with ANYWHERE.open_binary(uri) as stream:
        if uri.lower().endswith(_TEXT_SUFFIXES):
            # a file name may hold any bytes; surrogateescape keeps them
            with io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="\n") as lines:
                yield from read_text(lines)
            return
        names = [URI_COLUMN, *carried]
        with _readable(uri):
            is_parquet = uri.lower().endswith(_PARQUET_SUFFIX)
            batches = _parquet_batches(stream, names) if is_parquet else _csv_batches(stream, uri, names)
            yield from _lines_of(uri, batches)


def read_text(lines: Iterable[str]) -> Iterator[Lines]:
    """The lines of a text, without blank lines and lines that begin with #."""
    stripped = (line.removesuffix("\n").rstrip("\r") for line in lines)
    marked = (line.removeprefix("\ufeff") if first else line for first, line in zip(_once(), stripped, strict=False))
    uris = (line for line in marked if line.strip() and not line.startswith("#"))
    while batch := list(itertools.islice(uris, BATCH_ROWS)):
        yield Lines(batch)


def _once() -> Iterator[bool]:
    return itertools.chain([True], itertools.repeat(False))


def _parquet_batches(stream: BinaryIO, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(stream) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS, columns=list(names))


def _csv_batches(stream: BinaryIO, uri: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    # read whole: when streaming, the first block alone determines the types
    options = pc_csv.ConvertOptions(include_columns=list(names), column_types={URI_COLUMN: pa.string()})
    table = pc_csv.read_csv(stream, parse_options=_parse_options(uri), convert_options=options)
    yield from table.to_batches(max_chunksize=BATCH_ROWS)


def _parse_options(uri: str) -> pc_csv.ParseOptions:
    separator = next(separator for suffix, separator in _SEPARATORS.items() if uri.lower().endswith(suffix))
    return pc_csv.ParseOptions(delimiter=separator, newlines_in_values=True)


def _lines_of(uri: str, batches: Iterable[pa.RecordBatch]) -> Iterator[Lines]:
    before = 0
    for batch in batches:
        columns = {name: _plain(batch[name]) for name in batch.schema.names}
        uris = columns.pop(URI_COLUMN)
        _check_uris(uri, uris, before)
        yield Lines(uris.to_pylist(), columns)
        before += len(batch)


def _plain(values: pa.Array) -> pa.Array:
    """Decodes dictionaries, since each batch may have its own."""
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _check_uris(uri: str, uris: pa.Array, before: int) -> None:
    if not (pa.types.is_string(uris.type) or pa.types.is_large_string(uris.type)):
        raise DataError(f"{uri}: the column {URI_COLUMN!r} must hold strings. Received: {uris.type}")
    missing = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(uris), ""), True)
    row = pc.index(missing, True).as_py()
    if row >= 0:
        raise DataError(
            f"{uri}: each row must have a {URI_COLUMN}. Received: {uris[row].as_py()!r} in row {before + row + 1},"
            " counted from 1"
        )


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as err:
        raise DataError(f"{uri}: not a readable {uri.rpartition('.')[2]} file: {err}") from err
