"""The training job, the driver's side: checks, decoding, splits, Ray Train, the result.

Imports neither TensorFlow nor Keras, so a wrong flag is reported within a second. `worker.py` is the workers' side.

A run resumes from Ray Train's own checkpoint if the group of workers was restarted, else from the newest complete
checkpoint of an earlier attempt if the driver was killed, else from the start. A finished run is returned at once.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from mnist_dist.config import DataConfig, KerasBackend, ModelConfig, SharedRunConfig, TrainJob, require
from mnist_dist.console import Console, command_line
from mnist_dist.data.records import RecordPlan
from mnist_dist.data.splits import Splits
from mnist_dist.environment import KERAS_BACKENDS, RAY_ADDRESS
from mnist_dist.errors import OutOfMemory, WorkersFailed
from mnist_dist.images.spec import ImageSpec
from mnist_dist.inventory import RunFacts
from mnist_dist.models.backbones import check_model, check_trainable, find_backbone, is_imported
from mnist_dist.models.bundle import REPORT_FILE, BundleInfo, load_bundle
from mnist_dist.models.weights import NAMED_WEIGHTS, check_published_weights, check_weights
from mnist_dist.on_ray.cluster import (
    Resources,
    Share,
    await_workers,
    check_environment,
    check_storage,
    connected,
    worker_share,
)
from mnist_dist.on_ray.data.features import compute_missing, feature_actors
from mnist_dist.on_ray.data.prepare import (
    DecodedData,
    Listed,
    check_places,
    decode,
    list_data,
    plan_data,
    plan_job_features,
    scratch_storage,
    split,
)
from mnist_dist.on_ray.training.attempt import Attempt, has_died
from mnist_dist.on_ray.training.backend import check_backend, resolve_backend
from mnist_dist.on_ray.training.batch_size import explained, with_found_batch
from mnist_dist.on_ray.training.board import make_board
from mnist_dist.on_ray.training.messages import WorkerTask
from mnist_dist.session import Session, locked_session, seconds_since, started_at
from mnist_dist.sources.places import check_outside
from mnist_dist.sources.source import Source, open_source
from mnist_dist.store.anywhere import ANYWHERE, check_access, store_for
from mnist_dist.store.uris import absolute, is_remote, join
from mnist_dist.training.features import FeaturePlan
from mnist_dist.training.planning import sizes_of
from mnist_dist.training.runs import Run, attempt_name
from mnist_dist.training.trackers import check_trackers
from mnist_dist.training.tracking import Tracking, tracked_job

log = logging.getLogger(__name__)

FEW_STEPS = 100
"""Of a whole training. Then averages of BatchNorm (Keras: 0.99 of the old one is kept in each step) still hold 37 % of
what they began with."""
DRY_RUN_IMAGES = 5_000  # enough for every split to contain every class, few enough to decode in seconds


def train(job: TrainJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """Trains a classifier, resumes a stopped run, or returns the result of a finished one.

    Args:
        job: what to train.
        recipe: the recipe's name. With a hash of the settings it names the run if `job.run.name` is None.
        console: shows progress to the user.

    Returns:
        The result: `run_dir`, `bundle`, `recipe`, `backbone`, `test_accuracy` (0-1), `test_loss`
        (mean cross-entropy, nats), `epochs`, `workers`, `images_per_s`, `seconds`, and more.

    Raises:
        ConfigError: a flag, the data, the weights or the cluster is unsuitable; found before any training.
        TooManyBadImages: the fraction of unreadable images exceeds `max_bad_fraction`.
        TrainingDiverged: the loss is not finite.
        OutOfMemory: a batch does not fit into a worker's memory.
        WorkersFailed: workers failed more often than `max_failures`.
        Interrupted: a signal stopped the run, which is saved.
    """
    require(not job.run.plan, "plan_train makes the plan", plan=True)
    if job.run.dry_run:
        return _dry_run(job, recipe=recipe, console=console)
    began_at = started_at(console)
    check_job(job)
    name = job.run.name or f"{recipe}-{job.settings_hash()}"
    run = Run(join(absolute(job.run.storage), name))
    run.compare(_facts(job, recipe))
    finished = run.result()
    if finished is not None:
        console.line(f"{run.uri} is finished. To train again, choose another --name, --seed or --storage.")
        return finished
    check_ready([job.model], run=job.run, console=console)
    store = store_for(job.store)
    listed = list_data(job.data, job.model, root=job.run.storage, console=console, store=store)
    check_batch(job, listed.source)
    ANYWHERE.check_writable(job.run.storage)
    with locked_session(
        console, lock_uri=run.lock_uri, what=run.uri, wait_s=job.run.lock_wait_s, above=run.max_number
    ) as session:
        finished = run.result()  # another driver may have finished it while this one waited for the lock
        if finished is not None:
            return finished
        training = Training(job, session, recipe=recipe, run=run, began_at=began_at)
        result = training.run_to_end(listed)
        session.confirm_lock()
        run.finish(result)
    return result


def check_job(job: TrainJob) -> None:
    """Checks everything that needs no data, Ray or TensorFlow.

    Raises:
        ConfigError: for the first setting that is wrong.
    """
    check_named_places(job)
    check_storage(job.run.storage, is_shared=job.run.storage_is_shared)
    check_outside(job.run.storage, job.data.data, name="storage")
    backbone = check_model(job.model)
    for phase in job.phases.in_order():
        check_trainable(backbone, phase.trainable)
    if backbone.imported is not None:
        _check_for_imported(job, backbone.imported)
    check_weights(job.model.weights, backbone=job.model.backbone)
    require(
        not (job.fit.tensorboard and is_remote(job.run.storage)),
        "tensorboard needs local storage",
        storage=job.run.storage,
    )


def check_named_places(job: TrainJob) -> None:
    """Checks the form of the places that a job names, and that there are credentials for them.

    Raises:
        StorageError: see `check_access`.
    """
    weights, backbone = job.model.weights, job.model.backbone
    check_access(
        (
            job.run.storage,
            weights if weights not in NAMED_WEIGHTS else None,
            backbone if is_imported(backbone) else None,
        )
    )
    check_access((*job.data.data, job.data.data_dir), store=store_for(job.store))


def check_batch(job: TrainJob, source: Source) -> None:
    """Checks, before Ray starts, that a batch is not larger than the training images will be.

    The splits follow from the pixels, which are not decoded yet; each class is rounded for itself, which this allows
    for.

    Raises:
        ConfigError: it is larger.
    """
    if job.fit.batch_size == "auto":
        return
    expected = sizes_of(source.table["split"], job.data).train
    require(
        job.fit.global_batch <= expected + 2 * len(source.class_names),
        f"batch_size must be at most the number of training images, about {expected:,} of these "
        f"{source.table.num_rows:,} images",
        batch_size=job.fit.global_batch,
    )


def check_devices(
    batch_sizes: Iterable[int], *, backbone: str, backend: KerasBackend, share: Share, parts: int = 1
) -> None:
    """Checks that workers on JAX can share the batches of a network that is trained whole or in part.

    Raises:
        ConfigError: its BatchNorm would count the padding of a batch that the devices cannot divide evenly, or of which
            they cannot take equal parts (`accumulate`).
    """
    devices = share.workers * max(1, share.gpus) * parts
    if backend != "jax" or not find_backbone(backbone).has_batch_norm:
        return
    for size in batch_sizes:
        require(
            size % devices == 0,
            f"batch_size must be a multiple of {devices}, the number of devices"
            f"{f' times accumulate ({parts})' if parts > 1 else ''}, to train {backbone} on JAX: it has BatchNorm",
            batch_size=size,
        )


def check_ready(models: Iterable[ModelConfig], *, run: SharedRunConfig, console: Console) -> None:
    """Checks, before anything is listed, what a training needs of its surroundings.

    On a cluster, the workers' nodes may have published weights and settings of Keras that this machine has not: there,
    each worker checks its own.

    Raises:
        ConfigError: see `check_trackers`, `check_environment` and `check_backend`.
        WeightsError: see `check_published_weights`.
        Interrupted: a signal arrived while a cluster was asked.
    """
    check_trackers(run.tracker)
    is_here = RAY_ADDRESS not in os.environ
    check_backend(run, here=is_here)
    check_environment(console, backends=KERAS_BACKENDS)
    if is_here:
        check_published_weights(models)


def _check_for_imported(job: TrainJob, backbone: BundleInfo) -> None:
    """Checks a job whose backbone is an imported bundle, which sees each image once, fitted as the bundle says."""
    spec, fit = backbone.spec, job.fit
    require(
        not fit.changes_images,
        "augmentation needs a backbone that Keras can run; an imported one computes the features of each image once",
        augmentation=fit.augmentation,
        random_erasing=fit.random_erasing,
        mixup=fit.mixup,
        cutmix=fit.cutmix,
    )
    require(
        job.run.feature_cache,
        "an imported backbone needs the feature cache: leave out --no-feature-cache",
        feature_cache=False,
    )
    require(
        fit.precision != "bfloat16",
        "an imported backbone computes in float32: leave out --precision",
        precision="bfloat16",
    )
    require(
        job.data.resize in (DataConfig.resize, spec.resize),
        f"images are fitted as the bundle of the backbone says ({spec.resize}): leave out --resize",
        resize=job.data.resize,
    )
    require(
        job.data.channels in ("auto", str(spec.channels)),
        f"this imported backbone takes images of {spec.channels} channel(s)",
        channels=job.data.channels,
    )
    _ = load_bundle(job.model.backbone).num_features  # Raises for a bundle that gives none.


def random_backbone_warning(job: TrainJob) -> str | None:
    """What to say where a head is trained on a backbone that has learnt nothing; None: nothing."""
    model, frozen = job.model, [phase.name for phase in job.phases.in_order() if phase.trainable == "head"]
    if not frozen or model.weights != "none" or is_imported(model.backbone):
        return None
    return (
        f"warning: {model.backbone} begins with random weights (--weights none), and phase {frozen[0]} trains a head "
        "alone on it, which learns little: give --weights, or train the whole network (--trainable all), best a small "
        "one (--backbone cnn)"
    )


def few_steps_warning(job: TrainJob, *, images: int) -> str | None:
    """What to say where so few steps are planned that a network can hardly learn; None: nothing.

    Args:
        job: the job, with its batch size known.
        images: the number of training images.
    """
    epochs = sum(phase.epochs for phase in job.phases.in_order())
    steps = epochs * (images // job.fit.global_batch)
    if steps >= FEW_STEPS:
        return None
    return (
        f"warning: {images:,} training images in batches of {job.fit.global_batch:,} make {steps:,} steps in {epochs} "
        "epochs, too few for most networks to learn anything: take a smaller --batch-size, more --epochs or more images"
    )


def needs_features(job: TrainJob) -> bool:
    """Whether the features of a frozen backbone are computed before the training; of an imported one, always."""
    return job.uses_features or is_imported(job.model.backbone)


def _few(decoded: DecodedData, data: DataConfig, *, console: Console, images: int) -> Splits:
    """The splits with at most so many images each, for a dry run that needs their features."""
    splits = split(decoded, data, console=console)
    return replace(splits, train=splits.train[:images], val=splits.val[:images], test=splits.test[:images])


def _dry_run(job: TrainJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """Runs one step of each phase in scratch storage, which is deleted afterwards."""
    check_job(job)
    check_ready([job.model], run=job.run, console=console)
    ANYWHERE.check_writable(job.run.storage)
    began_at = started_at(console)
    with scratch_storage(job.run.storage, is_shared=job.run.storage_is_shared, name="dry-run") as scratch:
        run = Run(join(scratch, "dry-run"))
        with locked_session(console, lock_uri=run.lock_uri, what=run.uri) as session:
            job = _in_small(with_batch_of_run(job, root=scratch, session=session), storage=scratch)
            few = partial(_few, images=job.fit.global_batch)
            training = Training(
                job,
                session,
                recipe=recipe,
                run=run,
                began_at=began_at,
                steps_limit=1,
                split=few if needs_features(job) else split,
            )
            store = store_for(job.store)
            listed = list_data(job.data, job.model, root=scratch, console=console, store=store)
            result = training.run_to_end(listed)
    console.line("Dry run: every step works. Nothing was kept.")
    return {**result, "run_dir": None, "bundle": None, "report": None, "dry_run": True}


def _in_small(job: TrainJob, *, storage: str) -> TrainJob:
    """A dry run: one epoch of each phase, on images for a few batches."""
    max_images = max(DRY_RUN_IMAGES, 2 * job.fit.global_batch)
    return replace(
        job,
        run=replace(job.run, storage=storage, name="dry-run"),
        data=replace(job.data, limit=min(job.data.limit, max_images) if job.data.limit else max_images),
        phases=replace(job.phases, epochs=(1,)),
    )


def with_batch_of_run(job: TrainJob, *, root: str, session: Session, listed: Listed | None = None) -> TrainJob:
    """The job with the batch that the run would find, for a dry run or a plan.

    Args:
        job: the job with all its data.
        root: the scratch storage.
        session: of the job.
        listed: its images; None: they are listed here.

    Raises:
        OutOfMemory: see `with_found_batch`.
    """
    if job.fit.batch_size != "auto":
        return job
    if listed is None:
        listed = plan_data(open_source(job.data, store=store_for(job.store)), job.data, job.model, root=root)
    of_run = replace(job, run=replace(job.run, dry_run=False, plan=False))
    with connected(verbose=job.run.verbose, stop=session.stop) as resources:
        share = worker_share(await_workers(resources, job.run, session), job.run)
        return replace(job, fit=with_found_batch(of_run, listed, share=share, session=session).fit)


def _facts(job: TrainJob, recipe: str) -> RunFacts:
    features = job.run.feature_type if job.uses_features else None
    return RunFacts(recipe=recipe, settings=job.settings(), features=features)


class Training:
    """One driver's attempt at a run.

    Args:
        job: what to train.
        session: the job's session, which holds its lock.
        recipe: the recipe's name.
        run: the folder that keeps everything.
        began_at: when the driver started, s since the Unix epoch.
        steps_limit: see `WorkerTask`.
        split: the function that splits the decoded images.
    """

    def __init__(
        self,
        job: TrainJob,
        session: Session,
        *,
        recipe: str,
        run: Run,
        began_at: float,
        steps_limit: int | None = None,
        split: Callable[..., Splits] = split,
    ) -> None:
        self.job, self.session, self.recipe, self.run, self.began_at = job, session, recipe, run, began_at
        self.steps_limit, self._split = steps_limit, split
        self.decode_core_s = self.prepared_s = 0.0  # core-seconds of decoding; s for decoding and features
        self.features_images_per_s: float | None = None
        self.has_gpus = False

    def run_to_end(self, listed: Listed) -> dict[str, Any]:
        """Decodes the images that are not decoded yet, trains, and returns the result."""
        config, plan = self.job.run, listed.plan
        with connected(verbose=config.verbose, stop=self.session.stop) as resources:
            resources = await_workers(resources, config, self.session)
            mine = worker_share(resources, config)
            self._fix_backend(mine)
            check_places(
                listed,
                self.job.data,
                root=config.storage,
                is_shared=config.storage_is_shared,
                nodes=resources.nodes,
            )
            self._check_batch(mine)
            facts = replace(_facts(self.job, self.recipe), records=plan.cache.key)
            is_new = self.run.begin(facts, fence=self.session.fence.number)
            self._fix_batch(listed, mine)
            began = time.monotonic()
            decoded = decode(listed, self.job.data, self.session)
            self.decode_core_s, self.has_gpus = decoded.core_s, mine.gpus > 0
            splits = self._split(decoded, self.job.data, console=self.session.console)
            require(
                self.job.fit.global_batch <= len(splits.train),
                f"batch_size must be at most the number of training images ({len(splits.train):,})",
                batch_size=self.job.fit.global_batch,
            )
            self._announce(resources, mine, spec=plan.spec, is_new=is_new)
            features = None
            if needs_features(self.job):
                job = with_absolute_weights(self.job)
                features = plan_job_features(job, decoded, splits, have=resources)
                self.features_images_per_s = compute_missing(
                    features, self.session, actors=feature_actors(resources, backbone=job.model.backbone)
                )
            self.prepared_s = time.monotonic() - began
            with self._tracking() as tracking:
                metrics = self.train_on(splits, features, records=plan, fingerprint=decoded.fingerprint, mine=mine)
                tracking.finish(metrics, bundle=self.run.bundle)
        return self._result(metrics, mine, bad=decoded.bad, splits=splits)

    def _tracking(self) -> Tracking:
        """Logs the run where the job says; a dry run or a plan nowhere."""
        names = self.job.run.tracker if self.steps_limit is None else ()
        name = self.run.uri.rpartition("/")[2]
        return Tracking(tracked_job(self.job, self.run, recipe=self.recipe, name=name), names, self.session)

    def _fix_backend(self, mine: Share) -> None:
        """Resolves the backend."""
        backend = resolve_backend(self.job.run.backend, gpus=mine.gpus, session=self.session)
        self.job = replace(self.job, run=replace(self.job.run, backend=backend))

    def _fix_batch(self, listed: Listed, mine: Share) -> None:
        """Replaces `--batch-size auto` by the number that was written down for this run, or else finds it and writes it
        down.

        Raises:
            ConfigError: the workers cannot share such a batch; a resumed run may have others.
            OutOfMemory: not even the smallest batch fits.
        """
        if self.job.fit.batch_size != "auto":
            return
        known = self.run.found_batch()
        if known is None:
            self.job = with_found_batch(self.job, listed, share=mine, session=self.session)
            self.session.confirm_lock()
            self.run.keep_batch(self.job.fit.global_batch)
        else:
            self.session.console.line(f"batch size {known:,}, as found when the run began")
            self.job = replace(self.job, fit=replace(self.job.fit, batch_size=known))
        self._check_batch(mine)

    def _check_batch(self, mine: Share) -> None:
        """Checks that the workers can share a batch, if its size is known yet.

        Raises:
            ConfigError: they cannot.
        """
        job = self.job
        if job.fit.batch_size == "auto":
            return
        require(
            mine.workers <= job.fit.batch_size,
            "batch_size must be at least the number of workers",
            batch_size=job.fit.batch_size,
            workers=mine.workers,
        )
        job.check_parts(mine.workers)
        is_trained = any(phase.trainable != "head" for phase in job.phases.in_order())
        if is_trained and job.run.backend != "auto":
            check_devices(
                [job.fit.batch_size],
                backbone=job.model.backbone,
                backend=job.run.backend,
                share=mine,
                parts=job.optimizer.accumulate,
            )

    def _announce(self, resources: Resources, mine: Share, *, spec: ImageSpec, is_new: bool) -> None:
        model, size = self.job.model, f"{spec.height_px} x {spec.width_px} x {spec.channels} px"
        self.session.console.line(
            f"{'Training' if is_new else 'Resuming'} {self.run.uri}: {model.backbone} (weights {model.weights}) "
            f"on images of {size}, {mine.workers} worker(s) of {mine.cpus:g} CPU"
            f"{mine.shown_gpus}, of {resources}; {self.job.phases.total()}"
        )
        warning = random_backbone_warning(self.job)
        if warning is not None:
            self.session.console.line(warning)

    def train_on(
        self,
        splits: Splits,
        features: FeaturePlan | None,
        *,
        records: RecordPlan,
        fingerprint: str,
        mine: Share,
        board: Any = None,
        command: str | None = None,
        title: str | None = None,
        validated_only: bool = False,
        keeps_untested: bool = False,
    ) -> dict[str, Any]:
        """Runs the workers and returns their metrics.

        Args:
            splits: the images of each split.
            features: computed features, or None to compute them in each step.
            records: the plan of the decoded records.
            fingerprint: identifies the images.
            mine: the number of workers and the resources of each.
            board: a board that the caller watches, too. None creates one.
            command: the command as typed, if it was typed in another process.
            title: see `WorkerTask`.
            validated_only: skip the test and the bundle; another call makes them.
            keeps_untested: see `WorkerTask`.
        """
        warning = few_steps_warning(self.job, images=len(splits.train))
        if warning is not None and self.steps_limit is None:
            self.session.console.line(warning)
        self.run.clear_attempts(
            fence=self.session.fence.number
        )  # killed drivers leave old checkpoints; only the newest is needed
        task = WorkerTask(
            job=with_absolute_weights(self.job),
            records=records,
            splits=splits,
            features=features,
            fingerprint=fingerprint,
            run=self.run.uri,
            fence=self.session.fence,
            checkpoint=self.run.newest_checkpoint(),
            board=board or make_board(),
            backend=resolve_backend(self.job.run.backend, gpus=mine.gpus, session=self.session),
            cpus=mine.cpus,
            gpu=mine.gpus > 0,
            began_at=self.began_at,
            command=command or command_line(),
            title=title,
            steps_limit=self.steps_limit,
            validated_only=validated_only,
            keeps_untested=keeps_untested,
        )
        attempt = Attempt(task, name=attempt_name(self.session.fence.number), share=mine)
        try:
            result = attempt.run_to_end(self.session)
            if result.error is not None:
                raise result.error
        except (OutOfMemory, WorkersFailed) as error:
            if isinstance(error, OutOfMemory) or has_died(error):
                raise explained(error, self.job, records, share=mine, session=self.session) from error
            raise
        if result.metrics is None:  # stopped after saving
            self.session.check()
            raise WorkersFailed("The workers stopped although nobody asked them to. Run the same command to resume.")
        self.session.confirm_lock()
        self.run.clear_attempts(fence=self.session.fence.number)
        return dict(result.metrics)

    def _result(self, metrics: dict[str, Any], mine: Share, *, bad: int, splits: Splits) -> dict[str, Any]:
        earlier_s = metrics.pop("earlier_s")
        return {
            "run_dir": self.run.uri,
            "bundle": self.run.bundle,
            "report": join(self.run.bundle, REPORT_FILE),
            "recipe": self.recipe,
            "backbone": self.job.model.backbone,
            **metrics,
            "batch_size": self.job.fit.global_batch,
            "workers": mine.workers,
            "train_images": len(splits.train),
            "validation_images": len(splits.val),
            "test_images": len(splits.test),
            "bad_images": bad,
            "duplicates": splits.duplicates,
            "near_duplicates": splits.near_duplicates,
            "seconds": round(earlier_s + seconds_since(self.began_at), 2),
        }


def with_absolute_weights(job: TrainJob) -> TrainJob:
    """The job for workers, whose working directories differ. The run itself records weights and backbone as typed."""
    weights, backbone = job.model.weights, job.model.backbone
    if weights not in NAMED_WEIGHTS:
        weights = absolute(weights)
    if is_imported(backbone):
        backbone = absolute(backbone)
    return replace(job, model=replace(job.model, weights=weights, backbone=backbone))
