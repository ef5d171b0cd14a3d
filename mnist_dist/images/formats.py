"""The one table of image formats: how each is recognised, and which decoders read it, in order.

Owns: the table. Does not own: the decoders, or what happens when one fails (`decoder`).

The first bytes decide, never the name of a file. A decoder that was not made for an image says so (`NotForMe`), and the
next one gets it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mnist_dist.images import jpeg, pillow, signatures
from mnist_dist.images.deep_jpeg import open_deep_jpeg
from mnist_dist.images.heif import open_heif
from mnist_dist.images.jpegxl import open_jpegxl
from mnist_dist.images.pixels import ImageSpec, Opened
from mnist_dist.images.tiff import open_tiff

Open = Callable[[bytes, ImageSpec | None], Opened]
_DIB_HEADERS = frozenset({12, 40, 52, 56, 64, 108, 124})  # Sizes of the bitmap header, bytes.


class Decoder(NamedTuple):
    """A library that reads some kinds of a format."""

    library: str
    open: Open
    """Reads the header. Raises NotForMe for a kind that it was not made for, ImportError if the library is missing."""


@dataclass(frozen=True)
class Format:
    """One image format."""

    name: str
    is_one: Callable[[bytes], bool]
    """Whether these are the first bytes of such a file."""
    suffixes: tuple[str, ...]
    """Lower-case suffixes of its files."""
    decoders: tuple[Decoder, ...]
    """In the order in which they are asked."""


def _starts(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(magics)


def _pillow(kind: str) -> tuple[Decoder]:
    return (Decoder("Pillow", functools.partial(pillow.open_any, kind=kind)),)


def _bitmap(kind: str) -> tuple[Decoder]:
    return (Decoder("Pillow", functools.partial(pillow.open_bmp, kind=kind)),)


def _is_dib(data: bytes) -> bool:
    """A bitmap header: its size, and a plane count of 1 where that stands."""
    size = int.from_bytes(data[:4], "little")
    planes = data[8:10] if size == 12 else data[12:14]
    return size in _DIB_HEADERS and planes == b"\1\0"


def _is_bmp(data: bytes) -> bool:
    return data.startswith(b"BM") and _is_dib(data[14:40])


def _is_webp(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


_JPEGS = (
    Decoder("libjpeg-turbo", jpeg.open_ordinary),
    Decoder("Pillow", pillow.open_jpeg),
    Decoder("imagecodecs", open_deep_jpeg),
)
_TIFFS = (Decoder("Pillow", pillow.open_tiff), Decoder("tifffile and imagecodecs", open_tiff))
_PNM_MAGICS = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf")

FORMATS = (
    Format("JPEG", _starts(jpeg.MAGIC), (".jpg", ".jpeg", ".jpe", ".jfif"), _JPEGS),
    Format("PNG", _starts(b"\x89PNG\r\n\x1a\n"), (".png", ".apng"), (Decoder("Pillow", pillow.open_png),)),
    Format("GIF", _starts(b"GIF87a", b"GIF89a"), (".gif",), (Decoder("Pillow", pillow.open_gif),)),
    Format("BMP", _is_bmp, (".bmp",), _bitmap("BMP")),
    Format("DIB", _is_dib, (".dib",), _bitmap("DIB")),
    Format("WebP", _is_webp, (".webp",), (Decoder("Pillow", pillow.open_webp),)),
    Format("AVIF", signatures.is_avif, (".avif",), (Decoder("Pillow", pillow.open_avif),)),
    Format("HEIF", signatures.is_heif, (".heic", ".heif", ".hif"), (Decoder("pi-heif", open_heif),)),
    Format(
        "JPEG 2000",
        signatures.is_jpeg2000,
        (".jp2", ".j2k", ".j2c", ".jpx", ".jpf"),
        (Decoder("Pillow", pillow.open_jpeg2000),),
    ),
    Format("JPEG XL", signatures.is_jpegxl, (".jxl",), (Decoder("imagecodecs", open_jpegxl),)),
    Format("TIFF", signatures.is_tiff, (".tif", ".tiff"), _TIFFS),
    Format("PNM", _starts(*_PNM_MAGICS), (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), _pillow("PPM")),
)

IMAGE_SUFFIXES = tuple(suffix for format in FORMATS for suffix in format.suffixes)
"""Lower-case file suffixes of the formats that can be decoded."""


def format_of(data: bytes) -> Format | None:
    """The format of a file by its first bytes; None if it is none of the table."""
    return next((format for format in FORMATS if format.is_one(data)), None)
