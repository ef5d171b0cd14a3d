"""Learning rates, one for each step: a pure function of the phase, the configuration and the step."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mnist_dist.config import OptimizerConfig


def learning_rates(
    peak: float, *, config: OptimizerConfig, steps: Sequence[int] | range, phase_steps: int
) -> npt.NDArray[np.float32]:
    """Computes the learning rates of the given steps of a phase.

    Args:
        peak: the phase's learning rate, reached when the warm-up ends.
        config: schedule and length of the warm-up.
        steps: numbers of the steps within the phase, from 0.
        phase_steps: steps of the whole phase.

    Returns:
        `float32 [len(steps)]`. During the warm-up, step s has `peak * (s + 1) / warmup_steps`; then `constant` stays
        at `peak` and `cosine` falls as `peak * (1 + cos(pi * t)) / 2` with t from 0 to 1 over the rest of the phase.

    Source: Goyal et al. 2017 (linear warm-up); Loshchilov and Hutter 2017, SGDR (cosine, one cycle).
    """
    return np.asarray([_rate(peak, config=config, step=step, phase_steps=phase_steps) for step in steps], np.float32)


def _rate(peak: float, *, config: OptimizerConfig, step: int, phase_steps: int) -> float:
    warmup = min(config.warmup_steps, phase_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, phase_steps - warmup))) / 2
