"""Signatures: how each format begins.

Owns: telling a format by its first bytes. Does not own: whether the rest is whole.
"""

import re

from mnist_dist.images import ifd, jpeg, jpegxl

_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_MAX_BRANDS = 64
_DIB_HEADERS = frozenset({12, 40, 52, 56, 64, 108, 124})  # Sizes of the bitmap header, bytes.
_PNM = re.compile(rb"P7\s+[A-Z]|P[1-6fF]\s+(?:#[^\r\n]*[\r\n]\s*)*\d")
_PNM_HEAD_BYTES = 4096  # Comments may stand before the size.
_JPEG2000 = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")


def is_jpeg(data: bytes) -> bool:
    """A JPEG of any kind."""
    return data.startswith(jpeg.MAGIC)


def is_png(data: bytes) -> bool:
    """A PNG."""
    return data.startswith(b"\x89PNG\r\n\x1a\n")


def is_gif(data: bytes) -> bool:
    """A GIF of either version."""
    return data.startswith((b"GIF87a", b"GIF89a"))


def is_bmp(data: bytes) -> bool:
    """A bitmap with a file header."""
    return data.startswith(b"BM") and is_dib(data[14:40])


def is_dib(data: bytes) -> bool:
    """A bitmap without a file header: the size of its header, and a plane count of 1 where that stands."""
    size = int.from_bytes(data[:4], "little")
    planes = data[8:10] if size == 12 else data[12:14]
    return size in _DIB_HEADERS and planes == b"\1\0"


def is_webp(data: bytes) -> bool:
    """A WebP."""
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def is_pnm(data: bytes) -> bool:
    """A PBM, PGM, PPM or PFM, in which a size follows, or a PAM."""
    return _PNM.match(data[:_PNM_HEAD_BYTES]) is not None


def is_tiff(data: bytes) -> bool:
    """A TIFF or BigTIFF of either byte order."""
    return data.startswith(ifd.MAGICS)


def is_jpegxl(data: bytes) -> bool:
    """A JPEG XL codestream or container."""
    return data.startswith((jpegxl.CODESTREAM, jpegxl.CONTAINER))


def is_jpeg2000(data: bytes) -> bool:
    """A JPEG 2000 codestream or JP2 file."""
    return data.startswith(_JPEG2000)


def is_avif(data: bytes) -> bool:
    """A HEIF container with AV1 images."""
    return bool(_brands(data) & _AVIF_BRANDS)


def is_heif(data: bytes) -> bool:
    """A HEIF container with other images, which are HEVC (HEIC) as a rule."""
    brands = _brands(data)
    return bool(brands & _HEIF_BRANDS) and not brands & _AVIF_BRANDS


def _brands(data: bytes) -> set[bytes]:
    """The brands of an ISO base media file, by its box `ftyp`."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(len(data), int.from_bytes(data[:4], "big"), 8 + 4 * _MAX_BRANDS)
    return {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}
