"""The store of S3 and compatible servers; settings and credentials come from the AWS default chain."""

import contextlib
import errno
import functools
import os
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from mnist_dist.errors import ServiceError, StorageError
from mnist_dist.store.base import Entry, Level, Store, at_and_below, object_at
from mnist_dist.store.local import atomic_file
from mnist_dist.store.s3_pages import take_objects
from mnist_dist.store.uris import S3, bucket_and_key

if TYPE_CHECKING:
    from mnist_dist.store.s3_reads import FastReads

_MAX_POOL_CONNECTIONS = 64
_MAX_ATTEMPTS = 8
_BODY_ATTEMPTS = 4
_PAGE = 1000  # S3's limit of keys per page of ListObjectsV2.
_DELETE_BATCH = 1000  # S3's limit of keys per DeleteObjects.
_WRITER = "mnist-dist-writer"
"""Metadata that names the call of `create_bytes` that made an object."""
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
CREDENTIALS_REMEDY = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, if there is one), name a profile of "
    "~/.aws in AWS_PROFILE, or run where an instance role gives credentials; images in public buckets need none with "
    "--s3-anonymous"
)
_CREDENTIAL_CALLS = ("AssumeRole", "CreateToken", "GetRoleCredentials", "GetSessionToken")  # Calls of STS and SSO.
_OBJECT_CODES = frozenset({"InvalidRequest", "InvalidURI", "KeyTooLongError"})
"""Errors of a single object, for example one that is encrypted with a customer's key."""
Value = TypeVar("Value")


class S3Store(Store):
    """Objects by `s3://` URI. Uses obstore for the reads that it can do (`s3_reads`), and boto3 for the rest.

    Args:
        anonymous: whether to send requests unsigned, as public buckets allow; credentials are not even looked for.
        requester_pays: whether the owner of the credentials pays for each request.
    """

    def __init__(self, *, anonymous: bool = False, requester_pays: bool = False) -> None:
        self._options = {"anonymous": anonymous, "requester_pays": requester_pays}
        self.forget_clients()

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(S3Store, **self._options), ()  # Without the clients, which belong to this process.

    def forget_clients(self) -> None:
        """Drops the clients, so that the next call reads the AWS settings again."""
        self._lock = threading.Lock()  # Creating a client is not thread-safe; using it is.
        self._clients: dict[int, _Clients] = {}

    # --- reading -----------------------------------------------------------------------------------------------------

    def read_bytes(self, uri: str) -> bytes:
        _, data = self.read_object(uri, max_bytes=sys.maxsize)
        assert data is not None
        return data

    def read_object(self, uri: str, *, max_bytes: int) -> tuple[Entry, bytes | None]:
        address = _address(uri)
        fast = self._fast(uri, lambda reads: reads.read(address["Bucket"], address["Key"], max_bytes=max_bytes))
        if fast is not None:
            size_bytes, etag, data = fast
            return Entry(uri, size_bytes, etag), data

        def read() -> tuple[Entry, bytes | None]:
            answer = self._client.get_object(**address)
            entry = Entry(uri, answer["ContentLength"], answer["ETag"].strip('"'))
            if entry.size_bytes > max_bytes:
                answer["Body"].close()
                return entry, None
            return entry, bytes(answer["Body"].read())

        return _body(uri, read)

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        from botocore.exceptions import ClientError

        if length == 0:
            return b""
        address, stop = _address(uri), start + length
        fast = self._fast(uri, lambda reads: reads.read_range(address["Bucket"], address["Key"], start, stop))
        if fast is not None:
            return fast
        arguments = address | {"Range": f"bytes={start}-{stop - 1}"}

        def read() -> bytes:
            try:
                return bytes(self._client.get_object(**arguments)["Body"].read())
            except ClientError as err:
                if err.response["ResponseMetadata"]["HTTPStatusCode"] == 416:  # The range starts after the end.
                    return b""
                raise

        return _body(uri, read)

    def entry_of(self, uri: str) -> Entry:
        try:
            with _errors(uri):
                head = self._client.head_object(**_address(uri))
        except PermissionError:
            self.read_range(uri, 0, 1)  # HEAD has no body that tells an expired token from a denied object; GET has.
            raise
        return Entry(uri, head["ContentLength"], head["ETag"].strip('"'))

    def exists(self, uri: str) -> bool:
        return any(object_at(self, uri, is_folder=False)) or any(self._entries_below(uri, page_size=1))

    def scan_entries(self, uri: str) -> Iterator[Entry]:
        return at_and_below(self, uri, self._entries_below(uri))

    def _entries_below(self, uri: str, *, page_size: int = _PAGE) -> Iterator[Entry]:
        bucket, _ = bucket_and_key(uri)
        for item in self._items_below(uri, page_size=page_size):
            if not item["Key"].endswith("/"):  # Consoles create such empty objects as folders.
                yield Entry(f"{S3}://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))

    def _items_below(self, uri: str, *, page_size: int = _PAGE) -> Iterator[dict[str, Any]]:
        bucket, prefix = bucket_and_key(uri.rstrip("/") + "/")
        with _errors(uri):
            for page in self._pages(Bucket=bucket, Prefix=prefix, PaginationConfig={"PageSize": page_size}):
                yield from page.get("Contents", ())

    def list_level(self, uri: str, *, max_names: int | None = None) -> Level:
        address = _address(uri.rstrip("/") + "/")
        prefix = address["Key"]
        folders, files, is_there = list[str](), dict[str, float](), not prefix  # An empty bucket exists.
        page_size = min(max_names or _PAGE, _PAGE)
        with _errors(uri):
            for page in self._pages(
                Bucket=address["Bucket"], Prefix=prefix, Delimiter="/", PaginationConfig={"PageSize": page_size}
            ):
                is_there = is_there or "Contents" in page or "CommonPrefixes" in page
                folders += [item["Prefix"].removeprefix(prefix).rstrip("/") for item in page.get("CommonPrefixes", ())]
                objects = ((item["Key"].removeprefix(prefix), item) for item in page.get("Contents", ()))
                # The empty name is an object that consoles create as the folder itself.
                files |= {name: item["LastModified"].timestamp() for name, item in objects if name}
                if max_names is not None and len(folders) + len(files) >= max_names:
                    break
        if not is_there:
            raise FileNotFoundError(errno.ENOENT, "nothing below", uri)
        return Level(tuple(sorted(folders)), files)

    def _pages(self, **arguments: Any) -> Iterator[dict[str, Any]]:
        return iter(self._client.get_paginator("list_objects_v2").paginate(**arguments))

    def download(self, uri: str, path: Path) -> None:
        address = _address(uri)
        with atomic_file(path) as file, _errors(uri):
            self._client.download_fileobj(address["Bucket"], address["Key"], file)

    # --- writing -----------------------------------------------------------------------------------------------------

    def write_bytes(self, uri: str, data: bytes) -> None:
        with _errors(uri):
            self._client.put_object(**_address(uri), Body=data)

    def create_bytes(self, uri: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        writer = uuid.uuid4().hex
        with _errors(uri):
            try:
                self._client.put_object(**_address(uri), Body=data, IfNoneMatch="*", Metadata={_WRITER: writer})
            except ClientError as err:
                if err.response["ResponseMetadata"]["HTTPStatusCode"] not in (409, 412):
                    raise
                return self._is_written_by(uri, writer)
        return True

    def _is_written_by(self, uri: str, writer: str) -> bool:
        """Whether an object is there because of this very call, whose first answer was lost."""
        with contextlib.suppress(FileNotFoundError), _errors(uri):
            return bool(self._client.head_object(**_address(uri))["Metadata"].get(_WRITER) == writer)
        return False

    def upload(self, path: Path, uri: str) -> None:
        address = _address(uri)
        with path.open("rb") as file, _errors(uri):
            self._client.upload_fileobj(file, address["Bucket"], address["Key"])

    @contextlib.contextmanager
    def new_object(self, uri: str) -> Iterator[BinaryIO]:
        # A file without a name, of which a killed process leaves nothing.
        with tempfile.TemporaryFile(prefix="mnist_dist-") as file:
            yield file
            file.seek(0)
            address = _address(uri)
            with _errors(uri):
                self._client.upload_fileobj(file, address["Bucket"], address["Key"])

    def move(self, source: str, target: str) -> None:
        with _errors(source):
            address = _address(target)
            self._client.copy(_address(source), address["Bucket"], address["Key"])
        self.delete(source)

    def delete(self, uri: str) -> None:
        with contextlib.suppress(FileNotFoundError), _errors(uri):
            self._client.delete_object(**_address(uri))

    def delete_tree(self, uri: str) -> None:
        bucket = _address(uri)["Bucket"]
        keys = [{"Key": item["Key"]} for item in self._items_below(uri)]
        keys += [{"Key": _address(entry.uri)["Key"]} for entry in object_at(self, uri, is_folder=bool(keys))]
        for start in range(0, len(keys), _DELETE_BATCH):
            batch: Any = {"Objects": keys[start : start + _DELETE_BATCH], "Quiet": True}
            with _errors(uri):
                answer = self._client.delete_objects(Bucket=bucket, Delete=batch)
            for failure in answer.get("Errors", ()):
                failed_uri = f"{S3}://{bucket}/{failure['Key']}"
                raise PermissionError(errno.EACCES, f"not deleted ({failure.get('Code')})", failed_uri)

    def check_access(self, uri: str) -> None:
        from botocore.exceptions import BotoCoreError

        if self._options["anonymous"]:
            return
        try:
            if self._of_this_process().has_credentials():
                return
            found = "there are no credentials for S3"
        except BotoCoreError as err:  # For example a profile that does not exist.
            found = f"the credentials for S3 cannot be read: {err}"
        raise StorageError(f"{found}. {CREDENTIALS_REMEDY}. Received: {uri!r}")

    # --- clients -----------------------------------------------------------------------------------------------------

    @property
    def _client(self) -> Any:
        return self._of_this_process().client

    def _of_this_process(self) -> "_Clients":
        with self._lock:
            if os.getpid() not in self._clients:  # Connections do not survive a fork.
                self._clients = {os.getpid(): _Clients(**self._options)}
            return self._clients[os.getpid()]

    def object_store_access(self, uri: str) -> tuple[str, dict[str, str]]:
        with _errors(uri):
            return uri, self._of_this_process().object_store_options()

    def _fast(self, uri: str, read: "Callable[[FastReads], Value | None]") -> "Value | None":
        """Reads with obstore; None if boto3 has to do it."""
        with _errors(uri):
            return read(self._of_this_process().fast_reads())


class _Clients:
    """The clients of one process; the arguments are those of `S3Store`."""

    def __init__(self, *, anonymous: bool, requester_pays: bool) -> None:
        from boto3.session import Session
        from botocore import UNSIGNED
        from botocore.config import Config

        self._anonymous, self._requester_pays = anonymous, requester_pays
        retries: Any = {"mode": "standard", "max_attempts": _MAX_ATTEMPTS}
        config = Config(
            retries=retries,
            max_pool_connections=_MAX_POOL_CONNECTIONS,
            signature_version=UNSIGNED if anonymous else None,
        )
        self._session = Session()  # boto3's default session keeps the first credentials it saw.
        self.client: Any = self._session.client("s3", config=config)
        # This pattern runs before botocore's own handler, which parses the whole page to look for errors.
        self.client.meta.events.register("before-parse.*.ListObjectsV2", take_objects)
        if requester_pays:
            self.client.meta.events.register("before-call.s3", _pay)
        self._fast: FastReads | None = None
        self._lock = threading.Lock()

    def has_credentials(self) -> bool:
        """Whether the AWS default chain finds any."""
        return self._session.get_credentials() is not None

    def object_store_options(self) -> dict[str, str]:
        """Endpoint, region and the credentials of this moment, under the names that `object_store` gives them."""
        found = self._session.get_credentials()
        options = {
            "aws_endpoint": str(self.client.meta.endpoint_url),
            "aws_region": str(self.client.meta.region_name or "us-east-1"),
            "aws_virtual_hosted_style_request": "false",  # All endpoints of boto3 accept the bucket in the path.
            "aws_conditional_put": "etag",  # Commits are put if absent, as in `create_bytes`.
            "allow_http": str(self.client.meta.endpoint_url.startswith("http://")).lower(),
        }
        if found is None:
            return options
        key = found.get_frozen_credentials()
        secrets = {
            "aws_access_key_id": key.access_key,
            "aws_secret_access_key": key.secret_key,
            "aws_session_token": key.token,
        }
        return options | {name: str(value) for name, value in secrets.items() if value}

    def fast_reads(self) -> "FastReads":
        """The obstore client, created on first use."""
        with self._lock:
            if self._fast is None:
                from mnist_dist.store.s3_reads import FastReads  # Imported here because it loads obstore.

                self._fast = FastReads(
                    self._session, self.client, anonymous=self._anonymous, requester_pays=self._requester_pays
                )
            return self._fast


def _pay(*, params: Any, **_: object) -> None:
    """Adds the header of requester-pays buckets to a request before it is signed, whatever the call."""
    params["headers"]["x-amz-request-payer"] = "requester"


def _address(uri: str) -> dict[str, str]:
    bucket, key = bucket_and_key(uri)
    return {"Bucket": bucket, "Key": key}


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    try:
        yield
    except ParamValidationError as err:
        raise StorageError(f"{uri}: {err}") from err
    except ClientError as err:
        raise _meaning(err, uri) from err
    except NoCredentialsError as err:
        raise ServiceError(f"{uri}: there are no credentials for S3. {CREDENTIALS_REMEDY}") from err
    except (BotoCoreError, RetriesExceededError, S3DownloadFailedError) as err:
        raise ServiceError(f"{uri}: {err}") from err
    except (FileNotFoundError, PermissionError) as err:  # Raised for a credentials file, not for an object.
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


def _body(uri: str, read: Callable[[], Value]) -> Value:
    """Retries a body that broke off, because botocore retries only the request."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    with _errors(uri):
        for _ in range(_BODY_ATTEMPTS - 1):
            with contextlib.suppress(HTTPClientError, IncompleteReadError):
                return read()
        return read()
