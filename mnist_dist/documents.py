"""JSON documents: frozen dataclasses in, frozen dataclasses out, each field named once.

Owns: how a dataclass becomes JSON and is read back with its types checked. Does not own: which documents there are, or
where they lie.

Tuples, `Literal`s, nested dataclasses and `NaN` (as Python's own JSON writes it) survive the way there and back. A
field that a document has and the class has not is ignored; one that is missing takes its default.
"""

import json
from typing import Any, Protocol, TypeVar

import msgspec

from mnist_dist.errors import DataError

Document = TypeVar("Document")


def encode(document: Any) -> bytes:
    """A dataclass (or JSON values) as indented JSON."""
    return (json.dumps(msgspec.to_builtins(document), indent=2) + "\n").encode()


def decode(data: bytes, kind: type[Document], *, uri: str) -> Document:
    """The dataclass that some JSON describes.

    Args:
        data: the JSON.
        kind: the dataclass.
        uri: where it comes from, for messages.

    Raises:
        DataError: it is no JSON, or a field is missing or of another type.
    """
    try:
        return msgspec.convert(json.loads(data), kind)
    except (ValueError, msgspec.ValidationError) as err:
        raise DataError(f"{uri} is not a {kind.__name__}: {err}") from err


class Objects(Protocol):
    """What is needed of a store."""

    def read_bytes(self, uri: str) -> bytes: ...
    def write_bytes(self, uri: str, data: bytes) -> None: ...


def read(store: Objects, uri: str, kind: type[Document]) -> Document:
    """The dataclass that lies at a URI.

    Raises:
        DataError: see `decode`.
        FileNotFoundError, PermissionError, ServiceError, StorageError: see `store.base`.
    """
    return decode(store.read_bytes(uri), kind, uri=uri)


def write(store: Objects, uri: str, document: Any) -> None:
    """Puts a dataclass at a URI, whole or not at all.

    Raises:
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    store.write_bytes(uri, encode(document))
