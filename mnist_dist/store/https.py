"""The store of web servers: `https://` and `http://`, to read single objects.

Owns: what an answer means for an object: its bytes, size and etag. Does not own: requests and their failures
(`web_requests`). A web server cannot be listed or written.

Bytes are read as they are stored: the request asks for no compression, and a server that compresses all the same is an
error of the object, because a range of it would be one of the compressed bytes.
"""

import email.utils
import errno
import functools
import hashlib
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

from mnist_dist.errors import StorageError
from mnist_dist.store.base import Entry, Level, Store
from mnist_dist.store.local import atomic_file
from mnist_dist.store.uris import shown
from mnist_dist.store.web_requests import Answer, Patience, WebRequests

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_FIRST_BYTE = {"Range": "bytes=0-0"}


class HttpsStore(Store):
    """Objects by URL.

    Args:
        allow_private_hosts: whether to read from addresses that are not public.
        patience: timeouts and retries.
        sleep, now: the clock.
    """

    def __init__(
        self,
        *,
        allow_private_hosts: bool = False,
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options: dict[str, Any] = {
            "allow_private_hosts": allow_private_hosts,
            "patience": patience or Patience(),
            "sleep": sleep,
            "now": now,
        }
        self._patience: Patience = self._options["patience"]
        self.forget_clients()

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(HttpsStore, **self._options), ()  # Without the connections of this process.

    def forget_clients(self) -> None:
        """Drops the connections, so that the next call reads the settings of proxies again."""
        self._lock = threading.Lock()
        self._clients: dict[int, WebRequests] = {}

    @property
    def _requests(self) -> WebRequests:
        with self._lock:
            if os.getpid() not in self._clients:  # Connections do not survive a fork.
                self._clients = {os.getpid(): WebRequests(**self._options)}
            return self._clients[os.getpid()]

    # --- reading -----------------------------------------------------------------------------------------------------

    def read_object(self, uri: str, *, max_bytes: int) -> tuple[Entry, bytes | None]:
        """See `Store`. The size of a larger object whose server does not tell it is the least that it can be."""

        def take(answer: Answer) -> tuple[Entry, bytes | None]:
            _check(answer, uri, 200)
            size_bytes = _content_length(answer)
            if size_bytes is not None and size_bytes > max_bytes:
                return _entry(uri, answer, size_bytes), None
            data = answer.body(max_bytes=max_bytes)
            if len(data) > max_bytes:
                return _entry(uri, answer, max_bytes + 1), None
            return _entry(uri, answer, len(data)), data

        return self._requests.ask(uri, take)

    def read_bytes(self, uri: str) -> bytes:
        _, data = self.read_object(uri, max_bytes=sys.maxsize)
        assert data is not None
        return data

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        """See `Store`. A server without ranges sends the object from its start, up to the end of the range."""
        if length == 0:
            return b""

        def take(answer: Answer) -> bytes:
            if answer.status == 416:  # The range starts after the end.
                return b""
            _check(answer, uri, 200, 206)
            if answer.status == 200:
                return answer.body(max_bytes=start + length)[start : start + length]
            stop = _stop_of_range(answer, uri, start, length)
            data = answer.body(max_bytes=length)[: stop - start]
            if len(data) < stop - start:
                raise OSError(errno.EPROTO, "the server sends fewer bytes than it says", shown(uri))
            return data

        return self._requests.ask(uri, take, headers={"Range": f"bytes={start}-{start + length - 1}"})

    def entry_of(self, uri: str) -> Entry:
        def take(answer: Answer) -> Entry | None:
            if answer.status in (404, 410):
                _check(answer, uri)
            size_bytes = _content_length(answer)
            if answer.status != 200 or size_bytes is None:
                return None
            _check(answer, uri, 200)
            return _entry(uri, answer, size_bytes)

        # A server may refuse HEAD, and a signature may be good for GET alone.
        return self._requests.ask(uri, take, method="HEAD") or self._requests.ask(
            uri, lambda answer: _entry_by_get(uri, answer), headers=_FIRST_BYTE
        )

    def exists(self, uri: str) -> bool:
        try:
            self.entry_of(uri)
        except FileNotFoundError:
            return False
        return True

    def open_binary(self, uri: str) -> BinaryIO:
        """See `Store`. From a server without ranges the whole object is copied to a temporary file."""
        if self._requests.ask(uri, lambda answer: _has_ranges(uri, answer), headers=_FIRST_BYTE):
            return super().open_binary(uri)
        file = tempfile.TemporaryFile(prefix="mnist_dist-")  # noqa: SIM115 (the caller closes it)
        try:
            self._copy(uri, file)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    def local_path(self, uri: str, scratch: Path) -> Path:
        folder = scratch / hashlib.sha256(uri.encode()).hexdigest()[:16]
        path = folder / shown(uri).rpartition("/")[2]
        self.download(uri, path)
        return path

    def download(self, uri: str, path: Path) -> None:
        with atomic_file(path) as file:
            self._copy(uri, file)

    def _copy(self, uri: str, file: IO[bytes]) -> None:
        def take(answer: Answer) -> None:
            _check(answer, uri, 200)
            file.seek(0)
            file.truncate()
            file.writelines(answer.chunks())

        self._requests.ask(uri, take, total_s=self._patience.download_s)

    def scan_entries(self, uri: str) -> Iterator[Entry]:
        """Raises StorageError."""
        raise _unlistable(uri)

    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        """Raises StorageError."""
        raise _unlistable(uri)

    # --- writing: nothing --------------------------------------------------------------------------------------------

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Raises StorageError."""
        _refuse(uri)

    def create_bytes(self, uri: str, data: bytes) -> bool:
        """Raises StorageError."""
        _refuse(uri)

    def upload(self, path: Path, uri: str) -> None:
        """Raises StorageError."""
        _refuse(uri)

    def new_object(self, uri: str) -> AbstractContextManager[BinaryIO]:
        """Raises StorageError."""
        _refuse(uri)

    def move(self, source: str, target: str) -> None:
        """Raises StorageError."""
        _refuse(target)

    def delete(self, uri: str) -> None:
        """Raises StorageError."""
        _refuse(uri)

    def delete_tree(self, uri: str) -> None:
        """Raises StorageError."""
        _refuse(uri)


def _refuse(uri: str) -> NoReturn:
    raise StorageError(f"a web server is read-only; write to a folder or a bucket. Received: {shown(uri)!r}")


def _unlistable(uri: str) -> StorageError:
    return StorageError(
        "a web server cannot be listed; name a single file, an archive, or a list (CSV, Parquet, text) of the images. "
        f"Received: {shown(uri)!r}"
    )


# --- what an answer says ---------------------------------------------------------------------------------------------


def _check(answer: Answer, uri: str, *good: int) -> None:
    """Raises the error of a status that is not `good`, or of a body that is compressed."""
    status = answer.status
    if status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, "no such object", shown(uri))
    if status in (401, 403):
        raise PermissionError(errno.EACCES, f"access denied ({status})", shown(uri))
    if status not in good:
        raise OSError(errno.EIO, f"the server answers {status}", shown(uri))
    encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        words = f"the server compresses the file although it was asked not to (Content-Encoding: {encoding[:20]})"
        raise OSError(errno.EPROTO, words, shown(uri))


def _entry(uri: str, answer: Answer, size_bytes: int) -> Entry:
    """The entry of an object; without an ETag, the time of its last change and its size stand for one."""
    etag = answer.headers.get("ETag", "").strip().removeprefix("W/").strip('"')
    return Entry(uri, size_bytes, etag or f"{_modified_s(answer)}-{size_bytes}")


def _modified_s(answer: Answer) -> int:
    """`Last-Modified` in seconds since the epoch; 0 if the server does not tell."""
    try:
        return int(email.utils.parsedate_to_datetime(answer.headers.get("Last-Modified", "")).timestamp())
    except ValueError:
        return 0


def _content_length(answer: Answer) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _entry_by_get(uri: str, answer: Answer) -> Entry:
    """The entry from the answer to a request for the first byte."""
    if answer.status == 416:  # An empty object has no first byte.
        return _entry(uri, answer, _size_of_range(answer) or 0)
    _check(answer, uri, 200, 206)
    size_bytes = _size_of_range(answer) if answer.status == 206 else _content_length(answer)
    if size_bytes is None:
        size_bytes = sum(map(len, answer.chunks()))
    return _entry(uri, answer, size_bytes)


def _has_ranges(uri: str, answer: Answer) -> bool:
    """Whether the server sent the first byte alone, and told the size; an empty object needs no ranges."""
    if answer.status == 416:
        return False
    _check(answer, uri, 200, 206)
    return answer.status == 206 and _size_of_range(answer) is not None


def _size_of_range(answer: Answer) -> int | None:
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    return int(found[3]) if found is not None and found[3] != "*" else None


def _stop_of_range(answer: Answer, uri: str, start: int, length: int) -> int:
    """The end of the range that was sent; it must be the one that was asked for, up to the end of the object."""
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if found is None or found[1] is None:
        raise OSError(errno.EPROTO, "the server sends a part of the file but not which one", shown(uri))
    stop = int(found[2]) + 1
    wanted = start + length if found[3] == "*" else min(start + length, int(found[3]))
    if int(found[1]) != start or (stop != wanted if found[3] != "*" else stop > wanted):
        raise OSError(errno.EPROTO, "the server sends another part of the file than was asked for", shown(uri))
    return stop
