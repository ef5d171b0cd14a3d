"""The configuration of a scoring job: its inputs, its table, its engine and its resources.

Owns: the fields of scoring, as `config.py` owns those of training. Does not own: what each of them does (`scoring`,
`engines`).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from mnist_dist.config import (
    LOCK_WAIT_S,
    DecodeConfig,
    EngineName,
    EnginePrecision,
    FeatureType,
    StoreConfig,
    require,
)
from mnist_dist.urls import shown_values

TableFormat = Literal["parquet", "delta"]
TtaView = Literal["flip", "shift"]
MAX_ROWS_PER_FILE = 1_000_000
"""The driver holds uri, size, etag, status and error of a file's rows in memory at once."""


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Which images to score."""

    input: tuple[str, ...]
    """Files, folders, globs, bucket prefixes (`s3://`, `gs://`, `az://`), `https://` URLs, archives (tar, compressed
    tar, zip), Parquet files of images (or folders of them, as on Hugging Face), lists (Parquet or CSV with a `uri`
    column, or a text file with one URI per line; `-` reads one from stdin) and named data sets (`digits`, `mnist`), in
    any combination."""
    carry: tuple[str, ...] = ()
    """Columns of the lists and of Parquet files of images to copy into the table, as they are."""
    image_column: str | None = None
    """The column of Parquet files that holds the images: encoded bytes, or structs with `bytes`. None: found by its
    type."""
    uri_column: str = "uri"
    """The column of lists (Parquet, CSV) that holds the URIs."""
    data_dir: str | None = None
    """The files of named data sets such as `mnist`: a folder of idx files (plain or .gz) or an .npz file. None: Keras
    downloads them."""
    all_files: bool = False
    """Take files with any name, hidden ones too. One whose name is not that of an image, and which cannot be scored,
    gets the status `other_file`, which does not count as bad."""
    include: tuple[str, ...] = ()
    """Score only images whose URI or file name matches one of these patterns (`*.png`, `*/cats/*`). Empty: all."""
    exclude: tuple[str, ...] = ()
    """Skip images whose URI or file name matches one of these patterns."""
    limit: int | None = None
    """Score at most this many images, the first ones. None: all."""
    sample: int | None = None
    """Score a random sample of this many images, the same one every time. None: all."""

    def __post_init__(self) -> None:
        require(bool(self.input) and all(self.input), "input must name at least one location", input=self.input)
        for name in ("limit", "sample"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1 image", **{name: value})


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """The columns of the prediction table."""

    columns: tuple[str, ...] = ()
    """Columns to write, separated by spaces or commas; `uri` and `status` are always written. Empty: all."""
    threshold: float | str | None = None
    """Multi-label models: the classes whose probability reaches this are the `predicted_classes`: a number between 0
    and 1, or a file with one per class (CSV or Parquet with the columns `class` and `threshold`, or JSON `{class:
    threshold}`). None: 0.5."""
    thresholds: Annotated[Mapping[str, float], tyro.conf.Suppress] = field(default_factory=dict)
    """The threshold of each class, in the order of the classes; filled in by the job (`scoring/thresholds.py`). Empty:
    each image has one class."""
    top_k: int = 0
    """Also write the K most probable classes and their probabilities: `top_k_classes`, `top_k_confidences`. 0: none."""
    wide: bool = False
    """Also write one column of float32 per class: `probability_<class name>`, in the order of the classes."""
    embeddings: bool = False
    """Also write the features before the head: `embedding`, a list of fixed size."""
    embedding_type: FeatureType = "float32"
    """Number type of `embedding`. float16 takes half the space; features beyond 65,504 become infinite, and Spark
    cannot read the table."""
    table_format: TableFormat = "parquet"
    """`parquet`: files in `<output>/table`. `delta`: a Delta table in `<output>/delta`, which changes in one
    transaction; needs the extra `delta`."""

    def __post_init__(self) -> None:
        require(
            not isinstance(self.threshold, int | float) or 0 < self.threshold < 1,
            "threshold must be a number between 0 and 1, or a file with one per class",
            threshold=self.threshold,
        )
        require(self.top_k >= 0, "top_k must be 0 (none) or a number of classes", top_k=self.top_k)
        require(
            not (self.table_format == "delta" and self.embeddings and self.embedding_type == "float16"),
            "a Delta table has no float16; use --embedding-type float32",
            embedding_type=self.embedding_type,
        )
        require(
            self.embeddings or self.embedding_type == "float32",
            "embedding_type needs embeddings",
            embedding_type=self.embedding_type,
        )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the requested columns."""
        return _names(self.columns)

    @property
    def is_multi_label(self) -> bool:
        """Whether each class has a probability of its own, so that an image may have several classes or none."""
        return bool(self.thresholds)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The inference engine."""

    engine: EngineName | Literal["auto"] = "auto"
    """`keras` (TensorFlow, on CPUs and GPUs), `openvino` or `onnx` (on CPUs). For the last two the model is converted
    once per bundle and checked against Keras on the calibration images. An ONNX bundle runs by `onnx` as it is, also on
    GPUs if onnxruntime-gpu is installed, is converted for `openvino`, and has no `keras`. auto: the fastest engine that
    agrees."""
    precision: EnginePrecision | Literal["auto"] = "auto"
    """`float32`, or with OpenVINO `bfloat16` or `int8`. auto: float32, or what was measured to agree: bfloat16, or int8
    if an earlier job asked for it. Asked for by name, a precision may lose 1 point of accuracy, and differ in the top
    class of 2 % of the images; see `accept_accuracy_loss`."""
    accept_accuracy_loss: float | None = None
    """Takes the precision that is asked for by name if it loses at most so many points of accuracy on the bundle's
    calibration images. Where these have no labels, or there are none, or for several labels per image: if it differs in
    the predicted classes of at most this percentage of the images. None: up to 1 point and 2 % of top classes."""
    tta: tuple[TtaView, ...] = ()
    """Test-time augmentation: the mean over several views of each image. flip: mirrored left to right as well, twice
    the model's work. shift: moved by 1/28 of the image up, down, left and right as well, five times the work. Empty:
    the image alone."""

    def __post_init__(self) -> None:
        points = self.accept_accuracy_loss
        require(
            points is None or 0 <= points <= 100,
            "accept_accuracy_loss must be in [0, 100] points",
            accept_accuracy_loss=points,
        )
        require(
            self.precision in ("auto", "float32") or self.engine in ("auto", "openvino"),
            "bfloat16 and int8 need engine openvino",
            engine=self.engine,
            precision=self.precision,
        )


@dataclass(frozen=True, kw_only=True)
class ScoreRunConfig:
    """Resources. A resumed job may change only these fields."""

    actors: int | None = None
    """Processes that hold the model. None: one per GPU, or one per node without GPUs."""
    cpus_per_actor: float | None = None
    """CPUs that each actor reserves and uses. None: an equal share of the cluster."""
    gpus_per_actor: float | None = None
    """GPUs per actor. None: 1 if the cluster has GPUs, else 0."""
    batch_size: int = 32
    """Largest batch of an actor. A converted model takes 4 or 32 images at once, whichever was measured to be faster;
    Keras halves the batch once if memory runs out."""
    decode: Literal["auto", "actor", "tasks"] = "auto"
    """Where to decode images: in the threads of the `actor`, or in CPU `tasks` anywhere in the cluster. auto: tasks if
    the actor has a GPU."""
    max_bad_fraction: float = 0.1
    """Fail the job if more than this fraction of rows is bad: they claim to be images, by their suffix or because they
    were named, and could not be scored, for whatever reason. The table is still written. A table without a single row
    that is ok is a failed one, too."""
    max_failures: int = 3
    """How often a worker may die on the same shard before the job fails."""
    storage_is_shared: bool = False
    """Local folders are the same on every node (NFS or similar)."""
    vacuum_older_than: int | None = None
    """Of a Delta table, delete replaced files that are older than this, h, after the commit. None: keep them, for
    readers of older versions."""
    lock_wait_s: float = LOCK_WAIT_S
    """How long to wait for a lock that another driver holds, s; after 60 s of silence it is taken over. 0: fail at
    once."""
    wait_for_nodes_s: float = 0.0
    """How long to wait for an autoscaling cluster to provide the requested actors, s (if none are requested: one with 1
    CPU and no GPU). 0: use what is there."""
    dry_run: bool = False
    """List the images, check everything and report what would be done; write nothing."""
    plan: bool = False
    """Run the job on a sample with a scratch output on the cluster, report the bottleneck and how long the whole job
    would take; write nothing to the output."""
    verbose: bool = False
    """Show the output of Ray and TensorFlow."""

    def __post_init__(self) -> None:
        for name in ("actors", "cpus_per_actor"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive", **{name: value})
        require(
            self.gpus_per_actor is None or self.gpus_per_actor >= 0,
            "gpus_per_actor must be 0 or above",
            gpus_per_actor=self.gpus_per_actor,
        )
        require(self.batch_size >= 1, "batch_size must be at least 1 image", batch_size=self.batch_size)
        require(
            0 <= self.max_bad_fraction <= 1,
            "max_bad_fraction must be in [0, 1]",
            max_bad_fraction=self.max_bad_fraction,
        )
        require(self.max_failures >= 0, "max_failures must be 0 or above", max_failures=self.max_failures)
        require(
            self.vacuum_older_than is None or self.vacuum_older_than >= 1,  # Files of a commit under way are younger.
            "vacuum_older_than must be at least 1 h",
            vacuum_older_than=self.vacuum_older_than,
        )
        require(not (self.plan and self.dry_run), "choose either plan or dry_run", plan=True, dry_run=True)
        require(
            self.wait_for_nodes_s >= 0, "wait_for_nodes_s must be 0 or above", wait_for_nodes_s=self.wait_for_nodes_s
        )
        require(self.lock_wait_s >= 0, "lock_wait_s must be 0 or above", lock_wait_s=self.lock_wait_s)


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """Scores images with a bundle into a Parquet table with exactly one row per image. The same command resumes the
    job."""

    bundle: str
    """Folder or bucket prefix of the trained model."""
    output: str
    """Folder or bucket prefix (`s3://`, `gs://`, `az://`) for the prediction table; it also identifies the job to
    resume."""
    mode: Literal["continue", "incremental", "fresh"] = "continue"
    """continue: resume the job, or return its finished table. incremental: list the inputs again and score what is new
    or changed. fresh: score everything again; the old table stays until the new one is complete."""
    drop_missing: bool = False
    """With mode incremental: delete the rows of images that lay in the listed folders and archives and are gone.
    Without it, their rows stay."""
    retry_failed: bool = False
    """Score the bad rows again, and what can be read of archives that could not be read. The limits for images
    (`max_pixels`, `max_bytes`, `image_timeout_s`) may be others then."""
    shard_size: int | None = None
    """Images per shard, the unit of work that is repeated if a worker dies. None: 256 to 4,096, depending on the number
    and size of the images."""
    max_rows_per_file: int = MAX_ROWS_PER_FILE
    """Largest number of rows in a Parquet file of the table; a file also ends at about 128 MiB. Counts for the files
    that this job writes; files that stay as they are keep their size."""
    inputs: InputConfig
    table: TableConfig = TableConfig()
    decoding: DecodeConfig = field(default_factory=DecodeConfig)
    engine: EngineConfig = EngineConfig()
    store: StoreConfig = field(default_factory=StoreConfig)
    run: ScoreRunConfig = ScoreRunConfig()

    def __post_init__(self) -> None:
        require(bool(self.output), "output must be a folder or a bucket prefix", output=self.output)
        require(
            self.shard_size is None or self.shard_size >= 1, "shard_size must be at least 1", shard_size=self.shard_size
        )
        require(
            self.max_rows_per_file >= 1,
            "max_rows_per_file must be at least 1 row",
            max_rows_per_file=self.max_rows_per_file,
        )
        require(
            not self.drop_missing or self.mode == "incremental",
            "drop_missing needs mode incremental",
            mode=self.mode,
        )
        require(
            not (self.retry_failed and self.mode != "continue"),
            "retry_failed needs mode continue",
            mode=self.mode,
            retry_failed=self.retry_failed,
        )

    def settings(self) -> dict[str, Any]:
        """The settings that determine the rows (together with the bundle), as JSON values without secrets."""
        values = shown_values(json.loads(json.dumps(dataclasses.asdict(self))))
        del values["table"]["threshold"]  # The values count, not where they stand.
        del values["decoding"]["decode_memory"]  # A resource: a resumed job may run on a smaller machine.
        of_table = {name: values[name] for name in ("inputs", "table", "decoding")}
        return {**of_table, "tta": {"views": sorted(self.engine.tta)}}  # Existing rows say by which engine.

    @classmethod
    def completed(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings stored by an older version, with defaults for fields it did not have; the defaults change no row."""
        defaults = cls(bundle="", output="-", inputs=InputConfig(input=("-",))).settings()
        return {name: {**values, **settings.get(name, {})} for name, values in defaults.items()}


def _names(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for value in values for name in value.replace(",", " ").split())
