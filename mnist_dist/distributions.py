"""What a search draws a value from: some values, or a range of numbers. The same as Optuna's distributions.

Owns: the two kinds and their arithmetic. Does not own: who draws (`tuning/space.py`), or how a person writes them down
(`tuning/space_file.py`).
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

from mnist_dist.config import require

MAX_STEPS = 100
"""The most values that are counted out of a range, each of which costs features and a measurement of its own."""


@dataclass(frozen=True)
class Choice:
    """One of some values, all alike."""

    values: tuple[Any, ...]

    def grid(self) -> tuple[Any, ...]:
        """The values of a grid search."""
        return self.values

    def at_most(self, limit: int) -> "Choice | None":
        """What is left without the values above a limit; None: nothing."""
        values = tuple(value for value in self.values if value <= limit)
        return Choice(values) if values else None


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number between two ends, both included; a whole one if the ends are."""

    low: float
    high: float
    step: float | None = None
    """Draw only `low`, `low + step`, ... None: every number (of whole ones)."""
    log: bool = False
    """Each order of magnitude is as likely as the next."""

    def __post_init__(self) -> None:
        ends: dict[str, object] = {"low": self.low, "high": self.high}
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        require(finite and self.low <= self.high, "low must be at most high, and both must be numbers", **ends)
        require(not self.log or self.low > 0, "log needs a low above 0", **ends)
        if self.step is None:
            return
        require(not self.log, "choose either step or log", step=self.step, log=True)
        require(0 < self.step < math.inf, "step must be above 0", step=self.step)
        require(
            (self.high - self.low) / self.step < sys.maxsize, "step is too small for this range", **ends, step=self.step
        )
        last = self._on_step(self.high)
        require(
            math.isclose(last, self.high),
            f"high must be low plus a multiple of step, such as {last:g}",
            **ends,
            step=self.step,
        )

    @property
    def is_whole(self) -> bool:
        """Whether it draws whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def grid(self) -> tuple[Any, ...]:
        """The values of a grid search: the ends and the middle (of `log`, the geometric one)."""
        if self.low == self.high:
            return (self.low,)
        middle = self._on_step(math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2)
        return tuple(dict.fromkeys((self.low, middle, self.high)))

    def steps(self) -> tuple[Any, ...]:
        """All values of a range with a step.

        Raises:
            ConfigError: it has none, so the values cannot be counted; or they are too many.
        """
        require(self.step is not None, "a range needs a step here", low=self.low, high=self.high)
        count = round((self.high - self.low) / (self.step or 1))
        require(
            count < MAX_STEPS,
            f"a range has at most {MAX_STEPS} values here, not {count + 1:,}: take a larger step",
            step=self.step,
        )
        return tuple(self._on_step(self.low + place * (self.step or 1)) for place in range(count + 1))

    def at_most(self, limit: int) -> "Range | None":
        """What is left without the numbers above a limit; None: nothing."""
        if self.high <= limit:
            return self
        return replace(self, high=self._on_step(limit)) if self.low <= limit else None

    def _on_step(self, value: float) -> float:
        """The last value that this draws up to another one, which is at least `low`."""
        step = self.step or (1 if self.is_whole else None)
        if step is None:
            return value
        count = math.floor((value - self.low) / step + 1e-9)
        return self.low + count * step


Distribution = Choice | Range
