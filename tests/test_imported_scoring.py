"""Imported models score folders and archives with the rows that a person's own ten lines of code give."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from corpus import encoded
from foreign_models import CLASSES, SIDE_PX, foreign_onnx
from harness import private_ray
from PIL import Image

import mnist_dist

NAMES = tuple(f"class {number}" for number in range(CLASSES))
COUNT = 40


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with private_ray(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of JPEGs and PNGs of many sizes, one of them broken, and a tar of the same files."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(2)
    for number in range(COUNT):
        small = random.integers(0, 256, (4, 5, 3)).astype(np.uint8)
        size = (int(random.integers(20, 200)), int(random.integers(20, 200)))
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        suffix = ("JPEG", "PNG")[number % 2]
        (folder / f"{number:03d}.{suffix.lower()}").write_bytes(encoded(image, suffix))
    (folder / "broken.jpeg").write_bytes((folder / "000.jpeg").read_bytes()[:300])
    archive = folder.with_suffix(".tar")
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, arcname=".")
    return folder, archive


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


def softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def as_onnx_user(file: Path) -> Callable[[Path], Any]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def predict(path: Path) -> Any:
        image = opened(path)
        short = min(image.size)
        size = (int(40 * image.width / short), int(40 * image.height / short))
        image = image.resize(size if short != 40 else image.size, Image.Resampling.BICUBIC)
        left, top = round((image.width - SIDE_PX) / 2), round((image.height - SIDE_PX) / 2)
        values = np.asarray(image.crop((left, top, left + SIDE_PX, top + SIDE_PX)), np.float32) / 255
        values = (values - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        batch = values.transpose(2, 0, 1)[None].astype(np.float32)
        return softmax(session.run(None, {"pixels": batch})[0])[0]

    return predict


def onnx_file(folder: Path) -> tuple[Path, dict[str, Any], Callable[[Path], Any]]:
    file = foreign_onnx(folder / "net.onnx")
    flags = {"preset": "imagenet", "resize": "shortest-edge", "resize_px": 40, "interpolation": "bicubic"}
    return file, flags, as_onnx_user(file)


def hugging_face_folder(folder: Path) -> tuple[Path, dict[str, Any], Callable[[Path], Any]]:
    file = foreign_onnx(folder / "hub" / "onnx" / "model.onnx", seed=1)
    labels = {str(number): name for number, name in enumerate(NAMES)}
    (folder / "hub" / "config.json").write_text(json.dumps({"model_type": "vit", "id2label": labels}))
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": SIDE_PX, "width": SIDE_PX},
        "resample": 2,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_resize": True,
    }
    (folder / "hub" / "preprocessor_config.json").write_text(json.dumps(processor))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def predict(path: Path) -> Any:
        image = opened(path).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
        values = (np.asarray(image, np.float32) / 255 - 0.5) / 0.5
        return softmax(session.run(None, {"pixels": values.transpose(2, 0, 1)[None]})[0])[0]

    return folder / "hub", {}, predict


def keras_file(folder: Path) -> tuple[Path, dict[str, Any], Callable[[Path], Any]]:
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIDE_PX, SIDE_PX, 3))
    x = keras.layers.RandomFlip()(inputs)
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(x)
    x = keras.layers.Conv2D(8, 5, strides=3, activation="relu")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(CLASSES, activation="softmax", kernel_initializer=keras.initializers.RandomNormal(0, 3))(x)
    model = keras.Model(inputs, x)
    model.save(folder / "net.keras")

    def predict(path: Path) -> Any:
        image = np.round(tf.image.resize(np.asarray(opened(path)), (SIDE_PX, SIDE_PX)))  # bundles take whole pixels
        return model.predict(image[None], verbose=0)[0]

    return folder / "net.keras", {}, predict


@pytest.mark.slow
@pytest.mark.parametrize("made", [onnx_file, hugging_face_folder, keras_file])
def test_a_folder_and_a_tar_get_the_rows_of_ten_lines_of_one_s_own(
    made: Callable[[Path], tuple[Path, dict[str, Any], Callable[[Path], Any]]],
    images: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    source, flags, predict = made(tmp_path)
    folder, archive = images
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    mnist_dist.import_model(source, output=tmp_path / "bundle", classes=str(tmp_path / "names.txt"), **flags)
    expected = {path.name: predict(path) for path in folder.iterdir() if path.stem != "broken"}

    for number, where in enumerate((folder, archive)):
        scored = mnist_dist.score(bundle=tmp_path / "bundle", input=where, output=tmp_path / f"table-{number}")

        rows = {row["uri"].rpartition("/")[2]: row for row in scored.table().to_pylist()}
        assert len(rows) == COUNT + 1
        assert rows.pop("broken.jpeg")["status"] == "truncated"
        assert rows.keys() == expected.keys()
        for name, row in rows.items():
            assert np.abs(np.array(row["probabilities"]) - expected[name]).max() < 1e-4, name
            assert row["predicted_class"] == NAMES[int(expected[name].argmax())]
    tops = {int(values.argmax()) for values in expected.values()}
    assert len(tops) > 1, "one class for all images would show nothing"
