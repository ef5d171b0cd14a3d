"""splits: a function of the content alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from mnist_dist.config import DataConfig
from mnist_dist.data.splits import Splits, assign_splits
from mnist_dist.errors import DataError

CONFIG = DataConfig(test_fraction=0.2, validation_fraction=0.1)


def digest(content: object) -> str:
    return hashlib.sha256(str(content).encode()).hexdigest()


def split(
    contents: Sequence[object],
    labels: Sequence[int],
    *,
    given: Sequence[str | None] | None = None,
    unreadable: Sequence[int] = (),
    config: DataConfig = CONFIG,
) -> Splits:
    readable = np.ones(len(labels), np.bool_)
    readable[list(unreadable)] = False
    return assign_splits(
        labels=np.array(labels, np.int32),
        given=given or [None] * len(labels),
        digests=np.array([digest(content) for content in contents], np.bytes_),
        readable=readable,
        uris=[f"image-{row}" for row in range(len(labels))],
        class_names=[f"class-{label}" for label in range(max(labels) + 1)],
        config=config,
    )


def test_each_class_is_divided_by_the_fractions() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 20
    splits = split(range(100), labels)
    counts = [np.bincount(np.array(labels)[part]).tolist() for part in (splits.test, splits.val, splits.train)]
    assert counts == [[10, 6, 4], [5, 3, 2], [35, 21, 14]]
    assert sorted([*splits.train, *splits.val, *splits.test]) == list(range(100))
    assert (splits.duplicates, splits.duplicate_pairs, splits.dropped) == (0, (), 0)


def test_the_first_digests_are_tested_with_the_next_validate() -> None:
    splits = split(range(60), [0] * 40 + [1] * 20)
    order = sorted(range(40), key=digest)
    assert set(splits.test[splits.test < 40]) == set(order[:8])
    assert set(splits.val[splits.val < 40]) == set(order[8:12])


def test_names_and_order_do_not_matter() -> None:
    contents, labels = list(range(90)), [content % 3 for content in range(90)]
    shuffled = np.random.default_rng(0).permutation(90)
    first, second = split(contents, labels), split(shuffled.tolist(), [labels[c] for c in shuffled])
    for part in ("train", "val", "test"):
        assert set(getattr(first, part)) == set(shuffled[getattr(second, part)])


def test_each_split_is_in_the_order_of_digest_and_label() -> None:
    contents, labels = [row // 2 for row in range(60)], [row % 2 for row in range(60)]  # two classes of each content
    splits = split(contents, labels)
    for part in (splits.train, splits.val, splits.test):
        keys = [(digest(contents[row]), labels[row]) for row in part]
        assert keys == sorted(keys)


def test_one_more_image_moves_few_others() -> None:
    before, after = split(range(200), [0, 1] * 100), split(range(201), [*([0, 1] * 100), 0])
    assert len(set(before.test) ^ set(after.test)) <= 2


def test_equal_images_are_never_divided() -> None:
    contents = [row // 3 for row in range(120)]
    splits = split(contents, [content % 2 for content in contents])
    parts = [{contents[row] for row in part} for part in (splits.train, splits.val, splits.test)]
    assert sum(len(part) for part in parts) == len(set(contents))
    assert splits.duplicates == 0


@pytest.mark.parametrize(("images", "expected"), [(1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (4, [2, 1, 1])])
def test_a_small_class_is_trained_on_first(images: int, expected: list[int]) -> None:
    splits = split(range(100 + images), [0] * 100 + [1] * images)
    assert [int((part >= 100).sum()) for part in (splits.train, splits.val, splits.test)] == expected


def test_a_class_of_equal_images_is_trained_on() -> None:
    splits = split([*range(50), *["same"] * 9], [0] * 50 + [1] * 9)
    assert set(range(50, 59)) <= set(splits.train)


def test_given_splits_are_kept() -> None:
    given = ["train"] * 30 + ["val"] * 7 + ["test"] * 11
    splits = split(range(48), [0, 1] * 24, given=given)
    assert sorted(splits.train) == list(range(30))
    assert sorted(splits.val) == list(range(30, 37))
    assert sorted(splits.test) == list(range(37, 48))


def test_a_missing_validation_comes_out_of_training() -> None:
    splits = split(range(70), [0, 1] * 35, given=["train"] * 60 + ["test"] * 10)
    assert sorted(splits.test) == list(range(60, 70))
    assert len(splits.val) == 6
    assert len(splits.train) == 54


def test_a_missing_test_comes_out_of_training() -> None:
    splits = split(range(70), [0, 1] * 35, given=["train"] * 60 + ["val"] * 10)
    assert sorted(splits.val) == list(range(60, 70))
    assert len(splits.test) == 12


GIVEN = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
REPEATED = ["a", "b", "c", "d", "e", "e", "b", "f", "c", "c", "f", "g"]


def test_duplicates_across_splits_are_counted_and_named() -> None:
    splits = split(REPEATED, [0, 1] * 6, given=GIVEN)
    assert splits.duplicates == 4
    assert set(splits.duplicate_pairs) == {
        ("image-1", "image-6"),
        ("image-2", "image-8"),
        ("image-7", "image-10"),
        ("image-8", "image-9"),
    }
    assert (len(splits.train), len(splits.val), len(splits.test), splits.dropped) == (6, 3, 3, 0)


def test_duplicates_are_dropped_where_asked() -> None:
    splits = split(REPEATED, [0, 1] * 6, given=GIVEN, config=replace(CONFIG, drop_duplicates=True))
    assert sorted(splits.train) == [0, 3, 4, 5]
    assert sorted(splits.val) == [6]
    assert sorted(splits.test) == [9, 10, 11]
    assert (splits.duplicates, splits.dropped) == (4, 4)


def test_unreadable_images_are_in_no_split() -> None:
    bad = [3, 4, 77]
    splits = split(range(80), [0, 1] * 40, unreadable=bad)
    assert not set(bad) & {*splits.train, *splits.val, *splits.test}
    assert len(splits.train) + len(splits.val) + len(splits.test) == 77


def test_an_empty_split_is_refused_with_the_counts() -> None:
    with pytest.raises(DataError, match=r"train=2, val=0, test=0, unreadable=1, duplicates dropped=0"):
        split(range(3), [0, 1, 1], unreadable=[2])
    with pytest.raises(DataError, match=r"need at least one image\. Received: train=0, val=0, test=0, unreadable=2"):
        split(range(2), [0, 1], unreadable=[0, 1])
    with pytest.raises(DataError, match="train=0, val=2, test=2"):
        split(range(4), [0, 1, 0, 1], given=["val", "val", "test", "test"])


def test_one_readable_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"at least two classes\. Received: train=14, val=2, test=4, unreadable=5"):
        split(range(25), [0] * 20 + [1] * 5, unreadable=range(20, 25))


def test_a_million_records_are_split_as_a_few_are() -> None:
    rng = np.random.default_rng(0)
    digests = np.frombuffer(rng.bytes(32_000_000), "S32").copy()
    splits = assign_splits(
        labels=rng.integers(0, 1000, 1_000_000).astype(np.int32),
        given=[None] * 1_000_000,
        digests=digests,
        readable=np.ones(1_000_000, np.bool_),
        uris=[""] * 1_000_000,
        class_names=[""] * 1000,
        config=CONFIG,
    )
    assert abs(len(splits.test) / 1e6 - 0.2) < 1e-3
