"""An opened model file whose weights can be read, replaced and saved, and that predicts.

Owns: the interface `Network` and its two implementations, for `model.keras` and `model.onnx`. Does not own: which
weights (`soups`), whether two files are of one architecture (`architecture`), or joining models (`ensembles`).
"""

# b = images of a call, B = batch size, H = height px, W = width px, C = channels, K = classes

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mnist_dist.combining.architecture import is_weight
from mnist_dist.combining.soups import Weights
from mnist_dist.engines.engine import compile_model
from mnist_dist.images.pixels import Pixels, padded
from mnist_dist.models.onnx_file import PROBABILITIES, open_session, run_session, session_batch

Probabilities = npt.NDArray[np.float32]


class Network(Protocol):
    """A model file in memory."""

    def weights(self) -> Weights:
        """The weights, in the order of the file."""

    def set_weights(self, weights: Weights) -> None:
        """Replaces the weights; `weights` has their shapes."""

    def probabilities(self, pixels: Pixels) -> Probabilities:
        """`uint8 [b, H, W, C]`, 0-255, b up to the batch size, -> `float32 [b, K]`."""

    def save(self, target: Path) -> None:
        """Writes the model with its present weights to a file."""


def open_network(file: Path, *, batch_size: int) -> Network:
    """Opens a model file.

    Args:
        file: `.keras` or `.onnx`.
        batch_size: B, the most images per call.
    """
    return OnnxNetwork(file) if file.suffix == ".onnx" else KerasNetwork(file, batch_size=batch_size)


class KerasNetwork:
    """A Keras model, compiled for one batch size."""

    def __init__(self, file: Path, *, batch_size: int) -> None:
        import keras

        self._model: Any = keras.saving.load_model(file, compile=False)
        self._batch_size = batch_size
        self._function: Any = None

    def weights(self) -> Weights:
        return [np.asarray(weight, np.float32) for weight in self._model.get_weights()]

    def set_weights(self, weights: Weights) -> None:
        self._model.set_weights(weights)
        self._function = None  # It may hold the old weights as constants.

    def probabilities(self, pixels: Pixels) -> Probabilities:
        if self._function is None:
            self._function = compile_model(self._model, batch_size=self._batch_size)
        return np.asarray(self._function(padded(pixels, self._batch_size))[0])[: len(pixels)]

    def save(self, target: Path) -> None:
        self._model.save(target)


class OnnxNetwork:
    """An ONNX file in ONNX Runtime on the CPU."""

    def __init__(self, file: Path) -> None:
        import onnx

        self._file, self._model, self._session = file, onnx.load(file), open_session(file)

    def weights(self) -> Weights:
        from onnx import numpy_helper

        return [numpy_helper.to_array(tensor) for tensor in self._tensors()]

    def set_weights(self, weights: Weights) -> None:
        from onnx import numpy_helper

        for tensor, values in zip(self._tensors(), weights, strict=True):
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        self._session = None

    def probabilities(self, pixels: Pixels) -> Probabilities:
        if self._session is None:
            self._session = open_session(self._model.SerializeToString())
        size = session_batch(self._session) or len(pixels)
        parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        return np.concatenate([run_session(self._session, part, [PROBABILITIES])[0] for part in parts])

    def save(self, target: Path) -> None:
        import onnx

        onnx.save(self._model, target)

    def _tensors(self) -> list[Any]:
        return [tensor for tensor in self._model.graph.initializer if is_weight(tensor)]
