"""Keras callbacks around our own loop: which ones a run has, and the state of theirs that a checkpoint keeps.

Keras' callbacks have no `get_state`, so what EarlyStopping and ReduceLROnPlateau remember is read and set by attribute
name; a test holds the names against the installed Keras.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from mnist_dist.config import FitConfig

REMEMBERED = {
    "EarlyStopping": ("wait", "stopped_epoch", "best", "best_epoch"),
    "ReduceLROnPlateau": ("wait", "cooldown_counter", "best"),
}


def make_callbacks(config: FitConfig, *, tensorboard_folder: Path | None) -> list[keras.callbacks.Callback]:
    """The callbacks of one phase, all on validation loss; TensorBoard only where a folder is given (rank 0)."""
    callbacks: list[keras.callbacks.Callback] = []
    if config.early_stopping_patience is not None:
        callbacks.append(keras.callbacks.EarlyStopping("val_loss", patience=config.early_stopping_patience))
    if config.plateau_patience is not None:
        callbacks.append(
            keras.callbacks.ReduceLROnPlateau(
                "val_loss", factor=config.plateau_factor, patience=config.plateau_patience
            )
        )
    if tensorboard_folder is not None:
        callbacks.append(keras.callbacks.TensorBoard(str(tensorboard_folder), write_graph=False))
    return callbacks


def callback_states(callbacks: Sequence[keras.callbacks.Callback]) -> dict[str, dict[str, Any]]:
    """What the callbacks remember, as JSON values, by class name."""
    return {
        name: {key: _plain(getattr(callback, key)) for key in REMEMBERED[name]}
        for callback in callbacks
        if (name := type(callback).__name__) in REMEMBERED
    }


def restore_callbacks(callbacks: Sequence[keras.callbacks.Callback], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Sets what `callback_states` read; call it after `on_train_begin`, which resets them."""
    for callback in callbacks:
        for key, value in states.get(type(callback).__name__, {}).items():
            setattr(callback, key, value)


def history_csv(history: Sequence[Mapping[str, Any]]) -> str:
    """The history as CSV, one line an epoch."""
    text = io.StringIO()
    if history:
        writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    return text.getvalue()


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, str)) else float(value)
