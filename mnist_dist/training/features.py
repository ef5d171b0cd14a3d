"""A frozen backbone's outputs, computed once and shared by every run and trial that trains a head on them.

Owns: what the outputs depend on (the key), computing a shard, and reading the outputs by record. Does not own: the
cache they lie in (`data/cache.py`), who computes which shard where (`on_ray/data`), which engine does
(`feature_engine`), or the images (`data/records.py`).

A shard has one column, `features`, of float16 or float32. The key covers the pixels and their order, so features are
never used for other images.
"""

# n = covered rows, b = batch, D = features of an image

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.config import FeatureType, ModelConfig
from mnist_dist.data.cache import Cache, ShardRows, column_of
from mnist_dist.data.records import RecordPlan
from mnist_dist.environment import check_keras
from mnist_dist.errors import ConfigError
from mnist_dist.images.pixels import Pixels, padded
from mnist_dist.models.backbones import Shape, backbone_shape, find_backbone, is_imported
from mnist_dist.models.bundle import BUNDLE_FILE, read_bundle_info
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

    @property
    def input_shape(self) -> Shape:
        """`(height, width, channels)` of the backbone's input."""
        spec = self.records.spec
        return backbone_shape(self.model, height_px=spec.height_px, width_px=spec.width_px, channels=spec.channels)

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
    if is_imported(model.backbone):  # known by its file, wherever that lies
        backbone_alone = replace(backbone_alone, backbone="bundle", image_size_px=None)
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
    if is_imported(model.backbone):
        return read_bundle_info(model.backbone).model_id
    if model.weights == "none":
        return f"seed {seed}"
    if model.weights == "imagenet":
        return str(find_backbone(model.backbone).weights_published)
    is_file = model.weights.endswith((".h5", ".hdf5"))
    uri = model.weights if is_file else join(model.weights, BUNDLE_FILE)
    return hashlib.sha256(ANYWHERE.read_bytes(uri)).hexdigest()


class FeatureCall(Protocol):
    """A loaded backbone."""

    @property
    def batch_size(self) -> int:
        """Largest number of images per call."""

    @property
    def calls_at_once(self) -> int:
        """Number of threads that may, and should, call it at the same time."""

    def __call__(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """The features `float32 [b, D]` of up to `batch_size` images, `uint8 [b, H, W, C]`, 0-255."""


class KerasFeatures:
    """The frozen backbone of a plan in Keras, as a `FeatureCall`. Loads Keras and its backend.

    Args:
        plan: the result of `plan_features`.

    Raises:
        WeightsError: the weights are missing or do not fit.
    """

    batch_size, calls_at_once = BATCH_SIZE, 1

    def __init__(self, plan: FeaturePlan) -> None:
        check_keras()
        from mnist_dist.engines.engine import compile_model
        from mnist_dist.models.classifier import build_classifier, fetch_published_weights

        if plan.model.weights == "imagenet":
            fetch_published_weights(plan.model)
        self._spec, num_classes = plan.records.spec, len(plan.records.class_names)
        classifier = build_classifier(
            plan.model, spec=self._spec, num_classes=num_classes, precision=plan.precision, seed=plan.seed
        )
        self._model = classifier.features
        self._call = compile_model(self._model, batch_size=BATCH_SIZE)

    def __call__(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        return np.asarray(self._call(padded(pixels, BATCH_SIZE))[0], np.float32)[: len(pixels)]

    def export(self, file: Path, *, format: str) -> None:
        """Converts it to a file that takes `uint8 [B, H, W, C]`."""
        import keras

        image = keras.Input(self._spec.shape, dtype="uint8", name="image")
        model = keras.Model(image, self._model(keras.ops.cast(image, "float32")))
        model(np.zeros((1, *self._spec.shape), np.uint8), training=False)  # An export needs a called model.
        model.export(str(file), format=format, verbose=False)


class Extractor:
    """Computes the shards of a plan.

    Args:
        plan: the result of `plan_features`.
        pixels: pixels of the records, `uint8 [N, H, W, C]`.
        call: the loaded backbone.
    """

    def __init__(self, plan: FeaturePlan, *, pixels: Rows, call: FeatureCall) -> None:
        self._plan, self._pixels, self._call = plan, pixels, call

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
            remedy = "" if is_imported(plan.model.backbone) else " or --no-feature-cache"
            raise ConfigError(
                f"the features of {plan.model.backbone} reach {np.abs(features).max():.3g}, more than {plan.stored_as} "
                f"holds. Use --feature-type float32{remedy}."
            )
        plan.cache.put(shard, pa.table({"features": column_of(stored)}))

    def _features(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        size = self._call.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        with ThreadPoolExecutor(self._call.calls_at_once) as pool:
            return np.concatenate(list(pool.map(lambda batch: self._call(self._pixels[batch]), batches)))


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
