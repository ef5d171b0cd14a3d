"""Runs programs and measures them from outside: duration, last output line and memory.

Contract: a program runs from the project root with its own Ray. Its output goes into files in its scratch folder,
because a pipe would stay open until the last of Ray's processes ends. If it fails, an error with its last lines is
raised.
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

ROOT = Path(__file__).parents[1]  # `python -m jobs.score` works from here.
SECONDS_BETWEEN_SAMPLES = 0.5
TIMEOUT_S = 7_200
SHOWN_LINES = 20  # The error of a failed program quotes this many lines.


def run_program(arguments: Sequence[str], scratch: Path) -> float:
    """Runs `python -m` with these arguments; returns the seconds from start to exit.

    Raises:
        MnistDistError: the exit code is not 0.
        subprocess.TimeoutExpired: the program hangs.
    """
    began = time.perf_counter()
    with _started(arguments, scratch) as process:
        process.wait(TIMEOUT_S)
        seconds = time.perf_counter() - began
    _check_exit(process, arguments, scratch)
    return seconds


def peak_memory_bytes(arguments: Sequence[str], scratch: Path) -> int:
    """Runs `python -m` with these arguments; returns the largest sampled memory of it and all its descendants.

    Raises:
        MnistDistError: the exit code is not 0.
    """
    peak = 0
    with _started(arguments, scratch) as process:
        while process.poll() is None:
            peak = max(peak, tree_memory_bytes(process.pid))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    _check_exit(process, arguments, scratch)
    return peak


def tree_memory_bytes(pid: int) -> int:
    """Proportional set size (PSS) of a process and all its descendants; shared memory counts once."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return sum(_memory_bytes(process) for process in (root, *root.children(recursive=True)))
    return 0


def last_json(scratch: Path) -> dict[str, Any]:
    """The JSON in the last line that a program printed to stdout."""
    return dict(json.loads((scratch / "stdout").read_text().splitlines()[-1]))


def _memory_bytes(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):  # It has ended in the meantime.
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
        process.kill()  # Does nothing if it has ended.
        process.wait()


def _check_exit(process: subprocess.Popen[bytes], arguments: Sequence[str], scratch: Path) -> None:
    if process.returncode == 0:
        return
    lines = [
        line for name in ("stdout", "stderr") for line in (scratch / name).read_text(errors="replace").splitlines()
    ]
    shown = "\n".join(lines[-SHOWN_LINES:])
    raise MnistDistError(f"{arguments[0]} must end with exit code 0. Received: {process.returncode}\n{shown}")
