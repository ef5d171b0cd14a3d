"""images: every format and mode against the pixels that went in."""

import io
import struct
import threading
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mnist_dist.errors import ConfigError, ImageError
from mnist_dist.images.decoder import decode_image, probe_image
from mnist_dist.images.pixels import Pixels, match_channels, resize_pixels
from mnist_dist.images.spec import ImageSpec

H, W = 11, 17


def rgb_pixels() -> Pixels:
    rows, columns = np.mgrid[:H, :W]
    return np.stack([rows * 20, columns * 14, 255 - rows * 9 - columns * 5], axis=-1).astype(np.uint8)


def grey_pixels() -> Pixels:
    return match_channels(rgb_pixels(), 1)[..., 0]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def native(channels: int, height: int = H, width: int = W) -> ImageSpec:
    return ImageSpec(height_px=height, width_px=width, channels=channels)


def rgba_image() -> Image.Image:
    alpha = np.zeros((H, W, 1), np.uint8)
    alpha[:, W // 2 :] = 255
    return Image.fromarray(np.concatenate([rgb_pixels(), alpha], axis=-1))


def over_white(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    result = pixels.copy()
    result[:, : W // 2] = 255
    return result


LOSSLESS_RGB: list[tuple[str, dict[str, object]]] = [(kind, {}) for kind in ("PNG", "BMP", "TIFF", "PPM")]
LOSSLESS_RGB += [("WEBP", {"lossless": True})]
LOSSLESS_RGB += [("TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits")]


@pytest.mark.parametrize(("kind", "options"), LOSSLESS_RGB)
def test_lossless_rgb_comes_out_as_it_went_in(kind: str, options: dict[str, object]) -> None:
    decoded = decode_image(encoded(Image.fromarray(rgb_pixels()), kind, **options), native(3))
    np.testing.assert_array_equal(decoded.pixels, rgb_pixels())
    assert (decoded.width_px, decoded.height_px) == (W, H)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_grey_comes_out_as_it_went_in(kind: str) -> None:
    data = encoded(Image.fromarray(grey_pixels()), kind)
    np.testing.assert_array_equal(decode_image(data, native(1)).pixels[..., 0], grey_pixels())
    np.testing.assert_array_equal(decode_image(data, native(3)).pixels, np.repeat(grey_pixels()[..., None], 3, axis=-1))
    assert probe_image(data) == (W, H, 1)


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"subsampling": 0}), ("WEBP", {})]
)
def test_lossy_formats_come_close(kind: str, options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(rgb_pixels()), kind, quality=97, **options)
    difference = decode_image(data, native(3)).pixels.astype(int) - rgb_pixels()
    assert abs(difference).mean() < 4
    assert probe_image(data) == (W, H, 3)


def test_a_jpeg_is_made_grey_and_rgb() -> None:
    colour = encoded(Image.fromarray(rgb_pixels()), "JPEG", quality=98, subsampling=0)
    grey = encoded(Image.fromarray(grey_pixels()), "JPEG", quality=98)
    for data in (colour, grey):
        assert abs(decode_image(data, native(1)).pixels[..., 0].astype(int) - grey_pixels()).max() <= 6
    assert decode_image(grey, native(3)).pixels.shape == (H, W, 3)
    assert probe_image(grey) == (W, H, 1)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    data = encoded(Image.fromarray(rgb_pixels()).convert("CMYK"), kind)
    assert abs(decode_image(data, native(3)).pixels.astype(int) - rgb_pixels()).mean() < 6


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_transparency_lies_over_white(kind: str, options: dict[str, object]) -> None:
    pixels = decode_image(encoded(rgba_image(), kind, **options), native(3)).pixels
    np.testing.assert_array_equal(pixels, over_white(rgb_pixels()))
    grey = decode_image(encoded(rgba_image(), kind, **options), native(1)).pixels
    np.testing.assert_array_equal(grey, match_channels(over_white(rgb_pixels()), 1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_with_transparency_lies_over_white(kind: str) -> None:
    data = encoded(Image.merge("LA", (Image.fromarray(grey_pixels()), rgba_image().getchannel("A"))), kind)
    np.testing.assert_array_equal(decode_image(data, native(1)).pixels[..., 0], over_white(grey_pixels()))
    assert probe_image(data) == (W, H, 1)


def palette_image() -> Image.Image:
    indices = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 3
    image = Image.fromarray(indices)
    image = image.convert("P") if image.mode != "P" else image
    image.putdata(indices.ravel().tolist())
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_a_palette_is_looked_up(kind: str) -> None:
    data = encoded(palette_image(), kind)
    pixels = decode_image(data, native(3)).pixels
    assert pixels[0, :3].tolist() == [[255, 0, 0], [0, 255, 0], [10, 20, 30]]
    assert probe_image(data) == (W, H, 3)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_palette_entry_is_white(kind: str, channels: int) -> None:
    pixels = decode_image(encoded(palette_image(), kind, transparency=1), native(channels)).pixels
    assert pixels[0, 1].tolist() == [255] * channels
    assert pixels[0, 2].tolist() == ([10, 20, 30] if channels == 3 else [18])


def test_a_transparent_colour_is_white() -> None:
    data = encoded(Image.fromarray(rgb_pixels()), "PNG", transparency=tuple(rgb_pixels()[2, 3].tolist()))
    pixels = decode_image(data, native(3)).pixels
    assert pixels[2, 3].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(pixels[3:], rgb_pixels()[3:])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM", "GIF"])
def test_one_bit_is_black_and_white(kind: str) -> None:
    bits = grey_pixels() > 128
    pixels = decode_image(encoded(Image.fromarray(bits), kind), native(1)).pixels
    np.testing.assert_array_equal(pixels[..., 0], np.where(bits, 255, 0))


def sixteen_bits() -> npt.NDArray[np.uint16]:
    return np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    data = encoded(Image.fromarray(sixteen_bits()), kind)
    np.testing.assert_array_equal(decode_image(data, native(1)).pixels[..., 0], np.rint(sixteen_bits() / 257))
    assert probe_image(data) == (W, H, 1)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".ppm"])
def test_sixteen_bit_rgb_is_scaled_not_clipped(suffix: str) -> None:
    values = np.stack([sixteen_bits(), sixteen_bits()[::-1], sixteen_bits()[:, ::-1]], axis=-1)
    data = cv2.imencode(suffix, values[..., ::-1])[1].tobytes()
    assert abs(decode_image(data, native(3)).pixels - values / 257).max() <= 1


def test_a_transparent_grey_of_sixteen_bits_is_white() -> None:
    data = encoded(Image.fromarray(sixteen_bits()), "PNG", transparency=0)
    assert decode_image(data, native(1)).pixels[0, :2, 0].tolist() == [255, 1]


@pytest.mark.parametrize(
    ("scale", "offset", "expected"), [(1.0, 0.0, 255.0), (255.0, 0.0, 255.0), (4000.0, -300.0, 255.0)]
)
def test_a_float_tiff_is_scaled_by_its_range(scale: float, offset: float, expected: float) -> None:
    values = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    data = encoded(Image.fromarray(values * np.float32(scale) + np.float32(offset)), "TIFF")
    difference = decode_image(data, native(1)).pixels[..., 0] - values * expected
    assert abs(difference).max() <= 0.51


def test_a_float_tiff_may_hold_nothing_finite() -> None:
    values = np.full((H, W), np.nan, np.float32)
    assert decode_image(encoded(Image.fromarray(values), "TIFF"), native(1)).pixels.max() == 0
    values[3, 4], values[3, 5] = 1.0, np.inf
    pixels = decode_image(encoded(Image.fromarray(values), "TIFF"), native(1)).pixels
    assert pixels[3, 3:6, 0].tolist() == [0, 255, 255]


def test_wide_integers_are_scaled_by_their_range() -> None:
    values = np.linspace(-70_000, 200_000, H * W).reshape(H, W).astype(np.int32)
    pixels = decode_image(encoded(Image.fromarray(values), "TIFF"), native(1)).pixels
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)


def test_a_maximum_of_a_pgm_is_white() -> None:
    data = b"P5 3 1 1000\n" + np.array([0, 500, 1000], ">u2").tobytes()
    assert decode_image(data, native(1, 1, 3)).pixels.ravel().tolist() == [0, 128, 255]


@pytest.mark.parametrize("maximum", [300, 1023, 4095, 65535])
def test_dark_deep_pgms_stay_dark(maximum: int) -> None:
    values = np.array([[0, 3, 200, maximum // 2]])
    head = b"P5 4 1 %d\n" % maximum
    pixels = decode_image(head + values.astype(">u2").tobytes(), native(1, 1, 4)).pixels.ravel()
    assert abs(pixels - values.ravel() * (255 / maximum)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_exif_rotation_is_applied(kind: str, orientation: int) -> None:
    # Source: the EXIF table: from what is stored to what is meant to be seen
    upright: Callable[[Pixels], Pixels] = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless: dict[str, dict[str, object]] = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}
    options = lossless.get(kind, {})
    data = encoded(Image.fromarray(rgb_pixels()), kind, exif=exif, **options)
    expected = upright(rgb_pixels())
    height, width = expected.shape[:2]
    decoded = decode_image(data, native(3, height, width))
    assert abs(decoded.pixels.astype(int) - expected).max() <= (12 if kind == "JPEG" else 0)
    assert (decoded.width_px, decoded.height_px) == (width, height)
    assert probe_image(data) == (width, height, 3)


def test_damaged_exif_leaves_the_image_upright() -> None:
    data = encoded(Image.fromarray(rgb_pixels()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert decode_image(data, native(3)).pixels.shape == (H, W, 3)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    first, second = (Image.new("RGB", (W, H), colour) for colour in ("red", "blue"))
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert decode_image(data, native(3)).pixels[5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_one_pixel_is_an_image(kind: str) -> None:
    data = encoded(Image.new("RGB", (1, 1), (7, 7, 7)), kind)
    pixels = decode_image(data, native(3, 5, 3)).pixels
    assert pixels.shape == (5, 3, 3)
    assert abs(pixels.astype(int) - 7).max() <= 1
    assert probe_image(data)[:2] == (1, 1)


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(60) + data[middle + 60 :]


def noise(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_cut_file_is_truncated(kind: str, share: float) -> None:
    data = encoded(noise(), kind)
    with pytest.raises(ImageError, match=r"^truncated: ") as caught:
        decode_image(data[: max(12, int(len(data) * share))], native(3))
    assert caught.value.status == "truncated"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damage_is_unreadable(kind: str) -> None:
    with pytest.raises(ImageError, match=r"^unreadable: "):
        decode_image(damaged(encoded(noise(), kind)), native(3))


def test_no_bytes_are_empty() -> None:
    for function in (lambda data: decode_image(data, native(3)), probe_image):
        with pytest.raises(ImageError, match=r"^empty: "):
            function(b"")


@pytest.mark.parametrize(
    "data", [b"hello, world", b"<svg/>", b"%PDF-1.7", b"\0\0\0\x18ftypisom", bytes(500), b"%!PS-Adobe"]
)
def test_a_foreign_format_is_unsupported(data: bytes) -> None:
    for function in (lambda data: decode_image(data, native(3)), probe_image):
        with pytest.raises(ImageError, match=r"^unsupported: not one of .*JPEG.* it starts with b"):
            function(data)


def test_too_many_pixels_are_not_decoded() -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 200_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ImageError, match=r"^too_large: 200000 x 100000 px are more than 100,000,000"):
        decode_image(bomb, native(3))
    with pytest.raises(ImageError, match=r"^too_large: 80 x 60 px are more than 4,799"):
        decode_image(encoded(noise(), "JPEG"), native(3), max_pixels=4799)
    assert decode_image(encoded(noise(), "JPEG"), native(3), max_pixels=4800).width_px == 80


def outcome(data: bytes) -> str:
    try:
        decode_image(data, native(3), max_pixels=10_000)
    except ImageError as err:
        return err.status
    return "ok"


def test_random_bytes_are_never_another_error() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        good = encoded(noise(9, 13), kind)
        for _ in range(60):
            data = bytearray(good)
            for place in rng.integers(2, len(data), rng.integers(1, 6)):
                data[place] = rng.integers(256)
            assert outcome(bytes(data)) in {"ok", "truncated", "unreadable", "unsupported", "too_large"}


def test_a_same_size_image_is_untouched() -> None:
    pixels = rgb_pixels()
    assert resize_pixels(pixels, native(3)) is pixels


def test_shrinking_averages_by_area() -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (3, 5, 1), np.uint8)
    large = blocks.repeat(7, axis=0).repeat(4, axis=1)
    np.testing.assert_array_equal(resize_pixels(large, native(1, 3, 5)), blocks)


def test_each_side_shrinks_or_grows_by_its_own_rule() -> None:
    columns = np.arange(40, dtype=np.uint8).reshape(1, 40, 1).repeat(2, axis=0)
    resized = resize_pixels(columns, native(1, 6, 10))
    np.testing.assert_array_equal(resized[..., 0], np.tile(np.rint(np.arange(10) * 4 + 1.5), (6, 1)))


def test_crop_keeps_the_centre_and_the_aspect() -> None:
    pixels = np.zeros((8, 20, 3), np.uint8)
    pixels[:, 6:14] = 200
    spec = ImageSpec(height_px=4, width_px=4, channels=3, resize="crop")
    assert (resize_pixels(pixels, spec) == 200).all()
    tall = ImageSpec(height_px=9, width_px=2, channels=3, resize="crop")
    assert resize_pixels(pixels, tall).shape == (9, 2, 3)
    assert resize_pixels(pixels[:1, :1], tall).shape == (9, 2, 3)


@pytest.mark.parametrize("shape", [(1, 40_000), (40_000, 1)])
def test_extreme_shapes_are_resized(shape: tuple[int, int]) -> None:
    spec = ImageSpec(height_px=6, width_px=7, channels=1, resize="crop")
    assert resize_pixels(np.full((*shape, 1), 9, np.uint8), native(1, 6, 7)).max() == 9
    assert resize_pixels(np.full((*shape, 1), 9, np.uint8), spec).max() == 9


def test_a_photo_scaled_in_the_decoder_is_like_one_scaled_after_it() -> None:
    rows, columns = np.mgrid[:600, :800]
    colours = [128 + 90 * np.sin(rows / 40), 128 + 90 * np.cos(columns / 30), rows / 3]
    photo = np.stack(colours, axis=-1).astype(np.uint8)
    small = decode_image(encoded(Image.fromarray(photo), "JPEG", quality=95), native(3, 64, 48)).pixels
    expected = resize_pixels(photo, native(3, 64, 48))
    assert abs(small.astype(int) - expected).mean() < 2


def test_grey_is_pillows() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (30, 40, 3), np.uint8)
    np.testing.assert_array_equal(match_channels(pixels, 1)[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))


def test_threads_decode_alike() -> None:
    data = encoded(noise(), "JPEG")
    results: list[Pixels] = []
    threads = [threading.Thread(target=lambda: results.append(decode_image(data, native(3)).pixels)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all((result == results[0]).all() for result in results)


@pytest.mark.parametrize(("height", "channels"), [(0, 3), (5, 2)])
def test_a_spec_has_a_size_and_one_or_three_channels(height: int, channels: int) -> None:
    with pytest.raises(ConfigError, match=r"(height_px|channels) is .*Received"):
        ImageSpec(height_px=height, width_px=4, channels=channels)


def test_a_probe_refuses_too_many_pixels_before_it_decodes() -> None:
    encoded = io.BytesIO()
    Image.new("1", (301, 200)).save(encoded, "PNG")
    assert probe_image(encoded.getvalue(), max_pixels=60_200) == (301, 200, 1)
    with pytest.raises(ImageError, match="too_large"):
        probe_image(encoded.getvalue(), max_pixels=60_199)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_a_probe_of_a_palette_decodes_nothing(kind: str) -> None:
    cut = encoded(Image.fromarray(rgb_pixels()).quantize(200), kind)[:-40]
    assert probe_image(cut) == (W, H, 3)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(cut, native(3))


@pytest.mark.parametrize(
    "options",
    [{}, {"lossless": True}, {"lossless": True, "save_all": True, "append_images": [Image.new("RGBA", (W, H))]}],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_probe_of_a_webp_decodes_nothing(mode: str, options: dict[str, object]) -> None:
    cut = encoded(Image.fromarray(rgb_pixels()).convert(mode), "WEBP", **options)[:40]
    assert probe_image(cut) == (W, H, 3)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(cut, native(3))


def test_a_tiff_that_states_its_height_twice_has_one_size() -> None:
    whole = encoded(Image.fromarray(rgb_pixels()), "TIFF", software="x")
    entry = whole.index(struct.pack("<HHI", 305, 2, 2))
    data = whole[:entry] + struct.pack("<HHII", 257, 3, 1, 1) + whole[entry + 12 : -90]
    width, height, _ = probe_image(data)
    decoded = decode_image(data, native(3))
    assert (decoded.width_px, decoded.height_px) == (width, height)
