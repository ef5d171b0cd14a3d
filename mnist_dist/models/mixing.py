"""Mixup and CutMix: each image of a batch is mixed with another one, and so is its label.

Owns: mixing images by given numbers. Does not own: which images are mixed, and how (`data/batches.py`), or the loss of
a mixed label (`training/step.py`).
"""

# B = batch, H = height px, W = width px, C = channels

from typing import Any

from keras import ops


def mixed(images: Any, partners: Any, mixing: Any) -> tuple[Any, Any]:
    """Mixes images with their partners.

    Args:
        images: `float32 [B, H, W, C]`.
        partners: `float32 [B, H, W, C]`.
        mixing: `float32 [B, 5]`: share of the image outside of a rectangle, and top, bottom, left and right of the
            rectangle, which is the partner's, as shares of height and width.

    Returns:
        The mixed images and the share of each that is its own, `float32 [B]`: the rectangle counts by its pixels.
    """
    height_px, width_px = images.shape[1:3]
    outside, top, bottom, left, right = ops.unstack(mixing, num=5, axis=1)
    cut = within(height_px, top, bottom)[:, :, None] * within(width_px, left, right)[:, None, :]
    shares = outside[:, None, None] * (1 - cut)
    return partners + shares[..., None] * (images - partners), ops.mean(shares, axis=(1, 2))


def within(pixels: int, start: Any, end: Any) -> Any:
    """`float32 [B, pixels]`: 1 for each pixel whose centre lies between two shares of the whole."""
    centres = (ops.arange(pixels, dtype="float32") + 0.5)[None] / pixels
    return ops.cast((centres >= start[:, None]) & (centres < end[:, None]), "float32")
