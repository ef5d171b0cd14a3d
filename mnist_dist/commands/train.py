"""mnist-dist train [RECIPE] [--flags]: fine-tunes a classifier on Ray Train and writes it as a bundle.

mnist-dist train --list [--storage URI]: lists the training runs in a storage.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mnist_dist import command_line, console, inventory
from mnist_dist.command_line import given_fields
from mnist_dist.commands.recipe_choice import DEFAULT_TRAINING, Chosen, choose_training
from mnist_dist.config import TrainJob
from mnist_dist.recipes import TRAINING_RECIPES


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line, trains and shows the result; returns the job's JSON keys."""
    listing = inventory.asked(program, arguments)
    if listing is not None:
        return show_runs(listing)
    chosen = _chosen(arguments, program)
    job = chosen.job
    shown = console.Console(verbose=job.run.verbose)
    console.quiet(verbose=job.run.verbose)
    if chosen.why is not None:
        shown.line(chosen.why)
    result = run(job, chosen.recipe, shown)
    if job.run.plan:
        return result
    batch = f" with batch size {result['batch_size']}" if job.fit.batch_size == "auto" else ""
    shown.line(
        f"test {_score(result)}, loss {result['test_loss']:.4f} on {result['test_images']:,} images; "
        f"{_epochs(result['epochs'], job)}{batch} in {result['seconds']:.0f} s"
    )
    if result["bundle"] is not None:
        shown.line(f"bundle: {result['bundle']}\nreport: {result['report']}")
        scoring = f"{program.removesuffix('train')}score --bundle {shlex.quote(result['bundle'])}"
        shown.line(f"score images with it: {scoring} --input YOUR_IMAGES --output predictions")
    return result


def _epochs(done: int, job: TrainJob) -> str:
    """How many epochs were trained, and why not all."""
    planned = sum(phase.epochs for phase in job.phases.in_order())
    if done == planned or job.run.dry_run:
        return f"{done} epochs"
    return f"{done} of {planned} epochs, since the validation loss did not improve further (early stopping),"


def _score(result: Mapping[str, Any]) -> str:
    """How good the model is, by the measure of its kind."""
    average_precision = result.get("test_mean_average_precision")
    if average_precision is None:
        return f"accuracy {result['test_accuracy']:.4f}"
    return f"mAP {average_precision:.4f}, exact match {result['test_accuracy']:.4f}"


def _chosen(arguments: Sequence[str], program: str) -> Chosen:
    """Parses the command line; where it names no recipe, a second time with the one that fits its data."""
    named = bool(arguments) and not arguments[0].startswith("-")

    def build(recipe: str | None) -> TrainJob:
        argv = arguments if named or recipe is None else [recipe, *arguments]
        return command_line.parse(
            TRAINING_RECIPES, argv=argv, command=program, default=DEFAULT_TRAINING, also=inventory.HELP
        )[1]

    return choose_training(build, recipe=arguments[0] if named else None, flags=given_fields(arguments))


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
