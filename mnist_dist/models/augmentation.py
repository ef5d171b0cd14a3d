"""Augmentation, as a pure function of images and random numbers, and the seeding of all other randomness in a step.

Owns: the presets, and setting the state of a model's random number generators from outside. Does not own: which numbers
an image gets (`data/batches.py`: those of its position in the global batch), the operations of RandAugment
(`rand_augment`), mixing images (`mixing`), or when a step reseeds its network.

Contract: everything random in a step is a function of the run's seed, the global step and the position of an image in
the global batch (augmentation; dropout on JAX) or of the rank (dropout on TensorFlow). No random state needs saving,
and a resumed run repeats the draws. The same numbers give the same augmentation on every backend of Keras, and with any
number of workers.

Speed: rotation, shift and zoom are one affine transform, one pass over the pixels. Three Keras layers
(`RandomRotation`, `RandomTranslation`, `RandomZoom`) take three passes and are several times slower.
"""

# B = batch, H = height px, W = width px, C = channels (1 grey, 3 RGB)

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import keras
from keras import ops

from mnist_dist.config import Augmentation, FitConfig
from mnist_dist.errors import ConfigError
from mnist_dist.models.mixing import within
from mnist_dist.models.rand_augment import GREY_OF_RGB, RandAugment


class Transform(Protocol):
    """A change of images by random numbers of their own."""

    @property
    def draws(self) -> int:
        """How many numbers it needs for each image, n."""

    def __call__(self, images: Any, draws: Any, /) -> Any:
        """`float32 [B, H, W, C]` in 0-255 and `float32 [B, n]` in [-1, 1) -> the images changed."""


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Rotation, shift, zoom and flip in one bilinear transform; each is drawn uniformly per image.

    Args:
        rotation_degrees: largest rotation, either way.
        shift: largest shift, either way, as a share of height and width.
        zoom: smallest and largest visible part, as a share of the image's height and width; below 1 it is a crop.
        flip: mirror left to right with probability one half.
        fill: how pixels beyond the edges are filled, as in `keras.ops.image.affine_transform`.
    """

    rotation_degrees: float = 0.0
    shift: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    fill: str = "nearest"
    draws = 5

    def __call__(self, images: Any, draws: Any) -> Any:
        """`float32 [B, H, W, C]` and `float32 [B, 5]` in [-1, 1) -> the images transformed."""
        matrices = self._matrices(draws, *images.shape[1:3])
        return ops.image.affine_transform(images, matrices, interpolation="bilinear", fill_mode=self.fill)

    def _matrices(self, draws: Any, height_px: int, width_px: int) -> Any:
        """Per image, the affine map from new to old pixel positions, about the centre: `float32 [B, 8]`."""
        angle, right, down, zoom, mirror = ops.unstack(draws, num=5, axis=1)
        radians = angle * math.radians(self.rotation_degrees)
        nearest, farthest = self.zoom
        size = (nearest + farthest) / 2 + zoom * (farthest - nearest) / 2
        sign = ops.where(mirror < 0, -1.0, 1.0) if self.flip else ops.ones_like(mirror)
        cosine, sine = size * ops.cos(radians), size * ops.sin(radians)
        xx, xy, yx, yy = cosine * sign, -sine, sine * sign, cosine
        centre_x, centre_y = (width_px - 1) / 2, (height_px - 1) / 2
        x0 = centre_x - xx * centre_x - xy * centre_y + right * self.shift * width_px
        y0 = centre_y - yx * centre_x - yy * centre_y + down * self.shift * height_px
        zero = ops.zeros_like(xx)
        return ops.stack([xx, xy, x0, yx, yy, y0, zero, zero], axis=1)


@dataclass(frozen=True, kw_only=True)
class Colour:
    """Changes of saturation, contrast and brightness, clipped to 0-255; each is drawn uniformly per image.

    Args:
        brightness: largest value added, either way, as a share of 255.
        contrast: largest relative change of a value's distance from the image's mean.
        saturation: largest relative change of a value's distance from the pixel's grey; RGB only.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    draws = 3

    def __call__(self, images: Any, draws: Any) -> Any:
        """`float32 [B, H, W, C]` and `float32 [B, 3]` in [-1, 1) -> the images changed."""
        brightness, contrast, saturation = ops.unstack(draws[:, :, None, None, None], num=3, axis=1)
        x = images
        if x.shape[-1] == 3:
            grey = ops.sum(x * ops.convert_to_tensor(GREY_OF_RGB), axis=-1, keepdims=True)
            x = grey + (x - grey) * (1 + saturation * self.saturation)
        mean = ops.mean(x, axis=(1, 2, 3), keepdims=True)
        x = mean + (x - mean) * (1 + contrast * self.contrast)
        return ops.clip(x + brightness * self.brightness * 255, 0.0, 255.0)


@dataclass(frozen=True, kw_only=True)
class Erasing:
    """Erases a rectangle of some images: it gets the mean colour of its image.

    Its area, as a share of the image's, and the ratio of its height to its width are drawn uniformly (the ratio on a
    logarithmic scale), and so is its place. What would be longer than the image is cut.

    Args:
        probability: of each image, 0 to 1.
        area: smallest and largest share.
        ratio: smallest ratio; the largest is its inverse.

    Source: Zhong et al. 2020, Random erasing data augmentation, arXiv:1708.04896, with its ranges; it fills with random
    values or with the mean of ImageNet.
    """

    probability: float
    area: tuple[float, float] = (0.02, 0.4)
    ratio: float = 0.3
    draws = 5

    def __call__(self, images: Any, draws: Any, /) -> Any:
        """`float32 [B, H, W, C]` and `float32 [B, 5]` in [-1, 1) -> the images changed."""
        chance, area, ratio, down, right = ops.unstack((draws + 1) / 2, num=5, axis=1)
        smallest, largest = self.area
        share = smallest + area * (largest - smallest)
        tallness = ops.exp((1 - 2 * ratio) * math.log(self.ratio) / 2)  # square root of height / width
        erased = ops.cast(chance < self.probability, "float32")
        rows = _interval(images.shape[1], ops.minimum(ops.sqrt(share) * tallness, 1.0), down)
        columns = _interval(images.shape[2], ops.minimum(ops.sqrt(share) / tallness, 1.0), right)
        inside = (erased[:, None] * rows)[:, :, None, None] * columns[:, None, :, None]
        mean = ops.mean(images, axis=(1, 2), keepdims=True)
        return images + inside * (mean - images)


def _interval(pixels: int, length: Any, place: Any) -> Any:
    """`float32 [B, pixels]`: 1 for each pixel in an interval of some length, at some place (0: it begins at the start,
    1: it ends at the end), all in shares of the whole."""
    start = place * (1 - length)
    return within(pixels, start, start + length)


class Preset:
    """The transforms of an image, in the order in which they are applied."""

    def __init__(self, *transforms: Transform) -> None:
        self.transforms = transforms
        self.draws = sum(transform.draws for transform in transforms)
        """How many random numbers each image needs."""

    def __call__(self, images: Any, draws: Any) -> Any:
        """Augments a batch.

        Args:
            images: `float32 [B, H, W, C]`, 0-255.
            draws: `float32 [B, self.draws]` in [-1, 1): the random numbers of each image.

        Returns:
            `float32 [B, H, W, C]`, 0-255.
        """
        used = 0
        for transform in self.transforms:
            images = transform(images, draws[:, used : used + transform.draws])
            used += transform.draws
        return images


def _transforms(fit: FitConfig) -> tuple[Transform, ...]:
    """Those of `fit.augmentation`."""
    if fit.augmentation == "none":
        return ()
    if fit.augmentation == "digits":
        # No flips: a mirrored digit is not that digit. The ranges stay within natural handwriting (Simard et al. 2003).
        return (Affine(rotation_degrees=10.0, shift=0.08, zoom=(0.9, 1.1)),)
    if fit.augmentation == "photos":
        affine = Affine(rotation_degrees=5.0, shift=0.05, zoom=(0.7, 1.0), flip=True, fill="reflect")
        return affine, Colour(brightness=0.1, contrast=0.2, saturation=0.2)
    if fit.augmentation == "rand-augment":
        operations = RandAugment(operations=fit.rand_augment_ops, magnitude=fit.rand_augment_magnitude)
        return Affine(zoom=(0.7, 1.0), flip=True, fill="reflect"), operations
    known = ", ".join(get_args(Augmentation))
    raise ConfigError(f"augmentation must be one of {known}. Received: augmentation={fit.augmentation!r}")


def make_preset(fit: FitConfig) -> Preset | None:
    """The augmentation that a run asks for: `digits` (rotation, shift, zoom), `photos` (flip, crop, shift, rotation,
    colours) or `rand-augment` (flip, crop, RandAugment), then random erasing. None: there is nothing to do.

    Raises:
        ConfigError: there is no such augmentation.
    """
    transforms = _transforms(fit)
    if fit.random_erasing:
        transforms = (*transforms, Erasing(probability=fit.random_erasing))
    return Preset(*transforms) if transforms else None


def seed_generators(*models: keras.Model | None) -> list[keras.random.SeedGenerator]:
    """All random number generators of the models' layers, without duplicates, in the same order for equal models."""
    generators: dict[int, keras.random.SeedGenerator] = {}
    for model in models:
        for layer in _layers_of(model):
            for value in vars(layer).values():
                if isinstance(value, keras.random.SeedGenerator):
                    generators.setdefault(id(value), value)
    return list(generators.values())


def _layers_of(layer: Any) -> Iterator[Any]:
    if layer is None:
        return
    yield layer
    for inner in getattr(layer, "layers", ()):
        yield from _layers_of(inner)


def reseed(generators: Sequence[keras.random.SeedGenerator], seed: Any) -> None:
    """Gives each generator a state of its own.

    A state is two words, of which each draw advances the second one; the index of a generator is added to the first.

    Args:
        generators: from `seed_generators`, in that order.
        seed: two words, unrelated to those of any other step, such as `data/batches.step_seeds` gives; a tensor or a
            sequence of integers.
    """
    for index, generator in enumerate(generators):
        words = ops.cast(ops.convert_to_tensor(seed), generator.state.dtype)
        generator.state.assign(words + ops.convert_to_tensor([index, 0], generator.state.dtype))
