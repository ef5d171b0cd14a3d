"""labels: classes and splits that follow from the names of folders, files and inputs."""

import contextlib
import io
import json
import tarfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnist_dist.config import DataConfig
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.score_config import InputConfig
from mnist_dist.sources.archives import index_archive
from mnist_dist.sources.labels import class_names_of, common_folder, splits_of_names
from mnist_dist.sources.listing import list_inputs
from mnist_dist.sources.places import check_outside
from mnist_dist.sources.reading import plan_reads, read_in_order
from mnist_dist.sources.source import Source, open_source
from mnist_dist.sources.webdataset import member_labels
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join


def put(root: str, *names: str) -> None:
    for name in names:
        ANYWHERE.write_bytes(join(root, name), name.encode())


def tar(uri: str, files: Mapping[str, bytes] | Sequence[str]) -> str:
    buffer = io.BytesIO()
    named = files if isinstance(files, Mapping) else {name: name.encode() for name in files}
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in named.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    ANYWHERE.write_bytes(uri, buffer.getvalue())
    return uri


def seen(source: Source) -> dict[str, tuple[str, str | None]]:
    """Name of each image -> its class and split."""
    table = source.table
    columns = zip(*(table[name].to_pylist() for name in ("uri", "label", "split")), strict=True)
    return {
        uri.rpartition("/")[2].rpartition("!")[2]: (source.class_names[label], split) for uri, label, split in columns
    }


def opened(*inputs: str, **settings: Any) -> Source:
    return open_source(DataConfig(data=inputs, **settings))


# --- folders


def test_a_class_called_train_beside_others_is_a_class_even_if_it_holds_folders(tmp_path: Path) -> None:
    put(str(tmp_path), "train/red/1.png", "bus/2.png", "bus/old/3.png")
    assert seen(opened(str(tmp_path))) == {"1.png": ("train", None), "2.png": ("bus", None), "3.png": ("bus", None)}


def test_an_empty_folder_of_a_class_is_named(tmp_path: Path) -> None:
    put(str(tmp_path / "plain"), "a/1.png", "b/2.png", "c/note.txt")
    (tmp_path / "plain" / "d").mkdir()
    assert "no images in the folders c, d" in opened(str(tmp_path / "plain")).notes
    put(str(tmp_path / "split"), "train/a/1.png", "train/b/2.png", "test/a/3.png")
    (tmp_path / "split" / "test" / "b").mkdir()
    assert "no images in the folders test/b" in opened(str(tmp_path / "split")).notes


def test_classes_that_differ_in_normalisation_alone_are_shown_with_their_code_points(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    put(str(tmp_path), *(f"{name}/{number}.png" for number, name in enumerate(names)))
    with pytest.raises(DataError, match=r"Unicode normalisation.*Received: .*\(U\+0065 U\+0301\) and .*\(U\+00E9\)"):
        opened(str(tmp_path))


def test_numbers_are_classes_in_the_order_of_their_values(tmp_path: Path) -> None:
    put(str(tmp_path), "10/a.png", "9/b.png", "02/c.png", "x/d.png")
    assert opened(str(tmp_path)).class_names == ("02", "9", "10", "x")


# --- archives, files and inputs


def test_a_folder_around_everything_in_an_archive_is_ignored(tmp_path: Path) -> None:
    archive = tar(str(tmp_path / "x.tar"), ["set/png/a/1.png", "set/png/b/2.png", "set/README.md"])
    assert seen(opened(archive)) == {"1.png": ("a", None), "2.png": ("b", None)}
    archive = tar(str(tmp_path / "y.tar"), ["set/train/a/1.png", "set/train/b/2.png", "set/test/a/3.png"])
    assert seen(opened(archive)) == {"1.png": ("a", "train"), "2.png": ("b", "train"), "3.png": ("a", "test")}


def test_names_of_archives_and_inputs_are_splits(tmp_path: Path) -> None:
    for name in ("train-00.tar", "train-01.tar", "val.tar"):
        tar(str(tmp_path / "shards" / name), [f"a/{name}.png", f"b/{name}-2.png"])
    splits = {name: split for name, (_, split) in seen(opened(str(tmp_path / "shards"))).items()}
    assert splits == {
        **{"train-00.tar.png": "train", "train-00.tar-2.png": "train", "val.tar.png": "val", "val.tar-2.png": "val"},
        **{"train-01.tar.png": "train", "train-01.tar-2.png": "train"},
    }
    put(str(tmp_path / "train"), "a/1.png", "b/2.png")
    put(str(tmp_path / "test"), "a/3.png")
    assert seen(opened(str(tmp_path / "train"), str(tmp_path / "test"))) == {
        **{"1.png": ("a", "train"), "2.png": ("b", "train"), "3.png": ("a", "test")}
    }


def test_a_split_is_one_only_beside_train() -> None:
    assert splits_of_names([["test.tar"], ["b.tar"]]) == [None, None]
    assert splits_of_names([["Test-1.tar"], ["training", "b.tar"], ["dev_x.tar"]]) == ["test", "train", "val"]


def test_the_folders_of_a_list_begin_where_its_uris_part(tmp_path: Path) -> None:
    uris = [f"{tmp_path}/deep/cat/1.png", f"{tmp_path}/deep/dog/old/2.png"]
    (tmp_path / "list.txt").write_text("\n".join(uris))
    assert opened(str(tmp_path / "list.txt")).class_names == ("cat", "dog")
    assert common_folder(["s3://b/x/a/1", "s3://b/x/b/2"]) == "s3://b/x"


def test_a_list_has_labels_and_splits_in_columns(tmp_path: Path) -> None:
    rows = ["1.png,cat,train", "2.png,dog,Training", "3.png,cat,valid", "ftp://x/4.png,cat,test"]
    (tmp_path / "list.csv").write_text("\n".join(["uri,kind,split", *rows]))
    source = opened(str(tmp_path / "list.csv"), label_column="kind")
    found = list(zip(source.table["label"].to_pylist(), source.table["split"].to_pylist(), strict=True))
    assert sorted(found) == [(0, "test"), (0, "train"), (0, "val"), (1, "train")]
    assert source.table["status"].to_pylist().count("unsupported") == 1
    (tmp_path / "list.csv").write_text("uri,label,split\n1.png,cat,holdout\n")
    with pytest.raises(DataError, match=r"the column 'split' must hold train, .*Received: holdout"):
        opened(str(tmp_path / "list.csv"))
    (tmp_path / "list.csv").write_text("uri,label\n1.png,cat\n2.png,\n")
    with pytest.raises(DataError, match=r"column 'label' must have a value in every row\. Received: .* in row 1"):
        opened(str(tmp_path / "list.csv"))


def test_declared_names_are_the_classes_in_their_order() -> None:
    labels, splits = pa.chunked_array([["b", "a"]]), pa.chunked_array([[None, None]], pa.string())
    assert class_names_of(labels, splits, [("c", "b", "a")], name="x") == ("c", "b", "a")
    with pytest.raises(DataError, match=r"the classes are declared as c, b\. Received: a"):
        class_names_of(labels, splits, [("c", "b")], name="x")


# --- WebDataset


def test_an_image_without_its_label_is_left_out_where_others_have_one(tmp_path: Path) -> None:
    files = {"a/1.png": b"", "a/1.cls": b"cat", "a/2.png": b"", "a/3.seg.png": b"", "a/3.cls": b" dog\n", "x.txt": b"z"}
    source = opened(tar(str(tmp_path / "x.tar"), files))
    assert seen(source) == {"1.png": ("cat", None), "3.seg.png": ("dog", None)}
    assert "1 images without a class skipped" in source.notes


def test_the_number_of_a_class_wins_over_json_and_json_over_text(tmp_path: Path) -> None:
    one = {"1.png": b"", "1.cls": b"7", "1.json": b'{"label": "j"}', "1.txt": b"t", "2.png": b"", "2.cls": b"11"}
    assert opened(tar(str(tmp_path / "x.tar"), one)).class_names == ("7", "11")
    two = {
        "1.png": b"",
        "1.json": json.dumps({"class_name": "j"}).encode(),
        "1.txt": b"t",
        "2.png": b"",
        "2.json": b'{"cls": 3}',
    }
    assert opened(tar(str(tmp_path / "y.tar"), two)).class_names == ("3", "j")
    three = {"1.png": b"", "1.json": b"no json", "1.txt": b"t", "2.png": b"", "2.txt": b"u"}
    assert opened(tar(str(tmp_path / "z.tar"), three)).class_names == ("t", "u")


def test_captions_are_no_labels(tmp_path: Path) -> None:
    files = {"a/1.png": b"", "a/1.txt": b"a cat on a mat\nat night", "b/2.png": b"", "b/2.txt": b"x" * 200}
    assert opened(tar(str(tmp_path / "x.tar"), files)).class_names == ("a", "b")


# --- EMNIST


def write_idx(folder: Path, stem: str, images: Any, labels: Sequence[int]) -> None:
    folder.mkdir(exist_ok=True)
    shape = np.array(images.shape, ">u4").tobytes()
    (folder / f"{stem}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + shape + images.tobytes())
    count = np.array([len(labels)], ">u4").tobytes()
    (folder / f"{stem}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + count + bytes(labels))


@pytest.mark.parametrize(
    ("subset", "labels", "names"),
    [
        ("letters", [1, 2, 26], ["A", "B", "Z"]),
        ("byclass", [0, 10, 61], ["0", "A", "z"]),
        ("balanced", [9, 35, 46], ["9", "Z", "t"]),
        ("digits", [0, 5, 9], ["0", "5", "9"]),
    ],
)
def test_emnist_is_transposed_and_its_classes_are_named(
    tmp_path: Path, subset: str, labels: list[int], names: list[str]
) -> None:
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    for split in ("train", "test"):
        write_idx(tmp_path / "e", f"emnist-{subset}-{split}", images, labels)
    for name in ("emnist", f"emnist_{subset}"):
        source = opened(name, data_dir=str(tmp_path / "e"))
        assert [source.class_names[label] for label in source.table["label"].to_pylist()] == names * 2
        assert source.pixels is not None
        np.testing.assert_array_equal(source.pixels[0, ..., 0], images[0].T)


def test_a_folder_of_several_emnist_sets_asks_which(tmp_path: Path) -> None:
    images = np.zeros((1, 28, 28), np.uint8)
    for subset in ("letters", "digits"):
        write_idx(tmp_path / "e", f"emnist-{subset}-train", images, [1])
    with pytest.raises(DataError, match=r"name one of the subsets: emnist_digits, emnist_letters\. Received: files of"):
        opened("emnist", data_dir=str(tmp_path / "e"))
    with pytest.raises(DataError, match="emnist is not downloaded"):
        opened("emnist")


def test_several_named_data_sets_of_one_folder_keep_their_pixels(tmp_path: Path) -> None:
    for number, subset in enumerate(("letters", "digits"), start=1):
        for split in ("train", "test"):
            write_idx(tmp_path / "e", f"emnist-{subset}-{split}", np.full((2, 28, 28), number, np.uint8), [1, 2])
    inputs = InputConfig(input=("emnist_letters", "emnist_digits"), data_dir=str(tmp_path / "e"))
    table = list_inputs(inputs).table
    images = [np.asarray(Image.open(io.BytesIO(data))) for data in read(table)]
    assert [int(image[0, 0]) for image in images] == [1] * 4 + [2] * 4
    with pytest.raises(DataError, match="all data must name the same classes in the same order"):
        opened("emnist_letters", "emnist_digits", data_dir=str(tmp_path / "e"))


def read(table: pa.Table) -> list[bytes]:
    return [data for data in read_in_order(table, max_bytes=9_999) if isinstance(data, bytes)]


def test_a_label_of_a_list_counts_where_a_parquet_file_has_none_or_another(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": ["p", "q"]}), tmp_path / "b.parquet")
    lines = [f"{tmp_path}/a.parquet#row=1,cat", f"{tmp_path}/b.parquet,dog"]
    (tmp_path / "list.csv").write_text("\n".join(["uri,label", *lines]))
    source = opened(str(tmp_path / "list.csv"))
    classes = [source.class_names[label] for label in source.table["label"].to_pylist()]
    assert dict(zip(source.table["uri"].to_pylist(), classes, strict=True)) == {
        f"{tmp_path}/a.parquet#row=1": "cat",
        f"{tmp_path}/b.parquet#row=0": "dog",
        f"{tmp_path}/b.parquet#row=1": "dog",
    }


def test_parquet_files_without_images_beside_those_with_images_are_left_out(tmp_path: Path) -> None:
    for number in range(12):
        pq.write_table(pa.table({"x": [number]}), tmp_path / f"a-{number:02d}.parquet")
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": ["p", "q"]}), tmp_path / "data.parquet")
    source = opened(str(tmp_path))
    assert len(source.table) == 2
    assert any(f"12 Parquet files without images ({tmp_path}/a-00.parquet" in note for note in source.notes)


def test_members_whose_names_begin_with_the_folder_itself_are_not_hidden(tmp_path: Path) -> None:
    archive = tar(str(tmp_path / "x.tar"), ["./a/1.png", "./b/2.png", "./b/.3.png"])
    source = opened(archive)
    assert seen(source) == {"1.png": ("a", None), "2.png": ("b", None)}
    assert any(f"1 hidden ({archive}!./b/.3.png; name them in a list)" in note for note in source.notes)


def test_an_object_that_a_list_names_is_decoded_again_when_it_changed(s3: str, tmp_path: Path) -> None:
    put(s3, "a.png", "b.png")
    ANYWHERE.write_bytes(f"{s3}/l.csv", f"uri,label\n{s3}/a.png,x\n{s3}/b.png,y\n".encode())
    before = opened(f"{s3}/l.csv").table["etag"].to_pylist()
    assert all(before)
    put(s3, "a.png")
    ANYWHERE.write_bytes(f"{s3}/a.png", b"other")
    after = opened(f"{s3}/l.csv").table["etag"].to_pylist()
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True]


@pytest.mark.parametrize(
    ("uri", "folder", "refused"),
    [
        ("/d/photos", "/d/photos/runs", True),
        ("/d/photos/", "/d/photos", True),
        ("/d/photos", "/d/photos-runs", False),
        ("/d/**/*.png", "/d/runs", True),
        ("/d/*", "/d/runs", True),
        ("/d/*", "/d/runs/deep", True),
        ("/d/*.png", "/d/runs", False),
        ("s3://b/x", "s3://b/x/runs", True),
        ("digits", "digits/runs", False),
    ],
)
def test_what_is_written_may_not_lie_in_what_is_read(uri: str, folder: str, refused: bool) -> None:
    with pytest.raises(ConfigError, match="must lie outside of the input") if refused else contextlib.nullcontext():
        check_outside(folder, [uri], name="storage")


# --- what hostile inputs taught


def test_one_odd_line_of_a_list_moves_no_class(tmp_path: Path) -> None:
    put(str(tmp_path), "ds/cat/1.png", "ds/dog/2.png")
    tar(str(tmp_path / "flat.tar"), ["x.png"])
    lines = [
        f"{tmp_path}/ds/cat/1.png",
        f"{tmp_path}/ds/dog/2.png",
        "/nowhere/y.png",
        "http://x/y.png",
        "ftp://z/z.png",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines[:3]))
    source = opened(str(tmp_path / "list.txt"))
    assert {"cat", "dog"} <= {*source.class_names}
    assert seen(source)["1.png"] == ("cat", None)


def test_files_of_webdataset_examples_are_told_apart_by_their_whole_names(tmp_path: Path) -> None:
    files = {
        f"photo.{number}{suffix}": data
        for number, kind in ((1, b"cat"), (2, b"dog"))
        for suffix, data in ((".png", b""), (".cls", kind))
    }
    assert seen(opened(tar(str(tmp_path / "x.tar"), files))) == {
        "photo.1.png": ("cat", None),
        "photo.2.png": ("dog", None),
    }


@pytest.mark.parametrize(
    ("name", "data", "label"),
    [
        ("1.cls", b"\xef\xbb\xbfcat\0\n", "cat"),
        ("1.json", b'\xef\xbb\xbf{"label": " cat "}', "cat"),
        ("1.json", b'{"label": 3.0}', "3"),
        ("1.json", b'{"label": true}', "true"),
        ("1.json", b'{"label": "\\ud800"}', "\\ud800"),
        ("1.json", b"[" * 100_000, None),
        ("1.json", b'{"label": 1.5}', None),
        ("1.cls", b"", None),
    ],
)
def test_odd_files_of_labels_are_read_or_left(tmp_path: Path, name: str, data: bytes, label: str | None) -> None:
    archive = tar(str(tmp_path / "x.tar"), {"1.png": b"", name: data, "2.png": b"", f"2{name[1:]}": b'{"label": "z"}'})
    found = member_labels(index_archive(archive))
    assert found.get("1.png") == label


def test_a_text_beside_images_in_class_folders_is_no_label(tmp_path: Path) -> None:
    files = {"cat/1.png": b"", "cat/1.txt": b"a cat", "dog/2.png": b"", "dog/2.txt": b"a dog"}
    assert opened(tar(str(tmp_path / "x.tar"), files)).class_names == ("cat", "dog")


def test_the_same_classes_in_train_and_beside_it_are_refused(tmp_path: Path) -> None:
    put(str(tmp_path), "train/cat/1.png", "train/dog/2.png", "extra/cat/3.png")
    with pytest.raises(DataError, match=r"only val/ and test/ may stand beside train/\. Received: extra"):
        opened(str(tmp_path))


def test_globs_and_folders_that_all_share_give_splits(tmp_path: Path) -> None:
    put(str(tmp_path / "dev" / "s"), "train/a/1.png", "train/b/2.png", "test/a/3.png")
    root = str(tmp_path / "dev" / "s")
    splits = {"1.png": ("a", "train"), "2.png": ("b", "train"), "3.png": ("a", "test")}
    assert seen(opened(f"{root}/train/*/*.png", f"{root}/test/*/*.png")) == splits
    for name, members in (("train0.tar", ["a/1.png", "b/2.png"]), ("val0.tar", ["a/3.png"])):
        tar(f"{tmp_path}/dev/t/{name}", members)
    found = seen(opened(f"{tmp_path}/dev/t/train*.tar", f"{tmp_path}/dev/t/val*.tar"))
    assert found == {**splits, "3.png": ("a", "val")}


def test_folders_around_the_classes_are_ignored_for_all_archives_together(tmp_path: Path) -> None:
    archives = [
        tar(str(tmp_path / f"{name}.tar"), [f"{name}/x/1{name}.png", f"{name}/y/2{name}.png"])
        for name in ("cat", "dog")
    ]
    assert opened(*archives).class_names == ("cat", "dog")
    assert opened(str(tmp_path)).class_names == ("cat", "dog")


def test_a_flat_archive_lies_in_the_class_of_its_folder(tmp_path: Path) -> None:
    put(str(tmp_path), "cat/1.png")
    tar(str(tmp_path / "dog" / "x.tar"), ["2.png"])
    source = opened(str(tmp_path))
    assert seen(source) == {"1.png": ("cat", None), "2.png": ("dog", None)}
    assert not any("no images in the folders" in note for note in source.notes)


def test_an_image_with_two_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri,label\n/x/1.png,cat\n/x/2.png,dog\n/x/1.png,dog\n")
    with pytest.raises(DataError, match=r"an image has one label\. Received: 'cat' and 'dog' for '/x/1\.png'"):
        opened(str(tmp_path / "list.csv"))


def test_an_empty_value_of_a_list_leaves_that_of_the_file(tmp_path: Path) -> None:
    table = pa.table({"image": [b"x"] * 3, "label": ["p", "q", "p"], "split": ["train", "train", "test"]})
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"uri": [f"{tmp_path}/a.parquet"], "split": pa.array([None], pa.string())}), tmp_path / "l.parquet"
    )
    source = opened(str(tmp_path / "l.parquet"))
    assert source.table["split"].to_pylist() == ["train", "train", "test"]


def test_rows_that_a_file_declares_to_have_no_class_are_left_out(tmp_path: Path) -> None:
    metadata = {
        "huggingface": json.dumps({"info": {"features": {"label": {"names": ["b", "a"], "_type": "ClassLabel"}}}})
    }
    table = pa.table({"image": [b"x", b"y", b"z"], "label": [1, -1, 0]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    source = opened(str(tmp_path / "a.parquet"))
    assert source.table["label"].to_pylist() == [1, 0]
    assert "1 images without a class skipped" in source.notes
    carried = list_inputs(InputConfig(input=(str(tmp_path / "a.parquet"),), carry=("label",))).table["label"]
    assert carried.to_pylist() == ["a", None, "b"]


def test_more_pictures_than_rows_of_parquet_files_beside_them_are_asked_about(tmp_path: Path) -> None:
    put(str(tmp_path), "cat/1.png", "cat/2.png", "dog/3.png")
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": ["p", "q"]}), tmp_path / "dog" / "thumbs.parquet")
    with pytest.raises(
        DataError, match="holds 3 pictures and Parquet files of 2 images; name the pictures or the files"
    ):
        opened(str(tmp_path))


def test_a_carried_column_of_two_types_is_refused_by_name(tmp_path: Path) -> None:
    for name, values in (("a", [1, 2]), ("b", ["x", "y"])):
        pq.write_table(pa.table({"image": [b"x", b"y"], "id": values}), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"same type in all lists and files\. Received: id: int64 and string"):
        list_inputs(InputConfig(input=(str(tmp_path),), carry=("id",)))


def test_members_of_an_archive_are_opened_once_however_they_stand_in_a_list(tmp_path: Path) -> None:
    archive = tar(str(tmp_path / "x.tar"), [f"{number}.png" for number in range(6)])
    lines = [f"{archive}!{number}.png".encode() for number in range(6)]
    odd = [archive.encode() + b"!%d\xff.png" % number for number in range(6)]
    (tmp_path / "l.txt").write_bytes(b"\n".join(line for pair in zip(lines, odd, strict=True) for line in pair))
    table = list_inputs(InputConfig(input=(str(tmp_path / "l.txt"),))).table
    archives = table["archive"].to_pylist()
    assert [name is not None for name in archives].count(True) == 6
    assert archives[:6] == [archive] * 6


def test_rows_of_a_parquet_file_are_read_in_their_order_however_a_list_names_them(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"%d" % row for row in range(120)]}), tmp_path / "a.parquet", row_group_size=50)
    (tmp_path / "l.txt").write_text("\n".join(f"{tmp_path}/a.parquet#row={row}" for row in range(120)))
    table = list_inputs(InputConfig(input=(str(tmp_path / "l.txt"),))).table
    assert table["offset"].to_pylist() == list(range(120))
    assert len(plan_reads(table, max_bytes=99)) == 3
    assert read(table) == [b"%d" % row for row in range(120)]
