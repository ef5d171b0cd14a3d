"""The model alone: always the same ready batch, nothing to read, nothing to write. What all others are measured by."""

import time

from mnist_dist.benchmarks.peers.model import Model
from mnist_dist.benchmarks.peers.task import Stamps, Task

WARM_UP_STEPS = 3


def main() -> None:
    """Calls the model for as long as the task says."""
    task = Task.from_command_line()
    model, stamps = Model(task), Stamps(task)
    pixels = model.noise(task.batch_size)
    for _ in range(WARM_UP_STEPS):
        model.probabilities(pixels)
    stamps.add(0)
    began = time.monotonic()
    while time.monotonic() - began < task.seconds:
        model.probabilities(pixels)
        stamps.add(task.batch_size)


if __name__ == "__main__":
    main()
