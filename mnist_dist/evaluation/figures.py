"""The figures of a report: one function each, from plain numbers to a matplotlib figure, and a figure as PNG or SVG.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), which the colour-blind can tell apart, and the
`cividis` map (Nuñez et al. 2018, doi:10.1371/journal.pone.0199239). As SVG, whatever is drawn in `INK` takes the colour
of the text around it, so that a figure is legible on a light and on a dark page.
"""

# K = classes, n = images, H, W = height and width px, C = channels

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnist_dist.models.history import Epoch

INK = "#22313f"
"""Of text, axes and lines that are no data."""
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
SPLIT_COLOURS = {"train": BLUE, "validation": ORANGE, "test": GREEN}
MAX_NUMBERS = 20
"""Classes above which the cells of a confusion matrix hold no numbers."""
MAX_TICKS = 60
"""Classes above which axes name only some of them."""
_STYLE: dict[str, Any] = {"color": INK}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image with what is to be said of it."""

    pixels: npt.NDArray[np.uint8]
    """`uint8 [H, W, C]`, C 1 or 3."""
    caption: str
    name: str = ""
    """Where it lies."""


def training_curves(history: Sequence[Epoch]) -> Figure:
    """Loss and accuracy over the epochs, training and validation, the phases marked."""
    figure, axes = _figure(8.0, 3.4, columns=2)
    epochs = [line.epoch for line in history]
    for ax, metric, unit in zip(axes, ("loss", "accuracy"), ("cross-entropy, nats", "share of images"), strict=True):
        marker = "o" if len(history) < 30 else ""
        for prefix, label, colour in (("", "training", BLUE), ("val_", "validation", ORANGE)):
            values = [getattr(line, f"{prefix}{metric}") for line in history]
            ax.plot(epochs, values, color=colour, marker=marker, markersize=3.5, linewidth=1.6, label=label)
        _mark_phases(ax, history)
        ax.set_title(metric.capitalize(), **_STYLE)
        ax.set_xlabel("epoch", **_STYLE)
        ax.set_ylabel(unit, **_STYLE)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(frameon=False, labelcolor=INK, fontsize="small")
    return figure


def _mark_phases(ax: Axes, history: Sequence[Epoch]) -> None:
    for before, line in itertools.pairwise(history):
        if line.phase != before.phase:
            ax.axvline(line.epoch - 0.5, color=INK, linewidth=0.8, linestyle=":")
            ax.annotate(
                f" {line.phase}",
                (line.epoch - 0.5, 0.02),
                xycoords=("data", "axes fraction"),
                color=INK,
                fontsize=8,
            )


def confusion_matrix(matrix: npt.NDArray[np.int64], class_names: Sequence[str]) -> Figure:
    """Rows are the truth, columns the prediction; colour is the share of the row, numbers are images.

    Args:
        matrix: `int64 [K, K]`.
        class_names: K of them.
    """
    classes = len(class_names)
    side = min(11.0, max(3.6, 1.4 + 0.34 * classes))
    figure, (ax,) = _figure(side + 0.9, side)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    drawn = ax.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    bar = figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.03)
    bar.set_label("share of the class", **_STYLE)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    every = max(1, -(-classes // MAX_TICKS))
    places = range(0, classes, every)
    names = [_short(class_names[place]) for place in places]
    size = 9 if classes <= 15 else 7 if classes <= 40 else 5
    ax.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size, color=INK)
    ax.set_yticks(places, names, fontsize=size, color=INK)
    if classes <= MAX_NUMBERS:
        for row, column in np.ndindex(classes, classes):
            if matrix[row, column]:
                colour = "black" if shares[row, column] > 0.5 else "white"
                ax.text(
                    column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=colour, fontsize=size - 2
                )
    ax.set_title("Confusion matrix", **_STYLE)
    ax.set_xlabel("prediction", **_STYLE)
    ax.set_ylabel("truth", **_STYLE)
    ax.grid(visible=False)
    return figure


def reliability(counts: npt.NDArray[np.int64], confidences: npt.NDArray[Any], hits: npt.NDArray[Any]) -> Figure:
    """Accuracy against confidence in equal bins, and how many images each bin holds.

    Args:
        counts: images of each bin.
        confidences: sum of their confidences.
        hits: how many of them are right.
    """
    figure, (ax, below) = _figure(4.8, 4.6, rows=2, heights=(3, 1))
    edges = np.linspace(0, 1, len(counts) + 1)
    width, filled = edges[1], counts > 0
    accuracy = hits[filled] / counts[filled]
    mean = confidences[filled] / counts[filled]
    ax.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="perfectly calibrated")
    ax.bar(edges[:-1][filled] + width / 2, accuracy, width * 0.92, color=BLUE, alpha=0.85, label="accuracy")
    ax.plot(mean, accuracy, "o", color=ORANGE, markersize=4, label="at the mean confidence")
    ax.set_title("Reliability", **_STYLE)
    ax.set_ylabel("accuracy", **_STYLE)
    ax.set_ylim(0, 1.02)
    ax.legend(frameon=False, labelcolor=INK, fontsize="small", loc="upper left")
    below.bar(edges[:-1] + width / 2, counts, width * 0.92, color=GREEN)
    below.set_ylabel("images", **_STYLE)
    below.set_xlabel("confidence", **_STYLE)
    if counts.max(initial=0) > 20:
        below.set_yscale("symlog")
    return figure


def class_distribution(
    counts: Mapping[str, npt.NDArray[np.int64]], class_names: Sequence[str], *, stacked: bool = True
) -> Figure:
    """Images of each class.

    Args:
        counts: by split (or whatever is counted), `int64 [K]`.
        class_names: K of them.
        stacked: bars on top of each other; else side by side.
    """
    classes = len(class_names)
    figure, (ax,) = _figure(9.0, 3.0)
    colours = [*SPLIT_COLOURS.values(), PURPLE, VERMILION]
    bottom, tallest, width = np.zeros(classes), 1.0, 0.8 if stacked else 0.8 / len(counts)
    for place, ((name, of_split), colour) in enumerate(zip(counts.items(), colours, strict=False)):
        x = np.arange(classes) + (0.0 if stacked else (place - (len(counts) - 1) / 2) * width)
        ax.bar(x, of_split, bottom=bottom, color=SPLIT_COLOURS.get(name, colour), label=name, width=width)
        tallest = max(tallest, float((bottom + of_split).max(initial=0)))
        bottom = bottom + of_split if stacked else bottom
    every = max(1, -(-classes // MAX_TICKS))
    places = range(0, classes, every)
    names = [_short(class_names[place]) for place in places]
    crowded = len(names) * max(map(len, names), default=0) > 100
    ax.set_xticks(places, names, rotation=90 if crowded else 0, color=INK)
    ax.set_title("Images of each class", **_STYLE)
    ax.set_ylabel("images", **_STYLE)
    ax.set_xlabel("class", **_STYLE)
    ax.set_ylim(0, 1.18 * tallest)  # room for the legend
    ax.legend(frameon=False, labelcolor=INK, fontsize="small", ncols=len(counts), loc="upper left")
    return figure


def confidence_histogram(counts: npt.NDArray[np.int64]) -> Figure:
    """How confident the predictions are, where no truth is known.

    Args:
        counts: images of equal bins of 0 to 1.
    """
    figure, (ax,) = _figure(5.2, 3.0)
    edges = np.linspace(0, 1, len(counts) + 1)
    ax.bar(edges[:-1] + edges[1] / 2, counts, edges[1] * 0.92, color=BLUE)
    ax.set_title("Confidence of the predictions", **_STYLE)
    ax.set_xlabel("confidence", **_STYLE)
    ax.set_ylabel("images", **_STYLE)
    return figure


def pictures(shown: Sequence[Picture], *, title: str, columns: int = 6) -> Figure:
    """Images in rows, each with its caption."""
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(1.6 * columns, 2.0 * rows + 0.4), layout="constrained")
    figure.suptitle(title, color=INK)
    for place in range(rows * columns):
        ax = figure.add_subplot(rows, columns, place + 1)
        ax.set_axis_off()
        if place < len(shown):
            pixels = shown[place].pixels
            grey = pixels.shape[-1] == 1
            ax.imshow(pixels[..., 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=255)
            lines = [_short(line, most=22, escape=False) for line in shown[place].caption.splitlines()]
            ax.set_title("\n".join(lines), fontsize=7, color=INK, parse_math=False)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as PNG, on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def svg(figure: Figure, *, alt: str) -> str:
    """A figure as an SVG element for a page: on nothing, its ink in the colour of the page's text, with an alt text."""
    import html

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)
    head = f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" '
    return text.replace("<svg ", head, 1)


def _figure(
    width: float, height: float, *, columns: int = 1, rows: int = 1, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with axes in our ink."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=rows > 1, height_ratios=heights)
    axes: list[Axes] = list(grid.flat)
    for ax in axes:
        ax.tick_params(colors=INK, labelsize=8)
        for name, spine in ax.spines.items():
            spine.set_color(INK)
            spine.set_visible(name in ("left", "bottom"))
        ax.grid(color=INK, alpha=0.15, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _short(name: str, most: int = 18, *, escape: bool = True) -> str:
    """Long names of classes are cut; a `$` would be read as mathematics."""
    text = name if len(name) <= most else f"{name[: most - 1]}…"
    return text.replace("$", r"\$") if escape else text
