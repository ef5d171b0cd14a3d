"""A bundle's model as the peers use it: loaded by plain Keras, called as a `tf.function`."""

# B = batch, H = height px, W = width px, C = channels, K = classes

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.peers.answers import Answers, answers_of
from benchmarks.peers.task import Task


def load_model(task: Task) -> Any:
    """The model as Keras loads it."""
    return keras.saving.load_model(task.model_file, compile=False)


class Model:
    """The model as a `tf.function`."""

    def __init__(self, task: Task) -> None:
        model = load_model(task)
        self._class_names = task.info()["class_names"]
        self._shape = model.input_shape[1:]
        # The batch size is variable because some peers send smaller batches; a fixed one would not be faster.
        signature = [tf.TensorSpec([None, *self._shape], tf.uint8)]
        self._step = tf.function(
            lambda pixels: model(pixels, training=False), input_signature=signature, jit_compile=False
        )

    def noise(self, images: int) -> Any:
        """A ready batch, `uint8 [B, H, W, C]`."""
        pixels = np.random.default_rng(0).integers(0, 256, (images, *self._shape), dtype=np.uint8)
        return tf.convert_to_tensor(pixels)

    def probabilities(self, pixels: Any) -> Any:
        """Probabilities `float32 [B, K]` for a tensor or an array `uint8 [B, H, W, C]`; waits for them."""
        return self._step(tf.convert_to_tensor(pixels)).numpy()

    def __call__(self, pixels: Any) -> Answers:
        """Classes and confidences for a tensor or an array `uint8 [B, H, W, C]`."""
        return answers_of(self.probabilities(pixels), self._class_names)
