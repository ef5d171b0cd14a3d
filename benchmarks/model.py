"""Speed of a network alone: forward pass and training step on ready tensors, on each backend, without Ray.

Each measurement is a process of its own (`peers/compute.py`), and they take turns. Ours are the `keras` engine of
scoring and the step of training; PyTorch runs the same network with `torch.compile`, in channels_last, with autocast.
Neither this module nor what it runs imports Ray, TensorFlow, tyro or a store's client at load, so that it also runs on
a machine that has only JAX and PyTorch (`gpu.sh`).
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mnist_dist import processor
from mnist_dist.config import require
from mnist_dist.console import Console

System = Literal["tensorflow", "jax", "openvino", "torch"]
Work = Literal["infer", "train"]
NAMES: dict[str, str] = {
    "tensorflow": "Keras on TensorFlow",
    "jax": "Keras on JAX",
    "openvino": "OpenVINO",
    "torch": "PyTorch, compiled",
}
PACKAGES: dict[str, tuple[str, ...]] = {"torch": ("torch", "timm"), "jax": ("jax",)}
ROOT = Path(__file__).parents[1]
TIMEOUT_S = 1_800
QUICK_S = 215.0
"""A quick run ends its measurements by then, s; the rest of the four minutes is for what comes after them."""


@dataclass(frozen=True, kw_only=True)
class ModelBenchmark:
    """What to measure."""

    backbones: tuple[str, ...] = ("vgg16", "resnet50", "mobilenet_v2")
    """Backbones of the table; each with its default head for 10 classes."""
    backend: tuple[System, ...] = ("tensorflow", "jax", "openvino", "torch")
    """On what to run them. `openvino` only predicts, and only on CPUs; what is not installed is left out."""
    train: bool = False
    """Measure only the training step."""
    infer: bool = False
    """Measure only the forward pass."""
    size_px: int = 224
    """Height and width of the images, px."""
    infer_batch: int = 32
    """Images per forward pass."""
    train_batch: int = 16
    """Images per training step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the arithmetic; weights are float32. OpenVINO computes in float32."""
    seconds: float = 5.0
    """Length of each measurement, s."""
    quick: bool = False
    """Measure each for a second, and end within four minutes; what there was no time for is named."""
    verbose: bool = False
    """Show the output of the backends."""

    def __post_init__(self) -> None:
        require(bool(self.backbones), "backbones must name at least one backbone", backbones=())
        require(bool(self.backend), "backend must name at least one", backend=())
        require(not (self.train and self.infer), "choose either train or infer, or neither for both", train=True)
        for name in ("size_px", "infer_batch", "train_batch", "seconds"):
            require(getattr(self, name) > 0, f"{name} must be positive", **{name: getattr(self, name)})

    @property
    def works(self) -> tuple[Work, ...]:
        """What to measure of each."""
        return ("train",) if self.train else ("infer",) if self.infer else ("infer", "train")


def measure(benchmark: ModelBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures.

    Returns:
        `machine`, `device`, `date`, `rows`: backbone, work, system, batch_size, images_per_s, share_of_peak,
        compile_s, memory_bytes, flops_per_image. `skipped`: what there was no time or package for, and what failed.
    """
    rows, skipped = list[dict[str, Any]](), list[str]()
    began = time.monotonic()
    for backbone in benchmark.backbones:
        for work in benchmark.works:
            for system in benchmark.backend:
                name = f"{backbone}, {work}, {NAMES[system]}"
                missing = [each for each in PACKAGES.get(system, ()) if find_spec(each) is None]
                if missing:
                    skipped.append(f"{name}: {missing[0]} is not installed")
                elif (system, work) != ("openvino", "train"):
                    left_s = QUICK_S - (time.monotonic() - began) if benchmark.quick else TIMEOUT_S
                    asked = _asked(benchmark, backbone, work, system)
                    found = run_compute(asked, timeout_s=left_s, verbose=benchmark.verbose)
                    if "error" in found:
                        skipped.append(f"{name}: {found['error']}")
                        continue
                    rows.append({**{key: asked[key] for key in _KEYS}, **found})
                    speed, compile_s = found["images_per_s"], found["compile_s"]
                    console.line(f"{name}: {speed:,.1f} images/s, compiled in {compile_s:.1f} s")
    devices = list(dict.fromkeys(row["device"] for row in rows))
    return {
        "machine": processor.described(),
        "device": ", ".join(devices),
        "date": date.today().isoformat(),
        "rows": rows,
        "skipped": skipped,
    }


_KEYS = ("backbone", "work", "system", "batch_size")


def _asked(benchmark: ModelBenchmark, backbone: str, work: Work, system: System) -> dict[str, Any]:
    return {
        "backbone": backbone,
        "work": work,
        "system": system,
        "batch_size": benchmark.infer_batch if work == "infer" else benchmark.train_batch,
        "size_px": benchmark.size_px,
        "precision": benchmark.precision,
        "seconds": 1.0 if benchmark.quick else benchmark.seconds,
    }


def run_compute(asked: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S, verbose: bool) -> dict[str, Any]:
    """Runs `peers/compute.py` in a process of its own; its answer, or `{"error": ...}`."""
    if timeout_s <= 0:
        return {"error": "no time left"}
    command = [sys.executable, "-m", "benchmarks.peers.compute", json.dumps(dict(asked))]
    errors = None if verbose else subprocess.PIPE
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished within {timeout_s:.0f} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    lines = (done.stderr or "").strip().splitlines()
    return {"error": lines[-1] if lines else f"exit code {done.returncode}"}


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown tables, one for each kind of work."""
    works = list(dict.fromkeys(row["work"] for row in result["rows"]))
    parts = [_table_of(work, [row for row in result["rows"] if row["work"] == work]) for work in works]
    return "\n\n".join([*parts, *result["skipped"], f"{result['machine']}; {result['device']}; {result['date']}"])


def _table_of(work: str, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"| {'forward pass' if work == 'infer' else 'training step'} | batch | images/s | of PyTorch | of the peak | "
        "memory, MB | compile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    of_torch = {row["backbone"]: row["images_per_s"] for row in rows if row["system"] == "torch"}
    for row in rows:
        ratio = _shown(of_torch.get(row["backbone"]), lambda torch, row=row: f"{row['images_per_s'] / torch:.2f}")
        share = _shown(row["share_of_peak"], lambda value: f"{value:.0%}")
        lines.append(
            f"| {row['backbone']}, {NAMES[row['system']]} | {row['batch_size']} | {row['images_per_s']:,.1f} | {ratio} "
            f"| {share} | {row['memory_bytes'] / 1e6:,.0f} | {row['compile_s']:.1f} |"
        )
    return "\n".join(lines)


def _shown(value: float | None, show: Callable[..., str]) -> str:
    return "" if value is None else show(value)
