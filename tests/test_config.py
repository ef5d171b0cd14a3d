"""config: every check, the phases, and what a run's name depends on."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mnist_dist.command_line import parse
from mnist_dist.config import (
    DataConfig,
    DecodeConfig,
    FitConfig,
    ModelConfig,
    OptimizerConfig,
    Phase,
    PhasesConfig,
    RunConfig,
    StoreConfig,
    TrainJob,
    differences,
    require,
)
from mnist_dist.errors import ConfigError
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.score_config import InputConfig, ScoreJob, TableConfig
from mnist_dist.search_config import SearchJob

NAN = float("nan")
SCORE = functools.partial(ScoreJob, bundle="b", output="o", inputs=InputConfig(input=("i",)))
REFUSED: list[tuple[Callable[..., object], dict[str, Any], str]] = [
    (DataConfig, {"data": ()}, r"^data must name at least one location. Received: data=\(\)$"),
    (DataConfig, {"validation_fraction": 0.0}, r"^validation_fraction must be between 0 and 1\. .*=0\.0$"),
    (DataConfig, {"validation_fraction": 1.0}, r"^validation_fraction must be between 0 and 1\. .*=1\.0$"),
    (DataConfig, {"test_fraction": -0.1}, r"^test_fraction must be between 0 and 1\. .*=-0\.1$"),
    (DataConfig, {"test_fraction": NAN}, r"^test_fraction must be between 0 and 1\. .*=nan$"),
    (
        DataConfig,
        {"validation_fraction": 0.6, "test_fraction": 0.4},
        r"sum below 1\)\. Received: validation_fraction=0\.6, test_fraction=0\.4$",
    ),
    (
        DataConfig,
        {"max_bad_fraction": 1.01},
        r"^max_bad_fraction must be in \[0, 1\]\. Received: max_bad_fraction=1\.01$",
    ),
    (DataConfig, {"max_bad_fraction": -0.01}, r"^max_bad_fraction must be in \[0, 1\]"),
    (DataConfig, {"limit": 0}, r"^limit must be at least 1 image\. Received: limit=0$"),
    (DataConfig, {"decode_memory": 2}, r"^decode_memory must be at least 16777216 bytes \(16 MiB\)\. Received: "),
    (DataConfig, {"max_pixels": 0}, r"^max_pixels must be at least 1\. Received: max_pixels=0$"),
    (SCORE, {"shard_size": 0}, r"^shard_size must be at least 1\. Received: shard_size=0$"),
    (SCORE, {"max_rows_per_file": 0}, r"^max_rows_per_file must be at least 1 row\. Received: max_rows_per_file=0$"),
    (TableConfig, {"top_k": -1}, r"^top_k must be 0 \(none\) or a number of classes\. Received: top_k=-1$"),
    (
        TableConfig,
        {"embedding_type": "float16"},
        r"^embedding_type needs embeddings\. Received: embedding_type='float16'$",
    ),
    (ModelConfig, {"alpha": 0.0}, r"^alpha must be a positive width multiplier\. Received: alpha=0\.0$"),
    (ModelConfig, {"image_size_px": 0}, r"^image_size_px must be at least 1 px\. Received: image_size_px=0$"),
    (ModelConfig, {"hidden_units": -1}, r"^hidden_units must be 0 .* or a width\. Received: hidden_units=-1$"),
    (ModelConfig, {"dropout": 1.0}, r"^dropout must be in \[0, 1\)\. Received: dropout=1\.0$"),
    (ModelConfig, {"dropout": -0.1}, r"^dropout must be in \[0, 1\)"),
    (PhasesConfig, {"epochs": ()}, r"must have one value per phase, or a single value for all\. Received: epochs=\(\)"),
    (PhasesConfig, {"trainable": ()}, r"must have one value per phase, or a single value for all\. .*trainable=\(\)$"),
    (
        PhasesConfig,
        {"epochs": (1, 2), "learning_rate": (0.1, 0.2, 0.3)},
        r"one value per phase.*epochs=\(1, 2\), learning_rate=\(0\.1, 0\.2, 0\.3\), trainable=\('all',\)$",
    ),
    (
        PhasesConfig,
        {"epochs": (3, 0), "trainable": ("head", "all")},
        r"^epochs must be at least 1 in each phase\. Received: epochs=\(3, 0\)$",
    ),
    (PhasesConfig, {"phases": ("head",)}, r"^the only phase is train\. Received: phases=\('head',\)$"),
    (PhasesConfig, {"learning_rate": (1.0, 0.0)}, r"^learning_rate must be positive in each phase\. .*\(1\.0, 0\.0\)$"),
    (PhasesConfig, {"learning_rate": (float("inf"),)}, r"^learning_rate must be positive in each phase"),
    (PhasesConfig, {"learning_rate": (NAN,)}, r"^learning_rate must be positive in each phase"),
    (OptimizerConfig, {"momentum": 1.0}, r"^momentum must be in \[0, 1\)\. Received: momentum=1\.0$"),
    (OptimizerConfig, {"momentum": -0.5}, r"^momentum must be in \[0, 1\)"),
    (OptimizerConfig, {"weight_decay": -1.0, "optimizer": "adamw"}, r"^weight_decay must be 0 or above\. .*=-1\.0$"),
    (
        OptimizerConfig,
        {"weight_decay": 0.1},
        r"^weight_decay needs optimizer adamw\. Received: weight_decay=0\.1, optimizer='adam'$",
    ),
    (OptimizerConfig, {"warmup_steps": -1}, r"^warmup_steps must be 0 or above\. Received: warmup_steps=-1$"),
    (OptimizerConfig, {"clip_norm": 0.0}, r"^clip_norm must be positive\. Received: clip_norm=0\.0$"),
    (
        OptimizerConfig,
        {"label_smoothing": 1.0},
        r"^label_smoothing must be in \[0, 1\)\. Received: label_smoothing=1\.0$",
    ),
    (OptimizerConfig, {"label_smoothing": -0.1}, r"^label_smoothing must be in \[0, 1\)"),
    (OptimizerConfig, {"ema_decay": 1.0}, r"^ema_decay must be between 0 and 1\. Received: ema_decay=1\.0$"),
    (OptimizerConfig, {"layer_decay": 0.0}, r"^layer_decay must be in \(0, 1\]"),
    (OptimizerConfig, {"accumulate": 0}, r"^accumulate must be at least 1 part"),
    (
        TrainJob,
        {"fit": FitConfig(batch_size=10), "optimizer": OptimizerConfig(accumulate=4)},
        r"^batch_size must be a multiple of accumulate.*Received: batch_size=10, accumulate=4$",
    ),
    (
        TrainJob,
        {"phases": PhasesConfig(trainable=("head",)), "optimizer": OptimizerConfig(layer_decay=0.5)},
        r"^layer_decay needs a phase that trains more than the head",
    ),
    (FitConfig, {"rand_augment_ops": 0}, r"^rand_augment_ops must be at least 1"),
    (FitConfig, {"rand_augment_magnitude": 31}, r"^rand_augment_magnitude must be 0 to 30"),
    (FitConfig, {"random_erasing": 1.5}, r"^random_erasing must be a probability"),
    (FitConfig, {"mixup": -0.2}, r"^mixup must be 0 \(off\) or a positive parameter of Beta"),
    (FitConfig, {"cutmix": math.inf}, r"^cutmix must be 0 \(off\)"),
    (FitConfig, {"batch_size": 0}, r"^batch_size must be at least 1 image\. Received: batch_size=0$"),
    (FitConfig, {"seed": -1}, r"^seed must be 0 or above\. Received: seed=-1$"),
    (FitConfig, {"plateau_factor": 1.0}, r"^plateau_factor must be in \(0, 1\)\. Received: plateau_factor=1\.0$"),
    (FitConfig, {"plateau_factor": 0.0}, r"^plateau_factor must be in \(0, 1\)"),
    (FitConfig, {"early_stopping_patience": 0}, r"^early_stopping_patience must be at least 1 epoch\. .*=0$"),
    (FitConfig, {"plateau_patience": 0}, r"^plateau_patience must be at least 1 epoch\. Received: plateau_patience=0$"),
    (RunConfig, {"workers": 0}, r"^workers must be at least 1\. Received: workers=0$"),
    (RunConfig, {"cpus_per_worker": 0.0}, r"^cpus_per_worker must be positive\. Received: cpus_per_worker=0\.0$"),
    (RunConfig, {"max_failures": -1}, r"^max_failures must be 0 or above\. Received: max_failures=-1$"),
    (RunConfig, {"checkpoint_steps": 0}, r"^checkpoint_steps must be at least 1\. Received: checkpoint_steps=0$"),
    *(
        (RunConfig, {"name": name}, r"^name must be a single folder name")
        for name in ("", ".", "..", "a/b", "a\\b", "a\0")
    ),
    (
        TrainJob,
        {"optimizer": OptimizerConfig(schedule="cosine"), "fit": FitConfig(plateau_patience=2)},
        r"^plateau_patience needs schedule constant\. Received: schedule='cosine', plateau_patience=2$",
    ),
]

# For every field but those of `run`: another value that is allowed.
OTHER: dict[str, dict[str, Any]] = {
    "data": {
        "data": "mnist",
        "data_dir": "idx",
        "image_column": "picture",
        "label_column": "class",
        "uri_column": "path",
        "channels": "3",
        "resize": "crop",
        "validation_fraction": 0.2,
        "test_fraction": 0.3,
        "group_by": "folder",
        "multi_label": True,
        "label_separator": ";",
        "class_columns": ("dog", "cat"),
        "drop_duplicates": True,
        "max_bad_fraction": 0.5,
        "max_pixels": 7,
        "decode_memory": 2**24,
        "limit": 11,
        "image_timeout_s": 3.0,
        "skip": 7,
    },
    "model": {
        "backbone": "mlp",
        "weights": "imagenet",
        "alpha": 0.5,
        "image_size_px": 32,
        "pooling": "max",
        "hidden_units": 9,
        "dropout": 0.0,
    },
    "phases": {"epochs": (3,), "learning_rate": (0.5,), "trainable": ("head",), "phases": ("train",)},
    "optimizer": {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_steps": 5,
        "clip_norm": 1.0,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
        "ema_decay": 0.99,
        "layer_decay": 0.7,
        "accumulate": 2,
    },
    "fit": {
        "batch_size": 13,
        "augmentation": "photos",
        "rand_augment_ops": 3,
        "rand_augment_magnitude": 5,
        "random_erasing": 0.25,
        "mixup": 0.2,
        "cutmix": 1.0,
        "sampling": "balanced",
        "precision": "bfloat16",
        "seed": 1,
        "early_stopping_patience": 2,
        "plateau_patience": 3,
        "plateau_factor": 0.1,
        "best_metric": "val_accuracy",
        "tensorboard": True,
    },
}
BASE = TrainJob(optimizer=OptimizerConfig(optimizer="adamw"))  # weight_decay is allowed


@pytest.mark.parametrize(("config", "fields", "message"), REFUSED)
def test_a_value_outside_of_its_range_is_refused(
    config: Callable[..., object], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (DataConfig, {"validation_fraction": 0.5, "test_fraction": 0.49, "max_bad_fraction": 0.0, "limit": 1}),
        (DataConfig, {"max_bad_fraction": 1.0, "max_pixels": 1}),
        (ModelConfig, {"alpha": 1e-3, "image_size_px": 1, "hidden_units": 0, "dropout": 0.0}),
        (PhasesConfig, {"epochs": (1, 2, 3), "learning_rate": (1e-9,), "trainable": ("head", "block4", "0")}),
        (OptimizerConfig, {"momentum": 0.0, "weight_decay": 0.0, "clip_norm": 1e-9, "label_smoothing": 0.0}),
        (FitConfig, {"batch_size": 1, "seed": 0, "early_stopping_patience": 1, "plateau_patience": 1}),
        (RunConfig, {"workers": 1, "cpus_per_worker": 0.1, "max_failures": 0, "checkpoint_steps": 1, "name": "a.b"}),
    ],
)
def test_a_value_at_the_edge_of_its_range_is_taken(config: Callable[..., object], fields: dict[str, Any]) -> None:
    made = config(**fields)
    assert {name: getattr(made, name) for name in fields} == fields


def test_what_is_required_is_told_with_what_came() -> None:
    require(True, "anything", value=1)
    with pytest.raises(ConfigError, match=r"^a is below b\. Received: a='x', b=None$"):
        require(False, "a is below b", a="x", b=None)


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'seed'"):
        FitConfig().seed = 1  # type: ignore[misc]


def test_one_value_is_spread_over_all_phases() -> None:
    config = PhasesConfig(epochs=(5,), learning_rate=(1e-3, 1e-4, 1e-5), trainable=("all",))
    assert config.in_order() == (
        Phase(name="train", trainable="all", epochs=5, learning_rate=1e-3),
        Phase(name="fine-tune", trainable="all", epochs=5, learning_rate=1e-4),
        Phase(name="fine-tune", trainable="all", epochs=5, learning_rate=1e-5),
    )


def test_each_phase_takes_its_own_values_and_numbers_become_numbers() -> None:
    config = PhasesConfig(epochs=(2, 3, 7), learning_rate=(0.1, 0.2, 0.3), trainable=("head", "block4", "17"))
    assert config.in_order() == (
        Phase(name="head", trainable="head", epochs=2, learning_rate=0.1),
        Phase(name="fine-tune", trainable="block4", epochs=3, learning_rate=0.2),
        Phase(name="fine-tune", trainable=17, epochs=7, learning_rate=0.3),
    )


def test_phases_can_be_chosen_by_name() -> None:
    config = PhasesConfig(epochs=(2, 3, 7), trainable=("head", "block4", "all"), phases=("fine-tune",))
    assert [(phase.name, phase.epochs) for phase in config.in_order()] == [("fine-tune", 3), ("fine-tune", 7)]
    with pytest.raises(
        ConfigError, match=r"^phases must be among head, fine-tune \(did you mean head\?\)\. Received: "
    ):
        PhasesConfig(trainable=("head", "all"), phases=("haed",))


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (PhasesConfig(epochs=(2,), trainable=("head", "all")), "2 phases x 2 = 4 epochs"),
        (PhasesConfig(epochs=(5, 3), trainable=("head", "all")), "5 + 3 = 8 epochs"),
        (PhasesConfig(epochs=(5, 3), trainable=("head", "all"), phases=("head",)), "5 epochs"),
        (PhasesConfig(epochs=(1,)), "1 epoch"),
    ],
)
def test_the_number_of_epochs_is_explained(config: PhasesConfig, total: str) -> None:
    assert config.total() == total


def test_fewer_values_than_phases_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must have one value per phase, or a single value for all"):
        PhasesConfig(epochs=(2, 3), trainable=("head", "block4", "all"))


def test_there_is_one_phase_by_default() -> None:
    assert [phase.name for phase in PhasesConfig().in_order()] == ["train"]


def test_every_field_that_decides_the_result_has_another_value_here() -> None:
    sections = {field.name: field.type for field in dataclasses.fields(TrainJob)}
    assert OTHER.keys() == sections.keys() - {"run", "store"}
    for section, values in OTHER.items():
        assert values.keys() == {field.name for field in dataclasses.fields(getattr(BASE, section))}


@pytest.mark.parametrize(("section", "name"), [(s, name) for s, values in OTHER.items() for name in values])
def test_the_settings_hash_changes_with_every_field_that_decides_the_result(section: str, name: str) -> None:
    changed = replace(getattr(BASE, section), **{name: OTHER[section][name]})
    job = replace(BASE, **{section: changed})
    assert job.settings_hash() != BASE.settings_hash()
    lines = differences(job.settings(), BASE.settings())
    assert [line.partition(":")[0] for line in lines] == [f"{section}.{name}"]


def test_the_settings_hash_ignores_where_and_on_what_the_job_runs() -> None:
    run = RunConfig(storage="s3://b/p", name="x", workers=3, cpus_per_worker=2, gpu=True, max_failures=7, verbose=True)
    assert replace(BASE, run=run).settings() == BASE.settings()
    assert replace(BASE, run=run).settings_hash() == BASE.settings_hash()


def test_settings_are_json_and_their_hash_eight_digits() -> None:
    settings = BASE.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["phases"]["epochs"] == [10]
    assert len(BASE.settings_hash()) == 8
    assert int(BASE.settings_hash(), 16) >= 0


def test_differences_name_each_value_with_its_path() -> None:
    ours = {"recipe": "a", "fit": {"seed": 1, "batch_size": 8, "deep": {"x": 1}}, "same": [1, 2]}
    theirs = {"recipe": "b", "fit": {"seed": 2, "batch_size": 8, "deep": {"x": None}}, "same": [1, 2], "more": 3}
    assert differences(ours, theirs) == [
        "fit.deep.x: 1 now, None in the run",
        "fit.seed: 1 now, 2 in the run",
        "more: None now, 3 in the run",
        "recipe: 'a' now, 'b' in the run",
    ]
    assert differences(ours, ours) == []


# --- how images are reached ------------------------------------------------------------------------------------------


def test_the_memory_for_decoding_decides_no_result_of_scoring() -> None:
    job = SCORE()
    assert replace(job, decoding=DecodeConfig(decode_memory=2**24)).settings() == job.settings()
    assert replace(job, decoding=DecodeConfig(max_pixels=9)).settings() != job.settings()


def test_the_quality_of_decoding_decides_the_rows_of_scoring_alone() -> None:
    job = SCORE()
    assert replace(job, decoding=DecodeConfig(decode_quality="exact")).settings() != job.settings()
    assert DataConfig().limits.decode_quality == "auto"
    assert "decode_quality" not in {field.name for field in dataclasses.fields(DataConfig)}


def test_how_images_are_reached_decides_no_result() -> None:
    store = StoreConfig(s3_requester_pays=True, allow_private_hosts=True)
    for job in (BASE, SearchJob(), SCORE()):
        changed: Any = replace(job, store=store)
        assert changed.settings() == job.settings()
    assert replace(BASE, store=store).settings_hash() == BASE.settings_hash()


def test_nobody_pays_without_a_name() -> None:
    with pytest.raises(ConfigError, match="choose either s3_anonymous or s3_requester_pays"):
        StoreConfig(s3_anonymous=True, s3_requester_pays=True)


@pytest.mark.parametrize(
    ("recipes", "required"),
    [
        ({"job": ScoreJob}, ["--bundle", "b", "--output", "o", "--input", "x"]),
        ({"job": EvaluateJob}, ["--predictions", "p"]),
        ({"job": TrainJob}, []),
        ({"job": SearchJob}, []),
    ],
)
@pytest.mark.parametrize("name", ["s3_anonymous", "s3_requester_pays", "allow_private_hosts"])
def test_each_job_that_reads_images_has_the_flags_of_the_store(
    recipes: dict[str, Any], required: list[str], name: str
) -> None:
    flag = f"--{name.replace('_', '-')}"
    _, job = parse(recipes, command="job", default="job", argv=[*required, flag])
    assert job.store == StoreConfig(**{name: True})
