"""Soups: the average of the weights of models of one architecture, of all of them or of those that help.

Owns: the average and the greedy recipe, on arrays alone. Does not own: where weights come from (`networks`), whether
models have one architecture (`architecture`), or the images that judge.

Everything that a model keeps is averaged: kernels and biases, and the statistics of BatchNorm, too. Those are not
computed anew from training images.

Source: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", arXiv:2203.05482: the uniform soup, and the greedy soup of its Recipe 1.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Weights = Sequence[npt.NDArray[np.float32]]
"""The weights of a model, in the order of its file."""
Accuracy = float


class Average:
    """The average of the weights of models, summed in float64.

    Args:
        sums: float64, one array for each weight.
        count: number of models.
    """

    def __init__(self, sums: Sequence[npt.NDArray[np.float64]], count: int) -> None:
        self._sums, self.count = sums, count

    @classmethod
    def of(cls, weights: Weights) -> "Average":
        """The average of one model."""
        return cls([np.asarray(weight, np.float64) for weight in weights], 1)

    def plus(self, weights: Weights) -> "Average":
        """The average with one model more; this one stays as it is."""
        return Average([total + weight for total, weight in zip(self._sums, weights, strict=True)], self.count + 1)

    @property
    def weights(self) -> list[npt.NDArray[np.float32]]:
        """The averaged weights, float32."""
        return [(total / self.count).astype(np.float32) for total in self._sums]


def uniform_soup(models: Sequence[Callable[[], Weights]]) -> Average:
    """The average of all models (arXiv:2203.05482, "uniform soup").

    Args:
        models: each gives the weights of a model, which are read one model at a time.
    """
    average = Average.of(models[0]())
    for read in models[1:]:
        average = average.plus(read())
    return average


def greedy_soup(
    models: Sequence[Callable[[], Weights]],
    accuracies: Sequence[Accuracy],
    accuracy_of: Callable[[Weights], Accuracy],
) -> tuple[Average, list[int]]:
    """The average of the models that do not lower the validation accuracy (arXiv:2203.05482, Recipe 1).

    The models are taken in the order of their validation accuracy, the best first (of equals, the one given first).
    Each one stays in the soup if the soup with it is at least as accurate as the soup without it.

    Args:
        models: each gives the weights of a model.
        accuracies: the validation accuracy of each model, 0-1.
        accuracy_of: the validation accuracy of the model with these weights.

    Returns:
        The average, and the numbers of its models in the order in which they were taken.
    """
    order = sorted(range(len(models)), key=lambda number: -accuracies[number])
    best, *others = order
    soup, taken, accuracy = Average.of(models[best]()), [best], accuracies[best]
    for number in others:
        candidate = soup.plus(models[number]())
        with_it = accuracy_of(candidate.weights)
        if with_it >= accuracy:
            soup, accuracy = candidate, with_it
            taken.append(number)
    return soup, taken
