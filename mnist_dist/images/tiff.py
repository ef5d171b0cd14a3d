"""TIFF: which ones Pillow decodes right, and all others by tifffile and imagecodecs.

Owns: what the samples of a page mean (colour, alpha, palette, white-is-zero) and how they become pixels. Does not own:
reading tags (`ifd`), scaling to 8 bits (`depth`).

tifffile is given a header that is written here, from the tags that were read and checked, and never the file. So it
decodes one strip or tile at a time, of the size that memory was reserved for, and knows of no maker's own tags.
"""

# h = height px, w = width px, S = samples of a pixel that are kept

import functools
import io
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnist_dist.errors import ImageError, first_line
from mnist_dist.images import ifd
from mnist_dist.images.depth import (
    WORKING_BYTES,
    Samples,
    cmyk_to_rgb,
    eight_bits,
    lab_to_rgb,
    over_white,
    ycbcr_to_rgb,
)
from mnist_dist.images.ifd import Page, check_segments, read_page
from mnist_dist.images.pixels import Opened, Pixels, rotate, upright_size
from mnist_dist.images.spec import ImageSpec
from mnist_dist.images.streams import stream_px

_JPEGS = frozenset({6, 7, 33007, 34892})
_OWN_HEADER = _JPEGS | {22610, 33003, 33004, 33005, 34712, 34887, 34933, 34934, 50001, 50002, 52546}
"""Compressions whose segments are whole images with a header of their own."""
_CCITT = frozenset({2, 3, 4})
_COMPRESSIONS = frozenset({*range(1, 9), 32773, 32946, 34925, 34926, 34927, 48124, 50000, 50013}) | _OWN_HEADER
"""What tifffile decompresses with imagecodecs; said before either is needed."""
_LIBTIFF_UNPREDICTED = frozenset({1, 32773})  # libtiff ignores a predictor here; it is applied, as the file says.
_INTEGER_BITS = frozenset(range(1, 33)) | {64}
_FLOAT_BITS = frozenset({16, 24, 32, 64})
_SNIFFED_BYTES = 16
"""tifffile looks here for the mark of JFIF, by which it knows how a JPEG stores its colours."""
_MAX_STREAM_FACTOR = 2  # A segment at the edge may be stored whole; more is another image.

# What libtiff decodes in Pillow, by its own tables of modes.
_PILLOW_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000})


@dataclass(frozen=True)
class _Bands:
    """Which samples of a pixel are kept."""

    colour: tuple[int, ...]
    alpha: int | None
    is_premultiplied: bool

    @property
    def all(self) -> tuple[int, ...]:
        return self.colour if self.alpha is None else (*self.colour, self.alpha)


def open_tiff(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens a TIFF for tifffile and imagecodecs: the first full-resolution page, in its own size.

    Raises:
        ImportError: the packages of the extra `formats` are missing.
        ImageError: the header is damaged, or no decoder here reads this kind; `decode`: a strip or tile is damaged.
    """
    page = read_page(data)
    _check_kind(page)
    check_segments(data, page)
    decoder, bands = _Decoder(page, data), _bands(page)
    width, height = upright_size((page.width_px, page.height_px), page.orientation)

    def decode() -> Pixels:
        return rotate(_pixels(page, bands, decoder.samples(bands.all)), page.orientation)

    return Opened(width, height, _channels(page, bands), _memory_bytes(page, bands, decoder.dtype), decode)


# --- meaning ---------------------------------------------------------------------------------------------------------


def _check_kind(page: Page) -> None:
    """Refuses what no decoder here was made for."""
    bits, is_float = set(page.bits), page.sample_formats[0] == ifd.FLOAT
    known = page.photometric in {*range(7), ifd.CIELAB, ifd.ICCLAB, 34892}
    known &= page.compression in _COMPRESSIONS
    known &= page.depth == 1 and page.sample_formats[0] in (ifd.UNSIGNED, ifd.SIGNED, ifd.FLOAT, ifd.UNDEFINED)
    known &= len(set(page.sample_formats)) == 1
    known &= (bits <= (_FLOAT_BITS if is_float else _INTEGER_BITS) and len(bits) == 1) or page.bits == (5, 6, 5)
    known &= page.photometric != ifd.CMYK or (page.ink_set != 2 and page.samples >= 4)
    known &= page.photometric != ifd.PALETTE or (page.bits[0] <= 16 and page.colour_map.size >= 3 << page.bits[0])
    known &= page.photometric not in (ifd.CIELAB, ifd.ICCLAB) or (page.samples >= 3 and bits <= {8, 16})
    known &= page.photometric != ifd.YCBCR or page.compression in _JPEGS or _has_whole_chroma(page) or _is_blocks(page)
    if not known:
        raise ImageError("unsupported", f"not supported: {page.kind}")


def _has_whole_chroma(page: Page) -> bool:
    return page.samples >= 3 and page.subsampling == (1, 1)


def _is_blocks(page: Page) -> bool:
    """Uncompressed YCbCr whose chroma is subsampled; libtiff reads the compressed ones."""
    return page.compression == ifd.NONE and page.bits == (8, 8, 8) and not page.is_planar


def _bands(page: Page) -> _Bands:
    """The first samples are the colour; more bands than it needs are left out, but for alpha."""
    extra = page.extra_samples
    if extra is None:  # Old writers leave it out; Pillow takes a fourth sample of RGB for alpha, too.
        extra = (ifd.UNASSOCIATED,) if page.photometric == ifd.RGB and page.samples == 4 else ()
    alpha, is_premultiplied = None, False
    for position, meaning in enumerate(extra, page.samples - len(extra)):
        if meaning in (ifd.ASSOCIATED, ifd.UNASSOCIATED) and alpha is None and position:
            alpha, is_premultiplied = position, meaning == ifd.ASSOCIATED
    others = page.samples - (alpha is not None)
    count = {ifd.CMYK: 4, ifd.PALETTE: 1}.get(page.photometric, 3 if others >= 3 else 1)
    return _Bands(tuple(band for band in range(page.samples) if band != alpha)[:count], alpha, is_premultiplied)


def _channels(page: Page, bands: _Bands) -> int:
    if page.photometric == ifd.PALETTE:
        red, green, blue = _palette(page).T
        return 1 if np.array_equal(red, green) and np.array_equal(green, blue) else 3
    return 1 if len(bands.colour) == 1 else 3


def _palette(page: Page) -> Pixels:
    """The colour map, `uint8 [2**bits, 3]`. Some writers store 0-255 where 0-65535 is meant, as libtiff knows."""
    colours = page.colour_map[: 3 << page.bits[0]].reshape(3, -1).T.astype(np.uint32)
    palette: Pixels = (colours if colours.max(initial=0) < 256 else colours >> 8).astype(np.uint8)
    return palette


def _pixels(page: Page, bands: _Bands, samples: Samples) -> Pixels:
    """`uint8 [h, w, 1 or 3]` of samples `[h, w, S]`, which it may overwrite."""
    colours = samples[..., : len(bands.colour)]
    bits = page.bits[0] if len(set(page.bits)) == 1 else None
    pixels = _colours(page, colours, bits)
    if bands.alpha is None:
        return pixels
    alpha = eight_bits(samples[..., -1], bits=bits)
    return over_white(pixels, alpha, is_premultiplied=bands.is_premultiplied)


def _colours(page: Page, samples: Samples, bits: int | None) -> Pixels:
    if page.photometric == ifd.PALETTE:
        palette = _palette(page)[:, : _channels(page, _bands(page))]
        return np.take(palette, samples[..., 0].astype(np.uint16, copy=False), axis=0)
    if page.photometric in (ifd.CIELAB, ifd.ICCLAB):
        return lab_to_rgb(samples.view(f"u{samples.dtype.itemsize}"), is_icc=page.photometric == ifd.ICCLAB)
    pixels = eight_bits(samples, bits=bits)
    if page.photometric == ifd.WHITE_IS_ZERO:
        np.subtract(255, pixels, out=pixels)
    if page.photometric == ifd.CMYK:
        return cmyk_to_rgb(pixels)
    if page.photometric == ifd.YCBCR and page.compression not in _JPEGS:
        return ycbcr_to_rgb(pixels)
    return pixels


# --- segments --------------------------------------------------------------------------------------------------------


class _Decoder:
    """Decodes strips and tiles of one page.

    Args:
        page: its tags.
        data: the whole file.
    """

    def __init__(self, page: Page, data: bytes) -> None:
        self._page, self._data = page, data
        frame = _frame(page, bytes(page.segment(data, 0)[:_SNIFFED_BYTES]))
        if not _is_known(page) or frame.dtype is None or frame.shaped[1:4] != (1, page.height_px, page.width_px):
            raise ImageError("unsupported", f"not supported: {page.kind}")
        self._decode: Callable[..., Any] = frame.decode
        self._stored: np.dtype[Any] = frame.dtype
        self.dtype: np.dtype[Any] = frame.dtype
        self._sign = 0
        if _is_packed_signed(page):
            self.dtype, self._sign = np.dtype(f"i{frame.dtype.itemsize}"), 1 << (page.bits[0] - 1)
        self._tables = page.jpeg_tables or None

    def samples(self, bands: tuple[int, ...]) -> Samples:
        """The samples of some bands, `[h, w, S]` in native byte order.

        Raises:
            ImageError: a strip or tile is damaged.
        """
        page = self._page
        result = np.empty((page.height_px, page.width_px, len(bands)), self.dtype)
        per_plane = page.segment_count // (page.samples if page.is_planar else 1)
        for index in range(page.segment_count):
            plane = index // per_plane
            if page.is_planar and plane not in bands:
                continue
            (_, _, top, left, _), segment = self._segment(index)
            area = result[top : top + segment.shape[0], left : left + segment.shape[1]]
            part = segment[: area.shape[0], : area.shape[1]]
            if _is_24_bit(page) and not page.is_big_endian:
                part = (part & 0xFF) << 16 | (part & 0xFF00) | part >> 16
            if self._sign:
                part = (part.view(self.dtype) ^ self._sign) - self._sign
            if page.is_planar:
                area[..., bands.index(plane)] = part[..., 0]
            else:
                area[...] = part if bands == tuple(range(part.shape[2])) else part[..., bands]
        return result

    def _segment(self, index: int) -> tuple[tuple[int, ...], Samples]:
        """Where a segment belongs, and its samples, `[h, w, S]`."""
        page = self._page
        encoded = page.segment(self._data, index)
        if page.photometric == ifd.YCBCR and page.compression == ifd.NONE and page.subsampling != (1, 1):
            return _from_blocks(page, encoded, index)
        self._check_stream(encoded)
        try:
            samples, place, shape = self._decode(encoded, index, jpegtables=self._tables)
        except (ImportError, MemoryError):
            raise
        except NotImplementedError as error:
            raise ImageError("unsupported", f"not supported: {page.kind}") from error
        except Exception as error:
            raise ImageError("unreadable", f"{self._name(index)}: {first_line(error)}") from error
        if page.compression in _CCITT and samples is not None:
            samples = samples.astype(np.bool_)
        if samples is None or samples.dtype != self._stored or not self._is_whole(samples.shape, place):
            raise ImageError("unreadable", f"{self._name(index)} holds {getattr(samples, 'shape', None)}, not {shape}")
        return place, samples[0]

    def _is_whole(self, shape: tuple[int, ...], place: tuple[int, ...]) -> bool:
        """Whether a segment covers its part of the page."""
        width, height = self._page.segment_px
        rows, columns = min(height, self._page.height_px - place[2]), min(width, self._page.width_px - place[3])
        return shape[1] >= rows and shape[2] >= columns

    def _check_stream(self, encoded: memoryview) -> None:
        """An image within a segment may not be larger than the segment for which memory was reserved."""
        if self._page.compression not in _OWN_HEADER:
            return
        pixels, (width, height) = stream_px(encoded), self._page.segment_px
        if pixels is None:
            raise ImageError("unreadable", f"{self._page.kind}: a strip or tile has no such header")
        if pixels > _MAX_STREAM_FACTOR * width * height + 4096:
            raise ImageError("unreadable", f"{self._page.kind}: a segment of {width} x {height} px holds {pixels} px")

    def _name(self, index: int) -> str:
        word = "tile" if self._page.is_tiled else "strip"
        return f"{self._page.kind}, {word} {index + 1} of {self._page.segment_count}"


def _from_blocks(page: Page, encoded: memoryview, index: int) -> tuple[tuple[int, ...], Samples]:
    """Chroma is repeated over its block, as by libtiff."""
    (width, height), (across, down) = page.segment_px, page.subsampling
    top, left = index // page.segments_across * height, index % page.segments_across * width
    height = height if page.is_tiled else min(height, page.height_px - top)
    blocks = np.frombuffer(encoded, np.uint8).reshape(-(-height // down), -(-width // across), -1)
    rows, columns, _ = blocks.shape
    samples = np.empty((rows, down, columns, across, 3), np.uint8)
    samples[..., 0] = blocks[..., :-2].reshape(rows, columns, down, across).swapaxes(1, 2)
    samples[..., 1:] = blocks[:, None, :, None, -2:]
    return (0, 0, top, left, 0), samples.reshape(rows * down, columns * across, 3)


def _is_24_bit(page: Page) -> bool:
    """Integers of three whole bytes, which follow the file's byte order as in libtiff; tifffile does not."""
    return page.bits[0] == 24 and page.sample_formats[0] != ifd.FLOAT


def _is_packed_signed(page: Page) -> bool:
    """Signed integers of a depth that has no type, which tifffile reads as unsigned only."""
    return page.sample_formats[0] == ifd.SIGNED and page.bits[0] not in (8, 16, 32, 64)


def _is_known(page: Page) -> bool:
    """Whether tifffile has the compression and the predictor."""
    from tifffile import TIFF

    is_predicted = page.predictor != 1 and page.compression not in _OWN_HEADER | _CCITT
    return page.compression in TIFF.DECOMPRESSORS and (not is_predicted or page.predictor in TIFF.UNPREDICTORS)


def _frame(page: Page, sniffed: bytes) -> Any:
    """tifffile's reader of such a page, without any strip."""
    import imagecodecs  # noqa: F401  # tifffile needs it for each compression.
    import tifffile

    _silence()
    with tifffile.TiffFile(io.BytesIO(_header(page, sniffed))) as file:
        return file.pages.first


@functools.cache
def _silence() -> None:
    """tifffile logs what it finds odd; what matters here is an exception."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)


def _header(page: Page, sniffed: bytes) -> bytes:
    """A BigTIFF with the tags of `page` that say how to decode it, and the first bytes of one strip or tile."""
    sample_format = page.sample_formats[0]
    if sample_format == ifd.UNDEFINED or _is_packed_signed(page):
        sample_format = ifd.UNSIGNED
    # A plane of its own is grey to a JPEG decoder.
    photometric = ifd.BLACK_IS_ZERO if page.is_planar and page.compression in _JPEGS else page.photometric
    width, height = page.segment_px
    tags = {256: [page.width_px], 257: [page.height_px], 258: list(page.bits), 259: [page.compression]}
    tags |= {262: [photometric], 266: [page.fill_order], 277: [page.samples], 284: [1 + page.is_planar]}
    tags |= {292: [page.t4_options], 317: [page.predictor], 339: [sample_format], 530: list(page.subsampling)}
    tags |= (
        {322: [width], 323: [height], 324: [16], 325: [16]} if page.is_tiled else {278: [height], 273: [16], 279: [16]}
    )
    if page.extra_samples:
        tags[338] = list(page.extra_samples)
    order, body = ">" if page.is_big_endian and not _is_24_bit(page) else "<", b""
    entries, begin = b"", 32 + 8 + 20 * len(tags) + 8
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}Q", *values)
        place = packed if len(values) == 1 else struct.pack(f"{order}Q", begin + len(body))
        entries += struct.pack(f"{order}HHQ", tag, 16, len(values)) + place
        body += b"" if len(values) == 1 else packed
    start = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HHHQ", 43, 8, 0, 32)
    return (
        start
        + sniffed.ljust(_SNIFFED_BYTES, b"\0")
        + struct.pack(f"{order}Q", len(tags))
        + entries
        + struct.pack(f"{order}Q", 0)
        + body
    )


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory_bytes(page: Page, bands: _Bands, dtype: "np.dtype[Any]") -> int:
    pixels = page.width_px * page.height_px
    source = pixels * len(bands.all) * dtype.itemsize
    result = pixels * (len(bands.colour) if dtype != np.uint8 or page.bits[0] != 8 else 0)
    result += pixels * (0 if bands.alpha is None else len(bands.colour) + (dtype != np.uint8))
    result += pixels * 3 if page.photometric in (ifd.PALETTE, ifd.CMYK, ifd.YCBCR, ifd.CIELAB, ifd.ICCLAB) else 0
    result += min(WORKING_BYTES, 64 * pixels * len(bands.all))
    return source + max(result, _segment_bytes(page, dtype))


def _segment_bytes(page: Page, dtype: "np.dtype[Any]") -> int:
    """What decoding one strip or tile takes."""
    width, height = page.segment_px
    samples = width * height * (1 if page.is_planar else page.samples)
    if page.compression in _OWN_HEADER:
        return samples * (dtype.itemsize + (0 if page.compression in _JPEGS else 12))
    copies = (page.compression != ifd.NONE) + (page.predictor != 1 or page.fill_order != 1)
    copies += (page.is_big_endian and dtype.itemsize > 1) or 8 * dtype.itemsize != page.bits[0]
    return samples * dtype.itemsize * copies


# --- Pillow ----------------------------------------------------------------------------------------------------------


def pillow_is_right(page: Page) -> bool:
    """Whether Pillow decodes such a page as it is meant; found by comparison with tifffile, see the tests."""
    if page.index or page.depth != 1 or len(set(page.bits)) != 1 or len(set(page.sample_formats)) != 1:
        return False
    if page.compression not in _PILLOW_COMPRESSIONS or (page.is_big_tiff and page.is_big_endian):
        return False
    if page.predictor != 1 and page.compression in _LIBTIFF_UNPREDICTED:
        return False
    if page.photometric == ifd.PALETTE and page.colour_map.max(initial=0) < 256:
        return False  # A colour map of 8 bits, which Pillow takes for one of 16.
    bits, samples, extra = page.bits[0], page.samples, page.extra_samples
    if page.fill_order != 1 and (bits > 8 or samples not in (1, 3) or extra):
        return False
    if page.compression in _JPEGS:
        return bits == 8
    if page.sample_formats[0] in (ifd.SIGNED, ifd.FLOAT):
        is_swapped = page.is_big_endian and page.compression != ifd.NONE
        return bits == 32 and samples == 1 and page.photometric == ifd.BLACK_IS_ZERO and not is_swapped
    if page.is_planar:
        depths = (8,) if page.compression == ifd.NONE else (8, 16)
        return bits in depths and (page.photometric, samples, extra) in _PILLOW_PLANAR
    if page.photometric == ifd.YCBCR and page.subsampling != (1, 1) and page.compression == ifd.NONE:
        return False
    return bits in _PILLOW_BITS.get((page.photometric, samples, extra), ())


_NO, _ALPHA = None, (ifd.UNASSOCIATED,)
_PILLOW_PLANAR = frozenset({(ifd.RGB, 3, _NO), (ifd.RGB, 4, _ALPHA), (ifd.CMYK, 4, _NO)})
_PILLOW_BITS: dict[tuple[int, int, tuple[int, ...] | None], tuple[int, ...]] = {
    (ifd.WHITE_IS_ZERO, 1, _NO): (1, 2, 4, 8),
    (ifd.BLACK_IS_ZERO, 1, _NO): (1, 2, 4, 8, 16),
    (ifd.BLACK_IS_ZERO, 2, (0,)): (8,),
    (ifd.BLACK_IS_ZERO, 2, _ALPHA): (8,),
    (ifd.RGB, 3, _NO): (8, 16),
    (ifd.RGB, 4, _NO): (8, 16),
    (ifd.RGB, 4, (0,)): (8, 16),
    (ifd.RGB, 4, (ifd.ASSOCIATED,)): (8, 16),
    (ifd.RGB, 4, _ALPHA): (8, 16),
    (ifd.RGB, 5, (0, 0)): (8,),
    (ifd.RGB, 5, (ifd.UNASSOCIATED, 0)): (8,),
    (ifd.PALETTE, 1, _NO): (1, 2, 4, 8),
    (ifd.PALETTE, 2, _ALPHA): (8,),
    (ifd.CMYK, 4, _NO): (8, 16),
    (ifd.YCBCR, 3, _NO): (8,),
}
"""Photometric interpretation, samples and extra samples of chunky unsigned pages -> depths that Pillow reads right."""
