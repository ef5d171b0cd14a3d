"""python -m benchmarks WHAT [--flags]: measures figures; WHAT is a name of `BENCHMARKS`."""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from benchmarks import decode, features, feed, imported, listing, model, race, reference, score, search, train
from benchmarks.decode import DecodeBenchmark
from benchmarks.features import FeaturesBenchmark
from benchmarks.feed import FeedBenchmark
from benchmarks.imported import ImportedBenchmark
from benchmarks.listing import ListingBenchmark
from benchmarks.model import ModelBenchmark
from benchmarks.race import RaceBenchmark
from benchmarks.reference import ReferenceBenchmark
from benchmarks.score import ScoreBenchmark
from benchmarks.search import SearchBenchmark
from benchmarks.train import TrainBenchmark
from mnist_dist import command_line, console

BENCHMARKS: Mapping[str, type[Any]] = {
    "train": TrainBenchmark,
    "score": ScoreBenchmark,
    "model": ModelBenchmark,
    "feed": FeedBenchmark,
    "search": SearchBenchmark,
    "race": RaceBenchmark,
    "features": FeaturesBenchmark,
    "reference": ReferenceBenchmark,
    "listing": ListingBenchmark,
    "decode": DecodeBenchmark,
    "imported": ImportedBenchmark,
}
"""What to measure, by name; each module has `measure` and `table`."""
MODULES: Mapping[str, ModuleType] = {
    each.__name__: each
    for each in (train, score, model, feed, search, race, features, reference, listing, decode, imported)
}


def main() -> dict[str, Any]:
    """Parses the command line, measures and prints the table; returns the job's JSON keys."""
    _, benchmark = command_line.parse(BENCHMARKS, argv=sys.argv[1:], command="python -m benchmarks", default="train")
    module, shown = MODULES[type(benchmark).__module__], console.Console(verbose=benchmark.verbose)
    console.quiet(verbose=benchmark.verbose)
    result: dict[str, Any] = module.measure(benchmark, console=shown)
    found = module.table(result)
    if isinstance(found, str):
        shown.line(found)
    else:
        shown.table(found)
    return result


if __name__ == "__main__":
    console.run(main, job="benchmark")
