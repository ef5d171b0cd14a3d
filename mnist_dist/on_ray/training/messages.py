"""The messages between driver and workers of the training job. Imports no TensorFlow, which the driver must not."""

from dataclasses import dataclass
from typing import Any

from mnist_dist.config import KerasBackend, TrainJob
from mnist_dist.data.records import RecordPlan
from mnist_dist.data.splits import Splits
from mnist_dist.errors import MnistDistError
from mnist_dist.store.lock import Fence
from mnist_dist.training.features import FeaturePlan

UNTESTED = "untested"
"""The folder of a run that holds its bundle before the test, where that is kept."""


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """The input that the driver gives each worker."""

    job: TrainJob
    records: RecordPlan
    """The plan of the decoded records."""
    splits: Splits
    features: FeaturePlan | None
    """The plan of computed features of training and validation images, for phases that train only the head."""
    fingerprint: str
    run: str
    """URI of the run's folder."""
    fence: Fence
    """The driver's lock of the run."""
    checkpoint: str | None
    """URI of the checkpoint of an earlier attempt, or None."""
    board: Any
    backend: KerasBackend
    cpus: float
    gpu: bool
    began_at: float
    """When the driver started, s since the Unix epoch."""
    command: str
    """The command as typed, for the report."""
    title: str | None = None
    """Title of the report. None: the run's name."""
    steps_limit: int | None = None
    """The most steps per epoch and batches per evaluation, for a dry run or a plan; these write no bundle."""
    validated_only: bool = False
    """Train and validate, but leave the test and the bundle to a later call for the same run."""
    keeps_untested: bool = False
    """With `validated_only`: write a bundle that was not tested, from which the run may be combined with others."""


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What rank 0 returns: exactly one of the three is set."""

    error: MnistDistError | None = None
    stopped: bool = False
    metrics: dict[str, Any] | None = None
