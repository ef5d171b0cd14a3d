"""Waiting for Ray tasks, and what a failure of Ray means to a person."""

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray

from mnist_dist.errors import MnistDistError, WorkersFailed
from mnist_dist.session import Session

SILENCE_S = 60.0  # without an answer: starting takes less, unless there is no room for the workers


def wait_for(tasks: Sequence[Any], session: Session, *, title: str, expected_s: float) -> list[Any]:
    """The results of Ray tasks, in their order; what is left of them is ended where one fails or a signal comes.

    Args:
        tasks: object references.
        session: of the job.
        title: of the bar.
        expected_s: how long it should take, for the bar.

    Raises:
        Interrupted: a signal came.
        MnistDistError: a task raised it.
        WorkersFailed: a task failed in another way, or its process died.
    """
    began, left, is_told = time.monotonic(), list(tasks), False

    def ended(timeout_s: float) -> bool:
        nonlocal left
        done, left = ray.wait(left, timeout=timeout_s)
        _taken(done)
        return not left

    def show() -> None:
        nonlocal is_told
        elapsed = time.monotonic() - began
        bar.update(done=min(elapsed, expected_s), total=expected_s, note=f"{elapsed:,.0f} s")
        if elapsed > max(SILENCE_S, 2 * expected_s) and not is_told:
            is_told = True
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
    """What a failure of Ray means to a person."""
    cause = getattr(error, "cause", None)
    # the text of an actor that could not start is a traceback, whose last line says why
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
    """Most that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
