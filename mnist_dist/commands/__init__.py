"""The commands behind `mnist-dist <job>` and `python -m jobs.<job>`: one module per job.

Owns: the table of jobs and the command `mnist-dist`. Does not own: the work itself, or how a process ends
(`console.run`). Each module has `main(arguments, program=...)`, which returns the keys of the job's JSON line;
`program` is the command as the user called it, for help texts.
"""

import importlib
import sys
from typing import Any, NoReturn

import mnist_dist
from mnist_dist import console
from mnist_dist.errors import ConfigError, suggestion

JOBS = {
    "quickstart": "train a small classifier on the included digits and score images with it, in about a minute",
    "train": "fine-tune a classifier on Ray Train and write it as a bundle",
    "search": "search backbones and hyperparameters on Ray Tune; the winner becomes a bundle",
    "import": "turn a model that was trained elsewhere into a bundle",
    "score": "score images into a Parquet table with exactly one row per image",
    "evaluate": "compute the metrics of a prediction table, or compare two tables",
    "export": "convert a bundle's model to another runtime and compare the two",
    "doctor": "check every node for problems that would break a job",
}
"""Job name -> description."""
MODULES = {"import": "import_model"}
"""Of jobs whose names cannot be names of modules."""
_HELP = """\
usage: mnist-dist JOB [RECIPE] [--flags]

{jobs}

mnist-dist JOB --help lists the flags of a job; mnist-dist --version prints the version."""


def main() -> NoReturn:
    """Runs the command `mnist-dist`."""
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first in ("-h", "--help"):
        print(_HELP.format(jobs="\n".join(f"  {name:<12}{what}" for name, what in JOBS.items())))
        sys.exit()
    if first == "--version":
        print(mnist_dist.__version__)
        sys.exit()
    if first in JOBS:
        _run(first, sys.argv[2:], program=f"mnist-dist {first}")
    console.run(lambda: _refuse(first), job="mnist-dist")


def run_job(job: str) -> NoReturn:
    """Runs `python -m jobs.<job>` with the arguments of this process."""
    _run(job, sys.argv[1:], program=f"python -m jobs.{MODULES.get(job, job)}")


def _run(job: str, arguments: list[str], *, program: str) -> NoReturn:
    module = importlib.import_module(f"{__name__}.{MODULES.get(job, job)}")
    console.run(lambda: module.main(arguments, program=program), job=job)


def _refuse(name: str) -> dict[str, Any]:
    hint = suggestion(name, JOBS)
    raise ConfigError(f"the jobs are {', '.join(JOBS)}{hint}; mnist-dist --help describes them. Received: {name!r}")
