"""What a source of foreign models gives: a model file, and what is known of it.

Owns: the two dataclasses behind which sources differ. Does not own: any source (one module each, and one row in
`sources.SOURCES`), or what is made of the facts (`recipe`).

A source is opened in a child process, so that neither a framework nor a hostile file enters the driver.
"""

# N = images, H = height px, W = width px, C = channels, K = outputs, D = features

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mnist_dist.config import Activation, Geometry, Interpolation, Resampling
from mnist_dist.images.spec import ImageSpec

Values = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a source says about its model. None: it does not say."""

    class_names: tuple[str, ...] | None = None
    height_px: int | None = None
    width_px: int | None = None
    is_size_fixed: bool = False
    """Whether the model takes no other size."""
    channels: int | None = None
    """1 or 3."""
    resize: Geometry | None = None
    resize_px: int | None = None
    resampling: Resampling | None = None
    interpolation: Interpolation | None = None
    antialias: bool | None = None
    framework: Resampling = "pillow"
    """Whose way to fit an image is assumed where nobody says it; no fact."""
    crop_rounding: Literal["even", "down"] | None = None
    pad_value: int | None = None
    scale: tuple[float, ...] | None = None
    """Pixels of 0-255 are multiplied by this; one number, or one per channel in the order of the model."""
    offset: tuple[float, ...] | None = None
    """Added after that."""
    bgr: bool | None = None
    normalizes_itself: bool = False
    """Whether the model takes pixels of 0-255 and normalises them inside."""
    activation: Activation | None = None
    """What has to follow the model's output. `none`: it ends with an activation already."""
    multi_label: bool | None = None
    num_outputs: int | None = None
    """K, or D of a model without classes."""
    output: str | None = None
    """Name of the output that holds the logits or probabilities."""
    features: str | None = None
    """Name of the tensor that holds the features, `[N, D]`."""
    why: tuple[str, ...] = ()
    """Sentences about choices that the source made, shown to the user."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the original framework is asked for, to be compared with the bundle."""

    spec: ImageSpec
    """How the bundle fits images."""
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    bgr: bool
    activation: Activation
    output: str | None
    """As in `Facts`."""

    def normalized(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Pixels `[..., H, W, C]`, 0-255, as the model takes them."""
        values = np.asarray(pixels[..., ::-1] if self.bgr else pixels, np.float64)
        return np.asarray(values * np.array(self.scale) + np.array(self.offset))

    def activated(self, outputs: npt.NDArray[Any]) -> Values:
        """What follows the activation, `float32 [N, K]`, of raw outputs."""
        values = np.asarray(outputs, np.float64)
        if self.activation == "softmax":
            values = np.exp(values - values.max(axis=1, keepdims=True))
            values = values / values.sum(axis=1, keepdims=True)
        elif self.activation == "sigmoid":
            values = 0.5 * (1 + np.tanh(values / 2))
        return np.asarray(values, np.float32)


Reference = Callable[[Sequence[bytes], Asked], Values]
"""The original framework: encoded images -> what follows the activation, `float32 [N, K]`. Where the framework has its
own way to open, resize and normalise an image, that is used, and not what is asked. Runs in a child process; picklable:
a `functools.partial` of a module-level function."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A foreign model, ready to be made a bundle."""

    kind: Literal["keras", "saved_model", "onnx", "hugging_face", "timm", "torchvision"]
    name: str
    """What its source calls it, such as `resnet18`."""
    file: Path
    """`.onnx`: a float or uint8 graph, with its external data inside or beside it; `.keras`: a Keras model.
    Says what the bundle's model is."""
    facts: Facts
    reference: Reference | None = None
    """None: the original framework is not there, or is ONNX Runtime itself."""
    reference_name: str = ""
    """Such as `timm 1.0.9`, for `import.json`."""
    whole: Reference | None = None
    """The way from file to prediction as users of the framework go it, where the bundle does not match it to the last
    bit: measured, not judged."""
    whole_name: str = ""
