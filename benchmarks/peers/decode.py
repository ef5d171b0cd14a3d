"""Our job's reading and decoding threads alone: one per core, without a model or a table."""

from collections.abc import Sequence

from benchmarks.peers.task import Stamps, Task
from mnist_dist import processor
from mnist_dist.config import DecodeConfig
from mnist_dist.data.decoding import AwaitedSink, DecodePool, Taken, Threads
from mnist_dist.errors import ImageError
from mnist_dist.models.bundle import load_bundle
from mnist_dist.score_config import InputConfig
from mnist_dist.sources.listing import list_inputs


class Counter(AwaitedSink):
    """A sink that drops images and writes a time stamp per batch.

    Args:
        images: total number of images.
        task: gives the batch size and the file of time stamps.
    """

    def __init__(self, images: int, task: Task) -> None:
        super().__init__()
        self._left, self._in_batch, self._batch_size = images, 0, task.batch_size
        self._stamps = Stamps(task)

    def take(self, images: Sequence[Taken]) -> None:
        """Counts images.

        Raises:
            ImageError: one could not be decoded.
        """
        for taken in images:
            if isinstance(taken.image, ImageError):
                raise taken.image
        with self._lock:
            self._left, self._in_batch = self._left - len(images), self._in_batch + len(images)
            if self._left and self._in_batch < self._batch_size:
                return
            self._stamps.add(self._in_batch)
            self._in_batch = 0
            if not self._left:
                self._done.set()


def main() -> None:
    """Decodes all images."""
    task = Task.from_command_line()
    rows = list_inputs(InputConfig(input=(task.images,))).table
    threads = Threads(decoding=processor.usable_cpus())
    with DecodePool(load_bundle(task.bundle).info.spec, config=DecodeConfig(), threads=threads) as pool:
        counter = Counter(len(rows), task)
        pool.begin(rows, counter, isolated=False)
        counter.wait(pool)


if __name__ == "__main__":
    main()
