"""An imported bundle as a frozen backbone: checks, features, heads, and the one bundle of both at the end."""

# N = images, D = features, K = classes

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Command, Recorder, private_ray, run_command
from onnx_backbones import IMPORTED, SPEC, WIDTH, random_features
from onnx_models import small_bundle

from mnist_dist import load_bundle, read_predictions
from mnist_dist.config import (
    DataConfig,
    FitConfig,
    ModelConfig,
    PhasesConfig,
    RunConfig,
    TrainJob,
)
from mnist_dist.console import Stop
from mnist_dist.data.cache import column_of
from mnist_dist.data.records import open_records, read_index
from mnist_dist.errors import BundleError, ConfigError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.backbones import backbone_shape, check_model, check_trainable, find_backbone, is_imported
from mnist_dist.models.bundle import Bundle, BundleInfo, Imported, write_model_bundle
from mnist_dist.models.onnx_file import IMAGE, PROBABILITIES
from mnist_dist.on_ray.actors import Actors
from mnist_dist.on_ray.data.features import compute_missing
from mnist_dist.on_ray.data.prepare import decode, list_data
from mnist_dist.on_ray.search.search import search
from mnist_dist.on_ray.training.train import check_job, train
from mnist_dist.search_config import SearchConfig, SearchJob, SearchRunConfig, SearchSpace
from mnist_dist.session import Session
from mnist_dist.training.feature_engine import FeatureEngine, keep_engine, open_feature_engine
from mnist_dist.training.features import open_features, plan_features
from mnist_dist.tuning.space import check_space


def head_job(storage: Path, backbone: Path | str, *, name: str = "run", epochs: int = 3, **fields: Any) -> TrainJob:
    """A head on the digits that takes seconds."""
    job = TrainJob(
        data=DataConfig(limit=900),
        model=ModelConfig(backbone=str(backbone), hidden_units=20, dropout=0.1),
        phases=PhasesConfig(epochs=(epochs,), learning_rate=(0.01,), trainable=("head",)),
        fit=FitConfig(batch_size=50),
        run=RunConfig(storage=str(storage), name=name, workers=1, cpus_per_worker=1),
    )
    return replace(job, **fields)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_features(tmp_path_factory.mktemp("backbones") / "theirs", classes=4)


# --- checks ----------------------------------------------------------------------------------------------------------


def test_an_imported_bundle_is_a_backbone_that_takes_what_the_bundle_says(backbone: Bundle) -> None:
    row = find_backbone(str(backbone.path))
    assert row.imported == backbone.info
    assert (row.pooling, row.hidden_units, dict(row.cut_points)) == (None, 0, {})
    config = ModelConfig(backbone=str(backbone.path))
    assert backbone_shape(config, height_px=99, width_px=98, channels=3) == (11, 9, 1)
    check_trainable(row, "head")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "imagenet"}, "has its own weights: leave out --weights"),
        ({"image_size_px": 11}, "takes images of 11 x 9 px"),
        ({"alpha": 0.5}, "only mobilenet, mobilenet_v2 take alpha"),
        ({"pooling": "avg"}, "gives a vector and takes no pooling"),
    ],
)
def test_what_an_imported_backbone_does_not_have_is_refused(
    backbone: Bundle, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(ModelConfig(backbone=str(backbone.path), **fields))


def test_a_square_backbone_may_be_told_its_size(tmp_path: Path) -> None:
    square = random_features(tmp_path / "square", spec=ImageSpec(height_px=8, width_px=8, channels=1))
    check_model(ModelConfig(backbone=str(square.path), image_size_px=8))
    with pytest.raises(ConfigError, match="takes images of 8 x 8 px"):
        check_model(ModelConfig(backbone=str(square.path), image_size_px=16))


@pytest.mark.parametrize("trainable", ["all", "block5", 3, 0])
def test_an_imported_backbone_stays_frozen(backbone: Bundle, trainable: str | int) -> None:
    with pytest.raises(ConfigError, match="stays frozen: use --trainable head"):
        check_trainable(find_backbone(str(backbone.path)), trainable)


def test_an_unknown_name_is_refused_and_the_message_says_that_a_bundle_may_be_given() -> None:
    with pytest.raises(ConfigError, match=r"or the folder of an imported bundle\. Did you mean resnet50"):
        find_backbone("resnet5")


def test_a_plain_folder_name_is_a_bundle_unless_the_table_has_it(
    tmp_path: Path, backbone: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("theirs", "cnn"):
        (tmp_path / name).symlink_to(backbone.path)
    monkeypatch.chdir(tmp_path)
    assert find_backbone("theirs").imported == backbone.info
    assert find_backbone("cnn").imported is None
    assert [is_imported(name) for name in ("theirs", "cnn", "other", "s3://bucket/other")] == [True, False, False, True]


def test_a_folder_without_a_bundle_is_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        find_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("imported", "message"),
    [(None, "--backbone cnn --weights"), (IMPORTED, "import the file again with --backbone-only")],
)
def test_a_keras_bundle_is_no_backbone_and_the_message_says_what_to_do(
    tmp_path: Path, imported: Imported | None, message: str
) -> None:
    (tmp_path / "model.keras").write_bytes(b"anything")
    info = BundleInfo(class_names=("a", "b"), spec=SPEC, backbone="cnn", imported=imported)
    write_model_bundle(tmp_path / "bundle", tmp_path / "model.keras", info)
    with pytest.raises(ConfigError, match=message):
        find_backbone(str(tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"phases": PhasesConfig()}, "use --trainable head"),
        ({"phases": PhasesConfig(trainable=("head", "all"))}, "use --trainable head"),
        ({"fit": FitConfig(augmentation="digits")}, "augmentation needs a backbone that Keras can run"),
        ({"run": RunConfig(feature_cache=False)}, "leave out --no-feature-cache"),
        ({"fit": FitConfig(precision="bfloat16")}, "computes in float32"),
        ({"data": DataConfig(resize="crop")}, "leave out --resize"),
        ({"data": DataConfig(channels="3")}, "takes images of 1 channel"),
    ],
)
def test_a_job_that_an_imported_backbone_cannot_do_is_refused_before_any_work(
    tmp_path: Path, backbone: Bundle, fields: dict[str, Any], message: str
) -> None:
    check_job(head_job(tmp_path, backbone.path))
    with pytest.raises(ConfigError, match=message):
        check_job(head_job(tmp_path, backbone.path, **fields))


def test_a_bundle_that_gives_no_features_is_refused(tmp_path: Path) -> None:
    plain = small_bundle(tmp_path / "plain", outputs=(PROBABILITIES,))
    with pytest.raises(BundleError, match="--features-node"):
        check_job(head_job(tmp_path, plain.path))


def test_the_command_refuses_to_train_an_imported_backbone(tmp_path: Path, backbone: Bundle) -> None:
    flags = ("--backbone", str(backbone.path), "--storage", str(tmp_path / "runs"))
    code, result, err = run_command("jobs.train", "quickstart", *flags, "--trainable", "all")
    assert code == 2
    assert "--trainable head" in result["error"]
    assert not (tmp_path / "runs").exists(), err


def test_images_are_decoded_as_the_bundle_says(tmp_path: Path, backbone: Bundle) -> None:
    job = head_job(tmp_path, backbone.path)
    listed = list_data(job.data, job.model, root=str(tmp_path), console=Recorder())
    assert listed.plan.spec == SPEC


# --- search spaces ---------------------------------------------------------------------------------------------------


def search_job(storage: Path, *backbones: str, **fields: Any) -> SearchJob:
    return SearchJob(
        data=DataConfig(limit=900),
        space=SearchSpace(
            hidden_units=(0, 16),
            dropout=(0.0, 0.2),
            optimizer=("adam",),
            learning_rate=(5e-3, 2e-2),
            label_smoothing=(0.0,),
            batch_size=(50,),
        ),
        search=SearchConfig(backbones=backbones, trials=6, trial_epochs=5, finalists=2, algorithm="random"),
        run=SearchRunConfig(storage=str(storage), name="run", workers=1, cpus_per_worker=1, concurrent_trials=2),
        **fields,
    )


def test_a_search_takes_bundles_beside_the_backbones_of_its_recipe(tmp_path: Path, backbone: Bundle) -> None:
    other = random_features(tmp_path / "other", seed=4)
    job = search_job(tmp_path, str(backbone.path), str(other.path))
    assert [space.backbone for space in job.backbones] == [str(backbone.path), str(other.path)]
    assert [space.trained for space in job.backbones] == [("head",), ("head",)]
    check_space(job)


def test_a_space_that_trains_an_imported_backbone_is_refused(tmp_path: Path, backbone: Bundle) -> None:
    job = search_job(tmp_path, str(backbone.path))
    for trained in ("all", "fine-tune"):
        space = replace(job.backbones[0], trained=("head", trained))
        with pytest.raises(ConfigError, match="stays frozen"):
            check_space(replace(job, space=replace(job.space, backbones=(space,))))


# --- on Ray ----------------------------------------------------------------------------------------------------------


def probabilities_of(bundle: Bundle, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """By plain ONNX Runtime."""
    session = onnxruntime.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([PROBABILITIES], {IMAGE: pixels})[0])


def stored_pixels(bundle: Bundle) -> npt.NDArray[np.uint8]:
    table = pq.read_table(bundle.path / "calibration.parquet")
    return np.stack([np.frombuffer(value.as_py(), np.uint8).reshape(SPEC.shape) for value in table["pixels"]])


TRAIN = (
    "folder-head --data digits --limit 900 --early-stopping-patience none --epochs 60 --learning-rate 0.01 "
    "--batch-size 50 --hidden-units 20 --dropout 0.1"
)


def train_command(storage: Path, backbone: Path) -> tuple[str, ...]:
    where = ("--backbone", str(backbone), "--storage", str(storage), "--name", "run", "--workers", "1")
    return ("jobs.train", *TRAIN.split(), *where)


def test_a_head_on_an_imported_backbone_becomes_one_onnx_bundle(tmp_path: Path, backbone: Bundle) -> None:
    with Command(*train_command(tmp_path, backbone.path)) as job:
        job.until_line("epoch 3")
        job.kill()
    assert job.process.returncode == -signal.SIGKILL
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("_features/*/*")}
    code, result, err = run_command(*train_command(tmp_path, backbone.path))
    assert code == 0, err
    assert {file: file.stat().st_mtime_ns for file in before} == before, "features were computed again"
    assert result["epochs"] == 60

    bundle = load_bundle(result["bundle"])
    info = bundle.info
    assert (info.backbone, info.weights, info.spec) == ("theirs", backbone.info.model_id, SPEC)
    assert info.imported == replace(IMPORTED, activation="softmax")
    assert info.class_names == tuple("0123456789")
    assert info.config["model"]["backbone"] == str(backbone.path)
    metadata = {entry.key: entry.value for entry in onnx.load(bundle.model_path).metadata_props}
    assert json.loads(metadata["class_names"]) == list(info.class_names)
    assert {"report.html", "history.csv", "calibration.parquet"} <= {file.name for file in bundle.path.iterdir()}

    pixels = stored_pixels(bundle)
    probabilities = probabilities_of(bundle, pixels)
    labels = pq.read_table(bundle.path / "calibration.parquet")["label"].to_numpy()
    test = slice(result["validation_images"], None)
    assert result["test_images"] == len(labels[test])
    assert result["test_accuracy"] == (probabilities.argmax(axis=1) == labels)[test].mean() > 0.8
    of_truth = probabilities[np.arange(len(labels)), labels][test].astype(np.float64)
    assert result["test_loss"] == pytest.approx(-np.log(of_truth).mean(), rel=1e-4)
    assert bundle.predict(pixels[0]).predicted_class == info.class_names[probabilities[0].argmax()]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with private_ray(num_cpus=4):
        yield


@pytest.mark.chaos
def test_two_workers_and_a_fixed_batch_give_the_bundle_that_one_worker_gives(cluster: None, tmp_path: Path) -> None:
    any_batch, fixed = random_features(tmp_path / "any"), random_features(tmp_path / "fixed", batch_size=7)
    model = ModelConfig(backbone=str(any_batch.path), dropout=0.0)
    one = train(head_job(tmp_path / "one", any_batch.path, model=model), recipe="test", console=Recorder())
    job = head_job(tmp_path / "two", fixed.path, model=replace(model, backbone=str(fixed.path)))
    job = replace(job, run=replace(job.run, workers=2))
    two = train(job, recipe="test", console=Recorder())
    assert two["test_accuracy"] == one["test_accuracy"] > 0.5
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-3)
    assert load_bundle(two["bundle"]).fixed_batch == 7


@pytest.mark.slow
def test_the_engine_that_began_the_features_also_ends_them(cluster: None, tmp_path: Path, backbone: Bundle) -> None:
    job = head_job(tmp_path, backbone.path)
    listed = list_data(job.data, job.model, root=str(tmp_path), console=Recorder())
    with Stop(Recorder()) as stop:
        session = Session(console=Recorder(), stop=stop)
        decode(listed, job.data, session)
        index = read_index(listed.plan.cache)
        plan = plan_features(
            job.model,
            records=listed.plan,
            index=index,
            rows=np.arange(900),
            precision="float32",
            stored_as="float32",
            seed=0,
            root=str(tmp_path),
        )
        keep_engine(plan, FeatureEngine(engine="openvino", images_per_call=4))
        wrong = np.full((256, WIDTH), 7.5, np.float32)
        plan.cache.put(1, pa.table({"features": column_of(wrong)}))
        compute_missing(plan, session, actors=Actors(count=1, cpus=1, gpus=0, decode_in_tasks=False))
    pixels = open_records(listed.plan, local_dir=tmp_path).pixels[np.arange(4)]
    found = open_features(plan, local_dir=tmp_path)
    openvino = open_feature_engine(plan, FeatureEngine(engine="openvino", images_per_call=4), cpus=1)
    np.testing.assert_array_equal(found[np.arange(4)], openvino(pixels))
    assert (found[np.arange(256, 512)] == 7.5).all()


@pytest.mark.slow
def test_a_dry_run_computes_the_features_of_a_few_images_and_keeps_nothing(
    cluster: None, tmp_path: Path, backbone: Bundle
) -> None:
    job = head_job(tmp_path, backbone.path)
    result = train(replace(job, run=replace(job.run, dry_run=True)), recipe="test", console=Recorder())
    assert result["dry_run"]
    assert result["train_images"] == 50
    assert list(tmp_path.rglob("*.arrow")) == []


@pytest.mark.chaos  # test_plan plans features, too
def test_a_plan_forecasts_features_and_head(tmp_path: Path, backbone: Bundle) -> None:
    command = train_command(tmp_path, backbone.path)
    code, result, err = run_command(*command, "--plan")
    assert code == 0, err
    assert result["features_images_per_s"] > 0
    assert [phase["name"] for phase in result["phases"]] == ["head"]


@pytest.mark.slow
def test_a_search_over_two_imported_backbones_ends_with_one_bundle_of_both_that_scores(
    tmp_path: Path, backbone: Bundle
) -> None:
    weak = random_features(tmp_path / "weak", seed=5)
    flags = "--limit 900 --trials 6 --trial-epochs 4 --finalists 2 --name run --workers 1 --algorithm random"
    backbones = (str(backbone.path), str(weak.path), "mlp")
    command = ("jobs.search", "search-digits", "--backbones", *backbones, "--storage", str(tmp_path), *flags.split())
    code, result, err = run_command(*command)
    assert code == 0, err
    assert result["failed"] == 0, err
    rows = pq.read_table(result["leaderboard"]).to_pylist()
    of_bundles = [row for row in rows if row["backbone"] != "mlp"]
    assert of_bundles
    assert all(row["parameters"] > 11 * 9 * WIDTH and row["ms_per_image"] > 0 for row in of_bundles)


@pytest.mark.chaos
def test_the_winner_of_a_search_over_imported_backbones_scores_images(tmp_path: Path, backbone: Bundle) -> None:
    other = random_features(tmp_path / "other", seed=5)
    job = search_job(tmp_path, str(backbone.path), str(other.path))
    result = search(job, recipe="test", console=Recorder())
    assert result["failed"] == 0
    assert result["best"]["test_accuracy"] > 0.5
    bundle = load_bundle(result["bundle"])
    winner = {each.info.model_id for each in (backbone, other)}
    assert bundle.info.weights in winner
    assert bundle.info.class_names == tuple("0123456789")
    output = tmp_path / "table"
    flags = ("--bundle", result["bundle"], "--input", "digits", "--limit", "60", "--output", str(output))
    code, scored, err = run_command("jobs.score", *flags)
    assert code == 0, err
    assert scored["ok"] == 60
    table = read_predictions(output)
    assert set(table["predicted_class"].to_pylist()) <= set(bundle.info.class_names)
