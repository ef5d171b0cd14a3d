"""ResNet18 with Daft, in the steps of Daft's own comparison: download, decode, transform, a class with the model,
write_parquet.

It differs in that Daft's own runner runs it, ONNX Runtime takes the place of torch, and the transform is a part of the
class: as a column of its own, a tensor of 600 KB per image, it would be copied more often.
"""

from typing import Any

import daft
import numpy as np
from daft import DataType

from benchmarks.peers.task import Stamps, Task


def classifier(task: Task) -> Any:
    """Maps batches of decoded images to structs of class and confidence."""
    answer = DataType.struct({"predicted_class": DataType.string(), "confidence": DataType.float32()})

    @daft.cls(max_concurrency=1)
    class Classifier:
        """Holds the model."""

        def __init__(self, task: Task) -> None:
            from benchmarks.peers.onnx_model import OnnxModel

            self._model, self._stamps = OnnxModel(task), Stamps(task)

        @daft.method.batch(return_dtype=answer, unnest=True, batch_size=task.batch_size)  # type: ignore[untyped-decorator]
        def classify(self, images: Any) -> Any:
            from PIL import Image

            from benchmarks.peers.onnx_model import transformed

            answers = self._model(np.stack([transformed(Image.fromarray(pixels)) for pixels in images.to_pylist()]))
            self._stamps.add(len(images))
            return [
                {"predicted_class": name, "confidence": confidence}
                for name, confidence in zip(answers.predicted_class, answers.confidence.tolist(), strict=True)
            ]

    return Classifier(task)


def main() -> None:
    """Classifies all images."""
    task = Task.from_command_line()
    files = daft.from_glob_path(f"{task.images}/*.jpg")
    images = files.select(files["path"].alias("uri"), files["path"].download().decode_image(mode="RGB").alias("image"))
    images.select("uri", classifier(task).classify(images["image"])).write_parquet(task.output)


if __name__ == "__main__":
    main()
