"""Numbers the sets of classes in two multi-label tables, so that they are compared as the classes of others are.

Owns: the numbers, and the metrics of both tables over the images that are compared. Does not own: the comparison
(`comparison`), or the metrics (`multi_label`).

Memory: 4 bytes per row, as for other tables, and about 200 bytes for each distinct set of classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.evaluation.multi_label import (
    MULTI_LABEL_COLUMNS,
    SET_COLUMNS,
    MultiLabelAccumulator,
    predicted_sets,
    slices,
    true_sets,
)
from mnist_dist.evaluation.tables import Classes, ScoredTable
from mnist_dist.evaluation.uri_hashes import UriIndex, uri_hashes
from mnist_dist.sources.label_sets import joined

# n = rows of a batch, K = classes of both tables


@dataclass(frozen=True, kw_only=True)
class SetScores:
    """How good a multi-label table is on the images that are compared; see `MultiLabelMetrics`."""

    mean_average_precision: float | None
    micro_f1: float | None
    macro_f1: float | None
    exact_match: float | None
    hamming_loss: float | None


def score_pairs(first: SetScores, second: SetScores) -> Iterator[tuple[str, float | None, float | None]]:
    """The metrics of both tables by their names for display."""
    yield "mAP", first.mean_average_precision, second.mean_average_precision
    yield "micro F1", first.micro_f1, second.micro_f1
    yield "macro F1", first.macro_f1, second.macro_f1
    yield "exact match", first.exact_match, second.exact_match
    yield "Hamming loss", first.hamming_loss, second.hamming_loss


class SetCodes:
    """Numbers sets of classes in the order in which they appear; see `comparison.Codes`.

    Args:
        classes: those of both tables.
    """

    columns: tuple[str, ...] = SET_COLUMNS

    def __init__(self, classes: Classes) -> None:
        self._classes = classes
        self._codes: dict[bytes, int] = {}

    @property
    def names(self) -> Sequence[str]:
        """The sets for display."""
        return [joined(names) for names in self._sets()]

    def predicted(self, batch: pa.RecordBatch, table: ScoredTable) -> npt.NDArray[np.int32]:
        """The code of each predicted set, `int32 [n]`; -1: no prediction."""
        parts = (predicted_sets(part, table) for _, part in slices(batch, table.classes))
        return self._concatenated(self._coded(sets, known, table) for sets, known in parts)

    def confidence(self, batch: pa.RecordBatch, table: ScoredTable) -> npt.NDArray[np.float32]:
        """NaN for each row: a set has no probability of its own."""
        return np.full(len(batch), np.nan, np.float32)

    def truth(self, batch: pa.RecordBatch, labels: pa.Array, table: ScoredTable) -> npt.NDArray[np.int32]:
        """The code of each set of true classes, `int32 [n]`; -1: not known."""
        parts = (
            true_sets(labels.slice(start, len(part)), table.classes)[:2] for start, part in slices(batch, table.classes)
        )
        return self._concatenated(self._coded(sets, known, table) for sets, known in parts)

    def scores(
        self,
        table: ScoredTable,
        index: UriIndex,
        *,
        compared: npt.NDArray[np.bool_],
        truth: npt.NDArray[np.int32],
        progress: Callable[[int], None],
    ) -> SetScores:
        """The metrics of a table over the compared images.

        Args:
            table: one of the two tables, which is read again.
            index: of the images.
            compared: whether an image is compared, by its position in the index.
            truth: the code of its true classes, likewise.
            progress: called with the number of rows of each batch that was read.
        """
        accumulator, sets = MultiLabelAccumulator(table), pa.array(self._sets(), pa.list_(pa.string()))
        left = compared.copy()
        for batch in table.batches(MULTI_LABEL_COLUMNS):
            places = index.places(uri_hashes(batch["uri"]))
            rows = np.flatnonzero((places >= 0) & left[places])
            _, firsts = np.unique(places[rows], return_index=True)
            rows = rows[firsts]
            left[places[rows]] = False
            codes = truth[places[rows]]
            accumulator.add(batch.take(pa.array(rows)), sets.take(pa.array(codes, mask=codes < 0)))
            progress(len(batch))
        found = accumulator.metrics()
        return SetScores(
            mean_average_precision=found.mean_average_precision,
            micro_f1=found.micro_f1,
            macro_f1=found.macro_f1,
            exact_match=found.exact_match,
            hamming_loss=found.hamming_loss,
        )

    def _sets(self) -> list[list[str]]:
        size = len(self._classes)
        bits = (np.unpackbits(np.frombuffer(key, np.uint8), count=size) for key in self._codes)
        return [[self._classes.names[code] for code in np.flatnonzero(row)] for row in bits]

    def _coded(
        self, sets: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_], table: ScoredTable
    ) -> npt.NDArray[np.int32]:
        code_of = {name: code for code, name in enumerate(self._classes.names)}
        joint = np.zeros((len(sets), len(self._classes)), np.bool_)
        joint[:, [code_of[name] for name in table.classes.names]] = sets
        rows, inverse = np.unique(np.packbits(joint, axis=1), axis=0, return_inverse=True)
        codes = [self._codes.setdefault(row.tobytes(), len(self._codes)) for row in rows]
        return np.where(known, np.array(codes, np.int32)[inverse.ravel()], -1).astype(np.int32)

    def _concatenated(self, parts: Iterable[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
        return np.concatenate([np.zeros(0, np.int32), *parts])
