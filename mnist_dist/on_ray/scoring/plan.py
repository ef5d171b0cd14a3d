"""The plan of a scoring job: runs the job on a sample, into a scratch output that is deleted afterwards.

Owns: the size of the sample, and the report. Does not own: scoring (`score.py`), or the extrapolation
(`scoring/planning.py`). Does not touch the output or its lock.
"""

import time
from typing import Any

import psutil
import pyarrow as pa
from rich import filesize

from mnist_dist.console import Console, duration
from mnist_dist.engines.choice import EngineChoice
from mnist_dist.errors import ConfigError
from mnist_dist.models.bundle import Bundle
from mnist_dist.on_ray.actors import Actors, await_actors, choose_actors
from mnist_dist.on_ray.cluster import Resources, connected
from mnist_dist.on_ray.data.prepare import scratch_storage
from mnist_dist.on_ray.scoring.score import WITH_RAY_DATA, Scoring, checked
from mnist_dist.on_ray.scoring.stages import means_of, total_times
from mnist_dist.score_config import ScoreJob
from mnist_dist.scoring.generations import Output
from mnist_dist.scoring.manifest import MIN_SHARD
from mnist_dist.scoring.planning import Forecast, SampleRun, forecast, sample
from mnist_dist.scoring.selection import Selection, select_images
from mnist_dist.session import Session, locked_session, seconds_since, started_at
from mnist_dist.side_thread import SideThread
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute, join, parent_of

FIRST_IMAGES = 256  # images per actor in the first sample
ENOUGH_S = 5.0  # of scoring; a sample that takes less time is followed by a larger one
WANTED_S = 15.0  # of scoring the larger sample
SHARDS = 8  # per actor in a sample, if the shards then hold whole batches


def plan_score(job: ScoreJob, *, console: Console) -> dict[str, Any]:
    """Forecasts the duration and the bottleneck of a job.

    Args:
        job: the job to forecast.
        console: where progress and results are shown.

    Returns:
        `plan`, `output`, `images`, `bottleneck` (`decoding`, `model` or `reading`), `decode_images_per_s_per_core`,
        `model_images_per_s` (all actors; their cores do other work, too), `expected_images_per_s`, `cpus_per_gpu`
        (decoding cores that balance a GPU; None without), `cpus_per_model_cpu` (without GPUs), `expected_seconds`,
        `actor_memory_bytes`, `driver_memory_bytes`, `table_bytes`, `actors`, `seconds`.

    Raises:
        ConfigError: a flag, the input or the cluster is invalid, or no image of the sample is usable.
        ServiceError: the storage failed.
        WorkersFailed: workers died on the same shard more than `max_failures` times.
        Interrupted: a signal arrived.
    """
    began_at = started_at(console)
    job, bundle = checked(job)
    output = Output(absolute(job.output))
    with (
        scratch_storage(parent_of(output.uri), is_shared=job.run.storage_is_shared, name="plan") as root,
        locked_session(console, lock_uri=join(root, "lock"), what=root) as session,
    ):
        plan = _Plan(job, bundle, session, root=root, began_at=began_at)
        table = plan.select_images(output).table
        if not len(table):
            console.line(f"{output.uri}: there is nothing to score")
            return {"output": output.uri, "images": 0, "plan": True, "seconds": seconds_since(began_at)}
        result = plan.result(table)
    return {"plan": True, "output": output.uri, **result, "seconds": seconds_since(began_at)}


class _Plan:
    """Makes the plan of one job, on the current cluster."""

    def __init__(self, job: ScoreJob, bundle: Bundle, session: Session, *, root: str, began_at: float) -> None:
        self._job, self._bundle, self._session, self._root, self._began_at = job, bundle, session, root, began_at
        self._memory_bytes = 0

    def select_images(self, output: Output) -> Selection:
        """The images that would be scored; an existing table matters only with mode incremental or `retry_failed`."""
        before = output.committed() if self._job.mode == "incremental" or self._job.retry_failed else None
        scoring = self._scoring(self._job, "listing")
        listing = SideThread(
            lambda: select_images(self._job, output, before=before, progress=scoring.note_found), name="listing"
        )
        listing.start()
        scoring.wait_for(listing)
        work: Selection = listing.result()
        return work

    def result(self, table: pa.Table) -> dict[str, Any]:
        """Measures the job on samples of its images, and returns the forecast."""
        job, console, images = self._job, self._session.console, len(table)
        console.line(f"found {images:,} images to score; running the job on a sample, into a scratch output")
        with connected(verbose=job.run.verbose, stop=self._session.stop, meanwhile=WITH_RAY_DATA) as resources:
            resources = await_actors(resources, job.run, self._session)
            actors = choose_actors(resources, job.run, most=-(-images // (job.shard_size or MIN_SHARD)))
            ready_s = time.time() - self._began_at
            # the converted model is stored beside the bundle, where the job finds it
            engine = self._scoring(job, "engine").choose_engine(job.engine, actors, resources, images=images)
            count = FIRST_IMAGES * actors.count
            run = self._run(sample(table, images=count), engine, actors, resources)
            wanted = round(WANTED_S * run.images_per_s)
            if run.images / run.images_per_s < ENOUGH_S and run.images < min(images, wanted):
                larger = sample(table, images=wanted)
                run = self._run(larger, engine, actors, resources) if len(larger) > run.images else run
        expected = forecast(run, means_of(actors, resources), images=images)
        seconds = ready_s + expected.seconds
        driver_bytes = psutil.Process().memory_info().rss
        self._show(expected, run, images=images, seconds=seconds, actors=actors, driver_bytes=driver_bytes)
        return {
            "images": images,
            "bottleneck": expected.bottleneck,
            "decode_images_per_s_per_core": round(expected.decode_images_per_s_per_core, 2),
            "model_images_per_s": round(expected.model_images_per_s, 2),
            "expected_images_per_s": round(run.images_per_s, 2),
            "cpus_per_gpu": round(expected.balance, 2) if actors.gpus else None,
            "cpus_per_model_cpu": None if actors.gpus else round(expected.balance, 2),
            "expected_seconds": round(seconds, 1),
            "actor_memory_bytes": self._memory_bytes,
            "driver_memory_bytes": driver_bytes,
            "table_bytes": expected.table_bytes,
            "actors": actors.count,
        }

    def _scoring(self, job: ScoreJob, name: str) -> Scoring:
        output = Output(join(self._root, name))
        return Scoring(
            job,
            self._bundle,
            output=output,
            session=self._session,
            began_at=time.time(),
        )

    def _run(self, rows: pa.Table, engine: EngineChoice, actors: Actors, resources: Resources) -> SampleRun:
        """Runs the job on a sample.

        Raises:
            ConfigError: no image is usable.
        """
        scoring = self._scoring(self._job, f"sample-{len(rows)}")
        batch = self._job.run.batch_size
        shard_size = max(1, len(rows) // (SHARDS * actors.count * batch)) * batch
        summary = scoring.score_sample(rows, engine, actors, resources, shard_size=shard_size)
        ok = summary.statuses.get("ok", 0)
        if not ok:
            status, (example, *_) = next((s, e) for s, e in summary.examples.items() if e)
            raise ConfigError(
                f"none of {len(rows):,} sampled images is usable, for example {example.uri}: {status}: {example.error}"
            )
        self._memory_bytes = max(report.memory_bytes for report in scoring.reports)
        return SampleRun(
            images=len(rows),
            ok=ok,
            images_per_s=scoring.steady_images_per_s or scoring.scored / scoring.scoring_s,
            start_s=min(report.began_at for report in scoring.reports) - scoring.began_at,
            commit_s=time.time() - max(report.ended_at for report in scoring.reports),
            table_bytes=sum(
                entry.size_bytes or 0
                for entry in ANYWHERE.list_entries(scoring.output.uri)
                if "/part-" in entry.uri and entry.uri.endswith(".parquet")
            ),
            times=total_times(scoring.reports),
        )

    def _show(
        self, expected: Forecast, run: SampleRun, *, images: int, seconds: float, actors: Actors, driver_bytes: int
    ) -> None:
        unit = "GPU" if actors.gpus else "core of the model"
        bad = f"; {run.images - run.ok:,} of {run.images:,} images are not usable" if run.ok < run.images else ""
        lines = (
            f"decoding: {expected.decode_images_per_s_per_core:,.0f} images/s per core{bad}; "
            f"model: {expected.model_images_per_s:,.0f} images/s on all actors",
            f"bottleneck: {expected.bottleneck}; {_balance(expected.balance, unit)}",
            f"expected: {run.images_per_s:,.0f} images/s, {duration(seconds)} for {images:,} images "
            f"({duration(expected.scoring_s)} scoring, {duration(expected.commit_s)} committing)",
            f"memory: {filesize.decimal(self._memory_bytes)} per actor, driver {filesize.decimal(driver_bytes)}; "
            f"table: {filesize.decimal(expected.table_bytes)}",
            "plan: nothing was written to the output",
        )
        for line in lines:
            self._session.console.line(line)


def _balance(cores: float, unit: str) -> str:
    """How many cores decode what a unit of the model takes; below one, for how many units a core does."""
    if cores < 1:
        return f"one core decodes enough for {_count(1 / cores, unit)}"
    return f"decoding for one {unit} takes {_count(cores, 'core')}"


def _count(number: float, unit: str) -> str:
    """`one core`, `2.5 cores`, `59 GPUs`, `12 cores of the model`."""
    shown = (f"{number:,.1f}" if number < 9.95 else f"{number:,.0f}").removesuffix(".0")
    first, space, rest = unit.partition(" ")
    return f"one {unit}" if shown == "1" else f"{shown} {first}s{space}{rest}"
