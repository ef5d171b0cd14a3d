"""The store of local files, which includes mounted file systems."""

import contextlib
import errno
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from mnist_dist.errors import ServiceError
from mnist_dist.store.base import Entry, Level, Store, names_to_upload
from mnist_dist.store.uris import is_file_uri, is_temporary_name, path_of, temporary_name

_DELETIONS = 10  # tries to delete a folder into which others still write

_SERVICE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
)


class LocalStore(Store):
    """Files by path or `file://` URI. A written file is flushed to disk and then renamed into place."""

    def read_object(self, uri: str, *, max_bytes: int) -> tuple[Entry, bytes | None]:
        with _errors(uri):
            path = path_of(uri) if is_file_uri(uri) or uri.endswith("/") else uri
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # Opening a pipe must not block.
            try:
                status = os.fstat(descriptor)
                if stat.S_ISDIR(status.st_mode):
                    raise IsADirectoryError(errno.EISDIR, "a folder, not a file", uri)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EINVAL, "not a regular file", uri)
                data = _read_descriptor(descriptor, min(status.st_size, max_bytes) + 1)
            finally:
                os.close(descriptor)
        entry = Entry(uri, max(len(data), status.st_size), _etag(status))
        return entry, data if entry.size_bytes <= max_bytes else None

    def read_bytes(self, uri: str) -> bytes:
        with _errors(uri):
            return path_of(uri).read_bytes()

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        with _errors(uri), path_of(uri).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def entry_of(self, uri: str) -> Entry:
        with _errors(uri):
            status = os.stat(path_of(uri))
        if stat.S_ISDIR(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "a folder, not a file", uri)
        return Entry(uri, status.st_size, _etag(status))

    def exists(self, uri: str) -> bool:
        return path_of(uri).exists()

    def scan_entries(self, uri: str) -> Iterator[Entry]:
        root = path_of(uri)
        with _errors(str(root)):
            if root.is_dir():
                yield from _folder_entries(str(root), ())
            elif os.path.lexists(root):
                yield from _file_entry(str(root))

    def list_entries(self, uri: str) -> Iterator[Entry]:
        return self.scan_entries(uri)  # Already sorted.

    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        with _errors(uri), os.scandir(path_of(uri)) as children:
            folders, files = list[str](), dict[str, float]()
            for child in itertools.islice(children, max_names):
                if _is_folder(child):
                    folders.append(child.name)
                else:
                    with contextlib.suppress(FileNotFoundError):  # A temporary file that is gone by now.
                        files[child.name] = child.stat(follow_symlinks=False).st_mtime
        return Level(tuple(sorted(folders)), files)

    def open_binary(self, uri: str) -> BinaryIO:
        with _errors(uri):
            return path_of(uri).open("rb")

    def local_path(self, uri: str, scratch: Path) -> Path:
        return path_of(uri)

    def download(self, uri: str, path: Path) -> None:
        with atomic_file(path) as file, self.open_binary(uri) as source:
            shutil.copyfileobj(source, file)

    def write_bytes(self, uri: str, data: bytes) -> None:
        with atomic_file(path_of(uri)) as file:
            file.write(data)

    def create_bytes(self, uri: str, data: bytes) -> bool:
        path = path_of(uri)
        temporary = path.with_name(temporary_name(path.name))
        with _errors(uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                _link(temporary, path)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def upload(self, path: Path, uri: str) -> None:
        self.download(str(path), path_of(uri))

    def new_object(self, uri: str) -> AbstractContextManager[BinaryIO]:
        return atomic_file(path_of(uri))

    def upload_folder(self, local: Path, uri: str, *, last: str | None = None) -> None:
        names_to_upload(local, last=last)
        _replace_folder(local, path_of(uri))

    def delete_leftovers(self, uri: str) -> None:
        folder = path_of(uri)
        for leftover in folder.parent.iterdir() if folder.parent.is_dir() else ():
            if is_temporary_name(leftover.name, of=folder.name):
                self.delete_tree(str(leftover))

    def move(self, source: str, target: str) -> None:
        with _errors(source):
            path_of(target).parent.mkdir(parents=True, exist_ok=True)
            path_of(source).replace(path_of(target))

    def delete(self, uri: str) -> None:
        with _errors(uri):
            path_of(uri).unlink(missing_ok=True)

    def delete_empty_folder(self, uri: str) -> None:
        with contextlib.suppress(OSError):  # It holds something, or is gone.
            path_of(uri).rmdir()

    def object_store_access(self, uri: str) -> tuple[str, dict[str, str]]:
        return path_of(uri).absolute().as_uri(), {}

    def delete_tree(self, uri: str) -> None:
        path = path_of(uri)
        if path.is_symlink() or not path.is_dir():
            self.delete(uri)
            return
        with _errors(uri):
            for left in reversed(range(_DELETIONS)):
                try:
                    shutil.rmtree(path)
                    return
                except OSError as error:  # A process that is about to end has put another file into it.
                    if error.errno != errno.ENOTEMPTY or not left:
                        raise


def is_service_error(error: OSError) -> bool:
    """Whether an error of a local file concerns more than this file, such as a full disk or a lost file server."""
    return error.errno in _SERVICE_ERRNOS


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears at the local `path`, complete and flushed, when the block ends without an error.

    Raises:
        PermissionError, ServiceError: see `base`.
    """
    temporary = path.with_name(temporary_name(path.name))
    with _errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Names the file `path` unless that exists. Without hard links, a reader may see the file empty for a moment."""
    try:
        os.link(temporary, path)
    except OSError as err:
        if err.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        with path.open("xb") as file:
            file.write(temporary.read_bytes())


def _read_descriptor(descriptor: int, max_bytes: int) -> bytes:
    """Reads up to `max_bytes` bytes in few calls, because each call releases the GIL to other threads."""
    parts = [os.read(descriptor, max_bytes)]
    while parts[-1] and (left := max_bytes - sum(map(len, parts))) > 1:  # `max_bytes` is one more than the file has.
        parts.append(os.read(descriptor, left))
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno in _SERVICE_ERRNOS:
            raise ServiceError(f"{uri}: {err.strerror}") from err
        if err.errno == errno.ENOTDIR:  # A parent of the path is a file.
            raise FileNotFoundError(err.errno, err.strerror, uri) from err
        raise


def _folder_entries(folder: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return
    with os.scandir(folder) as children:
        # The slash sorts "a/" after "a.png", as whole URIs and S3 listings are sorted.
        names = sorted(child.path + "/" if _is_folder(child) else child.path for child in children)
    for name in names:
        if name.endswith("/"):
            yield from _folder_entries(name[:-1], (*ancestors, identity))
        else:
            yield from _file_entry(name)


def _is_folder(child: "os.DirEntry[str]") -> bool:
    try:
        return child.is_dir()
    except OSError:  # A link to itself.
        return False


def _file_entry(path: str) -> Iterator[Entry]:
    try:
        status = os.stat(path)
    except OSError as err:
        if err.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # A dangling link, or a link to itself.
            raise
        yield Entry(path, 0, "")
        return
    if stat.S_ISREG(status.st_mode):
        yield Entry(path, status.st_size, _etag(status))


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _replace_folder(source: Path, target: Path) -> None:
    temporary = target.with_name(temporary_name(target.name))
    replaced = target.with_name(temporary_name(target.name))
    with _errors(str(target)):
        try:
            shutil.copytree(source, temporary)
            _flush(temporary)
            if target.exists():
                target.rename(replaced)
            temporary.rename(target)
        except shutil.Error as err:  # From copytree: a list of failures without their errno.
            raise ServiceError(f"{target}: {err.args[0][0][-1]}") from err
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flushes all files to disk, so that no file is empty if the machine crashes after the rename."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
