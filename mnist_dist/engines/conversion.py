"""Converts a bundle's model to other formats and compares each file with Keras, for scoring and for export.

Owns: the steps, each in a separate CPU process (`steps`), and the comparison. One step predicts the calibration images
with Keras and converts the model; another predicts them with a converted file in its own runtime. Does not own: the
formats (`formats`), the allowed differences, or where files are kept (`choice` for scoring, `export`).

A converted file maps `uint8 [B, H, W, C]`, 0-255, for any B, to `float32 [B, K]` probabilities (and to features, if
requested); preprocessing is inside. The driver loads neither Keras nor a runtime; a crash in a step is a `StepFailed`.
"""

# B = batch, N = images that are compared, H = height px, W = width px, C = channels, K = classes

import contextlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

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
from mnist_dist.engines.graphs import freeze, inference_function, write_onnx
from mnist_dist.engines.steps import Report, run_step
from mnist_dist.errors import StepFailed
from mnist_dist.models.bundle import FEATURES, PROBABILITIES, Bundle, all_layers
from mnist_dist.session import Session

AS_FAST = 0.97  # a smaller call with this share of the best speed is preferred: it needs less memory
MIN_CALL_S = 0.001  # ... unless calls follow each other faster: each costs the job about 0.15 ms of Python
QUANTIZED_IMAGES = 300  # calibration images from which NNCF derives the int8 ranges


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's predictions for the calibration images, and its speed."""

    probabilities: Probabilities
    """`float32 [N, K]`."""
    labels: Labels | None
    """`int64 [N]`; None: the images have no labels."""
    source: Source
    images_per_s: float
    images_per_call: int
    input_name: str = ""
    """The input's name in the file; empty for Keras."""
    output_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Check:
    """How a model's predictions compare with those of Keras in float32."""

    source: Source
    images: int
    max_abs_difference: float
    """The largest difference of a probability."""
    agreement: float
    """Share of the images with the same top class, 0-1."""
    accuracy_loss: float | None
    """Accuracy of Keras minus accuracy of the model, -1 to 1; None where the images have no labels."""
    images_per_s: float
    images_per_call: int
    """Images per call at which `images_per_s` was measured."""


def compare(reference: Probabilities, answers: Answers) -> Check:
    """Compares a model's predictions with those of Keras.

    Raises:
        StepFailed: the shapes of the probabilities differ.
    """
    probabilities, labels = answers.probabilities, answers.labels
    if probabilities.shape != reference.shape:
        expected, shape = list(reference.shape), list(probabilities.shape)
        raise StepFailed(f"the converted model must give {expected} probabilities. Received: {shape}")
    keras_top, top = reference.argmax(axis=1), probabilities.argmax(axis=1)
    # The loss is computed from counts, since in floats 0.902 - 0.9 is more than 0.002.
    loss = None if labels is None else int((keras_top == labels).sum() - (top == labels).sum()) / len(labels)
    return Check(
        source=answers.source,
        images=len(probabilities),
        max_abs_difference=float(np.abs(reference.astype(np.float64) - probabilities).max()),
        agreement=float((keras_top == top).mean()),
        accuracy_loss=loss,
        images_per_s=answers.images_per_s,
        images_per_call=answers.images_per_call,
    )


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The conversion steps of one bundle. Each method runs a step and raises StepFailed if its process fails.

    Args:
        bundle: an opened bundle.
        scratch: folder for the converted files, with one subfolder per format.
        batch_size: images per call of Keras.
        cpus: cores per model.
        session: shows progress.
    """

    bundle: Bundle
    scratch: Path
    batch_size: int
    cpus: int
    session: Session

    def by_keras(self, formats: Sequence[str], *, features: bool) -> Answers:
        """Predicts with Keras and converts the model to the formats, optionally with features as a second output."""
        folders = {name: self.scratch / name for name in formats}
        step = partial(_ask_keras, self._model(), folders, self.batch_size, self.cpus, features)
        return run_step(step, title="Keras model, conversion", session=self.session)

    def by_file(self, uri: str, format: str, *, precision: EnginePrecision, call_sizes: Sequence[int]) -> Answers:
        """Predicts with the converted file in a folder, at the fastest of the call sizes."""
        step = partial(_ask_file, self._model(), uri, format, precision, call_sizes, self.cpus)
        return run_step(step, title=f"{format} {precision}", session=self.session)

    def quantize(self, uri: str, target: Path) -> None:
        """Quantizes OpenVINO's float32 model in the folder `uri` to int8."""
        run_step(partial(_quantize, self._model(), uri, target), title="openvino int8", session=self.session)

    def _model(self) -> Bundle:
        """The bundle without a loaded model, so that it can be pickled."""
        return Bundle(self.bundle.path, self.bundle.info)


# --- the steps, each in a separate process ---------------------------------------------------------------------------


def _ask_keras(
    bundle: Bundle, folders: Mapping[str, Path], batch_size: int, cpus: int, features: bool, report: Report
) -> Answers:
    hide_gpus()  # Their TF32 differs by more than a conversion does.
    engine = KerasEngine(bundle, batch_size=batch_size, cpus=cpus)
    (speed,) = best_images_per_s([engine], bundle.info.spec)
    answers = _answers(bundle, engine, speed, report)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # no usage reports to Intel
    model = with_features(bundle.model) if features else bundle.model
    model(np.zeros((1, *bundle.info.spec.shape), np.uint8), training=False)  # ONNX export needs a called model
    for name, folder in folders.items():
        folder.mkdir()
        _export(model, folder / FORMATS[name].file, FORMATS[name].keras_name)
    return answers


def _export(model: Any, file: Path, keras_name: str) -> None:
    """Writes a model in one of Keras' formats; a file of ONNX by ourselves where Keras' has missing inputs."""
    import keras

    has_constants = any(isinstance(layer, keras.layers.Normalization) for layer in all_layers(model))
    if keras_name != "onnx" or not has_constants:
        model.export(str(file), format=keras_name, verbose=False)
        return
    names = [PROBABILITIES, FEATURES][: len(model.outputs)]
    write_onnx(freeze(inference_function(model)), file, input_name=model.inputs[0].name, output_names=names)


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
    """The smallest number of images per call that is about as fast as any, and keeps Python out of the way.

    Args:
        speeds: images per call -> images/s of the engine alone.
    """
    slow_enough = {size for size, speed in speeds.items() if size / speed >= MIN_CALL_S} or {max(speeds)}
    return min(size for size in slow_enough if speeds[size] >= AS_FAST * max(speeds[size] for size in slow_enough))


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
    """Quantizes after training, with NNCF, from the calibration images."""
    import nncf
    import openvino

    images, file = list(calibration_images(bundle, batch_size=1, max_images=QUANTIZED_IMAGES)), FORMATS["openvino"].file
    with local_folder(uri) as source:
        model = openvino_core().read_model(source / file)
        quantized = nncf.quantize(model, nncf.Dataset(images), subset_size=len(images))
    target.mkdir()
    openvino.save_model(quantized, target / file, compress_to_fp16=False)
    report(len(images), len(images))
