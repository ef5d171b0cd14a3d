"""Labels of images that have any number of classes: how files write them, and as numbers.

Owns: reading sets of classes from columns, their form as text in a listing, and their numbers. Does not own: which
columns are read (`columns`), or what is computed from the sets.

In a listing a set is one text, the names with a unit separator before each; the empty set is a single separator. A
label without one, as folders and archives give it, is a set of one. Each distinct set gets a number, by which records
know it, as other labels are known by the number of their class.
"""

# n = images, K = classes, L = distinct sets

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.errors import ConfigError, DataError
from mnist_dist.sources import labels
from mnist_dist.sources.columns import LABEL_KINDS, Wanted, check_numbers, is_label, plain, text_labels

LabelSets = tuple[tuple[int, ...], ...]
"""The classes of each set, ascending, by the number of the set; empty where each image has one class."""
NO_CLASS = "(none)"
"""How the empty set is shown."""
_MARK = "\x1f"  # ASCII's unit separator, which no name of a file or class has.
_YES, _NO = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")


def labels_in(
    wanted: Wanted, uri: str, columns: Mapping[str, pa.Array], names: Sequence[str] | None, *, before: int = 0
) -> pa.Array | None:
    """The labels of some rows of a file as text, `string [n]`; None: the file has no column for them.

    Args:
        wanted: which columns hold the labels, and how.
        uri: the file, for messages.
        columns: its columns.
        names: class names by number, if the file declares them.
        before: number of rows before these, for messages.

    Raises:
        ConfigError: a separator was given, and the column holds no text.
        DataError: a label is missing, has another type, or is a number without a declared name.
    """
    form, name = wanted.sets, wanted.label_column
    if form is not None and form.class_columns:
        given = [columns[each] for each in form.class_columns if each in columns]
        return _of_class_columns(uri, form.class_columns, given, before) if given else None
    if name is None or name not in columns:
        return None
    values, place = columns[name], f"{uri}: column {name!r}"
    if form is None:
        return text_labels(place, values, names, before=before)
    row = pc.index(values.is_null(), True).as_py()
    if row >= 0:
        raise DataError(
            f"{place} must have a value in every row, for an image of no class an empty list or text. Received: null "
            f"in row {before + row}, counted from 0"
        )
    sets = label_sets(values, form.separator, place=place)
    return _as_text(sets if names is None else _with_names(place, sets, names))


def coded(
    texts: pa.ChunkedArray, splits: pa.ChunkedArray, declared: Sequence[tuple[str, ...]], *, name: str
) -> tuple[tuple[str, ...], LabelSets, pa.ChunkedArray]:
    """The class names, the distinct sets, and the number of each image's set, `int32 [n]`; -1 for null.

    Args:
        texts: the labels of the images, from a listing.
        splits: the split of each image, or null.
        declared: class names that files declare.
        name: the data, for messages.

    Raises:
        DataError: see `labels.class_names_of`.
    """
    distinct = pc.unique(texts.combine_chunks().drop_null())
    names_of = [_names(text) for text in distinct.to_pylist()]
    class_names = _class_names(texts, splits, dict(zip(distinct.to_pylist(), names_of, strict=True)), declared, name)
    numbers = {class_name: number for number, class_name in enumerate(class_names)}
    sets = [tuple(sorted(numbers[each] for each in names)) for names in names_of]
    known = tuple(sorted(set(sets)))
    code_of = {classes: code for code, classes in enumerate(known)}
    codes = pa.array([code_of[classes] for classes in sets], pa.int32())
    of_image = codes.take(pc.index_in(texts.combine_chunks(), value_set=distinct))
    return class_names, known, pa.chunked_array([pc.fill_null(of_image, -1)])


def members(label_sets: LabelSets, num_classes: int) -> npt.NDArray[np.bool_]:
    """Whether a class is in a set, `bool [L, K]`."""
    table = np.zeros((len(label_sets), num_classes), np.bool_)
    for row, classes in zip(table, label_sets, strict=True):
        row[list(classes)] = True
    return table


def joined(names: Sequence[str]) -> str:
    """A set for display."""
    return " + ".join(names) or NO_CLASS


def strata_of(codes: npt.NDArray[np.int32], label_sets: LabelSets, num_classes: int) -> npt.NDArray[np.int32]:
    """By what images are held out, `int32 [n]`: their class, or the rarest of several; -1 where the label is -1."""
    if not label_sets:
        return codes
    return np.where(codes < 0, np.int32(-1), rarest_classes(codes, label_sets, num_classes))


def rarest_classes(codes: npt.NDArray[np.int32], label_sets: LabelSets, num_classes: int) -> npt.NDArray[np.int32]:
    """The class of each image that the fewest images have, `int32 [n]`, the first of several; K for the empty set."""
    table = members(label_sets, num_classes)
    images_of_set = np.bincount(codes[codes >= 0], minlength=len(table))
    frequency = np.where(table, images_of_set @ table, np.iinfo(np.int64).max)
    rarest = np.where(table.any(axis=1), frequency.argmin(axis=1), num_classes)
    return rarest.astype(np.int32)[codes]


def label_sets(values: pa.Array, separator: str | None, *, place: str) -> pa.Array:
    """The labels of n images, `list<string> [n]`.

    Args:
        values: class names (string) or numbers (integer), or lists of either; with a separator, text.
        separator: what stands between the labels in a text; None: each text is one label.
        place: the column, for messages.

    Raises:
        ConfigError: a separator was given, and the values are no text.
        DataError: the values are something else.
    """
    values = plain(values)
    items = plain(values.flatten()) if _is_list(values.type) else values
    if not is_label(items.type):
        raise DataError(f"{place} holds {LABEL_KINDS}, or lists of these. Received: {values.type}")
    if separator is not None and (_is_list(values.type) or pa.types.is_integer(items.type)):
        raise ConfigError(f"{place} has no text that label_separator splits. Received: {values.type}")
    if _is_list(values.type):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
        return _lists(items.cast(pa.string()), lengths, values.is_null())
    texts = items.cast(pa.string())
    if separator is None:
        return _lists(texts, np.ones(len(texts), np.int64), values.is_null())
    parts = pc.split_pattern(texts.fill_null(""), pattern=separator)
    lengths = pc.list_value_length(parts).to_numpy(zero_copy_only=False)
    return _lists(parts.flatten(), lengths, values.is_null())


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _lists(items: pa.Array, lengths: npt.NDArray[np.int64], missing: pa.Array) -> pa.Array:
    """Cuts the items into lists, without the blanks around them and without those that are empty or null."""
    items = pc.utf8_trim_whitespace(items).fill_null("")
    kept = pc.not_equal(items, "").to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[kept], minlength=len(lengths)))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items.filter(pa.array(kept)), mask=missing)


def _of_class_columns(uri: str, names: Sequence[str], columns: Sequence[pa.Array], before: int) -> pa.Array:
    """The sets as text, from one column for each class that says whether an image has it."""
    pairs = list(zip(names, columns, strict=True))
    has = np.stack([_yes_or_no(f"{uri}: column {name!r}", each, before) for name, each in pairs])
    texts = np.full(has.shape[1], _MARK, object)
    for name, rows in zip(names, has, strict=True):
        texts[rows] = np.where(texts[rows] == _MARK, f"{_MARK}{name}", texts[rows] + f"{_MARK}{name}")
    return pa.array(texts, pa.string())


def _yes_or_no(place: str, values: pa.Array, before: int) -> npt.NDArray[np.bool_]:
    """`bool [n]`, from true and false, 1 and 0, or their texts in a CSV file."""
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(plain(values).cast(pa.string())))
    is_yes, is_no = (pc.fill_null(pc.is_in(texts, pa.array(known, pa.string())), False) for known in (_YES, _NO))
    row = pc.index(pc.or_(is_yes, is_no), False).as_py()
    if row >= 0:
        raise DataError(
            f"{place} must say whether an image has the class: true or false, 1 or 0, in every row. Received: "
            f"{values[row].as_py()!r} in row {before + row}, counted from 0"
        )
    return np.asarray(is_yes.to_numpy(zero_copy_only=False), np.bool_)


def _with_names(place: str, sets: pa.Array, names: Sequence[str]) -> pa.Array:
    """Sets of class numbers as names; sets of names as they are."""
    items = sets.flatten()
    if not pc.all(pc.utf8_is_digit(items)).as_py():
        return sets
    numbers = items.cast(pa.int64())
    check_numbers(place, numbers, names)
    return pa.ListArray.from_arrays(sets.offsets, pa.array(names, pa.string()).take(numbers), mask=sets.is_null())


def _as_text(sets: pa.Array) -> pa.Array:
    texts = ("".join(f"{_MARK}{name}" for name in sorted(set(names))) or _MARK for names in sets.to_pylist())
    return pa.array(texts, pa.string())


def _names(text: str) -> list[str]:
    """The classes of a set, or of a label that is a single class."""
    return [name for name in text.split(_MARK) if name]


def _class_names(
    texts: pa.ChunkedArray,
    splits: pa.ChunkedArray,
    names_of: Mapping[str, Sequence[str]],
    declared: Sequence[tuple[str, ...]],
    name: str,
) -> tuple[str, ...]:
    """The class names, by the rules for data whose images have one class each."""
    pairs = pa.table({"text": texts, "split": splits}).group_by(["text", "split"]).aggregate([])
    rows = zip(pairs["text"].to_pylist(), pairs["split"].to_pylist(), strict=True)
    seen = [(each, split) for text, split in rows if text is not None for each in names_of[text]]
    of_each, of_split = zip(*seen, strict=True) if seen else ((), ())
    return labels.class_names_of(
        pa.chunked_array([pa.array(of_each, pa.string())]),
        pa.chunked_array([pa.array(of_split, pa.string())]),
        declared,
        name=name,
    )
