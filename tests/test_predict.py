"""`bundle.predict`: which images it takes, what it says of those that are none, and that it is quiet."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from onnx_models import small_bundle

from mnist_dist.config import ModelConfig
from mnist_dist.errors import ConfigError, ImageError
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo, Prediction, load_bundle, write_bundle
from mnist_dist.models.classifier import build_classifier
from mnist_dist.models.native_log import LEVEL, starting_quietly

SPEC = ImageSpec(height_px=9, width_px=7, channels=3)
NAMES = ("ant", "bee", "cat", "dog")


def keras_bundle(folder: Path) -> Bundle:
    model = build_classifier(ModelConfig(backbone="cnn"), spec=SPEC, num_classes=len(NAMES)).model
    write_bundle(folder, model, BundleInfo(class_names=NAMES, spec=SPEC, backbone="cnn"))
    return load_bundle(folder)


@pytest.fixture(scope="module", params=["keras", "onnx"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    return keras_bundle(folder) if request.param == "keras" else small_bundle(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of Keras whose model is never run."""
    return keras_bundle(tmp_path_factory.mktemp("plain") / "bundle")


def noise(height: int = 20, width: int = 31, seed: int = 2) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: Pixels, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def probabilities(predictions: list[Prediction]) -> list[list[float]]:
    return [prediction.probabilities.tolist() for prediction in predictions]


# --- what is taken ---------------------------------------------------------------------------------------------------


def test_an_image_may_be_given_in_every_way(bundle: Bundle, tmp_path: Path) -> None:
    pixels, path = noise(), tmp_path / "image.png"
    data = encoded(pixels)
    path.write_bytes(data)
    with path.open("rb") as file, PIL.Image.open(path) as opened:
        ways = [pixels, path, str(path), path.as_uri(), data, bytearray(data), memoryview(data)]
        ways += [io.BytesIO(data), file, opened, PIL.Image.fromarray(pixels)]
        expected = bundle.predict(pixels)
        predictions = bundle.predict(ways)
    assert len(predictions) == len(ways)
    for prediction in predictions:
        assert prediction.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    for way in (data, io.BytesIO(data), PIL.Image.fromarray(pixels)):
        single = bundle.predict(way)
        assert isinstance(single, Prediction)
        assert single.probabilities == pytest.approx(expected.probabilities, abs=1e-6)


def test_the_images_of_the_tests_differ(bundle: Bundle) -> None:
    first, second = bundle.predict([noise(), noise(seed=3)])
    assert first.probabilities != pytest.approx(second.probabilities, abs=1e-3)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_batch_of_any_length_gives_a_list_in_its_order(bundle: Bundle, kind: type) -> None:
    images = [noise(seed=number) for number in range(35)]
    predictions = bundle.predict(kind(images))
    assert isinstance(predictions, list)
    expected = [bundle.predict(image) for image in images]
    np.testing.assert_allclose(probabilities(predictions), probabilities(expected), atol=1e-6)
    assert bundle.predict(kind([])) == []
    assert len(bundle.predict(kind(images[:1]))) == 1


def input_of(bundle: Bundle, image: Any) -> Pixels:
    """What the model is given for an image, `uint8 [H, W, C]`."""
    seen = list[Pixels]()
    watched = Bundle(bundle.path, bundle.info)

    def model(pixels: Pixels, *, training: bool) -> Any:
        seen.append(pixels)
        return np.full((len(pixels), len(bundle.info.class_names)), 0.25, np.float32)

    watched.model = model
    watched.predict(image)
    (pixels,) = seen[0]
    given: Pixels = pixels
    return given


def transparent() -> PIL.Image.Image:
    image = PIL.Image.fromarray(noise()).convert("RGBA")
    image.putalpha(PIL.Image.fromarray(noise()[..., 0]))
    return image


def with_palette() -> PIL.Image.Image:
    image = PIL.Image.fromarray(noise()).quantize(16)
    image.info["transparency"] = 3
    return image


@pytest.mark.parametrize(
    "image",
    [
        transparent(),
        with_palette(),
        PIL.Image.fromarray(noise()).convert("1"),
        PIL.Image.fromarray(noise()).convert("LA"),
        PIL.Image.fromarray(noise()[..., 0].astype(np.uint16) * 257),
    ],
    ids=["alpha", "palette", "bits", "grey and alpha", "16 bits"],
)
def test_a_pil_image_becomes_the_pixels_of_its_file(plain: Bundle, image: PIL.Image.Image) -> None:
    file = io.BytesIO()
    image.save(file, "PNG")
    before = image.copy()
    np.testing.assert_array_equal(input_of(plain, image), input_of(plain, file.getvalue()))
    assert (image.mode, image.tobytes(), image.info, image.getpalette()) == (
        *(before.mode, before.tobytes(), before.info, before.getpalette()),
    )


def test_a_pil_image_is_turned_upright(plain: Bundle) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(), exif=exif)
    expected = np.rot90(noise(), -1)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        found = input_of(plain, opened)
    np.testing.assert_array_equal(found, input_of(plain, np.ascontiguousarray(expected)))
    np.testing.assert_array_equal(found, input_of(plain, data))


def test_a_file_is_read_from_where_it_stands(plain: Bundle) -> None:
    file = io.BytesIO(b"head" + encoded(noise()))
    file.seek(4)
    np.testing.assert_array_equal(input_of(plain, file), input_of(plain, noise()))
    with pytest.raises(ImageError, match=r"^empty: nothing is left to read of the file; file.seek\(0\) rewinds it"):
        plain.predict(file)


# --- what is refused, by name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, r"^an image is a path or URI, bytes, a file .* a PIL image or a NumPy array. Received: NoneType$"),
        (7, r"Received: int$"),
        ({"image": 1}, r"Received: dict$"),
        (iter([noise()]), r"several images are one flat list or tuple. Received: list_iterator$"),
        ([noise(), [noise()]], r"^images\[1\]: .* one flat list or tuple. Received: list$"),
        ([noise(), None], r"^images\[1\]: an image is .* Received: NoneType$"),
        ((noise(), np.zeros((2, 9, 7, 3), "uint8")), r"^images\[1\]: .* pass a list. Received: uint8 of shape"),
        (io.StringIO("text"), r"binary mode, open\(path, 'rb'\). Received: text$"),
    ],
)
def test_what_is_no_image_is_refused_by_its_place(plain: Bundle, image: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plain.predict(image)


def test_a_text_file_is_named(plain: Bundle, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("text")
    with (
        (tmp_path / "note.txt").open() as file,
        pytest.raises(ConfigError, match=r"binary mode.*Received: .*note.txt: text"),
    ):
        plain.predict(file)  # type: ignore[arg-type]


def test_an_image_that_cannot_be_decoded_is_named(plain: Bundle, tmp_path: Path) -> None:
    note = tmp_path / "note.png"
    note.write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"^unsupported: \S*/note.png: not one of JPEG") as found:
        plain.predict(note)
    assert found.value.status == "unsupported"
    with pytest.raises(ImageError, match=r"^unsupported: images\[40\]: not one of JPEG"):
        plain.predict([*[noise()] * 40, b"not an image"])
    with note.open("rb") as file, pytest.raises(ImageError, match=r"^unsupported: images\[1\]: \S*/note.png: not one"):
        plain.predict((noise(), file))
    (tmp_path / "cut.png").write_bytes(encoded(noise())[:-300])
    with (
        PIL.Image.open(tmp_path / "cut.png") as cut,
        pytest.raises(ImageError, match=r"^unreadable: images\[1\]: \S*/cut.png: .*truncated"),
    ):
        plain.predict([noise(), cut])
    with pytest.raises(FileNotFoundError, match=r"absent.png"):
        plain.predict([noise(), tmp_path / "absent.png"])


# --- quiet -----------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, logging, os, sys, warnings
import mnist_dist, numpy
class_name = "tensorflow" if sys.argv[2] == "keras" else "onnxruntime"
__import__("mnist_dist.models.bundle")
bundle = mnist_dist.load_bundle(sys.argv[1])
root = logging.getLogger()
before = (root.level, root.handlers[:], logging.root.manager.disable, sys.stderr, os.fstat(2).st_ino)
predictions = bundle.predict([numpy.zeros((9, 7), numpy.uint8)] * 2)
predictions += [bundle.predict(numpy.zeros((9, 7), numpy.uint8))]
after = (root.level, root.handlers[:], logging.root.manager.disable, sys.stderr, os.fstat(2).st_ino)
print(json.dumps([len(predictions), class_name in sys.modules, before == after]))
if len(sys.argv) > 3:
    os.write(2, b"from C\\n")
    print("from Python", file=sys.stderr)
    logging.getLogger("user").warning("from logging")
"""


def in_fresh_process(bundle: Bundle, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if name != LEVEL}
    kind = "onnx" if bundle.is_onnx else "keras"
    command = [sys.executable, "-c", PROGRAM, str(bundle.path), kind, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=known | environment, check=False)


def test_a_fresh_process_prints_nothing(bundle: Bundle) -> None:
    done = in_fresh_process(bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [3, True, True]


@pytest.mark.slow  # TensorFlow in a process of its own
def test_afterwards_everything_is_printed_as_before(plain: Bundle) -> None:
    done = in_fresh_process(plain, "and more")
    assert done.stderr.splitlines() == ["from C", "from Python", "from logging"]


@pytest.mark.slow  # the same
def test_who_asks_for_everything_sees_it(plain: Bundle) -> None:
    done = in_fresh_process(plain, **{LEVEL: "0"})
    assert done.returncode == 0
    assert "absl::InitializeLog" in done.stderr or " I " in done.stderr


def test_a_model_that_cannot_be_loaded_is_an_error_with_all_that_was_printed(plain: Bundle, tmp_path: Path) -> None:
    broken = Bundle(tmp_path, plain.info)
    (tmp_path / "bundle.json").write_bytes((plain.path / "bundle.json").read_bytes())
    with pytest.raises(ValueError, match=r"model.keras"):
        broken.predict(noise())


INFORMATION = b"I0000 00:00:1795919602.282145    3440 port.cc:153] oneDNN custom operations are on.\n"
NO_GPU = b"E0000 00:00:1795919606.654566    3440 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error\n"
ERROR = b"E0000 00:00:1795919606.654566    3440 cuda_dnn.cc:52] failed to load cuDNN\n"
FATAL = b"F0000 00:00:1795919606.654566    3440 tensor.cc:52] Check failed\n"
OLD = b"2024-05-01 10:00:00.123456: I tensorflow/core/util/port.cc:113] oneDNN custom operations are on.\n"
OTHERS = [ERROR, FATAL, b"I am a user's line\n", b"UserWarning: look\n", b"no newline"]


def written(capfd: pytest.CaptureFixture[str]) -> bytes:
    return capfd.readouterr().err.encode()


def test_only_lines_of_a_start_are_hidden(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LEVEL, raising=False)
    with caplog.at_level("DEBUG", logger="mnist_dist"), starting_quietly():
        for line in (INFORMATION, NO_GPU, OLD, *OTHERS):
            os.write(2, line)
    assert written(capfd) == b"".join(OTHERS)
    hidden = [record.getMessage() for record in caplog.records]
    assert hidden == [line.decode().rstrip() for line in (INFORMATION, NO_GPU, OLD)]


def lose() -> None:
    os.write(2, INFORMATION)
    raise KeyError("lost")


def test_a_start_that_fails_shows_everything(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LEVEL, raising=False)
    with pytest.raises(KeyError, match="lost"), starting_quietly():
        lose()
    assert written(capfd) == INFORMATION


def test_starts_in_several_threads_leave_stderr_as_it_was(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LEVEL, raising=False)
    inside, may_end = threading.Event(), threading.Event()

    def first() -> None:
        with starting_quietly():
            inside.set()
            may_end.wait()
            os.write(2, ERROR)

    def second() -> None:
        with starting_quietly():
            os.write(2, FATAL)

    before = os.fstat(2)
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    may_end.set()
    for thread in threads:
        thread.join()
    assert os.path.samestat(os.fstat(2), before)
    assert written(capfd) == ERROR + FATAL


def test_a_process_without_stderr_predicts(plain: Bundle) -> None:
    program = "import os; os.close(2)\nimport sys; from mnist_dist.models.native_log import starting_quietly\n"
    program += "with starting_quietly(): print('inside')"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"inside\n"


def test_a_prediction_of_a_multi_label_bundle_is_one_of_a_batch_too(plain: Bundle) -> None:
    several = Bundle(plain.path, dataclasses.replace(plain.info, multi_label=True))
    several.model = lambda pixels, training: np.full((len(pixels), 4), 0.75, np.float32)
    (found,) = several.predict((noise(),))
    assert found.predicted_classes == NAMES
