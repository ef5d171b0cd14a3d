"""What tests of several pages share: a real browser, and the parts of a page by a parser of HTML."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
VOID = {"meta", "link", "br", "img", "input", "hr", "use", "path"}


@contextmanager
def running_browser() -> Iterator[Any]:
    """A headless Chromium, driven by selenium; skips the test where there is none."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromedriver, which `.ci/run` installs from Debian")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def make_wide(browser: Any, width_px: int) -> None:
    """Makes the window so wide, also narrower than a headless browser's windows can be."""
    size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": width_px < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def cut_texts(browser: Any) -> list[str]:
    """The texts of which a part lies outside of the window, or of a box that hides it; of tables that scroll, too."""
    found: list[str] = browser.execute_script(
        """
        const cut = [];
        for (const element of document.querySelectorAll("main *")) {
          const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
          if (!own || element.closest("svg, .hidden, details:not([open]) pre")) continue;
          const box = element.getBoundingClientRect();
          if (!box.width || !box.height) continue;
          const isOutside = box.left < -1 || box.right > innerWidth + 1;
          const isBlock = getComputedStyle(element).display !== "inline";
          if (isOutside || isBlock && element.scrollWidth > element.clientWidth + 1)
            cut.push(element.textContent.trim().slice(0, 60));
        }
        return cut;
        """
    )
    return found


class Parts(HTMLParser):
    """The parts of a page: titles, ids, links, and the cells of its tables by the id of their section."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.ids: set[str] = set()
        self.links: dict[str, str] = {}
        """Text -> target."""
        self.tables: dict[str, list[list[str]]] = {}
        self.sorted: dict[str, str] = {}
        """Column that is marked as sorted -> how."""
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if attributes.get("id"):
            self.ids.add(str(attributes["id"]))
        if tag == "table":
            self.tables[self._section] = []
        elif tag == "tr":
            self.tables[self._section].append([])
        elif tag in ("td", "th"):
            self.tables[self._section][-1].append("")
        elif tag == "h1":
            self.titles.append("")
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        opened, _ = self.open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.open]
        if "style" in tags or "script" in tags:
            return
        text = data.replace("\N{NO-BREAK SPACE}", " ")
        self.text += text
        if "h1" in tags:
            self.titles[-1] += text
        if "td" in tags or "th" in tags:
            self.tables[self._section][-1][-1] += text
        for tag, attributes in self.open:
            if tag == "a":
                self.links[text] = str(attributes["href"])
            if tag == "th" and attributes.get("aria-sort"):
                self.sorted[text] = str(attributes["aria-sort"])

    @property
    def _section(self) -> str:
        return next(str(attrs.get("id", "")) for tag, attrs in reversed(self.open) if tag == "section")

    def column(self, table: str, name: str) -> list[str]:
        """The cells of a column, from top to bottom."""
        titles, *rows = self.tables[table]
        place = titles.index(name)
        return [row[place] for row in rows]


def write(folder: Path, name: str, page: str) -> str:
    """Writes a page; returns its URL."""
    path = folder / name
    path.write_text(page, encoding="utf-8")
    return path.as_uri()
