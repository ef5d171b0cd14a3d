"""Publishes finished shards as the prediction table, in steps that can be repeated.

Owns: the order in which the table changes. Does not own: the folder (`generations`), the files (`parts`), or the lock,
which the caller holds.

1. The new files are built beside the table, under names with the number of the driver's lock.
2. `commit.json` is put if it is absent: the decision. Whoever comes next finishes this one, whichever driver made it.
3. The copies of the old mark are deleted, and the files are moved into their places. A Delta table gets a transaction.
4. `mark.json` of the new version is put if it is absent. From here on, this is the table.
5. Sweeping deletes what the mark does not name and writes the copies.

A driver that dies leaves either the old table, or a `commit.json` from which the next driver resumes (`replay`). A
driver that was suspended anywhere in between and wakes up when another has taken over finds its files gone, or repeats
a step of a decision that is published already, or puts a mark with a lower number: the newest table stays as it is.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace

import pyarrow as pa
import pyarrow.parquet as pq

from mnist_dist import documents
from mnist_dist.errors import MnistDistError
from mnist_dist.score_config import MAX_ROWS_PER_FILE, TableFormat
from mnist_dist.scoring.delta import DeltaLog, Part, delta_schema
from mnist_dist.scoring.generations import (
    MANIFEST,
    SUMMARY,
    Committed,
    Description,
    Generation,
    Origin,
    Output,
    Summary,
)
from mnist_dist.scoring.parts import PART_BYTES, Building
from mnist_dist.scoring.predictions import MARK, METADATA_KEY, Mark, read_mark, schema_of
from mnist_dist.store.base import Store
from mnist_dist.store.uris import join

THREADS = 8  # They move files; on object stores a request mostly waits.


@dataclass(frozen=True, kw_only=True)
class _Decision:
    """The contents of `commit.json`: everything that is needed to finish the commit."""

    add: tuple[str, ...]
    mark: Mark
    summary: Summary


def commit(
    output: Output,
    generation: Generation,
    *,
    fence: int,
    shards: int,
    schema: pa.Schema,
    judge: Callable[[Mapping[str, int], int], bool],
    description: Description,
    images_per_s: float | None,
    check: Callable[[], None],
    progress: Callable[[int, int], None],
    table_format: TableFormat = "parquet",
    part_bytes: int = PART_BYTES,
    part_rows: int = MAX_ROWS_PER_FILE,
) -> Committed:
    """Publishes the table of a generation whose shards are all done; a commit that has begun is finished.

    Args:
        output: the folder of the table.
        generation: the generation whose shards become rows.
        fence: number of the lock, which names the new version of the table.
        shards: the number of its shards.
        schema: the schema of the table.
        judge: takes the rows by status and the total number of rows; returns whether the table is good enough.
        description: describes the model, in the summary and in the metadata of each Parquet file.
        images_per_s: speed of scoring this generation, for the summary.
        check: raises LockLost when another driver has taken over the lock.
        progress: called with the number of finished shards and the number of all shards.
        table_format: the form of the table; all versions of a table have the same.
        part_bytes: approximate size of a file of the table.
        part_rows: largest number of rows in a file of the table.

    Raises:
        MnistDistError: a shard does not hold the rows of its manifest.
        ConfigError: rows of the old table are kept, but it has other columns.
        LockLost: see `check`.
        DataError, PermissionError, ServiceError, StorageError: the storage or the old table cannot be used.
    """
    if not generation.is_committing:
        written = delta_schema(schema) if table_format == "delta" else schema
        building = Building(
            output,
            generation,
            fence=fence,
            schema=schema,
            written=written.with_metadata(table_metadata(description, generation.plan)),
            part_bytes=part_bytes,
            part_rows=part_rows,
        )
        table = building.build(shards=shards, keep_old=generation.plan.keep_old, progress=progress)
        counts, plan = table.counts(), generation.plan
        decision = _Decision(
            add=tuple(table.added),
            mark=Mark(
                number=fence,
                files=tuple(table.files),
                rows=table.rows,
                model_id=plan.model_id,
                failed=not judge(counts, table.rows),
                table_format=table_format,
            ),
            summary=Summary(
                **{field.name: getattr(plan, field.name) for field in fields(Origin)},
                described=description,
                images_per_s=images_per_s,
                number=fence,
                rows=table.rows,
                files=tuple(table.files),
                statuses=counts,
                examples=table.examples,
            ),
        )
        check()
        output.store.create_bytes(generation.commit_uri, documents.encode(decision))
    return replay(output, generation, check=check)


def table_metadata(description: Description, origin: Origin) -> dict[str, str]:
    """Describes the table in the metadata of each of its Parquet files, as JSON under the key `mnist_dist`."""
    of_origin = {name: getattr(origin, name) for name in ("model_id", "engine", "precision")}
    return {METADATA_KEY: json.dumps({**asdict(description), **of_origin})}


def replay(output: Output, generation: Generation, *, check: Callable[[], None]) -> Committed:
    """Finishes a commit, however far it got; it no longer needs the old table.

    Raises:
        MnistDistError: a file that is to be published is gone, or a later version was published.
        LockLost: see `check`.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    check()
    decision = documents.read(output.store, generation.commit_uri, _Decision)
    committed = Committed(mark=decision.mark, summary=decision.summary)
    mark = read_mark(output.uri, store=output.store)
    if mark is None or mark.number < decision.mark.number:
        _publish(output, generation, decision, check=check)
    elif mark != decision.mark:  # otherwise only sweeping is left
        check()
        raise MnistDistError(
            f"version {mark.number} of the table is published, so version {decision.mark.number} cannot be; delete "
            f"this folder to give it up: {generation.uri}"
        )
    check()
    output.sweep_after(committed)
    return committed


def resume(
    output: Output,
    *,
    fence: int,
    is_mine: Callable[[Generation], bool],
    complete: Callable[[Generation], Committed],
    check: Callable[[], None],
) -> Committed | None:
    """Sweeps what killed drivers left in an output, then finishes the work that was begun there.

    Returns the table if this job's own generation was committed, else None.

    A commit that has begun is replayed, whichever job began it, because the table before it is gone. An unfinished
    generation is completed if it belongs to this job, and discarded if it belongs to another.

    Args:
        output: the output; the caller holds its lock.
        fence: number of the lock.
        is_mine: whether a generation belongs to this job; raises if it belongs to another and must be kept.
        complete: scores the remaining shards of a generation, and commits it.
        check: raises LockLost when another driver has taken over the lock.
    """
    output.sweep(fence=fence)
    unfinished = output.unfinished()
    if unfinished is None:
        return None
    is_own = is_mine(unfinished)
    if is_own or unfinished.is_committing:
        unfinished.claim(fence=fence)
        check()
    if unfinished.is_committing:
        committed = replay(output, unfinished, check=check)
        return committed if is_own else None
    if is_own:
        return complete(unfinished)
    check()
    output.discard(unfinished, fence=fence)
    return None


def rejudge(output: Output, committed: Committed, *, fence: int, ok: bool, check: Callable[[], None]) -> Committed:
    """Marks a table as good or failed without scoring: a new version with the same files.

    Args:
        output: the output; the caller holds its lock.
        committed: its table, whose summary must exist.
        fence: number of the lock.
        ok: whether the table is good.
        check: raises LockLost when another driver has taken over the lock.
    """
    manifest = output.version_uri(committed.mark.number, MANIFEST)
    output.store.write_bytes(output.version_uri(fence, MANIFEST), output.store.read_bytes(manifest))
    rejudged = Committed(
        mark=replace(committed.mark, number=fence, failed=not ok),
        summary=committed.summary and replace(committed.summary, number=fence),
    )
    check()
    _put_version(output, rejudged)
    check()
    output.sweep_after(rejudged)
    return rejudged


def _publish(output: Output, generation: Generation, decision: _Decision, *, check: Callable[[], None]) -> None:
    output.delete_copies()
    mark, number = decision.mark, decision.mark.number
    targets = {name: output.part_uri(mark, name) for name in decision.add}
    targets[MANIFEST] = output.version_uri(number, MANIFEST)
    _move_all(targets, generation.out_uri(number), output.store)
    check()
    if mark.table_format == "delta":
        _publish_delta(output, mark)
    _put_version(output, Committed(mark=mark, summary=decision.summary))


def _publish_delta(output: Output, mark: Mark) -> None:
    """Makes the files of a version the Delta table, for its readers."""
    with output.store.open_binary(output.version_uri(mark.number, MANIFEST)) as file, pq.ParquetFile(file) as manifest:
        parts = [_part(name, manifest.metadata.row_group(group)) for group, name in enumerate(mark.files)]
    schema = schema_of(output.uri, mark, store=output.store)
    DeltaLog(join(output.uri, mark.folder), output.store).publish(parts, schema=schema, number=mark.number)


def _part(name: str, listed: pq.RowGroupMetaData) -> Part:
    """A file, by the statistics of the group of rows that lists it."""
    uris = listed.column(0).statistics if listed.num_rows else None
    limits = (uris.min, uris.max) if uris is not None and uris.has_min_max else (None, None)
    return Part(name=name, rows=listed.num_rows, min_uri=limits[0], max_uri=limits[1])


def _put_version(output: Output, committed: Committed) -> None:
    """Makes a version of the table valid, whose manifest and files are in their places."""
    number = committed.mark.number
    documents.write(output.store, output.version_uri(number, SUMMARY), committed.summary)
    is_new = output.store.create_bytes(output.version_uri(number, MARK), documents.encode(committed.mark))
    if not is_new and documents.read(output.store, output.version_uri(number, MARK), Mark) != committed.mark:
        raise MnistDistError(f"another version {number} of the table is published. Received: {output.uri!r}")


def _move_all(targets: Mapping[str, str], source: str, store: Store) -> None:
    with ThreadPoolExecutor(THREADS) as pool:  # in parallel: readers have no table meanwhile, and S3 has to copy
        moves = [pool.submit(_move, store, join(source, name), target) for name, target in targets.items()]
        for move in moves:
            move.result()


def _move(store: Store, source: str, target: str) -> None:
    try:
        store.move(source, target)
    except FileNotFoundError as err:
        if not store.exists(target):
            raise MnistDistError(f"a file that is to be published is neither at {source} nor at {target}") from err
