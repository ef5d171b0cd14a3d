"""The folder of a prediction table: its published files, and the generations that are not published yet.

Owns: the names in the folder, which generation is unfinished, and which of its shards are done; beginning and sweeping
generations. Does not own: the contents of a row (`predictions`), what is scored (`manifest`), how the table changes
(`commit`), or the lock, which everyone who writes here must hold.

```
<output>/
  table/                         the table and nothing else:
    part-g0002-00000.parquet     new rows of generation 2; kept older ones: part-g0002-kept-00000.parquet
  _manifest.parquet              uri, size_bytes, etag, status, error of every row; one row group per file, in order
  _summary.json  _SUCCESS        (or _FAILED)
  _work/lock
  _work/g0003/                   a generation: a first run, an increment, a retry or a fresh start
    manifest.parquet  plan.json  what to score, and how; plan.json comes last and makes the generation valid
    *.begun  *.error             how often a shard was begun, what ended it (`data/markers.py`)
    shard-000007.parquet         rows of a finished shard
    out/  commit.json            what to publish; once commit.json exists, the commit will be finished
```

A generation is published if the mark has its number or a higher one; what is left of its folder is debris.
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
    """What determines the rows of a table."""

    model_id: str
    settings: dict[str, Any]
    """The settings of the job that determine its rows (`ScoreJob.settings`), as JSON values."""
    engine: EngineName = "keras"
    precision: EnginePrecision = "float32"
    engine_check: Check | None = None
    keras_backend: str = "tensorflow"


@dataclass(frozen=True, kw_only=True)
class Plan(Origin):
    """`plan.json`: how a generation is scored; written once, when the generation begins."""

    mode: Mode
    keep_old: bool
    """Whether rows of the old table are kept, except those of images in this generation."""
    began_at: str
    """Time, ISO 8601."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row that is not ok."""

    uri: str
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Description:
    """Describes the model to whoever reads the table."""

    bundle: str
    """URI of the bundle."""
    class_names: tuple[str, ...]
    """Class names in the order of `probabilities`."""
    resize: ResizeRule
    """How an image of another shape became the model's input."""
    versions: dict[str, str]
    """Versions of Python and of the packages that scored, by name."""


@dataclass(frozen=True, kw_only=True)
class Summary(Origin):
    """`_summary.json`: a description of the table, for people and for the next job."""

    described: Description
    images_per_s: float | None
    generation: int
    rows: int
    files: tuple[str, ...]
    statuses: dict[str, int]
    """Number of rows by status."""
    examples: dict[str, list[Example]]
    """A few rows of each status other than ok."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A complete table."""

    mark: Mark
    summary: Summary | None
    """None if the file was deleted or damaged."""


@dataclass(frozen=True)
class Generation:
    """One unit of work on a table, in a folder of its own."""

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
        """Whether its commit has begun; the commit must then be finished (`replay`)."""
        return self.store.exists(self.commit_uri)

    def begin(self, manifest: Callable[[str], None]) -> None:
        """Writes the manifest and then the plan, which makes the generation valid.

        Args:
            manifest: writes the manifest to the given URI.
        """
        manifest(self.manifest_uri)
        documents.write(self.store, join(self.uri, _PLAN), self.plan)

    def shard_uri(self, shard: int) -> str:
        return join(self.uri, f"shard-{shard:06d}.parquet")

    def done_shards(self) -> set[int]:
        """The numbers of the finished shards, found by one listing."""
        names = (entry.uri.removeprefix(f"{self.uri}/") for entry in self.store.scan_entries(self.uri))
        return {int(match[1]) for name in names if (match := _SHARD.fullmatch(name))}


class Output:
    """The folder of a prediction table. Callers of methods that write must hold the lock.

    Args:
        uri: a folder or an `s3://` prefix.
        store: the store that holds the folder.
    """

    def __init__(self, uri: str, *, store: Store = ANYWHERE) -> None:
        self.uri, self.store = absolute(uri), store

    @property
    def lock_uri(self) -> str:
        return join(self.uri, LOCK)

    def committed(self) -> Committed | None:
        """The complete table; None if there is none.

        Raises:
            DataError: the `_SUCCESS` or `_FAILED` in the folder is not the mark of a prediction table.
        """
        mark = read_mark(self.uri, store=self.store)
        if mark is None:
            return None
        try:
            summary = documents.read(self.store, join(self.uri, SUMMARY), Summary)
        except (FileNotFoundError, DataError):  # deleted or damaged by hand; reading the table does not need it
            summary = None
        return Committed(mark=mark, summary=summary)

    def unfinished(self) -> Generation | None:
        """The newest generation that has a plan and is not published; None if there is none.

        Raises:
            DataError: the plan is damaged.
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
            raise DataError(f"{err}; delete this unfinished generation to start it again: {uri}") from err

    def reserve(self, plan: Plan, *, above: int = 0) -> Generation:
        """A new generation with an unused number; it becomes valid with `begin`.

        Args:
            plan: what must stay the same when the generation is resumed.
            above: number of a discarded generation whose workers may still write; it is not used again.
        """
        self.sweep()
        parts = (int(match[1]) for name in self.names(TABLE) if (match := PART.fullmatch(name)))
        number = max([above, self._published(), *self._generations(), *parts]) + 1
        return Generation(number, self._generation_uri(number), plan, self.store)

    def part_uri(self, name: str) -> str:
        """The URI of a file of the table."""
        return join(self.uri, TABLE, name)

    def discard(self, generation: Generation) -> None:
        """Deletes a generation and its finished shards.

        Raises:
            MnistDistError: its commit has begun, so that the old table is no longer complete.
        """
        if generation.is_committing:
            raise MnistDistError(f"a commit that has begun must be finished first. Received: {generation.uri!r}")
        self._delete(generation.number)

    def sweep(self) -> None:
        """Deletes what killed drivers left: published generations, generations without a plan, a second mark."""
        self.sweep_published()
        mark = read_mark(self.uri, store=self.store)
        if mark is not None and not mark.failed:  # `rejudge` was killed between its two steps
            self.store.delete(join(self.uri, FAILED))
        for number, names in self._generations().items():
            if _PLAN not in names:
                self._delete(number)

    def sweep_published(self) -> None:
        """Deletes published generations. This is harmless even if the driver has just lost the lock."""
        published = self._published()
        for number in sorted(self._generations()):
            if number <= published:
                self._delete(number)

    def _delete(self, number: int) -> None:
        uri = self._generation_uri(number)
        self.store.delete(join(uri, _PLAN))  # first, so that a deletion that is killed midway leaves only debris
        self.store.delete_tree(uri)

    def _published(self) -> int:
        mark = read_mark(self.uri, store=self.store)
        return mark.generation if mark else 0

    def _generation_uri(self, number: int) -> str:
        return join(self.uri, WORK, f"g{number:04d}")

    def _generations(self) -> dict[int, set[str]]:
        """Number of a generation -> the names in its folder."""
        generations: dict[int, set[str]] = {}
        for name in self.names(WORK):
            if match := _GENERATION.fullmatch(name):
                generations.setdefault(int(match[1]), set()).add(match[2])
        return generations

    def names(self, below: str = "") -> Iterator[str]:
        """The paths of all files in the folder, relative to it."""
        for entry in self.store.scan_entries(join(self.uri, below) if below else self.uri):
            yield entry.uri.removeprefix(f"{self.uri}/")
