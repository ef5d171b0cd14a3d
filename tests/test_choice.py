"""choice: which engine is taken, what its check has to find, and what is kept of it; at the end through the job."""

import hashlib
import importlib.util
import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
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
from test_calibration import write_table
from test_score_kills import SHARD, Job, rows_of, squares

from mnist_dist import documents, processor
from mnist_dist.config import EngineName, EnginePrecision, ModelConfig
from mnist_dist.console import Stop
from mnist_dist.engines import conversion
from mnist_dist.engines.calibration import MAX_IMAGES, calibration_images, calibration_labels
from mnist_dist.engines.choice import (
    CALL_SIZES,
    FEW_IMAGES,
    MAX_DIFFERENCE,
    MAX_LOSS,
    MIN_AGREEMENT,
    WORTH_A_LOAD,
    WORTH_ONE_CALL,
    EngineChoice,
    EngineRequest,
    candidates,
    fastest,
    open_engine,
    prepare_engine,
    why_not,
)
from mnist_dist.engines.conversion import Answers, Check, compare, smallest_fast
from mnist_dist.engines.engine import KerasEngine
from mnist_dist.engines.formats import FORMATS, openvino_core
from mnist_dist.errors import BundleError, ConfigError, ServiceError, StepFailed, StorageError
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import Bundle, BundleInfo, load_bundle, write_bundle
from mnist_dist.models.classifier import build_classifier
from mnist_dist.score_config import EngineConfig
from mnist_dist.session import Session
from mnist_dist.store.anywhere import ANYWHERE

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
    expected = rf"on GPUs the engine must be keras in float32 \(--gpus-per-actor 0 .*\). Received: .*{name}='{value}'"
    with pytest.raises(ConfigError, match=expected):
        candidates(EngineConfig(**flags), gpu=True, has_images=True, has_bfloat16=True)


@pytest.mark.parametrize("engine", ["keras", "onnx"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_short_numbers_are_those_of_openvino(engine: Any, precision: Any) -> None:
    expected = rf"need engine openvino. Received: engine='{engine}', precision='{precision}'"
    with pytest.raises(ConfigError, match=expected):
        EngineConfig(engine=engine, precision=precision)


GOOD = Check(
    source="calibration",
    images=1_000,
    max_abs_difference=0.0,
    agreement=1.0,
    accuracy_loss=0.0,
    images_per_s=100.0,
    images_per_call=4,
)


def choice(
    engine: EngineName = "openvino", precision: EnginePrecision = "float32", *, speed: float = 100.0, **found: Any
) -> EngineChoice:
    """An engine whose check found nothing wrong, but for what is given."""
    return EngineChoice(engine=engine, precision=precision, check=replace(GOOD, images_per_s=speed, **found))


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
        ("bfloat16", {"max_abs_difference": NAN}, "a probability is NaN"),
        ("bfloat16", {"images": 1_000, "agreement": 0.999}, None),
        ("bfloat16", {"images": 999, "agreement": 998 / 999}, "the top class of 0.10% of the few images differs"),
        ("bfloat16", {"images": 999, "agreement": 1.0}, None),
        ("bfloat16", {"images": 1, "agreement": 1.0}, None),
        ("bfloat16", {"images": 999, "agreement": NAN}, "the top class of nan% of the few images differs"),
        ("bfloat16", {"source": "random", "images": 256}, "the bundle has no calibration images to compare on"),
        ("int8", {"agreement": 0.99}, "the top class of 1.00% of the images differs"),
    ],
)
def test_what_an_engine_has_to_agree_in(precision: EnginePrecision, facts: dict[str, Any], why: str | None) -> None:
    assert why_not(choice(precision=precision, **facts)) == why


def test_the_limits_are_those_that_were_promised() -> None:
    assert (MAX_DIFFERENCE, MIN_AGREEMENT, MAX_LOSS, FEW_IMAGES) == (1e-4, 0.995, 0.002, 1_000)
    assert MAX_IMAGES >= FEW_IMAGES  # else nothing would ever be many


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
        ([FAST, choice(precision="int8", speed=900.0)], INT8),
        ([FAST, choice(precision="int8", speed=900.0, agreement=0.99)], FLOAT32),
        ([choice("keras", speed=200.0 * WORTH_A_LOAD - 1), FAST], FLOAT32),
        ([choice("keras", speed=200.0 * WORTH_A_LOAD + 1), FAST], KERAS),
        ([choice("onnx", speed=200.0 * WORTH_ONE_CALL - 1), FAST], FLOAT32),
        ([choice("onnx", speed=200.0 * WORTH_ONE_CALL + 1), FAST], ("onnx", "float32")),
        ([choice("keras", speed=1.0), choice(speed=900.0, max_abs_difference=0.1), SLOW], BFLOAT16),
        ([choice("keras", speed=1.0), choice(speed=900.0, max_abs_difference=NAN)], KERAS),
        ([choice(speed=900.0, max_abs_difference=0.1)], KERAS),
        ([choice(precision="int8", speed=900.0, agreement=0.99)], KERAS),
    ],
)
def test_the_fastest_that_agrees_is_taken(checked: list[EngineChoice], expected: Name) -> None:
    assert named([fastest(checked)]) == [expected]


def one_hot(classes: list[int], *, certain: float = 1.0) -> npt.NDArray[np.float32]:
    """`float32 [N, 3]`"""
    rows = np.full((len(classes), 3), (1 - certain) / 2, np.float32)
    rows[np.arange(len(classes)), classes] = certain
    return rows


def compared(
    reference: npt.NDArray[np.float32], ours: npt.NDArray[np.float32], labels: npt.NDArray[np.int64] | None
) -> Check:
    answers = Answers(probabilities=ours, labels=labels, source="calibration", images_per_s=7.0, images_per_call=4)
    return compare(reference, answers)


def test_comparing_counts_what_differs() -> None:
    theirs, ours = one_hot([0, 1, 2, 1]), one_hot([0, 1, 0, 1])
    labels = np.asarray([0, 1, 2, 0])
    found = compared(theirs, ours, labels)
    assert (found.images, found.max_abs_difference, found.agreement, found.accuracy_loss) == (4, 1.0, 0.75, 0.25)
    assert (found.source, found.images_per_s, found.images_per_call) == ("calibration", 7.0, 4)
    assert compared(ours, theirs, labels).accuracy_loss == -0.25
    assert compared(theirs, ours, None).accuracy_loss is None
    small = compared(one_hot([0, 1]), one_hot([0, 1], certain=0.98), None)
    assert small.agreement == 1.0
    assert small.max_abs_difference == pytest.approx(0.02)
    assert np.isnan(compared(one_hot([0]), np.full((1, 3), NAN, np.float32), None).max_abs_difference)
    with pytest.raises(StepFailed, match=r"must give \[4, 3\] probabilities. Received: \[4, 2\]"):
        compared(theirs, ours[:, :2], None)


def test_labels_of_their_own_agree_as_sets() -> None:
    theirs = np.asarray([[0.9, 0.6, 0.1], [0.4, 0.3, 0.1], [0.9, 0.8, 0.1], [0.9, 0.5, 0.1]], np.float32)
    ours = np.asarray([[0.8, 0.9, 0.1], [0.3, 0.4, 0.1], [0.9, 0.4, 0.1], [0.9, 0.49, 0.1]], np.float32)
    answers = Answers(
        probabilities=ours, labels=np.zeros(4, np.int64), source="calibration", images_per_s=7.0, images_per_call=4
    )
    found = compare(theirs, answers, multi_label=True)
    assert (found.agreement, found.accuracy_loss) == (0.5, None)
    assert compare(theirs, answers).agreement == 0.5, "by the top class, other images agree"
    assert compare(theirs[:2], replace(answers, probabilities=ours[:2]), multi_label=True).agreement == 1.0


@pytest.mark.parametrize("right", [1_000, 902, 871, 300])
@pytest.mark.parametrize(("lost", "passes"), [(2, True), (3, False)])
def test_two_of_a_thousand_images_may_be_lost_and_no_more(right: int, lost: int, passes: bool) -> None:
    labels = np.zeros(1_000, np.int64)
    theirs, ours = (one_hot([0] * n + [1] * (1_000 - n)) for n in (right, right - lost))
    found = EngineChoice(engine="openvino", precision="bfloat16", check=compared(theirs, ours, labels))
    assert (why_not(found) is None) == passes


def test_what_is_said_of_an_engine() -> None:
    assert str(EngineChoice()) == str(choice("keras")) == "keras float32"
    assert str(choice(agreement=0.9987)) == "openvino float32 (same top class as Keras for 99.87% of 1,000 images)"
    assert EngineChoice().noted() == {"engine": "keras", "precision": "float32", "engine_check": None}
    noted = choice(precision="int8", agreement=0.97).noted()
    assert (noted["engine"], noted["precision"], noted["engine_check"]["agreement"]) == ("openvino", "int8", 0.97)
    assert json.loads(json.dumps(noted)) == noted


@pytest.mark.parametrize(("speeds", "size"), [((100, 102), 4), ((100, 90), 4), ((100, 104), 32)])
def test_a_call_takes_as_few_images_as_are_fast(speeds: tuple[int, int], size: int) -> None:
    assert smallest_fast(dict(zip(CALL_SIZES, speeds, strict=True))) == size


@pytest.mark.parametrize(("speeds", "size"), [((3_900, 3_000), 4), ((4_100, 3_000), 32), ((90_000, 40_000), 32)])
def test_calls_of_a_fast_engine_are_large(speeds: tuple[int, int], size: int) -> None:
    assert smallest_fast(dict(zip(CALL_SIZES, speeds, strict=True))) == size


def test_a_call_takes_no_more_images_than_asked_for() -> None:
    assert EngineChoice().batch_size(32) == choice("keras").batch_size(32) == 32
    assert (choice(images_per_call=4).batch_size(32), choice(images_per_call=4).batch_size(2)) == (4, 2)


# --- what is converted and kept, with steps that only leave what real ones would -------------------------------------


IMAGES = 20


@pytest.fixture
def light(tmp_path: Path) -> Bundle:
    """A bundle as far as the driver looks at it."""
    (tmp_path / "bundle").mkdir()
    return write_table(tmp_path / "bundle", IMAGES)


class Steps:
    """Takes the place of `run_step`: leaves what a step would, without a process, and notes its title."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.speeds = {"openvino float32": 200.0, "openvino bfloat16": 100.0}
        self.differ = 0.0

    def __call__(self, step: partial[Any], *, title: str, session: Session) -> Any:
        self.done.append(title)
        if title in self.fails:
            raise self.fails[title]
        name = step.func.__name__
        if name == "_ask_keras":
            for format, folder in step.args[1].items():
                self.write(folder, format)
        if name == "_quantize":
            self.write(step.args[2], "openvino")
            return 0
        labels = calibration_labels(step.args[0])
        return Answers(
            probabilities=one_hot([0] * IMAGES, certain=1.0 if name == "_ask_keras" else 1.0 - self.differ),
            labels=labels,
            source="random" if labels is None else "calibration",
            images_per_s=self.speeds.get(title, 100.0),
            images_per_call=4,
        )

    def write(self, folder: Path, format: str) -> None:
        folder.mkdir()
        for file in (FORMATS[format].file, *FORMATS[format].others):
            (folder / file).write_text(format)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(conversion, "run_step", steps)
    monkeypatch.setattr(processor, "has_bfloat16", lambda: True)
    return steps


def prepare(
    bundle: Bundle,
    *places: str | Path,
    console: Recorder | None = None,
    worth_it: bool = True,
    gpu: bool = False,
    **requested: Any,
) -> EngineChoice:
    console = console or Recorder()
    request = EngineRequest(
        requested=EngineConfig(**requested),
        places=tuple(map(str, places)),
        gpu=gpu,
        batch_size=BATCH,
        cpus=1,
        worth_it=worth_it,
    )
    return prepare_engine(bundle, request, session=Session(console=console, stop=Stop(console)))


def place_of(bundle: Bundle, place: Path) -> Path:
    return place / bundle.info.model_id[:16]


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """When each file of a folder was written, and what it holds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }


KERAS_STEP = "Keras model, conversion"
ALL_STEPS = [KERAS_STEP, "openvino float32", "openvino bfloat16"]


def test_it_is_converted_once(light: Bundle, tmp_path: Path, steps: Steps) -> None:
    found, folder = prepare(light, tmp_path / "engines"), place_of(light, tmp_path / "engines")
    assert (found.engine, found.precision, found.uri) == (*FLOAT32, str(folder / "openvino"))
    assert steps.done == ALL_STEPS
    kept = state(folder)
    assert set(kept) == {
        *("openvino/model.xml", "openvino/model.bin"),
        *("keras-float32.json", "openvino-float32.json", "openvino-bfloat16.json"),
    }
    for flags in ({}, {"worth_it": False}, {"engine": "openvino", "precision": "float32"}):
        assert prepare(light, tmp_path / "engines", **flags) == found
    assert (steps.done, state(folder)) == (ALL_STEPS, kept)


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ((100, 90, 80), FLOAT32),
        ((100, 70, 75), KERAS),
        ((100, 90, 95), BFLOAT16),
    ],
)
def test_auto_decides_by_what_is_kept(
    light: Bundle, tmp_path: Path, steps: Steps, speeds: tuple[float, ...], expected: Name
) -> None:
    steps.speeds = dict(zip(ALL_STEPS, speeds, strict=True))
    assert named([prepare(light, tmp_path / "engines")]) == [expected]
    assert named([prepare(light, tmp_path / "engines", worth_it=False)]) == [expected]


def test_engines_of_a_multi_label_model_are_judged_by_sets(light: Bundle, tmp_path: Path, steps: Steps) -> None:
    steps.differ = 0.6  # The top class stays at 0.4, and is reached no more.
    for multi_label, agreement in ((False, 1.0), (True, 0.0)):
        bundle = Bundle(light.path, replace(light.info, multi_label=multi_label))
        place = tmp_path / str(multi_label)
        found = prepare(bundle, place, engine="openvino", precision="bfloat16", accept_accuracy_loss=100.0)
        assert found.check is not None
        assert (found.check.agreement, found.check.accuracy_loss is None) == (agreement, multi_label)


def test_keras_and_gpus_need_no_check(light: Bundle, tmp_path: Path, steps: Steps) -> None:
    assert prepare(light, tmp_path / "engines", engine="keras") == EngineChoice()
    assert prepare(light, tmp_path / "engines", gpu=True) == EngineChoice()
    assert prepare(light, tmp_path / "engines", worth_it=False) == EngineChoice()  # a small job
    assert (steps.done, (tmp_path / "engines").exists()) == ([], False)


@pytest.mark.parametrize("flags", [{"engine": "openvino"}, {"precision": "bfloat16"}, {"engine": "onnx"}])
def test_a_small_job_converts_for_an_engine_that_is_named(
    light: Bundle, tmp_path: Path, steps: Steps, flags: dict[str, Any]
) -> None:
    needs(*FORMATS[flags.get("engine", "openvino")].packages)
    found = prepare(light, tmp_path / "engines", worth_it=False, **flags)
    assert (found.engine, steps.done[0]) == (flags.get("engine", "openvino"), KERAS_STEP)


def test_int8_is_made_on_request_only(light: Bundle, tmp_path: Path, steps: Steps) -> None:
    needs("nncf")
    assert prepare(light, tmp_path / "engines").precision != "int8"
    assert "openvino int8" not in steps.done
    shutil.rmtree(tmp_path / "engines")
    steps.done.clear()
    found = prepare(light, tmp_path / "engines", precision="int8")
    assert (named([found]), found.uri) == ([INT8], str(place_of(light, tmp_path / "engines") / "openvino-int8"))
    assert steps.done == [KERAS_STEP, "openvino int8", "openvino int8"]


@pytest.mark.parametrize(
    ("flags", "without", "expected"),
    [
        ({"engine": "onnx"}, ("tf2onnx", "onnxruntime"), "engine onnx in float32 needs tf2onnx and onnxruntime"),
        ({"precision": "int8"}, ("nncf",), "engine openvino in int8 needs nncf"),
    ],
)
def test_an_engine_that_is_named_and_not_installed_is_refused(
    light: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, Any],
    without: tuple[str, ...],
    expected: str,
) -> None:
    really = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in without else really(name))
    with pytest.raises(ConfigError, match=rf"{expected}: pip install 'mnist_dist\[export\]'"):
        prepare(light, tmp_path / "engines", **flags)
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"{}", "versions", "cpu", None])
def test_a_check_that_is_damaged_or_of_another_machine_is_made_again(
    light: Bundle, tmp_path: Path, steps: Steps, content: bytes | str | None
) -> None:
    found = prepare(light, tmp_path / "engines")
    file = place_of(light, tmp_path / "engines") / "openvino-float32.json"
    kept = file.read_text()
    if content is None:
        file.unlink()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(json.dumps(json.loads(kept) | {content: {} if content == "versions" else "Z80"}))
    steps.done.clear()
    before = state(file.parent / "openvino")
    assert prepare(light, tmp_path / "engines") == found
    assert steps.done == ALL_STEPS[:2]
    assert state(file.parent / "openvino") == before  # nothing is converted anew
    assert file.read_text() == kept


def test_a_model_that_is_gone_is_converted_again(light: Bundle, tmp_path: Path, steps: Steps) -> None:
    found = prepare(light, tmp_path / "engines")
    shutil.rmtree(str(found.uri))
    assert prepare(light, tmp_path / "engines") == found
    assert steps.done == ALL_STEPS * 2
    assert (Path(str(found.uri)) / "model.xml").is_file()


def test_float32_that_differs_is_refused(light: Bundle, tmp_path: Path, steps: Steps) -> None:
    steps.differ = 0.9
    expected = r"openvino does not agree with Keras \(a probability differs by 0.9\). Received: engine='openvino'"
    for precision in ("float32", "auto"):
        with pytest.raises(ConfigError, match=expected):
            prepare(light, tmp_path / "engines", engine="openvino", precision=precision)
    assert named([prepare(light, tmp_path / "engines")]) == [KERAS]


def test_without_calibration_images_auto_takes_float32_only(light: Bundle, tmp_path: Path, steps: Steps) -> None:
    (light.path / "calibration.parquet").unlink()
    assert named([prepare(light, tmp_path / "engines")]) == [FLOAT32]
    assert steps.done == ALL_STEPS[:2]


def test_a_table_without_pixels_is_told_before_any_work(light: Bundle, tmp_path: Path, steps: Steps) -> None:
    pq.write_table(pa.table({"label": [1]}), light.path / "calibration.parquet")
    with pytest.raises(BundleError, match="must have a column pixels"):
        prepare(light, tmp_path / "engines", engine="openvino")
    assert prepare(light, tmp_path / "engines", engine="keras") == EngineChoice()  # which needs none
    assert prepare(light, tmp_path / "engines", gpu=True) == EngineChoice()
    assert steps.done == []


# --- where it is kept ------------------------------------------------------------------------------------------------


def test_beside_a_bundle_that_cannot_be_written_it_is_kept_in_the_second_place(
    light: Bundle, tmp_path: Path, steps: Steps
) -> None:
    (tmp_path / "file").touch()
    places = tmp_path / "file" / "bundle.engines", tmp_path / "output" / "_engines"
    found = prepare(light, *places)
    assert found.uri == str(place_of(light, places[1]) / "openvino")
    assert prepare(light, *places) == found
    assert steps.done == ALL_STEPS


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place that nobody here may read, as one of another person's."""
    place, really = tmp_path / "locked", ANYWHERE.exists

    def exists(uri: str) -> bool:
        if uri.startswith(str(place)):
            raise PermissionError(13, "Permission denied", uri)
        return really(uri)

    monkeypatch.setattr(ANYWHERE, "exists", exists)
    return place


def test_a_place_that_cannot_be_read_is_left_alone(light: Bundle, locked: Path, tmp_path: Path, steps: Steps) -> None:
    found = prepare(light, locked, tmp_path / "second")
    assert found.uri == str(place_of(light, tmp_path / "second") / "openvino")
    assert not locked.exists()


def test_without_any_place_keras_runs_the_model_unless_another_was_named(
    light: Bundle, locked: Path, steps: Steps
) -> None:
    console = Recorder()
    assert prepare(light, locked, worth_it=False) == EngineChoice()
    assert prepare(light, locked, console=console) == EngineChoice()
    assert console.lines[-1].startswith("could not convert the model, Keras runs it: converted models need a folder")
    with pytest.raises(StorageError, match=r"can be read and written. Received: .*/locked/"):
        prepare(light, locked, engine="openvino")
    assert steps.done == []


def test_an_outage_of_the_storage_is_no_place_that_cannot_be_read(
    light: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    def exists(uri: str) -> bool:
        raise ServiceError(f"{uri}: no connection")

    monkeypatch.setattr(ANYWHERE, "exists", exists)
    with pytest.raises(ServiceError, match="no connection"):
        prepare(light, tmp_path)


def test_a_model_that_another_job_puts_at_the_same_time_is_left_there(
    light: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    def late(local: Path, uri: str, *, last: str | None = None) -> None:
        shutil.copytree(local, uri)  # the other's
        raise OSError(39, "Directory not empty", uri)

    monkeypatch.setattr(ANYWHERE, "upload_folder", late)
    assert Path(str(prepare(light, tmp_path / "engines").uri), "model.xml").is_file()


def test_a_model_that_cannot_be_kept_is_no_end_of_a_job_that_keras_can_do(
    light: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    def full(local: Path, uri: str, *, last: str | None = None) -> None:
        raise PermissionError(13, "Permission denied", uri)

    monkeypatch.setattr(ANYWHERE, "upload_folder", full)
    console = Recorder()
    assert prepare(light, tmp_path / "engines", console=console) == EngineChoice()
    assert "cannot be written: [Errno 13]" in console.lines[-1]
    with pytest.raises(StorageError, match=r"cannot be written: \[Errno 13\]"):
        prepare(light, tmp_path / "engines", engine="openvino")


def test_what_lies_where_nothing_can_be_written_is_used_but_a_new_check_goes_elsewhere(
    light: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    first, second = tmp_path / "bundle.engines", tmp_path / "output" / "_engines"
    found, really = prepare(light, first), ANYWHERE.check_writable

    def check(uri: str) -> None:
        if uri.startswith(str(first)):
            raise StorageError(f"read-only. Received: {uri!r}")
        really(uri)

    monkeypatch.setattr(ANYWHERE, "check_writable", check)
    assert prepare(light, first, second) == prepare(light, second, first, worth_it=False) == found
    assert not second.exists()
    (place_of(light, first) / "openvino-float32.json").write_text("{}")
    before = state(first)
    elsewhere = prepare(light, first, second)
    assert elsewhere.uri == str(place_of(light, second) / "openvino")
    assert state(first) == before
    assert prepare(light, second) == elsewhere
    assert steps.done == ALL_STEPS * 2


# --- what dies -------------------------------------------------------------------------------------------------------


KILLED = StepFailed("the process was killed by SIGKILL")


def test_a_conversion_that_dies_leaves_nothing_and_keras_runs_the_model(
    light: Bundle, tmp_path: Path, steps: Steps
) -> None:
    steps.fails[KERAS_STEP], console = KILLED, Recorder()
    assert prepare(light, tmp_path / "engines", console=console) == EngineChoice()
    assert console.lines[-1] == ("could not convert the model, Keras runs it: the process was killed by SIGKILL")
    with pytest.raises(StepFailed, match="killed by SIGKILL"):
        prepare(light, tmp_path / "engines", engine="openvino")
    assert state(tmp_path / "engines") == {}


def test_a_check_that_dies_costs_its_own_engine_alone(light: Bundle, tmp_path: Path, steps: Steps) -> None:
    steps.fails["openvino bfloat16"], console = KILLED, Recorder()
    assert named([prepare(light, tmp_path / "engines", engine="openvino", console=console)]) == [FLOAT32]
    assert console.lines[-1] == "  openvino bfloat16: left out (the process was killed by SIGKILL)"
    assert not (place_of(light, tmp_path / "engines") / "openvino-bfloat16.json").exists()
    with pytest.raises(StepFailed, match="killed by SIGKILL"):
        prepare(light, tmp_path / "engines", precision="bfloat16")
    steps.fails.clear()
    assert named([prepare(light, tmp_path / "engines", precision="bfloat16")]) == [BFLOAT16]


# --- real conversions ------------------------------------------------------------------------------------------------


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
    info = BundleInfo(class_names=NAMES, spec=SPEC, backbone="cnn")
    images = pa.table({"label": labels[kept], "pixels": encoded}) if calibration else None
    write_bundle(path, classifier.model, info, calibration=images)
    return load_bundle(path)


def needs(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (pip install -e '.[export]'); runs where they are installed")


@dataclass(frozen=True)
class Engines:
    """A bundle, and the folder of its engines."""

    bundle: Bundle
    place: str

    @property
    def folder(self) -> Path:
        return Path(self.place, self.bundle.info.model_id[:16])

    def check(self, name: str) -> Check:
        kept = json.loads((self.folder / f"{name}.json").read_text())
        return documents.decode(json.dumps(kept["check"]).encode(), Check, uri=name)

    def copy_to(self, place: Path) -> "Engines":
        shutil.copytree(self.place, place)
        return Engines(self.bundle, str(place))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """A bundle, with what two engines were found to be beside it, where the job looks for it, too."""
    bundle = train(tmp_path_factory.mktemp("run") / "bundle", seed=1)
    engines = Engines(bundle, f"{bundle.path}.engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "has_bfloat16", lambda: True)  # others compute it in float32
        prepare(bundle, engines.place)
    return engines


def said_by(engine: Any, bundle: Bundle) -> npt.NDArray[np.float32]:
    """Of the images that are compared, `float32 [N, K]`."""
    batches = calibration_images(bundle, batch_size=engine.batch_size)
    return np.concatenate([engine(pixels).probabilities for pixels in batches])


def open_as(engines: Engines, precision: Any) -> Any:
    taken = EngineChoice(engine="openvino", precision=precision, uri=str(engines.folder / "openvino"))
    return open_engine(taken, engines.bundle, batch_size=BATCH, cpus=2)


@pytest.mark.slow
def test_what_is_kept_is_what_the_engines_say(converted: Engines) -> None:
    bundle = converted.bundle
    theirs = said_by(KerasEngine(bundle, batch_size=BATCH), bundle)
    assert theirs.shape == (MAX_IMAGES, len(NAMES))
    labels = calibration_labels(bundle)
    assert (theirs.argmax(axis=1) == labels).mean() > 0.6  # it has learned something
    for precision, most in (("float32", 1e-4), ("bfloat16", 0.2)):
        check = converted.check(f"openvino-{precision}")
        found = compared(theirs, said_by(open_as(converted, precision), bundle), labels)
        assert found.max_abs_difference <= most
        assert check.max_abs_difference == pytest.approx(found.max_abs_difference, abs=0.3 * most)
        assert check.agreement == pytest.approx(found.agreement, abs=0.005)
        assert check.accuracy_loss == pytest.approx(found.accuracy_loss, abs=0.005)
        assert (check.source, check.images) == ("calibration", MAX_IMAGES)
        assert check.images_per_s > 0
        assert check.images_per_call in CALL_SIZES


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


@pytest.mark.slow
def test_an_engine_that_computes_something_else_is_refused(converted: Engines, tmp_path: Path) -> None:
    engines = converted.copy_to(tmp_path / "engines")
    other_model(engines)
    with pytest.raises(ConfigError, match=r"does not agree with Keras \(a probability differs by [\d.]+\)"):
        prepare(engines.bundle, engines.place, engine="openvino", precision="float32")
    with pytest.raises(ConfigError, match=r"openvino bfloat16 .*: the top class of \d\d\.\d\d% of the 1,000 .*images"):
        prepare(engines.bundle, engines.place, precision="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"engine": "onnx"}, {"precision": "int8"}])
def test_what_only_some_ask_for(converted: Engines, tmp_path: Path, flags: dict[str, Any]) -> None:
    needs("nncf", *FORMATS["onnx"].packages)
    engines, console = converted.copy_to(tmp_path / "engines"), Recorder()
    before = state(engines.folder / "openvino")
    found = prepare(engines.bundle, engines.place, console=console, **flags)
    assert state(engines.folder / "openvino") == before
    assert found.check is not None
    if found.engine == "onnx":
        assert found.check.max_abs_difference <= MAX_DIFFERENCE
    else:
        assert 0.9 < found.check.agreement <= 1
        assert found.check.max_abs_difference > 1e-4
    assert any(f"same top class for {found.check.agreement:.2%}" in line for line in console.lines)
    ours = said_by(open_engine(found, engines.bundle, batch_size=BATCH, cpus=1), engines.bundle)
    again = compared(said_by(open_as(engines, "float32"), engines.bundle), ours, None)
    assert again.agreement == pytest.approx(found.check.agreement, abs=0.005)


@pytest.mark.slow
def test_engines_may_lie_on_s3(converted: Engines, s3: str) -> None:
    prefix = f"{s3}/bundle.engines"
    ANYWHERE.upload_folder(converted.folder, f"{prefix}/{converted.folder.name}")
    ANYWHERE.delete(f"{prefix}/{converted.folder.name}/openvino-float32.json")
    found = prepare(converted.bundle, prefix, engine="openvino", precision="float32")
    assert found.uri == f"{prefix}/{converted.folder.name}/openvino"
    opened = open_engine(found, converted.bundle, batch_size=BATCH, cpus=1)
    np.testing.assert_allclose(
        said_by(opened, converted.bundle), said_by(open_as(converted, "float32"), converted.bundle), atol=1e-6
    )
    assert prepare(converted.bundle, prefix, engine="openvino", precision="float32") == found


@pytest.mark.slow
def test_a_check_that_dies_leaves_what_was_converted(converted: Engines, tmp_path: Path) -> None:
    engines = converted.copy_to(tmp_path / "engines")
    (engines.folder / "openvino-float32.json").unlink()
    (engines.folder / "openvino" / "model.bin").write_bytes(b"")
    before = state(engines.folder / "openvino")
    with pytest.raises(StepFailed, match=r"openvino float32: the process (ended|was killed)"):
        prepare(engines.bundle, engines.place, engine="openvino", precision="float32")
    assert state(engines.folder / "openvino") == before
    assert not (engines.folder / "openvino-float32.json").exists()


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
        assert row["probabilities"] == pytest.approx(theirs[uri]["probabilities"], abs=MAX_DIFFERENCE)


@pytest.mark.slow
def test_plan_and_summary_say_what_ran_and_what_its_check_found(
    by_openvino: Scored, by_keras: Path, converted: Engines
) -> None:
    check = converted.check("openvino-float32")
    expected = EngineChoice(engine="openvino", check=check).noted()
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
        assert rows[uri]["probabilities"] == pytest.approx(expected, abs=MAX_DIFFERENCE)
