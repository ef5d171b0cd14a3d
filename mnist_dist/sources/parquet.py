"""Parquet files of encoded images: their labels, and the image bytes of their rows.

Owns: the columns, their types and class names, and reading rows by row group. Does not own: decoding, or the splits.
A row's URI is `file.parquet!ROW`, where ROW counts from 0 through the whole file. An image column is binary, or a
struct with a binary field `bytes` as Hugging Face writes it. A label column holds strings or integers.
"""

import bisect
import collections
import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnist_dist.errors import DataError, ImageError
from mnist_dist.store.anywhere import ANYWHERE

PARQUET_SUFFIX = ".parquet"
_BYTES_FIELD = "bytes"
_BATCH_ROWS = 64
_READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one Parquet file, in the order of its rows."""

    values: list[str] | list[int]
    names: tuple[str, ...] | None
    """Class names by class number, if the file's Hugging Face metadata has them."""


def read_labels(uri: str, *, image_column: str, label_column: str) -> LabelColumn:
    """Reads the label column of one file, and checks that its image column has a readable type.

    Raises:
        DataError: the file is not Parquet, a column is missing or has another type, or a label is null.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    with _open(uri) as file:
        schema = file.schema_arrow
        _check_columns(uri, schema, image_column, label_column)
        try:
            column = file.read([label_column])[label_column]
        except (pa.ArrowException, OSError) as err:
            raise DataError(f"{uri}: column {label_column!r} cannot be read: {err}") from err
    if column.null_count:
        row = pc.index(column.is_null(), pa.scalar(True)).as_py()
        raise DataError(f"{uri}!{row}: column {label_column!r} must have a value in every row. Received: null")
    return LabelColumn(column.to_pylist(), _class_label_names(schema, label_column))


def read_rows(uris: Sequence[str], image_column: str) -> Iterator[bytes | ImageError]:
    """Reads the encoded bytes of rows, in the order of `uris`. The rows of one file must ascend.

    Yields:
        The bytes, or an `ImageError` with status `missing`, `denied`, `empty`, `failed` or `unreadable`.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    addresses = [(uri, *uri.rsplit("!", 1)) for uri in uris]
    for file_uri, rows in itertools.groupby(addresses, key=lambda address: address[1]):
        yield from _rows_of_file(file_uri, [int(row) for _, _, row in rows], image_column)


def _rows_of_file(uri: str, rows: Sequence[int], image_column: str) -> Iterator[bytes | ImageError]:
    done = 0
    try:
        with _open(uri) as file:
            for image in _image_rows(file, rows, image_column):
                yield image
                done += 1
    except FileNotFoundError as err:
        yield from itertools.repeat(ImageError("missing", str(err)), len(rows) - done)
    except PermissionError as err:
        yield from itertools.repeat(ImageError("denied", str(err)), len(rows) - done)
    except OSError as err:
        yield from itertools.repeat(ImageError("failed", f"{uri}: {err}"), len(rows) - done)
    except (DataError, KeyError, IndexError, pa.ArrowException) as err:  # The file changed after it was listed.
        yield from itertools.repeat(ImageError("unreadable", f"{uri}: {err}"), len(rows) - done)


def _image_rows(file: pq.ParquetFile, rows: Sequence[int], image_column: str) -> Iterator[bytes | ImageError]:
    sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    ends = list(itertools.accumulate(sizes))
    for group, members in itertools.groupby(rows, key=lambda row: bisect.bisect_right(ends, row)):
        start = ends[group - 1] if group else 0
        yield from _images_of_group(file, group, [row - start for row in members], image_column)


def _images_of_group(
    file: pq.ParquetFile, group: int, rows: Sequence[int], image_column: str
) -> Iterator[bytes | ImageError]:
    """Yields the images at ascending rows of a row group. A group may hold gigabytes, so only a batch is in memory."""
    wanted, first = collections.deque(rows), 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=[image_column]):
        column = batch.column(0)
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, _BYTES_FIELD)
        while wanted and wanted[0] < first + len(column):
            image = column[wanted.popleft() - first].as_py()
            yield image or ImageError("empty", "the row has no image bytes")
        if not wanted:
            return
        first += len(column)


@contextlib.contextmanager
def _open(uri: str) -> Iterator[pq.ParquetFile]:
    with ANYWHERE.open_binary(uri) as stream:
        try:
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as err:
            raise DataError(f"{uri}: not a readable Parquet file: {err}") from err
        with file:
            yield file


def _check_columns(uri: str, schema: pa.Schema, image_column: str, label_column: str) -> None:
    missing = [name for name in (image_column, label_column) if name not in schema.names]
    if missing:
        raise DataError(
            f"{uri}: there is no column {', '.join(map(repr, missing))}; set image_column and label_column."
            f" Received: columns {', '.join(schema.names)}"
        )
    images, labels = schema.field(image_column).type, schema.field(label_column).type
    if pa.types.is_struct(images) and images.get_field_index(_BYTES_FIELD) >= 0:
        images = images.field(_BYTES_FIELD).type
    if not (pa.types.is_binary(images) or pa.types.is_large_binary(images)):
        raise DataError(
            f"{uri}: column {image_column!r} must hold encoded images, as binary or as a struct with a binary field"
            f" {_BYTES_FIELD!r}. Received: {images}"
        )
    if pa.types.is_dictionary(labels):
        labels = labels.value_type
    if not (pa.types.is_integer(labels) or pa.types.is_string(labels) or pa.types.is_large_string(labels)):
        raise DataError(
            f"{uri}: column {label_column!r} must hold class names (string) or numbers (integer). Received: {labels}"
        )


def _class_label_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Source: `datasets.Features.arrow_schema`: {"info": {"features": {column: {"names": [...]}}}} as JSON."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label_column]["names"]))
    except (KeyError, TypeError, ValueError):  # Another tool wrote the file, or the column is no ClassLabel.
        return None
