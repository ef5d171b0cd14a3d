"""Tars: their headers, and the members of a stream that can only be read forward.

Owns: listing a tar and reading the members of a compressed one. Does not own: decompression (`archives`), or links
(`members`).

Contract: see `archives`. `tarfile` parses the headers, within bounds that it does not set itself: headers larger than
1 MiB end the listing, and so do those over which it would spend hours.
"""

import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, Protocol, cast

from mnist_dist.errors import ImageError
from mnist_dist.sources.members import (
    MAX_SIZE_BYTES,
    Link,
    Listing,
    Member,
    Packing,
    bare,
    check_whole,
    image_errors,
)

_BLOCK_BYTES = 512
_STEP_BYTES = 1 << 20
_MAX_HEADER_BYTES = 2**20  # Bounds the headers of one member (names and attributes).
_MAX_GLOBALS = 1000  # Attributes for all members, each of which costs time for every member.
# A regular expression in `tarfile` needs quadratic time over digits: CVE-2024-6232, until Python 3.11.10 and 3.12.6.
_TOO_MANY_DIGITS = b"0" * 256
_DIGITS_AS_ZEROS = bytes(ord("0") if chr(byte).isascii() and chr(byte).isdigit() else 1 for byte in range(256))


class Unpacked(Protocol):
    """The unpacked bytes of an archive, which can only be read forward."""

    def read(self, size: int, /) -> bytes:
        """Reads `size` bytes; fewer at the end only."""
        ...


class Seekable(Unpacked, Protocol):
    """The bytes of a plain tar."""

    def seek(self, position: int, /) -> int:
        """Moves to a position."""
        ...


class TarSource:
    """The file that `tarfile` reads headers from: forward only, in bounded steps.

    It keeps the last block, so that an error can say why the headers end.

    Args:
        file: a file at its start.
    """

    def __init__(self, file: Unpacked) -> None:
        self.block = b""
        self.block_start = 0
        self._file = file
        self._position = 0
        self._header_bytes = 0

    def read(self, size: int, /) -> bytes:
        """Reads a part of a header."""
        self._header_bytes += size
        if size < 0 or self._header_bytes > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {max(size, self._header_bytes):,} bytes")
        self.block_start = self._position
        self.block = self.read_data(size)
        if size > _BLOCK_BYTES and _TOO_MANY_DIGITS in self.block.translate(_DIGITS_AS_ZEROS):
            raise tarfile.ReadError(f"{len(_TOO_MANY_DIGITS)} digits or more in a row")
        return self.block

    def read_data(self, size: int) -> bytes:
        """Reads the data of a member."""
        with image_errors():  # `tarfile` would turn a zlib.error into its own error.
            data = self._file.read(size)
        self._position += len(data)
        return data

    def tell(self) -> int:
        """The position in the tar."""
        return self._position

    def skip_to(self, position: int) -> None:
        """Moves forward to `position`, which ends the current header.

        Raises:
            ImageError: the archive ends before `position`, or `position` lies behind.
        """
        if position < self._position:  # A negative size, over which `tarfile` of Python 3.11 loops for ever.
            raise ImageError("unreadable", f"the header at byte {self.block_start} points back to byte {position}")
        self._advance(position)
        if self._position < position:
            raise ImageError(
                "truncated", f"the archive ends at byte {self._position}, its last member at byte {position}"
            )
        self._header_bytes = 0

    def _advance(self, position: int) -> None:
        while self._position < position and self.read_data(min(position - self._position, _STEP_BYTES)):
            pass

    # tarfile's protocol requires these methods, but reading never calls them.

    def seek(self, position: int, /) -> int:
        """Never called."""
        raise io.UnsupportedOperation("seek")

    def write(self, data: bytes, /) -> int:
        """Never called."""
        raise io.UnsupportedOperation("write")

    def close(self) -> None:
        """The file belongs to the caller."""


class SeekableTarSource(TarSource):
    """A plain tar, where data are skipped without being read.

    Args:
        file: a file at its start.
        size_bytes: size of the file.
    """

    def __init__(self, file: Seekable, size_bytes: int) -> None:
        super().__init__(file)
        self._seekable = file
        self._size_bytes = size_bytes

    def _advance(self, position: int) -> None:
        self._position = self._seekable.seek(max(self._position, min(position, self._size_bytes)))


def list_tar(
    source: TarSource, packing: Literal["tar", "stream"], listing: Listing, *, max_members: int | None = None
) -> None:
    """Lists the files and links of a tar.

    Args:
        source: the tar at its start.
        packing: `tar` for a plain one, `stream` for a compressed one.
        listing: gets the members, those before any damage too.
        max_members: stop after this many. None: list all.

    Raises:
        ImageError: the headers end neither at an end mark nor at the end of the archive.
    """
    for ordinal, info in enumerate(itertools.islice(_headers(source), max_members)):
        offset = ordinal if packing == "stream" else info.offset_data
        if info.islnk() or info.issym():
            _list_link(info, packing, offset, listing)
        elif info.isreg():
            member = Member(info.name, info.size, packing, offset, info.size, None, None)
            _list_file(source, info, member, listing)


def read_forward(source: TarSource, members: Sequence[Member]) -> Iterator[bytes]:
    """Reads members of a stream, sorted by offset, and yields the bytes of each.

    Raises:
        ImageError: the stream ends, is damaged or is not the one that was listed; no further member can be read.
    """
    headers = enumerate(_headers(source))
    for ordinal, same in itertools.groupby(members, key=lambda member: member.offset):  # Links share their data.
        sizes = [member.size_bytes for member in same]
        info = next((info for number, info in headers if number == ordinal), None)
        if info is None:
            raise ImageError("truncated", "the archive ends before the member starts")
        if info.size != sizes[0]:
            raise ImageError("unreadable", "the archive has changed since it was listed")
        image = source.read_data(info.size)
        check_whole(image, info.size)
        yield from itertools.repeat(image, len(sizes))
        del image  # Frees it before the next is read.


def _headers(source: TarSource) -> Iterator[tarfile.TarInfo]:
    """All headers of a tar. After each, the source stands at the start of its data, which the consumer may read.

    Raises:
        ImageError: the headers end neither at an end mark nor at the end of the archive.
    """
    start = 0
    try:
        with tarfile.open(fileobj=source, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
            info = tar.next()
            while info is not None:
                _check_header(info, tar, start)
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


def _check_header(info: tarfile.TarInfo, tar: tarfile.TarFile, start: int) -> None:
    if not 0 <= info.size < MAX_SIZE_BYTES:
        raise ImageError("unreadable", f"the header at byte {start} announces {info.size} bytes of data")
    if len(tar.pax_headers) > _MAX_GLOBALS:
        raise ImageError("unreadable", f"the header at byte {start} has more than {_MAX_GLOBALS:,} global attributes")


def _header_problem(source: TarSource, err: Exception) -> ImageError:
    if source.block_start == 0 and not source.block:
        return ImageError("empty", "the archive has no bytes")
    if len(source.block) < _BLOCK_BYTES:
        return ImageError("truncated", f"the archive ends in the header at byte {source.block_start}")
    return ImageError("unreadable", f"the header at byte {source.block_start} is damaged: {err}")


def _list_link(info: tarfile.TarInfo, packing: Packing, offset: int, listing: Listing) -> None:
    member = Member(info.name, 0, packing, offset, 0, None, None)
    if info.issym():
        listing.add_link(member, Link("symbolic", info.linkname))
        return
    target = listing.file(info.linkname)
    if target is None:
        listing.add_link(member, Link("hard", info.linkname))
    else:  # At once, since a later member of the target's name does not change this one.
        listing.add(replace(target, name=info.name))


def _list_file(source: TarSource, info: tarfile.TarInfo, member: Member, listing: Listing) -> None:
    if info.sparse is not None:
        stored = sum(length for _, length in cast(list[tuple[int, int]], info.sparse))
        problem = ImageError("unsupported", "it is a sparse file")
        listing.add(replace(member, stored_bytes=max(0, min(stored, MAX_SIZE_BYTES)), problem=problem))
        return
    try:
        source.skip_to(info.offset_data + info.size)
    except ImageError as err:  # This member is cut off, and later ones are unknown.
        listing.add(replace(member, problem=bare(err)))
        raise
    listing.add(member)
