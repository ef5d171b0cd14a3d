"""Lists the images that inputs name: what every job trains on, scores or evaluates.

Owns: listing inputs of all kinds into one table. Does not own: what kind an input is (`places`), which files are taken
(`choice`), what archives and Parquet files hold (`containers`), the order of the table and its duplicates
(`image_table`), or the formats of lists (`lists`).

Contract: listing reads only lists, the indexes of archives, and columns beside the images; for labels also the small
files of WebDataset shards. It loses no row: an image already known to be unusable gets its status here. A remote object
that a list names is not looked up; whether it exists shows when it is read. In a folder that holds Parquet files of
images, pictures beside them are not part of the data.
"""

import functools
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.config import require
from mnist_dist.errors import DataError, StorageError
from mnist_dist.images.formats import IMAGE_SUFFIXES
from mnist_dist.score_config import InputConfig
from mnist_dist.sources import arrays, image_table, labels, lists, parquet
from mnist_dist.sources.choice import (
    BESIDE,
    BY_PATTERN,
    HIDDEN_PARQUET,
    NO_IMAGES,
    Choice,
    LeftOut,
    is_hidden,
    row_of_entry,
    row_of_line,
)
from mnist_dist.sources.columns import GROUP, LABEL, LABEL_FLAG, SPLIT, SetForm, Wanted
from mnist_dist.sources.containers import Opened, open_container
from mnist_dist.sources.image_table import COLUMNS, ImageRow, WaitingRows
from mnist_dist.sources.lists import Lines
from mnist_dist.sources.places import Place, columns_of, errors_of, matching, not_there, place_of
from mnist_dist.sources.threads import map_in_threads
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry, Store
from mnist_dist.store.uris import are_remote

_log = logging.getLogger(__name__)
LOOK_UP_THREADS = 32
"""Each requests the size and etag of one object."""
LOOK_UP_AHEAD = 256
_THREADS = 8  # The threads wait for storage, not for a core.
_AHEAD = 16  # containers, or pieces of a list, that are opened before they are needed
_PIECE_LINES = 1_000  # lines of a list that a thread looks up at a time
_PROGRESS_ENTRIES = 1_000  # files between two reports of progress
_MAX_SHOWN = 10  # inputs or folders in a message
_MAX_NAMES = 1_000  # of a folder that is looked at for a message


@dataclass(frozen=True)
class Listing:
    """The images that the inputs name, and counts of what was left out."""

    table: pa.Table
    """`COLUMNS`, then the carried columns, or in a labelled listing `label`, `split` and (if a column of groups is
    wanted) `group`. Each URI occurs once. Inputs keep their order; each is sorted by URI, and members come in the order
    of their archive."""
    by_suffix: Mapping[str, int]
    """Number of images by lower-case file suffix (`.jpg`), the most frequent first."""
    archives: int
    """Archives and Parquet files that were opened."""
    named_twice: int
    """Duplicate rows left out; the first row of a URI is kept."""
    duplicate_members: int
    """Members of archives that a later member of the same name replaces."""
    left_out: LeftOut
    """Files left out because of their names."""
    unlabelled: int
    """Images left out of a labelled listing because nothing gives their class."""
    empty_folders: tuple[str, ...]
    """Folders beside those of the classes in which there are no images; only of a labelled listing, and local."""
    roots: tuple[str, ...]
    """The folders, prefixes, archives and files among the inputs that were listed as a whole."""
    class_names: tuple[tuple[str, ...], ...]
    """The class names, by class number, that Parquet files and named data sets declare; without duplicates."""
    columns: tuple[str, ...] = ()
    """Columns of the lists and Parquet files, beside URIs and images."""
    is_labelled: bool = False
    """Whether the listing has classes: that of a training, which does not take files of all names."""

    @property
    def total_bytes(self) -> int:
        """Total size of the images whose size is known."""
        return int(pc.sum(self.table["size_bytes"]).as_py() or 0)

    def notes(self) -> list[str]:
        """What a person should know about what was opened, ignored and left out."""
        counts = {
            "in {:,} archive(s) or Parquet file(s)": self.archives,
            "{:,} duplicates ignored": self.named_twice,
            "{:,} archive members replaced by later members of the same name": self.duplicate_members,
            "{:,} images without a class skipped": self.unlabelled,
        }
        notes = [text.format(count) for text, count in counts.items() if count]
        if self.left_out.total:
            notes.append(f"left out: {self.left_out.described(all_files=not self.is_labelled)}")
        if self.empty_folders:
            notes.append(f"no images in the folders {', '.join(self.empty_folders[:_MAX_SHOWN])}")
        return notes


def list_inputs(
    config: InputConfig,
    *,
    label_column: str | None = None,
    group_column: str | None = None,
    sets: SetForm | None = None,
    reserved: Iterable[str] = (),
    stdin: TextIO | None = None,
    progress: Callable[[int], None] | None = None,
    max_images: int | None = None,
    store: Store = ANYWHERE,
) -> Listing:
    """Lists all images that `config.input` names.

    Args:
        config: the inputs, and which of their files to take.
        label_column: list the classes and splits as well; this column of lists and Parquet files holds the labels.
        group_column: list the values of this column as `group`, too, where lists and Parquet files have it.
        sets: with labels: an image has any number of them, which are written so; see `label_sets`.
        reserved: column names that may not be carried, besides those of `COLUMNS`.
        stdin: the stream to read for the input `-`. None: the stdin of the process.
        progress: called now and then with the number of images listed so far.
        max_images: a quick look: at most this many files, lines or members of each input, and one container.
        store: where the inputs are.

    Raises:
        ConfigError: a carried column has a reserved name.
        DataError: an input does not exist, must not be listed or is an unreadable list, or there are no images.
        ServiceError, StorageError: see `store.base`.
    """
    clashing = sorted({*COLUMNS.names, *reserved}.intersection(config.carry))
    require(not clashing, "carry must not name columns of the predictions", carry=clashing)
    carried = tuple(dict.fromkeys(config.carry))
    wanted = Wanted(carried, config.image_column, label_column, config.uri_column, group_column, sets)
    return _Search(config, wanted, stdin=stdin, progress=progress, max_images=max_images, store=store).listing()


def list_uris(uris: Sequence[str], *, store: Store = ANYWHERE) -> pa.Table:
    """The rows (`COLUMNS`) of images by their URIs, as prediction tables have them; sorted by URI.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    table = image_table.sorted_by_uri(image_table.table_of(map(row_of_line, uris)))
    choice, wanted = Choice.of(InputConfig(input=("-",))), Wanted()
    pieces, done = [], 0
    for run in image_table.waiting_runs(table):
        opened = _open_run(run, table=table, choice=choice, wanted=wanted, named=True, store=store)[1]
        pieces += [table.slice(done, run.start - done), opened.table]
        done = run.stop
    return image_table.sorted_by_uri(pa.concat_tables([*pieces, table.slice(done)]))


def with_etags(table: pa.Table, *, store: Store = ANYWHERE) -> pa.Table:
    """The rows with size and etag of remote objects that lists named, and that were not looked up before.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    is_to_be_read = pc.and_(pc.is_null(table["etag"]), pc.is_null(table["status"]))
    unknown = pc.and_(is_to_be_read, are_remote(table["uri"])).to_numpy()
    if not unknown.any():
        return table
    columns = {name: table[name].to_pylist() for name in ("size_bytes", "etag")}
    rows = unknown.nonzero()[0].tolist()
    uris = pc.coalesce(table["address"], table["uri"]).filter(pa.array(unknown)).to_pylist()
    look_up = functools.partial(_entry_of, store=store)
    entries = map_in_threads(look_up, uris, threads=LOOK_UP_THREADS, ahead=LOOK_UP_AHEAD)
    for row, entry in zip(rows, entries, strict=True):
        if entry is not None:
            columns["size_bytes"][row], columns["etag"][row] = entry.size_bytes, entry.etag
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    return table


def _entry_of(uri: str, *, store: Store) -> Entry | None:
    try:
        return store.entry_of(uri)
    except (FileNotFoundError, PermissionError):
        return None  # reading it will give a row with the reason


class _Search:
    """The state of one listing.

    Args:
        wanted: what is read beside the images.
        config, stdin, progress, max_images, store: as for `list_inputs`.
    """

    def __init__(
        self,
        config: InputConfig,
        wanted: Wanted,
        *,
        stdin: TextIO | None,
        progress: Callable[[int], None] | None,
        max_images: int | None,
        store: Store,
    ) -> None:
        self._config, self._wanted, self._store, self._max_images = config, wanted, store, max_images
        self._choice = Choice.of(config)
        self._stdin = stdin
        self._progress = progress or (lambda images: None)
        self._images = 0
        self._left_out: dict[str, LeftOut] = {name: LeftOut() for name in config.input}
        self._containers: dict[str, int] = {}
        """Opened container -> how many of its members are replaced by later ones."""
        self._columns: set[str] = set()
        """Columns that can be carried."""
        self._class_names: dict[tuple[str, ...], None] = {}
        self._beside: dict[str, int] = {}
        """Input -> number of pictures beside its Parquet files."""
        self._unlabelled = 0
        self._empty_folders: list[str] = []

    def listing(self) -> Listing:
        """Lists all inputs."""
        column, store = self._wanted.image_column, self._store
        places = [place_of(name, image_column=column, store=store) for name in self._config.input]
        self._read_columns(places)
        tables = [self._table_of(place) for place in places]
        self._check_carried()
        if self._wanted.label_column is not None:
            tables = _with_splits_of_inputs(places, self._labelled(places, tables))
        labelled = (LABEL, SPLIT) if self._wanted.group_column is None else (LABEL, SPLIT, GROUP)
        beside = self._wanted.carried if self._wanted.label_column is None else labelled
        rows = image_table.told_apart(image_table.joined(tables, beside))
        may_repeat = len(places) > 1 or places[0].is_listed
        if may_repeat and self._wanted.label_column is not None:
            _check_one_label(rows)
        if not len(rows):
            all_files = self._wanted.label_column is None
            if self._unlabelled:
                raise DataError(self._without_classes(places))
            raise DataError(_no_images(self._config, self._left_out, all_files=all_files))
        # A single folder or glob has no duplicates, so the search for them is skipped.
        unique = image_table.first_of_each(image_table.with_claims(rows)) if may_repeat else rows
        table = unique if self._config.sample is None else image_table.sample_of(unique, self._config.sample)
        table = image_table.compact(table.slice(0, self._config.limit))
        left_out = LeftOut()
        for part in self._left_out.values():
            left_out.update(part)
        return Listing(
            table=table,
            by_suffix=image_table.count_suffixes(table),
            archives=len(self._containers),
            named_twice=len(rows) - len(unique),
            duplicate_members=sum(self._containers.values()),
            left_out=left_out,
            unlabelled=self._unlabelled,
            empty_folders=tuple(self._empty_folders),
            roots=tuple(place.root for place in places if place.kind in ("tree", "glob")),
            class_names=tuple(self._class_names),
            columns=tuple(sorted(self._columns)),
            is_labelled=self._wanted.label_column is not None,
        )

    def _without_classes(self, places: Sequence[Place]) -> str:
        """What was found in place of classes, and what is expected."""
        folders = [place.uri for place in places if place.kind == "tree" and _has_no_folders(place.uri, self._store)]
        flat = f", no subfolders in {', '.join(folders[:_MAX_SHOWN])}" if folders else ""
        columns = f", the columns {', '.join(sorted(self._columns))}" if self._columns else ""
        return (
            "images must be in one subfolder per class (FOLDER/CLASS/IMAGE), or have a label beside them or in a column"
            f" ({LABEL_FLAG}). Received: {self._unlabelled:,} images without a class{flat}{columns},"
            f" input={self._config.input[:_MAX_SHOWN]}"
        )

    # --- columns -----------------------------------------------------------------------------------------------------

    def _read_columns(self, places: Sequence[Place]) -> None:
        """Checks what can be carried before anything is listed, where only lists can have columns."""
        for place in places:
            columns = columns_of(place, uri_column=self._wanted.uri_column, store=self._store)
            if columns and self._wanted.label_columns not in ((), (LABEL,)):  # They were asked for.
                self._wanted.check_labels(place.uri, columns)
            self._columns.update(columns)
        if all(place.is_listed for place in places):
            self._check_carried()

    def _check_carried(self) -> None:
        missing = [name for name in self._wanted.carried if name not in self._columns]
        if missing:
            raise DataError(
                "carry must name columns of the lists and Parquet files among the inputs:"
                f" {', '.join(sorted(self._columns)) or 'there are none'} (names are separated by spaces)."
                f" Received: carry={', '.join(missing)}"
            )

    # --- one input ---------------------------------------------------------------------------------------------------

    def _table_of(self, place: Place) -> pa.Table:
        _log.info("listing %s", place.name)
        with errors_of(place.name):
            if place.kind == "arrays":
                table = self._arrays(place)
            else:
                table = self._named(place) if place.is_listed else self._scanned(place)
                table = self._with_contents(image_table.sorted_by_uri(table), place)
        self._progress(self._images)
        return table

    def _arrays(self, place: Place) -> pa.Table:
        is_labelled = self._wanted.label_column is not None
        table, class_names = arrays.list_rows(place.name, self._config.data_dir, labelled=is_labelled)
        self._class_names[class_names] = None
        self._images += len(table)
        return table

    def _scanned(self, place: Place) -> pa.Table:
        store = self._store
        entries = matching(place.uri, store=store) if place.kind == "glob" else store.scan_entries(place.uri)
        first = next(entries, None)
        if first is None and not os.path.isdir(place.uri):
            raise not_there(place.name, place.uri, store=store)
        files: list[Entry] = []
        rows = self._rows(itertools.chain([first] if first else [], entries), place, files)
        table = image_table.table_of(itertools.islice(rows, self._max_images))
        if not self._is_parquet_data(files):
            if files:
                self._left_out[place.name].add(NO_IMAGES, files[0].uri, len(files))
            return table
        containers = table.filter(pc.is_valid(table["archive"]))
        pictures = table.filter(pc.is_null(table["archive"]))
        self._beside[place.name] = len(pictures)
        if len(pictures):
            self._left_out[place.name].add(BESIDE, pictures["uri"][0].as_py(), len(pictures))
        self._images -= len(pictures)
        waiting = image_table.table_of(ImageRow(entry.uri, archive=entry.uri) for entry in files)
        return pa.concat_tables([containers, waiting])

    def _rows(self, entries: Iterable[Entry], place: Place, files: list[Entry]) -> Iterator[ImageRow]:
        """The rows of files and archives; Parquet files are collected in `files`."""
        root, left_out = place.root, self._left_out[place.name]
        for count, entry in enumerate(entries, start=1):
            if parquet.is_parquet(entry.uri):
                self._take_parquet(entry, root, files, left_out)
                continue
            row = row_of_entry(entry, self._choice, left_out, root=root)
            if row is not None:
                self._images += not row.waits
                yield row
            if count % _PROGRESS_ENTRIES == 0:
                self._progress(self._images)

    def _take_parquet(self, entry: Entry, root: str, files: list[Entry], left_out: LeftOut) -> None:
        if entry.uri != root and is_hidden(entry.uri.removeprefix(root)):
            left_out.add(HIDDEN_PARQUET, entry.uri)
        elif not self._choice.matches(entry.uri, entry.uri):
            left_out.add(BY_PATTERN, entry.uri)
        else:
            files.append(entry)

    def _is_parquet_data(self, files: Sequence[Entry]) -> bool:
        """Whether one of the Parquet files holds images; others may be damaged, or something else."""
        column = self._wanted.image_column
        return any(parquet.holds_images(entry.uri, column, store=self._store) for entry in files)

    def _named(self, place: Place) -> pa.Table:
        batches = [self._batch(lines, place) for lines in _first_lines(self._lines(place), self._max_images)]
        return pa.Table.from_batches(batches) if batches else COLUMNS.empty_table()

    def _lines(self, place: Place) -> Iterator[Lines]:
        if place.kind == "line":
            return iter([Lines([place.uri])])
        if place.kind == "list":
            return lists.read_list(place.uri, self._wanted, store=self._store)
        return lists.read_text(self._stdin or _own_stdin())

    def _batch(self, lines: Lines, place: Place) -> pa.RecordBatch:
        pieces = (lines.uris[start : start + _PIECE_LINES] for start in range(0, len(lines.uris), _PIECE_LINES))
        rows: list[ImageRow] = []
        kept: list[bool] = []
        for piece in map_in_threads(_rows_of_lines, pieces, threads=_THREADS, ahead=_AHEAD):
            rows += piece
            kept += [self._choice.keeps(row, self._left_out[place.name]) for row in piece]
            self._images += sum(not row.waits for row in piece)
            self._progress(self._images)
        batch = image_table.batch_of(rows)
        for name, values in lines.beside.items():
            batch = batch.append_column(name, values)
        return batch.filter(pa.array(kept, pa.bool_()))

    def _with_contents(self, table: pa.Table, place: Place) -> pa.Table:
        """Replaces the rows that wait for a container by the rows of its images."""
        if self._max_images is not None:
            table = _with_one_container(table)
        pieces, done = [], 0
        work = functools.partial(
            _open_run,
            table=table,
            choice=self._choice,
            wanted=self._wanted,
            named=place.is_listed,
            max_members=self._max_images,
            store=self._store,
        )
        for run, opened in map_in_threads(work, image_table.waiting_runs(table), threads=_THREADS, ahead=_AHEAD):
            pieces += [table.slice(done, run.start - done), opened.table]
            done = run.stop
            self._count(run.archive, opened, place)
        pieces.append(table.slice(done))
        pieces = [piece for piece in pieces if len(piece)] or [table.slice(0, 0)]
        joined = pieces[0] if len(pieces) == 1 else image_table.concatenated(pieces)
        loose = self._beside.get(place.name, 0)
        if loose > len(joined) and self._max_images is None:
            raise DataError(
                f"{place.name} holds {loose:,} pictures and Parquet files of {len(joined):,} images; name the pictures"
                f" or the files, for example with a glob. Received: input={place.name!r}"
            )
        return joined

    def _count(self, container: str, opened: Opened, place: Place) -> None:
        self._containers[container] = opened.duplicates
        self._left_out[place.name].update(opened.left_out)
        self._columns.update(opened.columns)
        self._unlabelled += opened.unlabelled
        if opened.class_names is not None:
            self._class_names[opened.class_names] = None
        self._images += len(opened.table)
        self._progress(self._images)

    def _labelled(self, places: Sequence[Place], tables: Sequence[pa.Table]) -> list[pa.Table]:
        """Adds classes and splits, and leaves out images without a class."""
        ignored, labelled = labels.ignored_folders(tables), []
        for place, table in zip(places, tables, strict=True):
            root = _root_of_list(table) if place.is_listed else place.root
            table = labels.fill_by_folder(table, root=root, name=place.name, ignored=ignored)
            if place.kind == "tree":
                self._empty_folders += labels.empty_folders(root, table)
            kept = table.filter(pc.or_(pc.is_valid(table[LABEL]), pc.is_valid(table["status"])))
            self._unlabelled += len(table) - len(kept)
            labelled.append(kept)
        return labelled


def _root_of_list(table: pa.Table) -> str:
    """The folder that the plain files of a list share; of those that exist, so that one odd line moves no class."""
    is_plain = pc.and_(pc.is_null(table["archive"]), pc.is_null(table["status"]))
    exists = pc.or_(pc.is_valid(table["etag"]), are_remote(table["uri"]))
    for mask in (pc.and_(is_plain, exists), is_plain):
        root = labels.common_folder(uri for chunk in table["uri"].filter(mask).chunks for uri in chunk.to_pylist())
        if root:
            return root
    return ""


def _open_run(
    run: WaitingRows,
    *,
    table: pa.Table,
    choice: Choice,
    wanted: Wanted,
    named: bool,
    store: Store,
    max_members: int | None = None,
) -> tuple[WaitingRows, Opened]:
    asked = table.slice(run.start, run.stop - run.start)
    opened = open_container(run.archive, asked, choice, wanted, named=named, max_members=max_members, store=store)
    return run, opened


def _first_lines(lines: Iterator[Lines], count: int | None) -> Iterator[Lines]:
    """At most the first `count` lines; None: all."""
    if count is None:
        return lines
    first = itertools.islice(lines, 1)
    return (Lines(line.uris[:count], {name: each[:count] for name, each in line.beside.items()}) for line in first)


def _with_one_container(table: pa.Table) -> pa.Table:
    """The rows without those that wait for another container than the first."""
    runs = list(image_table.waiting_runs(table))
    kept = np.ones(len(table), np.bool_)
    for run in runs[1:]:
        kept[run.start : run.stop] = run.archive == runs[0].archive
    return table.filter(pa.array(kept))


def _rows_of_lines(lines: Sequence[str]) -> list[ImageRow]:
    return [row_of_line(line) for line in lines]


def _own_stdin() -> TextIO:
    # A file name may hold any bytes; surrogateescape keeps them, so that the file can be opened.
    return open(sys.stdin.fileno(), encoding="utf-8", errors="surrogateescape", newline="\n", closefd=False)


def _check_one_label(rows: pa.Table) -> None:
    """Raises DataError if an image has two labels."""
    counts = rows.select(["uri", LABEL]).group_by("uri").aggregate([(LABEL, "count_distinct")])
    twice = counts.filter(pc.greater(counts[f"{LABEL}_count_distinct"], 1))
    if len(twice):
        uri = twice["uri"][0].as_py()
        found = pc.unique(rows[LABEL].filter(pc.equal(rows["uri"], uri))).to_pylist()
        raise DataError(f"an image has one label. Received: {' and '.join(map(repr, found))} for {uri!r}")


def _with_splits_of_inputs(places: Sequence[Place], tables: Sequence[pa.Table]) -> list[pa.Table]:
    """The split that an input's own name gives, where the images have none: `--data train.tar test.tar`."""
    splits = labels.splits_of_names([place.uri.split("/") for place in places]) if len(places) > 1 else [None]
    named = []
    for table, split in zip(tables, splits, strict=True):
        values = table[SPLIT] if split is None else pc.fill_null(table[SPLIT], split)
        named.append(table.set_column(table.schema.get_field_index(SPLIT), SPLIT, values))
    return named


# --- no images -------------------------------------------------------------------------------------------------------


def _has_no_folders(uri: str, store: Store) -> bool:
    """Whether a folder holds files alone."""
    try:
        return not store.list_level(uri, max_names=_MAX_NAMES).folders
    except (OSError, StorageError):  # A file, or a prefix that is no folder.
        return False


def _no_images(config: InputConfig, left_out: Mapping[str, LeftOut], *, all_files: bool) -> str:
    parts = itertools.islice(left_out.items(), _MAX_SHOWN)
    shown = [f"{name}: {part.described(all_files=all_files) or 'nothing'}" for name, part in parts]
    shown += [f"and {len(left_out) - _MAX_SHOWN} more inputs"] if len(left_out) > _MAX_SHOWN else []
    return (
        f"no images were found; image suffixes are {', '.join(IMAGE_SUFFIXES)}. Left out:"
        f" {'; '.join(shown)}. Received: input={config.input[:_MAX_SHOWN]}"
    )
