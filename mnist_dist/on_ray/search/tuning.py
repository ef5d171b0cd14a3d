"""The first stage of a search: trials on Ray Tune, recorded one by one as they end.

Ray Tune decides where and when a trial runs and which trials stop early. Proposals and records are our own (`tuning/`):
a killed search resumes from the records, not from Ray Tune's state.
"""

import os
import time
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from mnist_dist.console import View
from mnist_dist.errors import MnistDistError, ServiceError, WorkersFailed, first_line
from mnist_dist.on_ray.search.trial import ACCURACY, EPOCHS, REPORT, Report, TrialProcess, TrialTask
from mnist_dist.on_ray.training.train import with_absolute_weights
from mnist_dist.search_config import SearchJob
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.arrow_files import ray_storage
from mnist_dist.store.uris import join
from mnist_dist.tuning.space import Proposer, architecture_of, describe, train_job
from mnist_dist.tuning.trials import Status, Trial, TrialRecords, usable

SHOWN_TRIALS = 8
REDUCTION = 3
"""asha: one in this many trials that reach a rung continues, as in Li et al. 2018 (arXiv:1810.05934)."""
TITLES = ["trial", "status", "epochs", "accuracy", "loss", "configuration"]
DIED = "the trial's process died (out of memory, or its node was lost)"
OVER = "the time ran out before the first epoch"


class Trials:
    """The trials of a search: the recorded ones, the running ones, and the next one.

    Ray Tune calls from its own thread, one call at a time; the main thread only reads and asks to stop.

    Args:
        job: the search.
        records: the stored records of the trials.
        ends_at: no trial starts after this time (`time.monotonic`).
    """

    def __init__(self, job: SearchJob, records: TrialRecords, *, ends_at: float) -> None:
        self._job, self._records, self._ends_at = job, records, ends_at
        self.known = records.read()
        self._proposer = Proposer(job)
        self.count = self._proposer.count
        self._to_rerun: list[int] = []
        for number, trial in self.known.items():
            self._proposer.propose(number, trial.params)
            if trial.status == "running":
                self._to_rerun.append(number)
            else:
                self._proposer.tell(number, trial.val_accuracy)
        self.running: set[int] = set()
        self.stopped = False
        self.error: Exception | None = None
        """The error that ends the search, kept here because Ray Tune swallows errors raised in its thread."""
        self.done_here = 0

    @property
    def over(self) -> bool:
        """Whether to start no more trials and to end the running ones."""
        return self.stopped or time.monotonic() > self._ends_at

    def next(self) -> Trial | None:
        """The trial to start now, or None if there are no more."""
        if self.over or not (self._to_rerun or len(self.known) < self.count):
            return None
        if self._to_rerun:
            trial = self.known[self._to_rerun.pop(0)]
        else:
            number = len(self.known)
            trial = Trial(number=number, params=self._proposer.propose(number))
        self._put(trial)
        self.running.add(trial.number)
        return trial

    def note(self, number: int, report: Report) -> None:
        """Notes an epoch in memory, without writing a record."""
        self.known[number] = replace(self.known[number], **_measurements(report))

    def end(self, number: int, report: Report | None) -> None:
        """Records how a trial ended. `report` is its last report, or None if its process died."""
        trial = self.known[number]
        if report is not None and report.outage:
            self.fail(ServiceError(f"trial {number}: {report.error}"))
            return
        if report is None:
            trial = replace(trial, status="failed", error=DIED, val_accuracy=None, val_loss=None)
        else:
            trial = replace(trial, status=_status(report), error=report.error, **_measurements(report))
        self._put(trial)
        self._proposer.tell(number, trial.val_accuracy)
        self.done_here += 1
        self.running.discard(number)

    def end_all(self) -> None:
        """Records the trials that were running, or still to be rerun, when the time ran out.

        If no trial has succeeded yet, they stay unrecorded, and the same command runs them again.
        """
        under_way = [trial for trial in self.known.values() if trial.status == "running"]
        begun = [trial for trial in under_way if trial.val_accuracy is not None]
        has_result = bool(begun or usable(self.known.values()))
        for trial in under_way if has_result else ():
            ended = trial.val_accuracy is not None
            self._put(replace(trial, status="stopped" if ended else "failed", error=None if ended else OVER))
        self.running.clear()

    def stop(self) -> None:
        """Starts no more trials and ends the running ones."""
        self.stopped = True

    def fail(self, error: Exception) -> None:
        """Ends the search with an error. The same command runs the unfinished trials again."""
        self.error = self.error or error
        self.stopped = True

    def _put(self, trial: Trial) -> None:
        try:
            self._records.write(trial)
        except (OSError, MnistDistError) as error:
            self.fail(error)
            raise
        self.known[trial.number] = trial


def _status(report: Report) -> Status:
    if report.error:
        return "failed"
    return "done" if report.finished else "stopped"


def _measurements(report: Report) -> dict[str, Any]:
    failed = report.error is not None
    return {
        "val_accuracy": None if failed else report.accuracy,
        "val_loss": None if failed else report.loss,
        "epochs": report.epochs,
        "parameters": report.parameters,
        "seconds": round(report.seconds, 3),
        "history": report.history,
    }


class _TrialSource(Searcher):
    """Gives Ray Tune the next trial and receives its reports."""

    def __init__(self, job: SearchJob, trials: Trials) -> None:
        super().__init__(metric=ACCURACY, mode="max")
        self._job, self._trials = job, trials
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = self._trials.next()
        if trial is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = trial.number
        architecture = architecture_of(trial.params, self._job).name
        job = train_job(trial.params, self._job, stage="trial")
        return {"architecture": architecture, "job": with_absolute_weights(job)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._trials.note(self._numbers[trial_id], result[REPORT])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers[trial_id]
        ended_by_us = self._trials.stopped or (self._trials.over and not result and not error)
        if number in self._trials.running and not ended_by_us:
            self._trials.end(number, None if error or not result else result[REPORT])

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing: the records are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class _StopWhenOver(tune.Stopper):
    """Ends Ray Tune when the trials are over."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._trials.over


def run_trials(
    job: SearchJob,
    trials: Trials,
    task: TrialTask,
    session: Session,
    *,
    uri: str,
    concurrent: int,
) -> None:
    """Runs the remaining trials.

    Args:
        job: the search.
        trials: all trials of the search.
        task: the input of every trial.
        session: the session of the search.
        uri: URI of the search's folder.
        concurrent: the most trials to run at once.

    Raises:
        Interrupted: a signal came; the same command runs the unfinished trials again.
        LockLost: another driver took over the lock.
        WorkersFailed: Ray Tune failed, or a trial could not be recorded.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = (
        "1"  # Ray Tune would write a folder of logs per trial that nobody reads
    )
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"  # Ray Tune's own state is never restored, so it is rarely saved
    files, path = ray_storage(uri, ANYWHERE)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(TrialProcess, task=task),
            {"CPU": job.run.cpus_per_trial, "GPU": job.run.gpus_per_trial or 0},
        ),
        tune_config=tune.TuneConfig(
            search_alg=_TrialSource(job, trials),
            scheduler=_scheduler(job),
            num_samples=-1,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=files,
            verbose=0,
            stop=_StopWhenOver(trials),
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    fit = SideThread(tuner.fit, name="ray-tune")
    began = time.monotonic()
    fit.start()
    try:
        with session.console.view("search") as view:
            session.watch(
                fit.ended,
                show=lambda: _show(view, trials, seconds=time.monotonic() - began),
                on_signal=trials.stop,
            )
    finally:
        trials.stopped = trials.stopped or fit.is_alive()  # so that Ray Tune's thread starts no more trials
    session.stop.check()
    if isinstance(trials.error, MnistDistError):
        raise trials.error
    if trials.error is not None:
        raise WorkersFailed(f"trials could not be recorded: {trials.error}") from trials.error
    ANYWHERE.delete_tree(join(uri, "tune"))
    if fit.error is not None:
        words = first_line(fit.error)
        raise WorkersFailed(f"Ray Tune failed: {type(fit.error).__name__}: {words}") from fit.error
    trials.end_all()


def _scheduler(job: SearchJob) -> TrialScheduler:
    if job.search.scheduler == "none":
        return FIFOScheduler()
    epochs = job.search.trial_epochs
    return AsyncHyperBandScheduler(
        time_attr=EPOCHS,
        metric=ACCURACY,
        mode="max",
        max_t=epochs,
        grace_period=max(1, epochs // REDUCTION**2),
        reduction_factor=REDUCTION,
    )


def _show(view: View, trials: Trials, *, seconds: float) -> None:
    running_now = sorted(trials.running)  # taken before the copy, so that the copy contains all of them
    known = dict(trials.known)
    ended = [trial for trial in known.values() if trial.status != "running"]
    failed = sum(trial.status == "failed" for trial in ended)
    best = usable(ended)[:1]
    summary = f"{len(ended)} of {trials.count} trials done, {len(running_now)} running, {failed} failed"
    if best:
        summary += f", best {best[0].val_accuracy:.4f} (trial {best[0].number})"
    if trials.done_here:
        left = (trials.count - len(ended)) * seconds / trials.done_here
        summary += f", {left / 60:.0f} min left" if left >= 60 else f", {left:.0f} s left"
    running = [known[number] for number in running_now][:SHOWN_TRIALS]
    shown = usable(ended)[: SHOWN_TRIALS - len(running)] + running
    view.update(summary=summary, rows=[TITLES, *(_row(trial) for trial in shown)])


def _row(trial: Trial) -> list[str]:
    accuracy = "" if trial.val_accuracy is None else f"{trial.val_accuracy:.4f}"
    loss = "" if trial.val_loss is None else f"{trial.val_loss:.4f}"
    return [str(trial.number), trial.status, str(trial.epochs), accuracy, loss, describe(trial.params)]
