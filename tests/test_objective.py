"""objective: losses against Keras and NumPy, metrics against scikit-learn."""

import keras
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from mnist_dist.training.objective import AnyClasses, OneClass, balanced_positive_weights, set_metrics

# n = images, K = classes, L = sets
N, K = 40, 5
RANDOM = np.random.default_rng(3)
MEMBERS = np.unique(RANDOM.random((12, K)) < 0.4, axis=0)
LABELS = RANDOM.integers(0, len(MEMBERS), N).astype(np.int32)
LOGITS = RANDOM.normal(0, 3, (N, K)).astype(np.float32)
ONES = np.ones(K, np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_is_that_of_keras(smoothing: float) -> None:
    objective = AnyClasses(MEMBERS, ONES, smoothing=smoothing)
    targets, weights = objective.targets(LABELS)
    reference = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=smoothing, reduction=None)
    expected = np.asarray(reference(MEMBERS[LABELS].astype(np.float32), LOGITS))
    assert np.asarray(objective.losses(targets, LOGITS)) == pytest.approx(expected, rel=1e-5)
    assert np.asarray(weights).tolist() == [1.0] * N


def test_positive_weights_count_as_copies_of_the_images() -> None:
    """A class of weight 3 costs an image that has it three times as much."""
    weights = np.array([1, 3, 1, 0.5, 2], np.float32)
    objective = AnyClasses(MEMBERS, weights)
    truth = MEMBERS[LABELS]
    per_class = np.where(truth, weights, 1) * np.logaddexp(0, np.where(truth, -LOGITS, LOGITS))
    losses = np.asarray(objective.losses(objective.targets(LABELS)[0], LOGITS))
    assert losses == pytest.approx(per_class.mean(axis=1), rel=1e-5)


def test_extreme_logits_have_finite_losses() -> None:
    objective = AnyClasses(MEMBERS, ONES)
    losses = objective.losses(objective.targets(LABELS)[0], np.float32(1e4) * np.sign(LOGITS))
    assert np.isfinite(np.asarray(losses)).all()


def test_a_hit_has_exactly_the_classes() -> None:
    logits = np.where(MEMBERS[LABELS], 0.0, -1.0).astype(np.float32)  # A probability of one half counts.
    logits[0] = np.where(logits[0] < 0, 1, logits[0])
    logits[1, :] = -1
    hits = np.asarray(AnyClasses(MEMBERS, ONES).hits(logits, LABELS))
    expected = [((row >= 0) == MEMBERS[label]).all() for row, label in zip(logits, LABELS, strict=True)]
    assert hits.tolist() == [float(each) for each in expected]
    assert 0 < hits.sum() < N


def test_softmax_is_that_of_keras() -> None:
    labels, weights = RANDOM.integers(0, K, N).astype(np.int32), RANDOM.random(K).astype(np.float32)
    objective = OneClass(weights, smoothing=0.1)
    targets, of_image = objective.targets(labels)
    reference = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1, reduction=None)
    expected = np.asarray(reference(np.eye(K, dtype=np.float32)[labels], LOGITS))
    assert np.asarray(objective.losses(targets, LOGITS)) == pytest.approx(expected, rel=1e-5)
    assert np.asarray(of_image) == pytest.approx(weights[labels])


def test_balanced_positive_weights() -> None:
    found = balanced_positive_weights(np.array([10, 50, 90, 0, 100]), 100)
    assert found == pytest.approx([9, 1, 1 / 9, 1, 1])


def test_metrics_of_sets_are_those_of_scikit_learn() -> None:
    truth = MEMBERS[LABELS]
    found = set_metrics(LOGITS, truth)
    probabilities = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    expected = np.mean([average_precision_score(truth[:, k], probabilities[:, k]) for k in range(K)])
    assert found["mean_average_precision"] == pytest.approx(expected)
    assert found["accuracy"] == pytest.approx(np.mean(((LOGITS >= 0) == truth).all(axis=1)))
    losses = -np.where(truth, np.log(probabilities), np.log1p(-probabilities))
    assert found["loss"] == pytest.approx(losses.mean())


def test_classes_without_images_are_left_out_of_the_mean() -> None:
    truth = MEMBERS[LABELS].copy()
    truth[:, 2] = False
    others = [0, 1, 3, 4]
    expected = np.mean([average_precision_score(truth[:, k], LOGITS[:, k]) for k in others])
    assert set_metrics(LOGITS, truth)["mean_average_precision"] == pytest.approx(expected)
    assert set_metrics(LOGITS, np.zeros_like(truth))["mean_average_precision"] == 0.0
