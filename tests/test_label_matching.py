"""matching: how given labels find their images, what is said where they do not, and labels of true and false."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Recorder
from scored import multi_label_rows, one_hot, scored_rows, write_scored

from mnist_dist.config import DataConfig
from mnist_dist.errors import ConfigError, DataError, LabelsUnmatched
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.evaluation.evaluate import evaluate
from mnist_dist.evaluation.matching import components, stem_of
from mnist_dist.evaluation.tables import UNKNOWN_LABEL, Classes
from mnist_dist.evaluation.truth import KnownLabels, label_file
from mnist_dist.sources.source import open_source

NAMES = ("bee", "cat")
URIS = ["s3://bucket/photos/cat/1.png", "s3://bucket/photos/cat/old/2.png", "s3://bucket/photos/bee/3.png"]
CODES = [1, 1, 0]


def write_table(folder: Path, *, uris: list[str] = URIS, codes: list[int] = CODES) -> str:
    return write_scored(folder, scored_rows(uris, one_hot(codes, 2), NAMES))


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Three images of two classes, predicted as their folders say."""
    return write_table(tmp_path / "t")


def run(table: str, labels: Path, **fields: Any) -> tuple[dict[str, Any], list[str]]:
    """What the job answers, and the lines that a person sees."""
    console = Recorder()
    return evaluate(EvaluateJob(predictions=table, labels=str(labels), **fields), console=console), console.lines


def csv_of(folder: Path, *lines: str, header: str = "uri,label", name: str = "labels.csv") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "lines"),
    [
        ("uri", [f"{URIS[0]},cat", f"{URIS[1]},cat", f"{URIS[2]},bee"]),
        ("path", ["cat/1.png,cat", "cat/old/2.png,cat", "bee/3.png,bee"]),
        ("path", ["./photos/cat/1.png,cat", "photos/cat/old/2.png,cat", "photos/bee/3.png,bee"]),
        ("path", ["/mnt/old/cat/1.png,cat", "/mnt/old/cat/old/2.png,cat", "/mnt/old/bee/3.png,bee"]),
        ("path", ["gs://b/x/cat/1.png,cat", "gs://b/x/cat/old/2.png,cat", "gs://b/x/bee/3.png,bee"]),
        ("name", ["x/1.png,cat", "2.png,cat", "s3://other/y/3.png,bee"]),
        ("stem", ["1,cat", "x/2.jpeg,cat", "3.PNG,bee"]),
    ],
)
def test_labels_find_their_images(tmp_path: Path, table: str, match: str, lines: list[str]) -> None:
    result, said = run(table, csv_of(tmp_path, *lines), match=match)
    assert (result["accuracy"], said[:-1]) == (1.0, [])


def test_the_labels_of_some_folders_match_by_path_no_image_of_others(tmp_path: Path) -> None:
    uris = ["/photos/cat/1.png", "/photos/bee/1.png"]
    table = write_table(tmp_path / "t", uris=uris, codes=[1, 1])
    result, said = run(table, csv_of(tmp_path, "/mnt/x/cat/1.png,cat"), match="path")
    assert result["accuracy"] == 1.0
    assert any(line.endswith("such as '/photos/bee/1.png'") for line in said)


def test_of_several_labels_the_longest_end_of_the_path_counts(tmp_path: Path) -> None:
    uris = ["/photos/a/cat/1.png", "/photos/b/cat/1.png"]
    table = write_table(tmp_path / "t", uris=uris, codes=[1, 0])
    result, _ = run(table, csv_of(tmp_path, "cat/1.png,bee", "a/cat/1.png,cat"), match="path")
    assert result["accuracy"] == 1.0


def test_members_of_archives_lie_in_them_as_in_folders(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t", uris=["/d/a.tar!cat/1.png", "/d/a.tar!cat/2.png", "/d/b.zip!3.png"])
    result, _ = run(table, csv_of(tmp_path, "cat/1.png,cat", "a.tar/cat/2.png,cat", "3.png,bee"), match="path")
    assert result["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://b/cat/1.png", ["b", "cat", "1.png"]),
        ("/data//cat/1.png", ["data", "cat", "1.png"]),
        ("../cat/./1.png", ["cat", "1.png"]),
        ("https://h/cat/1.png?v=2", ["h", "cat", "1.png"]),
        ("file:///data/1.png", ["data", "1.png"]),
        ("/d/a.tar!x/1.png", ["d", "a.tar", "x", "1.png"]),
        ("/", ["/"]),
    ],
)
def test_a_path_has_components(uri: str, parts: list[str]) -> None:
    assert components(uri) == parts


@pytest.mark.parametrize(
    ("name", "stem"),
    [("1.png", "1"), ("1.JPEG", "1"), ("scan.0001", "scan.0001"), ("a.b.tif", "a.b"), (".png", ".png")],
)
def test_only_the_suffix_of_an_image_is_no_part_of_the_stem(name: str, stem: str) -> None:
    assert stem_of(name) == stem


def test_labels_are_those_of_images_elsewhere(tmp_path: Path, folder_of_images: Path) -> None:
    uris = [f"s3://bucket/{name}/{index:02d}.png" for index in range(4) for name in ["ab"[index % 2]]]
    table = write_scored(tmp_path / "t", scored_rows(uris, one_hot([0, 1, 0, 1], 2), ("a", "b")))
    result, _ = run(table, folder_of_images, match="path")
    assert result["accuracy"] == 1.0


def test_labels_of_several_classes_are_matched_by_name(tmp_path: Path) -> None:
    scores = np.array([[0.9, 0.9], [0.1, 0.9]], np.float32)
    rows = multi_label_rows(["/x/1.png", "/x/2.png"], scores, dict.fromkeys(NAMES, 0.5))
    table = write_scored(tmp_path / "t", rows)
    result, _ = run(table, csv_of(tmp_path, "1.png,bee", "1.png,cat", "2.png,cat"), match="name")
    assert result["exact_match"] == 1.0
    with pytest.raises(DataError, match=r"by --match name these are the same image; --match path .*'a/1.png' is"):
        run(table, csv_of(tmp_path, "a/1.png,bee", "b/1.png,cat"), match="name")


@pytest.mark.parametrize(("match", "other"), [("name", "path"), ("stem", "name")])
def test_two_labels_of_one_name_are_refused_with_both(tmp_path: Path, table: str, match: str, other: str) -> None:
    labels = csv_of(tmp_path, "a/1.png,cat", "2.png,cat", "b/1.png,bee")
    words = rf"--match {match} these are the same image; --match {other}.*'a/1\.png' is 'cat' and 'b/1\.png' is 'bee'"
    with pytest.raises(DataError, match=words):
        run(table, labels, match=match)


def test_images_of_one_name_share_a_label_and_are_counted(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t", uris=["/a/1.png", "/b/1.png", "/b/2.png"], codes=[1, 1, 0])
    result, said = run(table, csv_of(tmp_path, "1.png,cat", "2.png,bee"), match="name")
    assert result["accuracy"] == 1.0
    assert "note: 1 images share the label of another, since their names are alike; see --match" in said


def test_a_rule_needs_labels() -> None:
    with pytest.raises(ConfigError, match=r"match needs labels\. Received: match='name', labels=None"):
        EvaluateJob(predictions="t", match="name")


# --- labels that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        (["cat/1.png,cat", "bee/3.png,bee"], "2 of 3 rows match with --match path"),
        (["q/1.png,cat", "2.png,cat", "z/3.png,bee"], "3 of 3 rows match with --match name"),
        (["1.png,cat", "3.png,bee"], "2 of 3 rows match with --match name"),
        (["1,cat", "2,cat", "3,bee"], "3 of 3 rows match with --match stem"),
        (
            ["x,cat"],
            "None matches with --match path, name, stem either; --uri-column may name another column: uri, label",
        ),
    ],
)
def test_labels_of_no_image_are_an_error_that_says_what_would_match(
    tmp_path: Path, table: str, lines: list[str], hint: str
) -> None:
    labels = csv_of(tmp_path, *lines)
    with pytest.raises(LabelsUnmatched) as caught:
        run(table, labels)
    assert caught.value.exit_code == 1
    assert not isinstance(caught.value, ConfigError)
    first = lines[0].partition(",")[0]
    assert str(caught.value) == (
        f"{labels}: none of its {len(lines)} labels belongs to an image of {table}. An image is {URIS[0]!r}, a label is"
        f" of {str(Path(first).absolute())!r}, written as {first!r}. {hint}. Received: labels={str(labels)!r},"
        " match='uri'"
    )
    assert not Path(f"{table}-evaluation").exists()


def test_a_rule_that_is_ambiguous_is_not_proposed(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t", uris=["/a/1.png", "/a/2.png", "/a/3.png"])
    with pytest.raises(LabelsUnmatched, match="None matches with --match path, name, stem either"):
        run(table, csv_of(tmp_path, "p/x/1.png,cat", "q/x/1.png,bee"))


def test_an_empty_file_of_labels_is_an_error(tmp_path: Path, table: str) -> None:
    with pytest.raises(LabelsUnmatched, match=r"there are no labels in it\. Received: labels="):
        run(table, csv_of(tmp_path))


def test_labels_that_are_all_empty_are_an_error(tmp_path: Path, table: str) -> None:
    with pytest.raises(LabelsUnmatched, match=r"the labels of all images are empty; --label-column names another"):
        run(table, csv_of(tmp_path, f"{URIS[0]},"))


def test_labels_that_are_no_class_are_an_error_that_suggests_one(tmp_path: Path, table: str) -> None:
    labels = csv_of(tmp_path, f"{URIS[0]},Cat", f"{URIS[2]},wasp")
    with pytest.raises(LabelsUnmatched) as caught:
        run(table, labels)
    assert "none of the labels of 2 images is a class of the model" in str(caught.value)
    assert "'Cat' (did you mean cat?), 'wasp'; the classes are 'bee', 'cat'" in str(caught.value)


def test_what_has_no_partner_is_counted_with_an_example(tmp_path: Path, table: str) -> None:
    result, said = run(table, csv_of(tmp_path, f"{URIS[0]},cat", "/gone/7.png,bee", "/gone/8.png,bee"))
    assert result["accuracy"] == 1.0
    assert f"note: 2 images have no label in {tmp_path}/labels.csv, such as {URIS[1]!r}" in said
    assert "note: 2 of 3 labels belong to no image, such as that of '/gone/7.png'" in said


# --- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffuri,label\n/a,cat\n",
        " uri , label\n/a , cat\n",
        "label,\ufeffuri\ncat,/a\n",
        "uri,label\n/a,cat \n",
        "uri\tlabel\n/a\tcat\n",
    ],
)
def test_a_mark_and_blanks_around_names_and_labels_do_not_matter(tmp_path: Path, text: str) -> None:
    path = tmp_path / ("labels.tsv" if "\t" in text else "labels.csv")
    path.write_text(text)
    truth = KnownLabels(label_file(str(path)))
    assert truth.labels(pa.record_batch({"uri": ["/a"]})).to_pylist() == ["cat"]


def test_labels_may_be_in_utf_16(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes("uri,label\n/ä,Käfer\n".encode("utf-16"))
    truth = KnownLabels(label_file(str(tmp_path / "labels.csv")))
    assert truth.labels(pa.record_batch({"uri": ["/ä"]})).to_pylist() == ["Käfer"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("filename,target", "no column 'uri' and no column 'label'; use --uri-column filename --label-column target."),
        ("URI,Label", "no column 'uri' and no column 'label'; use --uri-column URI --label-column Label."),
        ("Image Id,class", "no column 'uri' and no column 'label'; use --uri-column 'Image Id' --label-column class."),
        ("uri,kind", "no column 'label'; use --label-column kind. Received: columns uri, kind"),
        ("uri,a,b", "no column 'label'; name it by --label-column. Received: columns uri, a, b"),
        ("uri;label", "its columns seem to be separated by ';'; write it with commas as .csv, or with tabs as .tsv"),
        ("uri,label,label", "each column must have a name of its own; 'label' occurs 2 times, so rename one"),
    ],
)
def test_a_header_without_the_columns_says_what_to_type(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        label_file(str(csv_of(tmp_path, header=header)))
    assert message in str(caught.value)


def test_columns_are_named(tmp_path: Path, table: str) -> None:
    labels = csv_of(tmp_path, "1.png,x,cat", "2.png,x,cat", "3.png,x,bee", header="filename,label,target")
    result, _ = run(table, labels, uri_column="filename", label_column="target", match="name")
    assert result["accuracy"] == 1.0


def test_a_list_is_trained_on_by_its_own_columns(folder_of_images: Path) -> None:
    lines = [
        f"{path},{'pos' if path.parent.name == 'a' else 'neg'}" for path in sorted(folder_of_images.rglob("*.png"))
    ]
    path = csv_of(folder_of_images, *lines, header="filename,target", name="list.csv")
    source = open_source(DataConfig(data=(str(path),), uri_column="filename", label_column="target"))
    assert source.class_names == ("neg", "pos")
    with pytest.raises(DataError, match=r"no column 'uri'; use --uri-column filename\. Received: columns filename, t"):
        open_source(DataConfig(data=(str(path),)))
    with pytest.raises(DataError, match=r"no column 'targt'; use --label-column target\. Received: columns target"):
        open_source(DataConfig(data=(str(path),), uri_column="filename", label_column="targt"))


# --- true and false --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "codes"),
    [
        (("false", "true"), [1, 0]),
        (("True", "False"), [0, 1]),
        (("yes", "no"), [0, 1]),
        (("0", "1"), [1, 0]),
        (("benign", "malign"), [1, 0]),
        (("1", "2", "3"), [UNKNOWN_LABEL, UNKNOWN_LABEL]),
        (("ant", "bee", "cat"), [UNKNOWN_LABEL, UNKNOWN_LABEL]),
    ],
)
def test_true_and_false_are_classes_by_name_and_then_by_number(names: tuple[str, ...], codes: list[int]) -> None:
    for words in (["true", "false"], ["True", "False"], ["TRUE", "FALSE"]):
        assert Classes(names).codes(pa.array(words)).tolist() == codes


def test_the_folders_true_and_false_are_no_class_numbers() -> None:
    assert Classes(("ant", "bee"), by_number=False).codes(pa.array(["true"])).tolist() == [UNKNOWN_LABEL]


@pytest.mark.parametrize("form", ["parquet", "csv", "carried"])
def test_a_table_of_true_and_false_is_evaluated(tmp_path: Path, form: str) -> None:
    truth = [True, True, False]
    carried = pa.table({"label": truth}) if form == "carried" else None
    table = write_scored(tmp_path / "t", scored_rows(URIS, one_hot(CODES, 2), NAMES, carried=carried))
    labels = None if form == "carried" else str(tmp_path / f"labels.{form}")
    if form == "parquet":
        pq.write_table(pa.table({"uri": URIS, "label": truth}), labels)
    elif form == "csv":
        csv_of(tmp_path, *(f"{uri},{value}" for uri, value in zip(URIS, truth, strict=True)))
    result = evaluate(EvaluateJob(predictions=table, labels=labels), console=Recorder())
    assert result["accuracy"] == 1.0


@pytest.mark.parametrize("form", ["list", "images", "csv"])
def test_true_and_false_are_trained_on(tmp_path: Path, folder_of_images: Path, form: str) -> None:
    paths = sorted(folder_of_images.rglob("*.png"))
    truth = [path.parent.name == "a" for path in paths]
    place = tmp_path / ("l.csv" if form == "csv" else "l.parquet")
    if form == "csv":
        csv_of(tmp_path, *(f"{path},{value}" for path, value in zip(paths, truth, strict=True)), name="l.csv")
    elif form == "list":
        pq.write_table(pa.table({"uri": [str(path) for path in paths], "label": truth}), place)
    else:
        pq.write_table(pa.table({"image": [path.read_bytes() for path in paths], "label": truth}), place)
    source = open_source(DataConfig(data=(str(place),)))
    assert [name.lower() for name in source.class_names] == ["false", "true"]
    assert sum(source.table["label"].to_pylist()) == sum(truth)


def test_the_answer_names_the_labels(tmp_path: Path, table: str) -> None:
    labels = csv_of(tmp_path, "1.png,cat", "3.png,bee")
    run(table, labels, match="name")
    values = json.loads(Path(f"{table}-evaluation/metrics.json").read_text())
    assert (values["truth"], values["metrics"]["labelled"]) == (str(labels), 2)
