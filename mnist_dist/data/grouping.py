"""Holds out whole groups of records for validation and test.

Owns: the rule. Does not own: what makes a group (`sources/groups.py`), or splits without groups (`splits.py`).

The rule, for the records that the data puts into no other split:

- Groups that share an image (the same pixels) count as one.
- The largest groups come first; those of one size are ordered by a hash of their images, so names do not matter.
- A group goes to the split that is furthest below its fraction of the group's classes, counted with half of the group.
- A class with few groups left goes to the splits that have none of it: to training first. So a class of three groups is
  in every split, and one of a single group is trained on.
"""

# N = records, G = groups

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Split(IntEnum):
    """The splits, as numbers; an image that occurs in two splits is a duplicate in the earlier one."""

    TRAIN, VAL, TEST = range(3)


@dataclass(frozen=True)
class HeldOut:
    """Fraction of each class that each split takes; 0 if the data defines the split."""

    test: float
    val: float


def numbered(names: Sequence[str | None]) -> Ints:
    """Groups as numbers, `int64 [N]`: equal ones for equal names, and one of its own for each None."""
    numbers: dict[str, int] = {}
    return np.array(
        [len(names) + row if name is None else numbers.setdefault(name, row) for row, name in enumerate(names)],
        np.int64,
    )


def hold_out_groups(
    labels: npt.NDArray[np.int32], digests: npt.NDArray[np.bytes_], groups: Ints, held_out: HeldOut
) -> npt.NDArray[np.int8]:
    """The split of each record, `int8 [N]`.

    Args:
        labels: `int32 [N]`.
        digests: `S [N]`, the sha256 of each record's pixels.
        groups: `int64 [N]`, from `numbered`.
        held_out: the fractions.
    """
    if not len(labels):
        return np.empty(0, np.int8)
    images = np.unique(digests, return_inverse=True)[1].astype(np.int64)
    units = np.unique(_joined(groups, images), return_inverse=True)[1].astype(np.int64)
    splits = _Placement(labels, units, held_out)
    return splits.placed(_ordered(units, images, digests))[units]


def _joined(groups: Ints, images: Ints) -> Ints:
    """The groups, where those that share an image have the smallest of their numbers."""
    while True:
        joined = _smallest_of_each(_smallest_of_each(groups, images), groups)
        if np.array_equal(joined, groups):
            return groups
        groups = joined


def _smallest_of_each(values: Ints, keys: Ints) -> Ints:
    """For each place the smallest of the values at places with the same key."""
    _, places = np.unique(keys, return_inverse=True)
    smallest = np.full(places.max(initial=0) + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, places, values)
    return smallest[places]


def _ordered(units: Ints, images: Ints, digests: npt.NDArray[np.bytes_]) -> list[int]:
    """The units, largest first, then by a hash of their images."""
    order = np.lexsort((images, units))
    sizes = np.bincount(units)
    ends = np.cumsum(sizes)
    ordered = digests[order]
    names = [
        hashlib.sha256(ordered[end - size : end].tobytes()).digest() for end, size in zip(ends, sizes, strict=True)
    ]
    return sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], names[unit]))


class _Placement:
    """Which unit goes where.

    Args:
        labels: `int32 [N]`.
        units: `int64 [N]`, 0 to G - 1.
        held_out: the fractions.
    """

    def __init__(self, labels: npt.NDArray[np.int32], units: Ints, held_out: HeldOut) -> None:
        fractions = {Split.TRAIN: 1 - held_out.test - held_out.val, Split.TEST: held_out.test, Split.VAL: held_out.val}
        pairs, counts = np.unique(np.stack([units, labels.astype(np.int64)]), axis=1, return_counts=True)
        self._classes: list[dict[int, int]] = [{} for _ in range(int(units.max()) + 1)]
        for unit, label, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            self._classes[unit][label] = count
        totals = np.bincount(labels)
        self._wanted = {split: (part * totals).tolist() for split, part in fractions.items() if part}
        self._has = {split: [0] * len(totals) for split in self._wanted}
        self._left = np.bincount(pairs[1]).tolist()
        """Class -> units that are not placed yet."""

    def placed(self, order: Sequence[int]) -> npt.NDArray[np.int8]:
        """The split of each unit, `int8 [G]`."""
        result = np.empty(len(self._classes), np.int8)
        for unit in order:
            classes = self._classes[unit]
            split = self._split_of(classes)
            result[unit] = split
            for label, count in classes.items():
                self._has[split][label] += count
                self._left[label] -= 1
        return result

    def _split_of(self, classes: dict[int, int]) -> Split:
        rarest = min(classes, key=lambda label: self._left[label])
        lacking = [split for split, has in self._has.items() if not has[rarest]]
        if self._left[rarest] <= len(lacking):
            return lacking[0] if lacking[0] == Split.TRAIN else max(lacking, key=self._room)
        return max(self._wanted, key=lambda split: self._need(split, classes))

    def _need(self, split: Split, classes: dict[int, int]) -> float:
        """How far the split is below its fraction, with half of the group in it."""
        wanted, has = self._wanted[split], self._has[split]
        parts = (count * (1 - (has[label] + count / 2) / wanted[label]) for label, count in classes.items())
        return float(sum(parts))

    def _room(self, split: Split) -> float:
        """The part of the split's fraction of all classes that is still free."""
        return float(1 - sum(self._has[split]) / sum(self._wanted[split]))
