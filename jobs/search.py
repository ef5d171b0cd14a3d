"""python -m jobs.search [RECIPE] [--flags]: searches hyperparameters on Ray Tune; hands over the winner as a bundle."""

from typing import Any

from mnist_dist import console
from mnist_dist.recipes import SEARCH_RECIPES


def main() -> dict[str, Any]:
    """Parses, searches, says what won; returns the job's JSON keys."""
    recipe, job = console.parse(SEARCH_RECIPES, command="python -m jobs.search", default="search-digits")
    shown = console.Console(verbose=job.run.verbose)
    console.quiet(verbose=job.run.verbose)
    from mnist_dist.on_ray.search import search  # after `quiet`: Ray reads the environment when it is imported

    result = search(job, recipe=recipe, console=shown)
    best = result["best"]
    shown.line(
        f"winner: trial {best['trial']}, validation accuracy {best['val_accuracy']:.4f}, test accuracy "
        f"{best['test_accuracy']:.4f}, loss {best['test_loss']:.4f}; {result['trials']} trials in "
        f"{result['seconds']:.0f} s\nleaderboard: {result['leaderboard']}\nbundle: {result['bundle']}\n"
        f"report: {result['bundle']}/report.html"
    )
    return result


if __name__ == "__main__":
    console.run(main, job="search")
