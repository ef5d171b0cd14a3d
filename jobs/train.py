"""python -m jobs.train [RECIPE] [--flags]: fine-tunes a classifier on Ray Train and writes it as a bundle."""

from typing import Any

from mnist_dist import console
from mnist_dist.recipes import TRAINING_RECIPES


def main() -> dict[str, Any]:
    """Parses, trains, says what came of it; returns the job's JSON keys."""
    recipe, job = console.parse(TRAINING_RECIPES, command="python -m jobs.train", default="quickstart")
    shown = console.Console(verbose=job.run.verbose)
    console.quiet(verbose=job.run.verbose)
    from mnist_dist.on_ray.train import train  # after `quiet`: Ray reads the environment when it is imported

    result = train(job, recipe=recipe, console=shown)
    shown.line(
        f"test accuracy {result['test_accuracy']:.4f}, loss {result['test_loss']:.4f} on {result['test_images']:,} "
        f"images; {result['epochs']} epochs in {result['seconds']:.0f} s"
    )
    if result["bundle"] is not None:
        shown.line(f"bundle: {result['bundle']}\nreport: {result['report']}")
    return result


if __name__ == "__main__":
    console.run(main, job="train")
