"""Which engine runs a bundle's model in a scoring job: converted once, checked on the bundle's own images.

Owns: the folder of converted models and check results, which engines pass, and which one is chosen. Does not own: how
a model is converted and checked (`conversion`), or how an engine runs (`engine`, `formats`).

```
<bundle>.engines/<16 digits of the model id>/   beside the bundle, or <output>/_engines/... where that is not writable
  openvino/  openvino-int8/  onnx/   converted models, each moved into place as a whole
  openvino-bfloat16.json ...         the check result of an engine; that of the own one, such as keras-float32.json, is
                                     written first
```

The bundle's own engine runs its own file: Keras, or ONNX Runtime where the model is an ONNX file. The others have to
agree with it.

Two jobs may convert the same bundle at the same time: both write the same files.
"""

import contextlib
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mnist_dist import documents, processor
from mnist_dist.config import EngineName, EnginePrecision
from mnist_dist.console import Console
from mnist_dist.engines.calibration import Probabilities, calibration_of, unseen_by_ranges
from mnist_dist.engines.conversion import Check, Conversion, compare, versions_of
from mnist_dist.engines.engine import Engine, KerasEngine
from mnist_dist.engines.formats import FORMATS, ConvertedEngine, check_installed, local_folder
from mnist_dist.environment import KERAS_BACKENDS, check_keras
from mnist_dist.errors import ConfigError, DataError, MnistDistError, StepFailed, StorageError, first_line
from mnist_dist.models.bundle import Bundle
from mnist_dist.models.onnx_file import has_cuda
from mnist_dist.score_config import EngineConfig
from mnist_dist.session import Session
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

MAX_DIFFERENCE = 1e-4  # largest difference of a probability in float32
MIN_AGREEMENT = 0.995  # smallest share of images with the same top class, of a reduced precision that `auto` takes
MAX_LOSS = 0.002  # ... and its largest loss of accuracy
FEW_IMAGES = 1_000  # ... and with fewer images than this, no top class may differ
NAMED_POINTS = 1.0  # largest loss of accuracy of a reduced precision that is asked for by name, points
NAMED_DIFFERING = 2.0  # ... and its largest share of images with another top class, %
ROUNDING = 1e-9  # of a percentage that was computed from counts
FLOAT32_SHARES = (1 / 6, 1 / 2)  # of the convolutions, tried where int8 throughout loses more (docs/measurements.md)
WORTH_FLOAT32 = 0.005  # ... each has to agree for this much more of the images, since it is slower
NO_IMAGES = "the bundle has no calibration images to compare on"
CALL_SIZES = (4, 32)  # images per call to try: small calls stay in a core's cache, large ones have less overhead
OWN_NAMES = {"keras": "Keras", "onnx": "ONNX Runtime"}  # of the engines that run a bundle's own file
NO_CUDA = (
    "ONNX Runtime scores on the CPU, since it has no CUDA provider: install onnxruntime-gpu in place of onnxruntime "
    "(--gpus-per-actor 0 makes use of all CPUs)"
)
WORTH_A_LOAD = 1.25  # Keras must be this many times as fast: loading TensorFlow takes seconds and a GB of memory
WORTH_ONE_CALL = (
    1.1  # ... and ONNX Runtime: its one call on all cores leaves decoding less room than OpenVINO's streams
)
_WORTH = {"keras": WORTH_A_LOAD, "onnx": WORTH_ONE_CALL}


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """An engine and the result of its check."""

    engine: EngineName = "keras"
    precision: EnginePrecision = "float32"
    uri: str | None = None
    """Folder of the converted model; None: the bundle's own file runs."""
    check: Check | None = None
    """None: it was not checked."""
    own: EngineName = "keras"
    """The engine that runs the bundle's own file, in float32; the others are compared with it."""

    @property
    def is_own(self) -> bool:
        """Whether it runs the bundle's own file."""
        return (self.engine, self.precision) == (self.own, "float32")

    @property
    def own_name(self) -> str:
        """What the bundle's own engine is called in texts."""
        return OWN_NAMES[self.own]

    @property
    def name(self) -> str:
        kept = self.check.float32_convolutions if self.check else 0
        but = f" with {kept} convolution{'s' if kept > 1 else ''} in float32" if kept else ""
        return f"{self.engine} {self.precision}{but}"

    def __str__(self) -> str:
        if self.check is None or self.is_own:
            return self.name
        agreement = f"{self.check.agreement:.2%} of {self.check.images:,} images"
        return f"{self.name} (same {self.check.judged_by} as {self.own_name} for {agreement})"

    def batch_size(self, largest: int) -> int:
        """Images per call, at most `largest`; Keras takes any number."""
        return largest if self.check is None or self.engine == "keras" else min(largest, self.check.images_per_call)

    def noted(self) -> dict[str, Any]:
        """The engine's keys in a plan and a summary."""
        return {"engine": self.engine, "precision": self.precision, "engine_check": msgspec.to_builtins(self.check)}


def own_engine(bundle: Bundle) -> EngineChoice:
    """The engine that runs the bundle's own file."""
    name: EngineName = "onnx" if bundle.is_onnx else "keras"
    return EngineChoice(engine=name, own=name)


def open_engine(
    choice: EngineChoice,
    bundle: Bundle,
    *,
    batch_size: int,
    embeddings: bool = False,
    cpus: int | None = None,
    gpu: bool = False,
) -> Engine:
    """Loads an engine and calls it once, since the first call is slow.

    Args:
        choice: the engine to load.
        bundle: an opened bundle.
        batch_size: largest number of images per call; a model with a fixed batch takes its own.
        embeddings: also return the features before the head.
        cpus: cores that a call may use; None: all.
        gpu: run on the process' GPU if the engine can: Keras, and ONNX Runtime if it has its CUDA provider.
    """
    size = choice.batch_size(batch_size)
    if choice.uri is None and not bundle.is_onnx:
        check_keras(KERAS_BACKENDS)
        engine = KerasEngine(bundle, batch_size=size, embeddings=embeddings, cpus=cpus)
        engine(np.zeros((1, *bundle.info.spec.shape), np.uint8))
        return engine
    with local_folder(choice.uri or str(bundle.path)) as folder:
        return ConvertedEngine(
            folder,
            format=choice.engine,
            spec=bundle.info.spec,
            batch_size=size,
            precision=choice.precision,
            embeddings=embeddings,
            cpus=cpus or processor.usable_cpus(),
            cuda=gpu and choice.engine == "onnx" and has_cuda(),
        )


# --- which engines are allowed, and which is chosen ------------------------------------------------------------------


def candidates(
    requested: EngineConfig,
    *,
    gpu: bool,
    has_images: bool,
    has_bfloat16: bool,
    own: EngineChoice = EngineChoice(),  # frozen
) -> list[EngineChoice]:
    """The engines that fit the request.

    Args:
        requested: the engine flags of the job.
        gpu: the model runs on GPUs.
        has_images: the bundle has calibration images.
        has_bfloat16: the CPU computes in bfloat16; on other CPUs OpenVINO computes in float32 instead.
        own: the engine that runs the bundle's own file.

    Raises:
        ConfigError: a CPU engine was requested on GPUs, or Keras for an ONNX model.
    """
    if requested.engine == "keras" and own.engine != "keras":
        raise ConfigError(
            "the model of this bundle is an ONNX file: the engine must be onnx or openvino. Received: engine='keras'"
        )
    if gpu:
        if requested.engine not in ("auto", own.engine) or requested.precision not in ("auto", "float32"):
            raise ConfigError(
                f"on GPUs the engine must be {own.engine} in float32 (--gpus-per-actor 0 scores on CPUs). "
                f"Received: engine={requested.engine!r}, precision={requested.precision!r}"
            )
        return [own]
    pairs: list[tuple[EngineName, EnginePrecision]] = [(own.engine, "float32"), ("openvino", "float32")]
    if requested.precision == "bfloat16" or (has_images and has_bfloat16):
        pairs.append(("openvino", "bfloat16"))
    if requested.precision == "int8":
        pairs.append(("openvino", "int8"))
    if requested.engine == "onnx" != own.engine:
        pairs.append(("onnx", "float32"))
    return [
        EngineChoice(engine=engine, precision=precision, own=own.engine)
        for engine, precision in pairs
        if requested.engine in ("auto", engine)
        and (requested.precision == precision or (requested.precision == "auto" and precision != "int8"))
    ]


def why_not(choice: EngineChoice) -> str | None:
    """Why `auto` must not choose an engine; None: it agrees with the own one in float32 well enough."""
    check = choice.check
    if choice.is_own:
        return None
    if check is None:
        return "it was not checked"
    if choice.precision == "float32":
        # Written so that NaN does not pass.
        is_same = check.max_abs_difference <= MAX_DIFFERENCE
        return None if is_same else f"a probability differs by {check.max_abs_difference:.2g}"
    if check.source != "calibration":
        return NO_IMAGES
    if math.isnan(check.max_abs_difference):
        return "a probability is NaN"
    if check.images < FEW_IMAGES:
        return None if check.agreement == 1 else _differing(check, "few images")
    if not check.agreement >= MIN_AGREEMENT:
        return _differing(check)
    loss = check.accuracy_loss
    return None if loss is None or loss <= MAX_LOSS else f"accuracy is {100 * loss:.2f} points lower"


def why_refused(choice: EngineChoice, *, accept_points: float | None = None) -> str | None:
    """Why a reduced precision that was asked for by name must not be used; None: it loses no more than is allowed.

    Args:
        choice: a checked engine.
        accept_points: the accepted loss of accuracy, in points; without labels, the accepted share of images whose
            predicted classes differ, %. None: `NAMED_POINTS` and `NAMED_DIFFERING`.
    """
    check = choice.check
    assert check is not None
    if math.isnan(check.max_abs_difference):
        return "a probability is NaN"
    if accept_points is None and check.source != "calibration":
        return NO_IMAGES
    differing, points = 100 * (1 - check.agreement), check.lost_points
    if accept_points is None:
        is_allowed = (points or 0) <= NAMED_POINTS + ROUNDING and differing <= NAMED_DIFFERING + ROUNDING
    else:
        is_allowed = (differing if points is None else points) <= accept_points + ROUNDING
    return None if is_allowed else _lost(check)


def _lost(check: Check) -> str:
    images = f"{check.images:,} {'calibration' if check.source == 'calibration' else 'random'} images"
    differing = _differing(check, images)
    return (
        differing if check.lost_points is None else f"{differing} and accuracy is {check.lost_points:.2f} points lower"
    )


def _differing(check: Check, images: str = "images") -> str:
    verb = "differ" if check.multi_label else "differs"
    return f"the {check.judged_by} of {1 - check.agreement:.2%} of the {images} {verb}"


def fastest(checked: Iterable[EngineChoice], *, own: EngineChoice = EngineChoice()) -> EngineChoice:
    """The fastest engine that passes its check; the own one where none does. OpenVINO is preferred."""
    speeds = {
        choice: choice.check.images_per_s / _WORTH.get(choice.engine, 1.0)
        for choice in checked
        if choice.check is not None and why_not(choice) is None
    }
    return max(speeds, key=speeds.__getitem__, default=own)


# --- on the driver ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """What a job needs of its engine."""

    requested: EngineConfig
    """The engine flags of the job."""
    places: tuple[str, ...]
    """URIs where converted models may be kept. The first writable one is used; those that already hold some come
    first."""
    gpu: bool
    """The model runs on GPUs."""
    batch_size: int
    """Images per call."""
    cpus: int
    """Cores per engine."""
    worth_it: bool = True
    """The job is large enough to convert and check engines for; if not, `auto` uses only what is ready."""


def prepare_engine(bundle: Bundle, request: EngineRequest, *, session: Session) -> EngineChoice:
    """The engine for a job: the requested one, or the fastest that passes; converted and checked if necessary.

    Raises:
        ConfigError: the requested engine is not supported here, is not installed, or does not agree with the bundle's
            own one.
        StepFailed: the conversion or check of a requested engine failed.
        StorageError: there is no place to keep a requested engine.
        Interrupted, LockLost: see `Session.watch`.
    """
    requested, gpu, own = request.requested, request.gpu, own_engine(bundle)
    has_images = not gpu and requested.engine != own.engine and calibration_of(bundle)[0] == "calibration"
    fitting = candidates(requested, gpu=gpu, has_images=has_images, has_bfloat16=processor.has_bfloat16(), own=own)
    is_explicit = requested.engine != "auto" or len(fitting) == 1
    if all(choice.is_own for choice in fitting):
        if gpu and own.engine == "onnx" and not has_cuda():
            session.console.line(NO_CUDA)
        return own
    for choice in fitting:
        check_installed(f"engine {choice.engine} in {choice.precision}", packages_of(choice))
    all_caches = [_Cache(join(place, bundle.info.model_id[:16]), request.cpus, own) for place in request.places]
    caches = _readable(all_caches)
    known = _known(caches[0], fitting, requested) if caches else fitting
    if not all(choice.check for choice in known) and (is_explicit or request.worth_it):
        try:
            cache = _writable(caches, all_caches)
            known = _checked(bundle, request, cache, _known(cache, fitting, requested), session=session)
        except (StepFailed, StorageError) as failure:
            if is_explicit:
                raise
            session.console.line(f"could not convert the model, {own.own_name} runs it: {first_line(failure)}")
            return own
    checked = [choice for choice in known if choice.check]
    if is_explicit and (len(checked) == 1 or all(why_not(choice) for choice in checked)):
        return _as_requested(checked[0], requested, session.console)
    return fastest(checked, own=own) if any(not choice.is_own for choice in checked) else own


def _known(cache: "_Cache", fitting: Iterable[EngineChoice], requested: EngineConfig) -> list[EngineChoice]:
    """The engines with what is kept of their checks; for `auto` also int8, if a job that asked for it checked it."""
    known = [cache.known(choice) for choice in fitting]
    if requested.precision != "auto" or requested.engine not in ("auto", "openvino"):
        return known
    int8 = cache.known(EngineChoice(engine="openvino", precision="int8", own=cache.own.engine))
    return [*known, int8] if int8.check else known


def packages_of(choice: EngineChoice) -> tuple[str, ...]:
    """The packages that run the engine and make its files."""
    if choice.is_own:
        return ("keras", "tensorflow") if choice.engine == "keras" else ("onnxruntime",)
    packages = FORMATS[choice.engine].packages
    return (*packages, "nncf") if choice.precision == "int8" else packages


def _readable(caches: Iterable["_Cache"]) -> list["_Cache"]:
    """The readable caches, those with check results first."""
    filled, empty = list[_Cache](), list[_Cache]()
    for cache in caches:
        with contextlib.suppress(OSError, StorageError):  # no rights beside the bundle; an outage raises
            (filled if cache.has_checks() else empty).append(cache)
    return filled + empty


def _writable(caches: Iterable["_Cache"], all_caches: Iterable["_Cache"]) -> "_Cache":
    for cache in caches:
        with contextlib.suppress(OSError, MnistDistError):
            ANYWHERE.check_writable(cache.uri)
            return cache
    names = " or ".join(cache.uri for cache in all_caches)
    raise StorageError(f"converted models need a folder that can be read and written. Received: {names}")


def _as_requested(choice: EngineChoice, requested: EngineConfig, console: Console) -> EngineChoice:
    """The requested engine, with a note where `auto` would not take it; raises ConfigError if it loses too much."""
    why = why_not(choice)
    if why is not None and (choice.precision == "float32" or requested.precision == "auto"):
        raise ConfigError(
            f"{choice.engine} does not agree with {choice.own_name} ({why}). Received: engine={choice.engine!r}"
        )
    if choice.precision == "bfloat16" and not processor.has_bfloat16():
        console.line("this CPU has no bfloat16: OpenVINO computes in float32 instead")
    if choice.precision != "float32":
        _check_loss(choice, requested)
    if why is not None:
        console.line(f"using {choice.name} as requested, although {why}")
    return choice


def _check_loss(choice: EngineChoice, requested: EngineConfig) -> None:
    """Raises ConfigError if a precision that was asked for by name loses more than is allowed."""
    accepted, check = requested.accept_accuracy_loss, choice.check
    why = why_refused(choice, accept_points=accepted)
    if why is None or check is None:
        return
    lost = 100 * (1 - check.agreement) if check.lost_points is None else check.lost_points
    limits = f"{NAMED_POINTS:g} point of accuracy and {NAMED_DIFFERING:g}% of the images are allowed"
    allowed = limits if accepted is None else f"--accept-accuracy-loss {accepted:g} allows less"
    enough = f"--accept-accuracy-loss {max(0, math.ceil(10 * lost - ROUNDING) / 10):g}"
    remedy = (
        f"--precision auto takes the fastest that agrees, --precision float32 loses nothing, {enough} takes it as it is"
    )
    if why == NO_IMAGES:
        allowed = f"by random pixels, {_lost(check)}"
        remedy += "; import the model again with --calibration FOLDER, or train it with --calibration, to measure it"
    raise ConfigError(
        f"{choice.name} does not predict what {choice.own_name} predicts: {why}; {allowed}. {remedy}. "
        f"Received: precision={requested.precision!r}"
    )


def _checked(
    bundle: Bundle, request: EngineRequest, cache: "_Cache", known: list[EngineChoice], *, session: Session
) -> list[EngineChoice]:
    """The engines with their check results, without those whose check failed while another engine passes."""
    missing = [choice for choice in known if not choice.check]
    if not missing:
        return known
    names = ", ".join(choice.name for choice in missing)
    session.console.line(f"converting and checking the model (once per bundle): {names}")
    if not bundle.is_onnx:
        check_keras(KERAS_BACKENDS)
    with tempfile.TemporaryDirectory(prefix="mnist_dist-engines-") as scratch:
        conversion = Conversion(
            bundle=bundle,
            scratch=Path(scratch),
            batch_size=request.batch_size,
            cpus=request.cpus,
            session=session,
        )
        names_of_files = sorted({choice.engine for choice in known if not choice.is_own})
        sources = [EngineChoice(engine=name, own=cache.own.engine) for name in names_of_files]
        answers = conversion.by_own(
            [source.engine for source in sources if not cache.has_model(source)], features=True, call_sizes=CALL_SIZES
        )
        for source in sources:
            cache.publish(source, Path(scratch, source.engine))
        own = cache.keep(cache.own, compare(answers.probabilities, answers, multi_label=bundle.info.multi_label))
        checked, failures = list[EngineChoice](), list[StepFailed]()
        for choice in known:
            try:
                if not choice.is_own and not choice.check:
                    choice = _check(choice, conversion, cache, reference=answers.probabilities)
                checked.append(own if choice.is_own else choice)
            except StepFailed as failure:
                failures.append(failure)
                session.console.line(f"  {choice.name}: left out ({first_line(failure)})")
    if failures and all(why_not(choice) for choice in checked if not choice.is_own):
        raise failures[0]
    return checked


def _check(choice: EngineChoice, conversion: Conversion, cache: "_Cache", *, reference: Probabilities) -> EngineChoice:
    """Converts (int8) and checks an engine, stores the result and returns the choice with it."""
    if choice.precision == "int8" and not cache.has_model(choice):
        made = _best_int8(choice, conversion, cache, reference=reference)
        cache.publish(choice, Path(made.uri or ""))
    else:
        made = _compared(replace(choice, uri=cache.folder(choice)), conversion, reference=reference)
    assert made.check is not None
    return cache.keep(choice, made.check)


def _best_int8(
    choice: EngineChoice, conversion: Conversion, cache: "_Cache", *, reference: Probabilities
) -> EngineChoice:
    """Quantizes a model, in a scratch folder: all of it, and where `auto` must not take that, all but its first
    convolutions. Those are what int8 fails at in networks whose weights were not trained for the images.

    Source: Sheng et al., A Quantization-Friendly Separable Convolution for MobileNets, arXiv:1803.08607.

    Returns:
        The first that `auto` may take; where there is none, the one that agrees best, and clearly better than one with
        less in float32. More of it is tried only as long as the result would be refused by name.
    """
    source, made = cache.folder(replace(choice, precision="float32")), dict[EngineChoice, float]()
    for number, share in enumerate((0.0, *FLOAT32_SHARES)):
        folder = conversion.scratch / f"int8-{number}"
        try:
            kept = conversion.quantize(source, folder, float32_share=share)
            if share and not kept:
                break
            found = _compared(replace(choice, uri=str(folder)), conversion, reference=reference)
        except StepFailed as failure:
            if not made:
                raise
            conversion.session.console.line(f"  {choice.name} with layers in float32: left out ({first_line(failure)})")
            break
        assert found.check is not None
        if why_not(found) in (None, NO_IMAGES):
            return found
        made[found] = found.check.agreement - number * WORTH_FLOAT32
        if share and why_refused(found) is None:
            break
    return max(made, key=made.__getitem__)


def _compared(choice: EngineChoice, conversion: Conversion, *, reference: Probabilities) -> EngineChoice:
    """Runs the model in the folder `uri` of a choice, shows how it compares, and returns the choice with the result."""
    uri, bundle = choice.uri or "", conversion.bundle
    answers = conversion.by_file(uri, choice.engine, precision=choice.precision, call_sizes=CALL_SIZES)
    judged = unseen_by_ranges(bundle) if choice.precision == "int8" else None
    choice = replace(choice, check=compare(reference, answers, multi_label=bundle.info.multi_label, judged=judged))
    check, why = choice.check, why_not(choice)
    assert check is not None
    conversion.session.console.line(
        f"  {choice.name}: {check.images_per_s:,.0f} images/s, same top class for {check.agreement:.2%}, probabilities "
        f"differ by at most {check.max_abs_difference:.2g}{f': not chosen automatically ({why})' if why else ''}"
    )
    return choice


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A check on disk and what it is valid for: these package versions, this CPU and this number of cores."""

    check: Check
    versions: dict[str, str]
    cpu: str
    cpus: int
    call_sizes: tuple[int, ...] = CALL_SIZES


@dataclass(frozen=True)
class _Cache:
    """The folder of a bundle's converted models, and the check results for engines with this many cores."""

    uri: str
    cpus: int
    own: EngineChoice

    def has_checks(self) -> bool:
        return ANYWHERE.exists(self._check_uri(self.own))

    def folder(self, choice: EngineChoice) -> str:
        """URI of a converted model."""
        return join(self.uri, f"{choice.engine}-int8" if choice.precision == "int8" else choice.engine)

    def has_model(self, choice: EngineChoice) -> bool:
        return ANYWHERE.exists(join(self.folder(choice), FORMATS[choice.engine].file))

    def known(self, choice: EngineChoice) -> EngineChoice:
        """The choice with the result of an earlier check, if that is still valid."""
        uri = None if choice.is_own else self.folder(choice)
        try:
            kept = documents.read(ANYWHERE, self._check_uri(choice), _Kept)
        except (FileNotFoundError, DataError):
            return replace(choice, uri=uri)
        is_valid = kept == self._kept(choice, kept.check) and (uri is None or self.has_model(choice))
        return replace(choice, uri=uri, check=kept.check if is_valid else None)

    def keep(self, choice: EngineChoice, check: Check) -> EngineChoice:
        """Stores a check result and returns the choice with it."""
        documents.write(ANYWHERE, self._check_uri(choice), self._kept(choice, check))
        return replace(choice, check=check)

    def publish(self, choice: EngineChoice, folder: Path) -> None:
        """Uploads a converted model unless one is there already: actors of another job may be reading that one."""
        if self.has_model(choice):
            return
        try:
            ANYWHERE.upload_folder(folder, self.folder(choice), last=FORMATS[choice.engine].file)
        except OSError as err:
            if not self.has_model(choice):  # Otherwise another job has just published its own.
                raise StorageError(f"{self.uri} cannot be written: {err}") from err

    def _check_uri(self, choice: EngineChoice) -> str:
        return join(self.uri, f"{choice.engine}-{choice.precision}.json")

    def _kept(self, choice: EngineChoice, check: Check) -> _Kept:
        return _Kept(check=check, versions=versions_of(packages_of(choice)), cpu=processor.name(), cpus=self.cpus)
