"""Reads S3 objects with obstore, whose Rust client takes a sixth of botocore's CPU time and does not hold the GIL.

Owns: a single attempt to read an object or a range of it. Does not own: retries, redirects and the meaning of errors.
Any failure gives None, and `s3` then reads with botocore, which handles all of these.
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
"""Timeouts to connect, between bytes and of a whole request, s. A signal is handled only after them."""
FAILURES_IN_A_ROW = 8  # After this many failures a bucket is left to botocore.
PAUSE_S = 60.0  # The bucket is left to botocore for this long.
CREDENTIALS_S = 360  # obstore renews credentials five minutes before they expire.
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")  # obstore panics on other names.
_OWN_CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")  # botocore reads these, obstore does not.


class FastReads:
    """Reads from the buckets of one AWS account.

    Args:
        session: boto3 session, for the credentials.
        client: boto3 client of S3, for endpoint and region.
        anonymous, requester_pays: as for `s3.S3Store`.
    """

    def __init__(self, session: Any, client: Any, *, anonymous: bool = False, requester_pays: bool = False) -> None:
        self._anonymous, self._requester_pays = anonymous, requester_pays
        self._session, self._endpoint = session, str(client.meta.endpoint_url)
        self._region = str(client.meta.region_name or "us-east-1")
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}

    def read(self, bucket: str, key: str, *, max_bytes: int) -> tuple[int, str, bytes | None] | None:
        """Size, etag and bytes of an object (no bytes if more than `max_bytes`); None: use botocore."""
        answer = self._get(bucket, key, {})
        if answer is None or answer.meta["e_tag"] is None:
            return None
        size = answer.meta["size"]
        if size > max_bytes:
            self._bucket(bucket).note_success()
            return size, answer.meta["e_tag"].strip('"'), None
        data = self._body(bucket, answer)
        return None if data is None else (size, answer.meta["e_tag"].strip('"'), data)

    def read_range(self, bucket: str, key: str, start: int, stop: int) -> bytes | None:
        """Bytes `start` to `stop` - 1, fewer if the object ends earlier; None: use botocore."""
        answer = self._get(bucket, key, {"range": (start, stop)})
        return None if answer is None else self._body(bucket, answer)

    def _get(self, bucket: str, key: str, options: Any) -> Any:
        if any(part in ("", ".", "..") for part in key.split("/")):
            return None  # obstore treats keys as paths.
        state = self._bucket(bucket)
        if not state.is_open():
            return None
        try:
            return obstore.get(state.store, key, options=options)
        except (FileNotFoundError, PermissionDeniedError):  # obstore raises Python's error for a missing object.
            return None
        except (BaseError, OSError, ValueError):
            state.note_failure()
            return None

    def _body(self, bucket: str, answer: Any) -> bytes | None:
        state = self._bucket(bucket)
        try:
            data = answer.bytes().to_bytes()
        except (BaseError, OSError):
            state.note_failure()
            return None
        state.note_success()
        start, stop = answer.range
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
        if not _BUCKET_NAME.fullmatch(name):
            return None
        if not self._anonymous and self._session.get_credentials() is None:
            return None
        if _process_of_runtime() != os.getpid():
            return None
        try:
            return self._new_store(name, is_encrypted=is_encrypted)
        except (BaseError, ValueError):  # For example an AWS_ variable that only obstore reads, and refuses.
            return None

    def _new_store(self, name: str, *, is_encrypted: bool) -> S3Store:
        return S3Store(
            name,
            endpoint=self._endpoint,
            aws_endpoint_url_s3=self._endpoint,  # obstore reads options that are not set here from AWS_ variables.
            region=self._region,
            skip_signature=self._anonymous,
            s3_express=False,
            request_payer=self._requester_pays,
            virtual_hosted_style_request=False,  # All endpoints of boto3 accept the bucket in the path.
            credential_provider=None if self._anonymous else self._credentials(),
            client_options={
                "allow_http": not is_encrypted,
                "connect_timeout": f"{CONNECT_S}s",
                "read_timeout": f"{SILENCE_S}s",
                "timeout": f"{WHOLE_S}s",
            },
            retry_config={"max_retries": 0},
        )

    def _credentials(self) -> Boto3CredentialProvider:
        return Boto3CredentialProvider(self._session, ttl=timedelta(seconds=CREDENTIALS_S))


@functools.cache
def _process_of_runtime() -> int:
    """The process that created the first store. Threads of obstore do not survive a fork, so its reads would hang."""
    return os.getpid()


class _Bucket:
    """The obstore client of a bucket, and whether to use it now."""

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
