"""HEIC and other HEIF images by pi-heif (libheif and libde265).

Owns: opening the primary image. Does not own: AVIF, which Pillow decodes.

libheif applies the rotation that the container states (irot, imir); the EXIF orientation, which says the same again,
is left alone.
"""

import functools
from typing import Any

import numpy as np

from mnist_dist.errors import ImageError, first_line
from mnist_dist.images.boxes import item_types
from mnist_dist.images.depth import WORKING_BYTES, eight_bits, over_white
from mnist_dist.images.pixels import Opened, Pixels
from mnist_dist.images.spec import ImageSpec

_MODES = {"L": (1, ""), "LA": (1, "A"), "La": (1, "a"), "RGB": (3, ""), "RGBA": (3, "A"), "RGBa": (3, "a")} | {
    **{"I": (1, "")},  # "I;16"
}
"""Pillow's mode, without its depth -> colour channels, and alpha (`a`: colours are multiplied by it)."""
_PLANES = {420: 1.5, 422: 2.0, 444: 3.0}
"""Chroma subsampling -> samples of a pixel in libheif's planes, without alpha."""

_NO_DECODER = ("invalid image index", "error while loading plugin")  # No image that it can read, or no codec for it.
_CUT = ("cannot read full", "too small", "insufficient input")


def open_heif(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens the primary image of a HEIF file.

    Raises:
        ImportError: the packages of the extra `formats` are missing.
        ImageError: the container is damaged; `decode`: the image data are.
    """
    image = _primary(data)
    width, height = image.size
    mode = image.mode.split(";")[0]
    if mode not in _MODES:
        raise ImageError("unsupported", f"not supported: HEIF with {image.mode} pixels")
    colours, alpha = _MODES[mode]
    bits = int(image.info.get("bit_depth", 8))

    def decode() -> Pixels:
        try:
            samples = np.asarray(image)
        except MemoryError:
            raise
        except Exception as error:
            raise _damage(error) from error
        expected = (height, width, colours + len(alpha))
        samples = samples.reshape(*samples.shape[:2], -1)
        if samples.shape != expected:
            raise ImageError("unreadable", f"HEIF: expected {expected}. Received: {samples.shape}")
        pixels = eight_bits(samples[..., :colours], bits=bits)
        if alpha:
            return over_white(pixels, eight_bits(samples[..., -1], bits=bits), is_premultiplied=alpha == "a")
        return pixels.copy() if bits <= 8 else pixels  # 8 bits are a view of memory that libheif frees with `image`.

    planes = (_PLANES.get(image.info.get("chroma"), 3.0) if colours == 3 else 1) + len(alpha)
    memory = _memory_bytes(width * height, colours + len(alpha), planes, 1 if bits <= 8 else 2)
    return Opened(width, height, colours, memory, decode)


def _memory_bytes(pixels: int, channels: int, planes: float, itemsize: int) -> int:
    """libheif holds its planes twice to rotate them, beside the interleaved samples, which then become 8 bits."""
    samples = pixels * channels
    converted = samples * (2 if channels in (2, 4) else 1)
    return samples * itemsize + max(int(2 * planes * pixels * itemsize), converted) + min(WORKING_BYTES, 64 * samples)


def _primary(data: bytes) -> Any:
    """The primary image, of which only the container has been read."""
    import pi_heif

    _prepare()
    _check_items(data)
    try:
        file = pi_heif.open_heif(data, convert_hdr_to_8bit=False, hdr_to_16bit=False)
        return file[file.primary_index]
    except MemoryError:
        raise
    except Exception as error:
        raise _damage(error) from error


def _check_items(data: bytes) -> None:
    """Refuses types of items that are no text: pi-heif 1.4 crashes over them."""
    for kind in item_types(data):
        try:
            kind.decode()
        except UnicodeDecodeError as error:
            received = repr(kind[:64])
            raise ImageError("unreadable", f"HEIF: the type of an item is no text. Received: {received}") from error


@functools.cache
def _prepare() -> None:
    """Makes settings that are global to the process."""
    import pi_heif

    pi_heif.options.DECODE_THREADS = 1  # The caller decides in how many threads to decode.
    pi_heif.options.THUMBNAILS = pi_heif.options.DEPTH_IMAGES = pi_heif.options.AUX_IMAGES = False


def _damage(error: Exception) -> ImageError:
    text = str(error).lower()
    if text.startswith("unsupported") or any(words in text for words in _NO_DECODER):
        return ImageError("unsupported", f"not supported: HEIF, {first_line(error)}")
    is_cut = isinstance(error, EOFError) or "end of" in text or any(words in text for words in _CUT)
    return ImageError("truncated" if is_cut else "unreadable", f"HEIF: {first_line(error)}")
