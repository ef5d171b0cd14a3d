"""JPEG 2000: whether the channels of a JP2 file stand in the order of their colours, which Pillow takes for granted.

Source: ISO/IEC 15444-1, I.5.3.5 (component mapping) and I.5.3.6 (channel definition).
"""

import struct

_COLOUR = 0


def has_reordered_channels(data: bytes) -> bool:
    """Whether the header of a JP2 file says that its channels are not red, green, blue, alpha in this order."""
    head = data[: max(0, data.find(b"jp2c"))]
    return _defines_another_order(head) or _maps_another_order(head)


def _defines_another_order(head: bytes) -> bool:
    entries = _entries(head, b"cdef", "HHH", begin=2)
    return any(kind == _COLOUR and place != channel + 1 for channel, kind, place in entries)


def _maps_another_order(head: bytes) -> bool:
    columns = [column for _, is_palette, column in _entries(head, b"cmap", "HBB", begin=0) if is_palette]
    return columns != list(range(len(columns)))


def _entries(head: bytes, name: bytes, form: str, *, begin: int) -> list[tuple[int, ...]]:
    """The entries of a box, behind its first `begin` bytes; none without it."""
    at = head.find(name)
    if at < 4:
        return []
    body = head[at + 4 + begin : at - 4 + int.from_bytes(head[at - 4 : at], "big")]
    size = struct.calcsize(f">{form}")
    return list(struct.iter_unpack(f">{form}", body[: len(body) // size * size]))
