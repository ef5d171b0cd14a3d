"""python -m jobs.doctor [--storage URI] [--json]: says what would break a job, on every node, and what to do."""

from typing import Any

from mnist_dist import console
from mnist_dist.doctor_config import DoctorJob


def main() -> dict[str, Any]:
    """Parses, looks at everything, shows it; returns the job's JSON keys."""
    _, job = console.parse({"doctor": DoctorJob}, command="python -m jobs.doctor", default="doctor")
    shown = console.Console(verbose=job.verbose)
    console.quiet(verbose=job.verbose)
    from mnist_dist.on_ray.doctor.doctor import examine  # after `quiet`: Ray reads the environment when it is imported

    return examine(job, console=shown)


if __name__ == "__main__":
    console.run(main, job="doctor")
