"""Which engine computes the features of a frozen backbone: chosen once for a whole cache, on the job's own images.

Owns: the candidates, how they are compared, the file that keeps the choice, and opening the chosen one. Does not own:
the cache and its shards (`features`), the runtimes (`engines/formats.py`), or where this runs (`on_ray/data`).

The reference of a backbone of the table is Keras, that of an imported one ONNX Runtime with the bundle's own file. The
reference computes small jobs and whatever nothing else agrees with. Beside the shards of a cache may lie:

```
engine.json   The choice, put there before the first shard. Without it, the reference computes all shards.
openvino/     The converted backbone of the table, until the features are complete.
```
"""

# n = compared images, D = features

import functools
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnist_dist import documents
from mnist_dist.config import EngineName
from mnist_dist.data.records import open_records
from mnist_dist.engines.engine import calls_per_s, hide_gpus, use_cpus
from mnist_dist.engines.formats import FORMATS, Opening, local_folder
from mnist_dist.engines.steps import Report, run_step
from mnist_dist.errors import StepFailed, StorageError, first_line
from mnist_dist.images.pixels import Pixels
from mnist_dist.models.backbones import is_imported
from mnist_dist.models.bundle import load_bundle
from mnist_dist.models.onnx_file import FEATURES, has_cuda, open_session, run_session
from mnist_dist.session import Session
from mnist_dist.store.uris import join
from mnist_dist.training.features import BATCH_SIZE, FeatureCall, FeaturePlan, KerasFeatures

ENGINE_FILE = "engine.json"
MAX_DIFFERENCE: dict[EngineName, float] = {"keras": 1e-4, "onnx": 1e-3}
"""By the reference: the largest norm-relative difference of an image's features. Measured between Keras and OpenVINO:
1e-6 (MobileNetV2). Features stored as float16 differ by up to 5e-4."""
WORTH_PIXELS = 250_000_000  # of all images, at the backbone's input: below, a comparison takes longer than it saves
MIN_SPEEDUP = 1.1  # a smaller one may be chance
COMPARED_IMAGES = 64
CALL_SIZES = (4, 32)
ROUNDS, ROUND_S = 3, 0.4


@dataclass(frozen=True, kw_only=True)
class FeatureCheck:
    """How OpenVINO compares with the reference, on images of the job."""

    reference: EngineName
    images: int
    max_difference: float
    """Of the features of an image, relative to their norm."""
    speedup: float
    """How many times as fast as the reference: by the clock, or by the time of cores, whichever is larger. Where other
    work takes the cores, the clock says more of that work than of the engines."""


@dataclass(frozen=True, kw_only=True)
class FeatureEngine:
    """The engine of a cache; the content of `engine.json`."""

    engine: EngineName
    images_per_call: int = BATCH_SIZE
    check: FeatureCheck | None = None
    """How OpenVINO compares with the reference; None: nothing was compared."""


def reference_engine(plan: FeaturePlan) -> FeatureEngine:
    """The engine that the others are compared with."""
    return FeatureEngine(engine="onnx" if is_imported(plan.model.backbone) else "keras")


def is_worth_comparing(plan: FeaturePlan) -> bool:
    """Whether another engine may be chosen, and saves more time than choosing it takes. In bfloat16, nothing was
    measured to be faster than Keras."""
    height_px, width_px = plan.input_shape[:2]
    is_large = plan.cache.rows * height_px * width_px >= WORTH_PIXELS
    return is_large and plan.precision == "float32" and importlib.util.find_spec("openvino") is not None


def kept_engine(plan: FeaturePlan) -> FeatureEngine | None:
    """The engine that was chosen for these features before; None: none was."""
    try:
        return documents.read(plan.cache.store, join(plan.cache.root, ENGINE_FILE), FeatureEngine)
    except FileNotFoundError:
        return None


def keep_engine(plan: FeaturePlan, chosen: FeatureEngine) -> FeatureEngine:
    """Keeps the choice unless another driver has kept its own; gives the one that counts."""
    uri = join(plan.cache.root, ENGINE_FILE)
    plan.cache.store.create_bytes(uri, documents.encode(chosen))
    return documents.read(plan.cache.store, uri, FeatureEngine)


def delete_converted(plan: FeaturePlan) -> None:
    """Deletes the converted backbone, once the features are complete."""
    plan.cache.store.delete_tree(_converted_uri(plan))


# --- the choice ------------------------------------------------------------------------------------------------------


def choose_engine(plan: FeaturePlan, *, local_dir: Path, cpus: int, session: Session) -> FeatureEngine:
    """Compares the engines on this node, and gives the fastest that agrees with the reference.

    Args:
        plan: the features; their images are decoded.
        local_dir: a folder on the node, for records on S3.
        cpus: cores per engine.
        session: shows progress.

    Raises:
        Interrupted, LockLost: see `Session.watch`.
        MnistDistError: the records or the bundle cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="mnist_dist-features-") as folder:
        scratch, alone = Path(folder), replace(plan, rows=plan.rows[:0])
        _write_sample(plan, scratch, local_dir=local_dir)
        try:
            step = functools.partial(_compare, alone, scratch, cpus)
            chosen = run_step(step, title="features, engines", session=session)
            if chosen.engine == "openvino" and not is_imported(plan.model.backbone):
                file = FORMATS["openvino"].file
                plan.cache.store.upload_folder(scratch / "openvino", _converted_uri(plan), last=file)
        except (StepFailed, StorageError, OSError) as failure:
            session.console.line(f"no other engine for the features: {first_line(failure)}")
            return reference_engine(plan)
    return chosen


def describe(chosen: FeatureEngine) -> str:
    """The choice in a line, for the user."""
    check = chosen.check
    if check is None:
        return f"computed by {chosen.engine}"
    return (
        f"computed by {chosen.engine} (openvino is {check.speedup:.2g} times as fast as {check.reference}, features "
        f"differ by at most {check.max_difference:.2g} of their norm)"
    )


def judge(check: FeatureCheck, reference: FeatureEngine, *, images_per_call: int) -> FeatureEngine:
    """OpenVINO with this call size, if it agrees with the reference and is faster; else the reference."""
    agrees = check.max_difference <= MAX_DIFFERENCE[reference.engine]  # Written so that NaN does not pass.
    if agrees and check.speedup >= MIN_SPEEDUP:
        return FeatureEngine(engine="openvino", images_per_call=images_per_call, check=check)
    return replace(reference, check=check)


def difference(reference: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> float:
    """The largest difference of an image's features, relative to their norm; NaN where one is not finite.

    Args:
        reference: `float32 [n, D]`.
        others: the same of another engine.
    """
    apart = np.linalg.norm(np.subtract(others, reference, dtype=np.float64), axis=1)
    norms = np.linalg.norm(reference.astype(np.float64), axis=1)
    return float((apart / np.maximum(norms, np.finfo(np.float32).tiny)).max())


def _write_sample(plan: FeaturePlan, scratch: Path, *, local_dir: Path) -> None:
    """Writes images of the job, spread evenly, to `images.npy`."""
    records = open_records(plan.records, local_dir=local_dir)
    rows = plan.rows[np.linspace(0, len(plan.rows) - 1, min(COMPARED_IMAGES, len(plan.rows))).astype(np.int64)]
    np.save(scratch / "images.npy", records.pixels[rows])


def _converted_uri(plan: FeaturePlan) -> str:
    return join(plan.cache.root, "openvino")


# --- in a separate process -------------------------------------------------------------------------------------------


def _compare(plan: FeaturePlan, scratch: Path, cpus: int, report: Report) -> FeatureEngine:
    """Computes the sample's features by each engine: OpenVINO if it agrees and is faster, else the reference."""
    images, own = np.load(scratch / "images.npy"), reference_engine(plan)
    if not is_imported(plan.model.backbone):
        hide_gpus()  # Their TF32 differs by more than a conversion does.
    reference = open_feature_engine(plan, own, cpus=cpus)
    expected = _features(reference, images)
    if isinstance(reference, KerasFeatures):
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # no usage reports to Intel
        (scratch / "openvino").mkdir()
        reference.export(scratch / "openvino" / FORMATS["openvino"].file, format=FORMATS["openvino"].keras_name)

    def opened(images_per_call: int) -> FeatureCall:
        engine = replace(own, engine="openvino", images_per_call=images_per_call)
        if is_imported(plan.model.backbone):
            return _open_bundle(plan, engine, cpus=cpus)
        return _open_converted(scratch / "openvino", plan, engine, cpus=cpus)

    others = {call.batch_size: call for call in map(opened, CALL_SIZES)}.values()  # A fixed batch is the only one.
    own_speed, *speeds = _speeds([reference, *others], images)
    speed, fastest = max(zip(speeds, others, strict=True), key=lambda pair: pair[0].per_core_s)
    check = FeatureCheck(
        reference=own.engine,
        images=len(images),
        max_difference=difference(expected, _features(fastest, images)),
        speedup=max(speed.per_s / own_speed.per_s, speed.per_core_s / own_speed.per_core_s),
    )
    return judge(check, own, images_per_call=fastest.batch_size)


def _features(call: FeatureCall, images: Pixels) -> npt.NDArray[np.float32]:
    size = call.batch_size
    return np.concatenate([call(images[start : start + size]) for start in range(0, len(images), size)])


@dataclass(frozen=True)
class _Speed:
    per_s: float
    """Images per second."""
    per_core_s: float
    """Images per second of a core's time."""


def _speeds(calls: Sequence[FeatureCall], images: Pixels) -> list[_Speed]:
    """The speed of each on full batches. They are measured in turn, and the best rounds of each count, since other work
    on the machine slows it down for seconds."""
    best = [_Speed(0.0, 0.0)] * len(calls)
    for _, (index, call) in itertools.product(range(ROUNDS), enumerate(calls)):
        speed = _speed(call, np.resize(images, (call.batch_size, *images.shape[1:])))
        best[index] = _Speed(max(best[index].per_s, speed.per_s), max(best[index].per_core_s, speed.per_core_s))
    return best


def _speed(call: FeatureCall, batch: Pixels) -> _Speed:
    made, began = itertools.count(), time.process_time()

    def counted() -> None:
        call(batch)
        next(made)

    rate = calls_per_s(counted, seconds=ROUND_S, at_once=call.calls_at_once)
    core_s = max(time.process_time() - began, 1e-9)
    return _Speed(per_s=rate * len(batch), per_core_s=next(made) * len(batch) / core_s)


# --- the chosen engine -----------------------------------------------------------------------------------------------


def open_feature_engine(plan: FeaturePlan, chosen: FeatureEngine, *, cpus: int, gpu: bool = False) -> FeatureCall:
    """Loads the engine of a cache.

    Args:
        plan: the features.
        chosen: from `kept_engine`, `keep_engine` or `reference_engine`.
        cpus: cores that it may use.
        gpu: the process has a GPU, which Keras and ONNX Runtime use.

    Raises:
        BundleError, FileNotFoundError: the backbone is not there any more.
        WeightsError: the weights are missing or do not fit.
    """
    if is_imported(plan.model.backbone):
        return _open_bundle(plan, chosen, cpus=cpus, gpu=gpu)
    if chosen.engine == "keras":
        use_cpus(cpus)
        return KerasFeatures(plan)
    with local_folder(_converted_uri(plan)) as folder:
        return _open_converted(folder, plan, chosen, cpus=cpus)


@dataclass(frozen=True)
class _Opened:
    """A file that is open in its runtime, as a `FeatureCall`."""

    call: Callable[[Pixels], npt.NDArray[np.float32]]
    batch_size: int
    calls_at_once: int = 1

    def __call__(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        return self.call(pixels)


def _open_bundle(plan: FeaturePlan, engine: FeatureEngine, *, cpus: int, gpu: bool = False) -> FeatureCall:
    """The features of an imported bundle."""
    bundle = load_bundle(plan.model.backbone)
    size = bundle.fixed_batch or engine.images_per_call
    if engine.engine == "openvino":
        outputs = len(bundle.declared.outputs)  # the features are the last one
        return _open_openvino(bundle.model_path, outputs=outputs, shape=(size, *bundle.info.spec.shape), cpus=cpus)
    session = open_session(bundle.model_path, cpus=cpus, cuda=gpu and has_cuda())
    return _Opened(lambda pixels: np.asarray(run_session(session, pixels, [FEATURES])[0], np.float32), size)


def _open_converted(folder: Path, plan: FeaturePlan, engine: FeatureEngine, *, cpus: int) -> FeatureCall:
    """A converted backbone of the table."""
    shape = (engine.images_per_call, *plan.records.spec.shape)
    return _open_openvino(folder / FORMATS["openvino"].file, outputs=1, shape=shape, cpus=cpus)


def _open_openvino(file: Path, *, outputs: int, shape: tuple[int, ...], cpus: int) -> FeatureCall:
    opening = Opening(shape=shape, outputs=outputs, precision="float32", cpus=cpus)
    runtime = FORMATS["openvino"].open(file, opening)
    return _Opened(
        lambda pixels: np.asarray(runtime.call(pixels)[outputs - 1], np.float32), shape[0], runtime.calls_at_once
    )
