"""What lies below a storage, a row for each run, search or prediction table: state, progress, result.

Owns: `--list` on the command line, the row and how it is shown, going through a storage's folders, and `run.json`,
which tells a run from a search. Does not own: what else a run, a search or a table looks like (`training/runs.py`,
`search/listing.py`, `scoring/listing.py` read theirs). Reads only, takes no lock, and loads neither Ray nor TensorFlow.

```
finished     the result is there
running      a driver is at work on it
stopped      something is saved and nobody is at work: the same command goes on
failed       it came to its end, and nothing good came of it
new          begun, nothing saved yet
unreadable   damaged or denied; in place of the result stands why
```
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import tyro

from mnist_dist import documents
from mnist_dist.config import FeatureType
from mnist_dist.console import Console
from mnist_dist.documents import Document
from mnist_dist.errors import MnistDistError, StorageError, first_line
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.lock import Holder, holder_of
from mnist_dist.store.uris import absolute, join

State = Literal["finished", "running", "stopped", "failed", "new", "unreadable"]
ASK = "--list"
HELP = (
    f"{ASK} [--storage URI]: shows what lies in a storage, with its state, progress and result, and does nothing else."
)
THREADS = 16  # that look at folders: on object stores a request waits far longer than it works
MAX_NAMES = 10_000  # looked at in a folder that may be one of images
TITLES = ("name", "state", "progress", "result", "touched")
TRIALS, ATTEMPT = "trials", "attempt-"
_RUN_FILES = {"run.json", "lock"}
_DAMAGES = (OSError, ValueError, TypeError, LookupError)  # what reading a damaged folder raises


@dataclass(frozen=True, kw_only=True)
class ListJob:
    """Shows what lies in a storage, with its state, progress and result; changes nothing."""

    storage: str = "runs"
    """Folder or `s3://` prefix to look in."""
    verbose: bool = False
    """Show where an unexpected error comes from."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What decides the result of a run or a search: `run.json`."""

    recipe: str
    settings: Mapping[str, Any]
    """Of the job, as JSON values."""
    features: FeatureType | None
    """How features are stored; None: there are none."""
    records: str | None = None
    """Names the images, by the keys of their record caches; None: not known yet."""


@dataclass(frozen=True, kw_only=True)
class InventoryRow:
    """A run, a search or a prediction table."""

    name: str
    """Its folder, relative to the storage."""
    uri: str
    state: State
    progress: str = ""
    """In words."""
    result: str = ""
    """In words; of an unreadable one, why."""
    updated_s: float | None = None
    """When it was last written to, s since the epoch."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What the words say, and more, as JSON values."""

    def values(self) -> dict[str, Any]:
        """As JSON values; `updated` in UTC."""
        updated = None if self.updated_s is None else datetime.fromtimestamp(self.updated_s, UTC)
        return {
            "name": self.name,
            "uri": self.uri,
            "state": self.state,
            "progress": self.progress,
            "result": self.result,
            "updated": updated.isoformat(timespec="seconds") if updated else None,
            **self.numbers,
        }


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One folder that may be what is looked for, as one listing shows it."""

    name: str
    """Relative to the storage."""
    uri: str
    folders: frozenset[str]
    files: Mapping[str, float]
    """When each of its own files was written, s since the epoch, by name."""
    store: Store = ANYWHERE

    @property
    def updated_s(self) -> float | None:
        """When the newest of its own files was written, s since the epoch."""
        return max(self.files.values(), default=None)

    def updated_with(self, *names: str) -> float | None:
        """As `updated_s`, with the files of the folders of these names below it."""
        below = (self.store.list_level(join(self.uri, name)).files for name in names)
        return max((*self.files.values(), *(time for files in below for time in files.values())), default=None)

    def read(self, name: str, kind: type[Document]) -> Document | None:
        """A document of the folder, or None.

        Raises:
            DataError: it is damaged.
        """
        if name not in self.files:
            return None
        return documents.read(self.store, join(self.uri, name), kind)

    def driver(self) -> Holder | None:
        """Who is at work on the run or search, if anybody is."""
        return living(join(self.uri, "lock")) if "lock" in self.files else None


RowOf = Callable[[Folder], InventoryRow | None]
"""The row of a folder; None: it is not what is looked for. May raise whatever reading a damaged folder raises."""


def living(lock_uri: str) -> Holder | None:
    """The driver that holds a lock, if it may still be at work.

    Raises:
        DataError: the lock is damaged.
    """
    holder = holder_of(lock_uri)
    return holder if holder is not None and holder.is_alive else None


def state_of(*, is_finished: bool, driver: Holder | None, is_saved: bool) -> State:
    """The state of what nothing is known to be wrong with."""
    if is_finished:
        return "finished"
    if driver is not None:
        return "running"
    return "stopped" if is_saved else "new"


def driver_values(driver: Holder | None) -> dict[str, Any]:
    """Who is at work, as JSON values."""
    return {} if driver is None else {"driver": {"host": driver.host, "pid": driver.pid}}


def is_search(folder: Folder) -> bool | None:
    """Whether a run is a search, since both may share a storage; None: too early to tell, only its lock is there."""
    if TRIALS in folder.folders:
        return True
    if any(name.startswith(ATTEMPT) for name in folder.folders):
        return False
    facts = folder.read("run.json", RunFacts)
    return None if facts is None else "search" in facts.settings


def is_run(folder: Folder) -> bool:
    """Whether a folder holds a run or a search."""
    return not _RUN_FILES.isdisjoint(folder.files)


# --- going through a storage -----------------------------------------------------------------------------------------


def rows_below(uri: str, row_of: RowOf, *, depth: int = 1) -> list[InventoryRow]:
    """The rows of all folders below a storage, or of the storage itself; what was touched last comes first.

    Folders whose names begin with `_` or `.` are caches and work; they are left out.

    Args:
        uri: of the storage.
        row_of: reads a folder.
        depth: how many levels of folders are looked at; not those below something that has a row.

    Raises:
        StorageError: there is no such storage, or it cannot be listed.
        ServiceError: the storage failed.
    """
    root = absolute(uri)
    try:
        top = _open("", root, most=None)
    except OSError as err:
        raise StorageError(f"the storage cannot be listed: {err}. Received: {uri!r}") from err
    row = _row_or_damage(top, row_of)
    if row is not None:
        return [row]
    rows, level = list[InventoryRow](), [top]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(depth):
            names = [name for folder in level for name in _names_below(folder)]
            found = list(pool.map(lambda name: _look(name, root, row_of), names))
            rows += [row for _, row in found if row is not None]
            level = [folder for folder, row in found if folder is not None and row is None]
    return sorted(rows, key=lambda row: (-(row.updated_s or 0.0), row.name))


def _names_below(folder: Folder) -> list[str]:
    names = sorted(name for name in folder.folders if not name.startswith(("_", ".")))
    return [f"{folder.name}/{name}" if folder.name else name for name in names]


def _look(name: str, root: str, row_of: RowOf) -> tuple[Folder | None, InventoryRow | None]:
    """A folder and its row; neither where it is gone meanwhile."""
    uri = join(root, name)
    try:
        folder = _open(name, uri, most=MAX_NAMES)
    except FileNotFoundError:
        return None, None
    except OSError as err:
        return None, _damaged(name, uri, err)
    return folder, _row_or_damage(folder, row_of)


def _open(name: str, uri: str, *, most: int | None) -> Folder:
    level = ANYWHERE.list_level(uri, max_names=most)
    return Folder(name=name, uri=uri, folders=frozenset(level.folders), files=level.files)


def _row_or_damage(folder: Folder, row_of: RowOf) -> InventoryRow | None:
    """The row, in which a damage is told; None: the folder is not what is looked for."""
    try:
        try:
            return row_of(folder)
        except FileNotFoundError:  # a driver at work has put something else in its place: it is looked at again
            return row_of(_open(folder.name, folder.uri, most=MAX_NAMES))
    except _DAMAGES as err:
        return _damaged(folder.name, folder.uri, err, updated_s=folder.updated_s)


def _damaged(name: str, uri: str, error: Exception, *, updated_s: float | None = None) -> InventoryRow:
    is_ours = isinstance(error, MnistDistError | OSError)
    reason = first_line(error) if is_ours else f"{type(error).__name__}: {first_line(error)}"
    return InventoryRow(name=name, uri=uri, state="unreadable", result=reason, updated_s=updated_s)


# --- the command -----------------------------------------------------------------------------------------------------


def asked(command: str, argv: Sequence[str]) -> ListJob | None:
    """What a command line with `--list` asks for; None: it has none.

    Args:
        command: such as `python -m jobs.train`.
        argv: the arguments.

    Raises:
        SystemExit: 0 after `--help`, 2 for anything else beside `--list`.
    """
    if ASK not in argv:
        return None
    return tyro.cli(ListJob, args=[one for one in argv if one != ASK], prog=f"{command} {ASK}")


def show(rows: Sequence[InventoryRow], *, job: ListJob, what: str, console: Console) -> dict[str, Any]:
    """Shows the rows to a person; returns the job's JSON keys.

    Args:
        rows: as `rows_below` found them.
        job: what was asked.
        what: the rows are, in the plural.
        console: where they are shown.
    """
    root, now = absolute(job.storage), time.time()
    console.line(f"{what} below {root}: {len(rows):,}" if rows else f"no {what} below {root}")
    if rows:
        console.table([TITLES, *(_cells(row, now=now) for row in rows)])
    return {"storage": root, "runs": [row.values() for row in rows]}


def _cells(row: InventoryRow, *, now: float) -> tuple[str, ...]:
    touched = "" if row.updated_s is None else ago(now - row.updated_s)
    return (row.name or ".", row.state, row.progress, row.result, touched)


def ago(seconds: float) -> str:
    """How long something is past, for people."""
    for length_s, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= length_s:
            return f"{seconds // length_s:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
