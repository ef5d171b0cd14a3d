"""Compares two prediction tables of the same images: where they agree, which is better, and which predictions changed.

Owns: the join by URI and the counts over it. Does not own: the labels, which are those of the first table.

In multi-label tables, the predicted classes of an image count as one: it is the same, or right, if all of them are
(`set_codes`).

Memory: 29 bytes per row of the first table (up to twice that while the rows are sorted), 8 bytes per row that only the
second table has, one batch of the second table, and two numbers per pair of classes between which predictions changed.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.errors import DataError
from mnist_dist.evaluation.multi_label import check_has_sets
from mnist_dist.evaluation.set_codes import SetCodes, SetScores
from mnist_dist.evaluation.tables import PREDICTION_COLUMNS, Classes, ScoredTable, confidences, predicted_codes
from mnist_dist.evaluation.truth import Truth
from mnist_dist.evaluation.uri_hashes import Hashes, UriIndex, repeated, uri_hashes

EXACT_BELOW = 25
"""McNemar's test is exact if fewer images than this are right in one table only."""
_MAX_CODES = 2**32  # More than the codes of classes or sets, which are int32.
_MAX_PAIRS = 100  # Pairs of classes in the result, those with the most changed predictions.
_MOVED = pa.schema(
    {
        "uri": pa.string(),
        **dict.fromkeys(("truth", "first", "second"), pa.int32()),
        **dict.fromkeys(("first_confidence", "second_confidence", "min_confidence"), pa.float32()),
    }
)


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Tests whether one of two classifiers of the same images is right significantly more often.

    Source: McNemar 1947, Psychometrika 12, 153-157; with Edwards' correction for continuity (1948, Psychometrika 13,
    185-187).
    """

    method: str
    """`exact` (binomial) or `chi-squared` (with correction for continuity)."""
    statistic: float | None
    """Chi-squared with one degree of freedom; None for the exact test."""
    p_value: float


@dataclass(frozen=True, kw_only=True)
class ClassMove:
    """How many images the first table assigns to one class and the second to another."""

    first: str
    second: str
    images: int


@dataclass(frozen=True, kw_only=True)
class ClassPair:
    """How many images of a class each of the two tables predicts correctly."""

    name: str
    images: int
    """Compared images of this class."""
    first_right: int
    second_right: int


@dataclass(frozen=True, kw_only=True)
class Moved:
    """An image that the two tables assign to different classes."""

    uri: str
    truth: str | None
    first: str
    second: str
    first_confidence: float | None
    second_confidence: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of a comparison. Counts are of images; of duplicates, only the first row counts."""

    first: str
    second: str
    """URIs of the tables."""
    first_model: str
    second_model: str
    common: int
    """Images in both tables."""
    only_in_first: int
    only_in_second: int
    only_in_first_examples: tuple[str, ...]
    only_in_second_examples: tuple[str, ...]
    duplicates_in_first: int
    duplicates_in_second: int
    compared: int
    """Common images with a prediction in both tables."""
    only_first_ok: int
    """Common images with a prediction in the first table only."""
    only_second_ok: int
    neither_ok: int
    agreement: float | None
    """Share of the compared images that both tables assign to the same class, or the same classes."""
    moves: tuple[ClassMove, ...]
    """The pairs of classes with the most changed predictions, in descending order."""
    moved: tuple[Moved, ...]
    """Images whose predictions differ, first those where the less confident model is the most confident."""
    known: int
    """Compared images with a known label; the fields below refer to them."""
    both_right: int
    first_right: int
    """Only the first is right."""
    second_right: int
    both_wrong: int
    mcnemar: McNemar | None
    multi_label: bool = False
    """Whether a prediction is a set of classes."""
    by_class: tuple[ClassPair, ...] = ()
    """The classes with known images, in the order of the classes; empty for multi-label tables."""
    first_scores: SetScores | None = None
    """Of multi-label tables with known labels: the metrics of the first over the compared images."""
    second_scores: SetScores | None = None

    @property
    def first_accuracy(self) -> float | None:
        """Accuracy of the first table on the same images as `second_accuracy`."""
        return (self.both_right + self.first_right) / self.known if self.known else None

    @property
    def second_accuracy(self) -> float | None:
        """Accuracy of the second table on the same images as `first_accuracy`."""
        return (self.both_right + self.second_right) / self.known if self.known else None

    def to_json(self) -> dict[str, Any]:
        """Returns the fields and the accuracies as JSON values."""
        return {**asdict(self), "first_accuracy": self.first_accuracy, "second_accuracy": self.second_accuracy}


def mcnemar(first_right: int, second_right: int) -> McNemar:
    """Runs McNemar's test.

    Args:
        first_right: number of images on which only the first classifier is right.
        second_right: number of images on which only the second classifier is right.
    """
    count = first_right + second_right
    if count < EXACT_BELOW:
        tail = sum(math.comb(count, k) for k in range(min(first_right, second_right) + 1)) / 2**count
        return McNemar(method="exact", statistic=None, p_value=min(1.0, 2 * tail))
    statistic = max(abs(first_right - second_right) - 1, 0) ** 2 / count
    # erfc is the upper tail of chi-squared with one degree of freedom, the square of a standard normal variable.
    return McNemar(method="chi-squared", statistic=statistic, p_value=math.erfc(math.sqrt(statistic / 2)))


def compare_tables(
    first: ScoredTable,
    second: ScoredTable,
    *,
    truth: Truth | None,
    shown: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Comparison:
    """Compares the predictions of two tables for the images that are in both.

    Args:
        first: the table to compare with; read twice if it has images that the second lacks.
        second: the other table; read once.
        truth: labels of the first table's images; None: there are none.
        shown: how many example images the result lists of each kind.
        progress: called with the number of rows of each batch that was read.

    Raises:
        DataError: a table has no column with the predicted class, was replaced while it was read, or only one of the
            two is multi-label.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    if first.is_multi_label != second.is_multi_label:
        raise DataError(
            "both tables must be multi-label, or neither; evaluate them one by one. Received: "
            f"{(first if first.is_multi_label else second).uri!r}, which is, and "
            f"{(second if first.is_multi_label else first).uri!r}, which is not"
        )
    for table in (first, second):
        check_has_sets(table) if table.is_multi_label else _check_has_class(table)
    joint = Classes(tuple(dict.fromkeys(first.classes.names + second.classes.names)))
    codes = SetCodes(joint) if first.is_multi_label else _ClassCodes(joint)
    rows = _Rows(first, codes, truth, progress)
    pairs = _Pairs(rows, codes, shown)
    for batch in second.batches(("uri", "status", *codes.columns)):
        pairs.add(batch, codes.predicted(batch, second), codes.confidence(batch, second))
        progress(len(batch))
    result = pairs.result(first, second)
    if not isinstance(codes, SetCodes) or not result.known:
        return result
    first_scores, second_scores = (
        codes.scores(table, rows.index, compared=rows.compared, truth=rows.truth, progress=progress)
        for table in (first, second)
    )
    return replace(result, first_scores=first_scores, second_scores=second_scores)


class Codes(Protocol):
    """Numbers what the tables predict, alike for both tables; `SetCodes` for multi-label tables."""

    columns: tuple[str, ...]
    """The columns that it needs."""

    @property
    def names(self) -> Sequence[str]:
        """The name of each number."""

    def predicted(self, batch: pa.RecordBatch, table: ScoredTable) -> npt.NDArray[np.int32]:
        """The number of each prediction, `int32 [n]`; -1: no prediction."""

    def confidence(self, batch: pa.RecordBatch, table: ScoredTable) -> npt.NDArray[np.float32]:
        """The confidence of each prediction, `float32 [n]`; NaN: unknown."""

    def truth(self, batch: pa.RecordBatch, labels: pa.Array, table: ScoredTable) -> npt.NDArray[np.int32]:
        """The number of each label, `int32 [n]`; -1: unknown."""


class _ClassCodes:
    """Numbers the classes of both tables."""

    columns: tuple[str, ...] = PREDICTION_COLUMNS

    def __init__(self, joint: Classes) -> None:
        self.names: Sequence[str] = joint.names

    def predicted(self, batch: pa.RecordBatch, table: ScoredTable) -> npt.NDArray[np.int32]:
        codes = predicted_codes(batch, table.classes)
        assert codes is not None, "compare_tables checks that a column has the class"
        ok = pc.equal(batch["status"], "ok").to_numpy(zero_copy_only=False)
        return np.where(ok, self._joint(table.classes)[codes], -1).astype(np.int32)

    def confidence(self, batch: pa.RecordBatch, table: ScoredTable) -> npt.NDArray[np.float32]:
        values = confidences(batch, table.classes)
        return (np.full(len(batch), np.nan) if values is None else values).astype(np.float32)

    def truth(self, batch: pa.RecordBatch, labels: pa.Array, table: ScoredTable) -> npt.NDArray[np.int32]:
        return self._joint(table.classes)[np.maximum(table.classes.codes(labels), -1)]

    def _joint(self, classes: Classes) -> npt.NDArray[np.int32]:
        """Maps the class codes of a table to joint codes; the last element maps -1, no class, to itself."""
        code_of = {name: code for code, name in enumerate(self.names)}
        return np.array([*(code_of[name] for name in classes.names), -1], np.int32)


def _check_has_class(table: ScoredTable) -> None:
    if not {"predicted_index", "predicted_class", "probabilities"} & set(table.schema.names):
        raise DataError(
            f"{table.uri} needs a column predicted_index, predicted_class or probabilities to be compared. "
            f"Received: columns {', '.join(table.schema.names)}"
        )


class _Rows:
    """The rows of the first table, indexed by URI."""

    def __init__(self, table: ScoredTable, codes: Codes, truth: Truth | None, progress: Callable[[int], None]) -> None:
        hashes: list[Hashes] = []
        predicted, truths = [np.zeros(0, np.int32)], list[npt.NDArray[np.int32]]()
        confidence = [np.zeros(0, np.float32)]
        for batch in table.batches(("uri", "status", *codes.columns, *(truth.columns if truth else ()))):
            hashes.append(uri_hashes(batch["uri"]))
            predicted.append(codes.predicted(batch, table))
            confidence.append(codes.confidence(batch, table))
            if truth is not None:
                truths.append(codes.truth(batch, truth.labels(batch), table))
            progress(len(batch))
        self.index = UriIndex(hashes)
        count = len(self.index.hashes)
        self.predicted = np.concatenate(predicted)
        self.confidence = np.concatenate(confidence)
        self.truth = np.concatenate(truths) if truths else np.full(count, -1, np.int32)
        self.seen = np.zeros(count, np.bool_)
        self.compared = np.zeros(count, np.bool_)
        """Rows with a prediction in both tables."""


class _Pairs:
    """Joins the second table with the rows of the first, and counts."""

    def __init__(self, rows: _Rows, codes: Codes, shown: int) -> None:
        self._rows, self._codes, self._shown = rows, codes, shown
        self._counts: Counter[str] = Counter()
        self._moves: Counter[int] = Counter()
        classes = len(codes.names) if isinstance(codes, _ClassCodes) else 0
        self._by_class = np.zeros((3, classes), np.int64)  # Known images, those right in the first, in the second.
        self._only_second: list[Hashes] = []
        self._only_second_examples: list[str] = []
        self._moved = _MOVED.empty_table()

    def add(self, batch: pa.RecordBatch, predicted: npt.NDArray[np.int32], confidence: npt.NDArray[np.float32]) -> None:
        """Adds rows of the second table."""
        hashes = uri_hashes(batch["uri"])
        places = self._rows.index.places(hashes)
        unmatched = np.flatnonzero(places < 0)
        self._only_second.append(hashes[unmatched])
        if missing := self._shown - len(self._only_second_examples):
            self._only_second_examples += batch["uri"].take(pa.array(unmatched[:missing])).to_pylist()
        matched = np.flatnonzero(places >= 0)
        _, firsts = np.unique(places[matched], return_index=True)
        new = matched[np.sort(firsts)]
        new = new[~self._rows.seen[places[new]]]
        self._counts["duplicates"] += len(matched) - len(new)
        self._rows.seen[places[new]] = True
        uris = batch["uri"].take(pa.array(new))
        self._add_pairs(uris, places[new], predicted[new], confidence[new])

    def _add_pairs(
        self,
        uris: pa.Array,
        places: npt.NDArray[np.int64],
        second: npt.NDArray[np.int32],
        second_confidence: npt.NDArray[np.float32],
    ) -> None:
        first, truth = self._rows.predicted[places], self._rows.truth[places]
        both = (first >= 0) & (second >= 0)
        self._rows.compared[places[both]] = True
        moved, known = both & (first != second), both & (truth >= 0)
        first_right, second_right = known & (first == truth), known & (second == truth)
        self._counts.update(
            common=len(places),
            compared=int(both.sum()),
            only_first_ok=int(((first >= 0) & (second < 0)).sum()),
            only_second_ok=int(((first < 0) & (second >= 0)).sum()),
            neither_ok=int(((first < 0) & (second < 0)).sum()),
            moved=int(moved.sum()),
            known=int(known.sum()),
            both_right=int((first_right & second_right).sum()),
            first_right=int((first_right & ~second_right).sum()),
            second_right=int((second_right & ~first_right).sum()),
        )
        if classes := self._by_class.shape[1]:
            chosen = (known, known & (first == truth), known & (second == truth))
            self._by_class += [np.bincount(truth[rows], minlength=classes) for rows in chosen]
        rows = np.flatnonzero(moved)
        pairs, counts = np.unique(first[rows].astype(np.int64) * _MAX_CODES + second[rows], return_counts=True)
        self._moves.update(dict(zip(pairs.tolist(), counts.tolist(), strict=True)))
        first_confidence = self._rows.confidence[places]
        self._keep(uris, rows, (truth, first, second), (first_confidence, second_confidence))

    def _keep(
        self,
        uris: pa.Array,
        rows: npt.NDArray[np.int64],
        codes: tuple[npt.NDArray[np.int32], ...],
        confidence: tuple[npt.NDArray[np.float32], ...],
    ) -> None:
        """Adds changed predictions to the examples, of which the most confident stay."""
        if not len(rows) or not self._shown:
            return
        min_confidence = np.nan_to_num(np.minimum(*confidence)[rows], nan=0.0)
        columns = [uris.take(pa.array(rows)), *(values[rows] for values in (*codes, *confidence)), min_confidence]
        candidates = pa.concat_tables([self._moved, pa.table(columns, schema=_MOVED)])
        sort_keys = [("min_confidence", "descending"), ("uri", "ascending")]
        order = pc.select_k_unstable(candidates, min(self._shown, len(candidates)), sort_keys=sort_keys)
        self._moved = candidates.take(order).combine_chunks()

    def result(self, first: ScoredTable, second: ScoredTable) -> Comparison:
        counts, rows = self._counts, self._rows
        only_second = sum(map(len, self._only_second))
        only_second_repeated = repeated(self._only_second)[0]
        only_in_first = len(rows.seen) - rows.index.repeated - counts["common"]
        wrong = counts["known"] - counts["both_right"] - counts["first_right"] - counts["second_right"]
        return Comparison(
            multi_label=first.is_multi_label,
            first=first.uri,
            second=second.uri,
            first_model=first.model_id,
            second_model=second.model_id,
            common=counts["common"],
            only_in_first=only_in_first,
            only_in_second=only_second - only_second_repeated,
            only_in_first_examples=tuple(self._unseen(first)) if only_in_first else (),
            only_in_second_examples=tuple(dict.fromkeys(self._only_second_examples)),
            duplicates_in_first=rows.index.repeated,
            duplicates_in_second=counts["duplicates"] + only_second_repeated,
            compared=counts["compared"],
            only_first_ok=counts["only_first_ok"],
            only_second_ok=counts["only_second_ok"],
            neither_ok=counts["neither_ok"],
            agreement=1 - counts["moved"] / counts["compared"] if counts["compared"] else None,
            moves=tuple(self._class_moves()),
            moved=tuple(self._images_moved()),
            known=counts["known"],
            both_right=counts["both_right"],
            first_right=counts["first_right"],
            second_right=counts["second_right"],
            both_wrong=wrong,
            mcnemar=mcnemar(counts["first_right"], counts["second_right"]) if counts["known"] else None,
            by_class=tuple(self._class_pairs()),
        )

    def _class_moves(self) -> Iterator[ClassMove]:
        ranked = sorted(self._moves.items(), key=lambda item: (-item[1], item[0]))
        names = self._codes.names
        for pair, images in ranked[:_MAX_PAIRS]:
            first, second = divmod(pair, _MAX_CODES)
            yield ClassMove(first=names[first], second=names[second], images=images)

    def _class_pairs(self) -> Iterator[ClassPair]:
        for name, (images, first, second) in zip(self._codes.names, self._by_class.T.tolist(), strict=False):
            if images:
                yield ClassPair(name=name, images=images, first_right=first, second_right=second)

    def _images_moved(self) -> Iterator[Moved]:
        names = self._codes.names
        for row in self._moved.to_pylist():
            yield Moved(
                uri=row["uri"],
                truth=names[row["truth"]] if row["truth"] >= 0 else None,
                first=names[row["first"]],
                second=names[row["second"]],
                first_confidence=_none_if_nan(row["first_confidence"]),
                second_confidence=_none_if_nan(row["second_confidence"]),
            )

    def _unseen(self, table: ScoredTable) -> Iterator[str]:
        """Yields example images that the second table lacks."""
        missing = self._shown
        for batch in table.batches(("uri",)):
            if not missing:
                return
            places = self._rows.index.places(uri_hashes(batch["uri"]))
            rows = np.flatnonzero(~self._rows.seen[places])[:missing]
            self._rows.seen[places[rows]] = True
            missing -= len(rows)
            yield from dict.fromkeys(batch["uri"].take(pa.array(rows)).to_pylist())


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
