"""Which engine runs a bundle's model in a scoring job: converted once, checked on the bundle's own images.

Owns: the folder of converted models and of what the checks found, who passes, and who is taken. Does not own: how a
model is converted and checked (`conversion`), or how an engine runs (`engine`, `formats`).

```
<bundle>.engines/<model id>/      beside the bundle; where that cannot be written, <output>/_engines/<model id>/
  openvino/  openvino-int8/  onnx/   converted models, each put in place as a whole
  openvino-bfloat16.json ...         what the check of an engine found; keras-float32.json is written first
```

Two jobs may convert the same bundle at once: what both write is the same.
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
from mnist_dist.config import EngineConfig, EngineName, EnginePrecision
from mnist_dist.console import Console
from mnist_dist.engines.calibration import Probabilities, calibration_of
from mnist_dist.engines.conversion import Check, Conversion, compare, versions_of
from mnist_dist.engines.engine import Engine, KerasEngine
from mnist_dist.engines.formats import FORMATS, ConvertedEngine, check_installed, local_folder
from mnist_dist.errors import ConfigError, DataError, MnistDistError, StepFailed, StorageError, first_line
from mnist_dist.models.bundle import Bundle
from mnist_dist.session import Session
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import join

MAX_DIFFERENCE = 1e-4  # of a probability, in float32
MIN_AGREEMENT = 0.995  # of the top class, in bfloat16, and
MAX_LOSS = 0.002  # of accuracy; where there are few images, none may differ
FEW_IMAGES = 1_000
CALL_SIZES = (4, 32)  # images per call that are tried: small calls stay in a core's cache, large ones cost less each
WORTH_A_LOAD = 1.25  # Keras must be so many times as fast: loading TensorFlow takes seconds and a GB of memory


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """An engine, and what its check found."""

    engine: EngineName = "keras"
    precision: EnginePrecision = "float32"
    uri: str | None = None
    """Folder of the converted model; None: the bundle's own file is what runs."""
    check: Check | None = None
    """None: it was not checked."""

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}"

    def __str__(self) -> str:
        if self.check is None or self.engine == "keras":
            return self.name
        return f"{self.name} (same top class as Keras for {self.check.agreement:.2%})"

    def batch_size(self, largest: int) -> int:
        """Images per call, where up to so many may be taken; Keras takes any."""
        return largest if self.check is None or self.engine == "keras" else min(largest, self.check.images_per_call)

    def noted(self) -> dict[str, Any]:
        """What a plan and a summary say of it."""
        return {"engine": self.engine, "precision": self.precision, "engine_check": msgspec.to_builtins(self.check)}


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
    size = choice.batch_size(batch_size)
    if choice.uri is None:
        engine = KerasEngine(bundle, batch_size=size, embeddings=embeddings, cpus=cpus)
        engine(np.zeros((1, *bundle.info.spec.shape), np.uint8))
        return engine
    with local_folder(choice.uri) as folder:
        return ConvertedEngine(
            folder,
            format=choice.engine,
            spec=bundle.info.spec,
            batch_size=size,
            precision=choice.precision,
            embeddings=embeddings,
            cpus=cpus or processor.usable_cpus(),
        )


# --- what is asked for, and what may be taken ------------------------------------------------------------------------


def candidates(requested: EngineConfig, *, gpu: bool, has_images: bool, has_bfloat16: bool) -> list[EngineChoice]:
    """The engines that fit what was asked for; a single one where that was named.

    Args:
        requested: by the person.
        gpu: the model runs on GPUs.
        has_images: the bundle has calibration images.
        has_bfloat16: the CPU computes in it; others only pretend to.

    Raises:
        ConfigError: an engine for CPUs was asked for on GPUs.
    """
    if gpu:
        if requested.engine in ("openvino", "onnx") or requested.precision not in ("auto", "float32"):
            raise ConfigError(
                "on GPUs the engine is keras, in float32 (or --gpus-per-actor 0). "
                f"Received: engine={requested.engine!r}, precision={requested.precision!r}"
            )
        return [EngineChoice()]
    pairs: list[tuple[EngineName, EnginePrecision]] = [("keras", "float32"), ("openvino", "float32")]
    if requested.precision == "bfloat16" or (has_images and has_bfloat16):
        pairs.append(("openvino", "bfloat16"))
    if requested.precision == "int8":
        pairs.append(("openvino", "int8"))
    if requested.engine == "onnx":
        pairs.append(("onnx", "float32"))
    return [
        EngineChoice(engine=engine, precision=precision)
        for engine, precision in pairs
        if requested.engine in ("auto", engine)
        and (requested.precision == precision or (requested.precision == "auto" and precision != "int8"))
    ]


def why_not(choice: EngineChoice) -> str | None:
    """Why an engine must not be taken unasked; None: it agrees with Keras in float32 as its precision has to."""
    check = choice.check
    if choice.engine == "keras":
        return None
    if check is None:
        return "it was not checked"
    if choice.precision == "float32":
        # written so that what is no number does not pass
        is_same = check.max_abs_difference <= MAX_DIFFERENCE
        return None if is_same else f"a probability differs by {check.max_abs_difference:.2g}"
    if check.source != "calibration":
        return "the bundle has no calibration images to compare on"
    if math.isnan(check.max_abs_difference):
        return "a probability is no number"
    if check.images < FEW_IMAGES:
        return None if check.agreement == 1 else f"top class of {1 - check.agreement:.2%} of few images differs"
    if not check.agreement >= MIN_AGREEMENT:
        return f"the top class of {1 - check.agreement:.2%} of the images differs"
    loss = check.accuracy_loss
    return None if loss is None or loss <= MAX_LOSS else f"accuracy is {100 * loss:.2f} points lower"


def fastest(checked: Iterable[EngineChoice]) -> EngineChoice:
    """The fastest of those that pass; Keras where none does, and where it is clearly faster."""
    speeds = {
        choice: choice.check.images_per_s / (WORTH_A_LOAD if choice.engine == "keras" else 1.0)
        for choice in checked
        if choice.check is not None and choice.precision != "int8" and why_not(choice) is None
    }
    return max(speeds, key=speeds.__getitem__, default=EngineChoice())


# --- the driver's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """What a job wants of its engine."""

    requested: EngineConfig
    """By the person."""
    places: tuple[str, ...]
    """URIs where converted models may be kept: the first one that can be written is taken, one that holds some before
    others."""
    gpu: bool
    """The model runs on GPUs."""
    batch_size: int
    """Images per call."""
    cpus: int
    """Cores of an engine."""
    worth_it: bool = True
    """The job is large enough to convert and check for; else what is ready is taken where nothing was named."""


def prepare_engine(bundle: Bundle, request: EngineRequest, *, session: Session) -> EngineChoice:
    """The engine for a job: what was asked for, or the fastest that passes; converted and checked where it was not.

    Raises:
        ConfigError: what was asked for does not go, or is not installed, or does not compute what Keras does, or there
            is no place to keep it.
        StepFailed: a conversion or a check of an engine that was named failed.
        Interrupted, Locked: see `Session.watch`.
    """
    requested, gpu = request.requested, request.gpu
    has_images = not gpu and requested.engine != "keras" and calibration_of(bundle)[0] == "calibration"
    fitting = candidates(requested, gpu=gpu, has_images=has_images, has_bfloat16=processor.has_bfloat16())
    named = requested.engine != "auto" or len(fitting) == 1
    if all(choice.engine == "keras" for choice in fitting):
        return EngineChoice()
    for choice in fitting:
        check_installed(f"engine {choice.engine} in {choice.precision}", _packages(choice))
    all_caches = [_Cache(join(place, bundle.info.model_id[:16]), request.cpus) for place in request.places]
    caches = _readable(all_caches)
    known = [caches[0].known(choice) for choice in fitting] if caches else fitting
    if not all(choice.check for choice in known) and (named or request.worth_it):
        try:
            cache = _writable(caches, all_caches)
            known = _checked(bundle, request, cache, [cache.known(choice) for choice in fitting], session=session)
        except (StepFailed, StorageError) as failure:
            if named:
                raise
            session.console.line(f"keras runs the model, which could not be converted: {first_line(failure)}")
            return EngineChoice()
    checked = [choice for choice in known if choice.check]
    if named and (len(checked) == 1 or all(why_not(choice) for choice in checked)):
        return _as_requested(checked[0], session.console)
    return fastest(checked) if any(choice.engine != "keras" for choice in checked) else EngineChoice()


def _packages(choice: EngineChoice) -> tuple[str, ...]:
    """What it runs on, and is made with."""
    packages = ("keras", "tensorflow") if choice.engine == "keras" else FORMATS[choice.engine].packages
    return (*packages, "nncf") if choice.precision == "int8" else packages


def _readable(caches: Iterable["_Cache"]) -> list["_Cache"]:
    """Those that can be read, first of them what holds some."""
    begun, others = list[_Cache](), list[_Cache]()
    for cache in caches:
        with contextlib.suppress(OSError, StorageError):  # rights on the bundle alone; an outage is raised
            (begun if cache.is_begun() else others).append(cache)
    return begun + others


def _writable(caches: Iterable["_Cache"], all_caches: Iterable["_Cache"]) -> "_Cache":
    for cache in caches:
        with contextlib.suppress(OSError, MnistDistError):
            ANYWHERE.check_writable(cache.uri)
            return cache
    names = " or ".join(cache.uri for cache in all_caches)
    raise StorageError(f"converted models are kept in a folder that can be read and written. Received: {names}")


def _as_requested(choice: EngineChoice, console: Console) -> EngineChoice:
    """What was named is taken, but for float32 that is none; what it does to the answers is said."""
    why = why_not(choice)
    if why is not None and choice.precision == "float32":
        raise ConfigError(
            f"{choice.engine} does not compute what Keras does ({why}). Received: engine={choice.engine!r}"
        )
    if choice.precision == "bfloat16" and not processor.has_bfloat16():
        console.line("this CPU has no bfloat16: OpenVINO computes in float32 on it")
    if why is not None:
        console.line(f"{choice.name} was asked for and is taken, although {why}")
    return choice


def _checked(
    bundle: Bundle, request: EngineRequest, cache: "_Cache", known: list[EngineChoice], *, session: Session
) -> list[EngineChoice]:
    """All of them with what their checks found; without those whose check failed, where another engine passes."""
    missing = [choice for choice in known if not choice.check]
    if not missing:
        return known
    names = ", ".join(choice.name for choice in missing)
    session.console.line(f"converting and checking the model (once per bundle): {names}")
    with tempfile.TemporaryDirectory(prefix="mnist_dist-engines-") as scratch:
        conversion = Conversion(
            bundle=bundle,
            scratch=Path(scratch),
            batch_size=request.batch_size,
            cpus=request.cpus,
            session=session,
        )
        sources = [EngineChoice(engine=name) for name in sorted({choice.engine for choice in known} - {"keras"})]
        answers = conversion.by_keras([one.engine for one in sources if not cache.has_model(one)], features=True)
        for source in sources:
            cache.publish(source, Path(scratch, source.engine))
        keras = cache.keep(EngineChoice(), compare(answers.probabilities, answers))
        found, failures = list[EngineChoice](), list[StepFailed]()
        for choice in known:
            try:
                if choice.engine != "keras" and not choice.check:
                    choice = _check(choice, conversion, cache, reference=answers.probabilities)
                found.append(keras if choice.engine == "keras" else choice)
            except StepFailed as failure:
                failures.append(failure)
                session.console.line(f"  {choice.name}: left out ({first_line(failure)})")
    if failures and all(why_not(choice) for choice in found if choice.engine != "keras"):
        raise failures[0]
    return found


def _check(choice: EngineChoice, conversion: Conversion, cache: "_Cache", *, reference: Probabilities) -> EngineChoice:
    """The choice with what its check found."""
    if choice.precision == "int8" and not cache.has_model(choice):
        conversion.quantize(cache.folder(EngineChoice(engine=choice.engine)), conversion.scratch / "int8")
        cache.publish(choice, conversion.scratch / "int8")
    answers = conversion.by_file(cache.folder(choice), choice.engine, precision=choice.precision, call_sizes=CALL_SIZES)
    check = compare(reference, answers)
    choice = cache.keep(choice, check)
    why = why_not(choice)
    conversion.session.console.line(
        f"  {choice.name}: {check.images_per_s:,.0f} images/s, same top class for {check.agreement:.2%}, probabilities "
        f"differ by at most {check.max_abs_difference:.2g}{f': not chosen automatically ({why})' if why else ''}"
    )
    return choice


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A check on disk, and what it holds for: the same packages, and cores that compute the same."""

    check: Check
    versions: dict[str, str]
    cpu: str
    cpus: int
    call_sizes: tuple[int, ...] = CALL_SIZES


@dataclass(frozen=True)
class _Cache:
    """The folder of a bundle's converted models, and what is known of engines with so many cores."""

    uri: str
    cpus: int

    def is_begun(self) -> bool:
        return ANYWHERE.exists(self._check_uri(EngineChoice()))

    def folder(self, choice: EngineChoice) -> str:
        """URI of a converted model."""
        return join(self.uri, f"{choice.engine}-int8" if choice.precision == "int8" else choice.engine)

    def has_model(self, choice: EngineChoice) -> bool:
        return ANYWHERE.exists(join(self.folder(choice), FORMATS[choice.engine].file))

    def known(self, choice: EngineChoice) -> EngineChoice:
        """The choice with what an earlier check found, where that still holds."""
        uri = None if choice.engine == "keras" else self.folder(choice)
        try:
            kept = documents.read(ANYWHERE, self._check_uri(choice), _Kept)
        except (FileNotFoundError, DataError):
            return replace(choice, uri=uri)
        holds = kept == self._kept(choice, kept.check) and (uri is None or self.has_model(choice))
        return replace(choice, uri=uri, check=kept.check if holds else None)

    def keep(self, choice: EngineChoice, check: Check) -> EngineChoice:
        """The choice with what its check found, which is written down."""
        documents.write(ANYWHERE, self._check_uri(choice), self._kept(choice, check))
        return replace(choice, check=check)

    def publish(self, choice: EngineChoice, folder: Path) -> None:
        """Puts a converted model in its place, unless one is there: actors of another job may be reading it."""
        if self.has_model(choice):
            return
        try:
            ANYWHERE.upload_folder(folder, self.folder(choice), last=FORMATS[choice.engine].file)
        except OSError as err:
            if not self.has_model(choice):  # else another job put its own there just now
                raise StorageError(f"{self.uri} cannot be written: {err}") from err

    def _check_uri(self, choice: EngineChoice) -> str:
        return join(self.uri, f"{choice.engine}-{choice.precision}.json")

    def _kept(self, choice: EngineChoice, check: Check) -> _Kept:
        return _Kept(check=check, versions=versions_of(_packages(choice)), cpu=processor.name(), cpus=self.cpus)
