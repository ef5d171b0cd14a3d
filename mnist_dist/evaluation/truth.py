"""Finds the labels of the images in a prediction table.

Owns: where labels come from, in this order: what the user names (a label file, or any labelled images), a carried
column of the table, the images that were scored just before, the folders of the images. Does not own: which class a
label means (`tables.Classes`), or images with several labels (`label_sets`).
"""

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from mnist_dist.config import InputConfig
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.evaluate_config import LABEL_COLUMN
from mnist_dist.evaluation.tables import ScoredTable
from mnist_dist.evaluation.uri_hashes import Hashes, UriIndex, uri_hashes
from mnist_dist.sources.archives import ARCHIVE_SUFFIXES, SEPARATOR
from mnist_dist.sources.choice import row_of_line
from mnist_dist.sources.image_table import COLUMNS
from mnist_dist.sources.listing import list_inputs
from mnist_dist.sources.parquet import PARQUET_SUFFIX, holds_images
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Store
from mnist_dist.store.uris import absolute, are_remote

# n = rows of a batch

_URI, _LABEL = "uri", "label"
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
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

    def labels(self, batch: pa.RecordBatch) -> pa.Array:
        """`string [n]`: the label of each row, a class name or number; null if it has none. For a multi-label table
        `list<string> [n]` (see `label_sets`)."""


def find_truth(
    table: ScoredTable,
    *,
    labels: str | None,
    label_column: str,
    scored: Sequence[str] = (),
    store: Store = ANYWHERE,
) -> Truth:
    """Chooses the first available source of labels.

    Args:
        table: the scored table.
        labels: a Parquet, CSV or TSV file with `uri` and `label`, or labelled images, as for training.
        label_column: a carried column of the table; of labelled Parquet files and lists the column of the labels.
        scored: the inputs that were scored for this evaluation.
        store: where labelled images are.

    Raises:
        ConfigError: a column other than the default one was named and does not exist.
        DataError: the file or the column holds no labels.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    if labels is not None:
        return label_file(labels) if is_label_file(labels) else labels_of_images((labels,), label_column, store=store)
    if label_column in table.schema.names:
        return CarriedColumn(table.schema, label_column)
    with contextlib.suppress(DataError):  # Nothing says that the images have labels.
        of_images = _list_labels(scored, label_column, store) if scored else COLUMNS.empty_table()
        if pc.any(pc.is_valid(of_images["archive"])).as_py():
            return KnownLabels("the labels beside the images", _lines_of(of_images), guessed=True)
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
        DataError: it holds neither class names nor class numbers.
    """

    guessed = False

    def __init__(self, schema: pa.Schema, name: str) -> None:
        self.source = f"the column {name!r} of the table"
        self.columns: tuple[str, ...] = (name,)
        kind = schema.field(name).type
        if not is_label(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise DataError(f"{self.source} holds class names (string) or numbers (integer). Received: {kind}")

    def labels(self, batch: pa.RecordBatch) -> pa.Array:
        """See `Truth`."""
        values = batch[self.columns[0]]
        return (values.dictionary_decode() if pa.types.is_dictionary(values.type) else values).cast(pa.string())


class KnownLabels:
    """Labels by URI. Uses 16 bytes of memory per row, twice that while they are sorted.

    Args:
        source: name of the source, for display.
        lines: URIs and labels, `string [n]` each.
        guessed: see `Truth`.

    Raises:
        DataError: an image has two labels.
    """

    columns: tuple[str, ...] = (_URI,)

    def __init__(self, source: str, lines: Iterable[tuple[pa.Array, pa.Array]], *, guessed: bool = False) -> None:
        self.source, self.guessed = source, guessed
        hashes: list[Hashes] = []
        codes: list[npt.NDArray[np.int32]] = []
        codes_by_label: dict[str, int] = {}
        for uris, labels in lines:
            hashes.append(uri_hashes(uris))
            codes.append(_codes_of(labels, codes_by_label))
        self._index = UriIndex(hashes)
        self._codes: npt.NDArray[np.int32] = np.concatenate([np.zeros(0, np.int32), *codes])
        self._labels = pa.array(list(codes_by_label), pa.string())
        self._check_one_label_each()

    def __len__(self) -> int:
        return len(self._codes)

    def labels(self, batch: pa.RecordBatch) -> pa.Array:
        """See `Truth`."""
        places = self._index.places(uri_hashes(batch[_URI]))
        codes = np.where(places >= 0, self._codes[places], -1) if len(self) else places
        return self._labels.take(pa.array(codes, mask=codes < 0))

    def _check_one_label_each(self) -> None:
        same = self._index.hashes[1:] == self._index.hashes[:-1]
        sorted_codes = self._codes[self._index.order]
        conflicts = np.flatnonzero(same & (sorted_codes[1:] != sorted_codes[:-1]))
        if len(conflicts):
            rows = self._index.order[conflicts[0] : conflicts[0] + 2] + 1
            raise DataError(
                f"{self.source}: an image has one label. Received: two labels, in rows {rows[0]} and {rows[1]} "
                "(counted from 1, without the header)"
            )


def label_file(uri: str) -> KnownLabels:
    """Takes the labels from a file.

    Args:
        uri: Parquet, CSV or TSV with the columns `uri` and `label`. Relative paths start at the working directory.

    Raises:
        DataError: there is no such file, it is not such a file, or it has two labels for an image.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    try:
        return KnownLabels(uri, ((uris, _text(uri, labels)) for uris, labels in label_lines(uri)))
    except FileNotFoundError as err:
        raise DataError(f"there is no such file. Received: labels={uri!r}") from err


def labels_of_images(inputs: Sequence[str], label_column: str, *, store: Store = ANYWHERE) -> KnownLabels:
    """Takes the labels from images: folders, WebDataset shards, Parquet files and everything else that is trained on.

    Raises:
        DataError: the images are unknown or have no classes.
        PermissionError, ServiceError, StorageError: see `store.base`.
    """
    return KnownLabels(", ".join(inputs[:3]), _lines_of(_list_labels(inputs, label_column, store)))


def _list_labels(inputs: Sequence[str], label_column: str, store: Store) -> pa.Table:
    return list_inputs(InputConfig(input=tuple(inputs)), label_column=label_column, store=store).table


def _lines_of(table: pa.Table) -> Iterator[tuple[pa.Array, pa.Array]]:
    return ((batch[_URI], batch[_LABEL]) for batch in table.select([_URI, _LABEL]).to_batches())


def is_label_file(uri: str) -> bool:
    """Whether `--labels` names a file of labels rather than labelled images."""
    is_table = uri.lower().endswith((PARQUET_SUFFIX, *_SEPARATORS))
    return is_table and not (uri.lower().endswith(PARQUET_SUFFIX) and holds_images(absolute(uri), None))


def _codes_of(labels: pa.Array, codes_by_label: dict[str, int]) -> npt.NDArray[np.int32]:
    """The code of each label, -1 for null; new labels are added to `codes_by_label`."""
    encoded = labels.dictionary_encode()
    numbers = [codes_by_label.setdefault(label, len(codes_by_label)) for label in encoded.dictionary.to_pylist()]
    indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    codes: npt.NDArray[np.int32] = np.array([*numbers, -1], np.int32)[indices]  # Index -1 takes the last item, -1.
    return codes


def label_lines(uri: str) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Reads a Parquet, CSV or TSV file: URIs in the form that tables have, and the column `label`, which is text with
    null for what is empty unless the file is Parquet.

    Raises:
        DataError, FileNotFoundError, PermissionError, ServiceError, StorageError: see `label_file`.
    """
    ending = next((suffix for suffix in (PARQUET_SUFFIX, *_SEPARATORS) if uri.lower().endswith(suffix)), None)
    if ending is None:
        raise DataError(f"--labels is a .parquet, .csv or .tsv file. Received: {uri!r}")
    with _readable(uri), ANYWHERE.open_binary(uri) as stream:
        if ending == PARQUET_SUFFIX:
            with pq.ParquetFile(stream) as file:
                _check_names(uri, file.schema_arrow.names)
                for batch in file.iter_batches(columns=[_URI, _LABEL]):
                    yield _absolute(batch[_URI].cast(pa.string())), batch[_LABEL]
            return
        options = pc_csv.ConvertOptions(  # As strings, `007` stays `007`.
            column_types={_URI: pa.string(), _LABEL: pa.string()}, strings_can_be_null=True, null_values=[""]
        )
        parsing = pc_csv.ParseOptions(delimiter=_SEPARATORS[ending], newlines_in_values=True)
        with pc_csv.open_csv(stream, parse_options=parsing, convert_options=options) as reader:
            _check_names(uri, reader.schema.names)
            for batch in reader:
                yield _absolute(batch[_URI]), batch[_LABEL]


def _check_names(uri: str, names: list[str]) -> None:
    if missing := [name for name in (_URI, _LABEL) if names.count(name) != 1]:
        raise DataError(
            f"{uri}: a label file has exactly one column each named uri and label; check {', '.join(missing)}. "
            f"Received: columns {', '.join(names) or 'none'}"
        )


def _text(uri: str, labels: pa.Array) -> pa.Array:
    plain = labels.dictionary_decode() if pa.types.is_dictionary(labels.type) else labels
    if not is_label(plain.type):
        raise DataError(
            f"{uri}: the column label holds class names (string) or numbers (integer). Received: {plain.type}"
        )
    return plain.cast(pa.string())


def is_label(kind: pa.DataType) -> bool:
    """Whether a column of this type holds class names or numbers; a column without a value does, too."""
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(texts or pa.types.is_integer(kind) or pa.types.is_null(kind))


def _absolute(uris: pa.Array) -> pa.Array:
    """The URIs as scoring writes those of a list."""
    plain = pc.and_(
        pc.or_(pc.starts_with(uris, "/"), are_remote(uris)),
        pc.invert(pc.match_substring_regex(uris, "[^:]//|^//|/[.]{1,2}/|/$")),
    )
    if pc.all(plain, skip_nulls=False).as_py():
        return uris
    if uris.null_count:
        raise DataError("each row of a label file has a uri. Received: null")
    return pa.array([row_of_line(uri).uri for uri in uris.to_pylist()], pa.string())


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as err:
        raise DataError(f"{uri}: cannot be read as a label file: {err}") from err
