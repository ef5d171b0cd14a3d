"""The results of an earlier search that the sampler of a new one knows from the start (`--like`).

```
<storage>/<name>/like-000017.json  what was taken from the earlier search: written when the new one begins
```

The number is that of `run-000017.json`. A resumed search reads this file, and never the earlier search again.
"""

from dataclasses import dataclass, replace

from mnist_dist.config import require
from mnist_dist.errors import ConfigError
from mnist_dist.inventory import facts_names
from mnist_dist.search_config import SearchJob
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute, join
from mnist_dist.tuning.space import KnownResult, is_in_space
from mnist_dist.tuning.trials import TrialRecords, usable


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What is known from an earlier search."""

    search: str
    """URI of its folder."""
    results: tuple[KnownResult, ...]
    outside: int
    """Number of its finished trials that the new space does not hold."""

    def __str__(self) -> str:
        left_out = f"; {self.outside} more lie outside of this space" if self.outside else ""
        return f"known from {self.search}: {len(self.results)} trials{left_out}"

    def within(self, job: SearchJob) -> "WarmStart":
        """What of it the space of a search holds.

        Raises:
            ConfigError: nothing.
        """
        inside = tuple(result for result in self.results if is_in_space(result.params, job))
        outside = self.outside + len(self.results) - len(inside)
        if not inside:
            raise ConfigError(
                f"none of the {outside} finished trials of {self.search} lies in the space of this search, which can "
                f"learn nothing from them; drop --like. Received: like={job.search.like!r}"
            )
        return replace(self, results=inside, outside=outside)


def warm_start_name(number: int) -> str:
    """The name of the file in the folder of a search that was begun under a lock of this number."""
    return f"like-{number:06d}.json"


def read_warm_start(job: SearchJob) -> WarmStart:
    """Reads the finished trials of the earlier search that `--like` names.

    Raises:
        ConfigError: there is no such search, or this space holds none of its finished trials.
    """
    assert job.search.like is not None
    uri = _uri(job.search.like, storage=job.run.storage)
    entries = (entry.uri.removeprefix(f"{uri}/") for entry in ANYWHERE.list_entries(uri))
    begun_by = max(facts_names(entries).values(), default=0)
    finished = usable(TrialRecords(join(uri, "trials"), since=begun_by).read().values())
    require(
        bool(finished),
        f"--like needs the folder of a search with finished trials; {uri} has none (`search --list` shows searches)",
        like=job.search.like,
    )
    results = [
        KnownResult(params=trial.params, val_accuracy=trial.val_accuracy)
        for trial in sorted(finished, key=lambda trial: trial.number)
        if trial.val_accuracy is not None
    ]
    return WarmStart(search=uri, results=tuple(results), outside=0).within(job)


def _uri(like: str, *, storage: str) -> str:
    """A plain name is that of a folder in the storage; everything else is a URI or a path."""
    return absolute(like) if "/" in like else join(absolute(storage), like)
