"""Reading S3 objects with obstore, whose Rust client takes a sixth of the CPU time of botocore and no Python lock.

Owns: one request, made once, for an object or a range of it. Does not own what a failure means: whatever goes wrong
gives None, and `storage` asks again with botocore, whose retries, redirects and error codes are the ones that count.
"""

import functools
import os
import re
import threading
import time
from datetime import timedelta
from typing import Any

import obstore
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import BaseError, PermissionDeniedError
from obstore.store import S3Store

CONNECT_S, SILENCE_S, WHOLE_S = 5, 10, 600
"""Time-outs: to connect, without a byte, of a request. Signals wait for them; botocore has its own after that."""
FAILURES_IN_A_ROW = 8  # of a bucket: it is left to botocore then
PAUSE_S = 60.0  # for so long
CREDENTIALS_S = 360  # obstore asks for them again five minutes before they expire
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")  # names that are none end obstore in a panic
_OWN_CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")  # settings that botocore knows and obstore does not


class FastReads:
    """Reads from the buckets of one AWS account.

    Args:
        session: boto3's, for the credentials.
        client: boto3's of S3, for endpoint and region.
    """

    def __init__(self, session: Any, client: Any) -> None:
        self._session, self._endpoint = session, str(client.meta.endpoint_url)
        self._region = str(client.meta.region_name or "us-east-1")
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}

    def read(self, bucket: str, key: str, *, max_bytes: int) -> tuple[int, str, bytes | None] | None:
        """Size, etag and bytes of an object, no bytes where they are more than `max_bytes`; None: ask botocore."""
        found = self._get(bucket, key, {})
        if found is None or found.meta["e_tag"] is None:
            return None
        size = found.meta["size"]
        if size > max_bytes:
            self._bucket(bucket).note_success()
            return size, found.meta["e_tag"].strip('"'), None
        data = self._body(bucket, found)
        return None if data is None else (size, found.meta["e_tag"].strip('"'), data)

    def read_range(self, bucket: str, key: str, start: int, stop: int) -> bytes | None:
        """The bytes from `start` to before `stop`, fewer where the object ends; None: ask botocore."""
        found = self._get(bucket, key, {"range": (start, stop)})
        return None if found is None else self._body(bucket, found)

    def _get(self, bucket: str, key: str, options: Any) -> Any:
        if any(part in ("", ".", "..") for part in key.split("/")):
            return None  # obstore takes keys for paths
        place = self._bucket(bucket)
        if not place.is_open():
            return None
        try:
            return obstore.get(place.store, key, options=options)
        except (FileNotFoundError, PermissionDeniedError):  # Python's own for what is missing, not NotFoundError
            return None
        except (BaseError, OSError, ValueError):
            place.note_failure()
            return None

    def _body(self, bucket: str, found: Any) -> bytes | None:
        place = self._bucket(bucket)
        try:
            data = found.bytes().to_bytes()
        except (BaseError, OSError):
            place.note_failure()
            return None
        place.note_success()
        start, stop = found.range
        return bytes(data) if len(data) == stop - start else None

    def _bucket(self, name: str) -> "_Bucket":
        with self._lock:
            if name not in self._buckets:
                self._buckets[name] = _Bucket(self._store(name))
            return self._buckets[name]

    def _store(self, name: str) -> S3Store | None:
        is_encrypted = not self._endpoint.startswith("http://")
        if is_encrypted and any(os.environ.get(variable) for variable in _OWN_CERTIFICATES):
            return None
        if not _BUCKET_NAME.fullmatch(name) or self._session.get_credentials() is None:
            return None
        if _process_of_runtime() != os.getpid():
            return None
        try:
            return self._new_store(name, is_encrypted=is_encrypted)
        except (BaseError, ValueError):  # such as an AWS_ variable that botocore does not know and obstore refuses
            return None

    def _new_store(self, name: str, *, is_encrypted: bool) -> S3Store:
        return S3Store(
            name,
            endpoint=self._endpoint,
            aws_endpoint_url_s3=self._endpoint,  # obstore takes what is not said here from AWS_ variables
            region=self._region,
            skip_signature=False,
            s3_express=False,
            request_payer=False,
            virtual_hosted_style_request=False,  # the bucket in the path, which every endpoint of boto3's takes
            credential_provider=Boto3CredentialProvider(self._session, ttl=timedelta(seconds=CREDENTIALS_S)),
            client_options={
                "allow_http": not is_encrypted,
                "connect_timeout": f"{CONNECT_S}s",
                "read_timeout": f"{SILENCE_S}s",
                "timeout": f"{WHOLE_S}s",
            },
            retry_config={"max_retries": 0},
        )


@functools.cache
def _process_of_runtime() -> int:
    """The process that made the first store: the threads of obstore do not survive a fork, whose reads would hang."""
    return os.getpid()


class _Bucket:
    """A bucket, and whether it is worth asking."""

    def __init__(self, store: S3Store | None) -> None:
        self.store: Any = store
        self._failures, self._not_before = 0, 0.0

    def is_open(self) -> bool:
        return self.store is not None and time.monotonic() >= self._not_before

    def note_failure(self) -> None:
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            self._failures, self._not_before = 0, time.monotonic() + PAUSE_S

    def note_success(self) -> None:
        self._failures = 0
