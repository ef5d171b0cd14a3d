"""The state of a prediction table, for listings; read from the files in its folder (`generations.py`)."""

from collections.abc import Mapping
from typing import Any

from mnist_dist.inventory import Folder, InventoryRow, State, driver_values, living
from mnist_dist.scoring.generations import Committed, Generation, Output
from mnist_dist.scoring.manifest import Manifest
from mnist_dist.scoring.predictions import TABLES, WORK, count_bad
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.lock import Holder
from mnist_dist.store.uris import join

DEPTH = 2
"""Levels of folders to search: a table may lie in the folder of the run whose bundle scored it."""


def table_row(folder: Folder) -> InventoryRow | None:
    """The state of a prediction table; None if the folder holds none.

    Raises:
        OSError, ValueError, TypeError, LookupError: the folder is damaged.
        ServiceError: the storage failed.
    """
    output, work = Output(folder.uri), _names_of_work(folder)
    has_work = any(name.startswith("g") for name in work)
    driver = living(output.lock_uri) if work else None
    if TABLES not in folder.folders and not has_work and driver is None:
        return None  # at most a lock, which a refused command left
    committed, unfinished = output.committed(), output.unfinished() if has_work else None
    shards = _shards(unfinished) if unfinished is not None else None
    return InventoryRow(
        name=folder.name,
        uri=folder.uri,
        state=_state(committed, shards, driver=driver),
        progress=_progress_in_words(committed, unfinished, shards),
        result=_result_in_words(committed),
        updated_s=folder.updated_with(*_work_folders(folder, unfinished) if has_work else ()),
        numbers={
            "bundle": committed.summary.described.bundle if committed is not None and committed.summary else None,
            "generation": _number(committed, unfinished),
            **(shards or {}),
            **_counts(committed),
            **driver_values(driver),
        },
    )


def _names_of_work(folder: Folder) -> tuple[str, ...]:
    """The names of the folders in `_work`: the lock, and the generations that are not swept."""
    return ANYWHERE.list_level(join(folder.uri, WORK)).folders if WORK in folder.folders else ()


def _work_folders(folder: Folder, unfinished: Generation | None) -> list[str]:
    """The folders that a driver writes to."""
    return [WORK] if unfinished is None else [WORK, unfinished.uri.removeprefix(f"{folder.uri}/")]


def _shards(generation: Generation) -> dict[str, int]:
    """The progress of a generation, in shards and rows."""
    done = generation.done_shards()
    with Manifest(generation.manifest_uri, store=generation.store) as manifest:
        return {
            "shards_done": len(done),
            "shards": manifest.shards,
            "rows_done": sum(manifest.shard_rows(shard) for shard in done),
            "rows_to_do": manifest.rows,
        }


def _state(committed: Committed | None, shards: Mapping[str, int] | None, *, driver: Holder | None) -> State:
    if driver is not None:
        return "running"
    if shards is not None or committed is None:
        return "stopped" if committed is not None or (shards or {}).get("shards_done") else "new"
    return "failed" if committed.mark.failed else "finished"


def _number(committed: Committed | None, unfinished: Generation | None) -> int | None:
    return unfinished.number if unfinished is not None else committed.mark.number if committed is not None else None


def _counts(committed: Committed | None) -> dict[str, Any]:
    """The number of rows in the committed table."""
    if committed is None:
        return {"rows": None, "ok": None, "errors": None}
    if committed.summary is None:  # the summary was deleted or damaged
        return {"rows": committed.mark.rows, "ok": None, "errors": None}
    statuses = committed.summary.statuses
    return {"rows": committed.mark.rows, "ok": statuses.get("ok", 0), "errors": count_bad(statuses)}


def _progress_in_words(
    committed: Committed | None, unfinished: Generation | None, shards: Mapping[str, int] | None
) -> str:
    number = _number(committed, unfinished)
    if number is None:
        return ""
    if shards is None:
        return f"generation {number}"
    return (
        f"{shards['shards_done']:,} of {shards['shards']:,} shards, {shards['rows_done']:,} of "
        f"{shards['rows_to_do']:,} rows of generation {number}"
    )


def _result_in_words(committed: Committed | None) -> str:
    counts = _counts(committed)
    if counts["rows"] is None:
        return ""
    known = f": {counts['ok']:,} ok, {counts['errors']:,} errors" if counts["ok"] is not None else ""
    return f"{counts['rows']:,} rows{known}"
