"""Labels in WebDataset shards: small files beside the images of an archive.

Owns: which file belongs to which image, and what it says. Does not own: reading archives (`archives`).

Files that share their path up to the first dot of the name are one example: `a/017.jpg`, `a/017.cls`. The label is the
text of `.cls`; where an archive has none, the `label`, `cls`, `class`, `class_name` or `class_id` of `.json`; where it
has neither, the text of `.txt`, unless that is a caption (several lines, or more than 100 characters).

Source: https://github.com/webdataset/webdataset, "The WebDataset format".
"""

import json
import re
from collections.abc import Mapping, Sequence

from mnist_dist.errors import ImageError
from mnist_dist.images.decoder import IMAGE_SUFFIXES
from mnist_dist.sources.archives import ArchiveIndex, Member, read_members
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store

_SUFFIXES = (".cls", ".json", ".txt")
_FIELDS = ("label", "cls", "class", "class_name", "class_id")
_PARTS = re.compile(r"((?:.*/)?[^/.]*)(?:\.[^/]*)?(\.[^/.]*)", re.DOTALL)
_MAX_BYTES = 2**20
_MAX_CHARACTERS = 100


def member_labels(index: ArchiveIndex, *, store: Store = ANYWHERE) -> Mapping[str, str]:
    """The label of each image of an archive that has one, by member name; empty: the archive labels no image.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    images: dict[str, list[str]] = {}
    beside: dict[str, dict[str, Member]] = {suffix: {} for suffix in _SUFFIXES}
    for member in index.members:
        key, suffix = _parts(member.name)
        if suffix in IMAGE_SUFFIXES:
            images.setdefault(key, []).append(member.name)
        elif suffix in beside:
            beside[suffix][key] = member
    for suffix in _SUFFIXES:
        files = {key: member for key, member in beside[suffix].items() if key in images}
        labels = _labels(index.entry.uri, files, suffix, store)
        if labels:
            return {name: label for key, label in labels.items() for name in images[key]}
    return {}


def _parts(name: str) -> tuple[str, str]:
    """The key of an example, and the last suffix in lower case."""
    match = _PARTS.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def _labels(archive: str, files: Mapping[str, Member], suffix: str, store: Store) -> dict[str, str]:
    by_offset = sorted(files, key=lambda key: files[key].offset)
    members: Sequence[Member] = [files[key] for key in by_offset]
    read = read_members(archive, members, max_bytes=_MAX_BYTES, store=store)
    found = {key: _label(data, suffix) for key, data in zip(by_offset, read, strict=True)}
    return {key: label for key, label in found.items() if label}


def _label(data: bytes | ImageError, suffix: str) -> str | None:
    """The label that a file holds; None: it cannot be read or holds none."""
    if isinstance(data, ImageError):
        return None
    text = data.decode("utf-8", "backslashreplace").strip()
    if suffix == ".json":
        return _field(text)
    is_caption = suffix == ".txt" and ("\n" in text or len(text) > _MAX_CHARACTERS)
    return None if is_caption else text


def _field(text: str) -> str | None:
    try:
        example = json.loads(text)
    except ValueError:
        return None
    values = (example.get(name) for name in _FIELDS) if isinstance(example, dict) else ()
    return next((str(value) for value in values if isinstance(value, str | int)), None)
