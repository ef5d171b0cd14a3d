import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from mnist_dist.config import ModelConfig, Pooling
from mnist_dist.errors import ConfigError, WeightsError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import BundleInfo, write_bundle
from mnist_dist.models.classifier import Classifier, build_classifier, set_trainable

SPEC = ImageSpec(height_px=14, width_px=12, channels=1)
COLOURS = ImageSpec(height_px=14, width_px=12, channels=3)
SMALL = ModelConfig(backbone="mobilenet", alpha=0.25, image_size_px=32)
ASSETS = Path(__file__).parents[2] / "shared" / "assets" / "weights"
MOBILENET_025 = ASSETS / "mobilenet_025.weights.h5"
VGG16 = ASSETS / "vgg16.weights.h5"


def random_images(count: int, spec: ImageSpec) -> np.ndarray:
    shape = (count, spec.height_px, spec.width_px, spec.channels)
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


def build(backbone: str = "cnn", *, spec: ImageSpec = SPEC, weights: str = "none", **options: object) -> Classifier:
    config = ModelConfig(backbone=backbone, weights=weights)
    return build_classifier(config, spec=spec, num_classes=3, **options)  # type: ignore[arg-type]


def same_weights(first: keras.Model, second: keras.Model) -> bool:
    pairs = zip(first.get_weights(), second.get_weights(), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def relative_difference(found: object, expected: object) -> float:
    return float(np.linalg.norm(np.asarray(found) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected)))


def test_the_initial_weights_are_a_function_of_the_seed() -> None:
    first = build(seed=4).model
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])  # whatever else is built in between
    again, other = build(seed=4).model, build(seed=5).model

    assert same_weights(first, again)
    assert not same_weights(first, other)


@pytest.mark.parametrize("config", [ModelConfig(backbone="cnn_bn", hidden_units=5), SMALL])
def test_all_models_of_a_classifier_are_the_same_function(config: ModelConfig) -> None:
    classifier = build_classifier(config, spec=SPEC, num_classes=3)
    images = random_images(5, SPEC)
    pixels = images.astype("float32")

    logits = classifier.network(pixels)
    assert relative_difference(classifier.head(classifier.features(pixels)), logits) < 1e-6
    assert relative_difference(classifier.model(images), keras.ops.softmax(logits)) < 1e-6
    assert classifier.model.get_layer("backbone") is classifier.backbone


@pytest.mark.parametrize("config", [ModelConfig(backbone="cnn_bn"), pytest.param(SMALL, marks=pytest.mark.slow)])
def test_bfloat16_takes_and_gives_float32_and_shares_the_weights(config: ModelConfig) -> None:
    keras.config.set_dtype_policy("float32")
    full = build_classifier(config, spec=SPEC, num_classes=3, seed=1)
    half = build_classifier(config, spec=SPEC, num_classes=3, seed=2, precision="bfloat16")
    half.model.set_weights(full.model.get_weights())
    pixels = random_images(5, SPEC).astype("float32")

    assert keras.config.dtype_policy().name == "float32"
    assert same_weights(full.model, half.model)
    assert [weight.path for weight in full.backbone.weights] == [weight.path for weight in half.backbone.weights]
    assert half.network.output.dtype == half.model.output.dtype == half.head.input.dtype == "float32"
    assert half.backbone.layers[-1].compute_dtype == "bfloat16"
    assert 0 < relative_difference(half.network(pixels), full.network(pixels)) < 0.05


def test_precision_does_not_depend_on_the_global_policy() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        classifier = build("cnn")
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")

    assert {layer.dtype_policy.name for layer in classifier.backbone.layers} == {"float32"}


def test_images_are_enlarged_inside_and_grey_becomes_rgb() -> None:
    grey = build_classifier(SMALL, spec=SPEC, num_classes=3)
    colours = build_classifier(SMALL, spec=COLOURS, num_classes=3)
    enlarged = build_classifier(SMALL, spec=ImageSpec(height_px=32, width_px=32, channels=3), num_classes=3)
    images = random_images(4, SPEC)
    large = keras.ops.image.resize(np.repeat(images, 3, -1).astype("float32"), (32, 32), interpolation="bilinear")

    assert grey.backbone.input_shape == (None, 32, 32, 3)
    assert relative_difference(colours.model(np.repeat(images, 3, -1)), grey.model(images)) < 1e-6
    assert relative_difference(enlarged.network(large), grey.network(images.astype("float32"))) < 1e-5


def test_a_backbone_trained_from_scratch_keeps_size_and_grey() -> None:
    assert build("conv_base").backbone.input_shape == (None, 14, 12, 1)
    assert build("conv_base", spec=COLOURS).backbone.input_shape == (None, 14, 12, 3)


@pytest.mark.parametrize(("pooling", "features"), [("avg", 256), ("max", 256), ("flatten", 4 * 256), (None, 256)])
def test_pooling_makes_a_vector_of_the_feature_map(pooling: Pooling | None, features: int) -> None:
    config = ModelConfig(backbone="mobilenet", alpha=0.25, image_size_px=64, pooling=pooling)

    assert build_classifier(config, spec=SPEC, num_classes=3).features.output_shape == (None, features)


def test_the_head_is_as_configured_or_as_the_backbone_has_it() -> None:
    config = ModelConfig(backbone="cnn", hidden_units=6, dropout=0.25)
    head = build_classifier(config, spec=SPEC, num_classes=3).head
    own = build("conv_base").head

    assert [layer.name for layer in head.layers] == ["features", "hidden", "dropout", "logits"]
    assert (head.get_layer("hidden").units, head.get_layer("dropout").rate) == (6, 0.25)
    assert (own.get_layer("hidden").units, own.get_layer("dropout").rate) == (128, 0.5)


@pytest.mark.parametrize(
    ("config", "spec", "num_classes", "message"),
    [
        (ModelConfig(), SPEC, 1, r"at least 2 classes. Received: num_classes=1"),
        (ModelConfig(), ImageSpec(height_px=3, width_px=9, channels=1), 2, r"cnn needs images of at least 4 px"),
        (ModelConfig(backbone="lenet"), SPEC, 2, r"backbone must be one of mlp, cnn"),
    ],
)
def test_what_cannot_be_built_is_refused(config: ModelConfig, spec: ImageSpec, num_classes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_classifier(config, spec=spec, num_classes=num_classes)


# --- what is trained ---


def trained_layers(classifier: Classifier) -> list[str]:
    return [layer.name for layer in classifier.backbone.layers if layer.trainable_weights]


def test_the_head_alone_the_rest_or_all_is_trained() -> None:
    classifier = build("cnn_bn")

    set_trainable(classifier, "head")
    assert [weight.path for weight in classifier.network.trainable_weights] == ["logits/kernel", "logits/bias"]
    set_trainable(classifier, "conv3")
    assert trained_layers(classifier) == ["conv3", "conv3_bn", "dense1"]
    set_trainable(classifier, 3)  # the input layer, conv1 and conv1_bn
    assert trained_layers(classifier) == ["conv2", "conv2_bn", "conv3", "conv3_bn", "dense1"]
    set_trainable(classifier, "all")
    assert trained_layers(classifier)[0] == "conv1"
    assert len(classifier.model.trainable_weights) == len(classifier.network.trainable_weights) == 16


@pytest.mark.parametrize("trainable", ["head", "conv3", 3])
def test_frozen_batch_normalisation_works_in_inference_mode(trainable: str | int) -> None:
    classifier = build("cnn_bn")
    set_trainable(classifier, trainable)
    first = keras.Model(classifier.backbone.input, classifier.backbone.get_layer("conv1_bn").output)
    before = first.get_layer("conv1_bn").moving_mean.numpy()
    pixels = random_images(5, SPEC).astype("float32")

    assert np.array_equal(first(pixels, training=True), first(pixels, training=False))
    classifier.network(pixels, training=True)
    assert np.array_equal(first.get_layer("conv1_bn").moving_mean.numpy(), before)


def test_an_unknown_part_to_train_is_refused() -> None:
    classifier = build("cnn")

    with pytest.raises(ConfigError, match=r"one of head, all, conv1, conv2, dense1, .* trainable='block5'"):
        set_trainable(classifier, "block5")
    with pytest.raises(ConfigError, match=r"cnn has only 7 layers to freeze. Received: trainable=8"):
        set_trainable(classifier, 8)


# --- weights to start from ---


def write_cnn_bundle(path: Path, classifier: Classifier, backbone: str) -> None:
    info = BundleInfo(class_names=("a", "b", "c"), spec=SPEC, backbone=backbone)
    write_bundle(path, classifier.model, info)


def test_weights_start_from_a_file(tmp_path: Path) -> None:
    source = build(seed=1)
    file = tmp_path / "base.weights.h5"
    source.backbone.save_weights(file)

    assert same_weights(build(seed=2, weights=str(file)).backbone, source.backbone)
    assert not same_weights(build(seed=2, weights=str(file)).head, source.head)
    assert not same_weights(build(seed=2, weights=str(file), load_weights=False).backbone, source.backbone)


def test_weights_start_from_the_backbone_of_a_bundle(tmp_path: Path) -> None:
    source = build("conv_base", seed=1)
    write_cnn_bundle(tmp_path / "bundle", source, "conv_base")

    started = build("conv_base", seed=2, weights=str(tmp_path / "bundle"))
    assert same_weights(started.backbone, source.backbone)
    assert not same_weights(started.head, source.head)


def test_weights_of_another_architecture_name_the_first_difference(tmp_path: Path) -> None:
    file = tmp_path / "wide.weights.h5"
    layers = keras.layers
    wide = [layers.Conv2D(40, 3, padding="same"), layers.Conv2D(64, 3), layers.Flatten(), layers.Dense(128)]
    keras.Sequential([keras.Input((14, 12, 1)), *wide]).save_weights(file)
    difference = r"do not fit cnn: layer 'conv1' expected weights of shapes \[\(3, 3, 1, 32\), \(32,\)\], found "

    with pytest.raises(WeightsError, match=difference + r"\[\(3, 3, 1, 40\), \(40,\)\] in 'layers/conv2d'"):
        build(weights=str(file))


def test_a_bundle_of_another_architecture_names_the_first_difference(tmp_path: Path) -> None:
    write_cnn_bundle(tmp_path / "bundle", build("mlp"), "mlp")
    difference = r"backbone \(mlp\) does not fit cnn: layer 'conv1' expected .* found \[\(168, 128\), \(128,\)\]"

    with pytest.raises(WeightsError, match=difference):
        build(weights=str(tmp_path / "bundle"))


def test_weights_that_are_missing_or_nothing_of_the_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"are no file or bundle; .* Allowed are imagenet, none, .*'nowhere.h5'"):
        build(weights="nowhere.h5")
    with pytest.raises(WeightsError, match=r"neither a .h5 file nor a bundle .*bundle.json"):
        build(weights=str(tmp_path))
    (tmp_path / "text.weights.h5").write_text("not HDF5")
    with pytest.raises(WeightsError, match=r"the weights do not fit cnn: .*text.weights.h5"):
        build(weights=str(tmp_path / "text.weights.h5"))


@pytest.mark.slow  # Keras reads KERAS_HOME when it is imported: a second process
def test_imagenet_without_a_network_names_the_file_and_its_place(tmp_path: Path) -> None:
    script = (
        "import json\n"
        "from mnist_dist.config import ModelConfig\n"
        "from mnist_dist.images.decoder import ImageSpec\n"
        "from mnist_dist.errors import WeightsError\n"
        "from mnist_dist.models.classifier import build_classifier\n"
        "config = ModelConfig(backbone='mobilenet', weights='imagenet', alpha=0.25, image_size_px=128)\n"
        "try:\n"
        "    build_classifier(config, spec=ImageSpec(height_px=9, width_px=8, channels=1), num_classes=2)\n"
        "except WeightsError as err:\n"
        "    print(json.dumps(str(err)))\n"
    )
    nowhere = {"https_proxy": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path)}
    environment = os.environ | nowhere | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)

    message = json.loads(done.stdout.splitlines()[-1])
    assert "put the file mobilenet_2_5_128_tf_no_top.h5 from https://storage.googleapis.com/" in message
    assert f"into {tmp_path / 'models'}" in message


def check_features(config: ModelConfig, application: keras.Model, preprocess_input: object, size_px: int) -> None:
    """The features of a classifier on real weights are those of Keras' own application and preprocessing."""
    spec = ImageSpec(height_px=size_px, width_px=size_px, channels=3)
    classifier = build_classifier(config, spec=spec, num_classes=3)
    application.load_weights(config.weights)
    pixels = random_images(2, spec).astype("float32")

    expected = application(preprocess_input(pixels.copy()))  # type: ignore[operator]
    assert relative_difference(classifier.features(pixels), expected) < 1e-5


@pytest.mark.skipif(not MOBILENET_025.exists(), reason=f"real weights are not at {MOBILENET_025}")
def test_real_mobilenet_weights_give_the_features_of_keras_applications() -> None:
    config = ModelConfig(backbone="mobilenet", alpha=0.25, image_size_px=64, weights=str(MOBILENET_025))
    application = keras.applications.MobileNet(
        alpha=0.25, include_top=False, weights=None, input_shape=(64, 64, 3), pooling="avg"
    )
    check_features(config, application, keras.applications.mobilenet.preprocess_input, 64)


@pytest.mark.slow
@pytest.mark.skipif(not VGG16.exists(), reason=f"real weights are not at {VGG16}")
def test_real_vgg16_weights_give_the_features_of_keras_applications() -> None:
    config = ModelConfig(backbone="vgg16", image_size_px=48, weights=str(VGG16))
    application = keras.applications.VGG16(include_top=False, weights=None, input_shape=(48, 48, 3), pooling="avg")
    check_features(config, application, keras.applications.vgg16.preprocess_input, 48)


@pytest.mark.skipif(not MOBILENET_025.exists(), reason=f"real weights are not at {MOBILENET_025}")
def test_real_weights_of_another_width_are_refused() -> None:
    config = ModelConfig(backbone="mobilenet", alpha=0.5, image_size_px=32, weights=str(MOBILENET_025))

    with pytest.raises(WeightsError, match=r"layer 'conv1' expected weights of shapes \[\(3, 3, 3, 16\)\], found"):
        build_classifier(config, spec=SPEC, num_classes=3)
