import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from mnist_dist.config import ModelConfig
from mnist_dist.errors import ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.backbones import (
    BACKBONES,
    Backbone,
    backbone_shape,
    backbone_size_px,
    check_model,
    check_size,
    check_trainable,
    find_backbone,
    published_weights_url,
)
from mnist_dist.models.classifier import build_classifier

DIGITS = ImageSpec(height_px=28, width_px=28, channels=1)
SMALL = {"mlp", "cnn", "cnn_bn", "conv_base"}
# The module of Keras Applications whose preprocess_input the row must repeat. The applications that bring their own
# preprocessing have an empty one; theirs is compared as a whole network below.
PREPROCESS_INPUT = {
    "vgg16": keras.applications.vgg16,
    "mobilenet": keras.applications.mobilenet,
    "mobilenet_v2": keras.applications.mobilenet_v2,
    "resnet50": keras.applications.resnet,
    "densenet121": keras.applications.densenet,
    "xception": keras.applications.xception,
}
WITH_OWN_PREPROCESSING = {
    "mobilenet_v3_small": keras.applications.MobileNetV3Small,
    "efficientnet_v2_b0": keras.applications.EfficientNetV2B0,
    "convnext_tiny": keras.applications.ConvNeXtTiny,
}


def random_images(count: int, spec: ImageSpec) -> np.ndarray:
    shape = (count, spec.height_px, spec.width_px, spec.channels)
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


def preprocessed(row: Backbone, pixels: np.ndarray) -> np.ndarray:
    x = pixels[..., ::-1] if row.preprocessing.bgr else pixels
    scaled: np.ndarray = x * np.asarray(row.preprocessing.scale) + np.asarray(row.preprocessing.offset)
    return scaled


@pytest.mark.parametrize(
    ("name", "parameters", "trainable"),
    [("mlp", 109_386, 109_386), ("cnn", 421_642, 421_642), ("cnn_bn", 459_210, 458_890)],
)
def test_the_seed_networks_have_their_published_sizes(name: str, parameters: int, trainable: int) -> None:
    network = build_classifier(ModelConfig(backbone=name), spec=DIGITS, num_classes=10).network

    assert network.count_params() == parameters
    assert sum(int(np.prod(weight.shape)) for weight in network.trainable_weights) == trainable


@pytest.mark.parametrize(
    "name", [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES]
)
def test_every_backbone_is_built_saved_and_loaded_by_plain_keras(name: str, tmp_path: Path) -> None:
    row = BACKBONES[name]
    spec = ImageSpec(height_px=29, width_px=31, channels=3)
    config = ModelConfig(backbone=name, image_size_px=row.min_size_px)
    classifier = build_classifier(config, spec=spec, num_classes=7)
    images = random_images(5, spec)

    probabilities = np.asarray(classifier.model(images))
    assert probabilities.shape == (5, 7)
    assert probabilities.dtype == np.float32
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    assert np.array_equal(probabilities, np.asarray(classifier.model(images, training=False)))

    classifier.model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert np.array_equal(probabilities, np.asarray(loaded(images)))
    assert np.array_equal(probabilities, np.asarray(loaded(images, training=False)))

    layers = {layer.name for layer in classifier.backbone.layers}
    assert set(row.cut_points.values()) <= layers
    kinds = {type(layer) for layer in classifier.backbone.layers}
    assert row.has_batch_norm == (keras.layers.BatchNormalization in kinds)


@pytest.mark.parametrize(
    "name", ["cnn_bn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet", "vgg16"))]
)
def test_a_training_step_moves_the_weights(name: str) -> None:
    size_px = BACKBONES[name].min_size_px
    config = ModelConfig(backbone=name, image_size_px=size_px, alpha=0.25 if name == "mobilenet" else 1)
    network = build_classifier(config, spec=DIGITS, num_classes=3).network
    before = [weight.numpy() for weight in network.trainable_weights]
    network.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)

    loss = network.train_on_batch(random_images(6, DIGITS).astype("float32"), np.arange(6) % 3)

    assert np.isfinite(loss)
    moved = [not np.array_equal(old, new.numpy()) for old, new in zip(before, network.trainable_weights, strict=True)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.slow  # a second process imports Keras
def test_a_saved_model_loads_where_mnist_dist_is_not_imported(tmp_path: Path) -> None:
    config = ModelConfig(backbone="mobilenet", alpha=0.25, image_size_px=32)
    model = build_classifier(config, spec=ImageSpec(height_px=17, width_px=19, channels=3), num_classes=3).model
    model.save(tmp_path / "model.keras")
    script = (
        "import keras, numpy, sys\n"
        "model = keras.saving.load_model('model.keras', safe_mode=True)\n"
        "print(numpy.asarray(model(numpy.zeros((1, 17, 19, 3), 'uint8'))).sum())\n"
        "assert not [name for name in sys.modules if name.startswith('mnist_dist')]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", PREPROCESS_INPUT)
def test_preprocessing_is_that_of_keras_applications(name: str) -> None:
    pixels = random_images(2, ImageSpec(height_px=4, width_px=6, channels=3)).astype("float64")
    expected = PREPROCESS_INPUT[name].preprocess_input(pixels.copy())

    assert preprocessed(BACKBONES[name], pixels) == pytest.approx(np.asarray(expected), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_OWN_PREPROCESSING)
def test_preprocessing_in_front_is_that_inside_the_application(name: str) -> None:
    row = BACKBONES[name]
    ours = row.build((32, 32, 3), 1.0)
    theirs = WITH_OWN_PREPROCESSING[name](include_top=False, weights=None, input_shape=(32, 32, 3))
    theirs.set_weights(ours.get_weights())
    pixels = random_images(2, ImageSpec(height_px=32, width_px=32, channels=3)).astype("float32")

    difference = np.asarray(theirs(pixels)) - np.asarray(ours(preprocessed(row, pixels).astype("float32")))
    assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(np.asarray(theirs(pixels)))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_row_is_consistent(name: str) -> None:
    row = BACKBONES[name]

    assert row.name == name
    assert row.min_size_px <= row.native_size_px
    assert row.scratch == (row.weights_published is None)
    assert row.source
    check_trainable(row, next(iter(row.cut_points)))


def test_importing_the_table_imports_no_keras() -> None:
    script = "import sys, mnist_dist.models.backbones; print({'keras', 'tensorflow', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"


def test_an_unknown_backbone_is_refused_with_the_close_names() -> None:
    with pytest.raises(ConfigError, match=r"one of mlp, cnn.*Did you mean resnet50\? Received: backbone='resnet5'"):
        find_backbone("resnet5")


def test_an_image_below_the_min_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"xception needs images of at least 71 px.*Received: image_size_px=64"):
        check_size(find_backbone("xception"), 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(backbone="vgg16", alpha=0.5), r"only mobilenet, mobilenet_v2 take alpha, not vgg16"),
        (ModelConfig(backbone="vgg16", image_size_px=16), r"vgg16 needs images of at least 32 px"),
        (ModelConfig(backbone="cnn", pooling="avg"), r"cnn gives a vector and takes no pooling"),
        (
            ModelConfig(backbone="cnn", weights="imagenet"),
            r"imagenet is for vgg16, mobilenet,.*weights='imagenet'",
        ),
    ],
)
def test_a_configuration_that_the_backbone_does_not_have_is_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(config)


@pytest.mark.parametrize("trainable", ["block9", "", -1])
def test_an_unknown_part_to_train_is_refused_with_the_names(trainable: str | int) -> None:
    with pytest.raises(ConfigError, match=r"one of head, all, block2, .* first layers .*Received: trainable="):
        check_trainable(find_backbone("vgg16"), trainable)


def test_the_backbone_sees_the_images_size_only_where_it_is_trained_from_scratch() -> None:
    images = {"height_px": 20, "width_px": 30, "channels": 1}

    assert backbone_shape(ModelConfig(backbone="cnn"), **images) == (20, 30, 1)
    assert backbone_shape(ModelConfig(backbone="cnn", image_size_px=32), **images) == (32, 32, 1)
    assert backbone_shape(ModelConfig(backbone="xception"), **images) == (299, 299, 3)
    assert backbone_size_px(ModelConfig(backbone="xception")) == 299
    assert backbone_size_px(ModelConfig(backbone="xception", image_size_px=96)) == 96


@pytest.mark.parametrize(
    ("name", "alpha", "size_px", "file"),
    [
        ("vgg16", 1, 96, "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"),
        ("mobilenet", 0.25, 128, "mobilenet_2_5_128_tf_no_top.h5"),
        ("mobilenet", 1.0, 96, "mobilenet_1_0_224_tf_no_top.h5"),
        ("mobilenet_v2", 1, 96, "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_96_no_top.h5"),
        ("mobilenet_v2", 0.35, 100, "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_224_no_top.h5"),
    ],
)
def test_the_published_file_is_the_one_that_keras_downloads(name: str, alpha: float, size_px: int, file: str) -> None:
    url = published_weights_url(find_backbone(name), alpha=alpha, image_size_px=size_px)

    assert url.rsplit("/", 1)[-1] == file
