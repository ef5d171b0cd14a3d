"""Reads the encoded bytes of the rows of a shard.

Owns: which rows are read with one request (a file; neighbours in an archive; a whole compressed archive), and the
status that a failed read becomes. Does not own: decoding, or the threads that read (`decoding`).

Contract: an error of one object is an `ImageError` in place of its bytes; an error of the service is raised.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mnist_dist.errors import ImageError, StorageError
from mnist_dist.sources.archives import Member, Packing, member_groups, read_members
from mnist_dist.sources.source import image_error
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import is_remote


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoded bytes of one image, or why they could not be read."""

    data: bytes | ImageError
    size_bytes: int | None
    """None if nothing was read."""
    etag: str | None
    """ETag of the file that was read; for a member: that of its archive."""


@dataclass(frozen=True, slots=True)
class Read:
    """One request, and the rows of the shard that it reads."""

    rows: Sequence[int]
    run: Callable[[], Iterator[Encoded]]
    """Makes the request; yields one item for each row, in order."""


def plan_reads(shard: pa.Table, *, max_bytes: int, store: Store = ANYWHERE) -> list[Read]:
    """The requests that read all rows of a shard (`manifest.COLUMNS`).

    Args:
        shard: the rows of the shard.
        max_bytes: larger files and members get the status `too_large` without being read.
        store: the store to read from.

    Raises, when a request is run:
        ServiceError, StorageError: the storage failed, not a single object.
    """
    columns = shard.select(["uri", "size_bytes", "etag", "archive", "status", "error"]).to_pydict()
    reads: list[Read] = []
    for archive, group in itertools.groupby(range(len(shard)), key=columns["archive"].__getitem__):
        rows = list(group)
        if archive is None:
            reads += [Read([row], _one(columns, row, max_bytes, store)) for row in rows]
        else:
            members = shard.slice(rows[0], len(rows))
            reads += _archive_reads(archive, members, first=rows[0], max_bytes=max_bytes)
    return reads


def _one(columns: dict[str, list[Any]], row: int, max_bytes: int, store: Store) -> Callable[[], Iterator[Encoded]]:
    status = columns["status"][row]
    if status is None:
        return _file(columns["uri"][row], max_bytes, store)
    known = ImageError(status, columns["error"][row] or status)
    return _known(known, columns["size_bytes"][row], columns["etag"][row])


def _known(problem: ImageError, size_bytes: int | None, etag: str | None) -> Callable[[], Iterator[Encoded]]:
    def run() -> Iterator[Encoded]:
        yield Encoded(problem, size_bytes, etag)

    return run


def _file(uri: str, max_bytes: int, store: Store) -> Callable[[], Iterator[Encoded]]:
    def run() -> Iterator[Encoded]:
        try:
            entry, data = store.read_object(uri, max_bytes=max_bytes)
        except OSError as error:
            yield Encoded(_status_of(error), None, None)
            return
        except StorageError as error:
            if not is_remote(uri):
                raise
            # a list may name a bucket that does not exist
            yield Encoded(ImageError("missing", str(error)), None, None)
            return
        if data is None:
            problem = ImageError("too_large", f"{entry.size_bytes:,} bytes are more than {max_bytes:,}")
            yield Encoded(problem, entry.size_bytes, entry.etag)
        else:
            yield Encoded(data or ImageError("empty", "the file has no bytes"), len(data), entry.etag)

    return run


def _status_of(error: OSError) -> ImageError:
    if isinstance(error, IsADirectoryError):
        return ImageError("unsupported", "a folder, not a file")
    return image_error(error)


def _archive_reads(archive: str, rows: pa.Table, *, first: int, max_bytes: int) -> list[Read]:
    members = _members(rows, archive)
    etag = rows["etag"][0].as_py()
    return [
        Read(
            range(first + group.start, first + group.stop),
            _group(archive, members[group.start : group.stop], etag, max_bytes),
        )
        for group in member_groups(members)
    ]


def _group(
    archive: str, members: Sequence[Member], etag: str | None, max_bytes: int
) -> Callable[[], Iterator[Encoded]]:
    def run() -> Iterator[Encoded]:
        changed = _changed(archive, etag)
        if changed is not None:
            yield from (Encoded(changed, member.size_bytes, etag) for member in members)
            return
        for member, data in zip(members, read_members(archive, members, max_bytes=max_bytes), strict=True):
            yield Encoded(data, member.size_bytes, etag)

    return run


def _changed(archive: str, etag: str | None) -> ImageError | None:
    """Why the archive cannot be read as listed: in a changed archive, the offsets point into other images."""
    try:
        entry = ANYWHERE.entry_of(archive)
    except OSError as error:
        return _status_of(error)
    if etag is not None and entry.etag != etag:
        return ImageError("failed", "the archive changed since it was listed (--mode incremental lists it again)")
    return None


def _members(rows: pa.Table, archive: str) -> list[Member]:
    names = ("uri", "size_bytes", "packing", "offset", "stored_bytes", "crc32", "status", "error")
    return [
        Member(
            name=uri.removeprefix(f"{archive}!"),
            size_bytes=size_bytes,
            packing=_packing(packing),
            offset=offset,
            stored_bytes=stored_bytes,
            crc32=crc32,
            problem=None if status is None else ImageError(status, error or status),
        )
        for uri, size_bytes, packing, offset, stored_bytes, crc32, status, error in zip(
            *(rows[name].to_pylist() for name in names), strict=True
        )
    ]


def _packing(text: str) -> Packing:
    return text  # type: ignore[return-value] # the manifest was written from members
