"""Images of every format and mode, and rows of manifests, for tests of several modules."""

import io
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image

from mnist_dist.images.pixels import Pixels
from mnist_dist.sources.image_table import COLUMNS

# H = height px, W = width px

H, W = 11, 17
_LAST_BLOCK = b"\x03\x00"  # of a deflate stream, empty


DANGERS = """
import os, pathlib, signal, time
import numpy as np
import simplejpeg

decode_jpeg = simplejpeg.decode_jpeg

def eat():
    held = []
    for size in (2**28, 2**22, 2**16):
        while True:
            try:
                held.append(np.empty(size, np.uint8))
            except MemoryError:
                if size == 2**16:
                    raise
                break

def eat_and_abort():
    try:
        eat()
    except MemoryError:
        os.abort()

def hang():
    pathlib.Path(__file__).with_name("hangs").touch()
    time.sleep(100)

DANGERS = {
    b"killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    b"segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    b"exit": lambda: os._exit(7),
    b"hang": hang,
    b"eat": eat,
    b"abort": eat_and_abort,
}

def dangerous(data, *arguments, **options):
    for name, danger in DANGERS.items():
        if b"danger:" + name in data:
            danger()
    return decode_jpeg(data, *arguments, **options)

simplejpeg.decode_jpeg = dangerous
"""
"""A `sitecustomize.py` for the images of `danger`: Python imports it where its folder is on PYTHONPATH."""


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour_png(red: int, green: int, blue: int) -> bytes:
    return encoded(Image.new("RGB", (W, H), (red, green, blue)), "PNG")


def rgb_pixels(height: int = H, width: int = W) -> Pixels:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 20, columns * 14, 255 - rows * 9 - columns * 5], axis=-1).astype(np.uint8)


def every_format() -> dict[str, bytes]:
    """One image of each format and mode that is decoded in a way of its own."""
    rgb = Image.fromarray(rgb_pixels())
    return {**_jpegs(rgb), **_pngs(rgb), **_others(rgb)}


def _jpegs(rgb: Image.Image) -> dict[str, bytes]:
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "rgb.jpg": encoded(rgb, "JPEG"),
        "fine.jpg": encoded(rgb, "JPEG", quality=98, subsampling=0),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "rotated.jpg": encoded(rgb, "JPEG", exif=rotated),
        "photo.jpg": encoded(Image.fromarray(rgb_pixels(150, 230)), "JPEG"),  # scaled while it is decoded
    }


def _pngs(rgb: Image.Image) -> dict[str, bytes]:
    grey, alpha = rgb.convert("L"), rgb.getchannel("G")
    deep = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
    return {
        "one_bit.png": encoded(grey.convert("1"), "PNG"),
        "grey.png": encoded(grey, "PNG"),
        "rgb.png": encoded(rgb, "PNG"),
        "deep_grey.png": encoded(Image.fromarray(deep), "PNG"),
        "deep_rgb.png": cv2.imencode(".png", np.stack([deep, deep[::-1], deep[:, ::-1]], axis=-1))[1].tobytes(),
        "palette.png": encoded(rgb.quantize(7), "PNG"),
        "palette_transparent.png": encoded(rgb.quantize(7), "PNG", transparency=1),
        "rgba.png": encoded(Image.merge("RGBA", (*rgb.split(), alpha)), "PNG"),
        "grey_alpha.png": encoded(Image.merge("LA", (grey, alpha)), "PNG"),
    }


def _others(rgb: Image.Image) -> dict[str, bytes]:
    grey, second = rgb.convert("L"), Image.new("RGB", (W, H), "blue")
    deep = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
    rgba = Image.merge("RGBA", (*rgb.split(), rgb.getchannel("R")))
    frames: dict[str, Any] = {"save_all": True, "append_images": [second]}
    return {
        "lossy.webp": encoded(rgb, "WEBP"),
        "lossless.webp": encoded(rgb, "WEBP", lossless=True),
        "rgba.webp": encoded(rgba, "WEBP", lossless=True),
        "frames.webp": encoded(rgb, "WEBP", lossless=True, **frames),
        "palette.gif": encoded(rgb.quantize(7), "GIF"),
        "frames.gif": encoded(rgb, "GIF", **frames),
        "rgb.bmp": encoded(rgb, "BMP"),
        "one_bit.bmp": encoded(grey.convert("1"), "BMP"),
        "pages.tif": encoded(rgb, "TIFF", **frames),
        "deep.tif": encoded(Image.fromarray(deep), "TIFF"),
        "float.tif": encoded(Image.fromarray(deep.astype(np.float32)), "TIFF"),
        "cmyk.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "lzw.tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "rgb.ppm": encoded(rgb, "PPM"),
        "grey.pgm": encoded(grey, "PPM"),
        "deep.pgm": encoded(Image.fromarray(deep), "PPM"),
        "one_bit.pbm": encoded(grey.convert("1"), "PPM"),
    }


def danger(name: str) -> bytes:
    """A JPEG that does to a process with `DANGERS` what its name says, and is harmless to others."""
    return encoded(Image.fromarray(rgb_pixels()), "JPEG", comment=f"danger:{name}".encode())


def flat_png(width: int, height: int, *, bits: int, channels: int) -> bytes:
    """Black, of as many pixels as one likes: a hundredth of it is compressed, and repeated."""
    rows = bytes((1 + (width * channels * bits + 7) // 8) * (height // 100))
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = deflate.compress(rows) + deflate.flush(zlib.Z_FULL_FLUSH)
    checksum = 1
    for _ in range(100):
        checksum = zlib.adler32(rows, checksum)
    stream = b"\x78\x9c" + block * 100 + _LAST_BLOCK + struct.pack(">I", checksum)
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if channels == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", stream) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def slow_pgm(side_px: int) -> bytes:
    """Numbers as text, which only Python itself reads: slow for its size."""
    return b"P2 %d %d 255\n" % (side_px, side_px) + b"7 " * side_px**2


def tar_of(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def manifest_rows(uris: Sequence[str], **columns: Sequence[Any]) -> pa.Table:
    """Rows of `COLUMNS`: files of which nothing else is known, unless a column says so."""
    values = {"uri": uris, **columns}
    arrays = [
        pa.array(values[field.name], field.type) if field.name in values else pa.nulls(len(uris), field.type)
        for field in COLUMNS
    ]
    return pa.table(arrays, schema=COLUMNS)
