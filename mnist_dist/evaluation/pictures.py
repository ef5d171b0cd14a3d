"""Small pictures of images by their URIs, members of archives too, for people to look at; None where they are gone."""

import io
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from mnist_dist.data.archives import index_archive, read_members, split_member
from mnist_dist.data.sources import read_encoded
from mnist_dist.errors import ImageError, MnistDistError

LONGEST_PX = 224
MAX_BYTES = 64 * 2**20
Pixels = npt.NDArray[np.uint8]


def load_pictures(uris: Iterable[str]) -> dict[str, Pixels | None]:
    """Pictures `uint8 [H, W, C]` of at most 224 px by URI, each archive read once; None: not readable any more."""
    alone, by_archive = list[str](), defaultdict[str, set[str]](set)
    for uri in dict.fromkeys(uris):
        place = split_member(uri)
        if place is None:
            alone.append(uri)
        else:
            by_archive[place[0]].add(place[1])
    found: dict[str, Pixels | None] = {}
    for uri in alone:
        try:
            found[uri] = _picture(next(iter(read_encoded([uri], None))))
        except (OSError, MnistDistError):
            found[uri] = None
    for archive, names in by_archive.items():
        found |= {f"{archive}!{name}": None for name in names}
        try:
            found |= {f"{archive}!{name}": _picture(data) for name, data in _members(archive, names)}
        except (OSError, MnistDistError):
            continue
    return found


def _members(archive: str, names: set[str]) -> Iterator[tuple[str, bytes | ImageError]]:
    members = [member for member in index_archive(archive).members if member.name in names]
    yield from zip((m.name for m in members), read_members(archive, members, max_bytes=MAX_BYTES), strict=True)


def _picture(data: bytes | ImageError) -> Pixels | None:
    if isinstance(data, ImageError):
        return None
    try:
        opened = Image.open(io.BytesIO(data))
        opened.draft("RGB", (LONGEST_PX, LONGEST_PX))
        image: Image.Image = ImageOps.exif_transpose(opened)
        image.thumbnail((LONGEST_PX, LONGEST_PX))
        return np.asarray(image.convert("RGB"))
    except Exception:  # the border where a decoder's failure becomes a missing picture: Pillow raises anything
        return None
