"""Decoding in a process of its own, for images that may take their decoder down with them.

Owns: the child process and the talk with it. A decoder that crashes, hangs or takes all memory costs the child and one
`ImageError` with status `failed`; the next image gets a new child. One image at a time: this is the second attempt, of
a shard whose first one ended with the death of its process.

Run as `python -m mnist_dist.data.isolation FD`, it is the child: encoded bytes come in over the socket, pixels or the
reason why not go out.
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

import mnist_dist
from mnist_dist.data.images import Decoded, ImageSpec, decode_image
from mnist_dist.errors import ImageError, WorkersFailed

MAX_MEMORY_BYTES = 8 * 2**30  # of the child's address space: several times what 100 million pixels take
_START_TIMEOUT_S = 120.0


class IsolatedDecoder:
    """`decode_image` in a child process that may die; it is started when it is first needed. Used by several threads,
    it takes one image at a time.

    Args:
        spec: of the result.
        max_pixels: as for `decode_image`.
        timeout_s: an image that takes longer than this becomes `failed`.
    """

    def __init__(self, spec: ImageSpec, *, max_pixels: int, timeout_s: float) -> None:
        self._spec, self._max_pixels, self._timeout_s = spec, max_pixels, timeout_s
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def decode(self, data: bytes) -> Decoded:
        """As `decode_image`.

        Raises:
            ImageError: also with status `failed`, where the decoder crashed or took too long.
            WorkersFailed: the child does not start.
        """
        with self._lock:
            if self._child is not None and self._child.is_dead:  # killed while it was idle, by no image
                self._end()
            if self._child is None:
                self._child = _Child(self._spec, self._max_pixels, self._timeout_s)
            try:
                answer = self._child.ask(data, timeout_s=self._timeout_s)
            except TimeoutError:
                self._end()
                raise ImageError("failed", f"decoding took longer than {self._timeout_s:g} s") from None
            except (EOFError, OSError):
                code = self._end()
                raise ImageError("failed", f"the decoder crashed ({_cause(code)})") from None
        if isinstance(answer, ImageError):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the child."""
        with self._lock:
            self._end()

    def _end(self) -> int:
        child, self._child = self._child, None
        return child.end() if child is not None else 0


class _Child:
    """One child process; ready when it is built."""

    def __init__(self, spec: ImageSpec, max_pixels: int, timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        package = Path(mnist_dist.__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(package), *_python_path()]))}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        try:
            self._connection.send_bytes(pickle.dumps((spec, max_pixels, timeout_s)))
            is_ready = self._connection.poll(_START_TIMEOUT_S) and bool(self._connection.recv_bytes())
        except (EOFError, OSError):
            is_ready = False
        if not is_ready:
            raise WorkersFailed(f"the process that decodes did not start ({_cause(self.end())})")

    @property
    def is_dead(self) -> bool:
        return self._process.poll() is not None

    def ask(self, data: bytes, *, timeout_s: float) -> Decoded | ImageError:
        self._connection.send_bytes(data)
        if not self._connection.poll(timeout_s):
            raise TimeoutError
        answer: Decoded | ImageError = pickle.loads(self._connection.recv_bytes())
        return answer

    def end(self) -> int:
        """Kills the process if it lives; its exit status, negative for a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.1)  # one that has crashed says by what
        self._process.kill()
        self._connection.close()
        return self._process.wait()


def _python_path() -> list[str]:
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _serve(connection: Connection) -> None:
    """Answers until the parent is gone."""
    spec, max_pixels, timeout_s = pickle.loads(connection.recv_bytes())
    connection.send_bytes(b"ready")
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        answer: Decoded | ImageError
        # a parent that lives has ended this process long before; one that is gone cannot
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s)
        try:
            answer = decode_image(data, spec, max_pixels=max_pixels)
        except ImageError as error:
            answer = ImageError(error.status, error.message)  # without the traceback, which holds the memory
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(pickle.dumps(answer, protocol=5))


def _be_the_first_to_go() -> None:
    """Where memory runs out, this process dies and not its parent, which holds the model."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    _be_the_first_to_go()
    _serve(Connection(int(sys.argv[1])))
