"""Zips: the directory at their end, and unpacking single members.

Owns: listing a zip and unpacking the bytes of a member. Does not own: fetching those bytes (`archives`), or links
(`members`).

Contract: see `archives`. Each entry of the directory is parsed by itself, so an odd one costs its own row only.
Python's `zipfile` would refuse the whole directory, and knows neither Unicode path fields nor zstd.

Source of all numbers, and of the sections in brackets: PKWARE APPNOTE 6.3.10.
"""

import bz2
import contextlib
import lzma
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, cast

import pyarrow as pa

from mnist_dist.errors import ImageError
from mnist_dist.sources.members import MAX_SIZE_BYTES, Listing, Member, Packing, check_whole

HEADER_MAGIC = b"PK\3\4"
"""Begins the local header of a member."""
MAGICS = (HEADER_MAGIC, b"PK\5\6", b"PK\7\x08")
"""First bytes of a zip: a member, an empty archive, a multi-part archive."""
HEADER_BYTES = 30
"""Size of a local header without the name and the extra field."""

_ENTRY_MAGIC = b"PK\1\2"
_ENTRY = struct.Struct("<4s4xHH4xLLLHHH4xLL")  # [4.3.12]
_END_MAGIC = b"PK\5\6"
_END = struct.Struct("<4s6xHLLH")  # [4.3.16]
_END64_MAGIC = b"PK\6\6"
_END64 = struct.Struct("<4s28xQQQ")  # [4.3.14]
_LOCATOR_MAGIC = b"PK\6\7"
_LOCATOR = struct.Struct("<4s4xQ4x")  # [4.3.15]
_MAX_COMMENT_BYTES = 2**16 - 1
_SEARCHED_BYTES = 16 * 2**20  # Of the end of a truncated zip, for what is left of the directory.
_IN_ZIP64 = 2**32 - 1
_ZIP64_FIELD, _UNICODE_PATH_FIELD = 0x0001, 0x7075  # [4.5.3, 4.6.9]
_ENCRYPTED, _PATCHED, _UTF8 = 0x41, 0x20, 0x800  # Flag bits. [4.4.4]
_PACKINGS: Mapping[int, Packing] = {0: "stored", 8: "deflated", 12: "bzip2", 14: "lzma", 20: "zstd", 93: "zstd"}
_UNSUPPORTED = {  # [4.4.5]
    **{1: "shrink", 2: "reduce", 3: "reduce", 4: "reduce", 5: "reduce", 6: "implode", 9: "deflate64", 10: "implode"},
    **{16: "cmpsc", 18: "terse", 19: "lz77", 94: "mp3", 95: "xz", 96: "jpeg", 97: "wavpack", 98: "ppmd", 99: "aes"},
}


@dataclass(frozen=True, slots=True)
class _Directory:
    """Where the directory lies in the file, and what the end record says of it."""

    start: int
    stop: int
    """Nothing behind it belongs to the directory."""
    size_bytes: int
    entries: int
    """Less than there are, in zips of more than 65,535 members by writers without zip64."""
    prefix_bytes: int
    """Bytes before the zip, which its own positions do not count."""


# --- listing ---------------------------------------------------------------------------------------------------------


def text_of(data: bytes) -> str:
    """A name or the target of a link, by a writer without the Unicode flag: UTF-8 or the code page of MS-DOS."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp437")


def list_zip(file: BinaryIO, archive_bytes: int, listing: Listing) -> None:
    """Lists the files and symbolic links of a zip.

    Args:
        file: the zip.
        archive_bytes: its size.
        listing: gets the members, those before any damage too.

    Raises:
        ImageError: the directory is damaged or ends early.
    """
    directory = _find_directory(file, archive_bytes)
    if directory is not None:
        _list_directory(file, directory, archive_bytes, listing)
        return
    if _read_at(file, 0, len(HEADER_MAGIC)) != HEADER_MAGIC:
        raise ImageError("unreadable", "it has no end record, so it is no zip")
    directory = _find_truncated_directory(file, archive_bytes)
    if directory is not None:
        with contextlib.suppress(ImageError):
            _list_directory(file, directory, archive_bytes, listing)
    raise ImageError("truncated", "the end of the zip is missing, with all or a part of its directory")


def _list_directory(file: BinaryIO, directory: _Directory, archive_bytes: int, listing: Listing) -> None:
    for member, mode in _members(file, directory, archive_bytes):
        if stat.S_ISLNK(mode):
            listing.add_unread_link(member)
        else:
            listing.add(member)


def _read_at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _find_directory(file: BinaryIO, archive_bytes: int) -> _Directory | None:
    """The directory that the end record names; None without an end record."""
    tail_start = max(0, archive_bytes - _END.size - _MAX_COMMENT_BYTES)
    tail = _read_at(file, tail_start, archive_bytes - tail_start)
    end = _find_end_record(tail)
    if end is None:
        return None
    _, entries, size_bytes, offset, _ = _END.unpack_from(tail, end)
    stop = tail_start + end
    end64 = _find_end64_record(file, stop)
    if end64 is not None:
        stop, entries, size_bytes, offset = end64
    for start in (stop - size_bytes, offset):
        if 0 <= start < stop and _read_at(file, start, len(_ENTRY_MAGIC)) == _ENTRY_MAGIC:
            return _Directory(start, stop, size_bytes, entries, start - offset)
    if entries == size_bytes == 0:
        return _Directory(stop, stop, 0, 0, 0)
    raise ImageError("unreadable", f"the end record places the directory at byte {offset}, where there is none")


def _find_end_record(tail: bytes) -> int | None:
    """The last end record whose comment ends with the file; else the last one, unless the zip goes on behind it.

    It does after the end of a zip that is a member itself, where the end of the outer zip is missing.
    """
    last = None
    position = tail.rfind(_END_MAGIC, 0, max(0, len(tail) - _END.size + len(_END_MAGIC)))
    while position >= 0:
        *_, comment_bytes = _END.unpack_from(tail, position)
        if position + _END.size + comment_bytes == len(tail):
            return position
        behind = tail[position + _END.size :]
        if last is None and _ENTRY_MAGIC not in behind and HEADER_MAGIC not in behind:
            last = position
        position = tail.rfind(_END_MAGIC, 0, position + len(_END_MAGIC) - 1)
    return last


def _find_end64_record(file: BinaryIO, end: int) -> tuple[int, int, int, int] | None:
    """Position of the zip64 end record, and its entries, size and position of the directory; None without one."""
    locator = _read_at(file, end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
    if not locator.startswith(_LOCATOR_MAGIC):
        return None
    _, offset = _LOCATOR.unpack(locator)
    for position in (offset, end - _LOCATOR.size - _END64.size):  # The second: with other bytes before the zip.
        if 0 <= position <= end - _LOCATOR.size - _END64.size:
            record = _read_at(file, position, _END64.size)
            if record.startswith(_END64_MAGIC):
                return (position, *_END64.unpack(record)[1:])
    return None


def _find_truncated_directory(file: BinaryIO, archive_bytes: int) -> _Directory | None:
    """What is left of a directory in which the file ends: the longest chain of entries that leads to its end."""
    tail_start = max(0, archive_bytes - _SEARCHED_BYTES)
    tail = _read_at(file, tail_start, archive_bytes - tail_start)
    seen = set[int]()
    start, longest = 0, 0
    position = tail.find(_ENTRY_MAGIC)
    while position >= 0:
        if position not in seen and (length := _chain_length(tail, position, seen)) >= max(longest, 1):
            start, longest = position, length
        position = tail.find(_ENTRY_MAGIC, position + 1)
    return _Directory(tail_start + start, archive_bytes, _IN_ZIP64, 0, 0) if longest else None


def _chain_length(tail: bytes, position: int, seen: set[int]) -> int:
    """Number of entries from `position` on, one behind the other; 0 if they do not lead to the end of the file."""
    length = 0
    while tail.startswith(_ENTRY_MAGIC, position) and position not in seen:
        seen.add(position)
        if position + _ENTRY.size > len(tail):
            return length
        position += _ENTRY.size + sum(_ENTRY.unpack_from(tail, position)[6:9])
        length += 1
    rest = tail[position : position + len(_END_MAGIC)]
    incomplete = len(tail) - position < _END64.size + _LOCATOR.size + _END.size
    magics = (_ENTRY_MAGIC, _END_MAGIC, _END64_MAGIC)
    return length if incomplete and any(magic.startswith(rest) for magic in magics) else 0


def _members(file: BinaryIO, directory: _Directory, archive_bytes: int) -> Iterator[tuple[Member, int]]:
    """The entries that are no folders, each with its Unix mode.

    Raises:
        ImageError: the directory is damaged or ends early.
    """
    file.seek(directory.start)
    position, entries = directory.start, 0
    while position + _ENTRY.size <= directory.stop:
        fields = _ENTRY.unpack(file.read(_ENTRY.size))
        magic, name_bytes, extra_bytes, comment_bytes = fields[0], *fields[6:9]
        length = _ENTRY.size + name_bytes + extra_bytes + comment_bytes
        if magic != _ENTRY_MAGIC or position + length > directory.stop:
            break
        rest = file.read(length - _ENTRY.size)
        position, entries = position + length, entries + 1
        extra = rest[name_bytes : name_bytes + extra_bytes]
        name = _name(rest[:name_bytes], fields[1], extra)
        if not name.endswith("/"):
            yield _member(name, fields, extra, directory, archive_bytes), fields[9] >> 16
    complete = position == directory.stop and entries >= directory.entries
    if not complete and position != directory.start + directory.size_bytes:
        raise ImageError("unreadable", f"the directory of the zip is damaged at byte {position}")


def _name(name: bytes, flags: int, extra: bytes) -> str:
    """The name as text."""
    text = None
    if not flags & _UTF8 and b"up" in extra:  # 0x7075 in little-endian order.
        text = _unicode_path(name, extra)
    if text is None:
        text = name.decode(errors="backslashreplace") if flags & _UTF8 else text_of(name)
    return text.replace("\0", "\\x00") if "\0" in text else text


def _unicode_path(name: bytes, extra: bytes) -> str | None:
    """The name in the Unicode path field, if it belongs to this name: a program may have renamed the member since."""
    field = _field(extra, _UNICODE_PATH_FIELD)
    if len(field) <= 5 or field[0] != 1 or int.from_bytes(field[1:5], "little") != zlib.crc32(name):
        return None
    try:
        return field[5:].decode()
    except UnicodeDecodeError:
        return None


def _field(extra: bytes, wanted: int) -> bytes:
    """A field of the extra fields; empty if there is none."""
    position = 0
    while position + 4 <= len(extra):
        number, size = struct.unpack_from("<HH", extra, position)
        if number == wanted:
            return extra[position + 4 : position + 4 + size]
        position += 4 + size
    return b""


def _member(name: str, fields: tuple[int, ...], extra: bytes, directory: _Directory, archive_bytes: int) -> Member:
    _, flags, method, crc32, stored, size, *_, offset = fields
    known = True
    if _IN_ZIP64 in (size, stored, offset):
        (size, stored, offset), known = _zip64_values((size, stored, offset), extra)
    offset += directory.prefix_bytes
    packing = _PACKINGS.get(method, "other")
    problem = None
    if flags & _ENCRYPTED:
        problem = ImageError("unreadable", "the member is encrypted")
    elif not known:
        problem = ImageError("unreadable", "the zip directory does not say its size or position")
    elif packing == "other" or flags & _PATCHED:
        problem = _packing_problem(method, flags)
    elif not 0 <= offset <= archive_bytes - HEADER_BYTES - stored:
        problem = ImageError("unreadable", "the zip directory places it outside the archive")
    if problem is not None:  # Nothing has checked these.
        stored, offset = (max(0, min(value, MAX_SIZE_BYTES)) for value in (stored, offset))
    return Member(name, min(size, MAX_SIZE_BYTES), packing, offset, stored, crc32, problem)


def _zip64_values(values: tuple[int, int, int], extra: bytes) -> tuple[tuple[int, ...], bool]:
    """Takes what the entry itself has no room for from the zip64 field [4.5.3]; False if the field ends too early."""
    field = _field(extra, _ZIP64_FIELD)
    found, known = list[int](), True
    for value in values:
        if value == _IN_ZIP64:
            known = known and len(field) >= 8
            value, field = int.from_bytes(field[:8], "little"), field[8:]
        found.append(value)
    return tuple(found), known


def _packing_problem(method: int, flags: int) -> ImageError:
    packing = f"compressed patch data ({method})" if flags & _PATCHED else _UNSUPPORTED.get(method, f"method {method}")
    supported = ", ".join(dict.fromkeys(_PACKINGS.values()))
    return ImageError("unreadable", f"the compression must be one of {supported}. Received: {packing}")


# --- reading ---------------------------------------------------------------------------------------------------------


def data_range(member: Member, header: bytes | memoryview) -> range:
    """Where the packed bytes lie, counted from the member's offset.

    Args:
        member: the member.
        header: the bytes of the archive from the member's offset on.

    Raises:
        ImageError: there is no local header.
    """
    check_whole(header[:HEADER_BYTES], HEADER_BYTES)
    if header[:4] != HEADER_MAGIC:
        raise ImageError("unreadable", f"no member starts at byte {member.offset}, where the zip directory places it")
    start = HEADER_BYTES + sum(struct.unpack_from("<HH", header, 26))  # The lengths of name and extra field.
    return range(start, start + member.stored_bytes)


def unpack(member: Member, data: memoryview) -> bytes:
    """Unpacks a member from its packed bytes.

    Raises:
        ImageError: the bytes are not those that the directory describes.
    """
    image = _unpacked(member, data)
    if len(image) != member.size_bytes:
        size = f"{len(image):,}" if len(image) < member.size_bytes else "more"
        raise ImageError("unreadable", f"the zip directory says {member.size_bytes:,} unpacked bytes; there are {size}")
    if zlib.crc32(image) != member.crc32:
        raise ImageError("unreadable", "the checksum differs from the one in the zip directory")
    return image


def _unpacked(member: Member, data: memoryview) -> bytes:
    """Unpacks at most one byte more than the index states, so that a zip bomb costs nothing."""
    max_bytes = member.size_bytes + 1
    if member.packing == "stored":
        return bytes(data[:max_bytes])
    if member.packing == "deflated":
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max_bytes)
    if member.packing == "bzip2":
        return bz2.BZ2Decompressor().decompress(data, max_bytes)
    if member.packing == "zstd":
        with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
            return cast(bytes, stream.read(max_bytes))
    return _unpacked_lzma(member, data, max_bytes)


def _unpacked_lzma(member: Member, data: memoryview, max_bytes: int) -> bytes:
    # [5.8.8]: version, length of the properties (5), properties, data. The format "alone" of xz is the properties, the
    # unpacked size, data. The properties end in the size of the dictionary, which need not exceed the member.
    dictionary_bytes = min(int.from_bytes(data[5:9], "little"), max(member.size_bytes, 4096))
    numbers = dictionary_bytes.to_bytes(4, "little") + member.size_bytes.to_bytes(8, "little")
    alone = b"".join((data[4:5], numbers, data[9:]))
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(alone, max_bytes)
