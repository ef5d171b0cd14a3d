"""Requests to web servers: connections, proxies, redirects, retries, and the meaning of failures.

Owns: everything up to an answer with a body that can be read, and trying again. Does not own: what an answer means for
an object (`https`), or which addresses are allowed (`public_hosts`).

Each host is a service of its own: one that cannot be reached, breaks off, or answers 429 or 5xx after all retries costs
its own objects (`OSError`), because a list may name thousands of hosts, and some are always dead. It is a ServiceError

- where the only host that has ever answered this process fails `FAILURES_IN_A_ROW` times in a row: that host is the
  service, and it went down;
- where so many different hosts fail in a row and none answers for `NETWORK_S`: there is no network;
- where a proxy fails or asks for a password, or the process may open no more sockets.

No message holds the user info or the query of a URL. For that reason nothing here quotes an error of urllib3, whose
messages hold whole URLs.
"""

import base64
import contextlib
import email.utils
import errno
import itertools
import logging
import random
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import unquote, urljoin

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import Timeout, Url, parse_url

from mnist_dist.errors import ServiceError
from mnist_dist.store.public_hosts import POOLS, PrivateAddress, public_addresses
from mnist_dist.urls import WEB, shown

MAX_REDIRECTS = 5
FAILURES_IN_A_ROW = 8
NETWORK_S = 60.0
_CONNECTIONS, _HOSTS = 32, 64  # Kept open: so many of a host, as an actor has reading threads, and of so many hosts.
_CHUNK_BYTES = 2**16
_TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 531)})  # 520 to 530: Cloudflare's own 502 to 504
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NO_SOCKETS = frozenset({errno.EMFILE, errno.ENFILE})
_DEFAULT_PORTS = {"http": 80, "https": 443}
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait for a web server, and how often to ask it again."""

    connect_s: float = 10.0
    silence_s: float = 30.0
    """Longest wait for the next bytes."""
    total_s: float = 300.0
    """Of a read, with all its retries."""
    download_s: float = 3600.0
    """Of a whole file that is copied to disk, with all its retries."""
    attempts: int = 5
    backoff_s: float = 0.5
    """Before the second attempt; it doubles with each one, less up to a half at random."""
    max_wait_s: float = 60.0
    """Between two attempts, also where the server asks for a longer wait (`Retry-After`)."""


class _Temporary(Exception):
    """An attempt failed, and another one may not.

    Args:
        words: what happened, without the URL.
        retry_after_s: the wait that the server asked for.
        of_proxy: the proxy failed, not the host.
        is_silence: the host gave no answer.
    """

    def __init__(
        self, words: str, *, retry_after_s: float | None = None, of_proxy: bool = False, is_silence: bool = False
    ) -> None:
        super().__init__(words)
        self.words, self.retry_after_s = words, retry_after_s
        self.of_proxy, self.is_silence = of_proxy, is_silence


class Answer:
    """An answer of a web server, with a body that is read in pieces."""

    def __init__(self, response: urllib3.BaseHTTPResponse, *, expired: Callable[[], bool]) -> None:
        self._response, self._expired = response, expired
        self.status: int = response.status
        self.headers: Mapping[str, str] = response.headers

    def chunks(self) -> Iterator[bytes]:
        """The body as it was sent, in pieces."""
        while chunk := self._response.read1(_CHUNK_BYTES, decode_content=False):
            if self._expired():
                raise _Temporary("the server sends too slowly")
            yield chunk

    def body(self, *, max_bytes: int) -> bytes:
        """The body, of which reading stops as soon as there are more than `max_bytes` (one piece more, at most)."""
        data = bytearray()
        for chunk in self.chunks():
            data += chunk
            if len(data) > max_bytes:
                break
        return bytes(data)


class WebRequests:
    """Requests of one process; safe for several threads.

    Args:
        allow_private_hosts: whether to connect to addresses that are not public.
        patience: timeouts and retries.
        sleep, now: the clock.
    """

    def __init__(
        self,
        *,
        allow_private_hosts: bool,
        patience: Patience,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # Its warnings hold whole URLs.
        self._allow_private_hosts, self._patience = allow_private_hosts, patience
        self._sleep, self._now = sleep, now
        self._options: dict[str, Any] = {
            "num_pools": _HOSTS,
            "maxsize": _CONNECTIONS,
            "ssl_context": ssl.create_default_context(),  # One for all: loading the certificates takes a while.
        }
        self._direct = urllib3.PoolManager(**self._options)
        if not allow_private_hosts:
            self._direct.pool_classes_by_scheme = POOLS
        self._proxies = {scheme: self._proxy(scheme) for scheme in WEB}
        self._outages = _Outages(now)

    def ask(
        self,
        uri: str,
        take: Callable[[Answer], Value],
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        total_s: float | None = None,
    ) -> Value:
        """Sends a request, follows redirects, and returns what `take` makes of the answer; repeats all of it.

        Args:
            uri: the URL.
            take: reads the answer; called again with a new one if its body breaks off.
            method: of HTTP.
            headers: besides the usual ones.
            total_s: limit for everything; None: that of `Patience`.

        Raises:
            PermissionError: the host is private.
            OSError: the host gives no proper answer, or the URL is not one.
            ServiceError: see the module.
        """
        deadline = self._now() + (total_s or self._patience.total_s)
        host = shown(uri).split("/")[2]
        for attempt in itertools.count(1):
            try:
                with self._answer(uri, method, headers or {}, deadline) as answer:
                    self._outages.note_answer(host)
                    return take(answer)
            except _Temporary as failure:
                wait_s = self._wait_s(attempt, failure)
                is_last = attempt >= self._patience.attempts or self._outages.is_silent(host)
                if is_last or self._now() + wait_s >= deadline:
                    raise self._outages.meaning(failure, uri, host) from None
            self._sleep(wait_s)
        raise AssertionError("the loop ends by returning or raising")

    def _wait_s(self, attempt: int, failure: _Temporary) -> float:
        backoff_s = self._patience.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
        wanted_s = backoff_s if failure.retry_after_s is None else failure.retry_after_s
        return max(0.0, min(wanted_s, self._patience.max_wait_s))

    # --- one attempt -------------------------------------------------------------------------------------------------

    @contextmanager
    def _answer(self, uri: str, method: str, headers: Mapping[str, str], deadline: float) -> Iterator[Answer]:
        with _failures(uri, self._patience):
            try:
                response = self._follow(uri, method, headers)
            except ValueError:  # urllib3's LocationValueError is one, too.
                raise OSError(errno.EINVAL, "not a valid URL", shown(uri)) from None
            try:
                if response.status == 407:
                    raise ServiceError(f"{shown(uri)}: the proxy asks for a password (407)")
                if response.status in _TEMPORARY:
                    wait_s = _retry_after_s(response.headers.get("Retry-After"))
                    raise _Temporary(f"the server answers {response.status}", retry_after_s=wait_s)
                yield Answer(response, expired=lambda: self._now() >= deadline)
            finally:
                response.close()  # Where the body was read to its end, the connection is back in its pool already.

    def _follow(self, uri: str, method: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        url = _parsed(uri)
        credentials = url.auth or ""
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(url, method, headers, credentials)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return response
            response.close()
            target = _parsed(urljoin(url.url, location))
            is_same = _origin(target) == _origin(url)
            # Credentials belong to the server that they were given for.
            url, credentials = target, target.auth or (credentials if is_same else "")
        raise OSError(errno.ELOOP, f"more than {MAX_REDIRECTS} redirects", shown(uri))

    def _send(self, url: Url, method: str, headers: Mapping[str, str], credentials: str) -> urllib3.BaseHTTPResponse:
        own = {"User-Agent": "mnist_dist", "Accept": "*/*", "Accept-Encoding": "identity"}
        basic = {"Authorization": _basic(credentials)} if credentials else {}
        return self._manager(url).urlopen(
            method,
            url._replace(auth=None).url,
            headers={**own, **basic, **headers},
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
            timeout=Timeout(connect=self._patience.connect_s, read=self._patience.silence_s),
        )

    # --- proxies -----------------------------------------------------------------------------------------------------

    def _proxy(self, scheme: str) -> urllib3.ProxyManager | None:
        """The proxy of a scheme, from the usual variables such as `https_proxy`."""
        found = urllib.request.getproxies()
        address = found.get(scheme) or found.get("all")
        if not address:
            return None
        url = parse_url(address if "://" in address else f"http://{address}")
        if url.scheme not in WEB:
            raise ServiceError(f"a proxy must be http:// or https://. Received: {url.scheme}:// for {scheme}://")
        headers = {"Proxy-Authorization": _basic(url.auth)} if url.auth else None
        return urllib3.ProxyManager(url._replace(auth=None).url, proxy_headers=headers, **self._options)

    def _manager(self, url: Url) -> urllib3.PoolManager:
        host, proxy = url.host or "", self._proxies[url.scheme or ""]
        if proxy is None or urllib.request.proxy_bypass(host):
            return self._direct
        if not self._allow_private_hosts:
            # The proxy resolves the name, often without our seeing it: then the proxy decides what may be reached.
            with contextlib.suppress(socket.gaierror):
                public_addresses(host, url.port or _DEFAULT_PORTS[url.scheme or ""])
        return proxy


class _Outages:
    """Remembers which hosts fail, to tell a dead host from a service or a network that went down."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._lock = now, threading.Lock()
        self._only_host: str | None = None
        """The only host that has answered so far; empty: several have."""
        self._answered_at = now()
        self._failures: dict[str, int] = {}
        """Since the last answer of any host, by host."""
        self._silent: set[str] = set()
        """Hosts that gave no answer in all attempts: they get a single one until they answer."""

    def is_silent(self, host: str) -> bool:
        return host in self._silent

    def note_answer(self, host: str) -> None:
        with self._lock:
            self._only_host = host if self._only_host in (None, host) else ""
            self._answered_at = self._now()
            self._failures.clear()
            self._silent.discard(host)

    def meaning(self, failure: _Temporary, uri: str, host: str) -> Exception:
        """The error for a request that failed in all attempts."""
        if failure.of_proxy:
            return ServiceError(f"{shown(uri)}: {failure.words}")
        with self._lock:
            self._failures[host] = self._failures.get(host, 0) + 1
            if failure.is_silence:
                self._silent.add(host)
            is_down = host == self._only_host and self._failures[host] >= FAILURES_IN_A_ROW
            is_long_ago = self._now() - self._answered_at >= NETWORK_S
            no_network = len(self._failures) >= FAILURES_IN_A_ROW and is_long_ago
        if is_down:
            return ServiceError(f"{shown(uri)}: {failure.words}; the host answered before, and now fails each time")
        if no_network:
            return ServiceError(f"{shown(uri)}: {failure.words}; nor does any other host answer: is there a network?")
        return OSError(errno.EIO, failure.words, shown(uri))


# --- failures --------------------------------------------------------------------------------------------------------


@contextmanager
def _failures(uri: str, patience: Patience) -> Iterator[None]:
    try:
        yield
    except PrivateAddress as private:
        words = f"the host has the address {private.address}, which is not public (--allow-private-hosts allows it)"
        raise PermissionError(errno.EACCES, words, shown(uri)) from None
    except HTTPError as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError) and cause.errno in _NO_SOCKETS:
            raise ServiceError(f"{shown(uri)}: {cause.strerror}") from None
        if isinstance(cause, ssl.SSLCertVerificationError):
            words = f"the certificate is not trusted: {cause.verify_message}"
            raise OSError(errno.EPROTO, words, shown(uri)) from None
        raise _temporary(error, cause, patience) from None


def _temporary(error: HTTPError, cause: BaseException | None, patience: Patience) -> _Temporary:
    if isinstance(error, ProxyError):
        return _Temporary("the proxy cannot be reached", of_proxy=True)
    if isinstance(error, NameResolutionError):
        return _Temporary("the host name cannot be resolved", is_silence=True)
    if isinstance(error, NewConnectionError):
        reason = cause.strerror if isinstance(cause, OSError) else None
        return _Temporary(f"no connection: {reason or 'refused'}", is_silence=True)
    if isinstance(error, ConnectTimeoutError):
        return _Temporary(f"no connection within {patience.connect_s:g} s", is_silence=True)
    if isinstance(error, ReadTimeoutError):
        return _Temporary(f"no data for {patience.silence_s:g} s", is_silence=True)
    if isinstance(error, SSLError):
        return _Temporary("no encrypted connection (TLS)", is_silence=True)
    return _Temporary("the connection broke off")


def _retry_after_s(value: str | None) -> float | None:
    """Seconds of a `Retry-After`, which is a number of them or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        at = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()


def _parsed(uri: str) -> Url:
    """The parts of a URL.

    Raises:
        ValueError: it is not one, or has another scheme.
    """
    url = parse_url(uri)
    if url.scheme not in WEB or not url.host:
        raise ValueError("not a URL of a web server")
    return url


def _basic(credentials: str) -> str:
    """The value of an authorisation header for the user info of a URL."""
    return f"Basic {base64.b64encode(unquote(credentials).encode()).decode()}"


def _origin(url: Url) -> tuple[str | None, str | None, int | None]:
    return url.scheme, url.host, url.port or _DEFAULT_PORTS[url.scheme or ""]
