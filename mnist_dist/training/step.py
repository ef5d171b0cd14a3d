"""The compiled work of training: the train step, the evaluation step, and sums over the workers.

The only module of `training` that computes with TensorFlow itself (`precision` only asks it what the GPU can do).
Contract of the train step, for any number of workers:

- the loss is the sum over this worker's slice, divided by the *global* batch, so that the sum of the gradients over the
  workers is the gradient of the whole batch;
- gradients are summed over the workers, and only then clipped (a Keras optimizer would clip before the sum);
- loss, hits and requests to stop are summed in the same exchange, so every worker sees the same numbers and takes the
  same decisions in the same step.

S = steps in one call, b = this worker's slice of the batch, H, W = height and width in px, C = channels,
K = classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.config import OptimizerConfig
from mnist_dist.models.augmentation import reseed, seed_generators
from mnist_dist.training.feed import EvaluationBatch, TrainChunk, World

Strategy = tf.distribute.Strategy
LOSS, HITS, STOP = range(3)  # columns of a step's report


def make_strategy(workers: int) -> tf.distribute.Strategy:
    """The default strategy for one worker; synchronous all-reduce for several (TF_CONFIG must be set)."""
    return tf.distribute.MultiWorkerMirroredStrategy() if workers > 1 else tf.distribute.get_strategy()


def make_optimizer(config: OptimizerConfig, variables: Sequence[Any]) -> keras.optimizers.Optimizer:
    """An optimizer built for these variables; call it inside `strategy.scope()`. The step sets its learning rate."""
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


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What the step needs beyond the network: `class_weights` is `float32 [K]`."""

    batch_size: int
    class_weights: npt.NDArray[np.float32]
    label_smoothing: float = 0.0
    clip_norm: float | None = None


class TrainStep:
    """Runs S optimizer steps in one call.

    Args:
        strategy: from `make_strategy`; the network and the optimizer were built in its scope.
        network: `float32 [b, H, W, C]` in 0-255, or `float32 [b, D]` features -> logits `float32 [b, K]`.
        optimizer: built for `network.trainable_variables`.
        augmentation: `float32 [b, H, W, C]` -> the same, or None.
        frozen: `float32 [b, H, W, C]` -> the features `[b, D]` that the network takes, always in inference mode. None:
            the network takes the chunks' content directly.
        config: batch size and loss.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        *,
        network: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        augmentation: keras.Model | None,
        config: StepConfig,
        frozen: keras.Model | None = None,
    ) -> None:
        self._strategy = strategy
        self._network = network
        self._frozen = frozen
        self._optimizer = optimizer
        self._augmentation = augmentation
        self._config = config
        self._variables = list(network.trainable_variables)
        models = [network] if augmentation is None else [network, augmentation]
        self._generators = seed_generators(*models)
        self._class_weights = tf.constant(config.class_weights)
        self._call = _compiled(self._steps)

    def __call__(
        self, chunk: TrainChunk, *, rates: npt.NDArray[np.float32], stop: bool = False
    ) -> npt.NDArray[np.float32]:
        """Takes the chunk's steps.

        Args:
            chunk: images, labels and seeds of S steps.
            rates: `float32 [S]`, the learning rate of each.
            stop: whether this worker asks to stop after the call.

        Returns:
            `float32 [S, 3]`, equal on all workers: mean loss of the global batch, correct predictions in it, number of
            workers that ask to stop.
        """
        wish = np.float32(stop)
        reports = self._call(chunk.pixels, chunk.labels, chunk.seeds, rates, wish)
        return np.asarray(reports)

    def _steps(self, pixels: Any, labels: Any, seeds: Any, rates: Any, stop: Any) -> Any:
        count = tf.shape(rates)[0]

        def take(index: Any, reports: Any) -> tuple[Any, Any]:
            step = (pixels[index], labels[index], seeds[index], stop)
            gradients, report = self._strategy.run(self._forward_backward, args=step)
            self._optimizer.learning_rate.assign(rates[index])
            self._optimizer.apply_gradients(zip(self._clip(gradients), self._variables, strict=True))
            return index + 1, reports.write(index, report)

        begin = (tf.constant(0), tf.TensorArray(tf.float32, size=count, element_shape=[3]))
        _, reports = tf.while_loop(lambda index, _: index < count, take, begin)
        return reports.stack()

    def _forward_backward(self, pixels: Any, labels: Any, seed: Any, stop: Any) -> tuple[list[Any], Any]:
        reseed(self._generators, seed)
        inputs = tf.cast(pixels, tf.float32)
        if self._augmentation is not None:
            inputs = self._augmentation(inputs, training=True)
        inputs = _features(inputs, self._frozen)
        with tf.GradientTape() as tape:
            logits = self._network(inputs, training=True)
            loss = tf.reduce_sum(self._losses(labels, logits)) / self._config.batch_size
        gradients = tape.gradient(loss, self._variables)
        hits = tf.reduce_sum(tf.cast(tf.equal(tf.argmax(logits, -1, tf.int32), labels), tf.float32))
        report = tf.stack([loss, hits, stop])
        *gradients, report = tf.distribute.get_replica_context().all_reduce("SUM", [*gradients, report])
        return gradients, report

    def _losses(self, labels: Any, logits: Any) -> Any:
        classes = self._class_weights.shape[0]
        smoothing = self._config.label_smoothing
        targets = tf.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
        losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
        return losses * tf.gather(self._class_weights, labels)

    def _clip(self, gradients: list[Any]) -> list[Any]:
        if self._config.clip_norm is None:
            return gradients
        return list(tf.clip_by_global_norm(gradients, self._config.clip_norm)[0])


class Evaluator:
    """Sums of loss and hits of a network over a split, exact over all workers. Arguments as for `TrainStep`."""

    def __init__(
        self, strategy: tf.distribute.Strategy, network: keras.Model, *, frozen: keras.Model | None = None
    ) -> None:
        self._strategy = strategy
        self._network = network
        self._frozen = frozen
        self._call = _compiled(self._step)

    def __call__(self, batch: EvaluationBatch) -> npt.NDArray[np.float64]:
        """Returns the sums `float64 [3]` of one batch of this worker: cross-entropy (nats), hits, images."""
        return np.asarray(self._call(batch.pixels, batch.labels, batch.weights))

    def _step(self, pixels: Any, labels: Any, weights: Any) -> Any:
        return self._strategy.run(self._sums, args=(pixels, labels, weights))

    def _sums(self, pixels: Any, labels: Any, weights: Any) -> Any:
        inputs = _features(tf.cast(pixels, tf.float32), self._frozen)
        logits = self._network(inputs, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        hits = tf.cast(tf.equal(tf.argmax(logits, -1, tf.int32), labels), tf.float32)
        columns = tf.cast(tf.stack([losses, hits, tf.ones_like(losses)]), tf.float64)
        return tf.reduce_sum(columns * tf.cast(weights, tf.float64), axis=1)


class Predictor:
    """Computes the logits of a network."""

    def __init__(self, strategy: tf.distribute.Strategy, network: keras.Model) -> None:
        self._strategy, self._network = strategy, network
        self._call = _compiled(lambda pixels: strategy.run(self._logits, args=(pixels,)))

    def __call__(self, batch: EvaluationBatch) -> npt.NDArray[np.float32]:
        """`float32 [images, K]` of one batch of this worker, without its padding."""
        return np.asarray(self._call(batch.pixels))[batch.weights > 0]

    def _logits(self, pixels: Any) -> Any:
        return self._network(tf.cast(pixels, tf.float32), training=False)


def _compiled(call: Callable[..., Any]) -> Any:
    """Compiles without autograph: there is nothing to convert, and its temporary files outlive a killed worker."""
    return tf.function(call, jit_compile=False, reduce_retracing=True, autograph=False)


def _features(inputs: Any, frozen: keras.Model | None) -> Any:
    return inputs if frozen is None else tf.cast(frozen(inputs, training=False), tf.float32)


def sum_over_workers(strategy: tf.distribute.Strategy, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`float64 [n]` summed over all workers; every worker must call this in the same order."""

    def total(local: Any) -> Any:
        placed = tf.identity(local)  # places it on a device: the reduction refuses an argument, which has none
        return tf.distribute.get_replica_context().all_reduce("SUM", placed)

    summed = _compiled(lambda local: strategy.run(total, args=(local,)))
    return np.asarray(summed(tf.constant(values, tf.float64)))


def slowest_worker_s(strategy: tf.distribute.Strategy, seconds: float, *, world: World) -> float:
    """The largest `seconds` of any worker, returned on all of them."""
    durations = np.zeros(world.workers)
    durations[world.rank] = seconds
    return float(sum_over_workers(strategy, durations).max())
