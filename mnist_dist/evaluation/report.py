"""One self-contained page that says what a model or a table of predictions is worth, and the same figures as files.

Owns: what a page consists of and how it is rendered. Does not own: the numbers (`metrics`), the figures themselves
(`figures`), or which of them belong to a bundle or to an evaluation (`pages`).

Contract: nothing on the page comes from the network, and whatever comes from outside (file names, labels, paths, error
texts) is escaped.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from mnist_dist.evaluation.figures import png, svg
from mnist_dist.models.bundle import REPORT_FILE
from mnist_dist.store.anywhere import ANYWHERE

FIGURES_FOLDER = "figures"
PICTURE_PX = 112
"""Longest side of a picture on the page."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A figure that a reader looks for first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A figure with what it shows, for those who do not see it, too."""

    name: str
    """Of its file, without suffix: `confusion_matrix`."""
    title: str
    alt: str
    figure: Figure
    note: str = ""
    on_page: bool = True
    """False: a file only."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture with truth and prediction."""

    name: str
    """Where it lies."""
    predicted: str
    confidence: float | None
    truth: str | None = None
    pixels: npt.NDArray[np.uint8] | None = None
    """`uint8 [H, W, C]`; None: it cannot be read any more."""
    second: str | None = None
    """What another model says."""

    @property
    def is_right(self) -> bool:
        """Whether the prediction, the second one where there are two, is the truth."""
        return self.truth == (self.predicted if self.second is None else self.second)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Some examples under a title."""

    title: str
    examples: Sequence[Example]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under column titles; numbers stand to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything on a page, in the order in which it is shown."""

    title: str
    subtitle: str
    headlines: Sequence[Headline] = ()
    warnings: Sequence[str] = ()
    figures: Sequence[Shown] = ()
    galleries: Sequence[Gallery] = ()
    tables: Sequence[Table] = ()
    facts: Sequence[tuple[str, str]] = ()
    """What was run: names and values."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Longer texts that are folded away: title -> text."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text files beside the figures: name -> text."""


def write_page(page: Page, folder: Path) -> Path:
    """Writes `report.html` and `figures/` into a local folder; the page last. Gives its path."""
    (folder / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    for shown in page.figures:
        ANYWHERE.write_bytes(str(folder / FIGURES_FOLDER / f"{shown.name}.png"), png(shown.figure))
    for name, text in page.files.items():
        ANYWHERE.write_bytes(str(folder / FIGURES_FOLDER / name), text.encode())
    path = folder / REPORT_FILE
    ANYWHERE.write_bytes(str(path), render(page).encode())
    return path


def render(page: Page) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_dist.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = picture
    environment.filters["is_number"] = _is_number
    drawn = [(shown, svg(shown.figure, alt=shown.alt)) for shown in page.figures if shown.on_page]
    return environment.get_template("report.html.j2").render(page=page, drawn=drawn)


def picture(pixels: npt.NDArray[np.uint8]) -> str:
    """An image as a data URI: small ones enlarged by whole factors, large ones reduced."""
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


def _is_number(cell: Any) -> bool:
    return bool(cell) and set(str(cell)) <= set("0123456789.,-+%eE ")
