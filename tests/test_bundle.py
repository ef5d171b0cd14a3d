import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import an_epoch
from PIL import Image

import mnist_dist
from mnist_dist.config import ModelConfig
from mnist_dist.engines.engine import with_features
from mnist_dist.errors import BundleError, ConfigError, ImageError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo, load_bundle, write_bundle
from mnist_dist.models.classifier import build_classifier

SPEC = ImageSpec(height_px=9, width_px=7, channels=1)
COLOURS = ImageSpec(height_px=9, width_px=7, channels=3, resize="crop")
NAMES = ["ant", "bee", "cat", "dog"]


def write(path: Path, *, spec: ImageSpec = SPEC, **changes: Any) -> BundleInfo:
    config = ModelConfig(backbone="cnn")
    info = BundleInfo(
        class_names=tuple(changes.pop("class_names", NAMES)),
        spec=spec,
        backbone="cnn",
        config={"model": dataclasses.asdict(config)},
        data_fingerprint="sha256:1f",
        validation={"accuracy": 0.5},
        test={"accuracy": 0.25},
    )
    model = changes.pop("model", None) or build_classifier(config, spec=spec, num_classes=4).model
    files = {"history": [an_epoch(1, loss=2.5)], "calibration": pa.table({"label": [3, 1]})} | changes
    return write_bundle(path, model, info, **files)


def random_image(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "bundle"
    write(path)
    return path


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    info = write(tmp_path / "run" / "bundle")
    bundle = load_bundle(tmp_path / "run" / "bundle")

    assert bundle.info == info
    assert (info.class_names, info.spec, info.test["accuracy"]) == (tuple(NAMES), SPEC, 0.25)
    assert set(info.versions) == {"python", "mnist_dist", "keras", "tensorflow", "numpy"}
    assert (bundle.path / "history.csv").read_text().splitlines()[1:] == ["1,train,2.5,0.5,0.5,0.5,0.01"]
    assert pq.read_table(bundle.path / "calibration.parquet").to_pydict() == {"label": [3, 1]}
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["bundle"]


def test_calibration_images_can_be_left_out(tmp_path: Path) -> None:
    write(tmp_path / "bundle", calibration=None)

    assert sorted(f.name for f in (tmp_path / "bundle").iterdir()) == [
        "MLmodel",
        "bundle.json",
        "history.csv",
        "model.keras",
    ]


def test_a_prediction_names_the_class(bundle_path: Path) -> None:
    bundle = mnist_dist.load_bundle(bundle_path)
    image = random_image(9, 7, 1)
    prediction = bundle.predict(image)

    assert prediction.probabilities == pytest.approx(np.asarray(bundle.model(image[None]))[0])
    assert prediction.probabilities.dtype == np.float32
    assert prediction.predicted_class == NAMES[prediction.predicted_index]
    assert prediction.confidence == prediction.probabilities.max()
    assert isinstance(prediction.confidence, float)
    assert isinstance(prediction.predicted_index, int)


def test_arrays_are_fitted_by_the_rule_of_the_bundle(tmp_path: Path) -> None:
    rule: dict[str, Any] = {
        "resize": "shortest-edge",
        "resize_px": 12,
        "resampling": "pillow",
        "interpolation": "bicubic",
    }
    spec = dataclasses.replace(COLOURS, quality="exact", **rule)
    write(tmp_path / "bundle", spec=spec)
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert bundle.info.spec == spec
    image = np.random.default_rng(3).integers(0, 256, (40, 36, 3), np.uint8)
    fitted = np.asarray(Image.fromarray(image).resize((12, 13), Image.Resampling.BICUBIC))[2:11, 2:9]
    expected = np.asarray(bundle.model(fitted[None]))[0]
    assert bundle.predict(image).probabilities == pytest.approx(expected, abs=1e-6)
    other = np.asarray(Image.fromarray(image).resize((12, 13), Image.Resampling.BOX))[2:11, 2:9]
    assert np.asarray(bundle.model(other[None]))[0] != pytest.approx(expected, abs=1e-4)


def test_arrays_and_files_of_the_same_pixels_agree(bundle_path: Path, tmp_path: Path) -> None:
    bundle = load_bundle(str(bundle_path))
    image = random_image(20, 31)
    Image.fromarray(image).save(tmp_path / "image.png")
    same = [
        image,
        image[..., None],
        np.repeat(image[..., None], 3, axis=-1),
        image.astype("float32"),
        np.maximum(image - 0.25, 0),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
    ]

    predictions = bundle.predict(same)
    assert len(predictions) == len(same)
    for prediction in predictions:
        assert prediction.probabilities == pytest.approx(predictions[0].probabilities, abs=1e-6)


def test_grey_images_fit_a_model_of_colours(tmp_path: Path) -> None:
    write(tmp_path / "bundle", spec=COLOURS)
    bundle = load_bundle(tmp_path / "bundle")
    grey = random_image(18, 30)
    first, second = bundle.predict([grey, np.repeat(grey[..., None], 3, axis=-1)])

    assert first.probabilities == pytest.approx(second.probabilities)


def test_a_prediction_of_a_multi_label_bundle_names_all_classes_from_one_half_on(bundle_path: Path) -> None:
    info = load_bundle(bundle_path).info
    probabilities = np.array([0.5, 0.75, 0.49, 0.5], np.float32)
    for multi_label, classes in ((True, ("bee", "ant", "dog")), (False, ())):
        bundle = Bundle(bundle_path, dataclasses.replace(info, multi_label=multi_label))
        bundle.model = lambda pixels, training: np.repeat(probabilities[None], len(pixels), axis=0)
        prediction = bundle.predict(random_image(9, 7))
        assert (prediction.predicted_class, prediction.predicted_classes) == ("bee", classes)


def test_lists_of_any_length_are_predicted(bundle_path: Path) -> None:
    bundle = load_bundle(bundle_path)
    images = list(random_image(70, 9, 7))

    assert bundle.predict([]) == []
    predictions = bundle.predict(images)
    assert len(predictions) == 70
    assert predictions[69].probabilities == pytest.approx(bundle.predict(images[69]).probabilities, abs=1e-6)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((9, 7), "int64"), r"uint8 or float, 0-255, of shape .* Received: int64 of shape \[9, 7\]"),
        (np.zeros((9, 7, 4), "uint8"), r"Received: uint8 of shape \[9, 7, 4\]"),
        (np.zeros((2, 9, 7, 1), "uint8"), r"for several images pass a list. Received: uint8 of shape \[2, 9, 7, 1\]"),
        (np.zeros((0, 7), "uint8"), r"Received: uint8 of shape \[0, 7\]"),
        (np.full((9, 7), 300.0), r"Received: float64 of shape \[9, 7\] with values from 300.0 to 300.0"),
        (np.full((9, 7), np.nan), r"with values from nan to nan"),
        (np.full((9, 7), 0.5, "float32"), r"with values from 0.5 to 0.5: multiply by 255"),
    ],
)
def test_an_array_that_is_no_image_is_refused(bundle_path: Path, image: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_bundle(bundle_path).predict(image)


def test_files_that_are_missing_or_no_image_are_refused(bundle_path: Path, tmp_path: Path) -> None:
    bundle = load_bundle(bundle_path)
    (tmp_path / "note.png").write_bytes(b"not an image")

    with pytest.raises(FileNotFoundError, match=r"absent.png"):
        bundle.predict(tmp_path / "absent.png")
    with pytest.raises(ImageError, match=r"^unsupported: "):
        bundle.predict(tmp_path / "note.png")


def test_a_finished_bundle_is_never_written_again(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"a finished bundle is never overwritten. Received: .*bundle'"):
        write(bundle_path)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(BundleError, match=r"new or empty. Received: .* with \['thesis.tex'\]"):
        write(tmp_path)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"schema"):
        write(tmp_path / "bundle", calibration="no table")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": NAMES[:3]}, r"for this spec and 3 distinct class names. Received: \(\(None, 9, 7, 1\)"),
        ({"class_names": ["ant", "ant", "bee", "cat"]}, r"4 distinct class names"),
        ({"model": "bfloat16"}, r"float32 policy.* Received: layers with the policies \['mixed_bfloat16'\]"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("model") == "bfloat16":
        half = build_classifier(ModelConfig(backbone="cnn"), spec=SPEC, num_classes=4, precision="bfloat16")
        changes = {"model": half.model}

    with pytest.raises(BundleError, match=message):
        write(tmp_path / "bundle", **changes)


def test_a_folder_without_bundle_json_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the bundle's folder does not exist; .* is empty. Received: '.*absent'"):
        load_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"is not a bundle: it has no bundle.json; .* is empty. Received: '.*'"):
        load_bundle(tmp_path)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").touch()
    with pytest.raises(BundleError, match=r"did you mean .*/bundle\?"):
        load_bundle(tmp_path)
    (tmp_path / "model.keras").touch()
    with pytest.raises(BundleError, match=r"is unfinished: it has no bundle.json"):
        load_bundle(tmp_path)


def test_a_damaged_or_newer_bundle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    write(path)
    manifest = path / "bundle.json"
    values = json.loads(manifest.read_text())

    for text, message in [
        ("{", r"is not JSON with a format_version"),
        (json.dumps(values | {"format_version": 2}), r"reads bundles of format 1; upgrade.* format_version=2"),
        (
            json.dumps({name: values[name] for name in values if name != "backbone"}),
            r"missing required field .backbone",
        ),
        (json.dumps(values | {"model_id": ""}), r"has no model_id, the sha256 of model.keras"),
    ]:
        manifest.write_text(text)
        with pytest.raises(BundleError, match=message):
            load_bundle(path)

    manifest.write_text(json.dumps(values | {"a field of tomorrow": 1}))
    assert load_bundle(path).info.model_id == values["model_id"]
    with (path / "model.keras").open("ab") as file:
        file.write(b"!")
    with pytest.raises(BundleError, match=rf"expected sha256 {values['model_id']}. Received: [0-9a-f]{{64}}"):
        load_bundle(path)
    (path / "model.keras").unlink()
    with pytest.raises(BundleError, match=r"Received: no such file"):
        load_bundle(path)


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, mnist_dist; mnist_dist.__version__\n"
        "print({'ray', 'keras', 'tensorflow', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"
    with pytest.raises(AttributeError, match=r"module 'mnist_dist' has no attribute 'trian'"):
        _ = mnist_dist.trian


@pytest.mark.parametrize("head", [{}, {"hidden_units": 23}, {"dropout": 0.3}, {"hidden_units": 23, "dropout": 0.3}])
def test_a_bundle_knows_the_number_of_its_features(tmp_path: Path, head: dict[str, Any]) -> None:
    model = build_classifier(ModelConfig(backbone="cnn", **head), spec=SPEC, num_classes=4).model
    write(tmp_path / "bundle", model=model)
    assert load_bundle(tmp_path / "bundle").num_features == with_features(model).outputs[1].shape[-1]


def test_a_model_without_a_head_of_ours_has_no_known_features(tmp_path: Path) -> None:
    pixels = keras.Input((9, 7, 1))
    scores = keras.layers.Dense(4, activation="softmax", name="mine")(keras.layers.Flatten(name="flat")(pixels))
    write(tmp_path / "bundle", model=keras.Model(pixels, scores))
    bundle = load_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"no layer hidden or logits .*Received: layers input_layer\w*, flat, mine"):
        bundle.num_features  # noqa: B018


def test_opening_a_bundle_loads_no_keras(bundle_path: Path) -> None:
    script = (
        "import sys, mnist_dist; mnist_dist.load_bundle(sys.argv[1]).num_features\n"
        "print({'ray', 'keras', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(bundle_path)], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"


def test_a_prediction_of_encoded_bytes_goes_through_the_shared_decoder(bundle_path: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(random_image(40, 33, 3)).save(buffer, "JPEG", quality=95)
    (tmp_path / "photo.jpg").write_bytes(buffer.getvalue())
    from mnist_dist.images.decoder import decode_image

    bundle = load_bundle(bundle_path)
    pixels = decode_image(buffer.getvalue(), SPEC).pixels
    assert bundle.predict(tmp_path / "photo.jpg").probabilities == pytest.approx(bundle.predict(pixels).probabilities)
