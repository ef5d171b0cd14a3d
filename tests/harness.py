"""What the tests of several jobs share: a console that can be looked at, a command that can be killed, a bundle to
score with, and whether a process runs.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from PIL import Image

from mnist_dist.config import ModelConfig
from mnist_dist.console import Console
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import BundleInfo, write_bundle
from mnist_dist.models.history import Epoch
from mnist_dist.store.anywhere import ANYWHERE, Anywhere

ROOT = Path(__file__).parents[1]
SPEC = ImageSpec(height_px=12, width_px=14, channels=3)
CLASSES = ("ant", "bee", "cat", "dog", "eel")


class Recorder(Console):
    """A console that keeps its lines, and calls back at the first line that starts with some words."""

    def __init__(self, at: str | None = None, then: Callable[[], Any] | None = None) -> None:
        super().__init__(terminal=False)
        self.lines: list[str] = []
        self._at, self._then = at, then

    def line(self, text: str) -> None:
        self.lines.append(text)
        if self._at is not None and self._then is not None and text.startswith(self._at):
            self._at = None
            self._then()


class Command:
    """`python -m ...` from the root of the project; when the block is left, no process of it is.

    Nothing here has a time limit of its own: pytest's ends a test that hangs.
    """

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._known: dict[int, psutil.Process] = {}
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (see __exit__)
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,  # a signal for the job is none for its Ray
        )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.descendants()
        self.process.kill()
        self.process.wait()
        for process in self._known.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._out.close()
        self._err.close()

    def stdout(self) -> str:
        """What the command has written there up to now."""
        return _content(self._out)

    def stderr(self) -> str:
        """What the command has written there up to now."""
        return _content(self._err)

    def descendants(self) -> list[psutil.Process]:
        """The processes below the command."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
            self._known |= {process.pid: process for process in found}
            return found
        return []

    def until(self, happened: Callable[[], Any], *, poll_s: float = 0.02) -> bool:
        """Returns as soon as something is so, or the command has ended: whether it is so."""
        while not happened():
            if self.process.poll() is not None:
                return bool(happened())
            time.sleep(poll_s)
        return True

    def until_line(self, start: str) -> None:
        """Returns as soon as a line of stderr starts with some words."""
        assert self.until(lambda: f"\n{start}" in f"\n{self.stderr()}"), f"no line {start!r} in {self.stderr()}"

    def kill(self) -> None:
        """Kills the command alone, unless it has ended; returns when its Ray has ended, too."""
        self.descendants()
        self.process.kill()
        self.process.wait()
        # Ray's agents look for their dead parent once a minute
        left = [process for process in self._known.values() if not title(process).startswith(_AGENTS)]
        while any(is_alive(process.pid) and process.is_running() for process in left):
            time.sleep(0.1)

    def ended(self) -> tuple[int, dict[str, Any], str]:
        """Waits for the end: exit code, JSON of stdout's last line, stderr."""
        code = self.process.wait()
        lines = self.stdout().splitlines()
        return code, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}, self.stderr()


_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def _content(file: IO[bytes]) -> str:
    """Without moving where another process writes."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def title(process: psutil.Process) -> str:
    """The command line of a process; Ray writes there what a worker does."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextlib.contextmanager
def private_ray(*, num_cpus: int) -> Iterator[None]:
    """A Ray of this process that takes the machine to have so many CPUs; Ray Train on it reports quickly."""
    import ray

    from mnist_dist.on_ray.cluster import PRIVATE_TRAIN_SETTINGS

    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**PRIVATE_TRAIN_SETTINGS, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}.items():
            environment.setenv(name, value)
        ray.init(
            address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
        yield
        ray.shutdown()


def train_workers() -> list[psutil.Process]:
    """The workers of this process's Ray; another one on the machine may have its own."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def largest_difference(ours: list[npt.NDArray[Any]], theirs: list[npt.NDArray[Any]]) -> float:
    """Over the tensors: norm(a - b) / norm(b)."""
    return max(
        float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-12) for a, b in zip(ours, theirs, strict=True)
    )


def run_command(*arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Runs `python -m ...` from the root of the project: exit code, JSON of stdout's last line, stderr."""
    with Command(*arguments, **environment) as command:
        return command.ended()


class Watched(Anywhere):
    """A store that calls back before each single change, with its name, such as `write plan.json` or `move a.parquet`:
    a test's way to die there. Where one call has died, so have those of other threads that come later."""

    def __init__(self, step: Callable[[str], object]) -> None:
        super().__init__(ANYWHERE.stores)
        self._step, self._lock, self._death = step, threading.Lock(), list[BaseException]()

    def _change(self, what: str, uri: str) -> None:
        with self._lock:
            if self._death:
                raise self._death[0]
            try:
                self._step(f"{what} {uri.rpartition('/')[2]}")
            except BaseException as error:
                self._death.append(error)
                raise

    def write_bytes(self, uri: str, data: bytes) -> None:
        self._change("write", uri)
        super().write_bytes(uri, data)

    @contextlib.contextmanager
    def new_object(self, uri: str) -> Iterator[BinaryIO]:
        self._change("write", uri)
        with super().new_object(uri) as file:
            yield file
            self._change("put", uri)

    def create_bytes(self, uri: str, data: bytes) -> bool:
        self._change("create", uri)
        return super().create_bytes(uri, data)

    def move(self, source: str, target: str) -> None:
        self._change("move", target)
        super().move(source, target)

    def delete(self, uri: str) -> None:
        self._change("delete", uri)
        super().delete(uri)

    def delete_tree(self, uri: str) -> None:
        self._change("delete all of", uri)
        super().delete_tree(uri)


def s3_client() -> Any:
    """boto3's client that `ANYWHERE` has in this process."""
    return ANYWHERE.of("s3://bucket")._client  # type: ignore[attr-defined]


def fast_reads() -> Any:
    """The quick client that `ANYWHERE` has in this process."""
    return ANYWHERE.of("s3://bucket")._of_this_process().fast_reads()  # type: ignore[attr-defined]


def is_alive(pid: int) -> bool:
    """Whether a process runs; not where it has ended and nobody has collected it."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def write_spread_bundle(path: Path, *, images: Sequence[Image.Image], seed: int) -> Path:
    """A bundle of random weights, but such that these images (of `SPEC`'s size) are spread over the classes."""
    from mnist_dist.models.classifier import build_classifier  # loads TensorFlow, which few processes need

    model = build_classifier(ModelConfig(backbone="cnn"), spec=SPEC, num_classes=len(CLASSES), seed=seed).model
    logits = model.get_layer("logits")
    kernel, bias = logits.get_weights()
    mean = np.log(np.asarray(model(np.stack([np.asarray(image) for image in images])))).mean(axis=0)
    logits.set_weights([kernel * 50, (bias - mean) * 50])
    info = BundleInfo(class_names=CLASSES, spec=SPEC, backbone="cnn")
    write_bundle(path, model, info)
    return path


def an_epoch(number: int, **fields: Any) -> Epoch:
    """A line of a history; fields are those of `Epoch`."""
    values = {"loss": 0.5, "accuracy": 0.5, "val_loss": 0.5, "val_accuracy": 0.5, "learning_rate": 0.01}
    return Epoch(**{"epoch": number, "phase": "train", **values, **fields})
