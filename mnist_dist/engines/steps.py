"""Runs a function in a separate process, so that a crash or a lack of memory there is an error in the driver.

Owns: starting the process, showing its progress, ending it with the driver, and explaining why it died. Does not own:
what the functions do (`conversion`).

Contract: the process reads the function from stdin, as a pickle, and ends when that pipe is closed, so it never
outlives the driver. It writes pickled pairs to stdout: `progress` with the images done and their total, and finally
`result` with the function's return value. All its other output goes to stderr.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

import mnist_dist
from mnist_dist.errors import MnistDistError, StepFailed, StepKilled
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread

log = logging.getLogger(__name__)

SHOWN_LINES = 3  # last lines of a failed process' stderr that the error message shows
GIVE_UP_S = 5.0  # longest wait for what an ended process left in its pipe

Report = Callable[[int, int], None]
"""Called with the number of images done and the total."""
Result = TypeVar("Result")


def run_step(function: Callable[[Report], Result], *, title: str, session: Session) -> Result:
    """Calls a function in a separate process and returns its result.

    Args:
        function: a module-level function, so that it can be pickled, or a `functools.partial` of one.
        title: name of the work, for the progress bar and for errors.
        session: shows the bar; a signal ends the process. The output of the process is shown if `console.verbose`.

    Raises:
        StepFailed: the process failed.
        Interrupted, LockLost: see `Session.watch`.
    """
    with session.console.progress(title) as bar:

        def watch(process: subprocess.Popen[bytes], received: Mapping[str, Any]) -> None:
            def ended(timeout_s: float) -> bool:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout_s)
                return process.returncode is not None

            def show() -> None:
                if "progress" in received:
                    done, total = received["progress"]
                    bar.update(done=done, total=total, note=f"{done}/{total} images")

            session.watch(ended, show=show)

        result: Result = _called(function, watch, title=title, verbose=session.console.verbose)
    return result


def or_error(function: Callable[[], Result]) -> "Result | MnistDistError":
    """For a step: what the function returns, or the error that says what is wrong, since an exception would lose its
    type between processes."""
    try:
        return function()
    except MnistDistError as error:
        error.__cause__ = error.__context__ = None  # They may not be picklable.
        return error.with_traceback(None)


def call_in_process(function: Callable[[Report], Result], *, title: str) -> Result:
    """As `run_step`, for a caller without a session, such as a task of Ray: nothing is shown, and the process ends with
    this one.

    Raises:
        StepFailed: the process failed.
    """
    result: Result = _called(function, _await_end, title=title, verbose=False)
    return result


def _await_end(process: subprocess.Popen[bytes], _: Mapping[str, Any]) -> None:
    process.wait()


def _called(
    function: Callable[[Report], Any],
    watch: Callable[[subprocess.Popen[bytes], Mapping[str, Any]], None],
    *,
    title: str,
    verbose: bool,
) -> Any:
    """What a function returns in a process of its own. `watch` waits for the end of the process; it is given what has
    been received of it so far."""
    free_gib, received = psutil.virtual_memory().available / 2**30, dict[str, Any]()
    log.info("%s: %.1f GiB of memory are free", title, free_gib)
    with tempfile.TemporaryFile() as errors, _start(function, errors=None if verbose else errors) as process:
        reader = SideThread(lambda: _read(process.stdout, received), name="progress")
        reader.start()
        try:
            watch(process, received)
        finally:
            process.kill()  # no effect once it has ended
            reader.ended(GIVE_UP_S)
        if process.returncode != 0 or "result" not in received:
            errors.seek(0)
            lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
            kind = StepKilled if process.returncode < 0 else StepFailed
            raise kind(
                f"{title}: the process {_cause(process.returncode, free_gib=free_gib)}\n  "
                + ("\n  ".join(lines[-SHOWN_LINES:]) or "its output is above")
            )
    return received["result"]


def _start(function: Callable[[Report], Any], *, errors: IO[bytes] | None) -> subprocess.Popen[bytes]:
    package = Path(mnist_dist.__file__).parents[1]
    python_path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        env={**os.environ, "PYTHONPATH": python_path},
        stdin=subprocess.PIPE,  # stays open while the driver lives
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,  # The driver alone handles Ctrl-C.
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # It died; its exit status is reported.
        os.write(process.stdin.fileno(), pickle.dumps(function))
    return process


def _read(pipe: IO[bytes] | None, received: dict[str, Any]) -> None:
    """Stores the last message of each kind from a process."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError):  # It ended, or was killed while it was writing.
        while pipe is not None:
            kind, value = pickle.load(pipe)
            received[kind] = value


def _cause(code: int, *, free_gib: float) -> str:
    if code >= 0:
        return f"ended with exit status {code}:"
    name = signal.Signals(-code).name
    memory = f", usually for lack of memory ({free_gib:.1f} GiB were free when it started)"
    return f"was killed by {name}{memory if name == 'SIGKILL' else ''}:"


def _serve() -> None:
    """Runs in the process: reads the function, calls it and writes its messages."""
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(OSError):  # Out of memory, the kernel kills this process first.
        Path("/proc/self/oom_score_adj").write_text("1000")
    function = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()

    def send(kind: str, value: Any) -> None:
        pickle.dump((kind, value), messages)
        messages.flush()

    send("result", function(lambda done, total: send("progress", (done, total))))


def _end_with_the_driver() -> None:
    os.read(0, 1)  # Not `sys.stdin`: this thread would hold its lock while Python exits.
    os._exit(1)


if __name__ == "__main__":
    _serve()
