"""Fitting: geometries and filters against the pipelines that they stand for, written out with Pillow and TensorFlow."""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
import tensorflow as tf
from PIL import Image, ImageOps

from mnist_dist.config import Interpolation
from mnist_dist.errors import ConfigError, ImageError
from mnist_dist.images.decoder import decode_image
from mnist_dist.images.geometry import fit
from mnist_dist.images.jpeg import open_ordinary
from mnist_dist.images.pixels import Pixels, resize_pixels
from mnist_dist.images.resampling import MAX_FRAME, Side, by_pillow
from mnist_dist.images.spec import ImageSpec

Pipeline = Callable[[Image.Image, ImageSpec], Image.Image]
PILLOW: tuple[Interpolation, ...] = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
TF_METHODS: dict[Interpolation, str] = {
    "nearest": "nearest",
    "box": "area",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "lanczos": "lanczos3",
}


def image_of(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def pixels_of(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)


def noise(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> Pixels:
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def spec_of(height: int, width: int, **fields: Any) -> ImageSpec:
    default = {"resampling": "pillow", "quality": "exact", "channels": 3}
    return ImageSpec(**{**default, **fields, "height_px": height, "width_px": width})


# --- the originals ---------------------------------------------------------------------------------------------------


def resized(image: Image.Image, size: tuple[int, int], spec: ImageSpec) -> Image.Image:
    return image.resize(size, Image.Resampling[spec.interpolation.upper()])


def shortest_edge(image: Image.Image, spec: ImageSpec) -> Image.Image:
    (width, height), side = image.size, spec.resize_px
    assert side is not None
    if width <= height:
        return resized(image, (side, int(side * height / width)), spec)
    return resized(image, (int(side * width / height), side), spec)


def cropped_by_torchvision(image: Image.Image, spec: ImageSpec, *, fill: int = 0) -> Image.Image:
    (width, height), (tall, wide) = image.size, (spec.height_px, spec.width_px)
    canvas = Image.new(image.mode, (max(width, wide), max(height, tall)), (fill,) * len(image.getbands()))
    canvas.paste(image, (max(0, (wide - width) // 2), max(0, (tall - height) // 2)))
    left, top = round((canvas.width - wide) / 2.0), round((canvas.height - tall) / 2.0)
    return canvas.crop((left, top, left + wide, top + tall))


def torchvision(image: Image.Image, spec: ImageSpec) -> Image.Image:
    return cropped_by_torchvision(shortest_edge(image, spec), spec)


def squashed(image: Image.Image, spec: ImageSpec) -> Image.Image:
    assert spec.resize_px is not None
    return cropped_by_torchvision(resized(image, (spec.resize_px, spec.resize_px), spec), spec)


def hugging_face(image: Image.Image, spec: ImageSpec) -> Image.Image:
    image = shortest_edge(image, spec)
    (width, height), (tall, wide) = image.size, (spec.height_px, spec.width_px)
    canvas = Image.new(image.mode, (max(width, wide), max(height, tall)))
    padded = math.ceil((canvas.width - width) / 2), math.ceil((canvas.height - height) / 2)
    canvas.paste(image, padded)
    left, top = (width - wide) // 2 + padded[0], (height - tall) // 2 + padded[1]
    return canvas.crop((left, top, left + wide, top + tall))


def bordered_by_timm(image: Image.Image, spec: ImageSpec) -> Image.Image:
    ratio = max(image.height / spec.height_px, image.width / spec.width_px)
    size = max(1, round(image.width / ratio)), max(1, round(image.height / ratio))
    return cropped_by_torchvision(resized(image, size, spec), spec, fill=spec.pad_value)


ORIGINALS: dict[str, tuple[Pipeline, dict[str, Any]]] = {
    "torchvision": (torchvision, {"resize": "shortest-edge", "resize_px": 64}),
    "torchvision, odd": (torchvision, {"resize": "shortest-edge", "resize_px": 37}),
    "hugging face": (hugging_face, {"resize": "shortest-edge", "resize_px": 43, "crop_rounding": "down"}),
    "squash": (squashed, {"resize": "stretch", "resize_px": 64}),
    "squash, odd": (squashed, {"resize": "stretch", "resize_px": 45}),
    "border": (bordered_by_timm, {"resize": "longest-edge-pad", "pad_value": 77}),
    "stretch": (lambda image, spec: resized(image, (spec.width_px, spec.height_px), spec), {"resize": "stretch"}),
}


def cases(fields: dict[str, Any], *, seed: int, count: int) -> Iterator[tuple[Pixels, ImageSpec]]:
    """Images and inputs of random sizes, which are not extreme."""
    rng = np.random.default_rng(seed)
    while count:
        height, width = (int(side) for side in np.exp(rng.uniform(0, 6.2, 2)))
        spec = spec_of(*(int(side) for side in rng.integers(1, 70, 2)), channels=int(rng.choice([1, 3])), **fields)
        size = fit(height, width, spec).size
        if size[0] <= MAX_FRAME * spec.height_px and size[1] <= MAX_FRAME * spec.width_px:
            count -= 1
            yield noise(rng, height, width, spec.channels), spec


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("original", ORIGINALS)
def test_pixels_are_those_of_the_original(original: str, interpolation: Interpolation) -> None:
    pipeline, fields = ORIGINALS[original]
    for pixels, spec in cases({**fields, "interpolation": interpolation}, seed=PILLOW.index(interpolation), count=60):
        np.testing.assert_array_equal(resize_pixels(pixels, spec), pixels_of(pipeline(image_of(pixels), spec)))


@pytest.mark.parametrize(
    "other",
    [{"interpolation": "bicubic"}, {"resize_px": 63}, {"crop_rounding": "down"}, {"resampling": "opencv"}],
)
def test_another_rule_gives_other_pixels(other: dict[str, Any]) -> None:
    pixels = noise(np.random.default_rng(0), 150, 200)
    spec = spec_of(55, 55, resize="shortest-edge", resize_px=66)
    expected = pixels_of(torchvision(image_of(pixels), spec))
    np.testing.assert_array_equal(resize_pixels(pixels, spec), expected)
    assert (resize_pixels(pixels, replace(spec, **other)) != expected).any()


def test_without_a_length_the_shortest_edge_just_covers_the_input() -> None:
    for pixels, spec in cases({"resize": "shortest-edge"}, seed=3, count=200):
        height, width = pixels.shape[:2]
        size = fit(height, width, spec).size
        assert size[0] >= spec.height_px
        assert size[1] >= spec.width_px
        if min(size) > 1:
            smaller = fit(height, width, replace(spec, resize_px=min(size) - 1)).size
            assert smaller[0] < spec.height_px or smaller[1] < spec.width_px


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 900), (3, 2)])
@pytest.mark.parametrize("resampling", ["opencv", "pillow", "keras"])
@pytest.mark.parametrize("resize", ["stretch", "crop", "shortest-edge", "longest-edge-pad"])
def test_extreme_shapes_stay_of_one_colour(shape: tuple[int, int], resampling: str, resize: str) -> None:
    pixels = np.full((*shape, 3), (9, 200, 255), np.uint8)
    result = resize_pixels(pixels, spec_of(21, 30, resampling=resampling, resize=resize, resize_px=None))
    assert result.shape == (21, 30, 3)
    colours = {tuple(colour) for colour in result.reshape(-1, 3).tolist()}
    assert (9, 200, 255) in colours
    assert colours <= {(9, 200, 255)} | ({(0, 0, 0)} if resize == "longest-edge-pad" else set())


@pytest.mark.parametrize("shape", [(3, 700), (700, 3)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_an_extreme_shape_differs_by_one_level_at_most(shape: tuple[int, int], interpolation: Interpolation) -> None:
    spec = spec_of(24, 24, resize="shortest-edge", resize_px=29, interpolation=interpolation)
    pixels = noise(np.random.default_rng(1), *shape)
    expected = pixels_of(torchvision(image_of(pixels), spec)).astype(int)
    assert abs(resize_pixels(pixels, spec) - expected).max() <= 1
    assert np.ptp(expected) > 100


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_neighbourhood_of_a_window_is_resized_in_the_order_of_the_whole(
    turned: bool, interpolation: Interpolation
) -> None:
    pixels, rows, columns = noise(np.random.default_rng(1), 230, 50), Side(230, 584, 290, 5), Side(50, 127, 8, 110)
    if turned:
        pixels, rows, columns = pixels.transpose(1, 0, 2), columns, rows
    whole = pixels_of(image_of(pixels).resize((columns.resized, rows.resized), Image.Resampling[interpolation.upper()]))
    expected = whole[rows.first : rows.first + rows.kept, columns.first : columns.first + columns.kept].astype(int)
    assert rows.is_extreme or columns.is_extreme
    assert abs(by_pillow(pixels, rows, columns, interpolation) - expected).max() <= 1


def test_a_view_is_resized_as_its_copy() -> None:
    view = noise(np.random.default_rng(2), 50, 90).transpose(1, 0, 2)[::-1]
    for resampling in ("opencv", "pillow", "keras"):
        spec = spec_of(31, 33, resampling=resampling, resize="shortest-edge", resize_px=40)
        np.testing.assert_array_equal(resize_pixels(view, spec), resize_pixels(view.copy(), spec))


def test_a_crop_that_needs_no_resize_is_still_cropped() -> None:
    pixels = noise(np.random.default_rng(2), 90, 8)
    for resampling in ("opencv", "pillow", "keras"):
        result = resize_pixels(pixels, spec_of(20, 8, resampling=resampling, resize="crop"))
        np.testing.assert_array_equal(result, pixels[35:55])


# --- decoding --------------------------------------------------------------------------------------------------------

JPEGS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "progressive": {"progressive": True},
    "poor": {"quality": 20},
}


def photo(height: int, width: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    colours = [128 + 90 * np.sin(rows / 13), 128 + 90 * np.cos(columns / 11), (rows * columns) % 255]
    return Image.fromarray(np.stack(colours, axis=-1).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def check_decoded_as_by_pillow(data: bytes, *, channels: int = 3) -> None:
    spec = spec_of(50, 60, resize="shortest-edge", resize_px=64, interpolation="bicubic", channels=channels)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L" if channels == 1 else "RGB")
    expected = pixels_of(torchvision(image, spec))
    np.testing.assert_array_equal(decode_image(data, spec).pixels, expected)
    assert (decode_image(data, replace(spec, interpolation="bilinear")).pixels != expected).any()


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_exact_decoding_is_pillows(kind: str, channels: int) -> None:
    for height, width in ((301, 203), (128, 255), (77, 78)):
        check_decoded_as_by_pillow(jpeg(photo(height, width), **JPEGS[kind]), channels=channels)
        check_decoded_as_by_pillow(jpeg(photo(height, width).convert("L"), **JPEGS[kind]), channels=channels)


@pytest.mark.parametrize("sampling", ["440", "411"])
def test_exact_decoding_of_rare_sampling_is_pillows(sampling: str) -> None:
    check_decoded_as_by_pillow(simplejpeg.encode_jpeg(np.asarray(photo(203, 301)), colorsubsampling=sampling))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exact_decoding_turns_upright_first(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    check_decoded_as_by_pillow(jpeg(photo(140, 203), exif=exif))


def test_exact_decoding_notices_damage() -> None:
    data = jpeg(photo(300, 400), quality=95)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data[: len(data) // 2], spec_of(50, 60))


@pytest.mark.parametrize(
    ("size", "fields", "decoded"),
    [
        ((375, 500), {}, (375, 500)),
        ((375, 500), {"quality": "fast"}, (375, 500)),
        ((1000, 1200), {"quality": "fast"}, (1000, 1200)),
        ((1100, 1200), {"quality": "fast"}, (550, 600)),
        ((2000, 9000), {"quality": "fast"}, (1000, 4500)),
        ((1024, 1024), {"quality": "fast"}, (512, 512)),
        ((375, 500), {"quality": "fast", "resampling": "opencv"}, (282, 375)),
        ((375, 500), {"quality": "exact", "resampling": "opencv"}, (375, 500)),
    ],
)
def test_no_jpeg_is_decoded_smaller_than_what_its_filter_needs(
    size: tuple[int, int], fields: dict[str, Any], decoded: tuple[int, int]
) -> None:
    spec = spec_of(224, 224, resize="shortest-edge", resize_px=256, **fields)
    assert open_ordinary(jpeg(photo(*size)), spec).decode().shape[:2] == decoded


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("resampling", ["pillow", "keras"])
def test_fast_decoding_keeps_the_geometry(orientation: int, resampling: str) -> None:
    rows, columns = np.mgrid[:600, :900]
    smooth = np.stack([rows / 3, columns / 4, 128 + 90 * np.sin(columns / 60)], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(Image.fromarray(smooth), quality=95, exif=exif)
    spec = spec_of(70, 80, resize="shortest-edge", resize_px=96, resampling=resampling)
    difference = decode_image(data, replace(spec, quality="fast")).pixels.astype(int) - decode_image(data, spec).pixels
    assert abs(difference).mean() < 1.5


# --- TensorFlow ------------------------------------------------------------------------------------------------------


def check_rounded(result: Pixels, exact: npt.NDArray[np.float32]) -> None:
    """The result is the exact one, rounded; where that lies half-way, both neighbours are right."""
    assert result.shape == exact.shape
    assert abs(result - exact.clip(0, 255)).max() <= 0.5 + 0.02


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("interpolation", TF_METHODS)
def test_keras_pixels_are_those_of_tensorflow(interpolation: Interpolation, antialias: bool) -> None:
    fields = {"resampling": "keras", "interpolation": interpolation, "antialias": antialias}
    for pixels, spec in cases(fields, seed=5, count=40):
        size, method = (spec.height_px, spec.width_px), TF_METHODS[interpolation]
        check_rounded(resize_pixels(pixels, spec), tf.image.resize(pixels, size, method, antialias=antialias).numpy())


@pytest.mark.parametrize("other", [{"interpolation": "bicubic"}, {"antialias": True}, {"resampling": "pillow"}])
def test_another_filter_is_not_tensorflows(other: dict[str, Any]) -> None:
    pixels = noise(np.random.default_rng(0), 90, 120)
    spec = spec_of(40, 50, resampling="keras", antialias=False)
    exact = tf.image.resize(pixels, (40, 50)).numpy()
    check_rounded(resize_pixels(pixels, spec), exact)
    with pytest.raises(AssertionError):
        check_rounded(resize_pixels(pixels, replace(spec, **{"antialias": True, **other})), exact)


def test_keras_crop_is_smart_resize() -> None:
    for pixels, spec in cases({"resampling": "keras", "antialias": False, "resize": "crop"}, seed=6, count=60):
        size = (spec.height_px, spec.width_px)
        exact = keras.preprocessing.image.smart_resize(pixels.astype(np.float32), size)
        check_rounded(resize_pixels(pixels, spec), exact)


def test_keras_padding_is_resize_with_pad() -> None:
    fields = {"resampling": "keras", "antialias": False, "resize": "longest-edge-pad"}
    compared = 0
    for pixels, spec in cases(fields, seed=7, count=80):
        height, width = pixels.shape[:2]
        if min(spec.height_px * width / height, spec.width_px * height / width) >= 2:  # TensorFlow fails below 1 px
            compared += 1
            check_rounded(
                resize_pixels(pixels, spec), tf.image.resize_with_pad(pixels, spec.height_px, spec.width_px).numpy()
            )
    assert compared >= 20


def test_keras_pixels_of_a_window_are_those_of_the_whole() -> None:
    for pixels, spec in cases({"resampling": "keras", "resize": "shortest-edge", "resize_px": 41}, seed=8, count=60):
        height, width = fit(pixels.shape[0], pixels.shape[1], spec).size
        whole = tf.image.resize(pixels, (height, width), antialias=True).numpy().clip(0, 255)
        bands = [cropped_by_torchvision(Image.fromarray(band), spec) for band in whole.transpose(2, 0, 1)]
        check_rounded(resize_pixels(pixels, spec), np.stack([np.asarray(band) for band in bands], axis=-1))


# --- what a spec may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resize_px": 0, "resize": "stretch"}, r"resize_px is at least 1 px\. Received: resize_px=0"),
        ({"resize_px": 9, "resize": "crop"}, r"resize_px goes with resize stretch or shortest-edge\. Received"),
        ({"resize_px": 9, "resize": "longest-edge-pad"}, r"resize_px goes with resize stretch or shortest-edge"),
        ({"pad_value": 256, "resize": "longest-edge-pad"}, r"pad_value is 0 to 255\. Received: pad_value=256"),
        ({"pad_value": 1, "resize": "shortest-edge"}, r"pad_value goes with resize longest-edge-pad\. Received"),
        ({"resampling": "opencv", "interpolation": "bicubic"}, r"opencv has no interpolation but bilinear.*Received"),
        ({"resampling": "keras", "interpolation": "hamming"}, r"interpolation is one of nearest, box, .*Received"),
        ({"resampling": "pillow", "antialias": False}, r"only resampling keras goes without antialias\. Received"),
    ],
)
def test_a_spec_says_nothing_that_is_not_done(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(5, 6, **fields)
