"""The workers of a scoring job: a shard goes in, one file of rows comes out.

Owns: `ScoringWorker`, which holds the model, and `DecodingWorker`, which reads and decodes for it in CPU tasks. Does
not own: running them (`on_ray/shard_runner.py`). A shard that seems to kill workers is decoded in a child process.
"""

import shutil
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from mnist_dist.config import DecodeConfig
from mnist_dist.data.decoding import Collector, DecodePool, Threads, Times
from mnist_dist.data.markers import Attempt
from mnist_dist.engines.choice import EngineChoice, open_engine
from mnist_dist.engines.views import with_views
from mnist_dist.errors import ImageError, WorkersFailed
from mnist_dist.images.decoder import Decoded
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import load_bundle
from mnist_dist.score_config import TableConfig, TtaView
from mnist_dist.scoring.generations import Generation
from mnist_dist.scoring.manifest import Manifest
from mnist_dist.scoring.predictions import Outcomes, prediction_rows
from mnist_dist.scoring.scorer import Scorer
from mnist_dist.sources.image_table import OTHER_FILE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import is_remote

if TYPE_CHECKING:
    from mnist_dist.on_ray.shard_runner import Counter  # loads Ray Data, which the driver imports while Ray starts

TASK_SHARD_BYTES = 128 * 2**20  # maximum size of the decoded pixels that a task passes to an actor


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """The parameters of all workers of a job."""

    bundle: str
    """URI of the bundle."""
    model_id: str
    engine: EngineChoice
    generation: Generation
    spec: ImageSpec
    table: TableConfig
    schema: pa.Schema
    """The columns of the table."""
    decoding: DecodeConfig
    store: Store
    """The store to read the images from."""
    batch_size: int
    cpus: int
    """Cores per actor."""
    tta: tuple[TtaView, ...] = ()
    gpu: bool = False
    """The actor has a GPU."""


@dataclass(frozen=True)
class DecodedShard:
    """The decoded images of a shard, which a task passes to an actor."""

    images: list[Decoded | ImageError]
    size_bytes: list[int | None]
    etags: list[str | None]
    times: Times


class ScoringWorker:
    """Holds the model and scores shards."""

    title = "scoring"

    def __init__(self, task: ScoreTask) -> None:
        self._task = task

    def open(self) -> None:
        """Loads the model."""
        task, spec = self._task, self._task.spec
        bundle = load_bundle(task.bundle)
        if bundle.info.model_id != task.model_id:
            raise WorkersFailed(f"the bundle was replaced while the job ran. Received: {task.bundle!r}")
        self._class_names = bundle.info.class_names
        opened = open_engine(
            task.engine,
            bundle,
            batch_size=task.batch_size,
            embeddings=task.table.embeddings,
            cpus=task.cpus,
            gpu=task.gpu,
        )
        if is_remote(task.bundle):
            shutil.rmtree(bundle.path)  # the local copy: a process that is killed later would leave it behind
        engine = with_views(opened, task.tta)
        threads = Threads(decoding=task.cpus)
        self._scorer = Scorer(engine, spec=spec, decoding=task.decoding, threads=threads, store=task.store)
        self._suspects: set[int] = set()
        self._lock = threading.Lock()
        self._manifest: Manifest | None = None
        self._times_elsewhere = Times()

    def work(self, shard: int, given: DecodedShard | None, *, attempt: Attempt, counter: "Counter") -> Times:
        """Scores a shard and writes its rows; returns the times since this process began, decoding tasks included."""
        if attempt.is_suspect:
            self._suspects.add(shard)
        rows = self._shards().read(shard)
        if given is None:
            # isolated while any suspect shard is open: an image of another shard could kill this process, too
            outcomes = self._scorer.score(rows, isolated=bool(self._suspects), progress=counter.add)
        else:
            outcomes = self._scorer.classify(
                given.images, size_bytes=given.size_bytes, etags=given.etags, progress=counter.add
            )
            with self._lock:
                self._times_elsewhere += given.times
        self._write(shard, rows, outcomes)
        self._suspects.discard(shard)
        return self._scorer.times + self._times_elsewhere

    def _shards(self) -> Manifest:
        """The manifest, opened with the first shard: it exists by then."""
        with self._lock:
            if self._manifest is None:
                self._manifest = Manifest(self._task.generation.manifest_uri, store=self._task.generation.store)
            return self._manifest

    def _write(self, shard: int, rows: pa.Table, outcomes: Outcomes) -> None:
        carried = self._shards().carried
        table = prediction_rows(
            self._task.schema,
            uris=rows["uri"],
            outcomes=outcomes,
            class_names=self._class_names,
            top_k=self._task.table.top_k,
            model_id=self._task.model_id,
            scored_at=datetime.now(UTC),
            carried=rows.select(carried.names),
            other_files=rows[OTHER_FILE],
            thresholds=self._task.table.thresholds,
        )
        with self._task.generation.store.new_object(self._task.generation.shard_uri(shard)) as file:
            pq.write_table(table, file, compression="zstd")


class DecodingWorker:
    """Reads and decodes shards anywhere in the cluster, without the model."""

    title = "decoding"

    def __init__(self, task: ScoreTask) -> None:
        self._task = task

    def open(self) -> None:
        """Does nothing: each shard gets its own threads."""

    def work(self, shard: int, given: None, *, attempt: Attempt, counter: "Counter") -> DecodedShard | None:
        """The decoded images; None if the actor has to decode the shard."""
        task = self._task
        with Manifest(task.generation.manifest_uri, store=task.generation.store) as manifest:
            if manifest.shard_rows(shard) * task.spec.image_bytes > TASK_SHARD_BYTES:
                return None  # a large compressed archive: the actor decodes it as a stream
            rows = manifest.read(shard)
        collector = Collector(len(rows))
        threads = Threads(decoding=1)
        with DecodePool(task.spec, config=task.decoding, threads=threads, store=task.store) as pool:
            pool.begin(rows, collector, isolated=attempt.is_suspect)
            collector.wait(pool)
        return DecodedShard(collector.images, collector.size_bytes, collector.etags, pool.times)
