"""Which backend Keras trains on, and how its workers find each other.

Ray Train's hooks only hand out addresses; each worker joins in its own function (`start_worker`), so that its errors
are those of a worker. Replaces `ray.train.tensorflow`, whose import loads TensorFlow into driver and controller (3 s
and 500 MB each), and which sets TF_USE_LEGACY_KERAS in the workers; and `ray.train.v2.jax`, which leaves workers
without GPUs alone.
"""

import importlib.util
import json
import os
import socket
from typing import Any, Literal

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from mnist_dist.config import KerasBackend, SharedRunConfig, require
from mnist_dist.environment import KERAS_BACKEND, KERAS_BACKENDS, check_installed, use_keras_on
from mnist_dist.on_ray.data.features import node_folder
from mnist_dist.on_ray.tasks import wait_for
from mnist_dist.session import Session

JAX_ADDRESS, JAX_CACHE = "JAX_COORDINATOR_ADDRESS", "JAX_COMPILATION_CACHE_DIR"
USUAL_PROBE_S = 15.0  # to import both backends and to start a GPU, for the progress bar


def check_backend(run: SharedRunConfig, *, here: bool) -> None:
    """Checks the backend before Ray starts.

    Args:
        run: with the backend as asked for.
        here: the workers will run on this machine.

    Raises:
        ConfigError: it is not installed, or cannot use several GPUs in one worker.
    """
    named = os.environ.get(KERAS_BACKEND) if run.backend == "auto" else run.backend
    require(
        named != "tensorflow" or run.gpus_per_worker == 1,
        "more than one GPU per worker needs backend jax",
        gpus_per_worker=run.gpus_per_worker,
        backend=named,
    )
    if here and run.backend != "auto":
        check_installed(run.backend)


def resolve_backend(backend: Literal["auto"] | KerasBackend, *, gpus: int, session: Session) -> KerasBackend:
    """Resolves `auto`: what `KERAS_BACKEND` says; without it, jax for several GPUs per worker and where only JAX can
    use the GPU, else tensorflow.

    Args:
        backend: as asked for.
        gpus: of each worker.
        session: of the job.

    Raises:
        Interrupted: SIGINT or SIGTERM.
    """
    if backend != "auto":
        return backend
    for known in KERAS_BACKENDS:
        if os.environ.get(KERAS_BACKEND) == known:
            return known
    if gpus > 1:
        return "jax"
    if not gpus or importlib.util.find_spec("jax") is None:
        return "tensorflow"
    probe = ray.remote(num_cpus=0, num_gpus=1, max_calls=1)(_only_jax_has_gpus).remote()
    (only_jax,) = wait_for([probe], session, title="backend", expected_s=USUAL_PROBE_S)
    return "jax" if only_jax else "tensorflow"


def _only_jax_has_gpus() -> bool:
    import jax
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU") and jax.default_backend() != "cpu"


class TensorflowBackendConfig(BackendConfig):
    """Tells Ray Train to use `TensorflowBackend`."""

    @property
    def backend_cls(self) -> type["TensorflowBackend"]:
        return TensorflowBackend


class TensorflowBackend(Backend):
    """Gives every worker the addresses of all workers in TF_CONFIG, by which `tf.distribute` connects them."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(_free_address)
        ray.get(
            [worker_group.execute_single_async(rank, _set_tf_config, addresses, rank) for rank in range(len(addresses))]
        )


class JaxBackendConfig(BackendConfig):
    """Tells Ray Train to use `JaxBackend`."""

    @property
    def backend_cls(self) -> type["JaxBackend"]:
        return JaxBackend


class JaxBackend(Backend):
    """Gives every worker an address of the first one, at which `jax.distributed` connects them."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address = worker_group.execute_single(0, _free_address)
        worker_group.execute(_set_jax_address, address)


CONFIGS: dict[KerasBackend, type[BackendConfig]] = {"tensorflow": TensorflowBackendConfig, "jax": JaxBackendConfig}


def start_backend(backend: KerasBackend, *, keep_compiled: bool = True) -> None:
    """Lets this process import Keras on a backend.

    Args:
        backend: the backend.
        keep_compiled: keep what JAX compiles on the node.

    Raises:
        ConfigError: the backend is not installed, or Keras has other settings here.
    """
    if keep_compiled:
        os.environ.setdefault(JAX_CACHE, str(node_folder() / "jax"))
    use_keras_on(backend)


def start_worker(backend: KerasBackend) -> None:
    """Lets a worker of Ray Train import Keras, and joins it with the others.

    With several nodes nothing compiled is kept: a node that has a program already would leave the others waiting for
    its share of XLA's tuning (`xla_gpu_shard_autotuning`).

    Raises:
        ConfigError: see `start_backend`.
    """
    context = ray.train.get_context()
    workers = context.get_world_size()
    start_backend(backend, keep_compiled=context.get_local_world_size() == workers)
    if backend == "jax" and workers > 1:
        import jax

        jax.distributed.initialize(
            os.environ[JAX_ADDRESS], workers, context.get_world_rank(), cluster_detection_method="deactivate"
        )


def _free_address() -> str:
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


def _set_tf_config(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})


def _set_jax_address(address: str) -> None:
    os.environ[JAX_ADDRESS] = address
