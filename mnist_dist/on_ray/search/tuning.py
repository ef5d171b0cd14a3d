"""The first stage of a search: trials on Ray Tune, recorded one by one as they end.

Ray Tune decides where and when a trial runs and which one is stopped early. What is proposed, and what is known of the
trials, is ours (`search/`): a search that was killed goes on from the records, not from Ray Tune's own state.
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
from mnist_dist.store.uris import join
from mnist_dist.tuning.space import Proposer, architecture_of, describe, train_job
from mnist_dist.tuning.trials import Status, Trial, TrialRecords, usable

SHOWN_TRIALS = 8
REDUCTION = 3
"""asha: of the trials that reach a rung, this share goes on (1/3), as in Li et al. 2018 (arXiv:1810.05934)."""
TITLES = ["trial", "status", "epochs", "accuracy", "loss", "configuration"]
DIED = "the trial's process died (out of memory, or its node was lost)"
OVER = "the time was over before its first epoch"


class Trials:
    """The trials of a search: what is recorded, what is under way, what comes next.

    Ray Tune asks and tells from its own thread, one call at a time; the main thread only reads.

    Args:
        job: the search.
        records: where trials are recorded.
        ends_at: when no more of them are begun, of `time.monotonic`.
    """

    def __init__(self, job: SearchJob, records: TrialRecords, *, ends_at: float) -> None:
        self._job, self._records, self._ends_at = job, records, ends_at
        self.known = records.read()
        self._proposer = Proposer(job)
        self.count = self._proposer.count
        self._again: list[int] = []
        for number, trial in self.known.items():
            self._proposer.propose(number, trial.params)
            if trial.status == "running":
                self._again.append(number)
            else:
                self._proposer.tell(number, trial.val_accuracy)
        self.running: set[int] = set()
        self.stopped = False
        self.error: Exception | None = None
        """What ends the search: Ray Tune would swallow what is raised in its thread."""
        self.done_here = 0

    @property
    def over(self) -> bool:
        """Whether no more trials are begun, and those that run are ended."""
        return self.stopped or time.monotonic() > self._ends_at

    def next(self) -> Trial | None:
        """The trial to begin now; None: there is no more."""
        if self.over or not (self._again or len(self.known) < self.count):
            return None
        if self._again:
            trial = self.known[self._again.pop(0)]
        else:
            number = len(self.known)
            trial = Trial(number=number, params=self._proposer.propose(number))
        self._put(trial)
        self.running.add(trial.number)
        return trial

    def note(self, number: int, report: Report) -> None:
        """Takes note of an epoch, without a record."""
        self.known[number] = replace(self.known[number], **_found(report))

    def end(self, number: int, report: Report | None) -> None:
        """Records how a trial ended; `report`: its last one, or None where its process died."""
        trial = self.known[number]
        if report is not None and report.outage:
            self.fail(ServiceError(f"trial {number}: {report.error}"))
            return
        if report is None:
            trial = replace(trial, status="failed", error=DIED, val_accuracy=None, val_loss=None)
        else:
            trial = replace(trial, status=_status(report), error=report.error, **_found(report))
        self._put(trial)
        self._proposer.tell(number, trial.val_accuracy)
        self.done_here += 1
        self.running.discard(number)

    def end_all(self) -> None:
        """Records the trials that the end of the time found under way, or still to be run again.

        Where nothing has come to anything yet, they are left for the same command.
        """
        under_way = [trial for trial in self.known.values() if trial.status == "running"]
        begun = [trial for trial in under_way if trial.val_accuracy is not None]
        some = bool(begun or usable(self.known.values()))
        for trial in under_way if some else ():
            ended = trial.val_accuracy is not None
            self._put(replace(trial, status="stopped" if ended else "failed", error=None if ended else OVER))
        self.running.clear()

    def stop(self) -> None:
        """Begins no more trials, and has those that run ended."""
        self.stopped = True

    def fail(self, error: Exception) -> None:
        """Ends the search with an error; what is under way is run again by the same command."""
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


def _found(report: Report) -> dict[str, Any]:
    failed = report.error is not None
    return {
        "val_accuracy": None if failed else report.accuracy,
        "val_loss": None if failed else report.loss,
        "epochs": report.epochs,
        "parameters": report.parameters,
        "seconds": round(report.seconds, 3),
        "history": report.history,
    }


class _Asker(Searcher):
    """Hands Ray Tune the next trial, and takes what it says."""

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
        """Nothing: the records are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class _Ender(tune.Stopper):
    """Ends Ray Tune where the trials are over."""

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
    """Runs the trials that are left.

    Args:
        job: the search.
        trials: what is known of them.
        task: what each of them is told.
        session: of the search.
        uri: of the search's folder.
        concurrent: at most so many at once.

    Raises:
        Interrupted: a signal came; trials under way are run again by the same command.
        Locked: another driver has taken over.
        WorkersFailed: Ray Tune gave up.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # a folder of files per trial, which nobody reads
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"  # of a state that is never restored
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(TrialProcess, task=task),
            {"CPU": job.run.cpus_per_trial, "GPU": job.run.gpus_per_trial or 0},
        ),
        tune_config=tune.TuneConfig(
            search_alg=_Asker(job, trials),
            scheduler=_scheduler(job),
            num_samples=-1,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=uri,
            verbose=0,
            stop=_Ender(trials),
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
        trials.stopped = trials.stopped or fit.is_alive()  # Ray Tune's thread begins no more of them
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
    running_now = sorted(trials.running)  # before the copy, which then knows all of them
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
