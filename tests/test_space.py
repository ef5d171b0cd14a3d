"""space: what is drawn belongs together, the same seed draws the same, and what is wrong is told before any trial."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from mnist_dist.config import TrainJob
from mnist_dist.errors import ConfigError
from mnist_dist.recipes import SEARCH_RECIPES, search_backbones
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchSpace, Trained
from mnist_dist.tuning.space import (
    Architecture,
    GridDraw,
    Proposer,
    architecture_of,
    architectures_of,
    check_space,
    describe,
    train_job,
)

Algorithm = Literal["tpe", "random"]
ALGORITHMS: tuple[Algorithm, ...] = ("tpe", "random")
DRAWS = 60

MLP = BackboneSpace(backbone="mlp", trained=("all",))
MOBILENET = BackboneSpace(
    backbone="mobilenet_v2",
    alpha=(0.35,),
    image_size_px=(32, 48),
    pooling=("avg", "max"),
    trained=("head", "fine-tune"),
    cut_points=("block13", "all", "7"),
)
SMALL = SearchJob(
    space=SearchSpace(
        backbones=(MLP, MOBILENET),
        hidden_units=(0, 5),
        dropout=(0.1,),
        optimizer=("sgd", "adamw"),
        learning_rate=(1e-3, 1e-3),
        fine_tune_learning_rate=(1e-6, 1e-4),
        weight_decay=(1e-5, 1e-3),
        label_smoothing=(0.0,),
        augmentation=("none", "digits"),
        batch_size=(64,),
    ),
    search=SearchConfig(trial_epochs=4, finalist_epochs=7, fine_tune_epochs=3, seed=11),
)


def drawn(job: SearchJob, algorithm: Algorithm, *, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many proposals, each told a value before the next one is asked for."""
    proposer = Proposer(replace(job, search=replace(job.search, algorithm=algorithm, trials=count, seed=seed)))
    found = []
    for number in range(count):
        found.append(proposer.propose(number))
        proposer.tell(number, value_of(number))
    return found


def value_of(number: int) -> float | None:
    """An accuracy that depends on the number alone; None: failed."""
    return None if number % 7 == 5 else (number * 37 % 101) / 101


@pytest.mark.parametrize("recipe", SEARCH_RECIPES)
def test_every_combination_of_a_recipe_fits_its_backbones(recipe: str) -> None:
    job = SEARCH_RECIPES[recipe]()
    check_space(job)
    names = tuple(space.backbone for space in job.space.backbones)
    without_weights = replace(job.search, weights=tuple(f"{name}=none" for name in names))
    check_space(replace(job, search=without_weights))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_proposal_holds_only_what_belongs_to_it_with_values_of_the_space(algorithm: Algorithm, seed: int) -> None:
    job = search_backbones()
    spaces = {space.backbone: space for space in job.space.backbones}
    for params in drawn(job, algorithm, count=DRAWS, seed=seed):
        space = spaces[params["backbone"]]
        check_belongs(params, space)
        check_values(params, space, job.space)
        train_job(params, job, stage="finalist")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_mixed_space_draws_each_parameter_only_where_it_means_something(algorithm: Algorithm) -> None:
    spaces = {"mlp": MLP, "mobilenet_v2": MOBILENET}
    proposals = drawn(SMALL, algorithm, count=DRAWS)
    for params in proposals:
        check_belongs(params, spaces[params["backbone"]])
        check_values(params, spaces[params["backbone"]], SMALL.space)
    assert {params["backbone"] for params in proposals} == spaces.keys()
    assert {params["optimizer"] for params in proposals} == {"sgd", "adamw"}
    assert {params.get("mobilenet_v2.trained") for params in proposals} == {None, "head", "fine-tune"}


def check_belongs(params: dict[str, Any], space: BackboneSpace) -> None:
    name = space.backbone
    trained = params[f"{name}.trained"]
    own = {key for key in params if "." in key}
    always = {f"{name}.{field}" for field in ("alpha", "image_size_px", "pooling", "trained")}
    assert own == always | ({f"{name}.cut_point"} if trained == "fine-tune" else set())
    assert ("fine_tune_learning_rate" in params) == (trained == "fine-tune")
    assert ("weight_decay" in params) == (params["optimizer"] == "adamw")
    assert ("augmentation" in params) == (trained == "all")


def check_values(params: dict[str, Any], space: BackboneSpace, shared: SearchSpace) -> None:
    choices: dict[str, Sequence[Any]] = {
        **{f"{space.backbone}.{field}": getattr(space, field) for field in ("alpha", "image_size_px", "pooling")},
        f"{space.backbone}.trained": space.trained,
        f"{space.backbone}.cut_point": space.cut_points,
        **{
            field: getattr(shared, field)
            for field in ("hidden_units", "dropout", "optimizer", "label_smoothing", "augmentation", "batch_size")
        },
    }
    ranges = {field: getattr(shared, field) for field in ("learning_rate", "fine_tune_learning_rate", "weight_decay")}
    for key, value in params.items():
        if key in ranges:
            assert ranges[key][0] <= value <= ranges[key][1], key
        elif key != "backbone":
            assert value in choices[key], key


def test_learning_rates_are_drawn_log_uniformly_between_the_ends() -> None:
    low, high = 1e-5, 1e-1
    job = replace(SMALL, space=replace(SMALL.space, backbones=(MLP,), learning_rate=(low, high)))
    rates = np.sort([params["learning_rate"] for params in drawn(job, "random", count=300)])
    assert low <= rates[0] < rates[-1] <= high
    places = np.log(rates / low) / math.log(high / low)
    distance = np.abs(places - (np.arange(300) + 0.5) / 300).max()
    assert distance < 0.094  # Kolmogorov-Smirnov, 300 values, level 1 %


def test_the_grid_is_every_combination_once() -> None:
    proposals = list(GridDraw().proposals(SMALL))
    rest = 2 * (1 + 3)  # hidden units; sgd, or adamw with both ends and the middle of its decay
    mlp = 2  # augmentations
    mobilenet = 2 * 2 * (1 + 3 * 3)  # sizes, poolings; head, or three cut points with three rates
    assert len(proposals) == (mlp + mobilenet) * rest == 336
    assert len({repr(sorted(params.items(), key=lambda item: item[0])) for params in proposals}) == 336
    assert sorted({params["weight_decay"] for params in proposals if "weight_decay" in params}) == pytest.approx(
        [1e-5, 1e-4, 1e-3]
    )
    for params in proposals:
        check_belongs(params, MLP if params["backbone"] == "mlp" else MOBILENET)


def test_the_grid_ends_where_the_space_or_the_trials_end() -> None:
    grid = replace(SMALL, search=replace(SMALL.search, algorithm="grid"))
    few = Proposer(replace(grid, search=replace(grid.search, trials=9)))
    assert few.count == 9
    assert [few.propose(number) for number in range(9)] == list(GridDraw().proposals(SMALL))[:9]
    assert Proposer(replace(grid, search=replace(grid.search, trials=1_000))).count == 336


def test_a_space_of_one_combination_is_a_grid_of_one() -> None:
    space = SearchSpace(
        backbones=(MLP,),
        hidden_units=(3,),
        dropout=(0.2,),
        optimizer=("adam",),
        learning_rate=(1e-3, 1e-3),
        label_smoothing=(0.1,),
        batch_size=(17,),
    )
    (params,) = GridDraw().proposals(SearchJob(space=space))
    assert params["learning_rate"] == 1e-3
    assert params["batch_size"] == 17


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_seed_proposes_the_same_and_another_one_does_not(algorithm: Algorithm) -> None:
    first = drawn(SMALL, algorithm, count=25, seed=3)
    assert drawn(SMALL, algorithm, count=25, seed=3) == first
    assert drawn(SMALL, algorithm, count=25, seed=4) != first


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("known", [1, 9, 21])
def test_what_is_proposed_after_a_killed_driver_is_what_it_would_have_proposed(
    algorithm: Algorithm, known: int
) -> None:
    undisturbed = drawn(SMALL, algorithm, count=known + 3, seed=3)
    job = replace(SMALL, search=replace(SMALL.search, algorithm=algorithm, trials=known + 3, seed=3))
    again = Proposer(job)
    for number in range(known):
        assert again.propose(number, undisturbed[number]) == undisturbed[number]
        again.tell(number, value_of(number))
    for number in range(known, known + 3):
        assert again.propose(number) == undisturbed[number]
        again.tell(number, value_of(number))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_unfinished_trial_in_the_middle_is_proposed_again_and_changes_nothing_after_it(algorithm: Algorithm) -> None:
    known, unfinished = 16, 6
    job = replace(SMALL, search=replace(SMALL.search, algorithm=algorithm, trials=known + 1, seed=3))

    def next_after(history: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """All trials but one are told; it is told last, before the next one is asked for."""
        proposer = Proposer(job)
        proposals = [proposer.propose(n, history[n] if history else None) for n in range(known)]
        for number in (*(n for n in range(known) if n != unfinished), unfinished):
            proposer.tell(number, value_of(number))
        return proposals, proposer.propose(known)

    proposals, following = next_after(None)
    assert next_after(proposals) == (proposals, following)


PHASES: list[tuple[Trained, str, tuple[int, ...], tuple[float, ...], tuple[str, ...]]] = [
    ("all", "trial", (4,), (1e-3,), ("all",)),
    ("all", "finalist", (7,), (1e-3,), ("all",)),
    ("head", "trial", (4,), (1e-3,), ("head",)),
    ("head", "finalist", (4,), (1e-3,), ("head",)),
    ("fine-tune", "trial", (4,), (1e-3,), ("head",)),
    ("fine-tune", "finalist", (4, 3), (1e-3, 2e-6), ("head", "block13")),
]


def params_of(trained: Trained) -> dict[str, Any]:
    """A proposal written by hand."""
    more: dict[Trained, dict[str, Any]] = {
        "all": {"augmentation": "digits"},
        "head": {},
        "fine-tune": {"mobilenet_v2.cut_point": "block13", "fine_tune_learning_rate": 2e-6},
    }
    return {
        "backbone": "mobilenet_v2",
        "mobilenet_v2.alpha": 0.35,
        "mobilenet_v2.image_size_px": 48,
        "mobilenet_v2.pooling": "max",
        "mobilenet_v2.trained": trained,
        "hidden_units": 5,
        "dropout": 0.1,
        "label_smoothing": 0.2,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "optimizer": "adamw",
        "weight_decay": 3e-4,
        **more[trained],
    }


@pytest.mark.parametrize(("trained", "stage", "epochs", "rates", "trainable"), PHASES)
def test_a_stage_trains_what_its_proposal_says(
    trained: Trained,
    stage: Literal["trial", "finalist"],
    epochs: tuple[int, ...],
    rates: tuple[float, ...],
    trainable: tuple[str, ...],
) -> None:
    phases = train_job(params_of(trained), SMALL, stage=stage).phases
    assert (phases.epochs, phases.learning_rate, phases.trainable) == (epochs, rates, trainable)
    assert len(phases.in_order()) == len(epochs)


def test_a_training_job_carries_every_value_of_its_proposal() -> None:
    weights = replace(SMALL.search, weights=("mobilenet_v2=my/base.weights.h5",))
    made: TrainJob = train_job(params_of("all"), replace(SMALL, search=weights), stage="trial")
    model, optimizer, fit = made.model, made.optimizer, made.fit
    assert (model.backbone, model.weights) == ("mobilenet_v2", "my/base.weights.h5")
    assert (model.alpha, model.image_size_px, model.pooling) == (0.35, 48, "max")
    assert (model.hidden_units, model.dropout) == (5, 0.1)
    assert (optimizer.optimizer, optimizer.weight_decay, optimizer.label_smoothing) == ("adamw", 3e-4, 0.2)
    assert (fit.batch_size, fit.augmentation, fit.seed) == (64, "digits", 11)
    assert train_job(params_of("head"), SMALL, stage="trial").fit.augmentation == "none"


def test_an_architecture_is_what_features_depend_on_and_all_of_a_backbone_have_names_of_their_own() -> None:
    expected = Architecture(backbone="mobilenet_v2", weights="none", alpha=0.35, image_size_px=48, pooling="max")
    assert architecture_of(params_of("head"), SMALL) == expected
    assert expected.name == "mobilenet_v2 x0.35 48 px max"
    all_of_them = architectures_of(replace(MOBILENET, alpha=(0.35, 1.0)))
    assert len({one.name for one in all_of_them}) == len(all_of_them) == 8
    assert expected in all_of_them


def test_a_proposal_is_described_in_a_line() -> None:
    line = describe(params_of("fine-tune"))
    assert "\n" not in line
    for words in ("mobilenet_v2", "48", "max", "fine-tune", "block13", "5", "64", "0.001", "adamw", "0.0003"):
        assert words in line


def searched(*, search: dict[str, Any] | None = None, **space: Any) -> SearchJob:
    """The small job with other fields."""
    return replace(
        SMALL, space=replace(SMALL.space, **space), search=replace(SMALL.search, **(search or {"trials": 3}))
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbones": ()}, r"^the space needs at least one backbone\. Received: backbones=\(\)$"),
        (
            {"search": {"backbones": ("mobilenet_v3",)}},
            r"this search are mlp, mobilenet_v2 \(did you mean mobilenet_v2\?\)\. Received: backbone='mobilenet_v3'$",
        ),
        ({"search": {"backbones": ("mlp", "vgg16")}}, r"backbones of this search are mlp, mobilenet_v2\. .*'vgg16'$"),
        ({"search": {"weights": ("mlpp=none",)}}, r"did you mean mlp\?\)\. Received: backbone='mlpp'$"),
        ({"search": {"weights": ("mlp",)}}, r"^weights must be given as backbone=PATH\. Received: weights='mlp'$"),
        ({"search": {"weights": ("mlp=",)}}, r"^weights must be given as backbone=PATH\. Received: weights='mlp'$"),
        ({"search": {"weights": ("mlp=imagenet",)}}, r"^weights for mlp must be none"),
        ({"backbones": (BackboneSpace(backbone="vgg17"),)}, r"vgg16.*Received: .*'vgg17'"),
        ({"backbones": (replace(MLP, pooling=(None, "avg")),)}, r"^mlp gives a vector and takes no pooling"),
        ({"backbones": (replace(MLP, alpha=(1.0, 0.5)),)}, r"^only .* take alpha, not mlp\. Received: alpha=0\.5$"),
        ({"backbones": (replace(MOBILENET, image_size_px=(32, 9)),)}, r"at least 32 px.*9"),
        (
            {"backbones": (replace(MOBILENET, cut_points=("all", "block99")),)},
            r"^trainable for mobilenet_v2 must be one of head, all, .*Received: trainable='block99'$",
        ),
        ({"dropout": (0.0, 1.0)}, r"^dropout must be in \[0, 1\)\. Received: dropout=1\.0$"),
        ({"hidden_units": (5, 7, -1)}, r"^hidden_units must be 0 .* or a width\. Received: hidden_units=-1$"),
        ({"label_smoothing": (0.0, 0.1, 1.5)}, r"^label_smoothing must be in \[0, 1\)"),
        ({"batch_size": (64, 0)}, r"^batch_size must be at least 1 image\. Received: batch_size=0$"),
    ],
)
def test_a_space_that_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    job = searched(**fields)
    with pytest.raises(ConfigError, match=message):
        check_space(job)


def test_cut_points_count_only_where_something_is_fine_tuned() -> None:
    check_space(searched(backbones=(replace(MOBILENET, trained=("head",), cut_points=("block99",)),)))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (SearchConfig, {"trials": 0}, r"^trials must be at least 1\. Received: trials=0$"),
        (SearchConfig, {"finalists": 0}, r"^finalists must be at least 1\. Received: finalists=0$"),
        (SearchConfig, {"trial_epochs": 0}, r"^trial_epochs must be at least 1"),
        (SearchConfig, {"hours": 0.0}, r"^hours must be positive\. Received: hours=0\.0$"),
        (SearchConfig, {"hours": -1.0}, r"^hours must be positive\. Received: hours=-1\.0$"),
        (SearchConfig, {"seed": -1}, r"^seed must be 0 or above\. Received: seed=-1$"),
        (
            SearchSpace,
            {"learning_rate": (1e-2, 1e-4)},
            r"^learning_rate must be a lowest and a highest .*\(0\.01, 0\.0001\)$",
        ),
        (SearchSpace, {"weight_decay": (0.0, 1e-4)}, r"^weight_decay must be a lowest and a highest value above 0"),
        (SearchSpace, {"fine_tune_learning_rate": (float("nan"), 1.0)}, r"^fine_tune_learning_rate must be a lowest"),
        (SearchSpace, {"optimizer": ()}, r"^optimizer needs at least one value\. Received: optimizer=\(\)$"),
        (BackboneSpace, {"backbone": "mlp", "pooling": ()}, r"^pooling of mlp needs at least one value"),
        (BackboneSpace, {"backbone": "mlp", "trained": ()}, r"^trained of mlp needs at least one value"),
    ],
)
def test_a_value_outside_of_its_range_is_refused(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_only_the_backbones_asked_for_are_searched_with_the_weights_asked_for() -> None:
    job = searched(search={"backbones": ("mobilenet_v2",), "weights": ("mobilenet_v2=a=b.weights.h5",)})
    assert job.backbones == (replace(MOBILENET, weights="a=b.weights.h5"),)
    assert searched().backbones == (MLP, MOBILENET)
    assert {params["backbone"] for params in drawn(job, "tpe", count=12)} == {"mobilenet_v2"}
