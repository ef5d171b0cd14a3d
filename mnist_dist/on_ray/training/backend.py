"""Sets TF_CONFIG in every Ray Train worker before training starts, so that `tf.distribute` connects them.

Replaces `ray.train.tensorflow`, whose import loads TensorFlow into driver and controller (3 s and 500 MB each), and
which sets TF_USE_LEGACY_KERAS in the workers.
"""

import json
import os
import socket
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


class TensorflowBackendConfig(BackendConfig):
    """Tells Ray Train to use `TensorflowBackend`."""

    @property
    def backend_cls(self) -> type["TensorflowBackend"]:
        return TensorflowBackend


class TensorflowBackend(Backend):
    """Gives every worker the addresses of all workers."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(_free_address)
        ray.get(
            [worker_group.execute_single_async(rank, _set_tf_config, addresses, rank) for rank in range(len(addresses))]
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
