"""Ray Data over the shards of a generation: actors that hold the model, and CPU tasks that decode for them.

Owns: what Ray is asked for, showing progress while it works, and what a failure of Ray means to a person. Does not
own: what is done with a shard (`scoring_actor`), or which shards there are.
"""

import contextlib
import json
import pickle
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from mnist_dist import storage
from mnist_dist.config import ScoreRunConfig
from mnist_dist.console import Bar, Console, Stop
from mnist_dist.errors import ResourceError, ServiceError, WorkersFailed
from mnist_dist.lock import Lock
from mnist_dist.on_ray.cluster import Resources, await_nodes, share
from mnist_dist.on_ray.scoring_actor import (
    TASK_SHARD_BYTES,
    DecodeTask,
    ScoreTask,
    ScoringActor,
    ShardProgress,
    ShardReport,
)
from mnist_dist.on_ray.side_thread import SideThread
from mnist_dist.scoring.scorer import SHARDS_AT_ONCE

POLL_S = 0.2
SILENCE_S = 60.0  # without an image: starting takes less, unless there is no room for the actors
GIVE_UP_S = 30.0  # for the next answer, with which Ray Data ends: left alone, its thread starts another Ray
TASK_BYTES = 2 * TASK_SHARD_BYTES  # of a task that decodes: the pixels, and their block
MOST_CPUS = 0.9  # of those that actors of some size could use; for the rest, no smaller ones
SHARDS_IN_FLIGHT = 3  # with the one that waits, so that no actor waits for the driver


@dataclass(frozen=True, kw_only=True)
class Actors:
    """What the job takes of the cluster."""

    count: int
    cpus: float
    """Of each."""
    gpus: float
    """Of each."""
    decode_in_tasks: bool

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        decoding = "images decoded in CPU tasks" if self.decode_in_tasks else "images decoded in its threads"
        return f"{self.count} actor(s) of {self.cpus:g} CPU{gpus}, {decoding}"


def choose_actors(have: Resources, run: ScoreRunConfig, *, most: int | None = None) -> Actors:
    """What a job takes: one actor per GPU, else as few and as large ones as use most of the CPUs.

    Args:
        have: what the cluster has.
        run: what was asked for.
        most: more actors than this would have nothing to do. None: not known yet.

    Raises:
        ResourceError: the cluster has less than was asked for.
    """
    gpus = run.gpus_per_actor if run.gpus_per_actor is not None else float(have.gpus > 0)
    in_tasks = run.decode == "tasks" or (run.decode == "auto" and gpus > 0)
    count, cpus = run.actors, run.cpus_per_actor
    if gpus:
        places = sum(int(of_node / gpus + 1e-9) for _, of_node in have.by_node)
        count = count or max(1, min(places, most or places))
        if count > places:
            raise ResourceError(
                f"{count} actor(s) of {gpus:g} GPU each do not fit; the cluster has {have}. "
                f"Received: gpus_per_actor={gpus:g}"
            )
        cpus = min(1.0, have.cpus / count / 2) if cpus is None and in_tasks else cpus  # the others decode
    elif count is None:
        cpus = cpus or _best_size(have)
        count = max(1, min(have.room(cpus), most or 2**30))
        cpus = max(1.0, cpus // 2) if in_tasks and run.cpus_per_actor is None else cpus
    mine = share(have, workers=count, cpus_per_worker=cpus, gpu=gpus >= 1, what="actor")
    if in_tasks and max(_left_cpus(have, count, cpus=mine.cpus, gpus=gpus)) < 1:
        if run.decode == "tasks":
            raise ResourceError(
                f"tasks that decode take a whole CPU each, beside {count} actor(s) of {mine.cpus:g} CPU; the cluster "
                f"has {have}. Received: decode='tasks'"
            )
        in_tasks = False
    return Actors(count=count, cpus=mine.cpus, gpus=gpus, decode_in_tasks=in_tasks)


def await_actors(have: Resources, run: ScoreRunConfig, *, console: Console, stop: Stop) -> Resources:
    """What the cluster has once there is room for the actors that were asked for; see `await_nodes`."""
    return await_nodes(
        have,
        count=run.actors or 1,
        cpus=run.cpus_per_actor or 1.0,
        gpus=run.gpus_per_actor or 0.0,
        wait_s=run.wait_for_nodes_s,
        console=console,
        stop=stop,
    )


def _best_size(have: Resources) -> float:
    """CPUs of an actor such that as many of them as fit use most of the CPUs; the largest such: each holds a model."""
    sizes = range(1, int(max(cpus for cpus, _ in have.by_node)) + 1)
    used = {size: have.room(size) * size for size in sizes}
    return float(max((size for size in sizes if used[size] >= MOST_CPUS * max(used.values())), default=1))


def _left_cpus(have: Resources, count: int, *, cpus: float, gpus: float) -> list[float]:
    """The CPUs of each node beside the actors, packed from the first node on."""
    left = []
    for node_cpus, node_gpus in have.by_node:
        fit = min(int(node_cpus / cpus + 1e-9), int(node_gpus / gpus + 1e-9) if gpus else count, count)
        left.append(node_cpus - fit * cpus)
        count -= fit
    return left


class ShardRun:
    """The shards of a generation that are not done, on their way through the cluster.

    Entered, it has the actors load the model; there is work for them once the generation is written down
    (`run_to_end`). Leaving it ends what is still under way.

    Args:
        task: what every worker is told.
        actors: what the job takes.
    """

    def __init__(self, task: ScoreTask, *, actors: Actors) -> None:
        self._task, self._actors = task, actors
        self._answers: queue.SimpleQueue[ShardProgress | ShardReport | BaseException] = queue.SimpleQueue()
        self._progress: dict[int, ShardProgress] = {}
        self._reports: list[ShardReport] = []
        self._began_at, self._told = time.monotonic(), False
        self._first_answer_at: float | None = None
        self._to_do = task.generation.to_do_uri(task.attempts.run_id)
        self._given_up = threading.Event()
        self._work = SideThread(self._drain, name="ray-data")

    def __enter__(self) -> "ShardRun":
        storage.write_bytes(_waiting(self._to_do), b"")
        self._work.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up.set()
        for uri in (_waiting(self._to_do), self._to_do):  # nothing is written: the disk may be full
            with contextlib.suppress(OSError, ServiceError):  # what ended the job is on its way already
                storage.delete(uri)
        self._work.join(GIVE_UP_S)

    def run_to_end(
        self, shards: Sequence[int], *, console: Console, stop: Stop, lock: Lock, done: int, total: int
    ) -> list[ShardReport]:
        """Scores the shards; shows progress, and ends where a signal comes: what is done stays done.

        Args:
            shards: that are not done, of a generation that was begun.
            console: to show progress on.
            stop: looked at all the time.
            lock: looked at all the time.
            done: images that were scored before.
            total: images of the generation.

        Raises:
            MnistDistError, OSError: what a worker came upon.
            WorkersFailed: Ray Data gave up.
            Interrupted: a signal came.
            Locked: another driver has taken over.
        """
        storage.write_bytes(self._to_do, json.dumps(list(shards)).encode())
        self._began_at = time.monotonic()
        with console.progress("scoring") as bar:
            alive = True
            while alive:
                self._work.join(POLL_S)
                alive = self._work.is_alive()  # before the answers are taken, so that none is left at the end
                self._take_answers()
                stop.check()
                if lock.lost:
                    lock.check()
                self._tell_of_waiting(console)
                self._show(bar, done=done, total=total)
        if self._work.error is not None:
            raise WorkersFailed(words_of(self._work.error)) from self._work.error
        not_done = sorted(set(shards) - self._task.generation.done_shards())
        if not_done:
            raise self._task.attempts.failure_of(not_done[0])
        return self._reports

    def _take_answers(self) -> None:
        while not self._answers.empty():
            answer = self._answers.get()
            if isinstance(answer, BaseException):
                raise answer
            self._first_answer_at = self._first_answer_at or time.monotonic()
            if isinstance(answer, ShardReport):
                self._reports.append(answer)
            else:
                self._progress[answer.shard] = answer

    def _tell_of_waiting(self, console: Console) -> None:
        if self._told or self._first_answer_at or time.monotonic() - self._began_at < SILENCE_S:
            return
        self._told = True
        free = ray.available_resources()
        console.line(
            f"still waiting for a first image of {self._actors}; free now: {free.get('CPU', 0):g} CPUs, "
            f"{free.get('GPU', 0):g} GPUs"
        )

    def _drain(self) -> None:
        drain(self._dataset(), into=self._answers, given_up=self._given_up)

    def _dataset(self) -> "ray.data.Dataset":
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.read_datasource(_ShardsToDo(self._task), override_num_blocks=1, num_cpus=0)
        dataset.context.target_max_block_size = 1  # a shard, or an answer, is a block of its own and travels at once
        if self._actors.decode_in_tasks:
            # other resources than the actors', or Ray Data would fuse them and decode in the actors
            dataset = dataset.map_batches(DecodeTask(self._task), batch_size=None, num_cpus=1, memory=TASK_BYTES)
        return dataset.map_batches(
            ScoringActor,
            fn_constructor_args=(self._task,),
            batch_size=None,
            num_cpus=self._actors.cpus,
            num_gpus=self._actors.gpus,
            compute=ray.data.ActorPoolStrategy(
                size=self._actors.count,
                max_tasks_in_flight_per_actor=SHARDS_IN_FLIGHT,
                max_concurrent_calls_per_actor=SHARDS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
        )

    def _show(self, bar: Bar, *, done: int, total: int) -> None:
        ok = sum(shard.ok for shard in self._progress.values())
        other = sum(shard.other for shard in self._progress.values())
        note = f"{done + ok + other:,} of {total:,} images"
        if self._first_answer_at and ok + other:
            rate = (ok + other) / max(time.monotonic() - self._first_answer_at, POLL_S)
            note += f", {rate:,.0f}/s, {(total - done - ok - other) / rate / 60:,.0f} min left"
        bar.update(done=done + ok + other, total=total, note=f"{note}, {other:,} not ok")


def drain(dataset: "ray.data.Dataset", *, into: "queue.SimpleQueue[Any]", given_up: threading.Event) -> None:
    """Lets Ray Data run, in a side thread; puts the pickled `answer`s into a queue until they end or are given up."""
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        for answer in batch["answer"]:
            into.put(pickle.loads(answer))
        if given_up.is_set():
            return


class _ShardsToDo(Datasource):
    """The numbers of the shards that are left, from one task that waits until the driver has written them down."""

    def __init__(self, task: ScoreTask) -> None:
        self._uri = task.generation.to_do_uri(task.attempts.run_id)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._blocks, unknown)]

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def _blocks(self) -> Iterator[pa.Table]:
        """The same blocks each time it is called: Ray calls it again where its process dies."""
        while not storage.exists(self._uri):
            if not storage.exists(_waiting(self._uri)):  # the driver has given up
                return
            time.sleep(POLL_S)
        for shard in json.loads(storage.read_bytes(self._uri)):
            yield pa.table({"shard": [shard]})


def _waiting(to_do_uri: str) -> str:
    """Of an object that is there as long as the shards are waited for, or worked on."""
    return f"{to_do_uri}.waiting"


def words_of(error: BaseException) -> str:
    """What a failure of Ray Data means to a person."""
    cause = getattr(error, "cause", None)
    # the text of an actor that could not start is a traceback, whose last line says why
    lines = str(cause or error).strip().splitlines() or ["no message"]
    words, cause = (lines[0], cause) if cause else (lines[-1], error)
    return f"the workers failed: {type(cause).__name__}: {words} (--verbose and Ray's logs show where)"
