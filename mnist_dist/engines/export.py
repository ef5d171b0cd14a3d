"""A bundle's model as a file of another runtime, shown to give the same answers there.

Owns: the folder of an export and the tolerance. Does not own: the formats (`formats`), conversion and comparison
(`conversion`), the bundle (`models/bundle.py`) or the flags (`export_config`).

Contract: the folder holds what the format needs and `export.json`, which is written last and says what was checked; a
folder without it is unfinished. A local folder is made under a temporary name beside its place and renamed.
"""

import platform
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from mnist_dist import documents, processor
from mnist_dist.config import differences
from mnist_dist.console import Console
from mnist_dist.engines.calibration import calibration_of
from mnist_dist.engines.conversion import Check, Conversion, compare, versions_of
from mnist_dist.engines.formats import FORMATS, check_installed
from mnist_dist.errors import ConfigError, MnistDistError, ResumeConflict
from mnist_dist.export_config import ExportFormat, ExportJob
from mnist_dist.models.bundle import Bundle, load_bundle
from mnist_dist.session import Session, locked_session
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.uris import is_remote, join

EXPORT_FILE = "export.json"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output, as the file declares it."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    """None: any size."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What `export.json` says."""

    format: ExportFormat
    file: str
    """What a runtime opens, in the folder."""
    model_id: str
    class_names: tuple[str, ...]
    input: Tensor
    output: Tensor
    resize: str
    """How an image of another shape becomes the input."""
    size_bytes: int
    """Of all files but this one."""
    check: Check
    keras_images_per_s: float
    """By Keras, on the same machine with the same batch size."""
    tolerance: float
    """The largest difference that was allowed."""
    versions: dict[str, str]
    created_at: str
    """ISO 8601, UTC."""


def export_bundle(job: ExportJob, *, console: Console) -> dict[str, Any]:
    """Exports a bundle and checks the file in its own runtime, or returns the export that is already there.

    Args:
        job: which bundle, how, and where to.
        console: where a person looks.

    Returns:
        Keys of the job's JSON line: `output`, `path` (what a runtime opens), `format`, `model_id`, `size_bytes`,
        `keras_images_per_s` and the fields of `Check`.

    Raises:
        BundleError: there is no bundle, or its calibration images are none.
        ConfigError: the runtime is not installed, or something else lies at the output.
        ResumeConflict: the output holds another export.
        Locked: another driver is at work on the same output.
        Interrupted: by a signal; nothing is left.
        MnistDistError: the conversion or the runtime failed, or the difference is above the tolerance; nothing is left.
    """
    bundle, output = load_bundle(job.bundle), job.output_uri
    export = _finished(job, bundle)
    if export is None:
        check_installed(f"--format {job.format}", FORMATS[job.format].packages)
        _check_free(output, job.format)
        calibration_of(bundle)  # which may be none
        parent, _, name = output.rpartition("/")
        lock_uri = f"{parent}/.{name}.lock"
        with locked_session(console, lock_uri=lock_uri, what=output, wait_s=job.lock_wait_s) as session:
            export = _finished(job, bundle) or _export(job, bundle, session)
    return {
        "output": output,
        "path": join(output, export.file),
        **{key: getattr(export, key) for key in ("format", "model_id", "size_bytes", "keras_images_per_s")},
        **msgspec.to_builtins(export.check),
    }


# --- what is already there -------------------------------------------------------------------------------------------


def _finished(job: ExportJob, bundle: Bundle) -> Export | None:
    """Just this export, where it is there, complete.

    Raises:
        ResumeConflict: another one is.
        ConfigError: it is, but damaged.
    """
    try:
        found = documents.read(ANYWHERE, join(job.output_uri, EXPORT_FILE), Export)
    except FileNotFoundError:
        return None
    ours = {"model_id": bundle.info.model_id, "format": job.format}
    lines = differences(ours, {name: getattr(found, name) for name in ours})
    if found.check.max_abs_difference > job.tolerance:
        difference = f"{found.check.max_abs_difference:.3g} is the export's difference"
        lines.append(f"tolerance: {job.tolerance:g} now, {difference}")
    if lines:
        raise ResumeConflict(
            "there is another export; name another --output, or delete it: "
            f"{'; '.join(lines)}. Received: {job.output_uri!r}"
        )
    size_bytes = _size_bytes(job.output_uri)
    if size_bytes != found.size_bytes:
        raise ConfigError(
            f"the export is damaged, delete it: its files had {found.size_bytes} bytes and have {size_bytes}. "
            f"Received: {job.output_uri!r}"
        )
    return found


def _size_bytes(output: str) -> int:
    """Of everything in the folder but `export.json`."""
    mark = join(output, EXPORT_FILE)
    return sum(entry.size_bytes for entry in ANYWHERE.list_entries(output) if entry.uri != mark)


def _check_free(output: str, format: ExportFormat) -> None:
    """Whatever lies there without an `export.json` is not ours, but for the files of an upload that broke off."""
    row, remote = FORMATS[format], is_remote(output)
    ours = {row.file, *row.others} if remote else set()
    names = {entry.uri.removeprefix(f"{output}/").partition("/")[0] for entry in ANYWHERE.scan_entries(output)}
    if names - ours or (not remote and Path(output).is_dir() and any(Path(output).iterdir())):
        raise ConfigError(
            f"the folder for an export is new or empty. Received: {output!r}, which holds {sorted(names - ours)[:5]}"
        )


# --- a new one -------------------------------------------------------------------------------------------------------


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
        _check_free(job.output_uri, job.format)  # somebody else may have put something there meanwhile
        ANYWHERE.delete_leftovers(job.output_uri)
        for name in (export.file, *FORMATS[job.format].others):  # of an upload that broke off
            ANYWHERE.delete_tree(join(job.output_uri, name))
        ANYWHERE.upload_folder(files, job.output_uri, last=EXPORT_FILE)
    check = export.check
    session.console.line(
        f"{join(job.output_uri, export.file)}: {export.size_bytes / 1e6:.1f} MB, differs by at most "
        f"{check.max_abs_difference:.2g}, same top class for {check.agreement:.2%} of {check.images} images, "
        f"{check.images_per_s:.1f} images/s (Keras: {export.keras_images_per_s:.1f})"
    )
    return export


def _converted(job: ExportJob, conversion: Conversion) -> Export:
    """Makes the files, and checks them.

    Raises:
        MnistDistError: a process failed, or the difference is above the tolerance.
    """
    info, row, files = conversion.bundle.info, FORMATS[job.format], conversion.scratch / job.format
    keras = conversion.by_keras([job.format], features=False)
    answers = conversion.by_file(str(files), job.format, precision="float32", call_sizes=(job.batch_size,))
    check = compare(keras.probabilities, answers)
    if not check.max_abs_difference <= job.tolerance:  # also what is no number
        raise MnistDistError(
            f"{job.format} differs from the Keras model: a probability by {check.max_abs_difference:.3g}, the top "
            f"class of {1 - check.agreement:.2%} of {check.images} images; at most {job.tolerance:g} is allowed "
            "(--tolerance)"
        )
    return Export(
        format=job.format,
        file=row.file,
        model_id=info.model_id,
        class_names=tuple(info.class_names),
        input=Tensor(name=answers.input_name, dtype="uint8", shape=(None, *info.spec.shape)),
        output=Tensor(name=answers.output_name, dtype="float32", shape=(None, len(info.class_names))),
        resize=info.spec.resize,
        size_bytes=_size_bytes(str(files)),
        check=check,
        keras_images_per_s=keras.images_per_s,
        tolerance=job.tolerance,
        versions={"python": platform.python_version(), **versions_of(("keras", "tensorflow", *row.packages))},
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
