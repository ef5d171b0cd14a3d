"""What a peer is told on its command line, and what it leaves: a table, and a time stamp for each batch.

Contract: the table is Parquet with the columns `uri`, `predicted_class` and `confidence`, a row for each image. Imports
the standard library alone.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be done."""

    bundle: str
    """Folder of the model."""
    images: str
    """Folder of JPEGs."""
    scratch: str
    """Empty folder, for all that is written."""
    batch_size: int
    seconds: float = 10.0
    """How long the bare model is called."""

    @classmethod
    def from_command_line(cls) -> "Task":
        """The task of this process, see `to_argument`."""
        return cls(**json.loads(sys.argv[1]))

    def to_argument(self) -> str:
        """The task as the one argument of a peer."""
        return json.dumps(asdict(self))

    @property
    def model_file(self) -> Path:
        return Path(self.bundle) / "model.keras"

    @property
    def output(self) -> str:
        """Folder of the table; the peer makes it."""
        return str(Path(self.scratch) / "table")

    @property
    def stamps_file(self) -> Path:
        return Path(self.scratch) / "stamps"

    def info(self) -> dict[str, Any]:
        """What `bundle.json` says."""
        return dict(json.loads((Path(self.bundle) / "bundle.json").read_text()))


class Stamps:
    """Notes when a batch is done, and of how many images it was."""

    def __init__(self, task: Task) -> None:
        self._path = task.stamps_file

    def add(self, images: int) -> None:
        """Notes a batch that is done now."""
        with self._path.open("a") as file:
            file.write(f"{time.monotonic()} {images}\n")


def read_stamps(task: Task) -> list[tuple[float, int]]:
    """Seconds and images of each batch, in the order in which they were done."""
    lines = (line.split() for line in task.stamps_file.read_text().splitlines())
    return sorted((float(seconds), int(images)) for seconds, images in lines)
