"""One driver at a time: a lock that lies beside the work, on local storage and S3 alike.

The lock is one small JSON object, created only where there is none. Its holder renews it; a holder that is silent for
60 s, or a process of this host that is dead, loses it to the next who asks. Whoever is about to publish something
calls `check` first.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from mnist_dist import storage
from mnist_dist.errors import Locked, ServiceError

log = logging.getLogger(__name__)

SILENCE_S = 60.0
SECONDS_BETWEEN_BEATS = 10.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock, or left it behind."""

    host: str
    pid: int
    is_alive: bool
    """He may still be at work: heard of within the last 60 s, and no dead process of this host."""


def holder_of(uri: str) -> Holder | None:
    """Who holds the lock at `uri`, or None; takes nothing and changes nothing.

    Raises:
        ValueError, TypeError, KeyError: the object there is no lock.
        PermissionError, ServiceError, StorageError: see `storage`.
    """
    holder = _read(uri)
    if holder is None:
        return None
    return Holder(host=str(holder["host"]), pid=int(holder["pid"]), is_alive=_is_alive(holder))


class Lock:
    """Held from entering to leaving.

    Args:
        uri: of the lock object.
        what: what is locked, for messages.

    Attributes:
        lost: another driver was seen to hold it.

    Raises:
        Locked: on entering, another driver holds it; on `check`, it was taken away.
    """

    def __init__(self, uri: str, *, what: str) -> None:
        self._uri, self._what = uri, what
        self._owner = {"id": uuid.uuid4().hex, "host": _host(), "pid": os.getpid()}
        self.lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")

    def __enter__(self) -> "Lock":
        while not storage.create_bytes(self._uri, self._content()):
            holder = _read(self._uri)
            if holder is None:
                continue
            if holder["id"] == self._owner["id"]:
                break  # our own put, whose answer was lost and which was tried again
            if _is_alive(holder):
                raise Locked(
                    f"another driver is at work on {self._what}: process {holder['pid']} on {holder['host']}, last "
                    f"heard of {time.time() - holder['time']:.0f} s ago"
                )
            log.info("taking over %s from process %s on %s", self._uri, holder["pid"], holder["host"])
            storage.delete(self._uri)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._is_ours():
            storage.delete(self._uri)

    def check(self) -> None:
        """Raises Locked where another driver has taken the lock away."""
        if not self._is_ours():
            raise Locked(f"another driver has taken over {self._what}; this one stops")

    def _beat(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_BEATS):
            try:
                if not self._is_ours():
                    self.lost = True
                    return
                storage.write_bytes(self._uri, self._content())
            except (OSError, ServiceError) as error:  # the next beat may get through; `check` decides
                log.warning("the lock %s could not be renewed: %s", self._uri, error)

    def _is_ours(self) -> bool:
        holder = _read(self._uri)
        return holder is not None and holder["id"] == self._owner["id"]

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "time": time.time()}).encode()


def _read(uri: str) -> dict[str, Any] | None:
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    if not data:  # where there are no hard links: somebody is just writing it
        return {"id": "", "host": "", "pid": 0, "time": time.time()}
    return dict(json.loads(data))


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the holder may still be at work; a number of a dead process may belong to another by now."""
    if holder["host"] == _host() and not _is_process(holder["pid"]):
        return False
    return bool(time.time() - holder["time"] < SILENCE_S)


def _host() -> str:
    """This host, as far as process numbers mean the same: containers may share a name, but not their processes."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
