"""label_sets: images that have any number of classes, from lists and Parquet files to numbers and splits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Recorder

from mnist_dist.config import DataConfig
from mnist_dist.data.splits import assign_splits
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.on_ray.data.prepare import open_data
from mnist_dist.sources.label_sets import members, rarest_classes
from mnist_dist.sources.source import Source, open_source

NAMES = ("a.png", "b.png", "c.png", "d.png")


def opened(data: Path, **settings: Any) -> Source:
    return open_source(DataConfig(data=(str(data),), multi_label=True, **settings))


def sets_of(source: Source) -> dict[str, tuple[str, ...]]:
    """The classes of each image by its file name, or by the number of its row."""
    return {
        uri.rpartition("/")[2].rpartition("=")[2]: tuple(source.class_names[i] for i in source.label_sets[code])
        for uri, code in zip(source.table["uri"].to_pylist(), source.table["label"].to_pylist(), strict=True)
    }


def parquet(folder: Path, *, metadata: dict[str, Any] | None = None, **columns: Any) -> Path:
    """A Parquet file of images, whose bytes nobody reads here."""
    count = len(next(iter(columns.values())))
    table = pa.table({"image": pa.array([b"image"] * count, pa.binary()), **columns})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    path = folder / "images.parquet"
    pq.write_table(table, path)
    return path


def csv(folder: Path, text: str) -> Path:
    for name in NAMES:
        (folder / name).write_bytes(b"image")
    (folder / "list.csv").write_text(text.replace("@", f"{folder}/"))
    return folder / "list.csv"


def test_lists_of_names_in_parquet(tmp_path: Path) -> None:
    source = opened(parquet(tmp_path, label=pa.array([["dog", "cat"], [], ["dog"], ["cat", "dog", "cat"]])))
    assert source.class_names == ("cat", "dog")
    assert sets_of(source) == {"0": ("cat", "dog"), "1": (), "2": ("dog",), "3": ("cat", "dog")}
    assert source.label_sets == ((), (0, 1), (1,))  # Each set once, in an order that follows from the content.


def test_lists_of_class_numbers_have_the_names_that_the_file_declares(tmp_path: Path) -> None:
    feature = {"feature": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}, "_type": "List"}
    source = opened(parquet(tmp_path, metadata={"label": feature}, label=pa.array([[2, 0], [], [0]])))
    assert source.class_names == ("ant", "bee", "cat")
    assert sets_of(source) == {"0": ("ant", "cat"), "1": (), "2": ("ant",)}


def test_class_numbers_without_names_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    source = opened(parquet(tmp_path, label=pa.array([[10, 9], [2]])))
    assert source.class_names == ("2", "9", "10")
    assert sets_of(source)["0"] == ("9", "10")


def test_a_number_without_a_declared_name_is_an_error(tmp_path: Path) -> None:
    feature = {"feature": {"names": ["ant", "bee"]}}
    with pytest.raises(DataError, match=r"labels must be 0 to 1, as the file names 2 classes\. Received: 0 to 7"):
        opened(parquet(tmp_path, metadata={"label": feature}, label=pa.array([[0, 7]])))


def test_texts_with_a_separator(tmp_path: Path) -> None:
    path = csv(tmp_path, "uri,label\n@a.png,dog; cat\n@b.png,\n@c.png,dog\n@d.png,cat;;cat\n")
    found = sets_of(opened(path, label_separator=";"))
    assert found == {"a.png": ("cat", "dog"), "b.png": (), "c.png": ("dog",), "d.png": ("cat",)}


@pytest.mark.parametrize(("yes", "no"), [("1", "0"), ("True", "false"), ("1.0", "0.0"), ("yes", "no")])
def test_a_column_for_each_class(tmp_path: Path, yes: str, no: str) -> None:
    rows = [(yes, no, yes), (no, no, no), (no, yes, no), (yes, yes, yes)]
    lines = "".join(f"@{name},{','.join(row)}\n" for name, row in zip(NAMES, rows, strict=True))
    source = opened(csv(tmp_path, f"uri,dog,cat,a bird\n{lines}"), class_columns=("dog", "cat", "a bird"))
    assert source.class_names == ("dog", "cat", "a bird")  # As they were named, not sorted.
    assert sets_of(source) == {
        "a.png": ("dog", "a bird"),
        "b.png": (),
        "c.png": ("cat",),
        "d.png": ("dog", "cat", "a bird"),
    }


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int64(), pa.float32()])
def test_typed_columns_of_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"dog": pa.array([1, 0, 1]).cast(kind), "cat": pa.array([1, 1, 0]).cast(kind)}
    assert sets_of(opened(parquet(tmp_path, **columns), class_columns=("cat", "dog"))) == {
        "0": ("cat", "dog"),
        "1": ("cat",),
        "2": ("dog",),
    }


def test_a_folder_gives_sets_of_one(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"image")
    assert sets_of(opened(tmp_path)) == {"1.png": ("dog",), "2.png": ("cat",)}


@pytest.mark.parametrize(
    ("columns", "settings", "words"),
    [
        ({"label": [["a"], None]}, {}, r"'label' must have a value in every row.*Received: null in row 1"),
        ({"label": [[0.5], [1.5]]}, {}, r"holds class names.*or lists of these\. Received: list<"),
        ({"dog": [1, 2], "cat": [0, 1]}, {"class_columns": ("dog", "cat")}, r"'dog' must say whether.*Received: 2"),
        ({"dog": [1, None], "cat": [0, 1]}, {"class_columns": ("dog", "cat")}, r"'dog' must say.*Received: None"),
        ({"dog": [1, 0]}, {"class_columns": ("dog", "cat")}, r"no column 'cat'"),
        ({"label": [["a"], ["a"]]}, {}, r"at least two classes"),
    ],
)
def test_what_is_no_set_of_classes_is_an_error(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        opened(parquet(tmp_path, **columns), **settings)


def test_a_separator_needs_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no text that label_separator splits"):
        opened(parquet(tmp_path, label=pa.array([["a"], ["b"]])), label_separator=";")


def test_lists_without_the_flag_name_it(tmp_path: Path) -> None:
    path = parquet(tmp_path, label=pa.array([["a"], ["b"]]))
    with pytest.raises(DataError, match=r"with --multi-label it may hold lists"):
        open_source(DataConfig(data=(str(path),)))


def test_a_class_that_only_validation_has_is_an_error(tmp_path: Path) -> None:
    path = parquet(tmp_path, label=pa.array([["a"], ["b"], ["a", "c"]]), split=pa.array(["train", "train", "val"]))
    with pytest.raises(DataError, match=r"every class must occur in train.*Received: val/c"):
        opened(path)


def test_groups_are_counted_for_each_class_and_not_for_each_set(tmp_path: Path) -> None:
    """Each set is in one group alone, each class in several."""
    sets = [["a"], ["b"], ["a", "b"], ["a", "c"]]
    path = parquet(tmp_path, label=pa.array(sets), patient=pa.array(["p", "q", "r", "s"]))
    data = DataConfig(data=(str(path),), multi_label=True, group_by="patient")
    assert open_data(data, console=Recorder()).label_sets == ((0,), (0, 1), (0, 2), (1,))
    parquet(tmp_path, label=pa.array([["a"], ["b"]]), patient=pa.array(["p", "q"]))
    with pytest.raises(DataError, match="a class at least two to be in two of them"):
        open_data(data, console=Recorder())


def made_sets(count: int = 3_000, classes: int = 7) -> tuple[np.ndarray, tuple[tuple[int, ...], ...], np.ndarray]:
    """Codes, sets and membership of images whose classes have frequencies from a half to a hundredth."""
    random = np.random.default_rng(0)
    has = random.random((count, classes)) < np.geomspace(0.5, 0.01, classes)
    sets = sorted({tuple(np.flatnonzero(row).tolist()) for row in has})
    codes = np.array([sets.index(tuple(np.flatnonzero(row).tolist())) for row in has], np.int32)
    return codes, tuple(sets), has


def test_the_rarest_class_of_each_image() -> None:
    codes, sets, has = made_sets()
    counts = has.sum(axis=0)
    expected = [min(np.flatnonzero(row), key=lambda k: counts[k]) if row.any() else 7 for row in has]
    assert rarest_classes(codes, sets, 7).tolist() == expected
    assert (members(sets, 7)[codes] == has).all()


def test_every_split_has_its_share_of_the_rarest_classes() -> None:
    codes, sets, _ = made_sets()
    splits = assign_splits(
        labels=codes,
        given=[None] * len(codes),
        digests=np.array([f"{i * 7919 % len(codes):064x}" for i in range(len(codes))], "S"),
        readable=np.ones(len(codes), np.bool_),
        uris=[str(i) for i in range(len(codes))],
        class_names=[str(k) for k in range(7)],
        config=DataConfig(test_fraction=0.2, validation_fraction=0.2),
        label_sets=sets,
    )
    rarest = rarest_classes(codes, sets, 7)
    for rows in (splits.test, splits.val):
        held_out, all_images = np.bincount(rarest[rows], minlength=8), np.bincount(rarest, minlength=8)
        assert np.abs(held_out - 0.2 * all_images).max() <= 1
    assert len({*splits.train, *splits.val, *splits.test}) == len(codes)
