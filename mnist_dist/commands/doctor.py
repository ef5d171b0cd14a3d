"""mnist-dist doctor [--storage URI] [--json]: finds problems on every node that would break a job."""

from collections.abc import Sequence
from typing import Any

from mnist_dist import command_line, console
from mnist_dist.doctor_config import DoctorJob


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line and checks the set-up; returns the job's JSON keys."""
    _, job = command_line.parse({"doctor": DoctorJob}, argv=arguments, command=program, default="doctor")
    shown = console.Console(verbose=job.verbose)
    console.quiet(verbose=job.verbose)
    from mnist_dist.on_ray.doctor.doctor import examine  # After `quiet`: Ray reads the environment on import.

    return examine(job, console=shown)
