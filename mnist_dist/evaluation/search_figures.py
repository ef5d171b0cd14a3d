"""Draws the figures of a search: accuracy against speed, accuracy over time, what a setting did, the finalists' epochs.

Their style is that of `figures`. A trial that ran to its end is a full point, one that was stopped early a ring.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from mnist_dist.evaluation.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    VERMILION,
    label_axes,
    new_figure,
)
from mnist_dist.models.history import Epoch
from mnist_dist.tuning.importance import LOG_RATIO, is_range

COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, INK)
MARKERS = ("o", "s", "^", "D", "v", "P")
MAX_NETWORKS = 12
"""More networks than this share the last colour and mark, as `others`."""
MAX_LINES = 6
TICKS = (1.0, 2.0, 5.0)
MAX_TICKS = 6
GOLDEN = (math.sqrt(5) - 1) / 2  # Its multiples spread evenly over an interval, however many there are.
SPREAD = 0.44
COLUMN_CHARS, SLANTED_CHARS = 36, 16  # What fits below the axis of a small figure.
ROUND_STEPS = (1, 2, 5, 10)
UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
FAR_BELOW = 1.5
"""The axis of accuracies ends so many times the distance of the median from the best below the median: a trial that
learned nothing would leave the others a line."""
Limits = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class TrialPoint:
    """A trial as figures show it."""

    number: int
    network: str
    accuracy: float
    """Validation accuracy, 0-1."""
    is_stopped: bool = False
    images_per_s: float | None = None
    """Speed of scoring. None: not measured."""
    ended_s: float | None = None
    """How long the search had worked when the trial ended, s. None: not known."""
    is_on_front: bool = False
    """No other trial is as accurate and as fast."""
    is_winner: bool = False


def accuracy_limits(accuracies: Sequence[float]) -> Limits:
    """The ends of an axis of accuracies. Those far below the median of all are off the axis, a quarter at most."""
    best, worst = max(accuracies), min(accuracies)
    quarter, median = np.quantile(accuracies, (0.25, 0.5)).tolist()
    low = max(worst, min(quarter, median - FAR_BELOW * max(best - median, 0.02)))
    room = 0.08 * max(best - low, 0.01)
    return low - room, best + room


def front_line(points: Sequence[TrialPoint]) -> list[tuple[float, float]]:
    """The corners of the step line along the Pareto front: speed and accuracy, from the slowest to the fastest.

    From each trial of the front it runs level to the speed of the next faster one, then falls to this one. No trial
    lies beyond it, and on it lie those of the front alone: whatever else were on it would be faster and as accurate, or
    more accurate and as fast, as a trial of the front.
    """
    front = sorted({(p.images_per_s, p.accuracy) for p in points if p.is_on_front and p.images_per_s is not None})
    corners = list[tuple[float, float]]()
    for speed, accuracy in front:
        if corners:
            corners.append((speed, corners[-1][1]))
        corners.append((speed, accuracy))
    return corners


def pareto(points: Sequence[TrialPoint]) -> Figure:
    """Draws accuracy against speed, with the Pareto front.

    Args:
        points: trials, of which those with a speed are drawn.
    """
    figure, (ax,) = new_figure(4.6, 4.0)
    shown = [point for point in points if point.images_per_s is not None]
    limits = accuracy_limits([point.accuracy for point in shown]) if shown else (0.0, 1.0)
    line = front_line(shown)
    ax.plot([x for x, _ in line], [y for _, y in line], color=INK, linewidth=1.3, label="Pareto front", zorder=2)
    for network, (colour, marker) in _network_marks(shown).items():
        of_network = [point for point in shown if _network_name(point.network, shown) == network]
        for front in (False, True):
            some = [point for point in of_network if point.is_on_front is front]
            _scatter_by_speed(ax, some, limits, colour=colour, marker=marker, is_front=front)
        ax.plot([], [], linestyle="", marker=marker, color=colour, label=_label(network))
    winner = [point for point in shown if point.is_winner]
    _ring(ax, [point.images_per_s or 0.0 for point in winner], [point.accuracy for point in winner])
    label_axes(ax, "Accuracy against speed", x="speed of scoring, images/s", y="validation accuracy")
    _set_accuracies(ax, limits, shown)
    _set_numbers(ax, [point.images_per_s or 1.0 for point in shown])
    _legend(figure, ax)
    return figure


def _scatter_by_speed(
    ax: Axes, points: Sequence[TrialPoint], limits: Limits, *, colour: str, marker: str, is_front: bool
) -> None:
    size, opacity, edge = (46, 1.0, INK) if is_front else (20, 0.45, "none")
    xs, ys = [point.images_per_s or 0.0 for point in points], _within(points, limits)
    ax.scatter(
        xs, ys, s=size, color=colour, alpha=opacity, marker=marker, edgecolors=edge, linewidths=0.9, zorder=3 + is_front
    )


def progress(points: Sequence[TrialPoint], finalists: Sequence[TrialPoint], failed_s: Sequence[float]) -> Figure:
    """Draws the accuracy of trials and finalists against the time at which they ended, and the best trial so far.

    Args:
        points: the trials with a result.
        finalists: the trained finalists, with their validation accuracy and time as such.
        failed_s: when trials failed, s.
    """
    figure, (ax,) = new_figure(4.6, 4.0)
    ordered = sorted((p for p in points if p.ended_s is not None), key=lambda point: point.ended_s or 0.0)
    later = [point for point in finalists if point.ended_s is not None]
    times = [point.ended_s or 0.0 for point in (*ordered, *later)] + list(failed_s)
    unit, length_s = time_unit(max(times, default=0.0))
    limits = accuracy_limits([point.accuracy for point in (*ordered, *later)])
    xs = [(point.ended_s or 0.0) / length_s for point in ordered]
    best = np.maximum.accumulate([point.accuracy for point in ordered])
    end = max(times) / length_s
    ax.step([*xs, end], [*best, best[-1]], where="post", color=INK, linewidth=1.3, label="best trial so far", zorder=2)
    _by_status(ax, xs, ordered, limits)
    if later:
        xs, ys = [(point.ended_s or 0.0) / length_s for point in later], [point.accuracy for point in later]
        ax.scatter(xs, ys, s=42, color=ORANGE, marker="D", edgecolors=INK, linewidths=0.9, label="finalist", zorder=4)
        _ring(
            ax, *zip(*[xy for xy, p in zip(zip(xs, ys, strict=True), later, strict=True) if p.is_winner], strict=True)
        )
    if failed_s:
        bottom = [limits[0]] * len(failed_s)
        failed = [time_s / length_s for time_s in failed_s]
        ax.scatter(failed, bottom, s=26, color=VERMILION, marker="x", clip_on=False, label="failed", zorder=4)
    label_axes(ax, "Accuracy over time", x=f"time worked, {unit}", y="validation accuracy")
    _set_accuracies(ax, limits, ordered)
    ax.set_xlim(0, 1.04 * max(end, 1e-9))
    ax.xaxis.set_major_locator(MaxNLocator(MAX_TICKS, steps=ROUND_STEPS))
    _legend(figure, ax)
    return figure


def setting(name: str, values: Mapping[int, Any], points: Sequence[TrialPoint]) -> Figure:
    """Draws the accuracy of trials against what they drew of one setting: over an axis of numbers, or side by side.

    Args:
        name: of the setting, for the axis.
        values: number of a trial -> value.
        points: the trials.
    """
    figure, (ax,) = new_figure(3.6, 2.9)
    shown = [point for point in points if point.number in values]
    limits = accuracy_limits([point.accuracy for point in shown])
    drawn = [values[point.number] for point in shown]
    if is_range(drawn):
        _by_status(ax, drawn, shown, limits)
        _set_numbers(ax, drawn)
    else:
        _side_by_side(ax, drawn, shown, limits)
    label_axes(ax, x=name, y="validation accuracy")
    _set_accuracies(ax, limits, shown)
    return figure


def _side_by_side(ax: Axes, drawn: Sequence[Any], points: Sequence[TrialPoint], limits: Limits) -> None:
    """A column of points for each value of a choice, with a line at their median."""
    distinct = sorted(set(drawn), key=lambda value: (isinstance(value, str), value))
    for place, value in enumerate(distinct):
        own = [point for point, each in zip(points, drawn, strict=True) if each == value]
        offsets = [SPREAD * ((GOLDEN * rank) % 1 - 0.5) for rank in range(len(own))]
        _by_status(ax, [place + offset for offset in offsets], own, limits)
        median = max(float(np.median([point.accuracy for point in own])), limits[0])
        ax.hlines(median, place - 0.32, place + 0.32, color=INK, linewidth=1.6, zorder=2)
    _name_columns(ax, [_value(value) for value in distinct])
    ax.set_xlim(-0.6, len(distinct) - 0.4)
    ax.grid(visible=False, axis="x")


def _name_columns(ax: Axes, names: Sequence[str]) -> None:
    """Ticks with names: in two lines where these fit side by side, else slanted."""
    room = COLUMN_CHARS // len(names)
    lines = [_in_two_lines(name, max_chars=room) for name in names]
    if all("…" not in line for line in lines):
        ax.set_xticks(range(len(names)), lines, color=INK)
    else:
        shorter = [_label(name, SLANTED_CHARS) for name in names]
        ax.set_xticks(range(len(names)), shorter, color=INK, rotation=30, ha="right", rotation_mode="anchor")


def finalist_epochs(histories: Mapping[str, Sequence[Epoch]]) -> Figure:
    """Draws the validation accuracy of each finalist by epoch, and where one begins to be fine-tuned.

    Args:
        histories: name to show -> its epochs.
    """
    figure, (ax,) = new_figure(4.6, 3.2)
    shown = dict(list(histories.items())[:MAX_LINES])
    for (name, history), colour, marker in zip(shown.items(), COLOURS, MARKERS, strict=False):
        epochs, accuracies = [epoch.epoch for epoch in history], [epoch.val_accuracy for epoch in history]
        ax.plot(epochs, accuracies, color=colour, marker=marker, markersize=3.5, linewidth=1.5, label=_label(name, 30))
    label_axes(ax, x="epoch", y="validation accuracy")
    _set_accuracies(ax, accuracy_limits([epoch.val_accuracy for history in shown.values() for epoch in history]))
    ax.xaxis.set_major_locator(MaxNLocator(MAX_TICKS, integer=True))
    _legend(figure, ax)
    return figure


# --- points ----------------------------------------------------------------------------------------------------------


def _by_status(ax: Axes, xs: Sequence[float], points: Sequence[TrialPoint], limits: Limits) -> None:
    """Full points, and rings for trials that were stopped early."""
    for is_stopped, label in ((False, "trial"), (True, "stopped early")):
        kept = [(x, point) for x, point in zip(xs, points, strict=True) if point.is_stopped is is_stopped]
        if kept:
            ax.scatter(
                [x for x, _ in kept],
                _within([point for _, point in kept], limits),
                s=22,
                facecolors="none" if is_stopped else BLUE,
                edgecolors=BLUE,
                alpha=0.8,
                linewidths=1.1,
                label=label,
                clip_on=False,
                zorder=3,
            )


def _within(points: Sequence[TrialPoint], limits: Limits) -> list[float]:
    """The accuracies, with those that are off the axis at its end."""
    return [max(point.accuracy, limits[0]) for point in points]


def _ring(ax: Axes, xs: Sequence[float] = (), ys: Sequence[float] = ()) -> None:
    if len(xs):
        ax.scatter(xs, ys, s=150, facecolors="none", edgecolors=INK, linewidths=1.2, label="winner", zorder=5)


def _network_marks(points: Sequence[TrialPoint]) -> dict[str, tuple[str, str]]:
    """Network -> colour and mark; the same colour comes back with another mark."""
    names = list(dict.fromkeys(_network_name(name, points) for name in sorted({point.network for point in points})))
    places = {name: place for place, name in enumerate(names)}
    return {
        name: (COLOURS[place % len(COLOURS)], MARKERS[(place // len(COLOURS) + place) % len(MARKERS)])
        for name, place in places.items()
    }


def _network_name(name: str, points: Sequence[TrialPoint]) -> str:
    names = sorted({point.network for point in points})
    return name if len(names) <= MAX_NETWORKS or name in names[: MAX_NETWORKS - 1] else "others"


# --- axes ------------------------------------------------------------------------------------------------------------


def _set_accuracies(ax: Axes, limits: Limits, points: Sequence[TrialPoint] = ()) -> None:
    """The axis of accuracies. Below the other axis it says how many points lie off it; they are drawn at its end."""
    ax.set_ylim(*limits)
    ax.yaxis.set_major_locator(MaxNLocator(MAX_TICKS, steps=ROUND_STEPS))
    below = sum(point.accuracy < limits[0] for point in points)
    if below:
        ax.set_xlabel(f"{ax.get_xlabel()}\n({below} below {limits[0]:.2f}, at the edge)")


def _set_numbers(ax: Axes, values: Sequence[float]) -> None:
    """A horizontal axis of numbers: logarithmic where they are positive and far apart, with ticks that never touch."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    if low > 0 and high / low >= LOG_RATIO / 4:
        ax.set_xscale("log")
        ax.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
        ax.xaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        room = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        ax.set_xlim(low - room, high + room)
        ax.xaxis.set_major_locator(MaxNLocator(MAX_TICKS - 1, steps=ROUND_STEPS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))


def log_ticks(low: float, high: float) -> list[float]:
    """At most `MAX_TICKS` ticks of a logarithmic axis: 1, 2 and 5 of each power of ten, 1 and 3, or powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    margin = (high / low) ** 0.05
    for digits in (TICKS, (1.0, 3.0), (1.0,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        within = [tick for tick in ticks if low / margin <= tick <= high * margin]
        if len(within) <= MAX_TICKS:
            return within
    return within[:: -(-len(within) // MAX_TICKS)]


def tick_label(value: float) -> str:
    """A number at a tick: `0.003`, `2,000`, `1e-05`."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which a duration has at least the value two, and its length in seconds."""
    return next(((name, length) for name, length in UNITS if seconds >= 2 * length), ("s", 1.0))


def _legend(figure: Figure, ax: Axes) -> None:
    """A legend below the axes, where it hides no point; each name once."""
    handles, labels = ax.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(
        by_label.values(),
        by_label.keys(),
        loc="outside lower center",
        ncols=3 if all(len(label) < 18 for label in by_label) else 2,
        frameon=False,
        labelcolor=INK,
        fontsize="small",
    )


def _label(name: str, max_chars: int = 24) -> str:
    """A name that fits, without what matplotlib would read as a formula."""
    name = name.rpartition("/")[2]  # Of a bundle, which is named by its URI.
    text = name if len(name) <= max_chars else f"{name[: max_chars - 1]}…"
    return text.replace("$", r"\$")


def _in_two_lines(name: str, max_chars: int) -> str:
    """A name below a tick, broken behind the separator that is nearest to its middle."""
    if len(name) <= max_chars:
        return _label(name)
    breaks = [place + 1 for place, letter in enumerate(name[:-1]) if letter in "_- ./"]
    middle = min(breaks, key=lambda place: abs(place - len(name) / 2), default=len(name))
    return "\n".join(_label(line.strip(), max_chars) for line in (name[:middle], name[middle:]) if line)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
