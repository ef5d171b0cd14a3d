"""Decoding a source's images once, spread over the cluster, into the record cache."""

from typing import Any

from mnist_dist.data.markers import Attempt
from mnist_dist.data.records import RecordPlan, decode_block, finish, finished, missing_blocks
from mnist_dist.data.sources import Source
from mnist_dist.on_ray.shard_runner import Counter, ShardWork, run_shards
from mnist_dist.session import Session

MAX_DEATHS = 3
"""Of a process over the same block: out of memory, or with its node."""


def decode_missing(plan: RecordPlan, source: Source, session: Session) -> None:
    """Decodes the blocks that no earlier run has finished, and closes the cache.

    Args:
        plan: of `plan_records`.
        source: what the plan was made of.
        session: of the job; blocks that are done stay done.

    Raises:
        Interrupted: a signal came.
        ServiceError: the storage failed, not an image.
        WorkersFailed: processes died again and again over the same block.
    """
    if finished(plan):
        return
    blocks = [] if source.pixels is not None else missing_blocks(plan)
    if blocks:
        uris = source.table["uri"].to_pylist()
        work = ShardWork(
            worker=DecodingWorker(plan),
            done=lambda: set(range(plan.blocks)) - set(missing_blocks(plan)),
            folder=plan.root,
            max_deaths=MAX_DEATHS,
            given=lambda block: uris[plan.block_rows(block)],
        )
        left = sum(len(range(plan.count)[plan.block_rows(block)]) for block in blocks)
        run_shards(work, blocks, session, title="decoding", done=plan.count - left, total=plan.count)
    try:
        finish(plan, source)
    except FileNotFoundError:  # another run finished the same images meanwhile, and cleared the blocks away
        if not finished(plan):
            raise


class DecodingWorker:
    """Decodes blocks of records."""

    title = "decoding"

    def __init__(self, plan: RecordPlan) -> None:
        self._plan = plan

    def open(self) -> None:
        """Nothing."""

    def work(self, shard: int, given: Any, *, attempt: Attempt, counter: Counter) -> None:
        """Decodes the block of the URIs that are given."""
        decode_block(self._plan, shard, given)
        counter.add(len(given), 0)
