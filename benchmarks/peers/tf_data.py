"""tf.data: TensorFlow's own threads read and decode the files for the model in the same process.

It follows tensorflow.org/guide/data_performance: parallel `map` and `prefetch`, both with AUTOTUNE.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from benchmarks.peers.model import Model
from benchmarks.peers.task import Stamps, Task


def paths_of(task: Task) -> list[str]:
    """Sorted paths of all images."""
    return sorted(str(path) for path in Path(task.images).iterdir())


def images_of(task: Task, *, in_order: bool = False) -> Any:
    """Batches of paths and pixels, `uint8 [B, H, W, 3]`.

    Args:
        task: names the folder and the batch size.
        in_order: keep the order of the paths; else batches come as they are ready.
    """
    info = task.info()
    size = (info["spec"]["height_px"], info["spec"]["width_px"])

    def read(path: Any) -> tuple[Any, Any]:
        pixels = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        return path, tf.cast(tf.round(tf.image.resize(pixels, size)), tf.uint8)

    paths = tf.data.Dataset.from_tensor_slices(paths_of(task))
    images = paths.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=in_order)
    return images.batch(task.batch_size).prefetch(tf.data.AUTOTUNE)


def main() -> None:
    """Classifies all images and writes the table at the end."""
    task = Task.from_command_line()
    model, stamps = Model(task), Stamps(task)
    batches = []
    for paths, pixels in images_of(task):
        answers = model(pixels)
        uris = [path.decode() for path in paths.numpy()]
        batches.append(
            pa.table({"uri": uris, "predicted_class": answers.predicted_class, "confidence": answers.confidence})
        )
        stamps.add(len(uris))
    Path(task.output).mkdir()
    pq.write_table(pa.concat_tables(batches), Path(task.output) / "part-0.parquet")


if __name__ == "__main__":
    main()
