"""feed: who gets which images in which step, and the thread that gets them ready."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mnist_dist.data.batches import augmentation_draws, epoch_order, mixing_draws, step_seeds
from mnist_dist.training.feed import (
    Draws,
    EvaluationBatch,
    Examples,
    Images,
    TrainChunk,
    World,
    ahead,
    evaluation_batches,
    train_chunk,
)

COUNT, HEIGHT, WIDTH, CHANNELS = 61, 5, 4, 3
BATCH, STEPS = 7, 5
TRAIN = np.random.default_rng(1).permutation(COUNT)[:41]


@pytest.fixture(scope="module")
def images() -> Images:
    """Images that differ all over, in splits that are not in order."""
    random = np.random.default_rng(2)
    rest = np.setdiff1d(np.arange(COUNT), TRAIN)
    return Images(
        pixels=random.integers(0, 256, (COUNT, HEIGHT, WIDTH, CHANNELS), dtype=np.uint8),
        labels=np.arange(COUNT, dtype=np.int32),  # a label names its image
        train=TRAIN,
        validation=rest[:13],
        test=rest[13:],
    )


@pytest.fixture(scope="module")
def order() -> npt.NDArray[np.int64]:
    return epoch_order(len(TRAIN), seed=3, epoch=2)


def chunk(
    images: Images,
    order: npt.NDArray[np.int64],
    steps: range,
    *,
    world: World | None = None,
    first: int = 100,
    draws: Draws | None = None,
) -> TrainChunk:
    """The steps of an epoch whose first step is number `first` of the run."""
    return train_chunk(
        images,
        order,
        steps=steps,
        first_global_step=first + steps.start,
        batch_size=BATCH,
        seed=11,
        world=world or World(),
        draws=draws or Draws(augmentation=8),
    )


# --- training --------------------------------------------------------------------------------------------------------


def test_a_chunk_holds_the_images_of_its_steps_in_order(images: Images, order: npt.NDArray[np.int64]) -> None:
    found = chunk(images, order, range(1, 4))
    rows = TRAIN[order[BATCH : 4 * BATCH]].reshape(3, BATCH)
    own = found.images.own
    assert len(found) == 3
    assert own.labels.tolist() == rows.tolist()
    assert np.array_equal(own.pixels, images.pixels[rows])
    assert [own.pixels.dtype, own.labels.dtype, found.seeds.dtype] == ["uint8", "int32", "uint32"]
    assert np.array_equal(found.seeds, step_seeds(11, steps=range(101, 104)))
    draws = augmentation_draws(11, steps=range(101, 104), batch_size=BATCH, count=8)
    assert np.array_equal(own.draws, draws)
    assert found.images.partners == ()


MIXING = Draws(augmentation=3, mixup=0.2, cutmix=1.0)


def tensors(chunk: TrainChunk) -> list[npt.NDArray[Any]]:
    """All that is given for each image."""
    return [*chunk.images.own, *chunk.images.partners, chunk.images.mixing]


def test_partners_are_images_of_the_same_global_batch_with_their_own_draws(
    images: Images, order: npt.NDArray[np.int64]
) -> None:
    found = chunk(images, order, range(1, 4), draws=MIXING).images
    assert isinstance(found.partners, Examples)
    for step in range(3):
        places = [found.own.labels[step].tolist().index(label) for label in found.partners.labels[step]]
        assert sorted(places) == list(range(BATCH))
        for name in ("pixels", "draws"):
            assert np.array_equal(getattr(found.partners, name)[step], getattr(found.own, name)[step][places]), name
    expected = mixing_draws(11, steps=range(101, 104), batch_size=BATCH, mixup=0.2, cutmix=1.0)
    assert np.array_equal(found.mixing, expected)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 6, 7])
def test_the_slices_of_all_ranks_are_the_global_batch(
    images: Images, order: npt.NDArray[np.int64], workers: int
) -> None:
    whole = chunk(images, order, range(STEPS), draws=MIXING)
    worlds = [World(rank=rank, workers=workers) for rank in range(workers)]
    parts = [chunk(images, order, range(STEPS), world=world, draws=MIXING) for world in worlds]
    for each, *of_ranks in zip(tensors(whole), *map(tensors, parts), strict=True):
        assert np.array_equal(np.concatenate(of_ranks, axis=1), each)
    assert all(np.array_equal(part.seeds, whole.seeds) for part in parts)


@pytest.mark.parametrize("world", [World(), World(rank=1, workers=3)])
def test_any_cut_of_the_steps_gives_the_same_batches(
    images: Images, order: npt.NDArray[np.int64], world: World
) -> None:
    whole = chunk(images, order, range(STEPS), world=world, draws=MIXING)
    for places in itertools.chain.from_iterable(itertools.combinations(range(1, STEPS), n) for n in range(STEPS)):
        edges = (0, *places, STEPS)
        parts = [chunk(images, order, range(a, b), world=world, draws=MIXING) for a, b in itertools.pairwise(edges)]
        for each, *of_parts in zip(tensors(whole), *map(tensors, parts), strict=True):
            assert np.array_equal(np.concatenate(of_parts), each), edges
        assert np.array_equal(np.concatenate([part.seeds for part in parts]), whole.seeds), edges


def test_an_epoch_of_whole_batches_visits_no_image_twice(images: Images, order: npt.NDArray[np.int64]) -> None:
    seen = chunk(images, order, range(STEPS)).images.own.labels.ravel().tolist()
    assert len(set(seen)) == STEPS * BATCH
    assert set(seen) <= set(TRAIN.tolist())


def test_seeds_and_draws_are_a_function_of_seed_and_step() -> None:
    steps, later = range(40, 60), range(50, 60)
    assert step_seeds(5, steps=steps).shape == (20, 2)
    assert np.array_equal(step_seeds(5, steps=later), step_seeds(5, steps=steps)[10:])
    draws = augmentation_draws(5, steps=steps, batch_size=9, count=8)
    assert draws.shape == (20, 9, 8)
    assert draws.dtype == np.float32
    assert np.array_equal(augmentation_draws(5, steps=later, batch_size=9, count=8), draws[10:])


def test_draws_fill_their_range_and_do_not_repeat() -> None:
    draws = augmentation_draws(5, steps=range(200), batch_size=30, count=8)
    assert -1 <= draws.min() < -0.999
    assert 0.999 < draws.max() < 1
    assert abs(float(draws.mean())) < 0.01
    assert len(np.unique(draws.reshape(-1, 8), axis=0)) == 200 * 30


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_no_two_steps_of_a_run_or_of_its_neighbour_share_a_seed(seed: int) -> None:
    seeds = [step_seeds(each, steps=range(700)) for each in (seed, seed + 1, seed + 2)]
    assert len(np.unique(np.concatenate(seeds), axis=0)) == 3 * 700


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluated(images: Images, indices: npt.NDArray[np.int64], workers: int) -> list[EvaluationBatch]:
    worlds = [World(rank=rank, workers=workers) for rank in range(workers)]
    calls = itertools.chain.from_iterable(evaluation_batches(images, indices, batch_size=6, world=w) for w in worlds)
    return [call() for call in calls]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 12, 13])
def test_over_all_workers_each_image_counts_once(images: Images, workers: int, count: int) -> None:
    indices = images.validation[:count]
    batches = evaluated(images, indices, workers)
    counted = [label for batch in batches for label in batch.labels[batch.weights == 1]]
    assert sorted(counted) == sorted(indices.tolist())
    assert sum(float(batch.weights.sum()) for batch in batches) == count
    assert {len(batch.labels) for batch in batches} == {6 // workers}


def test_what_fills_a_batch_up_has_weight_0(images: Images) -> None:
    batches = evaluated(images, images.validation, 1)
    assert [batch.weights.tolist() for batch in batches] == [[1.0] * 6, [1.0] * 6, [1.0] + [0.0] * 5]
    for batch in batches:
        assert np.array_equal(batch.pixels, images.pixels[batch.labels])
        assert [batch.pixels.dtype, batch.labels.dtype, batch.weights.dtype] == ["uint8", "int32", "float32"]


def test_a_worker_without_images_has_no_batch(images: Images) -> None:
    assert list(evaluation_batches(images, images.test[:2], batch_size=6, world=World(rank=2, workers=3))) == []


def test_more_workers_than_images_in_a_batch_get_one_each(images: Images) -> None:
    batches = evaluated(images, images.validation, 4)
    few = [call() for call in evaluation_batches(images, images.test, batch_size=2, world=World(rank=3, workers=4))]
    assert {len(batch.labels) for batch in batches + few} == {1}


# --- ahead -----------------------------------------------------------------------------------------------------------


class Calls:
    """Calls that give their number, noted when they begin; one of them may fail."""

    def __init__(self, count: int, *, fails: int | None = None) -> None:
        self.count, self.fails = count, fails
        self.begun: list[int] = []

    def __iter__(self) -> Iterator[Callable[[], int]]:
        return (partial(self._call, number) for number in range(self.count))

    def _call(self, number: int) -> int:
        self.begun.append(number)
        if number == self.fails:
            raise RuntimeError(f"call {number} failed")
        return number


def feed_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("feed")]


@pytest.mark.parametrize("depth", [0, 1, 2, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_results_come_in_order(count: int, depth: int) -> None:
    assert list(ahead(Calls(count), depth=depth)) == list(range(count))
    assert feed_threads() == []


def test_one_thread_works_ahead_and_no_further_than_asked() -> None:
    calls = Calls(9)
    with closing(ahead(calls, depth=2)) as results:
        assert calls.begun == []
        assert next(results) == 0
        while len(calls.begun) < 3:
            time.sleep(0.001)
        time.sleep(0.01)
        assert calls.begun == [0, 1, 2]
        assert len(feed_threads()) == 1


def test_an_error_comes_after_the_results_before_it() -> None:
    results = ahead(Calls(7, fails=3))
    assert [next(results), next(results), next(results)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="call 3 failed"):
        next(results)
    assert feed_threads() == []


def test_an_error_in_making_the_calls_ends_the_thread() -> None:
    def broken() -> Iterator[Callable[[], int]]:
        yield lambda: 0
        raise RuntimeError("no more calls")

    with pytest.raises(RuntimeError, match="no more calls"):
        list(ahead(broken()))
    assert feed_threads() == []


def test_closing_early_ends_the_thread() -> None:
    calls = Calls(1000)
    with closing(ahead(calls, depth=2)) as results:
        next(results)
        next(results)
    assert feed_threads() == []
    assert len(calls.begun) <= 4
