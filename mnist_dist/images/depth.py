"""Values of any depth to 8 bits."""

import numpy as np
import numpy.typing as npt

from mnist_dist.images.pixels import Pixels


def to_eight_bits(values: npt.NDArray[np.generic]) -> Pixels:
    """STAND-IN"""
    low, high = (0.0, 65535.0) if values.dtype == np.uint16 else _range(values, values.dtype.kind == "f")
    finite = np.nan_to_num(values.astype(np.float32), nan=low, posinf=high, neginf=low)
    return np.rint((finite - low) * np.float32(255 / (high - low))).clip(0, 255).astype(np.uint8)


def _range(values: npt.NDArray[np.generic], is_float: bool) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    for usual in (
        (1.0, 255.0)
        if is_float
        else (
            255.0,
            65535.0,
        )
    ):
        if low >= 0 and high <= usual:
            return 0.0, usual
    return low, max(high, low + 1.0)
