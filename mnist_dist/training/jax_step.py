"""The compiled work of training on JAX: one program over all devices of all workers (see `step`).

The devices form a mesh with one axis. Weights lie on every device, and each device takes an equal part of the global
batch; XLA adds the sums over the devices that losses, gradients and BatchNorm need. Parts of unequal size are padded
with images of weight 0, which BatchNorm would count: there, the batch must divide evenly.

Evaluation and prediction run on the worker's own devices alone, since the workers' shares may differ in batches.
"""

# S = steps in one call, B = global batch with its padding, b = this worker's part of it

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import keras
import numpy as np
import numpy.typing as npt
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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

BATCH = "batch"
Values = list[Any]


class Devices:
    """Devices that share a batch.

    Args:
        devices: of one worker or of all, in the order of the workers.
    """

    def __init__(self, devices: Sequence[Any]) -> None:
        self.mesh = Mesh(np.array(devices), (BATCH,))
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.count = len(devices)

    def split(self, axis: int) -> NamedSharding:
        """Along this axis, each device has an equal part."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, BATCH))

    def on_all(self, value: Any) -> Any:
        """The value on every device; nothing is copied where it lies there already."""
        if isinstance(value, jax.Array):
            if value.sharding == self.replicated:
                return value
            if isinstance(value.sharding, NamedSharding) and value.is_fully_replicated:
                return self._from_other_mesh(value)
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, self.replicated, lambda index: host[index])

    def _from_other_mesh(self, value: jax.Array) -> jax.Array:
        """A value that lies on all devices of the run, as one of this worker's alone, or the other way round: each
        worker has its own copies of it."""
        copies = [shard.data for shard in value.addressable_shards]
        return jax.make_array_from_single_device_arrays(value.shape, self.replicated, copies)

    def shared(self, own: npt.NDArray[Any], *, axis: int) -> Any:
        """The rows of all workers, along an axis, from this worker's own."""
        return jax.make_array_from_process_local_data(self.split(axis), own)


class JaxComputation:
    """See `step.Computation`. For several workers `jax.distributed` must be initialised."""

    def __init__(self, world: World) -> None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        counts = Counter(device.process_index for device in devices)
        require(
            len(counts) == world.workers and len(set(counts.values())) == 1,
            f"each of the {world.workers} workers must have the same number of devices",
            devices=dict(counts),
        )
        self._world = world
        self._all, self._own = Devices(devices), Devices(jax.local_devices())

    def scope(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def train_step(self, trained: Trained) -> "JaxTrainStep":
        return JaxTrainStep(trained, world=self._world, devices=self._all, own_devices=self._own.count)

    def evaluator(
        self, network: keras.Model, *, frozen: keras.Model | None = None
    ) -> Callable[[EvaluationBatch], npt.NDArray[np.float64]]:
        models = [network] if frozen is None else [network, frozen]
        call = self._on_own(models, lambda pixels, labels: losses_and_hits(network, frozen, pixels, labels))
        return lambda batch: weighted_sums(call(batch.pixels, batch.labels), batch.weights)

    def predictor(
        self, network: keras.Model, *, frozen: keras.Model | None = None
    ) -> Callable[[EvaluationBatch], npt.NDArray[np.float32]]:
        def logits(pixels: Any) -> Any:
            return network(features(pixels.astype(jnp.float32), frozen), training=False).T

        call = self._on_own([network] if frozen is None else [network, frozen], logits)
        return lambda batch: call(batch.pixels).T[batch.weights > 0]

    def sum_over_workers(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self._world.workers == 1:
            return values
        words = np.ascontiguousarray(values).view(np.uint32)  # JAX would round float64 to float32
        of_all = np.ascontiguousarray(multihost_utils.process_allgather(words))
        return np.asarray(of_all.view(np.float64).sum(axis=0))

    def device_memory(self) -> DeviceMemory | None:
        known = [device.memory_stats() for device in jax.local_devices()]
        if any(stats is None for stats in known):  # CPUs tell nothing.
            return None
        return DeviceMemory(
            peak_bytes=max(stats["peak_bytes_in_use"] for stats in known),
            total_bytes=min(stats["bytes_limit"] for stats in known),
        )

    def _on_own(self, models: Sequence[keras.Model], call: Callable[..., Any]) -> Callable[..., npt.NDArray[Any]]:
        """Compiles a call of the models for this worker's devices: arrays `[b, ...]` -> `[..., b]`."""
        variables = [variable for model in models for variable in model.variables]

        @jax.jit  # type: ignore[untyped-decorator]
        def compiled(values: Values, *arrays: Any) -> Any:
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                return call(*arrays)

        def run(*arrays: npt.NDArray[Any]) -> npt.NDArray[Any]:
            size = len(arrays[0])
            rows = -(-size // self._own.count) * self._own.count
            padded = [_padded(array, rows, axis=0) for array in arrays]
            values = [self._own.on_all(variable.value) for variable in variables]
            for variable, value in zip(variables, values, strict=True):
                if not isinstance(variable.value.sharding, NamedSharding):
                    variable.assign(value)  # Set by Keras, on one device: it need not be copied again.
            outputs = compiled(values, *(jax.device_put(array, self._own.split(0)) for array in padded))
            return np.asarray(outputs)[..., :size]

        return run


class JaxTrainStep:
    """See `step.TrainStep`.

    Args:
        trained: what it works on.
        world: the worker.
        devices: of all workers.
        own_devices: how many each worker has.
        loops: take the steps of a call in one program. None: not on CPUs, where XLA computes convolutions within a loop
            on one core, and several times as slowly (JAX 0.10).
    """

    def __init__(
        self, trained: Trained, *, world: World, devices: Devices, own_devices: int, loops: bool | None = None
    ) -> None:
        self._trained, self._world, self._devices, self._own_devices = trained, world, devices, own_devices
        self._forward = Forward(trained)
        network, optimizer, batch_size = trained.network, trained.optimizer, trained.config.batch_size
        largest = -(-batch_size // world.workers)
        together = own_devices * trained.config.parts
        self._rows = -(-largest // together) * together
        require(
            self._rows * world.workers == batch_size or not any(_counts_padding(network)),
            f"batch_size must be a multiple of {world.workers * together}, the number of devices"
            f"{' times accumulate' if trained.config.parts > 1 else ''}, for a network with BatchNorm on JAX",
            batch_size=batch_size,
        )
        frozen = [] if trained.frozen is None else trained.frozen.variables
        self._trainable = list(network.trainable_variables)
        self._others = _without_duplicates([*network.non_trainable_variables, *frozen], without=self._trainable)
        self._of_optimizer = list(optimizer.variables)
        self._rate = next(i for i, each in enumerate(self._of_optimizer) if each is optimizer.learning_rate)
        self._loops = devices.mesh.devices.flat[0].platform != "cpu" if loops is None else loops
        function = self._steps if self._loops else self._step_of
        self._call = jax.jit(function, donate_argnums=0, out_shardings=devices.replicated)

    def place(self, chunk: TrainChunk, /, *, capacity: int) -> tuple[Any, ...]:
        count, images = chunk.images.own.labels.shape
        weights = np.pad(np.ones((count, images), np.float32), ((0, 0), (0, self._rows - images)))

        def shared(own: npt.NDArray[Any]) -> Any:
            return self._devices.shared(_padded(_padded(own, self._rows, axis=1), capacity, axis=0), axis=1)

        seeds = _padded(chunk.seeds, capacity, axis=0)
        return (*jax.tree.map(shared, (chunk.images, weights)), self._devices.on_all(seeds))

    def __call__(
        self, placed: tuple[Any, ...], /, *, rates: npt.NDArray[np.float32], stop: bool = False
    ) -> npt.NDArray[np.float32]:
        groups = (self._trainable, self._others, self._of_optimizer)
        state = [[self._devices.on_all(variable.value) for variable in group] for group in groups]
        wishes = self._devices.shared(np.array([stop] + [False] * (self._own_devices - 1), np.float32), axis=0)
        count, capacity = len(rates), len(placed[-1])
        steps = (*placed, self._devices.on_all(_padded(rates, capacity, axis=0)))
        state, reports = self._take(state, steps, wishes, count)
        for group, values in zip(groups, state, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        return reports

    def _take(
        self, state: list[Values], steps: tuple[Any, ...], stop: Any, count: int
    ) -> tuple[list[Values], npt.NDArray[np.float32]]:
        if self._loops:
            state, looped = self._call(state, steps, stop, self._devices.on_all(np.int32(count)))
            return state, np.asarray(looped)[:count]
        reports = list[Any]()
        for index in range(count):
            state, report = self._call(state, steps, stop, self._devices.on_all(np.int32(index)))
            reports.append(report)
        return state, np.stack([np.asarray(report) for report in reports])

    def _step_of(self, state: list[Values], steps: tuple[Any, ...], stop: Any, index: Any) -> tuple[list[Values], Any]:
        """Takes one of the steps."""
        return self._step(state, jax.tree.map(lambda each: each[index], steps), jnp.sum(stop))

    def _steps(self, state: list[Values], steps: tuple[Any, ...], stop: Any, count: Any) -> tuple[list[Values], Any]:
        """Takes the first `count` of the steps: a loop whose length is known only when it runs."""
        wishes = jnp.sum(stop)

        def take(index: Any, carried: tuple[list[Values], Any]) -> tuple[list[Values], Any]:
            state, reports = carried
            state, report = self._step(state, jax.tree.map(lambda each: each[index], steps), wishes)
            return state, reports.at[index].set(report)

        reports = jnp.zeros((len(steps[-1]), 3), jnp.float32)
        state, reports = jax.lax.fori_loop(0, count, take, (state, reports))
        return state, reports

    def _step(
        self,
        state: list[Values],
        step: tuple[Any, ...],
        wishes: Any,
    ) -> tuple[list[Values], Any]:
        trainable, others, of_optimizer = state
        images, weights, seed, rate = step
        gradients, others, (loss, hits) = self._gradients(trainable, others, images, weights, seed)
        of_optimizer = [*of_optimizer[: self._rate], rate, *of_optimizer[self._rate + 1 :]]
        trainable, of_optimizer = self._trained.optimizer.stateless_apply(
            of_optimizer, self._forward.clipped(gradients), trainable
        )
        return [list(trainable), others, list(of_optimizer)], jnp.stack([loss, hits, wishes])

    def _gradients(
        self, trainable: Values, others: Values, images: StepImages, weights: Any, seed: Any
    ) -> tuple[Values, Values, tuple[Any, Any]]:
        """Gradients of the global batch, computed in parts; what changes beside the trained weights; loss and hits."""
        parts = self._trained.config.parts
        gradient = jax.value_and_grad(self._loss, has_aux=True)

        def add(part: Any, sums: tuple[Values, Values, Any]) -> tuple[Values, Values, Any]:
            total, changed, (loss, hits) = sums
            of_part = jax.tree.map(lambda each: self._part(each, part), (images, weights))
            own_seed = seed + jnp.stack([0, part * DRAWS_OF_PART]).astype(seed.dtype)
            (added, (changed, more)), gradients = gradient(trainable, changed, *of_part, own_seed)
            return [a + b for a, b in zip(total, gradients, strict=True)], changed, (loss + added, hits + more)

        if parts == 1:
            (loss, (others, hits)), gradients = gradient(trainable, others, images, weights, seed)
            return gradients, others, (loss, hits)
        sums = ([jnp.zeros_like(each) for each in trainable], others, (jnp.float32(0), jnp.float32(0)))
        if self._loops:
            sums = jax.lax.fori_loop(0, parts, add, sums)
        else:
            for part in range(parts):
                sums = add(part, sums)
        return sums

    def _part(self, images: Any, part: Any) -> Any:
        """A part of each device's images: `[B, ...]` -> `[B / parts, ...]`, still split over the devices."""
        by_device = images.reshape(self._devices.count, self._trained.config.parts, -1, *images.shape[1:])
        return by_device[:, part].reshape(-1, *images.shape[1:])

    def _loss(
        self, trainable: Values, others: Values, images: StepImages, weights: Any, seed: Any
    ) -> tuple[Any, tuple[Values, Any]]:
        """Loss of the global batch or a part of it, and what changes beside the trained weights, and the hits."""
        variables = [*self._trainable, *self._others]
        with keras.StatelessScope(list(zip(variables, [*trainable, *others], strict=True))) as scope:
            batch = self._forward.examples(images)
            losses, logits = self._forward.losses_and_logits(batch, seed)
            changed = [scope.get_current_value(variable) for variable in self._others]
        loss = jnp.sum(losses * weights) / self._trained.config.batch_size
        return loss, (changed, jnp.sum(self._forward.hits(batch, logits) * weights))


def _padded(array: npt.NDArray[Any], rows: int, *, axis: int) -> npt.NDArray[Any]:
    """The array with its last row repeated, so that it has this many rows along an axis."""
    missing = rows - array.shape[axis]
    if not missing:
        return array
    widths = [(0, missing if index == axis else 0) for index in range(array.ndim)]
    return np.pad(array, widths, mode="edge")


def _counts_padding(model: Any) -> Iterator[bool]:
    """For each layer, whether it computes statistics over the batch in training mode."""
    for layer in getattr(model, "layers", ()):
        yield isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        yield from _counts_padding(layer)


def _without_duplicates(variables: Sequence[Any], *, without: Sequence[Any]) -> list[Any]:
    found = {id(variable): variable for variable in variables}
    for variable in without:
        found.pop(id(variable), None)
    return list(found.values())
