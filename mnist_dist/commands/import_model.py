"""mnist-dist import SOURCE --output BUNDLE: turns a model that was trained elsewhere into a bundle."""

import shlex
from collections.abc import Sequence
from typing import Any

from mnist_dist import command_line, console
from mnist_dist.import_config import ImportJob


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line, imports and says what to do with the bundle; returns the job's JSON keys."""
    _, job = command_line.parse({"import": ImportJob}, argv=arguments, command=program, default="import")
    shown = console.Console(verbose=job.verbose)
    console.quiet(verbose=job.verbose)
    from mnist_dist.importing.import_model import import_model

    result = import_model(job, console=shown)
    scoring = "score --input YOUR_IMAGES --output predictions --bundle"
    use = "train --data YOUR_IMAGES --backbone" if job.backbone_only else scoring
    shown.line(f"bundle: {result['output']}\n  {_sibling(program, use)} {shlex.quote(result['output'])}")
    return result


def _sibling(program: str, use: str) -> str:
    """Another job, called as this one was."""
    if program.startswith("python -m jobs."):
        return f"python -m jobs.{use}"
    return f"{program.rpartition(' ')[0]} {use}"
