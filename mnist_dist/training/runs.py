"""The folder of a training run: its settings, its progress and its result.

```
run-000017.json    recipe, settings and data fingerprint: written first, compared when the run resumes; and the batch
                   size that was found
attempt-000017/    checkpoints of one attempt (checkpoint-000000123/..., each complete once it has state.json)
lock/000017        see `store/lock.py`
history.csv        one line per epoch so far
tracked-mlflow.json  what MLflow was told, see `tracking.py`
bundle/            the model
result.json        written last
```

The numbers are those of locks, so that a driver that wakes up after it has lost the lock writes under names of its own.
What an earlier number than that of `run-000017.json` saved belongs to another run, which had saved nothing by then.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mnist_dist import documents
from mnist_dist.config import PhasesConfig, differences
from mnist_dist.documents import Document
from mnist_dist.errors import ResumeConflict
from mnist_dist.inventory import (
    LOCK,
    Folder,
    InventoryRow,
    RunFacts,
    driver_values,
    facts_name,
    facts_names,
    is_run,
    is_search,
    state_of,
)
from mnist_dist.models.history import HISTORY_FILE, Epoch, read_history
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import join
from mnist_dist.training.checkpoints import STATE_FILE

TRACKED_PREFIX = "tracked-"  # of what trackers were told
_NUMBERED = re.compile(
    r"(?:run|like|spent|attempt|trials/\d{6}|finalists/\d{6})-(\d{6,})(?:\.json$|/)"
)  # A search is a run, too.
ATTEMPT = re.compile(r"(attempt-(\d+))/")
CHECKPOINT = re.compile(r"attempt-(?P<fence>\d+)/checkpoint-(?P<steps>\d+)/" + re.escape(STATE_FILE) + "$")


@dataclass(frozen=True)
class Run:
    """One run, identified by the URI of its folder."""

    uri: str
    begun_by: re.Pattern[str] = CHECKPOINT
    """Other settings are refused only once the run has saved an object of such a name (or has finished). The group
    `fence` is the number of the lock of the driver that saved it."""
    store: Store = ANYWHERE

    @property
    def lock_uri(self) -> str:
        return join(self.uri, LOCK)

    @property
    def bundle(self) -> str:
        return join(self.uri, "bundle")

    def result(self) -> dict[str, Any] | None:
        """The result if the run is finished, else None."""
        return self.read("result.json", dict[str, Any])

    def begin(self, facts: RunFacts, *, fence: int) -> bool:
        """Records the facts that decide the result. Returns True for a new run, False for one that resumes.

        Args:
            facts: the facts.
            fence: number of the lock.

        Raises:
            ResumeConflict: see `compare`.
        """
        if self.compare(facts):
            return False
        self.write(facts_name(fence), facts)
        for name, number in facts_names(self._names()).items():
            if number < fence:
                self.store.delete(join(self.uri, name))
        for name in self._names():  # of a run that saved no checkpoint
            if name == HISTORY_FILE or name.startswith(TRACKED_PREFIX):
                self.store.delete(join(self.uri, name))
        return True

    def history(self) -> list[Epoch]:
        """The epochs so far.

        Raises:
            DataError: `history.csv` is damaged.
        """
        uri = join(self.uri, HISTORY_FILE)
        try:
            return read_history(self.store.read_bytes(uri), uri=uri)
        except FileNotFoundError:
            return []

    def found_batch(self) -> int | None:
        """The global batch that was found for this run and written down; None: there is none."""
        facts = self.read(facts_name(self.begun_by_number()), RunFacts)
        return None if facts is None else facts.batch_size

    def keep_batch(self, batch_size: int) -> None:
        """Writes the global batch that was found for this run into its facts; call it after `begin`."""
        name = facts_name(self.begun_by_number())
        facts = self.read(name, RunFacts)
        assert facts is not None, "a run that has begun has facts"
        self.write(name, replace(facts, batch_size=batch_size))

    def max_number(self) -> int:
        """The highest number in any name here; 0: there is none."""
        return max((int(match[1]) for name in self._names() if (match := _NUMBERED.match(name))), default=0)

    def begun_by_number(self) -> int:
        """The number of the lock under which the run was begun; 0: it was not."""
        return max(facts_names(self._names()).values(), default=0)

    def compare(self, facts: RunFacts) -> bool:
        """Compares facts with those of the run. Returns whether the run has saved anything yet.

        Raises:
            ResumeConflict: the folder holds a run with other facts; the message shows each difference.
        """
        if not self._is_begun():
            return False
        stored = self.read(facts_name(self.begun_by_number()), RunFacts)
        if stored is None:
            return True
        known = replace(facts, records=stored.records, batch_size=stored.batch_size)
        lines = differences(asdict(known), asdict(stored))
        if facts.records not in (None, stored.records):
            lines.append("data: images were added, removed or changed (names, sizes, times) since the run began")
        if lines:
            shown = "\n  ".join(lines)
            raise ResumeConflict(
                f"{self.uri} holds another run. Choose another --name or use the same settings:\n  {shown}"
            )
        return True

    def _is_begun(self) -> bool:
        return self.result() is not None or bool(self._saved(self.begun_by))

    def _saved(self, kind: re.Pattern[str]) -> list[re.Match[str]]:
        """The objects of a kind that this run saved, and not another run before it."""
        names = self._names()
        matches = [match for name in names if (match := kind.fullmatch(name))]
        return [match for match in matches if int(match["fence"]) >= max(facts_names(names).values(), default=0)]

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes the result, which marks the run as finished; the first result stays."""
        self.store.create_bytes(join(self.uri, "result.json"), documents.encode(dict(result)))

    def newest_checkpoint(self) -> str | None:
        """URI of the complete checkpoint with the most steps, or None."""
        checkpoints = [(int(match["steps"]), int(match["fence"]), match[0]) for match in self._saved(CHECKPOINT)]
        return join(self.uri, max(checkpoints)[2].removesuffix(f"/{STATE_FILE}")) if checkpoints else None

    def clear_attempts(self, *, fence: int) -> None:
        """Deletes the attempts of this driver and of earlier ones, except the one with the newest checkpoint.

        Args:
            fence: number of the lock.
        """
        kept = f"{self.newest_checkpoint()}/"
        attempts = {
            join(self.uri, match[1])
            for name in self._names()
            if (match := ATTEMPT.match(name)) and int(match[2]) <= fence
        }
        for attempt in sorted(attempts):
            if not kept.startswith(f"{attempt}/"):
                self.store.delete_tree(attempt)

    def _names(self) -> list[str]:
        """Names of all objects in the folder, relative to it."""
        return [entry.uri.removeprefix(f"{self.uri}/") for entry in self.store.list_entries(self.uri)]

    def read(self, name: str, kind: type[Document]) -> Document | None:
        """Reads a document of the folder; None if there is none.

        Raises:
            DataError: the document is damaged.
        """
        try:
            return documents.read(self.store, join(self.uri, name), kind)
        except FileNotFoundError:
            return None

    def write(self, name: str, document: Any) -> None:
        """Writes a document into the folder."""
        documents.write(self.store, join(self.uri, name), document)


def attempt_name(fence: int) -> str:
    """The folder of the attempt of the driver that holds the lock `fence`."""
    return f"attempt-{fence:06d}"


# --- listing ---------------------------------------------------------------------------------------------------------


def run_row(folder: Folder) -> InventoryRow | None:
    """The status of a training run, or None if the folder holds none.

    Raises:
        OSError, ValueError, TypeError, LookupError: the folder is damaged.
        ServiceError: the store failed.
    """
    if not is_run(folder) or is_search(folder):
        return None
    result = folder.read("result.json", dict[str, Any])
    facts, driver = folder.facts(), folder.driver() if result is None else None
    history, epochs = _read_history(folder), _epochs_planned(facts)
    is_saved = bool(history) or (result is None and Run(folder.uri).newest_checkpoint() is not None)
    if result is not None:
        done, val, test = result["epochs"], result.get("validation_accuracy"), result.get("test_accuracy")
    else:
        done, val, test = len(history), float(history[-1]["val_accuracy"]) if history else None, None
    return InventoryRow(
        name=folder.name,
        uri=folder.uri,
        state=state_of(is_finished=result is not None, driver=driver, is_saved=is_saved),
        progress=f"{done} of {epochs} epochs" if epochs is not None else "",
        result=_accuracy_in_words(test, val),
        updated_s=folder.updated_with(*folder.folders & {LOCK}) if result is None else folder.updated_s,
        numbers={
            "recipe": facts.recipe if facts is not None else None,
            "epochs_done": done,
            "epochs": epochs,
            "val_accuracy": val,
            "test_accuracy": test,
            **driver_values(driver),
        },
    )


def _read_history(folder: Folder) -> list[dict[str, str]]:
    """The epochs so far."""
    if HISTORY_FILE not in folder.files:
        return []
    return list(csv.DictReader(folder.store.read_bytes(join(folder.uri, HISTORY_FILE)).decode().splitlines()))


def _epochs_planned(facts: RunFacts | None) -> int | None:
    """Epochs of all phases, of which early stopping may skip some. None: not known yet."""
    if facts is None:
        return None
    phases = PhasesConfig(**{name: tuple(values) for name, values in facts.settings["phases"].items()})
    return sum(phase.epochs for phase in phases.in_order())


def _accuracy_in_words(test: float | None, val: float | None) -> str:
    if test is not None:
        return f"test accuracy {test:.4f}"
    return f"validation accuracy {val:.4f} so far" if val is not None else ""
