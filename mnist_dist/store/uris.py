"""Works with URIs as text: parses them, joins them, makes them absolute.

A URI is a local path (`runs/a`, `/data`), `file:///data`, or `scheme://bucket/key` with a scheme in `REMOTE`. A URL has
more parts, which are percent-encoded already: `https://user:password@host/path?query#fragment`.

Owns: the forms of a URI. Does not own: reading or writing (`base`), or what of a URL may be shown (`urls`).
"""

import difflib
import os
import re
import urllib.parse
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_dist.errors import StorageError
from mnist_dist.urls import WEB, path_and_query
from mnist_dist.urls import shown as shown  # Part of this module's interface: what of a URI may be shown.

if TYPE_CHECKING:
    import pyarrow as pa

S3, GCS, AZURE, MEMORY = "s3", "gs", "az", "memory"
REMOTE = (S3, GCS, AZURE, *WEB, MEMORY)
"""Schemes of the stores whose objects are not local files."""
_OTHER_NAMES = {"s3a": S3, "s3n": S3, "gcs": GCS, "abfs": AZURE, "abfss": AZURE, "wasbs": AZURE, "azure": AZURE}
"""Names that other tools give to these schemes."""
_MISSPELT = re.compile(
    rf"(?P<scheme>{'|'.join((S3, GCS, AZURE, *WEB, *_OTHER_NAMES))})(:/?|//)(?P<rest>[^/].*)", re.IGNORECASE
)
_FILE = "file://"
_NAME_CHARACTERS = 100  # Bounds what a temporary name keeps of a name; file systems allow 255 bytes.


def scheme_of(uri: str) -> str:
    """The scheme of a remote URI, or an empty string for a local path.

    Raises:
        StorageError: the scheme is unknown.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator or "/" in scheme or scheme == "file":
        return ""
    if scheme not in REMOTE:
        known = f"a local path, {_FILE}/path, {S3}://bucket/prefix, {GCS}://bucket/prefix or {AZURE}://container/prefix"
        meant = _meant(scheme)
        hint = f" (did you mean {meant}://?)" if meant else ""
        raise StorageError(f"storage must be {known} (https:// can only be read){hint}. Received: {shown(uri)!r}")
    return scheme


def _meant(scheme: str) -> str | None:
    """The known scheme that an unknown one stands for; None: nobody knows."""
    names = {name: name for name in REMOTE if name != MEMORY} | _OTHER_NAMES
    near = difflib.get_close_matches(scheme.lower(), names, n=1)
    return names[near[0]] if near else None


def check_form(uri: str) -> None:
    """Checks that a place named by a person is a URI, or a path that does not look like a misspelt one.

    Raises:
        StorageError: it has too few slashes (`s3:/bucket`), or names no bucket.
    """
    if is_remote(uri):
        bucket_and_key(uri)
        return
    misspelt = _MISSPELT.match(uri)
    if misspelt is not None and not os.path.exists(uri):
        scheme = misspelt["scheme"].lower()
        meant = f"{_OTHER_NAMES.get(scheme, scheme)}://{misspelt['rest']}"
        raise StorageError(
            f"this reads as a local path, and there is none (did you mean {shown(meant)}? pathlib.Path drops a slash). "
            f"Received: {shown(uri)!r}"
        )


def is_web(uri: str) -> bool:
    """Whether `uri` is a URL of a web server."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme in WEB


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object that is not a local file.

    Raises:
        StorageError: the scheme is unknown.
    """
    return scheme_of(uri) != ""


def are_remote(uris: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Applies `is_remote` to each URI of a column: `bool [n]`; unknown schemes count as local."""
    import pyarrow.compute as pc  # Imported here so that commands without tables start faster.

    return pc.match_substring_regex(uris, f"^({'|'.join(REMOTE)})://")


def is_on_s3(uri: str) -> bool:
    """Whether S3 or a compatible server keeps an object."""
    return scheme_of(uri) == S3


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Splits a remote URI into bucket and key, or a URL into host and path; the key may be empty.

    Raises:
        StorageError: the URI names no bucket.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, key = (path_and_query(rest)[0] if is_web(uri) else rest).partition("/")
    if not bucket:
        raise StorageError(f"the URI of an object must be {scheme}://bucket/key. Received: {shown(uri)!r}")
    return bucket, key


def is_bucket(uri: str) -> bool:
    """Whether a URI names a whole bucket or web server, whose siblings belong to other people."""
    return is_remote(uri) and not bucket_and_key(uri)[1]


def parent_of(uri: str) -> str:
    """The folder that contains an absolute URI; a bucket is its own parent. A query names no folder and is cut off."""
    if is_bucket(uri):
        return uri
    return (path_and_query(uri)[0] if is_web(uri) else uri).rpartition("/")[0]


def path_of(uri: str) -> Path:
    """The path of a local URI.

    Raises:
        StorageError: the scheme is unknown.
    """
    if is_file_uri(uri):
        return Path(urllib.parse.unquote(uri.removeprefix(_FILE).removeprefix("localhost")))
    scheme_of(uri)  # Refuses unknown schemes.
    return Path(uri)


def is_file_uri(uri: str) -> bool:
    """Whether a local URI is written as one, not as a path."""
    return uri.startswith(_FILE)


def is_absolute(uri: str) -> bool:
    """Whether `absolute` changes nothing but the way in which `uri` is written."""
    return is_web(uri) or absolute(uri) == (uri if is_remote(uri) else str(path_of(uri))).rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Appends `parts` to `uri`, with one slash before each; in a URL, to its path, before the query."""
    base, query = path_and_query(uri) if is_web(uri) else (uri if is_remote(uri) else str(path_of(uri)), "")
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)]) + query


def absolute(uri: str) -> str:
    """Makes a local path absolute, so that `uri` means the same in every working directory."""
    if is_web(uri):
        return uri  # A slash at the end of a URL has a meaning, and may belong to a signed query.
    return uri.rstrip("/") if is_remote(uri) else os.path.abspath(path_of(uri))  # Path.resolve would follow links.


def temporary_name(name: str) -> str:
    """A unique hidden name to write `name` under until it is complete."""
    return f".{name[:_NAME_CHARACTERS]}.{uuid.uuid4().hex[:12]}.tmp"


def is_temporary_name(name: str, *, of: str) -> bool:
    """Whether `temporary_name(of)` may have given this name."""
    return re.fullmatch(rf"\.{re.escape(of[:_NAME_CHARACTERS])}\.[0-9a-f]{{12}}\.tmp", name) is not None
