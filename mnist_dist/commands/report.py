"""mnist-dist report [--storage URI]: writes one page about everything in a storage, with links to all reports."""

from collections.abc import Sequence
from typing import Any

from mnist_dist import command_line, console
from mnist_dist.report_config import ReportJob


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line and writes the page; returns the job's JSON keys."""
    _, job = command_line.parse({"report": ReportJob}, argv=arguments, command=program, default="report")
    shown = console.Console(verbose=job.verbose)
    console.quiet(verbose=job.verbose)
    return run(job, shown)


def run(job: ReportJob, shown: console.Console) -> dict[str, Any]:
    """Writes the page; returns the job's JSON keys."""
    from mnist_dist.evaluation.storage_page import report_storage  # After parsing, so that `--help` is quick.

    return report_storage(job, console=shown)
