"""console: flags, what a person sees, signals, the JSON line and the exit code."""

import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mnist_dist import console
from mnist_dist.console import Console, Stop
from mnist_dist.errors import ConfigError, ImageError, Interrupted, MnistDistError, ServiceError

ROOT = Path(__file__).parents[1]

# A process that gets a second signal while it saves.
TWICE = """
import os, signal
from mnist_dist.console import Console, Stop
with Stop(Console()) as stop:
    os.kill(os.getpid(), signal.{first})
    print(stop.signal_number, flush=True)
    os.kill(os.getpid(), signal.{second})
    print("still here", flush=True)
"""

# A process that gets a signal while it writes a line; it ends as a job does, which passes on what was written last.
IN_A_LINE = """
from mnist_dist import console
console.quiet(verbose=False)
def main():
    with console.Stop(console.Console(terminal=False)) as stop:
        console.Console(terminal=False).line("x" * 1_000_000)
        assert stop.signal_number
    return {}
console.run(main, job="test")
"""

# Which of the heavy packages a process has loaded once it has shown its help.
HELP = """
import sys
from mnist_dist.commands.{job} import main
try:
    main(["--help"], program="mnist-dist {job}")
except SystemExit as ended:
    print("ended with", ended.code)
print("loaded", sorted({{"ray", "tensorflow", "keras"}} & sys.modules.keys()))
"""

QUIET = """
import os
from mnist_dist.console import quiet
quiet(verbose={verbose})
print(os.environ.get("TF_CPP_MIN_LOG_LEVEL"), os.environ.get("RAY_DATA_DISABLE_PROGRESS_BARS"))
"""


def python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TF_"))}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- imports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job", ["train", *(pytest.param(job, marks=pytest.mark.slow) for job in ("quickstart", "search"))]
)
def test_help_loads_neither_ray_nor_keras(job: str) -> None:
    done = python(HELP.format(job=job))
    assert done.stdout.endswith("ended with 0\nloaded []\n"), done.stderr


# --- what a person sees ----------------------------------------------------------------------------------------------


def test_a_line_is_shown_as_it_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]not markup[/bold] a:cat:b.png " + "long " * 50
    Console(terminal=False).line(text)
    assert capsys.readouterr() == ("", f"{text}\n")


def test_a_terminal_shows_one_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = Console(terminal=True)
    assert shown.terminal
    with shown.progress("training") as bar:
        bar.update(done=3, total=7, note="loss 0.5")
        shown.line("epoch 1")
        bar.update(done=7, total=7, note="loss 0.25")
    out, err = capsys.readouterr()
    assert out == ""
    assert "━" in err
    assert "training" in err
    assert "loss 0.25" in err
    assert "epoch 1\n" in err.replace("\r", "")
    assert err.endswith("\x1b[2K")  # the bar is gone in the end


def test_a_log_shows_no_bar_and_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Console(terminal=False)
    assert not shown.terminal
    with shown.progress("training") as bar:
        for step in range(100):
            bar.update(done=step, total=100, note="loss 0.5")
    assert capsys.readouterr() == ("", "")


def test_a_log_shows_a_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with Console(terminal=False).progress("training") as bar:
        bar.update(done=3, total=7, note="loss 0.5")
        bar.update(done=7, total=7)
        bar.update(done=0, total=0)
    assert capsys.readouterr().err == "training: 43 % loss 0.5\ntraining: 100 %\ntraining: 0 %\n"


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(
    capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop(Console(terminal=False)) as stop:
        assert stop.signal_number is None
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr().err == f"{number.name}: saving progress; a second signal ends the process at once\n"


def test_a_signal_in_the_middle_of_a_line_is_noted() -> None:
    job = subprocess.Popen([sys.executable, "-c", IN_A_LINE], stderr=subprocess.PIPE, bufsize=0)
    assert job.stderr is not None
    assert job.stderr.read(6) == b"xxxxxx"
    pipe = job.stderr.fileno()
    room = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) - select.PIPE_BUF
    while struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0] < room:
        time.sleep(0.01)  # until it has written as much as the pipe holds, and waits for us
    job.send_signal(signal.SIGTERM)
    _, rest = job.communicate()
    assert job.returncode == 0, rest[-500:]
    assert b"SIGTERM: saving progress" in rest
    assert rest.count(b"x") == 1_000_000 - 6


@pytest.mark.parametrize(("first", "second", "code"), [("SIGINT", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130)])
def test_a_second_signal_ends_the_process(first: str, second: str, code: int) -> None:
    done = python(TWICE.format(first=first, second=second))
    assert done.returncode == code
    assert done.stdout == f"{getattr(signal, first).value}\n"


# --- the end of a job ------------------------------------------------------------------------------------------------


def end_of(
    main: Callable[[], Mapping[str, Any]], capsys: pytest.CaptureFixture[str]
) -> tuple[str, dict[str, Any], str]:
    """Exit code, the JSON of stdout's last line, stderr."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(console, "_leave", sys.exit)
        with pytest.raises(SystemExit, match=r"^\d+$") as ended:
            console.run(main, job="test")
    out, err = capsys.readouterr()
    return str(ended.value), json.loads(out.splitlines()[-1]), err


def raising(error: BaseException) -> Callable[[], Mapping[str, Any]]:
    def main() -> Mapping[str, Any]:
        raise error

    return main


def test_a_job_that_is_done_ends_with_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> Mapping[str, Any]:
        print("a library says something")
        return {"bundle": "runs/ä/bundle", "epochs": 3}

    assert end_of(main, capsys) == ("0", {"job": "test", "bundle": "runs/ä/bundle", "epochs": 3}, "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MnistDistError("no luck"), "1"),
        (ServiceError("disk full"), "1"),
        (ImageError("empty", "no bytes"), "1"),
        (ConfigError("too small. Received: x=0"), "2"),
        (Interrupted(2, "saved"), "130"),
        (Interrupted(15, "saved"), "143"),
    ],
)
def test_an_error_of_ours_ends_with_its_code_and_words(
    capsys: pytest.CaptureFixture[str], error: MnistDistError, code: str
) -> None:
    expected = {"job": "test", "error": str(error), "error_type": type(error).__name__}
    assert end_of(raising(error), capsys) == (code, expected, f"error: {error}\n")


def test_another_error_ends_with_1_and_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, result, err = end_of(raising(KeyError("rank")), capsys)
    assert code == "1"
    assert result == {"job": "test", "error": "KeyError: 'rank'", "error_type": "KeyError"}
    assert err == "unexpected error; --verbose shows the traceback\nerror: KeyError: 'rank'\n"


def test_verbose_shows_where_an_error_comes_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs.test", "--verbose"])
    assert "Traceback (most recent call last)" in end_of(raising(KeyError("rank")), capsys)[2]


def test_a_keyboard_interrupt_before_the_job_listens_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _ = end_of(raising(KeyboardInterrupt()), capsys)
    assert (code, result["error_type"]) == ("130", "KeyboardInterrupt")


def test_a_signal_that_ray_takes_before_the_job_listens_ends_with_143(capsys: pytest.CaptureFixture[str]) -> None:
    code, result, err = end_of(raising(SystemExit(1)), capsys)  # as its handler does
    assert (code, result["error_type"]) == ("143", "Interrupted")
    assert "run the same command to resume" in err


# A job in whose last moment others still say something, and which has something to close.
ENDS = """
import atexit, logging, os, sys
from mnist_dist import console
console.quiet(verbose=False)
atexit.register(lambda: print("closed", file=sys.stderr))
def main():
    logging.getLogger("library").error("logged")
    os.write(2, b"said by a library" + os.linesep.encode())
    return {"images": 1}
console.run(main, job="test")
"""


def test_nothing_is_lost_at_the_end(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"job": "test", "images": 1}
    assert sorted(done.stderr.splitlines()) == ["ERROR library: logged", "closed", "said by a library"]


@pytest.mark.parametrize(
    ("verbose", "environment", "expected"),
    [
        (False, {}, "3 1\n"),
        (False, {"TF_CPP_MIN_LOG_LEVEL": "0"}, "0 1\n"),
        (True, {}, "None None\n"),
    ],
)
def test_quiet_silences_others_unless_the_environment_says_otherwise(
    verbose: bool, environment: dict[str, str], expected: str
) -> None:
    assert python(QUIET.format(verbose=verbose), **environment).stdout == expected


# --- durations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "1 s left"), (0.4, "1 s left"), (59.6, "60 s left"), (119.9, "120 s left"), (150, "2.5 min left")],
)
def test_a_forecast_is_in_seconds_below_two_minutes_and_never_zero(seconds: float, shown: str) -> None:
    assert console.time_left(seconds) == shown
