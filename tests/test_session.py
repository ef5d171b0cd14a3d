"""The one loop that waits: it ends with the work, hears signals, and watches the lock."""

import os
import signal
import threading
from pathlib import Path

import pytest

from mnist_dist.console import Console, Stop
from mnist_dist.errors import Interrupted, Locked
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread
from mnist_dist.store.lock import Lock

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


def test_a_lock_that_was_lost_ends_the_wait(tmp_path: Path) -> None:
    with Stop(CONSOLE) as stop, Lock(str(tmp_path / "lock"), what="the run") as lock:
        (tmp_path / "lock").write_text('{"id": "other", "host": "h", "pid": 1, "time": 0}')
        lock.lost = True  # as its thread would find
        with pytest.raises(Locked, match="taken over the run"):
            Session(console=CONSOLE, stop=stop, lock=lock).watch(lambda timeout_s: False)
