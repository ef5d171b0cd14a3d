"""The minimum of any job on Ray: start Ray, load the model and classify one batch."""

import ray

from benchmarks.peers.model import Model
from benchmarks.peers.task import Task


def main() -> None:
    """Starts Ray, classifies one batch and ends."""
    task = Task.from_command_line()
    ray.init(address="local", include_dashboard=False)
    model = Model(task)
    model.probabilities(model.noise(task.batch_size))


if __name__ == "__main__":
    main()
