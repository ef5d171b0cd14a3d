"""Opens a prediction table for evaluation: finds its class names, and turns the columns of a batch into numbers.

Owns: the sources of class names, and the prediction of a row if the table lacks some columns. Does not own: reading
(`scoring/predictions`), or the labels (`truth`).
"""

import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.errors import DataError, MnistDistError
from mnist_dist.models.bundle import BundleInfo, read_bundle_info
from mnist_dist.scoring.generations import Output, Summary
from mnist_dist.scoring.predictions import METADATA_KEY, iter_predictions, read_mark, table_schema
from mnist_dist.store.uris import absolute

# n = rows of a batch, s = rows with probabilities, K = classes

log = logging.getLogger(__name__)

NO_LABEL, UNKNOWN_LABEL = -1, -2
_INDEX, _CLASS, _PROBABILITIES, _CONFIDENCE = "predicted_index", "predicted_class", "probabilities", "confidence"
PREDICTION_COLUMNS = (_INDEX, _CLASS, _PROBABILITIES, _CONFIDENCE)


@dataclass(frozen=True)
class Classes:
    """The K classes of a table."""

    names: tuple[str, ...]
    """In the order of the probabilities; `#7` if the name of class 7 is unknown."""
    unnamed: tuple[int, ...] = ()
    """Numbers of the classes without a known name, as they were never predicted."""
    by_number: bool = True
    """Whether a label may be a class number. False for guessed labels: a folder called `1` is not the second class."""

    def __len__(self) -> int:
        return len(self.names)

    def codes(self, labels: pa.Array) -> npt.NDArray[np.int64]:
        """Maps each label to its class number.

        A label is the name of a class. A whole number also matches a name of the same value: `7` is `007`. If no name
        is a number, a whole number is a class number. `true` and `false`, in any case, are the class of this name, of
        the name yes or no, or of two classes the one that is called, or has the number, 1 or 0.

        Args:
            labels: `string [n]`.

        Returns:
            `int64 [n]`; `NO_LABEL` for null, `UNKNOWN_LABEL` if no class matches.
        """
        texts, numbers = self._lookup
        matches = numbers.take(pc.index_in(labels, value_set=texts)).fill_null(UNKNOWN_LABEL)
        codes: npt.NDArray[np.int64] = matches.to_numpy(zero_copy_only=False)
        return np.where(labels.is_null().to_numpy(zero_copy_only=False), NO_LABEL, codes)

    @functools.cached_property
    def _lookup(self) -> tuple[pa.Array, pa.Array]:
        codes = {name: code for code, name in enumerate(self.names) if code not in self.unnamed}
        numbers = {name: str(int(name)) for name in codes if name.isascii() and name.isdigit()}
        if not numbers and self.by_number:
            codes |= {str(code): code for code in range(len(self.names))}
        elif numbers and len(set(numbers.values())) == len(numbers):  # Otherwise `7` could be `07` or `007`.
            codes = {number: codes[name] for name, number in numbers.items()} | codes
        codes = _codes_of_booleans(codes, is_two=len(self.names) == 2) | codes
        return pa.array(list(codes), pa.string()), pa.array(list(codes.values()), pa.int64())


def _codes_of_booleans(codes: Mapping[str, int], *, is_two: bool) -> dict[str, int]:
    """The classes that `true` and `false` mean, by the ways in which programs write these.

    Args:
        codes: class numbers by label.
        is_two: whether there are two classes, which 1 and 0 are then the numbers of.
    """
    by_case = {name.lower(): code for name, code in reversed(list(codes.items()))}
    found: dict[str, int] = {}
    for word, same in (("true", ("true", "yes", "1")), ("false", ("false", "no", "0"))):
        name = next((name for name in same if name in by_case and (is_two or not name.isdigit())), None)
        if name is not None:
            found |= dict.fromkeys((word, word.capitalize(), word.upper()), by_case[name])
    return found


@dataclass(frozen=True, kw_only=True)
class ScoredTable:
    """A finished prediction table."""

    uri: str
    schema: pa.Schema
    rows: int
    model_id: str
    failed: bool
    """True if the table has more bad rows than its job allowed."""
    classes: Classes
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Of a multi-label table, the threshold of each class."""
    is_multi_label: bool = False
    """Whether each class has a probability of its own, so that an image may have several classes or none."""

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Reads those of the columns that the table has; see `iter_predictions`."""
        present = [name for name in dict.fromkeys(columns) if name in self.schema.names]
        return iter_predictions(self.uri, columns=present)


def open_table(uri: str, *, bundle: str | None) -> ScoredTable:
    """Opens a finished table and finds the names of its classes.

    Args:
        uri: a folder or a bucket prefix.
        bundle: the bundle that made the table; None: the names come from the table's metadata, or else from its rows.

    Raises:
        DataError: there is no finished table, or another bundle made it.
        BundleError: the bundle cannot be read.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    root = absolute(uri)
    try:
        schema = table_schema(root)
    except FileNotFoundError as err:
        raise DataError(f"{root}: the table was replaced while it was read, or lacks a file: {err}") from err
    mark = read_mark(root)
    if mark is None:
        raise DataError(f"the table was replaced while it was read. Received: {root!r}")
    described = _metadata(schema)
    names = _names_of_bundle(bundle, mark.model_id) if bundle is not None else described.get("class_names")
    return ScoredTable(
        uri=root,
        schema=schema,
        rows=mark.rows,
        model_id=mark.model_id,
        failed=mark.failed,
        classes=Classes(tuple(names)) if names is not None else _classes_of_rows(root, schema),
        thresholds=described.get("thresholds", {}),
        is_multi_label=described.get("multi_label", False),
    )


def read_provenance(root: str) -> tuple[Summary | None, BundleInfo | None]:
    """Reads the summary of a table, and the `bundle.json` of the model that made it; None if they are gone."""
    summary = None
    try:
        committed = Output(root).committed()
        summary = committed.summary if committed is not None else None
        if summary is None:
            return None, None
        info = read_bundle_info(summary.described.bundle)
    except (OSError, MnistDistError) as err:  # The provenance is an extra; an evaluation succeeds without it.
        log.info("%s: cannot read the provenance of the table: %s", root, err)
        return summary, None
    return summary, info if info.model_id == summary.model_id else None


# --- the columns of a batch ------------------------------------------------------------------------------------------


def predicted_codes(batch: pa.RecordBatch, classes: Classes) -> npt.NDArray[np.int64] | None:
    """Returns the predicted class of each row, from the first available of index, class and probabilities.

    Returns:
        `int64 [n]`: class numbers, -1 for a row without a prediction. None: the table has none of these columns.

    Raises:
        DataError: a prediction is none of the classes.
    """
    names = batch.schema.names
    if _INDEX in names:
        codes = batch[_INDEX].cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    elif _CLASS in names:
        codes = classes.codes(batch[_CLASS])
        if (codes == UNKNOWN_LABEL).any():
            unknown = batch[_CLASS][int((codes == UNKNOWN_LABEL).argmax())].as_py()
            raise DataError(f"predicted_class is one of {', '.join(classes.names[:20])}. Received: {unknown!r}")
    elif _PROBABILITIES in names:
        rows, scores = probabilities(batch, classes)
        codes = np.full(len(batch), -1, np.int64)
        codes[rows] = scores.argmax(axis=1) if len(rows) else 0
    else:
        return None
    if len(codes) and not -1 <= codes.min() <= codes.max() < len(classes):
        raise DataError(f"predicted_index is below {len(classes)}, the number of classes. Received: {codes.max()}")
    return np.asarray(codes, np.int64)


def confidences(batch: pa.RecordBatch, classes: Classes) -> npt.NDArray[np.float64] | None:
    """Returns the probability of each predicted class; `float64 [n]`, NaN if unknown. None: no column has it."""
    if _CONFIDENCE in batch.schema.names:
        values = batch[_CONFIDENCE].cast(pa.float64()).fill_null(np.nan)
        return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)
    if _PROBABILITIES not in batch.schema.names:
        return None
    highest = np.full(len(batch), np.nan)
    rows, scores = probabilities(batch, classes)
    if len(rows):
        highest[rows] = scores.max(axis=1)
    return highest


def probabilities(batch: pa.RecordBatch, classes: Classes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Returns the rows that have probabilities, `int64 [s]`, and their probabilities, `float32 [s, K]`.

    Raises:
        DataError: a row does not have one probability per class.
    """
    lists = batch[_PROBABILITIES]
    rows = np.flatnonzero(lists.is_valid().to_numpy(zero_copy_only=False))
    present = lists.drop_null()
    lengths = pc.list_value_length(present).to_numpy(zero_copy_only=False)
    if (lengths != len(classes)).any():
        wrong = lengths[int((lengths != len(classes)).argmax())]
        raise DataError(f"each row has {len(classes)} probabilities, one for each class. Received: {wrong}")
    values = present.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
    return rows, values.reshape(len(rows), len(classes))


# --- class names -----------------------------------------------------------------------------------------------------


def _names_of_bundle(bundle: str, model_id: str) -> tuple[str, ...]:
    info = read_bundle_info(bundle)
    if info.model_id != model_id:
        raise DataError(f"the model {model_id} made the table. Received: bundle {bundle!r}, model {info.model_id}")
    return info.class_names


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    """What the Parquet metadata says of the model; empty: another program wrote the table."""
    described = (schema.metadata or {}).get(METADATA_KEY.encode())
    return {} if described is None else dict(json.loads(described))


def _classes_of_rows(root: str, schema: pa.Schema) -> Classes:
    names, count = _predicted_names(root, schema), _number_of_probabilities(root, schema)
    count = max([count, *(code + 1 for code in names)])
    if len(names) > 1 and all(name == str(code) for code, name in names.items()):
        names = {code: str(code) for code in range(count)}  # Classes that were never predicted are named alike.
    unnamed = tuple(code for code in range(count) if code not in names)
    return Classes(tuple(names.get(code, f"#{code}") for code in range(count)), unnamed)


def _number_of_probabilities(root: str, schema: pa.Schema) -> int:
    if _PROBABILITIES in schema.names:
        for batch in iter_predictions(root, columns=[_PROBABILITIES]):
            present = batch[_PROBABILITIES].drop_null()
            if len(present):
                return len(present[0])
    return 0


def _predicted_names(root: str, schema: pa.Schema) -> dict[int, str]:
    """The names of the predicted classes by class number; without a number column, numbers follow the sorted names."""
    if _CLASS not in schema.names:
        return {}
    if _INDEX not in schema.names:
        distinct: set[str] = set()
        for batch in iter_predictions(root, columns=[_CLASS]):
            distinct |= set(batch[_CLASS].drop_null().unique().to_pylist())
        return dict(enumerate(sorted(distinct)))
    names: dict[int, str] = {}
    for batch in iter_predictions(root, columns=[_INDEX, _CLASS]):
        pairs = pa.Table.from_batches([batch]).group_by([_INDEX, _CLASS]).aggregate([])
        for code, name in zip(pairs[_INDEX].to_pylist(), pairs[_CLASS].to_pylist(), strict=True):
            if code is None or name is None:
                continue
            if names.setdefault(code, name) != name:
                raise DataError(f"{root}: each class has one name. Received: {names[code]!r}, {name!r} for {code}")
    return names
