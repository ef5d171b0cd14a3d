"""Pillow: every common format but ordinary JPEG.

Owns: what Pillow is asked to open, what it gets wrong and is corrected here, and the conversion of its modes.
Does not own: TIFF kinds and depths that Pillow does not read (`tiff`).

Pixels are converted in strips of rows: a palette with transparency would else take ten bytes per pixel.
"""

import functools
import io
from collections.abc import Callable
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, GifImagePlugin, Image, ImageFile, UnidentifiedImageError

from mnist_dist.errors import ImageError
from mnist_dist.images import av1, jpeg, png, webp
from mnist_dist.images.depth import eight_bits
from mnist_dist.images.ifd import ORIENTATION, check_segments, read_page
from mnist_dist.images.jpeg2000 import has_reordered_channels
from mnist_dist.images.pixels import STRIP_PX, NotForMe, Opened, Pixels, rotate, strips, upright_size
from mnist_dist.images.spec import ImageSpec
from mnist_dist.images.tiff import pillow_is_right

_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
_INTERLEAVED = frozenset({"RGB", "RGBA", "RGBX", "BGR", "BGRX"})  # Palettes whose colours stand one after another.
_DEEP_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # In memory; all others: 4.
_CODEC_BYTES = {"JPEG": 8, "WEBP": 12, "AVIF": 9, "JPEG2000": 16, "TIFF": 4}
"""What the library behind Pillow takes beside Pillow's image, bytes per pixel at most: measured, `test_budget`."""
_AVIF_PADDING_PX = 64  # Some encoders fill the last superblock.
_AVIF_PARTS = (b"grid", b"lsel", b"a1op")  # Of tiles, or of layers: frames may be larger than the image.
_BLOCK_BYTES = 2**26
"""Blocks of this size go back to the system at once. Those of Pillow's 16 MiB stay with each thread that made one."""


class _FirstOfGif(GifImagePlugin.GifImageFile):
    """A GIF of which only the first frame is wanted.

    Pillow would else allocate what is to be laid over that frame, of any size, as soon as it opens the file.
    """

    @property
    def disposal_method(self) -> int:
        return 0

    @disposal_method.setter
    def disposal_method(self, value: int) -> None:
        pass


def open_any(data: bytes, spec: ImageSpec | None, *, kind: str) -> Opened:
    """Opens an image of the format that Pillow calls `kind`.

    Raises:
        ImageError: the header is damaged.
        Exception: whatever Pillow raises, from here and from `decode`.
    """
    image = _open(data, kind)
    return _opened(image, _orientation(image), lambda: _pixels(image))


def open_jpeg(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens a JPEG of 8 bits: CMYK, arithmetic code, lossless, rare sampling.

    Raises:
        NotForMe: another depth.
        ImageError: the header is damaged.
    """
    header = jpeg.read_header(data)
    if header.bits != 8 or header.marker == jpeg.LS:
        raise NotForMe(header.kind)
    image = _open(data, "JPEG")
    image.decodermaxblock = max(len(data), image.decodermaxblock)  # Arithmetic code is decoded in one piece, or not.
    return _opened(image, header.orientation, lambda: _pixels(image))


def open_png(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens a PNG or the first image of an animated one. Transparent colours are compared in their full depth."""
    header = png.read_header(data)
    image = _open(data, "PNG")
    transparent = image.info.pop("transparency", None)

    def decode() -> Pixels:
        image.load()
        image.info.pop("transparency", None)  # One that stands behind the pixels does not count.
        if header.colour is not None:
            return _without_colour(image, data, header)
        if transparent is not None:
            image.info["transparency"] = transparent
        return _pixels(image)

    opened = _opened(image, header.orientation, decode)
    deep_bytes = 6 * image.width * image.height if header.has_deep_colour else 0
    return opened._replace(memory_bytes=opened.memory_bytes + deep_bytes)


def open_tiff(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens a TIFF of a kind that Pillow decodes right.

    Raises:
        NotForMe: another kind.
        ImageError: the header is damaged, or a strip or tile lies behind the end of the file.
    """
    page = read_page(data)
    if not pillow_is_right(page):
        raise NotForMe(page.kind)
    check_segments(data, page)
    image = _open(data, "TIFF")  # Pillow turns it upright itself.
    if image.size != upright_size((page.width_px, page.height_px), page.orientation):
        raise NotForMe(page.kind)  # A tag stands twice, and Pillow takes the other one.
    opened = _opened(image, 1, lambda: _pixels(image))
    return opened._replace(memory_bytes=opened.memory_bytes + page.largest_segment_bytes)


def open_jpeg2000(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens a JPEG 2000 file whose channels stand in the order of their colours.

    Raises:
        NotForMe: they do not.
    """
    if has_reordered_channels(data):
        raise NotForMe("JPEG 2000 with reordered channels")
    return open_any(data, spec, kind="JPEG2000")


def open_pnm(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens a PBM, PGM, PPM or grey PFM.

    Raises:
        NotForMe: a colour PFM or a PAM.
    """
    kind = {b"PF": "colour PFM", b"P7": "PAM"}.get(data[:2])
    if kind is not None:
        raise NotForMe(kind)
    return open_any(data, spec, kind="PPM")


def open_gif(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens the first image of a GIF. What it leaves uncovered of the canvas is transparent."""
    prepare()
    try:
        image = _FirstOfGif(io.BytesIO(data))
    except SyntaxError:
        raise OSError("the header is not complete or not valid") from None
    frame = image.tile[0].extents if image.tile else None
    if frame is None or frame == (0, 0, *image.size):
        return _opened(image, 1, lambda: _pixels(image))
    return _opened(image, 1, lambda: _on_white(_pixels(image), *frame))


def open_webp(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens a WebP or the first image of an animated one."""
    header = webp.read_header(data)
    stored = (header.width_px, header.height_px)

    def decode() -> Pixels:
        with _open(data, "WEBP") as image:
            if image.size != stored:
                raise ImageError("unreadable", f"the header says {stored}, the image has {image.size} px")
            return rotate(_pixels(image), header.orientation)

    memory_bytes = _memory_bytes(stored[0] * stored[1], "RGBA", "WEBP")
    return Opened(*upright_size(stored, header.orientation), 3, memory_bytes, decode)


def open_avif(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens an AVIF or the first image of an animated one. Frames larger than the image count for the limits.

    Raises:
        ImageError: its only frame is larger than the container says, or the container has too many parts.
    """
    image = _open(data, "AVIF")
    frames = av1.frame_sizes(data)
    limit = [side + -side % _AVIF_PADDING_PX for side in image.size]
    larger = [frame for frame in frames if frame[0] > limit[0] or frame[1] > limit[1]]
    if larger and not any(kind in data for kind in _AVIF_PARTS):
        raise ImageError("unreadable", f"AVIF: the container says {image.size}, a frame has {larger[0]} px")
    opened = _opened(image, _orientation(image), lambda: _pixels(image))
    frame_px = max((width * height for width, height in frames), default=0)
    if frame_px <= image.width * image.height:
        return opened
    return opened._replace(memory_bytes=opened.memory_bytes + frame_px * _CODEC_BYTES["AVIF"], frame_px=frame_px)


def open_bmp(data: bytes, spec: ImageSpec | None, *, kind: str) -> Opened:
    """Opens a BMP, or a DIB without a file header. One whose alpha is zero everywhere is opaque: it has no alpha."""
    image = _open(data, kind)

    def decode() -> Pixels:
        image.load()
        is_opaque = image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)
        return _in_strips(image, 3, _rgb) if is_opaque else _pixels(image)

    return _opened(image, 1, decode)


def upright_pixels(image: Image.Image) -> Pixels:
    """Pixels `uint8 [h, w, 1 or 3]` of an image that somebody opened or made, upright, over white; it stays as it is.

    Raises:
        Exception: whatever Pillow raises.
    """
    image.load()
    stored = image.copy() if image.mode == "P" else image  # A palette with transparency would be replaced.
    return rotate(_pixels(stored), _orientation(image))


@functools.cache
def prepare() -> None:
    """Makes settings that are global to the process, at the first image rather than on import."""
    Image.MAX_IMAGE_PIXELS = None  # `max_pixels` replaces Pillow's limit, which cannot be set per call.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # The caller decides in how many threads to decode.
    Image.core.set_block_size(_BLOCK_BYTES)  # type: ignore[attr-defined] # documented in "Block Allocator"
    Image.init()  # Registers all formats before several threads need them.


def _open(data: bytes, kind: str) -> ImageFile.ImageFile:
    prepare()
    try:
        return Image.open(io.BytesIO(data), formats=(kind,))
    except UnidentifiedImageError:  # Its message contains a memory address.
        raise OSError("the header is not complete or not valid") from None


def _opened(image: Image.Image, orientation: int, decode: Callable[[], Pixels]) -> Opened:
    width, height = upright_size(image.size, orientation)
    channels = 1 if _is_grey(image) else 3
    memory_bytes = _memory_bytes(width * height, image.mode, image.format or "")

    def decode_and_close() -> Pixels:
        try:
            return rotate(decode(), orientation)
        finally:
            image.close()  # Its memory is free before that of the next image is taken.

    return Opened(width, height, channels, memory_bytes, decode_and_close)


def _memory_bytes(pixels: int, mode: str, kind: str) -> int:
    """What decoding takes: Pillow's image, what the library behind it takes, the result, and strips on the way."""
    pixel_bytes = _PIXEL_BYTES.get(mode, 4)
    if mode in _DEEP_MODES:
        pixel_bytes *= 3  # Its values as an array, and a copy on the way there.
    pixel_bytes += _CODEC_BYTES.get(kind, 0) + (1 if mode in ("1", "L", *_DEEP_MODES) else 3)
    return pixels * pixel_bytes + min(pixels, STRIP_PX) * 16  # A strip of RGBA, four times.


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Any damage to the EXIF data: treat the image as upright.
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


# --- pixels ----------------------------------------------------------------------------------------------------------


def _is_grey(image: Image.Image) -> bool:
    if image.mode not in ("P", "PA") or image.palette is None:
        return image.mode in _GREY_MODES
    layout, stored = image.palette.getdata()
    if layout in _INTERLEAVED:
        red, green, blue = (stored[band :: len(layout)] for band in range(3))
    else:
        red, green, blue = (band.tobytes() for band in _palette(image)[:, :3].T)
    return bytes(red) == bytes(green) == bytes(blue)


def _pixels(image: Image.Image) -> Pixels:
    """Pixels `uint8 [h, w, 1 or 3]` of an image in any mode, over white."""
    image.load()
    if image.mode in _DEEP_MODES:
        values = np.asarray(image)
        if image.format == "PPM" and image.mode == "I":
            values = values.astype(np.uint16)  # Pillow has scaled them to 0-65535 by the maximum in the header.
        return eight_bits(values)[..., None]
    if image.has_transparency_data:
        if image.mode == "P":
            return _looked_up(image)
        return _in_strips(image, 3, _over_white)
    return _in_strips(image, *((1, _grey) if image.mode in _GREY_MODES else (3, _rgb)))


def _on_white(pixels: Pixels, left: int, top: int, right: int, bottom: int) -> Pixels:
    canvas = np.full_like(pixels, 255)
    canvas[top:bottom, left:right] = pixels[top:bottom, left:right]
    return canvas


def _in_strips(image: Image.Image, channels: int, convert: Callable[[Image.Image], Image.Image]) -> Pixels:
    height, width = image.height, image.width
    rows = strips(height, width)
    if len(rows) == 1:
        return np.frombuffer(convert(image).tobytes(), np.uint8).reshape(height, width, channels)
    pixels = np.empty((height, width, channels), np.uint8)
    for part in rows:
        strip = convert(image.crop((0, part.start, width, part.stop)))
        pixels[part] = np.asarray(strip, np.uint8).reshape(-1, width, channels)
    return pixels


def _grey(image: Image.Image) -> Image.Image:
    return image if image.mode == "L" else image.convert("L")


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _looked_up(image: Image.Image) -> Pixels:
    """The colours of a palette, laid over white before they are looked up."""
    colours = Image.fromarray(_palette(image)[None])  # RGBA
    table = np.asarray(_over_white(colours))[0]
    image.putpalette(table.tobytes(), "RGB")
    image.info.pop("transparency", None)
    return _in_strips(image, 3, _rgb)


def _palette(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The 256 colours of a palette, `uint8 [256, 4]`: RGB and alpha."""
    shown = Image.new("P", (1, 1))
    if image.palette is not None:
        shown.putpalette(image.palette)  # Asking the image itself would decode it, whatever its size.
    stored = np.frombuffer(bytes(shown.getpalette("RGBA") or ()), np.uint8).reshape(-1, 4)[:256]
    palette = np.zeros((256, 4), np.uint8)
    palette[:, 3] = 255
    palette[: len(stored)] = stored
    transparent = image.info.get("transparency")
    if isinstance(transparent, bytes):
        palette[: len(transparent), 3] = np.frombuffer(transparent, np.uint8)[:256]
    elif isinstance(transparent, int):
        palette[transparent, 3] = 0
    return palette


def _without_colour(image: Image.Image, data: bytes, header: png.Header) -> Pixels:
    """Pixels of a loaded PNG of which one colour is transparent, which becomes white."""
    colour = np.array(header.colour, np.uint16)
    if header.has_deep_colour:
        image.close()  # It was loaded only because Pillow notices damage.
        return _without_deep_colour(data, header, colour)
    is_deep = image.mode in _DEEP_MODES
    values = np.asarray(image) if is_deep else _in_strips(image, len(colour), _grey if len(colour) == 1 else _rgb)
    if header.bits < 8:
        colour = colour * np.uint16(255 // (2**header.bits - 1))
    pixels = _pixels(image) if is_deep else np.require(values, requirements="W")
    for rows in strips(image.height, image.width):
        is_transparent = (values[rows].reshape(pixels[rows].shape) == colour).all(axis=-1)
        pixels[rows][is_transparent] = 255
    return pixels


def _without_deep_colour(data: bytes, header: png.Header, colour: npt.NDArray[np.uint16]) -> Pixels:
    """The same for RGB of 16 bits, of which Pillow keeps 8."""
    if header.is_animated:
        raise NotForMe("animated PNG of 16 bits with a transparent colour")  # OpenCV 5.0 crashes on damaged ones.
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16:
        raise ImageError("unreadable", "the PNG is damaged")
    values = cast("npt.NDArray[np.uint16]", found)[..., 2::-1]
    pixels = np.empty(values.shape, np.uint8)
    for rows in strips(*values.shape[:2]):
        pixels[rows] = eight_bits(values[rows])
        pixels[rows][(values[rows] == colour).all(axis=-1)] = 255
    return pixels
