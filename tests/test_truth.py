"""truth and tables: where labels and class names come from, and which class a label is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scored import MODEL, described_by, one_hot, plan_of, scored_rows, write_bundle_info, write_scored

from mnist_dist.errors import BundleError, ConfigError, DataError
from mnist_dist.evaluation.tables import NO_LABEL, UNKNOWN_LABEL, Classes, open_table
from mnist_dist.evaluation.truth import CarriedColumn, Folders, KnownLabels, find_truth, folder_names, label_file
from mnist_dist.score_config import TableConfig
from mnist_dist.scoring.commit import table_metadata
from mnist_dist.scoring.predictions import MARK, table_uri
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute

NAMES = ("ant", "bee", "cat")
URIS = ["/data/ant/1.png", "/data/bee/2.png", "/data/bee/3.png", "s3://bucket/cat/4.png"]


def some_rows(**other: Any) -> pa.Table:
    """Predictions of the classes 0, 1, 1 and 0 of three."""
    return scored_rows(URIS, one_hot([0, 1, 1, 0], 3), NAMES, **other)


def known_labels(path: str) -> KnownLabels:
    """The labels of a file, found by URI."""
    return KnownLabels(label_file(path))


def batch_of(**columns: Any) -> pa.RecordBatch:
    return pa.record_batch(columns)


# --- labels and classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels", "codes"),
    [
        (("ant", "bee"), ["bee", "ant", None, "cow"], [1, 0, NO_LABEL, UNKNOWN_LABEL]),
        (("ant", "bee"), ["1", "0", "2", "-1"], [1, 0, UNKNOWN_LABEL, UNKNOWN_LABEL]),
        (("3", "5", "10"), ["10", "3", "1"], [2, 0, UNKNOWN_LABEL]),  # names that are numbers are names
        (("000", "007"), ["007", "7", "0", "1"], [1, 1, 0, UNKNOWN_LABEL]),
        (("07", "007"), ["07", "007", "7"], [0, 1, UNKNOWN_LABEL]),
        (("1²", "²"), ["²", "1"], [1, 1]),  # a digit to Unicode, but no number
        ((), ["0", None], [UNKNOWN_LABEL, NO_LABEL]),
    ],
)
def test_a_label_is_a_name_or_a_number(names: tuple[str, ...], labels: list[str | None], codes: list[int]) -> None:
    assert Classes(names).codes(pa.array(labels, pa.string())).tolist() == codes


def test_the_stand_in_for_a_missing_name_is_no_label() -> None:
    assert Classes(("ant", "#1"), (1,)).codes(pa.array(["#1", "1"])).tolist() == [UNKNOWN_LABEL, 1]


def test_class_names_are_those_of_the_rows(tmp_path: Path) -> None:
    table = open_table(write_scored(tmp_path / "t", some_rows(), some_rows()), bundle=None)
    assert table.classes == Classes(("ant", "bee", "#2"), (2,))
    assert (table.rows, table.model_id, table.failed) == (8, MODEL, False)


def test_digits_that_were_never_predicted_are_digits(tmp_path: Path) -> None:
    rows = scored_rows(list("abc"), one_hot([0, 3, 4], 6), tuple("012345"))
    assert open_table(write_scored(tmp_path / "t", rows), bundle=None).classes == Classes(tuple("012345"))


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ("predicted_class", Classes(("ant", "bee"))),
        ("predicted_class probabilities", Classes(("ant", "bee", "#2"), (2,))),
        ("probabilities", Classes(("#0", "#1", "#2"), (0, 1, 2))),
        ("width", Classes(())),
    ],
)
def test_class_names_where_columns_were_left_out(tmp_path: Path, columns: str, classes: Classes) -> None:
    rows = some_rows(table=TableConfig(columns=(columns,)))
    assert open_table(write_scored(tmp_path / "t", rows), bundle=None).classes == classes


def test_a_bundle_names_the_classes(tmp_path: Path) -> None:
    table, bundle = write_scored(tmp_path / "t", some_rows()), write_bundle_info(tmp_path / "b", NAMES)
    assert open_table(table, bundle=bundle).classes == Classes(NAMES)


def test_the_metadata_of_the_files_names_the_classes(tmp_path: Path) -> None:
    rows = some_rows().replace_schema_metadata(table_metadata(described_by(NAMES), plan_of()))
    assert open_table(write_scored(tmp_path / "t", rows), bundle=None).classes == Classes(NAMES)


def test_another_bundle_or_none_is_refused(tmp_path: Path) -> None:
    table = write_scored(tmp_path / "t", some_rows())
    other = write_bundle_info(tmp_path / "b", ("x", "y", "z"), model_id="model-2")
    with pytest.raises(DataError, match=r"the model model-1 made the table. Received: bundle '.*b', model model-2"):
        open_table(table, bundle=other)
    with pytest.raises(BundleError, match=r"the bundle's folder does not exist; .* holds b/, t/\. Received: '.*gone'"):
        open_table(table, bundle=str(tmp_path / "gone"))


def test_a_table_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    table = write_scored(tmp_path / "t", some_rows())
    Path(table_uri(table, 1, MARK)).unlink()
    with pytest.raises(DataError, match="there is no prediction table"):
        open_table(table, bundle=None)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("/data/ant/1.png", "ant"),
        ("s3://bucket/train/two words/1.png", "two words"),
        ("/data/a.tar!ant/1.png", "ant"),
        ("/data/bee/a.tar.gz!x/ant/1.png", "ant"),
        ("/data/bee/a.tar!1.png", None),  # the folder of the archive is not that of the image
        ("/data/wow!/1.png", "wow!"),
        ("/data/A.ZIP!d!e/1.png", "d!e"),
        ("/data/line\nbreak/1\n.png", "line\nbreak"),
        ("1.png", None),
        ("/1.png", None),
    ],
)
def test_the_folder_of_an_image(uri: str, folder: str | None) -> None:
    assert folder_names(pa.array([uri])).to_pylist() == [folder]
    assert folder_names(pa.array(["/x!y/z", uri]).slice(1)).to_pylist() == [folder]


# --- which source ----------------------------------------------------------------------------------------------------


def test_the_first_source_that_there_is_is_taken(tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("uri,label\n/data/ant/1.png,bee\n")
    carried = pa.table({"label": pa.array([2, None, 0, 1], pa.int8())})
    table = open_table(write_scored(tmp_path / "t", some_rows(carried=carried)), bundle=None)
    assert isinstance(find_truth(table, labels=str(labels), label_column="label"), KnownLabels)
    column = find_truth(table, labels=None, label_column="label")
    assert isinstance(column, CarriedColumn)
    batch = next(table.batches(column.columns))
    assert column.labels(batch).to_pylist() == ["2", None, "0", "1"]
    with pytest.raises(ConfigError, match=r"has the columns uri, .*label. Received: label_column='truth'"):
        find_truth(table, labels=None, label_column="truth")
    plain = open_table(write_scored(tmp_path / "plain", some_rows()), bundle=None)
    folders = find_truth(plain, labels=None, label_column="label")
    assert isinstance(folders, Folders)
    assert folders.labels(next(plain.batches(folders.columns))).to_pylist() == ["ant", "bee", "bee", "cat"]


def test_a_column_of_other_things_is_refused(tmp_path: Path) -> None:
    rows = some_rows(carried=pa.table({"label": np.zeros(4)}))
    table = open_table(write_scored(tmp_path / "t", rows), bundle=None)
    with pytest.raises(DataError, match=r"'label' of the table holds class names .*, class numbers .*Received: double"):
        find_truth(table, labels=None, label_column="label")


def test_a_column_may_be_a_dictionary() -> None:
    words = pa.array(["ant", None, "bee"]).dictionary_encode()
    column = CarriedColumn(pa.schema([("label", words.type)]), "label")
    assert column.labels(batch_of(label=words)).to_pylist() == ["ant", None, "bee"]


# --- a file of labels ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["labels.csv", "labels.tsv", "labels.parquet"])
def labels_path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Labels that look like numbers, of images in another order than the table's."""
    path = tmp_path / request.param
    rows = [("s3://bucket/cat/4.png", "007"), ("/data/bee/2.png", "010"), ("/data/ant/1.png", None)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"label": [row[1] for row in rows], "uri": [row[0] for row in rows]}), path)
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [mark.join(("uri", "other", "label")), *(mark.join((uri, "x", label or "")) for uri, label in rows)]
        path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_labels_are_found_by_uri(labels_path: str) -> None:
    truth = known_labels(labels_path)
    assert len(truth) == 3
    assert truth.labels(batch_of(uri=[*URIS, "x"])).to_pylist() == [None, "010", None, "007", None]


def test_labels_on_s3_are_read(s3: str) -> None:
    ANYWHERE.write_bytes(f"{s3}/labels.csv", b"uri,label\na.png,ant\n/b.tar!x/b.png,bee\n")
    uris = [absolute("a.png"), "/b.tar!x/b.png"]  # a relative path is what scoring makes of it
    assert known_labels(f"{s3}/labels.csv").labels(batch_of(uri=uris)).to_pylist() == ["ant", "bee"]


def test_numbers_and_categories_in_parquet_are_labels(tmp_path: Path) -> None:
    for number, labels in enumerate((pa.array([2, 0]), pa.array(["2", "0"]).dictionary_encode())):
        path = str(tmp_path / f"{number}.parquet")
        pq.write_table(pa.table({"uri": ["/a", "/b"], "label": labels}), path)
        assert known_labels(path).labels(batch_of(uri=["/b", "/a"])).to_pylist() == ["0", "2"]


def test_an_empty_file_labels_nothing(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("uri,label\n")
    assert known_labels(str(tmp_path / "labels.csv")).labels(batch_of(uri=["/a"])).to_pylist() == [None]


def test_the_same_label_twice_is_one_and_two_labels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("uri,label\n/a,ant\n/b,bee\n/a,ant\n")
    assert known_labels(str(path)).labels(batch_of(uri=["/b", "/a"])).to_pylist() == ["bee", "ant"]
    path.write_text("uri,label\n/a,ant\n/b,bee\n/a,bee\n")
    with pytest.raises(
        DataError, match=r"an image has one label. Received: two labels, in rows 1 and 3.*: '/a' is 'ant' and '/a' is"
    ):
        known_labels(str(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "labels.csv",
            "uri,class\n/a,b\n",
            "there is no column 'label'; use --label-column class. Received: columns uri, class",
        ),
        ("labels.csv", "uri,label,label\n/a,b,c\n", "'label' occurs 2 times, so rename one"),
        ("labels.csv", "uri,label\n/a,b,c\n", "not a readable (csv|parquet) file"),
        ("labels.csv", "", "not a readable (csv|parquet) file"),
        ("labels.parquet", "uri,label\n", "not a readable (csv|parquet) file"),
        ("labels.txt", "/a ant\n", "labels is a .parquet, .csv or .tsv file, or labelled images. Received: "),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        known_labels(str(tmp_path / name))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no such file; .* is empty. Received: labels='.*gone.csv'"):
        known_labels(str(tmp_path / "gone.csv"))


def test_folders_that_are_numbers_are_no_class_numbers() -> None:
    classes = Classes(("cat", "dog"))
    labels = pa.array(["0", "1", "dog", None])
    assert classes.codes(labels).tolist() == [0, 1, 1, NO_LABEL]
    named = replace(classes, by_number=False)
    assert named.codes(labels).tolist() == [UNKNOWN_LABEL, UNKNOWN_LABEL, 1, NO_LABEL]
    digits = replace(Classes(("007", "008")), by_number=False)
    assert digits.codes(pa.array(["7", "008"])).tolist() == [0, 1]


def test_labels_that_look_like_nothing_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("uri,label\n/a,NA\n/b,null\n/c,\n")
    batch = pa.RecordBatch.from_pydict({"uri": ["/a", "/b", "/c"]})
    assert known_labels(str(path)).labels(batch).to_pylist() == ["NA", "null", None]


# --- the innermost folder that is a class, and labelled images ------------------------------------------------------


def test_the_innermost_folder_that_is_a_class_counts() -> None:
    uris = [
        "/data/cat/old/1.png",
        "/x/ant/2.png",
        "s3://b/bee/deep/er/3.png",
        "/a.tar!cat/x/4.png",
        "/n/o/5.png",
        "6.png",
    ]
    assert Folders(NAMES).labels(batch_of(uri=uris)).to_pylist() == ["cat", "ant", "bee", "cat", "o", None]


def test_labels_come_from_labelled_images_in_any_form(tmp_path: Path) -> None:
    features = {"label": {"names": ["bee", "ant"], "_type": "ClassLabel"}}
    table = pa.table({"image": [b"x", b"y"], "label": [1, 0]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    uris = [f"{tmp_path}/a.parquet#row={row}" for row in (0, 1)]
    scored = open_table(write_scored(tmp_path / "t", scored_rows(uris, one_hot([0, 1], 3), NAMES)), bundle=None)
    for options in (
        {"labels": str(tmp_path / "a.parquet")},
        {"labels": None, "scored": (str(tmp_path / "a.parquet"),)},
    ):
        truth = find_truth(scored, label_column="label", **options)
        assert truth.labels(batch_of(uri=uris)).to_pylist() == ["ant", "bee"]


def test_labels_of_unlabelled_images_are_no_labels(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    scored = open_table(write_scored(tmp_path / "t", some_rows()), bundle=None)
    truth = find_truth(scored, labels=None, label_column="label", scored=(str(tmp_path / "a.parquet"),))
    assert isinstance(truth, Folders)
    with pytest.raises(DataError, match="there is no column 'label'; use --label-column image"):
        find_truth(scored, labels=str(tmp_path / "a.parquet"), label_column="label")
