"""One driver at a time: a lock that lies beside the work, on local storage and S3 alike.

The lock is one small JSON object, created only where there is none. Its holder renews it; a holder that is silent for
60 s, or a process of this host that is dead, loses it to the next who asks. Whoever asks while the holder may only be
lost waits, until it is silent for long enough or renews the lock. Whoever is about to publish something calls `check`
first.
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
SECONDS_BETWEEN_LOOKS = 1.0  # of one who waits


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock, or left it behind: what the object says."""

    id: str
    host: str
    pid: int
    time: float
    """When the lock was last renewed, s since the epoch, by the holder's clock."""

    @property
    def is_alive(self) -> bool:
        """Whether the holder may still be at work: heard of within the last 60 s, and no dead process of this host."""
        if self.is_of_this_host and not _is_process(self.pid):
            return False
        return time.time() - self.time < SILENCE_S

    @property
    def is_of_this_host(self) -> bool:
        return self.host == _host()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, last heard of {time.time() - self.time:.0f} s ago"


def holder_of(uri: str, *, store: Store = ANYWHERE) -> Holder | None:
    """Who holds the lock at `uri`, or None; takes nothing and changes nothing.

    Raises:
        DataError: the object there is no lock.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    try:
        data = store.read_bytes(uri)
    except FileNotFoundError:
        return None
    if not data:  # where there are no hard links: somebody is just writing it
        return Holder(id="", host="", pid=0, time=time.time())
    return documents.decode(data, Holder, uri=uri)


class Lock:
    """Held from entering to leaving.

    Args:
        uri: of the lock object.
        what: what is locked, for messages.
        wait_s: how long to wait, s, for a holder that may be lost.
        console: where it is said that there is something to wait for.
        stop: ends the waiting.
        store: where the object lies.

    Attributes:
        lost: another driver was seen to hold it.

    Raises:
        Locked: on entering, another driver is at work, or was heard of within the last 60 s even after the waiting; on
            `check`, the lock was taken away.
        Interrupted: a signal came while it waited.
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
                break  # our own put, whose answer was lost and which was tried again
            if holder.is_alive and not self._falls_silent(holder):
                continue
            log.info("taking over %s from %s", self._uri, holder)
            if holder_of(self._uri, store=self._store) == holder:  # another one who waited may have been quicker
                self._store.delete(self._uri)
        self._thread.start()
        return self

    def _falls_silent(self, holder: Holder) -> bool:
        """Waits for a holder that may be lost; whether it is. False: the lock is free.

        Raises:
            Locked: the holder is at work, or it may be even after the waiting.
            Interrupted: a signal came.
        """
        began = time.monotonic()
        if self._wait_s and self._console is not None:
            self._console.line(
                f"waiting up to {self._wait_s:g} s for the lock of {self._what}: it is held by {holder}, and is taken "
                f"over after {SILENCE_S:g} s of silence"
            )
        while time.monotonic() - began < self._wait_s:
            if self._stop is not None:
                self._stop.check()
            time.sleep(SECONDS_BETWEEN_LOOKS)
            now = holder_of(self._uri, store=self._store)
            if now is None:
                return False
            if now != holder:
                break
            if not now.is_alive or time.monotonic() - began >= SILENCE_S:
                return True
        raise Locked(f"another driver is at work on {self._what}: {holder}")

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._is_ours():
            self._store.delete(self._uri)

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
                self._store.write_bytes(self._uri, self._content())
            except (OSError, ServiceError) as error:  # the next beat may get through; `check` decides
                log.warning("the lock %s could not be renewed: %s", self._uri, error)

    def _is_ours(self) -> bool:
        holder = holder_of(self._uri, store=self._store)
        return holder is not None and holder.id == self._owner.id

    def _content(self) -> bytes:
        return documents.encode(replace(self._owner, time=time.time()))


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
