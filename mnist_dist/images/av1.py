"""AV1: how large the frames of an AVIF are by their streams.

Owns: reading sequence headers. Does not own: the container (`boxes`), decoding (`pillow`).

libavif takes the size of an image from its container, and decodes, then scales, frames of any other size.

Source: AV1 Bitstream & Decoding Process Specification, 5.3 (OBU header), 5.5 (sequence header).
"""

from collections.abc import Iterator

from mnist_dist.images.boxes import Steps, main_streams

_SEQUENCE_HEADER = 1
_HEADER_BYTES = 512  # A sequence header of 32 operating points has less.


def frame_sizes(data: bytes) -> list[tuple[int, int]]:
    """Width and height of the largest frame of each stream of the main image, as far as they can be found.

    Raises:
        ImageError: `unreadable`, the file has too many parts.
    """
    steps = Steps()
    return [_frame_size(header) for stream in main_streams(data, b"av01", steps) for header in _headers(stream, steps)]


def _headers(stream: bytes, steps: Steps) -> Iterator[bytes]:
    """The sequence headers of a stream of OBUs."""
    at = 0
    while at < len(stream):
        steps.take()
        head = stream[at]
        at += 2 if head & 4 else 1
        size, at = _leb128(stream, at) if head & 2 else (len(stream) - at, at)
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            yield stream[at : at + min(size, _HEADER_BYTES)]
        at += size


def _leb128(stream: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, and where it ends."""
    value = 0
    for index, byte in enumerate(stream[at : at + 8]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    return value, at + 8


class _Bits:
    """Bits of a header, the highest of each byte first. Behind its end they are 0."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        value = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return value & (1 << count) - 1

    def skip_uvlc(self) -> None:
        zeros = 0
        while zeros < 32 and not self.take(1):
            zeros += 1
        self.take(zeros)


def _frame_size(header: bytes) -> tuple[int, int]:
    bits = _Bits(header)
    bits.take(4)  # Profile, still picture.
    if bits.take(1):  # A reduced header.
        bits.take(5)
    else:
        _skip_timing(bits)
    wide, high = bits.take(4) + 1, bits.take(4) + 1
    return bits.take(wide) + 1, bits.take(high) + 1


def _skip_timing(bits: _Bits) -> None:
    """Skips the timing of a sequence, and its operating points."""
    delay_bits = 0
    if bits.take(1):
        bits.take(64)
        if bits.take(1):
            bits.skip_uvlc()
        if bits.take(1):
            delay_bits = bits.take(5) + 1
            bits.take(42)
    has_display_delay = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:
            bits.take(1)
        if delay_bits and bits.take(1):
            bits.take(2 * delay_bits + 1)
        if has_display_delay and bits.take(1):
            bits.take(4)
