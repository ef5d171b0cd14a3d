"""A bundle's model converted to other formats, and each file asked the same as Keras: what scoring and export stand on.

Owns: the steps, each a process of its own (`steps`) on the CPU: one has Keras predict the calibration images and
converts the model; another has a converted file predict them in its own runtime. And what the two are compared by. Does
not own: the formats (`formats`), which difference is too large and where files are kept (`choice` for scoring,
`export`).

A converted file takes `uint8 [B, H, W, C]`, 0-255, for any B, and gives `float32 [B, K]` probabilities; preprocessing
is inside. The driver loads neither Keras nor a runtime, and a crash in a step is an error here.
"""

# B = batch, N = images that are compared, H = height px, W = width px, C = channels, K = classes

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

from mnist_dist.config import EnginePrecision
from mnist_dist.engines.calibration import (
    Labels,
    Probabilities,
    Source,
    calibration_images,
    calibration_labels,
    calibration_of,
    predict_calibration,
)
from mnist_dist.engines.engine import Engine, KerasEngine, best_images_per_s, hide_gpus, with_features
from mnist_dist.engines.formats import FORMATS, ConvertedEngine, local_folder, openvino_core
from mnist_dist.engines.steps import Report, run_step
from mnist_dist.errors import StepFailed
from mnist_dist.models.bundle import Bundle
from mnist_dist.session import Session

AS_FAST = 0.97  # where a smaller call is so fast, it is taken: it needs less memory
QUANTIZED_IMAGES = 300


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says of the calibration images, and how fast."""

    probabilities: Probabilities
    """`float32 [N, K]`."""
    labels: Labels | None
    """`int64 [N]`; None: the images have none."""
    source: Source
    images_per_s: float
    images_per_call: int
    input_name: str = ""
    """As the file calls it; empty: of Keras."""
    output_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Check:
    """How a model's answers compare with those of Keras in float32."""

    source: Source
    images: int
    max_abs_difference: float
    """Of a probability."""
    agreement: float
    """Share of the images with the same top class."""
    accuracy_loss: float | None
    """Of 1, negative where the model is the better one; None where the images have no labels."""
    images_per_s: float
    images_per_call: int
    """With which it was fastest."""


def compare(reference: Probabilities, answers: Answers) -> Check:
    """How far a model's answers are from those of Keras.

    Raises:
        StepFailed: the model gives another number of probabilities.
    """
    ours, labels = answers.probabilities, answers.labels
    if ours.shape != reference.shape:
        raise StepFailed(f"the model gives {list(reference.shape)} probabilities. Received: {list(ours.shape)}")
    theirs_top, ours_top = reference.argmax(axis=1), ours.argmax(axis=1)
    # by counts, since 0.902 - 0.9 is more than 0.002
    loss = None if labels is None else int((theirs_top == labels).sum() - (ours_top == labels).sum()) / len(labels)
    return Check(
        source=answers.source,
        images=len(ours),
        max_abs_difference=float(np.abs(reference.astype(np.float64) - ours).max()),
        agreement=float((theirs_top == ours_top).mean()),
        accuracy_loss=loss,
        images_per_s=answers.images_per_s,
        images_per_call=answers.images_per_call,
    )


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of installed packages."""
    return {name: metadata.version(name) for name in packages}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A bundle's model at work. Each call runs a step, and raises StepFailed where its process fails.

    Args:
        bundle: opened.
        scratch: folder for the converted files, one below it for each format.
        batch_size: images per call of Keras.
        cpus: cores of each model.
        session: shows progress.
    """

    bundle: Bundle
    scratch: Path
    batch_size: int
    cpus: int
    session: Session

    def by_keras(self, formats: Sequence[str], *, features: bool) -> Answers:
        """What Keras says; its model is converted, with its features as a second output where they are wanted."""
        folders = {name: self.scratch / name for name in formats}
        step = partial(_ask_keras, self._model(), folders, self.batch_size, self.cpus, features)
        return run_step(step, title="Keras model, conversion", session=self.session)

    def by_file(self, uri: str, format: str, *, precision: EnginePrecision, call_sizes: Sequence[int]) -> Answers:
        """What the file in a folder says, with as many images a call as are fastest."""
        step = partial(_ask_file, self._model(), uri, format, precision, call_sizes, self.cpus)
        return run_step(step, title=f"{format} {precision}", session=self.session)

    def quantize(self, uri: str, target: Path) -> None:
        """Makes an int8 model of OpenVINO's float32 one."""
        run_step(partial(_quantize, self._model(), uri, target), title="openvino int8", session=self.session)

    def _model(self) -> Bundle:
        """The bundle as it travels: without the model, if it was loaded."""
        return Bundle(self.bundle.path, self.bundle.info)


# --- the steps, each in a process of its own -------------------------------------------------------------------------


def _ask_keras(
    bundle: Bundle, folders: Mapping[str, Path], batch_size: int, cpus: int, features: bool, report: Report
) -> Answers:
    hide_gpus()  # whose TF32 would differ by more than a conversion does
    engine = KerasEngine(bundle, batch_size=batch_size, cpus=cpus)
    (speed,) = best_images_per_s([engine], bundle.info.spec)
    answers = _answers(bundle, engine, speed, report)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # its converter would report its use to Intel
    model = with_features(bundle.model) if features else bundle.model
    model(np.zeros((1, *bundle.info.spec.shape), np.uint8), training=False)  # an ONNX export wants it called before
    for name, folder in folders.items():
        folder.mkdir()
        model.export(str(folder / FORMATS[name].file), format=FORMATS[name].keras_name, verbose=False)
    return answers


def _ask_file(
    bundle: Bundle,
    uri: str,
    format: str,
    precision: EnginePrecision,
    call_sizes: Sequence[int],
    cpus: int,
    report: Report,
) -> Answers:
    spec = bundle.info.spec
    with local_folder(uri) as folder:
        engines = {
            size: ConvertedEngine(folder, format=format, spec=spec, batch_size=size, precision=precision, cpus=cpus)
            for size in call_sizes
        }
    speeds = dict(zip(engines, best_images_per_s(list(engines.values()), spec), strict=True))
    size = smallest_fast(speeds)
    names = engines[size].runtime.input_name, engines[size].runtime.output_name
    return _answers(bundle, engines[size], speeds[size], report, *names)


def smallest_fast(speeds: Mapping[int, float]) -> int:
    """The smallest number of images per call that is as fast as any, by number of images: images/s."""
    return min(size for size, speed in speeds.items() if speed >= AS_FAST * max(speeds.values()))


def _answers(
    bundle: Bundle, engine: Engine, speed: float, report: Report, input_name: str = "", output_name: str = ""
) -> Answers:
    return Answers(
        probabilities=predict_calibration(bundle, engine, report),
        labels=calibration_labels(bundle),
        source=calibration_of(bundle)[0],
        images_per_s=speed,
        images_per_call=engine.batch_size,
        input_name=input_name,
        output_name=output_name,
    )


def _quantize(bundle: Bundle, uri: str, target: Path, report: Report) -> None:
    """Post-training quantisation by NNCF, from the calibration images."""
    import nncf
    import openvino

    images, file = list(calibration_images(bundle, batch_size=1, max_images=QUANTIZED_IMAGES)), FORMATS["openvino"].file
    with local_folder(uri) as source:
        model = openvino_core().read_model(source / file)
        quantized = nncf.quantize(model, nncf.Dataset(images), subset_size=len(images))
    target.mkdir()
    openvino.save_model(quantized, target / file, compress_to_fp16=False)
    report(len(images), len(images))
