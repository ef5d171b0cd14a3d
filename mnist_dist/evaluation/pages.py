"""What stands on the page of a bundle and on that of an evaluated table, from the numbers that are known of them."""

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
from mnist_dist.evaluation.metrics import Metrics, classification_report
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
from mnist_dist.evaluation.tables import read_provenance
from mnist_dist.models.bundle import REPORT_FILE, BundleInfo
from mnist_dist.models.history import Epoch
from mnist_dist.scoring.generations import Summary
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

MAX_CLASSES = 200
"""Classes in the table of a page; the worst ones where there are more."""


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What a finished training is told by, beside its metrics."""

    name: str
    """Of the run."""
    command: str
    bundle: BundleInfo
    history: Sequence[Epoch]
    counts: Mapping[str, npt.NDArray[np.int64]]
    """Images of each class by split, `int64 [K]`."""
    samples: Sequence[figures.Picture]
    """Some training images."""
    predictions: Sequence[Example]
    """Some test images, as they come."""
    mistakes: Sequence[Example]
    hits: Sequence[Example]
    architecture: str
    """As Keras prints it."""
    parameters: int
    workers: int
    precision: str
    images_per_s: float | None
    seconds: float


def training_page(facts: TrainingFacts, metrics: Metrics) -> Page:
    """The page of a bundle; `metrics` are of the test images."""
    report, bundle = classification_report(metrics), facts.bundle
    shown = [
        Shown(
            name="training_curves",
            title="Training curves",
            alt=f"Loss and accuracy of training and validation over {len(facts.history)} epochs",
            figure=figures.training_curves(facts.history),
            note="A dotted line marks a new phase. Training: means over an epoch, with dropout and augmentation.",
        ),
        *_of_metrics(metrics),
        Shown(
            name="class_distribution",
            title="Images of each class",
            alt="Bars: images of each class in the training, validation and test split",
            figure=figures.class_distribution(facts.counts, metrics.classes),
        ),
        _pictures_file("prediction_examples", "Predictions for test images", facts.predictions),
        _pictures_file("misclassified_samples", "Most confident mistakes", facts.mistakes),
    ]
    speed = f"{facts.images_per_s:,.0f} images/s" if facts.images_per_s else "not measured"
    return Page(
        title=facts.name,
        subtitle=f"{bundle.backbone}, weights {bundle.weights}; {bundle.created_at}",
        headlines=[
            *_headlines(metrics, of="test"),
            Headline(label="parameters", value=f"{facts.parameters:,}"),
            Headline(
                label="training",
                value=speed,
                note=f"{facts.workers} worker(s), {facts.precision}, {facts.seconds:.0f} s",
            ),
        ],
        figures=shown,
        galleries=[
            Gallery(
                title="Most confident mistakes", examples=facts.mistakes, note="Of the test images, the worst first."
            ),
            Gallery(title="Least confident hits", examples=facts.hits, note="Right, but barely."),
            Gallery(title="Samples of the training images", examples=[_sample(one) for one in facts.samples]),
        ],
        tables=_tables(metrics),
        facts=[
            ("command", facts.command),
            ("data fingerprint", bundle.data_fingerprint),
            ("validation", f"accuracy {bundle.validation['accuracy']:.4f}, loss {bundle.validation['loss']:.4f}"),
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
    """Writes the page of an evaluation and its figures into its output; gives the page's URI."""
    page = evaluation_page(evaluation)
    with tempfile.TemporaryDirectory() as scratch:
        write_page(page, Path(scratch))
        for path in sorted(Path(scratch).rglob("*"), key=lambda path: path.name == REPORT_FILE):  # the page last
            if path.is_file():
                uri = join(evaluation.output, path.relative_to(scratch).as_posix())
                ANYWHERE.write_bytes(uri, path.read_bytes())
    return join(evaluation.output, REPORT_FILE)


def evaluation_page(evaluation: Evaluation) -> Page:
    """The page of an evaluated table; pictures are read again where they still lie."""
    metrics, table = evaluation.metrics, evaluation.table
    moved = evaluation.comparison.moved if evaluation.comparison else ()
    uris = [one.uri for one in (*metrics.mistakes, *metrics.doubtful_hits)] + [one.uri for one in moved]
    pixels = load_pictures(uris)
    mistakes, hits = (
        [
            Example(
                name=one.uri,
                predicted=one.predicted,
                confidence=one.confidence,
                truth=one.truth,
                pixels=pixels[one.uri],
            )
            for one in some
        ]
        for some in (metrics.mistakes, metrics.doubtful_hits)
    )
    shown = [*_of_metrics(metrics), *_of_predictions(metrics)]
    if mistakes:
        shown.append(_pictures_file("misclassified_samples", "Most confident mistakes", mistakes))
    galleries = []
    if metrics.accuracy is not None:
        galleries = [
            Gallery(title="Most confident mistakes", examples=mistakes, note="The worst first."),
            Gallery(title="Least confident hits", examples=hits, note="Right, but barely."),
        ]
    if evaluation.comparison is not None:
        galleries.append(
            Gallery(
                title="Images that the two models see differently",
                examples=[
                    Example(
                        name=one.uri,
                        predicted=one.first,
                        second=one.second,
                        confidence=one.second_confidence,
                        truth=one.truth,
                        pixels=pixels[one.uri],
                    )
                    for one in moved
                ],
                note="First table → second table, with the confidence of the second.",
            )
        )
    summary, bundle = read_provenance(table.uri)
    texts = {"classification report": evaluation.classification_report} if evaluation.classification_report else {}
    for title, values in (
        ("settings of the scoring", summary and summary.settings),
        ("configuration", bundle and bundle.config),
    ):
        texts |= {title: json.dumps(values, indent=2)} if values else {}
    return Page(
        title=f"Evaluation of {table.uri.rstrip('/').rpartition('/')[2]}",
        subtitle=table.uri,
        headlines=_headlines(metrics, of=""),
        warnings=evaluation.notes,
        figures=shown,
        galleries=galleries,
        tables=[*_tables(metrics), *_compared(evaluation.comparison)],
        facts=[
            ("command", command_line()),
            ("model", table.model_id),
            ("truth", evaluation.truth or "none was given or found"),
            *_of_provenance(summary, bundle),
        ],
        texts=texts,
        files={"classification_report.txt": evaluation.classification_report}
        if evaluation.classification_report
        else {},
    )


def _of_provenance(summary: Summary | None, bundle: BundleInfo | None) -> list[tuple[str, str]]:
    """How the table came to be, as far as that is still known."""
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
            ("weights", bundle.weights),
            ("data fingerprint of the training", bundle.data_fingerprint),
            *((f"version of {name}", version) for name, version in bundle.versions.items()),
        ]
    return [(name, str(value)) for name, value in facts if value is not None]


# --- what both pages show --------------------------------------------------------------------------------------------


def _headlines(metrics: Metrics, *, of: str) -> list[Headline]:
    shown = []
    if metrics.accuracy is not None and metrics.accuracy_low is not None and metrics.accuracy_high is not None:
        interval = f"{100 * metrics.accuracy_low:.2f} to {100 * metrics.accuracy_high:.2f} % (95 %, Wilson)"
        shown.append(Headline(label=f"{of} accuracy".strip(), value=f"{100 * metrics.accuracy:.2f} %", note=interval))
    optional = (
        ("macro F1", metrics.macro_f1, "mean over the classes"),
        ("log loss", metrics.log_loss, "nats, less is better"),
        ("ROC AUC", metrics.roc_auc, "one class against the rest"),
        ("calibration error", metrics.ece, "expected, 15 bins"),
    )
    shown += [
        Headline(label=name, value=f"{value:.4f}", note=note) for name, value, note in optional if value is not None
    ]
    not_ok = metrics.images - metrics.ok
    shown.append(Headline(label="images", value=f"{metrics.images:,}", note=f"{not_ok:,} not ok" if not_ok else ""))
    return shown


def _of_metrics(metrics: Metrics) -> list[Shown]:
    """The figures that need a truth."""
    shown = []
    if metrics.confusion is not None:
        shown.append(
            Shown(
                name="confusion_matrix",
                title="Confusion matrix",
                alt=f"Confusion matrix of {len(metrics.classes)} classes; {metrics.confusion.trace():,} are right",
                figure=figures.confusion_matrix(metrics.confusion, metrics.classes),
            )
        )
    if metrics.calibration is not None and metrics.ece is not None:
        found = metrics.calibration
        shown.append(
            Shown(
                name="reliability",
                title="Reliability",
                alt=f"Accuracy against confidence in 15 bins; expected calibration error {metrics.ece:.4f}",
                figure=figures.reliability(found.counts, found.confidences, found.hits),
                note="Bars above the line: more often right than the model thinks.",
            )
        )
    return shown


def _of_predictions(metrics: Metrics) -> list[Shown]:
    """The figures that need no truth."""
    shown = []
    if metrics.predicted is not None and metrics.classes:
        counts = {"predicted": metrics.predicted}
        if metrics.per_class:
            counts["truth"] = np.array([one.support for one in metrics.per_class])
        shown.append(
            Shown(
                name="class_distribution",
                title="Images of each class",
                alt="Bars: images by predicted class" + (" and by truth" if len(counts) > 1 else ""),
                figure=figures.class_distribution(counts, metrics.classes, stacked=False),
            )
        )
    if metrics.confidence_histogram is not None and metrics.calibration is None:
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
            pixels=one.pixels,
            caption=(one.predicted if one.confidence is None else f"{one.predicted} {100 * one.confidence:.0f} %")
            + (f"\ntruth: {one.truth}" if one.truth not in (None, one.predicted) else ""),
        )
        for one in examples
        if one.pixels is not None
    ]
    return Shown(name=name, title=title, alt=title, figure=figures.pictures(pictures, title=title), on_page=False)


def _sample(one: figures.Picture) -> Example:
    return Example(name=one.name, predicted=one.caption, confidence=None, pixels=one.pixels)


def _tables(metrics: Metrics) -> list[Table]:
    tables = []
    if metrics.per_class:
        tables.append(Table(title="All metrics", columns=("", "value"), rows=_all_metrics(metrics)))
        worst = sorted(metrics.per_class, key=lambda one: (one.f1 is None, one.f1 or 0.0))
        rows = list(metrics.per_class) if len(worst) <= MAX_CLASSES else worst[:MAX_CLASSES]
        tables.append(
            Table(
                title="Per class",
                columns=("class", "images", "precision", "recall", "F1", "ROC AUC"),
                rows=[
                    (
                        one.name,
                        f"{one.support:,}",
                        *(_share(v) for v in (one.precision, one.recall, one.f1, one.roc_auc)),
                    )
                    for one in rows
                ],
                note="" if len(worst) <= MAX_CLASSES else f"The {MAX_CLASSES} worst of {len(worst)} classes.",
            )
        )
    if metrics.statuses:
        rows_of = [(status, f"{count:,}") for status, count in metrics.statuses.items()]
        tables.append(Table(title="Rows by status", columns=("status", "images"), rows=rows_of))
    if metrics.top_k:
        rows_of = [(f"{k}", f"{100 * share:.2f} %") for k, share in enumerate(metrics.top_k, start=1)]
        columns = ("k", "share of images")
        tables.append(Table(title="Truth among the k most probable classes", columns=columns, rows=rows_of))
    return tables


def _all_metrics(metrics: Metrics) -> list[tuple[str, str]]:
    present = [one for one in metrics.per_class if one.support]
    precisions = [one.precision or 0.0 for one in present]
    recalls = [one.recall or 0.0 for one in present]
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
    if comparison.agreement is not None:
        rows.append(("same class", f"{100 * comparison.agreement:.2f} %"))
    if comparison.mcnemar is not None:
        rows += [
            ("accuracy of the first", _share(comparison.first_accuracy)),
            ("accuracy of the second", _share(comparison.second_accuracy)),
            ("first alone is right", f"{comparison.first_right:,}"),
            ("second alone is right", f"{comparison.second_right:,}"),
            ("McNemar's test", f"p = {comparison.mcnemar.p_value:.3g} ({comparison.mcnemar.method})"),
        ]
    tables = [Table(title="Comparison", columns=("", "value"), rows=rows)]
    if comparison.moves:
        moves = [(one.first, one.second, f"{one.images:,}") for one in comparison.moves]
        tables.append(Table(title="Which classes moved", columns=("first table", "second table", "images"), rows=moves))
    return tables


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
