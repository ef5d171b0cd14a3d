"""Which backend Keras trains on, and what its workers need before training starts, so that they find each other.

Replaces `ray.train.tensorflow`, whose import loads TensorFlow into driver and controller (3 s and 500 MB each), and
which sets TF_USE_LEGACY_KERAS in the workers; and `ray.train.v2.jax`, which leaves workers without GPUs alone.
"""

import importlib.util
import json
import os
import socket
from typing import Any, Literal

import ray
from ray.train.backend import Backend, BackendConfig

from mnist_dist.config import KerasBackend, require
from mnist_dist.environment import KERAS_BACKEND, KERAS_BACKENDS, use_keras_on
from mnist_dist.on_ray.data.features import node_folder


def resolve_backend(backend: Literal["auto"] | KerasBackend, *, gpus: int) -> KerasBackend:
    """Resolves `auto`: what `KERAS_BACKEND` says; without it, jax for several GPUs per worker and where only JAX can
    use the GPU, else tensorflow.

    Args:
        backend: as asked for.
        gpus: of each worker.

    Raises:
        ConfigError: the backend cannot use several GPUs in one worker.
    """
    if backend == "tensorflow":
        require(gpus <= 1, "more than one GPU per worker needs backend jax", backend=backend, gpus_per_worker=gpus)
    if backend != "auto":
        return backend
    named = os.environ.get(KERAS_BACKEND)
    if named in KERAS_BACKENDS:
        return named  # type: ignore[return-value]  # it is one of the two
    if gpus > 1:
        return "jax"
    if not gpus or importlib.util.find_spec("jax") is None:
        return "tensorflow"
    only_jax: bool = ray.get(ray.remote(num_cpus=0, num_gpus=1, max_calls=1)(_only_jax_has_gpus).remote())
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
    """Joins the workers by `jax.distributed`."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, workers = worker_group.execute_single(0, _free_address), len(worker_group)
        ray.get([worker_group.execute_single_async(rank, _join_jax, address, workers, rank) for rank in range(workers)])


CONFIGS: dict[KerasBackend, type[BackendConfig]] = {"tensorflow": TensorflowBackendConfig, "jax": JaxBackendConfig}


def start_backend(backend: KerasBackend) -> None:
    """Lets this process import Keras on a backend; what JAX compiles is kept on the node.

    Raises:
        ConfigError: the backend is not installed, or Keras has other settings here.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(node_folder() / "jax"))
    use_keras_on(backend)


def _free_address() -> str:
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


def _set_tf_config(addresses: list[str], rank: int) -> None:
    start_backend("tensorflow")
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})


def _join_jax(address: str, workers: int, rank: int) -> None:
    start_backend("jax")
    import jax

    if workers > 1:
        jax.distributed.initialize(address, workers, rank, cluster_detection_method="deactivate")
