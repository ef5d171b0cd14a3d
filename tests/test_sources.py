"""sources: what there is to train on, in every layout, and what is refused."""

import gzip
import io
import json
import struct
import sys
import threading
import time
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnist_dist.config import DataConfig
from mnist_dist.errors import DataError, ImageError, ServiceError, StorageError
from mnist_dist.sources import image_table
from mnist_dist.sources.arrays import parse_idx
from mnist_dist.sources.image_table import COLUMNS, ImageRow
from mnist_dist.sources.listing import list_uris
from mnist_dist.sources.reading import read_in_order
from mnist_dist.sources.source import Source, image_spec, open_source
from mnist_dist.sources.threads import map_in_threads
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join


def png(value: int = 0, *, height: int = 6, width: int = 9, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), value).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def put_images(root: str, *names: str) -> None:
    for value, name in enumerate(names):
        ANYWHERE.write_bytes(join(root, name), png(value))


def columns(source: Source) -> tuple[list[str], list[str], list[str | None]]:
    root = source.name
    uris = [uri.removeprefix(f"{root}/") for uri in source.table["uri"].to_pylist()]
    return uris, [source.class_names[n] for n in source.table["label"].to_pylist()], source.table["split"].to_pylist()


def encoded(rows: pa.Table) -> list[bytes | ImageError]:
    return list(read_in_order(rows, max_bytes=10_000))


def rows_of(*uris: str) -> pa.Table:
    return image_table.table_of(map(ImageRow, uris))


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path / "images")


# --- arrays


def test_digits_are_embedded_and_scaled() -> None:
    source = open_source(DataConfig())
    assert source.pixels is not None
    assert source.pixels.shape == (1797, 8, 8, 1)
    assert source.pixels.dtype == np.uint8
    assert (source.pixels.min(), source.pixels.max()) == (0, 255)
    assert source.class_names == tuple("0123456789")
    assert source.table.column_names == [*COLUMNS.names, "label", "split"]
    assert source.table["split"].null_count == 1797
    assert source.table["label"].to_pylist()[:5] == [0, 1, 2, 3, 4]


def idx(array: np.ndarray[Any, Any]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def mnist_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (count, 5, 7)) for count in (12, 4))
    return {
        "train-images-idx3-ubyte": idx(train),
        "train-labels-idx1-ubyte": idx(np.arange(12) % 10),
        "t10k-images-idx3-ubyte": idx(test),
        "t10k-labels-idx1-ubyte": idx(np.arange(4) % 10),
    }


def write_mnist(
    root: str, *, dotted: bool = False, zipped: bool = False, replaced: dict[str, bytes] | None = None
) -> DataConfig:
    for name, data in mnist_files().items():
        data = (replaced or {}).get(name.split("-idx")[0].replace("-", "_"), data)
        name = name.replace("-idx", ".idx") if dotted else name
        ANYWHERE.write_bytes(join(root, name + ".gz" * zipped), gzip.compress(data) if zipped else data)
    return DataConfig(data=("mnist",), data_dir=root)


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_in_both_spellings(root: str, dotted: bool, zipped: bool) -> None:
    source = open_source(write_mnist(root, dotted=dotted, zipped=zipped))
    assert source.pixels is not None
    assert source.pixels.shape == (16, 5, 7, 1)
    assert source.pixels[:12].tobytes() == mnist_files()["train-images-idx3-ubyte"][16:]
    assert source.table["split"].to_pylist() == ["train"] * 12 + ["test"] * 4
    assert source.table["uri"].to_pylist()[11:13] == ["mnist/train/00011", "mnist/test/00000"]


def test_an_npz_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.integers(0, 256, (6, 4, 3), np.uint8), "y_train": np.arange(6)}
    arrays |= {"x_test": rng.integers(0, 256, (2, 4, 3), np.uint8), "y_test": np.array([9, 0])}
    np.savez(tmp_path / "f.npz", **arrays)  # type: ignore[arg-type]
    source = open_source(DataConfig(data=("fashion_mnist",), data_dir=str(tmp_path / "f.npz")))
    assert source.class_names[source.table["label"].to_pylist()[6]] == "Ankle boot"
    assert source.table["split"].to_pylist() == ["train"] * 6 + ["test"] * 2
    np.savez(tmp_path / "g.npz", x_train=arrays["x_train"])
    with pytest.raises(DataError, match=r"g\.npz lacks y_train, x_test, y_test\. Received: x_train"):
        open_source(DataConfig(data=("mnist",), data_dir=str(tmp_path / "g.npz")))
    (tmp_path / "h.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"h\.npz: not a readable \.npz"):
        open_source(DataConfig(data=("mnist",), data_dir=str(tmp_path / "h.npz")))


def npz(first: bytes) -> bytes:
    """An .npz of MNIST whose first member holds these bytes."""
    arrays, buffer = io.BytesIO(), io.BytesIO()
    np.save(arrays, np.zeros(6, np.uint8))
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x_train.npy", first)
        for key in ("y_train", "x_test", "y_test"):
            archive.writestr(f"{key}.npy", arrays.getvalue())
    return buffer.getvalue()


TOO_LONG = b"\x93NUMPY\1\0\x40\0{'descr':'|u1','fortran_order':False,'shape':(9999999999999,)} \n"


@pytest.mark.parametrize(
    ("data", "offset", "value", "reason"),
    [
        (npz(b""), 8, 1, "not a readable .npz of arrays: .*encrypted"),
        (npz(b""), 6, 255, "not a readable .npz of arrays: zip file version"),
        (npz(b""), 10, 97, "not a readable .npz of arrays: That compression method is not supported"),
        (npz(b"no array"), 4, 20, r"images must be uint8 \[N, H, W\]"),
        (npz(TOO_LONG), 4, 20, "not a readable .npz of arrays: Unable to allocate"),
    ],
    ids=["encrypted", "version", "method", "no array", "memory"],
)
def test_a_damaged_npz_is_one_error(tmp_path: Path, data: bytes, offset: int, value: int, reason: str) -> None:
    entry = data.index(b"PK\1\2") + offset
    (tmp_path / "a.npz").write_bytes(data[:entry] + bytes([value]) + data[entry + 1 :])
    with pytest.raises(DataError, match=reason):
        open_source(DataConfig(data=("mnist",), data_dir=str(tmp_path / "a.npz")))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_images": b"\0\0\x0d\x03" + bytes(99)}, r"starts with 0x00000803\. Received: 0x00000d03"),
        ({"train_images": b"\x89PNG"}, "starts with 0x00000803"),
        ({"train_images": b""}, "starts with 0x00000803. Received: 0x$"),
        ({"train_images": b"\0\0\x08\x03\0\0"}, "too short for the header of an idx file. Received: 6 bytes"),
        ({"train_images": mnist_files()["train-images-idx3-ubyte"][:-1]}, r"too short; its header \[12, 5, 7\]"),
        ({"t10k_labels": mnist_files()["t10k-labels-idx1-ubyte"] + b"\n"}, r"trailing bytes; its header \[4\]"),
        ({"t10k_labels": idx(np.arange(5))}, "has 4 images, but .*labels.* has 5 labels"),
        ({"train_labels": idx(np.arange(12))}, r"mnist train: labels must be 0 to 9\. Received: 0 to 11"),
        ({"t10k_images": idx(np.zeros((4, 6, 7)))}, r"must have one size\. Received: \[\(5, 7\), \(6, 7\)\]"),
        ({"train_images": idx(np.zeros((0, 5, 7))), "train_labels": idx(np.zeros(0))}, "at least one of at least 1 px"),
    ],
)
def test_a_corrupt_idx_file_is_refused(tmp_path: Path, replaced: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(write_mnist(str(tmp_path), replaced=replaced))


def test_a_cut_gzip_file_is_refused(tmp_path: Path) -> None:
    config = write_mnist(str(tmp_path), zipped=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: not a complete gzip file"):
        open_source(config)


def test_missing_idx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the files train-images-idx3-ubyte, train-images-idx3-ubyte\.gz"):
        open_source(DataConfig(data=("mnist",), data_dir=str(tmp_path / "nowhere")))


def test_an_idx_header_may_promise_too_much() -> None:
    with pytest.raises(DataError, match="x: too short"):
        parse_idx(bytes([0, 0, 8, 3]) + b"\xff" * 12, dimensions=3, place="x")


def test_keras_downloads_where_no_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_data() -> Any:
        raise Exception("URL fetch failure")

    pair = (np.zeros((3, 4, 4), np.uint8), np.array([0, 1, 2]))
    datasets = types.SimpleNamespace(
        mnist=types.SimpleNamespace(load_data=lambda: (pair, pair)),
        fashion_mnist=types.SimpleNamespace(load_data=load_data),
    )
    monkeypatch.setitem(sys.modules, "keras", types.SimpleNamespace(datasets=datasets))
    assert len(open_source(DataConfig(data=("mnist",))).table) == 6
    with pytest.raises(DataError, match=r"could not be downloaded: URL fetch failure.*four idx files"):
        open_source(DataConfig(data=("fashion_mnist",)))


def test_the_real_mnist_is_read(mnist_dir: Path) -> None:
    source = open_source(DataConfig(data=("mnist",), data_dir=str(mnist_dir)))
    assert source.pixels is not None
    assert source.pixels.shape == (70_000, 28, 28, 1)
    assert source.table["label"].to_pylist()[:6] == [5, 0, 4, 1, 9, 2]


# --- folders


def test_one_subfolder_is_one_class(root: str) -> None:
    put_images(root, "b/2.png", "a/x/1.PNG", "a/3.jpeg", "b/_4.png")
    ANYWHERE.write_bytes(join(root, "b/.DS_Store"), b"x")
    ANYWHERE.write_bytes(join(root, "a/.hidden/1.png"), b"x")
    ANYWHERE.write_bytes(join(root, "readme.txt"), b"x")
    ANYWHERE.write_bytes(join(root, "cover.png"), b"x")
    source = open_source(DataConfig(data=(root,)))
    assert columns(source) == (["a/3.jpeg", "a/x/1.PNG", "b/2.png", "b/_4.png"], ["a", "a", "b", "b"], [None] * 4)
    assert source.pixels is None
    by_class, left_out = source.notes
    assert by_class == "1 images without a class skipped"
    assert {part.partition(" (")[0] for part in left_out.removeprefix("left out: ").split("), ")} == {
        "1 .txt",
        "1 .ds_store",
        "1 hidden",
    }
    assert "--all-files" not in left_out  # which a training does not have
    assert all(source.table["etag"].to_pylist())
    assert source.table["size_bytes"].to_pylist()[0] == len(png(2))


def test_folders_of_splits_are_kept(root: str) -> None:
    put_images(root, "train/a/1.png", "train/b/1.png", "validation/a/1.png", "valid/b/2.png", "test/b/1.png")
    uris, classes, splits = columns(open_source(DataConfig(data=(root,))))
    assert splits == ["test", "train", "train", "val", "val"]
    assert classes == ["b", "a", "b", "b", "a"]
    assert uris[0] == "test/b/1.png"


def test_splits_may_be_called_training_and_testing(tmp_path: Path) -> None:
    put_images(str(tmp_path), "training/a/1.png", "training/b/1.png", "testing/a/1.png")
    source = open_source(DataConfig(data=(str(tmp_path),)))
    assert source.class_names == ("a", "b")
    assert source.table["split"].to_pylist() == ["test", "train", "train"]


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    put_images(str(tmp_path), "train/1.png", "bus/1.png", "test/2.png")
    assert open_source(DataConfig(data=(str(tmp_path),))).class_names == ("bus", "test", "train")


def test_a_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(str(tmp_path / "here"), "a/1.png", "b/1.png")
    monkeypatch.chdir(tmp_path)
    uris = open_source(DataConfig(data=("here",))).table["uri"].to_pylist()
    assert uris == [f"{tmp_path}/here/a/1.png", f"{tmp_path}/here/b/1.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], r"train, which has a, b\. Received: test/c"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "extra/b/1.png"], "only val/ and test/ may stand.*extra"),
        (["a/1.png", "a/2.png"], r"at least two classes\. Received: \('a',\)"),
        (
            ["1.png", "2.png"],
            "must be in one subfolder per class .*Received: 2 images without a class, no subfolders",
        ),
        (["a/1.txt", "b/2.csv"], r"image suffixes are \.jpg, .*1 \.txt \(.*1 \.csv \("),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    put_images(str(tmp_path), *names)
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(data=(str(tmp_path),)))


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set of this name \(did you mean mnist\?\).*Received: 'minst'"):
        open_source(DataConfig(data=("minst",)))
    with pytest.raises(DataError, match=r"no images were found; .*: nothing"):
        open_source(DataConfig(data=(str(tmp_path),)))
    with pytest.raises(StorageError, match="ftp://b"):
        open_source(DataConfig(data=("ftp://b",)))


def test_a_limit_is_the_same_sample_of_each_split(tmp_path: Path) -> None:
    names = [f"{split}/{kind}/{n}.png" for split in ("train", "test") for kind in "ab" for n in range(20)]
    put_images(str(tmp_path), *names)
    limited = [open_source(DataConfig(data=(str(tmp_path),), limit=limit)).table for limit in (5, 9, 1000)]
    assert [len(table) for table in limited] == [10, 18, 80]
    uris = [table["uri"].to_pylist() for table in limited]
    assert set(uris[0]) < set(uris[1])
    assert all(listed == sorted(listed) for listed in uris)
    digits = open_source(DataConfig(limit=33))
    assert digits.pixels is not None
    assert len(digits.table) == len(digits.pixels) == 33


# --- Parquet


def write_parquet(uri: str, rows: pa.Table, row_group_size: int = 3) -> None:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, row_group_size=row_group_size)
    ANYWHERE.write_bytes(uri, buffer.getvalue())


def rows(labels: list[Any], *, struct_column: bool = False, kind: pa.DataType | None = None) -> pa.Table:
    images: list[Any] = [png(value) for value in range(len(labels))]
    if struct_column:
        images = [{"bytes": image, "path": None} for image in images]
    return pa.table({"image": images, "label": pa.array(labels, kind), "extra": [0] * len(labels)})


@pytest.mark.parametrize("struct_column", [False, True])
def test_a_parquet_file_is_read_row_by_row(root: str, struct_column: bool) -> None:
    uri = join(root, "data.parquet")
    write_parquet(uri, rows(["cat", "dog", "ant", "cat", "dog", "ant", "ant"], struct_column=struct_column))
    source = open_source(DataConfig(data=(uri,)))
    assert source.class_names == ("ant", "cat", "dog")
    assert source.table["label"].to_pylist() == [1, 2, 0, 1, 2, 0, 0]
    uris = source.table["uri"].to_pylist()
    assert uris == [f"{uri}#row={row}" for row in range(7)]
    assert encoded(source.table.take([0, 1, 5, 2])) == [png(row) for row in (0, 1, 5, 2)]


def test_rows_far_apart_in_a_large_row_group_are_found(tmp_path: Path) -> None:
    uri = str(tmp_path / "data.parquet")
    table = pa.table({"image": [b"%d" % row for row in range(300)], "label": ["ab"[row % 2] for row in range(300)]})
    write_parquet(uri, table, row_group_size=170)
    wanted = [0, 63, 64, 65, 169, 170, 299]
    table = open_source(DataConfig(data=(uri,))).table
    assert encoded(table.take(wanted)) == [b"%d" % row for row in wanted]


def test_parquet_files_that_number_their_classes_differently_are_refused(tmp_path: Path) -> None:
    write_parquet(str(tmp_path / "train-0.parquet"), hugging_face(rows([0, 1]), ["cat", "dog"]))
    write_parquet(str(tmp_path / "test-0.parquet"), hugging_face(rows([0, 1]), ["dog", "cat"]))
    with pytest.raises(DataError, match=r"the same classes in the same order\. Received: \['cat', 'dog'\] and"):
        open_source(DataConfig(data=(str(tmp_path),)))


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        ([10, 9, 2], None, ("2", "9", "10")),
        ([10, 9, 2], pa.int8(), ("2", "9", "10")),
        (["b", "a", "b"], pa.large_string(), ("a", "b")),
        (["b", "a", "b"], pa.dictionary(pa.int32(), pa.string()), ("a", "b")),
    ],
)
def test_labels_are_names_or_numbers(tmp_path: Path, labels: list[Any], kind: Any, names: tuple[str, ...]) -> None:
    write_parquet(str(tmp_path / "x.parquet"), rows(labels, kind=kind))
    source = open_source(DataConfig(data=(str(tmp_path),)))
    assert source.class_names == names
    assert [names[label] for label in source.table["label"].to_pylist()] == [str(label) for label in labels]


def hugging_face(table: pa.Table, names: list[str]) -> pa.Table:
    metadata = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(metadata)})


def test_a_folder_as_hugging_face_writes_it_has_splits_and_names(root: str) -> None:
    for name, labels in (("train-00000-of-00002", [0, 2]), ("train-00001-of-00002", [1, 1, 0]), ("test-0", [2, 1])):
        table = hugging_face(rows(labels, struct_column=True), ["cat", "ant", "bee"])
        write_parquet(join(root, f"data/{name}.parquet"), table)
    source = open_source(DataConfig(data=(root,)))
    assert source.class_names == ("cat", "ant", "bee")
    assert source.table["label"].to_pylist() == [2, 1, 0, 2, 1, 1, 0]
    assert source.table["split"].to_pylist() == ["test"] * 2 + ["train"] * 5


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"img": [b"x"], "y": [0]}), r"no column 'label'; .*Received: columns img, y"),
        (pa.table({"image": [1.5], "label": [0]}), r"no images were found; .*1 Parquet files without images"),
        (pa.table({"image": [b"x"], "label": [0.5]}), "column 'label' must hold class names.*Received: double"),
        (
            pa.table({"image": [b"x"] * 2, "label": ["a", None]}),
            r"'label' must have a value in every row\. Received: None in row 1,",
        ),
        (rows([]).set_column(1, "label", pa.array([], pa.int64())).cast(rows([0]).schema), "no images were found"),
        (hugging_face(rows([0, 3]), ["a", "b"]), r"labels must be 0 to 1, .*Received: 0 to 3"),
        (rows(["a", "a"]), "at least two classes"),
    ],
)
def test_a_parquet_file_of_another_layout_is_refused(tmp_path: Path, table: pa.Table, message: str) -> None:
    write_parquet(str(tmp_path / "x.parquet"), table)
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(data=(str(tmp_path),)))


def test_a_corrupt_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"no images were found; .*1 Parquet files without images"):
        open_source(DataConfig(data=(str(tmp_path),)))
    with pytest.raises(DataError, match=r"x\.parquet: not a readable parquet file"):
        open_source(DataConfig(data=(str(tmp_path / "x.parquet"),)))


def test_rows_that_cannot_be_read_are_values(tmp_path: Path) -> None:
    uri = str(tmp_path / "x.parquet")
    write_parquet(uri, pa.table({"image": [b"x", None, b"", b"y"], "label": list("abab")}))
    (tmp_path / "bad.parquet").write_bytes(b"garbage")
    asked = [f"{uri}#row={row}" for row in range(4)]
    asked += [f"{tmp_path}/no.parquet#row=0", f"{tmp_path}/bad.parquet#row=0", f"{uri}#row=9"]
    rows = list_uris(asked)
    results = [r.status if isinstance(r, ImageError) else r for r in encoded(rows)]
    expected = [b"x", "empty", "empty", b"y", "missing", "unreadable", "missing"]
    assert dict(zip(rows["uri"].to_pylist(), results, strict=True)) == dict(zip(asked, expected, strict=True))


# --- reading


def test_files_that_cannot_be_read_are_values_in_order(root: str) -> None:
    ANYWHERE.write_bytes(join(root, "a"), b"1")
    ANYWHERE.write_bytes(join(root, "b"), b"")
    uris = [join(root, name) for name in ("a", "missing", "b", "a")]
    results = [r.status if isinstance(r, ImageError) else r for r in encoded(rows_of(*uris))]
    assert results == [b"1", "missing", "empty", b"1"]


def test_a_file_without_permission_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(uri: str, *, max_bytes: int) -> bytes:
        raise PermissionError(13, "access denied", uri)

    monkeypatch.setattr(ANYWHERE, "read_object", read)  # not by a file's mode: root may read everything
    (result,) = encoded(rows_of("s3://b/k"))
    assert isinstance(result, ImageError)
    assert (result.status, result.message) == ("denied", "access denied")


def test_a_folder_in_place_of_a_file_is_unsupported(tmp_path: Path) -> None:
    (result,) = encoded(rows_of(str(tmp_path)))
    assert isinstance(result, ImageError)
    assert result.status == "unsupported"


def test_no_connection_is_not_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(uri: str, *, max_bytes: int) -> bytes:
        raise ServiceError("no connection")

    monkeypatch.setattr(ANYWHERE, "read_object", read)
    with pytest.raises(ServiceError, match="no connection"):
        encoded(rows_of("a", "b"))


def test_threads_keep_the_order_and_never_run_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(50):
            taken.append(item)
            yield item

    seen = 0
    for position, result in enumerate(map_in_threads(lambda item: item * 2, items(), threads=3, ahead=5)):
        assert result == position * 2
        assert len(taken) <= position + 6
        seen += 1
    assert seen == 50


def test_an_abandoned_map_stops_its_threads() -> None:
    before = threading.active_count()
    results = map_in_threads(lambda item: item, range(1000), threads=3, ahead=5)
    next(results)
    results.close()  # type: ignore[attr-defined]
    while threading.active_count() > before:  # they end by themselves; nobody joins them
        time.sleep(0.01)


# --- the size of the images


def spec_of(data: str, *, backbone: int = 32, scratch: bool = False, **config: Any) -> tuple[int, int, int]:
    parsed = DataConfig(data=(data,), **config)
    spec = image_spec(open_source(parsed), backbone_size_px=backbone, scratch_size=scratch, config=parsed)
    return spec.height_px, spec.width_px, spec.channels


def test_a_generator_that_nobody_closed_joins_no_thread() -> None:
    """As the garbage collector ends it, in whichever thread, under whichever lock."""
    started, release = threading.Event(), threading.Event()

    def wait(number: int) -> int:
        if number:
            started.set()
            release.wait()
        return number

    results = map_in_threads(wait, range(3), threads=2, ahead=1)
    assert next(iter(results)) == 0
    started.wait()
    del results  # ends it while a call is under way
    release.set()


def test_arrays_keep_their_size_where_the_backbone_is_not_smaller() -> None:
    assert spec_of("digits") == (8, 8, 1)
    assert spec_of("digits", channels="3") == (8, 8, 3)
    assert spec_of("digits", backbone=7) == (7, 7, 1)
    assert spec_of("digits", backbone=7, scratch=True) == (8, 8, 1)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((40, 64), {"backbone": 96}, (40, 64, 3)),
        ((40, 64), {"backbone": 96, "resize": "crop"}, (96, 96, 3)),  # the device would stretch it
        ((64, 64), {"backbone": 96, "resize": "crop"}, (64, 64, 3)),
        ((40, 64), {"backbone": 48}, (48, 48, 3)),
        ((40, 64), {"backbone": 48, "scratch": True}, (40, 64, 3)),
        ((40, 65), {"backbone": 96, "scratch": True}, (96, 96, 3)),
        ((1, 1), {"channels": "1"}, (1, 1, 1)),
    ],
)
def test_small_uniform_images_keep_their_size(
    tmp_path: Path, size: tuple[int, int], options: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        ANYWHERE.write_bytes(str(tmp_path / name), png(height=size[0], width=size[1]))
    (tmp_path / "b" / "2.png").write_bytes(b"unreadable")
    assert spec_of(str(tmp_path), **options) == expected


def test_images_of_several_sizes_and_modes_get_the_backbones(tmp_path: Path) -> None:
    ANYWHERE.write_bytes(str(tmp_path / "a/1.png"), png(mode="L"))
    ANYWHERE.write_bytes(str(tmp_path / "b/1.png"), png(mode="LA"))
    assert spec_of(str(tmp_path)) == (6, 9, 1)
    ANYWHERE.write_bytes(str(tmp_path / "b/2.png"), png(height=7))
    assert spec_of(str(tmp_path), backbone=40) == (40, 40, 3)


def test_a_source_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        ANYWHERE.write_bytes(str(tmp_path / name), b"")
    with pytest.raises(DataError, match=r"none of 2 probed images can be read\. Received: empty"):
        spec_of(str(tmp_path))
