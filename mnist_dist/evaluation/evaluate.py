"""From a finished prediction table to what it is worth, on disk and on the terminal.

Owns: the order of the job and the files `metrics.json` and `classification_report.txt`. Does not own: the numbers
(`metrics`, `comparison`), or the page that shows them, which is handed in.

The table is streamed; nothing is kept between runs, and the same command computes the same files again.
"""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mnist_dist.console import Console, Stop
from mnist_dist.errors import DataError
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.evaluation.comparison import Comparison, compare_tables
from mnist_dist.evaluation.metrics import METRIC_COLUMNS, Accumulator, Metrics, classification_report
from mnist_dist.evaluation.tables import ScoredTable, open_table
from mnist_dist.evaluation.truth import Truth, find_truth
from mnist_dist.evaluation.uri_hashes import Hashes, uri_hashes
from mnist_dist.session import Session
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

log = logging.getLogger(__name__)

METRICS_FILE, CLASSIFICATION_REPORT_FILE = "metrics.json", "classification_report.txt"
_WORST_CLASSES = 5
_NAMED = 3  # of what is unknown or there twice, in a line


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that is known of a table when its report is written."""

    job: EvaluateJob
    output: str
    table: ScoredTable
    truth: str | None
    """Where the truth comes from, for people; None: there is none."""
    metrics: Metrics
    classification_report: str | None
    comparison: Comparison | None
    notes: tuple[str, ...]
    """Sentences about what a reader of the numbers should know."""

    def to_json(self) -> dict[str, Any]:
        """What `metrics.json` says."""
        return {
            "predictions": self.table.uri,
            "model_id": self.table.model_id,
            "truth": self.truth,
            "notes": list(self.notes),
            "metrics": self.metrics.to_json(),
            "comparison": self.comparison.to_json() if self.comparison else None,
        }


Report = Callable[[Evaluation], str]
"""Writes a page about the evaluation into its output and gives the page's URI."""


def evaluate(job: EvaluateJob, *, console: Console, report: Report | None = None) -> dict[str, Any]:
    """Evaluates a table.

    Args:
        job: what to evaluate.
        console: where progress, notes and a short table are shown.
        report: writes the page; None: there is none.

    Returns:
        The keys of the job's JSON line: report, images, accuracy, accuracy_low, accuracy_high, macro_f1, log_loss, ece
        (null where there is no truth, or a column was left out), and output.

    Raises:
        DataError: there is no finished table, or the truth cannot be read.
        BundleError, ConfigError, PermissionError, ServiceError, StorageError: what was named cannot be used.
        Interrupted: SIGINT or SIGTERM.
    """
    with Stop(console) as stop:
        session = Session(console=console, stop=stop)
        table = open_table(job.table_uri, bundle=job.bundle)
        second = open_table(job.compare, bundle=None) if job.compare is not None else None
        truth = find_truth(table, labels=job.labels, label_column=job.label_column)
        table = replace(table, classes=replace(table.classes, by_number=not truth.guessed))
        ANYWHERE.check_writable(job.output_uri)
        metrics = _measure(job, table, truth, session)
        has_truth = metrics.labelled > 0
        comparison = None
        if second is not None:
            comparison = _compare(job, table, second, truth if has_truth else None, session)
        evaluation = Evaluation(
            job=job,
            output=job.output_uri,
            table=table,
            truth=truth.source if has_truth else None,
            metrics=metrics,
            classification_report=classification_report(metrics),
            comparison=comparison,
            notes=tuple(_notes(table, truth, metrics, comparison)),
        )
        stop.check()
        return _finish(evaluation, console=console, report=report)


def check_named(job: EvaluateJob) -> None:
    """Checks that the files are there which are looked at after a scoring that takes hours.

    Raises:
        DataError: the labels or the other table are not there.
    """
    if job.labels is not None and not ANYWHERE.exists(job.labels):
        raise DataError(f"there is no such file. Received: labels={job.labels!r}")
    if job.compare is not None:
        open_table(job.compare, bundle=None)


def _measure(job: EvaluateJob, table: ScoredTable, truth: Truth, session: Session) -> Metrics:
    log.info("evaluating %d rows of %s, %d classes, by %s", table.rows, table.uri, len(table.classes), truth.source)
    accumulator = Accumulator(table.classes, shown=job.top)
    with session.console.progress("evaluating") as bar:
        done = 0
        for batch in table.batches((*METRIC_COLUMNS, *truth.columns)):
            accumulator.add(batch, truth.labels(batch))
            session.check()
            done += len(batch)
            bar.update(done=done, total=table.rows, note=f"{done:,} of {table.rows:,} rows")
    metrics = accumulator.metrics()
    if metrics.duplicates:
        metrics = replace(metrics, duplicate_examples=_uris_of(table, accumulator.repeated_uris(), job.top))
    return metrics.without_labels() if truth.guessed and not metrics.known else metrics


def _uris_of(table: ScoredTable, hashes: Hashes, most: int) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for batch in table.batches(("uri",)):
        rows = np.flatnonzero(np.isin(uri_hashes(batch["uri"]), hashes))
        found |= dict.fromkeys(batch["uri"].take(pa.array(rows)).to_pylist())
        if len(found) >= most:
            break
    return tuple(found)[:most]


def _compare(
    job: EvaluateJob, first: ScoredTable, second: ScoredTable, truth: Truth | None, session: Session
) -> Comparison:
    total = first.rows + second.rows
    with session.console.progress("comparing") as bar:
        done = 0

        def progress(rows: int) -> None:
            nonlocal done
            session.check()
            done += rows
            bar.update(done=done, total=total, note=f"{done:,} of {total:,} rows")

        return compare_tables(first, second, truth=truth, shown=job.top, progress=progress)


def _finish(evaluation: Evaluation, *, console: Console, report: Report | None) -> dict[str, Any]:
    """Writes the files, the page last, since its pictures may take long; shows the short of it."""
    metrics, output = evaluation.metrics, evaluation.output
    for name in (METRICS_FILE, CLASSIFICATION_REPORT_FILE):  # of an earlier evaluation
        ANYWHERE.delete(join(output, name))
    ANYWHERE.delete_tree(join(output, "figures"))
    if evaluation.classification_report is not None:
        _write(output, CLASSIFICATION_REPORT_FILE, evaluation.classification_report)
    _write(output, METRICS_FILE, json.dumps(evaluation.to_json(), indent=2, allow_nan=False))
    page = report(evaluation) if report is not None else None
    show(evaluation, console)
    return {
        "report": page,
        "output": output,
        "images": metrics.images,
        "accuracy": metrics.accuracy,
        "accuracy_low": metrics.accuracy_low,
        "accuracy_high": metrics.accuracy_high,
        "macro_f1": metrics.macro_f1,
        "log_loss": metrics.log_loss,
        "ece": metrics.ece,
    }


def _write(output: str, name: str, text: str) -> None:
    ANYWHERE.write_bytes(join(output, name), text.encode())


# --- what a person sees ----------------------------------------------------------------------------------------------


def show(evaluation: Evaluation, console: Console) -> None:
    """Prints a short table of the metrics, the worst classes, and the notes."""
    metrics = evaluation.metrics
    console.table([("metric", "value"), *_headlines(metrics)])
    worst = sorted((one for one in metrics.per_class if one.support), key=lambda one: (one.f1 or 0.0, one.name))
    if worst:
        rows = [
            (one.name, f"{one.support:,}", *map(_percent, (one.precision, one.recall, one.f1)))
            for one in worst[:_WORST_CLASSES]
        ]
        console.table([("class", "images", "precision", "recall", "F1"), *rows])
    if evaluation.comparison is not None:
        console.table([("comparison", "images"), *_compared(evaluation.comparison)])
    for note in evaluation.notes:
        console.line(f"note: {note}")
    console.line(f"results: {evaluation.output}")


def _headlines(metrics: Metrics) -> Iterable[tuple[str, str]]:
    yield "images", f"{metrics.images:,}: " + ", ".join(f"{count:,} {word}" for word, count in metrics.statuses.items())
    if metrics.accuracy is not None:
        interval = f"{_percent(metrics.accuracy_low)} to {_percent(metrics.accuracy_high)}"
        yield "accuracy", f"{_percent(metrics.accuracy)} ({interval}) of {metrics.evaluated:,}"
        yield "macro F1", _percent(metrics.macro_f1)
    for name, value in (("log loss", metrics.log_loss), ("ECE", metrics.ece), ("ROC AUC", metrics.roc_auc)):
        if value is not None:
            yield name, f"{value:.4f}"


def _compared(comparison: Comparison) -> Iterable[tuple[str, str]]:
    yield "in both tables", f"{comparison.common:,}"
    if comparison.agreement is not None:
        yield "same class", f"{_percent(comparison.agreement)} of {comparison.compared:,}"
    if comparison.mcnemar is not None:
        yield "first alone is right", f"{comparison.first_right:,} (accuracy {_percent(comparison.first_accuracy)})"
        yield "second alone is right", f"{comparison.second_right:,} (accuracy {_percent(comparison.second_accuracy)})"
        yield "McNemar's test", f"p = {comparison.mcnemar.p_value:.3g} ({comparison.mcnemar.method})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _notes(table: ScoredTable, truth: Truth, metrics: Metrics, comparison: Comparison | None) -> Iterable[str]:
    if not metrics.labelled:
        yield (
            f"no truth: {truth.source} name none of the classes, so there is no accuracy; --labels FILE gives it"
            if truth.guessed
            else f"no truth: {truth.source} has no label for any of the images, so there is no accuracy"
        )
    elif metrics.labelled < metrics.images:
        yield f"{metrics.images - metrics.labelled:,} images have no label in {truth.source}"
    if metrics.unknown_labels:
        named = _some(metrics.unknown)
        yield f"{metrics.unknown_labels:,} images have a label that is none of the classes, and do not count: {named}"
    if table.classes.unnamed and (metrics.labelled or truth.guessed):
        yield (
            f"{len(table.classes.unnamed)} of {len(table.classes)} classes were never predicted and have no name here, "
            "so that their images have unknown labels; --bundle DIR names them"
        )
    if metrics.known > metrics.evaluated:
        yield f"{metrics.known - metrics.evaluated:,} images with a truth have no prediction, and do not count"
    if metrics.accuracy is not None and metrics.without_probabilities:
        yield f"{metrics.without_probabilities:,} images have no probabilities; log loss, Brier, AUC are without them"
    if metrics.duplicates:
        yield f"{metrics.duplicates:,} rows repeat the URI of another: {_some(metrics.duplicate_examples)}"
    if table.failed:
        yield "the scoring job marked the table as failed: it has more bad rows than it allowed"
    if comparison is not None:
        yield from _notes_of(comparison)


def _notes_of(comparison: Comparison) -> Iterable[str]:
    if comparison.first_model == comparison.second_model:
        yield f"both tables are of the same model, {comparison.first_model[:12]}"
    else:
        yield f"the models are {comparison.first_model[:12]} and {comparison.second_model[:12]}"
    if comparison.only_in_first:
        named = _some(comparison.only_in_first_examples)
        yield f"{comparison.only_in_first:,} images are in the first table alone: {named}"
    if comparison.only_in_second:
        named = _some(comparison.only_in_second_examples)
        yield f"{comparison.only_in_second:,} images are in the second table alone: {named}"
    if comparison.common > comparison.compared:
        yield f"{comparison.common - comparison.compared:,} images have no prediction in one table or in both"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:_NAMED])) + (", ..." if len(listed) > _NAMED else "")
