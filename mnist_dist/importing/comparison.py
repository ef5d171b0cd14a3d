"""Compares a new bundle's model with the one that it was made of, before it becomes a bundle.

Owns: the figures and the tolerances. Does not own: the images (`examples`), running the original (each source's
`Reference`), or reading what a person's own code gave (`expected`).

Runs in a child process: the original may need a framework that the driver must not load.
"""

# N = images, H = height px, W = width px, C = channels, K = classes, D = features

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.config import DEFAULT_THRESHOLD
from mnist_dist.engines.steps import Report
from mnist_dist.errors import ConfigError, ImageError
from mnist_dist.images.decoder import decode_image
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.importing.examples import Examples, Files, built_in_examples, read_examples
from mnist_dist.importing.expected import expected_values
from mnist_dist.importing.foreign import Foreign, Values
from mnist_dist.importing.recipe import Recipe
from mnist_dist.models.onnx_file import FEATURES, PROBABILITIES, open_session, run_session, session_batch
from mnist_dist.urls import shown

MAX_DIFFERENCE = 1e-4
"""Of a probability."""
MAX_RELATIVE = 1e-3
"""Norm-relative difference of logits, or of features."""
MAX_FAST_IMAGES = 500
"""Calibration images on which fast decoding is judged."""
_TINY = float(np.finfo(np.float32).tiny)
_FLOOR = 1e-30
"""Below, runtimes round probabilities in float32 differently."""
_BATCH, _FEW = 16, 12


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A comparison with one reference."""

    reference: str
    """What the bundle was compared with."""
    images: int
    max_abs_difference: float
    """The largest difference of a probability; of a bundle without classes, of a feature."""
    relative_difference: float
    """norm(a - b) / norm(b) of the features; or of the logits, each image's minus their mean, as far as probabilities
    in float32 hold them."""
    agreement: float | None
    """Share of the images with the same top class, 0-1, or of a multi-label model with the same classes from 0.5 on;
    None: there are no classes."""
    worst: str
    """The image with the largest difference."""
    is_judged: bool = True
    """Whether a difference fails the import; False: measured for information."""

    @property
    def is_same(self) -> bool:
        """Whether it is within the tolerances; NaN is not."""
        by_value = self.agreement is None or self.max_abs_difference <= MAX_DIFFERENCE
        return by_value and self.relative_difference <= MAX_RELATIVE

    def __str__(self) -> str:
        what = "features" if self.agreement is None else "probabilities"
        top = "" if self.agreement is None else f", same top class for {self.agreement:.2%}"
        return (
            f"{self.reference}: {what} differ by at most {self.max_abs_difference:.2g} "
            f"(norm-relative {self.relative_difference:.2g}){top} on {self.images} images"
        )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """All that was measured of a new bundle."""

    compared: tuple[Compared, ...]
    images: int
    left_out: tuple[str, ...]
    """Check images that could not be read, and why."""
    labelled: int
    """Check images whose folder has the name of a class."""
    accuracy: float | None
    """On the check images, 0-1; None: not all are labelled."""
    calibration: pa.Table | None = None
    """The content of `calibration.parquet`."""
    fast_agreement: float | None = None
    """Share of calibration images with the same top class under fast decoding, 0-1."""
    fast_images: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckTask:
    """What is compared on which images."""

    foreign: Path
    """The pickled `Foreign`."""
    recipe: Recipe
    model_file: Path
    """The bundle's model, not yet published."""
    rows: pa.Table | None
    """The check images (`examples.list_images`); None: the built-in ones."""
    expect: str | None
    """URI of probabilities that a person's own code gave."""
    calibration: pa.Table | None
    """Rows of the calibration images."""
    scratch: Path
    """A new folder."""


def check(task: CheckTask, report: Report) -> Checked:
    """Compares the bundle's model with the original and with what is expected of it.

    Raises:
        ConfigError: no check image can be read, or the expected probabilities do not fit.
    """
    task.scratch.mkdir()
    recipe, folder = task.recipe, task.scratch / "examples"
    names = recipe.class_names
    examples = built_in_examples(folder) if task.rows is None else read_examples(task.rows, names, scratch=folder)
    examples, pixels = _decoded(examples, recipe.spec)
    model = BundleModel(task.model_file, has_classes=bool(names))
    values = model.outputs(pixels)
    report(len(pixels), 2 * len(pixels))
    foreign: Foreign = pickle.loads(task.foreign.read_bytes())
    _check_activation(foreign, recipe, examples)
    compared = list(_with_original(foreign, recipe, examples, values))
    report(2 * len(pixels), 2 * len(pixels))
    if task.expect is not None:
        expected, rows = expected_values(task.expect, examples.names, names)
        matched = [examples.names[row] for row in rows]
        compared.append(compare(values[rows], expected, matched, reference=shown(task.expect), recipe=recipe))
    checked = Checked(
        compared=tuple(compared),
        images=len(pixels),
        left_out=examples.left_out,
        labelled=sum(label is not None for label in examples.labels),
        accuracy=_accuracy(values, examples) if names else None,
    )
    return checked if task.calibration is None else _with_calibration(checked, task, model)


def compare(
    values: Values, reference_values: Values, names: Sequence[str], *, reference: str, recipe: Recipe
) -> Compared:
    """The differences between a bundle's outputs and others, `float32 [N, K]` or `[N, D]`.

    Args:
        values: of the bundle.
        reference_values: of the reference.
        names: of the N images.
        reference: what the reference is, for messages.
        recipe: says what the values are.

    Raises:
        ConfigError: the shapes differ.
    """
    if values.shape != reference_values.shape:
        shape = list(reference_values.shape)
        raise ConfigError(
            f"{reference} gives {shape} values, and the bundle {list(values.shape)}. Received: {reference!r}"
        )
    ours, theirs = values.astype(np.float64), reference_values.astype(np.float64)
    differences = np.abs(ours - theirs).max(axis=1)
    worst = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
    has_classes = bool(recipe.class_names)
    if has_classes:
        agreement = _agreement(values, reference_values, multi_label=recipe.multi_label)
        ours, theirs = logits(ours, multi_label=recipe.multi_label), logits(theirs, multi_label=recipe.multi_label)
    return Compared(
        reference=reference,
        images=len(values),
        max_abs_difference=float(differences[worst]),
        relative_difference=float(np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(theirs)), _TINY)),
        agreement=agreement if has_classes else None,
        worst=names[worst],
    )


def logits(probabilities: npt.NDArray[np.float64], *, multi_label: bool) -> npt.NDArray[np.float64]:
    """What probabilities `[N, K]` came from: each image's logits minus their mean, or the logits of a sigmoid.

    A probability near 1 is rounded in float32, so that logits of a sigmoid are taken of 1e-4 to 1 - 1e-4 only.
    """
    if multi_label or probabilities.shape[1] == 2:  # two classes are one sigmoid, or might be
        p = np.clip(probabilities, MAX_DIFFERENCE, 1 - MAX_DIFFERENCE)
        return np.asarray(np.log(p) - np.log1p(-p))
    values: npt.NDArray[np.float64] = np.log(np.maximum(probabilities, _FLOOR))
    values -= values.mean(axis=1, keepdims=True)
    return values


class BundleModel:
    """The model file of a bundle, run by its own runtime.

    Args:
        file: `model.keras` or `model.onnx`.
        has_classes: whether it gives probabilities, or features only.
    """

    def __init__(self, file: Path, *, has_classes: bool) -> None:
        self._output = PROBABILITIES if has_classes else FEATURES
        self._session = open_session(file) if file.suffix == ".onnx" else None
        if self._session is None:
            import keras

            self._model = keras.saving.load_model(file, compile=False)

    def outputs(self, pixels: Pixels) -> Values:
        """`uint8 [N, H, W, C]` -> `float32 [N, K]` or `[N, D]`."""
        size = (None if self._session is None else session_batch(self._session)) or _BATCH
        parts = [self._call(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        return np.concatenate(parts)

    def _call(self, pixels: Pixels) -> Values:
        if self._session is None:
            return np.asarray(self._model(pixels, training=False), np.float32)
        return np.asarray(run_session(self._session, pixels, [self._output])[0], np.float32)


def _decoded(examples: Examples, spec: ImageSpec) -> tuple[Examples, Pixels]:
    """The images that can be decoded, and their pixels `[N, H, W, C]`."""
    kept, pixels, left_out = list[int](), list[Pixels](), list(examples.left_out)
    for number, data in enumerate(examples.files):
        try:
            pixels.append(decode_image(data, spec).pixels)
            kept.append(number)
        except ImageError as error:
            left_out.append(f"{examples.names[number]}: {error}")
    if not kept:
        raise ConfigError(f"none of the check images can be read. Received: {'; '.join(left_out[:3])}")
    taken = Examples(
        files=Files(tuple(examples.files.paths[number] for number in kept)),
        names=tuple(examples.names[number] for number in kept),
        labels=tuple(examples.labels[number] for number in kept),
        left_out=tuple(left_out),
    )
    return taken, np.stack(pixels)


def _check_activation(foreign: Foreign, recipe: Recipe, examples: Examples) -> None:
    """Refuses an assumed activation behind outputs that are probabilities already."""
    if not recipe.is_activation_assumed or foreign.reference is None:
        return
    raw = foreign.reference(examples.files[:_FEW], replace(recipe.asked, activation="none"))
    is_inside = bool(((raw >= 0) & (raw <= 1)).all())
    if is_inside and (recipe.activation == "sigmoid" or np.allclose(raw.sum(axis=1), 1, atol=1e-3)):
        raise ConfigError(
            f"the model's outputs are probabilities already, from {raw.min():.3g} to {raw.max():.3g}: give "
            f"--activation none, or --activation {recipe.activation} if it belongs there. Received: "
            f"activation={recipe.activation!r}, which was assumed"
        )


def _with_original(foreign: Foreign, recipe: Recipe, examples: Examples, values: Values) -> Iterator[Compared]:
    if foreign.reference is not None:
        original = paired(foreign.reference(examples.files, recipe.asked), recipe)
        yield compare(values, original, examples.names, reference=foreign.reference_name, recipe=recipe)
    if foreign.whole is not None:
        whole = paired(foreign.whole(examples.files, recipe.asked), recipe)
        found = compare(values, whole, examples.names, reference=foreign.whole_name, recipe=recipe)
        yield replace(found, is_judged=False)


def paired(values: Values, recipe: Recipe) -> Values:
    """`[N, 1]` of a binary model as the probabilities of both classes, `[N, 2]`."""
    return np.concatenate([1 - values, values], axis=1) if recipe.is_binary else values


def _accuracy(values: Values, examples: Examples) -> float | None:
    if not examples.are_labelled:
        return None
    return float((values.argmax(axis=1) == np.array(examples.labels)).mean())


def _with_calibration(checked: Checked, task: CheckTask, model: BundleModel) -> Checked:
    """With the calibration images as the bundle keeps them, and what fast decoding changes on some of them."""
    assert task.calibration is not None
    names, spec = task.recipe.class_names, task.recipe.spec
    examples = read_examples(task.calibration, names, scratch=task.scratch / "calibration")
    examples, pixels = _decoded(examples, spec)
    columns = {"uri": pa.array(examples.names), "pixels": pa.array([image.tobytes() for image in pixels], pa.binary())}
    if examples.are_labelled:
        columns["label"] = pa.array(examples.labels, pa.int64())
    checked = replace(checked, calibration=pa.table(columns))
    if not names:
        return checked
    count = min(len(pixels), MAX_FAST_IMAGES)
    rows = np.linspace(0, len(pixels) - 1, count).astype(np.int64)
    quick = replace(spec, quality="fast")
    fast = np.stack([decode_image(examples.files[int(row)], quick).pixels for row in rows])
    agreement = _agreement(model.outputs(pixels[rows]), model.outputs(fast), multi_label=task.recipe.multi_label)
    return replace(checked, fast_agreement=agreement, fast_images=count)


def _agreement(ours: Values, theirs: Values, *, multi_label: bool) -> float:
    """Share of the images with the same top class; of a multi-label model, with the same classes from 0.5 on."""
    if multi_label:
        return float(((ours >= DEFAULT_THRESHOLD) == (theirs >= DEFAULT_THRESHOLD)).all(axis=1).mean())
    return float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
