"""A worker's side of the scoring job: shards in, one file of rows for each out.

Ray Data calls `ScoringActor` with a shard, two at once, and `DecodeTask` where images are decoded in CPU tasks. An
actor answers with how far it is, a few times a second, and at last with a report. Ray Data loses the type of what is
raised in it, so what was foreseen is returned, pickled.

What happens when a process dies: Ray starts another and gives it the same shard. A marker that was put before the
shard was begun tells it to decode in a child process, image by image; more than `max_failures` of them end the job.
"""

import os
import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from mnist_dist import storage
from mnist_dist.config import DecodeConfig, TableConfig
from mnist_dist.data.images import Decoded, ImageSpec
from mnist_dist.engines.choice import EngineChoice, open_engine
from mnist_dist.errors import DecoderStuck, ImageError, WorkersFailed
from mnist_dist.models.bundle import load_bundle
from mnist_dist.scoring.attempts import FORESEEN, Attempts
from mnist_dist.scoring.decoding import Collector, DecodePool, Threads, Times
from mnist_dist.scoring.generations import Generation
from mnist_dist.scoring.manifest import Manifest
from mnist_dist.scoring.predictions import Outcomes, prediction_rows, prediction_schema
from mnist_dist.scoring.scorer import Progress, Scorer
from mnist_dist.side_thread import SideThread

SECONDS_BETWEEN_ANSWERS = 0.5
TASK_SHARD_BYTES = 128 * 2**20  # of decoded pixels at most, that travel from a task to an actor


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """What every worker is told."""

    bundle: str
    """URI."""
    model_id: str
    engine: EngineChoice
    generation: Generation
    spec: ImageSpec
    table: TableConfig
    decoding: DecodeConfig
    batch_size: int
    cpus: int
    """Cores that an actor uses."""
    attempts: Attempts


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """How far a shard is; begun again, since its actor died, it is counted again from zero."""

    shard: int
    ok: int
    other: int
    at: float
    """Seconds since the epoch."""

    @property
    def images(self) -> int:
        return self.ok + self.other


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """How a shard was done."""

    began_at: float
    """Seconds since the epoch."""
    ended_at: float
    times: Times
    """Of the whole process, since it began."""
    process: str
    """Which process."""


class ScoringActor:
    """Holds the model; scores shards."""

    def __init__(self, task: ScoreTask) -> None:
        self._task, self._attempts = task, task.attempts
        self._failure: BaseException | None = None
        self._isolated: set[int] = set()
        self._manifest_lock = threading.Lock()
        self._manifest: Manifest | None = None
        own = f"actor-{ray.get_runtime_context().get_actor_id()}"  # the same when Ray starts it again
        try:
            self._attempts.begin(own)
            self._open()
            self._attempts.take_back(own)
        except FORESEEN as error:
            self._failure = error

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Scores the shard of a block of one row: `shard`, and `decoded` where that was done before.

        Yields blocks of one row, `answer`: a pickled `ShardProgress`, at last a pickled `ShardReport` or error.
        """
        shard = int(batch["shard"][0])
        counted = _Counted(shard)
        work = SideThread(lambda: self._report(shard, batch.get("decoded"), counted), name=f"shard-{shard}")
        work.start()
        told = 0
        while work.is_alive():
            work.join(SECONDS_BETWEEN_ANSWERS)
            if (now := counted.progress()).images != told:
                told = now.images
                yield _block(now)
        yield _block(self._answer(shard, work))

    def _open(self) -> None:
        task, spec = self._task, self._task.spec
        bundle = load_bundle(task.bundle)
        if bundle.info.model_id != task.model_id:
            raise WorkersFailed(f"the bundle was replaced while the job ran. Received: {task.bundle!r}")
        self._class_names = bundle.info.class_names
        engine = open_engine(
            task.engine, bundle, batch_size=task.batch_size, embeddings=task.table.embeddings, cpus=task.cpus
        )
        if storage.is_remote(task.bundle):
            shutil.rmtree(bundle.path)  # the copy; a process that is killed later would leave it
        self._scorer = Scorer(engine, spec=spec, decoding=task.decoding, threads=Threads(decoding=task.cpus))

    def _shards(self) -> Manifest:
        """The manifest, which is there when the first shard is."""
        with self._manifest_lock:
            if self._manifest is None:
                self._manifest = Manifest(self._task.generation.manifest_uri)
            return self._manifest

    def _report(self, shard: int, decoded: Any, counted: "_Counted") -> ShardReport:
        if self._failure is not None:
            raise self._failure
        began_at = time.time()
        with self._attempts.trying(marker(shard, "scoring")) as attempt:
            if attempt.is_suspect:
                self._isolated.add(shard)
            rows = self._shards().read(shard)
            # beside a shard that had to be begun again, so that no image of another one ends it once more
            outcomes = self._outcomes(rows, decoded, isolated=bool(self._isolated), progress=counted.add)
            self._write(shard, rows, outcomes)
        self._isolated.discard(shard)
        return ShardReport(
            began_at=began_at,
            ended_at=time.time(),
            times=replace(self._scorer.times),
            process=f"{os.uname().nodename}-{os.getpid()}",
        )

    def _outcomes(self, rows: pa.Table, decoded: Any, *, isolated: bool, progress: Progress) -> Outcomes:
        given: DecodedShard | BaseException | None = pickle.loads(decoded[0]) if decoded is not None else None
        if given is None:
            return self._scorer.score(rows, isolated=isolated, progress=progress)
        if isinstance(given, BaseException):
            raise given
        return self._scorer.classify(given.images, size_bytes=given.size_bytes, etags=given.etags, progress=progress)

    def _write(self, shard: int, rows: pa.Table, outcomes: Outcomes) -> None:
        carried = self._shards().carried
        table = prediction_rows(
            prediction_schema(self._task.table, carried=carried),
            uris=rows["uri"],
            outcomes=outcomes,
            class_names=self._class_names,
            top_k=self._task.table.top_k,
            model_id=self._task.model_id,
            scored_at=datetime.now(UTC),
            carried=rows.select(carried.names),
        )
        with storage.new_object(self._task.generation.shard_uri(shard)) as file:
            pq.write_table(table, file, compression="zstd")

    def _answer(self, shard: int, work: SideThread) -> ShardReport | BaseException:
        if isinstance(work.error, DecoderStuck):
            os._exit(1)  # a thread that hangs cannot be ended; the next attempt knows by the marker
        if isinstance(work.error, FORESEEN):
            self._attempts.note_failure(shard, work.error)
            return work.error
        report: ShardReport = work.result()
        return report


@dataclass(frozen=True)
class DecodedShard:
    """The images of a shard on their way from a task to an actor."""

    images: list[Decoded | ImageError]
    size_bytes: list[int | None]
    etags: list[str | None]


class DecodeTask:
    """Reads and decodes a shard anywhere in the cluster, without the model."""

    def __init__(self, task: ScoreTask) -> None:
        self._task = task

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The shard's block with `decoded`: a pickled `DecodedShard` or error; None where the actor has to decode."""
        shard = int(batch["shard"][0])
        try:
            content: Any = self._decode(shard)
        except DecoderStuck:
            os._exit(1)  # as in an actor; told to the actor, it would end that one again and again
        except FORESEEN as error:
            content = error
        return {"shard": [shard], "decoded": [pickle.dumps(content, protocol=5)]}

    def _decode(self, shard: int) -> DecodedShard | None:
        task = self._task
        with Manifest(task.generation.manifest_uri) as manifest:
            if manifest.shard_rows(shard) * task.spec.image_bytes > TASK_SHARD_BYTES:
                return None  # a compressed archive: it streams through the actor, not through its memory
            rows = manifest.read(shard)
        found = Collector(len(rows))
        with (
            task.attempts.trying(marker(shard, "decoding")) as attempt,
            DecodePool(task.spec, config=task.decoding, threads=Threads(decoding=1)) as pool,
        ):
            pool.begin(rows, found, isolated=attempt.is_suspect)
            found.wait(pool)
        return DecodedShard(found.images, found.size_bytes, found.etags)


def marker(shard: int, stage: str) -> str:
    """The name of a shard's marker."""
    return f"shard-{shard:06d}.{stage}"


def _block(answer: ShardProgress | ShardReport | BaseException) -> dict[str, Any]:
    return {"answer": [pickle.dumps(answer)]}


class _Counted:
    """Counts the images of a shard, told by several threads."""

    def __init__(self, shard: int) -> None:
        self._shard, self._lock = shard, threading.Lock()
        self._ok, self._other, self._at = 0, 0, time.time()

    def add(self, ok: int, other: int) -> None:
        with self._lock:
            self._ok, self._other, self._at = self._ok + ok, self._other + other, time.time()

    def progress(self) -> ShardProgress:
        with self._lock:
            return ShardProgress(self._shard, self._ok, self._other, self._at)
