"""ResNet18 as an ONNX graph with random weights: the model of Ray's and Daft's published comparison, without torch.

Owns: the graph. Does not own: making a bundle of it (`bundles`), or the programs that run it (`peers/`).

Contract: as torchvision's model exports it: `input`, `float32 [N, 3, 224, 224]`, normalised RGB, to `logits`,
`float32 [N, K]`. Batch normalisation is folded into the convolutions, which therefore have biases.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition", table 1 (18 layers, projections where a block
changes the size); He initialisation as torchvision has it (fan-out).
"""

# N = images, K = classes, C = channels of a feature map

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE_PX = 224
NUM_CLASSES = 1_000
INPUT, LOGITS = "input", "logits"
_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Channels of a stage, and the stride of its first block."""
_BLOCKS = 2
_RESIDUAL = 0.5  # What batch normalisation does: without it each block would double the variance of its input.


def resnet18(*, num_classes: int = NUM_CLASSES, seed: int = 0) -> Any:
    """Builds the model.

    Args:
        num_classes: K.
        seed: of the weights.

    Returns:
        The `onnx.ModelProto`.
    """
    graph = _Graph(seed)
    name = graph.convolution(INPUT, (3, 64), kernel=7, stride=2)
    name = graph.node("MaxPool", [name], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    before = 64
    for channels, stride in _STAGES:
        for block in range(_BLOCKS):
            name = graph.block(name, (before, channels), stride=1 if block else stride)
            before = channels
    features = graph.node("Flatten", [graph.node("GlobalAveragePool", [name])], axis=1)
    graph.dense(features, (before, num_classes))
    return graph.model(num_classes)


class _Graph:
    """Nodes and weights of a graph under construction; each method returns the name of a tensor."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[Any] = []
        self._weights: list[Any] = []

    def node(self, operator: str, inputs: list[str], *, output: str = "", **attributes: Any) -> str:
        name = output or f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def convolution(
        self, source: str, channels: tuple[int, int], *, kernel: int, stride: int, gain: float = 1.0, relu: bool = True
    ) -> str:
        before, after = channels
        deviation = gain * np.sqrt(2 / (after * kernel**2))
        weights = [self._normal((after, before, kernel, kernel), deviation), self._normal((after,), 0.01)]
        pads = [kernel // 2] * 4
        name = self.node("Conv", [source, *weights], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)
        return self.node("Relu", [name]) if relu else name

    def block(self, source: str, channels: tuple[int, int], *, stride: int) -> str:
        """Two convolutions beside a shortcut."""
        before, after = channels
        inner = self.convolution(source, channels, kernel=3, stride=stride)
        inner = self.convolution(inner, (after, after), kernel=3, stride=1, gain=_RESIDUAL, relu=False)
        is_same = stride == 1 and before == after
        shortcut = source if is_same else self.convolution(source, channels, kernel=1, stride=stride, relu=False)
        return self.node("Relu", [self.node("Add", [inner, shortcut])])

    def dense(self, source: str, sizes: tuple[int, int]) -> str:
        weights = [self._normal(sizes[::-1], np.sqrt(1 / sizes[0])), self._normal(sizes[1:], 0.01)]
        return self.node("Gemm", [source, *weights], output=LOGITS, transB=1)

    def model(self, num_classes: int) -> Any:
        shape: list[str | int | None] = ["N", 3, SIZE_PX, SIZE_PX]
        graph = helper.make_graph(
            self._nodes,
            "resnet18",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["N", num_classes])],
            self._weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model

    def _normal(self, shape: tuple[int, ...], deviation: float) -> str:
        values = (deviation * self._random.standard_normal(shape)).astype(np.float32)
        self._weights.append(numpy_helper.from_array(values, f"weights_{len(self._weights)}"))
        return str(self._weights[-1].name)
