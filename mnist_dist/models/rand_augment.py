"""RandAugment: some random operations on each image, all of the same magnitude.

Owns: the operations, in `keras.ops`. Does not own: the random numbers, or what else is done to an image
(`augmentation`). Every operation is computed for all images of a batch at once; each image keeps the one it drew. The
geometric ones are a single affine transform, and those that blend an image with a duller one a single blend.

Source: Cubuk et al. 2020, RandAugment, arXiv:1909.13719, with the 14 operations of its figure 2 and the ranges of its
published code, where a magnitude of 30 is the largest. Operations on values are those of Pillow (ImageEnhance,
ImageOps).
"""

# B = batch, H = height px, W = width px, C = channels (1 grey, 3 RGB)

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "colour", "contrast", "sharpness"),
    *("posterize", "solarize", "auto_contrast", "equalize"),
)
MAX_MAGNITUDE = 30
MAX_SHEAR = 0.3
MAX_SHIFT = 100 / 331  # of height or width; the published code moves images of 331 px by up to 100 px
MAX_ROTATION_DEGREES = 30.0
MAX_BLEND = 0.9
MAX_LOST_BITS = 4
FILL = 128.0  # what lies beyond the edges, as in the published code
GREY_OF_RGB = (0.299, 0.587, 0.114)  # ITU-R BT.601
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """A transform of `augmentation`.

    Args:
        operations: on each image, one after the other.
        magnitude: 0 to 30.
    """

    operations: int
    magnitude: int

    @property
    def draws(self) -> int:
        """Numbers for each image: which operation, and its direction."""
        return 2 * self.operations

    def __call__(self, images: Any, draws: Any, /) -> Any:
        """`float32 [B, H, W, C]` in 0-255 and `float32 [B, 2 * operations]` in [-1, 1) -> the images changed."""
        for choice, direction in zip(*[iter(ops.unstack(draws, num=self.draws, axis=1))] * 2, strict=True):
            index = ops.cast(ops.floor((choice + 1) / 2 * len(OPERATIONS)), "int32")
            images = apply(images, index, ops.where(direction < 0, -1.0, 1.0) * (self.magnitude / MAX_MAGNITUDE))
        return images


def apply(images: Any, index: Any, strength: Any) -> Any:
    """Applies one operation to each image.

    Args:
        images: `float32 [B, H, W, C]`, 0-255.
        index: `int32 [B]`, into `OPERATIONS`.
        strength: `float32 [B]`, -1 to 1; operations without a direction use its absolute value.
    """
    drawn = {name: ops.equal(index, position) for position, name in enumerate(OPERATIONS)}
    x = _moved(images, drawn, strength)
    x = _blended(x, drawn, strength)
    for name, operation in (("posterize", _posterized), ("solarize", _solarized)):
        x = ops.where(_by_image(drawn[name]), operation(x, _by_image(ops.abs(strength))), x)
    for name, stretch in (("auto_contrast", _stretched), ("equalize", _equalized)):
        x = ops.where(_by_image(drawn[name]), stretch(x), x)
    return x


def _by_image(values: Any) -> Any:
    """`[B]` -> `[B, 1, 1, 1]`."""
    return values[:, None, None, None]


def _moved(images: Any, drawn: dict[str, Any], strength: Any) -> Any:
    """Sheared, translated or rotated, about the centre: one affine map from new to old positions."""
    height_px, width_px = images.shape[1:3]
    amount = {name: ops.cast(drawn[name], "float32") * strength for name in OPERATIONS[1:6]}
    radians = amount["rotate"] * math.radians(MAX_ROTATION_DEGREES)
    xx = yy = ops.cos(radians)
    xy = amount["shear_x"] * MAX_SHEAR - ops.sin(radians)
    yx = amount["shear_y"] * MAX_SHEAR + ops.sin(radians)
    centre_x, centre_y = (width_px - 1) / 2, (height_px - 1) / 2
    x0 = centre_x - xx * centre_x - xy * centre_y + amount["translate_x"] * MAX_SHIFT * width_px
    y0 = centre_y - yx * centre_x - yy * centre_y + amount["translate_y"] * MAX_SHIFT * height_px
    zero = ops.zeros_like(xx)
    maps = ops.stack([xx, xy, x0, yx, yy, y0, zero, zero], axis=1)
    moved = ops.image.affine_transform(images, maps, interpolation="bilinear", fill_mode="constant", fill_value=FILL)
    is_moved = sum(ops.cast(drawn[name], "float32") for name in amount) > 0
    return ops.where(_by_image(is_moved), moved, images)


def _blended(images: Any, drawn: dict[str, Any], strength: Any) -> Any:
    """Between (or beyond) the image and a duller one: black, its grey, its mean grey, or a smoothed one."""
    grey = images
    if images.shape[-1] == 3:
        grey = ops.sum(images * ops.convert_to_tensor(GREY_OF_RGB), axis=-1, keepdims=True)
    dull = {
        "brightness": ops.zeros_like(images),
        "colour": ops.broadcast_to(grey, ops.shape(images)),
        "contrast": ops.broadcast_to(ops.mean(grey, axis=(1, 2, 3), keepdims=True), ops.shape(images)),
        "sharpness": _smoothed(images),
    }
    target, kept = images, 1 + _by_image(strength) * MAX_BLEND
    for name, values in dull.items():
        target = ops.where(_by_image(drawn[name]), values, target)
    return ops.clip(target + (images - target) * kept, 0.0, 255.0)


def _smoothed(images: Any) -> Any:
    """Pillow's SMOOTH, which leaves the outermost pixels as they are."""
    channels = images.shape[-1]
    kernel = ops.convert_to_tensor(np.repeat(SMOOTH[:, :, None, None], channels, axis=2))
    inner = ops.depthwise_conv(images, kernel, padding="valid")
    rows = ops.concatenate([images[:, :1, 1:-1], inner, images[:, -1:, 1:-1]], axis=1)
    return ops.concatenate([images[:, :, :1], rows, images[:, :, -1:]], axis=2)


def _posterized(images: Any, strength: Any) -> Any:
    """Without up to four of the eight bits."""
    unit = ops.power(2.0, ops.round(strength * MAX_LOST_BITS))
    return ops.floor(images / unit) * unit


def _solarized(images: Any, strength: Any) -> Any:
    """Bright values inverted, from a threshold that falls from 256 to 0."""
    return ops.where(images >= 256 * (1 - strength), 255 - images, images)


def _stretched(images: Any) -> Any:
    """Each channel stretched to 0-255."""
    low, high = ops.amin(images, axis=(1, 2), keepdims=True), ops.amax(images, axis=(1, 2), keepdims=True)
    scale = 255 / ops.where(high > low, high - low, 255.0)
    return ops.where(high > low, ops.minimum((images - low) * scale, 255.0), images)


def _equalized(images: Any) -> Any:
    """Each channel with an even histogram, as by Pillow's ImageOps.equalize."""
    height_px, width_px, channels = images.shape[1:]
    values = ops.cast(ops.round(images), "int32")
    planes = ops.reshape(ops.transpose(values, (0, 3, 1, 2)), (-1, height_px * width_px))  # [B * C, H * W]
    count = ops.shape(planes)[0]
    bins = planes + 256 * ops.arange(count)[:, None]
    ones = ops.ones_like(ops.reshape(bins, (-1,)))
    histogram = ops.reshape(ops.segment_sum(ones, ops.reshape(bins, (-1,)), num_segments=count * 256), (count, 256))
    last = ops.take_along_axis(histogram, ops.amax(planes, axis=1, keepdims=True), axis=1)
    step = (height_px * width_px - last) // 255  # [B * C, 1]
    before = ops.cumsum(histogram, axis=1) - histogram
    table = ops.minimum((before + step // 2) // ops.maximum(step, 1), 255)
    even = ops.where(step > 0, ops.take_along_axis(table, planes, axis=1), planes)
    planar = ops.reshape(even, (-1, channels, height_px, width_px))
    return ops.cast(ops.transpose(planar, (0, 2, 3, 1)), "float32")
