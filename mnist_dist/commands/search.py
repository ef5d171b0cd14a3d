"""mnist-dist search [RECIPE] [--flags]: searches hyperparameters on Ray Tune; writes the winner as a bundle.

mnist-dist search --list [--storage URI]: lists the searches in a storage.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mnist_dist import command_line, console, inventory
from mnist_dist.command_line import given_fields
from mnist_dist.commands.recipe_choice import DEFAULT_SEARCH, check_fits
from mnist_dist.recipes import SEARCH_RECIPES
from mnist_dist.search_config import SearchJob

if TYPE_CHECKING:
    from mnist_dist.tuning.space_file import Stated


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line, searches and shows the winner; returns the job's JSON keys."""
    listing = inventory.asked(program, arguments)
    if listing is not None:
        return show_searches(listing)
    recipe, job = command_line.parse(
        SEARCH_RECIPES, argv=arguments, command=program, default=DEFAULT_SEARCH, also=inventory.HELP
    )
    check_fits(recipe, job.data, job.store, flags=given_fields(arguments))
    shown = console.Console(verbose=job.run.verbose)
    console.quiet(verbose=job.run.verbose)
    job = with_stated_space(job, job.search.space, recipe=recipe, given=given_fields(arguments))
    result = run(job, recipe, shown)
    if job.run.plan or job.run.dry_run:
        return result
    _show(result, shown)
    return result


def _show(result: Mapping[str, Any], shown: console.Console) -> None:
    """Shows the winner, and what was combined with it."""
    best, combined = result["best"], result.get("combined") or {"is_bundle": False}
    is_combined = combined["is_bundle"]
    what = f" in a combination ({combined['method']} of the trials {combined['members']})" if is_combined else ""
    shown.line(
        f"winner: trial {best['trial']}{what}, validation accuracy {best['val_accuracy']:.4f}, test accuracy "
        f"{best['test_accuracy']:.4f}, loss {best['test_loss']:.4f}; {result['trials']} trials in "
        f"{result['seconds']:.0f} s\nleaderboard: {result['leaderboard']}\nbundle: {result['bundle']}\n"
        f"report: {result['report']}"
    )


def with_stated_space(job: SearchJob, stated: "Stated | None", *, recipe: str, given: Collection[str]) -> SearchJob:
    """The job with the space of a file, or of a dict of the same form; see `with_space`. None: as it is."""
    if stated is None:
        return job
    from mnist_dist.tuning.space_file import with_space  # Imported here because it imports Optuna.

    return with_space(job, stated, base=command_line.find_recipe(SEARCH_RECIPES, recipe)(), given=given)


def run(job: SearchJob, recipe: str, shown: console.Console) -> dict[str, Any]:
    """Searches, forecasts or rehearses; returns the job's JSON keys. Ray is imported here, after `quiet`."""
    if job.run.plan:
        from mnist_dist.on_ray.search.plan import plan_search

        return plan_search(job, recipe=recipe, console=shown)
    if job.run.dry_run:
        from mnist_dist.on_ray.search.dry_run import dry_run

        return dry_run(job, recipe=recipe, console=shown)
    from mnist_dist.on_ray.search.search import search

    return search(job, recipe=recipe, console=shown)


def show_searches(listing: inventory.ListJob) -> dict[str, Any]:
    """Shows the searches below a storage; returns the job's JSON keys."""
    from mnist_dist.tuning.search_row import search_row  # Imported here because searching does not need it.

    rows = inventory.rows_below(listing.storage, search_row)
    return inventory.show(rows, job=listing, what="searches", console=console.Console(verbose=listing.verbose))
