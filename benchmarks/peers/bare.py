"""The model alone: always the same ready batch, nothing to read, nothing to write. What all others are measured by."""

from benchmarks.peers.model import Model
from benchmarks.peers.task import Task, call_again_and_again


def main() -> None:
    """Calls the model for as long as the task says."""
    task = Task.from_command_line()
    model = Model(task)
    pixels = model.noise(task.batch_size)
    call_again_and_again(lambda: model.probabilities(pixels), task)


if __name__ == "__main__":
    main()
