"""What lies where something was expected: the end of a message about a path that is wrong.

Owns: finding the nearest folder that exists, a few of its names, and the name that was probably meant. Does not own:
the rest of the message.

Contract: of a folder at most `_MAX_NAMES` names are listed. One that cannot be listed adds nothing to the message,
since the path is what is wrong.
"""

import difflib
import os

from mnist_dist.errors import MnistDistError
from mnist_dist.store.anywhere import ANYWHERE
from mnist_dist.store.base import Level, Store
from mnist_dist.store.uris import absolute, is_bucket, is_remote, is_web, join

_MAX_NAMES = 1_000
_SHOWN = 5


def what_is_there(uri: str, *, store: Store = ANYWHERE) -> str:
    """What the folder holds, or where it does not exist the nearest folder above it, and which name is similar.

    Args:
        uri: a path or URI, of a file or folder that may not exist.
        store: where it was looked for.

    Returns:
        `; /data holds cats/, dogs/, notes.txt and 12 more (did you mean /data/cats?)`; empty: nothing can be said.
    """
    try:
        return _described(absolute(uri), store)
    except (OSError, ValueError, MnistDistError):  # The message that this belongs to is the one that counts.
        return ""


def _described(uri: str, store: Store) -> str:
    if is_web(uri):
        return ""
    folder, missing = uri, list[str]()
    while (level := _level(folder, store)) is None:
        if is_bucket(folder) or folder in ("", "/"):
            return ""
        if not is_remote(folder) and os.path.isfile(folder):
            return f"; {folder} is a file"
        folder, _, name = folder.rpartition("/")
        missing.insert(0, name)
        folder = folder or "/"
    return f"; {folder} {_holding(level)}{_meant(folder, level, missing, store)}"


def _level(folder: str, store: Store) -> Level | None:
    try:
        return store.list_level(folder, max_names=_MAX_NAMES)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _holding(level: Level) -> str:
    names = [*(f"{name}/" for name in level.folders), *sorted(level.files)]
    seen = [name for name in names if not name.startswith(".")]
    if not seen:
        return "is empty"
    more = len(seen) - _SHOWN
    rest = "" if more <= 0 else " and more" if len(names) >= _MAX_NAMES else f" and {more:,} more"
    return f"holds {', '.join(seen[:_SHOWN])}{rest}"


def _meant(folder: str, level: Level, missing: list[str], store: Store) -> str:
    """The path with the name that is most like the first missing one; the rest of it only where that exists."""
    if not missing:
        return ""
    by_case = {name.lower(): name for name in (*level.files, *level.folders)}
    near = difflib.get_close_matches(missing[0].lower(), by_case, n=1)
    if not near:
        return ""
    first = join(folder, by_case[near[0]])
    whole = join(first, *missing[1:])
    return f" (did you mean {whole if store.exists(whole) else first}?)"
