"""Whether a training step computes in bfloat16: only if it is fast and was measured to agree with float32."""

from typing import Literal

from mnist_dist import processor
from mnist_dist.config import Precision

MEASURED_TO_AGREE = ("vgg16",)
"""Frozen VGG16 at 224 on MNIST: the same top class as float32 for 99.7 % of images, no lower accuracy, twice as fast on
a CPU with AVX512-BF16. MobileNetV2 agreed for only 96.2 %, and was slower."""


def resolve_precision(precision: Precision, *, backbone: str, gpu: bool) -> Literal["float32", "bfloat16"]:
    """Resolves `auto` for this machine's GPU or CPU and this backbone. Returns any other precision unchanged."""
    if precision != "auto":
        return precision
    is_fast = backbone in MEASURED_TO_AGREE and (_gpu_has_bfloat16() if gpu else processor.has_bfloat16())
    return "bfloat16" if is_fast else "float32"


def _gpu_has_bfloat16() -> bool:
    """Whether the GPU's CUDA compute capability is at least 8.0."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return float(getattr(jax.local_devices()[0], "compute_capability", 0)) >= 8
    import tensorflow as tf

    device = tf.config.list_physical_devices("GPU")[0]
    return bool(tf.config.experimental.get_device_details(device).get("compute_capability", (0, 0)) >= (8, 0))
