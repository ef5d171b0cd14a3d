"""The memory that the images of one process may take while they are decoded."""

import contextlib
import ctypes
import functools
import threading
from collections import deque
from collections.abc import Iterator

from mnist_dist.errors import ImageError
from mnist_dist.processor import memory_bytes, usable_cpus

SMALL_BYTES = 4 * 2**20
"""Images that take less are not counted: one per thread does not matter, and most images are small."""
MAX_DEFAULT_BYTES = 3 * 2**29  # Enough for 100 megapixels with transparency, in most formats.
LARGE_BYTES = 8 * 2**20
_M_MMAP_THRESHOLD = -3  # Source: mallopt(3).
_SMALL = contextlib.nullcontext()


def default_budget_bytes(threads: int) -> int:
    """The smaller of 1.5 GiB and a quarter of the memory that a process of so many threads can expect, bytes.

    Args:
        threads: cores that the process uses; others share the machine in proportion.
    """
    share = memory_bytes() * min(1.0, threads / usable_cpus())
    return min(MAX_DEFAULT_BYTES, int(share / 4))


@functools.cache
def return_large_blocks() -> None:
    """Has memory in large pieces go back to the system as soon as it is free, for the whole process.

    glibc would else learn to keep pieces of up to 32 MiB, in each thread that ever decoded such an image.
    """
    with contextlib.suppress(OSError, AttributeError):  # Another C library.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)


class MemoryBudget:
    """Bounds the memory of all images that are being decoded. Large images wait for each other, in order.

    Args:
        total_bytes: what they may take together.
    """

    def __init__(self, total_bytes: int) -> None:
        return_large_blocks()
        self.total_bytes = self._free_bytes = total_bytes
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    def reserve(self, memory_bytes: int) -> contextlib.AbstractContextManager[None]:
        """A context that holds `memory_bytes`; entering it waits until they are free.

        Raises:
            ImageError: `too_large`, if it is more than the whole budget.
        """
        if memory_bytes > self.total_bytes:
            raise ImageError(
                "too_large",
                f"decoding takes {memory_bytes / 2**20:,.0f} MiB of memory, more than the "
                f"{self.total_bytes / 2**20:,.0f} MiB of --decode-memory",
            )
        return _SMALL if memory_bytes < SMALL_BYTES else self._held(memory_bytes)

    @contextlib.contextmanager
    def _held(self, memory_bytes: int) -> Iterator[None]:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            self._changed.wait_for(lambda: self._queue[0] is ticket and memory_bytes <= self._free_bytes)
            self._queue.popleft()
            self._free_bytes -= memory_bytes
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free_bytes += memory_bytes
                self._changed.notify_all()
