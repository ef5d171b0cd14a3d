"""Which Ray a job runs on, and what it has.

A job runs on the cluster of its submission or of `RAY_ADDRESS`, else on a private local one that ends with it; never
on a stranger's cluster that happens to run here.
"""

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_dist.config import RunConfig
from mnist_dist.console import Stop
from mnist_dist.errors import ConfigError, ResourceError
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread
from mnist_dist.store.uris import is_absolute, is_remote

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

    def room(self, cpus: float, *, gpus: float = 0.0) -> int:
        """How many workers of so many CPUs and GPUs find a place; a worker fits on one node."""
        each = ((int(c / cpus + 1e-9), int(g / gpus + 1e-9) if gpus else 2**30) for c, g in self.by_node)
        return sum(min(places) for places in each)

    def __str__(self) -> str:
        return f"{self.nodes} node(s), {self.cpus:g} CPUs, {self.gpus:g} GPUs"


@dataclass(frozen=True, kw_only=True)
class Share:
    """What each worker of a job gets."""

    workers: int
    cpus: float
    gpu: bool


@contextmanager
def connected(*, verbose: bool, stop: Stop | None = None, meanwhile: str | None = None) -> Iterator[Resources]:
    """A connection to Ray for the time of a job; one that is already there is used and left alone.

    Args:
        verbose: show what Ray prints.
        stop: takes the signals again that Ray took.
        meanwhile: a module that is loaded while Ray starts.
    """
    if ray.is_initialized():
        if stop is not None:
            stop.take_signals()
        yield resources()
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", CONTROLLER_POLL_S)
    is_private = "RAY_ADDRESS" not in os.environ
    loading = SideThread(lambda: meanwhile and importlib.import_module(meanwhile), name="loading")
    loading.start()
    ray.init(
        address="local" if is_private else os.environ["RAY_ADDRESS"],
        log_to_driver=verbose,
        logging_level="INFO" if verbose else "ERROR",
        include_dashboard=False if is_private else None,
    )
    try:
        if stop is not None:
            stop.take_signals()
        loading.join()  # it sets its loggers; what it raises, whoever imports it raises again
        if is_private:
            _end_autoscaler()
        if not verbose:
            logging.getLogger("ray.data").setLevel(logging.ERROR)  # its lines about each dataset are none of a person's
        yield resources()
    finally:
        ray.shutdown()


def _end_autoscaler() -> None:
    """Ends the process of a private Ray that would add nodes: it has none to add, and does not listen when Ray ends,
    which waits a second for it then."""
    place = os.path.dirname(ray.__file__) + os.sep
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children():
            if any(part.startswith(place) and part.endswith("/monitor.py") for part in child.cmdline()):
                child.kill()


def await_nodes(have: Resources, session: Session, *, count: int, cpus: float, gpus: float, wait_s: float) -> Resources:
    """What the cluster has once there is room for some workers, or the time is over; its autoscaler is asked for it.

    Asked by a placement group, which ends with its driver, whatever becomes of that; `request_resources` would not.

    Args:
        have: what it has now.
        session: of the job.
        count: of the workers.
        cpus: of each.
        gpus: of each.
        wait_s: for at most so long, s; 0: not at all.

    Raises:
        Interrupted: a signal came.
    """
    deadline = time.monotonic() + wait_s
    if wait_s == 0 or have.room(cpus, gpus=gpus) >= count or "RAY_ADDRESS" not in os.environ:
        return have  # a private Ray does not grow
    session.console.line(
        f"waiting up to {wait_s:g} s for room for {count} x {cpus:g} CPU, {gpus:g} GPU; the cluster has {have}"
    )
    group = placement_group([{"CPU": cpus, **({"GPU": gpus} if gpus else {})}] * count)
    try:
        session.watch(lambda timeout_s: group.wait(timeout_s) or time.monotonic() >= deadline)
    finally:
        remove_placement_group(group)  # from here on, what runs keeps its nodes
    return resources()


def await_workers(have: Resources, run: RunConfig, session: Session) -> Resources:
    """What the cluster has once there is room for the workers that were asked for; see `await_nodes`."""
    return await_nodes(
        have,
        session,
        count=run.workers or 1,
        cpus=run.cpus_per_worker or 1.0,
        gpus=float(run.gpu or False),
        wait_s=run.wait_for_nodes_s,
    )


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
        fitting = (
            whole for whole in range(int(have.cpus / count), 1, -1) if have.room(whole, gpus=float(use_gpu)) >= count
        )
        cpus = float(next(fitting, 1))
    if use_gpu and count > have.gpus:
        raise ResourceError(f"One GPU a worker: the cluster has {have}. Received: workers={count}")
    room = have.room(cpus, gpus=float(use_gpu))
    if room < count:
        raise ResourceError(
            f"{count} {what}s of {cpus:g} CPU{' and a GPU' if use_gpu else ''} each do not fit; the cluster has {have} "
            f"(room for {room}; fewer --{what}s, less than one CPU each by --cpus-per-{what}, or, where the cluster "
            f"can grow, --wait-for-nodes-s). "
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
    if is_remote(storage) or (is_shared and is_absolute(storage)) or (nodes == 1 and not submitted):
        return
    raise ConfigError(
        f"{'A submitted job' if submitted else f'A cluster of {nodes} nodes'} needs a {name} that every node sees: "
        "an s3:// prefix, or the absolute path of a shared folder with --storage-is-shared. "
        f"Received: {name}={storage!r}"
    )
