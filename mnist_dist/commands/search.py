"""mnist-dist search [RECIPE] [--flags]: searches hyperparameters on Ray Tune; writes the winner as a bundle.

mnist-dist search --list [--storage URI]: lists the searches in a storage.
"""

from collections.abc import Sequence
from typing import Any

from mnist_dist import console, inventory
from mnist_dist.commands.recipe_choice import DEFAULT_SEARCH, check_fits, flags_of
from mnist_dist.recipes import SEARCH_RECIPES


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line, searches and shows the winner; returns the job's JSON keys."""
    listing = inventory.asked(program, arguments)
    if listing is not None:
        return show_searches(listing)
    recipe, job = console.parse(
        SEARCH_RECIPES, argv=arguments, command=program, default=DEFAULT_SEARCH, also=inventory.HELP
    )
    check_fits(recipe, job.data, job.store, flags=flags_of(arguments))
    shown = console.Console(verbose=job.run.verbose)
    console.quiet(verbose=job.run.verbose)
    from mnist_dist.on_ray.search.search import search  # After `quiet`: Ray reads the environment on import.

    result = search(job, recipe=recipe, console=shown)
    best = result["best"]
    shown.line(
        f"winner: trial {best['trial']}, validation accuracy {best['val_accuracy']:.4f}, test accuracy "
        f"{best['test_accuracy']:.4f}, loss {best['test_loss']:.4f}; {result['trials']} trials in "
        f"{result['seconds']:.0f} s\nleaderboard: {result['leaderboard']}\nbundle: {result['bundle']}\n"
        f"report: {result['bundle']}/report.html"
    )
    return result


def show_searches(listing: inventory.ListJob) -> dict[str, Any]:
    """Shows the searches below a storage; returns the job's JSON keys."""
    from mnist_dist.tuning.search_row import search_row  # Imported here because searching does not need it.

    rows = inventory.rows_below(listing.storage, search_row)
    return inventory.show(rows, job=listing, what="searches", console=console.Console(verbose=listing.verbose))
