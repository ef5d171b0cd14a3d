"""Builds the report pages of a bundle and of an evaluated table.

Does not own: the metrics, or the rendering (`report`).
"""

# n = images, K = classes

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnist_dist.console import command_line
from mnist_dist.evaluation import figures
from mnist_dist.evaluation.comparison import Comparison
from mnist_dist.evaluation.evaluate import Evaluation
from mnist_dist.evaluation.metrics import Counts, Metrics, classification_report
from mnist_dist.evaluation.multi_label import LabelMetrics, MultiLabelMetrics
from mnist_dist.evaluation.pictures import load_pictures
from mnist_dist.evaluation.report import (
    Example,
    Gallery,
    Headline,
    Page,
    Shown,
    Table,
    write_page,
)
from mnist_dist.evaluation.set_codes import score_pairs
from mnist_dist.evaluation.tables import read_provenance
from mnist_dist.models.bundle import REPORT_FILE, BundleInfo
from mnist_dist.models.history import Epoch
from mnist_dist.scoring.generations import Summary
from mnist_dist.store.anywhere import ANYWHERE, store_for
from mnist_dist.store.uris import join

MAX_CLASSES = 200
"""Most classes in the table of a page; with more classes, the worst ones are shown."""


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What the page of a finished training shows, besides the metrics."""

    name: str
    """Name of the run."""
    command: str
    bundle: BundleInfo
    history: Sequence[Epoch]
    counts: Mapping[str, npt.NDArray[np.int64]]
    """Images of each class by split, `int64 [K]`."""
    samples: Sequence[figures.Picture]
    """A sample of the training images."""
    predictions: Sequence[Example]
    """A sample of the test images, unselected."""
    mistakes: Sequence[Example]
    hits: Sequence[Example]
    architecture: str
    """As Keras prints it."""
    parameters: int
    workers: int
    precision: str
    images_per_s: float | None
    seconds: float


def training_page(facts: TrainingFacts, metrics: Metrics | MultiLabelMetrics) -> Page:
    """Builds the page of a bundle; `metrics` are those of the test images."""
    report = classification_report(metrics) if isinstance(metrics, Metrics) else None
    bundle = facts.bundle
    shown = [
        Shown(
            name="training_curves",
            title="Training curves",
            alt=f"Loss and accuracy of training and validation over {len(facts.history)} epochs",
            figure=figures.training_curves(facts.history),
            wide=True,
            note="A dotted line marks a new phase. Training values: epoch means, with dropout and augmentation.",
        ),
        *(_of_metrics(metrics) if isinstance(metrics, Metrics) else []),
        Shown(
            name="class_distribution",
            title="Images of each class",
            alt="Bars: images of each class in the training, validation and test split",
            figure=figures.class_distribution(facts.counts, metrics.classes),
            wide=True,
        ),
        _pictures_file("prediction_examples", "Predictions for test images", facts.predictions),
        _pictures_file("misclassified_samples", "Most confident mistakes", facts.mistakes),
    ]
    speed = f"{facts.images_per_s:,.0f} images/s" if facts.images_per_s else "not measured"
    return Page(
        title=facts.name,
        subtitle=f"{bundle.backbone}, weights {bundle.weights}; {bundle.created_at}",
        headlines=[
            *(_headlines(metrics, of="test") if isinstance(metrics, Metrics) else _headlines_of_sets(metrics)),
            Headline(label="parameters", value=f"{facts.parameters:,}"),
            Headline(
                label="training",
                value=speed,
                note=f"{facts.workers} worker(s), {facts.precision}, {facts.seconds:.0f} s",
            ),
        ],
        figures=shown,
        galleries=[
            Gallery(title="Most confident mistakes", examples=facts.mistakes, note="Test images, the worst first."),
            Gallery(title="Least confident hits", examples=facts.hits, note="Correct, with the lowest confidence."),
            Gallery(title="Samples of the training images", examples=[_sample(picture) for picture in facts.samples]),
        ],
        tables=_tables(metrics) if isinstance(metrics, Metrics) else _tables_of_sets(metrics),
        facts=[
            ("command", facts.command),
            ("data fingerprint", bundle.data_fingerprint),
            ("validation", ", ".join(f"{name} {value:.4f}" for name, value in bundle.validation.items())),
            *((f"version of {name}", version) for name, version in bundle.versions.items()),
        ],
        texts={
            "configuration": json.dumps(bundle.config, indent=2),
            "architecture": facts.architecture,
            **({"classification report": report} if report else {}),
        },
        files={
            "model_architecture.txt": facts.architecture,
            **({"classification_report.txt": report} if report else {}),
        },
    )


def write_evaluation_page(evaluation: Evaluation) -> str:
    """Writes the page of an evaluation and its figures into its output folder; gives the URI of the page."""
    page = evaluation_page(evaluation)
    with tempfile.TemporaryDirectory() as scratch:
        write_page(page, Path(scratch))
        for path in sorted(Path(scratch).rglob("*"), key=lambda path: path.name == REPORT_FILE):  # The page is last.
            if path.is_file():
                uri = join(evaluation.output, path.relative_to(scratch).as_posix())
                ANYWHERE.write_bytes(uri, path.read_bytes())
    return join(evaluation.output, REPORT_FILE)


def evaluation_page(evaluation: Evaluation) -> Page:
    """Builds the page of an evaluated table; the pictures are read again, if they still exist."""
    metrics, table = evaluation.metrics, evaluation.table
    moved = evaluation.comparison.moved if evaluation.comparison else ()
    selected = (metrics.mistakes, metrics.doubtful_hits) if isinstance(metrics, Metrics) else ((), ())
    uris = [image.uri for images in selected for image in images] + [image.uri for image in moved]
    pixels = load_pictures(uris, store=store_for(evaluation.job.store))
    mistakes, hits = (
        [
            Example(
                name=image.uri,
                predicted=image.predicted,
                confidence=image.confidence,
                truth=image.truth,
                pixels=pixels[image.uri],
            )
            for image in images
        ]
        for images in selected
    )
    shown = [*(_of_metrics(metrics) if isinstance(metrics, Metrics) else ()), *_of_predictions(metrics)]
    if mistakes:
        shown.append(_pictures_file("misclassified_samples", "Most confident mistakes", mistakes))
    galleries = []
    if isinstance(metrics, Metrics) and metrics.accuracy is not None:
        galleries = [
            Gallery(title="Most confident mistakes", examples=mistakes, note="The worst first."),
            Gallery(title="Least confident hits", examples=hits, note="Correct, with the lowest confidence."),
        ]
    if evaluation.comparison is not None:
        galleries.append(
            Gallery(
                title="Images that the two models classify differently",
                examples=[
                    Example(
                        name=image.uri,
                        predicted=image.first,
                        second=image.second,
                        confidence=image.second_confidence,
                        truth=image.truth,
                        pixels=pixels[image.uri],
                    )
                    for image in moved
                ],
                note="First table → second table, with the confidence of the second.",
            )
        )
    summary, bundle = read_provenance(table.uri)
    texts = {"classification report": evaluation.classification_report} if evaluation.classification_report else {}
    for title, values in (
        ("scoring settings", summary and summary.settings),
        ("configuration", bundle and bundle.config),
    ):
        texts |= {title: json.dumps(values, indent=2)} if values else {}
    return Page(
        title=f"Evaluation of {table.uri.rstrip('/').rpartition('/')[2]}",
        subtitle=table.uri,
        headlines=_headlines(metrics, of="") if isinstance(metrics, Metrics) else _headlines_of_sets(metrics),
        warnings=evaluation.notes,
        figures=shown,
        galleries=galleries,
        tables=[
            *(_tables(metrics) if isinstance(metrics, Metrics) else _tables_of_sets(metrics)),
            *_compared(evaluation.comparison),
        ],
        facts=[
            ("command", command_line()),
            ("model", table.model_id),
            ("truth", evaluation.truth or "no labels were given or found"),
            *_of_provenance(summary, bundle),
        ],
        texts=texts,
        files={"classification_report.txt": evaluation.classification_report}
        if evaluation.classification_report
        else {},
    )


def _of_provenance(summary: Summary | None, bundle: BundleInfo | None) -> list[tuple[str, str]]:
    """How the table was made, as far as this is still known."""
    facts: list[tuple[str, object]] = []
    if summary is not None:
        facts += [
            ("bundle", summary.described.bundle),
            ("engine", summary.engine),
            ("scoring, images/s", summary.images_per_s),
        ]
    if bundle is not None:
        facts += [
            ("backbone", bundle.backbone),
            *_of_origin(bundle),
            *((f"version of {name}", version) for name, version in bundle.versions.items()),
        ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _of_origin(bundle: BundleInfo) -> list[tuple[str, object]]:
    """How the model came to be: combined, imported, or trained here."""
    if bundle.combined is not None:
        used = [member for member in bundle.combined.members if member.is_used]
        return [(bundle.combined.method, f"{member.uri} ({member.model_id[:12]})") for member in used]
    imported = bundle.imported
    if imported is None:
        return [("weights", bundle.weights), ("training data fingerprint", bundle.data_fingerprint)]
    assumed = [("assumed at its import", sentence) for sentence in imported.assumed]
    return [("imported from", f"{imported.source} ({imported.kind})"), *assumed]


# --- what both pages show --------------------------------------------------------------------------------------------


def _headlines(metrics: Metrics, *, of: str) -> list[Headline]:
    shown = []
    if metrics.accuracy is not None and metrics.accuracy_low is not None and metrics.accuracy_high is not None:
        interval = f"{100 * metrics.accuracy_low:.2f} to {100 * metrics.accuracy_high:.2f} % (95 %, Wilson)"
        shown.append(Headline(label=f"{of} accuracy".strip(), value=f"{100 * metrics.accuracy:.2f} %", note=interval))
    optional = (
        ("macro F1", metrics.macro_f1, "mean over the classes"),
        ("log loss", metrics.log_loss, "nats, lower is better"),
        ("ROC AUC", metrics.roc_auc, "one class against the rest"),
        ("calibration error", metrics.ece, "expected (ECE), 15 bins"),
    )
    shown += [
        Headline(label=name, value=f"{value:.4f}", note=note) for name, value, note in optional if value is not None
    ]
    return [*shown, _images(metrics)]


def _headlines_of_sets(metrics: MultiLabelMetrics) -> list[Headline]:
    optional = (
        ("mAP", metrics.mean_average_precision, "mean average precision of the classes"),
        ("micro F1", metrics.micro_f1, "of all pairs of image and class"),
        ("macro F1", metrics.macro_f1, "mean over the classes"),
        ("exact match", metrics.exact_match, "images with all classes right"),
        ("Hamming loss", metrics.hamming_loss, "wrong pairs of image and class"),
    )
    shown = [
        Headline(label=name, value=f"{value:.4f}", note=note) for name, value, note in optional if value is not None
    ]
    return [*shown, _images(metrics)]


def _images(metrics: Counts) -> Headline:
    not_ok = metrics.images - metrics.ok
    return Headline(label="images", value=f"{metrics.images:,}", note=f"{not_ok:,} not ok" if not_ok else "")


def _of_metrics(metrics: Metrics) -> list[Shown]:
    """The figures that need labels."""
    shown = []
    if metrics.confusion is not None:
        shown.append(
            Shown(
                name="confusion_matrix",
                title="Confusion matrix",
                alt=f"Confusion matrix of {len(metrics.classes)} classes; {metrics.confusion.trace():,} are correct",
                figure=figures.confusion_matrix(metrics.confusion, metrics.classes),
            )
        )
    if metrics.calibration is not None and metrics.ece is not None:
        calibration = metrics.calibration
        shown.append(
            Shown(
                name="reliability",
                title="Reliability",
                alt=f"Accuracy against confidence in 15 bins; expected calibration error {metrics.ece:.4f}",
                figure=figures.reliability(calibration.counts, calibration.confidences, calibration.hits),
                note="Bars above the line: the model is right more often than its confidence says.",
            )
        )
    return shown


def _of_predictions(metrics: Metrics | MultiLabelMetrics) -> list[Shown]:
    """The figures that need no labels."""
    shown = []
    if metrics.predicted is not None and metrics.classes:
        counts = {"predicted": metrics.predicted}
        if metrics.per_class:
            counts["truth"] = np.array([row.support for row in metrics.per_class])
        shown.append(
            Shown(
                name="class_distribution",
                title="Images of each class",
                alt="Bars: images by predicted class" + (" and by truth" if len(counts) > 1 else ""),
                figure=figures.class_distribution(counts, metrics.classes, stacked=False),
                wide=True,
            )
        )
    if isinstance(metrics, Metrics) and metrics.confidence_histogram is not None and metrics.calibration is None:
        shown.append(
            Shown(
                name="confidence",
                title="Confidence of the predictions",
                alt="Bars: images by confidence, from 0 to 1",
                figure=figures.confidence_histogram(metrics.confidence_histogram),
            )
        )
    return shown


def _pictures_file(name: str, title: str, examples: Sequence[Example]) -> Shown:
    pictures = [
        figures.Picture(
            pixels=image.pixels,
            caption=(
                image.predicted if image.confidence is None else f"{image.predicted} {100 * image.confidence:.0f} %"
            )
            + (f"\ntruth: {image.truth}" if image.truth not in (None, image.predicted) else ""),
        )
        for image in examples
        if image.pixels is not None
    ]
    return Shown(name=name, title=title, alt=title, figure=figures.pictures(pictures, title=title), on_page=False)


def _sample(picture: figures.Picture) -> Example:
    return Example(name=picture.name, predicted=picture.caption, confidence=None, pixels=picture.pixels)


def _tables(metrics: Metrics) -> list[Table]:
    tables = []
    if metrics.per_class:
        tables.append(Table(title="All metrics", columns=("", "value"), rows=_all_metrics(metrics)))
        worst = sorted(metrics.per_class, key=lambda row: (row.f1 is None, row.f1 or 0.0))
        rows = list(metrics.per_class) if len(worst) <= MAX_CLASSES else worst[:MAX_CLASSES]
        tables.append(
            Table(
                title="Per class",
                columns=("class", "images", "precision", "recall", "F1", "ROC AUC"),
                rows=[
                    (
                        row.name,
                        f"{row.support:,}",
                        *(_share(v) for v in (row.precision, row.recall, row.f1, row.roc_auc)),
                    )
                    for row in rows
                ],
                note="" if len(worst) <= MAX_CLASSES else f"The worst {MAX_CLASSES} of {len(worst)} classes.",
            )
        )
    tables += _statuses(metrics)
    if metrics.top_k:
        rows_of = [(f"{k}", f"{100 * share:.2f} %") for k, share in enumerate(metrics.top_k, start=1)]
        columns = ("k", "share of images")
        tables.append(Table(title="Truth among the k most probable classes", columns=columns, rows=rows_of))
    return tables


def _statuses(metrics: Counts) -> list[Table]:
    rows = [(status, f"{count:,}") for status, count in metrics.statuses.items()]
    return [Table(title="Rows by status", columns=("status", "images"), rows=rows)] if rows else []


def _tables_of_sets(metrics: MultiLabelMetrics) -> list[Table]:
    if not metrics.per_class:
        return _statuses(metrics)
    worst = sorted(metrics.per_class, key=lambda row: (row.f1 is None, row.f1 or 0.0))
    shown = list(metrics.per_class) if len(worst) <= MAX_CLASSES else worst[:MAX_CLASSES]
    note = "" if len(worst) <= MAX_CLASSES else f"The worst {MAX_CLASSES} of {len(worst)} classes. "
    columns = ("class", "images", "predicted", "threshold", "precision", "recall", "F1", "average precision")
    per_class = Table(
        title="Per class",
        columns=(*columns, "best threshold", "F1 with it"),
        rows=[_of_class(row) for row in shown],
        note=f"{note}The best thresholds have the highest F1 on these images; thresholds.csv is for score --threshold.",
    )
    return [per_class, *_statuses(metrics)]


def _of_class(row: LabelMetrics) -> tuple[str, ...]:
    counts = (f"{row.support:,}", f"{row.predicted:,}")
    measured = (row.threshold, row.precision, row.recall, row.f1, row.average_precision)
    return (row.name, *counts, *map(_share, (*measured, row.best_threshold, row.best_f1)))


def _all_metrics(metrics: Metrics) -> list[tuple[str, str]]:
    present = [row for row in metrics.per_class if row.support]
    precisions = [row.precision or 0.0 for row in present]
    recalls = [row.recall or 0.0 for row in present]
    rows = [
        ("accuracy", metrics.accuracy),
        ("balanced accuracy", metrics.balanced_accuracy),
        ("macro precision", sum(precisions) / len(precisions) if precisions else None),
        ("macro recall", sum(recalls) / len(recalls) if recalls else None),
        ("macro F1", metrics.macro_f1),
        ("weighted F1", metrics.weighted_f1),
        ("log loss, nats", metrics.log_loss),
        ("Brier score, 0 to 2", metrics.brier),
        ("ROC AUC, one against the rest", metrics.roc_auc),
        ("expected calibration error", metrics.ece),
    ]
    return [(name, f"{value:.4f}") for name, value in rows if value is not None]


def _compared(comparison: Comparison | None) -> list[Table]:
    if comparison is None:
        return []
    rows: list[tuple[str, str]] = [("images in both tables", f"{comparison.common:,}")]
    if comparison.first_scores is not None and comparison.second_scores is not None:
        for name, first, second in score_pairs(comparison.first_scores, comparison.second_scores):
            rows += [(f"{name} of the first", _share(first)), (f"{name} of the second", _share(second))]
    if comparison.agreement is not None:
        rows.append(("same prediction", f"{100 * comparison.agreement:.2f} %"))
    if comparison.mcnemar is not None:
        rows += [
            ("accuracy of the first", _share(comparison.first_accuracy)),
            ("accuracy of the second", _share(comparison.second_accuracy)),
            ("only the first is right", f"{comparison.first_right:,}"),
            ("only the second is right", f"{comparison.second_right:,}"),
            ("McNemar's test", f"p = {comparison.mcnemar.p_value:.3g} ({comparison.mcnemar.method})"),
        ]
    tables = [Table(title="Comparison", columns=("", "value"), rows=rows)]
    if comparison.moves:
        moves = [(move.first, move.second, f"{move.images:,}") for move in comparison.moves]
        tables.append(
            Table(title="Changed predictions by class", columns=("first table", "second table", "images"), rows=moves)
        )
    return tables


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
