"""The forecast of a search from what its networks cost on a sample.

Owns: the arithmetic. Does not own: running the sample (`on_ray/search/plan.py`).

Before a search, nobody knows which networks the sampler will prefer: every backbone counts the same, and so does
every size, width and way to train within a backbone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mnist_dist.search_config import SearchConfig, SearchJob
from mnist_dist.tuning.budget import FINALISTS_SHARE
from mnist_dist.tuning.space import architectures_of

REDUCTION = 3
"""asha, hyperband: one in this many trials that reach a rung continues, as in Li et al. 2018 (arXiv:1810.05934). The
first rung is at this to the power of -2."""
MIN_SAMPLES = 3
"""median: the other trials that must have reached the epoch."""
Way = tuple[str, str]
"""An architecture's name, and how it is trained: `head`, `fine-tune` or `all`."""


@dataclass(frozen=True, kw_only=True)
class TrialCost:
    """What a trial costs."""

    setup_s: float
    """To build the network and compile its step."""
    epoch_s: float
    """An epoch on all images, with validation."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the parts of a search cost."""

    start_s: float
    """Until the cluster is there and the images are listed."""
    decoding_s: float
    features_s: Mapping[str, float]
    """Features of an architecture, by its name."""
    process_s: float
    """To start a process with TensorFlow."""
    trials: Mapping[Way, TrialCost]
    finalists_s: Mapping[Way, float]
    """A finalist from its start to its end."""
    test_s: float
    """The test of the winner, and its bundle."""


@dataclass(frozen=True, kw_only=True)
class SearchForecast:
    """How long a search will take."""

    parts: Mapping[str, float]
    """`decoding`, `features`, `trials`, `finalists`, s."""
    finalists: int
    """How many there will be."""
    trials_at_most_s: float
    """The trials, if none of them is stopped early."""
    seconds: float

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def chances(job: SearchJob) -> dict[Way, float]:
    """How likely a trial is of each architecture and way to train it."""
    found = dict[Way, float]()
    for space in job.backbones:
        ways = [(each.name, trained) for each in architectures_of(space) for trained in space.trained]
        found |= {way: 1 / (len(job.backbones) * len(ways)) for way in ways}
    return found


def mean_epochs(search: SearchConfig, *, grace_epochs: int = 0) -> float:
    """Epochs of a mean trial, if the order of merit of the trials is random, and the same in each epoch.

    Args:
        search: decides which trials are stopped early.
        grace_epochs: no trial is stopped before this epoch.
    """
    rules = [_compared_after(epochs, grace_epochs, search) for epochs in _rungs(search)]
    sizes = np.array([REDUCTION**place / (place + 1) for place in reversed(range(len(rules)))])
    random = np.random.default_rng(0)
    merits, chosen = random.random(search.trials), random.choice(len(rules), search.trials, p=sizes / sizes.sum())
    is_median = search.scheduler == "median"
    percentile, needed = (50.0, MIN_SAMPLES) if is_median else (100 * (1 - 1 / REDUCTION), 1)
    total = 0
    for merit, rule in zip(merits, chosen, strict=True):
        total += search.trial_epochs
        for epoch, others in rules[rule].items():
            is_behind = len(others) >= needed and merit < np.percentile(others, percentile)
            others.append(float(merit))
            if is_behind:
                total += epoch - search.trial_epochs
                break
    return total / search.trials


def _rungs(search: SearchConfig) -> list[list[int]]:
    """For each rule that a trial may follow: after which epochs it may be stopped."""
    first = max(1, search.trial_epochs // REDUCTION**2)
    powers = math.log(search.trial_epochs / first, REDUCTION)
    rungs = [first * REDUCTION**power for power in range(math.ceil(powers))]
    match search.scheduler:
        case "none":
            return [[]]
        case "median":
            return [[1]]
        case "asha":
            return [rungs]
        case "hyperband":
            return [rungs[place:] for place in range(1 + int(powers + 1e-9))]


def _compared_after(epochs: list[int], grace_epochs: int, search: SearchConfig) -> dict[int, list[float]]:
    """The epochs after which trials are compared, each with the merits that were seen there."""
    later = sorted({max(epoch, grace_epochs) for epoch in epochs})
    return {epoch: [] for epoch in later if epoch < search.trial_epochs}


def forecast(job: SearchJob, costs: Costs, *, concurrent: int, at_once: int, grace_epochs: int = 0) -> SearchForecast:
    """Forecasts a search.

    Args:
        job: the search.
        costs: what its parts cost.
        concurrent: how many trials run at the same time.
        at_once: how many finalists do.
        grace_epochs: no trial is stopped early before this epoch.
    """
    likely, trials = chances(job), job.search.trials
    rounds = math.ceil(trials / concurrent)

    def all_trials_s(epochs: float) -> float:
        mean_s = sum(likely[way] * (cost.setup_s + epochs * cost.epoch_s) for way, cost in costs.trials.items())
        return costs.process_s + rounds * mean_s

    features_s = sum((_is_tried(name, likely, trials) * seconds for name, seconds in costs.features_s.items()), 0.0)
    mean_finalist_s = sum(likely[way] * seconds for way, seconds in costs.finalists_s.items())
    finalists = min(trials, job.search.finalists)
    room_s = math.inf if job.search.hours is None else FINALISTS_SHARE * job.search.hours * 3600
    while finalists > 1 and math.ceil(finalists / at_once) * mean_finalist_s > room_s:
        finalists -= 1
    parts = {
        "decoding": costs.decoding_s,
        "features": features_s,
        "trials": all_trials_s(mean_epochs(job.search, grace_epochs=grace_epochs)),
        "finalists": math.ceil(finalists / at_once) * mean_finalist_s,
    }
    at_most_s = all_trials_s(job.search.trial_epochs)
    if job.search.hours is not None:
        others_s = costs.start_s + sum(seconds for name, seconds in parts.items() if name != "trials")
        left_s = max(0.0, job.search.hours * 3600 - others_s)
        parts["trials"], at_most_s = min(parts["trials"], left_s), min(at_most_s, left_s)
    seconds = costs.start_s + sum(parts.values()) + costs.test_s
    return SearchForecast(parts=parts, finalists=finalists, trials_at_most_s=at_most_s, seconds=seconds)


def _is_tried(name: str, likely: Mapping[Way, float], trials: int) -> float:
    """How likely it is that any trial needs the features of an architecture."""
    chance = sum(each for (architecture, trained), each in likely.items() if architecture == name and trained != "all")
    return 1 - (1 - chance) ** trials
