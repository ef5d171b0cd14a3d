"""Which engine runs a bundle's model: converted once, checked against Keras on the bundle's own images.

Owns: the folder of converted models and of what the checks found, who passes, and who is taken. Does not own: how an
engine runs (`engines`, `converted_engines`), or files for other people (`export`).

```
<bundle>.engines/<model id>/      beside the bundle; where that cannot be written, <output>/_engines/<model id>/
  openvino/  openvino-int8/  onnx/   converted models, each put in place as a whole
  reference.npz                      what Keras says of the calibration images, in float32
  openvino-bfloat16.json ...         what the check of an engine found; written last
```

Two jobs may convert the same bundle at once: what both write is the same. Conversion and each check run in processes
of their own (`steps`), so the driver loads neither Keras nor an engine.
"""

# N = images that are compared, K = classes

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist import storage
from mnist_dist.config import EngineConfig, EngineName, EnginePrecision
from mnist_dist.console import Console, Stop
from mnist_dist.engines.calibration import (
    calibration_images,
    calibration_labels,
    calibration_of,
    predict_calibration,
)
from mnist_dist.engines.converted import ONNX_FILE, OPENVINO_FILE, OnnxEngine, OpenVinoEngine, openvino_core
from mnist_dist.engines.engine import Engine, KerasEngine, best_images_per_s, with_features
from mnist_dist.engines.steps import Report, run_step, serve
from mnist_dist.errors import ConfigError, MnistDistError, StepFailed, StorageError, first_line
from mnist_dist.models.bundle import Bundle, load_bundle

COMPARED_IMAGES = 1_000
LARGEST_DIFFERENCE = 1e-4  # of a probability, in float32
LEAST_AGREEMENT = 0.995  # of the top class, in bfloat16, and
LARGEST_LOSS = 0.002  # of accuracy; where there are few images, none may differ
FEW_IMAGES = 1_000
CALL_SIZES = (4, 32)  # images per call that are tried: small calls stay in a core's cache, large ones cost less each
AS_FAST = 0.97  # where a smaller call is so fast, it is taken: it needs less memory
WORTH_A_LOAD = 1.25  # Keras must be so many times as fast: loading TensorFlow takes seconds and a GB of memory
QUANTIZED_IMAGES = 300
REFERENCE_FILE = "reference.npz"
MODULES: Mapping[EngineName, tuple[str, ...]] = {
    "keras": (),
    "openvino": (),
    "onnx": ("tf2onnx", "onnxruntime"),
}


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """An engine, and what its check found."""

    engine: EngineName = "keras"
    precision: EnginePrecision = "float32"
    uri: str | None = None
    """Folder of the converted model; None: the bundle's own file is what runs."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """`images`, `source`, `max_abs_difference`, `agreement`, `accuracy_loss`, `images_per_s`, of converted models also
    `images_per_call`, the fastest; empty: not checked."""

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.precision}"

    def __str__(self) -> str:
        if not self.facts or self.engine == "keras":
            return f"{self.engine} {self.precision}"
        return f"{self.engine} {self.precision} (same top class as Keras for {self.facts['agreement']:.2%})"

    def batch_size(self, most: int) -> int:
        """Images per call, where so many may be taken."""
        return min(most, int(self.facts.get("images_per_call", most)))

    def noted(self) -> dict[str, Any]:
        """What a plan and a summary say of it."""
        return {"engine": self.engine, "precision": self.precision, "engine_check": dict(self.facts)}


def open_engine(
    choice: EngineChoice, bundle: Bundle, *, batch_size: int, embeddings: bool = False, cpus: int | None = None
) -> Engine:
    """Loads an engine, and calls it once, which takes long.

    Args:
        choice: which.
        bundle: opened.
        batch_size: images per call, at most.
        embeddings: also give the features before the head.
        cpus: cores that a call may use; None: all.
    """
    batch_size = choice.batch_size(batch_size)
    engine = _load_engine(choice, bundle, batch_size=batch_size, embeddings=embeddings, cpus=cpus)
    engine(np.zeros((1, *bundle.info.spec.shape), np.uint8))
    return engine


def _load_engine(
    choice: EngineChoice, bundle: Bundle, *, batch_size: int, embeddings: bool, cpus: int | None
) -> Engine:
    if choice.uri is None:
        return KerasEngine(bundle, batch_size=batch_size, embeddings=embeddings, cpus=cpus)
    spec, threads = bundle.info.spec, cpus or len(os.sched_getaffinity(0))
    with _local_folder(choice.uri) as folder:
        if choice.engine == "onnx":
            return OnnxEngine(folder, spec=spec, batch_size=batch_size, embeddings=embeddings, cpus=threads)
        return OpenVinoEngine(
            folder, spec=spec, batch_size=batch_size, precision=choice.precision, embeddings=embeddings, cpus=threads
        )


@contextlib.contextmanager
def _local_folder(uri: str) -> Iterator[Path]:
    """The folder, or a copy of it for as long as it is read."""
    if not storage.is_remote(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="mnist_dist-engine-") as scratch:
        storage.download_folder(uri, Path(scratch))
        yield Path(scratch)


# --- what is asked for, and what may be taken ------------------------------------------------------------------------


def candidates(asked: EngineConfig, *, gpu: bool, has_images: bool, has_bfloat16: bool) -> list[EngineChoice]:
    """The engines that fit what was asked for; a single one where that was named.

    Args:
        asked: by the person.
        gpu: the model runs on GPUs.
        has_images: the bundle has calibration images.
        has_bfloat16: the CPU computes in it; others only pretend to.

    Raises:
        ConfigError: an engine for CPUs was asked for on GPUs.
    """
    if gpu:
        if asked.engine in ("openvino", "onnx") or asked.precision not in ("auto", "float32"):
            raise ConfigError(
                "on GPUs the engine is keras, in float32 (or --gpus-per-actor 0). "
                f"Received: engine={asked.engine!r}, precision={asked.precision!r}"
            )
        return [EngineChoice()]
    pairs: list[tuple[EngineName, EnginePrecision]] = [("keras", "float32"), ("openvino", "float32")]
    if asked.precision == "bfloat16" or (has_images and has_bfloat16):
        pairs.append(("openvino", "bfloat16"))
    if asked.precision == "int8":
        pairs.append(("openvino", "int8"))
    if asked.engine == "onnx":
        pairs.append(("onnx", "float32"))
    return [
        EngineChoice(engine=engine, precision=precision)
        for engine, precision in pairs
        if asked.engine in ("auto", engine)
        and (asked.precision == precision or (asked.precision == "auto" and precision != "int8"))
    ]


def why_not(choice: EngineChoice) -> str | None:
    """Why an engine must not be taken unasked; None: it agrees with Keras in float32 as its precision has to."""
    facts = choice.facts
    if choice.engine == "keras":
        return None
    if choice.precision == "float32":
        difference = facts["max_abs_difference"]
        # written so that what is no number does not pass
        return None if difference <= LARGEST_DIFFERENCE else f"a probability differs by {difference:.2g}"
    if facts["source"] != "calibration":
        return "the bundle has no calibration images to compare on"
    if math.isnan(facts["max_abs_difference"]):
        return "a probability is no number"
    if facts["images"] < FEW_IMAGES:
        return None if facts["agreement"] == 1 else f"top class of {1 - facts['agreement']:.2%} of few images differs"
    if not facts["agreement"] >= LEAST_AGREEMENT:
        return f"the top class of {1 - facts['agreement']:.2%} of the images differs"
    loss = facts["accuracy_loss"]
    return None if loss is None or loss <= LARGEST_LOSS else f"accuracy is {100 * loss:.2f} points lower"


def fastest(checked: Iterable[EngineChoice]) -> EngineChoice:
    """The fastest of those that pass; Keras where none does, and where it is clearly faster."""
    passing = [choice for choice in checked if choice.precision != "int8" and why_not(choice) is None]

    def speed(choice: EngineChoice) -> float:
        return float(choice.facts["images_per_s"]) / (WORTH_A_LOAD if choice.engine == "keras" else 1.0)

    return max(passing, key=speed, default=EngineChoice())


# --- the driver's side -----------------------------------------------------------------------------------------------


def prepare_engine(
    bundle: Bundle,
    asked: EngineConfig,
    *,
    places: Iterable[str],
    gpu: bool,
    batch_size: int,
    cpus: int,
    worth_it: bool,
    console: Console,
    stop: Stop,
) -> EngineChoice:
    """The engine for a job: what was asked for, or the fastest that passes; converted and checked where it was not.

    Args:
        bundle: opened.
        asked: by the person.
        places: URIs where converted models may be kept: the first one that can be written is taken, one that holds
            some before others.
        gpu: the model runs on GPUs.
        batch_size: images per call.
        cpus: cores of an engine.
        worth_it: the job is large enough to convert and check for; else what is ready is taken where nothing was named.
        console: shows progress.
        stop: looked at all the time.

    Raises:
        ConfigError: what was asked for does not go, or is not installed, or does not compute what Keras does, or there
            is no place to keep it.
        StepFailed: a conversion or a check of an engine that was named failed.
        Interrupted: a signal came.
    """
    has_images = not gpu and asked.engine != "keras" and calibration_of(bundle)[0] == "calibration"
    fitting = candidates(asked, gpu=gpu, has_images=has_images, has_bfloat16=_has_bfloat16())
    named = asked.engine != "auto" or len(fitting) == 1
    for choice in fitting:
        _check_installed(choice)
    if all(choice.engine == "keras" for choice in fitting):
        return EngineChoice()
    all_caches = [_Cache(storage.join(place, bundle.info.model_id[:16]), cpus=cpus) for place in places]
    caches = _readable(all_caches)
    known = [caches[0].known(choice) for choice in fitting] if caches else fitting
    if not all(choice.facts for choice in known) and (named or worth_it):
        with tempfile.TemporaryDirectory(prefix="mnist_dist-engines-") as scratch:
            try:
                cache = _writable(caches, all_caches)
                work = _Work(bundle, cache, Path(scratch), batch_size, cpus, console, stop)
                known = work.checked([cache.known(choice) for choice in fitting])
            except (StepFailed, StorageError) as failure:
                if named:
                    raise
                console.line(f"keras runs the model, which could not be converted: {first_line(failure)}")
                return EngineChoice()
    checked = [choice for choice in known if choice.facts]
    if named and (len(checked) == 1 or all(why_not(choice) for choice in checked)):
        return _as_asked(checked[0], console)
    return fastest(checked) if any(choice.engine != "keras" for choice in checked) else EngineChoice()


def _readable(caches: Iterable["_Cache"]) -> list["_Cache"]:
    """Those that can be read, first of them what holds some."""
    begun, others = list[_Cache](), list[_Cache]()
    for cache in caches:
        with contextlib.suppress(OSError, StorageError):  # rights on the bundle alone; an outage is raised
            (begun if cache.is_begun() else others).append(cache)
    return begun + others


def _writable(caches: Iterable["_Cache"], all_caches: Iterable["_Cache"]) -> "_Cache":
    for cache in caches:
        if cache.is_writable():
            return cache
    names = " or ".join(cache.uri for cache in all_caches)
    raise StorageError(f"converted models are kept in a folder that can be read and written. Received: {names}")


def _as_asked(choice: EngineChoice, console: Console) -> EngineChoice:
    """What was named is taken, but for float32 that is none; what it does to the answers is said."""
    why = why_not(choice)
    if why is not None and choice.precision == "float32":
        raise ConfigError(
            f"{choice.engine} does not compute what Keras does ({why}). Received: engine={choice.engine!r}"
        )
    if choice.precision == "bfloat16" and not _has_bfloat16():
        console.line("this CPU has no bfloat16: OpenVINO computes in float32 on it")
    if why is not None:
        console.line(f"{choice.engine} {choice.precision} was asked for and is taken, although {why}")
    return choice


def _has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _conditions(engine: EngineName, cpus: int) -> dict[str, Any]:
    """Under which a check holds: the packages, and the cores that computed."""
    packages = {"keras": ("keras", "tensorflow"), "openvino": ("openvino",), "onnx": ("onnxruntime",)}[engine]
    sizes = {} if engine == "keras" else {"call_sizes": list(CALL_SIZES)}
    return {**{name: metadata.version(name) for name in packages}, "cpu": _cpu_model(), "cpus": cpus, **sizes}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


class _Cache:
    """The folder of converted models of a bundle."""

    def __init__(self, uri: str, *, cpus: int) -> None:
        self.uri, self._cpus = uri, cpus

    def is_begun(self) -> bool:
        """Whether it holds what all checks begin with."""
        return storage.exists(self._at(REFERENCE_FILE))

    def is_writable(self) -> bool:
        try:
            storage.check_writable(self.uri)
        except (OSError, MnistDistError):
            return False
        return True

    def _at(self, name: str) -> str:
        return storage.join(self.uri, name)

    def folder(self, choice: EngineChoice) -> str:
        """URI of a converted model."""
        return self._at(f"{choice.engine}-int8" if choice.precision == "int8" else choice.engine)

    def has_model(self, choice: EngineChoice) -> bool:
        return storage.exists(storage.join(self.folder(choice), _last_file(choice.engine)))

    def known(self, choice: EngineChoice) -> EngineChoice:
        """The choice with what an earlier check found, where that still holds."""
        uri = None if choice.engine == "keras" else self.folder(choice)
        try:
            facts = dict(json.loads(storage.read_bytes(self._at(f"{choice.name}.json"))))
        except (FileNotFoundError, TypeError, ValueError):
            facts = {}
        holds = facts.pop("conditions", None) == _conditions(choice.engine, self._cpus)
        if not holds or (uri is not None and not self.has_model(choice)):
            facts = {}
        return dataclasses.replace(choice, uri=uri, facts=facts)

    def note(self, choice: EngineChoice) -> None:
        """Keeps what a check found."""
        values = {**choice.facts, "conditions": _conditions(choice.engine, self._cpus)}
        storage.write_bytes(self._at(f"{choice.name}.json"), json.dumps(values, indent=2).encode())

    def reference(self) -> npt.NDArray[np.float32] | None:
        """What Keras said of the images, `float32 [N, K]`, where it was asked."""
        try:
            data = storage.read_bytes(self._at(REFERENCE_FILE))
        except FileNotFoundError:
            return None
        with io.BytesIO(data) as file:
            return np.asarray(np.load(file)["probabilities"])


def _last_file(engine: EngineName) -> str:
    return ONNX_FILE if engine == "onnx" else OPENVINO_FILE


@dataclass(frozen=True)
class _Work:
    """Converting and checking what was not."""

    bundle: Bundle
    cache: _Cache
    scratch: Path
    batch_size: int
    cpus: int
    console: Console
    stop: Stop

    def checked(self, known: list[EngineChoice]) -> list[EngineChoice]:
        """All of them with what their checks found; without, where a check failed and another engine passes."""
        if all(choice.facts for choice in known):
            return known
        names = ", ".join(f"{choice.engine} {choice.precision}" for choice in known if not choice.facts)
        self.console.line(f"converting and checking the model (once per bundle): {names}")
        keras = self._by_keras([choice for choice in known if choice.engine != "keras"])
        found = [keras if choice.engine == "keras" else choice for choice in known]
        failures: list[StepFailed] = []
        for place, choice in enumerate(found):
            if choice.facts:
                continue
            try:
                found[place] = self._checked(choice)
            except StepFailed as failure:
                failures.append(failure)
                self.console.line(f"  {choice.engine} {choice.precision}: left out ({first_line(failure)})")
        others = [choice for choice in found if choice.engine != "keras" and choice.facts]
        if failures and all(why_not(choice) for choice in others):
            raise failures[0]
        return found

    def _by_keras(self, wanted: list[EngineChoice]) -> EngineChoice:
        """Has Keras predict the images and convert what is not there; gives what is known of Keras itself."""
        keras = self.cache.known(EngineChoice())
        engines = sorted({choice.engine for choice in wanted})
        missing = [engine for engine in engines if not self.cache.has_model(EngineChoice(engine=engine))]
        if keras.facts and not missing and self.cache.reference() is not None:
            return keras
        self._step("keras", title="engines: Keras", engines=missing)
        for engine in missing:
            self._publish(EngineChoice(engine=engine))
        storage.write_bytes(self.cache._at(REFERENCE_FILE), (self.scratch / "keras.npz").read_bytes())
        keras = dataclasses.replace(keras, facts=self._facts("keras", agreement=1.0))
        self.cache.note(keras)
        return keras

    def _checked(self, choice: EngineChoice) -> EngineChoice:
        if choice.precision == "int8" and not self.cache.has_model(choice):
            source = self._here(EngineChoice(engine=choice.engine))
            self._step("quantize", title="engines: int8", source=str(source), folder=str(self._scratch_of(choice)))
            self._publish(choice)
        folder = self._here(choice)
        self._step(
            choice.name,
            title=f"engines: {choice.engine} {choice.precision}",
            engine=choice.engine,
            precision=choice.precision,
            folder=str(folder),
        )
        reference = self.cache.reference()
        assert reference is not None, "written before"
        ours = np.load(self.scratch / f"{choice.name}.npz")["probabilities"]
        choice = dataclasses.replace(choice, facts=self._facts(choice.name, **compare(reference, ours, self._labels())))
        self.cache.note(choice)
        why = why_not(choice)
        self.console.line(
            f"  {choice.engine} {choice.precision}: {choice.facts['images_per_s']:,.0f} images/s, same top class for "
            f"{choice.facts['agreement']:.2%}, probabilities differ by at most {choice.facts['max_abs_difference']:.2g}"
            f"{f': not chosen automatically ({why})' if why else ''}"
        )
        return choice

    def _scratch_of(self, choice: EngineChoice) -> Path:
        return self.scratch / self.cache.folder(choice).rpartition("/")[2]

    def _here(self, choice: EngineChoice) -> Path:
        """A local copy of a converted model."""
        folder = self._scratch_of(choice)
        if not folder.exists():
            storage.download_folder(self.cache.folder(choice), folder)
        return folder

    def _publish(self, choice: EngineChoice) -> None:
        if self.cache.has_model(choice):  # another job was faster, and its actors may be reading
            return
        try:
            storage.upload_folder(self._scratch_of(choice), self.cache.folder(choice), last=_last_file(choice.engine))
        except OSError as err:
            if not self.cache.has_model(choice):  # else another job put its own there just now
                raise StorageError(f"{self.cache.uri} cannot be written: {err}") from err

    def _facts(self, step: str, **compared: Any) -> dict[str, Any]:
        source, count = calibration_of(self.bundle)
        speed = json.loads((self.scratch / f"{step}.json").read_text())
        return {"source": source, "images": min(count, COMPARED_IMAGES), **compared, **speed}

    def _labels(self) -> npt.NDArray[np.int64] | None:
        return calibration_labels(self.bundle, most=COMPARED_IMAGES)

    def _step(self, name: str, *, title: str, **task: Any) -> None:
        common = {"name": name, "bundle": str(self.bundle.path), "scratch": str(self.scratch)}
        run_step(
            "mnist_dist.engines.conversion",
            name if name in STEPS else "check",
            {**common, "batch_size": self.batch_size, "cpus": self.cpus, **task},
            title=title,
            log_file=self.scratch / f"{name}.log",
            console=self.console,
            stop=self.stop,
        )


def compare(
    reference: npt.NDArray[np.float32], ours: npt.NDArray[np.float32], labels: npt.NDArray[np.int64] | None
) -> dict[str, Any]:
    """How far an engine's probabilities `[N, K]` are from those of Keras.

    Returns:
        `max_abs_difference`, `agreement` (share of images with the same top class) and `accuracy_loss` (of 1, negative
        where the engine is the better one; None without labels).
    """
    theirs, mine = reference.argmax(axis=1), ours.argmax(axis=1)
    # by counts, since 0.902 - 0.9 is more than 0.002
    loss = None if labels is None else int((theirs == labels).sum() - (mine == labels).sum()) / len(labels)
    return {
        "max_abs_difference": float(np.abs(reference.astype(np.float64) - ours).max()),
        "agreement": float((theirs == mine).mean()),
        "accuracy_loss": loss,
    }


def _check_installed(choice: EngineChoice) -> None:
    needed = (*MODULES[choice.engine], *(("nncf",) if choice.precision == "int8" else ()))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"engine {choice.engine} in {choice.precision} needs {' and '.join(missing)}: "
            f"pip install 'mnist_dist[export]'. Received: engine={choice.engine!r}, precision={choice.precision!r}"
        )


# --- the steps, each in a process of its own -------------------------------------------------------------------------


def _keras_step(task: dict[str, Any], report: Report) -> None:
    """Notes what Keras says of the images, and converts its model."""
    from mnist_dist.engines.engine import hide_gpus

    hide_gpus()  # whose TF32 would differ by more than a conversion does
    bundle, scratch = load_bundle(task["bundle"]), Path(task["scratch"])
    engine = KerasEngine(bundle, batch_size=task["batch_size"], cpus=task["cpus"])
    (speed,) = best_images_per_s([engine], bundle.info.spec)
    _note(task, bundle, engine, report, images_per_s=speed)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # its converter would report its use to Intel
    model = with_features(bundle.model)
    model(np.zeros((1, *bundle.info.spec.shape), np.uint8), training=False)  # an ONNX export wants it called before
    for name in task["engines"]:
        (scratch / name).mkdir()
        model.export(str(scratch / name / _last_file(name)), format=name, verbose=False)


def _check_step(task: dict[str, Any], report: Report) -> None:
    """Notes what an engine says of the images, and how many of them a call should take."""
    bundle = load_bundle(task["bundle"])
    choice = EngineChoice(engine=task["engine"], precision=task["precision"], uri=task["folder"])
    engines = {size: open_engine(choice, bundle, batch_size=size, cpus=task["cpus"]) for size in CALL_SIZES}
    speeds = dict(zip(engines, best_images_per_s(list(engines.values()), bundle.info.spec), strict=True))
    size = smallest_fast(speeds)
    _note(task, bundle, engines[size], report, images_per_s=speeds[size], images_per_call=size)


def smallest_fast(speeds: Mapping[int, float]) -> int:
    """The smallest number of images per call that is as fast as any, by number of images: images/s."""
    return min(size for size, speed in speeds.items() if speed >= AS_FAST * max(speeds.values()))


def _quantize_step(task: dict[str, Any], report: Report) -> None:
    """Makes an int8 model from a float32 one (post-training quantisation by NNCF, from the calibration images)."""
    import nncf
    import openvino

    bundle, target = load_bundle(task["bundle"]), Path(task["folder"])
    images = list(calibration_images(bundle, batch_size=1, most=QUANTIZED_IMAGES))
    model = openvino_core().read_model(Path(task["source"], OPENVINO_FILE))
    quantized = nncf.quantize(model, nncf.Dataset(images), subset_size=len(images))
    target.mkdir()
    openvino.save_model(quantized, target / OPENVINO_FILE, compress_to_fp16=False)
    report(len(images), len(images))


def _note(task: dict[str, Any], bundle: Bundle, engine: Engine, report: Report, **facts: Any) -> None:
    """Writes down what an engine says of the images, and facts."""
    probabilities = predict_calibration(
        bundle,
        lambda pixels: engine(pixels).probabilities,
        batch_size=engine.batch_size,
        most=COMPARED_IMAGES,
        report=report,
        at_once=engine.calls_at_once,
    )
    name = Path(task["scratch"], task["name"])
    np.savez(name.with_name(f"{name.name}.npz"), probabilities=probabilities)
    name.with_name(f"{name.name}.json").write_text(json.dumps(facts))


STEPS = {"keras": _keras_step, "check": _check_step, "quantize": _quantize_step}

if __name__ == "__main__":
    serve(STEPS)
