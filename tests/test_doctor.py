"""doctor: the checks on made-up facts, the facts on a real machine, and both as the real command."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray
from harness import ROOT, Recorder, run_command
from ray.cluster_utils import Cluster

from mnist_dist.console import Stop
from mnist_dist.doctor_config import DoctorJob
from mnist_dist.errors import ConfigError
from mnist_dist.on_ray.cluster import connected
from mnist_dist.on_ray.doctor import checks as doctor_checks
from mnist_dist.on_ray.doctor import doctor
from mnist_dist.on_ray.doctor.checks import GIB, MIB, Check, Expected, Pins, node_checks, read_pins
from mnist_dist.on_ray.doctor.facts import Facts, KerasFacts, Question, S3Facts, gather
from mnist_dist.session import Session
from mnist_dist.store.anywhere import ANYWHERE

INSTALLED = {"ray": "2.60.0", "tensorflow": "2.21.0", "keras": "3.15.1", "numpy": "2.4.6"}
PINS = Pins(versions={**INSTALLED, "mypy": "2.4.1"}, needed=tuple(INSTALLED))
KERAS = KerasFacts(backend="tensorflow", image_data_format="channels_last", floatx="float32")
S3 = S3Facts(endpoint="http://s3", region="eu-west-1", bucket_region="eu-west-1", credentials="env", skew_s=1.0)
HEALTHY = Facts(
    versions=INSTALLED,
    keras_backend="",
    storage_problem="",
    unseen={"storage": ""},
    s3=None,
    free_memory_bytes=11 * GIB,
    disks={"/tmp": (100 * GIB, 50 * GIB)},
    gpu_devices=0,
    weights_folder="/home/a/.keras/models",
    weights_problem=None,
    keras=KERAS,
    ray_gpus=0,
)
QUESTION = Question(packages=("ray",), storage="/shared/runs")
URL = "https://host/vgg16/vgg16_notop.h5"


def checks_of(
    answer: Facts | str, *, question: Question = QUESTION, driver: Facts = HEALTHY, pins: Pins = PINS
) -> dict[str, Check]:
    expected = Expected(question=question, driver=driver, pins=pins)
    return {check.name: check for check in node_checks("10.0.0.2", answer, expected)}


def bad(found: dict[str, Check]) -> list[Check]:
    return [check for check in found.values() if check.status in ("warning", "failed")]


# --- made-up facts ---------------------------------------------------------------------------------------------------


def test_a_healthy_node_has_nothing_to_be_done() -> None:
    found = checks_of(replace(HEALTHY, s3=S3))
    assert list(found) == ["versions", "keras", "gpus", "memory", "disk", "storage", *doctor_checks.OF_S3]
    assert {(check.status, check.remedy, check.node) for check in found.values()} == {("ok", "", "10.0.0.2")}


def without(name: str) -> dict[str, str]:
    return {other: version for other, version in INSTALLED.items() if other != name}


def keras_problem(problem: str) -> dict[str, Any]:
    return {"keras": KerasFacts(problem=problem)}


@pytest.mark.parametrize(
    ("name", "changes", "status", "found", "remedy"),
    [
        ("versions", {"versions": {**INSTALLED, "keras": "3.14.0"}}, "failed", "keras 3.14.0", "install keras==3.15.1"),
        ("versions", {"versions": {**INSTALLED, "keras": "3.15.2"}}, "failed", "keras 3.15.2", "keras==3.15.1"),
        ("versions", {"versions": {**INSTALLED, "numpy": "2.4.5"}}, "warning", "numpy 2.4.5", "-c constraints.txt"),
        ("versions", {"versions": {**INSTALLED, "mypy": "2.4.0"}}, "warning", "pinned: 2.4.1", "-c constraints.txt"),
        ("versions", {"versions": without("numpy")}, "failed", "numpy missing", "pip install numpy==2.4.6"),
        ("keras", {"keras": replace(KERAS, image_data_format="channels_first")}, "failed", "_first", "keras.json"),
        ("keras", {"keras": replace(KERAS, backend="torch")}, "failed", "backend torch", "tensorflow or jax"),
        ("keras", keras_problem("SIGILL: no message"), "failed", "SIGILL", "AVX"),
        ("keras", keras_problem("exit 1: no such file"), "failed", "no such", "python -c 'import keras'"),
        ("keras", keras_problem("exit 1: ModuleNotFoundError: No module named 'jax'"), "failed", "jax", "install jax"),
        ("memory", {"free_memory_bytes": 300 * MIB}, "failed", "300.0 MiB free", "2.0 GiB"),
        ("memory", {"free_memory_bytes": 1500 * MIB}, "warning", "1.5 GiB free", "2.0 GiB"),
        ("disk", {"disks": {"/a": (90 * GIB, 50 * GIB), "/b": (90 * GIB, GIB)}}, "failed", "/a 50.0", "in /b,"),
        ("disk", {"disks": {"/a": (4000 * GIB, 160 * GIB)}}, "failed", "/a", "RAY_TMPDIR"),  # Ray looks at the share
        ("disk", {"disks": {"/a": (90 * GIB, 8 * GIB)}}, "warning", "/a", "in /a"),
        ("storage", {"storage_problem": "Permission denied"}, "failed", "Permission", "write to /shared/runs"),
        ("storage", {"unseen": {"storage": "nothing there"}}, "failed", "does not see", "mount one shared folder"),
        ("clock", {"s3": replace(S3, skew_s=-1200.0)}, "failed", "1200 s behind", "set the clock"),
        ("clock", {"s3": replace(S3, skew_s=200.0)}, "warning", "200 s ahead of", "set the clock"),
        ("s3 region", {"s3": replace(S3, region="us-east-1")}, "warning", "us-east-1", "REGION=eu-west-1"),
        ("s3 region", {"s3": replace(S3, region=None)}, "warning", "none", "AWS_DEFAULT_REGION"),
        ("s3 credentials", {"s3": replace(S3, credentials=None)}, "failed", "none", "AWS_ACCESS_KEY_ID"),
        ("s3 endpoint", {"s3": replace(S3, problem="timed out")}, "failed", "timed out", "http://s3"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_node(name: str, changes: dict[str, Any], status: str, found: str, remedy: str) -> None:
    (check,) = bad(checks_of(replace(HEALTHY, **changes)))
    assert (check.name, check.status) == (name, status)
    assert found in check.found
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("devices", "by_ray", "seen", "status", "remedy"),
    [
        (2, 2, 2, "ok", ""),
        (2, 2, 1, "failed", "-e '.[gpu]'"),
        (2, 0, 2, "warning", "--num-gpus=2"),
    ],
)
def test_gpus_that_ray_and_keras_see_differently(
    devices: int, by_ray: int, seen: int, status: str, remedy: str
) -> None:
    check = checks_of(replace(HEALTHY, gpu_devices=devices, ray_gpus=by_ray, keras=replace(KERAS, gpus=seen)))["gpus"]
    assert (check.status, check.found) == (status, f"Ray {by_ray}, tensorflow {seen}, devices {devices}")
    assert remedy in check.remedy


def test_the_package_for_gpus_stands_for_the_one_that_it_replaces() -> None:
    pins = Pins(versions={}, needed=(*INSTALLED, "onnxruntime"))
    with_gpu = replace(HEALTHY, versions={**INSTALLED, "onnxruntime-gpu": "1.24.0"})
    assert checks_of(with_gpu, pins=pins)["versions"].status == "ok"
    assert checks_of(HEALTHY, pins=pins)["versions"].found == "onnxruntime missing"


def test_jax_is_for_scoring_and_is_what_driver_and_node_agree_on() -> None:
    jax = replace(HEALTHY, keras_backend="jax", keras=replace(KERAS, backend="jax"))
    check = checks_of(jax, driver=jax)["keras"]
    assert check.status == "ok"
    assert "for training, search and scoring; import and export need TensorFlow" in check.found
    check = checks_of(HEALTHY, driver=jax)["keras"]
    assert (check.status, "the driver has KERAS_BACKEND=jax" in check.found) == ("failed", True)
    assert '{"env_vars": {"KERAS_BACKEND": "jax"}}' in check.remedy


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [("no answer within 30 s", "look at Ray's logs"), ("ModuleNotFoundError: No module named 'x'", "--working-dir .")],
)
def test_a_node_without_facts_is_a_failed_check(problem: str, remedy: str) -> None:
    (check,) = checks_of(problem).values()
    assert (check.name, check.status, check.found) == ("node", "failed", problem)
    assert remedy in check.remedy


def test_weights_that_a_node_neither_has_nor_can_download() -> None:
    question = replace(QUESTION, weights_url=URL)
    assert checks_of(replace(HEALTHY, weights_problem=""), question=question)["weights"].status == "ok"
    (check,) = bad(checks_of(replace(HEALTHY, weights_problem="URLError: no network"), question=question))
    assert (check.name, check.status) == ("weights", "failed")
    assert f"put the file vgg16_notop.h5 from {URL} into /home/a/.keras/models" in check.remedy


@pytest.mark.parametrize("name", ["weights", "bundle"])
def test_a_place_that_a_node_does_not_see(name: str) -> None:
    question = replace(QUESTION, places={name: "/shared/a"})
    for problem, status in {"": "ok", "nothing there": "failed", None: "skipped"}.items():
        check = checks_of(replace(HEALTHY, unseen={name: problem}), question=question)[name]
        assert (check.status, "put /shared/a where" in check.remedy) == (status, status == "failed")


def test_wrong_usage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights for cnn must be none"):
        doctor.examine(DoctorJob(storage=str(tmp_path), weights="imagenet"), console=Recorder())


def test_two_nodes_need_the_flag_of_a_shared_folder() -> None:
    job = DoctorJob(storage="/shared/runs")
    assert "--storage-is-shared" in doctor.storage_for(job, nodes=2).remedy
    assert doctor.storage_for(replace(job, storage_is_shared=True), nodes=2).status == "ok"


def test_a_failed_check_is_shown_with_its_remedy_below_it() -> None:
    line, remedy = doctor.lines_of(Check("failed", "1.0 GiB free", "make room", "disk", "10.0.0.2"))
    assert line.startswith("XX  disk")
    assert line.endswith("1.0 GiB free")
    assert remedy.strip() == "do: make room"


# --- the working directory -------------------------------------------------------------------------------------------


def write_sparse(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size_bytes)


@pytest.mark.parametrize(("size_mib", "status"), [(1, "ok"), (90, "warning"), (700, "failed")])
def test_a_working_dir_that_is_too_large(tmp_path: Path, size_mib: int, status: str) -> None:
    write_sparse(tmp_path / "photos" / "all.tar", size_mib * MIB)
    check = doctor.working_dir(tmp_path)
    assert check.status == status
    assert f"photos {size_mib}.0 MiB" in check.found
    (tmp_path / ".rayignore").write_text("photos/\n")
    write_sparse(tmp_path / ".git" / "pack", 700 * MIB)  # left out by Ray itself
    assert doctor.working_dir(tmp_path).status == "ok"


def test_a_rayignore_that_leaves_out_the_package_itself(tmp_path: Path) -> None:
    for name in ("jobs", "mnist_dist"):
        write_sparse(tmp_path / name / "a.py", 3)
    (tmp_path / ".rayignore").write_text("mnist*\n")
    check = doctor.working_dir(tmp_path)
    assert (check.status, "without mnist_dist" in check.found) == ("failed", True)
    assert "make .rayignore and .gitignore keep mnist_dist" in check.remedy


# --- real facts ------------------------------------------------------------------------------------------------------


def test_pins_are_those_of_the_project(tmp_path: Path) -> None:
    pins = read_pins(ROOT)
    assert pins.versions["keras"].startswith("3.")
    assert {"ray", "tensorflow", "opencv-python-headless", "boto3"} <= set(pins.needed) <= set(pins.versions)
    found = checks_of(HEALTHY, pins=read_pins(tmp_path))["versions"]
    assert (found.status, "no constraints.txt" in found.found) == ("ok", True)


def test_places_and_a_storage_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    question = replace(QUESTION, storage=str(tmp_path / "file" / "runs"), places={"weights": "/no", "bundle": "/tmp"})
    facts = gather(question, with_keras=False)
    assert facts.storage_problem
    assert "nothing there" in (facts.unseen["weights"] or "")
    assert facts.free_memory_bytes > 0
    assert facts.keras is None


def test_weights_in_the_cache_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    question = replace(QUESTION, storage=str(tmp_path), weights_url="http://127.0.0.1:9/vgg16/w.h5")
    assert "refused" in (gather(question, with_keras=False).weights_problem or "")
    write_sparse(tmp_path / "models" / "w.h5", 7)
    assert gather(question, with_keras=False).weights_problem == ""


# --- S3 --------------------------------------------------------------------------------------------------------------


def s3_checks(prefix: str) -> dict[str, Check]:
    question = replace(QUESTION, storage=prefix)
    found = checks_of(gather(question, with_keras=False), question=question)
    return {name: found[name] for name in ("storage", *doctor_checks.OF_S3)}


def test_an_s3_that_works(s3: str) -> None:
    found = s3_checks(s3)
    assert {name: check.status for name, check in found.items()} == dict.fromkeys(found, "ok")
    assert list(ANYWHERE.list_entries(s3)) == []


def test_wrong_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    ANYWHERE.forget_clients()
    try:
        found = s3_checks(s3)
    finally:
        ANYWHERE.forget_clients()
    assert {name for name, check in found.items() if check.status == "failed"} == {"storage", "s3 credentials"}
    assert "AWS_ACCESS_KEY_ID" in found["s3 credentials"].remedy
    assert "somebody-else" not in str(found)


class TwentyMinutesAhead(BaseHTTPRequestHandler):
    """An endpoint whose clock is not ours; it refuses everything."""

    def do_HEAD(self) -> None:
        self.send_response_only(403)
        self.send_header("Date", format_datetime(datetime.now(UTC) + timedelta(minutes=20), usegmt=True))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def foreign_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), TwentyMinutesAhead)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    settings = {"AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in {**settings, "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    yield url
    server.shutdown()
    server.server_close()


def test_a_clock_twenty_minutes_behind_the_endpoint(foreign_endpoint: str) -> None:
    found = s3_checks("s3://bucket/runs")
    assert found["clock"].found in ("1200 s behind the endpoint", "1199 s behind the endpoint")
    assert {name: check.status for name, check in found.items()} == {
        **{"storage": "skipped", "s3 endpoint": "ok", "s3 credentials": "failed", "s3 region": "warning"},
        "clock": "failed",
    }


def test_an_endpoint_that_does_not_answer(foreign_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    found = s3_checks("s3://bucket/runs")
    assert (found["s3 endpoint"].status, found["storage"].status) == ("failed", "skipped")
    assert "http://127.0.0.1:9" in found["s3 endpoint"].remedy


# --- the command -----------------------------------------------------------------------------------------------------


def run(*flags: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    return run_command("jobs.doctor", *flags, "--json", **environment)


def statuses(result: dict[str, Any], name: str) -> dict[str, str]:
    return {check["node"]: check["status"] for check in result["checks"] if check["name"] == name}


def test_a_healthy_machine_ends_with_0_also_where_keras_runs_on_jax(tmp_path: Path) -> None:
    code, result, err = run("--storage", str(tmp_path / "runs"), KERAS_BACKEND="jax")
    assert (code, result["failed"]) == (0, 0), err
    assert result["job"] == "doctor"
    assert list(statuses(result, "keras").values()) == ["ok"]
    assert "import and export need TensorFlow" in err
    assert err.splitlines()[-1].endswith(f"{result['skipped']} skipped")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_a_broken_machine_without_its_ray_ends_with_1_and_is_looked_at_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    flags = ["--storage", str(tmp_path / "file" / "runs"), "--backbone", "vgg16", "--weights", "imagenet"]
    offline = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    code, result, err = run(*flags, RAY_ADDRESS="127.0.0.1:1", KERAS_HOME=str(tmp_path), **offline)
    assert code == 1, err
    assert result["error_type"] == "ChecksFailed"
    failed = {check["name"]: check["remedy"] for check in result["checks"] if check["status"] == "failed"}
    assert failed.keys() == {"ray", "storage", "weights"}
    assert "unset RAY_ADDRESS" in failed["ray"]
    assert flags[1] in failed["storage"]
    assert f"into {tmp_path / 'models'}" in failed["weights"]
    assert statuses(result, "keras") == {"driver": "ok"}
    assert all(remedy in err for remedy in failed.values())


@pytest.mark.slow
def test_nodes_that_hang_or_lack_the_package_are_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    of_driver_alone = ModuleType("of_driver_alone")
    exec("def gather(): return 1", of_driver_alone.__dict__)
    monkeypatch.setitem(sys.modules, "of_driver_alone", of_driver_alone)
    console = Recorder()
    with connected(verbose=False), Stop(console) as stop:
        tasks = {
            "hangs": ray.remote(num_cpus=0)(lambda: time.sleep(600)).remote(),
            "lacks": ray.remote(num_cpus=0)(of_driver_alone.gather).remote(),
        }
        answers = doctor.collect(tasks, Session(console=console, stop=stop), timeout_s=20)
    assert answers["hangs"] == "no answer within 20 s"
    assert "ModuleNotFoundError: No module named 'of_driver_alone'" in str(answers["lacks"])


@pytest.mark.slow
def test_every_node_of_a_cluster_reaches_s3_also_its_head_without_cpus(s3: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        code, result, err = run("--storage", s3, RAY_ADDRESS=cluster.address)
    finally:
        cluster.shutdown()
    assert code == 0, err
    for name in ("versions", "keras", "storage", "s3 credentials", "clock", "disk"):
        found = statuses(result, name)
        assert len(found.keys() - {"driver", "all"}) == 2, name
        assert set(found.values()) == {"ok"}, name
    assert list(ANYWHERE.list_entries(s3)) == []
