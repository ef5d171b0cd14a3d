"""Copies the figures of README.md from docs/performance.md, where all of them live.

`python docs/figures.py` rewrites README.md; a figure stands there as `<!--name-->12.3<!--/-->`. tests/test_docs.py
checks that it is up to date.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    "score": "**`jobs.score`** (OpenVINO float32)",
    "ray": "Ray's `read_images` recipe",
    "daft": "Daft",
}
"""The row of each figure, by its first column in the table of scoring; the figure is in the second one, images/s."""
SECTION = "## Scoring"
FIGURE = re.compile(r"(<!--(\w+)-->)([^<]*)(<!--/-->)")


def with_figures(readme: str, performance: str) -> str:
    """The README with each figure as in the other page.

    Raises:
        KeyError: a figure is not among `SOURCES`, or its row is gone.
    """
    _, section = performance.split(f"\n{SECTION}\n", 1)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    values = {row[0]: row[1].strip("*") for row in cells if len(row) > 1}
    return FIGURE.sub(lambda match: f"{match[1]}{values[SOURCES[match[2]]]}{match[4]}", readme)


def main() -> None:
    """Rewrites README.md."""
    readme = ROOT / "README.md"
    readme.write_text(with_figures(readme.read_text(), (ROOT / "docs" / "performance.md").read_text()))


if __name__ == "__main__":
    main()
