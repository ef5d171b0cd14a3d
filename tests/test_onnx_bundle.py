"""Bundles whose model is an ONNX file: written, opened, refused, and predicting."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import NAMES, NUM_FEATURES, SPEC, small_bundle, small_model, some_pixels

from mnist_dist.errors import BundleError, ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo, load_bundle, write_model_bundle
from mnist_dist.models.onnx_file import FEATURES, PROBABILITIES

INFO = BundleInfo(class_names=NAMES, spec=SPEC, backbone="small")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("onnx") / "bundle")


def saved(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    return path


def test_an_onnx_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = saved(tmp_path / "made.onnx", small_model())
    info = write_model_bundle(tmp_path / "bundle", file, INFO, extra={"import.json": b"{}"})
    opened = load_bundle(tmp_path / "bundle")

    assert opened.info == info
    assert (info.model_file, info.class_names) == ("model.onnx", NAMES)
    assert {"python", "mnist_dist", "onnx"} <= set(info.versions)
    assert "keras" not in info.versions
    assert opened.model_path.read_bytes() == file.read_bytes()
    names = sorted(path.name for path in opened.path.iterdir())
    assert names == ["MLmodel", "bundle.json", "import.json", "model.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "made.onnx"]


def test_an_onnx_bundle_predicts_what_its_file_says(bundle: Bundle) -> None:
    pixels = some_pixels(70)
    predictions = bundle.predict(list(pixels))
    (expected,) = bundle.session.run([PROBABILITIES], {"image": pixels})

    np.testing.assert_allclose([found.probabilities for found in predictions], expected, atol=1e-6)
    assert [found.predicted_class for found in predictions] == [NAMES[index] for index in expected.argmax(axis=1)]
    assert len({found.predicted_index for found in predictions}) > 2
    assert bundle.predict(pixels[3]).confidence == pytest.approx(expected[3].max(), abs=1e-6)


def test_a_fixed_batch_is_filled_up(bundle: Bundle, tmp_path: Path) -> None:
    fixed = small_bundle(tmp_path / "bundle", batch_size=4)
    pixels = list(some_pixels(7))

    assert (fixed.fixed_batch, bundle.fixed_batch) == (4, None)
    expected = [found.probabilities for found in bundle.predict(pixels)]
    np.testing.assert_allclose([found.probabilities for found in fixed.predict(pixels)], expected, atol=1e-6)


def test_an_onnx_bundle_has_no_keras_model(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"is an ONNX file: use Bundle.session, or Bundle.predict. Received: .*onnx'"):
        bundle.model  # noqa: B018


def test_features_are_those_that_the_file_declares(bundle: Bundle, tmp_path: Path) -> None:
    assert bundle.num_features == NUM_FEATURES
    without = small_bundle(tmp_path / "without", outputs=(PROBABILITIES,))
    with pytest.raises(BundleError, match=r"no features output .* import it with --features-node NAME. Received: "):
        without.num_features  # noqa: B018


def test_a_backbone_without_classes_does_not_classify(tmp_path: Path) -> None:
    backbone = small_bundle(tmp_path / "bundle", names=())

    assert (backbone.info.class_names, backbone.num_features) == ((), NUM_FEATURES)
    with pytest.raises(ConfigError, match=r"gives features and no classes; train a head on it: mnist-dist train"):
        backbone.predict(some_pixels(1)[0])


def with_other_input(model: onnx.ModelProto, name: str = "image", kind: int = TensorProto.UINT8) -> onnx.ModelProto:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info(name, kind, ["N", *SPEC.shape]))
    return model


def with_weights_outside(model: onnx.ModelProto) -> onnx.ModelProto:
    tensor = next(found for found in model.graph.initializer if found.name == "dense")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return model


def with_a_constant_outside(model: onnx.ModelProto) -> onnx.ModelProto:
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    return model


def with_another_input(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: with_other_input(small_model(), name="x"), r"must have the input 'image' .* Received: 'x' uint8"),
        (lambda: with_other_input(small_model(), kind=TensorProto.FLOAT), r"Received: 'image' float32 \['N', 12, 14"),
        (lambda: with_another_input(small_model()), r"Received: .*'mask' float32 \[1\]"),
        (lambda: small_model(spec=ImageSpec(height_px=9, width_px=14, channels=3)), r"Received: .*\['N', 9, 14, 3\]"),
        (lambda: small_model(num_classes=4), r"output 'probabilities' float32 \[N, 5\].*'probabilities' .*'N', 4\]"),
        (lambda: small_model(outputs=(FEATURES, PROBABILITIES)), r"Received: .* and 'features' float32 .*, 'prob"),
        (lambda: small_model(outputs=(FEATURES,)), r"Received: .* and 'features' float32 \['N', 6\]$"),
        (lambda: with_weights_outside(small_model()), r"weights must be inside .* Received: \['dense'\] in other"),
        (lambda: with_a_constant_outside(small_model()), r"weights must be inside .* Received: \['hidden'\] in other"),
    ],
)
def test_a_file_that_is_no_model_of_a_bundle_is_refused(
    tmp_path: Path, change: Callable[[], onnx.ModelProto], message: str
) -> None:
    file = tmp_path / "made.onnx"
    file.write_bytes(change().SerializeToString())
    with pytest.raises(BundleError, match=message):
        write_model_bundle(tmp_path / "bundle", file, INFO)
    assert [path.name for path in tmp_path.iterdir()] == ["made.onnx"]


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made.onnx").write_bytes(b"no model at all")
    with pytest.raises(BundleError, match=r"this is not an ONNX file: .*Received: '.*made.onnx'"):
        write_model_bundle(tmp_path / "bundle", tmp_path / "made.onnx", INFO)
    doubled = BundleInfo(class_names=("ant", "ant"), spec=SPEC, backbone="small")
    with pytest.raises(BundleError, match=r"class names must be distinct. Received: \['ant', 'ant'\]"):
        write_model_bundle(tmp_path / "bundle", tmp_path / "made.onnx", doubled)


def test_a_damaged_onnx_bundle_is_not_opened(tmp_path: Path) -> None:
    opened = small_bundle(tmp_path / "bundle")
    with opened.model_path.open("ab") as file:
        file.write(b"!")
    with pytest.raises(BundleError, match=rf"model.onnx in .*: expected sha256 {opened.info.model_id}. Received: "):
        load_bundle(opened.path)


def test_the_model_file_of_a_bundle_lies_inside_it(tmp_path: Path) -> None:
    opened = small_bundle(tmp_path / "bundle")
    values = json.loads((opened.path / "bundle.json").read_text())
    (opened.path / "bundle.json").write_text(json.dumps(values | {"model_file": "../../model.onnx"}))
    with pytest.raises(BundleError, match=r"Invalid enum value .*model_file"):
        load_bundle(opened.path)


@pytest.mark.parametrize("name", ["mine.keras", "mine.h5", "mine.onnx", "saved/saved_model.pb", "face/config.json"])
def test_a_foreign_model_is_named_with_the_command_that_imports_it(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    source = file if file.parent == tmp_path else file.parent
    with pytest.raises(BundleError, match=rf"becomes one by: mnist-dist import {source} --output BUNDLE. Received: "):
        load_bundle(source)
