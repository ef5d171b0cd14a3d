"""Maps in threads, a bounded number of results ahead of the consumer."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, threads: int, ahead: int
) -> Iterator[_Result]:
    """Like `map`, but in threads; at most `ahead` results wait for the consumer."""
    pool = ThreadPoolExecutor(threads)
    waiting: collections.deque[Future[_Result]] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        # Joins no thread: the garbage collector may end a generator that nobody closed, in any thread, at any moment,
        # even while that thread holds the lock of Python's threading module that a join takes (seen as a deadlock).
        pool.shutdown(wait=False)
