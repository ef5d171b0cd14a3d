"""The Ray cluster that a job runs on, and its resources.

Does not own the number and size of actors (`actors`), or whether a cluster answers (`head`). A job runs on the cluster
of its submission or of `RAY_ADDRESS`, else on a private local one that ends with the job, and never on another cluster
found on this machine.
"""

import contextlib
import importlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import ray
from ray.exceptions import AuthenticationError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_dist.config import RunConfig, SharedRunConfig
from mnist_dist.console import Console, Stop, command_line
from mnist_dist.environment import RAY_ADDRESS, check_keras, check_socket_path, ray_address
from mnist_dist.errors import ConfigError, Interrupted, ResourceError, ServiceError, first_line
from mnist_dist.on_ray.head import RAY_AUTH_MODE, TOKEN_REMEDY, await_head
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread
from mnist_dist.store.uris import is_absolute, is_remote

SUBMISSION_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of `ray job submit`.
TRAIN_SETTINGS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}  # Its default of 2 s would delay each report.
PRIVATE_TRAIN_SETTINGS = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # Its process waits for nodes to leave.
STARTED_TOO_SLOWLY = "timed out during startup"  # Words of `ray.init` in Ray 2.


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources of all alive nodes."""

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
        """How many workers with these CPUs and GPUs each fit; a worker does not span nodes."""
        each = ((int(c / cpus + 1e-9), int(g / gpus + 1e-9) if gpus else 2**30) for c, g in self.by_node)
        return sum(min(places) for places in each)

    def __str__(self) -> str:
        return f"{self.nodes} node(s), {self.cpus:g} CPUs, {self.gpus:g} GPUs"


@dataclass(frozen=True, kw_only=True)
class Share:
    """What each worker of a job gets."""

    workers: int
    cpus: float
    gpus: int

    @property
    def shown_gpus(self) -> str:
        """To follow the CPUs in a sentence: ` and a GPU`, ` and 4 GPUs`, or nothing."""
        return f" and {_counted_gpus(self.gpus)}" if self.gpus else ""


def _counted_gpus(gpus: int) -> str:
    return "a GPU" if gpus == 1 else f"{gpus} GPUs"


@contextmanager
def connected(*, verbose: bool, stop: Stop | None = None, meanwhile: str | None = None) -> Iterator[Resources]:
    """Connects to Ray for the duration of a job. An existing connection is used, and is not closed.

    Args:
        verbose: show Ray's own output.
        stop: takes back the signal handlers that Ray replaced.
        meanwhile: a module to import while Ray starts.

    Raises:
        ConfigError: `RAY_ADDRESS` names no cluster that answers and accepts this process' token, or a private Ray
            cannot make its sockets.
        Interrupted: SIGINT or SIGTERM before Ray has started.
        ServiceError: Ray did not start in time.
    """
    if ray.is_initialized():
        if stop is not None:
            stop.take_signals()
        yield resources()
        return
    address = ray_address()
    with _set(TRAIN_SETTINGS if address else TRAIN_SETTINGS | PRIVATE_TRAIN_SETTINGS):
        loading = SideThread(lambda: meanwhile and importlib.import_module(meanwhile), name="loading")
        loading.start()
        _start(address, verbose=verbose, stop=stop)
        try:
            if stop is not None:
                stop.take_signals()
            loading.join()  # The import sets up loggers. If it failed, the next import of the module raises the error.
            if address is None:
                _end_autoscaler()
            if not verbose:
                logging.getLogger("ray.data").setLevel(logging.ERROR)  # It logs several lines per dataset.
            yield resources()
        finally:
            ray.shutdown()


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets those of the variables of the environment that are not set, for the duration of a block."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def _start(address: str | None, *, verbose: bool, stop: Stop | None) -> None:
    """Connects to a cluster, or starts a private Ray; see `connected` for what it raises."""
    if address is None:
        check_socket_path()
    else:
        await_head(address, stop=stop)
    try:
        ray.init(
            address=address or "local",
            log_to_driver=verbose,
            logging_level="INFO" if verbose else "ERROR",
            include_dashboard=None if address else False,
        )
    except AuthenticationError as err:
        raise ConfigError(f"{err.message}: {TOKEN_REMEDY}. Received: {RAY_ADDRESS}={address!r}") from err
    except (OSError, ValueError) as err:
        if address is None:
            raise ConfigError(
                f"a private Ray cannot start here: {first_line(err)}. It writes its files to RAY_TMPDIR or TMPDIR, and "
                f"a token to ~/.ray/auth_token unless {RAY_AUTH_MODE}=disabled"
            ) from err
        raise ConfigError(
            f"the Ray cluster cannot be joined: {first_line(err.__cause__ or err)}. Is there a node of it on this "
            f"machine? Received: {RAY_ADDRESS}={address!r}"
        ) from err
    except SystemExit as end:  # Ray's own handler of SIGTERM, which is active from `ray.init` until `take_signals`.
        raise Interrupted(
            signal.SIGTERM, f"Stopped while Ray was starting; run the same command to resume: {command_line()}"
        ) from end
    except Exception as err:  # What Ray raises has no type of its own.
        if STARTED_TOO_SLOWLY not in str(err):
            raise
        raise ServiceError(
            "Ray did not start within its 30 s, as happens on a machine that is very busy; run the same command again"
        ) from err


def check_environment(console: Console | None = None, *, backends: Sequence[str] = ()) -> None:
    """Checks what can be known of the environment before Ray starts and before any work.

    Args:
        console: of the job; with it, a cluster must answer. None: only the form of its address is checked.
        backends: the backends on which the job can run Keras; empty: it does not run Keras. Workers of a cluster have
            settings of their own, which they check themselves.

    Raises:
        ConfigError: see `environment` and `head`.
        Interrupted: a signal arrived while the cluster was asked.
    """
    if ray.is_initialized():
        return
    address = ray_address()
    if address is None:
        check_socket_path()
        if backends:
            check_keras(backends)
    elif console is not None:
        with Stop(console) as stop:
            await_head(address, stop=stop)


def _end_autoscaler() -> None:
    """Kills the autoscaler of a private Ray: it cannot add nodes, and Ray would wait a second for it when it ends."""
    ray_folder = os.path.dirname(ray.__file__) + os.sep
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children():
            if any(part.startswith(ray_folder) and part.endswith("/monitor.py") for part in child.cmdline()):
                child.kill()


def await_nodes(have: Resources, session: Session, *, count: int, cpus: float, gpus: float, wait_s: float) -> Resources:
    """Asks the autoscaler for room for the workers and waits for it, at most `wait_s`; the resources after that.

    The request is a placement group, which Ray removes when the driver dies; `request_resources` would stay.

    Args:
        have: the cluster's resources now.
        session: of the job.
        count: number of workers.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.
        wait_s: longest wait, s; 0: do not wait.

    Raises:
        Interrupted: SIGINT or SIGTERM.
    """
    deadline = time.monotonic() + wait_s
    if wait_s == 0 or have.room(cpus, gpus=gpus) >= count or RAY_ADDRESS not in os.environ:
        return have  # A private Ray does not grow.
    session.console.line(
        f"waiting up to {wait_s:g} s for room for {count} x {cpus:g} CPU, {gpus:g} GPU; the cluster has {have}"
    )
    group = placement_group([{"CPU": cpus, **({"GPU": gpus} if gpus else {})}] * count)
    try:
        session.watch(lambda timeout_s: group.wait(timeout_s) or time.monotonic() >= deadline)
    finally:
        remove_placement_group(group)  # From here on, the running job keeps the new nodes alive.
    return resources()


def await_workers(have: Resources, run: RunConfig, session: Session) -> Resources:
    """Waits for room for the requested workers; see `await_nodes`."""
    return await_nodes(
        have,
        session,
        count=run.workers or 1,
        cpus=run.cpus_per_worker or 1.0,
        gpus=float(run.gpus_per_worker if run.gpu else 0),
        wait_s=run.wait_for_nodes_s,
    )


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Keeps an actor or a task on this process's node, so that it is not lost with another node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def resources() -> Resources:
    """The resources of the connected cluster."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Resources(by_node=tuple((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive))


def worker_share(have: Resources, run: SharedRunConfig) -> Share:
    """What each worker of Ray Train gets; see `share`."""
    return share(
        have,
        workers=run.workers,
        cpus_per_worker=run.cpus_per_worker,
        gpu=run.gpu,
        gpus_per_worker=run.gpus_per_worker,
    )


def share(
    have: Resources,
    *,
    workers: int | None,
    cpus_per_worker: float | None,
    gpu: bool | None,
    gpus_per_worker: int = 1,
    what: str = "worker",
) -> Share:
    """Divides a cluster among workers.

    Args:
        have: the cluster's resources.
        workers: number of workers; None: as many as the GPUs are enough for, or one without GPUs.
        cpus_per_worker: CPUs of each; None: an equal share.
        gpu: whether each gets GPUs; None: if the cluster has GPUs.
        gpus_per_worker: how many, if any.
        what: the word for a worker in messages and flags.

    Raises:
        ResourceError: the workers do not fit.
    """
    gpus = gpus_per_worker if (have.gpus > 0 if gpu is None else gpu) else 0
    count = workers if workers is not None else max(1, have.room(1e-3, gpus=gpus)) if gpus else 1
    cpus = cpus_per_worker
    if cpus is None:
        fitting = (whole for whole in range(int(have.cpus / count), 1, -1) if have.room(whole, gpus=gpus) >= count)
        cpus = float(next(fitting, 1))
    found = Share(workers=count, cpus=cpus, gpus=gpus)
    if count * gpus > have.gpus:
        raise ResourceError(
            f"each worker needs {_counted_gpus(gpus)}, but the cluster has {have}. Received: workers={count}"
        )
    room = have.room(cpus, gpus=gpus)
    if room < count:
        raise ResourceError(
            f"{count} {what}s of {cpus:g} CPU{found.shown_gpus} each do not fit; the cluster has {have} "
            f"(room for {room}; fewer --{what}s, less than one CPU each by --cpus-per-{what}, or, where the cluster "
            f"can grow, --wait-for-nodes-s). "
            f"Received: {what}s={count}"
        )
    return found


def check_storage(storage: str, *, is_shared: bool, nodes: int = 1, name: str = "storage") -> None:
    """Refuses a folder that other nodes cannot see.

    Args:
        storage: folder or bucket prefix.
        is_shared: whether the user says that every node sees it (`--storage-is-shared`).
        nodes: number of nodes in the cluster.
        name: name of the flag, for the message.

    Raises:
        ConfigError: the folder is local, and there are several nodes or the job was submitted.
    """
    submitted = SUBMISSION_VARIABLE in os.environ
    if is_remote(storage) or (is_shared and is_absolute(storage)) or (nodes == 1 and not submitted):
        return
    raise ConfigError(
        f"{'A submitted job' if submitted else f'A cluster of {nodes} nodes'} needs a {name} that every node sees: "
        "a bucket prefix (s3://, gs://, az://), or the absolute path of a shared folder with --storage-is-shared. "
        f"Received: {name}={storage!r}"
    )
