"""One literal table of the backbones: how each is built, where its weights are published, what input it expects.

Owns: the names, sizes, preprocessing, default heads and cut points for fine-tuning, the row of an imported bundle, and
the configuration checks that need nothing but these. Does not own: the head, or loading and freezing weights
(`classifier`).

Contract: importing this module imports neither Keras nor TensorFlow, so that a driver can check a configuration in
milliseconds; the builders import Keras when they are called. A builder takes the shape of a preprocessed float32 image
and returns a Keras model that maps `float32 [B, H, W, C]` to a feature map `[B, h, w, D]`, or to a vector `[B, D]`
where `pooling` is None.
"""

# B = batch, H = height px, W = width px, C = channels (RGB), D = features

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

from mnist_dist.config import ModelConfig, Pooling, may_be_bundle, require
from mnist_dist.errors import ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import ONNX_FILE, BundleInfo, read_bundle_info

if TYPE_CHECKING:
    import keras

Shape = tuple[int, int, int]

KERAS_APPLICATIONS_URL = "https://storage.googleapis.com/tensorflow/keras-applications"


class BuildBackbone(Protocol):
    """Builds a backbone for a `(height, width, channels)` and a width multiplier, with published or no weights."""

    def __call__(self, shape: Shape, alpha: float, weights: Literal["imagenet"] | None = None) -> "keras.Model": ...


@dataclass(frozen=True)
class Preprocessing:
    """What is applied to pixels in 0-255 before the backbone: `pixels * scale + offset`.

    Args:
        scale: factor, one for all channels or one per channel.
        offset: added after scaling, likewise.
        bgr: the channels are reversed first; scale and offset are then in the order blue, green, red.
    """

    scale: tuple[float, ...] | float
    offset: tuple[float, ...] | float = 0.0
    bgr: bool = False


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A row of the table.

    Args:
        name: the value of `--backbone`.
        build: builds the network without preprocessing and head.
        weights_published: URL of the ImageNet weights, with `{alpha}` and `{size}` to fill in; None: there are none,
            so it trains from scratch or starts from a file or a bundle.
        preprocessing: what the published weights expect.
        native_size_px: height and width it was designed for.
        min_size_px: smallest height and width; below it the feature map is empty, or Keras refuses.
        scratch: it trains from scratch at any size and keeps grey images grey; the others always see RGB.
        has_alpha: it has a width multiplier.
        has_batch_norm: it has BatchNorm, whose statistics are of whole batches.
        pooling: how its feature map becomes a vector by default; None: its output is already a vector.
        dropout: default dropout before the output.
        hidden_units: default width of a dense layer between backbone and output; 0: none.
        cut_points: name -> the first trained layer, for fine-tuning that layer and all after it.
        source: the paper or code it follows.
        imported: the bundle's description, where the backbone is a bundle and no row of the table: a frozen network
            that takes images of the bundle's spec and gives a vector.
    """

    name: str
    build: BuildBackbone
    weights_published: str | None = None
    preprocessing: Preprocessing
    native_size_px: int
    min_size_px: int
    scratch: bool = False
    has_alpha: bool = False
    has_batch_norm: bool = False
    pooling: Pooling | None = "avg"
    dropout: float = 0.0
    hidden_units: int = 0
    cut_points: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    source: str
    imported: BundleInfo | None = None


def _mlp(shape: Shape, alpha: float, weights: Literal["imagenet"] | None = None) -> "keras.Model":
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Flatten(name="flatten"),
            layers.Dense(128, activation="relu", name="dense1"),
            layers.Dense(64, activation="relu", name="dense2"),
        ],
        name="mlp",
    )


def _cnn(shape: Shape, alpha: float, weights: Literal["imagenet"] | None = None) -> "keras.Model":
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(64, 3, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(name="flatten"),
            layers.Dense(128, activation="relu", name="dense1"),
        ],
        name="cnn",
    )


def _cnn_bn(shape: Shape, alpha: float, weights: Literal["imagenet"] | None = None) -> "keras.Model":
    import keras
    from keras import layers

    def batch_norm(name: str) -> keras.layers.Layer:
        return layers.BatchNormalization(synchronized=_is_synchronized(), name=name)

    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv1"),
            batch_norm("conv1_bn"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(64, 3, padding="same", activation="relu", name="conv2"),
            batch_norm("conv2_bn"),
            layers.MaxPooling2D(name="pool2"),
            layers.Conv2D(64, 3, padding="same", activation="relu", name="conv3"),
            batch_norm("conv3_bn"),
            layers.Flatten(name="flatten"),
            layers.Dense(128, activation="relu", name="dense1"),
        ],
        name="cnn_bn",
    )


def _conv_base(shape: Shape, alpha: float, weights: Literal["imagenet"] | None = None) -> "keras.Model":
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(64, 3, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(name="pool2"),
            layers.Conv2D(128, 3, padding="same", activation="relu", name="conv3"),
            layers.MaxPooling2D(name="pool3"),
        ],
        name="conv_base",
    )


@dataclass(frozen=True)
class _Application:
    """Builds a network of Keras Applications, by its function's name, without top and preprocessing."""

    function: str
    has_alpha: bool = False
    own_preprocessing: bool = False

    def __call__(self, shape: Shape, alpha: float, weights: Literal["imagenet"] | None = None) -> "keras.Model":
        import keras

        options: dict[str, object] = {"include_top": False, "input_shape": shape, "weights": weights}
        if self.has_alpha:
            options["alpha"] = alpha
        if self.own_preprocessing:
            options["include_preprocessing"] = False
        application = getattr(keras.applications, self.function)(**options)
        for layer in application.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = _is_synchronized()
        return application


def _is_synchronized() -> bool:
    """Whether BatchNorm must be told to take its statistics over all workers, which keeps their weights equal. On JAX a
    training step is one program over all workers, whose statistics always are of the whole batch."""
    import keras

    return bool(keras.backend.backend() == "tensorflow")


# CAFFE, MINUS_ONE_TO_ONE and TORCH are the modes of Keras Applications' `preprocess_input` for RGB pixels in 0-255
# (keras/src/applications/imagenet_utils.py: modes "caffe", "tf" and "torch").
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
ZERO_TO_ONE = Preprocessing(scale=1 / 255)
CAFFE = Preprocessing(scale=1.0, offset=(-103.939, -116.779, -123.68), bgr=True)
MINUS_ONE_TO_ONE = Preprocessing(scale=1 / 127.5, offset=-1.0)
TORCH = Preprocessing(
    scale=tuple(1 / (255 * deviation) for deviation in IMAGENET_DEVIATION),
    offset=tuple(-mean / deviation for mean, deviation in zip(IMAGENET_MEAN, IMAGENET_DEVIATION, strict=True)),
)

BACKBONES: dict[str, Backbone] = {
    "mlp": Backbone(
        name="mlp",
        build=_mlp,
        preprocessing=ZERO_TO_ONE,
        native_size_px=28,
        min_size_px=1,
        scratch=True,
        pooling=None,
        cut_points={"dense1": "dense1", "dense2": "dense2"},
        source="Two dense layers, 784-128-64, as in most first lessons on MNIST",
    ),
    "cnn": Backbone(
        name="cnn",
        build=_cnn,
        preprocessing=ZERO_TO_ONE,
        native_size_px=28,
        min_size_px=4,
        scratch=True,
        pooling=None,
        cut_points={"conv1": "conv1", "conv2": "conv2", "dense1": "dense1"},
        source="LeCun et al. 1998, 'Gradient-based learning applied to document recognition', in today's form",
    ),
    "cnn_bn": Backbone(
        name="cnn_bn",
        build=_cnn_bn,
        preprocessing=ZERO_TO_ONE,
        native_size_px=28,
        min_size_px=4,
        has_batch_norm=True,
        scratch=True,
        pooling=None,
        dropout=0.5,
        cut_points={"conv1": "conv1", "conv2": "conv2", "conv3": "conv3", "dense1": "dense1"},
        source="`cnn` with batch normalisation (Ioffe and Szegedy 2015, arXiv:1502.03167) and dropout",
    ),
    "conv_base": Backbone(
        name="conv_base",
        build=_conv_base,
        preprocessing=ZERO_TO_ONE,
        native_size_px=28,
        min_size_px=8,
        scratch=True,
        pooling="flatten",
        dropout=0.5,
        hidden_units=128,
        cut_points={"conv1": "conv1", "conv2": "conv2", "conv3": "conv3"},
        source="Three convolutions with pooling, pre-trained once and kept frozen under new heads",
    ),
    "vgg16": Backbone(
        name="vgg16",
        build=_Application("VGG16"),
        weights_published=f"{KERAS_APPLICATIONS_URL}/vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
        preprocessing=CAFFE,
        native_size_px=224,
        min_size_px=32,
        cut_points={
            "block2": "block2_conv1",
            "block3": "block3_conv1",
            "block4": "block4_conv1",
            "block5": "block5_conv1",
        },
        source="Simonyan and Zisserman 2014, arXiv:1409.1556",
    ),
    "mobilenet": Backbone(
        name="mobilenet",
        build=_Application("MobileNet", has_alpha=True),
        weights_published=f"{KERAS_APPLICATIONS_URL}/mobilenet/mobilenet_{{alpha}}_{{size}}_tf_no_top.h5",
        preprocessing=MINUS_ONE_TO_ONE,
        native_size_px=224,
        min_size_px=32,
        has_batch_norm=True,
        has_alpha=True,
        cut_points={"block4": "conv_pad_4", "block6": "conv_pad_6", "block12": "conv_pad_12", "block13": "conv_dw_13"},
        source="Howard et al. 2017, arXiv:1704.04861",
    ),
    "mobilenet_v2": Backbone(
        name="mobilenet_v2",
        build=_Application("MobileNetV2", has_alpha=True),
        weights_published=f"{KERAS_APPLICATIONS_URL}/mobilenet_v2/"
        "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{alpha}_{size}_no_top.h5",
        preprocessing=MINUS_ONE_TO_ONE,
        native_size_px=224,
        min_size_px=32,
        has_batch_norm=True,
        has_alpha=True,
        cut_points={
            "block3": "block_3_expand",
            "block6": "block_6_expand",
            "block13": "block_13_expand",
            "block16": "block_16_expand",
            "top": "Conv_1",
        },
        source="Sandler et al. 2018, arXiv:1801.04381",
    ),
    "mobilenet_v3_small": Backbone(
        name="mobilenet_v3_small",
        build=_Application("MobileNetV3Small", own_preprocessing=True),
        weights_published=f"{KERAS_APPLICATIONS_URL}/mobilenet_v3/weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5",
        preprocessing=MINUS_ONE_TO_ONE,
        native_size_px=224,
        min_size_px=32,
        has_batch_norm=True,
        cut_points={
            "block3": "expanded_conv_3_expand",
            "block8": "expanded_conv_8_expand",
            "block10": "expanded_conv_10_expand",
            "top": "conv_1",
        },
        source="Howard et al. 2019, arXiv:1905.02244",
    ),
    "resnet50": Backbone(
        name="resnet50",
        build=_Application("ResNet50"),
        weights_published=f"{KERAS_APPLICATIONS_URL}/resnet/resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        preprocessing=CAFFE,
        native_size_px=224,
        min_size_px=32,
        has_batch_norm=True,
        cut_points={
            "stage2": "conv2_block1_1_conv",
            "stage3": "conv3_block1_1_conv",
            "stage4": "conv4_block1_1_conv",
            "stage5": "conv5_block1_1_conv",
        },
        source="He et al. 2015, arXiv:1512.03385",
    ),
    "densenet121": Backbone(
        name="densenet121",
        build=_Application("DenseNet121"),
        weights_published=f"{KERAS_APPLICATIONS_URL}/densenet/densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
        preprocessing=TORCH,
        native_size_px=224,
        min_size_px=32,
        has_batch_norm=True,
        cut_points={
            "stage2": "conv2_block1_0_bn",
            "stage3": "conv3_block1_0_bn",
            "stage4": "conv4_block1_0_bn",
            "stage5": "conv5_block1_0_bn",
        },
        source="Huang et al. 2016, arXiv:1608.06993",
    ),
    "efficientnet_v2_b0": Backbone(
        name="efficientnet_v2_b0",
        build=_Application("EfficientNetV2B0", own_preprocessing=True),
        weights_published=f"{KERAS_APPLICATIONS_URL}/efficientnet_v2/efficientnetv2-b0_notop.h5",
        preprocessing=TORCH,
        native_size_px=224,
        min_size_px=32,
        has_batch_norm=True,
        cut_points={
            "block3": "block3a_expand_conv",
            "block4": "block4a_expand_conv",
            "block5": "block5a_expand_conv",
            "block6": "block6a_expand_conv",
            "top": "top_conv",
        },
        source="Tan and Le 2021, arXiv:2104.00298",
    ),
    "convnext_tiny": Backbone(
        name="convnext_tiny",
        build=_Application("ConvNeXtTiny", own_preprocessing=True),
        weights_published=f"{KERAS_APPLICATIONS_URL}/convnext/convnext_tiny_notop.h5",
        preprocessing=TORCH,
        native_size_px=224,
        min_size_px=32,
        cut_points={
            "stage1": "convnext_tiny_downsampling_block_0",
            "stage2": "convnext_tiny_downsampling_block_1",
            "stage3": "convnext_tiny_downsampling_block_2",
        },
        source="Liu et al. 2022, arXiv:2201.03545",
    ),
    "xception": Backbone(
        name="xception",
        build=_Application("Xception"),
        weights_published=f"{KERAS_APPLICATIONS_URL}/xception/xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
        preprocessing=MINUS_ONE_TO_ONE,
        native_size_px=299,
        min_size_px=71,
        has_batch_norm=True,
        cut_points={
            "block5": "block5_sepconv1_act",
            "block13": "block13_sepconv1_act",
            "block14": "block14_sepconv1",
        },
        source="Chollet 2016, arXiv:1610.02357",
    ),
}


def is_imported(name: str) -> bool:
    """Whether a backbone is a bundle, and no name of the table."""
    return name not in BACKBONES and may_be_bundle(name)


def find_backbone(name: str) -> Backbone:
    """The backbone of that name, or of the bundle at that URI, of which only `bundle.json` is read.

    Raises:
        BundleError: there is no bundle.
        ConfigError: unknown name (the message lists all names and suggests similar ones), or a bundle without an ONNX
            model.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if is_imported(name):
        return _imported(name)
    close = difflib.get_close_matches(name, BACKBONES)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise ConfigError(
        f"backbone must be one of {', '.join(BACKBONES)}, or the folder of an imported bundle. "
        f"{hint}Received: backbone={name!r}"
    )


def _imported(uri: str) -> Backbone:
    info = read_bundle_info(uri)
    if info.is_ensemble:
        raise ConfigError(f"an ensemble gives no features: take one of its members. Received: backbone={uri!r}")
    if info.model_file != ONNX_FILE:
        remedy = (
            f"use --backbone {info.backbone} --weights {uri}"
            if info.imported is None
            else "import the file again with --backbone-only"
        )
        raise ConfigError(
            f"a bundle that is a backbone holds {ONNX_FILE}, this one {info.model_file}: {remedy}. "
            f"Received: backbone={uri!r}"
        )
    size_px = min(info.spec.height_px, info.spec.width_px)
    return Backbone(
        name=uri,
        build=_not_in_keras,
        preprocessing=Preprocessing(scale=1.0),
        native_size_px=size_px,
        min_size_px=size_px,
        pooling=None,
        source=info.backbone,
        imported=info,
    )


def _not_in_keras(shape: Shape, alpha: float, weights: Literal["imagenet"] | None = None) -> "keras.Model":
    raise ConfigError("an imported backbone gives features only: Keras cannot build it")


def backbone_size_px(config: ModelConfig) -> int:
    """Height and width, px, of the backbone's input: the configured size, else the native one.

    Without a configured size, a backbone trained from scratch takes the images' own size: see `backbone_shape`.
    """
    return config.image_size_px or find_backbone(config.backbone).native_size_px


def backbone_shape(config: ModelConfig, *, height_px: int, width_px: int, channels: int) -> Shape:
    """`(height, width, channels)` of the backbone's input, for images of the given size."""
    backbone = find_backbone(config.backbone)
    if backbone.imported is not None:
        return backbone.imported.spec.shape
    if backbone.scratch:
        size_px = config.image_size_px
        return (size_px or height_px, size_px or width_px, channels)
    size_px = backbone_size_px(config)
    return (size_px, size_px, 3)


def check_size(backbone: Backbone, image_size_px: int) -> None:
    """Raises ConfigError where the images are too small for the backbone."""
    if image_size_px < backbone.min_size_px:
        raise ConfigError(
            f"{backbone.name} needs images of at least {backbone.min_size_px} px "
            f"(native: {backbone.native_size_px} px). Received: image_size_px={image_size_px}"
        )


def check_trainable(backbone: Backbone, trainable: str | int) -> None:
    """Raises ConfigError unless `trainable` names a part of this backbone.

    Args:
        backbone: the row of the table.
        trainable: `head`, `all`, the name of a cut point, or the number of first layers that stay frozen (its upper
            bound is only known once the network is built).
    """
    if backbone.imported is not None and trainable != "head":
        raise ConfigError(
            f"an imported backbone stays frozen: use --trainable head. Received: trainable={trainable!r} of "
            f"{backbone.name}"
        )
    names = ("head", "all", *backbone.cut_points)
    is_valid = trainable >= 0 if isinstance(trainable, int) else trainable in names
    if not is_valid:
        raise ConfigError(
            f"trainable for {backbone.name} must be one of {', '.join(names)}, or the number of first layers that stay "
            f"frozen. Received: trainable={trainable!r}"
        )


def check_model(config: ModelConfig) -> Backbone:
    """Checks what can be checked of a model's configuration without Keras, and returns its backbone.

    Raises:
        ConfigError: unknown backbone, or a size, alpha, pooling or weights that it does not support.
    """
    backbone = find_backbone(config.backbone)
    if backbone.imported is not None:
        _check_imported(config, backbone.imported.spec)
    if config.image_size_px is not None:
        check_size(backbone, config.image_size_px)
    if config.alpha != 1 and not backbone.has_alpha:
        widths = ", ".join(row.name for row in BACKBONES.values() if row.has_alpha)
        raise ConfigError(f"only {widths} take alpha, not {backbone.name}. Received: alpha={config.alpha}")
    if config.pooling is not None and backbone.pooling is None:
        raise ConfigError(f"{backbone.name} gives a vector and takes no pooling. Received: pooling={config.pooling!r}")
    if config.weights == "imagenet" and backbone.weights_published is None:
        published = ", ".join(row.name for row in BACKBONES.values() if row.weights_published)
        raise ConfigError(
            f"weights for {backbone.name} must be none, a .weights.h5 file or a bundle; "
            f"imagenet is for {published}. "
            f"Received: weights={config.weights!r}"
        )
    return backbone


def _check_imported(config: ModelConfig, spec: ImageSpec) -> None:
    require(
        config.weights == "none",
        "an imported backbone has its own weights: leave out --weights",
        backbone=config.backbone,
        weights=config.weights,
    )
    require(
        config.image_size_px is None or spec.shape[:2] == (config.image_size_px, config.image_size_px),
        f"this imported backbone takes images of {spec.height_px} x {spec.width_px} px",
        backbone=config.backbone,
        image_size_px=config.image_size_px,
    )


def published_weights_url(backbone: Backbone, *, alpha: float, image_size_px: int) -> str:
    """URL of the backbone's published ImageNet weights.

    MobileNets are published for several input sizes; for any other size Keras takes the weights for 224 px
    (keras/src/applications/mobilenet.py, mobilenet_v2.py).

    Raises:
        ConfigError: the backbone has no published weights.
    """
    if backbone.weights_published is None:
        raise ConfigError(f"the backbone has no published weights. Received: backbone={backbone.name!r}")
    sizes_px = (96, 128, 160, 192, 224) if backbone.name == "mobilenet_v2" else (128, 160, 192, 224)
    size_px = image_size_px if image_size_px in sizes_px else 224
    file_alphas = {1.0: "1_0", 0.75: "7_5", 0.5: "5_0", 0.25: "2_5"}
    width = str(float(alpha)) if backbone.name == "mobilenet_v2" else file_alphas.get(alpha, str(alpha))
    return backbone.weights_published.format(alpha=width, size=size_px)


def keras_models_folder() -> Path:
    """Where `keras.utils.get_file` stores models: under /tmp where the home folder is not writable."""
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")).expanduser()
    nearest = next(folder for folder in (home, *home.parents) if folder.exists())
    return (home if os.access(nearest, os.W_OK) else Path("/tmp/.keras")) / "models"
