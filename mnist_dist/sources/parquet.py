"""Parquet files of encoded images, among them those of Hugging Face: listing and reading their rows.

Owns: which column holds images, the URIs of rows, their labels and carried columns, and reading rows by row group. Does
not own: decoding, or which Parquet files belong to a data set (`listing`).

The URI of a row is `file.parquet#row=17`, counted from 0 through the whole file. An image column is binary, or a struct
with a binary field `bytes` as Hugging Face writes it; the other field, `path`, can be carried under that name.
"""

import bisect
import collections
import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnist_dist.errors import DataError, ImageError, first_line
from mnist_dist.sources import columns, label_sets
from mnist_dist.sources.columns import GROUP, LABEL, SPLIT, Wanted
from mnist_dist.sources.image_table import BATCH_ROWS, COLUMNS
from mnist_dist.sources.members import bare, image_errors
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry, Store

PARQUET_SUFFIX = ".parquet"
PACKING = "parquet:"
"""Begins the packing of a row of the manifest; the name of the image column follows."""
PATH = "path"
ROW_SEPARATOR = "#row="
"""Stands between a file and the number of a row."""
_ROW_URI = re.compile(rf"(?is)(.*\{PARQUET_SUFFIX}){ROW_SEPARATOR}([0-9]{{1,18}})")
_BYTES_FIELD = "bytes"
_NAMES = ("image", "img", "images", "picture", "image_bytes")  # of binary columns that are taken for images
_BATCH_ROWS, _BATCH_BYTES = 64, 64 * 2**20  # At most; at least one row.
_MAX_RATIO = 4  # Of unpacked and stored bytes, for encoded images.
_MAX_GROUP_BYTES = 2**30  # Unpacked, beyond that ratio: a page of this size is unpacked as a whole.
_READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRows:
    """The rows of one file."""

    table: pa.Table
    """`COLUMNS`, the carried columns, and for a labelled listing `label` and `split`."""
    class_names: tuple[str, ...] | None
    """Class names by class number, if the file declares them."""
    columns: tuple[str, ...]
    """The columns that can be carried."""


def is_parquet(uri: str) -> bool:
    """Whether the suffix is that of Parquet."""
    return uri[-len(PARQUET_SUFFIX) :].lower() == PARQUET_SUFFIX


def row_uri(uri: str, row: int) -> str:
    """The URI of a row."""
    return f"{uri}{ROW_SEPARATOR}{row}"


def split_row(uri: str) -> tuple[str, int] | None:
    """Splits `a.parquet#row=17` into `("a.parquet", 17)`; None: the URI names no row."""
    match = _ROW_URI.fullmatch(uri)
    return (match[1], int(match[2])) if match else None


def holds_images(uri: str, image_column: str | None, *, store: Store = ANYWHERE) -> bool:
    """Whether a file is Parquet with a column of images, rather than a list of URIs or something else.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    try:
        with _open(uri, store) as file:
            return image_column_of(file.schema_arrow, image_column) is not None
    except (ImageError, OSError):
        return False


def image_column_of(schema: pa.Schema, requested: str | None) -> str | None:
    """The column that holds images: the requested one; else the one that the metadata of Hugging Face calls an image;
    else the only struct with a binary field `bytes`; else a binary column called `image`, `img` or similar."""
    if requested is not None:
        return requested if requested in schema.names else None
    declared = [
        name
        for name, feature in columns.features(schema).items()
        if name in schema.names and isinstance(feature, dict) and feature.get("_type") == "Image"
    ]
    structs = [field.name for field in schema if _has_bytes(field.type)]
    binary = [field.name for field in schema if _is_binary(field.type) and field.name.lower() in _NAMES]
    return next((names[0] for names in (declared, structs, binary) if names), None)


def list_rows(entry: Entry, wanted: Wanted, *, address: str | None = None, store: Store = ANYWHERE) -> FileRows:
    """Lists the rows of a file; the images themselves are not read.

    Args:
        entry: the file.
        wanted: what is read beside the images.
        address: what is really read, if the URI is shown without its secrets.
        store: the store of the file.

    Raises:
        DataError: a column is missing or has another type, or a label is missing.
        ImageError: the file is damaged, or has no column of images.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    with _open(address or entry.uri, store) as file:
        schema = file.schema_arrow
        image = _checked_image_column(entry.uri, schema, wanted)
        table = _located(entry, f"{PACKING}{image}", address=address, ends=_ends(file))
        named = None if wanted.label_column is None else columns.declared_names(schema, wanted.label_column)
        for name, values in _beside(entry.uri, file, image, wanted, named).items():
            table = table.append_column(name, values)
    has_path = pa.types.is_struct(schema.field(image).type) and PATH not in schema.names
    others = (name for name in schema.names if name != image)
    return FileRows(table, named, (*others, *([PATH] if has_path else [])))


def read_rows(
    uri: str, image_column: str, rows: Sequence[int], *, max_bytes: int, store: Store = ANYWHERE
) -> Iterator[bytes | ImageError]:
    """Reads the encoded bytes of rows.

    Args:
        uri: URI of the file.
        image_column: the column that holds the images.
        rows: ascending row numbers.
        max_bytes: larger images get the status `too_large`.
        store: the store of the file.

    Yields:
        The bytes, or an `ImageError` with status `missing`, `denied`, `empty`, `too_large`, `failed` or `unreadable`.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    done = 0
    try:
        with image_errors(), _open(uri, store) as file:
            for image in _image_rows(file, rows, image_column):
                is_large = isinstance(image, bytes) and len(image) > max_bytes
                done += 1
                yield ImageError("too_large", f"more than {max_bytes:,} bytes") if is_large else image
    except ImageError as err:  # The file changed after it was listed, or is damaged.
        yield from itertools.repeat(bare(err), len(rows) - done)


def _located(entry: Entry, packing: str, *, address: str | None, ends: Sequence[int]) -> pa.Table:
    """The rows as `COLUMNS`, in batches, so that the URIs of ten million rows fit into memory."""
    batches, rows = [], [0, *ends][-1]
    size = min(rows, BATCH_ROWS)
    same = {"etag": entry.etag, "archive": entry.uri, "packing": packing, "address": address}
    shared = {  # by all batches
        field.name: pa.repeat(pa.scalar(same.get(field.name), field.type), size) for field in COLUMNS
    }
    for start in range(0, rows, BATCH_ROWS):
        numbers = np.arange(start, min(start + BATCH_ROWS, rows))
        part = pa.array(numbers)
        uris = pc.binary_join_element_wise(f"{entry.uri}{ROW_SEPARATOR}", part.cast(pa.string()), "")
        starts = pa.array(np.array([0, *ends])[np.searchsorted(ends, numbers, side="right")])
        values = {**shared, "uri": uris, "offset": part, "stored_bytes": starts}
        batches.append(pa.RecordBatch.from_arrays([array[: len(part)] for array in values.values()], schema=COLUMNS))
    return pa.Table.from_batches(batches, COLUMNS)


def _beside(
    uri: str, file: pq.ParquetFile, image: str, wanted: Wanted, named: tuple[str, ...] | None
) -> dict[str, pa.ChunkedArray]:
    """The carried columns, label and split of all rows."""
    found: dict[str, pa.ChunkedArray] = {}
    for name in wanted.carried:
        path = f"{image}.{PATH}" if name == PATH and name not in file.schema_arrow.names else name
        if path.partition(".")[0] in file.schema_arrow.names:
            found[name] = _named(_read_column(uri, file, path), columns.declared_names(file.schema_arrow, name))
    if wanted.label_column is not None:
        given = {name: _read_column(uri, file, name).combine_chunks() for name in wanted.label_columns}
        found[LABEL] = pa.chunked_array([label_sets.labels_in(wanted, uri, given, named)], pa.string())
        if wanted.group_column is not None and wanted.group_column in file.schema_arrow.names:
            groups = _read_column(uri, file, wanted.group_column).combine_chunks()
            texts = columns.text_groups(f"{uri}: column {wanted.group_column!r}", groups)
            found[GROUP] = pa.chunked_array([texts], pa.string())
        if SPLIT in file.schema_arrow.names:
            splits = _read_column(uri, file, SPLIT)
            if pa.types.is_string(splits.type) or pa.types.is_large_string(splits.type):
                found[SPLIT] = splits.cast(pa.string())
    return found


def _named(values: pa.ChunkedArray, names: Sequence[str] | None) -> pa.ChunkedArray:
    """Class numbers as the names that the file declares: another model may number its classes differently."""
    if names is None or not pa.types.is_integer(values.type):
        return values
    known = pc.if_else(pc.and_(pc.greater_equal(values, 0), pc.less(values, len(names))), values, None)
    return pa.chunked_array([pa.array(names, pa.string()).take(known.combine_chunks())], pa.string())


def _read_column(uri: str, file: pq.ParquetFile, path: str) -> pa.ChunkedArray:
    """Reads a column, or the field of a struct without its siblings."""
    try:
        column = file.read([path])[0]
    except (pa.ArrowException, OSError) as err:
        raise ImageError("unreadable", f"column {path!r} cannot be read: {first_line(err)}") from err
    chunks = [columns.plain(_field(chunk, path)) for chunk in column.chunks]
    return pa.chunked_array(chunks, chunks[0].type if chunks else pa.null())


def _field(values: pa.Array, path: str) -> pa.Array:
    return pc.struct_field(values, PATH) if pa.types.is_struct(values.type) and path.endswith(f".{PATH}") else values


def _checked_image_column(uri: str, schema: pa.Schema, wanted: Wanted) -> str:
    columns.check_unique(uri, schema.names, [*wanted.carried, wanted.image_column or "", *wanted.label_columns])
    image = image_column_of(schema, wanted.image_column)
    if image is None:
        raise ImageError("unsupported", f"no column of encoded images among {', '.join(schema.names)}")
    if wanted.label_column is not None:
        wanted.check_labels(uri, schema.names)
    columns.check_unique(uri, schema.names, [image])
    kind = schema.field(image).type
    if not (_is_binary(kind) or _has_bytes(kind)):
        raise DataError(
            f"{uri}: column {image!r} must hold encoded images, as binary or as a struct with a binary field"
            f" {_BYTES_FIELD!r}. Received: {kind}"
        )
    return image


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _has_bytes(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    field = kind.get_field_index(_BYTES_FIELD)
    return field >= 0 and _is_binary(kind.field(field).type)


def _image_rows(file: pq.ParquetFile, rows: Sequence[int], image_column: str) -> Iterator[bytes | ImageError]:
    ends = _ends(file)
    for group, members in itertools.groupby(rows, key=lambda row: bisect.bisect_right(ends, row)):
        start = ends[group - 1] if group else 0
        yield from _images_of_group(file, group, [row - start for row in members], image_column)


def _ends(file: pq.ParquetFile) -> list[int]:
    sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    return list(itertools.accumulate(sizes))


def _images_of_group(
    file: pq.ParquetFile, group: int, rows: Sequence[int], image_column: str
) -> Iterator[bytes | ImageError]:
    """Yields the images at ascending rows of a row group. A group may hold gigabytes, so only a batch is in memory."""
    wanted, first = collections.deque(rows), 0
    is_struct = pa.types.is_struct(file.schema_arrow.field(image_column).type)
    path = f"{image_column}.{_BYTES_FIELD}" if is_struct else image_column
    batch_rows = _batch_rows(file, group, path)
    if not batch_rows:
        yield from itertools.repeat(ImageError("too_large", "its row group unpacks to more than 1 GiB"), len(rows))
        return
    for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=[path]):
        column = batch.column(0)
        if is_struct:
            column = pc.struct_field(column, _BYTES_FIELD)
        while wanted and wanted[0] < first + len(column):
            image = column[wanted.popleft() - first].as_py()
            yield image or ImageError("empty", "the row has no image bytes")
        if not wanted:
            return
        first += len(column)
    raise IndexError(f"row group {group} has {first} rows")


def _batch_rows(file: pq.ParquetFile, group: int, path: str) -> int:
    """Number of rows that are read at once; 0: the group unpacks to more than memory should hold.

    Encoded images hardly shrink once more. Where they do, a row may be as large as all of the group: a dictionary
    holds equal images once.
    """
    chunks = file.metadata.row_group(group).to_dict()["columns"]
    chunk = next(chunk for chunk in chunks if chunk["path_in_schema"] == path)
    unpacked_bytes = row_bytes = chunk["total_uncompressed_size"]
    if unpacked_bytes <= _MAX_RATIO * chunk["total_compressed_size"]:
        row_bytes = unpacked_bytes // max(1, chunk["num_values"])
    elif unpacked_bytes > _MAX_GROUP_BYTES:
        return 0
    return int(max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes))))


@contextlib.contextmanager
def _open(uri: str, store: Store) -> Iterator[pq.ParquetFile]:
    with store.open_binary(uri) as stream:
        try:
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES)
        except (pa.ArrowException, OSError) as err:
            if isinstance(err, OSError) and err.errno is not None:
                raise
            raise ImageError("unreadable", f"not a readable Parquet file: {first_line(err)}") from err
        with file:
            yield file
