"""Predictions of a finished network for the test images, gathered from all workers."""

# n = test images, K = classes

import functools
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ray.train.collective import barrier

from mnist_dist.on_ray.training.finished import FinishedModel
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join
from mnist_dist.training.loop import Trainer
from mnist_dist.training.objective import set_metrics


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Predictions for the test images, in the order of the split."""

    rows: npt.NDArray[np.int64]
    """`int64 [n]`, row numbers of the records."""
    labels: npt.NDArray[np.int32]
    """`int32 [n]`, the true classes, or the true sets of them."""
    logits: npt.NDArray[np.float32]
    """`float32 [n, K]`."""
    members: npt.NDArray[np.bool_] | None = None
    """`bool [L, K]`, whether a class is in a set; None: each image has one class."""

    @functools.cached_property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """`float32 [n, K]`."""
        if self.members is not None:
            return np.exp(-np.logaddexp(0, -self.logits.astype(np.float64))).astype(np.float32)
        return np.exp(self._log_probabilities).astype(np.float32)

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """`loss` (mean cross-entropy, nats) and `accuracy` (0-1); of sets of classes see `set_metrics`."""
        if self.members is not None:
            return set_metrics(self.logits, self.members[self.labels])
        of_truth = self._log_probabilities[np.arange(len(self.labels)), self.labels]
        hits = self.logits.argmax(axis=1) == self.labels
        return {"loss": float(-of_truth.mean()), "accuracy": float(hits.mean())}

    @property
    def _log_probabilities(self) -> npt.NDArray[np.float64]:
        shifted = self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def predict_test(trainer: Trainer, model: FinishedModel, *, scratch: str) -> Predicted:
    """Predicts the test images, which the workers share. Every worker must call this.

    Args:
        trainer: this worker's trainer.
        model: the finished classifier.
        scratch: URI of a folder that all workers can reach; used only with several workers.

    Returns:
        All predictions on rank 0; on other workers only their own share.

    Raises:
        MeasuringStopped: the host asks to stop, and there are no other workers.
    """
    images, world, members = trainer.task.images, trainer.world, trainer.task.members
    rows = images.test[: trainer.test_count]
    share = model.logits(rows)
    if world.workers == 1:
        return Predicted(rows=rows, labels=images.labels[rows], logits=share, members=members)
    if world.rank > 0:
        buffer = io.BytesIO()
        np.save(buffer, share)
        ANYWHERE.write_bytes(join(scratch, f"{world.rank}.npy"), buffer.getvalue())
    barrier()
    if world.rank > 0:
        own_rows = rows[world.rank :: world.workers]
        return Predicted(rows=own_rows, labels=images.labels[own_rows], logits=share, members=members)
    logits = np.zeros((len(rows), share.shape[1]), np.float32)
    logits[:: world.workers] = share
    for rank in range(1, world.workers):
        part = np.load(io.BytesIO(ANYWHERE.read_bytes(join(scratch, f"{rank}.npy"))))
        logits[rank :: world.workers] = part
    ANYWHERE.delete_tree(scratch)
    return Predicted(rows=rows, labels=images.labels[rows], logits=logits, members=members)
