"""A worker's side of the search: one process that runs trial after trial, an epoch at a time, as Ray Tune asks.

Any error of a trial is reported as its result: if it were raised, the process, which has TensorFlow loaded, would end.
Only the death of a process is reported by Ray itself.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ray import tune

from mnist_dist.config import KerasBackend, TrainJob
from mnist_dist.data.records import RecordPlan, Records, open_records
from mnist_dist.data.splits import Splits
from mnist_dist.errors import MnistDistError, ServiceError, StorageError, first_line
from mnist_dist.models.history import Epoch
from mnist_dist.on_ray.data.features import node_folder
from mnist_dist.on_ray.training.backend import start_backend
from mnist_dist.store.local import is_service_error
from mnist_dist.training.features import FeaturePlan, FeatureRows, open_features
from mnist_dist.training.host import SilentHost

OUTAGES = (ServiceError, StorageError, PermissionError)
REPORT, ACCURACY, EPOCHS = "report", "accuracy", "training_iteration"
"""Keys of a result: the whole report, the best validation accuracy (for the scheduler), Ray Tune's count of reports."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The data on which the trials of one architecture train."""

    records: RecordPlan
    """The plan of the decoded records."""
    features: FeaturePlan | None
    """The plan of the computed features. None: the backbone runs in each step."""


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """The input that all trials share."""

    prepared: Mapping[str, Prepared]
    """By the architecture's name."""
    splits: Splits
    backend: KerasBackend
    cpus: float
    gpu: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial reports after each epoch, under the key `REPORT` of Ray Tune's result."""

    accuracy: float
    """Validation accuracy of the best epoch so far, 0-1."""
    loss: float
    epochs: int
    parameters: int
    """Number of weights in the trained part: the head or the whole network."""
    seconds: float
    finished: bool
    history: tuple[Epoch, ...]
    error: str | None = None
    outage: bool = False
    """The store or the node caused the error, not the trial: the search ends, and the same command runs the trial
    again."""


class TrialProcess(tune.Trainable):
    """Runs one trial after the other. A trial's config: `architecture` (a name of the task) and `job`."""

    def setup(self, config: dict[str, Any], task: TrialTask) -> None:
        self._task = task
        self._records: dict[str, Records] = {}
        self._features: dict[str, FeatureRows] = {}
        self._refused: MnistDistError | None = None
        self.reset_config(config)
        try:
            self._start_backend(task)
        except MnistDistError as error:  # Raised here, it would count as the death of this process.
            self._refused = error

    def _start_backend(self, task: TrialTask) -> None:
        start_backend(task.backend)
        from mnist_dist.engines.engine import hide_gpus, use_cpus

        if not task.gpu:
            hide_gpus()  # Ray does not hide GPUs from a process that requested none
        use_cpus(int(task.cpus))

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Starts another trial in the same process."""
        self._config, self._seconds = config, 0.0
        self._trainer: Any = None
        self._epochs: Iterator[Epoch] = iter(())
        return True

    def step(self) -> dict[str, Any]:
        """Trains an epoch."""
        began = time.monotonic()
        try:
            if self._refused is not None:
                raise self._refused
            if self._trainer is None:
                self._begin()
            next(self._epochs)
            report = self._report(self._seconds + time.monotonic() - began)
        except Exception as error:  # the one place that catches: a trial's error is recorded, and the search continues
            report = self._failure(error)
        self._seconds += time.monotonic() - began
        return {REPORT: report, ACCURACY: report.accuracy, "done": report.finished}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Saves nothing: an unfinished trial runs again from its start."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""

    def cleanup(self) -> None:
        """Ends the thread that reads ahead."""
        self._epochs = iter(())

    def _begin(self) -> None:
        import keras

        from mnist_dist.training.feed import World
        from mnist_dist.training.loop import Trainer

        keras.backend.clear_session()  # frees the previous trial's models
        self._trainer = Trainer(self._train_task(), host=SilentHost(), world=World())
        self._epochs = self._trainer.epochs()

    def _train_task(self) -> Any:
        from mnist_dist.models.classifier import fetch_published_weights
        from mnist_dist.training.feed import Images
        from mnist_dist.training.phase import TrainTask
        from mnist_dist.training.precision import resolve_precision

        job: TrainJob = self._config["job"]
        prepared = self._task.prepared[self._config["architecture"]]
        records, splits = self._open_records(prepared.records), self._task.splits
        images = Images(
            pixels=records.pixels,
            labels=records.index["label"].to_numpy().astype(np.int32),
            train=splits.train,
            validation=splits.val,
            test=splits.test[:0],
        )
        heads_only = all(phase.trainable == "head" for phase in job.phases.in_order())
        features = None
        if prepared.features is not None and heads_only:
            images = features = replace(images, pixels=self._open_features(prepared.features))
        elif job.model.weights == "imagenet":
            fetch_published_weights(job.model)
        return TrainTask(
            job=job,
            spec=records.spec,
            class_names=records.class_names,
            images=images,
            features=features,
            head_alone=features is not None,
            precision=resolve_precision(job.fit.precision, backbone=job.model.backbone, gpu=self._task.gpu),
        )

    def _open_records(self, plan: RecordPlan) -> Records:
        if plan.cache.key not in self._records:
            self._records[plan.cache.key] = open_records(plan, local_dir=node_folder())
        return self._records[plan.cache.key]

    def _open_features(self, plan: FeaturePlan) -> FeatureRows:
        if plan.cache.key not in self._features:
            self._features[plan.cache.key] = open_features(plan, local_dir=node_folder())
        return self._features[plan.cache.key]

    def _report(self, seconds: float) -> Report:
        state, classifier = self._trainer.state, self._trainer.built.classifier
        best, phases = state.best, self._config["job"].phases.in_order()
        heads_only = all(phase.trainable == "head" for phase in phases)
        return Report(
            accuracy=best.val_accuracy,
            loss=best.val_loss,
            epochs=state.epochs_done,
            parameters=(classifier.head if heads_only else classifier.network).count_params(),
            seconds=seconds,
            finished=state.phase == len(phases),
            history=tuple(state.history),
        )

    def _failure(self, error: BaseException) -> Report:
        words = first_line(error)
        shown = words if isinstance(error, MnistDistError) else f"{type(error).__name__}: {words}"
        history = [] if self._trainer is None else self._trainer.state.history
        return Report(
            accuracy=0.0,
            loss=float("inf"),
            epochs=len(history),
            parameters=0,
            seconds=self._seconds,
            finished=True,
            history=tuple(history),
            error=shown,
            outage=is_outage(error) or error is self._refused,
        )


def is_outage(error: BaseException | None) -> bool:
    """Whether the store caused an error, so that running the same command again may succeed."""
    return isinstance(error, OUTAGES) or (isinstance(error, OSError) and is_service_error(error))
