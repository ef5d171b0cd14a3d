"""Lists the records of a data set in a table, and reads their encoded bytes.

Owns: the layouts of folders and Parquet files, and reading. Does not own: the arrays of named data sets (`arrays`),
decoding (`images`), or which record is trained on (`splits`); a split that the data defines is passed on.

There are two kinds of sources. An *array source* (`digits`, `mnist`, `fashion_mnist`) is small and already decoded: its
pixels are in memory. For any other source only names, sizes and labels are read here; `read_encoded` reads the bytes.
"""

# N = records, H = height px, W = width px, C = channels

import collections
import hashlib
import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa

from mnist_dist.config import DataConfig, require
from mnist_dist.errors import DataError, ImageError
from mnist_dist.images.decoder import IMAGE_SUFFIXES, ImageSpec, Pixels, probe_image
from mnist_dist.sources.arrays import NAMED_ARRAYS, read_arrays
from mnist_dist.sources.parquet import PARQUET_SUFFIX, LabelColumn, read_labels, read_rows
from mnist_dist.sources.threads import map_in_threads
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Entry
from mnist_dist.store.uris import absolute

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Value = TypeVar("_Value")


KNOWN_DATA = tuple(NAMED_ARRAYS)
TABLE_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("label", pa.int32()),
        ("split", pa.string()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
    ]
)
_SPLIT_NAMES = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
}
_SPLIT_PREFIX = re.compile(rf"({'|'.join(sorted(_SPLIT_NAMES, reverse=True))})([-_.].*)?", re.IGNORECASE)
_PROBED_IMAGES = 64
_SMALL_SIDE_PX = 64
_READ_THREADS = 8  # They wait for storage, not for a core.
_READ_AHEAD = 16  # Bounds the files held in memory; a file may have any size.


@dataclass(frozen=True, kw_only=True)
class Source:
    """The records of a data set, before anything is decoded."""

    name: str
    """The name or absolute URI of the data, for messages."""
    class_names: tuple[str, ...]
    """Class names; a label is an index into them."""
    table: pa.Table
    """One row per record (`TABLE_SCHEMA`): uri, label, split (null, `train`, `val` or `test`), size_bytes and etag (of
    the file that holds the record). Files are sorted by URI, arrays keep the order of the data."""
    pixels: Pixels | None = None
    """Array sources: `uint8 [N, H, W, C]`, 0-255, in the order of the table."""
    image_column: str | None = None
    """Parquet only: the column that holds the image bytes. The URI of a record is then `file.parquet!ROW`."""


def open_source(config: DataConfig) -> Source:
    """Lists the data that `config.data` names, with `config.skip` and `config.limit` applied.

    Raises:
        DataError: the data is unknown, empty or corrupt, has only one class, or its splits contradict each other.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    _log.info("listing %s", config.data)
    source = _limited(_open(config), config)
    if len(source.class_names) < 2:
        raise DataError(f"{source.name}: a classifier needs at least two classes. Received: {source.class_names}")
    counts = dict(collections.Counter(source.table["split"].to_pylist()))
    _log.info("%s: %d images, %d classes, splits %s", source.name, len(source.table), len(source.class_names), counts)
    return source


def image_spec(source: Source, *, backbone_size_px: int, scratch_size: bool, config: DataConfig) -> ImageSpec:
    """Chooses the size and channels that every image of the source is decoded to.

    Keeps the native size if 64 probed images have the same small size (at most 64 px) and it is no larger than the
    backbone's. Otherwise images become a square of the backbone's size.

    Args:
        source: from `open_source`.
        backbone_size_px: height and width of the backbone's input, px.
        scratch_size: the backbone takes any size, so a small native size may be larger than the backbone's own.
        config: gives channels and resize rule.

    Raises:
        DataError: none of the probed images can be read.
        ServiceError: see `store.base`.
    """
    array = source.pixels
    probes = _probe_array(array) if array is not None else _probe_files(source, config.max_pixels)
    width_px, height_px = min(probe[:2] for probe in probes)
    uniform = all(probe[:2] == (width_px, height_px) for probe in probes)
    largest_px = _SMALL_SIDE_PX if scratch_size else min(_SMALL_SIDE_PX, backbone_size_px)
    keeps_aspect = width_px == height_px or scratch_size or config.resize == "stretch"  # The device only stretches.
    if not uniform or not keeps_aspect or max(width_px, height_px) > largest_px:
        width_px = height_px = backbone_size_px
    channels = max(probe[2] for probe in probes) if config.channels == "auto" else int(config.channels)
    return ImageSpec(height_px=height_px, width_px=width_px, channels=channels, resize=config.resize)


def read_encoded(uris: Sequence[str], image_column: str | None) -> Iterator[bytes | ImageError]:
    """Reads the encoded bytes of each image, in order; an image that cannot be read yields its error.

    A few threads read files slightly ahead of the consumer. Rows of a Parquet file are read one after the other.

    Args:
        uris: URIs of images, or `file.parquet!ROW`.
        image_column: Parquet only: the column that holds the image bytes.

    Yields:
        The bytes, or an `ImageError` with status `missing`, `denied`, `empty`, `failed` or `unreadable`.

    Raises:
        ServiceError, StorageError: the storage failed, not a single image.
    """
    if image_column is None:
        return map_in_threads(_read_file, uris, threads=_READ_THREADS, ahead=_READ_AHEAD)
    return read_rows(uris, image_column)


def image_error(error: OSError) -> ImageError:
    """The `ImageError` of one unreadable file; a failure that concerns more than one file is a ServiceError."""
    if isinstance(error, FileNotFoundError):
        return ImageError("missing", "no such file")
    if isinstance(error, PermissionError):
        return ImageError("denied", error.strerror or str(error))
    return ImageError("failed", error.strerror or str(error))  # A bad sector, or a folder or pipe of that name.


def _open(config: DataConfig) -> Source:
    if config.data in NAMED_ARRAYS:
        return _open_arrays(config.data, config.data_dir)
    root = absolute(config.data)
    try:
        entries = list(ANYWHERE.list_entries(root))
    except PermissionError as err:
        raise DataError(f"permission to list the data was denied: {err}. Received: data={config.data!r}") from err
    if not entries:
        _check_not_empty(config.data, root)
    suffixes = {_suffix(entry.uri) for entry in entries}
    if PARQUET_SUFFIX in suffixes and suffixes.isdisjoint(IMAGE_SUFFIXES):
        return _open_parquet(root, entries, config)
    return _open_folder(root, entries)


def _check_not_empty(data: str, root: str) -> None:
    if ANYWHERE.exists(root):
        raise DataError(f"the folder is empty. Received: data={data!r}")
    raise DataError(
        f"data must be one of {', '.join(KNOWN_DATA)}, or an existing folder, s3:// prefix or Parquet file."
        f" Received: data={data!r} ({root} does not exist)"
    )


def _limited(source: Source, config: DataConfig) -> Source:
    """Drops the first `skip` training records, then keeps the first `limit` records of each split.

    The order is that of sha256(uri), so that both are random samples."""
    if config.limit is None and not config.skip:
        return source
    ranked = sorted(
        (str(split), hashlib.sha256(uri.encode()).digest(), row)
        for row, (uri, split) in enumerate(
            zip(source.table["uri"].to_pylist(), source.table["split"].to_pylist(), strict=True)
        )
    )
    rows = []
    for split, ranks in itertools.groupby(ranked, key=lambda rank: rank[0]):
        first = 0 if split in ("val", "test") else config.skip
        last = None if config.limit is None else first + config.limit
        rows += [rank[2] for rank in itertools.islice(ranks, first, last)]
    require(bool(rows), f"skip must leave some of the {len(ranked):,} images", skip=config.skip)
    rows.sort()
    pixels = None if source.pixels is None else source.pixels[rows]
    return replace(source, table=source.table.take(rows), pixels=pixels)


def _suffix(uri: str) -> str:
    name = uri.rpartition("/")[2].lower()
    return "." + name.rpartition(".")[2] if "." in name else ""


def _table(records: Sequence[tuple[Entry, str]], labels: Sequence[int], splits: Sequence[str | None]) -> pa.Table:
    """Builds a table of `TABLE_SCHEMA`; each record is a pair of the file that holds it and its own URI."""
    columns = [
        [uri for _, uri in records],
        labels,
        splits,
        [entry.size_bytes for entry, _ in records],
        [entry.etag for entry, _ in records],
    ]
    try:
        return pa.table(columns, schema=TABLE_SCHEMA)
    except UnicodeEncodeError as err:
        raise DataError(f"file names must be valid Unicode. Received: {err.object!r}") from err


def _trained_classes(root: str, values: Sequence[_Value], splits: Sequence[str | None]) -> list[_Value]:
    """Sorted classes of the training split; no other split may have further ones."""
    seen = set(zip(splits, values, strict=True))
    trained = {value for split, value in seen if split in (None, "train")}
    names = sorted(trained, key=_class_order)
    foreign = sorted(f"{split}/{value}" for split, value in seen if value not in trained)
    if foreign:
        raise DataError(
            f"{root}: every class must occur in train, which has {', '.join(map(str, names[:20]))}."
            f" Received: {', '.join(foreign[:10])}"
        )
    return names


def _class_order(value: object) -> tuple[int, str]:
    return (value if isinstance(value, int) else 0, str(value))


def _read_file(uri: str) -> bytes | ImageError:
    try:
        return ANYWHERE.read_bytes(uri) or ImageError("empty", "the file has no bytes")
    except OSError as err:
        return image_error(err)


def _probe_array(pixels: Pixels) -> list[tuple[int, int, int]]:
    _, height, width, channels = pixels.shape
    return [(width, height, channels)]


def _probe_files(source: Source, max_pixels: int) -> list[tuple[int, int, int]]:
    count = min(_PROBED_IMAGES, len(source.table))
    rows = np.linspace(0, len(source.table) - 1, count).astype(np.int64)
    probes, errors = [], []
    for data in read_encoded(source.table["uri"].take(rows).to_pylist(), source.image_column):
        try:
            if isinstance(data, ImageError):
                raise data
            probes.append(probe_image(data, max_pixels=max_pixels))
        except ImageError as err:
            errors.append(err)
    if not probes:
        first = errors[0]
        raise DataError(f"{source.name}: none of {count} probed images can be read. Received: {first}") from first
    return probes


# --- arrays ----------------------------------------------------------------------------------------------------------


def _open_arrays(name: str, data_dir: str | None) -> Source:
    class_names, parts = read_arrays(name, data_dir)
    images = np.concatenate([part.images for part in parts])
    pixels = images if images.ndim == 4 else images[..., None]
    image_bytes = math.prod(pixels.shape[1:])
    uris = [f"{name}/{part.split or 'all'}/{row:05d}" for part in parts for row in range(len(part.images))]
    table = _table(
        [(Entry(uri, image_bytes, ""), uri) for uri in uris],
        [int(label) for part in parts for label in part.labels],
        [part.split for part in parts for _ in part.labels],
    )
    return Source(name=name, class_names=class_names, table=table, pixels=pixels)


# --- folders of images -----------------------------------------------------------------------------------------------


def _open_folder(root: str, entries: Sequence[Entry]) -> Source:
    files = [(entry, entry.uri.removeprefix(root).strip("/").split("/")) for entry in entries]
    images = [(entry, parts) for entry, parts in files if _is_image(parts)]
    if len(images) < len(files):
        _log.warning("%s: skipped %d files that are hidden or not named like images", root, len(files) - len(images))
    if not images:
        raise DataError(
            f"{root}: no file below it is named like an image ({', '.join(IMAGE_SUFFIXES)})."
            f" Received: {len(files)} other files"
        )
    depth = 1 if _is_split_layout(root, images) else 0
    placed = [(entry, parts) for entry, parts in images if len(parts) >= depth + 2]
    if len(placed) < len(images):
        _log.warning("%s: skipped %d images that are in no class folder", root, len(images) - len(placed))
    if not placed:
        raise DataError(f"{root}: images must be in one subfolder per class. Received: {len(images)} images in none")
    splits = [_SPLIT_NAMES[parts[0].lower()] if depth else None for _, parts in placed]
    names = [parts[depth] for _, parts in placed]
    class_names = tuple(_trained_classes(root, names, splits))
    label_of = {name: label for label, name in enumerate(class_names)}
    table = _table([(entry, entry.uri) for entry, _ in placed], [label_of[name] for name in names], splits)
    return Source(name=root, class_names=class_names, table=table)


def _is_image(parts: Sequence[str]) -> bool:
    return _suffix(parts[-1]) in IMAGE_SUFFIXES and not any(part.startswith(".") for part in parts)


def _is_split_layout(root: str, images: Sequence[tuple[Entry, Sequence[str]]]) -> bool:
    """Whether the top-level folders are splits rather than classes: `train` is one of them and holds folders."""
    if not any(_SPLIT_NAMES.get(parts[0].lower()) == "train" and len(parts) >= 3 for _, parts in images):
        return False
    others = {parts[0] for _, parts in images if len(parts) >= 2 and parts[0].lower() not in _SPLIT_NAMES}
    if others:
        shown = ", ".join(sorted(others)[:10])
        raise DataError(f"{root}: only val/ and test/ may stand beside train/. Received: {shown}")
    return True


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _open_parquet(root: str, entries: Sequence[Entry], config: DataConfig) -> Source:
    files = [entry for entry in entries if _suffix(entry.uri) == PARQUET_SUFFIX]
    columns = [
        read_labels(file.uri, image_column=config.image_column, label_column=config.label_column) for file in files
    ]
    rows = [(file, row) for file, column in zip(files, columns, strict=True) for row in range(len(column.values))]
    if not rows:
        raise DataError(f"{root}: the Parquet files have no rows. Received: {len(files)} files")
    split_of = dict(zip((file.uri for file in files), _parquet_splits(root, files), strict=True))
    splits = [split_of[file.uri] for file, _ in rows]
    class_names, labels = _encode_labels(root, columns, splits)
    table = _table([(file, f"{file.uri}!{row}") for file, row in rows], labels, splits)
    return Source(name=root, class_names=class_names, table=table, image_column=config.image_column)


def _parquet_splits(root: str, files: Sequence[Entry]) -> list[str | None]:
    """Split of each file, from names like those of Hugging Face: `test/0.parquet`, `test-00000-of-00001.parquet`."""
    splits: list[str | None] = []
    for entry in files:
        parts = entry.uri.removeprefix(root).strip("/").split("/")
        names = [match[1].lower() for part in parts if (match := _SPLIT_PREFIX.fullmatch(part))]
        splits.append(_SPLIT_NAMES[names[0]] if names else None)
    if "train" not in splits:
        return [None] * len(files)
    if None in splits:
        unclear = files[splits.index(None)].uri
        raise DataError(f"{root}: beside train, files must be named train, val or test. Received: {unclear!r}")
    return splits


def _encode_labels(
    root: str, columns: Sequence[LabelColumn], splits: Sequence[str | None]
) -> tuple[tuple[str, ...], list[int]]:
    values = [value for column in columns for value in column.values]
    if len({type(value) for value in values}) > 1:
        raise DataError(f"{root}: the labels of the Parquet files must be all strings or all integers. Received: both")
    named = {column.names for column in columns}
    names = next(iter(named))
    if not isinstance(values[0], str) and len(named) > 1:
        shown = " and ".join(str(list(names)) if names else "none" for names in sorted(named, key=str)[:2])
        raise DataError(f"{root}: all Parquet files must name the same classes in the same order. Received: {shown}")
    if isinstance(values[0], str) or names is None:
        classes = _trained_classes(root, values, splits)
        label_of = {value: label for label, value in enumerate(classes)}
        return tuple(map(str, classes)), [label_of[value] for value in values]
    numbers = [int(value) for value in values]
    if min(numbers) < 0 or max(numbers) >= len(names):
        raise DataError(
            f"{root}: labels must be 0 to {len(names) - 1}, as the file names {len(names)} classes."
            f" Received: {min(numbers)} to {max(numbers)}"
        )
    return names, numbers
