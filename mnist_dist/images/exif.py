"""The rotation that EXIF or XMP data ask for."""

import re

from PIL import Image

ORIENTATION_TAG = 0x0112
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)\s*([1-8])")


def exif_orientation(tiff: bytes) -> int:
    """TO BE REPLACED"""
    exif = Image.Exif()
    try:
        exif.load(b"Exif\0\0" + tiff)
        value = exif.get(ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def xmp_orientation(xmp: bytes) -> int:
    """The orientation, 1-8, that an XMP packet states; 1 if it states none."""
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else 1
