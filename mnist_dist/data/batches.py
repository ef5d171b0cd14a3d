"""Assigns records to batches and workers by pure functions of numbers, so there is no state to save or restore.

Owns: the order of an epoch, the slice of a global batch that each worker takes, and the random numbers of a step. Does
not own: reading the records.
Contract: global batch *k* of an epoch is entries `[k B, (k + 1) B)` of `epoch_order`, and rank *r* of *N* takes its
`rank_slice` of it. So a run can resume from (epoch, step) alone, with any number of workers.
"""

# B = global batch: the examples of all workers in one step

import numpy as np
import numpy.typing as npt

from mnist_dist.config import require

_UINT64 = 2**64
DRAWS = 8
"""Random numbers of each image in each step, for its augmentation."""


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
    key = np.array([seed % _UINT64, epoch % _UINT64], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


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


def augmentation_draws(seed: int, *, steps: range, batch_size: int, images: slice) -> npt.NDArray[np.float32]:
    """Random numbers in [-1, 1), `float32 [len(steps), b, DRAWS]`: a function of (seed, global step, position in the
    global batch), so that an image is augmented alike whichever worker gets it.

    Args:
        seed: seed of the run.
        steps: global steps.
        batch_size: B, examples in the global batch.
        images: the part of the global batch to return, b examples.
    """
    generators = [np.random.Philox(np.random.SeedSequence((seed, step, 1))) for step in steps]
    numbers = [np.random.Generator(each).random((batch_size, DRAWS), np.float32)[images] for each in generators]
    return np.stack(numbers) * np.float32(2) - np.float32(1)
