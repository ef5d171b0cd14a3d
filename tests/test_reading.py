"""reading: the bytes of each row or the reason why not, from real files, archives and objects."""

import contextlib
import json
import os
import resource
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import manifest_rows, tar_of

from mnist_dist.errors import ImageError, ServiceError, StorageError
from mnist_dist.score_config import InputConfig
from mnist_dist.sources import parquet
from mnist_dist.sources.listing import list_inputs
from mnist_dist.sources.reading import TINY_AT_ONCE, TINY_BYTES, Encoded, plan_reads
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

MAX_BYTES = 1000
MEMBERS = {"a.png": b"first", "b/c.png": b"the second", "d.png": bytes(MAX_BYTES + 1), "e.png": b"", "f.png": b"last"}
OF_MEMBERS = ["first", "the second", "too_large", "empty", "last"]
NOBODY = 65534


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path)


def put(root: str, name: str, data: bytes) -> str:
    uri = join(root, name)
    ANYWHERE.write_bytes(uri, data)
    return uri


def read(rows: pa.Table) -> list[Encoded]:
    """In the order of the rows."""
    found: dict[int, Encoded] = {}
    for request in plan_reads(rows, max_bytes=MAX_BYTES):
        found |= zip(request.rows, request.run(), strict=True)
    return [found[row] for row in range(len(rows))]


def read_one(uri: str) -> Encoded:
    (encoded,) = read(manifest_rows([uri]))
    return encoded


def words(found: Sequence[Encoded]) -> list[str]:
    """The status, or what was read."""
    return [item.data.status if isinstance(item.data, ImageError) else item.data.decode() for item in found]


def error_of(found: Encoded) -> str:
    assert isinstance(found.data, ImageError)
    return str(found.data)


def listed(*uris: str) -> pa.Table:
    return list_inputs(InputConfig(input=uris)).table


def requests(rows: pa.Table) -> list[list[int]]:
    return [list(request.rows) for request in plan_reads(rows, max_bytes=MAX_BYTES)]


# --- files and objects -----------------------------------------------------------------------------------------------


def test_a_file_is_its_bytes(root: str) -> None:
    uri = put(root, "ä b#?.png", b"some bytes")
    found = read_one(uri)
    assert (found.data, found.size_bytes, found.etag) == (b"some bytes", 10, ANYWHERE.entry_of(uri).etag)


def test_a_missing_file_is_missing(root: str) -> None:
    put(root, "x.png", b"x")
    for name in ("nowhere/x.png", "x.png/y.png"):
        found = read_one(join(root, name))
        assert error_of(found) == "missing: no such file"
        assert (found.size_bytes, found.etag) == (None, None)


def test_a_file_without_bytes_is_empty(root: str) -> None:
    found = read_one(put(root, "x.png", b""))
    assert error_of(found) == "empty: the file has no bytes"
    assert found.size_bytes == 0
    assert found.etag


def test_a_file_of_too_many_bytes_is_too_large(root: str) -> None:
    assert read_one(put(root, "most.png", bytes(MAX_BYTES))).data == bytes(MAX_BYTES)
    found = read_one(put(root, "more.png", bytes(MAX_BYTES + 1)))
    assert error_of(found) == "too_large: 1,001 bytes are more than 1,000"
    assert found.size_bytes == MAX_BYTES + 1
    assert found.etag


def bytes_read() -> int:
    """By this process, from anywhere."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_too_many_bytes_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(50 * 2**30)
    before = bytes_read()
    found = read_one(str(tmp_path / "x.png"))
    assert bytes_read() - before < 2**20
    assert (error_of(found).split(":")[0], found.size_bytes) == ("too_large", 50 * 2**30)


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(NOBODY)
    except OSError as error:
        pytest.skip(f"needs a second user ({error}); runs where root may become nobody, and for other users")
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_may_not_be_read_is_denied() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        open_path, closed_path = Path(folder, "open.png"), Path(folder, "closed.png")
        for path in (open_path, closed_path):
            path.write_bytes(b"some bytes")
        Path(folder).chmod(0o755)
        closed_path.chmod(0)
        with ordinary_user():
            found = read(manifest_rows([str(open_path), str(closed_path)]))
    assert words(found) == ["some bytes", "denied"]
    assert error_of(found[1]) == "denied: Permission denied"


def test_an_object_that_may_not_be_read_is_denied(s3: str) -> None:
    uris = [put(s3, name, b"some bytes") for name in ("open.png", "closed.png")]
    bucket, _, key = uris[1].removeprefix("s3://").partition("/")
    resources = f"arn:aws:s3:::{bucket}/{key}"
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": resources}
    client = boto3.client("s3")
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    try:
        found = read(manifest_rows(uris))
    finally:
        client.delete_bucket_policy(Bucket=bucket)
    assert words(found) == ["some bytes", "denied"]
    assert error_of(found[1]) == "denied: access denied (AccessDenied)"


def test_what_is_no_file_says_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    errors = {
        "pipe.png": "failed: not a regular file",
        "loop.png": "failed: Too many levels of symbolic links",
        "dangling.png": "missing: no such file",
        "folder.png": "unsupported: a folder, not a file",
        "x" * 300: "failed: File name too long",
    }
    for name, error in errors.items():
        found = read_one(str(tmp_path / name))
        assert error_of(found) == error
        assert (found.size_bytes, found.etag) == (None, None)


def test_a_link_is_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"some bytes")
    (tmp_path / "link.png").symlink_to(tmp_path / "x.png")
    assert read_one(str(tmp_path / "link.png")).data == b"some bytes"


def test_what_is_known_already_is_not_read() -> None:
    rows = manifest_rows(
        ["/nowhere/a.tar", "ftp://x/y.png"],
        status=["truncated", "unsupported"],
        error=["it ends; 3 members were readable", None],
        size_bytes=[77, None],
        etag=["e", None],
    )
    found = read(rows)
    assert [error_of(item) for item in found] == [
        "truncated: it ends; 3 members were readable",
        "unsupported: unsupported",
    ]
    assert [(item.size_bytes, item.etag) for item in found] == [(77, "e"), (None, None)]


# --- archives --------------------------------------------------------------------------------------------------------


def test_members_are_read_with_one_request(root: str) -> None:
    archive = put(root, "x.tar", tar_of(MEMBERS))
    rows = listed(archive)
    assert requests(rows) == [[0, 1, 2, 3, 4]]
    found = read(rows)
    assert words(found) == OF_MEMBERS
    assert [item.size_bytes for item in found] == [len(data) for data in MEMBERS.values()]
    assert {item.etag for item in found} == {ANYWHERE.entry_of(archive).etag}


def test_far_members_are_read_each_by_its_own_request(root: str) -> None:
    files = {"a.png": b"first", "between.txt": bytes(300_000), "b.png": b"second"}
    rows = listed(put(root, "x.tar", tar_of(files)))
    assert requests(rows) == [[0], [1]]
    assert words(read(rows)) == ["first", "second"]


@pytest.mark.parametrize(("name", "mode"), [("x.tar.gz", "w:gz"), ("x.tar.bz2", "w:bz2"), ("x.tar.xz", "w:xz")])
def test_a_compressed_archive_is_one_request(root: str, name: str, mode: str) -> None:
    files = {**MEMBERS, "between.txt": bytes(300_000), "z.png": b"behind it"}
    rows = listed(put(root, name, tar_of(files, mode)))
    assert requests(rows) == [[0, 1, 2, 3, 4, 5]]
    assert words(read(rows)) == [*OF_MEMBERS, "behind it"]


def zip_of(path: Path, *, damaged: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in MEMBERS.items():
            archive.writestr(name, data)
        offset = archive.getinfo(damaged).header_offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(4))
    return path


def test_a_damaged_member_is_unreadable_and_the_others_are_read(tmp_path: Path) -> None:
    rows = listed(str(zip_of(tmp_path / "x.zip", damaged="b/c.png")))
    assert words(read(rows)) == ["first", "unreadable", *OF_MEMBERS[2:]]


def test_of_a_cut_archive_what_is_there_is_read(tmp_path: Path) -> None:
    whole = tar_of({"a.png": b"first", "b.png": b"second", "c.png": bytes(900)})
    (tmp_path / "x.tar").write_bytes(whole[: 5 * 512 + 100])
    rows = listed(str(tmp_path / "x.tar"))
    found = read(rows)
    assert rows["uri"].to_pylist() == [f"{tmp_path}/x.tar{name}" for name in ("", "!a.png", "!b.png", "!c.png")]
    assert words(found) == ["truncated", "first", "second", "truncated"]
    assert "; 3 members were readable" in error_of(found[0])


def test_rows_keep_their_order(tmp_path: Path) -> None:
    for name in ("a.png", "z.png"):
        (tmp_path / name).write_bytes(name.encode())
    for name in ("m.tar", "n.tar"):
        (tmp_path / name).write_bytes(tar_of({"1.png": b"1 of " + name.encode(), "2.png": b"2 of " + name.encode()}))
    rows = listed(str(tmp_path))
    assert requests(rows) == [[0], [1, 2], [3, 4], [5]]
    assert words(read(rows)) == ["a.png", "1 of m.tar", "2 of m.tar", "1 of n.tar", "2 of n.tar", "z.png"]


def test_members_can_be_read_in_parts(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(MEMBERS))
    rows = listed(str(tmp_path / "x.tar"))
    assert words(read(rows.slice(1, 3))) == OF_MEMBERS[1:4]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_an_archive_that_changed_is_not_read(root: str, name: str) -> None:
    mode = "w:gz" if name.endswith("gz") else "w"
    archive = put(root, name, tar_of(MEMBERS, mode))
    rows = listed(archive)
    ANYWHERE.write_bytes(archive, tar_of({"other.png": b"other", **MEMBERS}, mode))
    found = read(rows)
    assert {error_of(item) for item in found} == {
        "failed: the file changed since it was listed; list it again (scoring: --mode incremental)"
    }
    assert [item.etag for item in found] == rows["etag"].to_pylist()


def test_an_archive_that_is_gone_is_missing(root: str) -> None:
    archive = put(root, "x.tar", tar_of(MEMBERS))
    rows = listed(archive)
    ANYWHERE.delete(archive)
    assert words(read(rows)) == ["missing"] * 5


# --- what is no image's fault ----------------------------------------------------------------------------------------


def test_adjacent_tiny_files_are_one_request(tmp_path: Path) -> None:
    sizes = {"a": 1, "b": TINY_BYTES, "c": TINY_BYTES + 1, "d": 0, "e": 7}
    for name, size in sizes.items():
        (tmp_path / f"{name}.png").write_bytes(bytes(size))
    rows = listed(str(tmp_path))
    planned = plan_reads(rows, max_bytes=MAX_BYTES)
    assert [(request.rows, request.tiny_files) for request in planned] == [([0, 1], True), ([2], False), ([3, 4], True)]
    found = read(rows)
    assert [item.size_bytes for item in found] == list(sizes.values())
    assert [item.etag for item in found] == rows["etag"].to_pylist()
    assert error_of(found[3]) == "empty: the file has no bytes"


def test_a_request_has_a_few_tiny_files(tmp_path: Path) -> None:
    count = 2 * TINY_AT_ONCE + 3
    for number in range(count):
        (tmp_path / f"{number:03d}.png").write_bytes(b"%d" % number)
    (tmp_path / "002.png").unlink()
    rows = pa.concat_tables([listed(str(tmp_path)), manifest_rows([f"{tmp_path}/unknown.png"])])
    assert [len(some) for some in requests(rows)] == [TINY_AT_ONCE, TINY_AT_ONCE, 2, 1]
    (tmp_path / "005.png").unlink()
    assert words(read(rows))[:6] == ["0", "1", "3", "4", "missing", "6"]


def test_tiny_objects_have_a_request_each(s3: str) -> None:
    for name in ("a.png", "b.png"):
        put(s3, name, b"tiny")
    assert requests(listed(s3)) == [[0], [1]]


@contextlib.contextmanager
def no_more_open_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_error_of_the_service_is_raised(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"some bytes")
    (tmp_path / "x.tar").write_bytes(tar_of(MEMBERS))
    (request,) = plan_reads(manifest_rows([str(tmp_path / "x.png")]), max_bytes=MAX_BYTES)
    (members,) = plan_reads(listed(str(tmp_path / "x.tar")), max_bytes=MAX_BYTES)
    for asked in (request, members):
        with no_more_open_files(), pytest.raises(ServiceError, match="Too many open files"):
            list(asked.run())


def test_an_error_of_the_storage_is_raised() -> None:
    with pytest.raises(StorageError, match=r"storage must be a local path"):
        read_one("ftp://bucket/x.png")


@pytest.mark.parametrize("uri", ["s3://nobody-has-this/x.png", "s3://No Such Name/x.png"])
def test_a_bucket_that_a_list_names_and_that_is_not_there_costs_one_row(s3: str, uri: str) -> None:
    found = read_one(uri)
    assert isinstance(found.data, ImageError)
    assert found.data.status == "missing"


# --- Parquet files that unpack to far more than they hold


def test_rows_that_share_a_large_image_are_read_few_at_a_time(tmp_path: Path) -> None:
    image = bytes(8 * 2**20)
    pq.write_table(pa.table({"image": [image] * 40}), tmp_path / "a.parquet", compression="zstd")
    before_bytes = pa.total_allocated_bytes()
    images = parquet.read_rows(f"{tmp_path}/a.parquet", "image", range(40), max_bytes=len(image))
    assert next(images) == image
    assert pa.total_allocated_bytes() - before_bytes < 10 * len(image)
    assert list(images) == [image] * 39


def test_a_row_group_that_unpacks_to_gigabytes_costs_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_MAX_GROUP_BYTES", 2**16)  # in place of a GiB
    images = [b"x", b"y", bytes(2**16), bytes(2**16), b"z"]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", compression="zstd", row_group_size=2)
    found = list(parquet.read_rows(f"{tmp_path}/a.parquet", "image", range(5), max_bytes=2**20))
    assert [str(image) if isinstance(image, ImageError) else image for image in found] == [
        *(b"x", b"y"),
        *["too_large: its row group unpacks to more than 1 GiB"] * 2,
        b"z",
    ]
