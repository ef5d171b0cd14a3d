"""What an input is: stdin, one line of a list, a list, named arrays, a glob, or a tree (a file, folder or prefix).

Owns: telling them apart, and the files that match a glob. Does not own: listing what an input holds (`listing`).

Contract: a known data set goes by its name (`digits`; the folder of that name is `./digits`). Any other name that
exists is taken literally before it is tried as a member of an archive, and then as a glob.
"""

import contextlib
import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from mnist_dist.errors import ConfigError, DataError, first_line, suggestion
from mnist_dist.sources import lists, parquet
from mnist_dist.sources.archives import split_member
from mnist_dist.sources.arrays import NAMED_ARRAYS
from mnist_dist.sources.columns import URI
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry, Store
from mnist_dist.store.surroundings import what_is_there
from mnist_dist.store.uris import absolute, is_bucket, is_file_uri, is_remote, is_web, shown
from mnist_dist.urls import path_and_query

Kind = Literal["stdin", "line", "list", "arrays", "glob", "tree"]
STDIN = "-"
_MAGIC = re.compile(r"[*?\[]")
_ESCAPED = re.compile(r"\[([*?\[])\]")
_GLOB_TOKEN = re.compile(r"(?:(?<=/)|^)\*\*/|\*+|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """One input."""

    name: str
    """As typed by the user."""
    kind: Kind
    uri: str
    """Absolute; of `arrays` and `stdin` the name."""

    @property
    def is_listed(self) -> bool:
        """Whether the input names images one by one."""
        return self.kind in ("stdin", "line", "list")

    @property
    def root(self) -> str:
        """The folder that paths of a tree or glob are relative to."""
        return _literal_folder(self.uri) if self.kind == "glob" else self.uri


def place_of(name: str, *, image_column: str | None = None, store: Store = ANYWHERE) -> Place:
    """Finds out what an input is.

    Args:
        name: as typed by the user.
        image_column: the column of Parquet files that holds images, if the user named it.
        store: where inputs are looked for.

    Raises:
        DataError: nothing of that name exists, and it is no glob.
        ServiceError, StorageError: see `store.base`.
    """
    if name == STDIN:
        return Place(name, "stdin", name)
    if name in NAMED_ARRAYS:
        return Place(name, "arrays", name)
    with errors_of(name):
        return _remote_place(name, image_column, store) if is_remote(name) else _local_place(name, image_column)


def check_outside(folder: str, inputs: Iterable[str], *, name: str) -> None:
    """Checks that what a job writes does not lie in what it reads, where the next listing would find it.

    Args:
        folder: URI of the folder that is written.
        inputs: the inputs, as typed by the user.
        name: the flag of the folder.

    Raises:
        ConfigError: it lies inside an input.
    """
    written = absolute(folder)
    for uri in inputs:
        if uri not in (STDIN, *NAMED_ARRAYS) and _would_list(uri, written):
            raise ConfigError(
                f"the {name} must lie outside of the input {uri!r}, where the next run would list what is written"
                f"{_beside(uri, name)}. Received: {name}={folder!r}"
            )


def _beside(uri: str, name: str) -> str:
    """A folder to write to instead."""
    root = _literal_folder(absolute(uri)) if _MAGIC.search(uri) else absolute(uri)
    if root in ("", "/") or is_bucket(root):
        return ""
    return f"; a folder beside it will do: --{name} {root}-{'predictions' if name == 'output' else 'runs'}"


def _would_list(uri: str, folder: str) -> bool:
    """Whether an input takes images from a folder: it contains it, matches it as a glob, or matches at any depth."""
    pattern = absolute(uri)
    deep = "**" in pattern.split("/") and f"{folder}/".startswith(f"{_literal_folder(pattern)}/")
    matches = _MAGIC.search(uri) and re.fullmatch(_translated(pattern) + "(?:/.*)?", folder, re.DOTALL)
    return deep or bool(matches) or f"{folder}/".startswith(f"{pattern}/")


def columns_of(place: Place, *, uri_column: str = URI, store: Store = ANYWHERE) -> tuple[str, ...]:
    """The columns of a list that can be carried; other inputs have none before they are opened.

    Raises:
        DataError: the list is not readable.
        ServiceError, StorageError: see `store.base`.
    """
    with errors_of(place.name):
        if place.kind != "list":
            return ()
        return lists.column_names(place.uri, uri_column=uri_column, store=store)


def matching(pattern: str, *, store: Store = ANYWHERE) -> Iterator[Entry]:
    """Files that match, and files in folders that match. A bucket has no folders: there, the keys that match."""
    remote = is_remote(pattern)
    if not remote and "**" not in pattern.split("/"):
        for path in sorted(glob.glob(pattern, include_hidden=True)):
            yield from store.scan_entries(path)
        return
    # `glob` follows a loop of links forty times, and never returns from several loops; hence a regex.
    regex = re.compile(_translated(pattern) + ("" if remote else "(?:/.*)?"), re.DOTALL)
    for entry in store.scan_entries(_literal_folder(pattern) or "/"):
        if regex.fullmatch(entry.uri):
            yield entry


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Turns errors of listing an input into a DataError that names it."""
    try:
        yield
    except PermissionError as err:
        raise DataError(f"no permission to list this input: {err}. Received: {shown(name)!r}") from err
    except (OSError, UnicodeDecodeError, pa.ArrowException) as err:
        raise DataError(f"this input cannot be listed: {first_line(err)}. Received: {shown(name)!r}") from err


def not_there(name: str, uri: str, *, store: Store = ANYWHERE) -> DataError:
    """The error for an input that does not exist, which says what does."""
    there = what_is_there(_literal_folder(uri) if _MAGIC.search(name) else uri, store=store)
    return DataError(
        f"{uri}: there is no such file, folder or prefix, no match for a glob, and no data set of this name"
        f"{suggestion(name, NAMED_ARRAYS)}{there}. Received: {name!r}"
    )


def _remote_place(name: str, image_column: str | None, store: Store) -> Place:
    uri = absolute(name)
    if is_web(uri):  # It cannot be listed, so it is a single image, archive, Parquet file or list.
        is_list = lists.is_list(uri) and not _holds_images(uri, image_column, store)
        return Place(name, "list" if is_list else "line", uri)
    if lists.is_list(uri) and _is_object(uri, store):
        return Place(name, "tree" if _holds_images(uri, image_column, store) else "list", uri)
    is_plain = split_member(uri) is None and parquet.split_row(uri) is None and not _MAGIC.search(uri)
    if is_plain or store.exists(uri):  # whether the prefix holds anything shows when it is listed
        return Place(name, "tree", uri)
    return Place(name, "line" if _names_a_part(uri) else "glob", uri)


def _local_place(name: str, image_column: str | None) -> Place:
    path = absolute(name)
    if os.path.isfile(path) and lists.is_list(path):
        return Place(name, "tree" if _holds_images(path, image_column, ANYWHERE) else "list", path)
    if os.path.lexists(path):
        return Place(name, "tree", path)
    if _names_a_part(path):
        return Place(name, "line", path)
    if _MAGIC.search(name):
        return Place(name, "glob", _absolute_pattern(name))
    raise not_there(name, path)


def _names_a_part(uri: str) -> bool:
    """Whether it names a member of an archive or a row of a Parquet file."""
    return split_member(uri) is not None or parquet.split_row(uri) is not None


def _holds_images(uri: str, image_column: str | None, store: Store) -> bool:
    path = path_and_query(uri)[0] if is_web(uri) else uri
    return parquet.is_parquet(path) and parquet.holds_images(uri, image_column, store=store)


def _is_object(uri: str, store: Store) -> bool:
    try:
        store.entry_of(uri)
    except FileNotFoundError:
        return False
    return True


def _absolute_pattern(name: str) -> str:
    """Escapes the working directory, whose name may hold characters that are special in a glob."""
    pattern = absolute(name) if is_file_uri(name) else name
    return os.path.normpath(os.path.join(glob.escape(os.getcwd()), pattern))


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
