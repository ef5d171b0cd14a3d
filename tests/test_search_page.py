"""The page of a search: its words and numbers, the Pareto front as it is drawn, and all of it in a real browser."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_searches import made_board, made_finalists, made_search, made_trials
from matplotlib.figure import Figure
from pages import Parts, cut_texts, make_wide, write

from mnist_dist.evaluation import search_figures
from mnist_dist.evaluation.figures import png
from mnist_dist.evaluation.search_figures import TrialPoint, front_line, log_ticks, tick_label, time_unit
from mnist_dist.evaluation.search_page import (
    FinalTest,
    SearchFacts,
    leaderboard_listing,
    pareto_png,
    render_search,
    verdict,
)
from mnist_dist.tuning.importance import Importance
from mnist_dist.tuning.leaderboard import pareto_front
from mnist_dist.tuning.trials import usable

HOSTILE = "<script>alert(1)</script>"

# --- the Pareto front ------------------------------------------------------------------------------------------------


def points_on_a_grid(seed: int) -> dict[int, tuple[float, float]]:
    """Accuracies and speeds with many ties, as those of one architecture have."""
    random = np.random.default_rng(seed)
    pairs = random.integers(1, 6, (int(random.integers(1, 25)), 2))
    return {number: (float(accuracy) / 10, float(speed)) for number, (accuracy, speed) in enumerate(pairs)}


def dominated(point: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    """The definition: another one is at least as good in both, and better in one."""
    as_good = [other for other in others if other[0] >= point[0] and other[1] >= point[1]]
    return any(other != point for other in as_good)


def trial_points(points: dict[int, tuple[float, float]]) -> list[TrialPoint]:
    front = pareto_front(points)
    return [
        TrialPoint(number=number, network="n", accuracy=accuracy, images_per_s=speed, is_on_front=number in front)
        for number, (accuracy, speed) in points.items()
    ]


def is_on_line(point: TrialPoint, line: Sequence[tuple[float, float]]) -> bool:
    x, y = point.images_per_s, point.accuracy
    assert x is not None
    ends = list(itertools.pairwise(line)) or [(line[0], line[0])]
    return any(min(a, c) <= x <= max(a, c) and min(b, d) <= y <= max(b, d) for (a, b), (c, d) in ends)


@pytest.mark.parametrize("seed", range(40))
def test_the_front_is_that_of_the_definition_and_alone_on_its_line(seed: int) -> None:
    points = points_on_a_grid(seed)
    expected = {number for number, point in points.items() if not dominated(point, list(points.values()))}
    assert pareto_front(points) == expected
    shown = trial_points(points)
    line = front_line(shown)
    assert {point.number for point in shown if is_on_line(point, line)} == expected
    for point in shown:  # None lies beyond the line.
        assert any(x >= (point.images_per_s or 0) and y >= point.accuracy for x, y in line)
    for (x, y), (next_x, next_y) in itertools.pairwise(line):  # Steps, and no slopes.
        assert x == next_x or y == next_y


def test_the_line_of_a_search_has_no_dominated_trial_on_it() -> None:
    facts = made_search(60)
    rows = [row for row in facts.leaderboard.to_pylist() if row["val_accuracy"] is not None]
    front = {row["trial"] for row in rows if row["pareto"]}
    shown = [
        TrialPoint(
            number=row["trial"],
            network=row["architecture"],
            accuracy=row["val_accuracy"],
            images_per_s=1000 / row["ms_per_image"],
            is_on_front=row["pareto"],
        )
        for row in rows
    ]
    assert {point.number for point in shown if is_on_line(point, front_line(shown))} == front
    assert len(front) > 1


# --- figures ---------------------------------------------------------------------------------------------------------


def boxes_of_ticks(figure: Figure, axis: str) -> list[tuple[float, float]]:
    """Where the labels of an axis begin and end, px, of those that are shown."""
    png(figure)
    ax = figure.axes[0]
    low, high = sorted(ax.get_xlim() if axis == "x" else ax.get_ylim())
    ticks = getattr(ax, f"{axis}axis").get_major_ticks()
    shown = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]
    boxes = [label.get_window_extent() for label in shown]
    return sorted((box.x0, box.x1) if axis == "x" else (box.y0, box.y1) for box in boxes)


def speeds(*values: float) -> list[TrialPoint]:
    return [
        TrialPoint(number=number, network=f"n{number}", accuracy=0.5 + number / 100, images_per_s=value)
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    "values",
    [(3.0,), (100.0, 1e5), (13_000.0, 15_000.0), (0.02, 3.0), (9_000.0, 11_000.0, 99_000.0), (120_000.0, 131_000.0)],
)
def test_ticks_of_speed_do_not_collide(values: tuple[float, ...]) -> None:
    figure = search_figures.pareto(speeds(*values))
    for axis in ("x", "y"):
        boxes = boxes_of_ticks(figure, axis)
        assert len(boxes) >= 2
        for (_, end), (begin, _) in itertools.pairwise(boxes):
            assert begin - end > 2, (axis, boxes)


@pytest.mark.parametrize(
    "values",
    [
        tuple(10.0**-power for power in range(1, 8)),
        tuple(range(1, 9)),
        ("none", "photos", "rand-augment", "digits"),
    ],
)
def test_ticks_of_a_setting_do_not_collide(values: tuple[Any, ...]) -> None:
    points = speeds(*(1.0 for _ in values))
    figure = search_figures.setting("a setting", dict(enumerate(values)), points)
    boxes = boxes_of_ticks(figure, "x")
    assert len(boxes) >= 2
    for (_, end), (begin, _) in itertools.pairwise(boxes):
        assert begin - end > 0, boxes


def test_names_that_do_not_fit_side_by_side_are_slanted() -> None:
    for names, rotation in ((("mobilenet_v2", "cnn"), 0.0), (("efficientnet_v2_b0", "mobilenet_v2", "cnn"), 30.0)):
        figure = search_figures.setting("backbone", dict(enumerate(names)), speeds(*(1.0 for _ in names)))
        assert {label.get_rotation() for label in figure.axes[0].get_xticklabels()} == {rotation}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (3.0, 60.0, [5.0, 10.0, 20.0, 50.0]),
        (1.0, 200.0, [1.0, 3.0, 10.0, 30.0, 100.0]),
        (1.0, 2000.0, [1.0, 10.0, 100.0, 1000.0]),
        (1e-6, 1.0, [1e-6, 1e-4, 1e-2, 1.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    ticks = log_ticks(low, high)
    assert ticks == pytest.approx(expected)
    assert len(ticks) <= search_figures.MAX_TICKS


def test_numbers_are_short() -> None:
    assert [tick_label(value) for value in (0.0, 0.5, 0.003, 2e-5, 250.0, 31_000.0, 2e6)] == [
        *("0", "0.5", "0.003", "2e-5", "250", "31,000", "2e6")
    ]
    assert [time_unit(seconds)[0] for seconds in (0.0, 90.0, 150.0, 7_100.0, 9_000.0)] == ["s", "s", "min", "min", "h"]


def test_trials_far_below_the_others_leave_the_axis_to_these_and_are_counted() -> None:
    accuracies = [0.1, 0.12, *(0.9 + number / 200 for number in range(12))]
    points = [replace(point, accuracy=each) for point, each in zip(speeds(*range(1, 15)), accuracies, strict=True)]
    figure = search_figures.pareto(points)
    low, high = figure.axes[0].get_ylim()
    assert 0.8 < low < 0.9 < 0.955 < high
    assert "(2 below 0.8" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("count", [1, 2, 40])
def test_figures_of_few_and_of_many_trials_are_drawn(count: int) -> None:
    facts = made_search(count)
    assert pareto_png(facts.trials, facts.leaderboard).startswith(b"\x89PNG")
    many = [replace(point, network=f"network {point.number}") for point in speeds(*range(1, 31))]
    assert png(search_figures.pareto(many)).startswith(b"\x89PNG")
    assert png(search_figures.pareto([])).startswith(b"\x89PNG")


# --- the verdict -----------------------------------------------------------------------------------------------------


def importance(setting: str, share: float, *, trials: int = 36) -> Importance:
    return Importance(setting=setting, share=share, chance=0.1, values=dict.fromkeys(range(trials), 0.5))


def test_the_verdict_says_what_won_how_sure_it_is_and_what_mattered() -> None:
    facts = made_search(40)
    first, lead, effort, mattered = verdict(facts, [importance("learning_rate", 0.6), importance("dropout", 0.05)])
    network = next(row["architecture"] for row in facts.leaderboard.to_pylist() if row["winner"])
    assert first == f"{network} won: 97.50 % of the 2,000 test images are right (95 % interval 96.7 to 98.1 %)."
    assert lead.startswith("The choice among the finalists is not sure: the second one (trial ")
    assert "1,000 validation images" in lead
    assert effort == (
        "40 trials of 4 backbones in 15.1 min: 27 ran to the end, 9 stopped early and 4 failed; 3 finalists trained "
        "fully."
    )
    assert mattered == ("What mattered most: learning rate, which explains 60 % of the spread of validation accuracy.")


def test_what_only_some_trials_draw_is_said_to_matter_among_these() -> None:
    found = [importance("momentum", 0.6, trials=9), importance("backbone", 0.2)]
    assert verdict(made_search(40), found)[-1] == (
        "What mattered most: momentum, which explains 60 % of the spread of validation accuracy among the 9 trials "
        "that drew it; then backbone (20 %)."
    )


def test_a_lead_beyond_chance_is_called_so() -> None:
    facts = made_search(40)
    ranked = usable(facts.finalists.values())
    behind = {trial.number: replace(trial, val_accuracy=0.8) for trial in ranked[1:]}
    lead = verdict(replace(facts, finalists={**facts.finalists, **behind}), [])[1]
    assert lead.startswith("Its lead over the second finalist (trial ")
    assert "more than chance makes of two equal models" in lead


def test_a_combination_is_named_in_place_of_the_winner() -> None:
    facts = made_search(40)
    members = list(facts.finalists)[:2]
    combined = {"method": "ensemble", "members": members, "val_accuracy": 0.97, "val_loss": 0.1, "is_bundle": True}
    taken = render_search(replace(facts, combined=combined))
    assert f"An ensemble of the trials {members[0]} and {members[1]} won: 97.50" in Parts(taken).text
    assert "What was combined of them was tested" in taken
    assert "of the ensemble" in taken
    assert "finalists is not sure" not in taken
    left = Parts(render_search(replace(facts, combined={**combined, "is_bundle": False}))).text
    assert "not better than the winner, so not taken" in left
    assert "An ensemble of" not in left


def test_a_search_that_was_stopped_says_how_far_it_came() -> None:
    facts = made_search(7, is_finished=False, planned=40)
    best = usable(facts.trials.values())[0]
    first, *others = verdict(facts, [])
    assert first.startswith(
        f"Stopped after 7 of 40 trials; the same command resumes. The best so far is trial {best.number},"
    )
    assert "7 trials with a result are too few to say what mattered." in others[-1]
    page = Parts(render_search(facts))
    assert {"progress", "leaderboard", "importance"} <= page.ids
    assert "pareto" not in page.ids  # Nothing was measured yet.
    assert "test accuracy" not in page.text
    over = verdict(replace(facts, planned=7), [])[0]
    assert over.startswith("Stopped before there was a winner; the same command resumes. The best so far is trial ")


def test_a_search_without_a_winner_says_why() -> None:
    trials = {
        number: replace(t, status="failed", val_accuracy=None, error=HOSTILE) for number, t in made_trials(3).items()
    }
    facts = replace(
        made_search(3, is_finished=False), trials=trials, leaderboard=made_board(trials, {}, measured=False)
    )
    page = render_search(facts)
    assert "No trial succeeded; the table says why." in page
    assert "<script>alert" not in page
    assert Parts(page).text.count(HOSTILE) == 4  # A row each, and once above them.
    ended = made_search(9)
    lost = {
        number: replace(trial, status="failed", val_accuracy=None, error="out of memory")
        for number, trial in made_finalists(usable(ended.trials.values())[:2], after_s=9.0).items()
    }
    failed = replace(ended, finalists=lost, winner=None, tested=None, histories={}, links={})
    assert verdict(failed, [])[0] == "No finalist could be trained; the tables say why."
    assert "out of memory" in render_search(failed)


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts() -> SearchFacts:
    return made_search(40)


@pytest.fixture(scope="module")
def page(facts: SearchFacts) -> str:
    return render_search(facts)


def test_the_page_holds_everything(page: str, facts: SearchFacts) -> None:
    parts = Parts(page)
    assert parts.titles == ["made"]
    assert {"pareto", "progress", "importance", "finalists", "finalist_epochs", "leaderboard", "run"} <= parts.ids
    assert "setting-learning_rate" in parts.ids
    assert facts.command in parts.text
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


def test_the_leaderboard_has_a_row_for_each_trial_with_whole_numbers(page: str, facts: SearchFacts) -> None:
    parts = Parts(page)
    rows = facts.leaderboard.to_pylist()
    assert parts.sorted == {"rank": "ascending"}
    assert parts.column("leaderboard", "trial") == [str(row["trial"]) for row in rows]
    assert parts.column("leaderboard", "accuracy") == [
        "" if row["val_accuracy"] is None else f"{row['val_accuracy']:.4f}" for row in rows
    ]
    assert parts.column("leaderboard", "learning rate") == [f"{row['learning_rate']:.3g}" for row in rows]
    status = parts.column("leaderboard", "status")
    assert sum(each.startswith("stopped early") for each in status) + sum("finalist" in each for each in status) >= 9
    assert [each for each in status if each.startswith("failed")] == ["failed" + (rows[-1]["error"] or "")] * 4
    assert sum(each.startswith("winner") for each in status) == 1
    assert sum("◆" in each for each in status) == sum(row["pareto"] for row in rows)
    assert "hidden units 0, label smoothing 0.1." in parts.text  # What is the same for all has no column.
    assert "label smoothing" not in parts.tables["leaderboard"][0]


def test_finalists_lead_to_their_reports(page: str, facts: SearchFacts) -> None:
    parts = Parts(page)
    winner = f"finalists/{facts.winner:06d}/bundle/report.html"
    assert parts.links[str(facts.winner)] == parts.links["report"] == winner
    assert parts.column("finalists", "status").count("winner") == 1
    assert parts.links["epochs"].endswith("/history.csv")


def test_numbers_are_numbers_and_words_are_not(facts: SearchFacts) -> None:
    listing = leaderboard_listing(facts)
    numbers = {listing.columns[place] for place in listing.number_columns}
    assert {"rank", "accuracy", "as finalist", "ms/image", "parameters", "learning rate", "epochs"} <= numbers
    assert not {"status", "network", "optimizer"} & numbers


def test_without_times_and_speeds_the_page_shows_what_there_is() -> None:
    facts = made_search(12)
    trials = {number: replace(trial, ended_s=None) for number, trial in facts.trials.items()}
    bare = replace(
        facts, trials=trials, finalists={}, winner=None, tested=None, leaderboard=made_board(trials, {}, measured=False)
    )
    ids = Parts(render_search(bare)).ids
    assert "leaderboard" in ids
    assert not {"pareto", "progress", "finalists"} & ids


def test_one_trial_alone_has_a_page() -> None:
    facts = made_search(1, tested=FinalTest(accuracy=0.9, loss=0.3, images=50))
    assert "too few" in Parts(render_search(facts)).text


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser: Any, page: str, tmp_path: Path) -> Any:
    make_wide(browser, 1280)
    browser.get(write(tmp_path, "report.html", page))
    return browser


def column_of(browser: Any, name: str) -> list[str]:
    """The visible cells of a column of the leaderboard."""
    found: list[str] = browser.execute_script(
        """
        const table = document.querySelector("#leaderboard table");
        const place = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === arguments[0]);
        return [...table.tBodies[0].rows].filter((row) => row.getClientRects().length)
          .map((row) => row.cells[place].textContent.trim());
        """,
        name,
    )
    return found


def header(browser: Any, name: str) -> Any:
    return browser.find_element("xpath", f"//section[@id='leaderboard']//th[normalize-space()='{name}']")


@pytest.mark.slow
def test_a_click_and_a_key_sort_the_leaderboard(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    header(opened, "accuracy").find_element("tag name", "button").click()
    assert header(opened, "accuracy").get_attribute("aria-sort") == "descending"
    assert header(opened, "rank").get_attribute("aria-sort") is None
    shown = [float(each) for each in column_of(opened, "accuracy")]
    assert shown == sorted(shown, reverse=True)
    assert len(shown) == 20
    header(opened, "parameters").find_element("tag name", "button").send_keys(Keys.ENTER)
    header(opened, "parameters").find_element("tag name", "button").send_keys(Keys.SPACE)
    assert header(opened, "parameters").get_attribute("aria-sort") == "ascending"
    sizes = [int(each.replace(",", "")) for each in column_of(opened, "parameters") if each]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.slow
def test_a_button_shows_all_trials(opened: Any, facts: SearchFacts) -> None:
    button = opened.find_element("css selector", "#leaderboard .unfold")
    assert (button.text, button.get_attribute("aria-expanded")) == ("Show all 40 rows", "false")
    assert len(column_of(opened, "trial")) == 20
    button.click()
    assert len(column_of(opened, "trial")) == len(facts.trials)
    assert button.get_attribute("aria-expanded") == "true"


@pytest.mark.slow
@pytest.mark.parametrize("width_px", [390, 1280])
def test_nothing_is_cut_and_nothing_complains(opened: Any, width_px: int) -> None:
    make_wide(opened, width_px)
    assert opened.execute_script("return window.innerWidth") == width_px
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width_px
    if width_px < 600:
        opened.find_element("css selector", "#leaderboard .unfold").click()
        assert cut_texts(opened) == []
    assert opened.get_log("browser") == []
