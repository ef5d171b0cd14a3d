"""python -m jobs.benchmark train|score|search [--flags]: measures the README's figures and its peers, in one run."""

from collections.abc import Callable, Mapping
from typing import Any

from mnist_dist import console
from mnist_dist.benchmarks import score, search, train
from mnist_dist.benchmarks.score import ScoreBenchmark
from mnist_dist.benchmarks.search import SearchBenchmark
from mnist_dist.benchmarks.train import TrainBenchmark

BENCHMARKS: Mapping[str, Callable[..., TrainBenchmark | ScoreBenchmark | SearchBenchmark]] = {
    "train": TrainBenchmark,
    "score": ScoreBenchmark,
    "search": SearchBenchmark,
}


def main() -> dict[str, Any]:
    """Parses, measures, prints the table; returns the job's JSON keys."""
    _, benchmark = console.parse(BENCHMARKS, command="python -m jobs.benchmark", default="train")
    shown = console.Console(verbose=benchmark.verbose)
    console.quiet(verbose=benchmark.verbose)
    if isinstance(benchmark, ScoreBenchmark):
        result = score.measure(benchmark, console=shown)
        shown.line(score.table(result))
    elif isinstance(benchmark, SearchBenchmark):
        result = search.measure(benchmark, console=shown)
        shown.line(search.table(result))
    else:
        result = train.measure(benchmark, console=shown)
        shown.line(train.table(result))
    return result


if __name__ == "__main__":
    console.run(main, job="benchmark")
