"""Builds the report pages of a bundle and of an evaluated table.

Does not own: the metrics, or the rendering (`report`).
"""

# n = images, K = classes

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnist_dist.console import command_line
from mnist_dist.evaluation import figures
from mnist_dist.evaluation.comparison import Comparison
from mnist_dist.evaluation.comparison_parts import (
    Compared,
    changed,
    compared_headlines,
    compared_tables,
    model_names,
)
from mnist_dist.evaluation.evaluate import Evaluation, models_note, unpredicted_note
from mnist_dist.evaluation.metric_parts import (
    Pictures,
    examples,
    figures_of_predictions,
    figures_with_truth,
    galleries,
    headlines,
    matrix,
    pictures_file,
    shown_images,
    tables,
)
from mnist_dist.evaluation.metrics import Metrics, classification_report
from mnist_dist.evaluation.multi_label import MultiLabelMetrics
from mnist_dist.evaluation.pictures import load_pictures
from mnist_dist.evaluation.report import Example, Gallery, Headline, Page, Shown, Table, write_page
from mnist_dist.evaluation.tables import read_provenance
from mnist_dist.evaluation.verdict import verdict, verdict_of_comparison
from mnist_dist.models.bundle import REPORT_FILE, BundleInfo
from mnist_dist.models.history import Epoch
from mnist_dist.models.layers import Layer, layers_text
from mnist_dist.scoring.generations import Summary
from mnist_dist.store.anywhere import ANYWHERE, store_for
from mnist_dist.store.uris import join


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
    samples: Sequence[Example]
    """A sample of the training images, without predictions."""
    predictions: Sequence[Example]
    """A sample of the test images, unselected."""
    pictures: Pictures
    """Of the test images."""
    layers: Sequence[Layer]
    parameters: int
    workers: int
    precision: str
    images_per_s: float | None
    seconds: float


def training_page(facts: TrainingFacts, metrics: Metrics | MultiLabelMetrics) -> Page:
    """Builds the page of a bundle; `metrics` are those of the test images."""
    report = classification_report(metrics) if isinstance(metrics, Metrics) else None
    bundle = facts.bundle
    architecture = layers_text(facts.layers)
    speed = f"{facts.images_per_s:,.0f} images/s" if facts.images_per_s else "not measured"
    return Page(
        kind="Training report",
        title=facts.name,
        subtitle=f"{bundle.backbone}, weights {bundle.weights}; {_minute(bundle.created_at)}",
        verdict=verdict(metrics, of="test"),
        headlines=[
            *headlines(metrics, of="test"),
            Headline(label="parameters", value=f"{facts.parameters:,}"),
            Headline(
                label="training",
                value=speed,
                note=f"{facts.workers} worker(s), {facts.precision}, {facts.seconds:.0f} s",
            ),
        ],
        matrix=matrix(metrics),
        figures=_training_figures(facts, metrics),
        tables=tables(metrics),
        details=[_architecture(facts.layers)],
        facts=[
            ("command", facts.command),
            ("data fingerprint", bundle.data_fingerprint),
            ("validation", ", ".join(f"{name} {value:.4f}" for name, value in bundle.validation.items())),
            *((f"version of {name}", version) for name, version in bundle.versions.items()),
        ],
        texts={
            "Configuration": json.dumps(bundle.config, indent=2),
            **({"Classification report": report} if report else {}),
        },
        files={
            "model_architecture.txt": architecture,
            **({"classification_report.txt": report} if report else {}),
        },
        galleries=[*galleries(metrics, facts.pictures), *_samples(facts.samples)],
    )


def _training_figures(facts: TrainingFacts, metrics: Metrics | MultiLabelMetrics) -> list[Shown]:
    return [
        *figures_with_truth(metrics),
        Shown(
            name="training_curves",
            title="Training curves",
            alt=f"Loss and accuracy of training and validation over {len(facts.history)} epochs",
            figure=figures.training_curves(facts.history),
            wide=True,
            note="A dotted line marks a new phase. Training values: epoch means, with dropout and augmentation.",
        ),
        Shown(
            name="class_distribution",
            title="Images of each class",
            alt="Bars: images of each class in the training, validation and test split",
            figure=figures.class_distribution(facts.counts, metrics.classes),
            wide=True,
        ),
        pictures_file("prediction_examples", "Predictions for test images", facts.predictions),
        *_mistakes_file(metrics, facts.pictures),
    ]


def _mistakes_file(metrics: Metrics | MultiLabelMetrics, pictures: Pictures) -> list[Shown]:
    if isinstance(metrics, MultiLabelMetrics) or not metrics.mistakes:
        return []
    return [pictures_file("misclassified_samples", "Most confident mistakes", examples(metrics.mistakes, pictures))]


def _minute(time: str) -> str:
    """A time in ISO 8601 for people, such as `2030-01-02 03:04 UTC`."""
    date, _, rest = time.partition("T")
    return f"{date} {rest[:5]}{' UTC' if rest.endswith(('Z', '+00:00')) else ''}".strip()


def _architecture(layers: Sequence[Layer]) -> Table:
    total = sum(layer.parameters for layer in layers if layer.depth == 0)
    inside = "\N{NO-BREAK SPACE}" * 3
    return Table(
        title="Architecture",
        columns=("layer", "parameters", "output", "type"),  # On a phone, the last ones are scrolled to.
        rows=[(inside * one.depth + one.name, f"{one.parameters:,}", one.output, one.kind) for one in layers],
        note=f"{total:,} parameters. Indented layers are part of the one above them.",
        name="architecture",
    )


def _samples(samples: Sequence[Example]) -> list[Gallery]:
    note = "A random sample, as even over the classes as possible."
    return [Gallery(title="Training images", examples=samples, note=note, is_input=True)] if samples else []


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
    metrics, table, comparison = evaluation.metrics, evaluation.table, evaluation.comparison
    pictures = _pictures(evaluation)
    shown = [*figures_with_truth(metrics), *figures_of_predictions(metrics), *_mistakes_file(metrics, pictures)]
    summary, bundle = read_provenance(table.uri)
    report = evaluation.classification_report
    page = Page(
        kind="Evaluation",
        title=table.uri.rstrip("/").rpartition("/")[2],
        subtitle=table.uri,
        verdict=verdict(metrics),
        headlines=headlines(metrics),
        warnings=_warnings(evaluation),
        matrix=matrix(metrics),
        figures=shown,
        tables=tables(metrics),
        facts=[
            ("command", command_line()),
            ("model", table.model_id),
            ("truth", evaluation.truth or "no labels were given or found"),
            *_of_provenance(summary, bundle),
        ],
        texts=_texts(report, summary, bundle),
        files={"classification_report.txt": report} if report else {},
        galleries=galleries(metrics, pictures),
    )
    if comparison is None:
        return page
    first = Compared(uri=table.uri, model_id=table.model_id, summary=summary, bundle=bundle)
    return _with_comparison(page, comparison, first, pictures)


def _with_comparison(page: Page, comparison: Comparison, first: Compared, pictures: Pictures) -> Page:
    """The page of a table with the comparison before everything else."""
    summary, bundle = read_provenance(comparison.second)
    second = Compared(uri=comparison.second, model_id=comparison.second_model, summary=summary, bundle=bundle)
    names = model_names(first, second)
    differing = changed(comparison, pictures, names)
    return replace(
        page,
        kind="Comparison",
        title=f"{names[0]} and {names[1]}",
        subtitle=f"{first.uri} and {second.uri}",
        verdict=verdict_of_comparison(comparison, *names),
        headlines=compared_headlines(comparison, names),
        leading=compared_tables(comparison, first, second, names),
        heading=f"{names[0]} on its own",
        heading_verdict=page.verdict,
        heading_headlines=page.headlines,
        galleries=[*([differing] if differing.examples else []), *page.galleries],
    )


def _warnings(evaluation: Evaluation) -> list[str]:
    """The notes, without those that the page says in other places."""
    said = {unpredicted_note(evaluation.metrics)}
    if evaluation.comparison is not None:
        said.add(models_note(evaluation.comparison))
    return [note for note in evaluation.notes if note not in said]


def _pictures(evaluation: Evaluation) -> Pictures:
    moved = evaluation.comparison.moved if evaluation.comparison else ()
    uris = [*shown_images(evaluation.metrics), *(image.uri for image in moved)]
    return load_pictures(uris, store=store_for(evaluation.job.store)).get


def _texts(report: str | None, summary: Summary | None, bundle: BundleInfo | None) -> dict[str, str]:
    """The longer texts of an evaluation's page, as far as there are any."""
    settings = {"Scoring settings": summary and summary.settings, "Configuration": bundle and bundle.config}
    texts = {title: json.dumps(values, indent=2) for title, values in settings.items() if values}
    return ({"Classification report": report} if report else {}) | texts


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
