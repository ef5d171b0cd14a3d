"""Two tables of predictions over the same images: where they agree, which is better, and what moved.

Owns: the join by URI, and what is counted over it. Does not own: the truth, which is that of the first table.

Memory: 29 bytes for each row of the first table, up to twice that while they are sorted, a batch of the second, and
two numbers for each pair of classes that images moved between.
"""

# n = rows of the first table, m = rows of a batch of the second, s = images that both have predictions of

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.errors import DataError
from mnist_dist.evaluation.tables import (
    PREDICTION_COLUMNS,
    Classes,
    ScoredTable,
    confidences,
    predicted_codes,
)
from mnist_dist.evaluation.truth import Truth
from mnist_dist.evaluation.uri_hashes import Hashes, UriIndex, repeated, uri_hashes

EXACT_BELOW = 25
"""Images on which one alone is right, below which McNemar's test is the exact one."""
_MAX_PAIRS = 100  # of classes that images moved between


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Whether one of two classifiers of the same images is right more often, beyond chance.

    Source: McNemar 1947, Psychometrika 12, 153-157; with Edwards' correction for continuity (1948, Psychometrika 13,
    185-187).
    """

    method: str
    """`exact` (binomial) or `chi-squared` (with correction for continuity)."""
    statistic: float | None
    """Of the chi-squared test, one degree of freedom."""
    p_value: float


@dataclass(frozen=True, kw_only=True)
class ClassMove:
    """Images that the first table says to be of one class, and the second of another."""

    first: str
    second: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Moved:
    """One image that the two tables say different things about."""

    uri: str
    truth: str | None
    first: str
    second: str
    first_confidence: float | None
    second_confidence: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two tables have in common. Counts are of images; an image that is there twice counts where it is first."""

    first: str
    second: str
    """The tables."""
    first_model: str
    second_model: str
    common: int
    """Images that are in both."""
    only_in_first: int
    only_in_second: int
    only_in_first_examples: tuple[str, ...]
    only_in_second_examples: tuple[str, ...]
    duplicates_in_first: int
    duplicates_in_second: int
    compared: int
    """Images that both have predictions of."""
    only_first_ok: int
    """Images in both, that the second has no prediction of."""
    only_second_ok: int
    neither_ok: int
    agreement: float | None
    """Share of the compared ones that both say the same class of."""
    moves: tuple[ClassMove, ...]
    """The pairs of classes with the most images that moved, the most first."""
    moved: tuple[Moved, ...]
    """Images that moved, those first that both are sure of."""
    known: int
    """Compared images with a known truth; what follows is over them."""
    both_right: int
    first_right: int
    """The first alone is right."""
    second_right: int
    both_wrong: int
    mcnemar: McNemar | None

    @property
    def first_accuracy(self) -> float | None:
        """Over the same images as `second_accuracy`."""
        return (self.both_right + self.first_right) / self.known if self.known else None

    @property
    def second_accuracy(self) -> float | None:
        """Over the same images as `first_accuracy`."""
        return (self.both_right + self.second_right) / self.known if self.known else None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **asdict(self),
            "first_accuracy": self.first_accuracy,
            "second_accuracy": self.second_accuracy,
        }


def mcnemar(first_right: int, second_right: int) -> McNemar:
    """The test of the images that one alone is right about.

    Args:
        first_right: images that the first alone is right about.
        second_right: images that the second alone is right about.
    """
    count = first_right + second_right
    if count < EXACT_BELOW:
        tail = sum(math.comb(count, k) for k in range(min(first_right, second_right) + 1)) / 2**count
        return McNemar(method="exact", statistic=None, p_value=min(1.0, 2 * tail))
    statistic = max(abs(first_right - second_right) - 1, 0) ** 2 / count
    # the upper tail of chi-squared with one degree of freedom, which is the square of a normal variable
    return McNemar(method="chi-squared", statistic=statistic, p_value=math.erfc(math.sqrt(statistic / 2)))


def compare_tables(
    first: ScoredTable,
    second: ScoredTable,
    *,
    truth: Truth | None,
    shown: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Comparison:
    """What two tables say about the images that they have in common.

    Args:
        first: read twice where it has images that the second has not.
        second: read once.
        truth: of the first table's images; None: there is none.
        shown: how many images are named, of each kind.
        progress: is told the rows of each batch that was read.

    Raises:
        DataError: a table says no predicted class, or was replaced meanwhile.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    for table in (first, second):
        if not {"predicted_index", "predicted_class", "probabilities"} & set(table.schema.names):
            raise DataError(
                f"{table.uri}: predicted_index, predicted_class or probabilities are what is compared. "
                f"Received: columns {', '.join(table.schema.names)}"
            )
    joint = Classes(tuple(dict.fromkeys(first.classes.names + second.classes.names)))
    rows = _Rows(first, joint, truth, progress)
    pairs = _Pairs(rows, joint, shown)
    for batch in second.batches(("uri", "status", *PREDICTION_COLUMNS)):
        pairs.add(batch, _numbers(batch, second.classes, joint))
        progress(len(batch))
    return pairs.result(first, second)


@dataclass(frozen=True)
class _Numbers:
    """The predictions of some rows: class (of both tables' classes together, -1: none) and confidence (or NaN)."""

    predicted: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]


def _numbers(batch: pa.RecordBatch, classes: Classes, joint: Classes) -> _Numbers:
    codes, confidence = predicted_codes(batch, classes), confidences(batch, classes)
    assert codes is not None, "a column that says the class was looked for"
    ok = pc.equal(batch["status"], "ok").to_numpy(zero_copy_only=False)
    return _Numbers(
        np.where(ok, _joint_codes(classes, joint)[codes], -1).astype(np.int32),
        (np.full(len(batch), np.nan) if confidence is None else confidence).astype(np.float32),
    )


def _joint_codes(classes: Classes, joint: Classes) -> npt.NDArray[np.int32]:
    """Of each class; -1 the last, for none."""
    place = {name: code for code, name in enumerate(joint.names)}
    return np.array([*(place[name] for name in classes.names), -1], np.int32)


class _Rows:
    """The first table, by URI."""

    def __init__(
        self, table: ScoredTable, joint: Classes, truth: Truth | None, progress: Callable[[int], None]
    ) -> None:
        own_codes = _joint_codes(table.classes, joint)
        hashes: list[Hashes] = []
        numbers: list[_Numbers] = []
        truths: list[npt.NDArray[np.int32]] = []
        for batch in table.batches(("uri", "status", *PREDICTION_COLUMNS, *(truth.columns if truth else ()))):
            hashes.append(uri_hashes(batch["uri"]))
            numbers.append(_numbers(batch, table.classes, joint))
            if truth is not None:
                codes = table.classes.codes(truth.labels(batch))
                truths.append(own_codes[np.where(codes < 0, -1, codes)])
            progress(len(batch))
        self.index = UriIndex(hashes)
        count = len(self.index.hashes)
        self.predicted = np.concatenate([np.zeros(0, np.int32), *(part.predicted for part in numbers)])
        self.confidence = np.concatenate([np.zeros(0, np.float32), *(part.confidence for part in numbers)])
        self.truth = np.concatenate(truths) if truths else np.full(count, -1, np.int32)
        self.seen = np.zeros(count, np.bool_)


class _Pairs:
    """Counts over the images that both tables have."""

    def __init__(self, rows: _Rows, joint: Classes, shown: int) -> None:
        self._rows, self._joint, self._shown = rows, joint, shown
        self._counts: Counter[str] = Counter()
        self._moves: Counter[int] = Counter()
        self._strange: list[Hashes] = []  # of the second table alone
        self._strange_examples: list[str] = []
        self._moved = _no_moved()

    def add(self, batch: pa.RecordBatch, numbers: _Numbers) -> None:
        """Rows of the second table."""
        hashes = uri_hashes(batch["uri"])
        places = self._rows.index.places(hashes)
        alone = np.flatnonzero(places < 0)
        self._strange.append(hashes[alone])
        if missing := self._shown - len(self._strange_examples):
            self._strange_examples += batch["uri"].take(pa.array(alone[:missing])).to_pylist()
        found = np.flatnonzero(places >= 0)
        _, firsts = np.unique(places[found], return_index=True)
        new = found[np.sort(firsts)]
        new = new[~self._rows.seen[places[new]]]
        self._counts["duplicates"] += len(found) - len(new)
        self._rows.seen[places[new]] = True
        self._add_pairs(batch["uri"].take(pa.array(new)), places[new], numbers.predicted[new], numbers.confidence[new])

    def _add_pairs(
        self,
        uris: pa.Array,
        places: npt.NDArray[np.int64],
        second: npt.NDArray[np.int32],
        second_confidence: npt.NDArray[np.float32],
    ) -> None:
        first, truth = self._rows.predicted[places], self._rows.truth[places]
        both = (first >= 0) & (second >= 0)
        moved, known = both & (first != second), both & (truth >= 0)
        right, second_right = known & (first == truth), known & (second == truth)
        self._counts.update(
            common=len(places),
            compared=int(both.sum()),
            only_first_ok=int(((first >= 0) & (second < 0)).sum()),
            only_second_ok=int(((first < 0) & (second >= 0)).sum()),
            neither_ok=int(((first < 0) & (second < 0)).sum()),
            moved=int(moved.sum()),
            known=int(known.sum()),
            both_right=int((right & second_right).sum()),
            first_right=int((right & ~second_right).sum()),
            second_right=int((second_right & ~right).sum()),
        )
        rows = np.flatnonzero(moved)
        pairs, counts = np.unique(first[rows].astype(np.int64) * len(self._joint) + second[rows], return_counts=True)
        self._moves.update(dict(zip(pairs.tolist(), counts.tolist(), strict=True)))
        first_confidence = self._rows.confidence[places]
        self._keep(uris, rows, (truth, first, second), (first_confidence, second_confidence))

    def _keep(
        self,
        uris: pa.Array,
        rows: npt.NDArray[np.int64],
        codes: tuple[npt.NDArray[np.int32], ...],
        confidence: tuple[npt.NDArray[np.float32], ...],
    ) -> None:
        if not len(rows) or not self._shown:
            return
        surety = np.nan_to_num(np.minimum(*confidence)[rows], nan=0.0)
        columns = [uris.take(pa.array(rows)), *(values[rows] for values in (*codes, *confidence)), surety]
        both = pa.concat_tables([self._moved, pa.table(columns, schema=self._moved.schema)])
        order = pc.select_k_unstable(
            both, min(self._shown, len(both)), sort_keys=[("surety", "descending"), ("uri", "ascending")]
        )
        self._moved = both.take(order).combine_chunks()

    def result(self, first: ScoredTable, second: ScoredTable) -> Comparison:
        counts, rows = self._counts, self._rows
        strange = sum(map(len, self._strange))
        strange_again = repeated(self._strange)[0]
        only_in_first = len(rows.seen) - rows.index.repeated - counts["common"]
        wrong = counts["known"] - counts["both_right"] - counts["first_right"] - counts["second_right"]
        return Comparison(
            first=first.uri,
            second=second.uri,
            first_model=first.model_id,
            second_model=second.model_id,
            common=counts["common"],
            only_in_first=only_in_first,
            only_in_second=strange - strange_again,
            only_in_first_examples=tuple(self._unseen(first)) if only_in_first else (),
            only_in_second_examples=tuple(dict.fromkeys(self._strange_examples)),
            duplicates_in_first=rows.index.repeated,
            duplicates_in_second=counts["duplicates"] + strange_again,
            compared=counts["compared"],
            only_first_ok=counts["only_first_ok"],
            only_second_ok=counts["only_second_ok"],
            neither_ok=counts["neither_ok"],
            agreement=1 - counts["moved"] / counts["compared"] if counts["compared"] else None,
            moves=tuple(self._class_moves()),
            moved=tuple(self._images_moved()),
            known=counts["known"],
            both_right=counts["both_right"],
            first_right=counts["first_right"],
            second_right=counts["second_right"],
            both_wrong=wrong,
            mcnemar=mcnemar(counts["first_right"], counts["second_right"]) if counts["known"] else None,
        )

    def _class_moves(self) -> Iterator[ClassMove]:
        ranked = sorted(self._moves.items(), key=lambda item: (-item[1], item[0]))
        for pair, images in ranked[:_MAX_PAIRS]:
            first, second = divmod(pair, len(self._joint))
            yield ClassMove(first=self._joint.names[first], second=self._joint.names[second], images=images)

    def _images_moved(self) -> Iterator[Moved]:
        names = self._joint.names
        for row in self._moved.to_pylist():
            yield Moved(
                uri=row["uri"],
                truth=names[row["truth"]] if row["truth"] >= 0 else None,
                first=names[row["first"]],
                second=names[row["second"]],
                first_confidence=_number(row["first_confidence"]),
                second_confidence=_number(row["second_confidence"]),
            )

    def _unseen(self, table: ScoredTable) -> Iterator[str]:
        """Some images that the second table has not."""
        left = self._shown
        for batch in table.batches(("uri",)):
            if not left:
                return
            places = self._rows.index.places(uri_hashes(batch["uri"]))
            rows = np.flatnonzero(~self._rows.seen[places])[:left]
            self._rows.seen[places[rows]] = True
            left -= len(rows)
            yield from dict.fromkeys(batch["uri"].take(pa.array(rows)).to_pylist())


def _no_moved() -> pa.Table:
    columns = {"uri": pa.string(), "truth": pa.int32(), "first": pa.int32(), "second": pa.int32()}
    numbers = dict.fromkeys(("first_confidence", "second_confidence", "surety"), pa.float32())
    return pa.schema({**columns, **numbers}).empty_table()


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
