"""recipes: each builds, is what its command says, and fits its backbone."""

import dataclasses
import inspect
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mnist_dist import command_line, recipes
from mnist_dist.config import TrainJob
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.backbones import backbone_size_px, check_model, check_trainable, find_backbone
from mnist_dist.models.classifier import build_classifier, set_trainable
from mnist_dist.recipes import SEARCH_RECIPES, TRAINING_RECIPES

NAMED = pytest.mark.parametrize("name", list(TRAINING_RECIPES))


def command_of(recipe: Callable[[], TrainJob]) -> list[str]:
    """The command in the recipe's docstring, up to the colon, in words."""
    return shlex.split((recipe.__doc__ or "").partition(":")[0])


def with_flags(job: TrainJob, flags: list[str]) -> TrainJob:
    """The job with `--some-field value` set in the section that has such a field."""
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        field = flag.removeprefix("--").replace("-", "_")
        (section,) = (s.name for s in dataclasses.fields(job) if hasattr(getattr(job, s.name), field))
        values = (value,) if isinstance(getattr(getattr(job, section), field), tuple) else value
        changed: Any = replace(getattr(job, section), **{field: values})
        job = replace(job, **{section: changed})
    return job


@NAMED
def test_the_command_in_a_recipes_docstring_gives_its_job(name: str) -> None:
    recipe = TRAINING_RECIPES[name]
    *program, named = command_of(recipe)[:4]
    flags = command_of(recipe)[4:]
    assert " ".join(program) == "python -m jobs.train"
    assert named == name
    parsed = command_line.parse(
        TRAINING_RECIPES, command="python -m jobs.train", default="quickstart", argv=[name, *flags]
    )
    assert parsed == (name, with_flags(recipe(), flags))


@NAMED
def test_a_recipe_says_what_to_expect(name: str) -> None:
    docstring = TRAINING_RECIPES[name].__doc__ or ""
    assert len(docstring.partition(":")[2].split()) >= 5


def test_every_public_function_is_a_recipe_under_its_own_name() -> None:
    functions = {
        function.__name__.replace("_", "-"): function
        for function in vars(recipes).values()
        if inspect.isfunction(function) and function.__module__ == recipes.__name__ and function.__name__[0] != "_"
    }
    assert functions == {**TRAINING_RECIPES, **SEARCH_RECIPES}


@NAMED
def test_a_recipe_fits_its_backbone(name: str) -> None:
    job = TRAINING_RECIPES[name]()
    backbone = check_model(job.model)
    for phase in job.phases.in_order():
        check_trainable(backbone, phase.trainable)


@NAMED
def test_each_phase_of_a_recipe_trains_more_than_the_one_before(name: str) -> None:
    job = TRAINING_RECIPES[name]()
    size_px = backbone_size_px(job.model)
    spec = ImageSpec(
        height_px=size_px, width_px=size_px, channels=1 if find_backbone(job.model.backbone).scratch else 3
    )
    classifier = build_classifier(replace(job.model, weights="none"), spec=spec, num_classes=3)
    trained = []
    for phase in job.phases.in_order():
        set_trainable(classifier, phase.trainable)
        trained.append(len(classifier.network.trainable_variables))
    assert trained == sorted(set(trained))
    assert 0 < trained[0] <= trained[-1] <= len(classifier.network.weights)


def test_no_two_recipes_have_the_same_settings() -> None:
    hashes = [recipe().settings_hash() for recipe in TRAINING_RECIPES.values()]
    assert len(set(hashes)) == len(hashes)
