"""Near-duplicates: copies of one photograph in two splits are named; images of one kind are not taken for copies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from harness import Recorder

from mnist_dist.config import DataConfig, DecodeConfig, ModelConfig
from mnist_dist.data import near_duplicates, records
from mnist_dist.data.near_duplicates import NearDuplicates, find_near_duplicates, thumbnails_of
from mnist_dist.data.records import decode_shard, finish, plan_records, read_index, read_thumbnails
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.on_ray.data.prepare import DecodedData, open_data, plan_data, split
from mnist_dist.sources.source import open_source

WIDTH, HEIGHT = 120, 96
TRAIN, VAL, TEST = 0, 1, 2


def photograph(seed: int, *, channels: int = 3) -> Pixels:
    """Smooth shapes at several scales, as photographs have, with a little noise."""
    random = np.random.default_rng(seed)
    image = np.zeros((HEIGHT, WIDTH, channels), np.float32)
    for cells in (3, 6, 12):
        coarse = random.normal(0, 40, (cells, cells + 1, channels)).astype(np.float32)
        image += cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).reshape(image.shape)
    return np.clip(image + 128 + random.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def encoded_again(image: Pixels) -> Pixels:
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    return np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), np.uint8)


def resized(image: Pixels) -> Pixels:
    small = cv2.resize(image, (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR), np.uint8)


def cut(image: Pixels) -> Pixels:
    return np.asarray(cv2.resize(image[1:-1, 1:-1], (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR), np.uint8)


def brighter(image: Pixels) -> Pixels:
    return np.asarray(cv2.convertScaleAbs(image, alpha=0.9, beta=8), np.uint8)


def found(images: list[Pixels], splits: list[int], digests: list[str] | None = None) -> NearDuplicates | None:
    digests = digests or [str(row) for row in range(len(images))]
    return find_near_duplicates(thumbnails_of(np.stack(images)), np.array(splits, np.int8), digests)


@pytest.mark.parametrize("change", [encoded_again, resized, cut, brighter])
def test_copies_of_a_photograph_are_found(change: Callable[[Pixels], Pixels]) -> None:
    images = [photograph(seed) for seed in range(40)]
    copies = [change(image) for image in images]
    near = found([*images, *copies], [TRAIN] * 40 + [TEST] * 40)
    assert near is not None
    assert near.count >= 36
    later, earlier = near.pair
    assert later == earlier + 40


def test_different_photographs_are_not() -> None:
    assert found([photograph(seed) for seed in range(300)], [row % 3 for row in range(300)]) is None


def test_copies_within_a_split_equal_pixels_and_unused_images_do_not_count() -> None:
    images = [
        photograph(1),
        resized(photograph(1)),
        photograph(2),
        photograph(2),
        photograph(3),
        resized(photograph(3)),
    ]
    digests = ["a", "b", "c", "c", "d", "e"]
    assert found(images, [VAL, VAL, TRAIN, TEST, TRAIN, -1], digests) is None
    assert found(images, [TRAIN, VAL, TRAIN, TEST, TRAIN, -1], digests) == NearDuplicates(1, (1, 0))


def test_the_later_split_is_named_first() -> None:
    images = [resized(photograph(1)), photograph(2), photograph(1)]
    assert found(images, [TEST, TRAIN, VAL]) == NearDuplicates(1, (0, 2))


def test_plain_images_are_not_compared() -> None:
    plain = [np.full((HEIGHT, WIDTH, 3), 200 + row, np.uint8) for row in range(6)]
    lettered = [image.copy() for image in plain]
    for row, image in enumerate(lettered):
        image[40:50, 50 + row : 60 + row] = 0
    assert found([*plain, *lettered], [row % 3 for row in range(12)]) is None


def test_enlarged_digits_of_one_kind_are_hardly_ever_taken_for_copies() -> None:
    digits = open_source(DataConfig()).pixels
    assert digits is not None
    large = [cv2.resize(image, (64, 64), interpolation=cv2.INTER_LINEAR)[..., None] for image in digits[:1000]]
    near = found(large, [row % 2 for row in range(1000)])
    assert near is None or near.count <= 25


@pytest.mark.parametrize(("height", "width", "expected"), [(64, 64, 256), (63, 200, 0), (28, 28, 0)])
def test_small_images_have_no_thumbnails(height: int, width: int, expected: int) -> None:
    assert thumbnails_of(np.zeros((3, height, width, 1), np.uint8)).shape == (3, expected)


def test_an_image_is_compared_with_a_bounded_number_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    correlations = near_duplicates._correlations

    def counted(thumbnails: Pixels, first: Any, second: Any) -> Any:
        compared.append(len(first))
        return correlations(thumbnails, first, second)

    monkeypatch.setattr(near_duplicates, "_correlations", counted)
    same = [brighter(photograph(1)) for _ in range(300)]
    assert found(same, [row % 2 for row in range(300)]) is not None
    assert sum(compared) <= 300 * near_duplicates._NEIGHBOURS * near_duplicates._BANDS


# --- in a job


def write_photographs(root: Path) -> Path:
    """Each of 30 photographs twice, the copy encoded again, in the folders of its class: `cat/07-a.png`."""
    for seed in range(30):
        folder = root / ("cat", "dog")[seed % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = photograph(seed)
        for name, pixels in (("a", image), ("b", encoded_again(image))):
            cv2.imwrite(str(folder / f"{seed:02d}-{name}.png"), pixels)
    return root


def decoded(data: DataConfig, storage: Path, console: Recorder) -> DecodedData:
    """What `prepare.decode` gives, without Ray."""
    listed = plan_data(open_data(data, console=console), data, ModelConfig(backbone="mobilenet_v2"), root=str(storage))
    for shard in listed.plan.cache.missing():
        rows = listed.plan.cache.rows_of(shard)
        decode_shard(listed.plan, shard, listed.source.table.slice(rows.start, rows.stop - rows.start))
    finish(listed.plan, listed.source)
    index = read_index(listed.plan.cache)
    return DecodedData(source=listed.source, plan=listed.plan, index=index, fingerprint="", bad=0)


def test_a_job_warns_with_a_pair_and_the_remedy_and_groups_end_the_warning(tmp_path: Path) -> None:
    data, console = DataConfig(data=(str(write_photographs(tmp_path / "photos")),)), Recorder()
    splits = split(decoded(data, tmp_path / "runs", console), data, console=console)
    assert splits.near_duplicates > 0
    (warning,) = [line for line in console.lines if line.startswith("warning: ")]
    assert f"{splits.near_duplicates} images of validation or test look like one of another split" in warning
    assert (
        "--group-by keeps what belongs together in one split; --drop-duplicates removes only what is equal" in warning
    )
    first, second = (word.rstrip(".").rpartition("/")[2] for word in warning.split() if ".png" in word)
    assert {first[3:], second[3:]} == {"a.png", "b.png"}
    assert first[:2] == second[:2]

    grouped, console = DataConfig(data=data.data, group_by=r"/(\d+)-"), Recorder()
    splits = split(decoded(grouped, tmp_path / "runs", console), grouped, console=console)
    assert splits.near_duplicates == 0
    assert not any(line.startswith("warning: ") for line in console.lines)


def test_records_of_small_images_keep_no_thumbnails(tmp_path: Path) -> None:
    source = open_source(DataConfig(limit=50))
    plan = plan_records(
        source, ImageSpec(height_px=8, width_px=8, channels=1), storage=str(tmp_path), limits=DecodeConfig()
    )
    finish(plan, source)
    assert read_thumbnails(plan) is None
    assert not list(tmp_path.rglob(records._THUMBNAILS))


def test_of_very_many_images_a_sample_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_COMPARED", 3)
    assert near_duplicates._compared(np.arange(10, 20)).tolist() == [10, 14, 19]
    assert near_duplicates._compared(np.arange(3)).tolist() == [0, 1, 2]
