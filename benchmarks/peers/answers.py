"""Classes and confidences, as the peers write them into their tables."""

# B = batch, K = classes

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answers:
    """The predictions for a batch."""

    predicted_class: list[str]
    confidence: Any
    """`float32 [B]`."""


def answers_of(probabilities: Any, class_names: Sequence[str]) -> Answers:
    """Classes and confidences from probabilities `float32 [B, K]`."""
    indices = probabilities.argmax(axis=1)
    return Answers([class_names[index] for index in indices], probabilities.max(axis=1))
