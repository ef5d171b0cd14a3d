"""The model alone, always on the same ready batch: it reads and writes nothing. The baseline of all other peers."""

from benchmarks.peers.model import Model
from benchmarks.peers.task import Task, call_again_and_again


def main() -> None:
    """Calls the model for the task's number of seconds."""
    task = Task.from_command_line()
    model = Model(task)
    pixels = model.noise(task.batch_size)
    call_again_and_again(lambda: model.probabilities(pixels), task)


if __name__ == "__main__":
    main()
