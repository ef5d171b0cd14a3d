"""A frozen backbone's outputs, computed once and shared by every run and trial that trains a head on them.

Owns: what the outputs depend on (the key), the shards that processes write independently of each other, and reading
them by row. Does not own: who computes which shard where (`on_ray/data`), or the images (`data/records.py`).

Below `<storage>/_features/<key>/`, the key a hash of everything that the values depend on:

```
shard-NNNNNN.arrow   Arrow IPC, uncompressed, to be memory-mapped: features, fixed-size list of float16 or float32 [D];
                     one atomic put each; that it exists means it is done, writing it twice is harmless
features.json        written last: the features are finished
```

Features of one key are those of the same pixels in the same order, so they are never used for other images.
"""

# N = records, n = covered rows, b = batch, D = features of an image

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist import storage
from mnist_dist.config import FeatureType, ModelConfig
from mnist_dist.data.images import ImageSpec, Pixels
from mnist_dist.data.records import check_free_space, node_lock
from mnist_dist.errors import ConfigError, DataError, ServiceError
from mnist_dist.models.backbones import find_backbone
from mnist_dist.models.bundle import BUNDLE_FILE

BATCH_SIZE = 32
"""Images of a call: VGG16 at 224 px then takes about 2 GB."""
_FORMAT_VERSION = 1
_SHARD_ROWS = 256  # VGG16 on two cores takes 10 to 16 s for so many: what a kill costs
_MOST_SHARDS = 4_096
_DONE = "features.json"
_SHARD = re.compile(r"shard-(\d{6})\.arrow")


@dataclass(frozen=True, kw_only=True)
class FeaturePlan:
    """Which features of which images, and where they go: plain data for any process."""

    key: str
    """sha256 of everything that the features depend on, hex."""
    root: str
    """URI of the folder."""
    records: str
    """URI of the record cache of the images."""
    rows: npt.NDArray[np.int64]
    """`int64 [n]`, the records that are covered, in order."""
    model: ModelConfig
    num_classes: int
    precision: Literal["float32", "bfloat16"]
    """Of the backbone's arithmetic."""
    stored_as: FeatureType
    seed: int
    """Of the backbone's initial weights."""

    @property
    def shard_rows(self) -> int:
        """Rows of each shard; the last one has what is left."""
        return max(_SHARD_ROWS, -(-len(self.rows) // _MOST_SHARDS))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.rows) // self.shard_rows)

    def rows_of(self, shard: int) -> npt.NDArray[np.int64]:
        """The records of a shard."""
        return self.rows[shard * self.shard_rows : (shard + 1) * self.shard_rows]


def plan_features(
    model: ModelConfig,
    *,
    records: str,
    index: pa.Table,
    spec: ImageSpec,
    rows: npt.NDArray[np.int64],
    num_classes: int,
    precision: Literal["float32", "bfloat16"],
    stored_as: FeatureType,
    seed: int,
    root: str,
) -> FeaturePlan:
    """Plans the features of some records.

    Args:
        model: the backbone, its weights, input size and pooling; the head does not matter.
        records: URI of the record cache.
        index: of these records.
        spec: of their pixels.
        rows: the records that are wanted, any order.
        num_classes: K of the classifier.
        precision: of the backbone's arithmetic.
        stored_as: type of the stored values.
        seed: of the initial weights; matters where there are no others.
        root: folder or `s3://` prefix of the job.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: of a file of weights.
    """
    rows = np.sort(rows)
    backbone_alone = replace(model, hidden_units=0, dropout=None, weights="none")
    facts = {
        "version": _FORMAT_VERSION,
        "pixels": hashlib.sha256("".join(index["digest"].take(pa.array(rows)).to_pylist()).encode()).hexdigest(),
        "spec": asdict(spec),
        "model": asdict(backbone_alone),
        "weights": _weights_identity(model, seed=seed),
        "precision": precision,
        "stored_as": stored_as,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return FeaturePlan(
        key=key,
        root=storage.join(storage.absolute(root), "_features", key[:16]),
        records=records,
        rows=rows,
        model=model,
        num_classes=num_classes,
        precision=precision,
        stored_as=stored_as,
        seed=seed,
    )


def _weights_identity(model: ModelConfig, *, seed: int) -> str:
    if model.weights == "none":
        return f"seed {seed}"
    if model.weights == "imagenet":
        return str(find_backbone(model.backbone).weights_published)
    is_file = model.weights.endswith((".h5", ".hdf5"))
    uri = model.weights if is_file else storage.join(model.weights, BUNDLE_FILE)
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest()


def finished(plan: FeaturePlan) -> bool:
    """Whether the features can be opened."""
    return storage.exists(storage.join(plan.root, _DONE))


def missing_shards(plan: FeaturePlan) -> list[int]:
    """The shards that are still to be computed."""
    if finished(plan):
        return []
    names = (entry.uri.rpartition("/")[2] for entry in storage.list_entries(plan.root))
    there = {int(match[1]) for name in names if (match := _SHARD.fullmatch(name))}
    return [shard for shard in range(plan.shards) if shard not in there]


def finish(plan: FeaturePlan) -> None:
    """Marks the features as finished; nothing to do where that has happened.

    Raises:
        ServiceError: shards are missing; the same command makes them.
    """
    if finished(plan):
        return
    missing = missing_shards(plan)
    if missing:
        raise ServiceError(f"{plan.root}: {len(missing)} of {plan.shards} shards are missing: {missing[:5]}")
    description = {
        "version": _FORMAT_VERSION,
        "key": plan.key,
        "rows": len(plan.rows),
        "shards": plan.shards,
        "stored_as": plan.stored_as,
        "model": asdict(plan.model),
        "precision": plan.precision,
    }
    storage.write_bytes(storage.join(plan.root, _DONE), json.dumps(description, indent=1).encode())


class Extractor:
    """The frozen backbone of a plan, ready to compute its shards. Loads TensorFlow.

    Args:
        plan: of `plan_features`.
        pixels: of the records, `uint8 [N, H, W, C]`.
        spec: of the records.

    Raises:
        WeightsError: the weights are missing or do not fit.
    """

    def __init__(self, plan: FeaturePlan, *, pixels: Pixels, spec: ImageSpec) -> None:
        from mnist_dist.engines.engine import compile_model
        from mnist_dist.models.classifier import build_classifier

        self._plan, self._pixels = plan, pixels
        classifier = build_classifier(
            plan.model, spec=spec, num_classes=plan.num_classes, precision=plan.precision, seed=plan.seed
        )
        self._call = compile_model(classifier.features, batch_size=BATCH_SIZE)

    def store(self, shard: int) -> None:
        """Computes a shard and puts it in place.

        Raises:
            ConfigError: a feature is no number, or larger than float16 holds.
            PermissionError, ServiceError, StorageError: see `storage`.
        """
        plan = self._plan
        features = self._features(plan.rows_of(shard))
        with np.errstate(over="ignore"):
            stored = features.astype(plan.stored_as)
        if not np.isfinite(features).all():
            raise ConfigError(
                f"{plan.model.backbone} gives features that are no numbers. Received: weights={plan.model.weights!r}"
            )
        if not np.isfinite(stored).all():
            raise ConfigError(
                f"the features of {plan.model.backbone} reach {np.abs(features).max():.3g}, more than {plan.stored_as} "
                "holds: --feature-type float32, or --no-feature-cache"
            )
        write_shard(plan.root, shard, stored)

    def _features(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        parts = []
        for start in range(0, len(rows), BATCH_SIZE):
            some = self._pixels[rows[start : start + BATCH_SIZE]]
            padded = np.concatenate([some, np.zeros((BATCH_SIZE - len(some), *some.shape[1:]), np.uint8)])
            parts.append(np.asarray(self._call(padded)[0], np.float32)[: len(some)])
        return np.concatenate(parts)


def write_shard(root: str, shard: int, features: npt.NDArray[Any]) -> None:
    """Puts one shard, `float16` or `float32` `[rows, D]`."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    table = pa.table({"features": column})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    storage.write_bytes(storage.join(root, _shard_name(shard)), sink.getvalue().to_pybytes())


class FeatureRows:
    """Features by record, memory-mapped: `rows[records]` is `[*records.shape, D]` (see `feed.Rows`); an IndexError for
    records that are not covered.

    Args:
        records: `int64 [n]`, the covered records, ascending.
        shards: features of so many of them each, in order.
    """

    def __init__(self, records: npt.NDArray[np.int64], shards: Sequence[npt.NDArray[Any]]) -> None:
        self._records, self._shards = records, list(shards)
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    @property
    def shape(self) -> tuple[int, ...]:
        """`[records up to the last one that is covered, D]`."""
        return int(self._records[-1]) + 1, self._shards[0].shape[1]

    def __getitem__(self, records: npt.NDArray[np.integer[Any]], /) -> npt.NDArray[Any]:
        wanted = np.asarray(records).reshape(-1)
        places = np.searchsorted(self._records, wanted)
        covered = self._records[np.minimum(places, len(self._records) - 1)] == wanted
        if not covered.all():
            raise IndexError(f"records without features, such as {wanted[~covered][0]}")
        of_shard = np.searchsorted(self._starts, places, side="right") - 1
        found = np.empty((len(wanted), self.shape[1]), self._shards[0].dtype)
        for shard in np.unique(of_shard):
            mine = of_shard == shard
            found[mine] = self._shards[shard][places[mine] - self._starts[shard]]
        return found.reshape(*np.shape(records), self.shape[1])


def open_features(plan: FeaturePlan, *, local_dir: Path) -> FeatureRows:
    """Opens finished features; those of S3 are downloaded once per node.

    Raises:
        DataError: there are none, or they are damaged or not those of the plan.
        ConfigError: the node's disk has too little room.
        PermissionError, ServiceError, StorageError: see `storage`.
    """
    folder = Path(plan.root)
    if storage.is_remote(plan.root):
        folder = _local_copy(plan.root, local_dir)
    try:
        description = json.loads((folder / _DONE).read_bytes())
        key = description["key"]
    except FileNotFoundError as err:
        raise DataError(f"no finished features. Received: {plan.root!r}") from err
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(f"{plan.root}: {_DONE} is damaged: {err}; delete the folder") from err
    if key != plan.key:
        raise DataError(f"{plan.root}: features of {plan.key}. Received: {key}; delete the folder")
    shards = [_open_shard(folder / _shard_name(shard)) for shard in range(plan.shards)]
    rows = sum(len(shard) for shard in shards)
    if rows != len(plan.rows):
        raise DataError(f"{plan.root}: features of {len(plan.rows)} images. Received: {rows}; delete the folder")
    return FeatureRows(plan.rows, shards)


def _local_copy(root: str, local_dir: Path) -> Path:
    folder = local_dir / root.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with node_lock(folder / "lock"):
        if not (folder / _DONE).exists():
            entries = list(storage.list_entries(root))
            check_free_space(folder, sum(entry.size_bytes for entry in entries), "the features")
            for entry in sorted(entries, key=lambda entry: entry.uri.endswith(_DONE)):  # what completes them, last
                storage.write_bytes(str(folder / entry.uri.rpartition("/")[2]), storage.read_bytes(entry.uri))
    return folder


def _open_shard(path: Path) -> npt.NDArray[Any]:
    try:
        with pa.memory_map(str(path)) as file:
            chunks = pa.ipc.open_file(file).read_all()["features"].chunks
    except (OSError, pa.ArrowInvalid, KeyError) as err:
        raise DataError(f"{path.parent}: damaged: {err}; delete the folder to compute the features again") from err
    (column,) = chunks
    values: npt.NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
    return values.reshape(len(column), -1)


def _shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.arrow"
