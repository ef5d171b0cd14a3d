"""A call beside the main thread, which has to stay free for signals and progress."""

import threading
from collections.abc import Callable
from typing import Any


class SideThread(threading.Thread):
    """Runs a call; `result` gives what it returned, or raises what it raised."""

    def __init__(self, call: Callable[[], Any], *, name: str) -> None:
        super().__init__(daemon=True, name=name)
        self._call = call
        self._result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # handed to the main thread by `result`
            self.error = error

    def ended(self, timeout_s: float) -> bool:
        """Whether the call has ended, within so many s."""
        self.join(timeout_s)
        return not self.is_alive()

    def result(self) -> Any:
        """Waits for the end of the call."""
        self.join()
        if self.error is not None:
            raise self.error
        return self._result
