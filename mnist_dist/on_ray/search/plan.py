"""The plan of a search: its networks are measured on a sample, in scratch storage that is deleted.

Owns: the sample, the measurements, and the report of the plan. Does not own: the arithmetic (`tuning/planning.py`), or
training a finalist (`search.py`).

Measured are, one after the other: decoding; the features of each frozen backbone; two epochs of a trial of each
architecture and way to train it, as many at the same time as there will be trials; two epochs of each phase of one
finalist of each backbone and way to train it, of its slowest architecture. The second epoch counts, since the first
compiles the step. The sample is repeated to the number of images that there will be, so that an epoch may be as long as
it takes to measure it.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from mnist_dist.config import TrainJob
from mnist_dist.console import Console, duration
from mnist_dist.data.sampling import spread_rows
from mnist_dist.data.splits import Splits
from mnist_dist.on_ray.cluster import Resources, connected, worker_share
from mnist_dist.on_ray.data.features import compute_missing, feature_actors
from mnist_dist.on_ray.data.prepare import DecodedData, decode, open_data, plan_data, plan_job_features, scratch_storage
from mnist_dist.on_ray.search.search import (
    TRIAL_RECORD,
    Search,
    SearchData,
    check_search,
    common_splits,
    concurrent_trials,
    resolved,
    start_finalist,
)
from mnist_dist.on_ray.search.trial import Prepared, TrialProcess, TrialTask
from mnist_dist.on_ray.tasks import wait_for
from mnist_dist.on_ray.training.board import make_board
from mnist_dist.on_ray.training.plan import (
    EPOCHS,
    FIRST_STEPS,
    MAX_SAMPLE_OF_FEATURES,
    MIN_SAMPLE,
    SAMPLE_BYTES,
    epochs_of,
    sample_splits,
)
from mnist_dist.on_ray.training.train import with_absolute_weights
from mnist_dist.search_config import SearchJob
from mnist_dist.session import Session, locked_session, seconds_since, started_at
from mnist_dist.sources.source import Source, taken
from mnist_dist.store.anywhere import store_for
from mnist_dist.store.uris import join
from mnist_dist.training.features import FeaturePlan
from mnist_dist.training.host import SilentHost
from mnist_dist.training.planning import EpochTimes, TimedHost, forecast_phases, sizes_of
from mnist_dist.training.runs import Run
from mnist_dist.tuning.planning import Costs, SearchForecast, TrialCost, Way, forecast
from mnist_dist.tuning.space import (
    GridDraw,
    Params,
    architecture_of,
    fit_batches,
    middle,
    one_of_each,
    smallest_batch,
    train_job,
)
from mnist_dist.tuning.trials import Trial
from mnist_dist.tuning.warm_start import read_warm_start

MAX_SAMPLE = 8_192
ENOUGH_S = 1.0  # if the steps of an epoch take less, it is measured again with more steps
WANTED_S = 2.0  # an epoch then takes about this long
USUAL_TIMING_S = 20.0  # to measure a network; only the progress bar uses it


def plan_search(job: SearchJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """Forecasts how long a search takes, and finds its bottleneck.

    Args:
        job: what would be searched.
        recipe: the recipe's name.
        console: shows progress and the plan to the user.

    Returns:
        `plan`, `images`, `trials`, `concurrent_trials`, `finalists`, `bottleneck` (`decoding`, `features`, `trials` or
        `finalists`), `expected_s` (of each of these), `trials_at_most_s` (if no trial is stopped early), `networks`
        (architecture, trained, epoch_s and setup_s of a trial, features_s, finalist_s of each), `expected_seconds`,
        `seconds`.

    Raises:
        ConfigError: the space, the data, the weights or the cluster is unsuitable.
        WorkersFailed: a network could not be trained.
        Interrupted: a signal stopped the plan.
    """
    began_at = started_at(console)
    check_search(job)
    if job.search.like is not None:
        read_warm_start(job)
    source = open_data(job.data, console=console, store=store_for(job.store))
    with (
        scratch_storage(job.run.storage, is_shared=job.run.storage_is_shared, name="plan") as root,
        locked_session(console, lock_uri=join(root, "lock"), what=root) as session,
        connected(verbose=job.run.verbose, stop=session.stop) as resources,
    ):
        scratch_job = replace(job, run=replace(job.run, storage=root, name="plan", plan=False, max_failures=0))
        plan = _Plan(scratch_job, source, session, resources=resources)
        result = plan.result(ready_s=seconds_since(began_at))
    console.line("Plan finished. Nothing was kept.")
    return {**result, "seconds": seconds_since(began_at)}


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """The sample, as trials and finalists train on it."""

    data: SearchData
    """Its training images are repeated."""
    decoding_s: float
    """Decoding of all images."""
    features_s: Mapping[str, float]
    """Features of all images, by the architecture's name."""


class _Plan:
    """One forecast of a search on the connected cluster."""

    def __init__(self, job: SearchJob, source: Source, session: Session, *, resources: Resources) -> None:
        self._session, self._source = session, source
        self._sizes = sizes_of(source.table["split"], job.data)
        job, lines = fit_batches(job, images=self._sizes.train)
        for line in lines:
            session.console.line(line)
        run = Run(join(job.run.storage, "plan"), begun_by=TRIAL_RECORD)
        self._search = Search(job, session, run=run, began_at=time.time())
        self._resources = self._search.enter(resources)
        self._job = self._search.job
        self._search.job = self._small = one_of_each(self._job, batch_of=middle, epochs=EPOCHS)
        self._proposals = dict(enumerate(GridDraw().proposals(self._small)))
        config = job.run
        self._per_finalist = worker_share(self._resources, config)

    def result(self, *, ready_s: float) -> dict[str, Any]:
        """Measures the sample and returns the plan. `ready_s`: the time that listing and connecting took."""
        sample = self._sampled()
        concurrent = concurrent_trials(self._job, self._resources)
        trials, process_s = self._time_trials(sample.data, concurrent=concurrent)
        finalists_s, test_s = self._time_finalists(sample.data, trials)
        costs = Costs(
            start_s=ready_s,
            decoding_s=sample.decoding_s,
            features_s=sample.features_s,
            process_s=process_s,
            trials=trials,
            finalists_s=finalists_s,
            test_s=test_s + process_s,  # the speeds of scoring are measured in a process of their own
        )
        room = self._resources.room(self._per_finalist.cpus, gpus=self._per_finalist.gpus)
        at_once = max(1, room // self._per_finalist.workers)
        steps_per_epoch = max(1, self._sizes.train // smallest_batch(self._small))
        grace_epochs = math.ceil(self._job.search.grace_steps / steps_per_epoch)
        found = forecast(self._job, costs, concurrent=concurrent, at_once=at_once, grace_epochs=grace_epochs)
        self._report(found, costs, concurrent=concurrent)
        return {
            "plan": True,
            "images": self._sizes.images,
            "trials": self._job.search.trials,
            "concurrent_trials": concurrent,
            "finalists": found.finalists,
            "bottleneck": found.bottleneck,
            "expected_s": {name: round(seconds, 1) for name, seconds in found.parts.items()},
            "trials_at_most_s": round(found.trials_at_most_s, 1),
            "networks": [_network(way, costs) for way in trials],
            "expected_seconds": round(found.seconds, 1),
        }

    # --- the sample ---

    def _sampled(self) -> _Sample:
        """Decodes the sample and computes its features."""
        job, root, table = self._job, self._job.run.storage, self._source.table
        specs = [plan_data(self._source, job.data, each.model(), root=root) for each in self._search.architectures]
        by_bytes = max(MIN_SAMPLE, SAMPLE_BYTES // max(listed.plan.spec.image_bytes for listed in specs))
        frozen = any(space.trained != ("all",) for space in job.backbones)
        most = min(by_bytes, MAX_SAMPLE_OF_FEATURES if frozen else MAX_SAMPLE)
        source = taken(self._source, list(spread_rows(len(table), most=most, run_rows=64)))
        decoded, by_key = dict[str, DecodedData](), dict[str, DecodedData]()
        for each in self._search.architectures:
            listed = plan_data(source, job.data, each.model(), root=root)
            key = listed.plan.cache.key
            by_key[key] = by_key.get(key) or decode(listed, job.data, self._session)
            decoded[each.name] = by_key[key]
        core_s = sum(each.core_s for each in by_key.values()) / len(source.table)
        splits = common_splits(list(by_key.values()), sample_splits(next(iter(decoded.values())).index, self._sizes))
        features, features_s = self._features(decoded, splits)
        repeated = replace(splits, train=np.resize(splits.train, self._sizes.train))
        return _Sample(
            data=SearchData(decoded=decoded, features=features, splits=repeated),
            decoding_s=self._sizes.images * core_s / max(1.0, self._resources.cpus),
            features_s=features_s,
        )

    def _features(
        self, decoded: Mapping[str, DecodedData], splits: Splits
    ) -> tuple[dict[str, FeaturePlan], dict[str, float]]:
        """Computes the features of the sample; gives their plans, and how long those of all images take, s."""
        plans, seconds = dict[str, FeaturePlan](), dict[str, float]()
        images = self._sizes.train + self._sizes.validation
        for params in self._proposals.values():
            architecture, trained = _way(params, self._small)
            job = with_absolute_weights(train_job(params, self._small, stage="trial"))
            if architecture in plans or trained == "all" or not self._job.run.feature_cache:
                continue
            plan = plan_job_features(job, decoded[architecture], splits, have=self._resources)
            actors = feature_actors(self._resources, backbone=plan.model.backbone)
            rate = compute_missing(plan, self._session, actors=actors, title=f"features of {architecture}")
            plans[architecture], seconds[architecture] = plan, images / rate if rate else 0.0
        return plans, seconds

    # --- measurements ---

    def _time_trials(self, data: SearchData, *, concurrent: int) -> tuple[dict[Way, TrialCost], float]:
        """Measures a trial of each way; also gives how long a process takes to start, s."""
        config = self._job.run
        task = TrialTask(
            prepared={
                name: Prepared(records=decoded.plan, features=data.features.get(name))
                for name, decoded in data.decoded.items()
            },
            splits=data.splits,
            backend=resolved(self._job),
            cpus=config.cpus_per_trial,
            gpu=bool(config.gpus_per_trial),
        )
        jobs = {
            _way(params, self._small): with_absolute_weights(train_job(params, self._small, stage="trial"))
            for params in self._proposals.values()
        }
        shares = [list(jobs.items())[first::concurrent] for first in range(min(concurrent, len(jobs)))]
        measure = ray.remote(num_cpus=task.cpus, num_gpus=config.gpus_per_trial or 0.0, max_retries=0)(time_trials)
        self._session.console.line(f"measuring {len(jobs)} network(s), {len(shares)} at a time")
        began = time.monotonic()
        futures = [measure.remote(task, each) for each in shares]
        expected_s = USUAL_TIMING_S * len(shares[0])
        timed = wait_for(futures, self._session, title="trials", expected_s=expected_s)
        process_s = time.monotonic() - began - max(times.seconds for times in timed)
        found = {way: times for each in timed for way, times in each.by_way.items()}
        return {way: self._trial_cost(jobs[way], found[way], data) for way in jobs}, process_s

    def _trial_cost(self, job: TrainJob, times: "_Times", data: SearchData) -> TrialCost:
        (phase,) = forecast_phases(
            job, times.epochs[-1:], sizes=self._sizes, validated=_validated(job, times.epochs, data.splits)
        )
        return TrialCost(setup_s=times.setup_s, epoch_s=phase.epoch_s)

    def _time_finalists(self, data: SearchData, trials: Mapping[Way, TrialCost]) -> tuple[dict[Way, float], float]:
        """Measures a finalist for each backbone and way to train it, s; also gives how long the winner's test takes."""
        slowest: dict[tuple[str, str], int] = {}
        for number, params in self._proposals.items():
            key, way = (params["backbone"], _way(params, self._small)[1]), _way(params, self._small)
            known = slowest.get(key)
            if known is None or trials[way].epoch_s > trials[_way(self._proposals[known], self._small)].epoch_s:
                slowest[key] = number
        of_each, tests_s = dict[tuple[str, str], float](), list[float]()
        for key, number in slowest.items():
            cost = trials[_way(self._proposals[number], self._small)]
            of_each[key], test_s = self._time_finalist(number, data, epoch_s=cost.epoch_s)
            tests_s.append(test_s)
        ways = {_way(params, self._small): params["backbone"] for params in self._proposals.values()}
        return {way: of_each[backbone, way[1]] for way, backbone in ways.items()}, float(np.mean(tests_s))

    def _time_finalist(self, number: int, data: SearchData, *, epoch_s: float) -> tuple[float, float]:
        """How long a finalist takes, and how long its test in another run would take, s."""
        params, sizes = self._proposals[number], self._sizes
        task = self._search.finalist_task(
            data,
            Trial(number=number, params=params),
            per_finalist=self._per_finalist,
            board=make_board(),
            validated_only=True,
        )
        steps = sizes.train // task.job.fit.global_batch
        if params[f"{params['backbone']}.trained"] == "all":
            steps = min(steps, max(FIRST_STEPS, round(WANTED_S / epoch_s * steps)))
        else:  # Nobody knows yet how long a step of fine-tuning takes.
            steps = min(steps, FIRST_STEPS)
        job = replace(task.job, run=replace(task.job.run, plan=True))
        future = start_finalist(replace(task, job=job, steps_limit=steps))
        title = f"finalist {_way(params, self._small)[0]}"
        (metrics,) = wait_for([future], self._session, title=title, expected_s=USUAL_TIMING_S)
        times: list[EpochTimes] = metrics["epoch_times"]
        validated = _validated(job, times, data.splits)
        whole = train_job(params, replace(self._small, search=self._job.search), stage="finalist")
        phases = forecast_phases(whole, epochs_of({"epoch_times": times}), sizes=sizes, validated=validated)
        rest_s = metrics["seconds"] - sum(each.train_s + each.validation_s + each.save_s for each in times)
        per_image_s = times[-1].validation_s / validated
        last_s = per_image_s * max(0, sizes.validation - validated)  # the validation of the float32 model
        return sum(phase.seconds for phase in phases) + rest_s + last_s, rest_s + per_image_s * sizes.test

    # --- the report ---

    def _report(self, found: SearchForecast, costs: Costs, *, concurrent: int) -> None:
        line, search = self._session.console.line, self._job.search
        rows = [["network", "trained", "features", "epoch of a trial", "finalist"]]
        for way, cost in costs.trials.items():
            features = costs.features_s.get(way[0]) if way[1] != "all" else None
            cells = [features, cost.epoch_s, costs.finalists_s[way]]
            rows.append([*way, *("" if seconds is None else duration(seconds) for seconds in cells)])
        self._session.console.table(rows)
        for name in ("decoding", "features"):
            if found.parts[name]:
                line(f"{name}: {duration(found.parts[name])}, once")
        at_most = f" (at most {duration(found.trials_at_most_s)}, if none is stopped early)"
        early = at_most if found.trials_at_most_s > found.parts["trials"] else ""
        line(f"trials: {search.trials}, {concurrent} at a time: {duration(found.parts['trials'])}{early}")
        line(f"finalists: {found.finalists}: {duration(found.parts['finalists'])}")
        line(f"bottleneck: {found.bottleneck}")
        line(f"expected: {duration(found.seconds)} from start to end, if all networks are tried alike")


def _way(params: Params, job: SearchJob) -> Way:
    return architecture_of(params, job).name, params[f"{params['backbone']}.trained"]


def _validated(job: TrainJob, epochs: Sequence[EpochTimes], splits: Splits) -> int:
    """How many validation images an epoch had, which a limit of steps limits, too."""
    return min(len(splits.val), epochs[0].steps * job.fit.global_batch)


def _network(way: Way, costs: Costs) -> dict[str, Any]:
    """What one network costs, as JSON values."""
    trial, features_s = costs.trials[way], costs.features_s.get(way[0]) if way[1] != "all" else None
    return {
        "network": way[0],
        "trained": way[1],
        "setup_s": round(trial.setup_s, 2),
        "epoch_s": round(trial.epoch_s, 3),
        "features_s": None if features_s is None else round(features_s, 1),
        "finalist_s": round(costs.finalists_s[way], 1),
    }


# --- the process that measures trials ---


@dataclass(frozen=True, kw_only=True)
class _Times:
    """The epochs of one trial."""

    epochs: Sequence[EpochTimes]
    setup_s: float


@dataclass(frozen=True, kw_only=True)
class _TimedTrials:
    """The trials that a process measured, and how long that took, s."""

    by_way: Mapping[Way, _Times]
    seconds: float


def time_trials(task: TrialTask, jobs: Sequence[tuple[Way, TrainJob]]) -> _TimedTrials:
    """Measures trials in a process like theirs, one after the other."""
    process = _TimedProcess(task)
    began = time.monotonic()
    by_way = {way: process.timed(way[0], job) for way, job in jobs}
    return _TimedTrials(by_way=by_way, seconds=time.monotonic() - began)


class _TimedProcess(TrialProcess):
    """Runs trials for their times, without Ray Tune."""

    def __init__(self, task: TrialTask) -> None:
        self.setup({}, task)

    def timed(self, architecture: str, job: TrainJob) -> _Times:
        """Times a trial with few steps; if these take no time, with more."""
        self._config = {"architecture": architecture, "job": job}
        few = self._run(FIRST_STEPS)
        train_s = few.epochs[-1].train_s
        return few if train_s >= ENOUGH_S else self._run(round(FIRST_STEPS * WANTED_S / max(train_s, 1e-3)))

    def _run(self, steps: int) -> _Times:
        import keras

        from mnist_dist.training.feed import World
        from mnist_dist.training.loop import Trainer

        keras.backend.clear_session()  # frees the previous trial's models
        began, host = time.monotonic(), TimedHost(SilentHost())
        Trainer(replace(self._train_task(), steps_limit=steps), host=host, world=World()).run()
        last = host.epochs[-1]
        setup_s = time.monotonic() - began - EPOCHS * (last.train_s + last.validation_s)
        return _Times(epochs=host.epochs, setup_s=max(0.0, setup_s))
