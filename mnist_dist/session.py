"""The context of every long step of a job: the user's console, the signals and the lock.

Owns: the loop that waits for work in another thread or process while it shows progress, handles signals and watches
the lock; when the job began. Does not own: the work.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mnist_dist.console import Console, Stop
from mnist_dist.errors import Interrupted, Locked, LockLost, MnistDistError, ServiceError
from mnist_dist.store.lock import Fence, Lock

POLL_S = 0.5  # Bounds the delay until a signal or a new progress value is noticed; the end of work is noticed at once.
_START_TICKS = 19  # in /proc/PID/stat, counted from the field after the name


def started_at(console: Console) -> float:
    """When the job began, s since the Unix epoch, for `seconds` in the JSON line: with the command's process, which
    imports for seconds before it does anything; in the user's own process, now."""
    now = time.time()
    return now if console.embedded else now - max(0.0, _process_age_s())


def _process_age_s() -> float:
    """How long this process has run. psutil knows the start to a second only: the kernel tells the time of its own
    start in whole seconds."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    except (OSError, AttributeError, IndexError, ValueError):  # Not Linux.
        return time.time() - psutil.Process().create_time()


def seconds_since(began_at: float) -> float:
    """The seconds since a time from `started_at`, as the JSON line has them."""
    return round(time.time() - began_at, 2)


@dataclass(frozen=True, kw_only=True)
class Session:
    """One process that runs one job, from its first line to its last."""

    console: Console
    stop: Stop
    lock: Lock | None = None
    """Guards what the job changes; None if it changes nothing."""
    shown: set[str] = field(default_factory=set)
    """The lines of `once`."""

    def once(self, text: str) -> None:
        """Prints a line, unless this session has printed it before: several steps may meet the same damaged image."""
        if text not in self.shown:
            self.shown.add(text)
            self.console.line(text)

    @property
    def fence(self) -> Fence:
        """The lock, whose number names what this driver makes; see `store.lock`."""
        assert self.lock is not None, "a job that changes nothing has no lock"
        return self.lock.fence

    def check(self) -> None:
        """Checks that the work may continue.

        Raises:
            Interrupted: a signal arrived.
            LockLost: another driver took over the lock.
        """
        self.stop.check()
        self.check_lock()

    def check_lock(self) -> None:
        """Raises LockLost if the lock is already known to be lost; costs nothing."""
        if self.lock is not None and self.lock.lost:
            self.lock.check()

    def confirm_lock(self) -> None:
        """Reads the lock and raises LockLost if another driver holds it; call it before deleting or publishing."""
        if self.lock is not None:
            self.lock.check()

    def watch(
        self,
        ended: Callable[[float], bool],
        *,
        show: Callable[[], None] | None = None,
        on_signal: Callable[[], None] | None = None,
    ) -> None:
        """Waits until some work has ended.

        Args:
            ended: waits up to the given seconds and returns whether the work has ended; see `SideThread.ended`.
            show: updates the progress bar; called every `POLL_S` and once more after the end.
            on_signal: called once when a signal arrives, to end the work cleanly. None: a signal raises Interrupted.

        Raises:
            Interrupted: a signal arrived and there is no `on_signal`.
            LockLost: another driver took over the lock.
        """
        is_over = is_stopping = False
        while not is_over:
            is_over = ended(POLL_S)
            if on_signal is None:
                self.stop.check()
            elif self.stop.signal_number is not None and not is_stopping:
                is_stopping = True
                on_signal()
            self.check_lock()
            if show is not None:
                show()


@contextmanager
def locked_session(
    console: Console, *, lock_uri: str, what: str, wait_s: float = 0.0, above: Callable[[], int] = lambda: 0
) -> Iterator[Session]:
    """A session that handles signals and holds a lock; see `Lock`.

    Raises:
        Locked: see `Lock`.
        LockLost: in place of an error within the block, such as a file that is gone, another driver has taken over.
    """
    with (
        Stop(console) as stop,
        Lock(lock_uri, what=what, wait_s=wait_s, console=console, stop=stop, above=above) as lock,
    ):
        try:
            yield Session(console=console, stop=stop, lock=lock)
        except (MnistDistError, OSError) as error:
            if not isinstance(error, Interrupted | Locked | LockLost | ServiceError):
                lock.check()
            raise
