"""The rotation that EXIF and XMP data ask for."""

import re
from collections.abc import Iterable

from mnist_dist.images.ifd import exif_orientation

_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([1-8])")


def orientation_of(*, exif: Iterable[bytes], xmp: Iterable[bytes]) -> int:
    """The rotation of the first EXIF data that state one, else that of XMP: 1 (upright) to 8.

    Args:
        exif: EXIF data, from their TIFF header on.
        xmp: XMP packets.
    """
    stated = next((orientation for data in exif if (orientation := exif_orientation(data))), None)
    if stated is not None:
        return stated
    found = next((match for packet in xmp if (match := _XMP_ORIENTATION.search(packet))), None)
    return int(found[1]) if found else 1
