"""python -m benchmarks WHAT [--flags]: measures figures; WHAT is a name of `BENCHMARKS`."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import decode, features, imported, listing, race, reference, score, search, train
from benchmarks.decode import DecodeBenchmark
from benchmarks.features import FeaturesBenchmark
from benchmarks.imported import ImportedBenchmark
from benchmarks.listing import ListingBenchmark
from benchmarks.race import RaceBenchmark
from benchmarks.reference import ReferenceBenchmark
from benchmarks.score import ScoreBenchmark
from benchmarks.search import SearchBenchmark
from benchmarks.train import TrainBenchmark
from mnist_dist import command_line, console

Benchmark = (
    TrainBenchmark
    | ScoreBenchmark
    | SearchBenchmark
    | RaceBenchmark
    | FeaturesBenchmark
    | ReferenceBenchmark
    | ListingBenchmark
    | DecodeBenchmark
    | ImportedBenchmark
)
BENCHMARKS: Mapping[str, Callable[..., Benchmark]] = {
    "train": TrainBenchmark,
    "score": ScoreBenchmark,
    "search": SearchBenchmark,
    "race": RaceBenchmark,
    "features": FeaturesBenchmark,
    "reference": ReferenceBenchmark,
    "listing": ListingBenchmark,
    "decode": DecodeBenchmark,
    "imported": ImportedBenchmark,
}


def main() -> dict[str, Any]:
    """Parses the command line, measures and prints the table; returns the job's JSON keys."""
    _, benchmark = command_line.parse(BENCHMARKS, argv=sys.argv[1:], command="python -m benchmarks", default="train")
    shown = console.Console(verbose=benchmark.verbose)
    console.quiet(verbose=benchmark.verbose)
    if isinstance(benchmark, ScoreBenchmark):
        result = score.measure(benchmark, console=shown)
        shown.line(score.table(result))
    elif isinstance(benchmark, SearchBenchmark):
        result = search.measure(benchmark, console=shown)
        shown.line(search.table(result))
    elif isinstance(benchmark, RaceBenchmark):
        result = race.measure(benchmark, console=shown)
        shown.line(race.table(result))
    elif isinstance(benchmark, FeaturesBenchmark):
        result = features.measure(benchmark, console=shown)
        shown.line(features.table(result))
    elif isinstance(benchmark, ReferenceBenchmark):
        result = reference.measure(benchmark, console=shown)
        shown.line(reference.table(result))
    elif isinstance(benchmark, ListingBenchmark):
        result = listing.measure(benchmark, console=shown)
        shown.table(listing.table(result))
    elif isinstance(benchmark, DecodeBenchmark):
        result = decode.measure(benchmark, console=shown)
        shown.line(decode.table(result))
    elif isinstance(benchmark, ImportedBenchmark):
        result = imported.measure(benchmark, console=shown)
        shown.line(imported.table(result))
    else:
        result = train.measure(benchmark, console=shown)
        shown.line(train.table(result))
    return result


if __name__ == "__main__":
    console.run(main, job="benchmark")
