"""The configuration of a job: frozen dataclasses that state the unit of each field and check it on construction.

Owns: the fields, their defaults, the checks that need only the values, and the JSON form that is stored beside
everything a job writes. Does not own: the flags (`flags.py` makes them from these classes with tyro), the named
variants (`recipes.py`), or anything that needs TensorFlow, Ray or the data.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mnist_dist.errors import ConfigError, suggestion
from mnist_dist.urls import shown_values

Pooling = Literal["avg", "max", "flatten"]
Precision = Literal["auto", "float32", "bfloat16"]
KerasBackend = Literal["tensorflow", "jax"]
Augmentation = Literal["none", "digits", "photos", "rand-augment"]
FeatureType = Literal["float16", "float32"]
ResizeRule = Literal["stretch", "crop"]
Geometry = Literal["stretch", "crop", "shortest-edge", "longest-edge-pad"]
Resampling = Literal["opencv", "pillow", "keras"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
DecodeQuality = Literal["fast", "exact"]
Activation = Literal["softmax", "sigmoid", "none"]
CombineMethod = Literal["soup", "greedy-soup", "ensemble"]
EngineName = Literal["keras", "openvino", "onnx"]
EnginePrecision = Literal["float32", "bfloat16", "int8"]
TrackerName = Literal["mlflow", "wandb"]
Value = TypeVar("Value")
LOCK_WAIT_S = 90.0
"""Longer than the 60 s of silence after which a lock is taken over, to allow for polling and clock differences."""
DEFAULT_THRESHOLD = 0.5
"""The probability from which on a class of a multi-label model is predicted."""
MIN_DECODE_MEMORY = 16 * 2**20


def may_be_bundle(backbone: str) -> bool:
    """Whether a backbone that is no name of the table is the folder or bucket prefix of a bundle: it has a slash, or
    there is such a folder."""
    return "/" in backbone or os.path.isfile(os.path.join(backbone, "bundle.json"))


def require(condition: bool, expected: str, **received: object) -> None:
    """Raises ConfigError with the message `expected. Received: name=value` unless the condition holds."""
    if not condition:
        shown = ", ".join(f"{name}={value!r}" for name, value in received.items())
        raise ConfigError(f"{expected}. Received: {shown}")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Limits for a single image."""

    max_pixels: int = 100_000_000
    """Images with more pixels than this get the status `too_large`; the size is read from the header."""
    max_bytes: int = 256 * 2**20
    """Files and archive members with more bytes than this get the status `too_large` and are not read."""
    decode_memory: int | None = None
    """Memory for all images that an actor decodes at once, bytes (1 GiB: 1073741824). Large ones wait for each other,
    and one that needs more gets the status `too_large`. A resumed job may change it. None: the smaller of 1.5 GiB and
    a quarter of what the actor can expect."""
    image_timeout_s: float = 60.0
    """Images that take longer than this to decode, s, get the status `failed`."""
    decode_quality: DecodeQuality | Literal["auto"] = "auto"
    """exact: decode JPEGs at full size and resize them as the model's own framework does. fast: decode them smaller and
    resize by OpenCV. auto: as the bundle says; exact for imported models, fast for models trained here."""

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_bytes"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", **{name: getattr(self, name)})
        require(
            self.decode_memory is None or self.decode_memory >= MIN_DECODE_MEMORY,
            f"decode_memory must be at least {MIN_DECODE_MEMORY} bytes (16 MiB)",
            decode_memory=self.decode_memory,
        )
        require(self.image_timeout_s > 0, "image_timeout_s must be positive", image_timeout_s=self.image_timeout_s)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on and how to split it."""

    data: tuple[str, ...] = ("digits",)
    """Images and their classes, in any combination: named data sets (`digits`, which is included, `mnist`,
    `fashion_mnist`, `emnist`); folders, globs and bucket prefixes (`s3://`, `gs://`, `az://`) with one subfolder per
    class; archives (tar, compressed tar, zip), also WebDataset shards with labels; Parquet files or Hugging Face
    folders; lists of URIs (Parquet, CSV or text). `train` and `test` in names of folders and files are splits."""
    data_dir: str | None = None
    """Files of `mnist`, `fashion_mnist` or `emnist`: a folder of idx files (plain or .gz) or an .npz file. None: Keras
    downloads them (not `emnist`)."""
    image_column: str | None = None
    """The column of Parquet files that holds the images: encoded bytes, or structs with `bytes`. None: found by its
    type."""
    label_column: str = "label"
    """The column of lists and Parquet files that holds class names, class numbers, or true and false; with
    `multi_label` also lists of names or numbers."""
    multi_label: bool = False
    """An image has any number of classes, or none: the label column holds lists. The model has a sigmoid for each class
    and is trained with binary cross-entropy."""
    label_separator: str | None = None
    """As `multi_label`, where the labels of an image are one text: what stands between them, as in `dog;cat`."""
    class_columns: tuple[str, ...] = ()
    """As `multi_label`, in place of `label_column`: columns named like the classes, each of which says whether an image
    has that class (true and false, 1 and 0)."""
    uri_column: str = "uri"
    """The column of lists (Parquet, CSV) that holds the URIs."""
    channels: Literal["auto", "1", "3"] = "auto"
    """Channels to keep: 1 (grey) or 3 (RGB). auto: 1 if a sample of the images is all grey, else 3."""
    resize: ResizeRule = "stretch"
    """How to fit an image to the input shape: `stretch` it, or `crop` its centre to the same aspect ratio first."""
    validation_fraction: float = 0.1
    """Fraction of the training images held out to choose the best epoch, in (0, 1)."""
    test_fraction: float = 0.1
    """Fraction of all images held out for the final test if the data has no test split, in (0, 1)."""
    group_by: str | None = None
    """Keep images that belong together in one split, such as crops of one photograph or images of one patient: `folder`
    (the folder of each image), a column of the lists and Parquet files, or a regular expression that is searched for in
    each URI, whose first group (or whole match) names the group. None: each image is on its own."""
    drop_duplicates: bool = False
    """Drop training images whose pixels also occur in validation or test, and validation images that occur in test."""
    max_bad_fraction: float = 0.01
    """Fail the job if more than this fraction of the images is unreadable, in [0, 1]."""
    max_pixels: int = 100_000_000
    """Do not decode images with more pixels than this; the size is read from the header."""
    decode_memory: int | None = None
    """Memory for all images that a process decodes at once, bytes; large ones wait for each other, and one that needs
    more is not decoded. None: the smaller of 1.5 GiB and a quarter of what the process can expect."""
    image_timeout_s: float = 60.0
    """Images that take longer than this to decode, s, are unreadable."""
    skip: int = 0
    """Leave out this many training images (of all images if the data has no splits): the ones that the same `limit`
    would take, so that two runs can train on disjoint images."""
    limit: int | None = None
    """Use at most this many images of each split, or in total if the data has no splits. None: all."""

    def __post_init__(self) -> None:
        require(bool(self.data) and all(self.data), "data must name at least one location", data=self.data)
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name} must be between 0 and 1", **{name: value})
        require(
            self.validation_fraction + self.test_fraction < 1,
            "validation_fraction + test_fraction must leave something to train on (sum below 1)",
            validation_fraction=self.validation_fraction,
            test_fraction=self.test_fraction,
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            "max_bad_fraction must be in [0, 1]",
            max_bad_fraction=self.max_bad_fraction,
        )
        require(
            not (self.label_separator and self.class_columns),
            "choose label_separator (of one column) or class_columns",
            label_separator=self.label_separator,
            class_columns=list(self.class_columns),
        )
        require(self.group_by != "", "group_by must be folder, a column or a regular expression", group_by="")
        require(self.limit is None or self.limit >= 1, "limit must be at least 1 image", limit=self.limit)
        require(self.skip >= 0, "skip must be 0 or a number of images", skip=self.skip)
        _ = self.limits  # It checks its own values.

    @property
    def has_sets(self) -> bool:
        """Whether an image has any number of classes."""
        return self.multi_label or self.label_separator is not None or bool(self.class_columns)

    @property
    def limits(self) -> DecodeConfig:
        """The limits for a single image."""
        return DecodeConfig(
            max_pixels=self.max_pixels, decode_memory=self.decode_memory, image_timeout_s=self.image_timeout_s
        )


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How to reach images, lists and archives. A job's own files (bundles, runs, tables) are reached without these
    settings, and a resumed job may change them."""

    s3_anonymous: bool = False
    """Do not sign the requests that read images from S3: public buckets need no credentials."""
    s3_requester_pays: bool = False
    """Pay for the requests that read images from S3, where the owner of the bucket asks for that."""
    allow_private_hosts: bool = False
    """Also read `https://` and `http://` images from private, loopback and link-local addresses."""

    def __post_init__(self) -> None:
        require(
            not (self.s3_anonymous and self.s3_requester_pays),
            "choose either s3_anonymous or s3_requester_pays: who pays is known by the credentials",
            s3_anonymous=True,
            s3_requester_pays=True,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, its initial weights and its head."""

    backbone: str = "cnn"
    """`mlp`, `cnn`, `cnn_bn`, `conv_base`, `vgg16`, `mobilenet`, `mobilenet_v2`, `mobilenet_v3_small`, `resnet50`,
    `densenet121`, `efficientnet_v2_b0`, `convnext_tiny`, `xception`, or the folder or bucket prefix of a bundle that
    `import` wrote, whose features the head is trained on."""
    weights: str = "none"
    """`imagenet` (downloaded by Keras), `none`, or the path or URI of a `.weights.h5` file or of a bundle."""
    alpha: float = 1.0
    """Width multiplier; `mobilenet` and `mobilenet_v2` only."""
    image_size_px: int | None = None
    """Height and width of the backbone's input, px. None: the backbone's native size; when training from scratch on
    small images of a single size, their size."""
    pooling: Pooling | None = None
    """How to turn a feature map into a vector. None: the backbone's default."""
    hidden_units: int = 0
    """Width of a dense layer between backbone and output. 0: the backbone's default (none, except for `conv_base`)."""
    dropout: float | None = None
    """Dropout rate before the output, in [0, 1). None: the backbone's default."""

    def __post_init__(self) -> None:
        require(self.alpha > 0, "alpha must be a positive width multiplier", alpha=self.alpha)
        require(
            self.image_size_px is None or self.image_size_px >= 1,
            "image_size_px must be at least 1 px",
            image_size_px=self.image_size_px,
        )
        require(
            self.hidden_units >= 0,
            "hidden_units must be 0 (the backbone's default) or a width",
            hidden_units=self.hidden_units,
        )
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout must be in [0, 1)", dropout=self.dropout)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of training: what is trainable, for how many epochs, at which learning rate."""

    name: str
    trainable: str | int
    epochs: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class PhasesConfig:
    """The phases of training. Each field has one value per phase, or a single value for all phases."""

    epochs: tuple[int, ...] = (10,)
    """Passes over the training images in each phase."""
    learning_rate: tuple[float, ...] = (1e-3,)
    """Peak learning rate of each phase."""
    trainable: tuple[str, ...] = ("all",)
    """What each phase trains: `head` (the backbone is frozen, its BatchNorm in inference mode), `all`, everything from
    a cut point of the backbone on (such as `block4`), or a number N: all but the backbone's first N layers."""
    phases: tuple[str, ...] = ()
    """Run only the phases of these names: `head`, `train` (a first phase that trains more than the head), `fine-tune`.
    Empty: all."""

    def __post_init__(self) -> None:
        counts = {len(self.epochs), len(self.learning_rate), len(self.trainable)}
        require(
            0 not in counts and len(counts - {1}) <= 1,
            "epochs, learning_rate and trainable must have one value per phase, or a single value for all",
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            trainable=self.trainable,
        )
        names = list(dict.fromkeys(phase.name for phase in self._all()))
        all_names = f"phases must be among {', '.join(names)}" if len(names) > 1 else f"the only phase is {names[0]}"
        for name in self.phases:
            require(name in names, f"{all_names}{suggestion(name, names)}", phases=self.phases)
        for epochs in self.epochs:
            require(epochs >= 1, "epochs must be at least 1 in each phase", epochs=self.epochs)
        for rate in self.learning_rate:
            require(
                0 < rate < math.inf, "learning_rate must be positive in each phase", learning_rate=self.learning_rate
            )

    def in_order(self) -> tuple[Phase, ...]:
        """The phases to run, in order."""
        return tuple(phase for phase in self._all() if not self.phases or phase.name in self.phases)

    def total(self) -> str:
        """The number of epochs and how it comes about: `2 phases x 2 = 4 epochs`."""
        epochs = [phase.epochs for phase in self.in_order()]
        if len(epochs) == 1:
            return f"{epochs[0]} epoch{'s' if epochs[0] > 1 else ''}"
        is_same = len(set(epochs)) == 1
        parts = f"{len(epochs)} phases x {epochs[0]}" if is_same else " + ".join(map(str, epochs))
        return f"{parts} = {sum(epochs)} epochs"

    def _all(self) -> tuple[Phase, ...]:
        """Named `head`, `train` (a first phase that trains more than the head) or `fine-tune`."""
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
    """How a training step updates the weights."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """adam and adamw use the published betas (0.9, 0.999); sgd uses `momentum`."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    weight_decay: float = 0.0
    """adamw only: decoupled decay per step, as a multiple of the learning rate. Biases and BatchNorm are exempt."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over time. cosine decays to 0 over each phase (Loshchilov and Hutter 2017, without restarts)."""
    warmup_steps: int = 0
    """Steps of linear warm-up to the learning rate at the start of each phase."""
    clip_norm: float | None = None
    """Clip the gradient, summed over workers, to this global norm. None: no clipping."""
    label_smoothing: float = 0.0
    """Fraction of the target probability that is spread over all classes, in [0, 1)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weight each class by N / (classes x its images), as scikit-learn does."""
    ema_decay: float | None = None
    """Validate and keep an exponential moving average of the trained weights, which decays by this factor per step
    (such as 0.999), instead of the weights themselves. None: the weights."""
    layer_decay: float = 1.0
    """Learning rate of each part of the backbone as a multiple of that of the part above it, in (0, 1]; the parts lie
    between the cut points that `trainable` names, and the head has the full rate."""
    accumulate: int = 1
    """Compute each batch in this many parts, one after the other, and add up their gradients: as many times less
    memory. Without BatchNorm the result is the same."""

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, "momentum must be in [0, 1)", momentum=self.momentum)
        require(self.weight_decay >= 0, "weight_decay must be 0 or above", weight_decay=self.weight_decay)
        require(
            self.weight_decay == 0 or self.optimizer == "adamw",
            "weight_decay needs optimizer adamw",
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
        )
        require(self.warmup_steps >= 0, "warmup_steps must be 0 or above", warmup_steps=self.warmup_steps)
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm must be positive", clip_norm=self.clip_norm)
        require(
            0 <= self.label_smoothing < 1, "label_smoothing must be in [0, 1)", label_smoothing=self.label_smoothing
        )
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "ema_decay must be between 0 and 1", ema_decay=decay)
        require(0 < self.layer_decay <= 1, "layer_decay must be in (0, 1]", layer_decay=self.layer_decay)
        require(self.accumulate >= 1, "accumulate must be at least 1 part", accumulate=self.accumulate)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Batches, augmentation, precision, and when to stop."""

    batch_size: int | Literal["auto"] = 128
    """Images per step, summed over all workers (the global batch). auto: the largest that fits into the memory of the
    workers, at most 1,024 each, and so that an epoch has 20 steps or more; it is measured before the run begins, and a
    resumed run keeps it."""
    augmentation: Augmentation = "none"
    """`digits` (rotation, shift, zoom; no flips), `photos` (flip, crop, colour), `rand-augment` (flip, crop, and random
    operations of RandAugment) or `none`. The bundle never augments."""
    rand_augment_ops: int = 2
    """`rand-augment` only: operations on each image."""
    rand_augment_magnitude: int = 9
    """`rand-augment` only: strength of the operations, 0 to 30."""
    random_erasing: float = 0.0
    """Probability with which a random rectangle of an image is erased, in [0, 1]."""
    mixup: float = 0.0
    """Mix each image, and its label, with another of its batch: the share is drawn from Beta(mixup, mixup), such as
    0.2. 0: do not."""
    cutmix: float = 0.0
    """Replace a rectangle of each image by that of another of its batch, whose area is drawn from Beta(cutmix, cutmix),
    such as 1. With mixup as well, each image gets one of the two. 0: do not."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """Which images an epoch visits. shuffled: each once. balanced: as many, but each class equally often."""
    precision: Precision = "auto"
    """Precision of the training step. auto: bfloat16 if it is fast here and was measured to agree, else float32. The
    bundle is always float32."""
    seed: int = 0
    """Seed of initial weights, batch order, dropout and augmentation."""
    early_stopping_patience: int | None = None
    """End a phase after this many epochs without a better validation loss. None: never."""
    plateau_patience: int | None = None
    """Multiply the learning rate by `plateau_factor` after this many epochs without a better validation loss. None:
    never."""
    plateau_factor: float = 0.5
    """Factor by which a plateau reduces the learning rate, in (0, 1)."""
    best_metric: Literal["val_loss", "val_accuracy"] = "val_loss"
    """Validation metric that chooses which epoch becomes the bundle. With `multi_label`, `val_accuracy` stands for the
    mean average precision."""
    tensorboard: bool = False
    """Write TensorBoard event files to `<run>/tensorboard` (local storage only)."""

    def __post_init__(self) -> None:
        is_positive = self.batch_size == "auto" or self.batch_size >= 1
        require(is_positive, "batch_size must be at least 1 image", batch_size=self.batch_size)
        require(self.seed >= 0, "seed must be 0 or above", seed=self.seed)
        require(0 < self.plateau_factor < 1, "plateau_factor must be in (0, 1)", plateau_factor=self.plateau_factor)
        require(
            self.rand_augment_ops >= 1, "rand_augment_ops must be at least 1", rand_augment_ops=self.rand_augment_ops
        )
        magnitude = self.rand_augment_magnitude
        require(0 <= magnitude <= 30, "rand_augment_magnitude must be 0 to 30", rand_augment_magnitude=magnitude)
        erasing = self.random_erasing
        require(0 <= erasing <= 1, "random_erasing must be a probability, 0 to 1", random_erasing=erasing)
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be 0 (off) or a positive parameter of Beta", **{name: value})
        for name in ("early_stopping_patience", "plateau_patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1 epoch", **{name: value})

    @property
    def global_batch(self) -> int:
        """Images per step, as a number; `auto` has been replaced by one before anything asks for it."""
        assert self.batch_size != "auto", "the driver replaces auto by a number (on_ray/training/batch_size.py)"
        return self.batch_size

    @property
    def mixes(self) -> bool:
        """Whether each image is mixed with another."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def changes_images(self) -> bool:
        """Whether an image differs from epoch to epoch, so that its features cannot be computed once."""
        return self.augmentation != "none" or self.random_erasing > 0 or self.mixes


@dataclass(frozen=True, kw_only=True)
class SharedRunConfig:
    """Where a training run or a search is stored, and its resources in Ray Train (in a search: of each finalist)."""

    storage: str = "runs"
    """Folder or bucket prefix (`s3://`, `gs://`, `az://`) for runs, decoded images and features."""
    name: str | None = None
    """Name of the run's folder in the storage. None: the recipe and a hash of the configuration."""
    storage_is_shared: bool = False
    """The storage folder is the same on every node (NFS or similar)."""
    workers: int | None = None
    """Ray Train workers. None: as many as the GPUs of the cluster are enough for, or one without GPUs."""
    cpus_per_worker: float | None = None
    """CPUs that each worker reserves and uses. None: an equal share of the cluster."""
    gpu: bool | None = None
    """Give each worker a GPU. None: yes if the cluster has GPUs."""
    gpus_per_worker: int = 1
    """GPUs of each worker that gets any. More than one need backend jax, and save memory on nodes with many GPUs."""
    backend: Literal["auto"] | KerasBackend = "auto"
    """What Keras trains on. auto: what `KERAS_BACKEND` says; without it, jax for several GPUs per worker and where only
    JAX can use the GPUs, else tensorflow."""
    max_failures: int = 3
    """How often workers may fail before the job fails; each time, they restart from the last checkpoint."""
    feature_cache: bool = True
    """Compute the outputs of a frozen backbone once and store them, for trials and for phases that train only the head
    without augmentation."""
    feature_type: FeatureType = "float16"
    """Number type of the cached features."""
    lock_wait_s: float = LOCK_WAIT_S
    """How long to wait for a lock that another driver holds, s; after 60 s of silence it is taken over. 0: fail at
    once."""
    wait_for_nodes_s: float = 0.0
    """How long to wait for an autoscaling cluster to provide the requested resources, s (if none are requested: one
    process with 1 CPU and no GPU). 0: use what is there."""
    tracker: tuple[TrackerName, ...] = ()
    """Log each epoch to `mlflow`, `wandb` (Weights & Biases) or both. Their own environment variables name the server
    and the account, in the process of this command alone. Empty: neither."""
    tracker_project: str = "mnist_dist"
    """Name of the experiment (MLflow) or project (W&B) that the run is logged to."""
    verbose: bool = False
    """Show the output of Ray and TensorFlow."""

    def __post_init__(self) -> None:
        require(len(set(self.tracker)) == len(self.tracker), "tracker must not repeat a name", tracker=self.tracker)
        require(bool(self.tracker_project), "tracker_project must be a name", tracker_project=self.tracker_project)
        require(self.workers is None or self.workers >= 1, "workers must be at least 1", workers=self.workers)
        require(self.gpus_per_worker >= 1, "gpus_per_worker must be at least 1", gpus_per_worker=self.gpus_per_worker)
        cpus = self.cpus_per_worker
        require(cpus is None or cpus > 0, "cpus_per_worker must be positive", cpus_per_worker=cpus)
        require(self.max_failures >= 0, "max_failures must be 0 or above", max_failures=self.max_failures)
        require(
            self.wait_for_nodes_s >= 0, "wait_for_nodes_s must be 0 or above", wait_for_nodes_s=self.wait_for_nodes_s
        )
        require(self.lock_wait_s >= 0, "lock_wait_s must be 0 or above", lock_wait_s=self.lock_wait_s)
        require(
            self.name is None or (self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")),
            "name must be a single folder name",
            name=self.name,
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(SharedRunConfig):
    """Storage and resources. A resumed run may change only these fields, except those of the feature cache."""

    checkpoint_steps: int | None = None
    """Steps between checkpoints within an epoch, in addition to one per epoch. None: one per epoch only."""
    calibration: bool = True
    """Store up to 2,000 held-out images in the bundle; engine checks and int8 need them."""
    dry_run: bool = False
    """Check everything and train one step of each phase; keep nothing."""
    plan: bool = False
    """Run the job on a sample in a scratch storage on the cluster, report the bottleneck and how long the whole job
    would take, and keep nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.plan and self.dry_run), "choose either plan or dry_run", plan=True, dry_run=True)
        require(
            self.checkpoint_steps is None or self.checkpoint_steps >= 1,
            "checkpoint_steps must be at least 1",
            checkpoint_steps=self.checkpoint_steps,
        )


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """The complete configuration of a training run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    phases: PhasesConfig = PhasesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    fit: FitConfig = FitConfig()
    store: StoreConfig = StoreConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        require(
            self.fit.batch_size == "auto" or self.fit.batch_size % self.optimizer.accumulate == 0,
            "batch_size must be a multiple of accumulate, so that all parts are equally large",
            batch_size=self.fit.batch_size,
            accumulate=self.optimizer.accumulate,
        )
        require(
            not (self.data.has_sets and self.fit.sampling == "balanced"),
            "sampling balanced needs images of one class each; class_weights balanced works with multi_label, too",
            sampling=self.fit.sampling,
            multi_label=True,
        )
        require(
            self.optimizer.layer_decay == 1 or any(phase.trainable != "head" for phase in self.phases.in_order()),
            "layer_decay needs a phase that trains more than the head",
            layer_decay=self.optimizer.layer_decay,
            trainable=self.phases.trainable,
        )
        require(
            self.optimizer.schedule == "constant" or self.fit.plateau_patience is None,
            "plateau_patience needs schedule constant",
            schedule=self.optimizer.schedule,
            plateau_patience=self.fit.plateau_patience,
        )

    def check_parts(self, workers: int) -> None:
        """Raises ConfigError unless the parts of a batch (`accumulate`) are equally large on so many workers."""
        parts = workers * self.optimizer.accumulate
        require(
            self.optimizer.accumulate == 1 or self.fit.global_batch % parts == 0,
            f"batch_size must be a multiple of workers x accumulate ({parts}), so that all parts are equally large",
            batch_size=self.fit.global_batch,
            accumulate=self.optimizer.accumulate,
        )

    def settings(self) -> dict[str, Any]:
        """The settings that determine the result, as JSON values: everything but `store` and `run`, and no secrets."""
        values = shown_values(json.loads(json.dumps(dataclasses.asdict(self))))
        del values["store"], values["run"]
        return dict(values)

    @property
    def uses_features(self) -> bool:
        """Whether the first phase can train on cached features: only the head, without augmentation, and no dry run."""
        of_head = self.phases.in_order()[0].trainable == "head"
        return of_head and not self.fit.changes_images and self.run.feature_cache and not self.run.dry_run

    def settings_hash(self) -> str:
        """First 8 hexadecimal digits of the sha256 of `settings()`."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:8]


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `name: X now, Y in the run` for every value in which two nested mappings differ."""
    lines = []
    for key in sorted(ours.keys() | theirs.keys()):
        left, right, name = ours.get(key), theirs.get(key), f"{prefix}{key}"
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differences(left, right, f"{name}.")
        elif left != right:
            lines.append(f"{name}: {left!r} now, {right!r} in the run")
    return lines
