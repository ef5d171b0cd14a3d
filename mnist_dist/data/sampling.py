"""Chooses a few of many rows to measure on: short runs of neighbours, spread evenly.

They are neighbours because archives and Parquet files are read in groups of rows. They are spread because a list is
sorted by name, so that one end of it is not representative. Owns: the choice. Does not own: reading the rows.
"""

# n = chosen rows

import numpy as np
import numpy.typing as npt

RUN_ROWS = 16


def spread_rows(total: int, *, most: int, run_rows: int = RUN_ROWS) -> npt.NDArray[np.int64]:
    """Chooses rows of a table: runs of neighbours, spread from its start to its end.

    Args:
        total: number of rows in the table.
        most: maximum number of rows to choose.
        run_rows: length of each run, in rows.

    Returns:
        `int64 [n]`, ascending; all rows if there are no more than `most`.
    """
    if total <= most:
        return np.arange(total)
    run_rows = min(run_rows, most)
    runs = most // run_rows
    starts = np.linspace(0, total - run_rows, runs).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(run_rows))
