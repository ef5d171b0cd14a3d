"""JPEG: the frame header, and libjpeg-turbo in its strict mode for ordinary files.

Owns: reading the segments of a JPEG as libjpeg does, which of them libjpeg-turbo is given through simplejpeg, and what
of its complaints is harmless. Does not own: other JPEGs (CMYK, arithmetic, lossless, 12 bits), which go to other
decoders.

Strict, because no other decoder here notices damaged scan data. Only the first frame header counts: the decoder sizes
its buffer by it, so what it was not made for must not reach it.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import simplejpeg

from mnist_dist.errors import ImageError
from mnist_dist.images.exif import orientation_of
from mnist_dist.images.geometry import least_size
from mnist_dist.images.pixels import NotForMe, Opened, Pixels, rotate, upright_size
from mnist_dist.images.spec import ImageSpec

MAGIC = b"\xff\xd8"
_SOS, _EOI, _COM, _APP0, _APP1, _APP14 = 0xDA, 0xD9, 0xFE, 0xE0, 0xE1, 0xEE
LS = 0xF7  # JPEG-LS, whose header has the same form.
FRAMES = frozenset({*range(0xC0, 0xD0), LS} - {0xC4, 0xC8, 0xCC})  # SOF0-15 without DHT, JPG and DAC.
_JFIF = b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"  # Version 1.01, square pixels, no thumbnail.
_BARE = frozenset({0x00, 0x01, *range(0xD0, 0xD8), 0xFF})  # Without a length: TEM, RST0-7, and no markers at all.
_KINDS = {
    0xC0: "baseline",
    0xC1: "extended",
    0xC2: "progressive",
    0xC3: "lossless",
    0xC9: "arithmetic-coded",
    LS: "LS",
}
_ORDINARY_SAMPLING = frozenset({(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)})  # of luma, beside 1 x 1 of both chromas
_MAX_STRAY_BYTES = 32
"""So many bytes of any content may stand after the image data; longer runs must be one repeated byte.

A flipped bit makes a decoder stop early, too. Of 1,800 such baseline files (320 x 240), 344 left bytes over: 11 at the
least, 74 or more in 95 %.
"""
_MAX_TRIES = 16
_STRAY = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_CUT = ("premature end", "truncated")


class Segment(NamedTuple):
    """One marker segment: its marker, and where its payload lies."""

    marker: int
    begin: int
    end: int


class Header(NamedTuple):
    """What stands before the first scan."""

    marker: int
    """The SOFn marker: the coding process."""
    bits: int
    width_px: int
    height_px: int
    sampling: tuple[tuple[int, int], ...]
    """Horizontal and vertical factor of each component."""
    orientation: int
    """EXIF orientation, 1-8."""
    segments: list[Segment]

    @property
    def components(self) -> int:
        """Number of colour components."""
        return len(self.sampling)

    @property
    def kind(self) -> str:
        """In words, for example "12-bit extended JPEG of 3 components"."""
        process = _KINDS.get(self.marker, f"SOF{self.marker - 0xC0}")
        return f"{self.bits}-bit {process} JPEG of {self.components} component{'s' * (self.components != 1)}"

    @property
    def is_ordinary(self) -> bool:
        """Whether libjpeg-turbo is given it: 8-bit Huffman code, grey or three components, ordinary sampling."""
        if self.marker not in (0xC0, 0xC1, 0xC2) or self.bits != 8:
            return False
        luma, *chroma = self.sampling
        return not chroma or (luma in _ORDINARY_SAMPLING and chroma == [(1, 1), (1, 1)])


def read_header(data: bytes) -> Header:
    """Reads the segments up to the first scan, skipping what libjpeg skips.

    Raises:
        ImageError: `truncated` if the file ends before the first scan, `unreadable` if the header is not valid.
    """
    segments = _segments(data)
    frame = next((segment for segment in segments if segment.marker in FRAMES), None)
    if frame is None or segments[-1].marker != _SOS:
        raise ImageError("truncated", "the file ends before the image data")
    body = data[frame.begin : frame.end]
    if len(body) < 6 or len(body) != 6 + 3 * body[5] or not body[5] or not 2 <= body[0] <= 16:
        raise ImageError("unreadable", "the frame header is not valid")
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    if not height or not width:
        raise ImageError("unreadable", f"the frame header says {width} x {height} px")
    sampling = tuple((factors >> 4, factors & 15) for factors in body[7::3])
    return Header(frame.marker, body[0], width, height, sampling, _orientation(data, segments), segments)


def open_ordinary(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens an ordinary JPEG for libjpeg-turbo, which scales by eighths while it decodes, to leave less to resize.

    Raises:
        NotForMe: another kind of JPEG.
        ImageError: the header is damaged; `decode`: the image data are.
    """
    header = read_header(data)
    if not header.is_ordinary:
        raise NotForMe(header.kind)
    width, height = upright_size((header.width_px, header.height_px), header.orientation)
    least = _least(header, spec) if spec else (header.width_px, header.height_px)
    is_grey = spec is not None and spec.channels == 1 and (spec.quality == "fast" or header.components == 1)
    colours = "GRAY" if is_grey else "RGB"  # Exact: Pillow's grey is made of RGB, which clips.

    def decode() -> Pixels:
        pixels = _decode_strictly(data, header.segments, colours, least)
        return rotate(pixels, header.orientation)

    channels = 1 if header.components == 1 else 3
    return Opened(width, height, channels, _memory_bytes(header, least), decode)


def _least(header: Header, spec: ImageSpec) -> tuple[int, int]:
    """Width and height, as stored, below which the image may not be scaled while it is decoded."""
    width, height = header.width_px, header.height_px
    upright_width, upright_height = upright_size((width, height), header.orientation)
    rows, columns = least_size(upright_height, upright_width, spec)
    least = upright_size((columns, rows), header.orientation)
    if spec.resampling == "opencv":
        return least
    eighths = 1 << (_eighths(header, least) - 1).bit_length()  # Only these have fast code in libjpeg-turbo.
    return -(-width * eighths // 8), -(-height * eighths // 8)


def _eighths(header: Header, least: tuple[int, int]) -> int:
    """The scale that libjpeg is given."""
    return min(8, 1 + max(8 * (least[0] - 1) // header.width_px, 8 * (least[1] - 1) // header.height_px))


def _memory_bytes(header: Header, least: tuple[int, int]) -> int:
    """The scaled pixels; a progressive file's coefficients are all kept, 2 bytes each."""
    width, height, eighths = header.width_px, header.height_px, _eighths(header, least)
    pixels = -(-width * eighths // 8) * -(-height * eighths // 8) * 3
    return pixels + (2 * width * height * header.components if header.marker == 0xC2 else 0)


def _decode_strictly(data: bytes, segments: list[Segment], colours: str, least: tuple[int, int]) -> Pixels:
    def decode(jpeg: bytes) -> Pixels:
        pixels: Pixels = simplejpeg.decode_jpeg(jpeg, colours, min_width=least[0], min_height=least[1], min_factor=1)
        return pixels

    try:
        return decode(data)
    except ValueError:  # A complaint of libjpeg, which may be harmless.
        return _decode_without_harmless(data, segments, decode)


def _decode_without_harmless(data: bytes, segments: list[Segment], decode: Callable[[bytes], Pixels]) -> Pixels:
    """Decodes without what is harmless; the complaint that stays then is the verdict."""
    tries, complaint = iter([essentials(data, segments)]), ""
    for _ in range(_MAX_TRIES):
        jpeg = next(tries, None)
        if jpeg is None:
            break
        try:
            return decode(jpeg)
        except ValueError as error:
            if str(error) != complaint:
                complaint = str(error)
                tries = _repaired(jpeg, complaint)
    is_cut = any(word in complaint.lower() for word in _CUT) or b"\xff\xd9" not in data[segments[-1].end :]
    raise ImageError("truncated" if is_cut else "unreadable", complaint)


# --- segments --------------------------------------------------------------------------------------------------------


def _segments(data: bytes) -> list[Segment]:
    """The marker segments up to the first scan, included. Bytes between them are skipped, as by libjpeg."""
    segments: list[Segment] = []
    position = data.find(b"\xff", len(MAGIC))
    while 0 <= position < len(data) - 3:
        marker = data[position + 1]
        if marker in _BARE:  # The first of several 0xFF is a fill byte.
            position = data.find(b"\xff", position + (1 if marker == 0xFF else 2))
            continue
        end = position + 2 + (data[position + 2] << 8 | data[position + 3])
        if marker == _EOI or end < position + 4 or end > len(data):
            break
        segments.append(Segment(marker, position + 4, end))
        if marker == _SOS:
            break
        position = end if data[end : end + 1] == b"\xff" else data.find(b"\xff", end)
    return segments


def _orientation(data: bytes, segments: list[Segment]) -> int:
    """The rotation that EXIF or XMP data ask for, wherever their segment stands."""
    payloads = [data[begin:end] for marker, begin, end in segments if marker == _APP1]
    if not payloads:
        return 1
    return orientation_of(
        exif=[payload[6:] for payload in payloads if payload.startswith(b"Exif\0")],
        xmp=[payload for payload in payloads if payload.startswith(b"http://ns.adobe.com/xap/1.0/\0")],
    )


# --- harmless complaints ---------------------------------------------------------------------------------------------


def essentials(data: bytes, segments: list[Segment]) -> bytes:
    """The same image without what libjpeg may complain of in an intact one.

    That is: bytes between segments, comments and application segments (an unknown JFIF revision or colour transform),
    and a sequential scan whose spectral selection is not 0 to 63, which decoders ignore. What says how colours are
    stored is kept.

    Args:
        data: a JPEG file.
        segments: those up to its first scan, included.
    """
    frame = next(segment for segment in segments if segment.marker in FRAMES)
    is_progressive, components = frame.marker == 0xC2, data[frame.begin + 5]
    parts = [MAGIC]
    for segment in segments:
        body = data[segment.begin : segment.end]
        if segment.marker == _APP0 and body.startswith(b"JFIF\0"):
            body = _JFIF
        elif segment.marker == _COM or _APP0 <= segment.marker < _APP14:
            continue
        if segment.marker == _APP14 and len(body) == 12 and components == 3:
            body = body[:-1] + bytes([min(1, body[-1])])  # libjpeg takes other transforms for YCbCr, too.
        if segment.marker == _SOS and not is_progressive:
            body = body[:-3] + b"\0\x3f\0"
        parts.append(bytes([0xFF, segment.marker]) + (len(body) + 2).to_bytes(2, "big") + body)
    return b"".join(parts) + data[segments[-1].end :]


def _repaired(jpeg: bytes, complaint: str) -> Iterator[bytes]:
    """The file without the bytes that libjpeg found between image data and a marker: one try per such marker. Nothing
    if that was not its complaint, or if the bytes look like image data that damage left over."""
    found = _STRAY.match(complaint)
    if found is None:
        return
    count, marker = int(found[1]), bytes([0xFF, int(found[2], 16)])
    end = jpeg.rfind(marker)
    for _ in range(_MAX_TRIES):
        if end < count:
            return
        stray = jpeg[end - count : end]
        if count <= _MAX_STRAY_BYTES or len(set(stray)) == 1:
            yield jpeg[: end - count] + jpeg[end:]
        end = jpeg.rfind(marker, 0, end)
