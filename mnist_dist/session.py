"""What every long piece of work of a job has at hand: the person's console, the signals, the lock.

Owns: the one loop that waits for work in another thread or process while progress is shown, signals are heard and the
lock is watched. Does not own: the work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mnist_dist.console import Console, Stop
from mnist_dist.store.lock import Lock

POLL_S = 0.5  # how soon a signal is heard and a bar moves; work that ends is noticed at once


@dataclass(frozen=True, kw_only=True)
class Session:
    """One process at work on one job, from its first line to its last."""

    console: Console
    stop: Stop
    lock: Lock | None = None
    """Of what the job changes; None where it changes nothing."""

    def check(self) -> None:
        """Looks whether the work may continue.

        Raises:
            Interrupted: a signal came.
            Locked: another driver has taken over.
        """
        self.stop.check()
        self.check_lock()

    def check_lock(self) -> None:
        """Raises Locked where another driver was seen to have taken over; costs nothing."""
        if self.lock is not None and self.lock.lost:
            self.lock.check()

    def confirm_lock(self) -> None:
        """Reads the lock, and raises Locked where it is another driver's: before anything is deleted or published."""
        if self.lock is not None:
            self.lock.check()

    def watch(
        self,
        ended: Callable[[float], bool],
        *,
        show: Callable[[], None] | None = None,
        on_signal: Callable[[], None] | None = None,
    ) -> None:
        """Waits for the end of some work.

        Args:
            ended: waits for up to so many s; whether the work has ended, such as `SideThread.ended`.
            show: moves a bar; called a few times a second, and once more after the end.
            on_signal: called once where a signal comes, to end the work in good order. None: a signal raises.

        Raises:
            Interrupted: a signal came, and there is no `on_signal`.
            Locked: another driver has taken over.
        """
        is_over = is_asked = False
        while not is_over:
            is_over = ended(POLL_S)
            if on_signal is None:
                self.stop.check()
            elif self.stop.signal_number is not None and not is_asked:
                is_asked = True
                on_signal()
            self.check_lock()
            if show is not None:
                show()


@contextmanager
def locked_session(console: Console, *, lock_uri: str, what: str, wait_s: float = 0.0) -> Iterator[Session]:
    """A session that takes the signals and holds a lock; see `Lock`."""
    with (
        Stop(console) as stop,
        Lock(lock_uri, what=what, wait_s=wait_s, console=console, stop=stop) as lock,
    ):
        yield Session(console=console, stop=stop, lock=lock)
