"""How long each stage of a scoring job was busy, computed from the reports of the workers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mnist_dist.data.decoding import Threads, Times
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.cluster import Resources
from mnist_dist.scoring.planning import Means, busy_s

if TYPE_CHECKING:
    from mnist_dist.on_ray.shard_runner import ShardReport  # loads Ray Data, which the driver imports while Ray starts


def means_of(actors: Actors, have: Resources) -> Means:
    """The part of the cluster that a job uses. Actors decode in their threads, or in tasks on all other whole cores."""
    cores = max(1, int(actors.cpus))
    processes, decoding = actors.count, cores
    if actors.decode_in_tasks:
        processes, decoding = max(1, int(have.cpus - actors.count * actors.cpus)), 1
    return Means(
        actors=actors.count,
        units=actors.gpus or cores,
        decode_cores=processes * decoding,
        reading_threads=processes * (decoding + Threads(decoding=decoding).reading),
    )


def total_times(reports: "Sequence[ShardReport[Times]]") -> Times:
    """The times of all processes together."""
    newest = {report.process: report.content for report in reports}  # the times of a process are totals since its start
    return sum(newest.values(), start=Times())


def slowest_stage(reports: "Sequence[ShardReport[Times]]", means: Means, *, seconds: float) -> str:
    """The stage that was busy most of the time, over all actors."""
    busy = busy_s(total_times(reports), means)
    stage = max(busy, key=lambda stage: busy[stage])
    return f"{stage} (busy {min(1.0, busy[stage] / seconds):.0%} of the time)"
