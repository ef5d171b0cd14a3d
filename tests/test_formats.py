"""formats: OpenVINO and ONNX Runtime on converted files say what Keras says, in batches of any size."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Recorder

from mnist_dist import processor
from mnist_dist.config import EngineName, ModelConfig
from mnist_dist.console import Stop
from mnist_dist.engines import formats
from mnist_dist.engines.choice import EngineChoice, open_engine
from mnist_dist.engines.conversion import Conversion, versions_of
from mnist_dist.engines.engine import Engine, KerasEngine
from mnist_dist.engines.formats import FORMATS, ConvertedEngine, openvino_core, streams_of
from mnist_dist.images.pixels import Pixels, padded
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo, load_bundle, write_bundle
from mnist_dist.models.classifier import build_classifier
from mnist_dist.session import Session

# b = images of a call

SPEC = ImageSpec(height_px=10, width_px=12, channels=3)
NAMES = ("ant", "bee", "cat", "dog", "eel")
FEATURES = 128  # of `cnn_bn`
BATCH = 6
ENGINES: tuple[EngineName, ...] = ("openvino", "onnx")


def some_pixels(images: int) -> Pixels:
    """Noise of another brightness in each image, so that their answers differ."""
    random = np.random.default_rng(images)
    pixels: Pixels = (random.random((images, *SPEC.shape)) * random.integers(20, 256, (images, 1, 1, 3))).astype(
        np.uint8
    )
    return pixels


def needs(engine: str) -> None:
    missing = [name for name in FORMATS[engine].packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (pip install -e '.[export]'); runs where they are installed")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Batch normalisation that has seen images, a hidden layer and dropout; its images are spread over the classes."""
    config = ModelConfig(backbone="cnn_bn", hidden_units=9, dropout=0.5)
    classifier = build_classifier(config, spec=SPEC, num_classes=len(NAMES), seed=3)
    for _ in range(5):
        classifier.network(some_pixels(40).astype(np.float32), training=True)
    logits = classifier.model.get_layer("logits")
    kernel, bias = logits.get_weights()
    said = np.log(np.asarray(classifier.model(some_pixels(40), training=False)))
    factor = 1 / said.std(axis=0).mean()
    logits.set_weights([kernel * factor, (bias - said.mean(axis=0)) * factor])
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    info = BundleInfo(class_names=NAMES, spec=SPEC, backbone="cnn_bn")
    write_bundle(path, classifier.model, info)
    return load_bundle(path)


@pytest.fixture(scope="module")
def converted(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each engine that is installed."""
    folder, console = tmp_path_factory.mktemp("converted"), Recorder()
    engines = [name for name in ENGINES if all(importlib.util.find_spec(module) for module in FORMATS[name].packages)]
    Conversion(
        bundle=bundle, scratch=folder, batch_size=BATCH, cpus=1, session=Session(console=console, stop=Stop(console))
    ).by_own(engines, features=True, call_sizes=(BATCH,))
    return folder


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> EngineName:
    engine: EngineName = request.param
    needs(engine)
    return engine


def opened(
    bundle: Bundle, converted: Path, name: EngineName, *, batch_size: int = BATCH, embeddings: bool = True
) -> Engine:
    choice = EngineChoice(engine=name, uri=str(converted / name))
    return open_engine(choice, bundle, batch_size=batch_size, embeddings=embeddings, cpus=1)


def relative(ours: object, theirs: object) -> float:
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(theirs, np.float64)))


@pytest.mark.slow
@pytest.mark.parametrize("images", [BATCH, 4, 1])
def test_probabilities_and_embeddings_are_those_of_keras(
    bundle: Bundle, converted: Path, name: EngineName, images: int
) -> None:
    keras = KerasEngine(bundle, batch_size=BATCH, embeddings=True)
    engine, pixels = opened(bundle, converted, name), some_pixels(images)
    ours, theirs = engine(pixels), keras(pixels)

    assert (engine.batch_size, engine.num_classes, engine.num_features) == (BATCH, len(NAMES), FEATURES)
    assert ours.probabilities.shape == (images, len(NAMES))
    assert ours.probabilities.dtype == np.float32
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-4)
    assert ours.embeddings is not None
    assert ours.embeddings.shape == (images, FEATURES)
    assert ours.embeddings.dtype == np.float32
    assert relative(ours.embeddings, theirs.embeddings) < 1e-4
    assert len(set(np.asarray(theirs.probabilities).argmax(axis=1))) > (images > 1)


@pytest.mark.slow
def test_without_embeddings_there_are_none(bundle: Bundle, converted: Path, name: EngineName) -> None:
    engine = opened(bundle, converted, name, embeddings=False)
    outputs = engine(some_pixels(3))
    assert (outputs.embeddings, engine.num_features) == (None, 0)
    np.testing.assert_allclose(
        outputs.probabilities, opened(bundle, converted, name)(some_pixels(3)).probabilities, atol=1e-6
    )


@pytest.mark.slow
def test_outputs_are_kept_when_it_is_called_again(bundle: Bundle, converted: Path, name: EngineName) -> None:
    engine = opened(bundle, converted, name)
    first = engine(some_pixels(BATCH))
    before = (first.probabilities.copy(), np.array(first.embeddings))
    engine(np.zeros((BATCH, *SPEC.shape), np.uint8))
    np.testing.assert_array_equal(first.probabilities, before[0])
    np.testing.assert_array_equal(np.asarray(first.embeddings), before[1])


@pytest.mark.slow
def test_an_image_is_told_the_same_wherever_it_stands_in_a_batch(
    bundle: Bundle, converted: Path, name: EngineName
) -> None:
    pixels = some_pixels(BATCH)
    together = opened(bundle, converted, name)(pixels).probabilities
    alone = opened(bundle, converted, name, batch_size=1)
    for image, row in zip(pixels, together, strict=True):
        np.testing.assert_allclose(alone(image[None]).probabilities[0], row, atol=1e-5)


@pytest.mark.slow
def test_images_that_lie_otherwise_in_memory_are_read_right(bundle: Bundle, converted: Path, name: EngineName) -> None:
    pixels = some_pixels(2 * BATCH)
    engine = opened(bundle, converted, name)
    for view in (pixels[::2], pixels[:BATCH, :, ::-1], pixels[BATCH:]):
        expected = engine(np.ascontiguousarray(view)).probabilities
        np.testing.assert_array_equal(engine(view).probabilities, expected)


@pytest.mark.slow
def test_bfloat16_is_close_but_not_the_same(bundle: Bundle, converted: Path) -> None:
    needs("openvino")
    pixels = some_pixels(BATCH)
    settings: dict[str, Any] = {"format": "openvino", "spec": SPEC, "batch_size": BATCH}
    full = ConvertedEngine(converted / "openvino", **settings)(pixels).probabilities
    short = ConvertedEngine(converted / "openvino", **settings, precision="bfloat16")(pixels)
    assert short.probabilities.dtype == np.float32
    np.testing.assert_allclose(short.probabilities, full, atol=0.05)
    if processor.has_bfloat16():  # elsewhere it is computed in float32
        assert np.abs(short.probabilities - full).max() > 1e-5


@pytest.mark.slow
def test_a_process_with_such_an_engine_loads_neither_keras_nor_tensorflow(
    bundle: Bundle, converted: Path, name: EngineName
) -> None:
    program = (
        "import sys, numpy as np\n"
        "from mnist_dist.models.bundle import load_bundle\n"
        "from mnist_dist.engines.choice import EngineChoice, open_engine\n"
        "bundle, name, folder = load_bundle(sys.argv[1]), sys.argv[2], sys.argv[3]\n"
        "engine = open_engine(EngineChoice(engine=name, uri=folder), bundle, batch_size=2, embeddings=True, cpus=1)\n"
        "engine(np.zeros((1, *bundle.info.spec.shape), np.uint8))\n"
        "print([name for name in ('keras', 'tensorflow', 'jax', 'torch', 'ray') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(bundle.path), name, str(converted / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_signal_is_survived_by_a_process_that_had_several_engines(converted: Path) -> None:
    needs("openvino")
    program = (
        "import gc, os, signal, sys\n"
        "from pathlib import Path\n"
        "from mnist_dist.images.decoder import ImageSpec\n"
        "from mnist_dist.engines.formats import ConvertedEngine\n"
        "height_px, width_px, channels = map(int, sys.argv[2:])\n"
        "spec = ImageSpec(height_px=height_px, width_px=width_px, channels=channels)\n"
        "engines = [ConvertedEngine(Path(sys.argv[1]), format='openvino', spec=spec, batch_size=2) for _ in range(3)]\n"
        "while engines:\n"
        "    del engines[0]\n"
        "    gc.collect()\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('alive'))\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    sides = [str(side) for side in (SPEC.height_px, SPEC.width_px, SPEC.channels)]
    command = [sys.executable, "-c", program, str(converted / "openvino"), *sides]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "alive"


@pytest.mark.parametrize(
    ("cpus", "streams"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (7, 1), (8, 4), (11, 1), (12, 4), (64, 4)]
)
def test_streams_leave_no_core_idle(cpus: int, streams: int) -> None:
    assert streams_of(cpus) == streams
    assert cpus % streams == 0


@pytest.mark.slow
def test_it_uses_as_many_cores_as_it_may(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("openvino")
    compiled: list[Any] = []

    class Core:
        def read_model(self, file: Path) -> Any:
            return openvino_core().read_model(file)

        def compile_model(self, *arguments: Any) -> Any:
            compiled.append(openvino_core().compile_model(*arguments))
            return compiled[-1]

    monkeypatch.setattr(formats, "openvino_core", Core)
    for cpus in range(1, 1 + min(2, processor.usable_cpus())):
        engine = ConvertedEngine(converted / "openvino", format="openvino", spec=SPEC, batch_size=BATCH, cpus=cpus)
        assert compiled[-1].get_property("INFERENCE_NUM_THREADS") == cpus
        assert compiled[-1].get_property("NUM_STREAMS") == engine.calls_at_once == cpus


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_is_no_model_is_an_error(tmp_path: Path, format: str) -> None:
    needs(format)
    for row in FORMATS.values():
        for name in (row.file, *row.others):
            (tmp_path / name).write_bytes(b"no model")
    with pytest.raises(Exception, match=r"(?i)model"):
        ConvertedEngine(tmp_path, format=format, spec=SPEC, batch_size=2)


@pytest.mark.parametrize("images", [6, 5, 1])
def test_smaller_batches_are_filled_with_zeros(images: int) -> None:
    pixels = some_pixels(images)
    full = padded(pixels, 6)
    assert full.shape == (6, *SPEC.shape)
    assert full.dtype == np.uint8
    np.testing.assert_array_equal(full[:images], pixels)
    assert not full[images:].any()


def test_packages_that_are_not_installed_have_no_version() -> None:
    assert versions_of(("numpy", "no-such-package")) == {"numpy": np.__version__}
