"""leaderboard: order, columns, sizes of whole networks, the Pareto front, what a terminal and a figure show."""

import io
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnist_dist.search_config import BackboneSpace, SearchJob, SearchSpace, Trained
from mnist_dist.tuning.leaderboard import (
    SCHEMA,
    Speed,
    make_leaderboard,
    pareto_front,
    parquet_bytes,
    shown_rows,
)
from mnist_dist.tuning.space import architecture_of
from mnist_dist.tuning.trials import Status, Trial

JOB = SearchJob(
    space=SearchSpace(
        backbones=(
            BackboneSpace(backbone="mlp", trained=("all",)),
            BackboneSpace(backbone="mobilenet_v2", image_size_px=(32, 96), trained=("head", "fine-tune")),
        )
    )
)
SPEEDS = {
    "mlp": Speed(ms_per_image=0.25, backbone_parameters=9_000),
    "mobilenet_v2 32 px": Speed(ms_per_image=2.0, backbone_parameters=2_257_984),
}


def trial(number: int, accuracy: float | None, *, size_px: int | None = None, **fields: Any) -> Trial:
    """A trial of `mlp`, or of the other backbone where there is a size."""
    name, trained = ("mlp", "all") if size_px is None else ("mobilenet_v2", "head")
    params = {
        "backbone": name,
        f"{name}.alpha": 1.0,
        f"{name}.image_size_px": size_px,
        f"{name}.pooling": None,
        f"{name}.trained": trained,
        "hidden_units": 7,
        "dropout": 0.25,
        "label_smoothing": 0.1,
        "batch_size": 31,
        "learning_rate": 3e-3,
        "optimizer": "sgd",
    }
    status: Status = "done" if accuracy is not None else "failed"
    known = Trial(number=number, params=params, status=status, val_accuracy=accuracy, val_loss=0.5, parameters=110)
    return replace(known, **fields)


def table_of(trials: Iterable[Trial], *, finalists: Iterable[Trial] = (), winner: int | None = None) -> pa.Table:
    known = {one.number: one for one in trials}
    return make_leaderboard(
        known.values(),
        architectures={number: architecture_of(one.params, JOB) for number, one in known.items()},
        speeds=SPEEDS,
        finalists={one.number: one for one in finalists},
        winner=winner,
    )


TRIALS = (
    trial(0, 0.8, val_loss=0.7),
    trial(1, None, val_loss=None, parameters=None, error="out of memory"),
    trial(2, 0.9, size_px=32, epochs=4, seconds=1.5),
    trial(3, 0.8, val_loss=0.6, status="stopped"),
    trial(4, 0.95, size_px=96),
    trial(5, 0.8, val_loss=0.6),
)


def test_the_best_come_first_and_the_failed_last() -> None:
    table = table_of(TRIALS)
    assert table.schema == SCHEMA
    assert table["trial"].to_pylist() == [4, 2, 3, 5, 0, 1]
    assert table["rank"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert table["status"].to_pylist() == ["done", "done", "stopped", "done", "done", "failed"]
    assert table["error"].to_pylist() == [None] * 5 + ["out of memory"]


def test_a_row_holds_the_configuration_without_the_backbones_name() -> None:
    row = table_of(TRIALS).to_pylist()[1]
    assert row["architecture"] == "mobilenet_v2 32 px"
    assert (row["backbone"], row["alpha"], row["image_size_px"], row["pooling"]) == ("mobilenet_v2", 1.0, 32, None)
    assert (row["trained"], row["hidden_units"], row["dropout"], row["batch_size"]) == ("head", 7, 0.25, 31)
    assert (row["optimizer"], row["learning_rate"], row["weight_decay"]) == ("sgd", 3e-3, None)
    assert (row["epochs"], row["train_s"], row["ms_per_image"]) == (4, 1.5, 2.0)


def test_parameters_are_of_the_whole_network_where_that_is_known() -> None:
    parameters = dict(zip(*(table_of(TRIALS)[name].to_pylist() for name in ("trial", "parameters")), strict=True))
    assert parameters[0] == 110  # trained whole: counted as it is
    assert parameters[2] == 2_257_984 + 110  # a head, and the frozen backbone under it
    assert parameters[4] is None  # a head on a backbone that was not measured
    assert parameters[1] is None


@pytest.mark.parametrize("trained", ["head", "fine-tune"])
def test_a_head_counts_with_its_backbone_also_where_it_would_be_fine_tuned(trained: Trained) -> None:
    one = trial(2, 0.9, size_px=32)
    one = replace(one, params={**one.params, "mobilenet_v2.trained": trained})
    assert table_of([one])["parameters"].to_pylist() == [2_257_984 + 110]


def test_finalists_and_the_winner_are_marked() -> None:
    finalists = (trial(2, 0.91, val_loss=0.3), trial(4, None, val_loss=None))
    table = table_of(TRIALS, finalists=finalists, winner=2)
    assert table["finalist_val_accuracy"].to_pylist() == [None, 0.91, None, None, None, None]
    assert table["finalist_val_loss"].to_pylist() == [None, 0.3, None, None, None, None]
    assert table["winner"].to_pylist() == [False, True, False, False, False, False]
    assert table["val_accuracy"].to_pylist()[1] == 0.9


def test_the_front_is_of_accuracy_and_speed_of_what_was_measured() -> None:
    table = table_of(TRIALS)
    # 2 is the most accurate of those that were measured; 3, 5 and 0 are equally fast and accurate, whatever their loss
    assert {row["trial"] for row in table.to_pylist() if row["pareto"]} == {0, 2, 3, 5}


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ({}, set()),
        ({3: (0.5, 1.0)}, {3}),
        ({1: (0.9, 1.0), 2: (0.8, 2.0), 3: (0.7, 3.0)}, {1, 2, 3}),
        ({1: (0.9, 2.0), 2: (0.8, 1.0)}, {1}),
        ({1: (0.9, 1.0), 2: (0.9, 1.0)}, {1, 2}),
        ({1: (0.9, 1.0), 2: (0.9, 2.0)}, {2}),
        ({1: (0.8, 2.0), 2: (0.9, 2.0)}, {2}),
        ({1: (0.9, 1.0), 2: (0.8, 2.0), 3: (0.8, 1.5), 4: (0.85, 1.5), 5: (0.84, 0.5)}, {1, 2, 4}),
    ],
)
def test_the_front_is_what_nothing_else_beats(points: dict[int, tuple[float, float]], front: set[int]) -> None:
    assert pareto_front(points) == front


def test_the_file_is_parquet_with_the_same_rows() -> None:
    table = table_of(TRIALS, winner=2)
    assert pq.read_table(io.BytesIO(parquet_bytes(table))).equals(table)


def test_a_terminal_shows_a_line_for_each_trial_up_to_a_number() -> None:
    table = table_of(TRIALS, finalists=[trial(2, 0.9125)], winner=2)
    lines = shown_rows(table)
    assert len(lines) == 1 + len(TRIALS)
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[2][:3] == ["2*", "2", "0.9000 -> 0.9125"]
    assert "winner" in lines[2]
    assert "2,258,094" in lines[2]
    assert lines[2][-1] == "head, sgd 0.003, batch 31, 7 hidden, dropout 0.25, smoothing 0.1"
    assert lines[-1][2:6] == ["", "", "0.25", ""]
    assert shown_rows(table, most=2) == lines[:3]
    assert len(shown_rows(table_of(()))) == 1


def test_a_decay_is_shown_with_its_optimizer() -> None:
    one = trial(0, 0.5)
    one = replace(one, params={**one.params, "optimizer": "adamw", "weight_decay": 1e-4})
    assert "adamw 0.003 decay 0.0001" in shown_rows(table_of([one]))[1][-1]
