"""Which files are scored, and the row of each: a listed file, a line of a list, or a member of an archive.

Owns: include, exclude and file suffixes, and what is known about a row before it is read. Does not own: where files are
searched (`listing`), or reading archives (`sources/archives.py`).

Contract: a file without an image suffix is left out and counted, unless the user named it. Everything that the user
named gets a row; if it cannot be read, the row says so.
"""

import collections
import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from mnist_dist.config import InputConfig
from mnist_dist.errors import ImageError, StorageError
from mnist_dist.images.decoder import IMAGE_SUFFIXES
from mnist_dist.sources import image_table
from mnist_dist.sources.archives import SEPARATOR, ArchiveIndex, Member, index_archive, is_archive, split_member
from mnist_dist.sources.image_table import ImageRow
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry
from mnist_dist.store.uris import absolute, is_remote

_IMAGE_SUFFIXES = frozenset(IMAGE_SUFFIXES)
_MAX_SUFFIXES = 1_000  # counted separately; file names that end in numbers would fill the memory
_REST = "..."  # counts all further suffixes


@dataclass
class LeftOut:
    """Counts of the files that are left out."""

    by_suffix: collections.Counter[str] = field(default_factory=collections.Counter)
    """Files without an image suffix, by their lower-case suffix."""
    by_pattern: int = 0
    """Files left out by include and exclude."""

    @property
    def total(self) -> int:
        """All files left out."""
        return self.by_suffix.total() + self.by_pattern

    def add(self, suffix: str, files: int = 1) -> None:
        """Counts files with this suffix."""
        known = suffix in self.by_suffix or len(self.by_suffix) < _MAX_SUFFIXES
        self.by_suffix[suffix if known else _REST] += files

    def update(self, other: "LeftOut") -> None:
        """Adds the counts of `other`."""
        for suffix, files in other.by_suffix.items():
            self.add(suffix, files)
        self.by_pattern += other.by_pattern


@dataclass(frozen=True)
class Choice:
    """Which files are scored, by their names."""

    all_files: bool
    include: re.Pattern[str] | None
    exclude: re.Pattern[str] | None

    @classmethod
    def of(cls, config: InputConfig) -> "Choice":
        """The choice that a configuration describes."""
        return cls(config.all_files, _any_of(config.include), _any_of(config.exclude))

    def matches(self, uri: str, name: str) -> bool:
        """Whether include and exclude accept the image with this URI or path."""
        if self.include is None and self.exclude is None:
            return True
        texts = (uri, name.rpartition("/")[2])
        included = self.include is None or any(map(self.include.match, texts))
        return included and not self.excludes(uri, name)

    def excludes(self, uri: str, name: str) -> bool:
        """Whether exclude rejects the image."""
        return self.exclude is not None and any(map(self.exclude.match, (uri, name.rpartition("/")[2])))

    def takes(self, uri: str, name: str, left_out: LeftOut, *, named: bool = False) -> bool:
        """Whether the file is scored; if not, it is counted in `left_out`.

        Args:
            uri: URI of the file, or of the member of an archive.
            name: path of the file; for a member, its path within the archive.
            left_out: counts the file if it is left out.
            named: whether the user named the file, so that any suffix is accepted.
        """
        suffix = _suffix(name)
        if suffix not in _IMAGE_SUFFIXES and not named and (not self.all_files or is_archive(name)):
            left_out.add(suffix)
            return False
        if not self.matches(uri, name):
            left_out.by_pattern += 1
            return False
        return True

    def keeps(self, row: ImageRow, left_out: LeftOut) -> bool:
        """Whether include and exclude accept a row that the user named; if not, it is counted in `left_out`."""
        name = _member_name(row.uri, row.archive) if row.archive else row.uri
        # include applies to the members of an archive, not to the archive itself
        kept = not self.excludes(row.uri, name) if row.uri == row.archive else self.matches(row.uri, name)
        left_out.by_pattern += not kept
        return kept


def row_of_entry(entry: Entry, choice: Choice, left_out: LeftOut, *, named: bool) -> ImageRow | None:
    """The row of a listed file, or of an archive to be opened later; None: the file is left out, and counted."""
    uri = entry.uri
    if _suffix(uri) not in _IMAGE_SUFFIXES and is_archive(uri):
        row = ImageRow(uri, archive=uri)
        return row if choice.keeps(row, left_out) else None
    if not choice.takes(uri, uri, left_out, named=named):
        return None
    # a file without an etag is a broken link
    return ImageRow(uri, entry.size_bytes, entry.etag) if entry.etag else ImageRow(uri)


def row_of_line(line: str) -> ImageRow:
    """The row of any line in a list. Archives, also those of members, are opened later.

    Raises:
        ServiceError: see `store.base`.
    """
    scheme, _, rest = line.partition("://")
    try:
        remote = is_remote(line)
        ANYWHERE.of(line)
    except StorageError:
        return ImageRow(line, status="unsupported", error=f"unknown scheme {scheme!r}; use a path, file:// or s3://")
    if remote and not all(rest.partition("/")[::2]):
        return ImageRow(line, status="unsupported", error="an image on S3 must be s3://bucket/key")
    member = split_member(line)
    if member is not None:
        archive = absolute(member[0])
        return ImageRow(f"{archive}{SEPARATOR}{member[1]}", archive=archive)
    uri = absolute(line)
    if is_archive(uri):
        return ImageRow(uri, archive=uri)
    return ImageRow(uri) if remote else _row_of_path(uri)


@dataclass(frozen=True)
class Opened:
    """The rows of one archive."""

    table: pa.Table
    duplicates: int
    """Members that a later member of the same name replaces."""
    left_out: LeftOut


def open_archive(archive: str, asked: pa.Table, choice: Choice) -> Opened:
    """Opens an archive, and returns its rows in place of those that wait for it.

    Args:
        archive: URI of the archive.
        asked: the waiting rows. One that names the archive stands for all its chosen members; one that names a member
            stands for that member, whatever its suffix.
        choice: which members are scored.

    Returns:
        The members in the order of the archive, with the carried columns of the rows that waited for them.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    index = index_archive(archive)
    left_out = LeftOut()
    requested: dict[str, list[int]] = {}  # member -> numbers of the rows that name it
    whole = []  # numbers of the rows that name the archive
    for number, uri in enumerate(asked["uri"].to_pylist()):
        if uri == archive:
            whole.append(number)
        else:
            requested.setdefault(_member_name(uri, archive), []).append(number)
    all_rows = ((number, row) for number in whole for row in _all_rows(index, choice, left_out))
    origins: list[int] = []
    rows = itertools.chain(all_rows, _requested_rows(index, requested))
    table = image_table.table_of(_keeping_numbers(rows, origins))
    for name in asked.column_names[len(table.column_names) :]:
        column = image_table.taken(asked[name], pa.array(origins, pa.int64()))
        table = table.append_column(asked.schema.field(name), column)
    return Opened(table, index.duplicates, left_out)


def _row_of_path(path: str) -> ImageRow:
    try:
        entry = ANYWHERE.entry_of(path)
    except OSError:  # reading it finds out why
        return ImageRow(path)
    except ValueError as err:  # a path with a zero byte can never be read
        return ImageRow(path, status="unsupported", error=str(err))
    return ImageRow(path, entry.size_bytes, entry.etag)


def _keeping_numbers(numbered: Iterable[tuple[int, ImageRow]], numbers: list[int]) -> Iterator[ImageRow]:
    for number, row in numbered:
        numbers.append(number)
        yield row


def _all_rows(index: ArchiveIndex, choice: Choice, left_out: LeftOut) -> Iterator[ImageRow]:
    archive = index.entry.uri
    if index.problem is not None:
        error = f"{index.problem.message}; {len(index.members):,} members were readable"
        yield ImageRow(archive, etag=index.entry.etag or None, status=index.problem.status, error=error)
    for member in index.members:
        if choice.takes(f"{archive}{SEPARATOR}{member.name}", member.name, left_out):
            yield _row_of_member(index, member)


def _requested_rows(index: ArchiveIndex, requested: dict[str, list[int]]) -> Iterator[tuple[int, ImageRow]]:
    """The rows of the requested members, each with the number of the row that names it."""
    names = {member.name for member in index.members if member.name in requested}
    for member in index.members:
        for number in requested.get(member.name, ()):
            yield number, _row_of_member(index, member)
    problem = index.problem or ImageError("missing", "no such member")
    for name, numbers in requested.items():
        if name not in names:
            # no archive column: there is nothing to read
            row = ImageRow(
                f"{index.entry.uri}{SEPARATOR}{name}",
                etag=index.entry.etag or None,
                status=problem.status,
                error=problem.message,
            )
            yield from ((number, row) for number in numbers)


def _row_of_member(index: ArchiveIndex, member: Member) -> ImageRow:
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


def _member_name(uri: str, archive: str) -> str:
    return uri.removeprefix(f"{archive}{SEPARATOR}")


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind("/") else ""


def _any_of(patterns: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(fnmatch.translate, patterns))) if patterns else None
