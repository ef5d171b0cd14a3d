"""Writes docs/flags.md: every flag of every job, from the dataclasses that the command line is made of.

`python docs/flags.py` writes the page anew; tests/test_docs.py checks that it is up to date.
"""

import inspect
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from mnist_dist import inventory
from mnist_dist.command_help import default_of, description
from mnist_dist.commands import JOBS, kinds
from mnist_dist.flags import Flag, flags_of

PAGE = Path(__file__).parent / "flags.md"
START = """\
# Flags

<!-- Written by docs/flags.py from the dataclasses behind the command line; change those, and run it again. -->

Every flag of every job, as `mnist-dist <job> --help` shows it. In Python a flag is a keyword argument with underscores
([python.md](python.md)): `--batch-size 64` is `batch_size=64`. Defaults are those without a recipe; a recipe changes
some of them (`mnist-dist train folder-vgg16 --help`). An empty default means no, none, or what the description says.
`TEXT ...` takes several values.
"""
LISTED = ("train", "search", "score")
"""The jobs that can list what there is."""


def page() -> str:
    """The page as Markdown: a section per job, and one for each group of flags that several jobs share."""
    flags = {job: flags_of(kind) for job, (kind, _) in kinds().items()}
    users = _users_of_groups(flags)
    shared = {group: jobs for group, jobs in users.items() if len(jobs) > 1}
    parts = [START, _contents(flags, shared)]
    for job, of_job in flags.items():
        parts.append(_job(job, of_job, shared))
    for group, jobs in shared.items():
        names = ", ".join(f"`{job}`" for job in jobs)
        own = [flag for flag in flags[jobs[0]] if flag.group is group]
        title = _title_of_shared(group)
        parts.append(f"## {title}\n\nOf {names}. {_about(group)}\n\n{_table(own, _fields(flags[jobs[0]]))}")
    return "\n".join(parts)


def _users_of_groups(flags: dict[str, list[Flag]]) -> dict[type, list[str]]:
    """Group of flags -> the jobs that have it, in their order."""
    users = dict[type, list[str]]()
    for job, of_job in flags.items():
        for group in dict.fromkeys(flag.group for flag in of_job):
            users.setdefault(group, []).append(job)
    return users


def _contents(flags: Collection[str], shared: Collection[type]) -> str:
    return " · ".join(map(_link, [*flags, *map(_title_of_shared, shared)])) + "\n"


def _link(title: str) -> str:
    return f"[{title}](#{title.lower().replace(' ', '-')})"


def _job(job: str, flags: Sequence[Flag], shared: dict[type, list[str]]) -> str:
    parts, kind = [f"## {job}\n\n{JOBS[job][0].upper()}{JOBS[job][1:]}.\n"], kinds()[job][0]
    if job in LISTED:
        asked, _, what = inventory.HELP.partition(": ")
        parts.append(f"`{asked}` {what}\n")
    for group in dict.fromkeys(flag.group for flag in flags):
        if group in shared:
            parts.append(f"{_link(_title_of_shared(group))}, listed below.\n")
            continue
        about = "" if group is kind else f"**{_title(group)}**: {_about(group)}\n\n"
        parts.append(f"{about}{_table([flag for flag in flags if flag.group is group], _fields(flags))}")
    return "\n".join(parts)


def _title_of_shared(group: type) -> str:
    return f"{_title(group)} flags"


def _title(group: type) -> str:
    """`Search space` of `SearchSpace`, `Data` of `DataConfig`."""
    words = re.findall(r"[A-Z][a-z]*", group.__name__.removesuffix("Config"))
    return " ".join(words).capitalize()


def _about(group: type) -> str:
    return " ".join((inspect.getdoc(group) or "").split())


def _fields(flags: Sequence[Flag]) -> set[str]:
    return {flag.field for flag in flags}


def _table(flags: Sequence[Flag], fields: Collection[str]) -> str:
    rows = [_row(flag, fields) for flag in flags]
    return "\n".join(["| flag | values | default | what |", "|---|---|---|---|", *rows, ""])


def _row(flag: Flag, fields: Collection[str]) -> str:
    names = ", ".join(f"`{spelling}`" for spelling in flag.spellings)
    default = "required" if flag.is_required else _code(default_of(flag))
    cells = (names, _code(flag.values), default, _cell(description(flag, fields)))
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def _cell(text: str) -> str:
    """Text in which no bar ends the cell."""
    return text.replace("|", r"\|")


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
