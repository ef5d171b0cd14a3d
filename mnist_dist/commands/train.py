"""mnist-dist train [RECIPE] [--flags]: fine-tunes a classifier on Ray Train and writes it as a bundle.

mnist-dist train --list [--storage URI]: lists the training runs in a storage.
"""

from collections.abc import Sequence
from typing import Any

from mnist_dist import command_line, console, inventory
from mnist_dist.config import TrainJob
from mnist_dist.recipes import TRAINING_RECIPES


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line, trains and shows the result; returns the job's JSON keys."""
    listing = inventory.asked(program, arguments)
    if listing is not None:
        return show_runs(listing)
    recipe, job = command_line.parse(
        TRAINING_RECIPES, argv=arguments, command=program, default="quickstart", also=inventory.HELP
    )
    shown = console.Console(verbose=job.run.verbose)
    console.quiet(verbose=job.run.verbose)
    result = run(job, recipe, shown)
    if job.run.plan:
        return result
    shown.line(
        f"test accuracy {result['test_accuracy']:.4f}, loss {result['test_loss']:.4f} on {result['test_images']:,} "
        f"images; {result['epochs']} epochs in {result['seconds']:.0f} s"
    )
    if result["bundle"] is not None:
        shown.line(f"bundle: {result['bundle']}\nreport: {result['report']}")
    return result


def run(job: TrainJob, recipe: str, shown: console.Console) -> dict[str, Any]:
    """Trains, or forecasts if the job is a plan; returns the job's JSON keys. Ray is imported here, after `quiet`."""
    if job.run.plan:
        from mnist_dist.on_ray.training.plan import plan_train

        return plan_train(job, recipe=recipe, console=shown)
    from mnist_dist.on_ray.training.train import train

    return train(job, recipe=recipe, console=shown)


def show_runs(listing: inventory.ListJob) -> dict[str, Any]:
    """Shows the training runs below a storage; returns the job's JSON keys."""
    from mnist_dist.training.runs import run_row  # Imported here because training imports it only when it starts.

    rows = inventory.rows_below(listing.storage, run_row)
    return inventory.show(rows, job=listing, what="training runs", console=console.Console(verbose=listing.verbose))
