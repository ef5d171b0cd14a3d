"""The training loop: phases, epochs, calls of the step, validation, the best epoch, checkpoints.

Runs once in each worker and takes the same decisions in all of them, since all numbers it decides by are sums over the
workers. Knows nothing of Ray: what it needs of its surroundings is a `Host`. The same code runs in one plain process
(tests, benchmark) and on many nodes.

How a run goes on: `State` names the next (phase, epoch, step); batch order and random numbers follow from it and the
seed. Each phase has a fresh optimizer and fresh callbacks and starts from the best weights so far.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from mnist_dist.config import Phase, TrainJob, require
from mnist_dist.data.batches import epoch_order
from mnist_dist.data.images import ImageSpec
from mnist_dist.errors import TrainingDiverged
from mnist_dist.models.augmentation import build_augmentation
from mnist_dist.models.classifier import build_classifier, set_trainable
from mnist_dist.training.callbacks import LogFiles, callback_states, make_callbacks, restore_callbacks
from mnist_dist.training.checkpoints import Arrays, Checkpoint, State
from mnist_dist.training.feed import EvaluationBatch, Images, TrainChunk, World, ahead, evaluation_batches, train_chunk
from mnist_dist.training.host import Host, Position
from mnist_dist.training.schedule import learning_rates
from mnist_dist.training.step import (
    HITS,
    LOSS,
    STOP,
    Evaluator,
    StepConfig,
    TrainStep,
    make_optimizer,
    make_strategy,
    slowest_worker_s,
    sum_over_workers,
)

log = logging.getLogger(__name__)

SECONDS_PER_CALL = 0.25  # long enough that calling costs nothing, short enough to stop and to show progress by
MOST_STEPS_PER_CALL = 20
Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What a worker trains: the job, and the data it was resolved to."""

    job: TrainJob
    spec: ImageSpec
    class_names: tuple[str, ...]
    images: Images
    precision: Literal["float32", "bfloat16"] = "float32"
    steps_limit: int | None = None
    """At most so many steps an epoch and batches an evaluation, and one epoch a phase (dry run). None: all."""
    files: LogFiles | None = None
    """Where rank 0 logs; None in all others."""
    began_at: float = field(default_factory=time.time)
    """When the job began, s since the epoch; `State.seconds` counts from there."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to; not `finished`: it stopped because it was asked to, after saving."""

    finished: bool
    state: State
    best: Arrays


class Trainer:
    """Trains one classifier, as one of the workers."""

    def __init__(self, task: TrainTask, *, host: Host, world: World) -> None:
        count, job = len(task.images.train), task.job
        require(
            world.workers <= job.fit.batch_size <= count,
            f"batch_size is at least the number of workers ({world.workers}) and at most that of training images "
            f"({count})",
            batch_size=job.fit.batch_size,
        )
        self.task, self.host, self.world = task, host, world
        self.strategy = make_strategy(world.workers)
        with self.strategy.scope():
            self.classifier = build_classifier(
                job.model,
                spec=task.spec,
                num_classes=len(task.class_names),
                precision=task.precision,
                seed=job.fit.seed,
            )
            self.augmentation = build_augmentation(job.fit.augmentation, spec=task.spec)
        self.network = self.classifier.network
        self.steps_per_epoch = min(count // job.fit.batch_size, task.steps_limit or count)
        self.state = State()
        self.earlier_s = 0.0
        self.best: Arrays = self._weights()
        self._restored: Checkpoint | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint; call it before `run`."""
        self.state = checkpoint.state
        same_attempt = checkpoint.state.began_at == self.task.began_at
        self.earlier_s = checkpoint.state.earlier_s if same_attempt else checkpoint.state.seconds
        self.network.set_weights(checkpoint.weights)
        self.best = checkpoint.best if checkpoint.best is not None else checkpoint.weights
        self._restored = checkpoint

    def run(self) -> Outcome:
        """Trains the phases that are left."""
        phases = self.task.job.phases.phases()
        while self.state.phase < len(phases):
            if not self._run_phase(phases[self.state.phase]):
                return Outcome(finished=False, state=self.state, best=self.best)
        return Outcome(finished=True, state=self.state, best=self.best)

    def evaluate(self, indices: npt.NDArray[np.int64], network: keras.Model) -> Metrics:
        """Loss (mean cross-entropy, nats) and accuracy of a network over a split, each image once over all workers."""
        evaluator = Evaluator(self.strategy, network)
        return self._evaluate(evaluator, indices)

    def _run_phase(self, phase: Phase) -> bool:
        """Trains a phase to its end (True) or until asked to stop (False)."""
        index, run = self.state.phase, _PhaseRun(self, phase)
        log.info("phase %s: %d epochs of %d steps", phase.name, run.epochs, self.steps_per_epoch)
        while self.state.phase == index and not run.stops:
            if self._run_epoch(run):
                self._end_epoch(run)
            else:
                self._save(run)
        run.end()
        return self.state.phase > index

    def _run_epoch(self, run: "_PhaseRun") -> bool:
        """Takes an epoch's remaining steps; False: all workers agreed to stop before its end."""
        run.callbacks.on_epoch_begin(self.state.epochs_done)
        run.start_clock()
        with closing(ahead(self._chunks(run))) as chunks:
            for chunk in chunks:
                reports = run.take(chunk)
                self._count(run.phase, reports)
                wish = self.host.progress(self._position(run))
                run.wish_to_stop = run.wish_to_stop or wish
                run.stops = bool(reports[-1, STOP] > 0)
                if run.stops and self.state.step < self.steps_per_epoch:
                    return False
                if self._is_due(len(chunk)):
                    self._save(run)
        return True

    def _chunks(self, run: "_PhaseRun") -> Iterator[Callable[[], TrainChunk]]:
        fit, start = self.task.job.fit, self.state.step
        first = self.state.global_step - start
        order = epoch_order(len(self.task.images.train), seed=fit.seed, epoch=self.state.epochs_done)
        while start < self.steps_per_epoch:
            steps = range(start, min(start + run.steps_per_call, self.steps_per_epoch))
            yield partial(
                train_chunk,
                self.task.images,
                order,
                steps=steps,
                first_global_step=first + start,
                batch_size=fit.batch_size,
                seed=fit.seed,
                world=self.world,
            )
            start = steps.stop

    def _count(self, phase: Phase, reports: npt.NDArray[np.float32]) -> None:
        """Adds the steps to the state; raises TrainingDiverged where a loss is no number."""
        bad = np.flatnonzero(~np.isfinite(reports[:, LOSS]))
        if len(bad):
            raise TrainingDiverged(
                f"The loss is {reports[bad[0], LOSS]} in phase {phase.name!r}, epoch {self.state.epoch + 1}, "
                f"step {self.state.step + int(bad[0]) + 1}; a lower learning_rate or a clip_norm may help. "
                f"Received: learning_rate={phase.learning_rate}"
            )
        batch = self.task.job.fit.batch_size
        totals = reports.sum(axis=0, dtype=np.float64)
        added = (totals[LOSS] * batch, totals[HITS], len(reports) * batch)
        self.state.epoch_sums = [float(a + b) for a, b in zip(self.state.epoch_sums, added, strict=True)]
        self.state.step += len(reports)
        self.state.global_step += len(reports)
        self.state.best_is_current = False

    def _is_due(self, steps: int) -> bool:
        every = self.task.job.run.checkpoint_steps
        if every is None or self.state.step == self.steps_per_epoch:  # the epoch's end saves anyway, under this name
            return False
        return self.state.global_step // every > (self.state.global_step - steps) // every

    def _end_epoch(self, run: "_PhaseRun") -> None:
        """Validates, keeps the best, lets the callbacks decide, saves."""
        metrics = self._evaluate(run.evaluator, self.task.images.validation)
        loss, hits, images = self.state.epoch_sums
        line: dict[str, Any] = {
            "epoch": self.state.epochs_done + 1,
            "phase": run.phase.name,
            "loss": loss / images,
            "accuracy": hits / images,
            "val_loss": metrics["loss"],
            "val_accuracy": metrics["accuracy"],
            "learning_rate": run.last_rate,
        }
        if not math.isfinite(line["val_loss"]):
            raise TrainingDiverged(
                f"The validation loss is {line['val_loss']} in phase {run.phase.name!r}, epoch {self.state.epoch + 1}"
            )
        self.state.best_is_current = self._is_better(line)
        if self.state.best_is_current:
            self.state.best, self.best = line, self._weights()
        self.state.history.append(line)
        self.state.epoch, self.state.step, self.state.epoch_sums = self.state.epoch + 1, 0, [0.0, 0.0, 0.0]
        self.state.epochs_done += 1
        run.end_epoch(line)
        self.host.epoch_ended(line)
        self._save(run)

    def _is_better(self, line: dict[str, Any]) -> bool:
        metric = self.task.job.fit.best_metric
        sign = -1.0 if metric == "val_loss" else 1.0
        return self.state.best is None or sign * line[metric] > sign * self.state.best[metric]

    def _evaluate(self, evaluator: Evaluator, indices: npt.NDArray[np.int64]) -> Metrics:
        sums = np.zeros(3)
        if self.task.steps_limit is not None:
            indices = indices[: self.task.steps_limit * self.task.job.fit.batch_size]
        batches: Iterator[Callable[[], EvaluationBatch]] = evaluation_batches(
            self.task.images, indices, batch_size=2 * self.task.job.fit.batch_size, world=self.world
        )
        for batch in ahead(batches):
            sums += evaluator(batch)
        loss, hits, images = sum_over_workers(self.strategy, sums)
        return {"loss": float(loss / images), "accuracy": float(hits / images)}

    def _position(self, run: "_PhaseRun") -> Position:
        loss, hits, images = self.state.epoch_sums
        return Position(
            phase=run.phase.name,
            epoch=self.state.epoch + 1,
            epochs=run.epochs,
            step=self.state.step,
            steps=self.steps_per_epoch,
            loss=loss / images,
            accuracy=hits / images,
            images_per_s=self.state.timed_images / self.state.timed_s if self.state.timed_s else 0.0,
        )

    def _save(self, run: "_PhaseRun") -> None:
        self.state.began_at, self.state.earlier_s = self.task.began_at, self.earlier_s
        self.state.seconds = self.earlier_s + time.time() - self.task.began_at
        self.host.save(
            Checkpoint(state=self.state, weights=self._weights(), optimizer=run.optimizer_variables(), best=self.best)
        )

    def _weights(self) -> Arrays:
        return [np.array(weight) for weight in self.network.get_weights()]


class _PhaseRun:
    """A phase under way: its optimizer, compiled steps and callbacks."""

    def __init__(self, trainer: Trainer, phase: Phase) -> None:
        self.trainer, self.phase = trainer, phase
        task, state = trainer.task, trainer.state
        job = task.job
        self.epochs = 1 if task.steps_limit else phase.epochs
        self.steps_per_call = 1
        self.calls = 0
        self._clock = 0.0
        self.wish_to_stop = False
        """This worker's."""
        self.stops = False
        """What all workers agreed on."""
        if state.phase > 0 and state.epoch == 0 and state.step == 0:
            trainer.network.set_weights(trainer.best)
        with trainer.strategy.scope():
            set_trainable(trainer.classifier, phase.trainable)
            self.optimizer = make_optimizer(job.optimizer, trainer.network.trainable_variables)
            self.step = TrainStep(
                trainer.strategy,
                network=trainer.network,
                optimizer=self.optimizer,
                augmentation=trainer.augmentation,
                config=StepConfig(
                    batch_size=job.fit.batch_size,
                    class_weights=class_weights(job, task),
                    label_smoothing=job.optimizer.label_smoothing,
                    clip_norm=job.optimizer.clip_norm,
                ),
            )
            self.evaluator = Evaluator(trainer.strategy, trainer.network)
        self.last_rate = state.learning_rate or phase.learning_rate
        self.callbacks = self._start_callbacks()

    def take(self, chunk: TrainChunk) -> npt.NDArray[np.float32]:
        """Takes the chunk's steps; chooses how many steps later calls take from the time of the second call."""
        trainer, state = self.trainer, self.trainer.state
        start = state.epoch * trainer.steps_per_epoch + state.step
        rates = learning_rates(
            self.rate(),
            config=trainer.task.job.optimizer,
            steps=range(start, start + len(chunk)),
            phase_steps=self.epochs * trainer.steps_per_epoch,
        )
        began = time.perf_counter()
        reports = self.step(chunk, rates=rates, stop=self.wish_to_stop)
        seconds = time.perf_counter() - began
        self.calls += 1
        self.last_rate = float(rates[-1])
        self._time(len(chunk))
        if self.calls == 2:
            slowest = slowest_worker_s(trainer.strategy, seconds, world=trainer.world)
            self.steps_per_call = max(1, min(MOST_STEPS_PER_CALL, round(SECONDS_PER_CALL * len(chunk) / slowest)))
        return reports

    def start_clock(self) -> None:
        """An epoch's calls begin now; what lies between epochs (validation, checkpoints) is not timed."""
        self._clock = time.perf_counter()

    def _time(self, steps: int) -> None:
        """Counts the time since the call before: the step, and waiting for its images."""
        now = time.perf_counter()
        if self.calls > 2:
            self.trainer.state.timed_images += steps * self.trainer.task.job.fit.batch_size
            self.trainer.state.timed_s += now - self._clock
        self._clock = now

    def rate(self) -> float:
        """The phase's rate, or what ReduceLROnPlateau has made of it."""
        return self.trainer.state.learning_rate or self.phase.learning_rate

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Lets the callbacks decide, and puts into the state what they decided and remember."""
        state = self.trainer.state
        before = float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))
        self.callbacks.on_epoch_end(line["epoch"] - 1, {k: v for k, v in line.items() if k not in ("epoch", "phase")})
        after = float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))
        if after != before:
            state.learning_rate = self.rate() * after / before
        state.callbacks = callback_states(self.callbacks.callbacks)
        if state.epoch >= self.epochs or self.trainer.network.stop_training:
            state.phase, state.epoch, state.learning_rate, state.callbacks = state.phase + 1, 0, None, {}

    def optimizer_variables(self) -> Arrays:
        return [keras.ops.convert_to_numpy(variable) for variable in self.optimizer.variables]

    def end(self) -> None:
        self.callbacks.on_train_end()

    def _start_callbacks(self) -> keras.callbacks.CallbackList:
        trainer, state = self.trainer, self.trainer.state
        network = trainer.network
        network.optimizer, network.stop_training = self.optimizer, False
        callbacks = keras.callbacks.CallbackList(
            make_callbacks(trainer.task.job.fit, files=trainer.task.files, history=state.history), model=network
        )
        callbacks.on_train_begin()
        self.optimizer.learning_rate = self.rate()
        restored = trainer._restored
        if restored is not None and (state.epoch or state.step):
            for variable, value in zip(self.optimizer.variables, restored.optimizer, strict=True):
                variable.assign(value)
            restore_callbacks(callbacks.callbacks, state.callbacks)
        trainer._restored = None
        return callbacks


def class_weights(job: TrainJob, task: TrainTask) -> npt.NDArray[np.float32]:
    """Weight of each class in the loss, `float32 [K]`: ones, or N / (K x images of the class) for `balanced`."""
    classes = len(task.class_names)
    if job.optimizer.class_weights == "none":
        return np.ones(classes, np.float32)
    counts = np.bincount(task.images.labels[task.images.train], minlength=classes)
    return np.asarray(counts.sum() / (classes * np.maximum(counts, 1)), np.float32)
