"""views: test-time augmentation against SciPy, on an engine of its own."""

import numpy as np
import pytest
from scipy import ndimage

from mnist_dist.engines.engine import Outputs
from mnist_dist.engines.views import AveragedEngine, views_of, with_views
from mnist_dist.images.pixels import Pixels
from mnist_dist.score_config import TtaView

B, H, W, C = 3, 30, 57, 3
PIXELS = np.random.default_rng(2).integers(0, 256, (B, H, W, C), dtype=np.uint8)


class Means:
    """An engine whose probabilities are the means of columns, and whose features are those of rows."""

    batch_size, calls_at_once, num_classes = 8, 2, W

    def __init__(self, *, embeddings: bool = False) -> None:
        self.num_features = H if embeddings else 0
        self.asked = list[Pixels]()

    def __call__(self, pixels: Pixels) -> Outputs:
        assert pixels.flags.c_contiguous
        self.asked.append(pixels)
        features = pixels.mean(axis=(2, 3), dtype=np.float32) if self.num_features else None
        return Outputs(pixels.mean(axis=(1, 3), dtype=np.float32) / 255, features)


def moved(down: int, right: int) -> Pixels:
    return np.asarray(ndimage.shift(PIXELS, (0, down, right, 0), order=0, mode="nearest"))


MOVED = [PIXELS, moved(-1, 0), moved(1, 0), moved(0, -2), moved(0, 2)]  # 30 / 28 and 57 / 28 px
FLIPPED = [PIXELS, PIXELS[:, :, ::-1]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), [PIXELS]),
        (("flip",), FLIPPED),
        (("shift",), MOVED),
        (("shift", "flip"), [*MOVED, *(view[:, :, ::-1] for view in (*MOVED[:3], MOVED[4], MOVED[3]))]),
    ],
)
def test_the_views_are_those_of_scipy(names: tuple[TtaView, ...], expected: list[Pixels]) -> None:
    found = [view(PIXELS) for view in views_of(names)]
    assert [view.shape for view in found] == [PIXELS.shape] * len(expected)
    for view, one in zip(found, expected, strict=True):
        assert np.array_equal(view, one)


@pytest.mark.parametrize("embeddings", [False, True])
def test_the_answer_is_the_mean_of_the_views(embeddings: bool) -> None:
    inner = Means(embeddings=embeddings)
    engine = with_views(inner, ("flip", "shift"))

    found = engine(PIXELS)

    assert len(inner.asked) == 10
    answers = [Means(embeddings=embeddings)(np.ascontiguousarray(view)) for view in inner.asked]
    np.testing.assert_allclose(
        found.probabilities, np.mean([each.probabilities for each in answers], axis=0), rtol=1e-6
    )
    assert found.probabilities.dtype == np.float32
    if embeddings:
        assert found.embeddings is not None
        rows = np.mean([each.embeddings for each in answers if each.embeddings is not None], axis=0)
        np.testing.assert_allclose(found.embeddings, rows, rtol=1e-6)
    else:
        assert found.embeddings is None


def test_a_batch_that_became_smaller_is_answered_in_parts() -> None:
    class Halving(Means):
        def __call__(self, pixels: Pixels) -> Outputs:
            assert len(pixels) <= self.batch_size
            answer = super().__call__(pixels)
            self.batch_size = 2  # as when memory ran out for the first view
            return answer

    found = with_views(Halving(embeddings=True), ("flip",))(PIXELS)

    expected = with_views(Means(embeddings=True), ("flip",))(PIXELS)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-6)
    assert found.embeddings is not None
    assert expected.embeddings is not None
    np.testing.assert_allclose(found.embeddings, expected.embeddings, rtol=1e-6)


def test_the_engine_is_otherwise_the_same() -> None:
    inner = Means()
    assert with_views(inner, ()) is inner
    engine = AveragedEngine(inner, views_of(("flip",)))
    assert (engine.batch_size, engine.calls_at_once, engine.num_classes, engine.num_features) == (8, 2, W, 0)
    inner.batch_size = 4  # as when memory runs out
    assert engine.batch_size == 4
