"""Keyword arguments to configurations."""

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from mnist_dist import keywords
from mnist_dist.api import evaluate, export, score, search, train
from mnist_dist.config import TrainJob
from mnist_dist.errors import ConfigError
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.export_config import ExportJob
from mnist_dist.recipes import SEARCH_RECIPES, TRAINING_RECIPES, mnist_cnn
from mnist_dist.score_config import InputConfig, ScoreJob, ScoreRunConfig, TableConfig
from mnist_dist.search_config import SearchJob

SCORE = {"bundle": "b", "input": "i", "output": "o"}


def test_a_field_is_named_without_the_dataclass_that_it_lies_in() -> None:
    job = keywords.job_of(ScoreJob, {**SCORE, "top_k": 3, "actors": 2})
    inputs, table, run = InputConfig(input=("i",)), TableConfig(top_k=3), ScoreRunConfig(actors=2)
    assert job == ScoreJob(bundle="b", inputs=inputs, output="o", table=table, run=run)


def test_what_is_not_named_stays_as_the_base_has_it() -> None:
    base = mnist_cnn()
    job = keywords.job_of(TrainJob, {"seed": 9}, base=base)
    assert job.fit.seed == 9
    assert (job.model, job.phases, job.data) == (base.model, base.phases, base.data)
    assert keywords.job_of(TrainJob, {}, base=base) == base


@pytest.mark.parametrize("input", ["i", ["i"], ("i",), Path("i"), [Path("i")]])
def test_a_path_or_one_of_several_values_may_be_given_alone(input: Any) -> None:
    assert keywords.job_of(ScoreJob, {**SCORE, "input": input}).inputs.input == ("i",)


def test_lone_and_numpy_values_are_taken() -> None:
    given = {"epochs": 5, "learning_rate": np.float64(1e-3), "trainable": "head", "batch_size": np.int64(32)}
    job = keywords.job_of(TrainJob, given)
    assert (job.phases.epochs, job.phases.learning_rate, job.phases.trainable) == ((5,), (1e-3,), ("head",))
    assert (job.fit.batch_size, type(job.fit.batch_size)) == (32, int)
    assert keywords.job_of(TrainJob, {"epochs": np.array([2, 3]), "learning_rate": [1, 2]}).phases.epochs == (2, 3)


def test_a_field_without_a_flag_is_no_argument() -> None:
    job = keywords.job_of(SearchJob, {"backbones": ["cnn"]}, base=SEARCH_RECIPES["search-digits"]())
    assert job.search.backbones == ("cnn",)
    assert job.space == SEARCH_RECIPES["search-digits"]().space


@pytest.mark.parametrize("kind", [TrainJob, SearchJob, ScoreJob, EvaluateJob, ExportJob])
def test_each_argument_names_one_field(kind: Any) -> None:
    def names(kind: Any) -> list[str]:
        hints = typing.get_type_hints(kind, include_extras=True)
        return [
            name
            for field in dataclasses.fields(kind)
            if tyro.conf.Suppress not in getattr(hints[field.name], "__metadata__", ())
            for name in (names(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else [field.name])
        ]

    assert sorted(names(kind)) == sorted(keywords.fields_of(kind))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topk": 3}, r"no argument of that name \(did you mean top_k\?\). Received: 'topk'"),
        ({"zzzz": 3}, r"no argument of that name \(there are bundle, output, mode, "),
        ({"top_k": "three"}, r"top_k: Expected `int.*, got `str`. Received: top_k='three'"),
        ({"mode": "anew"}, r"mode: Invalid enum value 'anew'"),
        ({"actors": 0}, r"actors .*Received: actors=0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        keywords.job_of(ScoreJob, {**SCORE, **given})


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(ConfigError, match=r"missing argument: output"):
        keywords.job_of(ScoreJob, {"bundle": "b", "input": "i"})


@pytest.mark.parametrize(
    ("function", "kind"),
    [(train, TrainJob), (search, SearchJob), (score, ScoreJob), (evaluate, EvaluateJob), (export, ExportJob)],
)
def test_the_signature_of_a_function_names_every_flag(function: Any, kind: type) -> None:
    parameters = inspect.signature(function).parameters
    assert keywords.fields_of(kind).keys() <= parameters.keys()
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values())


@pytest.mark.parametrize("recipe", [*TRAINING_RECIPES, *SEARCH_RECIPES])
def test_every_recipe_survives_without_arguments(recipe: str) -> None:
    job = {**TRAINING_RECIPES, **SEARCH_RECIPES}[recipe]()
    assert keywords.job_of(type(job), {}, base=job) == job
