"""The status of a search, read from its folder (`trials.py`)."""

from collections.abc import Mapping
from typing import Any

from mnist_dist.inventory import (
    LOCK,
    TRIALS,
    Folder,
    InventoryRow,
    RunFacts,
    driver_values,
    is_run,
    is_search,
    state_of,
)
from mnist_dist.store.uris import join
from mnist_dist.tuning.trials import Trial, TrialRecords, TrialsOver, usable

FINALISTS = "finalists"


def search_row(folder: Folder) -> InventoryRow | None:
    """The status of a search, or None if the folder holds none.

    Raises:
        OSError, ValueError, TypeError, LookupError: the folder is damaged.
        ServiceError: the store failed.
    """
    if not is_run(folder) or is_search(folder) is False:
        return None
    result = folder.read("result.json", dict[str, Any])
    facts, driver = folder.facts(), folder.driver() if result is None else None
    trials = (
        _records(folder, TRIALS) if result is None else {}
    )  # the result counts the trials, of which there may be thousands
    finalists = _records(folder, FINALISTS)
    goal = _Goal(facts, folder.read("trials.json", TrialsOver))
    state = state_of(is_finished=result is not None, driver=driver, is_saved=bool(trials))
    if state == "stopped" and goal.is_lost(trials, finalists):
        state = "failed"
    return InventoryRow(
        name=folder.name,
        uri=folder.uri,
        state=state,
        progress=goal.in_words(_counts(trials, result), finalists),
        result=_best_in_words(trials, result),
        updated_s=folder.updated_with(*folder.folders & {TRIALS, FINALISTS, LOCK}),
        numbers={
            "recipe": facts.recipe if facts is not None else None,
            **_counts(trials, result),
            "trials": goal.trials,
            "finalists_done": len(finalists),
            "finalists": goal.finalists,
            "best": _best(trials, result),
            **driver_values(driver),
        },
    )


def _records(folder: Folder, name: str) -> dict[int, Trial]:
    return TrialRecords(join(folder.uri, name), since=folder.facts_number()).read() if name in folder.folders else {}


class _Goal:
    """How many trials and finalists a search will run.

    Args:
        facts: the facts of the search, or None.
        over: content of `trials.json`, or None while trials remain.
    """

    def __init__(self, facts: RunFacts | None, over: TrialsOver | None) -> None:
        search = facts.settings["search"] if facts is not None else {}
        self.trials: int | None = over.trials if over is not None else search.get("trials")
        self.finalists: int | None = len(over.finalists) if over is not None else search.get("finalists")
        self._is_exact = (
            over is not None or search.get("algorithm") != "grid"
        )  # a grid may have fewer trials than requested

    def is_lost(self, trials: Mapping[int, Trial], finalists: Mapping[int, Trial]) -> bool:
        """Whether everything was tried and nothing succeeded, so that the same command would only fail again."""
        if any(trial.status == "running" for trial in trials.values()):
            return False
        good = usable(trials.values())[: self.finalists]
        if not good:
            return self._is_exact and self.trials is not None and len(trials) >= self.trials
        return all(trial.number in finalists for trial in good) and not usable(finalists.values())

    def in_words(self, counts: Mapping[str, int], finalists: Mapping[int, Trial]) -> str:
        """The progress in words, such as `12 of 30 trials, 1 failed; 1 of 3 finalists`."""
        if self.trials is None:
            return ""
        words = f"{counts['trials_done']} of {'' if self._is_exact else 'at most '}{self.trials} trials"
        if counts["trials_failed"]:
            words += f", {counts['trials_failed']} failed"
        return f"{words}; {len(finalists)} of {self.finalists} finalists" if finalists else words


def _counts(trials: Mapping[int, Trial], result: Mapping[str, Any] | None) -> dict[str, int]:
    """The number of ended trials (failed ones included), and of failed trials."""
    if result is not None:
        return {"trials_done": result["trials"], "trials_failed": result["failed"]}
    status = [trial.status for trial in trials.values()]
    return {"trials_done": len(status) - status.count("running"), "trials_failed": status.count("failed")}


def _best(trials: Mapping[int, Trial], result: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The winner, or the best trial so far."""
    if result is not None:
        return {name: result["best"][name] for name in ("trial", "val_accuracy", "test_accuracy")}
    good = usable(trials.values())
    return {"trial": good[0].number, "val_accuracy": good[0].val_accuracy, "test_accuracy": None} if good else None


def _best_in_words(trials: Mapping[int, Trial], result: Mapping[str, Any] | None) -> str:
    best = _best(trials, result)
    if best is None:
        return ""
    words = f"trial {best['trial']}: validation accuracy {best['val_accuracy']:.4f}"
    return f"{words} so far" if result is None else f"{words}, test accuracy {best['test_accuracy']:.4f}"
