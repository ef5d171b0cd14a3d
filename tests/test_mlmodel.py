"""mlmodel: a bundle is an MLflow model, which MLflow loads without this package."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from onnx_models import NAMES, NUM_FEATURES, SPEC, small_bundle, some_pixels

from mnist_dist.config import ModelConfig
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo, load_bundle, write_bundle
from mnist_dist.models.classifier import build_classifier
from mnist_dist.models.mlmodel import Described, mlmodel
from mnist_dist.models.onnx_file import Declared, Tensor

COLOURS = ImageSpec(height_px=9, width_px=7, channels=3)
CLASSES = ("no", "ünï 🐝", "0x1A: [a, 'b']", "c\n#d")
# What a person types who has MLflow and not this package. PIXELS, BUNDLE and the flavor are arguments.
SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import mlflow, numpy as np
pixels, bundle, flavor = np.load(sys.argv[1]), sys.argv[2], sys.argv[3]
model = mlflow.pyfunc.load_model(bundle)
predicted = model.predict(pixels)
names = model.metadata.metadata["class_names"]
if flavor == "keras":
    raw = mlflow.keras.load_model(bundle)
    again = np.asarray(raw(pixels, training=False))
else:
    predicted = predicted["probabilities"]
    raw = mlflow.onnx.load_model(bundle)
    again = predicted if [put.name for put in raw.graph.input] == ["image"] else None
try:
    model.predict(pixels.astype(np.float32))
    is_checked = False
except mlflow.MlflowException:
    is_checked = True
assert not any(name.startswith("mnist_dist") for name in sys.modules)
np.savez(sys.argv[1] + ".npz", predicted=predicted, again=again, names=names, is_checked=is_checked)
"""


def document(bundle: Bundle) -> dict[str, Any]:
    return dict(yaml.safe_load((bundle.path / "MLmodel").read_text()))


@pytest.fixture(scope="module")
def keras_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("keras") / "bundle"
    model = build_classifier(ModelConfig(backbone="cnn"), spec=COLOURS, num_classes=len(CLASSES)).model
    write_bundle(folder, model, BundleInfo(class_names=CLASSES, spec=COLOURS, backbone="cnn"))
    return load_bundle(folder)


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("onnx") / "bundle")


def test_a_keras_bundle_is_described(keras_bundle: Bundle) -> None:
    found, info = document(keras_bundle), keras_bundle.info
    assert found["flavors"]["python_function"] == {
        "loader_module": "mlflow.keras",
        "python_version": info.versions["python"],
    }
    assert found["flavors"]["keras"]["data"] == "model"
    assert found["metadata"] == {"class_names": list(CLASSES), "model_id": info.model_id}
    assert found["model_uuid"] == info.model_id[:32]
    assert found["model_size_bytes"] == keras_bundle.model_path.stat().st_size
    assert f"{found['utc_time_created']}+00:00".replace(" ", "T") == info.created_at
    assert json.loads(found["signature"]["inputs"]) == [
        {"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, 9, 7, 3]}}
    ]
    assert json.loads(found["signature"]["outputs"]) == [
        {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 4]}}
    ]


def test_an_onnx_bundle_is_described_with_its_outputs_and_its_fixed_batch(tmp_path: Path) -> None:
    found = document(small_bundle(tmp_path / "bundle", batch_size=6))
    assert found["flavors"]["onnx"]["data"] == found["flavors"]["python_function"]["data"] == "model.onnx"
    (source,) = json.loads(found["signature"]["inputs"])
    assert source["tensor-spec"] == {"dtype": "uint8", "shape": [6, *SPEC.shape]}
    outputs = {output["name"]: output["tensor-spec"]["shape"] for output in json.loads(found["signature"]["outputs"])}
    assert outputs == {"probabilities": [6, len(NAMES)], "features": [6, NUM_FEATURES]}


def test_the_file_follows_from_the_bundle() -> None:
    pixels = Tensor(name="image", dtype="uint8", shape=(None, 5, 4, 1))
    described = Described(
        model_file="model.keras",
        model_id="ab" * 32,
        created_at="2026-02-03T04:05:06+00:00",
        versions={"python": "3.11.2", "keras": "3.15.1"},
        size_bytes=12,
        class_names=("a", "b"),
        declared=Declared(inputs=(pixels,), outputs=(replace(pixels, name="probabilities", shape=(None, 2)),)),
    )
    assert mlmodel(described) == mlmodel(described)
    assert yaml.safe_load(mlmodel(described))["model_uuid"] == "ab" * 16


@pytest.mark.parametrize("flavor", ["keras", "onnx"])
def test_plain_mlflow_loads_a_bundle_and_predicts_the_same(
    flavor: str, keras_bundle: Bundle, onnx_bundle: Bundle, tmp_path: Path
) -> None:
    for package in ("mlflow", "pandas"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} (pip install -e '.[dev]')")
    bundle, spec = (keras_bundle, COLOURS) if flavor == "keras" else (onnx_bundle, SPEC)
    pixels = some_pixels(5, spec=spec)
    np.save(tmp_path / "pixels.npy", pixels)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "pixels.npy"), str(bundle.path), flavor]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": ""}
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr

    found = np.load(tmp_path / "pixels.npy.npz")
    expected = np.stack([prediction.probabilities for prediction in bundle.predict(list(pixels))])
    np.testing.assert_allclose(found["predicted"], expected, atol=1e-6)
    np.testing.assert_allclose(found["again"], expected, atol=1e-6)
    assert tuple(found["names"]) == bundle.info.class_names
    assert found["is_checked"]
