"""Assigns records to batches and workers by pure functions of numbers, so there is no state to save or restore.

Owns: the order of an epoch, the slice of a global batch that each worker takes, and the random numbers of a step,
among them which images are mixed. Does not own: reading the records.
Contract: global batch *k* of an epoch is entries `[k B, (k + 1) B)` of `epoch_order`, and rank *r* of *N* takes its
`rank_slice` of it. So a run can resume from (epoch, step) alone, with any number of workers.
"""

# B = global batch: the examples of all workers in one step

from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist.config import require

_UINT64 = 2**64
MIXING = 5
"""Numbers that say how an image is mixed with its partner, see `mixing_draws`."""


def epoch_order(count: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits `count` records.

    Args:
        count: number of records, 0 or more.
        seed: seed of the run.
        epoch: number of the epoch, counted from 0.

    Returns:
        `int64 [count]`, a permutation of 0 to count - 1; equal arguments give the same order on any machine.

    Source: Philox4x64, a counter-based generator (Salmon et al., 2011), so that neighbouring keys are independent.
    """
    return _generator(seed, epoch).permutation(count)


def balanced_order(labels: npt.NDArray[np.integer[Any]], *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """An order like `epoch_order`, of as many records, in which the classes are equally frequent, to within one record.

    The records of a class come in turn, shuffled anew each time all of them have been.

    Args:
        labels: `int [count]`, class of each record.
        seed: seed of the run.
        epoch: number of the epoch, counted from 0.

    Returns:
        `int64 [count]`, each 0 to count - 1. Records of small classes repeat, and some of large classes are left out.

    Source: class-balanced sampling, as in Kang et al. 2020, Decoupling representation and classifier for long-tailed
    recognition, arXiv:1910.09217, section 3.
    """
    generator = _generator(seed, epoch)
    classes = generator.permutation(
        np.unique(labels)
    )  # Those that come first get the records that do not divide evenly.
    chosen = list[npt.NDArray[np.int64]]()
    for index, label in enumerate(classes):
        own = np.flatnonzero(labels == label)
        wanted = len(range(index, len(labels), len(classes)))
        rounds = [generator.permutation(own) for _ in range(-(-wanted // len(own)))]
        chosen.append(np.concatenate([*rounds, own[:0]])[:wanted])
    return generator.permutation(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed % _UINT64, epoch % _UINT64], np.uint64)))


def rank_slice(batch_size: int, *, rank: int, workers: int) -> slice:
    """The part of a global batch that one worker takes.

    The parts of all ranks are disjoint, cover the batch and differ by one example at most; none is empty
    (synchronised BatchNorm crashes on an empty part).

    Args:
        batch_size: B, examples in the global batch.
        rank: 0 to workers - 1.
        workers: number of workers, 1 to B.

    Returns:
        A slice into the global batch.

    Raises:
        ConfigError: there are more workers than examples, or `rank` is out of range.
    """
    require(
        1 <= workers <= batch_size,
        "workers is 1 to batch_size (the global batch), so that each worker has an example",
        workers=workers,
        batch_size=batch_size,
    )
    require(0 <= rank < workers, f"rank is 0 to {workers - 1}", rank=rank)
    return slice(batch_size * rank // workers, batch_size * (rank + 1) // workers)


def step_seeds(seed: int, *, steps: range) -> npt.NDArray[np.uint32]:
    """Seeds `uint32 [len(steps), 2]` of whatever a network draws, such as dropout: a function of (seed, global step).

    Source: NumPy's SeedSequence, so that the words of neighbouring steps are unrelated.
    """
    return np.stack([np.random.SeedSequence((seed, step)).generate_state(2) for step in steps])


def augmentation_draws(seed: int, *, steps: range, batch_size: int, count: int) -> npt.NDArray[np.float32]:
    """Random numbers in [-1, 1), `float32 [len(steps), B, count]`: a function of (seed, global step, position in the
    global batch), so that an image is augmented alike whichever worker gets it.

    Args:
        seed: seed of the run.
        steps: global steps.
        batch_size: B, examples in the global batch.
        count: numbers for each image.
    """
    numbers = [each.random((batch_size, count), np.float32) for each in _of_steps(seed, steps, stream=1)]
    return np.stack(numbers) * np.float32(2) - np.float32(1)


def mixing_partners(seed: int, *, steps: range, batch_size: int) -> npt.NDArray[np.int64]:
    """With which image of the global batch each of its images is mixed, `int64 [len(steps), B]`: a permutation per
    step, by (seed, global step)."""
    return np.stack([each.permutation(batch_size) for each in _of_steps(seed, steps, stream=2)])


def mixing_draws(seed: int, *, steps: range, batch_size: int, mixup: float, cutmix: float) -> npt.NDArray[np.float32]:
    """How each image of the global batches is mixed with its partner, by (seed, global step, position).

    Args:
        seed: seed of the run.
        steps: global steps.
        batch_size: B, examples in the global batch.
        mixup: parameter of mixup's Beta distribution, 0: none.
        cutmix: parameter of CutMix's Beta distribution, 0: none. With both, each image gets one of them.

    Returns:
        `float32 [len(steps), B, 5]`: the image's own share outside of the rectangle (1 with CutMix), and the rectangle
        that is its partner's: top, bottom, left and right as shares of height and width (empty with mixup).

    Source: mixup: Zhang et al. 2018, arXiv:1710.09412; CutMix, with a rectangle of the image's proportions about a
    uniformly drawn centre: Yun et al. 2019, arXiv:1905.04899, equation 2. Shares are drawn per image.
    """
    draws = list[npt.NDArray[np.float32]]()
    for generator in _of_steps(seed, steps, stream=3):
        shares = generator.beta(mixup or 1.0, mixup or 1.0, batch_size)
        areas = 1 - generator.beta(cutmix or 1.0, cutmix or 1.0, batch_size)
        centres = generator.random((2, batch_size))
        cuts = generator.random(batch_size) < (0.5 if mixup and cutmix else float(cutmix > 0))
        half = np.sqrt(areas) / 2 * cuts
        edges = np.clip([centres[0] - half, centres[0] + half, centres[1] - half, centres[1] + half], 0, 1)
        draws.append(np.stack([np.where(cuts, 1.0, shares), *edges], axis=-1).astype(np.float32))
    return np.stack(draws)


def _of_steps(seed: int, steps: range, *, stream: int) -> list[np.random.Generator]:
    """A generator for each step; those of other streams are unrelated."""
    return [np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, step, stream)))) for step in steps]
