"""Depth: samples of any type and range to 8 bits, and transparency over white.

Owns: the rules by which deep samples become 0-255, the same for every format, and the formulas of colours that are
not RGB. Does not own: reading samples (the decoders).

Everything is computed block by block, so that a large image needs memory for its source and its result only.
"""

# h = height px, w = width px, S = samples of a pixel

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist.images.pixels import Pixels

Samples = npt.NDArray[Any]

WORKING_BYTES = 8 * 2**20
"""What the functions of this module take beside their arguments and their result, at most."""

_BLOCK = 2**17  # Samples that are converted at once: 1 MiB as float64.


def eight_bits(samples: Samples, *, bits: int | None = None) -> Pixels:
    """Scales samples to 0-255.

    - Unsigned integers of up to 16 bits by their range, 0 to 2**bits - 1; signed ones by theirs.
    - Wider integers, whose range no image fills: 0-255 if all lie within it, else 0-65535 if all do, else from the
      smallest to the largest.
    - Floats: 0-1 if all lie within it, else 0-255 if all do, else from the smallest to the largest. NaN counts as the
      lower end, infinity as the end on its side.

    Args:
        samples: integers or floats, `[h, w]` or `[h, w, S]`; all share one range.
        bits: depth of integers of up to 16 bits, where it is less than that of their type.

    Returns:
        `uint8`, 0-255, of the same shape; `samples` itself if it already is that.
    """
    bits = bits or 8 * samples.dtype.itemsize
    if samples.dtype == np.bool_:
        return samples.astype(np.uint8) * np.uint8(255)
    if samples.dtype.kind in "iu" and samples.dtype.itemsize <= 2:
        return _by_table(samples, bits)
    low, high = value_range(samples)
    pixels = np.empty(samples.shape, np.uint8)
    for values, result in _blocks(samples, pixels):
        wide = np.nan_to_num(values.astype(np.float64), copy=False, nan=low, posinf=high, neginf=low)
        wide = (wide - low) * (255 / (high - low))
        result[...] = np.rint(wide, out=wide).clip(0, 255, out=wide)
    return pixels


def value_range(samples: Samples) -> tuple[float, float]:
    """The range by which floats and integers of more than 16 bits are scaled; see `eight_bits`."""
    low, high = np.inf, -np.inf
    for (values,) in _blocks(samples):
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    for usual in (1.0, 255.0) if samples.dtype.kind == "f" else (255.0, 65535.0):
        if low >= 0 and high <= usual:
            return 0.0, usual
    return low, high if high > low else low + 1.0


def over_white(colours: Pixels, alpha: Pixels, *, is_premultiplied: bool = False) -> Pixels:
    """Lays colours over white.

    Args:
        colours: `uint8 [h, w, 1 or 3]`.
        alpha: `uint8 [h, w]`, 255 opaque.
        is_premultiplied: whether colours have been multiplied by alpha.

    Returns:
        `uint8 [h, w, 1 or 3]`, a new array.
    """
    result = np.empty(colours.shape, np.uint8)
    for area in _areas(colours):
        colour, opaque = colours[area].astype(np.uint32), alpha[area][..., None].astype(np.uint32)
        if is_premultiplied:
            result[area] = np.minimum(colour + (255 - opaque), 255)
        else:
            result[area] = (colour * opaque + 255 * (255 - opaque) + 127) // 255
    return result


def cmyk_to_rgb(inks: Pixels) -> Pixels:
    """`uint8 [h, w, 4]`, 255 full ink, to `uint8 [h, w, 3]` by the formula of Pillow, without a colour profile."""
    result = np.empty((*inks.shape[:2], 3), np.uint8)
    for area in _areas(inks):
        paper = 255 - inks[area].astype(np.uint32)
        result[area] = (paper[..., :3] * paper[..., 3:] + 127) // 255
    return result


def ycbcr_to_rgb(samples: Pixels) -> Pixels:
    """`uint8 [h, w, 3]`, full range as in JPEG, to `uint8 [h, w, 3]`. Source: JFIF 1.02."""
    result = np.empty(samples.shape, np.uint8)
    for area in _areas(samples):
        luma, blue, red = (samples[area][..., band].astype(np.float32) for band in range(3))
        blue, red = blue - 128, red - 128
        rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=-1)
        result[area] = np.rint(rgb).clip(0, 255)
    return result


def lab_to_rgb(samples: Samples, *, is_icc: bool) -> Pixels:
    """CIE L*a*b* (white D50) of 8 or 16 bits to sRGB.

    Args:
        samples: `uint8` or `uint16 [h, w, 3]` as stored in a TIFF.
        is_icc: whether a* and b* are stored with an offset (ICCLab), or as signed integers (CIELab).

    Source: TIFF 6.0, section 23; IEC 61966-2-1, with the matrix of B. Lindbloom for D50.
    """
    scale = 1 if samples.dtype.itemsize == 1 else 256
    zero, top = 128 * scale, 256 * scale - 1
    result = np.empty(samples.shape, np.uint8)
    for area in _areas(samples):
        lightness = samples[area][..., 0].astype(np.float64) * (100 / top)
        chroma = samples[area][..., 1:].astype(np.int64)
        chroma = chroma - zero if is_icc else (chroma + zero) % (2 * zero) - zero
        result[area] = _srgb(_xyz(lightness, chroma / scale))
    return result


_WHITE_D50 = np.array([0.96422, 1.0, 0.82521])
_XYZ_TO_RGB = np.array(
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
)


def _xyz(lightness: Samples, chroma: Samples) -> Samples:
    y = (lightness + 16) / 116
    f = np.stack([y + chroma[..., 0] / 500, y, y - chroma[..., 1] / 200], axis=-1)
    values: Samples = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * _WHITE_D50
    return values


def _srgb(xyz: Samples) -> Samples:
    linear = (xyz @ _XYZ_TO_RGB.T).clip(0, 1)
    values: Samples = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    rounded: Samples = np.rint(values * 255)
    return rounded


def _by_table(samples: Samples, bits: int) -> Pixels:
    if samples.dtype == np.uint8 and bits == 8:
        return samples
    table = _table(bits, samples.dtype.kind == "i", 8 * samples.dtype.itemsize)
    pixels = np.empty(samples.shape, np.uint8)
    for values, result in _blocks(samples, pixels):
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        result[...] = table[native.view(f"u{native.dtype.itemsize}")]
    return pixels


@functools.cache
def _table(bits: int, is_signed: bool, type_bits: int) -> Pixels:
    """What each pattern of `type_bits` bits becomes, `uint8 [2**type_bits]`."""
    patterns = np.arange(2**type_bits, dtype=f"u{type_bits // 8}")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    values = patterns.view(f"i{type_bits // 8}") if is_signed else patterns
    table: Pixels = np.rint((values.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    return table


def _blocks(*arrays: Samples) -> Iterator[tuple[Samples, ...]]:
    """The same parts of arrays of one shape, as views."""
    if all(array.flags.c_contiguous for array in arrays):
        flat = [array.reshape(-1) for array in arrays]
        for begin in range(0, flat[0].size, _BLOCK):
            yield tuple(array[begin : begin + _BLOCK] for array in flat)
        return
    for area in _areas(arrays[0]):
        yield tuple(array[area] for array in arrays)


def _areas(array: Samples) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of parts of `[h, w]` or `[h, w, S]`."""
    height, width = array.shape[:2]
    pixels = max(1, _BLOCK // max(1, int(np.prod(array.shape[2:]))))
    rows, columns = max(1, pixels // max(1, width)), min(pixels, max(1, width))
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield slice(top, top + rows), slice(left, left + columns)
