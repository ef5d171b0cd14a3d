"""The interface of a store, and the meaning of each failure.

Owns: what a store does, and the methods that every store can share. Does not own: any particular storage. Failures have
the same types in every store, so that callers need to know neither errno nor any SDK:

```
FileNotFoundError    the object does not exist
PermissionError      permission to read or write this object was denied
OSError              this object cannot be read: a bad sector, not a regular file, encrypted with a customer's key
ServiceError         the service failed, not this object: missing or expired credentials, no connection, 5xx or
                     throttling after all retries, disk full
StorageError         the URI can never work: unknown scheme, no such bucket
```
"""

import errno
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mnist_dist.errors import ServiceError, StorageError
from mnist_dist.store.uris import absolute, bucket_and_key, join, shown, temporary_name


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a listing."""

    uri: str
    size_bytes: int
    etag: str
    """Changes when the content does: the etag of S3 and Azure, the generation on Google Cloud Storage, or
    `{mtime_ns}-{size}` of a local file."""


@dataclass(frozen=True, slots=True)
class Level:
    """The names directly in a folder."""

    folders: tuple[str, ...]
    """Sorted names of the folders."""
    files: Mapping[str, float]
    """Time of the last write of each object, s since the epoch, by name."""


class Store(ABC):
    """Reads and writes objects by URI. A store can be pickled; each process that uses it opens its own connections.

    Every method may raise PermissionError, ServiceError and StorageError (see the module). Each method lists its other
    exceptions.
    """

    # --- reading -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def read_object(self, uri: str, *, max_bytes: int) -> tuple[Entry, bytes | None]:
        """Reads a whole object and its entry at that moment; None for the bytes if there are more than `max_bytes`.

        Raises:
            FileNotFoundError: the object does not exist.
            OSError: the object cannot be read: not a regular file, a bad sector.
        """

    @abstractmethod
    def read_bytes(self, uri: str) -> bytes:
        """Reads a whole object.

        Raises:
            FileNotFoundError: the object does not exist.
        """

    @abstractmethod
    def read_range(self, uri: str, start: int, length: int) -> bytes:
        """Reads `length` bytes from `start` on; fewer if the object ends earlier.

        Raises:
            FileNotFoundError: the object does not exist.
        """

    @abstractmethod
    def entry_of(self, uri: str) -> Entry:
        """The entry of one object, as in a listing.

        Raises:
            FileNotFoundError: the object does not exist or is a folder.
        """

    @abstractmethod
    def exists(self, uri: str) -> bool:
        """Whether `uri` is an object or a folder (in a bucket: whether any object lies below it)."""

    @abstractmethod
    def scan_entries(self, uri: str) -> Iterator[Entry]:
        """Like `list_entries`, but in the store's own order, and with no more than one page or folder in memory."""

    @abstractmethod
    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        """Lists the names directly in the folder `uri`, including hidden ones, without looking deeper.

        Args:
            uri: a folder or a prefix.
            max_names: stop after about this many names. None: list all.

        Raises:
            FileNotFoundError: the folder does not exist (in a bucket: nothing lies below the prefix), or is a file.
        """

    def list_entries(self, uri: str) -> Iterator[Entry]:
        """Lists all objects at or below `uri`, sorted by URI, including hidden ones; nothing if there are none.

        In a bucket an object may be named like a folder: it is listed with what lies below it. Objects whose names end
        in a slash are not listed, since consoles create them to show a folder.

        Symbolic links are followed, unless they lead back into a folder that contains them. A dangling link is listed
        with size 0 and no etag, and reading it fails as missing. Sockets, pipes and devices are not listed.
        """
        return iter(sorted(self.scan_entries(uri), key=lambda entry: entry.uri))

    def open_binary(self, uri: str) -> BinaryIO:
        """Opens an object as a seekable file that fetches only the ranges that are read.

        Raises:
            FileNotFoundError: the object does not exist.
        """
        return io.BufferedReader(_Ranges(self, uri, self.entry_of(uri).size_bytes), buffer_size=1 << 20)

    def local_path(self, uri: str, scratch: Path) -> Path:
        """A local file with the bytes and name of an object: the file itself, or a copy below `scratch`.

        Raises:
            FileNotFoundError: the object does not exist.
        """
        folder = scratch / hashlib.sha256(uri.encode()).hexdigest()[:16]  # Two objects may share their last name.
        path = folder / uri.rpartition("/")[2]
        self.download(uri, path)
        return path

    @abstractmethod
    def download(self, uri: str, path: Path) -> None:
        """Copies an object to a local file, which appears in one step.

        Raises:
            FileNotFoundError: the object does not exist.
        """

    def download_folder(self, uri: str, local: Path) -> None:
        """Copies everything below `uri` into the folder `local`; each file appears in one step.

        Raises:
            FileNotFoundError: nothing lies below `uri`.
        """
        root = absolute(uri)
        entries = list(self.list_entries(root))
        if not entries:
            raise FileNotFoundError(errno.ENOENT, "no files below", uri)
        for entry in entries:
            name = entry.uri.removeprefix(f"{root}/")
            if ".." in name.split("/"):  # A bucket may hold such keys; as a path, they would leave the folder.
                raise StorageError(f"a file of a folder must not have '..' in its name. Received: {entry.uri!r}")
            self.download(entry.uri, local / name)

    # --- writing -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def write_bytes(self, uri: str, data: bytes) -> None:
        """Writes an object in one step: a reader sees either the old bytes or the new ones, never a part."""

    @abstractmethod
    def create_bytes(self, uri: str, data: bytes) -> bool:
        """Writes an object unless one exists, and returns whether it did. Of several callers exactly one wins."""

    @abstractmethod
    def upload(self, path: Path, uri: str) -> None:
        """Copies a local file to an object in one step."""

    @abstractmethod
    def new_object(self, uri: str) -> AbstractContextManager[BinaryIO]:
        """Opens a seekable file that becomes the object in one step when the block ends without an error."""

    def upload_folder(self, local: Path, uri: str, *, last: str | None = None) -> None:
        """Copies the files of a local folder below `uri`.

        A local target is written under a temporary name beside it and then renamed; it replaces the old folder.

        Args:
            local: the local folder.
            uri: the target folder or prefix.
            last: name, relative to the folder, of the file to write last, because it marks the rest as complete.

        Raises:
            FileNotFoundError: `local` has no files, or none named `last`.
        """
        for name in names_to_upload(local, last=last):
            self.upload(local / name, join(uri, name))

    def delete_leftovers(self, uri: str) -> None:  # noqa: B027 (buckets have no leftovers)
        """Deletes what killed calls of `upload_folder` left beside `uri`. Nobody else may be uploading there."""

    def object_store_access(self, uri: str) -> tuple[str, dict[str, str]]:
        """The URL and settings with which libraries on the Rust crate `object_store` (deltalake) reach a folder.

        Raises:
            StorageError: such libraries cannot reach it.
        """
        raise StorageError(f"a Delta table cannot be kept in this store. Received: {shown(uri)!r}")

    def check_access(self, uri: str) -> None:  # noqa: B027 (not every store has credentials)
        """Checks, without asking the service, that this process has credentials for an object.

        Raises:
            StorageError: it has none, or they cannot be read; the message says how to give them.
        """

    def forget_clients(self) -> None:  # noqa: B027 (not every store has clients)
        """Drops connections, so that the next call reads the environment's settings again."""

    @abstractmethod
    def move(self, source: str, target: str) -> None:
        """Renames an object and replaces any object at the target; in a bucket, copies it and deletes the original.

        Args:
            source: URI of the object.
            target: new URI, in the same store.

        Raises:
            FileNotFoundError: the object does not exist.
        """

    @abstractmethod
    def delete(self, uri: str) -> None:
        """Deletes one object, if it exists."""

    def delete_empty_folder(self, uri: str) -> None:  # noqa: B027 (buckets have no empty folders)
        """Deletes a folder that holds nothing."""

    @abstractmethod
    def delete_tree(self, uri: str) -> None:
        """Deletes everything at or below `uri`, if it exists."""

    def check_writable(self, uri: str) -> None:
        """Writes and deletes a probe below `uri`.

        Raises:
            StorageError: the probe failed; the message names the URI and the cause.
        """
        probe = join(uri, temporary_name("probe"))
        try:
            self.write_bytes(probe, b"probe")
            self.delete(probe)
        except (OSError, ServiceError, StorageError) as err:
            raise StorageError(f"the storage cannot be written: {err}. Received: {shown(uri)!r}") from err


def at_and_below(store: Store, uri: str, below: Iterator[Entry]) -> Iterator[Entry]:
    """The entries of a bucket at or below `uri`: those `below` it, then the object of that very name, if any."""
    is_folder = False
    for entry in below:
        is_folder = True
        yield entry
    yield from object_at(store, uri, is_folder=is_folder)


def object_at(store: Store, uri: str, *, is_folder: bool) -> Iterator[Entry]:
    """The object of a bucket that is named like the folder `uri`, if any.

    Args:
        store: the store of the bucket.
        uri: URI of the folder.
        is_folder: whether objects lie below it; then the object may be denied where those are not.

    Raises:
        PermissionError, ServiceError, StorageError: see the module.
    """
    if not bucket_and_key(uri)[1] or uri.endswith("/"):
        return
    try:
        yield store.entry_of(uri)
    except FileNotFoundError:
        return
    except PermissionError:
        if not is_folder:
            raise


def names_in(store: Store, uri: str) -> list[str]:
    """The sorted names directly in a folder, hidden ones excepted; none if there is no such folder.

    Raises:
        PermissionError, ServiceError, StorageError: see the module.
    """
    try:
        level = store.list_level(uri)
    except FileNotFoundError:
        return []
    return sorted(name for name in {*level.folders, *level.files} if not name.startswith("."))


def names_to_upload(local: Path, *, last: str | None) -> list[str]:
    """Lists the files below a local folder, relative to it, with `last` at the end.

    Raises:
        FileNotFoundError: there are no files, or none named `last`.
    """
    names = sorted(str(path.relative_to(local)) for path in local.rglob("*") if path.is_file())
    if not names or (last is not None and last not in names):
        raise FileNotFoundError(errno.ENOENT, f"no file {last or ''!r} to upload in the folder", str(local))
    return sorted(names, key=lambda name: name == last)


class _Ranges(io.RawIOBase):
    """An object as a raw seekable file, where each `readinto` is one ranged request."""

    def __init__(self, store: Store, uri: str, size_bytes: int) -> None:
        self._store, self._uri = store, uri
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size_bytes)
        if end <= self._position:
            return 0
        data = self._store.read_range(self._uri, self._position, end - self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
