"""What each setting of a search did: how much of the spread of validation accuracy it explains, by Optuna's fANOVA.

fANOVA fits a random forest to the trials and splits the variance of what it predicts among the settings (Hutter et al.
2014, "An Efficient Approach for Assessing Hyperparameter Importance").

A forest also explains noise. The same computation with the accuracies shuffled among the trials shows how much: what
does not exceed this is no finding.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from mnist_dist.tuning.trials import Trial, usable

MIN_TRIALS = 8
"""Of fewer trials, not even the largest effect would exceed chance."""
SHUFFLES = 19
"""The largest of 19 draws is exceeded by chance once in 20 times."""
MAX_SHUFFLED_TRIALS = 100
"""Of more trials, so many are shuffled: chance explains less of more trials, so this errs on the side of caution."""
MAX_VALUES = 5
"""Numbers with at most so many values count as a choice of these, where each weighs the same."""
LOG_RATIO = 20.0
"""Positive numbers of a wider range than this are drawn, and shown, by their order of magnitude."""
NOT_SET = "none"
_OF_BACKBONE = ("alpha", "image_size_px", "pooling")
"""Settings of which None says that the backbone does not have them."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What one setting did."""

    setting: str
    share: float
    """The share of the variance of validation accuracy that it explains by itself among the trials that drew it,
    0-1."""
    chance: float
    """The largest share that any setting reached when the accuracies were shuffled among these trials, 0-1."""
    values: Mapping[int, Any]
    """Number of the trial -> value, of all trials that drew it and have a result; `NOT_SET` for None."""

    @property
    def is_clear(self) -> bool:
        """Whether the setting explains more than chance does."""
        return self.share > self.chance


def importances(trials: Iterable[Trial]) -> list[Importance]:
    """The settings that differ among the trials, those that explain most first.

    A setting that only some trials draw (the momentum of SGD, the width of one backbone) is compared among these. There
    are none of settings that fewer than `MIN_TRIALS` trials draw, and none if all trials are equally accurate.

    Args:
        trials: of which those with a result count; one that was stopped early, with its best epoch.
    """
    with_result = usable(trials)
    drawn = drawn_settings(with_result)
    accuracy = {trial.number: trial.val_accuracy or 0.0 for trial in with_result}
    groups = defaultdict[frozenset[int], list[str]](list)
    for setting, values in drawn.items():
        groups[frozenset(values)].append(setting)
    found = list[Importance]()
    for numbers, settings in groups.items():
        if len(numbers) >= MIN_TRIALS and len({accuracy[number] for number in numbers}) > 1:
            found += _of_group(sorted(numbers), settings, drawn=drawn, accuracy=accuracy)
    return sorted(found, key=lambda each: (-each.share, each.setting))


def drawn_settings(trials: Sequence[Trial]) -> dict[str, dict[int, Any]]:
    """Setting -> number of the trial -> value, of the settings that have several values.

    What one backbone alone draws counts where trials of this backbone differ; that of other backbones is a fixed value.
    """
    by_name = defaultdict[str, dict[int, tuple[str, Any]]](dict)
    for trial in trials:
        for name, value in trial.params.items():
            setting = name.removeprefix(f"{trial.params['backbone']}.")
            if value is not None or setting not in _OF_BACKBONE:
                by_name[name][trial.number] = (setting, NOT_SET if value is None else value)
    drawn = defaultdict[str, dict[int, Any]](dict)
    for values in by_name.values():
        if len({value for _, value in values.values()}) > 1:
            for number, (setting, value) in values.items():
                drawn[setting][number] = value
    return dict(drawn)


def _of_group(
    numbers: Sequence[int],
    settings: Sequence[str],
    *,
    drawn: Mapping[str, Mapping[int, Any]],
    accuracy: Mapping[int, float],
) -> list[Importance]:
    """The importances of settings that the same trials draw, beside all others that each of these trials draws."""
    beside = [name for name, values in drawn.items() if values.keys() >= set(numbers)]
    columns = {name: [drawn[name][number] for number in numbers] for name in dict.fromkeys((*settings, *beside))}
    accuracies = np.array([accuracy[number] for number in numbers])
    shares = _fanova(columns, accuracies, trees=64)
    chance = _chance(columns, accuracies)
    return [
        Importance(setting=name, share=shares[name], chance=chance, values=drawn[name])
        for name in settings
        if name in shares
    ]


def _chance(columns: Mapping[str, Sequence[Any]], accuracies: np.ndarray[Any, Any]) -> float:
    """The largest share of any column when the accuracies are shuffled."""
    random = np.random.default_rng(0)
    rows = random.permutation(len(accuracies))[:MAX_SHUFFLED_TRIALS]
    fewer = {name: [values[row] for row in rows] for name, values in columns.items()}
    shuffled = (_fanova(fewer, random.permutation(accuracies[rows]), trees=16) for _ in range(SHUFFLES))
    return max(share for shares in shuffled for share in (0.0, *shares.values()))


def _fanova(columns: Mapping[str, Sequence[Any]], accuracies: np.ndarray[Any, Any], *, trees: int) -> dict[str, float]:
    """The share of the forest's variance that each column explains by itself; without columns of a single value."""
    distributions = {name: distribution_of(values) for name, values in columns.items() if len(set(values)) > 1}
    if not distributions or len(set(accuracies.tolist())) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for row, accuracy in enumerate(accuracies.tolist()):
        params = {name: _as_drawn(columns[name][row], each) for name, each in distributions.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=accuracy))
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=trees, seed=0)
    return {name: float(share) for name, share in evaluator.evaluate(study).items()}


def distribution_of(values: Iterable[Any]) -> BaseDistribution:
    """From what values were drawn, judged by the values: a choice, or a range of numbers."""
    distinct = list(dict.fromkeys(values))
    if not is_range(distinct):
        return CategoricalDistribution([str(value) for value in distinct])
    low, high = min(distinct), max(distinct)
    is_log = low > 0 and high / low >= LOG_RATIO
    if all(isinstance(value, int) for value in distinct):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(float(low), float(high), log=is_log)


def is_range(values: Iterable[Any]) -> bool:
    """Whether values are numbers of a range, and not a choice of some."""
    distinct = set(values)
    return len(distinct) > MAX_VALUES and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in distinct
    )


def _as_drawn(value: Any, distribution: BaseDistribution) -> Any:
    return str(value) if isinstance(distribution, CategoricalDistribution) else value
