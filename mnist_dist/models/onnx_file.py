"""The file `model.onnx` of a bundle: what it declares, whether it is what a bundle needs, and opening it.

Owns: the names of its input and outputs, the checks before a bundle is written, and a session of ONNX Runtime. Does not
own: how a foreign graph becomes such a file (`importing`), or scoring at scale (`engines`).

Contract: one input `image`, `uint8 [N, H, W, C]`, 0-255, with N any number or a fixed one; the outputs `probabilities`,
`float32 [N, K]`, and optionally `features`, `float32 [N, D]`, in this order. A model without classes has `features`
alone. All weights are inside the file, which bounds it to 2 GB.
"""

# N = images of a call, H = height px, W = width px, C = channels (1 grey, 3 RGB), K = classes, D = features

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mnist_dist.errors import BundleError
from mnist_dist.images.pixels import Pixels, padded
from mnist_dist.images.spec import ImageSpec

if TYPE_CHECKING:
    import onnx

IMAGE, PROBABILITIES, FEATURES = "image", "probabilities", "features"
MAX_BYTES = 2**31 - 1  # of a protobuf message
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_ERRORS_ONLY = 3


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output, as the file declares it."""

    name: str
    dtype: str
    """As in NumPy, such as `uint8`."""
    shape: tuple[int | None, ...]
    """None: any size."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The inputs and outputs of a file."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def batch_size(self) -> int | None:
        """N, if the model takes only batches of this size."""
        return self.inputs[0].shape[0]

    @property
    def num_features(self) -> int | None:
        """D; None: the file has no features, or does not say how many."""
        return next((output.shape[-1] for output in self.outputs if output.name == FEATURES), None)


def declared(file: Path) -> Declared:
    """Reads what the file declares; runs nothing.

    Raises:
        BundleError: it is not an ONNX file.
    """
    return _declared(_read(file).graph)


def check_onnx(file: Path, *, spec: ImageSpec, num_classes: int) -> None:
    """Checks that the file is as this module's contract says.

    Args:
        file: the model.
        spec: size and channels of its input.
        num_classes: K; 0: the model gives features only.

    Raises:
        BundleError: it is not.
    """
    if file.stat().st_size > MAX_BYTES:
        raise BundleError(
            f"an ONNX model in a bundle is one file of at most 2 GB. Received: {file.stat().st_size / 1e9:.2f} GB"
        )
    model = _read(file)
    outside = sorted({_name_of(tensor) for tensor in tensors_of(model) if is_outside(tensor)})
    if outside:
        raise BundleError(f"the weights must be inside the ONNX file. Received: {outside[:5]} in other files")
    found = _declared(model.graph)
    if not (_fits_inputs(found.inputs, spec) and _fits_outputs(found, num_classes)):
        expected = f"{FEATURES!r} float32 [N, D]"
        if num_classes:
            expected = f"{PROBABILITIES!r} float32 [N, {num_classes}], and after it optionally {expected}"
        raise BundleError(
            f"the ONNX model must have the input {IMAGE!r} uint8 {['N', *spec.shape]} and the output {expected}. "
            f"Received: {_shown(found.inputs)} and {_shown(found.outputs)}"
        )


def open_session(file: Path | bytes, *, cpus: int | None = None, cuda: bool = False) -> Any:
    """Opens the file in ONNX Runtime.

    Args:
        file: an ONNX file, or its content.
        cpus: cores that a call may use; None: all.
        cuda: run on a GPU what its provider can run; the rest runs on the CPU.

    Returns:
        An `onnxruntime.InferenceSession`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpus or 0
    options.log_severity_level = _ERRORS_ONLY  # It warns of harmless leftovers in foreign graphs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # Spinning would starve decoding.
    return onnxruntime.InferenceSession(file, options, providers=[CUDA, CPU] if cuda else [CPU])


def has_cuda(providers: Callable[[], Sequence[str]] | None = None) -> bool:
    """Whether ONNX Runtime has its CUDA provider: the package onnxruntime-gpu has, onnxruntime has not.

    Args:
        providers: gives the names of the providers; None: those of the installed package.
    """
    import onnxruntime

    return CUDA in (providers or onnxruntime.get_available_providers)()


def session_batch(session: Any) -> int | None:
    """N, if the session's model takes only batches of this size."""
    size = session.get_inputs()[0].shape[0]
    return size if isinstance(size, int) and size > 0 else None


def run_session(session: Any, pixels: Pixels, outputs: Iterable[str]) -> list[npt.NDArray[Any]]:
    """The named outputs for `uint8 [b, H, W, C]`; where the batch is fixed, b is at most N and the rest is padded."""
    (source,) = session.get_inputs()
    values = session.run(list(outputs), {source.name: padded(pixels, session_batch(session) or len(pixels))})
    return [value[: len(pixels)] for value in values]


def _read(file: Path) -> "onnx.ModelProto":
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(file, load_external_data=False)
    except DecodeError as err:
        raise BundleError(f"this is not an ONNX file: {err}. Received: {str(file)!r}") from err


def _declared(graph: "onnx.GraphProto") -> Declared:
    weights = {tensor.name for tensor in graph.initializer}  # Up to IR version 3 they are inputs, too.
    return Declared(
        inputs=tuple(_tensor(value) for value in graph.input if value.name not in weights),
        outputs=tuple(_tensor(value) for value in graph.output),
    )


def _tensor(value: "onnx.ValueInfoProto") -> Tensor:
    import onnx

    tensor = value.type.tensor_type
    is_known = tensor.elem_type in onnx.helper.get_all_tensor_dtypes() and tensor.elem_type != 0
    return Tensor(
        name=value.name,
        dtype=np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name if is_known else "unknown",
        shape=tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim),
    )


def _fits_inputs(inputs: tuple[Tensor, ...], spec: ImageSpec) -> bool:
    return [(found.name, found.dtype, found.shape[1:]) for found in inputs] == [(IMAGE, "uint8", spec.shape)]


def _fits_outputs(found: Declared, num_classes: int) -> bool:
    names = [output.name for output in found.outputs]
    allowed = ([PROBABILITIES], [PROBABILITIES, FEATURES]) if num_classes else ([FEATURES],)
    return (
        names in allowed
        and all(output.dtype == "float32" and len(output.shape) == 2 for output in found.outputs)
        and (not num_classes or found.outputs[0].shape[1] == num_classes)
    )


def _shown(tensors: Iterable[Tensor]) -> str:
    return ", ".join(
        f"{found.name!r} {found.dtype} {['N' if size is None else size for size in found.shape]}" for found in tensors
    )


# --- tensors, wherever they are in the file --------------------------------------------------------------------------


def tensors_of(model: "onnx.ModelProto") -> Iterator[Any]:
    """Every tensor that a model holds, wherever."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: "onnx.GraphProto") -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, attribute.sparse_tensor.values, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)


def is_outside(tensor: Any) -> bool:
    """Whether the values of a tensor lie in another file."""
    return bool(tensor.data_location == tensor.EXTERNAL) or bool(tensor.external_data)


def _name_of(tensor: Any) -> str:
    return str(tensor.name) or "a constant"
