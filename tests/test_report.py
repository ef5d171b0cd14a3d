"""The page of a report: everything on it, nothing beside it, nothing from outside that is run, in a real browser."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from harness import an_epoch

from mnist_dist.evaluation import figures
from mnist_dist.evaluation.report import Example, Gallery, Headline, Page, Shown, Table, picture, render, write_page
from mnist_dist.models.history import Epoch

NAMES = [f"class {number}" for number in range(7)]
HOSTILE = "<script>alert(1)</script>.png"


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
    wide = ("training_curves", "class_distribution")
    return [
        Shown(name=name, title=name, alt=f"alt of {name}", figure=figure, wide=name in wide)
        for name, figure in drawn.items()
    ]


@pytest.fixture(scope="module")
def page() -> Page:
    examples = [
        Example(name=HOSTILE, predicted="<b>1</b>", confidence=0.91, truth="2 & 3", pixels=some_pixels(28, 28, 1)),
        Example(name="wide/" + "x" * 200, predicted="4", confidence=0.5, truth="4", pixels=some_pixels(60, 300, 3)),
        Example(name="gone.png", predicted="5", confidence=None),
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
        galleries=[Gallery(title="Mistakes", examples=examples), Gallery(title="Nothing", examples=[])],
        tables=[
            Table(
                title="Per class", columns=("class", "images", "F1"), rows=[(name, "1,024", "0.99") for name in NAMES]
            )
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
    for channels in (1, 3):
        assert picture(some_pixels(height_px, width_px, channels)).startswith("data:image/png;base64,")


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


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromedriver, which `.ci/run` installs from Debian")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def opened(browser: Any, page: Page, tmp_path_factory: pytest.TempPathFactory) -> Any:
    browser.get(write_page(page, tmp_path_factory.mktemp("page")).as_uri())
    return browser


def width_of(browser: Any, width_px: int) -> None:
    """Makes the window so wide, also narrower than a headless browser's windows can be."""
    size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": width_px < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.mark.slow
@pytest.mark.parametrize("width_px", [390, 1400])
def test_nothing_is_wider_than_the_window(opened: Any, width_px: int) -> None:
    width_of(opened, width_px)
    assert opened.execute_script("return window.innerWidth") == width_px
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width_px


@pytest.mark.slow
@pytest.mark.parametrize("width_px", [390, 1400])
def test_figures_and_pictures_are_there(opened: Any, page: Page, width_px: int) -> None:
    width_of(opened, width_px)
    boxes = opened.execute_script(
        "return [...document.querySelectorAll('.figures svg')].map(e => [e.getBoundingClientRect().width,"
        " e.getBoundingClientRect().height])"
    )
    assert len(boxes) == len(page.figures)
    assert min(min(box) for box in boxes) > 150
    sizes = opened.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert len(sizes) == 2
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
        style = "getComputedStyle(document.querySelector('section'))"
        shown.append(opened.execute_script(f"return [{style}.color, {style}.backgroundColor]"))
        text, back = (luminance(colour) for colour in shown[-1])
        assert (max(text, back) + 0.05) / (min(text, back) + 0.05) >= 7  # WCAG 2.1, level AAA
    assert shown[0] != shown[1]


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`. Source: WCAG 2.1."""
    channels = [int(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
