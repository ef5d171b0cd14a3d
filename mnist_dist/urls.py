"""What of a URL may be shown: everything that a job prints, logs or stores goes through here.

Owns: the form of a URL without its secrets. Does not own: the other forms of a URI (`store/uris.py`).
"""

import re
from typing import Any

WEB = ("http", "https")
"""Schemes of web servers, whose URIs may have user info, a query and a fragment."""
_ANY_NAME = frozenset({"file", "s3", "gs", "az", "memory"})  # Keys and file names may hold `?`, `#` and `@`.
_CREDENTIAL = re.compile(
    r"[?&;](x-amz-|x-goog-|sig=|signature=|expires=|(google|aws)access|[^=&]*(token|secret|passw|api_?key|credential))",
    re.IGNORECASE,
)
"""Parameters of signed URLs (S3, GCS, Azure, CloudFront), and names of passwords."""
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
_URL_IN_TEXT = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)


def shown(uri: str) -> str:
    """The form of a URI that may stand in rows, messages, logs and files.

    Of a URL these are scheme, host and path: user info, query and fragment may hold passwords and signatures. The same
    goes for unknown schemes, but not for buckets and files, whose names may hold any character.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or "/" in scheme or scheme in _ANY_NAME:
        return uri
    authority, slash, path = path_and_query(rest)[0].partition("/")
    host = authority.rpartition("@")[2]
    if not _HOST.fullmatch(host):  # A password with a bare `/`, `?` or `#` looks like a host and its port.
        return f"{scheme}://..."
    return f"{scheme}://{host}{slash}{path}"


def row_uri(uri: str) -> str:
    """The URI of an image in a table: as `shown`, with the query of a URL unless it is signed or holds a password."""
    is_web = uri.partition("://")[0] in WEB
    query = path_and_query(uri)[1].partition("#")[0] if is_web else ""
    known = shown(uri)
    return known if _CREDENTIAL.search(query) or known.endswith("://...") else known + query


def shown_in(text: str) -> str:
    """A text in which each URI is as `shown`: a net below the other uses of `shown`."""
    return _URL_IN_TEXT.sub(lambda found: shown(found[0]), text) if "://" in text else text


def shown_values(value: Any) -> Any:
    """JSON values in which each string that is a URL is as `shown`."""
    if isinstance(value, dict):
        return {name: shown_values(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shown_values(inner) for inner in value]
    return shown(value) if isinstance(value, str) else value


def path_and_query(url: str) -> tuple[str, str]:
    """Cuts a URL before its query or fragment; what was cut off keeps its `?` or `#`."""
    path = re.split("[?#]", url, maxsplit=1)[0]
    return path, url[len(path) :]
