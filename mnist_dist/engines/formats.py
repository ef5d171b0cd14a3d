"""The formats that a bundle's model is converted to, and the runtime of each as an `Engine`.

Owns: the files and packages of each format, and how its runtime is opened. Does not own: the conversion and the
comparison (`conversion`).

All run on the CPU; ONNX Runtime also on NVIDIA's GPUs, with its CUDA provider. That was not tested on a real GPU yet.

No runtime loads Keras, and only that of `saved_model` loads TensorFlow: with the others, a process starts in a second.
"""

# B = batch, H = height px, W = width px, C = channels, K = classes, D = features

import contextlib
import functools
import importlib.util
import queue
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist.config import EnginePrecision
from mnist_dist.engines.engine import Outputs
from mnist_dist.errors import ConfigError
from mnist_dist.images.pixels import Pixels, padded
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.onnx_file import open_session, run_session, session_batch
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import is_remote

MAX_STREAMS = 4  # bounds memory: each stream holds a batch and its activations
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # int8: for the layers that stay in floating point


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Options for opening a file."""

    shape: tuple[int, ...]
    """`(B, H, W, C)` of a full batch."""
    outputs: int
    """1: probabilities; 2: also features."""
    precision: EnginePrecision
    cpus: int
    cuda: bool = False
    """Run on a GPU; ONNX Runtime only."""


@dataclass(frozen=True)
class Runtime:
    """An opened file.

    Args:
        call: `uint8 [b, H, W, C]` with b up to B -> `float32 [b, K]` and, as a second output, `float32 [b, D]`.
        input_name: the input's name in the file.
        output_name: the name of the probabilities in the file.
        calls_at_once: see `Engine`.
        fixed_batch: images per call, where the file takes only this many; smaller batches are padded to it.
    """

    call: Callable[[Pixels], Sequence[npt.NDArray[Any]]]
    input_name: str
    output_name: str
    calls_at_once: int = 1
    fixed_batch: int | None = None


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Args:
        file: the file or folder that the runtime opens; it is uploaded last.
        others: further files beside it.
        packages: Python packages that convert to the format and run it.
        open: opens the file in its runtime.
        keras_name: the format's name in Keras' `model.export`.
    """

    file: str
    others: tuple[str, ...]
    packages: tuple[str, ...]
    open: Callable[[Path, Opening], Runtime]
    keras_name: str


class ConvertedEngine:
    """A model in a file of one of the formats, as an `Engine`.

    Args:
        folder: the folder of the file.
        format: a key of `FORMATS`.
        spec: size and channels of the images.
        batch_size: images per call, unless the file has a fixed batch.
        precision: of the arithmetic; int8 also needs a quantized file.
        embeddings: also return the features before the head, which are the file's second output.
        cpus: cores that the engine may use.
        cuda: run on a GPU; ONNX Runtime only.
    """

    def __init__(
        self,
        folder: Path,
        *,
        format: str,
        spec: ImageSpec,
        batch_size: int,
        precision: EnginePrecision = "float32",
        embeddings: bool = False,
        cpus: int = 1,
        cuda: bool = False,
    ) -> None:
        row, shape = FORMATS[format], (batch_size, *spec.shape)
        opening = Opening(shape=shape, outputs=1 + embeddings, precision=precision, cpus=cpus, cuda=cuda)
        self.runtime = row.open(folder / row.file, opening)
        self.batch_size, self.calls_at_once = self.runtime.fixed_batch or batch_size, self.runtime.calls_at_once
        first = self(np.zeros((self.batch_size, *spec.shape), np.uint8))
        self.num_classes = first.probabilities.shape[1]
        self.num_features = 0 if first.embeddings is None else first.embeddings.shape[1]

    def __call__(self, pixels: Pixels) -> Outputs:
        """See `Engine`."""
        return Outputs(*(np.asarray(values, np.float32) for values in self.runtime.call(pixels)))


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """The folder, or a temporary copy of a remote one."""
    if not is_remote(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="mnist_dist-engine-") as scratch:
        ANYWHERE.download_folder(uri, Path(scratch))
        yield Path(scratch)


def check_installed(wanted: str, packages: Sequence[str]) -> None:
    """Raises ConfigError if a package that `wanted` (a flag or an engine) needs is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{wanted} needs {' and '.join(missing)}: pip install 'mnist_dist[export]'")


@functools.cache
def openvino_core() -> Any:
    """The only `openvino.Core` of the process. Each Core replaces its thread's signal stack and restores the previous
    one when it ends. If two end in the wrong order, the thread keeps a stack that was freed, and the next signal kills
    the process (OpenVINO 2026.4)."""
    import openvino

    return openvino.Core()


def streams_of(cpus: int) -> int:
    """Number of calls to run at once, each on the same number of cores: as few idle cores, then as many calls."""
    return max(range(1, min(cpus, MAX_STREAMS) + 1), key=lambda streams: (cpus // streams * streams, streams))


def _open_openvino(file: Path, opening: Opening) -> Runtime:
    core, streams = openvino_core(), streams_of(opening.cpus)
    model = core.read_model(file)
    batch, (_, *image) = model.input(0).get_partial_shape()[0], opening.shape
    fixed_batch = batch.get_length() if batch.is_static else None
    size = fixed_batch or opening.shape[0]
    model.reshape({0: [size, *image]})  # Always a fixed batch size, which is faster: smaller batches are padded.
    settings = {
        "INFERENCE_PRECISION_HINT": _HINTS[opening.precision],  # The default is bfloat16 on some CPUs.
        "INFERENCE_NUM_THREADS": opening.cpus,
        "NUM_STREAMS": streams,  # parallel calls, which share these threads
        "ENABLE_CPU_PINNING": False,  # The decoding threads use the same cores.
    }
    compiled = core.compile_model(model, "CPU", settings)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(streams):
        requests.put(compiled.create_infer_request())

    def call(pixels: Pixels) -> list[npt.NDArray[Any]]:
        request = requests.get()
        try:
            request.infer([padded(pixels, size)], share_inputs=True)
            tensors = [request.get_output_tensor(index).data for index in range(opening.outputs)]
            return [np.array(values[: len(pixels)]) for values in tensors]  # Copied: the next call reuses the tensors.
        finally:
            requests.put(request)

    return Runtime(call, compiled.input(0).any_name, compiled.output(0).any_name, streams, fixed_batch)


def _open_onnx(file: Path, opening: Opening) -> Runtime:
    session = open_session(file, cpus=opening.cpus, cuda=opening.cuda)
    (source,), targets = session.get_inputs(), [output.name for output in session.get_outputs()[: opening.outputs]]
    return Runtime(
        lambda pixels: run_session(session, pixels, targets),
        source.name,
        targets[0],
        fixed_batch=session_batch(session),
    )


def _open_saved_model(folder: Path, opening: Opening) -> Runtime:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    function = tf.saved_model.load(str(folder)).signatures["serving_default"]
    (source,), targets = function.structured_input_signature[1], list(function.structured_outputs)[: opening.outputs]

    def call(pixels: Pixels) -> list[npt.NDArray[Any]]:
        outputs = function(**{source: tf.constant(pixels)})
        return [outputs[target].numpy() for target in targets]

    return Runtime(call, source, targets[0])


def _open_litert(file: Path, opening: Opening) -> Runtime:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file), num_threads=opening.cpus)
    interpreter.allocate_tensors()
    ((_, names),) = interpreter.get_signature_list().items()
    input_index = interpreter.get_input_details()[0]["index"]
    output_indices = [details["index"] for details in interpreter.get_output_details()[: opening.outputs]]

    def call(pixels: Pixels) -> list[npt.NDArray[Any]]:
        if tuple(interpreter.get_input_details()[0]["shape"]) != pixels.shape:  # Memory is laid out for one batch size.
            interpreter.resize_tensor_input(input_index, pixels.shape, strict=True)
            interpreter.allocate_tensors()
        interpreter.set_tensor(input_index, pixels)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in output_indices]

    return Runtime(call, names["inputs"][0], names["outputs"][0])


FORMATS: Mapping[str, Format] = {
    "saved_model": Format("saved_model", (), ("tensorflow",), _open_saved_model, "tf_saved_model"),
    "onnx": Format("model.onnx", (), ("onnx", "tf2onnx", "onnxruntime"), _open_onnx, "onnx"),
    "openvino": Format("model.xml", ("model.bin",), ("openvino",), _open_openvino, "openvino"),
    "litert": Format("model.tflite", (), ("ai_edge_litert",), _open_litert, "litert"),
}
