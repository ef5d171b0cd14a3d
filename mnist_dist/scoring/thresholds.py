"""The thresholds of multi-label models: from which probability on a class is one of an image's predicted classes.

Owns: what `--threshold` means, and the files that it names. Does not own: the rows that follow from it
(`predictions`), or which thresholds are good (`evaluation/multi_label.py`, which writes such a file).

Thresholds are compared with probabilities as float32; so they are kept as the shortest decimal number with the same
float32, and files that differ in form only make the same rows.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mnist_dist.config import DEFAULT_THRESHOLD
from mnist_dist.errors import ConfigError, first_line, suggestion
from mnist_dist.models.bundle import BundleInfo
from mnist_dist.score_config import ScoreJob
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.surroundings import what_is_there

CLASS, THRESHOLD = "class", "threshold"
"""The columns of a file of thresholds."""
_MAX_SHOWN = 5


def with_thresholds(job: ScoreJob, info: BundleInfo, *, store: Store = ANYWHERE) -> ScoreJob:
    """The job with the threshold of each class, if its bundle is multi-label.

    Args:
        job: a job whose `table.thresholds` are not known yet.
        info: of its bundle.
        store: the store that holds a file of thresholds.

    Raises:
        ConfigError: the bundle is not multi-label and a threshold is given, or the file does not fit the classes.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    given = job.table.threshold
    if not info.multi_label:
        if given is not None:
            raise ConfigError(
                f"threshold needs a multi-label model; each image gets one class of {job.bundle}, the most probable. "
                f"Received: threshold={given!r}"
            )
        return job
    thresholds = (
        read_thresholds(given, info.class_names, store=store)
        if isinstance(given, str)
        else dict.fromkeys(info.class_names, shortest(DEFAULT_THRESHOLD if given is None else given))
    )
    return replace(job, table=replace(job.table, thresholds=thresholds))


def read_thresholds(uri: str, class_names: Sequence[str], *, store: Store = ANYWHERE) -> dict[str, float]:
    """The threshold of each class, in the order of the classes.

    Args:
        uri: a `.csv` or `.parquet` file with the columns `class` and `threshold`, or a `.json` file `{class:
            threshold}`.
        class_names: the names of all classes, each of which must be in the file once.
        store: the store that holds the file.

    Raises:
        ConfigError: there is no such file, it is of another form, or its classes are others.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    read = next((reader for suffix, reader in _READERS.items() if uri.lower().endswith(suffix)), None)
    if read is None:
        raise ConfigError(
            f"threshold must be a number between 0 and 1, or a {', '.join(_READERS)} file with one per class. "
            f"Received: threshold={uri!r}"
        )
    try:
        pairs = list(read(store.read_bytes(uri)))
    except FileNotFoundError as err:
        raise ConfigError(
            f"there is no such file{what_is_there(uri, store=store)}. Received: threshold={uri!r}"
        ) from err
    except (ValueError, KeyError, pa.ArrowException, csv.Error) as err:
        raise ConfigError(
            f"{uri}: thresholds are columns {CLASS} and {THRESHOLD}, or JSON {{class: threshold}}: {first_line(err)}"
        ) from err
    _check_classes(uri, [name for name, _ in pairs], class_names)
    found = {name: _number(uri, name, value) for name, value in pairs}
    return {name: found[name] for name in class_names}


def thresholds_csv(thresholds: Mapping[str, float]) -> bytes:
    """A file that `read_thresholds` reads."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([(CLASS, THRESHOLD), *thresholds.items()])
    return text.getvalue().encode()


def shortest(value: float) -> float:
    """The shortest decimal number that is the same float32."""
    return float(str(np.float32(value)))


def _csv(data: bytes) -> Iterable[tuple[str, object]]:
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    return [(row[CLASS], row[THRESHOLD]) for row in rows]


def _parquet(data: bytes) -> Iterable[tuple[str, object]]:
    table = pq.read_table(pa.BufferReader(data))
    names, values = table[CLASS].cast(pa.string()), table[THRESHOLD]
    return zip(names.to_pylist(), values.to_pylist(), strict=True)


def _json(data: bytes) -> Iterable[tuple[str, object]]:
    def unchanged(pairs: list[tuple[str, object]]) -> list[tuple[str, object]]:  # With names that occur twice.
        return pairs

    text = data.decode("utf-8-sig")
    if not text.lstrip().startswith("{"):
        raise ValueError("not a JSON object")
    return list(json.loads(text, object_pairs_hook=unchanged))


_READERS = {".csv": _csv, ".parquet": _parquet, ".json": _json}


def _check_classes(uri: str, names: Sequence[str], class_names: Sequence[str]) -> None:
    known, found = set(class_names), set(names)
    unknown = [name for name in dict.fromkeys(names) if name not in known]
    wrong = {
        "lacks": [name for name in class_names if name not in found],
        "has the unknown": unknown,
        "has several thresholds for": [name for name, count in Counter(names).items() if count > 1],
    }
    lines = [f"it {what} {_some(which)}" for what, which in wrong.items() if which]
    hinted = [f"{name!r}{hint}" for name in unknown if (hint := suggestion(name, class_names))]
    lines += hinted[:1]
    if lines:
        raise ConfigError(
            f"{uri}: there must be one threshold for each of the {len(class_names)} classes; {'; '.join(lines)}. "
            f"Received: {len(names)} thresholds"
        )


def _number(uri: str, name: str, value: object) -> float:
    try:
        number = shortest(float(str(value)))
    except ValueError:
        number = float("nan")
    if not 0 < number < 1:
        raise ConfigError(f"{uri}: a threshold is a number between 0 and 1. Received: {value!r} for {name!r}")
    return number


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN:,} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(map(repr, names[:_MAX_SHOWN])) + more
