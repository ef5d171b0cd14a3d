"""The history of a training run: one `Epoch` per epoch, and how they are written to `history.csv` and read back."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

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


def history_csv(history: Iterable[Epoch]) -> bytes:
    """The history as CSV, one line per epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[field.name for field in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
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
    numbers = {field.name: float(row[field.name]) for field in fields(Epoch) if field.name not in ("epoch", "phase")}
    return Epoch(epoch=int(row["epoch"]), phase=row["phase"], **numbers)
