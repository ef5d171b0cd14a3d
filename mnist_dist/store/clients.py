"""What the stores of cloud providers share: one client per process, optional packages, and errors without secrets.

Does not own: any provider's client.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from mnist_dist.errors import StorageError, first_line

MAX_CONNECTIONS = 64
"""Connections that a client keeps open: more than the threads of any job, so that none waits for another."""
CONNECT_S, SILENCE_S = 5.0, 30.0
"""Timeouts to connect and between bytes, s."""
PART_BYTES = 16 * 2**20
"""Larger objects are sent and fetched in parts of this size, each of which is tried again by itself."""
_DELETING_THREADS = 16
_QUERY = re.compile(r"\?[^\s'\"<>)]+")
_SECRET = re.compile(
    r"\b(AccountKey|SharedAccessSignature|sig|signature|SharedKey|Bearer|access_token)\b[=: ]+\S+", re.I
)
Client = TypeVar("Client")


class PerProcess(Generic[Client]):
    """A client that every process creates for itself, because connections do not survive a fork.

    Args:
        new: creates a client.
    """

    def __init__(self, new: Callable[[], Client]) -> None:
        self._new = new
        self.forget()

    def forget(self) -> None:
        """Drops the client, so that the next `get` reads the environment's settings again."""
        self._lock = threading.Lock()
        self._clients: dict[int, Client] = {}

    def get(self) -> Client:
        """The client of this process."""
        with self._lock:
            if os.getpid() not in self._clients:
                self._clients = {os.getpid(): self._new()}
            return self._clients[os.getpid()]


@contextlib.contextmanager
def packages_of(extra: str, scheme: str) -> Iterator[None]:
    """The block imports packages of an extra of mnist_dist.

    Raises:
        StorageError: they are not installed.
    """
    try:
        yield
    except ImportError as err:
        remedy = f"pip install 'mnist_dist[{extra}]'"
        raise StorageError(f"{scheme}:// needs packages that are not installed: {remedy}. Received: {err}") from err


def public_line(error: BaseException) -> str:
    """The first line of an error's message without query strings, keys and signatures, which providers quote."""
    return _SECRET.sub(r"\1=...", _QUERY.sub("?...", first_line(error)))


def delete_all(delete: Callable[[str], None], uris: Iterable[str]) -> None:
    """Deletes objects in parallel and raises the first error."""
    with ThreadPoolExecutor(_DELETING_THREADS) as pool:
        for _ in pool.map(delete, uris):
            pass
