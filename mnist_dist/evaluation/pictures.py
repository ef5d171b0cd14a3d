"""Loads images by URI, members of archives and rows of Parquet files too, as small pictures for a report.

Does not own: reading (`sources`), or the decoding that models see (`images`).
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

from mnist_dist.errors import ImageError, MnistDistError
from mnist_dist.images.pixels import Pixels
from mnist_dist.sources.archives import split_member
from mnist_dist.sources.listing import list_uris
from mnist_dist.sources.parquet import split_row
from mnist_dist.sources.reading import read_in_order
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store

LONGEST_PX = 224
MAX_BYTES = 64 * 2**20
"""Larger images are not read."""


def load_pictures(uris: Iterable[str], *, store: Store = ANYWHERE) -> dict[str, Pixels | None]:
    """Loads pictures `uint8 [H, W, 3]` of at most 224 px by URI, reading each archive once; None if unreadable."""
    pictures: dict[str, Pixels | None] = dict.fromkeys(uris)
    by_container = defaultdict[str, list[str]](list)
    for uri in pictures:
        part = split_member(uri) or split_row(uri)
        by_container[part[0] if part else uri].append(uri)
    for group in by_container.values():
        with contextlib.suppress(OSError, MnistDistError):  # A report without a picture is better than none.
            rows = list_uris(group, store=store)
            read = read_in_order(rows, max_bytes=MAX_BYTES, store=store)
            for uri, data in zip(rows["uri"].to_pylist(), read, strict=True):
                if uri in pictures:
                    pictures[uri] = _picture(data)
    return pictures


def _picture(data: bytes | ImageError) -> Pixels | None:
    if isinstance(data, ImageError):
        return None
    try:
        opened = Image.open(io.BytesIO(data))
        opened.draft("RGB", (LONGEST_PX, LONGEST_PX))
        image: Image.Image = ImageOps.exif_transpose(opened)
        image.thumbnail((LONGEST_PX, LONGEST_PX))
        return np.asarray(image.convert("RGB"))
    except Exception:  # Pillow raises errors of any type for a damaged image; the report shows no picture then.
        return None
