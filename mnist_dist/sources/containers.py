"""Opens what holds many images: archives and Parquet files. Rows that wait for one become the rows of its images.

Owns: which images of a container are taken, and their rows, labels and carried columns. Does not own: the formats
(`archives`, `parquet`, `webdataset`).
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.errors import ImageError
from mnist_dist.sources import image_table, parquet
from mnist_dist.sources.archives import SEPARATOR, ArchiveIndex, Member, index_archive
from mnist_dist.sources.choice import Choice, LeftOut, member_name
from mnist_dist.sources.columns import LABEL, Wanted
from mnist_dist.sources.image_table import COLUMNS, ImageRow
from mnist_dist.sources.reading import image_error
from mnist_dist.sources.webdataset import member_labels
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store


@dataclass(frozen=True)
class Opened:
    """The rows of one container."""

    table: pa.Table
    """`COLUMNS`, then the carried columns, and for a labelled listing `label` and `split` where they are known."""
    origins: Sequence[int] | npt.NDArray[np.int64]
    """The number of the waiting row that each row stands for."""
    duplicates: int = 0
    """Members that a later member of the same name replaces."""
    left_out: LeftOut = field(default_factory=LeftOut)
    unlabelled: int = 0
    """Images left out because they have no label beside them, though others of their archive do."""
    class_names: tuple[str, ...] | None = None
    """Class names by class number, if a Parquet file declares them."""
    columns: tuple[str, ...] = ()
    """Columns of a Parquet file that can be carried."""


def open_container(uri: str, asked: pa.Table, choice: Choice, wanted: Wanted, *, store: Store = ANYWHERE) -> Opened:
    """Opens a container, and returns its rows in place of those that wait for it.

    Args:
        uri: URI of the container.
        asked: the waiting rows. One that names the container stands for all its chosen images; one that names a member
            or row stands for that image, whatever its suffix.
        choice: which members of archives are taken.
        wanted: what is read beside the images.
        store: the store of the container.

    Returns:
        The images in the order of the container, with the carried columns of the rows that waited for them.

    Raises:
        DataError: a Parquet file lacks a column, or a label.
        ServiceError, StorageError: see `store.base`.
    """
    request = _Request.of(uri, asked["uri"].to_pylist())
    opened = _parquet(request, wanted, store) if parquet.is_parquet(uri) else _archive(request, choice, wanted, store)
    table = opened.table
    for name in asked.column_names[len(COLUMNS) :]:  # what a list says of its own line wins
        column = image_table.taken(asked[name], pa.array(opened.origins, pa.int64()))
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(asked.schema.field(name), column)
    return replace(opened, table=table)


@dataclass(frozen=True)
class _Request:
    """What is asked of a container."""

    uri: str
    whole: list[int]
    """The numbers of the rows that name the container."""
    images: dict[str, list[int]]
    """The URI of an image -> the numbers of the rows that name it."""

    @classmethod
    def of(cls, uri: str, asked: Sequence[str]) -> "_Request":
        request = cls(uri, [], {})
        for number, name in enumerate(asked):
            numbers = request.whole if name == uri else request.images.setdefault(name, [])
            numbers.append(number)
        return request


def _failed(uri: str, etag: str | None, problem: ImageError) -> ImageRow:
    """A row with nothing to read: no archive column."""
    return ImageRow(uri, etag=etag or None, status=problem.status, error=problem.message)


def _numbered(rows: Iterable[tuple[int, ImageRow]]) -> tuple[pa.Table, list[int]]:
    """The rows as a table, and the numbers."""
    numbers: list[int] = []

    def counted() -> Iterator[ImageRow]:
        for number, row in rows:
            numbers.append(number)
            yield row

    return image_table.table_of(counted()), numbers


# --- archives --------------------------------------------------------------------------------------------------------


def _archive(request: _Request, choice: Choice, wanted: Wanted, store: Store) -> Opened:
    index = index_archive(request.uri, store=store)
    left_out = LeftOut(nested=index.nested_count)
    if index.nested:
        left_out.first_nested = f"{index.entry.uri}{SEPARATOR}{index.nested[0]}"
    labels = member_labels(index, store=store) if wanted.label_column is not None else {}
    chosen = list(_chosen(index, choice, left_out)) if request.whole else []
    members = [member for member in chosen if not labels or member.name in labels]
    problem = [] if index.problem is None else [_problem_of(index)]
    of_whole = (itertools.chain(problem, (_row_of(index, member) for member in members)) for _ in request.whole)
    all_rows = ((number, row) for number, rows in zip(request.whole, of_whole, strict=True) for row in rows)
    table, origins = _numbered(itertools.chain(all_rows, _requested_members(index, request)))
    if labels:
        names = (member_name(uri, request.uri) for uri in table["uri"].to_pylist())
        table = table.append_column(LABEL, pa.array(map(labels.get, names), pa.string()))
    return Opened(table, origins, index.duplicates, left_out, unlabelled=len(chosen) - len(members))


def _chosen(index: ArchiveIndex, choice: Choice, left_out: LeftOut) -> Iterator[Member]:
    for member in index.members:
        if choice.takes(f"{index.entry.uri}{SEPARATOR}{member.name}", member.name, left_out):
            yield member


def _problem_of(index: ArchiveIndex) -> ImageRow:
    problem = index.problem or ImageError("failed", "")
    message = f"{problem.message}; {len(index.members):,} members were readable"
    return _failed(index.entry.uri, index.entry.etag, ImageError(problem.status, message))


def _requested_members(index: ArchiveIndex, request: _Request) -> Iterator[tuple[int, ImageRow]]:
    """The rows of the requested members, each with the number of the row that names it."""
    found = set()
    for member in index.members if request.images else ():
        uri = f"{index.entry.uri}{SEPARATOR}{member.name}"
        if uri in request.images:
            found.add(uri)
            yield from ((number, _row_of(index, member)) for number in request.images[uri])
    problem = index.problem or ImageError("missing", "no such member")
    for uri, numbers in request.images.items():
        if uri not in found:
            yield from ((number, _failed(uri, index.entry.etag, problem)) for number in numbers)


def _row_of(index: ArchiveIndex, member: Member) -> ImageRow:
    return ImageRow(
        uri=f"{index.entry.uri}{SEPARATOR}{member.name}",
        size_bytes=member.size_bytes,
        etag=index.entry.etag,
        archive=index.entry.uri,
        packing=member.packing,
        offset=member.offset,
        stored_bytes=member.stored_bytes,
        crc32=member.crc32,
        status=None if member.problem is None else member.problem.status,
        error=None if member.problem is None else member.problem.message,
    )


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(request: _Request, wanted: Wanted, store: Store) -> Opened:
    try:
        entry = store.entry_of(request.uri)
        rows = parquet.list_rows(entry, wanted, store=store)
    except (ImageError, OSError) as err:
        problem = err if isinstance(err, ImageError) else image_error(err)
        named = [(request.uri, request.whole), *request.images.items()]
        return Opened(*_numbered((n, _failed(uri, None, problem)) for uri, numbers in named for n in numbers))
    numbers = {uri: (parquet.split_row(uri) or ("", -1))[1] for uri in request.images}
    asked = [(numbers[uri], origin) for uri, numbered in request.images.items() for origin in numbered]
    rows_asked = np.array([number for number, _ in asked], np.int64)
    exists = rows_asked < len(rows.table)
    some = rows.table.take(pa.array(rows_asked[exists]))
    no_row = ImageError("missing", "no such row")
    lost, lost_origins = _numbered(
        (origin, _failed(parquet.row_uri(entry.uri, number), entry.etag, no_row))
        for (number, origin), found in zip(asked, exists, strict=True)
        if not found
    )
    tables = [*[rows.table] * len(request.whole), some, lost]
    of_asked = [origin for (_, origin), found in zip(asked, exists, strict=True) if found]
    of_whole = np.repeat(request.whole, len(rows.table))
    table = pa.concat_tables(tables, promote_options="default")
    origins = np.concatenate([of_whole, of_asked, lost_origins]).astype(np.int64)
    return Opened(table, origins, class_names=rows.class_names, columns=rows.columns)
