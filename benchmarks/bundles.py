"""Models for the scoring benchmark: bundles with random weights, and their engines, converted and checked beforehand.

Owns: the choice of models, sizes and batches. Does not own: building, converting or checking them (`models/`,
`engines/`), importing them (`importing/`), or the graph of ResNet18 (`resnet18`).
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import mnist_dist
from mnist_dist import processor
from mnist_dist.config import ModelConfig
from mnist_dist.console import Console, Stop
from mnist_dist.engines.choice import EngineChoice, EngineRequest, prepare_engine
from mnist_dist.models.bundle import load_bundle
from mnist_dist.score_config import EngineConfig
from mnist_dist.session import Session

Origin = Literal["trained", "exported", "built"]
NUM_CLASSES = 10
RESNET18 = "resnet18"
TORCHVISION: dict[str, Any] = {"preset": "imagenet", "resize": "shortest-edge", "resize_px": 256}
"""How torchvision's ResNet18 takes images, as flags of an import."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Image size and batch size with which to measure a model."""

    size_px: int
    batch_size: int
    channels: int = 3
    backbone: str | None = None
    """None: that of the case's name."""
    origin: Origin = "trained"
    """`trained`: a Keras bundle, as training writes it. `exported`: that bundle exported to ONNX, and imported from
    there. `built`: ResNet18's ONNX graph, imported."""

    @property
    def is_imported(self) -> bool:
        """Whether the bundle was imported from an ONNX file, which lies beside it."""
        return self.origin != "trained"


CASES: dict[str, Case] = {
    "mobilenet_v2": Case(size_px=224, batch_size=32),
    "mobilenet_v2_onnx": Case(size_px=224, batch_size=32, backbone="mobilenet_v2", origin="exported"),
    "vgg16": Case(size_px=224, batch_size=16),
    RESNET18: Case(size_px=224, batch_size=32, origin="built"),
    "cnn": Case(size_px=32, batch_size=2),
    "digits": Case(size_px=28, batch_size=32, channels=1, backbone="cnn"),
}


def make_bundle(path: Path, case: Case, *, name: str) -> None:
    """Writes a bundle of an untrained model with seeded weights; an imported one leaves its source in `{path}.onnx`.

    Args:
        path: the folder to create.
        case: what to build.
        name: the backbone, if the case has none of its own.

    Raises:
        MnistDistError: the export or the import failed.
    """
    source = Path(f"{path}.onnx")
    if case.origin == "trained":
        _in_a_process(_write_random_bundle, path, case, name)
        return
    if case.origin == "exported":
        keras, exported = Path(f"{path}.keras-bundle"), Path(f"{path}.export")
        _in_a_process(_write_random_bundle, keras, case, name)
        mnist_dist.export(str(keras), format="onnx", output=str(exported))
        (exported / "model.onnx").rename(source)
        mnist_dist.import_model(str(source), output=str(path), resize="stretch")
        return
    _in_a_process(_write_resnet18, source)
    mnist_dist.import_model(str(source), output=str(path), **TORCHVISION)


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


def _in_a_process(write: Any, *arguments: Any) -> None:
    """Frameworks stay out of this process, and their output off the terminal."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_hush) as pool:
        pool.submit(write, *arguments).result()


def _hush() -> None:
    """Silences TensorFlow's output on import, which no setting does; errors still come back as exceptions."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _write_resnet18(file: Path) -> None:
    import onnx

    from benchmarks.resnet18 import resnet18

    onnx.save(resnet18(), file)


def _write_random_bundle(path: Path, case: Case, name: str) -> None:
    from mnist_dist.images.spec import ImageSpec
    from mnist_dist.models.bundle import BundleInfo, write_bundle
    from mnist_dist.models.classifier import build_classifier

    backbone = case.backbone or name
    spec = ImageSpec(height_px=case.size_px, width_px=case.size_px, channels=case.channels)
    network = build_classifier(ModelConfig(backbone=backbone), spec=spec, num_classes=NUM_CLASSES, seed=0).model
    class_names = tuple(f"class-{number}" for number in range(NUM_CLASSES))
    write_bundle(path, network, BundleInfo(class_names=class_names, spec=spec, backbone=backbone))
