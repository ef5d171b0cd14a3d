"""The ONNX file alone in ONNX Runtime, always on the same ready batch: the baseline where the model is imported."""

from benchmarks.peers.onnx_model import OnnxModel
from benchmarks.peers.task import Task, call_again_and_again


def main() -> None:
    """Calls the model for the task's number of seconds."""
    task = Task.from_command_line()
    model = OnnxModel(task)
    batch = model.noise(task.batch_size)
    call_again_and_again(lambda: model.outputs(batch), task)


if __name__ == "__main__":
    main()
