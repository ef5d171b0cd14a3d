"""actors: what a job takes of a cluster."""

import pytest

from mnist_dist.errors import ResourceError
from mnist_dist.on_ray.actors import choose_actors
from mnist_dist.on_ray.cluster import Resources
from mnist_dist.on_ray.scoring.engine import places
from mnist_dist.score_config import ScoreRunConfig


@pytest.mark.parametrize(
    ("nodes", "run", "most", "count", "cpus", "gpus", "in_tasks"),
    [
        ([(2, 0)], {}, None, 1, 2, 0, False),
        ([(2, 0)], {"actors": 2}, None, 2, 1, 0, False),
        ([(8, 0), (8, 0), (8, 0)], {}, None, 3, 8, 0, False),
        ([(0, 0), (8, 0), (8, 0)], {}, None, 2, 8, 0, False),  # a head that takes no work
        ([(2, 0), *[(16, 0)] * 10], {}, None, 10, 16, 0, False),  # a small head
        ([(16, 0)] * 10, {}, 3, 3, 16, 0, False),  # no more than there are shards
        ([(16, 0)], {"decode": "tasks"}, None, 1, 8, 0, True),
        ([(16, 0)], {"cpus_per_actor": 4}, None, 4, 4, 0, False),
        ([(16, 4), (16, 4)], {}, None, 8, 1, 1, True),
        ([(16, 4), (16, 4)], {}, 2, 2, 1, 1, True),
        ([(16, 4)], {"gpus_per_actor": 0.5}, None, 8, 1, 0.5, True),
        ([(16, 4)], {"decode": "actor"}, None, 4, 4, 1, False),
        ([(16, 4)], {"gpus_per_actor": 0.0}, None, 1, 16, 0, False),
        ([(1, 1)], {}, None, 1, 0.5, 1, False),  # no whole CPU is left for tasks
        ([(1, 1), (1, 1), (1, 1)], {}, None, 3, 0.5, 1, False),  # nor are three halves one
    ],
)
def test_actors_take_max_of_the_cluster(
    nodes: list[tuple[float, float]],
    run: dict[str, object],
    most: int | None,
    count: int,
    cpus: float,
    gpus: float,
    in_tasks: bool,
) -> None:
    actors = choose_actors(Resources(by_node=tuple(nodes)), ScoreRunConfig(**run), most=most)  # type: ignore[arg-type]
    assert (actors.count, actors.cpus, actors.gpus, actors.decode_in_tasks) == (count, cpus, gpus, in_tasks)


@pytest.mark.parametrize(
    ("nodes", "run", "message"),
    [
        ([(4, 0)], {"gpus_per_actor": 1.0}, r"1 actor\(s\) of 1 GPU each do not fit.*0 GPUs"),
        ([(4, 2)], {"actors": 3}, r"3 actor\(s\) of 1 GPU each do not fit.*2 GPUs"),
        ([(4, 0)], {"actors": 5}, r"5 actors of 1 CPU each do not fit.*4 CPUs.*fewer --actors.*Received: actors=5"),
        ([(1, 0)], {"decode": "tasks"}, r"each decoding task needs a whole CPU.*Received: decode='tasks'"),
    ],
)
def test_what_does_not_fit_is_refused(nodes: list[tuple[float, float]], run: dict[str, object], message: str) -> None:
    with pytest.raises(ResourceError, match=message):
        choose_actors(Resources(by_node=tuple(nodes)), ScoreRunConfig(**run))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bundle", "fallback", "expected"),
    [
        ("/runs/bundle", "/table/_engines", ("/runs/bundle.engines", "/table/_engines")),
        ("s3://bucket/runs/bundle", None, ("s3://bucket/runs/bundle.engines",)),
        ("s3://bucket", "/table/_engines", ("/table/_engines",)),  # what stands beside a bucket is somebody else's
        ("s3://bucket", None, ()),
    ],
)
def test_converted_models_lie_beside_the_bundle_or_in_the_output(
    bundle: str, fallback: str | None, expected: tuple[str, ...]
) -> None:
    assert places(bundle, fallback) == expected
