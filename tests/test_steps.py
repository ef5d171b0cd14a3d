"""steps: a process for a piece of work: its progress, its end, and why it died in words."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Recorder, is_alive

from mnist_dist.console import Bar, Console, Stop
from mnist_dist.engines.steps import run_step
from mnist_dist.errors import Interrupted, MnistDistError

SECONDS = 60.0  # for a process that imports little, where many run
SOME_STEPS = """
import os, signal, subprocess, sys, time
from pathlib import Path
from mnist_dist.engines.steps import serve

def count(task, report):
    print("on stdout, which is not for this")
    os.system("echo from a child on stdout")
    for done in range(1, 4):
        report(done, 3)
        time.sleep(0.5)
    Path(task["file"]).write_text(task["text"])

def fail(task, report):
    for number in range(5):
        print("line", number, file=sys.stderr)
    raise ValueError("the model is no model")

def leave(task, report):
    sys.exit(7)

def die(task, report):
    os.kill(os.getpid(), task["signal"])
    time.sleep(60)

def wait(task, report):
    report(1, 2)
    Path(task["file"]).write_text(str(os.getpid()))
    time.sleep(600)

serve({"count": count, "fail": fail, "leave": leave, "die": die, "wait": wait})
"""
DRIVER = """
import sys
from pathlib import Path
from mnist_dist.console import Console, Stop
from mnist_dist.engines.steps import run_step
console = Console(terminal=False)
with Stop(console) as stop:
    run_step("some_steps", "wait", {"file": sys.argv[1]}, title="waiting", log_file=Path(sys.argv[1] + ".log"),
             console=console, stop=stop)
"""


@pytest.fixture(autouse=True)
def some_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `some_steps`, which the processes find."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "some_steps.py").write_text(SOME_STEPS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))


class Noted(Bar):
    """A bar that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[float, float, str]] = []

    def update(self, *, done: float, total: float, note: str = "") -> None:
        self.told.append((done, total, note))


class WithBar(Recorder):
    """A console that keeps its bars' titles, and what the last one was told."""

    def __init__(self) -> None:
        super().__init__()
        self.titles: list[str] = []

    @contextmanager
    def progress(self, title: str) -> Iterator[Bar]:
        self.titles.append(title)
        self.bar = Noted()
        yield self.bar


def run(step: str, folder: Path, *, console: Console | None = None, stop: Stop | None = None, **task: Any) -> None:
    console = console or Recorder()
    run_step(
        "some_steps",
        step,
        task,
        title="work on a model",
        log_file=folder / "log",
        console=console,
        stop=stop or Stop(console),
    )


def until(condition: Callable[[], Any], *, seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.02)
    return found


def test_a_step_gets_its_task_and_tells_how_far_it_is(tmp_path: Path) -> None:
    console = WithBar()
    run("count", tmp_path, console=console, file=str(tmp_path / "made"), text="ü 1 \n' \"")

    assert (tmp_path / "made").read_text() == "ü 1 \n' \""
    assert console.titles == ["work on a model"]
    told = console.bar.told
    assert {(done, total, note) for done, total, note in told} <= {(n, 3, f"{n}/3 images") for n in (1, 2, 3)}
    assert told
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


def test_what_it_prints_is_kept_apart_from_its_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run("count", tmp_path, file=str(tmp_path / "made"), text="")
    log = (tmp_path / "log").read_text().splitlines()
    assert {"on stdout, which is not for this", "from a child on stdout"} <= set(log)
    assert capfd.readouterr() == ("", "")


def test_an_error_in_it_is_told_with_the_last_lines(tmp_path: Path) -> None:
    expected = r"^work on a model: the process ended with exit status 1:\n(  .*\n){2}  ValueError: the model is no"
    with pytest.raises(MnistDistError, match=expected) as caught:
        run("fail", tmp_path)
    assert caught.value.exit_code == 1
    assert "line 4" in (tmp_path / "log").read_text()


def test_with_verbose_a_person_sees_it_all_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    console = Recorder()
    console.verbose = True
    with pytest.raises(MnistDistError, match=r"ended with exit status 1:\n  what it said is above$"):
        run("fail", tmp_path, console=console)
    said = capfd.readouterr().err
    assert "line 0\nline 1" in said
    assert "ValueError: the model is no model" in said


@pytest.mark.parametrize(
    ("step", "task", "expected"),
    [
        ("leave", {}, r"ended with exit status 7:\n"),
        ("die", {"signal": 9}, r"was ended by SIGKILL, most often for lack of memory \(\d+\.\d GiB were free when"),
        ("die", {"signal": 6}, r"was ended by SIGABRT:\n"),
        ("no_such_step", {}, r"ended with exit status 1:\n(.*\n)*.*KeyError: 'no_such_step'"),
    ],
)
def test_another_end_is_told_too(tmp_path: Path, step: str, task: dict[str, Any], expected: str) -> None:
    with pytest.raises(MnistDistError, match=f"work on a model: the process {expected}"):
        run(step, tmp_path, **task)


def test_a_signal_ends_the_process(tmp_path: Path) -> None:
    console = Recorder()
    stop, waiting = Stop(console), tmp_path / "waiting"

    def signalled() -> None:
        until(lambda: waiting.exists() and waiting.read_text())
        stop.signal_number = 15

    other = threading.Thread(target=signalled)
    other.start()
    with pytest.raises(Interrupted, match="the same command goes on") as caught:
        run("wait", tmp_path, console=console, stop=stop, file=str(waiting))
    other.join()
    assert caught.value.exit_code == 143
    assert not psutil.pid_exists(int(waiting.read_text()))


def test_it_ends_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    waiting = tmp_path / "waiting"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(waiting)], stderr=subprocess.DEVNULL)
    try:
        until(lambda: waiting.exists() and waiting.read_text())
    finally:
        driver.kill()
        driver.wait()
    step = int(waiting.read_text())
    until(lambda: not is_alive(step), seconds=10)


@pytest.mark.skipif(not os.path.exists("/proc/self/oom_score_adj"), reason="Linux only; runs there")
def test_where_memory_runs_out_it_is_the_first_to_go(tmp_path: Path) -> None:
    console = Recorder()
    stop, waiting, score = Stop(console), tmp_path / "waiting", list[str]()

    def looked_at() -> None:
        pid = until(lambda: waiting.exists() and waiting.read_text())
        score.append(Path(f"/proc/{pid}/oom_score_adj").read_text())
        stop.signal_number = 15

    other = threading.Thread(target=looked_at)
    other.start()
    with pytest.raises(Interrupted, match=re.escape("stopped")):
        run("wait", tmp_path, console=console, stop=stop, file=str(waiting))
    other.join()
    assert score == ["1000\n"]
