"""Our decoding alone: from bytes in memory, in one thread per core, without reading, a model or a table."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.peers.task import Stamps, Task
from mnist_dist import processor
from mnist_dist.images.decoder import decode_image
from mnist_dist.models.bundle import load_bundle


def main() -> None:
    """Reads all images, then decodes them."""
    task = Task.from_command_line()
    spec = load_bundle(task.bundle).info.spec
    images = [path.read_bytes() for path in sorted(Path(task.images).iterdir())]
    batches = [images[start : start + task.batch_size] for start in range(0, len(images), task.batch_size)]
    stamps, lock = Stamps(task), threading.Lock()

    def decode(batch: list[bytes]) -> None:
        for image in batch:
            decode_image(image, spec)
        with lock:  # Not in the main thread, which is still handing out batches when the first ones are done.
            stamps.add(len(batch))

    with ThreadPoolExecutor(processor.usable_cpus()) as threads:
        list(threads.map(decode, batches))


if __name__ == "__main__":
    main()
