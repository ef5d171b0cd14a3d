"""What becomes of the facts and the flags: everything that the bundle is built from.

Owns: which of a flag, a fact and an assumption counts, and saying so. Does not own: reading facts (the sources), or
building the model (`onnx_graph`, `keras_models`).
"""

from dataclasses import dataclass

from mnist_dist.config import Activation
from mnist_dist.images.pixels import ImageSpec


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
    is_binary: bool = False
    """The model has one output p, which becomes the probabilities 1 - p and p of two classes."""
    output: str | None = None
    """As in `Facts`; None: the model's only output."""
    features: str | None = None
    """As in `Facts`; None: there are none."""
    assumed: tuple[str, ...] = ()
    """What neither the source nor a flag said, one sentence each."""
