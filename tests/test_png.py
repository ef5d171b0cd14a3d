"""png: transparent colours of every depth, rotations wherever they stand; what GIF and BMP leave transparent."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mutations import png_chunk as chunk
from PIL import Image

from mnist_dist.errors import ImageError
from mnist_dist.images.decoder import decode_image, probe_image
from mnist_dist.images.pixels import Pixels
from mnist_dist.images.spec import ImageSpec

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE = 0, 2, 3


def png(samples: npt.NDArray[Any], bits: int, colour_type: int, *more: bytes, last: bytes = b"") -> bytes:
    """A PNG of samples `[h, w, S]` as stored, with more chunks before and after the pixels."""
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1).astype(np.uint16)
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in flat]
    else:
        places = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        rows = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in places]
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", pixels) + last + chunk(b"IEND", b"")


def decoded(data: bytes) -> Pixels:
    width, height, _ = probe_image(data)
    return decode_image(data, ImageSpec(height_px=height, width_px=width, channels=3)).pixels


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_grey_is_transparent(bits: int) -> None:
    top = 2**bits - 1
    samples = np.array([[0, top, top // 2, top // 3]], np.uint16)
    for transparent in {0, top, top // 2}:
        data = png(samples, bits, GREY, chunk(b"tRNS", struct.pack(">H", transparent)))
        seen = np.where(samples == transparent, 255, np.rint(samples * (255 / top)))
        assert abs(decoded(data)[..., 0] - seen).max() <= (1 if bits == 16 else 0)
        assert (decoded(data)[..., 0][samples == transparent] == 255).all()
        assert probe_image(data)[2] == 1


@pytest.mark.parametrize(("colour_type", "transparent"), [(GREY, b"\0\7"), (PALETTE, bytes(8))])
def test_what_becomes_transparent_behind_the_pixels_does_not_count(colour_type: int, transparent: bytes) -> None:
    colours = [chunk(b"PLTE", bytes(range(24)))] if colour_type == PALETTE else []
    samples = np.full((2, 3, 1), 7)
    plain = decoded(png(samples, 8, colour_type, *colours))
    assert plain.max() < 255
    late = png(samples, 8, colour_type, *colours, last=chunk(b"tRNS", transparent))
    np.testing.assert_array_equal(decoded(late), plain)


@pytest.mark.parametrize("bits", [8, 16])
def test_one_colour_is_transparent(bits: int) -> None:
    unit = 1 if bits == 8 else 257
    samples = np.array([[[10, 20, 30], [10, 20, 31], [11, 20, 30], [0, 0, 0]]], np.uint16) * unit
    data = png(samples, bits, RGB, chunk(b"tRNS", struct.pack(">HHH", 10 * unit, 20 * unit, 30 * unit)))
    assert decoded(data).tolist() == [[[255, 255, 255], [10, 20, 31], [11, 20, 30], [0, 0, 0]]]


def test_all_sixteen_bits_of_a_transparent_colour_count() -> None:
    samples = np.array([[[0x1234, 0x5678, 0x9ABC], [0x1234, 0x5678, 0x9ABD], [0x1233, 0x5678, 0x9ABC]]], np.uint16)
    pixels = decoded(png(samples, 16, RGB, chunk(b"tRNS", struct.pack(">HHH", *samples[0, 0]))))
    assert pixels.tolist() == [[[255, 255, 255], [18, 86, 154], [18, 86, 154]]]
    grey = samples[..., :1] // np.array([[[1], [1], [1]]])
    grey[0, :, 0] = 0x1234, 0x1235, 0x3412
    pixels = decoded(png(grey, 16, GREY, chunk(b"tRNS", struct.pack(">H", 0x1234))))
    assert pixels[0, :, 0].tolist() == [255, 18, 52]


def test_a_damaged_deep_image_with_a_transparent_colour_is_damaged() -> None:
    rng = np.random.default_rng(0)
    data = png(rng.integers(0, 65536, (20, 20, 3)), 16, RGB, chunk(b"tRNS", bytes(6)))
    with pytest.raises(ImageError, match=r"^truncated: "):
        decoded(data[:-200])
    at = len(data) - 300
    with pytest.raises(ImageError, match=r"^unreadable: "):
        decoded(data[:at] + bytes(20) + data[at + 20 :])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_entries_of_a_palette_are_transparent_in_part(bits: int) -> None:
    samples = np.array([[0, 1]], np.uint16)
    colours = chunk(b"PLTE", bytes([200, 100, 0, 0, 50, 100]))
    data = png(samples, bits, PALETTE, colours, chunk(b"tRNS", bytes([255, 102])))
    expected = [[[200, 100, 0], [153, 173, 193]]]
    assert abs(decoded(data).astype(int) - expected).max() <= 1


def test_an_entry_beyond_the_palette_is_no_error() -> None:
    data = png(np.array([[0, 3]], np.uint16), 2, PALETTE, chunk(b"PLTE", bytes([200, 100, 0])))
    assert decoded(data)[0, 0].tolist() == [200, 100, 0]


def test_large_images_are_converted_like_small_ones() -> None:
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (1100, 2000, 4), np.uint8)  # more than one strip
    for mode in ("RGBA", "LA", "P", "L", "RGB", "1"):
        image = Image.fromarray(rgba[..., 3]).convert("P") if mode == "P" else Image.fromarray(rgba).convert(mode)
        options = {"transparency": bytes(range(256))} if mode == "P" else {}
        buffer, part = io.BytesIO(), io.BytesIO()
        image.save(buffer, "PNG", compress_level=1, **options)
        image.crop((0, 1090, 2000, 1100)).save(part, "PNG", compress_level=1, **options)
        np.testing.assert_array_equal(decoded(buffer.getvalue())[1090:], decoded(part.getvalue()), err_msg=mode)


def exif(orientation: int) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return made.tobytes().removeprefix(b"Exif\0\0")


def profile(orientation: int) -> bytes:
    data = b"Exif\0\0" + exif(orientation)
    return b"\nexif\n%8d\n" % len(data) + data.hex().encode() + b"\n"


XMP = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x:xmpmeta tiff:Orientation="6"/>'
ROTATIONS = {
    "EXIF": chunk(b"eXIf", exif(6)),
    "XMP": chunk(b"iTXt", XMP),
    "a compressed profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile(6))),
    "a profile": chunk(b"tEXt", b"Raw profile type APP1\0" + profile(6)),
}


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("what", ROTATIONS)
def test_a_rotation_counts_before_and_after_the_pixels(what: str, is_last: bool) -> None:
    samples = np.arange(6).reshape(2, 3, 1) * 40
    more = {"last": ROTATIONS[what]} if is_last else {}
    data = png(samples, 8, GREY, *([] if is_last else [ROTATIONS[what]]), **more)
    assert probe_image(data) == (2, 3, 1)
    np.testing.assert_array_equal(decoded(data)[..., 0], np.rot90(samples[..., 0], -1))


def test_a_damaged_profile_leaves_the_image_upright() -> None:
    for body in (b"Raw profile type exif\0\0garbage", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\nxyz")):
        assert probe_image(png(np.zeros((2, 3, 1)), 8, GREY, chunk(b"zTXt", body)))[:2] == (3, 2)


# --- GIF, BMP, DIB ---------------------------------------------------------------------------------------------------


def test_what_the_first_frame_of_a_gif_leaves_uncovered_is_white() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6), 77, np.uint8)).save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    struct.pack_into("<HH", data, 6, 9, 8)  # a larger canvas
    at = data.index(b"\x2c\0\0\0\0\x06\0\x04\0")
    struct.pack_into("<HH", data, at + 1, 2, 3)  # the frame's place in it
    pixels = decoded(bytes(data))
    assert pixels.shape == (8, 9, 3)
    expected = np.full((8, 9, 3), 255)
    expected[3:7, 2:8] = 77
    np.testing.assert_array_equal(pixels, expected)


def bmp_32(pixels: npt.NDArray[np.uint8], alpha: int) -> bytes:
    """A bitmap with masks for red, green, blue and alpha (BITMAPV4HEADER)."""
    height, width = pixels.shape[:2]
    header = struct.pack("<IiiHHIIiiII", 108, width, -height, 1, 32, 3, 0, 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    bgra = np.concatenate([pixels[..., ::-1], np.full((height, width, 1), alpha, np.uint8)], axis=-1)
    offset = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", offset + bgra.size, 0, 0, offset) + header + bgra.tobytes()


def test_a_bitmap_whose_alpha_is_all_zero_is_opaque() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    np.testing.assert_array_equal(decoded(bmp_32(pixels, 0)), pixels)
    np.testing.assert_array_equal(decoded(bmp_32(pixels, 255)), pixels)
    half = decoded(bmp_32(pixels, 51))
    assert abs(half - (pixels * 0.2 + 255 * 0.8)).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_a_bitmap_without_a_file_header_is_read(mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)).convert(mode)
    bmp, dib = io.BytesIO(), io.BytesIO()
    image.save(bmp, "BMP")
    image.save(dib, "DIB")
    assert dib.getvalue()[:2] != b"BM"
    np.testing.assert_array_equal(decoded(dib.getvalue()), decoded(bmp.getvalue()))
    np.testing.assert_array_equal(decoded(bmp.getvalue()), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("text", ["P1 is a priority", "P6", "Pf, which it is not", "P5 # a comment\nand no size"])
def test_text_that_begins_like_a_pnm_is_a_foreign_format(text: str) -> None:
    with pytest.raises(ImageError, match=r"^unsupported: not one of .* it starts with b'P"):
        decoded(text.encode())


def test_comments_stand_before_the_size_of_a_pnm() -> None:
    assert decoded(b"P2 # one\n# two\n1 1\n255\n7").ravel().tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    "data", [b"BM is how this text begins, and it goes on" * 9, b"RIFF\x10\0\0\0AVI LIST" + bytes(99)]
)
def test_what_only_begins_like_an_image_is_a_foreign_format(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^unsupported: not one of "):
        decoded(data)
