"""importance: what mattered in made trials is found, what did not is not, and chance is told from it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_searches import made_trials
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from mnist_dist.tuning.importance import MIN_TRIALS, NOT_SET, Importance, distribution_of, drawn_settings, importances
from mnist_dist.tuning.trials import Trial, usable

TRIALS = made_trials(60)


@pytest.fixture(scope="module")
def found() -> dict[str, Importance]:
    return {each.setting: each for each in importances(TRIALS.values())}


def test_the_setting_that_matters_is_told_from_those_that_do_not(found: dict[str, Importance]) -> None:
    first = next(iter(found.values()))
    assert first.setting == "learning_rate"
    assert first.share > 0.5
    assert first.is_clear
    for name in ("dropout", "batch_size"):
        assert found[name].share < 0.1
        assert not found[name].is_clear


def test_settings_are_compared_among_the_trials_that_drew_them(found: dict[str, Importance]) -> None:
    with_result = usable(TRIALS.values())
    with_decay = {trial.number for trial in with_result if trial.params["optimizer"] == "adamw"}
    with_width = {trial.number for trial in with_result if trial.params["backbone"] == "mobilenet_v2"}
    assert found["weight_decay"].values.keys() == with_decay
    assert found["alpha"].values.keys() == found["image_size_px"].values.keys() == with_width
    assert found["learning_rate"].values.keys() == {trial.number for trial in with_result}
    assert "label_smoothing" not in found  # The same for all.
    assert "pooling" not in found


def test_of_noise_nothing_is_clear() -> None:
    random = np.random.default_rng(5)
    trials = [
        replace(trial, val_accuracy=float(random.random())) for trial in made_trials(30).values() if trial.val_accuracy
    ]
    found = importances(trials)
    assert len(found) >= 5
    assert [each.setting for each in found if each.is_clear] == []


def test_too_few_trials_and_equal_ones_tell_nothing() -> None:
    few = usable(TRIALS.values())[: MIN_TRIALS - 1]
    assert importances(few) == []
    assert importances([replace(trial, val_accuracy=0.5) for trial in TRIALS.values()]) == []
    assert importances([]) == []


def test_none_is_a_value_but_of_what_a_backbone_does_not_have() -> None:
    def trial(number: int, **params: Any) -> Trial:
        return Trial(number=number, params=params, status="done", val_accuracy=0.5, val_loss=1.0)

    drawn = drawn_settings(
        [
            trial(0, backbone="cnn", clip_norm=None, **{"cnn.pooling": None}),
            trial(1, backbone="cnn", clip_norm=1.0, **{"cnn.pooling": None}),
            trial(2, backbone="vgg16", clip_norm=1.0, **{"vgg16.pooling": "avg", "vgg16.dropout": 0.5}),
            trial(3, backbone="vgg16", clip_norm=1.0, **{"vgg16.pooling": "max", "vgg16.dropout": 0.5}),
        ]
    )
    assert drawn == {
        "backbone": {0: "cnn", 1: "cnn", 2: "vgg16", 3: "vgg16"},
        "clip_norm": {0: NOT_SET, 1: 1.0, 2: 1.0, 3: 1.0},
        "pooling": {2: "avg", 3: "max"},
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("adam", "sgd"), CategoricalDistribution(["adam", "sgd"])),
        ((0.0, 0.25, 0.5), CategoricalDistribution(["0.0", "0.25", "0.5"])),
        ((1.0, NOT_SET, 2.0, 3.0, 4.0, 5.0), CategoricalDistribution(["1.0", NOT_SET, "2.0", "3.0", "4.0", "5.0"])),
        ((1, 2, 3, 4, 5, 6), IntDistribution(1, 6)),
        ((0, 2, 3, 4, 5, 600), IntDistribution(0, 600)),
        ((1, 2, 3, 4, 5, 600), IntDistribution(1, 600, log=True)),
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), FloatDistribution(0.1, 0.6)),
        ((1e-4, 1e-3, 1e-2, 2e-2, 3e-2, 0.1), FloatDistribution(1e-4, 0.1, log=True)),
    ],
)
def test_values_say_what_they_were_drawn_from(values: tuple[Any, ...], expected: BaseDistribution) -> None:
    assert distribution_of(values) == expected
