"""Small ONNX models as bundles have them, built without any framework, for tests of everything that runs them."""

# N = images of a call, H = height px, W = width px, C = channels, K = classes, D = features

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo, load_bundle, write_model_bundle
from mnist_dist.models.onnx_file import FEATURES, IMAGE, PROBABILITIES

SPEC = ImageSpec(height_px=12, width_px=14, channels=3)
NAMES = ("ant", "bee", "cat", "dog", "eel")
NUM_FEATURES = 6


def small_model(
    *,
    spec: ImageSpec = SPEC,
    num_classes: int = len(NAMES),
    outputs: Sequence[str] = (PROBABILITIES, FEATURES),
    batch_size: int | None = None,
    activation: str = "Softmax",
    seed: int = 7,
) -> onnx.ModelProto:
    """`uint8 [N, H, W, C]` -> a convolution, the mean of its maps as features, a dense layer and an activation.

    Args:
        spec: size and channels of the input.
        num_classes: K.
        outputs: of `probabilities` and `features`, in this order.
        batch_size: N; None: any.
        activation: an operator, such as `Sigmoid`.
        seed: of the weights, whose classes are spread over random images.
    """
    size = "N" if batch_size is None else batch_size
    shapes = {PROBABILITIES: [size, num_classes], FEATURES: [size, NUM_FEATURES]}
    weights = _weights(spec, num_classes, seed)
    graph = helper.make_graph(
        [*_body(), *_head(activation)] if PROBABILITIES in outputs else _body(),
        "small",
        [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [size, *spec.shape])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _body() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", [IMAGE], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["means"]),
        helper.make_node("Flatten", ["means"], [FEATURES], axis=1),
    ]


def _head(activation: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Gemm", [FEATURES, "dense", "bias"], ["logits"]),
        helper.make_node(activation, ["logits"], [PROBABILITIES]),
    ]


def _weights(spec: ImageSpec, num_classes: int, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Random weights, the last ones such that the logits of different images differ by about 2."""
    random = np.random.default_rng(seed)
    kernel = random.normal(0, 1, (NUM_FEATURES, spec.channels, 3, 3))
    planes = np.pad(some_pixels(30, spec=spec) / 255, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(planes, (3, 3), axis=(1, 2))
    features = np.maximum(np.einsum("nhwcij,dcij->nhwd", windows, kernel), 0).mean((1, 2))
    dense = random.normal(0, 1, (NUM_FEATURES, num_classes))
    dense *= 2 / (features @ dense).std(axis=0)
    return {"scale": np.array(1 / 255), "kernel": kernel, "dense": dense, "bias": -(features @ dense).mean(axis=0)}


def small_bundle(path: Path, *, images: int = 40, names: Sequence[str] = NAMES, **model: Any) -> Bundle:
    """A bundle of a small model, or of a backbone without classes where there are no names.

    Args:
        path: the folder to create.
        images: number of calibration images, which have no labels; 0: none.
        names: the class names.
        model: of `small_model`.
    """
    spec: ImageSpec = model.setdefault("spec", SPEC)
    if not names:
        model |= {"outputs": (FEATURES,)}
    file = path.with_name(f"{path.name}.onnx")
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(small_model(num_classes=len(names) or 1, **model), file)
    info = BundleInfo(class_names=tuple(names), spec=spec, backbone="small", multi_label="activation" in model)
    pixels = [image.tobytes() for image in some_pixels(images, spec=spec)]
    calibration = pa.table({"pixels": pa.array(pixels, pa.binary())}) if images else None
    write_model_bundle(path, file, info, calibration=calibration)
    file.unlink()
    return load_bundle(path)


def some_pixels(images: int, *, spec: ImageSpec = SPEC) -> Pixels:
    """Noise of another brightness and colour in each image, `uint8 [images, H, W, C]`."""
    random = np.random.default_rng(images)
    bright = random.integers(20, 256, (images, 1, 1, spec.channels))
    pixels: Pixels = (random.random((images, *spec.shape)) * bright).astype(np.uint8)
    return pixels
