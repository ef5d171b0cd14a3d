"""python -m jobs.quickstart: trains the small CNN on scikit-learn's digits with two Ray Train workers."""

from dataclasses import dataclass, replace
from typing import Any

from mnist_dist import console
from mnist_dist.recipes import quickstart


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Trains the small CNN on scikit-learn's embedded digits with two Ray Train workers, in about half a minute."""

    storage: str = "runs"
    """Folder or `s3://` prefix under which the run is kept."""
    verbose: bool = False
    """Show what Ray and TensorFlow print."""


def main() -> dict[str, Any]:
    """Parses, trains, says what was made and what to try next; returns the job's JSON keys."""
    _, asked = console.parse({"quickstart": Quickstart}, command="python -m jobs.quickstart", default="quickstart")
    shown = console.Console(verbose=asked.verbose)
    console.quiet(verbose=asked.verbose)
    from mnist_dist.on_ray.train import train  # after `quiet`: Ray reads the environment when it is imported

    job = quickstart()
    job = replace(job, run=replace(job.run, storage=asked.storage, name="quickstart", verbose=asked.verbose))
    result = train(job, recipe="quickstart", console=shown)
    shown.line(
        f"""
Made in {result["seconds"]:.0f} s: a classifier of handwritten digits, {result["test_accuracy"]:.1%} right on \
{result["test_images"]} digits it never saw.
  {result["bundle"]}/model.keras       loads with plain keras.saving.load_model
  {result["bundle"]}/bundle.json       classes, metrics, versions, configuration
  {result["bundle"]}/history.csv       a line an epoch

Try next:
  python -c "import mnist_dist; print(mnist_dist.load_bundle('{result["bundle"]}').predict('digit.png'))"
  python -m jobs.train mnist-cnn --data-dir FOLDER      MNIST from its idx files
  python -m jobs.train folder-mobilenet-v2 --data FOLDER      your own images, one subfolder per class
  python -m jobs.train --help"""
    )
    return result


if __name__ == "__main__":
    console.run(main, job="quickstart")
