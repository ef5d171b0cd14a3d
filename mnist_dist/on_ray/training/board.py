"""A board between driver and workers: progress goes one way, the wish to stop the other.

One small actor that takes no CPU. Only the worker of rank 0 writes, from a thread of its own, so that training never
waits for it.
"""

import threading
import time
from typing import Any

import ray

from mnist_dist.models.history import Epoch
from mnist_dist.on_ray.cluster import on_this_node
from mnist_dist.training.host import Position

SECONDS_BETWEEN_POSTS = 0.5


class Board:
    """The newest position, the finished epochs in order, and whether to stop."""

    def __init__(self) -> None:
        self._position: Position | None = None
        self._epochs: list[Epoch] = []
        self._stop = False
        self._heard_at = time.monotonic()

    def post(self, position: Position | None, epochs: list[Epoch]) -> bool:
        """Puts up what is new; returns whether to stop."""
        self._position = position
        self._epochs += epochs
        self._heard_at = time.monotonic()
        return self._stop

    def take(self) -> tuple[Position | None, list[Epoch], float]:
        """The newest position, the epochs that finished since the last call, and for how many s nobody has posted."""
        epochs, self._epochs = self._epochs, []
        return self._position, epochs, time.monotonic() - self._heard_at

    def ask_to_stop(self) -> None:
        """Makes every later `post` return True."""
        self._stop = True


def make_board() -> Any:
    """The handle of a new board's actor, on this node: it must not be lost with another one."""
    return ray.remote(num_cpus=0, scheduling_strategy=on_this_node())(Board).remote()


class Poster:
    """Posts what the loop says to a board, a few times a second, until it is closed."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._lock = threading.Lock()
        self._position: Position | None = None
        self._epochs: list[Epoch] = []
        self._closed = threading.Event()
        self.stop = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="board")
        self._thread.start()

    def position(self, position: Position) -> None:
        """Replaces the position that is posted next."""
        self._position = position

    def epoch(self, epoch: Epoch) -> None:
        """Adds a finished epoch to what is posted next."""
        with self._lock:
            self._epochs.append(epoch)

    def close(self) -> None:
        """Posts what is left and ends the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_POSTS):
            self._post()
        self._post()

    def _post(self) -> None:
        with self._lock:
            epochs, self._epochs = self._epochs, []
        self.stop = bool(ray.get(self._board.post.remote(self._position, epochs)))
