"""The history of a training run: one `Epoch` per epoch, and how they are written to `history.csv` and read back."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields

from mnist_dist.errors import DataError

HISTORY_FILE = "history.csv"


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The metrics of a finished epoch."""

    epoch: int
    """Number of the epoch, counted from 1 over all phases."""
    phase: str
    loss: float
    """Mean cross-entropy over the epoch's steps, nats. `val_loss` is the same after the epoch, on validation images."""
    accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    """The rate of the epoch's last step."""
    val_mean_average_precision: float | None = None
    """Of validation images that have any number of classes (mAP); the accuracies are then the share of images whose
    classes are exactly those predicted. None: an image has one class."""

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers that there are, by name."""
        return {name: value for name, value in asdict(self).items() if name != "phase" and value is not None}

    @property
    def score(self) -> float:
        """What is to be large on validation images: their mAP where they have any number of classes, else accuracy."""
        return self.val_accuracy if self.val_mean_average_precision is None else self.val_mean_average_precision

    @property
    def score_name(self) -> str:
        """What `score` is, in words."""
        return "accuracy" if self.val_mean_average_precision is None else "mAP"


def history_csv(history: Iterable[Epoch]) -> bytes:
    """The history as CSV, one line per epoch."""
    text, rows = io.StringIO(), [{"phase": epoch.phase, **epoch.metrics} for epoch in history]
    used = {field.name for field in fields(Epoch) if field.default is MISSING}.union(*rows)
    names = [field.name for field in fields(Epoch) if field.name in used]
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_history(data: bytes, *, uri: str) -> list[Epoch]:
    """The epochs of a CSV file that `history_csv` wrote.

    Args:
        data: the file.
        uri: where it comes from, for messages.

    Raises:
        DataError: a column is missing, or a value is no number.
    """
    try:
        return [_epoch(row) for row in csv.DictReader(io.StringIO(data.decode()))]
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(f"{uri} is not the history of a run: {err!r}") from err


def _epoch(row: Mapping[str, str]) -> Epoch:
    needed = {field.name for field in fields(Epoch) if field.default is MISSING}
    names = [field.name for field in fields(Epoch) if field.name in {*row, *needed} - {"epoch", "phase"}]
    return Epoch(epoch=int(row["epoch"]), phase=row["phase"], **{name: float(row[name]) for name in names})
