"""The classifier: a model from pixels to probabilities, with resizing and preprocessing inside.

Owns: the graph (resize, grey to RGB, preprocessing, backbone, pooling, head), its initial weights, loading of
pre-trained weights, and which layers are trained. Does not own: augmentation (`augmentation`, which is never saved),
the training step, or the folder on disk (`bundle`).

Contract: `Classifier.model` has no custom layer, no Lambda and no Resizing layer, so it loads with plain
`keras.saving.load_model` in safe mode without this package, and `model(x)` equals `model(x, training=False)`. The
initial weights depend only on the configuration and `seed`: workers that build with the same seed hold the same
weights. Weights have the same order and shapes in every precision, so that
`a.model.set_weights(b.model.get_weights())` works between precisions.
"""

# B = batch, H = height px, W = width px, C = channels (1 grey, 3 RGB), D = features, K = classes

import contextlib
import fcntl
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import keras

from mnist_dist.config import ModelConfig, Pooling
from mnist_dist.errors import ConfigError, MnistDistError, WeightsError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.backbones import (
    Backbone,
    Preprocessing,
    Shape,
    backbone_shape,
    backbone_size_px,
    check_model,
    check_size,
    check_trainable,
    keras_models_folder,
    published_weights_url,
)
from mnist_dist.models.bundle import BUNDLE_FILE, load_bundle
from mnist_dist.models.weights import FILE_SUFFIXES, check_weights, download_error
from mnist_dist.store.anywhere import ANYWHERE

logger = logging.getLogger(__name__)

BACKBONE_LAYER = "backbone"


@dataclass(frozen=True)
class Classifier:
    """Several models that share one set of layers and weights.

    In a classifier without a backbone (`build_head_alone`), `network` is `head`, and `model`, `features` and `backbone`
    are None.

    Args:
        model: `uint8 [B, H, W, C]`, 0-255 -> `float32 [B, K]` probabilities; the model that is saved.
        network: `float32 [B, H, W, C]`, 0-255 -> `float32 [B, K]` logits; the model that is trained.
        features: `float32 [B, H, W, C]`, 0-255 -> `[B, D]`, the pooled output of the backbone (bfloat16 in that
            precision).
        head: `float32 [B, D]` -> `float32 [B, K]` logits; `head(features(x))` is `network(x)`.
        backbone: the nested model named "backbone".
        row: the backbone's row of the table.
    """

    model: keras.Model
    network: keras.Model
    features: keras.Model
    head: keras.Model
    backbone: keras.Model
    row: Backbone


def build_classifier(
    config: ModelConfig,
    *,
    spec: ImageSpec,
    num_classes: int,
    multi_label: bool = False,
    precision: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    load_weights: bool = True,
) -> Classifier:
    """Builds the classifier with its initial weights.

    This sets the global random state of Python, NumPy and TensorFlow to `seed` (`keras.utils.set_random_seed`), since
    Keras' initialisers draw from it, those inside Keras Applications too.

    Args:
        config: the backbone, its weights and its head.
        spec: size and channels of the input images.
        num_classes: K, at least 2.
        multi_label: each class has a probability of its own (sigmoid); else they add up to 1 (softmax).
        precision: of the arithmetic; weights and logits are float32 either way. The global policy does not change.
        seed: for the initial weights.
        load_weights: False ignores `config.weights`, for a caller that sets the weights itself.

    Raises:
        ConfigError: the backbone does not support the size, width, pooling or weights.
        WeightsError: the weights are missing, belong to another architecture, or cannot be downloaded.
    """
    row = check_model(config)
    if num_classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes. Received: num_classes={num_classes}")
    shape = backbone_shape(config, height_px=spec.height_px, width_px=spec.width_px, channels=spec.channels)
    check_size(row, min(shape[:2]))
    keras.utils.set_random_seed(seed)
    with _dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32"):
        backbone = _build_backbone(row, config, shape=shape, load_weights=load_weights)
        with _dtype_policy("float32"):  # The head is cheap, and computes the same on stored features.
            head_layers = _head_layers(config, row, num_classes=num_classes, seed=seed)
        activation: Literal["softmax", "sigmoid"] = "sigmoid" if multi_label else "softmax"
        return _assemble(config, row, backbone=backbone, head_layers=head_layers, spec=spec, activation=activation)


def build_head_alone(config: ModelConfig, *, num_features: int, num_classes: int, seed: int = 0) -> Classifier:
    """Builds the head that `build_classifier` would build, with the same initial weights, without its backbone.

    Args:
        config: the backbone and its head.
        num_features: D, the size of the backbone's pooled output.
        num_classes: K.
        seed: for the initial weights.

    Raises:
        ConfigError: the backbone does not support the width or pooling.
    """
    row = check_model(config)
    with _dtype_policy("float32"):
        head = _head_model(_head_layers(config, row, num_classes=num_classes, seed=seed), (num_features,))
    return Classifier(model=None, network=head, features=None, head=head, backbone=None, row=row)


def set_trainable(classifier: Classifier, trainable: str | int) -> None:
    """Sets which layers of the backbone are trained; the head always is.

    A frozen BatchNormalization runs in inference mode even when it is called with `training=True`.

    Args:
        classifier: changed in place.
        trainable: `head` (the whole backbone is frozen), `all`, the name of a cut point (train that layer and all
            after it), or the number of first layers of the backbone that stay frozen (the input layer counts, as in
            `backbone.layers[:n]`).

    Raises:
        ConfigError: unknown name, or more layers than the backbone has; the message says what is allowed.
    """
    check_trainable(classifier.row, trainable)
    if classifier.backbone is None:
        return
    layers = classifier.backbone.layers
    frozen = _count_frozen(classifier, trainable)
    if frozen > len(layers):
        raise ConfigError(
            f"{classifier.row.name} has only {len(layers)} layers to freeze. Received: trainable={trainable}"
        )
    classifier.backbone.trainable = trainable != "head"
    for index, layer in enumerate(layers):  # Each by itself: setting `trainable = True` again is not passed down.
        layer.trainable = index >= frozen


def layer_levels(classifier: Classifier) -> dict[int, int]:
    """How far below the head each variable of the backbone is, by its `id`: 1 above the last cut point, one more below
    each. A backbone without cut points has a level for each of its layers with weights."""
    if classifier.backbone is None:
        return {}
    layers = [layer for layer in classifier.backbone.layers if layer.weights]
    cuts = set(classifier.row.cut_points.values())
    names = [layer.name for layer in classifier.backbone.layers]
    starts = [names.index(cut) for cut in cuts] or [names.index(layer.name) for layer in layers[1:]]
    levels = dict[int, int]()
    for layer in layers:
        level = 1 + sum(start > names.index(layer.name) for start in starts)
        levels |= {id(variable): level for variable in layer.weights}
    return levels


def _count_frozen(classifier: Classifier, trainable: str | int) -> int:
    if isinstance(trainable, int):
        return trainable
    if trainable in ("head", "all"):
        return len(classifier.backbone.layers) if trainable == "head" else 0
    names = [layer.name for layer in classifier.backbone.layers]
    return names.index(classifier.row.cut_points[trainable])


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _assemble(
    config: ModelConfig,
    row: Backbone,
    *,
    backbone: keras.Model,
    head_layers: list[keras.layers.Layer],
    spec: ImageSpec,
    activation: Literal["softmax", "sigmoid"],
) -> Classifier:
    """Builds each model as another path through the same layers."""
    image_shape = (spec.height_px, spec.width_px, spec.channels)
    preprocess = _rescaling(row.preprocessing)
    pool = _pooling_layers(config.pooling or row.pooling)
    probabilities = keras.layers.Activation(activation, dtype="float32", name="probabilities")

    def pooled(pixels: keras.KerasTensor) -> keras.KerasTensor:
        x = _to_backbone_input(pixels, shape=backbone.input_shape[1:], bgr=row.preprocessing.bgr)
        return _chain([preprocess, backbone, *pool], x)

    pixels = keras.Input(image_shape, dtype="float32", name="pixels")
    vector = pooled(pixels)
    image = keras.Input(image_shape, dtype="uint8", name="image")
    image_probabilities = probabilities(_chain(head_layers, pooled(keras.ops.cast(image, "float32"))))
    return Classifier(
        model=keras.Model(image, image_probabilities, name="classifier"),
        network=keras.Model(pixels, _chain(head_layers, vector), name="network"),
        features=keras.Model(pixels, vector, name="features"),
        head=_head_model(head_layers, vector.shape[1:]),
        backbone=backbone,
        row=row,
    )


def _chain(layers: list[keras.layers.Layer], x: keras.KerasTensor) -> keras.KerasTensor:
    for layer in layers:
        x = layer(x)
    return x


def _to_backbone_input(pixels: keras.KerasTensor, *, shape: Shape, bgr: bool) -> keras.KerasTensor:
    """The pixels at the backbone's size and channels, `float32 [B, H, W, C]`, still 0-255."""
    x = pixels
    if x.shape[1:3] != shape[:2]:
        # Not a Resizing layer: in a functional model it puts all layers after it in training mode (Keras 3.15).
        x = keras.ops.image.resize(x, shape[:2], interpolation="bilinear")
    if x.shape[-1] == 1 and shape[-1] == 3:
        return keras.ops.concatenate([x, x, x], axis=-1)
    return x[..., ::-1] if bgr else x


def _rescaling(preprocessing: Preprocessing) -> keras.layers.Layer:
    def as_list(value: tuple[float, ...] | float) -> list[float] | float:
        return list(value) if isinstance(value, tuple) else value

    scale, offset = as_list(preprocessing.scale), as_list(preprocessing.offset)
    return keras.layers.Rescaling(scale, offset, dtype="float32", name="preprocess")


def _pooling_layers(pooling: Pooling | None) -> list[keras.layers.Layer]:
    if pooling is None:
        return []
    if pooling == "flatten":
        return [keras.layers.Flatten(name="pool")]
    kind = keras.layers.GlobalAveragePooling2D if pooling == "avg" else keras.layers.GlobalMaxPooling2D
    return [kind(name="pool")]


def _head_model(layers: list[keras.layers.Layer], shape: tuple[int, ...]) -> keras.Model:
    vector = keras.Input(shape, dtype="float32", name="features")
    return keras.Model(vector, _chain(layers, vector), name="head")


def _head_layers(config: ModelConfig, row: Backbone, *, num_classes: int, seed: int) -> list[keras.layers.Layer]:
    """The head's layers. Their initial weights depend only on the seed, not on what was drawn for the backbone."""
    initializers = [keras.initializers.GlorotUniform(seed=2 * seed + index) for index in (0, 1)]
    hidden_units = config.hidden_units or row.hidden_units
    dropout = row.dropout if config.dropout is None else config.dropout
    hidden = (
        [keras.layers.Dense(hidden_units, activation="relu", kernel_initializer=initializers[0], name="hidden")]
        if hidden_units
        else []
    )
    drop = [keras.layers.Dropout(dropout, name="dropout")] if dropout else []
    logits = keras.layers.Dense(num_classes, kernel_initializer=initializers[1], dtype="float32", name="logits")
    return [*hidden, *drop, logits]


def _build_backbone(row: Backbone, config: ModelConfig, *, shape: Shape, load_weights: bool) -> keras.Model:
    weights = config.weights if load_weights else "none"
    if weights == "imagenet":
        return _named(_build_from_imagenet(row, config, shape=shape))
    backbone = _named(row.build(shape, config.alpha))
    if weights != "none":
        logger.info("loading the weights of %s from %s", row.name, weights)
        _load_weights(backbone, weights, name=row.name)
    return backbone


def _named(model: keras.Model) -> keras.Model:
    return keras.Model(model.inputs[0], model.outputs[0], name=BACKBONE_LAYER)


def fetch_published_weights(config: ModelConfig) -> None:
    """Downloads the ImageNet weights into Keras' cache, one process of a node at a time.

    Keras downloads to the final file name, so processes that build at the same time would read each other's partial
    files. Training workers build in lockstep and cannot take turns then, so they call this first.

    Raises:
        ConfigError: the backbone has no published weights.
        WeightsError: the weights cannot be downloaded.
    """
    row = check_model(config)
    size_px = backbone_size_px(config)
    url = published_weights_url(row, alpha=config.alpha, image_size_px=size_px)
    folder = keras_models_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mnist_dist.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / url.rsplit("/", 1)[-1]
        if path.exists():
            return
        part = f"{path.name}.part"  # A killed download leaves no file under the final name.
        try:
            Path(keras.utils.get_file(part, url, cache_subdir="models", force_download=True)).replace(path)
        except Exception as err:  # Keras raises a plain Exception where the download fails
            raise download_error(config, err) from err


def _build_from_imagenet(row: Backbone, config: ModelConfig, *, shape: Shape) -> keras.Model:
    try:
        return row.build(shape, config.alpha, "imagenet")
    except Exception as err:  # Keras raises a plain Exception where the download fails
        raise download_error(config, err) from err


def _load_weights(backbone: keras.Model, weights: str, *, name: str) -> None:
    check_weights(weights, backbone=name)
    if weights.endswith(FILE_SUFFIXES):
        _load_weights_file_at(backbone, weights, name=name)
    else:
        _load_weights_of_bundle(backbone, weights, name=name)


def _load_weights_file_at(backbone: keras.Model, uri: str, *, name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = ANYWHERE.local_path(uri, Path(scratch))
        except (FileNotFoundError, PermissionError) as err:
            raise WeightsError(f"weights for {name} cannot be read: {err}. Received: weights={uri!r}") from err
        _load_weights_file(backbone, path, name=name, uri=uri)


def _load_weights_file(backbone: keras.Model, path: Path, *, name: str, uri: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Skipping nested container")  # once per layer, before it fails
            backbone.load_weights(path)
    except (ValueError, KeyError, OSError) as err:
        difference = _first_difference(_layer_shapes(backbone), _file_shapes(backbone, path))
        raise WeightsError(f"the weights do not fit {name}: {difference or err}. Received: weights={uri!r}") from err


def _load_weights_of_bundle(backbone: keras.Model, uri: str, *, name: str) -> None:
    try:
        bundle = load_bundle(uri)
    except MnistDistError as err:
        raise WeightsError(
            f"weights for {name} are neither a .h5 file nor a bundle (a folder with {BUNDLE_FILE}): {err}"
        ) from err
    if bundle.info.is_ensemble:
        raise WeightsError(f"an ensemble has several backbones: give one of its members. Received: weights={uri!r}")
    base = bundle.model.get_layer(BACKBONE_LAYER)
    difference = _first_difference(_layer_shapes(backbone), _layer_shapes(base))
    if difference:
        raise WeightsError(
            f"the bundle's backbone ({bundle.info.backbone}) does not fit {name}: {difference}. "
            f"Received: weights={uri!r}"
        )
    backbone.set_weights(base.get_weights())


LayerShapes = list[tuple[str, list[tuple[int, ...]]]]


def _layer_shapes(model: keras.Model) -> LayerShapes:
    """Name and weight shapes of each layer that has weights."""
    return [(layer.name, [tuple(w.shape) for w in layer.weights]) for layer in model.layers if layer.weights]


def _file_shapes(model: keras.Model, path: Path) -> LayerShapes:
    """The same for a `.weights.h5` file, by the group in which Keras looks for each layer.

    Keras names the group after the layer's class and its count in the model, not after the layer's own name
    (keras/src/saving/saving_lib.py, `_save_container_state`).
    """
    import h5py

    counts: dict[str, int] = {}
    shapes: LayerShapes = []
    try:
        with h5py.File(path, "r") as file:
            for layer in model.layers:
                kind = _snake_case(type(layer).__name__)
                group = f"layers/{kind}_{counts[kind]}" if kind in counts else f"layers/{kind}"
                counts[kind] = counts.get(kind, 0) + 1
                if layer.weights:
                    shapes.append((group, _shapes_under(file.get(group))))
    except OSError:
        return []
    return shapes if any(layer_shapes for _, layer_shapes in shapes) else []


def _shapes_under(group: object) -> list[tuple[int, ...]]:
    import h5py

    shapes: list[tuple[int, ...]] = []
    if isinstance(group, h5py.Group):
        group.visititems(lambda _, item: shapes.append(tuple(item.shape)) if isinstance(item, h5py.Dataset) else None)
    return shapes


def _snake_case(name: str) -> str:
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _first_difference(expected: LayerShapes, found: LayerShapes) -> str | None:
    """Describes the first layer whose shapes differ; None where all agree or the found shapes are unknown."""
    for (layer, shapes), (found_layer, found_shapes) in zip(expected, found, strict=False):
        if sorted(shapes) != sorted(found_shapes):
            return f"layer {layer!r} expected weights of shapes {shapes}, found {found_shapes} in {found_layer!r}"
    if found and len(expected) != len(found):
        return f"expected {len(expected)} layers with weights, found {len(found)}"
    return None
