"""Where an image comes to lie in the model's input: which part is resized, to which size, and what is kept of that.

Owns: the sizes, crops and margins of every geometry, rounded as the originals round them. Does not own: the filters
(`resampling`), or pixels.
"""

# H, W = height and width of the result, px; h, w = height and width of the original; R = resize_px

from typing import NamedTuple

import numpy as np

from mnist_dist.images.spec import ImageSpec

Size = tuple[int, int]
"""Height and width, px."""

_FACTOR = 2
"""Scaled to the size itself, ImageNet's EfficientNet-Lite0 keeps 95 % of its top classes; to twice that, 98 %."""


class Fit(NamedTuple):
    """How an image becomes H x W: a part of it is cut out, resized, and a window of that is kept."""

    kept: tuple[slice, slice]
    """Rows and columns of the original that are resized."""
    size: Size
    """What they are resized to."""
    top: int
    """The row of the resized image that becomes row 0 of the result; negative: so many rows are padding."""
    left: int
    """Likewise, of columns."""


def fit(height: int, width: int, spec: ImageSpec) -> Fit:
    """Where an original of h x w px comes to lie in the input of `spec`."""
    if spec.resize == "crop":
        return Fit(_same_aspect(height, width, spec), (spec.height_px, spec.width_px), 0, 0)
    kept = slice(0, height), slice(0, width)
    if spec.resize == "longest-edge-pad" and spec.resampling == "keras":
        return Fit(kept, *_padded_by_tensorflow(height, width, spec))
    size = _resized(height, width, spec)
    top = _margin(size[0], spec.height_px, spec.crop_rounding)
    return Fit(kept, size, top, _margin(size[1], spec.width_px, spec.crop_rounding))


def least_size(height: int, width: int, spec: ImageSpec) -> Size:
    """The smallest size, px, to which an original of h x w px may be scaled while it is decoded: so that nothing is
    enlarged afterwards which was not smaller before, and Pillow's and Keras' filters still decide on the result. With
    exact decoding: its own."""
    if spec.quality == "exact":
        return height, width
    rows, columns = fit(height, width, spec).size  # After a crop the kept part still has it, since one side is whole.
    factor = 1 if spec.resampling == "opencv" else _FACTOR
    return factor * rows, factor * columns


def _resized(height: int, width: int, spec: ImageSpec) -> Size:
    if spec.resize == "shortest-edge":
        return _shortest_edge(height, width, spec.resize_px or _covering(height, width, spec))
    if spec.resize == "stretch":
        return spec.resize_px or spec.height_px, spec.resize_px or spec.width_px
    # Source: timm's ResizeKeepRatio with longest=1.
    ratio = max(height / spec.height_px, width / spec.width_px)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _shortest_edge(height: int, width: int, side: int) -> Size:
    """Source: torchvision's `_compute_resized_output_size` and Transformers' `get_resize_output_image_size`."""
    if width <= height:
        return int(side * height / width), side
    return side, int(side * width / height)


def _covering(height: int, width: int, spec: ImageSpec) -> int:
    """The smallest R whose result covers H x W."""
    if width <= height:
        return max(spec.width_px, -(-spec.height_px * width // height))
    return max(spec.height_px, -(-spec.width_px * height // width))


def _margin(size: int, kept: int, rounding: str) -> int:
    """Where the centre begins. Where the image is smaller, the larger half of the padding lies behind it (`even`) or
    before it (`down`).

    Source: torchvision's `center_crop`, Transformers' `center_crop` in image_transforms.
    """
    if rounding == "down":
        return (size - kept) // 2
    return round((size - kept) / 2) if size >= kept else -((kept - size) // 2)


def _same_aspect(height: int, width: int, spec: ImageSpec) -> tuple[slice, slice]:
    """The centre of the same aspect ratio as H x W. Keras cuts fractions off, our own rule rounds.

    Source: Keras' `smart_resize` and `crop_to_aspect_ratio`, which divide in float32.
    """
    if spec.resampling == "keras":
        kept_height = int(np.float32(width * spec.height_px) / np.float32(spec.width_px))
        kept_width = int(np.float32(height * spec.width_px) / np.float32(spec.height_px))
    else:
        kept_height = round(width * spec.height_px / spec.width_px)
        kept_width = round(height * spec.width_px / spec.height_px)
    kept_height, kept_width = max(1, min(height, kept_height)), max(1, min(width, kept_width))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return slice(top, top + kept_height), slice(left, left + kept_width)


def _padded_by_tensorflow(height: int, width: int, spec: ImageSpec) -> tuple[Size, int, int]:
    """Source: `tf.image.resize_with_pad`, which divides in float32 and rounds sizes and margins down."""
    h, w, target_h, target_w = (np.float32(side) for side in (height, width, spec.height_px, spec.width_px))
    ratio = max(w / target_w, h / target_h)
    top, left = (max(0, int(np.floor((target - side / ratio) / 2))) for target, side in ((target_h, h), (target_w, w)))
    return (max(1, int(h / ratio)), max(1, int(w / ratio))), -top, -left
