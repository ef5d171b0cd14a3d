"""What becomes of the facts and the flags: everything that the bundle is built from.

Owns: which of a flag, a fact and an assumption counts, and saying so. Does not own: reading facts (the sources), or
building the model (`onnx_graph`, `keras_models`).

A flag counts before a fact, and a fact before an assumption. How pixels are normalised is never assumed: a wrong guess
gives predictions that look plausible.
"""

import collections
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mnist_dist.config import Activation, Geometry, Interpolation
from mnist_dist.errors import ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.import_config import FittingConfig, ImportJob, NormalizationConfig, Preset
from mnist_dist.importing.foreign import Asked, Facts, Foreign
from mnist_dist.models.backbones import CAFFE, MINUS_ONE_TO_ONE, TORCH, ZERO_TO_ONE, Preprocessing

Value = TypeVar("Value")
PRESETS: dict[Preset, Preprocessing] = {
    "imagenet": TORCH,
    "caffe": CAFFE,
    "tf": MINUS_ONE_TO_ONE,
    "0-1": ZERO_TO_ONE,
    "raw": Preprocessing(scale=1.0),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a foreign model becomes a bundle's model: `uint8 [B, H, W, C]` -> `float32 [B, K]`."""

    spec: ImageSpec
    scale: tuple[float, ...]
    """Pixels of 0-255 are multiplied by this; one number, or one per channel in the order of the model."""
    offset: tuple[float, ...]
    """Added after that."""
    bgr: bool
    """The channels are reversed before that."""
    activation: Activation
    """Put behind the model's own output."""
    multi_label: bool
    class_names: tuple[str, ...]
    """Empty: the model gives features only."""
    is_activation_assumed: bool = False
    """Neither the source nor a flag says which activation follows."""
    is_binary: bool = False
    """The model has one output p, which becomes the probabilities 1 - p and p of two classes."""
    output: str | None = None
    """As in `Facts`; None: the model's only output."""
    features: str | None = None
    """As in `Facts`; None: there are none."""
    assumed: tuple[str, ...] = ()
    """What neither the source nor a flag said, one sentence each."""

    @property
    def asked(self) -> Asked:
        """What the original framework has to do to be comparable."""
        return Asked(
            spec=self.spec,
            scale=self.scale,
            offset=self.offset,
            bgr=self.bgr,
            activation=self.activation,
            output=self.output if self.class_names else self.features,
        )


class _Choice:
    """Takes the first of a flag, a fact and an assumption, and keeps a sentence for each assumption."""

    def __init__(self) -> None:
        self.assumed: list[str] = []

    def of(self, flag: Value | None, fact: Value | None, assumption: Value, sentence: str = "") -> Value:
        """`sentence` may hold `{}` for the assumption; empty: not worth a line."""
        for value in (flag, fact):
            if value is not None:
                return value
        if sentence:
            self.assumed.append(sentence.format(assumption))
        return assumption


def recipe_of(job: ImportJob, foreign: Foreign, *, classes: Sequence[str] | None) -> Recipe:
    """Decides what is built.

    Args:
        job: the flags.
        foreign: the opened model.
        classes: the names of `job.classes`; None: none are given.

    Raises:
        ConfigError: something is missing that must not be assumed, or a flag contradicts the model.
    """
    facts, choice = foreign.facts, _Choice()
    spec = _spec(job.fitting, facts, choice)
    scale, offset, bgr = _normalization(job.normalization, facts, channels=spec.channels)
    recipe = Recipe(
        spec=spec,
        scale=scale,
        offset=offset,
        bgr=bgr,
        activation="none",
        multi_label=False,
        class_names=(),
        output=facts.output if job.output_node is None else job.output_node,
        features=facts.features if job.features_node is None else job.features_node,
    )
    if job.backbone_only:
        if recipe.features is None:
            raise ConfigError("name the features of a model without classes: --features-node NAME. Received: none")
    else:
        recipe = _classified(recipe, job, facts, choice, classes)
    return replace(recipe, assumed=tuple(choice.assumed))


def read_classes(data: bytes, *, uri: str) -> tuple[str, ...]:
    """The class names of a file: one a line, a JSON list, or a JSON object `{index: name}`.

    Raises:
        ConfigError: it is none of these, or has gaps.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise ConfigError(f"a list of classes is UTF-8 text ({err}). Received: {uri!r}") from None
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not text.lstrip().startswith(("[", "{")):
        return lines
    try:
        return _json_classes(json.loads(text), uri)
    except json.JSONDecodeError as err:
        if len(lines) > 1 and all(line[-1] not in ",{[" for line in lines):  # names, one of them `[background]`
            return lines
        raise ConfigError(f"a list of classes is not valid JSON: {err}. Received: {uri!r}") from None


# --- fitting ---------------------------------------------------------------------------------------------------------


def _spec(fitting: FittingConfig, facts: Facts, choice: _Choice) -> ImageSpec:
    height, width = _size(fitting, facts)
    resampling = choice.of(
        fitting.resize_rule, facts.resampling, facts.framework, "images are resized as {} does (--resize-rule)"
    )
    as_keras = "" if resampling == "pillow" else "the filter is not widened where an image shrinks (--antialias)"
    bilinear: Interpolation = "bilinear"
    interpolation = choice.of(
        fitting.interpolation, facts.interpolation, bilinear, "the filter is {} (--interpolation)"
    )
    resize, resize_px = _geometry(fitting, facts, choice, side_px=min(height, width))
    return ImageSpec(
        height_px=height,
        width_px=width,
        channels=choice.of(None, facts.channels, 3, "the model takes RGB"),
        resize=resize,
        resize_px=resize_px,
        resampling=resampling,
        interpolation=interpolation,
        antialias=choice.of(fitting.antialias, facts.antialias, resampling == "pillow", as_keras),
        crop_rounding=facts.crop_rounding or "even",
        pad_value=choice.of(fitting.pad_value, facts.pad_value, 0),
        quality="exact",
    )


def _geometry(fitting: FittingConfig, facts: Facts, choice: _Choice, *, side_px: int) -> tuple[Geometry, int | None]:
    """How an image is resized, and the side that it has before the centre is cut."""
    asked_px = fitting.resize_px if fitting.crop is None else math.floor(side_px / fitting.crop)
    stretch: Geometry = "stretch"
    cropped: Geometry | None = None if asked_px is None else "shortest-edge"
    resize = choice.of(
        fitting.resize or cropped, facts.resize, stretch, "images of another shape are stretched (--resize)"
    )
    if asked_px is not None or resize != facts.resize or facts.resize_px is None:
        return resize, asked_px
    stated_px = min(facts.height_px or side_px, facts.width_px or side_px)
    if stated_px == side_px:
        return resize, facts.resize_px
    scaled_px = math.floor(facts.resize_px * side_px / stated_px)
    choice.assumed.append(f"the shorter side becomes {scaled_px} px, scaled with the input (--resize-px)")
    return resize, scaled_px


def _size(fitting: FittingConfig, facts: Facts) -> tuple[int, int]:
    known = facts.height_px, facts.width_px
    if fitting.input_size is None:
        if known[0] is None or known[1] is None:
            raise ConfigError("the model takes images of any size: give --input-size, px. Received: none")
        return known[0], known[1]
    height, width = fitting.input_size * 2 if len(fitting.input_size) == 1 else fitting.input_size
    if facts.is_size_fixed and any(
        side not in (None, asked) for side, asked in zip(known, (height, width), strict=True)
    ):
        raise ConfigError(f"the model takes {known[0]} x {known[1]} px only. Received: input_size={fitting.input_size}")
    return height, width


# --- normalisation ---------------------------------------------------------------------------------------------------


def _normalization(
    flags: NormalizationConfig, facts: Facts, *, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    if flags.preset is not None:
        preset = PRESETS[flags.preset]
        scale, offset, bgr = _tuple(preset.scale), _tuple(preset.offset), preset.bgr
    elif flags.scale is not None or flags.mean is not None or flags.std is not None:
        scale, offset = _of_mean_and_std(flags)
        bgr = bool(facts.bgr)
    elif facts.scale is not None and facts.offset is not None:
        scale, offset, bgr = facts.scale, facts.offset, bool(facts.bgr)
    else:
        raise ConfigError(
            "the model does not say how its pixels are normalised, and a wrong guess would give wrong predictions: "
            f"give --preset {'|'.join(PRESETS)}, or --scale, --mean and --std. Received: none of them"
        )
    is_raw = all(value == 1 for value in scale) and all(value == 0 for value in offset)
    if facts.normalizes_itself and not is_raw:
        raise ConfigError(
            "the model normalises pixels of 0-255 itself, so that another normalisation would give wrong predictions: "
            f"leave --preset, --scale, --mean and --std out. Received: scale={scale}, offset={offset}"
        )
    if flags.channel_order is not None:
        bgr = flags.channel_order == "bgr"
    if max(len(scale), len(offset)) not in (1, channels) or (bgr and channels == 1):
        raise ConfigError(
            f"the model takes {channels} channel(s): normalisation needs one value, or one per channel. Received: "
            f"scale={scale}, offset={offset}{', BGR' if bgr else ''}"
        )
    return scale, offset, bgr


def _of_mean_and_std(flags: NormalizationConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`(pixels * scale - mean) / std` as one factor and one offset per channel."""
    scale = 1 / 255 if flags.scale is None else flags.scale
    mean, std = flags.mean or (0.0,), flags.std or (1.0,)
    count = max(len(mean), len(std))
    mean, std = mean * (count // len(mean)), std * (count // len(std))
    return tuple(scale / value for value in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


def _tuple(value: tuple[float, ...] | float) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


# --- classes ---------------------------------------------------------------------------------------------------------


def _classified(recipe: Recipe, job: ImportJob, facts: Facts, choice: _Choice, classes: Sequence[str] | None) -> Recipe:
    count = facts.num_outputs
    if count is None:
        raise ConfigError(
            "the output must be [N, K], with a fixed number of classes K: choose another with --output-node, or use "
            f"--backbone-only. Received: {facts.output or 'an output of unknown shape'}"
        )
    activation, is_assumed = _activation(job, facts, choice)
    ends_with_sigmoid = activation == "none" and job.activation == "auto" and bool(facts.multi_label)
    is_multi_label = (activation == "sigmoid" or ends_with_sigmoid) and count > 1
    multi_label = is_multi_label if job.multi_label is None else job.multi_label
    is_binary = count == 1 and not multi_label
    ends_with_softmax = activation == "none" and facts.activation == "none" and facts.multi_label is False and count > 1
    if (is_binary or multi_label) and (activation == "softmax" or (multi_label and ends_with_softmax)):
        what = "a model with one output" if is_binary else "multi_label"
        raise ConfigError(f"{what} needs a sigmoid, not a softmax (--activation). Received: activation={activation!r}")
    recipe = replace(
        recipe,
        activation=activation,
        is_activation_assumed=is_assumed,
        multi_label=multi_label,
        is_binary=is_binary,
        class_names=_class_names(2 if is_binary else count, facts, choice, classes),
    )
    if is_binary:
        choice.assumed.append(f"the model's output is the probability of {recipe.class_names[1]!r}, the second class")
    return recipe


def _activation(job: ImportJob, facts: Facts, choice: _Choice) -> tuple[Activation, bool]:
    """What follows the outputs, and whether that is assumed. `--multi-label` is a word for sigmoid, too."""
    if job.activation != "auto":
        return job.activation, False
    wants_sigmoid = facts.num_outputs == 1 or job.multi_label is True
    if facts.activation is not None and not (wants_sigmoid and facts.activation == "softmax"):
        return facts.activation, False
    kind: Activation = "sigmoid" if wants_sigmoid else "softmax"
    choice.assumed.append(f"the outputs are logits, and {kind} follows (--activation)")
    return kind, True


def _class_names(count: int, facts: Facts, choice: _Choice, classes: Sequence[str] | None) -> tuple[str, ...]:
    numbers = tuple(str(index) for index in range(count))
    names = tuple(choice.of(classes, facts.class_names, numbers, "the classes are named by their numbers (--classes)"))
    if len(names) != count:
        where = "--classes" if classes is not None else "the source"
        raise ConfigError(f"the model has {count} classes. Received: {len(names)} class names from {where}")
    repeated = {name for name, times in collections.Counter(names).items() if times > 1}
    if repeated:
        shown = ", ".join(sorted(repeated)[:3])
        choice.assumed.append(f"class names that occur twice get their number: {shown}")
        names = tuple(f"{name} ({index})" if name in repeated else name for index, name in enumerate(names))
    return names


def _json_classes(value: Any, uri: str) -> tuple[str, ...]:
    try:
        names = [value[key] for key in map(str, range(len(value)))] if isinstance(value, dict) else value
    except KeyError as err:
        raise ConfigError(
            f"the classes must be numbered from 0 without gaps: {err} is missing. Received: {uri!r}"
        ) from None
    # Keras' own list of ImageNet has pairs, `["n01440764", "tench"]`.
    names = [name[-1] if isinstance(name, list) and name else name for name in names]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"the classes must be a list of names. Received: {uri!r}")
    return tuple(names)
