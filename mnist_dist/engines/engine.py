"""A bundle's model as something that only predicts, fast.

Owns: how the model is called: compiled once for one batch shape, on uint8 pixels. Does not own: the pixels, or what
becomes of the outputs.
"""

# B = batch, H = height px, W = width px, C = channels (1 grey, 3 RGB), K = classes, D = features

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mnist_dist.data.images import ImageSpec, Pixels
from mnist_dist.models.bundle import Bundle, all_layers

MAX_FROZEN_BYTES = 2**30  # of weights; graphs above 2 GiB cannot be built
SECONDS_MEASURED = 2.0  # where a speed decides, or is told
ROUND_S = 0.5  # of these at a time, where several are compared
HEAD_LAYERS = ("hidden", "dropout", "logits")
"""The layers behind the features, in their order (`classifier`); the first one that is there takes them."""


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch."""

    probabilities: npt.NDArray[np.float32]
    """`float32 [B, K]`, 0-1, in the order of the bundle's class names."""
    embeddings: npt.NDArray[np.float32] | None = None
    """`float32 [B, D]`, the features before the head; None where they were not asked for."""


class Engine(Protocol):
    """A loaded model."""

    @property
    def batch_size(self) -> int:
        """Images that are taken at once."""

    @property
    def calls_at_once(self) -> int:
        """Threads that may call it at the same time, and should."""

    @property
    def num_classes(self) -> int:
        """K."""

    @property
    def num_features(self) -> int:
        """D; 0 where embeddings were not asked for."""

    def __call__(self, pixels: Pixels) -> Outputs:
        """Outputs of up to `batch_size` images, `uint8 [b, H, W, C]`, 0-255."""


class KerasEngine:
    """The model as Keras loads it, compiled for one fixed batch shape: a `tf.function`, or by `jax.jit` where
    `KERAS_BACKEND` is jax.

    Smaller batches are padded with zeros, whose outputs are dropped. Where the memory does not hold a batch, the batch
    size is halved, once.

    Args:
        bundle: opened.
        batch_size: images per call.
        embeddings: also give the features before the head.
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
            Exception: the backend's own, where half a batch is too much, too.
        """
        try:
            return self._call(pixels)
        except Exception as error:
            if self._halved or self.batch_size == 1 or not _is_out_of_memory(error):
                raise
        self._halved, self.batch_size = True, -(-self.batch_size // 2)
        self._function = self._compile()
        first, second = self(pixels[: self.batch_size]), pixels[self.batch_size :]
        return _joined(first, self(second)) if len(second) else first

    def _compile(self) -> Any:
        return compile_model(self._model, batch_size=self.batch_size)

    def _call(self, pixels: Pixels) -> Outputs:
        outputs = self._function(padded(pixels, self.batch_size))
        return Outputs(*(np.asarray(output)[: len(pixels)].astype(np.float32) for output in outputs))


def padded(pixels: Pixels, batch_size: int) -> Pixels:
    """`uint8 [b, H, W, C]` as `[B, H, W, C]`, with zeros behind."""
    missing = batch_size - len(pixels)
    return np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.uint8)]) if missing > 0 else pixels


def _is_out_of_memory(error: Exception) -> bool:
    """Whether TensorFlow or JAX says so."""
    return type(error).__name__ == "ResourceExhaustedError" or "RESOURCE_EXHAUSTED" in str(error)


def _is_on_jax() -> bool:
    import keras

    return bool(keras.backend.backend() == "jax")


def use_cpus(cpus: int | None) -> None:
    """Has TensorFlow, just loaded, use so many cores (None: all) and no more GPU memory than it needs; JAX decides for
    itself (`XLA_FLAGS`, `XLA_PYTHON_CLIENT_PREALLOCATE`)."""
    if _is_on_jax():
        return
    import tensorflow as tf

    if cpus is not None:
        tf.config.threading.set_intra_op_parallelism_threads(max(1, cpus))
    for device in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)


def hide_gpus() -> None:
    """Has TensorFlow, just loaded, use none of the machine's GPUs."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")


def compile_model(model: Any, *, batch_size: int) -> Any:
    """The model for one batch shape as a function of `uint8 [b, H, W, C]` that gives the list of its outputs."""
    if _is_on_jax():
        return _compile_on_jax(model)
    import tensorflow as tf

    signature = [tf.TensorSpec([batch_size, *model.input_shape[1:]], tf.uint8)]
    # XLA was several times slower on CPUs, and compiles for minutes
    function = tf.function(
        lambda pixels: tf.nest.flatten(model(tf.cast(pixels, model.inputs[0].dtype), training=False)),
        input_signature=signature,
        jit_compile=False,
        autograph=False,  # which writes files, and finds nothing to convert
    )
    fixed = _frozen(function.get_concrete_function(), model)
    return lambda pixels: fixed(tf.constant(pixels))


def _compile_on_jax(model: Any) -> Any:
    import jax

    weights = [[weight.value for weight in some] for some in (model.trainable_variables, model.non_trainable_variables)]

    @jax.jit
    def call(trainable: Any, others: Any, pixels: Any) -> Any:
        outputs, _ = model.stateless_call(trainable, others, pixels.astype(model.inputs[0].dtype), training=False)
        return jax.tree.leaves(outputs)

    return lambda pixels: call(*weights, pixels)


def images_per_s(model: Any, *, batch_size: int, seconds: float) -> float:
    """Speed of a compiled model on one ready batch of `uint8` images, after a first call that does not count."""
    function = compile_model(model, batch_size=batch_size)
    pixels = np.zeros((batch_size, *model.input_shape[1:]), np.uint8)
    return batch_size * calls_per_s(lambda: np.asarray(function(pixels)[0]), seconds=seconds)


def calls_per_s(call: Callable[[], object], *, seconds: float, at_once: int = 1) -> float:
    """How many calls a second go through, by so many threads, after a first one that does not count."""
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
    """Speed of each engine on a ready full batch, called as often at once as it takes calls. The best of rounds by
    turns counts: other work on the machine only slows an engine down, for seconds."""
    batches = [np.zeros((engine.batch_size, *spec.shape), np.uint8) for engine in engines]
    best = [0.0] * len(engines)
    began = perf_counter()
    while not all(best) or perf_counter() - began < SECONDS_MEASURED * len(engines):
        for place, engine in enumerate(engines):
            call = functools.partial(engine, batches[place])
            rate = calls_per_s(call, seconds=ROUND_S, at_once=engine.calls_at_once)
            best[place] = max(best[place], engine.batch_size * rate)
    return best


def _frozen(function: Any, model: Any) -> Any:
    """The function with the weights as constants where that is faster: TensorFlow then folds batch normalisation into
    the convolutions (MobileNetV2 on 2 cores: 1.35 times as fast, bit for bit the same; VGG16, which has none: 0.99)."""
    import keras

    folds = any(isinstance(layer, keras.layers.BatchNormalization) for layer in all_layers(model))
    weights_bytes = sum(math.prod(weight.shape) for weight in model.weights) * 4
    if not folds or weights_bytes > MAX_FROZEN_BYTES:
        return function
    # the only spelling there is, also in TensorFlow's own guides
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    return convert_variables_to_constants_v2(function)


def with_features(model: Any) -> Any:
    """The model with the features before its head as a second output."""
    import keras

    names = [layer.name for layer in model.layers]
    head = model.get_layer(next(name for name in HEAD_LAYERS if name in names))
    return keras.Model(model.inputs, [model.output, head.input])


def _joined(first: Outputs, second: Outputs) -> Outputs:
    features = [outputs.embeddings for outputs in (first, second) if outputs.embeddings is not None]
    probabilities = np.concatenate([first.probabilities, second.probabilities])
    return Outputs(probabilities, np.concatenate(features) if features else None)
