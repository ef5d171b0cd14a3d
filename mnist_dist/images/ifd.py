"""TIFF: what the tags of its first page say, read from bytes. EXIF data are stored the same way.

Owns: classic TIFF and BigTIFF of both byte orders, up to where strips and tiles lie. Does not own: decoding them
(`tiff`).

Nothing here trusts the file: counts and offsets are checked against its length, values are views of its bytes, and
pages and entries are counted, so that no file makes it allocate much or run long.

Source: TIFF revision 6.0 (1992); BigTIFF as in libtiff 4; Adobe Photoshop TIFF technical notes (2002) for predictors.
"""

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist.errors import ImageError

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How a TIFF begins: little and big endian, classic and BigTIFF."""

Values = npt.NDArray[Any]

_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 11: "f4", 12: "f8", 13: "u4"} | {
    **{16: "u8", 17: "i8", 18: "u8"},
    **{5: "u4", 10: "i4"},  # Rationals, as two numbers each.
}
_NOTHING: Values = np.empty(0, np.uint8)
_RATIONALS = frozenset({5, 10})
_MAX_PAGES = 256  # Thumbnails stand before an image, never hundreds of them.
_MAX_ENTRIES = 4096
_MAX_SAMPLES = 65_535
ORIENTATION = 274
_REDUCED_OR_MASK = 1 | 4  # Bits of NewSubfileType.

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, MASK, CMYK, YCBCR, CIELAB, ICCLAB, ITULAB = 0, 1, 2, 3, 4, 5, 6, 8, 9, 10
"""Values of PhotometricInterpretation."""
UNSIGNED, SIGNED, FLOAT, UNDEFINED = 1, 2, 3, 4
"""Values of SampleFormat."""
NONE, OLD_JPEG, JPEG = 1, 6, 7
"""Some values of Compression."""
ASSOCIATED, UNASSOCIATED = 1, 2
"""Values of ExtraSamples that mean alpha: colours are multiplied by it, or are not."""

_COLOURS = {
    **{WHITE_IS_ZERO: "grey", BLACK_IS_ZERO: "grey", RGB: "RGB", PALETTE: "palette", MASK: "mask", CMYK: "CMYK"},
    **{YCBCR: "YCbCr", CIELAB: "CIELab", ICCLAB: "ICCLab", ITULAB: "ITULab", 32803: "colour filter array"},
    **{32844: "LogL", 32845: "LogLuv", 34892: "linear raw"},
}
_FORMATS = {SIGNED: ["signed"], FLOAT: ["float"], 5: ["complex integer"], 6: ["complex"]}
_COMPRESSIONS = {
    **{2: "CCITT", 3: "G3", 4: "G4", 5: "LZW", 6: "old-style JPEG", 7: "JPEG", 8: "deflate", 9: "JBIG", 10: "JBIG"},
    **{32773: "packbits", 32946: "deflate", 34712: "JPEG 2000", 34887: "LERC", 34925: "LZMA", 50000: "Zstandard"},
    **{50001: "WebP", 33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 34892: "lossy JPEG"},
    **{33007: "JPEG", 34676: "SGILog", 34677: "SGILog", 34933: "PNG", 34934: "JPEG XR", 22610: "JPEG XR"},
    **{50002: "JPEG XL", 52546: "JPEG XL", 32908: "PIXAR film", 32909: "PIXAR log", 32809: "ThunderScan"},
}


@dataclass(frozen=True)
class Page:
    """The first full-resolution page of a TIFF."""

    index: int
    """Its position in the file; not 0 where a thumbnail or a mask comes first."""
    width_px: int
    height_px: int
    """Size as stored, before `orientation`."""
    depth: int
    """Slices of a volume, else 1."""
    bits: tuple[int, ...]
    """Of each sample."""
    sample_formats: tuple[int, ...]
    """Of each sample: unsigned, signed, float, undefined."""
    is_planar: bool
    photometric: int
    extra_samples: tuple[int, ...] | None
    """Meaning of the samples beside the colour; None if the file does not say."""
    compression: int
    predictor: int
    fill_order: int
    orientation: int
    ink_set: int
    t4_options: int
    """Of CCITT G3: two-dimensional, uncompressed, fill bits."""
    subsampling: tuple[int, int]
    is_tiled: bool
    segment_px: tuple[int, int]
    """Width and height of a tile, or of a strip."""
    is_big_endian: bool
    is_big_tiff: bool
    colour_map: Values = field(repr=False)
    """`uint16 [3 * 2**bits]`, empty without one."""
    offsets: Values = field(repr=False)
    byte_counts: Values = field(repr=False)
    jpeg_tables: bytes = field(repr=False)
    """Tables that all JPEG-compressed segments share, empty without them."""

    @property
    def samples(self) -> int:
        """Number of samples of a pixel."""
        return len(self.bits)

    @property
    def kind(self) -> str:
        """In words, for example "12-bit grey TIFF" or "JPEG-compressed 8-bit YCbCr TIFF"."""
        bits = "/".join(map(str, dict.fromkeys(self.bits)))
        colour = _COLOURS.get(self.photometric, f"photometric {self.photometric}")
        words = [f"{_COMPRESSIONS.get(self.compression, f'compression {self.compression}')}-compressed"]
        words = [] if self.compression == NONE else words
        words.append("bilevel" if self.bits == (1,) and colour == "grey" else f"{bits}-bit")
        words += _FORMATS.get(self.sample_formats[0], [])
        words += [word for word, applies in self._peculiarities if applies]
        words += [] if words[-1] == "bilevel" else [colour]
        return " ".join([*words, "BigTIFF" if self.is_big_tiff else "TIFF", *["volume"] * (self.depth > 1)])

    @property
    def _peculiarities(self) -> list[tuple[str, bool]]:
        return [
            ("white-is-zero", self.photometric == WHITE_IS_ZERO and self.bits != (1,)),
            ("planar", self.is_planar and self.samples > 1),
            ("premultiplied", ASSOCIATED in (self.extra_samples or ())),
            ("big-endian", self.is_big_tiff and self.is_big_endian),
            (f"{self.samples}-band", self.samples > 4),
        ]

    @property
    def segments_across(self) -> int:
        """Tiles beside each other; 1 for strips."""
        return -(-self.width_px // self.segment_px[0])

    @property
    def segment_count(self) -> int:
        """Strips or tiles that the page should have."""
        planes = self.samples if self.is_planar else 1
        return self.segments_across * -(-self.height_px // self.segment_px[1]) * self.depth * planes

    @property
    def largest_segment_bytes(self) -> int:
        """What a whole strip or tile takes decoded, which may be larger than the page."""
        width, height = self.segment_px
        return width * height * -(-sum(self.bits) // 8)

    def segment_bytes(self, index: int) -> int:
        """Size of one strip or tile without compression, bytes."""
        width, height = self.segment_px
        if not self.is_tiled:
            down = -(-self.height_px // height)
            height = min(height, self.height_px - index % down * height)
        if self.photometric == YCBCR and self.subsampling != (1, 1) and not self.is_planar:
            return self._subsampled_bytes(width, height)
        plane = index // (self.segment_count // self.samples) if self.is_planar else 0
        bits = self.bits[plane] if self.is_planar else sum(self.bits)
        return -(-width * bits // 8) * height

    def _subsampled_bytes(self, width: int, height: int) -> int:
        """A block of lumas and its two chromas stand together."""
        across, down = self.subsampling
        return -(-width // across) * -(-height // down) * (across * down + 2) * self.bits[0] // 8

    def segment(self, data: bytes, index: int) -> memoryview:
        """The encoded bytes of one strip or tile."""
        begin, count = int(self.offsets[index]), int(self.byte_counts[index])
        if self.compression == NONE:
            count = self.segment_bytes(index)
        return memoryview(data)[begin : begin + count]


def read_page(data: bytes) -> Page:
    """Reads the tags of the first full-resolution page.

    Raises:
        ImageError: `truncated` if the file ends before the tags do, `unreadable` if they make no image.
    """
    layout = _Layout.of(data)
    if layout is None and data.startswith(MAGICS):
        raise ImageError("truncated", "the file ends within its first bytes")
    if layout is None:
        raise ImageError("unreadable", f"a TIFF should start with II or MM. Received: 0x{data[:8].hex()}")
    first: tuple[int, dict[int, Values]] | None = None
    for index, tags in enumerate(layout.pages()):
        first = first or (index, tags)
        if not _number(tags, 254, 0) & _REDUCED_OR_MASK and _number(tags, 255, 1) != 2 and 256 in tags:
            return _page(layout, index, tags)
    if first is None:
        raise ImageError("truncated", "the file ends before the tags of its first page")
    return _page(layout, *first)


def check_segments(data: bytes, page: Page) -> None:
    """Checks that every strip or tile lies within the file.

    Raises:
        ImageError: `truncated` if one is cut off or missing, `unreadable` if one has no bytes.
    """
    if page.compression == OLD_JPEG or page.depth != 1:
        return  # Image data may lie where other tags say; volumes are not read.
    count, word = page.segment_count, "tiles" if page.is_tiled else "strips"
    if page.offsets.size < count or page.byte_counts.size < count:
        raise ImageError("truncated", f"{page.offsets.size} of {count} {word} have a place in the file")
    offsets, sizes = page.offsets[:count], page.byte_counts[:count]
    if not (sizes.all() and offsets.all()):
        raise ImageError("unreadable", f"some of {count} {word} have no data")
    cut = [index for index in _ending_last(offsets, sizes) if _end(page, index) > len(data)]
    if cut:
        raise ImageError("truncated", f"{word[:-1]} {cut[0] + 1} of {count} ends behind the end of the file")
    if page.compression == NONE:
        _check_sizes(page, sizes, word)


def exif_orientation(tiff: bytes) -> int | None:
    """The rotation that EXIF data ask for, 1-8; None if they are damaged or do not say.

    Args:
        tiff: EXIF data, from their TIFF header on.
    """
    layout = _Layout.of(tiff)
    tags = dict(layout.entries(layout.first)) if layout else {}
    value = _number(tags, ORIENTATION, 0)
    return value if 1 <= value <= 8 else None


# --- entries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How numbers are stored in a TIFF."""

    data: bytes = field(repr=False)
    order: str
    """`<` or `>`."""
    is_big_tiff: bool
    first: int
    """Offset of the first page's tags."""

    @classmethod
    def of(cls, data: bytes) -> "_Layout | None":
        """The layout that the first bytes state, None if they are not those of a TIFF."""
        order = {b"II": "<", b"MM": ">"}.get(data[:2])
        if order is None or len(data) < 8:
            return None
        version = int.from_bytes(data[2:4], "little" if order == "<" else "big")
        if version == 43:
            return cls(data, order, True, 0)._at(8) if len(data) >= 16 else None
        return cls(data, order, False, 0)._at(4)

    def _at(self, position: int) -> "_Layout":
        first = self.number(position, 8 if self.is_big_tiff else 4)
        return _Layout(self.data, self.order, self.is_big_tiff, first)

    def number(self, position: int, size: int) -> int:
        """An unsigned number, 0 behind the end of the file."""
        value = self.data[position : position + size]
        return int.from_bytes(value, "little" if self.order == "<" else "big") if len(value) == size else 0

    def pages(self) -> Iterator[dict[int, Values]]:
        """The tags of each page, until the file repeats itself.

        Raises:
            ImageError: `truncated` if the file ends within the tags of a page.
        """
        seen: set[int] = set()
        position = self.first
        while position and position not in seen and len(seen) < _MAX_PAGES and position < len(self.data):
            seen.add(position)
            if self._end(position) > len(self.data):
                raise ImageError("truncated", "the file ends within the tags of a page")
            yield dict(self.entries(position))
            position = self._next(position)

    def entries(self, position: int) -> Iterator[tuple[int, Values]]:
        """Tag and values of each entry; values that do not lie within the file are empty."""
        entry = f"{self.order}HHQQ" if self.is_big_tiff else f"{self.order}HHII"
        word = 8 if self.is_big_tiff else 2
        size, begin = struct.calcsize(entry), position + word
        count = min(self.number(position, word), _MAX_ENTRIES, max(0, len(self.data) - begin) // size)
        for at in range(begin, begin + count * size, size):
            tag, kind, values, place = struct.unpack_from(entry, self.data, at)
            yield tag, self._values(kind, values, place, at + size - (8 if self.is_big_tiff else 4))

    def _values(self, kind: int, count: int, place: int, here: int) -> Values:
        """The values of an entry, which lie `here` where they fit, else at `place`."""
        if kind not in _TYPES:
            return _NOTHING
        dtype = np.dtype(self.order + _TYPES[kind])
        count *= 1 + (kind in _RATIONALS)
        size = count * dtype.itemsize
        begin = here if size <= (8 if self.is_big_tiff else 4) else place
        return np.frombuffer(self.data, dtype, count, begin) if size and begin + size <= len(self.data) else _NOTHING

    def _end(self, position: int) -> int:
        """Where the entries of a page end, and the offset of the next page stands."""
        word, size = (8, 20) if self.is_big_tiff else (2, 12)
        return position + word + self.number(position, word) * size

    def _next(self, position: int) -> int:
        return self.number(self._end(position), 8 if self.is_big_tiff else 4)


def _number(tags: dict[int, Values], tag: int, default: int) -> int:
    values = tags.get(tag)
    return int(values[0]) if values is not None and values.size and values.dtype.kind in "iu" else default


def _numbers(tags: dict[int, Values], tag: int, samples: int, default: int) -> tuple[int, ...]:
    """One number for each sample; a file may state a single one for all of them."""
    values = tags.get(tag)
    if values is None or not values.size or values.dtype.kind not in "iu":
        return (default,) * samples
    numbers = tuple(int(value) for value in values[:samples])
    return numbers + numbers[:1] * (samples - len(numbers))


# --- page ------------------------------------------------------------------------------------------------------------


def _page(layout: _Layout, index: int, tags: dict[int, Values]) -> Page:
    number = functools.partial(_number, tags)
    width, height, samples = number(256, 0), number(257, 0), number(277, 1)
    if width <= 0 or height <= 0 or not 1 <= samples <= _MAX_SAMPLES:
        cut = any(tag not in tags or not tags[tag].size for tag in (256, 257))
        raise ImageError("truncated" if cut else "unreadable", f"tags of {width} x {height} px, {samples} samples")
    bits, formats = _numbers(tags, 258, samples, 1), _numbers(tags, 339, samples, UNSIGNED)
    if not all(1 <= count <= 128 for count in bits):
        raise ImageError("unreadable", f"samples have 1 to 128 bits. Received: {bits[0]}")
    subsampling = _numbers(tags, 530, 2, 2) if number(262, 1) == YCBCR else (1, 1)
    segment_px, is_tiled = _segment_px(tags, width, height)
    photometric = number(262, RGB if samples >= 3 else BLACK_IS_ZERO)
    page = Page(
        index=index,
        width_px=width,
        height_px=height,
        depth=max(1, number(32997, 1)),
        bits=bits,
        sample_formats=formats,
        is_planar=number(284, 1) == 2 and samples > 1,
        photometric=photometric,
        extra_samples=_numbers(tags, 338, tags[338].size, 0) if 338 in tags and tags[338].size <= samples else None,
        compression=number(259, NONE),
        predictor=number(317, 1),
        fill_order=number(266, 1),
        orientation=number(ORIENTATION, 1) if 1 <= number(ORIENTATION, 1) <= 8 else 1,
        ink_set=number(332, 1),
        t4_options=number(292, 0),
        subsampling=(max(1, subsampling[0]), max(1, subsampling[1])),
        is_tiled=is_tiled,
        segment_px=segment_px,
        is_big_endian=layout.order == ">",
        is_big_tiff=layout.is_big_tiff,
        colour_map=tags.get(320, np.empty(0, np.uint16)),
        offsets=_place(tags, 324, 273),
        byte_counts=_place(tags, 325, 279),
        jpeg_tables=tags[347].tobytes() if 347 in tags else b"",
    )
    return _with_byte_counts(page, layout, tags)


def _segment_px(tags: dict[int, Values], width: int, height: int) -> tuple[tuple[int, int], bool]:
    """Size of a strip or tile, and whether it is a tile."""
    if 322 in tags or 324 in tags:
        size = _number(tags, 322, 0), _number(tags, 323, 0)
        if min(size) <= 0:
            raise ImageError("unreadable", f"tiles of {size[0]} x {size[1]} px")
        return size, True
    rows = _number(tags, 278, height)
    return (width, min(height, rows) if rows > 0 else height), False


def _place(tags: dict[int, Values], tile_tag: int, strip_tag: int) -> Values:
    values = tags.get(tile_tag, tags.get(strip_tag))
    return values if values is not None and values.dtype.kind == "u" else np.empty(0, np.uint32)


def _with_byte_counts(page: Page, layout: _Layout, tags: dict[int, Values]) -> Page:
    """Old writers leave the byte counts out, or all 0, where there is one strip, or no compression."""
    if page.byte_counts.any() or page.offsets.size != page.segment_count:
        return page
    rest = max(0, len(layout.data) - int(page.offsets[0]))
    counts = [page.segment_bytes(index) for index in range(page.segment_count)] if page.compression == NONE else [rest]
    if len(counts) != page.segment_count:
        return page
    return Page(**{**page.__dict__, "byte_counts": np.array(counts, np.uint64)})


def _ending_last(offsets: Values, sizes: Values) -> list[int]:
    """The segment that ends last by its own byte count, and the one that begins last."""
    ends = offsets.astype(np.float64) + sizes
    return [int(ends.argmax()), int(offsets.argmax())]


def _end(page: Page, index: int) -> int:
    size = int(page.byte_counts[index])
    if page.compression == NONE:
        size = min(size, page.segment_bytes(index))
    return int(page.offsets[index]) + size


def _check_sizes(page: Page, sizes: Values, word: str) -> None:
    """Without compression a segment is as long as its pixels."""
    for index, size in enumerate(sizes.tolist()):
        needed = page.segment_bytes(index)
        if size < needed:
            text = f"{word[:-1]} {index + 1} of {sizes.size} needs {needed} bytes. Received: {size}"
            raise ImageError("truncated", text)
