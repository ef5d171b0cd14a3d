"""What a peer is told on its command line, and what it leaves: a table, and a time stamp for each batch.

Contract: the table is Parquet with the columns `uri`, `predicted_class` and `confidence`, a row for each image. Imports
the standard library alone.
"""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WARM_UP_CALLS = 3


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be done."""

    bundle: str
    """Folder of the model; of our job, or an `s3://` prefix."""
    images: str
    """Folder of JPEGs; of our job, or a tar or an `s3://` prefix."""
    scratch: str
    """Empty folder, for all that is written."""
    batch_size: int
    seconds: float = 10.0
    """How long the bare model, or an engine, is called."""
    table: str | None = None
    """Where the table goes. None: into the scratch folder."""
    engine: str = "keras"
    """What runs the model in the peer `engine`, with the two below: see `engines.choice.EngineChoice`."""
    precision: str = "float32"
    engine_uri: str | None = None

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
        return self.table or str(Path(self.scratch) / "table")

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


def call_again_and_again(call: Callable[[], object], task: Task, *, at_once: int = 1) -> None:
    """Calls something that takes one batch, for as long as the task says, from so many threads; notes each call."""
    for _ in range(WARM_UP_CALLS):
        call()
    stamps = Stamps(task)
    stamps.add(0)
    began = time.monotonic()

    def run() -> None:
        while time.monotonic() - began < task.seconds:
            call()
            stamps.add(task.batch_size)

    with ThreadPoolExecutor(at_once) as pool:
        for running in [pool.submit(run) for _ in range(at_once)]:
            running.result()


def read_stamps(task: Task) -> list[tuple[float, int]]:
    """Seconds and images of each batch, in the order in which they were done."""
    lines = (line.split() for line in task.stamps_file.read_text().splitlines())
    return sorted((float(seconds), int(images)) for seconds, images in lines)
