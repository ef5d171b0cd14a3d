"""mnist-dist evaluate --predictions URI | --bundle DIR --input URI: computes metrics of a table or a bundle."""

from collections.abc import Sequence
from typing import Any

from mnist_dist import command_line, console
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.score_config import EngineConfig, InputConfig, ScoreJob, ScoreRunConfig, TableConfig


def main(arguments: Sequence[str], *, program: str) -> dict[str, Any]:
    """Parses the command line, evaluates and shows a summary; returns the job's JSON keys."""
    _, job = command_line.parse({"evaluate": EvaluateJob}, argv=arguments, command=program, default="evaluate")
    shown = console.Console(verbose=job.verbose)
    console.quiet(verbose=job.verbose)
    return run(job, shown)


def run(job: EvaluateJob, shown: console.Console) -> dict[str, Any]:
    """Scores the images first if some are given, evaluates and writes the report; returns the job's JSON keys."""
    from mnist_dist.evaluation.evaluate import evaluate  # After parsing, so that `--help` does not load scikit-learn.
    from mnist_dist.evaluation.pages import write_evaluation_page

    if job.input:
        _score(job, shown)
    result = evaluate(job, console=shown, report=write_evaluation_page)
    shown.line(f"report: {result['report']}")
    return result


def _score(job: EvaluateJob, shown: console.Console) -> None:
    """Scores the images, or resumes scoring them."""
    from mnist_dist.evaluation.evaluate import check_named
    from mnist_dist.on_ray.scoring.score import score  # Imported here because evaluating a table does not need Ray.
    from mnist_dist.sources.places import columns_of, place_of

    check_named(job)
    uri_column = job.uri_column if job.labels is None else InputConfig.uri_column
    has_labels = job.labels is None and all(
        job.label_column in columns_of(place_of(name), uri_column=uri_column) for name in job.input
    )
    carry = (job.label_column,) if has_labels else ()
    inputs = InputConfig(input=job.input, carry=carry, image_column=job.image_column, uri_column=uri_column)
    run = ScoreRunConfig(verbose=job.verbose)
    scoring = ScoreJob(
        bundle=str(job.bundle),
        inputs=inputs,
        output=job.table_uri,
        table=TableConfig(threshold=job.threshold),
        engine=EngineConfig(tta=job.tta),
        store=job.store,
        run=run,
    )
    score(scoring, console=shown)
