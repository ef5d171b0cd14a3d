"""Speed of scoring: our job beside the bare model, tf.data, Ray Data's recipe and Daft, on the same JPEG files.

Owns: what is measured, in which order, and the table of it. Does not own: the programs it is compared with (`peers/`),
how a program is run and watched (`programs`), or the photographs (`photos`).

Contract: everything is measured in one run, each measurement in a process of its own, by turns over some rounds.
Figures are medians, and ratios are medians of the rounds' ratios, since machines are noisy. A measurement counts only
if its table has exactly one row for each image.

- steady: images/s after the first quarter of the batches, by time stamps within the process; of ours, from the first
  shard's begin to the last one's end, as its JSON line says: nothing is left out.
- whole: images/s from the start of the process to its exit.
"""

import contextlib
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import pyarrow.dataset

from mnist_dist.benchmarks.machine import machine
from mnist_dist.benchmarks.peers.task import Task, read_stamps
from mnist_dist.benchmarks.photos import link_photos, write_photos, write_tar
from mnist_dist.benchmarks.programs import last_json, peak_memory_bytes, run_program
from mnist_dist.config import ModelConfig, require
from mnist_dist.console import Console
from mnist_dist.errors import ConfigError, MnistDistError

ModelName = Literal["mobilenet_v2", "vgg16", "cnn"]
Peer = Literal["bare", "tfdata", "ray", "daft", "ours", "ours-tar"]
Figures = dict[str, float]
"""Images/s, `steady` and (but for the bare model) `whole`; in a summary also `of_bare`."""


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
PROGRAMS: dict[str, str] = {"bare": "bare", "tfdata": "tf_data", "ray": "ray_recipe", "daft": "daft_recipe"}
"""Peer -> its module in `peers/`; the others are our job."""
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
    """Also 10 images with the first model, start to exit: our job, and a bare script that starts Ray, loads the model
    and calls it once."""
    memory: bool = False
    """Also the peak memory of our job with the first model, at `images` and at ten times as many."""
    verbose: bool = False
    """Show what is logged while things are prepared. What the programs print is shown where one fails."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds is at least 1", rounds=self.rounds)
        require(self.seconds > 0, "seconds is positive", seconds=self.seconds)
        require(bool(self.models), f"models are among {', '.join(CASES)}", models=self.models)
        least = 1 + max((CASES[name].batch_size for name in self.models), default=0)
        require(self.images >= least, f"images is more than a batch, at least {least}", images=self.images)


def measure(benchmark: ScoreBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures everything that was asked for.

    Returns:
        `machine`, `date`, `images`, `image_kb`, `rows` (one for each model: the peers' medians and ratios, and the
        figures of each round), and where asked for `small` and `memory`.

    Raises:
        ConfigError: a package of the extra `bench` is missing.
        MnistDistError: a program failed, or its table lacks images.
    """
    _check_packages(benchmark)
    with tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as folder:
        bench = _Bench(benchmark, Path(folder), console=console)
        result = {
            "machine": machine(),
            "date": date.today().isoformat(),
            "images": benchmark.images,
            "image_kb": bench.image_kb(),
            "rows": [bench.measure_model(model) for model in benchmark.models] if benchmark.peers else [],
        }
        if benchmark.small:
            result["small"] = bench.measure_small()
        if benchmark.memory:
            result["memory"] = bench.measure_memory()
    return result


def _check_packages(benchmark: ScoreBenchmark) -> None:
    wanted = ["skimage", *(["daft"] if "daft" in benchmark.peers else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the benchmark needs pip install -e '.[bench]'. Received: no package {', '.join(missing)}")


class _Bench:
    """Photographs and models in a temporary folder, and the measurements on them."""

    def __init__(self, benchmark: ScoreBenchmark, folder: Path, *, console: Console) -> None:
        self.benchmark, self.folder, self.console = benchmark, folder, console
        console.line(f"making {benchmark.images:,} photographs, and the models {', '.join(benchmark.models)}")
        self.photos = write_photos(folder / "photos", count=benchmark.images)
        if "ours-tar" in benchmark.peers:
            write_tar(self.photos, folder / "photos.tar")
        for model in benchmark.models:
            with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_hush) as pool:
                pool.submit(write_random_bundle, folder / model, model).result()

    def image_kb(self) -> float:
        """Average size of a photograph."""
        return round(statistics.mean(path.stat().st_size for path in self.photos) / 1e3, 1)

    def measure_model(self, model: str) -> dict[str, Any]:
        """Speed of all peers with a model."""
        rounds: list[dict[str, Figures]] = []
        for number in range(self.benchmark.rounds):
            found: dict[str, Figures] = {}
            for peer in self.benchmark.peers:
                found[peer] = self._measure_peer(peer, model)
                shown = ", ".join(f"{name} {value:,.1f}" for name, value in found[peer].items())
                self.console.line(f"{model}, round {number + 1}, {TITLES[peer]}: {shown} images/s")
            rounds.append(found)
        return {
            "model": model,
            "batch_size": CASES[model].batch_size,
            "peers": {peer: summary(rounds, peer) for peer in self.benchmark.peers},
            "rounds": rounds,
        }

    def measure_small(self) -> dict[str, Any]:
        """Seconds from start to exit for a few images."""
        model, images = self.benchmark.models[0], self.folder / "small"
        link_photos(self.photos, images, count=SMALL_IMAGES)
        rounds = []
        for number in range(self.benchmark.rounds):
            with self._task(model, images) as task:
                bare = run_program(["mnist_dist.benchmarks.peers.start", task.to_argument()], Path(task.scratch))
            with self._task(model, images) as task:
                ours = SMALL_IMAGES / _measure_ours(task, SMALL_IMAGES)["whole"]
            self.console.line(f"{SMALL_IMAGES} images, round {number + 1}: bare script {bare:.1f} s, ours {ours:.1f} s")
            rounds.append({"bare": bare, "ours": ours})
        return {
            "model": model,
            "images": SMALL_IMAGES,
            "bare_s": statistics.median(found["bare"] for found in rounds),
            "ours_s": statistics.median(found["ours"] for found in rounds),
            "of_bare": statistics.median(found["ours"] / found["bare"] for found in rounds),
            "rounds": rounds,
        }

    def measure_memory(self) -> dict[str, Any]:
        """Peak memory of our job at some images, and at many: hard links of the same."""
        model, some = self.benchmark.models[0], len(self.photos)
        places = {some: self.folder / "photos", MEMORY_FACTOR * some: self.folder / "many"}
        link_photos(self.photos, self.folder / "many", count=MEMORY_FACTOR * some)
        peaks_mb = []
        for count, images in places.items():
            with self._task(model, images) as task:
                peaks_mb.append(peak_memory_bytes(_our_job(task), Path(task.scratch)) / 1e6)
                _check_ours(task, count)
            self.console.line(f"peak memory at {count:,} images: {peaks_mb[-1]:,.0f} MB")
        return {"model": model, "images": list(places), "peak_mb": peaks_mb, "ratio": peaks_mb[1] / peaks_mb[0]}

    def _measure_peer(self, peer: str, model: str) -> Figures:
        count = self.benchmark.images
        with self._task(model, self.folder / ("photos.tar" if peer == "ours-tar" else "photos")) as task:
            if peer not in PROGRAMS:
                return _measure_ours(task, count)
            program = f"mnist_dist.benchmarks.peers.{PROGRAMS[peer]}"
            seconds = run_program([program, task.to_argument()], Path(task.scratch))
            steady = steady_images_per_s(read_stamps(task))
            if peer == "bare":
                return {"steady": steady}
            _check_table(task, count)
            return {"steady": steady, "whole": count / seconds}

    @contextlib.contextmanager
    def _task(self, model: str, images: Path) -> Iterator[Task]:
        """A task with a scratch folder of its own."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            yield Task(
                bundle=str(self.folder / model),
                images=str(images),
                scratch=scratch,
                batch_size=CASES[model].batch_size,
                seconds=self.benchmark.seconds,
            )


def _hush() -> None:
    """Silences what TensorFlow prints while it is imported, which no setting does; errors come back as exceptions."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def write_random_bundle(path: Path, model: str) -> None:
    """Writes a bundle of a model as it is before any training, a function of the seed."""
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


def _our_job(task: Task) -> list[str]:
    flags = {"bundle": task.bundle, "input": task.images, "output": task.output, "batch-size": str(task.batch_size)}
    return ["jobs.score", *(word for name, value in flags.items() for word in (f"--{name}", value))]


def _measure_ours(task: Task, count: int) -> Figures:
    seconds = run_program(_our_job(task), Path(task.scratch))
    return {"steady": _check_ours(task, count)["images_per_s"], "whole": count / seconds}


def _check_ours(task: Task, count: int) -> dict[str, Any]:
    """The JSON line of our job, which has scored all images."""
    line = last_json(Path(task.scratch))
    if (line["images"], line["ok"]) != (count, count):
        raise MnistDistError(f"our job scores each of {count} images. Received: {line}")
    return line


def _check_table(task: Task, count: int) -> None:
    uris = pyarrow.dataset.dataset(task.output, format="parquet").to_table(columns=["uri"])["uri"]
    if (len(uris), len(uris.unique())) != (count, count):
        raise MnistDistError(
            f"a table has one row for each of {count} images. Received: {len(uris)} rows of {len(uris.unique())} images"
        )


def steady_images_per_s(stamps: Sequence[tuple[float, int]]) -> float:
    """Speed after the first quarter of the batches.

    Args:
        stamps: seconds and images of each batch, at least 2, in the order in which they were done.
    """
    first = max(1, round(SETTLING * len(stamps)))
    images = sum(count for _, count in stamps[first:])
    return images / (stamps[-1][0] - stamps[first - 1][0])


def summary(rounds: Sequence[dict[str, Figures]], peer: str) -> Figures:
    """Medians of a peer's figures; `of_bare`, the median of the rounds' ratios to that round's bare model."""
    figures = {name: statistics.median(found[peer][name] for found in rounds) for name in rounds[0][peer]}
    if "bare" in rounds[0]:
        ratios = [found[peer]["steady"] / found["bare"]["steady"] for found in rounds]
        figures["of_bare"] = statistics.median(ratios)
    return figures


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: a table with two lines for each model, then a line for each of the rest."""
    lines = []
    if result["rows"]:
        peers = list(result["rows"][0]["peers"])
        lines += ["| images/s | " + " | ".join(TITLES[peer] for peer in peers) + " |", "|---" * (1 + len(peers)) + "|"]
    for row in result["rows"]:
        steady = " | ".join(_steady_cell(peer, figures) for peer, figures in row["peers"].items())
        whole = " | ".join(_cell(figures.get("whole")) for figures in row["peers"].values())
        lines += [f"| `{row['model']}`, steady (of bare) | {steady} |", f"| `{row['model']}`, whole run | {whole} |"]
    lines.append(f"\n{result['images']:,} JPEGs of about {result['image_kb']:.0f} KB; float32.")
    if "small" in result:
        lines.append(_small_line(result["small"]))
    if "memory" in result:
        lines.append(_memory_line(result["memory"]))
    return "\n".join([*lines, f"{result['machine']}, {result['date']}"])


def _steady_cell(peer: str, figures: Figures) -> str:
    share = f" ({figures['of_bare']:.2f})" if peer != "bare" and "of_bare" in figures else ""
    return f"{_cell(figures['steady'])}{share}"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _small_line(small: dict[str, Any]) -> str:
    return (
        f"{small['images']} images with `{small['model']}`, start to exit: {small['ours_s']:.1f} s, bare script "
        f"{small['bare_s']:.1f} s, ratio {small['of_bare']:.2f}."
    )


def _memory_line(memory: dict[str, Any]) -> str:
    (some, many), (less_mb, more_mb) = memory["images"], memory["peak_mb"]
    return (
        f"Peak memory (PSS of all processes) with `{memory['model']}`: {less_mb:,.0f} MB at {some:,} images, "
        f"{more_mb:,.0f} MB at {many:,}, ratio {memory['ratio']:.2f}."
    )
