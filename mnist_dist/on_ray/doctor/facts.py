"""What one node says of itself: versions, processor, memory, disks, what it sees of storage, S3 and weights.

Owns: the questions and the answers, as plain values; judges nothing (`doctor_checks`). Its functions are sent to the
nodes by value, so that a node without this package answers, too: at the top there is the standard library alone, and
everything else is imported where it is tried.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mnist_dist import processor

CONNECT_TIMEOUT_S = 5
VARIABLES = ("TF_USE_LEGACY_KERAS", "KERAS_BACKEND")
# In a process of its own: a TensorFlow that aborts is an answer, too.
_TENSORFLOW = """
import json
import tensorflow as tf
import keras
print(json.dumps({
    "tensorflow": tf.__version__,
    "keras": keras.__version__,
    "backend": keras.backend.backend(),
    "image_data_format": keras.config.image_data_format(),
    "floatx": keras.config.floatx(),
    "gpus": len(tf.config.list_physical_devices("GPU")),
    "with_cuda": tf.test.is_built_with_cuda(),
}))
"""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a node is asked for."""

    packages: tuple[str, ...]
    """Names whose versions are asked for."""
    storage: str
    """Folder or `s3://` prefix, absolute."""
    probe: str
    """URI of the object that this node puts below the storage."""
    places: tuple[str, ...] = ()
    """URIs that the node must see."""
    weights_url: str | None = None
    """Where the ImageNet weights are published; None: they are not needed."""


@dataclass(frozen=True, kw_only=True)
class S3Facts:
    """How this node reaches S3."""

    endpoint: str = ""
    region: str | None = None
    """As configured; None: not at all."""
    bucket_region: str | None = None
    """As the endpoint says; None: it does not."""
    credentials: str | None = None
    """Where they come from, such as `env`; None: there are none."""
    skew_s: float | None = None
    """This clock less the endpoint's, s; None: it does not tell the time."""
    problem: str = ""
    """Why the endpoint does not answer."""


@dataclass(frozen=True, kw_only=True)
class WeightsFacts:
    """Whether the published weights can be had."""

    folder: str
    """Keras' cache."""
    there: bool
    """Whether the file lies in the cache."""
    problem: str = ""
    """Why it cannot be downloaded."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a node says of itself."""

    python: str
    versions: Mapping[str, str]
    """Of the packages that are installed."""
    variables: Mapping[str, str]
    """Those of `VARIABLES` that are set."""
    package_problem: str
    """Why this package cannot be imported."""
    cpu_model: str
    cpu_flags: tuple[str, ...]
    """As /proc/cpuinfo lists them; empty where there is none."""
    cpus: int
    memory_free_bytes: int | None
    """Of the machine, or of its container where that has less; None: not known."""
    shared_memory_bytes: int | None
    """Size of /dev/shm; None: there is none."""
    disks: Mapping[str, tuple[int, int]]
    """Folder -> total and free bytes of its disk."""
    gpu_devices: int
    """NVIDIA devices that processes can open."""
    storage_problem: str | None
    """Why the probe could not be put; None: not tried, S3 is out of reach."""
    places: Mapping[str, str | None]
    """URI -> why it is not seen; empty: it is; None: not tried."""
    s3: S3Facts | None = None
    """None: nothing lies on S3."""
    weights: WeightsFacts | None = None
    """None: not needed."""


@dataclass(frozen=True, kw_only=True)
class TensorFlowFacts:
    """What a process that imports TensorFlow and Keras sees."""

    problem: str = ""
    """Why it could not."""
    tensorflow: str = ""
    keras: str = ""
    backend: str = ""
    image_data_format: str = ""
    floatx: str = ""
    gpus: int = 0
    with_cuda: bool = False


def gather(question: Question) -> dict[str, Any]:
    """The fields of `Facts`, as values that need no class of ours; puts the probe. Makes no error of anything."""
    package_problem = _tried(_import_package)
    on_s3 = [uri for uri in (question.storage, *question.places) if uri.startswith("s3://")]
    s3 = _s3_facts(on_s3[0]) if on_s3 else None
    facts = Facts(
        python=platform.python_version(),
        versions=_versions(question.packages),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        package_problem=package_problem,
        **_processor(),
        memory_free_bytes=_or_none(_memory_free_bytes),
        shared_memory_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        disks=_disks(question.storage),
        gpu_devices=sum(path.name[len("nvidia") :].isdigit() for path in Path("/dev").glob("nvidia*")),
        storage_problem=_if_reached(question.storage, s3, package_problem, lambda: _put(question.probe)),
        places={uri: _if_reached(uri, s3, package_problem, functools.partial(_see, uri)) for uri in question.places},
        s3=s3,
        weights=None if question.weights_url is None else _weights_facts(question.weights_url),
    )
    return dataclasses.asdict(facts)


def _or_none(call: Callable[[], int | None]) -> int | None:
    try:
        return call()
    except (OSError, ValueError, KeyError):  # a kernel, or a container, that says it in another way
        return None


def facts_from(values: Mapping[str, Any]) -> Facts:
    """The answer of `gather`, which may have crossed a border of processes."""
    s3, weights = values["s3"], values["weights"]
    nested = {"s3": s3 and S3Facts(**s3), "weights": weights and WeightsFacts(**weights)}
    return Facts(**{**values, **nested})


def ask_tensorflow(timeout_s: float) -> dict[str, Any]:
    """The fields of `TensorFlowFacts`, from a process of its own that may take so long."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if not environment.get("CUDA_VISIBLE_DEVICES"):  # Ray hides the GPUs from tasks that reserve none
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-c", _TENSORFLOW]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"problem": f"not imported within {timeout_s:.0f} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        how = f"exit {done.returncode}" if done.returncode > 0 else signal.Signals(-done.returncode).name
        return {"problem": f"{how}: {last}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def remove_probe(probe: str) -> None:
    """Deletes a probe on the node that put it; what happens is nobody's concern any more."""
    _tried(lambda: _delete(probe))


def keras_models_folder() -> Path:
    """Where Keras keeps its downloads: below /tmp where the home folder cannot be written (as `classifier` finds it,
    which loads Keras)."""
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")).expanduser()
    nearest = next(folder for folder in (home, *home.parents) if folder.exists())
    return (home if os.access(nearest, os.W_OK) else Path("/tmp/.keras")) / "models"


def _tried(action: Callable[[], object]) -> str:
    """Empty, or in a line why it failed: the one border at which an error becomes an answer."""
    try:
        action()
    except Exception as err:
        return f"{type(err).__name__}: {(str(err).strip() or 'no message').splitlines()[0]}"
    return ""


def _if_reached(uri: str, s3: S3Facts | None, package_problem: str, action: Callable[[], object]) -> str | None:
    """None where it is known not to work, which S3's own retries would take minutes to find out."""
    remote = uri.startswith("s3://")
    if package_problem or (remote and (s3 is None or s3.problem or s3.credentials is None)):
        return None
    return _tried(action)


def _import_package() -> None:
    import mnist_dist.storage  # noqa: F401 - what matters is that it can be


def _put(probe: str) -> None:
    from mnist_dist import storage

    storage.write_bytes(probe, probe.encode())


def _delete(probe: str) -> None:
    from mnist_dist import storage

    storage.delete(probe)


def _see(uri: str) -> None:
    from mnist_dist import storage

    if not storage.exists(uri):
        raise FileNotFoundError(f"nothing there: {uri}")


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> dict[str, Any]:
    return {"cpu_model": processor.name(), "cpu_flags": processor.flags(), "cpus": processor.usable_cpus()}


def _memory_free_bytes() -> int | None:
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.exists():
        return None
    kib = {line.partition(":")[0]: line.split()[1] for line in meminfo.read_text().splitlines()}
    free = int(kib["MemAvailable"]) * 1024
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
    if limit == "max":
        return free
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # files can be dropped
    return min(free, int(limit) - used)


def _disks(storage_uri: str) -> dict[str, tuple[int, int]]:
    """Of the temporary folders, where Ray spills to, and of a local storage; each disk once."""
    folders = [Path(os.environ.get("RAY_TMPDIR", "/tmp")), Path(tempfile.gettempdir())]
    if not storage_uri.startswith("s3://"):
        folders.append(Path(storage_uri))
    disks: dict[int, tuple[str, tuple[int, int]]] = {}
    for folder in folders:
        with contextlib.suppress(OSError):  # no right to look into it, which the storage's own check tells
            there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
            usage = shutil.disk_usage(there)
            disks.setdefault(os.stat(there).st_dev, (str(there), (usage.total, usage.free)))
    return dict(disks.values())


def _s3_facts(uri: str) -> S3Facts:
    """Asks the endpoint for the bucket without credentials, once: whatever it answers, it answers, and with a date."""
    try:
        return _ask_endpoint(uri.removeprefix("s3://").partition("/")[0])
    except Exception as err:  # botocore missing, a broken AWS configuration, an endpoint that is no URL
        return S3Facts(problem=f"{type(err).__name__}: {err}")


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
        return dataclasses.replace(facts, problem=str(err))
    headers = answer["ResponseMetadata"].get("HTTPHeaders", {})
    return dataclasses.replace(
        facts,
        bucket_region=headers.get("x-amz-bucket-region"),
        skew_s=time.time() - parsedate_to_datetime(headers["date"]).timestamp() if "date" in headers else None,
    )


def _weights_facts(url: str) -> WeightsFacts:
    folder = keras_models_folder()
    there = (folder / url.rpartition("/")[2]).is_file()
    return WeightsFacts(folder=str(folder), there=there, problem="" if there else _tried(lambda: _ask_for(url)))


def _ask_for(url: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_TIMEOUT_S):
        pass
