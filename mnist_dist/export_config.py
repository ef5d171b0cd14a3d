"""The configuration of an export: which bundle, in which format, to where, and how exactly it has to agree.

Owns: the fields of an export, as `config.py` owns those of training and scoring, and where an export goes by default.
Does not own: the formats themselves (`engines/formats.py`).
"""

from dataclasses import dataclass
from typing import Literal

from mnist_dist.config import LOCK_WAIT_S, require
from mnist_dist.store.uris import absolute

ExportFormat = Literal["saved_model", "onnx", "openvino", "litert"]


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """One bundle in one format."""

    bundle: str
    """Folder or `s3://` prefix of a finished bundle."""
    format: ExportFormat
    """saved_model: TensorFlow and its Serving. onnx: ONNX Runtime. openvino: Intel's runtime. litert: LiteRT, once
    TensorFlow Lite."""
    output: str | None = None
    """Folder or `s3://` prefix for the exported files. None: `export-FORMAT` beside a folder named `bundle`,
    `NAME-export-FORMAT` beside any other."""
    tolerance: float = 1e-4
    """Largest absolute difference of a probability to the Keras model's; above it the job fails."""
    batch_size: int = 32
    """Images per call while both are compared and measured."""
    lock_wait_s: float = LOCK_WAIT_S
    """Wait so long, s, for the lock of a driver that may be lost; it is taken over after 60 s of silence. 0: fail."""
    verbose: bool = False
    """Show what TensorFlow and the converters print."""

    def __post_init__(self) -> None:
        require(bool(self.bundle), "bundle is a folder or an s3:// prefix", bundle=self.bundle)
        require(self.output != "", "output is a folder or an s3:// prefix", output=self.output)
        require(0 <= self.tolerance < 1, "tolerance is in [0, 1)", tolerance=self.tolerance)
        require(self.lock_wait_s >= 0, "lock_wait_s is 0 or above", lock_wait_s=self.lock_wait_s)
        require(self.batch_size >= 1, "batch_size is at least 1", batch_size=self.batch_size)
        bundle = absolute(self.bundle)
        is_inside = f"{self.output_uri}/".startswith(f"{bundle}/")
        require(not is_inside, "a finished bundle is never written to: output lies outside of it", output=self.output)

    @property
    def output_uri(self) -> str:
        """Where the export goes, as every process sees it."""
        if self.output is not None:
            return absolute(self.output)
        parent, _, name = absolute(self.bundle).rpartition("/")
        require(not parent.endswith(":/"), "output is given where the bundle is a whole bucket", bundle=self.bundle)
        return f"{parent}/export-{self.format}" if name == "bundle" else f"{parent}/{name}-export-{self.format}"
