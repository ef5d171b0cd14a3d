"""ResNet18 with Ray Data, in the steps of Ray's own benchmark of image classification: the bytes of each file, Pillow
and the transform row by row, an actor with the model, write_parquet.

It differs in that ONNX Runtime takes the place of torch, and that there is no dashboard.
"""

import io
from typing import Any

import ray

from benchmarks.peers.task import Stamps, Task


def transform(row: dict[str, Any]) -> dict[str, Any]:
    """Decodes and transforms an image."""
    from PIL import Image

    from benchmarks.peers.onnx_model import transformed

    return {"uri": row["path"], "image": transformed(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))}


class Classifier:
    """Holds the model."""

    def __init__(self, task: Task) -> None:
        from benchmarks.peers.onnx_model import OnnxModel

        self._model, self._stamps = OnnxModel(task), Stamps(task)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        answers = self._model(batch["image"])
        self._stamps.add(len(batch["uri"]))
        return {"uri": batch["uri"], "predicted_class": answers.predicted_class, "confidence": answers.confidence}


def main() -> None:
    """Classifies all images on its own Ray."""
    task = Task.from_command_line()
    ray.init(address="local", include_dashboard=False)
    files = ray.data.read_binary_files(task.images, include_paths=True)
    files.map(transform).map_batches(
        Classifier,
        fn_constructor_args=(task,),
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=task.batch_size,
    ).write_parquet(task.output)


if __name__ == "__main__":
    main()
