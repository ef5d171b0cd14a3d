"""Which trials are stopped early: a scheduler of Ray Tune, with a grace period in steps, that outlives its driver.

Owns: the schedulers behind `--scheduler` and the grace period. Does not own: when a trial starts (`tuning.py`).

Ray Tune's schedulers forget everything when the driver dies. `resume` shows them the histories of earlier trials, so
that a resumed search stops trials by the same comparison as an undisturbed one.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from mnist_dist.on_ray.search.trial import ACCURACY, EPOCHS, REPORT
from mnist_dist.search_config import SearchJob
from mnist_dist.tuning.planning import MIN_SAMPLES, REDUCTION
from mnist_dist.tuning.trials import Trial


@dataclass(frozen=True)
class _Known:
    """A trial as far as Ray Tune's schedulers look at it."""

    trial_id: str
    config: dict[str, Any] = field(hash=False)


class EarlyStopping(FIFOScheduler):
    """Stops trials early by the rule that the search asks for, but none within its grace period.

    A trial's results count for the rule, its own and that of others, from the end of its grace period on: an unready
    network says nothing about where the others should be.

    Args:
        job: the search.
        train_images: number of training images.
    """

    def __init__(self, job: SearchJob, *, train_images: int) -> None:
        super().__init__()
        self._job, self._train_images = job, train_images
        self._rules = _rules(job)
        self._rule_of: dict[str, TrialScheduler] = {}

    def resume(self, trials: Iterable[Trial]) -> None:
        """Takes in the histories of finished trials."""
        for trial in trials:
            if trial.status not in ("done", "stopped") or not trial.history:
                continue
            known = _Known(f"known-{trial.number}", config_of(trial))
            self.on_trial_add(None, known)
            result, best = dict[str, Any](), 0.0
            for epoch in trial.history:
                best = max(best, epoch.val_accuracy)
                result = {EPOCHS: epoch.epoch, ACCURACY: best}
                self.on_trial_result(None, known, result)
            self.on_trial_complete(None, known, result)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        number = trial.config["number"]
        sizes = [REDUCTION**place / (place + 1) for place in reversed(range(len(self._rules)))]
        (rule,) = random.Random(f"{self._job.search.seed}-{number}").choices(self._rules, sizes)
        self._rule_of[trial.trial_id] = rule
        rule.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if not self._counts(trial, result):
            return str(TrialScheduler.CONTINUE)
        return str(self._rule_of[trial.trial_id].on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self._counts(trial, result):
            self._rule_of[trial.trial_id].on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._rule_of[trial.trial_id].on_trial_remove(tune_controller, trial)

    def _counts(self, trial: Any, result: dict[str, Any]) -> bool:
        """Whether the rule gets to see a result: not within the grace period, and not that of a failed trial."""
        steps = result.get(EPOCHS, 0) * (self._train_images // trial.config["batch_size"])
        is_failed = REPORT in result and result[REPORT].error is not None
        return not is_failed and steps >= self._job.search.grace_steps


def config_of(trial: Trial) -> dict[str, Any]:
    """What the scheduler needs of a trial, as a part of its configuration on Ray Tune."""
    return {"number": trial.number, "batch_size": trial.params["batch_size"]}


def _rules(job: SearchJob) -> list[TrialScheduler]:
    """Rules of Ray Tune; each trial follows one of them.

    Asynchronous HyperBand is ASHA with several first rungs, of which each trial gets one (Li et al. 2018, 3.2). The
    first ones get the most trials, as in Li et al. 2017 (arXiv:1603.06560). HyperBand itself would have to pause
    trials, for which they would have to save their state.
    """
    epochs = job.search.trial_epochs
    first = max(1, epochs // REDUCTION**2)
    match job.search.scheduler:
        case "none":
            return [FIFOScheduler()]
        case "median":
            return [_median()]
        case "asha":
            return [_halving(first, epochs)]
        case "hyperband":
            rungs = 1 + int(math.log(epochs / first, REDUCTION) + 1e-9)
            return [_halving(first * REDUCTION**place, epochs) for place in range(rungs)]


def _halving(first: int, epochs: int) -> TrialScheduler:
    return AsyncHyperBandScheduler(
        time_attr=EPOCHS, metric=ACCURACY, mode="max", max_t=epochs, grace_period=first, reduction_factor=REDUCTION
    )


def _median() -> TrialScheduler:
    return MedianStoppingRule(
        time_attr=EPOCHS,
        metric=ACCURACY,
        mode="max",
        grace_period=1,
        min_samples_required=MIN_SAMPLES,
        min_time_slice=math.inf,  # It never pauses a trial for lack of samples.
    )
