"""Cost of a search: head trials with and without the feature cache, compared with KerasTuner; 100 trials on VGG16.

- `cache`: the same trials (random search, no early stopping) of a small frozen backbone, with and without the cache;
  and KerasTuner's random search over the same space and images, with fewer trials.
- `vgg16`: heads on VGG16's pooled features at 224 px with ASHA, compared with the one backbone pass that they need.

Times cover the steps of the search itself (`features_s`, `trials_s`), without start-up, finalists and test.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.programs import last_json, run_program
from mnist_dist import processor
from mnist_dist.config import DataConfig, require
from mnist_dist.console import Console
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchRunConfig, SearchSpace
from mnist_dist.sources.source import open_source

Case = Literal["cache", "vgg16"]
SMALL = BackboneSpace(backbone="mobilenet", alpha=(0.25,), image_size_px=(96,))
PEER = "benchmarks.peers.keras_tuner_search"


@dataclass(frozen=True, kw_only=True)
class SearchBenchmark:
    """What to measure."""

    cases: tuple[Case, ...] = ("cache", "vgg16")
    """`cache`: MobileNet (width 0.25) at 96 px. `vgg16`: VGG16 at 224 px, with random weights unless `--weights`."""
    data_dir: str | None = None
    """Folder of MNIST's idx files. None: `cache` uses scikit-learn's digits; for `vgg16` Keras downloads MNIST."""
    images: int = 10_000
    """Training and validation images of `vgg16`."""
    small_images: int = 1_500
    """Training and validation images of `cache`."""
    trials: int = 30
    """Trials of `cache`, both with and without the cache."""
    vgg16_trials: int = 100
    """Trials of `vgg16`."""
    peer_trials: int = 5
    """Trials of KerasTuner; 0: not measured."""
    epochs: int = 5
    """Epochs of each `cache` trial."""
    weights: str = "none"
    """Weights of VGG16: a file, or `none`."""
    verbose: bool = False
    """Show the output of Ray and TensorFlow."""

    def __post_init__(self) -> None:
        require(bool(self.cases), "cases must be among cache, vgg16", cases=self.cases)
        for name in ("images", "small_images", "trials", "vgg16_trials", "epochs"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", **{name: getattr(self, name)})
        require(self.peer_trials >= 0, "peer_trials must be 0 or above", peer_trials=self.peer_trials)


def measure(benchmark: SearchBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures every case; returns machine, date and figures in seconds."""
    result: dict[str, Any] = {"machine": processor.described(), "date": date.today().isoformat()}
    if "cache" in benchmark.cases:
        result["cache"] = _measure_cache(benchmark, console=console)
    if "vgg16" in benchmark.cases:
        result["vgg16"] = _measure_vgg16(benchmark, console=console)
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = []
    if "cache" in result:
        figures = result["cache"]
        lines += [
            "| heads of a small frozen backbone | s | s a trial | best validation accuracy |",
            "|---|---|---|---|",
        ]
        for name, row in figures["rows"].items():
            lines.append(f"| {name} | {row['seconds']:.1f} | {row['per_trial_s']:.2f} | {row['best']:.4f} |")
    if "vgg16" in result:
        figures = result["vgg16"]
        lines += [
            "",
            f"{figures['trials']} heads on VGG16's features of {figures['images']:,} images: one pass of the backbone "
            f"{figures['features_s']:.1f} s,",
            f"the trials {figures['trials_s']:.1f} s; together {figures['of_pass']:.2f} of the pass",
        ]
    return "\n".join([*lines, f"\n{result['machine']}, {result['date']}"])


def _data(benchmark: SearchBenchmark, *, images: int) -> DataConfig:
    if benchmark.data_dir is None and images == benchmark.small_images:
        return DataConfig(limit=images)
    return DataConfig(data=("mnist",), data_dir=benchmark.data_dir, limit=images)


def _measure_cache(benchmark: SearchBenchmark, *, console: Console) -> dict[str, Any]:
    job = SearchJob(
        data=_data(benchmark, images=benchmark.small_images),
        space=SearchSpace(
            backbones=(SMALL,),
            hidden_units=(0, 64),
            dropout=(0.0, 0.3),
            optimizer=("adam",),
            label_smoothing=(0.0,),
            batch_size=(32, 64),
        ),
        search=SearchConfig(
            trials=benchmark.trials,
            trial_epochs=benchmark.epochs,
            algorithm="random",
            scheduler="none",
            finalists=1,
            precision="float32",
        ),
        run=SearchRunConfig(verbose=benchmark.verbose),
    )
    rows: dict[str, dict[str, float]] = {}
    for name, cached in (("with the cache", True), ("without it", False)):
        figures = _search(replace(job, run=replace(job.run, feature_cache=cached)), name)
        seconds = figures["features_s"] + figures["trials_s"]
        rows[name] = {
            "seconds": seconds,
            "per_trial_s": seconds / benchmark.trials,
            "best": figures["val_accuracy"],
        }
        console.line(f"{benchmark.trials} trials {name}: {seconds:.1f} s")
    if benchmark.peer_trials:
        figures = _peer(job, trials=benchmark.peer_trials)
        rows["KerasTuner"] = {
            "seconds": figures["seconds"],
            "per_trial_s": figures["seconds"] / benchmark.peer_trials,
            "best": figures["best"],
        }
        console.line(f"{benchmark.peer_trials} trials of KerasTuner: {figures['seconds']:.1f} s")
    return {"trials": benchmark.trials, "images": benchmark.small_images, "rows": rows}


def _measure_vgg16(benchmark: SearchBenchmark, *, console: Console) -> dict[str, Any]:
    from mnist_dist.recipes import search_vgg16_head

    job = search_vgg16_head()
    job = replace(
        job,
        data=_data(benchmark, images=benchmark.images),
        search=replace(job.search, trials=benchmark.vgg16_trials, weights=(f"vgg16={benchmark.weights}",)),
        run=SearchRunConfig(verbose=benchmark.verbose),
    )
    figures = _search(job, "vgg16")
    console.line(
        f"VGG16: one pass {figures['features_s']:.1f} s, {figures['trials']} trials {figures['trials_s']:.1f} s"
    )
    return {
        "trials": figures["trials"],
        "images": benchmark.images,
        "features_s": figures["features_s"],
        "trials_s": figures["trials_s"],
        "of_pass": (figures["features_s"] + figures["trials_s"]) / figures["features_s"],
        "best": figures["val_accuracy"],
    }


def _search(job: SearchJob, name: str) -> dict[str, Any]:
    """Runs the first stage of a search in a temporary storage."""
    from mnist_dist.on_ray.search.search import run_first_stage

    with tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as scratch:
        job = replace(job, run=replace(job.run, storage=scratch))
        return run_first_stage(job, recipe=name.replace(" ", "-"), console=Console(terminal=False))


def _peer(job: SearchJob, *, trials: int) -> dict[str, Any]:
    """Runs KerasTuner over the job's space on the same number of images; the last tenth is for validation."""
    source = open_source(job.data)
    pixels, labels = source.pixels, source.table["label"].to_numpy()
    require(pixels is not None, "the images must be arrays in memory", data=job.data.data)
    train = [row for row, split in enumerate(source.table["split"].to_pylist()) if split in (None, "train")]
    first = int(len(train) * (1 - job.data.validation_fraction))
    with tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as folder:
        arrays = Path(folder) / "arrays.npz"
        chosen = np.asarray(pixels)
        np.savez(
            arrays,
            pixels=chosen[train[:first]].astype(np.float32),
            labels=labels[train[:first]],
            val_pixels=chosen[train[first:]].astype(np.float32),
            val_labels=labels[train[first:]],
        )
        argument = {
            "arrays": str(arrays),
            "scratch": folder,
            "shape": list(chosen.shape[1:]),
            "classes": len(source.class_names),
            "alpha": SMALL.alpha[0],
            "size_px": SMALL.image_size_px[0],
            "trials": trials,
            "epochs": job.search.trial_epochs,
            "seed": job.search.seed,
            "hidden_units": job.space.hidden_units,
            "dropout": job.space.dropout,
            "learning_rate": job.space.learning_rate,
            "batch_size": job.space.batch_size,
        }
        run_program([PEER, json.dumps(argument)], Path(folder))
        return last_json(Path(folder))
