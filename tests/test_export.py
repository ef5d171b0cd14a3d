"""export: each format in its own runtime, what is refused, and what a failure leaves."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np
import onnx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import ROOT, Recorder, run_command

from mnist_dist.config import ModelConfig
from mnist_dist.engines.export import EXPORT_FILE, export_bundle
from mnist_dist.engines.formats import FORMATS, ConvertedEngine, openvino_core
from mnist_dist.errors import BundleError, ConfigError, DataError, Interrupted, MnistDistError, ResumeConflict
from mnist_dist.export_config import ExportFormat, ExportJob
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.models.bundle import BundleInfo, all_layers, load_bundle, write_bundle
from mnist_dist.models.classifier import build_classifier
from mnist_dist.store.anywhere import ANYWHERE

# b = images of a call

GREY = ImageSpec(height_px=12, width_px=14, channels=1)
COLOURS = ImageSpec(height_px=15, width_px=11, channels=3)
NAMES = ("ant", "bee", "cat", "dog", "eel")
EXPORTS: tuple[ExportFormat, ...] = get_args(ExportFormat)
OTHERS: tuple[ExportFormat, ...] = ("saved_model", "litert")
SECONDS = 240.0  # two processes that import TensorFlow, where many run


def some_pixels(spec: ImageSpec, images: int) -> Pixels:
    """Noise of another brightness in each image: plain noise is all alike to a deep network."""
    random = np.random.default_rng(images)
    shape = (images, spec.height_px, spec.width_px, spec.channels)
    pixels: Pixels = (random.random(shape) * random.integers(20, 256, (images, 1, 1, spec.channels))).astype(np.uint8)
    return pixels


def calibration(spec: ImageSpec, images: int) -> pa.Table:
    pixels = [image.tobytes() for image in some_pixels(spec, images)]
    return pa.table({"label": [0] * images, "pixels": pa.array(pixels, pa.binary())})


def write(path: Path, *, spec: ImageSpec, images: int, config: ModelConfig | None = None, seed: int = 5) -> Path:
    """A bundle of random weights whose images are spread over the classes, so that no constant answer would pass."""
    config = config or ModelConfig(backbone="cnn")
    classifier, pixels = build_classifier(config, spec=spec, num_classes=len(NAMES), seed=seed), some_pixels(spec, 16)
    normalisations = [
        layer for layer in all_layers(classifier.model) if isinstance(layer, keras.layers.BatchNormalization)
    ]
    for layer in normalisations:  # untouched, they let nothing through a deep network
        layer.momentum = 0.0
    if normalisations:
        classifier.network(pixels.astype(np.float32), training=True)
    logits = classifier.model.get_layer("logits")
    kernel, bias = logits.get_weights()
    said = np.log(np.asarray(classifier.model(pixels)))
    factor = 1 / said.std(axis=0).mean()
    logits.set_weights([kernel * factor, (bias - said.mean(axis=0)) * factor])
    info = BundleInfo(class_names=NAMES, spec=spec, backbone=config.backbone)
    write_bundle(path, classifier.model, info, calibration=calibration(spec, images) if images else None)
    return path


def needs(format: ExportFormat) -> None:
    """Skips where the runtime is not installed."""
    missing = [name for name in FORMATS[format].packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (pip install -e '.[export]'); runs where they are installed")


def export(bundle: Path, output: Path | str, format: ExportFormat = "saved_model", **changes: Any) -> dict[str, Any]:
    console = changes.pop("console", Recorder())
    settings = {"batch_size": 8, **changes}
    return export_bundle(ExportJob(bundle=str(bundle), format=format, output=str(output), **settings), console=console)


def rest(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run") / "bundle", spec=GREY, images=21)


@dataclass(frozen=True)
class Exported:
    """A finished export, copied into the folder of each test that may spoil it."""

    folder: Path
    result: dict[str, Any]

    def copy_to(self, folder: Path) -> Path:
        return shutil.copytree(self.folder, folder)


@pytest.fixture(scope="module")
def exported(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exports") / "saved"
    return Exported(folder, export(bundle, folder))


def check_agreement(bundle: Path, result: dict[str, Any], *, spec: ImageSpec) -> None:
    """Opens the file here, too, with batches of any size."""
    folder, model = Path(result["output"]), load_bundle(bundle).model
    seen = set()
    for b in (1, 3, 8, 5):
        pixels = some_pixels(spec, b)
        engine = ConvertedEngine(folder, format=result["format"], spec=spec, batch_size=b)
        answer = engine(pixels).probabilities
        assert answer.shape == (b, len(NAMES))
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer, model(pixels, training=False), atol=1e-4)
        seen |= set(answer.argmax(axis=1).tolist())
    assert len(seen) > 1


@pytest.mark.parametrize("spec", [pytest.param(GREY, marks=pytest.mark.chaos), COLOURS], ids=["grey", "colours"])
@pytest.mark.parametrize("format", ["onnx", "openvino", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_each_format_says_the_same_in_its_own_runtime(format: ExportFormat, spec: ImageSpec, tmp_path: Path) -> None:
    needs(format)
    bundle = write(tmp_path / "bundle", spec=spec, images=21)
    result = export(bundle, tmp_path / "export", format)

    assert (result["format"], result["images"], result["source"]) == (format, 21, "calibration")
    assert 0 <= result["max_abs_difference"] <= 1e-4
    assert result["agreement"] == 1
    assert min(result["images_per_s"], result["own_images_per_s"]) > 0
    files = [path for path in (tmp_path / "export").rglob("*") if path.is_file() and path.name != EXPORT_FILE]
    assert result["size_bytes"] == sum(path.stat().st_size for path in files) > 100_000
    assert rest(tmp_path / "export") == sorted([FORMATS[format].file, *FORMATS[format].others, EXPORT_FILE])
    assert rest(tmp_path) == ["bundle", "export"]
    check_agreement(bundle, result, spec=spec)
    if format in ("onnx", "openvino"):
        assert output_and_names(Path(result["path"]), format) == ("probabilities", NAMES)


def output_and_names(path: Path, format: ExportFormat) -> tuple[str, tuple[str, ...]] | None:
    """The name of the output and the class names, as an ONNX or OpenVINO file itself says them."""
    if format == "onnx":
        model = onnx.load(path)
        said = {entry.key: entry.value for entry in model.metadata_props}
        return model.graph.output[0].name, tuple(json.loads(said["class_names"]))
    if format == "openvino":
        converted = openvino_core().read_model(path)
        return converted.outputs[0].any_name, tuple(json.loads(converted.get_rt_info(["class_names"]).astype(str)))
    raise AssertionError(f"{format} files name no classes")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_batch_normalisation_is_exported_as_it_predicts(format: ExportFormat, tmp_path: Path) -> None:
    needs(format)
    spec = ImageSpec(height_px=96, width_px=96, channels=3)
    bundle = write(
        tmp_path / "bundle",
        spec=spec,
        images=9,
        config=ModelConfig(backbone="mobilenet", alpha=0.25, image_size_px=96, dropout=0.5),
    )
    check_agreement(bundle, export(bundle, tmp_path / "export", format), spec=spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    "format",
    [format if format == "litert" else pytest.param(format, marks=pytest.mark.chaos) for format in EXPORTS],
)
def test_enlarging_and_a_flattened_feature_map_are_exported(format: ExportFormat, tmp_path: Path) -> None:
    needs(format)
    config = ModelConfig(backbone="mobilenet", alpha=0.25, image_size_px=64, pooling="flatten", hidden_units=7)
    bundle = write(tmp_path / "bundle", spec=GREY, images=5, config=config)
    check_agreement(bundle, export(bundle, tmp_path / "export", format), spec=GREY)


def test_the_file_says_what_it_is(exported: Exported, bundle: Path) -> None:
    facts = json.loads((exported.folder / EXPORT_FILE).read_text())

    info = load_bundle(bundle).info
    assert (facts["format"], facts["model_id"], facts["class_names"]) == ("saved_model", info.model_id, list(NAMES))
    assert facts["input"] == {"name": "image", "dtype": "uint8", "shape": [None, 12, 14, 1]}
    assert facts["output"]["shape"] == [None, len(NAMES)]
    assert (facts["resize"], facts["tolerance"], facts["check"]["images_per_call"]) == (info.spec.resize, 1e-4, 8)
    assert {"python", "keras", "tensorflow"} <= facts["versions"].keys()
    assert exported.result["path"] == str(exported.folder / facts["file"])


@pytest.mark.slow
def test_without_calibration_images_random_ones_are_used_and_it_is_said(tmp_path: Path) -> None:
    bundle, console = write(tmp_path / "bundle", spec=GREY, images=0), Recorder()
    result = export(bundle, tmp_path / "export", console=console)

    assert (result["source"], result["images"]) == ("random", 256)
    assert "random (the bundle has no calibration)" in console.lines[0]


@pytest.mark.slow
def test_above_the_tolerance_nothing_is_left(bundle: Path, tmp_path: Path) -> None:
    needs("onnx")
    with pytest.raises(MnistDistError, match=r"onnx differs too much from Keras: a probability by .* at most 1e-15"):
        export(bundle, tmp_path / "export", "onnx", tolerance=1e-15)
    assert rest(tmp_path) == []


def test_a_finished_export_is_returned_at_once(exported: Exported, bundle: Path, tmp_path: Path) -> None:
    again = exported.copy_to(tmp_path / "export")
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    console = Recorder()

    result = export(bundle, again, console=console)
    other = {"path": "", "output": "", "seconds": 0}
    assert {**result, **other} == {**exported.result, **other}
    assert result["path"] == str(again / "saved_model")
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*")} == before
    assert console.lines == []


def test_another_export_is_refused(exported: Exported, bundle: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "bundle", spec=GREY, images=3, seed=6)
    with pytest.raises(ResumeConflict, match=r"model_id: '[0-9a-f]{64}' now, '[0-9a-f]{64}' in the run"):
        export(other, exported.folder)
    with pytest.raises(ResumeConflict, match=r"another --output, or delete it: format: 'onnx' now, 'saved_model'"):
        export(bundle, exported.folder, "onnx")
    stricter = exported.copy_to(tmp_path / "export")
    facts = json.loads((stricter / EXPORT_FILE).read_text())
    facts["check"]["max_abs_difference"] = 3e-5
    (stricter / EXPORT_FILE).write_text(json.dumps(facts))
    with pytest.raises(ResumeConflict, match=r"tolerance: 1e-05 now, 3e-05 is the export's difference"):
        export(bundle, stricter, tolerance=1e-5)


def test_a_damaged_export_is_told(exported: Exported, bundle: Path, tmp_path: Path) -> None:
    damaged = exported.copy_to(tmp_path / "export")
    (damaged / "saved_model" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"damaged, delete it: its files had \d+ bytes and now have \d+"):
        export(bundle, damaged)
    (damaged / EXPORT_FILE).write_text("{")
    with pytest.raises(DataError, match=r"export.json is not a"):
        export(bundle, damaged)


def test_a_folder_of_somebody_else_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"new or empty. Received: .* with \['thesis.tex'\]"):
        export(bundle, tmp_path)
    assert rest(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("format", "packages"),
    [("onnx", "onnx and tf2onnx and onnxruntime"), ("openvino", "openvino"), ("litert", "ai_edge_litert")],
)
def test_a_missing_runtime_is_told_with_the_line_that_installs_it(
    format: ExportFormat, packages: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=rf"--format {format} needs {packages}: pip install 'mnist_dist\[export\]'"
    ) as e:
        export(bundle, tmp_path / "export", format)
    assert e.value.exit_code == 2
    assert rest(tmp_path) == []


def test_a_table_without_pixels_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle", spec=GREY, images=0)
    pq.write_table(pa.table({"label": [3, 1]}), bundle / "calibration.parquet")
    with pytest.raises(BundleError, match=r"must have a column pixels. Received: \['label'\]"):
        export(bundle, tmp_path / "export")


@pytest.mark.slow
def test_images_of_another_size_are_told_by_the_process_that_reads_them(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle", spec=GREY, images=0)
    pq.write_table(calibration(COLOURS, 2), bundle / "calibration.parquet")
    with pytest.raises(
        MnistDistError, match=r"ended with exit status 1:\n(.*\n)*.*12 x 14 x 1 bytes an image. Received: 495"
    ):
        export(bundle, tmp_path / "export")
    assert rest(tmp_path) == ["bundle"]


@pytest.mark.chaos
def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle", spec=GREY, images=2)
    (bundle / "model.keras").write_bytes(b"no model")
    facts = json.loads((bundle / "bundle.json").read_text())
    facts["model_id"] = hashlib.sha256(b"no model").hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(facts))
    with pytest.raises(MnistDistError, match=r"Keras model, conversion: the process ended with exit status 1:\n.*\S"):
        export(bundle, tmp_path / "export")
    assert rest(tmp_path) == ["bundle"]


def steps_of(parent: psutil.Process) -> list[psutil.Process]:
    """The processes that convert or check."""
    return [child for child in parent.children() if "mnist_dist.engines.steps" in child.cmdline()]


def until(condition: Callable[[], Any], *, seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_that_names_memory(bundle: Path, tmp_path: Path) -> None:
    ours = psutil.Process()
    killer = threading.Thread(target=lambda: until(lambda: steps_of(ours))[0].kill())
    killer.start()
    with pytest.raises(MnistDistError, match=r"was killed by SIGKILL, usually for lack of memory \(\d+\.\d GiB"):
        export(bundle, tmp_path / "export")
    killer.join()
    assert rest(tmp_path) == []


@pytest.mark.slow
def test_a_signal_ends_it_with_nothing_left(bundle: Path, tmp_path: Path) -> None:
    ours = psutil.Process()

    def stop() -> None:
        until(lambda: steps_of(ours))
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=stop)
    killer.start()
    with pytest.raises(Interrupted, match=r"run the same command to resume"):
        export(bundle, tmp_path / "export")
    killer.join()
    assert rest(tmp_path) == []
    assert steps_of(ours) == []


@pytest.mark.slow
def test_killed_in_the_middle_it_looks_unfinished_and_the_same_command_does_it(bundle: Path, tmp_path: Path) -> None:
    run = shutil.copytree(bundle, tmp_path / "run" / "bundle").parent
    command = ("jobs.export", "--bundle", str(run / "bundle"), "--format", "saved_model")
    job = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    step = until(lambda: steps_of(psutil.Process(job.pid)))[0]
    job.kill()
    job.wait()
    until(lambda: not step.is_running())  # it ends with its driver
    assert not (run / "export-saved_model").exists()
    (run / ".export-saved_model.0123456789ab.tmp").mkdir()  # had it been killed while it published

    code, result, _ = run_command(*command)
    assert (code, result["job"], result["path"]) == (0, "export", str(run / "export-saved_model" / "saved_model"))
    assert rest(run) == [".export-saved_model.lock", "bundle", "export-saved_model"]  # the number of the second driver
    assert not list(run.glob(".*.tmp"))


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    """What a command says, without the time that it took this time."""
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.slow
def test_the_command_says_what_it_did(bundle: Path, tmp_path: Path) -> None:
    command = ("jobs.export", "--bundle", str(bundle), "--format", "saved_model", "--output", str(tmp_path / "export"))
    code, result, err = run_command(*command)
    assert code == 0
    assert result.keys() >= {"job", "path", "format", "size_bytes", "max_abs_difference", "agreement", "images_per_s"}
    assert "compared on 21 calibration images" in err
    assert not {"oneDNN", "cuda", "I0000"} & set(err.split())
    code, again, _ = run_command(*command)
    assert (code, without_seconds(again)) == (0, without_seconds(result))

    other = write(tmp_path / "other", spec=GREY, images=2, seed=6)
    code, result, _ = run_command(*command[:2], str(other), *command[3:])
    assert (code, result["error_type"]) == (2, "ResumeConflict")
    code, result, err = run_command(*command, "--tolerance", "2")
    assert code == 2
    told = re.sub(r"[│\s]+", " ", err)  # in a box, whose lines are broken
    assert "--tolerance must be in [0, 1). Received: --tolerance 2.0" in told


def test_a_bundle_that_is_none_is_told_before_any_work(tmp_path: Path) -> None:
    code, result, _ = run_command("jobs.export", "--bundle", str(tmp_path), "--format", "onnx")
    assert (code, result["job"], result["error_type"]) == (2, "export", "BundleError")
    assert rest(tmp_path) == []


def test_the_export_lies_beside_the_bundle() -> None:
    assert ExportJob(bundle="/runs/a/bundle/", format="onnx").output_uri == "/runs/a/export-onnx"
    assert ExportJob(bundle="/models/birds", format="litert").output_uri == "/models/birds-export-litert"
    assert ExportJob(bundle="s3://b/a/bundle", format="onnx").output_uri == "s3://b/a/export-onnx"
    assert ExportJob(bundle="/a", format="onnx", output="out/x").output_uri == str(Path("out/x").absolute())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bundle": ""}, r"bundle must be a folder or a bucket prefix. Received: bundle=''"),
        ({"output": ""}, r"output must be a folder or a bucket prefix. Received: output=''"),
        ({"tolerance": -0.5}, r"tolerance must be in \[0, 1\). Received: tolerance=-0.5"),
        ({"tolerance": float("nan")}, r"tolerance must be in \[0, 1\). Received: tolerance=nan"),
        ({"batch_size": 0}, r"batch_size must be at least 1. Received: batch_size=0"),
        ({"output": "/runs/a/bundle/onnx"}, r"never written to: output must lie outside it"),
        ({"bundle": "s3://bucket"}, r"output is required if the bundle is a whole bucket"),
    ],
)
def test_impossible_exports_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportJob(**({"bundle": "/runs/a/bundle", "format": "onnx"} | changes))


@pytest.mark.slow
def test_bundle_and_export_may_lie_on_s3(bundle: Path, s3: str) -> None:
    ANYWHERE.upload_folder(bundle, f"{s3}/run/bundle", last="bundle.json")
    job = ExportJob(bundle=f"{s3}/run/bundle", format="saved_model")
    ANYWHERE.write_bytes(f"{job.output_uri}/saved_model/assets/left", b"of an upload that broke off")
    result = export_bundle(job, console=Recorder())

    assert result["path"] == f"{s3}/run/export-saved_model/saved_model"
    names = {entry.uri.removeprefix(f"{job.output_uri}/") for entry in ANYWHERE.list_entries(job.output_uri)}
    assert {"export.json", "saved_model/saved_model.pb"} <= names
    assert "saved_model/assets/left" not in names
    assert without_seconds(export_bundle(job, console=Recorder())) == without_seconds(result)
    left = {entry.uri.removeprefix(f"{s3}/run/") for entry in ANYWHERE.list_entries(f"{s3}/run")}
    assert {name.partition("/")[0] for name in left} == {"bundle", "export-saved_model"}
