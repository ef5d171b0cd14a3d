"""A frozen backbone's outputs, computed once and shared by every run and trial that trains a head on them.

Owns: what the outputs depend on (the key), computing a shard, and reading the outputs by record. Does not own: the
cache they lie in (`data/cache.py`), who computes which shard where (`on_ray/data`), or the images (`data/records.py`).

A shard has one column, `features`, of float16 or float32. The key covers the pixels and their order, so features are
never used for other images.
"""

# n = covered rows, b = batch, D = features of an image

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.config import FeatureType, ModelConfig
from mnist_dist.data.cache import Cache, ShardRows, column_of
from mnist_dist.data.records import RecordPlan
from mnist_dist.errors import ConfigError
from mnist_dist.models.backbones import find_backbone
from mnist_dist.models.bundle import BUNDLE_FILE
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute, join
from mnist_dist.training.feed import Rows

BATCH_SIZE = 32
"""Images per call: VGG16 at 224 px then takes about 2 GB."""
_FORMAT_VERSION = 2
_SHARD_ROWS = 256  # the work lost by a kill: VGG16 on two cores takes 10 to 16 s for this many


@dataclass(frozen=True, kw_only=True)
class FeaturePlan:
    """Which features to compute for which images, and where they are cached. Can be sent to any process."""

    cache: Cache
    records: RecordPlan
    """The plan of the decoded images."""
    rows: npt.NDArray[np.int64]
    """`int64 [n]`, the covered records in order; each is one row of the cache."""
    model: ModelConfig
    precision: Literal["float32", "bfloat16"]
    """Precision of the backbone's arithmetic."""
    stored_as: FeatureType
    seed: int
    """Seed of the backbone's initial weights."""

    def rows_of(self, shard: int) -> npt.NDArray[np.int64]:
        """The records of a shard."""
        return self.rows[self.cache.rows_of(shard)]


def plan_features(
    model: ModelConfig,
    *,
    records: RecordPlan,
    index: pa.Table,
    rows: npt.NDArray[np.int64],
    precision: Literal["float32", "bfloat16"],
    stored_as: FeatureType,
    seed: int,
    root: str,
) -> FeaturePlan:
    """Plans the features of some records.

    Args:
        model: the backbone, its weights, input size and pooling; the head does not matter.
        records: the plan of the decoded images.
        index: the index of these records.
        rows: the requested records, in any order.
        precision: precision of the backbone's arithmetic.
        stored_as: type of the stored values.
        seed: seed of the initial weights; used only if `model.weights` is `none`.
        root: folder or bucket prefix of the job.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: a weights file cannot be read.
    """
    rows = np.sort(rows)
    backbone_alone = replace(model, hidden_units=0, dropout=None, weights="none")
    facts = {
        "version": _FORMAT_VERSION,
        "pixels": hashlib.sha256("".join(index["digest"].take(pa.array(rows)).to_pylist()).encode()).hexdigest(),
        "spec": asdict(records.spec),
        "model": asdict(backbone_alone),
        "weights": _weights_identity(model, seed=seed),
        "precision": precision,
        "stored_as": stored_as,
    }
    cache = Cache(
        what="features",
        storage=absolute(root),
        key=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        rows=len(rows),
        min_shard_rows=_SHARD_ROWS,
    )
    return FeaturePlan(
        cache=cache, records=records, rows=rows, model=model, precision=precision, stored_as=stored_as, seed=seed
    )


def _weights_identity(model: ModelConfig, *, seed: int) -> str:
    if model.weights == "none":
        return f"seed {seed}"
    if model.weights == "imagenet":
        return str(find_backbone(model.backbone).weights_published)
    is_file = model.weights.endswith((".h5", ".hdf5"))
    uri = model.weights if is_file else join(model.weights, BUNDLE_FILE)
    return hashlib.sha256(ANYWHERE.read_bytes(uri)).hexdigest()


class Extractor:
    """The frozen backbone of a plan, ready to compute its shards. Loads TensorFlow.

    Args:
        plan: the result of `plan_features`.
        pixels: pixels of the records, `uint8 [N, H, W, C]`.

    Raises:
        WeightsError: the weights are missing or do not fit.
    """

    def __init__(self, plan: FeaturePlan, *, pixels: Rows) -> None:
        from mnist_dist.engines.engine import compile_model
        from mnist_dist.models.classifier import build_classifier

        self._plan, self._pixels = plan, pixels
        spec, num_classes = plan.records.spec, len(plan.records.class_names)
        classifier = build_classifier(
            plan.model, spec=spec, num_classes=num_classes, precision=plan.precision, seed=plan.seed
        )
        self._call = compile_model(classifier.features, batch_size=BATCH_SIZE)

    def store(self, shard: int) -> None:
        """Computes a shard and stores it in the cache.

        Raises:
            ConfigError: a feature is not finite, or too large for float16.
            PermissionError, ServiceError, StorageError: see `store.base`.
        """
        plan = self._plan
        features = self._features(plan.rows_of(shard))
        with np.errstate(over="ignore"):
            stored = features.astype(plan.stored_as)
        if not np.isfinite(features).all():
            raise ConfigError(
                f"{plan.model.backbone} produces features that are not finite. Received: weights={plan.model.weights!r}"
            )
        if not np.isfinite(stored).all():
            raise ConfigError(
                f"the features of {plan.model.backbone} reach {np.abs(features).max():.3g}, more than {plan.stored_as} "
                "holds. Use --feature-type float32 or --no-feature-cache."
            )
        plan.cache.put(shard, pa.table({"features": column_of(stored)}))

    def _features(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        parts = []
        for start in range(0, len(rows), BATCH_SIZE):
            batch = self._pixels[rows[start : start + BATCH_SIZE]]
            padded = np.concatenate([batch, np.zeros((BATCH_SIZE - len(batch), *batch.shape[1:]), np.uint8)])
            parts.append(np.asarray(self._call(padded)[0], np.float32)[: len(batch)])
        return np.concatenate(parts)


class FeatureRows:
    """Features by record: `rows[records]` is `[*records.shape, D]` (see `feed.Rows`). Raises IndexError for a record
    that is not covered.

    Args:
        records: `int64 [n]`, the covered records, ascending.
        features: their features, `[n, D]`.
    """

    def __init__(self, records: npt.NDArray[np.int64], features: Rows) -> None:
        self._records, self._features = records, features

    @property
    def shape(self) -> tuple[int, ...]:
        """`[number of the last covered record + 1, D]`."""
        return int(self._records[-1]) + 1, self._features.shape[1]

    def __getitem__(self, records: npt.NDArray[np.integer[Any]], /) -> npt.NDArray[Any]:
        places = np.searchsorted(self._records, records)
        covered = self._records[np.minimum(places, len(self._records) - 1)] == records
        if not np.all(covered):
            raise IndexError(f"records without features, such as {np.extract(~covered, records)[0]}")
        return self._features[places]


def open_features(plan: FeaturePlan, *, local_dir: Path) -> FeatureRows:
    """Opens computed features. Features on S3 are downloaded once per node.

    Raises:
        DataError: the features are missing, damaged or not those of the plan.
        ConfigError: the node's disk has too little space.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    return FeatureRows(plan.rows, ShardRows(plan.cache.on_node(local_dir).values("features")))
