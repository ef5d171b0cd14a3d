"""The largest batch that fits into the memory of a worker: which sizes may be taken, and which is measured next.

Owns: the bounds, the arithmetic and the words. Does not own: the steps that are measured (`memory_use`), or in which
process (`on_ray/training/batch_size.py`). Imports neither Keras nor Ray.

Memory grows with the batch along a line: weights, optimizer and libraries first, then the activations of each image.
Two small batches show the line; its prediction is measured before it is taken, and no further than `MAX_GROWTH` times
what has been measured, since a line through two small batches of a small network is mostly noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mnist_dist.config import PhasesConfig, TrainJob
from mnist_dist.models.backbones import is_imported

MAX_PER_WORKER = 1_024
MIN_STEPS_PER_EPOCH = 20
USED_FRACTION = 0.8
"""Of what a worker can expect. The rest is for what the measurement does not see: the sum of the gradients over several
workers, Ray, images read ahead, and pieces of memory that are too small for what is asked for."""
FIRST, SECOND = 4, 16
"""Images of the first two batches that are measured: VGG16 at 224 px takes about 4 GB for 16."""
MAX_GROWTH = 8
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Memory of one worker in training, bytes."""

    images: int
    """Images of a worker's batch."""
    peak_bytes: int
    available_bytes: int
    """What a worker can expect there: of a GPU all, of a node its share."""

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= USED_FRACTION * self.available_bytes


Measure = Callable[[int], Usage | None]
"""Trains with so many images per worker. None: there was not enough memory."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a global batch is laid out over the workers."""

    workers: int
    unit: int
    """A worker's batch is a multiple of this: it is computed in equal parts (`accumulate`), each on all its GPUs."""


def layout_of(job: TrainJob, *, workers: int, gpus: int) -> Layout:
    """The layout of a job on `workers` workers with `gpus` GPUs each."""
    return Layout(workers=workers, unit=job.optimizer.accumulate * max(1, gpus))


def candidates(layout: Layout, *, train_images: int) -> list[int]:
    """The images per worker that may be taken, the fewest first: powers of two, times `layout.unit`.

    They end at `MAX_PER_WORKER`, and where an epoch would have fewer than `MIN_STEPS_PER_EPOCH` steps. Memory is not
    all that counts: the learning rate stays as it is, and with few updates a network learns less in as many epochs,
    and generalises worse (Keskar et al. 2017, arXiv:1609.04836; Shallue et al. 2019, arXiv:1811.03600, where training
    beyond a size that depends on the data needs as many steps as before). The first is always there.
    """
    most = min(MAX_PER_WORKER, train_images // (MIN_STEPS_PER_EPOCH * layout.workers))
    sizes = [layout.unit]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    return sizes


def next_to_measure(sizes: Sequence[int], fitting: Sequence[Usage]) -> int | None:
    """The size to measure next.

    Args:
        sizes: what may still fit, ascending.
        fitting: what has been measured and fits, ascending.

    Returns:
        None: there is nothing larger to measure than the last of `fitting`, or nothing at all.
    """
    if not sizes:
        return None
    if not fitting:
        return max((size for size in sizes if size <= FIRST), default=sizes[0])
    done = fitting[-1]
    reach = done.images * SECOND // FIRST
    if len(fitting) > 1:
        reach = min(done.images * MAX_GROWTH, largest_on_line(fitting))
    return max((size for size in sizes if done.images < size <= reach), default=None)


def largest_fitting(sizes: Sequence[int], measure: Measure) -> list[Usage]:
    """Measures one size after the other.

    Args:
        sizes: of `candidates`.
        measure: trains with one of them.

    Returns:
        What fits, ascending; the last is the largest that does. Empty: none does.
    """
    possible, fitting = list(sizes), list[Usage]()
    while (size := next_to_measure(possible, fitting)) is not None:
        usage = measure(size)
        if usage is not None and usage.fits:
            fitting.append(usage)
        else:
            possible = [each for each in possible if each < size]
    return fitting


def bytes_per_image(points: Sequence[Usage]) -> float:
    """The slope of the line through the last two points; at least 1 byte, where less is noise."""
    first, second = points[-2:]
    return max(1.0, (second.peak_bytes - first.peak_bytes) / (second.images - first.images))


def largest_on_line(points: Sequence[Usage]) -> int:
    """How many images per worker fit, by the line through the last two points."""
    last = points[-1]
    room = USED_FRACTION * last.available_bytes - last.peak_bytes
    return max(0, last.images + int(room // bytes_per_image(points)))


def expected_bytes(points: Sequence[Usage], *, images: int) -> int:
    """What a worker takes for a batch of so many images, by the line through the last two points."""
    return int(points[-1].peak_bytes + (images - points[-1].images) * bytes_per_image(points))


def is_too_large(images: int, points: Sequence[Usage]) -> bool:
    """Whether a worker has less than it takes for a batch of so many images, by the line through the last two points;
    with fewer points, nothing is known."""
    return len(points) > 1 and expected_bytes(points, images=images) > points[-1].available_bytes


def measured_phases(job: TrainJob) -> PhasesConfig | None:
    """The phases that are measured, of one epoch each; None: every phase trains a head on features alone, which takes
    next to nothing.

    Where a phase trains the whole network, no other needs more. The learning rate is next to 0, since random images
    teach nothing.
    """
    phases, trainable = job.phases.in_order(), list[str]()
    on_features = job.uses_features or is_imported(job.model.backbone)
    for index, phase in enumerate(phases):
        is_on_features = on_features and all(each.trainable == "head" for each in phases[: index + 1])
        if not is_on_features:
            trainable.append(str(phase.trainable))
    if not trainable:
        return None
    chosen = ("all",) if "all" in trainable else tuple(dict.fromkeys(trainable))
    return PhasesConfig(epochs=(1,), learning_rate=(1e-8,), trainable=chosen)


# --- words -----------------------------------------------------------------------------------------------------------


def shown_memory(size_bytes: float) -> str:
    """`3.1 GiB`."""
    return f"{size_bytes / GIB:,.1f} GiB"


def found_in_words(batch_size: int, usage: Usage | None) -> str:
    """`batch size 64: about 3.1 GiB of 12.0 GiB per worker`; without a measurement, why there is none."""
    if usage is None:
        return f"batch size {batch_size:,}: only a head on features is trained, which takes little memory"
    used, available = shown_memory(usage.peak_bytes), shown_memory(usage.available_bytes)
    return f"batch size {batch_size:,}: about {used} of {available} per worker"


def out_of_memory_in_words(
    batch_size: int, *, cause: str, accumulate: int, layout: Layout, points: Sequence[Usage]
) -> str:
    """What a person reads whose training ran out of memory.

    Args:
        batch_size: the global batch.
        cause: what happened, as TensorFlow, JAX or Ray says it.
        accumulate: the parts that a batch was computed in.
        layout: how it was laid out.
        points: what was measured of smaller batches, ascending; fewer than two: nothing is known, and half is guessed.
    """
    images, needs = -(-batch_size // layout.workers), ""
    fits = images // 2
    if len(points) > 1:
        needed = shown_memory(expected_bytes(points, images=images))
        needs = f", needs about {needed} per worker, which has {shown_memory(points[-1].available_bytes)}"
        fits = min(fits, largest_on_line(points))
    cure = _cure(batch_size, images=images, fits=fits, accumulate=accumulate, layout=layout)
    return f"out of memory: --batch-size {batch_size}{needs} ({cause}). {cure}"


def _cure(batch_size: int, *, images: int, fits: int, accumulate: int, layout: Layout) -> str:
    sizes = [layout.unit * 2**power for power in range(12) if layout.unit * 2**power <= fits]
    if not sizes:
        return "Not even the smallest batch would fit: use a smaller backbone or --image-size-px, or a larger machine"
    parts = accumulate
    while accumulate * images > parts * sizes[-1]:
        parts *= 2
    in_parts = f", or --accumulate {parts}, which computes each batch in {parts} parts"
    in_parts = in_parts if batch_size % (layout.workers * parts) == 0 else ""
    size = sizes[-1] * layout.workers
    return f"About {size} would fit: --batch-size {size}, --batch-size auto{in_parts}"
