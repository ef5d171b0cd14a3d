"""A lock that lets one driver at a time work on an output, on local storage and S3 alike.

The lock is a small JSON object beside the work, created only if it does not exist. Its holder renews it. A holder that
has been silent for 60 s, or whose process on this host is dead, loses the lock to the next driver that wants it. A
driver can wait for a holder that may be dead, until it renews the lock or has been silent long enough. Before it
publishes anything, a driver calls `check`. Owns: the lock object. Does not own: what it protects.
"""

import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass, replace

from mnist_dist import documents
from mnist_dist.console import Console, Stop
from mnist_dist.errors import Locked, ServiceError
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store

log = logging.getLogger(__name__)

SILENCE_S = 60.0
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_BETWEEN_LOOKS = 1.0  # A waiting driver reads the lock this often.


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The content of a lock object: the driver that holds the lock, or left it behind."""

    id: str
    host: str
    pid: int
    time: float
    """When the lock was last renewed, s since the epoch, by the holder's clock."""

    @property
    def is_alive(self) -> bool:
        """Whether the holder may be working: it renewed the lock within 60 s and is no dead process of this host."""
        if self.host == _host() and not _is_process(self.pid):
            return False
        return time.time() - self.time < SILENCE_S

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, last seen {time.time() - self.time:.0f} s ago"


def holder_of(uri: str, *, store: Store = ANYWHERE) -> Holder | None:
    """Reads who holds the lock at `uri`; None if nobody does. Changes nothing.

    Raises:
        DataError: the object is not a lock.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    try:
        data = store.read_bytes(uri)
    except FileNotFoundError:
        return None
    if not data:  # Without hard links, a lock is empty while it is being written.
        return Holder(id="", host="", pid=0, time=time.time())
    return documents.decode(data, Holder, uri=uri)


class Lock:
    """A context manager that holds the lock within its block.

    Args:
        uri: URI of the lock object.
        what: what is locked, for messages.
        wait_s: how long to wait, s, for a holder that may be dead.
        console: where to report the wait.
        stop: ends the wait.
        store: the store of the object.

    Attributes:
        lost: whether another driver was seen to hold the lock.

    Raises:
        Locked: on entering, another driver is working, or may be even after the wait; on `check`, another driver has
            taken over the lock.
        Interrupted: a signal came during the wait.
    """

    def __init__(
        self,
        uri: str,
        *,
        what: str,
        wait_s: float = 0.0,
        console: Console | None = None,
        stop: Stop | None = None,
        store: Store = ANYWHERE,
    ) -> None:
        self._uri, self._what, self._wait_s, self._console, self._stop = uri, what, wait_s, console, stop
        self._store = store
        self._owner = Holder(id=uuid.uuid4().hex, host=_host(), pid=os.getpid(), time=0.0)
        self.lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")

    def __enter__(self) -> "Lock":
        while not self._store.create_bytes(self._uri, self._content()):
            holder = holder_of(self._uri, store=self._store)
            if holder is None:
                continue
            if holder.id == self._owner.id:
                break  # The store retried our own put after its first answer was lost.
            if holder.is_alive and not self._wait_until_silent(holder):
                continue
            log.info("taking over %s from %s", self._uri, holder)
            if holder_of(self._uri, store=self._store) == holder:  # Another waiting driver may have been faster.
                self._store.delete(self._uri)
        self._thread.start()
        return self

    def _wait_until_silent(self, holder: Holder) -> bool:
        """Waits for a holder that may be dead. True: it is silent; False: the lock is free.

        Raises:
            Locked: the holder is working, or may be even after the wait.
            Interrupted: a signal came.
        """
        began = time.monotonic()
        if self._wait_s and self._console is not None:
            self._console.line(
                f"Waiting up to {self._wait_s:g} s for the lock of {self._what}, held by {holder}. It is taken over "
                f"after {SILENCE_S:g} s of silence."
            )
        while time.monotonic() - began < self._wait_s:
            if self._stop is not None:
                self._stop.check()
            time.sleep(SECONDS_BETWEEN_LOOKS)
            current = holder_of(self._uri, store=self._store)
            if current is None:
                return False
            if current != holder:
                holder = current
                break
            if not current.is_alive or time.monotonic() - began >= SILENCE_S:
                return True
        raise Locked(f"another driver is working on {self._what}: {holder}")

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._is_held():
            self._store.delete(self._uri)

    def check(self) -> None:
        """Raises Locked if another driver has taken over the lock."""
        if not self._is_held():
            raise Locked(f"another driver has taken over {self._what}, so this one stops")

    def _beat(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_BEATS):
            try:
                if not self._is_held():
                    self.lost = True
                    return
                self._store.write_bytes(self._uri, self._content())
            except (OSError, ServiceError) as error:  # The next renewal may succeed; `check` decides.
                log.warning("could not renew the lock %s: %s", self._uri, error)

    def _is_held(self) -> bool:
        holder = holder_of(self._uri, store=self._store)
        return holder is not None and holder.id == self._owner.id

    def _content(self) -> bytes:
        return documents.encode(replace(self._owner, time=time.time()))


def _host() -> str:
    """Host name and PID namespace, because containers may share a host name but not process ids."""
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
