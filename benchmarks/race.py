"""Which search finds the better network in the same time: ours, KerasTuner's Hyperband, and Ray Tune with Optuna.

All search the networks of `search-mnist` on the same digits with the same seeds. Ours begins: it gets `--hours`, and
its whole time, with start-up, finalists and test, is what the others get for their searches. Each one's winner is
chosen by validation images and tested once on the test digits.
"""

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np

from benchmarks.programs import last_json, run_program
from mnist_dist import processor
from mnist_dist.config import DataConfig, require
from mnist_dist.console import Console
from mnist_dist.recipes import search_mnist
from mnist_dist.sources.source import open_source

Racer = Literal["ours", "keras_tuner", "ray_tune"]
NAMES: dict[str, str] = {
    "ours": "`mnist-dist search search-mnist`",
    "keras_tuner": "KerasTuner, Hyperband",
    "ray_tune": "Ray Tune, Optuna and ASHA",
}
MANY_TRIALS = 1_000


@dataclass(frozen=True, kw_only=True)
class RaceBenchmark:
    """What to measure."""

    data_dir: str
    """Folder of MNIST's idx files."""
    weights: tuple[str, ...] = ()
    """Weights of the pretrained backbones, such as `vgg16=FILE mobilenet_v2=FILE`. Without it: ImageNet's, by Keras."""
    backbones: tuple[str, ...] = ()
    """Search only these backbones. Empty: all of `search-mnist`."""
    images: int = 10_000
    """Training and validation images."""
    minutes: float = 5.0
    """Time for each search."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each search runs once with each of these."""
    racers: tuple[Racer, ...] = ("ours", "keras_tuner", "ray_tune")
    """Whom to measure; `ours` is always the first."""
    picture: str | None = None
    """File (SVG) for a picture of the best validation accuracy over time."""
    verbose: bool = False
    """Show the output of Ray and TensorFlow."""

    def __post_init__(self) -> None:
        require(bool(self.seeds), "seeds must name at least one seed", seeds=self.seeds)
        require(self.minutes > 0, "minutes must be positive", minutes=self.minutes)
        require(self.images >= 100, "images must be at least 100", images=self.images)


def measure(benchmark: RaceBenchmark, *, console: Console) -> dict[str, Any]:
    """Runs every race; returns machine, date and a row per racer and seed."""
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="mnist_dist-race-") as folder:
        arrays = _write_arrays(benchmark, Path(folder))
        for seed in benchmark.seeds:
            seconds = benchmark.minutes * 60
            for racer in sorted(benchmark.racers, key=list(NAMES).index):
                scratch = Path(folder) / f"{racer}-{seed}"
                scratch.mkdir()
                if racer == "ours":
                    row = _ours(benchmark, scratch, seed=seed)
                    seconds = row["seconds"]
                else:
                    row = _peer(benchmark, racer, scratch, arrays=arrays, seed=seed, seconds=seconds)
                rows.append({"racer": racer, "seed": seed, **row})
                console.line(
                    f"{racer}, seed {seed}: {row['trials']} trials in {row['seconds']:.0f} s, "
                    f"validation {row['val_accuracy']:.4f}, test {row['test_accuracy']:.4f}"
                )
    if benchmark.picture:
        Path(benchmark.picture).write_bytes(picture(rows))
    return {"machine": processor.described(), "date": date.today().isoformat(), "rows": rows}


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    rows = result["rows"]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"| search | {' | '.join(f'test, seed {seed}' for seed in seeds)} | mean | trials | s |",
        f"|---|{'---|' * (len(seeds) + 3)}",
    ]
    for racer in dict.fromkeys(row["racer"] for row in rows):
        own = [row for row in rows if row["racer"] == racer]
        tests = " | ".join(f"{row['test_accuracy']:.2%}" for row in own)
        lines.append(
            f"| {NAMES[racer]} | {tests} | {mean(row['test_accuracy'] for row in own):.2%} | "
            f"{mean(row['trials'] for row in own):.0f} | {mean(row['seconds'] for row in own):.0f} |"
        )
    return "\n".join([*lines, f"\n{result['machine']}, {result['date']}"])


def picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """An SVG of the mean best validation error so far over time, a line for each racer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    end = max(row["seconds"] for row in rows)
    at = np.linspace(1, end, 400)
    for racer in dict.fromkeys(row["racer"] for row in rows):
        errors = np.array([100 * (1 - _best_at(row["curve"], at)) for row in rows if row["racer"] == racer])
        begun = ~np.isnan(errors).all(axis=0)
        axes.plot(at[begun], np.nanmean(errors[:, begun], axis=0), label=NAMES[racer].strip("`"))
    axes.set(xlabel="seconds since the command was typed", ylabel="validation error, %", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _best_at(curve: Sequence[tuple[float, float]], at: Any) -> Any:
    """Best accuracy so far at each time; NaN before the first."""
    times, best = np.array(curve).T
    places = np.searchsorted(times, at, side="right") - 1
    return np.where(places >= 0, np.maximum.accumulate(best)[np.maximum(places, 0)], np.nan)


def _ours(benchmark: RaceBenchmark, scratch: Path, *, seed: int) -> dict[str, Any]:
    flags = ["--data-dir", benchmark.data_dir, "--limit", str(benchmark.images), "--seed", str(seed)]
    flags += ["--storage", str(scratch), "--name", "race", "--trials", str(MANY_TRIALS)]
    flags += ["--hours", str(benchmark.minutes / 60)]
    for name in ("weights", "backbones"):
        flags += [f"--{name}", *getattr(benchmark, name)] if getattr(benchmark, name) else []
    seconds = run_program(["jobs.search", "search-mnist", *flags], scratch)
    found = last_json(scratch)
    return {
        "seconds": seconds,
        "trials": found["trials"],
        "curve": _curve_of(scratch / "race", seconds),
        "val_accuracy": found["best"]["val_accuracy"],
        "test_accuracy": found["best"]["test_accuracy"],
    }


def _curve_of(run: Path, seconds: float) -> list[tuple[float, float]]:
    """The best validation accuracy so far over time, from the times at which trials and finalists were recorded."""
    ended_at = (run / "result.json").stat().st_mtime
    points = list[tuple[float, float]]()
    for folder in ("trials", "finalists"):
        for path in (run / folder).glob("*.json"):
            accuracy = json.loads(path.read_text())["val_accuracy"]
            if accuracy is not None:
                points.append((seconds - (ended_at - path.stat().st_mtime), accuracy))
    return sorted(points)


def _peer(
    benchmark: RaceBenchmark, racer: str, scratch: Path, *, arrays: Path, seed: int, seconds: float
) -> dict[str, Any]:
    job = search_mnist()
    weights = dict(pair.split("=", 1) for pair in benchmark.weights)
    spaces = [asdict(space) for space in job.space.backbones]
    values = asdict(job.space)
    argument = {
        **{name: value for name, value in values.items() if name != "backbones"},
        "backbones": [
            {**space, "weights": weights.get(space["backbone"], space["weights"])}
            for space in spaces
            if not benchmark.backbones or space["backbone"] in benchmark.backbones
        ],
        "arrays": str(arrays),
        "scratch": str(scratch),
        "seconds": seconds,
        "seed": seed,
        "trial_epochs": job.search.trial_epochs,
    }
    run_program([f"benchmarks.peers.race_{racer}", json.dumps(argument)], scratch)
    return last_json(scratch)


def _write_arrays(benchmark: RaceBenchmark, folder: Path) -> Path:
    """The digits for the peers: of the first `images` the last tenth is for validation; and the test digits."""
    data = DataConfig(data=("mnist",), data_dir=benchmark.data_dir, limit=benchmark.images)
    source = open_source(data)
    pixels, labels = np.asarray(source.pixels), source.table["label"].to_numpy()
    of_split = {
        name: [row for row, split in enumerate(source.table["split"].to_pylist()) if split == name]
        for name in ("train", "test")
    }
    first = int(len(of_split["train"]) * 0.9)
    rows = {"": of_split["train"][:first], "val_": of_split["train"][first:], "test_": of_split["test"]}
    path = folder / "arrays.npz"
    arrays = {f"{name}pixels": pixels[chosen] for name, chosen in rows.items()}
    arrays |= {f"{name}labels": labels[chosen] for name, chosen in rows.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path
