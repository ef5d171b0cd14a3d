"""early stopping: who lags behind is stopped, but not within its grace period, and not otherwise after a kill."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from harness import an_epoch

from mnist_dist.errors import ConfigError
from mnist_dist.on_ray.search.early_stopping import EarlyStopping
from mnist_dist.on_ray.search.trial import ACCURACY, EPOCHS, REPORT, Report
from mnist_dist.search_config import SearchConfig, SearchJob
from mnist_dist.tuning.trials import Trial

Rule = Literal["asha", "hyperband", "median", "none"]
TRAIN_IMAGES = 1_050
GOOD, BAD = (0.8, 0.9, 0.95, 0.96, 0.97, 0.97, 0.98, 0.98, 0.98), (0.1,) * 9
LATE = (0.1, 0.1, 0.3, 0.8, 0.97, 0.98, 0.99, 0.99, 0.99)


@dataclass(frozen=True)
class OnTune:
    """A trial as Ray Tune's schedulers see it."""

    trial_id: str
    config: dict[str, Any]

    def __hash__(self) -> int:
        return hash(self.trial_id)


def rule(name: Rule, *, grace_steps: int = 0, seed: int = 0) -> EarlyStopping:
    search = SearchConfig(scheduler=name, trial_epochs=9, grace_steps=grace_steps, seed=seed)
    return EarlyStopping(SearchJob(search=search), train_images=TRAIN_IMAGES)


def stopped_after(
    stopping: EarlyStopping, number: int, accuracies: Sequence[float], *, batch_size: int = 10, error: str | None = None
) -> int | None:
    """Runs a trial: the epoch after which it was stopped, None if it came to its end."""
    trial = OnTune(f"trial-{number}", {"number": number, "batch_size": batch_size})
    stopping.on_trial_add(None, trial)
    for epoch in range(1, len(accuracies) + 1):
        result = {EPOCHS: epoch, ACCURACY: max(accuracies[:epoch]), REPORT: report(error)}
        if epoch == len(accuracies):
            break
        if stopping.on_trial_result(None, trial, result) == "STOP":
            stopping.on_trial_complete(None, trial, result)
            return epoch
    stopping.on_trial_complete(None, trial, result)
    return None


def report(error: str | None) -> Report:
    return Report(accuracy=0.0, loss=1.0, epochs=1, parameters=3, seconds=1.0, finished=True, history=(), error=error)


def with_good_ones(stopping: EarlyStopping, *, count: int = 8) -> EarlyStopping:
    for number in range(count):
        assert stopped_after(stopping, number, GOOD) is None
    return stopping


@pytest.mark.parametrize(("name", "epoch"), [("asha", 1), ("median", 1), ("none", None)])
def test_a_trial_that_lags_behind_is_stopped_at_the_first_rung(name: Rule, epoch: int | None) -> None:
    assert stopped_after(with_good_ones(rule(name)), 8, BAD) == epoch


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
@pytest.mark.parametrize(("batch_size", "steps_per_epoch"), [(10, 105), (30, 35), (100, 10)])
def test_no_trial_is_stopped_before_its_own_grace_steps(name: Rule, batch_size: int, steps_per_epoch: int) -> None:
    stopping = with_good_ones(rule(name, grace_steps=250))
    for number in range(8, 20):
        epoch = stopped_after(stopping, number, BAD, batch_size=batch_size)
        assert epoch is None or epoch * steps_per_epoch >= 250
        if (name, batch_size) == ("asha", 10):
            assert epoch == 3


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_slow_starter_comes_to_its_end_with_a_grace_period_alone(name: Rule) -> None:
    assert stopped_after(with_good_ones(rule(name)), 8, LATE) == 1
    assert stopped_after(with_good_ones(rule(name, grace_steps=500)), 8, LATE) is None


@pytest.mark.parametrize("name", ["asha", "median"])
def test_an_unready_or_a_failed_trial_sets_no_mark_for_others(name: Rule) -> None:
    stopping = rule(name, grace_steps=500)
    for number in range(8):
        stopped_after(stopping, number, (0.99,), error="the loss is no number")
        stopped_after(stopping, 10 + number, (0.99, 0.99), batch_size=30)
    assert stopped_after(stopping, 30, BAD) is None


def test_hyperband_gives_some_trials_a_later_first_rung_and_the_same_ones_each_time() -> None:
    epochs = [
        [stopped_after(with_good_ones(rule("hyperband"), count=40), 40 + n, BAD) for n in range(20)] for _ in "ab"
    ]
    assert epochs[0] == epochs[1]
    assert {1, 3} <= set(epochs[0])
    assert epochs[0].count(1) > epochs[0].count(3)


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_resumed_search_stops_trials_as_an_undisturbed_one(name: Rule) -> None:
    histories = [[accuracy - 0.02 * number for accuracy in GOOD] for number in range(6)]
    undisturbed, resumed = rule(name, grace_steps=200), rule(name, grace_steps=200)
    ended = [stopped_after(undisturbed, number, history) for number, history in enumerate(histories)]
    resumed.resume(
        known(number, history[:epoch]) for number, (history, epoch) in enumerate(zip(histories, ended, strict=True))
    )
    for number in range(6, 12):
        probe = [0.75 + 0.03 * number - 0.1, *GOOD[1:]]
        assert stopped_after(resumed, number, probe) == stopped_after(undisturbed, number, probe)
    assert any(stopped_after(resumed, number, BAD) for number in range(12, 20))


def known(number: int, accuracies: Sequence[float]) -> Trial:
    history = tuple(an_epoch(epoch, val_accuracy=value) for epoch, value in enumerate(accuracies, start=1))
    return Trial(number=number, params={"batch_size": 10}, status="done", val_accuracy=0.5, history=history)


def test_what_has_no_result_is_not_compared_with_after_a_kill() -> None:
    stopping = rule("asha")
    trial = known(0, GOOD)
    stopping.resume([replace(trial, status="failed"), replace(trial, status="running"), replace(trial, history=())])
    assert stopped_after(stopping, 1, BAD) is None


def test_a_negative_grace_period_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^grace_steps must be 0 or above\. Received: grace_steps=-1$"):
        SearchConfig(grace_steps=-1)
