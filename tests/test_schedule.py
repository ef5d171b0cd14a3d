"""schedule: warm-up, constant, cosine."""

import itertools

import numpy as np
import pytest

from mnist_dist.config import OptimizerConfig
from mnist_dist.training.schedule import learning_rates


def rates(phase_steps: int, *, peak: float = 0.8, **options: object) -> list[float]:
    config = OptimizerConfig(**options)  # type: ignore[arg-type]
    found = learning_rates(peak, config=config, steps=range(phase_steps), phase_steps=phase_steps)
    assert found.dtype == np.float32
    assert found.shape == (phase_steps,)
    return [float(rate) for rate in found]


def test_constant_stays_at_the_peak() -> None:
    assert rates(5) == pytest.approx([0.8] * 5)


def test_the_warm_up_rises_linearly_and_ends_at_the_peak() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_cosine_falls_from_the_peak_towards_zero() -> None:
    half = np.sqrt(0.5)
    expected = [0.8, 0.4 * (1 + half), 0.4, 0.4 * (1 - half)]
    assert rates(4, schedule="cosine") == pytest.approx(expected, rel=1e-6)


def test_cosine_begins_when_the_warm_up_ends() -> None:
    half = np.sqrt(0.5)
    expected = [0.4, 0.8, 0.8, 0.4 * (1 + half), 0.4, 0.4 * (1 - half)]
    assert rates(6, schedule="cosine", warmup_steps=2) == pytest.approx(expected, rel=1e-6)


def test_cosine_ends_near_zero_and_never_rises() -> None:
    found = rates(1000, schedule="cosine")
    assert all(later < earlier for earlier, later in itertools.pairwise(found))
    assert 0 < found[-1] < 1e-5


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_steps", [3, 9])
def test_a_warm_up_longer_than_the_phase_reaches_the_peak_in_its_last_step(schedule: str, warmup_steps: int) -> None:
    assert rates(3, schedule=schedule, warmup_steps=warmup_steps, peak=0.9) == pytest.approx([0.3, 0.6, 0.9])


def test_a_phase_of_one_step_takes_it_at_the_peak() -> None:
    assert rates(1, schedule="cosine") == pytest.approx([0.8])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rates_do_not_depend_on_which_steps_are_asked_for_together(schedule: str) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_steps=4)  # type: ignore[arg-type]
    whole = learning_rates(0.1, config=config, steps=range(17), phase_steps=17)
    parts = [learning_rates(0.1, config=config, steps=part, phase_steps=17) for part in (range(5), [5], range(6, 17))]
    assert np.concatenate(parts).tolist() == whole.tolist()
