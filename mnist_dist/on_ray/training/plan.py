"""The plan of a training: a sample is decoded, each phase is trained on it for some seconds, and nothing is kept.

Owns: what is asked of the cluster, and what is said. Does not own: the measurements in the workers (`plan_worker`), or
what follows from them (`training/planning.py`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from mnist_dist import storage
from mnist_dist.config import TrainJob, require
from mnist_dist.console import Bar, Console, Stop, command_line
from mnist_dist.data.records import RecordPlan, decode_shard, fingerprint, finish, plan_records, read_index
from mnist_dist.data.sampling import spread_rows
from mnist_dist.data.sources import Source
from mnist_dist.data.splits import Splits
from mnist_dist.errors import ConfigError, WorkersFailed
from mnist_dist.lock import Lock
from mnist_dist.on_ray.cluster import Resources, Share, await_workers, connected, share
from mnist_dist.on_ray.data.features import compute_missing, feature_actors
from mnist_dist.on_ray.data.prepare import (
    DecodedData,
    Listed,
    check_places,
    list_data,
    plan_job_features,
    scratch_storage,
)
from mnist_dist.on_ray.tasks import wait_for
from mnist_dist.on_ray.training.attempt import Attempt
from mnist_dist.on_ray.training.board import make_board
from mnist_dist.on_ray.training.messages import WorkerTask
from mnist_dist.on_ray.training.plan_found import Found, result_of, say
from mnist_dist.training.features import FeaturePlan
from mnist_dist.training.planning import PHASE_S, PhasePace, Sizes, endless, forecast_phases
from mnist_dist.training.runs import Run

SAMPLE_BYTES = 256 * 2**20  # of decoded pixels
LEAST_SAMPLE, MOST_SAMPLE = 1_024, 60_000
SAMPLE_OF_FEATURES = 1_024  # VGG16 on two cores computes so many in half a minute
LEAST_STEPS = 4  # of an epoch of the sample
USUAL_DECODE_S = 10.0  # of a sample: for the bar; so is the next
USUAL_START_S = 20.0  # of the workers, to their first step


def plan_train(job: TrainJob, *, console: Console) -> dict[str, Any]:
    """Says what a training would take, and what would hold it up.

    Args:
        job: checked; with absolute weights.
        console: what a person sees.

    Returns:
        `plan`, `images`, `bottleneck` (`decoding`, `features` or `training`), `decode_images_per_s_per_core` and
        `features_images_per_s` (None where there is nothing of that to do), `images_per_s` (of the training),
        `phases` (name, epochs, steps, images_per_s, epoch_s, seconds of each), `cpus_per_gpu` (with which decoding
        takes as long as the rest; None without GPUs), `expected_seconds`, `worker_memory_bytes`, `workers`, `seconds`.

    Raises:
        ConfigError: a flag, the data, the weights or the cluster do not fit.
        WorkersFailed: a worker failed.
        Interrupted: a signal.
    """
    began = time.monotonic()
    listed = list_data(job.data, job.model, root=job.run.storage, console=console)
    with scratch_storage(job.run, "plan") as root, Stop(console) as stop:
        mine = replace(job, run=replace(job.run, storage=root, name="plan", max_failures=0))
        with connected(verbose=job.run.verbose, stop=stop) as have:
            have = await_workers(have, job.run, console=console, stop=stop)
            check_places(listed, job.data, root=job.run.storage, is_shared=job.run.storage_is_shared, nodes=have.nodes)
            found = _Measurement(mine, listed, have, console=console, stop=stop).found(began=began)
    say(found, console=console)
    return {**result_of(found), "seconds": round(time.monotonic() - began, 2)}


class _Measurement:
    """One look at a training on the cluster at hand."""

    def __init__(self, job: TrainJob, listed: Listed, have: Resources, *, console: Console, stop: Stop) -> None:
        self._job, self._listed, self._have, self._console, self._stop = job, listed, have, console, stop
        self._sizes = sizes_of(listed.source.table["split"], job)

    def found(self, *, began: float) -> Found:
        """Measures everything, one after the other; `began`: when the plan did, s."""
        asked, batch = self._job.run, self._job.fit.batch_size
        mine = share(self._have, workers=asked.workers, cpus_per_worker=asked.cpus_per_worker, gpu=asked.gpu)
        require(
            mine.workers <= batch <= self._sizes.train,
            f"batch_size is at least the number of workers ({mine.workers}) and at most that of training images "
            f"({self._sizes.train:,})",
            batch_size=batch,
        )
        connected_s = time.monotonic() - began
        decoded, decode_s = self._decode()
        splits = sample_splits(decoded.index, self._sizes)
        features, features_rate = self._compute(decoded, splits) if self._job.uses_features else (None, None)
        workers_began = time.monotonic()
        metrics = self._train(decoded, splits, features, mine)
        workers_s = time.monotonic() - workers_began
        paces = [PhasePace(**pace) for pace in metrics["phases"]]
        phases = forecast_phases(self._job, paces, sizes=self._sizes)
        return Found(
            images=len(self._listed.source.table),
            share=mine,
            have=self._have,
            decode_s=decode_s,
            features_images_per_s=features_rate,
            features_images=self._sizes.train + self._sizes.validation if features else 0,
            phases=phases,
            start_s=connected_s + workers_s - sum(pace.measured_s for pace in paces),
            test_s=self._test_s(paces[-1], features_rate),
            memory_bytes=metrics["memory_bytes"],
        )

    def _test_s(self, pace: PhasePace, features_rate: float | None) -> float:
        """Validation and test of the whole network, once more, on images."""
        image_s = pace.validation_image_s or 1 / pace.images_per_s
        image_s += 1 / features_rate if features_rate else 0.0
        return (self._sizes.validation + self._sizes.test) * image_s

    def _decode(self) -> tuple[DecodedData, float | None]:
        """The decoded sample, and what a core takes for an image of it."""
        source, spec = self._listed.source, self._listed.plan.spec
        table = source.table
        rows = spread_rows(len(table), most=self._sample_size(), run_rows=64)
        if source.pixels is None:
            source = replace(source, table=table.take(pa.array(rows)))
        plan = plan_records(source, spec, storage=self._job.run.storage, max_pixels=self._listed.plan.max_pixels)
        seconds = self._decode_shards(plan, source) if source.pixels is None else None
        finish(plan, source)
        index = read_index(plan.cache)
        bad = sum(status != "ok" for status in index["status"].to_pylist())
        data = DecodedData(
            source=source, plan=plan, index=index, fingerprint=fingerprint(index, plan.class_names), bad=bad
        )
        return data, None if seconds is None else seconds / plan.cache.rows

    def _sample_size(self) -> int:
        """Images: enough for some steps, few enough to be decoded in seconds; of those in memory, all."""
        source, batch = self._listed.source, self._job.fit.batch_size
        if source.pixels is not None:
            return len(source.table)
        share_of_training = self._sizes.train / len(source.table)
        least = int(LEAST_STEPS * batch / share_of_training) + 1
        most = SAMPLE_OF_FEATURES if self._job.uses_features else MOST_SAMPLE
        by_bytes = max(LEAST_SAMPLE, SAMPLE_BYTES // self._listed.plan.spec.image_bytes)
        return max(least, min(by_bytes, most))

    def _decode_shards(self, plan: RecordPlan, source: Source) -> float:
        """Seconds of cores, over all shards."""
        cache, uris = plan.cache, source.table["uri"].to_pylist()
        self._console.line(f"decoding {cache.rows:,} images")
        decode = ray.remote(num_cpus=1, max_retries=0)(_timed_decode)
        tasks = [decode.remote(plan, shard, uris[cache.rows_of(shard)]) for shard in cache.missing()]
        seconds = wait_for(tasks, title="decoding", expected_s=USUAL_DECODE_S, console=self._console, stop=self._stop)
        return float(sum(seconds))

    def _compute(self, decoded: DecodedData, splits: Splits) -> tuple[FeaturePlan, float]:
        """The features of the sample, by one actor, and how many images all actors would take a second."""
        features = plan_job_features(self._job, decoded, splits, have=self._have)
        actors = feature_actors(self._have)
        with self._console.progress("features") as shown:
            bar = TimedBar(shown)
            compute_missing(features, actors=replace(actors, count=1), bar=bar, stop=self._stop)
        return features, actors.count * bar.per_s()

    def _train(self, decoded: DecodedData, splits: Splits, features: FeaturePlan | None, mine: Share) -> dict[str, Any]:
        """What the workers measured."""
        run = Run(storage.join(self._job.run.storage, "plan"))
        task = WorkerTask(
            job=endless(self._job),
            records=decoded.plan,
            splits=splits,
            features=features,
            fingerprint=decoded.fingerprint,
            run=run.uri,
            checkpoint=None,
            board=make_board(),
            cpus=mine.cpus,
            gpu=mine.gpu,
            began_at=time.time(),
            command=command_line(),
        )
        self._console.line(
            f"training on {len(splits.train):,} images: {mine.workers} worker(s) of {mine.cpus:g} CPU"
            f"{' and a GPU' if mine.gpu else ''}, of {self._have}"
        )
        shown = _Unsaid(self._console, expected_s=USUAL_START_S + PHASE_S * len(task.job.phases.phases()))
        with Lock(storage.join(run.uri, "lock"), what=run.uri) as lock:
            result = Attempt(task, name="attempt-0001", share=mine, loop=_worker_loop).run_to_end(
                console=shown, stop=self._stop, lock=lock
            )
        if result.error is not None:
            raise result.error
        if result.metrics is None:
            self._stop.check()
            raise WorkersFailed("the workers stopped without having been asked to")
        return result.metrics


class _Unsaid(Console):
    """A console that leaves out the epochs of a training that is none, and whose bar is moved by the clock.

    Args:
        console: shows the rest.
        expected_s: how long the training should take.
    """

    def __init__(self, console: Console, *, expected_s: float) -> None:
        super().__init__(verbose=console.verbose, terminal=console.terminal)
        self._console, self._expected_s = console, expected_s

    def line(self, text: str) -> None:
        if not text.startswith("epoch "):
            self._console.line(text)

    @contextmanager
    def progress(self, title: str) -> Iterator[Bar]:
        with self._console.progress(title) as bar:
            yield _ClockBar(bar, total_s=self._expected_s)


class _ClockBar(Bar):
    def __init__(self, bar: Bar, *, total_s: float) -> None:
        self._bar, self._total_s, self._began = bar, total_s, time.monotonic()

    def update(self, *, done: float, total: float, note: str = "") -> None:
        elapsed = time.monotonic() - self._began
        self._bar.update(done=min(elapsed, self._total_s), total=self._total_s, note=note.partition("/")[0])


class TimedBar(Bar):
    """A bar that notes when how much was done.

    Args:
        bar: is moved, too.
    """

    def __init__(self, bar: Bar) -> None:
        self._bar, self._began = bar, time.monotonic()
        self._marks: list[tuple[float, float]] = []

    def update(self, *, done: float, total: float, note: str = "") -> None:
        self._marks.append((time.monotonic(), done))
        self._bar.update(done=done, total=total, note=note)

    def per_s(self) -> float:
        """Speed from the first mark to the last; from the begin where there is one mark only."""
        first = self._marks[0] if len(self._marks) > 1 else (self._began, 0.0)
        return (self._marks[-1][1] - first[1]) / max(self._marks[-1][0] - first[0], 1e-9)


def _worker_loop(config: dict[str, Any]) -> Any:
    from mnist_dist.on_ray.training.plan_worker import measure  # loads TensorFlow, which the driver never does

    return measure(config["task"])


def _timed_decode(plan: RecordPlan, shard: int, uris: list[str]) -> float:
    """Decodes a shard as the job does; how long that took, s."""
    began = time.perf_counter()
    decode_shard(plan, shard, uris)
    return time.perf_counter() - began


def sizes_of(given: pa.ChunkedArray, job: TrainJob) -> Sizes:
    """How many images each split will have, from what the data says of them; unreadable ones count, too."""
    counts = {item["values"]: item["counts"] for item in given.value_counts().to_pylist()}
    val, test = counts.get("val", 0), counts.get("test", 0)
    rest = len(given) - val - test
    new_test = 0 if test else round(rest * job.data.test_fraction)
    new_val = 0 if val else round(rest * job.data.validation_fraction)
    return Sizes(train=rest - new_val - new_test, validation=val + new_val, test=test + new_test)


def sample_splits(index: pa.Table, sizes: Sizes) -> Splits:
    """Splits of a sample in the proportions of the whole: which image is in which does not matter to how fast it is.

    Raises:
        ConfigError: too few images can be used.
    """
    readable = np.flatnonzero([status == "ok" for status in index["status"].to_pylist()])
    if len(readable) < 2:
        problem = next((error for error in index["error"].to_pylist() if error), "")
        raise ConfigError(
            f"a plan needs two images that can be used. Received: {len(readable)} of {len(index)} {problem}"
        )
    count = max(1, round(len(readable) * sizes.validation / (sizes.train + sizes.validation + sizes.test)))
    chosen = np.zeros(len(readable), np.bool_)
    chosen[np.linspace(0, len(readable) - 1, count).astype(np.int64)] = True
    none = np.zeros(0, np.int64)
    return Splits(readable[~chosen], readable[chosen], none, duplicates=0, duplicate_pairs=(), dropped=0)
