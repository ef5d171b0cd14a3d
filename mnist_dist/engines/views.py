"""Test-time augmentation: an engine whose answer is the mean over several views of each image.

Owns: the views, on uint8 pixels, and the mean. Does not own: the engine that answers for one view. Probabilities are
averaged, not logits, since not every engine has any.

Source: averaging over crops and mirrored images, Krizhevsky et al. 2012, ImageNet classification with deep
convolutional neural networks, section 4.1.
"""

# B = batch, H = height px, W = width px, C = channels

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt

from mnist_dist.engines.engine import Engine, Outputs, joined
from mnist_dist.images.pixels import Pixels
from mnist_dist.score_config import TtaView

View = Callable[[Pixels], Pixels]
SHIFT = 1 / 28
"""Of height and width: a pixel of a digit of MNIST, 8 px of an image of 224 px."""


class AveragedEngine:
    """An `Engine` that asks another one for each view of a batch, and gives the means of its outputs.

    Args:
        engine: answers for one view.
        views: the views, the image itself among them.
    """

    def __init__(self, engine: Engine, views: Sequence[View]) -> None:
        self._engine, self._views = engine, views
        self.calls_at_once = engine.calls_at_once
        self.num_classes, self.num_features = engine.num_classes, engine.num_features

    @property
    def batch_size(self) -> int:
        """See `Engine`; it may become smaller."""
        return self._engine.batch_size

    def __call__(self, pixels: Pixels) -> Outputs:
        """See `Engine`."""
        answers = [self._answer(view(pixels)) for view in self._views]
        features = [answer.embeddings for answer in answers if answer.embeddings is not None]
        return Outputs(_mean([answer.probabilities for answer in answers]), _mean(features) if features else None)

    def _answer(self, pixels: Pixels) -> Outputs:
        """For one view, in as many calls as it takes: the engine's batch may have become smaller after another view."""
        done, answers = 0, list[Outputs]()
        while done < len(pixels):
            part = pixels[done : done + self._engine.batch_size]
            answers.append(self._engine(part))
            done += len(part)
        return joined(answers)


def _mean(arrays: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    return np.asarray(np.mean(arrays, axis=0, dtype=np.float32))


def with_views(engine: Engine, names: Sequence[TtaView]) -> Engine:
    """The engine itself, or one that averages over the views of these names; see `views_of`."""
    return AveragedEngine(engine, views_of(names)) if names else engine


def views_of(names: Sequence[TtaView]) -> list[View]:
    """The views of an image, itself first: mirrored for `flip`, and moved up, down, left and right for `shift`; with
    both, moved and mirrored, too."""
    flips = (False, True) if "flip" in names else (False,)
    shifts = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)) if "shift" in names else ((0, 0),)
    return [partial(_view, flip=flip, down=down, right=right) for flip, (down, right) in product(flips, shifts)]


def _view(pixels: Pixels, *, flip: bool, down: int, right: int) -> Pixels:
    """Mirrored left to right, and moved by `SHIFT` in the given directions; pixels at the edge repeat."""
    x = pixels[:, :, ::-1] if flip else pixels
    for axis, direction in ((1, down), (2, right)):
        size = x.shape[axis]
        rows = np.arange(size) - direction * max(1, round(size * SHIFT))
        x = np.take(x, rows.clip(0, size - 1), axis=axis) if direction else x
    return np.ascontiguousarray(x)
