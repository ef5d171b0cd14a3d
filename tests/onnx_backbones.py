"""Imported bundles whose features are worth training a head on, built without any framework."""

# N = images of a call, D = features

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo, Imported, load_bundle, write_model_bundle
from mnist_dist.models.onnx_file import FEATURES, IMAGE, PROBABILITIES

SPEC = ImageSpec(
    height_px=11, width_px=9, channels=1, resize="shortest-edge", resize_px=12, resampling="pillow", quality="exact"
)
WIDTH = 48
IMPORTED = Imported(source="theirs.onnx", kind="onnx", scale=(1 / 255,), offset=(0.0,), bgr=False, activation="none")


def random_features(
    path: Path, *, seed: int = 3, classes: int = 0, spec: ImageSpec = SPEC, batch_size: int | None = None
) -> Bundle:
    """A bundle whose features are a random projection of the pixels, through ReLU; with classes behind, if asked for.

    An inner graph takes a weight from outside, and an unused output lies beside the features.
    """
    random, size = np.random.default_rng(seed), batch_size or "N"
    pixels = spec.height_px * spec.width_px * spec.channels
    weights = {
        "scale": np.float32(1 / 255),
        "projection": random.normal(0, 0.3, (pixels, WIDTH)),
        "shift": random.normal(0, 0.1, WIDTH),
        "head_kernel_1": random.normal(0, 1, (WIDTH, max(classes, 1))),  # a name that a head would take
    }
    branch = helper.make_graph(
        [helper.make_node("Add", ["projected", "shift"], ["shifted"])],
        "branch",
        [],
        [helper.make_tensor_value_info("shifted", TensorProto.FLOAT, [size, WIDTH])],
    )
    nodes = [
        helper.make_node("Cast", [IMAGE], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "projection"], ["projected"]),
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch),
        helper.make_node("Relu", ["chosen"], [FEATURES]),
    ]
    outputs = [helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, [size, WIDTH])]
    if classes:
        nodes += [
            helper.make_node("MatMul", [FEATURES, "head_kernel_1"], ["head_dense_1"]),
            helper.make_node("Softmax", ["head_dense_1"], [PROBABILITIES]),
        ]
        outputs.insert(0, helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, [size, classes]))
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [size, *spec.shape])],
        outputs,
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    file = path.with_name(f"{path.name}.onnx")
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), file)
    names = tuple(f"thing {number}" for number in range(classes))
    info = BundleInfo(class_names=names, spec=spec, backbone="theirs", imported=IMPORTED)
    write_model_bundle(path, file, info)
    return load_bundle(path)
