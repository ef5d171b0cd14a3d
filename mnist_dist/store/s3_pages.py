"""Parses the pages of S3's ListObjectsV2 with expat, several times as fast as botocore does."""

import contextlib
from datetime import datetime
from typing import Any
from xml.parsers import expat


def take_objects(*, response_dict: Any, customized_response_dict: dict[str, Any], **_: object) -> None:
    """Parses the objects of a page before botocore does, which is several times slower and leaves more garbage.

    The objects are removed from the page; botocore parses the rest, and any page that does not have the expected form.
    """
    body, last = response_dict["body"], b"</Contents>"
    start, end = body.find(b"<Contents>"), body.rfind(last) + len(last)
    if response_dict["status_code"] != 200 or not 0 <= start < end:
        return
    with contextlib.suppress(expat.ExpatError, KeyError, ValueError):
        customized_response_dict["Contents"] = _objects(body[start:end])
        response_dict["body"] = body[:start] + body[end:]


def _objects(contents: bytes) -> list[dict[str, Any]]:
    """The objects of `<Contents>` elements, with the fields that the store uses, in botocore's form.

    Raises:
        ExpatError, KeyError, ValueError: another element stands between them, or a field is missing.
    """
    objects, values, text, depth = list[dict[str, Any]](), dict[str, str](), "", 0

    def begin(tag: str, _: object) -> None:
        nonlocal text, depth
        text, depth = "", depth + 1
        if depth == 2 and tag != "Contents":
            raise ValueError(f"only <Contents> was expected. Received: {tag!r}")

    def add(more: str) -> None:
        nonlocal text
        text += more

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        if depth == 2:
            values[tag] = text
        elif depth == 1:
            written_at = datetime.fromisoformat(values["LastModified"])
            known = {"Key": values["Key"], "ETag": values["ETag"], "LastModified": written_at}
            objects.append({**known, "Size": int(values["Size"])})
            values.clear()

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.CharacterDataHandler, parser.EndElementHandler = begin, add, end
    parser.Parse(b"<page>" + contents + b"</page>", True)
    return objects
