"""What no job on Ray can do without: Ray is started, the model loaded, one batch classified."""

import ray

from benchmarks.peers.model import Model
from benchmarks.peers.task import Task


def main() -> None:
    """Starts, and ends."""
    task = Task.from_command_line()
    ray.init(address="local", include_dashboard=False)
    model = Model(task)
    model.probabilities(model.noise(task.batch_size))


if __name__ == "__main__":
    main()
