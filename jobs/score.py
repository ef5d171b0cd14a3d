"""python -m jobs.score --bundle DIR --input URI [URI ...] --output URI: scores images into a Parquet table."""

from typing import Any

from mnist_dist import console
from mnist_dist.config import ScoreJob


def main() -> dict[str, Any]:
    """Parses, scores, says where the table is and how to read it; returns the job's JSON keys."""
    _, job = console.parse({"score": ScoreJob}, command="python -m jobs.score", default="score")
    shown = console.Console(verbose=job.run.verbose)
    console.quiet(verbose=job.run.verbose)
    from mnist_dist.on_ray.score import score  # after `quiet`: Ray reads the environment when it is imported

    result = score(job, console=shown)
    if not job.run.dry_run:
        shown.line(
            f"table: {result['output']}\n"
            f"  duckdb -c \"SELECT predicted_class, count(*) FROM '{result['output']}/part-*.parquet' GROUP BY 1\"\n"
            f"  python -c \"import pandas; print(pandas.read_parquet('{result['output']}'))\""
        )
    return result


if __name__ == "__main__":
    console.run(main, job="score")
