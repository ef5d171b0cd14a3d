"""An ONNX backbone and a trained head, joined to one classifier.

Owns: cutting a bundle's graph at its features, and the nodes of a head. Does not own: training the head
(`classifier.build_head_alone`), writing the bundle (`bundle`), or importing graphs.

Contract: the joined graph takes the backbone's input unchanged and gives `probabilities` and `features`, in this order.
What only the backbone's own classes needed is left out. Nothing of the backbone is computed anew: its nodes and weights
are copied as they are.
"""

# N = images of a batch, D = features, K = classes

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist.errors import BundleError
from mnist_dist.models.onnx_file import FEATURES, PROBABILITIES, declared


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense layer of a head."""

    kernel: npt.NDArray[np.float32]
    """`float32 [D, K]`."""
    bias: npt.NDArray[np.float32]
    """`float32 [K]`."""


def join_head(
    backbone: Path, layers: Sequence[Dense], target: Path, *, class_names: Sequence[str], multi_label: bool = False
) -> int:
    """Writes the classifier of a backbone and a head.

    Args:
        backbone: the model file of an ONNX bundle with features.
        layers: the dense layers of the head, with ReLU between them.
        target: the file to write.
        class_names: in the order of the last layer's outputs; they go into the file's metadata.
        multi_label: a sigmoid follows the last layer, else softmax.

    Returns:
        The number of weights of the backbone.

    Raises:
        BundleError: the backbone has another number of features than the first layer takes, or its features follow
            from its probabilities.
    """
    import onnx

    width, found = layers[0].kernel.shape[0], declared(backbone).num_features
    if width != found:
        raise BundleError(f"the head takes {width} features. Received: {found} in {str(backbone)!r}")
    model = onnx.load(backbone)
    graph = model.graph
    features = next(output for output in graph.output if output.name == FEATURES)
    _cut(graph)
    parameters = _weights_of(graph)
    if any(PROBABILITIES in node.output for node in graph.node):
        raise BundleError(f"features that follow from probabilities make no backbone. Received: {str(backbone)!r}")
    nodes, tensors = _head(layers, _unused_names(graph), multi_label=multi_label)
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    batch = features.type.tensor_type.shape.dim[0]
    shape = [batch.dim_value or batch.dim_param or None, layers[-1].kernel.shape[1]]
    probabilities = onnx.helper.make_tensor_value_info(PROBABILITIES, onnx.TensorProto.FLOAT, shape)
    outputs = [probabilities, onnx.ValueInfoProto.FromString(features.SerializeToString())]
    del graph.output[:]
    graph.output.extend(outputs)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    facts |= {
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
        "activation": "sigmoid" if multi_label else "softmax",
        "multi_label": json.dumps(multi_label),
    }
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    onnx.save(model, target)
    return parameters


def count_weights(backbone: Path) -> int:
    """The number of weights that the features of an ONNX bundle need."""
    import onnx

    graph = onnx.load(backbone).graph
    _cut(graph)
    return _weights_of(graph)


def _weights_of(graph: Any) -> int:
    return sum(math.prod(tensor.dims) for tensor in graph.initializer)


def _head(layers: Sequence[Dense], name_of: Callable[[str], str], *, multi_label: bool) -> tuple[list[Any], list[Any]]:
    """The nodes and weights of a head."""
    from onnx import helper, numpy_helper

    nodes, tensors, value = [], [], FEATURES
    last = {"op_type": "Sigmoid"} if multi_label else {"op_type": "Softmax", "axis": 1}
    for number, layer in enumerate(layers, start=1):
        kernel, bias, output = (name_of(f"head_{part}_{number}") for part in ("kernel", "bias", "dense"))
        tensors += [numpy_helper.from_array(layer.kernel, kernel), numpy_helper.from_array(layer.bias, bias)]
        nodes.append(helper.make_node("Gemm", [value, kernel, bias], [output], name=output))
        is_last = number == len(layers)
        value = PROBABILITIES if is_last else name_of(f"head_relu_{number}")
        activation = last if is_last else {"op_type": "Relu"}
        nodes.append(helper.make_node(inputs=[output], outputs=[value], name=name_of("head_activation"), **activation))
    return nodes, tensors


def _cut(graph: Any) -> None:
    """Leaves in a graph only what its features need."""
    needed = {FEATURES}
    for index in reversed(range(len(graph.node))):  # ONNX sorts nodes: what a node takes comes before it.
        if needed.intersection(graph.node[index].output):
            needed.update(_inputs(graph.node[index]))
        else:
            del graph.node[index]
    names: dict[str, Callable[[Any], str]] = {
        "initializer": lambda tensor: tensor.name,
        "sparse_initializer": lambda tensor: tensor.values.name,
        "value_info": lambda value: value.name,
        "quantization_annotation": lambda note: note.tensor_name,
    }
    for field, name_of in names.items():
        items = getattr(graph, field)
        for index in reversed(range(len(items))):
            if name_of(items[index]) not in needed:
                del items[index]


def _inputs(node: Any) -> Iterator[str]:
    """The names that a node takes, also those that its inner graphs take from outside."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from (output.name for output in inner.output)
            yield from itertools.chain.from_iterable(map(_inputs, inner.node))


def _unused_names(graph: Any) -> Callable[[str], str]:
    """A function that makes a name unlike any in the graph, and unlike those that it made before."""
    used = {name for node in graph.node for name in (*_inputs(node), *node.output, node.name)}

    def name_of(wanted: str) -> str:
        names = itertools.chain([wanted], (f"{wanted}_{number}" for number in itertools.count(1)))
        name = next(name for name in names if name not in used)
        used.add(name)
        return name

    return name_of
