"""Surgery on ONNX graphs: pixels in, probabilities out, with normalisation and layout inside.

Owns: reading a foreign graph safely, finding its logits and features, and building the bundle's graph around it. Does
not own: what the numbers are (`recipe`), or running graphs (`engines/formats.py`).

The bundle's graph takes `image`, `uint8 [N, H, W, C]`, and gives `probabilities`, `float32 [N, K]`, then `features`,
`float32 [N, D]`, where they are known. The foreign graph stands in it unchanged, its names behind `network/`.
"""

# N = batch, H = height px, W = width px, C = channels, K = classes, D = features

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from mnist_dist.errors import ConfigError
from mnist_dist.importing.recipe import Recipe
from mnist_dist.models.onnx_file import FEATURES, IMAGE, MAX_BYTES, PROBABILITIES, is_outside, tensors_of

MIN_OPSET = 11
_MIN_IR = 4  # Before, weights were inputs, too.
BATCH = "N"
_PREFIX = "network/"
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Whose operators plain ONNX Runtime has."""
_PASSING = frozenset(
    {"Identity", "Dropout", "Cast", "Reshape", "Flatten", "Squeeze", "Softmax", "Sigmoid", "LogSoftmax"}
)
"""What may stand between the last dense layer and the output."""
_BEFORE_CONVOLUTION = frozenset({"Pad", "Cast", "Identity", "Add", "Sub", "Mul", "Div"})
"""What may stand between the input and the first convolution."""
INPUT_NUMPY: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.UINT8: np.uint8,
}
"""Types of the input that can be imported."""

Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True)
class GraphInput:
    """The only input of a foreign graph."""

    name: str
    dtype: int
    """A value of `TensorProto.DataType`."""
    layout: Layout
    batch: int | None
    """None: any number."""
    height_px: int | None
    width_px: int | None
    channels: int
    """1 or 3."""

    @property
    def is_uint8(self) -> bool:
        """Whether it takes pixels as they are."""
        return self.dtype == int(TensorProto.UINT8)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_graph(file: Path) -> Any:
    """Reads a foreign model, with its external data, and refuses what a bundle cannot hold.

    Args:
        file: an ONNX file; its external data lies in the same folder.

    Returns:
        The `onnx.ModelProto`, its local functions inlined.

    Raises:
        ConfigError: it is no ONNX model, is too old or too large, or has operators of its own or data elsewhere.
    """
    model = _loaded(file)
    _check_external_data(model, file)
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(file.parent))
    except Exception as err:
        raise ConfigError(f"the external data of the model cannot be read: {err}. Received: {str(file)!r}") from None
    if model.functions:
        model = onnx.inliner.inline_local_functions(model, convert_version=True)
    _check_operators(model, file)
    if model.ByteSize() > MAX_BYTES:
        raise ConfigError(
            f"a bundle's ONNX model has at most 2 GiB. Received: {model.ByteSize()} bytes in {str(file)!r}"
        )
    return model


def graph_input(model: Any, *, file: Path) -> GraphInput:
    """The input of a foreign graph.

    Raises:
        ConfigError: it has several inputs, or one that is no batch of images.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ConfigError(f"a classifier of images has one input. Received: {names} in {str(file)!r}")
    (value,) = inputs
    tensor = value.type.tensor_type
    shape = _sizes(tensor)
    expected = "the input must be images, float or uint8, [N, C, H, W] or [N, H, W, C] with 1 or 3 channels"
    found = f"Received: {value.name!r}, {_type_name(tensor.elem_type)} {_shown(tensor)} in {str(file)!r}"
    if len(shape) != 4 or tensor.elem_type not in INPUT_NUMPY:
        raise ConfigError(f"{expected}. {found}")
    layout = _layout(model, value.name, shape)
    if layout is None:
        raise ConfigError(f"{expected}. {found}")
    channels, sides = (shape[1], shape[2:]) if layout == "NCHW" else (shape[3], shape[1:3])
    if channels is None:
        convolution = _first_convolution(model, value.name)
        channels = 3 if convolution is None else convolution[1]
    if channels not in (1, 3):
        raise ConfigError(f"{expected}. {found}")
    return GraphInput(value.name, tensor.elem_type, layout, shape[0], sides[0], sides[1], channels)


def num_outputs(model: Any, name: str) -> int | None:
    """K of a tensor `[N, K]`, or `[N, K, 1, 1]`, as shape inference says; None: unknown."""
    shape = shapes_of(model).get(name)
    if shape is None:
        return None
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        shape = shape[:2]
    return shape[1] if len(shape) == 2 else None


def shapes_of(model: Any) -> dict[str, list[int | None]]:
    """Tensor name -> its shape, where shape inference finds one; None for a size that varies."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # of an unusual graph: what the file itself says remains
        inferred = model
    values = [*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input]
    return {value.name: _sizes(value.type.tensor_type) for value in values if value.type.tensor_type.HasField("shape")}


def final_activation(model: Any, output: str) -> Literal["Softmax", "Sigmoid"] | None:
    """The activation that the output ends with, if any."""
    producers = _producers(model)
    node = producers.get(output)
    while node is not None and node.op_type in ("Identity", "Cast", "Reshape", "Flatten", "Squeeze"):
        node = producers.get(node.input[0])
    if node is None:
        return None
    if node.op_type == "Sigmoid":
        return "Sigmoid"
    return "Softmax" if node.op_type == "Softmax" else None


def features_of(model: Any, output: str) -> str | None:
    """The input of the last dense layer before the output, if it is `[N, D]`; None: not found."""
    producers, shapes = _producers(model), shapes_of(model)
    constants = _constants(model)
    node = producers.get(output)
    while node is not None and (node.op_type in _PASSING or _adds_constant(node, constants)):
        node = producers.get(next((name for name in node.input if name not in constants), ""))
    if node is None or node.op_type not in ("Gemm", "MatMul"):
        return None
    name = str(node.input[0])
    shape = shapes.get(name)
    return name if name not in constants and shape is not None and len(shape) == 2 and shape[1] else None


def check_tensor(model: Any, name: str, *, flag: str) -> None:
    """Raises ConfigError unless the graph has a tensor of that name."""
    names = [output for node in model.graph.node for output in node.output]
    if name not in names:
        outputs = ", ".join(value.name for value in model.graph.output)
        raise ConfigError(f"the graph has no tensor of that name (its outputs: {outputs}). Received: {flag} {name!r}")


# --- building --------------------------------------------------------------------------------------------------------


def build_onnx(file: Path, recipe: Recipe, target: Path) -> None:
    """Builds the model of a bundle.

    Args:
        file: the foreign graph.
        recipe: what to build; `output` and `features` name tensors of the foreign graph.
        target: the file to write.

    Raises:
        ConfigError: the graph does not fit the recipe, or is not valid.
    """
    foreign = read_graph(file)
    source = graph_input(foreign, file=file)
    own = (source.height_px, source.width_px, source.channels)
    if any(size not in (None, wanted) for size, wanted in zip(own, recipe.spec.shape, strict=True)):
        raise ConfigError(f"the graph takes images of {own}. Received: {recipe.spec.shape} for {str(file)!r}")
    opset = max(entry.version for entry in foreign.opset_import if entry.domain in ("", "ai.onnx"))
    shapes = shapes_of(foreign)
    for name, flag in ((recipe.output, "--output-node"), (recipe.features, "--features-node")):
        if name is not None:
            check_tensor(foreign, name, flag=flag)
    _prefix(foreign.graph)
    head = list(_input_nodes(recipe, source))
    outputs: list[Any] = []
    tail: list[Any] = []
    batch = source.batch or BATCH
    if recipe.class_names:
        tail += _probability_nodes(recipe, f"{_PREFIX}{recipe.output}", shapes.get(recipe.output or ""))
        shape = [batch, len(recipe.class_names)]
        outputs.append(helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, shape))
    if recipe.features is not None:
        name = f"{_PREFIX}{recipe.features}"
        tail += [
            helper.make_node("Cast", [name], [f"{FEATURES}/float"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", [f"{FEATURES}/float"], [FEATURES], axis=1),
        ]
        shape = [batch, _flat_size(shapes.get(recipe.features)) or "D"]
        outputs.append(helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, shape))
    model = _assembled(foreign, head, tail, outputs, recipe=recipe, batch=batch, opset=opset)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as err:
        raise ConfigError(f"the ONNX model is not valid: {_first_lines(err)}. Received: {str(file)!r}") from None
    onnx.save(model, str(target))


def _assembled(
    named: Any, head: list[Any], tail: list[Any], outputs: list[Any], *, recipe: Recipe, batch: int | str, opset: int
) -> Any:
    graph = named.graph
    shape = [batch, *recipe.spec.shape]
    nodes = _needed([*head, *graph.node, *tail], {output.name for output in outputs})
    used = {name for node in nodes for name in _names_used(node)}
    initializers = [tensor for tensor in (*graph.initializer, *_constant_tensors(recipe)) if tensor.name in used]
    built = helper.make_graph(
        nodes,
        "bundle",
        [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, shape)],
        outputs,
        initializers,
        sparse_initializer=list(graph.sparse_initializer),
    )
    others = [entry for entry in named.opset_import if entry.domain not in ("", "ai.onnx")]
    imports = [helper.make_opsetid("", opset), *others]
    ir_version = max(_MIN_IR, named.ir_version)
    model = helper.make_model(built, opset_imports=imports, ir_version=ir_version, producer_name="mnist_dist")
    facts = {
        "class_names": json.dumps(recipe.class_names, ensure_ascii=False),
        "activation": recipe.activation,
        "multi_label": json.dumps(recipe.multi_label),
        "image_spec": json.dumps(asdict(recipe.spec)),
    }
    helper.set_model_props(model, facts)
    return model


def _input_nodes(recipe: Recipe, source: GraphInput) -> Iterator[Any]:
    """From `image` to the input of the foreign graph."""
    name, target = IMAGE, f"{_PREFIX}{source.name}"
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if recipe.bgr:
        steps.append(("Gather", [f"{IMAGE}/order"], {"axis": 3}))
    if not source.is_uint8:
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
        if any(value != 1 for value in recipe.scale):
            steps.append(("Mul", [f"{IMAGE}/scale"], {}))
        if any(value != 0 for value in recipe.offset):
            steps.append(("Add", [f"{IMAGE}/offset"], {}))
        if source.dtype != TensorProto.FLOAT:
            steps.append(("Cast", [], {"to": source.dtype}))
    if source.layout == "NCHW":
        steps.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
    steps = steps or [("Identity", [], {})]
    for number, (kind, others, attributes) in enumerate(steps):
        result = target if number == len(steps) - 1 else f"{IMAGE}/{number}"
        yield helper.make_node(kind, [name, *others], [result], name=f"{IMAGE}/{kind.lower()}_{number}", **attributes)
        name = result


def _constant_tensors(recipe: Recipe) -> list[Any]:
    return [
        numpy_helper.from_array(np.array(recipe.scale, np.float32), f"{IMAGE}/scale"),
        numpy_helper.from_array(np.array(recipe.offset, np.float32), f"{IMAGE}/offset"),
        numpy_helper.from_array(np.array([2, 1, 0], np.int64), f"{IMAGE}/order"),
        numpy_helper.from_array(np.array(1, np.float32), f"{PROBABILITIES}/one"),
    ]


def _probability_nodes(recipe: Recipe, output: str, shape: list[int | None] | None) -> Iterator[Any]:
    """From the foreign output to `probabilities`."""
    steps: list[tuple[str, dict[str, Any]]] = [("Cast", {"to": TensorProto.FLOAT})]
    if shape is None or len(shape) != 2:
        steps.append(("Flatten", {"axis": 1}))
    if recipe.activation != "none":
        softmax = recipe.activation == "softmax"
        steps.append(("Softmax", {"axis": 1}) if softmax else ("Sigmoid", {}))
    name, last = output, f"{PROBABILITIES}/p" if recipe.is_binary else PROBABILITIES
    for number, (kind, attributes) in enumerate(steps):
        result = last if number == len(steps) - 1 else f"{PROBABILITIES}/{number}"
        yield helper.make_node(kind, [name], [result], name=f"{PROBABILITIES}/{kind.lower()}", **attributes)
        name = result
    if recipe.is_binary:
        other = f"{PROBABILITIES}/other"
        yield helper.make_node("Sub", [f"{PROBABILITIES}/one", last], [other], name=other)
        yield helper.make_node("Concat", [other, last], [PROBABILITIES], name=f"{PROBABILITIES}/concat", axis=1)


# --- the graph's own ways --------------------------------------------------------------------------------------------


def external_locations(file: Path) -> list[str]:
    """The files beside an ONNX file that hold its weights, relative to its folder; they need not be there.

    Raises:
        ConfigError: it is no ONNX model, or names a file outside of its folder.
    """
    return sorted({_location(tensor, file) for tensor in _outside(_loaded(file))})


def _loaded(file: Path) -> Any:
    """The model without its external data."""
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as err:  # protobuf's own exceptions, and what onnx makes of other damage
        why = f"{type(err).__name__}: it may be damaged, text, or a pointer of Git LFS"
        raise ConfigError(f"this is not an ONNX model ({why}). Received: {str(file)!r}") from None
    if not model.graph.node:
        raise ConfigError(f"this is not an ONNX model: it has no graph. Received: {str(file)!r}")
    return model


def _outside(model: Any) -> Iterator[Any]:
    return filter(is_outside, tensors_of(model))


def _check_external_data(model: Any, file: Path) -> None:
    """External data must lie in the model's folder, or below it; nothing else is ever opened."""
    for tensor in _outside(model):
        location = _location(tensor, file)
        if not (file.parent / location).is_file():
            raise ConfigError(f"a file of the model is missing. Received: {location!r}, named in {str(file)!r}")


def _location(tensor: Any, file: Path) -> str:
    """Where the values of a tensor lie, relative to the model's folder."""
    location: str = onnx.external_data_helper.ExternalDataInfo(tensor).location
    folder = file.parent.resolve()
    is_named_inside = not Path(location).is_absolute() and ".." not in Path(location).parts
    if not (is_named_inside and (folder / location).resolve().is_relative_to(folder)):
        hint = "; it is a link, as in the cache of the Hugging Face hub: `cp -rL FOLDER COPY`, and import the copy"
        raise ConfigError(
            f"the model's data must lie in its own folder{hint if is_named_inside else ''}. Received: {location!r} for "
            f"tensor {tensor.name!r} in {str(file)!r}"
        )
    return location


def _check_operators(model: Any, file: Path) -> None:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 0))
    if opset < MIN_OPSET:
        raise ConfigError(f"the model must have opset {MIN_OPSET} or newer. Received: {opset} in {str(file)!r}")
    for node in _all_nodes(model.graph):
        if node.domain not in _DOMAINS:
            raise ConfigError(
                f"plain ONNX Runtime has no operator {node.op_type} of the domain {node.domain!r}: custom operators "
                f"cannot be imported. Received: {str(file)!r}"
            )


def _layout(model: Any, name: str, shape: list[int | None]) -> Layout | None:
    if shape[1] in (1, 3) and shape[3] not in (1, 3):
        return "NCHW"
    if shape[3] in (1, 3) and shape[1] not in (1, 3):
        return "NHWC"
    if shape[1] in (1, 3):  # 3 x 3 px, or a file that names all sizes
        return "NCHW"
    convolution = _first_convolution(model, name) if shape[1] is None and shape[3] is None else None
    return None if convolution is None else convolution[0]


def _first_convolution(model: Any, name: str) -> tuple[Layout, int] | None:
    """What the first convolution behind the input shows: the layout of the input, and its channels."""
    kernels = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    layout: Layout = "NCHW"
    for node in model.graph.node:
        if name not in node.input:
            continue
        if node.op_type == "Conv" and node.input[0] == name and node.input[1] in kernels:
            groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            return layout, int(kernels[node.input[1]][1] * groups)
        if node.op_type == "Transpose":
            layout = "NHWC"
        elif node.op_type not in _BEFORE_CONVOLUTION:
            return None
        name = node.output[0]
    return None


def _prefix(graph: Any) -> None:
    """Puts `network/` before all names, also in inner graphs, which may use names from outside."""
    for inner in _graphs(graph):
        tensors = [*inner.initializer, *(sparse.values for sparse in inner.sparse_initializer)]
        for named in (*inner.input, *inner.output, *inner.value_info, *tensors, *inner.node):
            named.name = f"{_PREFIX}{named.name}" if named.name else ""
        for node in inner.node:
            for names in (node.input, node.output):
                names[:] = [f"{_PREFIX}{name}" if name else "" for name in names]  # empty: left out


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for inner in _inner_graphs(node):
            yield from _graphs(inner)


def _inner_graphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield from (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)


def _all_nodes(graph: Any) -> Iterator[Any]:
    for inner in _graphs(graph):
        yield from inner.node


def _names_used(node: Any) -> Iterator[str]:
    """The inputs of a node, and what its inner graphs take from outside."""
    yield from node.input
    for inner in _inner_graphs(node):
        for other in inner.node:
            yield from _names_used(other)
        yield from (output.name for output in inner.output)


def _needed(nodes: list[Any], wanted: set[str]) -> list[Any]:
    """Those nodes, in their order, on which the wanted tensors depend."""
    names, kept = set(wanted), list[Any]()
    for node in reversed(nodes):  # ONNX demands topological order
        if names & set(node.output):
            kept.append(node)
            names.update(_names_used(node))
    return kept[::-1]


def _producers(model: Any) -> dict[str, Any]:
    return {output: node for node in model.graph.node for output in node.output}


def _constants(model: Any) -> set[str]:
    nodes = (node for node in model.graph.node if node.op_type == "Constant")
    return {tensor.name for tensor in model.graph.initializer} | {name for node in nodes for name in node.output}


def _adds_constant(node: Any, constants: Iterable[str]) -> bool:
    return node.op_type == "Add" and sum(name in constants for name in node.input) == 1


def _flat_size(shape: list[int | None] | None) -> int | None:
    if shape is None or len(shape) < 2 or any(not size for size in shape[1:]):
        return None
    return int(np.prod([size or 0 for size in shape[1:]]))


def _sizes(tensor: Any) -> list[int | None]:
    """The shape of a tensor type; None for a size that varies."""
    return [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]


def _type_name(value: int) -> str:
    return str(TensorProto.DataType.Name(value)).lower()


def _shown(tensor: Any) -> str:
    sizes = [str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    return f"[{', '.join(sizes)}]"


def _first_lines(err: Exception) -> str:
    return " ".join(str(err).split())[:300]
