"""The features pass of a frozen backbone: its reference (Keras, or ONNX Runtime for a bundle) beside the engine that a
job chooses, in turn in the same run.

Times are those of the pass on the cluster's actors, from the first shard to the last, without start-up and without the
choice of the engine.
"""

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from mnist_dist import processor
from mnist_dist.config import DataConfig, ModelConfig, require
from mnist_dist.console import Console, Stop
from mnist_dist.session import Session


@dataclass(frozen=True, kw_only=True)
class FeaturesBenchmark:
    """What to measure."""

    backbone: str = "mobilenet_v2"
    """As in training: a name, or an imported bundle."""
    weights: str = "none"
    """As in training; the speed does not depend on them."""
    image_size_px: int | None = 96
    """Height and width of the backbone's input, px. None: its own."""
    data_dir: str | None = None
    """Folder of MNIST's idx files. None: Keras downloads them."""
    images: int = 10_000
    """Digits of each pass."""
    rounds: int = 3
    """Passes of each engine."""
    verbose: bool = False
    """Show the output of Ray and TensorFlow."""

    def __post_init__(self) -> None:
        for name in ("images", "rounds"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", **{name: getattr(self, name)})


def measure(benchmark: FeaturesBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures both engines in turn; returns machine, date, the engine, images/s of each pass and their ratio."""
    from mnist_dist.on_ray.cluster import connected
    from mnist_dist.on_ray.data.features import compute_missing, feature_actors
    from mnist_dist.training.feature_engine import kept_engine

    rates: dict[str, list[float]] = {"reference": [], "chosen": []}
    engine = "none"
    with (
        tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as scratch,
        Stop(console) as stop,
        connected(verbose=benchmark.verbose, stop=stop) as have,
    ):
        session = Session(console=console, stop=stop)
        for number, plan in enumerate(_plans(benchmark, Path(scratch), console=console)):
            name = ("reference", "chosen")[number % 2]
            actors = feature_actors(have, backbone=plan.model.backbone)
            rate = compute_missing(plan, session, actors=actors, title=name, compare=name == "chosen")
            rates[name].append(rate or 0.0)
            kept = kept_engine(plan)
            engine = engine if kept is None else kept.engine
    ratios = [ours / theirs for ours, theirs in zip(rates["chosen"], rates["reference"], strict=True)]
    return {
        "machine": processor.described(),
        "date": date.today().isoformat(),
        "images": benchmark.images,
        "engine": engine,
        "images_per_s": rates,
        "ratio": statistics.median(ratios),
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = [f"| features of {result['images']:,} images | images/s |", "|---|---|"]
    for name, rates in result["images_per_s"].items():
        lines.append(f"| {name} | {', '.join(f'{rate:,.0f}' for rate in rates)} |")
    return "\n".join(
        [
            *lines,
            f"\n{result['engine']} {result['ratio']:.2f} times as fast (median); {result['machine']}, {result['date']}",
        ]
    )


def _plans(benchmark: FeaturesBenchmark, scratch: Path, *, console: Console) -> Iterator[Any]:
    """The features of the same decoded digits, for every pass in a folder of its own."""
    from mnist_dist.data.records import finish, read_index
    from mnist_dist.on_ray.data.prepare import list_data
    from mnist_dist.store.uris import absolute
    from mnist_dist.training.features import plan_features

    model = ModelConfig(
        backbone=absolute(benchmark.backbone) if "/" in benchmark.backbone else benchmark.backbone,
        weights=benchmark.weights,
        image_size_px=benchmark.image_size_px,
    )
    data = DataConfig(data=("mnist",), data_dir=benchmark.data_dir, limit=benchmark.images, channels="3")
    listed = list_data(data, model, root=str(scratch), console=console)
    finish(listed.plan, listed.source)
    index = read_index(listed.plan.cache)
    for number in range(2 * benchmark.rounds):
        yield plan_features(
            model,
            records=listed.plan,
            index=index,
            rows=np.arange(min(len(index), benchmark.images)),
            precision="float32",
            stored_as="float16",
            seed=0,
            root=str(scratch / str(number)),
        )
