"""Ensembles: several models in one file, which gives the mean of their probabilities.

Owns: the graph around the members, in Keras and in ONNX. Does not own: which bundles may be members (`members`), or
comparing the file with them (`building`).

Contract: the file is a bundle's model file like any other (`models/bundle.py`, `models/onnx_file.py`). Each member is
in it unchanged, behind the name `member_N`. It has no features: those of the members have nothing in common.

Source: Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
arXiv:1612.01474: the prediction of an ensemble is the uniformly weighted mean of its members' probabilities.
"""

# N = images of a call, K = classes

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_dist.errors import ConfigError, first_line
from mnist_dist.models.onnx_file import IMAGE, PROBABILITIES


def write_ensemble(files: Sequence[Path], target: Path) -> None:
    """Writes the ensemble of model files, which are all `.keras` or all `.onnx`, as `target` is.

    Raises:
        ConfigError: ONNX models cannot stand in one file.
    """
    if target.suffix == ".onnx":
        _write_onnx(files, target)
    else:
        _write_keras(files, target)


def _write_keras(files: Sequence[Path], target: Path) -> None:
    import keras

    models = [keras.saving.load_model(file, compile=False) for file in files]
    members = [
        keras.Model(model.inputs[0], model.outputs[0], name=f"member_{number}")
        for number, model in enumerate(models, start=1)
    ]
    image = keras.Input(models[0].input_shape[1:], dtype="uint8", name=IMAGE)
    outputs = [member(image, training=False) for member in members]
    mean = keras.layers.Average(dtype="float32", name=PROBABILITIES)(outputs)
    keras.Model(image, mean, name="ensemble").save(target)


def _write_onnx(files: Sequence[Path], target: Path) -> None:
    import onnx

    members = _with_one_opset([onnx.load(file) for file in files], files)
    first = members[0]
    image, output = first.graph.input[0], _output_of(first)
    named = [_named(member, f"member_{number}") for number, member in enumerate(members, start=1)]
    mean = onnx.helper.make_node(
        "Mean", [_output_of(member, PROBABILITIES).name for member in named], [PROBABILITIES], name="mean"
    )
    graph = onnx.helper.make_graph(
        [*(node for member in named for node in member.graph.node), mean],
        "ensemble",
        [image],
        [output],
        [tensor for member in named for tensor in member.graph.initializer],
        sparse_initializer=[tensor for member in named for tensor in member.graph.sparse_initializer],
    )
    domains = {entry.domain: entry for member in members for entry in member.opset_import}
    model = onnx.helper.make_model(
        graph, opset_imports=list(domains.values()), ir_version=max(member.ir_version for member in members)
    )
    facts = {entry.key: entry.value for entry in first.metadata_props}
    onnx.helper.set_model_props(model, facts | {"activation": "none"})
    onnx.checker.check_model(model)
    onnx.save(model, target)


def _named(member: Any, prefix: str) -> Any:
    """A member with all its names behind a prefix, except that of its input, which all members share."""
    from onnx import compose

    return compose.add_prefix(member, f"{prefix}/", rename_inputs=False)


def _output_of(model: Any, name: str = PROBABILITIES) -> Any:
    """The output of this name, or behind a prefix; features are left out."""
    return next(output for output in model.graph.output if output.name.rpartition("/")[2] == name)


def _with_one_opset(models: Sequence[Any], files: Sequence[Path]) -> list[Any]:
    """The models in the newest version of ONNX' operators that one of them has.

    Raises:
        ConfigError: a model cannot be converted to it, or versions of other operators differ.
    """
    newest, others = max(_opsets(model)[""] for model in models), dict[str, int]()
    for model, file in zip(models, files, strict=True):
        for domain, version in _opsets(model).items():
            if domain and others.setdefault(domain, version) != version:
                raise ConfigError(
                    f"the members of an ensemble must have one version of the operators of {domain}: expected "
                    f"{others[domain]}. Received: {version} in {str(file)!r}"
                )
    return [_converted(model, newest, file) for model, file in zip(models, files, strict=True)]


def _converted(model: Any, opset: int, file: Path) -> Any:
    """The model with a newer version of ONNX' operators."""
    from onnx import version_converter

    own = _opsets(model)[""]
    if own == opset:
        return model
    try:
        return version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError) as err:  # ONNX has no adapter for one of the operators.
        raise ConfigError(
            "the members of an ensemble must have one version of ONNX' operators, and one cannot be converted from "
            f"{own} to {opset}: {first_line(err)}. Received: {str(file)!r}"
        ) from err


def _opsets(model: Any) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
