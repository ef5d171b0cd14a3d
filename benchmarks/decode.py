"""CPU time of decoding one image of each kind, of this checkout and of another one, in turns.

Owns: the images and the program that decodes them. Does not own: the decoders.

Contract: each checkout decodes the same bytes in processes of its own, which take turns. CPU time of the thread is
measured, not wall time, and of all rounds the shortest counts, because other work on the machine can only add to it.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mnist_dist import processor
from mnist_dist.config import require
from mnist_dist.console import Console

CHECKOUT = Path(__file__).parents[1]
PROGRAM = """
import json, pathlib, sys, time
from mnist_dist.images.decoder import ImageSpec, decode_image

def shortest_s(data, spec, rounds=9):
    best = float("inf")
    for _ in range(rounds):
        count, began = 0, time.thread_time()
        while time.thread_time() - began < 0.06:
            decode_image(data, spec)
            count += 1
        best = min(best, (time.thread_time() - began) / count)
    return best

found = {}
edge = {"resize": "shortest-edge", "resize_px": 256, "resampling": "pillow"}
stretch = {"resampling": "keras", "antialias": False}
RULES = {
    "bilinear of Pillow": edge,
    "bicubic of Pillow": {**edge, "interpolation": "bicubic"},
    "bilinear of Keras": stretch,
    "bicubic of Keras": {**stretch, "interpolation": "bicubic"},
}
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    side, channels = (28, 1) if path.name.startswith("digit") else (224, 3)
    spec = ImageSpec(height_px=side, width_px=side, channels=channels)
    data = path.read_bytes()
    decode_image(data, spec)
    found[path.name] = shortest_s(data, spec)
    for name, rule in RULES.items():
        if path.name == "jpeg" and "quality" in ImageSpec.__dataclass_fields__:  # an older checkout has no rules
            for quality in ("exact", "fast"):
                fitted = ImageSpec(height_px=side, width_px=side, channels=channels, quality=quality, **rule)
                found[f"jpeg, {quality}, {name}"] = shortest_s(data, fitted)
print(json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True)
class DecodeBenchmark:
    """Measures the decoders of this checkout beside those of another one."""

    other: str | None = None
    """Folder of another checkout, for example `git worktree add --detach ../before COMMIT`. None: only this one."""
    rounds: int = 3
    """How often each checkout is measured."""
    verbose: bool = False
    """Show what the libraries print."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds must be at least 1", rounds=self.rounds)
        is_checkout = self.other is None or (Path(self.other) / "mnist_dist").is_dir()
        require(is_checkout, "other must be the folder of a checkout, with mnist_dist/ in it", other=self.other)


def measure(benchmark: DecodeBenchmark, *, console: Console) -> dict[str, Any]:
    """Measures.

    Returns:
        `seconds`: checkout (`this`, `other`) -> kind -> CPU seconds of one image; `machine`, `date`.
    """
    checkouts = {"this": CHECKOUT} | ({"other": Path(benchmark.other)} if benchmark.other else {})
    shortest: dict[str, dict[str, float]] = {name: {} for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for name, data in images().items():
            (Path(folder) / name).write_bytes(data)
        for number in range(benchmark.rounds):
            for name, checkout in checkouts.items():
                console.line(f"round {number + 1} of {benchmark.rounds}: {checkout}")
                for kind, seconds in _run(checkout, folder).items():
                    shortest[name][kind] = min(seconds, shortest[name].get(kind, seconds))
    return {"seconds": shortest, "machine": processor.described(), "date": date.today().isoformat()}


def table(result: Mapping[str, Any]) -> str:
    """The figures, and the speed of this checkout as a multiple of the other one's."""
    this, other = result["seconds"]["this"], result["seconds"].get("other", {})
    lines = [f"{'kind':34}us an image   other us    speed"]
    for kind, seconds in this.items():
        beside = f"{other[kind] * 1e6:11,.1f}{other[kind] / seconds:9.3f}" if kind in other else ""
        lines.append(f"{kind:33}{seconds * 1e6:12,.1f}{beside}")
    return "\n".join(lines)


def images() -> dict[str, bytes]:
    """An image of each kind by name: photographs of 500 x 375 px unless it says otherwise, digits of 28 x 28."""
    rng = np.random.default_rng(0)
    photo, large = _photo(rng, 375, 500), _photo(rng, 1500, 2000)
    digit = Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": _encoded(photo, "JPEG", quality=85),
        "jpeg, progressive": _encoded(photo, "JPEG", quality=85, progressive=True),
        "jpeg, turned": _encoded(photo, "JPEG", quality=85, exif=turned),
        "jpeg, 2000 x 1500": _encoded(large, "JPEG", quality=85),
        "png": _encoded(photo, "PNG"),
        "png, transparent": _encoded(photo.convert("RGBA"), "PNG"),
        "gif": _encoded(photo, "GIF"),
        "webp": _encoded(photo, "WEBP"),
        "tiff": _encoded(photo, "TIFF"),
        "bmp": _encoded(photo, "BMP"),
        "digit, png": _encoded(digit, "PNG"),
        "digit, jpeg": _encoded(digit, "JPEG"),
    }


def _photo(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, np.float32) + rng.normal(size=(height, width, 3)) * 8
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _run(checkout: Path, folder: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, "-c", PROGRAM, folder]
    done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found
