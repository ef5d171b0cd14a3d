"""Images inside archives (tar, compressed tar, zip), read in place and never unpacked to disk.

Owns: which files are archives, listing their members, and reading the members' bytes. Does not own: the formats of tar
(`tar`) and zip (`zip`), links between members (`members`), which members are images (`images`), or what happens to a
damaged archive. The URI of a member is `archive.tar!name`, where the name is an id and never a path on disk. The first
bytes of an archive decide which kind it is and how it is compressed; its suffix only says that it is an archive.

Contract of `index_archive`: any bytes give an index. Members before any damage are listed, and the damage becomes the
index's `problem`. Links are members with the data of the file they lead to. Directories and devices are not listed. As
in tar itself, an archive may lack its end mark, and whatever follows the mark is ignored. Contract of `read_members`:
each member gives bytes or an `ImageError`, and each group of neighbours costs one ranged request; a compressed tar is
read from its start. Neither function holds more than one group or one member at a time.
"""

import bz2
import contextlib
import gzip
import itertools
import lzma
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, cast

import pyarrow as pa

from mnist_dist.errors import ImageError
from mnist_dist.sources.members import MAX_TARGET_BYTES, Listing, bare, check_whole, image_errors
from mnist_dist.sources.members import Member as Member
from mnist_dist.sources.members import Packing as Packing
from mnist_dist.sources.tar import SeekableTarSource, TarSource, Unpacked, list_tar, read_forward
from mnist_dist.sources.zip import HEADER_BYTES, MAGICS, data_range, list_zip, text_of, unpack
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry, Store

ARCHIVE_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    ".zip",
)
"""Lower-case file suffixes of the archives that can be read."""
SEPARATOR = "!"
"""Stands between an archive and the name of a member."""
"""Number of archives inside an archive that its index names."""

_GZIP_MAGIC = b"\x1f\x8b\x08"
_BZIP2_MAGICS = tuple(b"BZh%d1AY&SY" % level for level in range(1, 10))
_XZ_MAGIC = b"\xfd7zXZ\0"
_ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes((number, 0x2A, 0x4D, 0x18)) for number in range(0x50, 0x60)))
"""A frame, and frames to be skipped, with which parallel compressors begin. Source: RFC 8878, 3.1."""
_TAR_MAGIC, _TAR_MAGIC_START = b"ustar", 257  # Tars from before 1988 have no magic number.
_MAGIC_BYTES = 512
_DRAIN_BYTES = 1 << 20
_PACKED_BYTES = 1 << 16
_XZ_MEMORY_BYTES = 256 * 2**20  # `xz -9` needs 65 MiB.
_ZIP_SLACK_BYTES = 256  # Allowance for the extra field of a local header; only that header gives its length.


@dataclass(frozen=True)
class ArchiveIndex:
    """The members of an archive."""

    entry: Entry
    """The archive itself, as it was when it was listed."""
    members: tuple[Member, ...]
    """Sorted by offset; of several members with the same name only the last. A link has the offset of its file."""
    duplicates: int
    """Number of members that a later member of the same name replaces."""
    problem: ImageError | None
    """Why members may be missing: `missing`, `denied`, `empty`, `truncated`, `unreadable`, `too_large` or `failed`."""


def is_archive(uri: str) -> bool:
    """Whether `uri` ends in an archive suffix, in upper or lower case."""
    return uri.lower().endswith(ARCHIVE_SUFFIXES)


def split_member(uri: str) -> tuple[str, str] | None:
    """Splits `a.tar!x/y.png` into `("a.tar", "x/y.png")` at the first `!` after an archive's name; None without one."""
    position = uri.find(SEPARATOR)
    while position >= 0:
        if is_archive(uri[:position]):
            return uri[:position], uri[position + 1 :]
        position = uri.find(SEPARATOR, position + 1)
    return None


def index_archive(uri: str, *, max_members: int | None = None, store: Store = ANYWHERE) -> ArchiveIndex:
    """Lists an archive: a tar from its headers, a zip from its directory, a compressed tar by reading all of it once.

    Args:
        uri: URI of the archive.
        max_members: read a tar no further than this many members. None: list all.
        store: where it lies.

    Returns:
        The members, and the problem of the archive if it has one.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    entry, listing, problem = Entry(uri, 0, ""), Listing(), None
    try:
        with image_errors():
            entry = store.entry_of(uri)
            if entry.size_bytes == 0:
                raise ImageError("empty", "the archive has no bytes")
            with store.open_binary(uri) as file:
                _list_archive(file, entry, listing, max_members)
    except ImageError as err:
        problem = bare(err)
    _follow_links(uri, listing, store)
    members = tuple(sorted(listing.members.values(), key=lambda member: member.offset))
    return ArchiveIndex(entry, members, listing.duplicates, problem)


def member_groups(members: Sequence[Member], *, max_bytes: int = 4 * 2**20, max_gap: int = 128 * 2**10) -> list[range]:
    """Groups members of one archive so that one ranged request fetches each group.

    Args:
        members: members of one archive, ideally sorted by offset.
        max_bytes: upper bound of a request; a larger member gets a group of its own.
        max_gap: unneeded bytes between two members that are fetched to save a second request.

    Returns:
        Ranges of positions in `members` that cover all of them in order. A compressed tar is one group. Members with a
        problem belong to a group but are not fetched.
    """
    if not members or members[0].packing == "stream":
        return [range(len(members))] if members else []
    starts, span = [0], None
    for position, member in enumerate(members):
        if member.problem is not None:
            continue
        extent = _extent(member)
        if span is None:
            span = extent
            continue
        joined = range(span.start, max(span.stop, extent.stop))
        if span.start <= extent.start <= span.stop + max_gap and len(joined) <= max_bytes:
            span = joined
        else:
            starts.append(position)
            span = extent
    return [range(start, stop) for start, stop in itertools.pairwise([*starts, len(members)])]


def read_members(
    uri: str, members: Sequence[Member], *, max_bytes: int, store: Store = ANYWHERE
) -> Iterator[bytes | ImageError]:
    """Reads the bytes of members of one archive, in the given order.

    Args:
        uri: URI of the archive.
        members: members from its index; one group of `member_groups` costs one request.
        max_bytes: larger members are not read.
        store: where the archive lies.

    Yields:
        The unpacked bytes, or an `ImageError`: the problem in the index, or one with status `too_large`, `empty`,
        `missing`, `denied`, `truncated`, `unreadable` or `failed`.

    Raises:
        ServiceError, StorageError: the storage failed, not the archive.
    """
    known = [_known_problem(member, max_bytes) for member in members]
    wanted = [member for member, problem in zip(members, known, strict=True) if problem is None]
    streamed = bool(wanted) and wanted[0].packing == "stream"
    images = _streamed_images(uri, wanted, store) if streamed else _ranged_images(uri, wanted, store)
    for problem in known:
        yield problem or next(images)


def _known_problem(member: Member, max_bytes: int) -> ImageError | None:
    if member.problem is not None:
        return member.problem
    if member.size_bytes == 0:
        return ImageError("empty", "the member has no bytes")
    largest = max(member.size_bytes, member.stored_bytes)  # Packed data can be larger than unpacked data.
    if largest > max_bytes:
        return ImageError("too_large", f"{largest:,} bytes are more than {max_bytes:,}")
    return None


# --- kinds and listing -----------------------------------------------------------------------------------------------


def _list_archive(file: BinaryIO, entry: Entry, listing: Listing, max_members: int | None) -> None:
    magic = file.read(_MAGIC_BYTES)
    file.seek(0)
    unpacked = _unpacked(file, magic)
    if unpacked is not None:
        with unpacked as stream:
            list_tar(TarSource(stream), "stream", listing, max_members=max_members)
            while max_members is None and stream.read(_DRAIN_BYTES):  # The checksum stands at the end of a gzip file.
                pass
    elif _is_zip(magic, entry.uri):
        list_zip(file, entry.size_bytes, listing)
    else:
        list_tar(SeekableTarSource(file, entry.size_bytes), "tar", listing, max_members=max_members)


def _is_zip(magic: bytes, uri: str) -> bool:
    if magic.startswith(MAGICS):
        return True
    return uri.lower().endswith(".zip") and not magic.startswith(_TAR_MAGIC, _TAR_MAGIC_START)


def _unpacked(file: BinaryIO, magic: bytes) -> AbstractContextManager[Unpacked] | None:
    """The unpacked stream, or None for uncompressed bytes. `tarfile`'s `r|gz` would stop after the first of several."""
    if magic.startswith(_GZIP_MAGIC):
        return gzip.GzipFile(fileobj=file, mode="rb")
    if magic.startswith(_BZIP2_MAGICS):
        return bz2.BZ2File(file)
    if magic.startswith(_XZ_MAGIC):
        return contextlib.nullcontext(_Xz(file))
    return contextlib.nullcontext(_Zstd(file)) if magic.startswith(_ZSTD_MAGICS) else None


class _Xz:
    """The unpacked bytes of xz streams. `lzma.LZMAFile` would let a stream ask for 4 GiB of memory.

    Args:
        file: the streams.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY_BYTES)

    def read(self, size: int, /) -> bytes:
        parts = list[bytes]()
        while size and (part := self._part(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _part(self, size: int) -> bytes:
        part = b""
        while not part:
            packed = self._packed()
            if packed is None:
                break
            part = self._stream.decompress(packed, size)
        return part

    def _packed(self) -> bytes | None:
        """What the decompressor needs next; None at the end of the last stream."""
        if not self._stream.eof:
            packed = self._file.read(_PACKED_BYTES) if self._stream.needs_input else b""
            if self._stream.needs_input and not packed:
                raise EOFError("the compressed bytes end before the end of a stream")
            return packed
        packed = self._stream.unused_data.lstrip(b"\0")  # Zero bytes may stand between streams.
        while not packed:
            block = self._file.read(_PACKED_BYTES)
            if not block:
                return None
            packed = block.lstrip(b"\0")
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY_BYTES)
        return packed


class _Zstd:
    """The unpacked bytes of zstd frames.

    Args:
        file: the frames.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")

    def read(self, size: int, /) -> bytes:
        try:
            return cast(bytes, self._stream.read(size))
        except OSError as err:
            if "Truncated" in str(err):
                raise EOFError("the compressed bytes end before the end of a frame") from err
            raise


def _follow_links(uri: str, listing: Listing, store: Store) -> None:
    """Follows all links; in a zip, the content of a link is its target and is read first."""
    links = sorted(listing.unread_links, key=lambda member: member.offset)
    for member, data in zip(links, read_members(uri, links, max_bytes=MAX_TARGET_BYTES, store=store), strict=True):
        listing.set_target(member, data if isinstance(data, ImageError) else text_of(data))
    listing.follow_links()


# --- reading ---------------------------------------------------------------------------------------------------------


def _extent(member: Member) -> range:
    """The bytes of the archive that hold the member; in a zip, with an allowance for its local header."""
    if member.packing == "tar":
        return range(member.offset, member.offset + member.stored_bytes)
    header = HEADER_BYTES + len(member.name.encode()) + _ZIP_SLACK_BYTES
    return range(member.offset, member.offset + header + member.stored_bytes)


def _ranged_images(uri: str, members: Sequence[Member], store: Store) -> Iterator[bytes | ImageError]:
    for group in member_groups(members):
        yield from _images_of_group(uri, members[group.start : group.stop], store)


def _images_of_group(uri: str, members: Sequence[Member], store: Store) -> Iterator[bytes | ImageError]:
    extents = [_extent(member) for member in members]
    start, stop = min(extent.start for extent in extents), max(extent.stop for extent in extents)
    try:
        with image_errors():
            fetched = memoryview(store.read_range(uri, start, stop - start))
    except ImageError as err:
        yield from itertools.repeat(bare(err), len(members))
        return
    for member in members:
        try:
            with image_errors():
                image: bytes | ImageError = _image_of(uri, member, fetched[member.offset - start :], store)
        except ImageError as err:
            image = bare(err)
        yield image


def _image_of(uri: str, member: Member, data: memoryview, store: Store) -> bytes:
    """Extracts a member from `data`, the bytes of the archive from the member's offset on."""
    if member.packing == "tar":
        image = bytes(data[: member.size_bytes])
        check_whole(image, member.size_bytes)
        return image
    packed = data_range(member, data)
    if len(data) < packed.stop:  # A long extra field, or the end of the archive. S3 refuses a range that starts beyond
        data = memoryview(store.read_range(uri, member.offset, packed.stop))  # the end, so this starts at the header.
    data = data[packed.start : packed.stop]
    check_whole(data, member.stored_bytes)
    return unpack(member, data)


def _streamed_images(uri: str, members: Sequence[Member], store: Store) -> Iterator[bytes | ImageError]:
    passes: list[list[Member]] = []
    for member in members:  # A stream can only be read forward.
        if passes and passes[-1][-1].offset <= member.offset:
            passes[-1].append(member)
        else:
            passes.append([member])
    for wanted in passes:
        yield from _images_of_pass(uri, wanted, store)


def _images_of_pass(uri: str, members: Sequence[Member], store: Store) -> Iterator[bytes | ImageError]:
    done = 0
    try:
        with image_errors(), store.open_binary(uri) as file:
            magic = file.read(_MAGIC_BYTES)
            file.seek(0)
            with _unpacked(file, magic) or contextlib.nullcontext(file) as stream:
                images = read_forward(TarSource(stream), members)
                while done < len(members):
                    yield next(images)  # A variable would keep this image while the next is read.
                    done += 1
    except ImageError as err:
        yield from itertools.repeat(bare(err), len(members) - done)
