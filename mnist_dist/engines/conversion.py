"""Converts a bundle's model to other formats and compares each file with the original, for scoring and for export.

Owns: the steps, each in a separate CPU process (`steps`), and the comparison. One step predicts the calibration images
with the bundle's own engine (Keras, or ONNX Runtime where the model is an ONNX file) and converts the model; another
predicts them with a converted file in its own runtime. Does not own: the formats (`formats`), the allowed differences,
or where files are kept (`choice` for scoring, `export`).

A converted file maps `uint8 [B, H, W, C]`, 0-255, for any B (unless the model has a fixed batch), to `float32 [B, K]`
probabilities (and to features, if requested); preprocessing is inside. The driver loads neither Keras nor a runtime; a
crash in a step is a `StepFailed`.
"""

# B = batch, N = images that are compared, H = height px, W = width px, C = channels, K = classes

import contextlib
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist.config import DEFAULT_THRESHOLD, EnginePrecision
from mnist_dist.engines.annotation import annotate, float32_convolutions, note_float32_convolutions, save_openvino
from mnist_dist.engines.calibration import (
    Labels,
    Probabilities,
    Source,
    calibration_labels,
    calibration_of,
    predict_calibration,
    range_images,
)
from mnist_dist.engines.engine import (
    Engine,
    KerasEngine,
    best_images_per_s,
    has_features,
    hide_gpus,
    with_features,
    with_named_output,
)
from mnist_dist.engines.formats import FORMATS, ConvertedEngine, local_folder, openvino_core
from mnist_dist.engines.graphs import freeze, inference_function, write_onnx
from mnist_dist.engines.steps import Report, run_step
from mnist_dist.errors import StepFailed
from mnist_dist.images.pixels import padded
from mnist_dist.models.bundle import Bundle, all_layers
from mnist_dist.models.onnx_file import FEATURES, PROBABILITIES
from mnist_dist.session import Session

AS_FAST = 0.97  # a smaller call with this share of the best speed is preferred: it needs less memory
MIN_CALL_S = 0.001  # ... unless calls follow each other faster: each costs the job about 0.15 ms of Python


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
    """The input's name in the converted file."""
    output_name: str = ""
    float32_convolutions: int = 0
    """See `Check`."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """How a model's predictions compare with those of the bundle's own engine, in float32."""

    source: Source
    images: int
    max_abs_difference: float
    """The largest difference of a probability."""
    agreement: float
    """Share of the images with the same top class, 0-1; of a multi-label model, with the same classes of at least
    `DEFAULT_THRESHOLD`."""
    accuracy_loss: float | None
    """Accuracy of the own engine minus accuracy of the model, -1 to 1; None where the images have no labels, or the
    model is multi-label."""
    images_per_s: float
    images_per_call: int
    """Images per call at which `images_per_s` was measured."""
    multi_label: bool = False
    """Each class has a probability of its own."""
    float32_convolutions: int = 0
    """In int8: as many convolutions, the first ones, compute in float32."""

    @property
    def judged_by(self) -> str:
        """What has to be the same, in texts."""
        return "predicted classes" if self.multi_label else "top class"

    @property
    def lost_points(self) -> float | None:
        """The loss of accuracy in points; None where it is not known."""
        return None if self.accuracy_loss is None else 100 * self.accuracy_loss


def compare(
    reference: Probabilities,
    answers: Answers,
    *,
    multi_label: bool = False,
    judged: npt.NDArray[np.bool_] | None = None,
) -> Check:
    """Compares a model's predictions with those of the bundle's own engine.

    Args:
        reference: of the bundle's own engine.
        answers: of the model.
        multi_label: each class has a probability of its own.
        judged: which of the images count, `bool [N]`; None: all.

    Raises:
        StepFailed: the shapes of the probabilities differ.
    """
    probabilities, labels = answers.probabilities, None if multi_label else answers.labels
    if probabilities.shape != reference.shape:
        expected, shape = list(reference.shape), list(probabilities.shape)
        raise StepFailed(f"the converted model must give {expected} probabilities. Received: {shape}")
    if judged is not None:
        reference, probabilities = reference[judged], probabilities[judged]
        labels = None if labels is None else labels[judged]
    reference_top, top = reference.argmax(axis=1), probabilities.argmax(axis=1)
    same = reference_top == top
    if multi_label:
        same = ((reference >= DEFAULT_THRESHOLD) == (probabilities >= DEFAULT_THRESHOLD)).all(axis=1)
    # The loss is computed from counts, since in floats 0.902 - 0.9 is more than 0.002.
    loss = None if labels is None else int((reference_top == labels).sum() - (top == labels).sum()) / len(labels)
    return Check(
        source=answers.source,
        images=len(probabilities),
        max_abs_difference=float(np.abs(reference.astype(np.float64) - probabilities).max()),
        agreement=float(same.mean()),
        accuracy_loss=loss,
        images_per_s=answers.images_per_s,
        images_per_call=answers.images_per_call,
        multi_label=multi_label,
        float32_convolutions=answers.float32_convolutions,
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
        batch_size: images per call of Keras, which takes any number.
        cpus: cores per model.
        session: shows progress.
    """

    bundle: Bundle
    scratch: Path
    batch_size: int
    cpus: int
    session: Session

    def by_own(self, formats: Sequence[str], *, features: bool, call_sizes: Sequence[int]) -> Answers:
        """Predicts with the bundle's own engine and converts the model to the formats.

        Args:
            formats: keys of `FORMATS`; an ONNX model is converted to `openvino` only.
            features: the converted files give the features as a second output, if the model has any.
            call_sizes: images per call to try, where the model is an ONNX file.
        """
        folders = {name: self.scratch / name for name in formats}
        model = self._model()
        if model.is_onnx:
            step = partial(_ask_onnx, model, folders, call_sizes, self.cpus)
            return run_step(step, title="ONNX model, conversion", session=self.session)
        asked = partial(_ask_keras, model, folders, self.batch_size, self.cpus, features)
        return run_step(asked, title="Keras model, conversion", session=self.session)

    def by_file(self, uri: str, format: str, *, precision: EnginePrecision, call_sizes: Sequence[int]) -> Answers:
        """Predicts with the converted file in a folder, at the fastest of the call sizes."""
        step = partial(_ask_file, self._model(), uri, format, precision, call_sizes, self.cpus)
        return run_step(step, title=f"{format} {precision}", session=self.session)

    def quantize(self, uri: str, target: Path, *, float32_share: float) -> int:
        """Quantizes OpenVINO's float32 model in the folder `uri` to int8.

        Args:
            uri: the folder of the float32 model.
            target: the folder of the int8 model, which is made.
            float32_share: share of the convolutions, the first ones, that stay in float32, 0-1.

        Returns:
            How many convolutions stay in float32. 0 although some should: the model has none, and nothing is made.
        """
        step = partial(_quantize, self._model(), uri, target, float32_share)
        kept: int = run_step(step, title="openvino int8", session=self.session)
        return kept

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
    _no_telemetry()
    model = with_features(bundle.model) if features and has_features(bundle.model) else with_named_output(bundle.model)
    model(np.zeros((1, *bundle.info.spec.shape), np.uint8), training=False)  # ONNX export needs a called model
    for name, folder in folders.items():
        folder.mkdir()
        _export(model, folder / FORMATS[name].file, FORMATS[name].keras_name)
        annotate(folder, name, bundle.info)
    return answers


def _ask_onnx(
    bundle: Bundle, folders: Mapping[str, Path], call_sizes: Sequence[int], cpus: int, report: Report
) -> Answers:
    answers = _file_answers(bundle, bundle.path, "onnx", "float32", call_sizes, cpus, report)
    for name, folder in folders.items():
        folder.mkdir()
        if name == "onnx":
            shutil.copyfile(bundle.model_path, folder / FORMATS[name].file)
        else:
            _no_telemetry()
            save_openvino(openvino_core().read_model(bundle.model_path), folder)
        annotate(folder, name, bundle.info)
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
    with local_folder(uri) as folder:
        answers = _file_answers(bundle, folder, format, precision, call_sizes, cpus, report)
        return replace(answers, float32_convolutions=float32_convolutions(folder)) if precision == "int8" else answers


def _file_answers(
    bundle: Bundle,
    folder: Path,
    format: str,
    precision: EnginePrecision,
    call_sizes: Sequence[int],
    cpus: int,
    report: Report,
) -> Answers:
    spec, fixed = bundle.info.spec, bundle.fixed_batch
    engines = {
        size: ConvertedEngine(folder, format=format, spec=spec, batch_size=size, precision=precision, cpus=cpus)
        for size in (call_sizes if fixed is None else [fixed])
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


def _quantize(bundle: Bundle, uri: str, target: Path, float32_share: float, report: Report) -> int:
    """Quantizes after training, with NNCF, from the calibration images; returns how many convolutions it left out."""
    import nncf

    size = bundle.fixed_batch or 1
    images = [padded(batch, size) for batch in range_images(bundle, batch_size=size)]
    with local_folder(uri) as source:
        model = openvino_core().read_model(source / FORMATS["openvino"].file)
        names = _first_convolutions(model, float32_share)
        if float32_share and not names:
            return 0
        ignored = nncf.IgnoredScope(names=names)
        quantized = nncf.quantize(model, nncf.Dataset(images), subset_size=len(images), ignored_scope=ignored)
    target.mkdir()
    note_float32_convolutions(quantized, len(names))
    save_openvino(quantized, target)
    report(len(images), len(images))
    return len(names)


def _first_convolutions(model: Any, share: float) -> list[str]:
    """The names of this share of a model's convolutions, in the order in which they compute; rounded up."""
    kinds = ("Convolution", "GroupConvolution")
    names = [node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() in kinds]
    return names[: math.ceil(share * len(names))]


def _no_telemetry() -> None:
    """Keeps converters from sending usage reports to Intel."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
