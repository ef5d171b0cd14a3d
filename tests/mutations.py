"""What a bad disk, a bad program or a bad person makes of files, for `fuzz`.

Owns: changing files at random, some of them behind their checksums and under their compression. Does not own: the files
(`specimens`), or what is checked (`fuzz`). All is drawn from a `random.Random`, so a seed gives the same bytes again.
"""

import bz2
import gzip
import lzma
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".tar.gz": lambda data: gzip.compress(data, mtime=0),
    ".tar.bz2": bz2.compress,
    ".tar.xz": lambda data: lzma.compress(data, preset=0),
    ".tar.zst": lambda data: zstd_packed(data),
}
"""How a tar is compressed, by suffix."""

_INTERESTING = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 63, 64, 100, 127, 128, 129, 192, 254, 255),
    *(256, 257, 511, 512, 1000, 1024, 4096, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x10000, 65500, 20_000),
    *(0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF, 0x100000000, 2**63 - 1, 2**64 - 1),
)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_HEAD_BYTES = 600
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))


def mutated(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """The file with one to six changes; `other` is a file of the same kind, parts of which may get into it."""
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        change = draw.choice(_structural(data) or _CHANGES) if draw.random() < 0.5 else draw.choice(_CHANGES)
        data = change(data, other, draw)
    return data


def _structural(data: bytes) -> tuple[Callable[[bytes, bytes, random.Random], bytes], ...]:
    """The changes that know the structure of this kind, so that they get past checksums and markers."""
    if data.startswith(b"\xff\xd8"):
        return (_jpeg_segments, _jpeg_frame, _jpeg_field)
    if data.startswith(PNG_MAGIC):
        return (_png_chunks, _png_header, _png_stream)
    if data.startswith((b"II*\0", b"II+\0")):
        return (_tiff_entry,)
    if data[257:262] == b"ustar":
        return (_tar_header,)
    if data.startswith((b"PK\3\4", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return (_zip_field,) if data.startswith(b"PK") else (_repacked,)
    return (_tail_field,) if data.startswith(b"PAR1") else ()


def _near(data: bytes | bytearray, draw: random.Random) -> int:
    """A position; every other one is near the start, where headers are."""
    return draw.randrange(min(len(data), _HEAD_BYTES) if draw.random() < 0.5 else max(len(data), 1)) if data else 0


def _put(data: bytes, position: int, value: bytes) -> bytes:
    return data[:position] + value + data[position + len(value) :]


def _flip(data: bytes, other: bytes, draw: random.Random) -> bytes:
    new = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 2, 8))):
        new[_near(new, draw)] ^= 1 << draw.randrange(8)
    return bytes(new)


def _number(draw: random.Random, size: int) -> bytes:
    value = draw.choice(_INTERESTING) if draw.random() < 0.8 else draw.getrandbits(64)
    return (value % (1 << 8 * size)).to_bytes(size, draw.choice(("little", "big")))


def _overwrite(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return _put(data, _near(data, draw), _number(draw, draw.choice((1, 1, 2, 4, 8))))


def _cut(data: bytes, other: bytes, draw: random.Random) -> bytes:
    kept = data[: draw.randrange(len(data) + 1)]
    return kept + draw.choice((b"", b"", bytes(50), b"\xff" * 50, bytes(len(data) - len(kept))))


def _remove(data: bytes, other: bytes, draw: random.Random) -> bytes:
    position = _near(data, draw)
    return data[:position] + data[position + draw.choice((1, 2, 4, 16, 100, 1000)) :]


def _insert(data: bytes, other: bytes, draw: random.Random) -> bytes:
    position, length = _near(data, draw), draw.choice((1, 2, 4, 16, 100, 1000))
    sources = (bytes(length), b"\xff" * length, draw.randbytes(length), data[_near(data, draw) :][:length])
    return data[:position] + draw.choice(sources) + data[position:]


def _splice(data: bytes, other: bytes, draw: random.Random) -> bytes:
    position, length = _near(data, draw), draw.choice((8, 50, 500, len(other)))
    part = other[_near(other, draw) :][:length]
    return data[:position] + part + data[draw.choice((position, position + len(part))) :]


_CHANGES = (_flip, _overwrite, _overwrite, _cut, _remove, _insert, _splice)


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and stop of the segments of a JPEG, without the data behind a scan's header."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        yield position, min(position + 2 + length, len(data))
        position += 2 + length
        if marker == 0xDA:
            match = re.compile(rb"\xff[^\0\xd0-\xd7\xff]", re.DOTALL).search(data, position)
            position = match.start() if match else len(data)


def _segment_of(data: bytes, draw: random.Random) -> tuple[int, int]:
    return draw.choice(list(_segments(data)) or [(0, min(2, len(data)))])


def _jpeg_segments(data: bytes, other: bytes, draw: random.Random) -> bytes:
    start, stop = _segment_of(data, draw)
    place, _ = _segment_of(data, draw)
    match draw.randrange(4):
        case 0:
            return data[:start] + data[stop:]
        case 1:
            return data[:place] + data[start:stop] + data[place:]
        case 2:
            return data[:start] + b"\xff" * draw.choice((1, 3, 70)) + data[start:]
    first, last = _segment_of(other, draw)
    return data[:place] + other[first:last] + data[place:]


def _jpeg_frame(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Another type of frame, size, depth or sampling."""
    frames = [start for start, _ in _segments(data) if data[start + 1] in _FRAMES]
    if not frames:
        return data
    start = draw.choice(frames)
    if draw.random() < 0.4:
        return _put(data, start + 1, bytes([draw.choice(_FRAMES)]))
    if draw.random() < 0.5:
        sampling = draw.choice((0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0x44, 0x33))
        return _put(data, start + draw.choice((11, 14, 17)), bytes([sampling]))
    offset, size = draw.choice(((4, 1), (5, 2), (7, 2), (9, 1), (10, 1), (12, 1)))
    return _put(data, start + offset, _number(draw, size))


def _jpeg_field(data: bytes, other: bytes, draw: random.Random) -> bytes:
    start, stop = _segment_of(data, draw)
    return _put(data, draw.randrange(start, max(stop, start + 1)), _number(draw, draw.choice((1, 1, 2))))


def _png_parts(data: bytes) -> list[tuple[bytes, bytes]]:
    parts, position = [], len(PNG_MAGIC)
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        parts.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    return parts


def _png_of(parts: list[tuple[bytes, bytes]]) -> bytes:
    return PNG_MAGIC + b"".join(png_chunk(kind, content) for kind, content in parts)


def _png_chunks(data: bytes, other: bytes, draw: random.Random) -> bytes:
    parts = _png_parts(data)
    number = draw.randrange(len(parts) + 1)
    match draw.randrange(4):
        case 0:
            del parts[number : number + 1]
        case 1:
            parts[number:number] = parts[:number][-1:]
        case 2:
            parts[number:number] = draw.sample(parts, min(1, len(parts)))
        case _:
            theirs = _png_parts(other)
            parts[number:number] = draw.sample(theirs, min(1, len(theirs)))
    return _png_of(parts)


def _png_header(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Another value in a chunk, of which the first is the header, under a right checksum."""
    parts = _png_parts(data)
    if not parts:
        return data
    number = 0 if draw.random() < 0.6 else draw.randrange(len(parts))
    kind, content = parts[number]
    parts[number] = (kind, _put(content, draw.randrange(len(content) + 1), _number(draw, draw.choice((1, 1, 2, 4)))))
    return _png_of(parts)


def _png_stream(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Other pixels inside an intact stream, among them filters that do not exist."""
    parts = _png_parts(data)
    try:
        pixels = zlib.decompressobj().decompress(b"".join(body for kind, body in parts if kind == b"IDAT"), 2**20)
    except zlib.error:
        return data
    first = next((number for number, (kind, _) in enumerate(parts) if kind == b"IDAT"), len(parts))
    rest = [part for part in parts if part[0] != b"IDAT"]
    rest[first:first] = [(b"IDAT", zlib.compress(draw.choice(_CHANGES)(pixels, other, draw)))]
    return _png_of(rest)


def _tiff_entry(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Another tag, type, count or value in an entry of the first directory."""
    is_big = data[2:3] == b"+"
    start = int.from_bytes(data[8:16] if is_big else data[4:8], "little")
    head, entry = (8, 20) if is_big else (2, 12)
    count = min(int.from_bytes(data[start : start + head], "little"), 60)
    if not count or start > len(data):
        return data
    field, size = draw.choice(((0, 2), (2, 2), (4, 4), (4, 4), (8, 4), (8, 4), (8, 2)))
    if is_big and field == 8:
        field = 12
    return _put(data, start + head + entry * draw.randrange(count) + field, _number(draw, size))


def _tar_header(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Another field of a header, under a right checksum."""
    starts = [match.start() - 257 for match in re.finditer(b"ustar", data) if match.start() >= 257]
    if not starts:
        return data
    start = draw.choice(starts)
    header = data[start : start + 512]
    position, size = draw.choice(((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    values = (b"%o" % draw.choice(_INTERESTING), b"\x80" + _number(draw, 8).rjust(11, b"\0"), b"\xff" * 12, b"-1", b"")
    value = bytes([draw.choice(b"01234567gxLKSDMV\0")]) if size == 1 else draw.choice(values)[:size].ljust(size, b"\0")
    header = _put(_put(header, position, value), 148, b" " * 8)
    return data[:start] + _put(header, 148, b"%06o\0 " % sum(header)) + data[start + 512 :]


def _zip_field(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Another number in a local header, an entry of the directory or an end record."""
    starts = [match.start() for match in re.finditer(b"PK[\1\3\5\6][\2\4\6-\x08]", data)]
    tail = starts[-30:] if draw.random() < 0.7 else starts
    return _put(data, draw.choice(tail or [0]) + draw.randrange(4, 50), _number(draw, draw.choice((1, 2, 2, 4, 4, 8))))


def _tail_field(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Another number near the end, where Parquet has its metadata."""
    position = len(data) - draw.randrange(1, min(len(data), 1500) + 1)
    return _put(data, position, _number(draw, draw.choice((1, 1, 2, 4))))


def _repacked(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Another tar under an intact compression."""
    unpack, pack = _PACKERS[data[:1]]
    try:
        inner = unpack(data)
        outer = unpack(other)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error):
        return data
    return pack((draw.choice(_structural(inner) or _CHANGES))(inner, outer, draw))


def zstd_packed(data: bytes) -> bytes:
    """The data as one zstd frame."""
    import pyarrow as pa  # The decoders are fuzzed without it: under valgrind it takes a minute to import.

    return bytes(pa.Codec("zstd").compress(data))


def _zstd_unpacked(data: bytes) -> bytes:
    import pyarrow as pa

    with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
        return bytes(stream.read(2**22))


_PACKERS: dict[bytes, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    b"\x1f": (gzip.decompress, COMPRESSIONS[".tar.gz"]),
    b"B": (bz2.decompress, COMPRESSIONS[".tar.bz2"]),
    b"\xfd": (lzma.decompress, COMPRESSIONS[".tar.xz"]),
    b"\x28": (_zstd_unpacked, COMPRESSIONS[".tar.zst"]),
}


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
