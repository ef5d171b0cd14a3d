"""The source of a training or search: the listed images with classes and splits, ready to be decoded.

Owns: the classes as numbers, taking a part of the images, and the size that they are decoded to. Does not own: listing
(`listing`), reading (`reading`), decoding (`images`), or which image is trained on (`data/splits.py`); a split that the
data defines is passed on.

Named data sets are small and already decoded: where one is all there is, its pixels are in memory.
"""

# N = records, H = height px, W = width px, C = channels

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.config import DataConfig, require
from mnist_dist.errors import DataError, ImageError, StorageError
from mnist_dist.images.decoder import probe_image
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.score_config import InputConfig
from mnist_dist.sources import arrays, groups, image_table, label_sets, labels
from mnist_dist.sources.columns import GROUP, LABEL, SPLIT, SetForm
from mnist_dist.sources.label_sets import LabelSets
from mnist_dist.sources.listing import Listing, list_inputs, with_etags
from mnist_dist.sources.reading import read_in_order
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import absolute, join

_log = logging.getLogger(__name__)
_PROBED_IMAGES = 64
_PROBED_BYTES = 256 * 2**20
_MAX_SHOWN = 3  # inputs in the name of a source, classes in a message
_MAX_NAMES = 1_000  # of a folder that is looked at for a message
SMALL_SIDE_PX = 64
"""Images of at most this size on both sides are small: they are trained on as they are, not as photographs."""
Probe = tuple[int, int, int]
"""Width and height in px, and channels."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The records of a data set, before anything is decoded."""

    name: str
    """The names or absolute URIs of the data, for messages."""
    class_names: tuple[str, ...]
    """Class names; a label is an index into them, or with `label_sets` into those."""
    label_sets: LabelSets
    """The classes of each label, where images have any number of them; empty: each has one."""
    table: pa.Table
    """One row per record: `image_table.COLUMNS`, then `label` (int32; -1: an unreadable record without a class),
    `split` (null, `train`, `val` or `test`) and, if images are grouped, `group` (null: it is on its own)."""
    notes: tuple[str, ...] = ()
    """What a person should know about what was opened, ignored and left out."""
    store: Store = ANYWHERE
    """Where the images are read from."""
    pixels: Pixels | None = None
    """A single named data set: `uint8 [N, H, W, C]`, 0-255, in the order of the table."""


def open_source(config: DataConfig, *, store: Store = ANYWHERE) -> Source:
    """Lists the data that `config.data` names, with `config.skip` and `config.limit` applied.

    Args:
        config: what to list.
        store: where the data is.

    Raises:
        DataError: the data is unknown, empty or corrupt, has only one class, its splits contradict each other, or no
            image has a group.
        ServiceError, StorageError: see `store.base`.
    """
    listing = list_inputs(
        input_config(config),
        label_column=config.label_column,
        group_column=config.group_by,
        sets=SetForm(config.label_separator, config.class_columns) if config.has_sets else None,
        store=store,
    )
    name = ", ".join(map(_shown, config.data[:_MAX_SHOWN])) + (", ..." if len(config.data) > _MAX_SHOWN else "")
    source = _limited(replace(_coded(name, listing, config), store=store), config)
    if config.group_by is not None:
        source = _grouped(source, config.group_by, listing.columns)
    source = replace(source, table=with_etags(source.table, store=store))  # A changed image must be decoded again.
    if len(source.class_names) < 2:
        hint = _classes_below(config, source.class_names, store)
        raise DataError(f"{source.name}: a classifier needs at least two classes{hint}. Received: {source.class_names}")
    counts = {item["values"]: item["counts"] for item in pc.value_counts(source.table[SPLIT]).to_pylist()}
    _log.info("%s: %d images, %d classes, splits %s", source.name, len(source.table), len(source.class_names), counts)
    return source


def input_config(config: DataConfig) -> InputConfig:
    """The data of a training as the inputs of a listing."""
    return InputConfig(
        input=config.data, image_column=config.image_column, uri_column=config.uri_column, data_dir=config.data_dir
    )


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
    largest_px = SMALL_SIDE_PX if scratch_size else min(SMALL_SIDE_PX, backbone_size_px)
    keeps_aspect = width_px == height_px or scratch_size or config.resize == "stretch"  # The device only stretches.
    if not uniform or not keeps_aspect or max(width_px, height_px) > largest_px:
        width_px = height_px = backbone_size_px
    channels = max(probe[2] for probe in probes) if config.channels == "auto" else int(config.channels)
    return ImageSpec(height_px=height_px, width_px=width_px, channels=channels, resize=config.resize)


def taken(source: Source, rows: list[int]) -> Source:
    """The source with these rows only, in this order."""
    numbers = pa.array(rows, pa.int64())
    columns = [image_table.taken(source.table[name], numbers) for name in source.table.column_names]
    pixels = None if source.pixels is None else source.pixels[rows]
    return replace(source, table=pa.table(columns, schema=source.table.schema), pixels=pixels)


def _classes_below(config: DataConfig, class_names: tuple[str, ...], store: Store) -> str:
    """Where the classes may be, if the only one is a folder that holds folders."""
    if len(config.data) > 1 or len(class_names) != 1 or config.data[0] in arrays.NAMED_ARRAYS:
        return ""
    below = join(absolute(config.data[0]), class_names[0])
    try:
        folders = store.list_level(below, max_names=_MAX_NAMES).folders
    except (OSError, StorageError):  # The class is no folder.
        return ""
    return f" (did you mean {below}, which holds {', '.join(folders[:_MAX_SHOWN])}?)" if len(folders) > 1 else ""


def _shown(name: str) -> str:
    return name if name in arrays.NAMED_ARRAYS else absolute(name)


def _coded(name: str, listing: Listing, config: DataConfig) -> Source:
    table, splits = listing.table, listing.table[SPLIT]
    sets: LabelSets = ()
    if config.has_sets:
        declared = (config.class_columns,) if config.class_columns else listing.class_names
        class_names, sets, codes = label_sets.coded(table[LABEL], splits, declared, name=name)
    else:
        class_names = labels.class_names_of(table[LABEL], splits, listing.class_names, name=name)
        codes = labels.codes_of(table[LABEL], class_names)
    return Source(
        name=name,
        class_names=class_names,
        label_sets=sets,
        table=table.set_column(table.schema.get_field_index(LABEL), LABEL, codes),
        notes=tuple(listing.notes()),
        pixels=_pixels(config),
    )


def _grouped(source: Source, group_by: str, columns: Sequence[str]) -> Source:
    """The source with the group of each record, and a note of how many there are."""
    found = groups.groups_of(source.table, group_by, columns=columns)
    number = source.table.schema.get_field_index(GROUP)
    table = source.table.set_column(number, GROUP, pa.chunked_array([found]))
    return replace(source, table=table, notes=(*source.notes, *groups.notes(table, group_by)))


def _pixels(config: DataConfig) -> Pixels | None:
    if len(config.data) > 1 or config.data[0] not in arrays.NAMED_ARRAYS:
        return None
    return arrays.cached_pixels(config.data[0], config.data_dir)


def _limited(source: Source, config: DataConfig) -> Source:
    """Drops the first `skip` training records, then keeps the first `limit` records of each split.

    The order is that of sha256(uri), so that both are random samples."""
    if config.limit is None and not config.skip:
        return source
    ranked = sorted(
        (str(split), hashlib.sha256(uri.encode()).digest(), row)
        for row, (uri, split) in enumerate(
            zip(source.table["uri"].to_pylist(), source.table[SPLIT].to_pylist(), strict=True)
        )
    )
    rows = []
    for split, ranks in itertools.groupby(ranked, key=lambda rank: rank[0]):
        first = 0 if split in ("val", "test") else config.skip
        last = None if config.limit is None else first + config.limit
        rows += [rank[2] for rank in itertools.islice(ranks, first, last)]
    require(bool(rows), f"skip must leave some of the {len(ranked):,} images", skip=config.skip)
    return taken(source, sorted(rows))


def _probe_array(pixels: Pixels) -> list[Probe]:
    _, height, width, channels = pixels.shape
    return [(width, height, channels)]


def _probe_files(source: Source, max_pixels: int) -> list[Probe]:
    probes, errors = probe_some(source.table, count=_PROBED_IMAGES, max_pixels=max_pixels, store=source.store)
    if not probes:
        first = errors[0] if errors else source.table["error"].drop_null()[0].as_py()
        raise DataError(f"{source.name}: none of {len(errors)} probed images can be read. Received: {first}")
    return probes


def probe_some(
    table: pa.Table, *, count: int, max_pixels: int, store: Store = ANYWHERE
) -> tuple[list[Probe], list[ImageError]]:
    """Reads the headers of some images, evenly spread over those that may be readable.

    Args:
        table: the rows of the images, `image_table.COLUMNS`.
        count: how many.
        max_pixels: larger images are not probed.
        store: where they are read from.

    Returns:
        The probes in the order of the table, and why the others have none.

    Raises:
        ServiceError, StorageError: see `store.base`.
    """
    readable = np.flatnonzero(pc.is_null(table["status"]).to_numpy())
    count = min(count, len(readable))
    rows = readable[np.linspace(0, len(readable) - 1, count).astype(np.int64)] if count else readable
    probes, errors = [], []
    for data in read_in_order(table.take(pa.array(rows)), max_bytes=_PROBED_BYTES, store=store):
        try:
            if isinstance(data, ImageError):
                raise data
            probes.append(probe_image(data, max_pixels=max_pixels))
        except ImageError as err:
            errors.append(err)
    return probes, errors
