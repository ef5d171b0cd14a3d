"""WebP: size and rotation by the chunks of the file.

Owns: reading them without libwebp, which takes the memory of two whole images as soon as it opens one. Does not own:
decoding (`pillow`).

Source: RFC 9649, "WebP Image Format", sections 2.3 to 2.7; RFC 6386, section 9.1, for the lossy bitstream.
"""

from collections.abc import Iterator
from typing import NamedTuple

from mnist_dist.images.exif import orientation_of


class Header(NamedTuple):
    """What the chunks of a WebP say."""

    width_px: int
    height_px: int
    """Size as stored; of an animated one: of its canvas."""
    orientation: int
    """EXIF orientation, 1-8."""


def read_header(data: bytes) -> Header:
    """Reads the chunks of a WebP.

    Raises:
        OSError: there is no header of an image.
    """
    size, exif, xmp = None, list[bytes](), list[bytes]()
    for kind, body in _chunks(data):
        size = size or _size(kind, body)
        if kind == b"EXIF":
            exif.append(body.removeprefix(b"Exif\0\0"))
        elif kind == b"XMP ":
            xmp.append(body)
    if size is None:
        raise OSError("the header is not complete or not valid")
    return Header(*size, orientation_of(exif=exif, xmp=xmp) if exif or xmp else 1)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each chunk, of pixels only as much as holds their size."""
    position = 12
    while position + 8 <= len(data):
        kind, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        kept = length if kind in (b"EXIF", b"XMP ") else min(length, 10)
        yield kind, data[position + 8 : position + 8 + kept]
        position += 8 + length + length % 2


def _size(kind: bytes, body: bytes) -> tuple[int, int] | None:
    if kind == b"VP8X" and len(body) == 10:
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a" and len(body) == 10:
        width, height = (int.from_bytes(body[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        return (width, height) if width and height else None
    if kind == b"VP8L" and body[:1] == b"\x2f" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None
