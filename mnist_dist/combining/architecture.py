"""Whether two model files hold the same network, so that their weights mean the same and can be averaged.

Owns: the description of a network that leaves out what only its training knew, and the first difference between two.
Does not own: the weights. Reads files as text or protobuf; loads neither Keras nor a runtime.

What does not count: names of layers (Keras numbers them as they were made), dropout, what is trainable, initialisers,
regularisers and constraints, and the momentum of BatchNorm.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_dist.errors import BundleError

Layers = list[tuple[str, dict[str, Any]]]
"""Name and description of each layer, in order."""
_OF_TRAINING = frozenset({"trainable", "momentum", "synchronized", "seed", "shared_object_id", "activity_regularizer"})
_OF_TRAINING_ENDS = ("_initializer", "_regularizer", "_constraint")
_NAMES = frozenset({"name", "inbound_nodes", "layers", "input_layers", "output_layers"})
"""Of a layer: its name, and what is described by the places of other layers instead of their names."""
_DROPOUT = frozenset({"Dropout", "SpatialDropout2D", "GaussianDropout", "AlphaDropout", "GaussianNoise"})


def layers_of(file: Path) -> Layers:
    """The layers of a model file, `model.keras` or `model.onnx`.

    Raises:
        BundleError: the Keras model is not a graph of layers.
    """
    return _onnx_layers(file) if file.suffix == ".onnx" else _keras_layers(file)


def first_difference(expected: Layers, found: Layers) -> str | None:
    """Describes the first layer in which two networks differ; None: they are the same."""
    for (name, layer), (other_name, other) in zip(expected, found, strict=False):
        if layer != other:
            where = "" if other_name == name else f" in {other_name!r}"
            return f"layer {name!r}: {_differing(layer, other)}{where}"
    if len(expected) != len(found):
        return f"expected {len(expected)} layers, received {len(found)}"
    return None


def _differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What was expected and what came, of the first setting that differs."""
    key = next(key for key in [*expected, *found] if expected.get(key) != found.get(key))
    left, right = expected.get(key), found.get(key)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return _differing(left, right)
    return f"expected {key}={_short(left)}, received {key}={_short(right)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- Keras -----------------------------------------------------------------------------------------------------------


def _keras_layers(file: Path) -> Layers:
    with zipfile.ZipFile(file) as archive:
        model = json.loads(archive.read("config.json"))
    if "layers" not in model.get("config", {}):
        raise BundleError(f"the model must be a graph of layers. Received: {model.get('class_name')} in {str(file)!r}")
    return _of_graph(model["config"], "")


def _of_graph(graph: Mapping[str, Any], prefix: str) -> Layers:
    """The layers of a functional model and of those inside it."""
    layers, places, number = Layers(), dict[str, int](), 0
    for layer in graph["layers"]:
        name, inbound = layer["config"]["name"], layer.get("inbound_nodes", [])
        if layer["class_name"] in _DROPOUT:
            places[name] = places[_sources(inbound)[0]]
            continue
        places[name], number = number, number + 1
        layers.append((f"{prefix}{name}", _described(layer, places)))
        if "layers" in layer["config"]:
            layers += _of_graph(layer["config"], f"{prefix}{name}/")
    ends = {key: _placed(graph.get(key), places) for key in ("input_layers", "output_layers")}
    return [*layers, (f"{prefix}output", ends)]


def _described(layer: Mapping[str, Any], places: Mapping[str, int]) -> dict[str, Any]:
    settings = {key: _cleaned(value) for key, value in layer["config"].items() if key not in _NAMES}
    return {
        "class_name": layer["class_name"],
        **{key: value for key, value in settings.items() if not _is_of_training(key)},
        "input_shape": (layer.get("build_config") or {}).get("input_shape"),
        "inputs": _placed(layer.get("inbound_nodes", []), places),
    }


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _cleaned(inner) for key, inner in value.items() if not _is_of_training(key)}
    return [_cleaned(inner) for inner in value] if isinstance(value, list) else value


def _is_of_training(key: str) -> bool:
    return key in _OF_TRAINING or key.endswith(_OF_TRAINING_ENDS)


def _placed(value: Any, places: Mapping[str, int]) -> Any:
    """References to layers, with their places instead of their names; `training` says nothing about the network."""
    if isinstance(value, Mapping):
        return {key: _placed(inner, places) for key, inner in value.items() if key != "training"}
    if isinstance(value, list):
        if len(value) == 3 and isinstance(value[0], str) and value[0] in places:
            return [places[value[0]], *value[1:]]
        return [_placed(inner, places) for inner in value]
    return value


def _sources(inbound: Any) -> list[str]:
    """The names of the layers that a layer takes its inputs from."""
    if isinstance(inbound, Mapping):
        if "keras_history" in inbound:
            return [inbound["keras_history"][0]]
        return [name for inner in inbound.values() for name in _sources(inner)]
    return [name for inner in inbound for name in _sources(inner)] if isinstance(inbound, list) else []


# --- ONNX ------------------------------------------------------------------------------------------------------------


def is_weight(tensor: Any) -> bool:
    """Whether the values of a tensor of an ONNX file are averaged: float32 numbers. All others have to be the same."""
    return bool(tensor.data_type == tensor.FLOAT)


def _onnx_layers(file: Path) -> Layers:
    """The nodes, then the tensors that they take; what is no weight counts with its values."""
    import onnx

    graph = onnx.load(file).graph
    nodes = [(node.name or node.output[0], _node(node)) for node in graph.node]
    return nodes + [(tensor.name, _tensor(tensor)) for tensor in graph.initializer]


def _node(node: Any) -> dict[str, Any]:
    attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
    return {
        "op_type": node.op_type,
        "inputs": list(node.input),
        "outputs": list(node.output),
        "attributes": _digest(b"".join(attributes)),
    }


def _tensor(tensor: Any) -> dict[str, Any]:
    values = None if is_weight(tensor) else _digest(tensor.SerializeToString(deterministic=True))
    return {"name": tensor.name, "shape": list(tensor.dims), "type": tensor.data_type, "values": values}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
