"""Computing a frozen backbone's features once, spread over the cluster by Ray Data, into the feature cache."""

import logging
import os
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray

from mnist_dist.config import Precision, ScoreRunConfig
from mnist_dist.console import Bar, Stop
from mnist_dist.data.records import open_records
from mnist_dist.errors import MnistDistError, WorkersFailed, first_line
from mnist_dist.on_ray.actors import Actors, choose_actors
from mnist_dist.on_ray.cluster import Resources
from mnist_dist.on_ray.tasks import words_of
from mnist_dist.training.features import Extractor, FeaturePlan, finish, finished, missing_shards
from mnist_dist.training.precision import MEASURED_TO_AGREE, resolve_precision

log = logging.getLogger(__name__)

MOST_RESTARTS = 3
"""Of an actor that died: out of memory, or with its node."""


def feature_actors(have: Resources) -> Actors:
    """What computing features takes of a cluster: one actor per GPU, else one per node."""
    return choose_actors(have, ScoreRunConfig(decode="actor"))


def resolve_on_workers(
    precision: Precision, *, backbone: str, actors: Actors
) -> Literal["float32", "bfloat16"]:  # the driver's machine may be another kind
    """What `auto` means where the features are computed."""
    if precision != "auto" or backbone not in MEASURED_TO_AGREE:
        return resolve_precision(precision, backbone=backbone, gpu=False)
    resolve = ray.remote(num_cpus=0, num_gpus=actors.gpus)(resolve_precision)
    found: Literal["float32", "bfloat16"] = ray.get(resolve.remote(precision, backbone=backbone, gpu=bool(actors.gpus)))
    return found


def compute_missing(plan: FeaturePlan, *, actors: Actors, bar: Bar, stop: Stop) -> None:
    """Computes the shards that no earlier run has finished, and closes the cache.

    Args:
        plan: of `plan_features`; its records are finished.
        actors: what it may take of the cluster.
        bar: shows the images done.
        stop: is looked at between shards; those that are done stay done.

    Raises:
        Interrupted: a signal came.
        MnistDistError: what an actor came upon.
        WorkersFailed: actors died again and again.
    """
    if finished(plan):
        return
    missing = missing_shards(plan)
    total, done = len(plan.rows), len(plan.rows) - sum(len(plan.rows_of(shard)) for shard in missing)
    if missing:
        for answer in _answers(plan, missing, actors=actors):
            stop.check()
            if answer["error"][0]:
                raise pickle.loads(answer["error"][0])
            done += len(plan.rows_of(int(answer["shard"][0])))
            bar.update(done=done, total=total, note=f"{done:,} of {total:,} images")
    finish(plan)


def _answers(plan: FeaturePlan, shards: list[int], *, actors: Actors) -> Any:
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings():  # the two limits have no other name yet; without them a dying actor starts for ever
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        computed = dataset.map_batches(
            FeatureActor,
            fn_constructor_args=(plan, int(actors.cpus)),
            batch_size=1,
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            max_restarts=MOST_RESTARTS,
            max_task_retries=MOST_RESTARTS,
            compute=ray.data.ActorPoolStrategy(size=min(actors.count, len(shards))),
        )
    try:
        yield from computed.iter_batches(batch_size=1, prefetch_batches=0)
    except ray.exceptions.RayError as error:
        raise WorkersFailed(words_of(error)) from error


class FeatureActor:
    """Holds the backbone and computes shards; an error that was foreseen is returned, pickled.

    Args:
        plan: of the features.
        cpus: cores that it uses.
    """

    def __init__(self, plan: FeaturePlan, cpus: int) -> None:
        self._plan, self._cpus = plan, cpus
        self._extractor: Extractor | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        error = b""
        try:
            self._extractor = self._extractor or self._start()
            self._extractor.store(int(batch["shard"][0]))
        except (MnistDistError, OSError) as failure:
            error = pickle.dumps(failure)
        except Exception as failure:  # the border of this process: Ray Data would keep what it was to itself
            words = first_line(failure)
            log.exception("computing features of shard %d", int(batch["shard"][0]))
            error = pickle.dumps(WorkersFailed(f"computing features failed: {type(failure).__name__}: {words}"))
        return {"shard": batch["shard"], "error": np.array([error], object)}

    def _start(self) -> Extractor:
        from mnist_dist.engines.engine import use_cpus
        from mnist_dist.models.classifier import fetch_published_weights

        use_cpus(self._cpus)
        if self._plan.model.weights == "imagenet":
            fetch_published_weights(self._plan.model)
        records = open_records(self._plan.records, local_dir=node_folder("records"))
        return Extractor(self._plan, pixels=records.pixels, spec=records.spec)


def node_folder(what: str) -> Path:
    """Where this node keeps copies of what lies on S3."""
    return Path(tempfile.gettempdir()) / f"mnist_dist-{what}-{os.getuid()}"
