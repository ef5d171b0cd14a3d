"""A lock that lets one driver at a time work on an output, on every store that can put an object if it is absent.

```
<lock>/000017        a driver took the lock as the 17th; written only if absent, and never changed
<lock>/000017.beat   the same driver is working, or has released the lock; renewed every 10 s
```

The highest number holds the lock, and it stays when the lock is released, so that numbers only grow; only a first
driver that made nothing leaves nothing. The number is the holder's fence: work and files carry it in their names, and
so a driver that was suspended and wakes up late cannot touch what its successor made. A driver takes the next number
once the holder has released the lock, is a dead process of this host, or has not renewed its beat for 60 s of the
waiting driver's own clock; clocks of two hosts are never compared. Before it deletes or publishes anything, a driver
calls `check`.

Owns: the objects of the lock. Does not own: what it protects, or the default of `--lock-wait-s` (`config.py`).
"""

import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from mnist_dist import documents
from mnist_dist.console import Console, Stop
from mnist_dist.errors import Locked, LockLost, ServiceError
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import join

log = logging.getLogger(__name__)

SILENCE_S = 60.0
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_BETWEEN_LOOKS = 1.0  # A waiting driver reads the lock this often.
_NAME = re.compile(r"\.?(\d{6,})(\..*)?")  # Killed writes on a local disk leave `.000017.beat.<hex>.tmp`.


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The content of a lock object: the driver that holds the lock, held it, or left it behind."""

    id: str
    host: str
    pid: int
    time: float
    """When the lock was last renewed, s since the epoch, by the holder's clock; for display only."""
    released: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether the driver is known to have ended: it released the lock, or is a dead process of this host."""
        return self.released or (self.host == _host() and not _is_process(self.pid))

    @property
    def seems_alive(self) -> bool:
        """Whether the driver has probably not ended, for display: it renewed the lock within 60 s, if clocks agree."""
        return not self.is_gone and time.time() - self.time < SILENCE_S

    def __str__(self) -> str:
        if not self.host:
            return "a driver that has not written its name yet"
        return f"process {self.pid} on {self.host}, last seen {time.time() - self.time:.0f} s ago"


def holder_of(uri: str, *, store: Store = ANYWHERE) -> Holder | None:
    """Reads who holds the lock at `uri`; None if nobody does. Changes nothing.

    Raises:
        DataError: an object of the lock is damaged.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    objects = _Objects(uri, store)
    number = objects.highest()
    holder = objects.read(number) if number else None
    return None if holder is None or holder.released else holder


@dataclass(frozen=True)
class Fence:
    """The number under which a driver holds a lock, as its workers know it; can be pickled."""

    uri: str
    """URI of the lock."""
    number: int
    id: str
    """The driver's id, because numbers start again in a folder that was deleted."""
    store: Store = ANYWHERE

    def is_held(self) -> bool:
        """Whether the driver still holds the lock."""
        return _Objects(self.uri, self.store).is_held(self.number, id=self.id)

    def check(self) -> None:
        """Raises LockLost if another driver has taken over."""
        if not self.is_held():
            raise LockLost(f"another driver has taken over, so this worker stops. Received: {self.uri}, {self.number}")


@dataclass(frozen=True)
class _Objects:
    """The objects of one lock."""

    uri: str
    store: Store

    def names(self) -> dict[str, int]:
        """Each object's number, by its name."""
        names = (entry.uri.removeprefix(f"{self.uri}/") for entry in self.store.scan_entries(self.uri))
        return {name: int(match[1]) for name in names if (match := _NAME.fullmatch(name))}

    def highest(self) -> int:
        """The number that holds the lock; 0 if it was never taken."""
        return max((number for name, number in self.names().items() if name.isdecimal()), default=0)

    def create(self, number: int, holder: Holder) -> bool:
        """Takes a number unless another driver has it."""
        return self.store.create_bytes(join(self.uri, f"{number:06d}"), documents.encode(holder))

    def renew(self, number: int, holder: Holder) -> None:
        self.store.write_bytes(join(self.uri, f"{number:06d}.beat"), documents.encode(holder))

    def read(self, number: int) -> Holder | None:
        """The driver that took a number, as of its newest beat; None if the number was deleted in the meantime."""
        taken, beat = self._read(f"{number:06d}"), self._read(f"{number:06d}.beat")
        return beat if taken is not None and beat is not None and beat.id == taken.id else taken

    def _read(self, name: str) -> Holder | None:
        try:
            data = self.store.read_bytes(join(self.uri, name))
        except FileNotFoundError:
            return None
        if not data:  # Without hard links, an object is empty for a moment, or for ever if its driver died then.
            return Holder(id="", host="", pid=0, time=0.0)
        return documents.decode(data, Holder, uri=join(self.uri, name))

    def is_held(self, number: int, *, id: str) -> bool:
        """Whether the driver with this id holds the lock under this number."""
        if self.highest() != number:
            return False
        holder = self._read(f"{number:06d}")
        return holder is not None and holder.id == id

    def delete(self, number: int) -> None:
        for name in (f"{number:06d}.beat", f"{number:06d}"):
            self.store.delete(join(self.uri, name))

    def delete_below(self, number: int) -> None:
        for name, other in self.names().items():
            if other < number:
                self.store.delete(join(self.uri, name))


class Lock:
    """A context manager that holds the lock within its block.

    Args:
        uri: URI of the folder with the lock's objects.
        what: what is locked, for messages.
        wait_s: how long to wait, s, for a holder that may be dead.
        console: where to report the wait.
        stop: ends the wait.
        within: the lock of the job that this one's work is a part of; with that lock, this one is lost.
        above: gives the highest number that work and files carry; 0: they carry none. The lock's number is greater,
            even where the folder of the lock was deleted, or is an old copy.
        store: the store of the objects.

    Attributes:
        number: greater than that of every earlier holder. 0 before the block.
        lost: whether another driver was seen to hold the lock.

    Raises:
        Locked: on entering, another driver is working, or may be even after the wait.
        LockLost: on `check`, another driver has taken over the lock.
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
        within: Fence | None = None,
        above: Callable[[], int] = lambda: 0,
        store: Store = ANYWHERE,
    ) -> None:
        self._objects = _Objects(uri, store)
        self._what, self._wait_s, self._console, self._stop, self._above = what, wait_s, console, stop, above
        self._within = within
        self._owner = Holder(id=uuid.uuid4().hex, host=_host(), pid=os.getpid(), time=0.0)
        self.number = 0
        self.lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")

    def __enter__(self) -> "Lock":
        while not self._take_unless_raced():
            pass
        self._thread.start()
        return self

    def _take_unless_raced(self) -> bool:
        try:
            return self._take()
        except (FileNotFoundError, FileExistsError):  # A driver that leaves nothing has just deleted the folder.
            return False

    def _take(self) -> bool:
        """Tries to take the next number; False: another driver was faster, so look again."""
        before = self._objects.highest()
        if before:
            holder = self._objects.read(before)
            if holder is None:
                return False
            if holder.id == self._owner.id:  # The store repeated our own put after its first answer was lost.
                return self._hold(before)
            if not holder.is_gone and not self._wait_until_silent(before, holder):
                return False
            log.info("taking over %s from %s", self._objects.uri, holder)
        number = max(before, self._above()) + 1
        if not self._objects.create(number, self._now()):
            return False
        if self._objects.highest() != number:  # We were slow: this number had been taken, left and deleted before.
            self._objects.delete(number)
            return False
        return self._hold(number)

    def _hold(self, number: int) -> bool:
        self.number = number
        self._objects.delete_below(number)
        return True

    def _wait_until_silent(self, number: int, holder: Holder) -> bool:
        """Waits for a holder that may be dead. True: it is silent or gone; False: another driver has taken the lock.

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
        waited_s = 0.0
        while waited_s < self._wait_s:
            if self._stop is not None:
                self._stop.check()
            time.sleep(SECONDS_BETWEEN_LOOKS)
            waited_s = time.monotonic() - began  # before the look: this waiter, too, may be suspended in between
            current = self._objects.read(number)
            if current is None:
                return False
            if current.is_gone:
                return True
            if current != holder:
                holder = current
                break
            if waited_s >= SILENCE_S:
                return True
        raise Locked(f"another driver is working on {self._what}: {holder}")

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if not self._objects.is_held(self.number, id=self._owner.id):
            return
        if self.number == 1 and not self._above():
            self._objects.delete(self.number)
            self._objects.store.delete_empty_folder(self._objects.uri)
        else:
            self._objects.renew(self.number, replace(self._now(), released=True))

    @property
    def fence(self) -> Fence:
        """The lock for workers."""
        return Fence(self._objects.uri, self.number, self._owner.id, self._objects.store)

    def check(self) -> None:
        """Raises LockLost if another driver has taken over the lock."""
        if not self._is_held():
            raise LockLost(f"another driver has taken over {self._what}, so this one stops")

    def _beat(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_BEATS):
            try:
                if not self._is_held():
                    self.lost = True
                    return
                self._objects.renew(self.number, self._now())
            except (OSError, ServiceError) as error:  # The next renewal may succeed; `check` decides.
                log.warning("could not renew the lock %s: %s", self._objects.uri, error)

    def _is_held(self) -> bool:
        is_held = self._objects.is_held(self.number, id=self._owner.id)
        return is_held and (self._within is None or self._within.is_held())

    def _now(self) -> Holder:
        return replace(self._owner, time=time.time())


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
