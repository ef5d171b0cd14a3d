"""Prediction tables for the tests of what they are worth, made by the functions that scoring makes them with."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mnist_dist import documents
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import BundleInfo
from mnist_dist.score_config import TableConfig
from mnist_dist.scoring.commit import table_metadata
from mnist_dist.scoring.generations import Description, Plan, Summary
from mnist_dist.scoring.predictions import MARK, Mark, Outcomes, prediction_rows, prediction_schema, table_uri
from mnist_dist.store.anywhere import ANYWHERE

ALL = TableConfig()
MODEL = "model-1"


def plan_of(model_id: str = "m", *, keep_old: bool = True) -> Plan:
    """What a generation of a job without settings is."""
    began_at = "2030-01-02T00:00:00+00:00"
    return Plan(model_id=model_id, settings={}, mode="continue", keep_old=keep_old, began_at=began_at)


def write_bundle_info(folder: Path, names: Sequence[str], *, model_id: str = MODEL, **known: Any) -> str:
    """The `bundle.json` of a bundle, without its model; the folder's path."""
    folder.mkdir()
    spec = ImageSpec(height_px=10, width_px=12, channels=3)
    info = BundleInfo(**{"class_names": tuple(names), "spec": spec, "backbone": "cnn", "model_id": model_id, **known})
    documents.write(ANYWHERE, str(folder / "bundle.json"), info)
    return str(folder)


def described_by(names: Sequence[str], *, bundle: str = "models/b") -> Description:
    """What a table says of its model."""
    spec = ImageSpec(height_px=10, width_px=12, channels=3, resize="crop")
    return Description(bundle=bundle, class_names=tuple(names), resize="crop", versions={"python": "3.99"}, spec=spec)


def write_summary(table: str, *, bundle: str, model_id: str = MODEL) -> None:
    """A summary that remembers a bundle."""
    summary = Summary(
        model_id=model_id,
        settings={},
        described=described_by(("ant", "bee"), bundle=bundle),
        images_per_s=None,
        number=1,
        rows=0,
        files=(),
        statuses={},
        examples={},
    )
    documents.write(ANYWHERE, f"{table}/_tables/000001/summary.json", summary)


def scored_rows(
    uris: Sequence[str],
    probabilities: npt.NDArray[np.float32],
    class_names: Sequence[str],
    *,
    status: Sequence[str] | None = None,
    table: TableConfig = ALL,
    carried: pa.Table | None = None,
    model_id: str = MODEL,
    embeddings: npt.NDArray[np.float32] | None = None,
) -> pa.Table:
    """The rows of images with these probabilities, `[n, K]`, and embeddings, `[n, D]`."""
    words = list(status or ["ok"] * len(uris))
    return prediction_rows(
        prediction_schema(
            table,
            carried=pa.schema([]) if carried is None else carried.schema,
            class_names=class_names,
            num_features=0 if embeddings is None else embeddings.shape[1],
        ),
        uris=pa.array(list(uris), pa.string()),
        outcomes=Outcomes(
            status=words,
            error=[None if word == "ok" else f"it is {word}" for word in words],
            width=np.full(len(words), 12, np.int32),
            height=np.full(len(words), 10, np.int32),
            size_bytes=[345] * len(words),
            etag=["e"] * len(words),
            probabilities=probabilities.astype(np.float32),
            embeddings=embeddings,
        ),
        class_names=class_names,
        top_k=table.top_k,
        model_id=model_id,
        scored_at=datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC),
        carried=carried,
        thresholds=table.thresholds,
    )


def multi_label_rows(
    uris: Sequence[str],
    probabilities: npt.NDArray[np.float32],
    thresholds: Mapping[str, float],
    *,
    columns: tuple[str, ...] = (),
    **known: Any,
) -> pa.Table:
    """The rows of a multi-label table with these thresholds of its classes, whose metadata says so."""
    table = TableConfig(columns=columns, thresholds=dict(thresholds))
    rows = scored_rows(uris, probabilities, tuple(thresholds), table=table, **known)
    described = replace(described_by(tuple(thresholds)), multi_label=True, thresholds=dict(thresholds))
    return rows.replace_schema_metadata(table_metadata(described, plan_of()))


def write_scored(folder: Path, *parts: pa.Table, model_id: str = MODEL, failed: bool = False) -> str:
    """A finished table of one file for each part; its path."""
    (folder / "table").mkdir(parents=True, exist_ok=True)
    names = tuple(f"part-000001-{number:05d}.parquet" for number in range(len(parts)))
    for name, rows in zip(names, parts, strict=True):
        pq.write_table(rows, folder / "table" / name, row_group_size=7)
    rows_of_all = sum(map(len, parts))
    write_mark(str(folder), Mark(number=1, files=names, rows=rows_of_all, model_id=model_id, failed=failed))
    return str(folder)


def write_mark(output: str, mark: Mark) -> None:
    """Makes a version of the table valid."""
    documents.write(ANYWHERE, table_uri(output, mark.number, MARK), mark)


def one_hot(codes: Sequence[int], classes: int, *, confidence: float = 0.8) -> npt.NDArray[np.float32]:
    """`[n, K]`: each row certain of one class to a degree, the rest spread evenly."""
    scores = np.full((len(codes), classes), (1 - confidence) / (classes - 1), np.float32)
    scores[np.arange(len(codes)), codes] = confidence
    return scores
