"""The parts of a page that show metrics: headlines, figures, tables and galleries.

Does not own: the metrics, which parts a page has (`pages`), or the rendering (`report`).
"""

# K = classes

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from mnist_dist.evaluation import figures
from mnist_dist.evaluation.metrics import BARELY_RIGHT, MIN_CERTAIN, ClassMetrics, Counts, Metrics
from mnist_dist.evaluation.metrics import Example as Scored
from mnist_dist.evaluation.multi_label import LabelMetrics, MultiLabelMetrics
from mnist_dist.evaluation.report import (
    Cell,
    Example,
    Filter,
    Gallery,
    Headline,
    Matrix,
    Shown,
    Table,
    class_filter,
    confusion_filter,
)
from mnist_dist.evaluation.verdict import percent
from mnist_dist.images.pixels import Pixels
from mnist_dist.sources.label_sets import joined

MAX_CLASSES = 200
"""Most classes in the table of a page; with more classes, the worst ones are shown."""
MAX_CELLS_CLASSES = 25
"""With up to this many classes, the confusion matrix is a table whose cells can be clicked; else it is a picture."""
NARROW_CLASSES = 12
"""With more classes, the confusion matrix takes the whole width of the page, and so does what would stand beside it."""
MAX_CONFUSIONS = 12
"""Pairs of classes in the table of the most frequent confusions; with a picture of the matrix, four times as many."""

Row = TypeVar("Row", ClassMetrics, LabelMetrics)
Pictures = Callable[[str], Pixels | None]
"""Gives the picture of an image by its URI; None: it cannot be read."""


# --- headlines -------------------------------------------------------------------------------------------------------


def headlines(metrics: Metrics | MultiLabelMetrics, *, of: str = "") -> list[Headline]:
    """The numbers at the top; `of` stands before "accuracy", such as `test`."""
    shown = [] if isinstance(metrics, MultiLabelMetrics) else _accuracy(metrics, of)
    values = _of_sets(metrics) if isinstance(metrics, MultiLabelMetrics) else _of_classes(metrics)
    shown += [
        Headline(label=name, value=f"{value:.4f}", note=note) for name, value, note in values if value is not None
    ]
    not_ok = metrics.images - metrics.ok
    note = f"{not_ok:,} without a prediction" if not_ok else ""
    return [*shown, Headline(label="images", value=f"{metrics.images:,}", note=note)]


def _accuracy(metrics: Metrics, of: str) -> list[Headline]:
    if metrics.accuracy is None or metrics.accuracy_low is None or metrics.accuracy_high is None:
        return []
    interval = f"{100 * metrics.accuracy_low:.2f} to {100 * metrics.accuracy_high:.2f} % (95 %, Wilson)"
    return [Headline(label=f"{of} accuracy".strip(), value=f"{100 * metrics.accuracy:.2f} %", note=interval)]


def _of_classes(metrics: Metrics) -> list[tuple[str, float | None, str]]:
    return [
        ("macro F1", metrics.macro_f1, "mean over the classes"),
        ("log loss", metrics.log_loss, "nats, lower is better"),
        ("ROC AUC", metrics.roc_auc, "one class against the rest"),
        ("calibration error", metrics.ece, "expected (ECE), 15 bins"),
    ]


def _of_sets(metrics: MultiLabelMetrics) -> list[tuple[str, float | None, str]]:
    return [
        ("mAP", metrics.mean_average_precision, "mean average precision of the classes"),
        ("micro F1", metrics.micro_f1, "of all pairs of image and class"),
        ("macro F1", metrics.macro_f1, "mean over the classes"),
        ("exact match", metrics.exact_match, "images with all classes right"),
        ("Hamming loss", metrics.hamming_loss, "wrong pairs of image and class"),
    ]


# --- figures ---------------------------------------------------------------------------------------------------------


def matrix(metrics: Metrics | MultiLabelMetrics) -> Matrix | None:
    """The confusion matrix with cells to click; None without labels, with too many classes, or with sets of classes."""
    if isinstance(metrics, MultiLabelMetrics) or metrics.confusion is None or len(metrics.classes) > MAX_CELLS_CLASSES:
        return None
    wide = len(metrics.classes) > NARROW_CLASSES
    return Matrix(classes=metrics.classes, counts=metrics.confusion, wide=wide)


def figures_with_truth(metrics: Metrics | MultiLabelMetrics) -> list[Shown]:
    """The figures that need labels; there is none of multi-label tables."""
    if isinstance(metrics, MultiLabelMetrics):
        return []
    shown = []
    if metrics.confusion is not None:
        shown.append(
            Shown(
                name="confusion_matrix",
                title="Confusion matrix",
                alt=f"Confusion matrix of {len(metrics.classes)} classes; {metrics.confusion.trace():,} are correct",
                figure=figures.confusion_matrix(metrics.confusion, metrics.classes),
                on_page=len(metrics.classes) > MAX_CELLS_CLASSES,
                wide=True,
                note="Blue: right, by the share of the row. Orange: wrong, by its square root, so that rare mistakes "
                "are seen. The table of confusions leads to their images.",
            )
        )
    if metrics.calibration is not None and metrics.ece is not None:
        calibration, wide = metrics.calibration, len(metrics.classes) > NARROW_CLASSES
        drawn = figures.reliability(calibration.counts, calibration.confidences, calibration.hits, wide=wide)
        shown.append(
            Shown(
                name="reliability",
                title="Reliability",
                alt=f"Accuracy against confidence in 15 bins; expected calibration error {metrics.ece:.4f}",
                figure=drawn,
                wide=wide,
                note="Bars above the line: the model is right more often than its confidence says.",
            )
        )
    return shown


def figures_of_predictions(metrics: Metrics | MultiLabelMetrics) -> list[Shown]:
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
                wide=True,
            )
        )
    return shown


def pictures_file(name: str, title: str, examples: Sequence[Example]) -> Shown:
    """A file with pictures, which is not on the page."""
    shown = [
        figures.Picture(pixels=image.pixels, caption=_caption(image)) for image in examples if image.pixels is not None
    ]
    return Shown(name=name, title=title, alt=title, figure=figures.pictures(shown, title=title), on_page=False)


def _caption(image: Example) -> str:
    predicted = joined(image.predicted)
    line = predicted if image.confidence is None else f"{predicted} {100 * image.confidence:.0f} %"
    return line if image.truth in (None, image.predicted) else f"{line}\ntruth: {joined(image.truth or ())}"


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(metrics: Metrics | MultiLabelMetrics) -> list[Table]:
    """The tables of a page: confusions, classes, statuses, all metrics."""
    if isinstance(metrics, MultiLabelMetrics):
        per_class = [_per_class_of_sets(metrics)] if metrics.per_class else []
        return [*per_class, *statuses(metrics)]
    shown = [_per_class(metrics)] if metrics.per_class else []
    shown += _confusions(metrics)
    if metrics.per_class:
        shown.append(Table(title="All metrics", columns=("metric", "value"), rows=_all_metrics(metrics)))
    return [*shown, *statuses(metrics)]


def statuses(metrics: Counts) -> list[Table]:
    """The rows by status, if any is not ok."""
    if metrics.images == metrics.ok:
        return []
    rows: list[tuple[Cell, ...]] = []
    for status, count in metrics.statuses.items():
        link = Filter(text=status, wanted={"status": status}, label=f"status {status}", images=count)
        rows.append((status if status == "ok" else link, f"{count:,}"))
    return [Table(title="Rows by status", columns=("status", "images"), rows=rows)]


def share(value: float | None) -> str:
    """A metric between 0 and 1 in a table; empty if it is undefined."""
    return "" if value is None else f"{value:.4f}"


def _confusions(metrics: Metrics) -> list[Table]:
    if metrics.confusion is None:
        return []
    wrong = metrics.confusion - np.diag(metrics.confusion.diagonal())
    pairs = np.argsort(-wrong, axis=None, kind="stable")[: int((wrong > 0).sum())]
    if not len(pairs):
        return []
    limit = MAX_CONFUSIONS if len(metrics.classes) <= MAX_CELLS_CLASSES else 4 * MAX_CONFUSIONS
    rows: list[tuple[Cell, ...]] = []
    for truth, predicted in zip(*np.unravel_index(pairs[:limit], wrong.shape), strict=True):
        images, of_class = int(wrong[truth, predicted]), int(metrics.confusion[truth].sum())
        names = metrics.classes[truth], metrics.classes[predicted]
        link = confusion_filter(*names, images, text=" → ".join(names))
        rows.append((link, f"{images:,}", percent(images, of_class)))
    more = f"The most frequent {limit} of {len(pairs):,}. " if len(pairs) > limit else ""
    note = f"{more}The share is that of the images of the true class."
    columns = ("truth → prediction", "images", "share")
    return [Table(title="Confusions", columns=columns, rows=rows, note=note)]


def _worst(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """All classes in their order, or the worst of too many, with a sentence that says so."""
    if len(rows) <= MAX_CLASSES:
        return list(rows), ""
    worst = sorted(rows, key=lambda row: (row.f1 is None, row.f1 or 0.0))
    return worst[:MAX_CLASSES], f"The worst {MAX_CLASSES} of {len(rows):,} classes."


def _per_class(metrics: Metrics) -> Table:
    shown, note = _worst(metrics.per_class)
    return Table(
        title="Classes",
        columns=("class", "images", "predicted", "precision", "recall", "F1", "ROC AUC"),
        rows=[(*_begun(row), *map(share, (row.precision, row.recall, row.f1, row.roc_auc))) for row in shown],
        note=note,
        name="classes",
        sortable=True,
        wide=True,
    )


def _per_class_of_sets(metrics: MultiLabelMetrics) -> Table:
    shown, note = _worst(metrics.per_class)
    columns = ("class", "images", "predicted", "precision", "recall", "F1", "average precision")
    of_row = ("precision", "recall", "f1", "average_precision", "threshold", "best_threshold", "best_f1")
    return Table(
        title="Classes",
        columns=(*columns, "threshold", "best threshold", "F1 with it"),
        rows=[(*_begun(row), *(share(getattr(row, name)) for name in of_row)) for row in shown],
        note=f"{note} The best thresholds have the highest F1 on these images; an evaluation writes them to "
        "thresholds.csv, for score --threshold.".strip(),
        name="classes",
        sortable=True,
        wide=True,
    )


def _begun(row: ClassMetrics | LabelMetrics) -> tuple[Cell, str, str]:
    return class_filter(row.name), f"{row.support:,}", f"{row.predicted:,}"


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
        *(
            (f"truth among the first {k} classes", share)
            for k, share in enumerate(metrics.top_k or (), start=1)
            if k > 1
        ),
    ]
    return [(name, f"{value:.4f}") for name, value in rows if value is not None]


# --- galleries -------------------------------------------------------------------------------------------------------


def shown_images(metrics: Metrics | MultiLabelMetrics) -> list[str]:
    """The URIs of the images in the galleries that have a picture."""
    if isinstance(metrics, MultiLabelMetrics):
        return [one.uri for one in metrics.mistakes]
    return [one.uri for one in (*metrics.mistakes, *metrics.confused, *metrics.doubtful_hits)]


def galleries(metrics: Metrics | MultiLabelMetrics, pictures: Pictures) -> list[Gallery]:
    """The galleries of a page that have images: mistakes, what is barely right, what has no prediction."""
    if isinstance(metrics, MultiLabelMetrics):
        shown = [_mistakes_of_sets(metrics, pictures)]
    else:
        shown = [_mistakes(metrics, pictures), _barely(metrics, pictures)]
    return [gallery for gallery in (*shown, _not_ok(metrics)) if gallery.examples]


def examples(scored: Sequence[Scored], pictures: Pictures) -> list[Example]:
    """Evaluated images with their pictures."""
    return [
        Example(
            name=one.uri,
            predicted=(one.predicted,),
            confidence=one.confidence,
            truth=(one.truth,),
            pixels=pictures(one.uri),
            rival=one.rival,
            rival_probability=one.rival_probability,
        )
        for one in scored
    ]


def _mistakes(metrics: Metrics, pictures: Pictures) -> Gallery:
    chosen = {one.uri: one for one in (*metrics.mistakes, *metrics.confused)}
    ranked = sorted(chosen.values(), key=lambda one: (-one.confidence, one.uri))
    wrong = _count_mistakes(metrics)
    which = "All mistakes" if wrong == len(ranked) else f"{len(ranked):,} of {wrong:,} mistakes, some of each confusion"
    return Gallery(
        title="Mistakes",
        examples=examples(ranked, pictures),
        note=f"{which}, the most confident first.",
    )


def _mistakes_of_sets(metrics: MultiLabelMetrics, pictures: Pictures) -> Gallery:
    shown = [
        Example(name=one.uri, predicted=one.predicted, truth=one.truth, pixels=pictures(one.uri))
        for one in metrics.mistakes
    ]
    wrong = metrics.evaluated - round((metrics.exact_match or 0.0) * metrics.evaluated)
    which = "All images" if wrong == len(shown) else f"{len(shown):,} of {wrong:,} images, some of each class,"
    note = f"{which} with at least one wrong class, those with the most wrong classes first."
    return Gallery(title="Mistakes", examples=shown, note=note, is_multi_label=True)


def _count_mistakes(metrics: Metrics) -> int:
    return 0 if metrics.confusion is None else int(metrics.confusion.sum() - metrics.confusion.trace())


def _barely(metrics: Metrics, pictures: Pictures) -> Gallery:
    has_rivals = all(one.rival is not None for one in metrics.doubtful_hits)
    rule = (
        f"the first probability is less than {100 * BARELY_RIGHT:.0f} percentage points above the second"
        if has_rivals
        else f"the confidence is below {100 * MIN_CERTAIN:.0f} %"
    )
    shown = examples(metrics.doubtful_hits, pictures)
    which = "" if len(shown) == metrics.barely_right else f"{len(shown):,} of {metrics.barely_right:,}. "
    return Gallery(
        title="Barely right", examples=shown, note=f"{which}Right, but {rule}. The least confident come first."
    )


def _not_ok(metrics: Counts) -> Gallery:
    count = metrics.images - metrics.ok
    shown = [Example(name=row.uri, status=row.status, error=row.error or "") for row in metrics.not_ok]
    which = "" if count == len(shown) else f"The first of each status, {len(shown):,} of {count:,}."
    return Gallery(title="Without a prediction", examples=shown, note=which)
