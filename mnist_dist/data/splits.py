"""Assigns each readable record to training, validation or test, from the content of the images alone.

Owns: the rule. Does not own: reading or decoding. Contract: splits that the data defines are kept. A missing split is
taken from the training images, class by class: sorted by the sha256 of their decoded pixels, the first fraction goes to
test and the next to validation. So file names and their order do not matter, and images with the same pixels, which are
neighbours in that order, always land in the same split. The records of a split are in that order, too.

Groups of records that belong together (`grouping.py`) stay in one split; only the assignment differs, not the order.
"""

# N = records

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnist_dist.config import DataConfig
from mnist_dist.data.grouping import HeldOut, Split, hold_out_groups, numbered
from mnist_dist.errors import DataError
from mnist_dist.sources.label_sets import LabelSets, members, strata_of

_log = logging.getLogger(__name__)
_TRAIN, _VAL, _TEST = Split.TRAIN, Split.VAL, Split.TEST
_CODES = {None: _TRAIN, "train": _TRAIN, "val": _VAL, "test": _TEST}
_NAMED_DUPLICATES = 5
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Splits:
    """The records of each split, and the duplicates between splits."""

    train: Ints
    """`int64 [count]`: indices into the records, in the order of (digest, label), so that the same images from anywhere
    come in the same order; `val` and `test` have the same form."""
    val: Ints
    test: Ints
    duplicates: int
    """Training images that also occur in validation or test, plus validation images that also occur in test."""
    duplicate_pairs: tuple[tuple[str, str], ...]
    """The first few duplicates: URI of the duplicate, and of the image that it repeats."""
    dropped: int
    """Number of duplicates that were removed; 0 unless `drop_duplicates` is set."""
    spanning: int = 0
    """Groups with images in more than one split, because the data defines those splits."""
    spanning_pair: tuple[str, str] = ("", "")
    """URIs of two images of the first such group."""
    near_duplicates: int = 0
    """Validation and test images that look like an image of an earlier split; `near_duplicates.py` finds them."""

    def codes(self, count: int) -> npt.NDArray[np.int8]:
        """The split of each of `count` records, `int8 [N]`, in the order of `grouping.Split`; -1: none."""
        codes = np.full(count, -1, np.int8)
        for split, rows in ((_TRAIN, self.train), (_VAL, self.val), (_TEST, self.test)):
            codes[rows] = split
        return codes


def assign_splits(
    *,
    labels: npt.NDArray[np.int32],
    given: Sequence[str | None],
    digests: npt.NDArray[np.bytes_],
    readable: Bools,
    uris: Sequence[str],
    class_names: Sequence[str],
    config: DataConfig,
    groups: Sequence[str | None] | None = None,
    label_sets: LabelSets = (),
) -> Splits:
    """Assigns every readable record to one split.

    Args:
        labels: `int32 [N]`, 0 to number of classes (or of sets) - 1.
        given: N splits that the data defines: `train`, `val`, `test`, or None.
        digests: `S [N]`, the sha256 of each record's shape and pixels.
        readable: `bool [N]`, whether the record was decoded.
        uris: N URIs, for messages.
        class_names: names of the classes.
        config: gives the fractions, and whether to drop duplicates.
        groups: N names; records of the same name stay in one split, None is on its own. None: all are.
        label_sets: the classes of each label, where records have any number of them. They are held out by the rarest.

    Raises:
        DataError: a split is empty, or fewer than two classes are left to train on; the message gives the counts.
    """
    splits = np.array([_CODES[name] for name in given], np.int8)
    ids = np.unique(digests, return_inverse=True)[1].astype(np.int64)  # Ids ascend with the digests.
    held_out = HeldOut(
        test=0.0 if (splits == _TEST).any() else config.test_fraction,
        val=0.0 if (splits == _VAL).any() else config.validation_fraction,
    )
    pool = np.flatnonzero(readable & (splits == _TRAIN))
    numbers = None if groups is None else numbered(groups)
    strata = strata_of(labels, label_sets, len(class_names))
    if numbers is None:
        splits[pool] = _hold_out(strata[pool].astype(np.int64), ids[pool], held_out)
    else:
        splits[pool] = hold_out_groups(strata[pool], digests[pool], numbers[pool], held_out)

    repeats = _find_repeats(splits, ids, readable)
    pairs = _pairs(repeats, splits, ids, readable, uris)
    kept = readable.copy()
    if config.drop_duplicates:
        kept[repeats] = False
    order = np.lexsort((labels, ids))
    train, val, test = (order[(kept & (splits == code))[order]] for code in (_TRAIN, _VAL, _TEST))
    result = Splits(train, val, test, len(repeats), pairs, len(repeats) if config.drop_duplicates else 0)
    if numbers is not None:
        result = replace(result, **_spanning(splits, numbers, readable, uris))
    _check(result, labels, readable, class_names, config=config, groups=numbers, label_sets=label_sets)
    return result


def check_groups(groups: pa.ChunkedArray, given: pa.ChunkedArray, labels: pa.ChunkedArray, *, group_by: str) -> None:
    """Checks, before anything is decoded, that there can be enough groups for all splits.

    Args:
        groups: `string [N]`, the group of each record; null: it is on its own.
        given: `string [N]`, the split of each record that the data defines; null: none.
        labels: integer `[N]`.
        group_by: what makes the groups.

    Raises:
        DataError: there are too few, or each class is a single group; the message gives the counts.
    """
    splits = given.to_pylist()
    missing = [name for name in ("val", "test") if name not in splits]
    rows = np.array([name in (None, "train") for name in splits], np.bool_)
    numbers = numbered(groups.to_pylist())[rows]
    pairs = np.unique(np.stack([labels.to_numpy()[rows], numbers]), axis=1)
    of_class = np.bincount(pairs[0][pairs[0] >= 0])
    count = len(np.unique(numbers))
    if missing and (count <= len(missing) or of_class.max(initial=0) < 2):
        raise DataError(_too_few(count, of_class, group_by))


def _too_few(count: int, of_class: Ints, group_by: str) -> str:
    return (
        "training, validation and test need at least one group each, and a class at least two to be in two of them; "
        f"choose a group_by that makes more groups. Received: group_by={group_by!r}, which makes {count:,} groups, "
        f"{of_class.max(initial=0):,} of the class with the most"
    )


def _spanning(splits: npt.NDArray[np.int8], groups: Ints, readable: Bools, uris: Sequence[str]) -> dict[str, Any]:
    """The fields of `Splits` about groups that are in more than one split."""
    rows = np.flatnonzero(readable)
    order = rows[np.lexsort((splits[rows], groups[rows]))]
    starts = np.flatnonzero(np.r_[True, groups[order][1:] != groups[order][:-1]]) if len(order) else order
    firsts, lasts = order[starts], order[np.r_[starts[1:], len(order)] - 1] if len(order) else order
    spanning = np.flatnonzero(splits[firsts] != splits[lasts])
    if not len(spanning):
        return {}
    first, last = firsts[spanning[0]], lasts[spanning[0]]
    return {"spanning": len(spanning), "spanning_pair": (uris[first], uris[last])}


def _hold_out(labels: Ints, ids: Ints, held_out: HeldOut) -> npt.NDArray[np.int8]:
    """Splits of the pool's records, `int8 [N]`.

    A group of equal images goes to the split that its middle falls into, which for single images rounds the fraction.
    A class of three or more different images is in every split, unless copies of one image make up most of it. The
    last group of a class is always trained on.
    """
    if not len(labels):
        return np.empty(0, np.int8)
    order = np.lexsort((ids, labels))
    labels, ids = labels[order], ids[order]
    starts = np.flatnonzero(np.r_[True, (labels[1:] != labels[:-1]) | (ids[1:] != ids[:-1])])
    sizes = np.diff(np.r_[starts, len(labels)])
    # What follows is per group: the first group of its class, and the groups and records that the class has.
    _, first, inverse, groups = np.unique(labels[starts], return_index=True, return_inverse=True, return_counts=True)
    records = np.bincount(inverse, weights=sizes)[inverse]
    rank, groups = np.arange(len(starts)) - first[inverse], groups[inverse]
    middle = starts - starts[first][inverse] + sizes / 2
    may_lead = 2 * sizes <= records  # A group that is most of its class must not be held out just to represent it.

    trained = rank == groups - 1
    test = np.zeros(len(starts), np.bool_)
    if held_out.test:
        test = ~trained & ((middle <= records * held_out.test) | ((rank == 0) & may_lead))
    val = np.zeros(len(starts), np.bool_)
    if held_out.val:
        next_rank = np.bincount(inverse, weights=test)[inverse]
        in_share = middle <= records * (held_out.test + held_out.val)
        val = ~trained & ~test & (in_share | ((rank == next_rank) & may_lead))
    by_group = np.select([test, val], [_TEST, _VAL], _TRAIN).astype(np.int8)
    result = np.empty(len(labels), np.int8)
    result[order] = np.repeat(by_group, sizes)
    return result


def _find_repeats(splits: npt.NDArray[np.int8], ids: Ints, readable: Bools) -> Ints:
    """Indices of readable records whose pixels also occur in a later split (in the order train, val, test)."""
    latest = np.full(int(ids.max(initial=-1)) + 1, -1, np.int8)
    np.maximum.at(latest, ids[readable], splits[readable])
    return np.flatnonzero(readable & (splits < latest[ids]))


def _pairs(
    repeats: Ints, splits: npt.NDArray[np.int8], ids: Ints, readable: Bools, uris: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    pairs = []
    for index in repeats[:_NAMED_DUPLICATES]:
        others = np.flatnonzero(readable & (ids == ids[index]) & (splits > splits[index]))
        pairs.append((uris[index], uris[others[0]]))
    return tuple(pairs)


def _check(
    splits: Splits,
    labels: npt.NDArray[np.int32],
    readable: Bools,
    class_names: Sequence[str],
    *,
    config: DataConfig,
    groups: Ints | None,
    label_sets: LabelSets,
) -> None:
    counts = f"train={len(splits.train)}, val={len(splits.val)}, test={len(splits.test)}"
    received = f"Received: {counts}, unreadable={int((~readable).sum())}, duplicates dropped={splits.dropped}"
    if groups is not None and not (len(splits.train) and len(splits.val) and len(splits.test)):
        pairs = np.unique(np.stack([labels[readable], groups[readable]]), axis=1)
        raise DataError(
            _too_few(len(np.unique(pairs[1])), np.bincount(pairs[0]), config.group_by or "") + f", {counts}"
        )
    if not (len(splits.train) and len(splits.val) and len(splits.test)):
        raise DataError(f"train, val and test each need at least one image. {received}")
    if label_sets:
        has_images = members(label_sets, len(class_names))[labels[splits.train]].sum(axis=0)
    else:
        has_images = np.bincount(labels[splits.train], minlength=len(class_names))
    trained = has_images > 0
    if trained.sum() < 2:
        raise DataError(f"training needs images of at least two classes. {received}")
    if not trained.all():
        names = [name for name, has_images in zip(class_names, trained, strict=True) if not has_images]
        _log.warning("%d classes have no training images, for example %r", len(names), names[0])
