"""depth: samples of any type and range become 0-255 by one stated rule."""

import numpy as np
import pytest
from tiffs import Samples

from mnist_dist.images.depth import cmyk_to_rgb, eight_bits, lab_to_rgb, over_white, value_range, ycbcr_to_rgb

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "bits", "expected"),
    [
        (np.array([0, 1, 2, 3], np.uint8), 2, [0, 85, 170, 255]),
        (np.array([0, 2048, 4095], np.uint16), 12, [0, 128, 255]),
        (np.array([0, 5000], np.uint16), 12, [0, 255]),  # outside of its stated range
        (np.array([0, 257, 32768, 65535], np.uint16), None, [0, 1, 128, 255]),
        (np.array([0, 257, 32768, 65535], ">u2"), None, [0, 1, 128, 255]),
        (np.array([-128, 0, 127], np.int8), None, [0, 128, 255]),
        (np.array([-32768, 0, 32767], np.int16), None, [0, 128, 255]),
        (np.array([-512, 0, 511], np.int16), 10, [0, 128, 255]),
        (np.array([0, 7, 255], np.int32), None, [0, 7, 255]),
        (np.array([0, 257, 65535], np.uint32), None, [0, 1, 255]),
        (np.array([10, 70010], np.uint32), None, [0, 255]),
        (np.array([-5, 0, 5], np.int64), None, [0, 128, 255]),
        (np.array([0.0, 0.2, 1.0], np.float32), None, [0, 51, 255]),
        (np.array([0.0, 0.25], np.float16), None, [0, 64]),
        (np.array([0.0, 7.4, 200.0], np.float64), None, [0, 7, 200]),
        (np.array([-1.0, 0.0, 3.0], np.float32), None, [0, 64, 255]),
        (np.array([NAN, 0.2, INF, -INF], np.float32), None, [0, 51, 255, 0]),
        (np.array([1e300, 0.0], np.float64), None, [255, 0]),
        (np.array([NAN, NAN], np.float32), None, [0, 0]),
        (np.array([7.0e9, 7.0e9], np.float32), None, [0, 0]),
        (np.array([False, True]), None, [0, 255]),
    ],
)
def test_samples_scale_by_their_range_or_by_their_values(
    values: Samples, bits: int | None, expected: list[int]
) -> None:
    assert eight_bits(values[None], bits=bits)[0].tolist() == expected


def test_all_samples_share_one_range_however_many_there_are() -> None:
    values = np.linspace(0, 300, 700 * 1000, dtype=np.float32).reshape(700, 1000)
    np.testing.assert_allclose(eight_bits(values), values / 300 * 255, atol=0.51)
    assert value_range(values) == (0.0, 300.0)


def test_views_are_scaled_like_copies() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (300, 500, 4)).astype(np.uint16)
    np.testing.assert_array_equal(eight_bits(values[..., :3]), eight_bits(values)[..., :3])
    wide = np.zeros((2, 300_000, 2), np.float32)
    wide[:, -1] = 1
    assert eight_bits(wide[..., 0])[:, -1].tolist() == [255, 255]


def test_transparency_is_laid_over_white() -> None:
    colours, alpha = np.array([[[100], [100], [100]]], np.uint8), np.array([[255, 128, 0]], np.uint8)
    assert over_white(colours, alpha)[0, :, 0].tolist() == [100, 177, 255]
    assert over_white(colours // 2, alpha, is_premultiplied=True)[0, :, 0].tolist() == [50, 177, 255]


def test_inks_become_rgb() -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [128, 0, 255, 128]]], np.uint8)
    assert cmyk_to_rgb(inks)[0].tolist() == [[255, 255, 255], [0, 255, 255], [0, 0, 0], [63, 127, 0]]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("is_icc", [False, True])
def test_lab_becomes_srgb(bits: int, is_icc: bool) -> None:
    # Source: CIE L*a*b* of sRGB's white, red, green and mid grey under D50.
    colours = [(100.0, 0, 0, [255, 255, 255]), (54.29, 80.8, 69.9, [255, 0, 0]), (87.82, -79.3, 81.0, [0, 255, 0])]
    for lightness, a, b, expected in [*colours, (53.4, 0, 0, [127, 127, 127])]:
        scale = 1 if bits == 8 else 256
        stored = np.array([lightness / 100 * (2**bits - 1), a * scale, b * scale]).round().astype(np.int64)
        stored[1:] = (stored[1:] + (128 * scale if is_icc else 0)) % 2**bits
        samples = stored.astype(f"u{bits // 8}").reshape(1, 1, 3)
        np.testing.assert_allclose(lab_to_rgb(samples, is_icc=is_icc)[0, 0], expected, atol=12 if bits == 8 else 2)


def test_ycbcr_becomes_rgb() -> None:
    samples = np.array([[[76, 85, 255], [150, 44, 21], [29, 255, 107], [90, 128, 128]]], np.uint8)
    expected = [[[254, 0, 0], [0, 255, 1], [0, 0, 254], [90, 90, 90]]]
    np.testing.assert_allclose(ycbcr_to_rgb(samples), expected, atol=1)
