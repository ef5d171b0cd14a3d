"""Decodes in a child process, for images that may crash their decoder.

Owns: the child process and its protocol. Does not own: which shards are decoded this way (those that seem to kill
processes). If a decoder crashes or hangs, one image becomes an `ImageError` with status `failed`, and the next image
gets a new child. Images are decoded one at a time.

`python -m mnist_dist.images.isolation FD` is the child: it receives encoded bytes over the socket, and sends pixels or
an `ImageError` back.
"""

import contextlib
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import mnist_dist
from mnist_dist.errors import ImageError, WorkersFailed
from mnist_dist.images.budget import SMALL_BYTES
from mnist_dist.images.decoder import Decoded, Reserve, decode_image, unlimited
from mnist_dist.images.spec import ImageSpec

MAX_MEMORY_BYTES = 8 * 2**30  # Bounds the child's address space: several times what 100 million pixels take.
_START_TIMEOUT_S = 120.0


class _Task(NamedTuple):
    """What a child gets once, when it starts."""

    spec: ImageSpec
    max_pixels: int
    timeout_s: float


class IsolatedDecoder:
    """Runs `decode_image` in a child process that may die. The child starts when it is first needed, and decodes one
    image at a time even if several threads call.

    Args:
        spec: size and channels of the result.
        max_pixels: as for `decode_image`.
        timeout_s: an image that takes longer than this gets the status `failed`.
        reserve: as for `decode_image`. It is called here, so that the child shares the budget of this process.
    """

    def __init__(self, spec: ImageSpec, *, max_pixels: int, timeout_s: float, reserve: Reserve = unlimited) -> None:
        self._task, self._reserve = _Task(spec, max_pixels, timeout_s), reserve
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def decode(self, data: bytes) -> Decoded:
        """Decodes an image as `decode_image` does.

        Raises:
            ImageError: as from `decode_image`; with status `failed` if the decoder crashed or took too long.
            WorkersFailed: the child did not start.
        """
        with self._lock:
            if self._child is not None and self._child.is_dead:  # It was killed while idle, so no image is to blame.
                self._end()
            if self._child is None:
                self._child = _Child(self._task)
            try:
                answer = self._child.ask(data, timeout_s=self._task.timeout_s, reserve=self._reserve)
            except TimeoutError:
                self._end()
                raise ImageError("failed", f"decoding took longer than {self._task.timeout_s:g} s") from None
            except (EOFError, OSError):
                code = self._end()
                raise ImageError("failed", f"the decoder crashed ({_cause(code)})") from None
        if isinstance(answer, ImageError):
            raise answer
        return answer

    def close(self) -> None:
        """Kills the child, if there is one."""
        with self._lock:
            self._end()

    def _end(self) -> int:
        child, self._child = self._child, None
        return child.end() if child is not None else 0


class _Child:
    """One child process, which is ready once the constructor returns."""

    def __init__(self, task: _Task) -> None:
        parent_socket, child_socket = socket.socketpair()
        package = Path(mnist_dist.__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(package), *_python_path()]))}
        with child_socket:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(child_socket.fileno())],
                pass_fds=[child_socket.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._connection = Connection(parent_socket.detach())
        try:
            self._connection.send_bytes(pickle.dumps(task))
            is_ready = self._connection.poll(_START_TIMEOUT_S) and bool(self._connection.recv_bytes())
        except (EOFError, OSError):
            is_ready = False
        if not is_ready:
            raise WorkersFailed(f"the decoding process did not start ({_cause(self.end())})")

    @property
    def is_dead(self) -> bool:
        return self._process.poll() is not None

    def ask(self, data: bytes, *, timeout_s: float, reserve: Reserve) -> Decoded | ImageError:
        self._connection.send_bytes(data)
        answer = self._answer(timeout_s)
        while isinstance(answer, int):  # So much memory does it need; a decoder that fails may be followed by another.
            with reserve(answer):
                self._connection.send_bytes(b"reserved")
                answer = self._answer(timeout_s)
        return answer

    def _answer(self, timeout_s: float) -> Decoded | ImageError | int:
        if not self._connection.poll(timeout_s):
            raise TimeoutError
        answer: Decoded | ImageError | int = pickle.loads(self._connection.recv_bytes())
        return answer

    def end(self) -> int:
        """Kills the process if it is alive, and returns its exit status, which is negative for a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.1)  # A crashed child needs a moment to report its signal.
        self._process.kill()
        self._connection.close()
        return self._process.wait()


def _python_path() -> list[str]:
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _serve(connection: Connection) -> None:
    """Decodes images until the parent is gone."""
    task: _Task = pickle.loads(connection.recv_bytes())

    def set_alarm(is_on: bool) -> None:
        # A living parent kills this process at `timeout_s`. The alarm ends it if the parent is gone.
        signal.setitimer(signal.ITIMER_REAL, 2 * task.timeout_s if is_on else 0)

    def reserve(memory_bytes: int) -> contextlib.AbstractContextManager[object]:
        if memory_bytes >= SMALL_BYTES:
            set_alarm(False)
            connection.send_bytes(pickle.dumps(memory_bytes))
            connection.recv_bytes()  # It waits for the parent, whose other images may need the memory.
            set_alarm(True)
        return unlimited(memory_bytes)

    connection.send_bytes(b"ready")
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        answer: Decoded | ImageError
        set_alarm(True)
        try:
            answer = decode_image(data, task.spec, max_pixels=task.max_pixels, reserve=reserve)
        except ImageError as error:
            answer = ImageError(error.status, error.message)  # Without the traceback, which would keep memory.
        set_alarm(False)
        connection.send_bytes(pickle.dumps(answer, protocol=5))


def _limit_process() -> None:
    """Makes this process, not its parent with the model, die if memory runs out."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    _limit_process()
    _serve(Connection(int(sys.argv[1])))
