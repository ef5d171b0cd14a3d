"""Writes the page of a search into its folder, from what the folder holds.

Owns: which files of the folder the page tells of and links to. Does not own: what it shows
(`evaluation/search_page.py`).
Loads matplotlib and scikit-learn, so a driver imports it when it has something to show.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from mnist_dist.console import command_line
from mnist_dist.evaluation.search_page import FinalTest, SearchFacts, pareto_png, render_search
from mnist_dist.inventory import RunFacts
from mnist_dist.models.bundle import REPORT_FILE
from mnist_dist.models.history import HISTORY_FILE
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join
from mnist_dist.training.runs import Run
from mnist_dist.tuning.trials import Trial

PARETO_FILE = "pareto.png"


def write_pareto(run: Run, trials: Mapping[int, Trial], leaderboard: pa.Table) -> None:
    """Writes the figure of accuracy against speed."""
    ANYWHERE.write_bytes(join(run.uri, PARETO_FILE), pareto_png(trials, leaderboard))


def write_page(
    run: Run,
    facts: RunFacts,
    *,
    trials: Mapping[int, Trial],
    finalists: Mapping[int, Trial],
    leaderboard: pa.Table,
    planned: int,
    worked_s: float,
    validation_images: int,
    test_images: int,
    result: Mapping[str, Any] | None,
    confirm_lock: Callable[[], None],
) -> None:
    """Writes the page.

    Args:
        run: the search's folder.
        facts: recipe and settings.
        trials: all trials.
        finalists: the trained finalists.
        leaderboard: see `make_leaderboard`.
        planned: how many trials were to be run.
        worked_s: how long drivers have worked on the search, s.
        validation_images: number of images that decide.
        test_images: number of images of the test.
        result: of a finished search; None: there is no winner.
        confirm_lock: raises if another driver has taken over; called just before the page is written.
    """
    best = result["best"] if result is not None else {}
    page = render_search(
        SearchFacts(
            name=run.uri.rpartition("/")[2],
            uri=run.uri,
            recipe=facts.recipe,
            command=command_line(),
            planned=planned,
            trials=trials,
            finalists=finalists,
            leaderboard=leaderboard,
            worked_s=worked_s,
            validation_images=validation_images,
            winner=best.get("trial"),
            tested=FinalTest(accuracy=best["test_accuracy"], loss=best["test_loss"], images=test_images)
            if best
            else None,
            combined=result["combined"] if result is not None else None,
            histories={number: Run(join(run.uri, _folder_of(number))).history() for number in finalists},
            links={number: link for number in finalists if (link := _link_to(number, run)) is not None},
            settings=facts.settings,
        )
    )
    confirm_lock()
    ANYWHERE.write_bytes(join(run.uri, REPORT_FILE), page.encode())


def _folder_of(finalist: int) -> str:
    return f"finalists/{finalist:06d}"


def _link_to(finalist: int, run: Run) -> str | None:
    """The report of a finalist, else its epochs, relative to the page; None: there is neither."""
    folder = _folder_of(finalist)
    names = (f"{folder}/bundle/{REPORT_FILE}", f"{folder}/{HISTORY_FILE}")
    return next((name for name in names if ANYWHERE.exists(join(run.uri, name))), None)
