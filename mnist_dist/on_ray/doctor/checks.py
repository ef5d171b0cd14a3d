"""What the facts of the nodes mean for a job: each check with what was found, what is expected, and a remedy.

Owns: the limits and the words. Asks nobody: the functions here take facts and give checks.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mnist_dist import __version__
from mnist_dist.on_ray.doctor.facts import Facts, TensorFlowFacts, WeightsFacts
from mnist_dist.storage import is_remote

Status = Literal["ok", "warning", "failed", "skipped"]
MIB, GIB = 2**20, 2**30
CORE = ("ray", "tensorflow", "keras")
"""Packages of which another version breaks a job; of the others it may."""
LEAST_MEMORY_BYTES, GOOD_MEMORY_BYTES = GIB, 2 * GIB  # TensorFlow takes half a GiB before any model
LEAST_DISK_BYTES, GOOD_DISK_BYTES = 2 * GIB, 10 * GIB
FULL_DISK, NEARLY_FULL_DISK = 0.95, 0.9  # Ray creates no objects on disks that are used above 0.95
LEAST_OBJECT_STORE_BYTES = 512 * MIB  # a shard of pixels is up to 128 MiB, and several are on the way
LARGE_PACKAGE_BYTES = 10 * MIB
LARGEST_SKEW_S, LARGE_SKEW_S = 15 * 60, 60  # S3 refuses requests that are signed 15 minutes off
SHOWN = 5  # of a longer list
S3_CHECKS = ("s3 endpoint", "s3 credentials", "s3 region", "clock")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    node: str
    """Where: a node's address, `driver`, or `all`."""
    status: Status
    found: str
    """What there is; of a skipped check, why it was not made."""
    expected: str = ""
    remedy: str = ""
    """What to do, in a line; empty where nothing is to be done."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is known of one node, or of the driver."""

    node: str
    facts: Facts | None = None
    """None: it did not answer."""
    tensorflow: TensorFlowFacts | None = None
    """None: not asked."""
    ray_gpus: float | None = None
    """GPUs that Ray hands out there; None: no Ray."""
    object_store_bytes: float | None = None
    """What Ray keeps for objects there; None: no Ray."""
    read_back: str | None = None
    """Why the driver cannot read this node's probe; empty: it can; None: there is none."""
    problem: str = ""
    """Why it did not answer."""


@dataclass(frozen=True, kw_only=True)
class Pins:
    """What versions there should be."""

    versions: Mapping[str, str]
    """Of constraints.txt."""
    needed: tuple[str, ...]
    """What this package itself imports."""


def read_pins(root: Path) -> Pins | None:
    """Of the project at `root`; None: it has no constraints.txt."""
    constraints, project = root / "constraints.txt", root / "pyproject.toml"
    if not constraints.is_file():
        return None
    lines = (line.split("#")[0].strip().partition("==") for line in constraints.read_text().splitlines())
    versions = {canonical(name): version for name, _, version in lines if version}
    wanted = tomllib.loads(project.read_text())["project"]["dependencies"] if project.is_file() else CORE
    names = (re.match(r"[\w.-]+", line) for line in wanted)
    return Pins(versions=versions, needed=tuple(canonical(match.group()) for match in names if match))


def canonical(name: str) -> str:
    """A package's name in the one spelling that PEP 503 gives it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def node_checks(answer: Answer, *, driver: Facts, pins: Pins | None, storage: str) -> Iterator[Check]:
    """Every check of one node, by its facts alone.

    Args:
        answer: of the node, or of the driver, which is asked for less where Ray works.
        driver: what the driver says of itself.
        pins: None: there is no constraints.txt.
        storage: as it was asked for.
    """
    node, facts = answer.node, answer.facts
    if facts is None:
        yield Check(
            name="node",
            node=node,
            status="failed",
            found=answer.problem,
            expected="an answer",
            remedy=f"look at the logs of Ray on {node}, and at its load; `ray status` shows what is alive",
        )
        return
    yield package(node, facts)
    yield versions(node, facts, driver=driver, pins=pins)
    yield legacy_keras(node, facts)
    if answer.tensorflow is not None:
        yield tensorflow(node, answer.tensorflow)
        yield gpus(node, facts, answer.tensorflow, ray_gpus=answer.ray_gpus)
        yield cpu(node, facts)
        yield memory(node, facts)
        yield disk(node, facts)
    if answer.object_store_bytes is not None:
        yield object_store(node, facts, size_bytes=answer.object_store_bytes)
    yield written(answer, storage=storage)
    yield from s3(node, facts)


def package(node: str, facts: Facts) -> Check:
    """Whether the node's processes can import this package."""
    check = Check(name="package", node=node, status="ok", found=f"mnist_dist {__version__}", expected="mnist_dist")
    if not facts.package_problem:
        return check
    remedy = f"submit with `ray job submit --working-dir .`, or install mnist_dist and what it needs on {node}"
    return replace(check, status="failed", found=facts.package_problem, remedy=remedy)


def versions(node: str, facts: Facts, *, driver: Facts, pins: Pins | None) -> Check:
    """Python and packages against constraints.txt, and against the driver."""
    check = Check(name="versions", node=node, status="ok", found=_shown_versions(facts))
    if pins is None:
        return replace(check, status="skipped", found=f"{check.found}; no constraints.txt to compare with")
    wrong = [*_foreign(facts, driver=driver, pins=pins), *_missing(facts, pins)]
    drift = [name for name, pinned in pins.versions.items() if facts.versions.get(name, pinned) != pinned]
    if wrong:
        found = ", ".join(f"{name} {facts.versions.get(name, 'missing')}" for name in wrong)
        wanted = " ".join(f"{name}=={pins.versions[name]}" if name in pins.versions else name for name in wrong)
        remedy = f"on {node}: pip install {wanted} (driver and nodes agree on the versions of constraints.txt)"
        return replace(check, status="failed", found=found, expected=wanted, remedy=remedy)
    if facts.python.split(".")[:2] != driver.python.split(".")[:2]:
        remedy = f"on {node}: Python {driver.python}, as the driver has"
        found = f"Python {facts.python}"
        return replace(check, status="failed", found=found, expected=f"Python {driver.python}", remedy=remedy)
    if drift:
        shown = _some(f"{name} {facts.versions[name]} (pinned: {pins.versions[name]})" for name in drift)
        remedy = f"where something breaks, on {node}: pip install -c constraints.txt -e ."
        return replace(check, status="warning", found=shown, expected="constraints.txt", remedy=remedy)
    return replace(check, found=f"{check.found} and all else as in constraints.txt", expected="constraints.txt")


def _shown_versions(facts: Facts) -> str:
    return ", ".join([f"Python {facts.python}", *(f"{name} {facts.versions.get(name, 'missing')}" for name in CORE)])


def _foreign(facts: Facts, *, driver: Facts, pins: Pins) -> list[str]:
    """Core packages of another version than the driver's, or of another minor release than pinned."""
    return [
        name
        for name in CORE
        if name in facts.versions
        and (
            facts.versions[name] != driver.versions.get(name, facts.versions[name])
            or _minor(facts.versions[name]) != _minor(pins.versions.get(name, facts.versions[name]))
        )
    ]


def _missing(facts: Facts, pins: Pins) -> list[str]:
    return [name for name in pins.needed if name not in facts.versions]


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def legacy_keras(node: str, facts: Facts) -> Check:
    """Whether something on the node turns Keras 3 on TensorFlow into something else."""
    check = Check(
        name="tf.keras", node=node, status="ok", found="Keras 3 on TensorFlow", expected="Keras 3 on TensorFlow"
    )
    legacy = facts.variables.get("TF_USE_LEGACY_KERAS", "").lower()
    if legacy in ("1", "true"):
        found = f"TF_USE_LEGACY_KERAS={facts.variables['TF_USE_LEGACY_KERAS']}: tf.keras is Keras 2 (tf_keras) there"
        remedy = f"unset TF_USE_LEGACY_KERAS on {node}, before Ray starts there; in code write `import keras`"
        return replace(check, status="failed", found=found, remedy=remedy)
    backend = facts.variables.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        remedy = f"unset KERAS_BACKEND on {node}, or set it to tensorflow, before Ray starts there"
        return replace(check, status="failed", found=f"KERAS_BACKEND={backend}", remedy=remedy)
    if "tf-keras" in facts.versions:
        found = f"tf_keras {facts.versions['tf-keras']} (Keras 2) is installed beside Keras 3"
        remedy = f"on {node}: pip uninstall tf_keras; or never mix its models with ours, neither loads the other's"
        return replace(check, status="warning", found=found, remedy=remedy)
    return check


def tensorflow(node: str, facts: TensorFlowFacts) -> Check:
    """Whether TensorFlow and Keras can be imported, and how Keras is set up."""
    expected = "backend tensorflow, channels_last, float32"
    check = Check(name="tensorflow", node=node, status="ok", found="", expected=expected)
    if facts.problem:
        remedy = f"on {node}: python -c 'import tensorflow, keras' shows all of it; then pip install -c constraints.txt"
        return replace(check, status="failed", found=facts.problem, remedy=f"{remedy} tensorflow keras")
    found = f"backend {facts.backend}, {facts.image_data_format}, {facts.floatx}"
    if found != expected:
        remedy = f"on {node}: delete keras.json in ~/.keras (or KERAS_HOME), and unset KERAS_BACKEND"
        return replace(check, status="failed", found=found, remedy=remedy)
    return replace(check, found=f"TensorFlow {facts.tensorflow}, Keras {facts.keras}, {found}")


def gpus(node: str, facts: Facts, seen: TensorFlowFacts, *, ray_gpus: float | None) -> Check:
    """GPUs as the node, Ray and TensorFlow see them."""
    by_ray = "" if ray_gpus is None else f"Ray {ray_gpus:g}, "
    by_tensorflow = "unknown" if seen.problem else str(seen.gpus)
    found = f"{by_ray}TensorFlow {by_tensorflow}, devices {facts.gpu_devices}"
    check = Check(name="gpus", node=node, status="ok", found=found, expected="the same number to all")
    if seen.problem:
        return replace(check, status="skipped", found=f"{found}: TensorFlow cannot be imported")
    if seen.gpus < max(ray_gpus or 0, facts.gpu_devices):
        why = "does not load its CUDA libraries" if seen.with_cuda else "is built without CUDA"
        remedy = f"on {node}: TensorFlow {why}: pip install -c constraints.txt -e '.[gpu]', and look at nvidia-smi"
        return replace(check, status="failed", remedy=remedy)
    if ray_gpus is not None and seen.gpus > ray_gpus:
        remedy = f"start Ray on {node} with --num-gpus={seen.gpus}, or jobs leave them idle"
        return replace(check, status="warning", remedy=remedy)
    return check


def cpu(node: str, facts: Facts) -> Check:
    """What the processor can compute with: TensorFlow needs AVX, bfloat16 is fast with AVX512-BF16 or AMX only."""
    has = {"AVX512": "avx512f", "AVX512-BF16": "avx512_bf16", "AMX-BF16": "amx_bf16"}
    units = ", ".join(f"{name} {'yes' if flag in facts.cpu_flags else 'no'}" for name, flag in has.items())
    found = f"{facts.cpus} CPUs, {facts.cpu_model}"
    check = Check(name="cpu", node=node, status="ok", found=f"{found}; {units}", expected="AVX")
    if not facts.cpu_flags:
        return replace(check, status="skipped", found=f"{found}; /proc/cpuinfo lists no flags")
    if "avx" not in facts.cpu_flags:
        remedy = f"leave {node} out of the cluster, or give its virtual machine a CPU model with AVX"
        return replace(check, status="failed", remedy=remedy)
    if not {"avx512_bf16", "amx_bf16"} & set(facts.cpu_flags):
        return replace(check, found=f"{check.found} (bfloat16 on the CPU is slow: --precision float32)")
    return check


def memory(node: str, facts: Facts) -> Check:
    """Free memory of the node."""
    expected = f"{_size(GOOD_MEMORY_BYTES)} free"
    check = Check(name="memory", node=node, status="ok", found="", expected=expected)
    if facts.memory_free_bytes is None:
        return replace(check, status="skipped", found="/proc/meminfo is not there")
    check = replace(check, found=f"{_size(facts.memory_free_bytes)} free")
    if facts.memory_free_bytes >= GOOD_MEMORY_BYTES:
        return check
    status: Status = "warning" if facts.memory_free_bytes >= LEAST_MEMORY_BYTES else "failed"
    return replace(check, status=status, remedy=f"end what else runs on {node}, or give it more memory")


def disk(node: str, facts: Facts) -> Check:
    """Free space where Ray spills, temporary files go and a local storage lies."""
    found = ", ".join(f"{folder} {_size(free)} of {_size(total)} free" for folder, (total, free) in facts.disks.items())
    expected = f"{_size(GOOD_DISK_BYTES)} free, used below {NEARLY_FULL_DISK:.0%}"
    check = Check(name="disk", node=node, status="ok", found=found, expected=expected)
    full = _fuller(facts, LEAST_DISK_BYTES, FULL_DISK)
    nearly = _fuller(facts, GOOD_DISK_BYTES, NEARLY_FULL_DISK)
    if not nearly:
        return check
    remedy = f"make room below {(full or nearly)[0]} on {node}, or point TMPDIR and RAY_TMPDIR to another disk"
    return replace(check, status="failed" if full else "warning", remedy=remedy)


def _fuller(facts: Facts, least_bytes: int, most_used: float) -> list[str]:
    return [
        folder
        for folder, (total, free) in facts.disks.items()
        if free < least_bytes or 1 - free / max(total, 1) >= most_used
    ]


def object_store(node: str, facts: Facts, *, size_bytes: float) -> Check:
    """Ray's memory for objects, which lies in /dev/shm where that is large enough."""
    found = f"{_size(size_bytes)}, /dev/shm {_size(facts.shared_memory_bytes or 0)}"
    expected = f"{_size(LEAST_OBJECT_STORE_BYTES)} or more, in /dev/shm"
    check = Check(name="object store", node=node, status="ok", found=found, expected=expected)
    if size_bytes < LEAST_OBJECT_STORE_BYTES:
        remedy = f"start Ray on {node} with --object-store-memory={LEAST_OBJECT_STORE_BYTES} or more"
        return replace(check, status="warning", remedy=remedy)
    if facts.shared_memory_bytes is not None and facts.shared_memory_bytes < size_bytes:
        remedy = f"start the container on {node} with --shm-size={_size(size_bytes * 1.1).replace(' ', '')[:-2]}b"
        return replace(check, status="warning", remedy=remedy)
    return check


def written(answer: Answer, *, storage: str) -> Check:
    """Whether the node can write the storage, and the driver sees what it wrote."""
    node, facts = answer.node, answer.facts
    check = Check(name="storage", node=node, status="ok", found=storage, expected="written here, read by the driver")
    problem = facts.storage_problem if facts is not None else None
    if problem is None:
        why = "the package cannot be imported" if facts and facts.package_problem else "S3 is out of reach"
        return replace(check, status="skipped", found=f"{storage}: not tried, {why}")
    if problem:
        remedy = f"let this user write {storage} on {node}, or name another --storage"
        return replace(check, status="failed", found=f"cannot be written: {problem}", remedy=remedy)
    if not answer.read_back:
        return replace(check, found=f"{storage} written, read back and deleted")
    found = f"written, but the driver cannot read it: {answer.read_back}"
    remedy = f"give --storage s3://..., or mount one shared folder as {storage} on every node, {node} among them"
    if is_remote(storage):
        remedy = f"let the driver's credentials read {storage}, and use the same endpoint on {node}"
    return replace(check, status="failed", found=found, remedy=remedy)


def s3(node: str, facts: Facts) -> Iterator[Check]:
    """Endpoint, credentials, region and clock; nothing where nothing lies on S3."""
    if facts.s3 is None:
        return
    asked = facts.s3
    endpoint = Check(name="s3 endpoint", node=node, status="ok", found=asked.endpoint, expected="an answer")
    if asked.problem:
        remedy = f"check AWS_ENDPOINT_URL, proxy and firewall on {node}: {asked.endpoint or 'the endpoint'} must answer"
        yield replace(endpoint, status="failed", found=asked.problem, remedy=remedy)
    else:
        yield endpoint
    yield _credentials(node, facts)
    yield _region(node, facts)
    yield clock(node, asked.skew_s)


def _credentials(node: str, facts: Facts) -> Check:
    asked = facts.s3
    source = asked.credentials if asked is not None else None
    check = Check(name="s3 credentials", node=node, status="ok", found=f"from {source}", expected="accepted")
    if source is None:
        remedy = f"give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role to {node}, before Ray starts"
        return replace(check, status="failed", found="none", remedy=remedy)
    seen = [problem for problem in (facts.storage_problem, *facts.places.values()) if problem]
    refused = [problem for problem in seen if "credentials are not accepted" in problem]
    if refused:
        remedy = f"renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (found by {source}) on {node}"
        return replace(check, status="failed", found=refused[0], remedy=remedy)
    return check


def _region(node: str, facts: Facts) -> Check:
    asked = facts.s3
    configured, actual = (asked.region, asked.bucket_region) if asked is not None else (None, None)
    check = Check(name="s3 region", node=node, status="ok", found=configured or "none", expected=actual or "any")
    if configured is None or (actual is not None and configured != actual):
        remedy = f"set AWS_DEFAULT_REGION={actual or 'us-east-1 (the region of the bucket)'} on {node}"
        return replace(check, status="warning", remedy=remedy)
    return check


def clock(node: str, skew_s: float | None) -> Check:
    """The node's clock against the endpoint's; S3 refuses what is signed too far off."""
    expected = f"within {LARGE_SKEW_S} s of the endpoint"
    check = Check(name="clock", node=node, status="ok", found="", expected=expected)
    if skew_s is None:
        return replace(check, status="skipped", found="the endpoint does not tell the time")
    found = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the endpoint"
    if abs(skew_s) <= LARGE_SKEW_S:
        return replace(check, found=found)
    remedy = f"set the clock of {node} (NTP: timedatectl set-ntp true, or chronyc makestep)"
    return replace(check, status="failed" if abs(skew_s) > LARGEST_SKEW_S else "warning", found=found, remedy=remedy)


def published_weights(node: str, facts: WeightsFacts, *, url: str) -> Check:
    """Whether the file of ImageNet weights lies in Keras' cache or can be downloaded into it."""
    file = url.rpartition("/")[2]
    check = Check(name="weights", node=node, status="ok", found=f"{file} in {facts.folder}", expected=file)
    if facts.there:
        return check
    if not facts.problem:
        return replace(check, found=f"{file} can be downloaded")
    remedy = (
        f"put the file {file} from {url} into {facts.folder} on {node}, or name a file of weights, a bundle, or none"
    )
    return replace(check, status="failed", found=f"{file} cannot be downloaded: {facts.problem}", remedy=remedy)


def place(name: str, node: str, problem: str | None, *, uri: str) -> Check:
    """Whether a node sees what it must read.

    Args:
        name: of the check and of the flag: `weights` or `bundle`.
        node: that should see it.
        problem: why it does not; empty: it does; None: not tried.
        uri: what it should see.
    """
    check = Check(name=name, node=node, status="ok", found=uri, expected="seen by every node")
    if problem is None:
        return replace(check, status="skipped", found=f"{uri}: not tried, S3 or the package is out of reach")
    if not problem:
        return check
    remedy = f"put {uri} where {node} sees it: an s3:// URI or a shared folder, as --{name}"
    return replace(check, status="failed", found=problem, remedy=remedy)


def working_dir(
    folder: str, *, size_bytes: int, largest: Sequence[tuple[str, int]], left_out: Sequence[str], limit_bytes: int
) -> Check:
    """What `ray job submit --working-dir .` would upload.

    Args:
        folder: the working directory.
        size_bytes: of all that Ray would pack.
        largest: names directly below it and their bytes, the largest first.
        left_out: names of what is needed, is there, and would not be packed.
        limit_bytes: of Ray.
    """
    shown = _some(f"{name} {_size(size)}" for name, size in largest if size > MIB)
    found = f"{_size(size_bytes)} below {folder}" + (f": {shown}" if shown else "")
    expected = f"at most {_size(LARGE_PACKAGE_BYTES)}; Ray's limit is {_size(limit_bytes)}"
    check = Check(name="working dir", node="driver", status="ok", found=found, expected=expected)
    if left_out:
        remedy = f"let .rayignore and .gitignore keep {', '.join(left_out)}; a submitted job would not find them"
        return replace(check, status="failed", found=f"{found}, without {', '.join(left_out)}", remedy=remedy)
    if size_bytes <= LARGE_PACKAGE_BYTES:
        return check
    names = ", ".join(name for name, _ in largest[:SHOWN])
    remedy = f"write what the jobs do not need into .rayignore ({names}), or move it out of {folder}"
    return replace(check, status="failed" if size_bytes >= limit_bytes else "warning", remedy=remedy)


def _some(words: Iterator[str]) -> str:
    """The first few, and how many more there are."""
    every = list(words)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def _size(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"
