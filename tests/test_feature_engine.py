"""feature_engine: one engine for a whole cache, chosen where that pays, and only one that agrees."""

# N = records, D = features

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Recorder
from onnx_backbones import SPEC, WIDTH, random_features
from onnx_models import small_bundle

from mnist_dist.config import DataConfig, DecodeConfig, ModelConfig
from mnist_dist.console import Stop
from mnist_dist.data.cache import Cache
from mnist_dist.data.records import RecordPlan, Records, finish, open_records, plan_records
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle
from mnist_dist.models.onnx_file import FEATURES, run_session
from mnist_dist.session import Session
from mnist_dist.sources.source import open_source
from mnist_dist.training.feature_engine import (
    FeatureCheck,
    FeatureEngine,
    choose_engine,
    delete_converted,
    describe,
    difference,
    is_worth_comparing,
    judge,
    keep_engine,
    kept_engine,
    open_feature_engine,
    reference_engine,
)
from mnist_dist.training.features import Extractor, FeaturePlan, KerasFeatures, open_features, plan_features

IMAGES = 300


def digits(folder: Path, spec: ImageSpec) -> tuple[RecordPlan, Records]:
    source = open_source(DataConfig(limit=IMAGES))
    plan = plan_records(source, spec, storage=str(folder), limits=DecodeConfig())
    finish(plan, source)
    return plan, open_records(plan, local_dir=folder)


def planned(folder: Path, model: ModelConfig, *, spec: ImageSpec, **fields: Any) -> tuple[FeaturePlan, Records]:
    """Features of all records but the first three."""
    plan, records = digits(folder, spec)
    options: dict[str, Any] = {"precision": "float32", "stored_as": "float32", "seed": 3, **fields}
    rows = np.arange(3, IMAGES)
    return plan_features(model, records=plan, index=records.index, rows=rows, root=str(folder), **options), records


def of_bundle(folder: Path, bundle: Bundle, **fields: Any) -> tuple[FeaturePlan, Records]:
    return planned(folder, ModelConfig(backbone=str(bundle.path)), spec=bundle.info.spec, **fields)


def chosen_for(plan: FeaturePlan, folder: Path) -> FeatureEngine:
    console = Recorder()
    with Stop(console) as stop:
        return choose_engine(plan, local_dir=folder, cpus=1, session=Session(console=console, stop=stop))


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "precision", "is_worth"),
    [(4_982, "float32", False), (4_983, "float32", True), (4_983, "bfloat16", False)],
)
def test_engines_are_compared_where_that_takes_less_time_than_it_saves(
    rows: int, precision: Any, is_worth: bool
) -> None:
    records = RecordPlan(
        cache=Cache(what="records", storage="runs", key="k", rows=rows, min_shard_rows=64),
        spec=ImageSpec(height_px=9, width_px=8, channels=1),  # enlarged to 224 px for the backbone
        limits=DecodeConfig(),
        class_names=("a", "b"),
    )
    plan = FeaturePlan(
        cache=replace(records.cache, what="features"),
        records=records,
        rows=np.arange(rows),
        model=ModelConfig(backbone="mobilenet_v2"),
        precision=precision,
        stored_as="float16",
        seed=0,
    )
    assert is_worth_comparing(plan) is is_worth


def test_the_engine_of_a_cache_is_kept_beside_it_and_the_first_choice_counts(tmp_path: Path) -> None:
    plan, _ = of_bundle(tmp_path, random_features(tmp_path / "b"))
    first, second = FeatureEngine(engine="openvino", images_per_call=4), FeatureEngine(engine="onnx")
    assert kept_engine(plan) is None
    assert keep_engine(plan, first) == first
    assert keep_engine(plan, second) == first
    assert kept_engine(plan) == first
    assert len(plan.cache.missing()) == plan.cache.shards, "the choice is no shard"


def test_the_difference_is_that_of_the_worst_image_relative_to_its_norm() -> None:
    reference = np.array([[3, 4], [300, 400], [0, 0]], np.float32)
    others = np.array([[3, 4.05], [300, 401], [0, 0]], np.float32)
    assert difference(reference, others) == pytest.approx(0.01, rel=1e-4)
    assert difference(reference, reference) == 0
    assert np.isnan(difference(reference, np.full_like(reference, np.nan)))


def test_openvino_computes_the_features_of_an_imported_backbone_as_onnx_runtime_does(tmp_path: Path) -> None:
    bundle = random_features(tmp_path / "b", classes=4)
    plan, records = of_bundle(tmp_path, bundle)
    chosen = chosen_for(plan, tmp_path)
    assert chosen.check is not None
    assert (chosen.check.reference, chosen.check.images) == ("onnx", 64)
    assert chosen.check.max_difference < 1e-5
    assert chosen.check.speedup > 0
    assert "openvino" in describe(chosen)
    pixels = records.pixels[plan.rows[:5]]
    (expected,) = run_session(bundle.session, pixels, [FEATURES])
    for engine in (FeatureEngine(engine="openvino", images_per_call=4), reference_engine(plan)):
        call = open_feature_engine(plan, engine, cpus=1)
        found = np.concatenate([call(pixels[:2]), call(pixels[2:5])])
        assert found.shape == (5, WIDTH)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_openvino_computes_the_features_of_a_backbone_of_the_table_as_keras_does(tmp_path: Path) -> None:
    model = ModelConfig(backbone="mobilenet_v2", alpha=0.35, image_size_px=32)
    plan, records = planned(tmp_path, model, spec=ImageSpec(height_px=8, width_px=8, channels=1))
    chosen = chosen_for(plan, tmp_path)
    assert chosen.check is not None
    assert chosen.check.reference == "keras"
    assert chosen.check.max_difference < 1e-4
    assert kept_engine(plan) is None, "who asked keeps the choice"
    if chosen.engine == "openvino":
        pixels = records.pixels[plan.rows[:5]]
        assert difference(KerasFeatures(plan)(pixels), open_feature_engine(plan, chosen, cpus=1)(pixels)) < 1e-4
        assert list(tmp_path.rglob("model.xml"))
        delete_converted(plan)
        assert list(tmp_path.rglob("model.*")) == []


def test_only_an_engine_that_agrees_and_is_faster_is_chosen(tmp_path: Path) -> None:
    plan, _ = of_bundle(tmp_path, random_features(tmp_path / "b"))
    check = FeatureCheck(reference="onnx", images=64, max_difference=1e-3, speedup=1.1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "openvino"),
        ({"max_difference": 1.1e-3}, "onnx"),
        ({"max_difference": float("nan")}, "onnx"),
        ({"speedup": 1.09}, "onnx"),
    ]
    for fields, engine in cases:
        judged = judge(replace(check, **fields), reference_engine(plan), images_per_call=4)
        assert judged.engine == engine
        assert judged.check is not None


# --- features of an imported backbone -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("batch_size", [None, 7], ids=["any batch", "a fixed batch"])
def test_features_are_those_of_each_image_alone(tmp_path: Path, engine: Any, batch_size: int | None) -> None:
    bundle = small_bundle(tmp_path / "b", batch_size=batch_size)
    plan, records = of_bundle(tmp_path, bundle)
    call = open_feature_engine(plan, FeatureEngine(engine=engine, images_per_call=4), cpus=2)
    assert call.batch_size == (batch_size or 4)
    extracting = Extractor(plan, pixels=records.pixels, call=call)
    for shard in plan.cache.missing():
        extracting.store(shard)
    plan.cache.finish(plan.model)
    rows = open_features(plan, local_dir=tmp_path)
    some = np.array([3, 100, 258, 259, IMAGES - 1])  # a shard ends after 258
    for row in some:
        (expected,) = run_session(bundle.session, records.pixels[np.array([row])], [FEATURES])
        np.testing.assert_allclose(rows[np.array([row])], expected, rtol=1e-4, atol=1e-6)


def test_the_key_of_an_imported_backbones_features_is_that_of_its_file(tmp_path: Path) -> None:
    def key(bundle: Bundle, **fields: Any) -> str:
        return of_bundle(tmp_path, bundle, **fields)[0].cache.key

    first = random_features(tmp_path / "first", seed=3)
    again, other = random_features(tmp_path / "again", seed=3), random_features(tmp_path / "other", seed=4)
    assert first.info.model_id == again.info.model_id != other.info.model_id
    assert key(first) == key(again) == key(first, seed=9)
    assert len({key(first), key(other), key(first, stored_as="float16")}) == 3
    cropped = random_features(tmp_path / "cropped", seed=3, spec=replace(SPEC, crop_rounding="down"))
    assert key(cropped) != key(first)
