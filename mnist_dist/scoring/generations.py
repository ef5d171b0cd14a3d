"""The folder of a prediction table: what is published there, and the generations of work that are not yet.

Owns: the names in the folder, which generation is unfinished, and beginning and sweeping them. Does not own: what is in
a row (`predictions`), what is scored (`manifest`), how the table changes (`commit`), or the lock, which whoever changes
anything here holds.

```
<output>/
  table/                         the table, and nothing else:
    part-g0002-00000.parquet ... rows of generation 2, or left of older ones (part-g0002-kept-00000.parquet)
  _manifest.parquet              uri, size_bytes, etag, status, error of every row; a row group for each file, in order
  _summary.json  _SUCCESS        (or _FAILED)
  _work/lock
  _work/g0003/                   a generation: one first run, increment, retry or fresh start
    manifest.parquet  plan.json  what is to be scored, and how; plan.json last: it completes the generation
    *.begun  *.error             what workers leave for each other (`attempts`)
    shard-000007.parquet         the shard is done
    out/  commit.json            what is to be published; from commit.json on the commit happens, whoever dies
```

A generation whose number is not above that of the mark is published: what is left of it is debris.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from mnist_dist import documents
from mnist_dist.config import EngineName, EnginePrecision, ResizeRule
from mnist_dist.engines.conversion import Check
from mnist_dist.errors import DataError, MnistDistError
from mnist_dist.scoring.predictions import (
    FAILED,
    LOCK,
    TABLE,
    WORK,
    Mark,
    read_mark,
)
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import absolute, join

MANIFEST, SUMMARY = "_manifest.parquet", "_summary.json"
_PLAN = "plan.json"
_GENERATION = re.compile(rf"{WORK}/g(\d+)/(.*)")
_SHARD = re.compile(r"shard-(\d+)\.parquet")
PART = re.compile(rf"{TABLE}/part-g(\d+)-(?:kept-)?\d+\.parquet")

Mode = Literal["continue", "incremental", "fresh"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What makes the rows of a table."""

    model_id: str
    settings: dict[str, Any]
    """Those of the job that decide its rows (`ScoreJob.settings`), as JSON values."""
    engine: EngineName = "keras"
    precision: EnginePrecision = "float32"
    engine_check: Check | None = None
    keras_backend: str = "tensorflow"


@dataclass(frozen=True, kw_only=True)
class Plan(Origin):
    """`plan.json`: what a generation is; written once, when it begins."""

    mode: Mode
    keep_old: bool
    """The rows of the old table stay, but for those of images that are in the generation."""
    began_at: str
    """ISO 8601."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row that is not ok."""

    uri: str
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a person needs to know about the model to read the table."""

    bundle: str
    """URI."""
    class_names: tuple[str, ...]
    """In the order of `probabilities`."""
    resize: ResizeRule
    """How an image of another shape became the model's input."""
    versions: dict[str, str]
    """Of Python and of the packages that scored, by name."""


@dataclass(frozen=True, kw_only=True)
class Summary(Origin):
    """`_summary.json`: what the table is, for people and for the next job."""

    described: Description
    images_per_s: float | None
    generation: int
    rows: int
    files: tuple[str, ...]
    statuses: dict[str, int]
    """Rows of each status."""
    examples: dict[str, list[Example]]
    """A few rows of each status but ok."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A complete table."""

    mark: Mark
    summary: Summary | None
    """None where somebody deleted or damaged it."""


@dataclass(frozen=True)
class Generation:
    """One stretch of work, by the URI of its folder."""

    number: int
    uri: str
    plan: Plan
    store: Store = field(default=ANYWHERE, compare=False, repr=False)

    @property
    def manifest_uri(self) -> str:
        return join(self.uri, "manifest.parquet")

    @property
    def out_uri(self) -> str:
        return join(self.uri, "out")

    @property
    def commit_uri(self) -> str:
        return join(self.uri, "commit.json")

    @property
    def is_committing(self) -> bool:
        """Whether its commit was begun, which then must be brought to its end (`replay`)."""
        return self.store.exists(self.commit_uri)

    def begin(self, manifest: Callable[[str], None]) -> None:
        """Writes down what is to be done: from here on it is there.

        Args:
            manifest: writes the manifest to the URI that it is given.
        """
        manifest(self.manifest_uri)
        documents.write(self.store, join(self.uri, _PLAN), self.plan)

    def shard_uri(self, shard: int) -> str:
        return join(self.uri, f"shard-{shard:06d}.parquet")

    def done_shards(self) -> set[int]:
        """The shards that are there, by one listing."""
        names = (entry.uri.removeprefix(f"{self.uri}/") for entry in self.store.scan_entries(self.uri))
        return {int(match[1]) for name in names if (match := _SHARD.fullmatch(name))}


class Output:
    """The folder of a prediction table. Whoever calls what writes holds the lock.

    Args:
        uri: a folder or an `s3://` prefix.
        store: where it lies.
    """

    def __init__(self, uri: str, *, store: Store = ANYWHERE) -> None:
        self.uri, self.store = absolute(uri), store

    @property
    def lock_uri(self) -> str:
        return join(self.uri, LOCK)

    def committed(self) -> Committed | None:
        """The table, where there is a complete one.

        Raises:
            DataError: the folder holds the mark of something else.
        """
        mark = read_mark(self.uri, store=self.store)
        if mark is None:
            return None
        try:
            summary = documents.read(self.store, join(self.uri, SUMMARY), Summary)
        except (FileNotFoundError, DataError):  # somebody deleted or damaged it; the table does not need it
            summary = None
        return Committed(mark=mark, summary=summary)

    def unfinished(self) -> Generation | None:
        """The newest generation that was completely begun and is not published.

        Raises:
            DataError: its plan is damaged.
        """
        published = self._published()
        numbers = [number for number, names in self._generations().items() if _PLAN in names]
        number = max(numbers, default=0)
        if number <= published:
            return None
        uri = self._generation_uri(number)
        try:
            return Generation(number, uri, documents.read(self.store, join(uri, _PLAN), Plan), self.store)
        except DataError as err:
            raise DataError(f"{err}; delete {uri}, unfinished work, to begin it anew") from err

    def reserve(self, plan: Plan, *, above: int = 0) -> Generation:
        """A new generation, after all that was ever here; it counts from its `begin` on.

        Args:
            plan: what must be the same when the work is resumed.
            above: a number that is not used again: of a generation whose workers may still write.
        """
        self.sweep()
        parts = (int(match[1]) for name in self.names(TABLE) if (match := PART.fullmatch(name)))
        number = max([above, self._published(), *self._generations(), *parts]) + 1
        return Generation(number, self._generation_uri(number), plan, self.store)

    def part_uri(self, name: str) -> str:
        """Of a file of the table."""
        return join(self.uri, TABLE, name)

    def discard(self, generation: Generation) -> None:
        """Deletes a generation and the work in it.

        Raises:
            MnistDistError: its commit was begun; the table that was is not whole any more.
        """
        if generation.is_committing:
            raise MnistDistError(f"a commit that was begun is brought to its end first. Received: {generation.uri!r}")
        self._delete(generation.number)

    def sweep(self) -> None:
        """Deletes what killed drivers left: generations published or never completely begun, a second mark."""
        self.sweep_published()
        mark = read_mark(self.uri, store=self.store)
        if mark is not None and not mark.failed:  # `rejudge` was killed between its two steps
            self.store.delete(join(self.uri, FAILED))
        for number, names in self._generations().items():
            if _PLAN not in names:
                self._delete(number)

    def sweep_published(self) -> None:
        """Deletes generations that were published; of a driver that just lost the lock, that hurts nobody."""
        published = self._published()
        for number in sorted(self._generations()):
            if number <= published:
                self._delete(number)

    def _delete(self, number: int) -> None:
        uri = self._generation_uri(number)
        self.store.delete(join(uri, _PLAN))  # first: killed midway, what is left is debris
        self.store.delete_tree(uri)

    def _published(self) -> int:
        mark = read_mark(self.uri, store=self.store)
        return mark.generation if mark else 0

    def _generation_uri(self, number: int) -> str:
        return join(self.uri, WORK, f"g{number:04d}")

    def _generations(self) -> dict[int, set[str]]:
        """The names in each generation's folder."""
        found: dict[int, set[str]] = {}
        for name in self.names(WORK):
            if match := _GENERATION.fullmatch(name):
                found.setdefault(int(match[1]), set()).add(match[2])
        return found

    def names(self, below: str = "") -> Iterator[str]:
        """Everything in the folder, relative to it."""
        for entry in self.store.scan_entries(join(self.uri, below) if below else self.uri):
            yield entry.uri.removeprefix(f"{self.uri}/")
