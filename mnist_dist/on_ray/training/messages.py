"""What driver and workers of the training job hand each other. Loads no TensorFlow, as the driver must not."""

from dataclasses import dataclass
from typing import Any

from mnist_dist.config import TrainJob
from mnist_dist.data.records import RecordPlan
from mnist_dist.data.splits import Splits
from mnist_dist.errors import MnistDistError
from mnist_dist.training.features import FeaturePlan


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What the driver hands to each worker."""

    job: TrainJob
    records: RecordPlan
    """Of the finished records."""
    splits: Splits
    features: FeaturePlan | None
    """Of the finished features of training and validation images, for phases that train the head alone."""
    fingerprint: str
    run: str
    """URI of the run's folder."""
    checkpoint: str | None
    """URI of the checkpoint of an earlier attempt, or None."""
    board: Any
    cpus: float
    gpu: bool
    began_at: float
    """s since the epoch."""
    command: str
    """That was typed, for the report."""
    steps_limit: int | None = None
    """At most so many steps an epoch, and batches an evaluation, for a dry run or a plan, which leave no bundle."""
    validated_only: bool = False
    """Train and validate; leave the test and the bundle to a later run of the same job."""


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What rank 0 hands back: one of the three."""

    error: MnistDistError | None = None
    stopped: bool = False
    metrics: dict[str, Any] | None = None
