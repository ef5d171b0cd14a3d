"""One checkpoint: a folder with everything a run needs to resume, and the best weights so far.

```
state.json       where to resume (phase, epoch, step), history, best epoch, state of the callbacks
weights.npz      the network's weights
optimizer.npz    the optimizer's variables
best.npz         weights of the best epoch (absent if that epoch has just ended: weights.npz holds them)
```

`state.json` is written last, and must be copied last: a folder without it is unfinished. No data iterator or random
generator is saved, because both are functions of (seed, epoch, step).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist import documents
from mnist_dist.errors import StorageError
from mnist_dist.models.history import Epoch

STATE_FILE = "state.json"
Arrays = list[npt.NDArray[Any]]


@dataclass(kw_only=True)
class State:
    """The progress of a run. Counters start at 0 and name the next phase, epoch and step."""

    phase: int = 0
    epoch: int = 0
    """Within the phase."""
    step: int = 0
    """Within the epoch."""
    epochs_done: int = 0
    """Over all phases."""
    global_step: int = 0
    epoch_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Of the unfinished epoch: loss summed over images, correct predictions, images."""
    learning_rate: float | None = None
    """The phase's rate as reduced by ReduceLROnPlateau; None: unchanged."""
    history: list[Epoch] = field(default_factory=list)
    best: Epoch | None = None
    best_is_current: bool = False
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    timed_images: int = 0
    """Images trained on in timed calls: all except each phase's first two, and those that compile."""
    timed_s: float = 0.0
    seconds: float = 0.0
    """Time from the start of the job to this checkpoint, summed over all drivers."""
    began_at: float = 0.0
    """When the driver that wrote this checkpoint started, s since the Unix epoch."""
    earlier_s: float = 0.0
    """The part of `seconds` that earlier drivers spent."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory; the arrays are in the order of the network's and the optimizer's variables."""

    state: State
    weights: Arrays
    optimizer: Arrays
    best: Arrays | None


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the files into an existing, empty folder, `state.json` last."""
    _write_arrays(folder / "weights.npz", checkpoint.weights)
    _write_arrays(folder / "optimizer.npz", checkpoint.optimizer)
    if checkpoint.best is not None and not checkpoint.state.best_is_current:
        _write_arrays(folder / "best.npz", checkpoint.best)
    (folder / STATE_FILE).write_bytes(documents.encode(checkpoint.state))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a folder that `write_checkpoint` wrote.

    Raises:
        StorageError: the checkpoint is unfinished.
        DataError: the state is damaged.
    """
    if not (folder / STATE_FILE).exists():
        raise StorageError(f"The checkpoint is unfinished: it has no {STATE_FILE}. Received: {folder}")
    state = documents.decode((folder / STATE_FILE).read_bytes(), State, uri=str(folder / STATE_FILE))
    weights = _read_arrays(folder / "weights.npz")
    best = weights if state.best_is_current else None
    if best is None and (folder / "best.npz").exists():
        best = _read_arrays(folder / "best.npz")
    return Checkpoint(state=state, weights=weights, optimizer=_read_arrays(folder / "optimizer.npz"), best=best)


def _write_arrays(path: Path, arrays: Sequence[npt.NDArray[Any]]) -> None:
    np.savez(path, allow_pickle=False, **{f"{index:05d}": array for index, array in enumerate(arrays)})


def _read_arrays(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as arrays:
        return [arrays[name] for name in sorted(arrays.files)]
