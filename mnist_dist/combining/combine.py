"""The combination: bundles are opened and checked, their models become one file, and the file becomes a bundle.

Owns: the order of these steps, and what the new bundle says about itself. Does not own: what happens to the models
(`building`), or opening the validation images, which may need Ray (`on_ray/combining`).

Contract: the bundle is published in one piece, and only if the model file predicts what its members say. Its
`bundle.json` records method, members and what judged them; the same command returns it at once.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mnist_dist.combine_config import CombineJob
from mnist_dist.combining.building import BuildTask, Built, build
from mnist_dist.combining.measuring import LabelledImages
from mnist_dist.combining.members import Member, check_members, open_members
from mnist_dist.config import CombineMethod, differences
from mnist_dist.console import Console
from mnist_dist.engines.calibration import calibration_of
from mnist_dist.engines.steps import run_step
from mnist_dist.environment import check_keras
from mnist_dist.errors import MnistDistError, ResumeConflict
from mnist_dist.models.bundle import (
    BUNDLE_FILE,
    CALIBRATION_FILE,
    Bundle,
    BundleInfo,
    Combined,
    CombinedMember,
    check_output,
    read_bundle_info,
    upload_bundle,
    write_model_bundle,
)
from mnist_dist.session import Session, locked_session, seconds_since, started_at
from mnist_dist.store.anywhere import ANYWHERE, check_access, store_for
from mnist_dist.store.uris import join
from mnist_dist.urls import shown

OpenImages = Callable[[CombineJob, Sequence[BundleInfo], Session], LabelledImages]
"""Opens the validation images of a job whose bundles say where they came from."""
_SHOWN_DIGITS = 16  # of a model id, enough to tell models apart


def combine(job: CombineJob, *, console: Console, open_images: OpenImages) -> dict[str, Any]:
    """Combines bundles, or returns the bundle that the same command has made.

    Args:
        job: the bundles, the method and the output.
        console: shows progress.
        open_images: called where validation images judge.

    Returns:
        Keys of the job's JSON line: `output`, `method`, `model_id`, `members` (each with `uri`, `model_id`, `is_used`
        and `validation_accuracy`), `validation_accuracy` (0-1) and `validation_loss` (nats; both None where nothing
        judged), `max_abs_difference`, `seconds`.

    Raises:
        BundleError: there is no bundle.
        ConfigError: the bundles cannot be combined, the images are not those of the runs, or the output holds other
            files.
        ResumeConflict: the output holds another bundle.
        MnistDistError: the model does not predict what its members say, or the process failed; nothing is written.
        Locked, Interrupted: as for every job; nothing is written.
    """
    began_at = started_at(console)
    check_access((*job.bundles, job.output, job.storage if job.is_judged else None))
    check_access((*job.data, job.data_dir), store=store_for(job.store))
    members = open_members(job.bundles)
    check_members(members, job.method, is_judged=job.is_judged)
    info = _finished(job, members)
    if info is None:
        if not members[0].bundle.is_onnx:
            check_keras()
        calibration_of(members[0].bundle)  # Raises now, not after the work, if the images cannot be read.
        check_output(job.output_uri)
        parent, _, name = job.output_uri.rpartition("/")
        lock_uri = f"{parent}/.{name}.lock"
        with locked_session(console, lock_uri=lock_uri, what=job.output_uri, wait_s=job.lock_wait_s) as session:
            info = _finished(job, members) or _combined(job, members, session, open_images)
    else:
        console.line(f"{job.output_uri} is this combination already")
    return {**_result(job.output_uri, info), "seconds": seconds_since(began_at)}


def _result(output: str, info: BundleInfo) -> dict[str, Any]:
    assert info.combined is not None
    return {
        "output": output,
        "method": info.combined.method,
        "model_id": info.model_id,
        "members": [asdict(member) for member in info.combined.members],
        "validation_accuracy": info.validation.get("accuracy"),
        "validation_loss": info.validation.get("loss"),
        "max_abs_difference": info.combined.max_abs_difference,
    }


# --- an existing bundle ----------------------------------------------------------------------------------------------


def _finished(job: CombineJob, members: Sequence[Member]) -> BundleInfo | None:
    """The output, if it is this combination; None: there is no bundle.

    Raises:
        ResumeConflict: it holds another bundle.
    """
    if not ANYWHERE.exists(join(job.output_uri, BUNDLE_FILE)):
        return None
    info = read_bundle_info(job.output_uri)
    if info.combined is None:
        raise ResumeConflict(f"the output holds a bundle that is no combination. Received: {job.output!r}")
    lines = differences(
        _settings(job.method, [member.info.model_id for member in members], job.data),
        _settings(info.combined.method, [member.model_id for member in info.combined.members], info.combined.data),
    )
    if lines:
        shown_lines = "\n  ".join(lines)
        raise ResumeConflict(
            f"{job.output_uri} is another combination; choose another --output, or delete it:\n  {shown_lines}"
        )
    return info


def _settings(method: CombineMethod, model_ids: Sequence[str], data: Sequence[str]) -> dict[str, Any]:
    ids = [model_id[:_SHOWN_DIGITS] for model_id in model_ids]
    return {"method": method, "model_ids": ids, "data": [shown(uri) for uri in data]}


# --- a new bundle ----------------------------------------------------------------------------------------------------


def _combined(job: CombineJob, members: Sequence[Member], session: Session, open_images: OpenImages) -> BundleInfo:
    images = open_images(job, [member.info for member in members], session) if job.is_judged else None
    with tempfile.TemporaryDirectory(prefix="mnist_dist-combine-") as scratch:
        folder = Path(scratch, "bundle")
        info = combined_bundle(
            members, job.method, folder, session=session, images=images, data=job.data, batch_size=job.batch_size
        )
        session.check()
        session.confirm_lock()
        check_output(job.output_uri)  # Somebody may have written there in the meantime.
        upload_bundle(folder, job.output_uri)
    return info


def combined_bundle(
    members: Sequence[Member],
    method: CombineMethod,
    folder: Path,
    *,
    session: Session,
    images: LabelledImages | None,
    batch_size: int,
    data: Sequence[str] = (),
) -> BundleInfo:
    """Combines opened bundles, which `check_members` has checked, into a local folder, and shows the result.

    Args:
        members: the bundles, the best one first where it matters: the new one has its images and its description.
        method: how.
        folder: to create.
        session: shows progress; a signal ends the work.
        images: judge the members and the result; a greedy soup needs them.
        batch_size: images per call.
        data: what `--data` named.

    Returns:
        The info of the new bundle.

    Raises:
        MnistDistError: see `combine`.
    """
    first = members[0].bundle
    target = folder.with_name(f"combined-{first.info.model_file}")
    session.console.line(f"{method} of {len(members)} bundles")
    task = BuildTask(
        method=method,
        bundles=tuple(Bundle(member.bundle.path, member.info) for member in members),
        target=target,
        batch_size=batch_size,
        images=images,
    )
    built = run_step(partial(build, task), title=method, session=session)
    if isinstance(built, MnistDistError):
        raise built
    combined = Combined(
        method=method,
        members=_described(members, built),
        data=tuple(map(shown, data)),
        max_abs_difference=built.max_abs_difference,
    )
    info = _new_info(members, combined, built, None if images is None else images.fingerprint)
    info = write_model_bundle(folder, target, info, extra=_calibration(first))
    target.unlink()
    _show(info, session.console)
    return info


def _described(members: Sequence[Member], built: Built) -> tuple[CombinedMember, ...]:
    return tuple(
        CombinedMember(
            uri=shown(member.uri),
            model_id=member.info.model_id,
            is_used=number in built.used,
            validation_accuracy=None if built.accuracies is None else built.accuracies[number],
        )
        for number, member in enumerate(members)
    )


def _new_info(members: Sequence[Member], combined: Combined, built: Built, fingerprint: str | None) -> BundleInfo:
    """What the new bundle says: nothing that was not measured; of the network what holds for all members."""
    first, is_ensemble = members[0].info, combined.method == "ensemble"
    names = dict.fromkeys(member.info.backbone for member in members)
    fingerprints, weights = ({getattr(each.info, name) for each in members} for name in ("data_fingerprint", "weights"))
    imported = None if is_ensemble or first.imported is None else replace(first.imported, fast_agreement=None)
    return replace(
        first,
        backbone=f"ensemble of {', '.join(names)}" if is_ensemble else first.backbone,
        imported=imported,
        combined=combined,
        weights=first.weights if len(weights) == 1 else "none",
        config={key: value for key, value in first.config.items() if key == "data" or not is_ensemble},
        data_fingerprint=fingerprint or (first.data_fingerprint if len(fingerprints) == 1 else "none"),
        validation={} if built.measured is None else asdict(built.measured),
        test={},
    )


def _calibration(bundle: Bundle) -> Mapping[str, bytes]:
    """The images of a bundle, where it has any."""
    path = bundle.path / CALIBRATION_FILE
    return {CALIBRATION_FILE: path.read_bytes()} if path.is_file() else {}


def _show_measured(info: BundleInfo, combined: Combined, console: Console) -> None:
    accuracy, loss = info.validation["accuracy"], info.validation["loss"]
    console.line(f"{combined.method}: validation accuracy {accuracy:.4f}, loss {loss:.4f}")
    best = max(member.validation_accuracy or 0.0 for member in combined.members)
    if accuracy < best:
        console.line(f"warning: less accurate than its best member, by {100 * (best - accuracy):.2f} points")


def _show(info: BundleInfo, console: Console) -> None:
    assert info.combined is not None
    for member in info.combined.members:
        accuracy = member.validation_accuracy
        measured = "" if accuracy is None else f": validation accuracy {accuracy:.4f}"
        console.line(f"  {member.uri}{measured}{'' if member.is_used else ', left out'}")
    if info.validation:
        _show_measured(info, info.combined, console)
    elif info.combined.method == "soup":
        console.line("not measured; a soup can be far worse than its members (--data measures it)")
    apart = info.combined.max_abs_difference
    console.line(f"compared with what its members say: probabilities differ by at most {apart:.2g}")
