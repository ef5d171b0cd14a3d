"""engines: a bundle's model in batches of one size, with its features, and with less memory than it wants."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.config import ModelConfig
from mnist_dist.engines import engine as engines
from mnist_dist.engines.engine import KerasEngine, Outputs, best_images_per_s, calls_per_s
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo, load_bundle, write_bundle
from mnist_dist.models.classifier import Classifier, build_classifier

# b = images of a call, D = features

SPEC = ImageSpec(height_px=10, width_px=12, channels=3)
NAMES = ("ant", "bee", "cat", "dog", "eel")
BATCH = 6
FEATURES = {"cnn": 128, "cnn_bn": 128, "mlp": 64, "conv_base": 128}


@dataclass(frozen=True)
class Written:
    """A bundle, and the classifier that it was written from."""

    bundle: Bundle
    classifier: Classifier


@pytest.fixture(scope="module", params=list(FEATURES))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("bundles") / "bundle", request.param)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write(tmp_path_factory.mktemp("bundles") / "bundle", "mlp").bundle


def write(path: Path, backbone: str, **head: Any) -> Written:
    config = ModelConfig(backbone=backbone, **head)
    classifier = build_classifier(config, spec=SPEC, num_classes=len(NAMES), seed=3)
    info = BundleInfo(class_names=NAMES, spec=SPEC, backbone=backbone)
    write_bundle(path, classifier.model, info)
    return Written(load_bundle(path), classifier)


def some_pixels(images: int) -> Pixels:
    return np.random.default_rng(images).integers(0, 256, (images, 10, 12, 3), np.uint8)


def of_model(bundle: Bundle, pixels: Pixels) -> Any:
    return bundle.model(pixels, training=False).numpy()


@pytest.mark.parametrize("images", [BATCH, 4, 1])
def test_probabilities_are_those_of_the_model(written: Written, images: int) -> None:
    engine = KerasEngine(written.bundle, batch_size=BATCH)
    outputs = engine(some_pixels(images))
    assert outputs.probabilities.shape == (images, engine.num_classes) == (images, len(NAMES))
    assert outputs.probabilities.dtype == np.float32
    np.testing.assert_allclose(outputs.probabilities, of_model(written.bundle, some_pixels(images)), atol=1e-5)
    assert (outputs.embeddings, engine.num_features) == (None, 0)


@pytest.mark.parametrize("images", [BATCH, 4])
def test_embeddings_are_the_features_before_the_head(written: Written, images: int) -> None:
    engine = KerasEngine(written.bundle, batch_size=BATCH, embeddings=True)
    pixels = some_pixels(images)
    outputs = engine(pixels)
    assert outputs.embeddings is not None
    assert outputs.embeddings.shape == (images, engine.num_features)
    assert engine.num_features == written.bundle.num_features == FEATURES[written.bundle.info.backbone]
    assert outputs.embeddings.dtype == np.float32
    features = written.classifier.features(pixels.astype(np.float32), training=False).numpy()
    np.testing.assert_allclose(outputs.embeddings, features, atol=1e-4)
    np.testing.assert_allclose(outputs.probabilities, of_model(written.bundle, pixels), atol=1e-5)


# What the engine says on Keras' JAX backend, of which a process has but one.
ON_JAX = """
import sys
import numpy as np
from mnist_dist import load_bundle
from mnist_dist.engines.engine import KerasEngine
folder, pixels, answer = sys.argv[1:]
outputs = KerasEngine(load_bundle(folder), batch_size=8, embeddings=True, cpus=1)(np.load(pixels))
np.savez(answer, probabilities=outputs.probabilities, embeddings=outputs.embeddings)
assert "tensorflow" not in sys.modules
"""


def test_jax_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="needs jax (pip install jax); runs where it is installed")
    written = write(tmp_path / "bundle", "cnn_bn")  # with what only TensorFlow can synchronise
    pixels, answer = some_pixels(5), tmp_path / "answer.npz"
    np.save(tmp_path / "pixels.npy", pixels)
    arguments = [str(written.bundle.path), str(tmp_path / "pixels.npy"), str(answer)]
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    subprocess.run([sys.executable, "-c", ON_JAX, *arguments], env=environment, check=True)
    theirs, ours = np.load(answer), KerasEngine(written.bundle, batch_size=8, embeddings=True)(pixels)
    np.testing.assert_allclose(theirs["probabilities"], ours.probabilities, atol=1e-4)
    assert ours.embeddings is not None
    np.testing.assert_allclose(theirs["embeddings"], ours.embeddings, rtol=1e-4, atol=1e-4)


def test_the_head_makes_probabilities_of_the_embeddings(written: Written) -> None:
    engine = KerasEngine(written.bundle, batch_size=BATCH, embeddings=True)
    outputs = engine(some_pixels(BATCH))
    logits = written.classifier.head(outputs.embeddings, training=False)
    np.testing.assert_allclose(outputs.probabilities, tf.nn.softmax(logits), atol=1e-5)


@pytest.mark.parametrize("head", [{"hidden_units": 9}, {"dropout": 0.5}, {"hidden_units": 9, "dropout": 0.5}])
def test_hidden_units_and_dropout_belong_to_the_head(tmp_path: Path, head: dict[str, Any]) -> None:
    written = write(tmp_path / "bundle", "mlp", **head)
    engine = KerasEngine(written.bundle, batch_size=BATCH, embeddings=True)
    features = written.classifier.features(some_pixels(4).astype(np.float32), training=False).numpy()
    embeddings = engine(some_pixels(4)).embeddings
    assert embeddings is not None
    np.testing.assert_allclose(embeddings, features, atol=1e-4)
    assert features.shape == (4, engine.num_features) == (4, FEATURES["mlp"])


class LittleMemory(KerasEngine):
    """Holds batches of at most `most` images.

    Args:
        most: images.
        bundle, batch_size, embeddings: of `KerasEngine`.
    """

    def __init__(self, bundle: Bundle, *, most: int, batch_size: int, embeddings: bool = False) -> None:
        super().__init__(bundle, batch_size=batch_size, embeddings=embeddings)
        self.most, self.sizes = most, list[int]()

    def _call(self, pixels: Pixels) -> Outputs:
        self.sizes.append(self.batch_size)
        if self.batch_size > self.most:
            raise tf.errors.ResourceExhaustedError(None, None, "the memory does not hold it")
        return super()._call(pixels)


@pytest.mark.parametrize(("batch_size", "half"), [(8, 4), (7, 4)])
@pytest.mark.parametrize("images", [7, 5, 3])
def test_a_batch_that_the_memory_does_not_hold_is_halved_once(
    bundle: Bundle, batch_size: int, half: int, images: int
) -> None:
    engine = LittleMemory(bundle, most=4, batch_size=batch_size, embeddings=True)
    pixels = some_pixels(images)
    for _ in range(2):
        outputs = engine(pixels[: engine.batch_size])
        expected = of_model(bundle, pixels)[: len(outputs.probabilities)]
        np.testing.assert_allclose(outputs.probabilities, expected, atol=1e-5)
        assert outputs.embeddings is not None
        assert outputs.embeddings.shape == (len(outputs.probabilities), FEATURES["mlp"])
    assert engine.batch_size == half
    assert engine.sizes == [batch_size, *[half] * (1 + (images > half)), half]


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 4, 4]), (1, [1, 1])])
def test_half_a_batch_that_the_memory_does_not_hold_is_raised(
    bundle: Bundle, batch_size: int, sizes: list[int]
) -> None:
    engine = LittleMemory(bundle, most=0, batch_size=batch_size)
    for _ in range(2):
        with pytest.raises(tf.errors.ResourceExhaustedError, match="the memory does not hold it"):
            engine(some_pixels(1))
    assert engine.sizes == sizes


def test_another_error_of_the_model_is_raised_as_it_is(bundle: Bundle) -> None:
    engine = KerasEngine(bundle, batch_size=BATCH)
    with pytest.raises(tf.errors.InvalidArgumentError, match="requested shape"):
        engine(np.zeros((BATCH, 9, 12, 3), np.uint8))
    assert engine.batch_size == BATCH


def test_one_call_at_a_time_takes_all_cores(bundle: Bundle) -> None:
    engine = KerasEngine(bundle, batch_size=BATCH)
    assert (engine.calls_at_once, engine.batch_size) == (1, BATCH)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What speeds are measured by; its one value is moved by hand."""
    now = [100.0]
    monkeypatch.setattr(engines, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("at_once", [1, 3])
def test_speed_is_that_of_all_threads_together(clock: list[float], at_once: int) -> None:
    def pass_a_second() -> None:
        clock[0] += 1

    together, calls = threading.Barrier(at_once, action=pass_a_second), list[int]()

    def call() -> None:
        calls.append(1)
        if len(calls) > 1:  # the first one does not count
            together.wait(60)

    assert calls_per_s(call, seconds=4, at_once=at_once) == at_once
    assert len(calls) == 1 + 4 * at_once


@dataclass
class PausedEngine:
    """An engine that takes so long for a call, s, on that clock."""

    clock: list[float]
    pauses_s: Iterator[float]
    batch_size: int = 3
    calls_at_once = 1
    num_classes = 2
    num_features = 0
    sizes: list[int] = field(default_factory=list)

    def __call__(self, pixels: Pixels) -> Outputs:
        self.sizes.append(len(pixels))
        self.clock[0] += next(self.pauses_s)
        return Outputs(np.zeros((len(pixels), 2), np.float32))


def test_engines_are_compared_by_their_best_rounds(clock: list[float]) -> None:
    disturbed = PausedEngine(clock, itertools.chain([1.0] * 2, itertools.repeat(0.125)))  # for its whole first round
    slow = PausedEngine(clock, itertools.repeat(0.25), batch_size=5)
    assert best_images_per_s([disturbed, slow], SPEC) == [3 / 0.125, 5 / 0.25]
    assert set(disturbed.sizes) == {3}


def test_an_engine_that_is_slower_than_a_round_is_measured_once(clock: list[float]) -> None:
    engine = PausedEngine(clock, itertools.repeat(8.0))
    assert best_images_per_s([engine], SPEC) == [3 / 8]
    assert len(engine.sizes) == 2  # the first call does not count
