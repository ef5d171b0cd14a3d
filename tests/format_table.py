"""The table of image formats in docs/images.md, from decoding a file of each kind: `python tests/format_table.py`
writes it anew. `test_format_table.py` compares.

Owns: which kinds the table shows, and their names. Does not own: the files (`specimens`, `tiffs`).
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import heics
import numpy as np
import specimens
from tiffs import Tiff, tiff

from mnist_dist.errors import ImageError
from mnist_dist.images.decoder import decode_image
from mnist_dist.images.formats import FORMATS, Open, format_of
from mnist_dist.images.pixels import NotForMe
from mnist_dist.images.spec import ImageSpec

PAGE = Path(__file__).parents[1] / "docs" / "images.md"
BEGIN, END = "<!-- The table of formats: tests/format_table.py -->\n", "<!-- end of the table -->\n"
EXTRA = ("imagecodecs", "tifffile", "pi_heif")
SPEC = ImageSpec(height_px=32, width_px=32, channels=3)

READ = {
    "JPEG": {
        "baseline, extended and progressive, 8 bits, grey or colour, 4:4:4 to 4:1:1": "jpeg 420 small",
        "CMYK": "jpeg CMYK small",
        "lossless, 8 bits": "jpeg lossless",
        "lossless, other depths up to 16 bits": "jpeg lossless 16",
        "12 bits": "jpeg 12",
    },
    "PNG": {
        "1 to 16 bits, grey, colour, palette, transparent": "png 6 16",
        "one transparent colour": "png 2 16 key",
        "animated": "png animated",
    },
    "GIF": {"all, animated": "gif animated"},
    "BMP": {"1 to 32 bits, run lengths": "bmp rle8", "32 bits whose alpha is 0 everywhere": "bmp v5"},
    "DIB": {"a bitmap without a file header": "dib 24"},
    "WebP": {"lossy, lossless, transparent, animated": "webp animated"},
    "AVIF": {"grey, colour, transparent, animated": "avif alpha"},
    "JPEG 2000": {"JP2 and codestream, 8 and 16 bits, transparent": "jp2 deep"},
    "JPEG XL": {"codestream and container, 8 to 32 bits, transparent, animated": "jxl alpha"},
    "TIFF": {
        "8-bit grey, colour, palette, CMYK, transparent; bilevel": "tiff RGBA",
        "16-bit grey and RGB": "tiff grey16 big",
        "JPEG, LZW, deflate, packbits, G3 and G4, LZMA, Zstandard": "tiff tiff_lzw",
        "2 to 32 bits, of other depths": "tiff grey12",
        "signed integers": "tiff grey i8",
        "floats of 16, 32 and 64 bits, RGB": "tiff float",
        "planar, of 16 bits": "tiff planar16",
        "white is zero, of 16 bits": "tiff white16",
        "more than four bands": "tiff five bands",
        "colours multiplied by alpha, grey": "tiff grey alpha",
        "BigTIFF": "tiff bigtiff",
        "BigTIFF, big endian": "tiff bigtiff big",
        "JPEG 2000, JPEG XL or WebP inside": "tiff jxl",
        "several pages": "tiff pages",
    },
    "PNM": {"PBM, PGM, PPM, as text and binary; grey PFM": "pnm P5 deep"},
}
"""Kinds that are read: the words of the table -> the name of a specimen."""


def files() -> dict[tuple[str, str], bytes]:
    """A file of each kind that the table shows, by format and kind."""
    made = specimens.images()
    read = {(name, kind): made[key] for name, kinds in READ.items() for kind, key in kinds.items()}
    grey = (np.arange(64 * 48) % 251).astype(np.uint8).reshape(48, 64)
    return {
        **read,
        ("HEIF", "HEIC, 8 to 12 bits, grey, colour, transparent"): heics.RGBA,
        ("PNM", "colour PFM"): b"PF\n2 2\n-1.0\n" + bytes(48),
        ("PNM", "PAM"): b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 1\nMAXVAL 255\nENDHDR\n" + bytes(4),
        ("TIFF", "sensor data (DNG, camera raw)"): tiff(grey, Tiff(bits=8, photometric=32803)),
        ("TIFF", "LogLuv"): tiff(grey, Tiff(bits=8, tags=((259, (34676,)), (262, (32845,))))),
        ("TIFF", "JBIG inside"): tiff(grey, Tiff(bits=8, tags=((259, (9,)),))),
        ("TIFF", "complex numbers"): tiff(grey.astype(np.uint64), Tiff(bits=64, tags=((339, (6,)),))),
        ("others", "PDF, SVG, PSD, ICO, camera raw, video"): b"%PDF-1.7 and so on",
    }


def reader(data: bytes) -> str:
    """The library that decodes a file, or why none does."""
    try:
        decode_image(data, SPEC)
    except ImageError as error:
        what = error.message.partition(" (pip")[0].partition(";")[0]
        return what if error.status == "unsupported" else str(error)
    found = format_of(data)
    return next(decoder.library for decoder in found.decoders if _reads(decoder.open, data)) if found else ""


def table() -> str:
    """The table, in Markdown."""
    suffixes = {format.name: ", ".join(f"`{suffix}`" for suffix in format.suffixes) for format in FORMATS}
    order = [*suffixes, "others"]
    lines = ["| format | kinds | read by, or refused | without the extra `formats` |", "|---|---|---|---|"]
    for (name, kind), data in sorted(files().items(), key=lambda item: order.index(item[0][0])):
        whole = reader(data)
        with without_extra():
            bare = reader(data)
        title = f"{name} ({suffixes[name]})" if name in suffixes else name
        lines.append(f"| {title} | {kind} | {whole} | {'the same' if bare == whole else bare} |")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def without_extra() -> Iterator[None]:
    """As where the packages of the extra `formats` are not installed."""
    with mock.patch.dict(sys.modules, dict.fromkeys(EXTRA)):
        yield


def _reads(open_image: Open, data: bytes) -> bool:
    try:
        open_image(data, SPEC).decode()
    except (NotForMe, ImportError):
        return False
    return True


def main() -> None:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
