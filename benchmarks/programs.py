"""Programs that are measured from outside: how long they run, what they say at last, and the memory they take.

Contract: a program runs from the root of the project, on a Ray of its own, and what it prints goes into files of its
scratch folder: a pipe would stay open as long as the last of Ray's processes. One that fails raises, with its last
lines.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from mnist_dist.errors import MnistDistError

ROOT = Path(__file__).parents[1]  # where `python -m jobs.score` is found
SECONDS_BETWEEN_SAMPLES = 0.5
TIMEOUT_S = 7_200
SHOWN_LINES = 20  # of a program that failed


def run_program(arguments: Sequence[str], scratch: Path) -> float:
    """Runs `python -m` with these arguments; seconds from start to exit.

    Raises:
        MnistDistError: its exit code is not 0.
        subprocess.TimeoutExpired: it hangs.
    """
    began = time.perf_counter()
    with _started(arguments, scratch) as process:
        process.wait(TIMEOUT_S)
        seconds = time.perf_counter() - began
    _check_exit(process, arguments, scratch)
    return seconds


def peak_memory_bytes(arguments: Sequence[str], scratch: Path) -> int:
    """Runs `python -m` with these arguments; the largest memory of it and all its descendants among samples.

    Raises:
        MnistDistError: its exit code is not 0.
    """
    peak = 0
    with _started(arguments, scratch) as process:
        while process.poll() is None:
            peak = max(peak, tree_memory_bytes(process.pid))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    _check_exit(process, arguments, scratch)
    return peak


def tree_memory_bytes(pid: int) -> int:
    """Proportional set size (PSS) of a process and all its descendants: memory that some share counts once."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return sum(_memory_bytes(process) for process in (root, *root.children(recursive=True)))
    return 0


def last_json(scratch: Path) -> dict[str, Any]:
    """The last line that a program printed to stdout."""
    return dict(json.loads((scratch / "stdout").read_text().splitlines()[-1]))


def _memory_bytes(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):  # it has ended meanwhile
        return int(process.memory_full_info().pss)
    return 0


@contextlib.contextmanager
def _started(arguments: Sequence[str], scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "DAFT_ANALYTICS_ENABLED": "0", "DAFT_PROGRESS_BAR": "0"}
    command = [sys.executable, "-m", *arguments]
    with (scratch / "stdout").open("wb") as out, (scratch / "stderr").open("wb") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
    try:
        yield process
    finally:
        process.kill()  # does nothing once it has ended
        process.wait()


def _check_exit(process: subprocess.Popen[bytes], arguments: Sequence[str], scratch: Path) -> None:
    if process.returncode == 0:
        return
    lines = [
        line for name in ("stdout", "stderr") for line in (scratch / name).read_text(errors="replace").splitlines()
    ]
    shown = "\n".join(lines[-SHOWN_LINES:])
    raise MnistDistError(f"{arguments[0]} ends with exit code 0. Received: {process.returncode}\n{shown}")
