"""Ray Data over the shards of a generation: actors that hold the model, and CPU tasks that decode for them.

Owns: what Ray is asked for, showing progress while it works, and what a failure of Ray means to a person. Does not
own: what is done with a shard (`scoring_actor`), or which shards there are.
"""

import pickle
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import ray.data

from mnist_dist.config import ScoreRunConfig
from mnist_dist.console import Bar, Stop
from mnist_dist.errors import ResourceError, WorkersFailed
from mnist_dist.lock import Lock
from mnist_dist.on_ray.cluster import Resources, share
from mnist_dist.on_ray.scoring_actor import DecodeTask, ScoreTask, ScoringActor, ShardProgress, ShardReport
from mnist_dist.on_ray.side_thread import SideThread

POLL_S = 0.2
GIVE_UP_S = 30.0  # for the next answer, with which Ray Data ends: left alone, its thread starts another Ray
TASK_SHARD_BYTES = 128 * 2**20  # of decoded pixels at most, that travel from a task to an actor
TASK_BYTES = 2 * TASK_SHARD_BYTES  # of a task that decodes: the pixels, and their block
SHARDS_AT_ONCE = 2  # in an actor: the next one is decoded while the model ends the last
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


def choose_actors(have: Resources, run: ScoreRunConfig) -> Actors:
    """What a job takes: one actor per GPU, or per node, unless it says otherwise.

    Raises:
        ResourceError: the cluster has less than was asked for.
    """
    gpus = run.gpus_per_actor if run.gpus_per_actor is not None else float(have.gpus > 0)
    in_tasks = run.decode == "tasks" or (run.decode == "auto" and gpus > 0)
    places = sum(int(of_node / gpus + 1e-9) for _, of_node in have.by_node) if gpus else have.nodes
    count = run.actors or max(1, places)
    if gpus and count > places:
        raise ResourceError(
            f"{count} actor(s) of {gpus:g} GPU each do not fit; the cluster has {have}. "
            f"Received: gpus_per_actor={gpus:g}"
        )
    cpus = run.cpus_per_actor
    if cpus is None and in_tasks:
        cpus = min(1.0, have.cpus / count / 2)  # the others decode
    mine = share(have, workers=count, cpus_per_worker=cpus, gpu=gpus >= 1)
    if in_tasks and have.cpus - count * mine.cpus < 1:
        if run.decode == "tasks":
            raise ResourceError(
                f"tasks that decode take a CPU each, beside {count} actor(s) of {mine.cpus:g} CPU; the cluster has "
                f"{have}. Received: decode='tasks'"
            )
        in_tasks = False
    return Actors(count=count, cpus=mine.cpus, gpus=gpus, decode_in_tasks=in_tasks)


class ShardRun:
    """The shards that are left, on their way through the cluster.

    Args:
        task: what every worker is told.
        shards: their numbers.
        actors: what the job takes.
    """

    def __init__(self, task: ScoreTask, shards: Sequence[int], *, actors: Actors) -> None:
        self._task, self._shards, self._actors = task, shards, actors
        self._answers: queue.SimpleQueue[ShardProgress | ShardReport | BaseException] = queue.SimpleQueue()
        self._progress: dict[int, ShardProgress] = {}
        self._given_up = threading.Event()

    def run_to_end(self, *, bar: Bar, stop: Stop, lock: Lock, done: int, total: int) -> list[ShardReport]:
        """Scores the shards; shows progress, and ends where a signal comes: what is done stays done.

        Args:
            bar: to show progress on.
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
        reports: list[ShardReport] = []
        work = SideThread(self._drain, name="ray-data")
        work.start()
        alive = True
        try:
            while alive:
                work.join(POLL_S)
                alive = work.is_alive()  # before the queue is emptied, so that nothing is left in it at the end
                while not self._answers.empty():
                    answer = self._answers.get()
                    if isinstance(answer, BaseException):
                        raise answer
                    if isinstance(answer, ShardReport):
                        reports.append(answer)
                    else:
                        self._progress[answer.shard] = answer
                stop.check()
                if lock.lost:
                    lock.check()
                self._show(bar, done=done, total=total)
        finally:
            self._given_up.set()
            work.join(GIVE_UP_S)
        if work.error is not None:
            raise WorkersFailed(_words(work.error)) from work.error
        return reports

    def _drain(self) -> None:
        """Lets Ray Data run, in a side thread."""
        for batch in self._dataset().iter_batches(batch_size=None, prefetch_batches=0):
            for answer in batch["answer"]:
                self._answers.put(pickle.loads(answer))
            if self._given_up.is_set():
                return

    def _dataset(self) -> "ray.data.Dataset":
        ray.data.DataContext.get_current().enable_progress_bars = False
        items = [{"shard": shard} for shard in self._shards]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        dataset.context.target_max_block_size = 1  # an answer is a block of its own, and travels at once
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
        note = f"{done + ok + other:,} of {total:,} images, {other:,} not ok"
        bar.update(done=done + ok + other, total=total, note=note)


def _words(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    # the text of an actor that could not start is a traceback, whose last line says why
    lines = str(cause or error).strip().splitlines() or ["no message"]
    words, cause = (lines[0], cause) if cause else (lines[-1], error)
    return f"the workers failed: {type(cause).__name__}: {words} (--verbose and Ray's logs show where)"
