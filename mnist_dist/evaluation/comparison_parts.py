"""The parts of a page that show two tables compared: names of their models, tables side by side, changed images.

Does not own: the comparison, its verdict (`verdict`), or the rendering (`report`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mnist_dist.evaluation.comparison import ClassMove, Comparison
from mnist_dist.evaluation.metric_parts import Pictures, share
from mnist_dist.evaluation.metrics import wilson_interval
from mnist_dist.evaluation.report import Cell, Example, Filter, Gallery, Headline, Table, class_filter
from mnist_dist.evaluation.set_codes import score_pairs
from mnist_dist.evaluation.verdict import percent
from mnist_dist.models.bundle import BundleInfo
from mnist_dist.scoring.generations import Summary
from mnist_dist.sources.label_sets import NO_CLASS

MAX_MOVES = 15
"""Pairs of classes in the table of changed predictions."""
_BUNDLE = "bundle"  # The folder of a run's bundle, which does not tell runs apart.


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One of two compared tables, with what is known of its origin."""

    uri: str
    model_id: str
    summary: Summary | None = None
    bundle: BundleInfo | None = None


def model_names(first: Compared, second: Compared) -> tuple[str, str]:
    """Names for the models of two tables: the first of these that tell them apart.

    The run or folder of the bundle; the same with the backbone; the folder of the table; its whole URI.
    """
    ways = zip(_names(first), _names(second), strict=True)
    return next((pair for pair in ways if all(pair) and pair[0] != pair[1]), (first.uri, second.uri))


def _names(table: Compared) -> Iterator[str]:
    run = run_of(table.summary.described.bundle) if table.summary is not None else ""
    yield run
    yield f"{run} ({table.bundle.backbone})" if table.bundle is not None else ""
    yield table.uri.rstrip("/").rpartition("/")[2]


def run_of(bundle: str) -> str:
    """The folder of a bundle, or the run that it lies in."""
    folders = [part for part in bundle.rstrip("/").split("/") if part]
    while len(folders) > 1 and folders[-1] == _BUNDLE:
        folders.pop()
    return folders[-1] if folders else ""


def compared_headlines(comparison: Comparison, names: tuple[str, str]) -> list[Headline]:
    """How good each model is on the images of both tables, and how far they agree."""
    shown = []
    what = "accuracy" if comparison.first_scores is None else "exact match"
    values = (comparison.first_accuracy, comparison.second_accuracy)
    for name, value in zip(names, values, strict=True):
        if value is not None:
            shown.append(Headline(label=name, value=f"{100 * value:.2f} %", note=what))
    if comparison.first_accuracy is not None and comparison.second_accuracy is not None:
        points = 100 * (comparison.second_accuracy - comparison.first_accuracy)
        note = f"percentage points, {names[1]} minus {names[0]}"
        shown.append(Headline(label="difference", value=f"{points:+.2f}", note=note))
    if comparison.agreement is not None:
        shown.append(Headline(label="same prediction", value=f"{100 * comparison.agreement:.2f} %"))
    return [*shown, Headline(label="images in both", value=f"{comparison.common:,}")]


def compared_tables(comparison: Comparison, first: Compared, second: Compared, names: tuple[str, str]) -> list[Table]:
    """Both models side by side, then by class, then which predictions changed."""
    rows = [row for row in _side_by_side(comparison, first, second) if any(row[1:])]
    tables = [Table(title="Side by side", columns=("", *names), rows=rows, note=_note(comparison, names), wide=True)]
    if comparison.by_class:
        tables.append(_by_class(comparison, names))
    if comparison.moves:
        moves = [_move(move, is_filter=not comparison.multi_label) for move in comparison.moves[:MAX_MOVES]]
        more = len(comparison.moves) > MAX_MOVES
        tables.append(
            Table(
                title="Changed predictions",
                columns=(" → ".join(names), "images"),
                rows=moves,
                note=f"The {MAX_MOVES} most frequent changes." if more else "",
            )
        )
    return tables


def _side_by_side(comparison: Comparison, first: Compared, second: Compared) -> Iterator[tuple[str, ...]]:
    count = comparison.known
    if count:
        hits = (comparison.both_right + comparison.first_right, comparison.both_right + comparison.second_right)
        yield ("accuracy" if comparison.first_scores is None else "exact match", *(percent(n, count) for n in hits))
        yield ("95 % interval", *(_interval(n, count) for n in hits))
        yield "only this one is right", f"{comparison.first_right:,}", f"{comparison.second_right:,}"
    if comparison.first_scores is not None and comparison.second_scores is not None:
        for name, one, other in score_pairs(comparison.first_scores, comparison.second_scores):
            if name != "exact match":  # It is the first row.
                yield name, share(one), share(other)
    counts = {
        "images only in this table": (comparison.only_in_first, comparison.only_in_second),
        "prediction only in this table": (comparison.only_first_ok, comparison.only_second_ok),
    }
    yield from ((name, *(f"{count:,}" for count in pair)) for name, pair in counts.items() if any(pair))
    yield "backbone", *(one.bundle.backbone if one.bundle is not None else "" for one in (first, second))
    yield "engine", *(one.summary.engine or "" if one.summary is not None else "" for one in (first, second))
    yield "model id", *(one.model_id[:12] for one in (first, second))


def _interval(hits: int, count: int) -> str:
    low, high = wilson_interval(hits, count)
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _note(comparison: Comparison, names: tuple[str, str]) -> str:
    if not comparison.known:
        return f"Over {comparison.compared:,} images with a prediction of both."
    parts = [
        f"Over {comparison.known:,} images with a label and a prediction of both: {comparison.both_right:,} right in "
        f"both, {comparison.first_right:,} only by {names[0]}, {comparison.second_right:,} only by {names[1]}, "
        f"{comparison.both_wrong:,} wrong in both."
    ]
    if comparison.mcnemar is not None:
        parts.append(f"McNemar's test ({comparison.mcnemar.method}): p = {comparison.mcnemar.p_value:.3g}.")
    return " ".join(parts)


def _by_class(comparison: Comparison, names: tuple[str, str]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for row in comparison.by_class:
        recalls = [f"{100 * hits / row.images:.1f} %" for hits in (row.first_right, row.second_right)]
        change = f"{row.second_right - row.first_right:+,}"
        rows.append((class_filter(row.name), f"{row.images:,}", *recalls, change))
    columns = ("class", "images", *names, "change")
    note = (
        "Share of the images of each class that each model predicts correctly, and how many more images "
        f"{names[1]} predicts correctly than {names[0]}."
    )
    return Table(title="Classes of both", columns=columns, rows=rows, note=note, sortable=True)


def _move(move: ClassMove, *, is_filter: bool) -> tuple[Cell, ...]:
    text, images = f"{move.first} → {move.second}", f"{move.images:,}"
    if not is_filter:  # By sets of classes, images are not filtered.
        return text, images
    wanted = {"predicted": move.first, "second": move.second}
    label = f"prediction {move.first}, then {move.second}"
    return Filter(text=text, wanted=wanted, label=label, images=move.images), images


def changed(comparison: Comparison, pictures: Pictures, names: tuple[str, str]) -> Gallery:
    """The images that the two models classify differently."""
    moved = round((1 - (comparison.agreement or 0.0)) * comparison.compared)
    shown = [
        Example(
            name=image.uri,
            predicted=_classes(image.first),
            confidence=image.first_confidence,
            second=_classes(image.second),
            second_confidence=image.second_confidence,
            truth=None if image.truth is None else _classes(image.truth),
            pixels=pictures(image.uri),
        )
        for image in comparison.moved
    ]
    which = "All of them" if len(shown) == moved else f"{len(shown):,} of {moved:,}"
    return Gallery(
        title="Predicted differently",
        examples=shown,
        note=f"{which}, first those that both models are sure of.",
        models=names,
    )


def _classes(name: str) -> tuple[str, ...]:
    return () if name == NO_CLASS else (name,)
