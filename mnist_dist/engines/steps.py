"""A function in a process of its own: what crashes or eats memory there is an error here.

Owns: starting the process, its progress, its end with the driver's, and why it died in words. Does not own: what the
functions do (`conversion`).

Contract: the process reads the function from stdin, as a pickle, and ends when that pipe is closed, so
it never outlives the driver. It writes pickled pairs to stdout: `progress` and how far it is, at last `result` and what
the function returned. Everything else that it says goes to stderr.
"""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

import mnist_dist
from mnist_dist.errors import StepFailed
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread

log = logging.getLogger(__name__)

SHOWN_LINES = 3  # of what a process that failed said last
GIVE_UP_S = 5.0  # for what a process that has ended left in its pipe

Report = Callable[[int, int], None]
"""Is told how many images are done, of how many."""
Result = TypeVar("Result")


def run_step(function: Callable[[Report], Result], *, title: str, session: Session) -> Result:
    """What a function returns that is called in a process of its own.

    Args:
        function: of a module, so that the process finds it, or a `functools.partial` of one.
        title: of the work, for a bar and for errors.
        session: shows the bar; a signal ends the process. What the process prints is shown where a person wants to see
            it (`console.verbose`).

    Raises:
        StepFailed: the process failed.
        Interrupted, Locked: see `Session.watch`.
    """
    free_gib, heard = psutil.virtual_memory().available / 2**30, dict[str, Any]()
    log.info("%s: %.1f GiB of memory are free", title, free_gib)
    with (
        tempfile.TemporaryFile() as errors,
        session.console.progress(title) as bar,
        _start(function, errors=None if session.console.verbose else errors) as process,
    ):
        reader = SideThread(lambda: _read(process.stdout, heard), name="progress")
        reader.start()

        def ended(timeout_s: float) -> bool:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
            return process.returncode is not None

        def show() -> None:
            if "progress" in heard:
                done, total = heard["progress"]
                bar.update(done=done, total=total, note=f"{done}/{total} images")

        try:
            session.watch(ended, show=show)
        finally:
            process.kill()  # does nothing once it has ended
            reader.ended(GIVE_UP_S)
        if process.returncode != 0 or "result" not in heard:
            errors.seek(0)
            said = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
            raise StepFailed(
                f"{title}: the process {_cause(process.returncode, free_gib=free_gib)}\n  "
                + ("\n  ".join(said[-SHOWN_LINES:]) or "what it said is above")
            )
    result: Result = heard["result"]
    return result


def _start(function: Callable[[Report], Any], *, errors: IO[bytes] | None) -> subprocess.Popen[bytes]:
    package = Path(mnist_dist.__file__).parents[1]
    python_path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        env={**os.environ, "PYTHONPATH": python_path},
        stdin=subprocess.PIPE,  # stays open as long as we live
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,  # Ctrl-C is ours
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died; its exit status is told
        os.write(process.stdin.fileno(), pickle.dumps(function))
    return process


def _read(pipe: IO[bytes] | None, heard: dict[str, Any]) -> None:
    """Keeps the last of each kind of what a process says."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError):  # it has ended, or was killed in the middle of a word
        while pipe is not None:
            kind, value = pickle.load(pipe)
            heard[kind] = value


def _cause(code: int, *, free_gib: float) -> str:
    if code >= 0:
        return f"ended with exit status {code}:"
    name = signal.Signals(-code).name
    memory = f", most often for lack of memory ({free_gib:.1f} GiB were free when it began)"
    return f"was ended by {name}{memory if name == 'SIGKILL' else ''}:"


def _serve() -> None:
    """The process' side."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(OSError):  # where memory runs out, this process dies and not the driver
        Path("/proc/self/oom_score_adj").write_text("1000")
    function = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()

    def say(kind: str, value: Any) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    say("result", function(lambda done, total: say("progress", (done, total))))


def _end_with_the_driver() -> None:
    os.read(0, 1)  # not `sys.stdin`, whose lock would be held while Python ends
    os._exit(1)


if __name__ == "__main__":
    _serve()
