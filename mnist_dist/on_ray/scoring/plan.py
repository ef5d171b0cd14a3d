"""The plan of a scoring job: one of its actors, placed as the job would place it, works on a sample for some seconds.

Owns: what is asked of the cluster, and what is said. Does not own: the measurements (`scoring/measuring.py`), or what
follows from them (`scoring/planning.py`). Writes nothing
to the output, and takes no lock.
"""

import pickle
import queue
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from rich import filesize

from mnist_dist import storage
from mnist_dist.config import ScoreJob, TableConfig
from mnist_dist.console import Console, Stop, duration
from mnist_dist.engines.choice import EngineChoice, open_engine
from mnist_dist.engines.engine import Engine
from mnist_dist.errors import WorkersFailed
from mnist_dist.models.bundle import Bundle, load_bundle
from mnist_dist.on_ray.actors import Actors, await_actors, choose_actors
from mnist_dist.on_ray.cluster import Resources, connected
from mnist_dist.on_ray.scoring.actor import SECONDS_BETWEEN_ANSWERS
from mnist_dist.on_ray.scoring.engine import check_job_storage, job_engine
from mnist_dist.on_ray.scoring.shards import GIVE_UP_S, drain
from mnist_dist.on_ray.tasks import POLL_S, words_of
from mnist_dist.scoring.attempts import FORESEEN
from mnist_dist.scoring.decoding import Threads
from mnist_dist.scoring.generations import Output
from mnist_dist.scoring.manifest import MIN_SHARD, carried_schema
from mnist_dist.scoring.measuring import DECODE_S, MODEL_S, PIPELINE_S, Probe, measure, sample
from mnist_dist.scoring.planning import Forecast, Means, Pace, forecast
from mnist_dist.scoring.predictions import Outcomes, prediction_rows, prediction_schema
from mnist_dist.scoring.work import Work, find_work
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread

USUAL_S = 12.0 + DECODE_S + MODEL_S + PIPELINE_S  # with starting: for the bar


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """What the process that measures is told."""

    bundle: str
    """URI."""
    probe: Probe
    table: TableConfig
    engine: EngineChoice
    batch_size: int
    cpus: int


def plan_score(job: ScoreJob, bundle: Bundle, *, output: Output, console: Console) -> dict[str, Any]:
    """Says what the job would take, and what would hold it up.

    Args:
        job: what would be scored.
        bundle: opened.
        output: where the table is or would be.
        console: what a person sees.

    Returns:
        `plan`, `output`, `images`, `bottleneck` (`decoding`, `model` or `reading`), `decode_images_per_s_per_core`,
        `model_images_per_s` (of all actors), `expected_images_per_s`, `cpus_per_gpu` (that balance; None without GPUs),
        `cpus_per_model_cpu` (the same without), `expected_seconds`, `actor_memory_bytes`, `driver_memory_bytes`,
        `table_bytes`, `actors`, `seconds`.

    Raises:
        ConfigError: a flag, the input or the cluster does not fit, or no image of the sample can be used.
        ServiceError: the storage failed.
        WorkersFailed: the process that measures died, or an image hangs.
        Interrupted: a signal.
    """
    began = time.monotonic()
    with Stop(console) as stop:
        work = _find_work(job, output, console=console, stop=stop)
        images = len(work.table)
        if not images:
            console.line(f"{output.uri}: there is nothing to score")
            return {"output": output.uri, "images": 0, "plan": True, "seconds": round(time.monotonic() - began, 2)}
        total_bytes = work.listing.total_bytes if work.listing is not None else 0
        console.line(f"found {images:,} images to score, {filesize.decimal(total_bytes)}")
        with connected(verbose=job.run.verbose, stop=stop) as have:
            have = await_actors(have, job.run, console=console, stop=stop)
            check_job_storage(job, nodes=have.nodes)
            actors = choose_actors(have, job.run, most=-(-images // (job.shard_size or MIN_SHARD)))
            connected_s = time.monotonic() - began
            session = Session(console=console, stop=stop)
            engine = job_engine(
                job, bundle, job.engine, actors=actors, have=have, images=0, fallback=None, session=session
            )
            if not engine.check and not actors.gpus and job.engine.engine == "auto":
                console.line("measured by Keras: the job converts its model first, once, and may then be faster")
            pace, start_s = _measured(job, bundle, engine, work.table, actors=actors, console=console, stop=stop)
        means = means_of(actors, have)
        found = forecast(pace, means, images=images, start_s=connected_s + start_s)
    driver_bytes = psutil.Process().memory_info().rss
    _say(found, pace, means, images=images, actors=actors, have=have, driver_bytes=driver_bytes, console=console)
    return {
        "plan": True,
        "output": output.uri,
        "images": images,
        "bottleneck": found.bottleneck,
        "decode_images_per_s_per_core": round(1 / pace.decode_s, 2),
        "model_images_per_s": round(found.model_images_per_s, 2),
        "expected_images_per_s": round(found.images_per_s, 2),
        "cpus_per_gpu": round(found.balance, 2) if actors.gpus else None,
        "cpus_per_model_cpu": None if actors.gpus else round(found.balance, 2),
        "expected_seconds": round(found.seconds, 1),
        "actor_memory_bytes": pace.memory_bytes,
        "driver_memory_bytes": driver_bytes,
        "table_bytes": found.table_bytes,
        "actors": actors.count,
        "seconds": round(time.monotonic() - began, 2),
    }


def _find_work(job: ScoreJob, output: Output, *, console: Console, stop: Stop) -> Work:
    """What would be scored; a finished table is left out of account unless the job goes by it."""
    goes_by_table = job.mode == "incremental" or job.retry_failed
    before = output.committed() if goes_by_table else None
    listing = SideThread(lambda: find_work(job, output, before=before), name="listing")
    began = time.monotonic()
    listing.start()
    with console.progress("listing") as bar:
        while listing.is_alive():
            listing.join(POLL_S)
            stop.check()
            bar.update(done=0, total=1, note=f"{time.monotonic() - began:,.0f} s")
    work: Work = listing.result()
    prediction_schema(job.table, carried=carried_schema(work.table))
    return work


def means_of(actors: Actors, have: Resources) -> Means:
    """What decodes for the actors: their own threads, or a task on each whole core that they leave."""
    cores = max(1, int(actors.cpus))
    decode_cores: int = actors.count * cores
    processes = actors.count
    if actors.decode_in_tasks:
        decode_cores = processes = max(1, int(have.cpus - actors.count * actors.cpus))
    threads = Threads(decoding=1 if actors.decode_in_tasks else cores)
    return Means(
        actors=actors.count,
        cores_of_actor=cores,
        gpus_of_actor=actors.gpus,
        decode_cores=decode_cores,
        reading_threads=processes * (threads.decoding + threads.reading),
        decode_in_tasks=actors.decode_in_tasks,
    )


def _measured(
    job: ScoreJob,
    bundle: Bundle,
    engine: EngineChoice,
    table: pa.Table,
    *,
    actors: Actors,
    console: Console,
    stop: Stop,
) -> tuple[Pace, float]:
    """What an actor does, and how long it takes to start."""
    spec, cpus = bundle.info.spec, max(1, int(actors.cpus))
    task = ProbeTask(
        bundle=storage.absolute(job.bundle),
        engine=engine,
        probe=Probe(
            rows=sample(table, image_bytes=spec.image_bytes),
            spec=spec,
            decoding=job.decoding,
            threads=Threads(decoding=cpus),
            decode_elsewhere=actors.decode_in_tasks,
        ),
        table=job.table,
        batch_size=job.run.batch_size,
        cpus=cpus,
    )
    console.line(f"measuring {len(task.probe.rows):,} images by {engine}, in one of {actors}")
    began = time.monotonic()
    pace = _ProbeRun(task, actors).run_to_end(console=console, stop=stop)
    return pace, time.monotonic() - began - pace.measured_s


class _ProbeRun:
    """One actor of Ray Data, as the job has them: what Ray itself costs on the same cores is part of what it does."""

    def __init__(self, task: ProbeTask, actors: Actors) -> None:
        self._task, self._actors = task, actors
        self._answers: queue.SimpleQueue[Pace | BaseException | None] = queue.SimpleQueue()
        self._given_up = threading.Event()
        self._work = SideThread(self._drain, name="ray-data")

    def run_to_end(self, *, console: Console, stop: Stop) -> Pace:
        """What the actor measured.

        Raises:
            MnistDistError, OSError: what it came upon.
            WorkersFailed: it died.
            Interrupted: a signal came.
        """
        began = time.monotonic()
        self._work.start()
        try:
            with console.progress("measuring") as bar:
                while self._work.is_alive():
                    self._work.join(POLL_S)
                    stop.check()
                    elapsed = time.monotonic() - began
                    bar.update(done=min(elapsed, USUAL_S), total=USUAL_S, note=f"{elapsed:,.0f} s")
        finally:
            self._given_up.set()
            self._work.join(GIVE_UP_S)
        if self._work.error is not None:
            raise WorkersFailed(words_of(self._work.error)) from self._work.error
        return self._found()

    def _found(self) -> Pace:
        while not self._answers.empty():
            answer = self._answers.get()
            if isinstance(answer, BaseException):
                raise answer
            if answer is not None:
                return answer
        raise WorkersFailed("the process that measures ended without a word (--verbose and Ray's logs show where)")

    def _drain(self) -> None:
        drain(self._dataset(), into=self._answers, given_up=self._given_up)

    def _dataset(self) -> "ray.data.Dataset":
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items([{"probe": 0}], override_num_blocks=1)
        dataset.context.target_max_block_size = 1  # an answer is a block of its own and travels at once
        with warnings.catch_warnings():  # the two limits have no other name yet; without them a dying actor starts anew
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            return dataset.map_batches(
                ProbeActor,
                fn_constructor_args=(self._task,),
                batch_size=None,
                num_cpus=self._actors.cpus,
                num_gpus=self._actors.gpus,
                max_restarts=0,
                max_task_retries=0,
                compute=ray.data.ActorPoolStrategy(size=1),
            )


class ProbeActor:
    """Opens the model as an actor of the job does, and measures; what was foreseen is returned, pickled."""

    def __init__(self, task: ProbeTask) -> None:
        self._task = task

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Measures.

        Yields blocks of one row, `answer`: a pickled None a few times a second, at last a pickled `Pace` or error.
        """
        work = SideThread(self._measure, name="measuring")
        work.start()
        while work.is_alive():
            work.join(SECONDS_BETWEEN_ANSWERS)
            yield {"answer": [pickle.dumps(None)]}
        yield {"answer": [pickle.dumps(work.error if isinstance(work.error, FORESEEN) else work.result())]}

    def _measure(self) -> Pace:
        bundle = load_bundle(self._task.bundle)
        return measure(lambda: self._open(bundle), self._task.probe, write=lambda *rows: self._write(bundle, *rows))

    def _open(self, bundle: Bundle) -> Engine:
        task = self._task
        return open_engine(
            task.engine, bundle, batch_size=task.batch_size, embeddings=task.table.embeddings, cpus=task.cpus
        )

    def _write(self, bundle: Bundle, rows: pa.Table, outcomes: Outcomes) -> int:
        """The bytes of a shard's rows, which go nowhere."""
        carried, table = carried_schema(rows), self._task.table
        predictions = prediction_rows(
            prediction_schema(table, carried=carried),
            uris=rows["uri"],
            outcomes=outcomes,
            class_names=bundle.info.class_names,
            top_k=table.top_k,
            model_id=bundle.info.model_id,
            scored_at=datetime.now(UTC),
            carried=rows.select(carried.names),
        )
        # what a file takes beside its rows counts for nothing in the table, whose files are large
        return _file_bytes(predictions) - _file_bytes(predictions.slice(0, 0))


def _file_bytes(table: pa.Table) -> int:
    file = pa.BufferOutputStream()
    pq.write_table(table, file, compression="zstd")
    return int(file.getvalue().size)


def _say(
    found: Forecast,
    pace: Pace,
    means: Means,
    *,
    images: int,
    actors: Actors,
    have: Resources,
    driver_bytes: int,
    console: Console,
) -> None:
    """Tells a person."""
    unit = "GPU" if actors.gpus else "core of the model"
    bad = f"; {pace.not_ok:,} of {pace.images:,} images cannot be used" if pace.not_ok else ""
    lines = (
        f"{actors}, of {have}",
        f"decoding: {pace.decode_s * 1e3:,.2f} ms of a core for an image, {found.decode_images_per_s:,.0f} images/s on "
        f"{means.decode_cores:g} cores{bad}",
        f"model: {1e3 / pace.model_images_per_s:,.2f} ms of an actor for an image, {found.model_images_per_s:,.0f} "
        f"images/s of all; reading: {pace.read_s * 1e3:,.2f} ms of a thread",
        f"bottleneck: {found.bottleneck}; {found.balance:,.2g} core(s) that decode for each {unit} would balance",
        f"expected: {found.images_per_s:,.0f} images/s, {duration(found.seconds)} for {images:,} images "
        f"({duration(found.scoring_s)} of them scoring, {duration(found.commit_s)} committing)",
        f"memory: {filesize.decimal(pace.memory_bytes)} an actor, {filesize.decimal(driver_bytes)} the driver; "
        f"table: {filesize.decimal(found.table_bytes)}",
        "plan: no image was scored, and nothing written to the output",
    )
    for line in lines:
        console.line(line)
