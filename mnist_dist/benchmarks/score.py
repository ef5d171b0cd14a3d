"""Speed of scoring: our job beside the bare model, tf.data, Ray Data's recipe and Daft, on the same JPEG files.

Owns: what is measured, in which order, and the table of it. Does not own: the programs it is compared with (`peers/`),
or the photographs (`photos`).

Contract: everything is measured in one run, each measurement in a process of its own, by turns over some rounds.
Figures are medians, and ratios are medians of the rounds' ratios, since machines are noisy. A measurement counts only
if its table has exactly one row for each image.

- steady: images/s between the first quarter of the batches and the last one, by time stamps within the process; of
  ours, from the first shard's begin to the last one's end, as its JSON line says: nothing is left out.
- whole: images/s from the start of the process to its exit.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import psutil

from mnist_dist.benchmarks.machine import machine
from mnist_dist.benchmarks.peers.task import Task, read_stamps
from mnist_dist.benchmarks.photos import link_photos, write_photos, write_tar
from mnist_dist.config import ModelConfig, require
from mnist_dist.console import Console
from mnist_dist.errors import ConfigError, MnistDistError

ModelName = Literal["mobilenet_v2", "vgg16", "cnn"]
Peer = Literal["bare", "tfdata", "ray", "daft", "ours", "ours-tar"]
Found = dict[str, float]
"""Images/s: `steady`, and but for the bare model `whole`."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a model is measured."""

    size_px: int
    batch_size: int


CASES: dict[str, Case] = {
    "mobilenet_v2": Case(size_px=224, batch_size=32),
    "vgg16": Case(size_px=224, batch_size=16),
    "cnn": Case(size_px=32, batch_size=2),
}
PROGRAMS: dict[str, str] = {
    "bare": "bare",
    "tfdata": "tf_data",
    "ray": "ray_recipe",
    "daft": "daft_recipe",
}
"""Peer -> its module in `peers/`; all others are our job."""
TITLES: dict[str, str] = {
    "bare": "bare model",
    "tfdata": "tf.data",
    "ray": "Ray's recipe",
    "daft": "Daft",
    "ours": "ours",
    "ours-tar": "ours, from a tar",
}
NUM_CLASSES = 10
SETTLING = 0.25  # share of the batches that do not count as steady
SMALL_IMAGES = 10
MEMORY_FACTOR = 10  # times as many images
SECONDS_BETWEEN_SAMPLES = 0.5
TIMEOUT_S = 7_200
LOG_LINES = 20  # of a program that failed
ROOT = Path(__file__).parents[2]  # where `python -m jobs.score` is found


@dataclass(frozen=True, kw_only=True)
class ScoreBenchmark:
    """What to measure."""

    models: tuple[ModelName, ...] = ("mobilenet_v2", "vgg16")
    """At 224 px, with 10 classes and random weights, in batches of 32 (vgg16: 16). `cnn`: at 32 px in batches of 2, to
    try this out."""
    images: int = 2_000
    """JPEGs of 500 x 375 px, about 68 KB each."""
    rounds: int = 3
    """Measurements of each."""
    peers: tuple[Peer, ...] = ("bare", "tfdata", "ray", "daft", "ours")
    """`ours-tar`: our job on one tar of the same images. Empty: none, for `small` and `memory` alone."""
    seconds: float = 10.0
    """How long the bare model is measured each time."""
    small: bool = False
    """Also 10 images, start to exit: our job, and a bare script that starts Ray and calls the first model once."""
    memory: bool = False
    """Also the peak memory of our job with the first model, at `images` and at ten times as many."""
    verbose: bool = False
    """Show what our own process logs."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds is at least 1", rounds=self.rounds)
        require(self.seconds > 0, "seconds is positive", seconds=self.seconds)
        require(bool(self.models), f"models are among {', '.join(CASES)}", models=self.models)
        least = 1 + max((CASES[name].batch_size for name in self.models), default=0)
        require(self.images >= least, f"images is at least {least}, more than a batch", images=self.images)


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    scratch: Path
    photos: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        return self.scratch / "photos"

    @property
    def tar(self) -> Path:
        return self.scratch / "photos.tar"

    def bundle(self, model: str) -> Path:
        return self.scratch / model

    def image_kb(self) -> float:
        """Average size of a photograph."""
        return round(statistics.mean(path.stat().st_size for path in self.photos) / 1e3, 1)


def measure(benchmark: ScoreBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures everything that was asked for.

    Returns:
        `machine`, `date`, `images`, `image_kb`, `rows` (one for each model: medians and ratios of each peer, and each
        round), and where asked for `small` and `memory`.

    Raises:
        ConfigError: a package of the extra `bench` is missing.
        MnistDistError: a program failed, or left out images.
    """
    _check_packages(benchmark)
    with tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as scratch:
        bench = _prepare(benchmark, Path(scratch), console=console)
        result: dict[str, Any] = {
            "machine": machine(),
            "date": date.today().isoformat(),
            "images": benchmark.images,
            "image_kb": bench.image_kb(),
            "rows": [_measure_model(model, benchmark, bench, console=console) for model in benchmark.models],
        }
        if benchmark.small:
            result["small"] = _measure_small(benchmark, bench, console=console)
        if benchmark.memory:
            result["memory"] = _measure_memory(benchmark, bench, console=console)
    return result


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: a table with two lines for each model, and a sentence for each of the rest."""
    peers = list(dict.fromkeys(peer for row in result["rows"] for peer in row["peers"]))
    lines = []
    if peers:
        lines = [
            "| model, images/s | " + " | ".join(TITLES[peer] for peer in peers) + " |",
            "|---" * (1 + len(peers)) + "|",
        ]
    for row in result["rows"] if peers else []:
        found = [row["peers"][peer] for peer in peers]
        lines.append(f"| `{row['model']}`, steady (of bare) | " + " | ".join(_steady_cell(each) for each in found) + " |")
        lines.append(f"| `{row['model']}`, whole run | " + " | ".join(_cell(each.get("whole")) for each in found) + " |")
    lines += ["", *(_sentences(result)), f"{result['machine']}, {result['date']}"]
    return "\n".join(lines).strip()


def _steady_cell(found: Found) -> str:
    share = f" ({found['of_bare']:.2f})" if "of_bare" in found and found["of_bare"] != 1 else ""
    return f"{_cell(found['steady'])}{share}"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _sentences(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['images']:,} JPEGs of about {result['image_kb']:.0f} KB, float32."]
    if small := result.get("small"):
        lines.append(
            f"{small['images']} images with `{small['model']}`, start to exit: {small['ours']:.1f} s; bare script "
            f"{small['bare']:.1f} s; ratio {small['of_bare']:.2f}."
        )
    if memory := result.get("memory"):
        least, most = memory["images"]
        lines.append(
            f"Peak memory (PSS of all processes) with `{memory['model']}`: {memory['peak_mb'][0]:,.0f} MB for {least:,} "
            f"images, {memory['peak_mb'][1]:,.0f} MB for {most:,}; ratio {memory['ratio']:.2f}."
        )
    return lines


# --- what is prepared ------------------------------------------------------------------------------------------------


def _check_packages(benchmark: ScoreBenchmark) -> None:
    wanted = ["skimage", *(["daft"] if "daft" in benchmark.peers else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the benchmark needs pip install -e '.[bench]'. Received: no package {', '.join(missing)}")


def _prepare(benchmark: ScoreBenchmark, scratch: Path, *, console: Console) -> Bench:
    """Makes the photographs, a tar of them, and a bundle of each model."""
    console.line(f"making {benchmark.images:,} photographs and {len(benchmark.models)} models")
    bench = Bench(scratch, tuple(write_photos(scratch / "photos", count=benchmark.images)))
    if "ours-tar" in benchmark.peers:
        write_tar(bench.photos, bench.tar)
    for model in benchmark.models:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_hush) as pool:
            pool.submit(write_random_bundle, model, bench.bundle(model)).result()
    return bench


def _hush() -> None:
    """Silences what TensorFlow prints while it is imported, which no setting does; errors come back as exceptions."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def write_random_bundle(model: str, path: Path) -> None:
    """Writes a bundle with initial weights, a function of the seed."""
    from mnist_dist.data.images import ImageSpec
    from mnist_dist.models.bundle import write_bundle
    from mnist_dist.models.classifier import build_classifier

    size_px = CASES[model].size_px
    spec = ImageSpec(height_px=size_px, width_px=size_px, channels=3)
    write_bundle(
        path,
        model=build_classifier(ModelConfig(backbone=model), spec=spec, num_classes=NUM_CLASSES, seed=0).model,
        class_names=[f"class-{number}" for number in range(NUM_CLASSES)],
        spec=spec,
        backbone=model,
        weights="none",
        config={},
        data_fingerprint="none",
        validation={},
        test={},
        history_csv="",
        calibration=None,
    )


# --- throughput ------------------------------------------------------------------------------------------------------


def _measure_model(model: str, benchmark: ScoreBenchmark, bench: Bench, *, console: Console) -> dict[str, Any]:
    rounds: list[dict[str, Found]] = []
    for number in range(benchmark.rounds):
        found: dict[str, Found] = {}
        for peer in benchmark.peers:
            found[peer] = _measure_peer(peer, model, benchmark, bench)
            shown = ", ".join(f"{name} {value:,.1f} images/s" for name, value in found[peer].items())
            console.line(f"{model}, round {number + 1}, {TITLES[peer]}: {shown}")
        rounds.append(found)
    return {
        "model": model,
        "batch_size": CASES[model].batch_size,
        "peers": {peer: summary(rounds, peer) for peer in benchmark.peers},
        "rounds": rounds,
    }


def summary(rounds: Sequence[dict[str, Found]], peer: str) -> Found:
    """Medians of a peer's figures; `of_bare`, the median of the rounds' ratios to that round's bare model."""
    figures = {name: statistics.median(found[peer][name] for found in rounds) for name in rounds[0][peer]}
    if "bare" not in rounds[0]:
        return figures
    ratios = [found[peer]["steady"] / found["bare"]["steady"] for found in rounds]
    return {**figures, "of_bare": statistics.median(ratios)}


def _measure_peer(peer: str, model: str, benchmark: ScoreBenchmark, bench: Bench) -> Found:
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        scratch = Path(folder)
        if peer not in PROGRAMS:
            images = bench.tar if peer == "ours-tar" else bench.folder
            return _measure_ours(_our_command(model, images, bench, scratch), benchmark.images, scratch)
        task = Task(
            bundle=str(bench.bundle(model)),
            images=str(bench.folder),
            output=str(scratch / "table"),
            stamps=str(scratch / "stamps"),
            batch_size=CASES[model].batch_size,
            seconds=benchmark.seconds,
        )
        seconds = _run(_program(PROGRAMS[peer], task), scratch)
        steady = {"steady": steady_images_per_s(read_stamps(Path(task.stamps)))}
        if peer == "bare":
            return steady
        _check_table(task.output, benchmark.images, peer)
        return {**steady, "whole": benchmark.images / seconds}


def steady_images_per_s(stamps: Sequence[tuple[float, int]]) -> float:
    """Speed after the first quarter of the batches.

    Args:
        stamps: seconds and images of each batch, at least 2, in the order in which they were done.
    """
    first = max(1, round(SETTLING * len(stamps)))
    images = sum(count for _, count in stamps[first:])
    return images / (stamps[-1][0] - stamps[first - 1][0])


def _check_table(output: str, images: int, peer: str) -> None:
    import pyarrow.dataset

    uris = pyarrow.dataset.dataset(output, format="parquet").to_table(columns=["uri"])["uri"]
    if len(uris) != images or len(uris.unique()) != images:
        raise MnistDistError(
            f"a table has one row for each of {images} images. Received: {len(uris)} rows, {len(uris.unique())} "
            f"distinct, of {TITLES[peer]}"
        )


def _measure_ours(command: Sequence[str], images: int, scratch: Path) -> Found:
    seconds = _run(command, scratch)
    line = _last_json(scratch)
    if (line["images"], line["ok"]) != (images, images):
        raise MnistDistError(f"our job scores each of {images} images. Received: {line}")
    return {"steady": line["images_per_s"], "whole": images / seconds}


# --- small inputs, and memory ----------------------------------------------------------------------------------------


def _measure_small(benchmark: ScoreBenchmark, bench: Bench, *, console: Console) -> dict[str, Any]:
    """Seconds from start to exit for a few images, medians over the rounds."""
    model = benchmark.models[0]
    images = bench.scratch / "small"
    link_photos(bench.photos, images, count=SMALL_IMAGES)
    rounds = []
    for number in range(benchmark.rounds):
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
            scratch = Path(folder)
            task = Task(
                bundle=str(bench.bundle(model)),
                images=str(images),
                output=str(scratch / "table"),
                stamps=str(scratch / "stamps"),
                batch_size=SMALL_IMAGES,
            )
            bare = _run(_program("start", task), scratch)
            ours = SMALL_IMAGES / _measure_ours(_our_command(model, images, bench, scratch), SMALL_IMAGES, scratch)["whole"]
        console.line(f"{SMALL_IMAGES} images, round {number + 1}: bare script {bare:.1f} s, ours {ours:.1f} s")
        rounds.append({"bare": bare, "ours": ours})
    return {
        "model": model,
        "images": SMALL_IMAGES,
        **{name: statistics.median(found[name] for found in rounds) for name in ("bare", "ours")},
        "of_bare": statistics.median(found["ours"] / found["bare"] for found in rounds),
        "rounds": rounds,
    }


def _measure_memory(benchmark: ScoreBenchmark, bench: Bench, *, console: Console) -> dict[str, Any]:
    """Peak memory of our job at some images, and at ten times as many: hard links of the same."""
    model = benchmark.models[0]
    many = bench.scratch / "many"
    link_photos(bench.photos, many, count=MEMORY_FACTOR * benchmark.images)
    counts = (benchmark.images, MEMORY_FACTOR * benchmark.images)
    peaks = []
    for count, images in zip(counts, (bench.folder, many), strict=True):
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
            peaks.append(_peak_bytes(_our_command(model, images, bench, Path(folder)), Path(folder)) / 1e6)
        console.line(f"peak memory at {count:,} images: {peaks[-1]:,.0f} MB")
    return {"model": model, "images": counts, "peak_mb": peaks, "ratio": peaks[1] / peaks[0]}


def _peak_bytes(command: Sequence[str], scratch: Path) -> int:
    """Largest sum over a program and all its descendants, among samples."""
    peak = 0
    with _opened(scratch) as (out, err):
        process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=out, stderr=err)
        try:
            while process.poll() is None:
                peak = max(peak, tree_bytes(process.pid))
                time.sleep(SECONDS_BETWEEN_SAMPLES)
        finally:
            process.kill()
            process.wait()
    _check_exit(process.returncode, command, scratch)
    return peak


def tree_bytes(pid: int) -> int:
    """Proportional set size of a process and all its descendants: memory that some share counts once."""
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it ended meanwhile
    return total


# --- programs --------------------------------------------------------------------------------------------------------


def _program(module: str, task: Task) -> list[str]:
    return [sys.executable, "-m", f"mnist_dist.benchmarks.peers.{module}", task.to_argument()]
