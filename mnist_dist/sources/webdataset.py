"""Labels in WebDataset shards: small files beside the images of an archive.

Owns: which file belongs to which image, and what it says. Does not own: reading archives (`archives`).

An image `a/017.left.jpg` is labelled by the file `a/017.left.cls`, or else by the only one of its example, which is
named up to the first dot: `a/017.cls`. The label is the text of `.cls`; where an archive has none, the `label`, `cls`,
`class`, `class_name` or `class_id` of `.json`; where it has neither, the text of `.txt`, unless all images lie in
folders or a text is a caption (several lines, or more than 100 characters).

Source: https://github.com/webdataset/webdataset, "The WebDataset format".
"""

import json
from collections.abc import Mapping, Sequence

from mnist_dist.errors import ImageError
from mnist_dist.images.formats import IMAGE_SUFFIXES
from mnist_dist.sources.archives import ArchiveIndex, Member, read_members
from mnist_dist.sources.choice import suffix_of
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store

_SUFFIXES = (".cls", ".json", ".txt")
_FIELDS = ("label", "cls", "class", "class_name", "class_id")
_MAX_BYTES = 2**20
_MAX_CHARACTERS = 100


def member_labels(index: ArchiveIndex, *, store: Store = ANYWHERE) -> Mapping[str, str]:
    """The label of each image of an archive that has one, by member name; empty: the archive labels no image.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    images = [member.name for member in index.members if suffix_of(member.name) in IMAGE_SUFFIXES]
    for suffix in _SUFFIXES:
        files = {member.name: member for member in index.members if suffix_of(member.name) == suffix}
        if not files or (suffix == ".txt" and all("/" in name.removeprefix("./") for name in images)):
            continue
        beside = _beside(images, files, suffix)
        labels = _labels(index.entry.uri, {beside[name]: files[beside[name]] for name in beside}, suffix, store)
        found = {name: labels[file] for name, file in beside.items() if file in labels}
        if found:
            return found
    return {}


def _beside(images: Sequence[str], files: Mapping[str, Member], suffix: str) -> dict[str, str]:
    """The file beside each image that has one."""
    by_stem = {name[: -len(suffix)]: name for name in files}
    of_key: dict[str, list[str]] = {}
    for name in files:
        of_key.setdefault(_key(name), []).append(name)
    found = {}
    for image in images:
        of_example = of_key.get(_key(image), [])
        stem = image[: image.rindex(".")]
        if stem in by_stem or len(of_example) == 1:
            found[image] = by_stem.get(stem) or of_example[0]
    return found


def _key(name: str) -> str:
    """The name of an example: the path up to the first dot of the last component."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _labels(archive: str, files: Mapping[str, Member], suffix: str, store: Store) -> dict[str, str]:
    by_offset = sorted(files, key=lambda name: files[name].offset)
    members: Sequence[Member] = [files[name] for name in by_offset]
    read = read_members(archive, members, max_bytes=_MAX_BYTES, store=store)
    found = {name: _label(data, suffix) for name, data in zip(by_offset, read, strict=True)}
    return {name: label for name, label in found.items() if label}


def _label(data: bytes | ImageError, suffix: str) -> str | None:
    """The label that a file holds; None: it cannot be read or holds none."""
    if isinstance(data, ImageError):
        return None
    text = data.decode("utf-8-sig", "backslashreplace").strip(" \t\r\n\0")
    if suffix == ".json":
        return _field(text)
    is_caption = suffix == ".txt" and ("\n" in text or len(text) > _MAX_CHARACTERS)
    return None if is_caption else text


def _field(text: str) -> str | None:
    try:
        example = json.loads(text)
    except (ValueError, RecursionError):
        return None
    values = (example.get(name) for name in _FIELDS) if isinstance(example, dict) else ()
    value = next((value for value in values if isinstance(value, str | int | float)), None)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode().strip()
