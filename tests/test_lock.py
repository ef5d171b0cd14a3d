"""The lock: one holder, taken over from the dead and the silent, never from the living."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mnist_dist import storage
from mnist_dist.errors import Locked
from mnist_dist.lock import Lock, _host


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")
    return f"{folder}/work/lock"


def leave_lock(uri: str, *, host: str, pid: int, age_s: float) -> None:
    holder = {"id": "other", "host": host, "pid": pid, "time": time.time() - age_s}
    storage.write_bytes(uri, json.dumps(holder).encode())


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_held_lock_is_refused_and_a_left_one_is_free(uri: str) -> None:
    with Lock(uri, what="the run"), pytest.raises(Locked, match=f"at work on the run: process {os.getpid()} on"):
        Lock(uri, what="the run").__enter__()
    with Lock(uri, what="the run") as lock:
        lock.check()
    assert not storage.exists(uri)


def test_a_dead_process_of_this_host_loses_it_at_once(uri: str) -> None:
    leave_lock(uri, host=_host(), pid=dead_process(), age_s=1)
    with Lock(uri, what="the run") as lock:
        lock.check()


def test_another_host_loses_it_after_a_minute_of_silence_only(uri: str) -> None:
    leave_lock(uri, host="elsewhere", pid=1, age_s=30)
    with pytest.raises(Locked, match=r"on elsewhere, last heard of \d+ s ago"):
        Lock(uri, what="the run").__enter__()
    leave_lock(uri, host="elsewhere", pid=1, age_s=61)
    with Lock(uri, what="the run") as lock:
        lock.check()


def test_a_holder_that_lost_it_is_told_and_leaves_the_new_one_alone(uri: str) -> None:
    with Lock(uri, what="the run") as lock:
        leave_lock(uri, host="elsewhere", pid=1, age_s=0)
        with pytest.raises(Locked, match="another driver has taken over the run"):
            lock.check()
    assert json.loads(storage.read_bytes(uri))["id"] == "other"


def test_a_put_whose_answer_was_lost_is_known_again(uri: str) -> None:
    lock = Lock(uri, what="the run")
    storage.write_bytes(uri, lock._content())
    with lock:
        lock.check()


def test_one_of_many_creates_an_object(uri: str) -> None:
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    assert [entry.uri for entry in storage.list_entries(uri.removesuffix("/lock"))] == [uri]
