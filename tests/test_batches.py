"""batches: order and slices as pure functions."""

import numpy as np
import pytest

from mnist_dist.data.batches import epoch_order, rank_slice
from mnist_dist.errors import ConfigError


@pytest.mark.parametrize("count", [0, 1, 1797])
def test_an_epoch_visits_every_record_once(count: int) -> None:
    order = epoch_order(count, seed=3, epoch=5)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(count))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = [tuple(epoch_order(97, seed=seed, epoch=epoch)) for seed in (-1, 0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 6
    assert tuple(epoch_order(97, seed=0, epoch=1)) == orders[3]


def test_the_order_does_not_change_between_versions() -> None:
    assert epoch_order(10, seed=42, epoch=7).tolist() == [7, 6, 1, 4, 0, 8, 2, 5, 9, 3]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (7, 7), (64, 3), (65, 8), (128, 5)])
def test_slices_are_near_equal_never_empty_and_cover_the_batch(batch_size: int, workers: int) -> None:
    parts = [range(batch_size)[rank_slice(batch_size, rank=rank, workers=workers)] for rank in range(workers)]
    assert [entry for part in parts for entry in part] == list(range(batch_size))
    sizes = {len(part) for part in parts}
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_more_workers_than_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"workers is 1 to batch_size .* Received: workers=5, batch_size=4"):
        rank_slice(4, rank=0, workers=5)
    with pytest.raises(ConfigError, match=r"rank is 0 to 2\. Received: rank=3"):
        rank_slice(9, rank=3, workers=3)
