"""The configuration of a job: frozen dataclasses, each field with its unit, checked on construction.

Owns: the fields, their defaults, the checks that need nothing but the values, and the JSON form that is stored
beside whatever a job writes. Does not own: flags (`jobs/` makes them from these classes with tyro), the named
variants (`recipes.py`), or anything that needs TensorFlow, Ray or the data.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mnist_dist.errors import ConfigError

Pooling = Literal["avg", "max", "flatten"]
Precision = Literal["auto", "float32", "bfloat16"]
Augmentation = Literal["none", "digits", "photos"]
FeatureType = Literal["float16", "float32"]
ResizeRule = Literal["stretch", "crop"]
EngineName = Literal["keras", "openvino", "onnx"]
EnginePrecision = Literal["float32", "bfloat16", "int8"]
Value = TypeVar("Value")
LOCK_WAIT_S = 90.0
"""A lock is taken over after 60 s of silence, which is noticed within a second, by clocks that may differ a little."""


def require(condition: bool, expected: str, **received: object) -> None:
    """Raises ConfigError `expected. Received: name=value` unless the condition holds."""
    if not condition:
        shown = ", ".join(f"{name}={value!r}" for name, value in received.items())
        raise ConfigError(f"{expected}. Received: {shown}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how it is split."""

    data: str = "digits"
    """`digits` (embedded), `mnist`, `fashion_mnist`, or a folder, `s3://` prefix or Parquet file of images."""
    data_dir: str | None = None
    """Where the files of `mnist` or `fashion_mnist` lie: a folder of idx files (plain or .gz) or an .npz. None:
    Keras downloads them."""
    image_column: str = "image"
    """Parquet only: the column of encoded image bytes (or of structs with a `bytes` field)."""
    label_column: str = "label"
    """Parquet only: the column of class names or class numbers."""
    channels: Literal["auto", "1", "3"] = "auto"
    """Channels that are kept: 1 (grey), 3 (RGB); auto: 1 where a sample of the images is all grey."""
    resize: ResizeRule = "stretch"
    """How an image of another shape becomes the input: stretched, or its centre cropped to the same aspect first."""
    validation_fraction: float = 0.1
    """Share of the training images held out to choose the best epoch, in (0, 1)."""
    test_fraction: float = 0.1
    """Share of all images held out for the final test where the data brings no test split, in (0, 1)."""
    drop_duplicates: bool = False
    """Remove training images whose pixels occur in validation or test, and validation images that occur in test."""
    max_bad_fraction: float = 0.01
    """Share of unreadable images above which the job fails, in [0, 1]."""
    max_pixels: int = 100_000_000
    """Images of more pixels than this (by their header) are not decoded."""
    skip: int = 0
    """Leave out this many training images (of all where the data is not split): those that a `limit` of as many takes,
    so that two runs can train on disjoint images."""
    limit: int | None = None
    """At most this many images: of each split where the data is split already, else of all. None: all."""

    def __post_init__(self) -> None:
        require(bool(self.data), "data is a name, a folder, an s3:// prefix or a Parquet file", data=self.data)
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name} lies between 0 and 1", **{name: value})
        require(
            self.validation_fraction + self.test_fraction < 1,
            "validation_fraction + test_fraction leave something to train on (sum below 1)",
            validation_fraction=self.validation_fraction,
            test_fraction=self.test_fraction,
        )
        require(0 <= self.max_bad_fraction <= 1, "max_bad_fraction is 0 to 1", max_bad_fraction=self.max_bad_fraction)
        require(self.limit is None or self.limit >= 1, "limit is at least 1 image", limit=self.limit)
        require(self.skip >= 0, "skip is 0 or a number of images", skip=self.skip)
        require(self.max_pixels >= 1, "max_pixels is at least 1", max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network, from which weights, under which head."""

    backbone: str = "cnn"
    """A name from the table in `mnist_dist/models/backbones.py`."""
    weights: str = "none"
    """`imagenet` (Keras downloads it), `none`, or the path or URI of a `.weights.h5` file or of a bundle."""
    alpha: float = 1.0
    """Width multiplier; `mobilenet` and `mobilenet_v2` only."""
    image_size_px: int | None = None
    """Height and width that the backbone sees, px. None: the backbone's native size, or for backbones trained from
    scratch the size of the images where they are small and of one size."""
    pooling: Pooling | None = None
    """How a feature map becomes a vector. None: the backbone's own way."""
    hidden_units: int = 0
    """Width of a dense layer between backbone and output; 0: the backbone's own (none but for `conv_base`)."""
    dropout: float | None = None
    """Dropout before the output, in [0, 1). None: the backbone's own."""

    def __post_init__(self) -> None:
        require(self.alpha > 0, "alpha is a positive width multiplier", alpha=self.alpha)
        require(
            self.image_size_px is None or self.image_size_px >= 1,
            "image_size_px is at least 1 px",
            image_size_px=self.image_size_px,
        )
        require(
            self.hidden_units >= 0, "hidden_units is 0 (the backbone's own) or a width", hidden_units=self.hidden_units
        )
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout lies in [0, 1)", dropout=self.dropout)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training: what is trainable, for how long, how fast."""

    name: str
    trainable: str | int
    epochs: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class PhasesConfig:
    """The phases of training: as many values in each field as there are phases, or one value for all of them."""

    epochs: tuple[int, ...] = (10,)
    """Passes over the training images, of each phase."""
    learning_rate: tuple[float, ...] = (1e-3,)
    """Peak learning rate of each phase."""
    trainable: tuple[str, ...] = ("all",)
    """What each phase trains: `head` (backbone frozen, its BatchNorm in inference mode), `all`, a cut point of the
    backbone (such as `block4`), or a number N: all but the backbone's first N layers."""

    def __post_init__(self) -> None:
        counts = {len(self.epochs), len(self.learning_rate), len(self.trainable)}
        require(
            0 not in counts and len(counts - {1}) <= 1,
            "epochs, learning_rate and trainable hold one value for each phase, or one for all",
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            trainable=self.trainable,
        )
        for epochs in self.epochs:
            require(epochs >= 1, "epochs is at least 1 in each phase", epochs=self.epochs)
        for rate in self.learning_rate:
            require(0 < rate < math.inf, "learning_rate is positive in each phase", learning_rate=self.learning_rate)

    def phases(self) -> tuple[Phase, ...]:
        """The phases one by one; a phase is called `head`, `train` (a first one of more) or `fine-tune`."""
        count = max(len(self.epochs), len(self.learning_rate), len(self.trainable))
        epochs, rates = _spread(self.epochs, count), _spread(self.learning_rate, count)
        trainable = _spread(self.trainable, count)
        return tuple(
            Phase(
                name="head" if trainable[i] == "head" else "train" if i == 0 else "fine-tune",
                trainable=int(trainable[i]) if trainable[i].isdecimal() else trainable[i],
                epochs=epochs[i],
                learning_rate=rates[i],
            )
            for i in range(count)
        )


def _spread(values: tuple[Value, ...], count: int) -> tuple[Value, ...]:
    return values * count if len(values) == 1 else values


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a step changes the weights."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """adam and adamw as published (beta 0.9, 0.999); sgd with `momentum`."""
    momentum: float = 0.9
    """sgd only, in [0, 1)."""
    weight_decay: float = 0.0
    """adamw only: decoupled decay per step, as a share of the learning rate; never of biases and BatchNorm."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine falls to 0 over each phase (Loshchilov and Hutter 2017, without restarts)."""
    warmup_steps: int = 0
    """Steps of linear rise to the learning rate at the start of each phase."""
    clip_norm: float | None = None
    """Largest global norm of the gradient, applied after the sum over workers. None: no clipping."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, in [0, 1)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each class weighs N / (classes x its images), as in scikit-learn."""

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, "momentum lies in [0, 1)", momentum=self.momentum)
        require(self.weight_decay >= 0, "weight_decay is 0 or above", weight_decay=self.weight_decay)
        require(
            self.weight_decay == 0 or self.optimizer == "adamw",
            "weight_decay needs optimizer adamw",
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
        )
        require(self.warmup_steps >= 0, "warmup_steps is 0 or above", warmup_steps=self.warmup_steps)
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm is positive", clip_norm=self.clip_norm)
        require(0 <= self.label_smoothing < 1, "label_smoothing lies in [0, 1)", label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long, in which batches, and when to stop."""

    batch_size: int = 128
    """Images per step over all workers together (the global batch)."""
    augmentation: Augmentation = "none"
    """`digits` (rotation, shift, zoom; no flips), `photos` (flip, crop, colour), `none`. Never part of the bundle."""
    precision: Precision = "auto"
    """Of the training step. auto: bfloat16 where it is fast and was measured to agree, else float32. The bundle is
    float32 always."""
    seed: int = 0
    """Decides initial weights, batch order, dropout and augmentation."""
    early_stopping_patience: int | None = None
    """Epochs without a better validation loss before the phase ends. None: never."""
    plateau_patience: int | None = None
    """Epochs without a better validation loss before the learning rate is multiplied by `plateau_factor`. None:
    never."""
    plateau_factor: float = 0.5
    """Of ReduceLROnPlateau, in (0, 1)."""
    best_metric: Literal["val_loss", "val_accuracy"] = "val_loss"
    """Which validation metric chooses the epoch that becomes the bundle."""
    tensorboard: bool = False
    """Write TensorBoard event files to `<run>/tensorboard` (local storage only)."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size is at least 1 image", batch_size=self.batch_size)
        require(self.seed >= 0, "seed is 0 or above", seed=self.seed)
        require(0 < self.plateau_factor < 1, "plateau_factor lies in (0, 1)", plateau_factor=self.plateau_factor)
        for name in ("early_stopping_patience", "plateau_patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is at least 1 epoch", **{name: value})


@dataclass(frozen=True, kw_only=True)
class SharedRunConfig:
    """Where a training or a search lives, and what Ray Train gets for it (for each finalist of a search)."""

    storage: str = "runs"
    """Folder or `s3://` prefix under which runs, decoded images and features are kept."""
    name: str | None = None
    """The run's folder in the storage. None: recipe and a hash of the configuration."""
    storage_is_shared: bool = False
    """The storage folder is the same on every node (NFS and the like)."""
    workers: int | None = None
    """Ray Train workers. None: one per GPU of the cluster, or one."""
    cpus_per_worker: float | None = None
    """CPUs that each worker reserves and uses. None: an equal share of the cluster."""
    gpu: bool | None = None
    """One GPU per worker. None: where the cluster has GPUs."""
    max_failures: int = 3
    """How often workers may fail before the training does; each time, they restart from the last checkpoint."""
    feature_cache: bool = True
    """Compute a frozen backbone's outputs once and keep them in the storage, for phases that train the head alone
    without augmentation, and for trials."""
    feature_type: FeatureType = "float16"
    """Of the values in that cache."""
    lock_wait_s: float = LOCK_WAIT_S
    """Wait so long, s, for the lock of a driver that may be lost; it is taken over after 60 s of silence. 0: fail."""
    wait_for_nodes_s: float = 0.0
    """Wait so long, s, for a growing cluster to have room for what the other flags name (unnamed: one process of 1 CPU
    and no GPU). 0: take what is there."""
    verbose: bool = False
    """Show what Ray and TensorFlow print."""

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 1, "workers is at least 1", workers=self.workers)
        cpus = self.cpus_per_worker
        require(cpus is None or cpus > 0, "cpus_per_worker is positive", cpus_per_worker=cpus)
        require(self.max_failures >= 0, "max_failures is 0 or above", max_failures=self.max_failures)
        require(self.wait_for_nodes_s >= 0, "wait_for_nodes_s is 0 or above", wait_for_nodes_s=self.wait_for_nodes_s)
        require(self.lock_wait_s >= 0, "lock_wait_s is 0 or above", lock_wait_s=self.lock_wait_s)
        require(
            self.name is None or (self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")),
            "name is a single folder name",
            name=self.name,
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(SharedRunConfig):
    """Where the run lives and what may be spent on it. A resumed run may change only these fields, but for those of
    the feature cache."""

    checkpoint_steps: int | None = None
    """Also checkpoint every so many steps within an epoch. None: at epoch ends only."""
    calibration: bool = True
    """Put up to 2,000 held-out images into the bundle (for engine checks and int8)."""
    dry_run: bool = False
    """Check everything, train one step of each phase, leave nothing."""
    plan: bool = False
    """Run the job on a sample, in a scratch storage on the cluster, say what is slowest and how long all of it would
    take, and leave nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.plan and self.dry_run), "plan and dry_run are two things", plan=True, dry_run=True)
        require(
            self.checkpoint_steps is None or self.checkpoint_steps >= 1,
            "checkpoint_steps is at least 1",
            checkpoint_steps=self.checkpoint_steps,
        )


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that a training run is made of."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    phases: PhasesConfig = PhasesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    fit: FitConfig = FitConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        require(
            self.optimizer.schedule == "constant" or self.fit.plateau_patience is None,
            "plateau_patience goes with schedule constant only",
            schedule=self.optimizer.schedule,
            plateau_patience=self.fit.plateau_patience,
        )

    def settings(self) -> dict[str, Any]:
        """What decides the result, as JSON values: everything but `run`."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        del values["run"]
        return dict(values)

    @property
    def uses_features(self) -> bool:
        """Whether the first phase trains the head alone, on images that are the same each time."""
        of_head = self.phases.phases()[0].trainable == "head"
        return of_head and self.fit.augmentation == "none" and self.run.feature_cache and not self.run.dry_run

    def settings_hash(self) -> str:
        """First 8 hexadecimal digits of the sha256 of `settings()`."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Which images are scored."""

    input: tuple[str, ...]
    """Files, folders, globs, `s3://` objects or prefixes, archives (tar, compressed tar, zip), or manifests (Parquet or
    CSV with a `uri` column, a text file with a URI a line; `-`: such lines from stdin), in any mixture."""
    carry: tuple[str, ...] = ()
    """Columns of the manifests that are carried into the output, separated by spaces or commas."""
    all_files: bool = False
    """Take files of any name; what is no image becomes `unsupported`, which does not count as bad."""
    include: tuple[str, ...] = ()
    """Only images whose URI or file name matches one of these patterns (`*.png`, `*/cats/*`). Empty: all."""
    exclude: tuple[str, ...] = ()
    """No images whose URI or file name matches one of these patterns."""
    limit: int | None = None
    """At most this many images, the first ones. None: all."""
    sample: int | None = None
    """A fair sample of so many images, the same each time. None: all."""

    def __post_init__(self) -> None:
        require(bool(self.input) and all(self.input), "input names at least one place", input=self.input)
        for name in ("limit", "sample"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is at least 1 image", **{name: value})

    @property
    def carried(self) -> tuple[str, ...]:
        """The names of the carried columns one by one."""
        return _names(self.carry)


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Which columns the prediction table has."""

    columns: tuple[str, ...] = ()
    """Columns of the table, separated by spaces or commas; `uri` and `status` are always there. Empty: all."""
    top_k: int = 0
    """Also the K most probable classes and their probabilities: `top_k_classes`, `top_k_confidences`. 0: none."""
    embeddings: bool = False
    """Also the features before the head: `embedding`, a list of float32."""

    def __post_init__(self) -> None:
        require(self.top_k >= 0, "top_k is 0 (none) or a number of classes", top_k=self.top_k)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the columns one by one."""
        return _names(self.columns)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What is done for one image at most."""

    max_pixels: int = 100_000_000
    """Images of more pixels than this (by their header) become `too_large`."""
    max_bytes: int = 256 * 2**20
    """Files and archive members of more bytes than this become `too_large`, without being read."""
    image_timeout_s: float = 60.0
    """Images that take longer than this to decode, s, become `failed`."""

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_bytes"):
            require(getattr(self, name) >= 1, f"{name} is at least 1", **{name: getattr(self, name)})
        require(self.image_timeout_s > 0, "image_timeout_s is positive", image_timeout_s=self.image_timeout_s)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What runs the model."""

    engine: EngineName | Literal["auto"] = "auto"
    """`keras` (TensorFlow, on CPUs and GPUs), `openvino` or `onnx` (on CPUs). Others than keras are converted once per
    bundle and checked against it on the bundle's calibration images. auto: the fastest that agrees."""
    precision: EnginePrecision | Literal["auto"] = "auto"
    """`float32`; `bfloat16` and `int8` by OpenVINO. auto: float32, or bfloat16 where it was measured to agree."""

    def __post_init__(self) -> None:
        require(
            self.precision in ("auto", "float32") or self.engine in ("auto", "openvino"),
            "bfloat16 and int8 go with engine openvino",
            engine=self.engine,
            precision=self.precision,
        )


@dataclass(frozen=True, kw_only=True)
class ScoreRunConfig:
    """What may be spent on the job. Only these fields may differ when it goes on."""

    actors: int | None = None
    """Processes that hold the model. None: one per GPU, or one per node."""
    cpus_per_actor: float | None = None
    """CPUs that each actor reserves and uses. None: an equal share of the cluster."""
    gpus_per_actor: float | None = None
    """GPUs of each actor. None: 1 where the cluster has GPUs, else 0."""
    batch_size: int = 32
    """Images that the model takes at once, per actor, at most: a converted model gets 4 or 32, by which it was measured
    to be faster; of Keras halved once where the memory does not hold it."""
    decode: Literal["auto", "actor", "tasks"] = "auto"
    """Where images are decoded: in the actor's threads, or in CPU tasks anywhere in the cluster. auto: tasks where the
    actor has a GPU."""
    max_bad_fraction: float = 0.1
    """Share of rows that are neither ok nor unsupported above which the job fails; the table is there all the same."""
    max_failures: int = 3
    """Deaths of a worker over the same shard after which the job gives up."""
    storage_is_shared: bool = False
    """Local folders are the same on every node (NFS and the like)."""
    lock_wait_s: float = LOCK_WAIT_S
    """Wait so long, s, for the lock of a driver that may be lost; it is taken over after 60 s of silence. 0: fail."""
    wait_for_nodes_s: float = 0.0
    """Wait so long, s, for a growing cluster to have room for `actors` of `cpus_per_actor` and `gpus_per_actor`
    (unnamed: one, of 1 CPU and no GPU). 0: take what is there."""
    dry_run: bool = False
    """List, check and say what would be done; write nothing."""
    plan: bool = False
    """Run the job on a sample, into a scratch output on the cluster, say what is slowest and how long all of it would
    take; write nothing to the output."""
    verbose: bool = False
    """Show what Ray and TensorFlow print."""

    def __post_init__(self) -> None:
        for name in ("actors", "cpus_per_actor"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is positive", **{name: value})
        require(
            self.gpus_per_actor is None or self.gpus_per_actor >= 0,
            "gpus_per_actor is 0 or above",
            gpus_per_actor=self.gpus_per_actor,
        )
        require(self.batch_size >= 1, "batch_size is at least 1 image", batch_size=self.batch_size)
        require(0 <= self.max_bad_fraction <= 1, "max_bad_fraction is 0 to 1", max_bad_fraction=self.max_bad_fraction)
        require(self.max_failures >= 0, "max_failures is 0 or above", max_failures=self.max_failures)
        require(not (self.plan and self.dry_run), "plan and dry_run are two things", plan=True, dry_run=True)
        require(self.wait_for_nodes_s >= 0, "wait_for_nodes_s is 0 or above", wait_for_nodes_s=self.wait_for_nodes_s)
        require(self.lock_wait_s >= 0, "lock_wait_s is 0 or above", lock_wait_s=self.lock_wait_s)


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """Scores images with a bundle into a Parquet table, exactly one row per image; the same command goes on."""

    bundle: str
    """Folder or `s3://` prefix of the trained model."""
    output: str
    """Folder or `s3://` prefix of the prediction table; the name by which the job is continued."""
    mode: Literal["continue", "incremental", "fresh"] = "continue"
    """continue: go on, or return what is finished. incremental: list again, score what is new or changed. fresh:
    everything anew; the old table stays until the new one is complete."""
    retry_failed: bool = False
    """Score the rows again that are neither ok nor unsupported."""
    shard_size: int | None = None
    """Images of each unit of work, which is done again where a worker dies. None: 256 to 4,096, by the number of images
    and their bytes."""
    inputs: InputConfig
    table: TableConfig = TableConfig()
    decoding: DecodeConfig = DecodeConfig()
    engine: EngineConfig = EngineConfig()
    run: ScoreRunConfig = ScoreRunConfig()

    def __post_init__(self) -> None:
        require(bool(self.output), "output is a folder or an s3:// prefix", output=self.output)
        require(self.shard_size is None or self.shard_size >= 1, "shard_size is at least 1", shard_size=self.shard_size)
        require(
            not (self.retry_failed and self.mode != "continue"),
            "retry_failed goes with mode continue",
            mode=self.mode,
            retry_failed=self.retry_failed,
        )

    def settings(self) -> dict[str, Any]:
        """What decides the rows, beside the bundle, as JSON values."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: values[name] for name in ("inputs", "table", "decoding")}

    @classmethod
    def completed(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that an older version noted: what it did not know yet has its default, which changes no row."""
        defaults = cls(bundle="", output="-", inputs=InputConfig(input=("-",))).settings()
        return {name: {**values, **settings.get(name, {})} for name, values in defaults.items()}


def _names(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for value in values for name in value.replace(",", " ").split())


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `name: ours here, theirs there` for every value that two nested mappings do not share."""
    lines = []
    for key in sorted(ours.keys() | theirs.keys()):
        left, right, name = ours.get(key), theirs.get(key), f"{prefix}{key}"
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differences(left, right, f"{name}.")
        elif left != right:
            lines.append(f"{name}: {left!r} now, {right!r} in the run")
    return lines
