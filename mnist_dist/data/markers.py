"""How often a shard was begun, and what ended it: small objects beside the shards.

Owns: the markers that tell the next process that the one before died over the same work, and the errors that a worker
could not deliver. Does not own: what is done about it.

A marker is put before the work is begun and taken back when it ends, whether well or by an error that was foreseen; so
a marker that is found means a death: of the process, or of the whole job.
"""

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

from mnist_dist import documents
from mnist_dist.errors import DecoderStuck, MnistDistError, ServiceError, WorkersFailed
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import join

FORESEEN = (MnistDistError, OSError)
"""What ends work without ending its process."""
SUFFIXES = (".begun", ".error")
"""Of what lies beside shards, and means nothing once they are all done."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a piece of work."""

    of_run: int
    """How often this driver's workers have begun it, 1 the first time."""
    of_all: int
    """How often it was begun by workers of any driver."""

    @property
    def is_suspect(self) -> bool:
        """Something in the work seems to end processes: not just one killed driver, which takes all workers along."""
        return self.of_run > 1 or self.of_all > 2


@dataclass(frozen=True)
class _Marker:
    """What lies in the folder while a piece of work is under way."""

    begun: dict[str, int]
    """Driver -> how often its workers have begun the work."""


@dataclass(frozen=True)
class Markers:
    """The markers of one driver's workers.

    Args:
        folder: URI where they lie, beside the shards.
        run_id: of the driver.
        max_deaths: deaths over the same work after which it is given up.
    """

    folder: str
    run_id: str
    max_deaths: int
    store: Store = ANYWHERE

    def begin(self, work: str) -> Attempt:
        """Puts the marker.

        Args:
            work: a file name, such as `shard-000007.scoring`.

        Raises:
            WorkersFailed: the work ended more than `max_deaths` processes of this driver.
        """
        uri = self._marker_uri(work)
        try:
            before = documents.read(self.store, uri, _Marker)
        except FileNotFoundError:
            before = _Marker({})
        begun = {**before.begun, self.run_id: before.begun.get(self.run_id, 0) + 1}
        attempt = Attempt(begun[self.run_id], sum(begun.values()))
        if attempt.of_run > self.max_deaths + 1:
            raise WorkersFailed(f"{work} ended {attempt.of_run - 1} processes that were at it; Ray's logs may say why")
        documents.write(self.store, uri, _Marker(begun))
        return attempt

    @contextlib.contextmanager
    def trying(self, work: str) -> Iterator[Attempt]:
        """Puts the marker for a block of work, and takes it back at the end, unless that is the end of the process.

        Raises:
            WorkersFailed: see `begin`.
        """
        attempt = self.begin(work)
        try:
            yield attempt
        except DecoderStuck:
            raise  # the process is about to end
        except FORESEEN:
            self._take_back(work)
            raise
        self._take_back(work)

    def note_failure(self, shard: int, error: BaseException) -> None:
        """Leaves the error of a shard where the driver finds it."""
        with contextlib.suppress(OSError, ServiceError):
            self.store.write_bytes(self._failure_uri(shard), pickle.dumps(error))

    def failure_of(self, shard: int) -> BaseException:
        """What a worker left of a shard that is not done."""
        try:
            error: BaseException = pickle.loads(self.store.read_bytes(self._failure_uri(shard)))
        except FileNotFoundError:
            return WorkersFailed(f"shard {shard} was not done, and nobody said why; run the same command to resume")
        return error

    def forget_failures(self) -> None:
        """Deletes the errors that this driver's workers left, once one of them is known."""
        with contextlib.suppress(OSError, ServiceError):
            for entry in self.store.scan_entries(self.folder):
                if entry.uri.endswith(f".{self.run_id}.error"):
                    self.store.delete(entry.uri)

    def _take_back(self, work: str) -> None:
        """Removes a marker; where the storage fails it stays, which costs the next process its speed alone."""
        with contextlib.suppress(OSError, ServiceError):
            self.store.delete(self._marker_uri(work))

    def _marker_uri(self, work: str) -> str:
        return join(self.folder, f"{work}.begun")

    def _failure_uri(self, shard: int) -> str:
        return join(self.folder, f"shard-{shard:06d}.{self.run_id}.error")
