"""batches: order and slices as pure functions."""

import numpy as np
import pytest

from mnist_dist.data.batches import balanced_order, epoch_order, mixing_draws, mixing_partners, rank_slice
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


LABELS = np.repeat([4, 0, 7], [100, 3, 17])


def test_a_balanced_epoch_has_each_class_equally_often_and_no_record_of_it_before_its_turn() -> None:
    order = balanced_order(LABELS, seed=3, epoch=1)

    assert len(order) == len(LABELS)
    assert [int((LABELS[order] == label).sum()) for label in (4, 0, 7)] == [40, 40, 40]
    for label in (4, 0, 7):
        times = np.bincount(order[LABELS[order] == label], minlength=len(LABELS))[label == LABELS]
        assert times.max() - times.min() <= 1
    first_half = LABELS[order[:60]]
    assert all(10 < (first_half == label).sum() < 30 for label in (4, 0, 7)), "the classes are shuffled"


def test_a_balanced_order_is_a_function_of_seed_and_epoch_and_divides_what_is_over() -> None:
    orders = [tuple(balanced_order(LABELS[:-1], seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)]

    assert len(set(orders)) == 4
    assert tuple(balanced_order(LABELS[:-1], seed=0, epoch=1)) == orders[1]
    for order in orders:
        assert sorted(int((LABELS[list(order)] == label).sum()) for label in (4, 0, 7)) == [39, 40, 40]
    assert balanced_order(np.zeros(0, np.int32), seed=0, epoch=0).tolist() == []


def test_partners_are_permutations_that_differ_between_steps() -> None:
    partners = mixing_partners(5, steps=range(40), batch_size=12)

    assert partners.shape == (40, 12)
    assert all(sorted(row) == list(range(12)) for row in partners.tolist())
    assert len(set(map(tuple, partners.tolist()))) == 40
    assert np.array_equal(mixing_partners(5, steps=range(30, 40), batch_size=12), partners[30:])


def test_mixup_draws_shares_of_beta_and_no_rectangle() -> None:
    draws = mixing_draws(5, steps=range(50), batch_size=40, mixup=0.4, cutmix=0.0)

    assert draws.shape == (50, 40, 5)
    assert draws.dtype == np.float32
    shares, (top, bottom, left, right) = draws[..., 0], np.moveaxis(draws[..., 1:], -1, 0)
    assert np.array_equal(top, bottom)
    assert np.array_equal(left, right)
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)  # of Beta(a, a)


def test_cutmix_draws_rectangles_of_the_images_proportions() -> None:
    draws = mixing_draws(5, steps=range(50), batch_size=40, mixup=0.0, cutmix=1.0)

    shares, (top, bottom, left, right) = draws[..., 0], np.moveaxis(draws[..., 1:], -1, 0)
    assert (shares == 1).all()
    assert ((top >= 0) & (top <= bottom) & (bottom <= 1) & (left >= 0) & (left <= right) & (right <= 1)).all()
    inside = (top > 0) & (bottom < 1) & (left > 0) & (right < 1)
    assert inside.any()
    np.testing.assert_allclose((bottom - top)[inside], (right - left)[inside], atol=1e-6)
    assert 0.1 < ((bottom - top) * (right - left)).mean() < 0.5


def test_with_both_each_image_gets_one_of_them() -> None:
    draws = mixing_draws(5, steps=range(50), batch_size=40, mixup=0.4, cutmix=1.0)

    is_cut = draws[..., 1] < draws[..., 2]
    assert 0.4 < is_cut.mean() < 0.6
    assert (draws[..., 0][is_cut] == 1).all()
    assert (draws[..., 0][~is_cut] < 1).all()
