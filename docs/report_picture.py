"""Draws docs/report.png: the top of the report that `python -m jobs.quickstart` makes, as Chromium shows it.

The run and its report are real. `python docs/report_picture.py`, from the root of a checkout; needs chromium.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "report.png"
WIDTH_PX, HEIGHT_PX, SCALE = 1100, 1155, 2  # Of the window, in CSS pixels, and how many pixels each of these has.
COLOURS = 128
MAX_BYTES = 200_000
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")


def main() -> None:
    """Runs the quickstart and writes the picture.

    Raises:
        SystemExit: Chromium is not installed, or the picture is larger than a README should load.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("needs chromium, such as that of Debian's package chromium")
    with tempfile.TemporaryDirectory(prefix="mnist_dist-picture-") as folder:
        quickstart = [sys.executable, "-m", "jobs.quickstart", "--storage", folder]
        subprocess.run(quickstart, cwd=ROOT, check=True, capture_output=True)
        report = Path(folder) / "quickstart" / "bundle" / "report.html"
        image = photograph(chromium, report, Path(folder))
    image.quantize(COLOURS).save(PICTURE, optimize=True)
    if PICTURE.stat().st_size > MAX_BYTES:
        raise SystemExit(f"the picture has at most {MAX_BYTES:,} bytes. Received: {PICTURE.stat().st_size:,}")


def photograph(chromium: str, page: Path, scratch: Path) -> Image.Image:
    """The top of a page, in the light scheme, which is Chromium's own without a screen."""
    file = scratch / "screenshot.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--hide-scrollbars", *QUIET]
    command += [f"--user-data-dir={scratch / 'profile'}", f"--window-size={WIDTH_PX},{HEIGHT_PX}"]
    command += [f"--force-device-scale-factor={SCALE}", f"--screenshot={file}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True)
    return Image.open(file).convert("RGB")


if __name__ == "__main__":
    main()
