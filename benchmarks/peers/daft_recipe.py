"""Daft as its docstrings show it: list, download, decode, resize, a class with the model, write_parquet.

`daft.cls` loads the model once, `daft.method.batch` takes batches (Daft 0.7), and Daft's own runner runs it.
"""

from typing import Any

import daft
from daft import DataType

from benchmarks.peers.task import Stamps, Task


def classifier(task: Task) -> Any:
    """Maps batches of pixels to structs of class and confidence."""
    spec = task.info()["spec"]
    height_px, width_px = spec["height_px"], spec["width_px"]
    answer = DataType.struct({"predicted_class": DataType.string(), "confidence": DataType.float32()})

    @daft.cls(max_concurrency=1)
    class Classifier:
        """Holds the model."""

        def __init__(self, task: Task) -> None:
            from benchmarks.peers.model import Model

            self._model, self._stamps = Model(task), Stamps(task)

        @daft.method.batch(return_dtype=answer, unnest=True, batch_size=task.batch_size)  # type: ignore[untyped-decorator]
        def classify(self, images: Any) -> Any:
            pixels = (
                images.to_arrow().storage.flatten().to_numpy()
            )  # to_pylist and np.stack would copy the pixels twice.
            answers = self._model(pixels.reshape(len(images), height_px, width_px, 3))
            self._stamps.add(len(images))
            return [
                {"predicted_class": name, "confidence": confidence}
                for name, confidence in zip(answers.predicted_class, answers.confidence.tolist(), strict=True)
            ]

    return Classifier(task)


def main() -> None:
    """Classifies all images."""
    task = Task.from_command_line()
    spec = task.info()["spec"]
    files = daft.from_glob_path(f"{task.images}/*.jpg")
    pixels = files["path"].download().decode_image(mode="RGB").resize(spec["width_px"], spec["height_px"])
    images = files.select(files["path"].alias("uri"), pixels.alias("image"))
    images.select("uri", classifier(task).classify(images["image"])).write_parquet(task.output)


if __name__ == "__main__":
    main()
