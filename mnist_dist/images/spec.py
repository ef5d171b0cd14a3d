"""What is asked of a decoder: size and channels, and how an image is fitted to that size.

Owns: `ImageSpec`, which a bundle keeps, and which of its values go together. Does not own: what they mean to pixels
(`geometry`, `resampling`).
"""

from dataclasses import dataclass
from typing import Literal

from mnist_dist.config import DecodeQuality, Geometry, Interpolation, Resampling, require

KERAS_INTERPOLATIONS: tuple[Interpolation, ...] = ("nearest", "box", "bilinear", "bicubic", "lanczos")
"""Those that `tf.image.resize` has: box is its `area`, lanczos its `lanczos3`."""


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Size and channels that every image is decoded to, and how it is fitted to that size."""

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
    None: there is no crop but what the shape needs. What is smaller than the crop is centred on black."""
    resampling: Resampling = "opencv"
    """Whose filters: `opencv` (linear, averages where more than halved), `pillow` (antialiased, bit for bit), or
    `keras` (`tf.image.resize`, rounded to 8 bits and clipped)."""
    interpolation: Interpolation = "bilinear"
    """The filter of `pillow` and `keras`. Of `keras`, box is `area` and lanczos is `lanczos3`."""
    antialias: bool = True
    """Whether `keras` widens its filter where the image shrinks; `pillow` always does, but for nearest."""
    crop_rounding: Literal["even", "down"] = "even"
    """How half a pixel of a crop's margin is rounded: to `even` (torchvision, timm) or `down` (Hugging Face)."""
    pad_value: int = 0
    """0-255, of all channels."""
    quality: DecodeQuality = "fast"
    """`exact`: JPEGs are decoded at full size, as by Pillow. `fast`: JPEGs may be scaled while they are decoded: for
    `opencv` not below the size that they are resized to, for the others not below twice that size."""

    def __post_init__(self) -> None:
        require(self.height_px >= 1, "height_px is at least 1", height_px=self.height_px)
        require(self.width_px >= 1, "width_px is at least 1", width_px=self.width_px)
        require(self.channels in (1, 3), "channels is 1 (grey) or 3 (RGB)", channels=self.channels)
        self._check_geometry()
        self._check_resampling()

    def _check_geometry(self) -> None:
        require(self.resize_px is None or self.resize_px >= 1, "resize_px is at least 1 px", resize_px=self.resize_px)
        require(
            self.resize_px is None or self.resize in ("stretch", "shortest-edge"),
            "resize_px goes with resize stretch or shortest-edge",
            resize=self.resize,
            resize_px=self.resize_px,
        )
        require(0 <= self.pad_value <= 255, "pad_value is 0 to 255", pad_value=self.pad_value)
        require(
            self.pad_value == 0 or self.resize == "longest-edge-pad",
            "pad_value goes with resize longest-edge-pad",
            resize=self.resize,
            pad_value=self.pad_value,
        )

    def _check_resampling(self) -> None:
        received = {"resampling": self.resampling, "interpolation": self.interpolation}
        require(
            self.resampling != "opencv" or self.interpolation == "bilinear",
            "resampling opencv has no interpolation but bilinear; pillow and keras have others",
            **received,
        )
        require(
            self.resampling != "keras" or self.interpolation in KERAS_INTERPOLATIONS,
            f"with resampling keras, interpolation is one of {', '.join(KERAS_INTERPOLATIONS)}",
            **received,
        )
        require(
            self.antialias or self.resampling == "keras",
            "only resampling keras goes without antialias",
            resampling=self.resampling,
            antialias=self.antialias,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height px, width px, channels."""
        return self.height_px, self.width_px, self.channels

    @property
    def image_bytes(self) -> int:
        """Size of one decoded image, bytes."""
        return self.height_px * self.width_px * self.channels
