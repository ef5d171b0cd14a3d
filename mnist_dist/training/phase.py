"""One phase of training under way: its optimizer, its compiled step, its callbacks, and how fast it goes.

Owns: what is new in each phase. Does not own: the order of epochs, validation, the best weights or checkpoints
(`loop`).
"""

import time
from dataclasses import asdict, dataclass, field
from typing import Literal

import keras
import numpy as np
import numpy.typing as npt

from mnist_dist.config import Phase, TrainJob
from mnist_dist.data.images import ImageSpec
from mnist_dist.models.classifier import Classifier, set_trainable
from mnist_dist.models.history import Epoch
from mnist_dist.training.callbacks import LogFiles, callback_states, make_callbacks, restore_callbacks
from mnist_dist.training.checkpoints import Arrays, Checkpoint, State
from mnist_dist.training.feed import Images, TrainChunk, World
from mnist_dist.training.schedule import learning_rates
from mnist_dist.training.step import Evaluator, StepConfig, Strategy, TrainStep, make_optimizer, slowest_worker_s

SECONDS_PER_CALL = 0.25  # long enough that calling costs nothing, short enough to stop and to show progress by
MAX_STEPS_PER_CALL = 20


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What a worker trains: the job, and the data it was resolved to."""

    job: TrainJob
    spec: ImageSpec
    class_names: tuple[str, ...]
    images: Images
    features: Images | None = None
    """The same images with the frozen backbone's features for pixels, for phases that train the head alone; None: they
    are computed anew in each step."""
    head_alone: bool = False
    """There is no backbone at all: every phase is one of the head, on `features`."""
    precision: Literal["float32", "bfloat16"] = "float32"
    steps_limit: int | None = None
    """At most so many steps an epoch and batches an evaluation (dry run, plan). None: all."""
    files: LogFiles | None = None
    """Where rank 0 logs; None in all others."""
    began_at: float = field(default_factory=time.time)
    """When the job began, s since the epoch; `State.seconds` counts from there."""

    @property
    def steps_per_epoch(self) -> int:
        """An epoch's last partial batch is dropped."""
        steps = len(self.images.train) // self.job.fit.batch_size
        return min(steps, self.steps_limit or steps)


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a worker builds once and all phases share."""

    strategy: Strategy
    classifier: Classifier
    augmentation: keras.Model | None
    world: World


class PhaseRun:
    """A phase under way.

    Args:
        phase: which.
        task: what is trained.
        built: the network and what belongs to it.
        state: of the run; `end_epoch` changes it.
        restored: the checkpoint that the run goes on from, or None; its optimizer counts within its phase only.
    """

    def __init__(
        self, phase: Phase, *, task: TrainTask, built: Built, state: State, restored: Checkpoint | None
    ) -> None:
        self.phase, self.task, self.state, self._built = phase, task, state, built
        self.epochs = phase.epochs
        self.steps_per_call = 1
        self.wish_to_stop = False
        """This worker's."""
        self.stops = False
        """What all workers agreed on."""
        self._calls, self._clock = 0, 0.0
        classifier, fit = built.classifier, task.job.fit
        of_head = phase.trainable == "head"
        before = task.job.phases.phases()[: state.phase]
        untouched = all(earlier.trainable == "head" for earlier in before)
        features = task.features if of_head and untouched else None
        self.images = task.images if features is None else features
        self.network = classifier.head if of_head else classifier.network
        frozen = classifier.features if of_head and features is None else None
        with built.strategy.scope():
            set_trainable(classifier, phase.trainable)
            self.optimizer = make_optimizer(task.job.optimizer, self.network.trainable_variables)
            self._step = TrainStep(
                built.strategy,
                network=self.network,
                optimizer=self.optimizer,
                augmentation=built.augmentation if features is None else None,
                frozen=frozen,
                config=StepConfig(
                    batch_size=fit.batch_size,
                    class_weights=class_weights(task),
                    label_smoothing=task.job.optimizer.label_smoothing,
                    clip_norm=task.job.optimizer.clip_norm,
                ),
            )
            self.evaluator = Evaluator(built.strategy, self.network, frozen=frozen)
        self.last_rate = self.rate()
        self.callbacks = self._start_callbacks(restored)

    def take(self, chunk: TrainChunk) -> npt.NDArray[np.float32]:
        """Takes the chunk's steps; chooses how many steps later calls take from the time of the second call."""
        start = self.state.epoch * self.task.steps_per_epoch + self.state.step
        rates = learning_rates(
            self.rate(),
            config=self.task.job.optimizer,
            steps=range(start, start + len(chunk)),
            phase_steps=self.epochs * self.task.steps_per_epoch,
        )
        began = time.perf_counter()
        reports = self._step(chunk, rates=rates, stop=self.wish_to_stop)
        seconds = time.perf_counter() - began
        self._calls += 1
        self.last_rate = float(rates[-1])
        self._time(len(chunk))
        if self._calls == 2:
            slowest = slowest_worker_s(self._built.strategy, seconds, world=self._built.world)
            self.steps_per_call = max(1, min(MAX_STEPS_PER_CALL, round(SECONDS_PER_CALL * len(chunk) / slowest)))
        return reports

    def start_clock(self) -> None:
        """An epoch's calls begin now; what lies between epochs (validation, checkpoints) is not timed."""
        self._clock = time.perf_counter()

    def _time(self, steps: int) -> None:
        """Counts the time since the call before: the step, and waiting for its images."""
        now = time.perf_counter()
        if self._calls > 2:
            self.state.timed_images += steps * self.task.job.fit.batch_size
            self.state.timed_s += now - self._clock
        self._clock = now

    def rate(self) -> float:
        """The phase's rate, or what ReduceLROnPlateau has made of it."""
        return self.state.learning_rate or self.phase.learning_rate

    def end_epoch(self, epoch: Epoch) -> None:
        """Lets the callbacks decide, and puts into the state what they decided and remember."""
        state = self.state
        before = float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))
        logs = {name: value for name, value in asdict(epoch).items() if name not in ("epoch", "phase")}
        self.callbacks.on_epoch_end(epoch.epoch - 1, logs)
        after = float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))
        if after != before:
            state.learning_rate = self.rate() * after / before
        state.callbacks = callback_states(self.callbacks.callbacks)
        if state.epoch >= self.epochs or self.network.stop_training:
            state.phase, state.epoch, state.learning_rate, state.callbacks = state.phase + 1, 0, None, {}

    def optimizer_variables(self) -> Arrays:
        """For a checkpoint."""
        return [keras.ops.convert_to_numpy(variable) for variable in self.optimizer.variables]

    def end(self) -> None:
        """Lets the callbacks close what they opened."""
        self.callbacks.on_train_end()

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
    """Weight of each class in the loss, `float32 [K]`: ones, or N / (K x images of the class) for `balanced`."""
    classes = len(task.class_names)
    if task.job.optimizer.class_weights == "none":
        return np.ones(classes, np.float32)
    counts = np.bincount(task.images.labels[task.images.train], minlength=classes)
    return np.asarray(counts.sum() / (classes * np.maximum(counts, 1)), np.float32)
