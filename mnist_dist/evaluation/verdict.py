"""Says in sentences what metrics mean: how sure the number is, what is weakest, what is confused, what it is all over.

Owns: the rules and the words. Does not own: the metrics, or the page that shows the sentences (`pages`).

The first sentence is the result. A sentence that has nothing to say is left out.
"""

# n = images, K = classes

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from mnist_dist.evaluation.comparison import Comparison
from mnist_dist.evaluation.metrics import ClassMetrics, Counts, Metrics, wilson_interval
from mnist_dist.evaluation.multi_label import LabelMetrics, MultiLabelMetrics

FEW_IMAGES = 30
"""With fewer images than this, the verdict says first of all that they are few."""
SIGNIFICANT = 0.05
"""McNemar's test: a difference with a p value below this is more than chance."""


def verdict(metrics: Metrics | MultiLabelMetrics, *, of: str = "") -> list[str]:
    """The verdict on a table.

    Args:
        metrics: of the table.
        of: a word before "images", such as `test`.
    """
    kind = f"{of} image".strip()
    if not metrics.evaluated:
        return [_without_truth(metrics, kind), *_not_evaluated(metrics)]
    said = _of_sets(metrics, kind) if isinstance(metrics, MultiLabelMetrics) else _of_classes(metrics, kind)
    return [*said, *_over(metrics)]


def _of_classes(metrics: Metrics, kind: str) -> Iterator[str]:
    """If each image has one class."""
    hits, count = round((metrics.accuracy or 0.0) * metrics.evaluated), metrics.evaluated
    yield _right(hits, count, kind)
    yield _how_sure(hits, count, what="accuracy")
    yield from _weakest(metrics)
    yield from _confused(metrics)
    yield from _confidence(metrics)


def _of_sets(metrics: MultiLabelMetrics, kind: str) -> Iterator[str]:
    """If an image may have several classes."""
    count, mean = metrics.evaluated, metrics.mean_average_precision
    hits = round((metrics.exact_match or 0.0) * count)
    yield _all_classes_right(hits, count, kind)
    yield _how_sure(hits, count, what="share of exactly right images")
    if mean is not None:
        yield f"The mean average precision of its classes (mAP) is {mean:.3f}, where 1 is perfect."
    yield from _weakest_of_sets(metrics)
    yield from _missed_and_added(metrics)


def verdict_of_comparison(comparison: Comparison, first: str, second: str) -> list[str]:
    """The verdict on two tables of the same images; `first` and `second` are the names of their models."""
    if not comparison.common:
        return [f"The tables of {first} and {second} have no image in common, so there is nothing to compare."]
    if not comparison.compared:
        return [f"No image has a prediction of both {first} and {second}, so there is nothing to compare."]
    if comparison.agreement == 1:
        agreed = f"{first} and {second} predict the same for {_all_of(comparison.compared, 'image')}."
    else:
        same = round((comparison.agreement or 0.0) * comparison.compared)
        images = counted(comparison.compared, "image")
        agreed = f"{first} and {second} predict the same for {percent(same, comparison.compared)} of {images}."
    if comparison.mcnemar is None:
        return [agreed, "There are no labels, so it is not known which of the two is better."]
    return [_better(comparison, first, second), _more_than_chance(comparison), agreed]


# --- which is better -------------------------------------------------------------------------------------------------


def _better(comparison: Comparison, first: str, second: str) -> str:
    count = comparison.known
    hits = {
        first: comparison.both_right + comparison.first_right,
        second: comparison.both_right + comparison.second_right,
    }
    better, worse = (first, second) if hits[first] >= hits[second] else (second, first)
    unit = "exactly right" if comparison.first_scores is not None else "right"
    if hits[first] == hits[second]:
        return (
            f"Neither is better: {first} and {second} are {unit} on {hits[first]:,} of {counted(count, 'image')} each."
        )
    points = 100 * (hits[better] - hits[worse]) / count
    return (
        f"{better} is better than {worse} by {_points(points)}: it is {unit} on {percent(hits[better], count)} of "
        f"{counted(count, 'image')}, {worse} on {percent(hits[worse], count)}."
    )


def _more_than_chance(comparison: Comparison) -> str:
    test, apart = comparison.mcnemar, comparison.first_right + comparison.second_right
    if test is None or not apart:
        return "They are right and wrong on the same images."
    more, less = sorted((comparison.first_right, comparison.second_right), reverse=True)
    on_one = f"on {counted(apart, 'image')} exactly one of them is right"
    p_value = "p < 0.001" if test.p_value < 0.001 else f"p = {test.p_value:.2g}"
    if more == less:
        return f"{on_one[0].upper()}{on_one[1:]}, each on {more:,}."
    split = f"{on_one}, the better one on {more:,}, the other on {less:,} (McNemar's test, {p_value})"
    if test.p_value < SIGNIFICANT:
        return f"That is more than chance: {split}."
    return f"That may be chance: {split}; more labelled images would tell."


# --- how good --------------------------------------------------------------------------------------------------------


def _right(hits: int, count: int, kind: str) -> str:
    if hits in (0, count):
        return f"The model is {'right' if hits else 'wrong'} on {_all_of(count, kind)}."
    return f"The model is right on {percent(hits, count)} of {counted(count, kind)}."


def _all_classes_right(hits: int, count: int, kind: str) -> str:
    if hits == count:
        return f"All classes of {_all_of(count, kind)} are right."
    if not hits:
        return f"At least one class is wrong on {_all_of(count, kind)}."
    return f"All classes are right on {percent(hits, count)} of {counted(count, kind)}."


def _how_sure(hits: int, count: int, *, what: str) -> str:
    low, high = wilson_interval(hits, count)
    if hits == count:
        interval = f"at least {100 * low:.1f} %"
    elif not hits:
        interval = f"at most {100 * high:.1f} %"
    else:
        interval = f"between {_percents(low, high)} %"
    sure = f"On other images like these, its {what} is {interval} (95 % confidence)"
    if count < FEW_IMAGES:
        return f"{counted(count, 'image')} {'is' if count == 1 else 'are'} too few to be sure of much. {sure}."
    return f"{sure}."


def _confidence(metrics: Metrics) -> Iterator[str]:
    """Whether the mean confidence is too high or too low: outside of the interval of the accuracy."""
    mean, low, high = metrics.mean_confidence, metrics.accuracy_low, metrics.accuracy_high
    if mean is None or low is None or high is None or low <= mean <= high or metrics.evaluated < FEW_IMAGES:
        return
    how = "high" if mean > high else "low"
    share = 100 * (metrics.accuracy or 0.0)
    yield f"Its confidence is too {how}: {100 * mean:.1f} % on average, where {share:.1f} % of the images are right."


# --- what is weakest -------------------------------------------------------------------------------------------------


def _weakest(metrics: Metrics) -> Iterator[str]:
    present = [row for row in metrics.per_class if row.support]
    if len(present) == 1:
        others = len(metrics.per_class) - 1
        rest = f"; nothing is known of the other {counted(others, 'class', 'classes')}" if others else ""
        yield f"All of these images are of one class, {quoted(present[0].name)}{rest}."
        return
    worst = min(present, key=lambda row: (row.recall or 0.0, -row.support))
    if worst.recall is not None and worst.recall < 1:
        yield f"The weakest class is {quoted(worst.name)}: {_found(worst)}{_others_as_weak(worst, present)}."
    absent = len(metrics.per_class) - len(present)
    if absent:
        has, of = "has" if absent == 1 else "have", len(metrics.per_class)
        yield f"{absent:,} of {of:,} classes {has} no labelled image, so nothing is known of {_them(absent)}."


def _found(row: ClassMetrics) -> str:
    hits = round((row.recall or 0.0) * row.support)
    if row.support == 1:
        return "its only image is taken for another class"
    if not hits:
        return f"none of its {row.support:,} images is recognised"
    are = "is" if hits == 1 else "are"
    return f"{hits:,} of its {row.support:,} images {are} recognised ({percent(hits, row.support)})"


def _others_as_weak(worst: ClassMetrics, present: list[ClassMetrics]) -> str:
    others = sum(row.recall == worst.recall for row in present) - 1
    if not others:
        return ""
    return f"; {counted(others, 'other class', 'other classes')} {'is' if others == 1 else 'are'} as weak"


def _weakest_of_sets(metrics: MultiLabelMetrics) -> Iterator[str]:
    present = [row for row in metrics.per_class if row.support and row.average_precision is not None]
    if len(present) > 1:
        worst = min(present, key=lambda row: (row.average_precision or 0.0, -row.support))
        if (worst.average_precision or 0.0) < 1:
            yield (
                f"The weakest class is {quoted(worst.name)}, with an average precision of "
                f"{worst.average_precision:.3f} over its {counted(worst.support, 'image')}."
            )
    absent = sum(not row.support for row in metrics.per_class)
    if absent:
        are, of = "is" if absent == 1 else "are", len(metrics.per_class)
        yield f"{absent:,} of {of:,} classes {are} on no labelled image, so little is known of {_them(absent)}."


# --- what is confused ------------------------------------------------------------------------------------------------


def _confused(metrics: Metrics) -> Iterator[str]:
    confusion = metrics.confusion
    if confusion is None:
        return
    wrong = confusion - np.diag(confusion.diagonal())
    mistakes = int(wrong.sum())
    if not mistakes:
        return
    truth, predicted = (int(place) for place in np.unravel_index(wrong.argmax(), wrong.shape))
    most, names = int(wrong[truth, predicted]), metrics.classes
    pair = f"{quoted(names[truth])} taken for {quoted(names[predicted])}"
    if mistakes == 1:
        yield f"Its only mistake is {pair}."
    elif most == 1:
        yield f"Its {mistakes:,} mistakes are all different: {_in_common(wrong, names)}."
    elif most == mistakes:
        yield f"All of its {mistakes:,} mistakes are {pair}."
    else:
        yield f"The most frequent confusion is {pair}: {most:,} of its {mistakes:,} mistakes."


def _in_common(wrong: npt.NDArray[np.int64], names: Sequence[str]) -> str:
    """What mistakes that are all of different pairs of classes have in common, if anything."""
    taken_for = wrong.sum(axis=0)
    most = int(taken_for.max())
    if most == 1:
        return "no two of them are taken for the same class"
    return (
        f"no pair of classes occurs twice, but {most:,} of them are taken for {quoted(names[int(taken_for.argmax())])}"
    )


def _missed_and_added(metrics: MultiLabelMetrics) -> Iterator[str]:
    missed = {row: row.support - _hits(row) for row in metrics.per_class}
    added = {row: row.predicted - _hits(row) for row in metrics.per_class}
    most_missed, most_added = (max(counts, key=lambda row: counts[row], default=None) for counts in (missed, added))
    if most_missed is not None and missed[most_missed]:
        of = counted(most_missed.support, "image")
        yield f"Most often missed is {quoted(most_missed.name)}: on {missed[most_missed]:,} of its {of}."
    if most_added is not None and added[most_added]:
        times = "time" if most_added.predicted == 1 else "times"
        yield (
            f"Most often predicted wrongly is {quoted(most_added.name)}: {added[most_added]:,} of the "
            f"{most_added.predicted:,} {times} that it is predicted."
        )


def _hits(row: LabelMetrics) -> int:
    return round((row.recall or 0.0) * row.support)


# --- what it is over -------------------------------------------------------------------------------------------------


def _without_truth(metrics: Counts, kind: str) -> str:
    if not metrics.images:
        return "The table has no images."
    if not metrics.ok:
        return f"None of {counted(metrics.images, kind)} has a prediction."
    predicted = f"{counted(metrics.ok, kind)} {'has' if metrics.ok == 1 else 'have'} a prediction"
    if metrics.labelled:
        return f"{predicted}, but none of them has a label that is a class, so it is not known how many are right."
    return f"{predicted}. There are no labels, so it is not known how many are right."


def _not_evaluated(metrics: Counts) -> Iterator[str]:
    if metrics.ok and metrics.images > metrics.ok:
        yield f"{_bad(metrics)}."


def _over(metrics: Counts) -> Iterator[str]:
    """What of the table the numbers are over; an image without a label and a prediction is counted in both parts."""
    left_out = []
    if missing := metrics.images - metrics.labelled:
        left_out.append(f"{missing:,} {'has' if missing == 1 else 'have'} no label")
    if metrics.unknown_labels:
        has = "has" if metrics.unknown_labels == 1 else "have"
        left_out.append(f"{metrics.unknown_labels:,} {has} a label that is no class")
    if metrics.images > metrics.ok:
        left_out.append(_bad(metrics, short=True))
    if not left_out:
        yield f"This page is over {counted(metrics.images, 'image')}, each with a label and a prediction."
        return
    yield (
        f"This page is over {counted(metrics.images, 'image')}. Its metrics are over {metrics.evaluated:,} of them: "
        f"{_listed(left_out)}."
    )


def _bad(metrics: Counts, *, short: bool = False) -> str:
    count = metrics.images - metrics.ok
    reasons = ", ".join(f"{number:,} {status}" for status, number in metrics.statuses.items() if status != "ok")
    who = f"{count:,}" if short else counted(count, "image")
    return f"{who} could not be predicted ({reasons})"


# --- words -----------------------------------------------------------------------------------------------------------


def percent(hits: int, count: int) -> str:
    """A share as percent, with one decimal, or as many as it takes to tell it from none and from all."""
    share = 100 * hits / count
    return f"{share:.{_decimals(share) if 0 < hits < count else 1}f} %"


def _percents(low: float, high: float) -> str:
    """The ends of an interval inside of 0 to 1, which are not rounded to these."""
    decimals = max(_decimals(100 * low), _decimals(100 * high))
    return f"{100 * low:.{decimals}f} and {100 * high:.{decimals}f}"


def _decimals(percents: float) -> int:
    """How many decimals tell a share from 0 and 100 %, at least one."""
    return next((n for n in range(1, 12) if 0 < float(f"{percents:.{n}f}") < 100), 1)


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun: `1 image`, `2,000 images`."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def quoted(name: str) -> str:
    """A class name as it stands in a sentence."""
    return f"“{name}”"


def _all_of(count: int, kind: str) -> str:
    return f"the only {kind}" if count == 1 else f"both {kind}s" if count == 2 else f"all {count:,} {kind}s"


def _points(points: float) -> str:
    rounded = f"{points:.1f}" if points >= 0.1 else f"{points:.2g}"
    return f"{rounded} percentage point{'' if rounded == '1.0' else 's'}"


def _them(count: int) -> str:
    return "it" if count == 1 else "them"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
