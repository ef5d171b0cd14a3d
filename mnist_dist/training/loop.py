"""The training loop: phases, epochs, calls of the step, validation, the best epoch, checkpoints.

Every worker runs this loop and takes the same decisions, because each decision depends only on sums over all workers.
The loop knows nothing of Ray: a `Host` connects it to whatever runs it. The same code runs in one plain process (tests,
benchmark) and on many nodes.

To resume, `State` names the next (phase, epoch, step); batch order and random numbers follow from it and the seed.
Each phase has a fresh optimizer and fresh callbacks and starts from the best weights so far.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import keras
import numpy as np
import numpy.typing as npt

from mnist_dist.config import Phase, require
from mnist_dist.data.batches import balanced_order, epoch_order
from mnist_dist.errors import TrainingDiverged
from mnist_dist.models.augmentation import make_preset
from mnist_dist.models.classifier import Classifier, build_classifier, build_head_alone
from mnist_dist.models.history import Epoch
from mnist_dist.training.backends import open_computation
from mnist_dist.training.checkpoints import Arrays, Checkpoint, State
from mnist_dist.training.feed import EvaluationBatch, Images, World, ahead, evaluation_batches, train_chunk
from mnist_dist.training.host import Host, Measured, MeasuringStopped, Position, Split
from mnist_dist.training.objective import set_metrics
from mnist_dist.training.phase import Built, PhaseRun, Placed, TrainTask
from mnist_dist.training.step import HITS, LOSS, STOP, Evaluator, Predictor

log = logging.getLogger(__name__)

Metrics = dict[str, float]
EXCHANGED_NUMBERS = 2**22  # float64 that the workers exchange at once: 32 MB
MAX_PIXELS = 2**21  # of one evaluation batch per worker, at the backbone's input size: about 2 GB for VGG16


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended. If it is not `finished`, it was asked to stop and has saved its state."""

    finished: bool
    state: State
    best: Arrays


class Trainer:
    """Trains one classifier, as one of the workers."""

    def __init__(self, task: TrainTask, *, host: Host, world: World) -> None:
        count, job = len(task.images.train), task.job
        require(
            world.workers <= job.fit.global_batch <= count,
            f"batch_size must be at least the number of workers ({world.workers}) and at most the number of training "
            f"images ({count})",
            batch_size=job.fit.global_batch,
        )
        job.check_parts(world.workers)
        self.task, self.host, self.world = task, host, world
        self.computation = open_computation(world)
        with self.computation.scope():
            classifier = _build(task)
        augmentation = make_preset(job.fit)
        self.network = classifier.network
        self.built = Built(computation=self.computation, classifier=classifier, augmentation=augmentation, world=world)
        self.state = State()
        self.earlier_s = 0.0
        self.best: Arrays = self._weights()
        self._restored: Checkpoint | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resumes from a checkpoint; call it before `run`."""
        self.state = checkpoint.state
        same_attempt = checkpoint.state.began_at == self.task.began_at
        self.earlier_s = checkpoint.state.earlier_s if same_attempt else checkpoint.state.seconds
        self.network.set_weights(checkpoint.weights)
        self.best = checkpoint.best if checkpoint.best is not None else checkpoint.weights
        self._restored = checkpoint

    def run(self) -> Outcome:
        """Trains the remaining phases, or until asked to stop."""
        for _ in self.epochs():
            pass
        finished = self.state.phase == len(self.task.job.phases.in_order())
        return Outcome(finished=finished, state=self.state, best=self.best)

    def epochs(self) -> Iterator[Epoch]:
        """Trains as `run` does, and yields each epoch when it ends."""
        phases = self.task.job.phases.in_order()
        while self.state.phase < len(phases):
            index = self.state.phase
            yield from self._run_phase(phases[index])
            if self.state.phase == index:
                return

    def evaluate(self, network: keras.Model) -> Metrics:
        """Loss (mean cross-entropy, nats) and accuracy of a finished network on the validation images, which the
        workers share. Of images with any number of classes: see `set_metrics`.

        Raises:
            MeasuringStopped: see `measured`.
        """
        if self.task.members is None:
            return self._evaluate(self.computation.evaluator(network), self.task.images, split="validation")
        return self._set_metrics(self.computation.predictor(network), self.task.images, split="validation")

    def predict(self, indices: npt.NDArray[np.int64], network: keras.Model) -> npt.NDArray[np.float32]:
        """Logits `float32 [n, K]` of this worker's share of test images: `indices[rank::workers]`, in that order.

        Raises:
            MeasuringStopped: see `measured`.
        """
        return self._predict(self.computation.predictor(network), self.task.images, indices, split="test")

    def measured(self, split: Split, done: int, images: int) -> None:
        """Reports to the host how far the finished network is measured.

        Raises:
            MeasuringStopped: the host asks to stop before the end. With several workers nothing is raised: the others
                would wait.
        """
        stop = self.host.measured(Measured(split=split, done=min(done, images), images=images))
        if stop and done < images and self.world.workers == 1:
            raise MeasuringStopped

    @property
    def test_count(self) -> int:
        """Number of test images to predict: all of them, except in a dry run."""
        return len(self._limited(self.task.images.test))

    @property
    def _evaluation_batch(self) -> int:
        """Twice the training batch, or less if a large backbone would run out of memory: the batch size may have been
        chosen for a head on features."""
        backbone, largest = self.built.classifier.backbone, 2 * self.task.job.fit.global_batch
        if backbone is None:
            return largest
        height_px, width_px = backbone.input_shape[1:3]
        return int(min(largest, max(self.world.workers, MAX_PIXELS * self.world.workers // (height_px * width_px))))

    def _limited(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The images of a split that a dry run uses; otherwise all."""
        if self.task.steps_limit is None:
            return indices
        return indices[: self.task.steps_limit * self.task.job.fit.global_batch]

    def _run_phase(self, phase: Phase) -> Iterator[Epoch]:
        """Trains a phase to its end or until asked to stop."""
        index, state, restored = self.state.phase, self.state, self._restored
        self._restored = None
        if index > 0 and state.epoch == 0 and state.step == 0:
            self.network.set_weights(self.best)
        run = PhaseRun(phase, task=self.task, built=self.built, state=state, restored=restored)
        log.info("phase %s: %d epochs of %d steps", phase.name, run.epochs, self.task.steps_per_epoch)
        while self.state.phase == index and not run.stops:
            if self._run_epoch(run):
                yield self._end_epoch(run)
            else:
                self._save(run)
        run.end()

    def _run_epoch(self, run: PhaseRun) -> bool:
        """Takes an epoch's remaining steps. Returns False if all workers agreed to stop before its end."""
        run.callbacks.on_epoch_begin(self.state.epochs_done)
        run.start_clock()
        with closing(ahead(self._chunks(run))) as chunks:
            for placed in chunks:
                reports = run.take(placed)
                self._count(run.phase, reports)
                wish = self.host.progress(self._position(run))
                run.wish_to_stop = run.wish_to_stop or wish
                run.stops = bool(reports[-1, STOP] > 0)
                if run.stops and self.state.step < self.task.steps_per_epoch:
                    return False
                if self._is_due(len(reports)):
                    self._save(run)
        return True

    def _chunks(self, run: PhaseRun) -> Iterator[Callable[[], Placed]]:
        fit, start = self.task.job.fit, self.state.step
        first = self.state.global_step - start
        order = self._order(run.images)
        while start < self.task.steps_per_epoch:
            steps = range(start, min(start + run.steps_per_call, self.task.steps_per_epoch))
            gather = partial(
                train_chunk,
                run.images,
                order,
                steps=steps,
                first_global_step=first + start,
                batch_size=fit.global_batch,
                seed=fit.seed,
                world=self.world,
                draws=run.draws,
            )
            # Not read in the feed's thread, where it might have changed already, and not on all workers.
            yield partial(run.place, gather, capacity=max(len(steps), run.steps_per_call))
            start = steps.stop

    def _order(self, images: Images) -> npt.NDArray[np.int64]:
        """The order of the images in this epoch."""
        seed, epoch = self.task.job.fit.seed, self.state.epochs_done
        if self.task.job.fit.sampling == "balanced":
            return balanced_order(images.labels[images.train], seed=seed, epoch=epoch)
        return epoch_order(len(images.train), seed=seed, epoch=epoch)

    def _count(self, phase: Phase, reports: npt.NDArray[np.float32]) -> None:
        """Adds the steps to the state. Raises TrainingDiverged if a loss is not finite."""
        bad = np.flatnonzero(~np.isfinite(reports[:, LOSS]))
        if len(bad):
            raise TrainingDiverged(
                f"The loss is {reports[bad[0], LOSS]} in phase {phase.name!r}, epoch {self.state.epoch + 1}, "
                f"step {self.state.step + int(bad[0]) + 1}. A lower learning_rate or a clip_norm may help. "
                f"Received: learning_rate={phase.learning_rate}"
            )
        batch = self.task.job.fit.global_batch
        totals = reports.sum(axis=0, dtype=np.float64)
        added = (totals[LOSS] * batch, totals[HITS], len(reports) * batch)
        self.state.epoch_sums = [float(a + b) for a, b in zip(self.state.epoch_sums, added, strict=True)]
        self.state.step += len(reports)
        self.state.global_step += len(reports)
        self.state.best_is_current = False

    def _is_due(self, steps: int) -> bool:
        every = self.task.job.run.checkpoint_steps
        if every is None or self.state.step == self.task.steps_per_epoch:
            return False  # the end of the epoch saves a checkpoint of the same name anyway
        return self.state.global_step // every > (self.state.global_step - steps) // every

    def _end_epoch(self, run: PhaseRun) -> Epoch:
        """Validates, keeps the best weights, runs the callbacks and saves a checkpoint."""
        with run.averaged():
            epoch = self._validate(run)
            if self._is_better(epoch):
                self.state.best, self.best = epoch, self._weights()
                self.state.best_is_current = self.task.job.optimizer.ema_decay is None
        self.state.history.append(epoch)
        self.state.epoch, self.state.step, self.state.epoch_sums = self.state.epoch + 1, 0, [0.0, 0.0, 0.0]
        self.state.epochs_done += 1
        run.end_epoch(epoch)
        self.host.epoch_ended(epoch)
        self._save(run)
        return epoch

    def _validate(self, run: PhaseRun) -> Epoch:
        """The epoch's line of the history. Raises TrainingDiverged if the validation loss is not finite."""
        members, images = self.task.members, run.images
        metrics = self._evaluate(run.evaluator, images) if members is None else self._set_metrics(run.predictor, images)
        loss, hits, count = self.state.epoch_sums
        epoch = Epoch(
            epoch=self.state.epochs_done + 1,
            phase=run.phase.name,
            loss=loss / count,
            accuracy=hits / count,
            val_loss=metrics["loss"],
            val_accuracy=metrics["accuracy"],
            learning_rate=run.last_rate,
            val_mean_average_precision=metrics.get("mean_average_precision"),
        )
        if not math.isfinite(epoch.val_loss):
            raise TrainingDiverged(
                f"The validation loss is {epoch.val_loss} in phase {run.phase.name!r}, epoch {self.state.epoch + 1}"
            )
        return epoch

    def _is_better(self, epoch: Epoch) -> bool:
        best = self.state.best
        if best is None:
            return True
        if self.task.job.fit.best_metric == "val_loss":
            return epoch.val_loss < best.val_loss
        return epoch.score > best.score

    def _evaluate(self, evaluator: Evaluator, images: Images, *, split: Split | None = None) -> Metrics:
        sums = np.zeros(3)
        for batch in self._batches(images, images.validation, split):
            sums += evaluator(batch)
        loss, hits, count = self.computation.sum_over_workers(sums)
        return {"loss": float(loss / count), "accuracy": float(hits / count)}

    def _set_metrics(self, predictor: Predictor, images: Images, *, split: Split | None = None) -> Metrics:
        """The metrics of sets of classes, equal on all workers: each gets the logits of all, since average precision is
        no sum over images."""
        indices, world, members = self._limited(images.validation), self.world, self.task.members
        assert members is not None
        logits = np.zeros((len(indices), len(self.task.class_names)), np.float64)
        logits[world.rank :: world.workers] = self._predict(predictor, images, indices, split=split)
        rows = max(1, EXCHANGED_NUMBERS // logits.shape[1])
        parts = (logits[start : start + rows] for start in range(0, len(logits), rows))
        logits = np.concatenate([self.computation.sum_over_workers(part.ravel()) for part in parts])
        truth = members[images.labels[indices]]
        return set_metrics(logits.reshape(truth.shape).astype(np.float32), truth)

    def _predict(
        self, predictor: Predictor, images: Images, indices: npt.NDArray[np.int64], *, split: Split | None = None
    ) -> npt.NDArray[np.float32]:
        logits = [predictor(batch) for batch in self._batches(images, indices, split)]
        return np.concatenate(logits) if logits else np.zeros((0, len(self.task.class_names)), np.float32)

    def _batches(
        self, images: Images, indices: npt.NDArray[np.int64], split: Split | None
    ) -> Iterator[EvaluationBatch]:
        """This worker's batches, prepared ahead. If `split` is given, each batch is reported to the host."""
        indices, size = self._limited(indices), self._evaluation_batch
        with closing(ahead(evaluation_batches(images, indices, batch_size=size, world=self.world))) as ready:
            for number, batch in enumerate(ready, start=1):
                yield batch
                if split is not None:
                    self.measured(split, number * size, len(indices))

    def _position(self, run: PhaseRun) -> Position:
        loss, hits, images = self.state.epoch_sums
        return Position(
            phase=run.phase.name,
            epoch=self.state.epoch + 1,
            epochs=run.epochs,
            step=self.state.step,
            steps=self.task.steps_per_epoch,
            loss=loss / images,
            accuracy=hits / images,
            images_per_s=self.state.timed_images / self.state.timed_s if self.state.timed_s else 0.0,
        )

    def _save(self, run: PhaseRun) -> None:
        self.state.began_at, self.state.earlier_s = self.task.began_at, self.earlier_s
        self.state.seconds = self.earlier_s + time.time() - self.task.began_at
        self.host.save(
            Checkpoint(state=self.state, weights=self._weights(), optimizer=run.optimizer_variables(), best=self.best)
        )

    def _weights(self) -> Arrays:
        return [np.array(weight) for weight in self.network.get_weights()]


def _build(task: TrainTask) -> Classifier:
    model, classes, seed = task.job.model, len(task.class_names), task.job.fit.seed
    if task.head_alone:
        features = task.features or task.images
        return build_head_alone(model, num_features=features.pixels.shape[1], num_classes=classes, seed=seed)
    return build_classifier(
        model,
        spec=task.spec,
        num_classes=classes,
        multi_label=task.job.data.has_sets,
        precision=task.precision,
        seed=seed,
    )
