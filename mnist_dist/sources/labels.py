"""Classes and splits that follow from names: of folders, files and inputs.

Owns: the rules. Does not own: labels that stand in a file (`columns`, `webdataset`).

The rules, for the images of one input, whose paths are relative to its folder (those of members: to their archive):

- The class of an image is its top-level folder: `cat/1.png`, `cat/old/1.png`.
- If the top-level folders are all called train, val or test (or training, valid, validation, dev, testing), and `train`
  holds folders, they are splits, and the classes are the folders in them. So a class may be called `train`: beside
  `bus`, or if it holds images only.
- A single folder that holds everything in all archives is ignored, unless it has the name of a split. A member in no
  folder lies in the folder of its archive.
- An archive or Parquet file belongs to a split if its path names one (`test/0.tar`, `train-00000.parquet`), and so does
  everything of an input (`--data train.tar test.tar`); this holds if one of the files or inputs is called train.
  Folders that all of them share do not count.
"""

import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.errors import DataError
from mnist_dist.sources.archives import SEPARATOR, split_member
from mnist_dist.sources.columns import LABEL, SPLIT
from mnist_dist.sources.image_table import BATCH_ROWS
from mnist_dist.store.uris import is_remote

TRAIN = "train"
SPLIT_NAMES = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
}
"""Lower-case names of the splits, and what they mean."""
_SPLIT_PREFIX = re.compile(rf"({'|'.join(sorted(SPLIT_NAMES, reverse=True))})([-_.].*)?", re.IGNORECASE)
_UNSPECIAL = re.compile(r"[*?\[]")  # What stands before it in a glob is literal.
_MAX_SHOWN = 10
Parts = Sequence[str]
"""The components of a path."""


def fill_by_folder(table: pa.Table, *, root: str, name: str, ignored: int = 0) -> pa.Table:
    """Adds `label` and `split` to the rows of one input, from their folders where nothing else gives them.

    Args:
        table: the rows of the input, with the columns `label` and `split` if some are known.
        root: the folder that the paths of files are relative to.
        name: the input, for messages.
        ignored: number of folders around everything in the archives, from `ignored_folders`.

    Returns:
        The table with both columns; null: not known.

    Raises:
        DataError: other folders than splits stand beside train/ and test/, or a split is not called train, val or test.
    """
    labels, splits = _column(table, LABEL), _split_values(_column(table, SPLIT), name)
    unknown = _is_unknown(table)
    if pc.any(unknown).as_py():
        found = _from_folders(table.filter(unknown), root, name, ignored)
        labels = pc.replace_with_mask(labels, unknown, found[LABEL])
        known = pc.coalesce(splits.filter(unknown), found[SPLIT])
        splits = pc.replace_with_mask(splits, unknown, known)
    splits = pc.coalesce(splits, _splits_of_containers(table["archive"], root))
    kept = table.drop_columns([column for column in (LABEL, SPLIT) if column in table.column_names])
    return kept.append_column(LABEL, labels).append_column(SPLIT, splits)


def ignored_folders(tables: Iterable[pa.Table]) -> int:
    """How many folders hold everything in the archives of all inputs, and name neither a split nor a class."""
    folders = {
        folder
        for table in tables
        for is_member, folder in _folders_of(table.filter(_is_unknown(table)), "")
        if is_member
    }
    return _ignored([(*folder, "") for folder in folders])


def splits_of_names(names: Sequence[Parts]) -> list[str | None]:
    """The split of each file or input from its path, without the folders that all share; all None if none is train."""
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*names, strict=False))
    shared = sum(1 for _ in levels) if len(names) > 1 else 0
    splits = [_split_of([_UNSPECIAL.split(part)[0] for part in parts[shared:]]) for parts in names]
    return splits if TRAIN in splits else [None] * len(splits)


def empty_folders(root: str, table: pa.Table) -> list[str]:
    """The local folders beside those of the classes that hold none of the images; sorted.

    Args:
        root: the folder of the input.
        table: its images, with `label` and `split`.
    """
    if is_remote(root) or not os.path.isdir(root):
        return []
    pairs = table.select([SPLIT, LABEL]).group_by([SPLIT, LABEL]).aggregate([])
    has_splits = pc.any(pc.is_valid(pairs[SPLIT])).as_py()
    depth = 2 if has_splits else 1
    places = pc.unique(pc.coalesce(table["archive"], table["uri"]))
    used = {"/".join(_parts(uri, root)[:depth]) for uri in places.to_pylist()}
    folders = [folder for top in _folders(root) for folder in (_folders(top) if has_splits else [top])]
    names = (folder.removeprefix(root).strip("/") for folder in folders)
    return sorted(name for name in names if name not in used) if used else []


def common_folder(uris: Iterable[str]) -> str:
    """The deepest folder that contains all URIs."""
    first: list[str] | None = None
    for uri in uris:
        folders = uri.split("/")[:-1]
        same = zip(first or folders, folders, strict=False)
        first = [left for left, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], same)]
    return "/".join(first or [])


def class_names_of(
    labels: pa.ChunkedArray, splits: pa.ChunkedArray, declared: Sequence[tuple[str, ...]], *, name: str
) -> tuple[str, ...]:
    """The class names, in the order of their numbers: as declared, else sorted; whole numbers by their value.

    Args:
        labels: the label of each image, as text.
        splits: the split of each image, or null.
        declared: class names that Parquet files and named data sets declare.
        name: the data, for messages.

    Raises:
        DataError: two names differ only in their Unicode normalisation, the files declare different classes, or a
            split has a class that train has not.
    """
    seen = _seen(labels, splits)
    trained = {label for split, label in seen if split in (None, TRAIN)}
    _check_normalised({label for _, label in seen})
    if declared:
        return _declared(declared, {label for _, label in seen}, name)
    names = sorted(trained, key=_class_order)
    foreign = sorted(f"{split}/{label}" for split, label in seen if label not in trained)
    if foreign:
        raise DataError(
            f"{name}: every class must occur in train, which has {', '.join(names[:20])}."
            f" Received: {', '.join(foreign[:_MAX_SHOWN])}"
        )
    return tuple(names)


def codes_of(labels: pa.ChunkedArray, class_names: Sequence[str]) -> pa.ChunkedArray:
    """`int32 [N]`: the number of each label; -1 for null."""
    codes = pc.index_in(labels, value_set=pa.array(class_names, pa.string()))
    return pc.fill_null(codes, -1).cast(pa.int32())


# --- paths -----------------------------------------------------------------------------------------------------------


def _folders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_dir() and not entry.name.startswith((".", "_", "@"))]


def _column(table: pa.Table, name: str) -> pa.Array:
    """The column in one piece, `string [n]`; classes and splits are short."""
    if name not in table.column_names:
        return pa.nulls(len(table), pa.string())
    return table[name].cast(pa.string()).combine_chunks()


def _is_unknown(table: pa.Table) -> pa.Array:
    """Which images have no label yet; what cannot be read needs none."""
    return pc.and_(pc.is_null(_column(table, LABEL)), pc.is_null(table["status"]).combine_chunks())


def _from_folders(table: pa.Table, root: str, name: str, ignored: int) -> dict[str, pa.Array]:
    """The class and split of each row, from its folders, of which there are far fewer than images."""
    folders: dict[tuple[bool, Parts], int] = {}
    numbers = np.empty(len(table), np.int32)
    for row, folder in enumerate(_folders_of(table, root)):
        numbers[row] = folders.setdefault(folder, len(folders))
    found: list[tuple[str | None, str | None]] = [(None, None)] * len(folders)
    for is_member in (False, True):
        some = [number for (inside, _), number in folders.items() if inside == is_member]
        paths = [(*parts[ignored if is_member else 0 :], "") for inside, parts in folders if inside == is_member]
        for number, pair in zip(some, _of_folders(name, paths), strict=True):
            found[number] = pair
    labels, splits = zip(*found, strict=True)
    rows = pa.array(numbers)
    return {LABEL: pa.array(labels, pa.string()).take(rows), SPLIT: pa.array(splits, pa.string()).take(rows)}


def _folders_of(table: pa.Table, root: str) -> Iterator[tuple[bool, Parts]]:
    """For each row its folders, and whether these are folders within a container."""
    for batch in table.select(["uri", "archive"]).to_batches(max_chunksize=BATCH_ROWS):
        for uri, archive in zip(batch["uri"].to_pylist(), batch["archive"].to_pylist(), strict=True):
            folders = tuple(_path(uri, archive)[:-1]) if archive is not None else ()
            yield bool(folders), folders or tuple(_parts(archive or uri, root)[:-1])


def _splits_of_containers(archives: pa.ChunkedArray, root: str) -> pa.Array:
    """The split that the path of each row's container names; null: none, or a plain file."""
    names = pc.unique(archives).drop_null()
    splits = splits_of_names([_parts(archive, root) for archive in names.to_pylist()])
    return pa.array(splits, pa.string()).take(pc.index_in(archives, value_set=names).combine_chunks())


def _parts(uri: str, root: str) -> Parts:
    """The components of a path below `root`, the file's name among them."""
    return uri.removeprefix(root).strip("/").split("/") if uri != root else uri.split("/")[-1:]


def _path(uri: str, archive: str) -> Parts:
    """The components of a member's path in its archive."""
    member = split_member(uri)
    return (member[1] if member else uri.removeprefix(f"{archive}{SEPARATOR}")).strip("/").removeprefix("./").split("/")


# --- folders ---------------------------------------------------------------------------------------------------------


def _of_folders(name: str, paths: Sequence[Parts]) -> list[tuple[str | None, str | None]]:
    """The class and split of each path; None: it lies in no class folder, or there are no splits."""
    of_split = 1 if _is_split_layout(name, paths) else 0
    return [
        (parts[of_split], SPLIT_NAMES[parts[0].lower()] if of_split else None)
        if len(parts) >= of_split + 2
        else (None, None)
        for parts in paths
    ]


def _ignored(paths: Sequence[Parts]) -> int:
    """How many folders hold everything and name neither a split nor a class."""
    depth = 0
    while paths and all(len(parts) >= depth + 3 for parts in paths):
        tops = {parts[depth] for parts in paths}
        if len(tops) > 1 or tops.pop().lower() in SPLIT_NAMES:
            break
        depth += 1
    return depth


def _is_split_layout(name: str, paths: Sequence[Parts]) -> bool:
    tops = {parts[0] for parts in paths if len(parts) >= 2}
    others = sorted(top for top in tops if top.lower() not in SPLIT_NAMES)
    holding = {SPLIT_NAMES[parts[0].lower()] for parts in paths if len(parts) >= 3 and parts[0].lower() in SPLIT_NAMES}
    if TRAIN not in holding:
        return False
    inside = {
        is_other: {parts[1] for parts in paths if len(parts) >= 3 and (parts[0] in others) == is_other}
        for is_other in (False, True)
    }
    if others and (len(holding) > 1 or inside[False] & inside[True]):  # The same classes, or two splits.
        raise DataError(
            f"{name}: only val/ and test/ may stand beside train/. Received: {', '.join(others[:_MAX_SHOWN])}"
        )
    return not others


def _split_of(parts: Parts) -> str | None:
    names = (match[1].lower() for part in parts if (match := _SPLIT_PREFIX.fullmatch(part)))
    return next((SPLIT_NAMES[name] for name in names), None)


def _split_values(values: pa.Array, name: str) -> pa.Array:
    """The splits that a column gives, in their short form; empty text is none."""
    found = pc.unique(values).drop_null().to_pylist()
    unknown = sorted(value for value in found if value and value.lower() not in SPLIT_NAMES)
    if unknown:
        raise DataError(
            f"{name}: the column {SPLIT!r} must hold {', '.join(SPLIT_NAMES)}."
            f" Received: {', '.join(unknown[:_MAX_SHOWN])}"
        )
    short = pa.array([SPLIT_NAMES.get(value.lower()) for value in found], pa.string())
    return short.take(pc.index_in(values, value_set=pa.array(found, pa.string())))


# --- classes ---------------------------------------------------------------------------------------------------------


def _seen(labels: pa.ChunkedArray, splits: pa.ChunkedArray) -> set[tuple[str | None, str]]:
    pairs = pa.table({LABEL: labels, SPLIT: splits}).group_by([LABEL, SPLIT]).aggregate([])
    rows = zip(pairs[SPLIT].to_pylist(), pairs[LABEL].to_pylist(), strict=True)
    return {(split, label) for split, label in rows if label is not None}


def _declared(declared: Sequence[tuple[str, ...]], labels: set[str], name: str) -> tuple[str, ...]:
    if len(set(declared)) > 1:
        shown = " and ".join(str(list(names)) for names in sorted(set(declared), key=str)[:2])
        raise DataError(f"{name}: all data must name the same classes in the same order. Received: {shown}")
    foreign = sorted(labels - {*declared[0]})
    if foreign:
        raise DataError(
            f"{name}: the classes are declared as {', '.join(declared[0][:20])}."
            f" Received: {', '.join(foreign[:_MAX_SHOWN])}"
        )
    return declared[0]


def _class_order(name: str) -> tuple[int, int, str]:
    """Whole numbers by their value, then everything else."""
    is_number = name.isdecimal() and name.isascii()
    return (0, int(name), name) if is_number else (1, 0, name)


def _check_normalised(names: Iterable[str]) -> None:
    same: dict[str, list[str]] = {}
    for name in sorted(names):
        same.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    for spellings in same.values():
        if len(spellings) > 1:
            shown = " and ".join(f"{name!r} ({' '.join(f'U+{ord(char):04X}' for char in name)})" for name in spellings)
            raise DataError(
                f"two classes have the same name in different Unicode normalisation; rename one. Received: {shown}"
            )
