"""Decodes the bytes of one image to uint8 pixels of a given size.

Owns: the decoding and resizing that training and scoring share, because the bilinear filters of different libraries
differ by several grey levels on average. Does not own: where bytes come from, or how pixels are used.

Contract of `decode_image`: any bytes give either pixels or an `ImageError`, never another exception. libjpeg-turbo
decodes JPEG in its strict mode, because no other decoder here notices damaged scan data. Pillow decodes CMYK JPEG and
everything else. The pixel count in the header is checked before anything is decoded. The EXIF rotation is applied,
transparency is laid over white, more than 8 bits are scaled rather than clipped, and only the first frame is used.
"""

# H = height px, W = width px, C = channels (1 grey, 3 RGB) of the result; h, w = height, width of the original

import functools
import io
from dataclasses import dataclass
from typing import Literal, cast

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_dist.config import ResizeRule, require
from mnist_dist.errors import ImageError

Pixels = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Lower-case file suffixes of the formats that can be decoded."""

_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # No EPS, which would run Ghostscript.
_JPEG_MAGIC = b"\xff\xd8"
_MAGICS = (
    *(_JPEG_MAGIC, b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"RIFF"),
    *(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf"),
)
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
_DEEP_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height.
_TAIL_BYTES = 64
LINEAR_SHRINK = 2.0  # Up to this factor linear interpolation skips no pixel; it is far faster than an average.


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Size and channels that every image is decoded to."""

    height_px: int
    width_px: int
    channels: int
    """1 (grey, ITU-R 601 luma) or 3 (RGB)."""
    resize: ResizeRule = "stretch"
    """How another shape is resized: stretched, or first cropped at the centre to the same aspect ratio."""

    def __post_init__(self) -> None:
        require(self.height_px >= 1, "height_px is at least 1", height_px=self.height_px)
        require(self.width_px >= 1, "width_px is at least 1", width_px=self.width_px)
        require(self.channels in (1, 3), "channels is 1 (grey) or 3 (RGB)", channels=self.channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height px, width px, channels."""
        return self.height_px, self.width_px, self.channels

    @property
    def image_bytes(self) -> int:
        """Size of one decoded image, bytes."""
        return self.height_px * self.width_px * self.channels


@dataclass(frozen=True)
class Decoded:
    """One decoded image."""

    pixels: Pixels
    """`uint8 [H, W, C]`, 0-255."""
    width_px: int
    """Width of the original, after its EXIF rotation."""
    height_px: int
    """Height of the original, after its EXIF rotation."""


def decode_image(data: bytes, spec: ImageSpec, *, max_pixels: int = 100_000_000) -> Decoded:
    """Decodes an image and converts it to the size and channels of `spec`.

    Args:
        data: the encoded image, in any format of `IMAGE_SUFFIXES`, of any size and mode.
        spec: size and channels of the result, and the resize rule.
        max_pixels: images that are larger by their header are refused before anything is decoded.

    Returns:
        Pixels `uint8 [H, W, C]`, 0-255, and the size of the original.

    Raises:
        ImageError: with status `empty`, `truncated`, `unreadable`, `unsupported` or `too_large`.
    """
    _prepare_process()
    try:
        return _decode(data, spec, max_pixels)
    except ImageError:
        raise
    except Exception as err:  # The border: any failure of a decoder becomes a status.
        raise _image_error(data, err) from err


def probe_image(data: bytes, *, max_pixels: int = 100_000_000) -> tuple[int, int, int]:
    """Reads size and channels of an image, usually from its header; some PNGs must be decoded to find their rotation.

    Args:
        data: the encoded image.
        max_pixels: images that are larger by their header are refused before anything is decoded.

    Returns:
        Width and height in px after the EXIF rotation, and channels: 1 if the image is stored as grey, else 3.

    Raises:
        ImageError: with status `empty`, `truncated`, `unreadable`, `unsupported` or `too_large`.
    """
    _prepare_process()
    try:
        with _open(data) as image:
            _check_size(*image.size, max_pixels)
            # Pillow already reports a TIFF's size after the rotation.
            orientation = 1 if image.format == "TIFF" else _orientation(image)
            width_px, height_px = _upright_size(image.size, orientation)
            return width_px, height_px, 1 if _is_grey(image) else 3
    except ImageError:
        raise
    except Exception as err:  # As in decode_image.
        raise _image_error(data, err) from err


def resize_pixels(pixels: Pixels, spec: ImageSpec) -> Pixels:
    """Resizes pixels to the height and width of `spec`; pixels of that size are returned unchanged.

    Sides that shrink to less than half are averaged by area; all others are interpolated linearly.

    Args:
        pixels: `uint8 [h, w, C]`, 0-255.
        spec: height, width and resize rule; its channels are ignored.

    Returns:
        `uint8 [H, W, C]`, 0-255.
    """
    if spec.resize == "crop":
        pixels = _crop_to_aspect(pixels, spec)
    height, width, channels = pixels.shape
    smaller = (min(height, spec.height_px), min(width, spec.width_px))
    steps = [((spec.height_px, spec.width_px), cv2.INTER_LINEAR)]
    if max(height / smaller[0], width / smaller[1]) > LINEAR_SHRINK:
        steps.insert(0, (smaller, cv2.INTER_AREA))  # Average only the sides that shrink, as a separate step.
    for (target_height, target_width), filter_code in steps:
        if pixels.shape[:2] != (target_height, target_width):
            resized = cv2.resize(pixels, (target_width, target_height), interpolation=filter_code)
            pixels = cast(Pixels, resized).reshape(target_height, target_width, channels)
    return pixels


def match_channels(pixels: Pixels, channels: int) -> Pixels:
    """Converts `uint8 [..., 1 or 3]` to grey (ITU-R 601 luma, as in Pillow) or RGB, `uint8 [..., C]`."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    # Source: Pillow's rgb2l, ITU-R BT.601-2 in 16-bit fixed point.
    red, green, blue = (pixels[..., c].astype(np.uint32) for c in range(3))
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma.astype(np.uint8)[..., None]


@functools.cache
def _prepare_process() -> None:
    """Makes settings that are global to the process, at the first image rather than on import."""
    cv2.setNumThreads(1)  # The caller decides in how many threads to decode.
    Image.MAX_IMAGE_PIXELS = None  # `max_pixels` replaces Pillow's limit, which cannot be set per call.
    Image.init()  # Registers all formats before several threads need them.


def _decode(data: bytes, spec: ImageSpec, max_pixels: int) -> Decoded:
    if data.startswith(_JPEG_MAGIC):
        decoded = _decode_jpeg(data, spec, max_pixels)
        if decoded is not None:
            return decoded
    with _open(data) as image:
        _check_size(*image.size, max_pixels)
        image.load()
        pixels = match_channels(_pillow_pixels(_upright(image)), spec.channels)
    height, width = pixels.shape[:2]
    return Decoded(np.ascontiguousarray(resize_pixels(pixels, spec)), width, height)


def _decode_jpeg(data: bytes, spec: ImageSpec, max_pixels: int) -> Decoded | None:
    """Decodes with libjpeg-turbo; None if it cannot: CMYK, or a header with a rare subsampling."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    _check_size(width, height, max_pixels)
    orientation = _jpeg_orientation(data)
    min_width, min_height = _upright_size((spec.width_px, spec.height_px), orientation)
    pixels = simplejpeg.decode_jpeg(
        data,
        "GRAY" if spec.channels == 1 else "RGB",
        min_height=min_height,
        min_width=min_width,
        min_factor=1,  # Scales by eighths while decoding, but not below the given size, to leave less to resize.
    )
    upright = _rotate(pixels, orientation)
    width, height = _upright_size((width, height), orientation)
    return Decoded(np.ascontiguousarray(resize_pixels(np.ascontiguousarray(upright), spec)), width, height)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if not data.startswith(_MAGICS):
        raise ImageError("unsupported", f"not one of {', '.join(_FORMATS)}; it starts with 0x{data[:8].hex()}")
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height} px are more than {max_pixels:,} pixels")


def _image_error(data: bytes, err: Exception) -> ImageError:
    message = " ".join(str(err).split()) or type(err).__name__
    if isinstance(err, UnidentifiedImageError):
        message = "the header is not complete or not valid"  # Pillow's own message contains a memory address.
    if isinstance(err, MemoryError):
        return ImageError("too_large", "it does not fit in memory")
    if "unsupported" in message.lower() or "not supported" in message.lower() or isinstance(err, NotImplementedError):
        return ImageError("unsupported", message)
    return ImageError("truncated" if _is_cut(data, message) else "unreadable", message)


def _is_cut(data: bytes, message: str) -> bool:
    words = ("truncated", "premature end", "eof", "end of file")
    if any(word in message.lower() for word in words) or len(data) < _TAIL_BYTES:
        return True
    tail = data[-_TAIL_BYTES:]
    if data.startswith(_JPEG_MAGIC):
        return b"\xff\xd9" not in tail
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in tail
    if data.startswith(b"GIF8"):
        return b";" not in tail
    return data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 8 > len(data)


# --- rotation --------------------------------------------------------------------------------------------------------


def _jpeg_orientation(data: bytes) -> int:
    if b"Exif\0\0" not in data[:65536] and b"tiff:Orientation" not in data[:65536]:
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _orientation(image)
    except Exception:  # The pixels are fine if only Pillow cannot read the header: treat it as having no EXIF.
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Any damage to the EXIF data: treat the image as upright.
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation in _SIDEWAYS else size


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _rotate(pixels: Pixels, orientation: int) -> Pixels:
    """Turns stored pixels upright. Source: EXIF 2.32, tag Orientation: where row 0 and column 0 belong."""
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


# --- modes -----------------------------------------------------------------------------------------------------------


def _is_grey(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in _GREY_MODES


def _pillow_pixels(image: Image.Image) -> Pixels:
    """Pixels `uint8 [h, w, 1 or 3]` of a loaded image in any mode."""
    if image.mode in _DEEP_MODES:
        return _eight_bits(image)[..., None]
    if image.has_transparency_data:
        return _over_white(image)
    mode: Literal["L", "RGB"] = "L" if image.mode in _GREY_MODES else "RGB"
    pixels = np.asarray(image.convert(mode), np.uint8)
    return pixels.reshape(image.height, image.width, -1)


def _over_white(image: Image.Image) -> Pixels:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"), np.uint8)


def _eight_bits(image: Image.Image) -> Pixels:
    """Scales values of 16 or 32 bits, and floats, to 0-255.

    16-bit modes have the range 0-65535. Wider modes do not state a range, so the values decide: 0-1 or 0-255 if all
    floats lie within it, 0-65535 if all integers do, else the smallest to the largest value.
    """
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    key = values == transparent if isinstance(transparent, int) else None
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else _range(values, image.mode == "F")
    finite = np.nan_to_num(values.astype(np.float32), nan=low, posinf=high, neginf=low)
    pixels: Pixels = np.rint((finite - low) * np.float32(255 / (high - low))).clip(0, 255).astype(np.uint8)
    if key is not None:
        pixels[key] = 255
    return pixels


def _range(values: npt.NDArray[np.generic], is_float: bool) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    for usual in (1.0, 255.0) if is_float else (65535.0,):
        if low >= 0 and high <= usual:
            return 0.0, usual
    return low, max(high, low + 1.0)


def _crop_to_aspect(pixels: Pixels, spec: ImageSpec) -> Pixels:
    height, width = pixels.shape[:2]
    kept_height = max(1, min(height, round(width * spec.height_px / spec.width_px)))
    kept_width = max(1, min(width, round(height * spec.width_px / spec.height_px)))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return np.ascontiguousarray(pixels[top : top + kept_height, left : left + kept_width])
