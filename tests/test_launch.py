"""The launch files, without an account: cluster.yaml by Ray's and EC2's own code, jobs/rayjob.yaml by KubeRay's fields,
.rayignore by what Ray packs."""

import copy
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import botocore.session
import jsonschema  # type: ignore[import-untyped]  # no stubs
import pytest
import yaml
from botocore.validate import ParamValidator
from harness import ROOT
from ray._private.runtime_env.packaging import create_package, get_uri_for_directory
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from mnist_dist.command_line import parse
from mnist_dist.on_ray.doctor.doctor import sent_sizes
from mnist_dist.score_config import ScoreJob

MAX_BYTES = 4 * 2**20  # of what travels with a job
TRAVELS = {"mnist_dist", "jobs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
INSTANCES = {"g6.2xlarge": {"CPU": 8, "GPU": 1}, "c7i.4xlarge": {"CPU": 16}}  # as EC2 describes them
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGT]|[KMGT]i)?")
FIELDS = json.loads((ROOT / "tests" / "rayjob_fields.json").read_text())


def pinned(package: str) -> str:
    """The version that the constraints file names."""
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, package
    return found[1]


IMAGES = {f"rayproject/ray:{pinned('ray')}-py311-{platform}" for platform in ("cpu", "gpu")}


def test_the_dockerfile_is_clean_and_copies_what_the_package_is_built_of() -> None:
    """It was never built by a test: that takes a daemon."""
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for line in copied for name in line.split()} == TRAVELS


def cluster_file() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def rayjob_file() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text()))


def put(value: Any, path: str, new: Any) -> dict[str, Any]:
    """A copy of nested mappings and lists with the value at `a.0.b` replaced, or added."""
    changed = copy.deepcopy(value)
    *parents, last = (int(name) if name.isdigit() else name for name in path.split("."))
    place = changed
    for name in parents:
        place = place[name]
    place[last] = new
    return dict(changed)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a launch file is checked without a network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def accepted(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a cluster file before it asks AWS; raises as it does, and where EC2 refuses a node."""
    prepared = dict(prepare_config(copy.deepcopy(config)))
    validate_config(prepared)
    shape = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    assert shape is not None
    for name, node in prepared["available_node_types"].items():
        report = ParamValidator().validate({**node["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        if report.has_errors():
            raise ValueError(f"{name}: {report.generate_report()}")
    return prepared


def test_ray_and_ec2_accept_the_cluster_file() -> None:
    prepared = accepted(cluster_file())
    assert prepared["provider"]["type"] == "aws"
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        ("max_worker", 3, jsonschema.ValidationError, "'max_worker' was unexpected"),
        ("max_workers", "40", jsonschema.ValidationError, "'40' is not of type 'integer'"),
        ("available_node_types.gpu-spot.max_worker", 3, jsonschema.ValidationError, "'max_worker' was unexpected"),
        ("available_node_types.gpu-spot.min_workers", 99, ValueError, "smaller than the sum of `min_workers`"),
        ("docker.images", "x", jsonschema.ValidationError, "'images' was unexpected"),
        ("head_node_type", "heads", ValueError, "must be one of `available_node_types`"),
        ("available_node_types.head.node_config.InstanceTyp", "m7i.large", ValueError, "Unknown parameter"),
        ("available_node_types.head.node_config.IamInstanceProfile", "mine", ValueError, "Invalid type"),
    ],
)
def test_a_mistake_in_the_cluster_file_is_found(path: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        accepted(put(cluster_file(), path, value))


def test_the_head_runs_no_tasks_and_shows_itself_to_the_tunnel_alone() -> None:
    config = accepted(cluster_file())
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    (start,) = (command for command in config["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=" in start


def test_workers_are_spot_and_on_demand_with_and_without_a_gpu_from_none_on() -> None:
    config = accepted(cluster_file())
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    assert workers.keys() == {"gpu-spot", "gpu-on-demand", "cpu-spot", "cpu-on-demand"}
    for name, node in workers.items():
        market = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert market == ("spot" if name.endswith("spot") else None)
        assert ("GPU" in INSTANCES[node["node_config"]["InstanceType"]]) == name.startswith("gpu")
        assert node["min_workers"] == 0
        assert node["max_workers"] > 1
    assert config["idle_timeout_minutes"] > 0


def started_for(*demands: dict[str, float], running: Mapping[str, int] | None = None) -> dict[str, int]:
    """The nodes that Ray's autoscaler starts for what waits."""
    config = accepted(cluster_file())
    types = config["available_node_types"]
    for node in types.values():
        node["resources"] = {**INSTANCES.get(node["node_config"]["InstanceType"], {}), **node["resources"]}
    none_failed = NodeAvailabilitySummary(node_availabilities={})
    scorer = partial(_default_utilization_scorer, node_availability_summary=none_failed)
    there = {config["head_node_type"]: 1, **(running or {})}
    added, _ = get_nodes_for(types, there, config["head_node_type"], config["max_workers"], list(demands), scorer)
    return dict(added)


def test_the_autoscaler_starts_spot_nodes_first_and_gpus_only_for_who_asks_for_them() -> None:
    assert started_for(*[{"GPU": 1.0, "CPU": 1.0}] * 3) == {"gpu-spot": 3}
    assert started_for(*[{"CPU": 1.0}] * 20) == {"cpu-spot": 2}
    assert started_for({"CPU": 1.0}, running={"cpu-spot": 16}) == {"cpu-on-demand": 1}


def test_each_node_of_the_cluster_has_the_pinned_ray_and_the_pinned_packages() -> None:
    config = accepted(cluster_file())
    workers = [node["docker"]["worker_image"] for node in config["available_node_types"].values() if "docker" in node]
    assert {config["docker"]["image"], *workers} == IMAGES
    assert "head_image" not in config["docker"]
    install = "cd ~/mnist_dist && pip install --no-input -c constraints.txt -e '.[gpu]'"
    assert config["head_setup_commands"][0] == config["worker_setup_commands"][0] == install
    assert config["file_mounts"] == {"~/mnist_dist": "."}
    assert {".git", "runs"} <= set(config["rsync_exclude"])


def test_s3_is_reached_by_the_role_of_the_machine() -> None:
    config = accepted(cluster_file())
    for name, node in config["available_node_types"].items():
        profile = "mnist-dist-head" if name == config["head_node_type"] else "mnist-dist-worker"
        assert node["node_config"]["IamInstanceProfile"] == {"Name": profile}
    for file in ("cluster.yaml", "jobs/rayjob.yaml"):
        assert not re.search("AWS_(ACCESS|SECRET|SESSION)", (ROOT / file).read_text())


def mistakes(
    value: object, kind: str, *, at: str, fields: Mapping[str, str], required: Mapping[str, list[str]]
) -> Iterator[str]:
    """What the cluster's API would refuse: unknown names, other types, and what is missing."""
    if kind == "pod":
        inside = mistakes(value, "object", at="", fields=FIELDS["pod"], required=FIELDS["pod_required"])
        yield from (f"{at}: {mistake}" for mistake in inside)
    elif not has_type(value, kind):
        yield f"{at}: {kind} expected. Received: {value!r}"
    elif isinstance(value, dict) and kind == "object":
        yield from (f"{at}.{name} is missing".lstrip(".") for name in required.get(at, []) if name not in value)
        for name, part in value.items():
            place = f"{at}.{name}".lstrip(".")
            if place in fields:
                yield from mistakes(part, fields[place], at=place, fields=fields, required=required)
            else:
                yield f"{place} is no field"
    elif isinstance(value, list):
        for part in value:
            yield from mistakes(part, fields[f"{at}[]"], at=f"{at}[]", fields=fields, required=required)
    if value not in FIELDS["choices"].get(at, [value]):
        yield f"{at}: one of {FIELDS['choices'][at]} expected. Received: {value!r}"


def has_type(value: object, kind: str) -> bool:
    """Whether a value of YAML is what the API takes: a number is no string there, nor the other way round."""
    if kind in ("strings", "quantities"):
        return isinstance(value, dict) and all(
            isinstance(one, str) if kind == "strings" else QUANTITY.fullmatch(str(one)) for one in value.values()
        )
    numbers = {"integer": (int,), "number": (int, float), "boolean": (bool,)}
    others = {"string": (str,), "object": (dict,), "array": (list,)}
    python: tuple[type, ...] = {**numbers, **others}[kind]
    return isinstance(value, python) and (kind == "boolean" or not isinstance(value, bool))


def mistakes_of(manifest: dict[str, Any]) -> list[str]:
    return list(mistakes(manifest, "object", at="", fields=FIELDS["fields"], required=FIELDS["required"]))


def test_kuberay_knows_every_field_of_the_job() -> None:
    assert mistakes_of(rayjob_file()) == []


GPU = "spec.rayClusterSpec.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.backOffLimit", 3, "spec.backOffLimit is no field"),
        ("spec.backoffLimit", "3", "spec.backoffLimit: integer expected"),
        ("spec.backoffLimit", True, "spec.backoffLimit: integer expected"),
        ("spec.shutdownAfterJobFinishes", "true", "boolean expected"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams", {"num-cpus": 0}, "strings expected"),
        ("spec.rayClusterSpec.autoscalerOptions.upscalingMode", "Fast", "one of .*Aggressive.* expected"),
        (GPU, {"groupName": "gpu"}, "maxReplicas is missing"),
        (f"{GPU}.maxReplica", 3, "maxReplica is no field"),
        (f"{GPU}.template.spec.containers.0.resource", {}, "resource is no field"),
        (f"{GPU}.template.spec.containers.0.resources.limits", {"memory": "28 GB"}, "quantities expected"),
        (f"{GPU}.template.spec.containers", {}, "array expected"),
        (f"{GPU}.template", {"spec": {}}, r"spec\.containers is missing"),
        ("kind", "RayJobs", "one of .*RayJob.* expected"),
    ],
)
def test_a_mistake_in_the_job_is_found(path: str, value: object, message: str) -> None:
    found = mistakes_of(put(rayjob_file(), path, value))
    assert len(found) >= 1
    assert re.search(message, found[0]), found


def test_a_retry_of_the_job_is_the_same_command_and_goes_on() -> None:
    spec = rayjob_file()["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    module, *flags = spec["entrypoint"].removeprefix("python -m ").split()
    assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    _, job = parse({"score": ScoreJob}, command="score", default="score", argv=flags)
    assert job.mode == "continue"
    assert job.output == "s3://BUCKET/predictions"


def test_the_cluster_of_the_job_is_that_of_the_cluster_file() -> None:
    cluster = rayjob_file()["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    images = set()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        assert pod["serviceAccountName"] == "mnist-dist"
        assert pod["restartPolicy"] == "Never"  # what Ray's autoscaler asks for
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (group.get("groupName") == "gpu")
    assert images == IMAGES
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups.keys() == {"gpu", "cpu"}
    for group in groups.values():
        assert group["minReplicas"] == 0
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert groups["gpu"]["replicas"] > 0  # a job takes what is there when it begins


def test_ray_accepts_the_environment_of_the_job_and_it_is_that_of_the_constraints() -> None:
    text = rayjob_file()["spec"]["runtimeEnvYAML"]
    environment = RuntimeEnv(**yaml.safe_load(text))
    assert environment["working_dir"] == "s3://BUCKET/mnist_dist.zip"
    folder = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"
    assert environment["pip"]["packages"] == [f"--constraint {folder}/constraints.txt", f"{folder}[gpu]"]
    assert environment["config"]["setup_timeout_seconds"] >= 600
    with pytest.raises(ValueError, match="can only have these fields"):
        RuntimeEnv(**yaml.safe_load(text.replace("packages:", "package:")))


def packed(folder: Path, scratch: Path) -> tuple[set[str], int]:
    """The names that `ray job submit --working-dir` sends of a folder, and the bytes of the archive."""
    uri = get_uri_for_directory(str(folder), include_gitignore=True)
    archive = scratch / uri.rpartition("/")[2]
    create_package(str(folder), archive, include_gitignore=True)
    with zipfile.ZipFile(archive) as content:
        return {name.rstrip("/") for name in content.namelist()}, archive.stat().st_size


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project, and beside it what gathers in a checkout."""
    folder = tmp_path / "checkout"
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a file in a worktree
    ours = [*files, ROOT / "tests", ROOT / "jobs", ROOT / "mnist_dist"]
    for path in ours:
        folder.mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    rubbish = (
        "runs/mine/checkpoint.keras",
        ".git/objects/ab/cd",
        ".venv-ci/lib/x.so",
        "my data/1.jpg",
        "vgg16.h5",
        "x",
    )
    caches = (".mypy_cache/a.json", "mnist_dist/data/__pycache__/images.pyc", "mnist_dist.egg-info/PKG-INFO")
    for name in rubbish + caches:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(MAX_BYTES))
    (folder / "predictions" / "_work").mkdir(parents=True)
    return folder


def test_what_travels_with_a_job_is_the_project_and_below_4_mib(checkout: Path, tmp_path: Path) -> None:
    names, size_bytes = packed(checkout, tmp_path)
    assert size_bytes < MAX_BYTES
    assert {name.split("/")[0] for name in names} == TRAVELS
    needed = {
        str(path.relative_to(ROOT))
        for folder in ("mnist_dist", "jobs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if "/" in name} == needed
    sizes = sent_sizes(checkout)  # as doctor counts them
    assert sizes.keys() == TRAVELS
    assert sum(sizes.values()) == sum((checkout / name).stat().st_size for name in names if (checkout / name).is_file())
    assert "mnist_dist/evaluation/report.html.j2" in names


def test_without_the_list_of_what_travels_the_rubbish_would_go(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".rayignore").unlink()
    names, size_bytes = packed(checkout, tmp_path)
    assert {"my data/1.jpg", "vgg16.h5", "x", "tests/test_launch.py"} <= names
    assert size_bytes > 0
