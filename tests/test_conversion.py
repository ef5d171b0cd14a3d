"""conversion: which engine is taken, what its check has to find, and what is kept of it; at the end through the job."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Recorder
from sklearn.datasets import load_digits
from test_score_kills import SHARD, Job, rows_of, squares

from mnist_dist import storage
from mnist_dist.config import EngineConfig, EngineName, EnginePrecision, ModelConfig
from mnist_dist.console import Stop
from mnist_dist.data.images import ImageSpec
from mnist_dist.engines import conversion
from mnist_dist.engines import steps as steps_module
from mnist_dist.engines.calibration import calibration_images, calibration_labels
from mnist_dist.engines.conversion import (
    CALL_SIZES,
    COMPARED_IMAGES,
    FEW_IMAGES,
    LARGEST_DIFFERENCE,
    LARGEST_LOSS,
    LEAST_AGREEMENT,
    WORTH_A_LOAD,
    EngineChoice,
    candidates,
    compare,
    fastest,
    open_engine,
    prepare_engine,
    smallest_fast,
    why_not,
)
from mnist_dist.engines.converted import openvino_core
from mnist_dist.engines.engine import KerasEngine
from mnist_dist.errors import BundleError, ConfigError, MnistDistError, ServiceError, StepFailed, StorageError
from mnist_dist.models.bundle import Bundle, load_bundle, write_bundle
from mnist_dist.models.classifier import build_classifier

# N = images that are compared, K = classes

SPEC = ImageSpec(height_px=8, width_px=8, channels=1)
NAMES = tuple(str(number) for number in range(10))
TRAINED = 700  # of the 1,797 digits; the others are the bundle's calibration images
BATCH = 32

Name = tuple[str, str]
"""Engine and precision."""


# --- what is asked for, and what may be taken ------------------------------------------------------------------------


def named(choices: list[EngineChoice]) -> list[Name]:
    return [(choice.engine, choice.precision) for choice in choices]


KERAS, FLOAT32, BFLOAT16 = ("keras", "float32"), ("openvino", "float32"), ("openvino", "bfloat16")
INT8, ONNX = ("openvino", "int8"), ("onnx", "float32")


@pytest.mark.parametrize("has_images", [True, False])
@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize(
    ("flags", "expected", "with_bfloat16"),
    [
        ({}, [KERAS, FLOAT32], True),
        ({"precision": "float32"}, [KERAS, FLOAT32], False),
        ({"precision": "bfloat16"}, [BFLOAT16], False),
        ({"precision": "int8"}, [INT8], False),
        ({"engine": "keras"}, [KERAS], False),
        ({"engine": "keras", "precision": "float32"}, [KERAS], False),
        ({"engine": "openvino"}, [FLOAT32], True),
        ({"engine": "openvino", "precision": "float32"}, [FLOAT32], False),
        ({"engine": "openvino", "precision": "bfloat16"}, [BFLOAT16], False),
        ({"engine": "openvino", "precision": "int8"}, [INT8], False),
        ({"engine": "onnx"}, [ONNX], False),
        ({"engine": "onnx", "precision": "float32"}, [ONNX], False),
    ],
)
def test_what_fits_the_flags(
    flags: dict[str, Any], expected: list[Name], with_bfloat16: bool, has_images: bool, has_bfloat16: bool
) -> None:
    found = candidates(EngineConfig(**flags), gpu=False, has_images=has_images, has_bfloat16=has_bfloat16)
    more = [BFLOAT16] if with_bfloat16 and has_images and has_bfloat16 else []
    assert named(found) == expected + more


@pytest.mark.parametrize("flags", [{}, {"engine": "keras"}, {"precision": "float32"}])
def test_on_gpus_it_is_keras(flags: dict[str, Any]) -> None:
    found = candidates(EngineConfig(**flags), gpu=True, has_images=True, has_bfloat16=True)
    assert named(found) == [KERAS]


@pytest.mark.parametrize(
    "flags", [{"engine": "openvino"}, {"engine": "onnx"}, {"precision": "bfloat16"}, {"precision": "int8"}]
)
def test_an_engine_for_cpus_is_refused_on_gpus(flags: dict[str, Any]) -> None:
    name, value = next(iter(flags.items()))
    expected = rf"on GPUs the engine is keras, in float32 \(or --gpus-per-actor 0\). Received: .*{name}='{value}'"
    with pytest.raises(ConfigError, match=expected):
        candidates(EngineConfig(**flags), gpu=True, has_images=True, has_bfloat16=True)


@pytest.mark.parametrize("engine", ["keras", "onnx"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_short_numbers_are_those_of_openvino(engine: Any, precision: Any) -> None:
    expected = rf"go with engine openvino. Received: engine='{engine}', precision='{precision}'"
    with pytest.raises(ConfigError, match=expected):
        EngineConfig(engine=engine, precision=precision)


def choice(
    engine: EngineName = "openvino", precision: EnginePrecision = "float32", *, speed: float = 100.0, **facts: Any
) -> EngineChoice:
    """An engine whose check found nothing wrong, but for what is given."""
    good = {"source": "calibration", "images": 1_000, "max_abs_difference": 0.0, "agreement": 1.0, "accuracy_loss": 0.0}
    return EngineChoice(engine=engine, precision=precision, facts={**good, "images_per_s": speed, **facts})


NAN = float("nan")


@pytest.mark.parametrize(
    ("precision", "facts", "why"),
    [
        ("float32", {"max_abs_difference": 1e-4, "agreement": 0.5, "accuracy_loss": 0.5, "images": 3}, None),
        ("float32", {"max_abs_difference": 1.0001e-4}, "a probability differs by 0.0001"),
        ("float32", {"max_abs_difference": NAN}, "a probability differs by nan"),
        ("float32", {"max_abs_difference": 9e-5, "source": "random", "images": 256}, None),
        ("bfloat16", {"max_abs_difference": 0.4, "agreement": 0.995, "accuracy_loss": 0.002}, None),
        ("bfloat16", {"agreement": 0.9949}, "the top class of 0.51% of the images differs"),
        ("bfloat16", {"agreement": NAN}, "the top class of nan% of the images differs"),
        ("bfloat16", {"accuracy_loss": 0.0021}, "accuracy is 0.21 points lower"),
        ("bfloat16", {"accuracy_loss": NAN}, "accuracy is nan points lower"),
        ("bfloat16", {"accuracy_loss": -0.3}, None),
        ("bfloat16", {"accuracy_loss": None, "agreement": 0.995}, None),
        ("bfloat16", {"accuracy_loss": None, "agreement": 0.994}, "the top class of 0.60% of the images differs"),
        ("bfloat16", {"max_abs_difference": NAN}, "a probability is no number"),
        ("bfloat16", {"images": 1_000, "agreement": 0.999}, None),
        ("bfloat16", {"images": 999, "agreement": 998 / 999}, "top class of 0.10% of few images differs"),
        ("bfloat16", {"images": 999, "agreement": 1.0}, None),
        ("bfloat16", {"images": 1, "agreement": 1.0}, None),
        ("bfloat16", {"images": 999, "agreement": NAN}, "top class of nan% of few images differs"),
        ("bfloat16", {"source": "random", "images": 256}, "the bundle has no calibration images to compare on"),
        ("int8", {"agreement": 0.99}, "the top class of 1.00% of the images differs"),
    ],
)
def test_what_an_engine_has_to_agree_in(precision: EnginePrecision, facts: dict[str, Any], why: str | None) -> None:
    assert why_not(choice(precision=precision, **facts)) == why


def test_the_limits_are_those_that_were_promised() -> None:
    assert (LARGEST_DIFFERENCE, LEAST_AGREEMENT, LARGEST_LOSS, FEW_IMAGES) == (1e-4, 0.995, 0.002, 1_000)
    assert COMPARED_IMAGES >= FEW_IMAGES  # else nothing would ever be many


def test_keras_agrees_with_itself() -> None:
    assert why_not(choice("keras", max_abs_difference=NAN, agreement=0.0)) is None


FAST, SLOW = choice(speed=200.0), choice(precision="bfloat16", speed=100.0)


@pytest.mark.parametrize(
    ("checked", "expected"),
    [
        ([FAST, SLOW], FLOAT32),
        ([SLOW, FAST], FLOAT32),
        ([FAST, choice(precision="bfloat16", speed=300.0)], BFLOAT16),
        ([FAST, choice(precision="bfloat16", speed=300.0, agreement=0.9)], FLOAT32),
        ([FAST, choice(precision="int8", speed=900.0)], FLOAT32),
        ([choice("keras", speed=200.0 * WORTH_A_LOAD - 1), FAST], FLOAT32),
        ([choice("keras", speed=200.0 * WORTH_A_LOAD + 1), FAST], KERAS),
        ([choice("keras", speed=1.0), choice(speed=900.0, max_abs_difference=0.1), SLOW], BFLOAT16),
        ([choice("keras", speed=1.0), choice(speed=900.0, max_abs_difference=NAN)], KERAS),
        ([choice(speed=900.0, max_abs_difference=0.1)], KERAS),
        ([choice(precision="int8", speed=900.0)], KERAS),
    ],
)
def test_the_fastest_that_agrees_is_taken(checked: list[EngineChoice], expected: Name) -> None:
    assert named([fastest(checked)]) == [expected]


def one_hot(classes: list[int], *, certain: float = 1.0) -> npt.NDArray[np.float32]:
    """`float32 [N, 3]`"""
    rows = np.full((len(classes), 3), (1 - certain) / 2, np.float32)
    rows[np.arange(len(classes)), classes] = certain
    return rows


def test_comparing_counts_what_differs() -> None:
    theirs, ours = one_hot([0, 1, 2, 1]), one_hot([0, 1, 0, 1])
    labels = np.asarray([0, 1, 2, 0])
    found = compare(theirs, ours, labels)
    assert found == {"max_abs_difference": 1.0, "agreement": 0.75, "accuracy_loss": 0.25}
    assert compare(ours, theirs, labels)["accuracy_loss"] == -0.25
    assert compare(theirs, ours, None)["accuracy_loss"] is None
    small = compare(one_hot([0, 1]), one_hot([0, 1], certain=0.98), None)
    assert small["agreement"] == 1.0
    assert small["max_abs_difference"] == pytest.approx(0.02)
    assert np.isnan(compare(one_hot([0]), np.full((1, 3), NAN, np.float32), None)["max_abs_difference"])


@pytest.mark.parametrize("right", [1_000, 902, 871, 300])
@pytest.mark.parametrize(("lost", "passes"), [(2, True), (3, False)])
def test_two_of_a_thousand_images_may_be_lost_and_no_more(right: int, lost: int, passes: bool) -> None:
    labels = np.zeros(1_000, np.int64)
    theirs, ours = (one_hot([0] * n + [1] * (1_000 - n)) for n in (right, right - lost))
    assert (why_not(choice(precision="bfloat16", **compare(theirs, ours, labels))) is None) == passes


def test_what_is_said_of_an_engine() -> None:
    assert str(EngineChoice()) == str(choice("keras")) == "keras float32"
    assert str(choice(agreement=0.9987)) == "openvino float32 (same top class as Keras for 99.87%)"
    assert EngineChoice().noted() == {"engine": "keras", "precision": "float32", "engine_check": {}}
    noted = choice(precision="int8", agreement=0.97).noted()
    assert (noted["engine"], noted["precision"], noted["engine_check"]["agreement"]) == ("openvino", "int8", 0.97)
    assert json.loads(json.dumps(noted)) == noted


# --- a bundle that knows digits --------------------------------------------------------------------------------------


def train(path: Path, *, seed: int, calibration: int = 1_797 - TRAINED) -> Bundle:
    """A bundle that was trained for some seconds, with so many labelled images that it was not trained on."""
    digits = load_digits()
    pixels = (digits.images * 15.9).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    classifier = build_classifier(ModelConfig(backbone="cnn"), spec=SPEC, num_classes=len(NAMES), seed=seed)
    classifier.network.compile(
        optimizer=keras.optimizers.Adam(2e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    classifier.network.fit(pixels[:TRAINED].astype(np.float32), labels[:TRAINED], batch_size=64, epochs=4, verbose=0)
    kept = slice(TRAINED, TRAINED + calibration)
    encoded = pa.array([image.tobytes() for image in pixels[kept]], pa.binary())
    write_bundle(
        path,
        model=classifier.model,
        class_names=NAMES,
        spec=SPEC,
        backbone="cnn",
        weights="none",
        config={},
        data_fingerprint="none",
        validation={},
        test={},
        history_csv="",
        calibration=pa.table({"label": labels[kept], "pixels": encoded}) if calibration else None,
    )
    return load_bundle(path)


@dataclass(frozen=True)
class Engines:
    """A bundle, and the folder of its engines."""

    bundle: Bundle
    place: str

    @property
    def folder(self) -> Path:
        return Path(self.place, self.bundle.info.model_id[:16])

    def facts(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / f"{name}.json").read_text()))

    def copy_to(self, place: Path) -> "Engines":
        shutil.copytree(self.place, place)
        return Engines(self.bundle, str(place))


def prepare(
    bundle: Bundle,
    *places: str | Path,
    console: Recorder | None = None,
    worth_it: bool = True,
    gpu: bool = False,
    batch_size: int = BATCH,
    **asked: Any,
) -> EngineChoice:
    console = console or Recorder()
    return prepare_engine(
        bundle,
        EngineConfig(**asked),
        places=[str(place) for place in places],
        gpu=gpu,
        batch_size=batch_size,
        cpus=1,
        worth_it=worth_it,
        console=console,
        stop=Stop(console),
    )


def needs(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (pip install -e '.[export]'); runs where they are installed")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return train(tmp_path_factory.mktemp("run") / "bundle", seed=1)


@pytest.fixture(scope="module")
def converted(bundle: Bundle) -> Engines:
    """The bundle, with what two engines were found to be beside it, where the job looks for it, too."""
    needs("openvino")
    engines = Engines(bundle, f"{bundle.path}.engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_has_bfloat16", lambda: True)  # others compute it in float32
        prepare(bundle, engines.place)
    return engines


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would start a process fails."""

    def refuse(*arguments: Any, **named_arguments: Any) -> None:
        raise AssertionError(f"a process was to be started: {arguments}")

    monkeypatch.setattr(conversion, "run_step", refuse)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that are run, as they are run."""
    names: list[str] = []
    really = steps_module.run_step

    def noted(module: str, step: str, task: Mapping[str, Any], **others: Any) -> None:
        names.append(str(task["name"]))
        really(module, step, task, **others)

    monkeypatch.setattr(conversion, "run_step", noted)
    return names


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """When each file of a folder was written, and what it holds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }


def said_by(engine: Any, bundle: Bundle) -> npt.NDArray[np.float32]:
    """Of the images that are compared, `float32 [N, K]`."""
    batches = calibration_images(bundle, batch_size=engine.batch_size, most=COMPARED_IMAGES)
    return np.concatenate([engine(pixels).probabilities for pixels in batches])


@pytest.mark.slow
def test_what_is_kept_is_what_the_engines_say(converted: Engines) -> None:
    assert set(state(converted.folder)) == {
        *("reference.npz", "openvino/model.xml", "openvino/model.bin"),
        *("keras-float32.json", "openvino-float32.json", "openvino-bfloat16.json"),
    }
    bundle = converted.bundle
    theirs = said_by(KerasEngine(bundle, batch_size=BATCH), bundle)
    assert theirs.shape == (COMPARED_IMAGES, len(NAMES))
    labels = calibration_labels(bundle, most=COMPARED_IMAGES)
    assert (theirs.argmax(axis=1) == labels).mean() > 0.6  # it has learned something
    with np.load(converted.folder / "reference.npz") as reference:
        np.testing.assert_allclose(reference["probabilities"], theirs, atol=1e-5)
    assert converted.facts("keras-float32").keys() == {"source", "images", "agreement", "images_per_s", "conditions"}

    for precision, most in (("float32", 1e-4), ("bfloat16", 0.2)):
        facts = converted.facts(f"openvino-{precision}")
        ours = said_by(open_as(converted, precision), bundle)
        found = compare(theirs, ours, labels)
        assert found["max_abs_difference"] <= most
        assert facts["max_abs_difference"] == pytest.approx(found["max_abs_difference"], abs=0.3 * most)
        assert facts["agreement"] == pytest.approx(found["agreement"], abs=0.005)
        assert facts["accuracy_loss"] == pytest.approx(found["accuracy_loss"], abs=0.005)
        assert (facts["source"], facts["images"]) == ("calibration", COMPARED_IMAGES)
        assert facts["images_per_s"] > 0
        assert facts["images_per_call"] in CALL_SIZES
        assert "openvino" in str(facts["conditions"])


@pytest.mark.parametrize(("speeds", "size"), [((100, 102), 4), ((100, 90), 4), ((100, 104), 32)])
def test_a_call_takes_as_few_images_as_are_fast(speeds: tuple[int, int], size: int) -> None:
    assert smallest_fast(dict(zip(CALL_SIZES, speeds, strict=True))) == size


@pytest.mark.parametrize(("facts", "most", "size"), [({}, 32, 32), ({"images_per_call": 4}, 32, 4), ({}, 3, 3)])
def test_a_call_takes_no_more_images_than_asked_for(facts: dict[str, Any], most: int, size: int) -> None:
    assert EngineChoice(facts=facts).batch_size(most) == size
    assert EngineChoice(facts={"images_per_call": 4}).batch_size(2) == 2


def open_as(engines: Engines, precision: Any) -> Any:
    taken = EngineChoice(engine="openvino", precision=precision, uri=str(engines.folder / "openvino"))
    return open_engine(taken, engines.bundle, batch_size=BATCH, cpus=2)


@pytest.mark.slow
def test_it_is_converted_once(converted: Engines, no_steps: None) -> None:
    before = state(converted.folder)
    first = prepare(converted.bundle, converted.place, engine="openvino", precision="float32")
    assert (first.engine, first.precision, first.uri) == (*FLOAT32, str(converted.folder / "openvino"))
    facts = converted.facts("openvino-float32")
    assert {**first.facts, "conditions": facts["conditions"]} == facts
    second = prepare(converted.bundle, converted.place, engine="openvino", precision="float32", worth_it=False)
    assert second == first
    assert state(converted.folder) == before


@pytest.mark.slow
def test_auto_takes_the_fastest_that_passes_also_where_it_would_not_convert(
    converted: Engines, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_has_bfloat16", lambda: True)
    names: tuple[tuple[EngineName, EnginePrecision], ...] = (
        *(("keras", "float32"), ("openvino", "float32"), ("openvino", "bfloat16")),
    )
    known = [EngineChoice(engine=e, precision=p, facts=converted.facts(f"{e}-{p}")) for e, p in names]
    expected = named([fastest(known)])
    for worth_it in (True, False):
        assert named([prepare(converted.bundle, converted.place, worth_it=worth_it)]) == expected
    assert named([prepare(converted.bundle, converted.place, engine="keras")]) == [KERAS]
    assert prepare(converted.bundle, converted.place, gpu=True) == EngineChoice()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({"keras-float32": 100, "openvino-float32": 90, "openvino-bfloat16": 80}, FLOAT32),
        ({"keras-float32": 100, "openvino-float32": 70, "openvino-bfloat16": 75}, KERAS),
        ({"keras-float32": 100, "openvino-float32": 90, "openvino-bfloat16": 95}, BFLOAT16),
        ({"keras-float32": 1, "openvino-float32": 2, "openvino-bfloat16": 3, "openvino-int8": 900}, BFLOAT16),
    ],
)
def test_auto_decides_by_what_is_kept(
    converted: Engines,
    tmp_path: Path,
    no_steps: None,
    monkeypatch: pytest.MonkeyPatch,
    speeds: dict[str, float],
    expected: Name,
) -> None:
    monkeypatch.setattr(conversion, "_has_bfloat16", lambda: True)
    engines = converted.copy_to(tmp_path / "engines")
    for name, speed in speeds.items():
        facts = {**engines.facts("openvino-bfloat16"), "agreement": 1.0, "accuracy_loss": 0.0}
        if name != "openvino-int8":
            facts = {**engines.facts(name), "agreement": 1.0, "accuracy_loss": 0.0}
        (engines.folder / f"{name}.json").write_text(json.dumps({**facts, "images_per_s": speed}))
    assert named([prepare(engines.bundle, engines.place)]) == [expected]


def test_a_small_job_does_not_convert_unasked(bundle: Bundle, tmp_path: Path, no_steps: None) -> None:
    assert prepare(bundle, tmp_path / "engines", worth_it=False) == EngineChoice()
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("flags", [{"engine": "openvino"}, {"precision": "bfloat16"}, {"engine": "onnx"}])
def test_a_small_job_converts_for_an_engine_that_is_named(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], has_bfloat16: bool
) -> None:
    if "onnx" in flags.values():
        needs("tf2onnx", "onnxruntime")

    def begun(module: str, step: str, task: Mapping[str, Any], **others: Any) -> None:
        raise MnistDistError(f"begun with {step}")

    monkeypatch.setattr(conversion, "run_step", begun)
    monkeypatch.setattr(conversion, "_has_bfloat16", lambda: has_bfloat16)
    with pytest.raises(MnistDistError, match="begun with keras"):
        prepare(bundle, tmp_path / "engines", worth_it=False, **flags)


@pytest.mark.parametrize(
    ("flags", "without", "expected"),
    [
        ({"engine": "onnx"}, ("tf2onnx", "onnxruntime"), "engine onnx in float32 needs tf2onnx and onnxruntime"),
        ({"precision": "int8"}, ("nncf",), "engine openvino in int8 needs nncf"),
    ],
)
def test_an_engine_that_is_named_and_not_installed_is_refused(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, Any],
    without: tuple[str, ...],
    expected: str,
) -> None:
    hide(monkeypatch, *without)
    with pytest.raises(ConfigError, match=rf"{expected}: pip install 'mnist_dist\[export\]'. Received: engine="):
        prepare(bundle, tmp_path / "engines", **flags)
    assert not (tmp_path / "engines").exists()


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if these were not installed."""
    really = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else really(name))


# --- what is damaged, or of another version --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[1]", b'"text"', b"{}", b'{"conditions": {"openvino": "1.0"}, "agreement": 1.0}', None],
)
def test_facts_that_are_damaged_or_of_another_version_are_found_again(
    converted: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    engines, expected = converted.copy_to(tmp_path / "engines"), converted.facts("openvino-float32")
    facts_file = engines.folder / "openvino-float32.json"
    if content is None:
        facts_file.unlink()
    else:
        facts_file.write_bytes(content)
    run = list[str]()

    def check(module: str, step: str, task: Mapping[str, Any], **others: Any) -> None:
        run.append(step)
        shutil.copy(engines.folder / "reference.npz", Path(task["scratch"], "openvino-float32.npz"))
        Path(task["scratch"], "openvino-float32.json").write_text('{"images_per_s": 5.0, "images_per_call": 4}')

    monkeypatch.setattr(conversion, "run_step", check)
    found = prepare(engines.bundle, engines.place, engine="openvino", precision="float32")
    assert run == ["check"]  # and nothing is converted
    assert (found.facts["agreement"], found.facts["max_abs_difference"], found.facts["images_per_s"]) == (1.0, 0.0, 5.0)
    assert engines.facts("openvino-float32").keys() == expected.keys()
    assert engines.facts("openvino-float32")["conditions"] == expected["conditions"]


@pytest.mark.slow
def test_a_model_that_is_gone_is_converted_again(
    converted: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, run, done = converted.copy_to(tmp_path / "engines"), fake_steps(converted), list[tuple[str, Any]]()

    def noted(module: str, step: str, task: Mapping[str, Any], **others: Any) -> None:
        done.append((task["name"], task.get("engines")))
        run(module, step, task, **others)

    monkeypatch.setattr(conversion, "run_step", noted)
    shutil.rmtree(engines.folder / "openvino")
    found = prepare(engines.bundle, engines.place, engine="openvino", precision="float32", worth_it=False)
    assert done == [("keras", ["openvino"]), ("openvino-float32", None)]
    assert found.facts["images_per_s"] == 7.0
    assert state(engines.folder / "openvino").keys() == {"model.xml", "model.bin"}


def other_model(engines: Engines) -> None:
    """Puts another model, of the same shape, in the place of the converted one, whose facts are lost."""
    import openvino

    core, file = openvino_core(), engines.folder / "openvino" / "model.xml"
    model = core.read_model(file)
    last = next(node for node in reversed(model.get_ordered_ops()) if node.get_type_name() == "MatMul")
    weights = last.input(1)
    shape = [size.get_length() for size in weights.get_partial_shape()]
    shuffled = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    weights.replace_source_output(openvino.opset13.constant(shuffled).output(0))
    for path in engines.folder.glob("openvino-*.json"):
        path.unlink()
    changed = engines.folder / "changed.xml"
    openvino.save_model(model, changed, compress_to_fp16=False)
    changed.replace(file)
    changed.with_suffix(".bin").replace(file.with_suffix(".bin"))


@pytest.fixture(scope="module")
def differing(converted: Engines, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    engines = converted.copy_to(tmp_path_factory.mktemp("differing") / "engines")
    other_model(engines)
    return engines


@pytest.mark.slow
def test_an_engine_that_computes_something_else_is_refused(
    differing: Engines, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = r"openvino does not compute what Keras does \(a probability differs by [\d.]+\). Received: engine='openv"
    with pytest.raises(ConfigError, match=expected) as caught:
        prepare(differing.bundle, differing.place, engine="openvino", precision="float32")
    assert caught.value.exit_code == 2
    assert steps == ["openvino-float32"]
    monkeypatch.setattr(conversion, "_has_bfloat16", lambda: True)
    console = Recorder()
    assert named([prepare(differing.bundle, differing.place, console=console)]) == [KERAS]
    assert any("openvino bfloat16: " in line and "not chosen automatically" in line for line in console.lines)
    with pytest.raises(ConfigError, match=expected):  # in none of its precisions
        prepare(differing.bundle, differing.place, engine="openvino")
    assert steps == ["openvino-float32", "openvino-bfloat16"]


@pytest.mark.slow
def test_bfloat16_that_differs_is_taken_where_it_was_named_and_it_is_said(differing: Engines) -> None:
    console = Recorder()
    found = prepare(differing.bundle, differing.place, precision="bfloat16", console=console)
    assert named([found]) == [BFLOAT16]
    assert found.facts["agreement"] < 0.9
    assert found.facts["accuracy_loss"] > 0.1
    last = console.lines[-1]
    assert last.startswith("openvino bfloat16 was asked for and is taken, although the top class of ")


# --- what only some ask for ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_onnx_is_taken_on_request(converted: Engines, tmp_path: Path, steps: list[str]) -> None:
    needs("tf2onnx", "onnxruntime")
    engines = converted.copy_to(tmp_path / "engines")
    before = state(engines.folder / "openvino")
    found = prepare(engines.bundle, engines.place, engine="onnx")
    assert named([found]) == [ONNX]
    assert steps == ["keras", "onnx-float32"]
    assert found.facts["max_abs_difference"] <= LARGEST_DIFFERENCE
    assert state(engines.folder / "openvino") == before
    opened = open_engine(found, engines.bundle, batch_size=BATCH, cpus=1)
    theirs = said_by(open_as(engines, "float32"), engines.bundle)
    np.testing.assert_allclose(said_by(opened, engines.bundle), theirs, atol=2e-4)
    assert prepare(engines.bundle, engines.place, engine="onnx") == found
    assert len(steps) == 2


@pytest.mark.slow
def test_int8_is_taken_on_request_and_its_agreement_is_said(
    converted: Engines, tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("nncf")
    engines, console = converted.copy_to(tmp_path / "engines"), Recorder()
    found = prepare(engines.bundle, engines.place, precision="int8", console=console)
    assert named([found]) == [INT8]
    assert steps == ["quantize", "openvino-int8"]
    assert 0.9 < found.facts["agreement"] <= 1
    assert found.facts["max_abs_difference"] > 1e-4
    agreement = f"same top class {{}} {found.facts['agreement']:.2%}"
    assert any(line.startswith("  openvino int8: ") and agreement.format("for") in line for line in console.lines)
    assert agreement.format("as Keras for") in str(found)
    assert (engines.folder / "openvino-int8" / "model.xml").is_file()

    labels = calibration_labels(engines.bundle, most=COMPARED_IMAGES)
    ours = said_by(open_engine(found, engines.bundle, batch_size=BATCH, cpus=2), engines.bundle)
    again = compare(said_by(open_as(engines, "float32"), engines.bundle), ours, labels)
    assert again["agreement"] == pytest.approx(found.facts["agreement"], abs=0.005)

    monkeypatch.setattr(conversion, "_has_bfloat16", lambda: True)
    assert prepare(engines.bundle, engines.place).precision != "int8"
    assert prepare(engines.bundle, engines.place, engine="openvino").precision != "int8"
    assert len(steps) == 2


@pytest.fixture(scope="module")
def without_images(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, converted: Engines) -> Engines:
    """The same model without calibration images, converted before; nothing of it was checked."""
    folder = tmp_path_factory.mktemp("without") / "bundle"
    shutil.copytree(bundle.path, folder)
    (folder / "calibration.parquet").unlink()
    engines = Engines(load_bundle(folder), f"{folder}.engines")
    shutil.copytree(converted.folder / "openvino", engines.folder / "openvino")
    return engines


@pytest.mark.slow
def test_without_calibration_images_auto_takes_float32_only(
    without_images: Engines, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_has_bfloat16", lambda: True)
    console = Recorder()
    found = prepare(without_images.bundle, without_images.place)
    assert found.precision == "float32"
    assert steps == ["keras", "openvino-float32"]
    facts = without_images.facts("openvino-float32")
    assert (facts["source"], facts["images"], facts["accuracy_loss"]) == ("random", 256, None)
    assert facts["max_abs_difference"] <= LARGEST_DIFFERENCE

    asked = prepare(without_images.bundle, without_images.place, precision="bfloat16", console=console)
    assert named([asked]) == [BFLOAT16]
    assert console.lines[-1].endswith("although the bundle has no calibration images to compare on")


def test_a_table_without_pixels_is_told_before_any_work(bundle: Bundle, tmp_path: Path, no_steps: None) -> None:
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    pq.write_table(pa.table({"label": [1]}), folder / "calibration.parquet")
    with pytest.raises(BundleError, match="has a column pixels"):
        prepare(load_bundle(folder), tmp_path / "engines", engine="openvino")
    assert prepare(load_bundle(folder), tmp_path / "engines", engine="keras") == EngineChoice()  # which needs none
    assert prepare(load_bundle(folder), tmp_path / "engines", gpu=True) == EngineChoice()


# --- where it is kept ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_beside_a_bundle_that_cannot_be_written_it_is_kept_in_the_second_place(
    converted: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    impossible, second = tmp_path / "file" / "bundle.engines", tmp_path / "output" / "_engines"
    monkeypatch.setattr(conversion, "run_step", fake_steps(converted))
    found = prepare(converted.bundle, impossible, second, engine="openvino", precision="float32")
    folder = second / converted.bundle.info.model_id[:16]
    assert found.uri == str(folder / "openvino")
    assert set(state(folder)) == {
        *("reference.npz", "openvino/model.xml", "openvino/model.bin"),
        *("keras-float32.json", "openvino-float32.json"),
    }
    monkeypatch.setattr(conversion, "run_step", None)
    assert prepare(converted.bundle, impossible, second, engine="openvino", precision="float32") == found


def fake_steps(converted: Engines) -> Callable[..., None]:
    """What the steps would leave, without their processes: the files of another folder of engines."""

    def run(module: str, step: str, task: Mapping[str, Any], **others: Any) -> None:
        scratch = Path(task["scratch"])
        shutil.copy(converted.folder / "reference.npz", scratch / f"{task['name']}.npz")
        (scratch / f"{task['name']}.json").write_text('{"images_per_s": 7.0}')
        for name in task.get("engines", ()):
            shutil.copytree(converted.folder / name, scratch / name)

    return run


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place that nobody here may read, as one of another person's."""
    place, really = tmp_path / "locked", storage.exists

    def exists(uri: str) -> bool:
        if uri.startswith(str(place)):
            raise PermissionError(13, "Permission denied", uri)
        return really(uri)

    monkeypatch.setattr(storage, "exists", exists)
    return place


@pytest.mark.slow
def test_a_place_that_cannot_be_read_is_left_alone(
    converted: Engines, locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "run_step", fake_steps(converted))
    found = prepare(converted.bundle, locked, tmp_path / "second", engine="openvino", precision="float32")
    assert found.uri == str(tmp_path / "second" / converted.folder.name / "openvino")
    assert not locked.exists()


def test_without_any_place_keras_runs_the_model_unless_another_was_named(
    bundle: Bundle, locked: Path, no_steps: None
) -> None:
    console = Recorder()
    assert prepare(bundle, locked, worth_it=False) == EngineChoice()
    assert prepare(bundle, locked, console=console) == EngineChoice()
    assert console.lines[-1].startswith("keras runs the model, which could not be converted: converted models are kept")
    with pytest.raises(StorageError, match=r"can be read and written. Received: .*/locked/"):
        prepare(bundle, locked, engine="openvino")


def test_an_outage_of_the_storage_is_no_place_that_cannot_be_read(
    bundle: Bundle, tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exists(uri: str) -> bool:
        raise ServiceError(f"{uri}: no connection")

    monkeypatch.setattr(storage, "exists", exists)
    with pytest.raises(ServiceError, match="no connection"):
        prepare(bundle, tmp_path)


@pytest.mark.slow
def test_a_model_that_another_job_puts_at_the_same_time_is_left_there(
    converted: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(local: Path, uri: str, *, last: str | None = None) -> None:
        shutil.copytree(local, uri)  # the other's
        raise OSError(39, "Directory not empty", uri)

    monkeypatch.setattr(storage, "upload_folder", late)
    monkeypatch.setattr(conversion, "run_step", fake_steps(converted))
    found = prepare(converted.bundle, tmp_path / "engines", engine="openvino", precision="float32")
    assert Path(str(found.uri), "model.xml").is_file()


@pytest.mark.slow
def test_a_model_that_cannot_be_kept_is_no_end_of_a_job_that_keras_can_do(
    converted: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(local: Path, uri: str, *, last: str | None = None) -> None:
        raise PermissionError(13, "Permission denied", uri)

    monkeypatch.setattr(storage, "upload_folder", full)
    monkeypatch.setattr(conversion, "run_step", fake_steps(converted))
    console = Recorder()
    assert prepare(converted.bundle, tmp_path / "engines", console=console) == EngineChoice()
    assert "cannot be written: [Errno 13]" in console.lines[-1]
    with pytest.raises(StorageError, match=r"cannot be written: \[Errno 13\]"):
        prepare(converted.bundle, tmp_path / "engines", engine="openvino")


@pytest.mark.slow
def test_a_check_that_dies_costs_its_own_engine_alone(
    converted: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, run, console = converted.copy_to(tmp_path / "engines"), fake_steps(converted), Recorder()
    for path in engines.folder.glob("openvino-*.json"):
        path.unlink()

    def dies(module: str, step: str, task: Mapping[str, Any], **others: Any) -> None:
        if task["name"] == "openvino-bfloat16":
            raise StepFailed("the process was ended by SIGKILL")
        run(module, step, task, **others)

    monkeypatch.setattr(conversion, "run_step", dies)
    monkeypatch.setattr(conversion, "_has_bfloat16", lambda: True)
    assert named([prepare(engines.bundle, engines.place, engine="openvino", console=console)]) == [FLOAT32]
    assert console.lines[-1] == "  openvino bfloat16: left out (the process was ended by SIGKILL)"
    assert not (engines.folder / "openvino-bfloat16.json").exists()
    with pytest.raises(StepFailed, match="ended by SIGKILL"):
        prepare(engines.bundle, engines.place, precision="bfloat16")


@pytest.mark.slow
def test_what_lies_where_nothing_can_be_written_is_used_but_a_new_check_goes_elsewhere(
    converted: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = converted.copy_to(tmp_path / "bundle.engines"), tmp_path / "output" / "_engines"
    really = storage.check_writable

    def check(uri: str) -> None:
        if uri.startswith(first.place):
            raise StorageError(f"read-only. Received: {uri!r}")
        really(uri)

    monkeypatch.setattr(storage, "check_writable", check)
    monkeypatch.setattr(conversion, "run_step", None)
    found = prepare(first.bundle, first.place, second, engine="openvino", precision="float32")
    assert found.uri == str(first.folder / "openvino")

    (first.folder / "openvino-float32.json").write_text("{}")
    before = state(first.folder)
    monkeypatch.setattr(conversion, "run_step", fake_steps(converted))
    found = prepare(first.bundle, first.place, second, engine="openvino", precision="float32")
    assert found.uri == str(second / first.bundle.info.model_id[:16] / "openvino")
    assert state(first.folder) == before
    monkeypatch.setattr(conversion, "run_step", None)
    assert prepare(first.bundle, first.place, second, engine="openvino", precision="float32") == found


@pytest.mark.slow
def test_a_place_that_holds_some_is_used_before_one_that_could_be_written(
    converted: Engines, tmp_path: Path, no_steps: None
) -> None:
    found = prepare(
        converted.bundle, tmp_path / "empty", converted.place, engine="openvino", precision="float32", worth_it=False
    )
    assert found.uri == str(converted.folder / "openvino")
    assert not (tmp_path / "empty").exists()


@pytest.mark.slow
def test_engines_may_lie_on_s3(converted: Engines, s3: str, steps: list[str]) -> None:
    prefix = f"{s3}/bundle.engines"
    storage.upload_folder(converted.folder, f"{prefix}/{converted.folder.name}", last="reference.npz")
    storage.delete(f"{prefix}/{converted.folder.name}/openvino-float32.json")
    found = prepare(converted.bundle, prefix, engine="openvino", precision="float32")
    assert steps == ["openvino-float32"]
    assert found.uri == f"{prefix}/{converted.folder.name}/openvino"
    opened = open_engine(found, converted.bundle, batch_size=BATCH, cpus=1)
    np.testing.assert_allclose(
        said_by(opened, converted.bundle), said_by(open_as(converted, "float32"), converted.bundle), atol=1e-6
    )
    assert prepare(converted.bundle, prefix, engine="openvino", precision="float32") == found
    assert len(steps) == 1


# --- what dies -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_conversion_that_fails_says_why_and_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    (folder / "model.keras").write_bytes(b"no model")
    info = json.loads((folder / "bundle.json").read_text())
    info["model_id"] = hashlib.sha256(b"no model").hexdigest()
    (folder / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(StepFailed, match=r"engines: Keras: the process ended with exit status 1:\n(.*\n)*.*keras"):
        prepare(load_bundle(folder), tmp_path / "engines", engine="openvino")
    console = Recorder()
    assert prepare(load_bundle(folder), tmp_path / "engines", console=console) == EngineChoice()
    assert console.lines[-1].startswith(
        "keras runs the model, which could not be converted: engines: Keras: the process"
    )
    assert state(tmp_path / "engines") == {}


@pytest.mark.slow
def test_a_check_that_dies_leaves_what_was_converted_and_no_facts(converted: Engines, tmp_path: Path) -> None:
    engines = converted.copy_to(tmp_path / "engines")
    for path in engines.folder.glob("openvino-*.json"):
        path.unlink()
    (engines.folder / "openvino" / "model.bin").write_bytes(b"")
    before = state(engines.folder)
    with pytest.raises(MnistDistError, match=r"engines: openvino float32: the process (ended|was ended)"):
        prepare(engines.bundle, engines.place, engine="openvino", precision="float32")
    assert state(engines.folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "kept", "again"),
    [
        ("keras", set(), ["keras", "openvino-float32"]),
        (
            "openvino-float32",
            {"reference.npz", "keras-float32.json", "openvino/model.xml", "openvino/model.bin"},
            ["openvino-float32"],
        ),
    ],
)
def test_a_step_that_is_killed_at_its_very_end_is_done_again(
    converted: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str, kept: set[str], again: list[str]
) -> None:
    done, run = list[str](), fake_steps(converted)

    def dies_once(module: str, step: str, task: Mapping[str, Any], **others: Any) -> None:
        run(module, step, task, **others)
        done.append(task["name"])
        if task["name"] == killed and done.count(killed) == 1:
            raise MnistDistError("the process was ended by SIGKILL")

    monkeypatch.setattr(conversion, "run_step", dies_once)
    folder = tmp_path / "engines" / converted.folder.name
    with pytest.raises(MnistDistError, match="ended by SIGKILL"):
        prepare(converted.bundle, tmp_path / "engines", engine="openvino", precision="float32")
    assert set(state(folder)) == kept
    assert prepare(converted.bundle, tmp_path / "engines", worth_it=False) == EngineChoice()

    done_before = len(done)
    found = prepare(converted.bundle, tmp_path / "engines", engine="openvino", precision="float32")
    assert named([found]) == [FLOAT32]
    assert done[done_before:] == again


# --- through the job -------------------------------------------------------------------------------------------------


JOB_IMAGES = 200  # images that take long enough to decode for a job to be caught at work


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(JOB_IMAGES):
        squares(number, width=1400, height=1200).save(folder / f"{number:03d}.png", compress_level=1)
    return folder


@dataclass(frozen=True)
class Scored:
    """A finished output, and what was seen of it while it was scored."""

    output: Path
    plan: dict[str, Any]
    libraries: set[str]
    """Files that the process with the model had mapped."""


def mapped_by(pid: int) -> set[str]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # it has ended
        return set()
    return {line.split(maxsplit=5)[5] for line in lines if "/" in line}


def until_scored(job: Job, output: Path) -> Scored:
    """Looks at a job until it has ended well."""
    libraries, plan = set[str](), dict[str, Any]()

    def look() -> bool:
        if job.shards_done():
            if not plan:
                plan.update(json.loads(next((output / "_work").glob("g*/plan.json")).read_text()))
            for worker in job.workers("ShardActor"):
                libraries.update(mapped_by(worker.pid))
        return bool(libraries)

    job.until(look)
    code, _, err = job.ended()
    assert code == 0, err
    return Scored(output, plan, libraries)


def summary(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "_summary.json").read_text()))


@pytest.fixture(scope="module")
def by_openvino(converted: Engines, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    output = tmp_path_factory.mktemp("by_openvino") / "table"
    with Job(converted.bundle.path, images, output, "--engine", "openvino", "--precision", "float32") as job:
        return until_scored(job, output)


@pytest.fixture(scope="module")
def by_keras(converted: Engines, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that a driver began, which was killed; and which another one was refused and a third one finished."""
    output, bundle = tmp_path_factory.mktemp("by_keras") / "table", converted.bundle.path
    with Job(bundle, images, output, "--engine", "keras") as job:
        job.until(lambda: job.shards_done() >= 2)
        job.descendants()
        job.kill()
        done = job.shards_done()
    assert 2 <= done < JOB_IMAGES // SHARD
    with Job(bundle, images, output, "--engine", "openvino") as job:
        code, result, _ = job.ended()
    assert (code, result["error_type"]) == (2, "ResumeConflict")
    assert "engine: 'openvino' now, 'keras' in the run" in result["error"]
    assert "precision" not in result["error"]
    with Job(bundle, images, output) as job:
        code, result, err = job.ended()
    assert code == 0, err
    assert (result["images"], result["skipped"]) == (JOB_IMAGES, done * SHARD)
    return output


@pytest.mark.slow
def test_openvino_says_of_images_what_keras_says(by_openvino: Scored, by_keras: Path) -> None:
    ours, theirs = rows_of(by_openvino.output), rows_of(by_keras)
    assert ours.keys() == theirs.keys()
    assert len({row["predicted_class"] for row in theirs.values()}) > 2
    for uri, row in ours.items():
        assert row["status"] == theirs[uri]["status"] == "ok"
        assert row["predicted_class"] == theirs[uri]["predicted_class"]
        assert row["probabilities"] == pytest.approx(theirs[uri]["probabilities"], abs=LARGEST_DIFFERENCE)


@pytest.mark.slow
def test_plan_and_summary_say_what_ran_and_what_its_check_found(
    by_openvino: Scored, by_keras: Path, converted: Engines
) -> None:
    facts = converted.facts("openvino-float32")
    del facts["conditions"]
    expected = {"engine": "openvino", "precision": "float32", "engine_check": facts}
    for noted in (by_openvino.plan, summary(by_openvino.output)):
        assert {name: noted[name] for name in expected} == expected
    by_continued = summary(by_keras)
    assert (by_continued["engine"], by_continued["precision"]) == KERAS
    assert not (by_openvino.output / "_engines").exists()  # what lies beside the bundle was used


@pytest.mark.slow
def test_the_process_that_scores_by_openvino_loads_no_tensorflow(by_openvino: Scored) -> None:
    # OpenVINO has folders of such names itself
    packages = {library.partition("/site-packages/")[2].partition("/")[0] for library in by_openvino.libraries}
    assert {"openvino", "pyarrow"} <= packages
    assert packages & {"tensorflow", "jaxlib", "h5py"} == set()


@pytest.mark.slow
def test_an_increment_keeps_the_engine_of_the_table(by_openvino: Scored, converted: Engines, tmp_path: Path) -> None:
    output, more = tmp_path / "table", tmp_path / "more"
    shutil.copytree(by_openvino.output, output)
    more.mkdir()
    for number in range(7):
        squares(JOB_IMAGES + number, width=30, height=20).save(more / f"{number}.png")
    with Job(converted.bundle.path, more, output, "--mode", "incremental", "--engine", "keras") as job:
        code, result, _ = job.ended()
    assert (code, result["error_type"]) == (2, "ResumeConflict")
    assert "engine: 'keras' now, 'openvino'" in result["error"]

    with Job(converted.bundle.path, more, output, "--mode", "incremental") as job:
        code, result, err = job.ended()
    assert code == 0, err
    assert (result["images"], result["skipped"]) == (JOB_IMAGES + 7, JOB_IMAGES)
    found, before = summary(output), summary(by_openvino.output)
    assert (found["engine"], found["precision"]) == FLOAT32
    assert found["engine_check"] == before["engine_check"]
    rows = rows_of(output)
    for uri in map(str, more.iterdir()):
        expected = converted.bundle.predict(uri).probabilities.tolist()
        assert rows[uri]["probabilities"] == pytest.approx(expected, abs=LARGEST_DIFFERENCE)
