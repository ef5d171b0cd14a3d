"""Made searches: trials whose accuracy follows from their settings by a known rule, for pages and importances."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from harness import an_epoch

from mnist_dist.evaluation.search_page import FinalTest, SearchFacts
from mnist_dist.search_config import BackboneSpace, SearchJob, SearchSpace
from mnist_dist.tuning.leaderboard import Speed, make_leaderboard
from mnist_dist.tuning.space import architecture_of
from mnist_dist.tuning.trials import Status, Trial, usable

JOB = SearchJob(
    space=SearchSpace(
        backbones=(
            BackboneSpace(backbone="mlp", trained=("all",)),
            BackboneSpace(backbone="cnn", trained=("all",)),
            BackboneSpace(backbone="cnn_bn", trained=("all",)),
            BackboneSpace(backbone="mobilenet_v2", weights="imagenet", image_size_px=(96, 160), alpha=(0.5, 1.0)),
        )
    )
)
ABILITY = {"mlp": 0.93, "cnn": 0.955, "cnn_bn": 0.965, "mobilenet_v2": 0.97}
"""The accuracy of each backbone with the best learning rate."""
BEST_RATE = 3e-3
SPEEDS = {
    "mlp": Speed(ms_per_image=0.0078, backbone_parameters=9_000),
    "cnn": Speed(ms_per_image=0.031, backbone_parameters=50_000),
    "cnn_bn": Speed(ms_per_image=0.065, backbone_parameters=120_000),
    "mobilenet_v2 x0.5 96 px": Speed(ms_per_image=1.7, backbone_parameters=706_224),
    "mobilenet_v2 x0.5 160 px": Speed(ms_per_image=4.4, backbone_parameters=706_224),
    "mobilenet_v2 96 px": Speed(ms_per_image=3.2, backbone_parameters=2_257_984),
    "mobilenet_v2 160 px": Speed(ms_per_image=8.1, backbone_parameters=2_257_984),
}


def made_trials(count: int, *, seed: int = 0, noise: float = 0.004) -> dict[int, Trial]:
    """Trials whose accuracy depends on the backbone and, far more, on the learning rate, but not on the dropout or the
    batch size. Every ninth fails; of the others every third is stopped early."""
    random = np.random.default_rng(seed)
    return {number: _made_trial(number, random, noise=noise) for number in range(count)}


def _made_trial(number: int, random: np.random.Generator, *, noise: float) -> Trial:
    backbone = list(ABILITY)[number % len(ABILITY)]
    optimizer = str(random.choice(["adam", "adamw", "sgd"]))
    has_width = backbone == "mobilenet_v2"
    params: dict[str, Any] = {
        "backbone": backbone,
        f"{backbone}.alpha": float(random.choice([0.5, 1.0])) if has_width else 1.0,
        f"{backbone}.image_size_px": int(random.choice([96, 160])) if has_width else None,
        f"{backbone}.pooling": None,
        f"{backbone}.trained": "head" if has_width else "all",
        "hidden_units": 0,
        "dropout": float(random.choice([0.0, 0.25, 0.5])),
        "label_smoothing": 0.1,
        "batch_size": int(random.choice([32, 64])),
        "learning_rate": float(10 ** random.uniform(-4.5, -0.5)),
        "optimizer": optimizer,
    }
    if optimizer == "adamw":
        params["weight_decay"] = float(10 ** random.uniform(-5, -2))
    distance = abs(math.log10(params["learning_rate"] / BEST_RATE))
    accuracy = round(float(ABILITY[backbone] - 0.06 * distance + random.normal(0, noise)), 4)
    status: Status = "failed" if number % 9 == 8 else "stopped" if number % 3 == 2 else "done"
    trial = Trial(
        number=number,
        params=params,
        status=status,
        val_accuracy=accuracy,
        val_loss=round(1 - accuracy, 4),
        epochs=3 if status == "stopped" else 10,
        parameters=12_810 if has_width else SPEEDS[backbone].backbone_parameters,
        seconds=round(12 + 3 * float(random.random()), 1),
        ended_s=round(40 + 15 * number + 9 * float(random.random()), 1),
    )
    if status == "failed":
        error = "phase 'train', epoch 1: the loss is no number (nan)"
        return replace(trial, val_accuracy=None, val_loss=None, epochs=0, error=error)
    return trial


def made_board(
    trials: Mapping[int, Trial], finalists: Mapping[int, Trial], *, winner: int | None = None, measured: bool = True
) -> pa.Table:
    """The leaderboard of made trials."""
    return make_leaderboard(
        trials.values(),
        architectures={number: architecture_of(trial.params, JOB) for number, trial in trials.items()},
        speeds=SPEEDS if measured else {},
        finalists=finalists,
        winner=winner,
    )


def made_finalists(trials: Sequence[Trial], *, gain: float = 0.008, after_s: float) -> dict[int, Trial]:
    """The trials as finalists, each a little more accurate."""
    return {
        trial.number: replace(
            trial,
            status="done",
            val_accuracy=round((trial.val_accuracy or 0.0) + gain, 4),
            epochs=15,
            seconds=61.5,
            ended_s=after_s + 70.0 * (place + 1),
        )
        for place, trial in enumerate(trials)
    }


def made_search(count: int = 40, *, is_finished: bool = True, name: str = "made", **fields: Any) -> SearchFacts:
    """The facts of a search with made trials; `fields` replace some of them."""
    trials = made_trials(count)
    best = usable(trials.values())[:3]
    finalists = made_finalists(best, after_s=max(t.ended_s or 0.0 for t in trials.values()))
    winner: int | None = usable(finalists.values())[0].number
    if not is_finished:
        finalists, winner = {}, None
    facts = SearchFacts(
        name=name,
        uri=f"s3://bucket/runs/{name}",
        recipe="search-mnist",
        command="python -m jobs.search search-mnist --trials 40",
        planned=count,
        trials=trials,
        finalists=finalists,
        leaderboard=made_board(trials, finalists, winner=winner, measured=is_finished),
        worked_s=905.0,
        validation_images=1_000,
        winner=winner,
        tested=FinalTest(accuracy=0.975, loss=0.081, images=2_000) if winner is not None else None,
        histories={
            number: [an_epoch(epoch, val_accuracy=(trial.val_accuracy or 0.0) - 0.2 / epoch) for epoch in range(1, 16)]
            for number, trial in finalists.items()
        },
        links={
            number: f"finalists/{number:06d}/{'bundle/report.html' if number == winner else 'history.csv'}"
            for number in finalists
        },
        settings={"search": {"trials": count}},
    )
    return replace(facts, **fields)
