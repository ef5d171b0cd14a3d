"""A worker's side of the plan of a training: each phase is trained for some seconds, and nothing is kept.

Ray Train calls `measure` in each worker, in the place of `worker.work`.
"""

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import ray.train
from ray.train.collective import broadcast_from_rank_zero

from mnist_dist.data.records import open_records
from mnist_dist.engines.engine import hide_gpus, use_cpus
from mnist_dist.errors import ConfigError, TrainingDiverged
from mnist_dist.models.classifier import fetch_published_weights
from mnist_dist.on_ray.training.messages import WorkerResult, WorkerTask
from mnist_dist.on_ray.training.worker import RayHost, train_task
from mnist_dist.scoring.measuring import peak_memory_bytes
from mnist_dist.training.feed import World
from mnist_dist.training.loop import Trainer
from mnist_dist.training.planning import PHASE_S, Stopwatch, measure_phase


def measure(task: WorkerTask) -> WorkerResult:
    """Measures every phase, as one of the workers; `metrics` holds `phases` and `memory_bytes`."""
    if not task.gpu:
        hide_gpus()
    use_cpus(int(task.cpus))
    scratch = Path(tempfile.mkdtemp(prefix="mnist_dist-"))
    try:
        with RayHost(task.board, scratch) as host:
            return _measure(task, host, scratch)
    except TrainingDiverged as error:
        return WorkerResult(error=error)
    except ConfigError as error:
        if ray.train.get_context().get_world_size() > 1:
            raise  # see `worker.work`
        return WorkerResult(error=error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measure(task: WorkerTask, host: RayHost, scratch: Path) -> WorkerResult:
    context = ray.train.get_context()
    world = World(rank=context.get_world_rank(), workers=context.get_world_size())
    records = open_records(task.records, local_dir=scratch)
    if task.job.model.weights == "imagenet":
        fetch_published_weights(task.job.model)
    watch = Stopwatch(host, seconds=PHASE_S)
    trainer = Trainer(train_task(task, records, is_first=False), host=watch, world=world)
    paces = []
    for phase in range(len(task.job.phases.phases())):
        paces.append(asdict(measure_phase(trainer, watch, phase=phase)))
        if broadcast_from_rank_zero(watch.wished):  # only rank 0 hears of a signal
            return WorkerResult(stopped=True)
    return WorkerResult(metrics={"phases": paces, "memory_bytes": peak_memory_bytes()})
