"""Pixels: what is asked of a decoder, and what all decoders share once pixels are there.

Owns: fitting pixels to the size that a spec asks for, and the conversions to grey, RGB and upright. Does not own:
reading any format, the spec (`spec`), the geometry (`geometry`) or the filters (`resampling`).
"""

# H = height px, W = width px, C = channels (1 grey, 3 RGB) of the result; h, w = height, width of the original

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mnist_dist.images.geometry import fit
from mnist_dist.images.resampling import MAX_FRAME, Side, by_opencv, by_pillow, by_tensorflow
from mnist_dist.images.spec import ImageSpec

Pixels = npt.NDArray[np.uint8]

STRIP_PX = 2**20
_LINEAR_SHRINK = 2.0
_SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height.


class Opened(NamedTuple):
    """An image of which only the header was read."""

    width_px: int
    """Width of the original, after its EXIF rotation."""
    height_px: int
    """Height of the original, after its EXIF rotation."""
    channels: int
    """1 if the image is stored as grey, else 3."""
    memory_bytes: int
    """What `decode` takes at its peak, bytes; its result is included, the encoded bytes are not."""
    decode: Callable[[], Pixels]
    """Gives `uint8 [h, w, 1 or 3]`, upright, over white. May scale while it decodes, but not below the spec's size."""
    frame_px: int = 0
    """Pixels of the largest frame inside, where that is larger than the image made of it."""


class NotForMe(Exception):
    """A decoder was not made for such an image; the message says what it is, for example "12-bit grey TIFF"."""


def resize_pixels(pixels: Pixels, spec: ImageSpec) -> Pixels:
    """Fits pixels to the height and width of `spec`, by its rule; pixels that fit as they are are returned unchanged.

    Args:
        pixels: `uint8 [h, w, C]`, 0-255.
        spec: height, width and how pixels are fitted to them; its channels are ignored.

    Returns:
        `uint8 [H, W, C]`, 0-255.
    """
    height, width, channels = pixels.shape
    (kept_rows, kept_columns), size, top, left = fit(height, width, spec)
    rows = _side(kept_rows, size[0], top, spec.height_px)
    columns = _side(kept_columns, size[1], left, spec.width_px)
    part = pixels[kept_rows, kept_columns]
    if all(side == (whole, whole, 0, whole) for side, whole in ((rows, spec.height_px), (columns, spec.width_px))):
        return part if part.shape != pixels.shape else pixels
    window = _resampled(part, rows, columns, spec)
    if window.shape[:2] == (spec.height_px, spec.width_px):
        return window
    canvas = np.full((spec.height_px, spec.width_px, channels), spec.pad_value, np.uint8)
    top, left = max(0, -top), max(0, -left)
    canvas[top : top + rows.kept, left : left + columns.kept] = window
    return canvas


def working_bytes(height: int, width: int, spec: ImageSpec) -> int:
    """What `resize_pixels` takes beside its result and one copy of the original of h x w px, bytes at most."""
    if spec.resampling == "opencv":
        return 0
    if spec.resampling == "pillow":  # 4 bytes a pixel: the original, and what is resized on one side or on both
        size = fit(height, width, spec).size
        rows, columns = min(size[0], MAX_FRAME * spec.height_px), min(size[1], MAX_FRAME * spec.width_px)
        return 4 * (height * width + max(height * columns, width * rows) + rows * columns)
    return 2**20 + 48 * (width + spec.width_px)  # blocks of rows as float32, at least one row: sums, and what is added


def match_channels(pixels: Pixels, channels: int) -> Pixels:
    """Converts `uint8 [..., 1 or 3]` to grey (ITU-R 601 luma, as in Pillow) or RGB, `uint8 [..., C]`."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    grey = np.empty((*pixels.shape[:-1], 1), np.uint8)
    for rows in strips(*pixels.shape[:2]):
        # Source: Pillow's rgb2l, ITU-R BT.601-2 in 16-bit fixed point.
        red, green, blue = (pixels[rows, ..., c].astype(np.uint32) for c in range(3))
        grey[rows, ..., 0] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey


def padded(pixels: Pixels, batch_size: int) -> Pixels:
    """Pads `uint8 [b, H, W, C]` with zeros to `[B, H, W, C]`."""
    missing = batch_size - len(pixels)
    return np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.uint8)]) if missing > 0 else pixels


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Two sides of an image after its EXIF rotation (orientation 1-8)."""
    return (size[1], size[0]) if orientation in _SIDEWAYS else size


def rotate(pixels: Pixels, orientation: int) -> Pixels:
    """Turns stored pixels `[h, w, C]` upright, as a view.

    Source: EXIF 2.32, tag Orientation: where row 0 and column 0 belong.
    """
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def strips(height: int, width: int) -> list[slice]:
    """Divides rows into strips of about `STRIP_PX` pixels, so that a conversion needs memory for one strip only."""
    rows = max(1, STRIP_PX // max(1, width))
    return [slice(top, min(height, top + rows)) for top in range(0, height, rows)]


def _side(kept: slice, resized: int, first: int, count: int) -> Side:
    """One side of what is resized, and the window of it that lies within the result."""
    begin, end = max(0, first), min(resized, first + count)
    return Side(kept.stop - kept.start, resized, begin, end - begin)


def _resampled(pixels: Pixels, rows: Side, columns: Side, spec: ImageSpec) -> Pixels:
    if spec.resampling == "opencv":
        return by_opencv(pixels, rows, columns, linear_shrink=_LINEAR_SHRINK)
    if spec.resampling == "pillow":
        return by_pillow(pixels, rows, columns, spec.interpolation)
    return by_tensorflow(pixels, rows, columns, spec.interpolation, antialias=spec.antialias)
