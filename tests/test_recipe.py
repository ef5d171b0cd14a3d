"""What becomes of flags and facts: which counts, what is assumed aloud, and what is never assumed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnist_dist.errors import ConfigError
from mnist_dist.import_config import FittingConfig, ImportJob, NormalizationConfig, Preset
from mnist_dist.importing.foreign import Facts, Foreign
from mnist_dist.importing.recipe import PRESETS, Recipe, read_classes, recipe_of

TIMM = Facts(
    height_px=224,
    width_px=224,
    channels=3,
    class_names=("a", "b", "c"),
    resize="shortest-edge",
    resize_px=256,
    resampling="pillow",
    interpolation="bicubic",
    antialias=True,
    crop_rounding="even",
    scale=(1.0, 1.0, 1.0),
    offset=(0.5, 0.5, 0.5),
    num_outputs=3,
    output="logits",
    features="pooled",
)


def made(facts: Facts, *, classes: Any = None, **fields: Any) -> Recipe:
    job = ImportJob(source="a.onnx", output="b", **fields)
    return recipe_of(job, Foreign(kind="onnx", name="a", file=Path("a.onnx"), facts=facts), classes=classes)


def with_(facts: Facts, **changes: Any) -> Facts:
    return Facts(**{**vars(facts), **changes})


def test_what_the_source_says_is_not_assumed() -> None:
    recipe = made(with_(TIMM, activation="softmax"))

    assert recipe.assumed == ()
    spec = recipe.spec
    assert (spec.resize, spec.resize_px, spec.interpolation, spec.quality) == ("shortest-edge", 256, "bicubic", "exact")
    assert (recipe.scale, recipe.offset, recipe.features) == ((1.0,) * 3, (0.5,) * 3, "pooled")


def test_every_assumption_is_said() -> None:
    recipe = made(Facts(num_outputs=3, output="x"), fitting=FittingConfig(input_size=(32,)), normalization=raw())

    assert "softmax follows" in " ".join(recipe.assumed)
    for word in ("pillow", "bilinear", "stretched", "numbers", "RGB"):
        assert word in " ".join(recipe.assumed), word
    assert recipe.class_names == ("0", "1", "2")


def test_the_assumptions_are_those_of_the_sources_framework() -> None:
    facts = Facts(framework="keras", num_outputs=3, output="x")
    recipe = made(facts, fitting=FittingConfig(input_size=(32,)), normalization=raw())

    for words in ("as keras does", "bilinear", "stretched", "not widened where an image shrinks (--antialias)"):
        assert words in " ".join(recipe.assumed), words
    spec = recipe.spec
    assert (spec.resampling, spec.interpolation, spec.resize, spec.antialias) == ("keras", "bilinear", "stretch", False)


def raw() -> NormalizationConfig:
    return NormalizationConfig(preset="raw")


def test_a_flag_counts_before_a_fact() -> None:
    fitting = FittingConfig(resize="stretch", interpolation="nearest", resize_rule="keras", antialias=True)
    spec = made(TIMM, fitting=fitting, activation="none", normalization=NormalizationConfig(preset="caffe")).spec

    assert (spec.resize, spec.resize_px, spec.resampling, spec.interpolation) == ("stretch", None, "keras", "nearest")
    assert spec.antialias


def test_normalisation_is_never_assumed() -> None:
    with pytest.raises(ConfigError, match=r"give --preset imagenet\|caffe\|tf\|0-1\|raw, or --scale"):
        made(with_(TIMM, scale=None, offset=None))


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_what_its_framework_does(name: Preset) -> None:
    recipe = made(TIMM, normalization=NormalizationConfig(preset=name))
    pixel = np.array([255.0, 0.0, 100.0])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = {
        "imagenet": (pixel / 255 - mean) / std,
        "caffe": pixel[::-1] - [103.939, 116.779, 123.68],
        "tf": pixel / 127.5 - 1,
        "0-1": pixel / 255,
        "raw": pixel,
    }[name]

    values = (pixel[::-1] if recipe.bgr else pixel) * np.array(recipe.scale) + np.array(recipe.offset)

    assert np.allclose(values, expected, atol=1e-9)


def test_pixels_that_the_model_normalises_itself_are_not_normalised_twice() -> None:
    inside = with_(TIMM, scale=(1.0,), offset=(0.0,), normalizes_itself=True)

    with pytest.raises(ConfigError, match="the model normalises pixels of 0-255 itself"):
        made(inside, normalization=NormalizationConfig(preset="imagenet"))
    assert made(inside, normalization=NormalizationConfig(preset="raw")).scale == (1.0,)
    assert made(inside).scale == (1.0,)


def test_mean_and_std_are_of_pixels_from_0_to_1_unless_a_scale_is_given() -> None:
    both = NormalizationConfig(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.4))
    scaled = NormalizationConfig(scale=1.0, mean=(127.5,), std=(127.5,))

    recipe, other = made(TIMM, normalization=both), made(TIMM, normalization=scaled)

    assert np.allclose(np.array([51.0] * 3) * recipe.scale + recipe.offset, [-3.0, -1.0, -0.25])
    assert np.allclose(255 * np.array(other.scale) + other.offset, [1.0])


def test_crop_is_the_kept_part_of_the_shorter_side_rounded_as_timm_does() -> None:
    assert made(TIMM, fitting=FittingConfig(crop=0.95)).spec.resize_px == 235  # floor(224 / 0.95)
    assert (
        made(with_(TIMM, resize=None, resize_px=None), fitting=FittingConfig(crop=0.875)).spec.resize == "shortest-edge"
    )


def test_another_input_size_scales_the_source_s_resizing_and_says_so() -> None:
    recipe = made(TIMM, fitting=FittingConfig(input_size=(384,)))

    spec = recipe.spec
    assert (spec.height_px, spec.width_px, spec.resize, spec.resize_px) == (384, 384, "shortest-edge", 438)
    assert any("the shorter side becomes 438 px" in sentence for sentence in recipe.assumed)


@pytest.mark.parametrize("fitting", [FittingConfig(input_size=(224,)), FittingConfig(resize="shortest-edge")])
def test_a_flag_that_says_what_the_source_says_changes_nothing(fitting: FittingConfig) -> None:
    assert made(TIMM, fitting=fitting).spec == made(TIMM).spec


def test_a_size_is_asked_for_where_any_would_do_and_refused_where_one_is_fixed() -> None:
    with pytest.raises(ConfigError, match="give --input-size"):
        made(with_(TIMM, height_px=None, width_px=None))
    with pytest.raises(ConfigError, match="the model takes 224 x 224 px only"):
        made(with_(TIMM, is_size_fixed=True), fitting=FittingConfig(input_size=(256, 224)))


def test_class_names_must_be_as_many_as_outputs() -> None:
    with pytest.raises(ConfigError, match=r"the model has 3 classes\. Received: 2 class names from --classes"):
        made(TIMM, classes=("x", "y"))
    with pytest.raises(ConfigError, match="Received: 3 class names from the source"):
        made(with_(TIMM, num_outputs=4))


def test_names_that_occur_twice_become_distinct_and_it_is_said() -> None:
    recipe = made(with_(TIMM, class_names=("crane", "cat", "crane")))

    assert recipe.class_names == ("crane (0)", "cat", "crane (2)")
    assert "occur twice" in recipe.assumed[-1]


def test_one_output_is_binary_and_needs_a_sigmoid() -> None:
    facts = with_(TIMM, num_outputs=1, class_names=("cat", "dog"))

    recipe = made(facts)

    assert (recipe.is_binary, recipe.activation, recipe.multi_label) == (True, "sigmoid", False)
    assert "the probability of 'dog', the second class" in recipe.assumed[-1]
    with pytest.raises(ConfigError, match="a model with one output needs a sigmoid, not a softmax"):
        made(facts, activation="softmax")


def test_sigmoid_over_several_classes_is_multi_label_unless_told_otherwise() -> None:
    assert made(TIMM, activation="sigmoid").multi_label
    assert not made(TIMM, activation="sigmoid", multi_label=False).multi_label
    assert made(TIMM, multi_label=True).activation == "sigmoid"
    assert made(with_(TIMM, activation="none", multi_label=True)).multi_label


def test_multi_label_is_a_sigmoid_whatever_the_source_says_and_never_a_softmax() -> None:
    says_softmax = with_(TIMM, activation="softmax", multi_label=False)

    recipe = made(says_softmax, multi_label=True)

    assert (recipe.activation, recipe.multi_label) == ("sigmoid", True)
    with pytest.raises(ConfigError, match="multi_label needs a sigmoid, not a softmax"):
        made(TIMM, multi_label=True, activation="softmax")
    with pytest.raises(ConfigError, match="multi_label needs a sigmoid"):  # the model ends with softmax
        made(with_(TIMM, activation="none", multi_label=False), multi_label=True)
    assert made(with_(TIMM, activation="softmax", multi_label=False), activation="sigmoid").multi_label


def test_it_is_known_whether_the_activation_was_assumed() -> None:
    assert made(TIMM).is_activation_assumed
    assert not made(TIMM, activation="softmax").is_activation_assumed
    assert not made(with_(TIMM, activation="softmax")).is_activation_assumed


def test_a_backbone_is_asked_for_its_features() -> None:
    assert made(with_(TIMM, num_outputs=None, output=None), backbone_only=True).asked.output == "pooled"
    assert made(TIMM).asked.output == "logits"


def test_a_backbone_has_features_and_no_classes() -> None:
    recipe = made(with_(TIMM, num_outputs=None, output=None), backbone_only=True)

    assert (recipe.class_names, recipe.features) == ((), "pooled")
    with pytest.raises(ConfigError, match="--features-node NAME"):
        made(with_(TIMM, features=None), backbone_only=True)


def test_an_output_of_unknown_width_is_no_classifier() -> None:
    with pytest.raises(ConfigError, match=r"the output must be \[N, K\]"):
        made(with_(TIMM, num_outputs=None))


def test_values_per_channel_must_fit_the_channels() -> None:
    with pytest.raises(ConfigError, match=r"the model takes 1 channel\(s\)"):
        made(with_(TIMM, channels=1))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\ndog\n", ("cat", "dog")),
        ("\ufeffcat\r\n dog \r\n\r\n", ("cat", "dog")),
        (json.dumps(["cat", "dog"]), ("cat", "dog")),
        (json.dumps({"1": "dog", "0": "cat"}), ("cat", "dog")),
        (json.dumps({"0": ["n01", "cat"], "1": ["n02", "dog"]}), ("cat", "dog")),
        ("[background]\ncat\n", ("[background]", "cat")),
    ],
)
def test_class_names_are_lines_or_json(text: str, names: tuple[str, ...]) -> None:
    assert read_classes(text.encode(), uri="classes.txt") == names


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"0": "a", "2": "b"}', "'1' is missing"),
        (b"[1, 2]", "a list of names"),
        (b'["a"', "not valid JSON"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_bad_list_of_classes_says_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_classes(data, uri="classes.txt")


def test_flags_that_contradict_each_other_are_refused() -> None:
    for fields, message in (
        ({"normalization": {"preset": "raw", "mean": (0.5,)}}, "choose either preset or mean"),
        ({"fitting": {"crop": 0.9, "resize_px": 256}}, "choose either crop or resize_px"),
        ({"fitting": {"resize_rule": "pillow", "antialias": False}}, "Pillow always antialiases"),
        ({"fitting": {"crop": 1.5}}, "crop must be in"),
    ):
        kinds = {"normalization": NormalizationConfig, "fitting": FittingConfig}
        with pytest.raises(ConfigError, match=message):
            ImportJob(source="a", output="b", **{key: kinds[key](**value) for key, value in fields.items()})
    with pytest.raises(ConfigError, match="expect needs check_images"):
        ImportJob(source="a", output="b", expect="e.csv")
