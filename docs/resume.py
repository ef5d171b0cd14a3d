"""Draws docs/resume.svg: a scoring job is killed, the same command is typed again, and no row is lost or doubled.

Everything shown really happens: the script makes images, trains a small model, runs the job in a terminal of its own,
sends it SIGKILL, runs it again and counts the rows. `python docs/resume.py`, from the root of a checkout.
"""

import html
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from mnist_dist.sources.arrays import cached_pixels

IMAGES, KILL_AT = 60_000, 0.45  # share of the images
ROOT = Path(__file__).parents[1]
SHOWN = "mnist-dist score --bundle bundle --input digits.tar --output predictions"
COLUMNS, LINE_PX, LEFT_PX, TOP_PX = 92, 19, 16, 44
SECONDS = 16.0
BAR = re.compile(r"([\d,]+) of ([\d,]+) images")
DOTS = ((1, "#ff5f57"), (2, "#febc2e"), (3, "#28c840"))
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
COUNT = "SELECT count(*), count(DISTINCT uri) FROM 'predictions/table/*.parquet'"


@dataclass
class Row:
    """A line of the picture: its texts over time, each with the moment at which it appears, 0 to 1."""

    texts: list[tuple[float, str]]
    colour: str = "#d0d4dc"


def main() -> None:
    """Records the job and writes the picture."""
    with tempfile.TemporaryDirectory(prefix="mnist_dist-picture-") as folder:
        scratch = Path(folder)
        _make(scratch)
        first = list(_run(scratch, kill_at=KILL_AT))
        second = list(_run(scratch, kill_at=None))
        table = pq.read_table(scratch / "predictions" / "table", columns=["uri"])["uri"].to_pylist()
    (ROOT / "docs" / "resume.svg").write_text(_svg(_rows(first, second, rows=len(table), distinct=len(set(table)))))


def _make(scratch: Path) -> None:
    """A tar of digits and a small model."""
    folder, digits = scratch / "digits", cached_pixels("digits", None)
    folder.mkdir()
    for number in range(IMAGES):
        Image.fromarray(digits[number % len(digits), :, :, 0]).save(folder / f"{number:05d}.bmp")
    shutil.make_archive(str(scratch / "digits"), "tar", folder)
    arguments = ["quickstart", "--storage", str(scratch), "--name", "run", "--workers", "1", "--epochs", "2"]
    subprocess.run([sys.executable, "-m", "jobs.train", *arguments], cwd=ROOT, check=True, capture_output=True)


def _run(scratch: Path, *, kill_at: float | None) -> Iterator[str]:
    """What the job writes to its terminal, line by line and bar by bar, until it ends or is killed."""
    flags = {"bundle": scratch / "run" / "bundle", "input": scratch / "digits.tar", "output": scratch / "predictions"}
    command = [sys.executable, "-m", "jobs.score", "--engine", "keras"]
    command += [word for name, path in flags.items() for word in (f"--{name}", str(path))]
    reader, writer = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm"}
    options = {"stdin": writer, "stdout": subprocess.DEVNULL, "stderr": writer, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **options) as process:
        os.close(writer)
        for text in _texts(reader):
            yield text.replace(f"{scratch}/", "")
            if kill_at is not None and _share(text) >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
                break
    os.close(reader)


def _share(text: str) -> float:
    """How much of the job a bar shows, 0 to 1; 0 where it is none."""
    counts = BAR.search(text)
    done, total = (int(count.replace(",", "")) for count in counts.groups()) if counts else (0, 1)
    return done / total


def _texts(reader: int) -> Iterator[str]:
    rest = ""
    while True:
        try:
            rest += os.read(reader, 4096).decode(errors="replace")
        except OSError:  # The other end is closed.
            return
        *whole, rest = re.split(r"\r\n|\r|\n", rest)
        for text in whole:
            clean = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip()
            if clean:
                yield clean


def _rows(first: list[str], second: list[str], *, rows: int, distinct: int) -> list[Row]:
    """The picture's lines, from what was recorded."""
    prompt = "#7ee787"
    return [
        Row([(0.02, f"$ {SHOWN}")], prompt),
        _bar(first, start=0.08, end=0.36),
        Row([(0.38, "Killed")], "#ff7b72"),
        Row([(0.44, f"$ {SHOWN}")], prompt),
        Row([(0.50, next(line for line in second if "already done" in line).split(":")[0])]),
        _bar(second, start=0.54, end=0.80),
        Row([(0.82, next(line for line in second if re.match(r"[\d,]+ rows: ", line)))]),
        Row(
            [(0.88, "$ duckdb -c \"SELECT count(*), count(DISTINCT uri) FROM 'predictions/table/*.parquet'\"")], prompt
        ),
        Row([(0.93, f"{rows:,}  {distinct:,}")], "#ffffff"),
    ]


def _bar(lines: list[str], *, start: float, end: float) -> Row:
    """The bar's states, evenly over a time."""
    bars = list(dict.fromkeys(line for line in lines if _share(line)))
    chosen = [bars[index] for index in np.linspace(0, len(bars) - 1, min(len(bars), 12)).round().astype(int)]
    return Row([(start + (end - start) * index / len(chosen), text[:COLUMNS]) for index, text in enumerate(chosen)])


def _svg(rows: list[Row]) -> str:
    """The picture: without animation, as in print, it shows the end."""
    drawn = [_text(row, number, index) for number, row in enumerate(rows) for index in range(len(row.texts))]
    styles, texts = "".join(style for style, _ in drawn), "".join(text for _, text in drawn)
    height, width = TOP_PX + LINE_PX * len(rows) + 12, 2 * LEFT_PX + int(COLUMNS * 7.85)
    dots = "".join(f'<circle cx="{18 * place}" cy="18" r="5.5" fill="{colour}"/>' for place, colour in DOTS)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="A scoring job is killed; the same command resumes it; each image has one row">'
        f"<style>text{{font:13px {FONT};white-space:pre}}{styles}</style>"
        f'<rect width="{width}" height="{height}" rx="8" fill="#161b22"/>{dots}{texts}</svg>\n'
    )


def _text(row: Row, number: int, index: int) -> tuple[str, str]:
    """The style and the element of one of a row's texts, which is gone when the next one appears."""
    begin, text = row.texts[index]
    is_last = index == len(row.texts) - 1
    end, at_end = (1.0, 1) if is_last else (row.texts[index + 1][0], 0)
    name, y = f"t{number}x{index}", TOP_PX + LINE_PX * (number + 1) - 6
    frames = f"0%{{opacity:0}}{100 * begin:.2f}%{{opacity:1}}{100 * end:.2f}%{{opacity:{at_end}}}"
    frames += "" if is_last else "100%{opacity:0}"
    animation = f"animation:{name} {SECONDS}s step-end infinite"
    style = f"@keyframes {name}{{{frames}}}#{name}{{opacity:{at_end};{animation}}}"
    return style, f'<text id="{name}" x="{LEFT_PX}" y="{y}" fill="{row.colour}">{_coloured(text)}</text>'


def _coloured(text: str) -> str:
    """The text; of a bar, what is done is bright, as on a terminal."""
    bar = re.search("[━╸╺]+", text)
    if bar is None:
        return html.escape(text)
    done = round(len(bar[0]) * _share(text))
    parts = (("#58a6ff", done), ("#30363d", len(bar[0]) - done))
    drawn = "".join(f'<tspan fill="{colour}">{"━" * length}</tspan>' for colour, length in parts)
    return f"{html.escape(text[: bar.start()])}{drawn}{html.escape(text[bar.end() :])}"


if __name__ == "__main__":
    main()
