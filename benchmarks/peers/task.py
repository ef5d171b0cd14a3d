"""A peer's command-line argument and its output: a table, and a time stamp per batch.

Contract: the table is Parquet with the columns `uri`, `predicted_class` and `confidence`, one row per image. The
module imports only the standard library.
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
    """The work of a peer."""

    bundle: str
    """Folder of the model; for our job also an `s3://` prefix."""
    images: str
    """Folder of JPEGs; for our job also a tar or an `s3://` prefix."""
    scratch: str
    """Empty folder for everything that the peer writes."""
    batch_size: int
    seconds: float = 10.0
    """How long to call the bare model or an engine, s."""
    table: str | None = None
    """Folder of the table. None: in the scratch folder."""
    engine: str = "keras"
    """This field and the next two choose the engine of the peer `engine`; see `engines.choice.EngineChoice`."""
    precision: str = "float32"
    engine_uri: str | None = None

    @classmethod
    def from_command_line(cls) -> "Task":
        """The task of this process; see `to_argument`."""
        return cls(**json.loads(sys.argv[1]))

    def to_argument(self) -> str:
        """The task as a peer's only argument."""
        return json.dumps(asdict(self))

    @property
    def model_file(self) -> Path:
        return Path(self.bundle) / "model.keras"

    @property
    def onnx_file(self) -> Path:
        """The ONNX file that the bundle was imported from."""
        return Path(f"{self.bundle}.onnx")

    @property
    def output(self) -> str:
        """Folder of the table; the peer creates it."""
        return self.table or str(Path(self.scratch) / "table")

    @property
    def stamps_file(self) -> Path:
        return Path(self.scratch) / "stamps"

    def info(self) -> dict[str, Any]:
        """The content of `bundle.json`."""
        return dict(json.loads((Path(self.bundle) / "bundle.json").read_text()))


class Stamps:
    """Records the time and the number of images of each finished batch."""

    def __init__(self, task: Task) -> None:
        self._path = task.stamps_file

    def add(self, images: int) -> None:
        """Records a batch that has just finished."""
        with self._path.open("a") as file:
            file.write(f"{time.monotonic()} {images}\n")


def call_again_and_again(call: Callable[[], object], task: Task, *, at_once: int = 1) -> None:
    """Repeats a call that processes one batch for `task.seconds`, from `at_once` threads, and records each call."""
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
    """Seconds and images of each batch, in the order of completion."""
    lines = (line.split() for line in task.stamps_file.read_text().splitlines())
    return sorted((float(seconds), int(images)) for seconds, images in lines)
