"""int8 of a network with a layer whose channels have very different ranges, quantized by NNCF: it gets its answers back
once this layer computes in float32."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
from harness import Recorder
from onnx import TensorProto, helper, numpy_helper
from test_onnx_engines import Steps, prepare
from test_onnx_engines import steps as steps  # a fixture

from mnist_dist.engines.annotation import float32_convolutions
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo, load_bundle, write_model_bundle
from mnist_dist.models.onnx_file import IMAGE, PROBABILITIES

# N = images of a call, H = height px, W = width px, C = channels, K = classes

SPEC = ImageSpec(height_px=6, width_px=7, channels=3)
NAMES = ("green", "blue")
IMAGES = 140  # enough to judge int8 by others than it was made from
WIDE = 1_000.0  # how much larger the first channel is than the others, after the first convolution


def lopsided_model(convolutions: int) -> onnx.ModelProto:
    """`uint8 [N, H, W, C]` -> which of two channels is brighter. The first convolution, by channel, makes the first
    channel so large that the steps of int8 swallow the others; the second one takes it back, the rest does nothing."""
    mix = np.eye(3, dtype=np.float32)
    scale = np.asarray([WIDE, 1, 1], np.float32)
    kernels = [scale, mix / scale, *[mix] * (convolutions - 2)]
    weights = {f"kernel{number}": kernel.reshape(3, -1, 1, 1) for number, kernel in enumerate(kernels)}
    weights |= {"scale": np.asarray(1 / 255), "dense": np.asarray([[0, 0], [40, -40], [-40, 40]])}
    nodes = [
        helper.make_node("Cast", [IMAGE], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["maps0"], perm=[0, 3, 1, 2]),
    ]
    for number in range(convolutions):
        names = [f"maps{number}", f"kernel{number}"]
        nodes.append(helper.make_node("Conv", names, [f"convolved{number}"], group=1 if number else 3))
        nodes.append(helper.make_node("Relu", [f"convolved{number}"], [f"maps{number + 1}"]))
    nodes += [
        helper.make_node("GlobalAveragePool", [f"maps{convolutions}"], ["means"]),
        helper.make_node("Flatten", ["means"], ["features"], axis=1),
        helper.make_node("MatMul", ["features", "dense"], ["logits"]),
        helper.make_node("Softmax", ["logits"], [PROBABILITIES]),
    ]
    graph = helper.make_graph(
        nodes,
        "lopsided",
        [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, ["N", *SPEC.shape])],
        [helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, ["N", len(NAMES)])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def lopsided_bundle(path: Path, convolutions: int) -> Bundle:
    file = path.with_suffix(".onnx")
    onnx.save(lopsided_model(convolutions), file)
    labels = np.arange(IMAGES) // 2 % len(NAMES)
    pixels = np.random.default_rng(5).integers(150, 256, (IMAGES, *SPEC.shape), dtype=np.uint8)
    pixels[labels == 0, ..., 2] //= 2  # the darker channel; the ranges of all images are alike
    pixels[labels == 1, ..., 1] //= 2
    columns: dict[str, Any] = {
        "label": labels,
        "pixels": pa.array([image.tobytes() for image in pixels], pa.binary()),
    }
    info = BundleInfo(class_names=NAMES, spec=SPEC, backbone="lopsided")
    write_model_bundle(path, file, info, calibration=pa.table(columns))
    return load_bundle(path)


# Of 4 convolutions a sixth is only the first, whose output is then quantized all the same; of 12 it is the two.
@pytest.mark.parametrize(("convolutions", "tried"), [(12, [0, 2]), (4, [0, 1, 2])])
def test_a_layer_of_uneven_ranges_is_left_in_float32(
    tmp_path: Path, steps: Steps, convolutions: int, tried: list[int]
) -> None:
    if importlib.util.find_spec("nncf") is None:
        pytest.skip("needs nncf (pip install -e '.[export]'); runs where it is installed")
    bundle, console = lopsided_bundle(tmp_path / "bundle", convolutions), Recorder()
    found = prepare(bundle, tmp_path / "engines", precision="int8", console=console)

    assert found.check is not None
    assert (found.check.float32_convolutions, found.check.agreement, found.check.accuracy_loss) == (2, 1.0, 0.0)
    lines = [line for line in console.lines if line.startswith("  openvino int8")]
    assert [f"with {count} conv" in line or not count for line, count in zip(lines, tried, strict=True)]
    shown = [float(line.partition("same top class for ")[2].partition("%")[0]) for line in lines]
    assert max(shown[:-1]) < 90
    assert shown[-1] == 100
    assert float32_convolutions(Path(str(found.uri))) == 2


def test_what_int8_keeps_in_float32_is_known_without_its_check(tmp_path: Path, steps: Steps) -> None:
    if importlib.util.find_spec("nncf") is None:
        pytest.skip("needs nncf (pip install -e '.[export]'); runs where it is installed")
    bundle = lopsided_bundle(tmp_path / "bundle", 12)
    before = prepare(bundle, tmp_path / "engines", precision="int8")
    (check,) = (tmp_path / "engines").glob("*/openvino-int8.json")
    check.unlink()
    again = prepare(bundle, tmp_path / "engines", precision="int8")
    assert before.name == again.name == "openvino int8 with 2 convolutions in float32"
