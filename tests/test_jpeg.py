"""jpeg: which files libjpeg-turbo is given, and which of its complaints are harmless."""

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mnist_dist.errors import ImageError
from mnist_dist.images.decoder import decode_image, probe_image
from mnist_dist.images.jpeg import open_ordinary, read_header
from mnist_dist.images.pixels import NotForMe, Pixels
from mnist_dist.images.spec import ImageSpec

WIDTH, HEIGHT = 80, 64
SPEC = ImageSpec(height_px=HEIGHT, width_px=WIDTH, channels=3)
EOI = b"\xff\xd9"


def photo(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or photo()).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def after_start(data: bytes, more: bytes) -> bytes:
    return data[:2] + more + data[2:]


def exif(orientation: int) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return segment(0xE1, b"Exif\0\0" + made.tobytes().removeprefix(b"Exif\0\0"))


def decoded(data: bytes) -> Pixels:
    return decode_image(data, SPEC).pixels


KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_blocks": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ordinary_files_go_to_libjpeg_turbo(kind: str, mode: str) -> None:
    data = jpeg(photo().convert(mode), **({} if mode == "L" and "subsampling" in KINDS[kind] else KINDS[kind]))
    opened = open_ordinary(data, SPEC)
    assert (opened.width_px, opened.height_px, opened.channels) == (WIDTH, HEIGHT, 1 if mode == "L" else 3)
    np.testing.assert_array_equal(opened.decode(), simplejpeg.decode_jpeg(data, "RGB"))


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411"])
def test_every_ordinary_sampling_is_ordinary(sampling: str) -> None:
    data = simplejpeg.encode_jpeg(np.asarray(photo()), colorsubsampling=sampling)
    np.testing.assert_array_equal(decoded(data), simplejpeg.decode_jpeg(data, "RGB"))
    assert read_header(data).is_ordinary


def lossless_grey(size: int) -> bytes:
    """A lossless JPEG of one grey: every difference to the prediction is 0, which the code 0 stands for."""
    frame = segment(0xC3, struct.pack(">BHHB", 8, size, size, 1) + bytes([1, 0x11, 0]))
    code = segment(0xC4, b"\0" + bytes([1, *[0] * 15]) + b"\0")
    scan = segment(0xDA, bytes([1, 1, 0, 1, 0, 0]))
    return b"\xff\xd8" + frame + code + scan + bytes(size * size // 8) + EOI


@pytest.mark.parametrize("size", [8, 64, 512])
def test_a_lossless_file_is_decoded_by_another_library(size: int) -> None:
    data = lossless_grey(size)
    with pytest.raises(NotForMe, match=r"^8-bit lossless JPEG of 1 component$"):
        open_ordinary(data, SPEC)
    image = decode_image(data, ImageSpec(height_px=5, width_px=7, channels=3))  # far smaller than it is
    assert (image.pixels == 128).all()
    assert (image.width_px, image.height_px) == probe_image(data)[:2] == (size, size)


def test_chroma_of_a_quarter_of_the_height_is_decoded() -> None:
    data = simplejpeg.encode_jpeg(np.full((64, 64, 3), (200, 90, 30), np.uint8), colorsubsampling="411")
    turned = data.replace(
        bytes([3, 1, 0x41, 0, 2, 0x11, 1, 3, 0x11, 1]), bytes([3, 1, 0x14, 0, 2, 0x11, 1, 3, 0x11, 1])
    )
    assert turned != data
    pixels = decode_image(turned, ImageSpec(height_px=64, width_px=64, channels=3)).pixels
    assert abs(pixels.astype(int) - (200, 90, 30)).max() <= 3


# --- rotation --------------------------------------------------------------------------------------------------------


BEFORE_EXIF = {
    "comments": segment(0xFE, bytes(65_500)) + segment(0xFE, bytes(99)),
    "an ICC profile": segment(0xE2, b"ICC_PROFILE\0\1\2" + bytes(65_000))
    + segment(0xE2, b"ICC_PROFILE\0\2\2" + bytes(65_000)),
    "Photoshop's data": segment(0xED, b"Photoshop 3.0\0" + bytes(65_000)) + segment(0xED, bytes(60_000)),
    "other EXIF": segment(0xE1, b"Exif\0\0garbage"),
    "nothing": b"",
}


@pytest.mark.parametrize("before", BEFORE_EXIF)
def test_a_rotation_counts_wherever_it_stands(before: str) -> None:
    data = after_start(jpeg(), BEFORE_EXIF[before] + exif(6))
    assert probe_image(data) == (HEIGHT, WIDTH, 3)
    image = decode_image(data, ImageSpec(height_px=WIDTH, width_px=HEIGHT, channels=3))
    assert (image.width_px, image.height_px) == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(image.pixels, np.rot90(decoded(jpeg()), -1))


@pytest.mark.parametrize("packet", [b'<x tiff:Orientation="8"/>', b"<tiff:Orientation>8</tiff:Orientation>"])
def test_xmp_rotates_where_exif_does_not(packet: bytes) -> None:
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)
    assert probe_image(after_start(jpeg(), xmp)) == (HEIGHT, WIDTH, 3)
    assert probe_image(after_start(jpeg(), exif(3) + xmp)) == (WIDTH, HEIGHT, 3)


# --- harmless and damaged --------------------------------------------------------------------------------------------


def before_end(data: bytes, stray: bytes) -> bytes:
    return data[:-2] + stray + EOI


def before_marker(data: bytes, marker: int, stray: bytes) -> bytes:
    at = data.index(bytes([0xFF, marker]))
    return data[:at] + stray + data[at:]


def with_jfif_version(data: bytes) -> bytes:
    return data.replace(b"JFIF\0\1\1", b"JFIF\0\7\7")


def with_spectrum_end_0(data: bytes) -> bytes:
    at = data.index(b"\xff\xda")
    end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
    return data[: end - 2] + b"\0" + data[end - 1 :]


def with_adobe_transform_2(data: bytes) -> bytes:
    tables = data[data.index(b"\xff\xdb") :]  # no JFIF, which would say how colours are stored
    return b"\xff\xd8" + segment(0xEE, b"Adobe\0\x64\0\0\0\0\2") + tables


HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "some bytes before the end": lambda data: before_end(data, b"\x0e\xd4\x69"),
    "many equal bytes before the end": lambda data: before_end(data, bytes(5_000)),
    "bytes after the start": lambda data: after_start(data, b"padding"),
    "bytes between tables": lambda data: before_marker(data, 0xC4, b"any bytes, however many, " * 20),
    "bytes before the scan": lambda data: before_marker(data, 0xDA, b"\0\0\0"),
    "bytes before the frame and before the end": lambda data: before_end(before_marker(data, 0xC0, b"12"), b"12"),
    "fill bytes": lambda data: before_marker(data, 0xC4, b"\xff\xff\xff"),
    "bytes after the end": lambda data: data + b"whatever" * 99,
    "an unknown JFIF revision": with_jfif_version,
    "an unknown colour transform": with_adobe_transform_2,
    "a spectrum that ends at 0": with_spectrum_end_0,
    "the standard's code tables left out": lambda data: data.replace(b"\xff\xc4", b"\xff\xfe"),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_leaves_the_pixels_intact_is_read(what: str) -> None:
    data = HARMLESS[what](jpeg())
    assert data != jpeg()
    np.testing.assert_array_equal(decoded(data), decoded(jpeg()))


def test_bytes_between_scans_leave_the_pixels_intact() -> None:
    data = jpeg(progressive=True)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    np.testing.assert_array_equal(decoded(data[:second] + b"\1\2\3" + data[second:]), decoded(data))


def scan_of(data: bytes) -> int:
    at = data.rindex(b"\xff\xda")
    return at + 2 + int(struct.unpack_from(">H", data, at + 2)[0])


def without_end_of_scan(data: bytes) -> bytes:
    begin = scan_of(data)
    return data[: begin + (len(data) - begin) // 2] + EOI


def with_swapped_restarts(data: bytes) -> bytes:
    return data.replace(b"\xff\xd1", b"\xff\xd5", 1)


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "half of the image data": (without_end_of_scan, "truncated"),
    "no end": (lambda data: data[: len(data) * 3 // 4], "truncated"),
    "a header alone": (lambda data: data[: scan_of(data) - 20], "truncated"),
    "a wrong restart marker": (with_swapped_restarts, "unreadable"),
    "image data left over": (lambda data: before_end(data, bytes(range(1, 120))), "unreadable"),
    "a size of 0": (
        lambda data: data.replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", 0, WIDTH)),
        "unreadable",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named(what: str) -> None:
    damage, status = DAMAGED[what]
    data = damage(jpeg(restart_marker_blocks=3))
    assert data != jpeg(restart_marker_blocks=3)
    with pytest.raises(ImageError, match=f"^{status}: "):
        decoded(data)


@pytest.mark.parametrize(("bits", "marker"), [(255, 0xC0), (1, 0xC3), (17, 0xC3)])
def test_an_impossible_depth_is_damage(bits: int, marker: int) -> None:
    frame = segment(marker, struct.pack(">BHHB", bits, 8, 8, 1) + bytes([1, 0x11, 0]))
    with pytest.raises(ImageError, match=r"^unreadable: the frame header is not valid"):
        read_header(b"\xff\xd8" + frame + segment(0xDA, bytes([1, 1, 0, 1, 0, 0])))


def test_jpeg_ls_is_not_supported() -> None:
    data = b"\xff\xd8" + segment(0xF7, struct.pack(">BHHB", 8, 8, 8, 1) + bytes([1, 0x11, 0]))
    data += segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(9) + EOI
    with pytest.raises(ImageError, match=r"^unsupported: not supported: 8-bit LS JPEG of 1 component$"):
        decoded(data)


def test_an_invalid_marker_in_the_image_data_is_damage_not_a_foreign_format() -> None:
    data = bytearray(jpeg())
    at = scan_of(bytes(data)) + 30
    data[at : at + 2] = b"\xff\x9b"
    with pytest.raises(ImageError, match=r"^unreadable: "):
        decoded(bytes(data))


def test_many_end_marks_make_no_long_search(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()
    real = simplejpeg.decode_jpeg

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    junk = bytes(range(1, 200)) * 50
    with pytest.raises(ImageError, match=r"^unreadable: "):
        decoded(before_end(jpeg(), junk) + EOI * 2_000)
    assert len(calls) <= 20


def status_of(data: bytes) -> str:
    try:
        assert decoded(data).shape == SPEC.shape
    except ImageError as error:
        return error.status
    return "ok"


@pytest.mark.parametrize("noise", [7, 8, 9])
def test_flipped_bits_never_come_back_as_another_error(noise: int) -> None:
    rng = np.random.default_rng(noise)
    for kind in KINDS.values():
        good = jpeg(photo(noise), **kind)
        for _ in range(40):
            data = bytearray(good)
            place = int(rng.integers(2, len(data)))
            data[place] ^= 1 << int(rng.integers(8))
            assert status_of(bytes(data)) in {"ok", "truncated", "unreadable", "unsupported", "too_large"}
