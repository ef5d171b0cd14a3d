"""A stated search space: what a file may say, what it means, and what each mistake is answered with; plans and dry runs
of small searches."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import run_command

from mnist_dist.api import search
from mnist_dist.command_line import given_fields
from mnist_dist.config import DataConfig, TrainJob
from mnist_dist.distributions import Choice, Range
from mnist_dist.errors import ConfigError
from mnist_dist.on_ray.search.dry_run import _in_small
from mnist_dist.recipes import search_digits, search_mnist
from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchSpace
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.tuning.leaderboard import OF_SPACE_FILES, PARAMETERS
from mnist_dist.tuning.planning import Costs, TrialCost, chances, forecast, mean_epochs
from mnist_dist.tuning.space import (
    SETTINGS,
    GridDraw,
    Proposer,
    check_space,
    fit_batches,
    one_of_each,
    smallest_batch,
    train_job,
)
from mnist_dist.tuning.space_file import Stated, with_space

ROOT = Path(__file__).parents[1]
WHOLE: dict[str, Any] = {
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "hidden_units": {"low": 0, "high": 192, "step": 64},
    "dropout": {"low": 0.1, "high": 0.4},
    "batch_size": {"low": 17, "high": 70},
    "optimizer": ["sgd", "adamw"],
    "momentum": [0.8, 0.95],
    "weight_decay": 1e-3,
    "warmup_steps": 5,
    "clip_norm": ["none", 1.5],
    "schedule": ["constant", "cosine"],
    "plateau_patience": ["none", 3],
    "plateau_factor": [0.2, 0.4],
    "class_weights": "balanced",
    "augmentation": ["digits", "rand-augment"],
    "rand_augment_ops": [1, 2],
    "rand_augment_magnitude": {"low": 3, "high": 12},
    "random_erasing": [0.0, 0.25],
    "mixup": {"low": 0.0, "high": 0.4},
    "cutmix": [0.0, 1.0],
    "sampling": ["shuffled", "balanced"],
    "ema_decay": ["none", 0.99],
    "layer_decay": [0.7, 1.0],
    "early_stopping_patience": [4, 6],
    "backbones": {
        "cnn": {"learning_rate": [3e-3, 4e-3]},
        "mobilenet_v2": {
            "weights": "imagenet",
            "alpha": {"low": 0.5, "high": 1.0, "step": 0.25},
            "image_size_px": {"low": 64, "high": 128, "step": 32},
            "pooling": ["none", "max"],
            "trained": ["head", "fine-tune"],
            "cut_points": ["block13", 7],
        },
    },
}


def stated(stated: Stated, *, base: SearchJob | None = None, **flags: Any) -> SearchJob:
    """The search of a space and of flags that are fields of `SearchSpace`."""
    recipe = base or search_digits()
    job = replace(recipe, space=replace(recipe.space, **flags))
    return with_space(job, stated, base=recipe, given=flags)


def proposals(job: SearchJob, *, count: int = 120) -> list[dict[str, Any]]:
    job = replace(job, search=replace(job.search, algorithm="random", trials=count))
    proposer = Proposer(job)
    return [proposer.propose(number) for number in range(count)]


def jobs_of(job: SearchJob) -> list[TrainJob]:
    return [train_job(params, job, stage="finalist") for params in proposals(job)]


# --- what a space says -----------------------------------------------------------------------------------------------


def test_trials_draw_what_the_space_says() -> None:
    jobs = jobs_of(stated(WHOLE))
    assert {job.model.backbone for job in jobs} == {"cnn", "mobilenet_v2"}
    assert {job.model.hidden_units for job in jobs} == {0, 64, 128, 192}
    dropouts = [job.model.dropout for job in jobs if job.model.dropout is not None]
    assert 0.1 <= min(dropouts) < max(dropouts) <= 0.4
    assert len(set(dropouts)) == len(jobs) - 1  # The first trial of each of the two backbones takes the middle.
    batches = {job.fit.global_batch for job in jobs}
    assert min(batches) >= 17
    assert max(batches) <= 70
    assert len(batches) > 20
    assert all(type(size) is int for size in batches)
    assert {job.optimizer.clip_norm for job in jobs} == {None, 1.5}
    assert {job.optimizer.warmup_steps for job in jobs} == {5}
    assert {job.optimizer.class_weights for job in jobs} == {"balanced"}
    assert {job.fit.early_stopping_patience for job in jobs} == {4, 6}


def test_a_setting_is_drawn_only_where_it_has_an_effect() -> None:
    for params in proposals(stated(WHOLE)):
        assert ("momentum" in params) == (params["optimizer"] == "sgd")
        assert ("weight_decay" in params) == (params["optimizer"] == "adamw")
        assert ("plateau_patience" in params) == (params["schedule"] == "constant")
        assert ("plateau_factor" in params) == (params.get("plateau_patience") is not None)
        trains_all = params[f"{params['backbone']}.trained"] == "all"
        assert {name in params for name in ("augmentation", "random_erasing", "mixup", "cutmix")} == {trains_all}
        of_rand_augment = params.get("augmentation") == "rand-augment"
        assert {name in params for name in ("rand_augment_ops", "rand_augment_magnitude")} == {of_rand_augment}


def test_a_backbone_may_draw_from_a_distribution_of_its_own() -> None:
    job = stated(WHOLE)
    found = [params for params in proposals(job) if params["backbone"] == "cnn"]
    assert {params["cnn.learning_rate"] for params in found} == {3e-3, 4e-3}
    assert not any("learning_rate" in params for params in found)
    rates = {train_job(params, job, stage="trial").phases.learning_rate for params in found}
    assert rates == {(3e-3,), (4e-3,)}
    others = [params for params in proposals(job) if params["backbone"] != "cnn"]
    assert all(1e-4 <= params["learning_rate"] <= 1e-2 for params in others)


def test_what_belongs_to_a_backbone_is_listed_or_counted_by_a_step() -> None:
    _, found = stated(WHOLE).backbones
    assert found.image_size_px == (64, 96, 128)
    assert found.alpha == (0.5, 0.75, 1.0)
    assert found.pooling == (None, "max")
    assert found.cut_points == ("block13", "7")
    assert found.weights == "imagenet"


def test_what_the_file_leaves_out_comes_from_the_recipe() -> None:
    recipe = search_mnist()
    job = stated({"dropout": 0.3}, base=recipe)
    assert job.space.backbones == recipe.space.backbones
    assert job.space.distributions() == {**recipe.space.distributions(), "dropout": Choice((0.3,))}
    job = stated({"backbones": {"vgg16": {"pooling": "avg"}, "mlp": {}}}, base=recipe)
    *_, vgg16 = recipe.space.backbones
    assert job.backbones == (replace(vgg16, pooling=("avg",)), recipe.space.backbones[0])


def test_a_new_backbone_without_weights_is_trained_whole_and_one_with_weights_is_not() -> None:
    named = {"cnn_bn": {}, "vgg16": {"weights": "imagenet"}, "mobilenet": {"trained": "head"}}
    found = stated({"backbones": named}).backbones
    assert [space.trained for space in found] == [("all",), ("head",), ("head",)]
    assert stated({"backbones": ["cnn_bn"]}).backbones == (BackboneSpace(backbone="cnn_bn", trained=("all",)),)


def test_flags_win_over_the_file_also_over_what_a_backbone_draws() -> None:
    job = stated(WHOLE, learning_rate=(1e-3, 1e-3), hidden_units=(9,))
    for params in proposals(job, count=12):
        assert (params["learning_rate"], params["hidden_units"]) == (1e-3, 9)
        assert not any(name.endswith(".learning_rate") for name in params)
    assert job.space.drawn.keys() == WHOLE.keys() - {"backbones", "learning_rate", "hidden_units"}


def test_flags_are_known_by_the_names_of_their_fields() -> None:
    typed = ["search-digits", "--hidden-units", "0", "64", "--learning_rate=1e-3", "--seed", "-1"]
    assert given_fields(typed) == {"hidden_units", "learning_rate", "seed"}


def test_a_search_is_what_its_file_says_and_not_where_it_lies(tmp_path: Path) -> None:
    places = [tmp_path / "a.toml", tmp_path / "b.toml"]
    for place in places:
        place.write_text("dropout = [0.1, 0.2]\n[backbones.cnn]\n")
    recipe = search_digits()
    jobs = [replace(recipe, search=replace(recipe.search, space=str(place))) for place in places]
    first, second = (with_space(job, str(job.search.space), base=recipe, given=()) for job in jobs)
    assert first.settings_hash() == second.settings_hash()
    assert first.settings() == stated({"dropout": [0.1, 0.2], "backbones": ["cnn"]}).settings()
    assert first.settings_hash() != stated({"dropout": [0.1, 0.3], "backbones": ["cnn"]}).settings_hash()
    assert json.dumps(first.settings()["space"]["drawn"]) == '{"dropout": {"values": [0.1, 0.2]}}'


def test_a_space_may_lie_in_a_bucket(s3: str) -> None:
    ANYWHERE.write_bytes(f"{s3}/space.toml", b'optimizer = "sgd"')
    assert stated(f"{s3}/space.toml").space.drawn == {"optimizer": Choice(("sgd",))}


def test_a_grid_takes_the_ends_and_the_middle_of_a_range() -> None:
    assert Range(low=1e-4, high=1e-2, log=True).grid() == pytest.approx((1e-4, 1e-3, 1e-2))
    assert Range(low=0.0, high=0.5).grid() == (0.0, 0.25, 0.5)
    assert Range(low=3, high=4).grid() == (3, 4)
    assert Range(low=32, high=128, step=32).grid() == (32, 64, 128)
    assert Range(low=7, high=7).grid() == (7,)
    space = {"backbones": ["cnn"], "optimizer": "adam", "batch_size": 32, "label_smoothing": 0, "learning_rate": 1e-3}
    job = stated({**space, "dropout": {"low": 0, "high": 0.5}})
    assert [params["dropout"] for params in GridDraw().proposals(job)] == [0.0, 0.25, 0.5]


def test_a_range_with_a_step_draws_only_its_steps() -> None:
    job = stated(
        {"dropout": {"low": 0.1, "high": 0.4, "step": 0.1}, "warmup_steps": {"low": 1, "high": 64, "log": True}}
    )
    found = proposals(job)
    assert {round(params["dropout"], 9) for params in found} == {0.1, 0.2, 0.3, 0.4}
    steps = [params["warmup_steps"] for params in found]
    assert np.median(steps) < 16  # of a uniform range, 32
    assert max(steps) > 40


def test_the_leaderboard_has_a_column_for_each_setting() -> None:
    assert set(SETTINGS) <= {*PARAMETERS, *OF_SPACE_FILES}


@pytest.mark.parametrize("text", (ROOT / "docs" / "search.md").read_text().split("```toml\n")[1:])
def test_each_example_of_the_documentation_is_a_space(text: str, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(text.partition("```")[0])
    check_space(stated(str(tmp_path / "space.toml"), base=search_mnist()))


# --- mistakes --------------------------------------------------------------------------------------------------------

RANGE = r"one value, a list, or \{ low = ..., high = ... \}"
MISTAKES: list[tuple[Mapping[str, Any], str]] = [
    ({"hiden_units": [1]}, r"there is no hiden_units \(did you mean hidden_units\?\); there are backbones, .*= \[1\]$"),
    ({"trials": 3}, r"trials is no part of the space: give it as the flag --trials\. Received: trials = 3$"),
    ({"image_size_px": [64]}, r"image_size_px belongs to a backbone: write it below \[backbones\.NAME\]\."),
    ({"resize": "crop"}, r"resize is no part of the space: give it as the flag --resize\."),
    ({"tensorboard": True}, r"tensorboard is the same for all trials"),
    ({"hidden_units": ["x"]}, rf'hidden_units takes whole numbers \({RANGE}\)\. Received: hidden_units = "x"$'),
    ({"hidden_units": True}, r"hidden_units takes whole numbers .*Received: hidden_units = true$"),
    ({"warmup_steps": 1.5}, r"warmup_steps takes whole numbers .*Received: warmup_steps = 1\.5$"),
    ({"clip_norm": "off"}, r'clip_norm takes numbers or "none" .*Received: clip_norm = "off"$'),
    ({"hidden_units": [5, -1]}, r"hidden_units must be 0 .* or a width\. Received: hidden_units = -1$"),
    ({"weight_decay": [0.1, -1.0]}, r"weight_decay must be 0 or above\. Received: weight_decay = -1\.0$"),
    ({"batch_size": []}, r"batch_size needs at least one value\. Received: batch_size = \[\]$"),
    ({"batch_size": [64, 64]}, r"batch_size lists a value twice\. Received: batch_size = \[64, 64\]$"),
    (
        {"optimizer": ["adamx"]},
        r'takes "adam", "adamw", "sgd" .*\(did you mean adam\?\)\. Received: optimizer = "adamx"$',
    ),
    ({"optimizer": {"low": 1, "high": 2}}, r"optimizer takes .*one value or a list\)\. .* = \{ low = 1, high = 2 \}$"),
    ({"dropout": {"low": 0}}, r"dropout: a range has low and high, .*Received: dropout = \{ low = 0 \}$"),
    ({"dropout": {"low": 0, "hi": 1}}, r"dropout: a range has low and high, .*\(did you mean high\?\)"),
    ({"dropout": {"low": 0.5, "high": 0.2}}, r"dropout: low must be at most high"),
    ({"dropout": {"low": 0.0, "high": 1.0}}, r"dropout: must be in \[0, 1\)\. Received: dropout = \{ low = 0"),
    ({"dropout": {"low": 0.0, "high": float("inf")}}, r"dropout: must be finite"),
    ({"dropout": {"low": 0.0, "high": 0.5, "log": True}}, r"dropout: log needs a low above 0"),
    ({"dropout": {"low": 0.1, "high": 0.5, "step": 0.2, "log": True}}, r"dropout: choose either step or log"),
    ({"dropout": {"low": 0.1, "high": 0.5, "log": "yes"}}, r"dropout takes numbers .*log is true or false"),
    (
        {"batch_size": {"low": 32, "high": 100, "step": 32}},
        r"batch_size: high must be low plus a multiple of step, such as 96\. Received: batch_size = \{ low = 32",
    ),
    ({"momentum": 0.5, "optimizer": "adam"}, r"no trial would draw momentum: it needs optimizer = sgd; leave it out"),
    ({"plateau_factor": 0.5}, r"no trial would draw plateau_factor: it needs a plateau_patience"),
    ({"plateau_patience": 3, "schedule": "cosine"}, r"no trial would draw plateau_patience: it needs schedule = const"),
    ({"fine_tune_learning_rate": 1e-5}, r"no trial would draw fine_tune_learning_rate: it needs trained = fine-tune"),
    (
        {"dropout": 0.1, "backbones": {"cnn": {"dropout": 0.2}}},
        r"no trial would draw dropout: each backbone has its own",
    ),
    ({"backbones": 3}, r"backbones takes a list of names, or a table for each, .*Received: backbones = 3$"),
    ({"backbones": []}, r"backbones takes a list of names, .*Received: backbones = \[\]$"),
    ({"backbones": ["cnn", "mlp", "cnn"]}, r"backbones names one twice\. Received: backbones = \["),
    ({"backbones": ["a\0/b"]}, r'\[backbones\."a\\u0000/b"\]: the name of a backbone has no NUL'),
    ({"a\nb": 1}, r'there is no "a\\nb"; there are .*Received: "a\\nb" = 1$'),
    ({"learning_rate": [0.1, -0.1]}, r"learning_rate must be above 0\. Received: learning_rate = -0\.1$"),
    (
        {"fine_tune_learning_rate": 0.0},
        r"fine_tune_learning_rate must be above 0\. Received: fine_tune_learning_rate = 0\.0$",
    ),
    ({"weight_decay": float("inf")}, r"weight_decay must be finite\. Received: weight_decay = inf$"),
    ({"warmup_steps": 2**31}, r"warmup_steps must be at most 2,147,483,647\. Received: warmup_steps = 2147483648$"),
    ({"warmup_steps": {"low": 0, "high": 10**400}}, r"warmup_steps: must be at most 2,147,483,647\."),
    ({"dropout": {"low": 0.0, "high": 0.5, "step": 5e-324}}, r"dropout: step is too small for this range\. Received:"),
    ({"dropout": {"low": 0.0, "high": 0.5, "step": float("inf")}}, r"dropout: step must be above 0\. Received:"),
    (
        {"backbones": {"vgg16": {"image_size_px": {"low": 32, "high": 10**9, "step": 1}}}},
        r"\[backbones\.vgg16\]: image_size_px: a range has at most 100 values here, .*= \{ low = 32, high = 1000000000",
    ),
    ({"backbones": {"mobilenet": {"alpha": float("inf")}}}, r"\[backbones\.mobilenet\]: alpha must be finite"),
    ({"backbones": ["cnnn"]}, r"backbone must be one of .*Did you mean cnn or cnn_bn\? Received: backbone = 'cnnn'$"),
    (
        {"backbones": {"cnn": {"aplha": 1}}},
        r"\[backbones\.cnn\]: there is no aplha \(did you mean alpha\?\); there are",
    ),
    (
        {"backbones": {"cnn": {"pooling": "avg"}}},
        r"cnn gives a vector and takes no pooling\. Received: pooling = 'avg'$",
    ),
    ({"backbones": {"vgg16": {"image_size_px": 16}}}, r"vgg16 needs images of at least 32 px .*image_size_px = 16$"),
    (
        {"backbones": {"vgg16": {"image_size_px": {"low": 32, "high": 64}}}},
        r"\[backbones\.vgg16\]: image_size_px takes a list, or a range with a step",
    ),
    (
        {"backbones": {"vgg16": {"cut_points": "block5"}}},
        r"no trial would draw vgg16\.cut_points: it needs trained = f",
    ),
    (
        {"backbones": {"vgg16": {"trained": "fine-tune", "cut_points": "block9"}}},
        r"trainable for vgg16 must be one of head, all, .*Received: trainable = 'block9'$",
    ),
    (
        {"backbones": {"cnn": {"weights": "imagenet"}}},
        r"weights for cnn must be none, .*Received: weights = 'imagenet'$",
    ),
]


@pytest.mark.parametrize(("space", "message"), MISTAKES)
def test_a_mistake_is_named_with_what_is_allowed(space: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^space: .*{message}" if "takes" in message else rf"^space: {message}"):
        stated(space)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^space names a TOML file .*there is none\. Received: space='.*nope\.toml'$"
    ):
        stated(str(tmp_path / "nope.toml"))
    with pytest.raises(ConfigError, match=r"^space must be a TOML file that can be read: "):
        stated(str(tmp_path))
    (tmp_path / "bad.toml").write_text("learning_rate 1")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML: .*line 1"):
        stated(str(tmp_path / "bad.toml"))
    (tmp_path / "table.toml").write_text("[backbones.cnn]\npoling = 'avg'\n")
    with pytest.raises(
        ConfigError, match=r"table\.toml: \[backbones\.cnn\]: there is no poling \(did you mean pooling"
    ):
        stated(str(tmp_path / "table.toml"))
    with pytest.raises(ConfigError, match=r"^space must be a TOML file that can be read: "):
        stated("a" * 5_000)


@pytest.mark.parametrize("value", ["[" * 3_000 + "]" * 3_000, "{a=" * 300 + "1" + "}" * 300, "1" * 5_000])
def test_what_is_nested_too_deeply_or_has_too_many_digits_is_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(f"x = {value}")
    with pytest.raises(ConfigError, match=r"space\.toml(: .* nested too deeply| holds a value that cannot be read)"):
        stated(str(tmp_path / "space.toml"))


def test_mistakes_in_flags_are_not_those_of_the_file() -> None:
    job = stated(WHOLE, hidden_units=(-1,))
    with pytest.raises(ConfigError, match=r"^hidden_units must be 0 .*Received: hidden_units=-1$"):
        check_space(job)


def test_the_command_refuses_a_wrong_file_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text("hidden_units = -1\n")
    storage = tmp_path / "runs"
    flags = ("--space", str(tmp_path / "space.toml"), "--storage", str(storage))
    code, result, err = run_command("jobs.search", "search-digits", *flags, RAY_ADDRESS="127.0.0.1:1")
    assert code == 2
    assert "space.toml: hidden_units must be 0" in result["error"]
    assert "Received: hidden_units = -1" in err
    assert not storage.exists()


def test_the_python_function_takes_a_dict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^space: there is no backbone \(did you mean backbones\?\)"):
        search(space={"backbone": "cnn"}, storage=tmp_path)
    with pytest.raises(ConfigError, match=r"^space names a TOML file"):
        search(space=tmp_path / "none.toml", storage=tmp_path)
    assert not list(tmp_path.iterdir())


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_above_the_images_are_left_out_and_named() -> None:
    job = search_mnist()
    fitted, lines = fit_batches(job, images=200)
    assert lines == ["batch_size 256 left out: 200 training images"]
    assert {params["batch_size"] for params in proposals(fitted)} == {64, 128}
    assert fit_batches(job, images=256) == (replace(job, space=replace(job.space, drawn=fitted_all(job))), [])


def fitted_all(job: SearchJob) -> dict[str, Any]:
    return {"batch_size": Choice(job.space.batch_size)}


def test_a_range_of_batches_ends_at_the_images() -> None:
    own = {"cnn": {"batch_size": [16, 512]}, "mlp": {}}
    job = stated({"batch_size": {"low": 32, "high": 256, "step": 32}, "backbones": own})
    fitted, lines = fit_batches(job, images=200)
    assert lines == [
        "cnn.batch_size 512 left out: 200 training images",
        "batch_size drawn up to 192 instead of 256: 200 training images",
    ]
    assert fitted.space.drawn["batch_size"] == Range(low=32, high=192, step=32)
    assert smallest_batch(fitted) == 16


def test_a_search_without_any_batch_that_fits_is_refused_by_its_flag() -> None:
    message = r"at most the number of training images \(45\): give a smaller --batch-size\. Received: batch_size=\(64, "
    with pytest.raises(ConfigError, match=message):
        fit_batches(search_mnist(), images=45)


# --- one of each, and the forecast -----------------------------------------------------------------------------------


def test_one_of_each_is_a_trial_for_each_network_and_way_to_train_it() -> None:
    job = one_of_each(stated(WHOLE), batch_of=min, epochs=2)
    found = list(GridDraw().proposals(job))
    ways = {tuple(value for name, value in params.items() if "." in name and "rate" not in name) for params in found}
    assert len(found) == job.search.trials == 1 + 3 * 3 * 2 * 2
    assert len({way[:4] for way in ways}) == 1 + 3 * 3 * 2 * 2
    assert {params["batch_size"] for params in found} == {17}
    assert job.search.trial_epochs == job.search.fine_tune_epochs == job.search.finalist_epochs == 2


TWO = SearchJob(
    space=SearchSpace(
        backbones=(
            BackboneSpace(backbone="mlp", trained=("all",)),
            BackboneSpace(backbone="vgg16", image_size_px=(32, 64), trained=("head", "fine-tune")),
        )
    ),
    search=SearchConfig(trials=30, trial_epochs=10, finalists=3, scheduler="none"),
)


def test_every_backbone_counts_the_same() -> None:
    assert chances(TWO) == {
        ("mlp", "all"): 0.5,
        **{(f"vgg16 {size} px", trained): 0.125 for size in (32, 64) for trained in ("head", "fine-tune")},
    }


def costs(**fields: Any) -> Costs:
    ways = chances(TWO)
    known = {"start_s": 1.0, "decoding_s": 2.0, "process_s": 3.0, "test_s": 4.0}
    features_s = {"vgg16 32 px": 10.0, "vgg16 64 px": 30.0}
    trials = {way: TrialCost(setup_s=1.0, epoch_s=2.0 if way[0] == "mlp" else 0.4) for way in ways}
    finalists_s = {way: 60.0 if way[1] == "all" else 20.0 for way in ways}
    return Costs(**{**known, "features_s": features_s, "trials": trials, "finalists_s": finalists_s, **fields})


def test_a_forecast_adds_up_the_parts() -> None:
    found = forecast(TWO, costs(), concurrent=2, at_once=1)
    features_s = (1 - 0.75**30) * 40
    trials_s = 3 + 15 * (0.5 * 21 + 0.5 * 5)
    expected = {"decoding": 2.0, "features": features_s, "trials": trials_s, "finalists": 3 * 40.0}
    assert found.parts == pytest.approx(expected)
    assert found.seconds == pytest.approx(1 + sum(expected.values()) + 4)
    assert found.bottleneck == "trials"
    assert forecast(TWO, costs(), concurrent=30, at_once=1).bottleneck == "finalists"
    assert forecast(TWO, costs(), concurrent=30, at_once=3).parts["finalists"] == pytest.approx(40)


def test_a_forecast_ends_with_the_hours() -> None:
    job = replace(TWO, search=replace(TWO.search, hours=300 / 3600))
    found = forecast(job, costs(features_s={}), concurrent=1, at_once=1)
    assert found.finalists == 1  # Two would take 80 s of 300 s.
    assert found.parts["finalists"] == pytest.approx(40)
    assert found.parts["trials"] == pytest.approx(257)  # The hours include the finalists.
    assert found.trials_at_most_s == pytest.approx(257)
    assert found.seconds == pytest.approx(300 + 4)


def test_early_stopping_shortens_the_mean_trial_and_more_so_of_many() -> None:
    search = replace(TWO.search, scheduler="asha")
    assert mean_epochs(TWO.search) == 10
    assert mean_epochs(replace(search, trials=1)) == 10
    few, many = (mean_epochs(replace(search, trials=trials)) for trials in (8, 2_000))
    assert 1 < many < few < 10
    assert many == pytest.approx(1 + 2 / 3 + 6 / 9 + 1 / 27, rel=0.15)
    found = forecast(replace(TWO, search=search), costs(), concurrent=1, at_once=1)
    assert (
        found.parts["trials"]
        < found.trials_at_most_s
        == forecast(TWO, costs(), concurrent=1, at_once=1).parts["trials"]
    )


def test_each_way_to_stop_trials_early_shortens_the_mean_trial_but_none_within_the_grace_period() -> None:
    search = replace(TWO.search, trials=2_000)
    asha, hyperband, median = (
        mean_epochs(replace(search, scheduler=scheduler)) for scheduler in ("asha", "hyperband", "median")
    )
    assert asha < hyperband < 9
    assert median < 9
    for scheduler in ("asha", "hyperband", "median"):
        epochs = [mean_epochs(replace(search, scheduler=scheduler), grace_epochs=grace) for grace in (1, 5, 10, 50)]
        assert 1 < epochs[0] < epochs[1] < epochs[2] == epochs[3] == 10
        assert epochs[1] > 5


def test_a_forecast_knows_the_grace_period() -> None:
    job = replace(TWO, search=replace(TWO.search, scheduler="asha"))
    short, long = (forecast(job, costs(), concurrent=1, at_once=1, grace_epochs=epochs) for epochs in (1, 10))
    assert short.parts["trials"] < short.trials_at_most_s == long.parts["trials"] == long.trials_at_most_s


def test_a_dry_run_takes_as_many_images_as_a_batch_needs_whatever_the_fractions() -> None:
    data = DataConfig(validation_fraction=0.3, test_fraction=0.35)
    small, images = _in_small(replace(search_digits(), data=data, space=replace(TWO.space, batch_size=(4_000,))), "")
    assert images == 4_000
    assert small.data.limit is not None
    assert small.data.limit * (1 - 0.3 - 0.35) >= 4_000


# --- real ones -------------------------------------------------------------------------------------------------------

SMALL = """
hidden_units = 5
optimizer = "adam"
batch_size = [32, 4096]
[backbones.mlp]
[backbones.mobilenet]
alpha = 0.25
image_size_px = 32
trained = "fine-tune"
cut_points = "block13"
"""


def small_command(folder: Path, *flags: str) -> tuple[str, ...]:
    (folder / "space.toml").write_text(SMALL)
    data = ("--limit", "300", "--space", str(folder / "space.toml"), "--storage", str(folder / "runs"))
    return ("jobs.search", "search-digits", *data, "--trials", "4", *flags)


@pytest.mark.chaos
def test_a_dry_run_trains_a_step_of_each_network_and_keeps_nothing(tmp_path: Path) -> None:
    code, result, err = run_command(*small_command(tmp_path, "--dry-run"))
    assert code == 0, err
    assert (result["dry_run"], result["trials"], result["failed"]) == (True, 2, 0)
    assert "features of mobilenet x0.25 32 px" in err or "finalist" in err
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_plan_says_what_a_search_would_take_and_keeps_nothing(tmp_path: Path) -> None:
    code, result, err = run_command(*small_command(tmp_path, "--plan"))
    assert code == 0, err
    assert "batch_size 4096 left out: 240 training images" in err
    assert result["plan"]
    assert result["bottleneck"] in result["expected_s"]
    assert result["expected_seconds"] >= sum(result["expected_s"].values())
    networks = {(each["network"], each["trained"]): each for each in result["networks"]}
    assert networks.keys() == {("mlp", "all"), ("mobilenet x0.25 32 px", "fine-tune")}
    assert networks["mlp", "all"]["features_s"] is None
    assert networks["mobilenet x0.25 32 px", "fine-tune"]["features_s"] > 0
    assert all(each["epoch_s"] > 0 and each["finalist_s"] > 0 for each in networks.values())
    assert not (tmp_path / "runs").exists()
