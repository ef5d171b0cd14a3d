"""Images inside archives (tar, compressed tar, zip), read where they lie and never unpacked to disk.

Owns: which files are archives, the list of what one holds, and the bytes of its members. Does not own: which members
are images (`images`), or what becomes of an archive that is damaged. A member's address is `archive.tar!name`; its
name is an id and never a path on disk. Which kind an archive is, is told by its first bytes.

Contract of `index_archive`: whatever the bytes are, an index: what lies before a damage is listed, the damage is its
`problem`. Directories, links that are no hard links, and devices are not listed. As in tar itself, an archive may lack
its end mark, and nothing behind the end mark is looked at. Contract of `read_members`: bytes or an `ImageError` for
each member, at the cost of one ranged request per group of neighbours; a compressed tar is read from its beginning.
Neither holds more than one group, or one member, at a time.
"""

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, Literal, cast

from mnist_dist.errors import ImageError, MnistDistError, ServiceError
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry
from mnist_dist.store.local import is_service_error

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
"""Lower-case name endings of the archives that are read."""
SEPARATOR = "!"
"""Between the archive and the name of its member."""

Packing = Literal["tar", "stream", "stored", "deflated", "bzip2", "lzma", "other"]

_GZIP_MAGIC = b"\x1f\x8b\x08"
_BZIP2_MAGICS = tuple(b"BZh%d1AY&SY" % level for level in range(1, 10))
_XZ_MAGIC = b"\xfd7zXZ\0"
_TAR_MAGIC, _TAR_MAGIC_START = b"ustar", 257  # tars from before 1988 have none
_ZIP_HEADER_MAGIC = b"PK\3\4"
_ZIP_MAGICS = (_ZIP_HEADER_MAGIC, b"PK\5\6", b"PK\7\x08")  # a member, the end of an empty archive, a part of several
_MAGIC_BYTES = 512
_DRAIN_BYTES = 1 << 20
_TAR_BLOCK_BYTES = 512
_MAX_HEADER_BYTES = 16 * 2**20  # of names and attributes in one tar header; `tarfile` would read any number
_MAX_SIZE_BYTES = 2**62  # above it nothing is true, and no file can be sought in
_ZIP_HEADER_BYTES = 30  # without name and extra field
_ZIP_SLACK_BYTES = 256  # for the extra field of a local header, whose length only that header says
_ZIP_ENCRYPTED, _ZIP_PATCHED = 0x41, 0x20  # flag bits. Source: PKWARE APPNOTE 6.3.10, 4.4.4
_ZIP_PACKINGS: dict[int, Packing] = {
    zipfile.ZIP_STORED: "stored",
    zipfile.ZIP_DEFLATED: "deflated",
    zipfile.ZIP_BZIP2: "bzip2",
    zipfile.ZIP_LZMA: "lzma",
}

_File = BinaryIO | io.BufferedIOBase


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside an archive."""

    name: str
    """As the archive says it; bytes that are not UTF-8 become `\\xff`."""
    size_bytes: int
    """Unpacked, by the archive's word."""
    packing: Packing
    """`tar`: as it is; `stream`: in a compressed tar; the others: in a zip."""
    offset: int
    """In the archive: of the data (`tar`) or of the local header (zip); `stream`: how many headers come before."""
    stored_bytes: int
    """Bytes that the data take in the archive; `stream`: before compression."""
    crc32: int | None
    """Of the unpacked bytes; zip only."""
    problem: ImageError | None
    """Why it cannot be read, where that is known without reading."""


@dataclass(frozen=True)
class ArchiveIndex:
    """What an archive holds."""

    entry: Entry
    """Of the archive, as it was when it was listed."""
    members: tuple[Member, ...]
    """In the order of their offset; of members with the same name only the last."""
    duplicates: int
    """Members that a later one of the same name replaces."""
    problem: ImageError | None
    """Why it may hold more than is listed: `missing`, `denied`, `empty`, `truncated`, `unreadable` or `failed`."""


def is_archive(uri: str) -> bool:
    """Whether `uri` names an archive, by its ending in any case."""
    return uri.lower().endswith(ARCHIVE_SUFFIXES)


def split_member(uri: str) -> tuple[str, str] | None:
    """`a.tar!x/y.png` as `("a.tar", "x/y.png")`, at the first `!` behind the name of an archive; None without one."""
    position = uri.find(SEPARATOR)
    while position >= 0:
        if is_archive(uri[:position]):
            return uri[:position], uri[position + 1 :]
        position = uri.find(SEPARATOR, position + 1)
    return None


def index_archive(uri: str) -> ArchiveIndex:
    """Lists an archive: a tar by its headers, a zip by its directory, a compressed tar by reading it once.

    Args:
        uri: of the archive.

    Returns:
        Its members, and its problem where it has one.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    entry, listing, problem = Entry(uri, 0, ""), _Listing(), None
    try:
        with _image_errors():
            entry = ANYWHERE.entry_of(uri)
            if entry.size_bytes == 0:
                raise ImageError("empty", "the archive has no bytes")
            with ANYWHERE.open_binary(uri) as file:
                _list_archive(file, entry, listing)
    except ImageError as err:
        problem = _bare(err)
    members = tuple(sorted(listing.members.values(), key=lambda member: member.offset))
    return ArchiveIndex(entry, members, listing.duplicates, problem)


def member_groups(members: Sequence[Member], *, max_bytes: int = 4 * 2**20, max_gap: int = 128 * 2**10) -> list[range]:
    """Splits members of one archive into runs that one ranged request fetches each.

    Args:
        members: of one archive, best in the order of their offset.
        max_bytes: that a request fetches; a larger member is alone in its group.
        max_gap: bytes between two members that are fetched for nothing rather than in a request of their own.

    Returns:
        Ranges of positions in `members`, together all of them in order. A compressed tar is one group; members with a
        problem are in some group, but are not fetched.
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


def read_members(uri: str, members: Sequence[Member], *, max_bytes: int) -> Iterator[bytes | ImageError]:
    """The bytes of members of one archive, in their order.

    Args:
        uri: of the archive.
        members: of its index; one group of `member_groups` costs one request.
        max_bytes: larger members are not read.

    Yields:
        The unpacked bytes, or an `ImageError`: the member's own problem, `too_large`, `empty`, `missing`, `denied`,
        `truncated`, `unreadable` or `failed`.

    Raises:
        ServiceError, StorageError: not the archive but the storage failed.
    """
    known = [_known_problem(member, max_bytes) for member in members]
    wanted = [member for member, problem in zip(members, known, strict=True) if problem is None]
    streamed = bool(wanted) and wanted[0].packing == "stream"
    images = _streamed_images(uri, wanted) if streamed else _ranged_images(uri, wanted)
    for problem in known:
        yield problem or next(images)


def _known_problem(member: Member, max_bytes: int) -> ImageError | None:
    if member.problem is not None:
        return member.problem
    if member.size_bytes == 0:
        return ImageError("empty", "the member has no bytes")
    largest = max(member.size_bytes, member.stored_bytes)  # one that packs worse than nothing is as much to hold
    if largest > max_bytes:
        return ImageError("too_large", f"{largest:,} bytes are more than {max_bytes:,}")
    return None


@contextlib.contextmanager
def _image_errors() -> Iterator[None]:
    """What goes wrong with one archive becomes an `ImageError`; what goes wrong with a service stays what it is."""
    try:
        yield
    except MnistDistError:
        raise
    except FileNotFoundError as err:
        raise ImageError("missing", err.strerror or str(err)) from err
    except PermissionError as err:
        raise ImageError("denied", err.strerror or str(err)) from err
    except EOFError as err:
        raise ImageError("truncated", str(err)) from err
    except MemoryError as err:
        raise ImageError("too_large", "the memory does not hold it") from err
    except Exception as err:  # the border: damaged bytes raise whatever the decoders happen to raise
        if isinstance(err, OSError) and is_service_error(err):
            raise ServiceError(f"an archive cannot be read further: {err}") from err
        # a decompressor's OSError is its own word on the bytes and has no number
        status = "failed" if isinstance(err, OSError) and err.errno is not None else "unreadable"
        raise ImageError(status, " ".join(str(err).split()) or type(err).__name__) from err


def _bare(err: ImageError) -> ImageError:
    """The same without its traceback, whose frames would keep the archive's bytes in memory."""
    return ImageError(err.status, err.message)


# --- listing ---------------------------------------------------------------------------------------------------------


class _Listing:
    """Members by name, as they are found."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.duplicates = 0

    def add(self, member: Member) -> None:
        self.duplicates += member.name in self.members
        self.members[member.name] = member


def _list_archive(file: BinaryIO, entry: Entry, listing: _Listing) -> None:
    magic = file.read(_MAGIC_BYTES)
    file.seek(0)
    unpacked = _decompressed(file, magic)
    if unpacked is not None:
        with unpacked:
            _list_tar(_TarSource(unpacked), "stream", listing)
            while unpacked.read(_DRAIN_BYTES):  # the checksum of a gzip file is its last word
                pass
    elif _is_zip(magic, entry.uri):
        _list_zip(file, entry.size_bytes, listing)
    else:
        _list_tar(_TarSource(file, entry.size_bytes), "tar", listing)


def _is_zip(magic: bytes, uri: str) -> bool:
    if magic.startswith(_ZIP_MAGICS):
        return True
    return uri.lower().endswith(".zip") and not magic.startswith(_TAR_MAGIC, _TAR_MAGIC_START)


def _decompressed(file: BinaryIO, magic: bytes) -> io.BufferedIOBase | None:
    """None where the bytes are not compressed. `tarfile`'s own `r|gz` would stop after the first of several streams."""
    if magic.startswith(_GZIP_MAGIC):
        return gzip.GzipFile(fileobj=file, mode="rb")
    if magic.startswith(_BZIP2_MAGICS):
        return bz2.BZ2File(file)
    return lzma.LZMAFile(file) if magic.startswith(_XZ_MAGIC) else None


def _list_zip(file: BinaryIO, archive_bytes: int, listing: _Listing) -> None:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as err:
        has_end = zipfile.is_zipfile(file)
        file.seek(0)
        if not has_end and file.read(_MAGIC_BYTES).startswith(_ZIP_HEADER_MAGIC):
            raise ImageError("truncated", "the directory at the end of the zip is not there") from err
        raise
    with archive:
        for info in archive.infolist():
            if not (info.is_dir() or stat.S_ISLNK(info.external_attr >> 16)):
                listing.add(_zip_member(info, archive_bytes))


def _zip_member(info: zipfile.ZipInfo, archive_bytes: int) -> Member:
    member = Member(
        name=info.filename,
        size_bytes=min(info.file_size, _MAX_SIZE_BYTES),
        packing=_ZIP_PACKINGS.get(info.compress_type, "other"),
        offset=min(info.header_offset, _MAX_SIZE_BYTES),
        stored_bytes=min(info.compress_size, _MAX_SIZE_BYTES),
        crc32=info.CRC,
        problem=None,
    )
    if info.flag_bits & _ZIP_ENCRYPTED:
        return replace(member, problem=ImageError("unreadable", "the member is encrypted"))
    if member.packing == "other" or info.flag_bits & _ZIP_PATCHED:
        message = f"{', '.join(_ZIP_PACKINGS.values())} can be unpacked; this is compression type {info.compress_type}"
        return replace(member, problem=ImageError("unsupported", message))
    if member.offset < 0 or member.offset + _ZIP_HEADER_BYTES + member.stored_bytes > archive_bytes:
        return replace(member, problem=ImageError("unreadable", "by the directory, it lies outside of the archive"))
    return member


# --- tar -------------------------------------------------------------------------------------------------------------


class _TarSource:
    """What `tarfile` reads headers from: forward only, in bounded steps, the last block kept to tell why they end.

    Args:
        file: at its beginning.
        size_bytes: of the file. None: known only by reading to its end.
    """

    def __init__(self, file: _File, size_bytes: int | None = None) -> None:
        self.file = file
        self.block = b""
        self.block_start = 0
        self._size_bytes = size_bytes

    def read(self, size: int, /) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.block_start = self.file.tell()
        with _image_errors():  # tarfile would make a zlib.error one of its own
            self.block = self.file.read(size)
        return self.block

    def tell(self) -> int:
        return self.file.tell()

    def skip_to(self, position: int) -> None:
        """Goes on at `position`.

        Raises:
            ImageError: the archive ends before, or the way leads back.
        """
        if position < self.file.tell():  # a negative size; `tarfile` of Python 3.11 would go round for ever
            raise ImageError("unreadable", f"the header at byte {self.block_start} leads back to byte {position}")
        if self._size_bytes is None or position <= self._size_bytes:
            reached = self.file.seek(position)
        else:
            reached = self._size_bytes
        if reached < position:
            raise ImageError("truncated", f"the archive ends at byte {reached}, its last member at byte {position}")

    # what the rest of tarfile's protocol asks for; reading never gets there

    def seek(self, position: int, /) -> int:
        raise io.UnsupportedOperation("seek")

    def write(self, data: bytes, /) -> int:
        raise io.UnsupportedOperation("write")

    def close(self) -> None:
        """The file belongs to the caller."""


def _headers(source: _TarSource) -> Iterator[tarfile.TarInfo]:
    """All headers of a tar; each stands at the beginning of its data, and the consumer may read those.

    Raises:
        ImageError: they end other than at an end mark or at the end of the archive.
    """
    start = 0
    try:
        with tarfile.open(fileobj=source, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            info = tar.next()
            while info is not None:
                if not 0 <= info.size < _MAX_SIZE_BYTES:
                    raise ImageError("unreadable", f"the header at byte {start} says {info.size} bytes of data")
                yield info
                source.skip_to(tar.offset)
                start = tar.offset
                # unlike tar.next(), it keeps no list, and does not end in silence at a damaged header
                info = tarfile.TarInfo.fromtarfile(tar)
    except tarfile.TarError as err:
        # an extended header that is cut off has read further than the place where the archive may end
        ended = start > 0 and source.block_start == start and not source.block.strip(b"\0")
        if not ended:
            raise _header_problem(source, err) from err


def _header_problem(source: _TarSource, err: Exception) -> ImageError:
    if source.block_start == 0 and not source.block:
        return ImageError("empty", "the archive has no bytes")
    if len(source.block) < _TAR_BLOCK_BYTES:
        return ImageError("truncated", f"the archive ends in the header at byte {source.block_start}")
    return ImageError("unreadable", f"the header at byte {source.block_start} is damaged: {err}")


def _list_tar(source: _TarSource, packing: Literal["tar", "stream"], listing: _Listing) -> None:
    for ordinal, info in enumerate(_headers(source)):
        offset = ordinal if packing == "stream" else info.offset_data
        if info.islnk():
            _list_link(info, packing, offset, listing)
        elif info.isreg():
            member = Member(info.name, info.size, packing, offset, info.size, None, None)
            _list_file(source, info, member, listing)


def _list_link(info: tarfile.TarInfo, packing: Packing, offset: int, listing: _Listing) -> None:
    target = listing.members.get(info.linkname)
    if target is not None:
        listing.add(replace(target, name=info.name))
        return
    problem = ImageError("missing", f"a hard link to {info.linkname!r}, which is no file before it")
    listing.add(Member(info.name, 0, packing, offset, 0, None, problem))


def _list_file(source: _TarSource, info: tarfile.TarInfo, member: Member, listing: _Listing) -> None:
    if info.sparse is not None:
        stored = sum(length for _, length in cast(list[tuple[int, int]], info.sparse))
        listing.add(replace(member, stored_bytes=stored, problem=ImageError("unsupported", "a file with holes")))
        return
    try:
        with _image_errors():
            source.skip_to(info.offset_data + info.size)
    except ImageError as err:  # this member is cut, and nobody knows what came after it
        listing.add(replace(member, problem=_bare(err)))
        raise
    listing.add(member)


# --- reading ---------------------------------------------------------------------------------------------------------


def _extent(member: Member) -> range:
    """The bytes of the archive that hold the member; of a zip's, as many as its local header may take."""
    if member.packing == "tar":
        return range(member.offset, member.offset + member.stored_bytes)
    header = _ZIP_HEADER_BYTES + len(member.name.encode()) + _ZIP_SLACK_BYTES
    return range(member.offset, member.offset + header + member.stored_bytes)


def _ranged_images(uri: str, members: Sequence[Member]) -> Iterator[bytes | ImageError]:
    for group in member_groups(members):
        yield from _images_of_group(uri, members[group.start : group.stop])


def _images_of_group(uri: str, members: Sequence[Member]) -> Iterator[bytes | ImageError]:
    extents = [_extent(member) for member in members]
    start, stop = min(extent.start for extent in extents), max(extent.stop for extent in extents)
    try:
        with _image_errors():
            fetched = memoryview(ANYWHERE.read_range(uri, start, stop - start))
    except ImageError as err:
        yield from itertools.repeat(_bare(err), len(members))
        return
    for member in members:
        try:
            with _image_errors():
                image: bytes | ImageError = _image_of(uri, member, fetched[member.offset - start :])
        except ImageError as err:
            image = _bare(err)
        yield image


def _image_of(uri: str, member: Member, data: memoryview) -> bytes:
    """Args: data: of the archive, from the member's offset on."""
    if member.packing == "tar":
        image = bytes(data[: member.size_bytes])
        _check_whole(image, member.size_bytes)
        return image
    image = _unpacked(member, _zip_data(uri, member, data))
    if len(image) != member.size_bytes:
        found = f"{len(image):,}" if len(image) < member.size_bytes else "more"
        raise ImageError("unreadable", f"by the directory, {member.size_bytes:,} bytes unpacked; these are {found}")
    if zlib.crc32(image) != member.crc32:
        raise ImageError("unreadable", "the checksum is not that of the directory")
    return image


def _zip_data(uri: str, member: Member, data: memoryview) -> memoryview:
    """The packed bytes, behind the local header."""
    header = data[:_ZIP_HEADER_BYTES]
    _check_whole(header, _ZIP_HEADER_BYTES)
    if header[:4] != _ZIP_HEADER_MAGIC:
        raise ImageError("unreadable", f"the directory says it lies at byte {member.offset}, where no member begins")
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    start = _ZIP_HEADER_BYTES + name_bytes + extra_bytes
    stop = start + member.stored_bytes
    if len(data) < stop:  # a long extra field, or the end of the archive; from the header on, so that it is no range
        data = memoryview(ANYWHERE.read_range(uri, member.offset, stop))  # beyond the end, which S3 refuses
    _check_whole(data[start:stop], member.stored_bytes)
    return data[start:stop]


def _check_whole(data: bytes | memoryview, size_bytes: int) -> None:
    if len(data) < size_bytes:
        raise ImageError("truncated", f"the archive ends {size_bytes - len(data):,} bytes before the member does")


def _unpacked(member: Member, data: memoryview) -> bytes:
    """No more than one byte above what the index says: a bomb costs nothing."""
    most = member.size_bytes + 1
    if member.packing == "stored":
        return bytes(data[:most])
    if member.packing == "deflated":
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, most)
    if member.packing == "bzip2":
        return bz2.BZ2Decompressor().decompress(data, most)
    # Source: APPNOTE 5.8.8: version, length of the properties (5), properties, data. The format "alone" of xz is the
    # properties, the unpacked size, data
    alone = b"".join((data[4:9], member.size_bytes.to_bytes(8, "little"), data[9:]))
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(alone, most)


def _streamed_images(uri: str, members: Sequence[Member]) -> Iterator[bytes | ImageError]:
    passes: list[list[Member]] = []
    for member in members:  # a stream only goes forward
        if passes and passes[-1][-1].offset <= member.offset:
            passes[-1].append(member)
        else:
            passes.append([member])
    for wanted in passes:
        yield from _images_of_pass(uri, wanted)


def _images_of_pass(uri: str, members: Sequence[Member]) -> Iterator[bytes | ImageError]:
    done = 0
    try:
        with _image_errors(), ANYWHERE.open_binary(uri) as file:
            magic = file.read(_MAGIC_BYTES)
            file.seek(0)
            with _decompressed(file, magic) or contextlib.nullcontext(file) as stream:
                images = _images_of_stream(_TarSource(stream), members)
                while done < len(members):
                    yield next(images)  # no variable: it would hold this image while the next is read
                    done += 1
    except ImageError as err:
        yield from itertools.repeat(_bare(err), len(members) - done)


def _images_of_stream(source: _TarSource, members: Sequence[Member]) -> Iterator[bytes]:
    headers = enumerate(_headers(source))
    for ordinal, same in itertools.groupby(members, key=lambda member: member.offset):  # hard links share their data
        sizes = [member.size_bytes for member in same]
        info = next((info for number, info in headers if number == ordinal), None)
        if info is None:
            raise ImageError("truncated", "the archive ends before the member")
        if info.size != sizes[0]:
            raise ImageError("unreadable", "the archive is not the one that was listed")
        image = source.file.read(info.size)
        _check_whole(image, info.size)
        yield from itertools.repeat(image, len(sizes))
        del image  # before the next is read
