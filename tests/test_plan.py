"""Plans: the arithmetic, how a sample is taken, and what was expected of small jobs against what they did."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from corpus import manifest_rows
from harness import Recorder, write_spread_bundle
from mnist_dist.scoring.measuring import Probe, measure, sample, settled_images_per_s
from PIL import Image

from mnist_dist.config import (
    DataConfig,
    DecodeConfig,
    FitConfig,
    InputConfig,
    ModelConfig,
    PhasesConfig,
    RunConfig,
    ScoreJob,
    ScoreRunConfig,
    TrainJob,
)
from mnist_dist.console import duration
from mnist_dist.data.images import ImageSpec, Pixels
from mnist_dist.data.sampling import spread_rows
from mnist_dist.engines.engine import Outputs
from mnist_dist.errors import ConfigError, DataError, Interrupted, ResourceError
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.cluster import Resources
from mnist_dist.on_ray.scoring.plan import means_of
from mnist_dist.on_ray.scoring.score import score
from mnist_dist.on_ray.training.plan import sample_splits, sizes_of
from mnist_dist.on_ray.training.train import train
from mnist_dist.scoring.decoding import Threads
from mnist_dist.scoring.planning import Means, Pace, forecast
from mnist_dist.training.checkpoints import Checkpoint, State
from mnist_dist.training.host import Position
from mnist_dist.training.planning import (
    LEAST_CALLS,
    PhasePace,
    Sizes,
    Stopwatch,
    endless,
    forecast_phases,
    overall_images_per_s,
)

FACTOR = 1.5  # between what is expected and what is done
PACE = Pace(
    images=100,
    not_ok=0,
    read_s=0.001,
    decode_s=0.002,
    model_images_per_s=1_000,
    pipeline_images_per_s=400,
    row_s=0.0001,
    row_bytes=50,
    measured_s=10,
    memory_bytes=7,
)
ON_CPUS = Means(actors=3, cores_of_actor=4, gpus_of_actor=0, decode_cores=12, reading_threads=60, decode_in_tasks=False)
ON_GPUS = replace(ON_CPUS, cores_of_actor=1, gpus_of_actor=1, decode_cores=5, reading_threads=85, decode_in_tasks=True)


# --- the arithmetic of scoring ---------------------------------------------------------------------------------------


def test_actors_that_decode_themselves_are_as_fast_as_their_pipelines() -> None:
    found = forecast(PACE, ON_CPUS, images=12_000, start_s=20)
    assert found.images_per_s == 3 * 400
    assert found.decode_images_per_s == 12 / 0.002
    assert found.model_images_per_s == 3 * 1_000
    assert found.bottleneck == "model"
    assert found.balance == pytest.approx(0.5)  # 250 images/s of a core of the model, 500 of one that decodes
    assert found.seconds == pytest.approx(20 + 10 + 1.2)
    assert found.table_bytes == 600_000


@pytest.mark.parametrize(
    ("cores", "rate", "bottleneck"), [(1, 500, "decoding"), (2, 1_000, "decoding"), (5, 1_200, "decoding")]
)
def test_tasks_that_decode_hold_the_actors_up_where_they_are_few(cores: int, rate: float, bottleneck: str) -> None:
    found = forecast(PACE, replace(ON_GPUS, decode_cores=cores), images=1_000, start_s=0)
    assert found.images_per_s == pytest.approx(rate)
    assert found.bottleneck == bottleneck
    assert found.balance == pytest.approx(2)  # cores for each GPU


def test_the_model_is_the_bottleneck_once_enough_cores_decode() -> None:
    found = forecast(PACE, replace(ON_GPUS, decode_cores=7), images=1_000, start_s=0)
    assert found.bottleneck == "model"


def test_slow_storage_is_the_bottleneck_whatever_the_cores_do() -> None:
    found = forecast(replace(PACE, read_s=0.6), ON_CPUS, images=1_000, start_s=0)
    assert found.bottleneck == "reading"
    assert found.images_per_s == pytest.approx(100)


def test_what_decodes_are_the_actors_own_threads_or_tasks_on_the_cores_that_they_leave() -> None:
    have = Resources(by_node=((8.0, 2.0), (8.0, 2.0)))
    here = means_of(Actors(count=2, cpus=6.0, gpus=0, decode_in_tasks=False), have)
    assert (here.decode_cores, here.reading_threads) == (12, 2 * (6 + 16))
    elsewhere = means_of(Actors(count=4, cpus=1.0, gpus=1, decode_in_tasks=True), have)
    assert (elsewhere.decode_cores, elsewhere.reading_threads) == (12, 12 * (1 + 16))


def test_speed_is_counted_once_it_has_settled_and_until_the_work_runs_out() -> None:
    starting = [(10.0, 500), (10.5, 500)]
    settled = [(11.0 + second / 2, 30) for second in range(9)]
    ending = [(16.0, 1), (19.0, 1)]
    assert settled_images_per_s(starting + settled + ending, until=15.5) == pytest.approx(60)
    assert settled_images_per_s([(0.0, 32), (4.0, 32)], until=3.0) == pytest.approx(8)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (42.2, "42 s"), (119, "119 s"), (150, "2.5 min"), (9_000, "2.5 h")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_runs_of_neighbours_from_begin_to_end() -> None:
    rows = spread_rows(10_000, most=96, run_rows=16)
    assert len(rows) == 96
    assert rows[0] == 0
    assert rows[-1] == 9_999
    assert (np.diff(rows.reshape(6, 16), axis=1) == 1).all()
    assert np.diff(rows[::16]).min() > 1_900


@pytest.mark.parametrize(("total", "most"), [(1, 5), (5, 5), (17, 16), (40, 39), (6, 4)])
def test_a_sample_holds_no_row_twice_and_no_more_than_it_may(total: int, most: int) -> None:
    rows = spread_rows(total, most=most)
    assert 0 < len(rows) <= most
    assert len(np.unique(rows)) == len(rows)
    assert rows.max() < total


def test_only_the_begin_of_a_compressed_archive_is_sampled() -> None:
    archives = [None] * 50 + ["a.tgz"] * 900 + ["b.tgz"] * 30
    packing = [None] * 50 + ["stream"] * 930
    uris = [str(number) for number in range(980)]
    rows = sample(manifest_rows(uris, archive=archives, packing=packing), image_bytes=100)
    assert [int(uri) for uri in rows["uri"].to_pylist()] == [*range(50), *range(50, 114), *range(950, 980)]


def test_fewer_images_are_sampled_where_each_is_large() -> None:
    table = manifest_rows([str(number) for number in range(5_000)])
    assert len(sample(table, image_bytes=100)) == 512
    assert len(sample(table, image_bytes=2**20)) == 128
    assert len(sample(table, image_bytes=2**30)) == 16


def test_a_plan_of_images_of_which_none_can_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    spec = ImageSpec(height_px=12, width_px=14, channels=3)
    probe = Probe(
        rows=manifest_rows([str(tmp_path / "text.jpg")] * 3),
        spec=spec,
        decoding=DecodeConfig(),
        threads=Threads(decoding=2),
        decode_elsewhere=False,
    )
    with pytest.raises(ConfigError, match=r"none of 3 sampled images can be used, such as: unsupported"):
        measure(lambda: Sleeper(batch_size=4, seconds=0.0), probe, write=lambda rows, outcomes: len(rows))


class Sleeper:
    """An engine that takes its time for each batch, whatever its size."""

    num_classes, num_features, calls_at_once = 3, 0, 1

    def __init__(self, *, batch_size: int, seconds: float) -> None:
        self.batch_size, self._seconds = batch_size, seconds

    def __call__(self, pixels: Pixels) -> Outputs:
        time.sleep(self._seconds)
        return Outputs(np.full((len(pixels), 3), 1 / 3, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("decode_elsewhere", [False, True])
def test_a_model_that_leaves_the_cores_idle_is_all_that_counts(tmp_path: Path, decode_elsewhere: bool) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "empty.png").touch()
    probe = Probe(
        rows=manifest_rows([str(tmp_path / name) for name in ("red.png", "empty.png", "red.png", "red.png")] * 8),
        spec=ImageSpec(height_px=12, width_px=14, channels=3),
        decoding=DecodeConfig(),
        threads=Threads(decoding=1),
        decode_elsewhere=decode_elsewhere,
    )
    pace = measure(lambda: Sleeper(batch_size=6, seconds=0.06), probe, write=lambda rows, outcomes: 11 * len(rows))
    assert (pace.images, pace.not_ok, pace.row_bytes) == (32, 8, 11)
    # other work on the machine makes it slower, never faster
    assert 60 < pace.model_images_per_s <= 100
    assert 80 < pace.pipeline_images_per_s <= 100 * 4 / 3 * 1.1  # one in four is no work for the model
    assert pace.decode_s < 0.05


# --- the arithmetic of training --------------------------------------------------------------------------------------


class Notes:
    """A host that counts, and whose clock goes on as it is told."""

    def __init__(self, *, stop_at: int | None = None) -> None:
        self.now, self.calls, self.stop_at = 100.0, 0, stop_at

    def clock(self) -> float:
        return self.now

    def progress(self, position: Position) -> bool:
        self.calls += 1
        return self.calls == self.stop_at

    def epoch_ended(self, line: dict[str, Any]) -> None:
        self.now += 0.25

    def save(self, checkpoint: Checkpoint) -> None:
        self.now += 1.5


POSITION = Position(phase="train", epoch=1, epochs=2, step=3, steps=4, loss=1.0, accuracy=0.5, images_per_s=0.0)


def test_a_stopwatch_notes_each_part_of_an_epoch() -> None:
    notes = Notes()
    watch = Stopwatch(notes, seconds=10, clock=notes.clock)
    notes.now += 7
    assert not watch.progress(POSITION)
    notes.now += 2
    watch.progress(POSITION)
    notes.now += 3  # validation
    watch.epoch_ended({})
    watch.save(Checkpoint(state=State(), weights=[], optimizer=[], best=None))
    assert (watch.start_s, watch.validation_s, watch.save_s) == (7, 3, 1.5)
    watch.begin()
    assert watch.validation_s is None


def test_a_stopwatch_stops_after_some_seconds_but_not_before_some_calls() -> None:
    notes = Notes()
    watch = Stopwatch(notes, seconds=10, clock=notes.clock)
    for _ in range(LEAST_CALLS - 1):
        notes.now += 30
        assert not watch.progress(POSITION)
    assert watch.progress(POSITION)
    assert not watch.wished


def test_a_stopwatch_remembers_that_somebody_else_wished_to_stop() -> None:
    notes = Notes(stop_at=2)
    watch = Stopwatch(notes, seconds=10, clock=notes.clock)
    assert [watch.progress(POSITION) for _ in range(3)] == [False, True, True]
    assert watch.wished


def pace_of(name: str, images_per_s: float, **fields: Any) -> PhasePace:
    values = {"start_s": 4.0, "validation_image_s": 0.001, "save_s": 0.5, "measured_s": 11.0, **fields}
    return PhasePace(name=name, images_per_s=images_per_s, **values)


def test_an_epoch_is_its_steps_its_validation_and_its_checkpoint() -> None:
    job = TrainJob(
        phases=PhasesConfig(epochs=(3, 2), learning_rate=(0.1, 0.01), trainable=("head", "all")),
        fit=FitConfig(batch_size=50),
    )
    paces = [pace_of("head", 1_000.0), pace_of("fine-tune", 100.0, validation_image_s=None)]
    head, tuned = forecast_phases(job, paces, sizes=Sizes(train=1_049, validation=200, test=30))
    assert (head.steps, head.epochs) == (20, 3)
    assert head.epoch_s == pytest.approx(1 + 0.2 + 0.5)
    assert head.seconds == pytest.approx(4 + 3 * 1.7)
    assert tuned.epoch_s == pytest.approx(10 + 2 + 0.5)  # validation was not measured: as slow as training
    assert overall_images_per_s([head, tuned]) == pytest.approx(5_000 / (3 + 20))


def test_phases_that_are_measured_end_by_the_clock_alone() -> None:
    job = TrainJob(
        phases=PhasesConfig(epochs=(3, 2), learning_rate=(0.1, 0.01)),
        fit=FitConfig(early_stopping_patience=1, plateau_patience=1),
    )
    phases = endless(job).phases.phases()
    assert [phase.learning_rate for phase in phases] == [0.1, 0.01]
    assert min(phase.epochs for phase in phases) > 1_000
    assert endless(job).fit.early_stopping_patience is None


def test_the_sizes_of_the_splits_are_those_that_the_data_brings_and_the_rest_by_share() -> None:
    job = TrainJob(data=DataConfig(validation_fraction=0.1, test_fraction=0.2))
    assert sizes_of(pa.chunked_array([pa.nulls(1_000, pa.string())]), job) == Sizes(train=700, validation=100, test=200)
    given = pa.chunked_array([["train"] * 800 + ["test"] * 150 + ["val"] * 50])
    assert sizes_of(given, job) == Sizes(train=800, validation=50, test=150)
    assert sizes_of(pa.chunked_array([["train"] * 800 + ["test"] * 150]), job) == Sizes(
        train=720, validation=80, test=150
    )


def test_a_sample_is_split_as_the_whole_is_without_what_cannot_be_used() -> None:
    index = pa.table({"status": ["ok", "empty"] * 50, "error": ["", "no bytes"] * 50})
    splits = sample_splits(index, Sizes(train=800, validation=100, test=100))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (45, 5, 0)
    assert not set(splits.train.tolist()) & set(splits.val.tolist())
    assert (np.concatenate([splits.train, splits.val]) % 2 == 0).all()
    with pytest.raises(ConfigError, match=r"two images that can be used\. Received: 0 of 3 no bytes"):
        sample_splits(
            pa.table({"status": ["empty"] * 3, "error": ["no bytes"] * 3}), Sizes(train=1, validation=1, test=1)
        )


# --- plans and jobs on Ray -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """One Ray for the plans and jobs of this module."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [noise(number, width=14, height=12) for number in range(100)]
    return write_spread_bundle(tmp_path_factory.mktemp("bundle") / "bundle", images=images, seed=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8,000 names of 100 JPEGs that take a core about a millisecond each."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    folder.mkdir()
    for number in range(100):
        first = folder / f"{number:03d}-00.jpg"
        noise(number, width=640, height=480, squares=(60, 80)).save(first)
        for copy in range(1, 80):
            (folder / f"{number:03d}-{copy:02d}.jpg").hardlink_to(first)
    return folder


def noise(seed: int, *, width: int, height: int, squares: tuple[int, int] = (3, 4)) -> Image.Image:
    """Squares of random colours, which no resizing averages out."""
    colours = np.random.default_rng(seed).integers(0, 256, (*squares, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def scoring(bundle: Path, output: Path, images: Path, **fields: Any) -> ScoreJob:
    return ScoreJob(
        bundle=str(bundle), output=str(output), inputs=InputConfig(input=(str(images),)), run=ScoreRunConfig(**fields)
    )


def training(storage: Path, **fields: Any) -> TrainJob:
    """A job on the digits, enlarged so that a step takes a while; 20 s or so."""
    return TrainJob(
        model=ModelConfig(backbone="cnn", image_size_px=24),
        phases=PhasesConfig(epochs=(12, 4), learning_rate=(1e-3, 1e-4), trainable=("all",)),
        fit=FitConfig(batch_size=64, precision="float32"),
        run=RunConfig(storage=str(storage), name="run", **fields),
    )


def assert_expected(rate: float, plans: list[float]) -> None:
    """The job's speed lies within the factor of what was expected right before and right after it: a machine that
    others share is not equally fast all the time."""
    assert min(plans) / FACTOR <= rate <= max(plans) * FACTOR, (rate, plans)


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_scoring_is_as_fast_as_its_plan_said(tmp_path: Path, bundle: Path, photos: Path) -> None:
    plans, said = [], Recorder()
    plan = scoring(bundle, tmp_path / "table", photos, plan=True)
    plans.append(score(plan, console=said))
    assert not (tmp_path / "table").exists()
    done = score(scoring(bundle, tmp_path / "table", photos), console=Recorder())
    names = sorted(path.name for path in (tmp_path / "table").rglob("*"))
    plans.append(score(plan, console=Recorder()))
    assert sorted(path.name for path in (tmp_path / "table").rglob("*")) == names
    assert_expected(done["images_per_s"], [found["expected_images_per_s"] for found in plans])
    first = plans[0]
    assert first["plan"]
    assert (first["images"], first["bottleneck"], first["cpus_per_gpu"]) == (8_000, "decoding", None)
    assert 2e8 < first["actor_memory_bytes"] < 5e9
    size = sum(path.stat().st_size for path in (tmp_path / "table").glob("part-*.parquet"))
    assert size / 2 < first["table_bytes"] < size * 8  # of 100 images in all: larger files of them shrink well
    assert any(line.startswith("bottleneck: decoding") for line in said.lines)
    assert said.lines[-1] == "plan: no image was scored, and nothing written to the output"


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_images_that_tasks_decode_are_planned_too(tmp_path: Path, bundle: Path, photos: Path) -> None:
    job = scoring(bundle, tmp_path / "table", photos, plan=True, decode="tasks", actors=1, cpus_per_actor=1)
    found = score(job, console=Recorder())
    assert found["expected_images_per_s"] == pytest.approx(found["decode_images_per_s_per_core"], rel=0.01)
    assert found["bottleneck"] == "decoding"


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.slow
def test_a_plan_refuses_what_the_job_would_refuse(tmp_path: Path, bundle: Path, photos: Path) -> None:
    with pytest.raises(ResourceError, match=r"Received: actors=9"):
        score(scoring(bundle, tmp_path / "table", photos, plan=True, actors=9), console=Recorder())
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing"):
        score(scoring(bundle, tmp_path / "table", tmp_path / "nothing", plan=True), console=Recorder())


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_a_signal_ends_a_plan_of_scoring(tmp_path: Path, bundle: Path, photos: Path) -> None:
    console = Recorder(at="measuring", then=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped") as raised:
        score(scoring(bundle, tmp_path / "table", photos, plan=True), console=console)
    assert raised.value.exit_code == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_training_is_as_fast_as_its_plan_said(tmp_path: Path) -> None:
    said, plan = Recorder(), training(tmp_path, plan=True)
    plans = [train(plan, recipe="test", console=said)]
    assert list(tmp_path.iterdir()) == []
    done = train(training(tmp_path), recipe="test", console=Recorder())
    plans.append(train(plan, recipe="test", console=Recorder()))
    assert_expected(done["images_per_s"], [found["images_per_s"] for found in plans])
    first = plans[0]
    assert (first["plan"], first["images"], first["bottleneck"]) == (True, 1_797, "training")
    steps = done["train_images"] // 64
    assert [(phase["epochs"], phase["steps"]) for phase in first["phases"]] == [(12, steps), (4, steps)]
    assert first["expected_seconds"] > sum(phase["seconds"] for phase in first["phases"])
    assert 2e8 < first["worker_memory_bytes"] < 5e9
    assert said.lines[-1] == "plan: nothing was kept"


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_decoding_and_features_are_parts_of_a_plan(tmp_path: Path) -> None:
    for number in range(300):
        folder = tmp_path / "data" / f"class-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        noise(number, width=90, height=70).save(folder / f"{number}.jpg")
    job = replace(
        training(tmp_path / "runs", plan=True, workers=2, cpus_per_worker=1),
        data=DataConfig(data=str(tmp_path / "data")),
        model=ModelConfig(backbone="mobilenet_v2", alpha=0.35, image_size_px=32),
        phases=PhasesConfig(epochs=(2,), learning_rate=(1e-3,), trainable=("head",)),
    )
    found = train(job, recipe="test", console=Recorder())
    assert found["workers"] == 2
    assert found["decode_images_per_s_per_core"] > 50
    assert found["features_images_per_s"] > 1
    assert [phase["name"] for phase in found["phases"]] == ["head"]
    assert found["images_per_s"] == pytest.approx(found["phases"][0]["images_per_s"], rel=0.01)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_a_signal_ends_a_plan_of_training(tmp_path: Path) -> None:
    console = Recorder(at="training on", then=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped") as raised:
        train(training(tmp_path, plan=True), recipe="test", console=console)
    assert raised.value.exit_code == 130
    assert list(tmp_path.iterdir()) == []
