"""doctor: a healthy set-up, each broken one with the remedy that names the thing, and both as a real command."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Recorder, run_command, write_spread_bundle
from PIL import Image
from ray import cloudpickle
from ray.cluster_utils import Cluster

from mnist_dist import storage
from mnist_dist.doctor_config import DoctorJob
from mnist_dist.errors import ConfigError
from mnist_dist.on_ray.cluster import SUBMISSION_VARIABLE, connected
from mnist_dist.on_ray.doctor import checks as doctor_checks
from mnist_dist.on_ray.doctor import doctor
from mnist_dist.on_ray.doctor import facts as doctor_facts
from mnist_dist.on_ray.doctor.checks import GIB, MIB, Answer, Check, Pins, read_pins
from mnist_dist.on_ray.doctor.facts import Facts, Question, S3Facts, TensorFlowFacts, WeightsFacts

PINS = Pins(
    versions={"ray": "2.60.0", "tensorflow": "2.21.0", "keras": "3.15.1", "numpy": "2.4.6", "mypy": "2.4.1"},
    needed=("ray", "tensorflow", "keras", "numpy"),
)
INSTALLED = {"ray": "2.60.0", "tensorflow": "2.21.0", "keras": "3.15.1", "numpy": "2.4.6"}
HEALTHY = Facts(
    python="3.11.7",
    versions=INSTALLED,
    variables={},
    package_problem="",
    cpu_model="A CPU",
    cpu_flags=("avx", "avx2", "avx512f", "avx512_bf16"),
    cpus=7,
    memory_free_bytes=11 * GIB,
    shared_memory_bytes=9 * GIB,
    disks={"/tmp": (100 * GIB, 50 * GIB)},
    gpu_devices=0,
    storage_problem="",
    places={},
)
SEEN = TensorFlowFacts(
    tensorflow="2.21.0", keras="3.15.1", backend="tensorflow", image_data_format="channels_last", floatx="float32"
)
NODE = Answer(node="10.0.0.2", facts=HEALTHY, tensorflow=SEEN, ray_gpus=0, object_store_bytes=5.0 * GIB, read_back="")
DRIVER = Answer(node="driver", facts=HEALTHY, read_back="")
QUESTION = Question(packages=("ray",), storage="/shared/runs", probe="")
JOB = DoctorJob(storage="/shared/runs", storage_is_shared=True)


@pytest.fixture(autouse=True)
def _not_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUBMISSION_VARIABLE, raising=False)


def checks_of(*nodes: Answer, job: DoctorJob = JOB, question: Question = QUESTION) -> list[Check]:
    return list(doctor.checks_of([DRIVER, *nodes], job=job, question=question, pins=PINS))


def bad(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.status in ("warning", "failed")]


def only(checks: list[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def with_facts(**changes: Any) -> Answer:
    return replace(NODE, facts=replace(HEALTHY, **changes))


# --- made-up facts ---------------------------------------------------------------------------------------------------


def test_a_healthy_cluster_has_nothing_to_be_done() -> None:
    checks = checks_of(NODE, replace(NODE, node="10.0.0.3"))
    assert bad(checks) == []
    assert all(check.remedy == "" for check in checks)
    assert {check.name for check in checks if check.node == "10.0.0.3"} == {
        *("package", "versions", "tf.keras", "tensorflow", "gpus", "cpu", "memory", "disk", "object store", "storage")
    }
    skipped = [check for check in checks if check.status == "skipped"]
    assert [check.name for check in skipped] == [*doctor_checks.S3_CHECKS, "weights", "bundle"]
    assert all(check.found for check in skipped)


@pytest.mark.parametrize(
    ("versions", "status", "remedy"),
    [
        ({"keras": "3.14.0"}, "failed", "on 10.0.0.2: pip install keras==3.15.1"),
        ({"keras": "3.15.2"}, "failed", "keras==3.15.1"),  # not the driver's
        ({"tensorflow": "2.20.0", "ray": "2.59.0"}, "failed", "ray==2.60.0 tensorflow==2.21.0"),
        ({"numpy": "2.4.5"}, "warning", "pip install -c constraints.txt"),
        ({"mypy": "2.4.0"}, "warning", "pip install -c constraints.txt"),
    ],
)
def test_a_node_with_other_versions(versions: dict[str, str], status: str, remedy: str) -> None:
    (check,) = bad(checks_of(NODE, replace(with_facts(versions={**INSTALLED, **versions}), node="10.0.0.2")))
    assert (check.name, check.node, check.status) == ("versions", "10.0.0.2", status)
    assert all(f"{name} {version}" in check.found for name, version in versions.items())
    assert remedy in check.remedy


def test_a_package_that_is_missing_is_named() -> None:
    (check,) = bad(checks_of(with_facts(versions={name: v for name, v in INSTALLED.items() if name != "numpy"})))
    assert (check.status, check.found) == ("failed", "numpy missing")
    assert "pip install numpy==2.4.6" in check.remedy


def test_another_python_than_the_drivers() -> None:
    (check,) = bad(checks_of(with_facts(python="3.12.1")))
    assert (check.status, check.found) == ("failed", "Python 3.12.1")
    assert "Python 3.11.7" in check.remedy


@pytest.mark.parametrize(
    ("changes", "status", "remedy"),
    [
        ({"variables": {"TF_USE_LEGACY_KERAS": "1"}}, "failed", "unset TF_USE_LEGACY_KERAS on 10.0.0.2"),
        ({"variables": {"KERAS_BACKEND": "jax"}}, "failed", "unset KERAS_BACKEND on 10.0.0.2"),
        ({"versions": {**INSTALLED, "tf-keras": "2.20.0"}}, "warning", "pip uninstall tf_keras"),
    ],
)
def test_what_turns_keras_3_into_something_else(changes: dict[str, Any], status: str, remedy: str) -> None:
    (check,) = bad(checks_of(with_facts(**changes)))
    assert (check.name, check.status) == ("tf.keras", status)
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("seen", "found", "remedy"),
    [
        (TensorFlowFacts(problem="SIGILL: no message"), "SIGILL", "python -c 'import tensorflow, keras'"),
        (replace(SEEN, image_data_format="channels_first"), "channels_first", "delete keras.json"),
    ],
)
def test_a_tensorflow_that_does_not_start_or_is_set_up_otherwise(
    seen: TensorFlowFacts, found: str, remedy: str
) -> None:
    (check,) = bad(checks_of(replace(NODE, tensorflow=seen)))
    assert (check.name, check.status) == ("tensorflow", "failed")
    assert found in check.found
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("devices", "by_ray", "seen", "status", "remedy"),
    [
        (2, 2, replace(SEEN, gpus=2, with_cuda=True), "ok", ""),
        (2, 2, replace(SEEN, gpus=0, with_cuda=False), "failed", "built without CUDA: pip install"),
        (2, 2, replace(SEEN, gpus=1, with_cuda=True), "failed", "does not load its CUDA libraries"),
        (2, 0, replace(SEEN, gpus=2, with_cuda=True), "warning", "--num-gpus=2"),
    ],
)
def test_gpus_that_ray_and_tensorflow_see_differently(
    devices: int, by_ray: int, seen: TensorFlowFacts, status: str, remedy: str
) -> None:
    node = replace(with_facts(gpu_devices=devices), tensorflow=seen, ray_gpus=by_ray)
    check = only([check for check in checks_of(node) if check.node == node.node], "gpus")
    assert check.status == status
    assert remedy in check.remedy
    assert check.found == f"Ray {by_ray}, TensorFlow {seen.gpus}, devices {devices}"


@pytest.mark.parametrize(
    ("name", "changes", "status", "remedy"),
    [
        ("cpu", {"cpu_flags": ("sse4_2",)}, "failed", "AVX"),
        ("memory", {"memory_free_bytes": 300 * MIB}, "failed", "memory"),
        ("memory", {"memory_free_bytes": 1500 * MIB}, "warning", "memory"),
        ("disk", {"disks": {"/a": (90 * GIB, 50 * GIB), "/b": (90 * GIB, GIB)}}, "failed", "below /b on 10.0.0.2"),
        ("disk", {"disks": {"/a": (4000 * GIB, 160 * GIB)}}, "failed", "RAY_TMPDIR"),  # Ray looks at the share
        ("disk", {"disks": {"/a": (90 * GIB, 8 * GIB)}}, "warning", "below /a"),
        ("object store", {"shared_memory_bytes": 64 * MIB}, "warning", "--shm-size=5.5Gb"),
        ("package", {"package_problem": "ModuleNotFoundError: x", "storage_problem": None}, "failed", "--working-dir"),
    ],
)
def test_what_a_node_lacks(name: str, changes: dict[str, Any], status: str, remedy: str) -> None:
    (check,) = bad(checks_of(with_facts(**changes)))
    assert (check.name, check.node, check.status) == (name, "10.0.0.2", status)
    assert remedy in check.remedy


def test_bfloat16_that_is_slow_is_said_and_breaks_nothing() -> None:
    checks = checks_of(with_facts(cpu_flags=("avx", "avx2", "avx512f")))
    assert bad(checks) == []
    assert "AVX512-BF16 no" in only(checks, "cpu").found
    assert "--precision float32" in only(checks, "cpu").found


def test_a_silent_node_is_a_failed_check_and_the_others_are_shown() -> None:
    checks = checks_of(Answer(node="10.0.0.9", problem="no answer within 30 s"), NODE)
    (check,) = bad(checks)
    assert (check.name, check.node, check.found) == ("node", "10.0.0.9", "no answer within 30 s")
    assert "10.0.0.9" in check.remedy
    assert any(check.node == NODE.node for check in checks)


def test_a_storage_that_a_node_cannot_write() -> None:
    (check,) = bad(checks_of(with_facts(storage_problem="PermissionError: [Errno 13] Permission denied")))
    assert (check.name, check.node, check.status) == ("storage", "10.0.0.2", "failed")
    assert "Permission denied" in check.found
    assert "/shared/runs on 10.0.0.2" in check.remedy


def test_a_folder_that_is_not_shared_is_told_by_the_probe(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "on-the-other-node" / "probe")
    node = doctor.with_read_back(replace(NODE, read_back=None), probe=elsewhere)
    (check,) = bad(checks_of(node))
    assert (check.name, check.node, check.status) == ("storage", "10.0.0.2", "failed")
    assert "written, but the driver cannot read it" in check.found
    assert "mount one shared folder as /shared/runs on every node" in check.remedy


def test_a_probe_that_is_read_back_is_deleted(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_text(str(probe))
    assert doctor.with_read_back(NODE, probe=str(probe)).read_back == ""
    assert not probe.exists()


def test_two_nodes_need_the_flag_of_a_shared_folder() -> None:
    checks = checks_of(NODE, replace(NODE, node="10.0.0.3"), job=replace(JOB, storage_is_shared=False))
    (check,) = bad(checks)
    assert (check.name, check.node, check.status) == ("storage", "all", "failed")
    assert "--storage-is-shared" in check.remedy


@pytest.mark.parametrize(
    ("skew_s", "status"), [(1.0, "ok"), (-1200.0, "failed"), (1200.0, "failed"), (200.0, "warning"), (None, "skipped")]
)
def test_a_clock_that_is_off(skew_s: float | None, status: str) -> None:
    check = doctor_checks.clock("10.0.0.2", skew_s)
    assert check.status == status
    assert ("set the clock of 10.0.0.2" in check.remedy) == (status in ("failed", "warning"))


@pytest.mark.parametrize(
    ("asked", "status", "remedy"),
    [
        (S3Facts(region="eu-west-1", bucket_region="eu-west-1", credentials="env", skew_s=0), "ok", ""),
        (S3Facts(region="us-east-1", bucket_region="eu-west-1", credentials="env", skew_s=0), "warning", "=eu-west-1"),
        (S3Facts(bucket_region=None, credentials="env", skew_s=0), "warning", "AWS_DEFAULT_REGION"),
    ],
)
def test_a_region_that_is_not_the_buckets(asked: S3Facts, status: str, remedy: str) -> None:
    check = only(list(doctor_checks.s3("10.0.0.2", replace(HEALTHY, s3=asked))), "s3 region")
    assert check.status == status
    assert remedy in check.remedy


def test_weights_that_a_node_neither_has_nor_can_download() -> None:
    url = "https://host/vgg16/vgg16_notop.h5"
    missing = WeightsFacts(folder="/home/a/.keras/models", there=False, problem="URLError: no network")
    nodes = (with_facts(weights=missing), replace(with_facts(weights=replace(missing, there=True)), node="10.0.0.3"))
    job = DoctorJob(storage="/shared/runs", storage_is_shared=True, weights="imagenet", backbone="vgg16")
    (check,) = bad(checks_of(*nodes, job=job, question=replace(QUESTION, weights_url=url)))
    assert (check.name, check.node, check.status) == ("weights", "10.0.0.2", "failed")
    assert f"put the file vgg16_notop.h5 from {url} into /home/a/.keras/models on 10.0.0.2" in check.remedy


def test_a_file_of_weights_that_a_node_does_not_see() -> None:
    job = replace(JOB, weights="/shared/a.weights.h5")
    driver = replace(DRIVER, facts=replace(HEALTHY, places={job.weights: ""}))
    node = with_facts(places={job.weights: "FileNotFoundError: nothing there"})
    (check,) = bad(list(doctor.checks_of([driver, node], job=job, question=QUESTION, pins=PINS)))
    assert (check.name, check.node, check.status) == ("weights", "10.0.0.2", "failed")
    assert "/shared/a.weights.h5" in check.remedy


def test_weights_that_a_backbone_does_not_have_are_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights for cnn are none"):
        doctor.examine(DoctorJob(storage=str(tmp_path), weights="imagenet"), console=Recorder())


def test_nodes_of_one_machine_are_told_apart() -> None:
    labels = doctor.node_labels({"aaaaaaaa1": "10.0.0.1", "bbbbbbbb1": "10.0.0.2", "cccccccc1": "10.0.0.2"})
    assert list(labels.values()) == ["10.0.0.1", "10.0.0.2/bbbbbb", "10.0.0.2/cccccc"]


def test_a_failed_check_is_shown_with_its_remedy_below_it() -> None:
    check = Check(name="disk", node="10.0.0.2", status="failed", found="1.0 GiB free", remedy="make room")
    line, remedy = doctor.lines_of(check)
    assert line.startswith("XX  disk")
    assert line.endswith("1.0 GiB free")
    assert remedy.strip() == "do: make room"


# --- the working directory, by Ray's own code ------------------------------------------------------------------------


def write_sparse(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size_bytes)


@pytest.mark.parametrize(("size_mib", "status"), [(1, "ok"), (90, "warning"), (700, "failed")])
def test_a_working_dir_that_is_too_large(tmp_path: Path, size_mib: int, status: str) -> None:
    write_sparse(tmp_path / "photos" / "all.tar", size_mib * MIB)
    (tmp_path / "job.py").write_text("1")
    check = doctor.check_working_dir(tmp_path)
    assert check.status == status
    assert f"{size_mib}.0 MiB" in check.found
    if status != "ok":
        assert ".rayignore (photos, job.py)" in check.remedy


def test_what_rayignore_leaves_out_is_not_counted(tmp_path: Path) -> None:
    write_sparse(tmp_path / "photos" / "all.tar", 700 * MIB)
    write_sparse(tmp_path / ".git" / "pack", 700 * MIB)  # left out by Ray itself
    (tmp_path / ".rayignore").write_text("photos/\n")
    assert doctor.check_working_dir(tmp_path).status == "ok"


def test_a_rayignore_that_leaves_out_the_package_itself(tmp_path: Path) -> None:
    for name in ("jobs", "mnist_dist"):
        write_sparse(tmp_path / name / "a.py", 3)
    (tmp_path / ".rayignore").write_text("mnist*\n")
    check = doctor.check_working_dir(tmp_path)
    assert (check.status, "mnist_dist" in check.found) == ("failed", True)
    assert "let .rayignore and .gitignore keep mnist_dist" in check.remedy


def test_ray_packs_what_this_project_needs_and_no_more() -> None:
    assert doctor.check_working_dir(ROOT).status == "ok"


# --- real facts ------------------------------------------------------------------------------------------------------


def test_pins_are_those_of_the_project() -> None:
    pins = read_pins(ROOT)
    assert pins is not None
    assert pins.versions["keras"].startswith("3.")
    assert {"ray", "tensorflow", "opencv-python-headless", "boto3"} <= set(pins.needed)
    assert {name for name in pins.needed if name not in pins.versions} == set()


def test_without_constraints_versions_are_not_judged(tmp_path: Path) -> None:
    assert read_pins(tmp_path) is None
    check = doctor_checks.versions("driver", HEALTHY, driver=HEALTHY, pins=None)
    assert (check.status, "no constraints.txt" in check.found) == ("skipped", True)


def test_facts_cross_a_process_as_values(tmp_path: Path) -> None:
    question = Question(packages=("numpy",), storage=str(tmp_path), probe=str(tmp_path / "probe"), places=("/none",))
    values = doctor_facts.gather(question)
    facts = doctor_facts.facts_from(json.loads(json.dumps(values)))
    assert (facts.storage_problem, (tmp_path / "probe").read_text()) == ("", question.probe)
    assert "nothing there" in (facts.places["/none"] or "")
    assert facts.memory_free_bytes is not None
    assert asdict(facts)["versions"] == values["versions"]


ELSEWHERE = """
import json, pickle, sys
sys.modules["mnist_dist"] = None  # as on a node that lacks the package
function, question = pickle.load(sys.stdin.buffer)
print(json.dumps(function(question)))
"""


def test_a_node_without_the_package_answers_all_the_same(tmp_path: Path) -> None:
    question = Question(packages=("ray",), storage=str(tmp_path), probe=str(tmp_path / "probe"))
    with doctor._sent_by_value():
        sent = cloudpickle.dumps((doctor_facts.gather, question))
    assert pickle.loads(sent)[1] == question
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], input=sent, capture_output=True, timeout=60)
    facts = doctor_facts.facts_from(json.loads(done.stdout.splitlines()[-1]))
    assert "mnist_dist" in facts.package_problem
    assert facts.storage_problem is None
    checks = checks_of(replace(NODE, facts=replace(facts, versions=INSTALLED, python=HEALTHY.python)))
    assert "--working-dir" in only(bad([check for check in checks if check.name == "package"]), "package").remedy


def test_a_storage_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    folder = str(tmp_path / "file" / "runs")
    answer = doctor.ask_driver(replace(QUESTION, storage=folder))
    check = doctor_checks.written(answer, storage=folder)
    assert check.status == "failed"
    assert folder in check.remedy


def test_a_damaged_bundle_is_named(tmp_path: Path) -> None:
    images = [Image.new("RGB", (14, 12), (20 * index, 7, 90)) for index in range(5)]
    bundle = write_spread_bundle(tmp_path / "bundle", images=images, seed=1)
    assert doctor.whole_bundle(str(bundle)).status == "ok"
    (bundle / "model.keras").write_bytes(b"damaged")
    check = doctor.whole_bundle(str(bundle))
    assert (check.status, "sha256" in check.found) == ("failed", True)
    assert "--bundle" in check.remedy


def test_weights_in_the_cache_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    question = replace(QUESTION, storage=str(tmp_path), weights_url="http://127.0.0.1:9/vgg16/w.h5")
    missing = doctor.ask_driver(question).facts
    assert missing is not None
    assert missing.weights is not None
    assert (missing.weights.there, "refused" in missing.weights.problem) == (False, True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "w.h5").write_bytes(b"weights")
    found = doctor.ask_driver(question).facts
    assert found is not None
    assert found.weights == WeightsFacts(folder=str(tmp_path / "models"), there=True)


def test_the_cache_is_where_the_classifier_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mnist_dist.models.classifier import _keras_models

    for home in (tmp_path, Path("/proc/nowhere")):
        monkeypatch.setenv("KERAS_HOME", str(home))
        assert doctor_facts.keras_models_folder() == _keras_models()


# --- S3 --------------------------------------------------------------------------------------------------------------


def s3_checks(prefix: str) -> dict[str, Check]:
    answer = doctor.ask_driver(replace(QUESTION, storage=prefix))
    assert answer.facts is not None
    found = [doctor_checks.written(answer, storage=prefix), *doctor_checks.s3("driver", answer.facts)]
    return {check.name: check for check in found}


def test_an_s3_that_works(s3: str) -> None:
    found = s3_checks(s3)
    assert {name: check.status for name, check in found.items()} == dict.fromkeys(found, "ok")
    assert list(found) == ["storage", *doctor_checks.S3_CHECKS]
    assert list(storage.list_entries(s3)) == []


def test_wrong_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    storage.forget_clients()
    try:
        found = s3_checks(s3)
    finally:
        storage.forget_clients()
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
    assert found["clock"].status == "failed"
    assert found["clock"].found in ("1200 s behind the endpoint", "1199 s behind the endpoint")
    assert "set the clock of driver" in found["clock"].remedy
    assert found["s3 endpoint"].status == "ok"
    assert (found["s3 credentials"].status, found["s3 credentials"].found) == ("failed", "none")
    assert found["s3 region"].status == "warning"
    assert found["storage"].status == "skipped"


def test_an_endpoint_that_does_not_answer(foreign_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    found = s3_checks("s3://bucket/runs")
    assert (found["s3 endpoint"].status, found["storage"].status) == ("failed", "skipped")
    assert "http://127.0.0.1:9" in found["s3 endpoint"].remedy


# --- the command -----------------------------------------------------------------------------------------------------


def run(*flags: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    return run_command("jobs.doctor", *flags, **environment)


def statuses(result: dict[str, Any], name: str) -> dict[str, str]:
    return {check["node"]: check["status"] for check in result["checks"] if check["name"] == name}


@pytest.mark.slow
def test_a_healthy_machine_ends_with_0(tmp_path: Path) -> None:
    code, result, err = run("--storage", str(tmp_path / "runs"))
    assert (code, result["failed"]) == (0, 0), err
    assert result["job"] == "doctor"
    assert "checks" not in result
    assert err.splitlines()[-1].endswith(f"{result['skipped']} skipped")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_a_broken_machine_without_its_ray_ends_with_1_and_is_looked_at_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    flags = ["--storage", str(tmp_path / "file" / "runs"), "--backbone", "vgg16", "--weights", "imagenet", "--json"]
    broken = {"RAY_ADDRESS": "127.0.0.1:1", "TF_USE_LEGACY_KERAS": "1", "KERAS_HOME": str(tmp_path)}
    offline = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    code, result, err = run(*flags, **broken, **offline)
    assert code == 1, err
    assert result["error_type"] == "ChecksFailed"
    failed = {check["name"]: check["remedy"] for check in result["checks"] if check["status"] == "failed"}
    assert set(failed) == {"ray", "tf.keras", "storage", "weights"}
    assert "unset RAY_ADDRESS" in failed["ray"]
    assert "TF_USE_LEGACY_KERAS" in failed["tf.keras"]
    assert flags[1] in failed["storage"]
    assert f"into {tmp_path / 'models'}" in failed["weights"]
    assert statuses(result, "tensorflow") == {"driver": "ok"}
    assert set(result["checks"][0]) == {"name", "node", "status", "found", "expected", "remedy"}
    assert all(remedy in err for remedy in failed.values())


@pytest.mark.slow
def test_a_node_that_hangs_is_not_waited_for() -> None:
    def hang(question: Question) -> dict[str, Any]:
        time.sleep(600)
        return {}

    with connected(verbose=False):
        began_at = time.monotonic()
        (answer,) = doctor.ask_nodes(QUESTION, ask=hang, timeout_s=2)
        seconds = time.monotonic() - began_at
    assert (answer.facts, answer.problem) == (None, "no answer within 2 s")
    assert seconds < 60
    assert "look at the logs" in only(bad(checks_of(answer)), "node").remedy


@pytest.mark.slow
def test_every_node_of_a_cluster_reaches_s3_also_its_head_without_cpus(s3: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        code, result, err = run("--storage", s3, "--json", RAY_ADDRESS=cluster.address)
    finally:
        cluster.shutdown()
    assert code == 0, err
    for name in ("versions", "tensorflow", "storage", "s3 credentials", "clock", "disk"):
        found = statuses(result, name)
        assert len(found.keys() - {"driver", "all"}) == 2, name
        assert set(found.values()) == {"ok"}, name
    assert list(storage.list_entries(s3)) == []
