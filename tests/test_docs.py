"""The pages: the README's length and figures, and that what the pages name exists."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from mnist_dist import errors
from mnist_dist.commands import JOBS, kinds
from mnist_dist.flags import flags_of
from mnist_dist.recipes import SEARCH_RECIPES, TRAINING_RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_WORDS, MAX_FIGURES = 900, 5
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def words_of(page: str) -> list[str]:
    """Without code blocks and HTML tags."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", "", text).split()


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_short_and_begins_with_a_picture() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(words_of(readme)) <= MAX_WORDS
    assert any("<img" in line for line in readme.splitlines()[:9])


def test_the_figures_of_the_readme_are_those_of_the_performance_page() -> None:
    readme, performance = (ROOT / "README.md").read_text(), (ROOT / "docs" / "performance.md").read_text()
    module = script("figures")
    assert module.with_figures(readme, performance) == readme, "python docs/figures.py"
    assert 1 <= len(module.FIGURE.findall(readme)) <= MAX_FIGURES
    (first, *_) = module.FIGURE.findall(readme)
    assert module.with_figures(readme.replace(f"{first[0]}{first[2]}", f"{first[0]}0.0"), performance) == readme


def test_the_page_of_flags_is_what_its_script_writes() -> None:
    module = script("flags")
    written = module.page()
    assert (ROOT / "docs" / "flags.md").read_text() == written, "python docs/flags.py"
    for job, (kind, _) in kinds().items():
        section = written.split(f"\n## {job}\n", 1)[1].split("\n## ", 1)[0]
        missing = [flag.name for flag in flags_of(kind) if f"| `{flag.name}`" not in written]
        assert missing == [], job
        assert section.count("\n| ") > 2


def test_the_errors_that_the_questions_name_end_with_1() -> None:
    page = (ROOT / "docs" / "faq.md").read_text()
    names = re.findall(r"^\| `([A-Z]\w+)` \|", page, re.MULTILINE)
    assert len(names) > 4
    assert {getattr(errors, name).exit_code for name in names} == {1}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in (match[1] or match[2] for match in LINK.finditer(page.read_text())):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_jobs_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for job in set(re.findall(r"python -m jobs\.([a-z_]+)", text)):
        assert (ROOT / "jobs" / f"{job}.py").exists(), job
    for job in set(re.findall(r"^mnist-dist ([a-z]+)", text, re.MULTILINE)):
        assert job in JOBS, job


def test_every_recipe_is_described() -> None:
    training, search = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("training", "search"))
    assert {name for name in TRAINING_RECIPES if f"`{name}" not in training} == set()
    assert {name for name in SEARCH_RECIPES if f"`{name}`" not in search} == set()
