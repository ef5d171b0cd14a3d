"""Foreign Keras models: what is read from them, the bundle's model made of them, and what is refused."""

import importlib.util
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import onnxruntime
import pytest
from harness import Recorder
from PIL import Image

import mnist_dist
from mnist_dist.console import Stop
from mnist_dist.engines.conversion import Conversion
from mnist_dist.engines.engine import with_features
from mnist_dist.engines.formats import FORMATS, ConvertedEngine
from mnist_dist.engines.graphs import freeze, inference_function, write_onnx
from mnist_dist.errors import BundleError, ConfigError
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.comparison import BundleModel
from mnist_dist.importing.foreign import Asked, Foreign
from mnist_dist.importing.keras_files import check_classes, load_keras
from mnist_dist.importing.keras_models import build_keras, open_keras, reference, whole_pipeline
from mnist_dist.importing.onnx_graph import build_onnx
from mnist_dist.importing.recipe import Recipe
from mnist_dist.importing.tensorflow_images import expects_pixels, rounded_pixels
from mnist_dist.models.backbones import find_backbone
from mnist_dist.models.bundle import Bundle, BundleInfo
from mnist_dist.session import Session

layers = keras.layers
HEIGHT, WIDTH, CLASSES = 19, 17, 5
SPEC = ImageSpec(height_px=HEIGHT, width_px=WIDTH, channels=3, resampling="keras", antialias=False, quality="exact")
GREY = replace(SPEC, channels=1)


def pixels(spec: ImageSpec = SPEC, images: int = 4) -> Pixels:
    return np.random.default_rng(images).integers(0, 256, (images, *spec.shape), dtype=np.uint8)


def png(values: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def chain(*parts: Any, shape: Sequence[int | None] = SPEC.shape) -> keras.Model:
    """A Sequential model whose BatchNorms are far from their initial state and whose outputs differ between images."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input(shape), *parts])
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([weight + np.linspace(0.3, 1, len(weight)) for weight in layer.get_weights()])
    return model


def convolutions() -> list[Any]:
    return [
        layers.Conv2D(6, 3, strides=2, activation="relu", name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.GlobalAveragePooling2D(name="pool"),
    ]


def classifier(activation: str | None = "softmax", *, outputs: int = CLASSES, first: Sequence[Any] = ()) -> keras.Model:
    return chain(*first, *convolutions(), layers.Dense(outputs, activation=activation, name="top"))


def save(model: keras.Model, folder: Path, *, name: str = "model.keras") -> Path:
    model.save(folder / name)
    return folder / name


def open_model(file: Path, scratch: Path, **flags: Any) -> Foreign:
    scratch.mkdir(exist_ok=True)
    return open_keras(ImportJob(source=str(file), output="bundle", **flags), scratch, lambda done, total: None)


def recipe_of(foreign: Foreign, **changes: Any) -> Recipe:
    facts = foreign.facts
    values: dict[str, Any] = {
        "spec": SPEC,
        "scale": facts.scale or (1 / 255,),
        "offset": facts.offset or (0.0,),
        "bgr": False,
        "activation": facts.activation or "softmax",
        "multi_label": bool(facts.multi_label),
        "class_names": tuple("abcdefg"[: max(2, facts.num_outputs or 0)]),
        "is_binary": facts.num_outputs == 1,
        "output": facts.output,
        "features": facts.features,
    }
    return Recipe(**{**values, **changes})


def build(foreign: Foreign, folder: Path, **changes: Any) -> Path:
    target = folder / "built.keras"
    build_keras(foreign.file, recipe_of(foreign, **changes), target)
    return target


def asked_of(recipe: Recipe) -> Asked:
    return Asked(
        spec=recipe.spec,
        scale=recipe.scale,
        offset=recipe.offset,
        bgr=recipe.bgr,
        activation=recipe.activation,
        output=recipe.output,
    )


def all_ways(file: Path, images: Pixels) -> list[np.ndarray]:
    """What the file says: called, called for inference, by `predict`, and once saved again."""
    model = keras.saving.load_model(file, compile=False)
    again = file.with_name("again.keras")
    model.save(again)
    reloaded = keras.saving.load_model(again, compile=False)
    answers = [model(images), model(images, training=False), model.predict(images, verbose=0), reloaded(images)]
    return [np.asarray(answer) for answer in answers]


def relative_difference(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(found) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected)))


def check(original: keras.Model, file: Path, images: Pixels, *, scaled: Any = lambda pixels: pixels / 255) -> None:
    """Every way of asking the built file gives what the original says in inference mode."""
    expected = np.asarray(original(scaled(images.astype(np.float32)), training=False))
    assert expected.std(axis=0).max() > 1e-4, "the images must differ, else anything would do"
    for answer in all_ways(file, images):
        assert answer.dtype == np.float32
        assert relative_difference(answer, expected) < 1e-5


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_sequential_model_becomes_a_model_of_bytes_and_probabilities(tmp_path: Path) -> None:
    original = classifier()
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    facts = foreign.facts
    assert (foreign.kind, foreign.name, foreign.file) == ("keras", "model", tmp_path / "model.keras")
    assert (facts.height_px, facts.width_px, facts.channels, facts.num_outputs) == (HEIGHT, WIDTH, 3, CLASSES)
    assert (facts.activation, facts.multi_label, facts.features, facts.output) == ("none", False, "pool", None)
    assert facts.scale is None
    fitting = (facts.resize, facts.resampling, facts.interpolation, facts.antialias)
    assert (facts.framework, fitting) == ("keras", (None,) * 4), "no file of Keras says how images were fitted"
    built = build(foreign, tmp_path)
    model = keras.saving.load_model(built, compile=False)
    assert (model.inputs[0].dtype, model.input_shape, model.output_shape) == (
        "uint8",
        (None, *SPEC.shape),
        (None, CLASSES),
    )
    check(original, built, pixels())


AUGMENTED: dict[str, Callable[[], list[Any]]] = {
    "resizing": lambda: [layers.Resizing(13, 11)],
    "center crop": lambda: [layers.CenterCrop(12, 10)],
    "random": lambda: [layers.RandomFlip(), layers.RandomRotation(0.3), layers.RandomContrast(0.5)],
    "dropout": lambda: [layers.Dropout(0.4), layers.GaussianNoise(0.5)],
    "nested": lambda: [keras.Sequential([keras.Input(SPEC.shape), layers.RandomZoom(0.4), layers.Resizing(11, 9)])],
}


@pytest.mark.parametrize("first", AUGMENTED)
def test_layers_that_train_by_default_come_out_in_inference_mode(first: str, tmp_path: Path) -> None:
    original = classifier(first=AUGMENTED[first]())
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")
    built = build(foreign, tmp_path)

    check(original, built, pixels())
    expected = original(pixels() / np.float32(255), training=False)
    model = with_features(keras.saving.load_model(built, compile=False))
    assert relative_difference(model(pixels())[0], expected) < 1e-5


def test_a_functional_model_with_ops_and_branches_is_taken(tmp_path: Path) -> None:
    image = keras.Input(SPEC.shape)
    x = image[..., ::-1] / 127.5 - 1.0
    left = layers.Conv2D(4, 3, padding="same")(x)
    joined = layers.Concatenate()([left, layers.AveragePooling2D(3, strides=1, padding="same")(x)])
    dense = layers.Dense(CLASSES, name="top")(layers.GlobalAveragePooling2D(name="mean")(joined))
    original = keras.Model(image, keras.activations.softmax(dense))
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert (foreign.facts.activation, foreign.facts.features) == ("none", "mean")
    assert foreign.facts.scale == (1.0,)
    assert any("true_divide" in reason for reason in foreign.facts.why)
    check(original, build(foreign, tmp_path), pixels(), scaled=lambda pixels: pixels)


def test_the_size_of_a_model_of_any_size_comes_from_the_recipe(tmp_path: Path) -> None:
    keras.utils.set_random_seed(3)
    original = keras.Sequential([keras.Input((None, None, 3)), *convolutions(), layers.Dense(CLASSES, "softmax")])
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert (foreign.facts.height_px, foreign.facts.width_px) == (None, None)
    check(original, build(foreign, tmp_path), pixels())


def test_another_size_than_the_models_is_refused(tmp_path: Path) -> None:
    foreign = open_model(save(classifier(), tmp_path), tmp_path / "scratch")
    with pytest.raises(ConfigError, match=r"images of \[19, 17, 3\]. Received: --input-size, \[19, 18, 3\]"):
        build(foreign, tmp_path, spec=replace(SPEC, width_px=18))


def test_a_grey_model_is_taken(tmp_path: Path) -> None:
    original = chain(*convolutions(), layers.Dense(CLASSES, "softmax"), shape=GREY.shape)
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert foreign.facts.channels == 1
    check(original, build(foreign, tmp_path, spec=GREY), pixels(GREY))


def test_a_legacy_h5_model_is_taken(tmp_path: Path) -> None:
    original = classifier(first=[layers.Resizing(13, 11)])
    foreign = open_model(save(original, tmp_path, name="old.h5"), tmp_path / "scratch")

    assert (foreign.file, foreign.name) == (tmp_path / "scratch" / "foreign.keras", "old")
    check(original, build(foreign, tmp_path), pixels())


@pytest.mark.parametrize("suffix", [".h5", ".hdf5", ".keras"])
def test_the_case_of_a_suffix_does_not_count(suffix: str, tmp_path: Path) -> None:
    original = classifier()
    file = save(original, tmp_path, name=f"model{suffix}").rename(tmp_path / f"MODEL{suffix.upper()}")
    foreign = open_model(file, tmp_path / "scratch")

    assert (foreign.file, foreign.name) == (tmp_path / "scratch" / "foreign.keras", "MODEL")
    check(original, build(foreign, tmp_path), pixels())
    assert reference(file, [png(image) for image in pixels()], asked_of(recipe_of(foreign))).shape == (4, CLASSES)


def test_a_uint8_model_gets_its_bytes_as_they_are(tmp_path: Path) -> None:
    image = keras.Input(SPEC.shape, dtype="uint8")
    inner = classifier()
    original = keras.Model(image, inner(keras.ops.cast(image, "float32") / 255))
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert (foreign.facts.scale, foreign.facts.offset) == ((1.0,), (0.0,))
    check(original, build(foreign, tmp_path), pixels(), scaled=lambda pixels: pixels.astype(np.uint8))


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
@pytest.mark.parametrize("values", [{"scale": (1 / 255,)}, {"offset": (-1.0,)}])
def test_a_model_of_whole_numbers_takes_no_others(dtype: str, values: dict[str, Any], tmp_path: Path) -> None:
    image = keras.Input(SPEC.shape, dtype=dtype)
    original = keras.Model(image, classifier()(keras.ops.cast(image, "float32") / 255))
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    with pytest.raises(ConfigError, match=f"use --preset raw. Received: .* for an input of {dtype}"):
        build(foreign, tmp_path, **{"scale": (1.0,), "offset": (0.0,), **values})
    with pytest.raises(ConfigError, match="use --preset raw"):
        reference(foreign.file, [png(pixels()[0])], asked_of(recipe_of(foreign, **values)))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_lower_precisions_become_float32(policy: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(3)
    parts = [layers.Conv2D(6, 3, dtype=policy), layers.GlobalAveragePooling2D(dtype=policy)]
    original = keras.Sequential([keras.Input(SPEC.shape), *parts, layers.Dense(CLASSES, "softmax", dtype=policy)])
    exact = keras.Sequential(
        [
            keras.Input(SPEC.shape),
            layers.Conv2D(6, 3),
            layers.GlobalAveragePooling2D(),
            layers.Dense(CLASSES, "softmax"),
        ]
    )
    exact.set_weights([np.asarray(weight, np.float32) for weight in original.get_weights()])
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert any("float32" in reason for reason in foreign.facts.why)
    built = build(foreign, tmp_path)
    check(exact, built, pixels())
    policies = {layer.dtype_policy.name for layer in load_keras(built)[0].layers}
    assert policies <= {"float32", "uint8"}


def test_channels_are_reversed_and_scaled_one_by_one(tmp_path: Path) -> None:
    original = classifier()
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")
    scale, offset = (0.02, 0.01, 0.03), (-1.0, 0.5, 0.0)
    built = build(foreign, tmp_path, scale=scale, offset=offset, bgr=True)
    check(
        original,
        built,
        pixels(),
        scaled=lambda pixels: pixels[..., ::-1] * np.asarray(scale, np.float32) + np.asarray(offset, np.float32),
    )


def test_a_binary_model_gives_two_probabilities(tmp_path: Path) -> None:
    original = classifier("sigmoid", outputs=1)
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert (foreign.facts.activation, foreign.facts.multi_label, foreign.facts.num_outputs) == ("none", False, 1)
    expected = np.asarray(original(pixels() / np.float32(255), training=False))
    for answer in all_ways(build(foreign, tmp_path), pixels()):
        np.testing.assert_allclose(answer, np.concatenate([1 - expected, expected], axis=1), rtol=1e-5)


def test_binary_logits_get_a_sigmoid_before_they_become_two(tmp_path: Path) -> None:
    original = classifier(None, outputs=1)
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")
    expected = 1 / (1 + np.exp(-np.asarray(original(pixels() / np.float32(255), training=False))))
    found = all_ways(build(foreign, tmp_path, activation="sigmoid"), pixels())[0]
    np.testing.assert_allclose(found, np.concatenate([1 - expected, expected], axis=1), rtol=1e-5)


def test_several_sigmoid_outputs_are_labels_of_their_own(tmp_path: Path) -> None:
    original = classifier("sigmoid")
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert (foreign.facts.activation, foreign.facts.multi_label) == ("none", True)
    check(original, build(foreign, tmp_path), pixels())


def test_logits_get_the_activation_of_the_recipe(tmp_path: Path) -> None:
    original = classifier(None)
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert (foreign.facts.activation, foreign.facts.multi_label) == (None, None)
    logits = np.asarray(original(pixels() / np.float32(255), training=False))
    for activation in ("softmax", "sigmoid"):
        expected = np.asarray(getattr(keras.ops, activation)(logits))
        assert (
            relative_difference(all_ways(build(foreign, tmp_path, activation=activation), pixels())[0], expected) < 1e-5
        )


def test_the_class_names_must_fit_the_outputs(tmp_path: Path) -> None:
    foreign = open_model(save(classifier(), tmp_path), tmp_path / "scratch")
    with pytest.raises(ConfigError, match=r"the model has 5 outputs. Received: 2 class names"):
        build(foreign, tmp_path, class_names=("a", "b"))


# --- outputs and features --------------------------------------------------------------------------------------------


def test_the_features_are_the_second_output_and_known_without_keras(tmp_path: Path) -> None:
    original = classifier()
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")
    built = build(foreign, tmp_path)
    folder = tmp_path / "bundle"
    folder.mkdir()
    built.rename(folder / "model.keras")
    bundle = Bundle(folder, BundleInfo(class_names=tuple("abcde"), spec=SPEC, backbone="model"))

    assert bundle.num_features == 6
    probabilities, features = with_features(bundle.model)(pixels())
    pooled = keras.Model(original.inputs[0], original.get_layer("pool").output)
    assert relative_difference(features, pooled(pixels() / np.float32(255), training=False)) < 1e-5
    assert relative_difference(probabilities, bundle.model(pixels())) < 1e-6


def test_a_model_without_features_says_so(tmp_path: Path) -> None:
    original = chain(layers.Flatten(), layers.Reshape((HEIGHT * WIDTH * 3,)), layers.Softmax())
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")
    assert foreign.facts.features is None
    built = build(foreign, tmp_path, class_names=tuple(str(index) for index in range(HEIGHT * WIDTH * 3)))
    folder = tmp_path / "bundle"
    folder.mkdir()
    built.rename(folder / "model.keras")
    bundle = Bundle(folder, BundleInfo(class_names=("a",), spec=SPEC, backbone="model"))

    with pytest.raises(BundleError, match="no features: import it again with --features-node"):
        _ = bundle.num_features
    with pytest.raises(BundleError, match="no features"):
        with_features(bundle.model)


def transfer() -> keras.Model:
    """A nested backbone, then a nested head."""
    base = keras.Sequential([keras.Input(SPEC.shape), *convolutions()], name="base")
    head = keras.Sequential(
        [keras.Input((6,)), layers.Dense(7, "relu", name="hidden"), layers.Dense(CLASSES, "softmax", name="last")],
        name="head",
    )
    return chain(layers.Rescaling(1 / 255), base, head)


def test_features_inside_of_a_nested_head_are_found(tmp_path: Path) -> None:
    original = transfer()
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert (foreign.facts.features, foreign.facts.activation) == ("head/hidden", "none")
    built = build(foreign, tmp_path)
    check(original, built, pixels(), scaled=lambda pixels: pixels)
    features = with_features(keras.saving.load_model(built, compile=False))(pixels())[1]
    inner = original.get_layer("head").get_layer("hidden")
    assert relative_difference(features, inner(original.get_layer("base")(pixels() / np.float32(255)))) < 1e-5


def test_a_nested_model_before_the_dense_layer_gives_the_features(tmp_path: Path) -> None:
    base = keras.Sequential([keras.Input(SPEC.shape), *convolutions()], name="base")
    original = chain(base, layers.Dropout(0.3, name="drop"), layers.Dense(CLASSES, "softmax"))
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch", features_node="base")

    assert open_model(tmp_path / "model.keras", tmp_path / "scratch").facts.features == "drop"
    built = build(foreign, tmp_path)
    check(original, built, pixels())
    features = with_features(keras.saving.load_model(built, compile=False))(pixels())[1]
    assert relative_difference(features, base(pixels() / np.float32(255))) < 1e-5


def test_a_named_layer_is_used_as_the_output(tmp_path: Path) -> None:
    original = chain(*convolutions(), layers.Dense(4, name="logits"), layers.Dense(CLASSES, "softmax"))
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch", output_node="logits")

    assert (foreign.facts.output, foreign.facts.num_outputs, foreign.facts.features) == ("logits", 4, "pool")
    assert foreign.facts.activation is None
    built = build(foreign, tmp_path)
    logits = keras.Model(original.inputs[0], original.get_layer("logits").output)(pixels() / np.float32(255))
    assert relative_difference(all_ways(built, pixels())[0], keras.ops.softmax(logits)) < 1e-5


def test_a_backbone_alone_gives_its_features(tmp_path: Path) -> None:
    original = chain(*convolutions())
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch", backbone_only=True)

    assert foreign.facts.features == "pool"
    check_backbone(foreign, tmp_path, lambda images: original(images / 255, training=False))


def check_backbone(foreign: Foreign, folder: Path, original: Callable[[Any], Any], **changes: Any) -> None:
    """An ONNX file of the features, and a reference that can be compared with it."""
    facts = foreign.facts
    assert foreign.file == folder / "scratch" / "foreign.onnx"
    assert (facts.output, facts.num_outputs, facts.activation, facts.multi_label) == (None,) * 4
    recipe = recipe_of(foreign, class_names=(), activation="none", **changes)
    build_onnx(foreign.file, recipe, folder / "built.onnx")
    features = BundleModel(folder / "built.onnx", has_classes=False).outputs(pixels())
    expected = np.asarray(original(pixels().astype(np.float32)))
    assert expected.std(axis=0).max() > 1e-4
    assert relative_difference(features, expected) < 1e-5
    encoded = [png(image) for image in pixels()]
    for ask in (foreign.reference, foreign.whole):
        assert ask is not None
        assert relative_difference(ask(encoded, recipe.asked), expected) < 1e-5


@pytest.mark.parametrize("layer", [None, "base", "head/hidden"])
def test_a_classifier_is_cut_to_a_backbone(layer: str | None, tmp_path: Path) -> None:
    original = chain(layers.RandomFlip(), *transfer().layers)
    file = save(original, tmp_path)
    foreign = open_model(file, tmp_path / "scratch", backbone_only=True, features_node=layer)

    def features(images: Any) -> Any:
        values = original.get_layer("base")(images / 255, training=False)
        return values if layer == "base" else original.get_layer("head").get_layer("hidden")(values)

    assert foreign.facts.features == (layer or "head/hidden")
    assert foreign.facts.why[-1] == f"the features are those of {layer or 'head/hidden'}"
    assert not any("it ends with" in reason for reason in foreign.facts.why)
    check_backbone(foreign, tmp_path, features, scale=(1.0,))


def test_a_model_of_bytes_and_any_size_becomes_a_backbone(tmp_path: Path) -> None:
    image = keras.Input((None, None, 3), dtype="uint8")
    inner = chain(*convolutions(), shape=(None, None, 3))
    original = keras.Model(image, inner(keras.ops.cast(image, "float32") / 255))
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch", backbone_only=True)

    check_backbone(foreign, tmp_path, lambda images: inner(images / 255, training=False))


def test_the_import_of_a_keras_backbone_can_be_trained_on(tmp_path: Path) -> None:
    file = save(classifier(), tmp_path)
    result = mnist_dist.import_model(file, output=tmp_path / "bundle", backbone_only=True, preset="0-1")

    assert (result.values["kind"], result.values["classes"]) == ("keras", 0)
    assert len(result.values["compared"]) == 2
    info = find_backbone(str(tmp_path / "bundle")).imported
    assert info is not None
    assert (info.model_file, Bundle(tmp_path / "bundle", info).num_features) == ("model.onnx", 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"output_node": "tpo"}, "no layer 'tpo'.*did you mean top"),
        ({"features_node": "conv"}, r"features must be \[B, D\].*--features-node. Received: \[None, 9, 8, 6\]"),
        ({"output_node": "conv"}, r"the output must be \[B, K\].*--output-node. Received: \[None, 9, 8, 6\]"),
        ({"features_node": "conv/inner"}, "conv is no nested model"),
    ],
)
def test_layers_that_cannot_be_used_are_named(flags: dict[str, str], message: str, tmp_path: Path) -> None:
    file = save(classifier(), tmp_path)
    with pytest.raises(ConfigError, match=message):
        open_model(file, tmp_path / "scratch", **flags)


def two_inputs() -> keras.Model:
    first, second = keras.Input((8, 9, 3), name="left"), keras.Input((8, 9, 3), name="right")
    return keras.Model([first, second], layers.Dense(2)(layers.Flatten()(layers.Add()([first, second]))))


def two_outputs() -> keras.Model:
    image = keras.Input((8, 9, 3))
    flat = layers.Flatten()(image)
    return keras.Model(image, [layers.Dense(2, name="age")(flat), layers.Dense(3, name="kind")(flat)])


REFUSED_MODELS: dict[str, tuple[Callable[[], keras.Model], str]] = {
    "two inputs": (two_inputs, "one input, the image. Received: left .*right"),
    "two outputs": (two_outputs, "choose one with --output-node. Received: age, kind"),
    "no image": (lambda: chain(layers.Dense(2), shape=(7,)), r"must take images.*Received: input \[None, 7\]"),
    "four channels": (
        lambda: chain(layers.Flatten(), layers.Dense(2), shape=(8, 9, 4)),
        r"must take images.*Received: input \[None, 8, 9, 4\]",
    ),
    "channels first": (
        lambda: chain(layers.GlobalAveragePooling2D(data_format="channels_first"), layers.Dense(2), shape=(3, 8, 9)),
        "channels first.*data_format='channels_last'",
    ),
    "no classes": (lambda: chain(layers.Conv2D(4, 3)), r"the output must be \[B, K\].*--output-node"),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_models_that_classify_no_images_are_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED_MODELS[case]
    file = save(make(), tmp_path)
    with pytest.raises(ConfigError, match=message):
        open_model(file, tmp_path / "scratch")


def test_one_of_two_outputs_can_be_chosen(tmp_path: Path) -> None:
    foreign = open_model(save(two_outputs(), tmp_path), tmp_path / "scratch", output_node="kind")
    assert (foreign.facts.num_outputs, foreign.facts.output) == (3, "kind")


# --- the values that a model expects ---------------------------------------------------------------------------------


def normalization() -> Any:
    return layers.Normalization(mean=[120.0, 110.0, 100.0], variance=[3000.0, 2900.0, 2800.0], name="normalised")


def test_a_fixed_normalisation_is_found_and_kept(tmp_path: Path) -> None:
    original = classifier(first=[normalization()])
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert (foreign.facts.scale, foreign.facts.offset) == ((1.0,), (0.0,))
    assert any("normalised" in reason for reason in foreign.facts.why)
    check(original, build(foreign, tmp_path), pixels(), scaled=lambda pixels: pixels)


def test_an_adapted_normalisation_is_found_and_kept(tmp_path: Path) -> None:
    layer = layers.Normalization()
    layer.adapt(pixels().astype(np.float32))
    original = classifier(first=[layer])
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert foreign.facts.scale == (1.0,)
    check(original, build(foreign, tmp_path), pixels(), scaled=lambda pixels: pixels)


@pytest.mark.parametrize(
    ("first", "scale"),
    [
        ([layers.Rescaling(1 / 255)], (1.0,)),
        ([layers.Resizing(15, 13), layers.Rescaling(1 / 127.5, -1)], (1.0,)),
        ([layers.Rescaling(1.0, [-103.0, -116.0, -123.0])], (1.0,)),
        ([layers.Rescaling(2.0, -1.0)], None),
        ([], None),
    ],
)
def test_a_model_shows_by_its_first_layers_what_it_expects(
    first: list[Any], scale: tuple[float, ...] | None, tmp_path: Path
) -> None:
    facts = open_model(save(classifier(first=first), tmp_path), tmp_path / "scratch").facts
    assert facts.scale == scale


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("multiply", 1 / 255, True),
        ("multiply", 2, False),
        ("multiply", 1, None),
        ("divide", [57.0, 58.0, 59.0], True),
        ("divide", 0.225, False),
        ("add", -127.5, True),
        ("add", 0, None),
        ("add", -0.485, False),
    ],
)
def test_the_size_of_a_constant_shows_the_range(rule: str, value: Any, expected: bool | None) -> None:
    assert expects_pixels(rule, value) is expected


# --- the reference ---------------------------------------------------------------------------------------------------


def test_the_reference_agrees_with_the_built_model_on_whole_pixels(tmp_path: Path) -> None:
    original = classifier(first=[layers.RandomFlip()])
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")
    recipe = recipe_of(foreign, scale=(0.02, 0.01, 0.03), offset=(-1.0, 0.5, 0.0), bgr=True)
    images = [png(image) for image in pixels()]  # of the right size: nothing is resized
    build_keras(foreign.file, recipe, tmp_path / "built.keras")
    expected = keras.saving.load_model(tmp_path / "built.keras")(pixels())

    assert foreign.reference is not None
    assert relative_difference(foreign.reference(images, asked_of(recipe)), expected) < 1e-5
    assert relative_difference(whole_pipeline(tmp_path / "model.keras", images, asked_of(recipe)), expected) < 1e-5
    swapped = replace(asked_of(recipe), bgr=False)
    assert relative_difference(foreign.reference(images, swapped), expected) > 1e-3


def test_the_reference_rounds_what_it_resizes_and_the_whole_pipeline_does_not(tmp_path: Path) -> None:
    original = chain(layers.Flatten(), layers.Dense(CLASSES))
    file = save(original, tmp_path)
    image = pixels(replace(SPEC, height_px=31, width_px=23), images=1)[0]
    asked = asked_of(recipe_of(open_model(file, tmp_path / "scratch"), activation="none"))
    import tensorflow as tf

    resized = tf.image.resize(image, (HEIGHT, WIDTH)).numpy()[None]
    rounded = reference(file, [png(image)], asked)
    assert relative_difference(rounded, original(np.rint(resized) / np.float32(255))) < 1e-5
    whole = whole_pipeline(file, [png(image)], asked)
    assert relative_difference(whole, original(resized / np.float32(255))) < 1e-5
    assert relative_difference(whole, rounded) > 1e-5


def test_rounded_pixels_are_those_of_tensorflow_but_for_halves() -> None:
    import tensorflow as tf

    image = pixels(replace(SPEC, height_px=2 * HEIGHT, width_px=2 * WIDTH), images=1)[0]  # halves and quarters
    (found,) = rounded_pixels([png(image)], SPEC)
    exact = tf.image.resize(image, (HEIGHT, WIDTH)).numpy()
    assert np.abs(found - exact).max() <= 0.501
    (other,) = rounded_pixels([png(image)], replace(SPEC, interpolation="nearest"))
    assert np.abs(other - exact).max() > 1


# --- hostile files ---------------------------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a `.keras` file with another configuration."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                config = json.loads(data)
                change(config)
                data = json.dumps(config).encode()
            new.writestr(name, data)
    return target


def top_layer(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["config"]["layers"][-1]
    return found


def lambda_model(canary: Path) -> keras.Model:
    path = str(canary)
    layer = layers.Lambda(lambda x: (os.open(path, os.O_CREAT), x)[1], name="evil")
    return chain(layer, layers.Flatten(), layers.Dense(2))


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_lambda_layer_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    file = save(lambda_model(canary), tmp_path, name=name)
    canary.unlink()  # made when the model was built

    with pytest.raises(ConfigError, match=r"layer 'evil' is a Lambda.*model.export"):
        open_model(file, tmp_path / "scratch")
    assert not canary.exists()


def call_of(module: str, name: str, config: Any = None) -> Callable[[dict[str, Any]], None]:
    def change(whole: dict[str, Any]) -> None:
        top_layer(whole).update(module=module, class_name=name, registered_name=name)
        if config is not None:
            top_layer(whole)["config"] = config

    return change


def activation_of(module: str, name: str) -> Callable[[dict[str, Any]], None]:
    function = {"module": module, "class_name": "function", "config": name, "registered_name": name}

    def change(whole: dict[str, Any]) -> None:
        top_layer(whole)["config"]["activation"] = function

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "os.system": (call_of("os", "system"), "layer 'top' is of the class os.system"),
    "a module of the path": (call_of("canary_module", "Layer"), "is of the class canary_module.Layer"),
    "keras.utils.get_file": (call_of("keras.utils", "get_file"), "is of the class keras.utils.get_file"),
    "a private class": (
        call_of("keras.src.utils.progbar", "Progbar"),
        "of the class keras.src.utils.progbar.Progbar",
    ),
    "a SavedModel inside": (call_of("keras.layers", "TFSMLayer", {"name": "sm"}), "layer 'sm' is a TFSMLayer"),
    "a vocabulary file": (
        call_of("keras.layers", "StringLookup", {"name": "words"}),
        "'words' is a StringLookup",
    ),
    "a function of os": (activation_of("os", "system"), "uses the function system"),
    "a function of keras": (activation_of("keras.utils", "get_file"), "uses the function get_file"),
    "a lambda function": (
        lambda whole: top_layer(whole)["config"].update(
            activation={"class_name": "__lambda__", "config": {"value": "x"}}
        ),
        "is of the unknown class __lambda__",
    ),
    "a type of TensorFlow": (
        lambda whole: top_layer(whole)["config"].update(activation={"class_name": "__typespec__", "config": []}),
        "is of the unknown class __typespec__",
    ),
    "a custom class": (
        lambda whole: top_layer(whole).update(registered_name="mine>Head", module=None, class_name="Head"),
        "layer 'top' is a custom class, mine>Head",
    ),
    "a class that is a list": (
        lambda whole: top_layer(whole).update(class_name=["Dense"]),
        r"has the class \['Dense'\]",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_configuration_that_names_code_is_refused_and_nothing_is_imported(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = HOSTILE[case]
    canary = tmp_path / "canary"
    (tmp_path / "canary_module.py").write_text(f"import pathlib; pathlib.Path({str(canary)!r}).touch()")
    monkeypatch.syspath_prepend(tmp_path)
    file = rewritten(save(classifier(), tmp_path), tmp_path / "hostile.keras", change)

    with pytest.raises(ConfigError, match=f"hostile.keras is refused: .*{message}"):
        open_model(file, tmp_path / "scratch")
    assert not canary.exists()


def test_a_custom_loss_does_no_harm(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["compile_config"] = {"loss": {"module": "mine", "class_name": "Loss", "config": {}}}

    file = rewritten(save(classifier(), tmp_path), tmp_path / "compiled.keras", change)
    assert open_model(file, tmp_path / "scratch").facts.num_outputs == CLASSES


def test_a_configuration_nested_without_end_is_refused() -> None:
    config: dict[str, Any] = {}
    for _ in range(5000):
        config = {"config": config}
    with pytest.raises(ConfigError, match="nested too deeply"):
        check_classes(config, "deep.keras")


def write_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(data)


def weights_only(file: Path) -> None:
    with h5py.File(file, "w") as archive:
        archive["weights"] = np.zeros(3)


def bomb(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", bytes(10_000_000))


def of_keras_2(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "2.15.0"}))
        archive.writestr("config.json", "{}")


def empty_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other", "")


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a pickle": ("m.keras", write_bytes(b"\x80\x04\x95cos\nsystem\n."), "is no `.keras` file of a model: BadZipFile"),
    "a pickle as h5": ("m.h5", write_bytes(b"\x80\x04\x95cos\nsystem\n."), "is no HDF5 file of a model"),
    "an empty file": ("m.keras", write_bytes(b""), "is no `.keras` file"),
    "another zip": ("m.keras", empty_zip, "has no config.json"),
    "a bomb": ("m.keras", bomb, "is refused: its members become 10,000,002 bytes"),
    "weights": ("m.h5", weights_only, "holds weights only"),
    "keras 2": ("m.keras", of_keras_2, "written by Keras 2.*Received: keras_version=2.15.0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_are_no_models_are_refused(case: str, tmp_path: Path) -> None:
    name, write, message = BROKEN[case]
    write(tmp_path / name)
    with pytest.raises(ConfigError, match=message):
        open_model(tmp_path / name, tmp_path / "scratch")


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    file = save(classifier(), tmp_path)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ConfigError, match=r"is no `.keras` file of a model"):
        open_model(file, tmp_path / "scratch")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        top_layer(config)["config"]["units"] = 9

    file = rewritten(save(classifier(), tmp_path), tmp_path / "other.keras", change)
    with pytest.raises(ConfigError, match=r"Keras cannot load other.keras"):
        open_model(file, tmp_path / "scratch")


# --- conversions and whole architectures -----------------------------------------------------------------------------


def write_imported(foreign: Foreign, folder: Path, **changes: Any) -> Bundle:
    """A bundle's folder without its checks."""
    folder.mkdir()
    build(foreign, folder, **changes).rename(folder / "model.keras")
    recipe = recipe_of(foreign, **changes)
    return Bundle(folder, BundleInfo(class_names=recipe.class_names, spec=recipe.spec, backbone=foreign.name))


def check_conversions(bundle: Bundle, scratch: Path, formats: Sequence[str]) -> None:
    """Every converted file gives what Keras gives, probabilities and features."""
    for name in formats:
        missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
        if missing:
            pytest.skip(f"needs {', '.join(missing)} (pip install -e '.[export]'); runs where they are installed")
    scratch.mkdir()
    console = Recorder()
    session = Session(console=console, stop=Stop(console))
    conversion = Conversion(bundle=bundle, scratch=scratch, batch_size=2, cpus=2, session=session)
    conversion.by_own(formats, features=True, call_sizes=[2])
    images, spec = pixels(bundle.info.spec, 5), bundle.info.spec
    expected = with_features(bundle.model)(images, training=False)
    for name in formats:
        engine = ConvertedEngine(scratch / name, format=name, spec=spec, batch_size=5, embeddings=True, cpus=2)
        found = engine(images)
        assert relative_difference(found.probabilities, expected[0]) < 1e-4
        assert relative_difference(found.embeddings, expected[1]) < 1e-4


@pytest.mark.slow
def test_conversions_agree_with_models_that_train_by_default_and_hold_constants(tmp_path: Path) -> None:
    first = [layers.Resizing(15, 13), layers.RandomFlip(), layers.Dropout(0.3), normalization()]
    foreign = open_model(save(classifier(first=first), tmp_path), tmp_path / "scratch")
    bundle = write_imported(foreign, tmp_path / "bundle")
    check_conversions(bundle, tmp_path / "converted", ["openvino", "onnx"])


@pytest.mark.slow
def test_conversions_agree_with_a_binary_model(tmp_path: Path) -> None:
    foreign = open_model(save(classifier("sigmoid", outputs=1), tmp_path), tmp_path / "scratch")
    bundle = write_imported(foreign, tmp_path / "bundle", bgr=True)
    check_conversions(bundle, tmp_path / "converted", ["openvino", "onnx"])


def test_grouped_convolutions_and_exact_gelu_become_onnx(tmp_path: Path) -> None:
    image = keras.Input((HEIGHT, WIDTH, 4))
    model = keras.Model(image, layers.Conv2D(6, 3, groups=2, activation="gelu")(image))
    frozen = freeze(inference_function(model))

    write_onnx(frozen, tmp_path / "model.onnx", input_name="image", output_names=["maps"])

    images = np.random.default_rng(3).normal(0, 2, (3, HEIGHT, WIDTH, 4)).astype(np.float32)
    (maps,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(["maps"], {"image": images})
    assert relative_difference(maps, model(images)) < 1e-5


APPLICATIONS: dict[str, tuple[int, bool]] = {
    "MobileNetV2": (96, False),
    "EfficientNetB0": (64, True),
    "MobileNetV3Small": (64, True),
    "ConvNeXtTiny": (64, True),
}
"""Name in `keras.applications`: side px, and whether it normalises pixels itself."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [name if name == "EfficientNetB0" else pytest.param(name, marks=pytest.mark.chaos) for name in APPLICATIONS]
)
def test_an_application_of_keras_is_imported_and_converted(name: str, tmp_path: Path) -> None:
    side, normalises = APPLICATIONS[name]
    keras.utils.set_random_seed(6)
    original = getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3), classes=7)
    foreign = open_model(save(original, tmp_path), tmp_path / "scratch")

    assert foreign.facts.scale == ((1.0,) if normalises else None)
    assert (foreign.facts.activation, foreign.facts.num_outputs) == ("none", 7)
    spec = replace(SPEC, height_px=side, width_px=side)
    bundle = write_imported(foreign, tmp_path / "bundle", spec=spec)
    images = pixels(spec)
    scale = np.float32(1 if normalises else 1 / 255)
    expected = original(images * scale, training=False)
    for answer in all_ways(bundle.path / "model.keras", images):
        assert relative_difference(answer, expected) < 1e-5
    if foreign.facts.features is not None:
        check_conversions(bundle, tmp_path / "converted", ["openvino", "onnx"])
