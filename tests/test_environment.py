"""The environment of a job: what is wrong with it is said before any work, in words that a test reads."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest
import ray
from harness import ROOT, Command, Recorder, run_command, write_spread_bundle
from PIL import Image

from mnist_dist import inventory
from mnist_dist.config import ModelConfig, PhasesConfig, RunConfig, StoreConfig, TrainJob
from mnist_dist.console import Stop
from mnist_dist.engines.choice import EngineChoice, open_engine
from mnist_dist.engines.export import export_bundle
from mnist_dist.environment import (
    CONVERSION_BACKENDS,
    KERAS_BACKENDS,
    check_keras,
    check_socket_path,
    ray_address,
    use_keras_on,
)
from mnist_dist.errors import ConfigError, Interrupted, MnistDistError, ServiceError, StorageError, WeightsError
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.evaluation.evaluate import evaluate
from mnist_dist.export_config import ExportJob
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.import_model import import_model
from mnist_dist.models.bundle import load_bundle
from mnist_dist.models.weights import check_published_weights, check_weights, download_error, published_weights_problem
from mnist_dist.on_ray.cluster import Share, check_environment, connected
from mnist_dist.on_ray.doctor import doctor
from mnist_dist.on_ray.head import ask_head, await_head
from mnist_dist.on_ray.scoring.plan import plan_score
from mnist_dist.on_ray.scoring.score import score
from mnist_dist.on_ray.search.search import search
from mnist_dist.on_ray.search.trial import REPORT, TrialProcess
from mnist_dist.on_ray.training.backend import check_backend, resolve_backend, start_backend
from mnist_dist.on_ray.training.plan import plan_train
from mnist_dist.on_ray.training.train import (
    check_devices,
    check_ready,
    few_steps_warning,
    random_backbone_warning,
    train,
)
from mnist_dist.recipes import folder_mobilenet_v2, quickstart
from mnist_dist.score_config import InputConfig, ScoreJob
from mnist_dist.search_config import BackboneSpace, SearchJob
from mnist_dist.session import Session
from mnist_dist.store.anywhere import ANYWHERE, check_access, store_for
from mnist_dist.store.uris import check_form, scheme_of
from mnist_dist.training.features import KerasFeatures

OFFLINE = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address of Ray, no token and no settings of Keras but those of the test."""
    assert not ray.is_initialized()
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "KERAS_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def training(storage: Path | str, **model: Any) -> TrainJob:
    job = quickstart()
    run = replace(job.run, storage=str(storage), name="run")
    return replace(job, run=run, model=replace(job.model, **model))


def searching(storage: Path | str, **backbone: Any) -> SearchJob:
    job = SearchJob()
    space = BackboneSpace(**{"backbone": "cnn", **backbone})
    return replace(job, space=replace(job.space, backbones=(space,)), run=replace(job.run, storage=str(storage)))


def scoring(output: Path | str, *, bundle: Path | str, images: str = "digits") -> ScoreJob:
    return ScoreJob(bundle=str(bundle), output=str(output), inputs=InputConfig(input=(images,)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [Image.new("RGB", (14, 12), (number, 2 * number, 90)) for number in range(6)]
    return write_spread_bundle(tmp_path_factory.mktemp("bundle") / "bundle", images=images, seed=1)


# --- RAY_ADDRESS: its form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("", "the variable is set, but empty"),
        (" ", "the variable is set, but empty"),
        ("auto", "takes any Ray that runs on this machine, perhaps another person's"),
        ("local", "local is no cluster"),
        ("http://10.0.0.1:8265", r"a dashboard, .* \(ray job submit --address http://10\.0\.0\.1:8265 "),
        ("ray://10.0.0.1:10001", "a Ray Client server, .* the driver of a job has to run on a node of the cluster"),
        ("10.0.0.1", "the port is missing"),
        ("10.0.0.1:6379/a", "this is no address"),
        ("10.0.0.1:66379", "this is no address"),
    ],
)
def test_an_address_that_jobs_cannot_use_is_explained(
    address: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    explained = rf"{why}.*unset RAY_ADDRESS to run on this machine alone.*RAY_ADDRESS='{re.escape(address)}'$"
    with pytest.raises(ConfigError, match=explained) as caught:
        train(training(tmp_path), recipe="quickstart", console=Recorder())
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "head.example.com:6379", "[2001:db8::1]:6379"])
def test_an_address_of_a_head_is_taken_as_it_is(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert ray_address() == address


def test_without_an_address_ray_is_private() -> None:
    assert ray_address() is None


# --- RAY_ADDRESS: whether a head is there ----------------------------------------------------------------------------


class Listener:
    """A port of loopback that accepts connections and says nothing; `accepted` is set by the `times`-th of them."""

    def __init__(self, *, times: int = 1) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.accepted, self._times, self._held = threading.Event(), times, list[socket.socket]()

    def __enter__(self) -> "Listener":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the socket was closed
            while True:
                self._held.append(self._socket.accept()[0])
                if len(self._held) >= self._times:
                    self.accepted.set()

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        for held in self._held:
            held.close()


@contextlib.contextmanager
def head(*, token: str | None = None, health: bytes = b"\x08\x01") -> Iterator[str]:
    """A gRPC server that answers as the head of a cluster does; gives its address."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            sent = dict(details.invocation_metadata).get("authorization")

            def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
                if details.method.endswith("CheckAlive") and token is not None and sent != f"Bearer {token}":
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
                return health

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_head_that_is_well_is_let_through() -> None:
    with head() as address:
        ask_head(address)


def test_a_port_that_nobody_listens_on_is_no_cluster() -> None:
    address = f"127.0.0.1:{closed_port()}"
    with pytest.raises(ConfigError, match=rf"in RAY_ADDRESS: .*refused\. Start .*RAY_ADDRESS='{address}'$"):
        ask_head(address)


def test_a_port_that_never_answers_is_no_cluster() -> None:
    with (
        Listener() as listener,
        pytest.raises(ConfigError, match=r"it accepts connections, but did not answer within 0\.2 s"),
    ):
        ask_head(listener.address, answer_s=0.2)


class Web(BaseHTTPRequestHandler):
    """Answers each GET with the status in the path."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_web_server_and_a_service_that_is_not_well_are_no_head(web: str) -> None:
    no_head = r"what listens there is not the head of a Ray cluster \(its port is 6379 by default\)"
    with pytest.raises(ConfigError, match=no_head):
        ask_head(web)
    with head(health=b"\x08\x02") as address, pytest.raises(ConfigError, match=no_head):
        ask_head(address)


def test_asking_ends_though_the_name_of_the_host_is_looked_up_for_ever() -> None:
    over = threading.Event()
    try:
        with pytest.raises(ConfigError, match=r"no answer within 0\.05 s.*RAY_ADDRESS='slow\.example:6379'"):
            await_head("slow.example:6379", stop=None, ask=lambda _: over.wait(), give_up_s=0.05)
    finally:
        over.set()


def test_a_signal_ends_the_asking() -> None:
    over = threading.Event()
    stop = Stop(Recorder())
    stop.signal_number = signal.SIGTERM
    try:
        with pytest.raises(Interrupted, match="run the same command to resume") as caught:
            await_head("slow.example:6379", stop=stop, ask=lambda _: over.wait())
    finally:
        over.set()
    assert caught.value.exit_code == 143


def test_a_dead_address_ends_a_job_before_any_work(tmp_path: Path) -> None:
    address = f"127.0.0.1:{closed_port()}"
    code, result, err = run_command("jobs.train", "quickstart", "--storage", str(tmp_path / "s"), RAY_ADDRESS=address)
    assert (code, result["error_type"]) == (2, "ConfigError"), err
    assert f"RAY_ADDRESS='{address}'" in result["error"]
    assert f"error: {result['error']}" in err
    assert not (tmp_path / "s").exists()


@pytest.mark.slow  # as long as a head may take to answer
def test_a_silent_address_ends_a_search_by_itself(tmp_path: Path) -> None:
    with Listener() as listener:
        code, result, err = run_command("jobs.search", "--storage", str(tmp_path / "s"), RAY_ADDRESS=listener.address)
    assert (code, result["error_type"]) == (2, "ConfigError"), err
    assert "it accepts connections, but did not answer within 15 s" in result["error"]


@pytest.mark.parametrize(
    ("number", "arguments"), [(signal.SIGTERM, ["jobs.train"]), (signal.SIGINT, ["jobs.quickstart"])]
)
def test_a_signal_while_a_silent_address_is_asked_ends_the_job_with_its_json(
    number: signal.Signals, arguments: list[str], tmp_path: Path
) -> None:
    with (
        Listener(times=2) as listener,  # the second connection waits for an answer
        Command(*arguments, "--storage", str(tmp_path / "s"), RAY_ADDRESS=listener.address) as job,
    ):
        assert job.until(listener.accepted.is_set), job.stderr()
        job.process.send_signal(number)
        code, result, err = job.ended()
    assert (code, result["error_type"]) == (128 + number, "Interrupted"), err
    assert "run the same command to resume" in result["error"]


@pytest.mark.parametrize("error", [ConnectionError("Failed to connect"), ValueError("Invalid")])
def test_a_cluster_that_cannot_be_joined_names_the_address(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with head() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        joined = rf"cannot be joined: {error}\. Is there a node of it on this machine\? .*RAY_ADDRESS='{address}'$"
        with pytest.raises(ConfigError, match=joined), connected(verbose=False):
            pass


def test_a_ray_that_does_not_start_in_time_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ServiceError, match=r"very busy; run the same command again"), connected(verbose=False):
        pass


def test_sigterm_while_ray_starts_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: sys.exit(15))  # as Ray's own handler does
    with pytest.raises(Interrupted, match="Stopped while Ray was starting") as caught, connected(verbose=False):
        pass
    assert caught.value.exit_code == 143


# --- Ray's token -----------------------------------------------------------------------------------------------------

REMEDY = (
    r"set RAY_AUTH_MODE=token here, and copy the token of the cluster \(~/\.ray/auth_token .*RAY_AUTH_MODE=disabled"
)


def test_a_cluster_that_asks_for_a_token_which_this_process_does_not_send_says_so() -> None:
    with (
        head(token="right") as address,
        pytest.raises(ConfigError, match=f"without RAY_AUTH_MODE=token none .*{REMEDY}"),
    ):
        ask_head(address)


def test_another_token_than_that_of_the_cluster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("wrong\n")
    with head(token="right") as address:
        with pytest.raises(ConfigError, match=f"the token of this process is another one: {REMEDY}") as caught:
            ask_head(address)
        assert "wrong" not in str(caught.value)
        (tmp_path / "token").write_text("right\n")
        ask_head(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")  # it goes before the file
        with pytest.raises(ConfigError, match="the token of this process is another one"):
            ask_head(address)


def test_ray_itself_looks_for_a_token_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nothing"))
    with head(token="right") as address:
        ask_head(address)

        def init(**_: Any) -> None:
            raise ray.exceptions.AuthenticationError("no authentication token was found")

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(ConfigError, match=f"^no authentication token was found: {REMEDY}"),
            connected(verbose=False),
        ):
            pass


@pytest.mark.parametrize(
    ("environment", "has_file", "status", "found"),
    [
        ({}, False, "ok", "none is sent$"),
        ({}, True, "ok", "none is sent, but .*token is there: .*`ray start`.*need RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "ok", "none is sent$"),
        ({"RAY_AUTH_MODE": "token"}, True, "ok", "sent to a cluster"),
        ({"RAY_AUTH_MODE": "token"}, False, "ok", "sent to a cluster"),  # a private Ray makes one
        ({"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "10.0.0.1:6379"}, False, "failed", "there is none$"),
    ],
)
def test_doctor_says_whether_a_token_is_sent(
    environment: dict[str, str],
    has_file: bool,
    status: str,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}.items():
        monkeypatch.setenv(name, value)
    if has_file:
        (tmp_path / "token").write_text("a token")
    check = doctor.ray_token()
    assert (check.status, bool(re.search(found, check.found))) == (status, True), check.found
    assert "a token" not in check.found


@contextlib.contextmanager
def real_head(token: Path) -> Iterator[str]:
    """`ray start --head` that asks for a token; gives the address."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:
        address = f"127.0.0.1:{closed_port()}"
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
        command += [
            f"--temp-dir={name}/t",
            "--num-cpus=1",
            "--object-store-memory=80000000",
            "--include-dashboard=false",
        ]
        command += ["--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"]
        command += [f"--ray-client-server-port={closed_port()}", f"--dashboard-agent-listen-port={closed_port()}"]
        settings = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        with (Path(name) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=settings, cwd=name)
        try:
            while b"Ray runtime started" not in (Path(name) / "log").read_bytes():
                assert process.poll() is None, (Path(name) / "log").read_text()
                time.sleep(0.1)
            yield address
        finally:
            processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for each in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
            psutil.wait_procs(processes, timeout=10)


@pytest.mark.slow  # a cluster
def test_a_real_cluster_with_a_token_is_joined_with_it_and_explained_without(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    with real_head(tmp_path / "token") as address:
        command = ["jobs.doctor", "--storage", str(tmp_path / "s"), "--json"]
        code, result, err = run_command(*command, RAY_ADDRESS=address)
        assert (code, result["failed"]) == (1, 1), err
        (failed,) = (check for check in result["checks"] if check["status"] == "failed")
        assert failed["name"] == "ray"
        assert re.search(f"asks for its token, and without RAY_AUTH_MODE=token none is sent: {REMEDY}", failed["found"])
        mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
        code, result, err = run_command(*command, RAY_ADDRESS=address, **mine)
        assert (code, result["failed"]) == (0, 0), err


# --- the folder of Ray's sockets -------------------------------------------------------------------------------------


def folder_of(size: int) -> str:
    """A folder below /tmp whose path has so many bytes."""
    return "/tmp/" + "x" * (size - len("/tmp/"))


def longest_folder() -> int:
    """The longest path of a temporary folder for this process, bytes: Ray's session has the number of the process."""
    rest = "/ray/session_2026-01-01_00-00-00_000000_/sockets/plasma_store"
    return 107 - len(rest) - len(str(os.getpid()))


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_sockets_is_named_with_the_remedy(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = longest_folder()
    monkeypatch.setenv(variable, folder_of(most))
    check_socket_path()
    monkeypatch.setenv(variable, folder_of(most + 1))
    refused = (
        rf"^{variable} is too long: .* 107 bytes, so that {most} are left .* such as RAY_TMPDIR=/tmp\. "
        rf"Received: {variable}='/tmp/x+' \({most + 1} bytes\)$"
    )
    with pytest.raises(ConfigError, match=refused):
        train(training(tmp_path), recipe="quickstart", console=Recorder())
    with pytest.raises(ConfigError, match=refused), connected(verbose=False):
        pass
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # it goes before TMPDIR
    check_socket_path()


def test_letters_of_several_bytes_count_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", folder_of(longest_folder() - 1) + "é")
    with pytest.raises(ConfigError, match="TMPDIR is too long"):
        check_socket_path()


def test_the_folder_of_a_cluster_is_its_own_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", folder_of(90))
    with head() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        check_environment(Recorder(), backends=CONVERSION_BACKENDS)


LONGEST = """
import os
from pathlib import Path
rest = len("/ray/session_2026-01-01_00-00-00_000000_/sockets/plasma_store") + len(str(os.getpid()))
folder = Path(os.environ["BASE"]) / ("x" * (107 - rest - len(os.environ["BASE"]) - 1))
folder.mkdir()
os.environ["RAY_TMPDIR"] = str(folder)
from mnist_dist.on_ray.cluster import connected
with connected(verbose=False) as have:
    print(have.nodes)
"""


@pytest.mark.slow  # a Ray
def test_ray_starts_in_the_longest_folder_that_is_let_through() -> None:
    with tempfile.TemporaryDirectory(prefix="e", dir="/tmp", ignore_cleanup_errors=True) as base:
        done = subprocess.run(
            [sys.executable, "-c", LONGEST],
            env={**os.environ, "BASE": base, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_a_private_ray_that_cannot_write_says_where_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/home/a/.ray")

    monkeypatch.setattr(ray, "init", init)
    said = r"/home/a/\.ray'\. It writes .*TMPDIR.*RAY_AUTH_MODE=disabled$"
    with pytest.raises(ConfigError, match=said), connected(verbose=False):
        pass


# --- Keras' settings -------------------------------------------------------------------------------------------------


def write_settings(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> Path:
    """A keras.json for the process of the test, and for those that it starts."""
    monkeypatch.setenv("KERAS_HOME", str(folder))
    usual = {"floatx": "float32", "epsilon": 1e-07, "backend": "tensorflow", "image_data_format": "channels_last"}
    (folder / "keras.json").write_text(json.dumps(usual | settings))
    return folder / "keras.json"


SETTINGS = [
    ({"backend": "torch"}, "backend='torch'", ", or set KERAS_BACKEND=tensorflow"),
    ({"image_data_format": "channels_first"}, "image_data_format='channels_first'", ""),
    ({"floatx": "float16"}, "floatx='float16'", ""),
    ({"floatx": "float64", "backend": "jax"}, "backend='jax', floatx='float64'", ""),
]


@pytest.mark.parametrize(("settings", "received", "remedy"), SETTINGS)
def test_other_settings_of_keras_are_refused_with_the_file_and_the_remedy(
    settings: dict[str, str], received: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_settings(tmp_path, monkeypatch, **settings)
    refused = (
        f"backend tensorflow, image_data_format channels_last, floatx float32; {file} on .* says otherwise. "
        f"Correct or delete that file{remedy}, or point KERAS_HOME .* Received: {re.escape(received)}$"
    )
    with pytest.raises(ConfigError, match=refused):
        check_keras()


def test_usual_settings_and_files_that_keras_ignores_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_settings(tmp_path, monkeypatch)
    check_keras()
    for ignored in ("{", "[]", '{"epsilon": 1e-8}'):
        file.write_text(ignored)
        check_keras()
    file.unlink()
    check_keras()


def test_the_variable_overrides_the_backend_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_settings(tmp_path, monkeypatch, backend="torch")
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    check_keras()


@pytest.mark.parametrize("backend", ["torch", "openvino", "tensorfow"])
def test_a_backend_that_no_job_can_use_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", backend)
    with pytest.raises(
        ConfigError,
        match=rf"runs Keras on tensorflow \(jax for training and scoring\): unset .*KERAS_BACKEND='{backend}'$",
    ):
        check_keras(CONVERSION_BACKENDS)
    with pytest.raises(ConfigError, match=rf"runs Keras on tensorflow or jax: unset .*KERAS_BACKEND='{backend}'$"):
        check_keras(KERAS_BACKENDS)


def test_jax_trains_and_scores_and_does_not_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    check_keras(KERAS_BACKENDS)
    with pytest.raises(ConfigError, match=r"runs Keras on tensorflow .*KERAS_BACKEND='jax'$"):
        check_keras(CONVERSION_BACKENDS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"jax is not installed on .*pip install jax, or unset KERAS_BACKEND"):
        check_keras(KERAS_BACKENDS)


@pytest.mark.parametrize("home", ["/home/a", None])
def test_the_file_is_that_which_keras_reads(home: str | None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_HOME"}
    environment |= {"HOME": str(tmp_path)} if home is None else {"HOME": home, "KERAS_HOME": "~/mine"}
    program = "from mnist_dist.environment import keras_file; print(keras_file())"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    expected = tmp_path / ".keras/keras.json" if home is None else "/home/a/mine/keras.json"
    assert done.stdout.strip() == str(expected), done.stderr


Job = Callable[[Path, Path], Any]
JOBS: dict[str, Job] = {
    "train": lambda place, _: train(training(place), recipe="a", console=Recorder()),
    "dry run": lambda place, _: train(dry(training(place)), recipe="a", console=Recorder()),
    "plan of a training": lambda place, _: plan_train(training(place), recipe="a", console=Recorder()),
    "search": lambda place, _: search(searching(place), recipe="a", console=Recorder()),
    "score": lambda place, bundle: score(scoring(place / "t", bundle=bundle), console=Recorder()),
    "plan of a scoring": lambda place, bundle: plan_score(scoring(place / "t", bundle=bundle), console=Recorder()),
    "export": lambda place, bundle: export_bundle(
        ExportJob(bundle=str(bundle), format="onnx", output=str(place / "e")), console=Recorder()
    ),
    "import": lambda place, bundle: import_model(
        ImportJob(source=str(bundle / "model.keras"), output=str(place / "i")), console=Recorder()
    ),
}


def dry(job: TrainJob) -> TrainJob:
    return replace(job, run=replace(job.run, dry_run=True))


@pytest.mark.parametrize("name", JOBS)
def test_each_job_refuses_other_settings_of_keras_before_it_writes(
    name: str, tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_settings(tmp_path, monkeypatch, floatx="float16")
    place = tmp_path / "place"
    with pytest.raises(ConfigError, match=r"Received: floatx='float16'$"):
        JOBS[name](place, bundle)
    assert not place.exists()


def test_settings_of_this_machine_do_not_matter_where_workers_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_settings(tmp_path, monkeypatch, backend="torch")
    with head() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        check_ready([ModelConfig()], run=RunConfig(), console=Recorder())


@pytest.mark.parametrize(
    "work",
    [
        lambda bundle: start_backend("tensorflow"),
        lambda bundle: KerasFeatures(None),  # type: ignore[arg-type]
        lambda bundle: open_engine(EngineChoice(), load_bundle(str(bundle)), batch_size=2),
    ],
    ids=["training", "features", "scoring"],
)
def test_workers_check_their_own_settings(
    work: Callable[[Path], Any], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    write_settings(tmp_path, monkeypatch, image_data_format="channels_first")
    with pytest.raises(ConfigError, match=r"says otherwise.*Received: image_data_format='channels_first'$"):
        work(bundle)


def test_a_trial_on_a_node_with_other_settings_ends_the_search_and_is_no_failed_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    write_settings(tmp_path, monkeypatch, image_data_format="channels_first")
    process = TrialProcess.__new__(TrialProcess)
    process.setup({}, SimpleNamespace(backend="tensorflow", cpus=1, gpu=True))  # type: ignore[arg-type]
    report = process.step()[REPORT]
    assert report.outage
    assert "Received: image_data_format='channels_first'" in report.error


def test_a_backend_by_flag_wins_over_the_variable_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = functools.partial(resolve_backend, session=Session(console=Recorder(), stop=Stop(Recorder())))
    assert resolve("auto", gpus=0) == "tensorflow"
    assert resolve("auto", gpus=2) == "jax"
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert resolve("auto", gpus=0) == "jax"
    assert resolve("tensorflow", gpus=1) == "tensorflow"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    write_settings(tmp_path, monkeypatch, backend="torch")
    start_backend("tensorflow")
    assert os.environ["KERAS_BACKEND"] == "tensorflow"


def test_a_backend_that_cannot_do_it_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    several = r"^more than one GPU per worker needs backend jax\. Received: gpus_per_worker=4, backend='tensorflow'$"
    with pytest.raises(ConfigError, match=several):
        check_backend(RunConfig(gpus_per_worker=4, backend="tensorflow"), here=False)
    check_backend(RunConfig(gpus_per_worker=4), here=True)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    with pytest.raises(ConfigError, match=several):
        check_backend(RunConfig(gpus_per_worker=4), here=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = r"jax is not installed on .*: pip install jax, or leave out --backend\. Received: backend='jax'$"
    with pytest.raises(ConfigError, match=missing):
        check_backend(RunConfig(backend="jax"), here=True)
    with pytest.raises(ConfigError, match=missing):
        use_keras_on("jax")


def test_batches_of_batch_norm_on_jax_divide_evenly_among_the_devices() -> None:
    share = Share(workers=3, cpus=1, gpus=2)
    check_devices([12, 60], backbone="resnet50", backend="jax", share=share)
    check_devices([32], backbone="vgg16", backend="jax", share=share)
    check_devices([32], backbone="resnet50", backend="tensorflow", share=share)
    with pytest.raises(ConfigError, match=r"^batch_size must be a multiple of 6, .* to train resnet50 on JAX: .*=32$"):
        check_devices([60, 32], backbone="resnet50", backend="jax", share=share)


# --- credentials -----------------------------------------------------------------------------------------------------

S3_REMEDY = (
    r"no credentials for S3\. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY .*~/\.aws in AWS_PROFILE, .*instance role"
    r".*--s3-anonymous\. Received: 's3://bucket"
)


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    settings = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{closed_port()}"}
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        settings[name] = os.devnull
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    ANYWHERE.forget_clients()
    yield
    ANYWHERE.forget_clients()


def evaluating(**fields: Any) -> Any:
    return evaluate(EvaluateJob(**fields), console=Recorder())


S3 = "s3://bucket/a"
PLACES: dict[str, Job] = {
    "storage of train": lambda place, _: train(training(S3), recipe="a", console=Recorder()),
    "weights of train": lambda place, _: train(training(place, weights=S3), recipe="a", console=Recorder()),
    "backbone of train": lambda place, _: train(training(place, backbone=S3), recipe="a", console=Recorder()),
    "data of train": lambda place, _: train(with_data(training(place)), recipe="a", console=Recorder()),
    "data of a plan": lambda place, _: plan_train(with_data(training(place)), recipe="a", console=Recorder()),
    "storage of search": lambda place, _: search(searching(S3), recipe="a", console=Recorder()),
    "data of search": lambda place, _: search(with_data(searching(place)), recipe="a", console=Recorder()),
    "backbone of search": lambda place, _: search(searching(place, backbone=S3), recipe="a", console=Recorder()),
    "bundle of score": lambda place, _: score(scoring(place, bundle=S3), console=Recorder()),
    "input of score": lambda place, bundle: score(scoring(place, bundle=bundle, images=S3), console=Recorder()),
    "output of score": lambda _, bundle: score(scoring(S3, bundle=bundle), console=Recorder()),
    "output of a plan": lambda _, bundle: plan_score(scoring(S3, bundle=bundle), console=Recorder()),
    "table of evaluate": lambda *_: evaluating(predictions=S3, output="e"),
    "labels of evaluate": lambda place, _: evaluating(predictions=str(place), labels=S3),
    "other table of evaluate": lambda place, _: evaluating(predictions=str(place), compare=S3),
    "bundle of export": lambda place, _: export_bundle(ExportJob(bundle=S3, format="onnx"), console=Recorder()),
    "output of export": lambda _, bundle: export_bundle(
        ExportJob(bundle=str(bundle), format="onnx", output=S3), console=Recorder()
    ),
    "source of import": lambda place, _: import_model(ImportJob(source=S3, output=str(place)), console=Recorder()),
    "output of import": lambda *_: import_model(ImportJob(source="timm:resnet18", output=S3), console=Recorder()),
    "list": lambda *_: inventory.rows_below(S3, lambda folder: None),
}


def with_data(job: Any) -> Any:
    return replace(job, data=replace(job.data, data=(S3,)))


@pytest.mark.parametrize("name", PLACES)
def test_a_place_on_s3_without_credentials_is_refused_with_the_usual_remedies(
    name: str, tmp_path: Path, bundle: Path, no_credentials: None
) -> None:
    with pytest.raises(StorageError, match=S3_REMEDY) as caught:
        PLACES[name](tmp_path / "place", bundle)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "place").exists()


def test_the_command_says_so_before_ray_starts(no_credentials: None) -> None:
    flags = ["--bundle", "s3://bucket/b", "--input", "s3://bucket/i", "--output", "s3://bucket/t"]
    code, result, err = run_command("jobs.score", *flags, RAY_ADDRESS=f"127.0.0.1:{closed_port()}")
    assert (code, result["error_type"]) == (2, "StorageError"), err
    assert re.search(S3_REMEDY, result["error"])


def test_a_profile_that_is_not_there_is_named(no_credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "my-typo")
    with pytest.raises(StorageError, match=r"cannot be read: .*my-typo.*\. Set AWS_ACCESS_KEY_ID .*AWS_PROFILE"):
        check_access([S3])


def test_public_buckets_need_no_credentials(no_credentials: None) -> None:
    check_access([S3], store=store_for(StoreConfig(s3_anonymous=True)))


def test_credentials_are_all_that_is_looked_for(no_credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    check_access([S3])  # nothing listens at the endpoint


def test_a_worker_without_credentials_says_how_to_give_them(no_credentials: None) -> None:
    with pytest.raises(ServiceError, match=r"^s3://bucket/a: there are no credentials for S3\. Set AWS_ACCESS_KEY_ID"):
        ANYWHERE.read_bytes(S3)


def test_google_cloud_storage_without_credentials_names_the_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("google.cloud.storage", reason="needs google-cloud-storage (pip install -e '.[dev]')")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "no.json"))
    ANYWHERE.forget_clients()
    try:
        with pytest.raises(
            StorageError, match=r"no\.json.*Set GOOGLE_APPLICATION_CREDENTIALS .*`gcloud auth .*'gs://b/k'"
        ):
            check_access(["gs://b/k"])
    finally:
        ANYWHERE.forget_clients()


def test_azure_without_credentials_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("azure.storage.blob", reason="needs azure-storage-blob (pip install -e '.[dev]')")
    for name in ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    ANYWHERE.forget_clients()
    try:
        with pytest.raises(
            StorageError, match=r"no credentials for az://\. Set AZURE_STORAGE_CONN.*`az login`.*'az://c/k'"
        ):
            check_access(["az://c/k"])
    finally:
        ANYWHERE.forget_clients()


# --- misspelt places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("s3:/bucket/a", "s3://bucket/a"),
        ("S3:/bucket/a", "s3://bucket/a"),
        ("s3:bucket/a", "s3://bucket/a"),
        ("s3//bucket/a", "s3://bucket/a"),
        ("gs:/bucket/a", "gs://bucket/a"),
        ("gcs:/bucket/a", "gs://bucket/a"),
        ("az//container/a", "az://container/a"),
        ("https:/host/a", "https://host/a"),
    ],
)
def test_a_misspelt_uri_is_not_taken_for_a_path(uri: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"reads as a local path.*did you mean {meant}\?.*Received: '{uri}'$"):
        check_form(uri)
    with pytest.raises(StorageError, match=f"did you mean {meant}"):
        train(training(uri), recipe="a", console=Recorder())


@pytest.mark.parametrize(
    ("uri", "scheme"),
    [("S3://b/k", "s3"), ("s3a://b/k", "s3"), ("gcs://b/k", "gs"), ("abfss://c/k", "az"), ("htps://h/k", "https")],
)
def test_an_unknown_scheme_comes_with_the_known_one(uri: str, scheme: str) -> None:
    with pytest.raises(StorageError, match=rf"\(did you mean {scheme}://\?\)\. Received: '{uri}'$"):
        scheme_of(uri)


def test_a_scheme_that_nobody_knows_has_no_suggestion() -> None:
    with pytest.raises(StorageError, match=r"\(https:// can only be read\)\. Received: 'hdfs://b/k'$"):
        scheme_of("hdfs://b/k")


def test_paths_that_are_there_or_look_like_paths_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "a").mkdir(parents=True)
    for path in ("s3:/a", "s3/a", "gs", "/data/s3:/a", "az.csv", "timm:resnet18", "digits", "-", "s3://b", "file:///a"):
        check_form(path)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "there"),
    [
        ("w/cnn.weight.h5", r"{0}/w holds cnn\.weights\.h5, other\.h5 \(did you mean {0}/w/cnn\.weights\.h5\?\)"),
        ("w/deep/x.h5", r"{0}/w holds cnn\.weights\.h5, other\.h5"),
        ("v/x.h5", r"{0} holds empty/, w/"),
        ("emty/x.h5", r"{0} holds empty/, w/ \(did you mean {0}/empty\?\)"),
        ("empty/x.h5", r"{0}/empty is empty"),
    ],
)
def test_weights_that_are_not_there_say_what_is(
    weights: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("w/cnn.weights.h5", "w/other.h5", "w/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    uri = str(tmp_path / weights)
    said = rf"^the weights for cnn are no file or bundle; {there.format(re.escape(str(tmp_path)))}\. Allowed .*"
    for job in (
        lambda: check_weights(uri, backbone="cnn"),
        lambda: train(training(tmp_path / "s", backbone="cnn", weights=uri), recipe="a", console=Recorder()),
        lambda: search(searching(tmp_path / "s", weights=uri), recipe="a", console=Recorder()),
    ):
        with pytest.raises(WeightsError, match=said + rf"Received: weights='{re.escape(uri)}'$"):
            job()
    assert not (tmp_path / "s").exists()


def test_a_misspelt_name_of_weights_comes_with_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"no file or bundle \(did you mean imagenet\?\);"):
        check_weights("imagnet", backbone="vgg16")


def test_a_folder_that_is_no_bundle_is_no_weights(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(
        WeightsError, match=r"for cnn are neither a \.h5 file nor a bundle \(a folder with bundle\.json\)"
    ):
        check_weights(str(tmp_path), backbone="cnn")


def test_weights_that_are_there_are_fine(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "a.weights.h5").touch()
    for weights in ("none", "imagenet", str(tmp_path / "a.weights.h5"), str(bundle)):
        check_weights(weights, backbone="cnn")


def test_published_weights_come_from_the_cache_or_from_a_server_that_answers(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert published_weights_problem(f"http://{web}/200/w.h5") == ""
    assert "404" in published_weights_problem(f"http://{web}/404/w.h5")
    nobody = f"http://127.0.0.1:{closed_port()}/w.h5"
    assert "refused" in published_weights_problem(nobody)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "w.h5").touch()
    assert published_weights_problem(nobody) == ""


PUBLISHED: Any = {"backbone": "vgg16", "weights": "imagenet"}
VGG16 = "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network beyond loopback, and no weights in the cache, which is given."""
    for name, value in {**OFFLINE, "KERAS_HOME": str(tmp_path / "keras")}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "keras" / "models"


@pytest.mark.parametrize(
    "job",
    [
        lambda place: train(training(place, **PUBLISHED), recipe="a", console=Recorder()),
        lambda place: train(dry(training(place, **PUBLISHED)), recipe="a", console=Recorder()),
        lambda place: plan_train(training(place, **PUBLISHED), recipe="a", console=Recorder()),
        lambda place: search(searching(place, **PUBLISHED), recipe="a", console=Recorder()),
    ],
    ids=["train", "dry run", "plan", "search"],
)
def test_imagenet_weights_without_a_network_end_a_job_before_it_writes(
    job: Callable[[Path], Any], tmp_path: Path, offline: Path
) -> None:
    with pytest.raises(WeightsError, match=rf"put the file {VGG16} from https://\S+ into {offline}, or") as caught:
        job(tmp_path / "s")
    assert str(caught.value).count("https://") == 1
    assert caught.value.exit_code == 2
    assert not (tmp_path / "s").exists()


def test_imagenet_weights_in_the_cache_need_no_network(offline: Path) -> None:
    offline.mkdir(parents=True)
    (offline / VGG16).touch()
    check_published_weights([ModelConfig(**PUBLISHED), ModelConfig(backbone="cnn")])


def test_weights_that_the_nodes_of_a_cluster_may_have_are_left_to_them(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with head() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        check_ready([ModelConfig(**PUBLISHED)], run=RunConfig(), console=Recorder())


def test_a_download_that_failed_in_keras_names_the_url_once() -> None:
    url = f"https://storage.googleapis.com/tensorflow/keras-applications/vgg16/{VGG16}"
    for reason in (
        f"URL fetch failure on {url}: None -- [Errno 111] Connection refused",
        "[Errno 111] Connection refused",
    ):
        error = download_error(ModelConfig(**PUBLISHED), Exception(reason))
        assert str(error).startswith("cannot download the ImageNet weights of vgg16 ([Errno 111] Connection refused). ")
        assert str(error).count(url) == 1
    refused = download_error(ModelConfig(**PUBLISHED), Exception(f"URL fetch failure on {url}: 403 -- Forbidden"))
    assert "of vgg16 (403 -- Forbidden)." in str(refused)


def test_what_is_wrong_with_the_environment_is_wrong_usage() -> None:
    assert {error.exit_code for error in (ConfigError, StorageError, WeightsError)} == {2}
    assert issubclass(WeightsError, MnistDistError)


@pytest.mark.parametrize(("images", "steps"), [(52, None), (64 * 7 - 1, 90), (64 * 7, None), (6, 0)])
def test_a_training_of_too_few_steps_is_warned_of(images: int, steps: int | None) -> None:
    job = quickstart()  # 15 epochs in batches of 64
    if images == 52:
        job = replace(job, fit=replace(job.fit, batch_size=4))
    words, expected = few_steps_warning(job, images=images), f"{images} training images in batches of 64 make {steps} "
    assert words is None if steps is None else expected in str(words)


def test_a_head_on_random_weights_is_warned_of() -> None:
    job = folder_mobilenet_v2()
    assert random_backbone_warning(job) is None
    random = replace(job, model=replace(job.model, weights="none"))
    assert "--trainable all" in str(random_backbone_warning(random))
    assert random_backbone_warning(replace(random, phases=PhasesConfig(trainable=("all",)))) is None
    assert random_backbone_warning(replace(random, model=replace(random.model, backbone="./imported"))) is None
