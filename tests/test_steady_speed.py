"""The speed of work that is under way."""

import pytest

from mnist_dist.data.steady_speed import SteadySpeed


def test_a_job_is_steady_after_its_first_quarter() -> None:
    steady = SteadySpeed(1_000)
    for done, at in [(10, 5.0), (240, 9.0), (260, 10.0), (660, 14.0), (650, 13.9), (1_000, 18.0)]:
        steady.note(done, at=at)
    assert steady.images_per_s == pytest.approx((1_000 - 260) / 8)


@pytest.mark.parametrize("told", [[], [(4, 1.0)], [(1, 1.0), (4, 1.0)]])
def test_of_a_job_that_is_over_at_once_nothing_is_said(told: list[tuple[int, float]]) -> None:
    steady = SteadySpeed(4)
    for done, at in told:
        steady.note(done, at=at)
    assert steady.images_per_s is None
