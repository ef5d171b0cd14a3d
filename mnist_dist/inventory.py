"""Lists a storage: one row with state, progress and result for each run, search or prediction table.

Owns: `--list` on the command line, the rows and their display, walking a storage's folders, and `run-000017.json`,
which distinguishes a run from a search. Does not own: the other files of a run, a search or a table
(`training/runs.py`, `tuning/search_row.py` and `scoring/output_row.py` read them). It only reads, takes no lock and
loads neither Ray nor TensorFlow.

```
finished     the result exists
running      a driver is working on it
stopped      progress is saved and no driver is running: the same command resumes
failed       it ended without a usable result
new          started, nothing saved yet
unreadable   damaged, or access denied; the result column says why
```
"""

import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from mnist_dist import documents
from mnist_dist.command_line import parse
from mnist_dist.config import FeatureType
from mnist_dist.console import Console
from mnist_dist.documents import Document
from mnist_dist.errors import MnistDistError, StorageError, first_line
from mnist_dist.store.anywhere import ANYWHERE, check_access
from mnist_dist.store.base import Store
from mnist_dist.store.lock import Holder, holder_of
from mnist_dist.store.surroundings import what_is_there
from mnist_dist.store.uris import absolute, join

State = Literal["finished", "running", "stopped", "failed", "new", "unreadable"]
ASK = "--list"
HELP = f"{ASK} [--storage URI]: lists what a storage holds, with its state, progress and result, and does nothing else."
THREADS = 16  # Folders are read in parallel because a request to an object store is mostly waiting.
MAX_NAMES = 10_000  # Listing a folder stops here, because it may be a huge folder of images.
TITLES = ("name", "state", "progress", "result", "touched")
TRIALS, ATTEMPT = "trials", "attempt-"
_FACTS = re.compile(r"run-(\d{6,})\.json")
LOCK = "lock"
"""Folder of a run or search with the objects of its lock; see `store/lock.py`."""
_DAMAGES = (OSError, ValueError, TypeError, LookupError)  # Reading a damaged folder raises one of these.


@dataclass(frozen=True, kw_only=True)
class ListJob:
    """Lists what a storage holds, with its state, progress and result; changes nothing."""

    storage: str = "runs"
    """Folder or bucket prefix to list."""
    verbose: bool = False
    """Show the traceback of an unexpected error."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Everything that determines the result of a run or a search: `run-000017.json`; the number is that of the lock."""

    recipe: str
    settings: Mapping[str, Any]
    """The settings of the job, as JSON values."""
    features: FeatureType | None
    """Number type of the stored features; None: there are none."""
    records: str | None = None
    """Identifies the images by the keys of their record caches; None: not known yet."""
    batch_size: int | None = None
    """The global batch that `--batch-size auto` found; None: a number was given, or it is not found yet."""


@dataclass(frozen=True, kw_only=True)
class InventoryRow:
    """A run, a search or a prediction table."""

    name: str
    """The folder, relative to the storage."""
    uri: str
    state: State
    progress: str = ""
    """Progress in words."""
    result: str = ""
    """Result in words; if unreadable, the reason."""
    updated_s: float | None = None
    """Time of the last write, s since the epoch."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The numbers behind progress and result, and more, as JSON values."""

    def values(self) -> dict[str, Any]:
        """The row as JSON values; `updated` is in UTC."""
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
    """A folder that may hold a run, search or table, as a single listing shows it."""

    name: str
    """Path relative to the storage."""
    uri: str
    folders: frozenset[str]
    files: Mapping[str, float]
    """Name -> write time of each file directly in the folder, s since the epoch."""
    store: Store = ANYWHERE

    @property
    def updated_s(self) -> float | None:
        """Write time of the newest file directly in the folder, s since the epoch."""
        return max(self.files.values(), default=None)

    def updated_with(self, *names: str) -> float | None:
        """Like `updated_s`, but also looks at the files of these subfolders."""
        below = (self.store.list_level(join(self.uri, name)).files for name in names)
        return max((*self.files.values(), *(time for files in below for time in files.values())), default=None)

    def read(self, name: str, kind: type[Document]) -> Document | None:
        """Reads a document of the folder; None if it does not exist.

        Raises:
            DataError: the document is damaged.
        """
        if name not in self.files:
            return None
        return documents.read(self.store, join(self.uri, name), kind)

    def facts(self) -> RunFacts | None:
        """The facts of the run or search; None if there are none yet.

        Raises:
            DataError: the document is damaged.
        """
        number = self.facts_number()
        return self.read(facts_name(number), RunFacts) if number else None

    def facts_number(self) -> int:
        """The number of the lock under which the run or search was begun; 0: it was not."""
        return max(facts_names(self.files).values(), default=0)

    def driver(self) -> Holder | None:
        """The driver that is working on the run or search, or None."""
        return living(join(self.uri, LOCK)) if LOCK in self.folders else None


RowOf = Callable[[Folder], InventoryRow | None]
"""Makes the row of a folder; None: the folder is something else. May raise any error of reading a damaged folder."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What to look for in a storage."""

    row_of: RowOf
    depth: int = 1
    """How many levels of folders to read; folders below one that has a row are not read."""


def living(lock_uri: str) -> Holder | None:
    """The driver that holds a lock, or None if it is no longer running.

    Raises:
        DataError: the lock is damaged.
    """
    holder = holder_of(lock_uri)
    return holder if holder is not None and holder.seems_alive else None


def state_of(*, is_finished: bool, driver: Holder | None, is_saved: bool) -> State:
    """The state of a run, search or table that is not known to be damaged or failed."""
    if is_finished:
        return "finished"
    if driver is not None:
        return "running"
    return "stopped" if is_saved else "new"


def driver_values(driver: Holder | None) -> dict[str, Any]:
    """The driver as JSON values."""
    return {} if driver is None else {"driver": {"host": driver.host, "pid": driver.pid}}


def is_search(folder: Folder) -> bool | None:
    """Whether a folder holds a search rather than a run; None: unknown as yet, because only its lock exists."""
    if TRIALS in folder.folders:
        return True
    if any(name.startswith(ATTEMPT) for name in folder.folders):
        return False
    facts = folder.facts()
    return None if facts is None else "search" in facts.settings


def is_run(folder: Folder) -> bool:
    """Whether a folder holds a run or a search."""
    return bool(folder.facts_number()) or folder.driver() is not None


def facts_name(number: int) -> str:
    """The name of the facts of a run that was begun under a lock of this number."""
    return f"run-{number:06d}.json"


def facts_names(names: Iterable[str]) -> dict[str, int]:
    """Of the names in a folder those of facts, with their numbers; the highest number counts."""
    return {name: int(match[1]) for name in names if (match := _FACTS.fullmatch(name))}


# --- walking a storage -----------------------------------------------------------------------------------------------


def rows_below(uri: str, row_of: RowOf, *, depth: int = 1) -> list[InventoryRow]:
    """The rows of all folders below a storage, or of the storage itself; the most recently written first.

    See `rows_of_kinds`, which it is for a single kind.
    """
    return rows_of_kinds(uri, {"": Kind(row_of=row_of, depth=depth)})[""]


def rows_of_kinds(uri: str, kinds: Mapping[str, Kind]) -> dict[str, list[InventoryRow]]:
    """The rows of each kind, in one walk of a storage: of all folders below it, or of the storage itself; the most
    recently written first.

    Folders whose names begin with `_` or `.` hold caches and unfinished work; they are skipped.

    Args:
        uri: URI of the storage.
        kinds: name -> what makes a row, and how deep to look for it.

    Raises:
        StorageError: the storage does not exist or cannot be listed.
        ServiceError: the storage failed.
    """
    check_access([uri])
    root = absolute(uri)
    try:
        top = _open("", root, max_names=None)
    except OSError as err:
        raise StorageError(f"the storage cannot be listed: {err}{what_is_there(root)}. Received: {uri!r}") from err
    rows, level = {kind: list[InventoryRow]() for kind in kinds}, [_Looked.at(top, kinds)]
    with ThreadPoolExecutor(THREADS) as pool:
        for depth in itertools.count():
            for looked in level:
                for kind, row in looked.rows.items():
                    rows[kind].append(row)
            below = [(name, left) for looked in level if (left := looked.left(depth)) for name in looked.names]
            if not below:
                break
            level = list(pool.map(lambda each: _look(each[0], root, each[1]), below))
    return {kind: sorted(found, key=lambda row: (-(row.updated_s or 0.0), row.name)) for kind, found in rows.items()}


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """A folder that was looked at."""

    names: Sequence[str]
    """Of the folders in it."""
    rows: Mapping[str, InventoryRow]
    """Its row of each kind of which it is one."""
    sought: Mapping[str, Kind]

    @classmethod
    def at(cls, folder: Folder, sought: Mapping[str, Kind]) -> "_Looked":
        """Looks for some kinds."""
        rows = {name: _row_or_damage(folder, kind.row_of) for name, kind in sought.items()}
        found = {name: row for name, row in rows.items() if row is not None}
        return cls(names=_names_below(folder), rows=found, sought=sought)

    def left(self, depth: int) -> dict[str, Kind]:
        """The kinds to look for below it, a level deeper: folders below one that has a row are not read."""
        return {name: kind for name, kind in self.sought.items() if name not in self.rows and depth < kind.depth}


def _names_below(folder: Folder) -> list[str]:
    names = sorted(name for name in folder.folders if not name.startswith(("_", ".")))
    return [f"{folder.name}/{name}" if folder.name else name for name in names]


def _look(name: str, root: str, sought: Mapping[str, Kind]) -> _Looked:
    """A folder of a storage; one that has disappeared in the meantime is empty."""
    uri = join(root, name)
    try:
        folder = _open(name, uri, max_names=MAX_NAMES)
    except FileNotFoundError:
        return _Looked(names=(), rows={}, sought={})
    except OSError as err:
        return _Looked(names=(), rows=dict.fromkeys(sought, _damaged(name, uri, err)), sought=sought)
    return _Looked.at(folder, sought)


def _open(name: str, uri: str, *, max_names: int | None) -> Folder:
    level = ANYWHERE.list_level(uri, max_names=max_names)
    return Folder(name=name, uri=uri, folders=frozenset(level.folders), files=level.files)


def _row_or_damage(folder: Folder, row_of: RowOf) -> InventoryRow | None:
    """The row of a folder, which reports any damage; None: the folder is something else."""
    try:
        try:
            return row_of(folder)
        except FileNotFoundError:  # A running driver replaced a file in the meantime: read the folder again.
            return row_of(_open(folder.name, folder.uri, max_names=MAX_NAMES))
    except _DAMAGES as err:
        return _damaged(folder.name, folder.uri, err, updated_s=folder.updated_s)


def _damaged(name: str, uri: str, error: Exception, *, updated_s: float | None = None) -> InventoryRow:
    is_expected = isinstance(error, MnistDistError | OSError)
    reason = first_line(error) if is_expected else f"{type(error).__name__}: {first_line(error)}"
    return InventoryRow(name=name, uri=uri, state="unreadable", result=reason, updated_s=updated_s)


# --- the command -----------------------------------------------------------------------------------------------------


def asked(command: str, argv: Sequence[str]) -> ListJob | None:
    """Parses a command line that contains `--list`; None if it does not.

    Args:
        command: the program as the user called it, such as `python -m jobs.train`.
        argv: the arguments.

    Raises:
        ConfigError: a flag that `--list` does not take.
        SystemExit: 0 after `--help`.
    """
    if ASK not in argv:
        return None
    arguments = [argument for argument in argv if argument != ASK]
    return parse({"list": ListJob}, command=f"{command} {ASK}", default="list", argv=arguments)[1]


def show(rows: Sequence[InventoryRow], *, job: ListJob, what: str, console: Console) -> dict[str, Any]:
    """Shows the rows to the user; returns the job's JSON keys.

    Args:
        rows: the rows that `rows_below` returned.
        job: the parsed command line.
        what: what the rows are, in the plural.
        console: shows the rows.
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
    """Formats an age for display."""
    for length_s, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= length_s:
            return f"{seconds // length_s:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
