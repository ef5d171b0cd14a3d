"""The plan of a training: a real run on a sample, in scratch storage that is deleted.

Owns: the sample, and the report of the plan. Does not own: the run (`train.py`), or the forecast from the times of its
epochs (`training/planning.py`).
"""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from rich import filesize

from mnist_dist.config import DataConfig, TrainJob
from mnist_dist.console import Console, duration
from mnist_dist.data.records import plan_records
from mnist_dist.data.sampling import spread_rows
from mnist_dist.data.splits import Splits
from mnist_dist.errors import ConfigError
from mnist_dist.on_ray.cluster import connected, resources
from mnist_dist.on_ray.data.prepare import DecodedData, Listed, list_data, scratch_storage
from mnist_dist.on_ray.training.train import Training, check_job, check_ready, with_batch_of_run
from mnist_dist.session import Session, locked_session, seconds_since, started_at
from mnist_dist.sources.source import taken
from mnist_dist.store.anywhere import store_for
from mnist_dist.store.uris import join
from mnist_dist.training.planning import EpochTimes, Sizes, forecast_phases, overall_images_per_s, sizes_of
from mnist_dist.training.runs import Run

SAMPLE_BYTES = 256 * 2**20  # size of the sample's decoded pixels
MIN_SAMPLE, MAX_SAMPLE = 1_024, 60_000
MAX_SAMPLE_OF_FEATURES = 1_024  # VGG16 on two cores computes this many in half a minute
FIRST_STEPS = 8  # steps per epoch of the first sample run
EPOCHS = 2  # per phase; the first epoch includes tracing, so only the second is measured
ENOUGH_S = 4.0  # if an epoch's steps take less, a second run with more steps follows
WANTED_S = 8.0  # an epoch of the second run takes about this long


def plan_train(job: TrainJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """Forecasts the duration and memory of a training, and finds its bottleneck.

    Args:
        job: what would be trained.
        recipe: the recipe's name.
        console: shows progress and the plan to the user.

    Returns:
        `plan`, `images`, `bottleneck` (`decoding`, `features` or `training`), `decode_images_per_s_per_core` and
        `features_images_per_s` (None if there is nothing to decode or compute), `batch_size`, `images_per_s` (of the
        training),
        `phases` (name, epochs, steps, images_per_s, epoch_s, seconds of each), `cpus_per_gpu` (so that decoding
        takes as long as the rest; None without GPUs), `expected_seconds`, `worker_memory_bytes`, `workers`, `seconds`.

    Raises:
        ConfigError: a flag, the data, the weights or the cluster is unsuitable.
        TooManyBadImages: the fraction of unreadable images in the sample exceeds `max_bad_fraction`.
        WorkersFailed: a worker failed.
        Interrupted: a signal stopped the plan.
    """
    began_at = started_at(console)
    check_job(job)
    check_ready([job.model], run=job.run, console=console)
    listed = list_data(job.data, job.model, root=job.run.storage, console=console, store=store_for(job.store))
    with (
        scratch_storage(job.run.storage, is_shared=job.run.storage_is_shared, name="plan") as root,
        locked_session(console, lock_uri=join(root, "lock"), what=root) as session,
        connected(verbose=job.run.verbose, stop=session.stop),
    ):
        scratch_job = replace(job, run=replace(job.run, storage=root, name="plan", max_failures=0))
        plan = _Plan(scratch_job, listed, session, recipe=recipe)
        result = plan.result(ready_s=seconds_since(began_at))
    console.line("Plan finished. Nothing was kept.")
    return {**result, "seconds": seconds_since(began_at)}


class _Plan:
    """One forecast of a training on the connected cluster."""

    def __init__(self, job: TrainJob, listed: Listed, session: Session, *, recipe: str) -> None:
        job = with_batch_of_run(job, root=job.run.storage, session=session, listed=listed)
        self._job, self._session, self._recipe = job, session, recipe
        self._sizes = sizes_of(listed.source.table["split"], job.data)
        self._sample = self._sampled(listed)
        phases = replace(job.phases, epochs=(EPOCHS,))
        fit = replace(job.fit, early_stopping_patience=None, plateau_patience=None)
        self._short = replace(job, phases=phases, fit=fit)

    def result(self, *, ready_s: float) -> dict[str, Any]:
        """Measures the sample and returns the plan. `ready_s`: the time that listing and connecting took."""
        first, result = self._run(FIRST_STEPS)
        decode_s, features_rate = first.decode_core_s / len(self._sample.source.table), first.features_images_per_s
        training, epochs = first, epochs_of(result)
        slowest_s = max(epoch.train_s for epoch in epochs)
        if slowest_s < ENOUGH_S and epochs[0].steps == FIRST_STEPS:
            training, result = self._run(round(FIRST_STEPS * WANTED_S / slowest_s))
            epochs = epochs_of(result)
        sizes, batch, steps = self._sizes, self._job.fit.global_batch, epochs[0].steps
        validated = min(result["validation_images"], steps * batch)
        phases = forecast_phases(self._job, epochs, sizes=sizes, validated=validated)
        features_images = sizes.train + sizes.validation
        parts = {
            "decoding": sizes.images * decode_s / max(1.0, resources().cpus),
            "features": features_images / features_rate if features_rate else 0.0,
            "training": sum(phase.seconds for phase in phases),
        }
        # starting, tracing, the last validation and the test take as long as on the sample, plus the images it left out
        sample_s = EPOCHS * sum(epoch.train_s + epoch.validation_s + epoch.save_s for epoch in epochs)
        rest_s = max(0.0, result["seconds"] - training.prepared_s - sample_s)
        left_out = sizes.validation + sizes.test - validated - min(result["test_images"], steps * batch)
        rest_s += max(0, left_out) * (
            epochs[-1].validation_s / validated + (1 / features_rate if features_rate else 0.0)
        )
        plan = {
            "plan": True,
            "images": sizes.images,
            "bottleneck": max(parts, key=lambda name: parts[name]),
            "decode_images_per_s_per_core": round(1 / decode_s, 2) if decode_s else None,
            "features_images_per_s": features_rate and round(features_rate, 2),
            "batch_size": batch,
            "images_per_s": round(overall_images_per_s(phases), 2),
            "phases": [{k: round(v, 2) if isinstance(v, float) else v for k, v in vars(p).items()} for p in phases],
            "cpus_per_gpu": None,
            "expected_seconds": round(ready_s + rest_s + sum(parts.values()), 1),
            "worker_memory_bytes": result["memory_bytes"],
            "workers": result["workers"],
        }
        balance = sizes.images * decode_s / (parts["features"] + parts["training"])
        if training.has_gpus:
            plan["cpus_per_gpu"] = round(balance / result["workers"], 2)
        self._report(plan, parts, balance=balance)
        return plan

    def _run(self, steps: int) -> tuple[Training, dict[str, Any]]:
        """Runs the sample with at most `steps` steps per epoch."""
        run = Run(join(self._job.run.storage, f"plan-{steps}"))
        training = Training(
            self._short,
            self._session,
            recipe=self._recipe,
            run=run,
            began_at=time.time(),
            steps_limit=steps,
            split=self._split,
        )
        return training, training.run_to_end(self._sample)

    def _split(self, decoded: DecodedData, data: DataConfig, *, console: Console) -> Splits:
        return sample_splits(decoded.index, self._sizes)

    def _sampled(self, listed: Listed) -> Listed:
        """A sample: enough images for a few steps, few enough to decode in seconds."""
        source, spec, batch = listed.source, listed.plan.spec, self._job.fit.global_batch
        min_rows = FIRST_STEPS * batch * len(source.table) // max(1, self._sizes.train) + 1
        max_rows = MAX_SAMPLE_OF_FEATURES if self._job.uses_features else MAX_SAMPLE
        by_bytes = max(MIN_SAMPLE, SAMPLE_BYTES // spec.image_bytes)
        rows = spread_rows(len(source.table), most=max(min_rows, min(by_bytes, max_rows)), run_rows=64)
        source = taken(source, list(rows))
        root, limits = self._job.run.storage, self._job.data.limits
        return Listed(source=source, plan=plan_records(source, spec, storage=root, limits=limits))

    def _report(self, plan: dict[str, Any], parts: dict[str, float], *, balance: float) -> None:
        line = self._session.console.line
        for name, rate in (
            ("decoding", plan["decode_images_per_s_per_core"]),
            ("features", plan["features_images_per_s"]),
        ):
            if rate:
                line(f"{name}: {rate:,.1f} images/s{' per core' * (name == 'decoding')}, {duration(parts[name])}, once")
        for phase in plan["phases"]:
            line(
                f"{phase['name']}: {phase['images_per_s']:,.1f} images/s, {phase['steps']:,} steps and "
                f"{duration(phase['epoch_s'])} per epoch, {duration(phase['seconds'])} for {phase['epochs']} epochs"
            )
        cores = plan["cpus_per_gpu"] or balance
        also = f"; {_balance(cores, ' per GPU' if plan['cpus_per_gpu'] else '')}" if balance else ""
        line(f"bottleneck: {plan['bottleneck']}{also}")
        memory = filesize.decimal(plan["worker_memory_bytes"])
        line(f"expected: {duration(plan['expected_seconds'])} from start to end; memory: {memory} per worker")


def _balance(cores: float, unit: str) -> str:
    """With how many cores decoding takes as long as the rest; below one, how much shorter it is with one."""
    shown = (f"{cores:,.1f}" if cores < 9.95 else f"{cores:,.0f}").removesuffix(".0")
    if cores < 0.95:
        return f"with one core{unit} decoding takes 1/{1 / cores:,.0f} of the time of the rest"
    return f"with {'one core' if shown == '1' else f'{shown} cores'}{unit} decoding takes as long as the rest"


def epochs_of(result: dict[str, Any]) -> list[EpochTimes]:
    """The times of each phase's last epoch."""
    return list(result["epoch_times"][EPOCHS - 1 :: EPOCHS])


def sample_splits(index: pa.Table, sizes: Sizes) -> Splits:
    """Splits a sample in the proportions of the whole, at random: speed does not depend on the images of a split.

    Raises:
        ConfigError: fewer than three images are usable.
    """
    readable = np.flatnonzero([status == "ok" for status in index["status"].to_pylist()])
    if len(readable) < 3:
        problem = next((error for error in index["error"].to_pylist() if error), "")
        raise ConfigError(
            f"a plan needs at least three usable images. Received: {len(readable)} of {len(index)} {problem}"
        )
    readable = np.random.default_rng(0).permutation(readable)
    counts = [max(1, round(len(readable) * part / sizes.images)) for part in (sizes.validation, sizes.test)]
    val, test, train = np.split(readable, np.cumsum(counts))
    return Splits(np.sort(train), np.sort(val), np.sort(test), duplicates=0, duplicate_pairs=(), dropped=0)
