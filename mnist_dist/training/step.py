"""The compiled work of training, behind one interface for each of Keras' backends.

Owns: the interface, and what both backends compute alike, in `keras.ops`. Does not own: differentiating, compiling and
summing over workers (`tensorflow_step`, `jax_step`). Contract of the train step, for any number of workers:

- the loss is the sum over the global batch, divided by its size, so that the sum of the gradients over the workers is
  the gradient of the whole batch;
- gradients are summed over the workers, and only then clipped (a Keras optimizer would clip before the sum);
- loss, hits and requests to stop are summed in the same exchange, so every worker sees the same numbers and takes the
  same decisions in the same step.

S = steps in one call, b = this worker's slice of the batch, H, W = height and width in px, C = channels,
K = classes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from mnist_dist.config import OptimizerConfig
from mnist_dist.models.augmentation import Preset, reseed, seed_generators
from mnist_dist.training.feed import EvaluationBatch, TrainChunk, World

LOSS, HITS, STOP = range(3)  # columns of a step's report


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What the step needs beyond the network: `class_weights` is `float32 [K]`."""

    batch_size: int
    class_weights: npt.NDArray[np.float32]
    label_smoothing: float = 0.0
    clip_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a train step works on.

    Args:
        network: `float32 [b, H, W, C]` in 0-255, or `float32 [b, D]` features -> logits `float32 [b, K]`.
        optimizer: built for `network.trainable_variables`.
        augmentation: of the images, or None.
        frozen: `float32 [b, H, W, C]` -> the features `[b, D]` that the network takes, always in inference mode. None:
            the network takes the chunks' content directly.
        config: batch size and loss.
    """

    network: keras.Model
    optimizer: keras.optimizers.Optimizer
    config: StepConfig
    augmentation: Preset | None = None
    frozen: keras.Model | None = None


class TrainStep(Protocol):
    """Runs S optimizer steps in one call."""

    def place(self, chunk: TrainChunk, /, *, capacity: int) -> Any:
        """Moves images, labels and random numbers of S steps to the devices. May be called from another thread, while
        earlier steps are taken.

        Args:
            chunk: the steps.
            capacity: the most steps of a chunk; JAX compiles one program for all chunks of the same capacity.
        """

    def __call__(
        self, placed: Any, /, *, rates: npt.NDArray[np.float32], stop: bool = False
    ) -> npt.NDArray[np.float32]:
        """Takes the steps.

        Args:
            placed: from `place`.
            rates: `float32 [S]`, the learning rate of each.
            stop: whether this worker asks to stop after the call.

        Returns:
            `float32 [S, 3]`, equal on all workers: mean loss of the global batch, correct predictions in it, number of
            workers that ask to stop.
        """


class Evaluator(Protocol):
    """Sums loss and hits of a network over a batch of this worker."""

    def __call__(self, batch: EvaluationBatch, /) -> npt.NDArray[np.float64]:
        """`float64 [3]`: cross-entropy (nats), hits, images."""


class Predictor(Protocol):
    """Computes the logits of a network."""

    def __call__(self, batch: EvaluationBatch, /) -> npt.NDArray[np.float32]:
        """`float32 [images, K]` of one batch of this worker, without its padding."""


class Computation(Protocol):
    """A backend of Keras as one of the workers of a run. Every worker must make the same calls in the same order."""

    def scope(self) -> AbstractContextManager[Any]:
        """Models and optimizers must be built within it."""

    def train_step(self, trained: Trained) -> TrainStep:
        """Compiles the train step.

        Raises:
            ConfigError: the workers cannot share batches of this size.
        """

    def evaluator(self, network: keras.Model, *, frozen: keras.Model | None = None) -> Evaluator:
        """Compiles the evaluation; see `Trained` for the arguments."""

    def predictor(self, network: keras.Model) -> Predictor:
        """Compiles the prediction."""

    def sum_over_workers(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """`float64 [n]`, summed over all workers."""


def make_optimizer(config: OptimizerConfig, variables: Sequence[Any]) -> keras.optimizers.Optimizer:
    """An optimizer built for these variables; call it inside `Computation.scope`. The step sets its learning rate."""
    optimizer: keras.optimizers.Optimizer
    if config.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(learning_rate=0.0, momentum=config.momentum)
    elif config.optimizer == "adam":
        optimizer = keras.optimizers.Adam(learning_rate=0.0)
    else:
        optimizer = keras.optimizers.AdamW(learning_rate=0.0, weight_decay=config.weight_decay)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    optimizer.build(variables)
    return optimizer


class Forward:
    """The forward pass of a train step, for a backend to differentiate."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained
        self._generators = seed_generators(trained.network)
        self._class_weights = trained.config.class_weights

    def inputs(self, pixels: Any, draws: Any) -> Any:
        """What the network takes: `float32 [b, H, W, C]` after augmentation, or `float32 [b, D]`."""
        inputs = ops.cast(pixels, "float32")
        if self._trained.augmentation is not None:
            inputs = self._trained.augmentation(inputs, draws)
        return features(inputs, self._trained.frozen)

    def losses_and_logits(self, inputs: Any, labels: Any, seed: Any) -> tuple[Any, Any]:
        """Loss of each image, `float32 [b]`, and the logits `float32 [b, K]`, in training mode."""
        reseed(self._generators, seed)
        logits = self._trained.network(inputs, training=True)
        classes, smoothing = self._class_weights.shape[0], self._trained.config.label_smoothing
        targets = ops.one_hot(labels, classes, dtype="float32") * (1 - smoothing) + smoothing / classes
        losses = ops.categorical_crossentropy(targets, logits, from_logits=True)
        return losses * ops.take(self._class_weights, labels), logits

    def clipped(self, gradients: Sequence[Any]) -> list[Any]:
        """The gradients, scaled down to `clip_norm` where their global norm is larger.

        Source: Pascanu et al. 2013, On the difficulty of training recurrent neural networks, algorithm 1.
        """
        clip = self._trained.config.clip_norm
        if clip is None:
            return list(gradients)
        norm = ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients))
        scale = clip / ops.maximum(norm, clip)
        return [gradient * scale for gradient in gradients]


def hits_of(logits: Any, labels: Any) -> Any:
    """`float32 [b]`: 1 where the top class is the label."""
    return ops.cast(ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), labels), "float32")


def losses_and_hits(network: keras.Model, frozen: keras.Model | None, pixels: Any, labels: Any) -> Any:
    """Cross-entropy (nats) and hits of each image in inference mode, `float32 [2, b]`."""
    logits = network(features(ops.cast(pixels, "float32"), frozen), training=False)
    losses = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return ops.stack([losses, hits_of(logits, labels)])


def weighted_sums(per_image: npt.NDArray[np.float32], weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """`float64 [3]`: the sums of losses, hits and images of a batch, whose padding has weight 0."""
    columns = np.concatenate([per_image, np.ones((1, len(weights)), np.float32)]).astype(np.float64)
    return np.asarray(columns @ weights.astype(np.float64))


def features(inputs: Any, frozen: keras.Model | None) -> Any:
    """The inputs of the network: the features of a frozen backbone where there is one."""
    return inputs if frozen is None else ops.cast(frozen(inputs, training=False), "float32")


def slowest_worker_s(computation: Computation, seconds: float, *, world: World) -> float:
    """The largest `seconds` of any worker, returned on all of them."""
    durations = np.zeros(world.workers)
    durations[world.rank] = seconds
    return float(computation.sum_over_workers(durations).max())
