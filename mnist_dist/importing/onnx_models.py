"""ONNX files as a source: what a graph says about itself, and the graph itself as the reference.

Owns: the facts of a graph. Does not own: reading and building graphs (`onnx_graph`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist.engines.steps import Report
from mnist_dist.errors import ConfigError
from mnist_dist.images.decoder import decode_image
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.foreign import Asked, Facts, Foreign, Values
from mnist_dist.importing.onnx_graph import (
    INPUT_NUMPY,
    GraphInput,
    check_tensor,
    features_of,
    final_activation,
    graph_input,
    num_outputs,
    read_graph,
)


def open_onnx(job: ImportJob, scratch: Path, report: Report) -> Foreign:
    """An ONNX file, at the local path that the job names.

    Raises:
        ConfigError: it cannot be imported; see `read_graph` and `graph_input`.
    """
    file = Path(job.source)
    return Foreign(
        kind="onnx",
        name=file.stem,
        file=file,
        facts=graph_facts(file, job),
        reference=partial(run_original, file),
        reference_name="the file as it is in ONNX Runtime",
    )


def graph_facts(file: Path, job: ImportJob) -> Facts:
    """What an ONNX graph says about itself.

    Raises:
        ConfigError: see `read_graph`, `graph_input` and `check_tensor`; or it has several outputs and none is chosen.
    """
    model = read_graph(file)
    source = graph_input(model, file=file)
    output = None if job.backbone_only else _output(model, job, file)
    activation = None if output is None else final_activation(model, output)
    classes = None if output is None else num_outputs(model, output)
    features = _features(model, job, output)
    return Facts(
        height_px=source.height_px,
        width_px=source.width_px,
        is_size_fixed=source.height_px is not None and source.width_px is not None,
        channels=source.channels,
        scale=(1.0,) if source.is_uint8 else None,
        offset=(0.0,) if source.is_uint8 else None,
        normalizes_itself=source.is_uint8,
        activation=None if activation is None else "none",
        multi_label=None if activation is None else activation == "Sigmoid" and classes != 1,
        num_outputs=classes,
        output=output,
        features=features,
        why=_why(source, activation),
    )


def run_original(file: Path, images: Sequence[bytes], asked: Asked) -> Values:
    """The foreign graph in ONNX Runtime, on pixels that NumPy normalises: `float32 [N, K]` after the activation."""

    def prepare(data: bytes) -> npt.NDArray[Any]:
        return asked.normalized(decode_image(data, asked.spec).pixels).transpose(2, 0, 1)

    return run_graph(file, asked.output or "", images, asked, prepare=prepare)


def run_graph(
    file: Path,
    output: str,
    images: Sequence[bytes],
    asked: Asked,
    *,
    prepare: Callable[[bytes], npt.NDArray[Any]],
) -> Values:
    """A foreign graph in ONNX Runtime, one image at a time.

    Args:
        file: the ONNX file.
        output: the tensor that is asked for, an output of the graph or not.
        images: N encoded images.
        asked: the activation that follows.
        prepare: an encoded image to normalised values, `[C, H, W]`.

    Returns:
        `float32 [N, K]`, after the activation.
    """
    import onnxruntime

    model = read_graph(file)
    source = graph_input(model, file=file)
    is_output = output in {value.name for value in model.graph.output}
    opened = str(file) if is_output else _with_output(model, output)
    session = onnxruntime.InferenceSession(opened, providers=["CPUExecutionProvider"])
    rows = []
    for data in images:
        values = prepare(data)
        batch = values.transpose(1, 2, 0) if source.layout == "NHWC" else values
        batch = np.repeat(batch[None], source.batch or 1, axis=0).astype(INPUT_NUMPY[source.dtype])
        rows.append(np.asarray(session.run([output], {source.name: batch})[0], np.float64)[0].reshape(-1))
    return asked.activated(np.stack(rows))


def _output(model: Any, job: ImportJob, file: Path) -> str:
    if job.output_node is not None:
        check_tensor(model, job.output_node, flag="--output-node")
        return job.output_node
    names = [value.name for value in model.graph.output]
    if "logits" in names:  # what Hugging Face calls it, beside hidden states
        return "logits"
    if len(names) != 1:
        raise ConfigError(
            f"the model has several outputs; choose one with --output-node (or --backbone-only --features-node). "
            f"Received: {', '.join(names)} in {str(file)!r}"
        )
    return str(names[0])


def _features(model: Any, job: ImportJob, output: str | None) -> str | None:
    if job.features_node is not None:
        check_tensor(model, job.features_node, flag="--features-node")
        return job.features_node
    if output is not None:
        return features_of(model, output)
    names = [value.name for value in model.graph.output]
    if len(names) != 1:
        raise ConfigError(
            f"the model has several outputs; choose the features with --features-node. Received: {', '.join(names)}"
        )
    return str(names[0])


def _why(source: GraphInput, activation: str | None) -> tuple[str, ...]:
    sentences = []
    if source.is_uint8:
        sentences.append("the input is uint8: pixels are passed as they are")
    if activation is not None:
        sentences.append(f"the model ends with {activation}: its outputs are probabilities")
    if source.batch is not None and source.batch > 0:
        sentences.append(f"the model takes exactly {source.batch} image(s) per call, which may be slow")
    return tuple(sentences)


def _with_output(model: Any, name: str) -> bytes:
    """The model with an inner tensor as its only output."""
    import onnx

    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    data: bytes = model.SerializeToString()
    return data
