"""The history of a training: one `Epoch` for each epoch, and their form as `history.csv`."""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What a finished epoch came to."""

    epoch: int
    """Over all phases, from 1."""
    phase: str
    loss: float
    """Mean cross-entropy over the epoch's steps, nats; so is `val_loss`, after the epoch."""
    accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    """Of the epoch's last step."""


def history_csv(history: Iterable[Epoch]) -> bytes:
    """The history as CSV, one line an epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[field.name for field in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    return text.getvalue().encode()
