"""Foreign SavedModels: a signature becomes an ONNX file.

Owns: which of TensorFlow's operations a SavedModel may hold, its signature, the conversion, its facts and the
reference. Does not own: what is made of the ONNX file (`onnx_graph`).

Contract: a SavedModel is a program, which may read and write files or call Python. Its operations are read from
`saved_model.pb` and checked before TensorFlow loads it: those that the signature reaches must be known to the
conversion, none in the file may reach outside of the graph, and nothing in it may run while it is loaded. No link in
the folder may lead out of it.
"""

# B = batch, H = height px, W = width px, C = channels, K = outputs

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mnist_dist.engines.formats import check_installed
from mnist_dist.engines.graphs import freeze, write_onnx
from mnist_dist.engines.steps import Report
from mnist_dist.errors import ConfigError, first_line
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.foreign import Asked, Facts, Foreign, Values
from mnist_dist.importing.tensorflow_images import (
    BATCH,
    WHOLE_NAME,
    ask,
    expects_pixels,
    rounded_pixels,
    tensorflow_pixels,
)

MODEL = "saved_model.pb"
SERVING = "serving_default"
INPUT = "image"
CALLS = frozenset(
    {"StatefulPartitionedCall", "PartitionedCall", "VarHandleOp", "ReadVariableOp", "ResourceGather", "_Arg", "_Retval"}
    | {"Assert", "ScaleAndTranslate", "StatelessWhile", "StatelessIf", "While", "If", "Rank", "LinSpace"}
)
"""Operations that are gone when a signature is frozen, or that the conversion rewrites."""
OUTSIDE = re.compile(
    "PyFunc|ReadFile|WriteFile|MatchingFiles|Dataset|Reader|Summary|Print|Debug|Rpc|RemoteCall|HostCompute"
    "|InitializeTable|LookupTable|^Save$|SaveSlices|^Restore$|RestoreSlice|LoadAndRemap|ImmutableConst|DumpTo"
)
"""Operations that reach files, other processes or Python. The saver's own (SaveV2, RestoreV2, ...) may stand in
functions that no signature reaches: TensorFlow's loader does not call them."""
TRAINS = frozenset(
    {
        "AssignVariableOp",
        "AssignAddVariableOp",
        "AssignSubVariableOp",
        "StatelessRandomUniformV2",
        "StatelessRandomNormalV2",
    }
)
IN_TRAINING = (
    "Keras exports a model with layers such as Resizing, CenterCrop or RandomFlip in training mode: import its "
    "`.keras` file, or export `keras.Model(x, model(x, training=False))`"
)
ARITHMETIC = {"Mul": "multiply", "RealDiv": "divide", "Div": "divide", "Sub": "add", "AddV2": "add", "Add": "add"}
PASSING = frozenset({"Identity", "Reshape", "Squeeze", "Cast", "StopGradient", "ResizeBilinear", "ReverseV2"})


@dataclass(frozen=True)
class Signature:
    """What a SavedModel is called by.

    Args:
        loaded: the SavedModel, without which the variables of the function are gone.
        function: the concrete function.
        input_name: keyword of the image.
        input_spec: its `tf.TensorSpec`.
        output_names: in the order of the function's outputs, which is that of the alphabet.
    """

    loaded: Any
    function: Any
    input_name: str
    input_spec: Any
    output_names: tuple[str, ...]


def open_saved_model(job: ImportJob, scratch: Path, report: Report) -> Foreign:
    """Converts a SavedModel to ONNX and reads what it says about itself.

    Args:
        job: its `source` is a local folder.
        scratch: folder for `foreign.onnx`: one input, as in the SavedModel, named `image`; the outputs have the names
            of the signature.
        report: see `engines.steps`.

    Raises:
        ConfigError: the SavedModel is refused, or is no classifier of images; or a package is missing.
    """
    check_installed("importing a SavedModel", ("tf2onnx",))
    import tensorflow as tf

    folder = Path(job.source)
    signature = _load(folder)
    output = _output(signature, job.output_node)
    frozen, file = freeze(signature.function), scratch / "foreign.onnx"
    try:
        write_onnx(frozen, file, input_name=INPUT, output_names=signature.output_names)
    except Exception as error:  # The border: tf2onnx fails in many ways on what it does not know.
        raise ConfigError(f"{folder.name} cannot be converted to ONNX: {first_line(error)}") from error
    return Foreign(
        kind="saved_model",
        name=folder.name,
        file=file,
        facts=_facts(signature, frozen, output),
        reference=partial(reference, folder),
        reference_name=f"TensorFlow {tf.__version__}",
        whole=partial(whole_pipeline, folder),
        whole_name=WHOLE_NAME,
    )


def reference(folder: Path, images: Sequence[bytes], asked: Asked) -> Values:
    """What the SavedModel itself says about images, with whole pixels as the bundle has them: for the strict
    comparison.

    Args:
        folder: the original folder.
        images: encoded.
        asked: see `foreign`; its output is one of the signature's.

    Returns:
        `float32 [N, K]`; of a model with one output K is 1.
    """
    return _ask(folder, rounded_pixels(images, asked.spec), asked)


def whole_pipeline(folder: Path, images: Sequence[bytes], asked: Asked) -> Values:
    """The same with TensorFlow's decoder, and pixels that are not rounded after the resize. Shows what those two
    change; not for the strict comparison. Arguments as those of `reference`."""
    return _ask(folder, tensorflow_pixels(images, asked.spec), asked)


def check_operations(folder: Path) -> str:
    """Checks what a SavedModel would run; TensorFlow does not load it.

    Args:
        folder: of the SavedModel.

    Returns:
        The key of the signature to use.

    Raises:
        ConfigError: it holds operations that are not allowed, links to files elsewhere, or no signature to use.
    """
    _check_links(folder)
    graph = _read(folder)
    key = _signature_key(graph, folder.name)
    functions = {function.signature.name: function for function in graph.graph_def.library.function}
    _check_loading(graph, folder.name)
    everything = [("the graph", node) for node in graph.graph_def.node]
    everything += [(name, node) for name, function in functions.items() for node in function.node_def]
    for where, node in everything:
        if OUTSIDE.search(node.op):
            raise ConfigError(_refusal(folder.name, node, where, "reaches outside of the graph"))
    known = _convertible() | CALLS | functions.keys()
    for where, node in _reached(_entries(graph, key), functions):
        if node.op in TRAINS or (node.op.startswith("FusedBatchNorm") and node.attr["is_training"].b):
            raise ConfigError(_refusal(folder.name, node, where, f"trains. {IN_TRAINING}"))
        if node.op not in known:
            raise ConfigError(_refusal(folder.name, node, where, "is none that can be converted to ONNX"))
    return key


def _refusal(name: str, node: Any, where: str, reason: str) -> str:
    return f"{name} is refused: the operation {node.op} ({node.name} in {where}) {reason}"


def _check_links(folder: Path) -> None:
    """TensorFlow opens whatever the members of the folder are links to."""
    root = folder.resolve()
    for path in folder.rglob("*"):
        if not path.resolve().is_relative_to(root):
            raise ConfigError(
                f"{folder.name} is refused: a link leads out of the folder. If that is meant, import a copy made with "
                f"`cp -rL`. Received: {path.relative_to(folder)}"
            )


def _read(folder: Path) -> Any:
    """The only graph of a SavedModel, of TensorFlow 2."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    message = saved_model_pb2.SavedModel()
    try:
        message.ParseFromString((folder / MODEL).read_bytes())
    except (OSError, DecodeError) as error:
        raise ConfigError(f"{folder.name} is no SavedModel: {first_line(error)}") from error
    graphs = [graph for graph in message.meta_graphs if "serve" in graph.meta_info_def.tags]
    if len(graphs) != 1 or not graphs[0].object_graph_def.nodes:
        raise ConfigError(
            f"{folder.name} must have one graph to serve, saved by TensorFlow 2: load it, and save it with "
            f"`tf.saved_model.save(..., signatures=...)`. Received: {len(message.meta_graphs)} graphs"
        )
    return graphs[0]


def _signature_key(graph: Any, name: str) -> str:
    keys = sorted(key for key in graph.signature_def if not key.startswith("__"))
    if SERVING in keys:
        return SERVING
    if len(keys) != 1:
        raise ConfigError(
            f"{name} must have the signature {SERVING}, or only one: save it with "
            f"`tf.saved_model.save(..., signatures=...)`. Received: {', '.join(keys) or 'no signatures'}"
        )
    (key,) = keys
    return str(key)


def _check_loading(graph: Any, name: str) -> None:
    """Refuses objects that call functions or read files while they are loaded."""
    for node in graph.object_graph_def.nodes:
        kind = node.WhichOneof("kind")
        if kind in ("resource", "asset") or node.saveable_objects or node.registered_saver:
            raise ConfigError(
                f"{name} is refused: it holds a table or a file that is read while it is loaded. Received: {kind}"
            )
    if graph.asset_file_def:
        raise ConfigError(f"{name} is refused: it reads files. Received: {graph.asset_file_def[0].filename}")


def _entries(graph: Any, key: str) -> list[str]:
    """The functions that a signature is made of: TensorFlow's loader finds them under `signatures`."""
    nodes = graph.object_graph_def.nodes
    signatures = next((child.node_id for child in nodes[0].children if child.local_name == "signatures"), None)
    children = nodes[signatures].children if signatures is not None else ()
    found = [nodes[child.node_id] for child in children if child.local_name == key]
    names = [name for node in found for name in _concrete_functions(node)]
    if not names:
        raise ConfigError(
            f"the signature {key} names no function. Received: {[node.WhichOneof('kind') for node in found]}"
        )
    return names


def _concrete_functions(node: Any) -> list[str]:
    if node.WhichOneof("kind") == "bare_concrete_function":
        return [node.bare_concrete_function.concrete_function_name]
    return list(node.function.concrete_functions)


def _reached(entries: Sequence[str], functions: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every operation of the functions, and of those that they call."""
    waiting, seen = list(entries), set(entries)
    while waiting:
        name = waiting.pop()
        for node in functions[name].node_def if name in functions else ():
            yield name, node
            called = {node.op, *(called for value in node.attr.values() for called in _called(value))}
            new = (called & functions.keys()) - seen
            seen |= new
            waiting.extend(new)


def _called(value: Any) -> Iterator[str]:
    if value.HasField("func"):
        yield value.func.name
    yield from (function.name for function in value.list.func)


def _convertible() -> frozenset[str]:
    """TensorFlow's operations that tf2onnx converts."""
    import tf2onnx.tfonnx  # noqa: F401 (it registers them)
    from tf2onnx.handler import tf_op

    return frozenset(name for opsets in tf_op.get_opsets().values() for opset in opsets for name in opset)


def _load(folder: Path) -> Signature:
    key = check_operations(folder)
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(folder))
        function = loaded.signatures[key]
    except Exception as error:  # The border: a foreign folder fails in as many ways as TensorFlow has.
        raise ConfigError(
            f"TensorFlow cannot load {folder.name}: {type(error).__name__}: {first_line(error)}"
        ) from error
    inputs = function.structured_input_signature[1]
    if len(inputs) != 1:
        raise ConfigError(f"{folder.name} must have one input, the image. Received: {', '.join(inputs)}")
    ((name, spec),) = inputs.items()
    _check_input(spec, folder.name)
    return Signature(loaded, function, name, spec, tuple(sorted(function.structured_outputs)))


def _check_input(spec: Any, name: str) -> None:
    shape = spec.shape.as_list() if spec.shape.rank is not None else []
    if len(shape) != 4 or not {1, 3} & {shape[1], shape[3]} or spec.dtype.name not in ("float32", "uint8"):
        raise ConfigError(
            f"{name} must take images, float32 or uint8 [B, H, W, 1 or 3]. Received: {spec.dtype.name} {shape}"
        )


def _output(signature: Signature, wanted: str | None) -> str:
    names = signature.output_names
    if wanted in names or len(names) == 1:
        return wanted if wanted in names else names[0]
    raise ConfigError(f"the model has several outputs: choose one with --output-node. Received: {', '.join(names)}")


# --- what a SavedModel says -------------------------------------------------------------------------------------------


def _facts(signature: Signature, frozen: Any, output: str) -> Facts:
    shape = signature.input_spec.shape.as_list()
    height, width, channels = shape[1:] if shape[3] in (1, 3) else (*shape[2:], shape[1])
    tensor = frozen.outputs[signature.output_names.index(output)]
    num_outputs = tensor.shape[-1] if tensor.shape.rank == 2 else None
    ending = _ending(tensor)
    facts = Facts(
        height_px=height,
        width_px=width,
        channels=channels,
        framework="keras",
        activation="none" if ending else None,
        multi_label=bool(num_outputs and num_outputs > 1) if ending == "sigmoid" else False if ending else None,
        num_outputs=num_outputs,
        output=output,
        why=(f"it ends with {ending}",) if ending else (),
    )
    return _with_range(facts, frozen.inputs[0])


def _ending(tensor: Any) -> str | None:
    """`softmax` or `sigmoid`, where a graph ends with it."""
    operation = tensor.op
    while operation.type in ("Identity", "Reshape", "Squeeze"):
        operation = operation.inputs[0].op
    return {"Softmax": "softmax", "Sigmoid": "sigmoid"}.get(operation.type)


def _with_pixels(facts: Facts, reason: str) -> Facts:
    return replace(facts, scale=(1.0,), offset=(0.0,), normalizes_itself=True, why=(*facts.why, reason))


def _with_range(facts: Facts, image: Any) -> Facts:
    """Adds what the first operations show about the values that the model expects."""
    if image.dtype.name == "uint8":
        return _with_pixels(facts, "it takes uint8, 0-255")
    tensor = image
    while len(tensor.consumers()) == 1:
        (operation,) = tensor.consumers()
        found = _expects_pixels(operation, tensor)
        if found:
            reason = f"it normalises pixels of 0-255 itself, in the operation {operation.name}"
            return _with_pixels(facts, reason)
        if found is False:
            reason = f"its operation {operation.name} does not look as if it expected 0-255"
            return replace(facts, why=(*facts.why, reason))
        if operation.type not in PASSING and operation.type not in ARITHMETIC:
            break
        tensor = operation.outputs[0]
    return facts


def _expects_pixels(operation: Any, tensor: Any) -> bool | None:
    from tensorflow import make_ndarray

    others = [each.op for each in operation.inputs if each is not tensor]
    rule = ARITHMETIC.get(operation.type)
    while others and others[0].type in ("Identity", "Cast", "ReadVariableOp"):
        others = [each.op for each in others[0].inputs]
    if rule is None or len(others) != 1 or others[0].type != "Const":
        return None
    return expects_pixels(rule, make_ndarray(others[0].get_attr("value")))


def _ask(folder: Path, pixels: Sequence[Values], asked: Asked) -> Values:
    import tensorflow as tf

    signature = _load(folder)
    output, spec = _output(signature, asked.output), signature.input_spec
    is_channels_first = spec.shape[3] not in (1, 3)

    def network(batch: Values) -> Any:
        ordered = batch.transpose(0, 3, 1, 2) if is_channels_first else batch
        values = tf.constant(ordered.astype(spec.dtype.as_numpy_dtype))
        return np.asarray(signature.function(**{signature.input_name: values})[output])

    return ask(network, pixels, asked, batch_size=spec.shape[0] or BATCH)
