"""The compiled work of training, behind one interface for each of Keras' backends.

Owns: the interface, and what both backends compute alike, in `keras.ops`. Does not own: differentiating, compiling and
summing over workers (`tensorflow_step`, `jax_step`). Contract of the train step, for any number of workers:

- the loss is the sum over the global batch, divided by its size, so that the sum of the gradients over the workers is
  the gradient of the whole batch;
- gradients are summed over the workers, and only then clipped (a Keras optimizer would clip before the sum);
- a slice that is computed in parts gives the sum of their gradients, which is the same without BatchNorm;
- loss, hits and requests to stop are summed in the same exchange, so every worker sees the same numbers and takes the
  same decisions in the same step.

S = steps in one call, b = this worker's slice of the batch, H, W = height and width in px, C = channels,
K = classes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from mnist_dist.config import OptimizerConfig
from mnist_dist.models.augmentation import Preset, reseed, seed_generators
from mnist_dist.models.mixing import mixed
from mnist_dist.training.feed import EvaluationBatch, Examples, StepImages, TrainChunk, World
from mnist_dist.training.objective import AnyClasses, Objective, OneClass

LOSS, HITS, STOP = range(3)  # columns of a step's report
DRAWS_OF_PART = 2**6
"""More draws than a generator makes in a part of a step; the parts' states are this far apart."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What the step needs beyond the network: `class_weights` is `float32 [K]`."""

    batch_size: int
    class_weights: npt.NDArray[np.float32]
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    parts: int = 1
    """A worker's slice of a batch is computed in as many equal parts, one after the other."""
    members: npt.NDArray[np.bool_] | None = None
    """Where images have any number of classes: `bool [L, K]`, whether a class is in a set; a label is the number of a
    set."""

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        if self.members is None:
            return OneClass(self.class_weights, smoothing=self.label_smoothing)
        return AnyClasses(self.members, self.class_weights, smoothing=self.label_smoothing)


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


class DeviceMemory(NamedTuple):
    """Memory of a GPU, of several the fullest, bytes."""

    peak_bytes: int
    total_bytes: int


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

    def predictor(self, network: keras.Model, *, frozen: keras.Model | None = None) -> Predictor:
        """Compiles the prediction; see `Trained` for the arguments."""

    def sum_over_workers(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """`float64 [n]`, summed over all workers."""

    def device_memory(self) -> DeviceMemory | None:
        """What this worker has used of its GPUs, at the peak. None: it computes on CPUs.

        Raises:
            ConfigError: their memory is not known.
        """


def make_optimizer(
    config: OptimizerConfig, variables: Sequence[Any], *, levels: Sequence[int] = ()
) -> keras.optimizers.Optimizer:
    """An optimizer built for these variables; call it inside `Computation.scope`. The step sets its learning rate.

    Args:
        config: which, and its parameters. With `ema_decay` it keeps an average of the variables (Polyak and Juditsky
            1992, Acceleration of stochastic approximation by averaging; as an exponential one in Szegedy et al. 2016,
            arXiv:1512.00567, section 8), which `finalize_variable_values` puts in their place.
        variables: what is trained.
        levels: of each variable, how often `layer_decay` reduces its learning rate. Empty: never.
    """
    options: dict[str, Any] = {"learning_rate": 0.0}
    if config.ema_decay is not None:
        options |= {"use_ema": True, "ema_momentum": config.ema_decay}
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    elif config.optimizer == "adamw":
        options["weight_decay"] = config.weight_decay
    kind: Any = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW}[
        config.optimizer
    ]
    if levels and config.layer_decay < 1:
        kind = type(f"Layerwise{kind.__name__}", (_Layerwise, kind), {})
    optimizer: keras.optimizers.Optimizer = kind(**options)
    optimizer.rates = [config.layer_decay**level for level in levels]
    if config.optimizer == "adamw":
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    optimizer.build(variables)
    return optimizer


class _Layerwise:
    """A Keras optimizer whose variables have learning rates of their own, as multiples (`rates`) of the optimizer's.

    Source: layer-wise learning-rate decay as in Clark et al. 2020, ELECTRA, arXiv:2003.10555, appendix A, and Bao et
    al. 2022, BEiT, arXiv:2106.08254, where decoupled weight decay follows the variable's own rate, too.
    """

    def _apply_weight_decay(self: Any, variables: Sequence[Any]) -> None:
        """Not for all variables at once: see `update_step`."""

    def update_step(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
        rate = learning_rate * self.rates[self._get_variable_index(variable)]
        if self.weight_decay is not None and self._use_weight_decay(variable):
            self.assign_sub(variable, ops.cast(rate * self.weight_decay, variable.dtype) * variable)
        super().update_step(gradient, variable, rate)  # type: ignore[misc]


class Batch(NamedTuple):
    """What a network is trained on in one step, or a part of it.

    `inputs` are `float32 [b, H, W, C]` or features `[b, D]`, `targets` the probabilities to predict `[b, K]`, `weights`
    how much each image counts in the loss `[b]`, `labels` the class (or set of classes) that a hit predicts
    `int32 [b]`: of a mixed image that of its larger share.
    """

    inputs: Any
    targets: Any
    weights: Any
    labels: Any


class Forward:
    """The forward pass of a train step, for a backend to differentiate."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained
        self._generators = seed_generators(trained.network)
        self._objective = trained.config.objective

    def examples(self, images: StepImages) -> "Batch":
        """What the network is trained on, from images: augmented, mixed, and, where the backbone is frozen, as
        features."""
        own, partners = images.own, images.partners
        inputs, (targets, weights) = self._augmented(own), self._objective.targets(own.labels)
        labels = own.labels
        if partners:
            inputs, shares = mixed(inputs, self._augmented(partners), images.mixing)
            others, other_weights = self._objective.targets(partners.labels)
            of_own, of_others = shares * weights, (1 - shares) * other_weights
            weights = of_own + of_others
            targets = (targets * of_own[:, None] + others * of_others[:, None]) / weights[:, None]
            labels = ops.where(shares >= 0.5, labels, partners.labels)
        inputs = features(inputs, self._trained.frozen)
        return Batch(inputs=inputs, targets=targets, weights=weights, labels=labels)

    def _augmented(self, images: Examples) -> Any:
        pixels = ops.cast(images.pixels, "float32")
        augmentation = self._trained.augmentation
        return pixels if augmentation is None else augmentation(pixels, images.draws)

    def losses_and_logits(self, batch: "Batch", seed: Any) -> tuple[Any, Any]:
        """Loss of each image, `float32 [b]`, and the logits `float32 [b, K]`, in training mode."""
        reseed(self._generators, seed)
        logits = self._trained.network(batch.inputs, training=True)
        return self._objective.losses(batch.targets, logits) * batch.weights, logits

    def hits(self, batch: "Batch", logits: Any) -> Any:
        """`float32 [b]`: 1 where an image is predicted rightly."""
        return self._objective.hits(logits, batch.labels)

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


def losses_and_hits(network: keras.Model, frozen: keras.Model | None, pixels: Any, labels: Any) -> Any:
    """Cross-entropy (nats) and hits of each image in inference mode, `float32 [2, b]`; an image has one class."""
    logits = network(features(ops.cast(pixels, "float32"), frozen), training=False)
    losses = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    hits = ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), labels)
    return ops.stack([losses, ops.cast(hits, "float32")])


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
