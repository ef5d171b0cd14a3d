"""Ray Data over the shards of a generation: actors that hold the model, and CPU tasks that decode for them.

Owns: what Ray Data is asked for, and showing progress while it works. Does not own: what is done with a shard
(`scoring_actor`), which shards there are, or what a job takes of the cluster (`actors`).
"""

import pickle
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.data

from mnist_dist.console import Bar, Console, Stop
from mnist_dist.errors import WorkersFailed
from mnist_dist.lock import Lock
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.scoring.actor import (
    TASK_SHARD_BYTES,
    DecodeTask,
    ScoreTask,
    ScoringActor,
    ShardProgress,
    ShardReport,
)
from mnist_dist.on_ray.tasks import POLL_S, SILENCE_S, words_of
from mnist_dist.scoring.measuring import SteadySpeed
from mnist_dist.scoring.scorer import SHARDS_AT_ONCE
from mnist_dist.side_thread import SideThread

GIVE_UP_S = 30.0  # for the next answer, with which Ray Data ends: left alone, its thread starts another Ray
TASK_BYTES = 2 * TASK_SHARD_BYTES  # of a task that decodes: the pixels, and their block
SHARDS_IN_FLIGHT = 3  # with the one that waits, so that no actor waits for the driver


class ShardRun:
    """The shards of a generation that are not done, on their way through the cluster.

    Args:
        task: what every worker is told.
        actors: what the job takes.
    """

    def __init__(self, task: ScoreTask, *, actors: Actors) -> None:
        self._task, self._actors = task, actors
        self.steady = SteadySpeed()
        self._answers: queue.SimpleQueue[ShardProgress | ShardReport | BaseException] = queue.SimpleQueue()
        self._progress: dict[int, ShardProgress] = {}
        self._ok = self._other = 0
        self._reports: list[ShardReport] = []
        self._began_at, self._told = time.monotonic(), False
        self._first_answer_at: float | None = None

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
        self._began_at = time.monotonic()
        self.steady = SteadySpeed(total - done)
        given_up = threading.Event()
        work = SideThread(lambda: drain(self._dataset(shards), into=self._answers, given_up=given_up), name="ray-data")
        work.start()
        try:
            with console.progress("scoring") as bar:
                alive = True
                while alive:
                    work.join(POLL_S)
                    alive = work.is_alive()  # before the answers are taken, so that none is left at the end
                    self._take_answers()
                    stop.check()
                    if lock.lost:
                        lock.check()
                    self._tell_of_waiting(console)
                    self._show(bar, done=done, total=total)
        finally:
            given_up.set()
            work.join(GIVE_UP_S)
        if work.error is not None:
            raise WorkersFailed(words_of(work.error)) from work.error
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
                before = self._progress.get(answer.shard)
                self._ok += answer.ok - (before.ok if before else 0)
                self._other += answer.other - (before.other if before else 0)
                self._progress[answer.shard] = answer
                self.steady.note(self._ok + self._other, at=answer.at)

    def _tell_of_waiting(self, console: Console) -> None:
        if self._told or self._first_answer_at or time.monotonic() - self._began_at < SILENCE_S:
            return
        self._told = True
        free = ray.available_resources()
        console.line(
            f"still waiting for a first image of {self._actors}; free now: {free.get('CPU', 0):g} CPUs, "
            f"{free.get('GPU', 0):g} GPUs"
        )

    def _dataset(self, shards: Sequence[int]) -> "ray.data.Dataset":
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        dataset.context.target_max_block_size = 1  # an answer is a block of its own and travels at once
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
                # of few shards no more than its share: Ray Data fills the actor on the driver's node first
                max_tasks_in_flight_per_actor=min(SHARDS_IN_FLIGHT, -(-len(shards) // self._actors.count)),
                max_concurrent_calls_per_actor=SHARDS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
        )

    def _show(self, bar: Bar, *, done: int, total: int) -> None:
        ok, other = self._ok, self._other
        note = f"{done + ok + other:,} of {total:,} images"
        if self._first_answer_at and ok + other:
            rate = (ok + other) / max(time.monotonic() - self._first_answer_at, POLL_S)
            note += f", {rate:,.0f}/s, {(total - done - ok - other) / rate / 60:,.0f} min left"
        bar.update(done=done + ok + other, total=total, note=f"{note}, {other:,} not ok")


def drain(dataset: "ray.data.Dataset", *, into: "queue.SimpleQueue[Any]", given_up: threading.Event) -> None:
    """Lets Ray Data run, in a side thread; puts the pickled `answer`s into a queue until they end or are given up."""
    if given_up.is_set():  # while the dataset was made
        return
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        for answer in batch["answer"]:
            into.put(pickle.loads(answer))
        if given_up.is_set():
            return
