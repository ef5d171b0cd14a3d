"""The state of an evaluation, for listings; read from `metrics.json` in its folder (`evaluate.py`)."""

from collections.abc import Mapping
from typing import Any

from mnist_dist.evaluation.evaluate import METRICS_FILE
from mnist_dist.inventory import Folder, InventoryRow
from mnist_dist.models.bundle import REPORT_FILE

DEPTH = 2
"""Levels of folders to search: an evaluation may lie beside the table or bundle of a run."""
_KEYS = {"predictions", "model_id", "metrics", "comparison"}
_NUMBERS = ("images", "labelled", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "mean_average_precision")


def evaluation_row(folder: Folder) -> InventoryRow | None:
    """The state of an evaluation; None if the folder holds none.

    Raises:
        OSError, ValueError, TypeError, LookupError: the folder is damaged.
        ServiceError: the store failed.
    """
    document = folder.read(METRICS_FILE, dict[str, Any])
    if document is None or not document.keys() >= _KEYS:
        return None
    metrics: Mapping[str, Any] = document["metrics"]
    return InventoryRow(
        name=folder.name,
        uri=folder.uri,
        state="finished" if REPORT_FILE in folder.files else "stopped",  # The page is written last.
        progress=f"{metrics['images']:,} images",
        result=_result_in_words(metrics),
        updated_s=folder.updated_s,
        numbers={"predictions": document["predictions"], **{name: metrics.get(name) for name in _NUMBERS}},
    )


def _result_in_words(metrics: Mapping[str, Any]) -> str:
    if metrics.get("accuracy") is not None:
        return f"accuracy {metrics['accuracy']:.4f}"
    if metrics.get("mean_average_precision") is not None:
        return f"mAP {metrics['mean_average_precision']:.4f}"
    return "no labels"
