"""mnist-dist combine BUNDLE BUNDLE ... --output BUNDLE --method M: makes one bundle of several."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mnist_dist import command_line, console
from mnist_dist.combine_config import CombineJob

if TYPE_CHECKING:
    from mnist_dist.combining.measuring import LabelledImages
    from mnist_dist.models.bundle import BundleInfo
    from mnist_dist.session import Session


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line, combines and says where the bundle is; returns the job's JSON keys."""
    _, job = command_line.parse({"combine": CombineJob}, argv=arguments, command=program, default="combine")
    shown = console.Console(verbose=job.verbose)
    console.quiet(verbose=job.verbose)
    result = run(job, shown)
    shown.line(f"bundle: {shlex.quote(result['output'])}")
    return result


def run(job: CombineJob, shown: console.Console) -> dict[str, Any]:
    """Combines bundles; see `combining.combine`. Ray is loaded only where images judge."""
    from mnist_dist.combining.combine import combine

    return combine(job, console=shown, open_images=_open_images)


def _open_images(job: CombineJob, infos: "Sequence[BundleInfo]", session: "Session") -> "LabelledImages":
    from mnist_dist.on_ray.combining.validation import open_validation

    return open_validation(job, infos, session)
