"""Judges the facts of a node: each check says what was found, and what to do about it.

Owns: the limits and the messages. Does not own: the facts (`facts`). A check gives None if it does not concern the job.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mnist_dist.on_ray.doctor.facts import Facts, Question, S3Facts

Status = Literal["ok", "warning", "failed", "skipped"]
MIB, GIB = 2**20, 2**30
CORE = ("ray", "tensorflow", "keras")
"""Packages of which another version breaks a job; another version of the others may be harmless."""
IN_PLACE_OF = {"onnxruntime": "onnxruntime-gpu"}
"""Packages that hold the same modules under another name."""
MIN_MEMORY_BYTES, GOOD_MEMORY_BYTES = GIB, 2 * GIB  # TensorFlow takes half a GiB before any model is loaded.
MIN_DISK_BYTES, GOOD_DISK_BYTES = 2 * GIB, 10 * GIB
FULL_DISK, NEARLY_FULL_DISK = 0.95, 0.9  # Ray creates no objects on a disk that is more than 95 % full.
LARGE_UPLOAD_BYTES, MAX_UPLOAD_BYTES = 10 * MIB, 500 * MIB  # Ray refuses more than the second.
LARGE_SKEW_S, MAX_SKEW_S = 60, 15 * 60  # S3 refuses a request signed more than 15 minutes off.
MAX_SHOWN = 5  # Items shown of a longer list.


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    status: Status
    found: str
    """What was found; for a skipped check, why it was skipped."""
    remedy: str = ""
    """What to do about it, in one line; empty if there is nothing to do."""
    name: str = ""
    node: str = ""
    """The address of a node, `driver`, or `all`."""


@dataclass(frozen=True, kw_only=True)
class Pins:
    """The package versions that a node should have."""

    versions: Mapping[str, str]
    """The versions in constraints.txt; empty: there is no such file."""
    needed: tuple[str, ...]
    """The packages that this one depends on."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the facts of a node are compared with."""

    question: Question
    driver: Facts
    pins: Pins


def read_pins(root: Path) -> Pins:
    """The pins of the project at `root`."""
    constraints, project = root / "constraints.txt", root / "pyproject.toml"
    lines = constraints.read_text().splitlines() if constraints.is_file() else []
    pairs = (line.split("#")[0].strip().partition("==") for line in lines)
    dependencies = tomllib.loads(project.read_text())["project"]["dependencies"] if project.is_file() else CORE
    return Pins(
        versions={_canonical(name): version for name, _, version in pairs if version},
        needed=tuple(_canonical(re.split(r"[^\w.-]", line)[0]) for line in dependencies),
    )


def _canonical(name: str) -> str:
    """The name of a package, normalised as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(check: Check, name: str, node: str) -> Check:
    """The check with its name and node; without a remedy if nothing is wrong."""
    is_bad = check.status in ("warning", "failed")
    return replace(check, name=name, node=node, remedy=check.remedy if is_bad else "")


def node_checks(node: str, answer: Facts | str, expected: Expected) -> Iterator[Check]:
    """Makes all checks of one node.

    Args:
        node: its name in the output.
        answer: its facts, or the reason why there are none.
        expected: what the facts are compared with.
    """
    if isinstance(answer, str):
        yield named(silent(answer), "node", node)
        return
    results = {name: check(answer, expected) for name, check in OF_A_NODE.items()}
    if answer.s3 is not None:
        results |= {name: check(answer.s3, answer) for name, check in OF_S3.items()}
    yield from (named(result, name, node) for name, result in results.items() if result is not None)


def silent(problem: str) -> Check:
    """The failed check of a node that gave no facts."""
    remedy = "look at Ray's logs and the load on that node; `ray status` shows which nodes are alive"
    if "ModuleNotFoundError" in problem or "ImportError" in problem:
        remedy = "submit with `ray job submit --working-dir .`, or install mnist_dist and its dependencies on that node"
    return Check("failed", problem, remedy)


def versions(facts: Facts, expected: Expected) -> Check:
    """Compares the packages with constraints.txt and with the driver."""
    local, pinned, driver = facts.versions, expected.pins.versions, expected.driver.versions
    wrong = [name for name in expected.pins.needed if not {name, IN_PLACE_OF.get(name, name)} & local.keys()]
    wrong += [name for name in CORE if name in local and local[name] != driver.get(name, local[name])]
    wrong += [name for name in CORE if name in local and _minor(local[name]) != _minor(pinned.get(name, local[name]))]
    drift = [name for name, version in pinned.items() if local.get(name, version) != version]
    if wrong:
        wrong = list(dict.fromkeys(wrong))
        install = " ".join(f"{name}=={pinned[name]}" if name in pinned else name for name in wrong)
        found = ", ".join(f"{name} {local.get(name, 'missing')}" for name in wrong)
        return Check("failed", found, f"pip install {install} (the same versions on the driver and every node)")
    if drift:
        found = _some([f"{name} {local[name]} (pinned: {pinned[name]})" for name in drift])
        return Check("warning", found, "if something breaks: pip install -c constraints.txt -e .")
    rest = "the others as in constraints.txt" if pinned else "no constraints.txt to compare with"
    return Check("ok", ", ".join([*(f"{name} {local.get(name, '')}" for name in CORE), rest]))


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def keras(facts: Facts, expected: Expected) -> Check | None:
    """Checks that Keras and its backend can be imported, and their settings."""
    seen, backend = facts.keras, expected.driver.keras_backend
    if seen is None:
        return None
    if seen.problem:
        remedy = "python -c 'import keras' shows the whole error; pip install -c constraints.txt tensorflow keras"
        if "SIGILL" in seen.problem:
            remedy = "do not use this node, or give its virtual machine a CPU model with AVX for TensorFlow"
        if "No module named 'jax'" in seen.problem:
            remedy = "pip install jax ('jax[cuda12]' for a GPU), or unset KERAS_BACKEND"
        return Check("failed", seen.problem, remedy)
    found = f"backend {seen.backend}, {seen.image_data_format}, {seen.floatx}"
    if found not in ("backend tensorflow, channels_last, float32", "backend jax, channels_last, float32"):
        remedy = "delete keras.json in ~/.keras (or KERAS_HOME), and set KERAS_BACKEND to tensorflow or jax"
        return Check("failed", found, remedy)
    if backend and seen.backend != backend:
        remedy = f'ray job submit --runtime-env-json \'{{"env_vars": {{"KERAS_BACKEND": "{backend}"}}}}\' ...'
        return Check("failed", f"backend {seen.backend}, but the driver has KERAS_BACKEND={backend}", remedy)
    if seen.backend == "jax":
        found += ": for training, search and scoring; import and export need TensorFlow (unset KERAS_BACKEND)"
    return Check("ok", found)


def gpus(facts: Facts, _: Expected) -> Check | None:
    """Compares the numbers of GPUs that the node, Ray and the Keras backend see."""
    seen, by_ray = facts.keras, facts.ray_gpus
    if seen is None:
        return None
    ray_gpus = "no Ray" if by_ray is None else f"Ray {by_ray:g}"
    if seen.problem:
        return Check("skipped", f"{ray_gpus}, devices {facts.gpu_devices}; Keras cannot be imported")
    found = f"{ray_gpus}, {seen.backend} {seen.gpus}, devices {facts.gpu_devices}"
    if seen.gpus < max(by_ray or 0, facts.gpu_devices):
        install = "'jax[cuda12]'" if seen.backend == "jax" else "-c constraints.txt -e '.[gpu]'"
        return Check("failed", found, f"pip install {install} for the CUDA libraries, and look at nvidia-smi")
    is_idle = by_ray is not None and seen.gpus > by_ray
    return Check(_graded(is_idle), found, f"start Ray there with --num-gpus={seen.gpus}; jobs leave the others idle")


def memory(facts: Facts, _: Expected) -> Check:
    """Checks the free memory of the machine."""
    free = facts.free_memory_bytes
    status = _graded(free < GOOD_MEMORY_BYTES, failed=free < MIN_MEMORY_BYTES)
    return Check(status, f"{_size(free)} free", f"stop other programs there, or give it {_size(GOOD_MEMORY_BYTES)}")


def disk(facts: Facts, _: Expected) -> Check:
    """Checks the disks of Ray's spilled objects, of temporary files and of a local storage."""
    found = ", ".join(f"{folder} {_size(free)} of {_size(total)} free" for folder, (total, free) in facts.disks.items())
    full = _fuller(facts, MIN_DISK_BYTES, FULL_DISK)
    nearly = full or _fuller(facts, GOOD_DISK_BYTES, NEARLY_FULL_DISK)
    remedy = f"free some space in {', '.join(nearly)}, or point TMPDIR and RAY_TMPDIR to another disk"
    return Check(_graded(bool(nearly), failed=bool(full)), found, remedy)


def _fuller(facts: Facts, min_bytes: int, max_used: float) -> list[str]:
    disks = facts.disks.items()
    return [folder for folder, (total, free) in disks if free < min_bytes or 1 - free / max(total, 1) >= max_used]


def written(facts: Facts, expected: Expected) -> Check:
    """Checks that the node can write to the storage, and sees the file that the driver wrote."""
    uri, unseen = expected.question.storage, facts.unseen.get("storage")
    if facts.storage_problem is None:
        return Check("skipped", f"{uri}: not tried, S3 cannot be reached")
    if facts.storage_problem:
        return Check("failed", facts.storage_problem, f"let this user write to {uri} there, or give another --storage")
    if unseen:
        remedy = f"give --storage s3://..., or mount one shared folder as {uri} on every node"
        return Check("failed", f"{uri}: this node does not see the file that the driver wrote: {unseen}", remedy)
    return Check("ok", f"{uri} is writable")


def weights(facts: Facts, expected: Expected) -> Check | None:
    """Checks that the node sees the weights, or has or can download the published ones."""
    url, problem = expected.question.weights_url, facts.weights_problem
    if url is None:
        return _seen("weights", facts, expected)
    file = url.rpartition("/")[2]
    if not problem:
        return Check("ok", f"{file} is in {facts.weights_folder} or can be downloaded")
    remedy = f"put the file {file} from {url} into {facts.weights_folder}, or give other --weights"
    return Check("failed", f"{file} cannot be downloaded: {problem}", remedy)


def bundle(facts: Facts, expected: Expected) -> Check | None:
    """Checks that the node sees the bundle."""
    return _seen("bundle", facts, expected)


def _seen(name: str, facts: Facts, expected: Expected) -> Check | None:
    uri, problem = expected.question.places.get(name), facts.unseen.get(name)
    if uri is None:
        return None
    if problem is None:
        return Check("skipped", f"{uri}: not tried, S3 cannot be reached")
    remedy = f"put {uri} where every node sees it (s3:// or a shared folder) and give that as --{name}"
    return Check(_graded(False, failed=bool(problem)), problem or uri, remedy)


def endpoint(s3: S3Facts, _: Facts) -> Check:
    """Checks that the S3 endpoint answers."""
    remedy = f"check AWS_ENDPOINT_URL, proxy and firewall: {s3.endpoint or 'the endpoint'} must answer"
    return Check(_graded(False, failed=bool(s3.problem)), s3.problem or s3.endpoint, remedy)


def credentials(s3: S3Facts, facts: Facts) -> Check:
    """Checks that there are credentials and that S3 accepts them."""
    if s3.credentials is None:
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, before Ray starts on that node"
        return Check("failed", "none", remedy)
    problems = [problem or "" for problem in (facts.storage_problem, *facts.unseen.values())]
    refused = [problem for problem in problems if "credentials are not accepted" in problem]
    remedy = f"renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (found by {s3.credentials})"
    return Check(_graded(False, failed=bool(refused)), (*refused, f"from {s3.credentials}")[0], remedy)


def region(s3: S3Facts, _: Facts) -> Check:
    """Checks that the configured region is that of the bucket."""
    is_other = s3.region is None or s3.region != (s3.bucket_region or s3.region)
    remedy = f"set AWS_DEFAULT_REGION={s3.bucket_region or 'us-east-1 (the region of the bucket)'}"
    return Check(_graded(is_other), f"{s3.region or 'none'}; the bucket: {s3.bucket_region or 'unknown'}", remedy)


def clock(s3: S3Facts, _: Facts) -> Check:
    """Compares the clock of the node with that of the endpoint; S3 refuses requests signed too far off."""
    if s3.skew_s is None:
        return Check("skipped", "the endpoint sent no date")
    skew_s = abs(s3.skew_s)
    found = f"{skew_s:.0f} s {'ahead of' if s3.skew_s > 0 else 'behind'} the endpoint"
    remedy = "set the clock (NTP: timedatectl set-ntp true, or chronyc makestep)"
    return Check(_graded(skew_s > LARGE_SKEW_S, failed=skew_s > MAX_SKEW_S), found, remedy)


OF_A_NODE = {
    "versions": versions,
    "keras": keras,
    "gpus": gpus,
    "memory": memory,
    "disk": disk,
    "storage": written,
    "weights": weights,
    "bundle": bundle,
}
OF_S3 = {"s3 endpoint": endpoint, "s3 credentials": credentials, "s3 region": region, "clock": clock}


def sent(sizes: Mapping[str, int], *, left_out: list[str]) -> Check:
    """Checks what `ray job submit --working-dir .` would send.

    Args:
        sizes: bytes by the name directly below the working directory.
        left_out: names of needed files and folders that exist but would not be sent.
    """
    total, largest = sum(sizes.values()), sorted(sizes, key=lambda name: -sizes[name])
    found = f"{_size(total)}: {_some([f'{name} {_size(sizes[name])}' for name in largest if sizes[name] >= MIB / 10])}"
    if left_out:
        remedy = f"make .rayignore and .gitignore keep {', '.join(left_out)}; a submitted job would not find them"
        return Check("failed", f"{found}, without {', '.join(left_out)}", remedy)
    remedy = f"list what the jobs do not need in .rayignore; Ray's limit is {_size(MAX_UPLOAD_BYTES)}"
    return Check(_graded(total > LARGE_UPLOAD_BYTES, failed=total >= MAX_UPLOAD_BYTES), found, remedy)


def _graded(warning: bool, *, failed: bool = False) -> Status:
    return "failed" if failed else "warning" if warning else "ok"


def _some(words: list[str]) -> str:
    """The first items, and the number of the others."""
    more = f" and {len(words) - MAX_SHOWN} more" if len(words) > MAX_SHOWN else ""
    return ", ".join(words[:MAX_SHOWN]) + more


def _size(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"
