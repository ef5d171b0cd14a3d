"""The members of an archive: what is known of each, and where links between them lead.

Owns: the row of a member, following links, and the status of what goes wrong with an archive. Does not own: any kind of
archive (`tar`, `zip`), or which file is one (`archives`).

Contract: links are followed within the archive only, through folders that are links, too. A link that leads to no file
of the archive stays a member, with the status `missing` and a message that names its target.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mnist_dist.errors import ImageError, MnistDistError, ServiceError
from mnist_dist.store.local import is_service_error

Packing = Literal["tar", "stream", "stored", "deflated", "bzip2", "lzma", "zstd", "other"]
MAX_SIZE_BYTES = 2**62
"""A larger size is false, and no file can seek to it."""
MAX_TARGET_BYTES = 4096
"""Longer targets of links are not followed; Linux has the same limit."""

_SHOWN_CHARACTERS = 300  # Of a target, in a message.
_MAX_LINKS = 40  # In one chain, as in Linux.
_MAX_PARTS = 256  # In one chain; bounds the work that a hostile archive can cause.


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside an archive."""

    name: str
    """Name in the archive; bytes that are not UTF-8 are escaped, as in `\\xff`."""
    size_bytes: int
    """Unpacked size, as the archive states it."""
    packing: Packing
    """`tar`: in a plain tar; `stream`: in a compressed tar; all others: in a zip."""
    offset: int
    """Position of the data (`tar`) or of the local header (zip) in the archive; `stream`: number of headers before."""
    stored_bytes: int
    """Size of the data in the archive; `stream`: before compression."""
    crc32: int | None
    """Checksum of the unpacked bytes; zip only."""
    problem: ImageError | None
    """Why the member cannot be read, if that is known from the index."""


@dataclass(frozen=True, slots=True)
class Link:
    """A link inside an archive."""

    kind: Literal["symbolic", "hard"]
    target: str
    """Of a symbolic link: relative to the folder of the link; of a hard link: the name of a member."""


class Listing:
    """Collects the members of one archive by name."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        """Of several members with the same name only the last."""
        self.duplicates = 0
        self.unread_links: list[Member] = []
        """Symbolic links whose target is their content, which is not read yet."""
        self._links: dict[str, Link] = {}

    def add(self, member: Member) -> None:
        """Adds a file."""
        self.duplicates += member.name in self.members
        self.members[member.name] = member
        if self._links:
            self._links.pop(member.name, None)

    def add_link(self, member: Member, link: Link) -> None:
        """Adds a link, which `follow_links` replaces by its file."""
        self.add(member)
        self._links[member.name] = link

    def add_unread_link(self, member: Member) -> None:
        """Adds a symbolic link whose target must be read."""
        self.add(member)
        if member.problem is None:
            self.unread_links.append(member)

    def file(self, name: str) -> Member | None:
        """The file that was last added under this name; None if there is none or it is a link."""
        return None if name in self._links else self.members.get(name)

    def set_target(self, member: Member, target: str | ImageError) -> None:
        """Tells the target of an unread link, or why it could not be read."""
        if self.members.get(member.name) is not member:
            return  # A later member of the same name replaced it.
        if isinstance(target, str):
            self._links[member.name] = Link("symbolic", target)
        else:
            problem = ImageError(target.status, f"a symbolic link whose target cannot be read: {target.message}")
            self.members[member.name] = replace(member, problem=problem)

    def follow_links(self) -> None:
        """Gives each link the data of the file it leads to, or a problem."""
        if not self._links:
            return
        files = {_path(name): member for name, member in self.members.items() if name not in self._links}
        links = {_path(name): _absolute(name, link) for name, link in self._links.items()}
        for name, link in self._links.items():
            found = _followed(_absolute(name, link), files, links)
            if isinstance(found, str):
                problem = ImageError("missing", f"a {link.kind} link to {link.target[:_SHOWN_CHARACTERS]!r}, {found}")
                self.members[name] = replace(self.members[name], problem=problem)
            else:
                self.members[name] = replace(found, name=name)


def _path(name: str) -> str:
    """The name as a path from the root of the archive, in its shortest form; empty for one that leaves the archive."""
    if "/" not in name:
        return "" if name in (".", "..") else name
    path: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not path:
                return ""
            path.pop()
        elif part not in ("", "."):
            path.append(part)
    return "/".join(path)


def _absolute(name: str, link: Link) -> str:
    """The target of a link from the root of the archive, not shortened: a folder before `..` may be a link itself.

    It begins with `/` if the target does, since that lies outside of the archive.
    """
    if link.kind == "hard":
        return link.target.lstrip("/")  # As in the names of members, which tar keeps without it.
    folder = _path(name).rpartition("/")[0]
    return f"{folder}/{link.target}" if folder and not link.target.startswith("/") else link.target


def _followed(target: str, files: Mapping[str, Member], links: Mapping[str, str]) -> Member | str:
    """The file at the end of a chain of links, or why there is none."""
    path, pending, followed = list[str](), list[str](), 0
    for _ in range(_MAX_PARTS):
        if target:
            followed += 1
            if target.startswith("/"):
                return "which is not inside the archive"
            if followed > _MAX_LINKS or len(target) > 2 * MAX_TARGET_BYTES:
                break
            path.clear()
            pending += reversed(target.split("/"))
        if not pending:
            return (path and files.get("/".join(path))) or "which is not a file in the archive"
        part, target = pending.pop(), ""
        if part == "..":
            if not path:
                return "which is not inside the archive"
            path.pop()
        elif part not in ("", "."):
            path.append(part)
            target = links.get("/".join(path), "")
    return "which leads through too many links or folders"


@contextlib.contextmanager
def image_errors() -> Iterator[None]:
    """Turns the failure of one archive into an `ImageError`; the failure of a service stays what it is."""
    try:
        yield
    except MnistDistError:
        raise
    except FileNotFoundError as err:
        raise ImageError("missing", err.strerror or str(err)) from err
    except PermissionError as err:
        raise ImageError("denied", err.strerror or str(err)) from err
    except EOFError as err:
        raise ImageError("truncated", str(err)) from err
    except MemoryError as err:
        raise ImageError("too_large", "it does not fit in memory") from err
    except Exception as err:  # The border: decoders raise anything on damaged bytes.
        if isinstance(err, OSError) and is_service_error(err):
            raise ServiceError(f"reading an archive was interrupted: {err}") from err
        # A decompressor raises an OSError without an errno when the bytes are damaged.
        status = "failed" if isinstance(err, OSError) and err.errno is not None else "unreadable"
        raise ImageError(status, " ".join(str(err).split()) or type(err).__name__) from err


def bare(err: ImageError) -> ImageError:
    """Copies the error without its traceback, whose frames would keep the archive's bytes in memory."""
    return ImageError(err.status, err.message)


def check_whole(data: bytes | memoryview, size_bytes: int) -> None:
    """Checks that all of a member's bytes are there.

    Raises:
        ImageError: the archive ends within the member.
    """
    if len(data) < size_bytes:
        raise ImageError("truncated", f"the archive ends {size_bytes - len(data):,} bytes before the member does")
