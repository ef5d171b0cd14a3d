"""The page of a search: which network won and how sure that is, all trials, what the settings did.

Owns: what the page shows, in words and numbers. Does not own: the leaderboard and the importances (`tuning`), the
figures (`search_figures`), or the frame of a page (`templates`).

A search that was stopped, or whose finalists or trials all failed, has a page of what there is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mnist_dist.console import duration
from mnist_dist.evaluation import search_figures
from mnist_dist.evaluation.figures import png, svg
from mnist_dist.evaluation.listing import Badge, Entry, Listing, Tone
from mnist_dist.evaluation.metrics import wilson_interval
from mnist_dist.evaluation.report import Headline, Link, Shown
from mnist_dist.evaluation.search_figures import TrialPoint
from mnist_dist.evaluation.templates import SORT_TABLES, render_page
from mnist_dist.models.history import Epoch
from mnist_dist.tuning.importance import Importance, importances
from mnist_dist.tuning.leaderboard import OF_SPACE_FILES, PARAMETERS
from mnist_dist.tuning.space import describe
from mnist_dist.tuning.trials import Trial, usable

FOLD_TABLES = "fold_tables.js"
MAX_PLOTS = 6
"""Settings with a plot of their own: those that explain most."""
NORMAL_95 = 1.96
FEW_TRIALS = 50
SETTINGS = ("image_size_px", "alpha", "pooling", *PARAMETERS, *OF_SPACE_FILES)


@dataclass(frozen=True, kw_only=True)
class FinalTest:
    """The result of the test: of the winner, or of what was combined in its place."""

    accuracy: float
    """0-1."""
    loss: float
    images: int


@dataclass(frozen=True, kw_only=True)
class SearchFacts:
    """What the page of a search is made of."""

    name: str
    uri: str
    recipe: str
    command: str
    planned: int
    """Trials that were asked for."""
    trials: Mapping[int, Trial]
    finalists: Mapping[int, Trial]
    leaderboard: pa.Table
    worked_s: float
    """How long drivers have worked on it."""
    validation_images: int = 0
    winner: int | None = None
    """None: there is none, since the search was stopped or failed."""
    tested: FinalTest | None = None
    combined: Mapping[str, Any] | None = None
    """What was combined of the finalists, as in the result; None: nothing was."""
    histories: Mapping[int, Sequence[Epoch]] = field(default_factory=dict)
    """The epochs of finalists."""
    links: Mapping[int, str] = field(default_factory=dict)
    """Finalist -> its report, or what else there is of it, relative to the page."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the job, as JSON values."""

    @property
    def is_combined(self) -> bool:
        """Whether a combination of finalists was taken in the winner's place."""
        return self.combined is not None and bool(self.combined["is_bundle"])


def render_search(facts: SearchFacts) -> str:
    """Renders the page of a search as HTML."""
    found = importances(facts.trials.values())
    points = _points(facts.trials, facts.leaderboard)
    return render_page(
        "search.html.j2",
        kind="Search",
        title=facts.name,
        subtitle=facts.uri,
        scripts=(SORT_TABLES, FOLD_TABLES),
        verdict=verdict(facts, found),
        headlines=_headlines(facts),
        warnings=_warnings(facts),
        figures=_drawn(_figures(facts, points)),
        leaderboard=leaderboard_listing(facts),
        finalists=_finalists(facts),
        finalist_figures=_drawn(_finalist_figures(facts)),
        importances=found,
        words=_words,
        importance_note=_importance_note(facts, found),
        setting_figures=_drawn(_setting_figures(found, points)),
        facts=_run_facts(facts),
        texts={"settings": json.dumps(facts.settings, indent=2)} if facts.settings else {},
    )


def pareto_png(trials: Mapping[int, Trial], leaderboard: pa.Table) -> bytes:
    """A PNG file: accuracy against speed of all trials, with the Pareto front."""
    return png(search_figures.pareto(_points(trials, leaderboard)))


# --- the verdict -----------------------------------------------------------------------------------------------------


def verdict(facts: SearchFacts, found: Sequence[Importance]) -> list[str]:
    """The result in sentences: what won, how sure that is, how much was tried, and what mattered."""
    sentences = [_outcome(facts), _lead(facts), _effort(facts), what_mattered(facts, found)]
    return [sentence for sentence in sentences if sentence]


def _outcome(facts: SearchFacts) -> str:
    if facts.tested is None or facts.winner is None:
        return _outcome_so_far(facts)
    low, high = wilson_interval(round(facts.tested.accuracy * facts.tested.images), facts.tested.images)
    return (
        f"{_winner_in_words(facts)}: {_percent(facts.tested.accuracy)} of the {facts.tested.images:,} test images are "
        f"right (95 % interval {100 * low:.1f} to {100 * high:.1f} %)."
    )


def _winner_in_words(facts: SearchFacts) -> str:
    assert facts.winner is not None
    if facts.combined is not None and facts.is_combined:
        members = _listed([str(number) for number in facts.combined["members"]])
        return f"{_article(facts.combined['method'])} of the trials {members} won"
    return f"{_row_of(facts, facts.winner)['architecture']} won"


def _article(method: str) -> str:
    words = method.replace("-", " ")
    return f"An {words}" if words[0] in "aeiou" else f"A {words}"


def _outcome_so_far(facts: SearchFacts) -> str:
    if facts.finalists and not usable(facts.finalists.values()):
        return "No finalist could be trained; the tables say why."
    best, ended = usable(facts.trials.values())[:1], len(_ended(facts))
    if not best and ended >= facts.planned:
        return "No trial succeeded; the table says why."
    what = f"after {ended} of {facts.planned} trials" if ended < facts.planned else "before there was a winner"
    stopped = f"Stopped {what}; the same command resumes."
    if not best:
        return f"{stopped} No trial has a result yet."
    return (
        f"{stopped} The best so far is trial {best[0].number}, {_row_of(facts, best[0].number)['architecture']}: "
        f"validation accuracy {_percent(best[0].val_accuracy or 0.0)}."
    )


def _lead(facts: SearchFacts) -> str:
    """How sure it is that the winner is better than the second finalist."""
    ranked = usable(facts.finalists.values())
    if facts.winner is None or facts.is_combined or len(ranked) < 2 or not facts.validation_images:
        return ""
    first, second = ranked[0].val_accuracy or 0.0, ranked[1].val_accuracy or 0.0
    margin = NORMAL_95 * math.sqrt((first * (1 - first) + second * (1 - second)) / facts.validation_images)
    other = f"trial {ranked[1].number}, {_row_of(facts, ranked[1].number)['architecture']}"
    images = f"{facts.validation_images:,} validation images"
    if first - second > margin:
        return (
            f"Its lead over the second finalist ({other}) is {100 * (first - second):.1f} points on {images}, more "
            f"than chance makes of two equal models ({100 * margin:.1f} points, 95 %)."
        )
    return (
        f"The choice among the finalists is not sure: the second one ({other}) is {100 * (first - second):.1f} points "
        f"behind on {images}, and chance makes up to {100 * margin:.1f} points of two equal models (95 %)."
    )


def _effort(facts: SearchFacts) -> str:
    ended = _ended(facts)
    counts = [(sum(trial.status == status for trial in ended), words) for status, words in _OUTCOMES.items()]
    trials = _listed([f"{count:,} {words}" for count, words in counts if count])
    backbones = len({trial.params["backbone"] for trial in ended})
    finalists = f"; {_counted(len(facts.finalists), 'finalist')} trained fully" if facts.finalists else ""
    return (
        f"{_counted(len(ended), 'trial')} of {_counted(backbones, 'backbone')} in {duration(facts.worked_s)}: "
        f"{trials}{finalists}."
        if ended
        else ""
    )


_OUTCOMES = {"done": "ran to the end", "stopped": "stopped early", "failed": "failed"}


def what_mattered(facts: SearchFacts, found: Sequence[Importance]) -> str:
    """The settings that explain more than chance, in a sentence; where there are none, why."""
    clear = [each for each in found if each.is_clear][:3]
    results = len(usable(facts.trials.values()))
    if not clear:
        return f"No setting stands out from chance: {_why_unclear(results)}." if results else ""
    first, *others = clear
    more = [f"{_words(each.setting)} ({100 * each.share:.0f} %)" for each in others]
    among = f" among the {len(first.values)} trials that drew it" if len(first.values) < results else ""
    return (
        f"What mattered most: {_words(first.setting)}, which explains {100 * first.share:.0f} % of the spread of "
        f"validation accuracy{among}{f'; then {_listed(more)}' if more else ''}."
    )


def _why_unclear(results: int) -> str:
    trials = f"{_counted(results, 'trial')} with a result"
    return f"{trials} are too few to say what mattered" if results < FEW_TRIALS else f"not in {trials}"


# --- numbers ---------------------------------------------------------------------------------------------------------


def _headlines(facts: SearchFacts) -> list[Headline]:
    shown = []
    if facts.tested is not None:
        low, high = wilson_interval(round(facts.tested.accuracy * facts.tested.images), facts.tested.images)
        note = f"{100 * low:.1f} to {100 * high:.1f} % (95 %), {facts.tested.images:,} images"
        shown.append(Headline(label="test accuracy", value=_percent(facts.tested.accuracy), note=note))
    best = usable((facts.finalists or facts.trials).values())[:1]
    if facts.combined is not None and facts.is_combined:
        value = _percent(facts.combined["val_accuracy"])
        shown.append(Headline(label="validation accuracy", value=value, note=f"of the {facts.combined['method']}"))
    elif best:
        who = f"trial {best[0].number}{' as a finalist' if facts.finalists else ', the best so far'}"
        shown.append(Headline(label="validation accuracy", value=_percent(best[0].val_accuracy or 0.0), note=who))
    statuses = [trial.status for trial in facts.trials.values()]
    failed = f", {statuses.count('failed')} failed" if "failed" in statuses else ""
    shown.append(
        Headline(
            label="trials",
            value=f"{len(_ended(facts)):,}",
            note=f"{statuses.count('stopped')} stopped early{failed}",
        )
    )
    shown.append(Headline(label="time worked", value=duration(facts.worked_s), note="without the time it stood still"))
    if facts.winner is not None and not facts.is_combined:
        row = _row_of(facts, facts.winner)
        if row["ms_per_image"]:
            note = f"{1000 / row['ms_per_image']:,.0f} images/s, {row['architecture']}"
            shown.append(Headline(label="scoring, ms/image", value=f"{row['ms_per_image']:.3g}", note=note))
        if row["parameters"]:
            shown.append(Headline(label="parameters", value=f"{row['parameters']:,}", note="of the whole network"))
    return shown


def _warnings(facts: SearchFacts) -> list[str]:
    """Errors of trials, each once."""
    errors = dict[str, list[int]]()
    for trial in (*facts.trials.values(), *facts.finalists.values()):
        if trial.status == "failed":
            errors.setdefault(trial.error or "no message", []).append(trial.number)
    return [
        f"{_counted(len(numbers), 'failure')} ({'trial' if len(numbers) == 1 else 'trials'} "
        f"{_listed([str(number) for number in numbers[:5]])}{' ...' if len(numbers) > 5 else ''}): {error}"
        for error, numbers in list(errors.items())[:5]
    ]


def _run_facts(facts: SearchFacts) -> list[tuple[str, str]]:
    shown = [("command", facts.command), ("recipe", facts.recipe)]
    if facts.winner is not None:
        shown.append(("winner's settings", describe(facts.trials[facts.winner].params)))
    if facts.combined is not None:
        words = "taken" if facts.is_combined else "not better than the winner, so not taken"
        shown.append((str(facts.combined["method"]), f"accuracy {facts.combined['val_accuracy']:.4f}: {words}"))
    return shown


# --- tables ----------------------------------------------------------------------------------------------------------


def leaderboard_listing(facts: SearchFacts) -> Listing:
    """All trials, the best first, with a column for each setting in which they differ."""
    rows = facts.leaderboard.to_pylist()
    settings = [name for name in SETTINGS if len({row[name] for row in rows}) > 1]
    has_finalists = any(row["finalist_val_accuracy"] is not None for row in rows)
    first = ("trial", "rank", "status", "accuracy", *(("as finalist",) if has_finalists else ()), "network", "ms/image")
    columns = (*first, "parameters", *map(_words, settings), "epochs", "trained, s")
    same = [f"{_words(name)} {_setting(rows[0][name])}" for name in _same_for_all(rows, settings)]
    note = "Accuracy on the validation images. ◆: on the Pareto front, no other trial is as accurate and as fast."
    return Listing(
        name="leaderboard",
        title="Leaderboard",
        columns=columns,
        rows=[_trial_cells(row, facts, settings, has_finalists=has_finalists) for row in rows],
        order=(1, "ascending"),
        lesser=len(first) + 1,
        note=f"{note} The same for all: {', '.join(same)}." if same else note,
    ).without_empty_columns()


def _same_for_all(rows: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> list[str]:
    return [name for name in SETTINGS if rows and name not in settings and rows[0][name] is not None]


def _trial_cells(
    row: Mapping[str, Any], facts: SearchFacts, settings: Sequence[str], *, has_finalists: bool
) -> list[Entry]:
    return [
        _trial_cell(row, facts),
        f"{row['rank']}",
        _status(row),
        _accuracy(row["val_accuracy"]),
        *([_accuracy(row["finalist_val_accuracy"])] if has_finalists else []),
        row["architecture"],
        _number(row["ms_per_image"], ".3g"),
        _number(row["parameters"], ",d"),
        *(_setting(row[name]) for name in settings),
        f"{row['epochs']}",
        _number(row["train_s"], ".1f"),
    ]


def _trial_cell(row: Mapping[str, Any], facts: SearchFacts) -> Entry:
    text = f"{row['trial']}"
    return Link(text=text, href=facts.links[row["trial"]]) if row["trial"] in facts.links else text


def _status(row: Mapping[str, Any]) -> Badge:
    tone: Tone = "quiet"
    if row["winner"]:
        text, tone = "winner", "good"
    elif row["status"] == "failed":
        text, tone = "failed", "bad"
    elif row["status"] == "running":
        text = "not ended"
    elif row["finalist_val_accuracy"] is not None:
        text, tone = "finalist", "plain"
    else:
        text = {"done": "done", "stopped": "stopped early"}[row["status"]]
    return Badge(text=text, tone=tone, mark="◆" if row["pareto"] else "", note=row["error"] or "")


def _finalists(facts: SearchFacts) -> Listing | None:
    if not facts.finalists:
        return None
    ranked = sorted(facts.finalists.values(), key=lambda trial: (trial.status == "failed", *trial.rank))
    columns = ("trial", "status", "more", "network", "accuracy", "as a trial", "loss", "epochs", "trained, s")
    return Listing(
        name="finalists",
        title="Finalists",
        columns=columns,
        rows=[_finalist_cells(trial, facts) for trial in ranked],
        note=f"Accuracy and loss of the validation images, which alone decide. {_who_is_tested(facts)}",
    )


def _who_is_tested(facts: SearchFacts) -> str:
    if facts.winner is None:
        return ""
    if facts.is_combined:
        return "What was combined of them was tested, and no finalist alone."
    return "The winner alone was tested, so it alone has a report."


def _finalist_cells(trial: Trial, facts: SearchFacts) -> list[Entry]:
    badge = Badge(text="winner", tone="good") if trial.number == facts.winner else Badge(text=trial.status)
    if trial.status == "failed":
        badge = Badge(text="failed", tone="bad", note=trial.error or "")
    link = facts.links.get(trial.number)
    return [
        f"{trial.number}",
        badge,
        Link(text="report" if link.endswith(".html") else "epochs", href=link) if link is not None else "",
        _row_of(facts, trial.number)["architecture"],
        _accuracy(trial.val_accuracy),
        _accuracy(facts.trials[trial.number].val_accuracy),
        _number(trial.val_loss, ".4f"),
        f"{trial.epochs}",
        _number(trial.seconds, ".1f"),
    ]


# --- figures ---------------------------------------------------------------------------------------------------------


def _points(trials: Mapping[int, Trial], leaderboard: pa.Table) -> list[TrialPoint]:
    rows = {row["trial"]: row for row in leaderboard.to_pylist()}
    return [_point(trial, rows[trial.number]) for trial in usable(trials.values())]


def _point(trial: Trial, row: Mapping[str, Any]) -> TrialPoint:
    return TrialPoint(
        number=trial.number,
        network=row["architecture"],
        accuracy=trial.val_accuracy or 0.0,
        is_stopped=trial.status == "stopped",
        images_per_s=1000 / row["ms_per_image"] if row["ms_per_image"] else None,
        ended_s=trial.ended_s,
        is_on_front=row["pareto"],
        is_winner=row["winner"],
    )


def _figures(facts: SearchFacts, points: Sequence[TrialPoint]) -> list[Shown]:
    shown = []
    front = sum(point.is_on_front for point in points)
    if any(point.images_per_s is not None for point in points):
        shown.append(
            Shown(
                name="pareto",
                title="Accuracy against speed",
                alt=f"Validation accuracy of {len(points)} trials against their speed of scoring; {front} are on the "
                "Pareto front",
                figure=search_figures.pareto(points),
                note="The line joins the Pareto front: no trial is both above it and to its right.",
            )
        )
    if any(point.ended_s is not None for point in points):
        rows = {row["trial"]: row for row in facts.leaderboard.to_pylist()}
        finalists = [_point(trial, rows[trial.number]) for trial in usable(facts.finalists.values())]
        failed = [t.ended_s for t in facts.trials.values() if t.status == "failed" and t.ended_s is not None]
        shown.append(
            Shown(
                name="progress",
                title="Accuracy over time",
                alt="Validation accuracy of each trial and finalist when it ended, and of the best trial so far",
                figure=search_figures.progress(points, finalists, failed),
                note="Time that drivers worked, without the time between a stop and a resume.",
            )
        )
    return shown


def _finalist_figures(facts: SearchFacts) -> list[Shown]:
    histories = {number: epochs for number, epochs in facts.histories.items() if epochs}
    if not histories:
        return []
    names = {number: f"trial {number}{' (winner)' if number == facts.winner else ''}" for number in histories}
    return [
        Shown(
            name="finalist_epochs",
            title="Accuracy by epoch",
            alt=f"Validation accuracy of {len(histories)} finalists after each epoch",
            figure=search_figures.finalist_epochs({names[number]: epochs for number, epochs in histories.items()}),
        )
    ]


def _drawn(figures: Sequence[Shown]) -> list[tuple[Shown, str]]:
    return [(shown, svg(shown.figure, alt=shown.alt, title=shown.title)) for shown in figures]


def _setting_figures(found: Sequence[Importance], points: Sequence[TrialPoint]) -> list[Shown]:
    return [
        Shown(
            name=f"setting-{each.setting}",
            title=_words(each.setting),
            alt=f"Validation accuracy of {len(each.values)} trials against {_words(each.setting)}",
            figure=search_figures.setting(_words(each.setting), each.values, points),
        )
        for each in found[:MAX_PLOTS]
    ]


def _importance_note(facts: SearchFacts, found: Sequence[Importance]) -> str:
    results = len(usable(facts.trials.values()))
    if not found:
        return (
            f"{_counted(results, 'trial')} with a result are too few to tell what each setting did, or all of them are "
            "equally accurate."
        )
    note = (
        "By Optuna's fANOVA: the share of the variance of validation accuracy that a setting explains by itself, among "
        "the trials that drew it. The line in a bar is the most that any setting reaches in 19 of 20 cases when the "
        "results are shuffled among the trials; a grey bar does not exceed it, and may be chance."
    )
    if not any(each.is_clear for each in found):
        note += f" None is above it: {_why_unclear(results)}."
    return f"{note} A trial that was stopped early counts with its best epoch."


# --- words -----------------------------------------------------------------------------------------------------------


def _row_of(facts: SearchFacts, number: int) -> dict[str, Any]:
    return next(row for row in facts.leaderboard.to_pylist() if row["trial"] == number)


def _ended(facts: SearchFacts) -> list[Trial]:
    return [trial for trial in facts.trials.values() if trial.status != "running"]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _accuracy(share: float | None) -> str:
    return _number(share, ".4f")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def _words(setting: str) -> str:
    return {"image_size_px": "image size, px", "alpha": "width"}.get(setting, setting.replace("_", " "))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _listed(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
