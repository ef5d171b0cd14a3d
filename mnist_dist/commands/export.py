"""mnist-dist export --bundle DIR --format F: converts a bundle's model for another runtime and compares the two."""

from collections.abc import Sequence
from typing import Any

from mnist_dist import command_line, console
from mnist_dist.export_config import ExportJob


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line and exports; returns the job's JSON keys."""
    _, job = command_line.parse({"export": ExportJob}, argv=arguments, command=program, default="export")
    shown = console.Console(verbose=job.verbose)
    console.quiet(verbose=job.verbose)
    from mnist_dist.engines.export import export_bundle

    return export_bundle(job, console=shown)
