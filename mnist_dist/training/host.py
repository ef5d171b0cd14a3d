"""The interface between the training loop and whatever runs it. Imports neither TensorFlow nor Ray."""

from dataclasses import dataclass
from typing import Literal, Protocol

from mnist_dist.models.history import Epoch
from mnist_dist.training.checkpoints import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Position:
    """The progress of a run, for display: numbers start at 1."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_s: float


Split = Literal["validation", "test"]
"""What a finished network is measured on."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How far the finished network is measured, for display."""

    split: Split
    done: int
    images: int


class MeasuringStopped(Exception):
    """The host asked to stop while the finished network was measured; a resumed run measures it again."""


class Host(Protocol):
    """The object that runs the loop: it receives progress and checkpoints."""

    def progress(self, position: Position) -> bool:
        """Receives the position; returns True to stop after the next call. Called often, so it must be quick."""

    def epoch_ended(self, epoch: Epoch) -> None:
        """Receives a finished epoch."""

    def measured(self, progress: Measured) -> bool:
        """Receives how far the finished network is measured; returns True to stop. Called after each batch."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Saves a checkpoint. Every worker calls this in the same order with the same state."""


class SilentHost:
    """A `Host` that shows and saves nothing."""

    def progress(self, position: Position) -> bool:
        return False

    def epoch_ended(self, epoch: Epoch) -> None:
        pass

    def measured(self, progress: Measured) -> bool:
        return False

    def save(self, checkpoint: Checkpoint) -> None:
        pass
