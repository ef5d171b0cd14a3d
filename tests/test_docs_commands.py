"""Every command of the pages: its flags are parsed here, and in the slow tier it is run, or a table says why not.

The commands of a page run in their order, as they are written, in a folder with small files of the names that the page
uses: `photos/`, `FOLDER`, `BUNDLE`, `truth.csv`, `s3://bucket/images`. Where a command would take minutes, flags are
added that make it shorter (`SHORTER`).
"""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import stand_ins
from doc_commands import PAGES, ROOT, Item, items_of
from harness import private_ray

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
_END_TO_END = "tests/test_end_to_end.py runs it"
_PLANS = "tests/test_plan.py runs plans"
_REHEARSALS = "tests/test_space_file.py runs the plan and the dry run of a search"
_WEIGHTS = "it downloads weights; tests/test_jobs.py runs such a recipe without them"
_FROZEN = "tests/test_imported_backbone.py trains and searches with such a backbone"
_METHODS = "tests/test_train.py trains with these methods"
_SETS = "tests/test_label_sets.py reads this form; the command with --class-columns is run"
NOT_RUN: dict[str, str] = {
    "python -m jobs.quickstart": _END_TO_END,
    "mnist-dist search search-digits  ": _END_TO_END,
    "mnist-dist search search-digits --data photos/ --backbone frozen ": _FROZEN,
    "mnist-dist search search-mnist --data photos/ --space space.toml --plan": _REHEARSALS,
    "mnist-dist search search-mnist --data photos/ --space space.toml --dry-run": _REHEARSALS,
    "mnist-dist search search-backbones ": "it downloads weights; tests/test_combine.py combines finalists",
    "mnist-dist train --data photos/ --backbone frozen ": _FROZEN,
    "mnist-dist train --data photos/ --plan": _PLANS,
    "mnist-dist train --data photos/ --augmentation ": _METHODS,
    "mnist-dist train --data photos/ --batch-size 256 ": _METHODS,
    "mnist-dist train --data photos/ --sampling ": _METHODS,
    "mnist-dist train folder-fine-tune --data photos/ --backbone convnext_tiny": _WEIGHTS,
    "mnist-dist train folder-mobilenet-v2 --data photos/ ": _WEIGHTS,
    "mnist-dist train folder-mobilenet-v2 --data images.parquet ": _SETS,
    "mnist-dist train folder-mobilenet-v2 --data list.csv --label-separator ": _SETS,
    "python -m jobs.train mnist-cnn --data-dir FOLDER_OF_IDX_FILES": "the program of docs/python.md does it",
    "python -m jobs.train --data FOLDER --name mine": "the same command of README.md is run",
    "python -m jobs.train folder-mobilenet-v2 ": _WEIGHTS,
    "python -m jobs.train folder-vgg16 ": _WEIGHTS,
    "mnist-dist import timm:": "it needs torch; tests/test_torch_models.py imports where there is one",
    "MLFLOW_TRACKING_URI=http://mlflow:5000 ": "it needs a server; tests/test_trackers.py logs to a local database",
}
"""Commands, by how they begin -> why they are not run."""
OPTIONAL = ("daft", "pyspark")
"""Packages without which a program is skipped: what other people use, and what no test installs."""
SHORTER: dict[str, str] = {
    "train": "--epochs 1",
    "search": "--trials 1 --trial-epochs 1 --finalists 1 --finalist-epochs 1",
}
"""Job -> flags that are added."""
SHORTER_STILL: dict[str, str] = {
    "mnist-dist train folder-fine-tune --backbone mobilenet_v2 ": "--weights none --image-size-px 32 --alpha 0.35",
    "mnist-dist train folder-mobilenet-v2 --data list.csv ": "--weights none --image-size-px 32 --dry-run",
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


RUN = [item for item in ITEMS if why_not_run(item) is None]


@pytest.mark.parametrize("item", [item for item in ITEMS if item.kind == "python"], ids=lambda item: item.place)
def test_a_program_is_python(item: Item) -> None:
    compile(item.text, item.place, "exec")


def test_what_is_not_run_still_stands_on_a_page() -> None:
    texts, programs = [item.text for item in ITEMS], {item.program for item in ITEMS}
    tables = (NOT_RUN, SHORTER_STILL)
    stale = [begin for table in tables for begin in table if not any(text.startswith(begin) for text in texts)]
    assert stale == []
    assert NOT_RUN_PROGRAMS.keys() <= programs
    assert stand_ins.OF_PAGE.keys() <= set(PAGES)
    assert SHORTER.keys() <= {item.job[0] for item in RUN if item.job is not None}


# --- the slow part ---------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def folder_of(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder in which the commands of a page run, one after the other."""

    @functools.cache
    def make(page: str) -> Path:
        folder = tmp_path_factory.mktemp("page") / "here"
        shutil.copytree(made, folder)
        more = stand_ins.OF_PAGE.get(page)
        if more is not None:
            more(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of one Ray for all pages but the README; where there is an S3 server, its workers know the way."""
    with contextlib.suppress(pytest.skip.Exception):
        request.getfixturevalue("buckets")
    with private_ray(num_cpus=2):
        yield ray.get_runtime_context().gcs_address


@pytest.mark.slow
@pytest.mark.parametrize("item", RUN, ids=lambda item: item.place)
def test_a_command_runs(
    item: Item, folder_of: Callable[[str], Path], programs: Path, request: pytest.FixtureRequest
) -> None:
    """Needs what the commands before it on the page made: `-k score.md` runs a page."""
    for package in OPTIONAL:
        if f"import {package}" in item.text or f"from {package}" in item.text:
            pytest.importorskip(package, reason=f"needs {package}; runs where it is installed")
    if "s3://" in item.text:
        request.getfixturevalue("buckets")
    address = {} if item.page == "README.md" else {"RAY_ADDRESS": request.getfixturevalue("cluster")}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true", **address}
    environment = {**os.environ, **settings}  # Ray has added its token when it started
    here = folder_of(item.page)
    done = subprocess.run(started(item), cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{item.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


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
