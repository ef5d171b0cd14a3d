"""Computes the metrics of a prediction table: counts are accumulated batch by batch, and evaluated at the end.

Owns: the counts and the metrics. Does not own: the labels (`truth`), class names (`tables`), or their display.

Memory grows by only 8 bytes per row, for the URI hashes that find duplicates (16 while they are sorted). The rest is a
confusion matrix, sums, and histograms: K² and K x 4,096 numbers for K classes. scikit-learn computes most metrics:
its samples are the cells of the matrix or the bins of a histogram, weighted by their counts.
"""

# n = rows of a batch, s = evaluated rows, K = classes

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.evaluation.tables import (
    NO_LABEL,
    PREDICTION_COLUMNS,
    UNKNOWN_LABEL,
    Classes,
    confidences,
    predicted_codes,
    probabilities,
)
from mnist_dist.evaluation.uri_hashes import Hashes, repeated, uri_hashes

METRIC_COLUMNS = ("uri", "status", "error", *PREDICTION_COLUMNS)
"""The columns that the metrics need, as far as the table has them."""
TOP_K = 5
RELIABILITY_BINS = 15
"""Bins of equal width. Source: Guo et al. 2017, arXiv:1706.04599."""
CONFIDENCE_BINS = 20
SMALLEST_PROBABILITY = 1e-15
"""The log loss replaces smaller probabilities by this one, so that the loss of an image is at most 34.5."""
BARELY_RIGHT = 0.2
"""A hit is barely right if its probability is less than this above that of the second most probable class."""
MIN_CERTAIN = (1 + BARELY_RIGHT) / 2
"""From this confidence on, no hit is barely right, whatever the other probabilities are: they add up to 1."""
NOT_OK_SHOWN = 12
"""Rows that are kept as examples of each status but ok."""
PER_CONFUSION, CONFUSED_SHOWN = 6, 6
"""Mistakes that are kept of each pair of classes, and of all together in relation to the images shown of each kind."""
_MAX_CONFUSED = 10_000  # Mistakes that are kept while the table is read.
_SCORE_BINS, _MAX_SCORE_BINS = 4096, 2**24  # Bins per class, and bins of all classes together (128 MiB).
_LARGEST_LOGIT = 20.0  # Probabilities below 2e-9 share a bin; float32 has none between 1 - 6e-8 and 1.
_SLICE_VALUES, _SLICE_ROWS = 2**21, 2**17  # Limits of a slice that is processed at once.
_MAX_UNKNOWN = 1_000  # Unknown labels that are counted by name; the others are counted together.
_REST = "..."


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """The metrics of one class. None: undefined, such as the precision of a class that was never predicted."""

    name: str
    support: int
    """Images of this class."""
    predicted: int
    """Images that were predicted as this class, among those with a known label."""
    precision: float | None
    recall: float | None
    f1: float | None
    roc_auc: float | None
    """Against all other classes."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Confidence and accuracy in `RELIABILITY_BINS` bins of equal width; the first is [0, 1/15]."""

    counts: npt.NDArray[np.int64]
    """Number of images in each bin."""
    confidences: npt.NDArray[np.float64]
    """Sum of the confidences in each bin."""
    hits: npt.NDArray[np.int64]
    """Number of correct images in each bin."""

    @property
    def mean_confidence(self) -> float:
        """The mean over all images."""
        return float(self.confidences.sum() / self.counts.sum())

    @property
    def ece(self) -> float:
        """Expected calibration error. Source: Guo et al. 2017, arXiv:1706.04599, equation 3."""
        return float(np.abs(self.hits - self.confidences).sum() / self.counts.sum())


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image with its label and prediction."""

    uri: str
    truth: str
    predicted: str
    confidence: float
    rival: str | None = None
    """Of a mistake, the truth; of a hit, the second most probable class. None: the table has no probabilities."""
    rival_probability: float | None = None


@dataclass(frozen=True, kw_only=True)
class NotOk:
    """A row without a prediction, and why."""

    uri: str
    status: str
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The rows and labels of a table: what the metrics of every kind of table begin with."""

    classes: tuple[str, ...]
    images: int
    """Number of rows in the table."""
    ok: int
    statuses: Mapping[str, int]
    """Number of rows by status."""
    labelled: int
    """Rows with a label, whether it is a class or not."""
    known: int
    """Rows whose label is one of the classes."""
    evaluated: int
    """Of these, the rows with a prediction. Accuracy and all other metrics are computed over them."""
    unknown: Mapping[str, int]
    """Label that is no class -> rows; beyond 1,000 such labels, the rest is one entry."""
    unknown_examples: Mapping[str, str]
    """The first URI of each of these labels, without the rest."""
    duplicates: int
    """Rows whose URI occurred before; they are counted like all others."""
    duplicate_examples: tuple[str, ...] = ()
    not_ok: tuple[NotOk, ...] = ()
    """The first rows of each status but ok."""

    @property
    def unknown_labels(self) -> int:
        """Rows with a label that is none of the classes."""
        return self.labelled - self.known

    def without_labels(self) -> Self:
        """The same metrics when guessed labels turned out to be no classes, and so no labels at all."""
        return replace(self, labelled=0, unknown={}, unknown_examples={})

    def to_json(self) -> dict[str, Any]:
        """The metrics as JSON values."""
        values: dict[str, Any] = _plain(asdict(self))
        return {**values, "unknown_labels": self.unknown_labels}


@dataclass(frozen=True, kw_only=True)
class Metrics(Counts):
    """The metrics of a table. None: the labels or the columns for it are missing."""

    predicted: npt.NDArray[np.int64] | None
    """`int64 [K]`: rows by predicted class, with or without a label."""
    confidence_histogram: npt.NDArray[np.int64] | None
    """Rows by confidence, in `CONFIDENCE_BINS` equal bins from 0 to 1, with or without a label."""
    accuracy: float | None
    accuracy_low: float | None
    """95 % Wilson interval."""
    accuracy_high: float | None
    balanced_accuracy: float | None
    """Mean recall of the classes that have images."""
    macro_f1: float | None
    """Mean over the classes that have images or were predicted."""
    weighted_f1: float | None
    """Mean weighted by support."""
    log_loss: float | None
    """In nats; smaller probabilities are raised to `SMALLEST_PROBABILITY`."""
    brier: float | None
    """Squared error, summed over the classes and averaged over the images; 0 to 2."""
    roc_auc: float | None
    """One class against the rest, averaged over the classes for which it is defined."""
    top_k: tuple[float, ...] | None
    """Share of images whose truth is among the k most probable classes, k = 1, 2, ... `TOP_K` or K."""
    without_probabilities: int
    """Evaluated rows without finite probabilities; log loss, Brier, AUC and top k leave them out."""
    ece: float | None
    calibration: Calibration | None
    per_class: tuple[ClassMetrics, ...]
    """Empty without labels."""
    confusion: npt.NDArray[np.int64] | None
    """`int64 [K, K]`: a row per true class, a column per predicted class."""
    mistakes: tuple[Example, ...]
    """The most confident mistakes, the most confident first."""
    doubtful_hits: tuple[Example, ...]
    """Hits whose confidence is less than `BARELY_RIGHT` above the second probability, the least confident first;
    without probabilities, those below `MIN_CERTAIN`."""
    barely_right: int
    """Number of such hits."""
    confused: tuple[Example, ...]
    """Mistakes of as many pairs of classes as possible: the most confident of the most frequent pair first."""
    mean_confidence: float | None = None
    """Over the evaluated rows with a confidence."""


def wilson_interval(hits: int, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share.

    Args:
        hits: successes among `count`.
        count: number of trials, at least 1.
        level: confidence level, in (0, 1).

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22, 209-212.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def classification_report(metrics: Metrics) -> str | None:
    """scikit-learn's text table of the classes that have images or were predicted; None without labels."""
    if metrics.confusion is None:
        return None
    from sklearn import metrics as sklearn_metrics

    truth, predicted, counts = _cells(metrics.confusion)
    present = np.union1d(truth, predicted)
    text: str = sklearn_metrics.classification_report(
        truth,
        predicted,
        labels=present,
        target_names=[metrics.classes[code] for code in present],
        sample_weight=counts,
        digits=4,
        zero_division=0,
    )
    return re.sub(r"(\d+)\.0$", r"  \1", text, flags=re.MULTILINE)  # Weights make its counts floats.


class Accumulator:
    """Accumulates the batches of a table.

    Args:
        classes: of the table.
        shown: how many mistakes, and how many hits, to keep.
    """

    def __init__(self, classes: Classes, *, shown: int = 24) -> None:
        self._classes = classes
        self._rows = RowSums()
        self._confusion = np.zeros((len(classes), len(classes)), np.int64)
        self._predicted = np.zeros(len(classes), np.int64)
        self._confidences = np.zeros(CONFIDENCE_BINS, np.int64)
        self._has_class = self._has_confidence = False
        self._calibration = _CalibrationSums()
        self._scores = _ScoreSums(len(classes))
        self._mistakes = _Extremes(shown, "descending")
        self._hits = _Extremes(shown, "ascending")
        self._barely_right = 0
        self._confused = _Confused(shown * CONFUSED_SHOWN)

    def add(self, batch: pa.RecordBatch, labels: pa.Array | None) -> None:
        """Adds the rows of a batch.

        Args:
            batch: with `uri`, `status` and those of `PREDICTION_COLUMNS` that the table has.
            labels: `string [n]`, null for a row without a label. None: there are no labels.

        Raises:
            DataError: the rows do not fit the classes.
        """
        rows = max(1, min(_SLICE_ROWS, _SLICE_VALUES // max(len(self._classes), 1)))
        for start in range(0, len(batch), rows):
            self._add(batch.slice(start, rows), None if labels is None else labels.slice(start, rows))

    def metrics(self) -> Metrics:
        """The metrics of all rows so far."""
        count = int(self._confusion.sum())
        cells = _of_cells(self._confusion) if count else {}
        low, high = wilson_interval(int(self._confusion.trace()), count) if count else (None, None)
        areas = self._scores.areas()
        defined = [area for area in areas if area is not None]
        calibration = self._calibration.result()
        return Metrics(
            **self._rows.counts(),
            classes=self._classes.names,
            evaluated=count,
            predicted=self._predicted if self._has_class else None,
            confidence_histogram=self._confidences if self._has_confidence else None,
            accuracy=cells.get("accuracy"),
            accuracy_low=low,
            accuracy_high=high,
            balanced_accuracy=cells.get("balanced_accuracy"),
            macro_f1=cells.get("macro_f1"),
            weighted_f1=cells.get("weighted_f1"),
            log_loss=self._scores.mean(self._scores.log_loss),
            brier=self._scores.mean(self._scores.brier),
            roc_auc=sum(defined) / len(defined) if defined else None,
            top_k=self._scores.top_k(),
            without_probabilities=count - self._scores.rows,
            ece=calibration.ece if calibration else None,
            calibration=calibration,
            per_class=_per_class(self._classes, self._confusion, areas) if count else (),
            confusion=self._confusion if count else None,
            mistakes=self._mistakes.examples(self._classes),
            doubtful_hits=self._hits.examples(self._classes),
            barely_right=self._barely_right,
            confused=self._confused.examples(self._classes, self._confusion),
            mean_confidence=calibration.mean_confidence if calibration else None,
        )

    def repeated_uris(self) -> Hashes:
        """The hashes of the URIs that occur more than once."""
        return self._rows.repeated_uris()

    def _add(self, batch: pa.RecordBatch, labels: pa.Array | None) -> None:
        self._rows.add(batch)
        truth = np.full(len(batch), NO_LABEL) if labels is None else self._classes.codes(labels)
        if labels is not None:
            self._rows.known += int((truth >= 0).sum())
            self._rows.labelled += int((truth != NO_LABEL).sum())
            self._rows.add_unknown(batch["uri"], labels, truth)
        confidence, predicted = confidences(batch, self._classes), predicted_codes(batch, self._classes)
        ok = pc.equal(batch["status"], "ok").to_numpy(zero_copy_only=False)
        if confidence is not None:
            self._has_confidence = True
            self._confidences += np.bincount(
                _bins(confidence[ok & ~np.isnan(confidence)], CONFIDENCE_BINS), minlength=CONFIDENCE_BINS
            )
        if predicted is None:
            return
        self._has_class = True
        self._predicted += np.bincount(predicted[ok & (predicted >= 0)], minlength=len(self._classes))
        rows = np.flatnonzero(ok & (predicted >= 0) & (truth >= 0))
        self._evaluate(
            batch.take(pa.array(rows)), truth[rows], predicted[rows], None if confidence is None else confidence[rows]
        )

    def _evaluate(
        self,
        batch: pa.RecordBatch,
        truth: npt.NDArray[np.int64],
        predicted: npt.NDArray[np.int64],
        confidence: npt.NDArray[np.float64] | None,
    ) -> None:
        """Adds rows that have a label and a prediction; a confidence may be NaN."""
        size = len(self._classes)
        np.add.at(self._confusion, (truth, predicted), 1)
        rows, scores = np.zeros(0, np.int64), np.zeros((0, size), np.float32)
        if "probabilities" in batch.schema.names:
            rows, scores = probabilities(batch, self._classes)
            self._scores.add(truth[rows], scores)
        if confidence is None or not size:
            return
        hit, valid = truth == predicted, ~np.isnan(confidence)
        self._calibration.add(confidence[valid], hit[valid])
        wrong, doubtful = valid & ~hit, valid & hit & (confidence < MIN_CERTAIN)
        rivals = _Rivals.of(truth, predicted, rows, scores, wanted=wrong | doubtful)
        doubtful &= np.isnan(rivals.probabilities) | (confidence - rivals.probabilities < BARELY_RIGHT)
        self._barely_right += int(doubtful.sum())
        images = _Images(batch["uri"], truth, predicted, confidence, rivals)
        self._mistakes.add(images.take(np.flatnonzero(wrong)))
        self._confused.add(images.take(np.flatnonzero(wrong)), self._confusion)
        self._hits.add(images.take(np.flatnonzero(doubtful)))


# --- counters --------------------------------------------------------------------------------------------------------


class RowSums:
    """Counts the rows of a table, and the labels that are no classes."""

    def __init__(self) -> None:
        self.labelled = self.known = 0
        """Rows with a label, and those of them whose label is a class; the caller counts them."""
        self._images = 0
        self._statuses: Counter[str] = Counter()
        self._hashes: list[Hashes] = []
        self._unknown: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._not_ok: dict[str, list[NotOk]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds the rows of a batch with `uri`, `status` and, if the table has it, `error`."""
        self._images += len(batch)
        for item in batch["status"].value_counts().to_pylist():
            self._statuses[item["values"]] += item["counts"]
        self._hashes.append(uri_hashes(batch["uri"]))
        self._keep_not_ok(batch)

    def _keep_not_ok(self, batch: pa.RecordBatch) -> None:
        bad = batch.filter(pc.not_equal(batch["status"], "ok"))
        for status in bad["status"].unique().to_pylist():
            kept = self._not_ok.setdefault(status, [])
            if missing := NOT_OK_SHOWN - len(kept):
                rows = bad.filter(pc.equal(bad["status"], status)).slice(0, missing)
                errors = rows["error"].to_pylist() if "error" in rows.schema.names else [None] * len(rows)
                pairs = zip(rows["uri"].to_pylist(), errors, strict=True)
                kept += [NotOk(uri=uri, status=status, error=error) for uri, error in pairs]

    def counts(self) -> dict[str, Any]:
        """The fields of `Counts` that it knows."""
        return {
            "images": self._images,
            "ok": self._statuses["ok"],
            "statuses": dict(self._statuses.most_common()),
            "labelled": self.labelled,
            "known": self.known,
            "unknown": dict(self._unknown.most_common()),
            "unknown_examples": self._examples,
            "duplicates": repeated(self._hashes)[0],
            "not_ok": tuple(row for status in self._statuses for row in self._not_ok.get(status, ())),
        }

    def repeated_uris(self) -> Hashes:
        """The hashes of the URIs that occur more than once."""
        return repeated(self._hashes)[1]

    def add_unknown(self, uris: pa.Array, labels: pa.Array, codes: npt.NDArray[np.int64]) -> None:
        """Adds labels, of which those with the code `UNKNOWN_LABEL` are counted; an image may have several."""
        rows = np.flatnonzero(codes == UNKNOWN_LABEL)
        if not len(rows):
            return
        unknown = labels.take(pa.array(rows)).dictionary_encode()
        indices = unknown.indices.to_numpy(zero_copy_only=False)
        counts = np.bincount(indices, minlength=len(unknown.dictionary))
        _, firsts = np.unique(indices, return_index=True)
        for label, count, first in zip(unknown.dictionary.to_pylist(), counts.tolist(), firsts.tolist(), strict=True):
            is_named = label in self._unknown or len(self._unknown) < _MAX_UNKNOWN
            self._unknown[label if is_named else _REST] += count
            if is_named:
                self._examples.setdefault(label, uris[int(rows[first])].as_py())


class _CalibrationSums:
    def __init__(self) -> None:
        self.counts = np.zeros(RELIABILITY_BINS, np.int64)
        self.confidences = np.zeros(RELIABILITY_BINS)
        self.hits = np.zeros(RELIABILITY_BINS, np.int64)

    def add(self, confidence: npt.NDArray[np.float64], hit: npt.NDArray[np.bool_]) -> None:
        bins = _bins(confidence, RELIABILITY_BINS)
        self.counts += np.bincount(bins, minlength=RELIABILITY_BINS)
        self.confidences += np.bincount(bins, confidence, RELIABILITY_BINS)
        self.hits += np.bincount(bins[hit], minlength=RELIABILITY_BINS)

    def result(self) -> Calibration | None:
        if not self.counts.sum():
            return None
        return Calibration(counts=self.counts, confidences=self.confidences, hits=self.hits)


class _ScoreSums:
    """Sums of losses, top-k hits, and histograms of each class's score, over rows with a label and probabilities.

    The area under the ROC curve depends only on the order of the scores. The bins therefore have equal widths in
    log(p / (1 - p)), which separates the many probabilities near 0 and 1: 0.01 for up to 4,096 classes.
    """

    def __init__(self, classes: int) -> None:
        self.rows = 0
        self.log_loss = self.brier = 0.0
        self._best = np.zeros(min(TOP_K, classes), np.int64)
        self._bins = max(2, min(_SCORE_BINS, _MAX_SCORE_BINS // max(classes, 1)))
        self._all = np.zeros((classes, self._bins), np.int64)
        self._own = np.zeros((classes, self._bins), np.int64)

    def add(self, truth: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> None:
        squares = np.einsum("ij,ij->i", scores, scores, dtype=np.float64)
        finite = np.isfinite(squares)
        if not finite.all():
            truth, scores, squares = truth[finite], scores[finite], squares[finite]
        if not len(truth):
            return
        own = np.take_along_axis(scores, truth[:, None], axis=1)
        own_score = own[:, 0].astype(np.float64)
        self.rows += len(truth)
        self.log_loss -= float(np.log(own_score.clip(SMALLEST_PROBABILITY, 1)).sum())
        self.brier += float((squares - 2 * own_score + 1).sum())
        # Ties are broken by the order of the classes, as in the top k of the table.
        before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < truth[:, None]))
        ranks = np.bincount(before.sum(axis=1), minlength=scores.shape[1])
        self._best += ranks[: len(self._best)].cumsum()
        self._count_scores(truth, scores)

    def mean(self, total: float) -> float | None:
        return total / self.rows if self.rows else None

    def top_k(self) -> tuple[float, ...] | None:
        return tuple((self._best / self.rows).tolist()) if self.rows else None

    def areas(self) -> tuple[float | None, ...]:
        """Area under the ROC curve of each class; None if all images are of the class, or none."""
        return tuple(map(_area, self._own, self._all - self._own))

    def _count_scores(self, truth: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> None:
        clipped = scores.clip(0, 1)
        with np.errstate(divide="ignore"):
            logits = np.log(clipped) - np.log(1 - clipped)
        unit = (logits.clip(-_LARGEST_LOGIT, _LARGEST_LOGIT) + _LARGEST_LOGIT) / (2 * _LARGEST_LOGIT)
        bins = np.minimum((unit * self._bins).astype(np.int64), self._bins - 1)
        bins += np.arange(scores.shape[1]) * self._bins
        self._all += np.bincount(bins.ravel(), minlength=self._all.size).reshape(self._all.shape)
        own = np.take_along_axis(bins, truth[:, None], axis=1)[:, 0]
        self._own += np.bincount(own, minlength=self._own.size).reshape(self._own.shape)


@dataclass(frozen=True)
class _Rivals:
    """The class that an image is held against, see `Example.rival`; `int64 [n]` and `float64 [n]`, NaN if unknown."""

    codes: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls,
        truth: npt.NDArray[np.int64],
        predicted: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float32],
        *,
        wanted: npt.NDArray[np.bool_],
    ) -> "_Rivals":
        """Finds those of the wanted rows, `bool [n]`, from the rows that have scores, `[s]` and `[s, K]`."""
        found = cls(truth.copy(), np.full(len(truth), np.nan))
        chosen = np.flatnonzero(wanted[rows]) if scores.shape[1] > 1 else np.zeros(0, np.int64)
        others, places = scores[chosen], rows[chosen]
        hit = truth[places] == predicted[places]
        others[np.arange(len(places)), predicted[places]] = -1
        found.codes[places] = np.where(hit, others.argmax(axis=1), truth[places])
        found.probabilities[places] = others[np.arange(len(places)), found.codes[places]]
        return found


class _Images:
    """Some evaluated images as a table, of which examples are kept."""

    def __init__(
        self,
        uris: pa.Array,
        truth: npt.NDArray[np.int64],
        predicted: npt.NDArray[np.int64],
        confidence: npt.NDArray[np.float64],
        rivals: _Rivals,
    ) -> None:
        self._uris = uris
        self._columns = (truth, predicted, confidence, rivals.codes, rivals.probabilities)

    def take(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        return pa.table([self._uris.take(pa.array(rows)), *(column[rows] for column in self._columns)], schema=_KEPT)


_KEPT = pa.schema(
    {
        "uri": pa.string(),
        **dict.fromkeys(("truth", "predicted"), pa.int64()),
        "confidence": pa.float64(),
        "rival": pa.int64(),
        "rival_probability": pa.float64(),
    }
)


class _Extremes:
    """Keeps the images with the highest or the lowest confidence; ties are broken by URI."""

    def __init__(self, max_kept: int, order: str) -> None:
        self._max_kept, self._order = max_kept, order
        self._worst: float | None = None  # The last of the kept ones, once there are enough.
        self._kept = _KEPT.empty_table()

    def add(self, images: pa.Table) -> None:
        if self._worst is not None:
            values = images["confidence"].to_numpy()
            images = images.filter(values >= self._worst if self._order == "descending" else values <= self._worst)
        if not len(images) or not self._max_kept:
            return
        merged = pa.concat_tables([self._kept, images])
        order = pc.select_k_unstable(
            merged, min(self._max_kept, len(merged)), sort_keys=[("confidence", self._order), ("uri", "ascending")]
        )
        self._kept = merged.take(order).combine_chunks()
        if len(self._kept) == self._max_kept:
            self._worst = self._kept["confidence"][-1].as_py()

    def examples(self, classes: Classes) -> tuple[Example, ...]:
        return _examples(self._kept, classes)


class _Confused:
    """Keeps the most confident mistakes of each pair of classes, as long as there is room those of rare pairs too."""

    def __init__(self, max_shown: int) -> None:
        self._max_shown = max_shown
        self._kept = _KEPT.empty_table()

    def add(self, images: pa.Table, confusion: npt.NDArray[np.int64]) -> None:
        """Adds mistakes; `confusion` counts those so far, these included."""
        if not len(images) or not self._max_shown:
            return
        self._kept = self._ranked(pa.concat_tables([self._kept, images]), confusion)[:_MAX_CONFUSED].combine_chunks()

    def examples(self, classes: Classes, confusion: npt.NDArray[np.int64]) -> tuple[Example, ...]:
        return _examples(self._ranked(self._kept, confusion)[: self._max_shown], classes)

    @staticmethod
    def _ranked(images: pa.Table, confusion: npt.NDArray[np.int64]) -> pa.Table:
        """The first `PER_CONFUSION` of each pair: the first of all pairs, then the second, and so on; frequent pairs
        before rare ones."""
        images = images.sort_by([("confidence", "descending"), ("uri", "ascending")])
        truth, predicted = images["truth"].to_numpy(), images["predicted"].to_numpy()
        pairs = truth * len(confusion) + predicted
        order = np.argsort(pairs, kind="stable")
        ranks = np.empty(len(pairs), np.int64)
        ranks[order] = np.arange(len(pairs)) - np.searchsorted(pairs[order], pairs[order])
        order = np.lexsort((pairs, -confusion[truth, predicted], ranks))
        return images.take(pa.array(order[: int((ranks < PER_CONFUSION).sum())]))


def _examples(kept: pa.Table, classes: Classes) -> tuple[Example, ...]:
    return tuple(
        Example(
            uri=row["uri"],
            truth=classes.names[row["truth"]],
            predicted=classes.names[row["predicted"]],
            confidence=row["confidence"],
            rival=None if math.isnan(row["rival_probability"]) else classes.names[row["rival"]],
            rival_probability=_defined(row["rival_probability"]),
        )
        for row in kept.to_pylist()
    )


def _bins(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """The bin of each value: bin i holds (i / count, (i + 1) / count], the first one also 0."""
    return np.clip(np.ceil(values * count).astype(np.int64) - 1, 0, count - 1)


# --- metrics from the counts -----------------------------------------------------------------------------------------


def _cells(
    confusion: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The non-empty cells: true class, predicted class, count."""
    truth, predicted = confusion.nonzero()
    return truth, predicted, confusion[truth, predicted]


def _of_cells(confusion: npt.NDArray[np.int64]) -> dict[str, float]:
    from sklearn import metrics

    truth, predicted, counts = _cells(confusion)
    with warnings.catch_warnings():  # scikit-learn warns when a predicted class has no images.
        warnings.simplefilter("ignore", UserWarning)
        return {
            "accuracy": float(metrics.accuracy_score(truth, predicted, sample_weight=counts)),
            "balanced_accuracy": float(metrics.balanced_accuracy_score(truth, predicted, sample_weight=counts)),
            "macro_f1": _f1(truth, predicted, counts, "macro"),
            "weighted_f1": _f1(truth, predicted, counts, "weighted"),
        }


def _f1(truth: Any, predicted: Any, counts: Any, average: str) -> float:
    from sklearn import metrics

    return float(metrics.f1_score(truth, predicted, sample_weight=counts, average=average, zero_division=0))


def _per_class(
    classes: Classes, confusion: npt.NDArray[np.int64], areas: tuple[float | None, ...]
) -> tuple[ClassMetrics, ...]:
    from sklearn import metrics

    truth, predicted, counts = _cells(confusion)
    columns = metrics.precision_recall_fscore_support(
        truth, predicted, labels=range(len(classes)), sample_weight=counts, zero_division=np.nan
    )[:3]
    return tuple(
        ClassMetrics(
            name=name,
            support=support,
            predicted=times,
            precision=_defined(precision),
            recall=_defined(recall),
            f1=_defined(f1),
            roc_auc=area,
        )
        for name, support, times, precision, recall, f1, area in zip(
            classes.names,
            confusion.sum(axis=1).tolist(),
            confusion.sum(axis=0).tolist(),
            *columns,
            areas,
            strict=True,
        )
    )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _area(own: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> float | None:
    from sklearn import metrics

    if not own.any() or not others.any():
        return None
    right, wrong = own.nonzero()[0], others.nonzero()[0]
    return float(
        metrics.roc_auc_score(
            np.repeat([1, 0], [len(right), len(wrong)]),
            np.concatenate([right, wrong]),
            sample_weight=np.concatenate([own[right], others[wrong]]),
        )
    )


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
