"""How Keras and TensorFlow open, fit and normalise an image: the other side of the comparison.

Owns: pixels as `image_dataset_from_directory` makes them, what precedes and follows a foreign network as asked, and
calling it in batches. Does not own: the networks (`keras_models`, `saved_models`), or how a bundle fits an image
(`images`).
"""

# N = images, B = batch, H = height px, W = width px, C = channels, K = outputs; h, w = height, width of the original

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.errors import ConfigError
from mnist_dist.images.decoder import decode_image, probe_image
from mnist_dist.images.pixels import Pixels, resize_pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.importing.foreign import Asked, Values

BATCH = 16
HALFWAY = 1e-3
"""How close to a half a pixel's value may be rounded either way: two orders of summing differ by less in float32."""
WHOLE_NAME = "Keras with TensorFlow's own JPEG decoder and unrounded pixels"
FILTERS = {"nearest": "nearest", "bilinear": "bilinear", "bicubic": "bicubic", "box": "area", "lanczos": "lanczos3"}


def rounded_pixels(images: Iterable[bytes], spec: ImageSpec) -> list[Values]:
    """The images decoded exactly, fitted by Keras and rounded to 8 bits, as a bundle's model gets them.

    Keras can only stretch or crop by its own rule; anything else is fitted as a bundle fits it. A value halfway between
    two whole numbers may become either: there, the bundle's is taken.

    Returns:
        `float32 [H, W, C]` each, 0-255, whole numbers.
    """
    kept = list(images)
    return [
        _rounded(_fitted(decoded, spec), decode_image(data, spec).pixels)
        for data, decoded in zip(kept, _exactly_decoded(kept, spec), strict=True)
    ]


def tensorflow_pixels(images: Iterable[bytes], spec: ImageSpec) -> list[Values]:
    """The images decoded by TensorFlow (those of its formats) and fitted by Keras, without rounding.

    Returns:
        `float32 [H, W, C]` each.
    """
    return [_fitted(_decoded_by_tensorflow(data, spec), spec) for data in images]


def ask(network: Callable[[Any], Any], pixels: Sequence[Values], asked: Asked, *, batch_size: int = BATCH) -> Values:
    """What a foreign network says, with what was asked before and behind it.

    Args:
        network: `float32 [B, H, W, C]` -> `[B, K]`.
        pixels: `float32 [H, W, C]` each, 0-255.
        asked: normalisation and activation.
        batch_size: B; the last batch is padded with zeros.

    Returns:
        `float32 [N, K]`; of a binary model K is 1.
    """
    outputs = []
    for start in range(0, len(pixels), batch_size):
        batch = np.stack(pixels[start : start + batch_size])
        missing = batch_size - len(batch)
        padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
        values = asked.normalized(padded).astype(np.float32)
        outputs.append(np.asarray(network(values), np.float32)[: len(batch)])
    raw = np.concatenate(outputs)
    if raw.ndim != 2:
        raise ConfigError(f"a classifier's output is [N, K]. Received: {list(raw.shape)} of {asked.output}")
    return asked.activated(raw)


def expects_pixels(rule: str, value: npt.ArrayLike) -> bool | None:
    """Whether the first arithmetic of a network shows that it expects 0-255.

    Args:
        rule: `multiply`, `divide` or `add` (or subtract).
        value: by which, or what.

    Returns:
        None: it changes nothing. False: it is not made for 0-255, for example 2 x - 1.
    """
    size = np.abs(np.asarray(value, np.float64))
    if rule == "add":
        return None if not size.any() else bool(size.max() >= 10)
    if (size == 1).all():
        return None
    return bool(size.max() <= 0.1 if rule == "multiply" else size.min() >= 10)


def is_identity(scale: Sequence[float], offset: Sequence[float]) -> bool:
    """Whether x * scale + offset is x."""
    return set(scale) == {1.0} and set(offset) == {0.0}


def _rounded(values: Values, ours: Pixels) -> Values:
    """Whole numbers, 0-255; those of the bundle where float32 merely ends at the other side of a half."""
    clipped = values.clip(0, 255)
    return np.where(np.abs(clipped - ours) <= 0.5 + HALFWAY, ours, np.rint(clipped)).astype(np.float32)


def _exactly_decoded(images: Iterable[bytes], spec: ImageSpec) -> Iterable[Pixels]:
    for data in images:
        width, height, _ = probe_image(data)
        whole = ImageSpec(height_px=height, width_px=width, channels=spec.channels, quality="exact")
        yield decode_image(data, whole).pixels


def _decoded_by_tensorflow(data: bytes, spec: ImageSpec) -> Pixels:
    try:
        decoded = tf.io.decode_image(data, channels=spec.channels, expand_animations=False)
    except tf.errors.InvalidArgumentError:  # It knows only four formats.
        return next(iter(_exactly_decoded([data], spec)))
    pixels: Pixels = decoded.numpy()
    return pixels


def _fitted(pixels: Pixels, spec: ImageSpec) -> Values:
    """The pixels at the size of `spec`, by Keras' means where it has them."""
    size, method = (spec.height_px, spec.width_px), FILTERS.get(spec.interpolation)
    is_stretched, is_cropped = spec.resize == "stretch" and spec.resize_px is None, spec.resize == "crop"
    if spec.resampling != "keras" or method is None or not (is_stretched or is_cropped):
        return resize_pixels(pixels, replace(spec, quality="exact")).astype(np.float32)
    if is_cropped and not spec.antialias:
        return np.asarray(keras.preprocessing.image.smart_resize(pixels, size, interpolation=method), np.float32)
    if is_cropped:
        return resize_pixels(pixels, spec).astype(np.float32)
    return np.asarray(tf.image.resize(pixels, size, method=method, antialias=spec.antialias), np.float32)
