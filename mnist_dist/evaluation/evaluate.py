"""Evaluates a finished prediction table: writes the metrics to files and shows them on the terminal.

Owns: the steps of the job and the files `metrics.json`, `classification_report.txt` and, of multi-label tables,
`thresholds.csv`. Does not own: the metrics (`metrics`, `multi_label`, `comparison`), or the page that shows them, which
the caller passes in.

The table is streamed. Nothing is kept between runs; the same command computes the same files again.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mnist_dist.config import require
from mnist_dist.console import Console, Stop
from mnist_dist.errors import ConfigError, DataError, LabelsUnmatched, suggestion
from mnist_dist.evaluate_config import EvaluateJob, Match
from mnist_dist.evaluation.comparison import Comparison, compare_tables
from mnist_dist.evaluation.label_sets import find_label_sets
from mnist_dist.evaluation.matching import Known, Matches
from mnist_dist.evaluation.metrics import METRIC_COLUMNS, Accumulator, Counts, Metrics, classification_report
from mnist_dist.evaluation.multi_label import MULTI_LABEL_COLUMNS, MultiLabelAccumulator, MultiLabelMetrics
from mnist_dist.evaluation.set_codes import score_pairs
from mnist_dist.evaluation.tables import ScoredTable, open_table
from mnist_dist.evaluation.truth import Truth, find_truth, is_label_file, label_columns
from mnist_dist.evaluation.uri_hashes import Hashes, uri_hashes
from mnist_dist.evaluation.verdict import verdict_of_comparison
from mnist_dist.models.bundle import REPORT_FILE
from mnist_dist.scoring.thresholds import thresholds_csv
from mnist_dist.session import Session, seconds_since, started_at
from mnist_dist.sources.places import check_outside, not_there, place_of
from mnist_dist.store.anywhere import ANYWHERE, check_access, store_for
from mnist_dist.store.base import names_in
from mnist_dist.store.uris import join

log = logging.getLogger(__name__)

METRICS_FILE, CLASSIFICATION_REPORT_FILE = "metrics.json", "classification_report.txt"
THRESHOLDS_FILE = "thresholds.csv"
"""Of a multi-label table: the thresholds with the highest F1, for `score --threshold`."""
_OWN = frozenset({METRICS_FILE, CLASSIFICATION_REPORT_FILE, THRESHOLDS_FILE, "figures", "predictions", REPORT_FILE})
_RULES: tuple[Match, ...] = ("uri", "path", "name", "stem")
"""The strictest first."""
_WORST_CLASSES = 5
_NAMED = 3  # Examples in a note, such as unknown labels or duplicates.


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of an evaluation, from which its files are written."""

    job: EvaluateJob
    output: str
    table: ScoredTable
    truth: str | None
    """Source of the labels, for display; None: there are no labels."""
    metrics: Metrics | MultiLabelMetrics
    classification_report: str | None
    comparison: Comparison | None
    notes: tuple[str, ...]
    """Sentences that a reader of the metrics should know."""

    def to_json(self) -> dict[str, Any]:
        """The contents of `metrics.json`."""
        return {
            "predictions": self.table.uri,
            "model_id": self.table.model_id,
            "multi_label": self.table.is_multi_label,
            "truth": self.truth,
            "notes": list(self.notes),
            "metrics": self.metrics.to_json(),
            "comparison": self.comparison.to_json() if self.comparison else None,
        }


Report = Callable[[Evaluation], str]
"""Writes a page about the evaluation into its output folder and gives the URI of the page."""


def evaluate(job: EvaluateJob, *, console: Console, report: Report | None = None) -> dict[str, Any]:
    """Evaluates a table.

    Args:
        job: what to evaluate.
        console: shows progress, notes and a short table.
        report: writes the page; None: no page.

    Returns:
        The keys of the job's JSON line: report, output, images, seconds, and accuracy, accuracy_low, accuracy_high,
        macro_f1, log_loss, ece; of a multi-label table mean_average_precision, micro_f1, macro_f1, exact_match,
        hamming_loss and thresholds (the URI of the file). All but the first four are null without labels, or without
        their columns.

    Raises:
        DataError: there is no finished table, or the labels cannot be read.
        LabelsUnmatched: the given labels belong to no image, or none of them is a class.
        BundleError, ConfigError, PermissionError, ServiceError, StorageError: an input or the output cannot be used.
        Interrupted: SIGINT or SIGTERM.
    """
    began_at = started_at(console)
    check_named(job)
    with Stop(console) as stop:
        session = Session(console=console, stop=stop)
        table = open_table(job.table_uri, bundle=job.bundle)
        second = open_table(job.compare, bundle=None) if job.compare is not None else None
        truth = _find_truth(job, table)
        table = replace(table, classes=replace(table.classes, by_number=not truth.guessed))
        if job.labels is not None and table.rows and truth.known is not None and not truth.known.finds_any(table):
            raise LabelsUnmatched(_why_unmatched(job, table, truth.known))
        ANYWHERE.check_writable(job.output_uri)
        metrics = _measure(job, table, truth, session)
        _check_labels(job, table, truth, metrics)
        matches = _matches(table, truth, metrics)
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
            classification_report=classification_report(metrics) if isinstance(metrics, Metrics) else None,
            comparison=comparison,
            notes=tuple(_notes(table, truth, metrics, comparison, matches)),
        )
        stop.check()
        result = _finish(evaluation, console=console, report=report)
        return {**result, "seconds": seconds_since(began_at)}


def check_named(job: EvaluateJob) -> None:
    """Checks that the inputs exist and the output is free, before a scoring that takes hours.

    Raises:
        DataError: the labels or the table to compare with do not exist.
        ConfigError: the output holds foreign files.
    """
    check_access((job.predictions, job.compare, job.bundle, job.output))
    check_access((job.labels, *job.input), store=store_for(job.store))
    foreign = [name for name in names_in(ANYWHERE, job.output_uri) if name not in _OWN]
    if foreign:
        raise ConfigError(
            "output must be a new folder, or one that an evaluation has made. Received: "
            f"{job.output_uri!r}, which holds {', '.join(foreign[:_NAMED])}"
        )
    if job.labels is not None and is_label_file(job.labels):
        label_columns(job.labels, label_column=job.label_column, uri_column=job.uri_column)
    elif job.labels is not None:
        place = place_of(job.labels, store=store_for(job.store))
        if place.kind == "tree" and not ANYWHERE.exists(place.uri):
            raise not_there(place.name, place.uri)
        check_outside(job.output_uri, [job.labels], name="output")
    if job.compare is not None:
        open_table(job.compare, bundle=None)


def _find_truth(job: EvaluateJob, table: ScoredTable) -> Truth:
    store = store_for(job.store)
    if table.is_multi_label:
        return find_label_sets(
            table,
            labels=job.labels,
            scored=job.input,
            label_column=job.label_column,
            uri_column=job.uri_column,
            match=job.match,
            separator=job.label_separator,
            store=store,
        )
    require(
        job.label_separator is None,
        f"label_separator needs a multi-label table; each image of {table.uri} has one class",
        label_separator=job.label_separator,
    )
    return find_truth(
        table,
        labels=job.labels,
        scored=job.input,
        label_column=job.label_column,
        uri_column=job.uri_column,
        match=job.match,
        store=store,
    )


def _why_unmatched(job: EvaluateJob, table: ScoredTable, known: Known) -> str:
    """One URI of each side, and which other rule would find labels."""
    found = known.matches(table)
    if not found.labels:
        return f"{known.labels.name}: there are no labels in it. Received: labels={job.labels!r}"
    return (
        f"{known.labels.name}: none of its {found.labels:,} labels belongs to an image of {table.uri}. An image is"
        f" {found.without!r}, a label is of {found.example}. {_would_match(job, table, known)}."
        f" Received: labels={job.labels!r}, match={job.match!r}"
    )


def _would_match(job: EvaluateJob, table: ScoredTable, known: Known) -> str:
    """The strictest of the rules that find most labels."""
    counts: dict[Match, int] = {}
    for match in (rule for rule in _RULES if rule != job.match):
        with contextlib.suppress(DataError):  # Ambiguous by this rule.
            other = _find_truth(replace(job, match=match), table).known
            if other is not None and other.rule.depths != (1,):  # By path, these are names; that rule follows.
                counts[match] = other.matches(table).matched
    best = max(counts, key=lambda match: counts[match], default=None)
    if best is not None and counts[best]:
        return f"{counts[best]:,} of {table.rows:,} rows match with --match {best}"
    names = known.labels.columns
    columns = f"; --uri-column may name another column: {', '.join(names)}" if names else ""
    return f"None matches with --match {', '.join(rule for rule in _RULES if rule != job.match)} either{columns}"


def _check_labels(job: EvaluateJob, table: ScoredTable, truth: Truth, metrics: Metrics | MultiLabelMetrics) -> None:
    """Raises DataError if nothing was scored, and LabelsUnmatched if labels were given and all of them are empty, or
    none is a class."""
    if table.rows and not metrics.images:
        raise DataError(
            f"there is nothing to evaluate: none of the {table.rows:,} rows of {table.uri} has the status ok; their "
            "column `error` says why"
        )
    if job.labels is not None and metrics.images and not metrics.labelled:
        raise LabelsUnmatched(
            f"{truth.source}: the labels of all images are empty; --label-column names another column."
            f" Received: labels={job.labels!r}, label_column={job.label_column!r}"
        )
    if truth.guessed or not metrics.labelled or metrics.known:
        return
    names = [name for code, name in enumerate(table.classes.names) if code not in table.classes.unnamed]
    unknown = " (others have no known name; give --bundle DIR)" if table.classes.unnamed else ""
    raise LabelsUnmatched(
        f"{truth.source}: none of the labels of {metrics.labelled:,} images is a class of the model. Labels are"
        f" {_some(metrics.unknown, names)}; the classes are {_some(names)}{unknown}"
    )


def _matches(table: ScoredTable, truth: Truth, metrics: Metrics | MultiLabelMetrics) -> Matches | None:
    """How labels and images belong together, where not each has the other; None: there is nothing to say of it."""
    known = truth.known
    if known is None or truth.guessed or not metrics.labelled:
        return None
    is_whole = metrics.labelled == metrics.images == len(known.index.order)
    return None if is_whole else known.matches(table)


def _measure(job: EvaluateJob, table: ScoredTable, truth: Truth, session: Session) -> Metrics | MultiLabelMetrics:
    log.info("evaluating %d rows of %s, %d classes, by %s", table.rows, table.uri, len(table.classes), truth.source)
    if table.is_multi_label:
        accumulator: MultiLabelAccumulator | Accumulator = MultiLabelAccumulator(table, shown=job.top)
    else:
        accumulator = Accumulator(table.classes, shown=job.top)
    columns = MULTI_LABEL_COLUMNS if table.is_multi_label else METRIC_COLUMNS
    with session.console.progress("evaluating") as bar:
        done = 0
        for batch in table.batches((*columns, *truth.columns)):
            accumulator.add(batch, truth.labels(batch))
            session.check()
            done += len(batch)
            bar.update(done=done, total=table.rows, note=f"{done:,} of {table.rows:,} rows")
    metrics = accumulator.metrics()
    if metrics.duplicates:
        metrics = replace(metrics, duplicate_examples=_uris_of(table, accumulator.repeated_uris(), job.top))
    return metrics.without_labels() if truth.guessed and not metrics.known else metrics


def _uris_of(table: ScoredTable, hashes: Hashes, max_count: int) -> tuple[str, ...]:
    uris: dict[str, None] = {}
    for batch in table.batches(("uri",)):
        rows = np.flatnonzero(np.isin(uri_hashes(batch["uri"]), hashes))
        uris |= dict.fromkeys(batch["uri"].take(pa.array(rows)).to_pylist())
        if len(uris) >= max_count:
            break
    return tuple(uris)[:max_count]


def _compare(
    job: EvaluateJob, first: ScoredTable, second: ScoredTable, truth: Truth | None, session: Session
) -> Comparison:
    reads = 2 if first.is_multi_label and truth is not None else 1  # Once more for the metrics of both.
    total = reads * (first.rows + second.rows)
    with session.console.progress("comparing") as bar:
        done = 0

        def progress(rows: int) -> None:
            nonlocal done
            session.check()
            done += rows
            bar.update(done=done, total=total, note=f"{done:,} of {total:,} rows")

        return compare_tables(first, second, truth=truth, shown=job.top, progress=progress)


def _finish(evaluation: Evaluation, *, console: Console, report: Report | None) -> dict[str, Any]:
    """Writes the files, the page last because its pictures may take long, and shows a summary."""
    metrics, output = evaluation.metrics, evaluation.output
    for name in (
        METRICS_FILE,
        CLASSIFICATION_REPORT_FILE,
        THRESHOLDS_FILE,
    ):  # These may be left from an earlier evaluation.
        ANYWHERE.delete(join(output, name))
    ANYWHERE.delete_tree(join(output, "figures"))
    if evaluation.classification_report is not None:
        _write(output, CLASSIFICATION_REPORT_FILE, evaluation.classification_report)
    thresholds = metrics.best_thresholds if isinstance(metrics, MultiLabelMetrics) else {}
    if thresholds:
        _write(output, THRESHOLDS_FILE, thresholds_csv(thresholds).decode())
    _write(output, METRICS_FILE, json.dumps(evaluation.to_json(), indent=2, allow_nan=False))
    page = report(evaluation) if report is not None else None
    show(evaluation, console)
    own: tuple[str, ...] = ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "log_loss", "ece")
    result: dict[str, Any] = {"report": page, "output": output, "images": metrics.images}
    if isinstance(metrics, MultiLabelMetrics):
        own = ("mean_average_precision", "micro_f1", "macro_f1", "exact_match", "hamming_loss")
        result["thresholds"] = join(output, THRESHOLDS_FILE) if thresholds else None
    return {**result, **{name: getattr(metrics, name) for name in own}}


def _write(output: str, name: str, text: str) -> None:
    ANYWHERE.write_bytes(join(output, name), text.encode())


# --- output on the terminal ------------------------------------------------------------------------------------------


def show(evaluation: Evaluation, console: Console) -> None:
    """Prints the main metrics, the worst classes, and the notes."""
    metrics = evaluation.metrics
    console.table([("metric", "value"), *_headlines(metrics)])
    if isinstance(metrics, MultiLabelMetrics):
        _show_worst_of_sets(metrics, console)
    else:
        _show_worst(metrics, console)
    if evaluation.comparison is not None:
        console.table([("comparison", "images"), *_compared(evaluation.comparison)])
        for sentence in verdict_of_comparison(evaluation.comparison, "the first model", "the second model"):
            console.line(sentence[0].upper() + sentence[1:])
    for note in evaluation.notes:
        console.line(f"note: {note}")
    console.line(f"results: {evaluation.output}")


def _show_worst(metrics: Metrics, console: Console) -> None:
    worst = sorted((row for row in metrics.per_class if row.support), key=lambda row: (row.f1 or 0.0, row.name))
    if worst:
        rows = [
            (row.name, f"{row.support:,}", *map(_percent, (row.precision, row.recall, row.f1)))
            for row in worst[:_WORST_CLASSES]
        ]
        console.table([("class", "images", "precision", "recall", "F1"), *rows])


def _show_worst_of_sets(metrics: MultiLabelMetrics, console: Console) -> None:
    worst = sorted((row for row in metrics.per_class if row.support), key=lambda row: (row.f1 or 0.0, row.name))
    if worst:
        rows = [
            (row.name, f"{row.support:,}", *map(_percent, (row.precision, row.recall, row.f1, row.average_precision)))
            for row in worst[:_WORST_CLASSES]
        ]
        console.table([("class", "images", "precision", "recall", "F1", "average precision"), *rows])


def _headlines(metrics: Metrics | MultiLabelMetrics) -> Iterable[tuple[str, str]]:
    yield "images", f"{metrics.images:,}: " + ", ".join(f"{count:,} {word}" for word, count in metrics.statuses.items())
    if isinstance(metrics, MultiLabelMetrics):
        yield from _headlines_of_sets(metrics)
        return
    if metrics.accuracy is not None:
        interval = f"{_percent(metrics.accuracy_low)} to {_percent(metrics.accuracy_high)}"
        yield "accuracy", f"{_percent(metrics.accuracy)} ({interval}) of {metrics.evaluated:,}"
        yield "macro F1", _percent(metrics.macro_f1)
    for name, value in (("log loss", metrics.log_loss), ("ECE", metrics.ece), ("ROC AUC", metrics.roc_auc)):
        if value is not None:
            yield name, f"{value:.4f}"


def _headlines_of_sets(metrics: MultiLabelMetrics) -> Iterable[tuple[str, str]]:
    for name, value in (
        ("mAP", metrics.mean_average_precision),
        ("micro F1", metrics.micro_f1),
        ("macro F1", metrics.macro_f1),
        ("macro F1, best thresholds", metrics.best_macro_f1),
        ("exact match", metrics.exact_match),
        ("Hamming loss", metrics.hamming_loss),
    ):
        if value is not None:
            yield name, _percent(value)


def _compared(comparison: Comparison) -> Iterable[tuple[str, str]]:
    yield "in both tables", f"{comparison.common:,}"
    if comparison.first_scores is not None and comparison.second_scores is not None:
        pairs = score_pairs(comparison.first_scores, comparison.second_scores)
        yield from ((name, f"{_percent(first)}, {_percent(second)}") for name, first, second in pairs)
    if comparison.agreement is not None:
        yield "same prediction", f"{_percent(comparison.agreement)} of {comparison.compared:,}"
    if comparison.mcnemar is not None:
        yield "only the first is right", f"{comparison.first_right:,} (accuracy {_percent(comparison.first_accuracy)})"
        yield (
            "only the second is right",
            f"{comparison.second_right:,} (accuracy {_percent(comparison.second_accuracy)})",
        )
        yield "McNemar's test", f"p = {comparison.mcnemar.p_value:.3g} ({comparison.mcnemar.method})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _notes(
    table: ScoredTable,
    truth: Truth,
    metrics: Metrics | MultiLabelMetrics,
    comparison: Comparison | None,
    matches: Matches | None = None,
) -> Iterable[str]:
    unnamed = table.classes.unnamed
    if not metrics.labelled:
        yield (
            f"no labels: {truth.source} are not named like classes; for accuracy, give --labels FILE"
            if truth.guessed
            else f"no labels: {truth.source} has no label for any of the images, hence no accuracy"
        )
    elif metrics.labelled < metrics.images:
        example = f", such as {matches.without!r}" if matches is not None and matches.without is not None else ""
        yield f"{_images_have(metrics.images - metrics.labelled)} no label in {truth.source}{example}"
    if matches is not None:
        yield from _notes_of_matches(matches, duplicates=metrics.duplicates)
    if metrics.unknown_labels:
        labels = _some(metrics.unknown, table.classes.names)
        is_left_out = "is" if metrics.unknown_labels == 1 else "are"
        have = _images_have(metrics.unknown_labels)
        yield f"{have} a label that is no class, and {is_left_out} not counted: {labels}"
    if unnamed and (metrics.labelled or truth.guessed):
        yield (
            f"{len(unnamed)} of {len(table.classes)} classes were never predicted, so their names "
            "are not known and their labels count as unknown; give --bundle DIR"
        )
    if metrics.known > metrics.evaluated:
        yield unpredicted_note(metrics)
    if metrics.evaluated and metrics.without_probabilities:
        what = "average precision and best thresholds" if table.is_multi_label else "log loss, Brier and AUC"
        yield f"{metrics.without_probabilities:,} images have no probabilities; {what} leave them out"
    if metrics.duplicates:
        yield f"{metrics.duplicates:,} rows are duplicates of another row: {_some(metrics.duplicate_examples)}"
    if table.failed:
        yield "the scoring job failed, because the table has too many bad rows"
    if comparison is not None:
        yield from _notes_of(comparison)


def unpredicted_note(metrics: Counts) -> str:
    """The note about labels without a prediction; a page says it in its verdict."""
    count = metrics.known - metrics.evaluated
    if count == 1:
        return "1 image with a label has no prediction, and is not counted"
    return f"{count:,} images with a label have no prediction, and are not counted"


def _images_have(count: int) -> str:
    return "1 image has" if count == 1 else f"{count:,} images have"


def models_note(comparison: Comparison) -> str:
    """The note about which models are compared; a page says it by their names."""
    return f"the models are {comparison.first_model[:12]} and {comparison.second_model[:12]}"


def _notes_of_matches(matches: Matches, *, duplicates: int) -> Iterable[str]:
    if matches.unused:
        yield f"{matches.unused:,} of {matches.labels:,} labels belong to no image, such as that of {matches.example}"
    if matches.shared > duplicates:
        yield f"{matches.shared:,} images share the label of another, since their names are alike; see --match"


def _notes_of(comparison: Comparison) -> Iterable[str]:
    if comparison.first_model == comparison.second_model:
        yield f"both tables come from the same model, {comparison.first_model[:12]}"
    else:
        yield models_note(comparison)
    if comparison.only_in_first:
        uris = _some(comparison.only_in_first_examples)
        yield f"{comparison.only_in_first:,} images are only in the first table: {uris}"
    if comparison.only_in_second:
        uris = _some(comparison.only_in_second_examples)
        yield f"{comparison.only_in_second:,} images are only in the second table: {uris}"
    if comparison.common > comparison.compared:
        yield f"{comparison.common - comparison.compared:,} images in both tables lack a prediction in at least one"


def _some(names: Iterable[str], known: Sequence[str] = ()) -> str:
    """A few names, each with the known one that is like it, if any."""
    listed = list(names)
    shown = (f"{name!r}{suggestion(name, known)}" for name in listed[:_NAMED])
    return ", ".join(shown) + (", ..." if len(listed) > _NAMED else "")
