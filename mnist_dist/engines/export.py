"""Exports a bundle's model to the format of another runtime and checks that it predicts the same there.

Owns: the folder of an export and applying the tolerance. Does not own: the formats (`formats`), conversion and
comparison (`conversion`), the bundle (`models/bundle.py`) or the flags (`export_config`).

Contract: the folder holds the format's files and `export.json`, which is written last and records the check; a folder
without it is unfinished. A local folder is written under a temporary name beside its place and renamed.
"""

import platform
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from mnist_dist import documents, processor
from mnist_dist.config import differences, require
from mnist_dist.console import Console
from mnist_dist.engines.calibration import calibration_of
from mnist_dist.engines.choice import own_engine, packages_of
from mnist_dist.engines.conversion import Check, Conversion, compare, versions_of
from mnist_dist.engines.formats import FORMATS, check_installed
from mnist_dist.environment import CONVERSION_BACKENDS, check_keras
from mnist_dist.errors import ConfigError, MnistDistError, ResumeConflict
from mnist_dist.export_config import ExportFormat, ExportJob
from mnist_dist.models.bundle import Bundle, check_has_classes, load_bundle
from mnist_dist.models.onnx_file import Tensor
from mnist_dist.session import Session, locked_session, seconds_since, started_at
from mnist_dist.store.anywhere import ANYWHERE, check_access
from mnist_dist.store.uris import is_remote, join

EXPORT_FILE = "export.json"


OF_ONNX = ("onnx", "openvino")
"""Formats of an ONNX model."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """The content of `export.json`."""

    format: ExportFormat
    file: str
    """Name of the file or folder that a runtime opens."""
    model_id: str
    class_names: tuple[str, ...]
    input: Tensor
    output: Tensor
    resize: str
    """How an image of another shape is resized to the input."""
    size_bytes: int
    """Total size of all files except `export.json`."""
    check: Check
    own_images_per_s: float
    """Speed of the bundle's own engine (Keras, or ONNX Runtime where the model is an ONNX file) on the same machine
    with the same batch size."""
    tolerance: float
    """The largest difference of a probability that was allowed."""
    versions: dict[str, str]
    created_at: str
    """ISO 8601, UTC."""


def export_bundle(job: ExportJob, *, console: Console) -> dict[str, Any]:
    """Exports a bundle and checks the file in its own runtime, or returns the export that already exists.

    Args:
        job: the bundle, the format and the output.
        console: shows progress.

    Returns:
        Keys of the job's JSON line: `output`, `path` (what a runtime opens), `format`, `model_id`, `size_bytes`,
        `own_images_per_s`, `seconds` and the fields of `Check`.

    Raises:
        BundleError: there is no bundle, or its calibration images cannot be read.
        ConfigError: the model has no such export, the runtime is not installed, the output holds other files, or its
            export is damaged.
        ResumeConflict: the output holds another export.
        Locked: another driver is working on the same output.
        Interrupted: by a signal; no files are left.
        MnistDistError: the conversion or the runtime failed, or the difference is above the tolerance; no files are
            left.
    """
    began_at = started_at(console)
    check_access((job.bundle, job.output))
    bundle, output = load_bundle(job.bundle), job.output_uri
    export = _finished(job, bundle)
    if export is None:
        _check_format(job, bundle)
        _check_free(output, job.format)
        calibration_of(bundle)  # Raises now, not after the conversion, if the images cannot be read.
        parent, _, name = output.rpartition("/")
        lock_uri = f"{parent}/.{name}.lock"
        with locked_session(console, lock_uri=lock_uri, what=output, wait_s=job.lock_wait_s) as session:
            export = _finished(job, bundle) or _export(job, bundle, session)
    return {
        "output": output,
        "path": join(output, export.file),
        **{key: getattr(export, key) for key in ("format", "model_id", "size_bytes", "own_images_per_s")},
        **msgspec.to_builtins(export.check),
        "seconds": seconds_since(began_at),
    }


def _check_format(job: ExportJob, bundle: Bundle) -> None:
    check_has_classes(bundle.info)
    if not bundle.is_onnx:
        check_keras(CONVERSION_BACKENDS)
    require(
        not bundle.is_onnx or job.format in OF_ONNX,
        "an imported ONNX model exports to onnx and openvino",
        format=job.format,
    )
    check_installed(f"--format {job.format}", _packages(job, bundle))


def _packages(job: ExportJob, bundle: Bundle) -> tuple[str, ...]:
    """The packages that convert the model and run the file."""
    if bundle.is_onnx and job.format == "onnx":
        return ("onnx", "onnxruntime")  # The file itself: nothing converts it.
    return FORMATS[job.format].packages


# --- an existing export ----------------------------------------------------------------------------------------------


def _finished(job: ExportJob, bundle: Bundle) -> Export | None:
    """The job's export, if it is already complete; None: there is none.

    Raises:
        ResumeConflict: the output holds another export.
        ConfigError: the export is damaged.
    """
    try:
        export = documents.read(ANYWHERE, join(job.output_uri, EXPORT_FILE), Export)
    except FileNotFoundError:
        return None
    requested = {"model_id": bundle.info.model_id, "format": job.format}
    lines = differences(requested, {name: getattr(export, name) for name in requested})
    if export.check.max_abs_difference > job.tolerance:
        difference = f"{export.check.max_abs_difference:.3g} is the export's difference"
        lines.append(f"tolerance: {job.tolerance:g} now, {difference}")
    if lines:
        raise ResumeConflict(
            "the output holds another export; choose another --output, or delete it: "
            f"{'; '.join(lines)}. Received: {job.output_uri!r}"
        )
    size_bytes = _size_bytes(job.output_uri)
    if size_bytes != export.size_bytes:
        raise ConfigError(
            f"the export is damaged, delete it: its files had {export.size_bytes} bytes and now have {size_bytes}. "
            f"Received: {job.output_uri!r}"
        )
    return export


def _size_bytes(output: str) -> int:
    """Total size of the folder's files except `export.json`."""
    export_file = join(output, EXPORT_FILE)
    return sum(entry.size_bytes for entry in ANYWHERE.list_entries(output) if entry.uri != export_file)


def _check_free(output: str, format: ExportFormat) -> None:
    """Refuses an output that holds other files; those of an interrupted upload do not count."""
    row, remote = FORMATS[format], is_remote(output)
    leftovers = {row.file, *row.others} if remote else set()
    names = {entry.uri.removeprefix(f"{output}/").partition("/")[0] for entry in ANYWHERE.scan_entries(output)}
    if names - leftovers or (not remote and Path(output).is_dir() and any(Path(output).iterdir())):
        raise ConfigError(
            f"the folder of an export must be new or empty. Received: {output!r}, with {sorted(names - leftovers)[:5]}"
        )


# --- a new export ----------------------------------------------------------------------------------------------------


def _export(job: ExportJob, bundle: Bundle, session: Session) -> Export:
    source, count = calibration_of(bundle)
    images = "calibration" if source == "calibration" else "random (the bundle has no calibration)"
    session.console.line(
        f"exporting {bundle.info.backbone} {bundle.info.model_id[:12]} to {job.format}, compared on {count} {images} "
        "images"
    )
    with tempfile.TemporaryDirectory(prefix="mnist_dist-export-") as scratch:
        files = Path(scratch, job.format)
        conversion = Conversion(
            bundle=bundle,
            scratch=Path(scratch),
            batch_size=job.batch_size,
            cpus=processor.usable_cpus(),
            session=session,
        )
        export = _converted(job, conversion)
        documents.write(ANYWHERE, f"{files}/{EXPORT_FILE}", export)
        session.check()
        session.confirm_lock()
        _check_free(job.output_uri, job.format)  # Somebody may have written there in the meantime.
        ANYWHERE.delete_leftovers(job.output_uri)
        for name in (export.file, *FORMATS[job.format].others):  # left by an interrupted upload
            ANYWHERE.delete_tree(join(job.output_uri, name))
        ANYWHERE.upload_folder(files, job.output_uri, last=EXPORT_FILE)
    check = export.check
    session.console.line(
        f"{join(job.output_uri, export.file)}: {export.size_bytes / 1e6:.1f} MB, differs by at most "
        f"{check.max_abs_difference:.2g}, same top class for {check.agreement:.2%} of {check.images} images, "
        f"{check.images_per_s:.1f} images/s ({own_engine(bundle).own_name}: {export.own_images_per_s:.1f})"
    )
    return export


def _converted(job: ExportJob, conversion: Conversion) -> Export:
    """Converts the model to files and checks them.

    Raises:
        MnistDistError: a step failed, or the difference is above the tolerance.
    """
    bundle, row, files = conversion.bundle, FORMATS[job.format], conversion.scratch / job.format
    info, sizes, engine = bundle.info, (job.batch_size,), own_engine(bundle)
    own = conversion.by_own([job.format], features=False, call_sizes=sizes)
    answers = conversion.by_file(str(files), job.format, precision="float32", call_sizes=sizes)
    check = compare(own.probabilities, answers, multi_label=info.multi_label)
    if not check.max_abs_difference <= job.tolerance:  # `not <=` also refuses NaN.
        raise MnistDistError(
            f"{job.format} differs too much from {engine.own_name}: a probability by {check.max_abs_difference:.3g}, "
            f"the top class of {1 - check.agreement:.2%} of {check.images} images; at most {job.tolerance:g} is "
            "allowed (--tolerance)"
        )
    return Export(
        format=job.format,
        file=row.file,
        model_id=info.model_id,
        class_names=tuple(info.class_names),
        input=Tensor(name=answers.input_name, dtype="uint8", shape=(bundle.fixed_batch, *info.spec.shape)),
        output=Tensor(name=answers.output_name, dtype="float32", shape=(bundle.fixed_batch, len(info.class_names))),
        resize=info.spec.resize,
        size_bytes=_size_bytes(str(files)),
        check=check,
        own_images_per_s=own.images_per_s,
        tolerance=job.tolerance,
        versions={"python": platform.python_version(), **versions_of((*packages_of(engine), *_packages(job, bundle)))},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
