"""The leaderboard of a search: one row per trial, best first, with the Pareto front of accuracy and speed.

Accuracy and loss are those of the validation images; speed is that of scoring, measured once per architecture.
"""

import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mnist_dist.tuning.space import Architecture
from mnist_dist.tuning.trials import Trial

PARAMETERS = {
    "trained": pa.string(),
    "hidden_units": pa.int32(),
    "dropout": pa.float64(),
    "optimizer": pa.string(),
    "learning_rate": pa.float64(),
    "weight_decay": pa.float64(),
    "label_smoothing": pa.float64(),
    "augmentation": pa.string(),
    "batch_size": pa.int32(),
    "cut_point": pa.string(),
    "fine_tune_learning_rate": pa.float64(),
}
OF_SPACE_FILES = {
    "momentum": pa.float64(),
    "schedule": pa.string(),
    "warmup_steps": pa.int32(),
    "clip_norm": pa.float64(),
    "class_weights": pa.string(),
    "sampling": pa.string(),
    "rand_augment_ops": pa.int32(),
    "rand_augment_magnitude": pa.int32(),
    "random_erasing": pa.float64(),
    "mixup": pa.float64(),
    "cutmix": pa.float64(),
    "ema_decay": pa.float64(),
    "layer_decay": pa.float64(),
    "plateau_patience": pa.int32(),
    "plateau_factor": pa.float64(),
    "early_stopping_patience": pa.int32(),
    "seed": pa.int32(),
}
"""What trials draw only where a space file says so."""
SCHEMA = pa.schema(
    [
        ("rank", pa.int32()),
        ("trial", pa.int32()),
        ("status", pa.string()),
        ("val_accuracy", pa.float64()),
        ("val_loss", pa.float64()),
        ("finalist_val_accuracy", pa.float64()),
        ("finalist_val_loss", pa.float64()),
        ("winner", pa.bool_()),
        ("pareto", pa.bool_()),
        ("ms_per_image", pa.float64()),
        ("parameters", pa.int64()),
        ("epochs", pa.int32()),
        ("train_s", pa.float64()),
        ("ended_s", pa.float64()),
        ("error", pa.string()),
        ("architecture", pa.string()),
        ("backbone", pa.string()),
        ("alpha", pa.float64()),
        ("image_size_px", pa.int32()),
        ("pooling", pa.string()),
        *PARAMETERS.items(),
        *OF_SPACE_FILES.items(),
    ]
)
"""Columns of the Parquet file. `parameters`: of the whole network. `train_s`: seconds. `ended_s`: how long
the search had worked when the trial ended, s. `pareto`: no other trial is as
accurate and as fast."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The speed and size of an architecture when it scores."""

    ms_per_image: float
    backbone_parameters: int


def make_leaderboard(
    trials: Iterable[Trial],
    *,
    architectures: Mapping[int, Architecture],
    speeds: Mapping[str, Speed],
    finalists: Mapping[int, Trial],
    winner: int | None,
) -> pa.Table:
    """The leaderboard as a table of `SCHEMA`.

    Args:
        trials: all trials.
        architectures: the architecture of each trial, by the trial's number.
        speeds: the measured speeds, by the architecture's name.
        finalists: the trained finalists, by number.
        winner: number of the winner, or None.
    """
    ordered = sorted(trials, key=lambda trial: (trial.status == "failed", *trial.rank))
    front = pareto_front(
        {
            trial.number: (trial.val_accuracy, 1 / speeds[name].ms_per_image)
            for trial in ordered
            if trial.val_accuracy is not None and (name := architectures[trial.number].name) in speeds
        }
    )
    rows = []
    for rank, trial in enumerate(ordered, start=1):
        architecture, finalist = architectures[trial.number], finalists.get(trial.number)
        rows.append(
            {
                **_of_trial(trial, architecture, speeds.get(architecture.name)),
                "rank": rank,
                "finalist_val_accuracy": finalist.val_accuracy if finalist else None,
                "finalist_val_loss": finalist.val_loss if finalist else None,
                "winner": trial.number == winner,
                "pareto": trial.number in front,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _of_trial(trial: Trial, architecture: Architecture, speed: Speed | None) -> dict[str, Any]:
    params = {name.removeprefix(f"{architecture.backbone}."): value for name, value in trial.params.items()}
    parameters = trial.parameters
    if parameters is not None and params.get("trained") != "all":
        parameters = parameters + speed.backbone_parameters if speed else None
    return {
        **{name: params.get(name) for name in (*PARAMETERS, *OF_SPACE_FILES)},
        **{name: value for name, value in asdict(architecture).items() if name != "weights"},
        "architecture": architecture.name,
        "trial": trial.number,
        "status": trial.status,
        "val_accuracy": trial.val_accuracy,
        "val_loss": trial.val_loss,
        "ms_per_image": speed.ms_per_image if speed else None,
        "parameters": parameters,
        "epochs": trial.epochs,
        "train_s": trial.seconds,
        "ended_s": trial.ended_s,
        "error": trial.error,
    }


def pareto_front(points: Mapping[int, tuple[float, float]]) -> set[int]:
    """Keys of the points `(accuracy, speed)` that no other point beats in one and at least equals in the other."""
    return {
        key
        for key, (accuracy, speed) in points.items()
        if not any(a >= accuracy and s >= speed and (a > accuracy or s > speed) for a, s in points.values())
    }


def parquet_bytes(table: pa.Table) -> bytes:
    """The leaderboard as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def shown_rows(table: pa.Table, *, most: int = 10) -> list[list[str]]:
    """The best rows for a terminal, after a row of column titles."""
    lines = [["#", "trial", "accuracy", "loss", "ms/image", "parameters", "s", "status", "network", "configuration"]]
    for row in table.slice(0, most).to_pylist():
        finalist = row["finalist_val_accuracy"]
        lines.append(
            [
                f"{row['rank']}{'*' if row['pareto'] else ''}",
                f"{row['trial']}",
                f"{_number(row['val_accuracy'], '.4f')}{f' -> {finalist:.4f}' if finalist is not None else ''}",
                _number(row["val_loss"], ".4f"),
                _number(row["ms_per_image"], ".3g"),
                _number(row["parameters"], ",d"),
                _number(row["train_s"], ".1f"),
                "winner" if row["winner"] else row["status"],
                row["architecture"],
                _settings(row),
            ]
        )
    return lines


def _settings(row: Mapping[str, Any]) -> str:
    decay = f" decay {row['weight_decay']:.2g}" if row["weight_decay"] is not None else ""
    hidden = f", {row['hidden_units']} hidden" if row["hidden_units"] else ""
    dropout = f", dropout {row['dropout']:g}" if row["dropout"] else ""
    smoothing = f", smoothing {row['label_smoothing']:g}" if row["label_smoothing"] else ""
    rate = f"{row['optimizer']} {row['learning_rate']:.2g}{decay}"
    more = "".join(f", {name.replace('_', ' ')} {row[name]}" for name in OF_SPACE_FILES if row[name] is not None)
    return f"{row['trained']}, {rate}, batch {row['batch_size']}{hidden}{dropout}{smoothing}{more}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
