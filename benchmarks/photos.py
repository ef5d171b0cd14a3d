"""Photographs for benchmarks, made from the few that come with scikit-learn and scikit-image; nothing is downloaded.

Owns: the JPEGs, a tar of them and hard links to them. Does not own: what is measured.

Contract: photograph i depends only on the seed, on i and on Pillow's version, so a small set is the start of a larger
one. Each is a crop of a real photograph, scaled to 500 x 375 px: a JPEG of about 68 KB on average, the size found in
web archives and ImageNet.
"""

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH_PX, HEIGHT_PX = 500, 375
QUALITY = 95  # High, to reach 68 KB: enlarged crops have less detail than a camera image of that size.
MIN_SCALE = 0.8  # Smallest crop, relative to the largest one of that shape.


def write_photos(folder: Path, *, count: int, seed: int = 0) -> list[Path]:
    """Writes photographs into a new folder.

    Args:
        folder: must not exist yet.
        count: number of photographs.
        seed: seed of the crops.

    Returns:
        The paths, sorted by name.
    """
    folder.mkdir(parents=True)
    sources = photographs()
    paths = [folder / f"photo-{number:06d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        _crop(sources, np.random.default_rng([seed, number])).save(path, "JPEG", quality=QUALITY)
    return paths


def write_tar(paths: Sequence[Path], tar: Path) -> None:
    """Writes files into an uncompressed tar under their own names."""
    with tarfile.open(tar, "w") as archive:
        for path in paths:
            archive.add(path, arcname=path.name)


def link_photos(paths: Sequence[Path], folder: Path, *, count: int) -> None:
    """Fills a new folder with `count` hard links, cycling through the files; each link has its own name."""
    folder.mkdir(parents=True)
    for number in range(count):
        path = paths[number % len(paths)]
        os.link(path, folder / f"link-{number:06d}{path.suffix}")


def photographs() -> list[Image.Image]:
    """The colour photographs included in the two packages (scikit-image downloads its others)."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    return [Image.fromarray(array) for array in arrays]


def _crop(sources: Sequence[Image.Image], random: np.random.Generator) -> Image.Image:
    source = sources[int(random.integers(len(sources)))]
    width = min(source.width, source.height * WIDTH_PX / HEIGHT_PX) * random.uniform(MIN_SCALE, 1)
    height = width * HEIGHT_PX / WIDTH_PX
    left, top = random.uniform(0, source.width - width), random.uniform(0, source.height - height)
    box = (left, top, left + width, top + height)
    return source.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.LANCZOS, box=box)
