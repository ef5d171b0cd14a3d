"""Plans: the arithmetic, how a sample is taken, and real plans of small jobs."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from corpus import manifest_rows
from harness import Recorder, an_epoch, private_ray, write_spread_bundle
from PIL import Image

from mnist_dist.config import DataConfig, FitConfig, ModelConfig, PhasesConfig, RunConfig, TrainJob
from mnist_dist.console import duration
from mnist_dist.data.decoding import Times
from mnist_dist.data.sampling import spread_rows
from mnist_dist.errors import ConfigError, DataError, Interrupted, ResourceError
from mnist_dist.models.history import Epoch
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.cluster import Resources
from mnist_dist.on_ray.scoring.plan import plan_score
from mnist_dist.on_ray.scoring.score import score
from mnist_dist.on_ray.scoring.stages import means_of
from mnist_dist.on_ray.training.plan import plan_train, sample_splits
from mnist_dist.on_ray.training.train import train
from mnist_dist.score_config import InputConfig, ScoreJob, ScoreRunConfig
from mnist_dist.scoring.planning import Means, SampleRun, forecast, sample
from mnist_dist.training.checkpoints import Checkpoint, State
from mnist_dist.training.host import Measured, Position
from mnist_dist.training.planning import (
    EpochTimes,
    Sizes,
    TimedHost,
    forecast_phases,
    overall_images_per_s,
    sizes_of,
)

FACTOR = 1.5  # between what is expected and what is done
RUN = SampleRun(
    images=100,
    ok=90,
    images_per_s=400,
    start_s=20,
    commit_s=0.1,
    table_bytes=5_000,
    times=Times(read_s=0.1, decode_s=0.3, decode_cpu_s=0.2, model_s=0.09),
)
MEANS = Means(actors=3, units=4, decode_cores=12, reading_threads=60)


# --- the arithmetic of scoring ---------------------------------------------------------------------------------------


def test_a_job_goes_on_as_its_sample_went() -> None:
    found = forecast(RUN, MEANS, images=12_000)
    assert found.decode_images_per_s_per_core == pytest.approx(500)
    assert found.model_images_per_s == pytest.approx(3 * 1_000)
    assert found.balance == pytest.approx(0.5)  # 250 images/s of a core of the model, 500 of one that decodes
    assert found.seconds == pytest.approx(20 + 30 + 12)
    assert found.table_bytes == 600_000


@pytest.mark.parametrize(
    ("times", "bottleneck"),
    [({}, "model"), ({"decode_cpu_s": 0.4}, "decoding"), ({"read_s": 60.0}, "reading")],
)
def test_the_bottleneck_is_what_was_busy_longest(times: dict[str, float], bottleneck: str) -> None:
    assert forecast(replace(RUN, times=replace(RUN.times, **times)), MEANS, images=1_000).bottleneck == bottleneck


def test_what_decodes_are_the_actors_own_threads_or_tasks_on_the_cores_that_they_leave() -> None:
    have = Resources(by_node=((8.0, 2.0), (8.0, 2.0)))
    here = means_of(Actors(count=2, cpus=6.0, gpus=0, decode_in_tasks=False), have)
    assert (here.units, here.decode_cores, here.reading_threads) == (6, 12, 2 * (6 + 16))
    elsewhere = means_of(Actors(count=4, cpus=1.0, gpus=1, decode_in_tasks=True), have)
    assert (elsewhere.units, elsewhere.decode_cores, elsewhere.reading_threads) == (1, 12, 12 * (1 + 16))


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
    rows = sample(manifest_rows(uris, archive=archives, packing=packing), images=2_000)
    assert [int(uri) for uri in rows["uri"].to_pylist()] == [*range(50), *range(50, 306), *range(950, 980)]


# --- the arithmetic of training --------------------------------------------------------------------------------------


class Notes:
    """A host that is slow, by a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0

    def progress(self, position: Position) -> bool:
        return position.step == 3

    def epoch_ended(self, epoch: Epoch) -> None:
        self.now += 0.25

    def measured(self, progress: Measured) -> bool:
        return progress.split == "test"

    def save(self, checkpoint: Checkpoint) -> None:
        self.now += 1.5


def test_each_part_of_an_epoch_is_noted() -> None:
    notes = Notes()
    timed = TimedHost(notes, clock=lambda: notes.now)
    position = Position(phase="head", epoch=1, epochs=2, step=3, steps=4, loss=1.0, accuracy=0.5, images_per_s=0.0)
    for trained_s in (7.0, 2.0):
        notes.now += trained_s
        assert timed.progress(position)
        assert not timed.progress(replace(position, step=4))
        notes.now += 3  # validation
        timed.epoch_ended(an_epoch(1, phase="head"))
        timed.save(Checkpoint(state=State(), weights=[], optimizer=[], best=None))
    expected = EpochTimes(phase="head", steps=4, train_s=7.0, validation_s=3.0, save_s=1.5)
    assert timed.epochs == [expected, replace(expected, train_s=2.0)]
    assert timed.measured(Measured(split="test", done=3, images=4))


def test_an_epoch_is_its_steps_its_validation_and_its_checkpoint() -> None:
    job = TrainJob(
        phases=PhasesConfig(epochs=(3, 2), learning_rate=(0.1, 0.01), trainable=("head", "all")),
        fit=FitConfig(batch_size=50),
    )
    epochs = [EpochTimes(phase="head", steps=4, train_s=0.2, validation_s=0.1, save_s=0.5)]
    epochs.append(EpochTimes(phase="fine-tune", steps=4, train_s=2.0, validation_s=1.0))
    sizes = Sizes(train=1_049, validation=200, test=30)
    head, tuned = forecast_phases(job, epochs, sizes=sizes, validated=100)
    assert (head.steps, head.epochs) == (20, 3)
    assert head.epoch_s == pytest.approx(1 + 0.2 + 0.5)
    assert head.seconds == pytest.approx(3 * 1.7)
    assert tuned.epoch_s == pytest.approx(10 + 2)
    assert overall_images_per_s([head, tuned]) == pytest.approx(5_000 / (3 + 20))


def test_the_sizes_of_the_splits_are_those_that_the_data_brings_and_the_rest_by_share() -> None:
    job = TrainJob(data=DataConfig(validation_fraction=0.1, test_fraction=0.2))
    assert sizes_of(pa.chunked_array([pa.nulls(1_000, pa.string())]), job.data) == Sizes(
        train=700, validation=100, test=200
    )
    given = pa.chunked_array([["train"] * 800 + ["test"] * 150 + ["val"] * 50])
    assert sizes_of(given, job.data) == Sizes(train=800, validation=50, test=150)
    assert sizes_of(pa.chunked_array([["train"] * 800 + ["test"] * 150]), job.data) == Sizes(
        train=720, validation=80, test=150
    )


def test_a_sample_is_split_as_the_whole_is_without_what_cannot_be_used() -> None:
    index = pa.table({"status": ["ok", "empty"] * 50, "error": ["", "no bytes"] * 50})
    splits = sample_splits(index, Sizes(train=800, validation=120, test=80))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (40, 6, 4)
    assert sorted([*splits.train, *splits.val, *splits.test]) == list(range(0, 100, 2))
    with pytest.raises(ConfigError, match=r"three usable images\. Received: 1 of 2 no bytes"):
        sample_splits(index.slice(0, 2), Sizes(train=800, validation=120, test=80))


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """One Ray for the plans and jobs of this module."""
    with private_ray(num_cpus=2):
        yield


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
    """A job on the digits, enlarged so that a step takes a while."""
    return TrainJob(
        model=ModelConfig(backbone="cnn", image_size_px=24),
        phases=PhasesConfig(epochs=(12, 4), learning_rate=(1e-3, 1e-4), trainable=("all",)),
        fit=FitConfig(batch_size=64, precision="float32"),
        run=RunConfig(storage=str(storage), name="run", **fields),
    )


def embedded() -> Recorder:
    """The console of a job in a process that is older than it."""
    said = Recorder()
    said.embedded = True
    return said


def assert_expected(seconds: float, expected_s: float) -> None:
    assert expected_s / FACTOR <= seconds <= expected_s * FACTOR, (seconds, expected_s)


@pytest.mark.usefixtures("two_cpus")
def test_a_plan_of_scoring_says_what_it_would_take_and_leaves_the_output_alone(
    tmp_path: Path, bundle: Path, photos: Path
) -> None:
    said = Recorder()
    found = plan_score(scoring(bundle, tmp_path / "table", photos, plan=True), console=said)
    assert list(tmp_path.iterdir()) == []
    assert (found["plan"], found["images"], found["cpus_per_gpu"]) == (True, 8_000, None)
    assert found["bottleneck"] in ("decoding", "model", "reading")
    assert 0 < 8_000 / found["expected_images_per_s"] < found["expected_seconds"]
    assert 2e8 < found["actor_memory_bytes"] < 5e9
    assert any(line.startswith(f"bottleneck: {found['bottleneck']}") for line in said.lines)
    assert said.lines[-1] == "plan: nothing was written to the output"


@pytest.mark.usefixtures("two_cpus")
def test_a_plan_of_training_says_what_it_would_take_and_keeps_nothing(tmp_path: Path) -> None:
    said = Recorder()
    found = plan_train(training(tmp_path, plan=True), recipe="test", console=said)
    assert list(tmp_path.iterdir()) == []
    assert (found["plan"], found["images"], found["bottleneck"]) == (True, 1_797, "training")
    assert [phase["epochs"] for phase in found["phases"]] == [12, 4]
    assert found["expected_seconds"] > sum(phase["seconds"] for phase in found["phases"])
    assert 2e8 < found["worker_memory_bytes"] < 5e9
    assert said.lines[-1] == "Plan finished. Nothing was kept."


@pytest.mark.chaos  # a machine that is busy for a while makes one of the two slower
@pytest.mark.usefixtures("two_cpus")
def test_scoring_takes_as_long_as_its_plan_said(tmp_path: Path, bundle: Path, photos: Path) -> None:
    plan = plan_score(scoring(bundle, tmp_path / "table", photos, plan=True), console=embedded())
    done = score(scoring(bundle, tmp_path / "table", photos), console=embedded())
    assert_expected(done["seconds"], plan["expected_seconds"])


@pytest.mark.chaos
@pytest.mark.usefixtures("two_cpus")
def test_a_plan_leaves_a_table_alone_also_where_tasks_decode(tmp_path: Path, bundle: Path, photos: Path) -> None:
    plan = plan_score(scoring(bundle, tmp_path / "table", photos, plan=True), console=Recorder())
    score(scoring(bundle, tmp_path / "table", photos), console=Recorder())
    size = sum(path.stat().st_size for path in (tmp_path / "table" / "table").glob("*.parquet"))
    assert size / 2 < plan["table_bytes"] < size * 8  # of 100 images in all: larger files of them shrink well
    names = sorted(path.name for path in (tmp_path / "table").rglob("*"))
    in_tasks = scoring(bundle, tmp_path / "table", photos, plan=True, decode="tasks", actors=1, cpus_per_actor=1)
    assert plan_score(in_tasks, console=Recorder())["decode_images_per_s_per_core"] > 0
    assert sorted(path.name for path in (tmp_path / "table").rglob("*")) == names


@pytest.mark.chaos  # see above
@pytest.mark.usefixtures("two_cpus")
def test_training_takes_as_long_as_its_plan_said(tmp_path: Path) -> None:
    plan = plan_train(training(tmp_path, plan=True), recipe="test", console=embedded())
    done = train(training(tmp_path), recipe="test", console=embedded())
    assert_expected(done["seconds"], plan["expected_seconds"])


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_a_plan_says_why_there_is_none(tmp_path: Path, bundle: Path, photos: Path) -> None:
    with pytest.raises(ResourceError, match=r"Received: actors=9"):
        plan_score(scoring(bundle, tmp_path / "table", photos, plan=True, actors=9), console=Recorder())
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing"):
        plan_score(scoring(bundle, tmp_path / "table", tmp_path / "nothing", plan=True), console=Recorder())
    (tmp_path / "nothing" / "text.jpg").write_text("no image")
    with pytest.raises(ConfigError, match=r"none of 1 sampled images is usable, for example .*text\.jpg: unsupported"):
        plan_score(scoring(bundle, tmp_path / "table", tmp_path / "nothing", plan=True), console=Recorder())


@pytest.mark.chaos
@pytest.mark.usefixtures("two_cpus")
def test_a_signal_ends_a_plan_of_scoring(tmp_path: Path, bundle: Path, photos: Path) -> None:
    console = Recorder(at="scoring", then=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="Stopped") as raised:
        plan_score(scoring(bundle, tmp_path / "table", photos, plan=True), console=console)
    assert raised.value.exit_code == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_decoding_and_features_are_parts_of_a_plan(tmp_path: Path) -> None:
    for number in range(300):
        folder = tmp_path / "data" / f"class-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        noise(number, width=90, height=70).save(folder / f"{number}.jpg")
    job = replace(
        training(tmp_path / "runs", plan=True, workers=2, cpus_per_worker=1),
        data=DataConfig(data=(str(tmp_path / "data"),)),
        model=ModelConfig(backbone="mobilenet_v2", alpha=0.35, image_size_px=32),
        phases=PhasesConfig(epochs=(2,), learning_rate=(1e-3,), trainable=("head",)),
    )
    found = plan_train(job, recipe="test", console=Recorder())
    assert found["workers"] == 2
    assert found["decode_images_per_s_per_core"] > 50
    assert found["features_images_per_s"] > 1
    assert [phase["name"] for phase in found["phases"]] == ["head"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.chaos
@pytest.mark.usefixtures("two_cpus")
def test_a_signal_ends_a_plan_of_training(tmp_path: Path) -> None:
    console = Recorder(at="training", then=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="Stopped") as raised:
        plan_train(training(tmp_path, plan=True), recipe="test", console=console)
    assert raised.value.exit_code == 130
    assert list(tmp_path.iterdir()) == []
