"""The Python API: one function per command, which returns a small result object.

Each function takes the flags of its command as keyword arguments, prints nothing unless `show` is set, and raises the
exceptions of `errors.py`. A second call with the same arguments resumes a stopped job, or returns at once if it is
finished.

SIGINT (Ctrl-C, a notebook's stop button) saves the progress and raises `Interrupted`; a second one raises
KeyboardInterrupt.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

from mnist_dist import console
from mnist_dist.combine_config import CombineJob
from mnist_dist.command_line import find_recipe
from mnist_dist.config import CombineMethod, TrainJob
from mnist_dist.evaluate_config import EvaluateJob
from mnist_dist.export_config import ExportFormat, ExportJob
from mnist_dist.import_config import ImportJob
from mnist_dist.keywords import job_of, takes_fields_of
from mnist_dist.recipes import SEARCH_RECIPES, TRAINING_RECIPES
from mnist_dist.report_config import ReportJob
from mnist_dist.results import (
    CombineResult,
    EvaluateResult,
    ExportResult,
    ImportResult,
    ReportResult,
    ScoreResult,
    SearchResult,
    TrainResult,
)
from mnist_dist.score_config import ScoreJob
from mnist_dist.search_config import SearchJob

Uri = str | PathLike[str]


@takes_fields_of(TrainJob)
def train(recipe: str | None = None, *, show: bool = False, **flags: Any) -> TrainResult:
    """Fine-tunes a classifier, as `mnist-dist train` does.

    Args:
        recipe: named settings that the flags override; see `mnist_dist.recipes.TRAINING_RECIPES`. None: one that fits
            `data`, or `quickstart` without data.
        show: report progress on stderr.
        **flags: the flags of the command, such as `data`, `backbone`, `epochs`, `storage`, `name`, `workers`.

    Raises:
        ConfigError: a flag, the data or the cluster cannot be used; found before any work starts.
        ResumeConflict: the run's folder holds a run with other settings.
        Locked: another driver is working on it.
        Interrupted: a signal arrived; everything is saved.
        MnistDistError: see `errors`.
    """

    def build(name: str | None) -> TrainJob:
        return job_of(TrainJob, flags, base=find_recipe(TRAINING_RECIPES, name or "quickstart")())

    from mnist_dist.commands.recipe_choice import choose_training

    chosen = choose_training(build, recipe=recipe, flags=flags)
    with _shown(show, verbose=chosen.job.run.verbose) as shown:
        from mnist_dist.commands.train import run

        if chosen.why is not None:
            shown.line(chosen.why)
        return TrainResult(run(chosen.job, chosen.recipe, shown))


@takes_fields_of(SearchJob)
def search(
    recipe: str = "search-digits", *, space: Uri | Mapping[str, Any] | None = None, show: bool = False, **flags: Any
) -> SearchResult:
    """Searches backbones and hyperparameters, as `mnist-dist search` does.

    Args:
        recipe: named settings that the flags override; see `mnist_dist.recipes.SEARCH_RECIPES`.
        space: the search space: a TOML file, or a dict of the same form (docs/search.md). What it leaves out is as in
            the recipe, and flags override it.
        show: report progress on stderr.
        **flags: the flags of the command, such as `data`, `trials`, `storage`, `name`.

    Raises:
        ConfigError, ResumeConflict, Locked, Interrupted, MnistDistError: see `train`.
    """
    job = job_of(SearchJob, flags, base=find_recipe(SEARCH_RECIPES, recipe)())
    from mnist_dist.commands.recipe_choice import check_fits

    check_fits(recipe, job.data, job.store, flags=flags)
    with _shown(show, verbose=job.run.verbose) as shown:
        from mnist_dist.commands.search import run, with_stated_space

        job = with_stated_space(job, space, recipe=recipe, given=flags)
        return SearchResult(run(job, recipe, shown))


@takes_fields_of(ScoreJob)
def score(*, bundle: Uri, input: Uri | Sequence[Uri], output: Uri, show: bool = False, **flags: Any) -> ScoreResult:
    """Scores images into a prediction table with exactly one row per image, as `mnist-dist score` does.

    Args:
        bundle: the trained model, a folder or a bucket prefix.
        input: folders, globs, prefixes, archives or lists of URIs.
        output: folder or bucket prefix for the table.
        show: report progress on stderr.
        **flags: the other flags of the command, such as `mode`, `top_k`, `engine`, `max_bad_fraction`.

    Raises:
        TooManyBadImages: no row is ok, or more rows are bad than `max_bad_fraction` allows; the table is still written.
        ConfigError, ResumeConflict, Locked, Interrupted, MnistDistError: see `train`.
    """
    job = job_of(ScoreJob, {"bundle": bundle, "input": input, "output": output, **flags})
    with _shown(show, verbose=job.run.verbose) as shown:
        from mnist_dist.commands.score import run

        return ScoreResult(run(job, shown))


@takes_fields_of(EvaluateJob)
def evaluate(predictions: Uri | None = None, *, show: bool = False, **flags: Any) -> EvaluateResult:
    """Computes the metrics of a prediction table, or compares two tables, as `mnist-dist evaluate` does.

    Args:
        predictions: the table; None: `bundle` scores the images of `input` first.
        show: report progress and a short table on stderr.
        **flags: the other flags of the command, such as `labels`, `compare`, `output`.

    Raises:
        DataError: there is no finished table, or the true labels cannot be read.
        ConfigError, Interrupted, MnistDistError: see `train`.
    """
    job = job_of(EvaluateJob, {"predictions": predictions, **flags})
    with _shown(show, verbose=job.verbose) as shown:
        from mnist_dist.commands.evaluate import run

        return EvaluateResult({**run(job, shown), "predictions": job.table_uri})


@takes_fields_of(ReportJob)
def report(storage: Uri = "runs", *, show: bool = False, **flags: Any) -> ReportResult:
    """Writes one page about everything in a storage, as `mnist-dist report` does.

    Args:
        storage: folder or bucket prefix of runs, searches, prediction tables and evaluations.
        show: report what was found on stderr.
        **flags: the other flags of the command: `output`.

    Raises:
        DataError: the storage holds none of these.
        ConfigError, StorageError, MnistDistError: see `train`.
    """
    job = job_of(ReportJob, {"storage": storage, **flags})
    with _shown(show, verbose=job.verbose) as shown:
        from mnist_dist.commands.report import run

        return ReportResult(run(job, shown))


@takes_fields_of(ExportJob)
def export(bundle: Uri, *, format: ExportFormat, show: bool = False, **flags: Any) -> ExportResult:
    """Converts a bundle's model for another runtime and compares the two, as `mnist-dist export` does.

    Args:
        bundle: the trained model, a folder or a bucket prefix.
        format: `saved_model`, `onnx`, `openvino` or `litert`.
        show: report progress on stderr.
        **flags: the other flags of the command: `output`, `tolerance`, `batch_size`.

    Raises:
        BundleError: `bundle` is not a bundle.
        ConfigError, ResumeConflict, Locked, Interrupted, MnistDistError: see `train`.
    """
    job = job_of(ExportJob, {"bundle": bundle, "format": format, **flags})
    with _shown(show, verbose=job.verbose) as shown:
        from mnist_dist.engines.export import export_bundle

        return ExportResult(export_bundle(job, console=shown))


@takes_fields_of(ImportJob)
def import_model(source: Uri, *, output: Uri, show: bool = False, **flags: Any) -> ImportResult:
    """Turns a model that was trained elsewhere into a bundle, as `mnist-dist import` does.

    Args:
        source: a Keras model, a SavedModel, an ONNX file, a Hugging Face folder, `timm:NAME` or `torchvision:NAME`.
        output: folder or bucket prefix for the bundle.
        show: report progress, assumptions and the comparison on stderr.
        **flags: the other flags of the command, such as `classes`, `preset`, `resize`, `check_images`.

    Raises:
        ConfigError: the source cannot be imported, or something is missing that must not be assumed.
        MnistDistError: the bundle would not predict what the original predicts; nothing is written.
        ResumeConflict, Locked, Interrupted: see `train`.
    """
    job = job_of(ImportJob, {"source": source, "output": output, **flags})
    with _shown(show, verbose=job.verbose) as shown:
        from mnist_dist.importing.import_model import import_model as run

        return ImportResult(run(job, console=shown))


@takes_fields_of(CombineJob)
def combine(
    bundles: Sequence[Uri], *, output: Uri, method: CombineMethod, show: bool = False, **flags: Any
) -> CombineResult:
    """Makes one bundle of several, as `mnist-dist combine` does.

    Args:
        bundles: two or more bundles, or runs that hold one.
        output: folder or bucket prefix for the new bundle.
        method: `soup`, `greedy-soup` or `ensemble`.
        show: report progress on stderr.
        **flags: the other flags of the command, such as `data`, `storage`.

    Raises:
        BundleError: one of `bundles` is not a bundle.
        ConfigError: they cannot be combined; the message says which one, what was expected and what came.
        MnistDistError: the model would not predict what its members say; nothing is written.
        ResumeConflict, Locked, Interrupted: see `train`.
    """
    job = job_of(CombineJob, {"bundles": bundles, "output": output, "method": method, **flags})
    with _shown(show, verbose=job.verbose) as shown:
        from mnist_dist.commands.combine import run

        return CombineResult(run(job, shown))


@contextmanager
def _shown(show: bool, *, verbose: bool) -> Iterator[console.Console]:
    shown = console.Console(verbose=verbose, silent=not show, embedded=True)
    if verbose:
        yield shown
        return
    with console.quieted():
        yield shown
