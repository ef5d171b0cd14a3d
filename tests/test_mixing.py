"""mixing: mixup and CutMix against NumPy; on TensorFlow, and once more on JAX (test_jax.py)."""

import numpy as np
import pytest

from mnist_dist.data.batches import mixing_draws
from mnist_dist.models.mixing import mixed

B, H, W, C = 30, 9, 14, 3


def batch() -> tuple[np.ndarray, np.ndarray]:
    images, partners = np.random.default_rng(3).uniform(0, 255, (2, B, H, W, C)).astype(np.float32)
    return images, partners


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixed_images_are_those_of_numpy(mixup: float, cutmix: float) -> None:
    images, partners = batch()
    draws = mixing_draws(5, steps=range(1), batch_size=B, mixup=mixup, cutmix=cutmix)[0]

    found, shares = map(np.asarray, mixed(images, partners, draws))

    for index, (share, top, bottom, left, right) in enumerate(draws):
        expected = share * images[index] + (1 - share) * partners[index]
        rows = [row for row in range(H) if top <= (row + 0.5) / H < bottom]
        columns = [column for column in range(W) if left <= (column + 0.5) / W < right]
        expected[np.ix_(rows, columns)] = partners[index][np.ix_(rows, columns)]
        np.testing.assert_allclose(found[index], expected, atol=1e-3)
        cut = len(rows) * len(columns) / (H * W)
        assert shares[index] == pytest.approx(share * (1 - cut), abs=1e-5)


def test_a_whole_share_is_the_image_and_a_whole_rectangle_the_partner() -> None:
    images, partners = batch()
    alone, other = np.array([[1, 0.3, 0.3, 0.2, 0.2]] * B, np.float32), np.array([[1, 0, 1, 0, 1]] * B, np.float32)

    for draws, expected, share in ((alone, images, 1.0), (other, partners, 0.0)):
        found, shares = mixed(images, partners, draws)
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4)
        assert np.asarray(shares).tolist() == [share] * B
