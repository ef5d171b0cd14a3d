"""Scoring in one process: images of several shards are decoded at once, and the model gets full batches.

Owns: keeping the model busy across shard boundaries (a batch is filled with the next decoded images, whichever shard
they belong to), and assigning its outputs to rows. Does not own: reading and decoding (`decoding`), the model
(`engines/engine.py`), the table (`predictions`), or the caller (`on_ray/scoring/actor.py`).

Contract: every row of a shard gets an outcome; an unusable image is a status, never an exception. At most a few batches
of decoded images wait for the model, so that memory does not grow with the job.
"""

# B = batch, K = classes, D = features

import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.config import DecodeConfig
from mnist_dist.data.decoding import LOOK_S, DecodePool, Taken, Threads, Times
from mnist_dist.engines.engine import Engine, Outputs
from mnist_dist.errors import ImageError
from mnist_dist.images.decoder import Decoded
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.scoring.predictions import Outcomes
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store

SHARDS_AT_ONCE = 2  # The next shard is decoded while the model finishes the last one.
BATCHES_WAITING = 2  # decoded ones that may wait, besides the one being filled and the one in the model
IDLE_S = 0.02  # how long an incomplete batch waits for an image before it is checked whether any is left

Progress = Callable[[int, int], None]
"""Takes how many more images are ok, and how many are not. Called from several threads."""


def no_progress(ok: int, other: int) -> None:
    """Ignores progress."""


class Scorer:
    """Scores shards. Several threads may call it at once, which keeps the model busy between shards.

    Args:
        engine: the model.
        spec: the input that the model takes.
        decoding: limits for a single image.
        threads: see `Threads`.
        store: the store to read the images from.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        spec: ImageSpec,
        decoding: DecodeConfig,
        threads: Threads,
        store: Store = ANYWHERE,
    ) -> None:
        self._engine = engine
        self._pool = DecodePool(spec, config=decoding, threads=threads, store=store)
        calls = engine.calls_at_once
        self._images = _Waiting((BATCHES_WAITING + calls - 1) * engine.batch_size)
        self._collecting, self._times_lock = threading.Lock(), threading.Lock()
        self._in_the_model: dict[int, Sequence[_Image]] = {}  # images in the model, by thread
        self._under_way: set[_OpenShard] = set()
        self._threads = [
            threading.Thread(target=self._run_model, args=(number,), daemon=True, name=f"model-{number}")
            for number in range(calls)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self._images.close()
        for thread in self._threads:
            thread.join()
        self._pool.__exit__(kind)

    @property
    def times(self) -> Times:
        """Time spent so far, by stage."""
        return self._pool.times

    def score(self, rows: pa.Table, *, isolated: bool = False, progress: Progress = no_progress) -> Outcomes:
        """Reads, decodes and classifies the rows of a shard (`image_table.COLUMNS`).

        Args:
            rows: at least one row.
            isolated: decode one image at a time in a child process; slow, but no image can kill this process.
            progress: see `Progress`.

        Returns:
            One outcome per row.

        Raises:
            ServiceError, StorageError: the storage failed, not a single image.
            DecoderStuck: decoding an image exceeds its time limit.
        """
        with self._shard(len(rows), progress) as shard:
            self._pool.begin(rows, shard, isolated=isolated)
        return shard.outcomes(self._engine)

    def classify(
        self,
        images: Sequence[Decoded | ImageError],
        *,
        size_bytes: Sequence[int | None],
        etags: Sequence[str | None],
        progress: Progress = no_progress,
    ) -> Outcomes:
        """Like `score`, for images that were read and decoded elsewhere."""
        with self._shard(len(images), progress) as shard:
            taken = map(Taken, range(len(images)), size_bytes, etags, images)
            while some := list(itertools.islice(taken, self._engine.batch_size)):
                shard.take(some)
        return shard.outcomes(self._engine)

    @contextlib.contextmanager
    def _shard(self, rows: int, progress: Progress) -> "Iterator[_OpenShard]":
        """Opens a shard, and waits at the end until it has all its outcomes."""
        shard = _OpenShard(rows, put=self._images.put, progress=progress)
        self._under_way.add(shard)
        try:
            yield shard
            while not shard.done.wait(LOOK_S):
                self._pool.check_times()
        finally:
            self._under_way.discard(shard)

    # --- in the threads that run the model ---------------------------------------------------------------------------

    def _run_model(self, number: int) -> None:
        while True:
            with self._collecting:  # one thread fills a batch while the others run the model
                batch = self._next_batch()
                if batch is None:
                    return
                self._in_the_model[number] = batch
            try:
                self._classify(batch)
            except BaseException as failure:  # every call that waits for this batch raises it
                for image in batch:
                    image.shard.abort(failure)
            finally:
                del self._in_the_model[number]

    def _next_batch(self) -> "list[_Image] | None":
        """The next images: a full batch unless no more are coming; None when the scorer is closed."""
        batch: list[_Image] = []
        while len(batch) < self._engine.batch_size:
            if self._images.wait():
                batch += self._images.get(self._engine.batch_size - len(batch))
            elif self._images.closed:
                return None
            elif batch and self._is_last(batch):
                break
        return batch

    def _is_last(self, batch: "Sequence[_Image]") -> bool:
        """Whether all unfinished images of the open shards are in the batch or in the model."""
        open_shards = set(self._under_way)
        # Read first: an image that the model finishes in between still counts as left, which only delays the batch.
        left = sum(shard.left for shard in open_shards)
        others = list(self._in_the_model.values())
        return left <= sum(image.shard in open_shards for images in (batch, *others) for image in images)

    def _classify(self, batch: "Sequence[_Image]") -> None:
        began = time.perf_counter()
        outputs = self._engine(np.stack([image.pixels for image in batch]))
        seconds = (time.perf_counter() - began) / self._engine.calls_at_once
        with self._times_lock:
            self.times.model_s += seconds
        places: dict[_OpenShard, list[int]] = {}
        for place, image in enumerate(batch):
            places.setdefault(image.shard, []).append(place)
        for shard, shard_places in places.items():
            shard.classified([batch[place].row for place in shard_places], outputs, shard_places)


class _OpenShard:
    """Collects the outcomes of one shard; a `Sink`."""

    def __init__(self, rows: int, *, put: "Callable[[Sequence[_Image]], None]", progress: Progress) -> None:
        self._put, self._progress = put, progress
        self._statuses: list[str] = ["failed"] * rows
        self._errors: list[str | None] = [None] * rows
        self._width, self._height = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._size_bytes: list[int | None] = [None] * rows
        self._etags: list[str | None] = [None] * rows
        self._probabilities: npt.NDArray[np.float32] | None = None
        self._embeddings: npt.NDArray[np.float32] | None = None
        self.failure: BaseException | None = None
        self.done = threading.Event()
        self.left, self._lock = rows, threading.Lock()

    def take(self, images: Sequence[Taken]) -> None:
        decoded: list[_Image] = []
        for row, size_bytes, etag, image in images:
            self._size_bytes[row], self._etags[row] = size_bytes, etag
            if isinstance(image, ImageError):
                self._statuses[row], self._errors[row] = image.status, image.message
            else:
                self._width[row], self._height[row] = image.width_px, image.height_px
                decoded.append(_Image(self, row, image.pixels))
        if len(decoded) < len(images):
            self._finish(0, len(images) - len(decoded))
        if decoded:
            self._put(decoded)

    def abort(self, failure: BaseException) -> None:
        self.failure = self.failure or failure
        self.done.set()

    def classified(self, rows: Sequence[int], outputs: Outputs, places: Sequence[int]) -> None:
        """Stores the model outputs at `places` as the outcomes of `rows`."""
        total = len(self._statuses)
        with self._lock:
            self._probabilities = _filled(self._probabilities, total, rows, outputs.probabilities[places])
            if outputs.embeddings is not None:
                self._embeddings = _filled(self._embeddings, total, rows, outputs.embeddings[places])
        for row in rows:
            self._statuses[row] = "ok"
        self._finish(len(rows), 0)

    def outcomes(self, engine: Engine) -> Outcomes:
        """All outcomes; raises the failure that prevented some of them."""
        if self.failure is not None:
            raise self.failure
        rows, probabilities, embeddings = len(self._statuses), self._probabilities, self._embeddings
        if probabilities is None:  # no image is ok
            probabilities = np.zeros((rows, engine.num_classes), np.float32)
        if embeddings is None and engine.num_features:
            embeddings = np.zeros((rows, engine.num_features), np.float32)
        return Outcomes(
            status=self._statuses,
            error=self._errors,
            width=self._width,
            height=self._height,
            size_bytes=self._size_bytes,
            etag=self._etags,
            probabilities=probabilities,
            embeddings=embeddings,
        )

    def _finish(self, ok: int, other: int) -> None:
        self._progress(ok, other)
        with self._lock:
            self.left -= ok + other
            if self.left == 0:
                self.done.set()


class _Image(NamedTuple):
    """A decoded image on its way to the model."""

    shard: _OpenShard
    row: int
    pixels: Pixels


class _Waiting:
    """The images that wait for the model.

    Args:
        most: `put` blocks while so many wait.
    """

    def __init__(self, most: int) -> None:
        self._most, self._images = most, collections.deque[_Image]()
        lock = threading.Lock()
        self._has_room, self._has_images = threading.Condition(lock), threading.Condition(lock)
        self.closed = False

    def put(self, images: Sequence[_Image]) -> None:
        """Adds images, and waits for room unless the queue is closed."""
        with self._has_room:
            while self.is_full() and not self.closed:
                self._has_room.wait()
            self._images.extend(images)
            self._has_images.notify()
            if not self.is_full():
                self._has_room.notify()

    def wait(self) -> bool:
        """Waits up to `IDLE_S` for images; returns whether there are any."""
        with self._has_images:
            return bool(self._images) or self._has_images.wait(IDLE_S)

    def get(self, most: int) -> list[_Image]:
        """Takes up to `most` of the images that are there."""
        with self._has_room:
            images = [self._images.popleft() for _ in range(min(most, len(self._images)))]
            if not self.is_full():
                self._has_room.notify()  # one thread, which wakes the next if there is still room
            return images

    def is_full(self) -> bool:
        """Whether `put` blocks."""
        return len(self._images) >= self._most

    def close(self) -> None:
        """Ends all waiting."""
        with self._has_room:
            self.closed = True
            self._has_room.notify_all()


def _filled(
    values: npt.NDArray[np.float32] | None, total: int, rows: Sequence[int], outputs: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """`values` with the model outputs of some rows filled in; allocates the array on the first call."""
    if values is None:
        values = np.zeros((total, outputs.shape[1]), np.float32)
    values[rows] = outputs
    return values
