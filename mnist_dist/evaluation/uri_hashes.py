"""URIs as 64-bit numbers, so that millions of them can be looked up and counted in 8 bytes each.

Owns: the hash, the sorted index over it. Two different URIs share a hash with a chance of n² / 2^65 for n of them:
3e-6 for 10 million. It is Python's own SipHash, whose key differs from process to process: hashes are not stored.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

# n = URIs of an index, m = URIs looked up

Hashes = npt.NDArray[np.int64]


def uri_hashes(uris: pa.Array) -> Hashes:
    """`int64 [n]`, one for each URI."""
    return np.fromiter(map(hash, uris.to_pylist()), np.int64, len(uris))


def repeated(parts: list[Hashes]) -> tuple[int, Hashes]:
    """How many URIs were there before, and the hashes of those that are there more than once."""
    hashes = np.concatenate([np.zeros(0, np.int64), *parts])
    hashes.sort()
    again = hashes[1:] == hashes[:-1]
    return int(again.sum()), np.unique(hashes[1:][again])


class UriIndex:
    """Where each of n URIs stands; of one that is there several times, the first place.

    Args:
        parts: hashes of the URIs, in their order; emptied, so that they are not in memory twice.
    """

    def __init__(self, parts: list[Hashes]) -> None:
        hashes = np.concatenate([np.zeros(0, np.int64), *parts])
        parts.clear()
        self.order: npt.NDArray[np.int64] = hashes.argsort(kind="stable")
        """`int64 [n]`: the place of each of the sorted hashes."""
        self.hashes: Hashes = hashes[self.order]
        """`int64 [n]`, sorted."""

    @property
    def repeated(self) -> int:
        """How many URIs were there before."""
        return int((self.hashes[1:] == self.hashes[:-1]).sum())

    def places(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """`int64 [m]`: the place of each URI that is looked up, -1 where it is not there."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        found = np.minimum(self.hashes.searchsorted(hashes), len(self.hashes) - 1)
        return np.where(self.hashes[found] == hashes, self.order[found], -1)
