"""The interface of a store, and what each failure means.

What a failure becomes, so that callers need to know neither errno nor botocore:

```
FileNotFoundError    this object is not there
PermissionError      this object may not be read or written
OSError              this object cannot be read: a bad sector, no regular file, encrypted with a key of its own
ServiceError         not this object but the service: no or expired credentials, no connection, 5xx or throttling
                     after all retries, disk full
StorageError         a URI that can never work: unknown scheme, no such bucket
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
from mnist_dist.store.uris import absolute, join, temporary_name


@dataclass(frozen=True, slots=True)
class Entry:
    """One object as a listing shows it."""

    uri: str
    size_bytes: int
    etag: str
    """Changes with the content: S3's etag, or `{mtime_ns}-{size}` of a local file."""


@dataclass(frozen=True, slots=True)
class Level:
    """What lies directly in a folder."""

    folders: tuple[str, ...]
    """Names of the folders, sorted."""
    files: Mapping[str, float]
    """When each object was last written, s since the epoch, by name."""


class Store(ABC):
    """Objects by URI. Plain data for any process: a store can be pickled, and opens its connections where it is used.

    Every method may raise PermissionError, ServiceError and StorageError (see the module); the others that it may raise
    stand with it.
    """

    # --- reading -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def read_object(self, uri: str, *, max_bytes: int) -> tuple[Entry, bytes | None]:
        """The whole object, and what it was when it was read; no bytes where there are more than `max_bytes`.

        Raises:
            FileNotFoundError: it is not there.
            OSError: this object cannot be read: no regular file, a bad sector.
        """

    @abstractmethod
    def read_bytes(self, uri: str) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abstractmethod
    def read_range(self, uri: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on; fewer where the object ends before.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abstractmethod
    def entry_of(self, uri: str) -> Entry:
        """Size and etag of one object, as a listing shows them.

        Raises:
            FileNotFoundError: it is not there, or is a folder.
        """

    @abstractmethod
    def exists(self, uri: str) -> bool:
        """Whether there is an object at `uri`, or a folder (in a bucket: any object below it)."""

    @abstractmethod
    def scan_entries(self, uri: str) -> Iterator[Entry]:
        """As `list_entries`, but in the order in which the store lists, and holding no more than a page or a folder."""

    @abstractmethod
    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        """What lies directly in the folder `uri`, hidden names included; what lies deeper is not looked at.

        Args:
            uri: a folder or a prefix.
            max_names: look at no more than about so many names. None: at all.

        Raises:
            FileNotFoundError: there is no such folder (in a bucket: nothing below the prefix), or it is a file.
        """

    def list_entries(self, uri: str) -> Iterator[Entry]:
        """Everything at or below `uri`, sorted by URI, hidden names included; nothing where there is nothing.

        Symbolic links are followed, except back into a folder that they lie in. A dangling link is listed with size 0
        and no etag: whoever reads it finds it missing. Sockets, pipes and devices are not listed.
        """
        return iter(sorted(self.scan_entries(uri), key=lambda entry: entry.uri))

    def open_binary(self, uri: str) -> BinaryIO:
        """The object as a seekable file, of which only the ranges that are read are fetched.

        Raises:
            FileNotFoundError: it is not there.
        """
        return io.BufferedReader(_Ranges(self, uri, self.entry_of(uri).size_bytes), buffer_size=1 << 20)

    def local_path(self, uri: str, scratch: Path) -> Path:
        """A local file with the object's bytes and its name: the file itself, or a copy below `scratch`.

        Raises:
            FileNotFoundError: it is not there.
        """
        folder = scratch / hashlib.sha256(uri.encode()).hexdigest()[:16]  # two objects may share their last name
        path = folder / uri.rpartition("/")[2]
        self.download(uri, path)
        return path

    @abstractmethod
    def download(self, uri: str, path: Path) -> None:
        """Copies an object into a local file, in one step.

        Raises:
            FileNotFoundError: it is not there.
        """

    def download_folder(self, uri: str, local: Path) -> None:
        """Copies everything below `uri` into the folder `local`, each file in one step.

        Raises:
            FileNotFoundError: there is nothing below `uri`.
        """
        root = absolute(uri)
        entries = list(self.list_entries(root))
        if not entries:
            raise FileNotFoundError(errno.ENOENT, "no files below", uri)
        for entry in entries:
            self.download(entry.uri, local / entry.uri.removeprefix(f"{root}/"))

    # --- writing -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def write_bytes(self, uri: str, data: bytes) -> None:
        """Puts the object in place in one step: a reader sees the old bytes or the new ones, never a part."""

    @abstractmethod
    def create_bytes(self, uri: str, data: bytes) -> bool:
        """Puts the object in place, complete, unless there is one already; whether it did. One of many callers wins."""

    @abstractmethod
    def upload(self, path: Path, uri: str) -> None:
        """Puts a local file in place, in one step."""

    @abstractmethod
    def new_object(self, uri: str) -> AbstractContextManager[BinaryIO]:
        """A seekable file whose bytes become the object in one step when the block ends without an error."""

    def upload_folder(self, local: Path, uri: str, *, last: str | None = None) -> None:
        """Puts the files of a folder below `uri`.

        A local destination is copied under a temporary name beside it and then renamed, in place of what was there.

        Args:
            local: the folder.
            uri: where its files go.
            last: the name, relative to the folder, of the file that is put last: the mark that says "complete".

        Raises:
            FileNotFoundError: `local` holds no file, or none named `last`.
        """
        for name in names_to_upload(local, last=last):
            self.upload(local / name, join(uri, name))

    def delete_leftovers(self, uri: str) -> None:  # noqa: B027 (buckets have none)
        """Deletes what killed `upload_folder`s left beside `uri`; nobody else may be uploading there."""

    def forget_clients(self) -> None:  # noqa: B027 (only some have any)
        """Drops connections, so that the next call reads the settings of the environment again."""

    @abstractmethod
    def move(self, source: str, target: str) -> None:
        """Gives the object another name, in place of what is there; in a bucket, copies it and deletes the first.

        Args:
            source: of the object.
            target: in the same store.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abstractmethod
    def delete(self, uri: str) -> None:
        """Removes one object; that it is missing is fine."""

    @abstractmethod
    def delete_tree(self, uri: str) -> None:
        """Removes everything at or below `uri`; that it is missing is fine."""

    def check_writable(self, uri: str) -> None:
        """Writes and deletes a probe below `uri`.

        Raises:
            StorageError: that failed; the message names the URI and the cause.
        """
        probe = join(uri, temporary_name("probe"))
        try:
            self.write_bytes(probe, b"probe")
            self.delete(probe)
        except (OSError, ServiceError, StorageError) as err:
            raise StorageError(f"the storage cannot be written: {err}. Received: {uri!r}") from err


def names_to_upload(local: Path, *, last: str | None) -> list[str]:
    """The files below a local folder, relative to it, `last` at the end.

    Raises:
        FileNotFoundError: there is none, or none named `last`.
    """
    names = sorted(str(path.relative_to(local)) for path in local.rglob("*") if path.is_file())
    if not names or (last is not None and last not in names):
        raise FileNotFoundError(errno.ENOENT, f"no file {last or ''!r} to upload in the folder", str(local))
    return sorted(names, key=lambda name: name == last)


class _Ranges(io.RawIOBase):
    """An object as a raw seekable file: each `readinto` is one ranged request."""

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
