"""The configuration of `jobs.doctor`: which set-up is examined.

Owns: the fields of the job, as `config.py` owns those of training and scoring.
"""

from dataclasses import dataclass

from mnist_dist.config import require
from mnist_dist.store.uris import is_remote


@dataclass(frozen=True, kw_only=True)
class DoctorJob:
    """Says what would break a job, on this machine and on each node of the cluster, and what to do about it."""

    storage: str = "runs"
    """Folder or `s3://` prefix that the jobs write to; every node must be able to write there."""
    bundle: str | None = None
    """Bundle that is to be scored with: every node must see it. None: not checked."""
    backbone: str = "cnn"
    """Network that is to be trained; it decides which file `imagenet` needs."""
    weights: str = "none"
    """What the training is to start from, as in `jobs.train`: `imagenet`, `none`, a `.weights.h5` file or a bundle."""
    storage_is_shared: bool = False
    """Local folders are the same on every node (NFS and the like)."""
    json: bool = False
    """Put every check into the JSON line on stdout."""
    verbose: bool = False
    """Show what Ray prints."""

    def __post_init__(self) -> None:
        require(bool(self.storage), "storage is a folder or an s3:// prefix", storage=self.storage)
        require(self.bundle != "", "bundle is a folder or an s3:// prefix", bundle=self.bundle)
        for uri in (self.storage, self.bundle or "", self.weights):
            is_remote(uri)  # an unknown scheme
