"""The images that a bundle brings along to compare engines on (`calibration.parquet`), or random ones in their place.

Owns: which they are, the same in every process, and how they are read. Does not own: who puts them there
(`on_ray/training/bundling.py`), or what is compared.
"""

# B = batch, N = all images, H = height px, W = width px, C = channels, K = classes

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import numpy.typing as npt

from mnist_dist.data.images import Pixels
from mnist_dist.engines.steps import Report
from mnist_dist.errors import BundleError
from mnist_dist.models.bundle import CALIBRATION_FILE, Bundle

MOST_IMAGES = 2_000
RANDOM_IMAGES = 256  # where a bundle has none of its own

Probabilities = npt.NDArray[np.float32]
Predict = Callable[[Pixels], Probabilities]
"""`uint8 [B, H, W, C]`, 0-255 -> `float32 [B, K]`."""


def calibration_of(bundle: Bundle) -> tuple[Literal["calibration", "random"], int]:
    """Where the images come from, and how many there are.

    Raises:
        BundleError: the bundle has a table of them without pixels, or a file that is no table.
    """
    count = _rows(bundle)
    return ("calibration", min(count, MOST_IMAGES)) if count else ("random", RANDOM_IMAGES)


def _rows(bundle: Bundle) -> int:
    """Of the bundle's table; 0 where there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = bundle.path / CALIBRATION_FILE
    if not path.is_file():
        return 0
    try:
        with pq.ParquetFile(path) as file:
            names, count = file.schema_arrow.names, int(file.metadata.num_rows)
    except (pa.ArrowInvalid, OSError) as err:  # a damaged footer is the latter
        raise BundleError(f"{CALIBRATION_FILE} of a bundle is a Parquet file ({err}). Received: {str(path)!r}") from err
    if "pixels" not in names:
        raise BundleError(f"{CALIBRATION_FILE} of a bundle has a column pixels. Received: {names} in {str(path)!r}")
    return count


def calibration_images(bundle: Bundle, *, batch_size: int, most: int = MOST_IMAGES) -> Iterator[Pixels]:
    """The images, `uint8 [b, H, W, C]` with b up to `batch_size`, the same in every process.

    Args:
        bundle: opened.
        batch_size: images at once.
        most: images in all, and never more than `MOST_IMAGES`: evenly spread ones where there are more.
    """
    source, count = calibration_of(bundle)
    if source == "random":
        count = min(count, most)
        random = np.random.default_rng(0)
        for start in range(0, count, batch_size):
            yield random.integers(0, 256, (min(batch_size, count - start), *bundle.info.spec.shape), dtype=np.uint8)
        return
    wanted = _spread(_rows(bundle), most)
    import pyarrow.parquet as pq

    with pq.ParquetFile(bundle.path / CALIBRATION_FILE) as file:
        held: list[Pixels] = []
        row = 0
        for batch in file.iter_batches(batch_size, columns=["pixels"]):
            for value in batch.column("pixels"):
                if row in wanted:
                    held.append(_pixels(value.as_py(), bundle))
                row += 1
                if len(held) == batch_size:
                    yield np.stack(held)
                    held = []
        if held:
            yield np.stack(held)


def predict_calibration(
    bundle: Bundle, predict: Predict, *, batch_size: int, report: Report, most: int = MOST_IMAGES, at_once: int = 1
) -> Probabilities:
    """What a model says of the images, `float32 [N, K]`.

    Args:
        bundle: opened.
        predict: the model.
        batch_size: images per call.
        report: is told how far it is.
        most: see `calibration_images`.
        at_once: threads that may call the model at the same time.
    """
    count = min(calibration_of(bundle)[1], most)
    rows: list[Probabilities] = []
    images = calibration_images(bundle, batch_size=batch_size, most=most)
    with ThreadPoolExecutor(at_once) as pool:  # whose `map` takes all images at once
        for some in map(predict, images) if at_once == 1 else pool.map(predict, images):
            rows.append(some)
            report(sum(map(len, rows)), count)
    return np.concatenate(rows)


def calibration_labels(bundle: Bundle, *, most: int = MOST_IMAGES) -> npt.NDArray[np.int64] | None:
    """The class numbers `int64 [N]` of those images; None where there are none."""
    import pyarrow.parquet as pq

    path = bundle.path / CALIBRATION_FILE
    count = _rows(bundle)
    if not count or "label" not in pq.read_schema(path).names:
        return None
    labels = pq.read_table(path, columns=["label"])["label"].to_numpy()
    return np.asarray(labels[sorted(_spread(count, most))], np.int64)


def _spread(count: int, most: int) -> set[int]:
    """Rows of the table that are taken."""
    return set(np.linspace(0, count - 1, min(count, most, MOST_IMAGES)).astype(np.int64).tolist())


def _pixels(value: bytes, bundle: Bundle) -> Pixels:
    height, width, channels = bundle.info.spec.shape
    if len(value) != height * width * channels:
        raise BundleError(
            f"{CALIBRATION_FILE} holds images of {height} x {width} x {channels} bytes. Received: {len(value)} bytes"
        )
    return np.frombuffer(value, np.uint8).reshape(height, width, channels)
