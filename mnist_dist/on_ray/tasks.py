"""Waits for Ray tasks, and turns a failure of Ray into a message."""

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray

from mnist_dist.errors import MnistDistError, WorkersFailed
from mnist_dist.session import Session

SILENCE_S = 60.0  # After this time without an answer the free CPUs are shown: workers start faster if there is room.


def wait_for(tasks: Sequence[Any], session: Session, *, title: str, expected_s: float) -> list[Any]:
    """The results of Ray tasks, in order. If one fails or a signal comes, the others are cancelled.

    Args:
        tasks: object references.
        session: of the job.
        title: of the progress bar.
        expected_s: expected duration, for the progress bar.

    Raises:
        Interrupted: SIGINT or SIGTERM.
        MnistDistError: a task raised it.
        WorkersFailed: a task failed in another way, or its process died.
    """
    began, left, has_announced = time.monotonic(), list(tasks), False

    def ended(timeout_s: float) -> bool:
        nonlocal left
        done, left = ray.wait(left, timeout=timeout_s)
        _taken(done)
        return not left

    def show() -> None:
        nonlocal has_announced
        elapsed = time.monotonic() - began
        bar.update(done=min(elapsed, expected_s), total=expected_s, note=f"{elapsed:,.0f} s")
        if elapsed > max(SILENCE_S, 2 * expected_s) and not has_announced:
            has_announced = True
            free = ray.available_resources().get("CPU", 0)
            session.console.line(f"{title}: still waiting; free now: {free:g} CPUs")

    try:
        with session.console.progress(title) as bar:
            session.watch(ended, show=show)
        return _taken(tasks)
    finally:
        for task in left:
            ray.cancel(task, force=True)


def words_of(error: BaseException) -> str:
    """The message for a failure of Ray."""
    cause = getattr(error, "cause", None)
    # The text of an actor that could not start is a traceback, whose last line gives the reason.
    lines = str(cause or error).strip().splitlines() or ["no message"]
    words, cause = (lines[0], cause) if cause else (lines[-1], error)
    return f"the workers failed: {type(cause).__name__}: {words} (--verbose and Ray's logs show where)"


def _taken(tasks: Sequence[Any]) -> list[Any]:
    try:
        return list(ray.get(list(tasks)))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, MnistDistError):
            raise cause from error
        raise WorkersFailed(words_of(error)) from error


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
