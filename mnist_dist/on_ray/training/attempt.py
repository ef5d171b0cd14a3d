"""One attempt at training: Ray Train runs in a thread while the main thread shows progress and handles signals.

Owns: the configuration of Ray Train, the display of progress from the board, the request to stop after a signal, and
the translation of Ray Train's failures into readable errors. Does not own: the run and its result (`train.py`).
"""

from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from mnist_dist.console import Bar, Console
from mnist_dist.errors import MnistDistError, WorkersFailed, first_line
from mnist_dist.on_ray.cluster import Share
from mnist_dist.on_ray.training.backend import CONFIGS, start_worker
from mnist_dist.on_ray.training.messages import WorkerResult, WorkerTask
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.arrow_files import ray_storage
from mnist_dist.training.host import Position

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
        self._trainer = DataParallelTrainer(
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
                f"validation loss {epoch.val_loss:.4f}, validation accuracy {epoch.val_accuracy:.4f}"
            )
        if position is not None:
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
            f"waiting for {self._share.workers} workers of {self._share.cpus:g} CPU"
            f"{self._share.shown_gpus}; free now: {free.get('CPU', 0):g} CPUs, "
            f"{free.get('GPU', 0):g} GPUs"
        )


def readable(error: BaseException) -> MnistDistError:
    """Finds a worker's MnistDistError in an error of Ray Train, or describes the first failure as WorkersFailed.

    Args:
        error: the error that Ray Train raised. Its `worker_failures` maps ranks to errors; for a worker that died, the
            cause is in `health_check_failure`.
    """
    failures = getattr(error, "worker_failures", None) or {}
    causes = {rank: getattr(cause, "health_check_failure", cause) for rank, cause in sorted(failures.items())}
    for cause in causes.values():
        link: BaseException | None = cause
        while link is not None:
            if isinstance(link, MnistDistError):
                return link
            link = getattr(link, "cause", None) or link.__cause__
    rank, first = next(iter(causes.items()), ("?", error))
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
