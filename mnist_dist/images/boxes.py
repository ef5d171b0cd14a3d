"""Boxes: what the container of a HEIF or AVIF file says of its items.

Owns: the types of items, and where the streams of the main image lie. Does not own: what the streams say (`av1`, or
the library that decodes them).

Files may be hostile: the work is linear in their size, and bounded.

Source: ISO/IEC 14496-12, 8.7 (stsz, stco) and 8.11 (meta, iloc, iinf, iref); ISO/IEC 23008-12 for images.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from mnist_dist.errors import ImageError

MAX_STEPS = 20_000
"""Boxes, items, references and extents that are looked at in one file. libheif takes 1,000 items."""
SHARED_BYTES = 2**24
"""So much may items have in common, beyond what the file has twice: tiles of one colour may be the same bytes."""
_TRACK = (b"mdia", b"minf", b"stbl")
_Span = tuple[int, int]


@dataclass
class Steps:
    """Counts what is looked at in one file."""

    taken: int = 0

    def take(self) -> None:
        """Counts one.

        Raises:
            ImageError: `unreadable`, it was one too many.
        """
        self.taken += 1
        if self.taken > MAX_STEPS:
            raise ImageError("unreadable", f"the container has more than {MAX_STEPS:,} boxes and items")


def item_types(data: bytes) -> Iterator[bytes]:
    """The type of each item of a file, and the MIME types.

    Every `infe` counts, wherever it stands: libheif might find it there in a damaged file.

    Raises:
        ImageError: `unreadable`, there are more than any reader takes.
    """
    steps, at, nul, told = Steps(), -4, -1, -1
    while (at := data.find(b"infe", at + 4)) >= 0:
        steps.take()
        version = data[at + 4] if at + 4 < len(data) else 0
        name = at + {2: 16, 3: 18}.get(version, 12)
        if version in (2, 3):
            yield data[name - 4 : name]
        if nul < name:  # Else no NUL has come since. Nothing is searched twice.
            nul = _nul(data, name)
        if nul > told and (version < 2 or data[name - 4 : name] == b"mime"):
            told = nul
            yield data[nul + 1 : _nul(data, nul + 1)]


def main_streams(data: bytes, kind: bytes, steps: Steps) -> Iterator[bytes]:
    """The data that a reader may decode for the main image: its own, its tiles', its alpha's, the first of a sequence.

    Args:
        data: a whole file.
        kind: type of the items that count, for example `av01`.
        steps: raises once there is too much to look at.

    Raises:
        ImageError: `unreadable`, the container has too many parts.
    """
    for meta in _inside(data, (0, len(data)), (b"meta",), steps):
        yield from _Items(data, steps, (meta[0] + 4, meta[1])).streams(kind)
    for track in _inside(data, (0, len(data)), (b"moov", b"trak"), steps):
        yield from _first_samples(data, track, steps)


def _nul(data: bytes, begin: int) -> int:
    found = data.find(b"\0", begin)
    return found if found >= 0 else len(data)


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")


def _boxes(data: bytes, span: _Span, steps: Steps) -> Iterator[tuple[bytes, _Span]]:
    """Type and content of each box within a part of the file."""
    at, end = span
    while at + 8 <= end:
        steps.take()
        size, head = _number(data, at, 4), 8
        if size == 1:
            size, head = _number(data, at + 8, 8), 16
        stop = end if size == 0 else min(at + max(size, head), end)
        yield data[at + 4 : at + 8], (min(at + head, stop), stop)
        at = stop


def _inside(data: bytes, span: _Span, path: tuple[bytes, ...], steps: Steps) -> Iterator[_Span]:
    """The content of every box at the end of a path of types."""
    if not path:
        yield span
        return
    for kind, content in _boxes(data, span, steps):
        if kind == path[0]:
            yield from _inside(data, content, path[1:], steps)


def _first_samples(data: bytes, track: _Span, steps: Steps) -> Iterator[bytes]:
    for table in _inside(data, track, _TRACK, steps):
        boxes = dict(_boxes(data, table, steps))
        sizes = boxes.get(b"stsz", (0, 0))[0] + 4
        size = _number(data, sizes, 4) or _number(data, sizes + 8, 4)
        for kind, width in ((b"stco", 4), (b"co64", 8)):
            if kind in boxes:
                begin = _number(data, boxes[kind][0] + 8, width)
                yield data[begin : begin + size]


@dataclass
class _Items:
    """The items of one box `meta`."""

    data: bytes
    steps: Steps
    span: _Span
    boxes: dict[bytes, _Span] = field(init=False)

    def __post_init__(self) -> None:
        self.boxes = dict(_boxes(self.data, self.span, self.steps))

    def streams(self, kind: bytes) -> Iterator[bytes]:
        """The data of the items of a type that belong to the main one."""
        kinds, wanted = self._kinds(), self._related()
        left = 2 * len(self.data) + SHARED_BYTES
        for item, spans in self._places():
            if item in wanted and kinds.get(item) == kind:
                left -= sum(max(0, min(end, len(self.data)) - begin) for begin, end in spans)
                if left < 0:
                    raise ImageError("unreadable", "the items of the container have more bytes than the file")
                yield b"".join(self.data[begin:end] for begin, end in spans)

    def _kinds(self) -> dict[int, bytes]:
        begin, end = self.boxes.get(b"iinf", (0, 0))
        first = begin + (6 if self._version(begin) == 0 else 8)
        kinds = {}
        for _, (at, _) in _boxes(self.data, (first, end), self.steps):
            width = 4 if self._version(at) == 3 else 2
            kinds[_number(self.data, at + 4, width)] = self.data[at + 6 + width : at + 10 + width]
        return kinds

    def _related(self) -> set[int]:
        """The main item, what it is derived from, and what belongs to these, such as alpha."""
        at = self.boxes.get(b"pitm", (0, 0))[0]
        related = {_number(self.data, at + 4, 2 if self._version(at) == 0 else 4)}
        links = self._links()
        open_ends = list(related)
        while open_ends:
            new = set(links.pop(open_ends.pop(), ())) - related
            related |= new
            open_ends += new
        return related

    def _links(self) -> dict[int, list[int]]:
        begin, end = self.boxes.get(b"iref", (0, 0))
        width = 2 if self._version(begin) == 0 else 4
        links: dict[int, list[int]] = {}
        for kind, (at, stop) in _boxes(self.data, (begin + 4, end), self.steps):
            item = _number(self.data, at, width)
            for place in range(at + width + 2, stop - width + 1, width):
                self.steps.take()
                other = _number(self.data, place, width)
                source, target = (item, other) if kind == b"dimg" else (other, item)
                if kind in (b"dimg", b"auxl"):
                    links.setdefault(source, []).append(target)
        return links

    def _places(self) -> Iterator[tuple[int, list[_Span]]]:
        """Each item, and the parts of the file that it consists of."""
        at, end = self.boxes.get(b"iloc", (0, 0))
        version = self._version(at)
        sizes = _number(self.data, at + 4, 2)
        offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        wide = 2 if version < 2 else 4
        count, at = _number(self.data, at + 6, wide), at + 6 + wide
        for _ in range(count):
            if at >= end:
                return
            self.steps.take()
            item, at = _number(self.data, at, wide), at + wide
            is_inside = bool(version and _number(self.data, at, 2) & 15 == 1)
            at += 4 if version else 2
            start = _number(self.data, at, base) + (self.boxes.get(b"idat", (0, 0))[0] if is_inside else 0)
            extents, at = _number(self.data, at + base, 2), at + base + 2
            skipped = index if version else 0
            spans = []
            for _ in range(extents):
                self.steps.take()
                begin = start + _number(self.data, at + skipped, offset)
                taken = _number(self.data, at + skipped + offset, length)
                spans.append((begin, begin + taken if taken else len(self.data)))
                at += skipped + offset + length
            yield item, spans

    def _version(self, at: int) -> int:
        return self.data[at] if at < len(self.data) else 0
