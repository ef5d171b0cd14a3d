"""A worker's side of the training job: images in, checkpoints and the bundle out.

Ray Train calls `work` in each worker. An error that all workers meet alike (a loss that is not finite) is returned, not
raised: a raised error restarts the group, which would only meet it again. A lack of memory may be that of one worker
alone: it is raised, and the next group finds it on the board and returns it.
"""

import functools
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train import CheckpointUploadMode
from ray.train.collective import barrier, broadcast_from_rank_zero

from mnist_dist import processor
from mnist_dist.data.records import Records, open_records
from mnist_dist.engines.engine import hide_gpus, is_out_of_memory, use_cpus
from mnist_dist.errors import ConfigError, OutOfMemory, TrainingDiverged, first_line
from mnist_dist.models.backbones import is_imported
from mnist_dist.models.bundle import ONNX_FILE
from mnist_dist.models.classifier import Classifier, build_classifier, fetch_published_weights
from mnist_dist.models.history import HISTORY_FILE, Epoch
from mnist_dist.on_ray.data.features import node_folder
from mnist_dist.on_ray.tasks import peak_memory_bytes
from mnist_dist.on_ray.training.board import Poster
from mnist_dist.on_ray.training.bundling import Finished, keep_untested, make_bundle
from mnist_dist.on_ray.training.finished import FinishedModel, JoinedModel, KerasModel
from mnist_dist.on_ray.training.messages import WorkerResult, WorkerTask
from mnist_dist.on_ray.training.tested import predict_test
from mnist_dist.on_ray.training.uploads import Uploads
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join
from mnist_dist.training.callbacks import LogFiles
from mnist_dist.training.checkpoints import STATE_FILE, Checkpoint, read_checkpoint, write_checkpoint
from mnist_dist.training.features import open_features
from mnist_dist.training.feed import Images, World
from mnist_dist.training.host import Measured, MeasuringStopped, Position
from mnist_dist.training.loop import Outcome, Trainer
from mnist_dist.training.phase import TrainTask
from mnist_dist.training.planning import TimedHost
from mnist_dist.training.precision import resolve_precision
from mnist_dist.training.runs import attempt_name

SHOWN_CHARACTERS = 120  # of what TensorFlow or JAX says: then it names devices and allocators


def work(task: WorkerTask) -> WorkerResult:
    """Trains, evaluates and writes the bundle, as one of the workers."""
    if not task.gpu:
        hide_gpus()  # Ray does not hide GPUs from a worker that requested none
    use_cpus(int(task.cpus))
    known = _known_lack_of_memory(task)
    if known is not None:
        return WorkerResult(error=known)
    scratch = Path(tempfile.mkdtemp(prefix="mnist_dist-"))
    try:
        with RayHost(task, scratch) as host, _naming_lack_of_memory():
            return _work(task, host, scratch)
    except TrainingDiverged as error:
        return WorkerResult(error=error)
    except (ConfigError, OutOfMemory) as error:
        if ray.train.get_context().get_world_size() > 1:
            raise  # perhaps only one node lacks a file: if this worker returned, the others would wait forever
        return WorkerResult(error=error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _known_lack_of_memory(task: WorkerTask) -> OutOfMemory | None:
    """Why the workers before these ended, if it was for lack of memory and these would end alike."""
    context, checkpoint = ray.train.get_context(), ray.train.get_checkpoint()
    began = task.board.begin.remote(
        context.get_world_rank(),
        node=ray.util.get_node_ip_address(),
        killed=processor.killed_for_memory(),
        checkpoint=None if checkpoint is None else checkpoint.path,
    )
    ray.get(began)
    if context.get_world_size() > 1:
        barrier()  # All get the same answer.
    known: OutOfMemory | None = ray.get(task.board.out_of_memory.remote())
    return known


@contextmanager
def _naming_lack_of_memory() -> Iterator[None]:
    """Makes the errors that mean out of memory, of whatever library, OutOfMemory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(_words_of(error)) from error
        raise


def _words_of(error: BaseException) -> str:
    """The line of a long message that says what did not fit."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = (line for line in lines if "memory" in line.lower() or "OOM" in line)
    return f"{type(error).__name__}: {next(telling, first_line(error))[:SHOWN_CHARACTERS]}"


class RayHost:
    """The loop's `Host` on Ray Train: checkpoints go to the attempt's folder, beside the training, and progress to the
    board. When the block is left, the last checkpoint is complete."""

    def __init__(self, task: WorkerTask, scratch: Path) -> None:
        self._task, self._scratch = task, scratch
        context = ray.train.get_context()
        self._poster = Poster(task.board) if context.get_world_rank() == 0 else None
        self._uploads = Uploads(functools.partial(_upload, task.run, context.get_storage()))

    def __enter__(self) -> "RayHost":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._poster is not None:
            self._poster.close()
        try:
            self._uploads.wait()
        except BaseException:
            if kind is None:
                raise

    def measured(self, progress: Measured) -> bool:
        return self.progress(progress)

    def progress(self, position: Position | Measured) -> bool:
        if self._poster is None:
            return False
        self._poster.position(position)
        return self._poster.stop

    def epoch_ended(self, epoch: Epoch) -> None:
        if self._poster is not None:
            self._poster.epoch(epoch)

    def save(self, checkpoint: Checkpoint) -> None:
        name = f"checkpoint-{checkpoint.state.global_step:09d}"
        metrics = {"global_step": checkpoint.state.global_step}
        if self._poster is None:
            ray.train.report(metrics, checkpoint_dir_name=name)
            return
        self._uploads.wait()
        self._task.fence.check()
        folder = self._scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_checkpoint(folder, checkpoint)
        with self._uploads.begun():
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint(str(folder)),
                checkpoint_dir_name=name,
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
                checkpoint_upload_fn=lambda local, name: self._uploads.run(Path(local.path), name),
                delete_local_checkpoint_after_upload=False,
            )


def _upload(run: str, storage: Any, folder: Path, name: str) -> ray.train.Checkpoint:
    """Uploads a checkpoint with its completing file last, an order that Ray's own copy does not guarantee."""
    ANYWHERE.upload_folder(folder, join(run, storage.experiment_dir_name, name), last=STATE_FILE)
    return ray.train.Checkpoint(f"{storage.experiment_fs_path}/{name}", filesystem=storage.storage_filesystem)


def _work(task: WorkerTask, host: RayHost, scratch: Path) -> WorkerResult:
    context = ray.train.get_context()
    world = World(rank=context.get_world_rank(), workers=context.get_world_size())
    records = open_records(task.records, local_dir=scratch if task.steps_limit else node_folder())
    if task.job.model.weights == "imagenet":
        fetch_published_weights(task.job.model)
    if world.workers > 1:
        barrier()  # JAX waits only a few minutes for the others' devices, and copying records may take longer.
    timed = TimedHost(host)
    trainer = Trainer(train_task(task, records, is_first=world.rank == 0), host=timed, world=world)
    checkpoint = _last_checkpoint(task, scratch)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    outcome = trainer.run()
    if not outcome.finished:
        return WorkerResult(stopped=True)
    try:
        metrics = _finish(task, trainer, outcome, records, scratch)
    except MeasuringStopped:
        return WorkerResult(stopped=True)
    if task.job.run.plan:
        metrics |= {"epoch_times": timed.epochs, "memory_bytes": peak_memory_bytes()}
    return WorkerResult(metrics=metrics)


def train_task(task: WorkerTask, records: Records, *, is_first: bool) -> TrainTask:
    """Opens the images and features and returns what a worker trains. Only rank 0 logs."""
    job = task.job
    precision = resolve_precision(job.fit.precision, backbone=job.model.backbone, gpu=task.gpu)
    images = Images(
        pixels=records.pixels,
        labels=records.index["label"].to_numpy().astype(np.int32),
        train=task.splits.train,
        validation=task.splits.val,
        test=task.splits.test,
    )
    features, head_alone = None, is_imported(job.model.backbone)
    if task.features is not None:
        features = replace(images, pixels=open_features(task.features, local_dir=node_folder()))
        images = features if head_alone else images
    return TrainTask(
        job=job,
        spec=records.spec,
        class_names=records.class_names,
        label_sets=records.label_sets,
        images=images,
        features=features,
        head_alone=head_alone,
        precision=broadcast_from_rank_zero(precision),
        steps_limit=task.steps_limit,
        files=_log_files(task) if is_first else None,
        began_at=task.began_at,
    )


def _log_files(task: WorkerTask) -> LogFiles:
    tensorboard = Path(task.run) / "tensorboard" if task.job.fit.tensorboard else None
    return LogFiles(history=join(task.run, HISTORY_FILE), check=task.fence.check, tensorboard=tensorboard)


def _last_checkpoint(task: WorkerTask, scratch: Path) -> Checkpoint | None:
    """Ray Train's checkpoint after a restart of the group, else that of an earlier attempt."""
    latest = ray.train.get_checkpoint()
    if latest is not None:
        with latest.as_directory() as folder:
            return read_checkpoint(Path(folder))
    if task.checkpoint is None:
        return None
    folder = scratch / "earlier"
    ANYWHERE.download_folder(task.checkpoint, folder)
    return read_checkpoint(folder)


def _finish(task: WorkerTask, trainer: Trainer, outcome: Outcome, records: Records, scratch: Path) -> dict[str, Any]:
    """Evaluates the float32 model with the best weights, as the bundle stores it; rank 0 writes the bundle."""
    state = outcome.state
    final = _classifier(task, trainer, outcome, records)
    validation = trainer.evaluate(final.network)
    speed = state.timed_images / state.timed_s if state.timed_s else None
    test: dict[str, float] = {}
    if task.keeps_untested and trainer.world.rank == 0 and task.steps_limit is None:
        model = _model(task, trainer, final, records, scratch)
        keep_untested(task, model, records, scratch / "untested", history=state.history, validation=validation)
    if not task.validated_only:
        model = _model(task, trainer, final, records, scratch)
        tested = predict_test(trainer, model, scratch=join(task.run, attempt_name(task.fence.number), "test"))
        test = {f"test_{name}": value for name, value in tested.metrics.items()}
        if trainer.world.rank == 0 and task.steps_limit is None:
            finished = Finished(
                model=model,
                history=state.history,
                validation=validation,
                tested=tested,
                precision=trainer.task.precision,
                workers=trainer.world.workers,
                images_per_s=speed,
                seconds=trainer.earlier_s + time.time() - task.began_at,
            )
            task.fence.check()
            make_bundle(task, finished, records, scratch / "bundle")
    return {
        **test,
        **{f"validation_{name}": value for name, value in validation.items()},
        "best_epoch": state.best.epoch if state.best else None,
        "epochs": state.epochs_done,
        "images_per_s": speed,
        "precision": trainer.task.precision,
        "earlier_s": trainer.earlier_s,
    }


def _classifier(task: WorkerTask, trainer: Trainer, outcome: Outcome, records: Records) -> Classifier:
    """The float32 classifier with the best weights; of an imported backbone, its head."""
    if trainer.task.head_alone:
        final = trainer.built.classifier
    else:
        with trainer.computation.scope():
            final = build_classifier(
                task.job.model,
                spec=records.spec,
                num_classes=len(records.class_names),
                multi_label=task.job.data.has_sets,
                load_weights=False,
            )
    final.network.set_weights(outcome.best)
    return final


def _model(task: WorkerTask, trainer: Trainer, final: Classifier, records: Records, scratch: Path) -> FinishedModel:
    """What is tested and written."""
    if not trainer.task.head_alone:
        return KerasModel(trainer, final)
    return JoinedModel(
        task.job.model.backbone,
        trainer=trainer,
        head=final.head,
        records=records,
        file=scratch / ONNX_FILE,
        cpus=max(1, int(task.cpus)),
    )
