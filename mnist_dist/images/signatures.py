"""Signatures: how the formats of the extra `formats`, AVIF and JPEG 2000 begin.

Owns: telling a format by its first bytes. Does not own: whether the rest is whole.
"""

from mnist_dist.images import ifd, jpegxl

_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_MAX_BRANDS = 64
_JPEG2000 = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")


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
