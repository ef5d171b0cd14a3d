"""The search job, the driver's side: data and features, trials, speeds, finalists, the winner, the leaderboard.

Each step stores its results in the search's folder (`tuning/trials.py`), so the same command resumes after the last
complete step. Imports neither TensorFlow nor Keras.

Only validation images decide among trials, finalists and their combination (`combination.py`). Only the winner, or what
was combined in its place, is tested on the test images, once.
"""

import functools
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from mnist_dist import documents
from mnist_dist.config import KerasBackend, ModelConfig, TrainJob, require
from mnist_dist.console import Console, Stop, command_line, duration
from mnist_dist.data.records import RecordPlan
from mnist_dist.data.splits import Splits
from mnist_dist.errors import Interrupted, Locked, LockLost, MnistDistError, ResourceError, WorkersFailed, first_line
from mnist_dist.inventory import RunFacts
from mnist_dist.models.backbones import is_imported
from mnist_dist.models.bundle import BUNDLE_FILE, REPORT_FILE, BundleInfo, load_bundle
from mnist_dist.on_ray.cluster import Resources, Share, await_nodes, connected, on_this_node, worker_share
from mnist_dist.on_ray.data.features import compute_missing, feature_actors
from mnist_dist.on_ray.data.prepare import (
    DecodedData,
    check_places,
    decode,
    open_data,
    plan_data,
    plan_job_features,
    split,
)
from mnist_dist.on_ray.search.combination import Combination
from mnist_dist.on_ray.search.trial import Prepared, TrialTask, is_outage
from mnist_dist.on_ray.search.tuning import Trials, TrialWork, run_trials
from mnist_dist.on_ray.tasks import wait_for
from mnist_dist.on_ray.training.backend import resolve_backend
from mnist_dist.on_ray.training.board import make_board
from mnist_dist.on_ray.training.messages import UNTESTED
from mnist_dist.on_ray.training.train import Training, check_devices, check_job, check_ready, with_absolute_weights
from mnist_dist.search_config import SearchJob
from mnist_dist.session import Session, locked_session, seconds_since, started_at
from mnist_dist.store.anywhere import ANYWHERE, check_access, store_for
from mnist_dist.store.lock import Fence, Lock
from mnist_dist.store.uris import absolute, join
from mnist_dist.training.features import FeaturePlan
from mnist_dist.training.host import Measured, Position
from mnist_dist.training.runs import Run
from mnist_dist.training.trackers import check_trackers
from mnist_dist.training.tracking import Tracking, tracked_job
from mnist_dist.tuning.budget import SpentTime, choose_finalists, finalists_s
from mnist_dist.tuning.leaderboard import Speed, make_leaderboard, parquet_bytes, shown_rows
from mnist_dist.tuning.space import (
    Params,
    architecture_of,
    architectures_of,
    backbone_job,
    check_space,
    describe,
    drawn_for,
    fit_batches,
    smallest_batch,
    train_job,
)
from mnist_dist.tuning.trials import Trial, TrialRecords, TrialsOver, distinct_errors, usable
from mnist_dist.tuning.warm_start import WarmStart, read_warm_start, warm_start_name

PATIENCE_S = 30.0  # a finalist that was asked to stop is killed after this long
LOCK_PATIENCE_S = 70.0  # more than the 60 s after which a lock that nobody renews is taken over
NAMED_ERRORS = 5
TRIAL_RECORD = re.compile(r"trials/\d{6}-(?P<fence>\d{6,})\.json")
SPEED_BATCH_SIZE = 32
SPEED_S = 1.0
USUAL_SPEED_S = 10.0  # to measure one architecture, with the import of TensorFlow; only the progress bar uses it
FINE_TUNE_PASSES = 3  # a step forwards and backwards through a whole backbone takes about three times a step forwards
USUAL_TEST_S = 30.0  # to test the winner; only the progress bar uses it


def search(job: SearchJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """Runs a search, resumes a stopped one, or returns the result of a finished one.

    Args:
        job: what to search.
        recipe: the recipe's name. With a hash of the settings it names the search if `job.run.name` is None.
        console: shows progress to the user.

    Returns:
        The result: `run_dir`, `bundle`, `trials`, `failed`, `best` (its trial, config and metrics),
        `leaderboard` and `report` (URIs), `seconds`.

    Raises:
        ConfigError: the space, the data, the weights or the cluster is unsuitable; found before any trial.
        WorkersFailed: all trials failed, or all finalists.
        Interrupted: a signal stopped the search; finished trials are kept.
    """
    began_at = started_at(console)
    require(not (job.run.plan or job.run.dry_run), "plan_search makes the plan, dry_run the dry run", plan=job.run.plan)
    check_search(job)
    name = job.run.name or f"{recipe}-{job.settings_hash()}"
    run = Run(join(absolute(job.run.storage), name), begun_by=TRIAL_RECORD)
    facts = facts_of(job, recipe)
    run.compare(facts)
    finished = run.result()
    if finished is not None:
        console.line(f"{run.uri} is finished. To search again, choose another --name, --seed or --storage.")
        return finished
    check_ready(
        [architecture.model() for space in job.backbones for architecture in architectures_of(space)],
        run=job.run,
        console=console,
    )
    ANYWHERE.check_writable(job.run.storage)
    with locked_session(
        console, lock_uri=run.lock_uri, what=run.uri, wait_s=job.run.lock_wait_s, above=run.max_number
    ) as session:
        finished = run.result()  # another driver may have finished it while this one waited for the lock
        if finished is not None:
            return finished
        result = Search(job, session, run=run, began_at=began_at).run_to_end(facts)
        session.confirm_lock()
        run.finish(result)
    return result


def check_search(job: SearchJob) -> None:
    """Checks everything that needs no data, Ray or TensorFlow.

    Raises:
        ConfigError: for the first setting that is wrong.
    """
    check_access((*job.data.data, job.data.data_dir), store=store_for(job.store))
    check_access((job.run.storage, *(space.backbone for space in job.backbones if is_imported(space.backbone))))
    check_space(job)
    check_trackers(job.run.tracker)
    for space in job.backbones:
        for architecture in architectures_of(space):
            check_job(backbone_job(architecture, job))


def facts_of(job: SearchJob, recipe: str) -> RunFacts:
    """Everything that determines the result of a search."""
    features = job.run.feature_type if job.run.feature_cache else None
    return RunFacts(recipe=recipe, settings=job.settings(), features=features)


@dataclass(frozen=True, kw_only=True)
class SearchData:
    """The data on which all trials and finalists train."""

    decoded: Mapping[str, DecodedData]
    """By the architecture's name."""
    features: Mapping[str, FeaturePlan]
    """The features of frozen backbones, by the architecture's name. They are computed when a trial first needs them."""
    splits: Splits


@dataclass(frozen=True, kw_only=True)
class FinalistTask:
    """The input of a finalist's process."""

    job: TrainJob
    run: str
    """URI of the finalist's run."""
    records: RecordPlan
    """The plan of the decoded records."""
    fingerprint: str
    features: FeaturePlan | None
    splits: Splits
    share: Share
    board: Any
    command: str
    title: str
    """Title of the report of a finalist that is tested."""
    validated_only: bool
    search: Fence
    """The lock of the search, with which the finalist loses its own."""
    keeps_untested: bool = False
    """See `WorkerTask`."""
    steps_limit: int | None = None
    """See `Training`."""


def run_first_stage(job: SearchJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """Computes features and runs trials as `search` does: `features_s`, `trials_s`, `trials`, the best `val_accuracy`.

    Raises:
        ConfigError, WorkersFailed, Interrupted: see `search`.
    """
    check_space(job)
    run = Run(join(absolute(job.run.storage), job.run.name or recipe), begun_by=TRIAL_RECORD)
    with locked_session(console, lock_uri=run.lock_uri, what=run.uri) as session:
        stage = Search(job, session, run=run, began_at=time.time())
        with connected(verbose=job.run.verbose, stop=session.stop) as resources:
            resources = stage.enter(resources)
            data = stage.prepare(facts_of(job, recipe), resources=resources)
            trials = stage.try_all(data, resources=resources)
    return {**stage.timing, "trials": len(trials), "val_accuracy": usable(trials.values())[0].val_accuracy}


class Search:
    """One driver's attempt at a search.

    Args:
        job: what to search.
        session: the job's session, which holds its lock.
        run: the folder that keeps everything.
        began_at: when the driver started, s since the Unix epoch.
        split: the function that splits the decoded images.
    """

    def __init__(
        self,
        job: SearchJob,
        session: Session,
        *,
        run: Run,
        began_at: float,
        split: Callable[..., Splits] = split,
    ) -> None:
        self._split = split
        self.job, self.session, self.run, self.console = job, session, run, session.console
        self.began_at, self.timing = began_at, {"features_s": 0.0}
        self._began = time.monotonic()
        self._stopping_since: float | None = None
        self._warm_start: WarmStart | None = None
        self._spent = SpentTime(uri=run.uri, fence=session.fence)
        self._planned = job.search.trials
        self._images_per_s: dict[str, float] = {}
        """Speed of computing features in this driver, by the architecture's name."""
        self.architectures = [architecture for space in job.backbones for architecture in architectures_of(space)]

    @functools.cached_property
    def _finalist_records(self) -> TrialRecords:
        return self._records("finalists")

    def _records(self, folder: str) -> TrialRecords:
        """The records of a search that has begun."""
        return TrialRecords(
            join(self.run.uri, folder), fence=self.session.fence.number, since=self.run.begun_by_number()
        )

    @functools.cached_property
    def _earlier_s(self) -> float:
        """How long earlier drivers worked on a search that has begun, s."""
        return self._spent.earlier_s(since=self.run.begun_by_number())

    def _worked_s(self) -> float:
        """How long drivers have worked on the search so far, s."""
        return self._earlier_s + time.monotonic() - self._began

    def run_to_end(self, facts: RunFacts) -> dict[str, Any]:
        """Takes the remaining steps, writes the page and returns the result. A search that ends before it has a winner
        leaves a page of what there is."""
        try:
            return self._run_to_end(facts)
        except (Interrupted, WorkersFailed):
            self._try_to_write_page(facts)
            raise

    def _run_to_end(self, facts: RunFacts) -> dict[str, Any]:
        config = self.job.run
        self._warm_start = self._find_warm_start(facts)
        with connected(verbose=config.verbose, stop=self.session.stop) as resources, ExitStack() as counted:
            resources = self.enter(resources)
            per_finalist = worker_share(resources, config)
            self._check_devices(per_finalist)
            require(
                per_finalist.workers <= smallest_batch(self.job),
                "batch_size must be at least the number of workers of a finalist",
                batch_size=smallest_batch(self.job),
                workers=per_finalist.workers,
            )
            data = self.prepare(facts, resources=resources)
            counted.enter_context(self._spent.counting(began=self._began))
            trials = self.try_all(data, resources=resources, at_once=_finalists_at_once(per_finalist, resources))
            speeds = self._measure(data, trials, resources=resources)
            with self._timed("finalists_s"):
                finalists = self._train_finalists(data, trials, speeds, per_finalist=per_finalist, resources=resources)
            ranked = sorted(usable(finalists.values()), key=lambda trial: trial.rank)
            combination = self._combine(data, ranked)
            if combination is not None and combination.is_better:
                tested = combination.finish(join(self.run.uri, "bundle"))
            else:
                tested = self._finish_winner(data, ranked[0], per_finalist=per_finalist)
        leaderboard = self._write_leaderboard(trials, speeds, finalists, winner=ranked[0].number)
        result = self._result(trials, ranked, combination, tested, speeds)
        self._write_page(facts, trials, finalists, leaderboard, splits=data.splits, result=result)
        return result

    def _check_devices(self, per_finalist: Share) -> None:
        for space in self.job.backbones:
            if any(trained != "head" for trained in space.trained):
                sizes = drawn_for(self.job, space)["batch_size"][1].grid()
                check_devices(map(int, sizes), backbone=space.backbone, backend=resolved(self.job), share=per_finalist)

    def enter(self, resources: Resources) -> Resources:
        """Waits for nodes, checks that a trial fits, resolves the backend, and returns the resources of the cluster by
        then.

        Raises:
            ResourceError: no node has room for a trial.
        """
        config = self.job.run
        resources = await_nodes(
            resources,
            self.session,
            count=config.concurrent_trials or 1,
            cpus=config.cpus_per_trial,
            gpus=config.gpus_per_trial or 0.0,
            wait_s=config.wait_for_nodes_s,
        )
        gpus = config.gpus_per_worker if resources.gpus and config.gpu is not False else 0
        backend = resolve_backend(config.backend, gpus=gpus, session=self.session)
        config = replace(config, gpus_per_trial=_gpus_per_trial(self.job, resources), backend=backend)
        self.job = replace(self.job, run=config)
        concurrent_trials(self.job, resources)
        return resources

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Records how long this driver spends on a step, s."""
        began = time.monotonic()
        yield
        self.timing[name] = round(time.monotonic() - began, 2)

    # --- data ---

    def prepare(self, facts: RunFacts, *, resources: Resources) -> SearchData:
        """Decodes the images for each input size, splits them once, and plans the frozen backbones' features."""
        job, root = self.job, self.job.run.storage
        source = open_data(job.data, console=self.console, store=store_for(job.store))
        plans = {each.name: plan_data(source, job.data, each.model(), root=root) for each in self.architectures}
        for listed in plans.values():
            check_places(listed, job.data, root=root, is_shared=job.run.storage_is_shared, nodes=resources.nodes)
        keys = sorted({listed.plan.cache.key for listed in plans.values()})
        is_new = self.run.begin(
            replace(facts, records="-".join(key[:16] for key in keys)), fence=self.session.fence.number
        )
        self.console.line(f"{'Searching' if is_new else 'Resuming'} {self.run.uri}, on {resources}")
        by_key = {listed.plan.cache.key: listed for listed in plans.values()}
        decoded = {key: decode(listed, job.data, self.session) for key, listed in by_key.items()}
        of_each = {name: decoded[listed.plan.cache.key] for name, listed in plans.items()}
        splits = common_splits(
            list(decoded.values()), self._split(of_each[self.architectures[0].name], job.data, console=self.console)
        )
        self.job, left_out = fit_batches(job, images=len(splits.train))
        for line in left_out:
            self.console.line(line)
        self._keep_warm_start(is_new=is_new)
        features = self._plan_features(of_each, splits, resources=resources)
        return SearchData(decoded=of_each, features=features, splits=splits)

    def _find_warm_start(self, facts: RunFacts) -> WarmStart | None:
        """What the sampler knows from an earlier search: as kept when this search began, else read there.

        Raises:
            ConfigError: see `read_warm_start`.
        """
        if self.job.search.like is None:
            return None
        is_begun = self.run.compare(facts)
        kept = self.run.read(warm_start_name(self.run.begun_by_number()), WarmStart) if is_begun else None
        return kept or read_warm_start(self.job)

    def _keep_warm_start(self, *, is_new: bool) -> None:
        """Keeps what the sampler knows, before the first trial. Without batch sizes the space may hold less of it.

        Raises:
            ConfigError: it holds nothing of it.
        """
        if self._warm_start is None:
            return
        self._warm_start = self._warm_start.within(self.job)
        self.console.line(str(self._warm_start))
        if is_new:
            self.run.write(warm_start_name(self.session.fence.number), self._warm_start)

    def _plan_features(
        self, decoded: Mapping[str, DecodedData], splits: Splits, *, resources: Resources
    ) -> dict[str, FeaturePlan]:
        plans = {}
        for space in self.job.backbones:
            if not self.job.run.feature_cache or space.trained == ("all",):
                continue
            for each in architectures_of(space):
                job = with_absolute_weights(backbone_job(each, self.job))
                plans[each.name] = plan_job_features(job, decoded[each.name], splits, have=resources)
        return plans

    def _compute_features(
        self, plan: FeaturePlan, name: str, session: Session, *, resources: Resources, beside: bool = False
    ) -> None:
        """Computes what is missing of the features of an architecture; `beside`: while trials run."""
        began, actors = time.monotonic(), feature_actors(resources, backbone=plan.model.backbone)
        try:
            rate = compute_missing(plan, session, actors=actors, title=f"features of {name}", beside=beside)
        finally:
            self.timing["features_s"] = round(self.timing["features_s"] + time.monotonic() - began, 2)
        if rate is not None:
            self._images_per_s[name] = rate

    # --- trials ---

    def try_all(self, data: SearchData, *, resources: Resources, at_once: int = 1) -> dict[int, Trial]:
        """Runs the first stage and returns all trials by number.

        Args:
            data: the prepared data.
            resources: of the cluster.
            at_once: how many finalists will run at the same time.

        Raises:
            WorkersFailed: no trial succeeded.
        """
        began = time.monotonic()
        known = self._try(data, resources=resources, at_once=at_once)
        self.timing["trials_s"] = round(time.monotonic() - began - self.timing["features_s"], 2)
        return known

    def _trials(self, data: SearchData, *, concurrent: int, at_once: int) -> Trials:
        """The trials as far as they are recorded."""
        hours, ends_at = self.job.search.hours, float("inf")
        if hours is not None:
            ends_at = self._began + hours * 3600 - self._earlier_s
            left = duration(max(0.0, ends_at - time.monotonic()))
            self.console.line(f"time: {left} of {duration(hours * 3600)} left, finalists included")
        return Trials(
            self.job,
            self._records("trials"),
            ends_at=ends_at,
            concurrent=concurrent,
            features_of=functools.partial(_features_of, job=self.job, plans=data.features),
            computed=[name for name, plan in data.features.items() if plan.cache.is_finished()],
            earlier=self._warm_start.results if self._warm_start is not None else (),
            reserve_s=lambda known: finalists_s(
                known.values(),
                self.job,
                at_once=at_once,
                fine_tune_epoch_s=functools.partial(self._fine_tune_epoch_s, data=data),
            ),
            worked_s=self._worked_s,
        )

    def _fine_tune_epoch_s(self, trial: Trial, *, data: SearchData) -> float:
        """Forecasts a fine-tuning epoch by the speed of computing features; 0 if another driver computed them."""
        rate = self._images_per_s.get(architecture_of(trial.params, self.job).name)
        return FINE_TUNE_PASSES * len(data.splits.train) / rate if rate else 0.0

    def _try(self, data: SearchData, *, resources: Resources, at_once: int) -> dict[int, Trial]:
        if self.run.read("trials.json", TrialsOver) is None:
            concurrent = concurrent_trials(self.job, resources)
            trials = self._trials(data, concurrent=concurrent, at_once=at_once)
            self._planned = trials.count
            task = TrialTask(
                prepared={
                    name: Prepared(records=decoded.plan, features=data.features.get(name))
                    for name, decoded in data.decoded.items()
                },
                splits=data.splits,
                backend=resolved(self.job),
                cpus=self.job.run.cpus_per_trial,
                gpu=bool(self.job.run.gpus_per_trial),
            )
            self.console.line(f"trials: {trials.count}, {concurrent} at a time")
            if trials.untried:
                self.console.line(f"  fewer trials than backbones: {', '.join(trials.untried)} will not be tried")
            work = TrialWork(
                job=self.job,
                task=task,
                uri=self.run.uri,
                concurrent=concurrent,
                compute=lambda name, session, beside: self._compute_features(
                    data.features[name], name, session, resources=resources, beside=beside
                ),
            )
            run_trials(work, trials, self.session)
            known = trials.known
            if usable(known.values()):
                self.session.confirm_lock()
                best = choose_finalists(
                    known.values(),
                    self.job,
                    at_once=at_once,
                    fine_tune_epoch_s=functools.partial(self._fine_tune_epoch_s, data=data),
                )
                self.run.write("trials.json", TrialsOver(len(known), tuple(trial.number for trial in best)))
        else:
            known = self._records("trials").read()
        errors = distinct_errors(known.values())
        for words, count in errors[:NAMED_ERRORS]:
            self.console.line(f"{count} trial(s) failed: {words}")
        if not usable(known.values()):
            shown = "; ".join(f"{count} x {words}" for words, count in errors[:NAMED_ERRORS])
            raise WorkersFailed(
                f"None of the {len(known)} trials succeeded: {shown}"
                if errors
                else f"The time (--hours {self.job.search.hours:g}) ran out before a trial had a result; it counts "
                "over all runs of this command. Take another --name and more --hours; decoded images and computed "
                "features are kept."
            )
        return known

    def _measure(self, data: SearchData, trials: Mapping[int, Trial], *, resources: Resources) -> dict[str, Speed]:
        """Measures how fast each architecture scores, one after the other, while nothing else runs."""
        known = self.run.read("speeds.json", dict[str, Speed]) or {}
        tried = {architecture_of(trial.params, self.job).name for trial in usable(trials.values())}
        missing = [each for each in self.architectures if each.name in tried - known.keys()]
        if missing:
            measure = ray.remote(num_cpus=0, num_gpus=min(1.0, resources.gpus))(
                measure_speeds
            )  # no CPU is claimed: all are idle
            future = measure.remote(
                {each.name: with_absolute_weights(backbone_job(each, self.job)).model for each in missing},
                {each.name: data.decoded[each.name].plan.spec for each in missing},
                num_classes=len(next(iter(data.decoded.values())).plan.class_names),
            )
            title = f"scoring speed of {len(missing)} architecture(s)"
            (measured,) = wait_for([future], self.session, title=title, expected_s=USUAL_SPEED_S * len(missing))
            known |= measured
            self.session.confirm_lock()
            self.run.write("speeds.json", known)
        return known

    # --- finalists ---

    def _train_finalists(
        self,
        data: SearchData,
        trials: Mapping[int, Trial],
        speeds: Mapping[str, Speed],
        *,
        per_finalist: Share,
        resources: Resources,
    ) -> dict[int, Trial]:
        """Runs the second stage and returns all finalists by number.

        Raises:
            WorkersFailed: all finalists failed.
        """
        done = self._finalist_records.read()
        over = self.run.read("trials.json", TrialsOver)
        chosen = [trials[number] for number in over.finalists] if over is not None else []
        remaining = [trial for trial in chosen if trial.number not in done]
        room = _finalists_at_once(per_finalist, resources)
        for trial in chosen:  # Only a cache that was deleted meanwhile has anything missing.
            name = _features_of(trial.params, job=self.job, plans=data.features)
            if name is not None:
                self._compute_features(data.features[name], name, self.session, resources=resources)
        waiting, running = list(remaining), dict[Any, tuple[Trial, Any]]()
        tracked = dict[int, Tracking]()
        with self.console.view("finalists") as view, ExitStack() as trackings:

            def ended(timeout_s: float) -> bool:
                while waiting and len(running) < room:
                    trial, board = waiting.pop(0), make_board()
                    self.console.line(f"finalist {trial.number}: {describe(trial.params)}")
                    validated_only = len(chosen) > 1
                    task = self.finalist_task(
                        data, trial, per_finalist=per_finalist, board=board, validated_only=validated_only
                    )
                    running[start_finalist(task)] = (trial, board)
                    tracked[trial.number] = trackings.enter_context(self._tracking(task, trial))
                for future in ray.wait(list(running), timeout=timeout_s)[0] if running else ():
                    ended_trial = running.pop(future)[0]
                    self._record_finalist(ended_trial, future, tracked[ended_trial.number])
                return not (waiting or running)

            def show() -> None:
                self._kill_unresponsive(running)
                positions = _positions(running)
                at = "".join(f"; {number}: {phase} {epoch}" for number, phase, epoch, _ in positions[1:])
                view.update(summary=f"{len(running)} running, {len(waiting)} waiting{at}", rows=positions)

            self.session.watch(ended, show=show, on_signal=lambda: self._ask_to_stop(running, waiting))
            self.session.stop.check()
        done = self._finalist_records.read()
        if not usable(done.values()):
            self._write_leaderboard(trials, speeds, done, winner=None)
            errors = "; ".join(f"{count} x {words}" for words, count in distinct_errors(done.values()))
            raise WorkersFailed(f"None of the {len(done)} finalists could be trained: {errors}")
        return done

    def _ask_to_stop(self, running: Mapping[Any, tuple[Trial, Any]], waiting: list[Trial]) -> None:
        """Asks the running finalists to save and stop, and starts no more."""
        waiting.clear()
        self._stopping_since = time.monotonic()
        for _, board in running.values():
            board.ask_to_stop.remote()

    def _kill_unresponsive(self, running: Mapping[Any, tuple[Trial, Any]]) -> None:
        """Kills finalists that did not stop when asked: workers that still wait for resources never see the request."""
        if self._stopping_since is not None and time.monotonic() - self._stopping_since > PATIENCE_S:
            for future in running:
                ray.cancel(future, force=True)

    def _tracking(self, task: FinalistTask, trial: Trial) -> Tracking:
        """Logs a finalist where the job says. This process does, since only it has the user's environment."""
        run = Run(task.run)
        name = f"{self._name}-finalist-{trial.number}"
        job = tracked_job(task.job, run, recipe="finalist", name=name)
        return Tracking(job, self.job.run.tracker, self.session)

    def _record_finalist(self, trial: Trial, future: Any, tracking: Tracking) -> None:
        """Records the result of a finalist, unless a signal ended it."""
        try:
            metrics = ray.get(future)
        except ray.exceptions.RayError as error:
            if self.session.stop.signal_number is not None:
                return
            cause = getattr(error, "cause", None)
            if cause is not None and (isinstance(cause, Locked | LockLost) or is_outage(cause)):
                raise cause from error  # the same command resumes the finalist
            words = _words(error)
            self.console.line(f"finalist {trial.number} failed: {words}")
            finalist = replace(trial, status="failed", error=words, val_accuracy=None, val_loss=None)
        else:
            finalist = replace(
                trial,
                status="done",
                val_accuracy=metrics["validation_accuracy"],
                val_loss=metrics["validation_loss"],
                epochs=metrics["epochs"],
                seconds=metrics["seconds"],
                history=(),
            )
            tracking.finish(metrics, bundle=None)
            self.console.line(
                f"finalist {trial.number}: validation accuracy {finalist.val_accuracy:.4f} "
                f"({trial.val_accuracy:.4f} as a trial), loss {finalist.val_loss:.4f}"
            )
        self._finalist_records.write(replace(finalist, ended_s=round(self._worked_s(), 1)))

    def finalist_task(
        self, data: SearchData, trial: Trial, *, per_finalist: Share, board: Any, validated_only: bool
    ) -> FinalistTask:
        """The input of a finalist's process."""
        job = with_absolute_weights(train_job(trial.params, self.job, stage="finalist"))
        name = architecture_of(trial.params, self.job).name
        return FinalistTask(
            job=job,
            run=self._finalist_uri(trial),
            records=data.decoded[name].plan,
            fingerprint=data.decoded[name].fingerprint,
            features=data.features.get(name) if job.uses_features else None,
            splits=data.splits,
            share=per_finalist,
            board=board,
            command=command_line(),
            title=f"{self._name}, trial {trial.number}",
            validated_only=validated_only,
            search=self.session.fence,
            keeps_untested=validated_only and self.job.search.combine != "none",
        )

    @property
    def _name(self) -> str:
        """The name of the search."""
        return self.run.uri.rpartition("/")[2]

    def _finalist_uri(self, trial: Trial) -> str:
        return join(self.run.uri, "finalists", f"{trial.number:06d}")

    def _combine(self, data: SearchData, ranked: Sequence[Trial]) -> Combination | None:
        """Combines the finalists, the best first; None: it was not asked for, or there is nothing to combine."""
        method = self.job.search.combine
        if method == "none" or len(ranked) < 2:
            return None
        of_winner = data.decoded[architecture_of(ranked[0].params, self.job).name]
        combination = Combination(
            method="ensemble" if method == "ensemble" else "greedy-soup",
            finalists={trial.number: join(self._finalist_uri(trial), UNTESTED) for trial in ranked},
            uri=join(self.run.uri, "combined"),
            decoded=of_winner,
            splits=data.splits,
            session=self.session,
        )
        return combination if combination.make() else None

    def _finish_winner(self, data: SearchData, winner: Trial, *, per_finalist: Share) -> dict[str, float]:
        """Tests the winner, copies its bundle into the search's folder, and returns its test metrics."""
        finalist_bundle, bundle = join(self._finalist_uri(winner), "bundle"), join(self.run.uri, "bundle")
        if not ANYWHERE.exists(join(finalist_bundle, BUNDLE_FILE)):
            self._test(winner, data, per_finalist=per_finalist)
        self.session.confirm_lock()
        if not ANYWHERE.exists(join(bundle, BUNDLE_FILE)):
            with tempfile.TemporaryDirectory() as scratch:
                ANYWHERE.download_folder(finalist_bundle, Path(scratch))
                ANYWHERE.upload_folder(Path(scratch), bundle, last=BUNDLE_FILE)
        return dict(documents.read(ANYWHERE, join(bundle, BUNDLE_FILE), BundleInfo).test)

    def _test(self, winner: Trial, data: SearchData, *, per_finalist: Share) -> None:
        """Resumes the winner's run, of which only the test and the bundle remain."""
        board = make_board()
        task = self.finalist_task(data, winner, per_finalist=per_finalist, board=board, validated_only=False)
        with self._tracking(task, winner) as tracking:
            (metrics,) = wait_for(
                [start_finalist(task)], self.session, title="testing the winner", expected_s=USUAL_TEST_S
            )
            tracking.finish(metrics, bundle=join(task.run, "bundle"))

    # --- results ---

    def _write_leaderboard(
        self,
        trials: Mapping[int, Trial],
        speeds: Mapping[str, Speed],
        finalists: Mapping[int, Trial],
        *,
        winner: int | None,
    ) -> pa.Table:
        from mnist_dist.on_ray.search.page import write_pareto  # Here, since a driver begins without it.

        table = self._table_of(trials, speeds, finalists, winner=winner)
        self.session.confirm_lock()
        ANYWHERE.write_bytes(self._leaderboard, parquet_bytes(table))
        write_pareto(self.run, trials, table)
        self.console.table(shown_rows(table))
        self.console.line("* Pareto front: no other trial is as accurate and as fast (pareto.png)")
        return table

    def _table_of(
        self,
        trials: Mapping[int, Trial],
        speeds: Mapping[str, Speed],
        finalists: Mapping[int, Trial],
        *,
        winner: int | None,
    ) -> pa.Table:
        return make_leaderboard(
            trials.values(),
            architectures={number: architecture_of(trial.params, self.job) for number, trial in trials.items()},
            speeds=speeds,
            finalists=finalists,
            winner=winner,
        )

    def _try_to_write_page(self, facts: RunFacts) -> None:
        """Writes the page of a search without a winner, if a trial has ended. It is not worth an error beside the one
        that ended the search."""
        try:
            trials = self._records("trials").read() if self.run.begun_by_number() else {}
            if all(trial.status == "running" for trial in trials.values()):
                return
            speeds, finalists = self.run.read("speeds.json", dict[str, Speed]) or {}, self._finalist_records.read()
            table = self._table_of(trials, speeds, finalists, winner=None)
            self._write_page(facts, trials, finalists, table)
        except (OSError, MnistDistError) as error:
            self.console.line(f"the report could not be written: {first_line(error)}")
        else:
            self.console.line(f"report of what there is: {self._page}")

    def _write_page(
        self,
        facts: RunFacts,
        trials: Mapping[int, Trial],
        finalists: Mapping[int, Trial],
        leaderboard: pa.Table,
        *,
        splits: Splits | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        from mnist_dist.on_ray.search.page import write_page  # Here, since a driver begins without it.

        write_page(
            self.run,
            facts,
            trials=trials,
            finalists=finalists,
            leaderboard=leaderboard,
            planned=self._planned,
            worked_s=self._worked_s(),
            validation_images=len(splits.val) if splits is not None else 0,
            test_images=len(splits.test) if splits is not None else 0,
            result=result,
            confirm_lock=self.session.confirm_lock,
        )

    @property
    def _page(self) -> str:
        return join(self.run.uri, REPORT_FILE)

    @property
    def _leaderboard(self) -> str:
        return join(self.run.uri, "leaderboard.parquet")

    def _result(
        self,
        trials: Mapping[int, Trial],
        ranked: Sequence[Trial],
        combination: Combination | None,
        tested: Mapping[str, float],
        speeds: Mapping[str, Speed],
    ) -> dict[str, Any]:
        """The result; `best` has the figures of the bundle, whether it is the winner's or a combination."""
        winner = ranked[0]
        is_combined = combination is not None and combination.is_better
        validation = {"accuracy": winner.val_accuracy, "loss": winner.val_loss}
        if combination is not None and is_combined:
            validation = dict(combination.info.validation)
        return {
            "run_dir": self.run.uri,
            "bundle": join(self.run.uri, "bundle"),
            "trials": len(trials),
            "failed": sum(trial.status == "failed" for trial in trials.values()),
            "best": {
                "trial": winner.number,
                "config": winner.params,
                "val_accuracy": validation["accuracy"],
                "val_loss": validation["loss"],
                "test_accuracy": tested["accuracy"],
                "test_loss": tested["loss"],
                "ms_per_image": self._ms_per_image(ranked, combination, speeds),
            },
            "combined": None if combination is None else combination.described(),
            "leaderboard": self._leaderboard,
            "report": self._page,
            **self.timing,
            "seconds": seconds_since(self.began_at),
        }

    def _ms_per_image(
        self, ranked: Sequence[Trial], combination: Combination | None, speeds: Mapping[str, Speed]
    ) -> float | None:
        """Of the winner; an ensemble takes as long as its members together. None: not measured."""
        members = ranked[:1]
        if combination is not None and combination.is_better and combination.method == "ensemble":
            members = [trial for trial in ranked if trial.number in combination.members]
        measured = [speeds.get(architecture_of(trial.params, self.job).name) for trial in members]
        known = [speed.ms_per_image for speed in measured if speed is not None]
        return sum(known) if len(known) == len(members) else None


def _gpus_per_trial(job: SearchJob, resources: Resources) -> float:
    requested = job.run.gpus_per_trial
    return requested if requested is not None else 0.25 if resources.gpus else 0.0


def concurrent_trials(job: SearchJob, resources: Resources) -> int:
    """How many trials fit at once; more would starve each other (ray-project/ray#54305).

    Raises:
        ResourceError: not even one trial fits.
    """
    cpus, gpus = job.run.cpus_per_trial, job.run.gpus_per_trial or 0.0
    room = resources.room(cpus, gpus=gpus)
    if room == 0:
        raise ResourceError(
            f"a trial of {cpus:g} CPUs and {gpus:g} GPUs fits on no node; the cluster has {resources}. "
            f"Received: cpus_per_trial={cpus:g}, gpus_per_trial={gpus:g}"
        )
    return min(room, job.run.concurrent_trials or room, job.search.trials)


def _finalists_at_once(per_finalist: Share, resources: Resources) -> int:
    return max(1, resources.room(per_finalist.cpus, gpus=per_finalist.gpus) // per_finalist.workers)


def resolved(job: SearchJob) -> KerasBackend:
    """The backend of a search that has entered a cluster."""
    backend = job.run.backend
    assert backend != "auto", "`Search.enter` resolves it"
    return backend


def _features_of(params: Params, *, job: SearchJob, plans: Mapping[str, FeaturePlan]) -> str | None:
    """The name of the architecture whose features a trial needs; None: it needs none."""
    name = architecture_of(params, job).name
    return name if name in plans and train_job(params, job, stage="trial").uses_features else None


def common_splits(decoded: list[DecodedData], splits: Splits) -> Splits:
    """The splits without the images that are unreadable at any of the input sizes."""
    if not any(data.bad for data in decoded):
        return splits
    columns = [np.array([status == "ok" for status in data.index["status"].to_pylist()]) for data in decoded]
    readable = np.logical_and.reduce(columns)
    return replace(
        splits, **{name: getattr(splits, name)[readable[getattr(splits, name)]] for name in ("train", "val", "test")}
    )


def start_finalist(task: FinalistTask) -> Any:
    """Starts a finalist in its own process on this node. Ray Train places its workers."""
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_this_node())(train_finalist).remote(task)


def train_finalist(task: FinalistTask) -> dict[str, Any]:
    """Trains a finalist with Ray Train, or resumes it, and returns its metrics."""
    began_at = time.time()
    console = Console(verbose=task.job.run.verbose, terminal=False)
    with Stop(console) as stop, _patient_lock(task.run, within=task.search) as lock:
        session = Session(console=console, stop=stop, lock=lock)
        training = Training(
            task.job, session, recipe="finalist", run=Run(task.run), began_at=began_at, steps_limit=task.steps_limit
        )
        metrics = training.train_on(
            task.splits,
            task.features,
            records=task.records,
            fingerprint=task.fingerprint,
            mine=task.share,
            board=task.board,
            command=task.command,
            title=task.title,
            validated_only=task.validated_only,
            keeps_untested=task.keeps_untested,
        )
    return {**metrics, "seconds": round(metrics["earlier_s"] + time.time() - began_at, 2)}


@contextmanager
def _patient_lock(run: str, *, within: Fence) -> Iterator[Lock]:
    """The lock of a finalist's run. The search has only one driver, but an earlier one that was killed or suspended may
    have left a process that holds the lock until it notices."""
    deadline, uri, above = time.monotonic() + LOCK_PATIENCE_S, Run(run).lock_uri, Run(run).max_number
    with ExitStack() as stack:
        while True:
            try:
                lock = stack.enter_context(Lock(uri, what=run, wait_s=LOCK_PATIENCE_S, within=within, above=above))
                break
            except Locked:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        yield lock


def measure_speeds(
    models: Mapping[str, ModelConfig], specs: Mapping[str, Any], *, num_classes: int
) -> dict[str, Speed]:
    """Measures the scoring speed of architectures, in a process that does nothing else."""
    from mnist_dist.engines.engine import images_per_s, use_cpus
    from mnist_dist.models.classifier import build_classifier

    use_cpus(None)
    speeds = {}
    for name, model in models.items():
        if is_imported(model.backbone):
            speeds[name] = _speed_of_bundle(model.backbone)
            continue
        classifier = build_classifier(
            replace(model, weights="none"), spec=specs[name], num_classes=num_classes, load_weights=False
        )
        rate = images_per_s(classifier.model, batch_size=SPEED_BATCH_SIZE, seconds=SPEED_S)
        speeds[name] = Speed(ms_per_image=1000 / rate, backbone_parameters=classifier.backbone.count_params())
    return speeds


def _speed_of_bundle(uri: str) -> Speed:
    """The speed of an imported backbone in ONNX Runtime, to which its head adds nothing that could be measured."""
    from mnist_dist.engines.engine import calls_per_s
    from mnist_dist.models.onnx_file import FEATURES, open_session, run_session
    from mnist_dist.models.onnx_head import count_weights

    bundle = load_bundle(uri)
    session, size = open_session(bundle.model_path), bundle.fixed_batch or SPEED_BATCH_SIZE
    pixels = np.zeros((size, *bundle.info.spec.shape), np.uint8)
    rate = size * calls_per_s(lambda: run_session(session, pixels, [FEATURES]), seconds=SPEED_S)
    return Speed(ms_per_image=1000 / rate, backbone_parameters=count_weights(bundle.model_path))


def _positions(running: Mapping[Any, tuple[Trial, Any]]) -> list[list[str]]:
    rows = [["finalist", "phase", "epoch", "accuracy"]]
    for trial, board in running.values():
        try:
            position: Position | Measured | None = ray.get(board.take.remote())[0]
        except ray.exceptions.RayError:  # a dead board ends its finalist, too, whose failure is then recorded
            continue
        if position is not None:
            rows.append([str(trial.number), *_cells(position)])
    return rows


def _cells(position: Position | Measured) -> tuple[str, str, str]:
    """Phase, epoch and accuracy of a finalist, for display."""
    if isinstance(position, Measured):
        return "measuring", f"{position.done:,}/{position.images:,} {position.split}", ""
    return position.phase, f"{position.epoch}/{position.epochs}", f"{position.accuracy:.4f}"


def _words(error: BaseException) -> str:
    """A one-line description of an error in a finalist's process."""
    cause = getattr(error, "cause", None) or error
    words = first_line(cause)
    return words if isinstance(cause, MnistDistError) else f"{type(cause).__name__}: {words}"
