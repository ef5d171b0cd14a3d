"""The labelled images that judge a combination, and what is measured on them.

Owns: reading them from decoded records, and the metrics. Does not own: which images they are (`on_ray/combining`).
"""

# n = labelled images, b = images of a call, K = classes

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnist_dist.data.records import RecordPlan, open_records
from mnist_dist.images.pixels import Pixels

Predict = Callable[[Pixels], npt.NDArray[np.float32]]
"""`uint8 [b, H, W, C]` -> probabilities `float32 [b, K]`."""


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images of one split, on which no member was trained; plain data that any process can use."""

    records: RecordPlan
    """The plan of the decoded records."""
    rows: npt.NDArray[np.int64]
    """`int64 [n]`: their rows."""
    fingerprint: str
    """Identifies all images of the data."""
    local_dir: Path
    """Folder on the node, used if the storage is remote."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model on these images."""

    accuracy: float
    """0-1."""
    loss: float
    """Mean cross-entropy, nats."""


class Judge:
    """Measures models on labelled images.

    Args:
        images: the images.
        batch_size: images per call.
        report: called after each batch, with the number of images in it.
    """

    def __init__(self, images: LabelledImages, *, batch_size: int, report: Callable[[int], None]) -> None:
        self._rows, self._batch_size, self._report = images.rows, batch_size, report
        records = open_records(images.records, local_dir=images.local_dir)
        self._pixels, self._labels = records.pixels, records.index["label"].to_numpy()

    def measure(self, predict: Predict) -> Measured:
        """The accuracy and the loss of a model."""
        hits, loss = 0, 0.0
        for rows in self._batches():
            probabilities, labels = predict(self._pixels[rows]), self._labels[rows]
            hits += int((probabilities.argmax(axis=1) == labels).sum())
            of_truth = probabilities[np.arange(len(rows)), labels].astype(np.float64)
            loss -= float(np.log(np.maximum(of_truth, np.finfo(np.float32).tiny)).sum())
            self._report(len(rows))
        return Measured(accuracy=hits / len(self._rows), loss=loss / len(self._rows))

    def _batches(self) -> Iterator[npt.NDArray[np.int64]]:
        for start in range(0, len(self._rows), self._batch_size):
            yield self._rows[start : start + self._batch_size]
