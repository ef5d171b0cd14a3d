"""What a job needs of the environment of its processes: the address of Ray, the folder of its sockets, Keras' settings.

Owns: the form of `RAY_ADDRESS`, the length of Ray's temporary folder, `KERAS_BACKEND` and `keras.json`, all without a
connection. Does not own: whether a cluster answers (`on_ray/head.py`), or credentials (`store`).
"""

import importlib.util
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from mnist_dist.config import KerasBackend
from mnist_dist.errors import ConfigError
from mnist_dist.urls import WEB, shown

RAY_ADDRESS, RAY_TMPDIR, TMPDIR = "RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"
KERAS_BACKEND, KERAS_HOME = "KERAS_BACKEND", "KERAS_HOME"
KERAS_BACKENDS: tuple[KerasBackend, ...] = get_args(KerasBackend)
"""On which models are trained and scored."""
CONVERSION_BACKENDS = ("tensorflow",)
"""On which models are imported and exported."""
KERAS_DEFAULTS = {"backend": "tensorflow", "image_data_format": "channels_last", "floatx": "float32"}
"""The settings of Keras that all models here are made for."""
MAX_PORT = 65_535
MAX_SOCKET_BYTES = 107
"""The longest path of a Unix socket on Linux (`sun_path` in unix(7), less the final zero byte)."""
_OWN_RAY = f"unset {RAY_ADDRESS} to run on this machine alone, with a private Ray that ends with the job"
_NO_ADDRESS = {
    "": "the variable is set, but empty",
    "auto": "auto takes any Ray that runs on this machine, perhaps another person's",
    "local": "local is no cluster",
}


def ray_address() -> str | None:
    """The `host:port` in `RAY_ADDRESS`; None: it is not set, and a job starts a private Ray.

    Raises:
        ConfigError: its value is no `host:port`.
    """
    if RAY_ADDRESS not in os.environ:
        return None
    address = os.environ[RAY_ADDRESS]
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and int(port) <= MAX_PORT and "/" not in host:
        return address
    raise ConfigError(
        f"{RAY_ADDRESS} must be host:port of the head of a cluster, such as 10.0.0.1:6379; {_why_not(address)}. "
        f"Give host:port, or {_OWN_RAY}. Received: {RAY_ADDRESS}={shown(address)!r}"
    )


def _why_not(address: str) -> str:
    """Why a value of `RAY_ADDRESS` is refused."""
    scheme, separator, _ = address.partition("://")
    if separator and scheme in WEB:
        return (
            f"this is a dashboard, to which jobs are submitted (ray job submit --address {shown(address)} "
            "--working-dir . -- COMMAND)"
        )
    if separator and scheme == "ray":
        return (
            "this is a Ray Client server, but the driver of a job has to run on a node of the cluster: start it there, "
            "or submit it to the dashboard (ray job submit --working-dir . -- COMMAND)"
        )
    return _NO_ADDRESS.get(address.strip(), "the port is missing" if ":" not in address else "this is no address")


def check_socket_path() -> None:
    """Checks that a private Ray of this process can make its sockets in its temporary folder.

    Raises:
        ConfigError: their paths would be too long.
    """
    variable = next((name for name in (RAY_TMPDIR, TMPDIR) if name in os.environ), None)
    if variable is None:
        return
    folder = os.environ[variable]
    size, spare = len(os.fsencode(folder)), MAX_SOCKET_BYTES - len(os.fsencode(_longest_socket(folder)))
    if spare < 0:
        raise ConfigError(
            f"{variable} is too long: Ray makes its sockets below that folder, where a path may have "
            f"{MAX_SOCKET_BYTES} bytes, so that {size + spare} are left for the folder. Set {RAY_TMPDIR} to a shorter "
            f"one, such as {RAY_TMPDIR}=/tmp. Received: {variable}={folder!r} ({size} bytes)"
        )


def _longest_socket(folder: str) -> str:
    """A path as long as that of Ray's longest socket (ray/_private/node.py: `_init_temp`, `_prepare_socket_file`)."""
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    return os.path.join(folder, "ray", session, "sockets", "plasma_store")


def check_keras(backends: Sequence[str] = KERAS_BACKENDS) -> None:
    """Checks the settings with which this process, and processes with its environment, would import Keras.

    Args:
        backends: the backends that the job can use.

    Raises:
        ConfigError: `KERAS_BACKEND` or `keras.json` sets something else, or the backend is not installed.
    """
    named = os.environ.get(KERAS_BACKEND)
    if named:
        _check_named_backend(named, backends)
    file = keras_file()
    settings = {**KERAS_DEFAULTS, **_settings_in(file)}
    if named:
        del settings["backend"]  # The variable overrides it.
    wrong = [
        f"{name}={settings[name]!r}" for name, value in KERAS_DEFAULTS.items() if settings.get(name, value) != value
    ]
    if wrong:
        usual = ", ".join(f"{name} {value}" for name, value in KERAS_DEFAULTS.items())
        backend = f", or set {KERAS_BACKEND}=tensorflow" if wrong[0].startswith("backend") and len(wrong) == 1 else ""
        raise ConfigError(
            f"models here are made for Keras with {usual}; {file} on {platform.node()} says otherwise. Correct or "
            f"delete that file{backend}, or point {KERAS_HOME} to another folder for this job. "
            f"Received: {', '.join(wrong)}"
        )


def _check_named_backend(named: str, backends: Sequence[str]) -> None:
    if named not in backends:
        others = [f"{name} for training and scoring" for name in KERAS_BACKENDS if name not in backends]
        raise ConfigError(
            f"this job runs Keras on {' or '.join(backends)}{f' ({others[0]})' if others else ''}: unset "
            f"{KERAS_BACKEND}, or set it to {backends[0]}. Received: {KERAS_BACKEND}={named!r}"
        )
    _check_installed(named, f"unset {KERAS_BACKEND}", f"{KERAS_BACKEND}={named!r}")


def check_installed(backend: str) -> None:
    """Checks that a backend that was asked for by flag is installed here.

    Raises:
        ConfigError: it is not.
    """
    _check_installed(backend, "leave out --backend", f"backend={backend!r}")


def _check_installed(backend: str, remedy: str, received: str) -> None:
    if importlib.util.find_spec(backend) is None:
        raise ConfigError(
            f"{backend} is not installed on {platform.node()}: pip install {backend}, or {remedy}. Received: {received}"
        )


def use_keras_on(backend: str) -> None:
    """Lets this process import Keras on a backend; call it before the import.

    Raises:
        ConfigError: the backend is not installed, or see `check_keras`.
    """
    check_installed(backend)
    os.environ[KERAS_BACKEND] = backend
    check_keras()


def keras_file() -> Path:
    """The file from which Keras reads its settings (keras/src/backend/config.py)."""
    home = os.path.expanduser("~")
    folder = os.environ.get(KERAS_HOME) or os.path.join(home if os.access(home, os.W_OK) else "/tmp", ".keras")
    return Path(folder).expanduser() / "keras.json"


def _settings_in(file: Path) -> Mapping[str, Any]:
    """The settings in a `keras.json`; none where it is missing or no JSON, as for Keras."""
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
