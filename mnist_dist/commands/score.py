"""mnist-dist score --bundle DIR --input URI [URI ...] --output URI: scores images into a Parquet table.

mnist-dist score --list [--storage URI]: lists the prediction tables below a folder or prefix.
"""

from collections.abc import Sequence
from typing import Any

from mnist_dist import command_line, console, inventory
from mnist_dist.config import ScoreJob

_HOW_TO_READ = {
    "parquet": "  duckdb -c \"SELECT predicted_class, count(*) FROM '{output}/table/*.parquet' GROUP BY 1\"\n"
    "  python -c \"import pandas; print(pandas.read_parquet('{output}/table'))\"",
    "delta": "  python -c \"import deltalake; print(deltalake.DeltaTable('{output}/delta').to_pyarrow_table())\"",
}


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line, scores and shows how to read the table; returns the job's JSON keys."""
    listing = inventory.asked(program, arguments)
    if listing is not None:
        return show_tables(listing)
    _, job = command_line.parse(
        {"score": ScoreJob}, argv=arguments, command=program, default="score", also=inventory.HELP
    )
    shown = console.Console(verbose=job.run.verbose)
    console.quiet(verbose=job.run.verbose)
    result = run(job, shown)
    if not (job.run.plan or job.run.dry_run):
        shown.line(f"table: {result['output']}\n{_HOW_TO_READ[job.table.table_format].format(**result)}")
    return result


def run(job: ScoreJob, shown: console.Console) -> dict[str, Any]:
    """Scores, or forecasts if the job is a plan; returns the job's JSON keys. Ray is imported here, after `quiet`."""
    if job.run.plan:
        from mnist_dist.on_ray.scoring.plan import plan_score

        return plan_score(job, console=shown)
    from mnist_dist.on_ray.scoring.score import score

    return score(job, console=shown)


def show_tables(listing: inventory.ListJob) -> dict[str, Any]:
    """Shows the prediction tables below a folder or prefix; returns the job's JSON keys."""
    from mnist_dist.scoring.output_row import DEPTH, table_row  # Imported here because it loads pyarrow.

    rows = inventory.rows_below(listing.storage, table_row, depth=DEPTH)
    return inventory.show(rows, job=listing, what="prediction tables", console=console.Console(verbose=listing.verbose))
