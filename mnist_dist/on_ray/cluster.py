"""Which Ray a job runs on, and what it has.

A job runs on the cluster of its submission or of `RAY_ADDRESS`, else on a private local one that ends with it; never
on a stranger's cluster that happens to run here.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_dist.errors import ConfigError, ResourceError
from mnist_dist.storage import absolute, is_remote

SUBMISSION_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of `ray job submit`
CONTROLLER_POLL_S = "0.5"  # of Ray Train's controller, which else looks every 2 s and delays each report by that


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What all alive nodes have together."""

    by_node: tuple[tuple[float, float], ...]
    """CPUs and GPUs of each node."""

    @property
    def nodes(self) -> int:
        return len(self.by_node)

    @property
    def cpus(self) -> float:
        return sum(cpus for cpus, _ in self.by_node)

    @property
    def gpus(self) -> float:
        return sum(gpus for _, gpus in self.by_node)

    def room(self, cpus: float, *, gpu: bool) -> int:
        """How many workers of so many CPUs, and a GPU where asked, find a place; a worker fits on one node."""
        places = (int(c / cpus + 1e-9) if not gpu else min(int(c / cpus + 1e-9), int(g)) for c, g in self.by_node)
        return sum(places)

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
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", CONTROLLER_POLL_S)
    ray.init(
        address=os.environ.get("RAY_ADDRESS", "local"),
        log_to_driver=verbose,
        logging_level="INFO" if verbose else "ERROR",
        include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
    )
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # its lines about each dataset are none of a person's
    try:
        yield resources()
    finally:
        ray.shutdown()


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Places an actor or a task on this process's node, so that it is not lost with another one."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def resources() -> Resources:
    """What the connected cluster has."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Resources(by_node=tuple((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive))


def share(
    have: Resources, *, workers: int | None, cpus_per_worker: float | None, gpu: bool | None, what: str = "worker"
) -> Share:
    """What each worker gets of a cluster.

    Args:
        have: what the cluster has.
        workers: how many; None: one per GPU, or one.
        cpus_per_worker: CPUs of each; None: an equal share.
        gpu: a GPU for each; None: where there are GPUs.
        what: a worker is called in messages and flags.

    Raises:
        ResourceError: the cluster has less than that.
    """
    use_gpu = have.gpus > 0 if gpu is None else gpu
    count = workers if workers is not None else max(1, int(have.gpus)) if use_gpu else 1
    cpus = cpus_per_worker
    if cpus is None:
        fitting = (whole for whole in range(int(have.cpus / count), 1, -1) if have.room(whole, gpu=use_gpu) >= count)
        cpus = float(next(fitting, 1))
    if use_gpu and count > have.gpus:
        raise ResourceError(f"One GPU a worker: the cluster has {have}. Received: workers={count}")
    room = have.room(cpus, gpu=use_gpu)
    if room < count:
        raise ResourceError(
            f"{count} {what}s of {cpus:g} CPU{' and a GPU' if use_gpu else ''} each do not fit; the cluster has {have} "
            f"(room for {room}; fewer --{what}s, or less than one CPU each by --cpus-per-{what}). "
            f"Received: {what}s={count}"
        )
    return Share(workers=count, cpus=cpus, gpu=use_gpu)


def check_storage(storage: str, *, is_shared: bool, nodes: int = 1, name: str = "storage") -> None:
    """Refuses a folder that other nodes cannot see.

    Args:
        storage: folder or `s3://` prefix.
        is_shared: the person says that every node sees it.
        nodes: of the cluster.
        name: of the flag, for the message.

    Raises:
        ConfigError: several nodes, or a submitted job, and a folder of this node alone.
    """
    submitted = SUBMISSION_VARIABLE in os.environ
    if (
        is_remote(storage)
        or (is_shared and absolute(storage) == storage.removeprefix("file://").rstrip("/"))
        or (nodes == 1 and not submitted)
    ):
        return
    raise ConfigError(
        f"{'A submitted job' if submitted else f'A cluster of {nodes} nodes'} needs a {name} that every node sees: "
        "an s3:// prefix, or the absolute path of a shared folder with --storage-is-shared. "
        f"Received: {name}={storage!r}"
    )
