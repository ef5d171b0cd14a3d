"""Which columns of lists and Parquet files are read beside the images, and under which names.

Owns: the carried columns, the labels and splits as text, and what a header that lacks a column probably means. Does not
own: reading the files (`lists`, `parquet`), or what a label means (`labels`).
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.errors import DataError

LABEL, SPLIT, GROUP = "label", "split", "group"
"""Columns of a labelled listing: the class of each image, its split and its group, as text; null: not known."""
URI = "uri"
URI_FLAG, LABEL_FLAG, CLASS_FLAG = "--uri-column", "--label-column", "--class-columns"
LABEL_KINDS = "class names (string), class numbers (integer), or true and false (boolean)"
_USUAL = {
    URI_FLAG: (
        *("uri", "filename", "file_name", "file", "path", "filepath", "file_path", "image_path", "image", "img"),
        *("image_name", "image_file", "image_id", "url", "id", "name"),
    ),
    LABEL_FLAG: ("label", "class", "target", "category", "class_name", "classname", "labels", "y", "species"),
}
"""What other people call these columns, in lower case, the surest first."""


@dataclass(frozen=True)
class SetForm:
    """How files write the labels of images that have any number of classes; see `label_sets`."""

    separator: str | None = None
    """What stands between the labels of an image, if they are one text. None: they are a list."""
    class_columns: tuple[str, ...] = ()
    """Columns of the classes, each of which says whether an image has it, in place of a column of labels."""


@dataclass(frozen=True)
class Wanted:
    """What is read beside the images themselves."""

    carried: tuple[str, ...] = ()
    """Columns to copy, as they are."""
    image_column: str | None = None
    """The column of Parquet files that holds the images. None: see `parquet.image_column_of`."""
    label_column: str | None = None
    """The column that holds the labels. None: labels are not wanted."""
    uri_column: str = URI
    """The column of lists that holds the URIs."""
    group_column: str | None = None
    """With labels: the column that holds groups, where a file has it."""
    sets: SetForm | None = None
    """With labels: how they are written where an image has any number of them. None: it has one."""

    def columns(self, names: Sequence[str]) -> list[str]:
        """The wanted columns among `names`."""
        labels = [] if self.label_column is None else [*self.label_columns, SPLIT, self.group_column]
        return [name for name in dict.fromkeys([*self.carried, *labels]) if name is not None and name in names]

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns that hold the labels, if they are wanted."""
        of_classes = () if self.sets is None else self.sets.class_columns
        return of_classes or (() if self.label_column is None else (self.label_column,))

    def check_labels(self, place: str, names: Sequence[str]) -> None:
        """Checks that a file with these columns has those of the labels.

        Raises:
            DataError: one is missing.
        """
        if self.sets is None or not self.sets.class_columns:
            check_header(place, names, {LABEL_FLAG: str(self.label_column)})
            return
        missing = [name for name in self.sets.class_columns if name not in names]
        if missing:
            raise DataError(
                f"{place}: {CLASS_FLAG} must name columns of the file, and there is no column {missing[0]!r}."
                f" Received: columns {', '.join(names)}"
            )


def clean(name: str) -> str:
    """The name of a column without the blanks and the byte order mark that some programs write around it."""
    return name.strip("\ufeff \t\r\n")


def check_unique(place: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises DataError if a file has two columns of a wanted name."""
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise DataError(
            f"{place}: each column must have a name of its own; {twice[0]!r} occurs {names.count(twice[0])} times,"
            f" so rename one. Received: columns {', '.join(names)}"
        )


def check_header(place: str, names: Sequence[str], wanted: Mapping[str, str]) -> None:
    """Checks that a file has the wanted columns, each of them once.

    Args:
        place: the file, for messages.
        names: its columns, `clean`.
        wanted: the column of each flag, such as `{"--uri-column": "uri"}`.

    Raises:
        DataError: a column is missing or occurs twice; the message says which flags name what the file has.
    """
    missing = {flag: name for flag, name in wanted.items() if name not in names}
    if missing:
        what = " and no column ".join(map(repr, missing.values()))
        raise DataError(
            f"{place}: there is no column {what}; {_remedy(names, missing, wanted)}."
            f" Received: columns {', '.join(names) or 'none'}"
        )
    check_unique(place, names, list(wanted.values()))


def _remedy(names: Sequence[str], missing: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """What to do about missing columns: the flags that name similar ones, or another separator."""
    separator = next((mark for mark in ";\t|," if len(names) == 1 and mark in names[0]), None)
    if separator is not None:
        return f"its columns seem to be separated by {separator!r}; write it with commas as .csv, or with tabs as .tsv"
    used = {name for flag, name in wanted.items() if flag not in missing}
    found = {flag: _usual(flag, [name for name in names if name not in used], wanted[flag]) for flag in missing}
    left = [name for name in names if name not in used and name not in found.values()]
    unknown = [flag for flag, name in found.items() if name is None]
    if len(unknown) == len(left) == 1:
        found[unknown[0]] = left[0]
    flags = [f"{flag} {shlex.quote(name)}" for flag, name in found.items() if name is not None]
    return f"use {' '.join(flags)}" if flags else f"name it by {' and '.join(missing)}"


def _usual(flag: str, names: Sequence[str], wanted: str) -> str | None:
    """The column that is called like the wanted one in other case, or as such columns usually are."""
    by_case = {name.lower(): name for name in reversed(names)}
    return next((by_case[name] for name in (wanted.lower(), *_USUAL[flag]) if name in by_case), None)


def plain(values: pa.Array) -> pa.Array:
    """Strings and bytes of every encoding as plain ones; dictionaries decoded, since each batch may have its own."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string_view(values.type):
        return values.cast(pa.string())
    return values.cast(pa.binary()) if pa.types.is_binary_view(values.type) else values


def text_labels(place: str, values: pa.Array, names: Sequence[str] | None, *, before: int = 0) -> pa.Array:
    """Labels as text, `string [n]`; null for the number -1 where names are declared, which says that there is none.

    Args:
        place: the file and column, for messages.
        values: class names (string), class numbers (integer) or true and false.
        names: class names by number, if the file declares them.
        before: number of rows before these, for messages.

    Raises:
        DataError: a label is missing, has another type, or is a number without a declared name.
    """
    values = plain(values)
    if values.type not in (pa.string(), pa.large_string(), pa.bool_()) and not pa.types.is_integer(values.type):
        hint = "; with --multi-label it may hold lists of them" if pa.types.is_nested(values.type) else ""
        raise DataError(f"{place} must hold class names (string) or numbers (integer){hint}. Received: {values.type}")
    missing = values.is_null()
    if names is not None and pa.types.is_integer(values.type):
        values = pc.if_else(pc.equal(values, -1), None, values)
        check_numbers(place, values, names)
        values = pa.array(names, pa.string()).take(values)
    texts = values.cast(pa.string())
    row = pc.index(pc.or_(missing, pc.fill_null(pc.equal(texts, ""), False)), True).as_py()
    if row >= 0:
        raise DataError(
            f"{place} must have a value in every row. Received: {values[row].as_py()!r} in row {before + row}, counted"
            " from 0"
        )
    return texts


def text_groups(place: str, values: pa.Array) -> pa.Array:
    """Groups as text, `string [n]`; null where there is none.

    Raises:
        DataError: the column holds lists or structs.
    """
    values = plain(values)
    if pa.types.is_nested(values.type):
        raise DataError(f"{place} must hold one value per image to group by. Received: {values.type}")
    texts = values.cast(pa.string())
    return pc.if_else(pc.equal(texts, ""), None, texts)


def declared_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """The class names that a Hugging Face file declares for a column, by class number.

    Source: `datasets.Features.arrow_schema`: {"info": {"features": {column: {"names": [...]}}}} as JSON.
    """
    feature = features(schema).get(column, {})
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):  # A list of them.
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def features(schema: pa.Schema) -> dict[str, object]:
    """The columns as Hugging Face describes them in the schema's metadata; empty: another tool wrote the file."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_label(kind: pa.DataType) -> bool:
    """Whether a column of this type holds class names, numbers, or true and false; one without a value does, too."""
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(texts or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind))


def check_numbers(place: str, numbers: pa.Array, names: Sequence[str]) -> None:
    """Raises DataError if a class number has no name."""
    ends = pc.min_max(numbers).as_py()
    if ends["min"] is not None and (ends["min"] < 0 or ends["max"] >= len(names)):
        raise DataError(
            f"{place}: labels must be 0 to {len(names) - 1}, as the file names {len(names)} classes."
            f" Received: {ends['min']} to {ends['max']}"
        )
