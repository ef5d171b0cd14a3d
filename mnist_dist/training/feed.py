"""Batches for the step: which images each worker gets in each step, prepared ahead of time.

Owns: gathering each worker's slice of a global batch with its random numbers, and the thread that does so while the
device computes. Does not own: order, slices and numbers themselves (`data/batches.py`). Pixels stay uint8 at stored
size.

B = global batch, b = this worker's slice of it, S = steps in one call, H, W = stored height and width in px,
C = channels.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mnist_dist.data.batches import augmentation_draws, mixing_draws, mixing_partners, rank_slice, step_seeds

Item = TypeVar("Item")


class Rows(Protocol):
    """Training input with one row per image: an array of pixels or features, perhaps larger than memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`[N, ...]`."""

    def __getitem__(self, rows: npt.NDArray[np.integer[Any]], /) -> npt.NDArray[Any]:
        """The rows with these numbers, `[*rows.shape, ...]`."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This worker's place among the workers of a run."""

    rank: int = 0
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Images:
    """The decoded images of all splits.

    `pixels` is `uint8 [N, H, W, C]`, usually memory-mapped, or a frozen backbone's features `[N, D]` in their place;
    `labels` is `int32 [N]`; `train`, `validation` and `test` are `int64` indices into both.
    """

    pixels: Rows
    labels: npt.NDArray[np.int32]
    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


class Examples(NamedTuple):
    """Images with their labels and random numbers: `uint8 [S, b, H, W, C]` (or features, `[S, b, D]`), `int32 [S, b]`
    and `float32 [S, b, n]` in [-1, 1), as many as the augmentation needs, by the position in the global batch.

    In a compiled step, the same as tensors of one step or part of it: without S.
    """

    pixels: Any
    labels: Any
    draws: Any


class StepImages(NamedTuple):
    """What a step is given for each image.

    `partners` are the images that they are mixed with, `mixing` is `float32 [S, b, 5]` (see `mixing_draws`); both are
    empty where images are not mixed.
    """

    own: Examples
    partners: Examples | tuple[()] = ()
    mixing: Any = ()


@dataclass(frozen=True, kw_only=True)
class TrainChunk:
    """The input of one call, S steps of this worker: `seeds` is `uint32 [S, 2]`, the same for all workers."""

    images: StepImages
    seeds: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Which random numbers the images of a step need.

    Args:
        augmentation: how many for the augmentation of an image.
        mixup: see `mixing_draws`.
        cutmix: see `mixing_draws`.
    """

    augmentation: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EvaluationBatch:
    """One batch of this worker; padding has weight 0: `uint8 [b, H, W, C]` (or features), `int32 [b]`,
    `float32 [b]`."""

    pixels: npt.NDArray[Any]
    labels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


def train_chunk(
    images: Images,
    order: npt.NDArray[np.int64],
    *,
    steps: range,
    first_global_step: int,
    batch_size: int,
    seed: int,
    world: World,
    draws: Draws,
) -> TrainChunk:
    """Gathers this worker's slices for several steps of an epoch.

    Args:
        images: all images.
        order: `int64 [N]`, the epoch's permutation of positions in `images.train`.
        steps: steps of the epoch, from 0.
        first_global_step: number of `steps[0]` counted from the start of the run.
        batch_size: B.
        seed: the run's seed.
        world: the worker that gets the slices.
        draws: the random numbers that the images need.
    """
    own = rank_slice(batch_size, rank=world.rank, workers=world.workers)
    batches = order[steps.start * batch_size : steps.stop * batch_size].reshape(len(steps), batch_size)
    global_steps = range(first_global_step, first_global_step + len(steps))
    numbers = augmentation_draws(seed, steps=global_steps, batch_size=batch_size, count=draws.augmentation)

    def examples(positions: npt.NDArray[np.int64]) -> Examples:
        """Those at some positions of each global batch."""
        rows = images.train[np.take_along_axis(batches, positions, axis=1)]
        chosen = np.take_along_axis(numbers, positions[..., None], axis=1)
        return Examples(pixels=images.pixels[rows], labels=images.labels[rows], draws=chosen)

    positions = np.broadcast_to(np.arange(batch_size)[own], (len(steps), own.stop - own.start))
    seeds = step_seeds(seed, steps=global_steps)
    if not (draws.mixup or draws.cutmix):
        return TrainChunk(images=StepImages(own=examples(positions)), seeds=seeds)
    partners = mixing_partners(seed, steps=global_steps, batch_size=batch_size)[:, own]
    mixing = mixing_draws(seed, steps=global_steps, batch_size=batch_size, mixup=draws.mixup, cutmix=draws.cutmix)[
        :, own
    ]
    mixed = StepImages(own=examples(positions), partners=examples(partners), mixing=mixing)
    return TrainChunk(images=mixed, seeds=seeds)


def evaluation_batches(
    images: Images, indices: npt.NDArray[np.int64], *, batch_size: int, world: World
) -> Iterator[Callable[[], EvaluationBatch]]:
    """Yields calls that make the batches of this worker's share of a split. The workers share all images.

    All batches have the same size; padding has weight 0.
    """
    share = indices[world.rank :: world.workers]
    size = max(1, batch_size // world.workers)
    for start in range(0, len(share), size):
        yield partial(_evaluation_batch, images, share[start : start + size], size)


def _evaluation_batch(images: Images, rows: npt.NDArray[np.int64], size: int) -> EvaluationBatch:
    padded = np.pad(rows, (0, size - len(rows)), mode="edge")
    weights = (np.arange(size) < len(rows)).astype(np.float32)
    return EvaluationBatch(pixels=images.pixels[padded], labels=images.labels[padded], weights=weights)


def ahead(calls: Iterable[Callable[[], Item]], *, depth: int = 2) -> Generator[Item, None, None]:
    """Yields each call's result in order. One thread works up to `depth` calls ahead; their errors are raised here."""
    waiting: deque[Future[Item]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as pool:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
