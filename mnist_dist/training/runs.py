"""The folder of a training run: what decides the result, what was reached so far, the result.

```
run.json           recipe, settings and data fingerprint: written first, compared when the run goes on
attempt-0001/      checkpoints of one driver's life (checkpoint-000000123/..., each complete once it has state.json)
history.csv        a line for each epoch so far
bundle/            the model
result.json        written last
```
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
from mnist_dist.inventory import Folder, InventoryRow, RunFacts, driver_values, is_run, is_search, state_of
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import join
from mnist_dist.training.checkpoints import STATE_FILE

ATTEMPT = re.compile(r"(attempt-(\d+))/")
CHECKPOINT = re.compile(r"attempt-(\d+)/checkpoint-(\d+)/" + re.escape(STATE_FILE) + "$")


@dataclass(frozen=True)
class Run:
    """One run, by the URI of its folder."""

    uri: str
    begun_by: re.Pattern[str] = CHECKPOINT
    """A run that has saved no object of such a name binds nobody: its command may have been refused."""
    store: Store = ANYWHERE

    @property
    def lock_uri(self) -> str:
        return join(self.uri, "lock")

    @property
    def bundle(self) -> str:
        return join(self.uri, "bundle")

    def result(self) -> dict[str, Any] | None:
        """The result where the run is finished, else None."""
        return self.read("result.json", dict[str, Any])

    def begin(self, facts: RunFacts) -> bool:
        """Notes what decides the result; True: the run is new, False: it goes on.

        Raises:
            ResumeConflict: see `compare`.
        """
        if self.compare(facts):
            return False
        self.write("run.json", facts)
        return True

    def compare(self, facts: RunFacts) -> bool:
        """Holds facts against those of the run, where it has saved something already; whether so.

        Raises:
            ResumeConflict: the folder holds a run of other facts; the message shows each difference.
        """
        if not self._is_begun():
            return False
        there = self.read("run.json", RunFacts)
        if there is None:
            return True
        lines = differences(asdict(replace(facts, records=there.records)), asdict(there))
        if facts.records not in (None, there.records):
            lines.append("data: images were added, removed or touched (names, sizes, times) since the run began")
        if lines:
            shown = "\n  ".join(lines)
            raise ResumeConflict(
                f"{self.uri} holds another run (take another --name, or the same settings):\n  {shown}"
            )
        return True

    def _is_begun(self) -> bool:
        return self.result() is not None or any(self.begun_by.fullmatch(name) for name in self._names())

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes the result: the run is finished."""
        self.write("result.json", result)

    def newest_checkpoint(self) -> str | None:
        """URI of the complete checkpoint that is furthest, or None."""
        found = [
            (int(match[2]), int(match[1]), name) for name in self._names() if (match := CHECKPOINT.fullmatch(name))
        ]
        return join(self.uri, max(found)[2].removesuffix(f"/{STATE_FILE}")) if found else None

    def next_attempt(self) -> str:
        """Name of an attempt that is not there yet."""
        numbers = [int(match[2]) for name in self._names() if (match := ATTEMPT.match(name))]
        return f"attempt-{max(numbers, default=0) + 1:04d}"

    def clear_attempts(self) -> None:
        """Deletes all attempts but the one with the newest checkpoint."""
        kept = f"{self.newest_checkpoint()}/"
        attempts = {join(self.uri, match[1]) for name in self._names() if (match := ATTEMPT.match(name))}
        for attempt in sorted(attempts):
            if not kept.startswith(f"{attempt}/"):
                self.store.delete_tree(attempt)

    def _names(self) -> list[str]:
        """Everything in the folder, relative to it."""
        return [entry.uri.removeprefix(f"{self.uri}/") for entry in self.store.list_entries(self.uri)]

    def read(self, name: str, kind: type[Document]) -> Document | None:
        """A document of the folder, or None.

        Raises:
            DataError: it is damaged.
        """
        try:
            return documents.read(self.store, join(self.uri, name), kind)
        except FileNotFoundError:
            return None

    def write(self, name: str, document: Any) -> None:
        """Puts a document into the folder."""
        documents.write(self.store, join(self.uri, name), document)


# --- listing ---------------------------------------------------------------------------------------------------------


def run_row(folder: Folder) -> InventoryRow | None:
    """How a training run stands; None: the folder holds none.

    Raises:
        OSError, ValueError, TypeError, LookupError: the folder is damaged.
        ServiceError: the storage failed.
    """
    if not is_run(folder) or is_search(folder):
        return None
    facts, driver = folder.read("run.json", RunFacts), folder.driver()
    result = folder.read("result.json", dict[str, Any])
    history, epochs = _read_history(folder), _epochs_asked(facts)
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
        updated_s=folder.updated_s,
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
    if "history.csv" not in folder.files:
        return []
    return list(csv.DictReader(folder.store.read_bytes(join(folder.uri, "history.csv")).decode().splitlines()))


def _epochs_asked(facts: RunFacts | None) -> int | None:
    """Over all phases; where training is stopped early, fewer are done. None: not known yet."""
    if facts is None:
        return None
    phases = PhasesConfig(**{name: tuple(values) for name, values in facts.settings["phases"].items()})
    return sum(phase.epochs for phase in phases.phases())


def _accuracy_in_words(test: float | None, val: float | None) -> str:
    if test is not None:
        return f"test accuracy {test:.4f}"
    return f"validation accuracy {val:.4f} so far" if val is not None else ""
