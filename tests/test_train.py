"""The training job on Ray: equality over workers, what survives a kill, what is refused."""

import functools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import ray
from harness import Command, Recorder, largest_difference, private_ray, run_command, train_workers
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss

from mnist_dist import load_bundle
from mnist_dist.config import (
    DataConfig,
    DecodeConfig,
    FitConfig,
    KerasBackend,
    ModelConfig,
    OptimizerConfig,
    PhasesConfig,
    RunConfig,
    TrainJob,
)
from mnist_dist.console import Stop
from mnist_dist.data.records import Records, decode_shard, open_records, plan_records
from mnist_dist.data.splits import assign_splits
from mnist_dist.errors import (
    ConfigError,
    Interrupted,
    ResourceError,
    ResumeConflict,
    ServiceError,
    StorageError,
    TooManyBadImages,
    TrainingDiverged,
    WorkersFailed,
)
from mnist_dist.images.spec import ImageSpec
from mnist_dist.on_ray.data.prepare import list_data
from mnist_dist.on_ray.data.records import decode_missing
from mnist_dist.on_ray.training import attempt
from mnist_dist.on_ray.training.backend import start_worker
from mnist_dist.on_ray.training.train import train
from mnist_dist.session import Session
from mnist_dist.sources.source import open_source
from mnist_dist.training.checkpoints import read_checkpoint
from mnist_dist.training.host import Measured
from mnist_dist.training.runs import Run

pytestmark = pytest.mark.slow  # all of it is on Ray; test_loop trains without

PLAIN_SGD = OptimizerConfig(optimizer="sgd", momentum=0.9)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """One Ray for the module, with more CPUs than the machine may have, so that three workers fit."""
    with private_ray(num_cpus=4):
        yield


def small_job(storage: Path, *, workers: int = 1, epochs: int = 2, name: str = "run", **fields: Any) -> TrainJob:
    """A job on the digits that takes seconds: 25 steps of 50 an epoch."""
    job = TrainJob(
        data=DataConfig(limit=1_600),
        model=ModelConfig(backbone="cnn", dropout=0.0),
        phases=PhasesConfig(epochs=(epochs,), learning_rate=(0.01,)),
        optimizer=PLAIN_SGD,
        fit=FitConfig(batch_size=50, precision="float32"),
        run=RunConfig(storage=str(storage), name=name, workers=workers, cpus_per_worker=1),
    )
    return replace(job, **fields)


def final_weights(storage: Path, name: str = "run") -> list[npt.NDArray[Any]]:
    checkpoint = Run(str(storage / name)).newest_checkpoint()
    assert checkpoint is not None
    return read_checkpoint(Path(checkpoint)).weights


def records_of(job: TrainJob) -> Records:
    listed = list_data(job.data, job.model, root=job.run.storage, console=Recorder())
    return open_records(listed.plan, local_dir=Path(job.run.storage))


def predictions_of_test(storage: Path, bundle: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Labels `[N]` and the bundle's probabilities `[N, K]` of the digits' test split."""
    records = records_of(small_job(storage))
    index = records.index
    labels = index["label"].to_numpy().astype(np.int32)
    splits = assign_splits(
        labels=labels,
        given=index["split"].to_pylist(),
        digests=np.array(index["digest"].to_pylist()).astype(np.bytes_),
        readable=np.ones(len(labels), np.bool_),
        uris=index["uri"].to_pylist(),
        class_names=records.class_names,
        config=DataConfig(),
    )
    probabilities = np.asarray(load_bundle(bundle).model(records.pixels[splits.test]), np.float64)
    return labels[splits.test], probabilities / probabilities.sum(axis=1, keepdims=True)


def on_backend(job: TrainJob, backend: KerasBackend) -> TrainJob:
    return replace(job, run=replace(job.run, backend=backend))


METHODS = (
    {"augmentation": "digits", "random_erasing": 0.3, "mixup": 0.3, "cutmix": 1.0, "sampling": "balanced"},
    {"ema_decay": 0.9, "layer_decay": 0.8, "accumulate": 2},
)


@pytest.mark.parametrize(
    ("methods", "backend"),
    [
        pytest.param(({}, {}), "tensorflow", id="plain-tensorflow", marks=pytest.mark.chaos),
        pytest.param(({}, {}), "jax", id="plain-jax"),
        pytest.param(METHODS, "tensorflow", id="methods-tensorflow"),
        pytest.param(METHODS, "jax", id="methods-jax", marks=pytest.mark.chaos),
    ],
)
def test_1_2_and_3_workers_reach_the_same_weights(
    tmp_path: Path, methods: tuple[dict[str, Any], dict[str, Any]], backend: KerasBackend
) -> None:
    """With seed 0 or 1 the last bit decides a maximum of a pooling layer, and the weights part there: so they do in one
    process whose gradients are summed over two halves of each batch (6e-3 and 9e-5 after 50 steps; seed 2: 3e-7)."""
    results = {}
    for workers in (1, 2, 3):
        fit = FitConfig(batch_size=48 if methods[0] else 50, precision="float32", seed=2, **methods[0])
        job = on_backend(small_job(tmp_path, workers=workers, name=f"w{workers}", fit=fit), backend)
        job = replace(job, optimizer=replace(job.optimizer, **methods[1]))
        results[workers] = train(job, recipe="test", console=Recorder())
    steps = read_checkpoint(Path(Run(str(tmp_path / "w1")).newest_checkpoint() or "")).state.global_step
    assert steps in (50, 52)
    for workers in (2, 3):
        assert largest_difference(final_weights(tmp_path, f"w{workers}"), final_weights(tmp_path, "w1")) <= 1e-5
        assert results[workers]["test_accuracy"] == results[1]["test_accuracy"]
        assert results[workers]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=1e-4)
    labels, probabilities = predictions_of_test(tmp_path, results[3]["bundle"])
    assert results[3]["test_images"] == len(labels)
    assert results[3]["test_loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    assert results[3]["test_accuracy"] == accuracy_score(labels, probabilities.argmax(axis=1))


@pytest.mark.parametrize(
    ("first", "second"), [("jax", "tensorflow"), pytest.param("tensorflow", "jax", marks=pytest.mark.chaos)]
)
def test_a_run_of_one_backend_resumes_on_the_other(tmp_path: Path, first: KerasBackend, second: KerasBackend) -> None:
    """What it computes there: test_jax.py."""
    job = small_job(tmp_path, epochs=SHAKEN_EPOCHS)
    job = replace(job, run=replace(job.run, max_failures=0))
    console = Recorder("epoch 2", lambda: train_workers()[0].kill())
    with pytest.raises(WorkersFailed, match="worker"):
        train(on_backend(job, first), recipe="test", console=console)
    begun = Run(str(tmp_path / "run")).newest_checkpoint()
    assert begun is not None
    history = read_checkpoint(Path(begun)).state.history
    assert 0 < len(history) < SHAKEN_EPOCHS
    train(on_backend(job, second), recipe="test", console=Recorder())
    final = read_checkpoint(Path(Run(str(tmp_path / "run")).newest_checkpoint() or ""))
    assert final.state.history[: len(history)] == history
    assert int(final.optimizer[0]) == final.state.global_step == 25 * SHAKEN_EPOCHS


@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=pytest.mark.chaos)])
def test_batch_norm_of_the_whole_batch_reaches_the_same_weights_on_1_and_3_workers(
    tmp_path: Path, backend: KerasBackend
) -> None:
    for workers in (1, 3):
        job = on_backend(small_job(tmp_path, workers=workers, name=f"w{workers}", epochs=1), backend)
        job = replace(
            job,
            data=DataConfig(limit=620),
            fit=FitConfig(batch_size=48, precision="float32", seed=2),
            model=ModelConfig(backbone="cnn_bn", dropout=0.0),
            optimizer=OptimizerConfig(optimizer="sgd", momentum=0.0),
        )
        train(job, recipe="test", console=Recorder())
    steps = read_checkpoint(Path(Run(str(tmp_path / "w1")).newest_checkpoint() or "")).state.global_step
    assert steps == 10
    assert largest_difference(final_weights(tmp_path, "w3"), final_weights(tmp_path, "w1")) <= 1e-4


SHAKEN_EPOCHS = 14  # what a person sees comes up to a second late: enough of them to be killed in the middle


def shaken_job(storage: Path, name: str) -> TrainJob:
    """Dropout and augmentation on, two workers, two phases."""
    return small_job(
        storage,
        workers=2,
        name=name,
        model=ModelConfig(backbone="cnn", dropout=0.3),
        phases=PhasesConfig(epochs=(4, 10), learning_rate=(1e-3, 5e-4)),
        optimizer=OptimizerConfig(schedule="cosine", warmup_steps=7, clip_norm=1.0),
        fit=FitConfig(batch_size=50, augmentation="digits", precision="float32"),
    )


@functools.cache
def undisturbed_weights(backend: KerasBackend) -> tuple[npt.NDArray[Any], ...]:
    with tempfile.TemporaryDirectory() as storage:
        train(on_backend(shaken_job(Path(storage), "run"), backend), recipe="test", console=Recorder())
        return tuple(final_weights(Path(storage)))


@pytest.fixture
def undisturbed() -> list[npt.NDArray[Any]]:
    return list(undisturbed_weights("tensorflow"))


@pytest.mark.parametrize(
    ("backend", "rank"),
    [
        pytest.param("tensorflow", 0, marks=pytest.mark.chaos),
        pytest.param("tensorflow", 1, marks=pytest.mark.chaos),
        ("jax", 1),
        pytest.param("jax", 0, marks=pytest.mark.chaos),
    ],
)
def test_a_killed_worker_costs_nothing_but_time(tmp_path: Path, backend: KerasBackend, rank: int) -> None:
    def kill() -> None:
        sorted(train_workers(), key=lambda p: p.pid)[rank].kill()

    console = Recorder("epoch 3", kill)
    result = train(on_backend(shaken_job(tmp_path, "run"), backend), recipe="test", console=console)
    assert result["epochs"] == SHAKEN_EPOCHS
    assert largest_difference(final_weights(tmp_path), list(undisturbed_weights(backend))) <= 1e-5


@pytest.mark.chaos  # so does a worker of a run that another backend resumes
def test_workers_that_die_too_often_end_the_job(tmp_path: Path) -> None:
    job = shaken_job(tmp_path, "run")
    console = Recorder("epoch 1", lambda: train_workers()[0].kill())
    with pytest.raises(Exception, match="worker") as caught:
        train(replace(job, run=replace(job.run, max_failures=0)), recipe="test", console=console)
    assert type(caught.value).__name__ == "WorkersFailed"
    assert Run(str(tmp_path / "run")).result() is None


def loop_that_uploads_by(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[dict[str, Any]], Any]:
    """Ray Train's loop with another way to upload checkpoints, which is made of the usual one."""

    def loop(config: dict[str, Any]) -> Any:
        start_worker(config["task"].backend)
        from mnist_dist.on_ray.training import worker

        worker._upload = make(worker._upload)
        return worker.work(config["task"])

    return loop


def dying_once(usual: Callable[..., Any]) -> Callable[..., Any]:
    """Kills the worker once, when half of a checkpoint is uploaded; not the first one."""

    def upload(run: str, storage: Any, folder: Path, name: str) -> Any:
        mark = Path(run) / "died"
        if not mark.exists() and any(Path(run).glob("attempt-*/checkpoint-*/state.json")):
            half = Path(run) / storage.experiment_dir_name / name
            half.mkdir()
            shutil.copy(folder / "weights.npz", half)
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(run, storage, folder, name)

    return upload


def failing(_: Callable[..., Any]) -> Callable[..., Any]:
    """Fails whenever a checkpoint is uploaded."""

    def upload(*_: object) -> Any:
        raise ServiceError("the disk is full")

    return upload


@pytest.fixture
def _by_value() -> Iterator[None]:
    """Functions of this module travel to workers whole, which cannot import it."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.usefixtures("_by_value")
def test_a_worker_killed_in_the_middle_of_an_upload_resumes_from_the_checkpoint_before(
    tmp_path: Path, undisturbed: list[npt.NDArray[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "_worker_loop", loop_that_uploads_by(dying_once))
    result = train(shaken_job(tmp_path, "run"), recipe="test", console=Recorder())
    assert (tmp_path / "run" / "died").exists()
    assert result["epochs"] == SHAKEN_EPOCHS
    assert largest_difference(final_weights(tmp_path), undisturbed) <= 1e-5


@pytest.mark.usefixtures("_by_value")
def test_an_upload_that_fails_ends_the_job_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "_worker_loop", loop_that_uploads_by(failing))
    job = small_job(tmp_path)
    with pytest.raises(ServiceError, match="the disk is full"):
        train(replace(job, run=replace(job.run, max_failures=0)), recipe="test", console=Recorder())
    assert Run(str(tmp_path / "run")).newest_checkpoint() is None
    assert Run(str(tmp_path / "run")).result() is None


def command(storage: Path) -> tuple[str, ...]:
    """`python -m jobs.train` with the settings of `shaken_job`; after `python -m`."""
    settings = (
        "--limit 1600 --dropout 0.3 --epochs 4 10 --learning-rate 1e-3 5e-4 --schedule cosine --warmup-steps 7 "
        "--clip-norm 1.0 --batch-size 50 --augmentation digits --precision float32 --optimizer adam"
    )
    return ("jobs.train", "quickstart", "--storage", str(storage), "--name", "run", *settings.split())


@pytest.mark.chaos  # test_end_to_end kills a driver, too
@pytest.mark.parametrize("at", ["training", "epoch 1", "epoch 4"])
def test_a_killed_driver_is_continued_by_the_same_command(
    tmp_path: Path, undisturbed: list[npt.NDArray[Any]], at: str
) -> None:
    with Command(*command(tmp_path)) as job:
        job.until_line(at)
        job.kill()
    assert job.process.returncode == -signal.SIGKILL
    code, result, err = run_command(*command(tmp_path))
    assert code == 0, err
    assert result["epochs"] == SHAKEN_EPOCHS
    assert largest_difference(final_weights(tmp_path), undisturbed) <= 1e-5


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.chaos), signal.SIGTERM])
def test_a_signal_saves_and_prints_the_command_that_goes_on(
    tmp_path: Path, undisturbed: list[npt.NDArray[Any]], number: signal.Signals
) -> None:
    with Command(*command(tmp_path)) as job:
        job.until_line("epoch 2")
        job.process.send_signal(number)
        code, result, err = job.ended()
    assert code == 128 + number
    assert "-m jobs.train quickstart" in result["error"]
    assert "saving progress" in err
    code, result, err = run_command(*command(tmp_path))
    assert code == 0, err
    assert "Resuming" in err
    assert largest_difference(final_weights(tmp_path), undisturbed) <= 1e-5


def loop_that_measures_until_it_is_stopped(config: dict[str, Any]) -> Any:
    """Ray Train's loop with a finished network that is not measured to the end before somebody asks to stop."""
    start_worker(config["task"].backend)
    from mnist_dist.on_ray.training import worker

    usual = worker.RayHost.measured

    def measured(self: worker.RayHost, progress: Measured) -> bool:
        while not usual(self, progress):
            time.sleep(0.1)
        return True

    worker.RayHost.measured = measured  # type: ignore[method-assign]
    return worker.work(config["task"])


class StoppedAt(Recorder):
    """A console that sends this process SIGTERM when a line holds some words."""

    words = ""

    def line(self, text: str) -> None:
        super().line(text)
        if self.words and self.words in text:
            self.words = ""
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("_by_value")
def test_a_signal_while_the_finished_network_is_measured_ends_the_job_which_is_resumed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, console = small_job(tmp_path), StoppedAt()
    console.words = "measuring on 100 of 160 validation images"
    with monkeypatch.context() as patched:
        patched.setattr(attempt, "_worker_loop", loop_that_measures_until_it_is_stopped)
        with pytest.raises(Interrupted, match="resume"):
            train(job, recipe="test", console=console)
    trained = Run(str(tmp_path / "run")).newest_checkpoint()
    result = train(job, recipe="test", console=Recorder())
    assert Run(str(tmp_path / "run")).newest_checkpoint() == trained
    assert (result["epochs"], result["test_images"]) == (2, 162)


@dataclass(frozen=True)
class Finished:
    """A run that is finished, and what it came to."""

    storage: Path
    job: TrainJob
    result: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    storage = tmp_path_factory.mktemp("finished")
    job = small_job(storage, epochs=1)
    return Finished(storage, job, train(job, recipe="test", console=Recorder()))


def test_a_run_makes_a_bundle_that_plain_keras_loads_and_whose_metrics_are_right(finished: Finished) -> None:
    result = finished.result
    bundle = load_bundle(result["bundle"])
    model = keras.saving.load_model(Path(result["bundle"]) / "model.keras")
    images = records_of(finished.job).pixels[np.arange(7)]
    assert np.allclose(model(images), bundle.model(images))
    assert bundle.info.test["accuracy"] == result["test_accuracy"]
    assert bundle.info.config["fit"]["batch_size"] == 50
    assert (Path(result["bundle"]) / "history.csv").read_text().startswith("epoch,phase,loss,accuracy,val_loss")
    assert {"run_dir", "recipe", "backbone", "test_loss", "epochs", "workers", "images_per_s", "seconds"} <= set(result)


def test_ray_train_starts_no_process_that_has_nothing_to_do(finished: Finished) -> None:
    started = {actor["ActorClassName"] for actor in ray._private.state.actors().values()}
    assert {"TrainController", "RayTrainWorker"} <= started
    assert not started & {"DatasetManager", "PreemptionWatcher"}


def test_a_finished_run_is_returned_at_once(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_dist.on_ray.training.train.connected", None)  # Ray does not start
    assert train(finished.job, recipe="test", console=Recorder()) == finished.result


def test_another_configuration_under_the_name_of_a_run_is_refused(finished: Finished) -> None:
    other = replace(finished.job, fit=replace(finished.job.fit, seed=9))
    with pytest.raises(ResumeConflict, match=r"fit.seed: 9 now, 0 in the run"):
        train(other, recipe="test", console=Recorder())


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    job = small_job(tmp_path / "storage")
    result = train(replace(job, run=replace(job.run, dry_run=True)), recipe="test", console=Recorder())
    assert result["dry_run"]
    assert result["bundle"] is None
    assert not list(tmp_path.rglob("*.arrow"))
    assert not list(tmp_path.rglob("*.json"))


def test_a_loss_that_is_no_number_names_the_step(tmp_path: Path) -> None:
    job = small_job(tmp_path, phases=PhasesConfig(learning_rate=(1e9,)))
    with pytest.raises(TrainingDiverged, match=r"phase 'train', epoch 1, step \d+"):
        train(job, recipe="test", console=Recorder())


def test_more_workers_than_the_cluster_has_are_refused_with_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"1 node\(s\), 4 CPUs, 0 GPUs"):
        train(small_job(tmp_path, workers=5), recipe="test", console=Recorder())


def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        train(small_job(tmp_path / "file"), recipe="test", console=Recorder())


def test_a_batch_above_the_data_is_refused(tmp_path: Path) -> None:
    job = small_job(tmp_path, fit=FitConfig(batch_size=5_000))
    with pytest.raises(ConfigError, match=r"images, about 1,280 of these 1,600 images\. Received: batch_size=5000"):
        train(job, recipe="test", console=Recorder())
    assert not (tmp_path / "run").exists()


def test_weights_of_another_architecture_are_refused_by_the_workers(tmp_path: Path) -> None:
    weights = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)]).save_weights(weights)
    job = small_job(tmp_path, model=ModelConfig(backbone="cnn", weights=str(weights)))
    with pytest.raises(ConfigError, match=str(weights)):
        train(job, recipe="test", console=Recorder())


def test_ones_own_bundle_named_by_a_relative_path_is_the_frozen_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = small_job(Path("runs"), epochs=1, name="base", model=ModelConfig(backbone="conv_base"))
    train(base, recipe="test", console=Recorder())
    model = ModelConfig(backbone="conv_base", weights="runs/base/bundle", hidden_units=17, dropout=0.1)
    phases = PhasesConfig(epochs=(1,), learning_rate=(0.01,), trainable=("head",))
    train(
        replace(base, model=model, phases=phases, run=replace(base.run, name="on")), recipe="test", console=Recorder()
    )
    convolutions = 6  # kernels and biases of three stages
    ours, theirs = final_weights(tmp_path / "runs", "on"), final_weights(tmp_path / "runs", "base")
    assert largest_difference(ours[:convolutions], theirs[:convolutions]) == 0
    assert ours[convolutions].shape[-1] == 17


def test_unreadable_images_are_named_and_too_many_fail_the_job(tmp_path: Path, folder_of_images: Path) -> None:
    (folder_of_images / "a" / "broken.png").write_bytes(b"no image")
    job = small_job(tmp_path, epochs=1, data=DataConfig(data=(str(folder_of_images),)), fit=FitConfig(batch_size=6))
    console = Recorder()
    with pytest.raises(TooManyBadImages, match=r"1 of 41 images are unreadable, such as .*broken.png"):
        train(job, recipe="test", console=console)
    allowed = replace(job, data=replace(job.data, max_bad_fraction=0.1))
    result = train(replace(allowed, run=replace(job.run, name="allowed")), recipe="test", console=console)
    assert result["bad_images"] == 1
    assert any("broken.png" in line for line in console.lines)


def test_images_that_could_not_be_read_are_read_anew_by_the_next_run(tmp_path: Path, folder_of_images: Path) -> None:
    link = folder_of_images / "a" / "elsewhere.png"
    link.symlink_to(tmp_path / "later.png")
    job = small_job(tmp_path, epochs=1, data=DataConfig(data=(str(folder_of_images),)), fit=FitConfig(batch_size=6))
    with pytest.raises(TooManyBadImages, match=r"elsewhere.png \(missing"):
        train(job, recipe="test", console=Recorder())
    shutil.copy(next(folder_of_images.glob("b/*.png")), tmp_path / "later.png")
    assert train(job, recipe="test", console=Recorder())["bad_images"] == 0


def test_images_that_crash_or_hang_their_decoder_are_unreadable_and_the_training_goes_on(
    tmp_path: Path, folder_of_images: Path
) -> None:
    for name, danger in (("x", "crash"), ("y", "hang"), ("z", "memory")):
        pixels = np.random.default_rng(0).integers(0, 255, (10, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder_of_images / "a" / f"{name}.jpg", comment=f"danger:{danger}")
    command = f"jobs.train --data {folder_of_images} --storage {tmp_path / 'runs'} --name run --epochs 1 --batch-size 6"
    flags = "--image-timeout-s 2 --max-bad-fraction 0.1 --max-failures 5"
    crashing = str(Path(__file__).parent / "crashing")
    code, result, err = run_command(*command.split(), *flags.split(), PYTHONPATH=crashing)
    assert code == 0, err
    assert result["bad_images"] == 3
    assert "x.jpg: failed: the decoder crashed (SIGSEGV)" in err
    assert "y.jpg: failed: decoding took longer than 2 s" in err


def test_decoding_with_ray_data_resumes_at_the_missing_shards_and_tells_of_a_failing_storage(
    tmp_path: Path, folder_of_images: Path
) -> None:
    source = open_source(DataConfig(data=(str(folder_of_images),)))
    spec, limits = ImageSpec(height_px=5, width_px=6, channels=3), DecodeConfig(max_pixels=1_000)
    plan = plan_records(source, spec, storage=str(tmp_path), limits=limits)
    plan = replace(plan, cache=replace(plan.cache, min_shard_rows=7))
    decode_shard(plan, 2, source.table.slice(14, 7))
    with Stop(Recorder()) as stop:
        decode_missing(plan, source, Session(console=Recorder(), stop=stop))
    assert open_records(plan, local_dir=tmp_path).pixels.shape == (40, 5, 6, 3)

    broken = replace(plan, cache=replace(plan.cache, storage=str(tmp_path / "file")))
    (tmp_path / "file").write_text("in the way")
    with Stop(Recorder()) as stop, pytest.raises(OSError, match="file"):
        decode_missing(broken, source, Session(console=Recorder(), stop=stop))
