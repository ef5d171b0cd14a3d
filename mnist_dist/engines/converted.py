"""Engines for files that were converted from a bundle's model: OpenVINO and ONNX Runtime, on the CPU.

Neither loads Keras or TensorFlow, so a process that has one of these starts in a second. Smaller batches are padded
with zeros, whose outputs are dropped.
"""

# B = batch, H = height px, W = width px, C = channels, K = classes, D = features

import functools
import queue
from pathlib import Path
from typing import Any

import numpy as np

from mnist_dist.config import EnginePrecision
from mnist_dist.data.images import ImageSpec, Pixels
from mnist_dist.engines.engine import Outputs, padded

OPENVINO_FILE = "model.xml"  # and model.bin beside it
ONNX_FILE = "model.onnx"
MOST_STREAMS = 4  # each holds a batch and its activations
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # of what an int8 file leaves in floating point


@functools.cache
def openvino_core() -> Any:
    """The one `openvino.Core` of the process. Each gives the thread that makes it another stack for signal handlers and
    puts back the one before when it ends: two that end in the wrong order leave a stack that is gone, and the next
    signal ends the process (OpenVINO 2026.4)."""
    import openvino

    return openvino.Core()


def streams_of(cpus: int) -> int:
    """How many calls run at once: each on as many whole cores, as few of them idle as possible, then as many calls."""
    return max(range(1, min(cpus, MOST_STREAMS) + 1), key=lambda streams: (cpus // streams * streams, streams))


class OpenVinoEngine:
    """A model that OpenVINO runs.

    Args:
        folder: of the file.
        spec: of the images.
        batch_size: images per call.
        precision: of the arithmetic; int8 is one of the file, too.
        embeddings: also give the features before the head.
        cpus: cores that a call may use.
    """

    def __init__(
        self,
        folder: Path,
        *,
        spec: ImageSpec,
        batch_size: int,
        precision: EnginePrecision = "float32",
        embeddings: bool = False,
        cpus: int = 1,
    ) -> None:
        core, streams = openvino_core(), streams_of(cpus)
        model = core.read_model(folder / OPENVINO_FILE)
        model.reshape({0: [batch_size, *spec.shape]})
        settings = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],  # some CPUs run bfloat16 unless they are told otherwise
            "INFERENCE_NUM_THREADS": cpus,
            "NUM_STREAMS": streams,  # calls at the same time, each on its share of these threads
            "ENABLE_CPU_PINNING": False,  # the threads that decode use the same cores
        }
        compiled = core.compile_model(model, "CPU", settings)
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(compiled.create_infer_request())
        self.batch_size, self.calls_at_once = batch_size, streams
        self.num_classes = int(compiled.output(0).shape[1])
        self.num_features = int(compiled.output(1).shape[1]) if embeddings else 0

    def __call__(self, pixels: Pixels) -> Outputs:
        """See `Engine`."""
        request = self._requests.get()
        try:
            request.infer([padded(pixels, self.batch_size)], share_inputs=True)
            found = [request.get_output_tensor(place).data for place in range(1 + bool(self.num_features))]
            # copies: the tensors are used again
            return Outputs(*(np.array(values[: len(pixels)], np.float32) for values in found))
        finally:
            self._requests.put(request)


class OnnxEngine:
    """A model that ONNX Runtime runs, in float32. Arguments as of `OpenVinoEngine`."""

    calls_at_once = 1

    def __init__(
        self, folder: Path, *, spec: ImageSpec, batch_size: int, embeddings: bool = False, cpus: int = 1
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpus
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would starve decoding
        self._session = onnxruntime.InferenceSession(folder / ONNX_FILE, options, providers=["CPUExecutionProvider"])
        outputs = self._session.get_outputs()
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in outputs[: 1 + embeddings]]
        self.batch_size = batch_size
        self.num_classes = int(outputs[0].shape[1])
        self.num_features = int(outputs[1].shape[1]) if embeddings else 0

    def __call__(self, pixels: Pixels) -> Outputs:
        """See `Engine`."""
        found = self._session.run(self._outputs, {self._input: padded(pixels, self.batch_size)})
        return Outputs(*(values[: len(pixels)] for values in found))
