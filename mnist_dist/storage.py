"""Local paths and `s3://` URIs behind the same few functions.

Owns: reading, atomic writing, listing and deleting, and what each failure means. Does not own: what the bytes are.
A URI is a local path (`runs/a`, `/data`), `file:///data`, or `s3://bucket/key`; endpoint, region and credentials of S3
come from the AWS default chain.

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

import contextlib
import errno
import functools
import glob
import hashlib
import io
import itertools
import os
import shutil
import stat
import sys
import tempfile
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from xml.parsers import expat

from mnist_dist.errors import ServiceError, StorageError

if TYPE_CHECKING:
    from mnist_dist.s3_reads import FastReads

_S3 = "s3://"
_FILE = "file://"
_MAX_POOL_CONNECTIONS = 64
_MAX_ATTEMPTS = 8
_NAME_CHARACTERS = 100  # of a name that a temporary name keeps: file systems take 255 bytes
_BODY_ATTEMPTS = 4
_PAGE = 1000  # the most keys that a page of S3's ListObjectsV2 holds
_DELETE_BATCH = 1000  # the most keys that S3's DeleteObjects takes
_SERVICE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
)
_CREDENTIAL_CODES = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_CREDENTIAL_CALLS = ("AssumeRole", "CreateToken", "GetRoleCredentials", "GetSessionToken")  # of STS and SSO, not of S3
_OBJECT_CODES = frozenset({"InvalidRequest", "InvalidURI", "KeyTooLongError"})  # such as a key of one's own encryption
_client_lock = threading.Lock()
Value = TypeVar("Value")


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


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store.

    Raises:
        StorageError: the scheme is unknown.
    """
    if uri.startswith(_S3):
        return True
    scheme, separator, _ = uri.partition("://")
    if separator and "/" not in scheme and scheme != "file":
        raise StorageError(f"storage is a local path, {_FILE}/path or {_S3}bucket/prefix. Received: {uri!r}")
    return False


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it, with one slash between each."""
    base = uri if is_remote(uri) else str(_local(uri))
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """`uri` as every process sees it, whatever its working directory: local paths become absolute."""
    return uri.rstrip("/") if is_remote(uri) else os.path.abspath(_local(uri))  # resolves no links, unlike Path


def read_bytes(uri: str) -> bytes:
    """The whole object.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: see the module.
    """
    if not is_remote(uri):
        with _local_errors(uri):
            return _local(uri).read_bytes()
    return _s3_read(uri)


def read_object(uri: str, *, most_bytes: int) -> tuple[Entry, bytes | None]:
    """The whole object, and what it was when it was read; no bytes where there are more than `most_bytes`.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: see the module.
        OSError: this object cannot be read: no regular file, a bad sector.
    """
    if is_remote(uri):
        return _s3_read_object(uri, most_bytes)
    with _local_errors(uri):
        path = _local(uri) if uri.startswith(_FILE) or uri.endswith("/") else uri
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for a writer
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, "a folder, not a file", uri)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", uri)
            data = _read_descriptor(descriptor, min(status.st_size, most_bytes) + 1)
        finally:
            os.close(descriptor)
    entry = Entry(uri, max(len(data), status.st_size), _local_etag(status))
    return entry, data if entry.size_bytes <= most_bytes else None


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from `start` on; fewer where the object ends before.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: see the module.
    """
    if length == 0:
        return b""
    if is_remote(uri):
        return _s3_read_range(uri, start, start + length)
    with _local_errors(uri), _local(uri).open("rb") as file:
        file.seek(start)
        return file.read(length)


def entry_of(uri: str) -> Entry:
    """Size and etag of one object, as a listing shows them.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: see the module.
    """
    if is_remote(uri):
        try:
            with _s3_errors(uri):
                head = _client().head_object(**_s3_address(uri))
        except PermissionError:
            _s3_read_range(uri, 0, 1)  # the answer to HEAD has no body: it does not say whether the object is denied
            raise
        return Entry(uri, head["ContentLength"], head["ETag"].strip('"'))
    with _local_errors(uri):
        status = os.stat(_local(uri))
    if stat.S_ISDIR(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, "a folder, not a file", uri)
    return Entry(uri, status.st_size, _local_etag(status))


def open_binary(uri: str) -> BinaryIO:
    """The object as a seekable file; from S3 only the ranges that are read are fetched.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: see the module.
    """
    if not is_remote(uri):
        with _local_errors(uri):
            return _local(uri).open("rb")
    with _s3_errors(uri):
        head = _client().head_object(**_s3_address(uri))
    return io.BufferedReader(_S3Range(uri, head["ContentLength"]), buffer_size=1 << 20)


def write_bytes(uri: str, data: bytes) -> None:
    """Puts the object in place in one step: a reader sees the old bytes or the new ones, never a part.

    Raises:
        PermissionError, ServiceError, StorageError: see the module.
    """
    if is_remote(uri):
        with _s3_errors(uri):
            _client().put_object(**_s3_address(uri), Body=data)
        return
    with atomic_file(_local(uri)) as file:
        file.write(data)


def create_bytes(uri: str, data: bytes) -> bool:
    """Puts the object in place, complete, unless there is one already; whether it did. One of many callers wins.

    Raises:
        PermissionError, ServiceError, StorageError: see the module.
    """
    if is_remote(uri):
        return _s3_create(uri, data)
    path = _local(uri)
    temporary = path.with_name(temporary_name(path.name))
    with _local_errors(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            _link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


def _link(temporary: Path, path: Path) -> None:
    """Gives the file its name unless that is taken; where there are no hard links, a reader may see it empty first."""
    try:
        os.link(temporary, path)
    except OSError as err:
        if err.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        with path.open("xb") as file:
            file.write(temporary.read_bytes())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` (local) when the block ends without an error, on disk and complete.

    Raises:
        PermissionError, ServiceError: see the module.
    """
    temporary = path.with_name(temporary_name(path.name))
    with _local_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_object(uri: str) -> Iterator[BinaryIO]:
    """A seekable file whose bytes become the object in one step when the block ends without an error.

    Raises:
        PermissionError, ServiceError, StorageError: see the module.
    """
    if not is_remote(uri):
        with atomic_file(_local(uri)) as file:
            yield file
        return
    with tempfile.TemporaryFile(prefix="mnist_dist-") as scratch:
        yield scratch
        scratch.seek(0)
        with _s3_errors(uri):
            address = _s3_address(uri)
            _client().upload_fileobj(scratch, address["Bucket"], address["Key"])


def exists(uri: str) -> bool:
    """Whether there is an object at `uri`, or a folder (on S3: any object below it).

    Raises:
        PermissionError, ServiceError, StorageError: see the module.
    """
    if not is_remote(uri):
        return _local(uri).exists()
    try:
        with _s3_errors(uri):
            _client().head_object(**_s3_address(uri))
    except FileNotFoundError:
        return any(_s3_entries(uri, page_size=1))
    return True


def list_entries(uri: str) -> Iterator[Entry]:
    """Everything at or below `uri`, sorted by URI, hidden names included; nothing where there is nothing.

    Symbolic links are followed, except back into a folder that they lie in. A dangling link is listed with size 0
    and no etag: whoever reads it finds it missing. Sockets, pipes and devices are not listed.

    Raises:
        PermissionError, ServiceError, StorageError: see the module.
    """
    # S3 itself lists in this order, its directory buckets and other servers do not
    return iter(sorted(scan_entries(uri), key=lambda entry: entry.uri)) if is_remote(uri) else scan_entries(uri)


def scan_entries(uri: str) -> Iterator[Entry]:
    """As `list_entries`, but in the order in which the storage lists, and holding no more than a page or a folder.

    Raises:
        PermissionError, ServiceError, StorageError: see the module.
    """
    return _s3_entries_or_object(uri) if is_remote(uri) else _local_entries(_local(uri))


def list_level(uri: str, *, most: int | None = None) -> Level:
    """What lies directly in the folder `uri`, hidden names included; what lies deeper is not looked at.

    Args:
        uri: a folder or an `s3://` prefix.
        most: look at no more than about so many names. None: at all.

    Raises:
        FileNotFoundError: there is no such folder (on S3: nothing below the prefix), or it is a file.
        PermissionError, ServiceError, StorageError: see the module.
    """
    if is_remote(uri):
        return _s3_level(uri, most)
    with _local_errors(uri), os.scandir(_local(uri)) as children:
        folders, files = list[str](), dict[str, float]()
        for child in itertools.islice(children, most):
            if _is_folder(child):
                folders.append(child.name)
            else:
                with contextlib.suppress(FileNotFoundError):  # somebody's temporary file, and gone
                    files[child.name] = child.stat(follow_symlinks=False).st_mtime
    return Level(tuple(sorted(folders)), files)


def move(source: str, target: str) -> None:
    """Gives the object another name, in place of what is there; on S3, copies it and deletes the first.

    Args:
        source: of the object.
        target: on the same storage.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: see the module.
    """
    if not is_remote(source):
        with _local_errors(source):
            _local(source).replace(_local(target))
        return
    with _s3_errors(source):
        to = _s3_address(target)
        _client().copy(_s3_address(source), to["Bucket"], to["Key"])
    delete(source)


def delete(uri: str) -> None:
    """Removes one object; that it is missing is fine.

    Raises:
        PermissionError, ServiceError, StorageError: see the module.
    """
    if not is_remote(uri):
        with _local_errors(uri):
            _local(uri).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError), _s3_errors(uri):
        _client().delete_object(**_s3_address(uri))


def delete_tree(uri: str) -> None:
    """Removes everything at or below `uri`; that it is missing is fine.

    Raises:
        PermissionError, ServiceError, StorageError: see the module.
    """
    if is_remote(uri):
        _s3_delete_many([entry.uri for entry in list_entries(uri)], uri)
        return
    path = _local(uri)
    if path.is_symlink() or not path.is_dir():
        delete(uri)
        return
    with _local_errors(uri):
        shutil.rmtree(path)


def upload_folder(local: Path, uri: str, *, last: str | None = None) -> None:
    """Puts the files of a folder below `uri`.

    A local destination is copied under a temporary name beside it and then renamed, in place of what was there.

    Args:
        local: the folder.
        uri: where its files go.
        last: the name, relative to the folder, of the file that is put last: the mark that says "complete".

    Raises:
        FileNotFoundError: `local` holds no file, or none named `last`.
        PermissionError, ServiceError, StorageError: see the module.
    """
    names = [entry.uri.removeprefix(f"{local}/") for entry in list_entries(str(local))]
    if not names or (last is not None and last not in names):
        raise FileNotFoundError(errno.ENOENT, f"no file {last or ''!r} to upload in the folder", str(local))
    names.sort(key=lambda name: name == last)
    if not is_remote(uri):
        _replace_folder(local, _local(uri))
        return
    for name in names:
        target = join(uri, name)
        with (local / name).open("rb") as file, _s3_errors(target):
            address = _s3_address(target)
            _client().upload_fileobj(file, address["Bucket"], address["Key"])


def delete_leftovers(uri: str) -> None:
    """Deletes what killed `upload_folder`s left beside a local folder; nobody else may be uploading there."""
    if not is_remote(uri):
        folder = _local(uri)
        for leftover in folder.parent.glob(f".{glob.escape(folder.name[:_NAME_CHARACTERS])}.*.tmp"):
            delete_tree(str(leftover))


def download_folder(uri: str, local: Path) -> None:
    """Copies everything below `uri` into the folder `local`, each file in one step.

    Raises:
        FileNotFoundError: there is nothing below `uri`.
        PermissionError, ServiceError, StorageError: see the module.
    """
    root = absolute(uri)
    entries = list(list_entries(root))
    if not entries:
        raise FileNotFoundError(errno.ENOENT, "no files below", uri)
    for entry in entries:
        _copy_to_local(entry.uri, local / entry.uri.removeprefix(f"{root}/"))


def local_path(uri: str, scratch: Path) -> Path:
    """A local file with the object's bytes and its name: the file itself, or a copy below `scratch`.

    Raises:
        FileNotFoundError, PermissionError, ServiceError, StorageError: see the module.
    """
    if not is_remote(uri):
        return _local(uri)
    folder = scratch / hashlib.sha256(uri.encode()).hexdigest()[:16]  # two objects may share their last name
    path = folder / uri.rpartition("/")[2]
    _copy_to_local(uri, path)
    return path


def check_writable(uri: str) -> None:
    """Writes and deletes a probe below `uri`.

    Raises:
        StorageError: that failed; the message names the URI and the cause.
    """
    probe = join(uri, temporary_name("probe"))
    try:
        write_bytes(probe, b"probe")
        delete(probe)
    except (OSError, ServiceError, StorageError) as err:
        raise StorageError(f"the storage cannot be written: {err}. Received: {uri!r}") from err


def is_service_error(error: OSError) -> bool:
    """Whether an error of an opened local file is not one of this file: no space, no connection to its server."""
    return error.errno in _SERVICE_ERRNOS


def forget_clients() -> None:
    """Drops the cached S3 client, so that the next call reads the AWS settings again."""
    for cached in (_session_of, _client_of, _fast_reads_of):
        cached.cache_clear()


# --- local files -----------------------------------------------------------------------------------------------------


def _local(uri: str) -> Path:
    if uri.startswith(_FILE):
        return Path(urllib.parse.unquote(uri.removeprefix(_FILE).removeprefix("localhost")))
    is_remote(uri)  # an unknown scheme is no path
    return Path(uri)


def _read_descriptor(descriptor: int, most_bytes: int) -> bytes:
    """So many bytes, or all there are, with few calls: each gives Python's lock to other threads."""
    parts = [os.read(descriptor, most_bytes)]
    while parts[-1] and (left := most_bytes - sum(map(len, parts))) > 1:  # one more than the file had was asked for
        parts.append(os.read(descriptor, left))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def temporary_name(name: str) -> str:
    """A name beside `name` that nobody else uses, hidden, for what is not finished."""
    return f".{name[:_NAME_CHARACTERS]}.{uuid.uuid4().hex[:12]}.tmp"


@contextlib.contextmanager
def _local_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno in _SERVICE_ERRNOS:
            raise ServiceError(f"{uri}: {err.strerror}") from err
        if err.errno == errno.ENOTDIR:  # a file lies where a folder on the way should
            raise FileNotFoundError(err.errno, err.strerror, uri) from err
        raise


def _local_entries(root: Path) -> Iterator[Entry]:
    with _local_errors(str(root)):
        if root.is_dir():
            yield from _folder_entries(str(root), ())
        elif os.path.lexists(root):
            yield from _file_entry(str(root))


def _folder_entries(folder: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return
    with os.scandir(folder) as children:
        # "a/" after "a.png", as in the order of the whole URIs and of an S3 listing
        names = sorted(child.path + "/" if _is_folder(child) else child.path for child in children)
    for name in names:
        if name.endswith("/"):
            yield from _folder_entries(name[:-1], (*ancestors, identity))
        else:
            yield from _file_entry(name)


def _is_folder(child: "os.DirEntry[str]") -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link to itself
        return False


def _file_entry(path: str) -> Iterator[Entry]:
    try:
        status = os.stat(path)
    except OSError as err:
        if err.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # a link to nowhere, or to itself
            raise
        yield Entry(path, 0, "")
        return
    if stat.S_ISREG(status.st_mode):
        yield Entry(path, status.st_size, _local_etag(status))


def _local_etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _replace_folder(source: Path, target: Path) -> None:
    temporary = target.with_name(temporary_name(target.name))
    replaced = target.with_name(temporary_name(target.name))
    with _local_errors(str(target)):
        try:
            shutil.copytree(source, temporary)
            _flush(temporary)
            if target.exists():
                target.rename(replaced)
            temporary.rename(target)
        except shutil.Error as err:  # of the copy: a list of what went wrong, without its numbers
            raise ServiceError(f"{target}: {err.args[0][0][-1]}") from err
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Waits until the files are on disk, so that the rename that follows never shows an empty one after a crash."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _copy_to_local(uri: str, path: Path) -> None:
    with atomic_file(path) as file:
        if is_remote(uri):
            address = _s3_address(uri)
            with _s3_errors(uri):
                _client().download_fileobj(address["Bucket"], address["Key"], file)
        else:
            with open_binary(uri) as source:
                shutil.copyfileobj(source, file)


# --- S3 --------------------------------------------------------------------------------------------------------------


def _client() -> Any:
    with _client_lock:  # making a client is not thread-safe, the client is
        return _client_of(os.getpid())


@functools.cache
def _session_of(pid: int) -> Any:
    from boto3.session import Session

    return Session()  # our own: boto3's default one keeps the first credentials it saw


@functools.cache
def _client_of(pid: int) -> Any:  # by process: connections do not survive a fork
    from botocore.config import Config

    retries: Any = {"mode": "standard", "max_attempts": _MAX_ATTEMPTS}
    config = Config(retries=retries, max_pool_connections=_MAX_POOL_CONNECTIONS)
    client = _session_of(pid).client("s3", config=config)
    # by this pattern it comes before botocore looks for errors in the page, which parses all of it
    client.meta.events.register("before-parse.*.ListObjectsV2", _take_objects)
    return client


def _fast_reads() -> "FastReads":
    with _client_lock:
        return _fast_reads_of(os.getpid())


@functools.cache
def _fast_reads_of(pid: int) -> "FastReads":
    from mnist_dist.s3_reads import FastReads  # only here: it loads boto3

    return FastReads(_session_of(pid), _client_of(pid))


def _s3_address(uri: str) -> dict[str, str]:
    bucket, _, key = uri.removeprefix(_S3).partition("/")
    if not bucket:
        raise StorageError(f"an S3 URI is {_S3}bucket/key. Received: {uri!r}")
    return {"Bucket": bucket, "Key": key}


@contextlib.contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    try:
        yield
    except ParamValidationError as err:
        raise StorageError(f"{uri}: {err}") from err
    except ClientError as err:
        raise _meaning(err, uri) from err
    except (BotoCoreError, RetriesExceededError, S3DownloadFailedError) as err:
        raise ServiceError(f"{uri}: {err}") from err
    except (FileNotFoundError, PermissionError) as err:  # not an object: a file that credentials are read from
        raise ServiceError(f"{uri}: the credentials cannot be read: {err}") from err


def _meaning(err: Any, uri: str) -> Exception:
    code = str(err.response.get("Error", {}).get("Code", ""))
    status = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return StorageError(f"there is no such bucket. Received: {uri!r}")
    if code in _CREDENTIAL_CODES or str(err.operation_name).startswith(_CREDENTIAL_CALLS):
        return ServiceError(f"{uri}: the credentials are not accepted: {err}")
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "no such object", uri)
    if status == 403:
        return PermissionError(errno.EACCES, f"access denied ({code})", uri)
    if code in _OBJECT_CODES:
        return OSError(errno.EINVAL, f"refused ({code})", uri)
    return ServiceError(f"{uri}: {err}")


def _s3_read(uri: str) -> bytes:
    _, data = _s3_read_object(uri, sys.maxsize)
    assert data is not None
    return data


def _s3_read_range(uri: str, start: int, stop: int) -> bytes:
    """The bytes from `start` to before `stop`, fewer where the object ends."""
    from botocore.exceptions import ClientError

    address = _s3_address(uri)
    fast = _s3_fast(uri, lambda reads: reads.read_range(address["Bucket"], address["Key"], start, stop))
    if fast is not None:
        return fast
    arguments = address | {"Range": f"bytes={start}-{stop - 1}"}

    def read() -> bytes:
        try:
            return bytes(_client().get_object(**arguments)["Body"].read())
        except ClientError as err:
            if err.response["ResponseMetadata"]["HTTPStatusCode"] == 416:  # the object ends before the range begins
                return b""
            raise

    return _s3_body(uri, read)


def _s3_read_object(uri: str, most_bytes: int) -> tuple[Entry, bytes | None]:
    address = _s3_address(uri)
    fast = _s3_fast(uri, lambda reads: reads.read(address["Bucket"], address["Key"], most_bytes=most_bytes))
    if fast is not None:
        size_bytes, etag, data = fast
        return Entry(uri, size_bytes, etag), data

    def read() -> tuple[Entry, bytes | None]:
        answer = _client().get_object(**address)
        entry = Entry(uri, answer["ContentLength"], answer["ETag"].strip('"'))
        if entry.size_bytes > most_bytes:
            answer["Body"].close()
            return entry, None
        return entry, bytes(answer["Body"].read())

    return _s3_body(uri, read)


def _s3_fast(uri: str, read: "Callable[[FastReads], Value | None]") -> "Value | None":
    """What the quick client gives, if it gives something."""
    with _s3_errors(uri):
        return read(_fast_reads())


def _s3_body(uri: str, read: Callable[[], Value]) -> Value:
    """Reads again where a body broke off: botocore retries the request only."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    with _s3_errors(uri):
        for _ in range(_BODY_ATTEMPTS - 1):
            with contextlib.suppress(HTTPClientError, IncompleteReadError):
                return read()
        return read()


def _s3_create(uri: str, data: bytes) -> bool:
    from botocore.exceptions import ClientError

    with _s3_errors(uri):
        try:
            _client().put_object(**_s3_address(uri), Body=data, IfNoneMatch="*")
        except ClientError as err:
            if err.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):  # a rival is at it, or was first
                return False
            raise
    return True


class _S3Range(io.RawIOBase):
    """An object as a raw seekable file: each `readinto` is one ranged request."""

    def __init__(self, uri: str, size_bytes: int) -> None:
        self._uri = uri
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
        data = _s3_read_range(self._uri, self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _s3_entries(uri: str, *, page_size: int = _PAGE) -> Iterator[Entry]:
    address = _s3_address(uri.rstrip("/") + "/")
    with _s3_errors(uri):
        pages = (
            _client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=address["Bucket"], Prefix=address["Key"], PaginationConfig={"PageSize": page_size})
        )
        for page in pages:
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # consoles put empty objects there to show a folder
                    yield Entry(f"{_S3}{address['Bucket']}/{item['Key']}", item["Size"], item["ETag"].strip('"'))


def _s3_level(uri: str, most: int | None) -> Level:
    address = _s3_address(uri.rstrip("/") + "/")
    prefix = address["Key"]
    folders, files, is_there = list[str](), dict[str, float](), not prefix  # an empty bucket is there all the same
    page_size = min(most or _PAGE, _PAGE)
    with _s3_errors(uri):
        pages = (
            _client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=address["Bucket"], Prefix=prefix, Delimiter="/", PaginationConfig={"PageSize": page_size})
        )
        for page in pages:
            is_there = is_there or "Contents" in page or "CommonPrefixes" in page
            folders += [item["Prefix"].removeprefix(prefix).rstrip("/") for item in page.get("CommonPrefixes", ())]
            objects = ((item["Key"].removeprefix(prefix), item) for item in page.get("Contents", ()))
            # consoles put an empty object there, of the folder's own name
            files |= {name: item["LastModified"].timestamp() for name, item in objects if name}
            if most is not None and len(folders) + len(files) >= most:
                break
    if not is_there:
        raise FileNotFoundError(errno.ENOENT, "nothing below", uri)
    return Level(tuple(sorted(folders)), files)


def _take_objects(*, response_dict: Any, customized_response_dict: dict[str, Any], **_: object) -> None:
    """Parses the objects of a page before botocore does, which takes several times as long and leaves more garbage.

    They are taken out of the page, whose rest goes its usual way; and so does a page that looks otherwise.
    """
    body, last = response_dict["body"], b"</Contents>"
    start, end = body.find(b"<Contents>"), body.rfind(last) + len(last)
    if response_dict["status_code"] != 200 or not 0 <= start < end:
        return
    with contextlib.suppress(expat.ExpatError, KeyError, ValueError):
        customized_response_dict["Contents"] = _objects(body[start:end])
        response_dict["body"] = body[:start] + body[end:]


def _objects(contents: bytes) -> list[dict[str, Any]]:
    """The objects of `<Contents>` elements, of each what is used here, as botocore gives it.

    Raises:
        ExpatError, KeyError, ValueError: there is something else among them, or they lack something.
    """
    objects, values, text, depth = list[dict[str, Any]](), dict[str, str](), "", 0

    def begin(tag: str, _: object) -> None:
        nonlocal text, depth
        text, depth = "", depth + 1
        if depth == 2 and tag != "Contents":
            raise ValueError(f"objects stand side by side in a page. Received: {tag!r}")

    def add(more: str) -> None:
        nonlocal text
        text += more

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        if depth == 2:
            values[tag] = text
        elif depth == 1:
            written_at = datetime.fromisoformat(values["LastModified"])
            known = {"Key": values["Key"], "ETag": values["ETag"], "LastModified": written_at}
            objects.append({**known, "Size": int(values["Size"])})
            values.clear()

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.CharacterDataHandler, parser.EndElementHandler = begin, add, end
    parser.Parse(b"<page>" + contents + b"</page>", True)
    return objects


def _s3_entries_or_object(uri: str) -> Iterator[Entry]:
    found = False
    for entry in _s3_entries(uri):
        found = True
        yield entry
    address = _s3_address(uri)
    if found or not address["Key"] or uri.endswith("/"):
        return
    with contextlib.suppress(FileNotFoundError), _s3_errors(uri):
        head = _client().head_object(**address)
        yield Entry(uri, head["ContentLength"], head["ETag"].strip('"'))


def _s3_delete_many(uris: Iterable[str], root: str) -> None:
    keys = [{"Key": _s3_address(uri)["Key"]} for uri in uris]
    for start in range(0, len(keys), _DELETE_BATCH):
        batch: Any = {"Objects": keys[start : start + _DELETE_BATCH], "Quiet": True}
        with _s3_errors(root):
            answer = _client().delete_objects(Bucket=_s3_address(root)["Bucket"], Delete=batch)
        for failure in answer.get("Errors", ()):
            uri = join(_S3 + _s3_address(root)["Bucket"], failure["Key"])
            raise PermissionError(errno.EACCES, f"not deleted ({failure.get('Code')})", uri)
