"""The commands behind `mnist-dist <job>` and `python -m jobs.<job>`: one module per job.

Owns: the table of jobs and the command `mnist-dist`. Does not own: the work itself, or how a process ends
(`console.run`). Each module has `main(arguments, program=...)`, which returns the keys of the job's JSON line;
`program` is the command as the user called it, for help texts.
"""

import importlib
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import mnist_dist
from mnist_dist import console
from mnist_dist.command_help import SHELLS, completion_script
from mnist_dist.command_line import HELP
from mnist_dist.errors import ConfigError, suggestion
from mnist_dist.flags import flags_of

JOBS = {
    "quickstart": "train a small classifier on the included digits and score images with it, in about a minute",
    "train": "fine-tune a classifier on Ray Train and write it as a bundle",
    "search": "search backbones and hyperparameters on Ray Tune; the winner becomes a bundle",
    "import": "turn a model that was trained elsewhere into a bundle",
    "score": "score images into a Parquet table with exactly one row per image",
    "evaluate": "compute the metrics of a prediction table, or compare two tables",
    "report": "write one page about everything in a storage, with links to all reports",
    "export": "convert a bundle's model to another runtime and compare the two",
    "combine": "make one bundle of several: a soup of their weights, or an ensemble",
    "doctor": "check every node for problems that would break a job",
}
"""Job name -> description."""
MODULES = {"import": "import_model"}
"""Of jobs whose names cannot be names of modules."""
_HELP = """\
usage: mnist-dist JOB [RECIPE] [--flags]

{jobs}

mnist-dist JOB --help lists the flags of a job; mnist-dist --version prints the version;
mnist-dist --completion bash|zsh prints a script that completes jobs, recipes and flags."""


def main() -> NoReturn:
    """Runs the command `mnist-dist`."""
    first, *others = sys.argv[1:] or [""]
    if first in JOBS:
        _run(first, others, program=f"mnist-dist {first}")
    console.run(lambda: _answer(first, others), job="mnist-dist")


def run_job(job: str) -> NoReturn:
    """Runs `python -m jobs.<job>` with the arguments of this process."""
    _run(job, sys.argv[1:], program=f"python -m jobs.{MODULES.get(job, job)}")


def _run(job: str, arguments: list[str], *, program: str) -> NoReturn:
    module = importlib.import_module(f"{__name__}.{MODULES.get(job, job)}")
    fields = {flag.field for kind, _ in kinds().values() for flag in flags_of(kind)}
    console.run(lambda: module.main(arguments, program=program), job=job, fields=fields)


def kinds() -> dict[str, tuple[type, Mapping[str, Any]]]:
    """Job -> its dataclass and its recipes."""
    from mnist_dist.combine_config import CombineJob
    from mnist_dist.commands.quickstart import Quickstart  # All of them here, since a process runs one job only.
    from mnist_dist.config import TrainJob
    from mnist_dist.doctor_config import DoctorJob
    from mnist_dist.evaluate_config import EvaluateJob
    from mnist_dist.export_config import ExportJob
    from mnist_dist.import_config import ImportJob
    from mnist_dist.recipes import SEARCH_RECIPES, TRAINING_RECIPES
    from mnist_dist.report_config import ReportJob
    from mnist_dist.score_config import ScoreJob
    from mnist_dist.search_config import SearchJob

    return {
        "quickstart": (Quickstart, {}),
        "train": (TrainJob, TRAINING_RECIPES),
        "search": (SearchJob, SEARCH_RECIPES),
        "import": (ImportJob, {}),
        "score": (ScoreJob, {}),
        "evaluate": (EvaluateJob, {}),
        "report": (ReportJob, {}),
        "export": (ExportJob, {}),
        "combine": (CombineJob, {}),
        "doctor": (DoctorJob, {}),
    }


def _answer(name: str, others: list[str]) -> NoReturn:
    """Prints what was asked for in place of a job."""
    if not name or name in HELP:
        text = _HELP.format(jobs="\n".join(f"  {name:<12}{what}" for name, what in JOBS.items()))
    elif name == "--version":
        text = mnist_dist.__version__
    elif name == "--completion":
        text = _completion(others)
    else:
        _refuse(name)
    console.answer(text)
    sys.exit(0)


def _completion(others: list[str]) -> str:
    shell = others[0] if others else ""
    if shell not in SHELLS:
        raise ConfigError(f"there is a completion for {' and '.join(SHELLS)}. Received: {shell!r}")
    return completion_script(shell, {job: (kind, tuple(recipes)) for job, (kind, recipes) in kinds().items()})


def _refuse(name: str) -> NoReturn:
    hint = suggestion(name, JOBS)
    raise ConfigError(f"the jobs are {', '.join(JOBS)}{hint}; mnist-dist --help describes them. Received: {name!r}")
