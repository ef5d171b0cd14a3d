"""Models for the scoring benchmark: bundles with random weights, and their engines, converted and checked beforehand.

Owns: the choice of models, sizes and batches. Does not own: building, converting or checking them (`models/`,
`engines/`).
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from mnist_dist import processor
from mnist_dist.config import EngineConfig, ModelConfig
from mnist_dist.console import Console, Stop
from mnist_dist.engines.choice import EngineChoice, EngineRequest, prepare_engine
from mnist_dist.models.bundle import load_bundle
from mnist_dist.session import Session

NUM_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Case:
    """Image size and batch size with which to measure a model."""

    size_px: int
    batch_size: int
    channels: int = 3
    backbone: str | None = None
    """None: that of the case's name."""


CASES: dict[str, Case] = {
    "mobilenet_v2": Case(size_px=224, batch_size=32),
    "vgg16": Case(size_px=224, batch_size=16),
    "cnn": Case(size_px=32, batch_size=2),
    "digits": Case(size_px=28, batch_size=32, channels=1, backbone="cnn"),
}


def make_bundle(path: Path, model: str) -> None:
    """Writes a bundle of an untrained model with seeded weights, in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_hush) as pool:
        pool.submit(_write_random_bundle, path, model).result()


def ready_engine(path: Path, requested: EngineConfig, *, batch_size: int, console: Console) -> EngineChoice:
    """Prepares the CPU engine that a job uses for a bundle, so that the job need not convert or check anything.

    Args:
        path: path of the bundle; converted models go next to it, where the job looks for them.
        requested: the job's engine configuration.
        batch_size: images per call.
        console: shows progress.

    Raises:
        MnistDistError: see `prepare_engine`.
    """
    with Stop(console) as stop:
        request = EngineRequest(
            requested=requested,
            places=(f"{path}.engines",),
            gpu=False,
            batch_size=batch_size,
            cpus=processor.usable_cpus(),
        )
        return prepare_engine(load_bundle(str(path)), request, session=Session(console=console, stop=stop))


def _hush() -> None:
    """Silences TensorFlow's output on import, which no setting does; errors still come back as exceptions."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _write_random_bundle(path: Path, model: str) -> None:
    from mnist_dist.images.pixels import ImageSpec
    from mnist_dist.models.bundle import BundleInfo, write_bundle
    from mnist_dist.models.classifier import build_classifier

    case = CASES[model]
    backbone = case.backbone or model
    spec = ImageSpec(height_px=case.size_px, width_px=case.size_px, channels=case.channels)
    network = build_classifier(ModelConfig(backbone=backbone), spec=spec, num_classes=NUM_CLASSES, seed=0).model
    class_names = tuple(f"class-{number}" for number in range(NUM_CLASSES))
    write_bundle(path, network, BundleInfo(class_names=class_names, spec=spec, backbone=backbone))
