"""benchmarks race: what it draws and tabulates, and that each search really runs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.race import NAMES, RaceBenchmark, Racer, _best_at, measure, picture, table
from mnist_dist.console import Console
from mnist_dist.errors import ConfigError

ROWS: list[dict[str, Any]] = [
    {"racer": racer, "seed": seed, "seconds": 20.0, "trials": 4, "test_accuracy": 0.9 + seed / 100, "curve": curve}
    for racer in ("ours", "ray_tune")
    for seed, curve in enumerate(([(5.0, 0.5), (9.0, 0.4), (12.0, 0.8)], [(8.0, 0.6)]))
]


def test_the_best_so_far_never_falls_and_is_unknown_before_the_first() -> None:
    best = _best_at(ROWS[0]["curve"], np.array([1.0, 5.0, 10.0, 15.0]))
    assert np.isnan(best[0])
    assert best[1:].tolist() == [0.5, 0.5, 0.8]


def test_the_table_has_each_seed_and_the_mean() -> None:
    shown = table({"rows": ROWS, "machine": "m", "date": "2026-11-29"})
    assert "| search | test, seed 0 | test, seed 1 | mean | trials | s |" in shown
    assert f"| {NAMES['ray_tune']} | 90.00% | 91.00% | 90.50% | 4 | 20 |" in shown


def test_the_picture_is_an_svg_with_a_line_for_each_search() -> None:
    drawn = picture(ROWS)
    assert ElementTree.fromstring(drawn).tag.endswith("svg")


@pytest.mark.parametrize("fields", [{"seeds": ()}, {"minutes": 0.0}, {"images": 10}])
def test_a_race_that_cannot_be_run_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        RaceBenchmark(data_dir="nowhere", **fields)


@pytest.mark.chaos  # three searches, each for a minute and a half
@pytest.mark.timeout(1200)
def test_each_search_finds_a_network(mnist_dir: Path, tmp_path: Path) -> None:
    racers = tuple(racer for racer in get_args(Racer) if racer != "keras_tuner" or find_spec("keras_tuner"))
    drawn = tmp_path / "race.svg"
    race = RaceBenchmark(
        data_dir=str(mnist_dir),
        backbones=("mlp",),
        images=600,
        minutes=1.5,
        seeds=(3,),
        racers=racers,
        picture=str(drawn),
    )
    rows = measure(race, console=Console(terminal=False))["rows"]
    assert [row["racer"] for row in rows] == list(racers)
    for row in rows:
        assert row["trials"] >= 1
        assert row["test_accuracy"] > 0.5
        assert all(later[0] >= earlier[0] for earlier, later in zip(row["curve"], row["curve"][1:], strict=False))
    assert drawn.stat().st_size > 1_000
