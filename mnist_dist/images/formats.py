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
from mnist_dist.images.pixels import Opened
from mnist_dist.images.spec import ImageSpec
from mnist_dist.images.tiff import open_tiff

Open = Callable[[bytes, ImageSpec | None], Opened]


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


def _bitmap(kind: str) -> tuple[Decoder]:
    return (Decoder("Pillow", functools.partial(pillow.open_bmp, kind=kind)),)


_JPEGS = (
    Decoder("libjpeg-turbo", jpeg.open_ordinary),
    Decoder("Pillow", pillow.open_jpeg),
    Decoder("imagecodecs", open_deep_jpeg),
)
_TIFFS = (Decoder("Pillow", pillow.open_tiff), Decoder("tifffile and imagecodecs", open_tiff))

FORMATS = (
    Format("JPEG", signatures.is_jpeg, (".jpg", ".jpeg", ".jpe", ".jfif"), _JPEGS),
    Format("PNG", signatures.is_png, (".png", ".apng"), (Decoder("Pillow", pillow.open_png),)),
    Format("GIF", signatures.is_gif, (".gif",), (Decoder("Pillow", pillow.open_gif),)),
    Format("BMP", signatures.is_bmp, (".bmp",), _bitmap("BMP")),
    Format("DIB", signatures.is_dib, (".dib",), _bitmap("DIB")),
    Format("WebP", signatures.is_webp, (".webp",), (Decoder("Pillow", pillow.open_webp),)),
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
    Format("PNM", signatures.is_pnm, (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), (Decoder("Pillow", pillow.open_pnm),)),
)

IMAGE_SUFFIXES = tuple(suffix for format in FORMATS for suffix in format.suffixes)
"""Lower-case file suffixes of the formats that can be decoded."""


def format_of(data: bytes) -> Format | None:
    """The format of a file by its first bytes; None if it is none of the table."""
    return next((format for format in FORMATS if format.is_one(data)), None)
