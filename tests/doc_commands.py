"""The commands of the pages: what stands in the code blocks of README.md and docs/*.md, and within their text.

Owns: finding them, and what they are. Does not own: running them (`test_docs_commands.py`).

A block without a language holds commands and nothing else; drawings and messages are blocks of `text`. Blocks of
`python` and `sql` are programs.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.commands import JOBS, MODULES

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
LANGUAGES = {"": "commands", "python": "python", "sql": "sql", "toml": "", "text": ""}
"""Language of a block -> what it is; empty: nothing that can be run."""
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )?(?:python -m (?:jobs\.\w+|benchmarks)|mnist-dist)\s[^`<]+)`")
_JOB_OF_MODULE = {module: job for job, module in MODULES.items()}


@dataclass(frozen=True)
class Item:
    """A command or a program of a page."""

    page: str
    line: int
    """Line of the page, from 1."""
    kind: str
    """`command`, `python` or `sql`; `inline`: a command within the text."""
    text: str

    @property
    def place(self) -> str:
        """`docs/score.md:4`."""
        return f"{self.page}:{self.line}"

    @property
    def words(self) -> list[str]:
        """The words of a command, without the variables before it."""
        words = [word for word in shlex.split(self.text, comments=True) if word != "&"]
        first = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
        return words[first:]

    @property
    def program(self) -> str:
        """What it starts: `mnist-dist` for a job in either form, `python -m benchmarks`, `pip`, `ray`, ..."""
        if self.kind in ("python", "sql"):
            return self.kind
        words = self.words
        if words[:2] == ["python", "-m"]:
            return "mnist-dist" if words[2].startswith("jobs.") else f"python -m {words[2]}"
        return words[0]

    @property
    def job(self) -> tuple[str, list[str]] | None:
        """Job and arguments, also of a command that `ray job submit` sends; None: it runs none."""
        words = self.words
        if words[:3] == ["ray", "job", "submit"]:
            words = words[words.index("--") + 1 :]
        if words[0] == "mnist-dist":
            return words[1], words[2:]
        if words[:2] == ["python", "-m"] and words[2].startswith("jobs."):
            module = words[2].removeprefix("jobs.")
            return _JOB_OF_MODULE.get(module, module), words[3:]
        return None


def items_of(page: str) -> list[Item]:
    """The commands and programs of a page, in their order.

    Raises:
        ValueError: a block has a language that `LANGUAGES` does not know.
    """
    text = (ROOT / page).read_text()
    found = list[Item]()
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        kind = LANGUAGES.get(match[1])
        if kind is None:
            raise ValueError(f"{page}:{line}: a block is one of {', '.join(LANGUAGES)}. Received: {match[1]!r}")
        if kind == "commands":
            found += _commands(page, line + 1, match[2])
        elif kind:
            found.append(Item(page, line, kind, match[2]))
    prose = _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in _INLINE.finditer(prose):
        command = " ".join(match[1].split())
        if "..." not in command and Item(page, 0, "inline", command).job not in _MENTIONS:
            found.append(Item(page, prose.count("\n", 0, match.start()) + 1, "inline", command))
    return sorted(found, key=lambda item: item.line)


_MENTIONS: list[tuple[str, list[str]]] = [(job, []) for job in JOBS]
"""A job without flags is a name within the text."""


def _commands(page: str, line: int, block: str) -> list[Item]:
    """The commands of a block: continued lines are joined, and what `&&` joins is parted."""
    found, begun, at = list[Item](), "", line
    for number, each in enumerate(block.splitlines(), line):
        at = at if begun else number
        begun += each
        if begun.endswith("\\"):
            begun = begun[:-1].rstrip() + " "
            continue
        found += [Item(page, at, "command", text) for text in _parted(begun)]
        begun = ""
    return found


def _parted(line: str) -> list[str]:
    if not shlex.split(line, comments=True):
        return []
    return [text.strip() for text in re.split(r"\s&&\s", line)]
