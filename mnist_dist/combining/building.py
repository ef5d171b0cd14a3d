"""Builds the model file of a combination, compares it with its members and measures it, in a process of its own.

Owns: what happens in that process (`engines/steps.py`), so that the driver loads neither Keras nor a runtime. Does not
own: the methods (`soups`, `ensembles`), or the bundle around the file (`combine`).
"""

# N = compared images, K = classes

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnist_dist.combining.ensembles import write_ensemble
from mnist_dist.combining.measuring import Judge, LabelledImages, Measured
from mnist_dist.combining.networks import Network, open_network
from mnist_dist.combining.soups import Average, Weights, greedy_soup, uniform_soup
from mnist_dist.config import CombineMethod
from mnist_dist.engines.calibration import calibration_images
from mnist_dist.engines.engine import use_cpus, use_float32
from mnist_dist.engines.steps import Report, or_error
from mnist_dist.errors import CannotCombine, MnistDistError
from mnist_dist.models.bundle import Bundle

Probabilities = npt.NDArray[np.float64]
COMPARED_IMAGES = 64
MAX_DIFFERENCE = 1e-5
"""Of a probability of the written file from what was computed from its members."""


@dataclass(frozen=True, kw_only=True)
class BuildTask:
    """The input of the process."""

    method: CombineMethod
    bundles: tuple[Bundle, ...]
    """The members, without loaded models; the images of the first one are compared."""
    target: Path
    """The file to write, `.keras` or `.onnx` as the members are."""
    batch_size: int
    images: LabelledImages | None
    """Of a greedy soup not None."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the process found; the file is written."""

    used: tuple[int, ...]
    """Numbers of the members that are in the model."""
    accuracies: tuple[float, ...] | None
    """Validation accuracy of each member; None: not measured."""
    measured: Measured | None
    """Of the written file."""
    max_abs_difference: float


def build(task: BuildTask, report: Report) -> "Built | MnistDistError":
    """Writes the model file; see `or_error`."""
    return or_error(lambda: _Building(task, report).run())


def measure(bundle: Bundle, images: LabelledImages, batch_size: int, report: Report) -> Measured:
    """Measures a bundle on images, in a process of its own."""
    _prepare(bundle.model_path)
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        report(done, len(images.rows))

    judge = Judge(images, batch_size=batch_size, report=count)
    return judge.measure(open_network(bundle.model_path, batch_size=batch_size).probabilities)


def _prepare(file: Path) -> None:
    """Sets Keras' backend up, if the model file needs it."""
    if file.suffix != ".onnx":
        use_cpus(None)
        use_float32()


class _Building:
    """One combination under way."""

    def __init__(self, task: BuildTask, report: Report) -> None:
        self._task, self._report, self._done = task, report, 0
        self._files = [bundle.model_path for bundle in task.bundles]
        _prepare(task.target)
        self._judge: Judge | None = None
        if task.images is not None:
            self._judge = Judge(task.images, batch_size=task.batch_size, report=self._count)

    def run(self) -> Built:
        method, everyone = self._task.method, tuple(range(len(self._files)))
        accuracies = None if self._judge is None else [self._measured(file).accuracy for file in self._files]
        if method == "ensemble":
            used, expected = everyone, self._ensemble()
        elif method == "soup":
            used, expected = everyone, self._poured(uniform_soup(self._readers()))
        else:
            assert accuracies is not None, "a greedy soup is judged"
            used, expected = self._greedy_soup(accuracies)
        apart = float(np.abs(expected - self._predicted(self._open(self._task.target))).max())
        if not apart <= MAX_DIFFERENCE:  # Written so that NaN does not pass.
            raise CannotCombine(
                "the combined model does not predict what its members say, and was not written: a probability differs "
                f"by {apart:.3g}, at most {MAX_DIFFERENCE:g} is allowed"
            )
        return Built(
            used=used,
            accuracies=None if accuracies is None else tuple(accuracies),
            measured=None if self._judge is None else self._measured(self._task.target),
            max_abs_difference=apart,
        )

    # --- the methods: each writes the file, and gives the expected probabilities of the compared images ---

    def _ensemble(self) -> Probabilities:
        write_ensemble(self._files, self._task.target)
        return np.asarray(np.mean([self._predicted(self._open(file)) for file in self._files], axis=0))

    def _poured(self, soup: Average) -> Probabilities:
        network = self._open(self._files[0])
        network.set_weights(soup.weights)
        network.save(self._task.target)
        return self._predicted(network)

    def _greedy_soup(self, accuracies: Sequence[float]) -> tuple[tuple[int, ...], Probabilities]:
        network = self._open(self._files[0])

        def accuracy_of(weights: Weights) -> float:
            assert self._judge is not None
            network.set_weights(weights)
            return self._judge.measure(network.probabilities).accuracy

        soup, taken = greedy_soup(self._readers(), accuracies, accuracy_of)
        return tuple(taken), self._poured(soup)

    # --- networks and images ---

    def _readers(self) -> list[Callable[[], Weights]]:
        return [partial(_weights_of, file, self._task.batch_size) for file in self._files]

    def _open(self, file: Path) -> Network:
        return open_network(file, batch_size=self._task.batch_size)

    def _measured(self, file: Path) -> Measured:
        assert self._judge is not None, "only called where images judge"
        return self._judge.measure(self._open(file).probabilities)

    def _predicted(self, network: Network) -> Probabilities:
        """The probabilities of the compared images, float64 `[N, K]`."""
        size = self._task.batch_size
        batches = calibration_images(self._task.bundles[0], batch_size=size, max_images=COMPARED_IMAGES)
        return np.concatenate([network.probabilities(pixels) for pixels in batches]).astype(np.float64)

    def _count(self, images: int) -> None:
        """Reports progress: each member is measured, the result, and of a greedy soup each candidate."""
        assert self._task.images is not None
        self._done, count = self._done + images, len(self._files)
        rounds = 2 * count if self._task.method == "greedy-soup" else count + 1
        self._report(self._done, rounds * len(self._task.images.rows))


def _weights_of(file: Path, batch_size: int) -> Weights:
    return open_network(file, batch_size=batch_size).weights()
