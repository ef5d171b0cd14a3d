"""Finds images that look alike across splits: copies of one photograph, resized, encoded again or cut a little.

Owns: the thumbnail that is kept of each decoded image, and comparing thumbnails. Does not own: where thumbnails lie
(`records.py`), or images with equal pixels (`splits.py`).

Two images look alike if few signs of the differences between neighbouring areas differ (a difference hash, in both
directions), and if their thumbnails correlate. The hash finds candidates without comparing all pairs; the correlation
tells a copy from an image of the same kind, such as two handwritten sevens.

Only images of at least `MIN_SIDE_PX` with some content are compared: small ones and plain ones look alike without being
copies. The search is bounded: each image is compared with `_NEIGHBOURS` candidates for each part of the hash.

Source of the hash: N. Krawetz, "Kind of Like That" (2013), https://www.hackerfactor.com/blog/?/archives/529.
"""

# N = records, n = records of a shard, H = height px, W = width px, C = channels

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from mnist_dist.images.pixels import Pixels

MIN_SIDE_PX = 64
"""Images of fewer px on a side have no thumbnails."""
MAX_COMPARED = 300_000
"""Of more images a sample is compared, so that the driver needs at most about 10 s and 500 MB for it."""
THUMBNAIL_PX = 16
"""Height and width of a thumbnail."""
# Measured on 317 photographs: 98 % of the copies at JPEG quality 40 or half the size are found, 97 % of those without
# 2 % of height and width, 51 % without 4 %, 6 % without 8 %; of the different photographs, none. Of 12,000 of MNIST's
# digits, enlarged to 96 px, 1 % look like one of the other 48,000; that takes 1.3 s of a core.
_MAX_SIGNS, _MIN_CORRELATION = 10, 0.98
_MIN_DIFFERENCE, _MIN_CONTENT = 4, 42  # Grey levels; how many of the 112 differences must be as large.
_BANDS = 7  # of 16 signs each: copies that differ in at most 6 signs have an equal one
_NEIGHBOURS = 32


@dataclass(frozen=True)
class NearDuplicates:
    """Images of validation and test that look like an image of an earlier split."""

    count: int
    pair: tuple[int, int]
    """The rows of the first of them, and of the image that it looks like."""


def thumbnails_of(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Grey thumbnails, `uint8 [n, 256]`, of images `uint8 [n, H, W, C]`; `uint8 [n, 0]` of small ones."""
    count, height, width, channels = pixels.shape
    if min(height, width) < MIN_SIDE_PX:
        return np.empty((count, 0), np.uint8)
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    small = [cv2.resize(image, size, interpolation=cv2.INTER_AREA).reshape(-1, channels) for image in pixels]
    return np.asarray(np.rint(np.stack(small).mean(axis=2)), np.uint8)


def find_near_duplicates(
    thumbnails: npt.NDArray[np.uint8], splits: npt.NDArray[np.int8], digests: Sequence[str]
) -> NearDuplicates | None:
    """Compares images of different splits; None: none look alike.

    Args:
        thumbnails: `uint8 [N, 256]`.
        splits: `int8 [N]`, 0 to 2 in the order of the splits; -1: the image is in none.
        digests: N digests of the pixels; equal ones are no near-duplicates.
    """
    rows = _compared(np.flatnonzero(splits >= 0))
    signs, content = _signs(thumbnails[rows])
    rows, words = rows[content >= _MIN_CONTENT], _words(signs[content >= _MIN_CONTENT])
    ids = np.unique(np.asarray(digests), return_inverse=True)[1]
    found: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        for first, second in _candidates(words, band):
            pairs = rows[np.stack([first, second])]
            pairs = pairs[:, (splits[pairs[0]] != splits[pairs[1]]) & (ids[pairs[0]] != ids[pairs[1]])]
            pairs = pairs[:, _correlations(thumbnails, *pairs) >= _MIN_CORRELATION]
            found.update(map(tuple, np.take_along_axis(pairs, np.argsort(-splits[pairs], axis=0), axis=0).T.tolist()))
    return NearDuplicates(len({later for later, _ in found}), min(found)) if found else None


def _compared(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows, or as many of them as are compared, evenly spaced."""
    if len(rows) <= MAX_COMPARED:
        return rows
    return rows[np.linspace(0, len(rows) - 1, MAX_COMPARED).astype(np.int64)]


def _signs(thumbnails: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """The signs of the differences between the 8 x 8 areas, `bool [N, 112]`, and how many are large, `int64 [N]`."""
    half = THUMBNAIL_PX // 2
    areas = thumbnails.reshape(-1, half, 2, half, 2).mean(axis=(2, 4), dtype=np.float32)
    steps = [np.diff(areas, axis=axis).reshape(len(areas), -1) for axis in (1, 2)]
    differences = np.concatenate(steps, axis=1)
    return differences > 0, (np.abs(differences) >= _MIN_DIFFERENCE).sum(axis=1)


def _words(signs: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint16]:
    """The signs as numbers, `uint16 [N, 7]`."""
    return np.packbits(signs, axis=1).view(np.uint16)


def _candidates(
    words: npt.NDArray[np.uint16], band: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Pairs of images with an equal word in a band and few other signs that differ."""
    key = (
        words[:, band].astype(np.uint32) << 16 | words[:, (band + 1) % _BANDS]
    )  # Neighbours are alike beyond the band.
    order = np.argsort(key, kind="stable")
    ordered = words[order]
    for step in range(1, _NEIGHBOURS + 1):
        places = np.flatnonzero(ordered[:-step, band] == ordered[step:, band])
        if not len(places):
            return
        differing = np.bitwise_count(ordered[places] ^ ordered[places + step]).sum(axis=1)
        places = places[differing <= _MAX_SIGNS]
        yield order[places], order[places + step]


def _correlations(
    thumbnails: npt.NDArray[np.uint8], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Pearson's correlation of each pair."""
    left, right = (_centred(thumbnails[rows]) for rows in (first, second))
    return np.asarray((left * right).sum(axis=1), np.float32)


def _centred(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6), np.float32)
