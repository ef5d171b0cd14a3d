"""Turns the input arguments into a table of the images to score.

Owns: what an input is (a file, a folder, a prefix, a glob, an archive, a list), and listing it. Does not own: which
files are taken and what an archive holds (`choice`), the order of the table and its duplicates (`image_table`), or the
formats of lists (`lists`).

Contract: listing reads only lists and the indexes of archives, and loses no row. An image already known to be unusable
gets its status here. An S3 object that a list names is not looked up; whether it exists shows when it is read. A name
that exists is taken literally before it is tried as a glob.
"""

import contextlib
import fnmatch
import functools
import glob
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TextIO

import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.config import InputConfig, require
from mnist_dist.errors import DataError
from mnist_dist.images.decoder import IMAGE_SUFFIXES
from mnist_dist.sources import image_table, lists
from mnist_dist.sources.archives import split_member
from mnist_dist.sources.choice import Choice, LeftOut, Opened, open_archive, row_of_entry, row_of_line
from mnist_dist.sources.image_table import COLUMNS, ImageRow, WaitingRows
from mnist_dist.sources.lists import Lines
from mnist_dist.sources.threads import map_in_threads
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry
from mnist_dist.store.uris import absolute, is_file_uri, is_remote

_log = logging.getLogger(__name__)
_STDIN = "-"
_THREADS = 8  # The threads wait for storage, not for a core.
_AHEAD = 16  # archives, or pieces of a list, that are opened before they are needed
_PIECE_LINES = 1_000  # lines of a list that a thread looks up at a time
_PROGRESS_ENTRIES = 1_000  # files between two reports of progress
_MAX_SHOWN = 10  # inputs, or file suffixes, in a message
_MAGIC = re.compile(r"[*?\[]")
_ESCAPED = re.compile(r"\[([*?\[])\]")
_GLOB_TOKEN = re.compile(r"(?:(?<=/)|^)\*\*/|\*+|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


@dataclass(frozen=True)
class Listing:
    """The images to score, and counts of what was left out."""

    table: pa.Table
    """`manifest.COLUMNS`, then the carried columns. Each URI occurs once. Inputs keep their order; each is sorted by
    URI, and members come in the order of their archive."""
    by_suffix: Mapping[str, int]
    """Number of images by lower-case file suffix (`.jpg`), the most frequent first."""
    archives: int
    """Archives that were opened."""
    named_twice: int
    """Duplicate rows left out; the first row of a URI is kept."""
    duplicate_members: int
    """Members of archives that a later member of the same name replaces."""
    others: int
    """Files left out because their suffix is not an image suffix, or by include and exclude."""

    @property
    def total_bytes(self) -> int:
        """Total size of the images whose size is known."""
        return int(pc.sum(self.table["size_bytes"]).as_py() or 0)


def list_inputs(
    config: InputConfig,
    *,
    reserved: Iterable[str] = (),
    stdin: TextIO | None = None,
    progress: Callable[[int], None] | None = None,
) -> Listing:
    """Lists all images that `config.input` names.

    Args:
        config: the inputs, and which of their files to take.
        reserved: column names that may not be carried, besides those of `COLUMNS`.
        stdin: the stream to read for the input `-`. None: the stdin of the process.
        progress: called now and then with the number of images listed so far.

    Raises:
        ConfigError: a carried column has a reserved name.
        DataError: an input does not exist, must not be listed or is an unreadable list, or there are no images.
        ServiceError, StorageError: see `store.base`.
    """
    clashing = sorted({*COLUMNS.names, *reserved}.intersection(config.carried))
    require(not clashing, "carry must not name columns of the predictions", carry=clashing)
    return _Search(config, stdin=stdin, progress=progress).listing()


@dataclass(frozen=True)
class _Place:
    """One input: what kind it is, and counts of the files left out of it."""

    name: str
    """As typed by the user."""
    kind: Literal["stdin", "line", "list", "glob", "tree"]
    uri: str
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def is_listed(self) -> bool:
        """Whether the input names images one by one."""
        return self.kind in ("stdin", "line", "list")


class _Search:
    """The state of one listing.

    Args:
        config, stdin, progress: as for `list_inputs`.
    """

    def __init__(self, config: InputConfig, *, stdin: TextIO | None, progress: Callable[[int], None] | None) -> None:
        self._config = config
        self._choice = Choice.of(config)
        self._carried = tuple(dict.fromkeys(config.carried))
        self._stdin = stdin
        self._progress = progress or (lambda images: None)
        self._images = 0
        self._archives: dict[str, int] = {}
        """Opened archive -> how many of its members are replaced by later ones."""

    def listing(self) -> Listing:
        """Lists all inputs."""
        places = [_place_of(name) for name in self._config.input]
        columns = {place.uri: _columns_of(place) for place in places if place.kind == "list"}
        _check_carried(self._carried, columns)
        tables = [self._table_of(place, columns.get(place.uri, ())) for place in places]
        rows = image_table.joined(tables, self._carried)
        if not len(rows):
            raise DataError(_no_images(self._config, places))
        # A single folder or glob has no duplicates, so the search for them is skipped.
        unique = rows if len(places) == 1 and not places[0].is_listed else image_table.first_of_each(rows)
        table = unique if self._config.sample is None else image_table.sample_of(unique, self._config.sample)
        table = image_table.compact(table.slice(0, self._config.limit))
        return Listing(
            table=table,
            by_suffix=image_table.count_suffixes(table),
            archives=len(self._archives),
            named_twice=len(rows) - len(unique),
            duplicate_members=sum(self._archives.values()),
            others=sum(place.left_out.total for place in places),
        )

    def _table_of(self, place: _Place, columns: Sequence[str]) -> pa.Table:
        _log.info("listing %s", place.name)
        with _errors_of(place.name):
            table = self._named(place, columns) if place.is_listed else self._scanned(place)
            table = self._with_members(image_table.sorted_by_uri(table), place)
        self._progress(self._images)
        return table

    def _scanned(self, place: _Place) -> pa.Table:
        entries = _matching(place.uri) if place.kind == "glob" else ANYWHERE.scan_entries(place.uri)
        first = next(entries, None)
        if first is None and not os.path.isdir(place.uri):
            raise _not_there(place.name, place.uri)
        return image_table.table_of(self._rows(itertools.chain([first] if first else [], entries), place))

    def _rows(self, entries: Iterable[Entry], place: _Place) -> Iterator[ImageRow]:
        for count, entry in enumerate(entries, start=1):
            row = row_of_entry(entry, self._choice, place.left_out, named=entry.uri == place.uri)
            if row is not None:
                self._images += not row.waits
                yield row
            if count % _PROGRESS_ENTRIES == 0:
                self._progress(self._images)

    def _named(self, place: _Place, columns: Sequence[str]) -> pa.Table:
        carried = [name for name in self._carried if name in columns]
        batches = [self._batch(lines, place) for lines in self._lines(place, carried)]
        return pa.Table.from_batches(batches) if batches else COLUMNS.empty_table()

    def _lines(self, place: _Place, carried: Sequence[str]) -> Iterator[Lines]:
        if place.kind == "line":
            return iter([Lines([place.uri])])
        if place.kind == "list":
            return lists.read_list(place.uri, carried=carried)
        return lists.read_text(self._stdin or _own_stdin())

    def _batch(self, lines: Lines, place: _Place) -> pa.RecordBatch:
        pieces = (lines.uris[start : start + _PIECE_LINES] for start in range(0, len(lines.uris), _PIECE_LINES))
        rows: list[ImageRow] = []
        kept: list[bool] = []
        for piece in map_in_threads(_rows_of_lines, pieces, threads=_THREADS, ahead=_AHEAD):
            rows += piece
            kept += [self._choice.keeps(row, place.left_out) for row in piece]
            self._images += sum(not row.waits for row in piece)
            self._progress(self._images)
        batch = image_table.batch_of(rows)
        for name, values in lines.carried.items():
            batch = batch.append_column(name, values)
        return batch.filter(pa.array(kept, pa.bool_()))

    def _with_members(self, table: pa.Table, place: _Place) -> pa.Table:
        """Replaces the rows that wait for an archive by the rows of its members."""
        pieces, done = [], 0
        work = functools.partial(_open_run, table=table, choice=self._choice)
        for run, opened in map_in_threads(work, image_table.waiting_runs(table), threads=_THREADS, ahead=_AHEAD):
            pieces += [table.slice(done, run.start - done), opened.table]
            done = run.stop
            self._archives[run.archive] = opened.duplicates
            place.left_out.update(opened.left_out)
            self._images += len(opened.table)
            self._progress(self._images)
        pieces.append(table.slice(done))
        return pa.concat_tables([piece for piece in pieces if len(piece)] or [table])


def _open_run(run: WaitingRows, *, table: pa.Table, choice: Choice) -> tuple[WaitingRows, Opened]:
    return run, open_archive(run.archive, table.slice(run.start, run.stop - run.start), choice)


def _rows_of_lines(lines: Sequence[str]) -> list[ImageRow]:
    return [row_of_line(line) for line in lines]


def _own_stdin() -> TextIO:
    # A file name may hold any bytes; surrogateescape keeps them, so that the file can be opened.
    return open(sys.stdin.fileno(), encoding="utf-8", errors="surrogateescape", newline="\n", closefd=False)


def _columns_of(place: _Place) -> tuple[str, ...]:
    with _errors_of(place.name):
        return lists.column_names(place.uri)


def _check_carried(carried: Sequence[str], columns: Mapping[str, Sequence[str]]) -> None:
    available = sorted(set(itertools.chain.from_iterable(columns.values())))
    missing = [name for name in carried if name not in available]
    if missing:
        raise DataError(
            f"carry must name columns of the lists among the inputs: {', '.join(available) or 'there are none'}."
            f" Received: carry={', '.join(missing)}"
        )


@contextlib.contextmanager
def _errors_of(name: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as err:
        raise DataError(f"no permission to list this input: {err}. Received: input={name!r}") from err
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"this input cannot be listed: {err}. Received: input={name!r}") from err


# --- what an input is ------------------------------------------------------------------------------------------------


def _place_of(name: str) -> _Place:
    """An existing path is taken literally; otherwise a member of an archive is tried, then a glob."""
    if name == _STDIN:
        return _Place(name, "stdin", name)
    with _errors_of(name):
        return _remote_place(name) if is_remote(name) else _local_place(name)


def _remote_place(name: str) -> _Place:
    uri = absolute(name)
    if lists.is_list(uri) and _is_object(uri):
        return _Place(name, "list", uri)
    is_plain = split_member(uri) is None and not _MAGIC.search(uri)
    if is_plain or ANYWHERE.exists(uri):  # whether the prefix holds anything shows when it is listed
        return _Place(name, "tree", uri)
    return _Place(name, "glob" if split_member(uri) is None else "line", uri)


def _local_place(name: str) -> _Place:
    path = absolute(name)
    if os.path.isfile(path) and lists.is_list(path):
        return _Place(name, "list", path)
    if os.path.lexists(path):
        return _Place(name, "tree", path)
    if split_member(path) is not None:
        return _Place(name, "line", path)
    if _MAGIC.search(name):
        return _Place(name, "glob", _absolute_pattern(name))
    raise _not_there(name, path)


def _is_object(uri: str) -> bool:
    try:
        ANYWHERE.entry_of(uri)
    except FileNotFoundError:
        return False
    return True


def _absolute_pattern(name: str) -> str:
    """Escapes the working directory, whose name may hold characters that are special in a glob."""
    pattern = absolute(name) if is_file_uri(name) else name
    return os.path.normpath(os.path.join(glob.escape(os.getcwd()), pattern))


def _not_there(name: str, uri: str) -> DataError:
    return DataError(
        f"{uri}: there is no such file, folder or prefix, and no match for a glob. Received: input={name!r}"
    )


# --- globs -----------------------------------------------------------------------------------------------------------


def _matching(pattern: str) -> Iterator[Entry]:
    """Files that match, and files in folders that match. S3 has no folders: there, the keys that match."""
    remote = is_remote(pattern)
    if not remote and "**" not in pattern.split("/"):
        for path in sorted(glob.glob(pattern, include_hidden=True)):
            yield from ANYWHERE.scan_entries(path)
        return
    # `glob` follows a loop of links forty times, and never returns from several loops; hence a regex.
    regex = re.compile(_translated(pattern) + ("" if remote else "(?:/.*)?"), re.DOTALL)
    for entry in ANYWHERE.scan_entries(_literal_folder(pattern) or "/"):
        if regex.fullmatch(entry.uri):
            yield entry


def _literal_folder(pattern: str) -> str:
    """The part of the path above the first component with a special character."""
    literal = itertools.takewhile(lambda part: not _MAGIC.search(_ESCAPED.sub("", part)), pattern.split("/")[:-1])
    return _ESCAPED.sub(r"\1", "/".join(literal))


def _translated(pattern: str) -> str:
    """A glob as a regular expression: `*` and `?` match within one path component, `**` matches any number of them."""
    return "".join(map(_translated_token, _GLOB_TOKEN.findall(pattern)))


def _translated_token(token: str) -> str:
    if token == "**/":
        return "(?:.*/)?"
    if token[0] in "*?":
        return {"*": "[^/]*", "?": "[^/]"}.get(token, ".*")
    if len(token) > 1:
        return "(?!/)" + fnmatch.translate(token)[:-2]  # cuts off the end-of-string anchor
    return re.escape(token)


# --- no images -------------------------------------------------------------------------------------------------------


def _no_images(config: InputConfig, places: Sequence[_Place]) -> str:
    shown = [f"{place.name}: {_described(place.left_out)}" for place in places[:_MAX_SHOWN]]
    shown += [f"and {len(places) - _MAX_SHOWN} more inputs"] if len(places) > _MAX_SHOWN else []
    return (
        f"no images were found; image suffixes are {', '.join(IMAGE_SUFFIXES)}; all_files takes any file."
        f" {'; '.join(shown)}. Received: input={config.input[:_MAX_SHOWN]}"
    )


def _described(left_out: LeftOut) -> str:
    parts = []
    if left_out.by_suffix:
        common = left_out.by_suffix.most_common(_MAX_SHOWN)
        shown = ", ".join(f"{suffix or 'no suffix'} {files:,}" for suffix, files in common)
        parts.append(f"{left_out.by_suffix.total():,} other files ({shown})")
    if left_out.by_pattern:
        parts.append(f"{left_out.by_pattern:,} left out by include and exclude")
    return ", ".join(parts) or "nothing"
