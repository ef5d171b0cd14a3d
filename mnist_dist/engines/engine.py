"""The interface of all engines, and a bundle's Keras model compiled for fast prediction.

Owns: the `Engine` interface, compiling a model once for one batch shape of uint8 pixels, and measuring its speed. Does
not own: reading the pixels, or using the outputs.
"""

# B = batch, H = height px, W = width px, C = channels (1 grey, 3 RGB), K = classes, D = features

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mnist_dist.errors import BundleError
from mnist_dist.images.pixels import Pixels, padded
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import NETWORK_LAYER, NO_FEATURES, Bundle, all_layers
from mnist_dist.models.onnx_file import PROBABILITIES

MAX_FROZEN_BYTES = 2**30  # largest size of weights that become constants: a graph above 2 GiB cannot be built
MEASURE_S = 2.0  # time per engine for measuring a speed that is compared or reported
ROUND_S = 0.5  # length of one round, where several engines are measured in turn
HEAD_LAYERS = ("hidden", "dropout", "logits")
"""The possible layers after the features, in order (`classifier`); the features are the input of the first one."""


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for a batch."""

    probabilities: npt.NDArray[np.float32]
    """`float32 [B, K]`, 0-1, in the order of the bundle's class names."""
    embeddings: npt.NDArray[np.float32] | None = None
    """`float32 [B, D]`, the features before the head; None where they were not requested."""


class Engine(Protocol):
    """A loaded model."""

    @property
    def batch_size(self) -> int:
        """Largest number of images per call."""

    @property
    def calls_at_once(self) -> int:
        """Number of threads that may, and should, call it at the same time."""

    @property
    def num_classes(self) -> int:
        """K."""

    @property
    def num_features(self) -> int:
        """D; 0 where embeddings were not requested."""

    def __call__(self, pixels: Pixels) -> Outputs:
        """The outputs for up to `batch_size` images, `uint8 [b, H, W, C]`, 0-255."""


class KerasEngine:
    """The Keras model compiled for one fixed batch shape: by `tf.function`, or by `jax.jit` if `KERAS_BACKEND` is jax.

    Smaller batches are padded with zeros, whose outputs are dropped. If a batch does not fit in memory, the batch size
    is halved, once.

    Args:
        bundle: an opened bundle.
        batch_size: images per call.
        embeddings: also return the features before the head.
        cpus: cores that a call may use; None: all.
    """

    calls_at_once = 1

    def __init__(self, bundle: Bundle, *, batch_size: int, embeddings: bool = False, cpus: int | None = None) -> None:
        use_cpus(cpus)
        self.batch_size, self._halved = batch_size, False
        self.num_classes = len(bundle.info.class_names)
        model = with_features(bundle.model) if embeddings else bundle.model
        self.num_features = int(model.outputs[1].shape[-1]) if embeddings else 0
        self._model = model
        self._function = self._compile()

    def __call__(self, pixels: Pixels) -> Outputs:
        """See `Engine`.

        Raises:
            Exception: the backend's own error, also where half a batch does not fit in memory.
        """
        try:
            return self._call(pixels)
        except Exception as error:
            if self._halved or self.batch_size == 1 or not is_out_of_memory(error):
                raise
        self._halved, self.batch_size = True, -(-self.batch_size // 2)
        self._function = self._compile()
        first, second = self(pixels[: self.batch_size]), pixels[self.batch_size :]
        return joined([first, self(second)]) if len(second) else first

    def _compile(self) -> Any:
        return compile_model(self._model, batch_size=self.batch_size)

    def _call(self, pixels: Pixels) -> Outputs:
        outputs = self._function(padded(pixels, self.batch_size))
        return Outputs(*(np.asarray(output)[: len(pixels)].astype(np.float32) for output in outputs))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, of TensorFlow, JAX or Python, means out of memory."""
    text = str(error)
    of_jax = "RESOURCE_EXHAUSTED" in text and "memory" in text.lower()  # gRPC has other such errors.
    of_backend = type(error).__name__ == "ResourceExhaustedError" or of_jax
    return of_backend or isinstance(error, MemoryError)


def _is_on_jax() -> bool:
    import keras

    return bool(keras.backend.backend() == "jax")


def use_cpus(cpus: int | None) -> None:
    """Limits TensorFlow or JAX, before its first use, to this many cores (None: all) and to the GPU memory that it
    needs."""
    if _is_on_jax():
        _use_cpus_on_jax(cpus)
        return
    import tensorflow as tf

    if cpus is not None:
        tf.config.threading.set_intra_op_parallelism_threads(max(1, cpus))
    for device in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)


def _use_cpus_on_jax(cpus: int | None) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if cpus is not None:
        os.environ["NPROC"] = str(max(1, cpus))  # the size of XLA's thread pool on CPUs


def use_float32() -> None:
    """Switches TF32 of NVIDIA's GPUs off, which rounds float32 to 10 bits of mantissa; call before the first use."""
    if _is_on_jax():
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
        return
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)


def hide_gpus() -> None:
    """Hides the machine's GPUs from TensorFlow or JAX; call before its first use."""
    if _is_on_jax():
        import jax

        jax.config.update("jax_platforms", "cpu")
        return
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")


def compile_model(model: Any, *, batch_size: int) -> Any:
    """Compiles the model for one batch shape; the function maps `uint8 [B, H, W, C]` to the list of outputs."""
    if _is_on_jax():
        return _compile_on_jax(model)
    import tensorflow as tf

    signature = [tf.TensorSpec([batch_size, *model.input_shape[1:]], tf.uint8)]
    # No XLA: on CPUs it was several times slower, and it compiles for minutes.
    function = tf.function(
        lambda pixels: tf.nest.flatten(model(tf.cast(pixels, model.inputs[0].dtype), training=False)),
        input_signature=signature,
        jit_compile=False,
        autograph=False,  # It would write files and has nothing to convert here.
    )
    fixed = _frozen(function.get_concrete_function(), model)
    return lambda pixels: fixed(tf.constant(pixels))


def _compile_on_jax(model: Any) -> Any:
    import jax

    variables = (model.trainable_variables, model.non_trainable_variables)
    weights = [[variable.value for variable in group] for group in variables]

    @jax.jit  # type: ignore[untyped-decorator]
    def call(trainable: Any, others: Any, pixels: Any) -> Any:
        outputs, _ = model.stateless_call(trainable, others, pixels.astype(model.inputs[0].dtype), training=False)
        return jax.tree.leaves(outputs)

    return lambda pixels: call(*weights, pixels)


def images_per_s(model: Any, *, batch_size: int, seconds: float) -> float:
    """Speed of a compiled model on one `uint8` batch in memory, after one warm-up call."""
    function = compile_model(model, batch_size=batch_size)
    pixels = np.zeros((batch_size, *model.input_shape[1:]), np.uint8)
    return batch_size * calls_per_s(lambda: np.asarray(function(pixels)[0]), seconds=seconds)


def calls_per_s(call: Callable[[], object], *, seconds: float, at_once: int = 1) -> float:
    """Calls per second from `at_once` threads together, after one warm-up call."""
    call()
    counts, began = [0] * at_once, perf_counter()

    def run(number: int) -> None:
        while counts[number] == 0 or perf_counter() - began < seconds:
            call()
            counts[number] += 1

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, range(at_once)))
    return sum(counts) / (perf_counter() - began)


def best_images_per_s(engines: Sequence[Engine], spec: ImageSpec) -> list[float]:
    """Speed of each engine on a full batch in memory, called from `calls_at_once` threads. Engines are measured in
    turn, and the best round of each counts, since other work on the machine slows an engine down for seconds."""
    batches = [np.zeros((engine.batch_size, *spec.shape), np.uint8) for engine in engines]
    best = [0.0] * len(engines)
    began = perf_counter()
    while not all(best) or perf_counter() - began < MEASURE_S * len(engines):
        for index, engine in enumerate(engines):
            call = functools.partial(engine, batches[index])
            rate = calls_per_s(call, seconds=ROUND_S, at_once=engine.calls_at_once)
            best[index] = max(best[index], engine.batch_size * rate)
    return best


def _frozen(function: Any, model: Any) -> Any:
    """Turns weights into constants where that is faster: TensorFlow then folds batch normalisation into convolutions
    (on 2 cores MobileNetV2 is 1.35 times as fast, with identical outputs; VGG16, which has none, 0.99 times)."""
    import keras

    folds = any(isinstance(layer, keras.layers.BatchNormalization) for layer in all_layers(model))
    weights_bytes = sum(math.prod(weight.shape) for weight in model.weights) * 4
    if not folds or weights_bytes > MAX_FROZEN_BYTES:
        return function
    # TensorFlow has no public name for this function; its own guides import it from here, too.
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    return convert_variables_to_constants_v2(function)


def has_features(model: Any) -> bool:
    """Whether it is known which of a Keras model's tensors are the features."""
    names = {layer.name for layer in model.layers}
    if NETWORK_LAYER in names:
        return len(model.get_layer(NETWORK_LAYER).outputs) > 1
    return not names.isdisjoint(HEAD_LAYERS)


def with_features(model: Any) -> Any:
    """The model with the features, the input of its head, as a second output; see `has_features`.

    Raises:
        BundleError: an imported model has none.
    """
    import keras

    names = [layer.name for layer in model.layers]
    if NETWORK_LAYER in names:
        return _imported_with_features(model)
    head = model.get_layer(next(name for name in HEAD_LAYERS if name in names))
    return keras.Model(model.inputs, [model.output, head.input])


def _imported_with_features(model: Any) -> Any:
    import keras

    (image,) = model.inputs
    outputs = model.get_layer(NETWORK_LAYER)(image, training=False)
    if not isinstance(outputs, list | tuple):
        raise BundleError(f"{NO_FEATURES}. Received: {model.name}, without features")
    tails = [layer for layer in model.layers if layer.name == PROBABILITIES]
    probabilities = tails[0](outputs[0]) if tails else outputs[0]
    return keras.Model(image, [probabilities, outputs[1]])


def with_named_output(model: Any) -> Any:
    """The model, whose output is called `probabilities` in exported files."""
    import keras

    return keras.Model(model.inputs, {PROBABILITIES: model.output})


def joined(parts: Sequence[Outputs]) -> Outputs:
    """The outputs for a batch from those for its parts, in order."""
    features = [outputs.embeddings for outputs in parts if outputs.embeddings is not None]
    probabilities = np.concatenate([outputs.probabilities for outputs in parts])
    return Outputs(probabilities, np.concatenate(features) if features else None)
