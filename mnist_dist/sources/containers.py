"""Opens what holds many images: archives and Parquet files. Rows that wait for one become the rows of its images.

Owns: which images of a container are taken, and their rows, labels and carried columns. Does not own: the formats
(`archives`, `parquet`, `webdataset`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.errors import ImageError
from mnist_dist.sources import image_table, parquet
from mnist_dist.sources.archives import SEPARATOR, ArchiveIndex, Member, index_archive
from mnist_dist.sources.choice import NO_IMAGES, Choice, LeftOut
from mnist_dist.sources.columns import LABEL, Wanted
from mnist_dist.sources.image_table import COLUMNS, ImageRow
from mnist_dist.sources.reading import image_error
from mnist_dist.sources.webdataset import member_labels
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.urls import path_and_query


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The rows of one container."""

    table: pa.Table
    """`COLUMNS`, then the carried columns, and for a labelled listing `label` and `split` where they are known."""
    etag: str = ""
    """ETag of the container."""
    duplicates: int = 0
    """Members that a later member of the same name replaces."""
    left_out: LeftOut = field(default_factory=LeftOut)
    unlabelled: int = 0
    """Images left out because they have no label beside them, though others of their archive do."""
    class_names: tuple[str, ...] | None = None
    """Class names by class number, if a Parquet file declares them."""
    columns: tuple[str, ...] = ()
    """Columns of a Parquet file that can be carried."""


@dataclass(frozen=True)
class _Contents:
    """What a container holds."""

    images: pa.Table
    """All that can be named one by one."""
    chosen: pa.Table
    """The rows that stand for the whole container, with one that names its problem."""
    unknown: ImageError
    """Why an image that is named may not be among `images`."""
    counts: Opened
    """Everything but the table."""


def open_container(
    uri: str,
    asked: pa.Table,
    choice: Choice,
    wanted: Wanted,
    *,
    named: bool = True,
    max_members: int | None = None,
    store: Store = ANYWHERE,
) -> Opened:
    """Opens a container, and returns its rows in place of those that wait for it.

    Args:
        uri: URI of the container.
        asked: the waiting rows. One that names the container stands for all its chosen images; one that names a member
            or row stands for that image, whatever its suffix.
        choice: which members of archives are taken.
        wanted: what is read beside the images.
        named: whether the user named it. A Parquet file without images that only lies in a folder is left out.
        max_members: read a tar no further than this many members. None: list all.
        store: the store of the container.

    Returns:
        The images in the order of the container, with the columns of the rows that waited for them.

    Raises:
        DataError: a Parquet file lacks a column, or a label.
        ServiceError, StorageError: see `store.base`.
    """
    beside = asked.column_names[len(COLUMNS) :]
    if LABEL in beside:  # What a list says of its own line wins.
        wanted = replace(wanted, label_column=None)
    uris = asked["uri"].combine_chunks()
    address = asked["address"][0].as_py()
    if parquet.is_parquet(path_and_query(uri)[0]):
        contents = _parquet(uri, address, wanted, store, named=named)
    else:
        is_whole = bool(pc.any(pc.equal(uris, uri)).as_py())
        contents = _archive(uri, address, choice, wanted, store, whole=is_whole, max_members=max_members)
    table, origins = _selected(uri, uris, contents)
    for name in beside:
        values, field = image_table.taken(asked[name], origins), asked.schema.field(name)
        if name in table.column_names:  # Where the list says nothing, the container does.
            own = table[name]
            values = pc.coalesce(values, own) if own.type == values.type else values
            table = table.drop_columns([name])
        table = table.append_column(field, values)
    return replace(contents.counts, table=table)


def _selected(uri: str, asked: pa.Array, contents: _Contents) -> tuple[pa.Table, pa.Array]:
    """The asked images in the order of the container, and for each the number of the row that asked for it."""
    is_whole = pc.equal(asked, uri).to_numpy(zero_copy_only=False)
    places = pc.fill_null(pc.index_in(asked, value_set=contents.images["uri"]), -1).to_numpy()
    whole, named = np.flatnonzero(is_whole), np.flatnonzero(~is_whole)
    named = named[np.argsort(places[named], kind="stable")]
    found, lost = named[places[named] >= 0], named[places[named] < 0]
    pieces = [contents.chosen] * len(whole)
    pieces.append(contents.images.take(pa.array(places[found])))
    pieces.append(_failed(asked.take(pa.array(lost)).to_pylist(), contents.counts, contents.unknown))
    origins = np.concatenate([np.repeat(whole, len(contents.chosen)), found, lost])
    return pa.concat_tables(pieces, promote_options="default"), pa.array(origins)


def _failed(uris: Iterable[str], counts: Opened, problem: ImageError) -> pa.Table:
    """Rows with nothing to read: no archive column."""
    etag = counts.etag or None
    return image_table.table_of(ImageRow(uri, etag=etag, status=problem.status, error=problem.message) for uri in uris)


# --- archives --------------------------------------------------------------------------------------------------------


def _archive(
    uri: str,
    address: str | None,
    choice: Choice,
    wanted: Wanted,
    store: Store,
    *,
    whole: bool,
    max_members: int | None,
) -> _Contents:
    index = index_archive(address or uri, max_members=max_members, store=store)
    labels = member_labels(index, store=store) if wanted.label_column is not None else {}
    left_out = LeftOut()
    names = [member.name for member in index.members]
    images = image_table.table_of(_row_of(uri, address, index, member) for member in index.members)
    taken = [choice.takes(f"{uri}{SEPARATOR}{name}", name, left_out) for name in names]
    kept = [is_taken and (not labels or name in labels) for is_taken, name in zip(taken, names, strict=True)]
    if labels:
        images = images.append_column(LABEL, pa.array(map(labels.get, names), pa.string()))
    counts = Opened(table=images, etag=index.entry.etag, duplicates=index.duplicates)
    if whole:
        counts = replace(counts, left_out=left_out, unlabelled=sum(taken) - sum(kept))
    others = pa.array(map(choice.is_other, names), pa.bool_())
    chosen = image_table.with_others(images, others).filter(pa.array(kept, pa.bool_()))
    if index.problem is not None:
        message = f"{index.problem.message}; {len(index.members):,} members were readable"
        problem = _failed([uri], counts, ImageError(index.problem.status, message))
        chosen = pa.concat_tables([problem, chosen], promote_options="default")
    return _Contents(images, chosen, index.problem or ImageError("missing", "no such member"), counts)


def _row_of(uri: str, address: str | None, index: ArchiveIndex, member: Member) -> ImageRow:
    return ImageRow(
        uri=f"{uri}{SEPARATOR}{member.name}",
        size_bytes=member.size_bytes,
        etag=index.entry.etag,
        archive=uri,
        packing=member.packing,
        offset=member.offset,
        stored_bytes=member.stored_bytes,
        crc32=member.crc32,
        status=None if member.problem is None else member.problem.status,
        error=None if member.problem is None else member.problem.message,
        address=address,
    )


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(uri: str, address: str | None, wanted: Wanted, store: Store, *, named: bool) -> _Contents:
    empty = COLUMNS.empty_table()
    try:
        entry = replace(store.entry_of(address or uri), uri=uri)
        rows = parquet.list_rows(entry, wanted, address=address, store=store)
    except (ImageError, OSError) as err:
        problem = err if isinstance(err, ImageError) else image_error(err)
        if problem.status == "unsupported" and not named:
            left_out = LeftOut()
            left_out.add(NO_IMAGES, uri)
            return _Contents(empty, empty, problem, Opened(table=empty, left_out=left_out))
        counts = Opened(table=empty)
        return _Contents(empty, _failed([uri], counts, problem), problem, counts)
    images = rows.table
    if wanted.label_column is not None:
        images = images.filter(pc.is_valid(images[LABEL]))
    counts = Opened(
        table=images,
        etag=entry.etag,
        unlabelled=len(rows.table) - len(images),
        class_names=rows.class_names,
        columns=rows.columns,
    )
    return _Contents(images, images, ImageError("missing", "no such row"), counts)
