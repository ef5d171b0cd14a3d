"""python -m jobs.evaluate --predictions URI [--labels FILE] [--compare OTHER]: says what a table is worth."""

from typing import Any

from mnist_dist import console
from mnist_dist.evaluate_config import EvaluateJob


def main() -> dict[str, Any]:
    """Parses, evaluates, shows the short of it; returns the job's JSON keys."""
    _, job = console.parse({"evaluate": EvaluateJob}, command="python -m jobs.evaluate", default="evaluate")
    shown = console.Console(verbose=job.verbose)
    console.quiet(verbose=job.verbose)
    from mnist_dist.evaluation.evaluate import evaluate  # after parsing: `--help` need not wait for scikit-learn

    return evaluate(job, console=shown)


if __name__ == "__main__":
    console.run(main, job="evaluate")
