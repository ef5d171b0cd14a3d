"""How fast cores feed a device: images/s from JPEG bytes in memory to uint8 batches in the device's memory.

JPEGs of about 68 KB (`photos`) are decoded by the product's decoder in as many threads as cores are asked for; each
full batch is handed to the device while the next one is decoded. Beside it stands the speed of the forward pass of each
backbone (`model`): a device is kept busy for the share of the time that the feed's speed is of that. Like `model` it
imports nothing at load that a machine with only JAX may lack.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from benchmarks.model import NAMES, run_compute
from mnist_dist import processor
from mnist_dist.config import require
from mnist_dist.console import Console

PHOTOS = 200
WANTED = 0.9
"""The share of the time that a device should be busy."""


@dataclass(frozen=True, kw_only=True)
class FeedBenchmark:
    """What to measure."""

    cores: tuple[int, ...] = ()
    """Numbers of cores to decode with. Empty: 1, and all of this machine."""
    backbones: tuple[str, ...] = ("vgg16", "resnet50", "mobilenet_v2")
    """The backbones to keep busy."""
    backend: Literal["tensorflow", "jax"] | None = None
    """What moves batches to the device and runs the backbones. None: jax if it has an accelerator or is the only one
    that is installed, else tensorflow."""
    size_px: int = 224
    """Height and width to which the photographs are decoded, px."""
    batch_size: int = 32
    """Images handed over at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the backbones' arithmetic."""
    seconds: float = 5.0
    """Length of each measurement, s."""
    quick: bool = False
    """Measure each for a second."""
    verbose: bool = False
    """Show the output of the backend."""

    def __post_init__(self) -> None:
        require(all(each >= 1 for each in self.cores), "cores must be at least 1", cores=self.cores)
        for name in ("size_px", "batch_size", "seconds"):
            require(getattr(self, name) > 0, f"{name} must be positive", **{name: getattr(self, name)})


def measure(benchmark: FeedBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures.

    Returns:
        `machine`, `device`, `date`; `feed`: cores, images_per_s; `backbones`: backbone, images_per_s of the device,
        cores_needed to keep it busy for 90 % of the time, and busy, the share with the most cores measured.
    """
    backend = benchmark.backend or ("jax" if _prefers_jax() else "tensorflow")
    seconds = 1.0 if benchmark.quick else benchmark.seconds
    rates, device = dict[str, float](), ""
    for backbone in benchmark.backbones:
        asked = {"backbone": backbone, "work": "infer", "system": backend, "batch_size": benchmark.batch_size}
        asked |= {"size_px": benchmark.size_px, "precision": benchmark.precision, "seconds": seconds}
        found = run_compute(asked, verbose=benchmark.verbose)
        if "error" in found:
            console.line(f"{backbone}: {found['error']}")
            continue
        rates[backbone], device = found["images_per_s"], found["device"]
        console.line(f"{backbone}, {NAMES[backend]}: {found['images_per_s']:,.1f} images/s")
    feed = list(_measure_feed(benchmark, backend, seconds=seconds, console=console))
    return {
        "machine": processor.described(),
        "device": device,
        "backend": backend,
        "date": date.today().isoformat(),
        "feed": feed,
        "backbones": busy_of(rates, feed),
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown tables."""
    lines = ["| cores | JPEG to device, images/s |", "|---|---|"]
    lines += [f"| {row['cores']} | {row['images_per_s']:,.0f} |" for row in result["feed"]]
    most = max(row["cores"] for row in result["feed"])
    lines += [
        "",
        f"| backbone | device, images/s | cores for {WANTED:.0%} | busy with {most} cores |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['backbone']} | {row['images_per_s']:,.1f} | {row['cores_needed']:.1f} | {row['busy']:.0%} |"
        for row in result["backbones"]
    ]
    ran = f"{NAMES[result['backend']]}, {result['device']}"
    return "\n".join([*lines, f"\n{result['machine']}; {ran}; {result['date']}"])


def busy_of(rates: Mapping[str, float], feed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each backbone, how many cores keep the device busy, and for which share of the time the most cores do."""
    fastest = max(feed, key=lambda row: row["cores"])
    of_core = fastest["images_per_s"] / fastest["cores"]
    return [
        {
            "backbone": backbone,
            "images_per_s": rate,
            "cores_needed": WANTED * rate / of_core,
            "busy": min(1.0, fastest["images_per_s"] / rate),
        }
        for backbone, rate in rates.items()
    ]


def _prefers_jax() -> bool:
    if find_spec("jax") is None:
        return False
    if find_spec("tensorflow") is None:
        return True
    import jax

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # The measurements need the GPU's memory.
    return bool(jax.default_backend() != "cpu")


def _measure_feed(
    benchmark: FeedBenchmark, backend: str, *, seconds: float, console: Console
) -> Iterator[dict[str, Any]]:
    from benchmarks.photos import write_photos

    with tempfile.TemporaryDirectory(prefix="mnist_dist-feed-") as folder:
        photos = [path.read_bytes() for path in write_photos(Path(folder) / "photos", count=PHOTOS)]
    for cores in benchmark.cores or sorted({1, processor.usable_cpus()}):
        rate = _feed_images_per_s(benchmark, backend, photos, cores=cores, seconds=seconds)
        console.line(f"{cores} core(s): {rate:,.0f} images/s from JPEG to device")
        yield {"cores": cores, "images_per_s": rate}


def _feed_images_per_s(
    benchmark: FeedBenchmark, backend: str, photos: Sequence[bytes], *, cores: int, seconds: float
) -> float:
    """Images/s over whole batches: one is on its way to the device while the next is decoded."""
    from mnist_dist.images.decoder import decode_image
    from mnist_dist.images.spec import ImageSpec

    spec = ImageSpec(height_px=benchmark.size_px, width_px=benchmark.size_px, channels=3)
    endless = itertools.cycle(photos)

    def batch(pool: ThreadPoolExecutor) -> npt.NDArray[np.uint8]:
        images = list(itertools.islice(endless, benchmark.batch_size))
        return np.stack(list(pool.map(lambda data: decode_image(data, spec).pixels, images)))

    send, wait = _device(backend)
    with ThreadPoolExecutor(cores) as pool:
        wait(send(batch(pool)))  # warms up
        began, count, on_its_way = time.perf_counter(), 0, None
        while time.perf_counter() - began < seconds:
            decoded = batch(pool)
            if on_its_way is not None:
                wait(on_its_way)
            on_its_way = send(decoded)
            count += len(decoded)
        wait(on_its_way)
        return count / (time.perf_counter() - began)


def _device(backend: str) -> tuple[Any, Any]:
    """How to send a batch to the device, and how to wait for it."""
    if backend == "jax":
        import jax

        return jax.device_put, jax.block_until_ready
    import tensorflow as tf

    return tf.constant, lambda batch: None
