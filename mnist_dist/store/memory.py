"""A store in the memory of one process, for tests: it behaves like a bucket but needs no server."""

import contextlib
import errno
import hashlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mnist_dist.errors import StorageError
from mnist_dist.store.base import Entry, Level, Store
from mnist_dist.store.local import atomic_file
from mnist_dist.store.uris import bucket_and_key


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    written_at: float


class MemoryStore(Store):
    """Objects by `memory://bucket/key`; every bucket exists."""

    def __init__(self) -> None:
        self._objects: dict[str, _Object] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> None:
        raise StorageError("a store in memory cannot be seen from another process")

    def read_object(self, uri: str, *, max_bytes: int) -> tuple[Entry, bytes | None]:
        entry, data = self.entry_of(uri), self.read_bytes(uri)
        return entry, data if entry.size_bytes <= max_bytes else None

    def read_bytes(self, uri: str) -> bytes:
        return self._get(uri).data

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        return self.read_bytes(uri)[start : start + length]

    def entry_of(self, uri: str) -> Entry:
        data = self._get(uri).data
        return Entry(uri, len(data), hashlib.sha256(data).hexdigest())

    def exists(self, uri: str) -> bool:
        return any(True for _ in self.scan_entries(uri))

    def scan_entries(self, uri: str) -> Iterator[Entry]:
        for name in self._names_at_or_below(uri):
            if not name.endswith("/"):  # As in buckets, where consoles create such empty objects as folders.
                with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
                    yield self.entry_of(name)

    def _names_at_or_below(self, uri: str) -> list[str]:
        bucket_and_key(uri)
        folder = uri.rstrip("/") + "/"
        with self._lock:
            return [name for name in self._objects if name == uri or name.startswith(folder)]

    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        _, key = bucket_and_key(uri)
        folder = uri.rstrip("/") + "/"
        with self._lock:
            below = {uri.removeprefix(folder): item for uri, item in self._objects.items() if uri.startswith(folder)}
        if key and not below:
            raise FileNotFoundError(errno.ENOENT, "nothing below", uri)
        folders = {name.partition("/")[0] for name in below if "/" in name}
        files = {name: item.written_at for name, item in below.items() if name and "/" not in name}
        return Level(tuple(sorted(folders)[:max_names]), dict(list(files.items())[:max_names]))

    def download(self, uri: str, path: Path) -> None:
        with atomic_file(path) as file:
            file.write(self.read_bytes(uri))

    def write_bytes(self, uri: str, data: bytes) -> None:
        self._check_key(uri)
        with self._lock:
            self._objects[uri] = _Object(bytes(data), time.time())

    def create_bytes(self, uri: str, data: bytes) -> bool:
        self._check_key(uri)
        new = _Object(bytes(data), time.time())
        with self._lock:
            return self._objects.setdefault(uri, new) is new

    def upload(self, path: Path, uri: str) -> None:
        self.write_bytes(uri, path.read_bytes())

    @contextlib.contextmanager
    def new_object(self, uri: str) -> Iterator[BinaryIO]:
        file = io.BytesIO()
        yield file
        self.write_bytes(uri, file.getvalue())

    def move(self, source: str, target: str) -> None:
        self.write_bytes(target, self.read_bytes(source))
        self.delete(source)

    def delete(self, uri: str) -> None:
        with self._lock:
            self._objects.pop(uri, None)

    def delete_tree(self, uri: str) -> None:
        for name in self._names_at_or_below(uri):
            self.delete(name)

    def _get(self, uri: str) -> _Object:
        self._check_key(uri)
        with self._lock:
            if uri not in self._objects:
                raise FileNotFoundError(errno.ENOENT, "no such object", uri)
            return self._objects[uri]

    def _check_key(self, uri: str) -> None:
        if not bucket_and_key(uri)[1]:
            raise StorageError(f"the URI of an object must have a key. Received: {uri!r}")
