"""Tiny images for benchmarks: digits of 28 x 28 px as PNG files of about 300 bytes.

Owns: the files. Does not own: reading MNIST (`sources/arrays.py`), or what is measured.

Contract: the digits are the first ones of MNIST, where its idx files are given, else those of scikit-learn, enlarged.
If there are too few, they are repeated under further names. Nothing is downloaded.
"""

from pathlib import Path

import cv2
from PIL import Image

from mnist_dist.sources.arrays import cached_pixels

SIZE_PX = 28


def write_digits(folder: Path, *, count: int, data_dir: str | None = None) -> list[Path]:
    """Writes digits into a new folder.

    Args:
        folder: must not exist yet.
        count: number of digits.
        data_dir: folder of MNIST's idx files. None: scikit-learn's digits.

    Returns:
        The paths, sorted by name.

    Raises:
        DataError: the files of MNIST are missing or corrupt.
    """
    folder.mkdir(parents=True)
    pixels = cached_pixels("mnist" if data_dir else "digits", data_dir)
    paths = [folder / f"digit-{number:06d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(cv2.resize(pixels[number % len(pixels)], (SIZE_PX, SIZE_PX))).save(path, "PNG")
    return paths
