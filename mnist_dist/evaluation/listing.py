"""A table of things that are looked up, such as trials or runs: it sorts, and on a narrow window each row is a card.

Owns: the elements of such a table; `listing_parts.html.j2` shows them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mnist_dist.evaluation.report import Link

Tone = Literal["good", "bad", "busy", "warn", "plain", "quiet"]

Order = Literal["ascending", "descending"]


@dataclass(frozen=True, kw_only=True)
class Badge:
    """A status in a word, with a colour that stresses it."""

    text: str
    tone: Tone = "quiet"
    mark: str = ""
    """A sign behind the word."""
    note: str = ""
    """More about it, such as an error."""


Entry = str | Link | Badge


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A sortable table. The first column names the rows; columns of numbers alone are right-aligned."""

    name: str
    """The id of its section."""
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    note: str = ""
    order: tuple[int, Order] | None = None
    """The column by which the rows are sorted at first, and how; None: by none alone."""
    lesser: int | None = None
    """From this column on, a narrow window has no buttons to sort by; None: it has all."""

    @property
    def number_columns(self) -> frozenset[int]:
        """The columns behind the first that hold numbers and empty cells only, and at least one number."""
        columns = range(1, len(self.columns))
        return frozenset(place for place in columns if _are_numbers([row[place] for row in self.rows]))

    def without_empty_columns(self) -> "Listing":
        """The same without the columns in which no row has an entry."""
        kept = [place for place in range(len(self.columns)) if any(row[place] for row in self.rows)]
        order = None if self.order is None else (kept.index(self.order[0]), self.order[1])
        return replace(
            self,
            columns=[self.columns[place] for place in kept],
            rows=[[row[place] for place in kept] for row in self.rows],
            order=order,
            lesser=None if self.lesser is None else sum(place < self.lesser for place in kept),
        )


def _are_numbers(entries: Sequence[Entry]) -> bool:
    texts = [entry if isinstance(entry, str) else entry.text for entry in entries if not isinstance(entry, Badge)]
    return len(texts) == len(entries) and any(texts) and all(map(_is_number, filter(None, texts)))


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removesuffix("%"))
    except ValueError:
        return False
    return True
