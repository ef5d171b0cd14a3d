"""The first stage of a search: trials on Ray Tune, recorded one by one as they end.

Ray Tune decides where and when a trial runs and which trials stop early. Proposals and records are our own (`tuning/`):
a killed search resumes from the records, not from Ray Tune's state.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from mnist_dist.console import Console, Stop, View, duration
from mnist_dist.errors import Interrupted, Locked, LockLost, MnistDistError, ServiceError, WorkersFailed, first_line
from mnist_dist.on_ray.search.early_stopping import EarlyStopping, config_of
from mnist_dist.on_ray.search.trial import ACCURACY, REPORT, Report, TrialProcess, TrialTask, is_outage
from mnist_dist.on_ray.training.train import with_absolute_weights
from mnist_dist.search_config import SearchJob
from mnist_dist.session import Session
from mnist_dist.side_thread import SideThread
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.arrow_files import ray_storage
from mnist_dist.store.uris import join
from mnist_dist.tuning.space import KnownResult, Params, Proposer, architecture_of, describe, train_job
from mnist_dist.tuning.trials import Status, Trial, TrialRecords, usable

SHOWN_TRIALS = 8
TITLES = ["trial", "status", "epochs", "accuracy", "loss", "configuration"]
DIED = "the trial's process died (out of memory, or its node was lost)"
OVER = "the time ran out before the first epoch"


def _no_features(params: Params) -> None:
    return None


class Trials:
    """The trials of a search: the recorded ones, the running ones, those that wait for features, and the next one.

    Ray Tune calls from its own thread, one call at a time; the main thread only reads, asks to stop, and says which
    features are computed. A trial that waits for features is already proposed and recorded. From then on, places that
    become free stay free, so that the computation soon has the machine to itself.

    Args:
        job: the search.
        records: the stored records of the trials.
        ends_at: trials and finalists should have ended by this time (`time.monotonic`).
        concurrent: the most trials to run at once.
        features_of: the name of the features that a proposal needs, or None.
        computed: names of the features that are computed.
        earlier: results of another search.
        reserve_s: how long the finalists would take if these trials were all, s.
        worked_s: how long drivers have worked on the search so far, s.
    """

    def __init__(
        self,
        job: SearchJob,
        records: TrialRecords,
        *,
        ends_at: float,
        concurrent: int = 1,
        features_of: Callable[[Params], str | None] = _no_features,
        computed: Sequence[str] = (),
        earlier: Sequence[KnownResult] = (),
        reserve_s: Callable[[Mapping[int, Trial]], float] = lambda known: 0.0,
        worked_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._job, self._records, self._ends_at, self._reserve_s = job, records, ends_at, reserve_s
        self._concurrent, self._features_of, self._computed = concurrent, features_of, set(computed)
        self._worked_s = worked_s
        self.known = records.read()
        self._proposer = Proposer(job, earlier=earlier)
        self.count, self.untried = self._proposer.count, self._proposer.untried
        self._to_rerun: list[int] = []
        for number, trial in self.known.items():
            self._proposer.propose(number, trial.params)
            if trial.status == "running":
                self._to_rerun.append(number)
            else:
                self._proposer.tell(number, trial.val_accuracy)
        self.running: set[int] = set()
        self.waiting: dict[int, str] = {}
        """Number of a trial that waits -> the name of the features that it needs."""
        self._free = 0
        """While trials wait: how many places may still be filled."""
        self._failed_features: dict[str, str] = {}
        self._needing_room: set[str] = set()
        self.stopped = False
        self.error: Exception | None = None
        """The error that ends the search, kept here because Ray Tune swallows errors raised in its thread."""
        self.done_here = 0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune stores a copy that is never read."""
        return {}

    @property
    def over(self) -> bool:
        """Whether to start no more trials and to end the running ones."""
        return self.stopped or self.left_s < 0

    @property
    def left_s(self) -> float:
        """Seconds left for trials; infinite without a limit."""
        left = self._ends_at - time.monotonic()
        return left if left in (float("inf"), float("-inf")) else left - self._reserve_s(dict(self.known))

    @property
    def wanted(self) -> str | None:
        """The name of features that a trial waits for and that nobody has computed or failed to compute."""
        return self._wanted(besides=set())

    @property
    def wanted_beside(self) -> str | None:
        """The same, of the features that may be computed while trials run."""
        return self._wanted(besides=self._needing_room)

    def _wanted(self, *, besides: set[str]) -> str | None:
        known = self._computed | self._failed_features.keys() | besides
        return next((name for name in tuple(self.waiting.values()) if name not in known), None)

    def features_computed(self, name: str) -> None:
        """Lets the trials start that wait for these features."""
        self._computed.add(name)

    def features_need_room(self, name: str) -> None:
        """Leaves these features until no trial runs."""
        self._needing_room.add(name)

    def features_failed(self, name: str, error: str) -> None:
        """Lets the trials fail that need these features."""
        self._failed_features[name] = error

    def next(self) -> Trial | None:
        """The trial to start now. None: there is none, or only such that wait for features (`waiting`)."""
        while not self.over and (trial := self._take()) is not None:
            name = self._features_of(trial.params)
            if name in self._failed_features:
                self._fail(trial, f"features of {name}: {self._failed_features[name]}")
            elif name is None or name in self._computed:
                self.running.add(trial.number)
                return trial
            else:
                self._wait(trial, name)
        return None

    def _take(self) -> Trial | None:
        """A trial whose features are no longer computed, an unfinished one, or a new one."""
        for number, name in self.waiting.items():
            if name in self._computed or name in self._failed_features:
                del self.waiting[number]
                return self.known[number]
        if self.waiting:
            self._free -= 1
            if self._free < 0:
                return None
        if self._to_rerun:
            trial = self.known[self._to_rerun.pop(0)]
        elif len(self.known) < self.count:
            number = len(self.known)
            trial = Trial(number=number, params=self._proposer.propose(number))
        else:
            return None
        self._put(trial)
        return trial

    def _wait(self, trial: Trial, name: str) -> None:
        if not self.waiting:
            self._free = self._concurrent - len(self.running) - 1
        self.waiting[trial.number] = name

    def _fail(self, trial: Trial, error: str) -> None:
        self._put(replace(trial, status="failed", error=error))
        self._proposer.tell(trial.number, None)

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
        if trial.status != "running":
            trial = replace(trial, ended_s=round(self._worked_s(), 1))
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
            is_later = self._trials.waiting and self._trials.running and not self._trials.over
            return None if is_later else Searcher.FINISHED  # Then no idle process holds what features may need.
        self._numbers[trial_id] = trial.number
        architecture = architecture_of(trial.params, self._job).name
        job = train_job(trial.params, self._job, stage="trial")
        return {**config_of(trial), "architecture": architecture, "job": with_absolute_weights(job)}

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


class _TimeOver(MnistDistError):
    """The time for trials ran out while features were computed."""


class _StopOrOver(Stop):
    """The signals of a job, or the end of the time for trials."""

    def __init__(self, session: Session, trials: Trials) -> None:
        super().__init__(session.console)
        self._session, self._trials = session, trials

    def check(self) -> None:
        self._session.stop.check()
        if self._trials.over:
            raise _TimeOver("the time for trials is over")


@dataclass(frozen=True, kw_only=True)
class TrialWork:
    """What a search needs to run trials.

    Args:
        job: the search.
        task: the input of every trial.
        uri: URI of the search's folder.
        concurrent: the most trials to run at once.
        compute: computes features by name. `beside`: while trials run that hold the CPUs.
    """

    job: SearchJob
    task: TrialTask
    uri: str
    concurrent: int
    compute: Callable[[str, Session, bool], None]


def run_trials(work: TrialWork, trials: Trials, session: Session) -> None:
    """Runs the remaining trials, and computes features when the first of them needs them.

    Ray Tune runs until no trial is left, or all that are left wait for features; then it runs again.

    Args:
        work: what to run.
        trials: all trials of the search.
        session: the session of the search.

    Raises:
        Interrupted: a signal came; the same command runs the unfinished trials again.
        LockLost: another driver took over the lock.
        ServiceError: the storage failed.
        WorkersFailed: Ray Tune failed, or a trial could not be recorded.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = (
        "1"  # Ray Tune would write a folder of logs per trial that nobody reads
    )
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"  # Ray Tune's own state is never restored, so it is rarely saved
    began, log = time.monotonic(), _Log(session.console, trials)
    while True:
        _run_round(work, trials, session, began=began, log=log)
        log.show_new()
        if trials.over or not trials.waiting:
            break
        _compute_wanted(work, trials, session, beside=False)
        _raise_failure(trials, session)
    trials.end_all()


class _Log:
    """The lines of a log: one for each trial that ends. A terminal has a table instead."""

    def __init__(self, console: Console, trials: Trials) -> None:
        self._console, self._trials = console, trials
        self._shown = _ended(trials)

    def show_new(self) -> None:
        """Shows the trials that have ended since the last call."""
        if self._console.terminal:
            return
        for number in sorted(_ended(self._trials) - self._shown):
            self._console.line(_ended_in_words(self._trials.known[number]))
            self._shown.add(number)


def _ended(trials: Trials) -> set[int]:
    return {number for number, trial in dict(trials.known).items() if trial.status != "running"}


def _ended_in_words(trial: Trial) -> str:
    accuracy = "" if trial.val_accuracy is None else f", validation accuracy {trial.val_accuracy:.4f}"
    return f"trial {trial.number} {trial.status} after {trial.epochs} epoch(s){accuracy}: {describe(trial.params)}"


def _run_round(work: TrialWork, trials: Trials, session: Session, *, began: float, log: _Log) -> None:
    """Runs Ray Tune once, to its end."""
    fit = SideThread(_tuner(work, trials).fit, name="ray-tune")
    fit.start()
    try:
        while not fit.ended(0):
            with session.console.view("search") as view:
                session.watch(
                    lambda timeout_s: fit.ended(timeout_s) or _is_worth_computing(trials),
                    show=lambda: _show(view, log, trials, seconds=time.monotonic() - began),
                    on_signal=trials.stop,
                )
            if _is_worth_computing(trials):
                _compute_wanted(work, trials, session, beside=True)
    finally:
        trials.stopped = trials.stopped or fit.is_alive()  # so that Ray Tune's thread starts no more trials
    _raise_failure(trials, session)
    ANYWHERE.delete_tree(join(work.uri, "tune"))
    if fit.error is not None:
        words = first_line(fit.error)
        raise WorkersFailed(f"Ray Tune failed: {type(fit.error).__name__}: {words}") from fit.error


def _is_worth_computing(trials: Trials) -> bool:
    """Whether to compute features beside running trials. When none runs, Ray Tune ends first and frees its CPUs."""
    return trials.wanted_beside is not None and bool(trials.running) and not trials.over


def _raise_failure(trials: Trials, session: Session) -> None:
    session.stop.check()
    if isinstance(trials.error, MnistDistError):
        raise trials.error
    if trials.error is not None:
        raise WorkersFailed(f"trials could not be recorded: {trials.error}") from trials.error


def _compute_wanted(work: TrialWork, trials: Trials, session: Session, *, beside: bool) -> None:
    """Computes all features that trials wait for; a signal, an outage or the end of the time ends the trials.

    Processes that die beside trials may lack memory: these features are computed again when no trial runs.
    """
    limited = replace(session, stop=_StopOrOver(session, trials))
    while (name := trials.wanted_beside if beside else trials.wanted) is not None and not trials.over:
        try:
            work.compute(name, limited, beside)
        except (Interrupted, _TimeOver):
            trials.stop()
        except (Locked, LockLost):
            raise
        except (MnistDistError, OSError) as error:
            words = first_line(error)
            if is_outage(error):
                trials.fail(ServiceError(f"features of {name}: {words}"))
            elif beside and isinstance(error, WorkersFailed):
                session.console.line(f"features of {name} failed beside trials and wait for their end: {words}")
                trials.features_need_room(name)
            else:
                session.console.line(f"features of {name} failed: {words}")
                trials.features_failed(name, words)
        else:
            trials.features_computed(name)


def _tuner(work: TrialWork, trials: Trials) -> tune.Tuner:
    files, path = ray_storage(work.uri, ANYWHERE)
    job = work.job
    stopping = EarlyStopping(job, train_images=len(work.task.splits.train))
    stopping.resume(trials.known.values())
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(TrialProcess, task=work.task),
            {"CPU": job.run.cpus_per_trial, "GPU": job.run.gpus_per_trial or 0},
        ),
        tune_config=tune.TuneConfig(
            search_alg=_TrialSource(job, trials),
            scheduler=stopping,
            num_samples=-1,
            max_concurrent_trials=work.concurrent,
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


def _show(view: View, log: _Log, trials: Trials, *, seconds: float) -> None:
    log.show_new()
    running_now = sorted(trials.running)  # taken before the copy, so that the copy contains all of them
    known = dict(trials.known)
    ended = [trial for trial in known.values() if trial.status != "running"]
    failed = sum(trial.status == "failed" for trial in ended)
    best = usable(ended)[:1]
    summary = f"{len(ended)} of {trials.count} trials done, {len(running_now)} running, {failed} failed"
    if best:
        summary += f", best {best[0].val_accuracy:.4f} (trial {best[0].number})"
    if trials.waiting:
        summary += f", {len(trials.waiting)} waiting for features"
    if trials.done_here:
        left = min((trials.count - len(ended)) * seconds / trials.done_here, trials.left_s)
        summary += f", {duration(left)} left" if left >= 1 else ""
    running = [known[number] for number in running_now][:SHOWN_TRIALS]
    shown = usable(ended)[: SHOWN_TRIALS - len(running)] + running
    view.update(summary=summary, rows=[TITLES, *(_row(trial) for trial in shown)])


def _row(trial: Trial) -> list[str]:
    accuracy = "" if trial.val_accuracy is None else f"{trial.val_accuracy:.4f}"
    loss = "" if trial.val_loss is None else f"{trial.val_loss:.4f}"
    return [str(trial.number), trial.status, str(trial.epochs), accuracy, loss, describe(trial.params)]
