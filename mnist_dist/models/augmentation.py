"""Augmentation: a separate model in front of the network, and the seeding of all randomness in a training step.

Owns: the presets, and setting the state of a model's random number generators from outside. Does not own: when that
happens (at each training step, by the step itself). An augmentation is never saved: random layers run in training mode
by default, so a model saved with them would augment when it is called as `model(x)`.

Contract: after `reseed(generators, (seed, global step, rank))` at the start of a step, everything random in the step
(augmentation, dropout) is a function of these numbers. No random state needs saving, and a resumed run repeats the
draws. This works in a `tf.function`, and in the replica context of a `tf.distribute` strategy: the states are variables
without aggregation, so each replica sets and advances its own.

Speed: rotation, shift and zoom are one affine transform, one pass over the pixels. Three Keras layers
(`RandomRotation`, `RandomTranslation`, `RandomZoom`) take three passes and are several times slower.
"""

# B = batch, H = height px, W = width px, C = channels (1 grey, 3 RGB)

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from mnist_dist.config import Augmentation
from mnist_dist.errors import ConfigError
from mnist_dist.images.spec import ImageSpec

MASK_32_BITS = 0xFFFFFFFF
GREY_OF_RGB = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Ranges of rotation, shift, zoom and flip; each is drawn uniformly per image.

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


@dataclass(frozen=True, kw_only=True)
class Colour:
    """Ranges of the colour changes; each is drawn uniformly per image.

    Args:
        brightness: largest value added, either way, as a share of 255.
        contrast: largest relative change of a value's distance from the image's mean.
        saturation: largest relative change of a value's distance from the pixel's grey; RGB only.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0


@dataclass(frozen=True)
class Preset:
    """The transforms of an image, in the order in which they are applied."""

    affine: Affine
    colour: Colour | None = None


PRESETS: dict[Augmentation, Preset | None] = {
    "none": None,
    # No flips: a mirrored digit is not that digit. The ranges stay within natural handwriting (Simard et al. 2003).
    "digits": Preset(Affine(rotation_degrees=10.0, shift=0.08, zoom=(0.9, 1.1))),
    "photos": Preset(
        Affine(rotation_degrees=5.0, shift=0.05, zoom=(0.7, 1.0), flip=True, fill="reflect"),
        Colour(brightness=0.1, contrast=0.2, saturation=0.2),
    ),
}


def build_augmentation(preset: Augmentation, *, spec: ImageSpec) -> keras.Model | None:
    """The augmentation of that name, or None for `none`.

    Args:
        preset: `none`; `digits`: rotation, shift, zoom; `photos`: flip, crop, shift, rotation, colours.
        spec: size and channels of the images.

    Returns:
        A model `float32 [B, H, W, C]`, 0-255 -> the same. It augments whatever `training` is.

    Raises:
        ConfigError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"augmentation must be one of {', '.join(PRESETS)}. Received: augmentation={preset!r}")
    chosen = PRESETS[preset]
    if chosen is None:
        return None
    pixels = keras.Input((spec.height_px, spec.width_px, spec.channels), dtype="float32", name="pixels")
    x = RandomAffine(chosen.affine)(pixels)
    if chosen.colour is not None:
        x = RandomColour(chosen.colour)(x)
    return keras.Model(pixels, x, name=f"augment_{preset}")


class RandomAffine(keras.layers.Layer):
    """Rotates, shifts, zooms and mirrors each image of a batch in one bilinear transform."""

    def __init__(self, affine: Affine) -> None:
        super().__init__(dtype="float32", name="affine")
        self.affine = affine
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, images: Any) -> Any:
        """`float32 [B, H, W, C]` -> the same."""
        matrices = self._matrices(ops.shape(images)[0], *images.shape[1:3])
        return ops.image.affine_transform(images, matrices, interpolation="bilinear", fill_mode=self.affine.fill)

    def _matrices(self, batch: Any, height_px: int, width_px: int) -> Any:
        """Per image, the affine map from new to old pixel positions, about the centre: `float32 [B, 8]`."""
        angle, right, down, zoom, mirror = ops.unstack(
            keras.random.uniform((5, batch), -1.0, 1.0, seed=self.seed_generator), num=5
        )
        radians = angle * math.radians(self.affine.rotation_degrees)
        nearest, farthest = self.affine.zoom
        size = (nearest + farthest) / 2 + zoom * (farthest - nearest) / 2
        sign = ops.where(mirror < 0, -1.0, 1.0) if self.affine.flip else ops.ones_like(mirror)
        cosine, sine = size * ops.cos(radians), size * ops.sin(radians)
        xx, xy, yx, yy = cosine * sign, -sine, sine * sign, cosine
        centre_x, centre_y = (width_px - 1) / 2, (height_px - 1) / 2
        x0 = centre_x - xx * centre_x - xy * centre_y + right * self.affine.shift * width_px
        y0 = centre_y - yx * centre_x - yy * centre_y + down * self.affine.shift * height_px
        zero = ops.zeros_like(xx)
        return ops.stack([xx, xy, x0, yx, yy, y0, zero, zero], axis=1)


class RandomColour(keras.layers.Layer):
    """Changes saturation, contrast and brightness of each image of a batch, clipped to 0-255."""

    def __init__(self, colour: Colour) -> None:
        super().__init__(dtype="float32", name="colour")
        self.colour = colour
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, images: Any) -> Any:
        """`float32 [B, H, W, C]` -> the same."""
        shape = (3, ops.shape(images)[0], 1, 1, 1)
        brightness, contrast, saturation = ops.unstack(
            keras.random.uniform(shape, -1.0, 1.0, seed=self.seed_generator), num=3
        )
        x = images
        if x.shape[-1] == 3:
            grey = ops.sum(x * ops.convert_to_tensor(GREY_OF_RGB), axis=-1, keepdims=True)
            x = grey + (x - grey) * (1 + saturation * self.colour.saturation)
        mean = ops.mean(x, axis=(1, 2, 3), keepdims=True)
        x = mean + (x - mean) * (1 + contrast * self.colour.contrast)
        return ops.clip(x + brightness * self.colour.brightness * 255, 0.0, 255.0)


def seed_generators(*models: keras.Model | None) -> list[keras.random.SeedGenerator]:
    """All random number generators of the models' layers, without duplicates, in the same order for equal models.

    Args:
        models: augmentation, network; None is skipped, since `build_augmentation` may return it.
    """
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
    """Sets each generator's state to a hash of `seed` and of its index in the list.

    Args:
        generators: from `seed_generators`, in that order.
        seed: integers from 0 to 2**32 - 1 of any integer type, a tensor or a sequence: `(seed, global step, rank)`, or
            two numbers derived from them. Adjacent numbers give unrelated streams.
    """
    if not generators:
        return
    words = ops.unstack(ops.cast(ops.convert_to_tensor(seed), "int64"))
    states = ops.reshape(ops.arange(2 * len(generators), dtype="int64"), (len(generators), 2))
    for word in words:
        states = _mix(ops.bitwise_xor(_mix(states), ops.bitwise_and(word, MASK_32_BITS)))
    for generator, state in zip(generators, ops.unstack(states, num=len(generators)), strict=True):
        generator.state.assign(state)


def _mix(x: Any) -> Any:
    """A permutation of 32-bit words in which each input bit changes half of the output bits.

    The factor is below 2**31, so the products fit in int64. Source: Thomas Mueller,
    https://stackoverflow.com/a/12996028 (as in the H2 database).
    """
    x = ops.bitwise_and(x + 0x9E3779B9, MASK_32_BITS)  # Without it, 0 would stay 0.
    for _ in range(2):
        x = ops.bitwise_and(ops.bitwise_xor(ops.right_shift(x, 16), x) * 0x45D9F3B, MASK_32_BITS)
    return ops.bitwise_xor(ops.right_shift(x, 16), x)
