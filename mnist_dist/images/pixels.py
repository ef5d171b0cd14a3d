"""Pixels: what is asked of a decoder, and what all decoders share once pixels are there.

Owns: size and channels that images are decoded to, resizing, and the conversions to 8 bits, grey, RGB and upright.
Does not own: reading any format.
"""

# H = height px, W = width px, C = channels (1 grey, 3 RGB) of the result; h, w = height, width of the original

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import cv2
import numpy as np
import numpy.typing as npt

from mnist_dist.config import DecodeQuality, Geometry, Interpolation, Resampling, require

Pixels = npt.NDArray[np.uint8]

STRIP_PX = 2**20
LINEAR_SHRINK = 2.0  # Up to this factor linear interpolation skips no pixel; it is far faster than an average.
_SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height.


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Size and channels that every image is decoded to."""

    height_px: int
    width_px: int
    channels: int
    """1 (grey, ITU-R 601 luma) or 3 (RGB)."""
    resize: Geometry = "stretch"
    """How another shape is resized. `stretch`: both sides at once. `crop`: first cropped at the centre to the same
    aspect ratio. `shortest-edge`: the shorter side becomes `resize_px`, then the centre is cropped.
    `longest-edge-pad`: the longer side fits, the rest is filled with `pad_value`."""
    resize_px: int | None = None
    """With `shortest-edge`, the length of the shorter side before the crop, px; with `stretch`, that of both sides.
    None: there is no crop but what the shape needs."""
    resampling: Resampling = "opencv"
    """Whose filters: `opencv` (linear, averages where more than halved), `pillow` (antialiased), or `keras`
    (`tf.image.resize`, rounded to 8 bits)."""
    interpolation: Interpolation = "bilinear"
    """The filter of `pillow` and `keras`."""
    antialias: bool = True
    """Whether `keras` widens its filter where the image shrinks; `pillow` always does."""
    crop_rounding: Literal["even", "down"] = "even"
    """How half a pixel of a crop's margin is rounded: to `even` (torchvision, timm) or `down` (Hugging Face)."""
    pad_value: int = 0
    """0-255, of all channels."""
    quality: DecodeQuality = "fast"
    """`fast`: JPEGs may be scaled while they are decoded. `exact`: decoded at full size, as Pillow does."""

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


def _crop_to_aspect(pixels: Pixels, spec: ImageSpec) -> Pixels:
    height, width = pixels.shape[:2]
    kept_height = max(1, min(height, round(width * spec.height_px / spec.width_px)))
    kept_width = max(1, min(width, round(height * spec.width_px / spec.height_px)))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return np.ascontiguousarray(pixels[top : top + kept_height, left : left + kept_width])
