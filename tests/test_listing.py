"""inputs: what each name stands for, on disk and on S3, and what becomes of everything that is found there."""

import dataclasses
import datetime
import decimal
import errno
import glob
import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnist_dist.errors import ConfigError, DataError, ImageError, ServiceError, StorageError
from mnist_dist.images.formats import IMAGE_SUFFIXES
from mnist_dist.score_config import InputConfig
from mnist_dist.scoring.selection import RESERVED
from mnist_dist.sources import arrays, image_table
from mnist_dist.sources.choice import BESIDE, HIDDEN, HIDDEN_PARQUET, NO_IMAGES, NO_SUFFIX
from mnist_dist.sources.image_table import BATCH_ROWS, COLUMNS, ImageRow
from mnist_dist.sources.listing import Listing, list_inputs
from mnist_dist.sources.reading import read_in_order
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry
from mnist_dist.store.uris import join

MANY = 1_000_000
MAX_GROWTH_MIB = 700


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path / "images")


def put(root: str, *names: str) -> None:
    """Files of 3, 4, 5, ... bytes."""
    for size, name in enumerate(names, start=3):
        ANYWHERE.write_bytes(join(root, name), bytes(size))


def tar_of(*names: str) -> bytes:
    """Members of 30, 31, 32, ... bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for size, name in enumerate(names, start=30):
            info = tarfile.TarInfo(name)
            info.size = size
            file.addfile(info, io.BytesIO(bytes([size]) * size))
    return buffer.getvalue()


def zip_of(*names: str) -> bytes:
    """Members of 40, 41, 42, ... bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for size, name in enumerate(names, start=40):
            file.writestr(name, bytes(size))
    return buffer.getvalue()


def found(*names: str, **settings: Any) -> Listing:
    return list_inputs(InputConfig(input=names, **settings))


def names_in(listing: Listing, root: str) -> list[str]:
    return [uri.removeprefix(f"{root}/") for uri in listing.table["uri"].to_pylist()]


def rows_of(listing: Listing) -> dict[str, dict[str, Any]]:
    return {row["uri"]: row for row in listing.table.to_pylist()}


def write_parquet(path: str, /, **columns: Any) -> str:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    ANYWHERE.write_bytes(path, buffer.getvalue())
    return path


def write_text(uri: str, text: str) -> str:
    ANYWHERE.write_bytes(uri, text.encode())
    return uri


# --- folders and prefixes


def test_a_folder_gives_its_images_at_any_depth_sorted(root: str) -> None:
    put(
        root,
        "b.png",
        "a/2.JPG",
        "a/.hidden.png",
        "_x/1.tiff",
        ".dot/c.webp",
        "a-b.bmp",
        "a.txt",
        "noending",
        "a/n.json",
    )
    listing = found(root)
    assert names_in(listing, root) == sorted(["_x/1.tiff", "a-b.bmp", "a/2.JPG", "b.png"])
    assert listing.table.schema == COLUMNS
    assert (listing.left_out.total, listing.archives, listing.named_twice, listing.duplicate_members) == (5, 0, 0, 0)
    assert listing.left_out.counts == {HIDDEN: 2, ".txt": 1, ".json": 1, NO_SUFFIX: 1}
    assert listing.left_out.examples[".txt"] == f"{root}/a.txt"
    assert listing.by_suffix == {".png": 1, ".jpg": 1, ".tiff": 1, ".bmp": 1}


def test_hidden_files_are_left_out_and_counted_unless_they_are_asked_for(root: str) -> None:
    put(root, "a.png", "._a.png", ".cache/b.png", "@eaDir/c.png", "__MACOSX/d.png", "_e.png", "f/.g.png")
    listing = found(root)
    assert names_in(listing, root) == ["_e.png", "a.png"]
    assert listing.left_out.counts == {HIDDEN: 5}
    (note,) = listing.notes()
    assert re.fullmatch(rf"left out: 5 hidden \({root}/[^ ]*; --all-files\)", note)
    assert len(found(root, all_files=True).table) == 7


def test_hidden_archives_are_left_out_like_hidden_images(root: str) -> None:
    put(root, "a.png")
    ANYWHERE.write_bytes(f"{root}/.old.tar", tar_of("b.png"))
    assert found(root).left_out.counts == {HIDDEN: 1}
    assert names_in(found(root, all_files=True), root) == [".old.tar!b.png", "a.png"]


def test_hidden_folders_and_files_that_are_named_are_taken(root: str) -> None:
    put(root, "._a.png", ".cache/b.png")
    assert names_in(found(f"{root}/.cache", f"{root}/._a.png"), root) == [".cache/b.png", "._a.png"]


def test_size_and_etag_are_those_of_the_listing(root: str) -> None:
    put(root, "a.png", "b/c.png")
    entries = {entry.uri: entry for entry in ANYWHERE.scan_entries(root)}
    listing = found(root)
    assert listing.total_bytes == 3 + 4
    for uri, row in rows_of(listing).items():
        assert row == dict.fromkeys(COLUMNS.names) | dataclasses.asdict(entries[uri])


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_ending_of_an_image_is_taken_in_any_case(tmp_path: Path, suffix: str) -> None:
    put(str(tmp_path), f"a{suffix}", f"B{suffix.upper()}", f"{suffix[1:]}", f"x{suffix}.bak")
    assert names_in(found(str(tmp_path)), str(tmp_path)) == [f"B{suffix.upper()}", f"a{suffix}"]


def test_a_trailing_slash_and_a_file_uri_name_the_same(tmp_path: Path) -> None:
    put(str(tmp_path / "a folder"), "x.png")
    expected = ["a folder/x.png"]
    for name in (f"{tmp_path}/a folder/", f"file://{tmp_path}/a%20folder", f"file://{tmp_path}/a%20fold*/*.png"):
        assert names_in(found(name), str(tmp_path)) == expected


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path), "a/x.png", "a/y.png", "b/z.png")
    write_text(str(tmp_path / "list.txt"), "b/z.png\n")
    monkeypatch.chdir(tmp_path / "a")
    assert names_in(found(".", "../list.txt"), str(tmp_path)) == ["a/x.png", "a/y.png", "a/b/z.png"]
    assert names_in(found("*.png"), str(tmp_path)) == ["a/x.png", "a/y.png"]
    assert names_in(found("../b/z.png"), str(tmp_path)) == ["b/z.png"]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    put(str(tmp_path), "a/x.png")
    for name in ("loop", "again"):
        (tmp_path / "a" / name).symlink_to(tmp_path, target_is_directory=True)
    for name in (str(tmp_path), f"{tmp_path}/**/*.png", f"{tmp_path}/**"):
        assert names_in(found(name), str(tmp_path)) == ["a/x.png"]


def test_a_link_to_nowhere_is_a_row_of_unknown_size(tmp_path: Path) -> None:
    (tmp_path / "x.png").symlink_to(tmp_path / "nowhere")
    (row,) = rows_of(found(str(tmp_path))).values()
    assert row == dict.fromkeys(COLUMNS.names) | {"uri": f"{tmp_path}/x.png"}


@pytest.mark.filterwarnings("ignore")  # whatever the file system thinks of such names
def test_a_name_that_is_no_unicode_is_a_row_that_says_so(tmp_path: Path) -> None:
    for name in (b"\xff.png", b"sub/\xfe/y.png", b"ok.png", b"\xfd.tar"):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(tar_of("m.png") if name.endswith(b"tar") else bytes(7))
    listing = found(str(tmp_path))
    assert names_in(listing, str(tmp_path)) == ["\\xfd.tar", "\\xff.png", "ok.png", "sub/\\xfe/y.png"]
    statuses = listing.table["status"].to_pylist()
    assert statuses == ["unsupported", "unsupported", None, "unsupported"]
    assert set(listing.table["error"].to_pylist()) == {None, "the file name is not valid Unicode"}
    assert listing.archives == 0
    (tmp_path / "list.txt").write_bytes(bytes(tmp_path) + b"/\xff.png\n")
    assert names_in(found(f"{tmp_path}/list.txt"), str(tmp_path)) == ["\\xff.png"]


def test_what_is_listed_out_of_order_is_sorted(s3: str) -> None:
    entries = [Entry(f"{s3}/{name}.png", size, name) for size, name in enumerate("cab", start=5)]
    assert rows_of(search(s3, scan=entries)) == {
        entry.uri: dict.fromkeys(COLUMNS.names) | dataclasses.asdict(entry) for entry in sorted(entries, key=str)
    }


def test_a_prefix_is_whole_parts_of_the_key(s3: str) -> None:
    put(s3, "a/x.png", "ab/y.png", "a.png")
    assert names_in(found(f"{s3}/a"), s3) == ["a/x.png"]
    assert names_in(found(f"{s3}/a/"), s3) == ["a/x.png"]


def test_the_keys_of_s3_come_in_the_order_of_their_uris(s3: str) -> None:
    names = ["a/x.png", "a.png", "a-b.png", "a/ä.png", "a/z/1.png", "B.png", "a/\U0001f600.png", "a/\uffee.png"]
    put(s3, *names)
    assert names_in(found(s3), s3) == sorted(names)


# --- names that are not there


def test_an_input_that_is_not_there_is_named(root: str) -> None:
    put(root, "a.png")
    for name in ("nowhere", "nowhere.csv", "nowhere.tar", "b*.png", "**/c.png"):
        with pytest.raises(
            DataError, match=r"there is no such file, folder or prefix.*Received: '.*/(nowh|b\*|\*\*/c)"
        ):
            found(root, f"{root}/{name}")


def test_no_such_bucket_is_an_error_of_the_storage(s3: str) -> None:
    with pytest.raises(StorageError, match=r"no such bucket.*nobody-has-this"):
        found("s3://nobody-has-this/a")


def test_an_unknown_scheme_is_an_error_of_the_storage() -> None:
    with pytest.raises(StorageError, match="ftp://example"):
        found("ftp://example.org/a.png")


def search(*names: str, scan: Iterable[Entry] | Exception, progress: Callable[[int], None] | None = None) -> Listing:
    """With a storage that gives these entries, or fails."""

    def entries(uri: str) -> Iterator[Entry]:
        if isinstance(scan, Exception):
            raise scan
        yield from scan

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ANYWHERE, "scan_entries", entries)
        return list_inputs(InputConfig(input=names), progress=progress)


def test_a_bucket_that_may_not_be_listed_is_named() -> None:
    denied = PermissionError(errno.EACCES, "access denied (AccessDenied)", "s3://closed/a")
    with pytest.raises(
        DataError, match=r"no permission to list this input: .*access denied.*Received: 's3://closed/a'"
    ):
        search("s3://closed/a", scan=denied)


def test_no_connection_stays_an_error_of_the_service() -> None:
    with pytest.raises(ServiceError, match="no connection"):
        search("s3://b/a", scan=ServiceError("no connection"))


def test_nothing_found_says_what_was_there_instead(root: str) -> None:
    put(root, *(f"{number}.txt" for number in range(10)), "a.json", "b.json", "c", "x/y.png")
    with pytest.raises(DataError) as raised:
        found(root, f"{root}/x", exclude=("*.png",))
    message = str(raised.value)
    pattern = f"1 by include and exclude ({root}/x/y.png; --include, --exclude)"
    by_suffix = [
        f"10 .txt ({root}/0.txt; --all-files)",
        f"2 .json ({root}/a.json; --all-files)",
        f"1 without a suffix ({root}/c; --all-files)",
    ]
    assert f"{root}: {', '.join([*by_suffix, pattern])};" in message
    assert f"{root}/x: {pattern}. Received: input=" in message
    assert ".jpg, .jpeg," in message


def test_an_empty_folder_has_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images were found.*: nothing\. Received: input="):
        found(str(tmp_path))
    put(str(tmp_path), "full/x.png")
    (tmp_path / "empty").mkdir()
    assert names_in(found(str(tmp_path / "empty"), str(tmp_path / "full")), str(tmp_path)) == ["full/x.png"]


def test_thousands_of_endings_do_not_fill_the_memory(s3: str) -> None:
    entries = [Entry(f"{s3}/x.{number}", 1, "e") for number in range(3_000)]
    entries.append(Entry(f"{s3}/y.png", 2, "f"))
    listing = search(s3, scan=entries)
    assert (len(listing.table), listing.left_out.total) == (1, 3_000)
    assert len(listing.left_out.counts) == len(listing.left_out.examples) == 1_001
    assert listing.left_out.described(all_files=True).endswith("), 991 of 991 more kinds")


# --- single files and globs


def test_a_file_that_is_named_is_taken_whatever_its_name(root: str) -> None:
    put(root, "photo", "photo.json", "b.png")
    listing = found(f"{root}/photo", f"{root}/photo.json", f"{root}/b.png")
    assert names_in(listing, root) == ["photo", "photo.json", "b.png"]
    assert listing.table["size_bytes"].to_pylist() == [3, 4, 5]
    assert listing.by_suffix == {"": 1, ".json": 1, ".png": 1}


def test_a_name_that_exists_is_no_glob(root: str) -> None:
    put(root, "a[1].png", "a1.png", "b*/x.png", "bc/y.png", "q?.png", "qq.png")
    assert names_in(found(f"{root}/a[1].png"), root) == ["a[1].png"]
    assert names_in(found(f"{root}/b*"), root) == ["b*/x.png"]
    assert names_in(found(f"{root}/q?.png"), root) == ["q?.png"]
    ANYWHERE.delete(f"{root}/a[1].png")
    assert names_in(found(f"{root}/a[1].png"), root) == ["a1.png"]


GLOBBED = ("a/1.png", "a/12.png", "a/b/3.png", "a/b/c/4.png", "a/.h/5.png", "a/.6.png", "x/7.png", "a/1.txt", "ab.png")
SEEN = {"a/1.png", "a/12.png", "a/b/3.png", "a/b/c/4.png", "x/7.png", "ab.png"}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/*.png", {"a/1.png", "a/12.png"}),
        ("a/?.png", {"a/1.png"}),
        ("a/[0-9]*.png", {"a/1.png", "a/12.png"}),
        ("a/[!2-9]*.png", {"a/1.png", "a/12.png"}),
        ("*/*.png", {"a/1.png", "a/12.png", "x/7.png"}),
        ("a?.png", {"ab.png"}),
        ("**/*.png", SEEN),
        ("a/**/*.png", {name for name in SEEN if name.startswith("a/")}),
        ("a/.h/*", {"a/.h/5.png"}),
        ("a/**/[34].png", {"a/b/3.png", "a/b/c/4.png"}),
        ("**/b/**/*.png", {"a/b/3.png", "a/b/c/4.png"}),
        ("a/**", {name for name in SEEN if name.startswith("a/")}),
    ],
)
def test_a_star_stays_within_its_folder_and_two_stars_do_not(root: str, pattern: str, expected: set[str]) -> None:
    put(root, *GLOBBED)
    assert names_in(found(f"{root}/{pattern}"), root) == sorted(expected)
    if not root.startswith("s3://"):
        files = glob.glob(f"{root}/{pattern}", recursive=True, include_hidden=True)
        assert {*files} >= {f"{root}/{name}" for name in expected}


def test_a_glob_on_disk_takes_the_folders_that_match_whole(tmp_path: Path) -> None:
    put(str(tmp_path), *GLOBBED)
    assert names_in(found(f"{tmp_path}/*"), str(tmp_path)) == sorted(SEEN)
    assert names_in(found(f"{tmp_path}/**/b"), str(tmp_path)) == ["a/b/3.png", "a/b/c/4.png"]
    assert names_in(found(f"{tmp_path}/a/[.b]*"), str(tmp_path)) == ["a/b/3.png", "a/b/c/4.png"]


def test_a_glob_on_s3_matches_keys(s3: str) -> None:
    put(s3, *GLOBBED)
    assert names_in(found(f"{s3}/a/*"), s3) == ["a/1.png", "a/12.png"]
    assert names_in(found(f"{s3}/*b.png"), s3) == ["ab.png"]


def test_a_glob_leaves_out_what_is_no_image_by_its_name(root: str) -> None:
    put(root, "a/1.png", "a/2.txt", "a/3.csv")
    listing = found(f"{root}/a/*")
    assert (names_in(listing, root), listing.left_out.total) == (["a/1.png"], 2)


def test_the_working_directory_is_no_part_of_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run[1]*"
    put(str(folder), "x.png", "y/z.png")
    monkeypatch.chdir(folder)
    assert names_in(found("*.png"), str(folder)) == ["x.png"]
    assert names_in(found("**/z.png"), str(folder)) == ["y/z.png"]


# --- stdin and lists


def test_stdin_gives_a_uri_a_line(root: str) -> None:
    put(root, "a.png", "b", "c.png")
    lines = f"\ufeff# a comment\n\n{root}/c.png\r\n   \n{root}/b\n{root}/a.png"
    listing = list_inputs(InputConfig(input=("-",)), stdin=io.StringIO(lines, newline=""))
    assert names_in(listing, root) == ["a.png", "b", "c.png"]
    assert listing.total_bytes == (0 if root.startswith("s3://") else 3 + 4 + 5)


def test_stdin_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be listed: .*utf-8.*Received: '-'"):
        list_inputs(InputConfig(input=("-",)), stdin=io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))


def test_the_own_stdin_may_name_files_by_any_bytes(tmp_path: Path) -> None:
    code = """if True:
        from mnist_dist.sources.listing import InputConfig, list_inputs
        print(list_inputs(InputConfig(input=("-",))).table["uri"].to_pylist())"""
    ran = subprocess.run(
        [sys.executable, "-c", code], input=b"/a/\xff.png\n/a/b.png\n", capture_output=True, check=True
    )
    assert ran.stdout.decode().split() == ["['/a/\\\\xff.png',", "'/a/b.png']"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".txt", ".lst", ".CSV"])
def test_a_list_names_images_whatever_their_name(root: str, suffix: str) -> None:
    put(root, "a.png", "b", "c.json")
    uris = [f"{root}/{name}" for name in ("c.json", "a.png", "b")]
    manifest = f"{root}/lists/own{suffix}"
    if suffix == ".parquet":
        write_parquet(manifest, uri=uris, more=[1, 2, 3])
    elif suffix in (".txt", ".lst"):
        write_text(manifest, "# all of them\n\n" + "\r\n".join(uris))
    else:
        separator = "\t" if suffix == ".tsv" else ","
        write_text(
            manifest, "".join(f"{uri}{separator}{more}\n" for uri, more in zip(["uri", *uris], "mxyz", strict=True))
        )
    assert names_in(found(manifest), root) == ["a.png", "b", "c.json"]


def test_a_list_asks_disks_but_not_s3_for_sizes(s3: str, tmp_path: Path) -> None:
    put(s3, "a.png")
    put(str(tmp_path), "b.png")
    (tmp_path / "folder").mkdir()
    uris = [f"{s3}/a.png", f"{s3}/nowhere", f"{tmp_path}/b.png", f"{tmp_path}/nowhere", f"{tmp_path}/folder"]
    rows = rows_of(found(write_parquet(f"{tmp_path}/list.parquet", uri=uris)))
    assert sorted(rows) == sorted(uris)
    entry = ANYWHERE.entry_of(f"{tmp_path}/b.png")
    for uri, row in rows.items():
        known = dataclasses.asdict(entry) if uri == entry.uri else {"uri": uri}
        assert row == dict.fromkeys(COLUMNS.names) | known


def test_a_uri_that_no_storage_has_is_a_row_that_says_so(tmp_path: Path) -> None:
    uris = ["ftp://example.org/a.png", "s3://bucket", "s3:///key", "S3://b/k", "/a\0b.png", "/a/b.png"]
    rows = rows_of(found(write_parquet(f"{tmp_path}/list.parquet", uri=uris)))
    assert {uri: row["status"] for uri, row in rows.items()} == dict.fromkeys(uris, "unsupported") | {"/a/b.png": None}
    assert "unknown scheme 'ftp'" in rows["ftp://example.org/a.png"]["error"]
    assert "s3://bucket/key" in rows["s3://bucket"]["error"]
    assert "null byte" in rows["/a\0b.png"]["error"]


@pytest.mark.parametrize("empty", [None, *(pytest.param(text, marks=pytest.mark.slow) for text in ("", "  "))])
def test_a_row_without_a_uri_is_named(tmp_path: Path, empty: str | None) -> None:
    uris = [f"/a/{number}.png" if number != BATCH_ROWS + 3 else empty for number in range(BATCH_ROWS + 7)]
    manifest = write_parquet(f"{tmp_path}/list.parquet", uri=uris)
    with pytest.raises(
        DataError, match=rf"list\.parquet: each row must have a uri.*Received: .* in row {BATCH_ROWS + 4}"
    ):
        found(manifest)


def test_a_csv_row_without_a_uri_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list\.csv: each row must have a uri\. Received: '' in row 2"):
        found(write_text(f"{tmp_path}/list.csv", "uri,label\n/a.png,1\n,2\n"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("l.csv", b"path,label\n/a,1\n", "no column 'uri'; use --uri-column path. Received: columns path, label"),
        ("l.csv", b"uri,uri\n/a,/b\n", "'uri' occurs 2 times, so rename one. Received: columns uri, uri"),
        ("l.csv", b"", "not a readable csv file"),
        ("l.csv", b"uri,a\n/x\n", "not a readable csv file"),
        ("l.parquet", b"no parquet", "not a readable parquet file"),
        ("l.parquet", b"", "not a readable parquet file"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        found(str(tmp_path / name))


def test_a_damaged_parquet_file_has_a_reason_of_one_line(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [b"png"], "label": ["cat"]}), buffer)
    data, column = buffer.getvalue(), pq.read_metadata(buffer).row_group(0).column(1)
    (tmp_path / "a.parquet").write_bytes(data[:4] + b"\xff" * (len(data) - 12) + data[-8:])
    with pytest.raises(DataError, match=r"cannot be listed: Couldn't deserialize thrift: [^\n]+ Received: [^\n]+$"):
        found(f"{tmp_path}/a.parquet")
    start = column.dictionary_page_offset
    (tmp_path / "a.parquet").write_bytes(data[:start] + b"\xff" * 9 + data[start + 9 :])
    (row,) = list_inputs(InputConfig(input=(f"{tmp_path}/a.parquet",)), label_column="label").table.to_pylist()
    assert (row["status"], row["error"].splitlines()) == ("unreadable", [row["error"]])
    assert "column 'label' cannot be read: " in row["error"]


def test_a_parquet_list_has_a_column_of_strings(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a\.parquet: there is no column 'uri'; use --uri-column path\. Received: columns path"
    ):
        found(write_parquet(f"{tmp_path}/a.parquet", path=["/a"], label=[1]))
    with pytest.raises(DataError, match=r"b\.parquet: the column 'uri' must hold strings\. Received: int64"):
        found(write_parquet(f"{tmp_path}/b.parquet", uri=[1, 2]))
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        manifest = write_parquet(f"{tmp_path}/c.parquet", uri=pa.array(["/x.png", "/w.png"]).cast(kind))
        assert names_in(found(manifest), "") == ["w.png", "x.png"]


def test_a_folder_with_the_name_of_a_list_is_a_folder(root: str) -> None:
    put(root, "set.csv/a.png", "set.tar/b.png")
    assert names_in(found(f"{root}/set.csv", f"{root}/set.tar"), root) == ["set.csv/a.png", "set.tar/b.png"]


# --- carried columns


def test_carried_columns_go_along_and_others_get_null(root: str) -> None:
    put(root, "a.png", "b.png", "c.png")
    columns = {"label": ["7", "8"], "note": ["x", "y"]}
    first = write_parquet(f"{root}/1.parquet", uri=[f"{root}/b.png", f"{root}/a.png"], **columns)
    second = write_text(f"{root}/2.csv", f"label,uri\n2.5,{root}/c.png\n")
    listing = found(second, root, first, carry=("label", "note"))
    assert listing.table.schema.names == [*COLUMNS.names, "label", "note"]
    assert listing.table.schema.field("label").type == pa.string()
    assert names_in(listing, root) == ["c.png", "a.png", "b.png"]
    assert listing.table["label"].to_pylist() == ["2.5", None, None]  # a.png and b.png were named by the folder before
    listing = found(second, first, root, carry=("label", "note"))
    assert listing.table["label"].to_pylist() == ["2.5", "8", "7"]
    assert listing.table["note"].to_pylist() == [None, "y", "x"]


def test_a_carried_column_that_no_manifest_has_is_refused(tmp_path: Path) -> None:
    manifest = write_text(f"{tmp_path}/a.csv", "uri,label,day\n/a.png,1,2\n")
    with pytest.raises(DataError, match=r"day, label \(names are separated by spaces\)\. Received: carry=lable"):
        found(manifest, carry=("lable", "day"))
    put(str(tmp_path), "x.png")
    with pytest.raises(DataError, match=r"there are none .*Received: carry=label"):
        found(str(tmp_path), carry=("label",))


def test_carried_types_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    first = write_parquet(f"{tmp_path}/a.parquet", uri=["/a"], label=["cat"])
    second = write_parquet(f"{tmp_path}/b.parquet", uri=["/b"], label=[3])
    with pytest.raises(DataError, match=r"same type in all lists and files\. Received: label: int64 and string"):
        found(first, second, carry=("label",))


def test_carried_columns_may_be_of_any_type(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {
        "uri": [f"/{name}.png" for name in "cab"],
        "box": [{"x": 1, "y": 2}, None, {"x": 5, "y": 6}],
        "tags": [["u"], [], ["v", "w"]],
        "raw": [b"\xff", b"", None],
    }
    kinds = pa.array(["k", "l", "k"]).dictionary_encode()
    listing = found(write_parquet(f"{tmp_path}/a.parquet", **rows, kind=kinds), carry=("box", "tags", "raw", "kind"))
    assert listing.table["box"].to_pylist() == [None, {"x": 5, "y": 6}, {"x": 1, "y": 2}]
    assert listing.table["tags"].to_pylist() == [[], ["v", "w"], ["u"]]
    assert listing.table["raw"].to_pylist() == [b"", None, b"\xff"]
    assert listing.table["kind"].to_pylist() == ["l", "k", "k"]


def test_text_of_a_csv_stays_as_it_is_written(tmp_path: Path) -> None:
    texts = ["0007", "NA", "0x1A", "1.10", "12345678901234567890", "", "true", "2024-01-02", " x "]
    lines = [f"/{number}.png,{text}" for number, text in enumerate(texts)]
    listing = found(write_text(f"{tmp_path}/a.csv", "\n".join(["uri,id", *lines])), carry=("id",))
    assert listing.table["id"].to_pylist() == texts


def test_typed_columns_of_parquet_keep_their_type(tmp_path: Path) -> None:
    columns = {
        "at": pa.array([datetime.datetime(2026, 1, 2)], pa.timestamp("ms")),
        "price": pa.array([decimal.Decimal("1.10")], pa.decimal128(5, 2)),
        "small": pa.array([3], pa.int8()),
        "view": pa.array(["v"], pa.string_view()),
        "bytes": pa.array([b"b"], pa.binary_view()),
    }
    manifest = write_parquet(f"{tmp_path}/a.parquet", uri=pa.array(["/a.png"], pa.string_view()), **columns)
    table = found(manifest, carry=tuple(columns)).table
    kinds = [table.schema.field(name).type for name in ("at", "price", "small", "view", "bytes")]
    assert kinds == [pa.timestamp("ms"), pa.decimal128(5, 2), pa.int8(), pa.string(), pa.binary()]
    assert table["view"].to_pylist() + table["bytes"].to_pylist() == ["v", b"b"]


def test_names_of_carried_columns_may_hold_spaces_and_commas(tmp_path: Path) -> None:
    manifest = write_text(f"{tmp_path}/a.csv", 'uri,"last, first",the day\n/a.png,x,y\n')
    table = found(manifest, carry=("last, first", "the day")).table
    assert table.select(["last, first", "the day"]).to_pylist() == [{"last, first": "x", "the day": "y"}]


def test_a_wanted_column_that_occurs_twice_is_named(tmp_path: Path) -> None:
    manifest = write_text(f"{tmp_path}/a.csv", "uri,day,day\n/a.png,1,2\n")
    assert len(found(manifest).table) == 1
    with pytest.raises(
        DataError, match=r"a\.csv: each column .*'day' occurs 2 times, so .* Received: columns day, day"
    ):
        found(manifest, carry=("day",))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_lists_may_be_in_any_unicode_that_says_so(tmp_path: Path, encoding: str, suffix: str) -> None:
    text = "uri,who\n/ä.png,Zoë\n" if suffix == ".csv" else "/ä.png\n"
    (tmp_path / f"a{suffix}").write_bytes(text.encode(encoding))
    carry = ("who",) if suffix == ".csv" else ()
    table = found(f"{tmp_path}/a{suffix}", carry=carry).table
    assert table["uri"].to_pylist() == ["/ä.png"]
    assert not carry or table["who"].to_pylist() == ["Zoë"]


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_utf_16_without_its_mark_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes("uri\n/a.png\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=rf"a\{suffix}: a list is text in UTF-8, or in UTF-16 .*Received: zero bytes"):
        found(f"{tmp_path}/a{suffix}")


def test_one_odd_line_is_a_row_and_not_the_end_of_the_list(tmp_path: Path) -> None:
    put(str(tmp_path), "ok.png")
    uris = [b"ftp://host/a.png", f"{tmp_path}/ok.png".encode(), b"/caf\xe9.png", b"s3:///x.png"]
    for suffix, head in ((".txt", []), (".csv", [b"uri"])):
        (tmp_path / f"a{suffix}").write_bytes(b"\n".join([*head, *uris]))
        rows = rows_of(found(f"{tmp_path}/a{suffix}"))
        assert {uri: row["status"] for uri, row in rows.items()} == {
            "ftp://host/a.png": "unsupported",
            f"{tmp_path}/ok.png": None,
            r"/caf\xe9.png": "unsupported",
            "s3:///x.png": "unsupported",
        }


@pytest.mark.slow
def test_a_csv_column_is_of_one_type_however_late_it_shows(tmp_path: Path) -> None:
    lines = [f"/{number:07d}.png,{number}" for number in range(100_000)]  # more than the block of a reader
    manifest = write_text(f"{tmp_path}/a.csv", "\n".join(["uri,label", *lines, '/x.png,"a\nb"']))
    listing = found(manifest, carry=("label",))
    assert listing.table["label"][0].as_py() == "0"
    assert listing.table["label"][-1].as_py() == "a\nb"


def test_a_manifest_without_rows_still_has_its_columns(tmp_path: Path) -> None:
    put(str(tmp_path), "x.png")
    for manifest in (
        write_text(f"{tmp_path}/a.csv", "uri,label\n"),
        write_parquet(f"{tmp_path}/b.parquet", uri=pa.array([], pa.string()), label=pa.array([], pa.int32())),
    ):
        listing = found(manifest, str(tmp_path), carry=("label",))
        assert listing.table.select(["uri", "label"]).to_pylist() == [{"uri": f"{tmp_path}/x.png", "label": None}]


@pytest.mark.parametrize(
    "name",
    [
        *("uri", "status", "error", "predicted_index", "predicted_class", "confidence", "probabilities", "width"),
        *("height", "size_bytes", "etag", "model_id", "scored_at", "top_k_classes", "top_k_confidences", "embedding"),
        *("shard", *COLUMNS.names),
    ],
)
def test_a_carried_column_may_not_hide_one_of_ours(tmp_path: Path, name: str) -> None:
    manifest = write_text(f"{tmp_path}/a.csv", f"uri,{name}x\n/a.png,1\n")
    with pytest.raises(ConfigError, match=rf"Received: carry=\['{name}'\]"):
        list_inputs(InputConfig(input=(manifest,), carry=(name,)), reserved=RESERVED)


# --- archives


def test_an_archive_gives_its_members_in_its_own_order(root: str) -> None:
    ANYWHERE.write_bytes(f"{root}/s/a.tar", tar_of("z.png", "d/y.JPG", "d/note.txt", "inner.zip", "noending", "b.png"))
    ANYWHERE.write_bytes(f"{root}/s/b.zip", zip_of("q.png", "p.png"))
    put(f"{root}/s", "a-b.png", "a.tar.png", "c.png")
    inside = ["a.tar!z.png", "a.tar!d/y.JPG", "a.tar!b.png"]
    expected = [f"s/{name}" for name in ["a-b.png", *inside, "a.tar.png", "b.zip!q.png", "b.zip!p.png", "c.png"]]
    listing = found(f"{root}/s")
    assert names_in(listing, root) == expected
    assert (listing.archives, listing.left_out.total) == (2, 3)
    assert names_in(found(f"{root}/s/a.tar"), f"{root}/s") == inside
    assert names_in(found(f"{root}/s/*.tar"), f"{root}/s") == inside
    assert names_in(found(f"{root}/**/*.tar"), f"{root}/s") == inside


def test_a_member_has_all_that_is_needed_to_read_it(tmp_path: Path) -> None:
    uri = f"{tmp_path}/a.tar"
    data = tar_of("x.png", "y.png")
    ANYWHERE.write_bytes(uri, data)
    ANYWHERE.write_bytes(f"{tmp_path}/b.zip", zip_of("z.png"))
    rows = rows_of(found(str(tmp_path)))
    row = rows[f"{uri}!y.png"]
    assert (row["size_bytes"], row["archive"], row["packing"]) == (31, uri, "tar")
    assert data[row["offset"] :][: row["stored_bytes"]] == bytes([31]) * 31
    assert row["etag"] == ANYWHERE.entry_of(uri).etag
    assert (row["status"], row["error"], row["crc32"]) == (None, None, None)
    row = rows[f"{tmp_path}/b.zip!z.png"]
    assert (row["size_bytes"], row["packing"]) == (40, "deflated")
    assert row["crc32"] is not None


def test_a_later_member_of_the_same_name_counts(tmp_path: Path) -> None:
    ANYWHERE.write_bytes(f"{tmp_path}/a.tar", tar_of("x.png", "y.png", "x.png"))
    listing = found(str(tmp_path))
    assert names_in(listing, str(tmp_path)) == ["a.tar!y.png", "a.tar!x.png"]
    assert listing.table["size_bytes"].to_pylist() == [31, 32]
    assert (listing.duplicate_members, listing.named_twice) == (1, 0)


def test_a_damaged_archive_is_a_row_beside_its_readable_members(root: str) -> None:
    data = tar_of("x.png", "y.png", "z.png")
    ANYWHERE.write_bytes(f"{root}/a.tar", data[: 2 * 1024 + 5])
    ANYWHERE.write_bytes(f"{root}/b.zip", b"no zip at all")
    rows = rows_of(found(root, include=("*.png",)))
    assert [uri.removeprefix(f"{root}/") for uri in rows] == ["a.tar", "a.tar!x.png", "a.tar!y.png", "b.zip"]
    row = rows[f"{root}/a.tar"]
    assert row["status"] == "truncated"
    assert row["error"].endswith("; 2 members were readable")
    assert row["etag"] == rows[f"{root}/a.tar!x.png"]["etag"]
    assert (row["archive"], row["size_bytes"]) == (None, None)  # read as a file it would be no image
    assert rows[f"{root}/b.zip"]["error"].endswith("; 0 members were readable")


def test_a_member_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    data = bytearray(zip_of("x.png", "y.png"))
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag of an encrypted member
    ANYWHERE.write_bytes(f"{tmp_path}/a.zip", bytes(data))
    rows = rows_of(found(str(tmp_path)))
    assert [row["status"] for row in rows.values()] == ["unreadable", None]
    assert [row["error"] is None for row in rows.values()] == [False, True]


def test_an_archive_that_is_gone_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.tar").symlink_to(tmp_path / "nowhere.tar")
    put(str(tmp_path), "x.png")
    row = rows_of(found(str(tmp_path)))[f"{tmp_path}/a.tar"]
    assert (row["status"], row["etag"]) == ("missing", None)


def test_a_list_picks_members_and_opens_archives(root: str) -> None:
    ANYWHERE.write_bytes(f"{root}/a.tar", tar_of("1.png", "2.txt", "3.png", "4.png"))
    ANYWHERE.write_bytes(f"{root}/b.zip", zip_of("x.png", "note.txt", "y.png"))
    picked = ["b.zip", "a.tar!4.png", "a.tar!lost.png", "a.tar!2.txt", "no.tar!x.png"]
    uris = [f"{root}/{name}" for name in picked]
    listing = found(write_parquet(f"{root}/list.parquet", uri=uris, n=[10, 11, 12, 13, 14]), carry=("n",))
    expected = ["a.tar!2.txt", "a.tar!4.png", "a.tar!lost.png", "b.zip!x.png", "b.zip!y.png", "no.tar!x.png"]
    assert names_in(listing, root) == expected
    assert listing.table["n"].to_pylist() == [13, 11, 12, 10, 10, 14]
    assert listing.table["status"].to_pylist() == [None, None, "missing", None, None, "missing"]
    assert listing.table["error"].to_pylist()[2] == "no such member"
    assert listing.table["archive"].to_pylist()[2] is None
    assert listing.archives == 3
    assert names_in(found(f"{root}/a.tar!3.png"), root) == ["a.tar!3.png"]


def test_an_archive_is_opened_once_for_all_members_that_are_picked(tmp_path: Path) -> None:
    uris = [f"/{letter}.tar!{number}.png" for number in range(30_000) for letter in "ab"]
    table = image_table.sorted_by_uri(
        image_table.table_of(ImageRow(uri, archive=uri.partition("!")[0]) for uri in uris)
    )
    assert list(image_table.waiting_runs(table)) == [("/a.tar", 0, 30_000), ("/b.tar", 30_000, 60_000)]


def test_more_archives_than_threads_stay_in_order(root: str) -> None:
    for number in range(20):
        ANYWHERE.write_bytes(f"{root}/{number:02d}.tar", tar_of(*(f"{name}.png" for name in "cab"[: 1 + number % 3])))
    put(root, "07.png")
    uris = names_in(found(root), root)
    assert [uri.partition("!")[0] for uri in uris] == sorted(uri.partition("!")[0] for uri in uris)
    assert "07.png 07.tar!c.png 07.tar!a.png 08.tar!c.png" in " ".join(uris)
    assert len(uris) == 1 + sum(1 + number % 3 for number in range(20))


# --- which are taken, and which claim to be images


def test_only_what_all_files_alone_took_does_not_claim_to_be_an_image(root: str) -> None:
    put(root, "f/a.png", "f/b.txt", "f/c", "f/._d.jpg", "f/named.dat", "g/e.dat")
    ANYWHERE.write_bytes(f"{root}/f/x.tar", tar_of("x.png", "y.txt", "z.dat"))
    uris = [f"{root}/f/named.dat", f"{root}/f/x.tar!z.dat"]
    inputs = (f"{root}/f", f"{root}/g/e.dat", write_parquet(f"{root}/l.parquet", uri=uris))
    for order in (inputs, inputs[::-1]):
        table = found(*order, all_files=True).table
        others = table.filter(table["other_file"])["uri"].to_pylist()
        assert sorted(uri.removeprefix(f"{root}/f/") for uri in others) == ["._d.jpg", "b.txt", "c", "x.tar!y.txt"]
        assert len(table) == 9
    assert found(f"{root}/f").table["other_file"].null_count == 2


def test_an_archive_that_cannot_be_read_claims_to_hold_images(root: str) -> None:
    put(root, "a.png", "b.tar", "c.ZIP")
    table = found(root, all_files=True).table
    assert table["status"].to_pylist() == [None, "truncated", "unreadable"]
    assert table["other_file"].null_count == 3


def test_all_files_takes_everything_but_archives(root: str) -> None:
    put(root, "a.png", "b.txt", "c", "list.csv")
    ANYWHERE.write_bytes(f"{root}/d.tar", tar_of("x.png", "y.txt", "inner.tar"))
    listing = found(root, all_files=True)
    assert names_in(listing, root) == ["a.png", "b.txt", "c", "d.tar!x.png", "d.tar!y.txt", "list.csv"]
    assert listing.left_out.total == 1


def test_include_and_exclude_look_at_the_uri_and_at_its_last_part(root: str) -> None:
    put(root, "cats/1.png", "cats/2.jpg", "dogs/1.png", "dogs/1.PNG", "old/cats.png")
    ANYWHERE.write_bytes(f"{root}/t.tar", tar_of("cats/1.png", "2.png"))

    def chosen(*, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
        return names_in(found(root, include=include, exclude=exclude), root)

    assert chosen(include=("*/cats/*",)) == ["cats/1.png", "cats/2.jpg"]
    assert chosen(include=("1.png", "2.*")) == [
        "cats/1.png",
        "cats/2.jpg",
        "dogs/1.png",
        "t.tar!cats/1.png",
        "t.tar!2.png",
    ]
    assert chosen(include=("*.png",), exclude=("*cats*",)) == ["dogs/1.png", "t.tar!2.png"]
    assert chosen(exclude=("*.tar", "*/old/*", "?.png")) == ["cats/2.jpg", "dogs/1.PNG"]
    listing = found(root, include=("*/cats/*",))
    assert (listing.left_out.total, listing.archives) == (5, 1)


def test_include_and_exclude_hold_for_what_is_named_as_well(root: str) -> None:
    put(root, "a.png", "b.png", "c.dat")
    manifest = write_parquet(f"{root}/l.parquet", uri=[f"{root}/b.png", f"{root}/a.png"], n=[2, 1])
    listing = found(f"{root}/c.dat", manifest, exclude=("b.*",), carry=("n",))
    assert names_in(listing, root) == ["c.dat", "a.png"]
    assert listing.table["n"].to_pylist() == [None, 1]
    assert listing.left_out.total == 1


def test_a_limit_takes_the_first(root: str) -> None:
    put(root, *(f"{number}.png" for number in range(9)))
    listing = found(root, limit=4)
    assert names_in(listing, root) == ["0.png", "1.png", "2.png", "3.png"]
    assert (listing.by_suffix, listing.total_bytes) == ({".png": 4}, 3 + 4 + 5 + 6)
    assert len(found(root, limit=90).table) == 9


def test_a_sample_is_the_smallest_by_sha256_in_the_order_of_the_table(tmp_path: Path) -> None:
    put(str(tmp_path), *(f"{number:02d}.png" for number in range(40)))
    uris = names_in(found(str(tmp_path)), "")
    digest = {uri: hashlib.sha256(f"/{uri}".encode()).hexdigest() for uri in uris}
    assert names_in(found(str(tmp_path), sample=11), "") == sorted(sorted(uris, key=digest.__getitem__)[:11])
    assert names_in(found(str(tmp_path), sample=400), "") == uris
    assert names_in(found(str(tmp_path), sample=11, limit=5), "") == names_in(found(str(tmp_path), sample=11), "")[:5]


def test_a_sample_stays_the_same_however_images_are_named(tmp_path: Path) -> None:
    put(str(tmp_path), *(f"{number % 3}/{number:02d}.png" for number in range(40)))
    whole = names_in(found(str(tmp_path), sample=9), "")
    parts = names_in(found(f"{tmp_path}/2", f"{tmp_path}/0", f"{tmp_path}/1", sample=9), "")
    assert sorted(parts) == sorted(whole)
    (tmp_path / "0" / "new.png").write_bytes(b"x")
    assert len({*names_in(found(str(tmp_path), sample=9), "")} & {*whole}) >= 8


# --- mixtures


def test_inputs_of_all_kinds_come_in_the_order_given(root: str, tmp_path: Path) -> None:
    put(root, "f/b.png", "f/a.png", "g/1.png", "g/2.png", "x.dat")
    ANYWHERE.write_bytes(f"{root}/t.zip", zip_of("n.png", "m.png"))
    manifest = write_text(f"{tmp_path}/own.txt", f"{root}/l2.png\n{root}/l1.png\n")
    listing = list_inputs(
        InputConfig(input=(f"{root}/x.dat", manifest, f"{root}/g/*.png", f"{root}/t.zip", "-", f"{root}/f")),
        stdin=io.StringIO(f"{root}/s.png\n"),
    )
    expected = [
        "x.dat",
        "l1.png",
        "l2.png",
        "g/1.png",
        "g/2.png",
        "t.zip!n.png",
        "t.zip!m.png",
        "s.png",
        "f/a.png",
        "f/b.png",
    ]
    assert names_in(listing, root) == expected


def test_what_is_named_twice_counts_once_where_it_came_first(root: str) -> None:
    put(root, "a.png", "b.png", "c.png")
    ANYWHERE.write_bytes(f"{root}/t.tar", tar_of("x.png", "y.png", "x.png"))
    listing = found(f"{root}/c.png", root, f"{root}/t.tar", root, f"{root}/", f"{root}/a*")
    assert names_in(listing, root) == ["c.png", "a.png", "b.png", "t.tar!y.png", "t.tar!x.png"]
    assert listing.named_twice == 1 + 2 + 5 + 5 + 1
    assert (listing.archives, listing.duplicate_members) == (1, 1)
    manifest = write_parquet(f"{root}/l.parquet", uri=[f"{root}/t.tar!x.png", f"{root}/a.png"] * 2, n=[5, 6, 7, 8])
    listing = found(manifest, carry=("n",))
    assert listing.table["n"].to_pylist() == [6, 5]
    assert listing.named_twice == 2


def test_the_same_inputs_give_the_same_table(root: str) -> None:
    put(root, "a.png", "b/c.png", "d.png")
    ANYWHERE.write_bytes(f"{root}/t.tar", tar_of("x.png", "y.png"))
    assert found(root, f"{root}/b").table.equals(found(root, f"{root}/b").table)


def test_progress_tells_how_many_images_there_are_so_far(s3: str) -> None:
    told: list[int] = []
    entries = (Entry(f"{s3}/{number:05d}.{'png' if number % 2 else 'txt'}", 1, "e") for number in range(4_500))
    search(s3, scan=entries, progress=told.append)
    assert told[:4] == [500, 1_000, 1_500, 2_000]
    assert told[-1] == 2_250
    lines = io.StringIO("".join(f"{s3}/{number}.png\n" for number in range(2_500)))
    told.clear()
    list_inputs(InputConfig(input=("-",)), stdin=lines, progress=told.append)
    assert told[:3] == [1_000, 2_000, 2_500]


def test_a_listing_travels(tmp_path: Path) -> None:
    put(str(tmp_path), "a.png")
    listing = found(str(tmp_path))
    assert pickle.loads(pickle.dumps(listing)).table.equals(listing.table)


# --- size


def test_rows_are_sorted_and_told_apart_over_many_batches() -> None:
    numbers = [(number * 7919) % 60_001 for number in range(120_002)]  # each number twice, far apart
    table = image_table.table_of(ImageRow(f"/{number:06d}", size) for size, number in enumerate(numbers))
    assert table["uri"].num_chunks == 3
    in_order = image_table.sorted_by_uri(table)
    assert in_order["uri"].to_pylist() == sorted(table["uri"].to_pylist())
    once = image_table.first_of_each(in_order)
    assert once["uri"].to_pylist() == [f"/{number:06d}" for number in range(60_001)]
    assert max(once["size_bytes"].to_pylist()) == 60_000  # the first of each two
    assert image_table.first_of_each(table).num_rows == 60_001
    assert image_table.sorted_by_uri(once) is once
    assert image_table.first_of_each(once) is once


def test_many_small_batches_become_few() -> None:
    small = pa.concat_tables([image_table.table_of([ImageRow(f"/{number}", number)]) for number in range(900)])
    few = image_table.compact(small)
    assert (small["uri"].num_chunks, few["uri"].num_chunks) == (900, 1)
    assert few.equals(small)
    assert image_table.compact(small.slice(0, 0)).num_rows == 0


LISTS_MANY = """
import sys, time
from pathlib import Path
from mnist_dist.score_config import InputConfig
from mnist_dist.sources.listing import list_inputs
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry

def scan(uri):
    for number in range(images):
        folder, name = divmod(number, 1000)
        yield Entry(
            f"{uri}/2024/camera-{folder:06d}/frame_{name:09d}.jpg", 100_000 + number, f"{number * 2654435761:032x}")

def peak_mib():  # not by getrusage: its figure may be that of the process which started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024

images, inputs = int(sys.argv[1]), tuple(sys.argv[2:])
before, start = peak_mib(), time.monotonic()
ANYWHERE.scan_entries = scan
listing = list_inputs(InputConfig(input=inputs))
assert len(listing.table) == images * len(set(inputs)), len(listing.table)
assert listing.by_suffix == {".jpg": len(listing.table)}
print(peak_mib() - before, peak_mib(), round(time.monotonic() - start, 1))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status; runs on Linux")
@pytest.mark.parametrize("inputs", [("s3://b/p",), ("s3://b/p", "s3://b/p"), ("s3://b/q", "s3://b/p")])
def test_a_million_images_need_little_memory(inputs: tuple[str, ...]) -> None:
    images = str(MANY // len(set(inputs)))
    ran = subprocess.run(
        [sys.executable, "-c", LISTS_MANY, images, *inputs], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    growth_mib = int(ran.stdout.split()[0])
    assert growth_mib < MAX_GROWTH_MIB, ran.stdout


# --- Parquet files of images


def images_of(rows: int, *, name: str = "image", struct_column: bool = True) -> dict[str, Any]:
    images = [b"image %d" % row for row in range(rows)]
    return {
        name: [{"bytes": image, "path": f"{row}.png"} for row, image in enumerate(images)] if struct_column else images
    }


def test_rows_of_parquet_files_are_images(root: str) -> None:
    write_parquet(f"{root}/d/train-0.parquet", **images_of(3), label=[5, 6, 7])
    write_parquet(f"{root}/d/test-0.parquet", **images_of(2), label=[8, 9])
    listing = found(f"{root}/d", carry=("label", "path"))
    assert names_in(listing, f"{root}/d") == [
        *("test-0.parquet#row=0", "test-0.parquet#row=1"),
        *(f"train-0.parquet#row={row}" for row in range(3)),
    ]
    assert listing.table["label"].to_pylist() == [8, 9, 5, 6, 7]
    assert listing.table["path"].to_pylist() == ["0.png", "1.png", "0.png", "1.png", "2.png"]
    assert listing.by_suffix == {".parquet": 5}
    assert names_in(found(f"{root}/d", include=("*/test-*",)), f"{root}/d") == names_in(listing, f"{root}/d")[:2]
    assert len(found(f"{root}/d/train-*.parquet").table) == 3


def test_pictures_beside_parquet_files_of_images_are_not_part_of_the_data(root: str) -> None:
    write_parquet(f"{root}/data/0.parquet", **images_of(2))
    put(root, "cover.png", "README.md", "assets/a.jpg")
    for hidden in ("._0", ".ipynb_checkpoints/0", "_temporary/0", "@eaDir/0"):
        write_parquet(f"{root}/data/{hidden}.parquet", **images_of(2))
    listing = found(root)
    assert names_in(listing, root) == ["data/0.parquet#row=0", "data/0.parquet#row=1"]
    assert listing.left_out.counts == {BESIDE: 2, HIDDEN_PARQUET: 4, ".md": 1}
    assert f"2 pictures beside Parquet files of images ({root}/assets/a.jpg; name them" in " ".join(listing.notes())


def test_parquet_files_without_images_are_other_files(root: str) -> None:
    write_parquet(f"{root}/predictions.parquet", uri=["/a.png"], confidence=[0.5])
    put(root, "a.png")
    listing = found(root)
    assert (names_in(listing, root), listing.left_out.counts) == (["a.png"], {NO_IMAGES: 1})
    assert listing.left_out.examples == {NO_IMAGES: f"{root}/predictions.parquet"}


def test_a_parquet_file_is_a_list_unless_it_holds_images(tmp_path: Path) -> None:
    path = write_parquet(f"{tmp_path}/a.parquet", uri=["/x.png"], image=pa.array([b"bytes"]))
    assert names_in(found(path), str(tmp_path)) == ["a.parquet#row=0"]
    path = write_parquet(f"{tmp_path}/b.parquet", uri=["/x.png"], thumbnail=pa.array([b"bytes"]))
    assert names_in(found(path), "") == ["x.png"]
    assert names_in(found(path, image_column="thumbnail"), str(tmp_path)) == ["b.parquet#row=0"]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
)
def test_images_may_be_binary_of_any_kind(tmp_path: Path, kind: pa.DataType) -> None:
    path = write_parquet(f"{tmp_path}/a.parquet", image=pa.array([b"x", b"y"]).cast(kind))
    assert list(read_in_order(found(path).table, max_bytes=9)) == [b"x", b"y"]


def test_a_damaged_parquet_file_is_a_row_and_the_others_are_read(tmp_path: Path) -> None:
    write_parquet(f"{tmp_path}/a.parquet", **images_of(1))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    rows = rows_of(found(str(tmp_path)))
    assert {uri.rpartition("/")[2]: row["status"] for uri, row in rows.items()} == {
        "a.parquet#row=0": None,
        "b.parquet": "unreadable",
    }


def test_lists_name_rows_and_whole_parquet_files(root: str, tmp_path: Path) -> None:
    path = write_parquet(f"{root}/a.parquet", **images_of(4))
    lines = [f"{path}#row=2", f"{path}#row=9", f"{root}/none.parquet#row=0", f"{path}#row=0"]
    rows = rows_of(found(write_text(f"{tmp_path}/l.txt", "\n".join(lines))))
    assert {uri: row["status"] for uri, row in rows.items()} == dict(
        zip(lines, [None, "missing", "missing", None], strict=True)
    )
    assert len(found(write_text(f"{tmp_path}/m.txt", path)).table) == 4
    assert names_in(found(f"{path}#row=3"), root) == ["a.parquet#row=3"]


def test_large_images_of_parquet_files_are_too_large_and_others_are_read(tmp_path: Path) -> None:
    path = write_parquet(f"{tmp_path}/a.parquet", image=[b"x" * 9, b"x" * 10, b"", None])
    results = [r.status if isinstance(r, ImageError) else r for r in read_in_order(found(path).table, max_bytes=9)]
    assert results == [b"x" * 9, "too_large", "empty", "empty"]


def test_a_parquet_file_that_changed_is_not_read(root: str) -> None:
    path = write_parquet(f"{root}/a.parquet", **images_of(2))
    table = found(path).table
    write_parquet(path, **images_of(3))
    statuses = {r.status for r in read_in_order(table, max_bytes=99) if isinstance(r, ImageError)}
    assert statuses == {"failed"}


# --- archives in archives, named arrays


def test_archives_inside_archives_are_counted_and_named(root: str) -> None:
    ANYWHERE.write_bytes(f"{root}/a.tar", tar_of("x.png", "inner.zip", "deep/b.tar.gz"))
    note = f"left out: 2 archives inside archives ({root}/a.tar!inner.zip; not opened; unpack them)"
    assert note in found(root).notes()
    assert note in found(root, all_files=True).notes()


def test_a_named_data_set_is_rows_of_png_files() -> None:
    table = found("digits").table
    assert table["uri"][17].as_py() == "digits/all/00017"
    (image,) = read_in_order(table.slice(17, 1), max_bytes=9)
    assert isinstance(image, bytes)
    digits = arrays.read_arrays("digits", None).parts[0].images
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), digits[17])
