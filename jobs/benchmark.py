"""python -m jobs.benchmark train [--flags]: measures what the README states, with its peers, in one run."""

from typing import Any

from mnist_dist import console
from mnist_dist.benchmarks.train import TrainBenchmark, measure, table


def main() -> dict[str, Any]:
    """Parses, measures, prints the table; returns the job's JSON keys."""
    _, benchmark = console.parse({"train": TrainBenchmark}, command="python -m jobs.benchmark", default="train")
    shown = console.Console(verbose=benchmark.verbose)
    console.quiet(verbose=benchmark.verbose)
    result = measure(benchmark, console=shown)
    shown.line(table(result))
    return result


if __name__ == "__main__":
    console.run(main, job="benchmark")
