"""Gathers the facts of one node: versions, Keras, memory, disks, and whether it sees storage, S3 and weights.

Owns: the questions and the answers, as plain values; errors are answers, too. Does not own: the judgement (`checks`).
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mnist_dist import processor
from mnist_dist.environment import KERAS_BACKEND
from mnist_dist.errors import first_line
from mnist_dist.models.backbones import keras_models_folder
from mnist_dist.models.weights import published_weights_problem
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import bucket_and_key, is_on_s3, is_remote

CONNECT_TIMEOUT_S = 5
KERAS_TIMEOUT_S = 120.0  # The import takes 7 s of a core, and reads half a GiB from the disk the first time.
# This runs in a process of its own, because TensorFlow may abort the process.
_KERAS = """
import json
import keras
backend = keras.backend.backend()
if backend == "jax":
    import jax
    gpus = sum(device.platform == "gpu" for device in jax.devices())
else:
    import tensorflow
    gpus = len(tensorflow.config.list_physical_devices("GPU"))
print(json.dumps({
    "backend": backend,
    "image_data_format": keras.config.image_data_format(),
    "floatx": keras.config.floatx(),
    "gpus": gpus,
}))
"""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a node is asked for."""

    packages: tuple[str, ...]
    """Names of the packages whose versions are wanted."""
    storage: str
    """Folder or bucket prefix, absolute."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Name of a check -> URI that the node must see."""
    weights_url: str | None = None
    """URL of the ImageNet weights; None: they are not needed."""


@dataclass(frozen=True, kw_only=True)
class S3Facts:
    """How this node reaches S3."""

    endpoint: str = ""
    region: str | None = None
    """The configured region; None: there is none."""
    bucket_region: str | None = None
    """The region that the endpoint reports; None: it reports none."""
    credentials: str | None = None
    """Their origin, such as `env`; None: there are none."""
    skew_s: float | None = None
    """This clock minus that of the endpoint, s; None: the endpoint sent no date."""
    problem: str = ""
    """Why the endpoint does not answer; empty: it does."""


@dataclass(frozen=True, kw_only=True)
class KerasFacts:
    """What a process that imports Keras reports."""

    problem: str = ""
    """Why the import failed; empty: it worked."""
    backend: str = ""
    image_data_format: str = ""
    floatx: str = ""
    gpus: int = 0
    """Number that the backend can use."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of a process and of its machine."""

    versions: Mapping[str, str]
    """Versions of the installed packages."""
    keras_backend: str
    """The variable `KERAS_BACKEND`; empty: not set."""
    storage_problem: str | None
    """Why the storage cannot be written; empty: it can; None: not tried, S3 cannot be reached."""
    unseen: Mapping[str, str | None]
    """Name in `Question.places` -> why the URI is not seen; empty: it is; None: not tried."""
    s3: S3Facts | None
    """None: no URI is on S3."""
    free_memory_bytes: int
    """Free memory of the machine, or of its container if that has less."""
    disks: Mapping[str, tuple[int, int]]
    """Folder -> total and free bytes of its disk."""
    gpu_devices: int
    """Number of NVIDIA devices in `/dev`."""
    weights_folder: str
    """The folder where Keras keeps its downloads."""
    weights_problem: str | None
    """Why the published weights are not available; empty: they are there or can be downloaded; None: not needed."""
    keras: KerasFacts | None
    """None: Keras was not checked."""
    ray_gpus: float | None = None
    """GPUs that Ray offers on this node; None: no Ray."""


def gather(question: Question, *, with_keras: bool) -> Facts:
    """Gathers the facts of this process; it takes a few seconds, and up to `KERAS_TIMEOUT_S` more with Keras."""
    on_s3 = [uri for uri in (question.storage, *question.places.values()) if is_on_s3(uri)]
    s3 = _s3_facts(on_s3[0]) if on_s3 else None
    return Facts(
        versions=_versions(question.packages),
        keras_backend=os.environ.get(KERAS_BACKEND, ""),
        storage_problem=_reached(question.storage, s3, lambda: ANYWHERE.check_writable(question.storage)),
        unseen={name: _reached(uri, s3, functools.partial(_see, uri)) for name, uri in question.places.items()},
        s3=s3,
        free_memory_bytes=processor.free_memory_bytes(),
        disks=_disks(question.storage),
        gpu_devices=sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*")),
        weights_folder=str(keras_models_folder()),
        weights_problem=None if question.weights_url is None else published_weights_problem(question.weights_url),
        keras=_keras_facts() if with_keras else None,
    )


def _tried(action: Callable[[], object]) -> str:
    """Empty, or why the action failed, in one line. Only here does an error become an answer."""
    try:
        action()
    except Exception as err:
        return f"{type(err).__name__}: {first_line(err)}"
    return ""


def _reached(uri: str, s3: S3Facts | None, action: Callable[[], object]) -> str | None:
    """As `_tried`; None if S3 cannot be reached, because its retries would take minutes to fail."""
    if is_on_s3(uri) and (s3 is None or s3.problem or s3.credentials is None):
        return None
    return _tried(action)


def _see(uri: str) -> None:
    if not ANYWHERE.exists(uri):
        raise FileNotFoundError(f"nothing there: {uri}")


def _versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _keras_facts() -> KerasFacts:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if not environment.get("CUDA_VISIBLE_DEVICES"):  # Ray hides the GPUs from tasks that reserve none.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-c", _KERAS]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=KERAS_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return KerasFacts(problem=f"the import took more than {KERAS_TIMEOUT_S:.0f} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        ended = f"exit {done.returncode}" if done.returncode > 0 else signal.Signals(-done.returncode).name
        return KerasFacts(problem=f"{ended}: {last}")
    return KerasFacts(**json.loads(done.stdout.splitlines()[-1]))


def _disks(storage_uri: str) -> dict[str, tuple[int, int]]:
    """Total and free bytes by disk, for Ray's spilled objects, temporary files and a local storage."""
    folders = [Path(os.environ.get("RAY_TMPDIR", "/tmp")), Path(tempfile.gettempdir())]
    if not is_remote(storage_uri):
        folders.append(Path(storage_uri))
    disks: dict[int, tuple[str, tuple[int, int]]] = {}
    for folder in folders:
        with contextlib.suppress(OSError):  # It may not be read, which the storage check reports.
            existing = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
            usage = shutil.disk_usage(existing)
            disks.setdefault(os.stat(existing).st_dev, (str(existing), (usage.total, usage.free)))
    return dict(disks.values())


def _s3_facts(uri: str) -> S3Facts:
    """Asks the endpoint for the bucket, once and without credentials; a refusal is an answer, and has a date."""
    try:
        return _ask_endpoint(bucket_and_key(uri)[0])
    except Exception as err:  # A broken AWS configuration, or an endpoint that is no URL.
        return S3Facts(problem=f"{type(err).__name__}: {first_line(err)}")


def _ask_endpoint(bucket: str) -> S3Facts:
    import botocore
    from boto3.session import Session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    quick = Config(
        signature_version=botocore.UNSIGNED,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=CONNECT_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 1},
    )
    session = Session()
    credentials = session.get_credentials()
    client = session.client("s3", config=quick)
    facts = S3Facts(
        endpoint=client.meta.endpoint_url,
        region=session.region_name,
        credentials=None if credentials is None else credentials.method,
    )
    try:
        answer: Mapping[str, Any] = client.head_bucket(Bucket=bucket)
    except ClientError as err:
        answer = err.response
    except BotoCoreError as err:
        return dataclasses.replace(facts, problem=first_line(err))
    headers = answer["ResponseMetadata"].get("HTTPHeaders", {})
    return dataclasses.replace(
        facts,
        bucket_region=headers.get("x-amz-bucket-region"),
        skew_s=time.time() - parsedate_to_datetime(headers["date"]).timestamp() if "date" in headers else None,
    )
