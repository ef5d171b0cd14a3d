"""Selects the images of a new generation: all, new or changed ones, or failed ones.

Owns: comparing the listed images with the table. Does not own: listing (`sources`), or the
manifest file (`manifest`).
"""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnist_dist.score_config import InputConfig, ScoreJob
from mnist_dist.scoring.generations import MANIFEST, Committed, Output
from mnist_dist.scoring.manifest import SHARD
from mnist_dist.scoring.parts import LISTED
from mnist_dist.scoring.predictions import CONTRACT, EMBEDDING, NOT_BAD, TOP_K, iter_predictions, widened
from mnist_dist.sources import image_table, parquet
from mnist_dist.sources.archives import SEPARATOR, is_archive
from mnist_dist.sources.choice import Choice, member_name
from mnist_dist.sources.image_table import COLUMNS, OTHER_FILE
from mnist_dist.sources.listing import LOOK_UP_AHEAD, LOOK_UP_THREADS, Listing, list_inputs, list_uris, with_etags
from mnist_dist.sources.threads import map_in_threads
from mnist_dist.store.anywhere import store_for
from mnist_dist.store.base import Store
from mnist_dist.store.uris import is_web

RESERVED = (SHARD.name, *CONTRACT.names, *TOP_K.names, EMBEDDING)
"""Names of columns that a carried column may not have."""


@dataclass(frozen=True)
class Selection:
    """The images that a generation scores."""

    listing: Listing | None
    """The listing; None if there are no bad rows to score again."""
    table: pa.Table
    """The listed rows that are scored; may be empty."""
    gone: pa.Array | None = None
    """URIs of rows of the existing table that are to be dropped: their images are gone, or they name the problem of an
    archive that has none any more."""

    @property
    def is_empty(self) -> bool:
        """Whether the table stays as it is."""
        return not len(self.table) and not self.gone


def select_images(
    job: ScoreJob, output: Output, *, before: Committed | None, progress: Callable[[int], None] | None = None
) -> Selection:
    """Lists the input, and compares it with the existing table.

    Args:
        job: the inputs to list, and the mode.
        output: the folder of the table.
        before: the existing table, or None.
        progress: called with the number of images listed so far.

    Raises:
        DataError, ConfigError, ServiceError, StorageError: see `list_inputs`.
    """
    store = store_for(job.store)
    if before is not None and job.retry_failed:
        return _bad_rows(job, output, store, number=before.mark.number)
    listing = list_inputs(job.inputs, reserved=RESERVED, progress=progress, store=store)
    if before is None or job.mode == "fresh":
        return Selection(listing, listing.table)
    number = before.mark.number
    found = new_rows(with_etags(listing.table, store=store), output, number=number)
    return Selection(listing, found, _gone(listing, output, store, number=number) if job.drop_missing else None)


def new_rows(found: pa.Table, output: Output, *, number: int) -> pa.Table:
    """The rows that are new or changed, compared with the existing table.

    Args:
        found: rows of `image_table.COLUMNS`, with size and etag of those that will be read.
        output: the folder of the table.
        number: the number of the table's version.

    Raises:
        FileNotFoundError, ServiceError, StorageError: see `store.base`.
    """
    with output.store.open_binary(output.version_uri(number, MANIFEST)) as file:
        known = pq.read_table(file, columns=["uri", "size_bytes", "etag"])
    return found.filter(_is_new(found, known))


def _gone(listing: Listing, output: Output, store: Store, *, number: int) -> pa.Array:
    """The URIs in the table that lie in what was listed, were not found, and do not exist any more."""
    with output.store.open_binary(output.version_uri(number, MANIFEST)) as file:
        known = pq.read_table(file, columns=["uri"])["uri"]
    lost = known.filter(pc.invert(pc.is_in(known, value_set=listing.table["uri"])))
    beginnings = tuple(
        f"{root.rstrip('/')}{mark}" for root in listing.roots for mark in ("/", SEPARATOR, parquet.ROW_SEPARATOR)
    )
    inside = [uri for uri in lost.to_pylist() if uri.startswith(beginnings) or uri in listing.roots]
    # The row of a whole container names its problem: it is gone when there is none any more.
    whole = [uri for uri in inside if _is_container(uri)]
    images = [uri for uri in inside if not _is_container(uri)]
    return pa.array([*whole, *(uri for uri, exists in _existing(images, store) if not exists)], pa.string())


def _is_container(uri: str) -> bool:
    return is_archive(uri) or parquet.is_parquet(uri)


def _existing(uris: Sequence[str], store: Store) -> Iterator[tuple[str, bool]]:
    """Whether the image of each URI exists: a file may be left out for its name, and still be there."""
    rows = list_uris(uris, store=store).select(["uri", "packing", "status"]).to_pylist()
    look_up = functools.partial(_is_there, store=store)
    seen = map_in_threads(look_up, rows, threads=LOOK_UP_THREADS, ahead=LOOK_UP_AHEAD)
    return ((row["uri"], is_there) for row, is_there in zip(rows, seen, strict=True))


def _is_there(row: Mapping[str, str | None], *, store: Store) -> bool:
    if row["packing"] or (row["status"] and row["status"] != "missing"):
        return True
    try:  # A member that is missing may be a file of that name.
        return bool(store.entry_of(str(row["uri"])))
    except FileNotFoundError:
        return False
    except PermissionError:
        return True


def _is_new(listed: pa.Table, known: pa.Table) -> pa.ChunkedArray:
    """Which rows are not in the table, or have another etag or size there."""
    places = pc.index_in(listed["uri"], value_set=known["uri"])
    same_etag, same_size = (_equal(listed[name], known[name].take(places)) for name in ("etag", "size_bytes"))
    # the size of an image in a container may be known only by reading it, and the etag is that of the container
    same_size = pc.or_(same_size, pc.is_valid(listed["archive"]))
    return pc.invert(pc.and_(pc.is_valid(places), pc.and_(same_etag, same_size)))


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether values are equal, or both unknown."""
    both_null = pc.and_(pc.is_null(left), pc.is_null(right))
    return pc.or_(both_null, pc.fill_null(pc.equal(left, right), False))


def _bad_rows(job: ScoreJob, output: Output, store: Store, *, number: int) -> Selection:
    """Lists the bad rows again, with their carried columns.

    Of a whole archive or Parquet file, whose row names its problem, what the table does not have yet is scored, too.
    Its row is dropped if there is no problem any more.
    """
    names = ["uri", "status", *job.inputs.carry]
    batches = [
        batch.filter(pc.invert(pc.is_in(batch["status"], value_set=pa.array(NOT_BAD))))
        for batch in iter_predictions(output.uri, columns=names, store=output.store)
    ]
    bad = pa.Table.from_batches(batches).drop_columns(["status"])
    if not len(bad):
        return Selection(None, COLUMNS.empty_table())
    uris = bad["uri"].to_pylist()
    if any(map(is_web, uris)):  # They are shown without signatures, which the inputs have.
        listing = list_inputs(job.inputs, reserved=RESERVED, store=store)
    else:
        listing = _listed_again(bad, job.inputs, store)
    table, whole = listing.table, pa.array(filter(_is_container, uris), pa.string())
    is_bad = pc.is_in(table["uri"], value_set=bad["uri"])
    inside = table.filter(pc.is_in(table["archive"], value_set=whole))
    is_new = pc.is_in(table["uri"], value_set=_included(new_rows(inside, output, number=number), job.inputs)["uri"])
    was_other = pc.is_in(table["uri"], value_set=_other_files(output, number=number))
    table = image_table.with_others(table, pc.if_else(is_bad, was_other, table[OTHER_FILE]))
    opened = whole.filter(pc.is_in(whole, value_set=table["archive"]))
    return Selection(
        listing,
        table.filter(pc.or_(is_bad, is_new)),
        opened.filter(pc.invert(pc.is_in(opened, value_set=table["uri"]))),
    )


def _listed_again(bad: pa.Table, inputs: InputConfig, store: Store) -> Listing:
    """The listing of rows of a table, by their URIs."""
    with tempfile.TemporaryDirectory(prefix="mnist_dist-") as folder:
        path = Path(folder) / "bad.parquet"
        pq.write_table(bad, path)
        again = InputConfig(
            input=(str(path),), carry=inputs.carry, image_column=inputs.image_column, all_files=inputs.all_files
        )
        return list_inputs(again, store=store)


def _included(rows: pa.Table, inputs: InputConfig) -> pa.Table:
    """The images in containers that include and exclude accept; of Parquet files these choose whole ones."""
    choice, pairs = Choice.of(inputs), zip(rows["uri"].to_pylist(), rows["archive"].to_pylist(), strict=True)
    kept = [parquet.is_parquet(archive) or choice.matches(uri, member_name(uri, archive)) for uri, archive in pairs]
    return rows.filter(pa.array(kept, pa.bool_()))


def _other_files(output: Output, *, number: int) -> pa.ChunkedArray:
    """The URIs in the table of files that do not claim to be images."""
    with output.store.open_binary(output.version_uri(number, MANIFEST)) as file, pq.ParquetFile(file) as manifest:
        known = widened(manifest.read(), LISTED)
    return known["uri"].filter(pc.fill_null(known[OTHER_FILE], False))
