"""A worker's side of the scoring job: shards in, one file of rows for each out.

Ray Data calls `ScoringActor` with a shard, two at once, and `DecodeTask` where images are decoded in CPU tasks. An
actor answers with how far it is, a few times a second, and at last with a report. Ray Data loses the type of what is
raised in it, so what was foreseen is returned, pickled.

What happens when a process dies: Ray starts another and gives it the same shard. A marker that was put before the
shard was begun tells it to decode in a child process, image by image; more than `max_failures` of them end the job.
"""

import json
import os
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mnist_dist import storage
from mnist_dist.config import DecodeConfig, TableConfig
from mnist_dist.data.images import Decoded, ImageSpec
from mnist_dist.errors import DecoderStuck, ImageError, MnistDistError, WorkersFailed
from mnist_dist.models.bundle import load_bundle
from mnist_dist.on_ray.side_thread import SideThread
from mnist_dist.scoring.decoding import Collector, DecodePool, Threads, Times
from mnist_dist.scoring.generations import Generation
from mnist_dist.scoring.manifest import Manifest
from mnist_dist.scoring.predictions import Outcomes, prediction_rows, prediction_schema
from mnist_dist.scoring.scorer import Progress, Scorer

FORESEEN = (MnistDistError, OSError)
SECONDS_BETWEEN_ANSWERS = 0.5
READING_THREADS, READING_THREADS_REMOTE = 1, 16  # beside those that decode; remote storage answers after milliseconds


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """What every worker is told."""

    bundle: str
    """URI."""
    model_id: str
    generation: Generation
    spec: ImageSpec
    table: TableConfig
    decoding: DecodeConfig
    batch_size: int
    cpus: int | None
    """Cores of the actor; None: all of the machine's."""
    remote: bool
    """Images are read from an object store."""
    max_failures: int
    run_id: str
    """Of the driver: attempts of earlier ones do not count as failures."""


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """How far a shard is; begun again, since its actor died, it is counted again from zero."""

    shard: int
    ok: int
    other: int


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What came of a shard."""

    shard: int
    statuses: Counter[str]
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
        self._task = task
        self._failure: BaseException | None = None
        self._isolated: set[int] = set()
        try:
            self._open()
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
        told = ShardProgress(shard, 0, 0)
        while work.is_alive():
            work.join(SECONDS_BETWEEN_ANSWERS)
            if (now := counted.progress()) != told:
                told = now
                yield _block(told)
        yield _block(_answer_of(work))

    def _open(self) -> None:
        from mnist_dist.models.engines import KerasEngine  # not needed where images are decoded

        task = self._task
        bundle = load_bundle(task.bundle)
        if bundle.info.model_id != task.model_id:
            raise WorkersFailed(f"the bundle was replaced while the job ran. Received: {task.bundle!r}")
        self._manifest = Manifest(task.generation.manifest_uri)
        self._schema = prediction_schema(task.table, carried=self._manifest.carried)
        self._class_names = bundle.info.class_names
        engine = KerasEngine(bundle, batch_size=task.batch_size, embeddings=task.table.embeddings, cpus=task.cpus)
        spec = task.spec
        engine(np.zeros((1, spec.height_px, spec.width_px, spec.channels), np.uint8))  # the first call takes long
        self._scorer = Scorer(engine, spec=task.spec, decoding=task.decoding, threads=threads_of(task))

    def _report(self, shard: int, decoded: Any, counted: "_Counted") -> ShardReport:
        if self._failure is not None:
            raise self._failure
        began_at = time.time()
        attempt = begin_attempt(self._task, shard, stage="scoring")
        if attempt > 1:
            self._isolated.add(shard)
        rows = self._manifest.read(shard)
        # beside a shard that had to be begun again, so that no image of another one ends it once more
        outcomes = self._outcomes(rows, decoded, isolated=bool(self._isolated), progress=counted.add)
        self._write(shard, rows, outcomes)
        self._isolated.discard(shard)
        return ShardReport(
            shard=shard,
            statuses=Counter(outcomes.status),
            began_at=began_at,
            ended_at=time.time(),
            times=replace(self._scorer.times),
            process=f"{os.uname().nodename}-{os.getpid()}",
        )

    def _outcomes(self, rows: pa.Table, decoded: Any, *, isolated: bool, progress: Progress) -> Outcomes:
        if decoded is None:
            return self._scorer.score(rows, isolated=isolated, progress=progress)
        given: DecodedShard | BaseException = pickle.loads(decoded[0])
        if isinstance(given, BaseException):
            raise given
        return self._scorer.classify(given.images, size_bytes=given.size_bytes, etags=given.etags, progress=progress)

    def _write(self, shard: int, rows: pa.Table, outcomes: Outcomes) -> None:
        table = prediction_rows(
            self._schema,
            uris=rows["uri"],
            outcomes=outcomes,
            class_names=self._class_names,
            top_k=self._task.table.top_k,
            model_id=self._task.model_id,
            scored_at=datetime.now(UTC),
            carried=rows.select(self._manifest.carried.names),
        )
        with storage.new_object(self._task.generation.shard_uri(shard)) as file:
            pq.write_table(table, file, compression="zstd")


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
        """The shard's block with `decoded`: a pickled `DecodedShard`, or a pickled error."""
        shard = int(batch["shard"][0])
        try:
            content: Any = self._decode(shard)
        except DecoderStuck:
            os._exit(1)  # as in an actor; told to the actor, it would end that one again and again
        except FORESEEN as error:
            content = error
        return {"shard": [shard], "decoded": [pickle.dumps(content, protocol=5)]}

    def _decode(self, shard: int) -> DecodedShard:
        task = self._task
        attempt = begin_attempt(task, shard, stage="decoding")
        with Manifest(task.generation.manifest_uri) as manifest:
            rows = manifest.read(shard)
        with DecodePool(task.spec, config=task.decoding, threads=threads_of(task)) as pool:
            found = Collector(len(rows))
            pool.begin(rows, found, isolated=attempt > 1)
            found.wait(pool)
        return DecodedShard(found.images, found.size_bytes, found.etags)


def begin_attempt(task: ScoreTask, shard: int, *, stage: str) -> int:
    """Puts the marker of a shard that is begun; how often it was begun, over all drivers.

    Raises:
        WorkersFailed: it ended more than `max_failures` processes of this driver.
    """
    uri = task.generation.begun_uri(shard, stage=stage)
    try:
        before = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        before = {"attempts": 0, "run_id": task.run_id, "of_run": 0}
    of_run = before["of_run"] + 1 if before["run_id"] == task.run_id else 1
    if of_run > task.max_failures + 1:
        raise WorkersFailed(f"shard {shard} ended {of_run - 1} processes that worked on it ({stage}); see Ray's logs")
    marker = {"attempts": before["attempts"] + 1, "run_id": task.run_id, "of_run": of_run}
    storage.write_bytes(uri, json.dumps(marker).encode())
    return int(marker["attempts"])


def threads_of(task: ScoreTask) -> Threads:
    """One thread a core decodes; more wait for remote storage."""
    cores = task.cpus or os.cpu_count() or 1
    return Threads(decoding=cores, reading=READING_THREADS_REMOTE if task.remote else READING_THREADS)


def _answer_of(work: SideThread) -> ShardReport | BaseException:
    if isinstance(work.error, DecoderStuck):
        os._exit(1)  # a thread that hangs cannot be ended; the next attempt knows by the marker
    if isinstance(work.error, FORESEEN):
        return work.error
    report: ShardReport = work.result()
    return report


def _block(answer: ShardProgress | ShardReport | BaseException) -> dict[str, Any]:
    return {"answer": [pickle.dumps(answer)]}


class _Counted:
    """Counts the images of a shard, told by several threads."""

    def __init__(self, shard: int) -> None:
        self._shard, self._lock = shard, threading.Lock()
        self._ok = self._other = 0

    def add(self, ok: int, other: int) -> None:
        with self._lock:
            self._ok, self._other = self._ok + ok, self._other + other

    def progress(self) -> ShardProgress:
        return ShardProgress(self._shard, self._ok, self._other)
