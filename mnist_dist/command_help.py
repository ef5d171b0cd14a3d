"""The text of `--help` and the scripts of shell completion, made from the flags of the jobs."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from mnist_dist.flags import Flag, flags_of, typed
from mnist_dist.recipes import RECIPE_INFOS

MAX_COLUMNS = 100  # Longer lines are hard to read.
_INDENT = 6


def help_of_job(
    kind: type,
    base: Any,
    *,
    command: str,
    name: str,
    recipes: Mapping[str, Callable[..., Any]],
    also: str | None = None,
) -> str:
    """The help text of a job, as wide as the terminal.

    Args:
        kind: the job's dataclass.
        base: the recipe's job, whose values are the defaults; None: the job has no recipes.
        command: the program as the user called it.
        name: name of the recipe.
        recipes: all recipes of the job.
        also: an extra paragraph.
    """
    columns, flags = min(shutil.get_terminal_size().columns, MAX_COLUMNS), flags_of(kind)
    parts = [_usage(flags, command, has_recipes=len(recipes) > 1), _described(recipes[name], command)]
    if len(recipes) > 1:
        parts.append(_recipes(recipes, default=name))
    if also:
        parts.append(also)
    text = "\n\n".join(_filled(part, columns) for part in parts if part)
    fields = {flag.field for flag in flags}
    groups = list(dict.fromkeys(flag.group for flag in flags))
    for group in groups:
        own = [flag for flag in flags if flag.group is group]
        about = "" if group is kind else inspect.getdoc(group) or ""
        entries = "\n".join(_entry(flag, _default(flag, base), fields, columns) for flag in own)
        text += f"\n\n{_filled(about, columns)}\n{entries}" if about else f"\n\n{entries}"
    return text


def _usage(flags: Sequence[Flag], command: str, *, has_recipes: bool) -> str:
    required = [f"{flag.name} {flag.values}".strip() for flag in flags if flag.is_required and not flag.is_positional]
    positional = [flag.name for flag in flags if flag.is_positional]
    return " ".join([f"usage: {command}", *(["[RECIPE]"] if has_recipes else []), *positional, *required, "[--flags]"])


def _recipes(recipes: Mapping[str, Callable[..., Any]], *, default: str) -> str:
    """A line for each recipe: what it is, what it needs and about how long it takes."""
    width = max(map(len, recipes)) + 2
    lines = [f"  {name:<{width}}{_about(name, recipe)}" for name, recipe in recipes.items()]
    title = f"Recipes, with what they need and how long they take on 2 cores (the defaults below: of {default}):"
    return "\n".join([title, *lines])


def _about(name: str, recipe: Callable[..., Any]) -> str:
    info = RECIPE_INFOS.get(name)
    if info is None:
        return " ".join((inspect.getdoc(recipe) or "").split("\n\n")[0].split())
    return "; ".join(part for part in (info.summary, f"needs {info.needs}", info.takes) if part)


def _described(recipe: Callable[..., Any], command: str) -> str:
    """The docstring of a recipe or job, with the command as it was called."""
    text = inspect.getdoc(recipe) or ""
    return re.sub(r"^python -m jobs\.\w+", command, text)


def _filled(text: str, columns: int) -> str:
    """The text with its lines wrapped, and lines that begin with blanks kept as a table."""
    filled = list[str]()
    for block in text.split("\n\n"):
        lines = block.split("\n")
        if any(line.startswith("  ") for line in lines[1:]) and not block.startswith("usage"):
            rows = [_wrapped_row(line, columns) if line.startswith("  ") else _joined(line, columns) for line in lines]
            filled.append("\n".join(rows))
        else:
            filled.append(_joined(block, columns))
    return "\n\n".join(filled)


def _joined(text: str, columns: int) -> str:
    return textwrap.fill(" ".join(text.split()), columns, break_long_words=False)


def _wrapped_row(line: str, columns: int) -> str:
    column = len(line) - len(line.lstrip()) + len(line.lstrip().partition("  ")[0])
    column += len(line[column:]) - len(line[column:].lstrip())
    return textwrap.fill(line, columns, subsequent_indent=" " * column, break_long_words=False)


def _entry(flag: Flag, default: str, fields: Container[str], columns: int) -> str:
    names = ", ".join(flag.spellings) if flag.is_switch else ", ".join((flag.name, *flag.aliases))
    head = f"  {names} {flag.values}".rstrip()
    indent = " " * _INDENT
    body = f"{description(flag, fields)} {default}".strip()
    return (
        textwrap.fill(head, columns, subsequent_indent=" " * _INDENT, break_long_words=False, break_on_hyphens=False)
        + "\n"
        + textwrap.fill(
            body,
            columns,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def description(flag: Flag, fields: Container[str]) -> str:
    """What a flag does, for whoever types flags: `other_field` is another flag, and `None` is left out.

    Args:
        flag: the flag.
        fields: the fields of all flags of the job.
    """

    def spelled(match: re.Match[str]) -> str:
        name = match[1]
        return f"--{name.replace('_', '-')}" if name in fields and name not in flag.choices else match[0]

    return re.sub(r"`([a-z0-9_]+)`", spelled, flag.help).replace("None: ", "Without it: ")


def default_of(flag: Flag, base: Any = None) -> str:
    """The value that holds without the flag, as it is typed; empty where the description says it.

    Args:
        flag: a flag that is not required.
        base: the job of a recipe, whose values are the defaults; None: those of the flag's dataclass.
    """
    value = _value(flag, base if base is not None else flag.group)
    if value is None or value == () or value is False:
        return ""
    return typed(flag.field, value).partition(" ")[2] or "yes"


def _default(flag: Flag, base: Any) -> str:
    if flag.is_required:
        return "(required)"
    value = default_of(flag, base)
    return f"(default: {value})" if value else ""


def _value(flag: Flag, holder: Any) -> Any:
    """The value of the flag's field in a job, or in the defaults of its dataclass."""
    if isinstance(holder, type):
        return holder.__dataclass_fields__[flag.field].default  # type: ignore[attr-defined]
    if isinstance(holder, flag.group):
        return getattr(holder, flag.field)
    inner = (getattr(holder, name) for name in holder.__dataclass_fields__)
    return next(_value(flag, each) for each in inner if _holds(each, flag.group))


def _holds(value: Any, group: type) -> bool:
    return isinstance(value, group)


# --- shell completion ------------------------------------------------------------------------------------------------

SHELLS = ("bash", "zsh")
_SCRIPT = """\
# Completion of mnist-dist: `source <(mnist-dist --completion {shell})` in the shell's start-up file.
{start}_mnist_dist() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{jobs}" -- "$current")); return
  fi
  case "${{COMP_WORDS[1]}} $before" in
{choices}
  esac
  if [ -n "$words" ] && [ "${{current#-}}" = "$current" ]; then
    COMPREPLY=($(compgen -W "$words" -- "$current")); return
  fi
  case "${{COMP_WORDS[1]}}" in
{flags}
  esac
  case "$current" in
    -*) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;
    *) COMPREPLY=($(compgen -f -- "$current")) ;;
  esac
}}
complete -o filenames -F _mnist_dist mnist-dist"""


def completion_script(shell: str, jobs: Mapping[str, tuple[type, Sequence[str]]]) -> str:
    """A script that completes jobs, recipes, flags, their choices and file names.

    Args:
        shell: `bash` or `zsh`.
        jobs: job name -> its dataclass and the names of its recipes.
    """
    choices, flags = list[str](), list[str]()
    for job, (kind, recipes) in jobs.items():
        of_job = flags_of(kind)
        if recipes:
            choices.append(_case(f"{job} {job}", recipes))
        choices += [_case(f"{job} {flag.name}", flag.choices) for flag in of_job if flag.choices]
        flags.append(_case(job, [spelling for flag in of_job if not flag.is_positional for spelling in flag.spellings]))
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return _SCRIPT.format(
        shell=shell, start=start, jobs=" ".join(jobs), choices="\n".join(choices), flags="\n".join(flags)
    )


def _case(pattern: str, words: Iterable[str]) -> str:
    return f'    "{pattern}") words="{" ".join(words)}" ;;'
