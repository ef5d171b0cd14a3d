"""Speed of training: this loop on Ray Train (1 worker) compared with a bare train step and Keras' `fit`.

All three train the same network with Adam in float32. Each measurement has a process of its own, and the three take
turns over several rounds. Figures are medians, and ratios are medians of the rounds' ratios, since machines are noisy.

- bare: a `tf.function` train step on the same ready batch, one step per call; it reads and reports nothing.
- fit: `model.fit` on arrays in memory, compiled with Keras' defaults, after a short call that compiles it.
- job: `on_ray.train.train`, from the record cache, with progress and checkpoints; images/s within epochs.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal

import numpy as np

from mnist_dist import processor
from mnist_dist.config import DataConfig, FitConfig, ModelConfig, PhasesConfig, RunConfig, TrainJob, require
from mnist_dist.console import Console

Case = Literal["cnn", "vgg16-head", "vgg16-full"]
CASES: tuple[Case, ...] = ("cnn", "vgg16-head", "vgg16-full")
WARM_UP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark:
    """What to measure."""

    cases: tuple[Case, ...] = CASES
    """`cnn`: 28 x 28 MNIST, batch 128. `vgg16-head` and `vgg16-full`: 224 x 224, batch 16, random weights, training
    only the head or the whole network."""
    data_dir: str | None = None
    """Folder of MNIST's idx files. None: Keras downloads them."""
    rounds: int = 3
    """Number of measurements of each case."""
    seconds: float = 20.0
    """Approximate length of each measurement at steady state, s."""
    verbose: bool = False
    """Show the output of Ray and TensorFlow."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds must be at least 1", rounds=self.rounds)
        require(self.seconds > 0, "seconds must be positive", seconds=self.seconds)
        require(bool(self.cases), f"cases must be among {', '.join(CASES)}", cases=self.cases)


def measure(benchmark: TrainBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures every case; returns machine, date and one row per case with images/s and ratios."""
    rows = [_measure_case(case, benchmark, console=console) for case in benchmark.cases]
    return {"machine": processor.described(), "date": date.today().isoformat(), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| case | bare step | `fit` | this loop on Ray | of bare | of `fit` |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['case']} | {row['bare']:,.1f} | {row['fit']:,.1f} | {row['job']:,.1f} | {row['of_bare']:.2f} | "
            f"{row['of_fit']:.2f} |"
        )
    return "\n".join([*lines, f"\nimages/s; {result['machine']}, {result['date']}"])


def _measure_case(case: str, benchmark: TrainBenchmark, *, console: Console) -> dict[str, Any]:
    job = _job(case, benchmark)
    rate = _apart(bare_images_per_s, job, seconds=min(5.0, benchmark.seconds))
    steps = max(10, int(rate * benchmark.seconds / job.fit.global_batch))
    rounds: list[dict[str, float]] = []
    for number in range(benchmark.rounds):
        speeds = {
            "bare": _apart(bare_images_per_s, job, seconds=benchmark.seconds),
            "job": _job_images_per_s(job, steps, console=Console(terminal=False)),
            "fit": _apart(fit_images_per_s, job, steps=steps),
        }
        console.line(f"{case}, round {number + 1}: " + ", ".join(f"{k} {v:,.1f} images/s" for k, v in speeds.items()))
        rounds.append(speeds)
    return {
        "case": case,
        **{name: statistics.median(r[name] for r in rounds) for name in ("bare", "fit", "job")},
        "of_bare": statistics.median(r["job"] / r["bare"] for r in rounds),
        "of_fit": statistics.median(r["job"] / r["fit"] for r in rounds),
    }


def _job(case: str, benchmark: TrainBenchmark) -> TrainJob:
    if case == "cnn":
        data = DataConfig(data=("mnist",), data_dir=benchmark.data_dir)
        return TrainJob(data=data, fit=FitConfig(batch_size=128, precision="float32"))
    trainable = "head" if case == "vgg16-head" else "all"
    return TrainJob(
        model=ModelConfig(backbone="vgg16"),
        phases=PhasesConfig(epochs=(1,), learning_rate=(1e-5,), trainable=(trainable,)),
        fit=FitConfig(batch_size=16, precision="float32"),
    )


def _apart(measurement: Callable[..., float], job: TrainJob, **options: float) -> float:
    """Runs a measurement in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=_hush) as pool:
        return pool.submit(measurement, job, **options).result()


def _hush() -> None:
    """Silences TensorFlow's output on import, which no setting does; errors still come back as exceptions."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _classifier(job: TrainJob) -> tuple[Any, Any, Any]:
    """The job's classifier, and its decoded images and labels, uint8 [N, H, W, C] and int32 [N]."""
    from mnist_dist.models.backbones import backbone_size_px, find_backbone
    from mnist_dist.models.classifier import build_classifier, set_trainable
    from mnist_dist.sources.source import image_spec, open_source

    source = open_source(job.data)
    spec = image_spec(
        source,
        backbone_size_px=backbone_size_px(job.model),
        scratch_size=find_backbone(job.model.backbone).scratch,
        config=job.data,
    )
    classifier = build_classifier(job.model, spec=spec, num_classes=len(source.class_names))
    set_trainable(classifier, job.phases.in_order()[0].trainable)
    return classifier, source.pixels, source.table["label"].to_numpy().astype(np.int32)


def bare_images_per_s(job: TrainJob, *, seconds: float) -> float:
    """Speed of a train step on one ready batch, measured for about `seconds`."""
    import keras
    import tensorflow as tf

    classifier, pixels, labels = _classifier(job)
    network, batch = classifier.network, job.fit.global_batch
    optimizer = keras.optimizers.Adam(1e-5)
    variables = network.trainable_variables
    optimizer.build(variables)
    ready = (tf.constant(pixels[:batch].astype(np.float32)), tf.constant(labels[:batch]))

    @tf.function(jit_compile=False)  # type: ignore[untyped-decorator]
    def step(images: Any, targets: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = network(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits))
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    for _ in range(WARM_UP_STEPS):
        step(*ready)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        float(step(*ready))
        steps += 1
    return steps * batch / (time.perf_counter() - began)


def fit_images_per_s(job: TrainJob, *, steps: int) -> float:
    """Speed of one epoch of `steps` steps of Keras' `fit` on arrays in memory, compiled beforehand."""
    import keras

    classifier, pixels, labels = _classifier(job)
    rows = np.arange(steps * job.fit.global_batch) % len(labels)
    model = classifier.model
    model.compile(optimizer=keras.optimizers.Adam(1e-5), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    warm_up = rows[: WARM_UP_STEPS * job.fit.global_batch]
    model.fit(pixels[warm_up], labels[warm_up], batch_size=job.fit.global_batch, verbose=0)
    began = time.perf_counter()
    model.fit(pixels[rows], labels[rows], batch_size=job.fit.global_batch, epochs=1, verbose=0)
    return len(rows) / (time.perf_counter() - began)


def _job_images_per_s(job: TrainJob, steps: int, *, console: Console) -> float:
    """Speed of the whole job on Ray Train, over about `steps` steps."""
    from mnist_dist.on_ray.training.train import train

    batch = job.fit.global_batch
    with tempfile.TemporaryDirectory(prefix="mnist_dist-benchmark-") as storage:
        images = 54_000 if job.data.data == ("mnist",) else None
        epochs = max(1, round(steps * batch / images)) if images else 1
        limit = None if images else min(1_797, int(steps * batch / 0.8) + 1)
        job = replace(
            job,
            data=replace(job.data, limit=limit),
            phases=replace(job.phases, epochs=(epochs,)),
            run=RunConfig(storage=storage, workers=1, calibration=False, feature_cache=False),
        )
        return float(train(job, recipe="benchmark", console=console)["images_per_s"])
