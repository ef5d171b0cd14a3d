"""Keras callbacks around our own loop: which ones a run uses, and how a checkpoint keeps their state.

Keras callbacks have no `get_state`, so the state of EarlyStopping and ReduceLROnPlateau is read and set by attribute
name. A test checks these names against the installed Keras.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from mnist_dist.config import FitConfig
from mnist_dist.models.history import Epoch, history_csv
from mnist_dist.store.anywhere import ANYWHERE

REMEMBERED = {
    "EarlyStopping": ("wait", "stopped_epoch", "best", "best_epoch"),
    "ReduceLROnPlateau": ("wait", "cooldown_counter", "best"),
}


@dataclass(frozen=True, kw_only=True)
class LogFiles:
    """Where the worker of rank 0 writes its logs."""

    history: str
    """URI of the CSV file with one line per epoch so far."""
    check: Callable[[], None] = lambda: None
    """Called before each write; raises if another driver has taken over the run."""
    tensorboard: Path | None = None
    """Folder for TensorBoard's event files, or None."""


class HistoryFile(keras.callbacks.Callback):
    """Writes the whole history after each epoch, so a resumed run lists no epoch twice.

    Args:
        uri: URI of the CSV file.
        history: the epochs so far; the loop appends each epoch before this callback runs.
        check: see `LogFiles`.
    """

    def __init__(self, uri: str, history: Sequence[Epoch], *, check: Callable[[], None]) -> None:
        super().__init__()
        self._uri, self._history, self._check = uri, history, check

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Replaces the file in one step."""
        self._check()
        ANYWHERE.write_bytes(self._uri, history_csv(self._history))


def make_callbacks(
    config: FitConfig, *, files: LogFiles | None, history: Sequence[Epoch]
) -> list[keras.callbacks.Callback]:
    """The callbacks of one phase, all based on the validation loss. Only rank 0 passes `files`, and so writes logs."""
    callbacks: list[keras.callbacks.Callback] = []
    if config.early_stopping_patience is not None:
        callbacks.append(keras.callbacks.EarlyStopping("val_loss", patience=config.early_stopping_patience))
    if config.plateau_patience is not None:
        callbacks.append(
            keras.callbacks.ReduceLROnPlateau(
                "val_loss", factor=config.plateau_factor, patience=config.plateau_patience
            )
        )
    if files is not None:
        callbacks.append(HistoryFile(files.history, history, check=files.check))
    if files is not None and files.tensorboard is not None:
        callbacks.append(keras.callbacks.TensorBoard(str(files.tensorboard), write_graph=False))
    return callbacks


def callback_states(callbacks: Sequence[keras.callbacks.Callback]) -> dict[str, dict[str, Any]]:
    """The callbacks' state as JSON values, by class name."""
    return {
        name: {key: _plain(getattr(callback, key)) for key in REMEMBERED[name]}
        for callback in callbacks
        if (name := type(callback).__name__) in REMEMBERED
    }


def restore_callbacks(callbacks: Sequence[keras.callbacks.Callback], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Restores what `callback_states` read. Call it after `on_train_begin`, which resets the callbacks."""
    for callback in callbacks:
        for key, value in states.get(type(callback).__name__, {}).items():
            setattr(callback, key, value)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, str)) else float(value)
