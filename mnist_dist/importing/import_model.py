"""The import: a foreign model is opened, rebuilt, compared with itself, and published as a bundle.

Owns: the order of these steps, and `import.json`. Does not own: the sources (`sources`), what is built (`recipe`), or
what a bundle is (`models/bundle.py`). Loads no framework: each step runs in a process of its own.

Contract: the bundle is published in one piece, and only if it predicts what the original predicts. `import.json` in it
says what was imported with which flags, and what was compared with what; the same command returns it at once.
"""

import dataclasses
import functools
import hashlib
import json
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from mnist_dist import documents
from mnist_dist.config import differences
from mnist_dist.console import Console
from mnist_dist.engines.steps import Report, or_error, run_step
from mnist_dist.environment import CONVERSION_BACKENDS, check_keras
from mnist_dist.errors import ConfigError, MnistDistError, ResumeConflict
from mnist_dist.import_config import ImportJob
from mnist_dist.importing.comparison import Checked, CheckTask, Compared, check
from mnist_dist.importing.examples import MAX_CALIBRATION, MAX_CHECKED, list_images
from mnist_dist.importing.foreign import Foreign
from mnist_dist.importing.recipe import Recipe, read_classes, recipe_of
from mnist_dist.importing.sources import Source, digest_of, find_source, localized
from mnist_dist.models.bundle import (
    BUNDLE_FILE,
    KERAS_FILE,
    ONNX_FILE,
    BundleInfo,
    Imported,
    check_output,
    read_bundle_info,
    upload_bundle,
    write_model_bundle,
)
from mnist_dist.session import Session, locked_session, seconds_since, started_at
from mnist_dist.store.anywhere import ANYWHERE, check_access
from mnist_dist.store.uris import absolute, join
from mnist_dist.urls import shown, shown_values

if TYPE_CHECKING:
    import pyarrow as pa

IMPORT_FILE = "import.json"
_FOREIGN = "foreign.pickle"
_RESOURCES = ("output", "lock_wait_s", "verbose")
"""Fields that change nothing in the bundle."""
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ImportRecord:
    """The content of `import.json`."""

    settings: dict[str, Any]
    """The flags."""
    contents: dict[str, str]
    """sha256 of the source, and of what flags name: names and contents, or ETags, of all that was read."""
    recipe: dict[str, Any]
    """What was built; see `Recipe`."""
    compared: tuple[Compared, ...]
    accuracy: float | None
    left_out: tuple[str, ...]


def import_model(job: ImportJob, *, console: Console) -> dict[str, Any]:
    """Imports a model, or returns the bundle that the same command has made.

    Args:
        job: the source, the output and what the source does not say.
        console: shows progress, what was assumed and what was compared.

    Returns:
        Keys of the job's JSON line: `output`, `model_id`, `kind`, `classes` (their number), `input` (height px, width
        px, channels), `assumed`, `compared`, `accuracy`, `fast_agreement`, `seconds`.

    Raises:
        ConfigError: the source cannot be imported, something is missing that must not be assumed, or the output holds
            other files.
        ResumeConflict: the output holds another bundle.
        MnistDistError: the bundle does not predict what the original predicts, or a step failed; nothing is written.
        Locked, Interrupted: as for every job; nothing is written.
    """
    began_at = started_at(console)
    check_access((job.source, job.output, job.checkpoint, job.classes, job.expect, job.check_images, job.calibration))
    source = find_source(job.source)
    if source.kind == "keras":
        check_keras(CONVERSION_BACKENDS)
    _check_outside(job)
    parent, _, name = job.output_uri.rpartition("/")
    with (
        tempfile.TemporaryDirectory(prefix="mnist_dist-import-") as scratch,
        locked_session(
            console, lock_uri=f"{parent}/.{name}.lock", what=job.output_uri, wait_s=job.lock_wait_s
        ) as session,
    ):
        local = localized(job, source, Path(scratch))
        given = _Given(job, local)
        record = _finished(job, given.contents)
        if record is None:
            check_output(job.output_uri, beside=(IMPORT_FILE,))
            record = _Import(job, local, given, Path(scratch), session).run()
        else:
            console.line(f"{job.output_uri} is this model already")
    return _result(job, record, seconds=seconds_since(began_at))


def _result(job: ImportJob, record: ImportRecord, *, seconds: float) -> dict[str, Any]:
    info = read_bundle_info(job.output_uri)
    assert info.imported is not None
    return {
        "output": job.output_uri,
        "model_id": info.model_id,
        "kind": info.imported.kind,
        "classes": len(info.class_names),
        "input": list(info.spec.shape),
        "assumed": list(info.imported.assumed),
        "compared": msgspec.to_builtins(record.compared),
        "accuracy": record.accuracy,
        "fast_agreement": info.imported.fast_agreement,
        "seconds": round(seconds, 2),
    }


def _settings(job: ImportJob) -> dict[str, Any]:
    values = json.loads(json.dumps(dataclasses.asdict(job)))
    return {name: value for name, value in shown_values(values).items() if name not in _RESOURCES}


class _Given:
    """What the flags name, read once."""

    def __init__(self, job: ImportJob, local: ImportJob) -> None:
        self._local = local
        self.classes = None if job.classes is None else ANYWHERE.read_bytes(absolute(job.classes))
        self.expect = None if job.expect is None else ANYWHERE.read_bytes(absolute(job.expect))
        self.check_images = _images(job.check_images, MAX_CHECKED)
        self.calibration = _images(job.calibration, MAX_CALIBRATION)

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """sha256 of each; see `ImportRecord`."""
        files = {"classes": self.classes, "expect": self.expect}
        images = {"check_images": self.check_images, "calibration": self.calibration}
        listed = {name: None if rows is None else _listed(rows) for name, rows in images.items()}
        known = {name: hashlib.sha256(data).hexdigest() for name, data in (files | listed).items() if data is not None}
        return {"source": digest_of(self._local), **known}


def _images(folder: str | None, max_images: int) -> "pa.Table | None":
    return None if folder is None else list_images(folder, max_images=max_images)


def _listed(rows: "pa.Table") -> bytes:
    """The names, sizes and ETags of images."""
    return json.dumps([rows[name].to_pylist() for name in ("uri", "size_bytes", "etag")]).encode()


def _finished(job: ImportJob, contents: dict[str, str]) -> ImportRecord | None:
    """What the output says of the same import; None: it is free.

    Raises:
        ResumeConflict: it holds another bundle.
    """
    if not ANYWHERE.exists(join(job.output_uri, BUNDLE_FILE)):
        return None
    try:
        record = documents.read(ANYWHERE, join(job.output_uri, IMPORT_FILE), ImportRecord)
    except FileNotFoundError:
        raise ResumeConflict(f"the output holds a bundle that was not imported. Received: {job.output!r}") from None
    lines = differences(_settings(job), record.settings)
    changed = [
        name for name in sorted({*contents, *record.contents}) if contents.get(name) != record.contents.get(name)
    ]
    lines += [f"{name}: its content has changed" for name in changed]
    if lines:
        shown_lines = "\n  ".join(lines)
        raise ResumeConflict(
            f"{job.output_uri} was imported otherwise; choose another --output, or delete it:\n  {shown_lines}"
        )
    return record


def _check_outside(job: ImportJob) -> None:
    """Refuses an output in the source or around it: a bundle replaces what lies in its folder."""
    for uri in filter(None, (job.source, job.checkpoint)):
        place = f"{absolute(uri)}/"
        if f"{job.output_uri}/".startswith(place) or place.startswith(f"{job.output_uri}/"):
            raise ConfigError(f"the output must lie outside of the source. Received: output={job.output!r}")


class _Import:
    """One import under way, in a scratch folder."""

    def __init__(self, job: ImportJob, local: ImportJob, given: _Given, scratch: Path, session: Session) -> None:
        self._job, self._local, self._given = job, local, given
        self._scratch, self._session = scratch, session

    def run(self) -> ImportRecord:
        source = find_source(self._job.source)
        given = self._given
        classes = None if given.classes is None else read_classes(given.classes, uri=str(self._job.classes))
        opened = self._step(
            partial(_open, source, self._local, self._scratch), title=f"opening {shown(self._job.source)}"
        )
        recipe = recipe_of(self._job, opened, classes=classes)
        self._say(opened, recipe)
        is_keras = opened.file.suffix == ".keras"
        model_file = self._scratch / (KERAS_FILE if is_keras else ONNX_FILE)
        task = CheckTask(
            foreign=self._scratch / _FOREIGN,
            recipe=recipe,
            model_file=model_file,
            rows=given.check_images,
            expect=None if self._job.expect is None else absolute(self._job.expect),
            calibration=given.calibration,
            scratch=self._scratch / "check",
        )
        checked = self._step(partial(_build_and_check, opened, task), title="comparing with the original")
        self._judge(checked)
        return self._published(opened, recipe, model_file, checked)

    def _step(self, function: Callable[[Report], Result], *, title: str) -> Result:
        """Runs a function in a process of its own; its MnistDistError is raised here as what it is."""
        result = run_step(partial(_returned, function), title=title, session=self._session)
        if isinstance(result, MnistDistError):
            raise result
        return result

    def _say(self, opened: Foreign, recipe: Recipe) -> None:
        spec, line = recipe.spec, self._session.console.line
        what = f"{len(recipe.class_names)} classes" if recipe.class_names else "features"
        colours = "RGB" if spec.channels == 3 else "grey"
        resized = f"{spec.resize}{'' if spec.resize_px is None else f' {spec.resize_px}'}"
        line(
            f"{opened.name} ({opened.kind}): {what} of {spec.height_px} x {spec.width_px} px {colours}; {resized}, "
            f"{spec.resampling} {spec.interpolation}; scale {_numbers(recipe.scale)}, offset {_numbers(recipe.offset)}"
            f"{', BGR' if recipe.bgr else ''}; then {recipe.activation}"
        )
        for sentence in opened.facts.why:
            line(f"  {sentence}")
        for sentence in recipe.assumed:
            line(f"  assumed: {sentence}")

    def _judge(self, checked: Checked) -> None:
        """Shows what was compared.

        Raises:
            MnistDistError: a comparison is outside of the tolerances.
        """
        line = self._session.console.line
        if checked.left_out:
            line(f"{len(checked.left_out)} images could not be read, such as {checked.left_out[0]}")
        for compared in checked.compared:
            line(f"compared with {compared}")
        if checked.accuracy is not None:
            line(f"accuracy on the {checked.images} check images: {checked.accuracy:.2%}")
        elif self._job.check_images is not None and not self._job.backbone_only:
            line(f"no accuracy: the folder of {checked.labelled} of {checked.images} images has the name of a class")
        if checked.fast_agreement is not None:
            line(
                f"fast decoding (score --decode-quality fast): same top class for {checked.fast_agreement:.2%} of "
                f"{checked.fast_images} calibration images"
            )
        for compared in checked.compared:
            if compared.is_judged and not compared.is_same:
                raise MnistDistError(
                    f"the bundle does not predict what the original predicts, and was not written. Compared with "
                    f"{compared}; the worst is {compared.worst}. Check the flags of normalisation and resizing"
                )

    def _published(self, opened: Foreign, recipe: Recipe, model_file: Path, checked: Checked) -> ImportRecord:
        record = ImportRecord(
            settings=_settings(self._job),
            contents=self._given.contents,
            recipe=msgspec.to_builtins(recipe),
            compared=checked.compared,
            accuracy=checked.accuracy,
            left_out=checked.left_out,
        )
        imported = Imported(
            source=shown(self._job.source),
            kind=opened.kind,
            scale=recipe.scale,
            offset=recipe.offset,
            bgr=recipe.bgr,
            activation=recipe.activation,
            assumed=recipe.assumed,
            fast_agreement=checked.fast_agreement,
            fast_images=checked.fast_images,
        )
        info = BundleInfo(
            class_names=recipe.class_names,
            spec=recipe.spec,
            backbone=opened.name,
            weights=shown(self._job.source),
            multi_label=recipe.multi_label,
            imported=imported,
        )
        folder = self._scratch / "bundle"
        extra = {IMPORT_FILE: documents.encode(record)}
        write_model_bundle(folder, model_file, info, calibration=checked.calibration, extra=extra)
        self._session.check()
        self._session.confirm_lock()
        upload_bundle(folder, self._job.output_uri, beside=(IMPORT_FILE,))
        return record


def _returned(function: Callable[[Report], Result], report: Report) -> "Result | MnistDistError":
    return or_error(partial(function, report))


def _open(source: Source, job: ImportJob, scratch: Path, report: Report) -> Foreign:
    """Opens the source. What runs the original stays in a file: the driver would load a framework with it."""
    opened = source.open(job, scratch, report)
    (scratch / _FOREIGN).write_bytes(pickle.dumps(opened))
    return replace(opened, reference=None, whole=None)


def _build_and_check(opened: Foreign, task: CheckTask, report: Report) -> Checked:
    """In one process, since it takes seconds to load a framework."""
    is_keras = opened.file.suffix == ".keras"
    if is_keras:
        from mnist_dist.importing.keras_models import build_keras as build
    else:
        from mnist_dist.importing.onnx_graph import build_onnx as build
    build(opened.file, task.recipe, task.model_file)
    return check(task, report)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
