"""ResNet18 with Daft, in the steps of Daft's own comparison: download, decode, transform, a class with the model,
write_parquet.

It differs in that Daft's own runner runs it, and that ONNX Runtime takes the place of torch. With the transform inside
the class instead of a column of its own, it was a fifth slower.
"""

from typing import Any

import daft
from daft import DataType

from benchmarks.peers.task import Stamps, Task

SHAPE = (3, 224, 224)


@daft.func(return_dtype=DataType.tensor(DataType.float32(), SHAPE))  # type: ignore[untyped-decorator]
def transform(pixels: Any) -> Any:
    """`uint8 [H, W, 3]` -> `float32 [3, 224, 224]`."""
    from PIL import Image

    from benchmarks.peers.onnx_model import transformed

    return transformed(Image.fromarray(pixels))


def classifier(task: Task) -> Any:
    """Maps batches of transformed images to structs of class and confidence."""
    answer = DataType.struct({"predicted_class": DataType.string(), "confidence": DataType.float32()})

    @daft.cls(max_concurrency=1)
    class Classifier:
        """Holds the model."""

        def __init__(self, task: Task) -> None:
            from benchmarks.peers.onnx_model import OnnxModel

            self._model, self._stamps = OnnxModel(task), Stamps(task)

        @daft.method.batch(return_dtype=answer, unnest=True, batch_size=task.batch_size)  # type: ignore[untyped-decorator]
        def classify(self, images: Any) -> Any:
            values = images.to_arrow().storage.flatten().to_numpy()  # to_pylist and np.stack would copy them twice.
            answers = self._model(values.reshape(len(images), *SHAPE))
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
    images = transform(files["path"].download().decode_image(mode="RGB"))
    tensors = files.select(files["path"].alias("uri"), images.alias("image"))
    tensors.select("uri", classifier(task).classify(tensors["image"])).write_parquet(task.output)


if __name__ == "__main__":
    main()
