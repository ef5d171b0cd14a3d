"""archives: what an archive holds and the bytes of its members, whole or damaged, on disk and on S3."""

import bz2
import errno
import gzip
import io
import lzma
import pickle
import random
import re
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest

from mnist_dist.errors import ImageError, ServiceError
from mnist_dist.sources.archives import (
    ARCHIVE_SUFFIXES,
    ArchiveIndex,
    Member,
    index_archive,
    is_archive,
    member_groups,
    read_members,
    split_member,
)
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.memory import MemoryStore

MAX_BYTES = 2**20
BLOCK_BYTES = 512
FILES = {  # around the block size of tar
    "a/one.png": b"1",
    "b/block.png": random.Random(0).randbytes(512),
    "b/more.png": random.Random(1).randbytes(513),
    "c/many.png": random.Random(2).randbytes(20_000),
    "d/even.png": bytes(7000),
}


def tar_header(name: str, size_bytes: int, *, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size_bytes, kind, link
    return info


def tar_bytes(files: Iterable[tuple[str, bytes]], *others: tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as tar:
        for name, data in files:
            tar.addfile(tar_header(name, len(data)), io.BytesIO(data))
        for other in others:
            tar.addfile(other)
    return buffer.getvalue()


def zip_bytes(files: Iterable[tuple[str | zipfile.ZipInfo, bytes]], packing: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files:
            archive.writestr(name, data, None if isinstance(name, zipfile.ZipInfo) else packing)
    return buffer.getvalue()


def put(folder: Path, data: bytes, name: str = "shard.tar") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def names(index: ArchiveIndex) -> list[str]:
    return [member.name for member in index.members]


def status(value: bytes | ImageError | None) -> str:
    return value.status if isinstance(value, ImageError) else "ok"


def read(uri: str, index: ArchiveIndex, *, max_bytes: int = MAX_BYTES) -> dict[str, bytes | str]:
    """What each member yields: bytes, or the word of its error."""
    images = list(read_members(uri, index.members, max_bytes=max_bytes))
    assert len(images) == len(index.members)
    return {
        member.name: image.status if isinstance(image, ImageError) else image
        for member, image in zip(index.members, images, strict=True)
    }


def statuses(uri: str) -> tuple[str, list[str]]:
    """The word for the archive, and those for its members when they are read."""
    index = index_archive(uri)
    return status(index.problem), [status(image) for image in read_members(uri, index.members, max_bytes=MAX_BYTES)]


def patched(data: bytes, position: int, *values: bytes) -> bytes:
    new = b"".join(values)
    return data[:position] + new + data[position + len(new) :]


def with_checksum(header: bytes) -> bytes:
    """A tar header whose checksum fits whatever was done to it."""
    blank = patched(header, 148, b" " * 8)
    return patched(header, 148, b"%06o\0 " % sum(blank))


class CountingStore(MemoryStore):
    """Counts ranged requests."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = 0

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        self.ranges += 1
        return super().read_range(uri, start, length)


class FailingStore(MemoryStore):
    """Fails to read from some position on."""

    fails_from = 2**62

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        if start + length > self.fails_from:
            raise ServiceError("no connection")
        return super().read_range(uri, start, length)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path)


# --- names


@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
def test_archives_are_told_by_their_ending_in_any_case(suffix: str) -> None:
    assert is_archive(f"s3://b/x{suffix}")
    assert is_archive(f"/data/X{suffix.upper()}")
    assert not is_archive(f"/data{suffix}/x.png")


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("a.tar!x/y.png", ("a.tar", "x/y.png")),
        ("s3://b/wow!/a.TGZ!x!y.png", ("s3://b/wow!/a.TGZ", "x!y.png")),
        ("a.zip!b.zip!c.png", ("a.zip", "b.zip!c.png")),
        ("a.zip!", ("a.zip", "")),
        ("wow!.png", None),
        ("a.parquet!17", None),
        ("a.tar", None),
    ],
)
def test_a_member_is_split_from_its_archive_at_the_first_archive(uri: str, parts: tuple[str, str] | None) -> None:
    assert split_member(uri) == parts


# --- whole archives of every kind


def gz(data: bytes) -> bytes:
    """Without the time, so that the names of tests are the same in each process."""
    return gzip.compress(data, mtime=0)


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tar.gz": gz,
    ".tgz": gz,
    ".tar.bz2": bz2.compress,
    ".tbz2": bz2.compress,
    ".tar.xz": lzma.compress,
    ".txz": lzma.compress,
    ".tar.zst": zstd,
    ".tzst": zstd,
}
ZIP_PACKINGS = {
    "stored": zipfile.ZIP_STORED,
    "deflated": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_tar_gives_its_files(tmp_path: Path, suffix: str, format: int) -> None:
    uri = put(tmp_path, COMPRESSIONS[suffix](tar_bytes(FILES.items(), format=format)), f"shard{suffix}")
    index = index_archive(uri)
    assert (index.problem, index.duplicates) == (None, 0)
    assert index.entry == ANYWHERE.entry_of(uri)
    assert {member.packing for member in index.members} == {"tar" if suffix == ".tar" else "stream"}
    assert [member.size_bytes for member in index.members] == [len(data) for data in FILES.values()]
    assert read(uri, index) == FILES


@pytest.mark.parametrize("packing", ZIP_PACKINGS)
def test_a_zip_gives_its_files(tmp_path: Path, packing: str) -> None:
    uri = put(tmp_path, zip_bytes(FILES.items(), ZIP_PACKINGS[packing]), "shard.zip")
    index = index_archive(uri)
    assert (index.problem, index.duplicates) == (None, 0)
    assert {member.packing for member in index.members} == {packing}
    assert all(member.crc32 is not None for member in index.members)
    assert read(uri, index) == FILES


def test_an_index_crosses_processes(tmp_path: Path) -> None:
    index = index_archive(put(tmp_path, tar_bytes(FILES.items())))
    assert pickle.loads(pickle.dumps(index)) == index


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gzip.tar", gz(tar_bytes(FILES.items()))),
        ("zstd.tgz", zstd(tar_bytes(FILES.items()))),
        ("plain.tar.zst", tar_bytes(FILES.items())),
        ("plain.tar.gz", tar_bytes(FILES.items())),
        ("xz.tar.bz2", lzma.compress(tar_bytes(FILES.items()))),
        ("tar.zip", tar_bytes(FILES.items())),
        ("gzip.zip", gz(tar_bytes(FILES.items()))),
        ("zip.tgz", zip_bytes(FILES.items())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_bytes_decide_not_the_name(tmp_path: Path, name: str, data: bytes) -> None:
    uri = put(tmp_path, data, name)
    assert read(uri, index_archive(uri)) == FILES


@pytest.mark.parametrize("compress", [gz, bz2.compress, lzma.compress, zstd])
def test_a_tar_compressed_in_several_streams_is_read_to_its_end(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    data = tar_bytes(FILES.items())
    uri = put(tmp_path, b"".join(compress(data[at : at + 6000]) for at in range(0, len(data), 6000)))
    assert read(uri, index_archive(uri)) == FILES


@pytest.mark.parametrize("number", [0x50, 0x5F])
def test_zstd_frames_to_be_skipped_are_skipped(tmp_path: Path, number: int) -> None:
    skipped = struct.pack("<LL", 0x184D2A00 | number, 4) + b"size"  # pzstd begins with one
    data = tar_bytes(FILES.items())
    uri = put(tmp_path, skipped + zstd(data[:6000]) + skipped + zstd(data[6000:]) + skipped)
    index = index_archive(uri)
    assert index.problem is None
    assert read(uri, index) == FILES


@pytest.mark.parametrize("data", [bytes(10240), zip_bytes([]), gz(bytes(10240)), zstd(bytes(10240))])
def test_an_archive_may_hold_nothing(tmp_path: Path, data: bytes) -> None:
    index = index_archive(put(tmp_path, data))
    assert (index.members, index.problem) == ((), None)


def test_a_zip_behind_something_else_is_read(tmp_path: Path) -> None:
    uri = put(tmp_path, b"#!/bin/sh\n" * 70 + zip_bytes(FILES.items()), "shard.zip")
    assert read(uri, index_archive(uri)) == FILES


@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\n" * 70])
def test_a_zip64_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # real ones begin at 2 GiB
    data = zip_bytes(FILES.items(), zipfile.ZIP_DEFLATED)
    assert b"PK\6\6" in data
    uri = put(tmp_path, before + data, "shard.zip")
    index = index_archive(uri)
    assert index.problem is None
    assert read(uri, index) == FILES


def test_a_zip64_end_record_with_more_fields_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    data = zip_bytes(FILES.items())
    end64 = data.index(b"PK\6\6")
    longer = patched(data[: end64 + 56], end64 + 4, struct.pack("<Q", 44 + 8)) + b"8 bytes." + data[end64 + 56 :]
    uri = put(tmp_path, patched(longer, len(longer) - 14, b"\xff" * 12), "a.zip")  # only the zip64 record says it
    assert read(uri, index_archive(uri)) == FILES


@pytest.mark.parametrize(
    "comment",
    [b"x", b"PK\5\6", bytes(2**16 - 1), zip_bytes([("b.png", b"b")])[:-1], zip_bytes([("b.png", b"b")]) + b"x"],
    ids=["short", "magic", "longest", "cut off zip", "zip"],
)
def test_a_zip_may_end_in_a_comment(tmp_path: Path, comment: bytes) -> None:
    data = zip_bytes([("a.png", b"abc")])
    uri = put(tmp_path, data[:-2] + struct.pack("<H", len(comment)) + comment, "shard.zip")
    index = index_archive(uri)
    assert index.problem is None
    assert read(uri, index) == {"a.png": b"abc"}


def test_bytes_behind_a_zip_are_ignored(tmp_path: Path) -> None:
    uri = put(tmp_path, zip_bytes(FILES.items()) + b"\r\n" * 9, "shard.zip")
    index = index_archive(uri)
    assert index.problem is None
    assert read(uri, index) == FILES


def test_bytes_between_the_directory_and_the_end_record_of_a_zip_are_ignored(tmp_path: Path) -> None:
    data = zip_bytes(FILES.items())
    uri = put(tmp_path, data[:-22] + b"PK\5\5\4\0sign" + data[-22:], "shard.zip")
    index = index_archive(uri)
    assert index.problem is None
    assert read(uri, index) == FILES


def test_an_end_record_may_count_65536_members_less_than_there_are(tmp_path: Path) -> None:
    data = zip_bytes(FILES.items())
    uri = put(tmp_path, patched(data, len(data) - 12, struct.pack("<H", 2)), "shard.zip")
    index = index_archive(uri)
    assert index.problem is None
    assert read(uri, index) == FILES


# --- names and kinds of members

ODD_NAMES = [
    "../../etc/up.png",
    "/etc/absolute.png",
    "./here.png",
    "kätzchen/猫🐈.png",
    "a b!c\\d.png",
    "x" * 300 + ".png",
]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_name_is_kept_as_text(tmp_path: Path, format: int) -> None:
    index = index_archive(put(tmp_path, tar_bytes([(name, b"x") for name in ODD_NAMES], format=format)))
    assert names(index) == ODD_NAMES


def test_a_zip_name_is_kept_as_text(tmp_path: Path) -> None:
    index = index_archive(put(tmp_path, zip_bytes([(name, b"x") for name in ODD_NAMES]), "shard.zip"))
    assert names(index) == ODD_NAMES


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_bytes_that_are_no_unicode_become_text(tmp_path: Path, format: int) -> None:
    name = b"caf\xe9.png".decode(errors="surrogateescape")
    index = index_archive(put(tmp_path, tar_bytes([(name, b"x")], format=format)))
    assert names(index) == ["caf\\xe9.png"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_of_members_of_one_name_the_last_counts(tmp_path: Path, suffix: str) -> None:
    files = [("a.png", b"old"), ("b.png", b"other"), ("a.png", b"newer"), ("a.png", b"newest")]
    data = zip_bytes(files) if suffix == ".zip" else COMPRESSIONS[suffix](tar_bytes(files))
    uri = put(tmp_path, data, f"shard{suffix}")
    index = index_archive(uri)
    assert index.duplicates == 2
    assert list(read(uri, index).items()) == [("b.png", b"other"), ("a.png", b"newest")]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_of_a_tar_only_files_and_links_are_listed(tmp_path: Path, suffix: str) -> None:
    others = [
        tar_header("folder.png", 0, kind=tarfile.DIRTYPE),
        tar_header("symbolic.png", 0, kind=tarfile.SYMTYPE, link="a/one.png"),
        tar_header("device.png", 0, kind=tarfile.CHRTYPE),
        tar_header("pipe.png", 0, kind=tarfile.FIFOTYPE),
        tar_header("hard.png", 0, kind=tarfile.LNKTYPE, link="b/more.png"),
        tar_header("again.png", 0, kind=tarfile.LNKTYPE, link="hard.png"),
    ]
    uri = put(tmp_path, COMPRESSIONS[suffix](tar_bytes(FILES.items(), *others)), f"shard{suffix}")
    more = FILES["b/more.png"]
    links = {"symbolic.png": b"1", "hard.png": more, "again.png": more}
    assert read(uri, index_archive(uri)) == FILES | links


def test_a_hard_link_to_nothing_is_missing(tmp_path: Path) -> None:
    link = tar_header("hard.png", 0, kind=tarfile.LNKTYPE, link="gone.png")
    uri = put(tmp_path, tar_bytes([("a.png", b"x")], link))
    assert str(index_archive(uri).members[1].problem) == (
        "missing: a hard link to 'gone.png', which is not a file in the archive"
    )
    assert statuses(uri) == ("ok", ["ok", "missing"])


def test_a_file_with_holes_is_unsupported_and_does_not_disturb_the_next(tmp_path: Path) -> None:
    holes = tar_header("holes.png", 1024)
    holes.pax_headers = {"GNU.sparse.map": "0,512,90000,512", "GNU.sparse.size": "90512"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(holes, io.BytesIO(bytes(1024)))
        tar.addfile(tar_header("next.png", 3), io.BytesIO(b"abc"))
    uri = put(tmp_path, buffer.getvalue())
    index = index_archive(uri)
    assert [(member.size_bytes, member.stored_bytes) for member in index.members] == [(90512, 1024), (3, 3)]
    assert read(uri, index) == {"holes.png": "unsupported", "next.png": b"abc"}


def zip_link(name: str) -> zipfile.ZipInfo:
    link = zipfile.ZipInfo(name)
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return link


def test_of_a_zip_only_files_and_links_are_listed(tmp_path: Path) -> None:
    link = (zip_link("link.png"), b"a.png")
    uri = put(tmp_path, zip_bytes([("folder.png/", b""), link, ("a.png", b"x")]), "s.zip")
    assert read(uri, index_archive(uri)) == {"link.png": b"x", "a.png": b"x"}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_a_member_without_bytes_is_empty(tmp_path: Path, suffix: str) -> None:
    files = [("none.png", b""), ("some.png", b"x")]
    data = zip_bytes(files) if suffix == ".zip" else COMPRESSIONS[suffix](tar_bytes(files))
    uri = put(tmp_path, data, f"shard{suffix}")
    assert read(uri, index_archive(uri)) == {"none.png": "empty", "some.png": b"x"}


def made_zip(entries: Iterable["ZipEntry"]) -> bytes:
    """A zip of stored members as other programs write them."""
    data, directory = b"", b""
    count = 0
    for entry in entries:
        crc = zlib.crc32(entry.data)
        sizes = struct.pack("<HHHHHLLL", 20, entry.flags, entry.method, 0, 0, crc, entry.stored, entry.size)
        lengths = struct.pack("<HH", len(entry.name), len(entry.extra))
        directory += b"PK\1\2" + struct.pack("<H", 20) + sizes + lengths
        directory += struct.pack("<HHHLL", 0, 0, 0, entry.attributes, len(data)) + entry.name + entry.extra
        data += b"PK\3\4" + sizes + lengths + entry.name + entry.extra + entry.packed
        count += 1
    return data + directory + struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, count, count, len(directory), len(data), 0)


@dataclass(frozen=True)
class ZipEntry:
    name: bytes
    data: bytes = b"the file"
    flags: int = 0
    extra: bytes = b""
    method: int = 0
    compressed: bytes | None = None
    claimed: int | None = None
    attributes: int = 0

    @property
    def packed(self) -> bytes:
        return self.data if self.compressed is None else self.compressed

    @property
    def stored(self) -> int:
        return len(self.packed)

    @property
    def size(self) -> int:
        return len(self.data) if self.claimed is None else self.claimed


def unicode_path(name: bytes, path: bytes, *, version: int = 1) -> bytes:
    return struct.pack("<HHBL", 0x7075, 5 + len(path), version, zlib.crc32(name)) + path


UTF8 = 0x800


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (ZipEntry("Crémieux.jpg".encode(), flags=UTF8), "Crémieux.jpg"),
        (ZipEntry("Crémieux.jpg".encode()), "Crémieux.jpg"),  # Info-ZIP
        (ZipEntry("Crémieux.jpg".encode("cp437")), "Crémieux.jpg"),
        (ZipEntry(b"caf\xff.png", flags=UTF8), "caf\\xff.png"),
        (ZipEntry(b"a\0b.png"), "a\\x00b.png"),
        (ZipEntry(b"__.png", extra=unicode_path(b"__.png", "日本.png".encode())), "日本.png"),
        (ZipEntry(b"__.png", extra=b"UT\1\0\7" + unicode_path(b"__.png", "日本.png".encode())), "日本.png"),
        (ZipEntry(b"__.png", extra=unicode_path(b"old.png", "日本.png".encode())), "__.png"),  # renamed since
        (ZipEntry(b"__.png", extra=unicode_path(b"__.png", b"\xff.png")), "__.png"),
        (ZipEntry(b"__.png", extra=unicode_path(b"__.png", b"")), "__.png"),
        (ZipEntry(b"__.png", extra=unicode_path(b"__.png", b"a.png", version=2)), "__.png"),
        (ZipEntry("é.png".encode(), flags=UTF8, extra=unicode_path("é.png".encode(), b"a.png")), "é.png"),
    ],
)
def test_a_zip_name_is_read_as_its_writer_meant_it(tmp_path: Path, entry: ZipEntry, name: str) -> None:
    uri = put(tmp_path, made_zip([ZipEntry(b"first.png"), entry]), "shard.zip")
    index = index_archive(uri)
    assert index.problem is None
    assert read(uri, index) == {"first.png": b"the file", name: b"the file"}


def test_two_members_told_apart_by_their_unicode_paths_are_two(tmp_path: Path) -> None:
    paths = ["日本.png".encode(), "中国.png".encode()]
    data = made_zip(ZipEntry(b"__.png", path, extra=unicode_path(b"__.png", path)) for path in paths)
    uri = put(tmp_path, data, "shard.zip")
    index = index_archive(uri)
    assert index.duplicates == 0
    assert read(uri, index) == {"日本.png": paths[0], "中国.png": paths[1]}


@pytest.mark.parametrize(
    "extra",
    [b"x", b"ux\xff", b"ux2\0\1\4", b"up\xff\xff", b"up\1\0\1", b"\1\0\xff\xff", b"\1\0\0\0"],
)
def test_an_odd_extra_field_does_not_matter(tmp_path: Path, extra: bytes) -> None:
    entries = [ZipEntry(b"a.png"), ZipEntry(b"b.png", extra=extra), ZipEntry(b"c.png")]
    uri = put(tmp_path, made_zip(entries), "shard.zip")
    index = index_archive(uri)
    assert index.problem is None
    assert read(uri, index) == dict.fromkeys(["a.png", "b.png", "c.png"], b"the file")


@pytest.mark.parametrize("extra", [b"", b"\1\0\x08\0", b"\1\0\7\0" + bytes(7), b"ux\x08\0" + bytes(8)])
def test_a_member_whose_zip64_field_is_missing_is_one_bad_member(tmp_path: Path, extra: bytes) -> None:
    entries = [ZipEntry(b"a.png"), ZipEntry(b"b.png", extra=extra, claimed=2**32 - 1), ZipEntry(b"c.png")]
    uri = put(tmp_path, made_zip(entries), "shard.zip")
    index = index_archive(uri)
    assert index.problem is None
    assert str(index.members[1].problem) == "unreadable: the zip directory does not say its size or position"
    assert read(uri, index) == {"a.png": b"the file", "b.png": "unreadable", "c.png": b"the file"}


def test_a_size_beyond_any_file_is_bounded(tmp_path: Path) -> None:
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
    uri = put(tmp_path, made_zip([ZipEntry(b"a.png", extra=extra, claimed=2**32 - 1)]), "shard.zip")
    (member,) = index_archive(uri).members
    assert 2**40 < member.size_bytes < 2**63  # fits a column of the manifest
    assert read(uri, index_archive(uri)) == {"a.png": "too_large"}


def test_an_lzma_member_that_repeats_itself_far_away_is_read(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(60_000) * 2
    uri = put(tmp_path, zip_bytes([("a.png", data)], zipfile.ZIP_LZMA), "shard.zip")
    assert read(uri, index_archive(uri)) == {"a.png": data}


def test_a_zstd_bomb_costs_no_memory(tmp_path: Path) -> None:
    entry = ZipEntry(b"a.png", b"x", method=93, compressed=zstd(bytes(2**20)) * 100)
    uri = put(tmp_path, made_zip([entry]), "shard.zip")
    members = index_archive(uri).members
    tracemalloc.start()
    try:
        (image,) = read_members(uri, members, max_bytes=MAX_BYTES)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert status(image) == "unreadable"
    assert peak_bytes < 5 * 2**20


@pytest.mark.parametrize("method", [93, 20])
@pytest.mark.parametrize("frames", [1, 3])
def test_zstd_members_are_read(tmp_path: Path, method: int, frames: int) -> None:
    entries = [
        ZipEntry(name.encode(), data * frames, method=method, compressed=zstd(data) * frames)
        for name, data in FILES.items()
    ]
    uri = put(tmp_path, made_zip(entries), "shard.zip")
    index = index_archive(uri)
    assert {member.packing for member in index.members} == {"zstd"}
    assert read(uri, index) == {name: data * frames for name, data in FILES.items()}


@pytest.mark.parametrize(
    ("compressed", "claimed"),
    [
        (zstd(b"abc" * 9)[:-3], 27),
        (zstd(b"abc" * 9), 26),
        (zstd(b"abc" * 9), 28),
        (zstd(b"abd" * 9), 27),
        (zstd(bytes(5 * 2**20)), 27),
        (b"no zstd at all", 27),
        (b"\x28\xb5\x2f\xfd\0\xff" + bytes(20), 27),  # a window of terabytes
    ],
    ids=["cut", "longer", "shorter", "other bytes", "bomb", "not zstd", "window"],
)
def test_damaged_zstd_is_unreadable(tmp_path: Path, compressed: bytes, claimed: int) -> None:
    entry = ZipEntry(b"a.png", b"abc" * 9, method=93, compressed=compressed, claimed=claimed)
    uri = put(tmp_path, made_zip([entry, ZipEntry(b"b.png")]), "shard.zip")
    assert statuses(uri) == ("ok", ["unreadable", "ok"])


# --- links


def symbolic(name: str, target: str) -> tarfile.TarInfo:
    return tar_header(name, 0, kind=tarfile.SYMTYPE, link=target)


def hard(name: str, target: str) -> tarfile.TarInfo:
    return tar_header(name, 0, kind=tarfile.LNKTYPE, link=target)


def with_links(suffix: str, links: list[tuple[str, str]], files: dict[str, bytes]) -> bytes:
    """An archive of symbolic links, then files."""
    if suffix == ".zip":
        return zip_bytes([*((zip_link(name), target.encode()) for name, target in links), *files.items()])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, target in links:
            tar.addfile(symbolic(name, target))
        for name, data in files.items():
            tar.addfile(tar_header(name, len(data)), io.BytesIO(data))
    return COMPRESSIONS[suffix](buffer.getvalue())


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
@pytest.mark.parametrize(
    ("links", "file"),
    [
        ([("link.png", "a.png")], "a.png"),
        ([("link.png", "./x/../a.png")], "a.png"),
        ([("class/link.png", "../store/a.png")], "store/a.png"),
        ([("./class/link.png", "../store//a.png")], "./store/a.png"),
        ([("link.png", "/".join(["x", ".."] * 50) + "/a.png")], "a.png"),
        ([("link.png", "kätzchen.png")], "kätzchen.png"),
        ([("/abs/link.png", "a.png")], "/abs/a.png"),
        ([("b/link.png", "../c/second.png"), ("c/second.png", "third.png"), ("c/third.png", "../a.png")], "a.png"),
        ([("link.png", "new/a.png"), ("new", "versions/2")], "versions/2/a.png"),
        ([("link.png", "new/../a.png"), ("new", "versions/2")], "versions/a.png"),  # as on disk
        ([("1/link.png", "a.png"), ("1/a.png", "../l/x.png"), ("l", "deep/er")], "deep/er/x.png"),
        ([("link.png", "0.png"), *((f"{n}.png", f"{n + 1}.png") for n in range(38)), ("38.png", "a.png")], "a.png"),
    ],
)
def test_a_symbolic_link_gives_the_bytes_of_its_file(
    tmp_path: Path, suffix: str, links: list[tuple[str, str]], file: str
) -> None:
    uri = put(tmp_path, with_links(suffix, links, {"other.png": b"other", file: b"the file"}), f"shard{suffix}")
    index = index_archive(uri)
    members = {member.name: member for member in index.members}
    link = next(name for name, _ in links if name.endswith("link.png"))
    assert (index.problem, index.duplicates) == (None, 0)
    assert members[link] == replace(members[file], name=link)
    assert read(uri, index)[link] == b"the file"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
@pytest.mark.parametrize(
    ("links", "why"),
    [
        ([("link.png", "gone.png")], "'gone.png', which is not a file in the archive"),
        ([("link.png", ".")], "'.', which is not a file in the archive"),
        ([("link.png", "folder")], "'folder', which is not a file in the archive"),
        ([("x/link.png", "../folder/")], "'../folder/', which is not a file in the archive"),
        ([("link.png", "/folder/a.png")], "'/folder/a.png', which is not inside the archive"),
        ([("x/link.png", "../../folder/a.png")], "'../../folder/a.png', which is not inside the archive"),
        ([("link.png", "up/a.png"), ("up", "/folder")], "'up/a.png', which is not inside the archive"),
        ([("link.png", "link.png")], "'link.png', which leads through too many links or folders"),
        ([("link.png", "b.png"), ("b.png", "link.png")], "'b.png', which leads through too many links or folders"),
        ([("link.png", "loop/a.png"), ("loop", "loop/x")], "'loop/a.png', which leads through too many links"),
        ([("link.png", "x/" * 500 + "a.png")], "which leads through too many links or folders"),
        (
            [("link.png", "0.png"), *((f"{n}.png", f"{n + 1}.png") for n in range(39)), ("39.png", "folder/a.png")],
            "'0.png', which leads through too many links or folders",
        ),
    ],
)
def test_a_symbolic_link_that_leads_to_no_file_is_missing_and_names_its_target(
    tmp_path: Path, suffix: str, links: list[tuple[str, str]], why: str
) -> None:
    uri = put(tmp_path, with_links(suffix, links, {"folder/a.png": b"the file"}), f"shard{suffix}")
    link = next(member for member in index_archive(uri).members if member.name.endswith("link.png"))
    assert status(link.problem) == "missing"
    assert why in str(link.problem)
    assert read(uri, index_archive(uri))["folder/a.png"] == b"the file"


def test_a_link_to_the_root_is_missing_beside_a_member_outside_of_it(tmp_path: Path) -> None:
    uri = put(tmp_path, with_links(".tar", [("link.png", ".")], {"../up.png": b"x"}))
    assert read(uri, index_archive(uri)) == {"link.png": "missing", "../up.png": b"x"}


def test_a_link_with_a_target_longer_than_any_path_is_missing(tmp_path: Path) -> None:
    name = "x" * 9000 + ".png"
    uri = put(tmp_path, with_links(".tar", [("link.png", name)], {name: b"x"}))
    (link, _) = index_archive(uri).members
    assert status(link.problem) == "missing"
    assert len(str(link.problem)) < 500


def test_a_hard_link_leads_to_a_later_file_and_to_a_link(tmp_path: Path) -> None:
    links = {"x/early.png": "./b.png", "abs.png": "/b.png", "h.png": "x/s.png"}
    first = tar_bytes([], *(hard(*link) for link in links.items()), symbolic("x/s.png", "../b.png"))
    data = first[: 4 * BLOCK_BYTES] + tar_bytes([("b.png", b"the file")])
    uri = put(tmp_path, data)
    assert read(uri, index_archive(uri)) == dict.fromkeys([*links, "x/s.png", "b.png"], b"the file")


def test_a_hard_link_keeps_the_file_that_a_later_one_replaces_and_a_symbolic_link_does_not(tmp_path: Path) -> None:
    links = [hard("hard.png", "a.png"), symbolic("symbolic.png", "a.png")]
    data = tar_bytes([("a.png", b"old")], *links)[: 4 * BLOCK_BYTES] + tar_bytes([("a.png", b"new")])
    uri = put(tmp_path, data)
    assert read(uri, index_archive(uri)) == {"hard.png": b"old", "symbolic.png": b"new", "a.png": b"new"}


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_a_file_replaces_a_link_of_its_name(tmp_path: Path, suffix: str) -> None:
    uri = put(tmp_path, with_links(suffix, [("a.png", "b.png")], {"a.png": b"a", "b.png": b"b"}), f"shard{suffix}")
    index = index_archive(uri)
    assert index.duplicates == 1
    assert read(uri, index) == {"a.png": b"a", "b.png": b"b"}


def test_a_link_to_a_cut_off_file_is_truncated(tmp_path: Path) -> None:
    uri = put(tmp_path, with_links(".tar", [("link.png", "a.png")], {"a.png": bytes(900)})[:1600])
    assert statuses(uri) == ("truncated", ["truncated", "truncated"])


@pytest.mark.parametrize(
    ("target", "word", "reason"),
    [
        (b"x" * 4097, "too_large", "4,097 bytes are more than 4,096"),
        (b"", "empty", "the member has no bytes"),
    ],
)
def test_a_zip_link_whose_target_cannot_be_read_is_a_bad_member(
    tmp_path: Path, target: bytes, word: str, reason: str
) -> None:
    uri = put(tmp_path, zip_bytes([(zip_link("link.png"), target), ("a.png", b"x")]), "shard.zip")
    (link, _) = index_archive(uri).members
    assert status(link.problem) == word
    assert reason in str(link.problem)


def test_a_zip_link_is_followed_where_names_are_not_unicode(tmp_path: Path) -> None:
    mode = (stat.S_IFLNK | 0o777) << 16
    entries = [ZipEntry(b"link.png", b"caf\x82.png", attributes=mode), ZipEntry(b"caf\x82.png")]
    uri = put(tmp_path, made_zip(entries), "shard.zip")
    assert read(uri, index_archive(uri)) == {"link.png": b"the file", "café.png": b"the file"}


def test_the_targets_of_zip_links_cost_few_requests() -> None:
    store = CountingStore()
    links = [(f"{n}.png", f"../store/{n}.png") for n in range(300)]
    files = {f"store/{n}.png": bytes([n % 256]) * 3000 for n in range(300)}
    data = with_links(".zip", [(f"class/{name}", target) for name, target in links], files)
    store.write_bytes("memory://b/a.zip", data)
    index = index_archive("memory://b/a.zip", store=store)
    assert not any(member.problem for member in index.members)
    assert store.ranges <= len(data) // 2**20 + 4


# --- archives that are not there, or none


def test_an_archive_that_is_not_there_is_missing(tmp_path: Path) -> None:
    index = index_archive(str(tmp_path / "no.tar"))
    assert (index.members, status(index.problem)) == ((), "missing")
    (tmp_path / "folder.tar").mkdir()
    assert status(index_archive(str(tmp_path / "folder.tar")).problem) == "missing"


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("a.tar", b"", "empty"),
        ("a.zip", b"", "empty"),
        ("a.tar.gz", gz(b""), "empty"),
        ("a.tar", b"no tar, but long enough to be a header" * 100, "unreadable"),
        ("a.zip", b"no zip" * 100, "unreadable"),
        ("a.zip", b"no", "unreadable"),
        ("a.tar.gz", gz(b"no tar" * 1000), "unreadable"),
        ("a.tar.gz", gz(b"")[:10] + b"no gzip" * 100, "unreadable"),
        ("a.tar.xz", b"\xfd7zXZ\0" + b"no xz" * 100, "unreadable"),
        ("a.tar.bz2", b"BZh91AY&SY" + b"no bzip2" * 100, "unreadable"),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd" + b"no zstd" * 100, "unreadable"),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd", "truncated"),
        ("a.tar.zst", b"\x50\x2a\x4d\x18\0\0\0\0", "empty"),
    ],
)
def test_what_is_no_archive_has_a_problem_and_no_members(tmp_path: Path, name: str, data: bytes, word: str) -> None:
    index = index_archive(put(tmp_path, data, name))
    assert (index.members, status(index.problem)) == ((), word)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (FileNotFoundError(errno.ENOENT, "gone"), "missing"),
        (PermissionError(errno.EACCES, "access denied"), "denied"),
        (OSError(errno.EIO, "bad sector"), "failed"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gz, zstd])
def test_what_the_storage_says_of_the_archive_is_said_of_each_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, word: str, compress: Callable[[bytes], bytes]
) -> None:
    uri = put(tmp_path, compress(tar_bytes(FILES.items())))
    index = index_archive(uri)

    def fail(*_: object) -> bytes:
        raise error

    for name in ("entry_of", "open_binary", "read_range"):
        monkeypatch.setattr(ANYWHERE, name, fail)  # not by a file's mode: root may read everything
    assert set(read(uri, index).values()) == {word}
    assert status(index_archive(uri).problem) == word


@pytest.mark.parametrize("compress", [bytes, gz, zstd])
def test_a_failing_service_is_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    uri = put(tmp_path, compress(tar_bytes(FILES.items())))
    index = index_archive(uri)

    def fail(*_: object) -> bytes:
        raise ServiceError("no connection")

    for name in ("open_binary", "read_range"):
        monkeypatch.setattr(ANYWHERE, name, fail)
    with pytest.raises(ServiceError, match="no connection"):
        read(uri, index)
    with pytest.raises(ServiceError, match="no connection"):
        index_archive(uri)


# --- damaged tars

THREE = [("a.png", b"a" * 700), ("b.png", b"b" * 300), ("c.png", b"c" * 1500)]
USTAR = tar_bytes(THREE, format=tarfile.USTAR_FORMAT)  # headers at 0, 1536 and 2560, data of c.png at 3072 to 4572


@pytest.mark.parametrize(
    ("size_bytes", "word", "members"),
    [
        (100, "truncated", []),
        (512, "truncated", ["truncated"]),
        (1000, "truncated", ["truncated"]),
        (512 + 700, "truncated", ["ok"]),  # the data are whole, their padding is not
        (1536, "ok", ["ok"]),  # nobody can know
        (1536 + 200, "truncated", ["ok"]),
        (2560 + 511, "truncated", ["ok", "ok"]),
        (4571, "truncated", ["ok", "ok", "truncated"]),
        (4608, "ok", ["ok", "ok", "ok"]),  # only the end mark is missing
        (4608 + 512, "ok", ["ok", "ok", "ok"]),
        (4608 + 100, "ok", ["ok", "ok", "ok"]),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gz, zstd])
def test_a_tar_that_is_cut_gives_what_comes_before(
    tmp_path: Path, size_bytes: int, word: str, members: list[str], compress: Callable[[bytes], bytes]
) -> None:
    assert statuses(put(tmp_path, compress(USTAR[:size_bytes]))) == (word, members)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_tar_that_is_cut_between_a_long_name_and_its_file_is_truncated(tmp_path: Path, format: int, cut: int) -> None:
    first = tar_bytes([("a.png", b"x")], format=format)[:1024]
    second = tar_bytes([("d" * 200 + "/b.png", b"y")], format=format)
    assert statuses(put(tmp_path, first + second[: cut * BLOCK_BYTES])) == (
        "truncated",
        ["ok"] + ["truncated"] * (cut == 3),  # its header is there, its data are not
    )


@pytest.mark.parametrize("compress", [bytes, gz, zstd])
def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    index = index_archive(put(tmp_path, compress(patched(USTAR, 1536, b"?"))))
    assert names(index) == ["a.png"]
    assert index.problem is not None
    assert str(index.problem) == "unreadable: the header at byte 1536 is damaged: bad checksum"


@pytest.mark.parametrize("size_bytes", [-1, -512, -1024, -4096, 2**70])
@pytest.mark.parametrize("compress", [bytes, gz, zstd])
def test_an_impossible_size_ends_the_list(tmp_path: Path, size_bytes: int, compress: Callable[[bytes], bytes]) -> None:
    field = (b"\x80" if size_bytes > 0 else b"\xff") + (size_bytes % 2**88).to_bytes(11, "big")
    header = with_checksum(patched(USTAR[1536:2048], 124, field))
    index = index_archive(put(tmp_path, compress(patched(USTAR, 1536, header))))
    assert (names(index), status(index.problem)) == (["a.png"], "unreadable")


def test_a_header_that_claims_gigabytes_of_attributes_is_not_read(tmp_path: Path) -> None:
    header = tar_header("x", 8 * 2**30, kind=tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT)
    index = index_archive(put(tmp_path, USTAR[:1536] + header + USTAR[1536:]))
    assert (names(index), status(index.problem)) == (["a.png"], "unreadable")


def test_a_tar_of_nothing_but_long_names_is_unreadable(tmp_path: Path) -> None:
    header = tar_header("x", 0, kind=tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    assert statuses(put(tmp_path, header * 5000)) == ("unreadable", [])


# of small blocks, and fast
FAST: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gz,
    "bzip2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstd": zstd,
}


@pytest.mark.parametrize("compression", FAST)
def test_a_compressed_tar_that_is_cut_is_truncated(tmp_path: Path, compression: str) -> None:
    files = [(f"{n}.png", random.Random(n).randbytes(60_000 + n)) for n in range(10)]
    data = FAST[compression](tar_bytes(files))
    uri = put(tmp_path, data[: len(data) * 2 // 3])
    index = index_archive(uri)
    assert status(index.problem) == "truncated"
    assert 1 <= len(index.members) < len(files)
    assert [status(member.problem) for member in index.members] == ["ok"] * (len(index.members) - 1) + ["truncated"]


def test_a_compressed_tar_that_lacks_its_last_bytes_is_truncated_and_whole_inside(tmp_path: Path) -> None:
    assert statuses(put(tmp_path, gz(USTAR)[:-3])) == ("truncated", ["ok", "ok", "ok"])


def test_a_wrong_checksum_of_a_compressed_tar_is_found(tmp_path: Path) -> None:
    data = gz(USTAR)
    index = index_archive(put(tmp_path, patched(data, len(data) - 8, b"crc!")))
    assert status(index.problem) == "unreadable"
    assert "CRC" in str(index.problem)


@pytest.mark.parametrize("compression", FAST)
def test_where_a_stream_breaks_off_the_rest_is_truncated(tmp_path: Path, compression: str) -> None:
    files = [(f"{n}.png", random.Random(n).randbytes(60_000 + n)) for n in range(10)]
    data = FAST[compression](tar_bytes(files))
    uri = put(tmp_path, data)
    index = index_archive(uri)
    put(tmp_path, data[: len(data) * 2 // 3])
    found = [status(image) for image in read_members(uri, index.members, max_bytes=MAX_BYTES)]
    whole = found.count("ok")
    assert 4 <= whole <= 6  # of bzip2 the whole blocks, 100 kB each
    assert found == ["ok"] * whole + ["truncated"] * (10 - whole)


def test_where_a_stream_is_damaged_the_rest_is_unreadable(tmp_path: Path) -> None:
    data = gz(tar_bytes(FILES.items()))
    uri = put(tmp_path, data)
    index = index_archive(uri)
    put(tmp_path, patched(data, 700, bytes(300)))
    found = list(read(uri, index).values())
    assert found[:2] == list(FILES.values())[:2]
    assert found[3:] == ["unreadable", "unreadable"]


@pytest.mark.parametrize("compress", [bytes, gz, zstd])
def test_members_of_an_archive_that_became_shorter_are_truncated(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    uri = put(tmp_path, compress(USTAR))
    index = index_archive(uri)
    put(tmp_path, compress(USTAR[:2560]))
    assert read(uri, index) == {"a.png": b"a" * 700, "b.png": b"b" * 300, "c.png": "truncated"}


def test_a_stream_that_became_another_is_unreadable(tmp_path: Path) -> None:
    uri = put(tmp_path, gz(tar_bytes(FILES.items())))
    index = index_archive(uri)
    put(tmp_path, gz(tar_bytes((name, data + b"+") for name, data in FILES.items())))
    assert set(read(uri, index).values()) == {"unreadable"}


def xz_asking_for_memory(data: bytes) -> bytes:
    """An xz stream whose header announces a dictionary of 1.5 GiB; the decompressor allocates it before it reads on."""
    packed = lzma.compress(data, preset=0)
    header_bytes = (packed[12] + 1) * 4  # of the block header, which follows the 12 bytes of the stream header
    header = bytearray(packed[12 : 12 + header_bytes - 4])
    header[header.index(b"\x21\x01") + 2] = 37  # LZMA2 with one byte of properties: the size of the dictionary
    return patched(packed, 12, bytes(header), struct.pack("<L", zlib.crc32(header)))


def test_an_xz_stream_gets_no_gigabytes_of_memory(tmp_path: Path) -> None:
    uri = put(tmp_path, xz_asking_for_memory(tar_bytes(FILES.items())))
    assert str(index_archive(uri).problem) == "unreadable: Memory usage limit exceeded"


@pytest.mark.parametrize("padding", [4, 2**17])
def test_zero_bytes_between_and_behind_xz_streams_are_skipped(tmp_path: Path, padding: int) -> None:
    data = tar_bytes(FILES.items())
    parts = (lzma.compress(data[:6000]), bytes(padding), lzma.compress(data[6000:]), bytes(padding))
    uri = put(tmp_path, b"".join(parts))
    index = index_archive(uri)
    assert index.problem is None
    assert read(uri, index) == FILES


def test_a_damaged_checksum_of_zstd_is_found(tmp_path: Path) -> None:
    # a frame with a checksum, which pyarrow does not write: magic, flags, window, one raw block, checksum
    data = tar_bytes([("a.png", b"abc")])
    frame = b"\x28\xb5\x2f\xfd\x04\x70" + (len(data) << 3 | 1).to_bytes(3, "little") + data + b"\0\0\0\0"
    index = index_archive(put(tmp_path, frame))
    assert (names(index), status(index.problem)) == ([], "unreadable")
    assert "checksum" in str(index.problem)


@pytest.mark.parametrize("compress", [bytes, gz, lzma.compress, zstd])
def test_a_service_that_fails_in_the_middle_is_no_damage(compress: Callable[[bytes], bytes]) -> None:
    store = FailingStore()
    files = [(f"{n}.png", random.Random(n).randbytes(500_000)) for n in range(3)]
    store.write_bytes("memory://b/a.tar", compress(tar_bytes(files)))
    index = index_archive("memory://b/a.tar", store=store)
    store.fails_from = 2**20
    with pytest.raises(ServiceError, match="no connection"):
        index_archive("memory://b/a.tar", store=store)
    with pytest.raises(ServiceError, match="no connection"):
        list(read_members("memory://b/a.tar", index.members, max_bytes=MAX_BYTES, store=store))


def test_attributes_over_which_tarfile_would_spend_minutes_end_the_list(tmp_path: Path) -> None:
    data_bytes = 2**20 - 1024
    header = tar_header("x", data_bytes, kind=tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT)
    index = index_archive(put(tmp_path, USTAR[:1536] + header + b"1" * data_bytes + USTAR[1536:]))
    assert names(index) == ["a.png"]
    assert "256 digits or more in a row" in str(index.problem)


def test_a_thousand_attributes_for_all_members_end_the_list(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    attributes = {f"key{n}": "x" for n in range(1001)}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=attributes) as tar:
        tar.addfile(tar_header("a.png", 0))
    index = index_archive(put(tmp_path, buffer.getvalue()))
    assert (index.members, status(index.problem)) == ((), "unreadable")


def test_headers_of_one_member_are_bounded_together(tmp_path: Path) -> None:
    long_name = tar_header("x", 2**19, kind=tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT) + bytes(2**19)
    index = index_archive(put(tmp_path, USTAR[:1536] + long_name * 3 + USTAR[1536:]))
    assert (names(index), status(index.problem)) == (["a.png"], "unreadable")


def test_headers_of_many_members_may_be_large_together(tmp_path: Path) -> None:
    index = index_archive(put(tmp_path, tar_bytes((f"{n}.png", b"") for n in range(2100))))
    assert (len(index.members), index.problem) == (2100, None)


def test_a_false_size_of_a_sparse_file_is_bounded(tmp_path: Path) -> None:
    holes = tar_header("holes.png", 1024)
    holes.pax_headers = {"GNU.sparse.map": f"0,{10**30}", "GNU.sparse.size": "90512"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(holes, io.BytesIO(bytes(1024)))
    (member,) = index_archive(put(tmp_path, buffer.getvalue())).members
    assert 0 <= member.stored_bytes < 2**63


# --- damaged zips


def zip_directory(data: bytes) -> int:
    """Where the only entry of the directory begins."""
    return data.index(b"PK\1\2")


@pytest.mark.parametrize("kept", [20, 1000, zip_directory(zip_bytes(FILES.items()))])
def test_a_zip_without_its_directory_is_truncated(tmp_path: Path, kept: int) -> None:
    index = index_archive(put(tmp_path, zip_bytes(FILES.items())[:kept], "shard.zip"))
    assert (index.members, status(index.problem)) == ((), "truncated")


@pytest.mark.parametrize(("cut", "members"), [(1, 5), (21, 5), (22, 5), (23, 4), (80, 3), (63 + 22, 3), (300, 0)])
def test_a_zip_cut_in_its_directory_gives_the_members_before(tmp_path: Path, cut: int, members: int) -> None:
    data = zip_bytes(FILES.items())
    index = index_archive(put(tmp_path, data[:-cut], "shard.zip"))
    assert status(index.problem) == "truncated"
    assert names(index) == list(FILES)[:members]


@pytest.mark.parametrize("data", [b"PK\1\2" * 99, zip_bytes(FILES.items())[-400:], made_zip([ZipEntry(b"c.png")] * 5)])
def test_what_looks_like_a_directory_inside_a_member_is_not_taken_for_it(tmp_path: Path, data: bytes) -> None:
    whole = zip_bytes([("a.png", data), ("b.png", b"b")])
    uri = put(tmp_path, whole[:-9], "shard.zip")
    assert read(uri, index_archive(uri)) == {"a.png": data, "b.png": b"b"}


@pytest.mark.parametrize("number", [1, 3])
def test_a_damaged_directory_gives_the_members_before_the_damage(tmp_path: Path, number: int) -> None:
    data = zip_bytes(FILES.items())
    entries = [match.start() for match in re.finditer(b"PK\1\2", data)]
    uri = put(tmp_path, patched(data, entries[number], b"??"), "shard.zip")
    index = index_archive(uri)
    assert str(index.problem) == f"unreadable: the directory of the zip is damaged at byte {entries[number]}"
    assert read(uri, index) == dict(list(FILES.items())[:number])


def test_a_directory_that_lacks_entries_is_damaged(tmp_path: Path) -> None:
    data = zip_bytes(FILES.items())
    last = data.rindex(b"PK\1\2")
    index = index_archive(put(tmp_path, data[:last] + data[-22:], "shard.zip"))
    assert (names(index), status(index.problem)) == (list(FILES)[:-1], "unreadable")


@pytest.mark.parametrize(
    ("position", "value"),
    [(16, b"\xff" * 4), (16, b"\0\0\0\x80"), (12, b"\xff" * 4), (12, b"\1\0\0\0"), (10, b"\1\0\1\0\0\0")],
)
def test_a_directory_is_found_by_its_size_or_by_its_position(tmp_path: Path, position: int, value: bytes) -> None:
    data = zip_bytes([("a.png", b"abc"), ("b.png", b"abc")])
    index = index_archive(put(tmp_path, patched(data, len(data) - 22 + position, value), "a.zip"))
    assert (names(index), index.problem) == (["a.png", "b.png"], None)


def test_an_end_record_that_leads_nowhere_is_unreadable(tmp_path: Path) -> None:
    data = zip_bytes([("a.png", b"abc")])
    uri = put(tmp_path, patched(data, len(data) - 10, b"\xff" * 8), "a.zip")
    assert statuses(uri) == ("unreadable", [])


def test_an_entry_that_runs_into_the_end_record_is_damage(tmp_path: Path) -> None:
    data = zip_bytes([("a.png", b"abc"), ("b.png", b"abc")])
    last = data.rindex(b"PK\1\2")
    index = index_archive(put(tmp_path, patched(data, last + 32, b"\1\0"), "a.zip"))  # the length of its comment
    assert names(index) == ["a.png"]
    assert str(index.problem) == f"unreadable: the directory of the zip is damaged at byte {last}"


def test_a_zip_with_a_damaged_directory_is_unreadable(tmp_path: Path) -> None:
    data = zip_bytes(FILES.items())
    assert statuses(put(tmp_path, patched(data, zip_directory(data), b"??"), "shard.zip")) == ("unreadable", [])


@pytest.mark.parametrize("flags", [0x1, 0x41])
def test_an_encrypted_member_is_unreadable_without_being_read(tmp_path: Path, flags: int) -> None:
    data = zip_bytes([("a.png", b"secret")])
    uri = put(tmp_path, patched(data, zip_directory(data) + 8, struct.pack("<H", flags)), "shard.zip")
    (member,) = index_archive(uri).members
    assert str(member.problem) == "unreadable: the member is encrypted"
    assert statuses(uri) == ("ok", ["unreadable"])


@pytest.mark.parametrize(("method", "name"), [(9, "deflate64"), (95, "xz"), (98, "ppmd"), (77, "method 77")])
def test_an_unknown_compression_is_a_bad_member(tmp_path: Path, method: int, name: str) -> None:
    data = zip_bytes([("a.png", b"abc")])
    uri = put(tmp_path, patched(data, zip_directory(data) + 10, struct.pack("<H", method)), "shard.zip")
    (member,) = index_archive(uri).members
    assert member.packing == "other"
    assert str(member.problem) == (
        f"unreadable: the compression must be one of stored, deflated, bzip2, lzma, zstd. Received: {name}"
    )
    assert statuses(uri) == ("ok", ["unreadable"])


@pytest.mark.parametrize("packing", ZIP_PACKINGS)
def test_damaged_bytes_are_unreadable_and_do_not_disturb_the_others(tmp_path: Path, packing: str) -> None:
    files = {"a.png": b"a" * 10, "b.png": random.Random(0).randbytes(3000), "c.png": b"c" * 20}
    data = zip_bytes(files.items(), ZIP_PACKINGS[packing])
    middle = data.index(b"b.png") + 1500
    uri = put(tmp_path, patched(data, middle, bytes([data[middle] ^ 1])), "shard.zip")
    assert read(uri, index_archive(uri)) == files | {"b.png": "unreadable"}


def test_a_damaged_local_header_is_unreadable(tmp_path: Path) -> None:
    data = zip_bytes([("a.png", b"abc"), ("b.png", b"de")])
    second = data.rindex(b"PK\3\4")
    assert statuses(put(tmp_path, patched(data, second, b"??"), "shard.zip")) == ("ok", ["ok", "unreadable"])


def test_a_local_header_that_leads_beyond_the_archive_is_truncated(root: str) -> None:
    data = zip_bytes([("a.png", b"abc"), ("b.png", b"de")])
    second = data.rindex(b"PK\3\4")
    ANYWHERE.write_bytes(f"{root}/shard.zip", patched(data, second + 28, b"\xff\xff"))
    assert statuses(f"{root}/shard.zip") == ("ok", ["ok", "truncated"])


def test_a_member_outside_of_the_archive_is_unreadable_without_being_read(tmp_path: Path) -> None:
    data = zip_bytes([("a.png", b"abc")])
    uri = put(tmp_path, patched(data, zip_directory(data) + 42, struct.pack("<I", 10**9)), "shard.zip")
    (member,) = index_archive(uri).members
    assert status(member.problem) == "unreadable"


def test_a_long_extra_field_is_read_over(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("a.png")
    info.extra = struct.pack("<HH", 0xCAFE, 60_000) + bytes(60_000)
    uri = put(tmp_path, zip_bytes([(info, b"abc")]), "shard.zip")
    assert read(uri, index_archive(uri)) == {"a.png": b"abc"}


def claim_size(data: bytes, size_bytes: int) -> bytes:
    """A zip of one member whose directory says another unpacked size."""
    return patched(data, zip_directory(data) + 24, struct.pack("<I", size_bytes))


def test_a_member_that_claims_gigabytes_costs_nothing(tmp_path: Path) -> None:
    data = zip_bytes([("a.png", b"abc")], zipfile.ZIP_DEFLATED)
    directory = zip_directory(data)
    extra = struct.pack("<HHQ", 1, 8, 10 * 2**30)  # zip64: the size stands in the extra field
    entry = patched(data[directory : directory + 46], 30, struct.pack("<H", len(extra))) + b"a.png" + extra
    end = patched(data[directory + 51 :], 12, struct.pack("<I", len(entry)))
    uri = put(tmp_path, claim_size(data[:directory] + entry, 2**32 - 1) + end, "shard.zip")
    index = index_archive(uri)
    assert [member.size_bytes for member in index.members] == [10 * 2**30]
    Path(uri).unlink()
    assert read(uri, index) == {"a.png": "too_large"}


@pytest.mark.parametrize("packing", ["deflated", "bzip2", "lzma"])
@pytest.mark.parametrize("claimed_bytes", [1, 50_000])
def test_a_bomb_that_claims_to_be_small_is_unreadable(tmp_path: Path, packing: str, claimed_bytes: int) -> None:
    data = claim_size(zip_bytes([("a.png", bytes(5 * 2**20))], ZIP_PACKINGS[packing]), claimed_bytes)
    uri = put(tmp_path, data, "shard.zip")
    (image,) = read_members(uri, index_archive(uri).members, max_bytes=MAX_BYTES)
    assert status(image) == "unreadable"


@pytest.mark.parametrize("packing", ZIP_PACKINGS)
def test_a_member_that_claims_to_be_larger_than_it_is_is_unreadable(tmp_path: Path, packing: str) -> None:
    uri = put(tmp_path, claim_size(zip_bytes([("a.png", b"abc" * 9)], ZIP_PACKINGS[packing]), 28), "shard.zip")
    assert statuses(uri) == ("ok", ["unreadable"])


# --- groups and what a read costs


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_larger_members_are_not_read(tmp_path: Path, suffix: str) -> None:
    data = zip_bytes(FILES.items()) if suffix == ".zip" else COMPRESSIONS[suffix](tar_bytes(FILES.items()))
    uri = put(tmp_path, data, f"shard{suffix}")
    index = index_archive(uri)
    assert read(uri, index, max_bytes=7000) == FILES | {"c/many.png": "too_large"}
    Path(uri).unlink()
    assert set(read(uri, index, max_bytes=0).values()) == {"too_large"}
    assert read(uri, index, max_bytes=7000) == dict.fromkeys(FILES, "missing") | {"c/many.png": "too_large"}


def member(offset: int, size_bytes: int, problem: str | None = None) -> Member:
    error = None if problem is None else ImageError(problem, "")
    return Member(f"{offset}.png", size_bytes, "tar", offset, size_bytes, None, error)


@pytest.mark.parametrize(
    ("members", "groups"),
    [
        ([], []),
        ([member(0, 10), member(20, 10), member(40, 10)], [(0, 3)]),
        ([member(0, 60), member(70, 30), member(110, 10)], [(0, 2), (2, 3)]),  # 100 bytes are the most
        ([member(0, 10), member(60, 10), member(121, 10)], [(0, 2), (2, 3)]),  # 50 bytes between are the most
        ([member(0, 10), member(10, 500), member(510, 10)], [(0, 1), (1, 2), (2, 3)]),
        ([member(50, 10), member(20, 10), member(40, 10)], [(0, 1), (1, 3)]),
        ([member(0, 10), member(0, 10), member(4, 2)], [(0, 3)]),
        ([member(0, 10), member(900, 10, "truncated"), member(20, 10)], [(0, 3)]),
        ([member(0, 10, "unsupported"), member(900, 10), member(910, 9, "truncated")], [(0, 3)]),
        ([member(0, 10, "unsupported"), member(900, 10, "unsupported")], [(0, 2)]),
    ],
)
def test_neighbours_are_fetched_together(members: list[Member], groups: list[tuple[int, int]]) -> None:
    assert member_groups(members, max_bytes=100, max_gap=50) == [range(*group) for group in groups]


def test_a_compressed_tar_is_one_group() -> None:
    members = [replace(member(number, 10**7), packing="stream") for number in range(9)]
    assert member_groups(members) == [range(9)]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_members_come_in_the_order_in_which_they_are_asked_for(tmp_path: Path, suffix: str) -> None:
    files = {f"{n}.png": bytes([n]) * (n + 1) for n in range(40)}
    data = zip_bytes(files.items()) if suffix == ".zip" else COMPRESSIONS[suffix](tar_bytes(files.items()))
    uri = put(tmp_path, data, f"shard{suffix}")
    members = list(index_archive(uri).members) * 2
    random.Random(0).shuffle(members)
    images = read_members(uri, members, max_bytes=MAX_BYTES)
    assert list(images) == [files[member.name] for member in members]


@pytest.mark.parametrize(
    "suffix",
    [".tar", ".tgz", ".zip", *(pytest.param(suffix, marks=pytest.mark.slow) for suffix in (".tar.bz2", ".tar.xz"))],
)
def test_a_shard_of_samples_costs_few_requests(root: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random_bytes = random.Random(0).randbytes
    files = {f"{n // 2:06d}.{'jpg' if n % 2 else 'cls'}": random_bytes(5000 + n) for n in range(300)}
    data = zip_bytes(files.items()) if suffix == ".zip" else COMPRESSIONS[suffix](tar_bytes(files.items()))
    uri = f"{root}/shard{suffix}"
    ANYWHERE.write_bytes(uri, data)
    index = index_archive(uri)
    groups = member_groups(index.members, max_bytes=2**19)
    ranges: list[tuple[int, int]] = []
    read_range = ANYWHERE.read_range

    def counted(uri: str, start: int, length: int) -> bytes:
        ranges.append((start, length))
        return read_range(uri, start, length)

    monkeypatch.setattr(ANYWHERE, "read_range", counted)
    members = [index.members[group.start : group.stop] for group in groups]
    images = [image for group in members for image in read_members(uri, group, max_bytes=MAX_BYTES)]
    assert images == list(files.values())
    if index.members[0].packing == "stream":
        assert (len(groups), len(ranges)) == (1, 0)
    else:
        assert len(groups) == len(ranges) == len(data) // 2**19 + (suffix == ".tar")


def test_an_archive_on_s3_that_is_not_there_is_missing(s3: str) -> None:
    index = index_archive(f"{s3}/no.tar")
    assert (index.members, status(index.problem)) == ((), "missing")
    images = list(read_members(f"{s3}/no.tar", [member(0, 10), member(512, 20)], max_bytes=MAX_BYTES))
    assert [status(image) for image in images] == ["missing", "missing"]


# --- any bytes


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The bytes with a few bits flipped, runs removed, swapped or repeated, or lengths made huge."""
    new = bytearray(data)
    marks = [match.start() for match in re.finditer(b"PK\1\2|PK[\5\6][\5-\7]|ustar|up", data)] or [0]
    for _ in range(draw.choice([1, 1, 2, 5])):
        near = max(0, draw.choice([draw.choice(marks) + draw.randrange(-260, 60), draw.randrange(len(data))]))
        length = draw.choice([1, 4, 46, 512])
        match draw.randrange(5):
            case 0:
                new[near : near + 1] = bytes([draw.randrange(256)])
            case 1:
                del new[near : near + length]
            case 2:
                new[near : near + length] = b"\xff" * length
            case 3:
                new[near:near] = new[draw.randrange(len(data)) :][:length]
            case 4:
                del new[max(1, near) :]
    return bytes(new)


ANY_BYTES: dict[str, bytes] = {
    "a.tar": with_links(".tar", [("d/l.png", "../a/one.png"), ("x.png", "x.png")], FILES),
    "a.zip": with_links(".zip", [("d/l.png", "../a/one.png"), ("x.png", "x.png")], FILES),
    "b.zip": made_zip([ZipEntry(b"_.png", extra=unicode_path(b"_.png", b"b.png")), ZipEntry(b"c.png")]),
    "c.zip": made_zip([ZipEntry(b"c.png", b"c" * 99, method=93, compressed=zstd(b"c" * 99))]),
    "a.tgz": gz(tar_bytes(FILES.items())),
    "a.tzst": zstd(tar_bytes(FILES.items())),
    "a.txz": lzma.compress(tar_bytes(FILES.items()), preset=0),
}


@pytest.mark.parametrize("name", ANY_BYTES)
def test_any_bytes_give_an_index_and_each_member_bytes_or_a_reason(name: str) -> None:
    store, draw = MemoryStore(), random.Random(name)
    uri = f"memory://b/{name}"
    for _ in range(150):
        store.write_bytes(uri, damaged(ANY_BYTES[name], draw))
        members = index_archive(uri, store=store).members
        for member, image in zip(members, read_members(uri, members, max_bytes=MAX_BYTES, store=store), strict=True):
            assert isinstance(image, ImageError) or len(image) == member.size_bytes
            assert all(0 <= number < 2**63 for number in (member.size_bytes, member.stored_bytes, member.offset))
            assert member.name.encode() is not None  # no lone surrogates
