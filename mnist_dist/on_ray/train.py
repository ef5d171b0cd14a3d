"""The training job, the driver's side: checks, decoding, splits, Ray Train, the result.

Loads neither TensorFlow nor Keras: a wrong flag is told in a second. `on_ray/worker.py` is the workers' side.

In what order a run goes on: Ray Train's own checkpoint (the group of workers was restarted), else the newest complete
checkpoint of an earlier attempt (the driver was killed), else the start. A finished run is returned at once.
"""

import logging
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from mnist_dist import storage
from mnist_dist.config import TrainJob, require
from mnist_dist.console import Bar, Console, Stop
from mnist_dist.data.images import ImageSpec
from mnist_dist.data.records import RecordPlan, bad_records, fingerprint, plan_records, read_index
from mnist_dist.data.sources import Source, image_spec, open_source
from mnist_dist.data.splits import Splits, assign_splits
from mnist_dist.errors import MnistDistError, TooManyBadImages, WorkersFailed
from mnist_dist.lock import Lock
from mnist_dist.models.backbones import backbone_size_px, check_model, check_size, check_trainable, find_backbone
from mnist_dist.on_ray.backend import TensorflowBackendConfig
from mnist_dist.on_ray.board import make_board
from mnist_dist.on_ray.cluster import Resources, Share, check_storage, connected, share
from mnist_dist.on_ray.messages import WorkerTask
from mnist_dist.on_ray.records import decode_missing
from mnist_dist.training.host import Position
from mnist_dist.training.runs import Run

log = logging.getLogger(__name__)

POLL_S = 0.1
NAMED_BAD_IMAGES = 10
DRY_RUN_IMAGES = 5_000  # enough for each class to be in each split, few enough to decode in seconds


def train(job: TrainJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """Trains a classifier, or goes on with it, or returns what is finished.

    Args:
        job: what to train.
        recipe: the recipe's name; with the settings it names the run where `job.run.name` is None.
        console: what a person sees.

    Returns:
        The result as in the contract: `run_dir`, `bundle`, `recipe`, `backbone`, `test_accuracy` (0-1), `test_loss`
        (mean cross-entropy, nats), `epochs`, `workers`, `images_per_s`, `seconds`, and more.

    Raises:
        ConfigError: a flag, the data, the weights or the cluster do not fit; found before any training.
        TooManyBadImages: more images are unreadable than `max_bad_fraction`.
        TrainingDiverged: the loss is no number.
        WorkersFailed: workers failed more often than `max_failures`.
        Interrupted: a signal; the run is saved.
    """
    if job.run.dry_run:
        return _dry_run(job, recipe=recipe, console=console)
    began_at = time.time()
    check_job(job)
    name = job.run.name or f"{recipe}-{job.settings_hash()}"
    run = Run(storage.join(storage.absolute(job.run.storage), name))
    facts = {"recipe": recipe, "settings": job.settings()}
    finished = run.result()
    if finished is not None:
        run.begin(facts)
        console.line(f"{run.uri} is finished; another --name or --seed trains anew")
        return finished
    data = _list_data(job, console=console)
    storage.check_writable(job.run.storage)
    with Stop(console) as stop, Lock(storage.join(run.uri, "lock"), what=run.uri) as lock:
        training = _Training(job, recipe=recipe, run=run, console=console, stop=stop, began_at=began_at)
        result = training.run_to_end(data, facts)
        lock.check()
        run.finish(result)
    return result


def check_job(job: TrainJob) -> None:
    """Everything that can be checked without data, Ray and TensorFlow.

    Raises:
        ConfigError: of the first thing that does not fit.
    """
    check_storage(job.run.storage, is_shared=job.run.storage_is_shared)
    backbone = check_model(job.model)
    for phase in job.phases.phases():
        check_trainable(backbone, phase.trainable)
    require(
        not (job.fit.tensorboard and storage.is_remote(job.run.storage)),
        "tensorboard needs a local storage",
        storage=job.run.storage,
    )


def _dry_run(job: TrainJob, *, recipe: str, console: Console) -> dict[str, Any]:
    """One step of each phase in a scratch storage that is deleted afterwards."""
    check_job(job)
    storage.check_writable(job.run.storage)
    remote = storage.is_remote(job.run.storage) or job.run.storage_is_shared
    scratch = storage.join(job.run.storage, f"_dry-run-{uuid.uuid4().hex}") if remote else tempfile.mkdtemp()
    began_at = time.time()
    limit = min(job.data.limit or DRY_RUN_IMAGES, max(DRY_RUN_IMAGES, 2 * job.fit.batch_size))
    job = replace(job, run=replace(job.run, storage=scratch, name="dry-run"), data=replace(job.data, limit=limit))
    run = Run(storage.join(storage.absolute(scratch), "dry-run"))
    try:
        with Stop(console) as stop:
            training = _Training(job, recipe=recipe, run=run, console=console, stop=stop, began_at=began_at)
            result = training.run_to_end(_list_data(job, console=console), {})
    finally:
        storage.delete_tree(scratch)
    console.line("dry run: everything fits; nothing was kept")
    return {**result, "run_dir": None, "bundle": None, "dry_run": True}


@dataclass(frozen=True)
class _Data:
    """The job's images as they were listed, and how they will be decoded."""

    source: Source
    plan: RecordPlan


def _list_data(job: TrainJob, *, console: Console) -> _Data:
    """Lists the images and plans their decoding; writes nothing."""
    source = open_source(job.data)
    console.line(f"data: {source.name}, {source.table.num_rows:,} images of {len(source.class_names)} classes")
    backbone = find_backbone(job.model.backbone)
    follows_images = backbone.scratch and job.model.image_size_px is None
    spec = image_spec(
        source, backbone_size_px=backbone_size_px(job.model), scratch_size=follows_images, config=job.data
    )
    if follows_images:
        check_size(backbone, min(spec.height_px, spec.width_px))
    root = storage.absolute(job.run.storage)
    return _Data(source, plan_records(source, spec, storage=root, max_pixels=job.data.max_pixels))


class _Training:
    """One driver's attempt at a run."""

    def __init__(self, job: TrainJob, *, recipe: str, run: Run, console: Console, stop: Stop, began_at: float) -> None:
        self.job, self.recipe, self.run = job, recipe, run
        self.console, self.stop, self.began_at = console, stop, began_at

    def run_to_end(self, data: "_Data", facts: Mapping[str, Any]) -> dict[str, Any]:
        """Decodes what is not decoded, trains, and gives the result."""
        asked, plan = self.job.run, data.plan
        with connected(verbose=asked.verbose) as have:
            self.stop.take_signals()
            mine = share(have, workers=asked.workers, cpus_per_worker=asked.cpus_per_worker, gpu=asked.gpu)
            check_storage(asked.storage, is_shared=asked.storage_is_shared, nodes=have.nodes)
            is_new = self.run.begin({**facts, "records": plan.key})
            with self.console.progress("decoding") as bar:
                decode_missing(plan, data.source, bar=bar, stop=self.stop)
            index = read_index(plan.root)
            splits = self._splits(index, data.source)
            self._say_what_runs(have, mine, spec=plan.spec, is_new=is_new)
            metrics = self._train(plan, splits, fingerprint=fingerprint(index, plan.class_names), mine=mine)
        return self._result(metrics, mine, bad=len(bad_records(index)), splits=splits)

    def _splits(self, index: pa.Table, source: Source) -> Splits:
        """Judges the unreadable images and splits the others."""
        bad = bad_records(index)
        for uri, status, error in bad[:NAMED_BAD_IMAGES]:
            self.console.line(f"skipped {uri}: {status}: {error}")
        if len(bad) > self.job.data.max_bad_fraction * index.num_rows:
            raise TooManyBadImages(
                f"{len(bad):,} of {index.num_rows:,} images are unreadable, such as {bad[0][0]} ({bad[0][1]}: "
                f"{bad[0][2]}); --max-bad-fraction allows {self.job.data.max_bad_fraction:.2%}"
            )
        splits = assign_splits(
            labels=index["label"].to_numpy().astype(np.int32),
            given=index["split"].to_pylist(),
            digests=np.array(index["digest"].to_pylist()).astype(np.bytes_),
            readable=np.array([status == "ok" for status in index["status"].to_pylist()]),
            uris=index["uri"].to_pylist(),
            class_names=source.class_names,
            config=self.job.data,
        )
        if splits.duplicates:
            again, first = splits.duplicate_pairs[0]
            removed = "removed from the earlier one" if splits.dropped else "kept (--drop-duplicates removes them)"
            self.console.line(f"{splits.duplicates} images occur in two splits, such as {again} and {first}: {removed}")
        if len(bad):
            self.console.line(f"{len(bad)} unreadable images are left out")
        require(
            self.job.fit.batch_size <= len(splits.train),
            f"batch_size is at most the number of training images ({len(splits.train):,})",
            batch_size=self.job.fit.batch_size,
        )
        return splits

    def _say_what_runs(self, have: Resources, mine: Share, *, spec: ImageSpec, is_new: bool) -> None:
        model = self.job.model
        self.console.line(
            f"{'training' if is_new else 'going on with'} {self.run.uri}: {model.backbone} (weights {model.weights}) "
            f"on {spec.height_px} x {spec.width_px} x {spec.channels} px, {mine.workers} worker(s) of {mine.cpus:g} CPU"
            f"{' and a GPU' if mine.gpu else ''}, of {have}"
        )

    def _train(self, plan: RecordPlan, splits: Splits, *, fingerprint: str, mine: Share) -> dict[str, Any]:
        """Runs Ray Train in a thread; this one shows progress and takes signals."""
        board = make_board()
        attempt = self.run.next_attempt()
        task = WorkerTask(
            job=self.job,
            records=plan.root,
            splits=splits,
            fingerprint=fingerprint,
            run=self.run.uri,
            checkpoint=self.run.newest_checkpoint(),
            board=board,
            cpus=mine.cpus,
            began_at=self.began_at,
        )
        trainer = DataParallelTrainer(
            _worker_loop,
            backend_config=TensorflowBackendConfig(),
            train_loop_config={"task": task},
            scaling_config=ray.train.ScalingConfig(
                num_workers=mine.workers, use_gpu=mine.gpu, resources_per_worker=_resources(mine)
            ),
            run_config=ray.train.RunConfig(
                name=attempt,
                storage_path=self.run.uri,
                failure_config=ray.train.FailureConfig(max_failures=self.job.run.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            ),
        )
        fit = _Thread(trainer.fit)
        fit.start()
        self._watch(fit, board)
        result = fit.result().return_value
        if result.error is not None:
            raise result.error
        if result.stopped:
            self.stop.check()
        self.run.clear_attempts()
        return dict(result.metrics)

    def _watch(self, fit: "_Thread", board: Any) -> None:
        asked = False
        with self.console.progress("training") as bar:
            while fit.is_alive():
                fit.join(POLL_S)
                if self.stop.signal_number is not None and not asked:
                    ray.get(board.ask_to_stop.remote())
                    asked = True
                self._show(bar, board)
            self._show(bar, board)

    def _show(self, bar: Bar, board: Any) -> None:
        position, epochs = ray.get(board.take.remote())
        for line in epochs:
            self.console.line(
                f"epoch {line['epoch']} ({line['phase']}): loss {line['loss']:.4f}, accuracy {line['accuracy']:.4f}, "
                f"validation loss {line['val_loss']:.4f}, validation accuracy {line['val_accuracy']:.4f}"
            )
        if position is not None:
            bar.update(done=_steps_done(position), total=position.epochs * position.steps, note=_note(position))

    def _result(self, metrics: dict[str, Any], mine: Share, *, bad: int, splits: Splits) -> dict[str, Any]:
        earlier_s = metrics.pop("earlier_s")
        return {
            "run_dir": self.run.uri,
            "bundle": self.run.bundle,
            "recipe": self.recipe,
            "backbone": self.job.model.backbone,
            **metrics,
            "workers": mine.workers,
            "train_images": len(splits.train),
            "validation_images": len(splits.val),
            "test_images": len(splits.test),
            "bad_images": bad,
            "duplicates": splits.duplicates,
            "seconds": round(earlier_s + time.time() - self.began_at, 2),
        }


class _Thread(threading.Thread):
    """Runs Ray Train beside the main thread, which has to stay free for signals."""

    def __init__(self, call: Any) -> None:
        super().__init__(daemon=True, name="ray-train")
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # handed to the main thread by `result`
            self._error = error

    def result(self) -> Any:
        """What the call returned; what it raised, as the errors that a person can read."""
        if self._error is None:
            return self._result
        raise _readable(self._error) from self._error


def _readable(error: BaseException) -> BaseException:
    """The error of ours that Ray wrapped, or WorkersFailed with the first worker's words."""
    failures = getattr(error, "worker_failures", None)
    for rank, cause in sorted(failures.items()) if failures else ():
        found: BaseException | None = cause
        while found is not None:
            if isinstance(found, MnistDistError):
                return found
            found = getattr(found, "cause", None) or found.__cause__
        return WorkersFailed(f"worker {rank} failed: {type(cause).__name__}: {str(cause).strip().splitlines()[0]}")
    return WorkersFailed(f"{type(error).__name__}: {error}")


def _worker_loop(config: dict[str, Any]) -> Any:
    from mnist_dist.on_ray.worker import work  # loads TensorFlow, which the driver never does

    return work(config["task"])


def _resources(mine: Share) -> dict[str, float]:
    return {"CPU": mine.cpus, **({"GPU": 1.0} if mine.gpu else {})}


def _steps_done(position: Position) -> int:
    return (position.epoch - 1) * position.steps + position.step


def _note(position: Position) -> str:
    return (
        f"{position.phase}, epoch {position.epoch} of {position.epochs}, loss {position.loss:.4f}, "
        f"accuracy {position.accuracy:.4f}, {position.images_per_s:,.0f} images/s"
    )
