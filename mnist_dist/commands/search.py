"""mnist-dist search [RECIPE] [--flags]: searches hyperparameters on Ray Tune; hands over the winner as a bundle.

mnist-dist search --list [--storage URI]: the searches below a storage.
"""

from collections.abc import Sequence
from typing import Any

from mnist_dist import console, inventory
from mnist_dist.recipes import SEARCH_RECIPES


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses, searches, says what won; returns the job's JSON keys."""
    asked = inventory.asked(program, arguments)
    if asked is not None:
        return show_searches(asked)
    recipe, job = console.parse(
        SEARCH_RECIPES, argv=arguments, command=program, default="search-digits", also=inventory.HELP
    )
    shown = console.Console(verbose=job.run.verbose)
    console.quiet(verbose=job.run.verbose)
    from mnist_dist.on_ray.search.search import search  # after `quiet`: Ray reads the environment when it is imported

    result = search(job, recipe=recipe, console=shown)
    best = result["best"]
    shown.line(
        f"winner: trial {best['trial']}, validation accuracy {best['val_accuracy']:.4f}, test accuracy "
        f"{best['test_accuracy']:.4f}, loss {best['test_loss']:.4f}; {result['trials']} trials in "
        f"{result['seconds']:.0f} s\nleaderboard: {result['leaderboard']}\nbundle: {result['bundle']}\n"
        f"report: {result['bundle']}/report.html"
    )
    return result


def show_searches(asked: inventory.ListJob) -> dict[str, Any]:
    """Shows the searches below a storage; returns the job's JSON keys."""
    from mnist_dist.tuning.search_row import search_row  # only here: who searches need not wait for it

    rows = inventory.rows_below(asked.storage, search_row)
    return inventory.show(rows, job=asked, what="searches", console=console.Console(verbose=asked.verbose))
