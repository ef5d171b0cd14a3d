"""A web server on loopback for tests: pages with or without ranges, lengths and HEAD, redirects, and all that goes
wrong with real ones.
"""

import contextlib
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODIFIED = "Wed, 21 Oct 2015 07:28:00 GMT"
MODIFIED_S = 1_445_412_480


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the server answers for a path."""

    data: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    head_status: int | None = None
    """Of HEAD, if it is another one."""
    has_ranges: bool = True
    tells_length: bool = True
    """False: the end of the body is the end of the connection."""
    sent_bytes: int | None = None
    """Of the body, before the connection is closed. None: all."""
    extra: bytes = b""
    """Sent after the body, and not counted in its length."""
    is_silent: bool = False
    """Nothing is sent until the server is closed."""


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    headers: "Message[str, str]"


class WebServer(ThreadingHTTPServer):
    """Pages by path, with query; of several pages of a path each is shown once, and the last one from then on."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, pages: Mapping[str, Page | list[Page]] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict[str, Page | list[Page]] = dict(pages or {})
        self.asked: list[Asked] = []
        self.closed = threading.Event()
        self.sent = threading.Semaphore(0)
        """Released after each body, whole or not."""
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(self, path: str, *pages: Page, data: bytes = b"", **fields: Any) -> str:
        """Makes a page (or several, one after another) and returns its URL."""
        self.pages[path] = list(pages) if pages else Page(data=data, **fields)
        return self.url + path

    def page(self, asked: Asked) -> Page:
        """The page for a request, which is noted."""
        with self._lock:
            self.asked.append(asked)
            found = self.pages.get(asked.path, Page(status=404))
            if isinstance(found, Page):
                return found
            return found.pop(0) if len(found) > 1 else found[0]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is what some tests are about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent apart
    server: WebServer

    def do_HEAD(self) -> None:
        self._answer(self._page())

    def do_GET(self) -> None:
        self._answer(self._page())

    def _page(self) -> Page:
        return self.server.page(Asked(self.command, self.path, self.headers))

    def _answer(self, page: Page) -> None:
        if page.is_silent:
            self.server.closed.wait()
        status, data, headers = page.status, page.data, {"ETag": '"tag"', **page.headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.command == "HEAD" and page.head_status is not None:
            status = page.head_status
        elif asked is not None and page.has_ranges and status == 200:
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            status = 206 if start < len(data) else 416
            headers.setdefault(
                "Content-Range", f"bytes {start}-{end - 1}/{len(data)}" if status == 206 else f"bytes */{len(data)}"
            )
            data = data[start:end] if status == 206 else b""
        self._send(page, status, data, headers)

    def _send(self, page: Page, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        if page.tells_length:
            self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.close_connection = page.sent_bytes is not None or not page.tells_length
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        try:
            if self.command == "GET":
                self.wfile.write(data[: page.sent_bytes] + page.extra)
        finally:
            self.server.sent.release()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def running_web_server(*, certificate: Path | None = None) -> Iterator[WebServer]:
    """A server that runs while the block does, encrypted if there is a certificate."""
    server = WebServer()
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.closed.set()
        server.shutdown()
        server.server_close()
