"""Uploads of checkpoints beside the training, one at a time.

Owns: that the next checkpoint waits for the upload of the one before, that nobody leaves while one is in flight, and
that an upload that failed is not passed over. Does not own: the thread, which is Ray Train's (`report` with
`CheckpointUploadMode.ASYNC`): it tells the driver of a checkpoint only once it is complete, and would by itself queue
any number of them.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

Uploaded = TypeVar("Uploaded")


class Uploads(Generic[Uploaded]):
    """The uploads of one worker.

    Args:
        upload: uploads a local folder under a name, its completing file last, and returns what is reported to Ray
            Train.
    """

    def __init__(self, upload: Callable[[Path, str], Uploaded]) -> None:
        self._upload = upload
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._error: BaseException | None = None

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Announces an upload, which the block orders and another thread then makes by `run`; if the block fails,
        there will be none to wait for."""
        self._is_idle.clear()
        try:
            yield
        except BaseException:
            self._is_idle.set()
            raise

    def run(self, folder: Path, name: str) -> Uploaded:
        """Uploads a folder and deletes it."""
        try:
            uploaded = self._upload(folder, name)
            shutil.rmtree(folder)
        except BaseException as error:  # `wait` raises it in the training's thread.
            self._error = error
            raise
        finally:
            self._is_idle.set()
        return uploaded

    def wait(self) -> None:
        """Waits until nothing is in flight. Raises the error of an upload that failed."""
        self._is_idle.wait()
        if self._error is not None:
            raise self._error
