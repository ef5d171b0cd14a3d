"""comparison: two tables joined by URI, flips both ways, and the test of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scored import one_hot, scored_rows, write_scored

from mnist_dist.errors import DataError
from mnist_dist.evaluation.comparison import ClassPair, Comparison, compare_tables, mcnemar
from mnist_dist.evaluation.tables import open_table
from mnist_dist.evaluation.truth import Folders, Truth
from mnist_dist.score_config import TableConfig

NAMES = ("ant", "bee", "cat")


def table_of(folder: Path, predicted: dict[str, int], *, model_id: str = "model-1", **other: Any) -> str:
    rows = scored_rows(list(predicted), one_hot(list(predicted.values()), 3), NAMES, model_id=model_id, **other)
    return write_scored(folder, rows, model_id=model_id)


def compare(first: str, second: str, *, truth: Truth | None = None, shown: int = 24) -> Comparison:
    return compare_tables(open_table(first, bundle=None), open_table(second, bundle=None), truth=truth, shown=shown)


# --- the test --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (1, 5), (0, 24), (20, 4)])
def test_few_images_are_tested_exactly(first: int, second: int) -> None:
    found = mcnemar(first, second)
    assert (found.method, found.statistic) == ("exact", None)
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert found.p_value == pytest.approx(expected)


def test_the_exact_test_by_hand() -> None:
    assert mcnemar(1, 5).p_value == pytest.approx(2 * (1 + 6) / 2**6)


@pytest.mark.parametrize(("first", "second"), [(0, 25), (13, 13), (121, 59), (1000, 1100)])
def test_many_images_are_tested_by_chi_squared(first: int, second: int) -> None:
    found = mcnemar(first, second)
    assert found.method == "chi-squared"
    assert found.statistic == pytest.approx(max(abs(first - second) - 1, 0) ** 2 / (first + second))
    assert found.p_value == pytest.approx(stats.chi2.sf(found.statistic, 1))


def test_the_chi_squared_test_by_hand() -> None:
    found = mcnemar(121, 59)  # (62 - 1)² / 180; the p value from tables of the distribution
    assert found.statistic == pytest.approx(20.672, abs=1e-3)
    assert found.p_value == pytest.approx(5.45e-6, rel=1e-2)


# --- two tables ------------------------------------------------------------------------------------------------------


def test_flips_both_ways_are_counted(tmp_path: Path) -> None:
    images = {
        "/ant/1": (0, 0),
        "/ant/2": (0, 1),
        "/ant/3": (1, 0),
        "/ant/4": (1, 2),
        "/bee/5": (1, 1),
        "/bee/6": (1, 0),
    }
    first = table_of(tmp_path / "a", {uri: pair[0] for uri, pair in images.items()})
    second = table_of(tmp_path / "b", {uri: images[uri][1] for uri in reversed(images)}, model_id="model-2")
    found = compare(first, second, truth=Folders(NAMES))
    assert (found.first, found.second, found.first_model, found.second_model) == (first, second, "model-1", "model-2")
    assert (found.common, found.compared, found.known) == (6, 6, 6)
    assert (found.both_right, found.first_right, found.second_right, found.both_wrong) == (2, 2, 1, 1)
    assert found.agreement == pytest.approx(2 / 6)
    assert (found.first_accuracy, found.second_accuracy) == (4 / 6, 3 / 6)
    assert found.mcnemar == mcnemar(2, 1)
    moves = {(move.first, move.second): move.images for move in found.moves}
    assert moves == {("bee", "ant"): 2, ("ant", "bee"): 1, ("bee", "cat"): 1}
    assert found.by_class == (
        ClassPair(name="ant", images=4, first_right=2, second_right=2),
        ClassPair(name="bee", images=2, first_right=2, second_right=1),
    )
    assert (found.moves[0].first, found.moves[0].second) == ("bee", "ant")
    assert [(one.uri, one.truth, one.first, one.second) for one in found.moved][:2] == [
        ("/ant/2", "ant", "ant", "bee"),
        ("/ant/3", "ant", "bee", "ant"),
    ]
    assert found.to_json()["first_accuracy"] == 4 / 6


def test_without_truth_there_is_agreement_alone(tmp_path: Path) -> None:
    first = table_of(tmp_path / "a", {"x": 0, "y": 1})
    found = compare(first, table_of(tmp_path / "b", {"x": 0, "y": 2}))
    assert (found.agreement, found.known, found.mcnemar, found.first_accuracy) == (0.5, 0, None, None)
    assert found.moved[0].truth is None


def test_classes_are_compared_by_name(tmp_path: Path) -> None:
    uris = ["/ant/1", "/bee/2", "/dog/3"]
    first = write_scored(tmp_path / "a", scored_rows(uris, one_hot([0, 1, 1], 2), ("ant", "bee")))
    names = ("dog", "bee", "ant", "cow")
    second = write_scored(tmp_path / "b", scored_rows(uris, one_hot([2, 1, 0], 4), names))
    found = compare(first, second, truth=Folders(NAMES))
    assert found.agreement == pytest.approx(2 / 3)
    assert found.known == 2  # the first table has no dogs: its label is unknown
    assert (found.moves[0].first, found.moves[0].second) == ("bee", "dog")


def test_images_of_one_table_alone_are_counted_and_named(tmp_path: Path) -> None:
    first, second = (
        write_scored(tmp_path / uris, scored_rows(uris, one_hot([0] * len(uris), 3), NAMES))
        for uris in ("abcdbd", "xcayxacz")
    )
    found = compare(first, second)
    assert (found.common, found.only_in_first, found.only_in_second) == (2, 2, 3)
    assert (found.duplicates_in_first, found.duplicates_in_second) == (2, 3)
    assert found.only_in_first_examples == ("b", "d")
    assert found.only_in_second_examples == ("x", "y", "z")
    few = compare(first, second, shown=1)
    assert (few.only_in_first_examples, few.only_in_second_examples) == (("b",), ("x",))
    assert compare(first, second, shown=0).moved == ()


def test_rows_that_are_not_ok_are_not_compared(tmp_path: Path) -> None:
    images = dict.fromkeys(["1", "2", "3", "4", "5"], 0)
    first = table_of(tmp_path / "a", images, status=["ok", "ok", "missing", "failed", "empty"])
    second = table_of(tmp_path / "b", images, status=["ok", "denied", "ok", "failed", "ok"])
    found = compare(first, second)
    assert (found.common, found.compared, found.agreement) == (5, 1, 1.0)
    assert (found.only_first_ok, found.only_second_ok, found.neither_ok) == (1, 2, 1)


def test_of_the_images_that_moved_those_are_shown_that_both_are_sure_of(tmp_path: Path) -> None:
    uris = ["d", "c", "b", "a"]
    firsts = np.concatenate([one_hot([0], 3, confidence=value) for value in (0.9, 0.75, 0.8, 0.75)])
    seconds = np.concatenate([one_hot([1], 3, confidence=value) for value in (0.5, 0.8, 0.75, 0.9)])
    first = write_scored(tmp_path / "a", scored_rows(uris, firsts, NAMES))
    second = write_scored(tmp_path / "b", scored_rows(uris, seconds, NAMES))
    found = compare(first, second, shown=3)
    assert [one.uri for one in found.moved] == ["a", "b", "c"]
    assert found.moved[0].first_confidence == 0.75
    assert found.moved[0].second_confidence == pytest.approx(0.9)
    assert found.moves[0].images == 4


def test_tables_may_lack_columns(tmp_path: Path) -> None:
    rows = {"x": 0, "y": 1}
    first = table_of(tmp_path / "a", rows, table=TableConfig(columns=("predicted_class",)))
    second = table_of(tmp_path / "b", {"x": 1, "y": 1}, table=TableConfig(columns=("probabilities", "predicted_class")))
    found = compare(first, second)
    assert found.agreement == 0.5
    assert found.moved[0].first_confidence is None
    assert found.moved[0].second_confidence == pytest.approx(0.8)
    bare = table_of(tmp_path / "c", rows, table=TableConfig(columns=("width",)))
    with pytest.raises(DataError, match=r"or probabilities to be compared. Received: columns uri"):
        compare(first, bare)


def test_tables_without_rows_in_common_are_compared_all_the_same(tmp_path: Path) -> None:
    first, second = table_of(tmp_path / "a", {}), table_of(tmp_path / "b", {"x": 0})
    found = compare(first, second, truth=Folders(NAMES))
    assert (found.common, found.agreement, found.mcnemar, found.only_in_second) == (0, None, None, 1)


def test_it_is_what_pandas_says_of_random_tables(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas; runs where Ray Data is installed with it")
    random = np.random.default_rng(7)
    frames, tables = [], []
    for name in "ab":
        uris = [f"/{NAMES[index % 3]}/{index}" for index in random.permutation(400)[:300].tolist()]
        rows = scored_rows(uris, random.dirichlet(np.ones(3), 300).astype(np.float32), NAMES)
        frames.append(rows.select(["uri", "predicted_class"]).to_pandas())
        tables.append(write_scored(tmp_path / name, rows))
    found = compare(tables[0], tables[1], truth=Folders(NAMES))
    both = pandas.merge(*frames, on="uri", suffixes=("_a", "_b"))
    truth = both.uri.str.split("/").str[1]
    right, second_right = both.predicted_class_a == truth, both.predicted_class_b == truth
    assert found.common == len(both)
    assert found.agreement == pytest.approx((both.predicted_class_a == both.predicted_class_b).mean())
    assert found.first_right == (right & ~second_right).sum()
    assert found.second_right == (second_right & ~right).sum()
    assert found.both_wrong == (~right & ~second_right).sum()
    assert found.only_in_first == found.only_in_second == 300 - len(both)
