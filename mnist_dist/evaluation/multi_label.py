"""Computes the metrics of a multi-label table, in which each class has a probability of its own.

Owns: the counts and the metrics, and the thresholds with the highest F1. Does not own: the labels (`label_sets`), class
names (`tables`), or their display.

**Everything is exact for tables of up to 2^25 scores** (rows with labels x classes), which are kept, 5 bytes each. Of a
larger table, the scores become histograms of at most 2^24 bins of 20 bytes: 65,536 for each class, or fewer from 257
classes on. The bins have equal widths in log(p / (1 - p)), 0.0006 with up to 256 classes. Average precision is then
that of the bins: different scores in one bin count as equal. The best thresholds are the best of those that are the
lowest score in a bin, and their F1 is exact, as all other metrics are. Besides, memory grows by 8 bytes per row, as for
other tables.
"""

# n = rows of a batch, K = classes

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.config import DEFAULT_THRESHOLD
from mnist_dist.errors import DataError
from mnist_dist.evaluation.metrics import Counts, RowSums
from mnist_dist.evaluation.tables import UNKNOWN_LABEL, Classes, ScoredTable, probabilities
from mnist_dist.evaluation.uri_hashes import Hashes
from mnist_dist.scoring.thresholds import shortest

_CLASSES, _PROBABILITIES = "predicted_classes", "probabilities"
SET_COLUMNS = (_CLASSES, _PROBABILITIES)
"""The columns that tell which classes are predicted; either is enough."""
MULTI_LABEL_COLUMNS = ("uri", "status", "error", *SET_COLUMNS)
"""The columns that the metrics need, as far as the table has them."""
EXACT_SCORES = 2**25
"""Up to so many scores, average precision and best thresholds are exact."""
SHOWN_OF_CLASS, MISTAKES_SHOWN = 4, 6
"""Mistakes that are kept of each class, and of all together in relation to `shown`."""
_SCORE_BINS, _MAX_SCORE_BINS = 2**16, 2**24  # Bins per class, and bins of all classes together.
_LARGEST_LOGIT = 20.0  # Probabilities below 2e-9 share a bin.
_LARGEST_SCORE = np.nextafter(np.float32(1), np.float32(0))  # A threshold lies below 1.
_SLICE_VALUES, _SLICE_ROWS = 2**21, 2**17  # Limits of a slice that is processed at once.


@dataclass(frozen=True, kw_only=True)
class LabelMetrics:
    """The metrics of one class. None: undefined, such as the average precision of a class without images."""

    name: str
    support: int
    """Images with this class."""
    predicted: int
    """Images for which the class was predicted, among those with known labels."""
    threshold: float | None
    """That of the table."""
    precision: float | None
    recall: float | None
    f1: float | None
    average_precision: float | None
    best_threshold: float | None
    """The threshold with the highest F1 on these images, the highest of several. None: no probabilities, no images of
    the class, or none of them with a probability above 0."""
    best_f1: float | None
    """F1 with that threshold."""


@dataclass(frozen=True, kw_only=True)
class SetExample:
    """One image with its true and predicted classes."""

    uri: str
    truth: tuple[str, ...]
    predicted: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MultiLabelMetrics(Counts):
    """The metrics of a multi-label table. None: the labels or the columns for it are missing."""

    predicted: npt.NDArray[np.int64]
    """`int64 [K]`: rows for which a class was predicted, with or without labels."""
    mean_average_precision: float | None
    """Mean over the classes that have images (mAP)."""
    micro_f1: float | None
    """Of all pairs of image and class together."""
    macro_f1: float | None
    """Mean over the classes that have images or were predicted."""
    best_macro_f1: float | None
    """The same mean with the best threshold of each class, on the images that it was chosen on."""
    exact_match: float | None
    """Share of images whose predicted classes are exactly the true ones (subset accuracy)."""
    hamming_loss: float | None
    """Share of pairs of image and class that are wrong."""
    without_probabilities: int
    """Evaluated rows without finite probabilities; average precision and best thresholds leave them out."""
    per_class: tuple[LabelMetrics, ...]
    """Empty without labels."""
    mistakes: tuple[SetExample, ...] = ()
    """Images with wrong classes: those with the most, and some of each class; the most wrong classes first."""

    @property
    def best_thresholds(self) -> dict[str, float]:
        """The best threshold of each class; where there is none, that of the table. Empty without a best one."""
        if all(row.best_threshold is None for row in self.per_class):
            return {}
        kept = {row.name: DEFAULT_THRESHOLD if row.threshold is None else row.threshold for row in self.per_class}
        return kept | {row.name: row.best_threshold for row in self.per_class if row.best_threshold is not None}


class MultiLabelAccumulator:
    """Accumulates the batches of a multi-label table.

    Args:
        table: the table.
        shown: how many of the images with the most wrong classes to keep; besides, some of each class.
        exact_scores: how many scores are kept before they become histograms.

    Raises:
        DataError: it has none of `SET_COLUMNS`.
    """

    def __init__(self, table: ScoredTable, *, shown: int = 0, exact_scores: int = EXACT_SCORES) -> None:
        check_has_sets(table)
        self._mistakes = _Mistakes(table.classes.names, shown)
        self._table, size = table, len(table.classes)
        self._rows = RowSums()
        self._evaluated = self._exact = self._wrong_pairs = 0
        self._shown, self._predicted = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._support, self._hits = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._scores = _Scores(size, exact_scores) if _PROBABILITIES in table.schema.names else None

    def add(self, batch: pa.RecordBatch, labels: pa.Array) -> None:
        """Adds the rows of a batch.

        Args:
            batch: with `uri`, `status` and those of `SET_COLUMNS` that the table has.
            labels: `list<string> [n]`, null for a row without known labels.

        Raises:
            DataError: the rows do not fit the classes.
        """
        for start, part in slices(batch, self._table.classes):
            self._add(part, labels.slice(start, len(part)))

    def metrics(self) -> MultiLabelMetrics:
        """The metrics of all rows so far."""
        count, table = self._evaluated, self._table
        hits, pairs = int(self._hits.sum()), int(self._predicted.sum() + self._support.sum())
        rows = tuple(self._per_class()) if count else ()
        with_images = [row for row in rows if row.support]
        counted = [row for row in rows if row.f1 is not None]
        best = [row.f1 if row.best_f1 is None else row.best_f1 for row in counted]
        has_best = any(row.best_threshold is not None for row in rows)
        return MultiLabelMetrics(
            **self._rows.counts(),
            classes=table.classes.names,
            evaluated=count,
            predicted=self._shown,
            mean_average_precision=_mean([row.average_precision for row in with_images]),
            micro_f1=2 * hits / pairs if pairs else None,
            macro_f1=_mean([row.f1 for row in counted]),
            best_macro_f1=_mean(best) if has_best else None,
            exact_match=self._exact / count if count else None,
            hamming_loss=self._wrong_pairs / (count * len(table.classes)) if count and len(table.classes) else None,
            without_probabilities=count - (self._scores.rows if self._scores else 0),
            per_class=rows,
            mistakes=self._mistakes.examples(),
        )

    def repeated_uris(self) -> Hashes:
        """The hashes of the URIs that occur more than once."""
        return self._rows.repeated_uris()

    def _add(self, batch: pa.RecordBatch, labels: pa.Array) -> None:
        self._rows.add(batch)
        truth, known = self._truth(batch["uri"], labels)
        predicted, scored = predicted_sets(batch, self._table)
        self._shown += predicted.sum(axis=0)
        rows = np.flatnonzero(scored & known)
        self._evaluate(batch.take(pa.array(rows)), truth[rows], predicted[rows])

    def _truth(self, uris: pa.Array, labels: pa.Array) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """The true classes, `bool [n, K]`, and the rows whose labels are all classes, `bool [n]`; counts the labels."""
        truth, known, rows, codes = true_sets(labels, self._table.classes)
        self._rows.labelled += len(labels) - labels.null_count
        self._rows.known += int(known.sum())
        self._rows.add_unknown(uris.take(pa.array(rows)), labels.flatten(), codes)
        return truth, known

    def _evaluate(self, batch: pa.RecordBatch, truth: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_]) -> None:
        """Adds rows with known labels and a prediction."""
        wrong = (truth != predicted).sum(axis=1)
        self._mistakes.add(batch["uri"], truth, predicted)
        self._evaluated += len(batch)
        self._exact += int((wrong == 0).sum())
        self._wrong_pairs += int(wrong.sum())
        self._support += truth.sum(axis=0)
        self._predicted += predicted.sum(axis=0)
        self._hits += (truth & predicted).sum(axis=0)
        if self._scores is not None:
            rows, scores = probabilities(batch, self._table.classes)
            self._scores.add(truth[rows], scores)

    def _per_class(self) -> Iterator[LabelMetrics]:
        names = self._table.classes.names
        counts = zip(self._support.tolist(), self._predicted.tolist(), self._hits.tolist(), strict=True)
        histograms = self._scores.histograms() if self._scores else repeat(_NO_SCORES, len(names))
        for name, (support, predicted, hits), scores in zip(names, counts, histograms, strict=True):
            best = scores.best_threshold()
            yield LabelMetrics(
                name=name,
                support=support,
                predicted=predicted,
                threshold=self._table.thresholds.get(name),
                precision=hits / predicted if predicted else None,
                recall=hits / support if support else None,
                f1=2 * hits / (predicted + support) if predicted + support else None,
                average_precision=scores.average_precision(),
                best_threshold=best[0] if best else None,
                best_f1=best[1] if best else None,
            )


class _Mistakes:
    """Keeps images with wrong classes: those with the most, and the first ones of each class."""

    def __init__(self, names: Sequence[str], shown: int) -> None:
        self._names, self._shown = names, shown
        self._most: list[tuple[int, SetExample]] = []
        self._of_class: list[tuple[int, SetExample]] = []  # Each with how many its class had before.
        self._kept = np.zeros(len(names), np.int64)

    def add(self, uris: pa.Array, truth: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_]) -> None:
        """Adds images with their true and predicted classes, `bool [n, K]` each."""
        wrong = truth != predicted
        counts = wrong.sum(axis=1)
        rows = np.flatnonzero(counts)
        if not len(rows) or not self._shown:
            return
        for row in rows[np.argsort(-counts[rows], kind="stable")][: self._shown].tolist():
            self._most.append((int(counts[row]), self._example(uris, truth, predicted, row)))
        self._most.sort(key=lambda one: (-one[0], one[1].uri))
        del self._most[self._shown :]
        for code in np.flatnonzero(wrong.any(axis=0) & (self._kept < SHOWN_OF_CLASS)):
            for row in np.flatnonzero(wrong[:, code])[: SHOWN_OF_CLASS - self._kept[code]].tolist():
                self._of_class.append((int(self._kept[code]), self._example(uris, truth, predicted, row)))
                self._kept[code] += 1

    def examples(self) -> tuple[SetExample, ...]:
        chosen = {example.uri: example for _, example in self._most}
        for _, example in sorted(self._of_class, key=lambda one: one[0]):  # The first of each class, then the second.
            if len(chosen) < self._shown * MISTAKES_SHOWN:
                chosen.setdefault(example.uri, example)
        return tuple(sorted(chosen.values(), key=lambda one: (-len({*one.truth} ^ {*one.predicted}), one.uri)))

    def _example(
        self, uris: pa.Array, truth: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_], row: int
    ) -> SetExample:
        true, found = (
            tuple(self._names[code] for code in np.flatnonzero(sets[row]).tolist()) for sets in (truth, predicted)
        )
        return SetExample(uri=uris[row].as_py(), truth=true, predicted=found)


# --- sets of classes -------------------------------------------------------------------------------------------------


def check_has_sets(table: ScoredTable) -> None:
    """Raises DataError if a table does not tell which classes are predicted."""
    names = set(table.schema.names)
    if _CLASSES not in names and (_PROBABILITIES not in names or not table.thresholds):
        raise DataError(
            f"{table.uri} needs a column predicted_classes or probabilities to be evaluated. Received: columns "
            f"{', '.join(table.schema.names)}"
        )


def slices(batch: pa.RecordBatch, classes: Classes) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batch in parts that are processed at once, each with its first row."""
    rows = max(1, min(_SLICE_ROWS, _SLICE_VALUES // max(len(classes), 1)))
    return ((start, batch.slice(start, rows)) for start in range(0, len(batch), rows))


def predicted_sets(batch: pa.RecordBatch, table: ScoredTable) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The predicted classes of each row, `bool [n, K]`, and which rows have a prediction, `bool [n]`.

    Raises:
        DataError: a predicted class is none of the classes.
    """
    ok = pc.equal(batch["status"], "ok").to_numpy(zero_copy_only=False)
    if _CLASSES in batch.schema.names:
        predicted, known, _, codes = true_sets(batch[_CLASSES], table.classes)
        if (codes == UNKNOWN_LABEL).any():
            unknown = batch[_CLASSES].flatten()[int((codes == UNKNOWN_LABEL).argmax())].as_py()
            raise DataError(f"predicted_classes are among {', '.join(table.classes.names[:20])}. Received: {unknown!r}")
        return predicted & ok[:, None], known & ok
    predicted, scored = np.zeros((len(batch), len(table.classes)), np.bool_), np.zeros(len(batch), np.bool_)
    rows, scores = probabilities(batch, table.classes)
    predicted[rows] = scores >= np.array([table.thresholds[name] for name in table.classes.names], np.float32)
    scored[rows] = True
    return predicted & ok[:, None], scored & ok


def true_sets(
    labels: pa.Array, classes: Classes
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The classes that lists of labels mean.

    Args:
        labels: `list<string> [n]`.
        classes: of the table.

    Returns:
        The classes of each row, `bool [n, K]`; the rows that are not null and whose labels are all classes, `bool [n]`;
        and of each label in the lists its row and its class number or `UNKNOWN_LABEL`, `int64` each.
    """
    lengths = pc.fill_null(pc.list_value_length(labels), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(labels)), lengths)
    codes = classes.codes(labels.flatten())
    truth = np.zeros((len(labels), len(classes)), np.bool_)
    truth[rows[codes >= 0], codes[codes >= 0]] = True
    known = labels.is_valid().to_numpy(zero_copy_only=False).copy()
    known[rows[codes == UNKNOWN_LABEL]] = False
    return truth, known, rows, codes


# --- the scores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Histogram:
    """The scores of one class in bins, the lowest first; those in a bin count as equal."""

    every: npt.NDArray[np.int64]
    """Number of images in each bin."""
    own: npt.NDArray[np.int64]
    """Number of images with the class."""
    lowest: npt.NDArray[np.float32]
    """The lowest score in each bin that is not empty."""

    def average_precision(self) -> float | None:
        """The mean of the precisions at the score of each image with the class; None if no image has it.

        Source: scikit-learn's `average_precision_score`, which sorts the scores again.
        """
        hits, predicted = np.cumsum(self.own[::-1]), np.cumsum(self.every[::-1])
        bins = np.flatnonzero(self.own[::-1])
        if not len(bins):
            return None
        return float((self.own[::-1][bins] * hits[bins] / predicted[bins]).sum() / hits[-1])

    def best_threshold(self) -> tuple[float, float] | None:
        """The threshold with the highest F1, and that F1; see `LabelMetrics.best_threshold`."""
        bins = np.flatnonzero((self.every > 0) & (self.lowest > 0))[::-1]
        predicted, hits = np.cumsum(self.every[bins]), np.cumsum(self.own[bins])
        if not hits.any():
            return None
        f1 = 2 * hits / (predicted + self.own.sum())
        best = int(f1.argmax())
        return shortest(float(self.lowest[bins[best]])), float(f1[best])


_NO_SCORES = _Histogram(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


class _Scores:
    """The scores of all classes over rows with labels: as they are, and as bins once there are too many."""

    def __init__(self, classes: int, exact_scores: int) -> None:
        self.rows = 0
        self._classes, self._exact_scores = classes, exact_scores
        self._kept: list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]] = []
        self._bins: _ScoreBins | None = None

    def add(self, truth: npt.NDArray[np.bool_], scores: npt.NDArray[np.float32]) -> None:
        """Adds rows: their true classes and scores, `[n, K]` each. Rows without finite scores are left out."""
        finite = np.isfinite(scores).all(axis=1)
        self.rows += int(finite.sum())
        self._kept.append((truth[finite], scores[finite].clip(0, _LARGEST_SCORE)))
        if self._bins is None and self.rows * self._classes > self._exact_scores:
            self._bins = _ScoreBins(self._classes)
        if self._bins is not None:
            for part in self._kept:
                self._bins.add(*part)
            self._kept.clear()

    def histograms(self) -> Iterator[_Histogram]:
        """Of each class."""
        if self._bins is not None:
            return (self._bins.of(code) for code in range(self._classes))
        truth = np.concatenate([np.zeros((0, self._classes), np.bool_), *(part for part, _ in self._kept)])
        scores = np.concatenate([np.zeros((0, self._classes), np.float32), *(part for _, part in self._kept)])
        return map(_exactly, truth.T, scores.T)


def _exactly(truth: npt.NDArray[np.bool_], scores: npt.NDArray[np.float32]) -> _Histogram:
    """A bin for each distinct score."""
    lowest, places = np.unique(scores, return_inverse=True)
    every = np.bincount(places, minlength=len(lowest))
    return _Histogram(every, np.bincount(places[truth], minlength=len(lowest)), lowest)


class _ScoreBins:
    """Bins of equal width in log(p / (1 - p)) for each class."""

    def __init__(self, classes: int) -> None:
        self._bins = max(2, min(_SCORE_BINS, _MAX_SCORE_BINS // max(classes, 1)))
        self._every = np.zeros(classes * self._bins, np.int64)
        self._own = np.zeros(classes * self._bins, np.int64)
        self._lowest = np.ones(classes * self._bins, np.float32)

    def add(self, truth: npt.NDArray[np.bool_], scores: npt.NDArray[np.float32]) -> None:
        """Adds rows with scores from 0 to below 1."""
        exact = scores.astype(np.float64)  # In float32, neighbouring scores could change places.
        with np.errstate(divide="ignore"):
            logits = (np.log(exact) - np.log1p(-exact)).clip(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        bins = ((logits + _LARGEST_LOGIT) / (2 * _LARGEST_LOGIT) * self._bins).astype(np.int64)
        bins = np.minimum(bins, self._bins - 1) + np.arange(scores.shape[1]) * self._bins
        np.add.at(self._every, bins.ravel(), 1)
        np.add.at(self._own, bins[truth], 1)
        np.minimum.at(self._lowest, bins.ravel(), scores.ravel())

    def of(self, code: int) -> _Histogram:
        """The histogram of one class."""
        chosen = slice(code * self._bins, (code + 1) * self._bins)
        return _Histogram(self._every[chosen], self._own[chosen], self._lowest[chosen])


def _mean(values: list[float | None]) -> float | None:
    """The mean; None if there is no value, or one is undefined."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
