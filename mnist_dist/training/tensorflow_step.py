"""The compiled work of training on TensorFlow: `tf.function`, and `tf.distribute` over the workers (see `step`)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist import processor
from mnist_dist.config import require
from mnist_dist.training.feed import EvaluationBatch, StepImages, TrainChunk, World
from mnist_dist.training.step import (
    DRAWS_OF_PART,
    DeviceMemory,
    Forward,
    Trained,
    features,
    losses_and_hits,
    weighted_sums,
)

DRAWS_OF_RANK = 2**16
"""More draws than a generator makes in one step; the ranks' states are this far apart."""


class TensorflowComputation:
    """See `step.Computation`. For several workers TF_CONFIG must be set."""

    def __init__(self, world: World) -> None:
        self._world = world
        several = world.workers > 1
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy() if several else tf.distribute.get_strategy()

    def scope(self) -> AbstractContextManager[Any]:
        return self.strategy.scope()  # type: ignore[no-any-return]

    def train_step(self, trained: Trained) -> "TensorflowTrainStep":
        return TensorflowTrainStep(self.strategy, trained, rank=self._world.rank)

    def evaluator(
        self, network: keras.Model, *, frozen: keras.Model | None = None
    ) -> Callable[[EvaluationBatch], npt.NDArray[np.float64]]:
        def per_image(pixels: Any, labels: Any) -> Any:
            return self.strategy.run(lambda *args: losses_and_hits(network, frozen, *args), args=(pixels, labels))

        call = _compiled(per_image)
        return lambda batch: weighted_sums(np.asarray(call(batch.pixels, batch.labels)), batch.weights)

    def predictor(
        self, network: keras.Model, *, frozen: keras.Model | None = None
    ) -> Callable[[EvaluationBatch], npt.NDArray[np.float32]]:
        def logits(pixels: Any) -> Any:
            return self.strategy.run(
                lambda x: network(features(tf.cast(x, tf.float32), frozen), training=False), args=(pixels,)
            )

        call = _compiled(logits)
        return lambda batch: np.asarray(call(batch.pixels))[batch.weights > 0]

    def sum_over_workers(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        def total(local: Any) -> Any:
            placed = tf.identity(local)  # places it on a device: the reduction refuses an argument, which has none
            return tf.distribute.get_replica_context().all_reduce("SUM", placed)

        summed = _compiled(lambda local: self.strategy.run(total, args=(local,)))
        return np.asarray(summed(tf.constant(values, tf.float64)))

    def device_memory(self) -> DeviceMemory | None:
        if not tf.config.list_logical_devices("GPU"):
            return None
        total = processor.gpu_memory_bytes()  # TensorFlow does not tell it.
        require(total is not None, "nvidia-smi must tell the memory of the GPU", gpu_memory=total)
        peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
        return DeviceMemory(peak_bytes=int(peak), total_bytes=total or 0)


class TensorflowTrainStep:
    """See `step.TrainStep`."""

    def __init__(self, strategy: tf.distribute.Strategy, trained: Trained, *, rank: int) -> None:
        self._strategy, self._trained, self._rank = strategy, trained, rank
        self._forward = Forward(trained)
        self._variables = list(trained.network.trainable_variables)
        self._call = _compiled(self._steps)

    def place(self, chunk: TrainChunk, /, *, capacity: int) -> tuple[Any, ...]:
        return tf.nest.map_structure(tf.constant, (chunk.images, chunk.seeds))  # type: ignore[no-any-return]

    def __call__(
        self, placed: tuple[Any, ...], /, *, rates: npt.NDArray[np.float32], stop: bool = False
    ) -> npt.NDArray[np.float32]:
        return np.asarray(self._call(*placed, rates, np.float32(stop)))

    def _steps(self, images: StepImages, seeds: Any, rates: Any, stop: Any) -> Any:
        count, optimizer = tf.shape(rates)[0], self._trained.optimizer

        def take(index: Any, reports: Any) -> tuple[Any, Any]:
            of_step = tf.nest.map_structure(lambda each: each[index], images)
            gradients, report = self._strategy.run(self._forward_backward, args=(of_step, seeds[index], stop))
            optimizer.learning_rate.assign(rates[index])
            optimizer.apply_gradients(zip(self._forward.clipped(gradients), self._variables, strict=True))
            return index + 1, reports.write(index, report)

        begin = (tf.constant(0), tf.TensorArray(tf.float32, size=count, element_shape=[3]))
        _, reports = tf.while_loop(lambda index, _: index < count, take, begin)
        return reports.stack()

    def _forward_backward(self, images: StepImages, seed: Any, stop: Any) -> tuple[list[Any], Any]:
        seed = tf.cast(seed, tf.int64) + tf.constant([0, self._rank * DRAWS_OF_RANK], tf.int64)
        gradients, loss_and_hits = self._gradients(images, seed)
        report = tf.concat([loss_and_hits, [stop]], axis=0)
        *gradients, report = tf.distribute.get_replica_context().all_reduce("SUM", [*gradients, report])
        return gradients, report

    def _gradients(self, images: StepImages, seed: Any) -> tuple[list[Any], Any]:
        """Gradients, and loss and hits `float32 [2]`, of this worker's slice, computed in parts."""
        parts = self._trained.config.parts
        if parts == 1:
            return self._gradients_of_part(images, seed)

        def add(part: Any, sums: list[Any]) -> tuple[Any, list[Any]]:
            of_part = tf.nest.map_structure(lambda each: _part(each, part, parts), images)
            own_seed = seed + tf.stack([tf.constant(0, tf.int64), tf.cast(part, tf.int64) * DRAWS_OF_PART])
            gradients, loss_and_hits = self._gradients_of_part(of_part, own_seed)
            return part + 1, [total + each for total, each in zip(sums, [*gradients, loss_and_hits], strict=True)]

        zeros = [tf.zeros(variable.shape, variable.dtype) for variable in self._variables]
        begin = (tf.constant(0), [*zeros, tf.zeros([2])])
        # One part after the other, since memory is what they are to save.
        _, (*gradients, loss_and_hits) = tf.while_loop(lambda part, _: part < parts, add, begin, parallel_iterations=1)
        return gradients, loss_and_hits

    def _gradients_of_part(self, images: StepImages, seed: Any) -> tuple[list[Any], Any]:
        batch = self._forward.examples(images)
        with tf.GradientTape() as tape:
            losses, logits = self._forward.losses_and_logits(batch, seed)
            loss = tf.reduce_sum(losses) / self._trained.config.batch_size
        gradients = tape.gradient(loss, self._variables)
        return gradients, tf.stack([loss, tf.reduce_sum(self._forward.hits(batch, logits))])


def _part(images: Any, part: Any, parts: int) -> Any:
    """`[b, ...]` -> `[b / parts, ...]`."""
    size = tf.shape(images)[0] // parts
    return images[part * size : (part + 1) * size]


def _compiled(call: Callable[..., Any]) -> Any:
    """Compiles without autograph: there is nothing to convert, and its temporary files outlive a killed worker."""
    return tf.function(call, jit_compile=False, reduce_retracing=True, autograph=False)
