"""The one way from numbered shards to reports: Ray Data hands each shard to a `Worker`, in actors or in tasks.

Owns: what Ray Data is asked for, the answers on their way back, progress, and what the death of a process costs. Does
not own: what is done to a shard (a `Worker` of each job), or what a job takes of the cluster (`actors`).

A worker answers with how far it is, a few times a second, and at last with a report. Ray Data loses the type of what is
raised in it, so errors travel as answers, too. When a process dies, Ray starts another and gives it the same shard; the
marker that was put before the shard was begun (`data/markers.py`) tells it so, and limits how often that happens.
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

from mnist_dist.console import Bar
from mnist_dist.data.markers import FORESEEN, Attempt, Markers
from mnist_dist.data.steady_speed import SteadySpeed
from mnist_dist.errors import DecoderStuck, MnistDistError, ServiceError, WorkersFailed, first_line
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.tasks import SILENCE_S, peak_memory_bytes, words_of
from mnist_dist.session import POLL_S, Session
from mnist_dist.side_thread import SideThread

log = logging.getLogger(__name__)

SECONDS_BETWEEN_ANSWERS = 0.5
MAX_ANSWERS_WITHOUT_NEWS = 4  # then one all the same: only between answers can Ray Data be told to end
GIVE_UP_S = 30.0  # for the next answer, with which Ray Data ends: left alone, its thread starts another Ray
Content = TypeVar("Content")
ContentOut = TypeVar("ContentOut", covariant=True)


class Counter:
    """Counts the images of a shard that are done; several threads may tell it."""

    def __init__(self, shard: int) -> None:
        self._shard, self._lock = shard, threading.Lock()
        self._ok, self._other, self._at = 0, 0, time.time()

    def add(self, ok: int, other: int) -> None:
        """So many more images came out well, and so many did not."""
        with self._lock:
            self._ok, self._other, self._at = self._ok + ok, self._other + other, time.time()

    def progress(self) -> "ShardProgress":
        """How far the shard is."""
        with self._lock:
            return ShardProgress(self._shard, self._ok, self._other, self._at)


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """How far a shard is; begun again, since its process died, it is counted again from zero."""

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
    """How a shard was done."""

    shard: int
    began_at: float
    """Seconds since the epoch."""
    ended_at: float
    process: str
    """Which process did it."""
    memory_bytes: int
    """Most that it has held so far."""
    content: Content
    """What the worker has to say."""


class Worker(Protocol[ContentOut]):
    """What is done with a shard; pickled on its way to the processes that do it."""

    @property
    def title(self) -> str:
        """Of the work, for markers and threads, such as `scoring`."""

    def open(self) -> None:
        """Called once in each process, before its first shard."""

    def work(self, shard: int, given: Any, *, attempt: Attempt, counter: Counter) -> ContentOut:
        """Does a shard and puts what comes of it where it belongs.

        Args:
            shard: its number.
            given: what `ShardWork.given` or the worker before has for it; None where there is neither.
            attempt: how often it was begun.
            counter: counts the images that are done.
        """


@dataclass(frozen=True, kw_only=True)
class ShardWork(Generic[Content]):
    """What is done with numbered shards, and where."""

    worker: Worker[Content]
    done: Callable[[], set[int]]
    """The shards that are done, whoever did them."""
    folder: str
    """URI where the markers lie."""
    max_deaths: int
    """Deaths of a process over the same shard after which the work is given up."""
    actors: Actors | None = None
    """Processes that keep the worker open; None: tasks of one CPU each, one per shard."""
    shards_at_once: int = 1
    """In an actor."""
    before: Worker[Any] | None = None
    """What is done with each shard in a task of one CPU, before an actor gets it as `given`."""
    before_bytes: int = 0
    """Memory of such a task."""
    given: Callable[[int], Any] | None = None
    """What each shard's worker is handed."""


@dataclass(frozen=True, kw_only=True)
class Ran(Generic[Content]):
    """What came of a run."""

    reports: list[ShardReport[Content]]
    steady_images_per_s: float | None
    """Once the processes were under way; None where the run was too short to tell."""


def run_shards(
    work: ShardWork[Content], shards: Sequence[int], session: Session, *, title: str, done: int, total: int
) -> Ran[Content]:
    """Does the shards; shows progress, and ends where a signal comes: what is done stays done.

    Args:
        work: what is done, and where.
        shards: that are not done.
        session: of the job.
        title: of the bar.
        done: images that were done before.
        total: images of all shards.

    Raises:
        MnistDistError, OSError: what a worker came upon.
        WorkersFailed: processes died over a shard more often than `max_deaths`, or Ray Data gave up.
        Interrupted: a signal came.
        Locked: another driver has taken over.
    """
    markers = Markers(work.folder, run_id=uuid.uuid4().hex, max_deaths=work.max_deaths)
    progress = _Progress(work, session, done=done, total=total)
    given_up = threading.Event()

    def drain() -> None:
        dataset = _dataset(work, markers, shards)
        if given_up.is_set():  # while the dataset was made
            return
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for answer in batch["answer"]:
                progress.answers.put(pickle.loads(answer))
            if given_up.is_set():
                return

    ray_data = SideThread(drain, name="ray-data")
    ray_data.start()
    try:
        with session.console.progress(title) as bar:
            session.watch(ray_data.ended, show=lambda: progress.show(bar))
        if ray_data.error is not None:
            raise WorkersFailed(words_of(ray_data.error)) from ray_data.error
        if not_done := sorted(set(shards) - work.done()):
            raise markers.failure_of(not_done[0])
    except ServiceError:
        raise  # nothing is cleared away in a storage that does not answer
    except (MnistDistError, OSError):
        given_up.set()
        ray_data.join(GIVE_UP_S)
        markers.forget_failures()
        raise
    finally:
        given_up.set()
        ray_data.join(GIVE_UP_S)
    return Ran(reports=progress.reports, steady_images_per_s=progress.steady.images_per_s)


class _Progress(Generic[Content]):
    """The answers of the workers, and what a person sees of them."""

    def __init__(self, work: ShardWork[Content], session: Session, *, done: int, total: int) -> None:
        self._work, self._session, self._done, self._total = work, session, done, total
        self.answers: queue.SimpleQueue[ShardProgress | ShardReport[Content] | BaseException] = queue.SimpleQueue()
        self.reports: list[ShardReport[Content]] = []
        self.steady = SteadySpeed(total - done)
        self._shards: dict[int, ShardProgress] = {}
        self._ok = self._other = 0
        self._began_at, self._is_told = time.monotonic(), False
        self._first_answer_at: float | None = None

    def show(self, bar: Bar) -> None:
        """Takes the answers that are there; raises the first one that is an error."""
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
        self._say_what_is_waited_for()
        images = self._ok + self._other
        note = f"{self._done + images:,} of {self._total:,} images"
        if self._first_answer_at and images:
            rate = images / max(time.monotonic() - self._first_answer_at, POLL_S)
            note += f", {rate:,.0f}/s, {(self._total - self._done - images) / rate / 60:,.0f} min left"
        bar.update(done=self._done + images, total=self._total, note=f"{note}, {self._other:,} not ok")

    def _note(self, now: ShardProgress) -> None:
        before = self._shards.get(now.shard)
        self._ok += now.ok - (before.ok if before else 0)
        self._other += now.other - (before.other if before else 0)
        self._shards[now.shard] = now
        self.steady.note(self._ok + self._other, at=now.at)

    def _say_what_is_waited_for(self) -> None:
        if self._is_told or self._first_answer_at or time.monotonic() - self._began_at < SILENCE_S:
            return
        self._is_told = True
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
    dataset.context.target_max_block_size = 1  # an answer is a block of its own and travels at once
    actors = work.actors
    if actors is None:
        return dataset.map_batches(ShardTask(work.worker, markers), batch_size=None, num_cpus=1)
    if work.before is not None:
        # other resources than the actors', or Ray Data would fuse them and do all of it in the actors
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
            # of few shards no more than its share: Ray Data fills the actor on the driver's node first; with one that
            # waits, so that no actor waits for the driver
            max_tasks_in_flight_per_actor=min(work.shards_at_once + 1, -(-len(shards) // actors.count)),
            max_concurrent_calls_per_actor=work.shards_at_once,
            enable_true_multi_threading=True,
        ),
    )


class ShardActor:
    """A process that keeps a worker open."""

    def __init__(self, worker: Worker[Any], markers: Markers) -> None:
        self._shards = _Shards(worker, markers)
        # the same name when Ray starts it again
        self._shards.open(f"actor-{ray.get_runtime_context().get_actor_id()}")

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Does the shard of a block of one row: `shard`, and `given`.

        Yields blocks of one row, `answer`: a pickled `ShardProgress`, at last a pickled `ShardReport` or error.
        """
        yield from self._shards.answers(int(batch["shard"][0]), pickle.loads(batch["given"][0]))


class ShardTask:
    """A worker that is opened for each shard, anywhere in the cluster.

    Args:
        worker: what is done.
        markers: of the driver.
        is_last: whether nothing comes behind it, so that it answers as a `ShardActor`; else what the worker gives is
            what the actor is given.
    """

    def __init__(self, worker: Worker[Any], markers: Markers, *, is_last: bool = True) -> None:
        self._worker, self._markers, self._is_last = worker, markers, is_last

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """As `ShardActor`, or a block with `shard` and `given`, a pickled value or error."""
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
    """A worker in a process, and the border at which its errors become answers."""

    def __init__(self, worker: Worker[Any], markers: Markers) -> None:
        self._worker, self._markers = worker, markers
        self._failure: Exception | None = None
        self._opened_again = False

    def open(self, name: str | None) -> None:
        """Opens the worker; an error is the answer to every shard. A death counts where there is a name for it."""
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
        """Blocks of one row, `answer`."""
        counter = Counter(shard)
        work = SideThread(lambda: self.report(shard, given, counter), name=f"shard-{shard}")
        work.start()
        told = without_news = 0
        while not work.ended(SECONDS_BETWEEN_ANSWERS):
            now, without_news = counter.progress(), without_news + 1
            if now.images != told or without_news > MAX_ANSWERS_WITHOUT_NEWS:
                told, without_news = now.images, 0
                yield _block(now)
        if (now := counter.progress()).images != told:
            yield _block(now)
        outcome = self.outcome(shard, work)
        # Ray drops as many answers of a call that it repeats as it had before, so an error is left as an object, too
        is_to_be_noted = isinstance(outcome, Exception) and (self._failure is None or self._opened_again)
        if is_to_be_noted and not isinstance(outcome, ServiceError):
            self._markers.note_failure(shard, outcome)
        yield _block(outcome)
        if is_to_be_noted and isinstance(outcome, ServiceError):  # the storage may take long to refuse the object
            self._markers.note_failure(shard, outcome)

    def report(self, shard: int, given: Any, counter: Counter) -> ShardReport[Any]:
        """Does a shard."""
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
        """What the work gave, or its error."""
        if isinstance(work.error, DecoderStuck):
            os._exit(1)  # a thread that hangs cannot be ended; the next attempt knows by the marker
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
