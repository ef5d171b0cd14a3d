"""Small ONNX classifiers as people have them, built without any framework."""

# N = images of a call, H = height px, W = width px, C = channels, K = classes, D = features

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE_PX, CLASSES, FEATURES = 32, 5, 8
NUMPY: dict[int, Any] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.UINT8: np.uint8}


def foreign_onnx(
    path: Path,
    *,
    layout: str = "NCHW",
    dtype: int = TensorProto.FLOAT,
    batch: int | str = "batch",
    side: int | str = SIDE_PX,
    channels: int = 3,
    classes: int = CLASSES,
    activation: str | None = None,
    as_map: bool = False,
    hidden: bool = False,
    opset: int = 17,
    seed: int = 0,
) -> Path:
    """Writes a classifier: a convolution, the mean of its maps, a dense layer; its weights are random.

    Args:
        path: the file.
        layout: of the input.
        dtype: of the input and of all values; with uint8, pixels are cast and scaled inside.
        batch: N, or a name for any.
        side: H and W, or a name for any.
        channels: C.
        classes: K.
        activation: an operator behind the logits.
        as_map: the output is `[N, K, 1, 1]`, as convolutions give it.
        hidden: the features are a second output.
        opset: of the operators.
        seed: of the weights.
    """
    random = np.random.default_rng(seed)
    inner = TensorProto.FLOAT if dtype == TensorProto.UINT8 else dtype
    weights = {
        "kernel": random.normal(0, 0.3, (FEATURES, channels, 5, 5)),
        "dense": random.normal(0, 0.6, (FEATURES, classes)),
        "bias": random.normal(0, 1, classes),
        "scale": np.array(1 / 255),
    }
    values, name = [], "pixels"
    if dtype == TensorProto.UINT8:
        values.append(helper.make_node("Cast", [name], ["cast"], to=TensorProto.FLOAT))
        values.append(helper.make_node("Mul", ["cast", "scale"], ["scaled"]))
        name = "scaled"
    if layout == "NHWC":
        values.append(helper.make_node("Transpose", [name], ["planes"], perm=[0, 3, 1, 2]))
        name = "planes"
    values += [
        helper.make_node("Conv", [name, "kernel"], ["maps"], strides=[3, 3]),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["means"]),
        helper.make_node("Flatten", ["means"], ["pooled"], axis=1),
        helper.make_node("Gemm", ["pooled", "dense", "bias"], ["logits"]),
    ]
    output = "logits"
    if activation is not None:
        values.append(helper.make_node(activation, [output], ["activated"]))
        output = "activated"
    if as_map:
        values.append(helper.make_node("Unsqueeze", [output, "axes"], ["map"]))
        output = "map"
    sides = [side, side]
    shape = [batch, channels, *sides] if layout == "NCHW" else [batch, *sides, channels]
    outputs = [helper.make_tensor_value_info(output, inner, [batch, classes, 1, 1] if as_map else [batch, classes])]
    if hidden:
        outputs.append(helper.make_tensor_value_info("pooled", inner, [batch, FEATURES]))
    used = {name for node in values for name in node.input}
    tensors = [
        numpy_helper.from_array(np.asarray(value, NUMPY[inner]), key) for key, value in weights.items() if key in used
    ]
    if as_map:
        tensors.append(numpy_helper.from_array(np.array([2, 3], np.int64), "axes"))
    graph = helper.make_graph(
        values, "foreign", [helper.make_tensor_value_info("pixels", dtype, shape)], outputs, tensors
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def edited(path: Path, **changes: Any) -> Path:
    """Applies functions to parts of the model in a file: `edited(path, graph=lambda graph: ...)`."""
    model = onnx.load(str(path), load_external_data=False)
    for part, change in changes.items():
        change(model if part == "model" else getattr(model, part))
    onnx.save(model, str(path))
    return path
