"""Finds the labels of the images in a multi-label table, where an image may have several, one or none.

Owns: the forms in which several labels of an image are written: a column of lists, a text with a separator, or a row
for each label. Does not own: the sources and their order (`truth`), or which class a label means (`tables.Classes`).

The labels of an image are a list of text. An empty list is an image that has none of the classes; null is an image of
which nothing is known. In text, an empty value is an empty list, since CSV has no null.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.errors import ConfigError
from mnist_dist.evaluate_config import LABEL_COLUMN, Match
from mnist_dist.evaluation.matching import BY_URI, Known, Labels, Rule, rule_of
from mnist_dist.evaluation.tables import ScoredTable
from mnist_dist.evaluation.truth import (
    Truth,
    find_truth,
    is_label_file,
    label_columns,
    label_lines,
    two_labels,
)
from mnist_dist.evaluation.uri_hashes import Hashes, UriIndex, uri_hashes
from mnist_dist.sources.columns import URI
from mnist_dist.sources.label_sets import label_sets
from mnist_dist.sources.parquet import PARQUET_SUFFIX
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store

# n = rows of a batch

_URI = "uri"


def find_label_sets(
    table: ScoredTable,
    *,
    labels: str | None,
    label_column: str,
    uri_column: str = URI,
    match: Match = "uri",
    separator: str | None = None,
    scored: Sequence[str] = (),
    store: Store = ANYWHERE,
) -> Truth:
    """Chooses the first available source of labels, as `find_truth` does; its labels are `list<string> [n]`.

    Args:
        table: the scored table, which is multi-label.
        labels, label_column, uri_column, match, scored, store: see `find_truth`.
        separator: what stands between the labels of an image, if they are one text.

    Raises:
        ConfigError, DataError, PermissionError, ServiceError, StorageError: see `find_truth`.
    """
    if labels is not None and is_label_file(labels):
        given = label_sets_file(labels, separator, label_column=label_column, uri_column=uri_column)
        return KnownSets(given, rule_of(match, given, table))
    if labels is None and label_column in table.schema.names:
        return CarriedSets(table.schema, label_column, separator)
    if separator is not None:
        raise ConfigError(
            f"label_separator needs a label file, or a column of labels in the table. Received: "
            f"label_separator={separator!r}, labels={labels!r}"
        )
    truth = find_truth(
        table,
        labels=labels,
        label_column=label_column,
        uri_column=uri_column,
        match=match,
        scored=scored,
        store=store,
    )
    return SetsOfOne(truth)


class SetsOfOne:
    """Takes the one label of each image from another source."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self.source, self.guessed, self.columns = truth.source, truth.guessed, truth.columns
        self.known = truth.known

    def labels(self, batch: pa.RecordBatch) -> pa.Array:
        """See `Truth`; `list<string> [n]`."""
        return label_sets(self._truth.labels(batch), None, place=self.source)


class CarriedSets:
    """Takes the labels from a column of the table.

    Raises:
        ConfigError: a separator was given, and the column holds no text.
        DataError: it holds neither class names nor class numbers.
    """

    guessed = False
    known = None

    def __init__(self, schema: pa.Schema, name: str, separator: str | None) -> None:
        self.source = f"the column {name!r} of the table"
        self.columns: tuple[str, ...] = (name,)
        self._separator = separator
        label_sets(pa.array([], schema.field(name).type), separator, place=self.source)

    def labels(self, batch: pa.RecordBatch) -> pa.Array:
        """See `Truth`; `list<string> [n]`."""
        return label_sets(batch[self.columns[0]], self._separator, place=self.source)


class KnownSets:
    """Labels by URI; those of several rows of a URI are joined.

    Uses 28 bytes of memory per row, twice that while they are sorted, and each distinct set once.

    Args:
        given: the labels, as lists of text.
        rule: how they find their images.

    Raises:
        DataError: two URIs with one key have different labels.
    """

    guessed = False
    columns: tuple[str, ...] = (_URI,)

    def __init__(self, given: Labels, rule: Rule = BY_URI) -> None:
        self.source = given.name
        hashes: list[Hashes] = []
        uri_parts: list[Hashes] = []
        codes: list[npt.NDArray[np.int64]] = []
        codes_by_set: dict[frozenset[str], int] = {}
        for uris, labels in given.read(rule.match != "uri"):
            hashes.append(rule.of_labels(uris))
            uri_parts.append(uri_hashes(uris))
            codes.append(_codes_of(labels, codes_by_set))
        self.known = Known(given, rule, UriIndex(hashes))
        self._codes: npt.NDArray[np.int64] = np.concatenate([np.zeros(0, np.int64), *codes])
        self._check_one_set_each(np.concatenate([np.zeros(0, np.int64), *uri_parts]))
        self._join_rows(codes_by_set)
        self._sets = pa.array([sorted(labels) for labels in codes_by_set], pa.list_(pa.string()))

    def labels(self, batch: pa.RecordBatch) -> pa.Array:
        """See `Truth`; `list<string> [n]`."""
        places = self.known.places(batch[_URI])
        codes = np.where(places >= 0, self._codes[places], -1) if len(self._codes) else places
        return self._sets.take(pa.array(codes, mask=codes < 0))

    def _check_one_set_each(self, uris: Hashes) -> None:
        """Rows of one URI are joined; those of two URIs with one key must be alike."""
        index = self.known.index
        same = index.hashes[1:] == index.hashes[:-1]
        before, after = index.order[:-1], index.order[1:]
        differ = (uris[before] != uris[after]) & (self._codes[before] != self._codes[after])
        conflicts = np.flatnonzero(same & differ)
        if len(conflicts):
            raise two_labels(self.known, [int(before[conflicts[0]]), int(after[conflicts[0]])])

    def _join_rows(self, codes_by_set: dict[frozenset[str], int]) -> None:
        """Gives the first row of each URI the labels of all its rows."""
        hashes, order, sets = self.known.index.hashes, self.known.index.order, list(codes_by_set)
        last = np.flatnonzero(np.append(hashes[1:] != hashes[:-1], True))[: len(hashes)]
        for before, stop in pairwise([-1, *last.tolist()]):
            codes = self._codes[order[before + 1 : stop + 1]]
            known = codes[codes >= 0]
            if len(codes) > 1 and len(known):
                joined = frozenset[str]().union(*(sets[code] for code in known))
                self._codes[order[before + 1]] = codes_by_set.setdefault(joined, len(codes_by_set))


def label_sets_file(
    uri: str, separator: str | None, *, label_column: str = LABEL_COLUMN, uri_column: str = URI
) -> Labels:
    """The labels of a file, as lists of text.

    Args:
        uri, label_column, uri_column: see `truth.label_file`.
        separator: what stands between the labels of an image, if they are one text.

    Raises:
        ConfigError: reading it; a separator was given, and the column of a Parquet file holds no text.
        DataError: there is no such file, it is not such a file, or it lacks a column.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    columns = label_columns(uri, label_column=label_column, uri_column=uri_column)
    is_text = not uri.lower().endswith(PARQUET_SUFFIX)
    place = f"{uri}: the column {label_column!r}"

    def read(as_written: bool) -> Iterator[tuple[pa.Array, pa.Array]]:
        lines = label_lines(uri, label_column=label_column, uri_column=uri_column, as_written=as_written)
        return (
            (uris, label_sets(labels.fill_null("") if is_text else labels, separator, place=place))
            for uris, labels in lines
        )

    return Labels(uri, read, columns)


def _codes_of(labels: pa.Array, codes_by_set: dict[frozenset[str], int]) -> npt.NDArray[np.int64]:
    """The code of each set, -1 for null; new sets are added to `codes_by_set`."""
    codes = (
        -1 if names is None else codes_by_set.setdefault(frozenset(names), len(codes_by_set))
        for names in labels.to_pylist()
    )
    return np.fromiter(codes, np.int64, len(labels))
