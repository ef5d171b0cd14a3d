"""Computes the features of a frozen backbone once, spread over the cluster, into the feature cache."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import ray

from mnist_dist.config import Precision
from mnist_dist.console import Console, Stop
from mnist_dist.data.markers import Attempt
from mnist_dist.data.records import open_records
from mnist_dist.models.backbones import is_imported
from mnist_dist.models.onnx_file import has_cuda
from mnist_dist.on_ray.actors import Actors, choose_actors
from mnist_dist.on_ray.cluster import Resources, resources
from mnist_dist.on_ray.shard_runner import Counter, ShardWork, run_shards
from mnist_dist.on_ray.tasks import wait_for
from mnist_dist.score_config import ScoreRunConfig
from mnist_dist.session import Session
from mnist_dist.training.feature_engine import (
    FeatureEngine,
    choose_engine,
    delete_converted,
    describe,
    is_worth_comparing,
    keep_engine,
    kept_engine,
    open_feature_engine,
    reference_engine,
)
from mnist_dist.training.features import Extractor, FeaturePlan
from mnist_dist.training.precision import MEASURED_TO_AGREE, resolve_precision

USUAL_CHOICE_S = 30.0  # expected duration of a comparison, for the progress bar
MAX_DEATHS = 3
"""How often an actor may die on the same shard (out of memory, or with its node) before the job fails."""


def feature_actors(have: Resources, *, backbone: str) -> Actors:
    """The actors that compute features: one per GPU; without GPUs, see `choose_actors`. An imported backbone uses GPUs
    only where ONNX Runtime has its CUDA provider."""
    on_cpus = is_imported(backbone) and not has_cuda()
    return choose_actors(have, ScoreRunConfig(decode="actor", gpus_per_actor=0 if on_cpus else None))


def resolve_on_workers(precision: Precision, *, backbone: str, actors: Actors) -> Literal["float32", "bfloat16"]:
    """Resolves `auto` on a worker, since the driver's machine may have other hardware."""
    if precision != "auto" or backbone not in MEASURED_TO_AGREE:
        return resolve_precision(precision, backbone=backbone, gpu=False)
    resolve = ray.remote(num_cpus=0, num_gpus=actors.gpus)(resolve_precision)
    value: Literal["float32", "bfloat16"] = ray.get(resolve.remote(precision, backbone=backbone, gpu=bool(actors.gpus)))
    return value


def compute_missing(
    plan: FeaturePlan,
    session: Session,
    *,
    actors: Actors,
    title: str = "features",
    compare: bool | None = None,
    beside: bool = False,
) -> float | None:
    """Computes the missing shards and finishes the cache; gives the images/s (None: nothing missing).

    Args:
        plan: from `plan_features`; its records are finished.
        session: of the job; finished shards stay finished.
        actors: the actors to use.
        title: of the progress bar.
        compare: whether to look for an engine that is faster than the reference. None: where that is worth it.
        beside: other work holds the CPUs and is about to end. The actors share them: they reserve no CPU on Ray, where
            they would wait for that work.

    Raises:
        Interrupted: SIGINT or SIGTERM.
        MnistDistError: an actor raised it.
        WorkersFailed: actors died more than `MAX_DEATHS` times on the same shard.
    """
    cache = plan.cache
    if cache.is_finished():
        return None
    images_per_s = None
    if missing := cache.missing():
        if compare is None:
            compare = is_worth_comparing(plan)
        compares = compare and len(missing) == cache.shards and not actors.gpus
        reserved = replace(actors, cpus=0.0) if beside else actors
        engine = _engine(plan, session, actors=actors, reserved_cpus=reserved.cpus, title=title, compares=compares)
        work = ShardWork(
            worker=FeatureWorker(plan, engine, cpus=max(1, int(actors.cpus)), gpu=actors.gpus > 0),
            done=lambda: set(range(cache.shards)) - set(cache.missing()),
            folder=cache.root,
            max_deaths=MAX_DEATHS,
            actors=reserved,
        )
        done = cache.rows - sum(len(plan.rows_of(shard)) for shard in missing)
        reports = run_shards(work, missing, session, title=title, done=done, total=cache.rows).reports
        seconds = max(report.ended_at for report in reports) - min(report.began_at for report in reports)
        images_per_s = (cache.rows - done) / max(seconds, 1e-9) if reports else None
    cache.finish(plan.model)
    delete_converted(plan)
    return images_per_s


def _engine(
    plan: FeaturePlan, session: Session, *, actors: Actors, reserved_cpus: float, title: str, compares: bool
) -> FeatureEngine:
    """The engine of all shards of these features: the one that an earlier driver began with, else the fastest that
    agrees. With several nodes, one with room for an actor compares them, as the driver's may have another CPU."""
    known = kept_engine(plan)
    if known is not None:
        return known
    if not compares:
        return reference_engine(plan)
    cpus = max(1, int(actors.cpus))
    session.console.line(f"{title}: comparing engines")
    if resources().nodes == 1:
        chosen = choose_engine(plan, local_dir=node_folder(), cpus=cpus, session=session)
    else:
        task = ray.remote(num_cpus=reserved_cpus, max_retries=0)(_choose).remote(plan, cpus)
        (chosen,) = wait_for([task], session, title=title, expected_s=USUAL_CHOICE_S)
    session.console.line(f"{title}: {describe(chosen)}")
    session.confirm_lock()
    return keep_engine(plan, chosen)


def _choose(plan: FeaturePlan, cpus: int) -> FeatureEngine:
    console = Console(terminal=False)
    return choose_engine(plan, local_dir=node_folder(), cpus=cpus, session=Session(console=console, stop=Stop(console)))


class FeatureWorker:
    """Holds the backbone and computes shards.

    Args:
        plan: the features to compute.
        engine: what computes them.
        cpus: number of cores to use.
        gpu: it has a GPU.
    """

    title = "features"

    def __init__(self, plan: FeaturePlan, engine: FeatureEngine, *, cpus: int, gpu: bool = False) -> None:
        self._plan, self._engine, self._cpus, self._gpu = plan, engine, cpus, gpu

    def open(self) -> None:
        """Loads the backbone and the records."""
        call = open_feature_engine(self._plan, self._engine, cpus=self._cpus, gpu=self._gpu)
        records = open_records(self._plan.records, local_dir=node_folder())
        self._extractor = Extractor(self._plan, pixels=records.pixels, call=call)

    def work(self, shard: int, given: None, *, attempt: Attempt, counter: Counter) -> None:
        """Computes a shard."""
        self._extractor.store(shard)
        counter.add(len(self._plan.rows_of(shard)), 0)


def node_folder() -> Path:
    """The folder for this node's local copies of records on S3."""
    return Path(tempfile.gettempdir()) / f"mnist_dist-{os.getuid()}"
