"""predictions: the table's columns, the rows of a shard, and reading them."""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from scored import write_mark

import mnist_dist
from mnist_dist.config import FeatureType
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.score_config import TableConfig
from mnist_dist.scoring.predictions import (
    CONTRACT,
    MARK,
    STATUSES,
    Mark,
    Outcomes,
    count_bad,
    iter_predictions,
    prediction_rows,
    prediction_schema,
    read_mark,
    read_predictions,
    table_uri,
)
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

NOW = datetime.datetime(2030, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC)
NOTHING = pa.schema([])
ALL = TableConfig()
CLASSES = ("ant", "bee", "cat", "dog")
FEATURES = 3


def some_outcomes(probabilities: list[list[float]], status: list[str], **other: Any) -> Outcomes:
    count = len(status)
    values: dict[str, Any] = {
        "error": [None if word == "ok" else f"it is {word}" for word in status],
        "width": np.full(count, 12, np.int32),
        "height": np.full(count, 10, np.int32),
        "size_bytes": [345] * count,
        "etag": ["e"] * count,
    }
    return Outcomes(
        status=status,
        probabilities=np.array(probabilities, np.float32).reshape(count, len(CLASSES)),
        **values | other,
    )


def schema_of(table: TableConfig, *, carried: pa.Schema = NOTHING) -> pa.Schema:
    return prediction_schema(table, carried=carried, class_names=CLASSES, num_features=FEATURES)


def rows_of(
    outcomes: Outcomes,
    *,
    table: TableConfig = ALL,
    carried: pa.Table | None = None,
    other_files: pa.Array | None = None,
) -> pa.Table:
    """Of images named 0, 1, ..."""
    return prediction_rows(
        schema_of(table, carried=NOTHING if carried is None else carried.schema),
        uris=pa.array([str(index) for index in range(len(outcomes.status))]),
        outcomes=outcomes,
        class_names=CLASSES,
        top_k=table.top_k,
        model_id="m",
        scored_at=NOW,
        carried=carried,
        other_files=other_files,
        thresholds=table.thresholds,
    )


# --- what is bad -----------------------------------------------------------------------------------------------------


def test_of_a_file_of_another_name_only_what_says_nothing_of_its_content_is_bad() -> None:
    statuses = list(STATUSES)
    outcomes = some_outcomes([[1, 0, 0, 0]] * len(statuses), statuses)
    kept = {"ok", "missing", "denied", "failed", "other_file"}
    for mark, expected in (
        (None, statuses),
        (False, statuses),
        (True, [status if status in kept else "other_file" for status in statuses]),
    ):
        rows = rows_of(outcomes, other_files=pa.array([mark] * len(statuses), pa.bool_()))
        assert rows["status"].to_pylist() == expected
        assert rows["error"].to_pylist() == outcomes.error


def test_every_status_but_two_is_bad() -> None:
    assert {status for status in STATUSES if not count_bad({status: 7})} == {"ok", "other_file"}
    assert count_bad({"ok": 1, "unsupported": 2, "other_file": 4, "missing": 8}) == 10


# --- the columns -----------------------------------------------------------------------------------------------------


def test_the_contract_is_written_down_here_once_more() -> None:
    schema = prediction_schema(TableConfig(), carried=NOTHING)
    assert str(schema.remove_metadata()).replace("element", "item").splitlines() == [
        "uri: string not null",
        "status: string not null",
        "error: string",
        "predicted_index: int32",
        "predicted_class: string",
        "confidence: float",
        "probabilities: list<item: float>",
        "  child 0, item: float",
        "width: int32",
        "height: int32",
        "size_bytes: int64",
        "etag: string",
        "model_id: string",
        "scored_at: timestamp[us, tz=UTC]",
    ]


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (TableConfig(columns=("confidence,predicted_class",)), "uri status predicted_class confidence"),
        (TableConfig(columns=("uri width",)), "uri status width"),
        (TableConfig(columns=("etag",), top_k=2), "uri status etag top_k_classes top_k_confidences"),
        (TableConfig(columns=("etag",), embeddings=True), "uri status etag embedding"),
        (TableConfig(columns=("etag,top_k_classes",), top_k=2), "uri status etag top_k_classes top_k_confidences"),
    ],
)
def test_chosen_columns_stand_in_the_order_of_the_contract(table: TableConfig, names: str) -> None:
    carried = pa.schema([("label", pa.int8())])
    assert schema_of(table, carried=carried).names == [*names.split(), "label"]


def test_flags_add_columns_to_all_of_them() -> None:
    names = schema_of(TableConfig(top_k=3, wide=True, embeddings=True)).names
    wide = ["probability_ant", "probability_bee", "probability_cat", "probability_dog"]
    assert names[-8:] == ["scored_at", *wide, "top_k_classes", "top_k_confidences", "embedding"]


@pytest.mark.parametrize(("embedding_type", "shown"), [("float32", "float"), ("float16", "halffloat")])
def test_an_embedding_is_a_list_of_fixed_size(embedding_type: FeatureType, shown: str) -> None:
    schema = schema_of(TableConfig(embeddings=True, embedding_type=embedding_type))
    assert str(schema.field("embedding").type).replace("element", "item") == f"fixed_size_list<item: {shown}>[3]"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TableConfig(wide=True), r"wide needs class names.*Received: class_names=\(\), num_features=0"),
        (TableConfig(embeddings=True), r"embeddings a number of features.*num_features=0"),
    ],
)
def test_what_the_model_has_to_say_of_the_columns_is_given(table: TableConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prediction_schema(table, carried=NOTHING)


def test_a_carried_column_is_not_taken_for_the_probability_of_a_class() -> None:
    carried = pa.table({"probability_cat": ["x"]})
    with pytest.raises(ConfigError, match=r"\(wide adds probability_<class name>\)\. .*carry='probability_cat'"):
        schema_of(TableConfig(wide=True), carried=carried.schema)
    rows = rows_of(some_outcomes([[0, 0, 1, 0]], ["ok"]), carried=carried)
    assert rows["probability_cat"].to_pylist() == ["x"]


MULTI_LABEL = TableConfig(thresholds={"ant": 0.5, "bee": 0.25, "cat": 0.3, "dog": 0.5})
"""Of a multi-label table: the thresholds of its classes."""


def test_a_multi_label_table_has_two_more_columns() -> None:
    schema = schema_of(replace(MULTI_LABEL, wide=True))
    assert schema.names[: len(CONTRACT) + 3] == [
        *CONTRACT.names,
        *("predicted_classes", "confidences"),
        "probability_ant",
    ]
    assert schema.field("predicted_classes").type == pa.list_(pa.string())
    assert schema.field("confidences").type == pa.list_(pa.float32())
    assert "predicted_classes" not in schema_of(ALL).names


def test_the_columns_of_a_multi_label_table_may_be_chosen() -> None:
    chosen = replace(MULTI_LABEL, columns=("confidences,width",))
    assert schema_of(chosen).names == ["uri", "status", "width", "confidences"]
    assert "predicted_classes" not in schema_of(replace(MULTI_LABEL, columns=("width",))).names
    with pytest.raises(ConfigError, match=r"columns must be among .*Received: confidences"):
        schema_of(TableConfig(columns=("confidences",)))


def test_an_unknown_column_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"columns must be among uri, status, .*, scored_at, label \(.*Received: score, top"
    ):
        prediction_schema(
            TableConfig(columns=("uri score", "top_k_classes")), carried=pa.schema([("label", pa.int8())])
        )


@pytest.mark.parametrize("names", [("width",), ("embedding",), ("confidences",), ("label", "label")])
def test_a_carried_column_has_a_name_of_its_own(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"Received: carry='{names[-1]}'"):
        prediction_schema(TableConfig(), carried=pa.schema([(name, pa.int8()) for name in names]))


# --- the rows --------------------------------------------------------------------------------------------------------


def test_a_row_says_the_max_probable_class() -> None:
    row = rows_of(some_outcomes([[0.125, 0.25, 0.5, 0.125]], ["ok"])).to_pylist()[0]
    assert row == {
        "uri": "0",
        "status": "ok",
        "error": None,
        "predicted_index": 2,
        "predicted_class": "cat",
        "confidence": 0.5,
        "probabilities": [0.125, 0.25, 0.5, 0.125],
        "width": 12,
        "height": 10,
        "size_bytes": 345,
        "etag": "e",
        "model_id": "m",
        "scored_at": NOW,
    }


def test_a_row_that_is_not_ok_has_no_prediction_and_keeps_the_rest() -> None:
    anything = [float("nan")] * 4
    outcomes = some_outcomes(
        [anything, [0, 0, 0, 1], anything],
        ["missing", "ok", "truncated"],
        width=np.array([0, 12, 9], np.int32),
        height=np.array([0, 11, 8], np.int32),
        size_bytes=[None, 5, 7],
        etag=[None, "a", "b"],
    )
    rows = rows_of(outcomes, table=TableConfig(top_k=1))
    for name in ("predicted_index", "predicted_class", "confidence", "probabilities", "top_k_classes"):
        assert [value is None for value in rows[name].to_pylist()] == [True, False, True]
    assert rows["probabilities"].to_pylist()[1] == [0, 0, 0, 1]
    assert rows["error"].to_pylist() == ["it is missing", None, "it is truncated"]
    assert rows["width"].to_pylist() == [None, 12, 9]
    assert rows["height"].to_pylist() == [None, 11, 8]
    assert rows["size_bytes"].to_pylist() == [None, 5, 7]
    assert rows["model_id"].to_pylist() == ["m"] * 3


@pytest.mark.parametrize("status", [["failed", "failed"], []])
def test_a_shard_may_have_nothing_that_is_ok(status: list[str]) -> None:
    table = TableConfig(top_k=2, embeddings=True)
    embeddings = np.zeros((len(status), 3), np.float32)
    rows = rows_of(some_outcomes([[0] * 4] * len(status), status, embeddings=embeddings), table=table)
    rows.validate(full=True)
    assert rows["probabilities"].null_count == rows["embedding"].null_count == rows.num_rows == len(status)


def test_the_first_of_equal_classes_wins() -> None:
    outcomes = some_outcomes([[0.1, 0.4, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25]], ["ok", "ok"])
    rows = rows_of(outcomes, table=TableConfig(top_k=3))
    assert rows["predicted_index"].to_pylist() == [1, 0]
    assert rows["top_k_classes"].to_pylist() == [["bee", "dog", "ant"], ["ant", "bee", "cat"]]
    assert rows["top_k_confidences"].to_pylist()[0] == pytest.approx([0.4, 0.4, 0.1])


def test_more_than_all_classes_are_all_of_them() -> None:
    rows = rows_of(some_outcomes([[0.1, 0.4, 0.2, 0.3]], ["ok"]), table=TableConfig(top_k=9))
    assert rows["top_k_classes"].to_pylist() == [["bee", "dog", "cat", "ant"]]


def test_top_k_is_a_stable_sort() -> None:
    random = np.random.default_rng(3)
    probabilities = random.integers(0, 5, (50, 4)).astype(np.float32)  # full of ties
    rows = rows_of(some_outcomes(probabilities.tolist(), ["ok"] * 50), table=TableConfig(top_k=3))
    expected = np.argsort(-probabilities, axis=1, kind="stable")[:, :3]
    assert rows["top_k_classes"].to_pylist() == [[CLASSES[index] for index in row] for row in expected]


def test_embeddings_and_carried_columns_go_along() -> None:
    embeddings: npt.NDArray[np.float32] = np.arange(6, dtype=np.float32).reshape(2, 3)
    carried = pa.table({"label": pa.array([7, None], pa.int8()), "note": ["x", "y"]})
    outcomes = some_outcomes([[1, 0, 0, 0]] * 2, ["empty", "ok"], embeddings=embeddings)
    rows = rows_of(outcomes, table=TableConfig(columns=("uri",), embeddings=True), carried=carried)
    assert rows.to_pylist() == [
        {"uri": "0", "status": "empty", "embedding": None, "label": 7, "note": "x"},
        {"uri": "1", "status": "ok", "embedding": [3, 4, 5], "label": None, "note": "y"},
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"error": []}, "outcomes must have 1 error, one for each image. Received: 0"),
        ({"probabilities": np.zeros((1, 3), np.float32)}, r"probabilities must be \[1, 4\]. Received: \[1, 3\]"),
        ({"status": ["broken"]}, "a status must be one of ok, .*, failed, other_file. Received: broken"),
    ],
)
def test_outcomes_that_do_not_fit_are_refused(wrong: dict[str, Any], message: str) -> None:
    outcomes = some_outcomes([[1, 0, 0, 0]], ["ok"])
    for name, value in wrong.items():
        setattr(outcomes, name, value)
    with pytest.raises(ValueError, match=message):
        rows_of(outcomes)


def test_wide_rows_have_the_probability_of_each_class() -> None:
    outcomes = some_outcomes([[0.125, 0.25, 0.5, 0.125], [float("nan")] * 4], ["ok", "failed"])
    rows = rows_of(outcomes, table=TableConfig(columns=("uri",), wide=True)).drop_columns(["uri", "status"])
    assert rows.to_pylist() == [
        {"probability_ant": 0.125, "probability_bee": 0.25, "probability_cat": 0.5, "probability_dog": 0.125},
        dict.fromkeys(rows.column_names),
    ]
    assert set(rows.schema.types) == {pa.float32()}


def test_the_classes_that_reach_their_thresholds_come_in_descending_order() -> None:
    probabilities: list[list[float]] = [
        [0.6, 0.25, 0.9, 0.1],
        [0] * 4,
        [0.1, 0.2, 0.1, 0.4],
        [0.5, 0.5, 0.3, 0.5],
        [float("nan"), 0.24, 0.5, 0.4],
    ]
    rows = rows_of(some_outcomes(probabilities, ["ok", "denied", "ok", "ok", "ok"]), table=MULTI_LABEL)
    assert rows["predicted_classes"].to_pylist() == [
        ["cat", "ant", "bee"],
        None,
        [],
        ["ant", "bee", "dog", "cat"],  # ties in the order of the classes; 0.3 in float32 reaches 0.3
        ["cat"],
    ]
    confidences = rows["confidences"].to_pylist()
    assert (confidences[1], confidences[2]) == (None, [])
    assert confidences[0] == pytest.approx([0.9, 0.6, 0.25])
    assert confidences[3] == pytest.approx([0.5, 0.5, 0.5, 0.3])
    assert rows["predicted_class"].to_pylist()[:4] == ["cat", None, "dog", "ant"]


def test_a_multi_label_shard_may_have_no_row_that_is_ok_or_no_class() -> None:
    for status, expected in ((["denied"] * 2, [None] * 2), (["ok"] * 2, [[]] * 2), ([], [])):
        rows = rows_of(some_outcomes([[0.1] * 4] * len(status), status), table=MULTI_LABEL)
        assert rows["predicted_classes"].to_pylist() == rows["confidences"].to_pylist() == expected


def test_half_precision_rounds_features_and_what_is_too_large_for_it_is_infinite() -> None:
    embeddings = np.array([[0.1, -65_504, 70_000], [float("nan")] * 3], np.float32)
    outcomes = some_outcomes([[1, 0, 0, 0]] * 2, ["ok", "failed"], embeddings=embeddings)
    rows = rows_of(outcomes, table=TableConfig(embeddings=True, embedding_type="float16"))
    assert rows["embedding"].to_pylist() == [[float(np.float16(0.1)), -65_504, float("inf")], None]


def test_embeddings_of_another_size_are_refused() -> None:
    outcomes = some_outcomes([[1, 0, 0, 0]], ["ok"], embeddings=np.zeros((1, 5), np.float32))
    with pytest.raises(ValueError, match=r"embeddings must be \[1, 3\]. Received: \[1, 5\]"):
        rows_of(outcomes, table=TableConfig(embeddings=True))


def test_embeddings_that_were_asked_for_are_given() -> None:
    with pytest.raises(ValueError, match=r"there are no values. Received: \['embedding'\]"):
        rows_of(some_outcomes([[1, 0, 0, 0]], ["ok"]), table=TableConfig(embeddings=True))


# --- reading ---------------------------------------------------------------------------------------------------------


def put_mark(root: str, files: list[str], *, number: int = 1, failed: bool = False) -> None:
    write_mark(root, Mark(number=number, files=tuple(files), rows=0, model_id="m", failed=failed))


def put_part(root: str, name: str, rows: pa.Table) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer, row_group_size=2)
    ANYWHERE.write_bytes(join(root, "table", name), buffer.getvalue().to_pybytes())


@pytest.fixture
def rows() -> pa.Table:
    outcomes = some_outcomes([[0.1, 0.7, 0.1, 0.1], [0] * 4, [0.5, 0.2, 0.2, 0.1]], ["ok", "denied", "ok"])
    return rows_of(outcomes, table=TableConfig(top_k=2))


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, rows: pa.Table) -> str:
    """A table of 3 + 2 rows, beside files that are not its own."""
    root = str(tmp_path / "a table") if request.param == "local" else str(request.getfixturevalue("s3"))
    put_part(root, "part-000001-00000.parquet", rows)
    put_part(root, "part-000001-00001.parquet", rows.slice(1))
    put_part(root, "part-000009-00000.parquet", rows)
    put_mark(root, ["part-000001-00000.parquet", "part-000001-00001.parquet"])
    return root


def test_the_files_that_the_mark_names_are_the_table(root: str, rows: pa.Table) -> None:
    table = read_predictions(root)
    assert table.equals(pa.concat_tables([rows, rows.slice(1)]))
    assert table.schema.equals(rows.schema)


def test_columns_come_in_the_order_asked_for(root: str) -> None:
    table = read_predictions(root, columns=["probabilities", "uri"])
    assert table.column_names == ["probabilities", "uri"]
    assert table["uri"].to_pylist() == ["0", "1", "2", "1", "2"]


def test_an_unknown_column_to_read_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match=r"has only the columns uri, status, .*Received: 'score'"):
        read_predictions(root, columns=["uri", "score"])


def test_batches_are_no_larger_than_a_row_group(root: str) -> None:
    batches = list(iter_predictions(root, columns=["uri"]))
    assert [batch.num_rows for batch in batches] == [2, 1, 2]
    assert pa.Table.from_batches(batches).equals(read_predictions(root, columns=["uri"]))


def test_a_table_that_was_judged_bad_is_read_like_any_other(root: str, rows: pa.Table) -> None:
    put_mark(root, ["part-000001-00001.parquet"], number=2, failed=True)
    assert read_predictions(root).equals(rows.slice(1))


def test_without_a_mark_there_is_no_table(root: str) -> None:
    ANYWHERE.delete(table_uri(root, 1, MARK))
    with pytest.raises(DataError, match=r"there is no prediction table.*Received: '.*'"):
        read_predictions(root)
    ANYWHERE.write_bytes(join(root, "_work/lock/000001"), b"{}")
    with pytest.raises(DataError, match="there is no prediction table"):
        next(iter_predictions(root))
    ANYWHERE.write_bytes(join(root, "_work/g000001/plan.json"), b"{}")
    with pytest.raises(DataError, match="is not finished: a scoring job is still running, or was stopped"):
        read_predictions(root)


def test_the_folder_of_the_files_leads_to_the_output(root: str) -> None:
    with pytest.raises(DataError, match=rf"did you mean {re.escape(root)}\?\)\. Received: '.*/table'"):
        read_predictions(join(root, "table"))


@pytest.mark.parametrize("data", [b"", b"[]", b'{"files": []}'])
def test_a_damaged_mark_is_named(tmp_path: Path, data: bytes) -> None:
    ANYWHERE.write_bytes(table_uri(str(tmp_path), 1, MARK), data)
    with pytest.raises(DataError, match=r"000001/mark.json is not a Mark"):
        read_predictions(tmp_path)


def test_a_file_that_is_not_there_or_damaged_is_named(tmp_path: Path) -> None:
    put_mark(str(tmp_path), ["part-000001-00000.parquet"])
    with pytest.raises(DataError, match=r"its mark names a file that does not exist: .*part-000001-00000"):
        read_predictions(tmp_path)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "part-000001-00000.parquet").write_bytes(b"PAR1 but not for long")
    with pytest.raises(DataError, match=r"part-000001-00000.parquet: not a readable Parquet file"):
        read_predictions(tmp_path)


def test_pages_that_are_damaged_are_named(tmp_path: Path, rows: pa.Table) -> None:
    put_mark(str(tmp_path), ["part"])
    put_part(str(tmp_path), "part", rows)
    data = bytearray((tmp_path / "table" / "part").read_bytes())
    data[4:200] = b"\xff" * 196
    (tmp_path / "table" / "part").write_bytes(data)
    with pytest.raises(DataError, match="part: not a readable Parquet file"):
        read_predictions(tmp_path)


def test_a_table_replaced_while_it_is_read_is_read_again_or_said(root: str, rows: pa.Table) -> None:
    def replace() -> None:
        put_part(root, "part-000002-00000.parquet", rows)
        put_mark(root, ["part-000002-00000.parquet"], number=2)
        ANYWHERE.delete(join(root, "table/part-000001-00001.parquet"))

    batches = iter_predictions(root)
    next(batches)
    replace()
    with pytest.raises(DataError, match="the table was replaced while it was read; read it again"):
        list(batches)
    ANYWHERE.delete(table_uri(root, 2, MARK))

    class Late(list[str]):
        """The columns to read; looked at by the reader between the mark and the files."""

        def __iter__(self) -> Iterator[str]:
            replace()
            return super().__iter__()

    put_part(root, "part-000001-00001.parquet", rows.slice(1))
    assert read_predictions(root, columns=Late(["uri"])).equals(rows.select(["uri"]))


def test_the_newest_mark_counts(root: str) -> None:
    put_mark(root, ["x"], number=17, failed=True)
    put_mark(root, ["y"], number=9)
    ANYWHERE.write_bytes(table_uri(root, 18, "summary.json"), b"a version that is not valid yet")
    found = read_mark(root)
    assert found is not None
    assert (found.number, found.copy_name, found.files) == (17, "_FAILED", ("x",))


# --- readers of others -----------------------------------------------------------------------------------------------

FEATURES_OF = [[0.5, -1.25, 2], None, [3, 4, 65_504]]
EXPECTED = [
    ("0", "ok", "bee", ["bee"], [0.75], ["bee", "ant"], 12),
    ("1", "denied", None, None, None, None, 12),
    ("2", "ok", "ant", [], [], ["ant", "bee"], 12),
]
COLUMNS = ["uri", "status", "predicted_class", "predicted_classes", "confidences", "top_k_classes", "width"]


@pytest.fixture(params=["float32", "float16"])
def embedding_type(request: pytest.FixtureRequest) -> FeatureType:
    chosen: FeatureType = request.param
    return chosen


@pytest.fixture
def folder(tmp_path: Path, embedding_type: FeatureType) -> Path:
    """An output with a table of two files, beside a file of the same columns that is no part of it."""
    outcomes = some_outcomes(
        [[0.1, 0.75, 0.1, 0.1], [0] * 4, [0.5, 0.2, 0.2, 0.1]],
        ["ok", "denied", "ok"],
        embeddings=np.array([features or [9, 9, 9] for features in FEATURES_OF], np.float32),
    )
    thresholds = dict.fromkeys(CLASSES, 0.6)
    table = TableConfig(top_k=2, wide=True, embeddings=True, embedding_type=embedding_type, thresholds=thresholds)
    rows = rows_of(outcomes, table=table)
    names = ["part-000001-00000.parquet", "part-000002-kept-00000.parquet"]
    put_part(str(tmp_path), names[0], rows.slice(0, 2))
    put_part(str(tmp_path), names[1], rows.slice(2))
    pq.write_table(rows, tmp_path / "manifest.parquet")
    put_mark(str(tmp_path), names)
    return tmp_path


def test_duckdb_reads_it(folder: Path) -> None:
    """Embeddings of either type are lists of FLOAT there."""
    duckdb = pytest.importorskip("duckdb", reason="needs DuckDB; runs where the extra `dev` is installed")
    query = f"select {', '.join(COLUMNS)} from '{folder}/table/*.parquet' order by uri"
    assert duckdb.sql(query).fetchall() == EXPECTED
    vectors = duckdb.sql(f"select embedding, typeof(embedding) from '{folder}/table/*.parquet' order by uri").fetchall()
    assert vectors == [(features, "FLOAT[]") for features in FEATURES_OF]
    times = duckdb.sql(f"select distinct epoch_us(scored_at), typeof(scored_at) from '{folder}/table/*.parquet'")
    assert times.fetchall() == [(round(NOW.timestamp() * 1e6), "TIMESTAMP WITH TIME ZONE")]


def test_polars_reads_it(folder: Path, embedding_type: FeatureType) -> None:
    polars = pytest.importorskip("polars", reason="needs Polars; runs where the extra `dev` is installed")
    table = polars.scan_parquet(folder / "table").collect().sort("uri")
    assert table.select(COLUMNS).rows() == EXPECTED
    assert table["scored_at"].to_list() == [NOW] * 3
    assert table["embedding"].to_list() == FEATURES_OF
    number = {"float16": polars.Float16, "float32": polars.Float32}[embedding_type]
    assert table.schema["embedding"] == polars.Array(number, FEATURES)
    assert table["probability_cat"].is_null().to_list() == [False, True, False]


def test_pandas_reads_it(folder: Path, embedding_type: FeatureType) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas; runs where Ray Data is installed with it")
    table = pandas.read_parquet(folder / "table", columns=[*COLUMNS, "confidence", "embedding"]).sort_values("uri")
    assert table["uri"].tolist() == ["0", "1", "2"]
    assert table["predicted_class"].isna().tolist() == [False, True, False]
    assert table["confidence"].tolist()[2] == 0.5
    vectors = table["embedding"].tolist()
    assert [vector if vector is None else vector.tolist() for vector in vectors] == FEATURES_OF
    assert vectors[0].dtype == embedding_type


def test_pyarrow_reads_it(folder: Path) -> None:
    table = pyarrow.dataset.dataset(folder / "table").to_table().sort_by("uri")
    assert [tuple(row.values()) for row in table.select(COLUMNS).to_pylist()] == EXPECTED
    assert table["embedding"].to_pylist() == FEATURES_OF
    assert table["probability_ant"].to_pylist() == [pytest.approx(0.1), None, 0.5]


@pytest.mark.slow
def test_daft_reads_it(folder: Path, embedding_type: FeatureType) -> None:
    daft = pytest.importorskip("daft", reason="needs Daft (pip install -e '.[readers]'); runs where it is installed")
    table = daft.read_parquet(str(folder / "table")).sort("uri")
    values = table.select(*COLUMNS, "embedding").to_pydict()
    assert list(zip(*(values[name] for name in COLUMNS), strict=True)) == EXPECTED
    assert values["embedding"] == FEATURES_OF
    number = {"float16": daft.DataType.float16(), "float32": daft.DataType.float32()}[embedding_type]
    assert table.schema()["embedding"].dtype == daft.DataType.fixed_size_list(number, FEATURES)


# Prints the rows as JSON, or what Spark says against them. A process of its own, because the Java machine ends with it.
IN_SPARK = """
import json, sys
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

settings = {"spark.ui.enabled": "false", "spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
spark = SparkSession.builder.master("local[1]").config(map=settings).getOrCreate()
try:
    rows = spark.read.parquet(sys.argv[1]).orderBy("uri").select(*sys.argv[2:]).collect()
    print(json.dumps([list(row) for row in rows]))
except AnalysisException as error:
    print(json.dumps(error.getCondition()))
spark.stop()
"""


@pytest.mark.slow
def test_spark_reads_it_unless_embeddings_are_float16(folder: Path, embedding_type: FeatureType) -> None:
    pytest.importorskip("pyspark", reason="needs PySpark (pip install -e '.[spark]'); runs where it is installed")
    if shutil.which("java") is None:
        pytest.skip("needs Java, which PySpark starts; runs where it is installed")
    arguments = [sys.executable, "-c", IN_SPARK, f"{folder}/table", *COLUMNS, "embedding"]
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    if embedding_type == "float16":
        assert read == "PARQUET_TYPE_ILLEGAL"
    else:
        assert read == [[*row, features] for row, features in zip(EXPECTED, FEATURES_OF, strict=True)]


def test_we_read_it(folder: Path) -> None:
    table = read_predictions(folder, columns=["embedding", "probability_ant"])
    assert table["embedding"].to_pylist() == FEATURES_OF
    assert table["probability_ant"].null_count == 1


def test_reading_loads_neither_ray_nor_a_framework(folder: Path) -> None:
    script = (
        "import sys, mnist_dist; assert 'pyarrow' not in sys.modules; table = mnist_dist.read_predictions(sys.argv[1]);"
        "print(table.num_rows, sorted({'ray', 'tensorflow', 'keras', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "3 []"
    assert mnist_dist.read_predictions is read_predictions
