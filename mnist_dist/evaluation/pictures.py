"""Loads images by URI, members of archives too, as small pictures for a report.

Does not own: reading (`sources`), or the decoding that models see (`images`).
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, ImageOps

from mnist_dist.errors import ImageError, MnistDistError
from mnist_dist.images.decoder import Pixels
from mnist_dist.sources.archives import SEPARATOR, index_archive, read_members, split_member
from mnist_dist.sources.source import read_encoded

LONGEST_PX = 224
MAX_BYTES = 64 * 2**20
"""Larger members of archives are not read."""


def load_pictures(uris: Iterable[str]) -> dict[str, Pixels | None]:
    """Loads pictures `uint8 [H, W, 3]` of at most 224 px by URI, reading each archive once; None if unreadable."""
    pictures: dict[str, Pixels | None] = dict.fromkeys(uris)
    by_archive = defaultdict[str, set[str]](set)
    for uri in pictures:
        if (member := split_member(uri)) is not None:
            by_archive[member[0]].add(member[1])
            continue
        with contextlib.suppress(OSError, MnistDistError):
            pictures[uri] = _picture(next(iter(read_encoded([uri], None))))
    for archive, names in by_archive.items():
        with contextlib.suppress(OSError, MnistDistError):
            pictures |= {f"{archive}{SEPARATOR}{name}": _picture(data) for name, data in _members(archive, names)}
    return pictures


def _members(archive: str, names: set[str]) -> Iterator[tuple[str, bytes | ImageError]]:
    members = [member for member in index_archive(archive).members if member.name in names]
    encoded = read_members(archive, members, max_bytes=MAX_BYTES)
    return zip((member.name for member in members), encoded, strict=True)


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
