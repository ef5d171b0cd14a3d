"""A board between driver and workers: progress goes one way, the request to stop the other.

The board is one small actor that claims no CPU. Only the worker of rank 0 posts, from a separate thread, so training
never waits for the board.
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
        self._posted_at = time.monotonic()

    def post(self, position: Position | None, epochs: list[Epoch]) -> bool:
        """Stores new progress and returns whether to stop."""
        self._position = position
        self._epochs += epochs
        self._posted_at = time.monotonic()
        return self._stop

    def take(self) -> tuple[Position | None, list[Epoch], float]:
        """The newest position, the epochs finished since the last call, and the seconds since the last post."""
        epochs, self._epochs = self._epochs, []
        return self._position, epochs, time.monotonic() - self._posted_at

    def ask_to_stop(self) -> None:
        """Makes every later `post` return True."""
        self._stop = True


def make_board() -> Any:
    """Creates a board's actor on this node, so that the loss of another node does not end it."""
    return ray.remote(num_cpus=0, scheduling_strategy=on_this_node())(Board).remote()


class Poster:
    """Posts the loop's progress to a board, twice a second, until it is closed."""

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
        """Sets the position for the next post."""
        self._position = position

    def epoch(self, epoch: Epoch) -> None:
        """Adds a finished epoch to the next post."""
        with self._lock:
            self._epochs.append(epoch)

    def close(self) -> None:
        """Posts the remaining progress and ends the thread."""
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
