"""tf.data in front of `Model.predict`, as in keras.io/api/models/model_training_apis: what most people try first.

It disables XLA, which `predict` would choose by itself and which is many times slower on CPUs.
"""

from pathlib import Path
from typing import Any

import keras
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.peers.answers import answers_of
from benchmarks.peers.model import load_model
from benchmarks.peers.task import Stamps, Task
from benchmarks.peers.tf_data import images_of, paths_of


class NoteBatches(keras.callbacks.Callback):
    """Writes a time stamp at the end of each batch."""

    def __init__(self, stamps: Stamps) -> None:
        super().__init__()
        self._stamps = stamps

    def on_predict_batch_end(self, batch: int, logs: dict[str, Any]) -> None:
        self._stamps.add(len(logs["outputs"]))


def main() -> None:
    """Classifies all images and writes the table at the end."""
    task = Task.from_command_line()
    model = load_model(task)
    model.compile(jit_compile=False)
    pixels = images_of(task, in_order=True).map(lambda _, pixels: pixels)
    probabilities = model.predict(pixels, verbose=0, callbacks=[NoteBatches(Stamps(task))])
    answers = answers_of(probabilities, task.info()["class_names"])
    table = {"uri": paths_of(task), "predicted_class": answers.predicted_class, "confidence": answers.confidence}
    Path(task.output).mkdir()
    pq.write_table(pa.table(table), Path(task.output) / "part-0.parquet")


if __name__ == "__main__":
    main()
