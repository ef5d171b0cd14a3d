"""Probabilities that a person's own code gave for the check images: a table with `uri` and one column per class.

Owns: reading it and matching it with the images. Does not own: comparing (`comparison`).
"""

# n = matched images, K = classes

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mnist_dist.errors import ConfigError
from mnist_dist.importing.foreign import Values
from mnist_dist.store.anywhere import ANYWHERE

_URI = "uri"


def expected_values(uri: str, names: Sequence[str], class_names: Sequence[str]) -> tuple[Values, list[int]]:
    """The expected probabilities, and the images that they are of.

    Args:
        uri: a Parquet or CSV file.
        names: URIs of the check images.
        class_names: the K classes.

    Returns:
        `float32 [n, K]`, and the n indices into `names`.

    Raises:
        ConfigError: a column is missing, a value is no number, or a name is not that of one check image.
    """
    table = _read(uri)
    if missing := [name for name in (_URI, *class_names) if name not in table.column_names]:
        raise ConfigError(
            f"the expected probabilities need the column uri and one per class; there is no {missing[0]!r} (nor "
            f"{len(missing) - 1} others). Received: {', '.join(table.column_names[:5])}, ... in {uri!r}"
        )
    try:
        columns = [table[name].cast(pa.float64()).to_numpy() for name in class_names]
    except pa.ArrowInvalid as err:
        raise ConfigError(f"the expected probabilities must be numbers: {err}. Received: {uri!r}") from None
    return np.stack(columns, axis=1).astype(np.float32), _matched(table[_URI].to_pylist(), names, uri)


def _read(uri: str) -> pa.Table:
    import pyarrow.csv
    import pyarrow.parquet

    try:
        with ANYWHERE.open_binary(uri) as stream:
            if uri.lower().endswith(".parquet"):
                return pyarrow.parquet.read_table(stream)
            options = pyarrow.csv.ConvertOptions(column_types={_URI: pa.string()})
            return pyarrow.csv.read_csv(stream, convert_options=options)
    except (FileNotFoundError, PermissionError, pa.ArrowInvalid) as err:
        raise ConfigError(f"the expected probabilities cannot be read: {err}. Received: {uri!r}") from None


def _matched(wanted: Sequence[str], names: Sequence[str], uri: str) -> list[int]:
    whole = {name: number for number, name in enumerate(names)}
    by_file: dict[str, int | None] = {}
    for number, name in enumerate(names):
        file = name.rpartition("/")[2]
        by_file[file] = None if file in by_file else number
    rows = []
    for name in wanted:
        row = whole.get(name, by_file.get(str(name).rpartition("/")[2]))
        if row is None:
            raise ConfigError(f"{uri}: this is not the name of exactly one check image. Received: {name!r}")
        rows.append(row)
    if not rows:
        raise ConfigError(f"there are no expected probabilities. Received: {uri!r}")
    return rows
