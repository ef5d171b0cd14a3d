"""Decodes the bytes of one image to uint8 pixels of a given size.

Owns: the decoding and resizing that training and scoring share, because the bilinear filters of different libraries
differ by several grey levels on average; the order of decoders, limits, and the status of what cannot be decoded.
Does not own: where bytes come from, the formats (`formats`), or how pixels are used.

Contract of `decode_image`: any bytes give either pixels or an `ImageError`, never another exception. The first bytes
decide which decoders get an image. Pixel count and memory are checked before anything is decoded. The EXIF rotation is
applied, transparency is laid over white, more than 8 bits are scaled rather than clipped, and only the first frame is
used.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np

from mnist_dist.errors import ImageError
from mnist_dist.images.formats import FORMATS, Format, format_of
from mnist_dist.images.pixels import NotForMe, Opened, Pixels, match_channels, resize_pixels, working_bytes
from mnist_dist.images.spec import ImageSpec

Reserve = Callable[[int], contextlib.AbstractContextManager[object]]
_Result = TypeVar("_Result")
_NO_LIMIT = contextlib.nullcontext()
_EXTRA = "pip install 'mnist_dist[formats]'"
_TELLING = ("too_large", "truncated", "unreadable", "unsupported")
_TAIL_BYTES = 64
_CUT = ("truncated", "premature end", "eof", "end of file")


@dataclass(frozen=True)
class Decoded:
    """One decoded image."""

    pixels: Pixels
    """`uint8 [H, W, C]`, 0-255."""
    width_px: int
    """Width of the original, after its EXIF rotation."""
    height_px: int
    """Height of the original, after its EXIF rotation."""


def unlimited(memory_bytes: int) -> contextlib.AbstractContextManager[object]:
    """The `reserve` of a caller that decodes one image at a time."""
    return _NO_LIMIT


def decode_image(
    data: bytes, spec: ImageSpec, *, max_pixels: int = 100_000_000, reserve: Reserve = unlimited
) -> Decoded:
    """Decodes an image and converts it to the size and channels of `spec`.

    Args:
        data: the encoded image, in any format of `formats.FORMATS`, of any size and mode.
        spec: size and channels of the result, and the resize rule.
        max_pixels: images that are larger by their header are refused before anything is decoded.
        reserve: called with the memory that decoding takes at its peak, bytes; gives a context to decode in, and may
            wait until there is enough, or raise ImageError.

    Returns:
        Pixels `uint8 [H, W, C]`, 0-255, and the size of the original.

    Raises:
        ImageError: with status `empty`, `truncated`, `unreadable`, `unsupported` or `too_large`.
    """
    _prepare_process()

    def decode(opened: Opened) -> Decoded:
        with reserve(_peak_bytes(opened, spec)):
            fitted = _fitted(opened.decode(), spec)  # Nothing else of the image is held after this.
        return Decoded(fitted, opened.width_px, opened.height_px)

    return _with_first_able(data, spec, max_pixels, decode)


def probe_image(data: bytes, *, max_pixels: int = 100_000_000) -> tuple[int, int, int]:
    """Reads size and channels of an image from its header.

    Args:
        data: the encoded image.
        max_pixels: images that are larger by their header are refused.

    Returns:
        Width and height in px after the EXIF rotation, and channels: 1 if the image is stored as grey, else 3.

    Raises:
        ImageError: with status `empty`, `truncated`, `unreadable`, `unsupported` or `too_large`.
    """
    return _with_first_able(data, None, max_pixels, lambda opened: (opened.width_px, opened.height_px, opened.channels))


@functools.cache
def _prepare_process() -> None:
    cv2.setNumThreads(1)  # The caller decides in how many threads to decode.


def _with_first_able(data: bytes, spec: ImageSpec | None, max_pixels: int, use: Callable[[Opened], _Result]) -> _Result:
    """Uses the image as opened by the first decoder that can; the most telling reason if none can."""
    format = _recognised(data)
    failures: list[Exception] = []
    for decoder in format.decoders:
        try:
            opened = decoder.open(data, spec)
            _check_size(opened, max_pixels)
            return use(opened)
        except ImageError:
            raise
        except MemoryError:
            raise ImageError("too_large", "it does not fit in memory") from None
        except Exception as error:  # The border: any failure of a decoder becomes a reason.
            failures.append(error.with_traceback(None))
    raise _most_telling(data, format.name, failures)


def _recognised(data: bytes) -> Format:
    if not data:
        raise ImageError("empty", "the file has no bytes")
    format = format_of(data)
    if format is None:
        names = ", ".join(format.name for format in FORMATS)
        raise ImageError("unsupported", f"not one of {names}; it starts with {data[:16]!r}")
    return format


def _peak_bytes(opened: Opened, spec: ImageSpec) -> int:
    """What decoding takes, and one copy of its result, turned, cropped or made RGB."""
    rgb_bytes = 3 * opened.height_px * opened.width_px
    copied = opened.memory_bytes + min(opened.memory_bytes, rgb_bytes) + spec.image_bytes
    return copied + working_bytes(opened.height_px, opened.width_px, spec)


def _fitted(pixels: Pixels, spec: ImageSpec) -> Pixels:
    return np.ascontiguousarray(resize_pixels(match_channels(pixels, spec.channels), spec))


def _check_size(opened: Opened, max_pixels: int) -> None:
    if not opened.width_px or not opened.height_px:
        raise ImageError("unreadable", f"the header says {opened.width_px} x {opened.height_px} px")
    if opened.frame_px > max_pixels:
        raise ImageError("too_large", f"a frame of {opened.frame_px:,} pixels is more than {max_pixels:,} pixels")
    if opened.width_px * opened.height_px > max_pixels:
        raise ImageError("too_large", f"{opened.width_px} x {opened.height_px} px are more than {max_pixels:,} pixels")


def _most_telling(data: bytes, name: str, failures: list[Exception]) -> ImageError:
    """What went wrong, in this order: damage, a package that is missing, no decoder for such an image."""
    real = [failure for failure in failures if not isinstance(failure, ImportError | NotForMe)]
    if real:
        return min((_reason(data, failure) for failure in real), key=lambda error: _TELLING.index(error.status))
    what = next((str(failure) for failure in failures if isinstance(failure, NotForMe)), name)
    hint = f" ({_EXTRA})" if any(isinstance(failure, ImportError) for failure in failures) else ""
    return ImageError("unsupported", f"not supported: {what}{hint}")


def _reason(data: bytes, error: Exception) -> ImageError:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem:
        return ImageError("too_large", "it does not fit in memory")
    if "unsupported" in message.lower() or "not supported" in message.lower() or isinstance(error, NotImplementedError):
        return ImageError("unsupported", message)
    return ImageError("truncated" if _is_cut(data, message) else "unreadable", message)


def _is_cut(data: bytes, message: str) -> bool:
    if any(word in message.lower() for word in _CUT) or len(data) < _TAIL_BYTES:
        return True
    tail = data[-_TAIL_BYTES:]
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in tail
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in tail
    if data.startswith(b"GIF8"):
        return b";" not in tail
    return data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 8 > len(data)
