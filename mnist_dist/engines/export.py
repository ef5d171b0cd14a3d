"""A bundle's model as a file of another runtime, shown to give the same answers there.

Owns: the formats, the conversion (Keras' own `model.export`), the check, and the folder that comes of both. Does not
own the bundle (`bundle`) or the flags (`export_config`).

Contract: the folder holds what the format needs and `export.json`, which is written last and says what was checked; a
folder without it is unfinished. The file takes `uint8 [B, H, W, C]`, 0-255, for any B, and gives `float32 [B, K]`
probabilities; preprocessing is inside. A local folder is made under a temporary name beside its place and renamed.

Both steps run in processes of their own, on the CPU. The first one loads `model.keras`, notes what it says of the
images, and converts it. The second one loads the exported file and nothing else: its runtime, no Keras, and no
TensorFlow but for `saved_model`. So the driver loads neither, and a crash there is an error here.

Run as `python -m mnist_dist.engines.export STEP TASK`, it is such a process.
"""

# B = batch, N = all images that are compared, H = height px, W = width px, C = channels, K = classes

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mnist_dist import storage
from mnist_dist.config import differences
from mnist_dist.console import Console, Stop
from mnist_dist.data.images import Pixels
from mnist_dist.engines.calibration import Predict, Probabilities, calibration_of, predict_calibration
from mnist_dist.engines.converted import openvino_core
from mnist_dist.engines.engine import SECONDS_MEASURED, KerasEngine, calls_per_s
from mnist_dist.engines.steps import Report, run_step, serve
from mnist_dist.errors import ConfigError, MnistDistError, ResumeConflict
from mnist_dist.export_config import ExportFormat
from mnist_dist.lock import Lock
from mnist_dist.models.bundle import Bundle, load_bundle

log = logging.getLogger(__name__)

EXPORT_FILE = "export.json"
FORMAT_VERSION = 1
RESULT_KEYS = (
    *("format", "size_bytes", "max_abs_difference", "agreement", "images_per_s", "keras_images_per_s"),
    *("checked_images", "images", "model_id"),
)


@dataclass(frozen=True)
class Format:
    """One row of the table of formats.

    Args:
        file: what a runtime opens, in the folder of the export.
        others: further names beside it.
        keras_name: for `model.export`.
        modules: what the conversion and the runtime need beside the package's own dependencies.
        packages: whose versions are noted.
    """

    file: str
    others: tuple[str, ...]
    keras_name: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]


FORMATS: dict[ExportFormat, Format] = {
    "saved_model": Format("saved_model", (), "tf_saved_model", (), ()),
    "onnx": Format("model.onnx", (), "onnx", ("tf2onnx", "onnxruntime"), ("onnx", "tf2onnx", "onnxruntime")),
    "openvino": Format("model.xml", ("model.bin",), "openvino", ("openvino",), ("openvino",)),
    "litert": Format("model.tflite", (), "litert", ("ai_edge_litert",), ("ai-edge-litert",)),
}


@dataclass(frozen=True)
class Runtime:
    """An exported file, loaded.

    Args:
        predict: `uint8 [B, H, W, C]` -> `float32 [B, K]`.
        input_name: as the file calls it.
        output_name: the same.
    """

    predict: Predict
    input_name: str
    output_name: str


def export_bundle(
    bundle_uri: str,
    *,
    format: ExportFormat,
    output: str,
    tolerance: float = 1e-4,
    batch_size: int = 32,
    console: Console | None = None,
    find_module: Callable[[str], object | None] = importlib.util.find_spec,
) -> dict[str, Any]:
    """Exports a bundle and checks the file in its own runtime, or returns the export that is already there.

    Args:
        bundle_uri: a finished bundle.
        format: a row of `FORMATS`.
        output: folder or `s3://` prefix for the files.
        tolerance: largest absolute difference of a probability to the Keras model's.
        batch_size: images per call in the comparison and the measurement.
        console: where a person looks; None: stderr.
        find_module: says whether a package is installed.

    Returns:
        Keys of the job's JSON line: `path` (what a runtime opens), `output`, and what `export.json` says of `format`,
        `size_bytes`, `max_abs_difference`, `agreement` (share of images with the same top class), `images_per_s`,
        `keras_images_per_s`, `checked_images`, `images` (`calibration` or `random`), `model_id`.

    Raises:
        BundleError: there is no bundle, or its calibration images are none.
        ConfigError: the runtime is not installed, or something else lies at the output.
        ResumeConflict: the output holds another export.
        Locked: another driver is at work on the same output.
        Interrupted: by a signal; nothing is left.
        MnistDistError: the conversion or the runtime failed, or the difference is above the tolerance; nothing is left.
    """
    console = console or Console()
    bundle, output = load_bundle(bundle_uri), storage.absolute(output)
    if _is_finished(output, bundle, format=format, tolerance=tolerance):
        return _result(output)
    _check_modules(format, find_module)
    _check_free(output, format=format)
    source, count = calibration_of(bundle)
    parent, _, name = output.rpartition("/")
    with Stop(console) as stop, Lock(f"{parent}/.{name}.lock", what=output) as lock:
        if _is_finished(output, bundle, format=format, tolerance=tolerance):
            return _result(output)
        console.line(
            f"exporting {bundle.info.backbone} {bundle.info.model_id[:12]} to {format}, compared on {count} "
            f"{'calibration' if source == 'calibration' else 'random (the bundle has no calibration)'} images"
        )
        with _work_folder(output) as work:
            task = Task(format=format, bundle=str(bundle.path), work=str(work), batch_size=batch_size)
            Path(task.files).mkdir()
            _run("convert", task, console=console, stop=stop)
            _run("check", task, console=console, stop=stop)
            facts = _compare(task, tolerance=tolerance) | {"images": source}
            _write_facts(task, bundle, facts)
            stop.check()
            lock.check()
            _publish(Path(task.files), output, format=format)
    result = _result(output)
    console.line(_summary(result))
    return result


# --- what is already there -------------------------------------------------------------------------------------------


def _is_finished(output: str, bundle: Bundle, *, format: ExportFormat, tolerance: float) -> bool:
    """Whether just this export is there, complete.

    Raises:
        ResumeConflict: another one is.
        ConfigError: it is, but damaged.
    """
    facts = _read_facts(output)
    if facts is None:
        return False
    ours = {"model_id": bundle.info.model_id, "format": format}
    lines = differences(ours, {name: facts.get(name) for name in ours})
    if facts["max_abs_difference"] > tolerance:
        lines.append(f"tolerance: {tolerance:g} now, {facts['max_abs_difference']:.3g} is the export's difference")
    if lines:
        raise ResumeConflict(
            f"there is another export; name another --output, or delete it: {'; '.join(lines)}. Received: {output!r}"
        )
    size_bytes = sum(entry.size_bytes for entry in _files(output))
    if size_bytes != facts["size_bytes"]:
        raise ConfigError(
            f"the export is damaged, delete it: its files had {facts['size_bytes']} bytes and have {size_bytes}. "
            f"Received: {output!r}"
        )
    return True


def _read_facts(output: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(storage.read_bytes(storage.join(output, EXPORT_FILE))))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as err:
        raise ConfigError(f"{EXPORT_FILE} is no JSON object: {err}. Received: {output!r}") from err


def _files(output: str) -> list[storage.Entry]:
    """Everything in the export's folder but `export.json`."""
    mark = storage.join(output, EXPORT_FILE)
    return [entry for entry in storage.list_entries(output) if entry.uri != mark]


def _result(output: str) -> dict[str, Any]:
    facts = _read_facts(output)
    assert facts is not None, output
    path = storage.join(output, FORMATS[facts["format"]].file)
    return {"path": path, "output": output, **{key: facts[key] for key in RESULT_KEYS}}


def _check_free(output: str, *, format: ExportFormat) -> None:
    """Whatever lies there without an `export.json` is not ours, but for the files of an upload that broke off."""
    row, remote = FORMATS[format], storage.is_remote(output)
    ours = {row.file, *row.others} if remote else set()
    names = {entry.uri.removeprefix(f"{output}/").partition("/")[0] for entry in storage.scan_entries(output)}
    if names - ours or (not remote and Path(output).is_dir() and any(Path(output).iterdir())):
        raise ConfigError(
            f"the folder for an export is new or empty. Received: {output!r}, which holds {sorted(names - ours)[:5]}"
        )


def _check_modules(format: ExportFormat, find_module: Callable[[str], object | None]) -> None:
    missing = [name for name in FORMATS[format].modules if find_module(name) is None]
    if missing:
        raise ConfigError(
            f"--format {format} needs {' and '.join(missing)}: pip install 'mnist_dist[export]'. "
            f"Received: format={format!r}"
        )


# --- the driver's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a step is told.

    Args:
        format: a row of `FORMATS`.
        bundle: its local folder.
        work: the folder of this attempt.
        batch_size: images per call.
    """

    format: ExportFormat
    bundle: str
    work: str
    batch_size: int

    @property
    def files(self) -> str:
        """The folder that becomes the export."""
        return f"{self.work}/files"

    @property
    def model(self) -> str:
        """What the runtime opens."""
        return f"{self.files}/{FORMATS[self.format].file}"

    def outputs(self, step: str) -> Path:
        """What a step says of the images."""
        return Path(self.work, f"{step}.npz")

    def facts(self, step: str) -> Path:
        """What else it has to say."""
        return Path(self.work, f"{step}.json")


@contextlib.contextmanager
def _work_folder(output: str) -> Iterator[Path]:
    """A hidden folder beside a local output, so that a rename publishes it; those of killed drivers are deleted."""
    if storage.is_remote(output):
        with tempfile.TemporaryDirectory(prefix="mnist_dist-export-") as scratch:
            yield Path(scratch)
        return
    target = Path(output)
    for left in target.parent.glob(f".{target.name}.*.tmp"):  # the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    work = target.with_name(storage.temporary_name(target.name))
    try:
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(files: Path, output: str, *, format: ExportFormat) -> None:
    if storage.is_remote(output):
        for name in (FORMATS[format].file, *FORMATS[format].others):  # of an upload that broke off
            storage.delete_tree(storage.join(output, name))
        storage.upload_folder(files, output, last=EXPORT_FILE)
        return
    for path in files.rglob("*"):  # on disk before the rename shows them
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    files.rename(output)


def _run(step: str, task: Task, *, console: Console, stop: Stop) -> None:
    titles = {"convert": f"{task.format}: Keras model, conversion", "check": f"{task.format}: its own runtime"}
    run_step(
        "mnist_dist.engines.export",
        step,
        dataclasses.asdict(task),
        title=titles[step],
        log_file=Path(task.work, f"{step}.log"),
        console=console,
        stop=stop,
    )


def _compare(task: Task, *, tolerance: float) -> dict[str, Any]:
    """What the two processes said of the same images, held against each other.

    Raises:
        MnistDistError: the difference is above the tolerance.
    """
    ours, theirs = (np.load(task.outputs(step))["probabilities"] for step in ("convert", "check"))
    if ours.shape != theirs.shape:
        raise MnistDistError(f"{task.format} gives {list(ours.shape)} probabilities. Received: {list(theirs.shape)}")
    difference = float(np.abs(ours.astype(np.float64) - theirs).max())
    agreement = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    if not difference <= tolerance:  # also what is no number
        raise MnistDistError(
            f"{task.format} differs from the Keras model: a probability by {difference:.3g}, the top class of "
            f"{1 - agreement:.2%} of {len(ours)} images; at most {tolerance:g} is allowed (--tolerance)"
        )
    facts = {step: json.loads(task.facts(step).read_text()) for step in ("convert", "check")}
    return {
        "max_abs_difference": difference,
        "agreement": agreement,
        "tolerance": tolerance,
        "checked_images": len(ours),
        "images_per_s": facts["check"].pop("images_per_s"),
        "keras_images_per_s": facts["convert"]["images_per_s"],
        "batch_size": task.batch_size,
        **facts["check"],
    }


def _write_facts(task: Task, bundle: Bundle, facts: dict[str, Any]) -> None:
    info, row = bundle.info, FORMATS[task.format]
    packages = ("keras", "tensorflow", *row.packages)
    values = {
        "format_version": FORMAT_VERSION,
        "format": task.format,
        "file": row.file,
        "model_id": info.model_id,
        "class_names": info.class_names,
        "input": {"name": facts.pop("input_name"), "dtype": "uint8", "shape": [None, *info.spec.shape]},
        "output": {"name": facts.pop("output_name"), "dtype": "float32", "shape": [None, len(info.class_names)]},
        "resize": info.resize,
        "size_bytes": sum(entry.size_bytes for entry in _files(task.files)),
        **facts,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    storage.write_bytes(f"{task.files}/{EXPORT_FILE}", (json.dumps(values, indent=2) + "\n").encode())


def _summary(result: dict[str, Any]) -> str:
    return (
        f"{result['path']}: {result['size_bytes'] / 1e6:.1f} MB, differs by at most "
        f"{result['max_abs_difference']:.2g}, same top class for {result['agreement']:.2%} of "
        f"{result['checked_images']} images, {result['images_per_s']:.1f} images/s (Keras: "
        f"{result['keras_images_per_s']:.1f})"
    )


# --- the steps, each in a process of its own -------------------------------------------------------------------------


def _convert(task: Task, report: Report) -> None:
    """Notes what the Keras model says, then converts it."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # whose TF32 would differ by more than an exact export does
    bundle = load_bundle(task.bundle)
    _note("convert", task, _keras(bundle, batch_size=task.batch_size), report=report, facts={})
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # its converter would report its use to Intel
    bundle.model(
        np.zeros((1, *bundle.info.spec.shape), np.uint8), training=False
    )  # an ONNX export wants it called before
    bundle.model.export(task.model, format=FORMATS[task.format].keras_name, verbose=False)


def _keras(bundle: Bundle, *, batch_size: int) -> Predict:
    engine = KerasEngine(bundle, batch_size=batch_size)
    return lambda pixels: engine(pixels).probabilities


def _check(task: Task, report: Report) -> None:
    """Notes what the exported file says, in its own runtime."""
    runtime = open_export(task.model, format=task.format)
    facts = {"input_name": runtime.input_name, "output_name": runtime.output_name}
    _note("check", task, runtime.predict, report=report, facts=facts)


def _note(step: str, task: Task, predict: Predict, *, report: Report, facts: dict[str, Any]) -> None:
    bundle = load_bundle(task.bundle)
    probabilities = predict_calibration(bundle, predict, batch_size=task.batch_size, report=report)
    np.savez(task.outputs(step), probabilities=probabilities)
    ready = np.zeros((task.batch_size, *bundle.info.spec.shape), np.uint8)
    speed = task.batch_size * calls_per_s(lambda: predict(ready), seconds=SECONDS_MEASURED)
    task.facts(step).write_text(json.dumps({**facts, "images_per_s": speed}))


def open_export(path: str, *, format: ExportFormat) -> Runtime:
    """An exported file in its own runtime, on all cores, in float32."""
    openers: dict[ExportFormat, Callable[[str], Runtime]] = {
        "saved_model": _open_saved_model,
        "onnx": _open_onnx,
        "openvino": _open_openvino,
        "litert": _open_litert,
    }
    return openers[format](path)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _open_saved_model(path: str) -> Runtime:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    function = tf.saved_model.load(path).signatures["serving_default"]
    (source,), (target,) = function.structured_input_signature[1], function.structured_outputs
    return Runtime(lambda pixels: function(**{source: tf.constant(pixels)})[target].numpy(), source, target)


def _open_onnx(path: str) -> Runtime:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _cpus()  # its own count takes no notice of a container's limits
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    return Runtime(lambda pixels: session.run([target.name], {source.name: pixels})[0], source.name, target.name)


def _open_openvino(path: str) -> Runtime:
    # some CPUs run bfloat16 unless they are told otherwise
    compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = compiled.input(0).any_name, compiled.output(0).any_name
    return Runtime(lambda pixels: np.array(compiled(pixels)[0]), *names)


def _open_litert(path: str) -> Runtime:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=_cpus())
    interpreter.allocate_tensors()
    ((_, names),) = interpreter.get_signature_list().items()
    (source,), (target,) = names["inputs"], names["outputs"]
    place, answer = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def predict(pixels: Pixels) -> Probabilities:
        if tuple(interpreter.get_input_details()[0]["shape"]) != pixels.shape:  # memory is laid out for one batch
            interpreter.resize_tensor_input(place, pixels.shape, strict=True)
            interpreter.allocate_tensors()
        interpreter.set_tensor(place, pixels)
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(answer))

    return Runtime(predict, source, target)


if __name__ == "__main__":
    serve(
        {
            "convert": lambda task, report: _convert(Task(**task), report),
            "check": lambda task, report: _check(Task(**task), report),
        }
    )
