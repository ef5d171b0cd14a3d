"""The search job, the driver's side: data and features, trials, speeds, finalists, the winner, the leaderboard.

Each step leaves what it found in the search's folder (`search/trials.py`), so the same command goes on behind the last
one that is complete. Loads neither TensorFlow nor Keras.

Validation images alone decide, among trials and among finalists; the winner alone meets the test images, once.
"""

import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from mnist_dist import documents
from mnist_dist.config import ModelConfig, TrainJob, require
from mnist_dist.console import Console, Stop, command_line
from mnist_dist.data.records import RecordPlan
from mnist_dist.data.splits import Splits
from mnist_dist.errors import Locked, MnistDistError, ResourceError, WorkersFailed, first_line
from mnist_dist.inventory import RunFacts
from mnist_dist.models.bundle import BUNDLE_FILE, BundleInfo
from mnist_dist.on_ray.cluster import Resources, Share, await_nodes, connected, on_this_node, share
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
from mnist_dist.on_ray.search.trial import Prepared, TrialTask, is_outage
from mnist_dist.on_ray.search.tuning import Trials, run_trials
from mnist_dist.on_ray.tasks import wait_for
from mnist_dist.on_ray.training.board import make_board
from mnist_dist.on_ray.training.train import Training, check_job, with_absolute_weights
from mnist_dist.search_config import SearchJob
from mnist_dist.session import Session, locked_session
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.lock import Lock
from mnist_dist.store.uris import absolute, join
from mnist_dist.training.features import FeaturePlan
from mnist_dist.training.runs import Run
from mnist_dist.tuning.leaderboard import Speed, make_leaderboard, pareto_figure, parquet_bytes, shown_rows
from mnist_dist.tuning.space import architecture_of, architectures_of, backbone_job, check_space, describe, train_job
from mnist_dist.tuning.trials import Trial, TrialRecords, TrialsOver, distinct_errors, usable

PATIENCE_S = 30.0  # with finalists that were asked to stop
LOCK_PATIENCE_S = 70.0  # a lock that nobody renews is taken over after 60 s
NAMED_ERRORS = 5
TRIAL_RECORD = re.compile(r"trials/\d{6}\.json")
SPEED_BATCH_SIZE = 32
SPEED_S = 1.0
USUAL_SPEED_S = 10.0  # of an architecture, loading TensorFlow included: for the bar; so is the next
USUAL_TEST_S = 30.0


def search(job: SearchJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """Searches, or goes on with a search, or returns what is finished.

    Args:
        job: what to search.
        recipe: the recipe's name; with the settings it names the search where `job.run.name` is None.
        console: what a person sees.

    Returns:
        The result as in the contract: `run_dir`, `bundle`, `trials`, `failed`, `best` (its trial, config and metrics),
        `leaderboard` (URI), `seconds`.

    Raises:
        ConfigError: the space, the data, the weights or the cluster do not fit; found before any trial.
        WorkersFailed: all trials failed, or all finalists.
        Interrupted: a signal; what is finished is kept.
    """
    began_at = time.time()
    check_space(job)
    for space in job.backbones:
        for architecture in architectures_of(space):
            check_job(backbone_job(architecture, job))
    name = job.run.name or f"{recipe}-{job.settings_hash()}"
    run = Run(join(absolute(job.run.storage), name), begun_by=TRIAL_RECORD)
    facts = _facts(job, recipe)
    run.compare(facts)
    finished = run.result()
    if finished is not None:
        console.line(f"{run.uri} is finished; another --name or --seed searches anew")
        return finished
    ANYWHERE.check_writable(job.run.storage)
    with locked_session(console, lock_uri=run.lock_uri, what=run.uri, wait_s=job.run.lock_wait_s) as session:
        finished = run.result()  # by a driver that was waited for
        if finished is not None:
            return finished
        result = _Search(job, session, run=run, began_at=began_at).run_to_end(facts)
        run.finish(result)
    return result


def _facts(job: SearchJob, recipe: str) -> RunFacts:
    features = job.run.feature_type if job.run.feature_cache else None
    return RunFacts(recipe=recipe, settings=job.settings(), features=features)


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What all trials and finalists are trained on."""

    decoded: Mapping[str, DecodedData]
    """By the architecture's name."""
    features: Mapping[str, FeaturePlan]
    """Finished ones, by the architecture's name."""
    splits: Splits


@dataclass(frozen=True, kw_only=True)
class FinalistTask:
    """What the process of a finalist is told."""

    job: TrainJob
    run: str
    """URI of its run."""
    records: RecordPlan
    """Of the finished records."""
    fingerprint: str
    features: FeaturePlan | None
    splits: Splits
    share: Share
    board: Any
    command: str
    validated_only: bool


def run_first_stage(job: SearchJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """Features and trials alone, as `search` runs them: `features_s`, `trials_s`, `trials` and the best `val_accuracy`.

    Raises:
        ConfigError, WorkersFailed, Interrupted: see `search`.
    """
    check_space(job)
    run = Run(join(absolute(job.run.storage), job.run.name or recipe), begun_by=TRIAL_RECORD)
    with locked_session(console, lock_uri=run.lock_uri, what=run.uri) as session:
        stage = _Search(job, session, run=run, began_at=time.time())
        with connected(verbose=job.run.verbose, stop=session.stop) as have:
            have = stage.enter(have)
            trials = stage.try_all(stage.prepare(_facts(job, recipe), have=have), have=have)
    return {**stage.timing, "trials": len(trials), "val_accuracy": usable(trials.values())[0].val_accuracy}


class _Search:
    """One driver's attempt at a search."""

    def __init__(self, job: SearchJob, session: Session, *, run: Run, began_at: float) -> None:
        self.job, self.session, self.run, self.console = job, session, run, session.console
        self.began_at, self.timing = began_at, dict[str, float]()
        self._stopping_since: float | None = None
        hours = job.search.hours
        self.ends_at = time.monotonic() + hours * 3600 if hours is not None else float("inf")
        self.architectures = [one for space in job.backbones for one in architectures_of(space)]
        self.finalist_records = TrialRecords(join(run.uri, "finalists"))

    def run_to_end(self, facts: RunFacts) -> dict[str, Any]:
        """All steps that are left, and the result."""
        asked = self.job.run
        with connected(verbose=asked.verbose, stop=self.session.stop) as have:
            have = self.enter(have)
            mine = share(have, workers=asked.workers, cpus_per_worker=asked.cpus_per_worker, gpu=asked.gpu)
            require(
                mine.workers <= min(self.job.space.batch_size),
                "batch_size is at least the number of workers of a finalist",
                batch_size=min(self.job.space.batch_size),
                workers=mine.workers,
            )
            data = self.prepare(facts, have=have)
            trials = self.try_all(data, have=have)
            speeds = self._measure(data, trials, have=have)
            with self._timed("finalists_s"):
                finalists = self._train_finalists(data, trials, speeds, mine=mine, have=have)
            winner = min(usable(finalists.values()), key=lambda trial: trial.rank)
            tested = self._finish_winner(data, winner, mine=mine)
        self._write_leaderboard(trials, speeds, finalists, winner=winner.number)
        return self._result(trials, winner, tested, speeds)

    def enter(self, have: Resources) -> Resources:
        """Looks at what the cluster has, before anything is computed; what it has once the nodes are there.

        Raises:
            ResourceError: no trial finds room.
        """
        asked = self.job.run
        have = await_nodes(
            have,
            self.session,
            count=asked.concurrent_trials or 1,
            cpus=asked.cpus_per_trial,
            gpus=asked.gpus_per_trial or 0.0,
            wait_s=asked.wait_for_nodes_s,
        )
        self.job = replace(self.job, run=replace(self.job.run, gpus_per_trial=_gpus_per_trial(self.job, have)))
        _concurrent_trials(self.job, have)
        return have

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Notes how long this driver spent on a step, s."""
        began = time.monotonic()
        yield
        self.timing[name] = round(time.monotonic() - began, 2)

    # --- data ---

    def prepare(self, facts: RunFacts, *, have: Resources) -> _Data:
        """Decodes the images for each input size, splits them once, and computes the frozen backbones' features."""
        job, root = self.job, self.job.run.storage
        source = open_data(job.data, console=self.console)
        listed = {one.name: plan_data(source, job.data, one.model(), root=root) for one in self.architectures}
        for some in listed.values():
            check_places(some, job.data, root=root, is_shared=job.run.storage_is_shared, nodes=have.nodes)
        keys = sorted({some.plan.cache.key for some in listed.values()})
        is_new = self.run.begin(replace(facts, records="-".join(key[:16] for key in keys)))
        self.console.line(f"{'searching' if is_new else 'going on with'} {self.run.uri}, on {have}")
        by_key = {some.plan.cache.key: some for some in listed.values()}
        decoded = {key: decode(some, job.data, self.session) for key, some in by_key.items()}
        of_each = {name: decoded[some.plan.cache.key] for name, some in listed.items()}
        splits = _common_splits(
            list(decoded.values()), split(of_each[self.architectures[0].name], job.data, console=self.console)
        )
        largest = max(job.space.batch_size)
        require(
            largest <= len(splits.train),
            f"batch_size is at most the number of training images ({len(splits.train):,})",
            batch_size=largest,
        )
        with self._timed("features_s"):
            features = self._features(of_each, splits, have=have)
        return _Data(decoded=of_each, features=features, splits=splits)

    def _features(
        self, decoded: Mapping[str, DecodedData], splits: Splits, *, have: Resources
    ) -> dict[str, FeaturePlan]:
        plans = {}
        for space in self.job.backbones:
            if not self.job.run.feature_cache or space.trained == ("all",):
                continue
            for one in architectures_of(space):
                job = with_absolute_weights(backbone_job(one, self.job))
                plans[one.name] = plan_job_features(job, decoded[one.name], splits, have=have)
        for name, plan in plans.items():
            compute_missing(plan, self.session, actors=feature_actors(have), title=f"features of {name}")
        return plans

    # --- trials ---

    def try_all(self, data: _Data, *, have: Resources) -> dict[int, Trial]:
        """The first stage; all trials by number.

        Raises:
            WorkersFailed: none of them came to anything.
        """
        with self._timed("trials_s"):
            return self._try(data, concurrent=_concurrent_trials(self.job, have))

    def _try(self, data: _Data, *, concurrent: int) -> dict[int, Trial]:
        records = TrialRecords(join(self.run.uri, "trials"))
        if self.run.read("trials.json", TrialsOver) is None:
            trials = Trials(self.job, records, ends_at=self.ends_at)
            task = TrialTask(
                prepared={
                    name: Prepared(records=some.plan, features=data.features.get(name))
                    for name, some in data.decoded.items()
                },
                splits=data.splits,
                cpus=self.job.run.cpus_per_trial,
                gpu=bool(self.job.run.gpus_per_trial),
            )
            self.console.line(f"trials: {trials.count}, {concurrent} at a time")
            run_trials(
                self.job,
                trials,
                task,
                self.session,
                uri=self.run.uri,
                concurrent=concurrent,
            )
            known = trials.known
            if usable(known.values()):
                self.run.write("trials.json", TrialsOver(len(known)))
        else:
            known = records.read()
        errors = distinct_errors(known.values())
        for words, count in errors[:NAMED_ERRORS]:
            self.console.line(f"{count} trial(s) failed: {words}")
        if not usable(known.values()):
            shown = "; ".join(f"{count} x {words}" for words, count in errors[:NAMED_ERRORS])
            raise WorkersFailed(
                f"none of {len(known)} trials came to anything: {shown}"
                if known
                else f"the time (--hours {self.job.search.hours:g}) was over before the first trial; what was decoded "
                "and computed is kept"
            )
        return known

    def _measure(self, data: _Data, trials: Mapping[int, Trial], *, have: Resources) -> dict[str, Speed]:
        """How fast each architecture scores, one after the other while nothing else runs."""
        known = self.run.read("speeds.json", dict[str, Speed]) or {}
        tried = {architecture_of(trial.params, self.job).name for trial in usable(trials.values())}
        missing = [one for one in self.architectures if one.name in tried - known.keys()]
        if missing:
            measure = ray.remote(num_cpus=0, num_gpus=min(1.0, have.gpus))(measure_speeds)  # nothing else runs now
            asked = measure.remote(
                {one.name: with_absolute_weights(backbone_job(one, self.job)).model for one in missing},
                {one.name: data.decoded[one.name].plan.spec for one in missing},
                num_classes=len(next(iter(data.decoded.values())).plan.class_names),
            )
            title = f"speed of scoring of {len(missing)} architecture(s)"
            (found,) = wait_for([asked], self.session, title=title, expected_s=USUAL_SPEED_S * len(missing))
            known |= found
            self.run.write("speeds.json", known)
        return known

    # --- finalists ---

    def _train_finalists(
        self,
        data: _Data,
        trials: Mapping[int, Trial],
        speeds: Mapping[str, Speed],
        *,
        mine: Share,
        have: Resources,
    ) -> dict[int, Trial]:
        """The second stage; all finalists by number.

        Raises:
            WorkersFailed: all of them failed.
        """
        done = self.finalist_records.read()
        chosen = usable(trials.values())[: self.job.search.finalists]
        left = [trial for trial in chosen if trial.number not in done]
        room = max(1, have.room(mine.cpus, gpus=float(mine.gpu)) // mine.workers)
        waiting, running = list(left), dict[Any, tuple[Trial, Any]]()
        with self.console.view("finalists") as view:

            def ended(timeout_s: float) -> bool:
                while waiting and len(running) < room:
                    trial, board = waiting.pop(0), make_board()
                    self.console.line(f"finalist {trial.number}: {describe(trial.params)}")
                    task = self._finalist_task(data, trial, mine=mine, board=board, validated_only=len(chosen) > 1)
                    running[_start(task)] = (trial, board)
                for asked in ray.wait(list(running), timeout=timeout_s)[0] if running else ():
                    self._record_finalist(running.pop(asked)[0], asked)
                return not (waiting or running)

            def show() -> None:
                self._end_the_silent(running)
                positions = _positions(running)
                at = "".join(f"; {number}: {phase} {epoch}" for number, phase, epoch, _ in positions[1:])
                view.update(summary=f"{len(running)} running, {len(waiting)} waiting{at}", rows=positions)

            self.session.watch(ended, show=show, on_signal=lambda: self._ask_to_stop(running, waiting))
        self.session.stop.check()
        done = self.finalist_records.read()
        if not usable(done.values()):
            self._write_leaderboard(trials, speeds, done, winner=None)
            errors = "; ".join(f"{count} x {words}" for words, count in distinct_errors(done.values()))
            raise WorkersFailed(f"none of {len(done)} finalists could be trained: {errors}")
        return done

    def _ask_to_stop(self, running: Mapping[Any, tuple[Trial, Any]], waiting: list[Trial]) -> None:
        """Passes a signal on: finalists save what they have and end."""
        waiting.clear()
        self._stopping_since = time.monotonic()
        for _, board in running.values():
            board.ask_to_stop.remote()

    def _end_the_silent(self, running: Mapping[Any, tuple[Trial, Any]]) -> None:
        """Ends finalists that were asked to stop and do not: their workers wait for room, and never look."""
        if self._stopping_since is not None and time.monotonic() - self._stopping_since > PATIENCE_S:
            for asked in running:
                ray.cancel(asked, force=True)

    def _record_finalist(self, trial: Trial, asked: Any) -> None:
        """Writes down what came of a finalist, unless a signal ended it."""
        try:
            metrics = ray.get(asked)
        except ray.exceptions.RayError as error:
            if self.session.stop.signal_number is not None:
                return
            cause = getattr(error, "cause", None)
            if cause is not None and (isinstance(cause, Locked) or is_outage(cause)):
                raise cause from error  # the same command goes on with the finalist
            words = _words(error)
            self.console.line(f"finalist {trial.number} failed: {words}")
            found = replace(trial, status="failed", error=words, val_accuracy=None, val_loss=None)
        else:
            found = replace(
                trial,
                status="done",
                val_accuracy=metrics["validation_accuracy"],
                val_loss=metrics["validation_loss"],
                epochs=metrics["epochs"],
                seconds=metrics["seconds"],
                history=(),
            )
            self.console.line(
                f"finalist {trial.number}: validation accuracy {found.val_accuracy:.4f} ({trial.val_accuracy:.4f} as a "
                f"trial), loss {found.val_loss:.4f}"
            )
        self.finalist_records.write(found)

    def _finalist_task(
        self, data: _Data, trial: Trial, *, mine: Share, board: Any, validated_only: bool
    ) -> FinalistTask:
        job = with_absolute_weights(train_job(trial.params, self.job, stage="finalist"))
        name = architecture_of(trial.params, self.job).name
        return FinalistTask(
            job=job,
            run=self._finalist_uri(trial),
            records=data.decoded[name].plan,
            fingerprint=data.decoded[name].fingerprint,
            features=data.features.get(name) if job.uses_features else None,
            splits=data.splits,
            share=mine,
            board=board,
            command=command_line(),
            validated_only=validated_only,
        )

    def _finalist_uri(self, trial: Trial) -> str:
        return join(self.run.uri, "finalists", f"{trial.number:06d}")

    def _finish_winner(self, data: _Data, winner: Trial, *, mine: Share) -> dict[str, float]:
        """Tests the winner, and puts its bundle into the search's folder; its test metrics."""
        its_bundle, bundle = join(self._finalist_uri(winner), "bundle"), join(self.run.uri, "bundle")
        if not ANYWHERE.exists(join(its_bundle, BUNDLE_FILE)):
            self._test(winner, data, mine=mine)
        self.session.confirm_lock()
        if not ANYWHERE.exists(join(bundle, BUNDLE_FILE)):
            with tempfile.TemporaryDirectory() as scratch:
                ANYWHERE.download_folder(its_bundle, Path(scratch))
                ANYWHERE.upload_folder(Path(scratch), bundle, last=BUNDLE_FILE)
        return dict(documents.read(ANYWHERE, join(bundle, BUNDLE_FILE), BundleInfo).test)

    def _test(self, winner: Trial, data: _Data, *, mine: Share) -> None:
        """Goes on with the winner's run, which has only the test and the bundle left."""
        asked = _start(self._finalist_task(data, winner, mine=mine, board=make_board(), validated_only=False))
        wait_for([asked], self.session, title="testing the winner", expected_s=USUAL_TEST_S)

    # --- results ---

    def _write_leaderboard(
        self,
        trials: Mapping[int, Trial],
        speeds: Mapping[str, Speed],
        finalists: Mapping[int, Trial],
        *,
        winner: int | None,
    ) -> None:
        table = make_leaderboard(
            trials.values(),
            architectures={number: architecture_of(trial.params, self.job) for number, trial in trials.items()},
            speeds=speeds,
            finalists=finalists,
            winner=winner,
        )
        ANYWHERE.write_bytes(self._leaderboard, parquet_bytes(table))
        ANYWHERE.write_bytes(join(self.run.uri, "pareto.png"), pareto_figure(table))
        self.console.table(shown_rows(table))
        self.console.line("* Pareto front: no other trial is as accurate and as fast (pareto.png)")

    @property
    def _leaderboard(self) -> str:
        return join(self.run.uri, "leaderboard.parquet")

    def _result(
        self, trials: Mapping[int, Trial], winner: Trial, tested: Mapping[str, float], speeds: Mapping[str, Speed]
    ) -> dict[str, Any]:
        speed = speeds.get(architecture_of(winner.params, self.job).name)
        return {
            "run_dir": self.run.uri,
            "bundle": join(self.run.uri, "bundle"),
            "trials": len(trials),
            "failed": sum(trial.status == "failed" for trial in trials.values()),
            "best": {
                "trial": winner.number,
                "config": winner.params,
                "val_accuracy": winner.val_accuracy,
                "val_loss": winner.val_loss,
                "test_accuracy": tested["accuracy"],
                "test_loss": tested["loss"],
                "ms_per_image": speed.ms_per_image if speed else None,
            },
            "leaderboard": self._leaderboard,
            **self.timing,
            "seconds": round(time.time() - self.began_at, 2),
        }


def _gpus_per_trial(job: SearchJob, have: Resources) -> float:
    asked = job.run.gpus_per_trial
    return asked if asked is not None else 0.25 if have.gpus else 0.0


def _concurrent_trials(job: SearchJob, have: Resources) -> int:
    """How many trials find room at once; more of them would starve each other (ray-project/ray#54305).

    Raises:
        ResourceError: not even one.
    """
    cpus, gpus = job.run.cpus_per_trial, job.run.gpus_per_trial or 0.0
    room = have.room(cpus, gpus=gpus)
    if room == 0:
        raise ResourceError(
            f"a trial of {cpus:g} CPUs and {gpus:g} GPUs fits on no node; the cluster has {have}. "
            f"Received: cpus_per_trial={cpus:g}, gpus_per_trial={gpus:g}"
        )
    return min(room, job.run.concurrent_trials or room, job.search.trials)


def _common_splits(decoded: list[DecodedData], splits: Splits) -> Splits:
    """The splits without images that cannot be read at one of the sizes."""
    if not any(some.bad for some in decoded):
        return splits
    columns = [np.array([status == "ok" for status in some.index["status"].to_pylist()]) for some in decoded]
    readable = np.logical_and.reduce(columns)
    return replace(
        splits, **{name: getattr(splits, name)[readable[getattr(splits, name)]] for name in ("train", "val", "test")}
    )


def _start(task: FinalistTask) -> Any:
    """Starts a finalist in a process of its own, on this node: its workers are placed by Ray Train."""
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_this_node())(train_finalist).remote(task)


def train_finalist(task: FinalistTask) -> dict[str, Any]:
    """Trains a finalist with Ray Train, or goes on with it; gives its metrics."""
    began_at = time.time()
    console = Console(verbose=task.job.run.verbose, terminal=False)
    with Stop(console) as stop, _patient_lock(task.run) as lock:
        session = Session(console=console, stop=stop, lock=lock)
        training = Training(task.job, session, recipe="finalist", run=Run(task.run), began_at=began_at)
        metrics = training.train_on(
            task.splits,
            task.features,
            records=task.records,
            fingerprint=task.fingerprint,
            mine=task.share,
            board=task.board,
            command=task.command,
            validated_only=task.validated_only,
        )
    return {**metrics, "seconds": round(metrics["earlier_s"] + time.time() - began_at, 2)}


@contextmanager
def _patient_lock(run: str) -> Iterator[Lock]:
    """The lock of a finalist's run. Another driver of the search there is none, but one that was killed may have left a
    process that still holds it."""
    until = time.monotonic() + LOCK_PATIENCE_S
    with ExitStack() as stack:
        while True:
            try:
                lock = stack.enter_context(Lock(join(run, "lock"), what=run))
                break
            except Locked:
                if time.monotonic() > until:
                    raise
                time.sleep(1)
        yield lock


def measure_speeds(
    models: Mapping[str, ModelConfig], specs: Mapping[str, Any], *, num_classes: int
) -> dict[str, Speed]:
    """Measures the scoring path of some architectures, in a process that does nothing else."""
    from mnist_dist.engines.engine import images_per_s, use_cpus
    from mnist_dist.models.classifier import build_classifier

    use_cpus(None)
    found = {}
    for name, model in models.items():
        classifier = build_classifier(
            replace(model, weights="none"), spec=specs[name], num_classes=num_classes, load_weights=False
        )
        rate = images_per_s(classifier.model, batch_size=SPEED_BATCH_SIZE, seconds=SPEED_S)
        found[name] = Speed(ms_per_image=1000 / rate, backbone_parameters=classifier.backbone.count_params())
    return found


def _positions(running: Mapping[Any, tuple[Trial, Any]]) -> list[list[str]]:
    rows = [["finalist", "phase", "epoch", "accuracy"]]
    for trial, board in running.values():
        try:
            position = ray.get(board.take.remote())[0]
        except ray.exceptions.RayError:  # it died; so will the finalist, and that is recorded
            continue
        if position is not None:
            rows.append(
                [str(trial.number), position.phase, f"{position.epoch}/{position.epochs}", f"{position.accuracy:.4f}"]
            )
    return rows


def _words(error: BaseException) -> str:
    """What an error of a finalist's process means to a person."""
    cause = getattr(error, "cause", None) or error
    words = first_line(cause)
    return words if isinstance(cause, MnistDistError) else f"{type(cause).__name__}: {words}"
