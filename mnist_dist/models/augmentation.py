"""Augmentation: a model of its own in front of the training step, and the one door through which randomness comes.

Owns: the presets, and setting the state of every random number generator of a model from outside. Does not own when
that happens (the training step does it, each step). An augmentation is never part of what is saved: random layers run
in training mode by default, so a model saved with them would augment when it is called as `model(x)`.

Contract: with the generators set by `reseed(generators, (seed, global step, rank))` at the start of a step, all that
is random in this step (augmentation, dropout) is a function of these numbers. Nothing of it needs saving, and a resumed
run repeats it. This works in a `tf.function`, and in the replica context of a `tf.distribute` strategy: the states are
variables without aggregation, so that each replica sets and advances its own.

Speed: turning, moving and zooming are one affine transform, one pass over the pixels. Three Keras layers
(`RandomRotation`, `RandomTranslation`, `RandomZoom`) do it in three and several times slower.
"""

# B = batch, H = height px, W = width px, C = channels (1 grey, 3 RGB)

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from mnist_dist.config import Augmentation
from mnist_dist.data.images import ImageSpec
from mnist_dist.errors import ConfigError

WORD = 0xFFFFFFFF  # 32 bits
GREY_OF_RGB = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True, kw_only=True)
class Affine:
    """How far an image is turned, moved, zoomed and mirrored; each drawn uniformly for each image.

    Args:
        rotation_degrees: up to this, either way.
        shift: share of height and width, up to this, either way.
        zoom: least and greatest size of what is seen, as a share of the image: below 1 it comes nearer (a crop).
        flip: mirrored left to right, every other image.
        fill: what appears at the edges, as in `keras.ops.image.affine_transform`.
    """

    rotation_degrees: float = 0.0
    shift: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    fill: str = "nearest"


@dataclass(frozen=True, kw_only=True)
class Colour:
    """How far colours change; each drawn uniformly for each image.

    Args:
        brightness: share of 255 that is added, up to this, either way.
        contrast: change of the distance from the image's mean grey, as a share.
        saturation: change of the distance from the pixel's grey, as a share; RGB only.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0


@dataclass(frozen=True)
class Preset:
    """What happens to an image, in this order."""

    affine: Affine
    colour: Colour | None = None


PRESETS: dict[Augmentation, Preset | None] = {
    "none": None,
    # No flips: a mirrored digit is another sign. Within what handwriting does by itself (Simard et al. 2003).
    "digits": Preset(Affine(rotation_degrees=10.0, shift=0.08, zoom=(0.9, 1.1))),
    "photos": Preset(
        Affine(rotation_degrees=5.0, shift=0.05, zoom=(0.7, 1.0), flip=True, fill="reflect"),
        Colour(brightness=0.1, contrast=0.2, saturation=0.2),
    ),
}


def build_augmentation(preset: Augmentation, *, spec: ImageSpec) -> keras.Model | None:
    """The augmentation of that name, or None for `none`.

    Args:
        preset: `none`; `digits`: turned, moved, zoomed; `photos`: mirrored, cropped, moved, turned, colours changed.
        spec: size and channels of the images.

    Returns:
        A model `float32 [B, H, W, C]`, 0-255 -> the same. It augments however it is called.

    Raises:
        ConfigError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"augmentation is one of {', '.join(PRESETS)}. Received: augmentation={preset!r}")
    chosen = PRESETS[preset]
    if chosen is None:
        return None
    pixels = keras.Input((spec.height_px, spec.width_px, spec.channels), dtype="float32", name="pixels")
    x = RandomAffine(chosen.affine)(pixels)
    if chosen.colour is not None:
        x = RandomColour(chosen.colour)(x)
    return keras.Model(pixels, x, name=f"augment_{preset}")


class RandomAffine(keras.layers.Layer):
    """Turns, moves, zooms and mirrors each image of a batch by one bilinear transform."""

    def __init__(self, affine: Affine) -> None:
        super().__init__(dtype="float32", name="affine")
        self.affine = affine
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, images: Any) -> Any:
        """`float32 [B, H, W, C]` -> the same."""
        matrices = self._matrices(ops.shape(images)[0], *images.shape[1:3])
        return ops.image.affine_transform(images, matrices, interpolation="bilinear", fill_mode=self.affine.fill)

    def _matrices(self, batch: Any, height_px: int, width_px: int) -> Any:
        """`float32 [B, 8]`: for each image, from a place in the new image to one in the old, about the centre."""
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
    """Changes saturation, contrast and brightness of each image of a batch; what leaves 0-255 is clipped."""

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
    """Every random number generator of the models' layers, each once, in an order that two equal models share.

    Args:
        models: augmentation, network; None is passed over, so that the result of `build_augmentation` fits.
    """
    found: dict[int, keras.random.SeedGenerator] = {}
    for model in models:
        for layer in _layers_of(model):
            for value in vars(layer).values():
                if isinstance(value, keras.random.SeedGenerator):
                    found.setdefault(id(value), value)
    return list(found.values())


def _layers_of(layer: Any) -> Iterator[Any]:
    if layer is None:
        return
    yield layer
    for inner in getattr(layer, "layers", ()):
        yield from _layers_of(inner)


def reseed(generators: Sequence[keras.random.SeedGenerator], seed: Any) -> None:
    """Sets each generator's state to a hash of `seed` and of its place in the list.

    Args:
        generators: of `seed_generators`, in that order.
        seed: whole numbers of 0 to 2**32 - 1, any integer type, a tensor or a sequence: `(seed, global step, rank)`, or
            two that were derived from them. Numbers next to each other give streams that have nothing in common.
    """
    if not generators:
        return
    words = ops.unstack(ops.cast(ops.convert_to_tensor(seed), "int64"))
    states = ops.reshape(ops.arange(2 * len(generators), dtype="int64"), (len(generators), 2))
    for word in words:
        states = _mix(ops.bitwise_xor(_mix(states), ops.bitwise_and(word, WORD)))
    for generator, state in zip(generators, ops.unstack(states, num=len(generators)), strict=True):
        generator.state.assign(state)


def _mix(x: Any) -> Any:
    """A permutation of 32-bit words in which each bit of the input changes half of the output's.

    Both factors are below 2**31, so that the products fit into int64. Source: Thomas Mueller,
    https://stackoverflow.com/a/12996028 (as in the H2 database).
    """
    x = ops.bitwise_and(x + 0x9E3779B9, WORD)  # else 0 stays 0
    for _ in range(2):
        x = ops.bitwise_and(ops.bitwise_xor(ops.right_shift(x, 16), x) * 0x45D9F3B, WORD)
    return ops.bitwise_xor(ops.right_shift(x, 16), x)
