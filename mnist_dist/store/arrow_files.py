"""A store as a file system of pyarrow, through which Ray Train and Ray Tune keep their own state.

Owns: the translation of calls. Does not own: reading and writing (`base`). A path is `bucket/key`; folders exist while
something lies below them.
"""

import contextlib
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler, FileType, PyFileSystem

from mnist_dist.store.base import Store
from mnist_dist.store.uris import is_on_s3, is_remote


def ray_storage(uri: str, store: Store) -> tuple[FileSystem | None, str]:
    """The file system through which Ray reaches a folder of a store, and the folder's path in it.

    Returns:
        None and the URI for disks and S3, which pyarrow itself reaches.
    """
    if not is_remote(uri) or is_on_s3(uri):
        return None, uri
    scheme, _, path = uri.partition("://")
    return PyFileSystem(StoreFiles(store, scheme)), path


class StoreFiles(FileSystemHandler):
    """What pyarrow calls.

    Args:
        store: the store.
        scheme: the scheme of its URIs.
    """

    def __init__(self, store: Store, scheme: str) -> None:
        self.store, self.scheme = store, scheme

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreFiles) and other.scheme == self.scheme

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return f"mnist_dist+{self.scheme}"

    def normalize_path(self, path: str) -> str:
        return path.strip("/")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> FileInfo:
        with contextlib.suppress(FileNotFoundError):
            return FileInfo(path, FileType.File, size=self.store.entry_of(self._uri(path)).size_bytes)
        return FileInfo(path, FileType.Directory if self.store.exists(self._uri(path)) else FileType.NotFound)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        base = selector.base_dir.rstrip("/")
        try:
            level = self.store.list_level(self._uri(base))
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise
        found = [self._info(f"{base}/{name}") for name in level.files]
        for name in level.folders:
            found.append(FileInfo(f"{base}/{name}", FileType.Directory))
            if selector.recursive:
                found += self.get_file_info_selector(FileSelector(f"{base}/{name}", recursive=True))
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        """Does nothing: a folder begins with its first object."""

    def delete_dir(self, path: str) -> None:
        self.store.delete_tree(self._uri(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.store.delete_tree(f"{self._uri(path)}/")

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("all buckets of an account are never deleted")

    def delete_file(self, path: str) -> None:
        self.store.delete(self._uri(path))

    def move(self, source: str, target: str) -> None:
        self.store.move(self._uri(source), self._uri(target))

    def copy_file(self, source: str, target: str) -> None:
        self.store.write_bytes(self._uri(target), self.store.read_bytes(self._uri(source)))

    def open_input_stream(self, path: str) -> pa.PythonFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.store.open_binary(self._uri(path)), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        return pa.PythonFile(_NewObject(self.store, self._uri(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        raise NotImplementedError("objects cannot be appended to")

    def _uri(self, path: str) -> str:
        return f"{self.scheme}://{path.strip('/')}"


class _NewObject:
    """A file that becomes the object when it is closed."""

    def __init__(self, store: Store, uri: str) -> None:
        self._block = contextlib.ExitStack()
        self._file = self._block.enter_context(store.new_object(uri))
        self.closed = False

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        """Does nothing: the object appears in one step."""

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._block.close()
