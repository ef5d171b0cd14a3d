"""Draws the figures of a report from plain numbers, with one function per figure, and encodes them as PNG or SVG.

The colours are those of Okabe and Ito (2008, "Color Universal Design"), which colour-blind people can tell apart. In an
SVG, everything drawn in `INK` takes the
colour of the surrounding text, and the colours of data become variables of the page's style (`page.css`), so that a
figure is legible on light and dark pages.
"""

# K = classes, H, W = height and width px, C = channels

import html
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnist_dist.models.history import Epoch

INK = "#22313f"
"""Colour of text, axes and all lines that show no data."""
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_VARIABLES = {"blue": BLUE, "orange": ORANGE, "green": GREEN, "vermilion": VERMILION, "purple": PURPLE}
SPLIT_COLOURS = {"train": BLUE, "validation": ORANGE, "test": GREEN}
MAX_NUMBERS = 20
"""A confusion matrix of more classes than this shows no numbers in its cells."""
MAX_TICKS = 60
"""An axis names at most this many classes."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image with a caption."""

    pixels: npt.NDArray[np.uint8]
    """`uint8 [H, W, C]`, C 1 or 3."""
    caption: str


def training_curves(history: Sequence[Epoch]) -> Figure:
    """Draws the loss and accuracy of training and validation by epoch, and marks where a phase begins."""
    figure, axes = new_figure(8.0, 3.4, columns=2)
    epochs = [epoch.epoch for epoch in history]
    for ax, metric, unit in zip(axes, ("loss", "accuracy"), ("cross-entropy, nats", "share of images"), strict=True):
        marker = "o" if len(history) < 30 else ""
        for prefix, label, colour in (("", "training", BLUE), ("val_", "validation", ORANGE)):
            values = [getattr(epoch, f"{prefix}{metric}") for epoch in history]
            ax.plot(epochs, values, color=colour, marker=marker, markersize=3.5, linewidth=1.6, label=label)
        _mark_phases(ax, history)
        label_axes(ax, metric.capitalize(), x="epoch", y=unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(frameon=False, labelcolor=INK, fontsize="small")
    return figure


def _mark_phases(ax: Axes, history: Sequence[Epoch]) -> None:
    for before, epoch in itertools.pairwise(history):
        if epoch.phase != before.phase:
            x = epoch.epoch - 0.5
            ax.axvline(x, color=INK, linewidth=0.8, linestyle=":")
            ax.annotate(f" {epoch.phase}", (x, 0.02), xycoords=("data", "axes fraction"), color=INK, fontsize=8)


def confusion_matrix(matrix: npt.NDArray[np.int64], class_names: Sequence[str]) -> Figure:
    """Draws a confusion matrix; its numbers count images.

    The colour is blue where a prediction is right and orange where it is wrong, as strong as the share of the row; of
    mistakes, as its square root, so that rare ones are seen.

    Args:
        matrix: images by true class (row) and predicted class (column), `int64 [K, K]`.
        class_names: K names.
    """
    classes = len(class_names)
    side = min(11.0, max(3.6, 1.4 + 0.34 * classes))
    figure, (ax,) = new_figure(side + 0.4, side)
    ax.imshow(_coloured(matrix), interpolation="nearest")
    ticks, names = class_ticks(class_names)
    size = 9 if classes <= 15 else 7 if classes <= 40 else 6
    ax.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size, color=INK)
    ax.set_yticks(ticks, names, fontsize=size, color=INK)
    if classes <= MAX_NUMBERS:
        for row, column in np.argwhere(matrix):
            images = f"{matrix[row, column]:,}"
            ax.text(column, row, images, ha="center", va="center", color=INK, fontsize=size - 2)
    label_axes(ax, "Confusion matrix", x="prediction", y="truth")
    ax.grid(visible=False)
    return figure


def _coloured(matrix: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The cells of a confusion matrix as colours, `float64 [K, K, 4]`: transparent where there is no image."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    colours = np.zeros((*matrix.shape, 4))
    colours[..., :3] = to_rgb(ORANGE)
    colours[..., 3] = np.sqrt(shares)
    right = np.diag_indices(len(matrix))
    colours[right] = [(*to_rgb(BLUE), 0.6 * share) for share in shares.diagonal()]
    return colours


def reliability(
    counts: npt.NDArray[np.int64], confidences: npt.NDArray[Any], hits: npt.NDArray[Any], *, wide: bool = False
) -> Figure:
    """Draws accuracy against confidence in bins of equal width, and the number of images in each bin.

    Args:
        counts: number of images in each bin.
        confidences: sum of the confidences in each bin.
        hits: number of correct predictions in each bin.
        wide: draws both side by side; otherwise the images stand below the accuracy.
    """
    if wide:
        figure, (ax, below) = new_figure(9.0, 3.4, columns=2)
    else:
        figure, (ax, below) = new_figure(4.8, 4.6, rows=2, heights=(3, 1))
    edges = np.linspace(0, 1, len(counts) + 1)
    width, filled = edges[1], counts > 0
    accuracy = hits[filled] / counts[filled]
    mean = confidences[filled] / counts[filled]
    ax.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="perfectly calibrated")
    ax.bar(edges[:-1][filled] + width / 2, accuracy, width * 0.92, color=BLUE, alpha=0.85, label="accuracy")
    ax.plot(mean, accuracy, "o", color=ORANGE, markersize=4, label="at the mean confidence")
    label_axes(ax, "" if wide else "Reliability", x="confidence" if wide else "", y="accuracy")
    ax.set_ylim(0, 1.02)
    figure.legend(frameon=False, labelcolor=INK, fontsize="small", loc="outside upper left", ncols=3, columnspacing=1)
    below.bar(edges[:-1] + width / 2, counts, width * 0.92, color=GREEN)
    label_axes(below, x="confidence", y="images")
    if counts.max(initial=0) > 20:
        below.set_yscale("symlog")
    return figure


def class_distribution(
    counts: Mapping[str, npt.NDArray[np.int64]], class_names: Sequence[str], *, stacked: bool = True
) -> Figure:
    """Draws the number of images of each class as bars.

    Args:
        counts: images of each class by split or other series, `int64 [K]`.
        class_names: K names.
        stacked: stacks the bars of a class; otherwise they stand side by side.
    """
    classes = len(class_names)
    figure, (ax,) = new_figure(9.0, 3.0)
    colours = [*SPLIT_COLOURS.values(), PURPLE, VERMILION]
    room = 0.8 * min(1.0, max(classes, 1) / 6)  # Few classes get no fat bars.
    bottom, tallest, width = np.zeros(classes), 1.0, room if stacked else room / len(counts)
    for series, ((name, images), colour) in enumerate(zip(counts.items(), colours, strict=False)):
        x = np.arange(classes) + (0.0 if stacked else (series - (len(counts) - 1) / 2) * width)
        ax.bar(x, images, bottom=bottom, color=SPLIT_COLOURS.get(name, colour), label=name, width=width)
        tallest = max(tallest, float((bottom + images).max(initial=0)))
        bottom = bottom + images if stacked else bottom
    ticks, names = class_ticks(class_names)
    crowded = len(names) * max(map(len, names), default=0) > 100
    ax.set_xticks(ticks, names, rotation=90 if crowded else 0, color=INK)
    label_axes(ax, "Images of each class", x="class", y="images")
    ax.grid(visible=False, axis="x")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(0, 1.18 * tallest)  # Leaves room for the legend.
    ax.legend(frameon=False, labelcolor=INK, fontsize="small", ncols=len(counts), loc="upper left")
    return figure


def confidence_histogram(counts: npt.NDArray[np.int64]) -> Figure:
    """Draws how confident the predictions are; for tables without labels.

    Args:
        counts: number of images in bins of equal width from 0 to 1.
    """
    figure, (ax,) = new_figure(9.0, 2.6)
    edges = np.linspace(0, 1, len(counts) + 1)
    ax.bar(edges[:-1] + edges[1] / 2, counts, edges[1] * 0.92, color=BLUE)
    label_axes(ax, "Confidence of the predictions", x="confidence", y="images")
    return figure


def pictures(shown: Sequence[Picture], *, title: str, columns: int = 6) -> Figure:
    """Draws a grid of images with their captions."""
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(1.6 * columns, 2.0 * rows + 0.4), layout="constrained")
    figure.suptitle(title, color=INK)
    for cell in range(rows * columns):
        ax = figure.add_subplot(rows, columns, cell + 1)
        ax.set_axis_off()
        if cell < len(shown):
            pixels = shown[cell].pixels
            grey = pixels.shape[-1] == 1
            ax.imshow(pixels[..., 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=255)
            lines = [_short(line, max_chars=22, escape=False) for line in shown[cell].caption.splitlines()]
            ax.set_title("\n".join(lines), fontsize=7, color=INK, parse_math=False)
    return figure


def png(figure: Figure) -> bytes:
    """Encodes a figure as PNG on a white background."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def svg(figure: Figure, *, alt: str, title: str = "") -> str:
    """Encodes a figure as a transparent SVG element, drawn in the colours of the page that contains it.

    Args:
        figure: the figure.
        alt: the text for those who do not see it.
        title: what the page writes above it, and the figure therefore does not repeat.
    """
    buffer = io.StringIO()
    repeated = [ax for ax in figure.axes if title and ax.get_title() == title]
    for ax in repeated:
        ax.set_title("")
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    for ax in repeated:
        ax.set_title(title)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for name, colour in _VARIABLES.items():
        text = text.replace(colour.lower(), f"var(--{name})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)
    head = f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" '
    return text.replace("<svg ", head, 1)


def new_figure(
    width: float, height: float, *, columns: int = 1, rows: int = 1, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Creates a figure in the style of all pages: axes in `INK`, a pale grid, no frame.

    Args:
        width: in inches.
        height: in inches.
        columns: of axes.
        rows: of axes, which share their x axis.
        heights: of the rows, in relation to each other.
    """
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


def label_axes(ax: Axes, title: str = "", *, x: str = "", y: str = "") -> None:
    """Writes the title of axes and what they show, with its unit, in `INK`."""
    ax.set_title(title, color=INK)
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)


def class_ticks(class_names: Sequence[str]) -> tuple[range, list[str]]:
    """The numbers and short names of at most `MAX_TICKS` classes, evenly spaced."""
    ticks = range(0, len(class_names), max(1, -(-len(class_names) // MAX_TICKS)))
    return ticks, [_short(class_names[tick]) for tick in ticks]


def _short(name: str, max_chars: int = 18, *, escape: bool = True) -> str:
    """Shortens a long name, and escapes `$`, which matplotlib would read as the start of a formula."""
    text = name if len(name) <= max_chars else f"{name[: max_chars - 1]}…"
    return text.replace("$", r"\$") if escape else text
