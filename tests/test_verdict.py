"""verdict: the sentences that stand on top of a page, by the rules from the metrics."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from harness import Recorder
from scored import multi_label_rows, one_hot, scored_rows, write_scored

from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.evaluation.comparison import ClassMove, Comparison, mcnemar
from mnist_dist.evaluation.evaluate import Evaluation, evaluate
from mnist_dist.evaluation.metrics import METRIC_COLUMNS, Accumulator, Metrics
from mnist_dist.evaluation.multi_label import MultiLabelMetrics
from mnist_dist.evaluation.tables import Classes
from mnist_dist.evaluation.verdict import counted, percent, verdict, verdict_of_comparison

CLASSES = ("ant", "bee", "cat")


def metrics_of(
    truth: Sequence[str | None] | None,
    predicted: Sequence[int],
    *,
    status: Sequence[str] | None = None,
    confidence: float = 0.9,
) -> Metrics:
    """The metrics of images with these labels and predicted class numbers."""
    uris = [f"{number}.png" for number in range(len(predicted))]
    rows = scored_rows(uris, one_hot(predicted, 3, confidence=confidence), CLASSES, status=status)
    accumulator = Accumulator(Classes(CLASSES))
    labels = None if truth is None else pa.array(truth, pa.string())
    accumulator.add(rows.select(METRIC_COLUMNS).combine_chunks().to_batches()[0], labels)
    return accumulator.metrics()


# --- one class per image ---------------------------------------------------------------------------------------------


def test_a_usual_verdict() -> None:
    truth = ["ant"] * 40 + ["bee"] * 40 + ["cat"] * 20
    predicted = [0] * 38 + [1] * 2 + [1] * 40 + [2] * 15 + [0] * 4 + [1]
    assert verdict(metrics_of(truth, predicted, confidence=0.93), of="test") == [
        "The model is right on 93.0 % of 100 test images.",
        "On other images like these, its accuracy is between 86.3 and 96.6 % (95 % confidence).",
        "The weakest class is “cat”: 15 of its 20 images are recognised (75.0 %).",
        "The most frequent confusion is “cat” taken for “ant”: 4 of its 7 mistakes.",
        "This page is over 100 images, each with a label and a prediction.",
    ]


def test_all_right() -> None:
    assert verdict(metrics_of(["ant", "bee", "cat"] * 20, [0, 1, 2] * 20, confidence=0.97)) == [
        "The model is right on all 60 images.",
        "On other images like these, its accuracy is at least 94.0 % (95 % confidence).",
        "This page is over 60 images, each with a label and a prediction.",
    ]


def test_all_wrong() -> None:
    said = verdict(metrics_of(["ant", "ant", "bee"], [1, 1, 2]))
    assert said[0] == "The model is wrong on all 3 images."
    assert said[1] == (
        "3 images are too few to be sure of much. On other images like these, its accuracy is at most 56.1 % "
        "(95 % confidence)."
    )
    assert "The weakest class is “ant”: none of its 2 images is recognised; 1 other class is as weak." in said


def test_a_single_image() -> None:
    said = verdict(metrics_of(["bee"], [1]))
    assert said[0] == "The model is right on the only image."
    assert said[1].startswith("1 image is too few to be sure of much.")
    assert said[2] == "All of these images are of one class, “bee”; nothing is known of the other 2 classes."


def test_nearly_all_right_is_not_called_all() -> None:
    assert percent(99_999, 100_000) == "99.999 %"
    assert percent(1, 30_000) == "0.003 %"
    assert percent(100, 100) == "100.0 %"
    assert percent(0, 100) == "0.0 %"
    truth = ["ant"] * 1000 + ["bee"] * 1000
    said = verdict(metrics_of(truth, [0] * 1000 + [1] * 999 + [0]))
    assert said[0] == "The model is right on 99.95 % of 2,000 images."
    assert "between 99.72 and 99.99 %" in said[1]


def test_the_only_mistake_and_mistakes_that_differ() -> None:
    assert "Its only mistake is “ant” taken for “cat”." in verdict(metrics_of(["ant"] * 2 + ["bee"], [0, 2, 1]))
    differing = verdict(metrics_of(["ant", "bee", "cat"], [1, 2, 0]))
    assert "Its 3 mistakes are all different: no two of them are taken for the same class." in differing
    alike = verdict(metrics_of(["ant", "bee", "cat"], [2, 2, 0]))
    assert (
        "Its 3 mistakes are all different: no pair of classes occurs twice, but 2 of them are taken for “cat”." in alike
    )
    alike = verdict(metrics_of(["ant"] * 5 + ["bee"], [0, 1, 1, 1, 1, 1]))
    assert "All of its 4 mistakes are “ant” taken for “bee”." in alike


def test_classes_without_images_are_named() -> None:
    said = verdict(metrics_of(["ant", "ant", "bee"], [0, 1, 1]))
    assert "1 of 3 classes has no labelled image, so nothing is known of it." in said


def test_a_confidence_that_does_not_fit_the_accuracy_is_said() -> None:
    truth = ["ant"] * 30 + ["bee"] * 30
    half = [0] * 15 + [1] * 30 + [0] * 15
    said = verdict(metrics_of(truth, half, confidence=0.9))
    assert "Its confidence is too high: 90.0 % on average, where 50.0 % of the images are right." in said
    said = verdict(metrics_of(truth, [0] * 30 + [1] * 30, confidence=0.5))
    assert "Its confidence is too low: 50.0 % on average, where 100.0 % of the images are right." in said


def test_what_is_left_out_is_counted() -> None:
    truth = ["ant", "bee", None, "dog", "cat", "cat"]
    found = metrics_of(truth, [0, 1, 1, 0, 2, 2], status=["ok"] * 4 + ["truncated", "missing"])
    assert verdict(found)[-1] == (
        "This page is over 6 images. Its metrics are over 2 of them: 1 has no label, 1 has a label that is no class "
        "and 2 could not be predicted (1 truncated, 1 missing)."
    )


def test_without_truth() -> None:
    found = metrics_of(None, [0, 1, 1, 2], status=["ok"] * 3 + ["truncated"])
    assert verdict(found) == [
        "3 images have a prediction. There are no labels, so it is not known how many are right.",
        "1 image could not be predicted (1 truncated).",
    ]
    none = replace(found, ok=0, statuses={"missing": 4})
    assert verdict(none)[0] == "None of 4 images has a prediction."
    assert verdict(replace(found, images=0, ok=0))[0] == "The table has no images."
    strange = metrics_of(["dog", "eel"], [0, 1])
    assert verdict(strange)[0].endswith(
        "none of them has a label that is a class, so it is not known how many are right."
    )


def test_numbers_go_with_their_nouns() -> None:
    assert [counted(n, "class", "classes") for n in (0, 1, 2_000)] == ["0 classes", "1 class", "2,000 classes"]


# --- several classes per image ---------------------------------------------------------------------------------------


def metrics_of_sets(tmp_path: Path, truth: str, scores: list[list[float]]) -> MultiLabelMetrics:
    thresholds = dict.fromkeys(CLASSES, 0.5)
    rows = multi_label_rows([f"{n}.png" for n in range(len(scores))], np.array(scores, np.float32), thresholds)
    (tmp_path / "truth.csv").write_text("uri,label\n" + truth)
    seen: list[Evaluation] = []

    def report(evaluation: Evaluation) -> str:
        seen.append(evaluation)
        return "page"

    labels = str(tmp_path / "truth.csv")
    table = write_scored(tmp_path / "table", rows)
    job = EvaluateJob(predictions=table, labels=labels, match="name", label_separator=";")
    evaluate(job, console=Recorder(), report=report)
    metrics = seen[0].metrics
    assert isinstance(metrics, MultiLabelMetrics)
    return metrics


def test_a_verdict_on_sets(tmp_path: Path) -> None:
    truth = "0.png,ant;bee\n1.png,ant\n2.png,\n3.png,bee\n"
    found = metrics_of_sets(tmp_path, truth, [[0.9, 0.8, 0.1], [0.2, 0.9, 0.6], [0.1, 0.1, 0.2], [0.1, 0.9, 0.1]])
    assert verdict(found) == [
        "All classes are right on 75.0 % of 4 images.",
        "4 images are too few to be sure of much. On other images like these, its share of exactly right images is "
        "between 30.1 and 95.4 % (95 % confidence).",
        "The mean average precision of its classes (mAP) is 0.792, where 1 is perfect.",
        "The weakest class is “bee”, with an average precision of 0.583 over its 2 images.",
        "1 of 3 classes is on no labelled image, so little is known of it.",
        "Most often missed is “ant”: on 1 of its 2 images.",
        "Most often predicted wrongly is “bee”: 1 of the 3 times that it is predicted.",
        "This page is over 4 images, each with a label and a prediction.",
    ]


def test_a_verdict_on_sets_without_a_mistake(tmp_path: Path) -> None:
    found = metrics_of_sets(tmp_path, "0.png,ant\n1.png,bee;cat\n", [[0.9, 0.1, 0.1], [0.1, 0.7, 0.9]])
    said = verdict(found)
    assert said[0] == "All classes of both images are right."
    assert not any("weakest" in sentence or "Most often" in sentence for sentence in said)


# --- two models ------------------------------------------------------------------------------------------------------


def comparison(*, both: int = 0, first: int = 0, second: int = 0, neither: int = 0, moved: int = 0) -> Comparison:
    """Of images that both tables, one or neither get right; `moved` of all are predicted differently."""
    known = both + first + second + neither
    return Comparison(
        first="a",
        second="b",
        first_model="1",
        second_model="2",
        common=known,
        only_in_first=0,
        only_in_second=0,
        only_in_first_examples=(),
        only_in_second_examples=(),
        duplicates_in_first=0,
        duplicates_in_second=0,
        compared=known,
        only_first_ok=0,
        only_second_ok=0,
        neither_ok=0,
        agreement=1 - moved / known if known else None,
        moves=(ClassMove(first="ant", second="bee", images=moved),) if moved else (),
        moved=(),
        known=known,
        both_right=both,
        first_right=first,
        second_right=second,
        both_wrong=neither,
        mcnemar=mcnemar(first, second) if known else None,
    )


def test_the_better_model_is_named_and_the_difference_is_more_than_chance() -> None:
    assert verdict_of_comparison(comparison(both=900, first=10, second=60, neither=30, moved=80), "old", "new") == [
        "new is better than old by 5.0 percentage points: it is right on 96.0 % of 1,000 images, old on 91.0 %.",
        "That is more than chance: on 70 images exactly one of them is right, the better one on 60, the other on 10 "
        "(McNemar's test, p < 0.001).",
        "old and new predict the same for 92.0 % of 1,000 images.",
    ]


def test_a_difference_that_may_be_chance() -> None:
    said = verdict_of_comparison(comparison(both=90, first=5, second=3, neither=2, moved=9), "old", "new")
    assert said[0].startswith("old is better than new by 2.0 percentage points")
    assert said[1].startswith("That may be chance: on 8 images exactly one of them is right, the better one on 5,")
    assert "p = 0.73" in said[1]


def test_a_point_is_one_point() -> None:
    said = verdict_of_comparison(comparison(both=98, second=1, neither=1, moved=1), "old", "new")
    assert said[0].startswith("new is better than old by 1.0 percentage point:")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"both": 9, "neither": 1}, "They are right and wrong on the same images."),
        ({"both": 9, "first": 2, "second": 2, "moved": 4}, "On 4 images exactly one of them is right, each on 2."),
    ],
)
def test_equals(counts: dict[str, int], expected: str) -> None:
    said = verdict_of_comparison(comparison(**counts), "old", "new")
    assert said[0].startswith("Neither is better: old and new are right on")
    assert said[1] == expected


def test_nothing_to_compare_and_no_labels() -> None:
    nothing = verdict_of_comparison(comparison(), "old", "new")
    assert nothing == ["The tables of old and new have no image in common, so there is nothing to compare."]
    unlabelled = replace(comparison(both=10, moved=1), known=0, both_right=0, mcnemar=None)
    assert verdict_of_comparison(unlabelled, "old", "new") == [
        "old and new predict the same for 90.0 % of 10 images.",
        "There are no labels, so it is not known which of the two is better.",
    ]
    same = replace(comparison(both=10), known=0, both_right=0, mcnemar=None)
    assert verdict_of_comparison(same, "old", "new")[0] == "old and new predict the same for all 10 images."
    failed = replace(comparison(both=10), compared=0)
    assert verdict_of_comparison(failed, "old", "new")[0].startswith("No image has a prediction of both")
