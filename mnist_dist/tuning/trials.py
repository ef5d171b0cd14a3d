"""The trials of a search on disk: one JSON object each, written only by the driver.

```
<storage>/<name>/
run-000017.json          recipe, settings and data: written first, compared when the search resumes
like-000017.json         what is known from an earlier search (warm_start.py)
spent-000017.json        seconds that the driver with this lock's number has worked (budget.py)
trials/000012-000017.json  a trial, from the moment it is proposed; trials.json: all trials have ended
finalists/000012-000017.json  a finalist, once it is trained; finalists/000012/: its run (training/runs.py)
speeds.json              ms per image and parameters of each architecture
leaderboard.parquet      one row per trial, best first; pareto.png: accuracy against speed
report.html              the page of the search; of what there is, if it was stopped
bundle/                  the winner
result.json              written last
```

A trial whose record says `running` was interrupted when its driver died. It runs again from its start. The second
number of a record is that of the lock of the driver that wrote it: the highest counts, so that a driver that wakes up
after it has lost the lock changes nothing.
"""

import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from mnist_dist import documents
from mnist_dist.models.history import Epoch
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import join

Status = Literal["running", "done", "stopped", "failed"]
"""stopped: by the scheduler, or because the time ran out; its best epoch still counts."""
THREADS = 8  # for reading records: on object stores a request is mostly waiting
_RECORD = re.compile(r"(\d{6})-(\d{6,})\.json")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One configuration and its result."""

    number: int
    params: dict[str, Any]
    status: Status = "running"
    val_accuracy: float | None = None
    """Validation accuracy of the best epoch, 0-1."""
    val_loss: float | None = None
    """Mean cross-entropy of the same epoch, nats."""
    epochs: int = 0
    parameters: int | None = None
    """Number of weights in the trained part: the head, or the whole network."""
    seconds: float = 0.0
    """Duration of training."""
    ended_s: float | None = None
    """How long drivers had worked on the search when it ended, s. None: it has not."""
    error: str | None = None
    history: tuple[Epoch, ...] = ()

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sort key, best first: validation accuracy, then validation loss, then number."""
        accuracy = self.val_accuracy if self.val_accuracy is not None else -1.0
        return (-accuracy, self.val_loss if self.val_loss is not None else float("inf"), self.number)


@dataclass(frozen=True)
class TrialsOver:
    """`trials.json`: all trials have ended."""

    trials: int
    finalists: tuple[int, ...]
    """The numbers of the chosen finalists, best first."""


def usable(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that have a result, best first."""
    return sorted(
        (t for t in trials if t.status in ("done", "stopped") and t.val_accuracy is not None), key=lambda t: t.rank
    )


def distinct_errors(trials: Iterable[Trial]) -> list[tuple[str, int]]:
    """Errors of failed trials and how often each occurred, most frequent first."""
    return Counter(trial.error or "no message" for trial in trials if trial.status == "failed").most_common()


@dataclass(frozen=True)
class TrialRecords:
    """The records below one folder (`trials` or `finalists`).

    Args:
        uri: URI of the folder.
        fence: number of the lock under which records are written.
        since: number of the lock under which the search was begun; older records belong to another search.
        store: the store that holds the folder.
    """

    uri: str
    fence: int = 0
    since: int = 0
    store: Store = ANYWHERE

    def write(self, trial: Trial) -> None:
        """Writes a trial's record, replacing an earlier one."""
        documents.write(self.store, self._record_uri(trial.number, self.fence), trial)

    def read(self) -> dict[int, Trial]:
        """Reads all trials, in order of their numbers."""
        names = (entry.uri.removeprefix(f"{self.uri}/") for entry in self.store.list_entries(self.uri))
        records = sorted((int(match[1]), int(match[2])) for name in names if (match := _RECORD.fullmatch(name)))
        newest = {number: fence for number, fence in records if fence >= self.since}
        with ThreadPoolExecutor(THREADS) as pool:
            read = pool.map(lambda record: documents.read(self.store, self._record_uri(*record), Trial), newest.items())
            return dict(zip(newest, read, strict=True))

    def _record_uri(self, number: int, fence: int) -> str:
        return join(self.uri, f"{number:06d}-{fence:06d}.json")
