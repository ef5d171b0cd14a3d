"""batch_size: the largest batch that fits, its bounds and words, and what a run that runs out of memory ends with."""

import importlib
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ray
from harness import Recorder, private_ray, run_command
from ray.exceptions import ActorDiedError, OutOfMemoryError

from mnist_dist import command_line, keywords, processor
from mnist_dist.config import DataConfig, FitConfig, ModelConfig, OptimizerConfig, PhasesConfig, RunConfig, TrainJob
from mnist_dist.console import Stop
from mnist_dist.engines.engine import is_out_of_memory
from mnist_dist.engines.steps import call_in_process
from mnist_dist.errors import ConfigError, OutOfMemory, StepKilled, WorkersFailed
from mnist_dist.images.spec import ImageSpec
from mnist_dist.inventory import RunFacts
from mnist_dist.on_ray.cluster import Share
from mnist_dist.on_ray.training.attempt import Attempt, lack_of_memory, readable
from mnist_dist.on_ray.training.board import Board
from mnist_dist.on_ray.training.messages import WorkerTask
from mnist_dist.on_ray.training.train import Training, train
from mnist_dist.session import Session
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.training.batch_size import (
    MAX_GROWTH,
    Layout,
    Usage,
    candidates,
    expected_bytes,
    found_in_words,
    is_too_large,
    largest_fitting,
    largest_on_line,
    layout_of,
    measured_phases,
    out_of_memory_in_words,
)
from mnist_dist.training.runs import Run
from mnist_dist.tuning.space_file import with_space

MIB, GIB = 2**20, 2**30


def usage(images: int, peak_bytes: int, available_bytes: int = 10 * GIB) -> Usage:
    return Usage(images=images, peak_bytes=peak_bytes, available_bytes=available_bytes)


# --- the bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "train_images", "expected"),
    [
        (Layout(workers=1, unit=1), 10**6, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]),
        (Layout(workers=3, unit=1), 3 * 20 * 64, [1, 2, 4, 8, 16, 32, 64]),
        (Layout(workers=3, unit=1), 3 * 20 * 64 - 1, [1, 2, 4, 8, 16, 32]),
        (Layout(workers=2, unit=6), 10**6, [6, 12, 24, 48, 96, 192, 384, 768]),
        (Layout(workers=2, unit=5), 30, [5]),
    ],
)
def test_candidates_end_at_the_limit_of_a_worker_and_leave_an_epoch_20_steps(
    layout: Layout, train_images: int, expected: list[int]
) -> None:
    assert candidates(layout, train_images=train_images) == expected


def test_each_candidate_is_shared_evenly_by_workers_parts_and_gpus() -> None:
    job = TrainJob(fit=FitConfig(batch_size="auto"), optimizer=OptimizerConfig(accumulate=3))
    layout = layout_of(job, workers=5, gpus=2)
    sizes = [size * layout.workers for size in candidates(layout, train_images=10**7)]
    assert len(sizes) > 5
    assert all(size % (5 * 3 * 2) == 0 for size in sizes)


# --- the search ------------------------------------------------------------------------------------------------------


class Machine:
    """A worker whose memory grows by a line, and which dies where there is not enough."""

    def __init__(self, *, base: int, per_image: float, available: int, crooked: float = 0.0) -> None:
        self.base, self.per_image, self.available, self.crooked = base, per_image, available, crooked
        self.measured: list[int] = []

    def bytes_of(self, images: int) -> int:
        return int(self.base + self.per_image * images + self.crooked * images**2)

    def __call__(self, images: int) -> Usage | None:
        self.measured.append(images)
        used = self.bytes_of(images)
        return usage(images, used, self.available) if used <= self.available else None

    def largest(self, sizes: list[int]) -> int:
        return max((size for size in sizes if self.bytes_of(size) <= 0.8 * self.available), default=0)


SIZES = candidates(Layout(workers=1, unit=1), train_images=10**6)
MACHINES = [
    Machine(base=600 * MIB, per_image=0.01 * MIB, available=4 * GIB),
    Machine(base=600 * MIB, per_image=3 * MIB, available=4 * GIB),
    Machine(base=2 * GIB, per_image=170 * MIB, available=10 * GIB),
    Machine(base=2 * GIB, per_image=170 * MIB, available=3 * GIB),
    Machine(base=2 * GIB, per_image=0, available=10 * GIB),
    Machine(base=2 * GIB, per_image=900 * MIB, available=4 * GIB),
    Machine(base=GIB, per_image=10 * MIB, crooked=MIB, available=4 * GIB),
    Machine(base=5 * GIB, per_image=MIB, available=4 * GIB),
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("sizes", [SIZES, [6, 12, 24, 48, 96], [7]])
def test_the_largest_size_is_found_that_leaves_a_fifth_of_the_memory(machine: Machine, sizes: list[int]) -> None:
    machine.measured = []
    fitting = largest_fitting(sizes, machine)
    largest = machine.largest(sizes)
    assert (fitting[-1].images if fitting else 0) == largest
    assert len(machine.measured) <= 7
    assert len(set(machine.measured)) == len(machine.measured), "a size is measured once"


def test_no_size_is_tried_far_above_what_has_been_measured() -> None:
    machine = MACHINES[0]
    machine.measured = []
    largest_fitting(SIZES, machine)
    assert machine.measured == [4, 16, 128, 1024]
    growth = [later / earlier for earlier, later in zip(machine.measured, machine.measured[1:], strict=False)]
    assert max(growth) <= MAX_GROWTH


def test_noise_between_two_small_batches_does_not_make_the_batch_small() -> None:
    peaks = {4: 700 * MIB, 16: 690 * MIB, 128: 720 * MIB, 1024: 900 * MIB}
    fitting = largest_fitting(SIZES, lambda images: usage(images, peaks[images], 2 * GIB))
    assert fitting[-1].images == 1024


def test_what_a_prediction_promised_and_does_not_fit_is_halved() -> None:
    def measure(images: int) -> Usage | None:
        return usage(images, GIB + images * MIB) if images < 100 else None

    assert [each.images for each in largest_fitting(SIZES, measure)] == [4, 16, 64]


def test_the_line_through_two_points_tells_what_a_batch_needs_and_how_many_fit() -> None:
    points = [usage(4, 1_000), usage(4, 2 * GIB), usage(20, 4 * GIB)]
    assert expected_bytes(points, images=28) == 5 * GIB
    assert largest_on_line(points) == 20 + 4 * 8
    assert expected_bytes([usage(4, 2 * GIB), usage(16, 2 * GIB)], images=1_016) == 2 * GIB + 1_000


# --- what is measured ------------------------------------------------------------------------------------------------


def job_with(*trainable: str, feature_cache: bool = True, augmentation: Any = "none", **fields: Any) -> TrainJob:
    return TrainJob(
        model=ModelConfig(backbone="vgg16"),
        phases=PhasesConfig(trainable=trainable),
        fit=FitConfig(batch_size="auto", augmentation=augmentation),
        run=RunConfig(feature_cache=feature_cache),
        **fields,
    )


@pytest.mark.parametrize(
    ("job", "measured"),
    [
        (job_with("head"), None),
        (job_with("head", feature_cache=False), ("head",)),
        (job_with("head", augmentation="photos"), ("head",)),
        (job_with("head", "block4"), ("block4",)),
        (job_with("head", "block4", "head"), ("block4", "head")),
        (job_with("head", "block5", "block4", augmentation="photos"), ("head", "block5", "block4")),
        (job_with("head", "block5", "all", augmentation="photos"), ("all",)),
        (job_with("head", "10"), ("10",)),
    ],
)
def test_phases_on_features_are_not_measured_and_the_whole_network_stands_for_its_parts(
    job: TrainJob, measured: tuple[str, ...] | None
) -> None:
    phases = measured_phases(job)
    assert (None if phases is None else phases.trainable) == measured
    assert phases is None or {phase.epochs for phase in phases.in_order()} == {1}


@pytest.mark.parametrize("trainable", [("all",), ("head", "2")])
def test_a_brief_training_on_random_images_takes_its_steps(trainable: tuple[str, ...]) -> None:
    from mnist_dist.training.memory_use import RandomPixels, train_briefly

    pixels = RandomPixels((40, 9, 8, 3))
    assert pixels[np.array([[1, 39, 5]])].shape == (1, 3, 9, 8, 3)
    job = TrainJob(
        model=ModelConfig(backbone="cnn", weights="nowhere.weights.h5"),
        fit=FitConfig(batch_size="auto", mixup=0.2, augmentation="photos", sampling="balanced"),
        optimizer=OptimizerConfig(class_weights="balanced", ema_decay=0.9, accumulate=2),
        run=RunConfig(feature_cache=False),
    )
    memory = train_briefly(
        job,
        PhasesConfig(trainable=trainable, epochs=(1,), learning_rate=(1e-8,)),
        images=4,
        spec=ImageSpec(height_px=12, width_px=16, channels=3),
        classes=11,
        precision="float32",
    )
    assert memory is None, "there is no GPU, so the peak of the process counts"


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_number_is_told_with_what_it_takes() -> None:
    found = usage(32, int(3.1 * GIB), 12 * GIB)
    assert found_in_words(64, found) == "batch size 64: about 3.1 GiB of 12.0 GiB per worker"
    assert found_in_words(2048, None).startswith("batch size 2,048: only a head on features is trained")


WORDS = partial(out_of_memory_in_words, cause="OOM when allocating", accumulate=1, layout=Layout(workers=2, unit=1))


def test_out_of_memory_names_what_was_needed_and_had_and_what_would_fit() -> None:
    points = [usage(4, 2 * GIB, 8 * GIB), usage(16, 3 * GIB, 8 * GIB)]
    assert WORDS(256, points=points) == (
        "out of memory: --batch-size 256, needs about 12.3 GiB per worker, which has 8.0 GiB (OOM when allocating). "
        "About 64 would fit: --batch-size 64, --batch-size auto, or --accumulate 4, which computes each batch in 4 "
        "parts"
    )


def test_without_a_measurement_half_is_guessed() -> None:
    assert WORDS(256, points=[]) == (
        "out of memory: --batch-size 256 (OOM when allocating). About 128 would fit: --batch-size 128, --batch-size "
        "auto, or --accumulate 2, which computes each batch in 2 parts"
    )
    assert "About 64 would fit" in WORDS(256, points=[usage(4, 2 * GIB, 90 * GIB), usage(16, 3 * GIB, 6 * GIB)])
    assert "About 128 would fit" in WORDS(256, points=[usage(4, 2 * GIB), usage(16, 2 * GIB)]), "it did not, after all"


def test_parts_are_only_offered_where_they_are_equally_large() -> None:
    assert "accumulate" not in WORDS(254, points=[])
    words = WORDS(768, points=[], accumulate=3, layout=Layout(workers=2, unit=3))
    assert "About 384 would fit" in words
    assert "--accumulate 6," in words


def test_a_single_image_that_does_not_fit_is_told() -> None:
    assert "Not even the smallest batch would fit" in WORDS(2, points=[])


# --- the setting -----------------------------------------------------------------------------------------------------


def parse(*argv: str) -> FitConfig:
    return command_line.parse({"plain": TrainJob}, command="train", default="plain", argv=argv)[1].fit


def test_auto_and_numbers_are_taken_as_flags_and_arguments() -> None:
    assert parse("--batch-size", "auto").batch_size == "auto"
    assert parse("--batch-size", "32").batch_size == 32
    assert keywords.job_of(TrainJob, {"batch_size": "auto"}).fit.batch_size == "auto"


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
def test_other_batch_sizes_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"batch.size"):
        parse("--batch-size", value)


def test_auto_is_what_identifies_the_run_and_a_number_is_another() -> None:
    job = TrainJob(fit=FitConfig(batch_size="auto"))
    assert job.settings()["fit"]["batch_size"] == "auto"
    assert job.settings_hash() != TrainJob(fit=FitConfig(batch_size=64)).settings_hash()


def test_a_space_has_numbers_alone() -> None:
    from mnist_dist.recipes import SEARCH_RECIPES

    base = SEARCH_RECIPES["search-digits"]()
    with pytest.raises(ConfigError, match=r'batch_size takes whole numbers .*Received: batch_size = "auto"$'):
        with_space(base, {"batch_size": "auto"}, base=base, given=())


# --- the number of a run ---------------------------------------------------------------------------------------------

FACTS = RunFacts(recipe="quickstart", settings={"fit": {"batch_size": "auto"}}, features=None, records="abc")


def begun_run(folder: Path, batch_size: int) -> Run:
    """A run that has found its batch and saved a checkpoint."""
    run = Run(str(folder / "run"))
    run.begin(FACTS, fence=3)
    assert run.found_batch() is None
    run.keep_batch(batch_size)
    ANYWHERE.write_bytes(f"{run.uri}/attempt-000003/checkpoint-000000007/state.json", b"{}")
    return run


def test_the_number_is_kept_with_the_facts_of_the_run(tmp_path: Path) -> None:
    run = begun_run(tmp_path, 48)
    assert run.found_batch() == 48
    assert run.begin(FACTS, fence=4) is False
    assert run.found_batch() == 48


def test_a_run_that_saved_nothing_leaves_its_number_to_nobody(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    run.begin(FACTS, fence=1)
    run.keep_batch(48)
    assert run.begin(replace(FACTS, recipe="other"), fence=2) is True
    assert run.found_batch() is None


def training(run: Run, job: TrainJob, console: Recorder) -> Training:
    session = Session(console=console, stop=Stop(console))
    return Training(job, session, recipe="quickstart", run=run, began_at=0.0)


def test_a_resumed_run_takes_the_number_and_measures_nothing(tmp_path: Path) -> None:
    nothing, job = cast(Any, None), TrainJob(fit=FitConfig(batch_size="auto"))
    console = Recorder()
    found = training(begun_run(tmp_path, 48), job, console)
    found._fix_batch(nothing, Share(workers=3, cpus=1, gpus=0))
    assert found.job.fit.global_batch == 48
    assert console.lines == ["batch size 48, as found when the run began"]


def test_a_resumed_run_of_more_workers_than_images_of_its_batch_is_refused(tmp_path: Path) -> None:
    nothing, job = cast(Any, None), TrainJob(fit=FitConfig(batch_size="auto"))
    found = training(begun_run(tmp_path, 2), job, Recorder())
    with pytest.raises(ConfigError, match=r"at least the number of workers\. Received: batch_size=2, workers=3"):
        found._fix_batch(nothing, Share(workers=3, cpus=1, gpus=0))


def test_workers_that_died_are_judged_by_what_they_needed() -> None:
    points = [usage(4, 2 * GIB, 8 * GIB), usage(16, 3 * GIB, 8 * GIB)]
    assert is_too_large(80, points)
    assert not is_too_large(70, points)
    assert not is_too_large(10**6, points[:1])


def test_a_process_that_a_signal_ended_is_told_from_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly.py").write_text(f"import os\ndef die(_): os.kill(os.getpid(), {int(signal.SIGSEGV)})\n")
    (tmp_path / "kindly.py").write_text("def give(report): return 7\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StepKilled, match=r"^a step: the process was killed by SIGSEGV"):
        call_in_process(importlib.import_module("deadly").die, title="a step")
    assert call_in_process(importlib.import_module("kindly").give, title="a step") == 7


# --- out of memory ---------------------------------------------------------------------------------------------------


class ResourceExhaustedError(Exception):
    """As TensorFlow's, by its name."""


class Unhealthy(Exception):
    """Ray Train's WorkerHealthCheckFailedError, as far as it is read."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = failure


class Failed(Exception):
    """Ray Train's WorkerGroupError, as far as it is read."""

    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__("Training failed due to worker errors")
        self.worker_failures = worker_failures


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ResourceExhaustedError("OOM when allocating tensor"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 137438953472 bytes."), True),
        (np._core._exceptions._ArrayMemoryError((2**40,), np.dtype(np.float32)), True),  # type: ignore[attr-defined]
        (RuntimeError("INVALID_ARGUMENT: shapes"), False),
    ],
)
def test_errors_of_every_library_are_known_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_step_that_runs_out_of_memory_says_which_tensor() -> None:
    from mnist_dist.on_ray.training.worker import _naming_lack_of_memory

    words = "Graph execution error:\n\nDetected at node relu\n\nOOM when allocating tensor with shape[9,7] and type"
    expected = r"^ResourceExhaustedError: OOM when allocating tensor with shape\[9,7\]"
    with pytest.raises(OutOfMemory, match=expected), _naming_lack_of_memory():
        raise ResourceExhaustedError(words)
    with pytest.raises(ValueError, match="another"), _naming_lack_of_memory():
        raise ValueError("another")


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        ({1: OutOfMemory("a tensor")}, "a tensor"),
        ({0: Unhealthy(ActorDiedError()), 1: OutOfMemory("a tensor")}, "a tensor"),
        ({0: ValueError("collective"), 2: Unhealthy(OutOfMemoryError("low"))}, "Ray ended worker 2, as the memory"),
        ({0: Unhealthy(ActorDiedError())}, None),
    ],
)
def test_a_lack_of_memory_is_found_among_the_failures_of_workers(
    failures: dict[int, Exception], words: str | None
) -> None:
    found, read = lack_of_memory(failures), readable(Failed(failures))
    assert (None if found is None else str(found).startswith(words or "?")) in (None if words is None else True, True)
    assert isinstance(read, OutOfMemory if words else WorkersFailed)


def begin(board: Board, *, killed: tuple[int | None, ...] = (0, 0), checkpoint: str | None = None) -> str | None:
    """All workers of a group begin; what they are told."""
    for rank, count in enumerate(killed):
        board.begin(rank, node=f"node {rank}", killed=count, checkpoint=checkpoint)
    told = board.out_of_memory()
    return None if told is None else str(told)


def test_the_next_workers_are_told_of_a_step_that_did_not_fit_even_after_a_checkpoint() -> None:
    board = Board()
    assert begin(board) is None
    board.ended(OutOfMemory("a tensor"), repeats=True)
    assert begin(board, checkpoint="second") == "a tensor"


def test_workers_that_were_killed_for_memory_get_one_more_try_after_each_checkpoint() -> None:
    board = Board()
    begin(board)
    board.ended(OutOfMemory("Ray ended it"), repeats=False)
    assert begin(board, checkpoint="first") is None
    board.ended(OutOfMemory("Ray ended it"), repeats=False)
    assert begin(board, checkpoint="first") == "Ray ended it"


def test_the_count_of_the_kernel_shows_that_it_killed_a_worker() -> None:
    board = Board()
    assert begin(board, killed=(5, 9)) is None
    board.ended(None, repeats=False)
    assert begin(board, killed=(5, 9)) is None, "they died of something else"
    board.ended(None, repeats=False)
    assert begin(board, killed=(5, 10)) == "the kernel killed a process of node 1"
    board = Board()
    begin(board, killed=(None, None))
    board.ended(None, repeats=False)
    assert begin(board, killed=(None, None)) is None


def test_the_kernel_is_asked_within_the_container_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CGROUP", tmp_path)
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 17\noom 3\noom_kill 2\n")
    assert processor.killed_for_memory() == 2
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 9 * GIB})())
    assert processor.free_memory_bytes() == 9 * GIB
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert processor.free_memory_bytes() == 2 * GIB


def test_the_smallest_of_the_visible_gpus_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" > "${0%/*}/asked"\necho 81559\necho 40960\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert processor.gpu_memory_bytes() == 40 * GIB
    assert "--id=1,3" in (tmp_path / "asked").read_text()
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert processor.gpu_memory_bytes() is None


# --- on Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with private_ray(num_cpus=4):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_a_run_finds_its_batch_and_says_so_in_its_folder_result_and_lines(tmp_path: Path) -> None:
    job = TrainJob(
        data=DataConfig(limit=420),
        fit=FitConfig(batch_size="auto"),
        phases=PhasesConfig(epochs=(1,)),
        run=RunConfig(storage=str(tmp_path), name="run", workers=2, cpus_per_worker=1),
    )
    dry, console = Recorder(), Recorder()
    result = train(replace(job, run=replace(job.run, dry_run=True)), recipe="test", console=dry)
    assert result["batch_size"] == 16, "336 images are 20 steps of 16"
    result = train(job, recipe="test", console=console)
    lines = [line for line in (*dry.lines, *console.lines) if line.startswith("batch size 16: about ")]
    assert len(lines) == 2
    assert all(line.endswith("GiB per worker") for line in lines)
    assert (result["batch_size"], result["epochs"]) == (16, 1)
    run = Run(str(tmp_path / "run"))
    assert run.found_batch() == 16
    facts = run.read("run-000001.json", RunFacts)
    assert facts is not None
    assert facts.settings["fit"]["batch_size"] == "auto"
    assert train(job, recipe="test", console=Recorder()) == result


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_workers_are_restarted_once_for_a_lack_of_memory_of_one_of_them(tmp_path: Path) -> None:
    # Both are pickled by value only because they are defined here; Ray's processes do not find this module.
    class CountingBoard(Board):
        count = 0

        def begin(self, *arguments: Any, **named: Any) -> None:
            self.count += 1
            super().begin(*arguments, **named)

        def begun(self) -> int:
            return self.count

    def loop(config: dict[str, Any]) -> Any:
        """Of the first group, rank 1 runs out of memory while rank 0 waits for it."""
        import ray.train
        from ray.train.collective import barrier

        from mnist_dist.on_ray.training.messages import WorkerResult
        from mnist_dist.on_ray.training.worker import _known_lack_of_memory, _naming_lack_of_memory

        known = _known_lack_of_memory(config["task"])
        if known is not None:
            return WorkerResult(error=known)
        with _naming_lack_of_memory():
            if ray.train.get_context().get_world_rank() == 1:
                raise MemoryError("OOM when allocating tensor with shape[9,7]")
            barrier()
        return WorkerResult(stopped=True)

    nothing, board = cast(Any, None), ray.remote(num_cpus=0)(CountingBoard).remote()
    task = WorkerTask(
        job=TrainJob(run=RunConfig(max_failures=50)),
        records=nothing,
        splits=nothing,
        features=None,
        fingerprint="",
        run=str(tmp_path),
        fence=nothing,
        checkpoint=None,
        board=board,
        backend="tensorflow",
        cpus=1,
        gpu=False,
        began_at=0.0,
        command="",
    )
    attempt = Attempt(task, name="attempt", share=Share(workers=2, cpus=1, gpus=0), loop=loop)
    with Stop(Recorder()) as stop:
        result = attempt.run_to_end(Session(console=Recorder(), stop=stop))
    assert isinstance(result.error, OutOfMemory)
    assert str(result.error) == "MemoryError: OOM when allocating tensor with shape[9,7]"
    assert ray.get(board.begun.remote()) == 4, "two groups of two workers"


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.skipif(processor.memory_bytes() > 40 * GIB, reason="needs a machine on which 47 GB are too much")
def test_a_batch_that_exceeds_the_memory_ends_with_what_would_fit(tmp_path: Path) -> None:
    """The first activations are `float32 [1400, 512, 512, 32]`, 47 GB, of which TensorFlow dies on CPUs."""
    flags = "--workers 1 --cpus-per-worker 2 --batch-size 1400 --image-size-px 512 --epochs 1 --max-failures 0"
    code, result, _ = run_command("jobs.train", "quickstart", "--storage", str(tmp_path), *flags.split())
    assert (code, result["error_type"]) == (1, "OutOfMemory")
    assert re.match(r"out of memory: --batch-size 1400, needs about [\d.]+ GiB per worker, which has ", result["error"])
    cure = (
        r"\(a worker died\)\. (About (\d+) would fit: --batch-size \2, --batch-size auto|Not even the smallest batch)"
    )
    assert re.search(cure, result["error"])  # It takes 6 GiB with any batch, most of it for a large dense layer.
