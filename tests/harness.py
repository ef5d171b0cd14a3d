"""What the tests of several jobs share: a console that can be looked at, a command's answer, a bundle to score with,
and whether a process runs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from mnist_dist.config import ModelConfig
from mnist_dist.console import Console
from mnist_dist.data.images import ImageSpec
from mnist_dist.models.bundle import write_bundle
from mnist_dist.models.classifier import build_classifier

ROOT = Path(__file__).parents[1]
SPEC = ImageSpec(height_px=12, width_px=14, channels=3)
CLASSES = ("ant", "bee", "cat", "dog", "eel")


class Recorder(Console):
    """A console that keeps its lines, and calls back at the first line that starts with some words."""

    def __init__(self, at: str | None = None, then: Callable[[], Any] | None = None) -> None:
        super().__init__(terminal=False)
        self.lines: list[str] = []
        self._at, self._then = at, then

    def line(self, text: str) -> None:
        self.lines.append(text)
        if self._at is not None and self._then is not None and text.startswith(self._at):
            self._at = None
            self._then()


def run_command(*arguments: str, timeout_s: float, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Runs `python -m ...` from the root of the project: exit code, JSON of stdout's last line, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}, done.stderr


def is_alive(pid: int) -> bool:
    """Whether a process runs; not where it has ended and nobody has collected it."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def write_spread_bundle(path: Path, *, images: Sequence[Image.Image], seed: int) -> Path:
    """A bundle of random weights, but such that these images (of `SPEC`'s size) are spread over the classes."""
    model = build_classifier(ModelConfig(backbone="cnn"), spec=SPEC, num_classes=len(CLASSES), seed=seed).model
    logits = model.get_layer("logits")
    kernel, bias = logits.get_weights()
    mean = np.log(np.asarray(model(np.stack([np.asarray(image) for image in images])))).mean(axis=0)
    logits.set_weights([kernel * 50, (bias - mean) * 50])
    write_bundle(
        path,
        model=model,
        class_names=CLASSES,
        spec=SPEC,
        backbone="cnn",
        weights="none",
        config={},
        data_fingerprint="none",
        validation={},
        test={},
        history_csv="",
        calibration=None,
    )
    return path
