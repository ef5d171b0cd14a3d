"""command_line, command_help, flags: what is typed becomes a job, or a message that says what to type instead."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest
from harness import ROOT, run_command

from mnist_dist import command_line
from mnist_dist.command_help import completion_script, help_of_job
from mnist_dist.commands import JOBS, kinds
from mnist_dist.config import FitConfig, PhasesConfig, TrainJob
from mnist_dist.errors import ConfigError
from mnist_dist.flags import flags_of, spelled_as_typed
from mnist_dist.import_config import ImportJob
from mnist_dist.models.backbones import BACKBONES
from mnist_dist.recipes import TRAINING_RECIPES
from mnist_dist.score_config import ScoreJob

FIELDS = {flag.field for flag in flags_of(TrainJob)}


def plain() -> TrainJob:
    """python -m jobs.test plain: the defaults."""
    return TrainJob()


def long_run() -> TrainJob:
    """python -m jobs.test long-run: more epochs."""
    return TrainJob(phases=PhasesConfig(epochs=(90,)), fit=FitConfig(batch_size=7))


RECIPES: Mapping[str, Callable[[], TrainJob]] = {"plain": plain, "long-run": long_run}


def parse(*argv: str) -> tuple[str, TrainJob]:
    return command_line.parse(RECIPES, command="mnist-dist test", default="plain", argv=argv)


# --- what is right ---------------------------------------------------------------------------------------------------


def test_without_a_name_the_default_recipe_is_taken() -> None:
    assert parse() == ("plain", plain())
    assert parse("--seed", "3") == ("plain", TrainJob(fit=FitConfig(seed=3)))


def test_a_recipe_is_taken_by_its_name() -> None:
    assert parse("long-run") == ("long-run", long_run())


def test_flags_override_the_recipe_and_nothing_else() -> None:
    flags = "--epochs 3 4 --trainable head block4 --dropout 0.25 --no-calibration --drop-duplicates --workers 2"
    name, job = parse("long-run", *flags.split())
    assert name == "long-run"
    assert job.phases == PhasesConfig(epochs=(3, 4), trainable=("head", "block4"))
    assert (job.model.dropout, job.run.calibration, job.data.drop_duplicates, job.run.workers) == (0.25, False, True, 2)
    assert job.fit == long_run().fit


@pytest.mark.parametrize("flags", ["--early-stopping-patience none", "--early-stopping-patience=None"])
def test_none_switches_off_what_takes_a_number(flags: str) -> None:
    assert parse("long-run", *flags.split())[1].fit.early_stopping_patience is None
    assert parse("long-run", *flags.split(), "--weights", "none", "--name", "none")[1].model.weights == "none"


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_an_unknown_recipe_is_reported_with_the_names_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"recipes are plain, long-run \(did you mean long-run\?\)\. .*: 'longrun'$"):
        parse("longrun", "--seed", "1")
    with pytest.raises(ConfigError, match=r"recipes are plain, long-run\. Received: 'zzz'$"):
        parse("zzz")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size x", "--batch-size takes auto or INT. Received: --batch-size x"),
        ("--batch_size=x", "--batch-size takes auto or INT. Received: --batch-size x"),
        ("--batch-size", "--batch-size takes auto or INT. Received: --batch-size"),
        ("--epochs 1 two", "--epochs takes one or more INT. Received: --epochs 1 two"),
        (
            "--optimizer sdg",
            "--optimizer must be one of adam, adamw, sgd (did you mean sgd?). Received: --optimizer",
        ),
        ("--batch-sise 3", "there is no flag of that name (did you mean --batch-size?). Received: --batch-sise"),
        ("--no-calibrate", "there is no flag of that name (did you mean --no-calibration?). Received: --no-calibrate"),
        ("--zzzz=1", "there is no flag of that name (mnist-dist test --help lists the flags). Received: --zzzz=1"),
        ("--plan yes", "an argument without a flag is not expected here (mnist-dist test --help). Received: yes"),
    ],
)
def test_a_wrong_flag_is_named_with_what_it_takes(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(*flags.split())
    assert str(raised.value).startswith(message)


def test_values_that_do_not_fit_are_reported_by_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"^batch_size must be at least 1 image\. Received: batch_size=0$"):
        parse("--batch-size", "0")
    with pytest.raises(ConfigError, match=r"^plateau_patience needs schedule constant\."):
        parse("--schedule", "cosine", "--plateau-patience", "1")


def test_required_flags_that_are_missing_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^required and missing: --bundle, --input \(mnist-dist score --help"):
        command_line.parse({"score": ScoreJob}, command="mnist-dist score", default="score", argv=["--output", "o"])
    with pytest.raises(ConfigError, match=r"^required and missing: SOURCE \(mnist-dist import --help"):
        command_line.parse({"import": ImportJob}, command="mnist-dist import", default="import", argv=["--output", "o"])


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "batch_size must be at least 1 image. Received: batch_size=0",
            "--batch-size must be at least 1 image. Received: --batch-size 0",
        ),
        (
            "epochs, learning_rate and trainable must have one value per phase. Received: epochs=(1, 2), "
            "learning_rate=(0.001,), trainable=('head', 'all')",
            "--epochs, --learning-rate and --trainable must have one value per phase. Received: --epochs 1 2 "
            "--learning-rate 0.001 --trainable head all",
        ),
        (
            "leave out the data that is not there. Received: data=('a b', 'c')",
            "leave out the data that is not there. Received: --data 'a b' c",
        ),
        ("no images. Received: weights=None, plan=False", "no images. Received: --weights (nothing) --no-plan"),
        ("The recipes are plain. Received: 'plian'", "The recipes are plain. Received: 'plian'"),
        ("other. Received: train=0, val=3", "other. Received: train=0, val=3"),
        (
            "space.toml: batch_size must be at least 1 image. Received: batch_size = 0",
            "space.toml: batch_size must be at least 1 image. Received: batch_size = 0",
        ),
        (
            "limit is a word of this. Received: file with limit=3",
            "limit is a word of this. Received: file with limit=3",
        ),
        ("nothing was received", "nothing was received"),
    ],
)
def test_messages_show_settings_as_they_are_typed(message: str, shown: str) -> None:
    assert spelled_as_typed(message, FIELDS) == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --batch-sise 3", "there is no flag of that name (did you mean --batch-size?). Received: --batch-sise"),
        ("train --batch-size 0", "--batch-size must be at least 1 image. Received: --batch-size 0"),
        ("train --list --stroage x", "there is no flag of that name (did you mean --storage?). Received: --stroage"),
        ("score", "required and missing: --bundle, --output, --input (mnist-dist score --help describes them)"),
        ("score photos", "required and missing: --bundle, --output, --input (mnist-dist score --help describes them)"),
        (
            "doctor photos",
            "an argument without a flag is not expected here (mnist-dist doctor --help). Received: photos",
        ),
        ("--completion ksh", "there is a completion for bash and zsh. Received: 'ksh'"),
    ],
)
def test_usage_errors_end_with_2_and_a_json_line_that_says_the_same(arguments: str, message: str) -> None:
    code, result, err = run_command("mnist_dist", *arguments.split())
    assert (code, result["error"], result["error_type"]) == (2, message, "ConfigError")
    assert err == f"error: {message}\n"


# --- help ------------------------------------------------------------------------------------------------------------


def help_text(job: str, monkeypatch: pytest.MonkeyPatch, *, columns: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    kind, recipes = kinds()[job]
    if not recipes:
        return help_of_job(kind, None, command=f"mnist-dist {job}", name=job, recipes={job: kind})
    name, recipe = next(iter(recipes.items()))
    return help_of_job(kind, recipe(), command=f"mnist-dist {job}", name=name, recipes=recipes)


@pytest.mark.parametrize("job", JOBS)
def test_the_help_fits_the_terminal_and_its_lines_are_full(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_text(job, monkeypatch)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for line, after in itertools.pairwise(lines):
        if line.startswith("      ") and after.startswith("      ") and not line.startswith("        "):
            assert len(f"{line} {after.split()[0]}") > 80, f"a break that is not needed: {line!r}"


@pytest.mark.parametrize("job", JOBS)
def test_the_help_describes_every_flag(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_text(job, monkeypatch)
    for flag in flags_of(kinds()[job][0]):
        assert f"\n  {flag.name}" in text
        assert flag.help, f"{flag.name} has no description"


def test_the_help_shows_recipes_and_the_defaults_of_the_one_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        parse("long-run", "--help")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: mnist-dist test [RECIPE] [--flags]\n\nmnist-dist test long-run: more epochs.")
    assert "\n  plain     python -m jobs.test plain: the defaults.\n" in shown
    assert re.search(r"Images per step, summed over all workers[^(]*\(the global batch\)[^(]*\(default: 7\)", shown)


def test_the_usage_line_shows_what_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    assert help_text("import", monkeypatch).startswith("usage: mnist-dist import SOURCE --output TEXT [--flags]\n")
    assert help_text("train", monkeypatch).startswith("usage: mnist-dist train [RECIPE] [--flags]\n")


def test_the_help_names_other_flags_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(help_text("train", monkeypatch).split())
    assert "Multiply the learning rate by --plateau-factor after this many epochs" in text
    assert "`plateau_factor`" not in text


def test_the_help_names_every_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_text("train", monkeypatch)
    assert [name for name in BACKBONES if f"`{name}`" not in text] == []


@pytest.mark.parametrize("job", JOBS)
def test_the_help_of_a_job_is_printed_by_its_command(job: str) -> None:
    done = subprocess.run([sys.executable, "-m", "mnist_dist", job, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: mnist-dist {job} ")


# --- completion ------------------------------------------------------------------------------------------------------


def completed(words: str, *, shell: str = "bash") -> list[str]:
    """What the shell offers for the last word of a command line."""
    jobs = {job: (kind, tuple(recipes)) for job, (kind, recipes) in kinds().items()}
    count = len(words.split(" ")) - 1
    script = f"{completion_script('bash', jobs)}\nCOMP_WORDS=({words}); COMP_CWORD={count}\n_mnist_dist\n"
    done = subprocess.run(
        [shell, "-c", script + 'printf "%s\\n" "${COMPREPLY[@]}"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash; runs wherever there is one")


@needs_bash
def test_the_shell_completes_jobs_recipes_flags_choices_and_files() -> None:
    assert completed("mnist-dist se") == ["search"]
    assert completed("mnist-dist train mnist-cnn") == ["mnist-cnn", "mnist-cnn-bn"]
    assert completed("mnist-dist train --batch") == ["--batch-size"]
    assert completed("mnist-dist train quickstart --no-cal") == ["--no-calibration"]
    assert completed("mnist-dist train --optimizer ada") == ["adam", "adamw"]
    assert completed("mnist-dist score --input pyproj") == ["pyproject.toml"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_command_prints_a_completion_script(shell: str) -> None:
    command = [sys.executable, "-m", "mnist_dist", "--completion", shell]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("bashcompinit" in done.stdout) == (shell == "zsh")
    assert done.stdout.rstrip().endswith("complete -o filenames -F _mnist_dist mnist-dist")
    assert all(recipe in done.stdout for recipe in TRAINING_RECIPES)


# --- streams that are closed -----------------------------------------------------------------------------------------


def with_closed_stream(streams: str, *arguments: str) -> tuple[int, str]:
    """The exit code and stderr of a command whose streams a shell has closed or piped to nobody."""
    command = f"{sys.executable} -m mnist_dist {' '.join(arguments)}"
    piped = "| true; exit ${PIPESTATUS[0]}" if streams == "pipe" else streams
    done = subprocess.run(
        ["bash", "-c", f"{command} {piped}"], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    return done.returncode, done.stderr


@needs_bash
@pytest.mark.parametrize("streams", ["pipe", ">&-", ">/dev/full"])
def test_a_stdout_that_nobody_reads_is_no_error(streams: str) -> None:
    assert with_closed_stream(streams, "train", "--help") == (0, "")
    assert with_closed_stream(streams, "--completion", "bash") == (0, "")
    code, err = with_closed_stream(streams, "train", "--batch-size", "0")
    assert (code, err) == (2, "error: --batch-size must be at least 1 image. Received: --batch-size 0\n")


@needs_bash
@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full"])
def test_a_stderr_that_nobody_reads_is_no_error(streams: str) -> None:
    assert with_closed_stream(streams, "train", "--batch-size", "0") == (2, "")
    assert with_closed_stream(streams, "train", "--list", "--storage", "docs") == (0, "")
