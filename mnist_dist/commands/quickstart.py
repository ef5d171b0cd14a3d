"""python -m jobs.quickstart: trains a small CNN on scikit-learn's digits with two Ray Train workers, then scores."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mnist_dist import command_line, console
from mnist_dist.commands.score import how_to_read
from mnist_dist.console import Stop
from mnist_dist.environment import KERAS_BACKENDS
from mnist_dist.recipes import quickstart
from mnist_dist.score_config import InputConfig, ScoreJob, ScoreRunConfig
from mnist_dist.session import seconds_since, started_at
from mnist_dist.sources.arrays import write_digits
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

SCORED_IMAGES = 500
# Said before each part that shows nothing for a while. The times were measured on two cores.
STARTS = f"Training a classifier of digits and scoring {SCORED_IMAGES} images, about a minute in all. Ray starts: 10 s"
TRAINS = "1 of 2, training: two workers start and load TensorFlow, about 25 s; then 15 epochs, about 10 s"
SCORES = f"2 of 2, scoring: a process starts and loads the model, about 10 s; then {SCORED_IMAGES} images, under 1 s"


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Trains a small CNN on scikit-learn's digits with two Ray Train workers, then scores an archive of images with it;
    takes about a minute."""

    storage: str = "runs"
    """Folder or bucket prefix for the run."""
    verbose: bool = False
    """Show the output of Ray and TensorFlow."""


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line, trains, scores and suggests next steps; returns the job's JSON keys."""
    _, options = command_line.parse({"quickstart": Quickstart}, argv=arguments, command=program, default="quickstart")
    shown = console.Console(verbose=options.verbose)
    console.quiet(verbose=options.verbose)
    from mnist_dist.on_ray.cluster import check_environment, connected  # After `quiet`: Ray reads the environment.
    from mnist_dist.on_ray.scoring.score import score
    from mnist_dist.on_ray.training.train import train

    job = quickstart()
    job = replace(job, run=replace(job.run, storage=options.storage, name="quickstart", verbose=options.verbose))
    began_at = started_at(shown)
    check_environment(backends=KERAS_BACKENDS)
    shown.line(STARTS)
    with Stop(shown) as stop, connected(verbose=options.verbose, stop=stop):
        shown.line(TRAINS)
        trained = train(job, recipe="quickstart", console=shown)
        images = join(trained["run_dir"], "digits.tar")
        if not ANYWHERE.exists(images):  # A new archive would count as changed input when scoring resumes.
            write_digits(images, count=SCORED_IMAGES)
        stop.check()
        shown.line(SCORES)
        scoring = ScoreJob(
            bundle=trained["bundle"],
            inputs=InputConfig(input=(images,)),
            output=join(trained["run_dir"], "predictions"),
            run=ScoreRunConfig(verbose=options.verbose),
        )
        scored = score(scoring, console=shown)
    shown.line(_what_was_made(trained, scored, command=program.removesuffix("quickstart")))
    made = {"predictions": scored["output"], "images_scored": scored["images"], "seconds": seconds_since(began_at)}
    return {**trained, **made}


def _what_was_made(trained: dict[str, Any], scored: dict[str, Any], *, command: str) -> str:
    bundle, output = trained["bundle"], scored["output"]
    typed = shlex.quote(bundle)
    return f"""
Made: a classifier of handwritten digits, {trained["test_accuracy"]:.1%} correct on {trained["test_images"]} unseen \
digits, and a table with its prediction for each of {scored["images"]} images.
  {trained["report"]}       report with its metrics, for a browser
  {bundle}/model.keras       load it with plain keras.saving.load_model
  {bundle}/bundle.json       classes, metrics, versions, configuration
  {output}/table/*.parquet       uri, status, predicted_class, confidence, probabilities, ...

Try next:
{chr(10).join(how_to_read(output))}
  {command}score --bundle {typed} --input YOUR_IMAGES --output predictions
  {command}train mnist-cnn --data-dir FOLDER  # MNIST from its idx files
  {command}train folder-mobilenet-v2 --data FOLDER  # your own images, one subfolder per class
  {command}search search-digits  # search networks and their settings
  {command}score --help"""
