"""The store of Azure Blob Storage; settings come from the environment.

`AZURE_STORAGE_CONNECTION_STRING` says everything, or `AZURE_STORAGE_ACCOUNT_NAME` names the account and
`AZURE_STORAGE_ENDPOINT` another address of it; then `AZURE_STORAGE_ACCOUNT_KEY` or `AZURE_STORAGE_SAS_TOKEN` is the
credential, else azure-identity's default chain. The SDK's own errors are never chained to ours: they quote signed URLs.
"""

import contextlib
import errno
import io
import os
import sys
import tempfile
import time
import urllib.parse
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
from mnist_dist.store.uris import AZURE, bucket_and_key

RETRIES = 4
"""How often a request is tried again; the pauses add up to about 34 s."""
_BACKOFF_S, _BACKOFF_BASE = 1, 2
_PAGE = 5000  # The service's limit of objects per page.
_COPY_LOOK_S = 0.5
CREDENTIALS_REMEDY = (
    "Set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN; without these two, `az login` or a managed identity gives the credentials"
)
_SCOPE = "https://storage.azure.com/.default"
_WRITER = "mnist_dist_writer"
"""Metadata that names the call of `create_bytes` that made an object; Azure allows no hyphens."""
_FOLDER = "hdi_isfolder"
"""Metadata of empty objects that stand for folders, in accounts with a hierarchical namespace and from Hadoop."""
_CONTAINER_CODES = frozenset({"ContainerNotFound", "ContainerDisabled", "InvalidResourceName", "ResourceTypeMismatch"})
_OBJECT_CODES = frozenset(
    {
        "BlobArchived",
        "BlobBeingRehydrated",
        "BlobImmutableDueToPolicy",
        "BlobUsesCustomerSpecifiedEncryption",
        "InvalidBlobType",
        "InvalidUri",
        "LeaseIdMissing",
        "OutOfRangeInput",
    }
)
_DENIED_CODES = frozenset({"AuthorizationPermissionMismatch", "UnauthorizedBlobOverwrite"})
"""The only answers of status 403 about an object; the others are about the account, its network or the credentials."""


class AzureStore(Store):
    """Objects by `az://container/key`, through azure-storage-blob (the extra `azure`).

    Args:
        retries: how often to try a request again.
    """

    def __init__(self, retries: int = RETRIES) -> None:
        self._retries = retries
        self._clients = PerProcess(lambda: _Client(retries))

    def __reduce__(self) -> tuple[type["AzureStore"], tuple[int]]:
        return AzureStore, (self._retries,)  # Without the clients, which belong to this process.

    def forget_clients(self) -> None:
        self._clients.forget()

    # --- reading -----------------------------------------------------------------------------------------------------

    def read_bytes(self, uri: str) -> bytes:
        _, data = self.read_object(uri, max_bytes=sys.maxsize)
        assert data is not None
        return data

    def read_object(self, uri: str, *, max_bytes: int) -> tuple[Entry, bytes | None]:
        with self._client(uri) as client:
            # As it is stored: the SDK would unpack what has the content encoding gzip.
            answer = client.blob(uri).download_blob(decompress=False)
            entry = _entry(uri, answer.properties)
            return entry, bytes(answer.readall()) if entry.size_bytes <= max_bytes else None

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        return self._read_range(uri, start, length)

    def _read_range(self, uri: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        if length == 0:
            return b""
        with self._client(uri) as client:
            from azure.core import MatchConditions
            from azure.core.exceptions import HttpResponseError

            condition: Any = {"etag": f'"{etag}"', "match_condition": MatchConditions.IfNotModified} if etag else {}
            try:
                answer = client.blob(uri).download_blob(offset=start, length=length, decompress=False, **condition)
                return bytes(answer.readall())
            except HttpResponseError as err:
                if err.status_code == 416:  # The range starts after the end.
                    return b""
                raise

    def entry_of(self, uri: str) -> Entry:
        with self._client(uri) as client:
            return _entry(uri, client.blob(uri).get_blob_properties())

    def exists(self, uri: str) -> bool:
        return any(object_at(self, uri, is_folder=False)) or any(self._entries_below(uri, page_size=1))

    def scan_entries(self, uri: str) -> Iterator[Entry]:
        return at_and_below(self, uri, self._entries_below(uri))

    def _entries_below(self, uri: str, *, page_size: int = _PAGE) -> Iterator[Entry]:
        for blob in self._blobs_below(uri, page_size=page_size):
            if not _is_folder(blob) and not blob.name.endswith("/"):  # Consoles create such empty objects as folders.
                yield _entry(_uri(blob), blob)

    def _blobs_below(self, uri: str, *, page_size: int = _PAGE) -> Iterator[Any]:
        container, prefix = bucket_and_key(uri.rstrip("/") + "/")
        with self._client(uri) as client:
            yield from client.service.get_container_client(container).list_blobs(
                name_starts_with=prefix, include=["metadata"], results_per_page=page_size
            )

    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        container, prefix = bucket_and_key(uri.rstrip("/") + "/")
        folders, files, is_there = list[str](), dict[str, float](), not prefix  # An empty container exists.
        with self._client(uri) as client:
            from azure.storage.blob import BlobPrefix

            for item in client.service.get_container_client(container).walk_blobs(
                name_starts_with=prefix, include=["metadata"], results_per_page=min(max_names or _PAGE, _PAGE)
            ):
                is_there, name = True, item.name.removeprefix(prefix)
                if isinstance(item, BlobPrefix):
                    folders.append(name.rstrip("/"))
                elif name and not _is_folder(item):  # The empty name is an object that stands for the folder itself.
                    files[name] = item.last_modified.timestamp()
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
            from azure.core.exceptions import HttpResponseError, ResourceNotFoundError

            try:
                client.send(uri, io.BytesIO(data), len(data), only_new=True, metadata={_WRITER: writer})
            except HttpResponseError as err:
                if err.status_code != 412 and _code(err) != "BlobAlreadyExists":
                    raise
                # Another writer was first, or this one was, and its answer was lost.
                with contextlib.suppress(ResourceNotFoundError):
                    return bool(client.blob(uri).get_blob_properties().metadata.get(_WRITER) == writer)
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
            client.send(uri, file, size_bytes)

    def move(self, source: str, target: str) -> None:
        with self._client(source) as client:
            client.copy(source, target)
        self.delete(source)

    def delete(self, uri: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._client(uri) as client:
            client.blob(uri).delete_blob(delete_snapshots="include")

    def delete_tree(self, uri: str) -> None:
        below = list(self._blobs_below(uri))
        delete_all(self.delete, [_uri(blob) for blob in below if not _is_folder(blob)])
        folders = [_uri(blob) for blob in below if _is_folder(blob)]
        for folder in sorted(folders, reverse=True):  # A folder with something in it cannot be deleted.
            self.delete(folder)
        if bucket_and_key(uri)[1] and not uri.endswith("/"):
            # The object or folder of this very name; it may be denied where those below it are not.
            with contextlib.suppress(*[PermissionError] if below else []):
                self.delete(uri)

    def object_store_access(self, uri: str) -> tuple[str, dict[str, str]]:
        with self._client(uri) as client:
            return uri, client.object_store_options()

    def check_access(self, uri: str) -> None:
        try:
            with self._client(uri):
                pass
        except ServiceError as err:
            raise StorageError(f"{err}. Received: {uri!r}") from None

    # --- errors ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _client(self, uri: str) -> Iterator["_Client"]:
        """The client of this process; the SDK's errors in the block become ours."""
        with packages_of("azure", AZURE):
            import azure.storage.blob  # noqa: F401
            from azure.core.exceptions import AzureError
            from requests.exceptions import RequestException
        try:
            client = self._clients.get()
        except StorageError:  # Which is a ValueError, too.
            raise
        except (ValueError, TypeError, KeyError) as err:  # A connection string or key of another form.
            raise ServiceError(f"{uri}: the Azure settings cannot be used: {type(err).__name__}") from None
        try:
            yield client
        except (AzureError, RequestException, ConnectionError) as err:
            raise _meaning(err, uri) from None


class _Client:
    """The client of one process."""

    def __init__(self, retries: int) -> None:
        from azure.core.pipeline.transport import RequestsTransport
        from azure.storage.blob import BlobServiceClient, ExponentialRetry

        options: Any = {
            "transport": RequestsTransport(session=_session(), connection_timeout=CONNECT_S, read_timeout=SILENCE_S),
            "retry_policy": ExponentialRetry(
                initial_backoff=_BACKOFF_S,
                increment_base=_BACKOFF_BASE,
                retry_total=retries,
                retry_connect=retries,
                retry_read=retries,
                retry_status=retries,
            ),
            "max_single_put_size": PART_BYTES,
            "max_chunk_get_size": PART_BYTES,
        }
        self._sas_token = os.environ.get("AZURE_STORAGE_SAS_TOKEN", "").lstrip("?")
        whole = os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
        self._credential: Any = None if whole else _credential(self._sas_token)
        self.service: Any = (
            BlobServiceClient.from_connection_string(whole, **options)
            if whole
            else BlobServiceClient(_account_url(), credential=self._credential, **options)
        )

    def blob(self, uri: str) -> Any:
        """The SDK's client of an object."""
        container, key = bucket_and_key(uri)
        if not key:
            raise StorageError(f"the URI of an object must have a key. Received: {uri!r}")
        if any(part in (".", "..") for part in key.split("/")):  # The HTTP library would resolve them.
            raise OSError(errno.EINVAL, "a name on Azure must have no part '.' or '..'", uri)
        return self.service.get_blob_client(container, key)

    def send(self, uri: str, file: BinaryIO, size_bytes: int, *, only_new: bool = False, **options: Any) -> None:
        """Makes an object of a file; a large one is sent as blocks and appears when their list is committed."""
        from azure.core import MatchConditions
        from azure.storage.blob import BlobBlock

        blob, blocks = self.blob(uri), []
        if size_bytes <= PART_BYTES:
            blob.upload_blob(file.read(), overwrite=not only_new, **options)
            return
        while data := file.read(PART_BYTES):
            block = uuid.uuid4().hex  # The SDK numbers blocks, and so would mix those of two writers.
            blob.stage_block(block, data, length=len(data))
            blocks.append(BlobBlock(block_id=block))
        if only_new:
            options["match_condition"] = MatchConditions.IfMissing
        blob.commit_block_list(blocks, **options)

    def copy(self, source: str, target: str) -> None:
        """Copies an object within the account, as the service does it."""
        blob = self.blob(target)
        status = blob.start_copy_from_url(self.blob(source).url)["copy_status"]
        while status == "pending":  # The service took the task and ends it.
            time.sleep(_COPY_LOOK_S)
            status = blob.get_blob_properties().copy.status
        if status != "success":
            raise ServiceError(f"{source}: not copied to {target} ({status})")

    def object_store_options(self) -> dict[str, str]:
        """Address and the credentials of this moment, under the names that `object_store` gives them."""
        secrets = {
            "azure_storage_account_key": getattr(self.service.credential, "account_key", None),
            "azure_storage_sas_token": urllib.parse.urlsplit(self.service.url).query,
            "azure_storage_token": self._credential.get_token(_SCOPE).token if self._has_tokens() else None,
        }
        known = {
            "azure_storage_account_name": str(self.service.account_name),
            "azure_storage_endpoint": f"{self.service.scheme}://{self.service.primary_hostname}".rstrip("/"),
            "allow_http": str(self.service.scheme == "http").lower(),
        }
        return known | {name: value for name, value in secrets.items() if value}

    def _has_tokens(self) -> bool:
        return hasattr(self._credential, "get_token")


def _account_url() -> str:
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    return os.environ.get("AZURE_STORAGE_ENDPOINT") or f"https://{account}.blob.core.windows.net"


def _credential(sas_token: str) -> Any:
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise ServiceError(f"there are no credentials for {AZURE}://. {CREDENTIALS_REMEDY}")
    key = os.environ.get("AZURE_STORAGE_ACCOUNT_KEY")
    if key:
        return {"account_name": account, "account_key": key}
    if sas_token:
        return sas_token
    with packages_of("azure", AZURE):
        from azure.identity import DefaultAzureCredential
    return DefaultAzureCredential()


def _session() -> Any:
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    adapter = HTTPAdapter(pool_connections=MAX_CONNECTIONS, pool_maxsize=MAX_CONNECTIONS)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def _meaning(err: Exception, uri: str) -> Exception:
    status, code = getattr(err, "status_code", None), _code(err)
    if code in _CONTAINER_CODES:
        return StorageError(f"there is no such container ({code}). Received: {uri!r}")
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "no such object", uri)
    if code in _DENIED_CODES or (status == 403 and not code):
        return PermissionError(errno.EACCES, f"access denied ({code})", uri)
    if status in (401, 403):
        return ServiceError(f"{uri}: the credentials are not accepted ({code or status})")
    if status == 412 and code not in _OBJECT_CODES:
        return OSError(errno.EIO, "replaced while it was read", uri)
    if code in _OBJECT_CODES:
        return OSError(errno.EINVAL, f"refused ({code})", uri)
    return ServiceError(f"{uri}: {code or public_line(err)}")


def _code(err: Exception) -> str:
    """The code in Azure's answer, such as `BlobNotFound`; empty if there is none."""
    code = getattr(err, "error_code", None)
    return str(getattr(code, "value", code) or "")


def _entry(uri: str, properties: Any) -> Entry:
    if _is_folder(properties):
        raise FileNotFoundError(errno.ENOENT, "a folder, not a file", uri)
    return Entry(uri, int(properties.size), str(properties.etag).strip('"'))


def _is_folder(properties: Any) -> bool:
    """Whether an empty object only stands for a folder."""
    return (properties.metadata or {}).get(_FOLDER) == "true"


def _uri(blob: Any) -> str:
    return f"{AZURE}://{blob.container}/{blob.name}"
