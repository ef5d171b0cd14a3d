"""What a table of predictions is worth: numbers that are gathered batch by batch, and read at the end.

Owns: what is counted, and the metrics. Does not own: the truth (`truth`), class names (`tables`), or what is shown.

Memory grows with the rows by 8 bytes each alone, by which URIs that are there twice are found (16 while they are
sorted). The rest is a confusion matrix, sums, and histograms: K² and K x 4,096 numbers for K classes. scikit-learn
computes from them what it can: it is given the cells of the matrix, or the bins of a histogram, with their counts as
weights.
"""

# n = rows of a batch, s = rows that are evaluated, K = classes

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

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

METRIC_COLUMNS = ("uri", "status", *PREDICTION_COLUMNS)
"""The columns of a table that are looked at."""
TOP_K = 5
RELIABILITY_BINS = 15
"""Equal widths. Source: Guo et al. 2017, arXiv:1706.04599."""
CONFIDENCE_BINS = 20
SMALLEST_PROBABILITY = 1e-15
"""The log loss of a class takes smaller probabilities for this one: the loss of an impossible truth is 34.5."""
_SCORE_BINS, _MAX_SCORE_BINS = 4096, 2**24  # for each class, and for all of them (128 MiB)
_LARGEST_LOGIT = 20.0  # 2e-9 and all below are one bin; float32 knows no probabilities between 1 - 6e-8 and 1
_SLICE_VALUES, _SLICE_ROWS = 2**21, 2**17  # that are worked on at once
_MAX_UNKNOWN = 1_000  # labels that are counted by name
_REST = "..."


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """Of one class; None: undefined, such as the precision of a class that was never predicted."""

    name: str
    support: int
    """Images that are of this class."""
    predicted: int
    """Images, of those with a known truth, that were said to be."""
    precision: float | None
    recall: float | None
    f1: float | None
    roc_auc: float | None
    """Against all other classes."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Confidence against accuracy, in `RELIABILITY_BINS` equal bins, (0, 1/15] the first."""

    counts: npt.NDArray[np.int64]
    """Images of each bin."""
    confidences: npt.NDArray[np.float64]
    """Sum of their confidences."""
    hits: npt.NDArray[np.int64]
    """How many of them are right."""

    @property
    def ece(self) -> float:
        """Expected calibration error. Source: Guo et al. 2017, arXiv:1706.04599, equation 3."""
        return float(np.abs(self.hits - self.confidences).sum() / self.counts.sum())


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image."""

    uri: str
    truth: str
    predicted: str
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a table is worth. None: it cannot be said, for want of truth or of columns."""

    classes: tuple[str, ...]
    images: int
    """Rows of the table."""
    ok: int
    statuses: Mapping[str, int]
    """Rows by status."""
    labelled: int
    """Rows with a label, known or not."""
    known: int
    """Rows whose label is one of the classes."""
    evaluated: int
    """Those of them with a prediction; accuracy and all that follows is over them."""
    unknown: Mapping[str, int]
    """Labels that are none of the classes -> rows; above 1,000 of them the rest together."""
    unknown_examples: Mapping[str, str]
    """For some of these labels the first URI."""
    duplicates: int
    """Rows whose URI was there before; they count like any other."""
    duplicate_examples: tuple[str, ...] = ()
    predicted: npt.NDArray[np.int64] | None
    """`int64 [K]`: rows by predicted class, truth or not."""
    confidence_histogram: npt.NDArray[np.int64] | None
    """Rows by confidence, in `CONFIDENCE_BINS` equal bins of 0 to 1, truth or not."""
    accuracy: float | None
    accuracy_low: float | None
    """95 % Wilson interval."""
    accuracy_high: float | None
    balanced_accuracy: float | None
    """Mean recall of the classes that there are images of."""
    macro_f1: float | None
    """Mean over the classes that there are images of, or that were predicted."""
    weighted_f1: float | None
    """Mean weighted by support."""
    log_loss: float | None
    """Natural logarithm; probabilities from `SMALLEST_PROBABILITY` on."""
    brier: float | None
    """Mean over the images of the sum over the classes of the squared error; 0 to 2."""
    roc_auc: float | None
    """One class against the rest, mean over the classes where it is defined."""
    top_k: tuple[float, ...] | None
    """Share of images whose truth is among the k most probable classes, k = 1, 2, ... `TOP_K` or K."""
    without_probabilities: int
    """Evaluated rows whose probabilities are missing or no numbers; log loss, Brier, AUC and top k are without them."""
    ece: float | None
    calibration: Calibration | None
    per_class: tuple[ClassMetrics, ...]
    """Empty without truth."""
    confusion: npt.NDArray[np.int64] | None
    """`int64 [K, K]`: rows are the truth, columns the predictions."""
    mistakes: tuple[Example, ...]
    """The most confident ones, the most confident first."""
    doubtful_hits: tuple[Example, ...]
    """The least confident right answers, the least confident first."""

    @property
    def unknown_labels(self) -> int:
        """Rows whose label is none of the classes."""
        return sum(self.unknown.values())

    def without_labels(self) -> "Metrics":
        """The same where no label turned out to be a class: what seemed to be labels are none."""
        return replace(self, labelled=0, unknown={}, unknown_examples={})

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values: dict[str, Any] = _plain(asdict(self))
        return {**values, "unknown_labels": self.unknown_labels}


def wilson_interval(hits: int, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """The interval that holds a share with the probability `level`.

    Args:
        hits: of `count`.
        count: at least 1.
        level: in (0, 1).

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22, 209-212.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def classification_report(metrics: Metrics) -> str | None:
    """scikit-learn's text table of the classes that there are images of, or that were predicted; None without truth."""
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
    return re.sub(r"(\d+)\.0$", r"  \1", text, flags=re.MULTILINE)  # weighted, its counts are no integers


class Accumulator:
    """Takes the batches of a table one by one.

    Args:
        classes: of the table.
        shown: how many mistakes and how many hits are kept.
    """

    def __init__(self, classes: Classes, *, shown: int = 24) -> None:
        self._classes = classes
        self._images = 0
        self._statuses: Counter[str] = Counter()
        self._hashes: list[Hashes] = []
        self._labels = _Labels()
        self._confusion = np.zeros((len(classes), len(classes)), np.int64)
        self._predicted = np.zeros(len(classes), np.int64)
        self._confidences = np.zeros(CONFIDENCE_BINS, np.int64)
        self._says_class = self._says_confidence = False
        self._calibration = _CalibrationSums()
        self._scores = _ScoreSums(len(classes))
        self._mistakes = _Extremes(shown, "descending")
        self._hits = _Extremes(shown, "ascending")

    def add(self, batch: pa.RecordBatch, labels: pa.Array | None) -> None:
        """Takes some rows.

        Args:
            batch: with `uri`, `status` and those of `PREDICTION_COLUMNS` that the table has.
            labels: `string [n]`, null where there is none. None: no truth.

        Raises:
            DataError: the rows do not fit the classes.
        """
        rows = max(1, min(_SLICE_ROWS, _SLICE_VALUES // max(len(self._classes), 1)))
        for start in range(0, len(batch), rows):
            self._add(batch.slice(start, rows), None if labels is None else labels.slice(start, rows))

    def metrics(self) -> Metrics:
        """Of all rows so far."""
        count = int(self._confusion.sum())
        cells = _of_cells(self._confusion) if count else {}
        low, high = wilson_interval(int(self._confusion.trace()), count) if count else (None, None)
        areas = self._scores.areas()
        defined = [area for area in areas if area is not None]
        calibration = self._calibration.result()
        return Metrics(
            classes=self._classes.names,
            images=self._images,
            ok=self._statuses["ok"],
            statuses=dict(self._statuses.most_common()),
            labelled=self._labels.known + self._labels.unknown.total(),
            known=self._labels.known,
            evaluated=count,
            unknown=dict(self._labels.unknown.most_common()),
            unknown_examples=self._labels.examples,
            duplicates=repeated(self._hashes)[0],
            predicted=self._predicted if self._says_class else None,
            confidence_histogram=self._confidences if self._says_confidence else None,
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
        )

    def repeated_uris(self) -> Hashes:
        """Hashes of the URIs that are there more than once."""
        return repeated(self._hashes)[1]

    def _add(self, batch: pa.RecordBatch, labels: pa.Array | None) -> None:
        self._images += len(batch)
        for item in batch["status"].value_counts().to_pylist():
            self._statuses[item["values"]] += item["counts"]
        self._hashes.append(uri_hashes(batch["uri"]))
        truth = np.full(len(batch), NO_LABEL) if labels is None else self._classes.codes(labels)
        if labels is not None:
            self._labels.add(batch["uri"], labels, truth)
        confidence, predicted = confidences(batch, self._classes), predicted_codes(batch, self._classes)
        ok = pc.equal(batch["status"], "ok").to_numpy(zero_copy_only=False)
        if confidence is not None:
            self._says_confidence = True
            self._confidences += np.bincount(
                _bins(confidence[ok & ~np.isnan(confidence)], CONFIDENCE_BINS), minlength=CONFIDENCE_BINS
            )
        if predicted is None:
            return
        self._says_class = True
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
        """Rows with truth and prediction; of the confidences some may be NaN."""
        size = len(self._classes)
        np.add.at(self._confusion, (truth, predicted), 1)
        if "probabilities" in batch.schema.names:
            rows, scores = probabilities(batch, self._classes)
            self._scores.add(truth[rows], scores)
        if confidence is None or not size:
            return
        hit, sure = truth == predicted, ~np.isnan(confidence)
        self._calibration.add(confidence[sure], hit[sure])
        for extremes, chosen in ((self._mistakes, sure & ~hit), (self._hits, sure & hit)):
            extremes.add(batch["uri"], np.flatnonzero(chosen), truth, predicted, confidence)


# --- what is counted -------------------------------------------------------------------------------------------------


class _Labels:
    """Which labels are classes, and which are not."""

    def __init__(self) -> None:
        self.known = 0
        self.unknown: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, uris: pa.Array, labels: pa.Array, codes: npt.NDArray[np.int64]) -> None:
        self.known += int((codes >= 0).sum())
        rows = np.flatnonzero(codes == UNKNOWN_LABEL)
        if not len(rows):
            return
        strange = labels.take(pa.array(rows)).dictionary_encode()
        indices = strange.indices.to_numpy(zero_copy_only=False)
        counts = np.bincount(indices, minlength=len(strange.dictionary))
        _, firsts = np.unique(indices, return_index=True)
        for label, count, first in zip(strange.dictionary.to_pylist(), counts.tolist(), firsts.tolist(), strict=True):
            is_named = label in self.unknown or len(self.unknown) < _MAX_UNKNOWN
            self.unknown[label if is_named else _REST] += count
            if is_named:
                self.examples.setdefault(label, uris[int(rows[first])].as_py())


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
    """Of rows with truth and probabilities: sums of losses, hits among the best k, histograms of each class's score.

    An area under the ROC curve depends on the order of the scores alone. So the bins are equal in log(p / (1 - p)), in
    which the many probabilities near 0 and 1 lie apart, 0.01 wide for up to 4,096 classes.
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
        # as the table's top k: equal ones in the order of the classes
        before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < truth[:, None]))
        ranks = np.bincount(before.sum(axis=1), minlength=scores.shape[1])
        self._best += ranks[: len(self._best)].cumsum()
        self._count_scores(truth, scores)

    def mean(self, total: float) -> float | None:
        return total / self.rows if self.rows else None

    def top_k(self) -> tuple[float, ...] | None:
        return tuple((self._best / self.rows).tolist()) if self.rows else None

    def areas(self) -> tuple[float | None, ...]:
        """Area under the ROC curve of each class; None where all images are of it, or none."""
        return tuple(map(_area, self._own, self._all - self._own))

    def _count_scores(self, truth: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> None:
        clipped = scores.clip(0, 1)
        with np.errstate(divide="ignore"):
            logits = np.log(clipped) - np.log(1 - clipped)
        unit = (logits.clip(-_LARGEST_LOGIT, _LARGEST_LOGIT) + _LARGEST_LOGIT) / (2 * _LARGEST_LOGIT)
        places = np.minimum((unit * self._bins).astype(np.int64), self._bins - 1)
        places += np.arange(scores.shape[1]) * self._bins
        self._all += np.bincount(places.ravel(), minlength=self._all.size).reshape(self._all.shape)
        own = np.take_along_axis(places, truth[:, None], axis=1)[:, 0]
        self._own += np.bincount(own, minlength=self._own.size).reshape(self._own.shape)


class _Extremes:
    """The few images of the highest or lowest confidence; of equal ones the first by URI."""

    def __init__(self, most: int, order: str) -> None:
        self._most, self._order = most, order
        self._worst: float | None = None  # of those that are kept, once there are enough
        self._kept = pa.table(
            {
                "uri": pa.array([], pa.string()),
                "truth": pa.array([], pa.int64()),
                "predicted": pa.array([], pa.int64()),
                "confidence": pa.array([], pa.float64()),
            }
        )

    def add(
        self,
        uris: pa.Array,
        rows: npt.NDArray[np.int64],
        truth: npt.NDArray[np.int64],
        predicted: npt.NDArray[np.int64],
        confidence: npt.NDArray[np.float64],
    ) -> None:
        if self._worst is not None:
            values = confidence[rows]
            rows = rows[values >= self._worst if self._order == "descending" else values <= self._worst]
        if not len(rows) or not self._most:
            return
        columns = [uris.take(pa.array(rows)), truth[rows], predicted[rows], confidence[rows]]
        both = pa.concat_tables([self._kept, pa.table(columns, schema=self._kept.schema)])
        order = pc.select_k_unstable(
            both, min(self._most, len(both)), sort_keys=[("confidence", self._order), ("uri", "ascending")]
        )
        self._kept = both.take(order).combine_chunks()
        if len(self._kept) == self._most:
            self._worst = self._kept["confidence"][-1].as_py()

    def examples(self, classes: Classes) -> tuple[Example, ...]:
        return tuple(
            Example(
                uri=row["uri"],
                truth=classes.names[row["truth"]],
                predicted=classes.names[row["predicted"]],
                confidence=row["confidence"],
            )
            for row in self._kept.to_pylist()
        )


def _bins(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """The number of the bin of each value: ((i - 1) / count, i / count]; 0 is in the first."""
    return np.clip(np.ceil(values * count).astype(np.int64) - 1, 0, count - 1)


# --- what follows from it --------------------------------------------------------------------------------------------


def _cells(
    confusion: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The cells that are not empty: truth, prediction, count."""
    truth, predicted = confusion.nonzero()
    return truth, predicted, confusion[truth, predicted]


def _of_cells(confusion: npt.NDArray[np.int64]) -> dict[str, float]:
    from sklearn import metrics

    truth, predicted, counts = _cells(confusion)
    with warnings.catch_warnings():  # that a class was predicted which there are no images of
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
