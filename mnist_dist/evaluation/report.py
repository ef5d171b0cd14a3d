"""Renders a report as one self-contained HTML page, and writes its figures as files beside it.

Owns: the elements of a page and their rendering. Does not own: the metrics (`metrics`), the figures (`figures`), or
what the page of a bundle or of an evaluation shows (`pages`).

Contract: the page loads nothing from the network, and all text from outside (file names, labels, paths, error
messages) is escaped.
"""

import base64
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from mnist_dist.evaluation.figures import png, svg
from mnist_dist.evaluation.templates import SORT_TABLES, render_page
from mnist_dist.models.bundle import REPORT_FILE
from mnist_dist.store.anywhere import ANYWHERE

FIGURES_FOLDER = "figures"
PICTURE_PX = 224
"""Longest side of a picture on the page."""
_PIXELATED_PX = 64  # Up to this size, an image is shown as its pixels.
_FILTER_IMAGES = "filter_images.js"


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
    """A picture with its label and prediction, or with the reason why there is no prediction."""

    name: str
    """URI of the image."""
    predicted: tuple[str, ...] = ()
    """The predicted class; of a multi-label model all predicted classes."""
    confidence: float | None = None
    truth: tuple[str, ...] | None = None
    """The true class or classes; None: not known."""
    pixels: npt.NDArray[np.uint8] | None = None
    """`uint8 [H, W, C]`; None: the image cannot be read, or no longer."""
    second: tuple[str, ...] | None = None
    """What the second model predicts, if two are compared."""
    second_confidence: float | None = None
    rival: str | None = None
    """The second most probable class of a hit, the truth of a mistake."""
    rival_probability: float | None = None
    status: str = "ok"
    error: str = ""

    @property
    def keys(self) -> dict[str, list[str]]:
        """What a `Filter` may ask of it."""
        truth, second = self.truth or (), self.second or ()
        return {
            "truth": list(truth),
            "predicted": list(self.predicted),
            "second": list(second),
            "class": list(dict.fromkeys((*truth, *self.predicted, *second))),
            "status": [self.status],
        }

    def matches(self, wanted: Mapping[str, str]) -> bool:
        """Whether a filter shows it."""
        keys = self.keys
        return all(value in keys[key] for key, value in wanted.items())


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Examples under a common title."""

    title: str
    examples: Sequence[Example]
    note: str = ""
    models: tuple[str, str] | None = None
    """The names of the two models, if two are compared."""
    shown_first: int = 24
    """With more examples than this, the others are shown on demand."""
    is_multi_label: bool = False
    """An image may have several classes, each of them right or wrong."""
    is_input: bool = False
    """The images have labels and no predictions, such as those of a training."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A cell of a table that leads to another part of the page, or to another page."""

    text: str
    href: str


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A cell of a table that shows only some of the images below it.

    Its link works without the script, too: it leads to the first of these images.
    """

    text: str
    wanted: Mapping[str, str]
    """What the images have, by the keys of `Example.keys`, such as truth and predicted."""
    label: str
    """The images in words, such as `truth 3, prediction 8`."""
    images: int | None = None
    """How many there are, on the page or not; None: not known."""

    @property
    def fragment(self) -> str:
        """The part of the page's address that keeps the filter."""
        return urlencode(self.wanted)


Cell = str | Link | Filter


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A confusion matrix whose cells filter the images."""

    classes: Sequence[str]
    counts: npt.NDArray[np.int64]
    """`int64 [K, K]`: a row per true class, a column per predicted class."""
    wide: bool = False

    @property
    def rows(self) -> Iterator[tuple[str, list[tuple[Filter | None, bool, float]]]]:
        """Per true class its name and its cells: the link (None: no image), whether it is right, and how strong its
        colour is, 0 to 1: the share of the row, of mistakes its square root, so that rare ones are seen."""
        for row, truth in enumerate(self.classes):
            total = max(int(self.counts[row].sum()), 1)
            yield truth, [self._cell(row, column, total) for column in range(len(self.classes))]

    def _cell(self, row: int, column: int, total: int) -> tuple[Filter | None, bool, float]:
        images, is_right = int(self.counts[row, column]), row == column
        if not images:
            return None, is_right, 0.0
        link = confusion_filter(self.classes[row], self.classes[column], images)
        return link, is_right, images / total if is_right else (images / total) ** 0.5

    @property
    def filters(self) -> list[Filter]:
        """All links of its cells."""
        return [link for _, cells in self.rows for link, _, _ in cells if link is not None]


def confusion_filter(truth: str, predicted: str, images: int, *, text: str = "") -> Filter:
    """The link to the images of a class that were predicted as a class."""
    return Filter(
        text=text or f"{images:,}",
        wanted={"truth": truth, "predicted": predicted},
        label=f"truth {truth}, prediction {predicted}",
        images=images,
    )


def class_filter(name: str) -> Filter:
    """The link to the images that have a class as truth or prediction."""
    return Filter(text=name, wanted={"class": name}, label=f"truth or prediction {name}")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; its first column names the rows, and columns of numbers are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    name: str = ""
    """The id of its section, for links."""
    sortable: bool = False
    words: int = 1
    """So many columns, the first ones, hold words, even if they look like numbers, such as the classes of digits."""
    wide: bool = False
    """Takes the whole width of the page; others stand two in a row where there is room."""

    @property
    def number_columns(self) -> frozenset[int]:
        """The columns behind the words that hold numbers and empty cells only."""
        texts = [[cell if isinstance(cell, str) else cell.text for cell in row] for row in self.rows]
        columns = range(self.words, len(self.columns))
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
    leading: Sequence[Table] = ()
    """Tables above everything else, such as a comparison."""
    heading: str = ""
    """Title of what follows them, if they are about something else."""
    heading_verdict: Sequence[str] = ()
    heading_headlines: Sequence[Headline] = ()
    matrix: Matrix | None = None
    figures: Sequence[Shown] = ()
    tables: Sequence[Table] = ()
    facts: Sequence[tuple[str, str]] = ()
    """Names and values that describe what was run."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Longer texts, shown collapsed: title -> text."""
    details: Sequence[Table] = ()
    """Long tables, shown collapsed."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text files written beside the figures: name -> text."""
    galleries: Sequence[Gallery] = ()
    """The last part of the page."""

    @property
    def filters(self) -> list[Filter]:
        """All links that filter the images."""
        rows = [row for table in (*self.leading, *self.tables) for row in table.rows]
        cells = [cell for row in rows for cell in row if isinstance(cell, Filter)]
        return cells + (self.matrix.filters if self.matrix is not None else [])


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
    drawn = [(shown, svg(shown.figure, alt=shown.alt, title=shown.title)) for shown in page.figures if shown.on_page]
    header = {"title": page.title, "kind": page.kind, "subtitle": page.subtitle}
    examples = [example for gallery in page.galleries for example in gallery.examples]
    return render_page(
        "report.html.j2",
        scripts=(SORT_TABLES, _FILTER_IMAGES),
        **header,
        page=page,
        drawn=drawn,
        anchors_of=_anchors(page.filters, examples),
        picture=picture,
        is_pixelated=is_pixelated,
        to_json=json.dumps,
    )


def _anchors(filters: Iterable[Filter], examples: Sequence[Example]) -> Callable[[Example], list[str]]:
    """Gives the fragments that lead to an example: those of the filters that show it as their first."""
    anchors: dict[int, list[str]] = {}
    for fragment, wanted in {link.fragment: link.wanted for link in filters}.items():
        first = next((example for example in examples if example.matches(wanted)), None)
        if first is not None:
            anchors.setdefault(id(first), []).append(fragment)
    return lambda example: anchors.get(id(example), [])


def is_pixelated(pixels: npt.NDArray[np.uint8]) -> bool:
    """Whether an image is so small that the page shows its pixels."""
    return bool(max(pixels.shape[:2]) <= _PIXELATED_PX)


def picture(pixels: npt.NDArray[np.uint8]) -> str:
    """Encodes an image as a data URI: a small one as it is (PNG), a larger one reduced to fit `PICTURE_PX` (WebP)."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    if is_pixelated(pixels):
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((PICTURE_PX, PICTURE_PX))
        image.save(buffer, "WEBP", quality=80)
        kind = "webp"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def _is_number(cell: str) -> bool:
    return bool(cell) and set(cell) <= set("0123456789.,-+%eE ")
