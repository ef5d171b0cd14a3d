"""The store of Google Cloud Storage; credentials come from google-auth's default chain.

Where `STORAGE_EMULATOR_HOST` is set, that server is used, without credentials. The etag of an object is its generation.
The SDK's own errors are never chained to ours: they may quote session URLs, which let anyone write.
"""

import contextlib
import errno
import io
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mnist_dist.errors import ServiceError, StorageError
from mnist_dist.store.base import Entry, Level, Store, at_and_below, object_at
from mnist_dist.store.clients import (
    CONNECT_S,
    MAX_CONNECTIONS,
    PART_BYTES,
    SILENCE_S,
    PerProcess,
    delete_all,
    packages_of,
    public_line,
)
from mnist_dist.store.local import atomic_file
from mnist_dist.store.uris import GCS, bucket_and_key

RETRY_S = 45.0
"""A request is tried again for this long, s."""
CREDENTIALS_REMEDY = (
    "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, log in with `gcloud auth application-default login`, or run "
    "where a service account is attached"
)
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_PAGE = 1000  # The service's limit of objects per page.
_WRITER = "mnist-dist-writer"
"""Metadata that names the call of `create_bytes` that made an object."""
_SERVICE_WORDS = ("billing", "authentication scopes", "rate limit", "ratelimit", "quota", "disabled", "not configured")
"""A 403 with one of these words concerns the project or the token, not the object."""


class GcsStore(Store):
    """Objects by `gs://` URI, through google-cloud-storage (the extra `gcs`).

    Args:
        retry_s: how long to try a request again, s.
    """

    def __init__(self, retry_s: float = RETRY_S) -> None:
        self._retry_s = retry_s
        self._clients = PerProcess(lambda: _Client(retry_s))

    def __reduce__(self) -> tuple[type["GcsStore"], tuple[float]]:
        return GcsStore, (self._retry_s,)  # Without the clients, which belong to this process.

    def forget_clients(self) -> None:
        self._clients.forget()

    # --- reading -----------------------------------------------------------------------------------------------------

    def read_bytes(self, uri: str) -> bytes:
        _, data = self.read_object(uri, max_bytes=sys.maxsize)
        assert data is not None
        return data

    def read_object(self, uri: str, *, max_bytes: int) -> tuple[Entry, bytes | None]:
        data = _Bounded(max_bytes)
        with self._client(uri) as client:
            blob = client.blob(uri)
            try:
                blob.download_to_file(data, raw_download=True, **client.options)
            except _TooLargeError:
                return self.entry_of(uri), None
        return Entry(uri, len(data.getbuffer()), str(blob.generation)), data.getvalue()

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        return self._read_range(uri, start, length)

    def _read_range(self, uri: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        if length == 0:
            return b""
        with self._client(uri) as client:
            from google.api_core.exceptions import RequestRangeNotSatisfiable

            span = {"start": start, "end": start + length - 1, "if_generation_match": etag and int(etag)}
            try:
                # Raw, because the service would unpack what is stored with the content encoding gzip.
                return bytes(client.blob(uri).download_as_bytes(raw_download=True, **span, **client.options))
            except RequestRangeNotSatisfiable:  # The range starts after the end.
                return b""

    def entry_of(self, uri: str) -> Entry:
        with self._client(uri) as client:
            blob = client.blob(uri)
            blob.reload(**client.options)
            return Entry(uri, int(blob.size), str(blob.generation))

    def exists(self, uri: str) -> bool:
        return any(object_at(self, uri, is_folder=False)) or any(self._entries_below(uri, page_size=1))

    def scan_entries(self, uri: str) -> Iterator[Entry]:
        return at_and_below(self, uri, self._entries_below(uri))

    def _entries_below(self, uri: str, *, page_size: int = _PAGE) -> Iterator[Entry]:
        for blob in self._blobs_below(uri, page_size=page_size):
            if not blob.name.endswith("/"):  # Consoles create such empty objects as folders.
                yield Entry(_uri(blob), int(blob.size), str(blob.generation))

    def _blobs_below(self, uri: str, *, page_size: int = _PAGE) -> Iterator[Any]:
        bucket, prefix = bucket_and_key(uri.rstrip("/") + "/")
        fields = "items(name,size,generation),nextPageToken"
        with self._client(uri) as client:
            yield from client.storage.list_blobs(
                bucket, prefix=prefix, fields=fields, page_size=page_size, **client.options
            )

    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        bucket, prefix = bucket_and_key(uri.rstrip("/") + "/")
        folders, files, is_there = set[str](), dict[str, float](), not prefix  # An empty bucket exists.
        fields = "items(name,timeCreated),prefixes,nextPageToken"
        page_size = min(max_names or _PAGE, _PAGE)
        with self._client(uri) as client:
            blobs = client.storage.list_blobs(
                bucket, prefix=prefix, delimiter="/", fields=fields, page_size=page_size, **client.options
            )
            for page in blobs.pages:
                names = {blob.name.removeprefix(prefix): blob.time_created.timestamp() for blob in page}
                is_there = is_there or bool(names) or bool(blobs.prefixes)
                folders |= {name.removeprefix(prefix).rstrip("/") for name in blobs.prefixes}
                # The empty name is an object that consoles create as the folder itself.
                files |= {name: time for name, time in names.items() if name}
                if max_names is not None and len(folders) + len(files) >= max_names:
                    break
        if not is_there:
            raise FileNotFoundError(errno.ENOENT, "nothing below", uri)
        return Level(tuple(sorted(folders)), files)

    def download(self, uri: str, path: Path) -> None:
        entry = self.entry_of(uri)
        with atomic_file(path) as file:
            for start in range(0, entry.size_bytes, PART_BYTES):
                file.write(self._read_range(uri, start, PART_BYTES, etag=entry.etag))

    # --- writing -----------------------------------------------------------------------------------------------------

    def write_bytes(self, uri: str, data: bytes) -> None:
        self._send(uri, io.BytesIO(data), len(data))

    def create_bytes(self, uri: str, data: bytes) -> bool:
        writer = uuid.uuid4().hex
        with self._client(uri) as client:
            from google.api_core.exceptions import NotFound, PreconditionFailed

            blob = client.blob(uri)
            blob.metadata = {_WRITER: writer}
            try:
                blob.upload_from_string(data, if_generation_match=0, **client.options)
            except PreconditionFailed:  # Another writer was first, or this one was, and its answer was lost.
                with contextlib.suppress(NotFound):
                    blob.reload(**client.options)
                    return bool((blob.metadata or {}).get(_WRITER) == writer)
                return False
        return True

    def upload(self, path: Path, uri: str) -> None:
        with path.open("rb") as file:
            self._send(uri, file, os.fstat(file.fileno()).st_size)

    @contextlib.contextmanager
    def new_object(self, uri: str) -> Iterator[BinaryIO]:
        # A file without a name, of which a killed process leaves nothing.
        with tempfile.TemporaryFile(prefix="mnist_dist-") as file:
            yield file
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            self._send(uri, file, size_bytes)

    def _send(self, uri: str, file: BinaryIO, size_bytes: int) -> None:
        with self._client(uri) as client:
            client.blob(uri, part_bytes=PART_BYTES).upload_from_file(file, size=size_bytes, **client.options)

    def move(self, source: str, target: str) -> None:
        with self._client(source) as client:
            blob, token = client.blob(target), None
            while True:  # Each call copies what it can within its time.
                token, _, _ = blob.rewrite(client.blob(source), token=token, **client.options)
                if token is None:
                    break
        self.delete(source)

    def delete(self, uri: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._client(uri) as client:
            client.blob(uri).delete(**client.options)

    def delete_tree(self, uri: str) -> None:
        below = [_uri(blob) for blob in self._blobs_below(uri)]
        own = [entry.uri for entry in object_at(self, uri, is_folder=bool(below))]
        delete_all(self.delete, own + below)

    def check_access(self, uri: str) -> None:
        try:
            with self._client(uri):
                pass
        except ServiceError as err:
            raise StorageError(f"{err}. {CREDENTIALS_REMEDY}. Received: {uri!r}") from None

    # --- errors ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _client(self, uri: str) -> Iterator["_Client"]:
        """The client of this process; the SDK's errors in the block become ours."""
        with packages_of("gcs", GCS):
            import google.cloud.storage  # noqa: F401 (Ray brings google.api_core alone)
            from google.api_core.exceptions import NotFound
            from google.auth.exceptions import GoogleAuthError
        try:
            client = self._clients.get()
        except (GoogleAuthError, OSError, ValueError) as err:  # A credentials file of another form, or none.
            raise ServiceError(f"{uri}: the credentials cannot be read: {public_line(err)}") from None
        try:
            yield client
        except NotFound:
            raise _missing(client, uri) from None
        except _sdk_errors() as err:
            raise _meaning(err, uri) from None


class _Client:
    """The client of one process."""

    def __init__(self, retry_s: float) -> None:
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY

        # Otherwise a thread of the SDK asks for the bucket of each object, to name its place in traces.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        session = _session()
        self.storage: Any = storage.Client(project="none", credentials=session.credentials, _http=session)
        self.options: Any = {"retry": DEFAULT_RETRY.with_timeout(retry_s), "timeout": (CONNECT_S, SILENCE_S)}
        self._buckets = set[str]()

    def blob(self, uri: str, *, part_bytes: int | None = None) -> Any:
        """The SDK's handle of an object, which sends it in parts of `part_bytes`."""
        bucket, key = bucket_and_key(uri)
        if not key:
            raise StorageError(f"the URI of an object must have a key. Received: {uri!r}")
        if key in (".", ".."):  # In the path of a URL they would name the bucket.
            raise OSError(errno.EINVAL, "no name of an object", uri)
        return self.storage.bucket(bucket).blob(key, chunk_size=part_bytes)

    def has_bucket(self, name: str) -> bool:
        """Whether a bucket exists, as far as one may know; asked once, because a missing object looks the same."""
        from google.api_core.exceptions import Forbidden, NotFound, Unauthorized

        if name not in self._buckets:
            try:
                next(iter(self.storage.list_blobs(name, page_size=1, max_results=1, **self.options)), None)
            except NotFound:
                return False
            except (Forbidden, Unauthorized):  # Who may not list cannot be told.
                pass
            self._buckets.add(name)
        return True


def _session() -> Any:
    import google.auth
    from google.auth.credentials import AnonymousCredentials
    from google.auth.transport.requests import AuthorizedSession
    from requests.adapters import HTTPAdapter

    is_emulated = bool(os.environ.get("STORAGE_EMULATOR_HOST"))
    credentials = AnonymousCredentials() if is_emulated else google.auth.default(scopes=[_SCOPE])[0]
    session = AuthorizedSession(credentials)
    adapter = HTTPAdapter(pool_connections=MAX_CONNECTIONS, pool_maxsize=MAX_CONNECTIONS)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    session.hooks["response"].append(_read_refusal)
    return session


def _read_refusal(response: Any, **_: object) -> None:
    """Reads why a download was refused, because the SDK tries again on a new connection and leaves this one open."""
    if response.status_code >= 400:
        response.content  # noqa: B018 (a property that reads)


def _sdk_errors() -> tuple[type[Exception], ...]:
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
    from requests.exceptions import RequestException
    from urllib3.exceptions import HTTPError

    return (
        GoogleAPIError,
        GoogleAuthError,
        DataCorruption,
        InvalidResponse,
        RequestException,
        HTTPError,
        ConnectionError,
    )


def _missing(client: _Client, uri: str) -> Exception:
    try:
        has_bucket = client.has_bucket(bucket_and_key(uri)[0])
    except _sdk_errors() as err:
        return _meaning(err, uri)
    if has_bucket:
        return FileNotFoundError(errno.ENOENT, "no such object", uri)
    return StorageError(f"there is no such bucket. Received: {uri!r}")


def _meaning(err: Exception, uri: str) -> Exception:
    code, words = getattr(err, "code", None), str(err).lower()
    if code == 401:
        return ServiceError(f"{uri}: the credentials are not accepted: {public_line(err)}")
    if code == 403 and not any(word in words for word in _SERVICE_WORDS):
        return PermissionError(errno.EACCES, "access denied", uri)
    if code == 412:
        return OSError(errno.EIO, "replaced while it was read", uri)
    if code == 400 and "bucket name" in words:
        return StorageError(f"there is no such bucket. Received: {uri!r}")
    if code == 400 and "requester pays" not in words:
        return OSError(errno.EINVAL, "refused (400)", uri)
    return ServiceError(f"{uri}: {public_line(err)}")


def _uri(blob: Any) -> str:
    return f"{GCS}://{blob.bucket.name}/{blob.name}"


class _TooLargeError(Exception):
    """An object has more bytes than were asked for."""


class _Bounded(io.BytesIO):
    """Bytes in memory, up to a limit."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self._max_bytes:
            raise _TooLargeError
        return super().write(data)
