"""Publishes finished shards as the prediction table, in steps that can be repeated.

Owns: the order in which the table changes. Does not own: the folder (`generations`), the files (`parts`), or the lock,
which the caller holds.

A driver that dies leaves either the old table, or a `commit.json` from which the next driver resumes (`replay`).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace

import pyarrow as pa

from mnist_dist import documents
from mnist_dist.errors import MnistDistError
from mnist_dist.scoring.generations import (
    MANIFEST,
    PART,
    SUMMARY,
    Committed,
    Description,
    Generation,
    Origin,
    Output,
    Summary,
)
from mnist_dist.scoring.parts import PART_BYTES, Building
from mnist_dist.scoring.predictions import (
    FAILED,
    METADATA_KEY,
    SUCCESS,
    Mark,
    read_mark,
)
from mnist_dist.store.base import Store
from mnist_dist.store.uris import join

THREADS = 8  # They move files; on object stores a request mostly waits.
_LEFT_BY_KILLED = re.compile(rf"\.({SUCCESS}|{FAILED}|{re.escape(SUMMARY)})\.[0-9a-f]+\.tmp")


@dataclass(frozen=True, kw_only=True)
class _Decision:
    """The contents of `commit.json`: everything that is needed to finish the commit."""

    add: tuple[str, ...]
    remove: tuple[str, ...]
    mark: Mark
    summary: Summary


def commit(
    output: Output,
    generation: Generation,
    *,
    shards: int,
    schema: pa.Schema,
    judge: Callable[[Mapping[str, int], int], bool],
    description: Description,
    images_per_s: float | None,
    check: Callable[[], None],
    progress: Callable[[int, int], None],
    part_bytes: int = PART_BYTES,
) -> Committed:
    """Publishes the table of a generation whose shards are all done; a commit that has begun is finished.

    Args:
        output: the folder of the table.
        generation: the generation whose shards become rows.
        shards: the number of its shards.
        schema: the schema of the table.
        judge: takes the rows by status and the total number of rows; returns whether the table is good enough.
        description: describes the model, in the summary and in the metadata of each Parquet file.
        images_per_s: speed of scoring this generation, for the summary.
        check: raises Locked when another driver has taken over the lock.
        progress: called with the number of finished shards and the number of all shards.
        part_bytes: approximate size of a file of the table.

    Raises:
        MnistDistError: a shard does not hold the rows of its manifest.
        ConfigError: rows of the old table are kept, but it has other columns.
        Locked: see `check`.
        DataError, PermissionError, ServiceError, StorageError: the storage or the old table cannot be used.
    """
    if not generation.is_committing:
        check()  # building deletes the files of an earlier attempt, which must not be another driver's
        described = schema.with_metadata(table_metadata(description, generation.plan))
        building = Building(output, generation, schema=described, part_bytes=part_bytes)
        table = building.build(shards=shards, keep_old=generation.plan.keep_old, progress=progress)
        counts = table.counts()
        plan, files = generation.plan, tuple(table.files)
        decision = _Decision(
            add=tuple(table.added),
            remove=tuple(table.removed),
            mark=Mark(
                generation=generation.number,
                files=files,
                rows=table.rows,
                model_id=plan.model_id,
                failed=not judge(counts, table.rows),
            ),
            summary=Summary(
                **{field.name: getattr(plan, field.name) for field in fields(Origin)},
                described=description,
                images_per_s=images_per_s,
                generation=generation.number,
                rows=table.rows,
                files=files,
                statuses=counts,
                examples=table.examples,
            ),
        )
        check()
        documents.write(output.store, generation.commit_uri, decision)
    return replay(output, generation, check=check)


def table_metadata(description: Description, origin: Origin) -> dict[str, str]:
    """Describes the table in the metadata of each of its Parquet files, as JSON under the key `mnist_dist`."""
    of_origin = {name: getattr(origin, name) for name in ("model_id", "engine", "precision")}
    return {METADATA_KEY: json.dumps({**asdict(description), **of_origin})}


def replay(output: Output, generation: Generation, *, check: Callable[[], None]) -> Committed:
    """Finishes a commit, however far it got; it no longer needs the old table.

    Raises:
        MnistDistError: a file that is to be published is gone.
        Locked: see `check`.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    decision = documents.read(output.store, generation.commit_uri, _Decision)
    mark = read_mark(output.uri, store=output.store)
    if mark is None or mark.generation != decision.mark.generation:  # otherwise only sweeping is left
        _publish(output, generation, decision, check=check)
    output.sweep_published()
    return Committed(mark=decision.mark, summary=decision.summary)


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What `resume` did with unfinished work in an output."""

    committed: Committed | None = None
    """The table, if this job's own generation was committed."""
    discarded: int = 0
    """Number of another job's generation that was deleted, whose workers may still write; 0: none."""


def resume(
    output: Output,
    *,
    is_mine: Callable[[Generation], bool],
    complete: Callable[[Generation], Committed],
    check: Callable[[], None],
) -> Resumed:
    """Sweeps what killed drivers left in an output, then finishes the work that was begun there.

    A commit that has begun is replayed, whichever job began it, because the table before it is gone. An unfinished
    generation is completed if it belongs to this job, and discarded if it belongs to another.

    Args:
        output: the output; the caller holds its lock.
        is_mine: whether a generation belongs to this job; raises if it belongs to another and must be kept.
        complete: scores the remaining shards of a generation, and commits it.
        check: raises Locked when another driver has taken over the lock.
    """
    output.sweep()
    unfinished = output.unfinished()
    if unfinished is None:
        return Resumed()
    is_own = is_mine(unfinished)
    if unfinished.is_committing:
        committed = replay(output, unfinished, check=check)
        return Resumed(committed=committed if is_own else None)
    if is_own:
        return Resumed(committed=complete(unfinished))
    check()
    output.discard(unfinished)
    return Resumed(discarded=unfinished.number)


def rejudge(output: Output, committed: Committed, *, ok: bool) -> Committed:
    """Marks a table as good or failed without scoring. Can be repeated after it was killed midway."""
    mark = replace(committed.mark, failed=not ok)
    mark.write(output.uri, store=output.store)  # before the other mark is deleted: a table without a mark is lost
    output.store.delete(join(output.uri, SUCCESS if mark.failed else FAILED))
    return replace(committed, mark=mark)


def _publish(output: Output, generation: Generation, decision: _Decision, *, check: Callable[[], None]) -> None:
    check()
    for name in (SUCCESS, FAILED):  # readers see no table until the new mark is written
        output.store.delete(join(output.uri, name))
    targets = {name: output.part_uri(name) for name in decision.add} | {MANIFEST: join(output.uri, MANIFEST)}
    _move_all(targets, generation.out_uri, output.store)
    for uri in sorted({*map(output.part_uri, decision.remove), *_orphans(output, decision)}):
        output.store.delete(uri)
    documents.write(output.store, join(output.uri, SUMMARY), decision.summary)
    check()
    decision.mark.write(output.uri, store=output.store)


def _orphans(output: Output, decision: _Decision) -> Iterator[str]:
    """Files that no table names: of generations whose `_work` was deleted, and of writes that were killed."""
    for name in output.names():
        match = PART.fullmatch(name)
        is_part = match is not None and int(match[1]) <= decision.mark.generation
        is_named = name.rpartition("/")[2] in decision.mark.files
        if (is_part and not is_named) or _LEFT_BY_KILLED.fullmatch(name):
            yield join(output.uri, name)


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
