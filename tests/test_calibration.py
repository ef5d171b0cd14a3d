"""calibration: which images engines are compared on, the same in every process, and tables that are none."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnist_dist.engines.calibration import (
    MAX_IMAGES,
    RANDOM_IMAGES,
    calibration_images,
    calibration_labels,
    calibration_of,
    predict_calibration,
)
from mnist_dist.engines.engine import Outputs
from mnist_dist.errors import BundleError
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo

# b = images of a call

HEIGHT, WIDTH, CHANNELS = 3, 5, 1


def bundle_at(folder: Path) -> Bundle:
    """A bundle as far as its images go: nothing here looks at the model."""
    spec = ImageSpec(height_px=HEIGHT, width_px=WIDTH, channels=CHANNELS)
    info = BundleInfo(class_names=("ant", "bee"), spec=spec, backbone="cnn", model_id="1f")
    return Bundle(folder, info)


def numbered(count: int) -> Pixels:
    """Images `uint8 [count, H, W, C]` that tell their number and their label."""
    images = np.zeros((count, HEIGHT, WIDTH, CHANNELS), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(count) // 256, np.arange(count) % 256
    images[:, 0, 2, 0] = labels_of(count)
    return images


def labels_of(count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(3).integers(0, 7, count)


def write_table(folder: Path, count: int, *, labels: bool = True) -> Bundle:
    columns: dict[str, Any] = {"label": labels_of(count)} if labels else {}
    pixels = pa.array([image.tobytes() for image in numbered(count)], pa.binary())
    pq.write_table(pa.table({**columns, "pixels": pixels}), folder / "calibration.parquet", row_group_size=11)
    return bundle_at(folder)


def numbers(images: Pixels) -> list[int]:
    return [int(image[0, 0, 0]) * 256 + int(image[0, 1, 0]) for image in images]


@pytest.mark.parametrize(("count", "max_images"), [(23, 2_000), (23, 23), (23, 22), (23, 7), (23, 1)])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_where_there_are_more_images_some_from_begin_to_end_are_taken(
    tmp_path: Path, count: int, max_images: int, batch_size: int
) -> None:
    bundle = write_table(tmp_path, count)
    batches = list(calibration_images(bundle, batch_size=batch_size, max_images=max_images))
    taken = numbers(np.concatenate(batches))

    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size
    assert len(taken) == len(set(taken)) == min(count, max_images)
    assert taken[0] == 0
    if max_images > 1:
        assert taken[-1] == count - 1
        gaps = np.diff(taken)
        assert gaps.max() - gaps.min() <= 1
    np.testing.assert_array_equal(np.concatenate(batches), numbered(count)[taken])


def test_of_a_long_table_the_whole_of_it_is_represented(tmp_path: Path) -> None:
    bundle = write_table(tmp_path, 2 * MAX_IMAGES + 500)
    taken = np.concatenate(list(calibration_images(bundle, batch_size=300)))
    assert calibration_of(bundle) == ("calibration", MAX_IMAGES)
    assert (len(taken), numbers(taken)[-1]) == (MAX_IMAGES, 2 * MAX_IMAGES + 499)
    labels = calibration_labels(bundle)
    assert labels is not None
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, taken[:, 0, 2, 0])


def test_a_table_without_labels_has_none(tmp_path: Path) -> None:
    bundle = write_table(tmp_path, 5, labels=False)
    assert calibration_of(bundle) == ("calibration", 5)
    assert calibration_labels(bundle) is None


@pytest.mark.parametrize("has_empty_table", [True, False])
def test_without_images_there_are_random_ones_the_same_in_every_process(tmp_path: Path, has_empty_table: bool) -> None:
    bundle = write_table(tmp_path, 0) if has_empty_table else bundle_at(tmp_path)
    assert calibration_of(bundle) == ("random", RANDOM_IMAGES)
    assert calibration_labels(bundle) is None

    images = np.concatenate(list(calibration_images(bundle, batch_size=100)))
    assert images.shape == (RANDOM_IMAGES, HEIGHT, WIDTH, CHANNELS)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == RANDOM_IMAGES
    np.testing.assert_array_equal(np.concatenate(list(calibration_images(bundle, batch_size=100))), images)
    program = (
        "import sys, hashlib, numpy as np; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from test_calibration import bundle_at, calibration_images\n"
        "images = np.concatenate(list(calibration_images(bundle_at(Path(sys.argv[2])), batch_size=100)))\n"
        "sys.stdout.buffer.write(images.tobytes())"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)], capture_output=True, check=True
    )
    assert other.stdout == images.tobytes()


def test_fewer_random_images_can_be_asked_for(tmp_path: Path) -> None:
    sizes = [len(batch) for batch in calibration_images(bundle_at(tmp_path), batch_size=7, max_images=17)]
    assert sizes == [7, 7, 3]


def test_a_table_without_pixels_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [3, 1]}), tmp_path / "calibration.parquet")
    for ask in (calibration_of, calibration_labels):
        with pytest.raises(
            BundleError, match=r"must have a column pixels. Received: \['label'\] in '.*calibration.parquet'"
        ):
            ask(bundle_at(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no table at all", b"PAR1 and no more PAR1"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "calibration.parquet").write_bytes(content)
    with pytest.raises(BundleError, match=r"calibration.parquet must be a Parquet file \(.*Received: '"):
        calibration_of(bundle_at(tmp_path))


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"pixels": [bytes(15), bytes(14)]}), tmp_path / "calibration.parquet")
    with pytest.raises(BundleError, match=r"must hold 3 x 5 x 1 bytes an image. Received: 14 bytes"):
        list(calibration_images(bundle_at(tmp_path), batch_size=2))


class Reader:
    """An engine that reads the numbers of images."""

    batch_size, num_classes, num_features = 4, 2, 0

    def __init__(self, calls_at_once: int) -> None:
        self.calls_at_once = calls_at_once

    def __call__(self, pixels: Pixels) -> Outputs:
        return Outputs(np.asarray([[number, 1.0] for number in numbers(pixels)], np.float32))


@pytest.mark.parametrize("calls_at_once", [1, 3])
def test_predictions_stand_in_the_order_of_the_images(tmp_path: Path, calls_at_once: int) -> None:
    bundle, reports = write_table(tmp_path, 10), list[tuple[int, int]]()
    found = predict_calibration(bundle, Reader(calls_at_once), lambda done, total: reports.append((done, total)))
    assert found[:, 0].tolist() == list(range(10))
    assert reports == [(4, 10), (8, 10), (10, 10)]
