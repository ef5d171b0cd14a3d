"""The configuration of an import: the foreign model, and what it does not say about itself.

Owns: the fields of an import, as `config.py` owns those of training and scoring. Does not own: what a source says about
itself (`importing/foreign.py`), or what is assumed where nobody says it (`importing/recipe.py`).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mnist_dist.config import LOCK_WAIT_S, Activation, Geometry, Interpolation, require
from mnist_dist.store.uris import absolute

Preset = Literal["imagenet", "caffe", "tf", "0-1", "raw"]


@dataclass(frozen=True, kw_only=True)
class NormalizationConfig:
    """What the model expects of its pixels. Each flag overrides what the source says."""

    preset: Preset | None = None
    """imagenet: (pixels / 255 - mean) / std of ImageNet, as in torchvision and timm. caffe: BGR, minus the mean.
    tf: -1 to 1. 0-1: pixels / 255. raw: 0 to 255 as they are."""
    scale: float | None = None
    """Pixels of 0-255 are multiplied by this first. None: 1/255 where mean or std is given."""
    mean: tuple[float, ...] | None = None
    """Subtracted after that; one number, or one per channel in the order of the model."""
    std: tuple[float, ...] | None = None
    """Divided by after that; one number, or one per channel."""
    channel_order: Literal["rgb", "bgr"] | None = None
    """Order of the channels that the model expects. None: as the source or the preset says, else rgb."""

    def __post_init__(self) -> None:
        given = [name for name in ("scale", "mean", "std") if getattr(self, name) is not None]
        require(self.preset is None or not given, f"choose either preset or {' and '.join(given)}", preset=self.preset)
        for name in ("mean", "std"):
            value = getattr(self, name)
            require(value is None or len(value) in (1, 3), f"{name} has 1 or 3 values", **{name: value})
        require(self.scale is None or self.scale > 0, "scale must be positive", scale=self.scale)
        require(self.std is None or all(value > 0 for value in self.std), "std must be positive", std=self.std)


@dataclass(frozen=True, kw_only=True)
class FittingConfig:
    """How an image is fitted to the model's input. Each flag overrides what the source says."""

    input_size: tuple[int, ...] | None = None
    """Height and width of the input, px, or one number for both; needed where the model takes any size."""
    resize: Geometry | None = None
    """stretch: both sides at once. crop: cut the centre to the input's aspect ratio first. shortest-edge: resize the
    shorter side to `resize_px`, then cut the centre. longest-edge-pad: fit the longer side and fill the rest."""
    resize_px: int | None = None
    """Length of the shorter side (`shortest-edge`) or of both sides (`stretch`) before the centre is cut, px."""
    crop: float | None = None
    """Instead of `resize_px`: which part of the resized shorter side is kept, in (0, 1], as timm's `crop_pct`."""
    resize_rule: Literal["pillow", "keras"] | None = None
    """Whose resize is matched: pillow (timm, torchvision, Hugging Face) or keras (`tf.image.resize`)."""
    interpolation: Interpolation | None = None
    """The filter."""
    antialias: bool | None = None
    """Whether the filter widens where the image shrinks. Pillow always does; with the rule keras, by default not."""
    pad_value: int | None = None
    """What `longest-edge-pad` fills with, 0-255."""

    def __post_init__(self) -> None:
        size = self.input_size
        require(
            size is None or (len(size) in (1, 2) and min(size) >= 1),
            "input_size is one side or height and width, px",
            input_size=size,
        )
        require(self.crop is None or 0 < self.crop <= 1, "crop must be in (0, 1]", crop=self.crop)
        require(self.crop is None or self.resize_px is None, "choose either crop or resize_px", crop=self.crop)
        require(
            self.resize_px is None or self.resize_px >= 1, "resize_px must be at least 1 px", resize_px=self.resize_px
        )
        require(self.pad_value is None or 0 <= self.pad_value <= 255, "pad_value is 0 to 255", pad_value=self.pad_value)
        require(
            self.resize_rule != "pillow" or self.antialias is not False,
            "Pillow always antialiases; without it, use resize_rule keras",
            antialias=self.antialias,
        )


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """Turns a model that was trained elsewhere into a bundle, which can then be scored, evaluated and trained on. The
    bundle's predictions are compared with those of the original framework before it is written."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A Keras model (`.keras`, `.h5`), a SavedModel folder, an ONNX file, a Hugging Face folder with an ONNX file,
    `timm:NAME`, `torchvision:NAME`, or a folder saved by timm."""
    output: str
    """Folder or bucket prefix for the bundle."""
    checkpoint: str | None = None
    """Weights for a timm or torchvision name: safetensors, or a file of torch that loads with `weights_only`."""
    classes: str | None = None
    """Class names in the order of the outputs: a text file with one name a line, or a JSON list or `{index: name}`."""
    activation: Activation | Literal["auto"] = "auto"
    """What makes probabilities of the model's output. auto: none if the model ends with it, else as the source says,
    else softmax."""
    multi_label: bool | None = None
    """Each class has a probability of its own. None: yes with sigmoid and more than one output."""
    output_node: str | None = None
    """The output to use, where the model has several: the name of an output or of an inner tensor (a layer in
    Keras)."""
    features_node: str | None = None
    """The output or inner tensor (a layer in Keras) that holds the features, for `score --embeddings` and as a
    backbone. None: the input of the last dense layer, where it can be found."""
    backbone_only: bool = False
    """The model gives features and no classes: the bundle can only be a `--backbone` for training and search."""
    check_images: str | None = None
    """Folder of images for the comparison; if it has one subfolder per class, the accuracy is shown, too. None: twelve
    crops of two photographs."""
    expect: str | None = None
    """Probabilities that your own code gave for `check_images`: CSV or Parquet with the columns `uri` (file name) and
    one per class. Compared with the bundle's."""
    calibration: str | None = None
    """Folder of images of the model's domain, up to 2,000 of which are stored in the bundle, so that bfloat16, int8
    and fast decoding can be judged."""
    fitting: FittingConfig = FittingConfig()
    normalization: NormalizationConfig = NormalizationConfig()
    lock_wait_s: float = LOCK_WAIT_S
    """How long to wait for a lock that another driver holds, s; after 60 s of silence it is taken over. 0: fail at
    once."""
    verbose: bool = False
    """Show the output of the frameworks."""

    def __post_init__(self) -> None:
        require(bool(self.source), "source must be a file, a folder or a name", source=self.source)
        require(bool(self.output), "output must be a folder or a bucket prefix", output=self.output)
        require(self.expect is None or self.check_images is not None, "expect needs check_images", expect=self.expect)
        require(
            not (self.backbone_only and self.classes),
            "a bundle that is only a backbone has no classes",
            classes=self.classes,
        )

    @property
    def output_uri(self) -> str:
        """Absolute URI of the bundle."""
        return absolute(self.output)
