from typing import Any

import keras
import numpy as np
import pytest
from scipy import ndimage

from mnist_dist.config import Augmentation, FitConfig, ModelConfig
from mnist_dist.data.batches import augmentation_draws, step_seeds
from mnist_dist.errors import ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.augmentation import Affine, Colour, Erasing, Preset, make_preset, reseed, seed_generators
from mnist_dist.models.classifier import build_classifier

SPEC = ImageSpec(height_px=12, width_px=16, channels=3)
GREY = ImageSpec(height_px=14, width_px=10, channels=1)


def random_images(count: int, spec: ImageSpec) -> Any:
    shape = (count, spec.height_px, spec.width_px, spec.channels)
    return np.random.default_rng(3).uniform(0, 255, shape).astype("float32")


def draws_for(preset: Preset, count: int, *, step: int = 0) -> Any:
    steps = range(step, step + 1)
    return np.asarray(augmentation_draws(7, steps=steps, batch_size=count, count=preset.draws)[0])


def augmented_by(preset: Preset, images: np.ndarray) -> Any:
    return np.asarray(preset(images, draws_for(preset, len(images))))


def preset_of(augmentation: Augmentation, **options: float) -> Preset:
    preset = make_preset(FitConfig(augmentation=augmentation, **options))  # type: ignore[arg-type]
    assert preset is not None
    return preset


def test_none_is_no_preset() -> None:
    assert make_preset(FitConfig()) is None
    assert seed_generators(None) == []


def test_an_unknown_preset_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match=r"one of none, digits, photos, rand-augment. Received: augmentation='faces'"):
        make_preset(FitConfig(augmentation="faces"))  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["digits", "photos", "rand-augment"])
@pytest.mark.parametrize("spec", [SPEC, GREY])
def test_augmented_images_have_the_same_shape_and_range(preset: Augmentation, spec: ImageSpec) -> None:
    images = random_images(9, spec)
    augmented = augmented_by(preset_of(preset), images)

    assert augmented.shape == images.shape
    assert augmented.dtype == np.float32
    assert 0 <= augmented.min() < augmented.max() <= 255
    assert not np.allclose(augmented, images, atol=1)


def reference(preset: Preset, image: np.ndarray, draws: np.ndarray) -> Any:
    """One image augmented by SciPy: its pixels are looked up about the centre, in the order flip, zoom, rotation."""
    affine, colour = (*preset.transforms, None)[:2]
    assert isinstance(affine, Affine)
    angle, right, down, zoom, mirror = draws[:5].astype(np.float64)
    nearest, farthest = affine.zoom
    size = nearest + (zoom + 1) / 2 * (farthest - nearest)
    radians = np.deg2rad(angle * affine.rotation_degrees)
    rows_columns = np.array([[np.cos(radians), np.sin(radians)], [-np.sin(radians), np.cos(radians)]]) * size
    if affine.flip and mirror < 0:
        rows_columns = rows_columns @ np.diag([1, -1])
    extent = np.array(image.shape[:2])
    centre = (extent - 1) / 2
    offset = centre - rows_columns @ centre + np.array([down, right]) * affine.shift * extent
    channels = [
        ndimage.affine_transform(channel, rows_columns, offset, order=1, mode=affine.fill)
        for channel in np.moveaxis(image.astype(np.float64), -1, 0)
    ]
    x = np.stack(channels, axis=-1)
    if not isinstance(colour, Colour):
        return x
    brightness, contrast, saturation = draws[5:]
    if x.shape[-1] == 3:
        grey = x @ [[0.299], [0.587], [0.114]]
        x = grey + (x - grey) * (1 + saturation * colour.saturation)
    x = x.mean() + (x - x.mean()) * (1 + contrast * colour.contrast)
    return np.clip(x + brightness * colour.brightness * 255, 0, 255)


@pytest.mark.parametrize("name", ["digits", "photos"])
@pytest.mark.parametrize("spec", [SPEC, GREY])
def test_a_preset_agrees_with_scipy(name: Augmentation, spec: ImageSpec) -> None:
    preset, images = preset_of(name), random_images(20, spec)
    draws = draws_for(preset, 20)

    expected = [reference(preset, image, own) for image, own in zip(images, draws, strict=True)]

    np.testing.assert_allclose(np.asarray(preset(images, draws)), expected, atol=0.05)


def test_nothing_asked_for_changes_nothing() -> None:
    images = random_images(4, SPEC)

    assert augmented_by(Preset(Affine(), Colour()), images) == pytest.approx(images, abs=0.02)


def test_a_flip_is_exact_and_happens_to_about_half() -> None:
    images = random_images(64, SPEC)
    flipped = augmented_by(Preset(Affine(flip=True)), images)

    same = np.abs(flipped - images).max(axis=(1, 2, 3)) < 0.1
    mirrored = np.abs(flipped - images[:, :, ::-1]).max(axis=(1, 2, 3)) < 0.1
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_digits_stay_upright_and_are_not_mirrored() -> None:
    images = np.zeros((64, 14, 10, 1), "float32")
    images[:, 2:6, 1:3] = 255  # a mark at the upper left
    augmented = augmented_by(preset_of("digits"), images)[..., 0]

    assert (augmented[:, :7, :5].sum(axis=(1, 2)) > 2 * augmented[:, 7:].sum(axis=(1, 2))).all()
    assert (augmented[:, :7, :5].sum(axis=(1, 2)) > 2 * augmented[:, :, 5:].sum(axis=(1, 2))).all()


def test_the_zoom_of_photos_only_comes_nearer() -> None:
    images = np.zeros((32, 21, 21, 1), "float32")
    images[:, 8:13, 8:13] = 255
    nearer = augmented_by(Preset(Affine(zoom=(0.5, 0.9))), images)

    assert (nearer.sum(axis=(1, 2, 3)) > 1.05 * images.sum(axis=(1, 2, 3))).all()


def test_the_same_draws_repeat_and_any_others_differ() -> None:
    preset, images = preset_of("photos"), random_images(5, SPEC)
    augmented = augmented_by(preset, images)

    assert np.array_equal(augmented, augmented_by(preset, images))
    assert not np.allclose(augmented, np.asarray(preset(images, draws_for(preset, 5, step=1))), atol=1)


@pytest.mark.parametrize("name", ["photos", "rand-augment"])
def test_an_image_is_augmented_by_its_own_draws_alone(name: Augmentation) -> None:
    preset, images = preset_of(name, random_erasing=0.5), random_images(5, SPEC)
    draws = draws_for(preset, 5)
    whole = np.asarray(preset(images, draws))
    parts = [np.asarray(preset(images[part], draws[part])) for part in (slice(0, 2), slice(2, 5))]

    assert np.concatenate(parts) == pytest.approx(whole, abs=0.01)


def test_erased_rectangles_have_the_mean_colour_and_the_areas_and_ratios_of_the_paper() -> None:
    spec = ImageSpec(height_px=40, width_px=60, channels=3)
    images = random_images(300, spec)

    erased = augmented_by(Preset(Erasing(probability=0.5)), images)

    changed = (erased != images).any(axis=-1)
    touched = changed.any(axis=(1, 2))
    assert 110 < touched.sum() < 190
    shares = changed[touched].mean(axis=(1, 2))
    assert 0.015 < shares.min() < 0.06
    assert 0.3 < shares.max() < 0.42
    for image, mask, mean in zip(erased[touched], changed[touched], images[touched].mean(axis=(1, 2)), strict=True):
        np.testing.assert_allclose(image[mask], np.broadcast_to(mean, (mask.sum(), 3)), atol=0.01)
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        assert mask.sum() == rows.sum() * columns.sum(), "a rectangle"
        assert np.ptp(np.flatnonzero(rows)) == rows.sum() - 1
    tall = [np.ptp(np.nonzero(mask)[0]) / 40 > np.ptp(np.nonzero(mask)[1]) / 60 for mask in changed[touched]]
    assert 0.3 < np.mean(tall) < 0.7


def test_states_do_not_meet_over_steps_and_generators() -> None:
    generators = [keras.random.SeedGenerator(0) for _ in range(3)]
    states = set()
    for seed in step_seeds(2**32 - 1, steps=range(50)):
        reseed(generators, seed)
        states |= {tuple(np.asarray(generator.state).tolist()) for generator in generators}

    assert len(states) == 50 * 3
    assert len({second for _, second in states}) == 50  # the word that each draw advances


def test_every_generator_of_nested_models_is_found_once() -> None:
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.GaussianNoise(0.1)])
    x = keras.Input((4,))
    outer = keras.Model(x, keras.layers.Dropout(0.1)(inner(x)))
    network = build_classifier(ModelConfig(backbone="cnn_bn"), spec=GREY, num_classes=3).network

    for model, count in [(outer, 3), (network, 1)]:
        states = [variable for variable in model.variables if "seed_generator_state" in variable.path]
        assert len(states) == count
        assert {id(generator.state) for generator in seed_generators(model)} == set(map(id, states))
    assert len(seed_generators(outer, None, outer, network)) == 4
