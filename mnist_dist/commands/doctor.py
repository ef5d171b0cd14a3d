"""mnist-dist doctor [--storage URI] [--json]: says what would break a job, on every node, and what to do."""

from collections.abc import Sequence
from typing import Any

from mnist_dist import console
from mnist_dist.doctor_config import DoctorJob


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses, looks at everything, shows it; returns the job's JSON keys."""
    _, job = console.parse({"doctor": DoctorJob}, argv=arguments, command=program, default="doctor")
    shown = console.Console(verbose=job.verbose)
    console.quiet(verbose=job.verbose)
    from mnist_dist.on_ray.doctor.doctor import examine  # after `quiet`: Ray reads the environment when it is imported

    return examine(job, console=shown)
