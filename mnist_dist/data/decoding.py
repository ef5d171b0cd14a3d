"""Reads and decodes rows of a listing, in a pool of threads that works across shard boundaries.

Owns: the threads that read and decode images, how many there are, the time limit per image, and the time spent per
stage. Does not own: what a request reads (`reading`), the pixels (`images/decoder.py`), or their use (a `Sink`).

A thread passes on images one by one, but tiny ones in batches, and threads take turns with such batches: what they do
is mostly Python, of which one thread runs at a time, and threads that interrupt each other lose more than they gain.
While storage is quick, reading tiny files is a part of the turn, since any system call can be such an interruption.
"""

import contextlib
import functools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass
from typing import NamedTuple, Protocol

import pyarrow as pa

from mnist_dist.config import DecodeConfig
from mnist_dist.errors import DecoderStuck, ImageError
from mnist_dist.images.budget import SMALL_BYTES, MemoryBudget, default_budget_bytes
from mnist_dist.images.decoder import Decoded, decode_image
from mnist_dist.images.isolation import IsolatedDecoder
from mnist_dist.images.spec import ImageSpec
from mnist_dist.sources.reading import TINY_AT_ONCE, TINY_BYTES, Encoded, Read, plan_reads
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store

SETTLED_IMAGES = 32  # The first images are slow (imports, connections) and say nothing of the speed.
LOOK_S = 1.0  # between checks of the time limit for decoding
BATCH_BYTES = 2**20  # of decoded tiny images in a thread: a large model input makes batches small
_NO_TURN = contextlib.nullcontext()


class _Postponed(ImageError):
    """A tiny file unpacks to something large, so that it is decoded after the batch in which it was found."""


_POSTPONED = _Postponed("failed", "not decoded yet")


@dataclass
class Times:
    """Time spent by stage, in s, summed over threads."""

    read_s: float = 0.0
    decode_s: float = 0.0
    model_s: float = 0.0
    decode_cpu_s: float = 0.0
    """CPU time of the threads that decode."""

    def __add__(self, other: "Times") -> "Times":
        return Times(*(left + right for left, right in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Threads:
    """How many threads a process has for its images.

    Args:
        decoding: number of threads that decode at the same time: one per core.
        reading: maximum number of further threads, which wait for storage. The pool starts with one and adds more when
            reading takes longer than decoding: each thread slows the others, as Python runs one at a time.
    """

    decoding: int
    reading: int = 16


class Taken(NamedTuple):
    """The decoded image of a row, or why there is none; size and etag are those of `Encoded`."""

    row: int
    size_bytes: int | None
    etag: str | None
    image: Decoded | ImageError


class Sink(Protocol):
    """Receives the images of one shard; called from several threads."""

    failure: BaseException | None

    def take(self, images: Sequence[Taken]) -> None:
        """Takes the images of some rows; may block, which slows down reading."""

    def abort(self, failure: BaseException) -> None:
        """Says that the rest of the shard will not come, and why."""


class DecodePool:
    """A pool of threads that read and decode images.

    Args:
        spec: size and channels of the decoded images.
        config: limits for a single image.
        threads: see `Threads`.
        store: the store to read the images from.

    Attributes:
        times: time spent on reading and decoding so far.
    """

    def __init__(self, spec: ImageSpec, *, config: DecodeConfig, threads: Threads, store: Store = ANYWHERE) -> None:
        self._spec, self._config, self._store = spec, config, store
        self._threads = threads
        self._pool = _Pool(threads.decoding + min(1, threads.reading))
        self._slots = threading.Semaphore(threads.decoding)
        self._turn = threading.RLock()  # of a batch of tiny images
        self._local = threading.local()  # in_turn: whether this thread decodes such a batch
        self._at_once = max(1, min(TINY_AT_ONCE, BATCH_BYTES // spec.image_bytes))
        self._images = 0
        self._begun: dict[int, float] = {}  # thread -> since when it has been decoding its image
        self._memory = MemoryBudget(config.decode_memory or default_budget_bytes(threads.decoding))
        self._child = IsolatedDecoder(
            spec,
            max_pixels=config.max_pixels,
            timeout_s=config.image_timeout_s,
            reserve=self._memory.reserve,
        )
        self.times, self._times_lock = Times(), threading.Lock()

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        is_stuck = kind is not None and issubclass(kind, DecoderStuck)  # its thread would never end
        self._pool.close(wait=not is_stuck)
        self._child.close()

    def begin(self, rows: pa.Table, sink: Sink, *, isolated: bool) -> None:
        """Starts reading and decoding the rows of a shard (`image_table.COLUMNS`), and returns at once.

        Args:
            rows: the rows of the shard.
            sink: gets one image for each row; on a failure, `abort` instead of the rest.
            isolated: decode one image at a time in a child process; slow, but no image can kill this process.
        """
        for read in plan_reads(rows, max_bytes=self._config.max_bytes, store=self._store):
            self._pool.submit(functools.partial(self._run, read, sink, isolated))

    def check_times(self) -> None:
        """Raises DecoderStuck if an image has been decoding for longer than the time limit."""
        limit_s = self._config.image_timeout_s
        if any(time.monotonic() - since > limit_s for since in list(self._begun.values())):
            raise DecoderStuck(f"decoding an image takes longer than {limit_s:g} s")

    def _run(self, read: Read, sink: Sink, isolated: bool) -> None:
        if sink.failure is not None:
            return
        try:
            left = zip(read.rows, read.run(), strict=True)
            while sink.failure is None and (images := self._next(left, isolated, tiny_files=read.tiny_files)):
                sink.take(images)
                del images  # They would be held while the next ones are read.
        except BaseException as failure:  # a failed service or a bug: raised by the caller that waits for the shard
            sink.abort(failure)

    def _next(self, left: Iterator[tuple[int, Encoded]], isolated: bool, *, tiny_files: bool) -> list[Taken]:
        """Reads and decodes the next image, or the next tiny ones; none if no row is left."""
        with self._turn if tiny_files and not isolated and not self._storage_is_slow else _NO_TURN:
            began = time.perf_counter()
            rows = self._read(left)
            read_s = time.perf_counter() - began
            images = self._decoded(rows, isolated, read_s) if rows else []
        # what unpacks to something large may wait for memory, and nobody else should wait for that
        for place, taken in enumerate(images):
            if taken.image is _POSTPONED:
                images[place] = self._decoded([rows[place]], isolated, 0.0, in_turn=False)[0]
        return images

    def _read(self, left: Iterator[tuple[int, Encoded]]) -> list[tuple[int, Encoded]]:
        rows: list[tuple[int, Encoded]] = []
        for row in left:
            rows.append(row)
            if len(rows) == self._at_once or not _is_tiny(row[1]):
                break
        return rows

    def _decoded(
        self, rows: Sequence[tuple[int, Encoded]], isolated: bool, read_s: float, *, in_turn: bool = True
    ) -> list[Taken]:
        decode = self._child.decode if isolated else self._decode_here
        in_turn = in_turn and not isolated and _is_tiny(rows[-1][1])
        with self._turn if in_turn else _NO_TURN, self._slots:
            self._local.in_turn = in_turn
            began, cpu_began = time.perf_counter(), time.thread_time()
            images = [Taken(row, encoded.size_bytes, encoded.etag, _image(encoded, decode)) for row, encoded in rows]
            decode_s, decode_cpu_s = time.perf_counter() - began, time.thread_time() - cpu_began
        self._count(len(rows), Times(read_s=read_s, decode_s=decode_s, decode_cpu_s=decode_cpu_s))
        return images

    def _decode_here(self, data: bytes) -> Decoded:
        """Decodes in this thread; `check_times` watches how long it takes."""
        thread = threading.get_ident()
        self._begun[thread] = time.monotonic()
        try:
            return decode_image(data, self._spec, max_pixels=self._config.max_pixels, reserve=self._reserve)
        finally:
            self._begun.pop(thread, None)

    def _reserve(self, memory_bytes: int) -> AbstractContextManager[None]:
        held = self._memory.reserve(memory_bytes)
        if memory_bytes < SMALL_BYTES:
            return held
        if self._local.in_turn:
            raise _Postponed("failed", "not decoded yet")
        return self._awaited(held)

    @contextmanager
    def _awaited(self, held: AbstractContextManager[None]) -> Iterator[None]:
        """Waiting for memory does not count as decoding."""
        del self._begun[threading.get_ident()]
        with held:
            self._begun[threading.get_ident()] = time.monotonic()
            yield

    def _count(self, images: int, times: Times) -> None:
        with self._times_lock:
            self._images += images
            self.times.read_s += times.read_s
            self.times.decode_s += times.decode_s
            self.times.decode_cpu_s += times.decode_cpu_s
            if self._storage_is_slow:
                self._grow()

    @property
    def _storage_is_slow(self) -> bool:
        return self._images >= SETTLED_IMAGES and self.times.read_s > self.times.decode_s

    def _grow(self) -> None:
        """Adds threads until all cores decode while the other threads wait."""
        times, threads = self.times, self._threads
        max_threads = threads.decoding + threads.reading
        self._pool.grow(min(max_threads, math.ceil(threads.decoding * (1 + times.read_s / max(times.decode_s, 1e-9)))))


def _is_tiny(encoded: Encoded) -> bool:
    return isinstance(encoded.data, ImageError) or len(encoded.data) <= TINY_BYTES


def _image(encoded: Encoded, decode: Callable[[bytes], Decoded]) -> Decoded | ImageError:
    if isinstance(encoded.data, ImageError):
        return encoded.data
    try:
        return decode(encoded.data)
    except _Postponed:
        return _POSTPONED
    except ImageError as error:
        return ImageError(error.status, error.message)  # without the traceback, which holds the image


class _Pool:
    """A pool of threads that can grow. It starts small, because even waiting threads make it slower."""

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self.grow(count)

    def submit(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def grow(self, count: int) -> None:
        """Starts threads until there are at least `count`."""
        while len(self._threads) < count:
            name = f"decode-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._run, daemon=True, name=name))
            self._threads[-1].start()

    def close(self, *, wait: bool) -> None:
        """Ends the threads after their current calls; queued calls are dropped."""
        self._closed = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if not self._closed:
                call()


class AwaitedSink:
    """A sink to wait for; its subclass sets `_done` when it has taken the last image."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._lock, self._done = threading.Lock(), threading.Event()

    def abort(self, failure: BaseException) -> None:
        self.failure = self.failure or failure
        self._done.set()

    def wait(self, pool: DecodePool) -> None:
        """Returns when all images have come; raises the failure that prevented it."""
        while not self._done.wait(LOOK_S):
            pool.check_times()
        if self.failure is not None:
            raise self.failure


class Collector(AwaitedSink):
    """A sink that keeps all images, which are classified elsewhere."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.images: list[Decoded | ImageError] = [ImageError("failed", "not decoded")] * rows
        self.size_bytes: list[int | None] = [None] * rows
        self.etags: list[str | None] = [None] * rows
        self._left = rows

    def take(self, images: Sequence[Taken]) -> None:
        for row, size_bytes, etag, image in images:
            self.images[row], self.size_bytes[row], self.etags[row] = image, size_bytes, etag
        with self._lock:
            self._left -= len(images)
            if self._left == 0:
                self._done.set()
