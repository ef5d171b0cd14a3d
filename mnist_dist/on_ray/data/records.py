"""Decodes the images of a source once, spread over the cluster, into the record cache."""

import numpy as np
import pyarrow as pa

from mnist_dist.data.markers import Attempt
from mnist_dist.data.records import RecordPlan, decode_shard, finish
from mnist_dist.on_ray.shard_runner import Counter, ShardWork, run_shards
from mnist_dist.session import Session
from mnist_dist.sources.source import Source
from mnist_dist.store.base import Store

MAX_DEATHS = 3
"""How often a process may die on the same shard (out of memory, or with its node) before the job fails."""


def decode_missing(plan: RecordPlan, source: Source, session: Session) -> float:
    """Decodes the shards that are still missing and finishes the cache; gives the core-seconds that it took.

    Args:
        plan: from `plan_records`.
        source: the source that was planned.
        session: of the job; finished shards stay finished.

    Raises:
        Interrupted: SIGINT or SIGTERM.
        ServiceError: the storage failed, not an image.
        WorkersFailed: processes died more than `MAX_DEATHS` times on the same shard.
    """
    cache, core_s = plan.cache, 0.0
    if cache.is_finished():
        return core_s
    shards = [] if source.pixels is not None else cache.missing()
    if shards:
        work = ShardWork(
            worker=DecodingWorker(plan, source.store),
            done=lambda: set(range(cache.shards)) - set(cache.missing()),
            folder=cache.root,
            max_deaths=MAX_DEATHS,
            given=lambda shard: _rows(source, cache.rows_of(shard)),
        )
        left = sum(len(range(cache.rows)[cache.rows_of(shard)]) for shard in shards)
        ran = run_shards(work, shards, session, title="decoding", done=cache.rows - left, total=cache.rows)
        core_s = sum(report.ended_at - report.began_at for report in ran.reports)
    finish(plan, source)
    return core_s


class DecodingWorker:
    """Decodes shards of records."""

    title = "decoding"

    def __init__(self, plan: RecordPlan, store: Store) -> None:
        self._plan, self._store = plan, store

    def open(self) -> None:
        """Needs nothing: each shard gets its own threads."""

    def work(self, shard: int, given: pa.Table, *, attempt: Attempt, counter: Counter) -> None:
        """Decodes a shard, whose rows are `given`; in a child process if it seems to kill processes."""
        decode_shard(self._plan, shard, given, isolated=attempt.is_suspect, store=self._store)
        counter.add(len(given), 0)


def _rows(source: Source, rows: slice) -> pa.Table:
    """A copy: a slice would travel with the whole table."""
    return source.table.slice(rows.start, rows.stop - rows.start).take(np.arange(rows.stop - rows.start))
