"""A step of work on a model, in a process of its own: what crashes or eats memory there is an error here.

Owns: starting `python -m MODULE STEP TASK`, its progress, its end with the driver's, and why it died in words. Does not
own: what a step does (`export`, `conversion`).

Contract: a step's process writes `done total` lines to stdout and everything else to stderr; it ends when the pipe to
its stdin is closed, so it never outlives the driver.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import psutil

import mnist_dist
from mnist_dist.console import Bar, Console, Stop
from mnist_dist.errors import StepFailed

log = logging.getLogger(__name__)

SHOWN_LINES = 3  # of what a process that failed said last

Report = Callable[[int, int], None]
"""Is told how many images are done, of how many."""


def run_step(
    module: str, step: str, task: Mapping[str, Any], *, title: str, log_file: Path, console: Console, stop: Stop
) -> None:
    """Runs one step to its end.

    Args:
        module: that serves it (`serve`).
        step: its name there.
        task: what it is told, as JSON values.
        title: of the work, for a bar and for errors.
        log_file: gets what it says, where nobody looks (`console.verbose`).
        console: shows the bar.
        stop: looked at all the time.

    Raises:
        StepFailed: it failed.
        Interrupted: a signal came; the process is ended.
    """
    free_gib = psutil.virtual_memory().available / 2**30
    log.info("%s: %.1f GiB of memory are free", title, free_gib)
    with (
        log_file.open("wb") as errors,
        console.progress(title) as bar,
        _start(module, step, task, errors=None if console.verbose else errors) as process,
    ):
        code = _wait(process, bar=bar, stop=stop)
    if code != 0:
        said = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
        raise StepFailed(
            f"{title}: the process {_cause(code, free_gib=free_gib)}\n  "
            + ("\n  ".join(said[-SHOWN_LINES:]) or "what it said is above")
        )


def _start(module: str, step: str, task: Mapping[str, Any], *, errors: IO[bytes] | None) -> subprocess.Popen[str]:
    package = Path(mnist_dist.__file__).parents[1]
    python_path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", module, step, json.dumps(task)],
        env={**os.environ, "PYTHONPATH": python_path},
        stdin=subprocess.PIPE,  # stays open as long as we live
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,  # Ctrl-C is ours
    )


def _wait(process: subprocess.Popen[str], *, bar: Bar, stop: Stop) -> int:
    """The exit status of the process; it has ended whatever happens here."""
    last = [""]

    def read() -> None:
        for line in process.stdout or ():
            last[0] = line

    reader = threading.Thread(target=read, daemon=True, name="progress")
    reader.start()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(0.2)
            stop.check()
            if last[0]:
                done, total = map(int, last[0].split())
                bar.update(done=done, total=total, note=f"{done}/{total} images")
    finally:
        process.kill()  # does nothing once it has ended
        reader.join(5)


def _cause(code: int, *, free_gib: float) -> str:
    if code > 0:
        return f"ended with exit status {code}:"
    name = signal.Signals(-code).name
    memory = f", most often for lack of memory ({free_gib:.1f} GiB were free when it began)"
    return f"was ended by {name}{memory if name == 'SIGKILL' else ''}:"


def serve(steps: Mapping[str, Callable[[dict[str, Any], Report], None]]) -> None:
    """Runs the step that the command line names; to be called by the module that owns the steps, as `__main__`."""
    step, task = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    with contextlib.suppress(OSError):  # where memory runs out, this process dies and not the driver
        Path("/proc/self/oom_score_adj").write_text("1000")
    steps[step](task, lambda done, total: print(done, total, file=answers))


def _end_with_the_driver() -> None:
    os.read(0, 1)  # not `sys.stdin`, whose lock would be held while Python ends
    os._exit(1)
