"""steps: a process for a piece of work: its progress, its end, and why it died in words."""

import importlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Recorder, is_alive

from mnist_dist.console import Bar, Console, Stop
from mnist_dist.engines.steps import run_step
from mnist_dist.errors import Interrupted, StepFailed
from mnist_dist.session import Session

SECONDS = 300.0  # for a process that imports little, where many run
SOME_STEPS = """
import os, signal, sys, time
from pathlib import Path

def count(file, text, report):
    print("on stdout, which is not for this")
    os.system("echo from a child on stdout")
    for done in range(1, 4):
        report(done, 3)
    while not os.path.exists(file):  # until somebody has seen how far it is
        time.sleep(0.02)
    return text

def fail(report):
    for number in range(5):
        print("line", number)
    os.system("echo from a child on stdout")
    raise ValueError("the model is no model")

def leave(code, report):
    sys.stdout.flush()
    os._exit(code)

def die(number, report):
    os.kill(os.getpid(), number)
    time.sleep(60)

def wait(file, report):
    report(1, 2)
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)
"""
DRIVER = """
import sys
from functools import partial
import some_steps
from mnist_dist.console import Console, Stop
from mnist_dist.engines.steps import run_step
from mnist_dist.session import Session
console = Console(terminal=False)
with Stop(console) as stop:
    run_step(partial(some_steps.wait, sys.argv[1]), title="waiting", session=Session(console=console, stop=stop))
"""


@pytest.fixture(autouse=True)
def some_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module `some_steps`, which the processes find."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "some_steps.py").write_text(SOME_STEPS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    sys.modules.pop("some_steps", None)


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
        self.bar = Noted()

    @contextmanager
    def progress(self, title: str) -> Iterator[Bar]:
        self.titles.append(title)
        yield self.bar


def run(step: str, *arguments: Any, console: Console | None = None, stop: Stop | None = None) -> Any:
    console = console or Recorder()
    function = partial(getattr(importlib.import_module("some_steps"), step), *arguments)
    return run_step(function, title="work on a model", session=Session(console=console, stop=stop or Stop(console)))


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.02)
    return found


def test_a_step_tells_how_far_it_is_and_gives_what_it_returns(tmp_path: Path) -> None:
    console = WithBar()

    def look() -> None:
        until(lambda: console.bar.told)
        (tmp_path / "seen").touch()

    seen = threading.Thread(target=look)
    seen.start()
    assert run("count", str(tmp_path / "seen"), "ü 1 \n' \"", console=console) == "ü 1 \n' \""
    seen.join()
    assert console.titles == ["work on a model"]
    assert set(console.bar.told) <= {(n, 3, f"{n}/3 images") for n in (1, 2, 3)}
    assert [done for done, _, _ in console.bar.told] == sorted(done for done, _, _ in console.bar.told)
    assert console.bar.told[-1][0] == 3


def test_an_error_in_it_is_told_with_the_last_lines(capfd: pytest.CaptureFixture[str]) -> None:
    expected = r"^work on a model: the process ended with exit status 1:\n(  .*\n){2}  ValueError: the model is no"
    with pytest.raises(StepFailed, match=expected) as caught:
        run("fail")
    assert caught.value.exit_code == 1
    assert capfd.readouterr() == ("", "")


def test_with_verbose_a_person_sees_it_all_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    console = Recorder()
    console.verbose = True
    with pytest.raises(StepFailed, match=r"ended with exit status 1:\n  its output is above$"):
        run("fail", console=console)
    said = capfd.readouterr().err
    assert {"line 0", "line 4", "from a child on stdout", "ValueError: the model is no model"} <= set(said.splitlines())


@pytest.mark.parametrize(
    ("step", "argument", "expected"),
    [
        ("leave", 7, r"ended with exit status 7:\n"),
        ("leave", 0, r"ended with exit status 0:\n"),  # without a result
        ("die", 9, r"was killed by SIGKILL, usually for lack of memory \(\d+\.\d GiB were free when"),
        ("die", 6, r"was killed by SIGABRT:\n"),
    ],
)
def test_another_end_is_told_too(step: str, argument: int, expected: str) -> None:
    with pytest.raises(StepFailed, match=f"work on a model: the process {expected}"):
        run(step, argument)


def test_a_signal_ends_the_process_which_is_the_first_to_go_where_memory_runs_out(tmp_path: Path) -> None:
    console = Recorder()
    stop, waiting, score = Stop(console), tmp_path / "waiting", list[str]()

    def signalled() -> None:
        pid = until(lambda: waiting.exists() and waiting.read_text())
        score.append(Path(f"/proc/{pid}/oom_score_adj").read_text())
        stop.signal_number = 15

    other = threading.Thread(target=signalled)
    other.start()
    with pytest.raises(Interrupted, match="Stopped") as caught:
        run("wait", str(waiting), console=console, stop=stop)
    other.join()
    assert (caught.value.exit_code, score) == (143, ["1000\n"])
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
    until(lambda: not is_alive(step))
