"""How finished shards become the prediction table: publishing in steps that can be repeated.

Owns: the order in which the table changes. Does not own: the folder (`generations`), the files (`parts`), or the lock,
which whoever calls this holds.

Any driver that dies leaves either the old table, or a `commit.json` from which the next one goes on (`replay`).
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

THREADS = 8  # that move files: on object stores a request waits far longer than it works
_LEFT_BY_KILLED = re.compile(rf"\.({SUCCESS}|{FAILED}|{re.escape(SUMMARY)})\.[0-9a-f]+\.tmp")


@dataclass(frozen=True, kw_only=True)
class _Decision:
    """What `commit.json` holds: all that is still to be done needs nothing else."""

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
    """Makes the table of a generation all of whose shards are done; one that was begun is brought to its end.

    Args:
        output: where the table lies.
        generation: whose shards become rows.
        shards: how many it has.
        schema: of the table.
        judge: whether the table is good enough, of the rows by status and all rows.
        description: of the model; it goes into the summary, and into the metadata of each Parquet file.
        images_per_s: of the generation's scoring, for the summary.
        check: raises Locked when another driver has taken over.
        progress: is told how many shards are through, and of how many.
        part_bytes: about how large a file becomes.

    Raises:
        MnistDistError: a shard does not hold the rows of its manifest.
        ConfigError: the old table, of which rows stay, has other columns.
        Locked: see `check`.
        DataError, PermissionError, ServiceError, StorageError: the storage, or the old table, cannot be used.
    """
    if not generation.is_committing:
        check()  # what an earlier try has built is cleared away, and must not be another driver's
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
    """What the metadata of each Parquet file says, as JSON under the key `mnist_dist`."""
    of_origin = {name: getattr(origin, name) for name in ("model_id", "engine", "precision")}
    return {METADATA_KEY: json.dumps({**asdict(description), **of_origin})}


def replay(output: Output, generation: Generation, *, check: Callable[[], None]) -> Committed:
    """Brings a commit to its end, however far it went; nothing of the old table is needed any more.

    Raises:
        MnistDistError: a file that was to be published is gone.
        Locked: see `check`.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    decision = documents.read(output.store, generation.commit_uri, _Decision)
    mark = read_mark(output.uri, store=output.store)
    if mark is None or mark.generation != decision.mark.generation:  # else all that is left is to sweep
        _publish(output, generation, decision, check=check)
    output.sweep_published()
    return Committed(mark=decision.mark, summary=decision.summary)


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What became of work that was begun in an output."""

    committed: Committed | None = None
    """The table of this job's own generation."""
    discarded: int = 0
    """Number of another job's generation that was thrown away: its workers may still write."""


def resume(
    output: Output,
    *,
    is_mine: Callable[[Generation], bool],
    complete: Callable[[Generation], Committed],
    check: Callable[[], None],
) -> Resumed:
    """Brings to its end what was begun in an output, after what killed drivers left there was swept away.

    A commit that was begun is replayed, whosever it is, since the table before it is gone. An unfinished generation of
    this job is completed, one of another job is discarded.

    Args:
        output: whose lock the caller holds.
        is_mine: whether a generation is this job's; raises where another's must not be thrown away.
        complete: scores what is left of a generation, and commits it.
        check: raises Locked when another driver has taken over.
    """
    output.sweep()
    unfinished = output.unfinished()
    if unfinished is None:
        return Resumed()
    mine = is_mine(unfinished)
    if unfinished.is_committing:
        committed = replay(output, unfinished, check=check)
        return Resumed(committed=committed if mine else None)
    if mine:
        return Resumed(committed=complete(unfinished))
    check()
    output.discard(unfinished)
    return Resumed(discarded=unfinished.number)


def rejudge(output: Output, committed: Committed, *, ok: bool) -> Committed:
    """Marks a table as good or failed without scoring anything; called again where it was killed midway."""
    mark = replace(committed.mark, failed=not ok)
    mark.write(output.uri, store=output.store)  # before the other one goes: a table without a mark would be lost
    output.store.delete(join(output.uri, SUCCESS if mark.failed else FAILED))
    return replace(committed, mark=mark)


def _publish(output: Output, generation: Generation, decision: _Decision, *, check: Callable[[], None]) -> None:
    check()
    for name in (SUCCESS, FAILED):  # from here on there is no table, until the mark is put again
        output.store.delete(join(output.uri, name))
    targets = {name: output.part_uri(name) for name in decision.add} | {MANIFEST: join(output.uri, MANIFEST)}
    _move_all(targets, generation.out_uri, output.store)
    for uri in sorted({*map(output.part_uri, decision.remove), *_orphans(output, decision)}):
        output.store.delete(uri)
    documents.write(output.store, join(output.uri, SUMMARY), decision.summary)
    check()
    decision.mark.write(output.uri, store=output.store)


def _orphans(output: Output, decision: _Decision) -> Iterator[str]:
    """What no table names: of generations whose `_work` somebody deleted, and of writes that were killed."""
    for name in output.names():
        match = PART.fullmatch(name)
        is_part = match is not None and int(match[1]) <= decision.mark.generation
        is_named = name.rpartition("/")[2] in decision.mark.files
        if (is_part and not is_named) or _LEFT_BY_KILLED.fullmatch(name):
            yield join(output.uri, name)


def _move_all(targets: Mapping[str, str], source: str, store: Store) -> None:
    with ThreadPoolExecutor(THREADS) as pool:  # readers have no table meanwhile, and S3 has to copy
        moves = [pool.submit(_move, store, join(source, name), target) for name, target in targets.items()]
        for move in moves:
            move.result()


def _move(store: Store, source: str, target: str) -> None:
    try:
        store.move(source, target)
    except FileNotFoundError as err:
        if not store.exists(target):
            raise MnistDistError(f"a file that was to be published is neither at {source} nor at {target}") from err
