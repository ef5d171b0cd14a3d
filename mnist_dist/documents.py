"""JSON documents: converts frozen dataclasses to JSON and back.

Owns: the conversion, including type checks on reading. Does not own: the documents themselves or where they are stored.

Tuples, `Literal`s, nested dataclasses and `NaN` (as Python's own JSON writes it) survive the round trip. Fields that
the class does not have are ignored; missing fields take their default.
"""

import json
import threading
from typing import Any, Protocol, TypeVar

from mnist_dist.errors import DataError

Document = TypeVar("Document")
_resolved = set[Any]()
"""The types that msgspec knows."""
_resolving = threading.Lock()


def encode(document: Any) -> bytes:
    """Encodes a dataclass (or JSON values) as indented JSON."""
    import msgspec

    return (json.dumps(msgspec.to_builtins(document), indent=2) + "\n").encode()


def decode(data: bytes, kind: type[Document], *, uri: str) -> Document:
    """Decodes JSON into a dataclass.

    Args:
        data: the JSON.
        kind: the dataclass.
        uri: where the JSON comes from, for messages.

    Raises:
        DataError: the data is not JSON, or a field is missing or has the wrong type.
    """
    import msgspec

    try:
        values = json.loads(data)
        _resolve(kind)
        return msgspec.convert(values, kind)
    except (ValueError, msgspec.ValidationError) as err:
        raise DataError(f"{uri} is not a {kind.__name__}: {err}") from err


def _resolve(kind: type[Document]) -> None:
    """Makes msgspec resolve the fields of a class, which it does when it first meets it. Another thread that meets the
    class meanwhile would crash the process (msgspec 0.22)."""
    import msgspec

    if kind not in _resolved:
        with _resolving:
            msgspec.json.Decoder(kind)
            _resolved.add(kind)


class Objects(Protocol):
    """The part of a store that documents need."""

    def read_bytes(self, uri: str) -> bytes: ...
    def write_bytes(self, uri: str, data: bytes) -> None: ...


def read(store: Objects, uri: str, kind: type[Document]) -> Document:
    """Reads a dataclass from a URI.

    Raises:
        DataError: see `decode`.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    return decode(store.read_bytes(uri), kind, uri=uri)


def write(store: Objects, uri: str, document: Any) -> None:
    """Writes a dataclass to a URI, atomically.

    Raises:
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    store.write_bytes(uri, encode(document))
