"""The networks of `benchmarks race` for its peers: the same layers and weights as ours, trained by Keras' own `fit`.

Owns: the data, and a compiled model for one configuration. Does not own: which configurations are tried.

A peer is started as `python -m benchmarks.peers.race_... ARGUMENT`, the argument a JSON object: `arrays` (an .npz of
pixels, labels, val_pixels, val_labels, test_pixels, test_labels), `scratch`, `seconds`, `seed`, `trial_epochs`,
`backbones` (as in `search_config.BackboneSpace`) and the other values of the space. It prints `{"seconds": ...,
"trials": ..., "curve": [[s, best validation accuracy so far], ...], "val_accuracy": ..., "test_accuracy": ...}` last.
"""

import json
import sys
import time
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from mnist_dist.config import FitConfig, ModelConfig
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.augmentation import make_preset
from mnist_dist.models.classifier import build_classifier, set_trainable

RACE: dict[str, Any] = json.loads(sys.argv[1]) if sys.argv[1:2] and sys.argv[1].startswith("{") else {}
"""The argument; empty in a worker of Ray, whose arguments are Ray's."""


class Arrays:
    """The images of the race."""

    def __init__(self) -> None:
        with np.load(RACE["arrays"]) as arrays:
            self.train = (arrays["pixels"].astype(np.float32), arrays["labels"])
            self.validation = (arrays["val_pixels"].astype(np.float32), arrays["val_labels"])
            self.test = (arrays["test_pixels"].astype(np.float32), arrays["test_labels"])

    @property
    def spec(self) -> ImageSpec:
        _, height, width, channels = self.train[0].shape
        return ImageSpec(height_px=height, width_px=width, channels=channels)

    def batches(self, *, batch_size: int, augmentation: str, seed: int) -> tf.data.Dataset:
        """The training images in a new order each epoch, augmented if asked for."""
        images = tf.data.Dataset.from_tensor_slices(self.train).shuffle(len(self.train[0]), seed=seed).batch(batch_size)
        augment = make_preset(FitConfig(augmentation=augmentation))  # type: ignore[arg-type]
        if augment is None:
            return images
        return images.map(lambda x, y: (augment(x, tf.random.uniform((tf.shape(x)[0], augment.draws), -1, 1)), y))


def compiled(choice: dict[str, Any], arrays: Arrays) -> keras.Model:
    """The network of a configuration: `backbone`, `image_size_px`, `pooling`, `hidden_units`, `dropout`, `optimizer`,
    `learning_rate`, `weight_decay`, `label_smoothing`."""
    space = next(space for space in RACE["backbones"] if space["backbone"] == choice["backbone"])
    config = ModelConfig(
        backbone=choice["backbone"],
        weights=space["weights"],
        image_size_px=choice["image_size_px"],
        pooling=choice["pooling"],
        hidden_units=choice["hidden_units"],
        dropout=choice["dropout"],
    )
    classifier = build_classifier(config, spec=arrays.spec, num_classes=10, seed=RACE["seed"])
    set_trainable(classifier, "all" if space["trained"] == ["all"] else "head")
    one_hot = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=choice["label_smoothing"])
    classifier.network.compile(
        optimizer=_optimizer(choice),
        loss=lambda labels, logits: one_hot(tf.one_hot(tf.cast(tf.reshape(labels, [-1]), tf.int32), 10), logits),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    return classifier.network


def _optimizer(choice: dict[str, Any]) -> keras.optimizers.Optimizer:
    rate = choice["learning_rate"]
    if choice["optimizer"] == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=choice["weight_decay"])
    return keras.optimizers.Adam(rate) if choice["optimizer"] == "adam" else keras.optimizers.SGD(rate, momentum=0.9)


class Curve(keras.callbacks.Callback):
    """The best validation accuracy so far over time; KerasTuner copies it for each trial, but not the points."""

    points: ClassVar[list[tuple[float, float]]] = []

    def __init__(self, began: float) -> None:
        super().__init__()
        self.began = began

    @property
    def is_over(self) -> bool:
        return bool(time.time() - self.began > RACE["seconds"])

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        accuracy = (logs or {})["val_accuracy"]
        if not self.points or accuracy > self.points[-1][1]:
            self.points.append((time.time() - self.began, accuracy))


def result(model: keras.Model, arrays: Arrays, *, began: float, trials: int, curve: Any) -> dict[str, Any]:
    """Tests the winner, once."""
    seconds = time.time() - began
    _, validation = model.evaluate(*arrays.validation, batch_size=256, verbose=0)
    _, test = model.evaluate(*arrays.test, batch_size=256, verbose=0)
    return {"seconds": seconds, "trials": trials, "curve": curve, "val_accuracy": validation, "test_accuracy": test}
