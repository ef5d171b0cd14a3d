"""Finds the labels of the images in a prediction table.

Owns: where labels come from, in this order: what the user names (a label file, or any labelled images), a carried
column of the table, the images that were scored just before, the folders of the images. Does not own: which label
belongs to which image (`matching`), which class a label means (`tables.Classes`), or images with several labels
(`label_sets`).
"""

import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from mnist_dist.errors import ConfigError, DataError
from mnist_dist.evaluate_config import LABEL_COLUMN, Match
from mnist_dist.evaluation.matching import BY_URI, Known, Labels, Rule, rule_of
from mnist_dist.evaluation.tables import ScoredTable
from mnist_dist.evaluation.uri_hashes import Hashes, UriIndex
from mnist_dist.score_config import InputConfig
from mnist_dist.sources.archives import ARCHIVE_SUFFIXES, SEPARATOR
from mnist_dist.sources.choice import row_of_line
from mnist_dist.sources.columns import LABEL_FLAG, LABEL_KINDS, URI, URI_FLAG, check_header, clean, is_label
from mnist_dist.sources.image_table import COLUMNS
from mnist_dist.sources.listing import list_inputs
from mnist_dist.sources.lists import header_of, open_csv, trimmed
from mnist_dist.sources.parquet import PARQUET_SUFFIX, holds_images
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.surroundings import what_is_there
from mnist_dist.store.uris import absolute, are_remote

# n = rows of a batch

_URI, _LABEL = "uri", "label"
"""What a column of labels may hold, for messages."""
_LABEL_FILES = (PARQUET_SUFFIX, ".csv", ".tsv")
_STRICTER: dict[Match, str] = {"path": "uri", "name": "path", "stem": "name, or path,"}
_ENDINGS = "|".join(suffix.replace(".", r"\.") for suffix in ARCHIVE_SUFFIXES)
_INSIDE_ARCHIVE = rf"(?is)^.*?({_ENDINGS}){SEPARATOR}"
_FOLDER = r"(?s)(?:^|/)(?P<folder>[^/]+)/[^/]*$"


class Truth(Protocol):
    """A source of labels."""

    source: str
    """Name of the source for display, such as `the folders of the images`."""
    guessed: bool
    """True: nobody said that these are labels. If none of them is a class, the table has no labels."""
    columns: tuple[str, ...]
    """Columns of the table that it needs."""

    @property
    def known(self) -> Known | None:
        """The labels by URI, if these were given; None: every image brings its own."""

    def labels(self, batch: pa.RecordBatch) -> pa.Array:
        """`string [n]`: the label of each row, a class name or number; null if it has none. For a multi-label table
        `list<string> [n]` (see `label_sets`)."""


def find_truth(
    table: ScoredTable,
    *,
    labels: str | None,
    label_column: str,
    uri_column: str = URI,
    match: Match = "uri",
    scored: Sequence[str] = (),
    store: Store = ANYWHERE,
) -> Truth:
    """Chooses the first available source of labels.

    Args:
        table: the scored table.
        labels: a Parquet, CSV or TSV file, or labelled images, as for training.
        label_column: a carried column of the table; of a label file, of Parquet files and lists that of the labels.
        uri_column: the column of a label file, or of lists, with the URIs.
        match: how the labels find their images.
        scored: the inputs that were scored for this evaluation.
        store: where labelled images are.

    Raises:
        ConfigError: a column other than the default one was named and does not exist.
        DataError: the file or the column holds no labels, or an image has two.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    if labels is not None:
        if is_label_file(labels):
            given = label_file(labels, label_column=label_column, uri_column=uri_column)
        else:
            given = labels_of_images((labels,), label_column, uri_column, store=store)
        return KnownLabels(given, rule_of(match, given, table))
    if label_column in table.schema.names:
        return CarriedColumn(table.schema, label_column)
    with contextlib.suppress(DataError):  # Nothing says that the images have labels.
        of_images = _list_labels(scored, label_column, uri_column, store) if scored else COLUMNS.empty_table()
        if pc.any(pc.is_valid(of_images["archive"])).as_py():
            return KnownLabels(_labels_in("the labels beside the images", of_images), guessed=True)
    if label_column != LABEL_COLUMN:
        raise ConfigError(
            f"{table.uri} has the columns {', '.join(table.schema.names)}. Received: label_column={label_column!r}"
        )
    return Folders(table.classes.names)


class Folders:
    """Takes the name of the innermost folder of each image that is a class, or else of the innermost; for a member of
    an archive, of the folders inside the archive.

    Args:
        class_names: the classes of the table.
    """

    source = "the folders of the images"
    guessed = True
    known = None
    columns: tuple[str, ...] = (_URI,)

    def __init__(self, class_names: Collection[str]) -> None:
        self._names = frozenset(class_names)

    def labels(self, batch: pa.RecordBatch) -> pa.Array:
        """See `Truth`."""
        folders = folder_names(batch[_URI])
        is_class = pc.or_(pc.is_null(folders), pc.is_in(folders, value_set=pa.array(self._names, pa.string())))
        if pc.all(is_class).as_py():
            return folders
        above = [self._class_above(uri) for uri in batch[_URI].filter(pc.invert(is_class)).to_pylist()]
        return pc.replace_with_mask(folders, pc.invert(is_class), pa.array(above, pa.string()))

    def _class_above(self, uri: str) -> str:
        parts = re.sub(_INSIDE_ARCHIVE, "", uri).split("/")[-2::-1]
        return next((part for part in parts if part in self._names), parts[0])


def folder_names(uris: pa.Array) -> pa.Array:
    """`string [n]`: `dog` of `s3://bucket/dog/1.png` and `a.tar!x/dog/1.png`; null if there is no folder."""
    if pc.any(pc.match_substring(uris, SEPARATOR)).as_py():
        uris = pc.replace_substring_regex(uris, pattern=_INSIDE_ARCHIVE, replacement="")
    return pc.struct_field(pc.extract_regex(uris, pattern=_FOLDER), "folder")


class CarriedColumn:
    """Takes the labels from a column of the table.

    Raises:
        DataError: it holds neither class names, class numbers, nor true and false.
    """

    guessed = False
    known = None

    def __init__(self, schema: pa.Schema, name: str) -> None:
        self.source = f"the column {name!r} of the table"
        self.columns: tuple[str, ...] = (name,)
        kind = schema.field(name).type
        if not is_label(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise DataError(f"{self.source} holds {LABEL_KINDS}. Received: {kind}")

    def labels(self, batch: pa.RecordBatch) -> pa.Array:
        """See `Truth`."""
        values = batch[self.columns[0]]
        return (values.dictionary_decode() if pa.types.is_dictionary(values.type) else values).cast(pa.string())


class KnownLabels:
    """Labels by URI. Uses 16 bytes of memory per row, twice that while they are sorted.

    Args:
        given: the labels, as text.
        rule: how they find their images.
        guessed: see `Truth`.

    Raises:
        DataError: an image has two labels.
    """

    columns: tuple[str, ...] = (_URI,)

    def __init__(self, given: Labels, rule: Rule = BY_URI, *, guessed: bool = False) -> None:
        self.source, self.guessed = given.name, guessed
        hashes: list[Hashes] = []
        codes: list[npt.NDArray[np.int32]] = []
        codes_by_label: dict[str, int] = {}
        for uris, labels in given.read(rule.match != "uri"):
            hashes.append(rule.of_labels(uris))
            codes.append(_codes_of(labels, codes_by_label))
        self.known = Known(given, rule, UriIndex(hashes))
        self._codes: npt.NDArray[np.int32] = np.concatenate([np.zeros(0, np.int32), *codes])
        self._labels = pa.array(list(codes_by_label), pa.string())
        self._check_one_label_each()

    def __len__(self) -> int:
        return len(self._codes)

    def labels(self, batch: pa.RecordBatch) -> pa.Array:
        """See `Truth`."""
        places = self.known.places(batch[_URI])
        codes = np.where(places >= 0, self._codes[places], -1) if len(self) else places
        return self._labels.take(pa.array(codes, mask=codes < 0))

    def _check_one_label_each(self) -> None:
        index = self.known.index
        same = index.hashes[1:] == index.hashes[:-1]
        sorted_codes = self._codes[index.order]
        conflicts = np.flatnonzero(same & (sorted_codes[1:] != sorted_codes[:-1]))
        if len(conflicts):
            raise two_labels(self.known, index.order[conflicts[0] : conflicts[0] + 2].tolist())


def two_labels(known: Known, rows: Sequence[int]) -> DataError:
    """The error for two rows that give an image different labels."""
    match = known.rule.match
    shown = " and ".join(f"{uri!r} is {label!r}" for uri, label in known.labels.named(rows, match))
    why = "an image has one label"
    if match in _STRICTER:
        why = f"by --match {match} these are the same image; --match {_STRICTER[match]} may tell them apart"
    numbers = " and ".join(str(row + 1) for row in rows)
    return DataError(
        f"{known.labels.name}: {why}. Received: two labels, in rows {numbers} (counted from 1, without the header):"
        f" {shown}"
    )


def label_file(uri: str, *, label_column: str = LABEL_COLUMN, uri_column: str = URI) -> Labels:
    """The labels of a file, as text.

    Args:
        uri: Parquet, CSV or TSV. Relative paths in it start at the working directory.
        label_column: the column of the labels.
        uri_column: the column of the URIs.

    Raises:
        DataError: there is no such file, it is not such a file, or it lacks a column.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    columns = label_columns(uri, label_column=label_column, uri_column=uri_column)

    def read(as_written: bool) -> Iterator[tuple[pa.Array, pa.Array]]:
        lines = label_lines(uri, label_column=label_column, uri_column=uri_column, as_written=as_written)
        return ((uris, _text(f"{uri}: the column {label_column!r}", labels)) for uris, labels in lines)

    return Labels(uri, read, columns)


def labels_of_images(
    inputs: Sequence[str], label_column: str, uri_column: str = URI, *, store: Store = ANYWHERE
) -> Labels:
    """The labels of images: folders, WebDataset shards, Parquet files and everything else that is trained on.

    Raises:
        DataError: the images are unknown or have no classes.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    return _labels_in(", ".join(inputs[:3]), _list_labels(inputs, label_column, uri_column, store))


def _list_labels(inputs: Sequence[str], label_column: str, uri_column: str, store: Store) -> pa.Table:
    config = InputConfig(input=tuple(inputs), uri_column=uri_column)
    return list_inputs(config, label_column=label_column, store=store).table


def _labels_in(name: str, table: pa.Table) -> Labels:
    """The labels of listed images, whose URIs are as scoring writes them."""
    batches = table.select([_URI, _LABEL]).to_batches()
    return Labels(name, lambda as_written: ((batch[_URI], batch[_LABEL]) for batch in batches))


def is_label_file(uri: str) -> bool:
    """Whether `--labels` names a file of labels rather than labelled images."""
    is_table = uri.lower().endswith(_LABEL_FILES)
    return is_table and not (uri.lower().endswith(PARQUET_SUFFIX) and holds_images(absolute(uri), None))


def _codes_of(labels: pa.Array, codes_by_label: dict[str, int]) -> npt.NDArray[np.int32]:
    """The code of each label, -1 for null; new labels are added to `codes_by_label`."""
    encoded = labels.dictionary_encode()
    numbers = [codes_by_label.setdefault(label, len(codes_by_label)) for label in encoded.dictionary.to_pylist()]
    indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    codes: npt.NDArray[np.int32] = np.array([*numbers, -1], np.int32)[indices]  # Index -1 takes the last item, -1.
    return codes


def label_columns(uri: str, *, label_column: str, uri_column: str) -> tuple[str, ...]:
    """The columns of a label file.

    Raises:
        DataError, PermissionError, ServiceError, StorageError: see `label_file`.
    """
    if not uri.lower().endswith(_LABEL_FILES):
        raise DataError(f"--labels is a .parquet, .csv or .tsv file, or labelled images. Received: {uri!r}")
    try:
        with _readable(uri):
            names = [clean(name) for name in header_of(uri)]
    except FileNotFoundError as err:
        raise DataError(f"there is no such file{what_is_there(uri)}. Received: labels={uri!r}") from err
    check_header(uri, names, {URI_FLAG: uri_column, LABEL_FLAG: label_column})
    return tuple(names)


def label_lines(
    uri: str, *, label_column: str = LABEL_COLUMN, uri_column: str = URI, as_written: bool = False
) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Reads URIs and labels from a Parquet, CSV or TSV file; labels are text with null for what is empty unless the
    file is Parquet.

    Args:
        uri, label_column, uri_column: see `label_file`.
        as_written: leave the URIs as they are; else they get the form that tables have.

    Raises:
        DataError, FileNotFoundError, PermissionError, ServiceError, StorageError: see `label_file`.
    """
    written = {clean(name): name for name in header_of(uri)}
    names = [written[uri_column], written[label_column]]
    batches = _parquet_batches if uri.lower().endswith(PARQUET_SUFFIX) else _csv_batches
    with _readable(uri), ANYWHERE.open_binary(uri) as stream:
        for batch in batches(stream, uri, names):
            uris, labels = batch[names[0]].cast(pa.string()), batch[names[1]]
            if uris.null_count:
                raise DataError(f"{uri}: each row must have a {uri_column}. Received: null")
            uris = uris if names[0] == uri_column else trimmed(uris)
            yield uris if as_written else _absolute(uris), labels


def _parquet_batches(stream: BinaryIO, uri: str, names: list[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(stream) as file:
        yield from file.iter_batches(columns=names)


def _csv_batches(stream: BinaryIO, uri: str, names: list[str]) -> Iterator[pa.RecordBatch]:
    """Text, without the blanks around labels: `007` stays `007`, and an empty value is null."""
    options = pc_csv.ConvertOptions(
        include_columns=names,
        column_types=dict.fromkeys(names, pa.string()),
        strings_can_be_null=True,
        null_values=[""],
    )
    with open_csv(stream, uri, convert=options) as reader:
        for batch in reader:
            yield batch.set_column(1, names[1], trimmed(batch[names[1]]))


def _text(place: str, labels: pa.Array) -> pa.Array:
    plain = labels.dictionary_decode() if pa.types.is_dictionary(labels.type) else labels
    if not is_label(plain.type):
        raise DataError(f"{place} holds {LABEL_KINDS}. Received: {plain.type}")
    return plain.cast(pa.string())


def _absolute(uris: pa.Array) -> pa.Array:
    """The URIs as scoring writes those of a list."""
    plain = pc.and_(
        pc.or_(pc.starts_with(uris, "/"), are_remote(uris)),
        pc.invert(pc.match_substring_regex(uris, "[^:]//|^//|/[.]{1,2}/|/$")),
    )
    if pc.all(plain, skip_nulls=False).as_py():
        return uris
    return pa.array([row_of_line(uri).uri for uri in uris.to_pylist()], pa.string())


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as err:
        raise DataError(f"{uri}: cannot be read as a label file: {err}") from err
