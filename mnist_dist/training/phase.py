"""One running phase of training: its optimizer, its compiled step, its callbacks, and its speed.

Owns: what each phase creates anew. Does not own: the order of epochs, validation, the best weights or checkpoints
(`loop`).
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from mnist_dist.config import Phase, TrainJob
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.augmentation import Preset
from mnist_dist.models.classifier import Classifier, layer_levels, set_trainable
from mnist_dist.models.history import Epoch
from mnist_dist.sources.label_sets import LabelSets, members
from mnist_dist.training.callbacks import LogFiles, callback_states, make_callbacks, restore_callbacks
from mnist_dist.training.checkpoints import Arrays, Checkpoint, State
from mnist_dist.training.feed import Draws, Images, TrainChunk, World
from mnist_dist.training.objective import balanced_positive_weights, balanced_weights
from mnist_dist.training.schedule import learning_rates
from mnist_dist.training.step import Computation, StepConfig, Trained, make_optimizer, slowest_worker_s

SECONDS_PER_CALL = 0.25  # long enough to hide the cost of a call, short enough to stop and show progress promptly
MAX_STEPS_PER_CALL = 20


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What a worker trains: the job and its decoded data."""

    job: TrainJob
    spec: ImageSpec
    class_names: tuple[str, ...]
    images: Images
    features: Images | None = None
    """The same images as features of the frozen backbone, for phases that train only the head. None: each step computes
    them anew."""
    head_alone: bool = False
    """No backbone is built: every phase trains only the head, on `features`."""
    label_sets: LabelSets = ()
    """The classes of each label, where images have any number of them; empty: a label is a class."""
    precision: Literal["float32", "bfloat16"] = "float32"
    steps_limit: int | None = None
    """The most steps per epoch and batches per evaluation (dry run, plan). None: all."""
    files: LogFiles | None = None
    """Where rank 0 logs; None on all other workers."""
    began_at: float = field(default_factory=time.time)
    """When the job began, s since the Unix epoch; `State.seconds` counts from there."""

    @functools.cached_property
    def members(self) -> npt.NDArray[np.bool_] | None:
        """`bool [L, K]`, whether a class is in a set; None: each image has one class."""
        return members(self.label_sets, len(self.class_names)) if self.label_sets else None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, without its last partial batch."""
        steps = len(self.images.train) // self.job.fit.global_batch
        return min(steps, self.steps_limit or steps)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A chunk on the devices: `content` is the step's own, for chunks of up to `capacity` steps."""

    steps: int
    capacity: int
    content: Any


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a worker builds once and all phases share."""

    computation: Computation
    classifier: Classifier
    augmentation: Preset | None
    world: World


class PhaseRun:
    """A running phase.

    Args:
        phase: its configuration.
        task: the job and its data.
        built: the network and its augmentation.
        state: the state of the run; `end_epoch` changes it.
        restored: the checkpoint to resume from, or None. Its optimizer is valid only within its phase.
    """

    def __init__(
        self, phase: Phase, *, task: TrainTask, built: Built, state: State, restored: Checkpoint | None
    ) -> None:
        self.phase, self.task, self.state, self._built = phase, task, state, built
        self.epochs = phase.epochs
        self.steps_per_call = 1
        self.wish_to_stop = False
        """Whether this worker wishes to stop."""
        self.stops = False
        """Whether all workers agreed to stop."""
        self._calls, self._clock = 0, 0.0
        self._compiled = set[int]()
        classifier, fit = built.classifier, task.job.fit
        head_only = phase.trainable == "head"
        before = task.job.phases.in_order()[: state.phase]
        backbone_unchanged = all(earlier.trainable == "head" for earlier in before)
        features = task.features if head_only and backbone_unchanged else None
        self.images = task.images if features is None else features
        self.network = classifier.head if head_only else classifier.network
        frozen = classifier.features if head_only and features is None else None
        augmentation = built.augmentation if features is None else None
        self.draws = Draws()
        if features is None:
            count = 0 if augmentation is None else augmentation.draws
            self.draws = Draws(augmentation=count, mixup=fit.mixup, cutmix=fit.cutmix)
        with built.computation.scope():
            set_trainable(classifier, phase.trainable)
            self.optimizer = self._make_optimizer()
            trained = Trained(
                network=self.network,
                optimizer=self.optimizer,
                augmentation=augmentation,
                frozen=frozen,
                config=StepConfig(
                    batch_size=fit.global_batch,
                    class_weights=class_weights(task),
                    members=task.members,
                    label_smoothing=task.job.optimizer.label_smoothing,
                    clip_norm=task.job.optimizer.clip_norm,
                    parts=task.job.optimizer.accumulate,
                ),
            )
            self._step = built.computation.train_step(trained)
            self.evaluator = built.computation.evaluator(self.network, frozen=frozen)
            self.predictor = built.computation.predictor(self.network, frozen=frozen)
        self.last_rate = self.rate()
        self.callbacks = self._start_callbacks(restored)

    def place(self, gather: Callable[[], TrainChunk], *, capacity: int) -> Placed:
        """Gathers a chunk and moves it to the devices; the feed's thread does this ahead of the steps.

        Args:
            gather: makes the chunk.
            capacity: the most steps of a chunk, alike for this chunk on all workers.
        """
        chunk = gather()
        return Placed(steps=len(chunk), capacity=capacity, content=self._step.place(chunk, capacity=capacity))

    def take(self, chunk: Placed) -> npt.NDArray[np.float32]:
        """Takes the chunk's steps. The second call's duration decides how many steps later calls take."""
        start = self.state.epoch * self.task.steps_per_epoch + self.state.step
        rates = learning_rates(
            self.rate(),
            config=self.task.job.optimizer,
            steps=range(start, start + chunk.steps),
            phase_steps=self.epochs * self.task.steps_per_epoch,
        )
        began = time.perf_counter()
        reports = self._step(chunk.content, rates=rates, stop=self.wish_to_stop)
        seconds = time.perf_counter() - began
        self._calls += 1
        self.last_rate = float(rates[-1])
        self._time(chunk)
        if self._calls == 2:
            slowest = slowest_worker_s(self._built.computation, seconds, world=self._built.world)
            self.steps_per_call = max(1, min(MAX_STEPS_PER_CALL, round(SECONDS_PER_CALL * chunk.steps / slowest)))
        return reports

    def start_clock(self) -> None:
        """Starts timing an epoch; the time between epochs (validation, checkpoints) does not count."""
        self._clock = time.perf_counter()

    def _time(self, chunk: Placed) -> None:
        """Adds the time since the previous call: the steps, and the wait for their images. A call that compiles, the
        first of its capacity, does not count."""
        now = time.perf_counter()
        if self._calls > 2 and chunk.capacity in self._compiled:
            self.state.timed_images += chunk.steps * self.task.job.fit.global_batch
            self.state.timed_s += now - self._clock
        self._compiled.add(chunk.capacity)
        self._clock = now

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the network has the averages of its trained weights, if the run keeps any."""
        if self.task.job.optimizer.ema_decay is None:
            yield
            return
        variables = self.network.trainable_variables
        own = [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]
        self.optimizer.finalize_variable_values(variables)
        try:
            yield
        finally:
            for variable, value in zip(variables, own, strict=True):
                variable.assign(value)

    def rate(self) -> float:
        """The phase's learning rate, as reduced by ReduceLROnPlateau."""
        return self.state.learning_rate or self.phase.learning_rate

    def end_epoch(self, epoch: Epoch) -> None:
        """Runs the callbacks, and stores their decisions and their memory in the state."""
        state = self.state
        before = float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))
        logs = {name: value for name, value in epoch.metrics.items() if name != "epoch"}
        self.callbacks.on_epoch_end(epoch.epoch - 1, logs)
        after = float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))
        if after != before:
            state.learning_rate = self.rate() * after / before
        state.callbacks = callback_states(self.callbacks.callbacks)
        if state.epoch >= self.epochs or self.network.stop_training:
            state.phase, state.epoch, state.learning_rate, state.callbacks = state.phase + 1, 0, None, {}

    def optimizer_variables(self) -> Arrays:
        """The optimizer's variables, for a checkpoint."""
        return [keras.ops.convert_to_numpy(variable) for variable in self.optimizer.variables]

    def end(self) -> None:
        """Lets the callbacks close their files."""
        self.callbacks.on_train_end()

    def _make_optimizer(self) -> keras.optimizers.Optimizer:
        config, variables = self.task.job.optimizer, self.network.trainable_variables
        levels = layer_levels(self._built.classifier)
        return make_optimizer(config, variables, levels=[levels.get(id(variable), 0) for variable in variables])

    def _start_callbacks(self, restored: Checkpoint | None) -> keras.callbacks.CallbackList:
        state, network = self.state, self.network
        network.optimizer, network.stop_training = self.optimizer, False
        callbacks = keras.callbacks.CallbackList(
            make_callbacks(self.task.job.fit, files=self.task.files, history=state.history), model=network
        )
        callbacks.on_train_begin()
        self.optimizer.learning_rate = self.rate()
        if restored is not None and (state.epoch or state.step):
            for variable, value in zip(self.optimizer.variables, restored.optimizer, strict=True):
                variable.assign(value)
            restore_callbacks(callbacks.callbacks, state.callbacks)
        return callbacks


def class_weights(task: TrainTask) -> npt.NDArray[np.float32]:
    """Weight of each class in the loss, `float32 [K]`; see `balanced_weights` and `balanced_positive_weights`."""
    classes = len(task.class_names)
    if task.job.optimizer.class_weights == "none":
        return np.ones(classes, np.float32)
    labels = task.images.labels[task.images.train]
    if task.members is None:
        return balanced_weights(np.bincount(labels, minlength=classes))
    return balanced_positive_weights(task.members[labels].sum(axis=0), len(labels))
