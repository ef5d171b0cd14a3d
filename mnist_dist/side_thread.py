"""Runs a call in a thread of its own, so that the main thread stays free for signals and progress."""

import threading
from collections.abc import Callable
from typing import Any


class SideThread(threading.Thread):
    """Runs a call; `result` returns its value or raises its exception."""

    def __init__(self, call: Callable[[], Any], *, name: str) -> None:
        super().__init__(daemon=True, name=name)
        self._call = call
        self._result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # `result` raises it in the main thread.
            self.error = error

    def ended(self, timeout_s: float) -> bool:
        """Waits up to `timeout_s` and returns whether the call has ended."""
        self.join(timeout_s)
        return not self.is_alive()

    def result(self) -> Any:
        """Waits for the call to end; returns its value or raises its exception."""
        self.join()
        if self.error is not None:
            raise self.error
        return self._result
