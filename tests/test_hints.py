"""What finished jobs propose to type: each hint is typed here. And figures that people can picture."""

import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from harness import ROOT, Recorder
from scored import multi_label_rows, one_hot, scored_rows, write_mark, write_scored

from mnist_dist import command_line
from mnist_dist.commands.quickstart import _what_was_made
from mnist_dist.commands.score import how_to_read
from mnist_dist.config import DataConfig
from mnist_dist.console import Stop
from mnist_dist.on_ray.data.prepare import _judge_bad_images
from mnist_dist.on_ray.scoring.plan import _balance
from mnist_dist.on_ray.training.plan import _balance as _balance_of_training
from mnist_dist.recipes import SEARCH_RECIPES, TRAINING_RECIPES
from mnist_dist.score_config import ScoreJob, TableConfig
from mnist_dist.scoring.predictions import Mark
from mnist_dist.session import Session, seconds_since, started_at

URIS = ["/photos/it's/1.png", "/photos/ä/2.png", "/photos/a b/3.png"]
NAMES = ("ant", "bee")


def typed(line: str) -> str:
    """What a line prints that a person types into a shell, from any folder."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, shell=True, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("folder", ["predictions", "it's here"])
def test_the_hints_of_a_table_show_its_predictions(tmp_path: Path, folder: str) -> None:
    output = write_scored(tmp_path / folder, scored_rows(URIS, one_hot([0, 1, 1], 2), NAMES))
    first, *others = how_to_read(output)
    shown = typed(first)
    assert shown.split()[:3] == ["uri", "predicted_class", "confidence"]
    assert all(uri in shown for uri in URIS)
    assert "0.8" in shown
    assert [typed(line).count("bee") for line in others] == [1]  # duckdb is installed for the tests


def test_a_table_without_some_columns_has_hints_that_leave_them_out(tmp_path: Path) -> None:
    rows = scored_rows(URIS, one_hot([0, 1, 1], 2), NAMES, table=TableConfig(columns=("confidence",)))
    (line,) = how_to_read(write_scored(tmp_path / "t", rows))
    assert typed(line).split()[:2] == ["uri", "confidence"]


def test_a_table_of_sets_shows_its_classes(tmp_path: Path) -> None:
    rows = multi_label_rows(["/1.png"], one_hot([1], 2), dict.fromkeys(NAMES, 0.5))
    assert "[bee]" in typed(how_to_read(write_scored(tmp_path / "t", rows))[0])


def test_a_table_in_a_bucket_is_read_without_packages_for_it(s3: str, tmp_path: Path) -> None:
    from mnist_dist.store.anywhere import ANYWHERE

    local = write_scored(tmp_path / "t", scored_rows(URIS, one_hot([0, 1, 1], 2), NAMES))
    ANYWHERE.upload_folder(Path(local), f"{s3}/t")
    (line,) = how_to_read(f"{s3}/t")
    assert "bee" in typed(line)


def test_a_delta_table_is_read_as_one(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake", reason="needs deltalake (pip install -e '.[dev]')")
    rows = scored_rows(URIS, one_hot([0, 1, 1], 2), NAMES)
    deltalake.write_deltalake(str(tmp_path / "delta"), rows)
    files = tuple(path.name for path in (tmp_path / "delta").glob("*.parquet"))
    write_mark(str(tmp_path), Mark(number=1, files=files, rows=3, model_id="m", failed=False, table_format="delta"))
    (line,) = how_to_read(str(tmp_path))
    assert typed(line).count("bee") == 2


def test_duckdb_is_proposed_only_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_scored(tmp_path / "t", scored_rows(URIS, one_hot([0, 1, 1], 2), NAMES))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (line,) = how_to_read(output)
    assert "pandas" in line


def test_the_quickstart_proposes_commands_that_exist(tmp_path: Path) -> None:
    output = write_scored(tmp_path / "it's" / "predictions", scored_rows(URIS, one_hot([0, 1, 1], 2), NAMES))
    bundle = str(tmp_path / "it's" / "bundle")
    trained = {"bundle": bundle, "test_accuracy": 0.9, "test_images": 9, "report": f"{bundle}/report.html"}
    text = _what_was_made(trained, {"output": output, "images": 3}, command="python -m jobs.")
    lines = [line.strip() for line in text.partition("Try next:\n")[2].splitlines()]
    recipes: dict[str, Any] = {"train": TRAINING_RECIPES, "search": SEARCH_RECIPES, "score": {"score": ScoreJob}}
    jobs = []
    for line in lines:
        if line.startswith("python -c "):
            typed(line)
            continue
        job, *arguments = shlex.split(line.removeprefix("python -m jobs."), comments=True)
        jobs.append(job)
        if arguments != ["--help"]:
            command_line.parse(recipes[job], command=job, default=job, argv=arguments)
    assert jobs == ["score", "train", "train", "search", "score"]


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "unit", "words"),
    [
        (0.017, "core of the model", "one core decodes enough for 59 cores of the model"),
        (0.4, "GPU", "one core decodes enough for 2.5 GPUs"),
        (0.97, "GPU", "one core decodes enough for one GPU"),
        (12.4, "GPU", "decoding for one GPU takes 12 cores"),
    ],
)
def test_the_balance_of_scoring_is_in_whole_things(cores: float, unit: str, words: str) -> None:
    assert _balance(cores, unit) == words


@pytest.mark.parametrize(
    ("cores", "unit", "words"),
    [
        (0.017, "", "with one core decoding takes 1/59 of the time of the rest"),
        (1.02, "", "with one core decoding takes as long as the rest"),
        (2.44, " per GPU", "with 2.4 cores per GPU decoding takes as long as the rest"),
    ],
)
def test_the_balance_of_training_is_in_whole_things(cores: float, unit: str, words: str) -> None:
    assert _balance_of_training(cores, unit) == words


def test_seconds_count_from_the_start_of_the_process_but_not_of_the_users_own(tmp_path: Path) -> None:
    program = """
import time
from mnist_dist.console import Console
from mnist_dist.session import started_at
print(time.time() - started_at(Console()), time.time() - started_at(Console(embedded=True)))
"""
    before = time.time()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    whole_s, own_s = map(float, done.stdout.split())
    assert own_s < whole_s <= time.time() - before + 0.02  # the kernel counts in hundredths
    assert seconds_since(started_at(Recorder())) > 0


def test_a_damaged_image_is_named_once_though_several_steps_meet_it() -> None:
    said = Recorder()
    session = Session(console=said, stop=Stop(said))
    index = pa.table(
        {"uri": ["a.png", "b.png", "c.png"], "status": ["empty", "ok", "failed"], "error": ["x", None, "y"]}
    )
    plan: Any = None  # it is needed only where there are too many
    for _ in range(2):
        assert _judge_bad_images(index, plan, DataConfig(max_bad_fraction=1.0), session) == 2
    assert said.lines == ["2 unreadable images are left out", "  a.png: empty: x", "  c.png: failed: y"]
