"""python -m jobs.export --bundle DIR --format F: a bundle's model for another runtime, run there and compared."""

from typing import Any

from mnist_dist import console
from mnist_dist.export_config import ExportJob


def main() -> dict[str, Any]:
    """Parses, exports, says where the file is; returns the job's JSON keys."""
    _, job = console.parse({"export": ExportJob}, command="python -m jobs.export", default="export")
    shown = console.Console(verbose=job.verbose)
    console.quiet(verbose=job.verbose)
    from mnist_dist.engines.export import export_bundle

    return export_bundle(job, console=shown)


if __name__ == "__main__":
    console.run(main, job="export")
