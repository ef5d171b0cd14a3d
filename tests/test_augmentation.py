import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.config import Augmentation, ModelConfig
from mnist_dist.errors import ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.augmentation import (
    Affine,
    Colour,
    RandomAffine,
    RandomColour,
    build_augmentation,
    reseed,
    seed_generators,
)
from mnist_dist.models.classifier import build_classifier

SPEC = ImageSpec(height_px=12, width_px=16, channels=3)
GREY = ImageSpec(height_px=14, width_px=10, channels=1)

# Two such processes are one strategy. Each writes what the augmentation and the generators gave in steps 0, 1, 1.
REPLICA = """
import json, sys
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import numpy as np
from mnist_dist.config import ModelConfig
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.augmentation import build_augmentation, reseed, seed_generators
from mnist_dist.models.classifier import build_classifier

spec = ImageSpec(height_px=14, width_px=10, channels=1)
with strategy.scope():
    augmentation = build_augmentation("digits", spec=spec)
    network = build_classifier(ModelConfig(backbone="cnn_bn"), spec=spec, num_classes=3).network
generators = seed_generators(augmentation, network)
images = tf.constant(np.random.default_rng(0).uniform(0, 255, (4, 14, 10, 1)), tf.float32)

def step(number):
    rank = tf.distribute.get_replica_context().replica_id_in_sync_group
    reseed(generators, tf.stack([tf.constant(7), number, rank]))
    augmented = augmentation(images)
    network(augmented, training=True)
    return tf.reduce_sum(augmented * augmented), tf.stack([g.state.value * 1 for g in generators])

run = tf.function(lambda number: strategy.run(step, args=(number,)))
steps = [[float(total), np.asarray(states).tolist()] for total, states in map(run, map(tf.constant, [0, 1, 1]))]
weights = [float(np.abs(w).sum()) for w in network.get_weights()]
print(json.dumps({"steps": steps, "weights": weights}))
"""


def random_images(count: int, spec: ImageSpec) -> np.ndarray:
    shape = (count, spec.height_px, spec.width_px, spec.channels)
    return np.random.default_rng(3).uniform(0, 255, shape).astype("float32")


def augmentation_of(preset: Augmentation, spec: ImageSpec) -> keras.Model:
    augmentation = build_augmentation(preset, spec=spec)
    assert augmentation is not None
    return augmentation


def test_none_is_no_model() -> None:
    assert build_augmentation("none", spec=SPEC) is None
    assert seed_generators(None) == []


def test_an_unknown_preset_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match=r"one of none, digits, photos. Received: augmentation='faces'"):
        build_augmentation("faces", spec=SPEC)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["digits", "photos"])
@pytest.mark.parametrize("spec", [SPEC, GREY])
def test_augmented_images_have_the_same_shape_and_range(preset: Augmentation, spec: ImageSpec) -> None:
    images = random_images(9, spec)
    augmented = np.asarray(augmentation_of(preset, spec)(images))

    assert augmented.shape == images.shape
    assert augmented.dtype == np.float32
    assert 0 <= augmented.min() < augmented.max() <= 255
    assert not np.allclose(augmented, images, atol=1)


def test_nothing_asked_for_changes_nothing() -> None:
    images = random_images(4, SPEC)

    assert np.asarray(RandomAffine(Affine())(images)) == pytest.approx(images, abs=0.01)
    assert np.asarray(RandomColour(Colour())(images)) == pytest.approx(images, abs=0.01)


def test_a_flip_is_exact_and_happens_to_about_half() -> None:
    images = random_images(64, SPEC)
    flipped = np.asarray(RandomAffine(Affine(flip=True))(images))

    same = np.abs(flipped - images).max(axis=(1, 2, 3)) < 0.1
    mirrored = np.abs(flipped - images[:, :, ::-1]).max(axis=(1, 2, 3)) < 0.1
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_digits_stay_upright_and_are_not_mirrored() -> None:
    images = np.zeros((64, 14, 10, 1), "float32")
    images[:, 2:6, 1:3] = 255  # a mark at the upper left
    augmented = np.asarray(augmentation_of("digits", GREY)(images))[..., 0]

    assert (augmented[:, :7, :5].sum(axis=(1, 2)) > 2 * augmented[:, 7:].sum(axis=(1, 2))).all()
    assert (augmented[:, :7, :5].sum(axis=(1, 2)) > 2 * augmented[:, :, 5:].sum(axis=(1, 2))).all()


def test_the_zoom_of_photos_only_comes_nearer() -> None:
    images = np.zeros((32, 21, 21, 1), "float32")
    images[:, 8:13, 8:13] = 255
    layer = RandomAffine(Affine(zoom=(0.5, 0.9)))

    assert (np.asarray(layer(images)).sum(axis=(1, 2, 3)) > 1.05 * images.sum(axis=(1, 2, 3))).all()


def test_the_same_seed_repeats_and_any_other_differs() -> None:
    augmentation = augmentation_of("photos", SPEC)
    generators = seed_generators(augmentation)
    images = random_images(5, SPEC)

    def augment(seed: object) -> np.ndarray:
        reseed(generators, seed)
        return np.asarray(augmentation(images))

    reference = augment((7, 30, 0))
    assert np.array_equal(reference, augment((7, 30, 0)))
    assert np.array_equal(reference, augment(np.array([7, 30, 0], "uint32")))
    for other in [(7, 31, 0), (7, 30, 1), (8, 30, 0), (30, 7, 0), (7, 30)]:
        assert not np.allclose(reference, augment(other), atol=1)


def test_states_do_not_meet_over_steps_ranks_and_generators() -> None:
    generators = [keras.random.SeedGenerator(0) for _ in range(3)]
    states = set()
    for step in range(50):
        for rank in range(4):
            reseed(generators, (2**32 - 1, step, rank))
            states |= {tuple(np.asarray(generator.state).tolist()) for generator in generators}

    assert len(states) == 50 * 4 * 3
    assert len({second for _, second in states}) == 50 * 4 * 3  # the word that each draw advances


def test_every_generator_of_nested_models_is_found_once() -> None:
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.GaussianNoise(0.1)])
    x = keras.Input((4,))
    outer = keras.Model(x, keras.layers.Dropout(0.1)(inner(x)))
    network = build_classifier(ModelConfig(backbone="cnn_bn"), spec=GREY, num_classes=3).network
    augmentation = build_augmentation("photos", spec=GREY)

    for model, count in [(outer, 3), (network, 1), (augmentation, 2)]:
        states = [variable for variable in model.variables if "seed_generator_state" in variable.path]
        assert len(states) == count
        assert {id(generator.state) for generator in seed_generators(model)} == set(map(id, states))
    assert len(seed_generators(outer, None, outer, network)) == 4


def test_reseeding_works_inside_a_tf_function() -> None:
    network = build_classifier(ModelConfig(backbone="cnn_bn"), spec=GREY, num_classes=3).network
    augmentation = augmentation_of("digits", GREY)
    generators = seed_generators(augmentation, network)
    images = tf.constant(random_images(6, GREY))

    def step(number: tf.Tensor) -> tf.Tensor:
        reseed(generators, tf.stack([tf.constant(1, tf.int64), number, tf.constant(0, tf.int64)]))
        return augmentation(images)

    compiled = tf.function(step)
    first, second, again = (compiled(tf.constant(number, tf.int64)).numpy() for number in (0, 1, 0))
    assert np.array_equal(first, again)
    assert not np.allclose(first, second, atol=1)
    reseed(generators, (1, 1, 0))
    assert second == pytest.approx(np.asarray(augmentation(images)), abs=0.01)


@pytest.mark.slow  # two processes import TensorFlow
def test_two_processes_of_one_strategy_draw_their_own_numbers_and_repeat_them() -> None:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    workers = [f"127.0.0.1:{server.getsockname()[1]}" for server in sockets]
    for server in sockets:
        server.close()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REPLICA],
            env=os.environ
            | {
                "TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}}),
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (json.loads(process.communicate()[0]) for process in processes)

    assert first["weights"] == second["weights"]
    for rank in (first, second):
        assert rank["steps"][1] == rank["steps"][2] != rank["steps"][0]
    for mine, theirs in zip(first["steps"], second["steps"], strict=True):
        assert mine[0] != theirs[0]
        assert mine[1] != theirs[1]
