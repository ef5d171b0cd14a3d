"""The lock: one holder, taken over from the dead and the silent, never from the living."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from harness import Recorder

from mnist_dist.console import Stop
from mnist_dist.errors import Interrupted, Locked
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.lock import Lock, _host


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")
    return f"{folder}/work/lock"


def leave_lock(uri: str, *, host: str, pid: int, age_s: float) -> None:
    holder = {"id": "other", "host": host, "pid": pid, "time": time.time() - age_s}
    ANYWHERE.write_bytes(uri, json.dumps(holder).encode())


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_held_lock_is_refused_and_a_left_one_is_free(uri: str) -> None:
    with Lock(uri, what="the run"), pytest.raises(Locked, match=f"working on the run: process {os.getpid()} on"):
        Lock(uri, what="the run").__enter__()
    with Lock(uri, what="the run") as lock:
        lock.check()
    assert not ANYWHERE.exists(uri)


def test_a_dead_process_of_this_host_loses_it_at_once(uri: str) -> None:
    leave_lock(uri, host=_host(), pid=dead_process(), age_s=1)
    with Lock(uri, what="the run") as lock:
        lock.check()


def test_another_host_loses_it_after_a_minute_of_silence_only(uri: str) -> None:
    leave_lock(uri, host="elsewhere", pid=1, age_s=30)
    with pytest.raises(Locked, match=r"on elsewhere, last seen \d+ s ago"):
        Lock(uri, what="the run").__enter__()
    leave_lock(uri, host="elsewhere", pid=1, age_s=61)
    with Lock(uri, what="the run") as lock:
        lock.check()


def waiting(uri: str, console: Recorder, *, wait_s: float = 90.0) -> Lock:
    return Lock(uri, what="the run", wait_s=wait_s, console=console)


def test_one_who_waits_takes_over_when_the_holder_has_been_silent_for_long_enough(uri: str) -> None:
    leave_lock(uri, host="elsewhere", pid=1, age_s=58)
    console = Recorder()
    with waiting(uri, console) as lock:
        lock.check()
    assert len(console.lines) == 1
    assert "Waiting up to 90 s for the lock of the run, held by process 1 on elsewhere" in console.lines[0]


def test_a_clock_that_is_ahead_does_not_keep_a_lost_holder_alive(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_dist.store.lock.SILENCE_S", 2.0)
    leave_lock(uri, host="elsewhere", pid=1, age_s=-3600)
    with waiting(uri, Recorder()) as lock:
        lock.check()


def test_one_who_waits_is_refused_once_the_holder_renews_its_lock(uri: str) -> None:
    leave_lock(uri, host="elsewhere", pid=1, age_s=5)
    renew = partial(leave_lock, uri, host="elsewhere", pid=1, age_s=0)
    with pytest.raises(Locked, match="working on the run: process 1 on elsewhere"):
        waiting(uri, Recorder(at="Waiting", then=renew)).__enter__()


def test_one_who_waits_gets_a_lock_that_is_left(uri: str) -> None:
    leave_lock(uri, host="elsewhere", pid=1, age_s=5)
    with waiting(uri, Recorder(at="Waiting", then=partial(ANYWHERE.delete, uri))) as lock:
        lock.check()


def test_one_who_waited_in_vain_is_refused(uri: str) -> None:
    leave_lock(uri, host="elsewhere", pid=1, age_s=5)
    with pytest.raises(Locked, match="working on the run"):
        waiting(uri, Recorder(), wait_s=0.5).__enter__()


def test_a_signal_ends_the_waiting(uri: str) -> None:
    leave_lock(uri, host="elsewhere", pid=1, age_s=5)
    stop = Stop(Recorder())
    stop.signal_number = signal.SIGTERM
    with pytest.raises(Interrupted, match="same command"):
        Lock(uri, what="the run", wait_s=90.0, stop=stop).__enter__()


def test_a_holder_that_lost_it_is_told_and_leaves_the_new_one_alone(uri: str) -> None:
    with Lock(uri, what="the run") as lock:
        leave_lock(uri, host="elsewhere", pid=1, age_s=0)
        with pytest.raises(Locked, match="another driver has taken over the run"):
            lock.check()
    assert json.loads(ANYWHERE.read_bytes(uri))["id"] == "other"


def test_a_put_whose_answer_was_lost_is_known_again(uri: str) -> None:
    lock = Lock(uri, what="the run")
    ANYWHERE.write_bytes(uri, lock._content())
    with lock:
        lock.check()
