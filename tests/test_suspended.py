"""Drivers that are really suspended (SIGSTOP), replaced by others, and woken up (SIGCONT) when these have finished.

What a driver that wakes up late may still do is tested at each step of a commit in `test_commit.py`, in one process.
Here the processes, the signals and the locks are real.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from harness import ROOT, Command
from test_commit import CASES, Seen, dying_at

from mnist_dist import load_bundle
from mnist_dist.console import Console
from mnist_dist.inventory import LOCK
from mnist_dist.scoring.generations import Output
from mnist_dist.scoring.predictions import read_predictions
from mnist_dist.session import locked_session
from mnist_dist.store import lock

STEPS = 26  # changes of the store in the commit of `retry`, from the first swept copy to the last deleted folder
CHOSEN = (11, 16, 18)  # before `commit.json`, among the moves, and before `mark.json`


@contextmanager
def suspended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Waits until a process has suspended itself, and wakes it up at the end of the block."""
    watched = psutil.Process(process.pid)
    while watched.status() != psutil.STATUS_STOPPED:
        assert process.poll() is None, "the process ended before it was suspended"
        time.sleep(0.02)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


# --- the commit of a table -------------------------------------------------------------------------------------------


def commit_retry(uri: str, suspended_before: int) -> None:
    """Run by a process of its own: takes the lock, and suspends itself before one of the steps."""
    lock.SILENCE_S, lock.SECONDS_BETWEEN_BEATS, lock.SECONDS_BETWEEN_LOOKS = 1.0, 0.1, 0.05
    output = Output(uri)
    with locked_session(
        Console(terminal=False), lock_uri=output.lock_uri, what=uri, wait_s=90.0, above=output.max_number
    ) as session:
        step = dying_at(suspended_before, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        CASES["retry"].resume(uri, step, fence=session.fence.number, check=session.confirm_lock)


def committing(uri: str, *, log: Path, suspended_before: int = -1) -> "subprocess.Popen[bytes]":
    """Starts a driver that commits, or finds everything done; its stderr goes to `log`."""
    script = f"import test_suspended; test_suspended.commit_retry({uri!r}, {suspended_before})"
    with log.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=stderr,
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What the commit comes to when nobody is suspended."""
    uri = str(tmp_path_factory.mktemp("finished") / "output")
    CASES["retry"].put(uri)
    CASES["retry"].resume(uri)
    return Seen.of(uri)


def in_its_tier(count: int) -> Any:
    """A step of the commit, of which each tier tries some."""
    tier = pytest.mark.slow if count % 2 else pytest.mark.chaos
    return count if count in CHOSEN else pytest.param(count, marks=tier)


@pytest.mark.parametrize("count", [in_its_tier(count) for count in range(STEPS)])
def test_a_driver_suspended_at_any_step_of_a_commit_changes_nothing_when_it_wakes_up(
    tmp_path: Path, finished: Seen, count: int
) -> None:
    uri, log = str(tmp_path / "output"), tmp_path / "late.log"
    CASES["retry"].put(uri)
    late = committing(uri, log=log, suspended_before=count)
    with suspended(late):
        assert committing(uri, log=tmp_path / "successor.log").wait() == 0, (tmp_path / "successor.log").read_text()
    if late.wait():  # otherwise only sweeping was left
        assert "LockLost: another driver has taken over" in log.read_text()
    assert read_predictions(uri).equals(finished.rows)
    assert committing(uri, log=log).wait() == 0, log.read_text()  # the next command
    shutil.rmtree(tmp_path / "output" / "_work" / "lock")
    assert Seen.of(uri) == finished
    assert len(pq.read_table(tmp_path / "output" / "table", columns=["uri"])) == len(finished.rows)


# --- whole jobs ------------------------------------------------------------------------------------------------------


def impatient(*command: str) -> Command:
    """A job that takes over a lock after two seconds of silence."""
    return Command("tests.impatient", *command)


@pytest.mark.slow
def test_a_training_driver_that_wakes_up_late_leaves_the_run_alone(tmp_path: Path) -> None:
    settings = "--epochs 12 --dropout 0.3 --precision float32 --workers 1 --name run"
    command = ("jobs.train", "quickstart", "--storage", str(tmp_path), *settings.split())
    with impatient(*command) as late:
        assert late.until(lambda: [*(tmp_path / "run").glob("attempt-*/checkpoint-*/state.json")]), late.stderr()
        late.process.send_signal(signal.SIGSTOP)
        with suspended(late.process), impatient(*command) as successor:
            code, result, err = successor.ended()
            assert code == 0, err
            assert "Waiting up to 90 s for the lock" in err
            weights, files = load_bundle(result["bundle"]).model.get_weights(), contents(tmp_path / "run")
        code, line, err = late.ended()
    assert (code, line["error_type"]) == (1, "LockLost"), err
    assert contents(tmp_path / "run") == files
    for ours, theirs in zip(load_bundle(result["bundle"]).model.get_weights(), weights, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.chaos
def test_a_search_driver_that_wakes_up_late_leaves_the_trials_alone(tmp_path: Path) -> None:
    settings = "--limit 600 --trials 3 --trial-epochs 2 --finalists 1 --finalist-epochs 2 --name run"
    command = ("jobs.search", "search-digits", "--storage", str(tmp_path), *settings.split())
    trials = tmp_path / "run" / "trials"

    def has_result() -> bool:
        return any(json.loads(path.read_bytes())["status"] == "done" for path in trials.glob("*.json"))

    with impatient(*command) as late:
        assert late.until(has_result), late.stderr()
        late.process.send_signal(signal.SIGSTOP)
        with suspended(late.process), impatient(*command) as successor:
            code, result, err = successor.ended()
            assert code == 0, err
            files = contents(tmp_path / "run")
        code, line, err = late.ended()
    assert (code, line["error_type"]) == (1, "LockLost"), err
    after = contents(tmp_path / "run")
    mine = "-000001.json"  # Its own records of trials, which a late driver may still complete; newer ones count.
    left_alone = {name: data for name, data in files.items() if not name.endswith(mine)}
    assert {name: after[name] for name in left_alone} == left_alone
    assert [name for name in set(after) - set(files) if not name.endswith(mine)] == []
    assert sorted(pq.read_table(result["leaderboard"])["trial"].to_pylist()) == [0, 1, 2]


def contents(run: Path) -> dict[str, bytes]:
    """The files of a run or search, without those of its locks and of Ray's own bookkeeping."""
    paths = (path for path in run.rglob("*") if path.is_file() and LOCK not in path.parts)
    names = {str(path.relative_to(run)): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(("attempt-", "ray"))}
