"""Resizing by the filters of Pillow, of TensorFlow, and of OpenCV, of what is kept of the result only.

Owns: the three ways to resize pixels to a size, of which a window is kept. Does not own: sizes and windows
(`geometry`), or which way is taken (`pixels`).

Contract: a window has the values that the same window of the whole result has. Where a side of that result would be
more than `MAX_FRAME` times the window's (an image 1 px high and 5,000 px long), only the neighbourhood of the window is
resized, from edges that float32 rounds: values may then differ by a grey level, and `nearest` and `box` may take the
next pixel.
"""

# h, w = height and width of the original, px; n = length of a window; C = channels

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import cv2
import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from mnist_dist.config import Interpolation

Pixels = npt.NDArray[np.uint8]

MAX_FRAME = 16
_CUBIC = -0.5  # Keys' parameter, in Pillow and in TensorFlow alike; OpenCV's is -0.75.
_TABLE = np.float32(1024)  # Source: resize_bicubic_op.cc, which looks its weights up at steps of 1/1024 px.
_FLOAT24 = 2**24  # Up to this float32 holds every integer.
_HAS_ORDER = int(PIL.__version__.split(".")[0]) >= 13  # See `_is_vertical_first`.
_FILTERS: dict[Interpolation, tuple[Image.Resampling, float]] = {
    "nearest": (Image.Resampling.NEAREST, 0.5),
    "box": (Image.Resampling.BOX, 0.5),
    "bilinear": (Image.Resampling.BILINEAR, 1.0),
    "hamming": (Image.Resampling.HAMMING, 1.0),
    "bicubic": (Image.Resampling.BICUBIC, 2.0),
    "lanczos": (Image.Resampling.LANCZOS, 3.0),
}
"""Pillow's filter, and how far it reaches to each side, px of the result (where the image shrinks)."""


class Side(NamedTuple):
    """One side of an image, and the window that is kept of it."""

    length: int
    """Of the original, px."""
    resized: int
    """Of the whole result, px."""
    first: int
    """Where the window begins in the result."""
    kept: int
    """Length of the window, px."""

    @property
    def scale(self) -> float:
        """Pixels of the original for one of the result."""
        return self.length / self.resized

    @property
    def is_extreme(self) -> bool:
        """Whether the whole result is much longer than its window."""
        return self.resized > MAX_FRAME * self.kept

    def cut(self, reach: float) -> slice:
        """The original, or of an extreme one the pixels that the window is made of by a filter of this reach."""
        if not self.is_extreme:
            return slice(0, self.length)
        margin = reach * max(1.0, self.scale) + 2
        begin = int(self.first * self.scale - margin)
        return slice(max(0, begin), min(self.length, int((self.first + self.kept) * self.scale + margin) + 1))


# --- OpenCV ----------------------------------------------------------------------------------------------------------


def by_opencv(pixels: Pixels, rows: Side, columns: Side, *, linear_shrink: float) -> Pixels:
    """Sides that shrink by more than `linear_shrink` are averaged by area; all others are interpolated linearly.

    Args:
        pixels: `uint8 [h, w, C]`, a view of any order.
        rows: of h.
        columns: of w.
        linear_shrink: up to 2, linear interpolation skips no pixel; it is far faster than an average.

    Returns:
        `uint8 [n, n, C]`: the window.
    """
    (cut_rows, rows), (cut_columns, columns) = _near(rows), _near(columns)
    pixels = np.ascontiguousarray(pixels[cut_rows, cut_columns])
    height, width, channels = pixels.shape
    smaller = (min(height, rows.resized), min(width, columns.resized))
    steps = [((rows.resized, columns.resized), cv2.INTER_LINEAR)]
    if max(height / smaller[0], width / smaller[1]) > linear_shrink:
        steps.insert(0, (smaller, cv2.INTER_AREA))  # Average only the sides that shrink, as a separate step.
    for (target_height, target_width), filter_code in steps:
        if pixels.shape[:2] != (target_height, target_width):
            resized = cv2.resize(pixels, (target_width, target_height), interpolation=filter_code)
            pixels = cast(Pixels, resized).reshape(target_height, target_width, channels)
    return pixels[rows.first : rows.first + rows.kept, columns.first : columns.first + columns.kept]


def _near(side: Side) -> tuple[slice, Side]:
    """The neighbourhood of a window in a much longer side, as a side of its own; to half a pixel of the result."""
    cut = side.cut(1.0)
    if not side.is_extreme:
        return cut, side
    length = cut.stop - cut.start
    resized = max(side.kept, round(length / side.scale))
    first = min(resized - side.kept, max(0, side.first - round(cut.start / side.scale)))
    return cut, Side(length, resized, first, side.kept)


# --- Pillow ----------------------------------------------------------------------------------------------------------


_Edges = tuple[float, float, float, float]  # Left, top, right, bottom.


class _Box(NamedTuple):
    """What Pillow is asked for on one side."""

    begin: float
    end: float
    length: int
    """Pixels that the part between `begin` and `end` is resized to."""
    first: int
    """Where the window begins in them."""


def by_pillow(pixels: Pixels, rows: Side, columns: Side, interpolation: Interpolation) -> Pixels:
    """What `Image.resize` gives, bit for bit.

    Args:
        pixels: `uint8 [h, w, 1 or 3]`, a view of any order.
        rows: of h.
        columns: of w.
        interpolation: the filter.

    Returns:
        `uint8 [n, n, 1 or 3]`: the window.
    """
    filter_code, reach = _FILTERS[interpolation]
    cut_rows, cut_columns = rows.cut(reach), columns.cut(reach)
    pixels, channels = pixels[cut_rows, cut_columns], pixels.shape[2]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    down, across = _part(rows), _part(columns)
    left, top = cut_columns.start, cut_rows.start
    box = (across.begin - left, down.begin - top, across.end - left, down.end - top)
    vertical_first = _is_vertical_first(rows.length, columns.length, rows.resized, columns.resized)
    if vertical_first != _is_vertical_first(image.height, image.width, down.length, across.length):
        length = down.length if vertical_first else across.length
        image, box = _first_pass(image, length, filter_code, box, vertical=vertical_first)
    resized = np.asarray(image.resize((across.length, down.length), filter_code, box))
    resized = resized.reshape(down.length, across.length, channels)
    return resized[down.first : down.first + rows.kept, across.first : across.first + columns.kept]


def _part(side: Side) -> _Box:
    """The part of a side that the window is made of, where Pillow's coefficients for it stay the same. Pillow takes
    edges as float32: they and the scale have to be exact in it."""
    length, resized, first, kept = side
    is_exact = resized & (resized - 1) == 0 and (first + kept) * length < _FLOAT24
    return _Box(first * side.scale, (first + kept) * side.scale, kept, 0) if is_exact else _whole(side)


def _whole(side: Side) -> _Box:
    if not side.is_extreme:
        return _Box(0, side.length, side.resized, side.first)
    return _Box(side.first * side.scale, min(side.length, (side.first + side.kept) * side.scale), side.kept, 0)


def _first_pass(
    image: Image.Image, length: int, filter_code: Image.Resampling, box: _Edges, *, vertical: bool
) -> tuple[Image.Image, _Edges]:
    """The image with one side resized, where Pillow would begin with the other one, and the box in the result."""
    left, top, right, bottom = box
    if vertical:
        resized = image.resize((image.width, length), filter_code, (0, top, image.width, bottom))
        return resized, (left, 0, right, length)
    return image.resize((length, image.height), filter_code, (left, 0, right, image.height)), (0, top, length, bottom)


def _is_vertical_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Pillow rounds to 8 bits between its two passes, so their order counts. Before 13.0, rows always came first.

    Source: Pillow 13.0, `ImagingResampleInner` in Resample.c.
    """
    shrinks = height - new_height
    return _HAS_ORDER and shrinks > 0 and shrinks > 2 * (width - new_width)


# --- TensorFlow ------------------------------------------------------------------------------------------------------

_BLOCK_VALUES = 2**15  # So many float32 stay in a core's cache.
_Number = TypeVar("_Number", np.float32, np.uint8)
_Weights = npt.NDArray[np.float32]
_Places = npt.NDArray[np.intp]


def by_tensorflow(
    pixels: Pixels, rows: Side, columns: Side, interpolation: Interpolation, *, antialias: bool
) -> Pixels:
    """What `tf.image.resize` gives, rounded to 8 bits and clipped to 0-255.

    Args:
        pixels: `uint8 [h, w, C]`, a view of any order.
        rows: of h.
        columns: of w.
        interpolation: one of `KERAS_INTERPOLATIONS`.
        antialias: whether the filter widens where a side shrinks.

    Returns:
        `uint8 [n, n, C]`: the window.
    """
    if all(side.length == side.resized for side in (rows, columns)):
        return pixels[rows.first : rows.first + rows.kept, columns.first : columns.first + columns.kept]
    down, across = (_taps(side, interpolation, antialias=antialias) for side in (rows, columns))
    begin, end = int(across[0].min()), int(across[0].max()) + 1
    pixels, across = pixels[:, begin:end], (across[0] - begin, across[1])
    result = np.empty((rows.kept, columns.kept, pixels.shape[2]), np.uint8)
    step = max(1, _BLOCK_VALUES // pixels[0].size)
    for top in range(0, rows.kept, step):
        block = slice(top, top + step)
        values = _weighted(_turned(_weighted(pixels, down[0][block], down[1][block])), *across)
        result[block] = _turned(np.rint(values, out=values).clip(0, 255, out=values).astype(np.uint8))
    return result


def _weighted(values: npt.NDArray[np.generic], places: _Places, weights: _Weights) -> npt.NDArray[np.float32]:
    """Sums of weighted rows: `[h, m, C]` -> `float32 [n, m, C]`."""
    total = np.zeros((len(places), values.shape[1] * values.shape[2]), np.float32)
    for place, weight in zip(places.T, weights.T, strict=True):
        rows = values[place].reshape(total.shape).astype(np.float32, copy=False)
        rows *= weight[:, None]
        total += rows
    return total.reshape(len(places), *values.shape[1:])


def _turned(values: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """`[n, m, C]` -> `[m, n, C]`, in this order in memory: four times as fast as by NumPy."""
    turned = cast("npt.NDArray[_Number]", cv2.transpose(values))
    return turned.reshape(values.shape[1], values.shape[0], values.shape[2])


def _taps(side: Side, interpolation: Interpolation, *, antialias: bool) -> tuple[_Places, _Weights]:
    """Which pixels of the original make each pixel of the window, and by how much, both `[n, taps]`.

    Source: TensorFlow's image ops, in float32: resize_nearest_neighbor_op, resize_area_op, resize_bilinear_op,
    resize_bicubic_op, and for antialias and lanczos scale_and_translate_op.
    """
    scale = np.float32(side.length) / np.float32(side.resized)
    wanted = np.arange(side.first, side.first + side.kept, dtype=np.float32)
    if interpolation == "nearest":
        places = np.minimum(np.floor((wanted + np.float32(0.5)) * scale), side.length - 1)
        return places.astype(np.intp)[:, None], np.ones((side.kept, 1), np.float32)
    if interpolation == "box":
        return _normalised(side, wanted * scale, _overlap((wanted * scale)[:, None], scale), reach=float(scale))
    widened = max(np.float32(1), scale) if antialias else np.float32(1)
    centres = (wanted + np.float32(0.5)) * scale - np.float32(0.5)
    if interpolation == "bicubic" and not antialias:
        centres = np.floor(centres) + np.rint((centres - np.floor(centres)) * _TABLE) / _TABLE
    kernel, reach = _KERNELS[interpolation], np.float32(_FILTERS[interpolation][1]) * widened

    def weigh(places: _Weights) -> _Weights:
        return kernel(((places - centres[:, None]) / widened).astype(np.float32))

    return _normalised(side, centres - reach, weigh, reach=2 * float(reach))


def _normalised(
    side: Side, begin: _Weights, weigh: Callable[[_Weights], _Weights], *, reach: float
) -> tuple[_Places, _Weights]:
    """Weights of the pixels from `begin` on, with a sum of 1; none for what lies outside of the image."""
    places = np.floor(begin)[:, None].astype(np.intp) + np.arange(int(np.ceil(reach)) + 2)
    weights = weigh(places.astype(np.float32))
    weights = np.where((places >= 0) & (places < side.length), weights, np.float32(0)).astype(np.float32)
    used = (weights != 0).any(axis=0)
    places, weights = places[:, used].clip(0, side.length - 1), weights[:, used]
    return places, weights / weights.sum(axis=1, keepdims=True)


def _overlap(begin: _Weights, scale: np.float32) -> Callable[[_Weights], _Weights]:
    """How much of each pixel lies between `begin` and `begin + scale`."""

    def weigh(places: _Weights) -> _Weights:
        inside: _Weights = np.minimum(begin + scale, places + 1) - np.maximum(begin, places)
        return np.asarray(np.maximum(inside, np.float32(0)))

    return weigh


def _triangle(x: _Weights) -> _Weights:
    return np.asarray(np.maximum(1 - np.abs(x), np.float32(0)))


def _keys(x: _Weights) -> _Weights:
    """Source: Keys, "Cubic convolution interpolation", 1981, equation 15."""
    x = np.abs(x)
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = _CUBIC * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0)).astype(np.float32)


def _lanczos3(x: _Weights) -> _Weights:
    weights: _Weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0).astype(np.float32)
    return weights


_KERNELS: dict[Interpolation, Callable[[_Weights], _Weights]] = {
    "bilinear": _triangle,
    "bicubic": _keys,
    "lanczos": _lanczos3,
}
