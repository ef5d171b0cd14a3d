"""long tail: HEIC, JPEG XL and deep JPEGs give the pixels that went in, or say what is wrong with them."""

# h = height px, w = width px, S = samples of a pixel

import io
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heics
import imagecodecs
import numpy as np
import pytest
from corpus import encoded
from PIL import Image
from tiffs import Samples, Tiff, tiff

from mnist_dist.errors import ImageError
from mnist_dist.images import jpegxl
from mnist_dist.images.av1 import frame_sizes
from mnist_dist.images.boxes import MAX_STEPS, Steps, item_types, main_streams
from mnist_dist.images.decoder import decode_image
from mnist_dist.images.deep_jpeg import open_deep_jpeg
from mnist_dist.images.heif import open_heif
from mnist_dist.images.jpegxl import jpegxl_size, open_jpegxl, read_header
from mnist_dist.images.pillow import open_avif
from mnist_dist.images.pixels import NotForMe, Opened, Pixels
from mnist_dist.images.signatures import is_avif, is_heif, is_jpeg2000, is_jpegxl, is_tiff
from mnist_dist.images.spec import ImageSpec
from mnist_dist.images.streams import stream_px

CASES = Path(__file__).parents[2] / "shared" / "cases"
RANDOM = np.random.default_rng(23)
Y, X = np.mgrid[0:40, 0:56]
SMOOTH = np.stack([X * 4, Y * 6, (X + Y) * 2], axis=-1).astype(np.uint8)

Open = Callable[[bytes, ImageSpec | None], Opened]


def decoded(open_image: Open, data: bytes) -> Pixels:
    opened = open_image(data, None)
    pixels = opened.decode()
    assert pixels.dtype == np.uint8
    assert pixels.shape == (opened.height_px, opened.width_px, opened.channels)
    return pixels


def noise(count: int, bits: int) -> Samples:
    return RANDOM.integers(0, 2**bits, (40, 56, count)).astype(np.uint8 if bits <= 8 else np.uint16)


def ftyp(major: bytes, *others: bytes) -> bytes:
    body = major + bytes(4) + b"".join(others)
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body


# --- JPEG ------------------------------------------------------------------------------------------------------------


def exif(orientation: int) -> bytes:
    body = b"Exif\0\0" + tiff(np.zeros((1, 1), np.uint8), Tiff(bits=8, orientation=orientation))
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("bits", [*range(2, 17)])
def test_lossless_jpegs_of_every_depth_are_exact(bits: int, count: int) -> None:
    values = noise(count, bits)
    data = bytes(imagecodecs.jpeg8_encode(values.squeeze(), lossless=True, bitspersample=bits))
    assert data.find(b"\xff\xc3") > 0
    expected = np.rint(values * (255 / (2**bits - 1)))
    if count == 4:  # Inks, stored inverted.
        expected = expected[..., :3] * expected[..., 3:] / 255
    np.testing.assert_allclose(decoded(open_deep_jpeg, data), expected, atol=0.51 if count == 4 else 0)


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_jpegs_of_12_bits_are_scaled(subsampling: str) -> None:
    deep = np.ascontiguousarray(SMOOTH.astype(np.uint16) * 16)
    data = bytes(imagecodecs.jpeg8_encode(deep, bitspersample=12, level=98, subsampling=subsampling))
    np.testing.assert_allclose(decoded(open_deep_jpeg, data), SMOOTH, atol=8)
    grey = bytes(imagecodecs.jpeg8_encode(deep[..., 0].copy(), bitspersample=12, level=98))
    np.testing.assert_allclose(decoded(open_deep_jpeg, grey)[..., 0], SMOOTH[..., 0], atol=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_jpegs_are_turned_upright(orientation: int) -> None:
    values = noise(1, 16)[..., 0]
    data = bytes(imagecodecs.jpeg8_encode(values, lossless=True, bitspersample=16))
    upright = decoded(open_deep_jpeg, data[:2] + exif(orientation) + data[2:])[..., 0]
    stored = decoded(open_deep_jpeg, data)[..., 0]
    turns: list[Callable[[Any], Any]] = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.T,
        lambda a: np.rot90(a, -1),
        lambda a: a[::-1, ::-1].T,
        lambda a: np.rot90(a),
    ]
    np.testing.assert_array_equal(upright, turns[orientation - 1](stored))


def test_lossless_8_bit_jpegs_are_as_in_pillow() -> None:
    for count in (1, 3):
        data = bytes(imagecodecs.jpeg8_encode(noise(count, 8).squeeze(), lossless=True))
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(decoded(open_deep_jpeg, data).squeeze(), np.asarray(image))


def test_the_lossless_file_that_came_out_as_garbage_is_right() -> None:
    path = CASES / "01_lossless_grey128_ok_but_wrong.jpg"
    if not path.exists():
        pytest.skip(f"needs {path.name}, which is not part of this repository; its kind is tested above")
    with Image.open(path) as image:
        np.testing.assert_array_equal(decoded(open_deep_jpeg, path.read_bytes())[..., 0], np.asarray(image))


def test_a_deep_jpeg_without_an_end_is_truncated() -> None:
    data = bytes(imagecodecs.jpeg8_encode(noise(3, 12), lossless=True, bitspersample=12))
    opened = open_deep_jpeg(data[: len(data) // 2], None)
    with pytest.raises(ImageError, match=r"truncated: 12-bit lossless JPEG .* without an end mark"):
        opened.decode()


def test_a_deep_jpeg_that_does_not_decode_is_unreadable() -> None:
    data = bytearray(imagecodecs.jpeg8_encode(noise(3, 12), lossless=True, bitspersample=12))
    table = data.find(b"\xff\xc4") + 5
    data[table : table + 16] = b"\xff" * 16
    opened = open_deep_jpeg(bytes(data), None)
    with pytest.raises(ImageError, match=r"unreadable: 12-bit lossless JPEG"):
        opened.decode()


def test_other_jpegs_are_left_to_other_decoders() -> None:
    baseline = bytes(imagecodecs.jpeg8_encode(SMOOTH))
    for marker in (b"\xff\xc0", b"\xff\xc9"):  # Baseline, arithmetic.
        with pytest.raises(NotForMe, match=r"8-bit .* JPEG of 3 component"):
            open_deep_jpeg(baseline.replace(b"\xff\xc0", marker), None)


# --- JPEG XL ---------------------------------------------------------------------------------------------------------


def jxl(values: Samples, **how: Any) -> bytes:
    return bytes(
        imagecodecs.jpegxl_encode(values[..., 0] if values.shape[-1] == 1 else values, **({"lossless": True} | how))
    )


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize(("count", "bits"), [(1, 8), (3, 8), (1, 16), (3, 16), (3, 10), (1, 12)])
def test_jpegxl_gives_the_pixels_that_went_in(count: int, bits: int, container: bool) -> None:
    values = noise(count, bits)
    data = jxl(values, usecontainer=container, **({} if bits in (8, 16) else {"bitspersample": bits}))
    assert data.startswith(jxl_start(data, bits, container=container))
    np.testing.assert_array_equal(decoded(open_jpegxl, data), np.rint(values * (255 / (2**bits - 1))))
    header = read_header(data)
    assert (header.bits, header.is_grey, header.has_alpha) == (bits, count == 1, False)


def jxl_start(data: bytes, bits: int, *, container: bool) -> bytes:
    """16 bits need a level that only a container can state."""
    return jpegxl.CONTAINER if container or (bits == 16 and data[:2] != jpegxl.CODESTREAM) else jpegxl.CODESTREAM


@pytest.mark.parametrize("count", [1, 3])
def test_jpegxl_with_alpha_is_laid_over_white(count: int) -> None:
    values = noise(count + 1, 8)
    opaque = values[..., -1:] / 255
    expected = values[..., :-1] * opaque + 255 * (1 - opaque)
    np.testing.assert_allclose(decoded(open_jpegxl, jxl(values)), expected, atol=0.51)


def test_jpegxl_in_floats_and_lossy_is_decoded() -> None:
    floats = (SMOOTH / 255).astype(np.float32)
    np.testing.assert_array_equal(decoded(open_jpegxl, jxl(floats)), SMOOTH)
    np.testing.assert_allclose(decoded(open_jpegxl, jxl(SMOOTH, lossless=False, distance=0.2)), SMOOTH, atol=12)


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = np.stack([SMOOTH, 255 - SMOOTH])
    np.testing.assert_array_equal(decoded(open_jpegxl, jxl(frames)), SMOOTH)


def test_grey_with_further_channels_keeps_its_grey() -> None:
    planes = RANDOM.integers(0, 256, (5, 40, 56)).astype(np.uint8)
    np.testing.assert_array_equal(decoded(open_jpegxl, jxl(planes, planar=True))[..., 0], planes[0])


@pytest.mark.parametrize(
    "size", [(8, 8), (256, 256), (1, 1), (30, 60), (40, 50), (1, 700), (700, 1), (520, 9000), (9, 16), (3, 4)]
)
def test_the_size_is_read_from_the_header(size: tuple[int, int]) -> None:
    data = jxl(np.zeros((*size, 3), np.uint8), effort=1)
    assert jpegxl_size(data) == (size[1], size[0])
    assert stream_px(data) == size[0] * size[1]


def turned(data: bytes, orientation: int) -> bytes:
    """A bare 8-bit RGB codestream whose header states a rotation: six bits more, and one for the tone mapping."""
    bits = jpegxl._Bits(data[2:])
    width, height = jpegxl._size(bits)
    stream = int.from_bytes(data[2:], "little")
    used = 8 * len(data[2:]) - bits._left
    fields = f"{stream & ((1 << used) - 1):0{used}b}"[::-1]
    assert bits.flag() is bits.flag() is False  # Neither all default nor extra fields.
    header = jpegxl._metadata(jpegxl._Bits(data[2:]), width, height)
    assert (header.bits, header.is_grey) == (8, False)
    depth = "0" + "00" + "1" + "00" + "0" + "1"  # Integers of 8 bits, 16-bit buffers, no channels, no XYB, sRGB.
    fields += "0" + "1" + f"{orientation - 1:03b}"[::-1] + "000" + depth + "1" + "00" + "1"
    fields += "0" * (-len(fields) % 8)
    head = int(fields[::-1], 2).to_bytes(len(fields) // 8, "little")
    return data[:2] + head + data[2 + -(-(used + 2 + len(depth) + 3) // 8) :]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_jpegxl_is_turned_upright_once(orientation: int) -> None:
    data = turned(jxl(SMOOTH), orientation)
    turns = {1: 0, 3: 2, 6: 3, 8: 1}
    assert read_header(data).orientation == orientation
    np.testing.assert_array_equal(decoded(open_jpegxl, data), np.rot90(SMOOTH, turns[orientation]))


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_jpegxl_file_that_is_cut_is_truncated(kept: float) -> None:
    data = jxl(noise(3, 8))
    opened = open_jpegxl(data[: int(len(data) * kept)], None)
    with pytest.raises(ImageError, match=r"truncated: JPEG XL"):
        opened.decode()


def test_a_jpegxl_header_that_is_cut_or_missing_is_named() -> None:
    with pytest.raises(ImageError, match=r"truncated: the file ends within the header"):
        open_jpegxl(jxl(noise(3, 8))[:4], None)
    with pytest.raises(ImageError, match=r"unreadable: a JPEG XL container without a codestream"):
        open_jpegxl(jpegxl.CONTAINER + bytes(20), None)


# --- HEIC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (heics.RGB, heics.PIXELS),
        (heics.GREY, heics.PIXELS[..., :1]),
        (heics.TEN, heics.PIXELS),
        (heics.ROTATED, np.rot90(heics.PIXELS, -1)),  # Stated twice, in the container and by EXIF.
        (heics.RGBA, heics.PIXELS * (heics.ALPHA[..., None] / 255) + 255.0 - heics.ALPHA[..., None]),
    ],
    ids=["rgb", "grey", "10-bit", "rotated", "alpha"],
)
def test_heic_gives_the_pixels_that_went_in(data: bytes, expected: Samples) -> None:
    np.testing.assert_allclose(decoded(open_heif, data), expected, atol=9)


def test_a_heic_file_that_is_cut_is_truncated() -> None:
    for kept in (40, len(heics.RGB) // 3, len(heics.RGB) - 30):
        with pytest.raises(ImageError, match=r"truncated: HEIF"):
            open_heif(heics.RGB[:kept], None).decode()


def test_broken_heic_data_are_unreadable() -> None:
    data = bytearray(heics.RGB)
    data[-60:-20] = b"\xff" * 40
    data[data.find(b"mdat") + 8 :][:4] = b"\xff" * 4
    with pytest.raises(ImageError, match=r"(unreadable|truncated): HEIF"):
        open_heif(bytes(data[: data.find(b"pitm")] + b"xxxx" + data[data.find(b"pitm") + 4 :]), None).decode()


def test_items_whose_type_is_not_text_do_not_end_the_process() -> None:
    data = heics.ROTATED.replace(b"Exif\0", b"E\xf8$f\0", 1)
    with pytest.raises(ImageError, match=r"unreadable: HEIF: the type of an item is no text"):
        open_heif(data, None)


def test_heic_is_decoded_in_the_calling_thread() -> None:
    import pi_heif

    decoded(open_heif, heics.RGB)
    assert pi_heif.options.DECODE_THREADS == 1


@pytest.mark.parametrize(
    ("item", "types"),
    [
        (b"infe\2\0\0\0\0\1\0\0hvc1name\0text\0", [b"hvc1"]),
        (b"infe\2\0\0\0\0\1\0\0mimename\0text\0", [b"mime", b"text"]),
        (b"infe\3\0\0\0\0\0\0\1\0\0mime\0\xff\0", [b"mime", b"\xff"]),
        (b"infe\0\0\0\0\0\1\0\0name\0\xfe\0", [b"\xfe"]),
        (b"infe\2\0\0\0\0\1\0\0\xff\xff\xff\xffname", [b"\xff\xff\xff\xff"]),
        (b"infe", [b""]),
    ],
)
def test_types_of_items_are_found_in_any_version_and_without_an_end(item: bytes, types: list[bytes]) -> None:
    assert list(item_types(b"....." + item)) == types


class Searched(bytes):
    """Bytes that count those which `find` passes over, and those that slices copy."""

    passed = 0

    def find(self, sub: Any, begin: Any = 0, end: Any = None) -> int:
        found = super().find(sub, begin)
        self.passed += (found if found >= 0 else len(self)) - min(int(begin), len(self))
        return found

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        self.passed += len(part) if isinstance(part, bytes) else 1
        return part


@pytest.mark.parametrize(
    "item", [b"infe\1abcdefg", b"infe\2abcdemime", b"infe\2abcdemime" + b"x" * 99, b"infe\1abcdefg\0", b"infe"]
)
@pytest.mark.parametrize("end", [b"", b"\0" + bytes([65]) * 400_000])
def test_item_types_are_read_in_linear_work(item: bytes, end: bytes) -> None:
    data = Searched(item * (MAX_STEPS - 1) + end)
    assert sum(map(len, item_types(data))) <= len(data)
    assert data.passed <= 8 * len(data)


def test_a_container_with_too_many_parts_is_unreadable() -> None:
    with pytest.raises(ImageError, match=r"unreadable: the container has more than 20,000 boxes and items"):
        open_heif(heics.RGB + b"infe\1abcdefg" * MAX_STEPS, None)
    with pytest.raises(ImageError, match=r"unreadable: the container has more than 20,000 boxes and items"):
        open_avif(avif() + box(b"free") * MAX_STEPS, None)


def test_a_heic_frame_of_another_size_than_the_container_says_is_unreadable() -> None:
    at = heics.RGB.find(b"ispe") + 8
    for size in ((8, 8), (24, 12), (128, 128)):
        opened = open_heif(heics.RGB[:at] + struct.pack(">II", *size) + heics.RGB[at + 8 :], None)
        with pytest.raises(ImageError, match=r"unreadable: HEIF"):
            opened.decode()


# --- AVIF ------------------------------------------------------------------------------------------------------------


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + kind + body


def avif(mode: str = "RGB", size: tuple[int, int] = (300, 200), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, (9, 9, 9, 50)[: len(mode)]).save(file, "AVIF", speed=10, **options)
    return file.getvalue()


def stating(data: bytes, width: int, height: int) -> bytes:
    at = data.find(b"ispe") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


def grid(columns: int, *, width: int, height: int, tile: tuple[int, int] = (80, 64)) -> bytes:
    """An AVIF that is put together from tiles of one row."""
    source = avif(size=tile)
    stream = next(iter(main_streams(source, b"av01", Steps())))
    at = source.find(b"ipco") - 4
    kinds = source[at : at + int.from_bytes(source[at : at + 4], "big")]
    properties = box(b"ipco", kinds[8:], box(b"ispe", bytes(4), struct.pack(">II", width, height)))
    items = range(2, columns + 2)
    uses = struct.pack(">HBBB", 1, 2, 5, 2) + b"".join(struct.pack(">HBBBBB", item, 4, 1, 2, 0x83, 4) for item in items)
    names = [box(b"infe", struct.pack(">IHH4sB", 2 << 24, item, 0, b"av01", 0)) for item in items]
    layout = struct.pack(">BBBBHH", 0, 0, 0, columns - 1, width, height)

    def meta(begin: int) -> bytes:
        places = struct.pack(">HHHHII", 1, 1, 0, 1, 0, len(layout))
        places += b"".join(struct.pack(">HHHHII", item, 0, 0, 1, begin, len(stream)) for item in items)
        return box(
            b"meta",
            bytes(4),
            box(b"hdlr", bytes(8), b"pict", bytes(13)),
            box(b"pitm", bytes(4), b"\0\1"),
            box(b"iloc", b"\1\0\0\0\x44\0", struct.pack(">H", columns + 1), places),
            box(
                b"iinf",
                bytes(4),
                struct.pack(">H", columns + 1),
                box(b"infe", struct.pack(">IHH4sB", 2 << 24, 1, 0, b"grid", 0)),
                *names,
            ),
            box(b"iref", bytes(4), box(b"dimg", struct.pack(f">HH{columns}H", 1, columns, *items))),
            box(b"iprp", properties, box(b"ipma", bytes(4), struct.pack(">I", columns + 1), uses)),
            box(b"idat", layout),
        )

    head = ftyp(b"avif", b"mif1", b"miaf")
    return head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", stream)


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (avif(), [(300, 200)]),
        (avif("L", (37, 1)), [(37, 1)]),
        (avif("RGBA"), [(300, 200), (300, 200)]),  # Its alpha is a stream of its own.
        (avif(save_all=True, append_images=[Image.new("RGB", (300, 200), "blue")]), [(300, 200), (300, 200)]),
        (grid(3, width=230, height=60), [(80, 64)] * 3),
        (avif()[:60], []),
        (ftyp(b"avif"), []),
    ],
    ids=["rgb", "grey", "alpha", "animated", "grid", "cut", "empty"],
)
def test_sizes_of_avif_frames_are_read_from_their_streams(data: bytes, sizes: list[tuple[int, int]]) -> None:
    assert frame_sizes(data) == sizes


@pytest.mark.parametrize(
    "data", [avif(), avif("RGBA"), avif("L"), grid(3, width=230, height=60)], ids=["rgb", "alpha", "grey", "grid"]
)
def test_avif_is_decoded_with_no_larger_frame(data: bytes) -> None:
    assert decoded(open_avif, data).shape[0] in (200, 60)
    assert not open_avif(data, None).frame_px


def test_an_avif_frame_larger_than_the_container_says_is_unreadable() -> None:
    for mode in ("RGB", "RGBA"):
        with pytest.raises(ImageError, match=r"unreadable: AVIF: the container says \(64, 64\).* \(300, 200\) px"):
            open_avif(stating(avif(mode), 64, 64), None)


def test_large_frames_of_tiles_and_layers_count_for_the_limits() -> None:
    data = grid(1, width=64, height=64, tile=(300, 200))
    opened = open_avif(data, None)
    assert opened.frame_px == 60_000
    assert opened.memory_bytes > 9 * 60_000
    with pytest.raises(ImageError, match=r"too_large: a frame of 60,000 pixels is more than 50,000 pixels"):
        decode_image(data, ImageSpec(height_px=8, width_px=8, channels=3), max_pixels=50_000)
    assert decoded(open_avif, data).shape == (64, 64, 3)


def test_items_that_share_their_bytes_are_not_copied_without_end() -> None:
    places = struct.pack(">HHH", 1, 0, 5_000) + bytes(8) * 5_000
    infe = box(b"infe", b"\2\0\0\0\0\1\0\0av01\0")
    tables = box(b"pitm", bytes(4), b"\0\1") + box(b"iinf", bytes(4), b"\0\1", infe)
    data = box(b"meta", bytes(4), tables, box(b"iloc", bytes(4), b"\x44\0\0\1", places))
    with pytest.raises(ImageError, match=r"unreadable: the items of the container have more bytes than the file"):
        frame_sizes(data)


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "recognised"),
    [
        (heics.RGB, is_heif),
        (ftyp(b"heic", b"mif1"), is_heif),
        (ftyp(b"mif1", b"heic"), is_heif),
        (ftyp(b"avif", b"mif1"), is_avif),
        (ftyp(b"mif1", b"miaf", b"avif"), is_avif),
        (jxl(SMOOTH), is_jpegxl),
        (jxl(SMOOTH, usecontainer=True), is_jpegxl),
        (bytes(imagecodecs.jpeg2k_encode(SMOOTH, codecformat="j2k")), is_jpeg2000),
        (bytes(imagecodecs.jpeg2k_encode(SMOOTH, codecformat="jp2")), is_jpeg2000),
        (tiff(SMOOTH, Tiff(bits=8, photometric=2, order=">", big=True)), is_tiff),
        (ftyp(b"isom", b"mp42"), None),
        (b"RIFF\x10\0\0\0WEBPVP8 ", None),
        (b"\xff\xd8\xff\xe0", None),
        (b"", None),
    ],
)
def test_formats_are_told_by_their_first_bytes(data: bytes, recognised: Callable[[bytes], bool] | None) -> None:
    signatures = (is_tiff, is_heif, is_avif, is_jpegxl, is_jpeg2000)
    assert [signature for signature in signatures if signature(data)] == ([recognised] if recognised else [])


@pytest.mark.parametrize(
    ("open_image", "package", "data"),
    [
        (open_heif, "pi_heif", heics.RGB),
        (open_jpegxl, "imagecodecs", jxl(SMOOTH)),
        (open_deep_jpeg, "imagecodecs", bytes(imagecodecs.jpeg8_encode(noise(1, 16).squeeze(), lossless=True))),
    ],
)
def test_missing_packages_are_an_import_error(
    monkeypatch: pytest.MonkeyPatch, open_image: Open, package: str, data: bytes
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package):
        open_image(data, None)


@pytest.mark.parametrize(
    ("open_image", "data"),
    [
        (open_heif, heics.RGB),
        (open_heif, heics.RGBA),
        (open_jpegxl, jxl(noise(3, 8))),
        (open_jpegxl, jxl(noise(4, 8), usecontainer=True)),
        (open_deep_jpeg, bytes(imagecodecs.jpeg8_encode(noise(3, 12), lossless=True, bitspersample=12))),
    ],
)
def test_damaged_files_are_an_image_error_or_pixels_of_the_stated_size(open_image: Open, data: bytes) -> None:
    errors = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(int(RANDOM.integers(1, 4))):
            damaged[int(RANDOM.integers(2, len(data)))] ^= 1 << int(RANDOM.integers(8))
        try:
            opened = open_image(bytes(damaged), None)
            if opened.memory_bytes < 2**28:
                assert opened.decode().shape == (opened.height_px, opened.width_px, opened.channels)
        except (ImageError, NotForMe):
            errors += 1
    assert errors > 0


PEAK = """
import re, sys
import imagecodecs
import numpy as np
from mnist_dist.images.av1 import frame_sizes
from mnist_dist.images.boxes import MAX_STEPS, Steps, item_types, main_streams
from mnist_dist.images.decoder import decode_image
from mnist_dist.images.deep_jpeg import open_deep_jpeg
from mnist_dist.images.jpegxl import open_jpegxl

def kib(name):
    return int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1])

def image(height, width):
    row = (np.arange(width) % 251).astype(dtype)
    return np.ascontiguousarray(np.broadcast_to(row[:, None], (height, width, count)).squeeze())

dtype, count, encode, open_image = np.dtype(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
encode, open_image = eval(encode), eval(open_image)
open_image(bytes(encode(image(64, 64))), None).decode()
data = bytes(encode(image(4000, 5000)))
opened = open_image(data, None)
open("/proc/self/clear_refs", "w").write("5")  # Begin a new peak.
before = kib("VmRSS")
opened.decode()
print((kib("VmHWM") - before) * 1024, opened.memory_bytes)
"""


@pytest.mark.parametrize(
    ("dtype", "count", "encode", "open_image", "factor"),
    [
        ("u2", 3, "lambda a: imagecodecs.jpeg8_encode(a, lossless=True, bitspersample=16)", "open_deep_jpeg", 2),
        ("u2", 1, "lambda a: imagecodecs.jpeg8_encode(a, bitspersample=12)", "open_deep_jpeg", 2),
        # Progressive JPEG XL takes several times as much as what imagecodecs writes.
        ("u1", 3, "lambda a: imagecodecs.jpegxl_encode(a, distance=1, effort=3)", "open_jpegxl", 6),
        ("u2", 3, "lambda a: imagecodecs.jpegxl_encode(a, lossless=True, effort=1)", "open_jpegxl", 6),
    ],
)
def test_decoding_takes_the_memory_that_was_announced(
    dtype: str, count: int, encode: str, open_image: str, factor: int
) -> None:
    code = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    program = f"import sys; sys.path[:0] = {code!r}\n{PEAK}"
    command = [sys.executable, "-c", program, dtype, str(count), encode, open_image]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, announced = map(int, done.stdout.split())
    assert announced / factor < peak <= announced


@pytest.mark.parametrize("shape", [(3, 3, 3), (4, 4, 4), (2, 3, 3)])
def test_a_tiny_jpegxl_is_not_turned(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels[..., 3:] = 255
    data = imagecodecs.jpegxl_encode(pixels, lossless=True)
    spec = ImageSpec(height_px=shape[0], width_px=shape[1], channels=3)
    np.testing.assert_array_equal(decode_image(bytes(data), spec).pixels, pixels[..., :3])


def with_jp2_box(data: bytes, name: bytes, body: bytes) -> bytes:
    """A JP2 file with another box at the end of its header."""
    box = struct.pack(">I", 8 + len(body)) + name + body
    begin = data.index(b"jp2h") - 4
    size = int.from_bytes(data[begin : begin + 4], "big")
    return (
        data[:begin] + struct.pack(">I", size + len(box)) + data[begin + 4 : begin + size] + box + data[begin + size :]
    )


def test_a_jpeg2000_whose_channels_are_reordered_is_refused() -> None:
    data = encoded(Image.new("RGB", (16, 16), (255, 0, 0)), "JPEG2000")
    spec = ImageSpec(height_px=16, width_px=16, channels=3)
    same = struct.pack(">10H", 3, 0, 0, 1, 1, 0, 2, 2, 0, 3)
    np.testing.assert_array_equal(decode_image(with_jp2_box(data, b"cdef", same), spec).pixels[0, 0], (255, 0, 0))
    for name, body in {
        b"cdef": struct.pack(">10H", 3, 0, 0, 3, 1, 0, 2, 2, 0, 1),
        b"cmap": struct.pack(">HBBHBBHBB", 0, 1, 2, 0, 1, 1, 0, 1, 0),
    }.items():
        with pytest.raises(ImageError, match=r"unsupported: not supported: JPEG 2000 with reordered channels"):
            decode_image(with_jp2_box(data, name, body), spec)
