"""Decoding a source's images once, spread over the cluster by Ray Data, into the record cache."""

import pickle
from typing import Any

import ray

from mnist_dist.console import Bar, Stop
from mnist_dist.data.records import RecordPlan, decode_block, finish, finished, missing_blocks
from mnist_dist.data.sources import Source
from mnist_dist.errors import MnistDistError


def decode_missing(plan: RecordPlan, source: Source, *, bar: Bar, stop: Stop) -> None:
    """Decodes the blocks that no earlier run has finished, and closes the cache.

    Args:
        plan: of `plan_records`.
        source: what the plan was made of.
        bar: shows the blocks done.
        stop: is looked at between blocks; those that are done stay done.

    Raises:
        Interrupted: a signal came.
        ServiceError: the storage failed, not an image.
    """
    if finished(plan):
        return
    blocks = [] if source.pixels is not None else missing_blocks(plan)
    if blocks:
        uris = source.table["uri"].to_pylist()
        items = [{"block": block, "uris": _uris_of(plan, uris, block)} for block in blocks]
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        decoded = dataset.map(lambda item: _decode(plan, item)).iter_batches(batch_size=1, prefetch_batches=0)
        for done, batch in enumerate(decoded, start=1):
            stop.check()
            if batch["error"][0]:
                raise pickle.loads(batch["error"][0])
            bar.update(done=done, total=len(blocks), note=f"{done} of {len(blocks)} blocks")
    try:
        finish(plan, source)
    except FileNotFoundError:  # another run finished the same images meanwhile, and cleared the blocks away
        if not finished(plan):
            raise


def _uris_of(plan: RecordPlan, uris: list[str], block: int) -> list[str]:
    return uris[block * plan.block_size : (block + 1) * plan.block_size]


def _decode(plan: RecordPlan, item: dict[str, Any]) -> dict[str, Any]:
    """Decodes a block; an error that was foreseen is returned, since Ray Data loses the type of one that is raised."""
    error = b""
    try:
        decode_block(plan, int(item["block"]), list(item["uris"]))
    except (MnistDistError, OSError) as failure:
        error = pickle.dumps(failure)
    return {"block": item["block"], "error": error}
