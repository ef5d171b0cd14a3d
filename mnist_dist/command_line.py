"""Turns a command line into a job: a recipe, its flags, and what is said where they are wrong.

Owns: choosing a recipe, applying flags, and usage errors, which name flags as they are typed. Does not own: converting
values (tyro does it), the text of `--help` and shell completion (`command_help.py`), or the end of the process
(`console.run`).
"""

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import tyro

from mnist_dist import console
from mnist_dist.command_help import help_of_job
from mnist_dist.errors import ConfigError, suggestion
from mnist_dist.flags import Flag, flags_of

Job = TypeVar("Job")

HELP = ("-h", "--help")
_ONE_LINE = "10000"  # Columns: tyro then writes each sentence of an error into one line.
_FLAG = re.compile(r"--[a-z][\w-]*")
_MISSING = re.compile(r"^ +(--[\w-]+|[A-Z]+)\b", re.MULTILINE)


def parse(
    recipes: Mapping[str, Callable[..., Job]],
    *,
    command: str,
    default: str,
    argv: Sequence[str],
    also: str | None = None,
) -> tuple[str, Job]:
    """Parses a command line into a recipe and a job with the flags applied.

    Args:
        recipes: recipe name -> function that builds its job; for a job without recipes its class.
        command: the program as the user called it, such as `python -m jobs.train`.
        default: the recipe to use if the command line names none.
        argv: the arguments.
        also: extra help text, for flags that are handled before this is called.

    Returns:
        The recipe's name and the job.

    Raises:
        ConfigError: there is no such recipe or flag, a value is wrong, or a required flag is missing.
        SystemExit: 0 after `--help`.
    """
    arguments = list(argv)
    is_named = len(recipes) > 1 and bool(arguments) and not arguments[0].startswith("-")
    name = arguments.pop(0) if is_named else default
    recipe = find_recipe(recipes, name)
    base = None if isinstance(recipe, type) else recipe()
    kind = cast(type[Job], recipe if base is None else type(base))
    if any(argument in HELP for argument in arguments):
        console.answer(help_of_job(kind, base, command=command, name=name, recipes=recipes, also=also))
        sys.exit(0)
    return name, _parsed(kind, base, arguments, command=command)


def find_recipe(recipes: Mapping[str, Callable[..., Job]], name: str) -> Callable[..., Job]:
    """The builder of a recipe's job.

    Raises:
        ConfigError: unknown name; the message lists all names and suggests a similar one.
    """
    if name not in recipes:
        raise ConfigError(f"The recipes are {', '.join(recipes)}{suggestion(name, recipes)}. Received: {name!r}")
    return recipes[name]


def given_fields(arguments: Sequence[str]) -> frozenset[str]:
    """The fields whose flags are on a command line: `hidden_units` of `--hidden-units`."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    return frozenset(flag.removeprefix("--").replace("-", "_") for flag in flags)


def _parsed(kind: type[Job], base: Job | None, arguments: list[str], *, command: str) -> Job:
    flags, said = flags_of(kind), io.StringIO()
    default: Any = {} if base is None else {"default": base}
    try:
        with contextlib.redirect_stderr(said), _one_line():
            job, unknown = tyro.cli(
                kind,
                args=_with_nothing(arguments, flags),
                prog=command,
                config=(tyro.conf.OmitArgPrefixes,),
                add_help=False,
                return_unknown_args=True,
                **default,
            )
    except SystemExit as end:
        if end.code != 2:  # After `--tyro-print-completion` and the like.
            raise
        cause = _config_error(end)
        raise cause or ConfigError(_usage_error(said.getvalue(), arguments, flags, command=command)) from None
    if unknown:
        raise ConfigError(_unknown_argument(unknown, flags, command=command))
    return cast(Job, job)


def _with_nothing(arguments: Sequence[str], flags: Sequence[Flag]) -> list[str]:
    """The arguments, with `none` as tyro spells it behind flags that take nothing or a number."""
    optional = {spelling for flag in flags if flag.is_number_or_nothing for spelling in flag.spellings}
    read, name = list[str](), ""
    for argument in arguments:
        typed, equals, value = argument.partition("=")
        name = typed.replace("_", "-") if argument.startswith("--") else name
        is_nothing = name in optional and (value if equals else argument).lower() == "none"
        read.append(f"{typed}=None" if is_nothing and equals else "None" if is_nothing else argument)
    return read


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _ONE_LINE
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _config_error(end: BaseException) -> ConfigError | None:
    """The error of a configuration that made tyro exit."""
    cause: BaseException | None = end
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _unknown_argument(unknown: Sequence[str], flags: Sequence[Flag], *, command: str) -> str:
    names = [spelling for flag in flags for spelling in flag.spellings]
    first = next((argument for argument in unknown if argument.startswith("-")), unknown[0])
    if not first.startswith("-"):
        return f"an argument without a flag is not expected here ({command} --help). Received: {shlex.join(unknown)}"
    hint = suggestion(first.partition("=")[0].replace("_", "-"), names)
    there = hint or f" ({command} --help lists the flags)"
    return f"there is no flag of that name{there}. Received: {first}"


def _usage_error(said: str, arguments: Sequence[str], flags: Sequence[Flag], *, command: str) -> str:
    """What tyro says in a box, in one sentence.

    Args:
        said: the box.
        arguments: the command line.
        flags: the flags of the job.
        command: the program as the user called it.
    """
    text = "\n".join(line.strip("│╭╮╰╯─").rstrip() for line in said.splitlines()[1:-1])
    by_name = {spelling: flag for flag in flags for spelling in flag.spellings}
    if "Missing from" in text:
        missing = [name for name in _MISSING.findall(text) if name in by_name]
        return f"required and missing: {', '.join(missing)} ({command} --help describes them)"
    name = next((name for name in _FLAG.findall(text) if name in by_name), None)
    if name is None:
        return " ".join(text.split())
    flag, received = by_name[name], _values_of(name, by_name[name], arguments)
    if flag.choices:
        wrong = next((value for value in received if value not in flag.choices), "")
        allowed = f"must be one of {', '.join(flag.choices)}{suggestion(wrong, flag.choices)}"
    else:
        allowed = f"takes {_in_words(flag.values)}"
    return f"{name} {allowed}. Received: {shlex.join([name, *received])}"


def _in_words(values: str) -> str:
    values = re.sub(r"\{(\w+)\}\|", r"\1 or ", values)
    return f"one or more {values.removesuffix(' ...')}" if values.endswith(" ...") else values or "no value"


def _values_of(name: str, flag: Flag, arguments: Sequence[str]) -> list[str]:
    """What stands behind a flag on the command line."""
    values = list[str]()
    for place, argument in enumerate(arguments):
        typed, equals, _ = argument.replace("_", "-").partition("=")
        if typed in (name, *flag.aliases):
            after = arguments[place + 1 :]
            end = next((i for i, each in enumerate(after) if each.startswith("--")), len(after))
            values = [argument.partition("=")[2]] if equals else list(after[:end])
    return values
