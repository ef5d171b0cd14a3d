"""The configuration of `jobs.doctor`: the set-up to examine.

Owns: the fields of the job, as `config.py` owns those of training and scoring.
"""

from dataclasses import dataclass

from mnist_dist.config import require
from mnist_dist.store.uris import is_remote


@dataclass(frozen=True, kw_only=True)
class DoctorJob:
    """Finds what would break a job on this machine or on any node of the cluster, and says how to fix it."""

    storage: str = "runs"
    """Folder or bucket prefix that the jobs write to; every node must be able to write there."""
    bundle: str | None = None
    """Bundle to score with; every node must be able to read it. None: not checked."""
    backbone: str = "cnn"
    """Network to train; it determines which weights file `imagenet` needs."""
    weights: str = "none"
    """Initial weights, as for training: `imagenet`, `none`, a `.weights.h5` file or a bundle."""
    storage_is_shared: bool = False
    """Local folders are the same on every node (NFS or similar)."""
    json: bool = False
    """Include every check in the JSON line on stdout."""
    verbose: bool = False
    """Show the output of Ray."""

    def __post_init__(self) -> None:
        require(bool(self.storage), "storage must be a folder or a bucket prefix", storage=self.storage)
        require(self.bundle != "", "bundle must be a folder or a bucket prefix", bundle=self.bundle)
        for uri in (self.storage, self.bundle or "", self.weights):
            is_remote(uri)  # an unknown scheme
