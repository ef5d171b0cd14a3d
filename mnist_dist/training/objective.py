"""What training minimises and counts: an image has one class (softmax), or any number of them (sigmoid).

Owns: targets, losses and hits, in `keras.ops` for a train step, and the metrics of sets of classes in NumPy. Does not
own: the step (`step`), or the sum over images and workers.
"""

# b = images of a step, n = images, K = classes, L = distinct sets of classes

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from keras import ops


class Objective(Protocol):
    """The loss of a classifier."""

    def targets(self, labels: Any, /) -> tuple[Any, Any]:
        """Probabilities to predict, `float32 [b, K]`, and how much each image counts in the loss, `float32 [b]`.

        Args:
            labels: `int32 [b]`, the numbers of classes, or of sets of classes.
        """

    def losses(self, targets: Any, logits: Any, /) -> Any:
        """The loss of each image, `float32 [b]`, nats; both arguments are `float32 [b, K]`."""

    def hits(self, logits: Any, labels: Any, /) -> Any:
        """`float32 [b]`: 1 where an image is predicted rightly."""


class OneClass:
    """Softmax and cross-entropy.

    Args:
        class_weights: `float32 [K]`, how much the images of each class count.
        smoothing: the share of each target that goes to all classes alike.
    """

    def __init__(self, class_weights: npt.NDArray[np.float32], *, smoothing: float = 0.0) -> None:
        self._class_weights, self._smoothing = class_weights, smoothing

    def targets(self, labels: Any, /) -> tuple[Any, Any]:
        classes, smoothing = len(self._class_weights), self._smoothing
        targets = ops.one_hot(labels, classes, dtype="float32") * (1 - smoothing) + smoothing / classes
        return targets, ops.take(self._class_weights, labels)

    def losses(self, targets: Any, logits: Any, /) -> Any:
        return ops.categorical_crossentropy(targets, logits, from_logits=True)

    def hits(self, logits: Any, labels: Any, /) -> Any:
        """The top class is the label."""
        return ops.cast(ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), labels), "float32")


class AnyClasses:
    """A sigmoid and binary cross-entropy for each class, of which the mean is taken.

    Args:
        members: `bool [L, K]`, whether a class is in a set; a label is the number of a set.
        class_weights: `float32 [K]`, how much an image counts where it has the class, beside 1 where it has not.
        smoothing: targets are moved by half of this from 0 and 1 towards 0.5, as in `keras.losses.BinaryCrossentropy`.
    """

    def __init__(
        self, members: npt.NDArray[np.bool_], class_weights: npt.NDArray[np.float32], *, smoothing: float = 0.0
    ) -> None:
        self._table = (members * (1 - smoothing) + smoothing / 2).astype(np.float32)
        self._members, self._class_weights = members.astype(np.float32), class_weights

    def targets(self, labels: Any, /) -> tuple[Any, Any]:
        targets = ops.take(self._table, labels, axis=0)
        return targets, ops.ones_like(targets[:, 0])

    def losses(self, targets: Any, logits: Any, /) -> Any:
        """See `Objective`. Source of the weights: `pos_weight` of PyTorch's `BCEWithLogitsLoss`."""
        present, absent = ops.softplus(-logits), ops.softplus(logits)
        return ops.mean(self._class_weights * targets * present + (1 - targets) * absent, axis=-1)

    def hits(self, logits: Any, labels: Any, /) -> Any:
        """All classes with a probability of 0.5 and more are those of the image, and no other."""
        has = ops.cast(ops.greater_equal(logits, 0), "float32")
        return ops.cast(ops.all(ops.equal(has, ops.take(self._members, labels, axis=0)), axis=-1), "float32")


def balanced_weights(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Weight of each class in the loss, `float32 [K]`: N / (K x images of the class), as in scikit-learn."""
    return np.asarray(counts.sum() / (len(counts) * np.maximum(counts, 1)), np.float32)


def balanced_positive_weights(counts: npt.NDArray[np.int64], images: int) -> npt.NDArray[np.float32]:
    """Weight of an image that has a class, `float32 [K]`: images without the class / images with it; 1 where all images
    have it, or none."""
    is_some = (counts > 0) & (counts < images)
    return np.where(is_some, (images - counts) / np.maximum(counts, 1), 1.0).astype(np.float32)


def set_metrics(logits: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_]) -> dict[str, float]:
    """The metrics of predicted sets of classes.

    Args:
        logits: `float32 [n, K]`, n at least 1.
        truth: `bool [n, K]`.

    Returns:
        `loss` (mean binary cross-entropy, nats), `accuracy` (share of images whose classes are exactly those with a
        probability of 0.5 and more) and `mean_average_precision` (mean over the classes that have images of
        scikit-learn's `average_precision_score`; 0 where no class has).
    """
    from sklearn.metrics import average_precision_score

    exact = logits.astype(np.float64)
    losses = np.logaddexp(0, np.where(truth, -exact, exact))
    used = truth.any(axis=0)
    return {
        "loss": float(losses.mean()),
        "accuracy": float(((logits >= 0) == truth).all(axis=1).mean()),
        "mean_average_precision": float(average_precision_score(truth[:, used], logits[:, used]))
        if used.any()
        else 0.0,
    }
