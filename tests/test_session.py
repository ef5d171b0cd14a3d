"""The one loop that waits: it ends with the work, hears signals, and watches the lock."""

import os
import signal
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mnist_dist.console import Console, Stop
from mnist_dist.errors import DataError, Interrupted, LockLost, ServiceError
from mnist_dist.session import Session, locked_session
from mnist_dist.side_thread import SideThread
from mnist_dist.store.lock import Fence, Lock

CONSOLE = Console(terminal=False)


def test_the_end_of_the_work_is_shown_last() -> None:
    shown: list[str] = []
    with Stop(CONSOLE) as stop:
        work = SideThread(lambda: shown.append("worked"), name="work")
        work.start()
        Session(console=CONSOLE, stop=stop).watch(work.ended, show=lambda: shown.append("shown"))
    assert "worked" in shown[:-1]
    assert shown[-1] == "shown"


def test_a_signal_raises_where_nobody_takes_it() -> None:
    with Stop(CONSOLE) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="same command"):
            Session(console=CONSOLE, stop=stop).watch(lambda timeout_s: False)


def test_a_signal_is_passed_on_once_and_the_work_ends_by_itself() -> None:
    asked = threading.Event()
    calls: list[int] = []

    def ask() -> None:
        calls.append(1)
        asked.set()

    with Stop(CONSOLE) as stop:
        work = SideThread(lambda: asked.wait(60), name="work")
        work.start()
        os.kill(os.getpid(), signal.SIGINT)
        Session(console=CONSOLE, stop=stop).watch(work.ended, on_signal=ask)
    assert (calls, work.result()) == ([1], True)


def take_over(uri: Path) -> None:
    """As another driver."""
    (uri / "000017").write_text('{"id": "other", "host": "h", "pid": 1, "time": 0}')


def test_a_lock_that_was_lost_ends_the_wait(tmp_path: Path) -> None:
    with Stop(CONSOLE) as stop, Lock(str(tmp_path / "lock"), what="the run") as lock:
        take_over(tmp_path / "lock")
        lock.lost = True  # as its thread would find
        with pytest.raises(LockLost, match="taken over the run"):
            Session(console=CONSOLE, stop=stop, lock=lock).watch(lambda timeout_s: False)


def fail_after_another_took_over(uri: Path, error: Exception) -> None:
    take_over(uri)
    raise error


def locked(folder: Path, **fields: Any) -> AbstractContextManager[Session]:
    return locked_session(CONSOLE, lock_uri=str(folder / "lock"), what="the run", **fields)


def test_a_locked_session_has_the_number_of_its_lock(tmp_path: Path) -> None:
    with locked(tmp_path, above=lambda: 16) as session:
        assert session.fence == Fence(str(tmp_path / "lock"), 17, session.fence.id)
        session.fence.check()
        session.confirm_lock()
        take_over(tmp_path / "lock")
        (tmp_path / "lock" / "000017").rename(tmp_path / "lock" / "000018")
        for check in (session.fence.check, session.confirm_lock):
            with pytest.raises(LockLost, match="another driver has taken over"):
                check()


@pytest.mark.parametrize("error", [FileNotFoundError("it is gone"), DataError("it is damaged")])
def test_what_fails_because_another_driver_has_taken_over_says_so(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(LockLost, match="taken over the run"), locked(tmp_path):
        fail_after_another_took_over(tmp_path / "lock", error)


@pytest.mark.parametrize("error", [FileNotFoundError("it is gone"), DataError("it is damaged"), KeyError("a bug")])
def test_what_fails_while_the_lock_is_held_is_raised_as_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[0])), locked(tmp_path):
        raise error


@pytest.mark.parametrize("error", [ServiceError("it does not answer"), KeyError("a bug")])
def test_an_outage_or_a_bug_is_raised_as_it_is_even_when_the_lock_is_lost(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[0])), locked(tmp_path):
        fail_after_another_took_over(tmp_path / "lock", error)
