"""JPEGs that neither libjpeg-turbo's strict mode nor Pillow takes: lossless ones and those of 12 bits, by imagecodecs.

Owns: which of them are decoded, and their colours. Does not own: the segments (`jpeg`), 8-bit lossless and
arithmetic-coded files, which Pillow reads.

imagecodecs (libjpeg-turbo 3 with a depth chosen at run time) sizes its buffers by the header that the decoder itself
has read. It keeps libjpeg's warnings to itself, so that only a file that is cut is noticed as damaged here.
"""

import numpy as np

from mnist_dist.errors import ImageError, first_line
from mnist_dist.images.depth import WORKING_BYTES, Samples, cmyk_to_rgb, eight_bits
from mnist_dist.images.jpeg import Header, read_header
from mnist_dist.images.pixels import NotForMe, Opened, Pixels, rotate, upright_size
from mnist_dist.images.spec import ImageSpec

_EXTENDED, _PROGRESSIVE, _LOSSLESS = 0xC1, 0xC2, 0xC3
_BITS = {_EXTENDED: (8, 12), _PROGRESSIVE: (8, 12), _LOSSLESS: tuple(range(2, 17))}
_EOI = b"\xff\xd9"


def open_deep_jpeg(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens a lossless JPEG (SOF3) of 2 to 16 bits, or an extended or progressive one of 8 or 12 bits.

    Raises:
        ImportError: the packages of the extra `formats` are missing.
        NotForMe: another kind of JPEG.
        ImageError: the header is damaged; `decode`: the image data are.
    """
    header = read_header(data)
    if header.bits not in _BITS.get(header.marker, ()) or header.components not in (1, 3, 4):
        raise NotForMe(header.kind)
    import imagecodecs  # noqa: F401  # Its absence is said before anything is decoded.

    width, height = upright_size((header.width_px, header.height_px), header.orientation)

    def decode() -> Pixels:
        return rotate(_pixels(header, _samples(data, header)), header.orientation)

    memory = _memory_bytes(header) + len(data)  # imagecodecs copies the file.
    return Opened(width, height, 1 if header.components == 1 else 3, memory, decode)


def _samples(data: bytes, header: Header) -> Samples:
    """`[h, w, S]` as libjpeg gives them: grey, RGB or CMYK."""
    import imagecodecs

    if _EOI not in data[header.segments[-1].end :]:
        raise ImageError("truncated", f"{header.kind} without an end mark")
    try:
        samples: Samples = imagecodecs.jpeg8_decode(data)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ImageError("unreadable", f"{header.kind}: {first_line(error)}") from error
    samples = samples.reshape(*samples.shape[:2], -1)
    expected = (header.height_px, header.width_px, header.components)
    if samples.shape != expected:
        raise ImageError("unreadable", f"{header.kind}: expected {expected}. Received: {samples.shape}")
    return samples


def _pixels(header: Header, samples: Samples) -> Pixels:
    pixels = eight_bits(samples, bits=header.bits)
    if header.components != 4:
        return pixels
    return cmyk_to_rgb(np.subtract(255, pixels, out=pixels))  # Stored inverted, as by Adobe; Pillow assumes it, too.


def _memory_bytes(header: Header) -> int:
    samples = header.width_px * header.height_px * header.components
    itemsize = 1 if header.bits <= 8 else 2
    coefficients = 2 * samples if header.marker == _PROGRESSIVE else 0
    result = (samples if itemsize == 2 else 0) + (3 * samples // 4 if header.components == 4 else 0)
    return samples * itemsize + max(coefficients, result + min(WORKING_BYTES, 64 * samples))
