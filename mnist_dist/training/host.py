"""What the training loop needs of its surroundings, and what it tells them. Loads neither TensorFlow nor Ray."""

from dataclasses import dataclass
from typing import Protocol

from mnist_dist.models.history import Epoch
from mnist_dist.training.checkpoints import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is, for people: numbers start at 1."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_s: float


class Host(Protocol):
    """What the loop needs of whoever runs it."""

    def progress(self, position: Position) -> bool:
        """Takes note of the position; True: stop after the next call. Called often, so it must be quick."""

    def epoch_ended(self, epoch: Epoch) -> None:
        """Takes note of a finished epoch."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Keeps a checkpoint. Every worker calls it, in the same order, with the same state."""
