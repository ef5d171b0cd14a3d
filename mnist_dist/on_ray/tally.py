"""How many images of each shard are done, told by the actors while they work and read by the driver.

One small actor that takes no CPU, on the driver's node: it must not be lost with another one. A shard that is begun
again, since its actor died, is counted again from zero.
"""

import contextlib
import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnist_dist.scoring.scorer import Progress

SECONDS_BETWEEN_POSTS = 0.5


class Tally:
    """Numbers of images that are ok and otherwise, of each shard."""

    def __init__(self) -> None:
        self._shards: dict[int, tuple[int, int]] = {}

    def post(self, shards: dict[int, tuple[int, int]]) -> None:
        """Replaces the numbers of some shards."""
        self._shards.update(shards)

    def total(self) -> tuple[int, int]:
        """The sums over all shards."""
        return sum(ok for ok, _ in self._shards.values()), sum(other for _, other in self._shards.values())


def make_tally() -> Any:
    """The handle of a new tally's actor."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Tally).remote()


class TallyPoster:
    """Posts the numbers of the shards that changed, a few times a second, as long as the process lives."""

    def __init__(self, tally: Any) -> None:
        self._tally, self._lock = tally, threading.Lock()
        self._counts: dict[int, tuple[int, int]] = {}
        self._changed: set[int] = set()
        threading.Thread(target=self._run, daemon=True, name="tally").start()

    def begin(self, shard: int) -> Progress:
        """What is told about a shard from now on."""
        with self._lock:
            self._counts[shard] = (0, 0)

        def progress(ok: int, other: int) -> None:
            with self._lock:
                before = self._counts[shard]
                self._counts[shard] = (before[0] + ok, before[1] + other)
                self._changed.add(shard)

        return progress

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(SECONDS_BETWEEN_POSTS):
            with self._lock:
                changed = {shard: self._counts[shard] for shard in self._changed}
                self._changed.clear()
            if changed:
                with contextlib.suppress(ray.exceptions.RayError):  # it only shows progress
                    ray.get(self._tally.post.remote(changed))
