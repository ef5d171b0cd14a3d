"""Computes the features of a frozen backbone once, spread over the cluster, into the feature cache."""

import os
import tempfile
from pathlib import Path
from typing import Literal

import ray

from mnist_dist.config import Precision, ScoreRunConfig
from mnist_dist.data.markers import Attempt
from mnist_dist.data.records import open_records
from mnist_dist.on_ray.actors import Actors, choose_actors
from mnist_dist.on_ray.cluster import Resources
from mnist_dist.on_ray.shard_runner import Counter, ShardWork, run_shards
from mnist_dist.session import Session
from mnist_dist.training.features import Extractor, FeaturePlan
from mnist_dist.training.precision import MEASURED_TO_AGREE, resolve_precision

MAX_DEATHS = 3
"""How often an actor may die on the same shard (out of memory, or with its node) before the job fails."""


def feature_actors(have: Resources) -> Actors:
    """The actors that compute features: one per GPU; without GPUs, see `choose_actors`."""
    return choose_actors(have, ScoreRunConfig(decode="actor"))


def resolve_on_workers(precision: Precision, *, backbone: str, actors: Actors) -> Literal["float32", "bfloat16"]:
    """Resolves `auto` on a worker, since the driver's machine may have other hardware."""
    if precision != "auto" or backbone not in MEASURED_TO_AGREE:
        return resolve_precision(precision, backbone=backbone, gpu=False)
    resolve = ray.remote(num_cpus=0, num_gpus=actors.gpus)(resolve_precision)
    value: Literal["float32", "bfloat16"] = ray.get(resolve.remote(precision, backbone=backbone, gpu=bool(actors.gpus)))
    return value


def compute_missing(plan: FeaturePlan, session: Session, *, actors: Actors, title: str = "features") -> float | None:
    """Computes the missing shards and finishes the cache; gives the images/s (None: nothing missing).

    Args:
        plan: from `plan_features`; its records are finished.
        session: of the job; finished shards stay finished.
        actors: the actors to use.
        title: of the progress bar.

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
        work = ShardWork(
            worker=FeatureWorker(plan, cpus=int(actors.cpus)),
            done=lambda: set(range(cache.shards)) - set(cache.missing()),
            folder=cache.root,
            max_deaths=MAX_DEATHS,
            actors=actors,
        )
        done = cache.rows - sum(len(plan.rows_of(shard)) for shard in missing)
        reports = run_shards(work, missing, session, title=title, done=done, total=cache.rows).reports
        seconds = max(report.ended_at for report in reports) - min(report.began_at for report in reports)
        images_per_s = (cache.rows - done) / max(seconds, 1e-9) if reports else None
    cache.finish(plan.model)
    return images_per_s


class FeatureWorker:
    """Holds the backbone and computes shards.

    Args:
        plan: the features to compute.
        cpus: number of cores to use.
    """

    title = "features"

    def __init__(self, plan: FeaturePlan, *, cpus: int) -> None:
        self._plan, self._cpus = plan, cpus

    def open(self) -> None:
        """Loads TensorFlow, the backbone and the records."""
        from mnist_dist.engines.engine import use_cpus
        from mnist_dist.models.classifier import fetch_published_weights

        use_cpus(self._cpus)
        if self._plan.model.weights == "imagenet":
            fetch_published_weights(self._plan.model)
        records = open_records(self._plan.records, local_dir=node_folder())
        self._extractor = Extractor(self._plan, pixels=records.pixels)

    def work(self, shard: int, given: None, *, attempt: Attempt, counter: Counter) -> None:
        """Computes a shard."""
        self._extractor.store(shard)
        counter.add(len(self._plan.rows_of(shard)), 0)


def node_folder() -> Path:
    """The folder for this node's local copies of records on S3."""
    return Path(tempfile.gettempdir()) / f"mnist_dist-{os.getuid()}"
