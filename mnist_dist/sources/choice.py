"""Which files are taken, and the row of each: a listed file, or a line of a list.

Owns: include, exclude, hidden names and file suffixes, which rows claim to be images, and what is known about a row
before it is read. Does not own: where files are searched (`listing`), or opening archives and Parquet files
(`containers`).

Contract: a file that is hidden or without an image suffix is left out and counted, unless the user named it. Everything
that the user named gets a row; if it cannot be read, the row says so. A row claims to be an image unless only
`all_files` took it; whatever claims to be one and cannot be used is bad, whatever the reason.
"""

import collections
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mnist_dist.errors import StorageError
from mnist_dist.images.formats import IMAGE_SUFFIXES
from mnist_dist.score_config import InputConfig
from mnist_dist.sources import parquet
from mnist_dist.sources.archives import SEPARATOR, is_archive, split_member
from mnist_dist.sources.image_table import ImageRow
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry
from mnist_dist.store.uris import MEMORY, REMOTE, absolute, is_remote, is_web, shown
from mnist_dist.urls import path_and_query, row_uri

_IMAGE_SUFFIXES = frozenset(IMAGE_SUFFIXES)
_HIDDEN = re.compile(r"(?:^|/)(?:\.(?!\.?/)|@eaDir/|__MACOSX/)")
"""Source: dot files; thumbnails of Synology; what the Finder packs beside the files of a zip."""
_HIDDEN_PARQUET = re.compile(r"(?:^|/)_")  # As Spark and pyarrow: `_temporary/`, `_metadata`.
_MAX_KINDS = 1_000  # counted separately; file names that end in numbers would fill the memory
_SHOWN_KINDS = 10  # in a message

NO_SUFFIX = "without a suffix"
FURTHER = "with further suffixes"
HIDDEN = "hidden"
"""Images whose name, or that of a folder above, begins with a dot, and the like (`is_hidden`)."""
BY_PATTERN = "by include and exclude"
NESTED = "archives inside archives"
BESIDE = "pictures beside Parquet files of images"
NO_IMAGES = "Parquet files without images"
HIDDEN_PARQUET = "hidden Parquet files"
_REMEDIES = {
    BY_PATTERN: "--include, --exclude",
    NESTED: "not opened; unpack them",
    BESIDE: "name them, for example with a glob",
    NO_IMAGES: "--image-column names their images",
    HIDDEN_PARQUET: "name them as inputs",
}


@dataclass
class LeftOut:
    """What is left out, by kind: a lower-case file suffix, or one of the constants above."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    """Number of files of each kind."""
    examples: dict[str, str] = field(default_factory=dict)
    """URI of the first file of each kind."""

    @property
    def total(self) -> int:
        """All files left out."""
        return self.counts.total()

    def add(self, kind: str, uri: str, files: int = 1) -> None:
        """Counts files of a kind, of which `uri` is one."""
        if kind not in self.examples:
            kind = kind if len(self.examples) < _MAX_KINDS else FURTHER
            self.examples.setdefault(kind, uri)
        self.counts[kind] += files

    def update(self, other: "LeftOut") -> None:
        """Adds the counts of `other`."""
        for kind, files in other.counts.items():
            self.add(kind, other.examples[kind], files)

    def described(self, *, all_files: bool) -> str:
        """The kinds for people, the most frequent first, each with an example and what includes it.

        Args:
            all_files: whether the job has the flag `--all-files`.
        """
        remedy = "--all-files" if all_files else "name them in a list"
        kinds = [
            f"{files:,} {kind} ({self.examples[kind]}; {_REMEDIES.get(kind, remedy)})"
            for kind, files in self.counts.most_common(_SHOWN_KINDS)
        ]
        rest = self.total - sum(files for _, files in self.counts.most_common(_SHOWN_KINDS))
        return ", ".join([*kinds, f"{rest:,} of {len(self.counts) - _SHOWN_KINDS:,} more kinds"] if rest else kinds)


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
            name: path of the file, relative to the folder that is listed; for a member, its path within the archive.
            left_out: counts the file if it is left out.
            named: whether the user named the file, so that any suffix is accepted.
        """
        suffix = suffix_of(name)
        if suffix not in _IMAGE_SUFFIXES and not named and (not self.all_files or is_archive(name)):
            left_out.add(NESTED if is_archive(name) else suffix or NO_SUFFIX, uri)
            return False
        if not named and not self.all_files and is_hidden(name):
            left_out.add(HIDDEN, uri)
            return False
        if not self.matches(uri, name):
            left_out.add(BY_PATTERN, uri)
            return False
        return True

    def is_other(self, name: str) -> bool:
        """Whether a file that is taken, and that the user did not name, is so only because all files are: it does not
        claim to be an image."""
        return self.all_files and (suffix_of(name) not in _IMAGE_SUFFIXES or is_hidden(name))

    def keeps(self, row: ImageRow, left_out: LeftOut) -> bool:
        """Whether include and exclude accept a row that the user named; if not, it is counted in `left_out`."""
        name = member_name(row.uri, row.archive) if row.archive else row.uri
        # include applies to the members of an archive, not to the archive itself
        kept = not self.excludes(row.uri, name) if row.uri == row.archive else self.matches(row.uri, name)
        if not kept:
            left_out.add(BY_PATTERN, row.uri)
        return kept


def is_hidden(name: str) -> bool:
    """Whether a relative path is hidden: dot files, and what Synology and the Finder leave beside images. Of Parquet
    files, also names that begin with an underscore."""
    if parquet.is_parquet(name) and _HIDDEN_PARQUET.search(name):
        return True
    may_be = name[:1] == "." or "/." in name or "@eaDir/" in name or "__MACOSX/" in name  # Quicker than the pattern.
    return may_be and bool(_HIDDEN.search(name))


def row_of_entry(entry: Entry, choice: Choice, left_out: LeftOut, *, root: str) -> ImageRow | None:
    """The row of a listed file, or of an archive to be opened later; None: the file is left out, and counted.

    Args:
        entry: the file.
        choice: which files are taken.
        left_out: counts the file if it is left out.
        root: the folder that is listed, or the file itself, which the user named then.
    """
    uri, named = entry.uri, entry.uri == root
    name = uri if named else uri[len(root) :].lstrip("/")
    if suffix_of(uri) not in _IMAGE_SUFFIXES and is_archive(uri):
        row = ImageRow(uri, archive=uri)
        if not named and not choice.all_files and is_hidden(name):
            left_out.add(HIDDEN, uri)
            return None
        return row if choice.keeps(row, left_out) else None
    if not choice.takes(uri, name, left_out, named=named):
        return None
    # a file without an etag is a broken link
    row = ImageRow(uri, entry.size_bytes, entry.etag) if entry.etag else ImageRow(uri)
    return row._replace(other_file=True) if not named and choice.is_other(name) else row


def row_of_line(line: str) -> ImageRow:
    """The row of any line in a list. Archives and Parquet files, also those of members and rows, are opened later.

    Raises:
        ServiceError: see `store.base`.
    """
    scheme, _, rest = line.partition("://")
    try:
        remote = is_remote(line)
    except StorageError:
        known = ", ".join(f"{name}://" for name in ("file", *REMOTE) if name != MEMORY)
        error = f"unknown scheme {scheme!r}; use a path or {known}"
        return ImageRow(shown(line), status="unsupported", error=error)
    if remote and not all(rest.partition("/")[::2]):
        return ImageRow(shown(line), status="unsupported", error=f"an image must be {scheme}://bucket/key")
    if is_web(line):
        return _row_of_url(line)
    member = split_member(line)
    if member is not None:
        archive = absolute(member[0])
        return ImageRow(f"{archive}{SEPARATOR}{member[1]}", archive=archive)
    row = parquet.split_row(line)
    if row is not None:
        return ImageRow(parquet.row_uri(absolute(row[0]), row[1]), archive=absolute(row[0]))
    uri = absolute(line)
    if is_archive(uri) or parquet.is_parquet(uri):
        return ImageRow(uri, archive=uri)
    return ImageRow(uri) if remote else _row_of_path(uri)


def _row_of_url(url: str) -> ImageRow:
    """A URL is shown without its secrets, and read at its whole address. Its path says what it is."""
    uri = row_uri(url)
    address = url if url != uri else None
    path = path_and_query(url)[0]
    member = split_member(url)
    if member is not None and path == url:
        return ImageRow(uri, archive=row_uri(member[0]), address=member[0] if address else None)
    is_container = is_archive(path) or parquet.is_parquet(path)
    return ImageRow(uri, archive=uri if is_container else None, address=address)


def _row_of_path(path: str) -> ImageRow:
    try:
        entry = ANYWHERE.entry_of(path)
    except OSError:  # reading it finds out why
        return ImageRow(path)
    except ValueError as err:  # a path with a zero byte can never be read
        return ImageRow(path, status="unsupported", error=str(err))
    return ImageRow(path, entry.size_bytes, entry.etag)


def member_name(uri: str, archive: str) -> str:
    """The name within the archive of a member's URI."""
    return uri.removeprefix(f"{archive}{SEPARATOR}")


def suffix_of(name: str) -> str:
    """The lower-case suffix of a file's name, with its dot; empty: none."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind("/") else ""


def _any_of(patterns: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(fnmatch.translate, patterns))) if patterns else None
