"""tiff: every kind of TIFF gives the pixels that went in, or says what is wrong with it."""

# h = height px, w = width px, S = samples of a pixel

import io
import logging
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from tiffs import ORDERS, Order, Samples, Tiff, pages, tiff

from mnist_dist.errors import ImageError
from mnist_dist.images import ifd
from mnist_dist.images.decoder import decode_image
from mnist_dist.images.ifd import check_segments, exif_orientation, read_page
from mnist_dist.images.pixels import Pixels, match_channels
from mnist_dist.images.spec import ImageSpec
from mnist_dist.images.tiff import open_tiff, pillow_is_right

CASES = Path(__file__).parents[2] / "shared" / "cases"
H, W = 13, 21
RANDOM = np.random.default_rng(17)
FLOATS = {16: "f2", 24: "f4", 32: "f4", 64: "f8"}
GREY, RGB = Tiff(bits=8), Tiff(bits=8, photometric=ifd.RGB)


def samples(how: Tiff, count: int) -> Samples:
    """Values over the whole range of a kind, `[H, W, count]`."""
    if how.sample_format == ifd.FLOAT:
        return (RANDOM.integers(0, 1024, (H, W, count)) / 1024).astype(FLOATS[how.bits])  # Exact in 16 bits.
    size = 1 if how.bits <= 8 else 2 if how.bits <= 16 else 4 if how.bits <= 32 else 8
    values = RANDOM.integers(0, 2**how.bits, (H, W, count), dtype=np.uint64)
    values[0, 0], values[0, 1] = 0, 2**how.bits - 1
    if how.sample_format == ifd.SIGNED:
        return (values.astype(np.int64) - (1 << (how.bits - 1)) if how.bits < 64 else values.view(np.int64)).astype(
            f"i{size}"
        )
    return values.astype(f"u{size}")


def scaled(values: Samples, how: Tiff) -> Pixels:
    """What the stated rule makes of samples that fill their range; floats here are 0-1."""
    wide = values.astype(np.float64)
    if how.sample_format == ifd.FLOAT:
        low, high = 0.0, 1.0
    elif how.bits <= 16:
        low = -(2.0 ** (how.bits - 1)) if how.sample_format == ifd.SIGNED else 0.0
        high = low + 2**how.bits - 1
    else:
        low, high = wide.min(), wide.max()
    pixels = np.rint((wide - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    return 255 - pixels if how.photometric == ifd.WHITE_IS_ZERO else pixels


def decoded(data: bytes) -> Pixels:
    opened = open_tiff(data, None)
    pixels = opened.decode()
    assert pixels.dtype == np.uint8
    assert pixels.shape == (opened.height_px, opened.width_px, opened.channels)
    return pixels


def by_pillow(data: bytes) -> Pixels:
    """RGB over white, upright, the way the package uses Pillow; deep modes are scaled by the same rule."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            return match_channels((np.asarray(upright) / 257).round().astype(np.uint8)[..., None], 3)
        rgba = upright.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"), np.uint8)


# --- every kind ------------------------------------------------------------------------------------------------------

DEPTHS = [(ifd.UNSIGNED, bits) for bits in (*range(1, 17), 20, 24, 31, 32, 64)]
DEPTHS += [(ifd.SIGNED, bits) for bits in (2, 4, 8, 10, 12, 14, 16, 24, 32, 64)]
DEPTHS += [(ifd.FLOAT, bits) for bits in (16, 24, 32, 64)]


@pytest.mark.parametrize(("sample_format", "bits"), DEPTHS)
def test_every_depth_gives_the_pixels_that_went_in(sample_format: int, bits: int) -> None:
    for photometric, count in ((ifd.BLACK_IS_ZERO, 1), (ifd.WHITE_IS_ZERO, 1), (ifd.RGB, 3)):
        for order in ORDERS:
            for big, planar in ((False, False), (True, False), (False, True)):
                how = Tiff(bits=bits, sample_format=sample_format, photometric=photometric, order=order, big=big)
                how = replace(how, planar=planar and count > 1, rows=5)
                values = samples(how, count)
                np.testing.assert_array_equal(decoded(tiff(values, how)), scaled(values, how), str(how))


@pytest.mark.parametrize("compression", [1, 5, 8, 32773, 32946, 34925, 50000])
def test_every_compression_gives_the_pixels_that_went_in(compression: int) -> None:
    for bits, sample_format in ((1, 1), (4, 1), (8, 1), (12, 1), (16, 1), (16, 2), (32, 3)):
        for order in ORDERS:
            for place in ({"rows": 4}, {"rows": None}, {"tile_px": (16, 16)}):
                how = Tiff(bits=bits, sample_format=sample_format, photometric=ifd.RGB, compression=compression)
                for each in (replace(how, order=order, **place), replace(how, planar=True, **place)):
                    values = samples(each, 3)
                    np.testing.assert_array_equal(decoded(tiff(values, each)), scaled(values, each), str(each))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bits", "sample_format", "predictor"), [(8, 1, 2), (16, 1, 2), (32, 3, 3), (16, 3, 3)])
def test_predictors_are_undone(bits: int, sample_format: int, predictor: int, order: Order) -> None:
    how = Tiff(bits=bits, sample_format=sample_format, predictor=predictor, order=order, photometric=ifd.RGB)
    for compression in (5, 8):
        values = samples(how, 3)
        each = replace(how, compression=compression, rows=6)
        np.testing.assert_array_equal(decoded(tiff(values, each)), scaled(values, each))


def test_bits_may_be_stored_in_reverse() -> None:
    for compression in (1, 5):
        how = Tiff(bits=16, photometric=ifd.RGB, fill_order=2, compression=compression)
        values = samples(how, 3)
        np.testing.assert_array_equal(decoded(tiff(values, how)), scaled(values, how))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_turned_upright(orientation: int) -> None:
    how = replace(RGB, orientation=orientation)
    data = tiff(samples(how, 3), how)
    np.testing.assert_array_equal(decoded(data), by_pillow(data))
    opened = open_tiff(data, None)
    assert (opened.width_px, opened.height_px) == ((H, W) if orientation >= 5 else (W, H))


# --- what samples mean -----------------------------------------------------------------------------------------------


def over_white(colours: Samples, alpha: Samples, *, is_premultiplied: bool) -> Samples:
    opaque = alpha.astype(np.float64) / 255
    light = colours if is_premultiplied else colours * opaque
    result: Samples = (light + 255 * (1 - opaque)).clip(0, 255)
    return result


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("meaning", [ifd.ASSOCIATED, ifd.UNASSOCIATED])
@pytest.mark.parametrize("colours", [1, 3])
def test_alpha_is_laid_over_white(colours: int, meaning: int, bits: int, planar: bool) -> None:
    photometric = ifd.RGB if colours == 3 else ifd.BLACK_IS_ZERO
    how = Tiff(bits=bits, photometric=photometric, extra=(meaning,), planar=planar, compression=32773)
    values = samples(how, colours + 1)
    if meaning == ifd.ASSOCIATED:
        values[..., :-1] = np.minimum(values[..., :-1], values[..., -1:])
    eight = scaled(values, how)
    expected = over_white(eight[..., :-1], eight[..., -1:], is_premultiplied=meaning == ifd.ASSOCIATED)
    np.testing.assert_allclose(decoded(tiff(values, how)), expected, atol=1)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    ("photometric", "extra", "bands"),
    [
        (ifd.RGB, (0, 0), 3),
        (ifd.RGB, (0, 0, 0, 0), 3),
        (ifd.BLACK_IS_ZERO, (0, 0, 0, 0), 3),
        (ifd.BLACK_IS_ZERO, (0,), 1),
    ],
)
def test_the_first_bands_are_the_colour(photometric: int, extra: tuple[int, ...], bands: int, planar: bool) -> None:
    how = Tiff(bits=16, photometric=photometric, extra=extra, planar=planar, rows=4)
    values = samples(how, (3 if photometric == ifd.RGB else 1) + len(extra))
    np.testing.assert_array_equal(decoded(tiff(values, how)), scaled(values, how)[..., :bands])


def test_alpha_is_found_among_further_bands() -> None:
    how = Tiff(bits=8, photometric=ifd.RGB, extra=(0, ifd.UNASSOCIATED))
    values = samples(how, 5)
    expected = over_white(values[..., :3], values[..., 4:], is_premultiplied=False)
    np.testing.assert_allclose(decoded(tiff(values, how)), expected, atol=1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_indices_are_looked_up_in_the_palette(bits: int) -> None:
    colours = RANDOM.integers(0, 256, (3, 2**bits))
    for factor in (257, 1):  # Some writers store 8 bits.
        how = Tiff(bits=bits, photometric=ifd.PALETTE, colour_map=tuple((colours * factor).ravel().tolist()))
        values = samples(how, 1)
        np.testing.assert_array_equal(decoded(tiff(values, how)), colours.T[values[..., 0]])


def test_a_palette_of_greys_is_grey() -> None:
    how = Tiff(bits=2, photometric=ifd.PALETTE, colour_map=(0, 500, 30000, 65535) * 3)
    assert decoded(tiff(samples(how, 1), how)).shape == (H, W, 1)


@pytest.mark.parametrize("bits", [8, 16])
def test_inks_are_converted(bits: int) -> None:
    how = Tiff(bits=bits, photometric=ifd.CMYK, planar=True)
    values = samples(how, 4)
    paper = 1 - scaled(values, how) / 255
    np.testing.assert_allclose(decoded(tiff(values, how)), 255 * paper[..., :3] * paper[..., 3:], atol=1)


def test_lab_is_converted() -> None:
    how = Tiff(bits=8, photometric=ifd.CIELAB)
    white_and_black = np.zeros((H, W, 3), np.uint8)
    white_and_black[:, 5:, 0] = 255
    np.testing.assert_array_equal(decoded(tiff(white_and_black, how)), white_and_black[..., [0, 0, 0]])


def test_packed_5_6_5_colours_are_read() -> None:
    packed = np.array([[0xF800, 0x07E0, 0x001F, 0xFFFF]], np.uint16)
    how = Tiff(bits=16, tags=((258, (5, 6, 5)), (262, (2,)), (277, (3,)), (339, (1, 1, 1))))
    assert decoded(tiff(packed, how))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


@pytest.mark.parametrize(("across", "down"), [(2, 2), (2, 1), (1, 2), (4, 2)])
def test_uncompressed_chroma_of_half_size_is_repeated(across: int, down: int) -> None:
    luma = RANDOM.integers(0, 256, (8, 16)).astype(np.uint8)
    chroma = RANDOM.integers(100, 156, (8 // down, 16 // across, 2)).astype(np.uint8)
    blocks = luma.reshape(8 // down, down, 16 // across, across).swapaxes(1, 2).reshape(8 // down, 16 // across, -1)
    stored = np.concatenate([blocks, chroma], axis=2).reshape(1, -1)
    tags = ((256, (16,)), (257, (8,)), (258, (8,) * 3), (262, (6,)), (277, (3,)), (339, (1,) * 3), (278, (8,)))
    data = tiff(stored, Tiff(bits=8, tags=(*tags, (530, (across, down)))))
    whole = np.concatenate([luma[..., None], chroma.repeat(down, 0).repeat(across, 1)], axis=2)
    expected = Image.frombytes("YCbCr", (16, 8), whole.tobytes()).convert("RGB")
    np.testing.assert_allclose(decoded(data), np.asarray(expected), atol=1)
    assert not pillow_is_right(read_page(data))


# --- compressions with images of their own ---------------------------------------------------------------------------

Y, X = np.mgrid[0:80, 0:112]
SMOOTH = np.stack([X * 2, Y * 3, X + Y], axis=-1).clip(0, 255).astype(np.uint8)


def written(array: Samples, **how: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **how)
    return file.getvalue()


@pytest.mark.parametrize("place", [{}, {"tile": (16, 16)}, {"rowsperstrip": 16}])
@pytest.mark.parametrize(
    ("compression", "tolerance"), [("jpeg", 6), ("png", 0), ("webp", 6), ("jpeg2000", 0), ("jpegxl", 0), ("lerc", 0)]
)
def test_images_within_strips_and_tiles_are_decoded(compression: str, tolerance: int, place: dict[str, Any]) -> None:
    lossless = {"compressionargs": {"lossless": True}} if compression in ("jpegxl", "webp") else {}
    data = written(SMOOTH, compression=compression, photometric="rgb", **place, **lossless)
    np.testing.assert_allclose(decoded(data), SMOOTH, atol=tolerance)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_jpegs_in_ycbcr_come_as_rgb(subsampling: tuple[int, int]) -> None:
    data = written(SMOOTH, compression="jpeg", photometric="ycbcr", subsampling=subsampling)
    np.testing.assert_allclose(decoded(data), by_pillow(data), atol=2)


def test_jpegs_of_12_bits_and_of_planes_are_decoded() -> None:
    deep = SMOOTH[..., 0].astype(np.uint16) * 16
    encoded = imagecodecs.jpeg8_encode(deep, bitspersample=12, level=98)
    data = raw(bytes(encoded), (112, 80), compression=7, bits=12)
    np.testing.assert_allclose(decoded(data)[..., 0], SMOOTH[..., 0], atol=2)
    planes = written(np.moveaxis(SMOOTH, -1, 0).copy(), compression="jpeg", photometric="rgb", planarconfig="separate")
    np.testing.assert_allclose(decoded(planes), SMOOTH, atol=4)


def test_jfif_within_rgb_is_ycbcr_nevertheless() -> None:
    data = raw(bytes(imagecodecs.jpeg8_encode(SMOOTH, level=98)), (112, 80), compression=7, colours=3)
    np.testing.assert_allclose(decoded(data), SMOOTH, atol=6)


def test_an_image_larger_than_its_tile_is_not_decoded() -> None:
    for compression, encoded in (
        (7, imagecodecs.jpeg8_encode(np.zeros((3000, 3000), np.uint8))),
        (34712, imagecodecs.jpeg2k_encode(np.zeros((900, 900), np.uint8), codecformat="j2k")),
        (50002, imagecodecs.jpegxl_encode(np.zeros((900, 900), np.uint8))),
        (34933, imagecodecs.png_encode(np.zeros((900, 900), np.uint8))),
        (50001, imagecodecs.webp_encode(np.zeros((900, 900, 3), np.uint8))),
        (34887, imagecodecs.lerc_encode(np.zeros((900, 900), np.uint8))),
        (22610, imagecodecs.jpegxr_encode(np.zeros((900, 900), np.uint8))),
    ):
        opened = open_tiff(raw(bytes(encoded), (64, 64), compression=compression), None)
        with pytest.raises(ImageError, match=r"unreadable: .*a segment of 64 x 64 px holds \d{6,7} px"):
            opened.decode()


def raw(encoded: bytes, size: tuple[int, int], *, compression: int, bits: int = 8, colours: int = 1) -> bytes:
    """A grey or RGB TIFF whose single strip has the given bytes."""
    stored = np.frombuffer(encoded, np.uint8).reshape(1, -1)
    tags: tuple[tuple[int, tuple[int, ...]], ...] = (
        (256, (size[0],)),
        (257, (size[1],)),
        (278, (size[1],)),
        (259, (compression,)),
    )
    tags += ((258, (bits,) * colours), (262, (2 if colours == 3 else 1,)), (277, (colours,)), (339, (1,) * colours))
    return tiff(stored, Tiff(bits=8, tags=tags))


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax_codes_are_decoded(compression: str) -> None:
    page = Image.fromarray(RANDOM.random((40, 61)) > 0.7)
    file = io.BytesIO()
    page.save(file, "TIFF", compression=compression)
    np.testing.assert_array_equal(decoded(file.getvalue())[..., 0], np.asarray(page.convert("L")))


# --- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subfile", [1, 4])
def test_a_thumbnail_or_mask_before_the_image_is_passed_over(subfile: int) -> None:
    small, large = np.zeros((3, 4), np.uint8), samples(GREY, 1)
    data = pages((small, replace(GREY, subfile=subfile)), (large, GREY), (small, GREY))
    np.testing.assert_array_equal(decoded(data), large)
    assert read_page(data).index == 1
    assert not pillow_is_right(read_page(data))


def test_of_several_pages_the_first_counts() -> None:
    first, second = samples(GREY, 1), samples(RGB, 3)
    np.testing.assert_array_equal(decoded(pages((first, GREY), (second, RGB))), first)


# --- Pillow ----------------------------------------------------------------------------------------------------------

RIGHT = [
    (Tiff(bits=bits, photometric=photometric), 1) for bits in (1, 2, 4, 8) for photometric in (ifd.WHITE_IS_ZERO, 1)
]
RIGHT += [(Tiff(bits=16), 1), (RGB, 3), (replace(RGB, bits=16), 3), (replace(RGB, planar=True), 3)]
RIGHT += [(replace(RGB, extra=(meaning,), bits=bits), 4) for meaning in (0, 1, 2) for bits in (8, 16)]
RIGHT += [(replace(GREY, extra=(2,)), 2), (replace(RGB, extra=(0, 0)), 5), (Tiff(bits=8, photometric=ifd.CMYK), 4)]
RIGHT += [(replace(RGB, bits=16, planar=True, compression=8), 3), (replace(GREY, big=True), 1)]
RIGHT += [(replace(RGB, photometric=ifd.YCBCR, tags=((530, (1, 1)),), compression=5), 3)]
RIGHT += [(Tiff(bits=4, photometric=ifd.PALETTE, colour_map=tuple(range(0, 65536, 1366))), 1)]

WRONG = {
    "12-bit grey TIFF": (Tiff(bits=12), 1),
    "16-bit planar RGB TIFF": (Tiff(bits=16, photometric=ifd.RGB, planar=True), 3),
    "16-bit white-is-zero grey TIFF": (Tiff(bits=16, photometric=ifd.WHITE_IS_ZERO), 1),
    "32-bit grey TIFF": (Tiff(bits=32), 1),
    "LZW-compressed 32-bit float grey TIFF": (Tiff(bits=32, sample_format=3, order=">", compression=5), 1),
    "32-bit float RGB TIFF": (Tiff(bits=32, sample_format=3, photometric=ifd.RGB), 3),
    "8-bit signed grey TIFF": (Tiff(bits=8, sample_format=2), 1),
    "8-bit big-endian grey BigTIFF": (Tiff(bits=8, order=">", big=True), 1),
    "16-bit 5-band RGB TIFF": (Tiff(bits=16, photometric=ifd.RGB, extra=(0, 0)), 5),
    "8-bit planar premultiplied grey TIFF": (Tiff(bits=8, planar=True, extra=(1,)), 2),
}


@pytest.mark.parametrize(("how", "count"), RIGHT)
def test_pillow_is_right_about_these_kinds(how: Tiff, count: int) -> None:
    for compression in {how.compression, 5, 32773}:
        for place in ({}, {"rows": 4}, {"tile_px": (16, 16)}):
            for order in ORDERS[: 2 - how.big]:
                each = replace(how, compression=compression, order=order, **place)
                data = tiff(samples(each, count), each)
                assert pillow_is_right(read_page(data)), each
                if each.predictor == 1 and not (each.planar and each.bits == 16 and compression == 1):
                    # Pillow cuts 16 bits to 8 where this package rounds.
                    np.testing.assert_allclose(by_pillow(data), match_channels(decoded(data), 3), atol=3)


@pytest.mark.parametrize("kind", WRONG)
def test_other_kinds_are_left_to_tifffile_and_named(kind: str) -> None:
    how, count = WRONG[kind]
    page = read_page(tiff(samples(how, count), how))
    assert not pillow_is_right(page)
    assert page.kind == kind


def test_a_predictor_is_undone_without_compression_too_which_pillow_does_not() -> None:
    values = np.array([[100, 200, 300, 400], [1000, 2000, 3000, 4000]], np.uint16)
    how = Tiff(bits=12, predictor=2)
    np.testing.assert_array_equal(decoded(tiff(values, how))[..., 0], np.rint(values * (255 / 4095)))
    assert not pillow_is_right(read_page(tiff(values, replace(how, bits=16))))


# --- damage ----------------------------------------------------------------------------------------------------------

STRIPS = replace(RGB, bits=16, rows=4)


def test_a_file_that_ends_within_a_strip_is_truncated() -> None:
    for how in (STRIPS, replace(STRIPS, compression=8), replace(STRIPS, tile_px=(16, 16))):
        data = tiff(samples(how, 3), how)
        tags = int.from_bytes(data[4:8], "little")
        moved = data[:4] + struct.pack("<I", 8) + data[tags:]  # Tags first, as most writers place them.
        with pytest.raises(ImageError, match=r"truncated: "):
            open_tiff(moved[: len(moved) // 2], None)
        with pytest.raises(ImageError, match=r"truncated: "):
            open_tiff(data[: len(data) // 2], None)


def test_a_strip_shorter_than_its_pixels_is_truncated() -> None:
    data = tiff(samples(GREY, 1), replace(GREY, tags=((279, (H * W - 1,)),)))
    with pytest.raises(ImageError, match=r"truncated: strip 1 of 1 needs 273 bytes. Received: 272"):
        open_tiff(data, None)


def test_a_strip_without_data_is_no_black_strip() -> None:
    data = tiff(samples(GREY, 1), replace(GREY, compression=5, rows=8, tags=((279, (0, 80)),)))
    with pytest.raises(ImageError, match=r"unreadable: some of 2 strips have no data"):
        open_tiff(data, None)


@pytest.mark.parametrize("compression", [1, 5, 8])
def test_byte_counts_that_are_all_zero_count_as_missing(compression: int) -> None:
    whole = samples(GREY, 1)
    data = tiff(whole, replace(GREY, compression=compression, tags=((279, (0,)),)))
    spec = ImageSpec(height_px=H, width_px=W, channels=1)
    expected = decode_image(tiff(whole, GREY), spec)
    np.testing.assert_array_equal(decode_image(data, spec).pixels, expected.pixels)


def test_a_colour_map_of_8_bits_is_no_black_one() -> None:
    map_of_8_bits = tuple(range(256)) * 3
    indices = np.arange(H * W, dtype=np.uint8).reshape(H, W)
    data = tiff(indices, Tiff(bits=8, photometric=3, colour_map=map_of_8_bits))
    spec = ImageSpec(height_px=H, width_px=W, channels=1)
    np.testing.assert_array_equal(decode_image(data, spec).pixels[..., 0], indices)


def test_a_file_that_ends_within_its_tags_is_truncated() -> None:
    values = np.linspace(0, 1, H * W, dtype=np.float64).reshape(H, W)
    data = tiff(values, Tiff(bits=64, sample_format=3))
    assert int.from_bytes(data[4:8], "little") > H * W  # the tags stand last
    with pytest.raises(ImageError, match=r"truncated: the file ends within the tags of a page"):
        decode_image(data[:-16], ImageSpec(height_px=H, width_px=W, channels=1))


def test_missing_strips_are_truncated() -> None:
    data = tiff(samples(GREY, 1), replace(GREY, rows=4, tags=((273, (8, 92)), (279, (84, 84)))))
    with pytest.raises(ImageError, match=r"truncated: 2 of 4 strips have a place"):
        open_tiff(data, None)


@pytest.mark.parametrize("compression", [5, 8, 32773, 34925, 50000])
def test_a_strip_that_decodes_to_less_is_unreadable(compression: int) -> None:
    short = replace(GREY, compression=compression, rows=None, tags=((257, (H + 5,)), (278, (H + 5,))))
    opened = open_tiff(tiff(samples(GREY, 1), short), None)
    with pytest.raises(ImageError, match=r"unreadable: .*strip 1 of 1"):
        opened.decode()


def test_a_broken_code_is_unreadable() -> None:
    how = replace(STRIPS, compression=8)
    data = bytearray(tiff(samples(how, 3), how))
    data[60:70] = b"\xff" * 10
    opened = open_tiff(bytes(data), None)
    with pytest.raises(ImageError, match=r"unreadable: deflate-compressed 16-bit RGB TIFF, strip 1 of 4"):
        opened.decode()


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (((256, (0,)),), r"unreadable: tags of 0 x 13 px"),
        (((258, (200,)),), r"unreadable: samples have 1 to 128 bits. Received: 200"),
        (((322, (0,)), (323, (16,))), r"unreadable: tiles of 0 x 16 px"),
        (((262, (32845,)), (259, (34676,))), r"unsupported: not supported: SGILog-compressed 8-bit LogLuv TIFF"),
        (((259, (9,)),), r"unsupported: not supported: JBIG-compressed 8-bit grey TIFF"),
        (((339, (6,)), (258, (64,))), r"unsupported: not supported: 64-bit complex grey TIFF"),
        (((32997, (7,)),), r"unsupported: not supported: 8-bit grey TIFF volume"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(tags: tuple[tuple[int, tuple[int, ...]], ...], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_tiff(tiff(samples(GREY, 1), replace(GREY, tags=tags)), None).decode()


def test_no_file_makes_the_reader_run_long_or_raise_anything_else() -> None:
    seeds = [pages((samples(how, 3), how), (samples(how, 3), how)) for how in (STRIPS, replace(STRIPS, big=True))]
    for _ in range(1500):
        data = bytearray(seeds[int(RANDOM.integers(2))])
        tags = data.find(b"\0\0\xfe\0") + 2
        for _ in range(int(RANDOM.integers(1, 4))):
            data[int(RANDOM.integers(0, 16) if RANDOM.random() < 0.2 else RANDOM.integers(tags, len(data)))] = int(
                RANDOM.integers(256)
            )
        try:
            check_segments(bytes(data), read_page(bytes(data)))
        except ImageError as error:
            assert error.status in ("truncated", "unreadable")  # noqa: PT017  # Most of the files are still whole.


def test_pages_in_a_circle_and_huge_counts_end() -> None:
    data = bytearray(tiff(samples(GREY, 1), replace(GREY, subfile=1)))
    tags = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[tags : tags + 2], "little")
    struct.pack_into("<I", data, tags + 2 + 12 * count, tags)
    assert read_page(bytes(data)).index == 0
    struct.pack_into("<H", data, tags, 65535)
    with pytest.raises(ImageError, match=r"truncated"):
        read_page(bytes(data))
    struct.pack_into("<H", data, tags, count)
    struct.pack_into("<I", data, tags + 2 + 12 * 7 + 4, 2**32 - 1)
    with pytest.raises(ImageError, match=r"truncated"):
        check_segments(bytes(data), read_page(bytes(data)))


@pytest.mark.parametrize("data", [b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0"])
def test_a_file_of_a_few_bytes_is_cut(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^truncated: the file ends within its first bytes"):
        open_tiff(data, None)


@pytest.mark.parametrize("data", [b"", b"II*\0", b"II*\0\x08\0\0\0", b"MM\0+\0\x08\0\0" + bytes(8), b"nonsense"])
def test_a_file_without_tags_is_named(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"truncated: the file ends|unreadable: a TIFF should start with"):
        open_tiff(data, None)


@pytest.mark.parametrize("order", ORDERS)
def test_the_rotation_is_read_from_exif_data(order: Order) -> None:
    exif = tiff(samples(GREY, 1), replace(GREY, order=order, orientation=6))
    assert exif_orientation(exif) == 6
    for damaged in (exif[:8], exif[: exif.find(struct.pack(f"{order}H", 274))], b"", b"II", b"Exif"):
        assert exif_orientation(damaged) is None
    assert exif_orientation(tiff(samples(GREY, 1), replace(GREY, orientation=9))) is None


# --- around ----------------------------------------------------------------------------------------------------------


def test_missing_packages_are_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff(samples(GREY, 1), GREY)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"tifffile"):
        open_tiff(data, None)


def test_tifffile_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        decoded(tiff(samples(GREY, 1), replace(GREY, tags=((42113, (7,)), (270, (1, 2, 3))))))
    assert not [record for record in caplog.records if record.name.startswith("tifffile")]


PEAK = """
import re, sys
import numpy as np
from tiffs import Tiff, tiff
from mnist_dist.images.tiff import open_tiff

def kib(name):
    return int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1])

how = eval(sys.argv[1])
count = 1 if how.photometric < 2 else 4 if how.extra or how.photometric == 5 else 3
dtype = "f4" if how.sample_format == 3 else "u2" if how.bits > 8 else "u1"
shape = (4000, 5000, count)
small = tiff(np.zeros((16, 16, count), dtype), how)
open_tiff(small, None).decode()
data = tiff(np.broadcast_to((np.arange(5000) % 250).astype(dtype)[:, None], shape), how)
opened = open_tiff(data, None)
open("/proc/self/clear_refs", "w").write("5")  # Begin a new peak.
before = kib("VmRSS")
opened.decode()
print((kib("VmHWM") - before) * 1024, opened.memory_bytes)
"""


@pytest.mark.parametrize(
    "how",
    [
        Tiff(bits=16, order=">"),
        Tiff(bits=16, photometric=ifd.RGB, compression=8),
        Tiff(bits=8, photometric=ifd.RGB, compression=8, rows=16),
        Tiff(bits=16, photometric=ifd.RGB, extra=(2,), rows=64),
        Tiff(bits=32, sample_format=3, photometric=ifd.RGB, tile_px=(256, 256)),
    ],
    ids=["one-strip", "deflated", "8-bit", "alpha", "float-tiles"],
)
def test_decoding_takes_the_memory_that_was_announced(how: Tiff) -> None:
    code = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    program = f"import sys; sys.path[:0] = {code!r}\n{PEAK}"
    done = subprocess.run([sys.executable, "-c", program, repr(how)], capture_output=True, text=True, check=True)
    peak, announced = map(int, done.stdout.split())
    assert announced / 2 < peak <= announced


@pytest.mark.parametrize(
    ("name", "size", "channels", "mean"),
    [
        ("06_planar16.tif", (73, 43), 3, 87.5),
        ("07_grey12.tif", (4, 2), 1, 85.6),
        ("11_grey_premultiplied_alpha.tif", (64, 64), 1, 193.5),
        ("12_valid_rgb_float.tif", (32, 32), 3, 134.2),
    ],
)
def test_files_that_came_out_wrong_are_right(name: str, size: tuple[int, int], channels: int, mean: float) -> None:
    path = CASES / name
    if not path.exists():
        pytest.skip(f"needs {name}, which is not part of this repository; its kind is tested above")
    data = path.read_bytes()
    opened = open_tiff(data, None)
    assert (opened.width_px, opened.height_px, opened.channels) == (*size, channels)
    assert abs(float(decoded(data).mean()) - mean) < 0.5
    assert not pillow_is_right(read_page(data))
