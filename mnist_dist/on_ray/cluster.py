"""Which Ray a job runs on, and what it has.

A job runs on the cluster of its submission or of `RAY_ADDRESS`, else on a private local one that ends with it; never
on a stranger's cluster that happens to run here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from mnist_dist.errors import ConfigError, ResourceError
from mnist_dist.storage import absolute, is_remote

SUBMISSION_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of `ray job submit`
POLL_S = "0.2"  # of Ray Train's controller, which else looks every 2 s and delays each report by that


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What all alive nodes have together."""

    nodes: int
    cpus: float
    gpus: float
    cpus_by_node: tuple[float, ...] = ()
    """Of each node; a worker fits on one node or on none. Empty: one node with all of them."""

    def room(self, cpus: float) -> int:
        """How many workers of so many CPUs find a place."""
        return sum(int(node / cpus + 1e-9) for node in self.cpus_by_node or (self.cpus,))

    def __str__(self) -> str:
        return f"{self.nodes} node(s), {self.cpus:g} CPUs, {self.gpus:g} GPUs"


@dataclass(frozen=True, kw_only=True)
class Share:
    """What each worker of a job gets."""

    workers: int
    cpus: float
    gpu: bool


@contextmanager
def connected(*, verbose: bool) -> Iterator[Resources]:
    """A connection to Ray for the time of a job; one that is already there is used and left alone."""
    if ray.is_initialized():
        yield resources()
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    ray.init(
        address=os.environ.get("RAY_ADDRESS", "local"),
        log_to_driver=verbose,
        logging_level="INFO" if verbose else "ERROR",
        include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
    )
    try:
        yield resources()
    finally:
        ray.shutdown()


def resources() -> Resources:
    """What the connected cluster has."""
    total = ray.cluster_resources()
    alive = [node for node in ray.nodes() if node["Alive"]]
    by_node = tuple(node["Resources"].get("CPU", 0.0) for node in alive)
    return Resources(nodes=len(alive), cpus=total.get("CPU", 0.0), gpus=total.get("GPU", 0.0), cpus_by_node=by_node)


def share(have: Resources, *, workers: int | None, cpus_per_worker: float | None, gpu: bool | None) -> Share:
    """What each worker gets of a cluster.

    Args:
        have: what the cluster has.
        workers: how many; None: one per GPU, or one.
        cpus_per_worker: CPUs of each; None: an equal share.
        gpu: a GPU for each; None: where there are GPUs.

    Raises:
        ResourceError: the cluster has less than that.
    """
    use_gpu = have.gpus > 0 if gpu is None else gpu
    count = workers if workers is not None else max(1, int(have.gpus)) if use_gpu else 1
    cpus = cpus_per_worker
    if cpus is None:
        fitting = (whole for whole in range(int(have.cpus / count), 1, -1) if have.room(whole) >= count)
        cpus = float(next(fitting, 1))
    if use_gpu and count > have.gpus:
        raise ResourceError(f"One GPU a worker: the cluster has {have}. Received: workers={count}")
    if have.room(cpus) < count:
        raise ResourceError(
            f"{count} workers of {cpus:g} CPU need {count * cpus:g} CPUs; the cluster has {have} "
            f"(room for {have.room(cpus)}; fewer --workers, or less than one CPU each by --cpus-per-worker). "
            f"Received: workers={count}"
        )
    return Share(workers=count, cpus=cpus, gpu=use_gpu)


def check_storage(storage: str, *, is_shared: bool, nodes: int = 1) -> None:
    """Refuses a folder that other nodes cannot see.

    Raises:
        ConfigError: several nodes, or a submitted job, and a storage of this node alone.
    """
    submitted = SUBMISSION_VARIABLE in os.environ
    if (
        is_remote(storage)
        or (is_shared and absolute(storage) == storage.removeprefix("file://").rstrip("/"))
        or (nodes == 1 and not submitted)
    ):
        return
    raise ConfigError(
        f"{'A submitted job' if submitted else f'A cluster of {nodes} nodes'} needs a storage that every node sees: "
        "an s3:// prefix, or the absolute path of a shared folder with --storage-is-shared. "
        f"Received: storage={storage!r}"
    )
