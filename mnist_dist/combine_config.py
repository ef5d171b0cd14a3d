"""The configuration of a combination: the bundles, the method, the output, and the images that judge.

Owns: the fields of a combination, as `config.py` owns those of training and scoring. Does not own: the methods
themselves (`combining`).
"""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from mnist_dist.config import LOCK_WAIT_S, CombineMethod, StoreConfig, require
from mnist_dist.store.uris import absolute


@dataclass(frozen=True, kw_only=True)
class CombineJob:
    """Makes one bundle of several: the average of their weights (a soup), or the mean of their probabilities (an
    ensemble)."""

    bundles: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    """Two or more bundles, or runs that hold one: folders or bucket prefixes."""
    output: str
    """Folder or bucket prefix for the new bundle."""
    method: CombineMethod
    """soup: the average of the weights of runs of one architecture, as fast as one of them. greedy-soup: of those runs
    that do not lower the validation accuracy, the best first. ensemble: the mean of the probabilities of any bundles
    with the same classes and input, as slow as all of them together."""
    data: tuple[str, ...] = ()
    """Where the images of the runs are now, as in training; the combination is judged by their validation images.
    Empty: greedy-soup takes what the first bundle was trained on, soup and ensemble are not judged."""
    data_dir: str | None = None
    """Files of `mnist`, `fashion_mnist` or `emnist`, as in training. None: as the first bundle says."""
    storage: str = "runs"
    """Folder or bucket prefix of the runs, whose decoded images are used; what is not decoded yet is decoded there."""
    storage_is_shared: bool = False
    """The storage folder is the same on every node (NFS or similar)."""
    batch_size: int = 32
    """Images per call."""
    store: StoreConfig = field(default_factory=StoreConfig)
    lock_wait_s: float = LOCK_WAIT_S
    """How long to wait for a lock that another driver holds, s; after 60 s of silence it is taken over. 0: fail at
    once."""
    verbose: bool = False
    """Show the output of TensorFlow and Ray."""

    def __post_init__(self) -> None:
        require(len(self.bundles) >= 2 and all(self.bundles), "name two bundles or more", bundles=self.bundles)
        require(bool(self.output), "output must be a folder or a bucket prefix", output=self.output)
        require(self.batch_size >= 1, "batch_size must be at least 1", batch_size=self.batch_size)
        require(self.lock_wait_s >= 0, "lock_wait_s must be 0 or above", lock_wait_s=self.lock_wait_s)
        for uri in self.bundles:
            place = f"{absolute(uri)}/"
            is_apart = not f"{self.output_uri}/".startswith(place) and not place.startswith(f"{self.output_uri}/")
            require(is_apart, f"output must lie outside of the bundle {uri}", output=self.output)

    @property
    def output_uri(self) -> str:
        """Absolute URI of the new bundle."""
        return absolute(self.output)

    @property
    def is_judged(self) -> bool:
        """Whether validation images are needed."""
        return self.method == "greedy-soup" or bool(self.data)
