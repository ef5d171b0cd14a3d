"""Which images belong together, such as crops of one photograph or images of one patient.

Owns: the group of each image: by its folder, a column, or a regular expression. Does not own: reading the column
(`columns`), or what follows for the splits (`data/splits.py`).
"""

import re
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from mnist_dist.errors import DataError
from mnist_dist.sources.archives import SEPARATOR, split_member
from mnist_dist.sources.columns import GROUP
from mnist_dist.sources.parquet import split_row

FOLDER = "folder"
_MAX_SHOWN = 20  # columns in a message


def groups_of(table: pa.Table, group_by: str, *, columns: Sequence[str] = ()) -> pa.Array:
    """The group of each image, `string [N]`; null: it is on its own.

    Args:
        table: the rows of the images; `group` has the values of the column `group_by`, where there is such a column.
        group_by: `folder`, the name of a column, or a regular expression for URIs.
        columns: the columns that there are, for messages.

    Raises:
        DataError: it is none of these, or the expression matches no URI.
    """
    uris = table["uri"].to_pylist()
    if group_by == FOLDER:
        return pa.array(map(folder_of, uris), pa.string())
    if group_by in columns:
        return pa.concat_arrays(table[GROUP].cast(pa.string()).chunks or [pa.array([], pa.string())])
    group_of, problem = _by_expression(group_by)
    found = pa.array(map(group_of, uris), pa.string())
    if found.null_count == len(found):
        known = f" ({', '.join(columns[:_MAX_SHOWN])})" if columns else ""
        raise DataError(
            f"group_by must be {FOLDER}, a column of the lists and Parquet files{known}, or a regular expression that "
            f"occurs in URIs such as {uris[0]}{problem}. Received: group_by={group_by!r}"
        )
    return found


def folder_of(uri: str) -> str:
    """The folder of an image, within its archive if it lies in one; of a row of a Parquet file: that file."""
    row = split_row(uri)
    if row is not None:
        return row[0]
    member = split_member(uri)
    if member is not None:
        return f"{member[0]}{SEPARATOR}{member[1].rpartition('/')[0]}"
    return uri.rpartition("/")[0]


def notes(table: pa.Table, group_by: str) -> list[str]:
    """What a person should know about the groups."""
    count = pc.count_distinct(table[GROUP], mode="only_valid").as_py()
    lines = [f"{count:,} groups by {group_by}; each stays in one split"]
    alone = table.filter(pc.is_null(table[GROUP]))
    if len(alone):
        lines.append(f"{len(alone):,} images are in no group, such as {alone['uri'][0]}; each is on its own")
    return lines


def _by_expression(group_by: str) -> tuple[Callable[[str], str | None], str]:
    """A function of URIs to groups, and what is wrong with the expression."""
    try:
        expression = re.compile(group_by)
    except re.error as err:
        return (lambda uri: None), f" (as an expression: {err})"

    def group_of(uri: str) -> str | None:
        match = expression.search(uri)
        return match[1 if expression.groups else 0] if match else None

    return group_of, ""
