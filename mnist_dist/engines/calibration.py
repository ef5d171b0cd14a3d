"""The images on which engines are compared and from which int8 gets its ranges: the bundle's own
(`calibration.parquet`), or random ones if it has none.

Owns: which images these are (the same in every process) and how they are read. Does not own: writing them
(`on_ray/training/bundling.py`), the comparison or the quantization (`conversion`).

The images of the ranges are others than those on which int8 is compared, as long as there are enough of both.
"""

# B = batch, N = all images, H = height px, W = width px, C = channels, K = classes

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import numpy.typing as npt

from mnist_dist.engines.engine import Engine
from mnist_dist.engines.steps import Report
from mnist_dist.errors import BundleError
from mnist_dist.images.pixels import Pixels
from mnist_dist.models.bundle import CALIBRATION_FILE, Bundle

MAX_IMAGES = 1_000  # of the bundle's images; more are thinned out evenly
RANDOM_IMAGES = 256  # used where the bundle has none
RANGE_IMAGES = 300  # from which int8 gets its ranges; more changed nothing (docs/measurements.md)
FEW_ROWS = 100  # a table of fewer rows is not divided: it serves for both

Source = Literal["calibration", "random"]
Probabilities = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]


def calibration_of(bundle: Bundle) -> tuple[Source, int]:
    """Where the images come from, and how many there are.

    Raises:
        BundleError: the bundle's table of images has no pixels, or is not a Parquet file.
    """
    count = _rows(bundle)
    return ("calibration", min(count, MAX_IMAGES)) if count else ("random", RANDOM_IMAGES)


def calibration_images(bundle: Bundle, *, batch_size: int, max_images: int = MAX_IMAGES) -> Iterator[Pixels]:
    """The compared images in batches, `uint8 [b, H, W, C]` with b up to `batch_size`, the same in every process.

    Args:
        bundle: an opened bundle.
        batch_size: images per batch.
        max_images: total number; evenly spaced rows are taken where the bundle has more.
    """
    count = _rows(bundle)
    images = _own_images(bundle, _spread(count, max_images)) if count else _random_images(bundle, max_images)
    return _batches(images, batch_size)


def range_images(bundle: Bundle, *, batch_size: int) -> Iterator[Pixels]:
    """The images from which int8 gets its ranges, in batches as those of `calibration_images`."""
    count = _rows(bundle)
    images = _own_images(bundle, range_rows(count)) if count else _random_images(bundle, RANDOM_IMAGES)
    return _batches(images, batch_size)


def range_rows(count: int) -> Rows:
    """Rows of a table of `count` images from which int8 gets its ranges: of those that are not compared, where there
    are enough, else a quarter of all."""
    if count < FEW_ROWS:
        return np.arange(count)
    unused = np.setdiff1d(np.arange(count), _spread(count, MAX_IMAGES))
    wanted = min(RANGE_IMAGES, count // 4)
    rows = unused if len(unused) >= wanted else np.arange(count)
    return rows[_spread(len(rows), wanted)]


def unseen_by_ranges(bundle: Bundle) -> npt.NDArray[np.bool_] | None:
    """Which of the compared images int8 is judged by, `bool [N]`: those from which it has no ranges. None: all, since
    there are too few to divide them."""
    count = _rows(bundle)
    if count < FEW_ROWS:
        return None
    return ~np.isin(_spread(count, MAX_IMAGES), range_rows(count))


def calibration_labels(bundle: Bundle) -> Labels | None:
    """The class indices `int64 [N]` of these images; None where they have none."""
    import pyarrow.parquet as pq

    path = bundle.path / CALIBRATION_FILE
    if not _rows(bundle) or "label" not in pq.read_schema(path).names:
        return None
    labels = pq.read_table(path, columns=["label"])["label"].to_numpy()
    return np.asarray(labels[_spread(len(labels), MAX_IMAGES)], np.int64)


def predict_calibration(bundle: Bundle, engine: Engine, report: Report) -> Probabilities:
    """An engine's probabilities for the images, `float32 [N, K]`; calls `report` after each batch."""
    _, count = calibration_of(bundle)
    images = calibration_images(bundle, batch_size=engine.batch_size)
    rows: list[Probabilities] = []
    with ThreadPoolExecutor(engine.calls_at_once) as pool:  # its `map` would load all images first
        for outputs in map(engine, images) if engine.calls_at_once == 1 else pool.map(engine, images):
            rows.append(outputs.probabilities)
            report(sum(map(len, rows)), count)
    return np.concatenate(rows)


def _rows(bundle: Bundle) -> int:
    """Number of rows of the bundle's table; 0 where there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = bundle.path / CALIBRATION_FILE
    if not path.is_file():
        return 0
    try:
        with pq.ParquetFile(path) as file:
            names, count = file.schema_arrow.names, int(file.metadata.num_rows)
    except (pa.ArrowInvalid, OSError) as err:  # a damaged footer is an OSError
        raise BundleError(f"{CALIBRATION_FILE} must be a Parquet file ({err}). Received: {str(path)!r}") from err
    if "pixels" not in names:
        raise BundleError(f"{CALIBRATION_FILE} must have a column pixels. Received: {names} in {str(path)!r}")
    return count


def _spread(count: int, max_images: int) -> Rows:
    """Up to `max_images` of the numbers below `count`, evenly spaced."""
    return np.linspace(0, count - 1, min(count, max_images)).astype(np.int64)


def _batches(images: Iterator[Pixels], batch_size: int) -> Iterator[Pixels]:
    while batch := list(itertools.islice(images, batch_size)):
        yield np.stack(batch)


def _own_images(bundle: Bundle, rows: Rows) -> Iterator[Pixels]:
    import pyarrow.parquet as pq

    wanted, row = set(rows.tolist()), 0
    with pq.ParquetFile(bundle.path / CALIBRATION_FILE) as file:
        for batch in file.iter_batches(256, columns=["pixels"]):
            for value in batch.column("pixels"):
                if row in wanted:
                    yield _pixels(value.as_py(), bundle)
                row += 1


def _random_images(bundle: Bundle, max_images: int) -> Iterator[Pixels]:
    random = np.random.default_rng(0)
    for _ in range(min(RANDOM_IMAGES, max_images)):
        yield random.integers(0, 256, bundle.info.spec.shape, dtype=np.uint8)


def _pixels(value: bytes, bundle: Bundle) -> Pixels:
    height, width, channels = bundle.info.spec.shape
    if len(value) != height * width * channels:
        raise BundleError(
            f"{CALIBRATION_FILE} must hold {height} x {width} x {channels} bytes an image. Received: {len(value)} bytes"
        )
    return np.frombuffer(value, np.uint8).reshape(height, width, channels)
