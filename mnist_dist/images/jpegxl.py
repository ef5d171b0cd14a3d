"""JPEG XL: its header, and decoding by imagecodecs (libjxl).

Owns: size, depth, rotation and alpha as the codestream states them, bare or in a container. Does not own: the pixels'
codec. Only the first frame is decoded, since its memory was reserved.

Source: ISO/IEC 18181-1, annexes A to D (headers), and 18181-2 (boxes).
"""

from dataclasses import dataclass

from mnist_dist.errors import ImageError, first_line
from mnist_dist.images.depth import WORKING_BYTES, Samples, eight_bits, over_white
from mnist_dist.images.pixels import Opened, Pixels, upright_size
from mnist_dist.images.spec import ImageSpec

CODESTREAM, CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
"""How a JPEG XL file begins."""

_SIDES = ((1, 9), (1, 13), (1, 18), (1, 30))
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_PREVIEW_SIDES = {True: ((16, 0), (32, 0), (1, 5), (33, 9)), False: ((1, 6), (65, 8), (321, 10), (1345, 12))}
_ENUM = ((0, 0), (1, 0), (2, 4), (18, 6))
_ALPHA, _SPOT_COLOUR, _CFA = 0, 2, 5
_GREY = 1
_MAX_EXTRA = 64
_HEAD_BYTES = 4096
_DECODER_BYTES = 4
"""What libjxl takes for each sample beside its output: the whole image as 32-bit numbers, where it is progressive.
Others were measured at 0 to 1."""


@dataclass(frozen=True)
class Header:
    """What the codestream says before its first frame."""

    width_px: int
    height_px: int
    """Size as coded, before `orientation`, which the decoder applies."""
    orientation: int
    bits: int
    is_float: bool
    is_grey: bool
    has_alpha: bool
    is_premultiplied: bool
    extra_channels: int


class _Bits:
    """Reads bits, the least significant first; zeros behind the end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "little"), 8 * len(data)

    def read(self, count: int) -> int:
        value = self._value & ((1 << count) - 1)
        self._value >>= count
        self._left -= count
        return value

    def flag(self) -> bool:
        return self.read(1) == 1

    def choice(self, choices: tuple[tuple[int, int], ...]) -> int:
        """U32: one of four pairs of offset and bits."""
        offset, count = choices[self.read(2)]
        return offset + self.read(count)

    @property
    def is_over(self) -> bool:
        return self._left < 0


def open_jpegxl(data: bytes, spec: ImageSpec | None) -> Opened:
    """Opens a JPEG XL image for libjxl.

    Raises:
        ImportError: the packages of the extra `formats` are missing.
        ImageError: the header is damaged; `decode`: the image data are.
    """
    import imagecodecs

    header = read_header(data)
    width, height = upright_size((header.width_px, header.height_px), header.orientation)

    def decode() -> Pixels:
        try:
            samples: Samples = imagecodecs.jpegxl_decode(data, index=0, numthreads=1)
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            raise ImageError(_damage(str(error)), f"JPEG XL: {first_line(error)}") from error
        return _pixels(samples, header, (height, width))

    return Opened(width, height, 1 if header.is_grey else 3, _memory_bytes(header), decode)


def jpegxl_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that the codestream states, before any rotation; None if there is none."""
    start = _codestream(data)
    return _size(_Bits(data[start + 2 : start + _HEAD_BYTES])) if start is not None else None


def read_header(data: bytes) -> Header:
    """Reads what stands before the first frame.

    Raises:
        ImageError: `truncated` if the file ends before that, `unreadable` if there is no codestream.
    """
    start = _codestream(data)
    if start is None:
        raise ImageError("unreadable", "a JPEG XL container without a codestream")
    bits = _Bits(data[start + 2 : start + _HEAD_BYTES])
    header = _metadata(bits, *_size(bits))
    if bits.is_over:
        raise ImageError("truncated", "the file ends within the header of its JPEG XL codestream")
    return header


def _codestream(data: bytes) -> int | None:
    """Where the codestream begins: in the first box of its kind."""
    if data.startswith(CODESTREAM):
        return 0
    position = 0
    while position + 8 <= len(data):
        size, kind, head = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            start = position + head + (4 if kind == b"jxlp" else 0)
            return start if data[start : start + 2] == CODESTREAM else None
        if size < head:
            return None
        position += size
    return None


def _size(bits: _Bits) -> tuple[int, int]:
    is_small = bits.flag()
    height = 8 * (1 + bits.read(5)) if is_small else bits.choice(_SIDES)
    ratio = bits.read(3)
    if ratio:
        across, down = _RATIOS[ratio - 1]
        return height * across // down, height
    return (8 * (1 + bits.read(5)) if is_small else bits.choice(_SIDES)), height


def _metadata(bits: _Bits, width: int, height: int) -> Header:
    if bits.flag():  # All default: 8-bit RGB without alpha.
        return Header(width, height, 1, 8, False, False, False, False, 0)
    orientation = _extra_fields(bits) if bits.flag() else 1
    depth, is_float = _depth(bits)
    bits.flag()  # Whether 16-bit buffers are enough.
    extra = [_extra_channel(bits) for _ in range(min(_MAX_EXTRA, bits.choice(((0, 0), (1, 0), (2, 4), (1, 12)))))]
    bits.flag()  # XYB.
    is_grey = False
    if not bits.flag():  # Colours are not all default (sRGB).
        bits.flag()  # ICC.
        is_grey = bits.choice(_ENUM) == _GREY
    alpha = next((premultiplied for kind, premultiplied in extra if kind == _ALPHA), None)
    return Header(width, height, orientation, depth, is_float, is_grey, alpha is not None, bool(alpha), len(extra))


def _extra_fields(bits: _Bits) -> int:
    orientation = 1 + bits.read(3)
    if bits.flag():
        _size(bits)  # Intrinsic size, for display.
    if bits.flag():
        sides = _PREVIEW_SIDES[bits.flag()]
        bits.choice(sides)
        if bits.read(3) == 0:
            bits.choice(sides)
    if bits.flag():  # Animation: ticks per second, loops, time codes.
        bits.choice(((100, 0), (1000, 0), (1, 10), (1, 30)))
        bits.choice(((1, 0), (1001, 0), (1, 8), (1, 10)))
        bits.choice(((0, 0), (0, 3), (0, 16), (0, 32)))
        bits.flag()
    return orientation


def _depth(bits: _Bits) -> tuple[int, bool]:
    is_float = bits.flag()
    if not is_float:
        return bits.choice(((8, 0), (10, 0), (12, 0), (1, 6))), False
    depth = bits.choice(((32, 0), (16, 0), (24, 0), (1, 6)))
    bits.read(4)  # Bits of the exponent.
    return depth, True


def _extra_channel(bits: _Bits) -> tuple[int, bool]:
    """Its kind, and for alpha whether colours are multiplied by it."""
    if bits.flag():
        return _ALPHA, False
    kind = bits.choice(_ENUM)
    _depth(bits)
    bits.choice(((0, 0), (3, 0), (4, 0), (1, 3)))
    bits.read(8 * bits.choice(((0, 0), (0, 4), (16, 5), (48, 10))))
    is_premultiplied = kind == _ALPHA and bits.flag()
    bits.read({_SPOT_COLOUR: 64}.get(kind, 0))
    if kind == _CFA:
        bits.choice(((1, 0), (0, 2), (3, 4), (19, 8)))
    return kind, is_premultiplied


def _pixels(samples: Samples, header: Header, size: tuple[int, int]) -> Pixels:
    colours = 1 if header.is_grey else 3
    planes = 1 + header.extra_channels
    if header.is_grey and samples.ndim == 3 and samples.shape == (planes, *size):  # So comes grey with several others.
        samples = samples.transpose(1, 2, 0)
    samples = samples.reshape(*samples.shape[:2], -1)
    if samples.shape[:2] != size or samples.shape[2] < colours + header.has_alpha:
        expected = f"{size[1]} x {size[0]} px with {colours + header.has_alpha} channels"
        raise ImageError("unreadable", f"JPEG XL: expected {expected}. Received: {samples.shape}")
    bits = None if header.is_float else header.bits if samples.dtype.itemsize > 1 else 8
    pixels = eight_bits(samples[..., :colours], bits=bits)
    if not header.has_alpha:
        return pixels
    return over_white(pixels, eight_bits(samples[..., colours], bits=bits), is_premultiplied=header.is_premultiplied)


def _memory_bytes(header: Header) -> int:
    pixels = header.width_px * header.height_px
    channels = (1 if header.is_grey else 3) + header.extra_channels
    itemsize = 4 if header.is_float else 1 + (header.bits > 8)
    decoding = pixels * max(3, channels) * _DECODER_BYTES  # Grey may be coded in three channels (XYB).
    converting = 2 * pixels * channels + min(WORKING_BYTES, 64 * pixels * channels)
    return pixels * channels * itemsize + max(decoding, converting)


def _damage(message: str) -> str:
    return "truncated" if "NEED_MORE_INPUT" in message else "unreadable"
