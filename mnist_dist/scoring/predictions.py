"""The prediction table: its columns, the rows of a shard, and reading it.

Owns: the schema, turning model outputs into rows, which files in the folder are the table, and reading them.
Does not own: how the files get there (`commit`), or the model.

The files that the newest mark names (`_tables/000017/mark.json`) are the table, with exactly one row per image. A mark
says, too, whether the table is a failed one: it holds more bad rows than its job allowed, or none that is ok. Without a
mark there is no table to read. Neither a mark nor a file ever changes under its name, so a reader sees the old table or
the new one, or gets an error.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mnist_dist import documents
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.score_config import TableConfig, TableFormat
from mnist_dist.sources.image_table import OTHER_FILE, with_columns
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.surroundings import what_is_there
from mnist_dist.store.uris import absolute, join

# n = rows of a shard, s = rows of these with status ok, K = classes, D = features of an embedding

STATUSES = (
    *("ok", "missing", "denied", "empty", "truncated", "unreadable", "unsupported", "too_large", "failed"),
    OTHER_FILE,
)
"""Status of a row: `ok`, or the reason why there is no prediction."""
NOT_BAD = ("ok", OTHER_FILE)
"""Statuses that do not count as bad: of a file that does not claim to be an image, no prediction is expected."""
_OF_CONTENT = ("empty", "truncated", "unreadable", "unsupported", "too_large")
"""Statuses that tell of a file what it is; the others tell that it could not be read or decoded."""

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
"""The default columns, which other tools rely on."""
MULTI_LABEL = pa.schema([("predicted_classes", pa.list_(pa.string())), ("confidences", pa.list_(pa.float32()))])
"""More default columns of multi-label tables: the classes whose probability reaches the threshold, the most probable
first, and their probabilities."""
TOP_K = pa.schema([("top_k_classes", pa.list_(pa.string())), ("top_k_confidences", pa.list_(pa.float32()))])
EMBEDDING = "embedding"
WIDE = "probability_"
"""How the names of the columns of `--wide` begin; the name of the class follows."""
ALWAYS = ("uri", "status")

TABLE = "table"
"""Folder of the output with the Parquet files and nothing else, which other readers are pointed to."""
DELTA = "delta"
"""The same of a Delta table, with its log."""
FOLDERS: dict[TableFormat, str] = {"parquet": TABLE, "delta": DELTA}
TABLES = "_tables"
"""Folder of the output with a folder for each version of the table, of which the newest counts."""
MARK = "mark.json"
SUCCESS, FAILED = "_SUCCESS", "_FAILED"
"""Copies of the newest mark, for tools that wait for a file of such a name; nothing here reads them."""
METADATA_KEY = "mnist_dist"
"""Of the JSON in the metadata of each Parquet file: `class_names` in order, `bundle`, `model_id`, `engine`,
`precision`, `resize`, `spec` (how images were decoded and fitted), `versions`, `multi_label` and `thresholds` (by
class; empty unless `multi_label`)."""
WORK = "_work"
LOCK = f"{WORK}/lock"
_MARK = re.compile(rf"(\d{{6,}})/{re.escape(MARK)}")
_READ_ATTEMPTS = 5  # reading starts again when the table is replaced meanwhile


@dataclass(kw_only=True, slots=True)
class Outcomes:
    """The results for the n images of a shard, in the order of the manifest."""

    status: list[str]
    """One of `STATUSES` for each image."""
    error: list[str | None]
    """A one-line message for people; None where the status is ok."""
    width: npt.NDArray[np.int32]
    """`[n]`, width of the original in px after EXIF rotation; 0: unknown."""
    height: npt.NDArray[np.int32]
    """`[n]`, like `width`."""
    size_bytes: list[int | None]
    """Number of bytes read; None: unknown."""
    etag: list[str | None]
    """ETag of the bytes read; None: unknown."""
    probabilities: npt.NDArray[np.float32]
    """`[n, K]`, in the order of the class names; undefined in rows that are not ok."""
    embeddings: npt.NDArray[np.float32] | None = None
    """`[n, D]`; undefined in rows that are not ok."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The files of a complete table: `_tables/000017/mark.json`, and its copy `_SUCCESS` or `_FAILED`."""

    number: int
    """The number of the lock under which the table was decided on; greater than those of older tables."""
    files: tuple[str, ...]
    """File names in the folder, in the order of the rows."""
    rows: int
    model_id: str
    failed: bool
    """Whether the table holds more bad rows than its job allowed, or none that is ok."""
    table_format: TableFormat = "parquet"

    @property
    def folder(self) -> str:
        """Folder of the files, in the output."""
        return FOLDERS[self.table_format]

    @property
    def copy_name(self) -> str:
        """The name of its copy for other tools."""
        return FAILED if self.failed else SUCCESS


def count_bad(statuses: Mapping[str, int]) -> int:
    """The number of bad rows among rows by status: all that claim to be images and have no prediction."""
    return sum(count for status, count in statuses.items() if status not in NOT_BAD)


# --- writing ---------------------------------------------------------------------------------------------------------


def prediction_schema(
    table: TableConfig, *, carried: pa.Schema, class_names: Sequence[str] = (), num_features: int = 0
) -> pa.Schema:
    """The columns of a table: the chosen columns of `CONTRACT` in its order (of a multi-label table, then those of
    `MULTI_LABEL`), those that have their own flag, then the carried columns.

    Args:
        table: the chosen columns. `uri` and `status` are always included, and so are columns that have their own flag.
        carried: the columns of the inputs that are copied into the table.
        class_names: the names of the K classes; needed for `wide`.
        num_features: D; needed for `embeddings`.

    Raises:
        ConfigError: a chosen column is unknown, or a carried column has the name of another column.
        ValueError: the class names or the number of features are needed and not given.
    """
    if (table.wide and not class_names) or (table.embeddings and num_features < 1):
        raise ValueError(
            f"wide needs class names, and embeddings a number of features. Received: "
            f"class_names={tuple(class_names)}, num_features={num_features}"
        )
    defaults = pa.schema([*CONTRACT, *(MULTI_LABEL if table.is_multi_label else ())])
    wide = [pa.field(f"{WIDE}{name}", pa.float32()) for name in class_names] if table.wide else []
    flagged = [*wide, *(TOP_K if table.top_k else ())]
    if table.embeddings:
        number = pa.type_for_alias(table.embedding_type)
        flagged.append(pa.field(EMBEDDING, pa.list_(number, num_features)))
    available = [*defaults.names, *(field.name for field in flagged), *carried.names]
    if unknown := [name for name in table.chosen if name not in available]:
        raise ConfigError(
            f"columns must be among {', '.join(available)} (top_k_classes, top_k_confidences, embedding and "
            f"probability_<class name> have their own flags). Received: {', '.join(unknown)}"
        )
    used = [*CONTRACT.names, *MULTI_LABEL.names, *TOP_K.names, EMBEDDING, *(field.name for field in wide)]
    for name in carried.names:
        if name in used:
            hint = f" (wide adds {WIDE}<class name>)" if table.wide and name.startswith(WIDE) else ""
            raise ConfigError(
                f"a carried column must not have the name of another column{hint}. Received: carry={name!r}"
            )
        used.append(name)
    chosen = table.chosen or defaults.names
    return pa.schema([field for field in defaults if field.name in (*ALWAYS, *chosen)] + [*flagged, *carried])


def fits(old: pa.Schema, schema: pa.Schema) -> bool:
    """Whether rows of an old table can be kept in a table of `schema`: it may lack only columns that have become
    defaults since."""
    known = [field for field in schema if field.name in old.names or field.name not in CONTRACT.names]
    return bool(pa.schema(known).equals(old))


def widened(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of an old table with the columns of a schema that they fit; new columns are null."""
    return with_columns(rows, schema).select(schema.names).cast(schema)


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
    other_files: pa.Array | pa.ChunkedArray | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> pa.Table:
    """The rows of a shard.

    The predicted class is the most probable one, and the first of these in a tie. The top K and the predicted classes
    come in descending order, ties in the order of the classes. Probabilities and thresholds are compared as float32.

    Args:
        schema: made by `prediction_schema`.
        uris: `string [n]`.
        outcomes: the results for the same n images.
        class_names: the names of the K classes.
        top_k: number of classes in the `top_k_*` columns; all K if there are fewer.
        model_id: model id of the bundle.
        scored_at: time of scoring, with its time zone.
        carried: n rows with the carried columns.
        other_files: `bool [n]`, true where the file does not claim to be an image: its row gets the status `other_file`
            in place of one that tells what is wrong with its content. None: all claim to be images.
        thresholds: the threshold of each class; needed if the schema has a column of `MULTI_LABEL`.

    Raises:
        ValueError: the arguments are inconsistent.
    """
    _check_outcomes(outcomes, len(uris), len(class_names))
    ok = np.array([status == "ok" for status in outcomes.status], bool)
    values: dict[str, Any] = {
        "uri": uris,
        "status": outcomes.status if other_files is None else _told_apart(outcomes.status, other_files),
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
    if thresholds:
        values |= _reached(names, scored, ok, np.array([thresholds[name] for name in class_names], np.float32))
    if TOP_K.names[0] in schema.names:
        values |= _top_k(names, scored, ok, top_k)
    if EMBEDDING in schema.names and outcomes.embeddings is not None:
        values[EMBEDDING] = _vectors(outcomes.embeddings, ok, schema.field(EMBEDDING).type)
    values |= _wide(class_names, outcomes.probabilities, ok, wanted=set(schema.names))
    if carried is not None:
        values |= dict(zip(carried.column_names, carried.columns, strict=True))
    if missing := [name for name in schema.names if name not in values]:
        raise ValueError(f"the schema has columns for which there are no values. Received: {missing}")
    return pa.table([values[name] for name in schema.names], schema=schema)


def _check_outcomes(outcomes: Outcomes, count: int, classes: int) -> None:
    for field in dataclasses.fields(outcomes):
        values = getattr(outcomes, field.name)
        if values is not None and len(values) != count:
            raise ValueError(f"outcomes must have {count} {field.name}, one for each image. Received: {len(values)}")
    if outcomes.probabilities.shape != (count, classes):
        raise ValueError(f"probabilities must be [{count}, {classes}]. Received: {list(outcomes.probabilities.shape)}")
    if unknown := set(outcomes.status) - set(STATUSES):
        raise ValueError(f"a status must be one of {', '.join(STATUSES)}. Received: {', '.join(sorted(unknown))}")


def _told_apart(statuses: Sequence[str], other_files: pa.Array | pa.ChunkedArray) -> list[str]:
    return [
        OTHER_FILE if is_other and status in _OF_CONTENT else status
        for status, is_other in zip(statuses, other_files.to_pylist(), strict=True)
    ]


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
    for _ in range(min(top_k, len(names))):  # for a few of many classes, ten times as fast as sorting
        ranks.append(left.argmax(axis=1))
        np.put_along_axis(left, ranks[-1][:, None], -np.inf, axis=1)
    indices = np.stack(ranks, axis=1)
    confidences = np.take_along_axis(scored, indices, axis=1)
    return {
        "top_k_classes": _lists(names.take(pa.array(indices.ravel())), ok),
        "top_k_confidences": _lists(pa.array(confidences.ravel(), pa.float32()), ok),
    }


def _reached(
    names: pa.Array, scored: npt.NDArray[np.float32], ok: npt.NDArray[np.bool_], thresholds: npt.NDArray[np.float32]
) -> dict[str, pa.Array]:
    """The columns of `MULTI_LABEL`; a row in which no class reaches its threshold has empty lists."""
    reached = scored >= thresholds
    rows, codes = reached.nonzero()
    confidences = scored[rows, codes]
    order = np.lexsort((codes, -confidences, rows))
    lengths = reached.sum(axis=1)
    return {
        "predicted_classes": _lists(names.take(pa.array(codes[order])), ok, lengths),
        "confidences": _lists(pa.array(confidences[order], pa.float32()), ok, lengths),
    }


def _wide(
    names: Sequence[str], probabilities: npt.NDArray[np.float32], ok: npt.NDArray[np.bool_], *, wanted: set[str]
) -> dict[str, pa.Array]:
    """The wanted ones of the columns `probability_<class name>`."""
    columns = zip((f"{WIDE}{name}" for name in names), probabilities.T, strict=True)
    return {name: pa.array(column, mask=~ok) for name, column in columns if name in wanted}


def _vectors(
    values: npt.NDArray[np.float32], ok: npt.NDArray[np.bool_], kind: pa.FixedSizeListType
) -> pa.FixedSizeListArray:
    """`[n, D]` as n lists of D numbers; rows that are not ok are null."""
    if values.shape[1] != kind.list_size:
        raise ValueError(f"embeddings must be [{len(ok)}, {kind.list_size}]. Received: {list(values.shape)}")
    with np.errstate(over="ignore"):  # features that float16 cannot hold become infinite, as the flag says
        numbers = values.astype(kind.value_type.to_pandas_dtype())
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), type=kind, mask=pa.array(~ok))


def _lists(values: pa.Array, ok: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64] | None = None) -> pa.ListArray:
    """Cuts the `values` of the s rows that are ok into s lists of these lengths, `[s]`, or else of equal length; the
    other rows are null."""
    length_of = np.zeros(len(ok), np.int64)
    length_of[ok] = len(values) // max(int(ok.sum()), 1) if lengths is None else lengths
    offsets = np.concatenate([[0], np.cumsum(length_of)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=pa.array(~ok))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_predictions(
    uri: str | os.PathLike[str], *, columns: Sequence[str] | None = None, store: Store = ANYWHERE
) -> pa.Table:
    """Reads the whole prediction table; other files in its folder are ignored.

    Args:
        uri: the output of a scoring job: a folder or a bucket prefix.
        columns: the columns to read, in this order. None: all.
        store: the store that holds the table.

    Raises:
        DataError: there is no finished table.
        ConfigError: the table has no such column.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    root = absolute(os.fspath(uri))
    mark = _require_mark(root, store)
    for _ in range(_READ_ATTEMPTS):
        try:
            schema = _chosen(schema_of(root, mark, store=store), columns, root)
            return pa.Table.from_batches(_batches(root, mark, schema, store), schema)
        except FileNotFoundError as err:
            before, mark = mark, _require_mark(root, store)
            if mark == before:
                raise DataError(f"{root}: its mark names a file that does not exist: {err}") from err
    raise DataError(f"the table was replaced {_READ_ATTEMPTS} times while it was read. Received: {root!r}")


def iter_predictions(
    uri: str | os.PathLike[str], *, columns: Sequence[str] | None = None, store: Store = ANYWHERE
) -> Iterator[pa.RecordBatch]:
    """Like `read_predictions`, but yields batches: at most one row group is in memory.

    Raises:
        DataError: there is no finished table, or a scoring job replaced it during reading.
        ConfigError, PermissionError, ServiceError, StorageError: as for `read_predictions`.
    """
    root = absolute(os.fspath(uri))
    mark = _require_mark(root, store)
    try:
        yield from _batches(root, mark, _chosen(schema_of(root, mark, store=store), columns, root), store)
    except FileNotFoundError as err:
        raise DataError(f"{root}: the table was replaced while it was read; read it again: {err}") from err


def table_schema(uri: str | os.PathLike[str], *, store: Store = ANYWHERE) -> pa.Schema:
    """The columns of the table.

    Raises:
        DataError: there is no finished table.
        FileNotFoundError: the table was replaced in the meantime.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    root = absolute(os.fspath(uri))
    return schema_of(root, _require_mark(root, store), store=store)


def read_mark(uri: str, *, store: Store = ANYWHERE) -> Mark | None:
    """Reads the newest mark; None if there is none.

    Raises:
        DataError: the mark is damaged.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    for _ in range(_READ_ATTEMPTS):
        names = (entry.uri.removeprefix(f"{join(uri, TABLES)}/") for entry in store.scan_entries(join(uri, TABLES)))
        numbers = [int(match[1]) for name in names if (match := _MARK.fullmatch(name))]
        if not numbers:
            return None
        try:
            return documents.read(store, table_uri(uri, max(numbers), MARK), Mark)
        except FileNotFoundError:  # A newer table has replaced it in the meantime.
            continue
    raise DataError(f"the table was replaced {_READ_ATTEMPTS} times while its mark was read. Received: {uri!r}")


def table_uri(uri: str, number: int, name: str) -> str:
    """The URI of a file that describes one version of the table."""
    return join(uri, TABLES, f"{number:06d}", name)


def read_row_groups(uri: str, *, columns: Sequence[str] | None = None, store: Store = ANYWHERE) -> Iterator[pa.Table]:
    """Reads one Parquet file, row group by row group.

    Raises:
        DataError: the file is damaged, or not a Parquet file.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    with _open(uri, store) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns)


def _require_mark(root: str, store: Store) -> Mark:
    mark = read_mark(root, store=store)
    if mark is not None:
        return mark
    work = join(root, WORK)
    if any(not entry.uri.startswith(f"{join(root, LOCK)}/") for entry in store.scan_entries(work)):
        raise DataError(
            f"the prediction table is not finished: a scoring job is still running, or was stopped; the same command "
            f"resumes it. Received: {root!r}"
        )
    output = root.removesuffix(f"/{TABLE}").removesuffix(f"/{DELTA}")
    is_inside = output != root and read_mark(output, store=store) is not None
    hint = f" (did you mean {output}?)" if is_inside else what_is_there(root, store=store)
    raise DataError(f"there is no prediction table (no {TABLES}/*/{MARK}){hint}. Received: {root!r}")


def _chosen(schema: pa.Schema, columns: Sequence[str] | None, root: str) -> pa.Schema:
    if columns is None:
        return schema
    if unknown := [name for name in columns if name not in schema.names]:
        raise ConfigError(
            f"{root} has only the columns {', '.join(schema.names)}. Received: {', '.join(map(repr, unknown))}"
        )
    return pa.schema([schema.field(name) for name in columns])


def schema_of(root: str, mark: Mark, *, store: Store = ANYWHERE) -> pa.Schema:
    """The columns of a version of the table; see `table_schema`."""
    with _open(join(root, mark.folder, mark.files[0]), store) as file:
        return file.schema_arrow


def _batches(root: str, mark: Mark, schema: pa.Schema, store: Store) -> Iterator[pa.RecordBatch]:
    for name in mark.files:
        for rows in read_row_groups(join(root, mark.folder, name), columns=schema.names, store=store):
            yield from rows.select(schema.names).to_batches()


@contextlib.contextmanager
def _open(uri: str, store: Store) -> Iterator[pq.ParquetFile]:
    with store.open_binary(uri) as stream:
        try:
            # pre_buffer fetches the columns of a row group together; on S3, single requests would wait in turn.
            with pq.ParquetFile(stream, pre_buffer=True) as file:
                yield file
        except (pa.ArrowException, OSError) as err:
            if isinstance(err, OSError) and err.errno is not None:  # from the storage; pyarrow sets no errno
                raise
            raise DataError(f"{uri}: not a readable Parquet file: {err}") from err
