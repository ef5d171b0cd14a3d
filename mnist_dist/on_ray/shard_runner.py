"""Runs numbered shards through Ray Data, which hands each shard to a `Worker` in actors or in tasks.

Owns: the Ray Data pipeline, the answers of the workers, progress, and the limit on deaths of processes. Does not own:
the processing of a shard (each job has its `Worker`), or the resources that a job takes (`actors`).

A worker sends its progress a few times a second, and a report at the end. Ray Data loses the type of an exception, so
errors are sent as answers, too. When a process dies, Ray starts another one with the same shard. A marker written
before each try (`data/markers.py`) lets the new process count the deaths, so that they can be limited.
"""

import logging
import os
import pickle
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import ray
import ray.data

from mnist_dist.console import Bar, time_left
from mnist_dist.data.markers import FORESEEN, Attempt, Markers
from mnist_dist.data.steady_speed import SteadySpeed
from mnist_dist.errors import DecoderStuck, MnistDistError, ServiceError, WorkersFailed, first_line
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.tasks import SILENCE_S, peak_memory_bytes, words_of
from mnist_dist.session import POLL_S, Session
from mnist_dist.side_thread import SideThread

log = logging.getLogger(__name__)

SECONDS_BETWEEN_ANSWERS = 0.5
MAX_ANSWERS_WITHOUT_NEWS = 4  # Then an answer is sent without news, because Ray Data can be ended only between answers.
GIVE_UP_S = 30.0  # Time for Ray Data's thread to end, at its next answer; if left running, it would start another Ray.
Content = TypeVar("Content")
ContentOut = TypeVar("ContentOut", covariant=True)


class Counter:
    """Counts the finished images of a shard; thread-safe."""

    def __init__(self, shard: int) -> None:
        self._shard, self._lock = shard, threading.Lock()
        self._ok, self._other, self._at = 0, 0, time.time()

    def add(self, ok: int, other: int) -> None:
        """Adds images with the status `ok`, and images with any other status."""
        with self._lock:
            self._ok, self._other, self._at = self._ok + ok, self._other + other, time.time()

    def progress(self) -> "ShardProgress":
        """The progress of the shard so far."""
        with self._lock:
            return ShardProgress(self._shard, self._ok, self._other, self._at)


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """The progress of a shard; it starts again from zero when a process has died and the shard is retried."""

    shard: int
    ok: int
    other: int
    at: float
    """Seconds since the epoch."""

    @property
    def images(self) -> int:
        return self.ok + self.other


@dataclass(frozen=True, kw_only=True)
class ShardReport(Generic[Content]):
    """The report on a finished shard."""

    shard: int
    began_at: float
    """Seconds since the epoch."""
    ended_at: float
    process: str
    """The process that did it, as host name and process id."""
    memory_bytes: int
    """Peak memory of that process so far."""
    content: Content
    """The result of the worker."""


class Worker(Protocol[ContentOut]):
    """Processes shards; it is pickled to reach the worker processes."""

    @property
    def title(self) -> str:
        """Name of the work in markers and messages, such as `scoring`."""

    def open(self) -> None:
        """Called once in each process, before its first shard."""

    def work(self, shard: int, given: Any, *, attempt: Attempt, counter: Counter) -> ContentOut:
        """Processes a shard and stores its result.

        Args:
            shard: its number.
            given: the value from `ShardWork.given` or from `ShardWork.before`; None where there is neither.
            attempt: this try at the shard, which knows of the earlier ones.
            counter: counts the finished images.
        """


@dataclass(frozen=True, kw_only=True)
class ShardWork(Generic[Content]):
    """What to do with numbered shards, and where."""

    worker: Worker[Content]
    done: Callable[[], set[int]]
    """The shards that are finished, in this run or an earlier one."""
    folder: str
    """URI of the folder of the markers."""
    max_deaths: int
    """How often a process may die on the same shard before the job fails."""
    actors: Actors | None = None
    """Actors that keep the worker open. None: one task of one CPU per shard."""
    shards_at_once: int = 1
    """Shards that an actor works on at the same time."""
    before: Worker[Any] | None = None
    """A first worker, run in a task of one CPU per shard; the actor gets its result as `given`."""
    before_bytes: int = 0
    """Memory to reserve for each task of `before`."""
    given: Callable[[int], Any] | None = None
    """The value that the worker is given for a shard."""


@dataclass(frozen=True, kw_only=True)
class Ran(Generic[Content]):
    """The result of `run_shards`."""

    reports: list[ShardReport[Content]]
    steady_images_per_s: float | None
    """Speed after the start-up of the processes; None: the run was too short to measure it."""


def run_shards(
    work: ShardWork[Content], shards: Sequence[int], session: Session, *, title: str, done: int, total: int
) -> Ran[Content]:
    """Processes the shards and shows progress. Finished shards stay finished after an error or a signal.

    Args:
        work: what to do, and where.
        shards: the shards that are not finished.
        session: of the job.
        title: of the progress bar.
        done: images that were finished before.
        total: images of all shards.

    Raises:
        MnistDistError, OSError: a worker raised it.
        WorkersFailed: processes died on a shard more than `max_deaths` times, or Ray Data failed.
        Interrupted: SIGINT or SIGTERM.
        LockLost: another driver took over the lock.
    """
    markers = Markers(work.folder, run_id=uuid.uuid4().hex, max_deaths=work.max_deaths)
    progress = _Progress(work, session, done=done, total=total)
    given_up = threading.Event()

    def drain() -> None:
        dataset = _dataset(work, markers, shards)
        if given_up.is_set():  # It may be set while the dataset is built.
            return
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for answer in batch["answer"]:
                progress.answers.put(pickle.loads(answer))
            if given_up.is_set():
                return

    ray_data = SideThread(drain, name="ray-data")
    ray_data.start()
    try:
        try:
            with session.console.progress(title) as bar:
                session.watch(ray_data.ended, show=lambda: progress.show(bar))
        finally:
            given_up.set()
            ray_data.join(GIVE_UP_S)
        if ray_data.error is not None:
            raise WorkersFailed(words_of(ray_data.error)) from ray_data.error
        if not_done := sorted(set(shards) - work.done()):
            raise markers.failure_of(not_done[0])
    except (MnistDistError, OSError) as error:
        if not isinstance(error, ServiceError):  # A store that does not answer would only delay the error.
            markers.forget_failures()
        raise
    return Ran(reports=progress.reports, steady_images_per_s=progress.steady.images_per_s)


class _Progress(Generic[Content]):
    """Collects the answers of the workers and shows them on the progress bar."""

    def __init__(self, work: ShardWork[Content], session: Session, *, done: int, total: int) -> None:
        self._work, self._session, self._done, self._total = work, session, done, total
        self.answers: queue.SimpleQueue[ShardProgress | ShardReport[Content] | BaseException] = queue.SimpleQueue()
        self.reports: list[ShardReport[Content]] = []
        self.steady = SteadySpeed(total - done)
        self._shards: dict[int, ShardProgress] = {}
        self._ok = self._other = 0
        self._began_at, self._has_announced_wait = time.monotonic(), False
        self._first_answer_at: float | None = None

    def show(self, bar: Bar) -> None:
        """Takes the answers that have arrived and updates the bar; raises the first error among them."""
        while not self.answers.empty():
            answer = self.answers.get()
            if isinstance(answer, BaseException):
                raise answer
            if isinstance(answer, ShardReport):
                self.reports.append(answer)
            else:
                if answer.images:
                    self._first_answer_at = self._first_answer_at or time.monotonic()
                self._note(answer)
        self._announce_wait()
        images = self._ok + self._other
        note = f"{self._done + images:,} of {self._total:,} images"
        if self._first_answer_at and images:
            rate = images / max(time.monotonic() - self._first_answer_at, POLL_S)
            left = self._total - self._done - images
            note += f", {rate:,.0f}/s" + (f", {time_left(left / rate)}" if left else "")
        bar.update(done=self._done + images, total=self._total, note=f"{note}, {self._other:,} not ok")

    def _note(self, now: ShardProgress) -> None:
        before = self._shards.get(now.shard)
        self._ok += now.ok - (before.ok if before else 0)
        self._other += now.other - (before.other if before else 0)
        self._shards[now.shard] = now
        self.steady.note(self._ok + self._other, at=now.at)

    def _announce_wait(self) -> None:
        if self._has_announced_wait or self._first_answer_at or time.monotonic() - self._began_at < SILENCE_S:
            return
        self._has_announced_wait = True
        free = ray.available_resources()
        self._session.console.line(
            f"still waiting for a first image of {self._work.actors or 'tasks of 1 CPU'}; free now: "
            f"{free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"
        )


# --- Ray Data --------------------------------------------------------------------------------------------------------


def _dataset(work: ShardWork[Any], markers: Markers, shards: Sequence[int]) -> "ray.data.Dataset":
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"shard": shard, "given": pickle.dumps(work.given and work.given(shard))} for shard in shards]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.target_max_block_size = 1  # Each answer is a block of its own, so that it is sent at once.
    actors = work.actors
    if actors is None:
        return dataset.map_batches(ShardTask(work.worker, markers), batch_size=None, num_cpus=1)
    if work.before is not None:
        # The resources differ from the actors' ones, or Ray Data would fuse both steps and run them in the actors.
        before = ShardTask(work.before, markers, is_last=False)
        dataset = dataset.map_batches(before, batch_size=None, num_cpus=1, memory=work.before_bytes)
    return dataset.map_batches(
        ShardActor,
        fn_constructor_args=(work.worker, markers),
        batch_size=None,
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
        compute=ray.data.ActorPoolStrategy(
            size=min(actors.count, len(shards)),
            # One shard more than it works on waits in each actor, so that no actor waits for the driver. Of few shards
            # an actor gets no more than its share, because Ray Data fills the actor on the driver's node first.
            max_tasks_in_flight_per_actor=min(work.shards_at_once + 1, -(-len(shards) // actors.count)),
            max_concurrent_calls_per_actor=work.shards_at_once,
            enable_true_multi_threading=True,
        ),
    )


class ShardActor:
    """A Ray actor that keeps a worker open."""

    def __init__(self, worker: Worker[Any], markers: Markers) -> None:
        self._shards = _Shards(worker, markers)
        # The id stays the same when Ray restarts the actor.
        self._shards.open(f"actor-{ray.get_runtime_context().get_actor_id()}")

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Processes the shard in a block of one row, with the columns `shard` and `given`.

        Yields blocks of one row, `answer`: a pickled `ShardProgress`, and at the end a pickled `ShardReport` or error.
        """
        yield from self._shards.answers(int(batch["shard"][0]), pickle.loads(batch["given"][0]))


class ShardTask:
    """A Ray task that opens the worker for one shard, anywhere in the cluster.

    Args:
        worker: what to do with the shard.
        markers: of the driver.
        is_last: True: it answers as a `ShardActor` does. False: an actor follows, which gets the result of the worker
            as `given`.
    """

    def __init__(self, worker: Worker[Any], markers: Markers, *, is_last: bool = True) -> None:
        self._worker, self._markers, self._is_last = worker, markers, is_last

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields what `ShardActor` does, or one block with `shard` and `given`, a pickled result or error."""
        shards, shard, given = _Shards(self._worker, self._markers), int(batch["shard"][0]), batch["given"][0]
        shards.open(None)
        if self._is_last:
            yield from shards.answers(shard, pickle.loads(given))
            return
        work = SideThread(lambda: shards.report(shard, pickle.loads(given), Counter(shard)).content, name="shard")
        work.start()
        work.join()
        yield {"shard": [shard], "given": [pickle.dumps(shards.outcome(shard, work), protocol=5)]}


class _Shards:
    """A worker in its process. Here its errors become answers."""

    def __init__(self, worker: Worker[Any], markers: Markers) -> None:
        self._worker, self._markers = worker, markers
        self._failure: Exception | None = None
        self._opened_again = False

    def open(self, name: str | None) -> None:
        """Opens the worker; an error becomes the answer for every shard. With a name, a death here is counted."""
        try:
            if name is None:
                self._worker.open()
                return
            with self._markers.trying(name) as attempt:
                self._opened_again = attempt.of_run > 1
                self._worker.open()
        except Exception as error:
            self._failure = self._readable(error)

    def answers(self, shard: int, given: Any) -> Iterator[dict[str, Any]]:
        """Yields blocks of one row, `answer`."""
        counter = Counter(shard)
        work = SideThread(lambda: self.report(shard, given, counter), name=f"shard-{shard}")
        work.start()
        reported = without_news = 0
        while not work.ended(SECONDS_BETWEEN_ANSWERS):
            now, without_news = counter.progress(), without_news + 1
            if now.images != reported or without_news > MAX_ANSWERS_WITHOUT_NEWS:
                reported, without_news = now.images, 0
                yield _block(now)
        if (now := counter.progress()).images != reported:
            yield _block(now)
        outcome = self.outcome(shard, work)
        # If Ray repeats a call, it drops as many answers as it got before, so the error is also left as an object.
        is_to_be_noted = isinstance(outcome, Exception) and (self._failure is None or self._opened_again)
        if is_to_be_noted and not isinstance(outcome, ServiceError):
            self._markers.note_failure(shard, outcome)
        yield _block(outcome)
        if is_to_be_noted and isinstance(outcome, ServiceError):  # The store may take long to refuse the object.
            self._markers.note_failure(shard, outcome)

    def report(self, shard: int, given: Any, counter: Counter) -> ShardReport[Any]:
        """Processes a shard and reports on it."""
        if self._failure is not None:
            raise self._failure
        if isinstance(given, BaseException):
            raise given
        began_at = time.time()
        with self._markers.trying(f"shard-{shard:06d}.{self._worker.title}") as attempt:
            content = self._worker.work(shard, given, attempt=attempt, counter=counter)
        process = f"{os.uname().nodename}-{os.getpid()}"
        return ShardReport(
            shard=shard,
            began_at=began_at,
            ended_at=time.time(),
            process=process,
            memory_bytes=peak_memory_bytes(),
            content=content,
        )

    def outcome(self, shard: int, work: SideThread) -> Any:
        """The result of the work, or its error."""
        if isinstance(work.error, DecoderStuck):
            os._exit(1)  # A thread that hangs cannot be ended; the next process learns of the death from the marker.
        if isinstance(work.error, Exception):
            return self._readable(work.error)
        return work.result()

    def _readable(self, error: Exception) -> Exception:
        if isinstance(error, FORESEEN):
            return error
        log.error("%s failed", self._worker.title, exc_info=error)
        words = f"{self._worker.title} failed: {type(error).__name__}: {first_line(error)}"
        return WorkersFailed(f"{words} (--verbose and Ray's logs show where)")


def _block(answer: ShardProgress | ShardReport[Any] | MnistDistError) -> dict[str, Any]:
    return {"answer": [pickle.dumps(answer)]}
