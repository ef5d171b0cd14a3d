"""Renders a report as one self-contained HTML page, and writes its figures as files beside it.

Owns: the elements of a page and their rendering. Does not own: the metrics (`metrics`), the figures (`figures`), or
what the page of a bundle or of an evaluation shows (`pages`).

Contract: the page loads nothing from the network, and all text from outside (file names, labels, paths, error
messages) is escaped.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from mnist_dist.evaluation.figures import png, svg
from mnist_dist.evaluation.templates import render_page
from mnist_dist.models.bundle import REPORT_FILE
from mnist_dist.store.anywhere import ANYWHERE

FIGURES_FOLDER = "figures"
PICTURE_PX = 112
"""Longest side of a picture on the page; smaller pictures are enlarged by whole factors."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A number at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A figure with its title and alternative text."""

    name: str
    """Name of its file without the suffix, such as `confusion_matrix`."""
    title: str
    alt: str
    figure: Figure
    note: str = ""
    on_page: bool = True
    """False: the figure is only written as a file."""
    wide: bool = False
    """Takes the whole width of the page."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture with its label and prediction."""

    name: str
    """URI of the image."""
    predicted: str
    confidence: float | None
    truth: str | None = None
    pixels: npt.NDArray[np.uint8] | None = None
    """`uint8 [H, W, C]`; None: the image can no longer be read."""
    second: str | None = None
    """Class that the second model predicts, if two are compared."""

    @property
    def is_right(self) -> bool:
        """Whether the prediction is correct: that of the second model if there are two."""
        return self.truth == (self.predicted if self.second is None else self.second)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Examples under a common title."""

    title: str
    examples: Sequence[Example]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A cell of a table that leads to another part of the page, or to another page."""

    text: str
    href: str


Cell = str | Link


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first column names the rows, and columns of numbers are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    name: str = ""
    """The id of its section, for links."""
    sortable: bool = False

    @property
    def number_columns(self) -> frozenset[int]:
        """The columns behind the first that hold numbers and empty cells only."""
        texts = [[cell if isinstance(cell, str) else cell.text for cell in row] for row in self.rows]
        columns = range(1, len(self.columns))
        return frozenset(i for i in columns if texts and all(_is_number(row[i]) or not row[i] for row in texts))


@dataclass(frozen=True, kw_only=True)
class Page:
    """The content of a page, in the order in which it is shown."""

    title: str
    subtitle: str
    kind: str = ""
    """What kind of page it is, such as `Evaluation`; stands above the title."""
    verdict: Sequence[str] = ()
    """The result in sentences, the most important first."""
    headlines: Sequence[Headline] = ()
    warnings: Sequence[str] = ()
    figures: Sequence[Shown] = ()
    galleries: Sequence[Gallery] = ()
    tables: Sequence[Table] = ()
    facts: Sequence[tuple[str, str]] = ()
    """Names and values that describe what was run."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Longer texts, shown collapsed: title -> text."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text files written beside the figures: name -> text."""


def write_page(page: Page, folder: Path) -> Path:
    """Writes `figures/` and then `report.html` into a local folder; returns the path of the page."""
    (folder / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    for shown in page.figures:
        ANYWHERE.write_bytes(str(folder / FIGURES_FOLDER / f"{shown.name}.png"), png(shown.figure))
    for name, text in page.files.items():
        ANYWHERE.write_bytes(str(folder / FIGURES_FOLDER / name), text.encode())
    path = folder / REPORT_FILE
    ANYWHERE.write_bytes(str(path), render(page).encode())
    return path


def render(page: Page) -> str:
    """Renders the page as HTML."""
    drawn = [(shown, svg(shown.figure, alt=shown.alt)) for shown in page.figures if shown.on_page]
    header = {"title": page.title, "kind": page.kind, "subtitle": page.subtitle}
    return render_page("report.html.j2", **header, page=page, drawn=drawn, picture=picture)


def picture(pixels: npt.NDArray[np.uint8]) -> str:
    """Encodes an image as a PNG data URI, enlarged by a whole factor or reduced to fit `PICTURE_PX`."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    longest = max(image.size)
    if longest < PICTURE_PX:
        factor = PICTURE_PX // longest
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        image.thumbnail((PICTURE_PX, PICTURE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _is_number(cell: str) -> bool:
    return bool(cell) and set(cell) <= set("0123456789.,-+%eE ")
