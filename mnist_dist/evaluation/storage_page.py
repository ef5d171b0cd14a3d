"""The page of a storage: all runs, searches, prediction tables and evaluations in it, with links to their reports.

Owns: what the page shows, and writing it. Does not own: what a folder holds and in which state it is (`inventory` and
the rows of each kind), or the frame of a page (`templates`).

Contract: the page is written whole or not at all. Its links are relative, so the storage may be moved, copied or served
with it.
"""

import posixpath
import urllib.parse
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mnist_dist.console import Console
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.evaluation import evaluation_row as evaluations
from mnist_dist.evaluation.comparison_parts import run_of
from mnist_dist.evaluation.listing import Badge, Entry, Listing, Order, Tone
from mnist_dist.evaluation.report import Headline, Link
from mnist_dist.evaluation.search_page import FOLD_TABLES
from mnist_dist.evaluation.templates import SORT_TABLES, render_page
from mnist_dist.inventory import THREADS, InventoryRow, Kind, State, rows_of_kinds
from mnist_dist.models.bundle import REPORT_FILE
from mnist_dist.report_config import ReportJob
from mnist_dist.scoring import output_row as tables
from mnist_dist.session import seconds_since, started_at
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import absolute, bucket_and_key, is_remote, join, parent_of
from mnist_dist.training.runs import run_row
from mnist_dist.tuning.search_row import search_row

BUNDLE_REPORT = f"bundle/{REPORT_FILE}"
DEEPER = 1
"""Levels of folders to search beyond the usual ones: the storage of runs may be a folder of this one (`runs`)."""
KINDS: Mapping[str, Kind] = {
    "runs": Kind(row_of=run_row, depth=1 + DEEPER),
    "searches": Kind(row_of=search_row, depth=1 + DEEPER),
    "tables": Kind(row_of=tables.table_row, depth=tables.DEPTH + DEEPER),
    "evaluations": Kind(row_of=evaluations.evaluation_row, depth=evaluations.DEPTH + DEEPER),
}
BADGES: Mapping[State, tuple[str, Tone]] = {
    "finished": ("finished", "plain"),
    "running": ("running", "busy"),
    "stopped": ("resumable", "warn"),
    "failed": ("failed", "bad"),
    "new": ("nothing saved yet", "quiet"),
    "unreadable": ("unreadable", "bad"),
}


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a storage holds."""

    uri: str
    runs: Sequence[InventoryRow]
    searches: Sequence[InventoryRow]
    tables: Sequence[InventoryRow]
    evaluations: Sequence[InventoryRow]
    unreadable: Sequence[InventoryRow]
    reports: Mapping[str, str]
    """URI of a run, search, table or evaluation -> URI of its report, of those that have one."""

    @property
    def rows(self) -> list[InventoryRow]:
        """All of them."""
        return [*self.runs, *self.searches, *self.tables, *self.evaluations, *self.unreadable]


def report_storage(job: ReportJob, *, console: Console) -> dict[str, Any]:
    """Writes the page of a storage.

    Args:
        job: the storage, and where the page goes.
        console: shows what was found.

    Returns:
        The keys of the job's JSON line: `report` (URI of the page), `storage`, `runs`, `searches`, `tables`,
        `evaluations` (how many there are), `seconds`.

    Raises:
        DataError: the storage holds nothing to show.
        ConfigError: it is itself a run, search, table or evaluation.
        PermissionError, ServiceError, StorageError: it cannot be listed, or the page cannot be written.
    """
    began_at = started_at(console)
    held = look_into(absolute(job.storage))
    ANYWHERE.write_bytes(job.page_uri, render_storage(held, page_uri=job.page_uri).encode())
    counts = _counts(held)
    console.line(f"{_in_words(counts)} in {held.uri}\nreport: {job.page_uri}")
    return {"report": job.page_uri, "storage": held.uri, **counts, "seconds": seconds_since(began_at)}


def look_into(uri: str) -> Held:
    """Finds everything in a storage.

    Args:
        uri: absolute URI of the storage.

    Raises:
        DataError, ConfigError, ServiceError, StorageError: see `report_storage`.
    """
    found = rows_of_kinds(uri, KINDS)
    finalists = tuple(f"{row.uri}/" for row in found["searches"])
    found["runs"] = [row for row in found["runs"] if not row.uri.startswith(finalists)]
    rows = [row for kind in found.values() for row in kind]
    if not rows:
        raise DataError(
            "there is no run, search, prediction table or evaluation in the storage, so there is nothing to show. "
            f"Received: storage={uri!r}"
        )
    if any(not row.name for row in rows):
        raise ConfigError(
            f"storage must be a folder of runs and tables, and this is one itself: name the folder that holds it "
            f"({parent_of(uri)}). Received: storage={uri!r}"
        )
    readable = {name: [row for row in kind if row.state != "unreadable"] for name, kind in found.items()}
    run_uris = {row.uri for row in readable["runs"]}
    readable["searches"] = [row for row in readable["searches"] if row.uri not in run_uris]  # Only its lock is there.
    unreadable = {row.uri: row for row in rows if row.state == "unreadable"}
    return Held(uri=uri, **readable, unreadable=list(unreadable.values()), reports=_reports(readable))


def _reports(rows: Mapping[str, Sequence[InventoryRow]]) -> dict[str, str]:
    """The report of each run, search and evaluation that has one, and of each table the newest evaluation's."""
    names = {"runs": (BUNDLE_REPORT,), "searches": (REPORT_FILE, BUNDLE_REPORT), "evaluations": (REPORT_FILE,)}
    asked = [(row.uri, names[kind]) for kind in names for row in rows[kind]]

    def first(uri: str, candidates: Sequence[str]) -> str | None:
        return next((join(uri, name) for name in candidates if ANYWHERE.exists(join(uri, name))), None)

    with ThreadPoolExecutor(THREADS) as pool:
        reports = list(pool.map(lambda each: first(*each), asked))
    found = {uri: report for (uri, _), report in zip(asked, reports, strict=True) if report is not None}
    tables_here = {row.uri for row in rows["tables"]}
    for row in reversed(rows["evaluations"]):  # The newest one comes first, and so it counts.
        if row.uri in found:
            found[_table_of(row, tables_here)] = found[row.uri]
    return found


def _table_of(evaluation: InventoryRow, tables_here: Collection[str]) -> str:
    """The table of an evaluation: as recorded, or, where the storage was moved since, the one of its name beside it."""
    recorded = str(evaluation.numbers["predictions"])
    beside = join(parent_of(evaluation.uri), recorded.rstrip("/").rpartition("/")[2])
    return beside if recorded not in tables_here and beside in tables_here else recorded


# --- the page --------------------------------------------------------------------------------------------------------


def render_storage(held: Held, *, page_uri: str) -> str:
    """Renders the page as HTML, with links relative to `page_uri`."""

    def link_to(row: InventoryRow, text: str) -> Entry:
        report = held.reports.get(row.uri)
        return Link(text=text, href=relative_link(report, page_uri)) if report is not None else text

    listings = [
        _runs(held.runs, link_to),
        _searches(held.searches, link_to),
        _tables(held.tables, link_to),
        _evaluations(held.evaluations, link_to),
        _unreadable(held.unreadable),
    ]
    return render_page(
        "storage.html.j2",
        kind="Storage",
        title=held.uri.rstrip("/").rpartition("/")[2] or held.uri,
        subtitle=held.uri,
        scripts=(SORT_TABLES, FOLD_TABLES),
        verdict=_verdict(held),
        headlines=_headlines(held),
        shown_listings=[listing for listing in listings if listing.rows],
        looked_at=_date(datetime.now(UTC).timestamp()),
    )


LinkTo = Callable[[InventoryRow, str], Entry]


def relative_link(uri: str, page_uri: str) -> str:
    """The link from one page to another in the same file system or bucket."""
    target, page = (bucket_and_key(each)[1] if is_remote(each) else each for each in (uri, page_uri))
    folder = posixpath.dirname(page)
    return urllib.parse.quote(posixpath.relpath(f"/{target.lstrip('/')}", f"/{folder.lstrip('/')}"))


def _verdict(held: Held) -> list[str]:
    states = [row.state for row in held.rows]
    notes = [
        f"{states.count(state)} {words}"
        for state, words in (
            ("running", "at work"),
            ("stopped", "resumable by the same command"),
            ("failed", "failed"),
            ("unreadable", "unreadable"),
        )
        if state in states
    ]
    return [f"{_in_words(_counts(held))}{f': {_listed(notes)}' if notes else ', all finished'}."]


def _headlines(held: Held) -> list[Headline]:
    """The best of what was tested, and how much there is of each kind."""
    shown = []
    tested = [(row.numbers["test_accuracy"], row.name) for row in held.runs]
    tested += [((row.numbers["best"] or {}).get("test_accuracy"), row.name) for row in held.searches]
    known = [(accuracy, name) for accuracy, name in tested if accuracy is not None]
    if known:
        accuracy, name = max(known)
        shown.append(Headline(label="best test accuracy", value=f"{100 * accuracy:.2f} %", note=name))
    shown += [Headline(label=name, value=f"{count:,}") for name, count in _counts(held).items() if count]
    return shown


def _runs(rows: Sequence[InventoryRow], link_to: LinkTo) -> Listing:
    columns = ("name", "status", "test accuracy", "validation accuracy", "epochs", "planned", "recipe", "changed, UTC")
    cells = [
        [
            link_to(row, row.name),
            _badge(row),
            _share(row.numbers["test_accuracy"]),
            _share(row.numbers["val_accuracy"]),
            _count(row.numbers["epochs_done"]),
            _count(row.numbers["epochs"]),
            row.numbers["recipe"] or "",
            _date(row.updated_s),
        ]
        for row in rows
    ]
    note = "A name leads to the report of the run's bundle, once it is tested."
    return _listing("runs", "Training runs", columns, cells, note=note)


def _searches(rows: Sequence[InventoryRow], link_to: LinkTo) -> Listing:
    columns = ("name", "status", "test accuracy", "validation accuracy", "trials", "planned", "failed", "recipe")
    cells = [
        [
            link_to(row, row.name),
            _badge(row),
            _share((row.numbers["best"] or {}).get("test_accuracy")),
            _share((row.numbers["best"] or {}).get("val_accuracy")),
            _count(row.numbers["trials_done"]),
            _count(row.numbers["trials"]),
            _count(row.numbers["trials_failed"]),
            row.numbers["recipe"] or "",
            _date(row.updated_s),
        ]
        for row in rows
    ]
    note = "Accuracies of the winner, or of the best trial so far."
    return _listing("searches", "Searches", (*columns, "changed, UTC"), cells, note=note)


def _tables(rows: Sequence[InventoryRow], link_to: LinkTo) -> Listing:
    columns = ("name", "status", "images", "ok", "bad", "scored by", "evaluation", "changed, UTC")
    cells = [
        [
            row.name,
            _badge(row, note=row.progress if row.state in ("running", "stopped") else ""),
            _count(row.numbers["rows"]),
            _count(row.numbers["ok"]),
            _count(row.numbers["errors"]),
            run_of(row.numbers["bundle"] or ""),
            entry if isinstance(entry := link_to(row, "report"), Link) else "",
            _date(row.updated_s),
        ]
        for row in rows
    ]
    note = "An evaluation leads to the newest report about the table that lies in this storage."
    return _listing("tables", "Prediction tables", columns, cells, note=note)


def _evaluations(rows: Sequence[InventoryRow], link_to: LinkTo) -> Listing:
    is_multi_label = any(row.numbers["mean_average_precision"] is not None for row in rows)
    columns = ["name", "accuracy", "95 % from", "to", *(["mAP"] if is_multi_label else []), "macro F1", "images"]
    cells = [
        [
            link_to(row, row.name),
            *(_share(row.numbers[name]) for name in ("accuracy", "accuracy_low", "accuracy_high")),
            *([_share(row.numbers["mean_average_precision"])] if is_multi_label else []),
            _share(row.numbers["macro_f1"]),
            _count(row.numbers["images"]),
            str(row.numbers["predictions"]).rpartition("/")[2],
            _date(row.updated_s),
        ]
        for row in rows
    ]
    return _listing("evaluations", "Evaluations", (*columns, "table", "changed, UTC"), cells)


def _unreadable(rows: Sequence[InventoryRow]) -> Listing:
    cells: list[list[Entry]] = [[row.name, _badge(row), row.result, _date(row.updated_s)] for row in rows]
    return _listing("unreadable", "Unreadable", ("name", "status", "why", "changed, UTC"), cells)


def _listing(
    name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Entry]], *, note: str = ""
) -> Listing:
    """Rows with the newest first, as `rows_of_kinds` gives them; the last column is their date. Columns without any
    entry are left out."""
    newest_first: Order = "descending"
    order = (len(columns) - 1, newest_first) if len(rows) > 1 else None
    return Listing(name=name, title=title, columns=columns, rows=rows, note=note, order=order).without_empty_columns()


def _badge(row: InventoryRow, *, note: str = "") -> Badge:
    text, tone = BADGES[row.state]
    return Badge(text=text, tone=tone, note=note)


# --- words -----------------------------------------------------------------------------------------------------------


def _counts(held: Held) -> dict[str, int]:
    kinds = {"runs": held.runs, "searches": held.searches, "tables": held.tables, "evaluations": held.evaluations}
    return {name: len(rows) for name, rows in kinds.items()}


_NOUNS = {
    "runs": ("training run", "training runs"),
    "searches": ("search", "searches"),
    "tables": ("prediction table", "prediction tables"),
    "evaluations": ("evaluation", "evaluations"),
}


def _in_words(counts: Mapping[str, int]) -> str:
    return _listed([f"{count:,} {_NOUNS[name][count != 1]}" for name, count in counts.items() if count] or ["nothing"])


def _listed(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _date(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
