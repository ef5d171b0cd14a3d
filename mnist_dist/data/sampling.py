"""A few of many rows, to measure on: short runs of neighbours, evenly spread.

Neighbours, since rows of archives and Parquet files are read together; spread, since a list is sorted by name and an
end of it is no fair sample.
"""

# n = chosen rows

import numpy as np
import numpy.typing as npt

RUN_ROWS = 16


def spread_rows(total: int, *, most: int, run_rows: int = RUN_ROWS) -> npt.NDArray[np.int64]:
    """Rows of a table, ascending: runs of neighbours from its begin to its end.

    Args:
        total: rows of the table.
        most: rows at most that are chosen.
        run_rows: rows of each run.

    Returns:
        `int64 [n]`, all of them where there are no more than `most`.
    """
    if total <= most:
        return np.arange(total)
    run_rows = min(run_rows, most)
    runs = most // run_rows
    starts = np.linspace(0, total - run_rows, runs).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(run_rows))
