"""The stores: one contract for local files, S3 and memory; then what only one of them has."""

import errno
import os
import pickle
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import UnsupportedOperation
from pathlib import Path
from typing import BinaryIO

import boto3
import pyarrow as pa
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from mnist_dist.config import StoreConfig
from mnist_dist.errors import ServiceError, StorageError
from mnist_dist.store import s3 as s3_module
from mnist_dist.store.anywhere import ANYWHERE, Anywhere, store_for
from mnist_dist.store.local import atomic_file
from mnist_dist.store.memory import MemoryStore
from mnist_dist.store.s3 import S3Store
from mnist_dist.store.uris import MEMORY, absolute, are_remote, is_bucket, is_remote, join, parent_of

STORE = Anywhere({**ANYWHERE.stores, MEMORY: MemoryStore()})


@pytest.fixture(params=["local", "file", "s3", "gcs", "azure", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("s3", "gcs", "azure"):
        return str(request.getfixturevalue(request.param))
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/a"
    return str(tmp_path / "a store") if request.param == "local" else f"file://{tmp_path}/a%20store"


@pytest.fixture(params=["s3", "gcs", "azure", "memory"])
def prefix(request: pytest.FixtureRequest) -> str:
    """An empty prefix of a bucket, of every kind of store that has some."""
    return (
        f"memory://{uuid.uuid4().hex}/a" if request.param == "memory" else str(request.getfixturevalue(request.param))
    )


def names(uri: str) -> list[str]:
    root = absolute(uri)
    return [entry.uri.removeprefix(f"{root}/") for entry in STORE.list_entries(uri)]


def test_what_is_written_is_read_and_replaced(root: str) -> None:
    uri = join(root, "deep/er", "ä #1?.bin")
    STORE.write_bytes(uri, b"first")
    STORE.write_bytes(uri, b"second")
    assert STORE.read_bytes(uri) == b"second"
    assert STORE.exists(uri)
    assert STORE.exists(root)
    assert names(root) == ["deep/er/ä #1?.bin"]


def test_a_listing_is_recursive_sorted_and_hides_nothing(root: str) -> None:
    written = ["a.txt", "a/b", "a/.hidden", "_SUCCESS", "a-b", "z/y/x"]
    for name in written:
        STORE.write_bytes(join(root, name), name.encode())
    entries = list(STORE.list_entries(root))
    assert names(root) == sorted(written)
    assert [entry.uri for entry in entries] == sorted(entry.uri for entry in entries)
    assert [entry.size_bytes for entry in entries] == [len(name) for name in sorted(written)]
    assert all(entry.etag for entry in entries)
    assert [entry.uri for entry in STORE.list_entries(entries[0].uri)] == [entries[0].uri]
    assert list(STORE.list_entries(join(root, "nowhere"))) == []


def test_an_etag_changes_with_the_content(root: str) -> None:
    uri = join(root, "x")
    STORE.write_bytes(uri, b"1")
    before = next(STORE.list_entries(root)).etag
    STORE.write_bytes(uri, b"22")
    assert next(STORE.list_entries(root)).etag != before


def test_a_folder_into_which_another_process_still_writes_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    late, real = ["1", "2"], os.rmdir

    def rmdir(path: str | Path, *, dir_fd: int | None = None) -> None:
        if late:
            (tmp_path / "a" / "b" / late.pop()).touch()
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir)
    STORE.delete_tree(str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    assert not late


def test_deleting_what_is_missing_is_fine(root: str) -> None:
    for name in ("a/1", "a/2", "ab"):
        STORE.write_bytes(join(root, name), b"x")
    STORE.delete(join(root, "a/1"))
    STORE.delete(join(root, "a/1"))
    assert names(root) == ["a/2", "ab"]
    STORE.delete_tree(join(root, "a"))
    STORE.delete_tree(join(root, "a"))
    assert names(root) == ["ab"]
    assert not STORE.exists(join(root, "a"))


def test_reading_what_is_missing_is_file_not_found(root: str) -> None:
    uri = join(root, "missing")
    for read in (STORE.read_bytes, STORE.open_binary):
        with pytest.raises(FileNotFoundError, match="missing"):
            read(uri)


def test_a_binary_file_is_read_in_ranges(root: str) -> None:
    uri = join(root, "big")
    data = os.urandom(3_000_017)
    STORE.write_bytes(uri, data)
    with STORE.open_binary(uri) as file:
        assert file.seek(-17, os.SEEK_END) == 3_000_000
        assert file.read() == data[-17:]
        file.seek(1_234_567)
        assert file.read(1_500_000) == data[1_234_567:2_734_567]
        assert file.read(0) == b""


def test_a_folder_goes_up_and_comes_down_again(root: str, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    (folder / "figures").mkdir(parents=True)
    (folder / "bundle.json").write_text("{}")
    (folder / "figures" / "a.svg").write_text("<svg/>")
    target = join(root, "models", "m1")
    STORE.write_bytes(join(target, "keeper" if is_remote(root) else "stale"), b"old")
    STORE.upload_folder(folder, target, last="bundle.json")
    assert set(names(target)) - {"keeper"} == {"bundle.json", "figures/a.svg"}
    STORE.download_folder(target, tmp_path / "down")
    assert (tmp_path / "down" / "figures" / "a.svg").read_text() == "<svg/>"
    assert not [name for name in names(join(root, "models")) if name.startswith(".")]


def test_a_folder_without_its_last_file_is_not_uploaded(root: str, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w")
    with pytest.raises(FileNotFoundError, match=r"no file 'bundle\.json' to upload"):
        STORE.upload_folder(tmp_path, join(root, "m"), last="bundle.json")
    with pytest.raises(FileNotFoundError, match="no files below"):
        STORE.download_folder(join(root, "nowhere"), tmp_path / "down")


def test_a_local_path_has_the_bytes_and_the_name(root: str, tmp_path: Path) -> None:
    uri = join(root, "w.weights.h5")
    STORE.write_bytes(uri, b"weights")
    path = STORE.local_path(uri, tmp_path / "scratch")
    assert path.name == "w.weights.h5"
    assert path.read_bytes() == b"weights"
    assert path.is_relative_to(tmp_path / "scratch") == is_remote(uri)


def test_a_writable_storage_is_left_as_it_was(root: str) -> None:
    STORE.write_bytes(join(root, "x"), b"x")
    STORE.check_writable(root)
    assert names(root) == ["x"]


def test_a_storage_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"the storage cannot be written: .*Not a directory.*Received: .*file/sub"):
        STORE.check_writable(str(tmp_path / "file" / "sub"))


@pytest.mark.parametrize("uri", ["ftp://host/x", "hdfs://x"])
def test_an_unknown_scheme_names_the_known_ones(uri: str) -> None:
    for function in (STORE.read_bytes, STORE.exists, is_remote):
        with pytest.raises(StorageError, match=rf"file:///path, s3://.*gs://.*az://container/.*Received: '{uri}'"):
            function(uri)


def test_joining_puts_one_slash_between_parts() -> None:
    assert join("s3://b/", "/a/", "c") == "s3://b/a/c"
    assert join("runs", "a") == "runs/a"
    assert join("file:///x%20y", "a") == "/x y/a"
    assert absolute("runs/") == f"{Path.cwd()}/runs"


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "1").write_bytes(b"1")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "data" / "pipe")
    assert names(str(tmp_path / "data")) == ["a/1", "b/1", "dangling"]


def test_a_link_to_itself_is_listed_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "loop").symlink_to("loop")
    assert [(entry.uri, entry.size_bytes) for entry in STORE.list_entries(str(tmp_path))] == [
        (f"{tmp_path}/a", 1),
        (f"{tmp_path}/loop", 0),
    ]


def test_an_object_is_created_once_also_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)  # no file system without them can be had in a test
    assert STORE.create_bytes(str(tmp_path / "x"), b"first")
    assert not STORE.create_bytes(str(tmp_path / "x"), b"second")
    assert (tmp_path / "x").read_bytes() == b"first"
    assert names(str(tmp_path)) == ["x"]


def test_a_write_that_fails_leaves_neither_file_nor_rest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(TypeError, match="bytes-like"), atomic_file(tmp_path / "x") as file:
        file.writelines([b"new", "not bytes"])  # type: ignore[list-item]
    assert names(str(tmp_path)) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_full_disk_is_a_service_error(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="x: No space left"), atomic_file(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_missing_bucket_is_a_storage_error(s3_server: str) -> None:
    with pytest.raises(StorageError, match=r"no such bucket.*s3://no-such-bucket/x"):
        STORE.read_bytes("s3://no-such-bucket/x")
    with pytest.raises(StorageError, match="the URI of an object must be s3://bucket/key"):
        STORE.read_bytes("s3://")


@pytest.fixture
def fresh_client(monkeypatch: pytest.MonkeyPatch, s3: str) -> Iterator[pytest.MonkeyPatch]:
    STORE.forget_clients()
    yield monkeypatch
    STORE.forget_clients()


def test_wrong_credentials_are_a_service_error(s3: str, fresh_client: pytest.MonkeyPatch) -> None:
    fresh_client.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ServiceError, match="credentials are not accepted"):
        STORE.read_bytes(f"{s3}/x")


def test_no_credentials_are_a_service_error(s3: str, fresh_client: pytest.MonkeyPatch) -> None:
    fresh_client.delenv("AWS_ACCESS_KEY_ID")
    fresh_client.delenv("AWS_SECRET_ACCESS_KEY")
    fresh_client.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ServiceError, match=r"[Cc]redentials"):
        list(STORE.list_entries(s3))


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", FileNotFoundError),
        (404, "404", FileNotFoundError),
        (403, "AccessDenied", PermissionError),
        (403, "403", PermissionError),
        (403, "ExpiredToken", ServiceError),
        (400, "ExpiredToken", ServiceError),
        (404, "NoSuchBucket", StorageError),
        (503, "SlowDown", ServiceError),
        (429, "TooManyRequests", ServiceError),
        (500, "InternalError", ServiceError),
    ],
)
def test_each_answer_of_s3_has_its_meaning(status: int, code: str, kind: type[Exception]) -> None:
    answer = {"Error": {"Code": code, "Message": "said so"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(kind, match="s3://bucket/key"), s3_module._errors("s3://bucket/key"):
        raise ClientError(answer, "GetObject")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", ["AssumeRole", "AssumeRoleWithWebIdentity", "GetRoleCredentials"])
def test_credentials_that_are_refused_are_no_object_that_is(call: str) -> None:
    answer = {"Error": {"Code": "AccessDenied", "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    with pytest.raises(ServiceError, match="s3://bucket/key"), s3_module._errors("s3://bucket/key"):
        raise ClientError(answer, call)  # type: ignore[arg-type]


def test_a_token_that_is_gone_is_no_object_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/scoring")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    STORE.forget_clients()
    try:
        with pytest.raises(ServiceError, match=r"s3://bucket/key: the credentials cannot be read: .*token"):
            STORE.read_object("s3://bucket/key", max_bytes=10)
        with pytest.raises(ServiceError, match=r"s3://bucket/key: the credentials cannot be read: .*token"):
            STORE.entry_of("s3://bucket/key")
    finally:
        STORE.forget_clients()


def test_no_connection_is_a_service_error() -> None:
    client = boto3.client(
        "s3",
        endpoint_url="http://127.0.0.1:9",
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
        config=Config(retries={"mode": "standard", "total_max_attempts": 1}),
    )
    with pytest.raises(ServiceError, match=r"s3://b/k: Could not connect"), s3_module._errors("s3://b/k"):
        client.get_object(Bucket="b", Key="k")


def test_an_object_is_read_with_what_it_was_then(root: str) -> None:
    uri = join(root, "a.bin")
    STORE.write_bytes(uri, b"seven..")
    entry, data = STORE.read_object(uri, max_bytes=7)
    assert (entry, data) == (STORE.entry_of(uri), b"seven..")
    assert [entry] == list(STORE.scan_entries(root))
    entry, data = STORE.read_object(uri, max_bytes=6)
    assert (entry.size_bytes, data) == (7, None)


@pytest.mark.parametrize(
    ("start", "length", "found"), [(0, 3, b"abc"), (4, 9, b"ef"), (2, 0, b""), (6, 1, b""), (9, 2, b"")]
)
def test_a_range_ends_where_the_object_ends(root: str, start: int, length: int, found: bytes) -> None:
    uri = join(root, "a.bin")
    STORE.write_bytes(uri, b"abcdef")
    assert STORE.read_range(uri, start, length) == found


def _write_and_fail(file: BinaryIO) -> None:
    file.write(b"half")
    raise UnsupportedOperation("midway")


def test_a_new_object_is_there_when_its_block_ends_well(root: str) -> None:
    uri = join(root, "sub/a.bin")
    with STORE.new_object(uri) as file:
        file.write(b"12345")
        file.seek(1)
        file.write(b"_")
        assert not STORE.exists(uri)
    assert STORE.read_bytes(uri) == b"1_345"
    with pytest.raises(UnsupportedOperation, match="midway"), STORE.new_object(uri) as file:
        _write_and_fail(file)
    assert STORE.read_bytes(uri) == b"1_345"
    assert names(root) == ["sub/a.bin"]


def test_a_moved_object_takes_the_place_of_another(root: str) -> None:
    source, target = join(root, "a"), join(root, "b")
    STORE.write_bytes(source, b"new")
    STORE.write_bytes(target, b"old")
    STORE.move(source, target)
    assert names(root) == ["b"]
    assert STORE.read_bytes(target) == b"new"
    with pytest.raises(FileNotFoundError, match="a"):
        STORE.move(source, target)


def test_one_of_many_creates_an_object(root: str) -> None:
    uri = join(root, "lock")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: STORE.create_bytes(uri, f"{number}".encode()), range(8)))
    assert sorted(made) == [False] * 7 + [True]
    assert STORE.read_bytes(uri) == f"{made.index(True)}".encode()
    assert names(root) == ["lock"]


def test_a_file_goes_up_and_comes_down(root: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(b"bytes")
    STORE.upload(tmp_path / "up", join(root, "deep", "x"))
    STORE.download(join(root, "deep", "x"), tmp_path / "below" / "down")
    assert (tmp_path / "below" / "down").read_bytes() == b"bytes"
    with pytest.raises(FileNotFoundError, match="missing"):
        STORE.download(join(root, "missing"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_a_killed_upload_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    for name in (".m1.0123456789ab.tmp", ".m1.v2.0123456789ab.tmp", ".m1.notes.tmp", "m1", ".m1.txt"):
        (tmp_path / name).mkdir()
    STORE.delete_leftovers(str(tmp_path / "m1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".m1.notes.tmp",
        ".m1.txt",
        ".m1.v2.0123456789ab.tmp",
        "m1",
    ]
    STORE.delete_leftovers("s3://bucket/m1")  # asks nobody


def test_a_store_crosses_processes_and_there_is_one_in_each(s3: str) -> None:
    assert pickle.loads(pickle.dumps(ANYWHERE)) is ANYWHERE
    alone = pickle.loads(pickle.dumps(ANYWHERE.of("s3://b")))
    assert isinstance(alone, S3Store)
    assert not alone.exists(f"{s3}/nothing")
    with pytest.raises(StorageError, match="cannot be seen from another process"):
        pickle.dumps(STORE)


def test_a_store_with_settings_crosses_processes_and_is_another_one() -> None:
    settings = StoreConfig(s3_requester_pays=True, allow_private_hosts=True)
    store = store_for(settings)
    assert store is store_for(replace(settings))
    assert pickle.loads(pickle.dumps(store)) is store
    assert store is not ANYWHERE
    assert store_for(StoreConfig()) is ANYWHERE


def test_a_url_goes_to_the_store_of_web_servers() -> None:
    for uri in ("https://127.0.0.1:9/x?y", "http://127.0.0.1:9/x?y"):
        with pytest.raises(PermissionError, match=r"--allow-private-hosts allows it\): 'https?://127.0.0.1:9/x'"):
            ANYWHERE.read_bytes(uri)


def test_a_scheme_without_a_store_is_refused() -> None:
    with pytest.raises(StorageError, match=r"there is no store for the scheme 'memory'. Received: 'memory://b/x'"):
        ANYWHERE.read_bytes("memory://b/x")


@pytest.mark.parametrize(
    ("uri", "is_whole", "parent"),
    [("s3://b", True, "s3://b"), ("s3://b/", True, "s3://b/"), ("s3://b/a", False, "s3://b"), ("/a/b", False, "/a")],
)
def test_a_bucket_has_no_parent(uri: str, is_whole: bool, parent: str) -> None:
    assert (is_bucket(uri), parent_of(uri)) == (is_whole, parent)


def test_remote_uris_of_a_column() -> None:
    column = pa.chunked_array([["s3://b/x", "/a/s3://b"], ["memory://b/x", "file:///x", None]])
    assert are_remote(column).to_pylist() == [True, False, True, False, None]


def test_what_is_no_regular_file_is_refused_and_closed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="not a regular file"):
        STORE.read_object(str(tmp_path / "pipe"), max_bytes=10)
    with pytest.raises(IsADirectoryError, match="a folder"):
        STORE.read_object(str(tmp_path), max_bytes=10)
    with pytest.raises(FileNotFoundError, match="a folder"):
        STORE.entry_of(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_level_shows_what_lies_directly_in_a_folder(root: str) -> None:
    for name in ("b/deep/x", "a/y", ".hidden/z", "_SUCCESS", "file"):
        STORE.write_bytes(join(root, name), name.encode())
    level = STORE.list_level(root)
    assert level.folders == (".hidden", "a", "b")
    assert sorted(level.files) == ["_SUCCESS", "file"]
    assert all(abs(modified_s - time.time()) < 3600 for modified_s in level.files.values())


def test_a_level_of_many_names_is_looked_at_in_part(root: str) -> None:
    for number in range(7):
        STORE.write_bytes(join(root, f"{number}"), b"1")
    assert len(STORE.list_level(root).files) == 7
    assert len(STORE.list_level(root, max_names=3).files) == 3


def test_a_level_of_nothing_is_file_not_found(root: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file|nothing below"):
        STORE.list_level(join(root, "nowhere"))
    STORE.write_bytes(join(root, "file"), b"1")
    with pytest.raises(FileNotFoundError, match=r"Not a directory|nothing below"):
        STORE.list_level(join(root, "file"))


def test_an_etag_is_the_same_wherever_it_comes_from(root: str) -> None:
    uri = join(root, "x")
    STORE.write_bytes(uri, b"1234")
    entry, _ = STORE.read_object(uri, max_bytes=4)
    bounded, _ = STORE.read_object(uri, max_bytes=3)
    assert [entry, bounded, STORE.entry_of(uri), *STORE.scan_entries(uri)] == list(STORE.list_entries(root)) * 4
    assert '"' not in entry.etag


ODD_KEYS = [
    "a b",
    "a+b",
    "a%20b",
    "%",
    "a#b?c=d&e",
    "ä/日本",
    "two//slashes",
    "/leading",
    "~",
    "a:b",
    "a&amp;<b>",
    "'\"",
    "x" * 200,
]


@pytest.mark.parametrize("key", [*ODD_KEYS, "long/" * 199 + "x" * 10])
def test_any_name_is_one_object(prefix: str, key: str, tmp_path: Path) -> None:
    if prefix.startswith("s3") and "//" in f"/{key}":
        pytest.skip("SeaweedFS makes one slash of two, S3 does not; runs with the other stores")
    uri = f"{prefix}/{key}"
    STORE.write_bytes(uri, key.encode())
    assert STORE.create_bytes(f"{uri}.new", b"new")
    assert [entry.uri for entry in STORE.list_entries(prefix)] == [uri, f"{uri}.new"]
    assert STORE.read_object(uri, max_bytes=2000) == (STORE.entry_of(uri), key.encode())
    STORE.download(uri, tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == key.encode()
    STORE.move(uri, f"{uri}.moved")
    assert STORE.read_range(f"{uri}.moved", 0, 2000) == key.encode()
    STORE.delete_tree(prefix)
    assert not STORE.exists(prefix)


def test_an_object_whose_name_ends_in_a_slash_is_no_file(prefix: str) -> None:
    STORE.write_bytes(f"{prefix}/folder/", b"")
    STORE.write_bytes(f"{prefix}/folder/x", b"1")
    STORE.write_bytes(f"{prefix}/empty/", b"")
    assert names(prefix) == ["folder/x"]
    assert STORE.list_level(prefix).folders == ("empty", "folder")
    assert dict(STORE.list_level(f"{prefix}/folder").files).keys() == {"x"}
    assert STORE.read_bytes(f"{prefix}/folder/") == b""
    assert not STORE.exists(f"{prefix}/empty")
    STORE.delete_tree(prefix)
    assert not STORE.exists(f"{prefix}/folder")
    if not prefix.startswith("s3"):  # SeaweedFS keeps the folders themselves.
        with pytest.raises(FileNotFoundError, match="nothing below"):
            STORE.list_level(prefix)


def test_an_object_with_objects_below_it_is_both(prefix: str) -> None:
    for name in ("a", "a/b", "a-b"):
        STORE.write_bytes(f"{prefix}/{name}", name.encode())
    assert [entry.uri for entry in STORE.list_entries(f"{prefix}/a")] == [f"{prefix}/a", f"{prefix}/a/b"]
    level = STORE.list_level(prefix)
    assert (level.folders, sorted(level.files)) == (("a",), ["a", "a-b"])
    STORE.delete_tree(f"{prefix}/a")
    assert names(prefix) == ["a-b"]


def test_a_whole_bucket_is_a_folder(prefix: str) -> None:
    STORE.write_bytes(f"{prefix}/x", b"1")
    bucket = prefix.rpartition("/")[0]
    assert STORE.exists(bucket)
    assert prefix.rpartition("/")[2] in STORE.list_level(bucket).folders
    assert f"{prefix}/x" in [entry.uri for entry in STORE.list_entries(bucket)]
    with pytest.raises(StorageError, match=r"must have a key|Parameter validation"):
        STORE.read_bytes(bucket)


def test_a_large_object_goes_up_in_parts_and_comes_down(prefix: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 40 + b"end"
    (tmp_path / "up").write_bytes(data)
    STORE.upload(tmp_path / "up", f"{prefix}/x")
    assert STORE.entry_of(f"{prefix}/x").size_bytes == len(data)
    STORE.download(f"{prefix}/x", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == data
    assert STORE.read_bytes(f"{prefix}/x") == data
    assert STORE.read_range(f"{prefix}/x", len(data) - 3, 9) == b"end"
    assert STORE.create_bytes(f"{prefix}/y", data)
    if not prefix.startswith("gs"):  # fake-gcs-server checks the condition of uploads in one part only.
        assert not STORE.create_bytes(f"{prefix}/y", data)


def test_many_threads_share_a_store(root: str) -> None:
    def there_and_back(number: int) -> bytes:
        STORE.write_bytes(join(root, f"{number}"), f"{number}".encode())
        return STORE.read_bytes(join(root, f"{number}"))

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(there_and_back, range(96))) == [f"{number}".encode() for number in range(96)]
    assert len(list(STORE.scan_entries(root))) == 96


@pytest.mark.parametrize("missing", ["read_bytes", "entry_of"])
def test_a_missing_object_is_file_not_found(prefix: str, missing: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such object"):
        getattr(STORE, missing)(f"{prefix}/missing")
    assert not STORE.exists(f"{prefix}/missing")
