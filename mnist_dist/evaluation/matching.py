"""Which label belongs to which image of a table: by the URI, the end of the path, the file name or its stem.

Owns: the rules of `--match`, and counting what they find. Does not own: reading labels (`truth`, `label_sets`).

Contract: a label belongs to every image with its key; two labels with one key must be equal, which those who read them
check. By `path` an image has the label whose path is the longest end of its own path, in whole components: the label
`cat/1.png` is that of `s3://bucket/photos/cat/1.png`. The bucket is a folder like others. Where no label matches as it
is written, leading folders that all labels share are left out, as few as possible: so `/old/place/cat/1.png` matches
`cat/1.png`, too. A member of an archive lies in the archive as in a folder.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.evaluate_config import Match
from mnist_dist.evaluation.tables import ScoredTable
from mnist_dist.evaluation.uri_hashes import Hashes, UriIndex, text_hashes
from mnist_dist.images.formats import IMAGE_SUFFIXES
from mnist_dist.sources.archives import split_member
from mnist_dist.store.uris import is_web
from mnist_dist.urls import path_and_query

# n = rows of a batch, m = labels

_URI = "uri"
_SUFFIXES = tuple(IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Labels:
    """Where labels are read, as often as needed.

    Args:
        name: for display.
        read: yields URIs and labels, `[n]` each. Given True, URIs are as written, else as scoring writes them.
        columns: the columns of a label file; empty: these are labelled images.
    """

    name: str
    read: Callable[[bool], Iterator[tuple[pa.Array, pa.Array]]]
    columns: tuple[str, ...] = ()

    def uris(self, match: Match) -> Iterator[pa.Array]:
        """The URIs in the form that a rule compares."""
        return (uris for uris, _ in self.read(match != "uri"))

    def named(self, rows: Sequence[int], match: Match) -> list[tuple[str, str | None]]:
        """URI and label of some rows, by number."""
        found: dict[int, tuple[str, str | None]] = {}
        before = 0
        for uris, labels in self.read(match != "uri"):
            for row in rows:
                if before <= row < before + len(uris):
                    found[row] = (uris[row - before].as_py(), labels[row - before].as_py())
            before += len(uris)
            if len(found) == len(set(rows)):
                break
        return [found[row] for row in rows]


@dataclass(frozen=True)
class Rule:
    """A rule of `--match`, for some labels."""

    match: Match = "uri"
    left_out: int = 0
    """By path: the leading folders of each label that are not compared."""
    depths: tuple[int, ...] = ()
    """By path: how many components the labels have beside those, the longest first."""

    def of_labels(self, uris: pa.Array) -> Hashes:
        """The keys of labels, hashed; `int64 [n]`."""
        texts = uris.to_pylist()
        if self.match == "path":
            return text_hashes(["/".join(components(text)[self.left_out :]) for text in texts])
        return text_hashes(self._keys(texts))

    def of_images(self, uris: pa.Array) -> Iterator[Hashes]:
        """The keys that an image may have, hashed, the most telling first; `int64 [n]` each."""
        texts = uris.to_pylist()
        if self.match != "path":
            yield text_hashes(self._keys(texts))
            return
        paths = [components(text) for text in texts]
        for depth in self.depths:
            yield text_hashes(["/".join(parts[-depth:]) if len(parts) >= depth else "" for parts in paths])

    def _keys(self, texts: list[str]) -> list[str]:
        if self.match == "uri":
            return texts
        names = [components(text)[-1] for text in texts]
        return names if self.match == "name" else [stem_of(name) for name in names]


@dataclass(frozen=True)
class Known:
    """Labels that are found by a key of their URIs."""

    labels: Labels
    rule: Rule
    index: UriIndex

    def places(self, uris: pa.Array) -> npt.NDArray[np.int64]:
        """The row of the label of each image, `int64 [n]`; -1: none."""
        found = np.full(len(uris), -1)
        for hashes in self.rule.of_images(uris):
            found = np.where(found < 0, self.index.places(hashes), found)
        return found

    def finds_any(self, table: ScoredTable) -> bool:
        """Whether any image of the table has a label."""
        return any((self.places(batch[_URI]) >= 0).any() for batch in table.batches((_URI,)))

    def matches(self, table: ScoredTable) -> "Matches":
        """Counts the images with and without a label, and the labels with and without an image."""
        used = np.zeros(len(self.index.order), np.bool_)
        matched, without = 0, None
        for batch in table.batches((_URI,)):
            places = self.places(batch[_URI])
            matched += int((places >= 0).sum())
            used[places[places >= 0]] = True
            if without is None and (places < 0).any():
                without = batch[_URI][int((places < 0).argmax())].as_py()
        firsts = self.index.firsts
        unused = firsts[~used[firsts]]
        return Matches(
            images=table.rows,
            matched=matched,
            labels=len(firsts),
            unused=len(unused),
            without=without,
            example=self._example(unused),
        )

    def _example(self, unused: npt.NDArray[np.int64]) -> str | None:
        """The first of some labels: its URI, and how it is written where that differs."""
        if not len(unused):
            return None
        first = [int(unused.min())]
        written = self.labels.named(first, "name")[0][0]
        compared = self.labels.named(first, self.rule.match)[0][0]
        return repr(written) if compared == written else f"{compared!r}, written as {written!r}"


@dataclass(frozen=True, kw_only=True)
class Matches:
    """How many images of a table have a label, and the other way round."""

    images: int
    matched: int
    """Images with a label."""
    labels: int
    """Labels with a key of their own."""
    unused: int
    """Of these, labels of no image."""
    without: str | None
    """The first image without a label."""
    example: str | None
    """The first label without an image, for display."""

    @property
    def shared(self) -> int:
        """Images that have a label together with another."""
        return self.matched - (self.labels - self.unused)


BY_URI = Rule()


def rule_of(match: Match, labels: Labels, table: ScoredTable) -> Rule:
    """The rule of `--match` for these labels and this table."""
    if match != "path":
        return Rule(match)
    shared, lengths = _shape(labels)
    for left_out in range(shared + 1):
        rule = Rule("path", left_out, tuple(sorted((length - left_out for length in lengths), reverse=True)))
        if Known(labels, rule, UriIndex([rule.of_labels(uris) for uris in labels.uris(match)])).finds_any(table):
            return rule
    return Rule("path", 0, tuple(sorted(lengths, reverse=True)))


def components(uri: str) -> list[str]:
    """The components of a path, from the bucket or host on: `[photos, cat, 1.png]` of `./photos/cat/1.png`."""
    path = path_and_query(uri)[0] if is_web(uri) else uri
    member = split_member(path)
    path = "/".join(member) if member is not None else path
    scheme, separator, rest = path.partition("://")
    parts = (rest if separator and "/" not in scheme else path).split("/")
    return [part for part in parts if part not in ("", ".", "..")] or [path]


def stem_of(name: str) -> str:
    """A file name without the suffix of an image; `scan.0001` is one without a suffix."""
    suffix = next((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)] or name


def _shape(labels: Labels) -> tuple[int, set[int]]:
    """How many leading folders all labels share, and how many components labels have."""
    shared: list[str] | None = None
    lengths: set[int] = set()
    for uris in labels.uris("path"):
        for uri in uris.to_pylist():
            *folders, _ = parts = components(uri)
            lengths.add(len(parts))
            if shared is None:
                shared = folders
            elif folders[: len(shared)] != shared:
                same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shared, folders, strict=False))
                shared = [left for left, _ in same]
    return len(shared or []), lengths or {1}
