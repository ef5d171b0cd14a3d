"""Engines and exports of ONNX bundles: ONNX Runtime runs the bundle's own file, OpenVINO has to agree with it.

The steps run in this process, without measuring for long; `test_choice` and `test_export` run them in their own.
"""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from harness import Recorder
from onnx_models import NAMES, NUM_FEATURES, SPEC, small_bundle, some_pixels
from test_score_kills import SHARD, Job, rows_of, squares

from mnist_dist import processor
from mnist_dist.config import EngineName
from mnist_dist.console import Stop
from mnist_dist.engines import choice as choices
from mnist_dist.engines import conversion
from mnist_dist.engines import engine as engines
from mnist_dist.engines.choice import (
    CALL_SIZES,
    EngineChoice,
    EngineRequest,
    candidates,
    open_engine,
    own_engine,
    packages_of,
    prepare_engine,
    why_not,
)
from mnist_dist.engines.conversion import Answers
from mnist_dist.engines.export import EXPORT_FILE, export_bundle
from mnist_dist.engines.formats import ConvertedEngine, openvino_core
from mnist_dist.errors import ConfigError, MnistDistError, StepFailed
from mnist_dist.export_config import ExportFormat, ExportJob
from mnist_dist.models.bundle import Bundle
from mnist_dist.models.onnx_file import CPU, CUDA, FEATURES, PROBABILITIES, declared, has_cuda
from mnist_dist.score_config import EngineConfig
from mnist_dist.session import Session

# N = images that a fixed batch takes

BATCH = 32
OWN = EngineChoice(engine="onnx", own="onnx")
ENGINES: tuple[EngineName, ...] = ("onnx", "openvino")


class Steps:
    """Takes the place of `run_step`: calls the step here, and notes its title and answers."""

    def __init__(self) -> None:
        self.done: dict[str, Any] = {}
        self.fails: dict[str, Exception] = {}

    def __call__(self, step: partial[Any], *, title: str, session: Session) -> Any:
        if title in self.fails:
            raise self.fails[title]
        self.done[title] = step(lambda done, total: None)
        return self.done[title]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(conversion, "run_step", steps)
    monkeypatch.setattr(engines, "MEASURE_S", 0.0)
    monkeypatch.setattr(engines, "ROUND_S", 0.0)
    monkeypatch.setattr(processor, "has_bfloat16", lambda: False)
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    return steps


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("onnx") / "bundle")


def prepare(
    bundle: Bundle, place: Path, *, console: Recorder | None = None, gpu: bool = False, **requested: Any
) -> EngineChoice:
    console = console or Recorder()
    flags = EngineConfig(**requested)
    request = EngineRequest(requested=flags, places=(str(place),), gpu=gpu, batch_size=BATCH, cpus=1)
    return prepare_engine(bundle, request, session=Session(console=console, stop=Stop(console)))


# --- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["onnx float32", "openvino float32", "openvino bfloat16"]),
        ({"precision": "float32"}, ["onnx float32", "openvino float32"]),
        ({"engine": "onnx"}, ["onnx float32"]),
        ({"engine": "openvino"}, ["openvino float32", "openvino bfloat16"]),
        ({"precision": "bfloat16"}, ["openvino bfloat16"]),
        ({"precision": "int8"}, ["openvino int8"]),
    ],
)
def test_what_fits_the_flags_of_an_onnx_bundle(flags: dict[str, Any], expected: list[str]) -> None:
    found = candidates(EngineConfig(**flags), gpu=False, has_images=True, has_bfloat16=True, own=OWN)
    assert [choice.name for choice in found] == expected
    assert [choice.name for choice in found if choice.is_own] == [name for name in expected if name == "onnx float32"]
    assert {choice.own for choice in found} == {"onnx"}


@pytest.mark.parametrize("gpu", [False, True])
def test_keras_cannot_run_an_onnx_bundle(bundle: Bundle, tmp_path: Path, gpu: bool) -> None:
    expected = r"is an ONNX file: the engine must be onnx or openvino. Received: engine='keras'"
    with pytest.raises(ConfigError, match=expected) as error:
        prepare(bundle, tmp_path / "engines", engine="keras", gpu=gpu)
    assert error.value.exit_code == 2


def test_on_gpus_an_onnx_bundle_runs_by_onnx_runtime() -> None:
    facts: dict[str, Any] = {"gpu": True, "has_images": True, "has_bfloat16": True, "own": OWN}
    for requested in (EngineConfig(), EngineConfig(engine="onnx"), EngineConfig(precision="float32")):
        assert candidates(requested, **facts) == [OWN]
    with pytest.raises(ConfigError, match=r"on GPUs the engine must be onnx in float32 .* Received: engine='openvino'"):
        candidates(EngineConfig(engine="openvino"), **facts)


def test_the_package_for_gpus_is_told_by_its_provider() -> None:
    assert has_cuda(lambda: ["TensorrtExecutionProvider", CUDA, CPU])
    assert not has_cuda(lambda: ["AzureExecutionProvider", CPU])


@pytest.mark.parametrize("installed", [True, False])
def test_without_the_package_for_gpus_it_is_said_that_the_cpu_scores(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(choices, "has_cuda", lambda: installed)
    console = Recorder()
    assert prepare(bundle, tmp_path / "engines", gpu=True, console=console) == OWN
    said = [line for line in console.lines if "install onnxruntime-gpu in place of onnxruntime" in line]
    assert len(said) == len(console.lines) == (not installed)


@pytest.mark.parametrize(("gpu", "installed"), [(True, True), (True, False), (False, True)])
def test_the_gpu_is_used_where_there_is_one_and_the_package(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, gpu: bool, installed: bool
) -> None:
    import onnxruntime

    asked = list[Any]()
    really = onnxruntime.InferenceSession

    def opened(file: Path, options: Any, providers: list[str]) -> Any:
        asked.extend(providers)
        return really(file, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    monkeypatch.setattr(choices, "has_cuda", lambda: installed)
    open_engine(OWN, bundle, batch_size=4, gpu=gpu)
    assert asked == ([CUDA, CPU] if gpu and installed else [CPU])


# --- conversion, and what the engines say ----------------------------------------------------------------------------


def test_openvino_is_converted_from_the_file_and_compared_with_it(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    found = prepare(bundle, tmp_path / "engines", engine="openvino")
    assert list(steps.done) == ["ONNX model, conversion", "openvino float32"]
    folder = tmp_path / "engines" / bundle.info.model_id[:16]
    assert sorted(path.name for path in folder.iterdir()) == ["onnx-float32.json", "openvino", "openvino-float32.json"]
    assert found.uri == str(folder / "openvino")
    assert found.check is not None
    assert (found.check.source, found.check.images, found.check.agreement) == ("calibration", 40, 1.0)
    assert found.check.max_abs_difference <= 1e-5
    assert found.check.images_per_call in CALL_SIZES
    assert str(found) == "openvino float32 (same top class as ONNX Runtime for 100.00% of 40 images)"
    answers: Answers = steps.done["openvino float32"]
    assert (answers.input_name, answers.output_name) == ("image", PROBABILITIES)
    assert len(set(answers.probabilities.argmax(axis=1).tolist())) > 2


def test_auto_takes_one_that_agrees(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    found = prepare(bundle, tmp_path / "engines")
    assert found.engine in ENGINES
    assert found.check is not None
    assert why_not(found) is None
    assert (found.uri is None) == found.is_own == (found.engine == "onnx")
    assert found.batch_size(2) == 2
    steps.done.clear()
    assert prepare(bundle, tmp_path / "engines") == found
    assert steps.done == {}


def test_the_own_file_needs_no_conversion(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    assert prepare(bundle, tmp_path / "engines", engine="onnx") == own_engine(bundle) == OWN
    assert (steps.done, (tmp_path / "engines").exists()) == ({}, False)
    assert packages_of(OWN) == ("onnxruntime",)


def test_a_model_that_openvino_cannot_convert_runs_by_onnx_runtime(
    bundle: Bundle, tmp_path: Path, steps: Steps
) -> None:
    steps.fails["ONNX model, conversion"], console = StepFailed("no such operator"), Recorder()
    assert prepare(bundle, tmp_path / "engines", console=console) == OWN
    assert console.lines[-1] == "could not convert the model, ONNX Runtime runs it: no such operator"


def test_openvino_that_differs_is_refused(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    other = small_bundle(tmp_path / "other", seed=8)
    converted = Path(str(prepare(other, tmp_path / "engines", engine="openvino").uri))
    place = tmp_path / "engines" / bundle.info.model_id[:16]
    converted.parent.rename(place)
    for file in place.glob("*.json"):
        file.unlink()
    expected = r"openvino does not agree with ONNX Runtime \(a probability differs by 0.\d+\). Received: .*openvino"
    with pytest.raises(ConfigError, match=expected):
        prepare(bundle, tmp_path / "engines", engine="openvino")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [None, 5], ids=["any batch", "fixed batch"])
def test_engines_say_what_the_file_says_with_features(
    tmp_path: Path, steps: Steps, engine: EngineName, batch_size: int | None
) -> None:
    bundle = small_bundle(tmp_path / "bundle", batch_size=batch_size)
    choice = prepare(bundle, tmp_path / "engines", engine=engine)
    opened = open_engine(choice, bundle, batch_size=4, embeddings=True, cpus=1)
    assert (opened.batch_size, opened.num_classes, opened.num_features) == (batch_size or 4, len(NAMES), NUM_FEATURES)
    every = small_bundle(tmp_path / "every").session
    for images in (4, 3, 1):
        pixels = some_pixels(images)
        outputs, expected = opened(pixels), every.run([PROBABILITIES, FEATURES], {"image": pixels})
        assert outputs.embeddings is not None
        assert (outputs.probabilities.shape, outputs.embeddings.shape) == ((images, 5), (images, NUM_FEATURES))
        np.testing.assert_allclose(outputs.probabilities, expected[0], atol=1e-5)
        np.testing.assert_allclose(outputs.embeddings, expected[1], rtol=1e-4, atol=1e-6)


def test_a_fixed_batch_is_checked_at_its_size_alone(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[int]()

    def opened(folder: Path, *, batch_size: int, **fields: Any) -> ConvertedEngine:
        tried.append(batch_size)
        return ConvertedEngine(folder, batch_size=batch_size, **fields)

    monkeypatch.setattr(conversion, "ConvertedEngine", opened)
    bundle = small_bundle(tmp_path / "bundle", batch_size=7)
    prepare(bundle, tmp_path / "engines", engine="openvino")
    assert tried == [7, 7]  # the bundle's own file, and the converted one
    assert {answers.images_per_call for answers in steps.done.values()} == {7}
    assert {len(answers.probabilities) for answers in steps.done.values()} == {40}  # the last batch has 5


def test_a_model_without_features_is_converted_too(tmp_path: Path, steps: Steps) -> None:
    bundle = small_bundle(tmp_path / "bundle", outputs=(PROBABILITIES,), images=0)
    choice = prepare(bundle, tmp_path / "engines", engine="openvino")
    opened = open_engine(choice, bundle, batch_size=4, cpus=1)
    assert (opened.num_features, opened(some_pixels(2)).embeddings) == (0, None)
    assert choice.check is not None
    assert choice.check.source == "random"


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 3], ids=["any batch", "fixed batch"])
def test_an_onnx_bundle_is_quantized(tmp_path: Path, steps: Steps, batch_size: int | None) -> None:
    if importlib.util.find_spec("nncf") is None:
        pytest.skip("needs nncf (pip install -e '.[export]'); runs where it is installed")
    bundle = small_bundle(tmp_path / "bundle", batch_size=batch_size)
    found = prepare(bundle, tmp_path / "engines", precision="int8", accept_accuracy_loss=100.0)
    assert found.check is not None
    assert found.check.agreement > 0.6  # by chance 0.3: the largest class has as many images
    assert found.check.max_abs_difference > 1e-4


# --- export ----------------------------------------------------------------------------------------------------------


def export(bundle: Bundle, output: Path, format: ExportFormat, **fields: Any) -> dict[str, Any]:
    job = ExportJob(bundle=str(bundle.path), format=format, output=str(output), batch_size=8, **fields)
    return export_bundle(job, console=Recorder())


def test_the_onnx_export_is_the_bundles_file_with_its_description(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    result = export(bundle, tmp_path / "export", "onnx")
    assert result["max_abs_difference"] == 0
    assert (result["images"], result["images_per_call"]) == (40, 8)
    assert min(result["images_per_s"], result["own_images_per_s"]) > 0
    file = Path(result["path"])
    assert declared(file) == bundle.declared
    model = onnx.load(file)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["class_names"]) == list(NAMES)
    assert (said["model_id"], json.loads(said["image_spec"])["height_px"]) == (bundle.info.model_id, SPEC.height_px)
    assert model.graph == onnx.load(bundle.model_path).graph
    facts = json.loads((tmp_path / "export" / EXPORT_FILE).read_text())
    assert (facts["input"]["name"], facts["output"]["name"]) == ("image", PROBABILITIES)
    assert {"onnx", "onnxruntime"} <= facts["versions"].keys()
    assert "keras" not in facts["versions"]


def test_the_openvino_export_says_what_it_is_too(bundle: Bundle, tmp_path: Path, steps: Steps) -> None:
    result = export(bundle, tmp_path / "export", "openvino")
    assert result["max_abs_difference"] <= 1e-5
    model = openvino_core().read_model(result["path"])
    assert [output.any_name for output in model.outputs] == [PROBABILITIES, FEATURES]
    assert json.loads(model.get_rt_info(["class_names"]).astype(str)) == list(NAMES)
    assert model.get_rt_info(["model_id"]).astype(str) == bundle.info.model_id


@pytest.mark.parametrize("format", ["saved_model", "litert"])
def test_other_exports_of_an_onnx_bundle_are_refused(bundle: Bundle, tmp_path: Path, format: ExportFormat) -> None:
    expected = rf"an imported ONNX model exports to onnx and openvino. Received: format='{format}'"
    with pytest.raises(ConfigError, match=expected) as error:
        export(bundle, tmp_path / "export", format)
    assert error.value.exit_code == 2
    assert not (tmp_path / "export").exists()


def test_an_export_that_differs_is_refused(
    bundle: Bundle, tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "annotate", lambda folder, format, info: other_bias(folder))
    with pytest.raises(MnistDistError, match=r"onnx differs too much from ONNX Runtime: a probability by 0.\d+"):
        export(bundle, tmp_path / "export", "onnx")
    assert not (tmp_path / "export").exists()


def other_bias(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "bias")
    bias.raw_data = np.arange(5, dtype=np.float32).tobytes()
    onnx.save(model, folder / "model.onnx")


def test_a_backbone_without_classes_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gives features and no classes"):
        export(small_bundle(tmp_path / "bundle", names=()), tmp_path / "export", "onnx")


# --- through the job -------------------------------------------------------------------------------------------------


@pytest.mark.chaos  # test_end_to_end kills a job of scoring, too
def test_a_job_of_openvino_is_killed_and_resumed_with_the_answers_of_the_file(tmp_path: Path) -> None:
    bundle, images, output = small_bundle(tmp_path / "bundle"), tmp_path / "images", tmp_path / "table"
    images.mkdir()
    for number in range(12 * SHARD):
        squares(number, width=1400, height=1200).save(images / f"{number:03d}.png", compress_level=1)
    flags = ("--engine", "openvino", "--precision", "float32")
    with Job(bundle.path, images, output, *flags) as job:
        job.until(lambda: job.shards_done() >= 2)
        job.descendants()
        job.kill()
        done = job.shards_done()
    assert done < 12
    assert (tmp_path / "bundle.engines" / bundle.info.model_id[:16] / "openvino-float32.json").is_file()
    with Job(bundle.path, images, output, "--engine", "onnx") as job:
        code, result, _ = job.ended()
    assert (code, result["error_type"]) == (2, "ResumeConflict")
    assert "engine: 'onnx' now, 'openvino' in the run" in result["error"]
    with Job(bundle.path, images, output) as job:
        code, result, err = job.ended()
    assert code == 0, err
    assert (result["images"], result["skipped"]) == (12 * SHARD, done * SHARD)
    rows = rows_of(output)
    assert len({row["predicted_class"] for row in rows.values()}) > 1
    for uri in sorted(rows)[::10]:
        assert rows[uri]["probabilities"] == pytest.approx(bundle.predict(uri).probabilities.tolist(), abs=1e-4)
