"""Streams: the size that the header of an encoded image states, for images within a TIFF.

Owns: enough of each header to know how much a decoder will allocate. Does not own: decoding.
"""

from collections.abc import Callable
from typing import Any

from mnist_dist.images import webp
from mnist_dist.images.jpeg import FRAMES
from mnist_dist.images.jpegxl import jpegxl_size


def stream_px(stream: bytes | memoryview) -> int | None:
    """Width times height by the header of a JPEG, JPEG 2000, JPEG XL, JPEG XR, PNG, WebP or LERC stream.

    Returns:
        The number of pixels, None if the header is none of these, or not whole.
    """
    head = bytes(stream[:4096])
    for magic, read in _READERS.items():
        if head.startswith(magic):
            width, height = read(stream if read is _jpeg else head) or (0, 0)
            return width * height or None
    return None


_Size = tuple[int, int] | None


def _big(head: bytes | memoryview, at: int, size: int = 4) -> int:
    return int.from_bytes(head[at : at + size], "big")


def _little(head: bytes, at: int, size: int = 4) -> int:
    return int.from_bytes(head[at : at + size], "little")


def _jpeg(head: bytes | memoryview) -> _Size:
    """The first frame header, wherever it stands."""
    position = 2
    while position + 9 <= len(head) and head[position] == 0xFF:
        marker = head[position + 1]
        if marker in FRAMES:
            return _big(head, position + 7, 2), _big(head, position + 5, 2)
        position += 1 if marker == 0xFF else 2 + _big(head, position + 2, 2)
    return None


def _jpeg2000(head: bytes) -> _Size:
    """SIZ comes first in the codestream: the grid's size, less the image's offset in it."""
    at = head.find(b"\xff\x4f\xff\x51")
    return (_big(head, at + 8) - _big(head, at + 16), _big(head, at + 12) - _big(head, at + 20)) if at >= 0 else None


def _png(head: bytes) -> _Size:
    return _big(head, 16), _big(head, 20)


def _webp(head: bytes) -> _Size:
    try:
        header = webp.read_header(head)
    except OSError:
        return None
    return header.width_px, header.height_px


def _lerc(head: bytes) -> _Size:
    if head.startswith(b"CntZImage "):
        return _little(head, 22), _little(head, 18)
    rows = 14 if _little(head, 6) >= 3 else 10  # A checksum comes before the size since version 3.
    return _little(head, rows + 4), _little(head, rows)


def _jpegxr(head: bytes) -> _Size:
    """Tags as in a TIFF: 0xBC80 is the width, 0xBC81 the height."""
    begin = _little(head, 4)
    entries = (begin + 2 + 12 * index for index in range(_little(head, begin, 2)))
    sizes = {_little(head, at, 2): _little(head, at + 8) for at in entries if at + 12 <= len(head)}
    return (sizes[0xBC80], sizes[0xBC81]) if {0xBC80, 0xBC81} <= sizes.keys() else None


_READERS: dict[bytes, Callable[[Any], _Size]] = {
    b"\xff\xd8": _jpeg,
    b"\xff\x4f\xff\x51": _jpeg2000,
    b"\0\0\0\x0cjP  ": _jpeg2000,
    b"\xff\x0a": jpegxl_size,
    b"\0\0\0\x0cJXL ": jpegxl_size,
    b"\x89PNG": _png,
    b"RIFF": _webp,
    b"Lerc2 ": _lerc,
    b"CntZImage ": _lerc,
    b"II\xbc": _jpegxr,
}
