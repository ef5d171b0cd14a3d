"""PNG: the chunks that decide what the pixels mean, wherever they stand.

Owns: bit depth, transparent colour and rotation. Does not own: decoding (`pillow`).

Source: Portable Network Graphics (PNG) Specification, third edition, sections 5.3 and 11.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

from mnist_dist.images.exif import orientation_of

_SAMPLES = {0: 1, 2: 3}  # Colour types that may have a transparent colour, grey and RGB -> its samples.
_MAX_PROFILE_BYTES = 2**18
_PROFILES = (b"Raw profile type exif\0", b"Raw profile type APP1\0")  # How ImageMagick keeps EXIF.


class Header(NamedTuple):
    """What the chunks of a PNG say beside its size and pixels."""

    bits: int
    """Per sample: 1, 2, 4, 8 or 16."""
    colour: tuple[int, ...] | None
    """The one transparent colour, 1 (grey) or 3 (RGB) samples as stored; None without one."""
    orientation: int
    """EXIF orientation, 1-8."""
    is_animated: bool

    @property
    def has_deep_colour(self) -> bool:
        """Whether its transparent colour is one of 16-bit RGB, of which Pillow keeps 8 bits."""
        return self.bits == 16 and self.colour is not None and len(self.colour) == 3


def read_header(data: bytes) -> Header:
    """Reads the chunks of a PNG, without checking them: that is left to the decoder."""
    bits, colour_type, colour, is_animated = 8, 2, None, False
    is_before_pixels = True  # A transparent colour that comes later does not count.
    exif, xmp = list[bytes](), list[bytes]()
    for kind, body in _chunks(data):
        if kind == b"IHDR" and len(body) >= 10:
            bits, colour_type = body[8], body[9]
        elif kind == b"IDAT":
            is_before_pixels = False
        elif kind == b"tRNS" and is_before_pixels and len(body) == 2 * _SAMPLES.get(colour_type, 0):
            colour = tuple(int.from_bytes(body[at : at + 2], "big") for at in range(0, len(body), 2))
        elif kind == b"acTL":
            is_animated = True
        elif kind == b"eXIf":
            exif.append(body.removeprefix(b"Exif\0\0"))
        elif kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
            xmp.append(body)
        elif kind in (b"tEXt", b"zTXt") and body.startswith(_PROFILES):
            exif.append(_profile(kind, body[len(_PROFILES[0]) :]))
    orientation = orientation_of(exif=exif, xmp=xmp) if exif or xmp else 1
    return Header(bits, colour or None, orientation, is_animated)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each chunk; those of the pixels are left out."""
    position = 8
    while position + 12 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        has_pixels = kind in (b"IDAT", b"fdAT")
        yield kind, b"" if has_pixels else data[position + 8 : position + 8 + length]
        position += 12 + length


def _profile(kind: bytes, text: bytes) -> bytes:
    """The EXIF data of a profile in hexadecimal; none if it is damaged.

    Source: ImageMagick's png.c: a line feed, the name, the length and the digits, each on lines of its own.
    """
    try:
        if kind == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], _MAX_PROFILE_BYTES)
        return bytes.fromhex(b"".join(text.split()[2:]).decode("ascii")).removeprefix(b"Exif\0\0")
    except (ValueError, zlib.error):
        return b""
