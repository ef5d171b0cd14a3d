"""Small objects beside the shards that record how often work on a shard began, and which error ended it.

Owns: the markers that tell a process that an earlier one died over the same work, and the errors that a worker leaves
for the driver. Does not own: how a job reacts to either.

A marker is written before the work begins, and removed when the work succeeds or fails with an expected error. So a
marker that is still there means that the process, or the whole job, died.
"""

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

from mnist_dist import documents
from mnist_dist.errors import DataError, DecoderStuck, MnistDistError, ServiceError, WorkersFailed
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import join

FORESEEN = (MnistDistError, OSError)
"""Expected errors: they end the work but not its process."""
SUFFIXES = (".begun", ".error")
"""Name endings of markers and errors; both are useless once all shards are done."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """How often a piece of work was begun, this time included."""

    of_run: int
    """How often this driver's workers have begun the work; 1 at the first try."""
    of_all: int
    """How often the workers of any driver have begun the work."""

    @property
    def is_suspect(self) -> bool:
        """Whether the work itself seems to kill processes; a single killed driver also ends all its workers."""
        return self.of_run > 1 or self.of_all > 2


@dataclass(frozen=True)
class _Marker:
    """The content of a marker."""

    begun: dict[str, int]
    """How often the workers of each driver have begun the work, by `run_id`."""


@dataclass(frozen=True)
class Markers:
    """Writes and reads the markers of one driver's workers.

    Args:
        folder: URI of the folder that holds them, beside the shards.
        run_id: id of the driver.
        max_deaths: how many processes of this driver may die over the same work.
        store: the store of the folder.
    """

    folder: str
    run_id: str
    max_deaths: int
    store: Store = ANYWHERE

    def begin(self, work: str) -> Attempt:
        """Writes the marker.

        Args:
            work: a file name, such as `shard-000007.scoring`.

        Raises:
            WorkersFailed: more than `max_deaths` processes of this driver died over the work.
        """
        uri = self._marker_uri(work)
        try:
            marker = documents.read(self.store, uri, _Marker)
        except (FileNotFoundError, DataError):  # There is none, or an older version wrote it.
            marker = _Marker({})
        begun = {**marker.begun, self.run_id: marker.begun.get(self.run_id, 0) + 1}
        attempt = Attempt(begun[self.run_id], sum(begun.values()))
        if attempt.of_run > self.max_deaths + 1:
            raise WorkersFailed(f"{attempt.of_run - 1} processes died while working on {work}; Ray's logs may say why")
        documents.write(self.store, uri, _Marker(begun))
        return attempt

    @contextlib.contextmanager
    def trying(self, work: str) -> Iterator[Attempt]:
        """Writes the marker before a block of work and removes it afterwards, unless the process is dying.

        Raises:
            WorkersFailed: see `begin`.
        """
        attempt = self.begin(work)
        try:
            yield attempt
        except DecoderStuck:
            raise  # The process is about to exit, so the marker must stay.
        except FORESEEN:
            self._remove(work)
            raise
        self._remove(work)

    def note_failure(self, shard: int, error: BaseException) -> None:
        """Stores the error of a shard where the driver finds it."""
        with contextlib.suppress(OSError, ServiceError):
            self.store.write_bytes(self._failure_uri(shard), pickle.dumps(error))

    def failure_of(self, shard: int) -> BaseException:
        """The error that a worker stored for an unfinished shard, or WorkersFailed if there is none."""
        try:
            error: BaseException = pickle.loads(self.store.read_bytes(self._failure_uri(shard)))
        except FileNotFoundError:
            return WorkersFailed(f"shard {shard} was not finished, reason unknown; run the same command to resume")
        return error

    def forget_failures(self) -> None:
        """Deletes the errors that this driver's workers left, once one of them has been raised."""
        with contextlib.suppress(OSError, ServiceError):
            for entry in self.store.scan_entries(self.folder):
                if entry.uri.endswith(f".{self.run_id}.error"):
                    self.store.delete(entry.uri)

    def _remove(self, work: str) -> None:
        """Removes a marker. If the storage fails, the marker stays, which only slows the next process down."""
        with contextlib.suppress(OSError, ServiceError):
            self.store.delete(self._marker_uri(work))

    def _marker_uri(self, work: str) -> str:
        return join(self.folder, f"{work}.begun")

    def _failure_uri(self, shard: int) -> str:
        return join(self.folder, f"shard-{shard:06d}.{self.run_id}.error")
