"""Pixels of any size become the model's input, by the rule of its spec.

Owns: putting geometry and filters together, the padding, and the memory that this takes. Does not own: the rule
(`pixels`), its sizes and crops (`geometry`), or the filters (`resampling`).
"""

# H, W = height and width of the result, px; h, w = height and width of the original; C = channels

import math

import numpy as np

from mnist_dist.images.geometry import fit
from mnist_dist.images.pixels import ImageSpec, Pixels
from mnist_dist.images.resampling import MAX_FRAME, Side, by_opencv, by_pillow, by_tensorflow

_LINEAR_SHRINK = 2.0
_FAST_LINEAR_SHRINK = 3.0  # At 2.2 closer to Pillow than what libjpeg scales by 5/8, and twice as fast as an average.


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
    if spec.filters == "opencv":
        return 0
    if spec.filters == "pillow":  # 4 bytes a pixel: the original, and what is resized on one side or on both
        size = fit(height, width, spec).size
        rows, columns = min(size[0], MAX_FRAME * spec.height_px), min(size[1], MAX_FRAME * spec.width_px)
        return 4 * (height * width + max(height * columns, width * rows) + rows * columns)
    return 2**20 + 48 * (width + spec.width_px)  # blocks of rows as float32, at least one row: sums, and what is added


def _side(kept: slice, resized: int, first: int, count: int) -> Side:
    """One side of what is resized, and the window of it that lies within the result."""
    begin, end = max(0, first), min(resized, first + count)
    return Side(kept.stop - kept.start, resized, begin, end - begin)


def _resampled(pixels: Pixels, rows: Side, columns: Side, spec: ImageSpec) -> Pixels:
    if spec.filters == "opencv":
        return by_opencv(pixels, rows, columns, linear_shrink=_linear_shrink(spec))
    if spec.filters == "pillow":
        return by_pillow(pixels, rows, columns, spec.interpolation)
    return by_tensorflow(pixels, rows, columns, spec.interpolation, antialias=spec.antialias)


def _linear_shrink(spec: ImageSpec) -> float:
    """Up to which factor OpenCV interpolates linearly, in its own right or in place of another's filter."""
    if spec.resampling == "opencv":
        return _LINEAR_SHRINK
    return _FAST_LINEAR_SHRINK if spec.antialias else math.inf
