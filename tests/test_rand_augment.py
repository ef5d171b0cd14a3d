"""rand_augment: each operation against Pillow or SciPy; on TensorFlow, and once more on JAX (test_jax.py)."""

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from mnist_dist.models.rand_augment import FILL, OPERATIONS, RandAugment, apply

H, W = 23, 31
STRENGTHS = (-1.0, -0.3, 0.3, 1.0)


def image(channels: int = 3) -> Any:
    """Bytes with some structure, in a part of the range."""
    random = np.random.default_rng(2)
    smooth = ndimage.gaussian_filter(random.uniform(0, 255, (H, W, channels)), (2, 2, 0))
    stretched = 30 + 190 * (smooth - smooth.min()) / np.ptp(smooth)
    return np.round(stretched + random.uniform(-5, 5, stretched.shape)).astype(np.uint8)


def applied(name: str, strength: float, pixels: np.ndarray) -> Any:
    index = np.array([OPERATIONS.index(name)], np.int32)
    return np.asarray(apply(pixels[None].astype(np.float32), index, np.array([strength], np.float32)))[0]


def by_pillow(name: str, strength: float, pixels: np.ndarray) -> Any:
    picture, amount = Image.fromarray(pixels), abs(strength)
    kept = 1 + 0.9 * strength
    pictures = {
        "identity": lambda: picture,
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(kept),
        "colour": lambda: ImageEnhance.Color(picture).enhance(kept),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(kept),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(kept),
        "posterize": lambda: ImageOps.posterize(picture, 8 - round(4 * amount)),
        "solarize": lambda: ImageOps.solarize(picture, int(np.ceil(256 * (1 - amount)))),
        "auto_contrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
    }
    return np.asarray(pictures[name]()).astype(np.float32)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name == "identity" or name in OPERATIONS[6:]])
def test_values_are_those_of_pillow(name: str, strength: float) -> None:
    pixels = image()
    # Pillow rounds the mean grey, each grey and each result to bytes; a blend makes up to 1.9 times as much of it.
    np.testing.assert_allclose(applied(name, strength, pixels), by_pillow(name, strength, pixels), atol=2.01)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", OPERATIONS[1:6])
def test_moved_images_are_those_of_scipy(name: str, strength: float) -> None:
    pixels, by = image(), {each: (strength if each == name else 0.0) for each in OPERATIONS[1:6]}
    angle = np.deg2rad(30 * by["rotate"])
    rows_columns = np.array(
        [
            [np.cos(angle), 0.3 * by["shear_y"] + np.sin(angle)],
            [0.3 * by["shear_x"] - np.sin(angle), np.cos(angle)],
        ]
    )
    centre = np.array([(H - 1) / 2, (W - 1) / 2])
    shift = np.array([by["translate_y"] * H, by["translate_x"] * W]) * 100 / 331
    offset = centre - rows_columns @ centre + shift
    expected = np.stack(
        [
            ndimage.affine_transform(
                pixels[..., c].astype(float), rows_columns, offset, order=1, mode="grid-constant", cval=FILL
            )
            for c in range(3)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(applied(name, strength, pixels), expected, atol=0.05)


def test_grey_images_have_no_colour_to_change() -> None:
    pixels = image(channels=1)
    np.testing.assert_allclose(applied("colour", 1.0, pixels), pixels, atol=1e-3)
    np.testing.assert_allclose(applied("equalize", 1.0, pixels)[..., 0], by_pillow("equalize", 1.0, pixels[..., 0]))


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "contrast"])
def test_an_image_of_one_value_stays(name: str) -> None:
    pixels = np.full((H, W, 3), 77, np.uint8)
    np.testing.assert_allclose(applied(name, 0.5, pixels), pixels, atol=1e-3)


def test_every_operation_is_drawn_about_equally_often() -> None:
    transform = RandAugment(operations=1, magnitude=30)
    pixels = np.broadcast_to(image(), (700, H, W, 3)).astype(np.float32)
    draws = np.random.default_rng(1).uniform(-1, 1, (700, 2)).astype(np.float32)
    assert transform.draws == 2

    found = np.asarray(transform(pixels, draws))

    outcomes = [
        np.asarray(apply(pixels[:1], np.array([index], np.int32), np.array([sign], np.float32)))[0]
        for index in range(len(OPERATIONS))
        for sign in (-1.0, 1.0)
    ]
    nearest = [int(np.argmin([np.abs(one - outcome).mean() for outcome in outcomes])) // 2 for one in found]
    assert {each for each in range(len(OPERATIONS)) if nearest.count(each) < 20} == set()


def test_a_magnitude_of_zero_moves_nothing() -> None:
    pixels = np.broadcast_to(image(), (60, H, W, 3)).astype(np.float32)
    draws = np.random.default_rng(1).uniform(-1, 3 / 7, (60, 2)).astype(np.float32)  # up to sharpness
    np.testing.assert_allclose(np.asarray(RandAugment(operations=1, magnitude=0)(pixels, draws)), pixels, atol=0.05)
