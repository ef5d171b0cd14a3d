"""The configuration of an export: bundle, format, output and tolerance.

Owns: the fields of an export, as `config.py` owns those of training and scoring, and the default output.
Does not own: the formats themselves (`engines/formats.py`).
"""

from dataclasses import dataclass
from typing import Literal

from mnist_dist.config import LOCK_WAIT_S, require
from mnist_dist.store.uris import absolute

ExportFormat = Literal["saved_model", "onnx", "openvino", "litert"]


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """Converts a bundle to another format and compares the two models."""

    bundle: str
    """Folder or bucket prefix of a finished bundle."""
    format: ExportFormat
    """saved_model: TensorFlow and TensorFlow Serving. onnx: ONNX Runtime. openvino: Intel's runtime. litert: LiteRT,
    formerly TensorFlow Lite. An imported ONNX model exports to onnx and openvino."""
    output: str | None = None
    """Folder or bucket prefix for the exported files. None: `export-FORMAT` next to a folder named `bundle`,
    `NAME-export-FORMAT` next to any other."""
    tolerance: float = 1e-4
    """Fail the job if a probability differs from the bundle's by more than this."""
    batch_size: int = 32
    """Images per call when the two models are compared and timed."""
    lock_wait_s: float = LOCK_WAIT_S
    """How long to wait for a lock that another driver holds, s; after 60 s of silence it is taken over. 0: fail at
    once."""
    verbose: bool = False
    """Show the output of TensorFlow and the converters."""

    def __post_init__(self) -> None:
        require(bool(self.bundle), "bundle must be a folder or a bucket prefix", bundle=self.bundle)
        require(self.output != "", "output must be a folder or a bucket prefix", output=self.output)
        require(0 <= self.tolerance < 1, "tolerance must be in [0, 1)", tolerance=self.tolerance)
        require(self.lock_wait_s >= 0, "lock_wait_s must be 0 or above", lock_wait_s=self.lock_wait_s)
        require(self.batch_size >= 1, "batch_size must be at least 1", batch_size=self.batch_size)
        bundle = absolute(self.bundle)
        is_inside = f"{self.output_uri}/".startswith(f"{bundle}/")
        require(not is_inside, "a finished bundle is never written to: output must lie outside it", output=self.output)

    @property
    def output_uri(self) -> str:
        """Absolute URI of the export."""
        if self.output is not None:
            return absolute(self.output)
        parent, _, name = absolute(self.bundle).rpartition("/")
        require(not parent.endswith(":/"), "output is required if the bundle is a whole bucket", bundle=self.bundle)
        return f"{parent}/export-{self.format}" if name == "bundle" else f"{parent}/{name}-export-{self.format}"
