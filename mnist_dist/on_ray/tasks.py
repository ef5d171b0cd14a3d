"""Waiting for Ray tasks such that signals are heard and a bar moves, and what a failure of Ray means to a person."""

import time
from collections.abc import Sequence
from typing import Any

import ray

from mnist_dist.console import Console, Stop
from mnist_dist.errors import MnistDistError, WorkersFailed

POLL_S = 0.2
SILENCE_S = 60.0  # without an answer: starting takes less, unless there is no room for the workers


def wait_for(tasks: Sequence[Any], *, title: str, expected_s: float, console: Console, stop: Stop) -> list[Any]:
    """The results of Ray tasks, in their order; what is left of them is ended where one fails or a signal comes.

    Args:
        tasks: object references.
        title: of the bar.
        expected_s: how long it should take, for the bar.
        console: where it is shown.
        stop: is looked at meanwhile.

    Raises:
        Interrupted: a signal came.
        MnistDistError: a task raised it.
        WorkersFailed: a task failed in another way, or its process died.
    """
    began, left, told = time.monotonic(), list(tasks), False
    try:
        with console.progress(title) as bar:
            while left:
                done, left = ray.wait(left, timeout=POLL_S)
                if done:
                    _taken(done)
                stop.check()
                elapsed = time.monotonic() - began
                bar.update(done=min(elapsed, expected_s), total=expected_s, note=f"{elapsed:,.0f} s")
                if elapsed > max(SILENCE_S, 2 * expected_s) and not told:
                    told = True
                    console.line(f"{title}: still waiting; free now: {ray.available_resources().get('CPU', 0):g} CPUs")
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
