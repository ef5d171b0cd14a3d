"""Foreign Keras models: what they say about themselves, and the bundle's model made of one.

Owns: reading facts from a model's layers, cutting a model at a layer, the graph of the bundle's `model.keras` and the
reference. Does not own: which files are loaded (`keras_files`), how Keras fits images (`tensorflow_images`), or the
bundle of a backbone, which has to be ONNX (`onnx_graph`): here, its features become a foreign graph.

Contract of `build_keras`: the file loads with plain `keras.saving.load_model` in safe mode without this package.
`model(x)`, `model(x, training=False)`, `predict`, the reload and every export agree, even if the foreign model holds
layers that train by default (Resizing, CenterCrop, Random*): it is called with `training=False` inside the graph.

The layers of the file: `image` (uint8), `network` (normalisation and the foreign model; its second output, if there is
one, are the features) and, where there is something to do, `probabilities`. A layer inside the last nested model is
named `MODEL/LAYER`.
"""

# B = batch, H = height px, W = width px, C = channels, K = outputs, D = features

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from mnist_dist.config import Activation
from mnist_dist.engines.formats import check_installed
from mnist_dist.engines.graphs import freeze, inference_function, write_onnx
from mnist_dist.engines.steps import Report
from mnist_dist.errors import ConfigError, first_line, suggestion
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.foreign import Asked, Facts, Foreign, Values
from mnist_dist.importing.keras_files import load_keras
from mnist_dist.importing.recipe import Recipe
from mnist_dist.importing.tensorflow_images import (
    WHOLE_NAME,
    ask,
    expects_pixels,
    is_identity,
    rounded_pixels,
    tensorflow_pixels,
)
from mnist_dist.models.bundle import NETWORK_LAYER, all_layers
from mnist_dist.models.onnx_file import FEATURES, PROBABILITIES

PASSING = frozenset({"Dropout", "Identity", "Reshape", "Flatten", "Cast", "ActivityRegularization", "Squeeze"})
"""Classes of operations that keep the values, between a last Dense and the output."""
ENDS = "it ends with"
INPUT = "image"
ARITHMETIC = {"TrueDivide": "divide", "Divide": "divide", "Multiply": "multiply", "Subtract": "add", "Add": "add"}


def open_keras(job: ImportJob, scratch: Path, report: Report) -> Foreign:
    """Opens a foreign Keras model and reads what it says about itself.

    Args:
        job: its `source` is a local `.keras`, `.h5` or `.hdf5` file.
        scratch: folder for a copy as `.keras` in float32, where the source is something else; of a backbone, for
            `foreign.onnx`: the input `image`, as in the model, and the features, which have the name of their layer.
        report: see `engines.steps`.

    Raises:
        ConfigError: the file is refused (`keras_files`), holds no classifier of images, or cannot be converted.
    """
    source = Path(job.source)
    model, was_converted = load_keras(source)
    _check_input(model, source.name)
    network = cut(model, [job.output_node])
    facts = _facts(model, network, job)
    file, layer = source, None
    if was_converted:
        facts = _with_reason(facts, "its layers of lower precision compute in float32 now")
    if job.backbone_only:
        layer = facts.features or job.output_node or _last_node(network).operation.name
        file = scratch / "foreign.onnx"
        _write_features(cut(model, [layer]), layer, file)
        facts = _of_features(facts, layer)
    elif was_converted or source.suffix != ".keras":
        file = scratch / "foreign.keras"
        model.save(file)
    return Foreign(
        kind="keras",
        name=source.stem,
        file=file,
        facts=facts,
        reference=partial(reference, source, layer=layer),
        reference_name=f"Keras {keras.__version__}",
        whole=partial(whole_pipeline, source, layer=layer),
        whole_name=WHOLE_NAME,
    )


def build_keras(file: Path, recipe: Recipe, target: Path) -> None:
    """Writes the bundle's model.

    Args:
        file: `Foreign.file` of `open_keras`.
        recipe: what precedes and follows the foreign model.
        target: `model.keras`: `uint8 [B, H, W, C]` -> `float32 [B, K]` probabilities, or `[B, D]` features if the
            recipe has no class names.

    Raises:
        ConfigError: the recipe does not fit the model.
    """
    model, _ = load_keras(file)
    _check_input(model, file.name)
    _check_size(model, recipe)
    image = keras.Input(recipe.spec.shape, dtype="uint8", name="image")
    network = _network(model, recipe)
    outputs = network(image, training=False)
    output = outputs[0] if isinstance(outputs, list | tuple) else outputs
    tail = _probabilities(output.shape[-1], recipe) if recipe.class_names else None
    keras.Model(image, output if tail is None else tail(output), name="imported").save(target)


def reference(file: Path, images: Sequence[bytes], asked: Asked, *, layer: str | None = None) -> Values:
    """What the original model says about images, with whole pixels as the bundle has them: for the strict comparison.

    Args:
        file: the original file.
        images: encoded.
        asked: see `foreign`.
        layer: the layer to ask instead of the output, where the bundle gives features only.

    Returns:
        `float32 [N, K]`; of a model with one output K is 1.
    """
    return _ask(file, rounded_pixels(images, asked.spec), asked, layer)


def whole_pipeline(file: Path, images: Sequence[bytes], asked: Asked, *, layer: str | None = None) -> Values:
    """What the original model says in Keras' own pipeline: TensorFlow's decoder, and pixels that are not rounded after
    the resize. Shows what those two change; not for the strict comparison. Arguments as those of `reference`."""
    return _ask(file, tensorflow_pixels(images, asked.spec), asked, layer)


def cut(model: keras.Model, names: Sequence[str | None]) -> keras.Model:
    """The model with other outputs.

    Args:
        model: functional or Sequential.
        names: layers whose outputs they are; None: the model's own output.

    Raises:
        ConfigError: there is no such layer, or the model has several outputs and None is asked for.
    """
    nested = {name.split("/")[0] for name in names if name is not None and "/" in name}
    if len(nested) > 1:
        raise ConfigError(f"layers of one nested model can be used. Received: {', '.join(sorted(nested))}")
    if not nested:
        return keras.Model(_image_of(model), [_tensor(model, name) for name in names])
    return _cut_inside(model, names, nested.pop())


def _cut_inside(model: keras.Model, names: Sequence[str | None], outer: str) -> keras.Model:
    """Calls a nested model again, with other outputs."""
    node = _node(model, outer)
    if not isinstance(node.operation, keras.Model):
        raise ConfigError(f"layer {outer} is no nested model. Received: {', '.join(str(name) for name in names)}")
    is_last = node is _last_node(model)
    inside = [name for name in names if (name or "").startswith(f"{outer}/") or (name is None and is_last)]
    before = [name for name in names if name not in inside]
    if None in before:
        raise ConfigError(f"{outer} is not the last layer: name {outer} itself, or a layer behind it")
    trunk = keras.Model(_image_of(model), [node.input_tensors[0], *(_tensor(model, name) for name in before)])
    inner = cut(node.operation, [name and name.removeprefix(f"{outer}/") for name in inside])
    found = dict(zip(before, trunk.outputs[1:], strict=True))
    found |= dict(zip(inside, _listed(inner(trunk.outputs[0])), strict=True))
    return keras.Model(_image_of(trunk), [found[name] for name in names])


# --- the graph of a model --------------------------------------------------------------------------------------------


def _nodes(model: keras.Model) -> list[Any]:
    """The calls that make up a model, each after those that it needs. Keras has no public name for them."""
    by_depth = keras.Model(model.inputs, model.outputs)._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]


def _all_nodes(model: keras.Model) -> Iterator[Any]:
    """The same, with those of nested models in their place."""
    for node in _nodes(model):
        if isinstance(node.operation, keras.Model):
            yield from _all_nodes(node.operation)
        else:
            yield node


def _node(model: keras.Model, name: str) -> Any:
    nodes = {node.operation.name: node for node in _nodes(model)}
    if name not in nodes:
        shown = ", ".join(list(nodes)[-20:])
        raise ConfigError(
            f"the model has no layer {name!r}{suggestion(name, nodes)}. Received: a model whose last layers are {shown}"
        )
    return nodes[name]


def _last_node(model: keras.Model) -> Any:
    return next(node for node in _nodes(model) if node.outputs[0] is model.outputs[0])


def _tensor(model: keras.Model, name: str | None) -> Any:
    if name is not None:
        return _node(model, name).outputs[0]
    if len(model.outputs) != 1:
        names = [tensor._keras_history.operation.name for tensor in model.outputs]
        raise ConfigError(f"the model has several outputs: choose one with --output-node. Received: {', '.join(names)}")
    return model.outputs[0]


def _image_of(model: keras.Model) -> Any:
    (image,) = model.inputs
    return image


def _listed(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


# --- what a model says ------------------------------------------------------------------------------------------------


def _check_input(model: keras.Model, name: str) -> None:
    if not model.built or not getattr(model, "inputs", None):
        raise ConfigError(f"{name} does not know the shape of its input: call the model once before it is saved")
    if len(model.inputs) != 1:
        shown = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in model.inputs)
        raise ConfigError(f"{name} must have one input, the image. Received: {shown}")
    first = [layer.name for layer in all_layers(model) if getattr(layer, "data_format", None) == "channels_first"]
    shape = list(model.inputs[0].shape)
    if first or (len(shape) == 4 and shape[-1] not in (1, 3) and shape[1] in (1, 3)):
        raise ConfigError(
            f"{name} has its channels first, which TensorFlow does not compute on CPUs: build it with "
            f"data_format='channels_last' and set the same weights. Received: input {shape}, layers {first[:5]}"
        )
    if len(shape) != 4 or shape[-1] not in (1, 3):
        raise ConfigError(f"{name} must take images, [B, H, W, 1 or 3]. Received: input {shape}")


def _check_size(model: keras.Model, recipe: Recipe) -> None:
    shape, wanted = model.inputs[0].shape[1:], recipe.spec.shape
    if any(side not in (None, asked) for side, asked in zip(shape, wanted, strict=True)):
        raise ConfigError(f"the model takes images of {list(shape)}. Received: --input-size, {list(wanted)}")


def _facts(model: keras.Model, network: keras.Model, job: ImportJob) -> Facts:
    height_px, width_px, channels = model.inputs[0].shape[1:]
    outputs = network.outputs[0].shape
    if len(outputs) != 2 or outputs[-1] is None:
        flag = "--features-node and --output-node" if job.backbone_only else "--output-node"
        raise ConfigError(f"the output must be [B, K]: name another layer with {flag}. Received: {list(outputs)}")
    ending = _ending(network)
    activation: Activation | None = "none" if ending in ("softmax", "sigmoid") else None
    facts = Facts(
        height_px=height_px,
        width_px=width_px,
        channels=channels,
        framework="keras",
        activation=activation,
        multi_label=outputs[-1] > 1 if ending == "sigmoid" else False if ending == "softmax" else None,
        num_outputs=outputs[-1],
        output=job.output_node,
        features=job.features_node or _features(network, job.output_node),
    )
    if facts.features is not None:
        _check_features(model, facts.features)
    facts = _with_reason(facts, f"{ENDS} {ending}") if activation == "none" else facts
    return _with_range(facts, model)


def _with_reason(facts: Facts, reason: str, **changes: Any) -> Facts:
    return replace(facts, why=(*facts.why, reason), **changes)


def _check_features(model: keras.Model, name: str) -> None:
    shape = cut(model, [name]).outputs[0].shape
    if len(shape) != 2 or shape[-1] is None:
        raise ConfigError(f"features must be [B, D]: name another layer with --features-node. Received: {list(shape)}")


def _ending(model: keras.Model) -> str | None:
    """The activation that a model ends with, such as `softmax` or `linear`; None: unknown."""
    for node in reversed(list(_all_nodes(model))):
        operation = node.operation
        name = type(operation).__name__
        if name in PASSING:
            continue
        if name in ("Softmax", "Sigmoid"):
            return name.lower()
        return getattr(getattr(operation, "activation", None), "__name__", None)
    return None


def _features(network: keras.Model, output: str | None) -> str | None:
    """The name of the layer whose output the last Dense takes, if it is `[B, D]`."""
    nodes = _nodes(network)
    producers = {id(node.outputs[0]): node.operation for node in nodes}
    node = nodes[-1]
    while type(node.operation).__name__ in {*PASSING, "Activation", "Softmax", "Sigmoid"} and node.parent_nodes:
        node = node.parent_nodes[0]
    if isinstance(node.operation, keras.Model):
        inner = _features(keras.Model(node.operation.inputs, node.operation.outputs), None)
        is_its_input = inner is not None and isinstance(_node(node.operation, inner).operation, keras.layers.InputLayer)
        if inner is None or (not is_its_input and (output is not None or node is not nodes[-1])):
            return None
        if not is_its_input:
            return f"{node.operation.name}/{inner}"
    elif not isinstance(node.operation, keras.layers.Dense):
        return None
    features = node.input_tensors[0]
    return producers[id(features)].name if len(features.shape) == 2 else None


def _with_range(facts: Facts, model: keras.Model) -> Facts:
    """Adds what the first layers show about the values that the model expects."""
    if model.inputs[0].dtype == "uint8":
        return _with_reason(facts, "it takes uint8, 0-255", scale=(1.0,), offset=(0.0,), normalizes_itself=True)
    for node in _all_nodes(model):
        found = _expects_pixels(node)
        if found:
            reason = f"it normalises pixels of 0-255 itself, in the layer {node.operation.name}"
            return _with_reason(facts, reason, scale=(1.0,), offset=(0.0,), normalizes_itself=True)
        if found is False:
            return _with_reason(facts, f"its layer {node.operation.name} does not look as if it expected 0-255")
        if getattr(node.operation, "weights", ()):  # Behind it are features, no pixels.
            break
    return facts


def _expects_pixels(node: Any) -> bool | None:
    operation = node.operation
    if isinstance(operation, keras.layers.Rescaling):
        found = expects_pixels("multiply", operation.scale)
        return expects_pixels("add", operation.offset) if found is None else found
    if isinstance(operation, keras.layers.Normalization):
        mean, deviation = np.asarray(operation.mean), np.sqrt(np.asarray(operation.variance))
        is_identity_too = not mean.any() and (deviation == 1).all()
        return None if is_identity_too else bool(np.abs(mean).max() > 2 or deviation.max() > 2)
    rule, constants = ARITHMETIC.get(type(operation).__name__), node.arguments.args[1:]
    if rule is None or not constants or isinstance(constants[0], keras.KerasTensor):
        return None
    return expects_pixels(rule, constants[0])


# --- the features of a backbone ---------------------------------------------------------------------------------------


def _write_features(network: keras.Model, layer: str, file: Path) -> None:
    check_installed("importing a Keras model as a backbone", ("tf2onnx",))
    try:
        write_onnx(freeze(inference_function(network)), file, input_name=INPUT, output_names=[layer])
    except Exception as error:  # The border: tf2onnx fails in many ways on what it does not know.
        raise ConfigError(f"the features cannot be converted to ONNX: {first_line(error)}") from error


def _of_features(facts: Facts, layer: str) -> Facts:
    """Of a model that gives nothing but the output of that layer."""
    reasons = (*(reason for reason in facts.why if not reason.startswith(ENDS)), f"the features are those of {layer}")
    return replace(facts, output=None, features=layer, num_outputs=None, activation=None, multi_label=None, why=reasons)


# --- the bundle's model -----------------------------------------------------------------------------------------------


def _network(model: keras.Model, recipe: Recipe) -> keras.Model:
    """`uint8 [B, H, W, C]` -> the foreign model's output and, where the recipe has them, the features."""
    names = [recipe.output] if recipe.class_names else []
    foreign = cut(model, [*names, *([recipe.features] if recipe.features else [])] or [recipe.output])
    foreign.name = "foreign"
    image = keras.Input(recipe.spec.shape, dtype="uint8", name="image")
    outputs = _listed(foreign(_normalised(image, recipe, dtype=foreign.inputs[0].dtype), training=False))
    if recipe.features or not recipe.class_names:
        outputs[-1] = keras.layers.Identity(name=FEATURES)(outputs[-1])
    return keras.Model(image, outputs if len(outputs) > 1 else outputs[0], name=NETWORK_LAYER)


def _check_normalisation(dtype: str, scale: Sequence[float], offset: Sequence[float]) -> None:
    if "int" in dtype and not is_identity(scale, offset):
        raise ConfigError(
            f"the model takes pixels as they are, in whole numbers: use --preset raw. Received: scale={tuple(scale)}, "
            f"offset={tuple(offset)} for an input of {dtype}"
        )


def _normalised(image: keras.KerasTensor, recipe: Recipe, *, dtype: str) -> keras.KerasTensor:
    _check_normalisation(dtype, recipe.scale, recipe.offset)
    pixels = image
    if recipe.bgr:
        pixels = keras.ops.flip(pixels, axis=-1)
    if not is_identity(recipe.scale, recipe.offset):
        pixels = keras.ops.cast(pixels, "float32")
        scale, offset = (list(values) if len(values) > 1 else values[0] for values in (recipe.scale, recipe.offset))
        pixels = keras.layers.Rescaling(scale, offset, name="normalisation")(pixels)
    return pixels if pixels.dtype == dtype else keras.ops.cast(pixels, dtype)


def _probabilities(num_outputs: int, recipe: Recipe) -> keras.Model | None:
    """What follows the network; None: nothing."""
    expected = 1 if recipe.is_binary else len(recipe.class_names)
    if num_outputs != expected:
        raise ConfigError(f"the model has {num_outputs} outputs. Received: {len(recipe.class_names)} class names")
    if recipe.activation == "none" and not recipe.is_binary:
        return None
    output = values = keras.Input((num_outputs,), name="output")
    if recipe.activation != "none":
        values = keras.layers.Activation(recipe.activation, name=recipe.activation)(values)
    if recipe.is_binary:
        both = keras.layers.Concatenate(name="both")([values, values])
        values = keras.layers.Rescaling([-1.0, 1.0], [1.0, 0.0], name="binary")(both)
    return keras.Model(output, values, name=PROBABILITIES)


def _ask(file: Path, pixels: Sequence[Values], asked: Asked, layer: str | None) -> Values:
    model, _ = load_keras(file)
    network = cut(model, [layer or asked.output])
    dtype = network.inputs[0].dtype
    _check_normalisation(dtype, asked.scale, asked.offset)
    return ask(lambda batch: network(batch.astype(dtype), training=False), pixels, asked)
