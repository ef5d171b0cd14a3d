"""Images for references: as a framework's own pipeline wants them, or as the bundle fits them.

Owns: an image in Pillow, and whether a bundle is built as its source states; if a flag has changed that, a
framework's own pipeline says nothing about the bundle. Does not own: any pipeline.
"""

# H = height px, W = width px, C = channels

import numpy as np
import numpy.typing as npt
from PIL import Image

from mnist_dist.images.decoder import decode_image, probe_image
from mnist_dist.images.spec import ImageSpec
from mnist_dist.importing.foreign import Asked, Facts

_FITTING = ("height_px", "width_px", "channels", "resize", "resampling", "interpolation", "crop_rounding", "pad_value")


def is_as_stated(asked: Asked, facts: Facts) -> bool:
    """Whether images are fitted and normalised as the facts say: no flag has changed it."""
    stated = {name: getattr(facts, name) for name in _FITTING}
    is_fitted = all(value is None or value == getattr(asked.spec, name) for name, value in stated.items())
    is_cropped_alike = facts.resize is None or facts.resize_px == asked.spec.resize_px
    is_normalized = (facts.scale, facts.offset, bool(facts.bgr)) == (asked.scale, asked.offset, asked.bgr)
    return is_fitted and is_cropped_alike and is_normalized


def opened(data: bytes, *, channels: int) -> Image.Image:
    """An encoded image at its full size as a Pillow image, RGB or grey.

    Decoded as for the bundle: Pillow clips what has 16 bits, and cannot read every format of `images`.

    Raises:
        ImageError: see `decode_image`.
    """
    width, height, _ = probe_image(data)
    pixels = decode_image(data, ImageSpec(height_px=height, width_px=width, channels=channels, quality="exact")).pixels
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def fitted(data: bytes, asked: Asked) -> npt.NDArray[np.float32]:
    """An encoded image as the bundle fits it and NumPy normalises it, `float32 [C, H, W]`."""
    pixels = asked.normalized(decode_image(data, asked.spec).pixels)
    return np.asarray(pixels, np.float32).transpose(2, 0, 1)
