"""Plans how to read the rows of a listing, and reads their encoded bytes.

Owns: the requests (a file, a few tiny local files, neighbouring members of an archive, rows of a Parquet file),
checking that a container is still the one that was listed, and the status that a failed read becomes. Does not own:
decoding, or the threads that read (`data/decoding.py`).

Contract: an error of one object is an `ImageError` in place of its bytes; an error of the service is raised.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mnist_dist.errors import ImageError, StorageError
from mnist_dist.sources import arrays, parquet
from mnist_dist.sources.archives import Member, Packing, member_groups, read_members
from mnist_dist.sources.threads import map_in_threads
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import is_remote

TINY_BYTES = 4_096
"""An image of at most this size is tiny: what it costs is mostly Python, once per call, lock or thread."""
TINY_AT_ONCE = 32  # Local files in one request, whose threads take turns.
_PARQUET_ROWS, _DIVIDED_ROWS = 1_024, 8_192  # of a request; of a row group, from its start
_THREADS = 8  # They wait for storage, not for a core.
_AHEAD = 16  # Bounds the requests whose bytes are held in memory.


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoded bytes of one image, or why they could not be read."""

    data: bytes | ImageError
    size_bytes: int | None
    """None if nothing was read."""
    etag: str | None
    """ETag of the file that was read; for a member or row: that of its container."""


@dataclass(frozen=True, slots=True)
class Read:
    """One request, and the rows of the table that it reads."""

    rows: Sequence[int]
    run: Callable[[], Iterator[Encoded]]
    """Makes the request; yields one item for each row, in order."""
    tiny_files: bool = False
    """Whether these are local files of at most `TINY_BYTES`, according to the listing."""


def plan_reads(rows: pa.Table, *, max_bytes: int, store: Store = ANYWHERE) -> list[Read]:
    """The requests that read all rows of a listing, in order.

    Args:
        rows: `image_table.COLUMNS`.
        max_bytes: larger images get the status `too_large` without being read.
        store: where they are read from.

    Raises, when a request is run:
        ServiceError, StorageError: the storage failed, not a single object.
    """
    names = ["uri", "size_bytes", "etag", "archive", "packing", "status", "error", "address"]
    columns = {name: _values(rows[name]) for name in names}
    reads: list[Read] = []
    for (archive, _), group in itertools.groupby(range(len(rows)), key=functools.partial(_container_of, columns)):
        numbers = list(group)
        first, packing = numbers[0], columns["packing"][numbers[0]]
        if archive is None:
            reads += _file_reads(columns, numbers, max_bytes, store)
            continue
        part = rows.slice(first, len(numbers))
        address = columns["address"][first] or archive
        if packing.startswith(parquet.PACKING):
            reads += _parquet_reads(address, part, first=first, max_bytes=max_bytes, store=store)
        elif packing.startswith(arrays.PACKING):
            reads.append(Read(numbers, functools.partial(_array_rows, archive, part)))
        else:
            reads += _archive_reads(archive, address, part, first=first, max_bytes=max_bytes, store=store)
    return reads


def read_in_order(rows: pa.Table, *, max_bytes: int, store: Store = ANYWHERE) -> Iterator[bytes | ImageError]:
    """The encoded bytes of each row, in order. A few threads read slightly ahead of the consumer.

    Args:
        rows, max_bytes, store: as for `plan_reads`.

    Raises:
        ServiceError, StorageError: the storage failed, not a single object.
    """
    reads = plan_reads(rows, max_bytes=max_bytes, store=store)
    for encoded in map_in_threads(lambda read: list(read.run()), reads, threads=_THREADS, ahead=_AHEAD):
        yield from (image.data for image in encoded)


def image_error(error: OSError) -> ImageError:
    """The `ImageError` of one unreadable file; a failure that concerns more than one file is a ServiceError."""
    if isinstance(error, FileNotFoundError):
        return ImageError("missing", "no such file")
    if isinstance(error, PermissionError):
        return ImageError("denied", error.strerror or str(error))
    if isinstance(error, IsADirectoryError):
        return ImageError("unsupported", "a folder, not a file")
    return ImageError("failed", error.strerror or str(error))  # A bad sector, or a pipe of that name.


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; quicker than pyarrow for the many columns that are empty."""
    return [None] * len(column) if column.null_count == len(column) else column.to_pylist()


def _container_of(columns: Mapping[str, list[Any]], row: int) -> tuple[str | None, str | None]:
    """The container of a row; for arrays also their name, since several sets may lie in one folder."""
    archive, packing = columns["archive"][row], columns["packing"][row]
    return archive, packing if packing is not None and packing.startswith(arrays.PACKING) else None


# --- files -----------------------------------------------------------------------------------------------------------


def _file_reads(columns: dict[str, list[Any]], rows: Sequence[int], max_bytes: int, store: Store) -> list[Read]:
    """One request per file, but one for several adjacent tiny files that are local."""
    reads: list[Read] = []
    for is_tiny, group in itertools.groupby(rows, key=functools.partial(_is_tiny_file, columns)):
        same, at_once = list(group), TINY_AT_ONCE if is_tiny else 1
        for start in range(0, len(same), at_once):
            some = same[start : start + at_once]
            reads.append(Read(some, functools.partial(_files, columns, some, max_bytes, store), is_tiny))
    return reads


def _is_tiny_file(columns: dict[str, list[Any]], row: int) -> bool:
    size_bytes = columns["size_bytes"][row]
    return size_bytes is not None and size_bytes <= TINY_BYTES and not is_remote(_address(columns, row))


def _address(columns: dict[str, list[Any]], row: int) -> str:
    return str(columns["address"][row] or columns["uri"][row])


def _files(columns: dict[str, list[Any]], rows: Sequence[int], max_bytes: int, store: Store) -> Iterator[Encoded]:
    for row in rows:
        status = columns["status"][row]
        if status is None:
            yield _file(_address(columns, row), max_bytes, store)
        else:
            known = ImageError(status, columns["error"][row] or status)
            yield Encoded(known, columns["size_bytes"][row], columns["etag"][row])


def _file(uri: str, max_bytes: int, store: Store) -> Encoded:
    try:
        entry, data = store.read_object(uri, max_bytes=max_bytes)
    except OSError as error:
        return Encoded(image_error(error), None, None)
    except StorageError as error:
        if not is_remote(uri):
            raise
        # a list may name a bucket that does not exist
        return Encoded(ImageError("missing", str(error)), None, None)
    if data is None:
        problem = ImageError("too_large", f"{entry.size_bytes:,} bytes are more than {max_bytes:,}")
        return Encoded(problem, entry.size_bytes, entry.etag)
    return Encoded(data or ImageError("empty", "the file has no bytes"), len(data), entry.etag)


# --- containers ------------------------------------------------------------------------------------------------------


def _archive_reads(
    archive: str, address: str, rows: pa.Table, *, first: int, max_bytes: int, store: Store
) -> list[Read]:
    members = _members(rows, archive)
    etag = rows["etag"][0].as_py()
    return [
        Read(
            range(first + group.start, first + group.stop),
            functools.partial(_group, address, members[group.start : group.stop], etag, max_bytes, store),
        )
        for group in member_groups(members)
    ]


def _group(
    archive: str, members: Sequence[Member], etag: str | None, max_bytes: int, store: Store
) -> Iterator[Encoded]:
    changed = _changed(archive, etag, store)
    if changed is not None:
        yield from (Encoded(changed, member.size_bytes, etag) for member in members)
        return
    images = read_members(archive, members, max_bytes=max_bytes, store=store)
    for member, data in zip(members, images, strict=True):
        yield Encoded(data, member.size_bytes, etag)


def _changed(container: str, etag: str | None, store: Store) -> ImageError | None:
    """Why the container cannot be read as listed: in a changed one, the positions are those of other images."""
    try:
        entry = store.entry_of(container)
    except OSError as error:
        return image_error(error)
    if etag is not None and entry.etag != etag:
        return ImageError("failed", "the file changed since it was listed; list it again (scoring: --mode incremental)")
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


def _parquet_reads(uri: str, rows: pa.Table, *, first: int, max_bytes: int, store: Store) -> list[Read]:
    """One request per row group. A group is read from its start, so only the begin of one is divided, for several
    threads to decode."""
    packing, etag = rows["packing"][0].as_py(), rows["etag"][0].as_py()
    column = packing.removeprefix(parquet.PACKING)
    starts, numbers = rows["stored_bytes"].to_pylist(), rows["offset"].to_pylist()
    reads: list[Read] = []
    for _, same in itertools.groupby(
        range(len(rows)), key=lambda row: (starts[row], min(numbers[row] - starts[row], _DIVIDED_ROWS) // _PARQUET_ROWS)
    ):
        places = list(same)
        some = [numbers[place] for place in places]
        run = functools.partial(_parquet_rows, uri, column, some, etag, max_bytes, store)
        reads.append(Read(range(first + places[0], first + places[-1] + 1), run))
    return reads


def _parquet_rows(
    uri: str, column: str, rows: Sequence[int], etag: str | None, max_bytes: int, store: Store
) -> Iterator[Encoded]:
    changed = _changed(uri, etag, store)
    if changed is not None:
        yield from (Encoded(changed, None, etag) for _ in rows)
        return
    order = sorted(range(len(rows)), key=rows.__getitem__)  # A list may name rows in any order.
    ascending = [rows[place] for place in order]
    if ascending == list(rows):
        images: Iterator[bytes | ImageError] = parquet.read_rows(uri, column, rows, max_bytes=max_bytes, store=store)
    else:
        read = parquet.read_rows(uri, column, ascending, max_bytes=max_bytes, store=store)
        by_place = dict(zip(order, read, strict=True))
        images = (by_place[place] for place in range(len(rows)))
    for image in images:
        yield Encoded(image, len(image) if isinstance(image, bytes) else None, etag)


def _array_rows(data_dir: str, rows: pa.Table) -> Iterator[Encoded]:
    name = rows["packing"][0].as_py().removeprefix(arrays.PACKING)
    etag = rows["etag"][0].as_py()
    for image in arrays.encoded_rows(name, data_dir or None, rows["offset"].to_pylist()):
        yield Encoded(image, len(image), etag)
