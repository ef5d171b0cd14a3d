"""metrics: the numbers from compressed data are those that scikit-learn gives for every single row."""

import json
import math
import resource
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from scored import one_hot, scored_rows
from sklearn import metrics as sklearn_metrics

from mnist_dist.errors import DataError
from mnist_dist.evaluation.metrics import (
    METRIC_COLUMNS,
    Accumulator,
    Metrics,
    classification_report,
    wilson_interval,
)
from mnist_dist.evaluation.tables import Classes
from mnist_dist.score_config import TableConfig

# n = images, K = classes

COUNT = 611


def names_of(classes: int) -> tuple[str, ...]:
    return tuple(f"class {letter}" for letter in "abcdefghij"[:classes])


def measure(
    rows: pa.Table, names: tuple[str, ...], labels: list[str | None] | None, *, batch_rows: int = 100, shown: int = 24
) -> Metrics:
    """Of rows with only the columns that an evaluation reads."""
    accumulator = Accumulator(Classes(names), shown=shown)
    chosen = rows.select([name for name in METRIC_COLUMNS if name in rows.column_names]).combine_chunks()
    start = 0
    for batch in chosen.to_batches(max_chunksize=batch_rows):
        part = None if labels is None else pa.array(labels[start : start + len(batch)], pa.string())
        accumulator.add(batch, part)
        start += len(batch)
    return accumulator.metrics()


def random_case(classes: int, *, sharpness: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Truth `[n]` and probabilities `[n, K]` that know something of it."""
    random = np.random.default_rng(classes)
    truth = random.integers(0, classes, COUNT)
    logits = random.normal(size=(COUNT, classes)) + 1.2 * (truth[:, None] == np.arange(classes))
    scores = np.exp(logits * sharpness)
    return truth, (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("classes", "batch_rows", "sharpness"), [(3, 1000, 1.0), (4, 1, 4.0), (5, 37, 9.0), (7, 200, 1.0)]
)
def test_it_is_what_scikit_learn_says_of_all_rows(classes: int, batch_rows: int, sharpness: float) -> None:
    truth, scores = random_case(classes, sharpness=sharpness)
    names = names_of(classes)
    rows = scored_rows([f"{index}.png" for index in range(COUNT)], scores, names)
    found = measure(rows, names, [names[code] for code in truth], batch_rows=batch_rows)
    predicted = scores.argmax(axis=1)
    assert found.images == found.ok == found.known == found.evaluated == COUNT
    assert found.accuracy == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    assert found.balanced_accuracy == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, predicted))
    assert found.macro_f1 == pytest.approx(sklearn_metrics.f1_score(truth, predicted, average="macro"))
    assert found.weighted_f1 == pytest.approx(sklearn_metrics.f1_score(truth, predicted, average="weighted"))
    assert found.confusion is not None
    assert found.confusion.tolist() == sklearn_metrics.confusion_matrix(truth, predicted).tolist()
    exact = scores.astype(np.float64) / scores.sum(axis=1, keepdims=True, dtype=np.float64)
    assert found.log_loss == pytest.approx(sklearn_metrics.log_loss(truth, exact.clip(1e-15)), rel=1e-5)
    brier = sklearn_metrics.brier_score_loss(truth, exact, labels=range(classes), scale_by_half=False)
    assert found.brier == pytest.approx(brier, rel=1e-5)
    assert found.top_k is not None
    for k in range(1, min(5, classes)):
        assert found.top_k[k - 1] == sklearn_metrics.top_k_accuracy_score(truth, exact, k=k)
    area = sklearn_metrics.roc_auc_score(truth, exact, multi_class="ovr")
    assert found.roc_auc == pytest.approx(area, abs=2e-3)


def test_each_class_has_its_numbers() -> None:
    truth, scores = random_case(4, sharpness=2.0)
    names = names_of(4)
    found = measure(scored_rows([str(i) for i in range(COUNT)], scores, names), names, [names[c] for c in truth])
    predicted = scores.argmax(axis=1)
    expected = sklearn_metrics.precision_recall_fscore_support(truth, predicted)
    for code, one in enumerate(found.per_class):
        assert [one.precision, one.recall, one.f1, one.support] == pytest.approx([column[code] for column in expected])
        assert one.predicted == (predicted == code).sum()
        area = sklearn_metrics.roc_auc_score(truth == code, scores[:, code])
        assert one.roc_auc == pytest.approx(area, abs=2e-3)
    plain = sklearn_metrics.classification_report(truth, predicted, target_names=names, digits=4)
    assert classification_report(found) == plain


def test_scores_close_to_0_and_1_keep_their_order() -> None:
    random = np.random.default_rng(5)
    truth = np.arange(400) % 2
    logits = random.normal(size=400) * 2 + truth - 12  # all below 1 in 10,000: one bin of equal widths
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    rows = scored_rows([str(i) for i in range(400)], np.stack([1 - scores, scores], axis=1), ("no", "yes"))
    found = measure(rows, ("no", "yes"), [("no", "yes")[code] for code in truth])
    area = sklearn_metrics.roc_auc_score(truth, scores)
    assert found.per_class[1].roc_auc == pytest.approx(area, abs=2e-3)
    assert 0.55 < area < 0.75


def test_wilson_interval_by_hand() -> None:
    # Wilson's interval of 8 out of 10: (0.8 + z²/20 ± z sqrt(0.16/10 + z²/400)) / (1 + z²/10), z = 1.959964
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson_interval(10, 10)[1] == 1.0


def test_calibration_by_hand() -> None:
    scores = np.array([[0.9, 0.1], [0.92, 0.08], [0.55, 0.45], [0.35, 0.65]], np.float32)
    rows = scored_rows(["0", "1", "2", "3"], scores, ("a", "b"))
    found = measure(rows, ("a", "b"), ["a", "b", "a", "b"])
    # the bins of 1/15: 0.9 and 0.92 are in (13/15, 14/15], 0.55 in (8/15, 9/15], 0.65 in (9/15, 10/15]
    assert found.calibration is not None
    assert found.calibration.counts.tolist() == [0] * 8 + [1, 1, 0, 0, 0, 2, 0]
    assert found.calibration.hits[13] == 1
    assert found.calibration.confidences[13] == pytest.approx(1.82)
    assert found.ece == pytest.approx((abs(1 - 1.82) + abs(1 - 0.55) + abs(1 - 0.65)) / 4, abs=1e-6)
    assert found.confidence_histogram is not None
    assert found.confidence_histogram.sum() == 4


def test_an_impossible_truth_costs_no_more_than_the_smallest_probability() -> None:
    rows = scored_rows(["0"], np.array([[1, 0]], np.float32), ("a", "b"))
    assert measure(rows, ("a", "b"), ["b"]).log_loss == pytest.approx(-math.log(1e-15))


def test_probabilities_that_are_no_numbers_are_counted_and_left_out() -> None:
    scores = np.array([[0.75, 0.25], [np.nan, np.nan]], np.float32)
    found = measure(scored_rows(["0", "1"], scores, ("a", "b")), ("a", "b"), ["a", "b"])
    assert found.evaluated == 2
    assert found.without_probabilities == 1
    assert found.log_loss == pytest.approx(-math.log(0.75))


@pytest.mark.parametrize(
    ("columns", "missing"),
    [
        ("predicted_index confidence", {"log_loss", "brier", "roc_auc", "top_k"}),
        ("predicted_class", {"log_loss", "brier", "roc_auc", "top_k", "ece", "calibration", "confidence_histogram"}),
        ("probabilities", set()),
        ("width", {"accuracy", "macro_f1", "log_loss", "ece", "confusion", "confidence_histogram", "predicted"}),
        ("confidence", {"accuracy", "ece", "predicted"}),
    ],
)
def test_what_left_out_columns_would_say_is_none(columns: str, missing: set[str]) -> None:
    truth, scores = random_case(3, sharpness=1.0)
    names = names_of(3)
    uris = [str(index) for index in range(COUNT)]
    labels: list[str | None] = [names[code] for code in truth]
    whole = measure(scored_rows(uris, scores, names), names, labels)
    found = measure(scored_rows(uris, scores, names, table=TableConfig(columns=(columns,))), names, labels)
    assert {name for name in missing if getattr(found, name) is not None} == set()
    assert found.images == COUNT
    if "accuracy" not in missing:
        assert (found.accuracy, found.macro_f1) == (whole.accuracy, whole.macro_f1)
        found.to_json()
    if not missing:
        assert found.log_loss == whole.log_loss
        assert found.mistakes == whole.mistakes


def test_without_truth_there_is_no_accuracy_but_everything_else() -> None:
    rows = scored_rows(["0", "1", "2"], one_hot([0, 2, 2], 3), names_of(3))
    found = measure(rows, names_of(3), None)
    assert (found.accuracy, found.confusion, found.per_class, found.ece) == (None, None, (), None)
    assert found.predicted is not None
    assert found.predicted.tolist() == [1, 0, 2]
    assert found.confidence_histogram is not None
    assert found.confidence_histogram.sum() == 3
    assert classification_report(found) is None


def test_rows_that_are_not_ok_are_counted_by_their_status() -> None:
    status = ["ok", "missing", "ok", "truncated", "missing"]
    rows = scored_rows(list("01234"), one_hot([0, 0, 1, 1, 1], 3), names_of(3), status=status)
    found = measure(rows, names_of(3), ["class a"] * 5)
    assert found.statuses == {"ok": 2, "missing": 2, "truncated": 1}
    assert (found.images, found.ok, found.known, found.evaluated) == (5, 2, 5, 2)
    assert found.accuracy == 0.5


def test_labels_that_are_no_class_are_counted_with_an_example() -> None:
    rows = scored_rows(list("01234"), one_hot([0, 0, 1, 1, 1], 3), names_of(3))
    found = measure(rows, names_of(3), ["class a", "yak", None, "gnu", "yak"], batch_rows=2)
    assert found.unknown == {"yak": 2, "gnu": 1}
    assert found.unknown_examples == {"yak": "1", "gnu": "3"}
    assert (found.labelled, found.known, found.evaluated, found.unknown_labels) == (4, 1, 1, 3)


def test_more_unknown_labels_than_can_be_named_are_counted_together() -> None:
    uris = [str(index) for index in range(1203)]
    rows = scored_rows(uris, one_hot([0] * 1203, 3), names_of(3))
    found = measure(rows, names_of(3), [f"strange {index}" for index in range(1203)])
    assert len(found.unknown) == 1001
    assert found.unknown["..."] == 203
    assert found.unknown_labels == 1203


def test_rows_that_repeat_a_uri_are_counted() -> None:
    rows = scored_rows(["a", "b", "a", "c", "b", "a"], one_hot([0] * 6, 3), names_of(3))
    assert measure(rows, names_of(3), None, batch_rows=2).duplicates == 3


def test_a_class_without_images_has_no_recall_and_counts_in_no_mean() -> None:
    rows = scored_rows(list("0123"), one_hot([0, 1, 1, 1], 4), names_of(4))
    found = measure(rows, names_of(4), ["class a", "class a", "class b", "class b"])
    assert [one.recall for one in found.per_class] == [0.5, 1.0, None, None]
    assert [one.precision for one in found.per_class] == [1.0, 2 / 3, None, None]
    assert found.per_class[2].roc_auc is None
    assert found.balanced_accuracy == 0.75
    text = classification_report(found)
    assert text is not None
    assert "class c" not in text


def test_the_most_confident_mistakes_are_kept() -> None:
    confidence = [0.9, 0.6, 0.9, 0.7, 0.6, 0.8, 0.5, 0.95]
    predicted = [1, 1, 1, 1, 0, 0, 0, 0]
    scores = np.concatenate([one_hot([p], 3, confidence=c) for p, c in zip(predicted, confidence, strict=True)])
    rows = scored_rows(list("hgfedcba"), scores, names_of(3))
    for batch_rows in (1, 3, 8):
        found = measure(rows, names_of(3), ["class a"] * 8, batch_rows=batch_rows, shown=2)
        assert [(one.uri, round(one.confidence, 4)) for one in found.mistakes] == [("f", 0.9), ("h", 0.9)]
        assert (found.mistakes[0].truth, found.mistakes[0].predicted) == ("class a", "class b")
        assert found.mistakes[0].rival == "class a"
        assert found.mistakes[0].rival_probability == pytest.approx(0.05)
    assert measure(rows, names_of(3), ["class a"] * 8, shown=0).mistakes == ()


CLOSE = np.array(
    [[0.5, 0.45, 0.05], [0.5, 0.29, 0.21], [0.999, 0.001, 0.0], [0.59, 0.40, 0.01], [0.45, 0.1, 0.45]], np.float32
)
"""Probabilities of images of the first class; the second and third are not barely right."""


def test_barely_right_is_what_has_a_close_second() -> None:
    rows = scored_rows(list("abcde"), CLOSE, names_of(3))
    for batch_rows in (1, 5):
        found = measure(rows, names_of(3), ["class a"] * 5, batch_rows=batch_rows)
        assert [(one.uri, one.rival) for one in found.doubtful_hits] == [
            ("e", "class c"),
            ("a", "class b"),
            ("d", "class b"),
        ]
        assert found.doubtful_hits[1].rival_probability == pytest.approx(0.45)
        assert found.barely_right == 3
    assert measure(rows, names_of(3), ["class a"] * 5, shown=1).barely_right == 3


def test_without_probabilities_the_confidence_decides_what_is_barely_right() -> None:
    rows = scored_rows(list("abcde"), CLOSE, names_of(3)).drop_columns(["probabilities"])
    found = measure(rows, names_of(3), ["class a"] * 5)
    assert [one.uri for one in found.doubtful_hits] == ["e", "a", "b", "d"]
    assert {one.rival for one in found.doubtful_hits} == {None}


def test_certain_hits_are_never_barely_right() -> None:
    truth, scores = random_case(5, sharpness=3.0)
    rows = scored_rows([str(number) for number in range(COUNT)], scores, names_of(5))
    found = measure(rows, names_of(5), [names_of(5)[code] for code in truth], shown=COUNT)
    ranked = np.sort(scores, axis=1)
    close = (scores.argmax(axis=1) == truth) & (ranked[:, -1] - ranked[:, -2] < 0.2)
    assert sorted(int(one.uri) for one in found.doubtful_hits) == np.flatnonzero(close).tolist()
    assert found.barely_right == close.sum()


def test_mistakes_of_all_pairs_are_kept_before_more_of_the_frequent_ones() -> None:
    truth: list[str | None] = [*["class a"] * 30, "class b", "class c"]
    predicted = [*[1] * 30, 2, 0]
    confidence = np.linspace(0.6, 0.99, 32)
    scores = np.concatenate([one_hot([p], 3, confidence=c) for p, c in zip(predicted, confidence, strict=True)])
    rows = scored_rows([f"{number:02}" for number in range(32)], scores, names_of(3))
    for batch_rows in (1, 7, 32):
        found = measure(rows, names_of(3), truth, batch_rows=batch_rows, shown=1)
        assert [one.uri for one in found.confused] == ["29", "30", "31", "28", "27", "26"]
    assert len(measure(rows, names_of(3), truth).confused) == 8  # Six of the first pair.
    assert measure(rows, names_of(3), truth, shown=0).confused == ()


def test_rows_without_a_prediction_are_kept_as_examples() -> None:
    status = ["ok", "truncated", "missing", *["truncated"] * 20]
    rows = scored_rows([f"{number:02}" for number in range(23)], one_hot([0] * 23, 3), names_of(3), status=status)
    for batch_rows in (1, 5, 23):
        found = measure(rows, names_of(3), None, batch_rows=batch_rows).not_ok
        assert [one.uri for one in found if one.status == "truncated"] == ["01", *(f"{n:02}" for n in range(3, 14))]
        assert [(one.uri, one.error) for one in found if one.status == "missing"] == [("02", "it is missing")]


def test_a_row_with_too_few_probabilities_is_refused() -> None:
    rows = scored_rows(["0"], np.array([[0.5, 0.5]], np.float32), ("a", "b"))
    with pytest.raises(DataError, match=r"each row has 3 probabilities, one for each class. Received: 2"):
        measure(rows, names_of(3), ["class a"])


@pytest.mark.parametrize("status", [[], ["missing", "failed"]])
def test_a_table_may_have_nothing_that_is_ok(status: list[str]) -> None:
    rows = scored_rows(list("01")[: len(status)], np.zeros((len(status), 3), np.float32), names_of(3), status=status)
    found = measure(rows, names_of(3), ["class a"] * len(status))
    assert (found.images, found.ok, found.accuracy, found.ece) == (len(status), 0, None, None)
    assert measure(rows, (), ["class a"] * len(status)).evaluated == 0


@pytest.mark.slow
def test_memory_grows_by_a_few_bytes_a_row() -> None:
    """From 0.5 to 1.5 million rows: hashes of 8 bytes, sorted in a copy, and what allocators keep of the batches."""
    accumulator, names = Accumulator(Classes(names_of(10))), names_of(10)
    random = np.random.default_rng(0)
    scores = random.dirichlet(np.full(10, 0.1), 50_000).astype(np.float32)
    labels = pa.array([names[code] for code in random.integers(0, 10, 50_000)])
    peaks = []
    for part in range(30):
        rows = scored_rows([f"/images/{part}/{index}.png" for index in range(50_000)], scores, names)
        accumulator.add(rows.select(METRIC_COLUMNS).combine_chunks().to_batches()[0], labels)
        if part in (9, 29):
            found = accumulator.metrics()
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert found.images == 1_500_000
    assert found.duplicates == 0
    assert (peaks[1] - peaks[0]) * 1024 < 100 * 1_000_000


def test_it_is_json() -> None:
    rows = scored_rows(list("01"), one_hot([0, 1], 3, confidence=0.75), names_of(3))
    values: dict[str, Any] = json.loads(json.dumps(measure(rows, names_of(3), ["class a", "gnu"]).to_json()))
    assert values["confusion"] == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert values["calibration"]["counts"][11] == 1
    assert values["unknown_labels"] == 1
