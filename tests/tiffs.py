"""tiffs: writes TIFFs of every kind, those that no library writes, too."""

# h = height px, w = width px, S = samples of a pixel

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import imagecodecs
import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[Any]
Order = Literal["<", ">"]
ORDERS: tuple[Order, ...] = ("<", ">")

_ENCODERS: dict[int, Callable[[bytes], bytes]] = {
    1: bytes,
    5: lambda data: bytes(imagecodecs.lzw_encode(data)),
    8: lambda data: bytes(imagecodecs.zlib_encode(data)),
    32773: lambda data: bytes(imagecodecs.packbits_encode(data)),
    32946: lambda data: bytes(imagecodecs.zlib_encode(data)),
    34925: lambda data: bytes(imagecodecs.lzma_encode(data)),
    50000: lambda data: bytes(imagecodecs.zstd_encode(data)),
}


@dataclass(frozen=True, kw_only=True)
class Tiff:
    """How a page is written."""

    bits: int
    photometric: int = 1
    sample_format: int = 1
    planar: bool = False
    order: Order = "<"
    big: bool = False
    compression: int = 1
    predictor: int = 1
    fill_order: int = 1
    rows: int | None = None
    """Rows of a strip; None for a single strip."""
    tile_px: tuple[int, int] | None = None
    """Width and height of a tile; None for strips."""
    extra: tuple[int, ...] = ()
    orientation: int = 1
    colour_map: tuple[int, ...] = ()
    subfile: int = 0
    tags: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Further tags, or others than would be written."""


def packed(samples: Samples, how: Tiff) -> bytes:
    """`[h, w, S]` as it is stored without compression; each row begins with a byte of its own."""
    if how.bits in (8, 16, 32, 64):
        return samples.astype(samples.dtype.newbyteorder(how.order)).tobytes()
    if how.bits == 24 and samples.dtype.kind == "f":
        return bytes(imagecodecs.float24_encode(np.ascontiguousarray(samples), byteorder=how.order))
    if how.bits == 24:  # Whole bytes follow the byte order, as in libtiff.
        whole = samples.astype(f"{how.order}i4").view(np.uint8).reshape(-1, 4)
        return (whole[:, :3] if how.order == "<" else whole[:, 1:]).tobytes()
    patterns = samples.reshape(samples.shape[0], -1).astype(np.uint64)
    shifts = np.arange(how.bits - 1, -1, -1, dtype=np.uint64)
    bits = (patterns[..., None] >> shifts & np.uint64(1)).astype(np.uint8)
    return np.packbits(bits.reshape(samples.shape[0], -1), axis=1).tobytes()


def pages(*images: tuple[Samples, Tiff]) -> bytes:
    """A TIFF of several pages; byte order and kind are those of the first."""
    how = images[0][1]
    data = bytearray((b"II" if how.order == "<" else b"MM") + struct.pack(f"{how.order}H", 43 if how.big else 42))
    data += struct.pack(f"{how.order}HHQ", 8, 0, 0) if how.big else struct.pack(f"{how.order}I", 0)
    link = 8 if how.big else 4
    for samples, each in images:
        offsets, counts = [], []
        for segment in _segments(samples, each):
            data += b"\0" * (len(data) % 2)
            offsets.append(len(data))
            counts.append(len(segment))
            data += segment
        data += b"\0" * (-len(data) % 8)
        struct.pack_into(f"{how.order}{'Q' if how.big else 'I'}", data, link, len(data))
        link = _write_tags(data, _tags(samples, each, offsets, counts), each)
    return bytes(data)


def tiff(samples: Samples, how: Tiff) -> bytes:
    """A TIFF of one page.

    Args:
        samples: `[h, w]` or `[h, w, S]`; of less bits than their type, only the low ones are stored.
        how: its kind.
    """
    return pages((samples, how))


def _segments(samples: Samples, how: Tiff) -> Sequence[bytes]:
    samples = samples.reshape(*samples.shape[:2], -1)
    planes = [samples[..., band : band + 1] for band in range(samples.shape[2])] if how.planar else [samples]
    return [_encoded(part, how) for plane in planes for part in _parts(plane, how)]


def _parts(plane: Samples, how: Tiff) -> list[Samples]:
    height, width = plane.shape[:2]
    if how.tile_px is None:
        rows = how.rows or height
        return [plane[top : top + rows] for top in range(0, height, rows)]
    across, down = how.tile_px
    padded = np.pad(plane, ((0, -height % down), (0, -width % across), (0, 0)), mode="edge")
    return [
        padded[top : top + down, left : left + across]
        for top in range(0, height, down)
        for left in range(0, width, across)
    ]


def _encoded(part: Samples, how: Tiff) -> bytes:
    if how.predictor == 2:
        part = np.concatenate([part[:, :1], part[:, 1:] - part[:, :-1]], axis=1)
    data = packed(part, how)
    if how.predictor == 3:
        data = bytes(imagecodecs.floatpred_encode(np.ascontiguousarray(part), axis=-2).tobytes())
    data = _ENCODERS[how.compression](data)
    return bytes(imagecodecs.bitorder_encode(data)) if how.fill_order == 2 else data


def _tags(samples: Samples, how: Tiff, offsets: list[int], counts: list[int]) -> dict[int, Sequence[int]]:
    height, width = samples.shape[:2]
    count = 1 if samples.ndim == 2 else samples.shape[2]
    tags: dict[int, Sequence[int]] = {254: [how.subfile], 256: [width], 257: [height], 258: [how.bits] * count}
    tags |= {259: [how.compression], 262: [how.photometric], 266: [how.fill_order], 274: [how.orientation]}
    tags |= {277: [count], 284: [1 + how.planar], 317: [how.predictor], 339: [how.sample_format] * count}
    if how.tile_px is None:
        tags |= {273: offsets, 278: [how.rows or height], 279: counts}
    else:
        tags |= {322: [how.tile_px[0]], 323: [how.tile_px[1]], 324: offsets, 325: counts}
    tags |= {338: how.extra} if how.extra else {}
    tags |= {320: how.colour_map} if how.colour_map else {}
    return tags | dict(how.tags)


_BYTES = frozenset({347})
_SHORTS = frozenset({258, 259, 262, 266, 274, 277, 284, 317, 320, 338, 339, 530})


def _write_tags(data: bytearray, tags: dict[int, Sequence[int]], how: Tiff) -> int:
    """Appends the tags; returns where the offset of the next page stands."""
    word, place = ("Q", 8) if how.big else ("I", 4)
    start, size = len(data), 20 if how.big else 12
    head, entries, body = (8 if how.big else 2), b"", b""
    begin = start + head + size * len(tags) + place
    for tag, values in sorted(tags.items()):
        kind, code = (1, "B") if tag in _BYTES else (3, "H") if tag in _SHORTS else (16, "Q") if how.big else (4, "I")
        content = struct.pack(f"{how.order}{len(values)}{code}", *values)
        if len(content) > place:
            content, body = struct.pack(f"{how.order}{word}", begin + len(body)), body + content
        entries += struct.pack(f"{how.order}HH{word}", tag, kind, len(values)) + content.ljust(place, b"\0")
    data += struct.pack(f"{how.order}{'Q' if how.big else 'H'}", len(tags)) + entries
    data += struct.pack(f"{how.order}{word}", 0) + body
    return begin - place
