"""combine: soups against NumPy, ensembles against the mean of their members, refusals, and what a kill leaves."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pytest
from harness import Command, Recorder, run_command, title
from onnx_models import NAMES as ONNX_NAMES
from onnx_models import small_bundle, small_model
from onnx_models import some_pixels as onnx_pixels
from PIL import Image

import mnist_dist
from mnist_dist.combine_config import CombineJob
from mnist_dist.combining.architecture import first_difference, layers_of
from mnist_dist.combining.building import BuildTask, Built, build
from mnist_dist.combining.combine import combine
from mnist_dist.combining.measuring import Judge
from mnist_dist.combining.members import check_members, open_members, same_architecture
from mnist_dist.combining.soups import Average, Weights, greedy_soup, uniform_soup
from mnist_dist.config import CombineMethod, ModelConfig
from mnist_dist.console import Stop
from mnist_dist.data.splits import Splits
from mnist_dist.errors import (
    BundleError,
    CannotCombine,
    ConfigError,
    LockLost,
    MnistDistError,
    ResumeConflict,
    StepKilled,
    StorageError,
    WeightsError,
)
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.backbones import find_backbone
from mnist_dist.models.bundle import (
    Bundle,
    BundleInfo,
    Combined,
    CombinedMember,
    all_layers,
    load_bundle,
    write_bundle,
    write_model_bundle,
)
from mnist_dist.models.classifier import build_classifier
from mnist_dist.on_ray.combining.validation import open_validation
from mnist_dist.on_ray.search.combination import Combination
from mnist_dist.search_config import SearchConfig
from mnist_dist.session import Session

# N = images, K = classes

SPEC = ImageSpec(height_px=9, width_px=11, channels=1)
DIGITS = ImageSpec(height_px=8, width_px=8, channels=1)
NAMES = ("ant", "bee", "cat", "dog")
DATA = {"data": ["digits"], "limit": 400}
"""What a run on some of the embedded digits records."""


def some_pixels(images: int, spec: ImageSpec = SPEC) -> Pixels:
    return np.random.default_rng(images).integers(0, 256, (images, *spec.shape), dtype=np.uint8)


def write(path: Path, *, seed: int = 0, backbone: str = "cnn", spec: ImageSpec = SPEC, **changes: Any) -> Path:
    """A bundle of random weights, also of BatchNorm's statistics, with 20 images."""
    names = changes.pop("class_names", NAMES)
    config = ModelConfig(backbone=backbone, **changes.pop("head", {}))
    model = build_classifier(config, spec=spec, num_classes=len(names), seed=seed).model
    random = np.random.default_rng(seed)
    for layer in all_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    calibration = pa.table({"pixels": [pixels.tobytes() for pixels in some_pixels(20, spec)]})
    info = BundleInfo(class_names=tuple(names), spec=spec, backbone=backbone, test={"accuracy": 0.5}, **changes)
    write_bundle(path, model, info, calibration=calibration)
    return path


def build_here(method: CombineMethod, bundles: Sequence[Path], target: Path, **changes: Any) -> Built:
    """Builds a combination in this process."""
    task = BuildTask(
        method=method,
        bundles=tuple(load_bundle(bundle) for bundle in bundles),
        target=target,
        batch_size=8,
        images=changes.pop("images", None),
    )
    built = build(task, lambda done, total: None)
    if isinstance(built, MnistDistError):
        raise built
    return built


def no_images(*_: object) -> Any:
    raise AssertionError("nothing asked for validation images")


def combine_quietly(bundles: Sequence[Path], output: Path, method: CombineMethod, **changes: Any) -> dict[str, Any]:
    job = CombineJob(bundles=tuple(map(str, bundles)), output=str(output), method=method)
    return combine(job, console=changes.pop("console", Recorder()), open_images=no_images)


def rest(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of one architecture, with BatchNorm and other seeds and dropout."""
    folder = tmp_path_factory.mktemp("runs")
    heads: list[dict[str, Any]] = [{}, {"dropout": 0.25}, {}]
    return [
        write(folder / f"{seed}" / "bundle", seed=seed, backbone="cnn_bn", head=head) for seed, head in enumerate(heads)
    ]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another architecture on the same images."""
    return write(tmp_path_factory.mktemp("other") / "bundle", backbone="cnn", seed=5)


@pytest.fixture(scope="module")
def ensemble(bundles: list[Path], other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of an ensemble, made by the job."""
    output = tmp_path_factory.mktemp("ensemble") / "bundle"
    combine_quietly([bundles[0].parent, other], output, "ensemble")
    return output


# --- the recipes on arrays -------------------------------------------------------------------------------------------


def as_weights(values: Sequence[Any]) -> Weights:
    return [np.asarray(value, np.float32) for value in values]


def models_of(values: Sequence[float]) -> list[Callable[[], Weights]]:
    """Models of one weight each."""
    return [partial(as_weights, [value]) for value in values]


def accuracy_on(judge: Judge, model: Any) -> float:
    return judge.measure(lambda pixels: np.asarray(model(pixels))).accuracy


def test_a_uniform_soup_is_the_mean_of_each_weight() -> None:
    random = np.random.default_rng(0)
    models = [[random.normal(size=(3, 5)).astype(np.float32), random.normal(size=7).astype(np.float32)] for _ in "abcd"]
    soup = uniform_soup([partial(as_weights, model) for model in models])
    assert soup.count == 4
    for number, weight in enumerate(soup.weights):
        expected = np.mean([model[number] for model in models], axis=0, dtype=np.float64)
        assert weight.dtype == np.float32
        assert np.array_equal(weight, expected.astype(np.float32))


def test_sums_are_exact_where_float32_would_lose_the_small_models() -> None:
    soup = uniform_soup(models_of([2.0**24, 1.0, 1.0, 2.0]))
    assert soup.weights[0] == (2**24 + 4) / 4


def test_a_greedy_soup_takes_the_best_first_and_leaves_out_what_lowers_the_accuracy() -> None:
    asked: list[float] = []

    def accuracy_of(weights: Any) -> float:
        asked.append(round(float(weights[0]), 4))
        return 1 - abs(asked[-1] - 0.5)

    soup, taken = greedy_soup(models_of([0.9, 0.6, 0.3, 0.48]), [0.6, 0.9, 0.8, 0.7], accuracy_of)
    assert asked == [0.45, 0.46, 0.57]  # 0.6 with 0.3: 0.95; and 0.48: 0.96; and 0.9: 0.93, which is lower
    assert taken == [1, 2, 3]
    assert soup.weights[0] == pytest.approx(0.46)


def test_a_greedy_soup_takes_what_keeps_the_accuracy_and_is_never_below_the_best() -> None:
    soup, taken = greedy_soup(models_of([1.0, 2.0, 6.0]), [0.5, 0.5, 0.4], lambda weights: 0.5)
    assert (taken, float(soup.weights[0])) == ([0, 1, 2], 3.0)  # of equals, the one that was given first
    soup, taken = greedy_soup(models_of([1.0, 2.0]), [0.25, 0.75], lambda weights: 0.5)
    assert (taken, float(soup.weights[0])) == ([1], 2.0)


def test_an_average_stays_as_it_is_when_another_model_is_tried() -> None:
    average = Average.of([np.ones(2, np.float32)])
    average.plus([np.full(2, 3, np.float32)])
    assert average.weights[0].tolist() == [1, 1]


# --- one architecture ------------------------------------------------------------------------------------------------


def test_what_only_training_knows_makes_no_other_architecture(bundles: list[Path]) -> None:
    first, second, _ = (layers_of(bundle / "model.keras") for bundle in bundles)
    assert first_difference(first, second) is None
    assert same_architecture(load_bundle(bundles[0]), load_bundle(bundles[1]))


@pytest.mark.parametrize(
    ("head", "difference"),
    [
        ({"hidden_units": 6}, r"layer 'logits': expected units=4, received units=6 in 'hidden'"),
        ({"image_size_px": 20}, r"expected class_name=\"Rescaling\", received class_name=\"Resize\""),
    ],
)
def test_another_head_or_input_is_another_architecture(head: dict[str, Any], difference: str, tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", backbone="cnn"), write(tmp_path / "second", head=head)
    with pytest.raises(ConfigError, match=rf"one architecture, that of .*first: .*{difference}.* Received: .*second"):
        check_members(open_members([str(first), str(second)]), "soup")


# --- soups -----------------------------------------------------------------------------------------------------------


def test_a_soup_of_bundles_has_the_mean_of_all_weights_and_of_batch_norms_statistics(
    bundles: list[Path], tmp_path: Path
) -> None:
    built = build_here("soup", bundles, tmp_path / "soup.keras")
    weights = [load_bundle(bundle).model.get_weights() for bundle in bundles]
    soup = keras.saving.load_model(tmp_path / "soup.keras")
    for found, *members in zip(soup.get_weights(), *weights, strict=True):
        assert np.array_equal(found, np.mean(members, axis=0, dtype=np.float64).astype(np.float32))
    assert (built.used, built.accuracies, built.measured) == ((0, 1, 2), None, None)


def test_a_soup_of_onnx_bundles_has_the_mean_of_all_weights(tmp_path: Path) -> None:
    members = [small_bundle(tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    build_here("soup", [member.path for member in members], tmp_path / "soup.onnx")
    found, *weights = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}
        for file in (tmp_path / "soup.onnx", *(member.model_path for member in members))
    )
    assert set(found) == {"scale", "kernel", "dense", "bias"}
    for name, value in found.items():
        np.testing.assert_allclose(value, (weights[0][name] + weights[1][name]) / 2, rtol=1e-6)


@pytest.fixture(scope="module")
def runs_on_digits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four bundles that say that they were trained on some of the digits."""
    folder = tmp_path_factory.mktemp("digits")
    names = tuple("0123456789")
    return [
        write(folder / str(seed), seed=seed, spec=DIGITS, class_names=names, config={"data": DATA})
        for seed in (1, 2, 3, 4)
    ]


def opened_images(bundles: Sequence[Path], storage: Path, **changes: Any) -> Any:
    job = CombineJob(
        bundles=tuple(map(str, bundles)), output="soup", method="greedy-soup", storage=str(storage), **changes
    )
    infos = [load_bundle(bundle).info for bundle in bundles]
    return open_validation(job, infos, Session(console=Recorder(), stop=None))  # type: ignore[arg-type]


def test_a_greedy_soup_is_what_the_recipe_makes_of_the_runs_validation_images(
    runs_on_digits: list[Path], tmp_path: Path
) -> None:
    images = opened_images(runs_on_digits, tmp_path / "runs")
    assert len(images.rows) == pytest.approx(0.1 * DATA["limit"], abs=6)  # type: ignore[operator]
    built = build_here("greedy-soup", runs_on_digits, tmp_path / "soup.keras", images=images)

    judge, models = (
        Judge(images, batch_size=16, report=lambda number: None),
        [load_bundle(p).model for p in runs_on_digits],
    )
    accuracies = [accuracy_on(judge, model) for model in models]
    assert built.accuracies == tuple(accuracies)
    taken: list[Any] = []
    best = -1.0
    for number in np.argsort([-accuracy for accuracy in accuracies], kind="stable"):
        trial = [*taken, models[number].get_weights()]
        soup = keras.models.clone_model(models[0])
        soup.set_weights([np.mean(weights, axis=0) for weights in zip(*trial, strict=True)])
        accuracy = accuracy_on(judge, soup)
        if accuracy >= best:
            taken, best = trial, accuracy
    assert built.measured is not None
    assert (len(built.used), built.measured.accuracy) == (len(taken), best)
    assert best >= max(accuracies)


def test_images_other_than_those_of_a_run_are_refused(runs_on_digits: list[Path], tmp_path: Path) -> None:
    other = write(
        tmp_path / "other", spec=DIGITS, class_names="0123456789", config={"data": DATA}, data_fingerprint="1f"
    )
    with pytest.raises(ConfigError, match=r"validation images must be those of the runs.*bundle 2 .*other images"):
        opened_images([runs_on_digits[0], other], tmp_path / "runs")
    split = write(
        tmp_path / "split", spec=DIGITS, class_names="0123456789", config={"data": DATA | {"validation_fraction": 0.3}}
    )
    with pytest.raises(ConfigError, match=r"validation_fraction: 0.3 now, 0.1 .*Received: bundle 2"):
        opened_images([runs_on_digits[0], split], tmp_path / "runs")


def test_without_a_record_of_the_images_they_have_to_be_named(bundles: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not say what it was trained on: name its images with --data"):
        opened_images(bundles, tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"must have the classes of the bundles, 4: ant, bee, cat, dog. Received: 10"):
        opened_images(bundles, tmp_path / "runs", data=("digits",))


# --- ensembles -------------------------------------------------------------------------------------------------------


def mean_of(bundles: Sequence[Path], pixels: Pixels) -> np.ndarray:
    return np.asarray(np.mean([np.asarray(load_bundle(bundle).model(pixels)) for bundle in bundles], axis=0))


def test_an_ensemble_gives_the_mean_of_its_members(bundles: list[Path], other: Path, ensemble: Path) -> None:
    bundle, pixels = load_bundle(ensemble), some_pixels(7)
    expected = mean_of([bundles[0], other], pixels)
    np.testing.assert_allclose(np.asarray(bundle.model(pixels)), expected, atol=1e-6)
    np.testing.assert_allclose(bundle.model.predict(pixels, verbose=0), expected, atol=1e-6)
    predictions = bundle.predict(list(pixels))
    np.testing.assert_allclose([each.probabilities for each in predictions], expected, atol=1e-6)


def test_the_bundle_says_what_it_is_made_of_and_nothing_that_was_not_measured(
    bundles: list[Path], other: Path, ensemble: Path
) -> None:
    info = load_bundle(ensemble).info
    assert info.combined is not None
    assert info.combined.method == "ensemble"
    members = [(member.uri, member.model_id) for member in info.combined.members]
    assert members == [(str(path), load_bundle(path).info.model_id) for path in (bundles[0], other)]
    assert (info.backbone, info.validation, info.test) == ("ensemble of cnn_bn, cnn", {}, {})
    assert rest(ensemble) == ["MLmodel", "bundle.json", "calibration.parquet", "model.keras"]
    assert (ensemble / "calibration.parquet").read_bytes() == (bundles[0] / "calibration.parquet").read_bytes()


def test_an_ensemble_loads_without_this_package(ensemble: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", some_pixels(3))
    script = (
        "import sys, keras, numpy\n"
        "model = keras.saving.load_model(sys.argv[1], safe_mode=True)\n"
        "numpy.save(sys.argv[2] + '/found.npy', model.predict(numpy.load(sys.argv[2] + '/pixels.npy'), verbose=0))\n"
        "assert 'mnist_dist' not in sys.modules\n"
    )
    command = [sys.executable, "-I", "-c", script, str(ensemble / "model.keras"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    expected = np.asarray(load_bundle(ensemble).model(some_pixels(3)))
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-6)


def test_an_ensemble_has_no_features(ensemble: Path) -> None:
    with pytest.raises(BundleError, match=r"an ensemble gives no features.*take one of its members"):
        load_bundle(ensemble).num_features  # noqa: B018
    with pytest.raises(ConfigError, match=r"an ensemble gives no features: take one of its members"):
        find_backbone(str(ensemble))
    with pytest.raises(WeightsError, match=r"an ensemble has several backbones: give one of its members"):
        build_classifier(ModelConfig(backbone="cnn", weights=str(ensemble)), spec=SPEC, num_classes=4)


def test_an_ensemble_of_onnx_bundles_gives_the_mean_of_its_members(tmp_path: Path) -> None:
    members = [small_bundle(tmp_path / f"{seed}", seed=seed) for seed in (1, 2, 3)]
    build_here("ensemble", [member.path for member in members], tmp_path / "mean.onnx")
    pixels = onnx_pixels(5)
    found = onnxruntime.InferenceSession(tmp_path / "mean.onnx").run(None, {"image": pixels})
    expected = np.mean([member.session.run(["probabilities"], {"image": pixels})[0] for member in members], axis=0)
    assert len(found) == 1
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    info = dataclasses.replace(members[0].info, model_id="")
    write_model_bundle(tmp_path / "bundle", tmp_path / "mean.onnx", info)  # as a bundle needs it
    assert load_bundle(tmp_path / "bundle").predict(pixels[0]).probabilities == pytest.approx(expected[0], abs=1e-6)


def with_opset(path: Path, version: int, *, seed: int) -> Path:
    """A bundle whose model has another version of ONNX' operators."""
    model = small_model(seed=seed)
    model.opset_import[0].version = version
    onnx.save(model, path.with_suffix(".onnx"))
    info = BundleInfo(class_names=ONNX_NAMES, spec=small_bundle(path / "like").info.spec, backbone="small")
    write_model_bundle(path / "bundle", path.with_suffix(".onnx"), info)
    return path / "bundle"


def test_onnx_members_of_several_versions_get_the_newest(tmp_path: Path) -> None:
    older, newer = with_opset(tmp_path / "a", 13, seed=1), with_opset(tmp_path / "b", 18, seed=2)
    build_here("ensemble", [older, newer], tmp_path / "mean.onnx")
    assert onnx.load(tmp_path / "mean.onnx").opset_import[0].version == 18


# --- refused ---------------------------------------------------------------------------------------------------------


def refuse(message: str, *members: Path | Bundle, method: CombineMethod = "ensemble") -> None:
    paths = [str(member.path if isinstance(member, Bundle) else member) for member in members]
    with pytest.raises(ConfigError, match=message):
        check_members(open_members(paths), method)


def test_what_does_not_go_together_is_refused_with_what_was_expected_and_what_came(
    bundles: list[Path], tmp_path: Path
) -> None:
    first = bundles[0]
    classes = write(tmp_path / "classes", class_names=("ant", "bee", "dog", "cat"))
    refuse(
        r"classes .*: expected ant, bee, cat, dog as in .*0/bundle. Received: ant, bee, dog, cat in .*", first, classes
    )
    size = write(tmp_path / "size", spec=dataclasses.replace(SPEC, width_px=12, resize="crop"))
    refuse(
        r"expected width_px=11, resize='stretch' as in .*Received: width_px=12, resize='crop' in .*size", first, size
    )
    onnx_model = small_bundle(tmp_path / "onnx")
    refuse(r"Keras and ONNX .*: expected model.keras as in .*Received: model.onnx in .*onnx", first, onnx_model)
    many = small_bundle(tmp_path / "many", activation="Sigmoid", seed=3)
    refuse(r"multi-label .*: expected False as in .*onnx. Received: True in .*many", onnx_model, many)
    fixed = small_bundle(tmp_path / "fixed", batch_size=4, seed=4)
    refuse(r"images per call: expected None as in .*onnx. Received: 4 in .*fixed", onnx_model, fixed)


def test_the_same_model_twice_is_refused(bundles: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(bundles[0], tmp_path / "copy")
    refuse(r"each model can be combined once: the same model is in .*0/bundle. Received: .*copy", bundles[0], copy)


@pytest.mark.parametrize("method", ["soup", "greedy-soup", "ensemble"])
def test_multi_label_models_are_combined_and_not_judged(method: CombineMethod, tmp_path: Path) -> None:
    members = [small_bundle(tmp_path / str(seed), activation="Sigmoid", seed=seed) for seed in (1, 2)]
    refuse(r"judged by the accuracy, which a multi-label model has not.*leave out --data", *members, method=method)
    check_members(open_members([str(member.path) for member in members]), method, is_judged=False)


def test_a_bundle_without_classes_is_refused(bundles: list[Path], tmp_path: Path) -> None:
    refuse(r"gives features and no classes", small_bundle(tmp_path / "backbone", names=()), bundles[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bundles": ("a",)}, r"name two bundles or more. Received: bundles=\('a',\)"),
        ({"output": ""}, r"output must be a folder or a bucket prefix"),
        ({"output": "a/b"}, r"output must lie outside of the bundle a"),
        ({"bundles": ("out/a", "b"), "output": "out"}, r"output must lie outside of the bundle out/a"),
        ({"batch_size": 0}, r"batch_size must be at least 1. Received: batch_size=0"),
        ({"lock_wait_s": -1.0}, r"lock_wait_s must be 0 or above"),
    ],
)
def test_impossible_combinations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CombineJob(**({"bundles": ("a", "b"), "output": "c", "method": "soup"} | changes))


# --- the output ------------------------------------------------------------------------------------------------------


def test_the_same_combination_is_returned_at_once_and_another_one_is_refused(
    bundles: list[Path], other: Path, ensemble: Path
) -> None:
    before, console = ensemble.stat().st_mtime_ns, Recorder()
    result = combine_quietly([bundles[0], other], ensemble, "ensemble", console=console)
    assert result["model_id"] == load_bundle(ensemble).info.model_id
    assert console.lines == [f"{ensemble} is this combination already"]
    with pytest.raises(ResumeConflict, match=r"is another combination.*\n  model_ids: "):
        combine_quietly([other, bundles[0]], ensemble, "ensemble")
    with pytest.raises(ResumeConflict, match=r"method: 'soup' now, 'ensemble' in the run"):
        combine_quietly(bundles[:2], ensemble, "soup")
    assert ensemble.stat().st_mtime_ns == before


def test_an_output_with_something_else_is_left_alone(bundles: list[Path], other: Path, tmp_path: Path) -> None:
    with pytest.raises(ResumeConflict, match=r"holds a bundle that is no combination"):
        combine_quietly(bundles, other, "ensemble")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"must be new or empty.*notes.txt"):
        combine_quietly(bundles, tmp_path, "soup")
    assert rest(tmp_path) == ["notes.txt"]


def test_a_model_that_does_not_say_what_its_members_say_is_not_written(bundles: list[Path], tmp_path: Path) -> None:
    broken = keras.saving.load_model(bundles[0] / "model.keras")
    logits = broken.get_layer("logits")
    logits.set_weights([np.full(weight.shape, np.nan) for weight in logits.get_weights()])
    info = dataclasses.replace(load_bundle(bundles[0]).info, model_id="")
    write_bundle(tmp_path / "broken", broken, info)
    with pytest.raises(MnistDistError, match=r"does not predict what its members say, and was not written: .* by nan"):
        combine_quietly([bundles[1], tmp_path / "broken"], tmp_path / "soup", "soup")
    assert rest(tmp_path) == ["broken"]


@pytest.mark.slow
def test_the_command_combines_what_judged_it_and_answers_as_before(runs_on_digits: list[Path], tmp_path: Path) -> None:
    command = ("jobs.combine", *map(str, runs_on_digits), "--output", str(tmp_path / "soup"), "--method", "greedy-soup")
    command = (*command, "--storage", str(tmp_path / "runs"))
    code, result, err = run_command(*command)
    assert code == 0, err
    assert result["validation_accuracy"] >= max(member["validation_accuracy"] for member in result["members"])
    assert load_bundle(tmp_path / "soup").info.validation["accuracy"] == result["validation_accuracy"]
    assert f"bundle: {tmp_path / 'soup'}" in err
    code, again, _ = run_command(*command)
    assert (code, again["model_id"], again["members"]) == (0, result["model_id"], result["members"])
    code, refused, _ = run_command(*command, "--data", "digits")
    assert (code, refused["error_type"]) == (2, "ResumeConflict")


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_nothing_and_the_same_command_does_it(
    bundles: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out" / "soup"
    command = ("jobs.combine", *map(str, bundles), "--output", str(output), "--method", "soup")
    with Command(*command) as job:
        assert job.until(lambda: any("engines.steps" in title(process) for process in job.descendants()))
        job.kill()
    assert not output.exists()
    code, result, err = run_command(*command)
    assert (code, result["job"]) == (0, "combine"), err
    assert rest(output.parent) == [".soup.lock", "soup"]


@pytest.mark.slow
def test_a_signal_leaves_nothing(bundles: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out" / "soup"
    with Command("jobs.combine", *map(str, bundles), "--output", str(output), "--method", "soup") as job:
        job.until_line("soup of 3 bundles")
        os.kill(job.process.pid, signal.SIGTERM)
        code, _, _ = job.ended()
    assert code == 143
    assert not output.exists()


@pytest.mark.slow
def test_a_combination_is_scored_evaluated_and_exported(ensemble: Path, tmp_path: Path) -> None:
    pixels = some_pixels(12)
    for number, image in enumerate(pixels):
        file = tmp_path / "images" / NAMES[number % 4] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(file)
    table = str(tmp_path / "scored")
    flags = ("--bundle", str(ensemble), "--input", str(tmp_path / "images"), "--output", table)
    code, _, err = run_command("jobs.score", *flags)
    assert code == 0, err
    rows = sorted(mnist_dist.read_predictions(table).to_pylist(), key=lambda row: row["uri"].rpartition("/")[2])
    expected = np.asarray(load_bundle(ensemble).model(pixels))
    np.testing.assert_allclose([row["probabilities"] for row in rows], expected, atol=1e-4)
    accuracy = np.mean(expected.argmax(axis=1) == np.arange(12) % 4)
    assert mnist_dist.evaluate(table, output=str(tmp_path / "evaluated")).accuracy == pytest.approx(accuracy)
    for format in ("onnx", "openvino"):
        flags = ("--bundle", str(ensemble), "--format", format, "--output", str(tmp_path / format))
        code, result, err = run_command("jobs.export", *flags)
        assert code == 0, err
        assert result["max_abs_difference"] < 1e-5


def combined_finalists(
    tmp_path: Path, *, accuracies: Sequence[float], winner_loss: float, combined: float, used: Sequence[bool]
) -> Any:
    """The combination of the finalists 7 and 3, as a search finds it when it resumes after its storage was moved."""
    finalists = {
        number: write(tmp_path / str(number), seed=number, validation={"accuracy": accuracy, "loss": winner_loss})
        for number, accuracy in zip((7, 3), accuracies, strict=True)
    }
    members = tuple(
        CombinedMember(
            uri=f"/before/{number}",
            model_id=load_bundle(bundle).info.model_id,
            is_used=is_used,
            validation_accuracy=accuracy,
        )
        for (number, bundle), accuracy, is_used in zip(finalists.items(), accuracies, used, strict=True)
    )
    write(
        tmp_path / "combined",
        combined=Combined(method="greedy-soup", members=members),
        validation={"accuracy": combined, "loss": 0.5},
    )
    return Combination(
        method="greedy-soup",
        finalists={number: str(bundle) for number, bundle in finalists.items()},
        uri=str(tmp_path / "combined"),
        decoded=None,  # type: ignore[arg-type]
        splits=Splits(np.arange(0), np.arange(1_000), np.arange(0), duplicates=0, duplicate_pairs=(), dropped=0),
        session=None,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("accuracies", "combined", "used", "winner_loss", "is_better"),
    [
        ((0.9, 0.8), 0.9, (True, True), 0.4, True),
        ((0.9, 0.8), 0.88, (True, True), 0.4, False),
        ((0.9, 0.8), 0.88, (True, True), 0.51, True),  # of 1,000 images 95 % lie above 0.880
        ((0.9, 0.8), 0.879, (True, True), 0.51, False),
        ((0.9, 0.8), 0.9, (True, False), 0.51, False),  # it is the winner itself
    ],
)
def test_finalists_combined_replace_the_winner_only_if_they_are_as_good_on_validation(
    accuracies: Sequence[float],
    combined: float,
    used: Sequence[bool],
    winner_loss: float,
    is_better: bool,
    tmp_path: Path,
) -> None:
    found = combined_finalists(tmp_path, accuracies=accuracies, winner_loss=winner_loss, combined=combined, used=used)
    assert found.make()  # It is there already.
    assert found.is_better is is_better
    members = [number for number, is_used in zip((7, 3), used, strict=True) if is_used]
    expected = {"method": "greedy-soup", "members": members, "val_accuracy": combined, "val_loss": 0.5}
    assert found.described() == expected | {"is_bundle": is_better}


def finalists_at(tmp_path: Path, *uris: Path, method: CombineMethod = "ensemble") -> tuple[Combination, Recorder]:
    """A combination of untested bundles that is not made yet."""
    console = Recorder()
    combination = Combination(
        method=method,
        finalists=dict(enumerate(map(str, uris))),
        uri=str(tmp_path / "combined"),
        decoded=None,  # type: ignore[arg-type]
        splits=Splits(*(np.zeros(0, np.int64),) * 3, 0, (), 0),
        session=Session(console=console, stop=Stop(console)),
    )
    return combination, console


def test_only_finalists_that_fit_are_combined_and_of_the_same_model_one(
    bundles: list[Path], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = shutil.copytree(bundles[0], tmp_path / "again")
    combination, _ = finalists_at(tmp_path, bundles[1], other, bundles[0], again)
    given = list[str]()
    monkeypatch.setattr(Combination, "_combine", lambda _, members: given.extend(member.uri for member in members))
    assert combination.make()
    assert given == [str(path) for path in (bundles[1], other, bundles[0])]

    alone, console = finalists_at(tmp_path, bundles[0], again)
    assert not alone.make()
    assert console.lines == ["ensemble: no other finalist fits the winner: nothing to combine"]


@pytest.mark.parametrize("error", [CannotCombine("they differ by 0.3"), StepKilled("killed by signal 9")])
def test_a_combination_that_fails_costs_the_search_nothing_else(
    bundles: list[Path], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Combination, "_combine", fail)
    combination, console = finalists_at(tmp_path, bundles[0], other)
    assert not combination.make()
    assert console.lines == [f"ensemble failed, so the winner stays alone: {error}"]


@pytest.mark.parametrize("error", [StorageError("the disk is full"), LockLost("another driver")])
def test_what_ends_a_search_ends_it_also_while_it_combines(
    bundles: list[Path], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Combination, "_combine", fail)
    with pytest.raises(type(error), match=str(error)):
        finalists_at(tmp_path, bundles[0], other)[0].make()


def test_a_search_combines_two_finalists_or_more() -> None:
    with pytest.raises(
        ConfigError, match=r"combine needs finalists of at least 2. Received: combine='soup', finalists=1"
    ):
        SearchConfig(combine="soup", finalists=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soup", pytest.param("ensemble", marks=pytest.mark.chaos)])
def test_a_search_returns_its_finalists_combined_unless_the_winner_is_better(method: str, tmp_path: Path) -> None:
    flags = "--limit 900 --trials 3 --trial-epochs 2 --finalists 2 --finalist-epochs 3 --backbones cnn --name run"
    command = ("jobs.search", "search-digits", "--storage", str(tmp_path), *flags.split(), "--combine", method)
    code, result, err = run_command(*command)
    assert code == 0, err
    combined, info = result["combined"], load_bundle(result["bundle"]).info
    assert result["best"]["test_accuracy"] == info.test["accuracy"]
    assert result["best"]["val_accuracy"] == info.validation["accuracy"]
    assert (info.combined is not None) is combined["is_bundle"]
    if combined["is_bundle"]:
        assert len(combined["members"]) == 2
        assert not list((tmp_path / "run" / "finalists").glob("*/bundle"))  # the winner was not tested
    code, again, _ = run_command(*command)
    assert (code, again["best"], again["combined"]) == (0, result["best"], combined)
