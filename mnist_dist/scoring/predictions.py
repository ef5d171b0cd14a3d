"""The prediction table: its columns, the rows of a shard, and reading it.

Owns: the schema, how a model's answers become rows, which of the folder's files are the table, and reading them.
Does not own: how the files come to be there (`commit`), or the model.

The files that `_SUCCESS` names are the table, exactly one row per image. `_FAILED` in its place says the same of a
table that is complete, but holds more bad rows than its job allowed. With neither there is no table to read. A file
never changes under its name, so a reader sees one table or the next, or is told.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mnist_dist import documents
from mnist_dist.config import TableConfig
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import absolute, join

# n = rows of a shard, s = those of them that are ok, K = classes, D = features of an embedding

STATUSES = ("ok", "missing", "denied", "empty", "truncated", "unreadable", "unsupported", "too_large", "failed")
"""Of a row: `ok`, or why there is no prediction."""
NOT_BAD = ("ok", "unsupported")
"""The statuses that do not count against a job: a text file in a folder of images is no damage."""

CONTRACT = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        ("error", pa.string()),
        ("predicted_index", pa.int32()),
        ("predicted_class", pa.string()),
        ("confidence", pa.float32()),
        ("probabilities", pa.list_(pa.float32())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("model_id", pa.string()),
        ("scored_at", pa.timestamp("us", tz="UTC")),
    ]
)
"""The columns that other tools rely on."""
TOP_K = pa.schema([("top_k_classes", pa.list_(pa.string())), ("top_k_confidences", pa.list_(pa.float32()))])
EMBEDDING = pa.schema([("embedding", pa.list_(pa.float32()))])
ALWAYS = ("uri", "status")

TABLE = "table"
"""Folder of the output with the Parquet files and nothing else, which other readers are pointed to."""
SUCCESS, FAILED = "_SUCCESS", "_FAILED"
METADATA_KEY = "mnist_dist"
"""Of the JSON in the metadata of each Parquet file: `class_names` in order, `bundle`, `model_id`, `engine`,
`precision`, `resize` and `versions`."""
WORK = "_work"
LOCK = f"{WORK}/lock"
_READ_ATTEMPTS = 5  # of a table that is replaced each time while it is read


@dataclass(kw_only=True, slots=True)
class Outcomes:
    """What became of the n images of a shard, in the order of the manifest."""

    status: list[str]
    """Each one of `STATUSES`."""
    error: list[str | None]
    """One line for a person; None where ok."""
    width: npt.NDArray[np.int32]
    """`[n]`, of the original, px, after EXIF rotation; 0: unknown."""
    height: npt.NDArray[np.int32]
    """`[n]`, as `width`."""
    size_bytes: list[int | None]
    """Of the bytes that were read; None: unknown."""
    etag: list[str | None]
    """Of the bytes that were read; None: unknown."""
    probabilities: npt.NDArray[np.float32]
    """`[n, K]`, in the order of the class names; rows that are not ok hold anything."""
    embeddings: npt.NDArray[np.float32] | None = None
    """`[n, D]`; rows that are not ok hold anything."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What `_SUCCESS` or `_FAILED` says: the table is complete, and these are its files."""

    generation: int
    files: tuple[str, ...]
    """Names in `table/`, in the order of the rows."""
    rows: int
    model_id: str
    failed: bool
    """It holds more bad rows than its job allowed."""

    def write(self, root: str, *, store: Store = ANYWHERE) -> None:
        """Puts the mark into the folder of the table."""
        documents.write(store, join(root, self.name), self)

    @property
    def name(self) -> str:
        return FAILED if self.failed else SUCCESS


# --- writing ---------------------------------------------------------------------------------------------------------


def prediction_schema(table: TableConfig, *, carried: pa.Schema) -> pa.Schema:
    """The columns of a table: of the contract those that were chosen, in its order, then the carried ones.

    Args:
        table: which columns; `uri` and `status` are there always, what a flag of its own asks for also.
        carried: the columns of the inputs that go along.

    Raises:
        ConfigError: a chosen column is unknown, or a carried one has the name of another.
    """
    flagged = [*(TOP_K if table.top_k else ()), *(EMBEDDING if table.embeddings else ())]
    available = [*CONTRACT.names, *(field.name for field in flagged), *carried.names]
    if unknown := [name for name in table.chosen if name not in available]:
        raise ConfigError(
            f"columns are of {', '.join(available)} (top_k_classes, top_k_confidences and embedding have flags of "
            f"their own). Received: {', '.join(unknown)}"
        )
    taken = [*CONTRACT.names, *TOP_K.names, *EMBEDDING.names]
    for name in carried.names:
        if name in taken:
            raise ConfigError(
                f"a carried column has a name that no other column of the table has. Received: carry={name!r}"
            )
        taken.append(name)
    chosen = table.chosen or CONTRACT.names
    return pa.schema([field for field in CONTRACT if field.name in (*ALWAYS, *chosen)] + [*flagged, *carried])


def fits(old: pa.Schema, schema: pa.Schema) -> bool:
    """Whether rows of an old table can stay in one of this schema: it has the same columns, but perhaps not those that
    have become defaults since."""
    known = [field for field in schema if field.name in old.names or field.name not in CONTRACT.names]
    return bool(pa.schema(known).equals(old))


def widened(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of an old table in the columns of one that they fit; null where they had none."""
    for field in schema:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows.select(schema.names).cast(schema)


def prediction_rows(
    schema: pa.Schema,
    *,
    uris: pa.Array | pa.ChunkedArray,
    outcomes: Outcomes,
    class_names: Sequence[str],
    top_k: int,
    model_id: str,
    scored_at: datetime,
    carried: pa.Table | None,
) -> pa.Table:
    """The rows of a shard.

    The predicted class is the most probable one, the first of them where several are; the top K are in falling order,
    equal ones in the order of the classes.

    Args:
        schema: of `prediction_schema`.
        uris: `string [n]`.
        outcomes: of the same n images.
        class_names: K of them.
        top_k: how many classes the `top_k_*` columns name; all, where there are fewer.
        model_id: of the bundle.
        scored_at: with its time zone.
        carried: n rows with the carried columns.

    Raises:
        ValueError: the arguments do not fit together.
    """
    _check_outcomes(outcomes, len(uris), len(class_names))
    ok = np.array([status == "ok" for status in outcomes.status], bool)
    values: dict[str, Any] = {
        "uri": uris,
        "status": outcomes.status,
        "error": pa.array(outcomes.error, pa.string()),
        "width": pa.array(outcomes.width, mask=outcomes.width == 0),
        "height": pa.array(outcomes.height, mask=outcomes.height == 0),
        "size_bytes": pa.array(outcomes.size_bytes, pa.int64()),
        "etag": pa.array(outcomes.etag, pa.string()),
        "model_id": pa.repeat(pa.scalar(model_id, pa.string()), len(uris)),
        "scored_at": pa.repeat(pa.scalar(scored_at, pa.timestamp("us", tz="UTC")), len(uris)),
    }
    names, scored = pa.array(class_names, pa.string()), outcomes.probabilities[ok]
    values |= _best(names, scored, ok)
    if TOP_K.names[0] in schema.names:
        values |= _top_k(names, scored, ok, top_k)
    if outcomes.embeddings is not None:
        values["embedding"] = _lists(pa.array(outcomes.embeddings[ok].ravel(), pa.float32()), ok)
    if carried is not None:
        values |= dict(zip(carried.column_names, carried.columns, strict=True))
    if missing := [name for name in schema.names if name not in values]:
        raise ValueError(f"the embeddings or carried columns of the schema are given. Received none: {missing}")
    return pa.table([values[name] for name in schema.names], schema=schema)


def _check_outcomes(outcomes: Outcomes, count: int, classes: int) -> None:
    for field in dataclasses.fields(outcomes):
        values = getattr(outcomes, field.name)
        if values is not None and len(values) != count:
            raise ValueError(f"outcomes have {count} {field.name}, one for each image. Received: {len(values)}")
    if outcomes.probabilities.shape != (count, classes):
        raise ValueError(f"probabilities are [{count}, {classes}]. Received: {list(outcomes.probabilities.shape)}")
    if unknown := set(outcomes.status) - set(STATUSES):
        raise ValueError(f"a status is one of {', '.join(STATUSES)}. Received: {', '.join(sorted(unknown))}")


def _best(names: pa.Array, scored: npt.NDArray[np.float32], ok: npt.NDArray[np.bool_]) -> dict[str, pa.Array]:
    index = np.zeros(len(ok), np.int32)
    index[ok] = scored.argmax(axis=1)
    confidence = np.zeros(len(ok), np.float32)
    confidence[ok] = scored.max(axis=1)
    predicted = pa.array(index, mask=~ok)
    return {
        "predicted_index": predicted,
        "predicted_class": names.take(predicted),
        "confidence": pa.array(confidence, mask=~ok),
        "probabilities": _lists(pa.array(scored.ravel(), pa.float32()), ok),
    }


def _top_k(
    names: pa.Array, scored: npt.NDArray[np.float32], ok: npt.NDArray[np.bool_], top_k: int
) -> dict[str, pa.Array]:
    left, ranks = scored.copy(), []
    for _ in range(min(top_k, len(names))):  # for a few of many classes a tenth of the time of sorting
        ranks.append(left.argmax(axis=1))
        np.put_along_axis(left, ranks[-1][:, None], -np.inf, axis=1)
    indices = np.stack(ranks, axis=1)
    confidences = np.take_along_axis(scored, indices, axis=1)
    return {
        "top_k_classes": _lists(names.take(pa.array(indices.ravel())), ok),
        "top_k_confidences": _lists(pa.array(confidences.ravel(), pa.float32()), ok),
    }


def _lists(values: pa.Array, ok: npt.NDArray[np.bool_]) -> pa.ListArray:
    """`values` of the s rows that are ok, cut into s lists of one length; null in the other rows."""
    length = len(values) // max(int(ok.sum()), 1)
    offsets = np.concatenate([[0], np.cumsum(ok * length)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=pa.array(~ok))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_predictions(
    uri: str | os.PathLike[str], *, columns: Sequence[str] | None = None, store: Store = ANYWHERE
) -> pa.Table:
    """The whole prediction table, whatever else lies in its folder.

    Args:
        uri: the output of a scoring job: a folder or an `s3://` prefix.
        columns: the columns that are read, in this order. None: all.
        store: where it lies.

    Raises:
        DataError: there is no finished table.
        ConfigError: the table has no such column.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    root = absolute(os.fspath(uri))
    mark = _mark_of(root, store)
    for _ in range(_READ_ATTEMPTS):
        try:
            schema = _chosen(_schema_of(root, mark, store), columns, root)
            return pa.Table.from_batches(_batches(root, mark, schema, store), schema)
        except FileNotFoundError as err:
            before, mark = mark, _mark_of(root, store)
            if mark == before:
                raise DataError(f"{root}: {mark.name} names a file that is not there: {err}") from err
    raise DataError(f"the table was replaced {_READ_ATTEMPTS} times while it was read. Received: {root!r}")


def iter_predictions(
    uri: str | os.PathLike[str], *, columns: Sequence[str] | None = None, store: Store = ANYWHERE
) -> Iterator[pa.RecordBatch]:
    """As `read_predictions`, but batch by batch: no more than a row group is in memory.

    Raises:
        DataError: there is no finished table, or a scoring job replaced it while it was read.
        ConfigError, PermissionError, ServiceError, StorageError: as `read_predictions`.
    """
    root = absolute(os.fspath(uri))
    mark = _mark_of(root, store)
    try:
        yield from _batches(root, mark, _chosen(_schema_of(root, mark, store), columns, root), store)
    except FileNotFoundError as err:
        raise DataError(f"{root}: the table was replaced while it was read; read it again: {err}") from err


def table_schema(uri: str | os.PathLike[str], *, store: Store = ANYWHERE) -> pa.Schema:
    """The columns of the table.

    Raises:
        DataError: there is no finished table.
        FileNotFoundError: it was replaced in this moment.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    root = absolute(os.fspath(uri))
    return _schema_of(root, _mark_of(root, store), store)


def read_mark(uri: str, *, store: Store = ANYWHERE) -> Mark | None:
    """What `_SUCCESS`, or else `_FAILED`, says; None where there is neither.

    Raises:
        DataError: it is the mark of something else.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    for name in (SUCCESS, FAILED, SUCCESS):  # again: a table judged anew meanwhile has had a mark all the time
        try:
            return documents.read(store, join(uri, name), Mark)
        except FileNotFoundError:
            continue
        except DataError as err:  # such as the empty one of Spark
            raise DataError(f"{join(uri, name)} is not the mark of a prediction table: {err}") from err
    return None


def read_row_groups(uri: str, *, columns: Sequence[str] | None = None, store: Store = ANYWHERE) -> Iterator[pa.Table]:
    """One Parquet file, row group by row group.

    Raises:
        DataError: it is no Parquet file, or damaged.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    with _open(uri, store) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns)


def _mark_of(root: str, store: Store) -> Mark:
    mark = read_mark(root, store=store)
    if mark is not None:
        return mark
    work = join(root, WORK)
    if any(entry.uri != join(root, LOCK) for entry in store.scan_entries(work)):
        raise DataError(
            f"the prediction table is not finished: a scoring job is at work on it, or was stopped and goes on with "
            f"the same command. Received: {root!r}"
        )
    raise DataError(f"there is no prediction table (no {SUCCESS} and no {FAILED}). Received: {root!r}")


def _chosen(schema: pa.Schema, columns: Sequence[str] | None, root: str) -> pa.Schema:
    if columns is None:
        return schema
    if unknown := [name for name in columns if name not in schema.names]:
        raise ConfigError(
            f"{root} has the columns {', '.join(schema.names)}. Received: {', '.join(map(repr, unknown))}"
        )
    return pa.schema([schema.field(name) for name in columns])


def _schema_of(root: str, mark: Mark, store: Store) -> pa.Schema:
    with _open(join(root, TABLE, mark.files[0]), store) as file:
        return file.schema_arrow


def _batches(root: str, mark: Mark, schema: pa.Schema, store: Store) -> Iterator[pa.RecordBatch]:
    for name in mark.files:
        for rows in read_row_groups(join(root, TABLE, name), columns=schema.names, store=store):
            yield from rows.select(schema.names).to_batches()


@contextlib.contextmanager
def _open(uri: str, store: Store) -> Iterator[pq.ParquetFile]:
    with store.open_binary(uri) as stream:
        try:
            # the ranges of a row group are fetched together: on S3 a request for each column would wait for the last
            with pq.ParquetFile(stream, pre_buffer=True) as file:
                yield file
        except (pa.ArrowException, OSError) as err:
            if isinstance(err, OSError) and err.errno is not None:  # of the storage; pyarrow's own have no number
                raise
            raise DataError(f"{uri}: not a readable Parquet file: {err}") from err
