"""The history of a training run: one `Epoch` per epoch, and how they are written to `history.csv`."""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields


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
