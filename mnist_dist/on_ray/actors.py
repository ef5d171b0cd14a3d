"""The number and size of the actors in which a job runs a model.

Does not own the cluster's resources (`cluster`). Does not import Ray Data, which takes half a second.
"""

from dataclasses import dataclass

from mnist_dist.errors import ResourceError
from mnist_dist.on_ray.cluster import Resources, await_nodes, share
from mnist_dist.score_config import ScoreRunConfig
from mnist_dist.session import Session

MAX_CPUS = 0.9  # The largest actors are taken that use this share of the CPUs which the best size would use.


@dataclass(frozen=True, kw_only=True)
class Actors:
    """The actors of a job."""

    count: int
    cpus: float
    """CPUs of each."""
    gpus: float
    """GPUs of each."""
    decode_in_tasks: bool

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        decoding = "images decoded in CPU tasks" if self.decode_in_tasks else "images decoded in its threads"
        return f"{self.count} actor(s) of {self.cpus:g} CPU{gpus}, {decoding}"


def choose_actors(have: Resources, run: ScoreRunConfig, *, most: int | None = None) -> Actors:
    """Chooses one actor per GPU; without GPUs, the fewest and largest actors that use most of the CPUs.

    Args:
        have: the cluster's resources.
        run: the requested resources.
        most: the number of actors that have work to do; no more are chosen unasked. None: not known yet.

    Raises:
        ResourceError: the requested actors do not fit.
    """
    gpus = run.gpus_per_actor if run.gpus_per_actor is not None else float(have.gpus > 0)
    in_tasks = run.decode == "tasks" or (run.decode == "auto" and gpus > 0)
    count, cpus = run.actors, run.cpus_per_actor
    if gpus:
        room = sum(int(of_node / gpus + 1e-9) for _, of_node in have.by_node)
        count = count or max(1, min(room, most or room))
        if count > room:
            raise ResourceError(
                f"{count} actor(s) of {gpus:g} GPU each do not fit; the cluster has {have}. "
                f"Received: gpus_per_actor={gpus:g}"
            )
        cpus = min(1.0, have.cpus / count / 2) if cpus is None and in_tasks else cpus  # Tasks decode on the other CPUs.
    elif count is None:
        cpus = cpus or _best_size(have)
        count = max(1, min(have.room(cpus), most or 2**30))
        cpus = max(1.0, cpus // 2) if in_tasks and run.cpus_per_actor is None else cpus
    actor = share(have, workers=count, cpus_per_worker=cpus, gpu=gpus >= 1, what="actor")
    if in_tasks and max(_left_cpus(have, count, cpus=actor.cpus, gpus=gpus)) < 1:
        if run.decode == "tasks":
            raise ResourceError(
                f"each decoding task needs a whole CPU besides {count} actor(s) of {actor.cpus:g} CPU; the cluster "
                f"has {have}. Received: decode='tasks'"
            )
        in_tasks = False
    return Actors(count=count, cpus=actor.cpus, gpus=gpus, decode_in_tasks=in_tasks)


def await_actors(have: Resources, run: ScoreRunConfig, session: Session) -> Resources:
    """Waits for room for the requested actors; see `await_nodes`."""
    return await_nodes(
        have,
        session,
        count=run.actors or 1,
        cpus=run.cpus_per_actor or 1.0,
        gpus=run.gpus_per_actor or 0.0,
        wait_s=run.wait_for_nodes_s,
    )


def _best_size(have: Resources) -> float:
    """CPUs of an actor: the largest size whose actors use most of the CPUs, since each actor holds a model."""
    sizes = range(1, int(max(cpus for cpus, _ in have.by_node)) + 1)
    used = {size: have.room(size) * size for size in sizes}
    return float(max((size for size in sizes if used[size] >= MAX_CPUS * max(used.values())), default=1))


def _left_cpus(have: Resources, count: int, *, cpus: float, gpus: float) -> list[float]:
    """The CPUs of each node that are left if the actors are packed from the first node on."""
    left = []
    for node_cpus, node_gpus in have.by_node:
        fit = min(int(node_cpus / cpus + 1e-9), int(node_gpus / gpus + 1e-9) if gpus else count, count)
        left.append(node_cpus - fit * cpus)
        count -= fit
    return left
