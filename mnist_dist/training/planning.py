"""The forecast of a training from a run on a sample.

Owns: the measurement of epochs and the arithmetic. Does not own: running the sample (`on_ray/training/plan.py`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from mnist_dist.config import DataConfig, TrainJob
from mnist_dist.models.history import Epoch
from mnist_dist.training.checkpoints import Checkpoint
from mnist_dist.training.host import Host, Measured, Position


@dataclass(kw_only=True)
class EpochTimes:
    """Durations of the parts of an epoch, s."""

    phase: str
    steps: int
    train_s: float
    validation_s: float = 0.0
    save_s: float = 0.0


class TimedHost:
    """A `Host` that forwards everything to another host and measures each epoch.

    Args:
        host: receives everything.
        clock: returns the time, s.
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

    def measured(self, progress: Measured) -> bool:
        return self._host.measured(progress)

    def save(self, checkpoint: Checkpoint) -> None:
        began = self._clock()
        self._host.save(checkpoint)
        self._began = self._clock()
        if self.epochs:
            self.epochs[-1].save_s = self._began - began


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Number of images in each split."""

    train: int
    validation: int
    test: int

    @property
    def images(self) -> int:
        return self.train + self.validation + self.test


def sizes_of(given: pa.ChunkedArray, data: DataConfig) -> Sizes:
    """The number of images in each split, from the splits named in the data. Includes unreadable images."""
    counts = {item["values"]: item["counts"] for item in given.value_counts().to_pylist()}
    val, test = counts.get("val", 0), counts.get("test", 0)
    rest = len(given) - val - test
    new_test = 0 if test else round(rest * data.test_fraction)
    new_val = 0 if val else round(rest * data.validation_fraction)
    return Sizes(train=rest - new_val - new_test, validation=val + new_val, test=test + new_test)


@dataclass(frozen=True, kw_only=True)
class PhaseForecast:
    """The forecast of one phase."""

    name: str
    epochs: int
    steps: int
    """Steps per epoch."""
    images_per_s: float
    epoch_s: float
    """Duration of an epoch with validation and checkpoint, s."""
    seconds: float


def forecast_phases(
    job: TrainJob, epochs: Sequence[EpochTimes], *, sizes: Sizes, validated: int
) -> list[PhaseForecast]:
    """Forecasts each phase, without early stopping.

    Args:
        job: the job with its full number of epochs.
        epochs: times of the last epoch of each phase on the sample.
        sizes: sizes of the splits of all data.
        validated: number of validation images per epoch on the sample.
    """
    steps = sizes.train // job.fit.global_batch
    forecasts = []
    for phase, epoch in zip(job.phases.in_order(), epochs, strict=True):
        epoch_s = epoch.train_s / epoch.steps * steps + epoch.validation_s / validated * sizes.validation + epoch.save_s
        forecasts.append(
            PhaseForecast(
                name=phase.name,
                epochs=phase.epochs,
                steps=steps,
                images_per_s=epoch.steps * job.fit.global_batch / epoch.train_s,
                epoch_s=epoch_s,
                seconds=phase.epochs * epoch_s,
            )
        )
    return forecasts


def overall_images_per_s(forecasts: Sequence[PhaseForecast]) -> float:
    """Speed over all phases, without validation and checkpoints: a run's result calls it `images_per_s`."""
    steps = [forecast.epochs * forecast.steps for forecast in forecasts]
    return sum(steps) / sum(count / forecast.images_per_s for count, forecast in zip(steps, forecasts, strict=True))
