"""python -m jobs.benchmark train|score|search|seeds|listing [--flags]: measures the figures that the README states."""

from collections.abc import Callable, Mapping
from typing import Any

from mnist_dist import console
from mnist_dist.benchmarks import listing, score, search, seeds, train
from mnist_dist.benchmarks.listing import ListingBenchmark
from mnist_dist.benchmarks.score import ScoreBenchmark
from mnist_dist.benchmarks.search import SearchBenchmark
from mnist_dist.benchmarks.seeds import SeedsBenchmark
from mnist_dist.benchmarks.train import TrainBenchmark

Benchmark = TrainBenchmark | ScoreBenchmark | SearchBenchmark | SeedsBenchmark | ListingBenchmark
BENCHMARKS: Mapping[str, Callable[..., Benchmark]] = {
    "train": TrainBenchmark,
    "score": ScoreBenchmark,
    "search": SearchBenchmark,
    "seeds": SeedsBenchmark,
    "listing": ListingBenchmark,
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
    elif isinstance(benchmark, SeedsBenchmark):
        result = seeds.measure(benchmark, console=shown)
        shown.line(seeds.table(result))
    elif isinstance(benchmark, ListingBenchmark):
        result = listing.measure(benchmark, console=shown)
        shown.table(listing.table(result))
    else:
        result = train.measure(benchmark, console=shown)
        shown.line(train.table(result))
    return result


if __name__ == "__main__":
    console.run(main, job="benchmark")
