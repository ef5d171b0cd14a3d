"""A board between driver and workers: progress goes one way, the request to stop the other. What ended a group of
workers for lack of memory is left there for the next.

The board is one small actor that claims no CPU. Only the worker of rank 0 posts, from a separate thread, so training
never waits for the board.
"""

import threading
import time
from typing import Any, NamedTuple

import ray

from mnist_dist.errors import OutOfMemory
from mnist_dist.models.history import Epoch
from mnist_dist.on_ray.cluster import on_this_node
from mnist_dist.training.host import Measured, Position

SECONDS_BETWEEN_POSTS = 0.5


class _Begun(NamedTuple):
    """How a worker began."""

    node: str
    killed: int
    checkpoint: str | None


class Board:
    """The newest position, the finished epochs in order, and whether to stop."""

    def __init__(self) -> None:
        self._position: Position | Measured | None = None
        self._epochs: list[Epoch] = []
        self._stop = False
        self._out_of_memory: OutOfMemory | None = None
        self._repeats = False
        self._begun = dict[int, _Begun]()
        self._killed = dict[int, str | None]()
        self._progressed = dict[int, bool]()
        self._posted_at = time.monotonic()

    def post(self, position: Position | Measured | None, epochs: list[Epoch]) -> bool:
        """Stores new progress and returns whether to stop."""
        self._position = position
        self._epochs += epochs
        self._posted_at = time.monotonic()
        return self._stop

    def take(self) -> tuple[Position | Measured | None, list[Epoch], float]:
        """The newest position, the epochs finished since the last call, and the seconds since the last post."""
        epochs, self._epochs = self._epochs, []
        return self._position, epochs, time.monotonic() - self._posted_at

    def ask_to_stop(self) -> None:
        """Makes every later `post` return True."""
        self._stop = True

    def ended(self, error: OutOfMemory | None, *, repeats: bool) -> None:
        """A group of workers ended with an error, which is kept if it was for lack of memory.

        Args:
            error: None: it was for another reason.
            repeats: the same step would meet it again, as the allocator of a backend says no.
        """
        self._out_of_memory, self._repeats = error, repeats

    def begin(self, rank: int, *, node: str, killed: int | None, checkpoint: str | None) -> None:
        """A worker begins.

        Args:
            rank: of the worker.
            node: where it runs.
            killed: how many processes the kernel there has killed for lack of memory. None: not known.
            checkpoint: from which it resumes.
        """
        now, before = _Begun(node, killed or 0, checkpoint), self._begun.get(rank)
        self._begun[rank] = now
        is_same_node = before is not None and before.node == now.node
        self._killed[rank] = node if before and is_same_node and now.killed > before.killed else None
        self._progressed[rank] = before is None or before.checkpoint != now.checkpoint

    def out_of_memory(self) -> OutOfMemory | None:
        """Why the last group of workers ended, if it was for lack of memory and this one would end alike. Ask once all
        workers have begun. A killed worker may have been unlucky if its group had saved a checkpoint before."""
        if self._repeats or not any(self._progressed.values()):
            nodes = [node for node in self._killed.values() if node is not None]
            by_kernel = OutOfMemory(f"the kernel killed a process of {nodes[0]}") if nodes else None
            return self._out_of_memory or by_kernel
        return None


def make_board() -> Any:
    """Creates a board's actor on this node, so that the loss of another node does not end it."""
    return ray.remote(num_cpus=0, scheduling_strategy=on_this_node())(Board).remote()


class Poster:
    """Posts the loop's progress to a board, twice a second, until it is closed."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._lock = threading.Lock()
        self._position: Position | Measured | None = None
        self._epochs: list[Epoch] = []
        self._closed = threading.Event()
        self.stop = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="board")
        self._thread.start()

    def position(self, position: Position | Measured) -> None:
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
