"""Images inside archives (tar, compressed tar, zip), read in place and never unpacked to disk.

Owns: which files are archives, listing their members, and reading the members' bytes. Does not own: which members are
images (`images`), or what happens to a damaged archive. The URI of a member is `archive.tar!name`, where the name is an
id and never a path on disk. The first bytes of an archive decide which kind it is.

Contract of `index_archive`: any bytes give an index. Members before any damage are listed, and the damage becomes the
index's `problem`. Directories, symbolic links and devices are not listed. As in tar itself, an archive may lack its end
mark, and whatever follows the mark is ignored. Contract of `read_members`: each member gives bytes or an `ImageError`,
and each group of neighbours costs one ranged request; a compressed tar is read from its start. Neither function holds
more than one group or one member at a time.
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
from mnist_dist.store.base import Entry, Store
from mnist_dist.store.local import is_service_error

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
"""Lower-case file suffixes of the archives that can be read."""
SEPARATOR = "!"
"""Stands between an archive and the name of a member."""

Packing = Literal["tar", "stream", "stored", "deflated", "bzip2", "lzma", "other"]

_GZIP_MAGIC = b"\x1f\x8b\x08"
_BZIP2_MAGICS = tuple(b"BZh%d1AY&SY" % level for level in range(1, 10))
_XZ_MAGIC = b"\xfd7zXZ\0"
_TAR_MAGIC, _TAR_MAGIC_START = b"ustar", 257  # Tars from before 1988 have no magic number.
_ZIP_HEADER_MAGIC = b"PK\3\4"
_ZIP_MAGICS = (_ZIP_HEADER_MAGIC, b"PK\5\6", b"PK\7\x08")  # A member, an empty archive, a multi-part archive.
_MAGIC_BYTES = 512
_DRAIN_BYTES = 1 << 20
_TAR_BLOCK_BYTES = 512
_MAX_HEADER_BYTES = 16 * 2**20  # Bounds one tar header (names and attributes); `tarfile` sets no bound.
_MAX_SIZE_BYTES = 2**62  # A larger size is false, and no file can seek to it.
_ZIP_HEADER_BYTES = 30  # Without the name and the extra field.
_ZIP_SLACK_BYTES = 256  # Allowance for the extra field of a local header; only that header gives its length.
_ZIP_ENCRYPTED, _ZIP_PATCHED = 0x41, 0x20  # Flag bits. Source: PKWARE APPNOTE 6.3.10, 4.4.4.
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
    """Name in the archive; bytes that are not UTF-8 are escaped, as in `\\xff`."""
    size_bytes: int
    """Unpacked size, as the archive states it."""
    packing: Packing
    """`tar`: in a plain tar; `stream`: in a compressed tar; all others: in a zip."""
    offset: int
    """Position of the data (`tar`) or of the local header (zip) in the archive; `stream`: number of headers before."""
    stored_bytes: int
    """Size of the data in the archive; `stream`: before compression."""
    crc32: int | None
    """Checksum of the unpacked bytes; zip only."""
    problem: ImageError | None
    """Why the member cannot be read, if that is known from the index."""


@dataclass(frozen=True)
class ArchiveIndex:
    """The members of an archive."""

    entry: Entry
    """The archive itself, as it was when it was listed."""
    members: tuple[Member, ...]
    """Sorted by offset; of several members with the same name only the last."""
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


def index_archive(uri: str, *, store: Store = ANYWHERE) -> ArchiveIndex:
    """Lists an archive: a tar from its headers, a zip from its directory, a compressed tar by reading all of it once.

    Args:
        uri: URI of the archive.

    Returns:
        The members, and the problem of the archive if it has one.

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

    Yields:
        The unpacked bytes, or an `ImageError`: the problem in the index, or one with status `too_large`, `empty`,
        `missing`, `denied`, `truncated`, `unreadable` or `failed`.

    Raises:
        ServiceError, StorageError: the storage failed, not the archive.
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
    largest = max(member.size_bytes, member.stored_bytes)  # Packed data can be larger than unpacked data.
    if largest > max_bytes:
        return ImageError("too_large", f"{largest:,} bytes are more than {max_bytes:,}")
    return None


@contextlib.contextmanager
def _image_errors() -> Iterator[None]:
    """Turns the failure of one archive into an `ImageError`; the failure of a service stays what it is."""
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
        raise ImageError("too_large", "it does not fit in memory") from err
    except Exception as err:  # The border: decoders raise anything on damaged bytes.
        if isinstance(err, OSError) and is_service_error(err):
            raise ServiceError(f"reading an archive was interrupted: {err}") from err
        # A decompressor raises an OSError without an errno when the bytes are damaged.
        status = "failed" if isinstance(err, OSError) and err.errno is not None else "unreadable"
        raise ImageError(status, " ".join(str(err).split()) or type(err).__name__) from err


def _bare(err: ImageError) -> ImageError:
    """Copies the error without its traceback, whose frames would keep the archive's bytes in memory."""
    return ImageError(err.status, err.message)


# --- listing ---------------------------------------------------------------------------------------------------------


class _Listing:
    """Collects members by name."""

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
            while unpacked.read(_DRAIN_BYTES):  # The checksum stands at the end of a gzip file.
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
    """The unpacked stream, or None for uncompressed bytes. `tarfile`'s `r|gz` would stop after the first of several."""
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
            raise ImageError("truncated", "the directory at the end of the zip is missing") from err
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
        message = f"not {' or '.join(_ZIP_PACKINGS.values())}, unpatched; this is compression type {info.compress_type}"
        return replace(member, problem=ImageError("unsupported", message))
    if member.offset < 0 or member.offset + _ZIP_HEADER_BYTES + member.stored_bytes > archive_bytes:
        return replace(member, problem=ImageError("unreadable", "the zip directory places it outside the archive"))
    return member


# --- tar -------------------------------------------------------------------------------------------------------------


class _TarSource:
    """The file that `tarfile` reads headers from: forward only, in bounded steps.

    It keeps the last block, so that an error can say why the headers end.

    Args:
        file: a file at its start.
        size_bytes: size of the file. None: known only by reading to its end.
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
        with _image_errors():  # `tarfile` would turn a zlib.error into its own error.
            self.block = self.file.read(size)
        return self.block

    def tell(self) -> int:
        return self.file.tell()

    def skip_to(self, position: int) -> None:
        """Moves forward to `position`.

        Raises:
            ImageError: the archive ends before `position`, or `position` lies behind.
        """
        if position < self.file.tell():  # A negative size, over which `tarfile` of Python 3.11 loops for ever.
            raise ImageError("unreadable", f"the header at byte {self.block_start} points back to byte {position}")
        if self._size_bytes is None or position <= self._size_bytes:
            reached = self.file.seek(position)
        else:
            reached = self._size_bytes
        if reached < position:
            raise ImageError("truncated", f"the archive ends at byte {reached}, its last member at byte {position}")

    # tarfile's protocol requires these methods, but reading never calls them.

    def seek(self, position: int, /) -> int:
        raise io.UnsupportedOperation("seek")

    def write(self, data: bytes, /) -> int:
        raise io.UnsupportedOperation("write")

    def close(self) -> None:
        """The file belongs to the caller."""


def _headers(source: _TarSource) -> Iterator[tarfile.TarInfo]:
    """All headers of a tar. After each, the source stands at the start of its data, which the consumer may read.

    Raises:
        ImageError: the headers end neither at an end mark nor at the end of the archive.
    """
    start = 0
    try:
        with tarfile.open(fileobj=source, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            info = tar.next()
            while info is not None:
                if not 0 <= info.size < _MAX_SIZE_BYTES:
                    raise ImageError("unreadable", f"the header at byte {start} announces {info.size} bytes of data")
                yield info
                source.skip_to(tar.offset)
                start = tar.offset
                # Unlike tar.next(), this keeps no list of members and does not stop silently at a damaged header.
                info = tarfile.TarInfo.fromtarfile(tar)
    except tarfile.TarError as err:
        # A clean end is an empty or zero block right after a member; an extended header that is cut off has read on.
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
    problem = ImageError("missing", f"a hard link to {info.linkname!r}, which is not a file before it")
    listing.add(Member(info.name, 0, packing, offset, 0, None, problem))


def _list_file(source: _TarSource, info: tarfile.TarInfo, member: Member, listing: _Listing) -> None:
    if info.sparse is not None:
        stored = sum(length for _, length in cast(list[tuple[int, int]], info.sparse))
        listing.add(replace(member, stored_bytes=stored, problem=ImageError("unsupported", "it is a sparse file")))
        return
    try:
        with _image_errors():
            source.skip_to(info.offset_data + info.size)
    except ImageError as err:  # This member is cut off, and later ones are unknown.
        listing.add(replace(member, problem=_bare(err)))
        raise
    listing.add(member)


# --- reading ---------------------------------------------------------------------------------------------------------


def _extent(member: Member) -> range:
    """The bytes of the archive that hold the member; in a zip, with an allowance for its local header."""
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
    """Extracts a member from `data`, the bytes of the archive from the member's offset on."""
    if member.packing == "tar":
        image = bytes(data[: member.size_bytes])
        _check_whole(image, member.size_bytes)
        return image
    image = _unpacked(member, _zip_data(uri, member, data))
    if len(image) != member.size_bytes:
        size = f"{len(image):,}" if len(image) < member.size_bytes else "more"
        raise ImageError("unreadable", f"the zip directory says {member.size_bytes:,} unpacked bytes; there are {size}")
    if zlib.crc32(image) != member.crc32:
        raise ImageError("unreadable", "the checksum differs from the one in the zip directory")
    return image


def _zip_data(uri: str, member: Member, data: memoryview) -> memoryview:
    """The packed bytes, which follow the local header."""
    header = data[:_ZIP_HEADER_BYTES]
    _check_whole(header, _ZIP_HEADER_BYTES)
    if header[:4] != _ZIP_HEADER_MAGIC:
        raise ImageError("unreadable", f"no member starts at byte {member.offset}, where the zip directory places it")
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    start = _ZIP_HEADER_BYTES + name_bytes + extra_bytes
    stop = start + member.stored_bytes
    if len(data) < stop:  # A long extra field, or the end of the archive. S3 refuses a range that starts beyond the
        data = memoryview(ANYWHERE.read_range(uri, member.offset, stop))  # end, so this one starts at the header.
    _check_whole(data[start:stop], member.stored_bytes)
    return data[start:stop]


def _check_whole(data: bytes | memoryview, size_bytes: int) -> None:
    if len(data) < size_bytes:
        raise ImageError("truncated", f"the archive ends {size_bytes - len(data):,} bytes before the member does")


def _unpacked(member: Member, data: memoryview) -> bytes:
    """Unpacks at most one byte more than the index states, so that a zip bomb costs nothing."""
    max_bytes = member.size_bytes + 1
    if member.packing == "stored":
        return bytes(data[:max_bytes])
    if member.packing == "deflated":
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max_bytes)
    if member.packing == "bzip2":
        return bz2.BZ2Decompressor().decompress(data, max_bytes)
    # Source: APPNOTE 5.8.8: version, length of the properties (5), properties, data. The format "alone" of xz is the
    # properties, the unpacked size, data
    alone = b"".join((data[4:9], member.size_bytes.to_bytes(8, "little"), data[9:]))
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(alone, max_bytes)


def _streamed_images(uri: str, members: Sequence[Member]) -> Iterator[bytes | ImageError]:
    passes: list[list[Member]] = []
    for member in members:  # A stream can only be read forward.
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
                    yield next(images)  # A variable would keep this image while the next is read.
                    done += 1
    except ImageError as err:
        yield from itertools.repeat(_bare(err), len(members) - done)


def _images_of_stream(source: _TarSource, members: Sequence[Member]) -> Iterator[bytes]:
    headers = enumerate(_headers(source))
    for ordinal, same in itertools.groupby(members, key=lambda member: member.offset):  # Hard links share their data.
        sizes = [member.size_bytes for member in same]
        info = next((info for number, info in headers if number == ordinal), None)
        if info is None:
            raise ImageError("truncated", "the archive ends before the member starts")
        if info.size != sizes[0]:
            raise ImageError("unreadable", "the archive has changed since it was listed")
        image = source.file.read(info.size)
        _check_whole(image, info.size)
        yield from itertools.repeat(image, len(sizes))
        del image  # Frees it before the next is read.
