"""One attempt at training: Ray Train runs in a thread while the main thread shows progress and handles signals.

Owns: the configuration of Ray Train, the display of progress from the board, the request to stop after a signal, and
the translation of Ray Train's failures into readable errors. Does not own: the run and its result (`train.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from mnist_dist.console import Bar, Console
from mnist_dist.errors import MnistDistError, OutOfMemory, WorkersFailed, first_line
from mnist_dist.on_ray.cluster import Share
from mnist_dist.on_ray.training.backend import CONFIGS, start_worker
from mnist_dist.on_ray.training.messages import WorkerResult, WorkerTask
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.arrow_files import ray_storage
from mnist_dist.training.host import Measured, Position

UNUSED_CALLBACKS = ("DatasetsCallback",)  # of Ray Train: a process that hands out Ray Data's datasets; there are none
SILENCE_S = 30.0  # of silence before a message; workers start faster than this, unless resources are missing


class Attempt:
    """One launch of Ray Train.

    Args:
        task: the task of every worker.
        name: name of the run's subfolder for checkpoints.
        share: the number of workers and the resources of each.
        loop: the function that a worker calls with `{"task": task}`. None trains.
    """

    def __init__(
        self, task: WorkerTask, *, name: str, share: Share, loop: Callable[[dict[str, Any]], Any] | None = None
    ) -> None:
        self._task, self._share = task, share
        self._reported_waiting = False
        resources = {"CPU": share.cpus, **({"GPU": float(share.gpus)} if share.gpus else {})}
        files, path = ray_storage(task.run, ANYWHERE)
        self._trainer = _Trainer(
            loop or _worker_loop,
            backend_config=CONFIGS[task.backend](),
            train_loop_config={"task": task},
            scaling_config=ray.train.ScalingConfig(
                num_workers=share.workers, use_gpu=share.gpus > 0, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=files,
                failure_config=ray.train.FailureConfig(max_failures=task.job.run.max_failures),
                callbacks=[_Ended(task.board)],
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            ),
        )

    def run_to_end(self, session: Session) -> WorkerResult:
        """Runs the workers until they finish, or stop because of a signal.

        Raises:
            MnistDistError: a worker's own error.
            WorkersFailed: a worker failed or died more often than `max_failures`.
            LockLost: another driver took over the lock.
            Interrupted: a signal came before any worker ran that could save something.
        """
        fit = SideThread(self._trainer.fit, name="ray-train")
        fit.start()
        with session.console.progress("training") as bar:
            session.watch(
                fit.ended,
                show=lambda: self._show(bar, session),
                on_signal=lambda: ray.get(self._task.board.ask_to_stop.remote()),
            )
        if fit.error is not None:
            raise readable(fit.error) from fit.error
        result: WorkerResult = fit.result().return_value
        return result

    def _show(self, bar: Bar, session: Session) -> None:
        """Shows new progress, or why there is none."""
        position, epochs, silent_s = ray.get(self._task.board.take.remote())
        for epoch in epochs:
            session.console.line(
                f"epoch {epoch.epoch} ({epoch.phase}): loss {epoch.loss:.4f}, accuracy {epoch.accuracy:.4f}, "
                f"validation loss {epoch.val_loss:.4f}, validation {epoch.score_name} {epoch.score:.4f}"
            )
        if isinstance(position, Measured):
            note = f"measuring on {position.done:,} of {position.images:,} {position.split} images"
            bar.update(done=position.done, total=position.images, note=note)
        elif position is not None:
            bar.update(done=_steps_done(position), total=position.epochs * position.steps, note=_note(position))
        if silent_s > SILENCE_S:
            session.stop.check()
            self._report_waiting(session.console)

    def _report_waiting(self, console: Console) -> None:
        if self._reported_waiting:
            return
        self._reported_waiting = True
        free = ray.available_resources()
        console.line(
            f"no step yet: {self._share.workers} worker(s) of {self._share.cpus:g} CPU{self._share.shown_gpus} load "
            f"the network, or wait for resources (free besides them: {free.get('CPU', 0):g} CPUs, "
            f"{free.get('GPU', 0):g} GPUs)"
        )


class _Trainer(DataParallelTrainer):
    """Ray Train without the processes that a run here has no use for."""

    def _create_default_callbacks(self) -> list[Any]:  # were Ray to rename it, they would start again
        return [made for made in super()._create_default_callbacks() if type(made).__name__ not in UNUSED_CALLBACKS]


class _Ended(ray.train.UserCallback):
    """Tells the board how each group of workers ended. Ray Train calls it in its controller, before the next begins."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        error = lack_of_memory(worker_exceptions)
        repeats = any(isinstance(link, OutOfMemory) for cause in worker_exceptions.values() for link in _chain(cause))
        ray.get(self._board.ended.remote(error, repeats=repeats))


def lack_of_memory(failures: Mapping[int, BaseException]) -> OutOfMemory | None:
    """The lack of memory that ended workers: their own error, or that of Ray, which ends processes before the kernel
    does.

    Args:
        failures: the errors of workers, by rank.
    """
    links = [(rank, link) for rank, cause in sorted(failures.items()) for link in _chain(cause)]
    for _, link in links:
        if isinstance(link, OutOfMemory):
            return link
    for rank, link in links:
        if isinstance(link, ray.exceptions.OutOfMemoryError):
            return OutOfMemory(f"Ray ended worker {rank}, as the memory of its node ran short")
    return None


def has_died(error: WorkersFailed) -> bool:
    """Whether a worker's process ended, rather than raised, in a failure that `run_to_end` raises."""
    failures = getattr(error.__cause__, "worker_failures", None) or {}
    links = (link for cause in failures.values() for link in _chain(cause))
    return any(isinstance(link, ray.exceptions.RayActorError) for link in links)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error of Ray Train and what caused it; for a worker that died, that is in `health_check_failure`."""
    link: BaseException | None = getattr(error, "health_check_failure", error)
    while link is not None:
        yield link
        link = getattr(link, "cause", None) or link.__cause__


def readable(error: BaseException) -> MnistDistError:
    """Finds a worker's MnistDistError in an error of Ray Train, or describes the first failure as WorkersFailed.

    Args:
        error: the error that Ray Train raised. Its `worker_failures` maps ranks to errors.
    """
    failures = getattr(error, "worker_failures", None) or {}
    for _, cause in sorted(failures.items()):
        for link in _chain(cause):
            if isinstance(link, MnistDistError):
                return link
    of_ray = lack_of_memory(failures)
    if of_ray is not None:
        return of_ray
    rank, cause = next(iter(sorted(failures.items())), ("?", error))
    first = next(_chain(cause))
    words = first_line(first)
    return WorkersFailed(f"worker {rank} failed: {type(first).__name__}: {words} (--verbose and Ray's logs show where)")


def _worker_loop(config: dict[str, Any]) -> Any:
    start_worker(config["task"].backend)  # Before Keras is imported.
    from mnist_dist.on_ray.training.worker import work

    return work(config["task"])


def _steps_done(position: Position) -> int:
    return (position.epoch - 1) * position.steps + position.step


def _note(position: Position) -> str:
    """Short enough for a bar on 80 columns."""
    speed = f", {position.images_per_s:,.0f} images/s" if position.images_per_s else ""
    epoch = f"{position.phase} {position.epoch}/{position.epochs}"
    return f"{epoch}, loss {position.loss:.3f}, acc {position.accuracy:.3f}{speed}"
