"""The command `mnist-dist`: its jobs, what it refuses, and the wheel that installs it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from harness import ROOT, run_command

import mnist_dist
from mnist_dist.commands import JOBS, MODULES
from mnist_dist.commands.train import _epochs
from mnist_dist.recipes import quickstart


def mnist_dist_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mnist_dist", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [("--help",), ()])
def test_the_help_lists_the_jobs(arguments: tuple[str, ...]) -> None:
    done = mnist_dist_command(*arguments)
    assert done.returncode == 0
    for job, what in JOBS.items():
        assert f"  {job:<12}{what}\n" in done.stdout


def test_each_job_is_also_a_file_that_is_submitted() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"} == {
        MODULES.get(job, job) for job in JOBS
    }


def test_the_version_is_printed() -> None:
    assert mnist_dist_command("--version").stdout == f"{mnist_dist.__version__}\n"


def test_a_job_that_does_not_exist_is_refused() -> None:
    code, result, err = run_command("mnist_dist", "scoer", "--input", "x")
    assert (code, result["error_type"]) == (2, "ConfigError")
    assert "(did you mean score?)" in result["error"]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("module", "program"), [("jobs.train", "python -m jobs.train"), ("mnist_dist train", "mnist-dist train")]
)
def test_the_help_of_a_job_names_it_as_it_was_called(module: str, program: str) -> None:
    command = [sys.executable, "-m", *module.split(), "quickstart", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: {program} ")


def built_wheel(folder: Path) -> Path:
    """A wheel of the package, built from a copy, so that the checkout stays as it is."""
    source = folder / "source"
    shutil.copytree(ROOT / "mnist_dist", source / "mnist_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(source)]
    subprocess.run(pip, check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_gives_the_command_in_a_fresh_venv_and_an_empty_folder(tmp_path: Path) -> None:
    wheel = built_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"mnist_dist", "mnist_dist-0.1.0.dist-info"}
    of_pages = {f"mnist_dist/evaluation/{name}" for name in ("report.html.j2", "page.css", "filter_images.js")}
    assert {"mnist_dist/py.typed", *of_pages} <= set(names)

    venv, empty = tmp_path / "venv", tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--quiet", str(wheel)], check=True)
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    # the packages that it needs, from here; an editable installation of this checkout is not found through such a file
    (Path(site.strip()) / "here.pth").write_text(sysconfig.get_path("purelib"))

    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        command = [str(venv / "bin" / "mnist-dist"), "quickstart"]
        code = subprocess.run(command, cwd=empty, env=environment, stdout=out, stderr=err).returncode
    assert code == 0, (tmp_path / "err").read_text()
    result = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    assert (result["job"], result["images_scored"]) == ("quickstart", 500)
    assert result["bundle"] == str(empty / "runs" / "quickstart" / "bundle")
    assert "mnist-dist score --bundle" in (tmp_path / "err").read_text()
    shown = subprocess.run(
        [python, "-c", f"import mnist_dist; print(mnist_dist.__file__, mnist_dist.load_bundle({result['bundle']!r}))"],
        cwd=empty,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith(str(venv))


def test_a_training_that_ended_early_says_why() -> None:
    job = quickstart()
    assert _epochs(15, job) == "15 epochs"
    assert _epochs(9, job).startswith("9 of 15 epochs, since the validation loss did not improve")
    assert _epochs(1, replace(job, run=replace(job.run, dry_run=True))) == "1 epochs"
