"""Groups: what belongs together stays in one split, in the proportions that the groups allow."""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Recorder
from PIL import Image

from mnist_dist.config import DataConfig, TrainJob
from mnist_dist.data.splits import Splits, assign_splits
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.on_ray.data.prepare import open_data
from mnist_dist.search_config import SearchJob
from mnist_dist.sources import groups as groups_module
from mnist_dist.sources.groups import folder_of
from mnist_dist.sources.source import Source, open_source

CONFIG = DataConfig(test_fraction=0.2, validation_fraction=0.1, group_by="x")


def digest(content: object) -> str:
    return hashlib.sha256(str(content).encode()).hexdigest()


def split(
    contents: Sequence[object],
    labels: Sequence[int],
    groups: Sequence[str | None] | None,
    *,
    given: Sequence[str | None] | None = None,
    config: DataConfig = CONFIG,
) -> Splits:
    return assign_splits(
        labels=np.array(labels, np.int32),
        given=given or [None] * len(labels),
        digests=np.array([digest(content) for content in contents], np.bytes_),
        readable=np.ones(len(labels), np.bool_),
        uris=[f"image-{row}" for row in range(len(labels))],
        class_names=[f"class-{label}" for label in range(max(labels) + 1)],
        config=config,
        groups=groups,
    )


def names_of(splits: Splits, groups: Sequence[str]) -> list[set[str]]:
    return [{groups[row] for row in part} for part in (splits.train, splits.val, splits.test)]


def assert_apart(splits: Splits, groups: Sequence[str]) -> None:
    """No group is in two splits."""
    assert sum(map(len, names_of(splits, groups))) == len(set(groups))


def test_a_group_is_in_one_split_and_classes_keep_their_fractions() -> None:
    groups = [f"photo-{row // 4}" for row in range(400)]
    labels = [row // 4 % 2 for row in range(400)]
    splits = split(range(400), labels, groups)
    assert_apart(splits, groups)
    counts = [np.bincount(np.array(labels)[part]).tolist() for part in (splits.train, splits.val, splits.test)]
    assert counts == [[140, 140], [20, 20], [40, 40]]
    assert (splits.spanning, splits.duplicates) == (0, 0)


def test_groups_of_all_sizes_and_classes_come_near_the_fractions() -> None:
    random = np.random.default_rng(4)
    groups = [str(group) for group, size in enumerate(random.integers(1, 30, 120)) for _ in range(size)]
    labels = [int(label) for label in random.integers(0, 3, len(groups))]
    splits = split(range(len(groups)), labels, groups)
    sizes = np.array([len(part) for part in (splits.train, splits.val, splits.test)]) / len(groups)
    np.testing.assert_allclose(sizes, [0.7, 0.1, 0.2], atol=0.02)
    assert_apart(splits, groups)


def test_names_of_groups_and_the_order_of_images_do_not_matter() -> None:
    contents, labels = list(range(90)), [row // 3 % 2 for row in range(90)]
    groups = [f"g{row // 3}" for row in range(90)]
    shuffled = np.random.default_rng(0).permutation(90)
    renamed = [f"other-{hash(groups[row]) % 7919}-{groups[row]}" for row in shuffled]
    first, second = split(contents, labels, groups), split(shuffled.tolist(), [labels[c] for c in shuffled], renamed)
    for part in ("train", "val", "test"):
        assert set(getattr(first, part)) == set(shuffled[getattr(second, part)])


def test_the_order_within_a_split_is_that_of_the_digests() -> None:
    splits = split(range(60), [row % 2 for row in range(60)], [str(row // 4) for row in range(60)])
    for part in (splits.train, splits.val, splits.test):
        assert [digest(row) for row in part] == sorted(digest(row) for row in part)


def test_without_groups_nothing_changes() -> None:
    contents, labels = list(range(80)), [0, 1] * 40
    without, none = split(contents, labels, None), split(contents, labels, None, config=DataConfig(test_fraction=0.2))
    for part in ("train", "val", "test"):
        assert getattr(without, part).tolist() == getattr(none, part).tolist()


def test_groups_that_share_an_image_stay_together() -> None:
    groups = [f"g{row // 2}" for row in range(60)]
    contents: list[object] = list(range(60))
    for row in range(2, 20, 2):
        contents[row] = contents[row - 1]  # a chain: each of the first ten groups shares an image with the next
    splits = split(contents, [0] * 40 + [1] * 20, groups)
    assert splits.duplicates == 0
    assert sum({f"g{row}" for row in range(10)} <= names for names in names_of(splits, groups)) == 1


@pytest.mark.parametrize(("count", "expected"), [(1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (4, [2, 1, 1])])
def test_a_class_of_few_groups_is_trained_on_first(count: int, expected: list[int]) -> None:
    groups = [*(f"many-{row // 2}" for row in range(101)), *(f"few-{row // 5}" for row in range(5 * count))]
    splits = split(range(len(groups)), [0] * 101 + [1] * (5 * count), groups)
    found = [[name for name in names if name.startswith("few")] for names in names_of(splits, groups)]
    assert list(map(len, found)) == expected


def test_a_large_group_is_trained_on() -> None:
    groups = ["large"] * 60 + [f"small-{row // 4}" for row in range(40)]
    train, _, _ = names_of(split(range(100), [0] * 50 + [1] * 50, groups), groups)
    assert "large" in train


def test_groups_far_larger_than_a_split_are_trained_on() -> None:
    sizes = [40, 30, 8, 7, 6, 5, 4]
    groups = [f"size-{size}" for size in sizes for _ in range(size)]
    config = DataConfig(validation_fraction=0.1, test_fraction=0.1)
    train, _, _ = names_of(split(range(100), [0, 1] * 50, groups, config=config), groups)
    assert {"size-40", "size-30"} <= train


def test_an_image_without_a_group_is_on_its_own() -> None:
    groups: list[str | None] = [None] * 50 + ["a"] * 10
    splits = split(range(60), [0, 1] * 30, groups)
    assert min(len(splits.val), len(splits.test)) >= 5
    assert set(range(50, 60)) <= set(splits.train)


def test_splits_of_the_data_are_kept_and_groups_across_them_are_counted() -> None:
    given = ["train"] * 40 + ["test"] * 8
    groups = [*(f"g{row // 4}" for row in range(40)), "g0", "g0", "g1", *(f"t{row}" for row in range(5))]
    splits = split(range(48), [0, 1] * 24, groups, given=given)
    assert sorted(splits.test) == list(range(40, 48))
    assert len({f"g{row // 4}" for row in splits.train} & {f"g{row // 4}" for row in splits.val}) == 0
    assert splits.spanning == 2
    assert splits.spanning_pair[0] == "image-0"
    assert splits.spanning_pair[1] in ("image-40", "image-41")


def test_too_few_groups_for_three_splits_are_an_error_with_the_counts() -> None:
    words = "Received: group_by='x', which makes 2 groups, 2 of the class with the most, train=[0-9]+, val=0"
    with pytest.raises(DataError, match=words):
        split(range(40), [0] * 20 + [1] * 10 + [0] * 10, ["a"] * 30 + ["b"] * 10)


# --- what makes a group


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("/data/cat/p1/2.png", "/data/cat/p1"),
        ("s3://bucket/cat/2.png", "s3://bucket/cat"),
        ("/data/x.tar!cat/p1/2.png", "/data/x.tar!cat/p1"),
        ("/data/x.tar!2.png", "/data/x.tar!"),
        ("/data/x.parquet#row=17", "/data/x.parquet"),
    ],
)
def test_the_folder_of_an_image_may_lie_in_an_archive(uri: str, folder: str) -> None:
    assert folder_of(uri) == folder


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    """Five crops of each of 24 photographs, `cat/IMG_007_crop3.png`, and one file of another name."""
    random = np.random.default_rng(2)
    root = tmp_path / "crops"
    for photo in range(24):
        folder = root / ("cat", "dog")[photo % 2]
        folder.mkdir(parents=True, exist_ok=True)
        for crop in range(5):
            pixels = random.integers(0, 256, (9, 11), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"IMG_{photo:03d}_crop{crop}.png")
    Image.fromarray(np.zeros((9, 11), np.uint8)).save(root / "cat" / "cover.png")
    return root


def grouped(root: Path, group_by: str) -> Source:
    return open_source(DataConfig(data=(str(root),), group_by=group_by))


@pytest.mark.parametrize("expression", [r"(IMG_\d+)_crop", r"IMG_\d+"])
def test_an_expression_names_the_group_by_its_first_group_or_its_whole_match(crops: Path, expression: str) -> None:
    source = grouped(crops, expression)
    assert set(source.table["group"].to_pylist()) == {None, *(f"IMG_{photo:03d}" for photo in range(24))}
    assert f"24 groups by {expression}; each stays in one split" in source.notes
    assert f"1 images are in no group, such as {crops}/cat/cover.png; each is on its own" in source.notes


def write_list(path: Path, crops: Path) -> list[str]:
    rows = [(str(file), file.parent.name, file.stem[:7]) for file in sorted(crops.rglob("IMG*.png"))]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("uri", "label", "photo id"), *rows])
    return [row[2] for row in rows]


def test_a_column_of_a_list_groups(crops: Path, tmp_path: Path) -> None:
    expected = write_list(tmp_path / "list.csv", crops)
    assert grouped(tmp_path / "list.csv", "photo id").table["group"].to_pylist() == expected


def test_a_column_of_parquet_files_groups_and_a_missing_value_is_on_its_own(crops: Path, tmp_path: Path) -> None:
    files = sorted(crops.rglob("IMG*.png"))
    patients = [None, *(number // 7 for number in range(1, len(files)))]
    table = {"image": [file.read_bytes() for file in files], "label": [file.parent.name for file in files]}
    pq.write_table(pa.table({**table, "patient": pa.array(patients, pa.int32())}), tmp_path / "x.parquet")
    found = grouped(tmp_path / "x.parquet", "patient").table["group"].to_pylist()
    assert found == [None, *(str(number // 7) for number in range(1, len(files)))]


def test_a_column_that_one_of_two_inputs_has_groups_that_one(crops: Path, tmp_path: Path) -> None:
    write_list(tmp_path / "list.csv", crops)
    other = tmp_path / "other"
    for name in ("cat", "dog"):
        (other / name).mkdir(parents=True)
        Image.fromarray(np.full((9, 11), 40, np.uint8)).save(other / name / "1.png")
    source = open_source(DataConfig(data=(str(tmp_path / "list.csv"), str(other)), group_by="photo id"))
    assert source.table["group"].to_pylist().count(None) == 2
    assert len(source.table) == 122


@pytest.mark.parametrize(("group_by", "why"), [("photo", ""), ("IMG_(", " .as an expression: ")])
def test_what_is_neither_a_column_nor_in_a_uri_is_an_error_that_lists_the_columns(
    crops: Path, tmp_path: Path, group_by: str, why: str
) -> None:
    write_list(tmp_path / "list.csv", crops)
    words = (
        rf"files \(label, photo id\), or a regular expression that occurs in URIs such as .*cat/IMG_000_crop0.png{why}"
    )
    with pytest.raises(DataError, match=words):
        grouped(tmp_path / "list.csv", group_by)


def test_an_empty_expression_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"group_by must be folder, a column .*Received: group_by=''"):
        DataConfig(group_by="")


def test_groups_are_part_of_the_settings_of_trainings_and_searches() -> None:
    data = DataConfig(group_by="folder")
    assert TrainJob(data=data).settings()["data"]["group_by"] == "folder"
    assert TrainJob(data=data).settings_hash() != TrainJob().settings_hash()
    assert SearchJob(data=data).settings_hash() != SearchJob().settings_hash()


def test_class_folders_as_groups_are_refused_before_anything_is_decoded(crops: Path) -> None:
    console, folder = Recorder(), DataConfig(data=(str(crops),), group_by="folder")
    with pytest.raises(DataError, match="group_by='folder', which makes 2 groups, 1 of the class with the most"):
        open_data(folder, console=console)
    (crops / "cat" / "cover.png").unlink()
    open_data(DataConfig(data=(str(crops),), group_by=r"IMG_\d+"), console=console)
    assert any(line.endswith("24 groups by IMG_\\d+; each stays in one split") for line in console.lines)


def test_limited_data_keeps_its_groups(crops: Path) -> None:
    table = open_source(DataConfig(data=(str(crops),), group_by=r"IMG_(\d+)", limit=50)).table
    assert len(table) == 50
    for uri, group in zip(table["uri"].to_pylist(), table["group"].to_pylist(), strict=True):
        assert group is None or f"IMG_{group}_" in uri
    assert groups_module.FOLDER == "folder"
