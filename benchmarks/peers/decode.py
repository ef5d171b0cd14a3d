"""The threads of our job that read and decode, alone: one per core, no model, no table."""

from benchmarks.peers.task import Stamps, Task
from mnist_dist import processor
from mnist_dist.config import DecodeConfig, InputConfig
from mnist_dist.data.images import Decoded
from mnist_dist.errors import ImageError
from mnist_dist.models.bundle import load_bundle
from mnist_dist.scoring.decoding import AwaitedSink, DecodePool, Threads
from mnist_dist.scoring.inputs import list_inputs
from mnist_dist.scoring.reading import Encoded


class Counter(AwaitedSink):
    """A sink that notes every so many images, and drops them.

    Args:
        images: that come in all.
        task: says after how many one is noted.
    """

    def __init__(self, images: int, task: Task) -> None:
        super().__init__()
        self._left, self._since, self._each = images, 0, task.batch_size
        self._stamps = Stamps(task)

    def take(self, row: int, encoded: Encoded, image: Decoded | ImageError) -> None:
        """Counts an image.

        Raises:
            ImageError: it is none.
        """
        if isinstance(image, ImageError):
            raise image
        with self._lock:
            self._left, self._since = self._left - 1, self._since + 1
            if self._left and self._since < self._each:
                return
            self._stamps.add(self._since)
            self._since = 0
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
