"""Every command of the pages: its flags are parsed here, and in the slow tier it is run, or a table says why not.

The commands of a page run in their order, as they are written, in a folder with small files of the names that the page
uses: `photos/`, `FOLDER`, `BUNDLE`, `truth.csv`, `s3://bucket/images`. Where a command would take minutes, flags are
added that make it shorter (`SHORTER`).
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import stand_ins
from doc_commands import PAGES, ROOT, Item, items_of

from benchmarks.__main__ import BENCHMARKS
from mnist_dist import command_line, inventory
from mnist_dist.commands import JOBS, kinds

ITEMS = [item for page in PAGES for item in items_of(page)]
COMMANDS = [item for item in ITEMS if item.kind in ("command", "inline")]

NOT_RUN_PROGRAMS = {
    "pip": "it would change the environment of the tests; .ci/run installs, and the extras are looked up here",
    "pytest": "it is what runs this",
    "for": "it runs tests",
    "nice": "tests/fuzz.py runs until its time is over",
    "ray": "it needs a cluster; tests/test_submit.py submits jobs, and tests/test_launch.py reads cluster.yaml",
    "python -m benchmarks": "it measures for minutes; tests/test_benchmarks.py runs them in small",
}
"""First words of commands -> why they are not run."""
NOT_RUN: dict[str, str] = {
    "MLFLOW_TRACKING_URI=http://mlflow:5000 ": "it needs a server; tests/test_trackers.py logs to a local database",
    "python -m jobs.train folder-vgg16 ": "eight workers, and weights to download; tests/test_train.py trains on S3",
    "python -m jobs.train folder-mobilenet-v2 ": "weights to download; the recipes are run by tests/test_recipes.py",
    "mnist-dist train folder-fine-tune --data photos/ --backbone convnext_tiny": "the same",
    "mnist-dist search search-backbones ": "weights of eight backbones to download; tests/test_combine.py combines",
}
"""Commands and programs, by how they begin -> why they are not run."""
SHORTER: dict[str, str] = {
    "train": "--epochs 1",
    "search": "--trials 1 --trial-epochs 1 --finalists 1 --finalist-epochs 1",
}
"""Job -> flags that are added."""
SHORTER_STILL: dict[str, str] = {
    "mnist-dist train folder-fine-tune --backbone mobilenet_v2 ": "--weights none --image-size-px 32 --alpha 0.35",
    "mnist-dist train --data photos/ --a": "--dry-run",
    "mnist-dist train --data photos/ --b": "--dry-run",
    "mnist-dist train --data photos/ --s": "--dry-run",
}
"""Commands, by how they begin -> flags that are added, too."""
SQL = "import duckdb, sys; [duckdb.sql(each).fetchall() for each in sys.argv[1].split(';') if each.strip()]"


# --- the quick part --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", COMMANDS, ids=lambda item: item.place)
def test_the_flags_of_a_command_are_those_of_its_job(
    item: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "before" / "mnist_dist").mkdir(parents=True)  # The checkout of `--other ../before`.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if item.program == "python -m benchmarks":
        command_line.parse(BENCHMARKS, argv=item.words[3:], command=item.program, default="train")
    if item.job is None:
        return
    job, arguments = item.job
    assert job in JOBS
    if "--help" in arguments or inventory.asked(item.program, arguments) is not None:
        return
    kind, recipes = kinds()[job]
    command_line.parse(
        recipes or {job: kind}, argv=arguments, command=item.program, default=next(iter(recipes), job), also=None
    )


def test_the_extras_that_pages_install_exist() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    named = set(re.findall(r"(?:'\.|mnist_dist)\[([a-z]+)\]'", text))
    assert named <= extras
    assert len(named) > 5


def why_not_run(item: Item) -> str | None:
    """Why an item is not run; None: it is."""
    if item.kind == "inline":
        return "its flags are parsed: it stands in the text, where it names a job, or a measurement of minutes"
    beginning = next((text for text in NOT_RUN if item.text.startswith(text)), None)
    return NOT_RUN_PROGRAMS.get(item.program) if beginning is None else NOT_RUN[beginning]


def test_what_is_not_run_still_stands_on_a_page() -> None:
    texts, programs = [item.text for item in ITEMS], {item.program for item in ITEMS}
    tables = (NOT_RUN, SHORTER_STILL)
    stale = [begin for table in tables for begin in table if not any(text.startswith(begin) for text in texts)]
    assert stale == []
    assert NOT_RUN_PROGRAMS.keys() <= programs
    assert stand_ins.OF_PAGE.keys() <= set(PAGES)


# --- the slow part ---------------------------------------------------------------------------------------------------

RUN = {page: [item for item in ITEMS if item.page == page and why_not_run(item) is None] for page in PAGES}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages name."""
    folder = tmp_path_factory.mktemp("made")
    stand_ins.make(folder)
    return folder


@pytest.fixture(scope="module")
def buckets(made: Path, s3_bucket: str) -> None:
    """What the pages name on S3."""
    stand_ins.make_buckets(made)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the commands `mnist-dist` and `python` of this environment and checkout."""
    folder = tmp_path_factory.mktemp("programs")
    for name, runs in (("mnist-dist", f"{sys.executable} -m mnist_dist"), ("python", sys.executable)):
        (folder / name).write_text(f'#!/bin/sh\nexec {runs} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, items in RUN.items() if items])
def test_the_commands_of_a_page_run(
    page: str, made: Path, programs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if any("s3://" in item.text for item in RUN[page]):
        request.getfixturevalue("buckets")
    here = tmp_path / "here"
    shutil.copytree(made, here)
    stand_ins.OF_PAGE.get(page, lambda folder: None)(here)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
    for item in RUN[page]:
        done = subprocess.run(started(item), cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{item.place}: {item.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def started(item: Item) -> list[str]:
    """The command line of the process that runs an item."""
    if item.kind == "python":
        return [sys.executable, "-c", item.text]
    if item.kind == "sql":
        return [sys.executable, "-c", SQL, item.text]
    text = " ".join(item.text.split("  #")[:1])
    added = [SHORTER.get(item.job[0], "")] if item.job else []
    added += [flags for begin, flags in SHORTER_STILL.items() if text.startswith(begin)]
    return ["bash", "-c", " ".join([text, *added])]
