"""The page of a report: everything on it, nothing beside it, nothing from outside that is run, in a real browser."""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from harness import an_epoch
from pages import make_wide

from mnist_dist.evaluation import figures
from mnist_dist.evaluation.report import (
    Example,
    Filter,
    Gallery,
    Headline,
    Matrix,
    Page,
    Shown,
    Table,
    class_filter,
    confusion_filter,
    picture,
    render,
    write_page,
)
from mnist_dist.evaluation.templates import path_end, unbroken
from mnist_dist.models.history import Epoch

NAMES = [f"class {number}" for number in range(7)]
HOSTILE = "<script>alert(1)</script>.png"


CONFUSION = 20 * np.eye(7, dtype=np.int64)
CONFUSION[2, 3], CONFUSION[6, 0] = 12, 9
STATUS = Filter(text="truncated", wanted={"status": "truncated"}, label="status truncated", images=8)


def mistakes() -> list[Example]:
    """Eleven images of the third class that are taken for the fourth."""
    truth, predicted = (NAMES[2],), (NAMES[3],)
    return [
        Example(name=f"m/{n}.png", predicted=predicted, confidence=0.9, truth=truth, pixels=some_pixels(8, 8, 1))
        for n in range(11)
    ]


def some_pixels(height_px: int, width_px: int, channels: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(height_px).integers(0, 256, (height_px, width_px, channels), np.uint8)


def history() -> list[Epoch]:
    return [
        an_epoch(
            epoch,
            phase="head" if epoch < 4 else "fine-tune",
            loss=1 / epoch,
            accuracy=1 - 0.5 / epoch,
            val_loss=1.2 / epoch,
            val_accuracy=1 - 0.6 / epoch,
        )
        for epoch in range(1, 9)
    ]


def all_figures() -> list[Shown]:
    random = np.random.default_rng(0)
    counts = random.integers(1, 60, 15)
    drawn = {
        "training_curves": figures.training_curves(history()),
        "confusion_matrix": figures.confusion_matrix(random.integers(0, 90, (7, 7)), NAMES),
        "reliability": figures.reliability(counts, counts * 0.6, (counts * 0.5).astype(int)),
        "class_distribution": figures.class_distribution({"train": counts[:7], "test": counts[7:14]}, NAMES),
        "confidence": figures.confidence_histogram(counts),
    }
    wide = ("training_curves", "class_distribution", "confidence")
    return [
        Shown(name=name, title=name, alt=f"alt of {name}", figure=figure, wide=name in wide)
        for name, figure in drawn.items()
    ]


@pytest.fixture(scope="module")
def page() -> Page:
    examples = [
        Example(
            name=HOSTILE, predicted=("<b>1</b>",), confidence=0.91, truth=("2 & 3",), pixels=some_pixels(28, 28, 1)
        ),
        Example(
            name="wide/" + "x" * 200, predicted=("4",), confidence=0.5, truth=("4",), pixels=some_pixels(60, 300, 3)
        ),
        Example(name="gone.png", predicted=("5",)),
    ]
    return Page(
        title=f"A run called {HOSTILE}",
        subtitle="s3://bucket/" + "very-long-name" * 20,
        headlines=[
            Headline(label="test accuracy", value="99.43 %", note="99.26 to 99.56"),
            Headline(label="a", value="1"),
        ],
        warnings=["3 images could not be read"],
        figures=all_figures(),
        verdict=["The model is right on 99.4 % of 2 images."],
        matrix=Matrix(classes=NAMES, counts=CONFUSION),
        galleries=[
            Gallery(title="Mistakes", examples=[*examples, *mistakes()], shown_first=10),
            Gallery(title="Without a prediction", examples=[Example(name="/a/b.png", status="truncated", error="cut")]),
        ],
        tables=[
            Table(
                title="Classes",
                columns=("class", "images", "F1"),
                rows=[(class_filter(name), f"{1024 + number:,}", "0.99") for number, name in enumerate(NAMES)],
                sortable=True,
            ),
            Table(
                title="Confusions",
                columns=("truth → prediction", "images"),
                rows=[(confusion_filter(NAMES[6], NAMES[0], 9, text="6 → 0"), "9")],
            ),
            Table(title="Rows by status", columns=("status", "images"), rows=[(STATUS, "8")]),
        ],
        facts=[("command", "python -m jobs.train <i>"), ("fingerprint", "f" * 64)],
        texts={"configuration": "{\n" + "long " * 100 + "\n}"},
        files={"model_architecture.txt": "a CNN"},
    )


def test_page_and_figures_are_written(page: Page, tmp_path: Path) -> None:
    path = write_page(page, tmp_path)
    assert path == tmp_path / "report.html"
    for shown in page.figures:
        assert (tmp_path / "figures" / f"{shown.name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "model_architecture.txt").read_text() == "a CNN"


def test_what_comes_from_outside_is_escaped(page: Page) -> None:
    html = render(page)
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;.png") >= 3
    assert "&lt;b&gt;1&lt;/b&gt;" in html


def test_nothing_is_fetched(page: Page) -> None:
    html = render(page).replace("http://www.w3.org/", "")  # names of XML vocabularies
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html.replace("url(#", "")


def test_each_figure_has_an_alt_text_and_takes_the_ink_of_the_page(page: Page) -> None:
    html = render(page)
    for shown in page.figures:
        assert f'aria-label="{shown.alt}"' in html
    assert figures.INK not in html.partition("</style>")[2]
    assert "currentColor" in html


def test_a_figure_for_the_folder_alone_is_not_on_the_page(page: Page) -> None:
    hidden = [replace(shown, on_page=False) for shown in page.figures]
    assert "<svg" not in render(replace(page, figures=hidden))


def test_ids_of_figures_do_not_clash(page: Page) -> None:
    ids = [part.partition('"')[0] for part in render(page).split(' id="')[1:]]
    drawn = [one for one in ids if one.startswith(("m", "p")) and len(one) == 11]
    assert len(drawn) == len(set(drawn))


@pytest.mark.parametrize(("height_px", "width_px"), [(8, 8), (28, 20), (300, 500), (3, 400)])
def test_a_picture_is_a_small_data_uri(height_px: int, width_px: int) -> None:
    kind = "webp" if max(height_px, width_px) > 64 else "png"
    for channels in (1, 3):
        assert picture(some_pixels(height_px, width_px, channels)).startswith(f"data:image/{kind};base64,")


def test_many_classes_and_a_dollar_are_drawn() -> None:
    names = ["$x$", "a_{b}", *(f"a rather long name of a class {number}" for number in range(118))]
    drawn = figures.confusion_matrix(np.eye(120, dtype=np.int64), names)
    assert figures.png(drawn).startswith(b"\x89PNG")
    shown = [figures.Picture(pixels=some_pixels(9, 9, 3), caption="$\\frac{")]
    assert figures.png(figures.pictures(shown, title="with a $")).startswith(b"\x89PNG")


def test_figures_of_nothing_are_drawn() -> None:
    none = np.zeros(15, np.int64)
    for figure in (
        figures.reliability(none, none, none),
        figures.confidence_histogram(none),
        figures.class_distribution({"predicted": none[:3]}, NAMES[:3]),
        figures.pictures([], title="none"),
        figures.training_curves(history()[:1]),
    ):
        assert figures.png(figure).startswith(b"\x89PNG")


def test_numbers_and_percent_signs_stay_together() -> None:
    assert unbroken("100.00 % of <b> at 5 %") == "100.00\N{NO-BREAK SPACE}% of &lt;b&gt; at 5\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b/1.png", "s3://b/1.png"),
        ("s3://bucket/a-long/folder/of/images/000123.png", "…/folder/of/images/000123.png"),
        ("/data/photos.tar!holiday/in/the/mountains/img_1.jpg", "…/in/the/mountains/img_1.jpg"),
        ("/a/" + "x" * 40 + ".png", "…" + "x" * 25 + ".png"),
        ("x" * 40 + "/", "…" + "x" * 28 + "/"),
    ],
)
def test_a_path_keeps_its_end(uri: str, expected: str) -> None:
    assert path_end(uri) == expected
    assert len(path_end(uri)) <= 30


def test_captions_show_the_end_of_a_path_and_its_whole_as_a_title(page: Page) -> None:
    html = render(page)
    assert f'title="wide/{"x" * 200}">…{"x" * 29}<' in html


def test_only_the_scripts_of_the_page_may_run(page: Page) -> None:
    html = render(page)
    policy = html.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    scripts = [part.partition("</script>")[0] for part in html.split("<script>")[1:]]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy.partition("script-src ")[2] == " ".join(f"&#39;sha256-{digest}&#39;" for digest in digests)
    assert policy.startswith("default-src &#39;none&#39;; img-src data:;")


def test_without_a_script_links_lead_to_the_first_of_their_images(page: Page) -> None:
    html = render(page)
    for fragment, path in (
        ("truth=class+2&amp;predicted=class+3", "m/0.png"),
        ("class=class+3", "m/0.png"),
        ("status=truncated", "/a/b.png"),
    ):
        assert f'href="#{fragment}"' in html
        figure = html.partition(f'<span id="{fragment}"></span>')[2].partition("</figure>")[0]
        assert f'title="{path}"' in figure
    assert 'href="#truth=class+6&amp;predicted=class+0"' in html  # None of its images is on the page.
    assert '<span id="truth=class+6&amp;predicted=class+0">' not in html


def test_a_page_without_images_says_so(page: Page) -> None:
    html = render(replace(page, galleries=()))
    assert "no image is known to be a mistake, barely right, or without a prediction" in html
    assert "<figure" not in html


def test_columns_of_numbers_are_found() -> None:
    table = Table(
        title="t", columns=("7", "8", "n", "word", ""), rows=[("1", "2", "1,024", "a", ""), ("2", "3", "5 %", "1", "")]
    )
    assert table.number_columns == {1, 2, 4}
    assert replace(table, words=2).number_columns == {2, 4}


def test_a_figure_does_not_repeat_the_title_above_it(page: Page) -> None:
    figure = figures.confidence_histogram(np.arange(20))
    title = "Confidence of the predictions"
    assert len(figures.svg(figure, alt="a", title=title)) < len(figures.svg(figure, alt="a"))
    assert figure.axes[0].get_title() == title


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(browser: Any, page: Page, tmp_path_factory: pytest.TempPathFactory) -> Any:
    browser.get(write_page(page, tmp_path_factory.mktemp("page")).as_uri())
    return browser


@pytest.mark.slow
@pytest.mark.parametrize("width_px", [390, 1400])
def test_nothing_is_wider_than_the_window(opened: Any, width_px: int) -> None:
    make_wide(opened, width_px)
    assert opened.execute_script("return window.innerWidth") == width_px
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width_px


@pytest.mark.slow
@pytest.mark.parametrize("width_px", [390, 1400])
def test_figures_and_pictures_are_there(opened: Any, page: Page, width_px: int) -> None:
    make_wide(opened, width_px)
    boxes = opened.execute_script(
        "return [...document.querySelectorAll('.figures svg')].map(e => [e.getBoundingClientRect().width,"
        " e.getBoundingClientRect().height])"
    )
    assert len(boxes) == len(page.figures)
    assert min(min(box) for box in boxes) > 150
    sizes = opened.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert len(sizes) == 13
    assert min(sizes) > 0


@pytest.mark.slow
def test_a_hostile_name_is_text_and_nothing_complains(opened: Any) -> None:
    assert HOSTILE in opened.execute_script("return document.body.innerText")
    assert opened.execute_script("return document.querySelectorAll('figure script').length") == 0
    assert opened.get_log("browser") == []


@pytest.mark.slow
def test_text_is_legible_in_light_and_dark(opened: Any) -> None:
    shown = []
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        shown.append(colours(opened, "section", "section"))
        assert contrast(*shown[-1]) >= 7  # WCAG 2.1, level AAA
        for text, back in ((".note", "section"), ("tbody a", "section"), (".wrong", "section"), (".right", "section")):
            assert contrast(*colours(opened, text, back)) >= 4.5  # Level AA.
        for cell in (".of-right", ".of-wrong"):
            assert contrast(*colours(opened, f".matrix {cell} a", f".matrix {cell}")) >= 4.5
    assert shown[0] != shown[1]


def colours(browser: Any, text: str, back: str) -> tuple[str, str]:
    """The colours of a text and of what is behind it, by their selectors."""
    style = "getComputedStyle(document.querySelector(arguments[{}])).{}"
    script = f"return [{style.format(0, 'color')}, {style.format(1, 'backgroundColor')}]"
    first, second = browser.execute_script(script, text, back)
    return str(first), str(second)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours. Source: WCAG 2.1."""
    dark, light = sorted(luminance(colour) for colour in (first, second))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("width_px", [320, 390, 768, 1280])
def test_headline_numbers_stand_on_one_line(
    browser: Any, page: Page, tmp_path_factory: pytest.TempPathFactory, width_px: int
) -> None:
    values = ["100.00 %", "2,261,827", "123,456,789,012", "3,555 images/s", "0.5"]
    headlines = [Headline(label="a number", value=value) for value in values]
    make_wide(browser, width_px)
    browser.get(write_page(replace(page, headlines=headlines), tmp_path_factory.mktemp("page")).as_uri())
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.headline .value')].map(e => [e.scrollWidth, e.clientWidth,"
        " e.getClientRects().length, e.clientHeight / parseFloat(getComputedStyle(e).lineHeight)])"
    )
    for needed, there, lines, height in boxes:
        assert needed <= there
        assert (lines, round(height)) == (1, 1)


VISIBLE = (
    "return [...document.querySelectorAll('figure.example')].filter(e => e.offsetParent !== null)"
    ".map(e => e.querySelector('.path').title)"
)


@pytest.fixture
def fresh(browser: Any, page: Page, tmp_path: Path) -> Any:
    make_wide(browser, 1280)
    browser.get(write_page(page, tmp_path).as_uri())
    return browser


def notice(browser: Any) -> str:
    """What the page says of its filter; empty if there is none."""
    return str(
        browser.execute_script("const e = document.getElementById('filter'); return e.hidden ? '' : e.innerText")
    )


def click(browser: Any, fragment: str) -> None:
    browser.execute_script("document.querySelector(`a.filter[href='#${arguments[0]}']`).click()", fragment)
    wait_for(browser, lambda: fragment in browser.current_url)


def wait_for(browser: Any, condition: Callable[[], bool]) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 60).until(lambda _: condition())


MISTAKES = [f"m/{n}.png" for n in range(11)]


@pytest.mark.slow
def test_a_cell_shows_its_images_and_the_address_keeps_it(fresh: Any) -> None:
    assert len(fresh.execute_script(VISIBLE)) == 11  # Ten of the first gallery, and one without a prediction.
    click(fresh, "truth=class+2&predicted=class+3")
    wait_for(fresh, lambda: notice(fresh) != "")
    assert fresh.execute_script(VISIBLE) == MISTAKES
    assert "Only images with truth class 2, prediction class 3: 11 of 12 on this page." in notice(fresh)
    fresh.refresh()
    assert fresh.execute_script(VISIBLE) == MISTAKES
    fresh.back()
    wait_for(fresh, lambda: notice(fresh) == "")
    assert len(fresh.execute_script(VISIBLE)) == 11


@pytest.mark.slow
def test_the_filter_is_cleared(fresh: Any) -> None:
    click(fresh, "status=truncated")
    wait_for(fresh, lambda: notice(fresh) != "")
    assert fresh.execute_script(VISIBLE) == ["/a/b.png"]
    assert "1 of 8 on this page" in notice(fresh)
    fresh.find_element("link text", "Show all images").click()
    wait_for(fresh, lambda: notice(fresh) == "")
    assert len(fresh.execute_script(VISIBLE)) == 11


@pytest.mark.slow
def test_a_class_shows_images_that_have_it_as_truth_or_prediction(fresh: Any) -> None:
    click(fresh, "class=class+3")
    wait_for(fresh, lambda: notice(fresh) != "")
    assert fresh.execute_script(VISIBLE) == MISTAKES
    click(fresh, "class=class+5")
    wait_for(fresh, lambda: "class 5" in notice(fresh))
    assert fresh.execute_script(VISIBLE) == []
    assert "this page shows none of them." in notice(fresh)


@pytest.mark.slow
def test_a_confusion_whose_images_are_not_there_says_so(fresh: Any) -> None:
    click(fresh, "truth=class+6&predicted=class+0")
    wait_for(fresh, lambda: notice(fresh) != "")
    assert "truth class 6, prediction class 0: this page shows none of them (there are 9)." in notice(fresh)


@pytest.mark.slow
def test_cells_work_with_the_keyboard(fresh: Any) -> None:
    fresh.execute_script("document.querySelector('.matrix .of-wrong a').focus()")
    fresh.switch_to.active_element.send_keys("\n")
    wait_for(fresh, lambda: notice(fresh) != "")
    assert fresh.execute_script(VISIBLE) == MISTAKES


@pytest.mark.slow
def test_a_long_gallery_is_opened_by_a_button(fresh: Any) -> None:
    fresh.execute_script("document.querySelector('button.more').click()")
    assert len(fresh.execute_script(VISIBLE)) == 15
    assert fresh.execute_script("return document.querySelector('button.more').hidden")


@pytest.mark.slow
def test_without_scripts_every_image_is_shown(browser: Any, page: Page, tmp_path: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(write_page(page, tmp_path).as_uri())
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert len(browser.execute_script(VISIBLE)) == 15
    assert notice(browser) == ""


@pytest.mark.slow
def test_a_table_is_sorted_by_its_headers(fresh: Any) -> None:
    images = "return [...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[1].innerText)"
    press = "document.querySelectorAll('.sortable th button')[1].click()"
    numbers = fresh.execute_script(images)
    assert len(numbers) == 7
    fresh.execute_script(press)
    assert fresh.execute_script(images) == numbers[::-1]
    fresh.execute_script(press)
    assert fresh.execute_script(images) == numbers


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` or `color(srgb r g b)`. Source: WCAG 2.1."""
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    channels = parts if colour.startswith("color(") else [part / 255 for part in parts]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
