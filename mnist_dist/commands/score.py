"""mnist-dist score --bundle DIR --input URI [URI ...] --output URI: scores images into a Parquet table.

mnist-dist score --list [--storage URI]: lists the prediction tables below a folder or prefix.
"""

import importlib.util
import json
import shlex
from collections.abc import Sequence
from typing import Any

from mnist_dist import command_line, console, inventory
from mnist_dist.score_config import ScoreJob
from mnist_dist.store.uris import is_remote, join

_CLASS = "predicted_class"
_SHOWN = ("uri", _CLASS, "confidence")
_SHOWN_OF_SETS = ("uri", "predicted_classes", "confidences")


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
        shown.line("\n".join([f"table: {result['output']}", *how_to_read(result["output"])]))
    return result


def run(job: ScoreJob, shown: console.Console) -> dict[str, Any]:
    """Scores, or forecasts if the job is a plan; returns the job's JSON keys. Ray is imported here, after `quiet`."""
    if job.run.plan:
        from mnist_dist.on_ray.scoring.plan import plan_score

        return plan_score(job, console=shown)
    from mnist_dist.on_ray.scoring.score import score

    return score(job, console=shown)


def how_to_read(output: str) -> list[str]:
    """Commands that show a finished table, with what is installed here.

    Args:
        output: URI of the scoring job's output.
    """
    from mnist_dist.scoring.predictions import DELTA, TABLE, read_mark, table_schema  # Here: they load pyarrow.

    mark, names = read_mark(output), table_schema(output).names
    shown = _SHOWN_OF_SETS if _SHOWN_OF_SETS[1] in names else _SHOWN
    columns = _literal([name for name in shown if name in names])
    is_delta = mark is not None and mark.folder == DELTA
    if is_delta:
        opened = f"deltalake.DeltaTable({_literal(join(output, DELTA))})"
        read = f"import deltalake; table = {opened}.to_pandas(columns={columns})"
    elif is_remote(output):  # pandas would need a package for each kind of bucket
        opened = f"mnist_dist.read_predictions({_literal(output)}, columns={columns})"
        read = f"import mnist_dist; table = {opened}.to_pandas()"
    else:
        read = f"import pandas; table = pandas.read_parquet({_literal(join(output, TABLE))}, columns={columns})"
    lines = [_python(f"{read}; print(table.head(10).to_string())")]
    if _CLASS in names and not is_delta and not is_remote(output) and importlib.util.find_spec("duckdb") is not None:
        files = _literal(join(output, TABLE, "*.parquet"))
        counted = f'duckdb.read_parquet({files}).aggregate("{_CLASS}, count(*) AS images")'
        lines.append(_python(f"import duckdb; {counted}.show()"))
    return lines


def _python(program: str) -> str:
    return f"  python -c {shlex.quote(program)}"


def _literal(value: Any) -> str:
    """A Python literal in double quotes, since single ones stand around the program."""
    return json.dumps(value, ensure_ascii=False)


def show_tables(listing: inventory.ListJob) -> dict[str, Any]:
    """Shows the prediction tables below a folder or prefix; returns the job's JSON keys."""
    from mnist_dist.scoring.output_row import DEPTH, table_row  # Imported here because it loads pyarrow.

    rows = inventory.rows_below(listing.storage, table_row, depth=DEPTH)
    return inventory.show(rows, job=listing, what="prediction tables", console=console.Console(verbose=listing.verbose))
