"""The folder of a prediction table: its published files, and the generations that are not published yet.

Owns: the names in the folder, which generation is unfinished, and which of its shards are done; beginning and sweeping
generations. Does not own: the contents of a row (`predictions`), what is scored (`manifest`), how the table changes
(`commit`), or the lock, which everyone who writes here must hold.

```
<output>/
  table/                         the table and nothing else (`delta/`, with its log, where that was asked for):
    part-000017-00000.parquet    new rows; kept older ones of rewritten files: part-000017-kept-00000.parquet
  _tables/000017/                the newest version of the table; older ones are deleted
    manifest.parquet             uri, size_bytes, etag, status, error of every row; one row group per file, in order
    summary.json  mark.json      how it was made; its files. mark.json comes last and makes the version valid
  _SUCCESS  _summary.json        copies of mark.json (or _FAILED) and summary.json, for people and other tools
  _work/lock/000017              see `store/lock.py`
  _work/g000016/                 a generation: a first run, an increment, a retry or a fresh start
    manifest.parquet  plan.json  what to score, and how; plan.json comes last and makes the generation valid
    *.begun  *.error             how often a shard was begun, what ended it (`data/markers.py`)
    shard-000007.parquet         rows of a finished shard
    out-000017/                  the new files of the table, built by the driver with lock 17
    commit.json                  what to publish; once it exists, the commit will be finished
    claimed-000018               the driver with lock 18 resumes it
    discarded-000017             the driver with lock 17 deletes it, unless a later one has claimed it
```

**Every number is that of a lock**: a generation has the number of the driver that began it, a version of the table and
its files that of the driver that decided on it. So no two drivers ever make the same name, and a driver that wakes up
after it has lost the lock knows only names that its successor does not need. A generation is published if the newest
mark has its number or a higher one; what is left of its folder is debris.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from mnist_dist import documents
from mnist_dist.config import EngineName, EnginePrecision, Geometry
from mnist_dist.engines.conversion import Check
from mnist_dist.errors import DataError, LockLost, MnistDistError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.score_config import TableFormat, TtaView
from mnist_dist.scoring.predictions import (
    DELTA,
    FAILED,
    FOLDERS,
    LOCK,
    SUCCESS,
    TABLE,
    TABLES,
    WORK,
    Mark,
    read_mark,
    table_uri,
)
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store, names_in
from mnist_dist.store.uris import absolute, join

MANIFEST, SUMMARY = "manifest.parquet", "summary.json"
SUMMARY_COPY = f"_{SUMMARY}"
ENGINES_FOLDER = "_engines"
"""Folder in the output for converted models, when the folder beside the bundle is read-only."""
_OWN = frozenset({*FOLDERS.values(), TABLES, WORK, SUCCESS, FAILED, SUMMARY_COPY, ENGINES_FOLDER})
_MAX_SHOWN = 5
_PLAN, _COMMIT, _DROPPED = "plan.json", "commit.json", "dropped.parquet"
_GENERATION = re.compile(rf"{WORK}/g(?P<number>\d+)/(.*)")
_SHARD = re.compile(r"shard-(\d+)\.parquet")
_PART = re.compile(rf"(?P<folder>{TABLE}|{DELTA})/part-(?P<number>\d+)-(?:kept-)?\d+\.parquet")
_VERSION = re.compile(rf"{TABLES}/(?P<number>\d+)/.*")
_LEFT_BY_KILLED = re.compile(rf"\.({SUCCESS}|{FAILED}|{re.escape(SUMMARY_COPY)})\.[0-9a-f]+\.tmp")

_CLAIM = re.compile(r"(claimed|discarded)-(\d+)")
_INSIDE = re.compile(rf"{WORK}/g\d+/(?:claimed|discarded|out)-(?P<number>\d+)")
_NUMBERED = (_GENERATION, _PART, _VERSION, _INSIDE)

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
    dropped: int = 0
    """Number of rows of the old table that are dropped because their images are gone."""


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
    resize: Geometry
    """How an image of another shape became the model's input."""
    versions: dict[str, str]
    """Versions of Python and of the packages that scored, by name."""
    spec: ImageSpec | None = None
    """Size, channels, and all of how images were decoded and fitted to the model's input. None: made by an older
    version."""
    multi_label: bool = False
    """Whether each class has a probability of its own."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Class -> the probability from which it is one of the `predicted_classes`; empty unless `multi_label`."""
    tta: tuple[TtaView, ...] = ()
    """Test-time augmentation: the views of each image beside itself."""


@dataclass(frozen=True, kw_only=True)
class Summary(Origin):
    """`summary.json`: a description of the table, for people and for the next job."""

    described: Description
    images_per_s: float | None
    number: int
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
        return join(self.uri, MANIFEST)

    @property
    def dropped_uri(self) -> str:
        """Parquet with the `uri` of the rows that are dropped, if there are some."""
        return join(self.uri, _DROPPED)

    def out_uri(self, fence: int) -> str:
        """The folder in which one driver builds the new files of the table."""
        return join(self.uri, f"out-{fence:06d}")

    @property
    def commit_uri(self) -> str:
        return join(self.uri, _COMMIT)

    @property
    def is_committing(self) -> bool:
        """Whether its commit has begun; the commit must then be finished (`replay`)."""
        return self.store.exists(self.commit_uri)

    def begin(self, manifest: Callable[[str], None], *, dropped: pa.Array | None = None) -> None:
        """Writes the manifest and then the plan, which makes the generation valid.

        Args:
            manifest: writes the manifest to the given URI.
            dropped: URIs of the rows of the old table that are dropped.
        """
        manifest(self.manifest_uri)
        if dropped:
            with self.store.new_object(self.dropped_uri) as file:
                pq.write_table(pa.table({"uri": dropped}), file)
        documents.write(self.store, join(self.uri, _PLAN), self.plan)

    def claim(self, *, fence: int) -> None:
        """Keeps the generation from being deleted by an earlier driver that comes to it late."""
        if fence != self.number:
            self.store.write_bytes(join(self.uri, f"claimed-{fence:06d}"), b"")

    def shard_uri(self, shard: int) -> str:
        return join(self.uri, f"shard-{shard:06d}.parquet")

    def done_shards(self) -> set[int]:
        """The numbers of the finished shards, found by one listing."""
        names = (entry.uri.removeprefix(f"{self.uri}/") for entry in self.store.scan_entries(self.uri))
        return {int(match[1]) for name in names if (match := _SHARD.fullmatch(name))}


class Output:
    """The folder of a prediction table. Callers of methods that write must hold the lock.

    Args:
        uri: a folder or a bucket prefix.
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
            DataError: the mark is damaged, or the folder holds a table that something else has written.
        """
        mark = read_mark(self.uri, store=self.store)
        if mark is None:
            for name in (SUCCESS, FAILED):
                if self.store.exists(join(self.uri, name)):
                    raise DataError(
                        f"{join(self.uri, name)} is not the mark of a prediction table; choose another folder for the "
                        f"output. Received: {self.uri!r}"
                    )
            return None
        try:
            summary = documents.read(self.store, self.version_uri(mark.number, SUMMARY), Summary)
        except (FileNotFoundError, DataError):  # deleted or damaged by hand; reading the table does not need it
            summary = None
        return Committed(mark=mark, summary=summary)

    def unfinished(self) -> Generation | None:
        """The newest generation that was begun, is not published and not discarded; None if there is none.

        Raises:
            DataError: the plan is damaged.
        """
        published = self._published()
        number = max((number for number, names in self._generations().items() if _is_alive(names)), default=0)
        if number <= published:
            return None
        uri = self._generation_uri(number)
        try:
            return Generation(number, uri, documents.read(self.store, join(uri, _PLAN), Plan), self.store)
        except DataError as err:
            raise DataError(f"{err}; delete this unfinished generation to start it again: {uri}") from err

    def check_nothing_else(self, table_format: TableFormat) -> None:
        """Checks, before the first version of a table, that the output holds nothing else, hidden files excepted.

        Raises:
            DataError: it holds foreign files, or those of a table whose description was deleted.
        """
        foreign = [name for name in names_in(self.store, self.uri) if name not in _OWN]
        if foreign:
            raise DataError(
                f"the output must be a new folder, or one that scoring has made. Received: {self.uri!r}, which holds "
                f"{', '.join(foreign[:_MAX_SHOWN])}"
            )
        folder = FOLDERS[table_format]
        for name in self.names(folder):
            if table_format == "delta" or not _PART.fullmatch(name):
                raise DataError(
                    f"{folder}/ must be empty before the first run; delete it or choose another folder for the output. "
                    f"Received: {name!r} in {self.uri!r}"
                )

    def new_generation(self, plan: Plan, *, fence: int) -> Generation:
        """The generation of the driver that holds the lock `fence`; it becomes valid with `begin`.

        Args:
            plan: what must stay the same when the generation is resumed.
            fence: number of the lock, under which one generation is begun and one version published at most.
        """
        return Generation(fence, self._generation_uri(fence), plan, self.store)

    def max_number(self) -> int:
        """The highest number in any name here; 0: there is none."""
        numbers = [int(match["number"]) for name in self.names() for kind in _NUMBERED if (match := kind.match(name))]
        return max(numbers, default=0)

    def part_uri(self, mark: Mark, name: str) -> str:
        """The URI of a file of a version of the table."""
        return join(self.uri, mark.folder, name)

    def version_uri(self, number: int, name: str) -> str:
        """The URI of a file that describes a version of the table."""
        return table_uri(self.uri, number, name)

    def discard(self, generation: Generation, *, fence: int) -> None:
        """Deletes a generation and its finished shards.

        First it is marked as discarded, so that no later driver resumes it; if one has claimed it, this driver is late.

        Raises:
            MnistDistError: its commit has begun, so that the old table is no longer complete.
            LockLost: a later driver resumes it.
        """
        if generation.is_committing:
            raise MnistDistError(f"a commit that has begun must be finished first. Received: {generation.uri!r}")
        self.store.write_bytes(join(generation.uri, f"discarded-{fence:06d}"), b"")
        if _is_alive(self._generations().get(generation.number, set())):
            raise LockLost(f"another driver resumes what this one discards. Received: {generation.uri!r}")
        self._delete(generation.number)

    # --- sweeping ----------------------------------------------------------------------------------------------------

    def sweep(self, *, fence: int) -> None:
        """Makes the folder agree with the newest mark: deletes what killed or late drivers left, renews the copies.

        A driver that comes to this late does no harm: every name that it deletes has a number that is not in use any
        more, and the copies are renewed by whoever comes next.

        Args:
            fence: number of the lock. Generations of later drivers may lack their plan because they are just beginning.
        """
        names, generations = list(self.names()), self._generations()
        committed = self.committed()  # after the names: what another driver has published since is named here
        for number, files in generations.items():
            if not _is_alive(files) and number < fence:
                self._delete(number)
        if committed is None:
            return
        is_committing = any(_COMMIT in files for files in generations.values())
        self.sweep_after(committed, names=names, below=0 if is_committing else fence)

    def sweep_after(self, committed: Committed, *, names: Sequence[str] | None = None, below: int = 0) -> None:
        """Deletes everything that a version of the table has replaced, and writes the copies.

        Args:
            committed: the version.
            names: what is in the folder; None: looks.
            below: numbers of files that no commit will publish, although they are greater than that of the version.
        """
        names = list(self.names()) if names is None else names
        self._delete_unnamed(committed.mark, names, below=max(below, committed.mark.number + 1))
        self._write_copies(committed)
        for number in sorted(self._generations()):
            if number <= committed.mark.number:
                self._delete(number)

    def _delete_unnamed(self, mark: Mark, names: Iterable[str], *, below: int) -> None:
        """Deletes older versions of the table, its files that the mark does not name, and files of killed writes.

        Of a Delta table the replaced files stay, for readers of its older versions.
        """
        older = set[int]()
        for name in names:
            part, version = _PART.fullmatch(name), _VERSION.fullmatch(name)
            is_part = part is not None and part["folder"] == TABLE and int(part["number"]) < below
            is_named = name.rpartition("/")[2] in mark.files
            if (is_part and not is_named) or _LEFT_BY_KILLED.fullmatch(name):
                self.store.delete(join(self.uri, name))
            if version is not None and int(version["number"]) < mark.number:
                older.add(int(version["number"]))
        for number in sorted(older):
            self.store.delete_tree(join(self.uri, TABLES, f"{number:06d}"))

    def _write_copies(self, committed: Committed) -> None:
        """Writes the copies of the mark and the summary for other tools, unless they exist."""
        mark = committed.mark
        self._write_copy(SUMMARY_COPY, committed.summary)
        self._write_copy(mark.copy_name, mark)
        self.store.delete(join(self.uri, SUCCESS if mark.failed else FAILED))

    def delete_copies(self) -> None:
        """Deletes the copies of the mark, so that other tools wait until the table is complete again."""
        for name in (SUCCESS, FAILED):
            self.store.delete(join(self.uri, name))

    def _write_copy(self, name: str, document: Mark | Summary | None) -> None:
        uri, data = join(self.uri, name), documents.encode(document)
        try:
            if document is None or self.store.read_bytes(uri) == data:
                return
        except FileNotFoundError:
            pass
        self.store.write_bytes(uri, data)

    def _delete(self, number: int) -> None:
        uri = self._generation_uri(number)
        self.store.delete(join(uri, _PLAN))  # first, so that a deletion that is killed midway leaves only debris
        self.store.delete_tree(uri)

    def _published(self) -> int:
        mark = read_mark(self.uri, store=self.store)
        return mark.number if mark else 0

    def _generation_uri(self, number: int) -> str:
        return join(self.uri, WORK, f"g{number:06d}")

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


def _is_alive(names: Collection[str]) -> bool:
    """Whether a generation with these names can be resumed: it was begun, and no driver but an earlier one discarded
    it."""
    latest = {"claimed": 0, "discarded": 0}
    for name in names:
        if match := _CLAIM.fullmatch(name):
            latest[match[1]] = max(latest[match[1]], int(match[2]))
    return _PLAN in names and MANIFEST in names and latest["discarded"] <= latest["claimed"]
