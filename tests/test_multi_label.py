"""multi-label tables: the metrics are those that scikit-learn gives for the arrays, and the thresholds come back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Recorder
from scored import multi_label_rows, one_hot, scored_rows, write_scored
from sklearn import metrics as sklearn_metrics

from mnist_dist.errors import ConfigError, DataError
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.evaluation.evaluate import evaluate
from mnist_dist.evaluation.label_sets import label_sets_file
from mnist_dist.evaluation.multi_label import MultiLabelAccumulator, MultiLabelMetrics, slices
from mnist_dist.evaluation.pages import write_evaluation_page
from mnist_dist.evaluation.tables import Classes, open_table
from mnist_dist.scoring.thresholds import read_thresholds

# n = images, K = classes

NAMES = ("ant", "bee", "cat")
THRESHOLDS = {"ant": 0.5, "bee": 0.25, "cat": 0.75}
COUNT = 211
Sets = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float32]


def random_case(classes: int, *, seed: int = 1, digits: int = 7) -> tuple[Sets, Scores]:
    """True classes and probabilities that know something of them, `[n, K]` each; few digits make ties."""
    random = np.random.default_rng(seed)
    truth = random.random((COUNT, classes)) < np.linspace(0.1, 0.6, classes)
    logits = random.normal(size=truth.shape) + 2.0 * truth - 1
    return truth, (1 / (1 + np.exp(-logits))).round(digits).astype(np.float32)


def lists_of(truth: Sets, names: tuple[str, ...] = NAMES) -> pa.Array:
    return pa.array([[names[code] for code in np.flatnonzero(row)] for row in truth], pa.list_(pa.string()))


def uris_of(count: int) -> list[str]:
    return [f"/data/{number}.png" for number in range(count)]


def measure(
    folder: Path,
    truth: Sets,
    scores: Scores,
    thresholds: dict[str, float],
    *,
    exact_scores: int = 10_000,
    shown: int = 24,
    **other: Any,
) -> MultiLabelMetrics:
    """The metrics of a table with these labels in a column."""
    carried = pa.table({"label": lists_of(truth, tuple(thresholds))})
    rows = multi_label_rows(uris_of(len(truth)), scores, thresholds, carried=carried, **other)
    table = open_table(write_scored(folder, rows), bundle=None)
    accumulator = MultiLabelAccumulator(table, shown=shown, exact_scores=exact_scores)
    for batch in table.batches(table.schema.names):
        accumulator.add(batch, batch["label"])
    return accumulator.metrics()


@pytest.fixture(params=["scores", "histograms"])
def exact_scores(request: pytest.FixtureRequest) -> int:
    """Whether all scores are kept, or become histograms after a third of the rows."""
    return {"scores": 10_000, "histograms": COUNT}[str(request.param)]


@pytest.mark.parametrize(("classes", "digits"), [(3, 7), (3, 1), (6, 2)])
def test_it_is_what_scikit_learn_says_of_the_arrays(
    tmp_path: Path, classes: int, digits: int, exact_scores: int
) -> None:
    truth, scores = random_case(classes, digits=digits)
    thresholds = {f"class {code}": 0.2 + 0.1 * code for code in range(classes)}
    predicted = scores >= np.array(list(thresholds.values()), np.float32)
    found = measure(tmp_path / "t", truth, scores, thresholds, exact_scores=exact_scores)
    error = 1e-12 if exact_scores > COUNT else 5e-4
    areas = [sklearn_metrics.average_precision_score(truth[:, code], scores[:, code]) for code in range(classes)]
    assert (found.images, found.labelled, found.known, found.evaluated) == (COUNT,) * 4
    assert found.mean_average_precision == pytest.approx(np.mean(areas), abs=error)
    assert found.micro_f1 == pytest.approx(sklearn_metrics.f1_score(truth, predicted, average="micro"))
    assert found.macro_f1 == pytest.approx(sklearn_metrics.f1_score(truth, predicted, average="macro"))
    assert found.exact_match == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    assert found.hamming_loss == pytest.approx(sklearn_metrics.hamming_loss(truth, predicted))
    assert found.predicted.tolist() == predicted.sum(axis=0).tolist()
    expected = sklearn_metrics.precision_recall_fscore_support(truth, predicted)
    for code, row in enumerate(found.per_class):
        assert [row.precision, row.recall, row.f1, row.support] == pytest.approx([column[code] for column in expected])
        assert row.average_precision == pytest.approx(areas[code], abs=error)
        assert (row.predicted, row.threshold) == (predicted[:, code].sum(), thresholds[row.name])


@pytest.mark.parametrize("digits", [7, 1])
def test_the_best_thresholds_have_the_highest_f1_of_all(tmp_path: Path, digits: int, exact_scores: int) -> None:
    truth, scores = random_case(3, digits=digits)
    found = measure(tmp_path / "t", truth, scores, THRESHOLDS, exact_scores=exact_scores)
    for code, row in enumerate(found.per_class):
        every = np.unique(scores[:, code])[::-1]
        f1 = [sklearn_metrics.f1_score(truth[:, code], scores[:, code] >= threshold) for threshold in every]
        assert row.best_f1 == pytest.approx(max(f1))
        assert np.float32(row.best_threshold) == every[int(np.argmax(f1))]
    best = np.array([row.best_threshold for row in found.per_class], np.float32)
    assert found.best_macro_f1 == pytest.approx(sklearn_metrics.f1_score(truth, scores >= best, average="macro"))


@pytest.mark.parametrize("kept", [True, False])
def test_scores_at_the_ends_have_thresholds_between_0_and_1(tmp_path: Path, kept: bool) -> None:
    below = np.nextafter(np.float32(1), np.float32(0))
    scores = np.array([[1, 0, 1e-30], [below, 0, 1e-30], [0.5, 0, 0]], np.float32)
    truth = np.array([[1, 1, 1], [0, 0, 1], [0, 0, 0]], bool)
    found = measure(tmp_path / "t", truth, scores, THRESHOLDS, exact_scores=9 if kept else 0)
    # `ant` needs the highest threshold that there is, `bee` has no score above 0, and a bin holds 0 beside `cat`'s own
    assert found.per_class[0].best_threshold == pytest.approx(float(below), abs=1e-9)
    assert found.per_class[0].best_f1 == pytest.approx(2 / 3)  # it cannot tell 1 from the number before it
    assert [row.best_threshold for row in found.per_class[1:]] == [None, 1e-30 if kept else None]
    assert found.best_thresholds == {
        "ant": found.per_class[0].best_threshold,
        "bee": 0.25,
        "cat": 1e-30 if kept else 0.75,
    }


def test_scores_close_to_0_and_1_keep_their_order(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    truth = random.random((COUNT, 2)) < 0.3
    logits = random.normal(size=truth.shape) * 2 + 3 * truth + [-12, 9]
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    found = measure(tmp_path / "t", truth, scores, {"rare": 0.5, "usual": 0.5}, exact_scores=0)
    for code, row in enumerate(found.per_class):
        expected = sklearn_metrics.average_precision_score(truth[:, code], scores[:, code])
        assert row.average_precision == pytest.approx(expected, abs=1e-3)
        assert 0.5 < expected < 0.99


def test_a_class_without_images_has_no_average_precision_and_does_not_count(tmp_path: Path) -> None:
    truth, scores = random_case(3)
    truth[:, 1], scores[:, 2] = False, 0.1
    truth[:, 2] = False
    found = measure(tmp_path / "t", truth, scores, THRESHOLDS)
    one, none, unseen = found.per_class
    assert (none.support, none.average_precision, none.recall, none.f1) == (0, None, None, 0.0)
    assert (unseen.precision, unseen.recall, unseen.f1, unseen.best_threshold) == (None, None, None, None)
    assert found.mean_average_precision == one.average_precision
    assert one.f1 is not None
    assert found.macro_f1 == one.f1 / 2
    assert found.best_thresholds["bee"] == 0.25


def test_rows_that_are_not_ok_or_have_unknown_labels_are_counted_and_left_out(tmp_path: Path) -> None:
    labels = [["ant"], [], None, ["gnu", "ant", "yak"], ["bee"], ["ant"]]
    scores = np.array([[0.9, 0.1, 0.1]] * 6, np.float32)
    status = ["ok", "ok", "ok", "ok", "denied", "ok"]
    carried = pa.table({"label": pa.array(labels, pa.list_(pa.string()))})
    uris = [*uris_of(5), "/data/0.png"]
    rows = multi_label_rows(uris, scores, THRESHOLDS, status=status, carried=carried)
    result, lines, values = run(predictions=write_scored(tmp_path / "t", rows))
    metrics = values["metrics"]
    counts = {name: metrics[name] for name in ("images", "ok", "labelled", "known", "evaluated", "unknown_labels")}
    assert counts == {"images": 6, "ok": 5, "labelled": 5, "known": 4, "evaluated": 3, "unknown_labels": 1}
    assert (metrics["unknown"], metrics["predicted"]) == ({"gnu": 1, "yak": 1}, [5, 0, 0])
    assert metrics["unknown_examples"] == {"gnu": "/data/3.png", "yak": "/data/3.png"}
    assert (metrics["duplicates"], metrics["duplicate_examples"]) == (1, ["/data/0.png"])
    assert result["exact_match"] == pytest.approx(2 / 3)
    assert "note: 1 image has a label that is no class, and is not counted: 'gnu', 'yak'" in lines
    assert "note: 1 image with a label has no prediction, and is not counted" in lines


@pytest.mark.parametrize("column", ["predicted_classes", "probabilities"])
def test_either_column_is_enough(tmp_path: Path, column: str) -> None:
    truth, scores = random_case(3)
    whole = measure(tmp_path / "whole", truth, scores, THRESHOLDS)
    found = measure(tmp_path / "part", truth, scores, THRESHOLDS, columns=(column,))
    assert (found.exact_match, found.micro_f1, found.macro_f1) == (whole.exact_match, whole.micro_f1, whole.macro_f1)
    has_scores = column == "probabilities"
    assert found.mean_average_precision == (whole.mean_average_precision if has_scores else None)
    assert found.best_thresholds == (whole.best_thresholds if has_scores else {})
    assert found.without_probabilities == (0 if has_scores else COUNT)


def test_a_table_without_either_column_is_refused(tmp_path: Path) -> None:
    truth, scores = random_case(3)
    with pytest.raises(DataError, match=r"needs a column predicted_classes or probabilities .*Received: columns uri"):
        measure(tmp_path / "t", truth, scores, THRESHOLDS, columns=("width",))


def test_the_images_with_most_wrong_classes_and_some_of_each_class_are_kept(tmp_path: Path) -> None:
    truth = np.zeros((20, 3), np.bool_)
    scores = np.zeros((20, 3), np.float32)
    scores[:, 0] = 0.9  # Wrong on all images, of which few are kept.
    scores[7] = (0.9, 0.9, 0.9)
    truth[12:14, 2] = True
    scores[19] = 0.0
    found = measure(tmp_path, truth, scores, dict.fromkeys(("a", "b", "c"), 0.5), shown=1).mistakes
    assert [one.uri.rpartition("/")[2] for one in found] == [f"{n}.png" for n in (7, 12, 13, 0, 1, 2)]
    assert (found[0].truth, found[0].predicted) == ((), ("a", "b", "c"))
    assert (found[1].truth, found[1].predicted) == (("c",), ("a",))
    assert measure(tmp_path, truth, scores, dict.fromkeys(("a", "b", "c"), 0.5), shown=0).mistakes == ()


def test_a_large_batch_is_cut() -> None:
    batch = pa.record_batch({"uri": [str(number) for number in range(7)]})
    many = Classes(tuple(map(str, range(700_000))))
    assert [(start, len(part)) for start, part in slices(batch, many)] == [(0, 2), (2, 2), (4, 2), (6, 1)]


# --- the job ---------------------------------------------------------------------------------------------------------


def run(**fields: Any) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """The job's answer, the lines that a person sees, and what `metrics.json` says."""
    console = Recorder()
    result = evaluate(EvaluateJob(**fields), console=console, report=write_evaluation_page)
    return result, console.lines, json.loads(Path(result["output"], "metrics.json").read_text())


def table_of(folder: Path, scores: Scores, *, carried: pa.Table | None = None, **other: Any) -> str:
    return write_scored(folder, multi_label_rows(uris_of(len(scores)), scores, THRESHOLDS, carried=carried), **other)


def test_the_thresholds_of_an_evaluation_are_those_that_scoring_reads(tmp_path: Path) -> None:
    truth, scores = random_case(3)
    carried = pa.table({"label": lists_of(truth)})
    result, _, values = run(predictions=table_of(tmp_path / "t", scores, carried=carried))
    thresholds = read_thresholds(result["thresholds"], NAMES)
    assert thresholds == {row["name"]: row["best_threshold"] for row in values["metrics"]["per_class"]}
    rows = multi_label_rows(uris_of(COUNT), scores, thresholds, carried=carried)
    again, _, _ = run(predictions=write_scored(tmp_path / "again", rows))
    assert again["macro_f1"] == pytest.approx(values["metrics"]["best_macro_f1"])
    assert again["macro_f1"] > result["macro_f1"]


def test_the_results_and_the_page_are_those_of_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, scores = random_case(3)
    result, _, values = run(predictions=table_of(tmp_path / "t", scores, carried=pa.table({"label": lists_of(truth)})))
    keys = {"report", "output", "images", "mean_average_precision", "micro_f1", "macro_f1", "exact_match"}
    assert result.keys() == keys | {"hamming_loss", "thresholds", "seconds"}
    assert values["multi_label"] is True
    assert {name: values["metrics"][name] for name in keys - {"report", "output"}} == {
        name: result[name] for name in keys - {"report", "output"}
    }
    page = Path(result["report"]).read_text()
    assert f"{result['mean_average_precision']:.4f}" in page
    for text in ("Classes", "average precision", "best threshold", ">mAP<", "Hamming loss"):
        assert text in page
    assert "Confusion matrix" not in page
    shown = capsys.readouterr().err
    assert "micro F1" in shown
    assert "average precision" in shown


def test_without_labels_it_says_so(tmp_path: Path) -> None:
    _, scores = random_case(3)
    table = table_of(tmp_path / "t", scores)
    (tmp_path / "t-evaluation").mkdir()
    (tmp_path / "t-evaluation" / "thresholds.csv").write_text("of an earlier evaluation")
    result, lines, values = run(predictions=table)
    empty = ("mean_average_precision", "micro_f1", "macro_f1", "exact_match", "hamming_loss", "thresholds")
    assert [result[name] for name in empty] == [None] * 6
    assert any(line.startswith("note: no labels: the folders of the images") for line in lines)
    assert sum(values["metrics"]["predicted"]) > 0
    assert not (tmp_path / "t-evaluation" / "thresholds.csv").exists()


def test_folders_are_sets_of_one(tmp_path: Path) -> None:
    rows = multi_label_rows(["/ant/1.png", "/bee/2.png"], one_hot([0, 0], 3), THRESHOLDS)
    result, _, values = run(predictions=write_scored(tmp_path / "t", rows))
    assert (result["exact_match"], values["truth"]) == (0.5, "the folders of the images")


def test_a_label_separator_needs_a_multi_label_table(tmp_path: Path) -> None:
    table = write_scored(tmp_path / "t", scored_rows(["/ant/1.png"], one_hot([0], 3), NAMES))
    with pytest.raises(ConfigError, match=r"label_separator needs a multi-label table; .*label_separator=';'"):
        run(predictions=table, label_separator=";")


# --- two tables ------------------------------------------------------------------------------------------------------


def test_two_tables_are_compared_as_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, scores = random_case(3)
    _, others = random_case(3, seed=2)
    others = np.where(np.arange(COUNT)[:, None] % 2 == 0, scores, others).astype(np.float32)
    first = table_of(tmp_path / "a", scores, carried=pa.table({"label": lists_of(truth)}))
    once_more = np.vstack([others[:100], 1 - others[:1]])
    part = multi_label_rows([*uris_of(100), "/data/0.png"], once_more, THRESHOLDS)
    second = write_scored(tmp_path / "b", part, model_id="model-2")
    result, _, values = run(predictions=first, compare=second)
    found, limits = values["comparison"], np.array([0.5, 0.25, 0.75], np.float32)
    mine, theirs, truth = scores[:100] >= limits, others[:100] >= limits, truth[:100]
    same, right = (mine == theirs).all(axis=1), [(sets == truth).all(axis=1) for sets in (mine, theirs)]
    assert found["duplicates_in_second"] == 1
    assert (found["compared"], found["known"], found["only_in_first"]) == (100, 100, COUNT - 100)
    assert found["agreement"] == pytest.approx(same.mean())
    assert (found["first_right"], found["second_right"]) == ((right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum())
    for name, sets, values_of in (("first", mine, scores[:100]), ("second", theirs, others[:100])):
        measured = found[f"{name}_scores"]
        assert measured["micro_f1"] == pytest.approx(sklearn_metrics.f1_score(truth, sets, average="micro"))
        assert measured["exact_match"] == found[f"{name}_accuracy"]
        expected = sklearn_metrics.average_precision_score(truth, values_of)
        assert measured["mean_average_precision"] == pytest.approx(expected, abs=1e-4)
    moved = {image["uri"]: (image["first"], image["second"]) for image in found["moved"]}
    number = int(np.flatnonzero(~same)[0])
    names = [" + ".join(np.array(NAMES)[sets[number]]) or "(none)" for sets in (mine, theirs)]
    assert moved[f"/data/{number}.png"] == tuple(names)
    assert sum(move["images"] for move in found["moves"]) == (~same).sum()
    page = Path(result["report"]).read_text()
    for text in (
        ">a and b<",
        ">mAP<",
        "a is better than b by 12.0 percentage points: it is exactly right on 38.0",
    ):
        assert text in page
    assert "same prediction" in capsys.readouterr().err


def test_classes_are_compared_by_name_and_only_where_both_tables_predict(tmp_path: Path) -> None:
    scores = np.array([[0.9, 0.9, 0.1], [0.1, 0.9, 0.1], [0.9, 0.9, 0.9]], np.float32)
    labels = pa.table({"label": [["bee", "ant"], ["ant"], ["ant"]]})
    first = table_of(tmp_path / "a", scores, carried=labels)
    reverse = dict(reversed(THRESHOLDS.items()))
    turned = multi_label_rows(uris_of(3), scores[:, ::-1], reverse, status=["ok", "ok", "denied"])
    _, _, values = run(predictions=first, compare=write_scored(tmp_path / "b", turned))
    found = values["comparison"]
    assert (found["agreement"], found["both_right"], found["compared"], found["only_first_ok"]) == (1.0, 1, 2, 1)
    assert found["first_scores"] == found["second_scores"]
    assert found["first_scores"]["exact_match"] == 0.5


def test_a_table_of_another_kind_is_not_compared(tmp_path: Path) -> None:
    _, scores = random_case(3)
    other = write_scored(tmp_path / "b", scored_rows(uris_of(COUNT), scores, NAMES))
    with pytest.raises(DataError, match=r"both tables must be multi-label, or neither; .*/a', which is, and '.*/b'"):
        run(predictions=table_of(tmp_path / "a", scores), compare=other)


# --- the labels ------------------------------------------------------------------------------------------------------

SETS = [["ant", "cat"], [], ["bee"]]


@pytest.mark.parametrize(
    ("name", "content", "separator"),
    [
        ("l.csv", "uri,label\n/data/2.png,bee\n/data/0.png,ant; cat\n/data/1.png,\n", ";"),
        ("l.tsv", "uri\tlabel\n/data/0.png\tcat|ant|\n/data/1.png\t|\n/data/2.png\tbee\n", "|"),
        ("l.csv", "uri,label\n/data/0.png,ant\n/data/2.png,bee\n/data/1.png,\n/data/0.png,cat\n/data/0.png,\n", None),
        ("l.csv", "uri,label\n/data/0.png,0\n/data/2.png,1\n/data/1.png,\n/data/0.png,2\n", None),
        ("l.parquet", pa.array([*SETS, None], pa.list_(pa.string())), None),
        ("l.parquet", pa.array([*SETS, None], pa.large_list(pa.dictionary(pa.int8(), pa.string()))), None),
        ("l.parquet", pa.array([[0, 2], [], [1], None], pa.list_(pa.int16())), None),
        ("l.parquet", pa.array(["ant,cat", "", "bee", None]), ","),
    ],
)
def test_labels_are_read_in_every_form(tmp_path: Path, name: str, content: Any, separator: str | None) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        pq.write_table(pa.table({"uri": uris_of(4), "label": content}), path)
    scores = np.array([[0.9, 0.1, 0.9], [0.1] * 3, [0.1, 0.9, 0.1], [0.9, 0.9, 0.9]], np.float32)
    table = table_of(tmp_path / "t", scores)
    result, lines, values = run(predictions=table, labels=str(path), label_separator=separator)
    assert (values["metrics"]["labelled"], values["metrics"]["evaluated"]) == (3, 3)
    assert (result["exact_match"], result["mean_average_precision"]) == (1.0, 1.0)
    assert any(line.startswith(f"note: 1 image has no label in {path}") for line in lines)


@pytest.mark.parametrize(
    ("labels", "separator"),
    [
        (pa.array([*SETS, None], pa.list_(pa.string())), None),
        (pa.array([[0, 2], [], [1], None], pa.list_(pa.int64())), None),
        (pa.array(["ant;cat", "", "bee", None]), ";"),
    ],
)
def test_labels_may_be_a_carried_column(tmp_path: Path, labels: pa.Array, separator: str | None) -> None:
    scores = np.array([[0.9, 0.1, 0.9], [0.1] * 3, [0.1, 0.9, 0.1], [0.9, 0.9, 0.9]], np.float32)
    table = table_of(tmp_path / "t", scores, carried=pa.table({"truth": labels}))
    result, _, values = run(predictions=table, label_column="truth", label_separator=separator)
    assert (values["metrics"]["labelled"], result["exact_match"]) == (3, 1.0)
    assert values["truth"] == "the column 'truth' of the table"


@pytest.mark.parametrize(
    ("labels", "separator", "error", "message"),
    [
        (pa.array([[0.5]], pa.list_(pa.float32())), None, DataError, r"or lists of these\. Received: list<.*float>"),
        (
            pa.array([0.5]),
            None,
            DataError,
            r"true and false \(boolean\), or lists of these\. Received: double",
        ),
        (pa.array([["ant"]]), ";", ConfigError, r"has no text that label_separator splits\. Received: list"),
        (pa.array([1]), ";", ConfigError, r"has no text that label_separator splits\. Received: int64"),
    ],
)
def test_a_column_of_other_things_is_refused(
    tmp_path: Path, labels: pa.Array, separator: str | None, error: type[Exception], message: str
) -> None:
    table = table_of(tmp_path / "t", np.array([[0.9, 0.1, 0.1]], np.float32), carried=pa.table({"label": labels}))
    with pytest.raises(error, match=message):
        run(predictions=table, label_separator=separator)


def test_a_separator_without_labels_is_refused(tmp_path: Path) -> None:
    table = table_of(tmp_path / "t", np.array([[0.9, 0.1, 0.1]], np.float32))
    with pytest.raises(
        ConfigError, match=r"label_separator needs a label file, or a column of labels .*';', labels=None"
    ):
        run(predictions=table, label_separator=";")


def test_a_file_of_labels_that_is_not_there_is_named(tmp_path: Path) -> None:
    table = table_of(tmp_path / "t", np.array([[0.9, 0.1, 0.1]], np.float32))
    with pytest.raises(DataError, match=r"there is no such file; .* holds t/\. Received: labels='.*gone\.csv'"):
        run(predictions=table, labels=str(tmp_path / "gone.csv"))
    with pytest.raises(DataError, match=r"there is no such file; .*\. Received: labels='.*gone\.csv'"):
        label_sets_file(str(tmp_path / "gone.csv"), None)
