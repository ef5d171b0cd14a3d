"""How much memory a training takes with a batch of some size: it is trained for two steps, on random images.

Owns: the images, and reading the peak. Does not own: which sizes are measured (`batch_size`), or the process, which
must be a new one for each size, since a process keeps its peak (`on_ray/training/batch_size.py`).

The loop is that of a run, with its validation and checkpoint, which hold copies of the weights.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mnist_dist.config import PhasesConfig, TrainJob
from mnist_dist.images.spec import ImageSpec
from mnist_dist.training.feed import Images, World
from mnist_dist.training.host import SilentHost
from mnist_dist.training.loop import Trainer
from mnist_dist.training.phase import TrainTask
from mnist_dist.training.step import DeviceMemory

STEPS = 2


@dataclass(frozen=True)
class RandomPixels:
    """Images without content, `uint8 [N, H, W, C]`, made when they are read; see `feed.Rows`."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: npt.NDArray[np.integer[Any]], /) -> npt.NDArray[np.uint8]:
        return np.random.default_rng(0).integers(0, 256, (*rows.shape, *self.shape[1:]), np.uint8)


def train_briefly(
    job: TrainJob,
    phases: PhasesConfig,
    *,
    images: int,
    spec: ImageSpec,
    classes: int,
    precision: Literal["float32", "bfloat16"],
) -> DeviceMemory | None:
    """Trains for two steps of each phase, as one worker that is alone.

    Args:
        job: what is trained, but for its data and its batch.
        phases: its phases.
        images: in a batch of this worker.
        spec: of the images.
        classes: K.
        precision: of the arithmetic.

    Returns:
        The memory of the GPUs; None: it computed on CPUs, and the peak of this process counts.

    Raises:
        Exception: the error of TensorFlow or JAX where the memory does not suffice.
    """
    fit = replace(job.fit, batch_size=images, sampling="shuffled", early_stopping_patience=None, tensorboard=False)
    job = replace(job, fit=fit, phases=phases, model=replace(job.model, weights="none"))
    task = TrainTask(
        job=job,
        spec=spec,
        class_names=tuple(map(str, range(classes))),
        images=_random_images(images, spec=spec, classes=classes),
        precision=precision,
    )
    trainer = Trainer(task, host=SilentHost(), world=World())
    trainer.run()
    return trainer.computation.device_memory()


def _random_images(batch: int, *, spec: ImageSpec, classes: int) -> Images:
    """Enough for two steps and a batch of evaluation, which is twice as large."""
    train, held_out = STEPS * batch, 2 * batch
    rows = np.arange(train + held_out)
    return Images(
        pixels=RandomPixels((len(rows), *spec.shape)),
        labels=(rows % classes).astype(np.int32),
        train=rows[:train],
        validation=rows[train:],
        test=rows[:0],
    )
