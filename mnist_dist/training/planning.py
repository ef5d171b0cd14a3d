"""How fast each phase of a training trains, and what all of it will take.

Owns: a host that stops the clock, running each phase for some seconds, and the arithmetic. Does not own: the loop
(`loop`), whose own count of images and seconds is used, or where this runs (`on_ray/training/plan_worker.py`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mnist_dist.config import TrainJob
from mnist_dist.training.checkpoints import Checkpoint, State
from mnist_dist.training.host import Host, Position

if TYPE_CHECKING:
    from mnist_dist.training.loop import Trainer  # loads Keras, which a driver never does

PHASE_S = 10.0  # that each phase is trained for
LEAST_CALLS = 6  # of the step; the first two, which trace it and choose how many steps later ones take, do not count
ENDLESS_EPOCHS = 1_000_000  # so that a phase ends by the clock


@dataclass(frozen=True, kw_only=True)
class PhasePace:
    """What one phase was measured to do."""

    name: str
    images_per_s: float
    start_s: float
    """To the end of the first call, which traces the step."""
    validation_image_s: float | None
    """Of validation, an image; None: no epoch came to its end."""
    save_s: float
    """Of a checkpoint."""
    measured_s: float


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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Images of each split."""

    train: int
    validation: int
    test: int


def endless(job: TrainJob) -> TrainJob:
    """The job with phases that end by the clock alone."""
    phases = replace(job.phases, epochs=(ENDLESS_EPOCHS,))
    return replace(job, phases=phases, fit=replace(job.fit, early_stopping_patience=None, plateau_patience=None))


class Stopwatch:
    """A `Host` that passes on to another one, notes how long things take, and wishes to stop after some seconds.

    Args:
        host: gets everything.
        seconds: from the first call's end on.
        clock: gives s.
    """

    def __init__(self, host: Host, *, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._host, self._seconds, self._clock = host, seconds, clock
        self.wished = False
        """The other host wished to stop."""
        self.begin()

    def begin(self) -> None:
        """A phase begins."""
        self._began, self._first, self._last, self._calls = self._clock(), 0.0, 0.0, 0
        self.start_s = self.save_s = 0.0
        self.validation_s: float | None = None

    def progress(self, position: Position) -> bool:
        self.wished = self._host.progress(position) or self.wished
        self._last, self._calls = self._clock(), self._calls + 1
        if self._calls == 1:
            self._first, self.start_s = self._last, self._last - self._began
        is_over = self._calls >= LEAST_CALLS and self._last - self._first >= self._seconds
        return self.wished or is_over

    def epoch_ended(self, line: dict[str, Any]) -> None:
        self.validation_s = self._clock() - self._last
        self._host.epoch_ended(line)

    def save(self, checkpoint: Checkpoint) -> None:
        began = self._clock()
        self._host.save(checkpoint)
        self.save_s = self._clock() - began


def measure_phase(trainer: "Trainer", watch: Stopwatch, *, phase: int) -> PhasePace:
    """Trains a phase until the stopwatch wishes to stop.

    Args:
        trainer: of an `endless` job; with the stopwatch as its host.
        watch: that host.
        phase: 0 for the first one.
    """
    before = trainer.state
    # later numbers than those of the phase before, by which checkpoints are called
    trainer.state = State(phase=phase, global_step=before.global_step, epochs_done=before.epochs_done)
    began = time.perf_counter()
    watch.begin()
    trainer.run()
    state, images = trainer.state, len(trainer.task.images.validation)
    return PhasePace(
        name=trainer.task.job.phases.phases()[phase].name,
        images_per_s=state.timed_images / max(state.timed_s, 1e-9),
        start_s=watch.start_s,
        validation_image_s=None if watch.validation_s is None else watch.validation_s / images,
        save_s=watch.save_s,
        measured_s=time.perf_counter() - began,
    )


def forecast_phases(job: TrainJob, paces: Sequence[PhasePace], *, sizes: Sizes) -> list[PhaseForecast]:
    """What each phase will take, if no early stopping ends it.

    Args:
        job: with the epochs that were asked for.
        paces: of its phases.
        sizes: of all of the data.
    """
    batch, steps = job.fit.batch_size, sizes.train // job.fit.batch_size
    found = []
    for phase, pace in zip(job.phases.phases(), paces, strict=True):
        # predicting is cheaper than training, so what was not measured is put rather too high
        validation_s = sizes.validation * (pace.validation_image_s or 1 / pace.images_per_s)
        epoch_s = steps * batch / pace.images_per_s + validation_s + pace.save_s
        found.append(
            PhaseForecast(
                name=phase.name,
                epochs=phase.epochs,
                steps=steps,
                images_per_s=pace.images_per_s,
                epoch_s=epoch_s,
                seconds=pace.start_s + phase.epochs * epoch_s,
            )
        )
    return found


def overall_images_per_s(forecasts: Sequence[PhaseForecast]) -> float:
    """Speed over all phases, without validation and checkpoints: what a run's result calls `images_per_s`."""
    steps = [found.epochs * found.steps for found in forecasts]
    return sum(steps) / sum(count / found.images_per_s for count, found in zip(steps, forecasts, strict=True))
