"""One attempt at training: Ray Train runs in a thread, while the main thread shows progress and takes signals.

Owns: what Ray Train is told, the progress that the board brings, passing on a signal, and what a failure of Ray Train
means to a person.
"""

from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from mnist_dist.console import Bar, Console
from mnist_dist.errors import MnistDistError, WorkersFailed, first_line
from mnist_dist.on_ray.cluster import Share
from mnist_dist.on_ray.training.backend import TensorflowBackendConfig
from mnist_dist.on_ray.training.messages import WorkerResult, WorkerTask
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread
from mnist_dist.training.host import Position

SILENCE_S = 30.0  # without a word from the workers: starting takes less, unless there is no room for them


class Attempt:
    """Ray Train with one task.

    Args:
        task: what every worker does.
        name: of the folder in the run that gets the checkpoints.
        share: how many workers, and what each gets.
        loop: what a worker does with `{"task": task}`; None: train.
    """

    def __init__(
        self, task: WorkerTask, *, name: str, share: Share, loop: Callable[[dict[str, Any]], Any] | None = None
    ) -> None:
        self._task, self._share = task, share
        self._told = False
        resources = {"CPU": share.cpus, **({"GPU": 1.0} if share.gpu else {})}
        self._trainer = DataParallelTrainer(
            loop or _worker_loop,
            backend_config=TensorflowBackendConfig(),
            train_loop_config={"task": task},
            scaling_config=ray.train.ScalingConfig(
                num_workers=share.workers, use_gpu=share.gpu, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=task.run,
                failure_config=ray.train.FailureConfig(max_failures=task.job.run.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            ),
        )

    def run_to_end(self, session: Session) -> WorkerResult:
        """Runs the workers until they are done, or have stopped because a signal came.

        Raises:
            MnistDistError: of a worker, as it raised it.
            WorkersFailed: a worker failed or died more often than `max_failures`.
            Locked: another driver has taken the run over.
            Interrupted: a signal came while no worker was there to save anything.
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
        """Shows what is new, or what is waited for where nothing is."""
        position, epochs, silent_s = ray.get(self._task.board.take.remote())
        for one in epochs:
            session.console.line(
                f"epoch {one.epoch} ({one.phase}): loss {one.loss:.4f}, accuracy {one.accuracy:.4f}, "
                f"validation loss {one.val_loss:.4f}, validation accuracy {one.val_accuracy:.4f}"
            )
        if position is not None:
            bar.update(done=_steps_done(position), total=position.epochs * position.steps, note=_note(position))
        if silent_s > SILENCE_S:
            session.stop.check()
            self._tell_of_waiting(session.console)

    def _tell_of_waiting(self, console: Console) -> None:
        if self._told:
            return
        self._told = True
        free = ray.available_resources()
        console.line(
            f"waiting for {self._share.workers} workers of {self._share.cpus:g} CPU"
            f"{' and a GPU' if self._share.gpu else ''}; free now: {free.get('CPU', 0):g} CPUs, "
            f"{free.get('GPU', 0):g} GPUs"
        )


def readable(error: BaseException) -> MnistDistError:
    """An error of ours that a worker raised, whichever worker it was; else WorkersFailed with the first one's words.

    Args:
        error: what Ray Train raised. Its `worker_failures` maps ranks to errors; that of a worker that died holds the
            death in `health_check_failure`.
    """
    failures = getattr(error, "worker_failures", None) or {}
    causes = {rank: getattr(cause, "health_check_failure", cause) for rank, cause in sorted(failures.items())}
    for cause in causes.values():
        found: BaseException | None = cause
        while found is not None:
            if isinstance(found, MnistDistError):
                return found
            found = getattr(found, "cause", None) or found.__cause__
    rank, first = next(iter(causes.items()), ("?", error))
    words = first_line(first)
    return WorkersFailed(f"worker {rank} failed: {type(first).__name__}: {words} (--verbose and Ray's logs show where)")


def _worker_loop(config: dict[str, Any]) -> Any:
    from mnist_dist.on_ray.training.worker import work  # loads TensorFlow, which the driver never does

    return work(config["task"])


def _steps_done(position: Position) -> int:
    return (position.epoch - 1) * position.steps + position.step


def _note(position: Position) -> str:
    """Short enough for a bar on 80 columns."""
    speed = f", {position.images_per_s:,.0f} images/s" if position.images_per_s else ""
    epoch = f"{position.phase} {position.epoch}/{position.epochs}"
    return f"{epoch}, loss {position.loss:.3f}, acc {position.accuracy:.3f}{speed}"
