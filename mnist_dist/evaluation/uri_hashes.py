"""Hashes URIs to 64-bit numbers, so that millions of them can be looked up and counted at 8 bytes each.

Owns: the hash, and the sorted index over the hashes. Among n URIs, any two share a hash with a probability of about
n² / 2^65: 3e-6 for 10 million. The hash is Python's SipHash; its key differs between processes, so never store a hash.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

# n = URIs of an index, m = URIs looked up

Hashes = npt.NDArray[np.int64]


def uri_hashes(uris: pa.Array) -> Hashes:
    """Hashes URIs; `int64 [n]`."""
    return text_hashes(uris.to_pylist())


def text_hashes(texts: Sequence[str | None]) -> Hashes:
    """Hashes texts; `int64 [n]`."""
    return np.fromiter(map(hash, texts), np.int64, len(texts))


def repeated(parts: list[Hashes]) -> tuple[int, Hashes]:
    """Counts the duplicates (all but the first of each URI), and returns the hashes of the URIs that have some."""
    hashes = np.concatenate([np.zeros(0, np.int64), *parts])
    hashes.sort()
    again = hashes[1:] == hashes[:-1]
    return int(again.sum()), np.unique(hashes[1:][again])


class UriIndex:
    """Finds the position of a URI among n URIs; of duplicates, that of the first.

    Args:
        parts: hashes of the URIs, in order; the list is emptied, so that memory does not hold them twice.
    """

    def __init__(self, parts: list[Hashes]) -> None:
        hashes = np.concatenate([np.zeros(0, np.int64), *parts])
        parts.clear()
        self.order: npt.NDArray[np.int64] = hashes.argsort(kind="stable")
        """`int64 [n]`: the original position of each of the sorted hashes."""
        self.hashes: Hashes = hashes[self.order]
        """`int64 [n]`, sorted."""

    @property
    def repeated(self) -> int:
        """Number of duplicates: all but the first of each URI."""
        return int((self.hashes[1:] == self.hashes[:-1]).sum())

    @property
    def firsts(self) -> npt.NDArray[np.int64]:
        """The positions of the first of each URI, in the order of the hashes."""
        starts = np.append(True, self.hashes[1:] != self.hashes[:-1])[: len(self.hashes)]
        firsts: npt.NDArray[np.int64] = self.order[starts]
        return firsts

    def places(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """Looks up m URIs; `int64 [m]`: their positions, -1 for those not in the index."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        rows = np.minimum(self.hashes.searchsorted(hashes), len(self.hashes) - 1)
        return np.where(self.hashes[rows] == hashes, self.order[rows], -1)
