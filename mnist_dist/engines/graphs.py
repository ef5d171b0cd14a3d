"""TensorFlow functions as ONNX files.

Owns: freezing a function and converting its graph. Does not own: what the function computes, or what is done with the
file. Keras' own export (3.15) makes inputs of constants that a layer holds outside of its weights, such as those of
`Normalization(mean=..., variance=...)`; a frozen graph has none.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OPSET = 17


def inference_function(model: Any) -> Any:
    """A Keras model with one input as a concrete function of any batch size, in inference mode."""
    import tensorflow as tf

    (image,) = model.inputs
    signature = [tf.TensorSpec(image.shape, image.dtype)]
    function = tf.function(
        lambda pixels: tf.nest.flatten(model(pixels, training=False)),
        input_signature=signature,
        autograph=False,  # It would write files and has nothing to convert here.
    )
    return function.get_concrete_function()


def freeze(function: Any) -> Any:
    """A concrete function whose variables and captured constants are constants of its graph."""
    # TensorFlow has no public name for this function; its own guides import it from here, too.
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    return convert_variables_to_constants_v2(function)


def write_onnx(frozen: Any, target: Path, *, input_name: str, output_names: Sequence[str]) -> None:
    """Converts a frozen function with one input.

    Args:
        frozen: see `freeze`.
        target: the file to write.
        input_name: name of the input in the file.
        output_names: names of the outputs in the file, in the order of the function.
    """
    import onnx
    import tf2onnx

    inputs, outputs = [tensor.name for tensor in frozen.inputs], [tensor.name for tensor in frozen.outputs]
    model, _ = tf2onnx.convert.from_graph_def(
        _inlinable(frozen.graph.as_graph_def()),
        input_names=inputs,
        output_names=outputs,
        opset=OPSET,
        custom_op_handlers={"Erfc": (_convert_erfc, [])},
    )
    _rename(model.graph, dict(zip([*inputs, *outputs], [input_name, *output_names], strict=True)))
    onnx.save_model(model, target)


def _inlinable(graph: Any) -> Any:
    """Lets the converter inline every function of a graph; it knows no calls of functions.

    Keras (3.15) computes grouped convolutions on TensorFlow in functions of their own that XLA compiles, and TensorFlow
    inlines no such function. ONNX Runtime needs no XLA to compute them.
    """
    called = [node for function in graph.library.function for node in function.node_def]
    for owner in (*graph.node, *called, *graph.library.function):
        for attribute in ("_XlaMustCompile", "_noinline"):
            owner.attr.pop(attribute, None)
    return graph


def _convert_erfc(context: Any, node: Any, name: str, args: Sequence[Any]) -> Any:
    """`erfc(x)`, which is in TensorFlow's exact GELU, as `1 - erf(x)`, since ONNX has no operator for it."""
    from tf2onnx.utils import map_onnx_to_numpy_type

    dtype = map_onnx_to_numpy_type(context.get_dtype(node.output[0]))
    one = context.make_const(f"{name}__one", np.ones((), dtype))
    node.type, node.domain = "Erf", ""
    context.insert_new_node_on_output("Sub", node.output[0], inputs=[one.output[0], node.output[0]])
    return node


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Renames tensors of a graph; other tensors of these names make room."""
    taken = {name for node in _nodes(graph) for name in (*node.input, *node.output)} - names.keys()
    names = {**{name: f"{name}__inner" for name in taken & set(names.values())}, **names}
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in _nodes(graph):
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of the branches and loops inside of it, which may use its tensors."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
