"""Reads the user's lists of URIs, a batch of lines at a time.

Owns: the formats (Parquet and CSV with a column of URIs, text with one URI per line), and rejecting invalid lists. Does
not own: what a URI means (`listing`).

Contract: text stays text (`0007`, `NA`, `1.10`), and typed columns of Parquet keep their type. UTF-8, and UTF-16 or
UTF-32 with a byte order mark, are read. A URI that is not valid UTF-8 keeps its bytes as surrogates, so that its row
can say so. No list is refused for a single line, except for one without a URI.
"""

import codecs
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

from mnist_dist.errors import DataError, first_line
from mnist_dist.sources import columns, label_sets
from mnist_dist.sources.columns import GROUP, LABEL, SPLIT, URI, URI_FLAG, Wanted
from mnist_dist.sources.image_table import BATCH_ROWS
from mnist_dist.sources.parquet import PARQUET_SUFFIX
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import is_web
from mnist_dist.urls import path_and_query

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_TEXT_SUFFIXES = (".txt", ".lst")
LIST_SUFFIXES = (PARQUET_SUFFIX, *_SEPARATORS, *_TEXT_SUFFIXES)
"""Lower-case file suffixes of lists."""
_UTF_8 = "utf-8"
_ENCODINGS = {  # UTF-32 first: its mark begins with that of UTF-16.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HEAD_BYTES = 1024


@dataclass(frozen=True)
class Lines:
    """At most `BATCH_ROWS` lines of a list, unchanged."""

    uris: Sequence[str]
    beside: Mapping[str, pa.Array] = field(default_factory=dict)
    """One value per line for each carried column and, in a labelled listing, `label`, `split` and `group`."""


def is_list(uri: str) -> bool:
    """Whether the suffix is that of a list."""
    return _name(uri).endswith(LIST_SUFFIXES)


def column_names(uri: str, *, uri_column: str = URI, store: Store = ANYWHERE) -> tuple[str, ...]:
    """The columns of a list other than that of the URIs; a text file has none.

    Raises:
        DataError: the file does not have the format of its suffix, or not one column of this name.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    if _name(uri).endswith(_TEXT_SUFFIXES):
        return ()
    names = [columns.clean(name) for name in header_of(uri, store=store)]
    columns.check_header(uri, names, {URI_FLAG: uri_column})
    return tuple(name for name in names if name != uri_column)


def header_of(uri: str, *, store: Store = ANYWHERE) -> list[str]:
    """The names of the columns of a Parquet, CSV or TSV file, as they are written.

    Raises:
        DataError: the file does not have the format of its suffix.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    with _readable(uri), store.open_binary(uri) as stream:
        if _name(uri).endswith(PARQUET_SUFFIX):
            return list(pq.read_schema(stream).names)
        with open_csv(stream, uri) as reader:
            return list(reader.schema.names)


def open_csv(stream: BinaryIO, uri: str, *, convert: pc_csv.ConvertOptions | None = None) -> pc_csv.CSVStreamingReader:
    """Opens a CSV or TSV file in whatever encoding it is, to be read a block at a time."""
    reading = pc_csv.ReadOptions(encoding=_encoding(uri, stream))
    return pc_csv.open_csv(stream, read_options=reading, parse_options=_parse_options(uri), convert_options=convert)


def read_list(uri: str, wanted: Wanted, *, store: Store = ANYWHERE) -> Iterator[Lines]:
    """The lines of a list, in order; of a text file, without blank lines and lines that begin with #.

    Args:
        uri: URI of the list.
        wanted: what is read beside the URIs, as far as the list has it.
        store: the store of the list.

    Raises:
        DataError: the file does not have the format of its suffix, or a row lacks its URI or label.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    names = column_names(uri, uri_column=wanted.uri_column, store=store)
    with store.open_binary(uri) as stream:
        if _name(uri).endswith(_TEXT_SUFFIXES):
            # a file name may hold any bytes; surrogateescape keeps them
            encoding = _encoding(uri, stream)
            errors = "surrogateescape" if encoding == _UTF_8 else "strict"
            with io.TextIOWrapper(stream, encoding, errors=errors, newline="\n") as lines:
                yield from read_text(lines)
            return
        chosen = wanted.columns(names)
        columns.check_unique(uri, names, chosen)
        with _readable(uri):
            is_parquet = _name(uri).endswith(PARQUET_SUFFIX)
            read = _parquet_batches if is_parquet else _csv_batches
            written = {columns.clean(name): name for name in header_of(uri, store=store)}
            used = {name: written[name] for name in (wanted.uri_column, *chosen)}
            yield from _lines_of(uri, read(stream, uri, list(used.values())), wanted, used)


def read_text(lines: Iterable[str]) -> Iterator[Lines]:
    """The lines of a text, without blank lines and lines that begin with #."""
    stripped = (line.removesuffix("\n").rstrip("\r") for line in lines)
    marked = (line.removeprefix("\ufeff") if first else line for first, line in zip(_once(), stripped, strict=False))
    uris = (line for line in marked if line.strip() and not line.startswith("#"))
    while batch := list(itertools.islice(uris, BATCH_ROWS)):
        yield Lines(batch)


def _name(uri: str) -> str:
    """The URI in lower case, without the query of a URL."""
    return (path_and_query(uri)[0] if is_web(uri) else uri).lower()


def _once() -> Iterator[bool]:
    return itertools.chain([True], itertools.repeat(False))


def _encoding(uri: str, stream: BinaryIO) -> str:
    """The encoding of a text, by its byte order mark; the stream is at its start afterwards."""
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    encoding = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), _UTF_8)
    if encoding == _UTF_8 and head.count(0) > len(head) // 4:
        raise DataError(f"{uri}: a list is text in UTF-8, or in UTF-16 with a byte order mark. Received: zero bytes")
    return encoding


def _parquet_batches(stream: BinaryIO, uri: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(stream) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS, columns=list(names))


def _csv_batches(stream: BinaryIO, uri: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    # as bytes: typed columns would change text such as 0007, and a string column must be valid UTF-8 as a whole
    options = pc_csv.ConvertOptions(include_columns=list(names), column_types=dict.fromkeys(names, pa.binary()))
    reading = pc_csv.ReadOptions(encoding=_encoding(uri, stream))
    table = pc_csv.read_csv(stream, read_options=reading, parse_options=_parse_options(uri), convert_options=options)
    yield from table.to_batches(max_chunksize=BATCH_ROWS)


def _parse_options(uri: str) -> pc_csv.ParseOptions:
    separator = next(separator for suffix, separator in _SEPARATORS.items() if _name(uri).endswith(suffix))
    return pc_csv.ParseOptions(delimiter=separator, newlines_in_values=True)


def _lines_of(uri: str, batches: Iterable[pa.RecordBatch], wanted: Wanted, used: Mapping[str, str]) -> Iterator[Lines]:
    """The lines of batches; `used` are the columns by name, as they are written. Blanks around the name of a column
    stand around its values, too."""
    before = 0
    is_text = not _name(uri).endswith(PARQUET_SUFFIX)
    for batch in batches:
        values = {name: columns.plain(batch[written]) for name, written in used.items()}
        uris = _uris(uri, wanted.uri_column, values.pop(wanted.uri_column), before)
        if used[wanted.uri_column] != wanted.uri_column:
            uris = [text.strip() for text in uris]
        beside = {name: _text(array) if is_text else array for name, array in values.items()}
        beside = {name: array if used[name] == name else trimmed(array) for name, array in beside.items()}
        yield Lines(uris, _labelled(uri, beside, wanted, before))
        before += len(batch)


def trimmed(values: pa.Array) -> pa.Array:
    """Text without the blanks around it; other values as they are."""
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    return pc.utf8_trim_whitespace(values) if is_text else values


def _labelled(uri: str, beside: dict[str, pa.Array], wanted: Wanted, before: int) -> dict[str, pa.Array]:
    """The label as text under its own name, for a labelled listing."""
    if wanted.label_column is None:
        return beside
    found = {SPLIT: beside[SPLIT].cast(pa.string())} if SPLIT in beside else {}
    texts = label_sets.labels_in(wanted, uri, beside, None, before=before)
    if texts is not None:
        found[LABEL] = texts
    if wanted.group_column in beside:
        found[GROUP] = columns.text_groups(f"{uri}: column {wanted.group_column!r}", beside[wanted.group_column])
    return found


def _text(values: pa.Array) -> pa.Array:
    """Bytes as strings; what is not UTF-8 is escaped."""
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([value.decode("utf-8", "backslashreplace") for value in values.to_pylist()], pa.string())


def _uris(uri: str, column: str, values: pa.Array, before: int) -> list[str]:
    """The URIs; bytes that are not UTF-8 become surrogates, as in the name of a file."""
    if values.type not in (pa.string(), pa.large_string(), pa.binary()):
        raise DataError(f"{uri}: the column {column!r} must hold strings. Received: {values.type}")
    uris: list[str | None] = values.to_pylist()
    if values.type == pa.binary():
        uris = [None if value is None else value.decode("utf-8", "surrogateescape") for value in values.to_pylist()]
    for number, text in enumerate(uris, start=before + 1):
        if text is None or not text.strip():
            raise DataError(f"{uri}: each row must have a {column}. Received: {text!r} in row {number}, counted from 1")
    return [text or "" for text in uris]


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeError) as err:
        raise DataError(f"{uri}: not a readable {uri.rpartition('.')[2]} file: {first_line(err)}") from err
