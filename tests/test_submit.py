"""`ray job submit` as the README writes it, to a cluster that `ray start` began on this machine."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from harness import CLASSES, ROOT, write_spread_bundle
from PIL import Image

from mnist_dist import load_bundle
from mnist_dist.scoring.predictions import read_predictions

pytestmark = pytest.mark.slow

IMAGES = 40
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of one node."""

    address: str
    token: str
    environment: dict[str, str]
    """Of its processes and its clients."""
    folder: Path
    """Ray's own files."""

    def ask(self, path: str) -> dict[str, Any]:
        """The dashboard's answer."""
        request = Request(f"{self.address}/api/{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urlopen(request, timeout=10) as answer:
            return dict(json.load(answer))


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that has ended."""

    code: int
    """Of `ray job submit`."""
    printed: str
    """By `ray job submit`: what was sent, and the log as it came."""
    status: str
    log: str
    """Of the job, whole and with nothing between."""

    @property
    def last_line(self) -> dict[str, Any]:
        return dict(json.loads(self.log.splitlines()[-1]))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`ray start --head`, on ports of its own and with a token of its own."""
    # not pytest's folder: its name is too long for a socket
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:
        folder, token, dashboard = Path(name), "0123456789abcdef" * 4, free_port()
        (folder / "token").write_text(token)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        environment |= {"PATH": f"{Path(RAY).parent}:{os.environ['PATH']}"}  # `python` is ours on this cluster, too
        address = f"http://127.0.0.1:{dashboard}"
        made = Cluster(address=address, token=token, environment=environment, folder=folder / "t")
        with (folder / "log").open("wb") as log:
            head = subprocess.Popen(
                [*start_command(made.folder, dashboard)], stdout=log, stderr=log, env=environment, cwd=folder
            )
        try:
            wait_for_dashboard(made, head, folder / "log")
            yield made
        finally:
            end_with_children(head)


def start_command(folder: Path, dashboard: int) -> Iterator[str]:
    yield from (RAY, "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={folder}")
    yield from ("--num-cpus=4", "--object-store-memory=200000000", "--node-ip-address=127.0.0.1")
    yield from ("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}")
    for name in ("port", "dashboard-agent-listen-port", "ray-client-server-port"):
        yield f"--{name}={free_port()}"


def free_port() -> int:
    """A port that nobody listens on; above those that Ray's workers take (10000 to 19999)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_dashboard(cluster: Cluster, head: "subprocess.Popen[bytes]", log: Path) -> None:
    while True:
        try:
            cluster.ask("version")
            return
        except (URLError, OSError) as err:
            if head.poll() is not None:
                raise RuntimeError(f"Ray did not start: {log.read_text()[-2000:]}") from err
            time.sleep(0.3)


def end_with_children(head: "subprocess.Popen[bytes]") -> None:
    """Ends what was started here; `ray stop` would end every Ray of this machine."""
    processes = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # asked politely, the head would wait for each
    head.wait()
    psutil.wait_procs(processes, timeout=10)


def noise(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def submit(cluster: Cluster, *entrypoint: str) -> Submitted:
    """`ray job submit --working-dir . -- ...` from the root of the project, and what became of it."""
    done = subprocess.run(
        [RAY, "job", "submit", "--address", cluster.address, "--working-dir", ".", "--", *entrypoint],
        cwd=ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    printed = done.stdout + done.stderr
    found = re.search(r"raysubmit_\w+", printed)
    assert found, printed
    job = cluster.ask(f"jobs/{found[0]}")
    log = cluster.ask(f"jobs/{found[0]}/logs")["logs"]
    return Submitted(code=done.returncode, printed=printed, status=job["status"], log=log)


def test_a_submitted_scoring_job_leaves_its_table_and_its_json_line(cluster: Cluster, tmp_path: Path) -> None:
    images = [noise(number) for number in range(IMAGES)]
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        image.save(tmp_path / "images" / f"{number:03d}.png")
    bundle = write_spread_bundle(tmp_path / "bundle", images=images, seed=1)
    command = ["python", "-m", "jobs.score", "--bundle", str(bundle), "--input", str(tmp_path / "images")]
    done = submit(cluster, *command, "--output", str(tmp_path / "table"), "--storage-is-shared")
    assert done.code == 0, done.printed
    assert done.status == "SUCCEEDED"
    assert done.last_line["job"] == "score"
    assert done.last_line["images"] == IMAGES
    assert "error" not in done.last_line
    assert "\r" not in done.log
    assert "\x1b" not in done.log
    table = read_predictions(str(tmp_path / "table"))
    assert sorted(table["uri"].to_pylist()) == [str(path) for path in sorted((tmp_path / "images").iterdir())]
    assert table["status"].to_pylist() == ["ok"] * IMAGES
    assert set(table["predicted_class"].to_pylist()) <= set(CLASSES)


def test_what_the_job_does_not_need_stays_at_home_and_what_was_sent_is_what_runs(cluster: Cluster) -> None:
    program = "import mnist_dist, ray; ray.init(); print(mnist_dist.__file__)"
    program += "; print(ray.get(ray.remote(num_cpus=0)(lambda: __import__('mnist_dist').__file__).remote()))"
    done = submit(cluster, "python", "-c", program)
    assert done.status == "SUCCEEDED", done.log
    assert str(ROOT / ".rayignore") in done.printed
    of_driver, of_worker = (Path(line) for line in done.log.splitlines()[-2:])
    assert of_driver == of_worker
    sent = of_driver.parents[1]
    assert sent.is_relative_to(cluster.folder)
    assert {path.name for path in sent.iterdir()} == {
        "mnist_dist", "jobs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE",
    }  # fmt: skip


def test_a_submitted_job_that_fails_says_so_in_its_status_and_its_json_line(cluster: Cluster, tmp_path: Path) -> None:
    wrong, images = str(tmp_path / "no-bundle"), str(ROOT / "tests")
    command = ["python", "-m", "jobs.score", "--bundle", wrong, "--input", images, "--storage-is-shared"]
    done = submit(cluster, *command, "--output", str(tmp_path / "table"))
    assert done.code == 1
    assert done.status == "FAILED"
    assert done.last_line["job"] == "score"
    assert done.last_line["error_type"] == "BundleError"
    assert wrong in done.last_line["error"]
    assert not (tmp_path / "table").exists()


def test_a_submitted_job_refuses_a_folder_that_other_nodes_do_not_see(cluster: Cluster, tmp_path: Path) -> None:
    done = submit(cluster, "python", "-m", "jobs.train", "quickstart", "--storage", str(tmp_path))
    assert done.status == "FAILED"
    assert "--storage-is-shared" in done.last_line["error"]


def test_a_submitted_training_leaves_its_bundle(cluster: Cluster, tmp_path: Path) -> None:
    command = ["python", "-m", "jobs.train", "quickstart", "--limit", "300", "--epochs", "1", "--workers", "1"]
    where = ["--storage", str(tmp_path), "--name", "mine", "--storage-is-shared"]
    done = submit(cluster, *command, *where)
    assert done.code == 0, done.printed
    assert done.status == "SUCCEEDED"
    assert done.last_line["job"] == "train"
    assert done.last_line["bundle"] == str(tmp_path / "mine" / "bundle")
    assert "\r" not in done.log
    assert load_bundle(done.last_line["bundle"]).info.class_names == tuple("0123456789")
