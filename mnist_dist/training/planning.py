"""What a training will take, from how the run itself went on a sample: the times of its epochs, and the arithmetic.

Does not own: running the sample (`on_ray/training/plan.py`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mnist_dist.config import TrainJob
from mnist_dist.models.history import Epoch
from mnist_dist.training.checkpoints import Checkpoint
from mnist_dist.training.host import Host, Position


@dataclass(kw_only=True)
class EpochTimes:
    """How long the parts of an epoch took, s."""

    phase: str
    steps: int
    train_s: float
    validation_s: float = 0.0
    save_s: float = 0.0


class TimedHost:
    """A `Host` that passes everything on to another one, and notes how long each epoch took.

    Args:
        host: gets everything.
        clock: gives s.
    """

    def __init__(self, host: Host, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._host, self._clock = host, clock
        self._began = self._last = clock()
        self._position: Position | None = None
        self.epochs: list[EpochTimes] = []

    def progress(self, position: Position) -> bool:
        self._position, self._last = position, self._clock()
        return self._host.progress(position)

    def epoch_ended(self, epoch: Epoch) -> None:
        assert self._position is not None
        self.epochs.append(
            EpochTimes(
                phase=epoch.phase,
                steps=self._position.steps,
                train_s=self._last - self._began,
                validation_s=self._clock() - self._last,
            )
        )
        self._host.epoch_ended(epoch)

    def save(self, checkpoint: Checkpoint) -> None:
        began = self._clock()
        self._host.save(checkpoint)
        self._began = self._clock()
        if self.epochs:
            self.epochs[-1].save_s = self._began - began


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Images of each split."""

    train: int
    validation: int
    test: int

    @property
    def images(self) -> int:
        return self.train + self.validation + self.test


@dataclass(frozen=True, kw_only=True)
class PhaseForecast:
    """What one phase will take."""

    name: str
    epochs: int
    steps: int
    """Of an epoch."""
    images_per_s: float
    epoch_s: float
    """With validation and checkpoint."""
    seconds: float


def forecast_phases(
    job: TrainJob, epochs: Sequence[EpochTimes], *, sizes: Sizes, validated: int
) -> list[PhaseForecast]:
    """What each phase will take, if no early stopping ends it.

    Args:
        job: with the epochs that were asked for.
        epochs: of the sample, the last one of each phase.
        sizes: of all of the data.
        validated: images that an epoch of the sample was validated on.
    """
    steps = sizes.train // job.fit.batch_size
    found = []
    for phase, epoch in zip(job.phases.phases(), epochs, strict=True):
        epoch_s = epoch.train_s / epoch.steps * steps + epoch.validation_s / validated * sizes.validation + epoch.save_s
        found.append(
            PhaseForecast(
                name=phase.name,
                epochs=phase.epochs,
                steps=steps,
                images_per_s=epoch.steps * job.fit.batch_size / epoch.train_s,
                epoch_s=epoch_s,
                seconds=phase.epochs * epoch_s,
            )
        )
    return found


def overall_images_per_s(forecasts: Sequence[PhaseForecast]) -> float:
    """Speed over all phases, without validation and checkpoints: what a run's result calls `images_per_s`."""
    steps = [found.epochs * found.steps for found in forecasts]
    return sum(steps) / sum(count / found.images_per_s for count, found in zip(steps, forecasts, strict=True))
