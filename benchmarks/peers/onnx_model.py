"""ResNet18 as users of its ONNX file run it: torchvision's transform in Pillow and NumPy, and ONNX Runtime.

Contract: the file is the one that the bundle was imported from. `bare` also calls other ONNX files with it.
"""

# B = batch, H = height px, W = width px, C = channels, K = classes

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from benchmarks.peers.answers import Answers, answers_of
from benchmarks.peers.task import Task

RESIZED_PX, SIZE_PX = 256, 224
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def transformed(image: Image.Image) -> npt.NDArray[np.float32]:
    """The image as the model takes it, `float32 [3, 224, 224]`: the shorter side to 256 px, the centre, normalised."""
    shorter = min(image.size)
    width, height = (int(RESIZED_PX * side / shorter) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - SIZE_PX) / 2), round((height - SIZE_PX) / 2)
    pixels = np.asarray(resized.crop((left, top, left + SIZE_PX, top + SIZE_PX)), np.float32)
    return np.ascontiguousarray(((pixels / 255 - MEAN) / STD).transpose(2, 0, 1))


class OnnxModel:
    """The model in ONNX Runtime, with its default options."""

    def __init__(self, task: Task) -> None:
        self._session = onnxruntime.InferenceSession(task.onnx_file, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0]
        self._class_names = task.info()["class_names"]

    def noise(self, images: int) -> Any:
        """A ready batch: `float32 [B, 3, H, W]`, or `uint8 [B, H, W, C]` where the model takes pixels."""
        shape, random = (images, *self._input.shape[1:]), np.random.default_rng(0)
        if self._input.type == "tensor(uint8)":
            return random.integers(0, 256, shape, dtype=np.uint8)
        return random.standard_normal(shape, dtype=np.float32)

    def outputs(self, batch: Any) -> Any:
        """What the model gives for a batch, `float32 [B, K]`."""
        return self._session.run(None, {self._input.name: batch})[0]

    def __call__(self, batch: Any) -> Answers:
        """Classes and confidences for a batch, of a model that gives logits."""
        logits = self.outputs(batch)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return answers_of(exponentials / exponentials.sum(axis=1, keepdims=True), self._class_names)
